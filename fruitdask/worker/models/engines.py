"""What runs a network: the engines, and which of them a configuration takes."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fruitdask.core.config import Config, ModelConfig
from fruitdask.errors import ModelError
from fruitdask.worker.models import openvino, tensorflow
from fruitdask.worker.models.artifact import Predictor

#: Images a call of the network. On CPUs more gain nothing (TensorFlow does 216 images/s a core with 8, 193 with 32, and OpenVINO takes
#: them one by one); GPUs want more, how many depends on the network and on their memory.
_BATCH_SIZE, _BATCH_SIZE_OF_GPUS = 8, 32


@dataclass(frozen=True)
class Engine:
    """What an engine can do; its name in `ENGINES` is that of its package."""

    #: On the client: from a frozen TensorFlow graph to the payload of an artifact.
    pack_graph: Callable[[bytes], bytes]
    start_engine: Callable[..., None]
    #: On a worker: from an artifact to a callable that threads may share.
    load_network: Callable[..., Predictor]


ENGINES = {
    "tensorflow": Engine(tensorflow.pack_graph, tensorflow.start_engine, tensorflow.load_network),
    "openvino": Engine(openvino.pack_graph, openvino.start_engine, openvino.load_network),
}


def settle_engine(config: Config) -> ModelConfig:
    """Choose the engine of a run: that of its workers, be they elsewhere."""
    return config.model.model_copy(update={"engine": choose_engine(config.model, has_gpu=_has_gpu(config))})


def choose_batch_size(config: Config) -> int:
    """Choose how many images a call of the network takes."""
    may_use_gpu = config.model.engine != "openvino" and _has_gpu(config)
    return config.featurize.batch_size or (_BATCH_SIZE_OF_GPUS if may_use_gpu else _BATCH_SIZE)


def choose_engine(config: ModelConfig, *, has_gpu: bool | None = None) -> str:
    """Say which engine runs a network: OpenVINO is faster on a CPU, TensorFlow alone uses a GPU."""
    is_installed, is_mixed = find_spec("openvino") is not None, config.precision != "float32"
    if config.engine == "auto":
        has_gpu = _has_nvidia_gpu() if has_gpu is None else has_gpu
        return "openvino" if is_installed and not (has_gpu or is_mixed) else "tensorflow"
    if config.engine == "openvino" and is_mixed:
        raise ModelError(
            f"model.precision {config.precision} needs TensorFlow, and model.engine is openvino; set model.engine: tensorflow"
        )
    if config.engine == "openvino" and not is_installed:
        raise ModelError(
            "model.engine openvino needs its extra: pip install 'fruitdask[openvino]', or set model.engine: tensorflow"
        )
    return config.engine


def _has_gpu(config: Config) -> bool:
    """Tell whether workers have a GPU of NVIDIA: those of this machine, and of a cluster that nobody knows, are taken to be as it is."""
    return config.cluster.has_gpu if config.cluster.kind == "ec2" else _has_nvidia_gpu()


def _has_nvidia_gpu() -> bool:
    """Look for the device of NVIDIA's driver, or for its tool: WSL has no such device."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None
