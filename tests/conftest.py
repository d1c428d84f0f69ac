"""Fixtures that several test modules share: real photographs, real weights, a real S3 server, a drawn data set."""

import compileall
import functools
import gc
import importlib
import logging
import os
import signal
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import moto.backends
import pytest
from botocore.loaders import JSONFileLoader
from commands import CommandHost
from hypothesis import settings
from moto.server import ThreadedMotoServer
from runs import Finish, FinishedRuns
from s3fs import S3FileSystem

import fruitdask
from fruitdask.cluster import open_client
from fruitdask.core.config import LocalClusterConfig, ModelConfig
from fruitdask.core.sample import draw_sample
from fruitdask.worker.models import ModelArtifact, build_artifact
from fruitdask.worker.models.cache import keep_artifact

#: Scripts that write data of tests need other packages.
collect_ignore = ["data"]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

#: S3 file systems of earlier test modules.
_CACHES: list[dict[str, S3FileSystem]] = []

# Every run tries the same examples. More of them show nothing new. None has a time limit, because a shared machine is
# sometimes slow.
settings.register_profile("fruitdask", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("fruitdask")

# OpenMP threads spin while they wait for each other, and other test processes need the cores: with two threads, t-SNE
# of 24 images takes 3 s of CPU, with one 0.1 s.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

# All processes of pytest-xdist rewrite the assertions of all tests, which takes six seconds; later runs read the
# cache.
sys.dont_write_bytecode = False

# botocore reads each description of a service once, not for each session, and moto lists its modules once, not for each
# request. The imports of moto already read some.
_read, _modules = functools.cache(JSONFileLoader().load_file), tuple(moto.backends.list_of_moto_modules())
JSONFileLoader.load_file = lambda self, path: _read(path)
moto.backends.list_of_moto_modules = lambda: _modules

# A shell ignores Ctrl-C for tests in the background; this process and its children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that rewrites `golden/messages.txt`."""
    parser.addoption(
        "--write-golden", action="store_true", help="write the sentences of tests/golden/messages.txt again"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Compile the package and its kernels once; otherwise each process that a test starts may do it."""
    if not hasattr(config, "workerinput"):
        importlib.import_module("fruitdask.worker.images.kernel")
        compileall.compile_dir(Path(fruitdask.__file__).parent, quiet=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have the most slow tests, so that none of them runs alone at the end."""
    n_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -n_slow[item.path])


def pytest_collection_finish() -> None:
    """Let garbage collections skip the million objects that the imports and the collection have made."""
    gc.freeze()


def find_data(*names: str) -> Path:
    """Find a part of the shared data, or skip the test."""
    path = DATA.joinpath(*names)
    if not path.exists():
        pytest.skip(f"needs {path}, which belongs beside the checkout and is missing")
    return path


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep tests, and the processes they start, away from the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def own_file_systems() -> None:
    """Let each module open its own S3 file systems: fsspec caches them by their options, not by the environment's keys
    and servers.
    """
    # Without a reference to them their connections would be collected, with a warning, in the middle of another test.
    _CACHES.append(S3FileSystem._cache)
    S3FileSystem._cache = {}


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Folder of 846 real photographs of five classes of apples."""
    return find_data("fruits-360-original-size", "Test")


@pytest.fixture(scope="session")
def mobilenet_weights() -> Path:
    """File of MobileNetV2's ImageNet weights."""
    return find_data("weights", "mobilenet_v2_1.0_224_no_top.weights.h5")


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small drawn data set: 4 images of 64 px for each of its classes."""
    folder = tmp_path_factory.mktemp("sample") / "fruits"
    draw_sample(folder, per_class=4, size_px=64)
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint URL of an S3 server on this machine; credentials that it accepts are in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        for name in (
            "AWS_PROFILE",
            "AWS_SESSION_TOKEN",
            "AWS_SECURITY_TOKEN",
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT_URL_S3",
        ):
            patch.delenv(name, raising=False)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture(scope="session")
def s3_client(s3_server: str) -> Iterator[Any]:
    """A client of the S3 server that shares no code with s3fs's file system."""
    client = boto3.client("s3", endpoint_url=s3_server)
    yield client
    client.close()


@pytest.fixture
def s3_bucket(s3_server: str, s3_client: Any) -> tuple[str, dict[str, Any]]:
    """Name of a fresh bucket, and the storage options to reach it."""
    name = f"bucket-{uuid.uuid4().hex}"
    s3_client.create_bucket(Bucket=name)
    return name, {"endpoint_url": s3_server}


@pytest.fixture(scope="session")
def tiny_model(user_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A user's own Keras model, whose six features are the mean and the largest value of each colour."""
    import keras

    pixels = keras.Input((32, 32, 3))
    means = keras.layers.GlobalAveragePooling2D()(pixels)
    largest = keras.layers.GlobalMaxPooling2D()(pixels)
    features = keras.layers.Concatenate(name="colours")([means, largest])
    path = tmp_path_factory.mktemp("model") / "colours.keras"
    keras.Model(pixels, keras.layers.Dense(2)(features)).save(path)
    config = ModelConfig(weights=str(path), preprocessing="none")
    # As if an earlier run had built it: this process has imported TensorFlow, others would need seconds.
    keep_artifact(config, build_artifact(config))
    return config


@pytest.fixture(scope="session")
def squeezenet(user_cache: Path) -> ModelConfig:
    """The network of the demo, built without the internet and once for all processes of a session."""
    config = ModelConfig(name="SqueezeNet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")
        keep_artifact(config, build_artifact(config))
    return config


@pytest.fixture(scope="session")
def tiny_artifact(tiny_model: ModelConfig) -> ModelArtifact:
    """The artifact of `tiny_model`."""
    return build_artifact(tiny_model)


@pytest.fixture(scope="session")
def client(s3_server: str) -> Iterator[Any]:
    """A cluster of two worker processes of two threads each, which can reach the S3 server."""
    with open_client(LocalClusterConfig(n_workers=2, threads_per_worker=2, dashboard_address="127.0.0.1:0")) as client:
        yield client


@pytest.fixture(scope="session")
def commands() -> Iterator[CommandHost]:
    """Starts commands in separate processes."""
    with CommandHost() as host:
        yield host


@pytest.fixture(scope="session")
def finish(client: Any, tmp_path_factory: pytest.TempPathFactory) -> Finish:
    """A function that fills an output folder with a finished run, computed once per configuration and session."""
    return FinishedRuns(tmp_path_factory.mktemp("finished"), client)


@pytest.fixture
def ending() -> Iterator[threading.Event]:
    """Set as soon as a cluster begins to end."""
    event = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: event.set() if record.getMessage().startswith("ending run") else None
    logger = logging.getLogger("fruitdask.cluster.cloud.cluster")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield event
    logger.removeHandler(handler)
    logger.setLevel(level)
