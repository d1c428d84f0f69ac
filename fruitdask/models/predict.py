"""The worker's face of a model: from an artifact to a callable, once per process."""

import threading

from fruitdask.models.artifact import ModelArtifact, Predictor
from fruitdask.models.engines import ENGINES

# The two names below are a process's own cache, the only state of this package at module level: a task cannot carry a network with it.
_lock = threading.Lock()
_predictors: dict[str, Predictor] = {}


def load_predictor(artifact: ModelArtifact, *, n_threads: int) -> Predictor:
    """
    Turn an artifact into a callable, once per process and artifact.

    Parameters
    ----------
    artifact : ModelArtifact
        The packed network.
    n_threads : int
        Threads that the engine may use: the process's share of the cores. Only the first call in a process can set it.

    Returns
    -------
    Predictor
        A function from images, uint8 of shape (n, input_px, input_px, 3), to features, float32 of shape (n, n_features). Threads may
        share it.

    Raises
    ------
    EngineError
        If the artifact's engine is not installed here, or cannot read it.
    """
    key = artifact.sha256
    with _lock:
        if key not in _predictors:
            _predictors[key] = ENGINES[artifact.engine].load_network(artifact, n_threads=n_threads)
        return _predictors[key]


def prepare_engine(engine: str, *, n_threads: int) -> None:
    """
    Import an engine ahead of the first artifact, which takes seconds.

    Parameters
    ----------
    engine : str
        The engine of the artifacts to come: ``tensorflow`` or ``openvino``.
    n_threads : int
        Threads that the engine may use.

    Raises
    ------
    EngineError
        If the engine is not installed here.
    """
    with _lock:
        ENGINES[engine].start_engine(n_threads=n_threads)
