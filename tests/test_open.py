"""Opening the results of a finished run by their folder: what they hold, and errors about other folders."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from runs import Finish, MakeConfig, break_image, compute_colours, configure, draw

import fruitdask
from fruitdask import store
from fruitdask.core.config import ModelConfig
from fruitdask.core.storage import Location
from fruitdask.errors import DamageError, FormatError, FruitdaskError, OutputError

NAMES = [
    f"{split}/{label}/{number}.png" for split in ("test", "train") for label in ("fig", "kiwi") for number in (1, 2, 3)
]


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: ModelConfig) -> MakeConfig:
    """Configure runs on twelve images of two classes and two splits, one of which is broken."""
    draw(tmp_path / "in", *NAMES)
    break_image(tmp_path / "in" / NAMES[4])

    def make(**sections: dict[str, object]) -> fruitdask.Config:
        sections["input"] = {"split_from": "first"} | sections.get("input", {})
        sections["featurize"] = {"max_failed_fraction": 0.1}
        return configure(tmp_path / "in", tmp_path / "out", tiny_model, **sections)

    return make


def test_open_gives_the_results_without_configuration_and_images(
    make_config: MakeConfig, finish: Finish, tmp_path: Path
) -> None:
    expected = finish(make_config())
    shutil.rmtree(tmp_path / "in")
    result = fruitdask.open(f"{tmp_path / 'out'}/")
    assert result.manifest == expected.manifest and result.n_computed == 0
    assert result.table.equals(expected.table) and len(result.table) == 12


def test_to_xarray_names_the_images_and_is_lazy(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    array = finish(make_config()).to_xarray()
    assert array.dims == ("image", "feature") and array.chunks is not None
    assert array["path"].values.tolist() == NAMES
    assert array["split"].values.tolist() == ["test"] * 6 + ["train"] * 6
    assert array["status"].values.tolist() == ["ok"] * 4 + ["unreadable"] + ["ok"] * 7
    kiwis = array[(array["label"] == "kiwi").values & (array["status"] == "ok").values]
    expected = compute_colours(tmp_path / "in", [path for path in kiwis["path"].values])
    np.testing.assert_allclose(kiwis.values, expected, rtol=1e-4)


def test_to_xarray_says_what_to_install(
    make_config: MakeConfig, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = finish(make_config())
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(FruitdaskError, match="^to_xarray needs xarray; install it with pip install xarray$"):
        result.to_xarray()


def test_features_open_with_only_xarray(make_config: MakeConfig, finish: Finish, client: Any, tmp_path: Path) -> None:
    features = finish(make_config()).features.compute()
    # A warning would be an error here.
    with xarray.open_zarr(tmp_path / "out" / "features.zarr") as dataset:
        np.testing.assert_array_equal(dataset["features"].values, features)
    draw(tmp_path / "in", "train/melon/1.png")
    fruitdask.run(make_config(), client=client)
    with xarray.open_zarr(tmp_path / "out" / "features.zarr") as dataset:
        assert dataset.sizes == {"image": 13, "feature": 6}


def test_x_y_are_the_images_with_features(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    X, y = finish(make_config()).X_y()
    paths = [name for name in NAMES if name != NAMES[4]]
    assert X.dtype == np.float32 and y.dtype.kind == "U"
    assert y.tolist() == [path.split("/")[1] for path in paths]
    np.testing.assert_allclose(X, compute_colours(tmp_path / "in", paths), rtol=1e-4)


def test_folders_without_finished_results_are_refused(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected the results of a run, found none; check the folder"):
        fruitdask.open(str(tmp_path / "none"))
    output = Location(finish(make_config()).output.url)
    manifest = store.read_run(output)
    assert manifest is not None
    store.write_manifest(output, manifest.reopen())
    with pytest.raises(OutputError, match="found one that is not finished; use fruitdask run"):
        fruitdask.open(output.url)
    tree = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(tree | {"n_images": 1}))
    with pytest.raises(DamageError, match="manifest.json is damaged .* --repair"):
        fruitdask.open(output.url)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(tree | {"format": 99}))
    with pytest.raises(FormatError, match="found format 99"):
        fruitdask.open(output.url)
    (tmp_path / "out" / "manifest.json").unlink()
    store.write_manifest(output, store.ExplorationManifest(fruitdask="1", status="running", fingerprint={}))
    with pytest.raises(OutputError, match="found only an exploration; use fruitdask run"):
        fruitdask.open(output.url)


def test_missing_chunks_are_not_read_as_numbers(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    # Copies of results are sometimes incomplete; Zarr reads a chunk that is not there as NaN.
    result, store_folder = finish(make_config()), tmp_path / "out" / "features.zarr"
    features = result.features
    (store_folder / "features" / "c" / "1" / "0").rename(tmp_path / "chunk")
    broken = r"features\.zarr is damaged \(chunks are missing\); use fruitdask verify .* --repair"
    for read in (features.compute, result.X_y, lambda: fruitdask.train(result), lambda: result.similar(0)):
        with pytest.raises(DamageError, match=broken):
            read()
    with pytest.raises(DamageError, match=broken):
        fruitdask.export(result, tmp_path / "images.parquet")
    assert not (tmp_path / "images.parquet").exists()
    (tmp_path / "chunk").rename(store_folder / "features" / "c" / "1" / "0")
    (store_folder / "status" / "c" / "2").unlink()
    with pytest.raises(DamageError, match=r"features\.zarr is damaged \(chunks of status are missing\);"):
        result.X_y()


def test_incomplete_table_is_damage(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    result = finish(make_config())
    (part,) = (tmp_path / "out" / "results.parquet").iterdir()
    part.unlink()
    with pytest.raises(DamageError, match=r"parquet is damaged \(expected 12 images, found 0\); use"):
        _ = result.table
