"""Applying a finished run to new photographs: in this process, and as a separate run."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from runs import Finish, break_image, compute_colours, configure, draw

import fruitdask
from fruitdask import store
from fruitdask.cli import cli
from fruitdask.core.config import ModelConfig
from fruitdask.core.storage import Location
from fruitdask.errors import ConfigError, FruitdaskError, OutputError, StoreMismatchError
from fruitdask.pipeline.apply import configure as configure_applied

NEW = [f"{number}.png" for number in range(4)]


@pytest.fixture
def result(sample_folder: Path, tiny_model: ModelConfig, finish: Finish, tmp_path: Path) -> fruitdask.RunResult:
    """A finished run on the drawn images, with two components."""
    return finish(configure(sample_folder, tmp_path / "out", tiny_model))


@pytest.fixture
def apply(result: fruitdask.RunResult, client: Any, tmp_path: Path) -> Callable[..., fruitdask.RunResult]:
    """A function that applies the run to four new images without classes."""
    draw(tmp_path / "new", *NEW)

    def apply(**settings: Any) -> fruitdask.RunResult:
        given = {"input": tmp_path / "new", "output": tmp_path / "applied", "client": client} | settings
        return fruitdask.apply(result.output.url, **given)

    return apply


def project(result: fruitdask.RunResult, features: np.ndarray) -> np.ndarray:
    """Project features onto the stored components of a run, using only NumPy."""
    arrays = store.read_arrays(result.output.child("pca.zarr"))
    return (features - arrays["mean"]) @ arrays["components"].T


def get_scores(table: pd.DataFrame) -> np.ndarray:
    """Get the columns pca_1, pca_2 ..."""
    return table.filter(regex=r"^pca_\d+$").to_numpy()


def test_transform_equals_the_run_on_its_own_photographs(result: fruitdask.RunResult, sample_folder: Path) -> None:
    table = result.table
    features, transformed = result.transform([sample_folder / path for path in table["path"]])
    np.testing.assert_allclose(features, result.features.compute(), rtol=1e-4)
    np.testing.assert_allclose(get_scores(transformed), get_scores(table), rtol=1e-4, atol=1e-3)
    assert list(transformed.columns) == ["path", "status", "error", "pca_1", "pca_2"]
    assert transformed["path"].tolist() == [str(sample_folder / path) for path in table["path"]]


def test_transform_accepts_photographs_of_any_kind_and_broken_ones(result: fruitdask.RunResult, tmp_path: Path) -> None:
    draw(tmp_path, "a.png", "b.png")
    break_image(tmp_path / "b.png")
    cut = Image.open(io.BytesIO((tmp_path / "a.png").read_bytes()[:500]))
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image)
        data = (tmp_path / "a.png").read_bytes()
        given = [tmp_path / "a.png", data, image, pixels, pixels[:, :, 0]]
        bad = [
            str(tmp_path / "b.png"),
            str(tmp_path / "c.png"),
            cut,
            pixels / 255,
            b"",
            str(tmp_path),
            "nowhere://a/b.png",
        ]
        features, table = result.transform(given + bad)
    expected = compute_colours(tmp_path, ["a.png"])[0]
    np.testing.assert_allclose(features[:4], np.tile(expected, (4, 1)), rtol=1e-4)
    np.testing.assert_allclose(get_scores(table)[:4], project(result, np.tile(expected, (4, 1))), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(features[4], np.repeat([pixels[..., 0].mean(), pixels[..., 0].max()], 3), rtol=1e-4)
    # The bytes of a file are not a list of row numbers.
    for each in (bytearray(data), memoryview(data), io.BytesIO(data), 1.5):
        with pytest.raises(ConfigError, match=f"image 1: expected a path, .* found {type(each).__name__}$"):
            result.transform(each)
    statuses = ["unreadable", "missing", "unreadable", "unreadable", "unreadable", "unreachable", "unreachable"]
    assert table["status"].tolist() == ["ok"] * 5 + statuses
    assert np.isnan(features[5:]).all() and np.isnan(get_scores(table)[5:]).all() and (table["error"][5:] != "").all()
    assert "expected an array of uint8" in table["error"][8] and "float64 of shape (32, 32, 3)" in table["error"][8]


@pytest.mark.parametrize("dtype", ["float32", "int32", ">u2"])
def test_pillow_images_that_pillow_would_clip_are_refused(result: fruitdask.RunResult, dtype: str) -> None:
    image = Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(dtype))
    features, table = result.transform([image, image.convert("L")])
    assert table["status"].tolist() == ["unreadable", "ok"] and np.isnan(features[0]).all()
    assert f"of 8 bits, found an image of Pillow's mode {image.mode};" in table["error"][0]


def test_transform_turns_an_image_like_its_file(result: fruitdask.RunResult, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(16, 64, 3)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        features, _ = result.transform([tmp_path / "turned.png", image])
    np.testing.assert_array_equal(features[0], features[1])


def test_transform_accepts_one_image_and_none(result: fruitdask.RunResult, sample_folder: Path) -> None:
    features, table = result.transform(str(sample_folder / result.table["path"][0]))
    assert features.shape == (1, 6) and len(table) == 1
    features, table = result.transform([])
    assert features.shape == (0, 6) and list(table.columns) == ["path", "status", "error", "pca_1", "pca_2"]


def test_changed_or_missing_weights_are_one_sentence(
    tiny_model: ModelConfig, sample_folder: Path, finish: Finish, tmp_path: Path
) -> None:
    weights = tmp_path / "own.keras"
    shutil.copy(tiny_model.weights, weights)
    own = tiny_model.model_copy(update={"weights": str(weights)})
    result = finish(configure(sample_folder, tmp_path / "out", own))
    path = str(sample_folder / result.table["path"][0])
    weights.unlink()
    with pytest.raises(FruitdaskError, match="own.keras"):
        result.transform(path)
    features, _ = result.transform(path, overrides=[f"model.weights={tiny_model.weights}"])
    np.testing.assert_allclose(features, result.features[:1].compute(), rtol=1e-4)
    network = keras.saving.load_model(tiny_model.weights)
    network.layers[-1].set_weights([np.ones((6, 2)), np.zeros(2)])
    network.save(weights)
    with pytest.raises(StoreMismatchError, match="model.weights was sha256:.*, is sha256:.*; set model.weights"):
        result.transform(path)
    with pytest.raises(StoreMismatchError, match="model.weights was sha256:"):
        fruitdask.apply(result, input=str(sample_folder), output=str(tmp_path / "applied"))
    assert not (tmp_path / "applied").exists()


def test_apply_uses_the_network_and_components_of_the_run(
    result: fruitdask.RunResult, apply: Callable[..., fruitdask.RunResult], tmp_path: Path
) -> None:
    applied = apply()
    expected = compute_colours(tmp_path / "new", NEW)
    assert applied.table["path"].tolist() == NEW and applied.n_computed == 4
    np.testing.assert_allclose(applied.features.compute(), expected, rtol=1e-4)
    np.testing.assert_allclose(get_scores(applied.table), project(result, expected), rtol=1e-3, atol=1e-3)
    features, table = result.transform([tmp_path / "new" / path for path in NEW])
    np.testing.assert_allclose(features, applied.features.compute(), rtol=1e-4)
    recorded = applied.manifest["applied"]
    assert recorded["output"] == result.output.url and recorded["finished"] == result.manifest["finished"]
    assert applied.manifest["pca"]["is_kept"] and applied.manifest["pca"]["fit"]["n_images"] == 24
    assert applied.manifest["model"]["sha256"] == result.manifest["model"]["sha256"]
    found = fruitdask.verify(applied.output.url)
    assert found.faults == () and found.notes == (
        f"pca.zarr was not compared with the features: it is of {result.output.url}",
    )


@pytest.mark.slow
def test_apply_again_computes_nothing_and_grows_without_fitting(
    result: fruitdask.RunResult, apply: Callable[..., fruitdask.RunResult], tmp_path: Path
) -> None:
    before = apply()
    again = apply()
    assert again.n_computed == 0 and again.manifest["finished"] == before.manifest["finished"]
    # More than a tenth: an ordinary run would fit its components again.
    draw(tmp_path / "new", "4.png", "5.png", "6.png")
    grown = apply()
    assert grown.n_computed == 3 and grown.changes["added"] == 3
    paths = grown.table["path"].tolist()
    expected = project(result, compute_colours(tmp_path / "new", paths))
    np.testing.assert_allclose(get_scores(grown.table), expected, rtol=1e-3, atol=1e-3)
    assert fruitdask.verify(grown.output.url).is_well


@pytest.mark.slow
def test_one_image_is_enough(
    result: fruitdask.RunResult, apply: Callable[..., fruitdask.RunResult], tmp_path: Path
) -> None:
    for name in NEW[1:]:
        (tmp_path / "new" / name).unlink()
    sections = ("report", "plots", "explore", "reduce.tsne")
    applied = apply(overrides=[f"{name}.enabled=true" for name in sections])
    expected = project(result, compute_colours(tmp_path / "new", NEW[:1]))
    np.testing.assert_allclose(get_scores(applied.table), expected, rtol=1e-3, atol=1e-3)
    n_fitted = result.manifest["pca"]["fit"]["n_images"]
    assert f"two components, of the {n_fitted} images they were fitted to" in applied.report.read()
    assert fruitdask.verify(applied.output.url).is_well


@pytest.mark.slow
def test_run_report_and_erase_keep_the_components(
    result: fruitdask.RunResult, apply: Callable[..., fruitdask.RunResult], client: Any, tmp_path: Path
) -> None:
    applied = apply()
    scores = get_scores(applied.table)
    config = configure_applied(result, input=str(tmp_path / "new"), output=str(tmp_path / "applied"))
    other = config.reduce.model_copy(update={"n_components": 1, "refit": "always"})
    shutil.rmtree(tmp_path / "out")
    rerun = fruitdask.run(config.model_copy(update={"reduce": other}), client=client)
    np.testing.assert_array_equal(get_scores(rerun.table), scores)
    assert "as fitted to" not in fruitdask.render_report(config).read()
    erased = fruitdask.erase(config, ["0.png"], client=client).result
    assert erased is not None and erased.manifest["applied"] == applied.manifest["applied"]
    np.testing.assert_array_equal(get_scores(erased.table), scores[1:])
    assert fruitdask.verify(erased.output.url).faults == ()
    store.delete_result(erased.output, "pca.zarr")
    (tmp_path / "new" / "0.png").unlink()
    with pytest.raises(OutputError, match="principal components of .*, found none; use fruitdask apply"):
        fruitdask.run(config, client=client)


@pytest.mark.slow
def test_interrupted_apply_resumes(
    result: fruitdask.RunResult,
    apply: Callable[..., fruitdask.RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt("in this test")

    with monkeypatch.context() as patch:
        patch.setattr(store, "copy_arrays", interrupt)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            apply()
    resumed = apply()
    assert resumed.n_computed == 0
    expected = project(result, compute_colours(tmp_path / "new", NEW))
    np.testing.assert_allclose(get_scores(resumed.table), expected, rtol=1e-3, atol=1e-3)
    (tmp_path / "applied" / "manifest.json").write_text("{")
    fruitdask.verify(resumed.output.url, repair=True)
    repaired = apply()
    assert repaired.manifest["applied"] == resumed.manifest["applied"] and repaired.table.equals(resumed.table)


@pytest.mark.slow
def test_apply_refuses_results_with_other_components(
    result: fruitdask.RunResult, apply: Callable[..., fruitdask.RunResult], sample_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreMismatchError, match="its principal components are its own, not those of"):
        shutil.copytree(result.output.url, tmp_path / "other")
        apply(input=str(sample_folder), output=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="expected a folder for other results, found the run to apply"):
        apply(output={"url": result.output.url, "overwrite": True})
    apply()
    arrays = store.read_arrays(result.output.child("pca.zarr"))
    dimensions = {"components": ("component", "feature"), "mean": ("feature",)}
    changed = arrays | {"mean": arrays["mean"] + 1}
    named = {name: (values, dimensions.get(name, ("component",))) for name, values in changed.items()}
    store.write_arrays(result.output.child("pca.zarr"), named, {})
    with pytest.raises(StoreMismatchError, match="are those that .* had before, not those of"):
        apply()
    store.copy_arrays(result.output.child("pca.zarr"), Location(str(tmp_path / "applied" / "pca.zarr")))
    said = [str(fault) for fault in fruitdask.verify(str(tmp_path / "applied")).faults]
    assert f"pca.zarr: it is not what {result.output.url} has; the next run reduces" in "".join(said)
    with pytest.raises(ConfigError, match="lies inside input.url"):
        apply(output=str(tmp_path / "new" / "applied"))


def test_apply_without_components_computes_only_features(
    sample_folder: Path, tiny_model: ModelConfig, finish: Finish, client: Any, tmp_path: Path
) -> None:
    result = finish(configure(sample_folder, tmp_path / "out", tiny_model, reduce={"enabled": False}))
    draw(tmp_path / "new", *NEW)
    applied = fruitdask.apply(result, input=str(tmp_path / "new"), output=str(tmp_path / "applied"), client=client)
    assert list(applied.table.columns) == ["path", "label", "status"] and applied.pca is None
    features, table = result.transform(tmp_path / "new" / NEW[0])
    assert list(table.columns) == ["path", "status", "error"] and features.shape == (1, 6)


@pytest.mark.slow
def test_command_applies_with_settings(
    result: fruitdask.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Any
) -> None:
    draw(tmp_path / "new", *(f"plum/{name}" for name in NEW))
    arguments = ["apply", result.output.url, "--input", str(tmp_path / "new"), "--output", str(tmp_path / "applied")]
    address = ["cluster.kind=address", f"cluster.address={client.scheduler.address}"]
    done = CliRunner().invoke(cli, [*arguments, *(part for each in address for part in ("--set", each))])
    assert done.exit_code == 0, done.output
    assert "plum" in done.stdout and "as fitted to 24 images" in done.stdout
    manifest = json.loads((tmp_path / "applied" / "manifest.json").read_text())
    assert manifest["config"]["cluster"]["kind"] == "address" and manifest["config"]["input"]["url"] == str(
        tmp_path / "new"
    )
    done = CliRunner().invoke(cli, [*arguments[:2], "--output", "x"])
    assert done.exit_code == 2 and "--input" in done.stderr
