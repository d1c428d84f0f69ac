"""Resizing to a square: Pillow's bicubic filter, bit for bit, in a quarter of its time."""

from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

#: Bits of the fraction of a coefficient: Pillow's, for channels of 8 bits.
COEFFICIENT_BITS = 32 - 8 - 2
#: Pixels of a larger image that are narrowed together: few enough for a cache, and for one of Pillow's blocks of 16 MB.
_PIXELS_AT_ONCE = 1_000_000
#: Half the width of the filter in pixels of the smaller image, and its parameter (Keys 1981).
_SUPPORT, _A = 2.0, -0.5


def resize_square(image: Image.Image, side_px: int) -> npt.NDArray[np.uint8]:
    """Resize an RGB image to pixels of shape (side_px, side_px, 3), uint8.

    Pillow does it if the kernels cannot be compiled, or if their result is not exactly Pillow's.
    """
    kernel = _load_kernel()
    if kernel is None or image.height < kernel.ROWS or image.width > _PIXELS_AT_ONCE // kernel.ROWS:
        return _resize_by_pillow(image, side_px)
    # Pillow 13 begins with the columns if they shrink by more than twice as many pixels as the rows.
    if image.height > side_px and image.height - side_px > 2 * (image.width - side_px):
        return _resize_by_pillow(image, side_px)
    return _resize_by_kernel(image, side_px, kernel)


def _resize_by_pillow(image: Image.Image, side_px: int) -> npt.NDArray[np.uint8]:
    """Resize an image with Pillow."""
    return np.asarray(image.resize((side_px, side_px), Image.Resampling.BICUBIC))


def _resize_by_kernel(image: Image.Image, side_px: int, kernel: Any) -> npt.NDArray[np.uint8]:
    """Narrow the rows, round to bytes, then combine the rows, as Pillow does."""
    narrow = np.empty((image.height, side_px), np.uint32)
    across, down = (_compute_coefficients(n_px, side_px) for n_px in image.size)
    n_rows = min(image.height, _PIXELS_AT_ONCE // image.width)
    for start in range(0, image.height, n_rows):
        # The last rows overlap, so that they are enough for the kernel.
        top = min(start, image.height - n_rows)
        strip = image if n_rows == image.height else image.crop((0, top, image.width, top + n_rows))
        kernel.narrow_rows(_view_pixels(strip), narrow[top : top + n_rows], *across)
    square, packed = (np.empty((side_px, n_channels * side_px), np.uint8) for n_channels in (4, 3))
    kernel.combine_rows(narrow.view(np.uint8), square, *down)
    kernel.pack_pixels(square, packed)
    return packed.reshape(side_px, side_px, 3)


def _view_pixels(image: Image.Image) -> npt.NDArray[np.uint32]:
    """View the memory of an RGB image, (height, width), without a copy; a pixel has three bytes and an unused one."""
    import pyarrow

    return np.frombuffer(pyarrow.array(image).buffers()[-1], np.uint32).reshape(image.height, image.width)


@lru_cache(256)
def _compute_coefficients(n_in: int, n_out: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Compute the sources of each pixel of a resized row, in Pillow's order of operations.

    Returns the first pixel and the number of pixels, shape (n_out, 2), and their coefficients, shape (n_out, most), as
    integers with `COEFFICIENT_BITS` bits of fraction.
    """
    scale = n_in / n_out
    widening = max(scale, 1.0)
    centres = (np.arange(n_out) + 0.5) * scale
    first = np.maximum((centres - _SUPPORT * widening + 0.5).astype(np.int32), 0)
    last = np.minimum((centres + _SUPPORT * widening + 0.5).astype(np.int32), n_in)
    places = first[:, np.newaxis] + np.arange((last - first).max())
    weights = _weigh((places - centres[:, np.newaxis] + 0.5) * (1.0 / widening))
    weights[places >= last[:, np.newaxis]] = 0.0
    # A cumulative sum adds one after the other, as Pillow does.
    weights /= weights.cumsum(axis=1)[:, -1:]
    scaled = weights * (1 << COEFFICIENT_BITS)
    return np.stack([first, last - first], axis=1), (scaled + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)


def _weigh(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute the cubic filter (Keys 1981)."""
    x = np.abs(x)
    near = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return np.asarray(np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0)))


@cache
def _load_kernel() -> Any:
    """Load the kernels; None unless they resize noise exactly as this version of Pillow does."""
    try:
        from fruitdask.worker.images import kernel
    except Exception:
        # No Numba for this Python or processor, or a compiler that fails.
        return None
    # The tallest image for which Pillow begins with the rows; neither size is a multiple of the rows narrowed together.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 61, 3), np.uint8))
    is_same = np.array_equal(_resize_by_kernel(noise, 32, kernel), _resize_by_pillow(noise, 32))
    return kernel if is_same else None
