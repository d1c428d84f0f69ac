"""Networks: the artifact that a client packs computes the same on a worker as plain Keras."""

import io
import os
import pickle
import platform
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fruitdask.core.config import ModelConfig, load_config
from fruitdask.errors import EngineError, ModelError, WeightsUnavailableError
from fruitdask.worker.models import (
    ModelArtifact,
    build as build_module,
    build_artifact,
    cache,
    choose_batch_size,
    choose_engine,
    choose_input_px,
    engines,
    fingerprint_model,
    load_predictor,
    prepare_engine,
    resolve_engine,
    start_building,
)
from fruitdask.worker.models.cache import find_artifact, keep_artifact
from fruitdask.worker.models.engines import ENGINES
from fruitdask.worker.models.squeezenet import build_squeezenet, load_array_pickle, preprocess

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs the extra openvino")


@pytest.fixture(params=["tensorflow", pytest.param("openvino", marks=needs_openvino)])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine."""
    return str(request.param)


def read_pixels(paths: list[Path], size_px: int) -> np.ndarray:
    """Read images as published work does, using only Pillow."""
    images = [Image.open(path).convert("RGB").resize((size_px, size_px), Image.Resampling.BICUBIC) for path in paths]
    return np.stack([np.asarray(image) for image in images])


def random_pixels(size_px: int, n: int = 3) -> np.ndarray:
    """Draw pixels."""
    return np.random.default_rng(0).integers(0, 256, (n, size_px, size_px, 3), np.uint8)


def measure_error(features: np.ndarray, expected: np.ndarray) -> float:
    """Measure the largest relative error of an image's features, as the norm of the difference over the norm."""
    assert features.dtype == np.float32 and features.shape == expected.shape
    return float((np.linalg.norm(features - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


@pytest.mark.slow
def test_mobilenet_features_equal_keras_and_in_mixed_precision_nearly(
    photographs: Path, mobilenet_weights: Path
) -> None:
    import keras

    pixels = read_pixels(sorted(photographs.glob("*/*.jpg"))[::200], 224)
    network = keras.applications.MobileNetV2(
        include_top=False, weights=str(mobilenet_weights), input_shape=(224, 224, 3), pooling="avg"
    )
    expected = network.predict(keras.applications.mobilenet_v2.preprocess_input(pixels.astype(np.float32)), verbose=0)
    artifact = build_artifact(ModelConfig(weights=str(mobilenet_weights), engine="tensorflow"))
    assert (artifact.n_features, artifact.input_px, artifact.preprocessing) == (1280, 224, "own")
    assert artifact.engine == "tensorflow"
    assert measure_error(load_predictor(artifact, n_threads=1)(pixels), expected) < 1e-5
    mixed = build_artifact(ModelConfig(weights=str(mobilenet_weights), precision="mixed_float16"))
    assert 1e-3 < measure_error(load_predictor(mixed, n_threads=1)(pixels), expected) < 0.1
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.slow
def test_squeezenet_names_a_granny_smith(photographs: Path) -> None:
    folder = photographs.parents[1] / "fruits-360-100x100" / "Test" / "Apple Granny Smith 1"
    pixels = read_pixels(sorted(folder.glob("*.jpg"))[:20], 227).astype(np.float32)
    scores = build_squeezenet(input_px=227, weights="imagenet", include_top=True).predict(preprocess(pixels), verbose=0)
    granny_smith = 948  # of ImageNet's 1000 classes
    assert np.mean(scores.argmax(axis=1) == granny_smith) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["avg", "max", "flatten"])
def test_pooling_summarizes_the_last_feature_map(pooling: str, engine: str) -> None:
    pixels = random_pixels(64)
    feature_map = build_squeezenet(input_px=64, weights="imagenet").predict(
        preprocess(pixels.astype(np.float32)), verbose=0
    )
    expected = {
        "avg": feature_map.mean(axis=(1, 2)),
        "max": feature_map.max(axis=(1, 2)),
        "flatten": feature_map.reshape(3, -1),
    }
    artifact = build_artifact(ModelConfig(name="SqueezeNet", input_px=64, pooling=pooling, engine=engine))
    assert measure_error(load_predictor(artifact, n_threads=1)(pixels), expected[pooling]) < 1e-5


@pytest.mark.parametrize("is_moved_back", [False, True], ids=["channels first", "channels last again"])
def test_a_feature_map_with_channels_first_is_pooled_over_its_area(
    tmp_path: Path, is_moved_back: bool, engine: str
) -> None:
    import keras

    pixels = keras.Input((32, 32, 3))
    feature_map = keras.layers.Permute((3, 1, 2))(pixels)
    feature_map = keras.layers.ReLU()(keras.layers.AveragePooling2D(4, data_format="channels_first")(feature_map))
    feature_map = keras.layers.Permute((2, 3, 1))(feature_map) if is_moved_back else feature_map
    keras.Model(pixels, feature_map).save(tmp_path / "own.keras")
    artifact = build_artifact(ModelConfig(weights=str(tmp_path / "own.keras"), preprocessing="none", engine=engine))
    features = load_predictor(artifact, n_threads=1)(random_pixels(32))
    np.testing.assert_allclose(features, random_pixels(32).mean(axis=(1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "scale"),
    [
        ("none", lambda rgb: rgb),
        ("tf", lambda rgb: rgb / 127.5 - 1),
        ("torch", lambda rgb: (rgb / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
        ("caffe", lambda rgb: rgb[..., ::-1] - [103.939, 116.779, 123.68]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keras_file_with_a_named_preprocessing(tmp_path: Path, mode: str, scale: Callable, engine: str) -> None:
    import keras

    network = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.GlobalAveragePooling2D(name="means"), keras.layers.Dense(2)]
    )
    network.save(tmp_path / "own.keras")
    artifact = build_artifact(ModelConfig(weights=str(tmp_path / "own.keras"), preprocessing=mode, engine=engine))
    pixels = random_pixels(32)
    features = load_predictor(artifact, n_threads=1)(pixels)
    assert (artifact.n_features, artifact.preprocessing) == (3, mode)
    np.testing.assert_allclose(features, scale(pixels.astype(np.float64)).mean(axis=(1, 2)), rtol=1e-4, atol=1e-4)


def test_keras_file_ends_at_a_named_layer(tmp_path: Path) -> None:
    import keras

    layers = [
        keras.layers.Conv2D(5, 3, name="early"),
        keras.layers.Conv2D(7, 3, name="late"),
        keras.layers.Flatten(),
        keras.layers.Dense(2),
    ]
    keras.Sequential([keras.Input((32, 32, 3)), *layers]).save(tmp_path / "own.keras")
    config = ModelConfig(weights=str(tmp_path / "own.keras"), preprocessing="none", layer="early")
    assert build_artifact(config).n_features == 5
    with pytest.raises(ModelError, match="no layer 'middle' in .*; its last ones are early, late"):
        build_artifact(config.model_copy(update={"layer": "middle"}))


@pytest.fixture
def model_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A Keras model that doubles pixels by its own code, which creates a file each time it runs."""
    import keras

    monkeypatch.chdir(tmp_path)
    double = keras.layers.Lambda(lambda images: (open("mark", "w").close(), images * 2)[1])
    layers = [keras.Input((32, 32, 3)), double, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)]
    keras.Sequential(layers).save("own.keras")
    Path("mark").unlink()
    return ModelConfig(weights=str(tmp_path / "own.keras"), preprocessing="none")


def test_keras_file_with_code_is_refused_and_not_run(model_with_code: ModelConfig, tmp_path: Path) -> None:
    message = r"own\.keras: expected a Keras model without Python code, found .*Lambda.*; .* model\.allow_code: true$"
    with pytest.raises(ModelError, match=message):
        build_artifact(model_with_code)
    assert not (tmp_path / "mark").exists()


def test_keras_file_with_code_is_run_where_that_is_allowed(model_with_code: ModelConfig, tmp_path: Path) -> None:
    artifact = build_artifact(model_with_code.model_copy(update={"allow_code": True}))
    assert (tmp_path / "mark").exists()
    pixels = random_pixels(32)
    features = load_predictor(artifact, n_threads=1)(pixels)
    np.testing.assert_allclose(features, 2 * pixels.astype(np.float64).mean(axis=(1, 2)), rtol=1e-4)


def test_model_cached_with_its_code_is_still_refused(
    model_with_code: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    allowed = model_with_code.model_copy(update={"allow_code": True})
    built = build_artifact(allowed)
    keep_artifact(allowed, built)
    assert find_artifact(allowed) == built
    assert find_artifact(model_with_code) is None
    with pytest.raises(ModelError, match="without Python code"):
        build_artifact(model_with_code)
    # Allowing code does not change the fingerprint of a finished run.
    assert fingerprint_model(allowed) == fingerprint_model(model_with_code)


def test_invalid_keras_file_gets_no_advice_to_allow_code(tmp_path: Path) -> None:
    (tmp_path / "own.keras").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"expected a Keras model without Python code, found [^;]+$"):
        build_artifact(ModelConfig(weights=str(tmp_path / "own.keras"), preprocessing="none"))


@pytest.mark.slow
def test_weights_from_a_url_equal_those_from_disk(s3_bucket: tuple[str, dict], tmp_path: Path) -> None:
    import s3fs

    bucket, options = s3_bucket
    path = tmp_path / "own.weights.h5"
    build_squeezenet(input_px=64, weights="imagenet").save_weights(path)
    s3fs.S3FileSystem(**options).put_file(str(path), f"{bucket}/own.weights.h5")
    weights = f"s3://{bucket}/own.weights.h5"
    remote = build_artifact(ModelConfig(name="SqueezeNet", input_px=64, weights=weights, storage_options=options))
    local = build_artifact(ModelConfig(name="SqueezeNet", input_px=64))
    pixels = random_pixels(64)
    np.testing.assert_array_equal(
        load_predictor(remote, n_threads=1)(pixels), load_predictor(local, n_threads=1)(pixels)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "MobilNetV2"}, "found 'MobilNetV2'; did you mean MobileNetV2"),
        ({"name": "Pineapple"}, "see https://keras.io/api/applications"),
        ({"weights": "weights.txt"}, "ending in .weights.h5, .h5 or .keras, found 'weights.txt'"),
        ({"name": "SqueezeNet", "layer": "fire99"}, "no layer 'fire99' in SqueezeNet"),
    ],
    ids=["misspelt network", "no network", "ending", "layer"],
)
def test_build_artifact_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_artifact(ModelConfig(**settings))


@pytest.mark.slow
def test_build_artifact_refuses_weights_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "squeeze.weights.h5"
    build_squeezenet(input_px=64, weights="imagenet").save_weights(path)
    with pytest.raises(ModelError, match="weights of MobileNetV2 without its classifier, found a file"):
        build_artifact(ModelConfig(weights=str(path)))


@pytest.mark.slow
def test_unavailable_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Port 9 (discard) is closed: the child's download fails at once, with or without a network.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with pytest.raises(WeightsUnavailableError, match="set model.weights to the file, or use model.name: SqueezeNet"):
        with start_building(ModelConfig()) as wait_for_artifact:
            wait_for_artifact()


class Exploit:
    """An object of a hostile pickle."""

    def __reduce__(self) -> tuple:
        return os.system, ("true",)


def test_load_array_pickle_admits_arrays_only() -> None:
    arrays = {"conv1": [np.arange(6.0).reshape(2, 3), np.zeros(2, np.float32)]}
    loaded = load_array_pickle(pickle.dumps(arrays))
    np.testing.assert_array_equal(loaded["conv1"][0], arrays["conv1"][0])
    with pytest.raises(ModelError, match=r"arrays only, found (posix|nt)\.system"):
        load_array_pickle(pickle.dumps(Exploit()))


def test_load_predictor_builds_once_for_many_threads(
    tiny_artifact: ModelArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    engine = ENGINES[tiny_artifact.engine]

    def load(artifact: ModelArtifact, *, n_threads: int) -> engines.Predictor:
        built.append(1)
        return engine.load_network(artifact, n_threads=n_threads)

    monkeypatch.setattr(engines, "_predictors", {})
    monkeypatch.setitem(ENGINES, tiny_artifact.engine, replace(engine, load_network=load))
    barrier = threading.Barrier(8)
    predictors = []

    def ask() -> None:
        barrier.wait()
        predictors.append(load_predictor(tiny_artifact, n_threads=1))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(predictors) == 8 and len(set(map(id, predictors))) == 1


def test_artifact_survives_pickling(tiny_artifact: ModelArtifact) -> None:
    copy = pickle.loads(pickle.dumps(tiny_artifact))
    assert copy == tiny_artifact and copy.sha256 == tiny_artifact.sha256


def test_cache_returns_what_it_kept_but_nothing_damaged(
    tiny_model: ModelConfig, tiny_artifact: ModelArtifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_artifact(tiny_model) is None
    keep_artifact(tiny_model, tiny_artifact)
    assert find_artifact(tiny_model) == tiny_artifact
    assert find_artifact(tiny_model.model_copy(update={"preprocessing": "tf"})) is None
    payload = next(tmp_path.rglob("*.bin"))
    payload.write_bytes(payload.read_bytes()[:-1] + b"x")
    assert find_artifact(tiny_model) is None


@needs_openvino
def test_cache_distinguishes_engines_and_versions(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs = [tiny_model.model_copy(update={"engine": engine}) for engine in ENGINES]
    artifacts = [build_artifact(config) for config in configs]
    for config, artifact in zip(configs, artifacts, strict=True):
        assert find_artifact(config) is None
        keep_artifact(config, artifact)
    assert [find_artifact(config) for config in configs] == artifacts
    monkeypatch.setattr(cache, "find_version", lambda package: "1.0" if package == "openvino" else version(package))
    assert [find_artifact(config) for config in configs] == [artifacts[0], None]


@pytest.mark.slow
def test_random_weights_cause_a_warning_and_are_the_same_in_a_child_and_cached(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = ModelConfig(name="SqueezeNet", weights="random", input_px=64)
    with start_building(config) as wait_for_artifact:
        built = wait_for_artifact()
    here, pixels = build_artifact(config), random_pixels(64)
    assert "untrained network" in caplog.text
    assert (built.n_features, built.input_px) == (here.n_features, here.input_px)
    first, second = (load_predictor(artifact, n_threads=1)(pixels) for artifact in (built, here))
    np.testing.assert_array_equal(first, second)
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: pytest.fail("a child was started"))
    with start_building(config) as wait_for_artifact:
        assert wait_for_artifact() == built


def test_fingerprint_model_changes_with_settings_and_content(tiny_model: ModelConfig) -> None:
    path = Path(tiny_model.weights)
    content = path.read_bytes()
    before = fingerprint_model(tiny_model)
    assert fingerprint_model(tiny_model) == before
    assert fingerprint_model(tiny_model.model_copy(update={"pooling": "max"})) != before
    assert fingerprint_model(tiny_model.model_copy(update={"engine": "tensorflow"})) == before
    try:
        path.write_bytes(content + b"\0")
        assert fingerprint_model(tiny_model) != before
    finally:
        path.write_bytes(content)


def test_input_size_that_a_network_refuses_is_not_blamed_on_the_network_connection() -> None:
    with pytest.raises(ModelError, match="InceptionV3 cannot be built .*75x75.*; check .* model"):
        build_artifact(ModelConfig(name="InceptionV3", input_px=64))


def test_choose_input_px_reads_it_from_a_keras_file(tiny_model: ModelConfig, tmp_path: Path) -> None:
    assert choose_input_px(tiny_model) == 32
    assert choose_input_px(ModelConfig(name="Xception")) == 299 and choose_input_px(ModelConfig(input_px=96)) == 96
    (tmp_path / "no.keras").write_bytes(b"no archive")
    with pytest.raises(ModelError, match="no.keras: expected a Keras model"):
        choose_input_px(ModelConfig(weights=str(tmp_path / "no.keras"), preprocessing="none"))


@pytest.mark.parametrize(
    ("engine", "is_installed", "has_gpu", "expected"),
    [
        ("auto", True, False, "openvino"),
        ("auto", True, True, "tensorflow"),
        ("auto", False, False, "tensorflow"),
        ("openvino", True, True, "openvino"),
        ("tensorflow", True, False, "tensorflow"),
    ],
    ids=["CPU", "GPU", "no extra", "openvino on a GPU's machine", "tensorflow on a CPU"],
)
def test_choose_engine(
    engine: str, is_installed: bool, has_gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: object() if is_installed else None)
    monkeypatch.setattr(engines, "_has_nvidia_gpu", lambda: has_gpu)
    assert choose_engine(ModelConfig(engine=engine)) == expected


@pytest.mark.parametrize(
    ("cluster", "client_has_gpu", "expected"),
    [
        ({"kind": "local"}, True, "tensorflow"),
        ({"kind": "ec2", "docker_image": "any", "worker_instance_type": "m6i.large"}, True, "openvino"),
        ({"kind": "ec2", "docker_image": "any", "worker_instance_type": "g4dn.xlarge"}, False, "tensorflow"),
        ({"kind": "ec2", "docker_image": "any", "scheduler_instance_type": "g4dn.xlarge"}, True, "openvino"),
        ({"kind": "ec2", "docker_image": "any", "instance_type": "gr6.4xlarge"}, False, "tensorflow"),
        ({"kind": "ec2", "docker_image": "any", "worker_instance_type": "g4ad.xlarge"}, True, "openvino"),
    ],
    ids=["local", "ec2", "ec2 with GPUs", "GPU on the scheduler", "GPU everywhere", "GPU of AMD"],
)
@needs_openvino
def test_resolve_engine_asks_for_the_gpus_of_workers(
    cluster: dict[str, str], client_has_gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_has_nvidia_gpu", lambda: client_has_gpu)
    config = load_config({"input": {"url": "x"}, "output": {"url": "y"}, "cluster": cluster})
    assert resolve_engine(config.model, config.cluster) == ModelConfig(engine=expected)


def test_mixed_precision_takes_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    monkeypatch.setattr(engines, "_has_nvidia_gpu", lambda: False)
    assert choose_engine(ModelConfig(precision="mixed_float16")) == "tensorflow"
    with pytest.raises(ModelError, match="mixed_float16 needs TensorFlow, .*; set model.engine: tensor"):
        choose_engine(ModelConfig(precision="mixed_float16", engine="openvino"))


@pytest.mark.parametrize(
    ("settings", "has_gpu", "expected"),
    [
        ({}, False, 8),
        ({}, True, 32),
        ({"model": {"engine": "openvino"}}, True, 8),
        ({"cluster": {"kind": "ec2", "docker_image": "any", "worker_instance_type": "m6i.large"}}, True, 8),
    ],
    ids=["CPU", "GPU", "openvino on a GPU's machine", "CPUs of ec2"],
)
def test_choose_batch_size(
    settings: dict[str, Any], has_gpu: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_has_nvidia_gpu", lambda: has_gpu)
    config = load_config({"input": {"url": "x"}, "output": {"url": "y"}} | settings)
    assert choose_batch_size(config.model, config.cluster) == expected


def test_choose_engine_refuses_openvino_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"its extra: pip install 'fruitdask\[openvino\]', or set"):
        choose_engine(ModelConfig(engine="openvino"))


def test_has_nvidia_gpu_looks_for_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert engines._has_nvidia_gpu()


@needs_openvino
def test_network_that_openvino_cannot_run_is_refused_on_the_client() -> None:
    import tensorflow as tf

    def trace(images: tf.Tensor) -> tf.Tensor:
        floats = tf.cast(images, tf.float32)
        return tf.reduce_mean(tf.raw_ops.Betainc(a=floats, b=floats, x=floats), axis=[1, 2])

    graph = build_module._freeze(trace, 32)
    assert ENGINES["tensorflow"].pack_graph(graph) == graph
    message = "OpenVINO cannot run this network: No conversion rule found .*: Betainc; set model.engine: tensorflow"
    with pytest.raises(ModelError, match=message):
        ENGINES["openvino"].pack_graph(graph)


@needs_openvino
def test_openvino_packs_in_full_precision() -> None:
    graph = build_artifact(ModelConfig(name="SqueezeNet", input_px=64, engine="tensorflow")).payload
    with zipfile.ZipFile(io.BytesIO(ENGINES["openvino"].pack_graph(graph))) as archive:
        xml, weights = archive.read("network.xml"), archive.read("network.bin")
    n_parameters = build_squeezenet(input_px=64, weights="imagenet").count_params()
    assert len(weights) >= 4 * n_parameters and b"f16" not in xml


@pytest.mark.slow
@needs_openvino
def test_openvino_gives_an_image_the_same_features_in_every_batch_and_thread() -> None:
    artifact = build_artifact(ModelConfig(name="SqueezeNet", input_px=64, engine="openvino"))
    pixels = random_pixels(64, n=24)
    single = ENGINES["openvino"].load_network(artifact, n_threads=1)
    expected = np.concatenate([single(image[np.newaxis]) for image in pixels])
    assert single(pixels[:0]).shape == (0, 512)
    shared = ENGINES["openvino"].load_network(artifact, n_threads=2)
    found: dict[int, np.ndarray] = {}
    barrier = threading.Barrier(4)

    def ask(shift: int) -> None:
        barrier.wait()
        for _ in range(5):
            found[shift] = np.roll(shared(np.roll(pixels, shift, axis=0)), -shift, axis=0)

    threads = [threading.Thread(target=ask, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for features in found.values():
        np.testing.assert_array_equal(features, expected)


_RUN_AGAIN = """
import sys
import numpy as np
from fruitdask.core.config import ModelConfig
from fruitdask.worker.models import load_predictor, prepare_engine, start_building

with start_building(ModelConfig.model_validate_json(sys.argv[1])) as wait_for_artifact:
    artifact = wait_for_artifact()
prepare_engine(artifact.engine, n_threads=1)
print(load_predictor(artifact, n_threads=1)(np.full((2, 32, 32, 3), 7, np.uint8)).tolist())
assert "openvino" in sys.modules
print([name for name in ("tensorflow", "keras", "openvino_telemetry.main") if name in sys.modules])
"""


@pytest.mark.slow
@needs_openvino
def test_kept_artifact_runs_without_tensorflow_and_without_telemetry(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = tiny_model.model_copy(update={"engine": "openvino"})
    keep_artifact(config, build_artifact(config))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-c", _RUN_AGAIN, config.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str([[7.0] * 6] * 2), "[]"]
    # OpenVINO's telemetry would leave a file with the id of this user.
    assert list((tmp_path / "home").iterdir()) == []


_INTERRUPT = """
import os, signal, sys, threading
import numpy as np
from fruitdask.core.config import ModelConfig
from fruitdask.worker.models import build_artifact
from fruitdask.worker.models.engines import ENGINES

artifact = build_artifact(ModelConfig.model_validate_json(sys.argv[1]))
networks = [ENGINES["openvino"].load_network(artifact, n_threads=1)]
thread = threading.Thread(target=networks.clear)
thread.start()
thread.join()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
@needs_openvino
def test_ctrl_c_does_not_crash_after_another_thread_has_dropped_the_last_network(tiny_model: ModelConfig) -> None:
    config = tiny_model.model_copy(update={"engine": "openvino"})
    # In a new process, because OpenVINO keeps what it sets up for the first network until the last one goes.
    done = subprocess.run([sys.executable, "-c", _INTERRUPT, config.model_dump_json()], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_worker_without_openvino_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    message = rf"openvino cannot be imported on {platform.node()} .* every worker with pip install 'fruitdask\[openvino"
    with pytest.raises(EngineError, match=message):
        prepare_engine("openvino", n_threads=1)


@needs_openvino
def test_artifact_that_a_worker_cannot_read_is_an_error_of_its_openvino() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("network.xml", "<net version='99'/>")
        archive.writestr("network.bin", b"")
    artifact = ModelArtifact(buffer.getvalue(), "openvino", "Pear", "own", input_px=32, n_features=3)
    with pytest.raises(EngineError, match=f"on {platform.node()} cannot load Pear: Unable to read"):
        load_predictor(artifact, n_threads=1)
