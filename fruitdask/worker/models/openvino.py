"""The engine OpenVINO: the same graphs on CPUs, faster, without TensorFlow on the workers."""

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

#: OpenVINO's own format: the graph, and its weights. The order is that of `read_model`.
_FILES = ("network.xml", "network.bin")


def pack_graph(graph: bytes) -> bytes:
    """Convert a graph for images one at a time, and make sure that it can be run.

    Converting the frozen graph equals ``keras.Model.export(format="openvino")``, and preprocessing and pooling come
    along. A fixed shape of one image is as fast as the best batch (2 images; 8 are 15 % slower, for they do not fit
    into a core's cache), takes the least memory and gives an image the same features in every batch.
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
        return _zip({path.name: path.read_bytes() for path in (xml, weights)})


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
            "install the client's version there, or set model.engine: tensorflow"
        ) from error
    own = threading.local()

    def begin() -> None:
        own.request = compiled.create_infer_request()

    def infer(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        features: npt.NDArray[np.float32] = own.request.infer([image[np.newaxis]], share_inputs=True)[0][0]
        return features

    pool = ThreadPoolExecutor(n_threads, "openvino", initializer=begin)

    def predict(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        features = np.empty((len(images), artifact.n_features), np.float32)
        for row, values in enumerate(pool.map(infer, images)):
            features[row] = values
        return features

    return predict


def _import_openvino() -> Any:
    """Import OpenVINO without the part of it that tells Google Analytics of every import."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise EngineError(
            f"openvino cannot be imported on {platform.node()} ({_find_reason(error)}): install it there with "
            "pip install 'fruitdask[openvino]', or set model.engine: tensorflow"
        ) from error
    return openvino


def _find_reason(error: Exception) -> str:
    """Find what a person can read in a message of OpenVINO: its summary, else the first line that is no place in its source."""
    lines = [line.strip(" -.") for line in str(error).splitlines() if line.strip()]
    if "Summary:" in lines:
        return lines[lines.index("Summary:") + 1]
    return next((line for line in lines if " src/" not in line), type(error).__name__)


def _compile(network: Any, *, n_threads: int) -> Any:
    """Compile a network for this machine's CPU."""
    settings = {
        # Some CPUs would compute in bfloat16, which changes MobileNetV2's features by a fifth.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": n_threads,
        "NUM_STREAMS": n_threads,
        # Processes that pin their threads all choose the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    return _import_openvino().Core().compile_model(network, "CPU", settings)


def _zip(files: dict[str, bytes]) -> bytes:
    """Put files into an archive without the time of day, so that equal files make equal archives."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()
