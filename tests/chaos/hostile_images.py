"""Images that are broken, or made to crash, stall or exhaust a decoder; each is built on demand."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image, ImageCms, PngImagePlugin

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
END_OF_JPEG = b"\xff\xd9"
#: Types of TIFF's values.
BYTE, SHORT, LONG, RATIONAL = 1, 3, 4, 5
#: A directory's tag, type, count, and its value or what is appended to the file.
Entry = tuple[int, int, int, int | bytes]


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def draw(mode: str = "RGB", side: int = 64) -> Image.Image:
    """Draw smooth colours under a little noise."""
    values = np.linspace(0, 200, side, dtype=np.uint8)[:, np.newaxis, np.newaxis] * np.ones((1, side, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 50, (side, side, 3), np.uint8)
    return Image.fromarray(values + noise).convert(mode)


def deflate_zeros(n_mebibytes: int) -> bytes:
    """Deflate zeros one mebibyte at a time; all compressed pieces but the first are equal."""
    packer, zeros = zlib.compressobj(9), bytes(1 << 20)
    first, other = (packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    checksum = (n_mebibytes << 20) % 65_521 << 16 | 1
    return first + other * (n_mebibytes - 1) + b"\3\0" + struct.pack(">I", checksum)


def build_chunk(name: bytes, data: bytes) -> bytes:
    """Build a chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def build_png(width: int, height: int, rows: bytes, *, colour: int = 0, extra: bytes = b"") -> bytes:
    """Build a PNG; colour is 0 for grey, 2 for RGB, 6 for RGB with alpha."""
    header = build_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return PNG_SIGNATURE + header + extra + build_chunk(b"IDAT", zlib.compress(rows, 9)) + build_chunk(b"IEND", b"")


def build_empty_png(width: int, height: int, *, colour: int = 0, extra: bytes = b"") -> bytes:
    """Build a PNG of zeros."""
    n_channels = {0: 1, 2: 3, 6: 4}[colour]
    return build_png(width, height, bytes((1 + n_channels * width) * height), colour=colour, extra=extra)


def add_to_png(extra: bytes) -> bytes:
    """Build a small PNG with further chunks."""
    return build_empty_png(8, 8, colour=2, extra=extra)


def build_text_bomb(name: bytes, n_mebibytes: int) -> bytes:
    """Build a chunk of text that is long once it is inflated."""
    flags = b"\1\0\0\0" if name == b"iTXt" else b"\0"
    return build_chunk(name, b"Comment\0" + flags + deflate_zeros(n_mebibytes))


def build_segments(payload: bytes, *, part_bytes: int = 65_000) -> bytes:
    """Build segments of EXIF that Pillow joins."""
    parts = [b"Exif\0\0" + payload[at : at + part_bytes] for at in range(0, len(payload), part_bytes)]
    return b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts)


def add_to_jpeg(extra: bytes) -> bytes:
    """Build a small JPEG with further segments."""
    jpeg = save(draw(), "JPEG")
    return jpeg[:2] + extra + jpeg[2:]


def repeat_scan(side: int, n_scans: int) -> bytes:
    """Build a progressive JPEG that repeats its last scan; each repetition goes over all pixels."""
    jpeg = save(Image.new("RGB", (side, side), (9, 99, 200)), "JPEG", progressive=True)
    return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * n_scans + END_OF_JPEG


def build_exif(n_rationals: int) -> bytes:
    """Build EXIF whose orientation is a long list of fractions."""
    entry = struct.pack("<HHII", 0x0112, RATIONAL, n_rationals, 26)
    return b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4 + 8 * n_rationals)


def build_tiff(
    *changes: Entry, side: int = 100, is_tiled: bool = False, data: bytes = b"", following: int = 0
) -> bytes:
    """Build a grey TIFF in one strip or tile; values given as bytes, and then the data, follow the directory."""
    place, size = (0x0144, 0x0145) if is_tiled else (0x0111, 0x0117)
    entries: dict[int, Entry] = {
        tag: (tag, LONG, 1, value)
        for tag, value in ((0x0100, side), (0x0101, side), (0x0102, 8), (0x0103, 1), (0x0106, 1), (0x0115, 1))
    }
    entries |= {place: (place, LONG, 1, b""), size: (size, LONG, 1, len(data))}
    entries |= {change[0]: change for change in changes}
    values, start = b"", 8 + 2 + 12 * len(entries) + 4
    packed = []
    for tag, kind, count, value in sorted(entries.values()):
        if isinstance(value, bytes):
            values, value = values + value, start + len(values)
        packed.append(struct.pack("<HHII", tag, kind, count, value))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(packed) + struct.pack("<I", following)
    return head + values + data


def build_strips(n_strips: int, *, kind: int) -> bytes:
    """Build a TIFF as high as two strips that lists very many."""
    width = {BYTE: 1, LONG: 4}[kind]
    # Growing offsets, so that no strip looks like the one before.
    offsets = np.arange(n_strips, dtype="<u4").astype(f"<u{width}", casting="unsafe").tobytes()
    return build_tiff((0x0111, kind, n_strips, offsets), (0x0116, LONG, 1, 500), side=1000, data=bytes(2_000_000))


def build_frames(n_frames: int, n_value_bytes: int) -> bytes:
    """Build a TIFF of very many frames that all have the same long description."""
    n_before = len(build_tiff(data=bytes(10_000)))
    frames = b"".join(
        struct.pack("<H", 1)
        + struct.pack("<HHII", 0x010E, 2, n_value_bytes, 0)
        + struct.pack("<I", n_before + 18 * number)
        for number in range(1, n_frames + 1)
    )
    return build_tiff(data=bytes(10_000) + frames + bytes(n_value_bytes), following=n_before)


def build_bmp(side: int, *, compression: int, bits: int, rows: bytes) -> bytes:
    """Build a BMP with a palette; compression is 1 for RLE8, 2 for RLE4."""
    palette = bytes(range(4 << bits & 0xFF)) if bits < 8 else bytes(range(256)) * 4
    start = 14 + 40 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows


def widen_webp(side: int) -> bytes:
    """Build a WebP whose canvas is far larger than its picture."""
    webp = bytearray(save(draw("RGBA"), "WEBP", lossless=True, exif=b"Exif\0\0II*\0"))
    webp[24:30] = (side - 1).to_bytes(3, "little") * 2
    return bytes(webp)


def animate(kind: str) -> bytes:
    """Build an animation of 200 frames."""
    frames = [Image.new("RGB", (32, 32), (number, 0, 0)) for number in range(200)]
    return save(frames[0], kind, save_all=True, append_images=frames[1:], duration=10)


def build_profile() -> bytes:
    """Build a colour profile of half a mebibyte, as long as several segments of JPEG."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile + bytes((1 << 19) - len(profile))


def add_text(n_texts: int) -> bytes:
    """Build a PNG with very many comments."""
    texts = PngImagePlugin.PngInfo()
    for number in range(n_texts):
        texts.add_text(f"Comment{number}", "x")
    return save(draw(), "PNG", pnginfo=texts)


def save_heic(image: Image.Image, *, n_bits: int = 8, **options: Any) -> bytes:
    """Encode a HEIC without registering its plugin in Pillow."""
    buffer = io.BytesIO()
    if n_bits == 8:
        pillow_heif.from_pillow(image).save(buffer, **options)
    else:
        values = np.asarray(image.convert("RGB")).astype("<u2") * 257
        pillow_heif.from_bytes("RGB;16", image.size, values.tobytes()).save(buffer, **options)
    return buffer.getvalue()


def build_gif(width: int, height: int, *, extra: bytes = b"", has_palette: bool = True) -> bytes:
    """Build a GIF whose only frame, of 64 x 64 pixels, lies in the corner of a screen of any size."""
    gif = save(draw("P"), "GIF")
    start = gif.index(b",\0\0\0\0\x40\0\x40\0")
    # The screen's size is followed by flags, background and aspect, and then by the palette.
    head = gif[10:start] if has_palette else bytes([gif[10] & 0x7F]) + gif[11:13]
    return b"GIF89a" + struct.pack("<HH", width, height) + head + extra + gif[start:]


def build_comments(n_comments: int, n_blocks: int) -> bytes:
    """Build comments for a GIF, of blocks of 255 bytes."""
    return (b"!\xfe" + (b"\xff" + b"c" * 255) * n_blocks + b"\0") * n_comments


def announce(data: bytes, side: int) -> bytes:
    """Make an AVIF or HEIC announce a size that is not that of its pictures."""
    parts = data.split(b"ispe")
    size = struct.pack(">II", side, side)
    return b"ispe".join([parts[0], *(part[:4] + size + part[12:] for part in parts[1:])])


def change_jpeg2000(*changes: tuple[bytes, int, bytes], side: int = 64) -> bytes:
    """Change bytes behind markers in the main header of a JPEG 2000 codestream."""
    data = save(draw(side=side), "JPEG2000", no_jp2=True)
    for marker, at, new in changes:
        start = data.index(marker) + 2 + at
        data = data[:start] + new + data[start + len(new) :]
    return data


#: Markers of a JPEG 2000: of the sizes of image, tiles and channels; of layers, levels and sizes of blocks.
SIZE, CODING = b"\xff\x51", b"\xff\x52"
LARGE = SIZE, 4, struct.pack(">6I", 3_000, 3_000, 0, 0, 3_000, 3_000)


#: Files by name, and their expected outcome: ``ok``, ``unreadable``, ``too_large``; None where either of the first
#: two will do.
FILES: dict[str, tuple[str | None, Callable[[], bytes]]] = {
    "png-bomb-60000-px": ("too_large", lambda: build_png(60_000, 60_000, bytes(1000))),
    "png-bomb-2-billion-px": ("too_large", lambda: build_png(2**31 - 1, 2**31 - 1, bytes(1000))),
    "png-49-megapixels-in-48-kB": ("ok", lambda: build_empty_png(7_000, 7_000)),
    "png-49-megapixels-transparent": ("ok", lambda: build_empty_png(7_000, 7_000, colour=6)),
    "png-one-pixel-high": ("too_large", lambda: build_empty_png(49_000_000, 1)),
    "png-one-pixel-wide": ("too_large", lambda: build_empty_png(1, 49_000_000)),
    "png-widest": ("ok", lambda: build_empty_png(65_535, 2)),
    "png-zero-size": ("unreadable", lambda: build_png(0, 0, b"")),
    "png-too-few-rows": ("unreadable", lambda: build_png(7_000, 7_000, bytes(1000))),
    "png-too-many-rows": ("ok", lambda: build_png(8, 8, bytes(50_000_000))),
    "png-ztxt-bomb": ("unreadable", lambda: add_to_png(build_text_bomb(b"zTXt", 500))),
    "png-itxt-bomb": ("unreadable", lambda: add_to_png(build_text_bomb(b"iTXt", 500))),
    "png-many-text-bombs": ("unreadable", lambda: add_to_png(build_text_bomb(b"zTXt", 1) * 4_000)),
    "png-many-texts": ("ok", lambda: add_text(20_000)),
    "png-profile-bomb": (
        "unreadable",
        lambda: add_to_png(build_chunk(b"iCCP", b"a\0\0" + deflate_zeros(256))),
    ),
    "png-many-profiles": (
        "unreadable",
        lambda: add_to_png(build_chunk(b"iCCP", b"a\0\0" + deflate_zeros(1)) * 8_000),
    ),
    "png-many-chunks": ("ok", lambda: add_to_png(build_chunk(b"prVt", b"") * 80_000)),
    "png-fractions-for-orientation": ("ok", lambda: add_to_png(build_chunk(b"eXIf", build_exif(150_000)))),
    "png-animated": ("ok", lambda: animate("PNG")),
    "jpeg-many-scans": ("unreadable", lambda: repeat_scan(7_000, 2_000)),
    "jpeg-most-scans": ("ok", lambda: repeat_scan(500, 90)),
    "jpeg-video-behind": (
        "ok",
        lambda: save(draw(), "JPEG") + np.random.default_rng(0).integers(0, 256, 20_000_000, np.uint8).tobytes(),
    ),
    "jpeg-many-exif-segments": ("unreadable", lambda: add_to_jpeg(build_segments(bytes(1_200_000), part_bytes=4))),
    "jpeg-enormous-exif": ("ok", lambda: add_to_jpeg(build_segments(build_exif(150_000)))),
    "jpeg-padding": ("ok", lambda: add_to_jpeg(b"\xff" * 800_000)),
    "jpeg-huge-profile": ("ok", lambda: save(draw(), "JPEG", icc_profile=build_profile())),
    "jpeg-announces-65500-px": (
        "too_large",
        lambda: save(draw(), "JPEG").replace(b"\x08\x00\x40\x00\x40\x03", b"\x08\xff\xdc\xff\xdc\x03"),
    ),
    "tiff-many-strips": ("unreadable", lambda: build_strips(500_000, kind=LONG)),
    "tiff-many-byte-strips": ("unreadable", lambda: build_strips(5_000_000, kind=BYTE)),
    "tiff-strips-over-each-other": ("unreadable", lambda: build_strips(200_000, kind=LONG)),
    "tiff-huge-tile": (
        "unreadable",
        lambda: build_tiff(
            (0x0103, SHORT, 1, 8),
            (0x0142, LONG, 1, 60_000),
            (0x0143, LONG, 1, 60_000),
            is_tiled=True,
            data=deflate_zeros(100),
        ),
    ),
    "tiff-compression-bomb": (
        None,
        lambda: build_tiff((0x0103, SHORT, 1, 8), (0x0116, LONG, 1, 2**32 - 1), data=deflate_zeros(200)),
    ),
    "tiff-announces-4-billion-px": ("too_large", lambda: build_tiff(side=65_536, data=bytes(100))),
    "tiff-zero-size": ("unreadable", lambda: build_tiff(side=0, data=bytes(100))),
    "tiff-no-data": ("unreadable", lambda: build_tiff()),
    "tiff-fractions": (
        "ok",
        lambda: build_tiff((0x9000, RATIONAL, 500_000, bytes(4_000_000)), data=bytes(10_000)),
    ),
    "tiff-many-frames": ("ok", lambda: build_frames(20_000, 2)),
    "tiff-many-frames-of-long-texts": ("ok", lambda: build_frames(20_000, 1_000_000)),
    "tiff-many-pages": ("ok", lambda: animate("TIFF")),
    "tiff-circle": ("ok", lambda: build_tiff(data=bytes(10_000), following=8)),
    "bmp-rle8-one-pixel-a-row": ("ok", lambda: build_bmp(3_000, compression=1, bits=8, rows=b"\1\1\0\0" * 3_000)),
    "bmp-rle8-jumps": (None, lambda: build_bmp(7_000, compression=1, bits=8, rows=b"\0\2\xff\xff" * 1_000)),
    "bmp-announces-4-billion-px": ("too_large", lambda: build_bmp(65_536, compression=1, bits=8, rows=b"\0\1")),
    "webp-49-megapixels-in-2-kB": ("ok", lambda: save(Image.new("RGB", (16_383, 3_000)), "WEBP", lossless=True)),
    "webp-wide-canvas": (None, lambda: widen_webp(13_000)),
    "webp-widest-canvas": ("too_large", lambda: widen_webp(1 << 24)),
    "webp-animated": ("ok", lambda: animate("WEBP")),
    "gif-wide-screen": ("ok", lambda: build_gif(3_000, 3_000)),
    "gif-widest-screen": ("too_large", lambda: build_gif(65_535, 65_535)),
    "gif-49-megapixels": ("ok", lambda: save(Image.new("P", (7_000, 7_000)), "GIF")),
    "gif-many-comments": ("unreadable", lambda: build_gif(64, 64, extra=build_comments(100_000, 1))),
    "gif-endless-comment": ("unreadable", lambda: build_gif(64, 64, extra=build_comments(1, 100_000))),
    "gif-long-comment": ("ok", lambda: build_gif(64, 64, extra=build_comments(1, 60_000))),
    "gif-without-palette": ("unreadable", lambda: build_gif(64, 64, has_palette=False)),
    "gif-animated": ("ok", lambda: animate("GIF")),
    "avif-announces-much": ("too_large", lambda: announce(save(draw(), "AVIF"), 12_000)),
    "avif-announces-little": (None, lambda: announce(save(Image.new("RGB", (4_000, 4_000)), "AVIF", speed=10), 64)),
    "avif-no-picture": ("unreadable", lambda: save(draw(), "AVIF")[:32]),
    "heic-announces-much": ("too_large", lambda: announce(save_heic(draw()), 30_000)),
    "heic-announces-little": ("unreadable", lambda: announce(save_heic(Image.new("RGB", (2_000, 2_000))), 64)),
    "heic-400-tiles": ("ok", lambda: save_heic(Image.new("RGB", (1_280, 1_280)), tile_size=64)),
    "heic-compressed-metadata": (
        "unreadable",
        lambda: save_heic(draw(), xmp=b"<x:xmpmeta/>").replace(b"rdf+xml\0", b"rdf+x\0d\0"),
    ),
    "heic-start-of-a-file": ("unreadable", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)),
    "jpeg2000-4-megapixels": ("ok", lambda: save(Image.new("RGB", (2_000, 2_000)), "JPEG2000")),
    "jpeg2000-many-tiles": ("unreadable", lambda: change_jpeg2000((SIZE, 20, struct.pack(">II", 1, 1)), side=200)),
    "jpeg2000-huge-tiles": (None, lambda: change_jpeg2000((SIZE, 20, struct.pack(">II", 2**31, 2**31)))),
    "jpeg2000-many-channels": ("unreadable", lambda: change_jpeg2000((SIZE, 36, struct.pack(">H", 16_384)))),
    "jpeg2000-no-tiles": ("unreadable", lambda: change_jpeg2000((SIZE, 20, bytes(8)))),
    "jpeg2000-announces-4-billion-px": (
        "too_large",
        lambda: change_jpeg2000((SIZE, 4, struct.pack(">6I", 65_535, 65_535, 0, 0, 65_535, 65_535))),
    ),
    "jpeg2000-many-layers": (None, lambda: change_jpeg2000((CODING, 4, b"\xff\xff"))),
    "jpeg2000-most-levels": (None, lambda: change_jpeg2000((CODING, 7, b"\x20"))),
    "jpeg2000-many-blocks": ("unreadable", lambda: change_jpeg2000(LARGE, (CODING, 8, bytes(2)))),
    "jpeg2000-small-precincts": (
        "ok",
        lambda: save(Image.new("RGB", (600, 600)), "JPEG2000", precinct_size=(4, 4), codeblock_size=(4, 4)),
    ),
    "gif-named-jpg": ("ok", lambda: save(draw(), "GIF")),
    "postscript-named-jpg": (
        "unreadable",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    ),
    "html-in-jpeg": ("ok", lambda: add_to_jpeg(b"\xff\xfe\x00\x22<script>alert('harm')</script>  ")),
    "jpeg-and-zip": ("ok", lambda: save(draw(), "JPEG") + b"PK\3\4" + bytes(1000)),
    "jpeg-behind-html": ("unreadable", lambda: b"<html>" + save(draw(), "JPEG")),
    "png-in-jpeg-name": ("unreadable", lambda: b"\xff\xd8\xff" + save(draw(), "PNG")),
    "empty": ("unreadable", lambda: b""),
    "zeros": ("unreadable", lambda: bytes(1_000_000)),
}


def build_seeds() -> list[bytes]:
    """Build images of every format in several ways, to be truncated and mutated."""
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Jo Smith"
    picture = draw()
    seeds = [
        save(picture, "JPEG", exif=exif, xmp=b"<x:xmpmeta/>", icc_profile=build_profile()[:3000]),
        save(picture, "JPEG", progressive=True, quality=30),
        save(draw("L"), "JPEG", optimize=True),
        save(draw("CMYK"), "JPEG"),
        save(picture, "PNG", exif=exif),
        save(draw("P"), "PNG", transparency=3),
        save(draw("RGBA", 16), "PNG", save_all=True, append_images=[draw("RGBA", 16)] * 2),
        save(picture, "WEBP", exif=exif, xmp=b"<x:xmpmeta/>"),
        save(draw("RGBA"), "WEBP", lossless=True),
        save(picture, "WEBP", save_all=True, append_images=[draw("L").convert("RGB")] * 2),
        save(picture, "BMP"),
        save(draw("P"), "BMP"),
        build_bmp(32, compression=1, bits=8, rows=(b"\x20\5\0\0" + b"\3\1\0\2\5\1\0\4abcd\0\0") * 16),
        build_bmp(32, compression=2, bits=4, rows=b"\x20\x12\0\0" * 32),
    ]
    packet = b"<x:xmpmeta/>"
    seeds += [
        save(draw("P"), "GIF", transparency=3, comment=b"a" * 300),
        save(picture, "GIF", save_all=True, append_images=[draw("L").convert("RGB")] * 2),
        save(picture, "AVIF", exif=exif, xmp=packet),
        save(draw("RGBA"), "AVIF", speed=10),
        save(picture, "AVIF", save_all=True, append_images=[draw("L").convert("RGB")] * 2, speed=10),
        save(picture, "JPEG2000"),
        save(draw("RGBA"), "JPEG2000", quality_layers=[40, 10]),
        save(draw("I;16"), "JPEG2000", no_jp2=True),
        save(picture, "JPEG2000", no_jp2=True, tile_size=(32, 32), irreversible=True, codeblock_size=(16, 16)),
        save_heic(picture, exif=exif.tobytes(), xmp=packet),
        save_heic(draw("RGBA")),
        save_heic(draw(side=200), tile_size=64),
        save_heic(picture, n_bits=10),
    ]
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "lzma"):
        seeds.append(save(picture, "TIFF", compression=compression, exif=exif))
    seeds.append(save(draw("1"), "TIFF", compression="group4"))
    seeds.append(save(picture, "TIFF", save_all=True, append_images=[picture], big_tiff=True))
    return seeds


def truncate_seeds() -> Iterator[bytes]:
    """Cut every seed at many places."""
    for seed in build_seeds():
        for number in range(40):
            yield seed[: len(seed) * number // 40]
