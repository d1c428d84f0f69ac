"""Networks: built and packed on the client (``build``, ``child``, ``cache``), run on the workers (``predict``)."""

from fruitdask.models.artifact import ModelArtifact
from fruitdask.models.build import build_artifact, choose_input_px, fingerprint_model
from fruitdask.models.child import start_building
from fruitdask.models.predict import Predictor, load_predictor, prepare_engine

__all__ = [
    "ModelArtifact",
    "Predictor",
    "build_artifact",
    "choose_input_px",
    "fingerprint_model",
    "load_predictor",
    "prepare_engine",
    "start_building",
]
