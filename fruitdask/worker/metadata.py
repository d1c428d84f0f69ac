"""Privacy: what kinds of metadata an image file carries, never what they say."""

import binascii
import re
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, Literal

from fruitdask.worker.images.boxes import Item, list_boxes, list_brands, read_items

#: What is looked for: any EXIF tag, a position, the serial number of a camera or lens, the name of a person.
KINDS: Final = ("exif", "gps", "serial", "name")

# Bounds that keep a hostile file from costing time or memory; each is far above what cameras and editors write.
_MAX_CHUNKS = 100_000
_MAX_BLOCKS = 128
_MAX_BLOCK_BYTES = 1 << 20
_MAX_TEXT_BYTES = 4 << 20
_MAX_DIRECTORIES = 16
_MAX_ENTRIES = 1_000
_MAX_VALUE_BYTES = 4_096

#: TIFF and BigTIFF in both byte orders.
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: Bytes of one number of each TIFF type (TIFF 6.0, BigTIFF); one of the types that are left out takes one.
_WIDTHS = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
#: Tags that point to other directories, and what these hold: EXIF, GPS, further images.
_POINTERS = {0x8769: "exif", 0x8825: "gps", 0x014A: "main"}
#: Tags that hold a block of another standard.
_BLOCK_TAGS = _XMP_TAG, _IPTC_TAG, _PHOTOSHOP_TAG = 0x02BC, 0x83BB, 0x8649
_TAG_KINDS = {
    0x013B: "name",  # Artist
    0x8298: "name",  # Copyright
    0x9C9D: "name",  # XPAuthor
    0xA430: "name",  # CameraOwnerName
    0xA431: "serial",  # BodySerialNumber
    0xA435: "serial",  # LensSerialNumber
    0xA437: "name",  # Photographer, of Exif 3.0
    0xA438: "name",  # ImageEditor, of Exif 3.0
    0xC62F: "serial",  # CameraSerialNumber, of DNG
}
#: Latitude and longitude of the camera and of the destination.
_GPS_TAGS = frozenset((0x02, 0x04, 0x14, 0x16))
#: Tags that make a TIFF file more than pixels; the rest of its first directory says how these are stored. Document name, description,
#: make, model, page name, software, time, artist, host computer, title to subject as Windows writes them, copyright, camera serial number.
_DESCRIPTIVE_TAGS = frozenset(
    (*range(0x010D, 0x0111), 0x011D, 0x0131, 0x0132, 0x013B, 0x013C, *range(0x9C9B, 0x9CA0), 0x8298, 0xC62F)
)
#: Record 2 of IPTC-IIM: by-line, credit, copyright notice, contact, writer.
_IPTC_NAMES = frozenset(bytes((2, number)) for number in (80, 110, 116, 118, 122))
_PHOTOSHOP_IPTC, _PHOTOSHOP_XMP = 0x0404, 0x0424
_BLANK = b"\0 \t\r\n"

#: Names of XMP properties without their prefix, and of PNG texts; drones spell some in their own way.
_PROPERTIES = {
    "gps": "GPSLatitude GPSLongitude GPSDestLatitude GPSDestLongitude GpsLatitude GpsLongitude GpsLongtitude",
    "serial": "SerialNumber BodySerialNumber LensSerialNumber CameraSerialNumber DroneSerialNumber",
    "name": "creator rights artist Artist author Author Copyright copyright Owner OwnerName CameraOwnerName Photographer ImageEditor"
    " CaptionWriter Credit PersonInImage PersonDisplayName ImageCreatorName CopyrightOwnerName LicensorName attributionName",
}
_TEXT_KINDS = {name.lower(): kind for kind, names in _PROPERTIES.items() for name in names.split()}
_NAMES = "|".join(f"(?P<{kind}>{names.replace(' ', '|')})" for kind, names in _PROPERTIES.items())
_ANY_NAME = "|".join(_PROPERTIES.values()).replace(" ", "|")
# Neither pattern goes over the same bytes again and again: quantifiers are possessive, and tags end where the next one begins.
_XMP_ATTRIBUTE = re.compile(rf""":(?:{_NAMES})\s*+=\s*+(?:"\s*+[^"]|'\s*+[^'])""".encode())
#: An element; tags within it, but not its end; and then text.
_XMP_ELEMENT = re.compile(
    rf"<[\w.-]{{1,32}}:(?:{_NAMES})(?:\s[^<>]*+)?(?<!/)>"
    rf"(?:\s*+<(?!/[\w.-]{{1,32}}:(?:{_ANY_NAME})\s*+>)[^<>]*+>){{0,8}}+\s*+[^<]".encode()
)
#: A line of its name, one of its length, and hexadecimal digits.
_RAW_PROFILE = re.compile(rb"\n[^\n]*+\n\s*+\d++\n([0-9A-Fa-f\s]*+)")
#: APP1 or APP13 with EXIF, XMP, the rest of a long XMP packet, or Photoshop's resources.
_JPEG_SEGMENT = re.compile(
    rb"\xff[\xe1\xed](..)(?=Exif\0\0|http://ns\.adobe\.com/x(?:ap/1\.0|mp/extension)/\0|Photoshop 3\.0\0)", re.DOTALL
)
#: What begins a box of a user in a JPEG 2000: EXIF, XMP, IPTC.
_UUIDS = (
    b"JpgTiffExif->JP2",
    bytes.fromhex("be7acfcb97a942e89c71999491e3afac"),
    bytes.fromhex("33c7a4d2b81d4723a0baf1a3e097ad38"),
)
#: Kinds of the items of an AVIF or HEIC that hold metadata.
_ITEM_KINDS = (b"Exif", b"mime", b"uri ", b"iptc")
#: XMP stands in a GIF without being cut into blocks.
_GIF_XMP = re.compile(rb"!\xff\x0bXMP DataXMP")
_JPEG2000_HEAD = b"\0\0\0\x0cjP  \r\n\x87\n"


def find_metadata(data: bytes) -> frozenset[str]:
    """Find what kinds of metadata an image file carries.

    Only the kinds are returned: no value leaves this function, neither in its result nor in a log or a warning.

    Reads Exif 2.32 (CIPA DC-008) and the names that Exif 3.0 added, XMP, IPTC-IIM 4.2 within Photoshop's resources, the
    text chunks of PNG, the items of AVIF and HEIC, the boxes of JPEG 2000 and the extensions of GIF, wherever they are
    in the file, without decoding pixels. Pillow is not asked: its readers stop at the pixels, and warn of broken tags,
    which cannot be silenced safely in one thread of several. An empty or blank value does not count, nor does a GPS
    directory without a position. The tags by which a TIFF describes its own pixels are not EXIF. A broken file gives
    what can still be found. At most 128 blocks of metadata a file, 1 MiB a block, and 16 directories of a TIFF are
    looked at.

    Makers' own notes are not read: some cameras, most of them from before 2010, keep their serial number only there.

    >>> import io
    >>> from PIL import Image
    >>> file, exif = io.BytesIO(), Image.Exif()
    >>> exif[0x013B] = "Jo Smith"
    >>> Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    >>> sorted(find_metadata(file.getvalue()))
    ['exif', 'name']
    """
    found: set[str] = set()
    for kind in _choose_search(data)(data):
        found.add(kind)
        if len(found) == len(KINDS):
            break
    return frozenset(found)


def _choose_search(data: bytes) -> Callable[[bytes], Iterator[str]]:
    """Tell the format by the first bytes."""
    if data.startswith(b"\xff\xd8"):
        return _search_jpeg
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _search_png
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _search_webp
    if data.startswith(_TIFF_HEADS):
        return lambda data: _search_tiff(data, is_file=True)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _search_gif
    if data.startswith(_JPEG2000_HEAD):
        return _search_jpeg2000
    if list_brands(data):
        return _search_items
    return lambda data: iter(())


def _search_jpeg(data: bytes) -> Iterator[str]:
    """Search the APP1 and APP13 segments, those behind the pixels too: coded pixels never look like a marker."""
    for match in islice(_JPEG_SEGMENT.finditer(data), _MAX_BLOCKS):
        yield from _search_block(data[match.end() : match.start(1) + int.from_bytes(match[1])])


def _search_webp(data: bytes) -> Iterator[str]:
    """Search the EXIF and XMP chunks."""
    for _, chunk in islice(_list_webp_chunks(data), _MAX_BLOCKS):
        yield from _search_block(chunk)


def _list_webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """List the names and contents of chunks of metadata."""
    at = 12
    for _ in range(_MAX_CHUNKS):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name in (b"EXIF", b"XMP "):
            yield name, data[at + 8 : at + 8 + size]
        # Chunks are padded to an even length.
        at += 8 + size + size % 2
        if at >= len(data):
            return


def _search_png(data: bytes) -> Iterator[str]:
    """Search the EXIF and text chunks, those behind the pixels too."""
    left_bytes = _MAX_TEXT_BYTES
    for name, chunk in islice(_list_png_chunks(data), _MAX_BLOCKS):
        if name == b"eXIf":
            yield from _search_block(chunk)
            continue
        keyword, text = _read_text(name, chunk)
        # A few compressed bytes can become a long text, again and again.
        if len(text) <= left_bytes:
            left_bytes -= len(text)
            yield from _search_text(keyword, text)


def _list_png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """List the names and contents of chunks of metadata."""
    at = 8
    for _ in range(_MAX_CHUNKS):
        size, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            yield name, data[at + 8 : at + 8 + size]
        # Length, name and checksum take twelve bytes.
        at += 12 + size
        if at >= len(data):
            return


def _search_items(data: bytes) -> Iterator[str]:
    """Search the items of an AVIF or HEIC that hold metadata, and XMP in a box of its own."""
    items = [item for item in read_items(data).by_number.values() if item.kind in _ITEM_KINDS]
    for item in items[:_MAX_BLOCKS]:
        yield from _search_block(_read_item(data, item))
    yield from _search_jpeg2000(data)


def _read_item(data: bytes, item: Item) -> bytes:
    """Read an item; before EXIF stands where it starts, and XMP may be compressed."""
    block = item.read(data, _MAX_BLOCK_BYTES)
    if item.kind == b"Exif":
        start = 4 + int.from_bytes(block[:4])
        # Some writers leave the number out, or have it wrong.
        return block[start:] if block[start : start + 4] in _TIFF_HEADS else block[_find_tiff(block) :]
    return _inflate(block) if item.encoding else block


def _find_tiff(block: bytes) -> int:
    """Find where a TIFF directory starts near the start of a block."""
    return min((at for head in _TIFF_HEADS if (at := block.find(head, 0, 64)) >= 0), default=0)


def _search_jpeg2000(data: bytes) -> Iterator[str]:
    """Search the boxes of users and of XML."""
    boxes = (box for box in list_boxes(data) if box.name in (b"uuid", b"xml "))
    for box in islice(boxes, _MAX_BLOCKS):
        block = data[box.start : min(box.end, box.start + _MAX_BLOCK_BYTES)]
        if box.name == b"xml ":
            yield from _search_xmp(block)
        elif block.startswith(_UUIDS):
            yield from _search_block(block[16:])


def _search_gif(data: bytes) -> Iterator[str]:
    """Search XMP, which may stand behind the frames, and the comments before the first one for XMP as well."""
    for match in islice(_GIF_XMP.finditer(data), _MAX_BLOCKS):
        yield from _search_xmp(data[match.end() : match.end() + _MAX_BLOCK_BYTES])
    for comment in islice(_list_gif_comments(data), _MAX_BLOCKS):
        yield from _search_block(comment)


def _list_gif_comments(data: bytes) -> Iterator[bytes]:
    """List the comments before the first frame."""
    screen = (data[10:11] or b"\0")[0]
    at = 13 + (6 << (screen & 7) if screen & 0x80 else 0)
    left_blocks = _MAX_CHUNKS
    while data[at : at + 1] == b"!" and left_blocks:
        is_comment, parts = data[at + 1 : at + 2] == b"\xfe", []
        at += 2
        while (size := int.from_bytes(data[at : at + 1])) and left_blocks:
            parts.append(data[at + 1 : at + 1 + size])
            at += 1 + size
            left_blocks -= 1
        at += 1
        left_blocks -= bool(left_blocks)
        if is_comment:
            yield b"".join(parts)[:_MAX_BLOCK_BYTES]


def _read_text(name: bytes, chunk: bytes) -> tuple[str, bytes]:
    """Read the keyword and the text of a PNG's text chunk."""
    keyword, _, text = chunk.partition(b"\0")
    is_compressed = name == b"zTXt" or name == b"iTXt" and text[:1] == b"\1"
    if name == b"zTXt":
        text = text[1:]
    elif name == b"iTXt":
        # Compression flag and method, then language and translated keyword, each with its end.
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]
    if is_compressed:
        text = _inflate(text)
    return keyword.decode("latin-1"), text[:_MAX_BLOCK_BYTES]


def _inflate(packed: bytes) -> bytes:
    """Decompress as much as is looked at; nothing where that is broken."""
    try:
        return zlib.decompressobj().decompress(packed, _MAX_BLOCK_BYTES)
    except zlib.error:
        return b""


def _search_text(keyword: str, text: bytes) -> Iterator[str]:
    """Search a PNG's text: one of a telling keyword, an XMP packet, or a block in hexadecimal as ImageMagick writes it."""
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
    """Search a block of any standard, told by its first bytes."""
    # Some writers put EXIF's mark twice.
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
    """Search the directories of EXIF, or of a whole TIFF file, which is built alike."""
    tiff = _Tiff(data)
    waiting, seen = deque([(tiff.first, "main")]), {0}
    while waiting and len(seen) <= _MAX_DIRECTORIES:
        offset, group = waiting.popleft()
        # Directories may point to each other, by mistake or to catch a reader.
        if offset in seen:
            continue
        seen.add(offset)
        entries, following = tiff.read_directory(offset)
        for tag, (width, value) in entries.items():
            if tag in _POINTERS and group == "main":
                waiting.extend((pointer, _POINTERS[tag]) for pointer in tiff.read_integers(value, width))
            # Only first directories and pages hold blocks; a hostile file could have each directory search the same bytes again.
            elif tag in _BLOCK_TAGS and (is_file or offset == tiff.first):
                yield from _search_inner_block(tag, value)
            else:
                yield from _judge(tag, value, group=group, is_file=is_file)
        if group == "main":
            waiting.append((following, "main"))


def _search_inner_block(tag: int, value: bytes) -> Iterator[str]:
    """Search a tag that holds a block of another standard; none of these holds EXIF again, so that blocks cannot nest without end."""
    if tag == _XMP_TAG:
        return _search_xmp(value)
    return _search_iptc(value) if tag == _IPTC_TAG else _search_photoshop(value)


def _judge(tag: int, value: bytes, *, group: str, is_file: bool) -> Iterator[str]:
    """Say what a tag of a directory gives away."""
    if not is_file or group != "main" or tag in _DESCRIPTIVE_TAGS:
        yield "exif"
    if group == "gps":
        # Cameras without a position write zeros over zeros, or nothing but the version.
        if tag in _GPS_TAGS and any(value):
            yield "gps"
    elif tag in _TAG_KINDS and value.strip(_BLANK):
        yield _TAG_KINDS[tag]


class _Tiff:
    """A reader of TIFF directories that takes any bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
        is_big = data.startswith(_TIFF_HEADS[2:])
        # The number of entries, an entry and an offset are wider in BigTIFF.
        self._n_bytes, layout = (8, "HHQ8s") if is_big else (2, "HHI4s")
        self._entry = struct.Struct(("<" if self._order == "little" else ">") + layout)
        self.first = int.from_bytes(data[8:16] if is_big else data[4:8], self._order)

    def read_directory(self, offset: int) -> tuple[dict[int, tuple[int, bytes]], int]:
        """Read a directory: for each tag the bytes that one number of it takes and its value, and the offset of the next directory."""
        start = offset + self._n_bytes
        n_entries = int.from_bytes(self._data[offset:start], self._order)
        packed = self._data[start : start + min(n_entries, _MAX_ENTRIES) * self._entry.size]
        whole = packed[: len(packed) // self._entry.size * self._entry.size]
        entries = {
            tag: (_WIDTHS.get(kind, 1), self._read_value(tag, count * _WIDTHS.get(kind, 1), field))
            for tag, kind, count, field in self._entry.iter_unpack(whole)
        }
        end = start + n_entries * self._entry.size
        return entries, int.from_bytes(self._data[end : end + (8 if self._n_bytes == 8 else 4)], self._order)

    def read_integers(self, value: bytes, width: int) -> list[int]:
        """Read a value as integers."""
        return [int.from_bytes(value[at : at + width], self._order) for at in range(0, len(value), width)]

    def _read_value(self, tag: int, size: int, field: bytes) -> bytes:
        """Read as much of a value as is looked at; one that fits lies in its entry, another where that points to."""
        if size <= len(field):
            return field[:size]
        at = int.from_bytes(field, self._order)
        return self._data[at : at + min(size, _MAX_BLOCK_BYTES if tag in _BLOCK_TAGS else _MAX_VALUE_BYTES)]


def _search_photoshop(data: bytes) -> Iterator[str]:
    """Search Photoshop's image resources for IPTC and XMP."""
    at = 0
    while data[at : at + 4] == b"8BIM":
        code, name_bytes = int.from_bytes(data[at + 4 : at + 6]), int.from_bytes(data[at + 6 : at + 7])
        # The name, with the byte of its length, and the resource are padded to an even length.
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
            # An extended dataset: the rest of the field counts the bytes that the size itself takes.
            width = size & 0x7FFF
            size = int.from_bytes(data[at : at + width])
            at += width
        if dataset in _IPTC_NAMES and data[at : at + min(size, _MAX_VALUE_BYTES)].strip(_BLANK):
            yield "name"
            return
        at += size


def _search_xmp(packet: bytes) -> Iterator[str]:
    """Search an XMP packet for properties that are not empty."""
    # Without its zeros a packet in UTF-16 or UTF-32 reads as one in UTF-8, as far as names go.
    text = packet[:_MAX_BLOCK_BYTES].replace(b"\0", b"")
    for pattern in (_XMP_ATTRIBUTE, _XMP_ELEMENT):
        for match in pattern.finditer(text):
            yield str(match.lastgroup)
