"""Tests of decoding: real photographs, every mode and orientation, and files that are broken or hostile."""

import io
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings, strategies as st
from PIL import ExifTags, Image, ImageCms, ImageDraw

from fruitdask.errors import ImageError, ImageTooLargeError
from fruitdask.worker.images import decode as decoding, decode_image, decode_images, read_header

Pixels = npt.NDArray[np.uint8]

SIDE = 16
MIB = 1 << 20
ORIENTATION = 0x0112

# How an upright scene is stored in each orientation of EXIF (CIPA DC-008, tag Orientation). It gives the sides of the
# scene where the stored row 0 and column 0 are: for 6, the right and the top.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda scene: scene,
    2: lambda scene: scene[:, ::-1],
    3: lambda scene: scene[::-1, ::-1],
    4: lambda scene: scene[::-1],
    5: lambda scene: scene.transpose(1, 0, 2),
    6: lambda scene: scene[:, ::-1].transpose(1, 0, 2),
    7: lambda scene: scene[::-1, ::-1].transpose(1, 0, 2),
    8: lambda scene: scene[::-1].transpose(1, 0, 2),
}


def decode(data: bytes, *, size_px: int = SIDE, max_pixels: int = 50_000_000) -> Pixels:
    return decode_image(data, size_px=size_px, max_pixels=max_pixels)


def save(image: Image.Image | npt.NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    """Encode an image, or an array as one."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def draw_noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def draw_scene(width: int = 96, height: int = 64) -> Image.Image:
    """Draw smooth colours with a letter: a picture that differs from all its flips and rotations."""
    y, x = np.mgrid[:height, :width]
    planes = (255 * x / width, 255 * y / height, 255 * (x + 2 * y) / (width + 2 * height))
    image = Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))
    ImageDraw.Draw(image).polygon([(8, 6), (30, 6), (30, 14), (16, 14), (16, 40), (8, 40)], fill="white")
    return image


def resize(image: Image.Image | Pixels, size_px: int = SIDE) -> Pixels:
    """Resize using only Pillow."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.convert("RGB").resize((size_px, size_px), Image.Resampling.BICUBIC))


def build_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Build EXIF of one directory; an entry is its tag, type, count and the four bytes of its value."""
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<I", 0)


def orient(value: int) -> tuple[int, int, int, bytes]:
    return ORIENTATION, 3, 1, struct.pack("<HH", value, 0)


def add_exif(jpeg: bytes, exif: bytes) -> bytes:
    """Put EXIF into a JPEG unchanged, broken or not."""
    payload = b"Exif\0\0" + exif
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def build_png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, rows: bytes = b"", extra: bytes = b""
) -> bytes:
    """Build a PNG by hand; colour is 0 for grey, 2 for RGB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@contextmanager
def limited_memory(more_bytes: int) -> Iterator[None]:
    """Limit the further bytes of address space of this process."""
    resource = pytest.importorskip("resource", reason="needs POSIX resource limits")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs /proc to read the size of this process")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("size_px", [224, 100, 1], ids=["224", "100", "1"])
def test_decode_image_equals_plain_pillow_on_photographs(photographs: Path, size_px: int) -> None:
    for path in sorted(photographs.rglob("*.jpg"))[:: 40 if size_px == 224 else 200]:
        with Image.open(path) as image:
            assert np.array_equal(decode(path.read_bytes(), size_px=size_px), resize(image, size_px)), path.name


def test_decode_image_enlarges_and_squashes_as_pillow_does() -> None:
    scene = draw_scene(10, 30)
    assert np.array_equal(decode(save(scene), size_px=64), resize(scene, 64))


def test_decode_image_returns_nothing_but_pixels(photographs: Path) -> None:
    pixels = decode(next(photographs.rglob("*.jpg")).read_bytes(), size_px=224)
    assert type(pixels) is np.ndarray
    assert (pixels.shape, pixels.dtype) == ((224, 224, 3), np.dtype(np.uint8))
    assert not hasattr(pixels, "info")
    assert 0 <= pixels.min() < 100 < 200 < pixels.max() <= 255


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_decode_image_drops_metadata(kind: str) -> None:
    scene, exif = draw_scene(), Image.Exif()
    exif[0x010F], exif[0x9003] = "Camera & Sons", "2026:01:01 00:00:00"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 30.0)})
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    rich, plain = save(scene, kind, exif=exif, icc_profile=profile), save(scene, kind)
    assert b"Camera & Sons" in rich and b"Camera & Sons" not in plain
    assert np.array_equal(decode(rich), decode(plain))


def test_orientations_are_eight_different_pictures() -> None:
    scene = resize(draw_scene(), SIDE)
    assert len({store(scene).tobytes() for store in STORED.values()}) == 8


@pytest.mark.parametrize("orientation", sorted(STORED), ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
    ids=["png", "webp", "tiff", "tiff-lzw"],
)
def test_decode_image_turns_upright(kind: str, options: dict[str, Any], orientation: int) -> None:
    scene, exif = draw_noise(20, 30, 3), Image.Exif()
    exif[ORIENTATION] = orientation
    data = save(STORED[orientation](scene), kind, exif=exif, **options)
    # The image is resized as stored, then turned: in the opposite order, Pillow would round differently.
    assert np.array_equal(STORED[orientation](decode(data)), resize(STORED[orientation](scene)))
    assert orientation == 1 or not np.array_equal(decode(data), resize(STORED[orientation](scene)))


@pytest.mark.parametrize("orientation", sorted(STORED), ids=str)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_read_header_gives_the_upright_size(kind: str, orientation: int) -> None:
    scene, exif = draw_noise(20, 30, 3), Image.Exif()
    exif[ORIENTATION] = orientation
    data = save(STORED[orientation](scene), kind, exif=exif)
    assert read_header(data) == (kind, 30, 20)


@pytest.mark.parametrize("orientation", sorted(STORED), ids=str)
def test_decode_image_turns_a_jpeg_upright(orientation: int) -> None:
    scene = np.asarray(draw_scene())
    jpeg = save(STORED[orientation](scene), "JPEG", quality=100, subsampling=0)
    turned = decode(add_exif(jpeg, build_exif(orient(orientation)))).astype(int)
    stored = resize(STORED[orientation](scene)).astype(int)
    assert np.abs(STORED[orientation](turned) - stored).max() <= 4  # JPEG loses a little
    others = [resize(STORED[other](scene)).astype(int) for other in STORED if other != 1]
    assert min(np.abs(turned - other).max() for other in others) > 50


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data",
    "ignore:Tag data larger than file",
    "ignore:Metadata Warning",
)
@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"garbage",
        build_exif(orient(6))[:15],
        build_exif(orient(9)),
        build_exif(orient(0)),
        build_exif((ORIENTATION, 2, 2, b"6\0\0\0")),
        build_exif((ORIENTATION, 99, 1, b"\6\0\0\0")),
        build_exif((0x010F, 2, 1000, struct.pack("<I", 99_999))),
        build_exif((0x8769, 4, 1, struct.pack("<I", 8))),
        b"II*\0" + struct.pack("<IH", 8, 65_535),
    ],
    ids=[
        "empty",
        "garbage",
        "cut off",
        "orientation 9",
        "orientation 0",
        "orientation as text",
        "unknown type",
        "offset outside",
        "loop",
        "too many entries",
    ],
)
def test_decode_image_decodes_in_spite_of_broken_exif(exif: bytes) -> None:
    jpeg = save(draw_scene(), "JPEG")
    assert np.array_equal(decode(add_exif(jpeg, exif)), decode(jpeg))


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data",
    "ignore:Tag data larger than file",
    "ignore:Metadata Warning",
)
@pytest.mark.parametrize(
    "entry",
    [
        (0x010F, 2, 1000, struct.pack("<I", 99_999)),
        (0x8825, 4, 1, struct.pack("<I", 99_999)),
        (0x0132, 3, 2, b"abcd"),
        (0xA005, 2, 4, b"abc\0"),
    ],
    ids=["text outside", "gps outside", "wrong type", "broken interoperability"],
)
def test_decode_image_turns_upright_in_spite_of_another_broken_tag(entry: tuple[int, int, int, bytes]) -> None:
    scene = np.asarray(draw_scene())
    jpeg = save(STORED[6](scene), "JPEG", quality=100, subsampling=0)
    turned = decode(add_exif(jpeg, build_exif(entry, orient(6)))).astype(int)
    assert np.abs(STORED[6](turned) - resize(STORED[6](scene))).max() <= 4


@pytest.mark.parametrize("height", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_decode_image_converts_images_of_any_height(mode: str, height: int) -> None:
    channels = {"LA": 2, "RGBA": 4, "CMYK": 4}.get(mode)
    noise = draw_noise(height, 33, *(() if channels is None else (channels,)))
    if mode == "I;16":
        image, expected = Image.fromarray(noise.astype(np.uint16) << 8), Image.fromarray(noise).convert("RGB")
    else:
        image = Image.fromarray(noise, "L" if mode == "P" else mode)
        image = image.quantize(16) if mode == "P" else image
        # The reference converts the whole image at once; the decoder, which works in bands, must agree.
        white = Image.new("RGBA", image.size, "white")
        expected = Image.alpha_composite(white, image.convert("RGBA")) if mode != "CMYK" else image
    assert np.array_equal(decode(save(image, "TIFF")), resize(expected))


def test_large_image_does_not_wait_forever_behind_small_ones() -> None:
    in_work, order = decoding._PixelBudget(), list[str]()

    def work(name: str, n_pixels: int) -> None:
        with in_work.hold(n_pixels, most=100):
            order.append(name)

    with ThreadPoolExecutor(2) as pool:
        with in_work.hold(60, most=100):
            pool.submit(work, "large", 100)
            deadline = time.monotonic() + 30
            while not in_work._turn.locked():
                assert time.monotonic() < deadline, "the large one does not wait"
                os.sched_yield()
            small = pool.submit(work, "small", 30)
            with pytest.raises(TimeoutError, match="^$"):
                small.result(0.2)
    assert order == ["large", "small"]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_decode_image_spreads_grey_over_the_colours(kind: str) -> None:
    grey = draw_noise(SIDE, SIDE)
    assert np.array_equal(decode(save(grey, kind)), np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_decode_image_reads_black_and_white(kind: str) -> None:
    bits = draw_noise(SIDE, SIDE) > 127
    data = save(Image.fromarray(bits), kind)
    assert np.array_equal(decode(data), np.stack([bits * np.uint8(255)] * 3, axis=2))


def build_palette_image() -> tuple[Image.Image, Pixels, Pixels]:
    """Build a palette image, with its indices and its palette."""
    indices, palette = draw_noise(SIDE, SIDE) % 8, draw_noise(8, 3, seed=1)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    return image, indices, palette


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_decode_image_looks_colours_up_in_the_palette(kind: str) -> None:
    image, indices, palette = build_palette_image()
    assert np.array_equal(decode(save(image, kind)), palette[indices])


def test_decode_image_lays_a_transparent_palette_colour_on_white() -> None:
    image, indices, palette = build_palette_image()
    palette = palette.copy()
    palette[3] = 255
    assert np.array_equal(decode(save(image, transparency=3)), palette[indices])


def lay_on_white(colour: npt.NDArray[Any], alpha: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Blend with white by the formula of Porter and Duff."""
    opacity = np.asarray(alpha, np.float64)[..., None] / 255
    return np.asarray(colour * opacity + 255 * (1 - opacity))


def test_decode_image_lays_a_half_transparent_palette_on_white() -> None:
    image, indices, palette = build_palette_image()
    alpha = np.array([0, 30, 60, 90, 128, 200, 250, 255], np.uint8)
    pixels = decode(save(image, transparency=alpha.tobytes()))
    assert np.abs(pixels - lay_on_white(palette[indices], alpha[indices])).max() <= 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})],
    ids=["png", "webp", "tiff"],
)
def test_decode_image_lays_rgba_on_white(kind: str, options: dict[str, Any]) -> None:
    rgba = draw_noise(SIDE, SIDE, 4)
    rgba[:4, :, 3], rgba[4:8, :, 3] = 0, 255
    pixels = decode(save(rgba, kind, **options))
    assert (pixels[:4] == 255).all()
    assert np.array_equal(pixels[4:8], rgba[4:8, :, :3])
    assert np.abs(pixels - lay_on_white(rgba[..., :3], rgba[..., 3])).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_decode_image_lays_grey_with_alpha_on_white(kind: str) -> None:
    grey, alpha = draw_noise(SIDE, SIDE), draw_noise(SIDE, SIDE, seed=1)
    data = save(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), kind)
    assert np.abs(decode(data) - lay_on_white(np.stack([grey] * 3, axis=2), alpha)).max() <= 1


@pytest.mark.parametrize("n_channels", [1, 3], ids=["grey", "rgb"])
def test_decode_image_lays_a_transparent_colour_on_white(n_channels: int) -> None:
    array = np.full((SIDE, SIDE, n_channels), 90, np.uint8)
    array[:5] = 200
    key = 200 if n_channels == 1 else (200, 200, 200)
    pixels = decode(save(array.squeeze(), transparency=key))
    assert (pixels[:5] == 255).all() and (pixels[5:] == 90).all()


def test_decode_image_converts_cmyk() -> None:
    cmyk = draw_noise(SIDE, SIDE, 4)
    ink = cmyk.astype(np.float64) / 255
    expected = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    assert np.abs(decode(save(Image.fromarray(cmyk, "CMYK"), "TIFF")) - expected).max() <= 1


def test_decode_image_converts_cmyk_in_jpeg() -> None:
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (50, 100, 150, 80)]
    for ink in inks:
        data = save(Image.new("CMYK", (SIDE, SIDE), ink), "JPEG", quality=100)
        expected = [255 * (1 - part / 255) * (1 - ink[3] / 255) for part in ink[:3]]
        assert np.abs(decode(data) - np.array(expected)).max() <= 3, ink


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")], ids=["png", "tiff", "tiff-be"]
)
def test_decode_image_keeps_the_upper_bits_of_16_bit_grey(kind: str, mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 65_536, (SIDE, SIDE)).astype(mode)
    values[0, :3] = 0, 255, 65_535
    upper = (values // 256).astype(np.uint8)
    assert np.array_equal(decode(save(values, kind)), np.stack([upper] * 3, axis=2))


def test_decode_image_keeps_the_upper_bits_of_16_bit_colours() -> None:
    values = np.random.default_rng(0).integers(0, 65_536, (SIDE, SIDE, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)  # filter 0 before each row
    data = build_png(SIDE, SIDE, depth=16, rows=rows)
    assert np.array_equal(decode(data), (values // 256).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("WEBP", {"lossless": True, "duration": 100}), ("PNG", {"duration": 100}), ("TIFF", {})],
    ids=["animated webp", "animated png", "multi-page tiff"],
)
def test_decode_image_takes_the_first_frame(kind: str, options: dict[str, Any]) -> None:
    frames = [draw_noise(SIDE, SIDE, 3, seed=seed) for seed in range(3)]
    others = [Image.fromarray(frame) for frame in frames[1:]]
    data = save(frames[0], kind, save_all=True, append_images=others, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames") == 3
    assert np.array_equal(decode(data), frames[0])


@pytest.mark.parametrize("kind", ["BMP", "PNG", "TIFF"])
def test_decode_image_reads_lossless_formats_exactly(kind: str) -> None:
    array = draw_noise(SIDE, SIDE, 3)
    assert np.array_equal(decode(save(array, kind)), array)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "^expected an image, found an empty file$"),
        (b"I am not an image\n" * 50, "^expected a JPEG, PNG, .* or HEIC image, found plain text$"),
        (b"\xff\xd8\xff", "the image is broken: its JPEG header cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "the image is broken: its PNG header cannot be read"),
        (bytes(1000), r"found nothing but zeros \(1,000 bytes\)"),
    ],
    ids=["empty", "text named jpg", "start of jpeg", "start of png", "zeros"],
)
def test_decode_image_says_why_other_files_are_not_images(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        decode(data)
    assert not isinstance(caught.value, ImageTooLargeError)


@pytest.mark.parametrize("kind", ["PPM", "EPS", "ICO", "PDF"])
def test_decode_image_refuses_unsupported_formats(kind: str) -> None:
    data = save(draw_scene(), kind)
    with pytest.raises(ImageError, match="^expected a JPEG, PNG, .* or HEIC image, found an? "):
        decode(data)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9], ids=["a tenth", "half", "most"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000"])
def test_decode_image_refuses_a_truncated_file(kind: str, fraction: float) -> None:
    whole = save(draw_noise(64, 64, 3), kind)
    assert decode(whole).shape == (SIDE, SIDE, 3)
    with pytest.raises(ImageError, match="^the image is broken: .+"):
        decode(whole[: int(len(whole) * fraction)])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("side", "message"),
    [
        (60_000, r"expected at most 50,000,000 pixels \(featurize\.max_pixels\), found more than Pillow can open"),
        (10_000, r"expected at most 50,000,000 pixels \(featurize\.max_pixels\), found 10000 x 10000 = 100,000,000"),
        (7_072, r"expected at most 50,000,000 pixels \(featurize\.max_pixels\), found 7072 x 7072 = 50,013,184"),
    ],
    ids=["60000 px", "10000 px", "7072 px"],
)
def test_decode_image_refuses_an_announced_bomb_without_allocating_it(side: int, message: str) -> None:
    data = build_png(side, side, rows=bytes(1000))
    assert len(data) < 200
    with limited_memory(64 * MIB), pytest.raises(ImageTooLargeError, match=message):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000"])
def test_decode_image_allows_exactly_max_pixels(kind: str) -> None:
    data = save(draw_noise(20, 30, 3), kind)
    assert decode(data, max_pixels=600).shape == (SIDE, SIDE, 3)
    with pytest.raises(ImageTooLargeError, match=r"at most 599 pixels .* found 30 x 20 = 600"):
        decode(data, max_pixels=599)


def test_decode_image_keeps_the_cause() -> None:
    with pytest.raises(ImageError, match="the image is broken: .*truncated") as caught:
        decode(save(draw_noise(64, 64, 3), "JPEG")[:-500])
    assert isinstance(caught.value.__cause__, OSError)


def test_decode_images_continues_after_an_error() -> None:
    one, two = draw_noise(SIDE, SIDE, 3, seed=1), draw_noise(SIDE, SIDE, 3, seed=2)
    files = [save(one), b"", save(draw_noise(40, 40, 3)), save(two)]
    decoded = decode_images(files, size_px=SIDE, max_pixels=SIDE * SIDE)
    assert [type(item) for item in decoded] == [np.ndarray, ImageError, ImageTooLargeError, np.ndarray]
    assert np.array_equal(np.asarray(decoded[0]), one) and np.array_equal(np.asarray(decoded[3]), two)
    assert str(decoded[1]) == "expected an image, found an empty file"


def test_decode_images_accepts_an_empty_list() -> None:
    assert decode_images([], size_px=SIDE, max_pixels=100) == []


def build_seeds() -> list[bytes]:
    scene, exif = draw_scene(48, 32), build_exif(orient(6), (0x8825, 4, 1, struct.pack("<I", 8)))
    return [
        add_exif(save(scene, "JPEG"), exif),
        save(scene, "JPEG", progressive=True),
        save(scene, "PNG", exif=b"Exif\0\0" + exif),
        save(build_palette_image()[0], transparency=3),
        save(scene, "WEBP"),
        save(scene, "TIFF", compression="tiff_lzw"),
        save(scene, "BMP"),
        save(scene, "GIF"),
        save(scene, "AVIF", exif=exif, speed=10),
        save(scene, "JPEG2000"),
    ]


SEEDS = build_seeds()
MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), st.floats(0, 1), st.binary(min_size=1, max_size=4)),
    min_size=1,
    max_size=6,
)


def mutate(data: bytes, mutations: Sequence[tuple[str, float, bytes]]) -> bytes:
    """Change bytes at fractions of the length, half of them among the first 300 bytes, which hold the headers."""
    for kind, fraction, new in mutations:
        length = len(data) if fraction > 0.5 else min(len(data), 300)
        at = int(length * (2 * fraction % 1))
        rest = {"set": data[at + len(new) :], "insert": data[at:], "delete": data[at + 4 * len(new) :], "cut": b""}[
            kind
        ]
        data = data[:at] + (b"" if kind in ("delete", "cut") else new) + rest
    return data


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200)
@given(seed=st.sampled_from(SEEDS), mutations=MUTATIONS)
@example(seed=SEEDS[0], mutations=[("cut", 0.5, b"x")])
def test_decode_image_gives_pixels_or_an_image_error_for_any_bytes(
    seed: bytes, mutations: list[tuple[str, float, bytes]]
) -> None:
    data = mutate(seed, mutations)
    try:
        pixels = decode(data, max_pixels=1_000_000)
    except ImageError as error:
        assert str(error).startswith(("expected ", "the image is broken: "))
        assert "\n" not in str(error)
    else:
        assert (pixels.shape, pixels.dtype) == ((SIDE, SIDE, 3), np.dtype(np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "factor"), [(447, 900, 1), (448, 448, 2), (900, 1800, 4), (1792, 1792, 8), (4000, 4000, 8)]
)
def test_decode_image_fast_shrinks_while_it_decodes(width: int, height: int, factor: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    data = save(image, "JPEG", quality=95)
    fast = decode_image(data, size_px=224, max_pixels=10**8, is_fast=True)
    exact = decode_image(data, size_px=224, max_pixels=10**8)
    with Image.open(io.BytesIO(data)) as shrunk:
        shrunk.draft("RGB", (-(-width // factor), -(-height // factor)))
        assert shrunk.size == (-(-width // factor), -(-height // factor))
        expected = np.asarray(shrunk.resize((224, 224), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(fast, expected)
    assert np.array_equal(fast, exact) == (factor == 1)
    assert np.abs(fast.astype(float) - exact).mean() < 8


def test_decode_image_fast_turns_and_limits_like_exact_decoding() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.new("RGB", (800, 600), (250, 0, 0))
    image.paste((0, 0, 250), (400, 0, 800, 600))
    data = save(image, "JPEG", exif=exif, quality=95)
    upright = decode_image(data, size_px=100, max_pixels=10**6, is_fast=True)
    assert upright[20, 50, 0] > 200 and upright[80, 50, 2] > 200
    with pytest.raises(ImageTooLargeError, match="800 x 600 = 480,000"):
        decode_image(data, size_px=100, max_pixels=400_000, is_fast=True)
    png = save(image, "PNG")
    np.testing.assert_array_equal(
        decode_image(png, size_px=100, max_pixels=10**6, is_fast=True), decode_image(png, size_px=100, max_pixels=10**6)
    )
