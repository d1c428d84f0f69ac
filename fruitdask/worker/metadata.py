"""Privacy: which kinds of metadata an image file carries, never their values."""

import binascii
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Final

from fruitdask.worker.images.bounds import read_gif_head
from fruitdask.worker.images.boxes import Item, list_boxes, list_brands, read_items
from fruitdask.worker.images.jpeg2000 import FILE as _JPEG2000_HEAD
from fruitdask.worker.images.tiff import TIFF_HEADS, TiffReader

#: Any EXIF tag, a position, the serial number of a camera or lens, the name of a person.
KINDS: Final = ("exif", "gps", "serial", "name")

# Bounds on the cost of a hostile file; each is far above what cameras and editors write.
_MAX_CHUNKS = 100_000
_MAX_BLOCKS = 128
_MAX_BLOCK_BYTES = 1 << 20
_MAX_TEXT_BYTES = 4 << 20
_MAX_DIRECTORIES = 16
_MAX_ENTRIES = 1_000
_MAX_VALUE_BYTES = 4_096

#: Tags that point to other directories: of EXIF, of GPS, of further images.
_POINTERS = {0x8769: "exif", 0x8825: "gps", 0x014A: "main"}
_TAG_KINDS = {
    0x013B: "name",  # Artist
    0x8298: "name",  # Copyright
    0x9C9D: "name",  # XPAuthor
    0xA430: "name",  # CameraOwnerName
    0xA431: "serial",  # BodySerialNumber
    0xA435: "serial",  # LensSerialNumber
    0xA437: "name",  # Photographer (Exif 3.0)
    0xA438: "name",  # ImageEditor (Exif 3.0)
    0xC62F: "serial",  # CameraSerialNumber (DNG)
}
#: Latitude and longitude of the camera and of the destination.
_GPS_TAGS = frozenset((0x02, 0x04, 0x14, 0x16))
#: Tags of a TIFF file that count as EXIF; the others describe its pixels. Document name, description, make, model,
#: page name, software, time, artist, host computer, Windows' title to subject, copyright, camera serial number.
_DESCRIPTIVE_TAGS = frozenset(
    (*range(0x010D, 0x0111), 0x011D, 0x0131, 0x0132, 0x013B, 0x013C, *range(0x9C9B, 0x9CA0), 0x8298, 0xC62F)
)
#: Record 2 of IPTC-IIM: by-line, credit, copyright notice, contact, writer.
_IPTC_NAMES = frozenset(bytes((2, number)) for number in (80, 110, 116, 118, 122))
_PHOTOSHOP_IPTC, _PHOTOSHOP_XMP = 0x0404, 0x0424
_BLANK = b"\0 \t\r\n"

#: Names of XMP properties without prefix, and of PNG texts; some drones misspell theirs.
_PROPERTIES = {
    "gps": "GPSLatitude GPSLongitude GPSDestLatitude GPSDestLongitude GpsLatitude GpsLongitude GpsLongtitude",
    "serial": "SerialNumber BodySerialNumber LensSerialNumber CameraSerialNumber DroneSerialNumber",
    "name": "creator rights artist Artist author Author Copyright copyright Owner OwnerName CameraOwnerName"
    " Photographer ImageEditor CaptionWriter Credit PersonInImage PersonDisplayName ImageCreatorName CopyrightOwnerName"
    " LicensorName attributionName",
}
_TEXT_KINDS = {name.lower(): kind for kind, names in _PROPERTIES.items() for name in names.split()}
_NAMES = "|".join(f"(?P<{kind}>{names.replace(' ', '|')})" for kind, names in _PROPERTIES.items())
_ANY_NAME = "|".join(_PROPERTIES.values()).replace(" ", "|")
# Both patterns take linear time: quantifiers are possessive, and a tag ends where the next one begins.
_XMP_ATTRIBUTE = re.compile(rf""":(?:{_NAMES})\s*+=\s*+(?:"\s*+[^"]|'\s*+[^'])""".encode())
#: An element, up to eight tags inside it, and then text.
_XMP_ELEMENT = re.compile(
    rf"<[\w.-]{{1,32}}:(?:{_NAMES})(?:\s[^<>]*+)?(?<!/)>"
    rf"(?:\s*+<(?!/[\w.-]{{1,32}}:(?:{_ANY_NAME})\s*+>)[^<>]*+>){{0,8}}+\s*+[^<]".encode()
)
#: A line with its name, one with its length, and hexadecimal digits.
_RAW_PROFILE = re.compile(rb"\n[^\n]*+\n\s*+\d++\n([0-9A-Fa-f\s]*+)")
#: APP1 or APP13 with EXIF, XMP, the continuation of a long XMP packet, or Photoshop's resources.
_JPEG_SEGMENT = re.compile(
    rb"\xff[\xe1\xed](..)(?=Exif\0\0|http://ns\.adobe\.com/x(?:ap/1\.0|mp/extension)/\0|Photoshop 3\.0\0)", re.DOTALL
)
#: First bytes of JPEG 2000 boxes with EXIF, XMP, IPTC.
_UUIDS = (
    b"JpgTiffExif->JP2",
    bytes.fromhex("be7acfcb97a942e89c71999491e3afac"),
    bytes.fromhex("33c7a4d2b81d4723a0baf1a3e097ad38"),
)
#: Kinds of the items of an AVIF or HEIC that hold metadata.
_ITEM_KINDS = (b"Exif", b"mime", b"uri ", b"iptc")
#: A GIF stores XMP without cutting it into blocks.
_GIF_XMP = re.compile(rb"!\xff\x0bXMP DataXMP")


def find_metadata(data: bytes) -> frozenset[str]:
    """Find which kinds of metadata an image file carries; no value leaves this function, not even in a log.

    Reads EXIF, XMP, IPTC, the text chunks of PNG, the items of AVIF and HEIC, the boxes of JPEG 2000 and the extensions
    of GIF, anywhere in the file: Pillow's readers stop at the pixels, and warn of broken tags, which cannot be silenced
    safely in one of several threads. Blank values and GPS without a position do not count, nor do the tags with which a
    TIFF describes its pixels. Reads at most 128 blocks of metadata per file, 1 MiB per block, and 16 TIFF directories.
    Ignores makers' notes, where some cameras, mostly from before 2010, keep their serial number.

    >>> import io
    >>> from PIL import Image
    >>> file, exif = io.BytesIO(), Image.Exif()
    >>> exif[0x013B] = "Jo Smith"
    >>> Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    >>> sorted(find_metadata(file.getvalue()))
    ['exif', 'name']
    """
    found: set[str] = set()
    by_head = (search for head, search in _SEARCHES.items() if data.startswith(head))
    search = next(by_head, _search_items if list_brands(data) else None)
    for kind in search(data) if search else ():
        found.add(kind)
        if len(found) == len(KINDS):
            break
    return frozenset(found)


def _search_jpeg(data: bytes) -> Iterator[str]:
    """Search the APP1 and APP13 segments, including those after the pixels: coded pixels never look like a marker."""
    for match in islice(_JPEG_SEGMENT.finditer(data), _MAX_BLOCKS):
        yield from _search_block(data[match.end() : match.start(1) + int.from_bytes(match[1])])


def _search_webp(data: bytes) -> Iterator[str]:
    """Search the EXIF and XMP chunks."""
    names = (b"EXIF", b"XMP ") if data[8:12] == b"WEBP" else ()
    for _, chunk in islice(_list_chunks(data, names, is_png=False), _MAX_BLOCKS):
        yield from _search_block(chunk)


def _search_png(data: bytes) -> Iterator[str]:
    """Search the EXIF and text chunks, including those after the pixels."""
    left_bytes = _MAX_TEXT_BYTES
    for name, chunk in islice(_list_chunks(data, (b"eXIf", b"tEXt", b"zTXt", b"iTXt"), is_png=True), _MAX_BLOCKS):
        if name == b"eXIf":
            yield from _search_block(chunk)
            continue
        keyword, text = _read_text(name, chunk)
        # A few compressed bytes can expand to a long text, in many chunks.
        if len(text) <= left_bytes:
            left_bytes -= len(text)
            yield from _search_text(keyword, text)


def _list_chunks(data: bytes, names: tuple[bytes, ...], *, is_png: bool) -> Iterator[tuple[bytes, bytes]]:
    """List the chunks of a PNG or WebP that have some names, with their contents."""
    at = 8 if is_png else 12
    for _ in range(_MAX_CHUNKS):
        first, second = data[at : at + 4], data[at + 4 : at + 8]
        name, size = (second, int.from_bytes(first)) if is_png else (first, int.from_bytes(second, "little"))
        if name in names:
            yield name, data[at + 8 : at + 8 + size]
        # A PNG's chunks end with a checksum of four bytes; a WebP's are padded to an even length.
        at += 8 + size + (4 if is_png else size % 2)
        if at >= len(data):
            return


def _search_items(data: bytes) -> Iterator[str]:
    """Search an AVIF or HEIC for items of metadata, and for boxes of XMP."""
    items = [item for item in read_items(data).by_number.values() if item.kind in _ITEM_KINDS]
    for item in items[:_MAX_BLOCKS]:
        yield from _search_block(_read_item(data, item))
    yield from _search_jpeg2000(data)


def _read_item(data: bytes, item: Item) -> bytes:
    """Read an item; EXIF follows its own offset, and XMP may be compressed."""
    block = item.read(data, _MAX_BLOCK_BYTES)
    if item.kind == b"Exif":
        start = 4 + int.from_bytes(block[:4])
        if block[start : start + 4] not in TIFF_HEADS:
            # Some writers omit the offset, or write a wrong one.
            start = min((at for head in TIFF_HEADS if (at := block.find(head, 0, 64)) >= 0), default=0)
        return block[start:]
    return _inflate(block) if item.encoding else block


def _search_jpeg2000(data: bytes) -> Iterator[str]:
    """Search the UUID and XML boxes."""
    boxes = (box for box in list_boxes(data) if box.name in (b"uuid", b"xml "))
    for box in islice(boxes, _MAX_BLOCKS):
        block = data[box.start : min(box.end, box.start + _MAX_BLOCK_BYTES)]
        if box.name == b"xml ":
            yield from _search_xmp(block)
        elif block.startswith(_UUIDS):
            yield from _search_block(block[16:])


def _search_gif(data: bytes) -> Iterator[str]:
    """Search XMP packets, also after the frames, and the comments before the first frame."""
    for match in islice(_GIF_XMP.finditer(data), _MAX_BLOCKS):
        yield from _search_xmp(data[match.end() : match.end() + _MAX_BLOCK_BYTES])
    _, _, comments = read_gif_head(data)
    for comment in comments[:_MAX_BLOCKS]:
        yield from _search_block(comment[:_MAX_BLOCK_BYTES])


def _read_text(name: bytes, chunk: bytes) -> tuple[str, bytes]:
    """Read the keyword and the text of a PNG's text chunk."""
    keyword, _, text = chunk.partition(b"\0")
    is_compressed = name == b"zTXt" or name == b"iTXt" and text[:1] == b"\1"
    if name == b"zTXt":
        text = text[1:]
    elif name == b"iTXt":
        # Compression flag and method, then language and translated keyword, each ending with a zero.
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]
    if is_compressed:
        text = _inflate(text)
    return keyword.decode("latin-1"), text[:_MAX_BLOCK_BYTES]


def _inflate(packed: bytes) -> bytes:
    """Decompress up to 1 MiB; returns nothing if the data is broken."""
    try:
        return zlib.decompressobj().decompress(packed, _MAX_BLOCK_BYTES)
    except zlib.error:
        return b""


def _search_text(keyword: str, text: bytes) -> Iterator[str]:
    """Search a PNG's text: XMP, a block in hexadecimal as ImageMagick writes it, or a value named by its keyword."""
    if keyword == "XML:com.adobe.xmp":
        yield from _search_xmp(text)
    elif keyword.startswith("Raw profile type "):
        match = _RAW_PROFILE.match(text)
        digits = b"".join(match[1].split()) if match else b""
        yield from _search_block(binascii.unhexlify(digits[: len(digits) // 2 * 2]))
    elif text.strip(_BLANK):
        if keyword.startswith("exif:"):
            yield "exif"
        kind = _TEXT_KINDS.get(keyword.rpartition(":")[2].lower())
        if kind:
            yield kind


def _search_block(block: bytes) -> Iterator[str]:
    """Search a block of any standard, recognized by its first bytes."""
    # Some writers repeat the EXIF header.
    block = block.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    if block.startswith((b"II", b"MM")):
        yield from _search_tiff(block)
    elif block.startswith((b"Photoshop 3.0\0", b"8BIM")):
        yield from _search_photoshop(block.removeprefix(b"Photoshop 3.0\0"))
    elif block.startswith(b"\x1c"):
        yield from _search_iptc(block)
    else:
        yield from _search_xmp(block)


def _search_tiff(data: bytes, is_file: bool = False) -> Iterator[str]:
    """Search the directories of EXIF, or of a TIFF file, which has the same structure."""
    tiff = TiffReader(data)
    waiting, seen = deque([(tiff.first, "main")]), {0}
    while waiting and len(seen) <= _MAX_DIRECTORIES:
        offset, group = waiting.popleft()
        # Directories may point to each other, by mistake or to trap a reader.
        if offset in seen:
            continue
        seen.add(offset)
        entries = dict(tiff.list_entries(offset, _MAX_ENTRIES))
        for tag, (kind, count, field) in entries.items():
            most = _MAX_BLOCK_BYTES if tag in _BLOCK_TAGS else _MAX_VALUE_BYTES
            value = tiff.read_value(kind, count, field, most=most)
            if tag in _POINTERS and group == "main":
                waiting.extend((pointer, _POINTERS[tag]) for pointer in tiff.read_integers(value, kind))
            # Only in the first directory and in pages: else a hostile file could make each directory search a block.
            elif tag in _BLOCK_TAGS and (is_file or offset == tiff.first):
                yield from _BLOCK_TAGS[tag](value)
            else:
                yield from _judge(tag, value, group=group, is_file=is_file)
        if group == "main":
            waiting.append((tiff.find_next(offset), "main"))


def _judge(tag: int, value: bytes, *, group: str, is_file: bool) -> Iterator[str]:
    """Yield the kinds of metadata that a tag is."""
    if not is_file or group != "main" or tag in _DESCRIPTIVE_TAGS:
        yield "exif"
    if group == "gps":
        # Cameras without a position write 0/0, or only the version.
        if tag in _GPS_TAGS and any(value):
            yield "gps"
    elif tag in _TAG_KINDS and value.strip(_BLANK):
        yield _TAG_KINDS[tag]


def _search_photoshop(data: bytes) -> Iterator[str]:
    """Search Photoshop's image resources for IPTC and XMP."""
    at = 0
    while data[at : at + 4] == b"8BIM":
        code, name_bytes = int.from_bytes(data[at + 4 : at + 6]), int.from_bytes(data[at + 6 : at + 7])
        # The name, with its length byte, and the resource are padded to an even length.
        start = at + 8 + name_bytes // 2 * 2
        size = int.from_bytes(data[start : start + 4])
        resource = data[start + 4 : start + 4 + size]
        if code == _PHOTOSHOP_IPTC:
            yield from _search_iptc(resource)
        elif code == _PHOTOSHOP_XMP:
            yield from _search_xmp(resource)
        at = start + 4 + size + size % 2


def _search_iptc(data: bytes) -> Iterator[str]:
    """Search IPTC datasets for the names of people."""
    at = 0
    while data[at : at + 1] == b"\x1c":
        dataset, size = data[at + 1 : at + 3], int.from_bytes(data[at + 3 : at + 5])
        at += 5
        if size & 0x8000:
            # An extended dataset: the other bits count the bytes of the size that follows.
            width = size & 0x7FFF
            size = int.from_bytes(data[at : at + width])
            at += width
        if dataset in _IPTC_NAMES and data[at : at + min(size, _MAX_VALUE_BYTES)].strip(_BLANK):
            yield "name"
            return
        at += size


def _search_xmp(packet: bytes) -> Iterator[str]:
    """Search an XMP packet for properties that are not empty."""
    # Without zeros, names in UTF-16 or UTF-32 read as in UTF-8.
    text = packet[:_MAX_BLOCK_BYTES].replace(b"\0", b"")
    for pattern in (_XMP_ATTRIBUTE, _XMP_ELEMENT):
        for match in pattern.finditer(text):
            yield str(match.lastgroup)


#: The search of each tag that holds another standard. None of them searches EXIF again, so blocks cannot nest forever.
_BLOCK_TAGS = {0x02BC: _search_xmp, 0x83BB: _search_iptc, 0x8649: _search_photoshop}
#: The search of each format, by its first bytes.
_SEARCHES: dict[bytes | tuple[bytes, ...], Callable[[bytes], Iterator[str]]] = {
    b"\xff\xd8": _search_jpeg,
    b"\x89PNG\r\n\x1a\n": _search_png,
    b"RIFF": _search_webp,
    TIFF_HEADS: partial(_search_tiff, is_file=True),
    (b"GIF87a", b"GIF89a"): _search_gif,
    _JPEG2000_HEAD: _search_jpeg2000,
}
