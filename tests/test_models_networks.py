"""The table of networks that have a name, compared with Keras itself."""

import importlib
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fruitdask.cli import cli
from fruitdask.core.config import ModelConfig
from fruitdask.errors import ModelError
from fruitdask.worker.models import build_artifact, check_name, choose_input_px, fingerprint_model
from fruitdask.worker.models.engines import ENGINES
from fruitdask.worker.models.networks import INPUT_PX, find_preprocessing

APPLICATIONS = sorted(set(INPUT_PX) - {"SqueezeNet"})
#: One network of each kind of layers, with a small input size that it accepts.
FAMILIES = {
    "ConvNeXtTiny": 64,
    "EfficientNetB0": 64,
    "MobileNetV3Small": 64,
}


class Asked(Exception):
    """Stops a network of Keras once its default size is known."""


def test_table_has_all_networks_of_keras() -> None:
    import keras

    assert {name for name in vars(keras.applications) if name[0].isupper()} == set(APPLICATIONS)


@pytest.mark.parametrize("name", APPLICATIONS)
def test_input_size_is_that_of_keras(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    def tell(*args: object, default_size: int, **kwargs: object) -> None:
        raise Asked(default_size)

    network, size_px = getattr(keras.applications, name), choose_input_px(ModelConfig(name=name))
    if name.startswith("MobileNetV3"):
        # Its code leaves the size open, its documentation does not.
        assert f"`({size_px}, {size_px}, 3)`" in network.__doc__
        return
    source = importlib.import_module(network.__module__)
    target = source if hasattr(source, "obtain_input_shape") else source.imagenet_utils
    monkeypatch.setattr(target, "obtain_input_shape", tell)
    with pytest.raises(Asked, match=f"^{size_px}$"):
        network(weights=None)


@pytest.mark.parametrize("name", APPLICATIONS)
def test_preprocessing_is_that_of_keras(name: str) -> None:
    import keras

    pixels = np.random.default_rng(0).uniform(0, 255, (1, 2, 2, 3)).astype(np.float32)
    source = importlib.import_module(getattr(keras.applications, name).__module__)
    np.testing.assert_array_equal(find_preprocessing(name)(pixels.copy()), source.preprocess_input(pixels.copy()))


def randomize(network: Any) -> None:
    """Give a network weights that make its features neither tiny nor huge, unlike those of untrained networks."""
    generator = np.random.default_rng(7)
    for layer in network.layers:
        if type(layer).__name__ == "Normalization":
            # Its constants were computed from its weights when it was built.
            continue
        weights = []
        for value in layer.get_weights():
            is_kernel, is_depthwise = value.ndim > 1, value.ndim == 4 and "depthwise" in type(layer).__name__.lower()
            spread = np.sqrt(2 / np.prod(value.shape[:2] if is_depthwise else value.shape[:-1]))
            weights.append(
                generator.normal(0, spread, value.shape)
                if is_kernel
                else value + generator.uniform(0, 0.1, value.shape)
            )
        layer.set_weights(weights)


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce networks of dozens of equal blocks to one or two of each kind: the same layers, in a tenth of the time."""
    from keras.src.applications import convnext, efficientnet

    tiny = convnext.MODEL_CONFIGS["tiny"] | {"depths": [1] * 4, "projection_dims": [24, 48, 96, 192]}
    monkeypatch.setitem(convnext.MODEL_CONFIGS, "tiny", tiny)
    blocks = [block | {"repeats": min(block["repeats"], 2)} for block in efficientnet.DEFAULT_BLOCKS_ARGS[:3]]
    monkeypatch.setattr(efficientnet, "DEFAULT_BLOCKS_ARGS", blocks)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openvino") is None, reason="needs the extra openvino")
@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_each_family_equal_keras(name: str, tmp_path: Path) -> None:
    import keras

    size_px = FAMILIES[name]
    build = getattr(keras.applications, name)
    network = build(include_top=False, weights=None, input_shape=(size_px, size_px, 3), pooling="avg")
    randomize(network)
    network.save_weights(tmp_path / "own.weights.h5")
    pixels = np.random.default_rng(0).integers(0, 256, (2, size_px, size_px, 3), np.uint8)
    preprocess = importlib.import_module(build.__module__).preprocess_input
    expected = np.asarray(network(preprocess(pixels.astype(np.float32)), training=False))
    assert np.isfinite(expected).all() and float(np.ptp(expected, axis=0).max()) > 1e-4
    config = ModelConfig(name=name, input_px=size_px, weights=str(tmp_path / "own.weights.h5"), engine="tensorflow")
    artifact = build_artifact(config)
    packed = replace(artifact, engine="openvino", payload=ENGINES["openvino"].pack_graph(artifact.payload))
    assert artifact.layer and artifact.n_features == expected.shape[1]
    for each in (artifact, packed):
        # load_predictor is not used here, because it keeps each network until the process ends.
        found = ENGINES[each.engine].load_network(each, n_threads=1)(pixels)
        errors = np.linalg.norm(found - expected, axis=1)
        assert (errors < 1e-4 * np.linalg.norm(expected, axis=1)).all()
    keras.backend.clear_session()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("MobileNetV3", "did you mean MobileNetV3Small or MobileNetV3Large\\?"),
        ("resnet50", "did you mean ResNet50 or ResNet50V2"),
        ("Pineapple", "see https://keras.io/api/applications"),
    ],
    ids=["part of a name", "other case", "no network"],
)
def test_check_name_refuses_what_does_not_exist(name: str, hint: str) -> None:
    message = f"^model.name: expected SqueezeNet or a network of keras.applications, found '{name}'; {hint}"
    for check in (check_name, choose_input_px, fingerprint_model):
        with pytest.raises(ModelError, match=message):
            check(ModelConfig(name=name))


def test_validate_refuses_a_network_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("input: {url: photos}\noutput: {url: out}\nmodel: {name: MobilNetV3Small}\n")
    refused = CliRunner().invoke(cli, ["validate", str(path)])
    assert refused.exit_code == 2
    assert "model.name: expected" in refused.output and "did you mean MobileNetV3Small" in refused.output
    own = ["--set", "model.weights=own.keras", "--set", "model.preprocessing=tf"]
    assert CliRunner().invoke(cli, ["validate", str(path), *own]).exit_code == 0


def test_names_are_checked_without_tensorflow() -> None:
    code = (
        "import sys; from fruitdask.core.config import ModelConfig; from fruitdask.worker.models import check_name; "
        "check_name(ModelConfig(name='MobileNetV3Small')); print({'tensorflow', 'keras', 'h5py'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
