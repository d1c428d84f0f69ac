"""The worker's face of a model: from an artifact to a callable, once per process."""

import threading

from fruitdask.worker.models.artifact import ModelArtifact, Predictor
from fruitdask.worker.models.engines import ENGINES

# The two names below are a process's own cache, the only state of this package at module level: a task cannot carry a network with it.
_lock = threading.Lock()
_predictors: dict[str, Predictor] = {}


def load_predictor(artifact: ModelArtifact, *, n_threads: int) -> Predictor:
    """Turn an artifact into a callable, once per process and artifact."""
    key = artifact.sha256
    with _lock:
        if key not in _predictors:
            _predictors[key] = ENGINES[artifact.engine].load_network(artifact, n_threads=n_threads)
        return _predictors[key]


def prepare_engine(engine: str, *, n_threads: int) -> None:
    """Import an engine ahead of the first artifact, which takes seconds."""
    with _lock:
        ENGINES[engine].start_engine(n_threads=n_threads)
