"""Networks: built and packed on the client (``build``, ``child``, ``cache``), run by an engine on the workers (``predict``)."""

from fruitdask.models.artifact import ModelArtifact, Predictor
from fruitdask.models.build import build_artifact, choose_input_px, fingerprint_model
from fruitdask.models.child import start_building
from fruitdask.models.engines import choose_batch_size, choose_engine, settle_engine
from fruitdask.models.predict import load_predictor, prepare_engine

__all__ = [
    "ModelArtifact",
    "Predictor",
    "build_artifact",
    "choose_batch_size",
    "choose_engine",
    "choose_input_px",
    "fingerprint_model",
    "load_predictor",
    "prepare_engine",
    "settle_engine",
    "start_building",
]
