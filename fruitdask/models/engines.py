"""What runs a network: the engines, and which of them a configuration takes."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fruitdask.config import ModelConfig
from fruitdask.errors import ModelError
from fruitdask.models import openvino, tensorflow
from fruitdask.models.artifact import Predictor


@dataclass(frozen=True)
class Engine:
    """
    What an engine can do; its name in `ENGINES` is that of its package.

    Parameters
    ----------
    pack_graph : Callable[[bytes], bytes]
        On the client: from a frozen TensorFlow graph to the payload of an artifact.
    start_engine : Callable[..., None]
        On a worker: import the engine.
    load_network : Callable[..., Predictor]
        On a worker: from an artifact to a callable that threads may share.
    """

    pack_graph: Callable[[bytes], bytes]
    start_engine: Callable[..., None]
    load_network: Callable[..., Predictor]


ENGINES = {
    "tensorflow": Engine(tensorflow.pack_graph, tensorflow.start_engine, tensorflow.load_network),
    "openvino": Engine(openvino.pack_graph, openvino.start_engine, openvino.load_network),
}


def choose_engine(config: ModelConfig) -> str:
    """
    Say which engine runs a network.

    What ``auto`` stands for is found on the machine that asks, the client: OpenVINO is faster on a CPU, TensorFlow alone uses a GPU.

    Parameters
    ----------
    config : ModelConfig
        Which network, and the engine as configured.

    Returns
    -------
    str
        ``tensorflow`` or ``openvino``.

    Raises
    ------
    ModelError
        If OpenVINO is asked for and is not installed.
    """
    is_installed = find_spec("openvino") is not None
    if config.engine == "auto":
        return "openvino" if is_installed and not _has_nvidia_gpu() else "tensorflow"
    if config.engine == "openvino" and not is_installed:
        raise ModelError(
            "model.engine openvino needs its extra: pip install 'fruitdask[openvino]', or set model.engine: tensorflow"
        )
    return config.engine


def _has_nvidia_gpu() -> bool:
    """Look for the device of NVIDIA's driver, or for its tool: WSL has no such device."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None
