"""The engine TensorFlow: frozen graphs, on CPUs and on GPUs."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from fruitdask.worker.models.artifact import ModelArtifact, Predictor

logger = logging.getLogger(__name__)


def pack_graph(graph: bytes) -> bytes:
    """Leave a graph as it is."""
    return graph


def start_engine(*, n_threads: int) -> None:
    """Import TensorFlow with its threads limited, which works only before its first operation."""
    tf = import_tensorflow(with_keras=False)
    try:
        tf.config.threading.set_intra_op_parallelism_threads(n_threads)
        tf.config.threading.set_inter_op_parallelism_threads(n_threads)
    except RuntimeError:
        logger.info("TensorFlow already runs in this process: its number of threads stays as it is")
    # GPUs since Ampere would round inputs to 10 bits, and features would differ from a CPU's by more than 1e-4.
    tf.config.experimental.enable_tensor_float_32_execution(False)


def load_network(artifact: ModelArtifact, *, n_threads: int) -> Predictor:
    """Load a frozen graph: neither Keras nor a SavedModel folder is needed, and the constants let TensorFlow fuse
    operations.
    """
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
    """Import TensorFlow quietly; an import that fails still raises."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Otherwise the first process takes all memory of a GPU, and leaves none to the others of the machine.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    with _muted_stderr(), nullcontext() if with_keras else _without_keras():
        import tensorflow
    return tensorflow


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Send the process's standard error nowhere: TensorFlow's C++ logs CPU features and absent GPUs there, whatever its settings say."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextmanager
def _without_keras() -> Iterator[None]:
    """Let TensorFlow believe that Keras 2 is wanted, which it imports on first use only; ``tf.keras`` is Keras 3 again afterwards."""
    name = "TF_USE_LEGACY_KERAS"
    saved = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if saved is not None:
            os.environ[name] = saved
