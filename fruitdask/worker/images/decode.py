"""Decoding: an image becomes a square of RGB, upright and without its metadata."""

import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, ExifTags, Image, UnidentifiedImageError

from fruitdask.errors import ImageError, ImageTooLargeError
from fruitdask.worker.images.bounds import check_size, check_structure
from fruitdask.worker.images.heic import is_avif, is_heic, open_heic
from fruitdask.worker.images.naming import explain, name_raw
from fruitdask.worker.images.pixels import (
    check_meaning,
    choose_narrowing,
    convert_to_rgb,
    find_frame,
    lay_frame_on_white,
)

#: What is decoded, by content; Pillow knows further formats, some of which start other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000")
#: An MPO is a JPEG with further ones behind it.
_JPEGS = ("JPEG", "MPO")
#: OpenJPEG holds a number of 4 bytes for each channel of a pixel, several times over.
_WEIGHTS = {"JPEG2000": 3}
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
    """Decode an image and resize it to a square, upright and without its metadata.

    The EXIF orientation is applied, then EXIF, GPS positions, serial numbers, comments and colour profiles are dropped:
    an array has no place for them. Transparent pixels are laid on white. An animation gives its first frame.

    Returns numpy.ndarray: RGB pixels of shape (size_px, size_px, 3), uint8, 0 to 255.

    Resizing is Pillow's bicubic filter with antialiasing, over the whole image and without keeping its proportions, as
    ``keras.utils.load_img(target_size=..., interpolation="bicubic")`` does.
    """
    try:
        with _open(data) as image:
            check_size(image, max_pixels)
            check_meaning(image, data)
            if is_fast and image.format in _JPEGS:
                image.draft(None, (size_px, size_px))
            n_pixels = image.width * image.height * _WEIGHTS.get(image.format or "", 1)
            # Closed within, for its pixels must go before another's come.
            with _in_work.hold(n_pixels, most=max_pixels), closing(image):
                frame = find_frame(image)
                _forget_xmp(image)
                # Before the conversion, which has no EXIF any more; some formats have it behind the pixels.
                image.load()
                turn = _find_turn(image)
                rgb = convert_to_rgb(image, choose_narrowing(image, data))
                rgb = lay_frame_on_white(rgb, frame) if frame else rgb
                pixels = rgb.resize((size_px, size_px), Image.Resampling.BICUBIC)
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
        raise ImageError(explain(data, None if isinstance(error, UnidentifiedImageError) else error)) from error


def decode_images(
    files: Sequence[bytes], *, size_px: int, max_pixels: int, is_fast: bool = False
) -> list[npt.NDArray[np.uint8] | ImageError]:
    """Decode several images; one that cannot be decoded does not keep the others from it."""
    decoded: list[npt.NDArray[np.uint8] | ImageError] = []
    for data in files:
        try:
            decoded.append(decode_image(data, size_px=size_px, max_pixels=max_pixels, is_fast=is_fast))
        except ImageError as error:
            decoded.append(error)
    return decoded


def read_header(data: bytes) -> tuple[str, int, int] | None:
    """Read the format and the size of an image without decoding it."""
    try:
        with _open(data) as image:
            return str(image.format), image.width, image.height
    except MemoryError:
        raise
    except Exception:
        # Whatever a decoder raises at hostile bytes.
        return None


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """Open an image that does not ask for far more work than its pixels take."""
    check_structure(data)
    if raw := name_raw(data):
        raise ImageError(raw)
    if is_heic(data):
        image = open_heic(data)
    else:
        if is_avif(data):
            # Workers decode in several threads of their own.
            AvifImagePlugin.DEFAULT_MAX_THREADS = 1
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    with image:
        yield image


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


def _forget_xmp(image: Image.Image) -> None:
    """Forget XMP, of which Pillow takes an orientation where EXIF has none; viewers do not."""
    for name in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(name, None)


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    """Find what undoes the EXIF orientation; broken EXIF does not make the pixels unreadable."""
    # A PNG may have it behind its pixels.
    _forget_xmp(image)
    # ImageOps.exif_transpose also writes the other tags back, and gives up where one of them is broken.
    try:
        if image.format in _JPEGS:
            # Pillow has read EXIF and XMP of a JPEG already when it opened it.
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
        else:
            exif = image.getexif()
        return _TURNS.get(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Broken bytes again: struct.error, SyntaxError, ValueError ...
        return None
