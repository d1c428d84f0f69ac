"""Thumbnails for the page, as data URIs within a budget of bytes."""

import base64
import io

import numpy as np
import numpy.typing as npt

from fruitdask.store.exploration import Exploration

#: Sides of thumbnails: large enough to enlarge if all fit into the budget, else the size at which the page shows them.
_LARGE_PX, _SMALL_PX = 128, 72
#: Thumbnails by which the size of all is estimated.
_N_TRIED = 12
#: Quality of WebP, which needs about half the bytes of JPEG: 800 bytes for a photograph at 64 pixels.
_QUALITY = 72


class Thumbnails:
    """Thumbnails of an exploration by path, until a budget of bytes is spent.

    They are large where `n_wanted` of them are likely to fit into the budget; by default, where all do.
    """

    def __init__(self, exploration: Exploration | None, *, max_bytes: int, n_wanted: int | None = None) -> None:
        self._exploration = exploration
        self._places: dict[str, int] = {}
        if exploration is not None:
            paths = exploration.images["path"].to_numpy()[exploration.thumbnail_rows]
            self._places = {path: place for place, path in enumerate(paths)}
        #: Paths of the images that have a thumbnail.
        self.paths = frozenset(self._places)
        self._left_bytes = max_bytes
        self._px = _SMALL_PX
        if self._places and exploration is not None:
            n_there = len(self._places)
            tried = exploration.thumbnails[np.linspace(0, n_there - 1, min(_N_TRIED, n_there)).astype(int)]
            typical_bytes = np.mean([len(_encode_webp(pixels, _LARGE_PX)) for pixels in tried])
            if typical_bytes * (n_there if n_wanted is None else n_wanted) <= max_bytes:
                self._px = _LARGE_PX

    def encode(self, path: str) -> str | None:
        """Encode the thumbnail of an image."""
        place = self._places.get(path)
        if place is None or self._exploration is None:
            return None
        return self.encode_pixels(self._exploration.thumbnails[place])

    def encode_pixels(self, pixels: npt.NDArray[np.uint8], *, max_px: int | None = None) -> str | None:
        """Encode a picture, (height, width, 3) uint8, on the same budget."""
        encoded = _encode_webp(pixels, max_px or self._px)
        if len(encoded) > self._left_bytes:
            return None
        self._left_bytes -= len(encoded)
        return encoded


def _encode_webp(pixels: npt.NDArray[np.uint8], max_px: int) -> str:
    """Encode pixels as WebP in Base64."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((max_px, max_px))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY, method=4)
    return base64.b64encode(file.getvalue()).decode("ascii")
