"""The OpenVINO engine: the same graphs on CPUs, faster, and without TensorFlow on the workers."""

import io
import platform
import sys
import tempfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fruitdask.errors import EngineError, ModelError
from fruitdask.worker.models.artifact import ModelArtifact, Predictor

#: OpenVINO's format, a graph and its weights, in the order of `read_model`.
_FILES = ("network.xml", "network.bin")


def pack_graph(graph: bytes) -> bytes:
    """Convert a graph, as ``keras.Model.export(format="openvino")`` does, and check that it can run.

    A fixed batch of one image is as fast as the best one (2 images; 8 are 15 % slower, as they do not fit into a core's
    cache), needs the least memory and gives an image the same features in every batch.
    """
    openvino = _import_openvino()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.pb"
        path.write_bytes(graph)
        try:
            network = openvino.Core().read_model(path)
            network.reshape([1, *list(network.input().partial_shape)[1:]])
            _compile(network, n_threads=1)
        except RuntimeError as error:
            raise ModelError(
                f"OpenVINO cannot run this network: {_find_reason(error)}; set model.engine: tensorflow"
            ) from error
        xml, weights = (Path(folder) / name for name in _FILES)
        openvino.save_model(network, xml, compress_to_fp16=False)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for path in (xml, weights):
                # ZipInfo has a fixed time, so that equal networks make equal archives.
                archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes())
        return buffer.getvalue()


def start_engine(*, n_threads: int) -> None:
    """Import OpenVINO."""
    _import_openvino()


def load_network(artifact: ModelArtifact, *, n_threads: int) -> Predictor:
    """Compile a network for this machine's CPU."""
    openvino = _import_openvino()
    with zipfile.ZipFile(io.BytesIO(artifact.payload)) as archive:
        xml, weights = (archive.read(name) for name in _FILES)
    try:
        network = openvino.Core().read_model(xml, openvino.Tensor(np.frombuffer(weights, np.uint8)))
        compiled = _compile(network, n_threads=n_threads)
    except RuntimeError as error:
        raise EngineError(
            f"openvino {openvino.__version__} on {platform.node()} cannot load {artifact.name}: {_find_reason(error)}; "
            "install the client's version on every worker, or set model.engine: tensorflow"
        ) from error
    local = threading.local()

    def create_request() -> None:
        local.request = compiled.create_infer_request()

    def infer(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        features: npt.NDArray[np.float32] = local.request.infer([image[np.newaxis]], share_inputs=True)[0][0]
        return features

    pool = ThreadPoolExecutor(n_threads, "openvino", initializer=create_request)

    def predict(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        features = np.empty((len(images), artifact.n_features), np.float32)
        for row, values in enumerate(pool.map(infer, images)):
            features[row] = values
        return features

    return predict


def _import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which reports every import to Google Analytics."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise EngineError(
            f"openvino cannot be imported on {platform.node()} ({_find_reason(error)}): "
            "install it on every worker with pip install 'fruitdask[openvino]', or set model.engine: tensorflow"
        ) from error
    return openvino


def _find_reason(error: Exception) -> str:
    """Find the readable part of an OpenVINO error: its summary, else its first line without a location."""
    lines = [line.strip(" -.") for line in str(error).splitlines() if line.strip()]
    if "Summary:" in lines:
        return lines[lines.index("Summary:") + 1]
    return next((line for line in lines if " src/" not in line), type(error).__name__)


def _compile(network: Any, *, n_threads: int) -> Any:
    """Compile a network for this machine's CPU, in its own thread.

    OpenVINO gives the thread that compiles the first network a stack for its signals, and frees it when the last
    network is deleted, in any thread. The next Ctrl-C or SIGTERM would then crash the main thread.
    """
    settings = {
        # On some CPUs the default is bfloat16, which changes MobileNetV2's features by a fifth.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": n_threads,
        "NUM_STREAMS": n_threads,
        # Processes that pin their threads all pick the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_import_openvino().Core().compile_model, network, "CPU", settings).result()
