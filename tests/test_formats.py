"""Tests of GIF, AVIF, JPEG 2000 and HEIC: upright, on white, the first frame, without metadata, in one thread."""

import io
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
import pytest
from chaos.hostile_images import announce, build_gif, save_heic
from PIL import Image, ImageDraw

from fruitdask.core import listing
from fruitdask.core.listing import can_read_heic
from fruitdask.errors import ImageError, ImageTooLargeError
from fruitdask.worker.images import decode_image, read_header

Array = npt.NDArray[Any]

SIDE = 64
#: What is stored of an upright scene for each orientation of EXIF, as in test_images.py.
STORED: dict[int, Callable[[Array], Array]] = {
    1: lambda scene: scene,
    2: lambda scene: scene[:, ::-1],
    3: lambda scene: scene[::-1, ::-1],
    4: lambda scene: scene[::-1],
    5: lambda scene: scene.transpose(1, 0, 2),
    6: lambda scene: scene[:, ::-1].transpose(1, 0, 2),
    7: lambda scene: scene[::-1, ::-1].transpose(1, 0, 2),
    8: lambda scene: scene[::-1].transpose(1, 0, 2),
}


def decode(data: bytes, *, is_fast: bool = False) -> Array:
    return decode_image(data, size_px=SIDE, max_pixels=1_000_000, is_fast=is_fast)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode an image as well as the format can."""
    buffer = io.BytesIO()
    if kind == "HEIC":
        return save_heic(image, **({"quality": 100, "chroma": 444} | options))
    if kind == "AVIF":
        options = {"quality": 100, "subsampling": "4:4:4", "speed": 10} | options
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def draw_scene() -> Image.Image:
    """Draw smooth colours with a corner: a picture that differs from all its flips and rotations."""
    y, x = np.mgrid[:SIDE, :SIDE]
    planes = (3 * x, 3 * y, 255 - 2 * (x + y))
    image = Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))
    ImageDraw.Draw(image).rectangle((6, 4, 30, 16), fill="white")
    return image


def lay_on_white(colours: Array, alpha: Array) -> Array:
    opacity = alpha.astype(float)[..., None] / 255
    return np.asarray(colours * opacity + 255 * (1 - opacity))


def assert_alike(found: Array, expected: Array, most: float = 4) -> None:
    """Lossy formats change a pixel a little, most at edges."""
    difference = np.abs(found.astype(float) - expected)
    assert difference.mean() < most / 2 and np.quantile(difference, 0.98) <= 3 * most


@pytest.mark.parametrize(
    ("kind", "name"), [("GIF", "GIF"), ("AVIF", "AVIF"), ("JPEG2000", "JPEG2000"), ("HEIC", "HEIF")]
)
def test_formats_are_recognized_by_content_and_named(kind: str, name: str) -> None:
    scene = draw_scene()
    data = save(scene, kind)
    assert read_header(data) == (name, SIDE, SIDE)
    expected = np.asarray(scene.quantize(256).convert("RGB") if kind == "GIF" else scene)
    assert_alike(decode(data), expected, most=10 if kind == "GIF" else 4)
    assert np.array_equal(decode(data), decode(data, is_fast=True))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "HEIC"])
def test_formats_show_grey_and_alpha(kind: str, mode: str) -> None:
    scene = draw_scene()
    grey, colours = np.asarray(scene.convert("L")), np.asarray(scene)
    alpha = np.asarray(Image.linear_gradient("L").resize((SIDE, SIDE)))
    shown = np.repeat(grey[..., None], 3, axis=2) if mode in ("L", "LA") else colours
    image = scene.convert(mode.removesuffix("A"))
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(alpha))
        shown = lay_on_white(shown, alpha)
    assert_alike(decode(save(image, kind)), shown)


@pytest.mark.parametrize("orientation", sorted(STORED), ids=str)
@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_orientation_is_applied_once(kind: str, orientation: int) -> None:
    scene, exif = np.asarray(draw_scene()), Image.Exif()
    exif[0x0112] = orientation
    # Both encoders write the orientation as a property of the picture (irot, imir); iPhones write it in EXIF as well.
    data = save(Image.fromarray(np.ascontiguousarray(STORED[orientation](scene))), kind, exif=exif.tobytes())
    assert orientation == 1 or b"irot" in data or b"imir" in data
    assert_alike(decode(data), scene)


@pytest.mark.parametrize("orientation", sorted(STORED), ids=str)
@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_read_header_gives_the_upright_size(kind: str, orientation: int) -> None:
    scene, exif = np.asarray(draw_scene())[: SIDE // 2], Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(np.ascontiguousarray(STORED[orientation](scene))), kind, exif=exif.tobytes())
    header = read_header(data)
    assert header is not None and header[1:] == (SIDE, SIDE // 2)


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_orientation_only_in_exif_is_ignored(kind: str) -> None:
    # ISO/IEC 23008-12: only properties turn a picture; EXIF records their source.
    # Both encoders would convert it to a property, so the test turns another tag into the orientation afterwards.
    data = save(draw_scene(), kind, exif=b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0113, 3, 1, 6, 0, 0))
    entry = struct.pack("<HHI", 0x0113, 3, 1), struct.pack("<HHI", 0x0112, 3, 1)
    turned = data.replace(*entry)
    assert turned != data
    assert np.array_equal(decode(turned), decode(data))


@pytest.mark.parametrize("kind", ["AVIF", "HEIC", "JPEG2000", "GIF"])
def test_metadata_changes_no_pixel(kind: str) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Camera & Sons"
    options = {"comment": b"Camera & Sons"} if kind in ("GIF", "JPEG2000") else {"exif": exif.tobytes()}
    rich, plain = save(draw_scene(), kind, **options), save(draw_scene(), kind)
    assert b"Camera & Sons" in rich and b"Camera & Sons" not in plain
    assert np.array_equal(decode(rich), decode(plain))


@pytest.mark.parametrize("kind", ["GIF", "AVIF"])
def test_first_frame_is_taken(kind: str) -> None:
    red, blue = Image.new("RGB", (SIDE, SIDE), (200, 20, 20)), Image.new("RGB", (SIDE, SIDE), (20, 20, 200))
    pixels = decode(save(red, kind, save_all=True, append_images=[blue], duration=100))
    assert np.abs(pixels.astype(int) - (200, 20, 20)).max() <= 4


def test_primary_picture_of_a_heic_is_taken() -> None:
    red, blue = Image.new("RGB", (SIDE, SIDE), (200, 20, 20)), Image.new("RGB", (SIDE, SIDE), (20, 20, 200))
    file = pillow_heif.from_pillow(red)
    file.add_from_pillow(blue)
    for number, colour in enumerate(((200, 20, 20), (20, 20, 200))):
        buffer = io.BytesIO()
        file.save(buffer, quality=100, primary_index=number)
        assert np.abs(decode(buffer.getvalue()).astype(int) - colour).max() <= 4


@pytest.mark.parametrize("transparency", [None, 3], ids=["opaque", "transparent"])
def test_gif_shows_white_where_its_frame_does_not_reach(transparency: int | None) -> None:
    palette = np.random.default_rng(0).integers(0, 250, (8, 3), np.uint8)
    indices = np.random.default_rng(1).integers(0, 8, (SIDE, SIDE), np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    gif = save(image, "GIF", **({} if transparency is None else {"transparency": transparency}))
    wide = gif[:6] + struct.pack("<HH", 2 * SIDE, SIDE) + gif[10:]
    pixels = decode_image(wide, size_px=2 * SIDE, max_pixels=1_000_000)
    expected = palette[indices]
    expected[indices == transparency] = 255
    # The screen is twice as wide as it is high; it comes out as a square.
    screen = np.full((SIDE, 2 * SIDE, 3), 255, np.uint8)
    screen[:, :SIDE] = expected
    square = Image.fromarray(screen).resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels, np.asarray(square))


def test_gif_without_a_palette_is_refused() -> None:
    with pytest.raises(ImageError, match="found a GIF without a palette"):
        decode(build_gif(64, 64, has_palette=False))


def test_heic_of_10_bits_keeps_the_upper_8() -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (SIDE, 1))
    data = save_heic(Image.fromarray(ramp), n_bits=10, quality=-1, chroma=444)
    assert pillow_heif.open_heif(data).info["bit_depth"] == 10
    assert np.abs(decode(data).astype(int) - ramp[..., None]).max() <= 2


def test_heic_of_tiles_is_put_together() -> None:
    scene = draw_scene().resize((300, 300))
    data = save(scene, "HEIC", tile_size=64)
    assert b"grid" in data
    assert_alike(decode(data), np.asarray(scene.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))


def test_cropped_avif_is_refused() -> None:
    # A colour profile as long as a clean aperture: fractions of width, height and two distances from the
    # centre.
    profile = bytes(28)
    data = save(draw_scene(), "AVIF", icc_profile=profile)
    aperture = struct.pack(">8I", 32, 1, 32, 1, 0, 1, 0, 1)
    changed = bytearray(data.replace(b"colrprof" + profile, b"clap" + aperture))
    number = 1 + sum(0 < data.find(name) < data.index(b"colr") for name in (b"ispe", b"pixi", b"av1C"))
    # Version, count of items, number of the first one, and its properties: a reader must understand this one.
    start = changed.index(b"ipma") + 4 + 4 + 4 + 2
    at = changed.index(number, start + 1, start + 1 + changed[start])
    changed[at] |= 0x80
    shown_in_part = bytes(changed)
    assert read_header(shown_in_part) == ("AVIF", SIDE, SIDE)
    with pytest.raises(ImageError, match="found an AVIF that displays only part of its pixels"):
        decode(shown_in_part)


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_announced_size_is_bounded(kind: str) -> None:
    with pytest.raises(ImageTooLargeError, match="found 8000 x 8000 = 64,000,000"):
        decode(announce(save(draw_scene(), kind), 8_000))


def test_heic_asks_for_its_extra_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_read_heic()
    monkeypatch.setattr(listing, "find_spec", lambda name: None)
    assert not can_read_heic()
    with pytest.raises(ImageError, match=r"found HEIC; install fruitdask\[heic\]"):
        decode(save(draw_scene(), "HEIC"))


def test_other_codings_in_heif_are_named() -> None:
    data = save(draw_scene(), "HEIC").replace(b"hvc1", b"vvc1")
    with pytest.raises(ImageError, match="expected a HEIF image coded as HEVC, found 'vvc1'"):
        decode(data)


ALONE = """
import sys, threading
from pathlib import Path
from PIL import Image
from fruitdask.core.listing import can_read_heic
from fruitdask.worker.images import decode_image
from fruitdask.worker.images.resize import resize_square
# Compilers and tables may have threads of their own.
resize_square(Image.new("RGB", (64, 64)), 8)
assert can_read_heic() and "pillow_heif" not in sys.modules
before = dict(Image.OPEN)
def count():
    return len(list(Path("/proc/self/task").iterdir()))
most, done = 0, threading.Event()
def look():
    global most
    while not done.is_set():
        most = max(most, count())
looking = threading.Thread(target=look)
looking.start()
n_before = count()
for name in sys.argv[1:]:
    decode_image(Path(name).read_bytes(), size_px=64, max_pixels=10**8)
done.set()
looking.join()
assert "pillow_heif" in sys.modules
assert "HEIF" not in Image.OPEN
print(most - n_before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to count threads")
def test_decoders_start_no_more_than_one_thread_and_do_not_change_pillow(tmp_path: Path) -> None:
    scene = draw_scene().resize((1_000, 1_000))
    for kind in ("HEIC", "AVIF", "JPEG2000"):
        (tmp_path / kind).write_bytes(save(scene, kind, **({"tile_size": 256} if kind == "HEIC" else {})))
    command = [sys.executable, "-c", ALONE, *(str(path) for path in sorted(tmp_path.iterdir()))]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    # libde265 decodes HEVC in one thread, for which the caller waits.
    assert int(found.stdout) <= 1
