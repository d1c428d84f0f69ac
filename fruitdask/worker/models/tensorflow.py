"""The TensorFlow engine: frozen graphs on CPUs and GPUs."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from fruitdask.worker.models.artifact import ModelArtifact, Predictor

logger = logging.getLogger(__name__)


def pack_graph(graph: bytes) -> bytes:
    """Return a graph unchanged."""
    return graph


def start_engine(*, n_threads: int) -> None:
    """Import TensorFlow and limit its threads, which works only before its first operation."""
    tf = import_tensorflow(with_keras=False)
    try:
        tf.config.threading.set_intra_op_parallelism_threads(n_threads)
        tf.config.threading.set_inter_op_parallelism_threads(n_threads)
    except RuntimeError:
        logger.info("TensorFlow already runs in this process and keeps its number of threads")
    # GPUs since Ampere would round inputs to 10 bits, and features would differ from a CPU's by more than 1e-4.
    tf.config.experimental.enable_tensor_float_32_execution(False)


def load_network(artifact: ModelArtifact, *, n_threads: int) -> Predictor:
    """Load a frozen graph: it needs neither Keras nor a folder, and TensorFlow can fuse its constants."""
    start_engine(n_threads=n_threads)
    tf = import_tensorflow(with_keras=False)
    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString(artifact.payload)
    wrapped = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(graph, name=""), [])
    function = wrapped.prune("images:0", "features:0")

    def predict(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        features: npt.NDArray[np.float32] = function(tf.constant(images)).numpy()
        return features

    return predict


def import_tensorflow(*, with_keras: bool) -> Any:
    """Import TensorFlow without its messages; errors are still raised."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # By default the first process allocates all memory of a GPU, and the machine's other processes get none.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    # TensorFlow imports Keras 3 at once, but Keras 2 only on first use; afterwards ``tf.keras`` is Keras 3 again.
    with _muted_stderr(), nullcontext() if with_keras else temporary_environment(TF_USE_LEGACY_KERAS="1"):
        import tensorflow
    return tensorflow


@contextmanager
def temporary_environment(**variables: str | None) -> Iterator[None]:
    """Set environment variables during a block, or remove those that are None."""
    saved = {name: os.environ.get(name) for name in variables}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(saved)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    """Set environment variables, or remove those that are None."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Discard standard error: TensorFlow's C++ writes about CPU features and missing GPUs, whatever its settings."""
    saved = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
