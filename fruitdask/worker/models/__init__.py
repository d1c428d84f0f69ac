"""Networks: built and packed on the client (``build``, ``child``, ``cache``), run by an engine on the workers (``predict``)."""

from fruitdask.worker.models.artifact import ModelArtifact, Predictor
from fruitdask.worker.models.build import choose_input_px, fingerprint_model
from fruitdask.worker.models.child import build_artifact, start_building
from fruitdask.worker.models.engines import choose_batch_size, choose_engine, settle_engine
from fruitdask.worker.models.networks import check_name
from fruitdask.worker.models.predict import load_predictor, prepare_engine

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
