"""Pixels: which have defined colours, and their conversion to RGB of 8 bits."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fruitdask.errors import ImageError
from fruitdask.worker.images.bounds import read_gif_head
from fruitdask.worker.images.boxes import read_items
from fruitdask.worker.images.jpeg2000 import check_colours, read_jpeg2000
from fruitdask.worker.images.tiff import explain_tiff, read_numbers

_WHITE = (255, 255, 255, 255)
_BAND_PX = 256
#: Converts a band of rows to a mode that Pillow converts to RGB correctly.
Narrow = Callable[[Image.Image], Image.Image]
#: Divides grey by its alpha; Pillow converts premultiplied grey to nothing else.
_UNMULTIPLY: Narrow = operator.methodcaller("convert", "LA")


def check_meaning(image: Image.Image, data: bytes) -> None:
    """Refuse pixels whose colours the file does not define."""
    problem = None
    tags = getattr(image, "tag_v2", None)
    if image.format == "TIFF" and tags is not None:
        problem = explain_tiff(tags)
    elif image.format == "JPEG2000":
        found = read_jpeg2000(data)
        check_colours(found)
        if (found.width, found.height) != image.size:
            raise ImageError("the image is broken: the sizes in its JPEG 2000 boxes and codestream differ")
    elif image.format == "AVIF" and b"clap" in read_items(data).properties:
        # Pillow 13 decodes the pixels outside as well.
        problem = "an AVIF that displays only part of its pixels (clean aperture); export it again"
    elif image.format == "GIF":
        _, at, _ = read_gif_head(data)
        # The highest bit of both the screen and a frame marks that a palette follows.
        if data[10] < 0x80 and (len(data) < at + 10 or data[at + 9] < 0x80):
            problem = "a GIF without a palette; export it again"
    elif image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        problem = (
            "a JPEG with four channels that does not say whether 0 or 255 means no ink (it lacks Adobe's segment); "
            "convert it to RGB"
        )
    if problem:
        raise ImageError(f"expected pixels with defined colours, found {problem}")


def find_frame(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Find the box of the screen that the first frame of a GIF covers; None if it covers all of it."""
    if image.format != "GIF":
        return None
    box = getattr(image, "tile")[0][1]
    return None if tuple(box) == (0, 0, *image.size) else tuple(box)


def choose_narrowing(image: Image.Image, data: bytes) -> Narrow | None:
    """Choose what to apply to each band of a loaded image before Pillow converts it; None for nothing."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if image.mode.startswith("I;16"):
        return _choose_for_16_bits(image, tags)
    if tags:
        return _choose_for_tiff(image, tags)
    if image.format == "PNG" and "transparency" in image.info:
        return _choose_for_png(image, data)
    if image.format == "JPEG2000" and (bits := read_jpeg2000(data).channels[0][0]) < 8:
        # Pillow shifts samples of fewer bits up, so white would be grey: rescale them to 0 to 255.
        table = [(value >> (8 - bits)) * 255 // ((1 << bits) - 1) for value in range(256)]
        return lambda band: band.point(table * len(band.getbands())) if band.mode != "P" else band
    return _UNMULTIPLY if image.mode == "La" else None


def convert_to_rgb(image: Image.Image, narrow: Narrow | None) -> Image.Image:
    """Convert any mode to RGB on white, in bands: memory holds only the image and the result at full size."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, _BAND_PX):
        box = (0, top, image.width, min(top + _BAND_PX, image.height))
        band = image.crop(box)
        band = narrow(band) if narrow else band
        if band.has_transparency_data:
            band = Image.alpha_composite(Image.new("RGBA", band.size, _WHITE), band.convert("RGBA"))
        rgb.paste(band.convert("RGB"), box)
    return rgb


def lay_frame_on_white(rgb: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Paint white what a frame leaves uncovered (transparent)."""
    screen = Image.new("RGB", rgb.size, _WHITE[:3])
    screen.paste(rgb.crop(box), box)
    return screen


def _choose_for_16_bits(image: Image.Image, tags: Mapping[int, Any]) -> Narrow:
    """Keep the upper 8 of the file's bits, inverted if zero is white; one value may be transparent."""
    shift = 4 if read_numbers(tags, 0x0102, 16)[0] == 12 else 8
    flip = 0xFF if read_numbers(tags, 0x0106, 1)[0] == 0 else 0
    key = image.info.get("transparency")

    def narrow(band: Image.Image) -> Image.Image:
        values = np.asarray(band)
        grey = Image.fromarray((values >> shift).astype(np.uint8) ^ np.uint8(flip))
        if isinstance(key, int):
            grey.putalpha(Image.fromarray((values != key).astype(np.uint8) * np.uint8(255)))
        return grey

    return narrow


def _choose_for_tiff(image: Image.Image, tags: Mapping[int, Any]) -> Narrow | None:
    """Choose for a TIFF other than 16-bit grey."""
    if read_numbers(tags, 0x0153, 1)[0] == 2:
        is_compressed = read_numbers(tags, 0x0103, 1)[0] != 1
        is_swapped = image.mode == "I" and getattr(tags, "prefix") == b"MM" and is_compressed
        return lambda band: _narrow_signed(band, is_swapped=is_swapped)
    if image.mode == "RGBA" and not tags.get(0x0152):
        # An extra channel without a stated meaning is not a colour (TIFF 6.0, section "RGB Full Color Images").
        return lambda band: band.convert("RGB")
    return _UNMULTIPLY if image.mode == "La" else None


def _narrow_signed(band: Image.Image, *, is_swapped: bool) -> Image.Image:
    """Narrow signed grey to 8 bits: 0 is black, the largest number white (TIFF 6.0, sections 3 and 19)."""
    kind: npt.DTypeLike = np.int16 if band.mode == "I" else np.int8
    # Pillow returns signed 8 bits as unsigned.
    values = np.asarray(band).astype(kind)
    # libtiff returns the machine's byte order, and Pillow 13 assumes the file's.
    values = values.byteswap() if is_swapped else values
    if (values < 0).any():
        raise ImageError(
            "expected pixels with defined colours, found a TIFF with signed numbers below zero, which is black; "
            "convert it to unsigned integers of 8 or 16 bits"
        )
    bits = values.dtype.itemsize * 8 - 1
    return Image.fromarray((values >> (bits - 8) if bits > 8 else values << 1 | values >> 6).astype(np.uint8))


def _choose_for_png(image: Image.Image, data: bytes) -> Narrow | None:
    """Choose for a PNG with a transparent colour, which Pillow 13 compares with samples it has already rescaled."""
    depth, key = data[24], image.info["transparency"]
    if image.mode in ("1", "L") and depth < 8 and isinstance(key, int):
        # Cropping a band copies the image's info.
        image.info["transparency"] = (key & (1 << depth) - 1) * 255 // ((1 << depth) - 1)
    if image.mode == "RGB" and depth == 16 and isinstance(key, tuple):
        return lambda band: _refuse_key(band, key)
    return None


def _refuse_key(band: Image.Image, key: tuple[int, ...]) -> Image.Image:
    """Refuse 16-bit pixels that may be transparent: Pillow keeps 8 bits, too few to compare."""
    upper = np.array([value >> 8 for value in key], np.uint8)
    if (np.asarray(band) == upper).all(axis=2).any():
        raise ImageError(
            "expected pixels with defined colours, found a PNG of 16 bits whose transparent colour cannot be matched "
            "exactly; convert it to 8 bits, or give it an alpha channel"
        )
    band.info.pop("transparency", None)
    return band
