"""Engines: which one runs a network, and the networks that a worker process has loaded."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fruitdask.core.config import CloudClusterConfig, ClusterConfig, ModelConfig
from fruitdask.errors import ModelError
from fruitdask.worker.models import openvino, tensorflow
from fruitdask.worker.models.artifact import ModelArtifact, Predictor

#: Images per call of the network. CPUs gain nothing from more (TensorFlow does 216 images/s per core with 8, 193 with
#: 32; OpenVINO takes them one by one); GPUs want more, depending on the network and their memory.
_BATCH_SIZE, _BATCH_SIZE_OF_GPUS = 8, 32
# The cache of a process, since a task cannot carry a network.
_lock = threading.Lock()
_predictors: dict[str, Predictor] = {}


@dataclass(frozen=True)
class Engine:
    """The functions of an engine; its name in `ENGINES` is that of its package."""

    #: On the client: from a frozen TensorFlow graph to the payload of an artifact.
    pack_graph: Callable[[bytes], bytes]
    start_engine: Callable[..., None]
    #: On a worker: from an artifact to a callable that threads may share.
    load_network: Callable[..., Predictor]


ENGINES = {
    "tensorflow": Engine(tensorflow.pack_graph, tensorflow.start_engine, tensorflow.load_network),
    "openvino": Engine(openvino.pack_graph, openvino.start_engine, openvino.load_network),
}


def load_predictor(artifact: ModelArtifact, *, n_threads: int) -> Predictor:
    """Load an artifact, once per process."""
    with _lock:
        if artifact.sha256 not in _predictors:
            _predictors[artifact.sha256] = ENGINES[artifact.engine].load_network(artifact, n_threads=n_threads)
        return _predictors[artifact.sha256]


def prepare_engine(engine: str, *, n_threads: int) -> None:
    """Import an engine before the first artifact arrives; this takes seconds."""
    with _lock:
        ENGINES[engine].start_engine(n_threads=n_threads)


def resolve_engine(model: ModelConfig, cluster: ClusterConfig) -> ModelConfig:
    """Resolve the engine ``auto`` for the workers, which may be other machines."""
    return model.model_copy(update={"engine": choose_engine(model, has_gpu=_has_gpu(cluster))})


def choose_batch_size(model: ModelConfig, cluster: ClusterConfig) -> int:
    """Choose the number of images per call of the network."""
    may_use_gpu = model.engine != "openvino" and _has_gpu(cluster)
    return _BATCH_SIZE_OF_GPUS if may_use_gpu else _BATCH_SIZE


def choose_engine(config: ModelConfig, *, has_gpu: bool | None = None) -> str:
    """Choose the engine for a network: OpenVINO is faster on a CPU, only TensorFlow uses a GPU."""
    is_installed, is_mixed = find_spec("openvino") is not None, config.precision != "float32"
    if config.engine == "auto":
        has_gpu = _has_nvidia_gpu() if has_gpu is None else has_gpu
        return "openvino" if is_installed and not (has_gpu or is_mixed) else "tensorflow"
    if config.engine == "openvino" and is_mixed:
        raise ModelError(
            f"model.precision {config.precision} needs TensorFlow, but model.engine is openvino; "
            "set model.engine: tensorflow"
        )
    if config.engine == "openvino" and not is_installed:
        raise ModelError(
            "model.engine openvino needs its extra: pip install 'fruitdask[openvino]', or set model.engine: tensorflow"
        )
    return config.engine


def _has_gpu(cluster: ClusterConfig) -> bool:
    """Whether workers have an NVIDIA GPU; those of clusters that fruitdask does not start are like this machine."""
    return cluster.has_gpu if isinstance(cluster, CloudClusterConfig) else _has_nvidia_gpu()


def _has_nvidia_gpu() -> bool:
    """Look for the device of NVIDIA's driver, or for its tool: WSL has no such device."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None
