"""JPEG 2000: what its headers announce, read before OpenJPEG allocates memory for it (ITU-T T.800, annexes A and I)."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from fruitdask.errors import ImageError
from fruitdask.worker.images.boxes import list_boxes

CODESTREAM = b"\xff\x4f\xff\x51"
FILE = b"\0\0\0\x0cjP  \r\n\x87\n"
# OpenJPEG allocates memory for each of these before it reads a pixel. Each bound is far above what editors write.
_MAX_CHANNELS = 4
_MAX_TILES = 1 << 14
#: More than an image of 50 million pixels and four channels has in blocks of 16 x 16 pixels.
_MAX_BLOCKS = 1 << 20
#: A packet holds a layer of a precinct of a resolution of a channel.
_MAX_PACKETS = 1 << 22
_MAX_TILE_PARTS = 1 << 16
_MAX_MARKERS = 10_000

_SIZE, _CODING, _CODING_OF_CHANNEL, _START_OF_TILE, _START_OF_DATA = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93
_CMYK = 12
#: Colours of each enumerated colour space (sRGB, grey, sYCC, CMYK) and of each ICC profile's.
_N_COLOURS: dict[int | bytes, int] = {16: 3, 17: 1, 18: 3, _CMYK: 4, b"RGB ": 3, b"GRAY": 1}
_BROKEN = "the image is broken: the headers of its JPEG 2000 cannot be read"


@dataclass(slots=True)
class Jpeg2000:
    """The headers of a JPEG 2000: of its codestream, and of the boxes around it if any."""

    width: int = 0
    height: int = 0
    tile_width: int = 1
    tile_height: int = 1
    n_tiles: int = 0
    #: Of each channel: bits, whether it is signed, and its subsampling.
    channels: list[tuple[int, bool, tuple[int, int]]] = field(default_factory=list)
    n_blocks: int = 0
    #: Upper bound.
    n_packets: int = 0
    #: The number of an enumerated colour space, or the name from an ICC profile.
    colour_space: int | bytes | None = None
    #: For each channel that a box defines: number, type and association.
    definitions: list[tuple[int, int, int]] = field(default_factory=list)
    #: Whether the channel is an index into a palette.
    has_palette: bool = False


def read_jpeg2000(data: bytes) -> Jpeg2000:
    """Read the headers; raises ImageError if they are broken or announce far more work than pixels."""
    found = Jpeg2000()
    start = 0 if data.startswith(CODESTREAM) else _read_boxes(data, found)
    try:
        _read_codestream(data, start, found)
    except (struct.error, IndexError, ZeroDivisionError) as error:
        raise ImageError(_BROKEN) from error
    return found


def check_colours(found: Jpeg2000) -> None:
    """Refuse channels whose meaning the file does not state, or that Pillow decodes wrongly."""
    n_channels, space, problem = len(found.channels), found.colour_space, None
    bits = max(channel[0] for channel in found.channels)
    # The last channel is alpha if a box says so and lists the colours before it in their order.
    alpha = [*((number, 0, number + 1) for number in range(n_channels - 1)), (n_channels - 1, 1, 0)]
    has_alpha = sorted(found.definitions) == alpha
    if any(is_signed for _, is_signed, _ in found.channels):
        problem = "signed numbers (the file does not say which one is black)"
    elif any(step != (1, 1) for _, _, step in found.channels):
        problem = "channels of different sizes"
    elif len({channel[0] for channel in found.channels}) > 1:
        problem = "channels of different depths"
    elif bits > (16 if n_channels == 1 else 8):
        # Pillow 13 rounds colours of more than 8 bits up, and white overflows to black.
        problem = f"{n_channels} channels of {bits} bits (only grey can have more than 8)"
    elif n_channels in (2, 4) and space != _CMYK and not has_alpha:
        problem = f"{n_channels} channels (the file does not say what the last one means)"
    elif space is not None and space not in _N_COLOURS:
        problem = f"colour space {space!r}"
    elif space is not None and not found.has_palette and _N_COLOURS[space] != n_channels - has_alpha:
        problem = f"{n_channels} channels in colour space {space!r}"
    if problem:
        raise ImageError(
            f"expected a JPEG 2000 in grey, RGB, YCbCr or CMYK, found one with {problem}; "
            "convert it to 8 bits per channel"
        )


def _read_boxes(data: bytes, found: Jpeg2000) -> int:
    """Read the boxes around a codestream; returns the offset of the codestream."""
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
    """Read the markers of the main header, and of tiles that override its coding."""
    if data[start : start + 4] != CODESTREAM:
        raise ImageError("the image is broken: its JPEG 2000 has no codestream")
    for marker, content in _list_markers(data, start + 2):
        if marker == _SIZE:
            _read_size(content, found)
        elif marker == _CODING:
            layers, (levels, *blocks) = int.from_bytes(content[2:4]), content[5:]
            _count_work(found, layers=layers, levels=levels, blocks=blocks, has_precincts=bool(content[0] & 1))
        elif marker == _CODING_OF_CHANNEL:
            # With fewer than 257 channels their numbers take a byte; an earlier marker held the number of layers.
            levels, *blocks = content[2:]
            _count_work(found, layers=1, levels=levels, blocks=blocks, has_precincts=bool(content[1] & 1))
        for n_found, n_allowed, name in (
            (len(found.channels), _MAX_CHANNELS, "channels"),
            (found.n_tiles, _MAX_TILES, "tiles"),
            (found.n_blocks, _MAX_BLOCKS, "blocks"),
            (found.n_packets, _MAX_PACKETS, "packets"),
        ):
            _check_count(n_found, n_allowed, name)
    if not found.channels:
        raise ImageError(_BROKEN)


def _check_count(n_found: int, n_allowed: int, name: str) -> None:
    """Refuse more of something than is allowed."""
    if n_found > n_allowed:
        raise ImageError(f"expected a JPEG 2000 with at most {n_allowed:,} {name}, found {n_found:,}")


def _list_markers(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """List the markers of the main header and of the tiles' headers, skipping coded data."""
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
            # A length of zero means up to the end.
            end_of_part = at + length if length else len(data)
            _check_count(n_parts, _MAX_TILE_PARTS, "tile parts")
        yield marker, content
        at += 2 + size
    raise ImageError(f"expected a JPEG 2000 with at most {_MAX_MARKERS:,} markers, found more")


def _read_size(content: bytes, found: Jpeg2000) -> None:
    """Read the marker with the sizes of image, tiles and channels."""
    right, lower, left, upper, tile_width, tile_height, tile_left, tile_upper, n_channels = struct.unpack_from(
        ">8IH", content, 2
    )
    found.width, found.height = right - left, lower - upper
    found.tile_width, found.tile_height = min(tile_width, found.width), min(tile_height, found.height)
    found.n_tiles = -(-(right - tile_left) // tile_width) * -(-(lower - tile_upper) // tile_height)
    _check_count(n_channels, _MAX_CHANNELS, "channels")
    found.channels = [
        ((depth & 0x7F) + 1, depth > 0x7F, (x_step, y_step))
        for depth, x_step, y_step in struct.iter_unpack("BBB", content[36 : 36 + 3 * n_channels])
    ]


def _count_work(found: Jpeg2000, *, layers: int, levels: int, blocks: list[int], has_precincts: bool) -> None:
    """Count the blocks and packets of an image with some coding parameters."""
    n_blocks = n_packets = 0
    for resolution in range(min(levels, 32) + 1):
        shift = max(levels - resolution, 0)
        width, height = -(-found.tile_width >> shift), -(-found.tile_height >> shift)
        precinct = blocks[4 + resolution] if has_precincts else 0xFF
        x_bits, y_bits = precinct & 15, precinct >> 4
        # Tiles need not be aligned with precincts.
        n_precincts = ((width >> x_bits) + 2) * ((height >> y_bits) + 2) if has_precincts else 1
        # A block's side is coded as its exponent minus two; a precinct bounds it.
        block_bits = min(blocks[0] + 2, x_bits) + min(blocks[1] + 2, y_bits)
        n_blocks += max((width * height) >> block_bits, n_precincts)
        n_packets += n_precincts
    n_pieces = found.n_tiles * max(len(found.channels), 1)
    found.n_blocks = max(found.n_blocks, n_blocks * n_pieces)
    found.n_packets = max(found.n_packets, n_packets * layers * n_pieces)
