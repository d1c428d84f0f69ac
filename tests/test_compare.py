"""Comparison with a Spark job: Parquet folders that PySpark wrote (tests/data/write_spark.py), compared with a run."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from runs import Finish, break_image, compute_colours, configure, draw

import fruitdask
from fruitdask.analysis.comparison import align_scores, compare_vectors, judge_features, judge_scores, match_paths
from fruitdask.cli import cli
from fruitdask.core.config import ModelConfig
from fruitdask.errors import CatalogError, ConfigError, DamageError, StorageError
from fruitdask.pipeline import compare as compare_module

SPARK = Path(__file__).parent / "data" / "spark"
#: The images whose features Spark has.
NAMES = [f"{label}/{number} a.png" for label in ("apple", "pear", "quince") for number in range(8)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images whose features Spark has; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("drawn") / "in"
    draw(folder, *NAMES)
    return folder


@pytest.fixture
def result(drawn: Path, tiny_model: ModelConfig, finish: Finish, tmp_path: Path) -> fruitdask.RunResult:
    """A finished run on a copy of them."""
    shutil.copytree(drawn, tmp_path / "in")
    return finish(configure(tmp_path / "in", tmp_path / "out", tiny_model, reduce={"n_components": 2}))


def write(folder: Path, paths: list[str | None], **columns: Any) -> str:
    """Write a Parquet folder of two files."""
    table = pa.table({"path": paths, **columns})
    folder.mkdir()
    for number, rows in enumerate((table.slice(0, 3), table.slice(3))):
        pq.write_table(rows, folder / f"part-0000{number}.snappy.parquet")
    return str(folder)


def test_arrays_of_spark_agree(result: fruitdask.RunResult) -> None:
    found = fruitdask.compare(result, str(SPARK / "arrays"))
    assert found.agrees and found.verdict.startswith("Features agree: all 24 images")
    assert found.counts == {"compared": 24, "duplicate": 0} and (found.n_features, found.n_spark_features) == (6, 6)
    assert found.table["path"].tolist() == NAMES and found.components.empty
    assert found.table["spark_path"][9] == "file:///data/photos/pear/1%20a.png"
    assert found.table["cosine"].min() > 1 - 1e-5 and found.table["relative_error"].max() < 1e-5


def test_vectors_and_scores_of_spark_agree(result: fruitdask.RunResult) -> None:
    found = fruitdask.compare(result.output.url, str(SPARK / "vectors"))
    assert found.agrees and found.verdict.endswith("scores of 2 components agree once signs and offsets are removed.")
    assert found.table["cosine"].min() > 1 - 1e-5 and found.table["score_error"].max() < 1e-5
    # Spark's components come from the same covariance, but the mean is not subtracted from the features.
    table = pd.read_parquet(SPARK / "vectors")
    spark = np.stack([row["values"] for row in table["pcaFeatures"]])
    rows = [NAMES.index(path.removeprefix("dbfs:/mnt/photos/")) for path in table["path"]]
    ours = result.table[["pca_1", "pca_2"]].to_numpy(np.float64)[rows]
    signs = np.sign([np.corrcoef(ours[:, k], spark[:, k])[0, 1] for k in range(2)])
    np.testing.assert_array_equal(found.components["sign"], signs)
    np.testing.assert_allclose(found.components["offset"], (spark - signs * ours).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.components["offset"], found.components["expected_offset"], rtol=1e-5)
    assert (found.components["correlation"] > 1 - 1e-9).all() and abs(found.components["offset"]).max() > 100


def test_small_blocks_give_the_same(result: fruitdask.RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fruitdask.compare(result, str(SPARK / "vectors")).table
    monkeypatch.setattr(compare_module, "_BLOCK_BYTES", 5 * 6 * 8)
    pd.testing.assert_frame_equal(fruitdask.compare(result, str(SPARK / "vectors")).table, expected)


def test_export_for_spark_agrees(result: fruitdask.RunResult, tmp_path: Path) -> None:
    fruitdask.export(result, tmp_path / "spark", "spark")
    found = fruitdask.compare(result, str(tmp_path / "spark"))
    assert found.agrees and found.table["relative_error"].max() == 0


@pytest.mark.parametrize(
    "prefix", ["file:/", "file:///data/", "s3a://bucket/x/", "s3://bucket/", "dbfs:/mnt/", "/dbfs/mnt/", ""]
)
def test_match_paths_whatever_the_prefix(prefix: str) -> None:
    ours = ["apple/1 ä.jpg", "apple/50%20.jpg", "pear/1 ä.jpg", "1.jpg"]
    theirs = ["pear/1%20%C3%A4.jpg", "apple/50%20.jpg", "apple/1 ä.jpg", "plum/1 ä.jpg"]
    assert match_paths(ours, [prefix + path for path in theirs]).tolist() == [2, 1, 0, -1]


def test_match_paths_by_the_longest_common_ending() -> None:
    # The name of the input's folder selects the data set; if no folder has that name, paths stay ambiguous.
    theirs = ["s3://b/Test/a/1.jpg", "s3://b/Training/a/1.jpg"]
    assert match_paths(["a/1.jpg"], theirs, root="/data/Test").tolist() == [0, -1]
    assert match_paths(["a/1.jpg"], theirs, root="/data/photos").tolist() == [-2, -2]
    # Spark's paths may be the shorter ones.
    assert match_paths(["x/a/1.jpg", "x/b/1.jpg"], ["b/1.jpg", "1.jpg"]).tolist() == [1, -2]
    # If neither path ends with the other, a common folder and file are enough, but only a common file is not.
    assert match_paths(["x/a/1.jpg", "x/b/1.jpg"], ["s3://y/b/1.jpg", "s3://y/c/1.jpg"]).tolist() == [1, -1]
    assert match_paths(["a/1.jpg"], ["/data/b/1.jpg"]).tolist() == [-1]
    assert match_paths([], ["a.jpg"]).tolist() == [-1] and match_paths(["a.jpg"], []).tolist() == []


def test_compare_vectors_by_closed_form() -> None:
    ours = np.array([[3.0, 4], [1, 0], [0, 0], [0, 0], [np.nan, 1]], np.float32)
    theirs = np.array([[6.0, 8], [0, 1], [0, 0], [0, 2], [1, 1]])
    cosines, errors = compare_vectors(ours, theirs)
    np.testing.assert_allclose(cosines, [1, 0, 1, 0, np.nan])
    np.testing.assert_allclose(errors, [0.5, 2**0.5, 0, 1, np.nan])


def test_scores_that_are_all_the_same_do_not_agree() -> None:
    ours = np.random.default_rng(0).normal(size=(50, 2))
    aligned = align_scores(ours, np.full((50, 2), 3.0))
    np.testing.assert_allclose(aligned.errors, 1)
    components = pd.DataFrame({"component": [1, 2], "relative_error": aligned.errors})
    assert not judge_scores(components)[0]


@pytest.mark.parametrize(
    ("n_left", "text"), [(0, "all 4 images have"), (3, "4 of 7 images could be compared and have")], ids=["all", "some"]
)
def test_judge_features_says_how_many_images_it_compares(n_left: int, text: str) -> None:
    status = ["compared"] * 4 + ["only_run"] * n_left
    numbers = {"cosine": 1.0, "relative_error": 0.0, "path": "x"}
    agrees, verdict = judge_features(pd.DataFrame({"status": status}).assign(**numbers))
    assert agrees and verdict.startswith(f"Features agree: {text} a cosine of 1")


def test_align_scores_finds_signs_and_offsets() -> None:
    ours = np.random.default_rng(0).normal(size=(50, 3))
    aligned = align_scores(ours, ours * [1, -1, 1] + [5, -7, 0] + np.eye(50, 3) * [0, 0, 3])
    assert aligned.signs.tolist() == [1, -1, 1]
    np.testing.assert_allclose(aligned.correlations[:2], 1)
    assert aligned.correlations[2] < 0.95 and aligned.errors[2] > 0.1 and aligned.errors[:2].max() < 1e-12
    np.testing.assert_allclose(aligned.offsets[:2], [5, -7], atol=1e-12)
    assert aligned.image_errors.argmax() == 2


def test_images_missing_on_one_side_are_counted(tiny_model: ModelConfig, finish: Finish, tmp_path: Path) -> None:
    names = [f"fig/{number}.png" for number in range(8)]
    draw(tmp_path / "in", *names)
    features = compute_colours(tmp_path / "in", names)
    break_image(tmp_path / "in" / "fig" / "2.png")
    result = finish(configure(tmp_path / "in", tmp_path / "out", tiny_model, featurize={"max_failed_fraction": 1}))
    features[3] = 0
    rows = [*features[:7].tolist(), None, [1.0] * 6, [1.0] * 6, features[0].tolist()]
    rows[4] = [1.0, 2.0]
    paths = [f"s3a://bucket/{name}" for name in names[:7]]
    given = [
        *paths,
        None,
        "s3a://bucket/fig/9.png",
        "s3://bucket/fig/fig/6.png",
        paths[0],
    ]
    # Both s3a://bucket/fig/6.png and s3://bucket/fig/fig/6.png end with fig/6.png.
    found = fruitdask.compare(result, write(tmp_path / "spark", given, features=pa.array(rows, pa.list_(pa.float64()))))
    status = dict(zip(found.table["path"], found.table["status"], strict=True))
    assert [status[name] for name in names] == [
        "compared", "compared", "failed", "empty", "empty", "compared", "only_run", "only_run",
    ]  # fmt: skip
    assert found.counts["ambiguous"] == 2 and found.counts["only_spark"] == 2 and found.counts["duplicate"] == 1
    assert found.agrees and found.table["cosine"].notna().sum() == 3


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda rows: rows * 2, "Features point the same way"),
        (lambda rows: rows + np.where(np.arange(24) < 2, 50, 0)[:, None] * [1, 0, 0, 0, 0, 0], "Features of 2 of 24"),
        (
            lambda rows: rows * (1 + 0.05 * np.random.default_rng(0).normal(size=rows.shape)),
            "Features are close .* resizing",
        ),
        (lambda rows: np.random.default_rng(0).normal(size=rows.shape), "Features differ .* BGR"),
        (lambda rows: np.tile(rows, 8), "widths differ, 6 features per image in the run and 48 in Spark.*pooling"),
        (lambda rows: rows * 0, "Nothing could be compared"),
    ],
    ids=["scaled", "two images", "resized", "another network", "wide", "zeros"],
)
def test_verdict_names_likely_causes(result: fruitdask.RunResult, tmp_path: Path, change: Any, expected: str) -> None:
    rows = change(compute_colours(tmp_path / "in", NAMES))
    folder = write(tmp_path / "spark", list(NAMES), features=pa.array(rows.tolist(), pa.list_(pa.float32())))
    done = CliRunner().invoke(cli, ["compare", result.output.url, folder])
    assert done.exit_code == 1, done.output
    found = fruitdask.compare(result, folder)
    assert not found.agrees and pd.Series([found.verdict]).str.contains(expected).all(), found.verdict


def test_scores_of_another_pca_do_not_agree(result: fruitdask.RunResult, tmp_path: Path) -> None:
    scores = result.table[["pca_1", "pca_2"]].to_numpy(np.float64, copy=True)
    scores[:, 1] = np.random.default_rng(0).normal(size=24)
    folder = write(tmp_path / "spark", list(NAMES), pca_features=pa.array(scores.tolist()))
    found = fruitdask.compare(result, folder)
    assert not found.agrees and found.verdict.startswith("Scores do not agree on components 2 ")
    assert found.components["offset"][0] == pytest.approx(0, abs=1e-6) and found.counts["matched"] == 24


def test_folders_that_cannot_be_compared(result: fruitdask.RunResult, tmp_path: Path) -> None:
    folder = tmp_path / "spark"
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    with pytest.raises(CatalogError, match="expected Parquet files, .*, found only _SUCCESS; check"):
        fruitdask.compare(result, str(folder))
    (folder / "photo.jpg").touch()
    with pytest.raises(CatalogError, match="found only _SUCCESS, photo.jpg"):
        fruitdask.compare(result, str(folder))
    with pytest.raises((CatalogError, StorageError), match="nope"):
        fruitdask.compare(result, str(tmp_path / "nope"))
    other = write(tmp_path / "other", ["a"] * 4, features=pa.array([[1.0]] * 4), word=["x"] * 4)
    with pytest.raises(ConfigError, match="the column image, found path, features, word; name one with"):
        fruitdask.compare(result, other, path_column="image")
    with pytest.raises(ConfigError, match="Spark ML vector in the column word, found string; name"):
        fruitdask.compare(result, other, features_column="word")
    bare = write(tmp_path / "bare", ["a"] * 4)
    with pytest.raises(ConfigError, match="a column of features .*, found path; name .*--features-col"):
        fruitdask.compare(result, bare)
    with pytest.raises(CatalogError, match="expected rows, found Parquet files without any"):
        fruitdask.compare(result, write(tmp_path / "empty", [], features=pa.array([], pa.list_(pa.float32()))))
    found = fruitdask.compare(result, other)
    assert not found.agrees and found.verdict.startswith(
        "No image could be matched: the run has apple/0 a.png, Spark a;"
    )


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "overwritten"])
def test_damaged_folder_is_one_sentence(result: fruitdask.RunResult, tmp_path: Path, is_cut: bool) -> None:
    shutil.copytree(SPARK / "vectors", tmp_path / "spark")
    part = sorted((tmp_path / "spark").glob("part-*.parquet"))[1]
    data = part.read_bytes()
    part.write_bytes(data[: len(data) // 2] if is_cut else data[:4] + b"\xff" * 2000 + data[2004:])
    with pytest.raises(DamageError, match=f"{part.name} is damaged .*; let the Spark job write it again"):
        fruitdask.compare(result, str(tmp_path / "spark"))


def test_compares_on_s3(result: fruitdask.RunResult, s3_bucket: tuple[str, dict[str, Any]], s3_client: Any) -> None:
    bucket, options = s3_bucket
    for path in sorted((SPARK / "arrays").rglob("*")):
        if path.is_file():
            s3_client.upload_file(str(path), bucket, f"job/{path.relative_to(SPARK)}")
    found = fruitdask.compare(result, f"s3a://{bucket}/job/arrays", parquet_options=options)
    assert found.agrees and found.counts["compared"] == 24


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_command_prints_and_writes(result: fruitdask.RunResult, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"table.{ending}"
    done = CliRunner().invoke(cli, ["compare", result.output.url, str(SPARK / "vectors"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "24 images" in done.stdout and "mean @ component" in done.stdout and "Features agree" in done.stdout
    table = pd.read_csv(out) if ending == "csv" else pd.read_parquet(out)
    assert table["path"].tolist() == NAMES and (table["status"] == "compared").all() and table["cosine"].min() > 0.99999
    done = CliRunner().invoke(cli, ["compare", result.output.url, str(SPARK / "vectors"), "--out", "table.xls"])
    assert done.exit_code == 2 and "ends with .csv or .parquet" in done.output
