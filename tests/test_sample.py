"""Tests of the drawn sample data set."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter
from PIL.JpegImagePlugin import JpegImageFile

from fruitdask.core.sample import CLASS_NAMES, draw_sample, render_fruit
from fruitdask.errors import ConfigError, OutputError

LYING = ("cucumber_3", "zucchini_1")
UPRIGHT = tuple(name for name in CLASS_NAMES if name not in LYING)
SIZE_PX = 48
PER_CLASS = 8


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small data set once."""
    folder = tmp_path_factory.mktemp("drawn") / "fruits"
    draw_sample(folder, per_class=PER_CLASS, size_px=SIZE_PX)
    return folder


def read_pixels(image: Image.Image) -> npt.NDArray[np.float64]:
    return np.asarray(image, np.float64)


def find_outline(image: Image.Image) -> npt.NDArray[np.bool_]:
    return np.asarray(image.convert("L")) < 240


def measure_width(image: Image.Image) -> int:
    return int(np.count_nonzero(find_outline(image).any(axis=0)))


def average_colour(image: Image.Image) -> npt.NDArray[np.float64]:
    return np.array(read_pixels(image)[find_outline(image)].mean(axis=0))


def read_quantization(path: Path) -> dict[int, list[int]]:
    with Image.open(path) as image:
        assert isinstance(image, JpegImageFile)
        return image.quantization


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def test_class_names_contain_the_documented_fruits() -> None:
    assert {"apple_granny_smith_1", "pear_1", "cucumber_3", "zucchini_1"} <= set(CLASS_NAMES)
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES)


@pytest.mark.parametrize("size_px", [16, 33, 100], ids=["smallest", "odd", "like Fruits-360"])
def test_render_fruit_returns_rgb_without_holes(size_px: int) -> None:
    """A tomato is smooth: no pixel shows the white background, which would be much bluer than its neighbours."""
    image = render_fruit("tomato_1", angle_degrees=10, size_px=size_px)
    assert (image.mode, image.size) == ("RGB", (size_px, size_px))
    blue, inside = image.getchannel("B"), image.convert("L").filter(ImageFilter.MaxFilter(5))
    excess = read_pixels(blue) - read_pixels(blue.filter(ImageFilter.MedianFilter(3)))
    assert excess[(read_pixels(inside) < 240) & (np.arange(size_px)[:, None] > size_px / 2)].max() < 20


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_render_fruit_leaves_the_background_white(class_name: str) -> None:
    for angle_degrees in range(0, 360, 45):
        image = render_fruit(class_name, angle_degrees=angle_degrees, size_px=SIZE_PX)
        pixels, n = np.asarray(image), SIZE_PX // 10
        corners = [pixels[:n, :n], pixels[:n, -n:], pixels[-n:, :n], pixels[-n:, -n:]]
        assert np.min(corners) == 255
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert border.min() >= 240, "the fruit is cut off"
        assert 0.08 < find_outline(image).mean() < 0.7


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_render_fruit_turns_with_the_angle(class_name: str) -> None:
    front, side, back, again = (
        read_pixels(render_fruit(class_name, angle_degrees=angle, size_px=SIZE_PX)) for angle in (0, 90, 180, 360)
    )
    np.testing.assert_array_equal(front, again)
    assert np.abs(front - side).mean() > 1
    assert np.abs(front - back).mean() > 1


@pytest.mark.parametrize("class_name", LYING)
def test_render_fruit_foreshortens_a_lying_fruit(class_name: str) -> None:
    across, away = (render_fruit(class_name, angle_degrees=angle, size_px=SIZE_PX) for angle in (0, 90))
    assert measure_width(across) > 2.5 * measure_width(away)


@pytest.mark.parametrize("class_name", UPRIGHT)
def test_render_fruit_keeps_an_upright_fruit_about_as_wide(class_name: str) -> None:
    widths = [measure_width(render_fruit(class_name, angle_degrees=a, size_px=SIZE_PX)) for a in range(0, 360, 45)]
    assert max(widths) < 1.25 * min(widths)


@pytest.mark.parametrize(
    ("class_name", "hue"),
    [("apple_granny_smith_1", "g"), ("cucumber_3", "g"), ("zucchini_1", "g"), ("apple_red_1", "r"), ("tomato_1", "r")],
)
def test_render_fruit_has_the_colour_of_its_class(class_name: str, hue: str) -> None:
    image = render_fruit(class_name, angle_degrees=0, size_px=SIZE_PX)
    channels = np.asarray(image)[find_outline(image)].mean(axis=0)
    assert "rgb"[int(channels.argmax())] == hue


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_render_fruit_repeats_a_seed_and_varies_between_seeds(class_name: str) -> None:
    first, again, other = (render_fruit(class_name, angle_degrees=40, size_px=SIZE_PX, seed=seed) for seed in (3, 3, 4))
    assert first.tobytes() == again.tobytes()
    assert np.abs(read_pixels(first) - read_pixels(other)).mean() > 1


def test_render_fruit_refuses_an_unknown_class() -> None:
    with pytest.raises(ConfigError, match="'durian_1'; use one of apple_granny_smith_1, .*zucchini_1"):
        render_fruit("durian_1", angle_degrees=0)


@pytest.mark.parametrize(
    ("argument", "value"), [("size_px", 15), ("seed", -1)], ids=["too small to draw", "negative seed"]
)
def test_render_fruit_refuses_a_number_that_is_too_small(argument: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"Expected {argument} to be at least \d+, found {value}"):
        render_fruit("pear_1", angle_degrees=0, **{argument: value})


def test_draw_sample_names_files_like_fruits_360(sample: Path, tmp_path: Path) -> None:
    expected = {f"{name}/r0_{k}.jpg" for name in CLASS_NAMES for k in range(PER_CLASS)}
    assert {path.relative_to(sample).as_posix() for path in sample.rglob("*") if path.is_file()} == expected
    assert draw_sample(tmp_path / "fruits", per_class=1, size_px=16) == len(CLASS_NAMES)


def test_draw_sample_writes_jpeg_of_quality_92_without_metadata(sample: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.jpg"
    Image.new("RGB", (8, 8)).save(reference, quality=92)
    for path in sample.rglob("*.jpg"):
        assert read_quantization(path) == read_quantization(reference)
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("RGB", (SIZE_PX, SIZE_PX))
            assert not image.getexif()
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_draw_sample_spreads_the_angles_evenly(sample: Path) -> None:
    for k in (0, 3):
        expected = render_fruit("pear_1", angle_degrees=k * 360 / PER_CLASS, size_px=SIZE_PX)
        with Image.open(sample / "pear_1" / f"r0_{k}.jpg") as image:
            assert np.abs(read_pixels(image) - read_pixels(expected)).mean() < 3


def test_draw_sample_repeats_its_bytes_and_varies_with_the_seed(tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for folder, seed in ((first, 0), (again, 0), (other, 1)):
        draw_sample(folder, per_class=2, size_px=24, seed=seed)
    assert read_bytes(first) == read_bytes(again)
    assert not set(read_bytes(first).values()) & set(read_bytes(other).values())


def test_draw_sample_draws_classes_that_can_be_told_apart(sample: Path) -> None:
    """The average colour of some fruits names the class of other fruits, seen at other angles."""
    paths = sorted(sample.rglob("*.jpg"))
    labels = [path.parent.name for path in paths]
    features = np.array([average_colour(Image.open(path)) for path in paths])
    unseen = [(name, 90 * k + 20, seed) for name in CLASS_NAMES for k in range(4) for seed in (1, 2)]
    hits = 0
    for name, angle_degrees, seed in unseen:
        feature = average_colour(render_fruit(name, angle_degrees=angle_degrees, size_px=SIZE_PX, seed=seed))
        hits += labels[int(np.square(features - feature).sum(axis=1).argmin())] == name
    assert hits >= 0.97 * len(unseen)


def test_draw_sample_fills_an_empty_folder_and_makes_parents(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    draw_sample(empty, per_class=1, size_px=16)
    draw_sample(str(tmp_path / "a" / "b" / "new"), per_class=1, size_px=16)
    assert len(read_bytes(empty)) == len(read_bytes(tmp_path / "a" / "b" / "new")) == len(CLASS_NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_draw_sample_leaves_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    draw_sample(tmp_path / "fruits", per_class=1, size_px=16)
    assert (tmp_path / "fruits").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["folder", "file", "parent"])
def test_draw_sample_refuses_a_place_in_use(tmp_path: Path, kind: str) -> None:
    keep = tmp_path / "fruits" / "keep.txt"
    keep.parent.mkdir()
    keep.write_text("mine")
    folder = {"folder": keep.parent, "file": keep, "parent": keep / "below"}[kind]
    with pytest.raises(OutputError, match=r"Expected a new or empty folder .*; name another folder\."):
        draw_sample(folder, per_class=1, size_px=16)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [keep]
    assert keep.read_text() == "mine"


@pytest.mark.parametrize(
    ("argument", "value"), [("per_class", 0), ("size_px", 15), ("seed", -1)], ids=["no images", "too small", "seed"]
)
def test_draw_sample_refuses_a_number_before_it_writes(tmp_path: Path, argument: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"Expected {argument} to be at least \d+, found {value}"):
        draw_sample(tmp_path / "fruits", **{argument: value})
    assert not list(tmp_path.iterdir())


def test_draw_sample_on_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, path: Path, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OutputError, match=r"fruits cannot be created \(No space left on device\); name"):
        draw_sample(tmp_path / "fruits", per_class=1, size_px=16)
    assert not list(tmp_path.iterdir())


def test_draw_sample_leaves_nothing_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save
    saved: list[Path] = []

    def save_a_few(self: Image.Image, path: Path, **options: Any) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt("stopped by the test")
        saved.append(path)
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", save_a_few)
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        draw_sample(tmp_path / "fruits", per_class=2, size_px=16)
    assert len(saved) == 3
    assert not list(tmp_path.iterdir())
