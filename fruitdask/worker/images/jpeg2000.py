"""JPEG 2000: what its headers announce, before OpenJPEG takes memory for it (ITU-T T.800, annexes A and I)."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from fruitdask.errors import ImageError
from fruitdask.worker.images.boxes import list_boxes

CODESTREAM = b"\xff\x4f\xff\x51"
FILE = b"\0\0\0\x0cjP  \r\n\x87\n"
# OpenJPEG takes memory for each of these before it reads a pixel. Each bound is far above what cameras and editors write.
_MAX_CHANNELS = 4
_MAX_TILES = 1 << 14
#: More than an image of 50 million pixels and four channels has in blocks of 16 x 16 pixels.
_MAX_BLOCKS = 1 << 20
#: A packet holds a layer of a precinct of a resolution of a channel.
_MAX_PACKETS = 1 << 22
_MAX_TILE_PARTS = 1 << 16
_MAX_MARKERS = 10_000

_SIZE, _CODING, _CODING_OF_CHANNEL, _START_OF_TILE, _START_OF_DATA = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93
_SRGB, _GREY, _SYCC, _CMYK = 16, 17, 18, 12
_COLOUR_SPACES = {_SRGB: 3, _GREY: 1, _SYCC: 3, _CMYK: 4}
#: What an ICC profile says that its colours are.
_PROFILE_SPACES = {b"RGB ": 3, b"GRAY": 1}


@dataclass(slots=True)
class Jpeg2000:
    """What the headers of a JPEG 2000 say: of its codestream, and of the boxes around it where there are some."""

    width: int = 0
    height: int = 0
    tile_width: int = 1
    tile_height: int = 1
    n_tiles: int = 0
    #: Of each channel: bits, whether it is signed, and by how much it is coarser than the image.
    channels: list[tuple[int, bool, tuple[int, int]]] = field(default_factory=list)
    n_blocks: int = 0
    #: Packets, at most: layers of precincts of resolutions of channels.
    n_packets: int = 0
    #: The number of an enumerated colour space, or the name that an ICC profile gives.
    colour_space: int | bytes | None = None
    #: For each channel that a box defines: number, type and what it belongs to.
    definitions: list[tuple[int, int, int]] = field(default_factory=list)
    #: Whether the channel is an index of colours.
    has_palette: bool = False


def read_jpeg2000(data: bytes) -> Jpeg2000:
    """Read the headers; raises an ImageError where they are broken or announce far more work than pixels."""
    found = Jpeg2000()
    start = 0 if data.startswith(CODESTREAM) else _read_boxes(data, found)
    try:
        _read_codestream(data, start, found)
    except (struct.error, IndexError, ZeroDivisionError) as error:
        raise ImageError("the image is broken: the headers of its JPEG 2000 cannot be read") from error
    return found


def check_colours(found: Jpeg2000) -> None:
    """Refuse channels of which the file does not say what they mean, or which Pillow gives wrongly."""
    n_channels = len(found.channels)
    bits = max(channel[0] for channel in found.channels)
    problem = None
    if any(is_signed for _, is_signed, _ in found.channels):
        problem = "signed numbers, of which the file does not say which one is black"
    elif any(step != (1, 1) for _, _, step in found.channels):
        problem = "channels of different sizes"
    elif len({channel[0] for channel in found.channels}) > 1:
        problem = "channels of different depths"
    elif bits > (16 if n_channels == 1 else 8):
        # Pillow 13 rounds colours of more than 8 bits up, and white over into black.
        problem = f"{n_channels} channels of {bits} bits, which can be read only in grey"
    elif n_channels in (2, 4) and found.colour_space != _CMYK and not _has_alpha(found, n_channels):
        problem = f"{n_channels} channels without a word of what the last one means"
    elif found.colour_space is not None:
        n_colours = (
            _COLOUR_SPACES.get(found.colour_space)
            if isinstance(found.colour_space, int)
            else _PROFILE_SPACES.get(found.colour_space)
        )
        if n_colours is None:
            problem = f"colour space {found.colour_space!r}"
        elif not found.has_palette and n_colours != n_channels - _has_alpha(found, n_channels):
            problem = f"{n_channels} channels in colour space {found.colour_space!r}"
    if problem:
        raise ImageError(f"expected a JPEG 2000 in grey, RGB, YCbCr or CMYK, found one of {problem}; convert it to 8 bits a channel")


def _has_alpha(found: Jpeg2000, n_channels: int) -> bool:
    """Tell whether the last channel says how opaque the colours before it are, which come in their order."""
    colours = [(number, 0, number + 1) for number in range(n_channels - 1)]
    return sorted(found.definitions) == [*colours, (n_channels - 1, 1, 0)]


def _read_boxes(data: bytes, found: Jpeg2000) -> int:
    """Read the boxes around a codestream; gives where that starts."""
    for box in list_boxes(data):
        if box.name == b"jp2c":
            return box.start
        if box.name != b"jp2h":
            continue
        for inner in list_boxes(data, box.start, box.end):
            content = data[inner.start : min(inner.end, inner.start + 1_000)]
            if inner.name == b"colr" and found.colour_space is None:
                found.colour_space = int.from_bytes(content[3:7]) if content[:1] == b"\1" else content[19:23]
            elif inner.name == b"cdef":
                found.definitions += struct.iter_unpack(">HHH", content[2 : 2 + (len(content) - 2) // 6 * 6])
            elif inner.name == b"pclr":
                found.has_palette = True
    raise ImageError("the image is broken: its JPEG 2000 has no codestream")


def _read_codestream(data: bytes, start: int, found: Jpeg2000) -> None:
    """Read the markers of the main header, and of those tiles that are coded in another way."""
    if data[start : start + 4] != CODESTREAM:
        raise ImageError("the image is broken: its JPEG 2000 has no codestream")
    for marker, content in _list_markers(data, start + 2):
        if marker == _SIZE:
            _read_size(content, found)
        elif marker == _CODING:
            layers, (levels, *blocks) = int.from_bytes(content[2:4]), content[5:]
            _count_work(found, layers=layers, levels=levels, blocks=blocks, has_precincts=bool(content[0] & 1))
        elif marker == _CODING_OF_CHANNEL:
            # The number of the channel takes a byte, as there are fewer than 257; the number of layers was in an earlier marker.
            levels, *blocks = content[2:]
            _count_work(found, layers=1, levels=levels, blocks=blocks, has_precincts=bool(content[1] & 1))
        for n_found, n_allowed, name in (
            (len(found.channels), _MAX_CHANNELS, "channels"),
            (found.n_tiles, _MAX_TILES, "tiles"),
            (found.n_blocks, _MAX_BLOCKS, "blocks"),
            (found.n_packets, _MAX_PACKETS, "packets"),
        ):
            if n_found > n_allowed:
                raise ImageError(f"expected a JPEG 2000 with at most {n_allowed:,} {name}, found {n_found:,}")
    if not found.channels:
        raise ImageError("the image is broken: the headers of its JPEG 2000 cannot be read")


def _list_markers(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """List the markers of the main header and of the tiles' headers, without what is coded."""
    n_parts, end_of_part = 0, 0
    for _ in range(_MAX_MARKERS + _MAX_TILE_PARTS):
        marker = int.from_bytes(data[at : at + 2])
        if marker == _START_OF_DATA:
            if end_of_part <= at:
                return
            at = end_of_part
            continue
        size = int.from_bytes(data[at + 2 : at + 4])
        if marker < 0xFF00 or size < 2 or at + 2 + size > len(data):
            return
        content = data[at + 4 : at + 2 + size]
        if marker == _START_OF_TILE:
            n_parts += 1
            length = int.from_bytes(content[2:6])
            # A length of zero means that the tile goes to the end.
            end_of_part = at + length if length else len(data)
            if n_parts > _MAX_TILE_PARTS:
                raise ImageError(f"expected a JPEG 2000 with at most {_MAX_TILE_PARTS:,} parts of tiles, found more")
        yield marker, content
        at += 2 + size
    raise ImageError(f"expected a JPEG 2000 with at most {_MAX_MARKERS:,} markers, found more")


def _read_size(content: bytes, found: Jpeg2000) -> None:
    """Read the marker that says what sizes image, tiles and channels have."""
    right, lower, left, upper, tile_width, tile_height, tile_left, tile_upper, n_channels = struct.unpack_from(
        ">8IH", content, 2
    )
    found.width, found.height = right - left, lower - upper
    found.tile_width, found.tile_height = min(tile_width, found.width), min(tile_height, found.height)
    found.n_tiles = -(-(right - tile_left) // tile_width) * -(-(lower - tile_upper) // tile_height)
    if n_channels > _MAX_CHANNELS:
        raise ImageError(f"expected a JPEG 2000 with at most {_MAX_CHANNELS} channels, found {n_channels:,}")
    found.channels = [
        ((depth & 0x7F) + 1, depth > 0x7F, (x_step, y_step))
        for depth, x_step, y_step in struct.iter_unpack("BBB", content[36 : 36 + 3 * n_channels])
    ]


def _count_work(found: Jpeg2000, *, layers: int, levels: int, blocks: list[int], has_precincts: bool) -> None:
    """Count the blocks and packets that a way of coding makes of an image."""
    n_blocks = n_packets = 0
    for resolution in range(min(levels, 32) + 1):
        shift = max(levels - resolution, 0)
        width, height = -(-found.tile_width >> shift), -(-found.tile_height >> shift)
        precinct = blocks[4 + resolution] if has_precincts else 0xFF
        x_bits, y_bits = precinct & 15, precinct >> 4
        # A tile need not start where a precinct does.
        n_precincts = ((width >> x_bits) + 2) * ((height >> y_bits) + 2) if has_precincts else 1
        # The code of a block's side is the exponent less two; a precinct bounds it.
        block_bits = min(blocks[0] + 2, x_bits) + min(blocks[1] + 2, y_bits)
        n_blocks += max((width * height) >> block_bits, n_precincts)
        n_packets += n_precincts
    n_pieces = found.n_tiles * max(len(found.channels), 1)
    found.n_blocks = max(found.n_blocks, n_blocks * n_pieces)
    found.n_packets = max(found.n_packets, n_packets * layers * n_pieces)
