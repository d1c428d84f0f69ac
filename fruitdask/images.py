"""Images: from the bytes of a file to pixels, and nothing but pixels."""

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from fruitdask.errors import ImageError, ImageTooLargeError

#: What is decoded, by content; Pillow knows further formats, some of which start other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
_WHITE = (255, 255, 255, 255)
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
        An image whose header announces more pixels is not decoded.
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
        If the image has more than ``max_pixels``.
    ImageError
        If the bytes are not a whole image.

    Notes
    -----
    Resizing is Pillow's bicubic filter with antialiasing, over the whole image and without keeping its proportions, as
    ``keras.utils.load_img(target_size=..., interpolation="bicubic")`` does.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            n_pixels = image.width * image.height
            if n_pixels > max_pixels:
                raise ImageTooLargeError(
                    f"expected at most {max_pixels:,} pixels (featurize.max_pixels), found {image.width} x {image.height} = {n_pixels:,}"
                )
            if is_fast:
                image.draft(None, (size_px, size_px))
            rgb = _convert_to_rgb(_turn_upright(image))
            return np.asarray(rgb.resize((size_px, size_px), Image.Resampling.BICUBIC))
    except (ImageTooLargeError, MemoryError):
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
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return str(image.format), image.width, image.height
    except MemoryError:
        raise
    except Exception:
        # Whatever a decoder raises at hostile bytes.
        return None


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; broken EXIF does not make the pixels unreadable."""
    # ImageOps.exif_transpose also writes the other tags back, and gives up where one of them is broken.
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Broken bytes again: struct.error, SyntaxError, ValueError ...
        return image
    return image if turn is None else image.transpose(turn)


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, alpha on white, 16-bit grey to its upper 8 bits."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, _WHITE)
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _explain(data: bytes, error: Exception) -> str:
    """Say in one sentence why bytes are not an image."""
    if not data:
        return "expected an image, found an empty file"
    if isinstance(error, UnidentifiedImageError):
        return "expected a JPEG, PNG, WebP, TIFF or BMP image, found something else"
    return f"the image is broken: {' '.join(str(error).split()) or type(error).__name__}"
