"""Images: from the bytes of a file to pixels, and nothing but pixels."""

import io
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from fruitdask.errors import ImageError, ImageTooLargeError

#: What is decoded, by content; Pillow knows further formats, some of which start other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
_WHITE = (255, 255, 255, 255)
#: Rows that are converted at once.
_BAND_PX = 256
#: The longest side that a JPEG can have. Resizing takes memory and time by the length of a side, whatever the number of pixels.
_MAX_SIDE_PX = 65_535
# Bounds that keep a small file from costing minutes or gigabytes; each is far above what cameras and editors write.
#: Each scan goes over all pixels of a JPEG; libtiff has the same bound.
_MAX_SCANS = 100
_MAX_EXIF_SEGMENTS = 256
_MAX_COLOUR_PROFILES = 64
#: More than an image of 50 million pixels has in the smallest tiles that TIFF 6.0 admits, of 16 x 16.
_MAX_STRIPS = 1 << 18
#: Strips and tiles cover an image once, or once for each of its channels.
_MAX_COVERS = 8
#: Offsets of strips and of tiles.
_STRIP_TAGS = (0x0111, 0x0144)
_BIG_TIFF = 43
#: A marker of JPEG that is no restart within a scan.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_START_OF_SCAN, _END_OF_IMAGE, _MARKERS_WITHOUT_LENGTH = 0xDA, 0xD9, (0x01, 0xD8)
#: What undoes each EXIF orientation (Exif 2.32, section 4.6.4 A, tag 0x0112).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, size_px: int, max_pixels: int, is_fast: bool = False) -> npt.NDArray[np.uint8]:
    """
    Decode an image and resize it to a square, upright and without its metadata.

    The EXIF orientation is applied, then EXIF, GPS positions, serial numbers, comments and colour profiles are dropped: an array has no
    place for them. Transparent pixels are laid on white. An animation gives its first frame.

    Parameters
    ----------
    data : bytes
        The content of a JPEG, PNG, WebP, TIFF or BMP file.
    size_px : int
        Side of the result, in pixels.
    max_pixels : int
        An image whose header announces more pixels is not decoded. Images that threads of a process decode at once have together no more
        either: one waits for another. They take 4 to 8 bytes a pixel, in a WebP 16.
    is_fast : bool
        Let the JPEG decoder halve, quarter or eighth an image that stays at least as large as the result, before it is resized: half the
        work, nearly the same pixels.

    Returns
    -------
    numpy.ndarray
        RGB pixels of shape (size_px, size_px, 3), uint8, 0 to 255.

    Raises
    ------
    ImageTooLargeError
        If the image has more than ``max_pixels``, or a side of more than 65,535.
    ImageError
        If the bytes are not a whole image, or would take far more work than their pixels.

    Notes
    -----
    Resizing is Pillow's bicubic filter with antialiasing, over the whole image and without keeping its proportions, as
    ``keras.utils.load_img(target_size=..., interpolation="bicubic")`` does.
    """
    try:
        with _open(data) as image:
            _check_size(image, max_pixels)
            if is_fast:
                image.draft(None, (size_px, size_px))
            # Closed within, for its pixels must go before another's come.
            with _in_work.hold(image.width * image.height, most=max_pixels), closing(image):
                # Before the conversion, which has no EXIF any more; some formats have it behind the pixels.
                image.load()
                turn = _find_turn(image)
                pixels = _convert_to_rgb(image).resize((size_px, size_px), Image.Resampling.BICUBIC)
            # A square is turned as well after it is resized, in a fraction of the time and without a second image of full size.
            return np.asarray(pixels if turn is None else pixels.transpose(turn))
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"expected at most {max_pixels:,} pixels (featurize.max_pixels), found more than Pillow opens"
        ) from error
    except Exception as error:
        # Decoders meet hostile bytes here and raise whatever they like: OSError, SyntaxError, struct.error, KeyError ...
        raise ImageError(_explain(data, error)) from error


def decode_images(
    files: Sequence[bytes], *, size_px: int, max_pixels: int, is_fast: bool = False
) -> list[npt.NDArray[np.uint8] | ImageError]:
    """
    Decode several images; one that cannot be decoded does not keep the others from it.

    Parameters
    ----------
    files : Sequence[bytes]
        Contents of image files.
    size_px : int
        Side of the results, in pixels.
    max_pixels : int
        Images with more pixels are not decoded.
    is_fast : bool
        As in `decode_image`.

    Returns
    -------
    list
        For each file its pixels, uint8 of shape (size_px, size_px, 3), or the error that says why there are none.
    """
    decoded: list[npt.NDArray[np.uint8] | ImageError] = []
    for data in files:
        try:
            decoded.append(decode_image(data, size_px=size_px, max_pixels=max_pixels, is_fast=is_fast))
        except ImageError as error:
            decoded.append(error)
    return decoded


def read_header(data: bytes) -> tuple[str, int, int] | None:
    """
    Read the format and the size of an image without decoding it.

    Parameters
    ----------
    data : bytes
        The content of a file.

    Returns
    -------
    tuple[str, int, int] or None
        Format (``JPEG``, ``PNG``, ``WEBP``, ``TIFF`` or ``BMP``), width and height in pixels as stored; None where it is not an image.
    """
    try:
        with _open(data) as image:
            return str(image.format), image.width, image.height
    except MemoryError:
        raise
    except Exception:
        # Whatever a decoder raises at hostile bytes.
        return None


def can_read_heic() -> bool:
    """Tell whether HEIC images can be read here: whether the package of the extra `heic` is installed. Nothing is imported."""
    return find_spec("pillow_heif") is not None


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """Open an image that does not ask for far more work than its pixels take."""
    _check_structure(data)
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        yield image


def _check_size(image: Image.Image, max_pixels: int) -> None:
    """Refuse an image of too many pixels, of too long a side, or of pieces that are decoded over each other."""
    n_pixels = image.width * image.height
    if n_pixels > max_pixels:
        raise ImageTooLargeError(
            f"expected at most {max_pixels:,} pixels (featurize.max_pixels), found {image.width} x {image.height} = {n_pixels:,}"
        )
    if max(image.size) > _MAX_SIDE_PX:
        raise ImageTooLargeError(
            f"expected sides of at most {_MAX_SIDE_PX:,} pixels, found {image.width} x {image.height}"
        )
    extents = [piece[1] for piece in getattr(image, "tile", ())]
    if sum((right - left) * (lower - upper) for left, upper, right, lower in extents) > _MAX_COVERS * n_pixels:
        raise ImageError(
            f"expected strips that cover the image once, found {len(extents):,} that cover it again and again"
        )


def _check_structure(data: bytes) -> None:
    """Refuse a file whose parts are so many that a decoder would spend minutes or gigabytes on them."""
    if data.startswith(b"\xff\xd8"):
        counts = {
            "scans": (_count_scans(data), _MAX_SCANS),
            "blocks of EXIF": (data.count(b"Exif\0\0"), _MAX_EXIF_SEGMENTS),
        }
    elif data.startswith(b"\x89PNG"):
        counts = {"colour profiles": (data.count(b"iCCP"), _MAX_COLOUR_PROFILES)}
    elif data.startswith((b"II", b"MM")):
        counts = {"strips or tiles": (_count_strips(data), _MAX_STRIPS)}
    else:
        return
    for name, (n_found, n_allowed) in counts.items():
        if n_found > n_allowed:
            raise ImageError(f"expected an image with at most {n_allowed:,} {name}, found {n_found:,}")


def _count_scans(data: bytes) -> int:
    """Count the scans of a JPEG up to its end, behind which phones put videos."""
    n_scans = data.count(b"\xff\xda")
    if n_scans <= _MAX_SCANS:
        return n_scans
    n_scans, at = 0, 2
    while (match := _MARKER.search(data, at)) and match[1][0] != _END_OF_IMAGE:
        marker, at = match[1][0], match.end()
        n_scans += marker == _START_OF_SCAN
        at += 0 if marker in _MARKERS_WITHOUT_LENGTH else int.from_bytes(data[at : at + 2])
    return n_scans


def _count_strips(data: bytes) -> int:
    """Count the strips or tiles that the first directory of a TIFF or BigTIFF announces."""
    order = "<" if data.startswith(b"II") else ">"
    head, n_entries, entry = ("8xQ", "Q", "HHQ8x") if _BIG_TIFF in data[2:4] else ("4xI", "H", "HHI4x")
    try:
        (start,) = struct.unpack_from(order + head, data)
        (count,) = struct.unpack_from(order + n_entries, data, start)
    except (struct.error, OverflowError):
        return 0
    start += struct.calcsize(order + n_entries)
    width = struct.calcsize(order + entry)
    packed = data[start : start + width * count]
    entries = struct.iter_unpack(order + entry, packed[: len(packed) // width * width])
    return max((count for tag, _, count in entries if tag in _STRIP_TAGS), default=0)


class _InWork:
    """Counts the pixels that threads of this process decode at once."""

    def __init__(self) -> None:
        self._n_pixels = 0
        self._changed = threading.Condition()
        # One after the other, or a large one would wait as long as small ones come.
        self._turn = threading.Lock()

    @contextmanager
    def hold(self, n_pixels: int, *, most: int) -> Iterator[None]:
        """Wait until there are no more than ``most`` with these; they are counted meanwhile."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._n_pixels or self._n_pixels + n_pixels <= most)
            self._n_pixels += n_pixels
        try:
            yield
        finally:
            with self._changed:
                self._n_pixels -= n_pixels
                self._changed.notify_all()


_in_work = _InWork()


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    """Find what undoes the EXIF orientation; broken EXIF does not make the pixels unreadable."""
    # ImageOps.exif_transpose also writes the other tags back, and gives up where one of them is broken.
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Broken bytes again: struct.error, SyntaxError, ValueError ...
        return None


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, band by band, so that in full size there is but the result beside the image."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, _BAND_PX):
        box = (0, top, image.width, min(top + _BAND_PX, image.height))
        rgb.paste(_convert_band(image.crop(box)), box)
    return rgb


def _convert_band(band: Image.Image) -> Image.Image:
    """Convert any mode to RGB, alpha on white, 16-bit grey to its upper 8 bits."""
    if band.mode.startswith("I;16"):
        band = Image.fromarray((np.asarray(band) >> 8).astype(np.uint8))
    if band.has_transparency_data:
        band = Image.alpha_composite(Image.new("RGBA", band.size, _WHITE), band.convert("RGBA"))
    return band if band.mode == "RGB" else band.convert("RGB")


def _explain(data: bytes, error: Exception) -> str:
    """Say in one sentence why bytes are not an image."""
    if not data:
        return "expected an image, found an empty file"
    if isinstance(error, UnidentifiedImageError):
        return "expected a JPEG, PNG, WebP, TIFF or BMP image, found something else"
    return f"the image is broken: {' '.join(str(error).split()) or type(error).__name__}"
