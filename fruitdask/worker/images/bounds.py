"""Bounds that keep a small file from costing minutes or gigabytes; each is far above what cameras and editors write."""

import re

from PIL import Image

from fruitdask.errors import ImageError, ImageTooLargeError
from fruitdask.worker.images.boxes import read_items
from fruitdask.worker.images.heic import is_avif, is_heic
from fruitdask.worker.images.tiff import TiffReader

#: The longest side that a JPEG can have. Resizing costs memory and time per side, whatever the number of pixels.
_MAX_SIDE_PX = 65_535
#: Each scan visits all pixels of a JPEG; libtiff has the same bound.
_MAX_SCANS = 100
_MAX_EXIF_SEGMENTS = 256
_MAX_COLOUR_PROFILES = 64
#: More than an image of 50 million pixels has in the smallest tiles of TIFF 6.0, 16 x 16 pixels.
_MAX_STRIPS = 1 << 18
#: Strips and tiles cover an image once, or once per channel.
_MAX_COVERS = 8
#: Blocks of up to 255 bytes before the first frame of a GIF: comments, colour profiles, XMP.
_MAX_GIF_BLOCKS = 1 << 16
#: Tiles, thumbnails and metadata of an AVIF or HEIC; libheif has the same bound.
_MAX_ITEMS = 1_000
#: libheif copies the metadata for each picture of a file, and pictures may share it.
_MAX_METADATA_BYTES = 1 << 28
#: Offsets of strips and of tiles.
_STRIP_TAGS = (0x0111, 0x0144)
#: A JPEG marker that is not a restart within a scan.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_START_OF_SCAN, _END_OF_IMAGE, _MARKERS_WITHOUT_LENGTH = 0xDA, 0xD9, (0x01, 0xD8)


def check_size(image: Image.Image, max_pixels: int) -> None:
    """Refuse an image with too many pixels, too long a side, or strips that are decoded over each other."""
    n_pixels = image.width * image.height
    found = f"found {image.width} x {image.height}"
    if n_pixels > max_pixels:
        raise ImageTooLargeError(
            f"expected at most {max_pixels:,} pixels (featurize.max_pixels), {found} = {n_pixels:,}"
        )
    if max(image.size) > _MAX_SIDE_PX:
        raise ImageTooLargeError(f"expected sides of at most {_MAX_SIDE_PX:,} pixels, {found}")
    extents = [piece[1] for piece in getattr(image, "tile", ())]
    if sum((right - left) * (lower - upper) for left, upper, right, lower in extents) > _MAX_COVERS * n_pixels:
        raise ImageError(f"expected strips that cover the image once, found {len(extents):,} that overlap many times")


def check_structure(data: bytes) -> None:
    """Refuse a file with so many parts that a decoder would spend minutes or gigabytes on them."""
    if data.startswith(b"\xff\xd8"):
        counts = {
            "scans": (_count_scans(data), _MAX_SCANS),
            "blocks of EXIF": (data.count(b"Exif\0\0"), _MAX_EXIF_SEGMENTS),
        }
    elif data.startswith(b"\x89PNG"):
        counts = {"colour profiles": (data.count(b"iCCP"), _MAX_COLOUR_PROFILES)}
    elif data.startswith((b"II", b"MM")):
        tiff = TiffReader(data)
        counted = (count for tag, (_, count, _) in tiff.list_entries(tiff.first) if tag in _STRIP_TAGS)
        counts = {"strips or tiles": (max(counted, default=0), _MAX_STRIPS)}
    elif data.startswith(b"GIF8"):
        counts = {"blocks before its first frame": (read_gif_head(data)[0], _MAX_GIF_BLOCKS)}
    elif is_heic(data) or is_avif(data):
        counts = _count_items(data)
    else:
        return
    for name, (n_found, n_allowed) in counts.items():
        if n_found > n_allowed:
            raise ImageError(f"expected an image with at most {n_allowed:,} {name}, found {n_found:,}")


def read_gif_head(data: bytes) -> tuple[int, int, list[bytes]]:
    """Read what precedes the first frame of a GIF: the number of blocks, the offset of the frame, and the comments."""
    screen = (data[10:11] or b"\0")[0]
    at, n_blocks, comments = 13 + (6 << (screen & 7) if screen & 0x80 else 0), 0, []
    while data[at : at + 1] == b"!" and n_blocks <= _MAX_GIF_BLOCKS:
        is_comment, parts = data[at + 1 : at + 2] == b"\xfe", []
        # After the type's byte come blocks, each after a byte with its length, up to an empty one.
        at += 2
        while (size := int.from_bytes(data[at : at + 1])) and n_blocks <= _MAX_GIF_BLOCKS:
            parts += [data[at + 1 : at + 1 + size]] if is_comment else []
            at += 1 + size
            n_blocks += 1
        at += 1
        n_blocks += 1
        comments += [b"".join(parts)] if is_comment else []
    return n_blocks, at, comments


def _count_scans(data: bytes) -> int:
    """Count the scans of a JPEG up to its end marker; phones append videos after it."""
    n_scans = data.count(b"\xff\xda")
    if n_scans <= _MAX_SCANS:
        return n_scans
    n_scans, at = 0, 2
    while (match := _MARKER.search(data, at)) and match[1][0] != _END_OF_IMAGE:
        marker, at = match[1][0], match.end()
        n_scans += marker == _START_OF_SCAN
        at += 0 if marker in _MARKERS_WITHOUT_LENGTH else int.from_bytes(data[at : at + 2])
    return n_scans


def _count_items(data: bytes) -> dict[str, tuple[int, int]]:
    """Count the items of an AVIF or HEIC, and the bytes of metadata that libheif may copy for them."""
    items = read_items(data).by_number
    metadata = [item for item in items.values() if item.kind in (b"Exif", b"mime", b"uri ")]
    if any(item.encoding for item in metadata):
        raise ImageError(
            "expected uncompressed metadata in an AVIF or HEIC, found compressed metadata; convert it to JPEG"
        )
    n_bytes = sum(item.n_bytes for item in metadata) * (len(items) - len(metadata))
    return {"items": (len(items), _MAX_ITEMS), "bytes of metadata for all its items": (n_bytes, _MAX_METADATA_BYTES)}
