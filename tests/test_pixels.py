"""Tests of pixels: every kind that a header can define gives its colours, all others are refused with a reason. Files
are made by hand.
"""

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from fruitdask.errors import ImageError
from fruitdask.worker.images import decode_image, read_header

Array = npt.NDArray[Any]

SIDE = 16
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, CHANNELS = 256, 257, 258, 259, 262, 266, 277
PLANAR, COLOUR_MAP, INK_SET, EXTRA, FORMAT, SUBSAMPLING, REFERENCE = 284, 320, 332, 338, 339, 530, 532
STRIP, STRIP_BYTES, DEFLATE, DOT_RANGE = 273, 279, 8, 336


def decode(data: bytes) -> Array:
    return decode_image(data, size_px=SIDE, max_pixels=1_000_000)


def draw(*channels: int, bits: int = 8, seed: int = 0) -> Array:
    """Draw noise with the smallest and the largest number in it."""
    kind = np.uint8 if bits <= 8 else np.uint16
    noise = np.random.default_rng(seed).integers(0, 1 << bits, (SIDE, SIDE, *channels)).astype(kind)
    noise[0, 0], noise[0, 1] = 0, (1 << bits) - 1
    return noise


def pack(samples: Array, bits: int) -> bytes:
    """Pack samples of fewer bits than their type, the first one in the highest bits; each row starts a new byte."""
    rows = samples.reshape(samples.shape[0], -1)
    planes = (rows[..., None] >> np.arange(bits)[::-1]) & 1
    return np.packbits(planes.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def build_tiff(*planes: bytes, order: str = "<", **tags: Any) -> bytes:
    """Build a TIFF in one strip per plane; tags are named tag_<number>, their values shorts."""
    values: dict[int, tuple[int, ...]] = {
        WIDTH: (SIDE,),
        HEIGHT: (SIDE,),
        BITS: (8,),
        COMPRESSION: (1,),
        CHANNELS: (1,),
    }
    values[PHOTOMETRIC] = (1,)
    for name, value in tags.items():
        values[int(name[4:])] = value if isinstance(value, tuple) else (value,)
    if values[COMPRESSION] == (DEFLATE,):
        planes = tuple(zlib.compress(plane) for plane in planes)
    values = {tag: value for tag, value in values.items() if value != (None,)}
    start = 8 + 2 + 12 * (len(values) + 2) + 4
    body, packed = b"".join(planes), {}
    offsets = tuple(start + sum(map(len, planes[:number])) for number in range(len(planes)))
    longs = {STRIP: offsets, STRIP_BYTES: tuple(map(len, planes))}
    for tag, value in sorted((values | longs).items()):
        kind, letter = (4, "I") if tag in longs else (3, "H")
        content = struct.pack(f"{order}{len(value)}{letter}", *value)
        if len(content) > 4:
            body += content
            content = struct.pack(order + "I", start + len(body) - len(content))
        packed[tag] = struct.pack(order + "HHI", tag, kind, len(value)) + content.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(packed))
    return head + b"".join(packed.values()) + bytes(4) + body


def tiff(samples: Array, *, order: str = "<", bits: int | None = None, is_planar: bool = False, **tags: Any) -> bytes:
    """Build a TIFF of an array, with a channel in its last axis where it has three."""
    n_channels = samples.shape[2] if samples.ndim == 3 else 1
    stored = samples.astype(samples.dtype.newbyteorder(order))
    bits = bits or 8 * samples.dtype.itemsize
    if bits % 8 or bits < 8 * samples.dtype.itemsize:
        planes = [pack(samples, bits)]
    else:
        planes = [stored[..., number].tobytes() for number in range(n_channels)] if is_planar else [stored.tobytes()]
    defaults = {f"tag_{BITS}": (bits,) * n_channels, f"tag_{CHANNELS}": n_channels}
    defaults |= {f"tag_{PLANAR}": 2} if is_planar else {}
    return build_tiff(*planes, order=order, **(defaults | tags))


def grey(values: Array) -> Array:
    return np.repeat(np.asarray(values, np.float64)[..., None], 3, axis=2)


def lay_on_white(colours: Array, alpha: Array, *, is_multiplied: bool = False) -> Array:
    """Blend with white by the formula of Porter and Duff."""
    opacity = np.asarray(alpha, np.float64)[..., None] / 255
    return np.asarray(colours * (1 if is_multiplied else opacity) + 255 * (1 - opacity))


def ink(cmyk: Array) -> Array:
    share = cmyk.astype(np.float64) / 255
    return np.asarray(255 * (1 - share[..., :3]) * (1 - share[..., 3:]))


def flip_bits(data: bytes) -> bytes:
    return bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


#: Name: the file, the colours, and the largest error of Pillow's rounding.
GOOD: dict[str, tuple[bytes, Array, float]] = {}
#: Name: the file, and the message of its refusal.
BAD: dict[str, tuple[bytes, str]] = {}

G8, G16, RGB8, RGB16, ALPHA = draw(), draw(bits=16), draw(3), draw(3, bits=16), draw(seed=1)
BOTH = {"little": "<", "big": ">"}
PACKINGS: dict[str, dict[str, Any]] = {"plain": {}, "deflated": {"tag_259": DEFLATE}}


def add_grey_tiffs() -> None:
    for bits in (1, 2, 4, 8, 16):
        samples = draw(bits=bits)
        # Fewer bits spread over 0 to 255; of 16 the upper 8 stay.
        shown = samples >> 8 if bits == 16 else samples.astype(float) * 255 / ((1 << bits) - 1)
        for order_name, order in BOTH.items():
            for packing, options in PACKINGS.items():
                name = f"tiff grey {bits} bits {order_name} {packing}"
                data = tiff(samples, order=order, bits=bits, **options)
                GOOD[name] = data, grey(shown), 0
                white = tiff(samples, order=order, bits=bits, tag_262=0, **options)
                if bits == 16 and order == ">":
                    found = r"a TIFF of 1 channel of 16 bits \(compression \d+, photometric interpretation 0\), which"
                    BAD[name + " white is zero"] = white, found
                else:
                    GOOD[name + " white is zero"] = white, grey(255 - shown), 0
    for packing, options in PACKINGS.items():
        samples = draw(bits=12)
        GOOD[f"tiff grey 12 bits {packing}"] = tiff(samples, bits=12, **options), grey(samples >> 4), 0
        BAD[f"tiff grey 12 bits big {packing}"] = (
            tiff(samples, bits=12, order=">", **options),
            "found a TIFF of 1 channel of 12 bits",
        )
    flipped = build_tiff(flip_bits(G8.tobytes()), tag_266=2)
    GOOD["tiff grey 8 bits lowest bit first"] = flipped, grey(G8), 0
    flipped = build_tiff(flip_bits(G16.tobytes()), tag_266=2, tag_258=16)
    GOOD["tiff grey 16 bits lowest bit first"] = flipped, grey(G16 >> 8), 0


def add_signed_tiffs() -> None:
    positive = draw(bits=15).astype(np.int16)
    small = draw(bits=7).astype(np.int8)
    for order_name, order in BOTH.items():
        for packing, options in PACKINGS.items():
            name = f"signed {order_name} {packing}"
            GOOD[f"tiff 16 bits {name}"] = tiff(positive, order=order, tag_339=2, **options), grey(positive >> 7), 0
            GOOD[f"tiff 8 bits {name}"] = tiff(small, order=order, tag_339=2, **options), grey(small * (255 / 127)), 0.7
            BAD[f"tiff 16 bits below zero {name}"] = (
                tiff(positive - 1, order=order, tag_339=2, **options),
                "found a TIFF with signed numbers below zero",
            )
            BAD[f"tiff 8 bits below zero {name}"] = (
                tiff(small - 1, order=order, tag_339=2, **options),
                "found a TIFF with signed numbers below zero",
            )
    BAD["tiff rgb signed"] = (
        tiff(RGB8.astype(np.int8), tag_339=(2, 2, 2), tag_262=2),
        "found a TIFF of 3 channels of signed",
    )


def add_numbers_without_range() -> None:
    for kind, code, name in (
        (np.float16, 3, "floating-point numbers of 16 bits"),
        (np.float32, 3, "floating-point numbers of 32 bits"),
        (np.float64, 3, "floating-point numbers of 64 bits"),
        (np.int32, 2, "integers of 32 bits"),
        (np.uint32, 1, "integers of 32 bits"),
        (np.uint64, 1, "integers of 64 bits"),
        (np.uint8, 4, "undefined numbers of 8 bits"),
        (np.complex64, 6, "complex numbers of 64 bits"),
    ):
        for order_name, order in BOTH.items():
            for packing, options in PACKINGS.items():
                data = tiff(G8.astype(kind), order=order, tag_339=code, **options)
                BAD[f"tiff {name} {order_name} {packing}"] = data, f"found a TIFF of {name}"
    rgb = RGB8.astype(np.float32) / 255
    BAD["tiff rgb of floating-point numbers"] = (
        tiff(rgb, tag_339=(3, 3, 3), tag_262=2),
        "floating-point numbers of 32 bits",
    )
    BAD["tiff white is zero, floating-point"] = tiff(G8.astype(np.float32), tag_339=3, tag_262=0), "floating-point"


def add_colour_tiffs() -> None:
    rgba = np.dstack([RGB8, ALPHA])
    multiplied = np.dstack([(RGB8.astype(int) * ALPHA[..., None] // 255).astype(np.uint8), ALPHA])
    six = np.dstack([rgba, G8, G8])
    for order_name, order in BOTH.items():
        for packing, options in PACKINGS.items():
            for planar in (False, True):
                name = f"{order_name} {packing} {'planes' if planar else 'pixels'}"
                more: dict[str, Any] = {"order": order, "is_planar": planar, "tag_262": 2, **options}
                GOOD[f"tiff rgb {name}"] = tiff(RGB8, **more), RGB8, 0
                wide = tiff(RGB16, **more)
                if planar and packing == "plain":
                    BAD[f"tiff rgb 16 bits {name}"] = wide, "found a TIFF of uncompressed planes of 16 bits"
                else:
                    GOOD[f"tiff rgb 16 bits {name}"] = wide, RGB16 >> 8, 0
                GOOD[f"tiff rgb with alpha {name}"] = tiff(rgba, tag_338=2, **more), lay_on_white(RGB8, ALPHA), 1
                spare, nameless = tiff(rgba, tag_338=0, **more), tiff(rgba, **more)
                if planar and packing == "plain":
                    BAD[f"tiff rgb with a channel {name}"] = spare, "found a TIFF of 4 channels of 8 bits"
                else:
                    GOOD[f"tiff rgb with a channel {name}"] = spare, RGB8, 0
                if planar and packing == "deflated":
                    BAD[f"tiff rgb with a nameless channel {name}"] = (
                        nameless,
                        "found a TIFF of compressed planes: the file",
                    )
                else:
                    GOOD[f"tiff rgb with a nameless channel {name}"] = nameless, RGB8, 0
                if not planar:
                    expected = lay_on_white(multiplied[..., :3], ALPHA, is_multiplied=True)
                    GOOD[f"tiff rgb multiplied with alpha {name}"] = tiff(multiplied, tag_338=1, **more), expected, 1.1
                    GOOD[f"tiff rgb and two channels {name}"] = tiff(six[..., :5], tag_338=(0, 0), **more), RGB8, 0
                    GOOD[f"tiff rgb, alpha, channels {name}"] = (
                        tiff(six, tag_338=(2, 0, 0), **more),
                        lay_on_white(RGB8, ALPHA),
                        1,
                    )
    BAD["tiff 5 nameless channels"] = tiff(six[..., :5], tag_262=2), "found a TIFF of 5 channels of 8 bits"
    BAD["tiff depths that differ"] = (
        tiff(RGB8, tag_262=2, tag_258=(8, 8, 16)),
        r"channels of different depths \(8, 8, 16 bits\)",
    )


def add_other_tiffs() -> None:
    two = np.dstack([G8, ALPHA])
    GOOD["tiff grey and a channel"] = tiff(two, tag_338=0), grey(G8), 0
    GOOD["tiff grey with alpha"] = tiff(two, tag_338=2), lay_on_white(grey(G8), ALPHA), 1
    multiplied = np.dstack([(G8.astype(int) * ALPHA // 255).astype(np.uint8), ALPHA])
    expected = lay_on_white(grey(multiplied[..., 0]), ALPHA, is_multiplied=True)
    GOOD["tiff grey multiplied with alpha"] = tiff(multiplied, tag_338=1), expected, 1.1
    colours = np.random.default_rng(3).integers(0, 65_536, (256, 3))
    for bits in (1, 2, 4, 8):
        indices, palette = draw(bits=bits), colours[: 1 << bits]
        data = tiff(indices, bits=bits, tag_262=3, tag_320=tuple(palette.T.ravel().tolist()))
        GOOD[f"tiff palette {bits} bits"] = data, palette[indices] // 256, 0
    narrow = tuple((colours.T.ravel() // 256).tolist())
    BAD["tiff palette of 8 bits"] = (
        tiff(G8, tag_262=3, tag_320=narrow),
        "found a TIFF of palette colours that are all but black",
    )
    cmyk = draw(4)
    GOOD["tiff cmyk"] = tiff(cmyk, tag_262=5), ink(cmyk), 1
    GOOD["tiff cmyk planes"] = tiff(cmyk, tag_262=5, is_planar=True), ink(cmyk), 1
    GOOD["tiff cmyk 16 bits"] = tiff(cmyk.astype(np.uint16) << 8, tag_262=5), ink(cmyk), 1
    BAD["tiff other inks"] = tiff(cmyk, tag_262=5, tag_332=2), "found a TIFF of inks other than"
    BAD["tiff inks upside down"] = tiff(cmyk, tag_262=5, tag_336=(255, 0)), "found a TIFF of inks other than"
    ycbcr = np.asarray(Image.fromarray(RGB8).convert("YCbCr"))
    back = np.asarray(Image.fromarray(ycbcr, "YCbCr").convert("RGB"))
    GOOD["tiff ycbcr"] = tiff(ycbcr, tag_262=6, tag_530=(1, 1)), back, 0
    BAD["tiff ycbcr that is coarser"] = (
        tiff(ycbcr, tag_262=6),
        "found a TIFF of uncompressed YCbCr with subsampled channels",
    )
    BAD["tiff ycbcr planes"] = tiff(ycbcr, tag_262=6, tag_530=(1, 1), is_planar=True), "uncompressed planes of 8 bits"
    GOOD["tiff ycbcr deflated"] = tiff(ycbcr, tag_262=6, tag_530=(1, 1), tag_259=DEFLATE), back, 2
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    smooth = Image.fromarray(np.linspace(20, 230, SIDE * SIDE * 3).reshape(SIDE, SIDE, 3).astype(np.uint8))
    in_lab = ImageCms.applyTransform(smooth, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    assert in_lab is not None
    GOOD["tiff lab"] = save(in_lab, "TIFF"), np.asarray(smooth), 3
    for code, name in ((4, "transparency masks"), (9, "ICC L"), (10, "ITU L"), (32803, "a camera's raw samples")):
        BAD[f"tiff photometric {code}"] = tiff(G8, tag_262=code), f"found a TIFF of {name}"
    BAD["tiff without photometric"] = (
        tiff(G8, tag_262=None),
        "found a TIFF of samples without a photometric interpretation",
    )
    BAD["tiff thumbnail of another page"] = tiff(RGB8, tag_262=2, tag_254=1, tag_330=8), "found a TIFF of several pages"
    GOOD["tiff that only says that it is a thumbnail"] = tiff(RGB8, tag_262=2, tag_254=1), RGB8, 0
    BAD["tiff of a dng"] = tiff(RGB8, tag_262=2, tag_50706=(1, 4)), r"found a TIFF of a camera's raw file \(DNG\)"


def png(samples: Array, *, depth: int, colour: int, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """Build a PNG by hand."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        rows = [pack(row[None], depth) for row in samples]
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, 0)
    before = b"".join(chunk(*each) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def add_pngs() -> None:
    for depth in (1, 2, 4, 8, 16):
        samples = draw(bits=depth)
        shown = grey(samples >> 8 if depth == 16 else samples.astype(float) * 255 / ((1 << depth) - 1))
        GOOD[f"png grey {depth} bits"] = png(samples, depth=depth, colour=0), shown, 0
        significant = ((b"sBIT", bytes([max(depth - 4, 1)])),)
        GOOD[f"png grey {depth} bits, fewer of them significant"] = (
            png(samples, depth=depth, colour=0, chunks=significant),
            shown,
            0,
        )
        for key in (0, 1, (1 << depth) - 1):
            masked = np.where((samples == key)[..., None], 255.0, shown)
            chunks = ((b"tRNS", struct.pack(">H", key)),)
            GOOD[f"png grey {depth} bits, {key} transparent"] = (
                png(samples, depth=depth, colour=0, chunks=chunks),
                masked,
                0,
            )
        if depth <= 8:
            palette = draw(3, seed=5).reshape(-1, 3)[: 1 << depth]
            chunks = ((b"PLTE", palette.tobytes()), (b"tRNS", b"\0"))
            alpha = np.where(samples == 0, 0, 255)
            expected = lay_on_white(palette[samples], alpha)
            GOOD[f"png palette {depth} bits"] = png(samples, depth=depth, colour=3, chunks=chunks), expected, 0
    two, four = draw(2), draw(4)
    for depth, factor in ((8, 1), (16, 257)):
        wide = np.uint8 if depth == 8 else np.uint16
        GOOD[f"png grey with alpha {depth} bits"] = (
            png(two.astype(wide) * wide(factor), depth=depth, colour=4),
            lay_on_white(grey(two[..., 0]), two[..., 1]),
            1,
        )
        GOOD[f"png rgb with alpha {depth} bits"] = (
            png(four.astype(wide) * wide(factor), depth=depth, colour=6),
            lay_on_white(four[..., :3], four[..., 3]),
            1,
        )
        GOOD[f"png rgb {depth} bits"] = png(RGB8.astype(wide) * wide(factor), depth=depth, colour=2), RGB8, 0
    key = struct.pack(">3H", *(int(value) for value in RGB16[3, 3]))
    absent = struct.pack(">3H", 1, 300, 70)
    GOOD["png rgb 16 bits, an absent colour transparent"] = (
        png(RGB16, depth=16, colour=2, chunks=((b"tRNS", absent),)),
        RGB16 >> 8,
        0,
    )
    BAD["png rgb 16 bits, a colour transparent"] = (
        png(RGB16, depth=16, colour=2, chunks=((b"tRNS", key),)),
        "found a PNG of 16 bits whose transparent colour",
    )


def add_jpegs() -> None:
    flat = Image.new("CMYK", (SIDE, SIDE), (50, 100, 150, 80))
    jpeg = save(flat, "JPEG", quality=100)
    GOOD["jpeg cmyk of adobe"] = jpeg, ink(np.asarray(flat)), 3
    start = jpeg.index(b"\xff\xee")
    bare = jpeg[:start] + jpeg[start + 16 :]
    BAD["jpeg cmyk without a word of adobe"] = bare, "found a JPEG with four channels that does not say"
    twelve = save(Image.fromarray(RGB8), "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c")
    BAD["jpeg of 12 bits"] = twelve, "found a JPEG with 3 of 12 bits"


def jp2(samples: Array, *, colour: int | None = None, n_bits: int | None = None, alpha: bool = True) -> bytes:
    """Encode a JPEG 2000 with Pillow; then change what its boxes and its codestream say."""
    data = save(Image.fromarray(samples), "JPEG2000")
    if colour is not None:
        start = data.index(b"colr") + 7
        data = data[:start] + struct.pack(">I", colour) + data[start + 4 :]
    if not alpha:
        data = data.replace(b"cdef", b"free")
    if n_bits is not None:
        start = data.index(b"\xff\x51") + 2 + 38
        n_channels = 1 if samples.ndim == 2 else samples.shape[2]
        changed = bytearray(data)
        changed[start : start + 3 * n_channels : 3] = bytes([n_bits]) * n_channels
        data = bytes(changed)
    return data


def add_jpeg2000s() -> None:
    rgba, two = np.dstack([RGB8, ALPHA]), np.dstack([G8, ALPHA])
    GOOD["jpeg 2000 grey"] = jp2(G8), grey(G8), 0
    GOOD["jpeg 2000 grey 16 bits"] = jp2(G16), grey(G16 >> 8), 0
    GOOD["jpeg 2000 rgb"] = jp2(RGB8), RGB8, 0
    GOOD["jpeg 2000 rgb, bare"] = save(Image.fromarray(RGB8), "JPEG2000", no_jp2=True), RGB8, 0
    GOOD["jpeg 2000 rgb with alpha"] = jp2(rgba), lay_on_white(RGB8, ALPHA), 1
    GOOD["jpeg 2000 grey with alpha"] = save(Image.fromarray(two, "LA"), "JPEG2000"), lay_on_white(grey(G8), ALPHA), 1
    cmyk = draw(4)
    GOOD["jpeg 2000 cmyk"] = save(Image.fromarray(cmyk, "CMYK"), "JPEG2000"), ink(cmyk), 1
    ycbcr = Image.fromarray(RGB8).convert("YCbCr")
    GOOD["jpeg 2000 ycbcr"] = save(ycbcr, "JPEG2000"), np.asarray(ycbcr.convert("RGB")), 1
    BAD["jpeg 2000 rgb 16 bits"] = jp2(RGB8, n_bits=15), "found one with 3 channels of 16 bits"
    BAD["jpeg 2000 signed"] = jp2(G8, n_bits=0x87), "found one with signed numbers"
    BAD["jpeg 2000 lab"] = jp2(RGB8, colour=14), "found one with colour space 14"
    BAD["jpeg 2000 nameless fourth channel"] = (
        jp2(rgba, alpha=False),
        "found one with 4 channels .the file does not say",
    )
    BAD["jpeg 2000 rgb with alpha, bare"] = (
        save(Image.fromarray(rgba), "JPEG2000", no_jp2=True),
        "found one with 4 channels .the file does not say",
    )


for add in (
    add_grey_tiffs,
    add_signed_tiffs,
    add_numbers_without_range,
    add_colour_tiffs,
    add_other_tiffs,
    add_pngs,
    add_jpegs,
    add_jpeg2000s,
):
    add()


@pytest.mark.parametrize("name", GOOD)
def test_decode_image_gives_the_colours_that_the_header_defines(name: str) -> None:
    data, expected, tolerance = GOOD[name]
    np.testing.assert_allclose(decode(data).astype(float), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", BAD)
def test_decode_image_refuses_pixels_without_defined_colours(name: str) -> None:
    data, message = BAD[name]
    with pytest.raises(ImageError, match=message) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_read_header_names_pixels_that_are_not_decoded() -> None:
    data, _ = BAD["tiff floating-point numbers of 32 bits little plain"]
    assert read_header(data) == ("TIFF", SIDE, SIDE)
