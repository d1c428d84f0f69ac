"""Boxes of ISO base media files (AVIF, HEIC, MP4) and JPEG 2000: a reader that accepts any bytes, in bounded time."""

from collections.abc import Iterator
from dataclasses import dataclass, field

#: Far more boxes than files of cameras and editors have.
_MAX_BOXES = 10_000
_MAX_EXTENTS = 10_000


@dataclass(frozen=True, slots=True)
class Box:
    """A box: its four-byte name, and where its content starts and ends in the file."""

    name: bytes
    start: int
    end: int


@dataclass(slots=True)
class Item:
    """A picture of an AVIF or HEIC file, or metadata."""

    #: Four bytes, for example ``hvc1`` or ``Exif``.
    kind: bytes
    #: The compression of an item whose kind is ``mime``.
    encoding: bytes = b""
    extents: list[tuple[int, int]] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Size of the item."""
        return sum(end - start for start, end in self.extents)

    def read(self, data: bytes, most: int) -> bytes:
        """Read the item, but at most `most` bytes of it."""
        content = bytearray()
        for start, end in self.extents:
            content += data[start : min(end, start + most - len(content))]
            if len(content) >= most:
                break
        return bytes(content)


@dataclass(slots=True)
class Items:
    """The items of an AVIF or HEIC file."""

    by_number: dict[int, Item] = field(default_factory=dict)
    #: The number of the picture that is displayed.
    primary: int = 0
    #: Names of that picture's properties.
    properties: frozenset[bytes] = frozenset()


def list_boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[Box]:
    """List the boxes from one offset to another."""
    end = len(data) if end is None else end
    for _ in range(_MAX_BOXES):
        size, head = _read(data, start, 4), 8
        if size == 1:
            size, head = _read(data, start + 8, 8), 16
        elif size == 0:
            # The last box may extend to the end of the file.
            size = end - start
        if size < head or start + head > end:
            return
        yield Box(data[start + 4 : start + 8], start + head, min(start + size, end))
        start += size


def list_brands(data: bytes) -> tuple[bytes, ...]:
    """List the brands of an ISO base media file, the major one first; empty for any other file."""
    if data[4:8] != b"ftyp":
        return ()
    end = min(_read(data, 0, 4), len(data), 1 << 10)
    return data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))


def read_items(data: bytes) -> Items:
    """Read the items of an AVIF or HEIC file (ISO/IEC 14496-12, section 8.11)."""
    items = Items()
    meta = next((box for box in list_boxes(data) if box.name == b"meta"), None)
    if meta is None:
        return items
    # Version and flags take four bytes.
    boxes = {box.name: box for box in list_boxes(data, meta.start + 4, meta.end)}
    if box := boxes.get(b"iinf"):
        items.by_number = dict(_list_entries(data, box))
    if box := boxes.get(b"iloc"):
        _add_extents(data, box, boxes.get(b"idat"), items.by_number)
    if box := boxes.get(b"pitm"):
        items.primary = _read(data, box.start + 4, 4 if data[box.start : box.start + 1] > b"\0" else 2)
    if box := boxes.get(b"iprp"):
        items.properties = frozenset(_list_properties(data, box, items.primary))
    return items


def _read(data: bytes, at: int, n_bytes: int) -> int:
    """Read an integer; bytes beyond the end of the file are ignored."""
    return int.from_bytes(data[at : at + n_bytes])


def _list_entries(data: bytes, iinf: Box) -> Iterator[tuple[int, Item]]:
    """List the numbers of items and the items."""
    start = iinf.start + (6 if data[iinf.start : iinf.start + 1] == b"\0" else 8)
    for box in list_boxes(data, start, iinf.end):
        version = _read(data, box.start, 1)
        if box.name != b"infe" or version < 2:
            continue
        width = 2 if version == 2 else 4
        # Number and protection precede the kind; name, content type and encoding follow it.
        at = box.start + 4 + width + 2
        _, _, encoding, *_ = data[at + 4 : min(box.end, at + 1_000)].split(b"\0") + [b"", b"", b""]
        yield _read(data, box.start + 4, width), Item(data[at : at + 4], encoding)


def _add_extents(data: bytes, iloc: Box, idat: Box | None, items: dict[int, Item]) -> None:
    """Add the extents in the file to the items."""
    version = _read(data, iloc.start, 1)
    sizes = data[iloc.start + 4 : iloc.start + 6].ljust(2, b"\0")
    offset_bytes, length_bytes, base_bytes = sizes[0] >> 4, sizes[0] & 15, sizes[1] >> 4
    index_bytes = sizes[1] & 15 if version else 0
    number_bytes = 4 if version == 2 else 2
    at, n_left = iloc.start + 6 + number_bytes, _MAX_EXTENTS
    for _ in range(min(_read(data, iloc.start + 6, number_bytes), _MAX_BOXES)):
        item = items.get(_read(data, at, number_bytes))
        at += number_bytes
        method = _read(data, at, 2) & 15 if version else 0
        at += 4 if version else 2
        base = _read(data, at, base_bytes) + (idat.start if method == 1 and idat else 0)
        n_extents = _read(data, at + base_bytes, 2)
        at += base_bytes + 2
        if at >= iloc.end or n_extents > n_left:
            return
        n_left -= n_extents
        for _ in range(n_extents):
            start = base + _read(data, at + index_bytes, offset_bytes)
            length = _read(data, at + index_bytes + offset_bytes, length_bytes)
            at += index_bytes + offset_bytes + length_bytes
            if item and start < len(data):
                # A length of zero means up to the end of the file.
                item.extents.append((start, min(start + length, len(data)) if length else len(data)))


def _list_properties(data: bytes, iprp: Box, number: int) -> Iterator[bytes]:
    """List the names of an item's properties."""
    boxes = list(list_boxes(data, iprp.start, iprp.end))
    names = [prop.name for box in boxes if box.name == b"ipco" for prop in list_boxes(data, box.start, box.end)]
    for box in (box for box in boxes if box.name == b"ipma"):
        version, flags = _read(data, box.start, 1), _read(data, box.start + 1, 3)
        number_bytes, index_bytes = 4 if version else 2, 2 if flags & 1 else 1
        at = box.start + 8
        for _ in range(min(_read(data, box.start + 4, 4), _MAX_BOXES)):
            n_properties = _read(data, at + number_bytes, 1)
            start = at + number_bytes + 1
            if _read(data, at, number_bytes) == number:
                for place in range(start, start + n_properties * index_bytes, index_bytes):
                    # The first bit marks essential properties.
                    index = _read(data, place, index_bytes) & (0x7FFF if index_bytes == 2 else 0x7F)
                    if 0 < index <= len(names):
                        yield names[index - 1]
            at = start + n_properties * index_bytes
            if at >= box.end:
                break
