"""Decoding: from the bytes of an image to an upright RGB square without metadata."""

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
from fruitdask.worker.images.resize import resize_square

#: Formats to decode, recognized by content; Pillow knows more, some of which start other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000")
#: An MPO is a JPEG followed by others.
_JPEGS = ("JPEG", "MPO")
#: OpenJPEG holds 4 bytes per channel of a pixel, in several copies.
_MEMORY_FACTORS = {"JPEG2000": 3}
#: The transposition that undoes each EXIF orientation (Exif 2.32, section 4.6.4 A, tag 0x0112).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Those that exchange width and height.
_SIDEWAYS = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}


def decode_image(data: bytes, *, size_px: int, max_pixels: int, is_fast: bool = False) -> npt.NDArray[np.uint8]:
    """Decode an image and resize it to a square, upright and without its metadata.

    Applies the EXIF orientation, blends transparent pixels with white, and takes the first frame of an animation.
    Resizes like ``keras.utils.load_img(target_size=..., interpolation="bicubic")``: Pillow's bicubic filter with
    antialiasing, ignoring the aspect ratio. Returns RGB pixels of shape (size_px, size_px, 3), uint8.
    """
    try:
        with _open(data) as image:
            check_size(image, max_pixels)
            check_meaning(image, data)
            if is_fast and image.format in _JPEGS:
                image.draft(None, (size_px, size_px))
            n_pixels = image.width * image.height * _MEMORY_FACTORS.get(image.format or "", 1)
            # Closed inside, so that its pixels are freed before those of another image are counted.
            with _budget.hold(n_pixels, most=max_pixels), closing(image):
                frame = find_frame(image)
                _forget_xmp(image)
                # Before the conversion, which drops EXIF; some formats store it after the pixels.
                image.load()
                turn = _find_turn(image, is_loaded=True)
                rgb = convert_to_rgb(image, choose_narrowing(image, data))
                rgb = lay_frame_on_white(rgb, frame) if frame else rgb
                pixels = resize_square(rgb, size_px)
            # Turning the small square costs a fraction of turning the image, and no second image at full size.
            return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"expected at most {max_pixels:,} pixels (featurize.max_pixels), found more than Pillow can open"
        ) from error
    except Exception as error:
        # Hostile bytes make decoders raise anything: OSError, SyntaxError, struct.error, KeyError ...
        raise ImageError(explain(data, None if isinstance(error, UnidentifiedImageError) else error)) from error


def decode_images(
    files: Sequence[bytes], *, size_px: int, max_pixels: int, is_fast: bool = False
) -> list[npt.NDArray[np.uint8] | ImageError]:
    """Decode several images, each independently of the others."""
    decoded: list[npt.NDArray[np.uint8] | ImageError] = []
    for data in files:
        try:
            decoded.append(decode_image(data, size_px=size_px, max_pixels=max_pixels, is_fast=is_fast))
        except ImageError as error:
            decoded.append(error)
    return decoded


def read_header(data: bytes) -> tuple[str, int, int] | None:
    """Read the format of an image, and the width and height it has when upright, without decoding it."""
    try:
        with _open(data) as image:
            # Pillow tells the upright size of a TIFF itself.
            is_sideways = image.format != "TIFF" and _find_turn(image) in _SIDEWAYS
            return str(image.format), *(image.size[::-1] if is_sideways else image.size)
    except MemoryError:
        raise
    except Exception:
        # Hostile bytes make decoders raise anything.
        return None


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """Open an image after checking that decoding it takes no more work than its pixels justify."""
    check_structure(data)
    if raw := name_raw(data):
        raise ImageError(raw)
    if is_heic(data):
        image = open_heic(data)
    else:
        if is_avif(data):
            # Workers decode in several threads already.
            AvifImagePlugin.DEFAULT_MAX_THREADS = 1
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    with image:
        yield image


class _PixelBudget:
    """Limits the pixels that threads of this process decode at once."""

    def __init__(self) -> None:
        self._n_pixels = 0
        self._changed = threading.Condition()
        # First come, first served: otherwise small images would starve a large one.
        self._turn = threading.Lock()

    @contextmanager
    def hold(self, n_pixels: int, *, most: int) -> Iterator[None]:
        """Wait until these pixels fit within ``most``, and count them during the block."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._n_pixels or self._n_pixels + n_pixels <= most)
            self._n_pixels += n_pixels
        try:
            yield
        finally:
            with self._changed:
                self._n_pixels -= n_pixels
                self._changed.notify_all()


_budget = _PixelBudget()


def _forget_xmp(image: Image.Image) -> None:
    """Forget XMP: Pillow takes its orientation if EXIF has none, which viewers do not."""
    for name in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(name, None)


def _find_turn(image: Image.Image, *, is_loaded: bool = False) -> Image.Transpose | None:
    """Find the transposition that undoes the EXIF orientation; broken EXIF counts as none.

    An image that is not loaded has only what precedes its pixels.
    """
    # Again, as a PNG may store XMP after its pixels.
    _forget_xmp(image)
    # ImageOps.exif_transpose also rewrites the other tags, and fails if any of them is broken.
    try:
        if image.format in _JPEGS or not is_loaded:
            # Opening a JPEG has already filled getexif() with the orientation from XMP; that of a PNG decodes it.
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
        else:
            exif = image.getexif()
        return _TURNS.get(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Broken bytes: struct.error, SyntaxError, ValueError ...
        return None
