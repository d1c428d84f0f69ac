"""Files of networks and weights as people have them: loaded correctly, or refused in one sentence that says what they
are and what to do.
"""

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fruitdask.core.config import ModelConfig
from fruitdask.errors import ConfigError, ModelError
from fruitdask.worker.models import build_artifact, choose_input_px, fingerprint_model, load_predictor
from fruitdask.worker.models.cache import find_artifact, keep_artifact

#: Written by tests/data/write_keras2.py.
KERAS2 = Path(__file__).parent / "data" / "keras2"
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def build_network(shape: tuple[int | None, ...] = (32, 32, 3), **options: Any) -> tuple[Any, Any]:
    """Build a small classifier, and the network that ends before its last layer."""
    import keras

    keras.utils.set_random_seed(2)
    image = keras.Input(shape, **options)
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.Conv2D(6, 3, strides=2, activation="relu", name="first")(x)
    x = keras.layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    scores = keras.layers.Dense(5, activation="softmax", name="scores")(x)
    return keras.Model(image, scores, name="own"), keras.Model(image, x)


def configure(path: Path, **settings: Any) -> ModelConfig:
    """Name a file as the network."""
    return ModelConfig(**{"weights": str(path), "preprocessing": "none", "engine": "tensorflow"} | settings)


def check_features(
    config: ModelConfig, reference: Any, pixels: np.ndarray = PIXELS, *, tolerance: float = 1e-5
) -> None:
    """Compare features with those of plain Keras."""
    expected = reference.predict(pixels.astype(np.float32), verbose=0)
    artifact = build_artifact(config)
    features = load_predictor(artifact, n_threads=1)(pixels)
    np.testing.assert_allclose(features, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    assert artifact.input_px == choose_input_px(config) == pixels.shape[1]


@pytest.mark.parametrize(
    ("saved", "name"),
    [
        ("own.keras", "OWN.KERAS"),
        ("own.h5", "own.h5"),
        ("own.h5", "own.hdf5"),
        ("own.h5", "own.keras"),
        ("own.keras", "own.h5"),
        ("own.h5", "own.weights.h5"),
    ],
    ids=lambda value: value,
)
def test_whole_model_is_recognized_by_its_content(saved: str, name: str, tmp_path: Path) -> None:
    network, reference = build_network()
    (tmp_path / "saved").mkdir()
    network.save(tmp_path / "saved" / saved)
    shutil.move(tmp_path / "saved" / saved, tmp_path / name)
    check_features(configure(tmp_path / name), reference)


@pytest.mark.slow
def test_whole_h5_model_without_preprocessing_counts_as_weights(tmp_path: Path) -> None:
    import keras

    build_network()[0].save(tmp_path / "own.h5")
    message = (
        r"own\.h5: expected weights of SqueezeNet .*, found a whole Keras model .*; set model\.preprocessing to use"
    )
    with pytest.raises(ModelError, match=message):
        build_artifact(configure(tmp_path / "own.h5", preprocessing=None, name="SqueezeNet"))
    keras.utils.set_random_seed(4)
    network = keras.applications.MobileNetV3Small(
        include_top=False, weights=None, input_shape=(32, 32, 3), pooling="avg", name="other"
    )
    network.save(tmp_path / "small.h5")
    config = configure(tmp_path / "small.h5", preprocessing=None, name="MobileNetV3Small", input_px=32)
    check_features(config, network)


def edit_h5(path: Path, edit: Callable[[str], str]) -> None:
    """Edit the description of the network in a whole model."""
    import h5py

    with h5py.File(path, "a") as file:
        file.attrs["model_config"] = edit(str(file.attrs["model_config"]))


@pytest.mark.parametrize("name", ["transfer", "teachable", "policy"])
def test_h5_model_of_keras_2_equals_keras_2(name: str) -> None:
    artifact = build_artifact(configure(KERAS2 / f"{name}.h5"))
    features = load_predictor(artifact, n_threads=1)(PIXELS)
    expected = np.load(KERAS2 / "features.npz")[name]
    tolerance = 5e-3 if name == "policy" else 1e-5
    np.testing.assert_allclose(features, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    assert artifact.input_px == choose_input_px(configure(KERAS2 / f"{name}.h5")) == 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transfer.keras", r"found a \.keras file of Keras 2\.[\d.]+, which Keras 3 cannot read; .* save it as \.h5"),
        ("operators.h5", "found the operation tf.math.truediv of Keras 2, which Keras 3 cannot read; use layers"),
    ],
)
def test_model_of_keras_2_that_cannot_be_read(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_artifact(configure(KERAS2 / name))


@pytest.mark.parametrize(
    "damage",
    [lambda text: text.replace('"class_name"', '"kind"', 2), lambda text: text.replace('"axis": [', '"axis": [7, ')],
    ids=["a layer without a class", "two axes"],
)
def test_damaged_description_of_keras_2(damage: Callable[[str], str], tmp_path: Path) -> None:
    shutil.copy(KERAS2 / "transfer.h5", tmp_path / "own.h5")
    edit_h5(tmp_path / "own.h5", damage)
    with pytest.raises(ModelError, match=r"own\.h5: expected .*, found "):
        build_artifact(configure(tmp_path / "own.h5"))


def test_archive_of_teachable_machine(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "converted_keras.zip", "w") as archive:
        archive.write(KERAS2 / "teachable.h5", "keras_model.h5")
        archive.writestr("labels.txt", "0 pear")
    with pytest.raises(ModelError, match=r"an export of Teachable Machine"):
        build_artifact(configure(tmp_path / "converted_keras.zip"))


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_model_that_takes_any_size_takes_the_configured_one(ending: str, tmp_path: Path) -> None:
    network, reference = build_network((None, None, 3))
    network.save(tmp_path / f"own.{ending}")
    config = configure(tmp_path / f"own.{ending}")
    message = rf"own\.{ending}: expected a model whose input has a size, .*; set model\.input_px"
    for ask in (choose_input_px, build_artifact):
        with pytest.raises(ModelError, match=message):
            ask(config)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 48, 48, 3), np.uint8)
    check_features(config.model_copy(update={"input_px": 48}), reference, pixels)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((32, 24, 3), r"found \(None, 32, 24, 3\); put keras\.layers\.Resizing\(32, 24\) in front"),
        ((32, 32, 1), r"found \(None, 32, 32, 1\); put layers that convert RGB images in front"),
        ((None, None, 4), r"found \(None, None, None, 4\); put layers that"),
    ],
    ids=["rectangular", "grey", "four channels"],
)
def test_input_that_is_not_a_square_colour_image(shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    build_network(shape)[0].save(tmp_path / "own.keras")
    for ask in (choose_input_px, build_artifact):
        with pytest.raises(ModelError, match=f"expected one input of square RGB images, .*{message}"):
            ask(configure(tmp_path / "own.keras", input_px=32))


def test_two_inputs_and_vectors_are_refused(tmp_path: Path) -> None:
    import keras

    image, numbers = keras.Input((32, 32, 3)), keras.Input((4,))
    both = keras.layers.Concatenate()([keras.layers.Flatten()(image), numbers])
    keras.Model([image, numbers], keras.layers.Dense(2)(both)).save(tmp_path / "two.keras")
    keras.Model(numbers, keras.layers.Dense(2)(numbers)).save(tmp_path / "vector.keras")
    for ask in (choose_input_px, build_artifact):
        with pytest.raises(ModelError, match=r"2 inputs, \(None, 32, 32, 3\) and \(None, 4\); save a model"):
            ask(configure(tmp_path / "two.keras"))
        with pytest.raises(ModelError, match=r"found \(None, 4\); save a model that takes images"):
            ask(configure(tmp_path / "vector.keras"))


def test_input_of_whole_numbers_and_a_fixed_batch(tmp_path: Path) -> None:
    network, reference = build_network(dtype="uint8")
    network.save(tmp_path / "whole.keras")
    check_features(configure(tmp_path / "whole.keras"), reference)
    with pytest.raises(ModelError, match=r"takes integers \(uint8\), .*; set model.preprocessing: none"):
        build_artifact(configure(tmp_path / "whole.keras", preprocessing="tf"))
    network, reference = build_network(batch_size=2)
    network.save(tmp_path / "batch.keras")
    check_features(configure(tmp_path / "batch.keras"), reference)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("net.onnx", b"\x08\x07", r"'.*net\.onnx', an ONNX network; fruitdask runs Keras networks"),
        ("net.tflite", b"\x1c\0\0\0TFL3", "a TensorFlow Lite network; .* the .keras or .h5 file"),
        ("net.pb", b"\n\x10", "a TensorFlow graph, .*save it with model.save"),
        ("net.pt", b"PK\x03\x04", "truncated or damaged"),
        ("net.pth", b"\x80\x02}", "a PyTorch file; fruitdask runs Keras networks"),
        ("net.safetensors", b"\x10\0\0\0\0\0\0\0{}", "weights as safetensors; "),
        ("net.keras", b"", "found an empty file; copy or download it again"),
        ("net.h5", b"", "found an empty file; copy or download it again"),
        (
            "net.keras",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a Git LFS pointer .*; run git lfs pull",
        ),
        ("net.weights.h5", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer .*; run git lfs pull"),
        ("net.h5", b"\n<!DOCTYPE html>", "found a web page or XML; download the file itself"),
        ("net.h5", b'{"class_name": "Model"}', "a JSON file, which holds no weights; "),
        ("net.h5", b"\x89HDF\r\n\x1a\n\0\0", "found a truncated or damaged HDF5 file; copy"),
        ("net.keras", b"no network", "found something else or a damaged file$"),
        ("net", b"no network", "found '.*net', something else or a damaged file$"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("net") else "",
)  # fmt: skip
def test_other_files_are_named_for_what_they_are(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for ask in (fingerprint_model, choose_input_px, build_artifact):
        with pytest.raises(ModelError, match=message):
            ask(configure(tmp_path / name))


def test_other_archives_and_folders_are_named_for_what_they_are(tmp_path: Path) -> None:
    def pack(name: str, *files: str) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file in files:
                archive.writestr(file, "{}")
        return tmp_path / name

    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").touch()
    cases = {
        pack("net.pt", "archive/data.pkl"): "a PyTorch file",
        pack("saved.zip", "model/saved_model.pb"): "a ZIP archive with a TensorFlow SavedModel; load it with",
        pack("photos.keras", "1.jpg"): "a ZIP archive without a Keras model; unpack it",
        pack("renamed.zip", "config.json", "metadata.json"): "a Keras file; rename it to end in .keras",
        tmp_path / "saved": "a folder with a TensorFlow SavedModel; load it with the software that made it",
        tmp_path: "a folder; set model.weights to a file in it",
        tmp_path / "missing.onnx": "found '.*missing.onnx'$",
    }
    for path, message in cases.items():
        with pytest.raises(ModelError, match=message):
            fingerprint_model(configure(path))


@pytest.mark.parametrize("name", ["own.keras", "own.h5", "own.weights.h5"])
def test_truncated_file(name: str, tmp_path: Path) -> None:
    network = build_network()[0]
    network.save_weights(tmp_path / name) if "weights" in name else network.save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=rf"{name}: .*truncated or damaged .*; copy or download"):
        build_artifact(configure(tmp_path / name))


@pytest.mark.slow
def test_weights_of_another_network_and_with_the_classifier(tmp_path: Path) -> None:
    import keras

    build = keras.applications.MobileNetV3Small
    keras.utils.set_random_seed(6)
    whole = build(weights=None, input_shape=(32, 32, 3), classes=7)
    bare = build(include_top=False, weights=None, input_shape=(32, 32, 3), pooling="avg")
    for target, source in zip(bare.layers, whole.layers, strict=False):
        if target.name in {layer.name for layer in whole.layers}:
            source = whole.get_layer(target.name)
            target.set_weights(source.get_weights())
    whole.save_weights(tmp_path / "top.weights.h5")
    config = configure(tmp_path / "top.weights.h5", name="MobileNetV3Small", input_px=32, preprocessing=None)
    try:
        check_features(config, bare)
    except ModelError as error:
        assert "without the classifier" in str(error)
    message = (
        r"expected weights of SqueezeNet without its classifier, found a file that does not fit: .*; set model\.name to"
    )
    with pytest.raises(ModelError, match=message):
        build_artifact(config.model_copy(update={"name": "SqueezeNet"}))


def test_h5_model_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    monkeypatch.chdir(tmp_path)
    image = keras.Input((32, 32, 3))
    x = keras.layers.Lambda(lambda x: (open("mark", "w").close(), x * 2)[1], name="double")(image)
    keras.Model(image, keras.layers.GlobalAveragePooling2D()(x)).save("own.h5")
    Path("mark").unlink()
    config = configure(tmp_path / "own.h5")
    message = r"own\.h5: .*found the layer double \(Lambda\), which carries Python code; .* model\.allow_code: true$"
    with pytest.raises(ModelError, match=message):
        build_artifact(config)

    def age(text: str) -> str:
        description = json.loads(text)
        settings = next(layer["config"] for layer in description["config"]["layers"] if layer["class_name"] == "Lambda")
        code = settings["function"]["config"]
        # Keras 2 wrote a list.
        settings |= {"function": [code["code"], code["defaults"], code["closure"]], "function_type": "lambda"}
        return json.dumps(description)

    edit_h5(tmp_path / "own.h5", age)
    with pytest.raises(ModelError, match=message):
        build_artifact(config)
    assert not Path("mark").exists()
    artifact = build_artifact(config.model_copy(update={"allow_code": True}))
    expected = 2 * PIXELS.astype(np.float64).mean(axis=(1, 2))
    np.testing.assert_allclose(load_predictor(artifact, n_threads=1)(PIXELS), expected, rtol=1e-5)


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_classes_unknown_to_keras_are_named(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    class Gem(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return keras.ops.mean(x**3.0, axis=(1, 2)) ** (1 / 3)

    image = keras.Input((32, 32, 3))
    pooled = Gem(name="gem")(image)
    network = keras.Model(image, keras.layers.Dense(5)(pooled))
    network.save(tmp_path / f"own.{ending}")
    config = configure(tmp_path / f"own.{ending}")
    message = r"found the layer gem of the class Gem, which Keras does not have; .* or save the model without the layer"
    with pytest.raises(ModelError, match=message):
        build_artifact(config)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with keras.saving.custom_object_scope({"Custom>Gem": Gem, "Gem": Gem}):
        artifact = build_artifact(config)
    expected = (PIXELS.astype(np.float64) ** 3).mean(axis=(1, 2)) ** (1 / 3)
    np.testing.assert_allclose(load_predictor(artifact, n_threads=1)(PIXELS), expected, rtol=1e-4)
    assert artifact.layer == "gem" and artifact.has_foreign_code
    # The code of such a class may change while the file does not.
    keep_artifact(config, artifact)
    assert find_artifact(config) is None


def test_subclassed_model_is_named_by_its_class(tmp_path: Path) -> None:
    import keras

    class Fruits(keras.Model):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.pool, self.dense = keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5)

        def call(self, x: Any) -> Any:
            return self.dense(self.pool(x))

    network = Fruits()
    network(PIXELS.astype(np.float32))
    network.save(tmp_path / "own.keras")
    config = configure(tmp_path / "own.keras")
    with pytest.raises(ModelError, match="a model of the class Fruits, whose code is not in the file; "):
        build_artifact(config)
    with keras.saving.custom_object_scope({"Fruits": Fruits}), pytest.raises(ModelError, match="expected .* found "):
        build_artifact(config)


@pytest.mark.slow
def test_mixed_and_quantized_models_equal_keras(tmp_path: Path) -> None:
    import keras

    keras.config.set_dtype_policy("mixed_float16")
    try:
        mixed, reference = build_network()
    finally:
        keras.config.set_dtype_policy("float32")
    mixed.save(tmp_path / "mixed.keras")
    check_features(configure(tmp_path / "mixed.keras"), reference, tolerance=1e-3)
    image = keras.Input((32, 32, 3))
    x = hidden = keras.layers.Dense(64, activation="relu")(keras.layers.GlobalAveragePooling2D()(image))
    network = keras.Model(image, keras.layers.Dense(5, activation="softmax")(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        network.quantize("int8")
    network.save(tmp_path / "int8.keras")
    check_features(configure(tmp_path / "int8.keras"), keras.Model(image, hidden))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openvino") is None, reason="needs the extra openvino")
@pytest.mark.parametrize("preprocessing", ["tf", "torch"])
def test_pixels_are_not_scaled_twice(preprocessing: str, tmp_path: Path) -> None:
    import keras

    network, _ = build_network()
    outer = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.RandomFlip(), network])
    outer.save(tmp_path / "own.keras")
    message = (
        rf"own\.keras: expected pixels .* once, found model\.preprocessing {preprocessing} before .* own/rescaling"
    )
    with pytest.raises(ModelError, match=message):
        build_artifact(configure(tmp_path / "own.keras", preprocessing=preprocessing))


@pytest.mark.parametrize("scale", [1 / 255, 0.5], ids=["other pixels", "small"])
def test_scaling_of_something_else_is_left_to_the_network(scale: float, tmp_path: Path) -> None:
    import keras
    from keras.applications.imagenet_utils import preprocess_input

    image = keras.Input((32, 32, 3))
    x = image if scale < 0.1 else keras.layers.Rescaling(scale)(image)
    x = keras.layers.Conv2D(6, 3)(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(x))
    keras.Model(image, keras.layers.Dense(5, activation="softmax")(x)).save(tmp_path / "own.keras")
    artifact = build_artifact(configure(tmp_path / "own.keras", preprocessing="tf"))
    expected = keras.Model(image, x).predict(preprocess_input(PIXELS.astype(np.float32), mode="tf"), verbose=0)
    np.testing.assert_allclose(load_predictor(artifact, n_threads=1)(PIXELS), expected, rtol=1e-4, atol=1e-6)


def test_weights_that_are_nan_are_refused(tmp_path: Path) -> None:
    network, _ = build_network()
    weights = network.get_weights()
    weights[0][0, 0, 0, 0] = np.nan
    network.set_weights(weights)
    network.save(tmp_path / "own.keras")
    for engine in ("tensorflow", "openvino"):
        with pytest.raises(ModelError, match="expected numbers, found NaN in the weights first/kernel"):
            build_artifact(configure(tmp_path / "own.keras", engine=engine))


def test_engine_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    import keras

    network, reference = build_network()
    network.save(tmp_path / "own.keras")
    check_features(configure(tmp_path / "own.keras", engine="openvino"), reference)
    image = keras.Input((32, 32, 3))
    hidden = keras.layers.Dense(64, activation="relu")(keras.layers.GlobalAveragePooling2D()(image))
    network = keras.Model(image, keras.layers.Dense(5, activation="softmax")(hidden), name="small")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        network.quantize("int8")
    network.save(tmp_path / "int8.keras")
    # OpenVINO 2026.4 leaves the scale out.
    message = r"features of small from openvino and TensorFlow differ by .*; set model\.engine: tensorflow$"
    with pytest.raises(ModelError, match=message):
        build_artifact(configure(tmp_path / "int8.keras", engine="openvino"))


def test_keras_file_in_capitals_must_say_its_preprocessing() -> None:
    from fruitdask.core.config import load_config

    sections = {"input": {"url": "x"}, "output": {"url": "y"}, "model": {"weights": "OWN.KERAS"}}
    with pytest.raises(ConfigError, match="preprocessing must be given for a .keras file"):
        load_config(sections)
