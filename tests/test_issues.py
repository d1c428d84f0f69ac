"""Photographs to check: planted faults are found, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, strategies as st
from PIL import Image, ImageFilter
from runs import OFF, ON, Finish, configure
from scipy.spatial.distance import cdist

import fruitdask
from fruitdask.analysis import issues
from fruitdask.cli import cli
from fruitdask.core.config import ModelConfig
from fruitdask.core.sample import draw_sample
from fruitdask.core.storage import Location
from fruitdask.errors import OutputError
from fruitdask.pipeline import check as check_module

KINDS = list(issues.KINDS)


def draw_clusters(n_images: int, *, n_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw features of well separated classes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, n_classes, n_images)
    centres = rng.normal(0, 1, (n_classes, 16))
    return (centres[codes] + rng.normal(0, 0.2, (n_images, 16))).astype(np.float32), codes


def vote(features: np.ndarray, codes: np.ndarray, groups: np.ndarray | None = None, **settings: Any) -> issues.Votes:
    rows = np.arange(len(codes))
    reference = issues.Reference.build(features, rows, codes, groups, n_classes=int(codes.max()) + 1)
    return issues.collect_votes(features, rows, codes, groups, reference, **{"n_neighbors": 7} | settings)


@pytest.mark.parametrize("size", [1 << 22, 50], ids=["at once", "row by row"])
def test_votes_equal_a_plain_loop(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issues, "_SIMILARITIES_AT_ONCE", size)
    features, codes = draw_clusters(90, n_classes=4)
    # One class is smaller than the number of neighbours.
    codes[codes == 3] = 2
    codes[:4] = 3
    groups = np.random.default_rng(1).integers(0, 12, 90)
    found = vote(features, codes, groups)
    distances = cdist(features.astype(np.float64), features.astype(np.float64), "cosine")
    for row in range(90):
        others = np.delete(np.argsort(distances[row]), 0)
        others = others[: min(7, (codes == codes[row]).sum() - 1)]
        counts = np.bincount(codes[others], minlength=4)
        assert counts[found.codes[row]] == counts.max()
        assert found.shares[row] == pytest.approx(counts.max() / len(others))
        assert found.own_shares[row] == pytest.approx(counts[codes[row]] / len(others))
        assert found.nearest[row] == next(other for other in others if codes[other] == found.codes[row])
        outside = [other for other in np.argsort(distances[row]) if groups[other] != groups[row]]
        n_own = sum(codes[other] == codes[row] for other in outside)
        outside = outside[: min(7, n_own)]
        share = np.mean([codes[other] == found.codes[row] for other in outside]) if outside else np.nan
        assert found.group_shares[row] == pytest.approx(share, nan_ok=True)
    means = np.stack(
        [(features / np.linalg.norm(features, axis=1, keepdims=True))[codes == code].mean(axis=0) for code in range(4)]
    )
    expected = np.diag(cdist(features, means[codes], "cosine"))
    np.testing.assert_allclose(found.distances, expected, atol=1e-6)


def test_flipped_labels_are_found_and_no_others() -> None:
    features, codes = draw_clusters(400, n_classes=5)
    assert not np.isfinite(issues.find_label_issues(vote(features, codes), codes)).any()
    flipped = np.random.default_rng(1).choice(400, 20, replace=False)
    wrong = codes.copy()
    wrong[flipped] = (codes[flipped] + 1) % 5
    votes = vote(features, wrong, n_neighbors=15)
    scores = issues.find_label_issues(votes, wrong)
    assert set(np.flatnonzero(np.isfinite(scores))) == set(flipped)
    assert (votes.codes[flipped] == codes[flipped]).all() and (scores[flipped] <= 1).all()


@pytest.mark.parametrize("n_each", [2, 3, 5, 20])
def test_right_labels_of_small_classes_are_not_doubted(n_each: int) -> None:
    # Classes overlap so much that a third of the images have a nearest neighbour of another class.
    rng, codes = np.random.default_rng(0), np.repeat(np.arange(60), n_each)
    features = (rng.normal(0, 1, (60, 32))[codes] + rng.normal(0, 1, (len(codes), 32))).astype(np.float32)
    distances = cdist(features, features, "cosine")
    np.fill_diagonal(distances, np.inf)
    assert 0.5 < (codes[distances.argmin(axis=1)] == codes).mean() < 1
    doubted = np.isfinite(issues.find_label_issues(vote(features, codes, n_neighbors=10), codes))
    assert doubted.mean() < 0.01


@pytest.mark.parametrize("exponent", [-100, 80])
def test_votes_do_not_depend_on_the_scale_of_features(exponent: int) -> None:
    features, codes = draw_clusters(90, n_classes=4)
    expected, found = vote(features, codes), vote(np.ldexp(features, exponent), codes)
    for name in ("codes", "shares", "own_shares", "nearest", "distances"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_many_copies_of_one_picture_do_not_vote() -> None:
    features, codes = draw_clusters(200, n_classes=5)
    # Like "photograph not available": twenty copies in each class.
    features[:100], codes[:100] = features[0], np.repeat(range(5), 20)
    votes = vote(features, codes)
    assert not set(range(100)) & set(votes.nearest[:100])
    suggested = votes.codes[:100][np.isfinite(issues.find_label_issues(votes, codes)[:100])]
    # All copies share the same neighbours, of one class; it is not the class of the copies listed first.
    (nearest,) = set(votes.codes[:100])
    assert set(suggested) <= {nearest} and nearest == np.bincount(codes[votes.nearest[:100]]).argmax()


@pytest.mark.parametrize("n_images", [1, 2, 3])
def test_few_images_have_no_wrong_labels(n_images: int) -> None:
    features, codes = draw_clusters(3, n_classes=3)
    votes = vote(features[:n_images], np.arange(n_images))
    # Each image is the only one of its class, so no other can vote for it.
    assert (votes.codes == -1).all() and not np.isfinite(issues.find_label_issues(votes, np.arange(n_images))).any()


@given(
    rows=st.lists(st.tuples(st.sampled_from([0, 1, 5]), st.none() | st.floats(-9, 9)), max_size=60),
    floor=st.sampled_from([0.5, 2.0]),
)
def test_deviations_are_those_of_pandas(rows: list[tuple[int, float | None]], floor: float) -> None:
    table = pd.DataFrame(rows, columns=["code", "value"]).astype({"code": np.int64, "value": np.float64})
    deviations = table["value"] - table.groupby("code")["value"].transform("median")
    spread = deviations.abs().groupby(table["code"]).transform("median")
    is_small = deviations.groupby(table["code"]).transform("count") < 10
    expected = deviations / (spread.where(~is_small, deviations.abs().median()) / 0.6745).clip(lower=floor)
    found = issues.measure_deviations(table["value"].to_numpy(), table["code"].to_numpy(), floor=floor)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_deviations_are_those_from_the_median_of_the_class() -> None:
    rng = np.random.default_rng(0)
    values, codes = rng.normal([[10.0], [50.0]], [[1.0], [4.0]], (2, 5000)).ravel(), np.repeat([0, 1], 5000)
    found = issues.measure_deviations(values, codes, floor=0.0)
    # For a normal distribution they are standard scores.
    expected = (values - np.repeat([10, 50], 5000)) / np.repeat([1, 4], 5000)
    np.testing.assert_allclose(found, expected, atol=0.2)
    # A class of a few images uses the spread of all images.
    few = issues.measure_deviations(np.append(values, [100.0, 100.0, 160.0]), np.append(codes, [2, 2, 2]), floor=0.0)
    assert few[-2] == 0 and few[-1] == pytest.approx(
        60 / (np.median(np.abs(expected * np.repeat([1, 4], 5000))) / 0.6745), rel=0.05
    )


def test_near_duplicates_agree_in_hash_and_colour_and_are_in_different_parts() -> None:
    rows = [
        ("00000000000000ff", (100, 50, 20), "a", 0),
        ("00000000000000fe", (102, 50, 24), "b", 1),  # near the first
        ("00000000000000fe", (200, 50, 24), "c", 1),  # another colour
        ("00000000000000fd", (100, 50, 20), "d", 0),  # the same part as the first, and near the second
        ("ffffffffffffffff", (100, 50, 20), "e", 1),  # another hash
        ("00000000000000ff", (100, 50, 20), "a", 1),  # a copy of the first
    ]
    table = pd.DataFrame(rows, columns=["perceptual_hash", "colour", "content_hash", "part"])
    colours = pd.DataFrame(table.pop("colour").tolist(), columns=["mean_red", "mean_green", "mean_blue"])
    parts = table.pop("part").to_numpy()
    hashes = table.pop("perceptual_hash")
    found_in_files = {
        "perceptual_hash": [np.uint64(int(text, 16)) for text in hashes],
        # Only the first and its copy are equal files.
        "duplicate_group": np.where(table.pop("content_hash") == "a", 0, -1),
        "part": parts,
    }
    pairs = issues.find_near_pairs(colours.assign(**found_in_files), max_bits=2)
    found = {frozenset(pair) for pair in pairs.T.tolist()}
    assert found == {frozenset(pair) for pair in ((0, 1), (1, 3), (3, 5))}
    assert pairs.dtype == np.int64


def test_scores_of_pairs_follow_the_distance_of_their_features() -> None:
    first = np.array([[1, 0], [1, 0], [1, 0]], np.float32)
    second = np.array([[2, 0], [1, 0.2], [0, 1]], np.float32)
    scores = issues.measure_pairs(first, second)
    assert scores[0] == pytest.approx(1) and 0.5 < scores[1] < 1 and np.isnan(scores[2])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data set in which one image of each kind of fault is planted."""
    folder = tmp_path_factory.mktemp("planted") / "fruits"
    draw_sample(folder, per_class=14, size_px=64)

    def edit(name: str, change: Any) -> None:
        with Image.open(folder / "pear_1" / f"r0_{name}.jpg") as image:
            change(image.convert("RGB")).save(folder / "pear_1" / f"r0_{name}.jpg", quality=95)

    shutil.move(folder / "tomato_1" / "r0_3.jpg", folder / "cucumber_3" / "wrong.jpg")
    shutil.copy(folder / "tomato_1" / "r0_4.jpg", folder / "tomato_1" / "copy.jpg")
    edit("1", lambda image: image.filter(ImageFilter.GaussianBlur(6)))
    edit("2", lambda image: image.point(lambda level: level * 0.2))
    edit("3", lambda image: Image.new("RGB", image.size, (240, 240, 240)))
    edit("4", lambda image: image.resize((400, 400)))
    edit("5", lambda image: image.crop((0, 20, 64, 40)))
    return folder


@pytest.fixture(scope="module")
def checked(planted: Path, tiny_model: ModelConfig, finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run on it, with a page."""
    output = tmp_path_factory.mktemp("checked") / "out"
    finish(
        configure(
            planted, output, tiny_model, explore=ON, check=ON, report=ON, input={"split_from": r"/(r0|copy|wrong)"}
        )
    )
    return output


def test_a_run_finds_what_was_planted(checked: Path) -> None:
    found = fruitdask.check(str(checked))
    assert list(found.columns) == list(issues.COLUMNS)
    by_kind = {kind: set(rows["path"]) for kind, rows in found.groupby("kind")}
    assert by_kind["label"] >= {"cucumber_3/wrong.jpg"}
    assert by_kind["copy"] == {"tomato_1/r0_4.jpg"}
    assert by_kind["blurry"] >= {"pear_1/r0_1.jpg"} and "pear_1/r0_2.jpg" in by_kind["dark"]
    assert "pear_1/r0_3.jpg" in by_kind["uniform"] and by_kind["size"] >= {"pear_1/r0_4.jpg"}
    assert by_kind["shape"] == {"pear_1/r0_5.jpg"}
    wrong = found[(found["path"] == "cucumber_3/wrong.jpg") & (found["kind"] == "label")].iloc[0]
    assert wrong["suggestion"] == "tomato_1" and wrong["other"].startswith("tomato_1/") and wrong["score"] >= 0.5
    copy = found[found["kind"] == "copy"].iloc[0]
    # It is in another split.
    assert (copy["other"], copy["score"]) == ("tomato_1/copy.jpg", 1)
    assert found["score"].between(0, 1).all() and list(found["kind"]) == sorted(found["kind"], key=KINDS.index)
    # Most images are fine.
    assert found["path"].nunique() <= 12
    assert pd.read_csv(checked / "issues.csv")["path"].tolist() == found["path"].tolist()


def test_the_command_lists_issues_and_the_page_begins_with_them(checked: Path) -> None:
    listed = CliRunner().invoke(cli, ["check", str(checked), "--kind", "label", "--kind", "copy"])
    assert listed.exit_code == 0, listed.output
    assert "cucumber_3/wrong.jpg  probably tomato_1  like tomato_1/" in listed.output and "dark" not in listed.output
    first = CliRunner().invoke(cli, ["check", str(checked), "-n", "1"]).output.splitlines()
    assert len(first) == 2 and first[1].startswith("... and ")
    wrong = CliRunner().invoke(cli, ["check", str(checked), "--kind", "ugly"])
    assert wrong.exit_code == 2 and "'ugly' is not one of label, copy, near_duplicate" in wrong.output
    page = (checked / "report.html").read_text()
    assert page.index("Photographs to check") < page.index('id="data-heading"')
    assert 'download="issues.csv"' in page and "cucumber_3/wrong.jpg" in page


@pytest.mark.slow
def test_a_check_that_was_left_out_is_done_later(
    planted: Path,
    tiny_model: ModelConfig,
    finish: Finish,
    checked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In graphs of two partitions, not all at once as in the run.
    monkeypatch.setattr(check_module, "BLOCK_BYTES", 1)
    monkeypatch.setattr(check_module, "_ROWS_AT_ONCE", 10)
    config = configure(
        planted,
        tmp_path / "out",
        tiny_model,
        explore=ON,
        input={"split_from": r"/(r0|copy|wrong)"},
    )
    result = finish(config)
    assert result.issues is None and not (tmp_path / "out" / "issues.csv").exists()
    pd.testing.assert_frame_equal(fruitdask.check(str(tmp_path / "out")), fruitdask.check(str(checked)))
    assert fruitdask.verify(str(tmp_path / "out")).is_well


def test_without_an_exploration_features_alone_are_checked(
    planted: Path, tiny_model: ModelConfig, finish: Finish, tmp_path: Path
) -> None:
    found = finish(configure(planted, tmp_path / "out", tiny_model, check=ON)).issues
    assert found is not None and set(found["kind"]) <= {"label", "outlier"} and len(found)


def test_check_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected the results of a run, found none; check the folder"):
        fruitdask.check(str(tmp_path / "nothing"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["issues.parquet", "issues.csv"])
def test_a_damaged_list_is_a_fault_and_is_written_again(
    name: str, planted: Path, tiny_model: ModelConfig, finish: Finish, tmp_path: Path
) -> None:
    config = configure(planted, tmp_path / "out", tiny_model, check=ON)
    expected = finish(config).issues
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:-40])
    assert [fault.where for fault in fruitdask.verify(str(tmp_path / "out"), repair=True).faults] == [name]
    result = fruitdask.run(config)
    assert result.n_computed == 0 and fruitdask.verify(str(tmp_path / "out")).is_well
    pd.testing.assert_frame_equal(result.issues, expected)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["issues"]["by_kind"]


def test_findings_of_an_exploration_are_aligned_with_the_rows_of_a_store(sample_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sample_folder, tmp_path / "in"))
    for path in sorted(folder.rglob("*.jpg"))[::5]:
        shutil.copy(path, path.with_stem(f"{path.stem}_copy"))
    tree = {"input": {"url": str(folder)}, "output": {"url": f"{tmp_path}/out"}, "explore": {"input_px": 32}}
    images = fruitdask.explore(fruitdask.load_config(tree | dict.fromkeys(("plots", "report"), OFF))).images
    # After the input has grown, rows of a store have another order, and some are of images that have vanished.
    order = np.random.default_rng(0).permutation(len(images))
    paths = pd.concat([images["path"].iloc[order], pd.Series(["gone.jpg"])], ignore_index=True)
    for rows, names in ((np.arange(len(images)), images["path"]), (order, paths)):
        is_ok = np.arange(len(names)) != 3
        findings = check_module._Findings(Location(f"{tmp_path}/out"), names, is_ok)
        found = findings.read("width_px", "mean_red", "sharpness")
        expected = images[list(found)].iloc[rows].to_numpy(np.float64, na_value=np.nan)
        np.testing.assert_allclose(found.iloc[: len(rows)], np.where(is_ok[: len(rows), np.newaxis], expected, np.nan))
        assert found.iloc[len(rows) :].isna().all(axis=None)
        alike = images.iloc[rows].reset_index(drop=True)[["perceptual_hash", "near_duplicate_group"]]
        alike = alike[alike["near_duplicate_group"].notna() & is_ok[: len(rows)]]
        near = findings.read_near_duplicates()
        assert len(near) > 1 and near.index.tolist() == alike.index.tolist()
        assert near["perceptual_hash"].tolist() == [int(text, 16) for text in alike["perceptual_hash"]]
