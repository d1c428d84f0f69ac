"""Sums over the images of a class, from which its mean, its colours and its differences follow."""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

#: Colours are counted in 8 x 8 x 8 bins of 32 levels per channel.
COLOUR_LEVELS = 8
#: Byte levels per unit of each scale.
LEVELS_PER_UNIT = {"signed": 127.5, "unit": 255.0, "bytes": 1.0}
_PALETTE_COLOURS = 6
#: A pixel has the colour of the background if no channel differs from it by more than this, in byte levels.
_BACKGROUND_LEVELS = 24
#: An image has a background if this share of its edge has one colour, and if no more than that share of the image is
#: background.
_MIN_EDGE, _MAX_BACKGROUND = 0.8, 0.98


@dataclass(eq=False)
class ClassSums:
    """Exact integer sums over images of a class; those of disjoint sets of images add up."""

    n_images: int
    #: Sum of the pixels (0 to 255), shape (px, px, 3); uint32 for one batch, int64 after adding.
    pixels: npt.NDArray[np.integer[Any]]
    #: Sum of the squares of all pixel values.
    squares: int
    #: Sum of the thumbnails, shape (thumbnail_px, thumbnail_px, 3), int64.
    thumbnails: npt.NDArray[np.int64]
    #: Histogram of the thumbnails' colours without the background, shape (512,), int64; red varies slowest.
    colours: npt.NDArray[np.int64]

    @classmethod
    def measure(cls, pixels: npt.NDArray[np.uint8], thumbnails: npt.NDArray[np.uint8]) -> Self:
        """Sum images of shape (n, px, px, 3) and their thumbnails."""
        # About 64 x 64 pixels show the colours of an image as well as more would.
        step = max(1, thumbnails.shape[1] // 64)
        sampled = thumbnails[:, ::step, ::step]
        levels = (sampled // (256 // COLOUR_LEVELS))[~find_background(sampled)].astype(np.int64)
        flat = pixels.reshape(-1).astype(np.float64)
        return cls(
            n_images=len(pixels),
            # 32 bits are enough for 16 million images.
            pixels=pixels.sum(axis=0, dtype=np.uint32),
            # Exact: a batch's sum of squares stays far below 2**53.
            squares=int(flat @ flat),
            thumbnails=thumbnails.sum(axis=0, dtype=np.int64),
            colours=np.bincount(levels @ [COLOUR_LEVELS**2, COLOUR_LEVELS, 1], minlength=COLOUR_LEVELS**3),
        )

    @classmethod
    def read(cls, record: Any) -> Self:
        """Read stored sums."""
        wide = {name: record[name].astype(np.int64) for name in ("pixels", "thumbnails", "colours")}
        return cls(n_images=int(record["n_images"]), squares=int(record["squares"]), **wide)

    def add_to(self, record: Any) -> None:
        """Add these sums to stored ones."""
        for each in fields(self):
            record[each.name] = record[each.name] + getattr(self, each.name)

    def add(self, other: "ClassSums") -> None:
        """Add the sums of other images."""
        self.n_images += other.n_images
        self.pixels = np.add(self.pixels, other.pixels, dtype=np.int64)
        self.squares += other.squares
        self.thumbnails += other.thumbnails
        self.colours += other.colours


def find_background(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return a mask, (n, px, px), of the pixels that look like the edge of their image, where that has one colour.

    A photograph whose edge has several colours has no background here, and neither has one that is all of one colour.
    """
    n, px = thumbnails.shape[:2]
    rows, columns = thumbnails[:, [0, -1]], thumbnails[:, :, [0, -1]]
    edge = np.concatenate([rows, columns.swapaxes(1, 2)], axis=1).reshape(n, 4 * px, 3)
    usual = np.median(edge, axis=1).astype(np.int16)[:, np.newaxis]
    on_edge, inside = (
        (np.abs(pixels - usual) <= _BACKGROUND_LEVELS).all(axis=2) for pixels in (edge, thumbnails.reshape(n, px**2, 3))
    )
    has_background = (on_edge.mean(axis=1) >= _MIN_EDGE) & (inside.mean(axis=1) <= _MAX_BACKGROUND)
    return np.asarray((inside & has_background[:, np.newaxis]).reshape(thumbnails.shape[:3]))


def mean_squared_difference(sums: ClassSums, *, scale: str = "signed") -> float:
    """Compute the mean squared difference over all unordered pairs of images of a class, without visiting the pairs.

    For vectors x_1 ... x_n,

        sum over i < j of |x_i - x_j|^2  =  n * sum over i of |x_i|^2  -  |sum over i of x_i|^2,

    because the square, written out over all i and j, contains each unordered pair twice. Both sums are integers, so the
    result is exact up to one rounding. It is twice the unbiased variance, averaged over pixels and channels.
    """
    n = sums.n_images
    if n < 2:
        return float("nan")
    over_pairs = n * sums.squares - _square(sums.pixels.ravel().astype(np.int64))
    return float(over_pairs / (n * (n - 1) // 2) / sums.pixels.size / LEVELS_PER_UNIT[scale] ** 2)


def _square(vector: npt.NDArray[np.int64]) -> int:
    """Compute the exact scalar product of a vector of counts with itself, which may need more than 64 bits."""
    # Sums over images of up to 2**40 have halves of 20 bits, and those of a million values do not overflow.
    high, low = np.divmod(vector, 1 << 20)
    return (int(high @ high) << 40) + (int(high @ low) << 21) + int(low @ low)


def format_palette(colours: npt.NDArray[np.int64]) -> str:
    """Format the centres and shares of the most frequent bins of colours."""
    step = 256 // COLOUR_LEVELS
    most = [index for index in np.argsort(-colours, kind="stable")[:_PALETTE_COLOURS] if colours[index]]
    centres = [np.array(np.unravel_index(index, (COLOUR_LEVELS,) * 3)) * step + step // 2 for index in most]
    shares = colours[most] / colours.sum()
    return ", ".join(f"#{r:02x}{g:02x}{b:02x} {share:.3f}" for (r, g, b), share in zip(centres, shares, strict=True))
