"""The output folder: contracts of its layout, and which files may be deleted."""

import io
import json
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray
import zarr
from hypothesis import given, settings, strategies as st

from fruitdask import store
from fruitdask.core.storage import Location, exists
from fruitdask.errors import DamageError, OutputError, StoreMismatchError

FINGERPRINT = {"catalog": "a" * 64, "decoding": {}, "model": {"pooling": "avg", "weights": "imagenet"}}


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An output folder on disk and one on S3."""
    if request.param == "disk":
        return Location(str(tmp_path / "out"))
    bucket, options = request.getfixturevalue("s3_bucket")
    return Location(f"s3://{bucket}/out", options)


def make_outcomes(statuses: list[str]) -> pd.DataFrame:
    """Make outcome rows."""
    rows = [[f"a/{n}.jpg", "a", status, "", 1, 9, 0] for n, status in enumerate(statuses)]
    return pd.DataFrame(rows, columns=[*store.OUTCOME_COLUMNS, *store.VERSION_COLUMNS])


def make_manifest(**changes: Any) -> store.RunManifest:
    """Make the manifest of a run that has begun."""
    model = {
        "name": "N",
        "layer": "l",
        "engine": "e",
        "preprocessing": "tf",
        "input_px": 8,
        "n_features": 3,
        "sha256": "0",
    }
    begun = {
        "fruitdask": "0",
        "status": "running",
        "fingerprint": FINGERPRINT,
        "n_images": 5,
        "images_per_partition": 2,
    }
    return store.RunManifest.model_validate(begun | {"model": model} | changes)


def fill(output: Location) -> np.ndarray:
    """Create a store of 5 images in partitions of 2, write the last two partitions, and return all features."""
    store.write_manifest(output, make_manifest())
    store.create_store(output, n_images=5, n_features=3, images_per_partition=2, attributes={"class_names": ["a"]})
    features = np.arange(15, dtype=np.float32).reshape(5, 3)
    features[[0, 1, 3]] = np.nan
    store.write_partition(output, index=1, start=2, features=features[2:4], outcomes=make_outcomes(["ok", "missing"]))
    store.write_partition(output, index=2, start=4, features=features[4:], outcomes=make_outcomes(["ok"]))
    return features


def test_store_reads_back_and_lists_what_is_committed(output: Location) -> None:
    features = fill(output)
    group = store.open_store(output)
    assert group is not None
    np.testing.assert_array_equal(group["features"][:], features)
    assert [store.STATUSES[code] for code in group["status"][:]] == ["pending", "pending", "ok", "missing", "ok"]
    assert store.list_committed(output) == {1, 2}
    tables = list(store.read_outcomes(output, [1, 2], partitions_at_once=1))
    assert [list(table["status"]) for table in tables] == [["ok", "missing"], ["ok"]]


def test_store_opens_with_zarr_dask_and_xarray(tmp_path: Path) -> None:
    output = Location(str(tmp_path))
    features = fill(output)
    path = tmp_path / "features.zarr"
    group = zarr.open(path, mode="r")
    assert group.metadata.zarr_format == 3 and group["features"].chunks == (2, 3)
    np.testing.assert_array_equal(da.from_zarr(str(path), component="features").compute(), features)
    dataset = xarray.open_zarr(path)
    assert dataset["features"].dims == ("image", "feature")
    np.testing.assert_array_equal(dataset["features"].values, features)
    assert dataset["status"].dtype == np.uint8
    assert dataset["status"].attrs["flag_meanings"].split()[1] == "ok"
    assert dataset.attrs["class_names"] == ["a"]


def test_open_store_finds_none_where_creation_was_interrupted(output: Location) -> None:
    assert store.open_store(output) is None
    fill(output)
    store.delete_result(output, "features.zarr/status")
    assert store.open_store(output) is None


def test_check_output_accepts_the_same_run_and_refuses_another(output: Location) -> None:
    assert store.check_output(output, FINGERPRINT, overwrite=False) is None
    fill(output)
    manifest = store.check_output(output, FINGERPRINT, overwrite=False)
    assert manifest is not None and manifest.fingerprint == FINGERPRINT
    other = FINGERPRINT | {"model": {"pooling": "max", "weights": "sha256:0123456789abcdef"}}
    with pytest.raises(StoreMismatchError, match="was avg, is max; .*weights was imagenet, is sha256:012"):
        store.check_output(output, other, overwrite=False)
    assert store.check_output(output, other, overwrite=True) is None


@pytest.mark.parametrize("overwrite", [False, True], ids=["keep", "overwrite"])
def test_check_output_refuses_files_that_no_run_wrote(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "results.csv").write_bytes(b"x")
    with pytest.raises(OutputError, match="found results.csv, which no fruitdask run wrote"):
        store.check_output(Location(str(tmp_path)), FINGERPRINT, overwrite=overwrite)


@pytest.mark.parametrize("text", ["[]", "{}", '{"fruitdask": 1}', "no json", '{"name": "another tool"}'])
def test_read_manifest_refuses_foreign_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(OutputError, match="expected the manifest of a fruitdask run"):
        store.read_run(Location(str(tmp_path)))


def test_clear_output_deletes_results_and_nothing_else(output: Location) -> None:
    fill(output)
    mine = output.child("notes.txt")
    mine.fs.pipe_file(mine.path, b"mine")
    store.clear_output(output)
    mine.fs.invalidate_cache()
    assert [path.rsplit("/", 1)[-1] for path in mine.fs.find(output.path)] == ["notes.txt"]


def test_arrays_read_back(output: Location) -> None:
    arrays = {"mean": (np.arange(3.0), ["feature"]), "components": (np.eye(2, 3), ["component", "feature"])}
    location = output.child("pca.zarr")
    for _ in range(2):
        store.write_arrays(location, arrays, {"fruitdask": "0"})
    read = store.read_arrays(location)
    assert set(read) == {"mean", "components"}
    np.testing.assert_array_equal(read["components"], np.eye(2, 3))


def test_write_manifest_is_readable_json(tmp_path: Path) -> None:
    store.write_manifest(Location(str(tmp_path)), make_manifest(unknown=[1]))
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert list(written)[:3] == ["format", "fruitdask", "status"] and list(written)[-1] == "checksum"
    assert written["format"] == 1 and written["unknown"] == [1] and "finished" not in written


def test_read_json_detects_changes(output: Location) -> None:
    # Numeric keys become text when they are read.
    location, tree = output.child("quality.json"), {"b": 0.1, "a": {10: None, 9: [1, "é"]}}
    store.write_json(location, tree)
    assert store.read_json(location) == {"format": 1} | json.loads(json.dumps(tree))
    location.fs.pipe_file(location.path, location.fs.cat_file(location.path).replace(b"0.1", b"0.2"))
    with pytest.raises(DamageError, match="quality.json is damaged .its checksum .*/out --repair"):
        store.read_quality(output)


def test_foreign_files_beside_commit_marks_are_ignored(output: Location) -> None:
    fill(output)
    for name in ("notes.parquet", "00009.parquet.part"):
        location = output.child("partitions", name)
        location.fs.pipe_file(location.path, b"")
    assert store.list_committed(output) == {1, 2}


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    output = Location(str(tmp_path))
    fill(output)
    (tmp_path / "partitions" / "00001.parquet").write_bytes(b"")
    with pytest.raises(DamageError, match="00001.parquet is damaged .*use fruitdask verify .* --repair"):
        list(store.read_outcomes(output, [1, 2]))
    (tmp_path / "features.zarr" / "features" / "zarr.json").write_text("{")
    with pytest.raises(DamageError, match="features.zarr is damaged .*verify .* --repair, and run again"):
        store.open_store(output)


@pytest.mark.parametrize("name", ["features", "status"])
def test_flipped_byte_of_a_chunk_is_one_sentence(tmp_path: Path, name: str) -> None:
    output = Location(str(tmp_path))
    features = fill(output)
    path = tmp_path / "features.zarr" / name / "c" / ("2/0" if name == "features" else "2")
    flip_byte(path, 5)
    array = store.open_store(output)[name]
    assert len(array[:4]) == 4
    with pytest.raises(DamageError, match=f"{path} is damaged .*checksum .*it is partition 2: use"):
        array[:]
    lazy = da.from_array(array, chunks=array.chunks, name=False)
    with pytest.raises(DamageError, match="it is partition 2"):
        lazy[np.array([0, 4])].compute(scheduler="threads")
    # A chunk that is written again is not read before, even though it is only partly filled.
    store.write_partition(output, index=2, start=4, features=features[4:], outcomes=make_outcomes(["ok"]))
    np.testing.assert_array_equal(store.open_store(output)["features"][:], features)


def test_read_arrays_notices_a_missing_chunk_of_zeros(tmp_path: Path) -> None:
    location = Location(str(tmp_path)).child("explore.zarr")
    store.write_arrays(location, {"rows": (np.zeros(1), ["row"])}, {})
    assert store.read_arrays(location)["rows"].tolist() == [0]
    (tmp_path / "explore.zarr" / "rows" / "c" / "0").unlink()
    with pytest.raises(DamageError, match="explore.zarr is damaged .chunks of rows are missing"):
        store.read_arrays(location)


def flip_byte(path: Path, place: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_clear_output_leaves_files_of_other_names(tmp_path: Path) -> None:
    output = Location(str(tmp_path))
    fill(output)
    (tmp_path / "figures").mkdir()
    for name in ("mine.png", "pca.png"):
        (tmp_path / "figures" / name).write_bytes(b"picture")
    store.clear_output(output)
    assert [path.name for path in tmp_path.rglob("*")] == ["figures", "mine.png"]


@pytest.mark.slow
@settings(max_examples=12)
@given(
    n_images=st.integers(1, 17),
    size=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    missing=st.sets(st.integers(0, 16), max_size=3),
)
def test_stage_rows_keeps_whole_partitions(
    tmp_path_factory: pytest.TempPathFactory, n_images: int, size: int, seed: int, missing: set[int]
) -> None:
    output, random = Location(str(tmp_path_factory.mktemp("out"))), np.random.default_rng(seed)
    features = random.normal(size=(n_images, 3)).astype(np.float32)
    statuses = [store.STATUSES[code] for code in random.integers(1, 4, n_images)]
    outcomes = make_outcomes(statuses)
    store.create_store(output, n_images=n_images, n_features=3, images_per_partition=size, attributes={"a": 1, "b": 2})
    for index in set(range(-(-n_images // size))) - missing:
        rows = slice(index * size, index * size + size)
        store.write_partition(
            output, index=index, start=rows.start, features=features[rows], outcomes=outcomes.iloc[rows]
        )
    store.write_catalog(output, outcomes[["path", "label", "bytes", "version"]])
    is_kept = random.random(n_images) < 0.7
    rows = np.flatnonzero(is_kept)
    store.stage_rows(output, is_kept, images_per_partition=size, attributes={"b": 3})
    staged = output.child("erasing")
    group = store.open_store(staged)
    assert (
        group is not None
        and {"a": 1, "b": 3}.items() <= dict(group.attrs).items()
        and group["features"].shape == (len(rows), 3)
    )
    wanted = {
        index
        for index in range(-(-len(rows) // size))
        if not missing & {row // size for row in rows[index * size : index * size + size]}
    }
    assert store.list_committed(staged) == wanted
    for index in wanted:
        chosen = rows[index * size : index * size + size]
        np.testing.assert_array_equal(group["features"][index * size : index * size + size], features[chosen])
        read = next(store.read_outcomes(staged, [index]))
        expected = outcomes.iloc[chosen].reset_index(drop=True)[list(store.OUTCOME_COLUMNS)]
        pd.testing.assert_frame_equal(read, expected)


def test_finish_erasing_resumes_where_it_was_interrupted(output: Location) -> None:
    fill(output)
    store.write_catalog(output, make_outcomes(["ok"] * 5)[["path", "label", "bytes", "version"]])
    for name in ("results.csv", "explore.parquet"):
        location = output.child(name)
        location.fs.pipe_file(location.path, b"names")
    store.stage_rows(output, np.isin(range(5), [2, 4]), images_per_partition=2, attributes={})
    store.finish_erasing(output)
    assert store.list_committed(output) == {1, 2} and not exists(output.child("erasing"))

    store.stage_rows(output, np.isin(range(5), [2, 4]), images_per_partition=2, attributes={})
    store.write_manifest(output, make_manifest(status="erasing"))
    # Some was deleted already, some copied.
    store.delete_result(output, "features.zarr/features/c/1")
    copied = output.child("partitions", "00000.parquet")
    copied.fs.pipe_file(copied.path, b"half")
    store.finish_erasing(output)
    group = store.open_store(output)
    assert group is not None
    np.testing.assert_array_equal(group["features"][:], [[6, 7, 8], [12, 13, 14]])
    assert [list(table["path"]) for table in store.read_outcomes(output, [0])] == [["a/0.jpg", "a/0.jpg"]]
    names = {path[len(output.path) + 1 :].split("/")[0] for path in output.fs.find(output.path)}
    assert names == {"catalog.parquet", "features.zarr", "manifest.json", "partitions"}
    manifest = store.read_run(output)
    assert manifest is not None and manifest.status == "erased"


def test_resized_store_keeps_its_rows_and_reads_partly_filled_partitions(output: Location) -> None:
    features = fill(output)
    for _ in range(2):
        store.resize_store(output, n_images=9, attributes={"class_names": ["a", "b"]})
    store.write_partition(
        output, index=3, start=6, features=features[2:4], outcomes=make_outcomes(["unreadable", "missing"])
    )
    group = store.open_store(output)
    assert group is not None and group["features"].shape == (9, 3) and group["status"].shape == (9,)
    assert group.attrs["class_names"] == ["a", "b"] and store.is_intact(dict(group.attrs))
    np.testing.assert_array_equal(group["features"][:5], features)
    assert np.isnan(group["features"][5]).all() and group["status"][5] == store.STATUSES.index("pending")
    (table,) = store.read_rows(output, [1, 2, 3], images_per_partition=2, columns=["status"])
    assert table["status"].to_dict() == {2: "ok", 3: "missing", 4: "ok", 6: "unreadable", 7: "missing"}


def test_partition_has_no_commit_mark_while_it_is_written_again(
    output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = fill(output)
    read = store.read_partition(output, index=1, start=2)
    assert read is not None and store.read_partition(output, index=0, start=0) is None
    np.testing.assert_array_equal(read[0], features[2:4])

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt("in this test")

    with monkeypatch.context() as patch:
        patch.setattr(store.arrays, "write_table", interrupt)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            store.write_partition(output, index=1, start=2, features=read[0], outcomes=read[1], is_committed=True)
    assert store.list_committed(output) == {2}


@pytest.mark.parametrize("n_rows", [0, 1, 3, 4, 10], ids=str)
def test_catalog_of_several_blocks_reads_back_as_pandas_reads_it(
    output: Location, monkeypatch: pytest.MonkeyPatch, n_rows: int
) -> None:
    monkeypatch.setattr(store.catalog_file, "ROWS_IN_MEMORY", 3)
    paths, labels = [f"{n}/ü.jpg" for n in range(n_rows)], [f"class {n // 2}" for n in range(n_rows)]
    columns = {"path": paths, "label": labels, "bytes": np.arange(n_rows), "version": -np.arange(n_rows)}
    catalog = pd.DataFrame(columns | {"split": ["train", "test"] * (n_rows // 2) + ["train"] * (n_rows % 2)})
    words = {"label": "category", "split": "category"}
    store.write_catalog(output, catalog.astype({"path": "str"} | words))
    read, blocks = store.read_catalog(output), list(store.read_catalog_blocks(output))
    assert read is not None and read[list(words)].dtypes.eq("category").all()
    assert read.astype(object).to_dict("list") == catalog.astype(object).to_dict("list")
    assert [len(block) for block in blocks] == [3] * (n_rows // 3) + [n_rows % 3] * (n_rows % 3 > 0 or not n_rows)
    assert [path for block in blocks for path in block["path"]] == paths
    is_kept = np.arange(n_rows) % 4 > 0
    kept = [path for block in store.read_catalog_blocks(output, is_kept) for path in block["path"]]
    assert kept == [path for n, path in enumerate(paths) if n % 4]
    data = io.BytesIO(output.fs.cat_file(output.child("catalog.parquet").path))
    assert pd.read_parquet(data).astype(object).to_dict("list") == catalog.astype(object).to_dict("list")


def test_catalog_reads_back_without_classes_that_are_gone(output: Location) -> None:
    assert store.read_catalog(output) is None
    catalog = pd.DataFrame(
        {"path": ["a/1.jpg", "secret/1.jpg"], "label": ["a", "secret"], "bytes": [1, 2], "version": [3, 4]}
    )
    store.write_catalog(output, catalog.astype({"label": "category"}).iloc[:1])
    read = store.read_catalog(output)
    assert read is not None
    pd.testing.assert_frame_equal(read, catalog.iloc[:1].astype({"label": "category"}))
    data = output.fs.cat_file(output.child("catalog.parquet").path)
    assert b"secret" not in data and b"a/1.jpg" in data
