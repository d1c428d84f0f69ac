"""Exploration, compared with brute force, Pillow and published figures."""

import io
import itertools
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from PIL import Image, UnidentifiedImageError
from runs import OFF

import fruitdask
from fruitdask import store
from fruitdask.analysis import exploration as exploration_module
from fruitdask.analysis.duplicates import group_duplicates, group_near_duplicates
from fruitdask.analysis.exploration import _describe_distances
from fruitdask.core.config import Config, load_config
from fruitdask.core.partition import ClassBlock
from fruitdask.core.progress import RunProgress
from fruitdask.core.sample import draw_sample
from fruitdask.core.storage import Location
from fruitdask.errors import DamageError, PartitionError, StoreMismatchError
from fruitdask.pipeline import explore as explore_module
from fruitdask.pipeline.explore import ImageExploration
from fruitdask.pipeline.inputs import prepare_inputs
from fruitdask.store.exploration import Exploration, read_exploration
from fruitdask.worker.sums import ClassSums, find_background, mean_squared_difference

#: Published for the same photographs (Fruits-360, original size): the "average MSE" between the images of a class.
PUBLISHED = {
    "apple_hit_1": 0.1635,
    "apple_red_1": 0.1619,
    "apple_red_2": 0.1590,
    "apple_red_3": 0.1789,
    "apple_rotten_1": 0.1927,
}


def run_here(
    client: Any, function: Any, pieces: Any, *, delivered: Any, on_result: Callable[[Any], None], probe: Any = None
) -> None:
    """Run tasks in this process, the last ones first, on copies, as on a cluster."""
    for piece in reversed(list(pieces)):
        on_result(pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps((piece, delivered)))))))


def explore_here(
    folder: Path,
    output: Path,
    *,
    images_per_partition: int = 5,
    px: int = 32,
    labels: Sequence[str] | None = None,
    **settings: Any,
) -> Exploration:
    """Explore a folder without a cluster, its images in the order of their paths, with other labels if given."""
    tree = {"input": {"url": str(folder)}, "output": {"url": str(output)}, "explore": {"input_px": px} | settings}
    if labels is not None:
        table = folder.parent / f"{output.name}.csv"
        pd.DataFrame({"path": list_paths(folder), "label": labels}).to_csv(table, index=False)
        tree["input"] |= {"manifest": str(table)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore_module, "map_partitions", run_here)
        patch.setattr(explore_module, "describe_workers", lambda client: {})
        inputs = prepare_inputs(load_config(tree), RunProgress())
        ImageExploration(inputs, images_per_partition=images_per_partition).complete(None, RunProgress())
    found = read_exploration(Location(str(output)))
    assert found is not None
    return found


def list_paths(folder: Path) -> list[str]:
    """List the images of a folder in the order of their paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_pixels(paths: list[Path], px: int) -> np.ndarray:
    """Read images using only Pillow, as float64 on the scale of -1 to 1."""
    images = [Image.open(path).convert("RGB").resize((px, px), Image.Resampling.BICUBIC) for path in paths]
    return np.stack([np.asarray(image, np.float64) for image in images]) / 127.5 - 1


def compare_all_pairs(pixels: np.ndarray) -> np.ndarray:
    """Compute the mean squared difference of each pair, one after the other."""
    return np.array([np.mean((first - second) ** 2) for first, second in itertools.combinations(pixels, 2)])


@pytest.mark.parametrize("images_per_partition", [1, 3, 7, 100])
def test_differences_equal_brute_force_whatever_the_partitions(tmp_path: Path, images_per_partition: int) -> None:
    folder = tmp_path / "in"
    draw_sample(folder, per_class=5, size_px=64)
    found = explore_here(folder, tmp_path / "out", images_per_partition=images_per_partition, thumbnail_px=32)
    for label, row in found.classes.iterrows():
        paths = sorted((folder / str(label)).iterdir())
        pixels = read_pixels(paths, 32)
        pairs = compare_all_pairs(pixels)
        assert row["mean_squared_difference"] == pytest.approx(pairs.mean(), rel=1e-9)
        # Thumbnails of the same size as the input are the input: distances and quantiles are exact as well.
        np.testing.assert_allclose(
            row[["pair_q05", "pair_q50", "pair_q95"]].astype(float), np.quantile(pairs, [0.05, 0.5, 0.95]), rtol=1e-6
        )
        distances = ((pixels - pixels.mean(axis=0)) ** 2).mean(axis=(1, 2, 3))
        images = found.images[found.images["label"] == label]
        np.testing.assert_allclose(images["distance_to_mean"], distances, rtol=1e-5)
        assert row["most_typical"] == f"{label}/{paths[distances.argmin()].name}"
        assert row["least_typical"] == f"{label}/{paths[distances.argmax()].name}"


@given(
    st.integers(2, 6).flatmap(lambda n: st.lists(st.binary(min_size=12, max_size=12), min_size=n, max_size=n)),
    st.integers(1, 5),
)
def test_mean_squared_difference_is_the_mean_over_all_pairs(images: list[bytes], n_first: int) -> None:
    pixels = np.frombuffer(b"".join(images), np.uint8).reshape(-1, 2, 2, 3)
    sums = ClassSums.measure(pixels[:n_first], pixels[:n_first])
    sums.add(ClassSums.measure(pixels[n_first:], pixels[n_first:]))
    expected = compare_all_pairs(pixels.astype(np.float64)).mean()
    assert mean_squared_difference(sums, scale="bytes") == pytest.approx(expected, rel=1e-12)
    assert mean_squared_difference(sums, scale="unit") == pytest.approx(expected / 255**2, rel=1e-12)
    assert mean_squared_difference(sums) == pytest.approx(expected / 127.5**2, rel=1e-12)


def test_sums_of_a_class_do_not_overflow() -> None:
    pixels = np.full((1, 2, 2, 3), 255, np.uint8)
    total, more = (ClassSums.measure(pixels, pixels) for _ in range(2))
    # As for 16 million white images each: together they exceed 32 bits.
    for sums in (total, more):
        sums.pixels = np.full_like(sums.pixels, 16_000_000 * 255)
    total.add(more)
    assert total.pixels.tolist() == [[[8_160_000_000] * 3] * 2] * 2


def test_mean_squared_difference_of_billions_of_images_is_exact() -> None:
    # Sums of 2**32 images, whose squares need more than 64 bits; the reference computes with integers of any size.
    n, rng = 1 << 32, np.random.default_rng(0)
    pixels = rng.integers(0, 255 * n, (32, 32, 3))
    squares = sum(int(value) ** 2 for value in pixels.ravel()) // n + 12_345_678
    sums = ClassSums(n, pixels, squares, np.zeros((1, 1, 3), np.int64), np.zeros(512, np.int64))
    over_pairs = n * squares - sum(int(value) ** 2 for value in pixels.ravel())
    expected = over_pairs / (n * (n - 1) // 2) / pixels.size
    assert mean_squared_difference(sums, scale="bytes") == pytest.approx(expected, rel=1e-12)


def test_mean_squared_difference_loses_nothing_where_images_hardly_differ() -> None:
    pixels = np.full((200, 224, 224, 3), 250, np.uint8)
    pixels[0, 0, 0, 0] = 251
    sums = ClassSums.measure(pixels, pixels[:, :1, :1])
    # Only pairs with the first image differ, by 1 in one of the values.
    assert mean_squared_difference(sums, scale="bytes") == pytest.approx(2 / 200 / pixels[0].size, rel=1e-12)


def test_standard_error_is_that_of_repeated_samples() -> None:
    rng = np.random.default_rng(0)

    def measure(n: int) -> tuple[float, float]:
        pixels = (rng.integers(100, 110, (n, 2, 2, 3)) + rng.integers(0, 60, (n, 1, 1, 1))).astype(np.uint8)
        distances = ((pixels - pixels.mean(axis=0)) ** 2).mean(axis=(1, 2, 3))
        difference = mean_squared_difference(ClassSums.measure(pixels, pixels), scale="bytes")
        return difference, _describe_distances(distances, np.empty(0))["standard_error"]

    means, errors = np.array([measure(40) for _ in range(300)]).T
    assert errors.mean() == pytest.approx(means.std(), rel=0.15)
    # A single pair has no spread, which is no reason to be sure of it.
    assert np.isnan(measure(2)[1]) and measure(3)[1] > 0


@pytest.mark.slow
def test_differences_of_photographs_are_near_the_published_ones(photographs: Path, client: Any, tmp_path: Path) -> None:
    found = fruitdask.explore(make_config(photographs, tmp_path), client=client)
    assert dict(found.classes["n_ok"]) == {
        "apple_hit_1": 234,
        "apple_red_1": 154,
        "apple_red_2": 159,
        "apple_red_3": 140,
        "apple_rotten_1": 159,
    }
    for label, published in PUBLISHED.items():
        assert found.classes.at[label, "mean_squared_difference"] == pytest.approx(published, rel=0.2)
    apples = read_pixels(sorted((photographs / "apple_red_2").iterdir()), 224)
    total = ((apples - apples.mean(axis=0)) ** 2).mean(axis=(1, 2, 3))
    n = len(apples)
    assert found.classes.at["apple_red_2", "mean_squared_difference"] == pytest.approx(
        2 * total.sum() / (n - 1), rel=1e-9
    )
    # Distances are measured on thumbnails: they agree with those at full size.
    images = found.images[found.images["label"] == "apple_red_2"]
    assert np.corrcoef(images["distance_to_mean"], total)[0, 1] > 0.99
    assert total[list(images["path"]).index(found.classes.at["apple_red_2", "most_typical"])] < 1.01 * total.min()
    assert not list(tmp_path.glob("thumbnails*"))


def make_config(folder: Path, output: Path, **overrides: Any) -> Config:
    """Make a configuration whose network is never built, without figures, and without a page unless it is asked for."""
    tree = {"input": {"url": str(folder)}, "output": {"url": str(output)}, "plots": OFF, "report": OFF}
    return load_config(tree, overrides=[f"{key}={str(value).lower()}" for key, value in overrides.items()])


def save(path: Path, image: Image.Image, **options: Any) -> None:
    """Save an image, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_explore_finds_what_is_in_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    exif = Image.Exif()
    exif[0x013B] = "Jane Doe"
    save(folder / "a" / "1.jpg", Image.new("RGB", (80, 60), (200, 10, 10)), exif=exif)
    save(folder / "a" / "2.png", Image.new("RGB", (40, 20), (100, 110, 10)))
    (folder / "b").mkdir()
    (folder / "b" / "1.png").write_bytes((folder / "a" / "2.png").read_bytes())
    (folder / "b" / "2.jpg").write_bytes(b"no image")
    (folder / "c").mkdir()
    (folder / "c" / "1.jpg").write_bytes(b"")
    found = explore_here(folder, tmp_path / "out", images_per_partition=2)
    images = found.images.set_index("path")
    assert list(images["status"]) == ["ok", "ok", "ok", "unreadable", "unreadable"]
    assert list(images["format"]) == ["JPEG", "PNG", "PNG", "", ""]
    assert images.loc["a/1.jpg", ["width_px", "height_px"]].tolist() == [80, 60]
    assert images.at["b/2.jpg", "bytes"] == 8 and images["width_px"].isna().sum() == 2
    assert images.index[images["has_name"]].tolist() == ["a/1.jpg"] and not images["has_gps"].any()
    np.testing.assert_allclose(
        images.loc["a/2.png", ["mean_red", "mean_green", "mean_blue"]].astype(float), [100, 110, 10]
    )
    assert images["duplicate_group"].dropna().index.tolist() == ["a/2.png", "b/1.png"]
    assert found.summary["duplicates"] == {"n_groups": 1, "n_images": 2, "n_groups_across_classes": 1}
    assert found.summary["metadata"] == {"exif": 1, "gps": 0, "serial": 0, "name": 1}
    assert found.summary["n_images"] == 5 and found.summary["n_ok"] == 3
    assert "Jane" not in found.images.to_csv() + found.classes.to_csv() + str(found.summary)
    assert found.classes["palette"].tolist() == ["#707010 0.500, #d01010 0.500", "#707010 1.000", ""]
    assert found.classes.loc["c", ["n_images", "n_ok", "most_typical"]].tolist() == [1, 0, ""]
    assert found.classes["mean_squared_difference"].isna().tolist() == [False, True, True]
    assert len(found.thumbnails) == len(found.thumbnail_rows) == 3 and len(found.means) == 3


def test_find_background_finds_the_colour_of_a_uniform_edge() -> None:
    random = np.random.default_rng(0)
    apple = np.full((64, 64, 3), 245, np.uint8)
    apple[20:44, 20:44] = (180, 40, 30)
    apple[30:34, 30:34] = 250
    photograph = random.integers(0, 256, (64, 64, 3), np.uint8)
    noisy = apple - random.integers(0, 12, apple.shape, np.uint8)
    found = find_background(np.stack([apple, noisy, photograph, np.full_like(apple, 90)]))
    # A highlight as white as the background counts as background.
    expected = (apple > 200).all(axis=2)
    np.testing.assert_array_equal(found, [expected, expected, np.zeros_like(expected), np.zeros_like(expected)])
    sums = ClassSums.measure(apple[None], apple[None])
    assert np.flatnonzero(sums.colours).tolist() == [(180 // 32) * 64 + (40 // 32) * 8] and sums.colours.max() == 560


def test_explored_tables_and_thumbnails_match_the_images(sample_folder: Path, tmp_path: Path) -> None:
    found = explore_here(sample_folder, tmp_path, max_thumbnails=7)
    assert list(found.images["path"]) == list_paths(sample_folder)
    # Besides the 7 that were asked for, the most and the least typical of each of the 6 classes.
    shown = set(found.images["path"].iloc[found.thumbnail_rows])
    assert {*found.classes["most_typical"], *found.classes["least_typical"]} <= shown
    assert 12 <= len(found.thumbnails) == len(shown) <= 7 + 12 and found.summary["status"] == "complete"
    read = pd.read_csv(tmp_path / "explore.csv")
    assert list(read["path"]) == list_paths(sample_folder) and list(read) == list(found.images)
    assert not (tmp_path / "exploring").exists() and "compared_px" not in found.summary
    for place in (3, -1):
        path = sample_folder / found.images["path"][found.thumbnail_rows[place]]
        with Image.open(path) as image:
            thumbnail = image.resize((32, 32), Image.Resampling.BICUBIC).resize((128, 128), Image.Resampling.BOX)
        np.testing.assert_array_equal(found.thumbnails[place], thumbnail)


def test_exploring_again_opens_no_images(sample_folder: Path, client: Any, tmp_path: Path) -> None:
    config = make_config(sample_folder, tmp_path / "out", **{"explore.input_px": 32})
    first = fruitdask.explore(config, client=client)
    marked = (tmp_path / "out" / "explore.parquet").stat().st_mtime_ns
    again = fruitdask.explore(config)
    assert (tmp_path / "out" / "explore.parquet").stat().st_mtime_ns == marked
    pd.testing.assert_frame_equal(first.images, again.images)
    other = fruitdask.explore(make_config(sample_folder, tmp_path / "out", **{"explore.input_px": 48}), client=client)
    assert other.summary["input_px"] == 48
    assert not other.classes["mean_squared_difference"].equals(first.classes["mean_squared_difference"])


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2**64 - 1]), st.booleans()), max_size=30))
def test_group_duplicates_equals_a_dictionary(rows: list[tuple[int, int, bool]]) -> None:
    keys = np.array([row[:2] for row in rows], np.uint64).reshape(-1, 2)
    is_known = np.array([row[2] for row in rows], bool)
    members: dict[tuple[int, int], list[int]] = {}
    for place, (first, second, known) in enumerate(rows):
        if known:
            members.setdefault((first, second), []).append(place)
    expected = np.full(len(rows), -1)
    for number, places in enumerate(places for places in members.values() if len(places) > 1):
        expected[places] = number
    np.testing.assert_array_equal(group_duplicates(keys, is_known), expected)


@pytest.mark.parametrize("max_bits", [0, 1, 3, 8])
def test_group_near_duplicates_equals_comparing_all(max_bits: int) -> None:
    rng = np.random.default_rng(max_bits)
    values = rng.integers(0, 2**64, 40, dtype=np.uint64)
    # Each of them several times, with a few bits flipped.
    for _ in range(3):
        flips = rng.integers(0, 64, (len(values), 3))
        flipped = values.copy()
        for column in flips.T[: rng.integers(1, 4)]:
            flipped ^= np.uint64(1) << column.astype(np.uint64)
        values = np.concatenate([values, flipped])
    values = rng.permutation(values)
    # The hash of an image that cannot be read is ignored, whatever it is.
    is_known = np.arange(len(values)) % 9 > 0
    found = group_near_duplicates(values, is_known, max_bits=max_bits)
    assert (found[~is_known] == -1).all()
    values, groups = values[is_known], pd.Series(found[is_known]).replace(-1, pd.NA)
    leader = np.arange(len(values))
    for first, second in itertools.combinations(range(len(values)), 2):
        if int(values[first] ^ values[second]).bit_count() <= max_bits:
            leader[leader == leader[second]] = leader[first]
    sizes = pd.Series(leader).map(pd.Series(leader).value_counts())
    assert (groups.notna() == (sizes > 1)).all()
    assert pd.DataFrame({"found": groups, "leader": leader})[sizes > 1].drop_duplicates().shape[0] == groups.nunique()
    assert 0 < groups.nunique() < len(values)


def test_near_duplicates_are_the_same_picture_saved_differently(sample_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number, path in enumerate(sorted(sample_folder.glob("*/r0_0.jpg"))):
        with Image.open(path) as image:
            save(folder / "first" / f"{number}.png", image)
            save(folder / "second" / f"{number}.jpg", image.resize((150, 150)), quality=90)
    found = explore_here(folder, tmp_path / "out", near_duplicate_bits=4)
    groups = found.images.groupby("near_duplicate_group")["path"].apply(list).tolist()
    assert groups == [[f"first/{n}.png", f"second/{n}.jpg"] for n in range(6)]
    assert found.summary["near_duplicates"]["n_groups_across_classes"] == 6


def test_images_that_are_all_the_same_do_not_differ(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((300, 300), 60).convert("RGB").save(buffer, "JPEG")
    for number in range(20):
        path = tmp_path / "in" / "a" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    found = explore_here(tmp_path / "in", tmp_path / "out", images_per_partition=20, px=224)
    assert found.classes.at["a", "mean_squared_difference"] == 0 and found.classes.at["a", "standard_error"] == 0
    assert found.images["distance_to_mean"].tolist() == [0.0] * 20
    assert found.classes.at["a", "n_duplicates"] == found.classes.at["a", "n_near_duplicates"] == 20


def test_black_images_have_black_means_and_thumbnails(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "in" / "night" / f"{number}.png", Image.new("RGB", (30, 30)))
    found = explore_here(tmp_path / "in", tmp_path / "out", images_per_partition=2)
    assert found.means.shape[0] == 1 and len(found.thumbnails) == 3
    assert found.means.max() == found.thumbnails.max() == 0


def test_explore_without_a_readable_image(tmp_path: Path, client: Any) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "in" / "a" / f"{number}.jpg").write_bytes(b"no image")
    found = fruitdask.explore(make_config(tmp_path / "in", tmp_path / "out", **{"report.enabled": True}), client=client)
    assert found.classes.loc["a", ["n_images", "n_ok"]].tolist() == [3, 0] and len(found.thumbnails) == 0
    assert set(found.images["error"]) == {
        "expected a JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000 or HEIC image, found plain text"
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "expected a JPEG" in page and "explore.csv" in page


def test_labels_in_any_order_give_the_same_classes(sample_folder: Path, tmp_path: Path, client: Any) -> None:
    paths = sorted(str(path.relative_to(sample_folder)) for path in sample_folder.rglob("*.jpg"))
    labels = [f"label {number % 5}" for number in range(len(paths))]
    pd.DataFrame({"path": paths, "label": labels}).to_csv(tmp_path / "labels.csv", index=False)
    tree = {"input": {"url": str(sample_folder), "manifest": str(tmp_path / "labels.csv")}}
    config = load_config(
        tree | {"output": {"url": str(tmp_path / "out")}, "plots": OFF, "report": OFF, "explore": {"input_px": 32}}
    )
    found = fruitdask.explore(config, client=client)
    for number, (label, row) in enumerate(found.classes.iterrows()):
        pixels = read_pixels([sample_folder / path for path in paths[number::5]], 32)
        assert label == f"label {number}"
        assert row["mean_squared_difference"] == pytest.approx(compare_all_pairs(pixels).mean(), rel=1e-9)


def test_explore_refuses_the_folder_of_another_exploration(sample_folder: Path, tmp_path: Path, client: Any) -> None:
    fruitdask.explore(make_config(sample_folder, tmp_path / "out"), client=client)
    other = make_config(sample_folder, tmp_path / "out", **{"input.limit": 7})
    with pytest.raises(StoreMismatchError, match="the input had other images.* or --overwrite to delete those"):
        fruitdask.explore(other, client=client)
    again = make_config(sample_folder, tmp_path / "out", **{"input.limit": 7, "output.overwrite": True})
    assert len(fruitdask.explore(again, client=client).images) == 7


def test_group_near_duplicates_handles_many_equal_images() -> None:
    rng = np.random.default_rng(0)
    centre = rng.integers(0, 2**64, dtype=np.uint64)
    flips = np.uint64(1) << rng.integers(0, 64, (3000, 3), dtype=np.uint64)
    values = centre ^ flips[:, 0] ^ flips[:, 1] ^ flips[:, 2]
    groups = group_near_duplicates(values, np.ones(len(values), bool), max_bits=8)
    assert groups.tolist() == [0] * len(values)


def test_damaged_exploration_is_one_sentence(sample_folder: Path, tmp_path: Path) -> None:
    output = Location(str(tmp_path))
    explore_here(sample_folder, tmp_path)
    store.delete_result(output, "explore.zarr/means")
    with pytest.raises(DamageError, match="explore.zarr is damaged .means is missing.; use fruitdask"):
        read_exploration(output)


def explore_plainly(folder: Path, labels: Sequence[str], *, px: int, thumbnail_px: int) -> pd.DataFrame:
    """Explore all images of a folder at once using only Pillow and NumPy; one row per class."""
    classes: dict[str, list[tuple[str, np.ndarray, np.ndarray]]] = {label: [] for label in sorted(set(labels))}
    for path, label in zip(list_paths(folder), labels, strict=True):
        with suppress(UnidentifiedImageError), Image.open(folder / path) as image:
            whole = image.convert("RGB").resize((px, px), Image.Resampling.BICUBIC)
            small = whole.resize((thumbnail_px, thumbnail_px), Image.Resampling.BOX)
            classes[label].append((path, np.asarray(whole, float), np.asarray(small, float)))
    rows = []
    for label, members in classes.items():
        row: dict[str, Any] = {"n_images": labels.count(label), "n_ok": len(members), "most_typical": ""}
        row |= {"mean_squared_difference": np.nan, "mean": np.full((thumbnail_px, thumbnail_px, 3), 255.0)}
        if members:
            thumbnails = np.stack([small for *_, small in members])
            row["mean"] = thumbnails.mean(axis=0)
            distances = ((thumbnails - row["mean"]) ** 2).mean(axis=(1, 2, 3))
            row["most_typical"] = members[int(distances.argmin())][0]
        if len(members) > 1:
            pixels = np.stack([whole for _, whole, _ in members]) / 127.5
            row["mean_squared_difference"] = 2 * pixels.var(axis=0, ddof=1).mean()
        rows.append(row)
    return pd.DataFrame(rows, index=list(classes))


def check_classes(found: Exploration, expected: pd.DataFrame) -> None:
    """Check what was found about classes against a plain exploration."""
    assert list(found.classes.index) == list(expected.index)
    for name in ("n_images", "n_ok", "most_typical"):
        assert found.classes[name].tolist() == expected[name].tolist()
    np.testing.assert_allclose(
        found.classes["mean_squared_difference"], expected["mean_squared_difference"].astype(float), rtol=1e-9
    )
    # Half a level may be rounded to either side.
    np.testing.assert_allclose(found.means, np.stack(expected["mean"]), atol=0.5 + 1e-9)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise, each darker or lighter, some of which cannot be read."""
    folder, random = tmp_path_factory.mktemp("mixed") / "in", np.random.default_rng(0)
    folder.mkdir()
    for number in range(400):
        path = folder / f"{number:03d}.png"
        if number % 23 == 5:
            path.write_bytes(b"no image")
        else:
            low, high = sorted(random.integers(0, 257, 2) // 2 * 2)
            save(path, Image.fromarray(random.integers(low, high + 1, (20, 20, 3), dtype=np.int64).astype(np.uint8)))
    return folder


@pytest.mark.parametrize("images_per_partition", [7, 64])
@pytest.mark.parametrize("way", ["one", "alternating", "runs", "empty"])
def test_classes_are_those_of_a_plain_exploration(
    mixed: Path, tmp_path: Path, way: str, images_per_partition: int
) -> None:
    labels = {
        # One class across many partitions; two in each; a few of different sizes; some without a readable image.
        "one": ["all"] * 400,
        "alternating": [f"class {number % 7}" for number in range(400)],
        "runs": [f"class {int(number**0.5)}" for number in range(400)],
        "empty": ["unreadable" if number % 23 == 5 else "readable" for number in range(400)],
    }[way]
    found = explore_here(
        mixed, tmp_path / "out", images_per_partition=images_per_partition, px=16, thumbnail_px=16, labels=labels
    )
    check_classes(found, explore_plainly(mixed, labels, px=16, thumbnail_px=16))
    assert found.images["label"].tolist() == labels and (tmp_path / "out" / "explore.parquet").exists()


def test_classes_in_several_blocks_are_those_of_a_plain_exploration(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, run_here_alone = list[ClassBlock](), run_here

    def run_and_count(client: Any, function: Any, pieces: Any, **settings: Any) -> None:
        pieces = list(pieces)
        blocks.extend(piece for piece in pieces if isinstance(piece, ClassBlock))
        run_here_alone(client, function, pieces, **settings)

    monkeypatch.setattr(exploration_module, "_SUMS_PER_BLOCK", 64)
    labels = [f"class {number * 7 % 300:03d}" for number in range(400)]
    with monkeypatch.context() as patch:
        patch.setitem(explore_here.__globals__, "run_here", run_and_count)
        found = explore_here(mixed, tmp_path / "out", images_per_partition=50, px=16, thumbnail_px=16, labels=labels)
    check_classes(found, explore_plainly(mixed, labels, px=16, thumbnail_px=16))
    # Each class is in one block, and no block exceeds its limit of sums.
    assert len(blocks) > 5 and [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == 300 and all(len(block.codes) <= 64 for block in blocks)


def test_many_classes_in_a_row_are_compared_at_half_the_size(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [f"class {number % 100:02d}" for number in range(400)]
    # Sums of 100 classes of 64 pixels have 4.9 MB.
    monkeypatch.setattr(exploration_module, "_MAX_SUMS_BYTES", 1_300_000)
    found = explore_here(mixed, tmp_path / "out", images_per_partition=100, px=64, thumbnail_px=16, labels=labels)
    assert found.summary["compared_px"] == 32 and found.summary["input_px"] == 64
    read = [path for path in list_paths(mixed)[7::100] if int(path[:3]) % 23 != 5]
    pixels = [
        np.asarray(
            Image.open(mixed / path).resize((64, 64), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BOX)
        )
        / 127.5
        for path in read
    ]
    assert found.classes.at["class 07", "mean_squared_difference"] == pytest.approx(
        compare_all_pairs(np.stack(pixels)).mean(), rel=1e-9
    )


@pytest.mark.parametrize("n_classes", [1, 106, 107, 512])
def test_compared_px_keeps_sums_small_whatever_the_partitions(n_classes: int) -> None:
    px = exploration_module.choose_compared_px(np.arange(100_000) % n_classes, 224)
    assert px == {1: 224, 106: 224, 107: 112, 512: 56}[n_classes]
    assert n_classes * px**2 * 3 * 4 <= 64_000_000


def interrupt_after(n_partitions: int, config: Config, client: Any) -> set[int]:
    """Explore until some partitions are committed; returns those that are."""
    output = Location(config.output.url)
    explore, seen = explore_module.map_partitions, 0

    def interrupt(*arguments: Any, on_result: Any, **settings: Any) -> None:
        def note(result: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == n_partitions:
                raise KeyboardInterrupt("in this test")
            on_result(result)

        explore(*arguments, on_result=note, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore_module, "map_partitions", interrupt)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            fruitdask.explore(config, client=client)
    while any(client.run(lambda dask_worker: len(dask_worker.state.all_running_tasks)).values()):
        pass
    (folder,) = Path(output.path, "exploring").iterdir()
    return {int(path.stem) for path in (folder / "rows").iterdir()}


def test_interrupted_exploration_reads_no_finished_partition_again(
    mixed: Path, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Enough that a slow interruption does not find all of them done.
    size, n_partitions = 8, 50
    monkeypatch.setattr(explore_module, "choose_partition_size", lambda n_images: size)
    folder = shutil.copytree(mixed, tmp_path / "in")
    config = make_config(folder, tmp_path / "out", **{"explore.input_px": 16})
    whole = fruitdask.explore(make_config(folder, tmp_path / "whole", **{"explore.input_px": 16}), client=client)
    done = interrupt_after(3, config, client)
    assert 3 <= len(done) < n_partitions
    # Reading an image again would show, as its content has changed; catalogs identify files by size and age.
    for path in (folder / f"{row:03d}.png" for row in range(400) if row // size in done):
        data, age = path.read_bytes(), path.stat().st_mtime_ns
        path.write_bytes(b"x" * len(data))
        os.utime(path, ns=(age, age))
    found = fruitdask.explore(config, client=client)
    pd.testing.assert_frame_equal(found.images, whole.images)
    pd.testing.assert_frame_equal(found.classes, whole.classes)
    np.testing.assert_array_equal(found.thumbnails, whole.thumbnails)
    assert not (tmp_path / "out" / "exploring").exists()


def test_other_settings_reuse_nothing_of_an_interrupted_exploration(mixed: Path, tmp_path: Path, client: Any) -> None:
    interrupt_after(3, make_config(mixed, tmp_path / "out", **{"explore.input_px": 16}), client)
    found, fresh = (
        fruitdask.explore(make_config(mixed, tmp_path / name, **{"explore.input_px": 24}), client=client)
        for name in ("out", "fresh")
    )
    pd.testing.assert_frame_equal(found.images, fresh.images)
    pd.testing.assert_frame_equal(found.classes, fresh.classes)


@pytest.mark.parametrize(
    ("kind", "damage"), [("rows", "flipped"), ("sums", "cut"), ("thumbnails", "flipped"), ("thumbnails", "lost")]
)
def test_damaged_working_file_is_reported_once_and_explored_again(
    mixed: Path, tmp_path: Path, client: Any, kind: str, damage: str
) -> None:
    config = make_config(mixed, tmp_path / "out", **{"explore.input_px": 16, "explore.thumbnail_px": 16})
    done = interrupt_after(12, config, client)
    (file,) = (tmp_path / "out" / "exploring").glob(f"*/{kind}/{min(done):05d}.*")
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.unlink() if damage == "lost" else file.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    with pytest.raises((DamageError, PartitionError), match=f"{kind}/{min(done):05d}.* is damaged .*; run again"):
        fruitdask.explore(config, client=client)
    found = fruitdask.explore(config, client=client)
    check_classes(found, explore_plainly(mixed, ["in"] * 400, px=16, thumbnail_px=16))


def test_images_that_the_storage_did_not_deliver_are_read_again(tmp_path: Path, mixed: Path, client: Any) -> None:
    config = make_config(mixed, tmp_path / "out", **{"explore.input_px": 16})
    done = interrupt_after(3, config, client)
    (file,) = (tmp_path / "out" / "exploring").glob(f"*/rows/{min(done):05d}.parquet")
    rows = pd.read_parquet(file)
    store.write_table(Location(str(file)), rows.assign(status="unreachable", error="the storage was away"))
    found = fruitdask.explore(config, client=client)
    assert not found.images["status"].eq("unreachable").any()
