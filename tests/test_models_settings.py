"""The user's settings of Keras change nothing: neither a file in the home folder, nor the environment, nor the calling
process.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fruitdask.core.config import ModelConfig
from fruitdask.errors import EngineError
from fruitdask.worker.models import build_artifact, load_predictor, settings
from fruitdask.worker.models.settings import find_backend, import_keras

PIXELS = np.random.default_rng(0).integers(0, 4, (2, 32, 32, 3), np.uint8)
SETTINGS = {"floatx": "float16", "epsilon": 0.25, "image_data_format": "channels_first", "backend": "jax"}
_SCRIPT = """
import hashlib, os, sys
import numpy as np
from fruitdask.core.config import ModelConfig
from fruitdask.worker.models import build_artifact, load_predictor, prepare_engine

if __name__ == "__main__":
    artifact = build_artifact(ModelConfig.model_validate_json(sys.argv[1]))
    prepare_engine("tensorflow", n_threads=1)
    pixels = np.random.default_rng(0).integers(0, 4, (2, 32, 32, 3), np.uint8)
    features = load_predictor(artifact, n_threads=1)(pixels)
    print(hashlib.sha256(features.tobytes()).hexdigest(), "keras" in sys.modules)
    import tensorflow as tf

    # Workers share GPUs and compute in full precision.
    print(os.environ["TF_FORCE_GPU_ALLOW_GROWTH"], tf.config.experimental.tensor_float_32_execution_enabled())
"""


@pytest.fixture(scope="module")
def sensitive_model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A network whose features depend on Keras's settings, saved in the format that leaves types to them."""
    import keras

    keras.utils.set_random_seed(5)
    image = keras.Input((32, 32, 3))
    x = keras.layers.Normalization(mean=[0.0] * 3, variance=[0.01] * 3)(image)
    x = keras.layers.Conv2D(9, 3, activation="relu")(x)
    path = tmp_path_factory.mktemp("model") / "sensitive.h5"
    keras.Model(image, x).save(path)
    return ModelConfig(weights=str(path), preprocessing="caffe", engine="tensorflow")


@pytest.fixture
def foreign_home(tmp_path: Path) -> Path:
    """A folder of settings for Keras, as someone who works with another backend has it."""
    (tmp_path / "keras.json").write_text(json.dumps(SETTINGS))
    return tmp_path


@pytest.fixture
def foreign_settings() -> Iterator[dict[str, Any]]:
    """Settings that a user has made in this very process."""
    from keras import config

    def read() -> dict[str, Any]:
        values = (config.floatx(), config.epsilon(), config.image_data_format(), config.dtype_policy().name)
        return dict(zip(("floatx", "epsilon", "image_data_format", "dtype_policy"), values, strict=True))

    def apply(values: dict[str, Any]) -> None:
        for name, value in values.items():
            getattr(config, f"set_{name}")(value)

    saved = read()
    mine = {
        "floatx": "float16",
        "epsilon": 0.25,
        "image_data_format": "channels_first",
        "dtype_policy": "mixed_bfloat16",
    }
    apply(mine)
    yield mine
    assert read() == mine
    apply(saved)


@pytest.mark.slow
def test_features_are_the_same_whatever_the_user_has_set(sensitive_model: ModelConfig, foreign_home: Path) -> None:
    artifact = build_artifact(sensitive_model)
    features = load_predictor(artifact, n_threads=1)(PIXELS)
    (foreign_home / "script.py").write_text(_SCRIPT)
    foreign = {"KERAS_HOME": str(foreign_home), "KERAS_BACKEND": "jax", "TF_USE_LEGACY_KERAS": "1"}
    environment = os.environ | foreign | {"XDG_CACHE_HOME": str(foreign_home / "cache")}
    command = [sys.executable, str(foreign_home / "script.py"), sensitive_model.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    # Names of layers, which Keras numbers as it makes them, are in the payload too, so the features are compared.
    assert done.stdout.split() == [hashlib.sha256(features.tobytes()).hexdigest(), "False", "true", "False"]


@pytest.mark.parametrize("name", ["whole model", "SqueezeNet"])
def test_settings_of_the_process_change_nothing_and_stay(
    name: str, sensitive_model: ModelConfig, request: pytest.FixtureRequest
) -> None:
    named = ModelConfig(name="SqueezeNet", input_px=32, engine="tensorflow")
    config = named if name == "SqueezeNet" else sensitive_model
    expected = load_predictor(build_artifact(config), n_threads=1)(PIXELS)
    request.getfixturevalue("foreign_settings")
    np.testing.assert_array_equal(load_predictor(build_artifact(config), n_threads=1)(PIXELS), expected)


def test_settings_matter_to_the_model_of_these_tests(sensitive_model: ModelConfig) -> None:
    import keras

    image = PIXELS.astype(np.float32)
    before = np.asarray(keras.saving.load_model(sensitive_model.weights, compile=False)(image))
    keras.config.set_epsilon(0.25)
    try:
        after = np.asarray(keras.saving.load_model(sensitive_model.weights, compile=False)(image))
    finally:
        keras.config.set_epsilon(1e-7)
    assert np.abs(after - before).max() > 0.01


@pytest.mark.parametrize(
    ("variable", "content", "expected"),
    [
        ("jax", None, "jax"),
        (None, '{"backend": "torch"}', "torch"),
        ("numpy", '{"backend": "torch"}', "numpy"),
        (None, '{"floatx": "float16"}', "tensorflow"),
        (None, "no JSON", "tensorflow"),
        (None, None, "tensorflow"),
    ],
    ids=["variable", "file", "variable before file", "file without it", "damaged file", "nothing"],
)
def test_find_backend_reads_what_keras_would(
    variable: str | None, content: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if variable:
        monkeypatch.setenv("KERAS_BACKEND", variable)
    if content:
        (tmp_path / "keras.json").write_text(content)
    assert find_backend() == expected


def test_keras_on_another_backend_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(EngineError, match="Keras runs on jax in this process; in a script, import Keras"):
        import_keras()
    # As in the script above, whose network is built in a child.
    assert settings.find_backend() == "jax"
