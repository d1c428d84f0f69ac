"""Tests of the metadata census: files that Pillow writes, blocks made by hand, and files that are broken or hostile."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chaos.hostile_images import save_heic
from hypothesis import example, given, settings, strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin

from fruitdask.worker.metadata import KINDS, find_metadata

FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIC"]
XMP_KEY = "XML:com.adobe.xmp"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

ORIENTATION, MAKE, ARTIST, HOST, COPYRIGHT, XP_AUTHOR = 0x0112, 0x010F, 0x013B, 0x013C, 0x8298, 0x9C9D
OWNER, BODY_SERIAL, LENS_SERIAL, PHOTOGRAPHER, DNG_SERIAL = 0xA430, 0xA431, 0xA435, 0xA437, 0xC62F
ZERO = TiffImagePlugin.IFDRational(0, 0)
POSITION = {0: b"\2\3\0\0", 1: "N", 2: (48.0, 51.0, 30.0), 3: "E", 4: (2.0, 17.0, 40.0)}


def save(kind: str = "JPEG", *, side: int = 8, **options: Any) -> bytes:
    """Encode a small image."""
    image = Image.new("RGB", (side, side), "orange")
    if kind == "HEIC":
        return save_heic(image, **options)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def build_exif(
    main: dict[int, Any] | None = None, exif: dict[int, Any] | None = None, gps: dict[int, Any] | None = None
) -> bytes:
    """Build EXIF of a main, an Exif and a GPS directory."""
    built = Image.Exif()
    for tag, value in (main or {}).items():
        built[tag] = value
    for pointer, values in ((0x8769, exif), (0x8825, gps)):
        if values is not None:
            built[pointer] = values
    return built.tobytes()


def build_xmp(content: str, attributes: str = "") -> bytes:
    """Build an XMP packet of properties as elements and as attributes."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF'
        ' xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
        f' xmlns:dc="http://purl.org/dc/elements/1.1/" xmp:CreatorTool="GIMP" {attributes}>\n'
        f'{content}</rdf:Description></rdf:RDF></x:xmpmeta>\n<?xpacket end="w"?>'
    ).encode()


def build_iptc(*datasets: tuple[int, int, bytes]) -> bytes:
    """Build IPTC of records, numbers and values."""
    return b"".join(struct.pack(">BBBH", 0x1C, *dataset[:2], len(dataset[2])) + dataset[2] for dataset in datasets)


def build_resource(code: int, data: bytes, name: bytes = b"") -> bytes:
    """Build one of Photoshop's image resources."""
    packed_name = bytes([len(name)]) + name + b"\0" * (1 - len(name) % 2)
    return (
        b"8BIM" + struct.pack(">H", code) + packed_name + struct.pack(">I", len(data)) + data + b"\0" * (len(data) % 2)
    )


def build_segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload


def build_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def add_segment(marker: int, payload: bytes, *, jpeg: bytes = save()) -> bytes:
    return jpeg[:2] + build_segment(marker, payload) + jpeg[2:]


def add_chunk(name: bytes, data: bytes, *, png: bytes = save("PNG")) -> bytes:
    """Put a chunk behind a PNG's header."""
    return png[:33] + build_chunk(name, data) + png[33:]


def add_raw_profile(name: str, data: bytes) -> bytes:
    """Put a block into a PNG as ImageMagick does."""
    digits = "\n".join(data.hex()[at : at + 72] for at in range(0, 2 * len(data), 72))
    text = f"\n{name}\n{len(data):8}\n{digits}\n".encode()
    return add_chunk(b"zTXt", f"Raw profile type {name}".encode() + b"\0\0" + zlib.compress(text))


def compress_zeros(n_mebibytes: int) -> bytes:
    """Compress one mebibyte of zeros and repeat the result, which is as long as if all were compressed."""
    packer = zlib.compressobj(9)
    head = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    # An empty last block, and the checksum of that many zeros.
    return head + block * (n_mebibytes - 1) + b"\x03\0" + struct.pack(">HH", (n_mebibytes << 20) % 65_521, 1)


def save_xmp(kind: str, packet: bytes) -> bytes:
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(XMP_KEY, packet.decode())
        return save(kind, pnginfo=info)
    return save(kind, tiffinfo={700: packet}) if kind == "TIFF" else save(kind, xmp=packet)


@pytest.mark.parametrize("kind", [*FORMATS, "BMP", "GIF", "JPEG2000"])
def test_find_metadata_finds_nothing_in_a_clean_file(kind: str) -> None:
    assert find_metadata(save(kind)) == frozenset()


def test_find_metadata_finds_nothing_in_the_photographs(photographs: Path) -> None:
    paths = sorted(photographs.rglob("*.jpg"))[::20]
    assert len(paths) > 40
    assert {find_metadata(path.read_bytes()) for path in paths} == {frozenset()}


def test_find_metadata_finds_what_is_put_into_a_photograph(photographs: Path) -> None:
    jpeg = next(photographs.rglob("*.jpg")).read_bytes()
    exif = build_exif({ARTIST: "Jo"}, {BODY_SERIAL: "123"}, POSITION)
    assert find_metadata(add_segment(0xE1, exif, jpeg=jpeg)) == set(KINDS)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("exif", "expected"),
    [
        (build_exif({MAKE: "Camera & Sons"}), {"exif"}),
        (build_exif({HOST: "jo-laptop"}), {"exif"}),
        (build_exif({}, {0x9003: "2026:01:01 00:00:00"}), {"exif"}),
        (build_exif({ARTIST: "Jo Smith"}), {"exif", "name"}),
        (build_exif({COPYRIGHT: "(c) Jo Smith"}), {"exif", "name"}),
        (build_exif({COPYRIGHT: "\0Ed Smith"}), {"exif", "name"}),
        (build_exif({XP_AUTHOR: "Jo".encode("utf-16-le") + b"\0\0"}), {"exif", "name"}),
        (build_exif({}, {OWNER: "Jo Smith"}), {"exif", "name"}),
        (build_exif({}, {PHOTOGRAPHER: "Jo Smith"}), {"exif", "name"}),
        (build_exif({ARTIST: "", COPYRIGHT: " \0 ", XP_AUTHOR: b" \0 \0\0\0"}, {OWNER: "        "}), {"exif"}),
        (build_exif({}, {BODY_SERIAL: "0012345"}), {"exif", "serial"}),
        (build_exif({}, {LENS_SERIAL: "0"}), {"exif", "serial"}),
        (build_exif({DNG_SERIAL: "12345"}), {"exif", "serial"}),
        (build_exif({}, {BODY_SERIAL: "", LENS_SERIAL: "   "}), {"exif"}),
        (build_exif({}, None, POSITION), {"exif", "gps"}),
        (build_exif({}, None, {2: (0.0, 0.0, 30.5)}), {"exif", "gps"}),
        (build_exif({}, None, {0x16: (1.0, 0.0, 0.0)}), {"exif", "gps"}),
        (build_exif({}, None, {0: b"\2\3\0\0"}), {"exif"}),
        (build_exif({}, None, {0: b"\2\3\0\0", 1: "N", 3: "E", 0x1D: "2026:01:01"}), {"exif"}),
        (build_exif({}, None, POSITION | {2: (ZERO,) * 3, 4: (ZERO,) * 3}), {"exif"}),
        (build_exif({MAKE: "Sons", ARTIST: "Jo"}, {BODY_SERIAL: "1"}, POSITION), set(KINDS)),
    ],
    ids=[
        "make",
        "host computer",
        "time",
        "artist",
        "copyright",
        "copyright of an editor",
        "author of Windows",
        "owner",
        "photographer",
        "blank names",
        "body",
        "lens",
        "dng",
        "blank serials",
        "position",
        "latitude",
        "destination",
        "gps version",
        "gps without position",
        "gps of zeros over zeros",
        "everything",
    ],
)
def test_find_metadata_reads_exif(kind: str, exif: bytes, expected: set[str]) -> None:
    assert find_metadata(save(kind, exif=exif)) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_find_metadata_counts_an_orientation_as_exif(kind: str) -> None:
    assert find_metadata(save(kind, exif=build_exif({ORIENTATION: 1}))) == {"exif"}


@pytest.mark.parametrize("kind", FORMATS)
def test_find_metadata_does_not_count_empty_exif(kind: str) -> None:
    assert find_metadata(save(kind, exif=build_exif({}, {}, {}))) == frozenset()


def test_find_metadata_does_not_count_a_tiff_files_own_tags_as_exif() -> None:
    plain = save("TIFF", compression="tiff_lzw", dpi=(72, 72), exif=build_exif({ORIENTATION: 6}))
    assert find_metadata(plain) == frozenset()
    assert find_metadata(save("TIFF", description="my cat")) == {"exif"}


def build_directory(
    *entries: tuple[int, int, int, bytes], order: str = "<", is_big: bool = False, values: bytes = b""
) -> bytes:
    """Build a TIFF of one directory; values that do not fit their entry follow it, pointed to by an empty one."""
    n_bytes = 8 if is_big else 4
    start = (16 + 8 + 20 * len(entries) + 8) if is_big else (8 + 2 + 12 * len(entries) + 4)
    integer = order + ("Q" if is_big else "I")
    magic = (43 if is_big else 42).to_bytes(2, "little" if order == "<" else "big")
    head = (b"II" if order == "<" else b"MM") + magic
    head += struct.pack(order + "HHQ", 8, 0, 16) if is_big else struct.pack(integer, 8)
    packed = b"".join(
        struct.pack(order + ("HHQ" if is_big else "HHI"), *entry[:3])
        + (entry[3].ljust(n_bytes, b"\0") if entry[3] else struct.pack(integer, start))
        for entry in entries
    )
    return head + struct.pack(order + ("Q" if is_big else "H"), len(entries)) + packed + bytes(n_bytes) + values


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("is_big", [False, True], ids=["tiff", "bigtiff"])
def test_find_metadata_reads_both_byte_orders_and_big_tiff(order: str, is_big: bool) -> None:
    artist = (ARTIST, 2, 9, b"")
    assert find_metadata(build_directory(artist, order=order, is_big=is_big, values=b"Jo Smith\0")) == {"exif", "name"}
    assert find_metadata(build_directory(artist, order=order, is_big=is_big, values=b"        \0")) == {"exif"}
    short = (ARTIST, 2, 3, b"Jo\0")
    assert find_metadata(build_directory(short, order=order, is_big=is_big)) == {"exif", "name"}


def test_find_metadata_reads_all_pages_of_a_tiff() -> None:
    pages, buffer = [Image.new("L", (8, 8)) for _ in range(3)], io.BytesIO()
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[ARTIST] = "Jo"
    pages[2].encoderinfo = {"tiffinfo": info}
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    assert find_metadata(buffer.getvalue()) == {"exif", "name"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("content", "attributes", "expected"),
    [
        ("", "", set()),
        ("<dc:title><rdf:Alt><rdf:li>A cat</rdf:li></rdf:Alt></dc:title>", 'tiff:Make="Sons"', set()),
        ("<dc:creator><rdf:Seq>\n <rdf:li>Jo Smith</rdf:li>\n</rdf:Seq></dc:creator>", "", {"name"}),
        ("<dc:creator><rdf:Seq><rdf:li/><rdf:li></rdf:li><rdf:li>Jo</rdf:li></rdf:Seq></dc:creator>", "", {"name"}),
        ('<dc:rights><rdf:Alt><rdf:li xml:lang="x-default">Jo</rdf:li></rdf:Alt></dc:rights>', "", {"name"}),
        ("<xmpRights:Owner><rdf:Bag><rdf:li>Jo</rdf:li></rdf:Bag></xmpRights:Owner>", "", {"name"}),
        ("<tiff:Artist>Jo</tiff:Artist>", "", {"name"}),
        ("", 'tiff:Artist="Jo"', {"name"}),
        ("", "aux:OwnerName = 'Jo'", {"name"}),
        ("<exif:GPSLatitude>48,51.5N</exif:GPSLatitude>", "", {"gps"}),
        ("", 'exif:GPSLatitude="48,51.5N" exif:GPSLongitude="2,17.7E"', {"gps"}),
        ("", 'drone-dji:GpsLongtitude="+2.29"', {"gps"}),
        ("", 'aux:SerialNumber="123"', {"serial"}),
        ("<exifEX:BodySerialNumber>123</exifEX:BodySerialNumber>", "", {"serial"}),
        ("<exifEX:LensSerialNumber\n>123</exifEX:LensSerialNumber>", "", {"serial"}),
        ("<dc:creator>Jo</dc:creator>", 'exif:GPSLatitude="48,51.5N" aux:SerialNumber="1"', {"name", "gps", "serial"}),
        ("<dc:creator/><dc:rights /><tiff:Artist> \n</tiff:Artist><a:b>text</a:b>", 'aux:OwnerName="" x="y"', set()),
        ("<dc:creator><rdf:Seq><rdf:li> </rdf:li></rdf:Seq></dc:creator><dc:title>A cat</dc:title>", "", set()),
        ('<dc:rights><rdf:Alt><rdf:li xml:lang="x-default"/></rdf:Alt></dc:rights>text', "", set()),
        ("<tiff:Artist />text", "", set()),
        ("", 'exif:GPSLatitude=" " aux:SerialNumber = \'\' dc:creator=""', set()),
        ("<dc:creatorTool>GIMP</dc:creatorTool>", 'exif:GPSVersionID="2.3.0.0" exif:GPSLatitudeRef="N"', set()),
    ],
    ids=[
        "nothing",
        "title",
        "creator",
        "second creator",
        "rights",
        "owner of rights",
        "artist element",
        "artist attribute",
        "owner attribute",
        "latitude element",
        "latitude attribute",
        "drone",
        "serial attribute",
        "body element",
        "lens element",
        "all",
        "empty elements",
        "blank creator",
        "empty alternative",
        "closed at once",
        "blank attributes",
        "similar names",
    ],
)
def test_find_metadata_reads_xmp(kind: str, content: str, attributes: str, expected: set[str]) -> None:
    assert find_metadata(save_xmp(kind, build_xmp(content, attributes))) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_find_metadata_reads_xmp_in_wide_characters(encoding: str) -> None:
    packet = build_xmp("<dc:creator><rdf:Seq><rdf:li>Jö</rdf:li></rdf:Seq></dc:creator>").decode().encode(encoding)
    assert find_metadata(save("WEBP", xmp=packet)) == {"name"}


def test_find_metadata_reads_a_long_xmp_packet() -> None:
    rest = b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 32 + bytes(8) + build_xmp("", 'aux:SerialNumber="1"')
    assert find_metadata(add_segment(0xE1, rest)) == {"serial"}


BY_LINE = build_iptc((1, 90, b"\x1b%G"), (2, 0, b"\0\4"), (2, 5, b"A cat"), (2, 80, b"Jo Smith"))


@pytest.mark.parametrize(
    ("iptc", "expected"),
    [
        (BY_LINE, {"name"}),
        (build_iptc((2, 116, b"(c) Jo")), {"name"}),
        (build_iptc((2, 118, b"jo@example.com")), {"name"}),
        (b"\x1c\2\x50\x80\4\0\0\0\2Jo", {"name"}),
        (b"\x1c\2\5\x80\4\0\0\0\5A cat" + BY_LINE, {"name"}),
        (build_iptc((2, 5, b"A cat"), (2, 80, b"   "), (2, 116, b"")), set()),
        (build_iptc((2, 5, b"\x1c\2\x50\0\2Jo")), set()),
        (build_iptc((1, 80, b"Jo")), set()),
        (BY_LINE[:-8], set()),
        (b"", set()),
    ],
    ids=[
        "by-line",
        "copyright",
        "contact",
        "extended",
        "after extended",
        "blank",
        "within a title",
        "other record",
        "cut off",
        "empty",
    ],
)
@pytest.mark.parametrize(
    "build",
    [
        lambda iptc: add_segment(0xED, b"Photoshop 3.0\0" + build_resource(0x0404, iptc)),
        lambda iptc: add_segment(
            0xED, b"Photoshop 3.0\0" + build_resource(0x040C, b"odd", b"ab") + build_resource(0x0404, iptc, b"x")
        ),
        lambda iptc: save("TIFF", tiffinfo={33723: iptc} if iptc else {}),
        lambda iptc: save("TIFF", tiffinfo={34377: build_resource(0x0404, iptc)}),
        lambda iptc: add_raw_profile("iptc", build_resource(0x0404, iptc)),
        lambda iptc: add_raw_profile("iptc", iptc),
    ],
    ids=["jpeg", "jpeg after another", "tiff", "tiff of photoshop", "png", "png without photoshop"],
)
def test_find_metadata_reads_iptc(build: Callable[[bytes], bytes], iptc: bytes, expected: set[str]) -> None:
    assert find_metadata(build(iptc)) == expected


def test_find_metadata_reads_xmp_of_photoshop() -> None:
    resource = build_resource(0x0424, build_xmp("<dc:creator>Jo</dc:creator>"))
    assert find_metadata(add_segment(0xED, b"Photoshop 3.0\0" + resource)) == {"name"}


@pytest.mark.parametrize(
    ("keyword", "text", "expected"),
    [
        ("Author", "Jo", {"name"}),
        ("author", "Jo", {"name"}),
        ("Artist", "Jo", {"name"}),
        ("Copyright", "Jo", {"name"}),
        ("exif:Artist", "Jo", {"exif", "name"}),
        ("exif:GPSLatitude", "48/1, 51/1, 30/1", {"exif", "gps"}),
        ("exif:BodySerialNumber", "123", {"exif", "serial"}),
        ("exif:Make", "Sons", {"exif"}),
        ("Author", " ", set()),
        ("exif:Artist", "", set()),
        ("Title", "Jo", set()),
        ("Comment", "Author: Jo", set()),
        ("Software", "GIMP", set()),
    ],
)
def test_find_metadata_reads_the_texts_of_a_png(keyword: str, text: str, expected: set[str]) -> None:
    for is_compressed in (False, True):
        info = PngImagePlugin.PngInfo()
        info.add_text(keyword, text, zip=is_compressed)
        assert find_metadata(save("PNG", pnginfo=info)) == expected
        info = PngImagePlugin.PngInfo()
        info.add_itxt(keyword, text, "en", keyword, zip=is_compressed)
        assert find_metadata(save("PNG", pnginfo=info)) == expected


@pytest.mark.parametrize("name", ["exif", "APP1"])
def test_find_metadata_reads_raw_profiles_of_a_png(name: str) -> None:
    exif = build_exif({}, {BODY_SERIAL: "123"}, POSITION)
    assert find_metadata(add_raw_profile(name, exif)) == {"exif", "gps", "serial"}
    assert find_metadata(add_raw_profile("IPTC profile", build_resource(0x0404, BY_LINE))) == {"name"}
    assert find_metadata(add_raw_profile("xmp", build_xmp("<dc:creator>Jo</dc:creator>"))) == {"name"}
    for text in (b"", b"\nexif\n", b"\nexif\n 4\nnot hex", b"\nexif\n 4\n4", exif):
        assert find_metadata(add_chunk(b"tEXt", b"Raw profile type exif\0" + text)) == frozenset()


ARTIST_EXIF = build_exif({ARTIST: "Jo"})


def test_find_metadata_finds_metadata_behind_the_pixels() -> None:
    png, jpeg = save("PNG"), save()
    late_chunk = png[:-12] + build_chunk(b"eXIf", ARTIST_EXIF[6:]) + png[-12:]
    second_image = jpeg + add_segment(0xE1, ARTIST_EXIF)
    assert find_metadata(late_chunk) == find_metadata(second_image) == {"exif", "name"}


def test_find_metadata_finds_metadata_that_a_broken_block_precedes() -> None:
    broken = add_segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert find_metadata(broken) == frozenset()
    assert find_metadata(add_segment(0xE1, ARTIST_EXIF, jpeg=broken)) == {"exif", "name"}
    assert find_metadata(broken[:2] + b"\xff\xe1\xff\xffExif\0\0" + add_segment(0xE1, ARTIST_EXIF)) == {"exif", "name"}


@pytest.mark.parametrize("exif", [ARTIST_EXIF, b"Exif\0\0" + ARTIST_EXIF, ARTIST_EXIF[6:]], ids=["one", "two", "none"])
def test_find_metadata_reads_webp_chunks_with_any_number_of_marks(exif: bytes) -> None:
    chunks = b"".join(
        name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for name, data in [(b"odd ", b"abc"), (b"EXIF", exif)]
    )
    assert find_metadata(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks) == {"exif", "name"}


@pytest.mark.parametrize(
    "entry",
    [(MAKE, 2, 1000, struct.pack("<I", 99_999)), (0x8825, 4, 1, b"\xff\xff\xff\xff"), (0x0132, 99, 70_000, b"abcd")],
    ids=["text outside", "directory outside", "unknown type"],
)
def test_find_metadata_reads_on_after_a_broken_tag(entry: tuple[int, int, int, bytes]) -> None:
    exif = build_directory(entry, (ARTIST, 2, 3, b"Jo\0"))
    assert find_metadata(add_segment(0xE1, b"Exif\0\0" + exif)) == {"exif", "name"}


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xd8", PNG_SIGNATURE, b"RIFF\0\0\0\0WEBP", b"II*\0", b"MM\0+", b"BM"]
)
def test_find_metadata_finds_nothing_in_the_start_of_a_file(data: bytes) -> None:
    assert find_metadata(data) == frozenset()


@pytest.mark.parametrize("kind", ["GIF", "PPM"])
def test_find_metadata_finds_nothing_in_other_formats(kind: str) -> None:
    assert find_metadata(save(kind, comment=b"Author: Jo")) == frozenset()


def build_box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


XMP_POSITION = build_xmp("", 'exif:GPSLatitude="48,51.5N"')
XMP_UUID, IPTC_UUID = (
    bytes.fromhex(digits) for digits in ("be7acfcb97a942e89c71999491e3afac", "33c7a4d2b81d4723a0baf1a3e097ad38")
)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (b"uuid", b"JpgTiffExif->JP2" + ARTIST_EXIF[6:], {"exif", "name"}),
        (b"uuid", XMP_UUID + XMP_POSITION, {"gps"}),
        (b"uuid", IPTC_UUID + build_iptc((2, 80, b"Jo Smith")), {"name"}),
        (b"xml ", XMP_POSITION, {"gps"}),
        (b"uuid", bytes(16) + XMP_POSITION, set()),
        (b"free", XMP_POSITION, set()),
    ],
    ids=["exif", "xmp", "iptc", "xml", "another one", "another box"],
)
def test_find_metadata_reads_boxes_of_jpeg_2000(name: bytes, content: bytes, expected: set[str]) -> None:
    box, jpeg2000 = build_box(name, content), save("JPEG2000")
    assert find_metadata(jpeg2000 + box) == expected
    # Before the codestream, which may go to the end of the file.
    at = jpeg2000.index(b"jp2c") - 4
    assert find_metadata(jpeg2000[:at] + box + bytes(4) + jpeg2000[at + 4 :]) == expected


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "behind"])
def test_find_metadata_reads_xmp_of_a_gif(is_first: bool) -> None:
    gif = save("GIF")
    # As XMP's specification defines it: the packet in one piece, then bytes each of which leads to the end.
    block = b"!\xff\x0bXMP DataXMP" + XMP_POSITION + b"\1" + bytes(range(255, -1, -1)) + b"\0"
    at = gif.index(b",\0\0\0\0") if is_first else -1
    with_xmp = gif[:at] + block + gif[at:]
    with Image.open(io.BytesIO(with_xmp)) as image:
        image.load()
    assert find_metadata(with_xmp) == {"gps"}


def test_find_metadata_reads_comments_of_a_gif_for_xmp() -> None:
    assert find_metadata(save("GIF", comment=XMP_POSITION)) == {"gps"}


def test_find_metadata_reads_exif_of_heic_without_its_offset() -> None:
    heic = save("HEIC", exif=ARTIST_EXIF)
    mark = heic.rindex(b"Exif\0\0")
    assert heic[mark - 4 : mark] == struct.pack(">I", 6)
    for offset in (0, 5_000):
        changed = heic[: mark - 4] + struct.pack(">I", offset) + heic[mark:]
        assert find_metadata(changed) == {"exif", "name"}


def build_heic(kind: bytes, content: bytes, *, encoding: bytes = b"", n_extents: int = 1) -> bytes:
    """Build a HEIC without a picture, of one item that lies within its directory."""
    name = kind + b"\0" + (b"application/rdf+xml\0" + encoding + b"\0" if kind == b"mime" else b"")
    infe = build_box(b"infe", struct.pack(">IHH", 2 << 24, 1, 0) + name)
    extents = struct.pack(">II", 0, len(content)) * n_extents
    iloc = struct.pack(">IBBHHHHH", 1 << 24, 0x44, 0, 1, 1, 1, 0, n_extents) + extents
    boxes = build_box(b"iinf", struct.pack(">IH", 0, 1) + infe) + build_box(b"iloc", iloc) + build_box(b"idat", content)
    return build_box(b"ftyp", b"heic" + bytes(4)) + build_box(b"meta", bytes(4) + boxes)


@pytest.mark.parametrize("encoding", [b"", b"deflate"], ids=["plain", "compressed"])
def test_find_metadata_reads_items_in_the_directory(encoding: bytes) -> None:
    content = zlib.compress(XMP_POSITION) if encoding else XMP_POSITION
    assert find_metadata(build_heic(b"mime", content, encoding=encoding)) == {"gps"}
    assert find_metadata(build_heic(b"Exif", bytes(4) + ARTIST_EXIF[6:])) == {"exif", "name"}


def fill(pattern: bytes) -> bytes:
    """Make an XMP packet of a mebibyte that repeats a pattern."""
    return add_chunk(b"iTXt", XMP_KEY.encode() + bytes(5) + (pattern * ((1 << 20) // len(pattern) + 1))[: 1 << 20])


LOOP = build_directory((0x8769, 4, 1, struct.pack("<I", 8)), (0x8825, 4, 1, struct.pack("<I", 8)))
OVERLAPPING = b"II*\0\x08\0\0\0" + b"".join(
    struct.pack("<HHHI4s", 65_535, 0x014A, 4, 1, struct.pack("<I", 9 + at)) for at in range(4_000)
)


@pytest.mark.parametrize(
    "data",
    [
        add_segment(0xE1, b"Exif\0\0" + LOOP),
        b"\xff\xd8" + build_segment(0xE1, b"Exif\0\0" + OVERLAPPING) * 100,
        b"\xff\xd8" + b"\xff\xe1\xff\xffExif\0\0" * 200_000,
        b"\xff\xd8" + b"\xff\xe1\xff\xffExif\0\0II*\0\x08\0\0\0" * 100_000,
        b"\xff\xd8" + b"\xff\xed\xff\xffPhotoshop 3.0\0" + build_resource(0x0404, b"") * 100_000,
        build_directory((0x02BC, 1, 1 << 20, b""), (0x83BB, 1, 1 << 20, b""), values=b"\x1c\2\5\0\0" * 300_000),
        build_directory((0x8769, 16, 1 << 63, b"\xff" * 8), is_big=True),
        PNG_SIGNATURE + bytes(12) * 300_000,
        PNG_SIGNATURE + build_chunk(b"tEXt", b"") * 200_000,
        PNG_SIGNATURE + build_chunk(b"zTXt", b"Raw profile type xmp\0\0" + zlib.compress(b"<a:b>" * 200_000)) * 200,
        add_chunk(b"eXIf", b"Exif\0\0" * 300_000),
        build_heic(b"mime", bytes(1 << 20), n_extents=9_000),
        build_heic(b"mime", compress_zeros(256), encoding=b"deflate"),
        build_box(b"ftyp", b"heic" + bytes(4)) + build_box(b"meta", build_box(b"iinf", b"") * 300_000),
        build_box(b"ftyp", b"avif" + bytes(4)) + build_box(b"uuid", XMP_UUID) * 200_000,
        b"GIF89a" + bytes(7) + b"!\xfe\1a\0" * 300_000,
        b"GIF89a" + bytes(7) + b"!\xff\x0bXMP DataXMP" * 100_000,
        b"RIFF\0\0\0\0WEBP" + b"EXIF\0\0\0\0" * 300_000,
        fill(b":"),
        fill(b"<"),
        fill(b" "),
        fill(b"<a:creator>"),
        fill(b"<a:creator "),
        fill(b":creator= "),
        fill(b"<a:creator><b> "),
        fill(b"<" + b"a" * 32),
        fill(b"<a:creator>" + b" " * 10_000),
    ],
    ids=[
        "loop",
        "overlapping directories",
        "many marks",
        "many heads",
        "many resources",
        "overlapping blocks",
        "huge count",
        "empty chunks",
        "many texts",
        "many bombs",
        "repeated mark",
        "many extents",
        "compressed item",
        "many boxes",
        "many boxes of users",
        "many comments",
        "many starts of xmp",
        "many chunks",
        "colons",
        "less than",
        "spaces",
        "open elements",
        "open tags",
        "attributes",
        "nested",
        "prefixes",
        "long gaps",
    ],
)
def test_find_metadata_ends_quickly(data: bytes) -> None:
    # Each takes a fraction of a second; an algorithm that scans it repeatedly would take hours.
    assert find_metadata(data) <= {"exif"}


@pytest.mark.slow
def test_find_metadata_does_not_inflate_a_bomb() -> None:
    bomb = add_chunk(b"zTXt", XMP_KEY.encode() + b"\0\0" + compress_zeros(200))
    tracemalloc.start()
    try:
        assert find_metadata(bomb) == frozenset()
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


@settings(max_examples=100)
@given(
    # Pillow by itself does not read HEIC.
    kind=st.sampled_from([kind for kind in FORMATS if kind != "HEIC"]),
    main=st.dictionaries(
        st.sampled_from([MAKE, HOST, ARTIST, COPYRIGHT, 0x0131]), st.sampled_from(["Jo", " ", "A cat"])
    ),
    exif=st.dictionaries(st.sampled_from([0x9003, OWNER, BODY_SERIAL, LENS_SERIAL]), st.sampled_from(["123", "  "])),
    has_position=st.booleans(),
)
def test_find_metadata_agrees_with_pillow(
    kind: str, main: dict[int, str], exif: dict[int, str], has_position: bool
) -> None:
    data = save(kind, exif=build_exif(main, exif, POSITION if has_position else None))
    with Image.open(io.BytesIO(data)) as image:
        read = image.getexif()
        tags = dict(read) | dict(read.get_ifd(0x8769))
        described = set(main) & set(tags) | set(read.get_ifd(0x8769)) | set(read.get_ifd(0x8825))
        expected = {"exif"} if described else set()
        expected |= {"gps"} if 2 in read.get_ifd(0x8825) else set()
    for found, tag_numbers in (("name", (ARTIST, COPYRIGHT, OWNER)), ("serial", (BODY_SERIAL, LENS_SERIAL))):
        if any(str(tags.get(tag, "")).strip() for tag in tag_numbers):
            expected.add(found)
    assert find_metadata(data) == expected


def build_seeds() -> list[bytes]:
    main = {ARTIST: "Jo Smith", MAKE: "Sons"}
    exif = build_exif(main, {BODY_SERIAL: "1234567"}, POSITION)
    packet = build_xmp("<dc:creator><rdf:Seq><rdf:li>Jo</rdf:li></rdf:Seq></dc:creator>", 'aux:SerialNumber="1"')
    photoshop = b"Photoshop 3.0\0" + build_resource(0x0404, BY_LINE) + build_resource(0x0424, packet)
    return [
        add_segment(0xED, photoshop, jpeg=save(exif=exif, xmp=packet)),
        save("PNG", exif=exif),
        add_raw_profile("APP1", exif),
        save_xmp("PNG", packet),
        save("WEBP", exif=exif, xmp=packet),
        save("TIFF", exif=build_exif(main | {700: packet, 33723: BY_LINE}, {BODY_SERIAL: "1234567"}, POSITION)),
        build_directory((ARTIST, 2, 9, b""), (0x8769, 16, 1, b""), is_big=True, values=b"Jo Smith\0"),
        save("BMP"),
        save("AVIF", exif=exif, xmp=packet),
        save("HEIC", exif=exif, xmp=packet),
        save("JPEG2000") + build_box(b"uuid", b"JpgTiffExif->JP2" + exif[6:]),
        save("GIF", comment=packet),
    ]


SEEDS = build_seeds()
MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)


def mutate(data: bytes, mutations: Sequence[tuple[str, float, bytes]]) -> bytes:
    """Change bytes at fractions of the length."""
    for kind, fraction, new in mutations:
        at = int(len(data) * fraction)
        rest = {"set": at + len(new), "insert": at, "delete": at + 4 * len(new), "cut": len(data)}[kind]
        data = data[:at] + (b"" if kind in ("delete", "cut") else new) + data[rest:]
    return data


def test_seeds_carry_metadata() -> None:
    assert [len(find_metadata(seed)) for seed in SEEDS] == [4, 4, 4, 2, 4, 4, 2, 0, 4, 4, 4, 2]


@settings(max_examples=150)
@given(seed=st.sampled_from(SEEDS), mutations=MUTATIONS)
@example(seed=SEEDS[0], mutations=[("cut", 0.5, b"x")])
def test_find_metadata_accepts_any_bytes(seed: bytes, mutations: list[tuple[str, float, bytes]]) -> None:
    found = find_metadata(mutate(seed, mutations))
    assert type(found) is frozenset and found <= set(KINDS)


@settings(max_examples=200)
@given(
    start=st.sampled_from([b"", b"\xff\xd8", PNG_SIGNATURE, b"RIFFabcdWEBP", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"]),
    body=st.binary(max_size=400),
)
def test_find_metadata_accepts_noise(start: bytes, body: bytes) -> None:
    assert find_metadata(start + body) <= set(KINDS)
