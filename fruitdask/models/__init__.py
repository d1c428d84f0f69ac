"""Networks: built and packed on the client (``build``, ``child``, ``cache``), run by an engine on the workers (``predict``)."""

from fruitdask.models.artifact import ModelArtifact, Predictor
from fruitdask.models.build import choose_input_px, fingerprint_model
from fruitdask.models.child import build_artifact, start_building
from fruitdask.models.engines import choose_batch_size, choose_engine, settle_engine
from fruitdask.models.networks import check_name
from fruitdask.models.predict import load_predictor, prepare_engine

__all__ = [
    "ModelArtifact",
    "Predictor",
    "build_artifact",
    "check_name",
    "choose_batch_size",
    "choose_engine",
    "choose_input_px",
    "fingerprint_model",
    "load_predictor",
    "prepare_engine",
    "settle_engine",
    "start_building",
]
