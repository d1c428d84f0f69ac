"""Networks: built and packed on the client (``build``, ``child``, ``cache``), run on workers (``engines``)."""

from fruitdask.worker.models.artifact import ModelArtifact
from fruitdask.worker.models.build import choose_input_px, fingerprint_model
from fruitdask.worker.models.child import build_artifact, start_building
from fruitdask.worker.models.engines import (
    choose_batch_size,
    choose_engine,
    load_predictor,
    prepare_engine,
    resolve_engine,
)
from fruitdask.worker.models.networks import check_name

__all__ = [
    "ModelArtifact",
    "build_artifact",
    "check_name",
    "choose_batch_size",
    "choose_engine",
    "choose_input_px",
    "fingerprint_model",
    "load_predictor",
    "prepare_engine",
    "resolve_engine",
    "start_building",
]
