"""A small data set drawn in the style of Fruits-360's turntable photographs, for trying the tool without any data.

A fruit is made of tubes: paths with a radius at each place, swept around. The body is one, its skin painted from smooth
noise and dots; stalks and sepals are others. Their points are dense enough to be drawn one by one, the nearest in each
pixel.
"""

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from fruitdask.core.guard import leave_imported_script
from fruitdask.errors import ConfigError, OutputError

Array: TypeAlias = npt.NDArray[np.float32]
_Coat: TypeAlias = tuple[str, tuple[float, ...], str, float, float, float]

_JPEG_QUALITY = 92
_MIN_SIZE_PX = 16  # fruits drawn smaller can no longer be told apart
_SUPERSAMPLING = 2  # drawn pixels along a pixel's side, for clean edges
_MAX_DRAWN_PX = 640  # where building a fruit takes some 0.4 GB; larger images are enlarged
_SPACING_PX = 0.7  # between points: a square lattice this fine leaves no pixel empty, however it is turned
_SWELL = 1.1  # at most, by lobes and bumps
_GAMMA = 2.2  # of sRGB, nearly
_GLOSS = 0.35
_HALF_WIDTH = 1.06  # of the image: fruits are about 1 from the middle to the end, and need a margin
_BEND = 0.1  # of a lying fruit's axis
#: Unit vectors to the key light, and half way to it from the camera: x to the right, y up, z toward the camera.
_LIGHTS = np.array([(-0.45, 0.62, 0.64), (-0.25, 0.34, 0.91)], np.float32)


class _Species(NamedTuple):
    """What tells one class from another; the outline (axial, radial) starts at the stalk, on the axis z."""

    axial: tuple[float, ...]
    radial: tuple[float, ...]
    skin: str
    #: A method of _Skin and its arguments; a colour, the values at which it begins and ends to cover, and how much.
    coats: tuple[_Coat, ...]
    #: How many stand around the axis, a colour, and a path of (x, y, z, radius).
    tubes: tuple[tuple[int, str, tuple[tuple[float, float, float, float], ...]], ...]
    is_lying: bool = False


_APPLE_STALK = (1, "5a4426", ((0, 0, 0.4, 0.04), (0, 0, 0.6, 0.02), (0.03, 0.02, 0.8, 0.02), (0.08, 0.05, 0.95, 0.04)))
_PEAR_STALK = (1, "5a4426", ((0, 0, 0.76, 0.05), (0, 0, 0.84, 0.03), (0.02, 0.02, 0.9, 0.03), (0.08, 0.05, 0.95, 0.04)))
_SEPALS = (5, "56832f", ((0.02, 0, 0.5, 0.05), (0.16, 0, 0.58, 0.05), (0.32, 0, 0.64, 0.04), (0.5, 0, 0.63, 0.012)))
_RIDGES = (5, "8c9c58", ((0.1, 0, 0.67, 0.045), (0.055, 0, 0.78, 0.035), (0.06, 0, 0.92, 0.04)))
_SPECIES = {
    "apple_granny_smith_1": _Species(
        (0.49, 0.51, 0.64, 0.72, 0.61, 0.29, -0.08, -0.42, -0.66, -0.75, -0.68, -0.66),
        (0, 0.07, 0.2, 0.41, 0.68, 0.86, 0.875, 0.73, 0.48, 0.27, 0.09, 0),
        "8aa83c",
        (
            ("noise", (4, 7), "b3bf58", 0.35, 0.8, 0.7),
            ("dots", (400, 0.016), "d9e2a4", 0.1, 0.9, 0.5),
            ("near_axis", (), "857339", 0.8, 0.97, 0.8),
        ),
        (_APPLE_STALK,),
    ),
    "apple_red_1": _Species(
        (0.5, 0.53, 0.68, 0.77, 0.64, 0.29, -0.1, -0.47, -0.71, -0.79, -0.71, -0.68),
        (0, 0.07, 0.2, 0.42, 0.71, 0.84, 0.8, 0.63, 0.43, 0.26, 0.09, 0),
        "a8242a",
        (
            ("noise", (3, 5), "d0a955", 0.45, 0.9, 0.85),
            ("noise", (4, 40), "8f1722", 0.4, 0.75, 0.7),
            ("noise", (5, 90), "c4503a", 0.5, 0.85, 0.5),
            ("dots", (300, 0.014), "e6bf90", 0.1, 0.9, 0.5),
            ("near_axis", (), "a98f45", 0.7, 0.95, 0.85),
        ),
        (_APPLE_STALK,),
    ),
    "pear_1": _Species(
        (0.8, 0.79, 0.71, 0.55, 0.32, 0.08, -0.19, -0.44, -0.67, -0.84, -0.88, -0.84),
        (0, 0.08, 0.2, 0.27, 0.37, 0.51, 0.63, 0.65, 0.55, 0.33, 0.15, 0),
        "c3b84e",
        (
            ("near_axis", (), "97a646", 0.4, 1, 0.7),
            ("noise", (4, 5), "c5853e", 0.5, 0.85, 0.7),
            ("dots", (500, 0.012), "7a672c", 0.1, 0.8, 0.6),
        ),
        (_PEAR_STALK,),
    ),
    "tomato_1": _Species(
        (0.45, 0.47, 0.54, 0.59, 0.5, 0.22, -0.08, -0.36, -0.55, -0.61, -0.61),
        (0, 0.07, 0.19, 0.39, 0.67, 0.85, 0.86, 0.73, 0.49, 0.22, 0),
        "c0240f",
        (("noise", (3, 6), "d94a14", 0.45, 0.8, 0.7), ("near_axis", (), "d07f2a", 0.6, 0.95, 0.7)),
        ((1, "5a8234", ((0, 0, 0.48, 0.055), (0, 0, 0.62, 0.038), (0.02, 0.03, 0.76, 0.05))), _SEPALS),
    ),
    "cucumber_3": _Species(
        (0.93, 0.92, 0.87, 0.77, 0.58, 0.2, -0.2, -0.58, -0.77, -0.87, -0.92, -0.93),
        (0, 0.07, 0.13, 0.18, 0.21, 0.22, 0.225, 0.215, 0.185, 0.13, 0.07, 0),
        "294e1e",
        (
            ("noise", (3, 14), "6f8f42", 0.45, 0.9, 0.8),
            ("dots", (130, 0.018), "a9bd78", 0.1, 0.9, 0.5),
            ("near_axis", (), "8a8a4c", 0.9, 0.98, 0.8),
        ),
        ((1, "8a8450", ((0, 0, 0.9, 0.03), (0, 0, 0.94, 0.025), (0, 0.01, 0.965, 0.03))),),
        is_lying=True,
    ),
    "zucchini_1": _Species(
        (0.72, 0.71, 0.66, 0.4, 0.1, -0.3, -0.6, -0.79, -0.86, -0.87),
        (0, 0.1, 0.145, 0.175, 0.2, 0.24, 0.245, 0.19, 0.1, 0),
        "5f8c38",
        (("noise", (3, 10), "8aab55", 0.4, 0.8, 0.7), ("dots", (500, 0.01), "c3d294", 0.1, 0.9, 0.5)),
        ((1, "a3a866", ((0, 0, 0.7, 0.12), (0, 0, 0.8, 0.07), (0, 0, 0.9, 0.075))), _RIDGES),
        is_lying=True,
    ),
}
CLASS_NAMES: tuple[str, ...] = tuple(_SPECIES)


@dataclass(frozen=True)
class _Skin:
    """The skin unrolled: rows run along the axis, `step` apart, and columns around it."""

    axial: Array
    radial: Array
    n_columns: int
    step: float
    rng: np.random.Generator

    def noise(self, n_rows: int, n_columns: int) -> Array:
        """Draw smooth noise from a grid of random cells, nearly all of it in [0, 1]."""
        cells = np.pad(self.rng.random((n_rows, n_columns), np.float32), ((0, 0), (2, 2)), mode="wrap")
        size, box = (self.n_columns, len(self.axial)), (2, 0, 2 + n_columns, n_rows)
        return np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC, box))

    def dots(self, n: int, size: float) -> Array:
        """Scatter soft dots evenly over the surface, 1 in the middle and 0 outside."""
        mask = Image.new("L", (self.n_columns, len(self.axial)))
        draw, share = ImageDraw.Draw(mask), np.cumsum(self.radial, dtype=np.float64)
        rows, columns = np.searchsorted(share, self.rng.random(n) * share[-1]), self.rng.random(n) * self.n_columns
        half_heights = self.rng.uniform(0.4, 1, n) * size / self.step
        half_widths = half_heights * self.step * self.n_columns / (2 * math.pi * np.maximum(self.radial[rows], size))
        for x, y, a, b in zip(columns, rows, half_widths, half_heights, strict=True):
            draw.ellipse((x - a, y - b, x + a, y + b), fill=255)
        return np.asarray(mask.filter(ImageFilter.BoxBlur(size / self.step / 2)), np.float32) / np.float32(255)

    def near_axis(self) -> Array:
        """Read how near the axis the stalk's half lies, 1 on it; the same in all columns."""
        return np.where(self.axial > 0, 1 - self.radial, np.float32(0)).astype(np.float32)[:, None]

    def swell(self) -> Array:
        """Draw the factor by which the surface lies farther from the axis: five lobes and some bumps."""
        lobes = np.cos(np.linspace(0, 10 * math.pi, self.n_columns, endpoint=False, dtype=np.float32))
        bumps = self.noise(3, 4) - np.float32(0.5)
        return np.asarray(1 + np.float32(0.015) * self.radial[:, None] * lobes + np.float32(0.1) * bumps)

    def paint(self, skin: str, coats: tuple[_Coat, ...]) -> Array:
        """Lay coats of paint on the skin's colour, in linear light; shape (3, rows, columns)."""
        colours = np.broadcast_to(_decode_colour(skin), (3, len(self.axial), self.n_columns))
        for field, arguments, colour, low, high, strength in coats:
            t = np.clip((getattr(self, field)(*arguments) - low) / (high - low), 0, 1)
            colours = colours + strength * t * t * (3 - 2 * t) * (_decode_colour(colour) - colours)
        return colours


def _decode_colour(colour: str) -> Array:
    """Turn an sRGB hex colour into linear light, shape (3, 1, 1)."""
    return np.array([[[(channel / 255) ** _GAMMA]] for channel in bytes.fromhex(colour)], np.float32)


def _smooth_path(knots: npt.ArrayLike, step: float) -> Array:
    """Lay a Catmull-Rom spline through knots, shape (n, d), and cut it into equal steps."""
    points = np.array(knots, np.float64)
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    at = np.linspace(0, len(points) - 1, 100 * len(points))
    low = np.minimum(at.astype(int), len(points) - 2)
    t = (at - low)[:, None]
    a, b, c, d = (padded[low + k] for k in range(4))
    curve = b + t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a))) / 2
    length = np.append(0, np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1)))
    steps = np.linspace(0, length[-1], 3 + int(length[-1] / step))
    return np.stack([np.interp(steps, length, column) for column in curve.T], axis=1).astype(np.float32)


def _sweep(path: Array, swell: Array, colours: Array) -> Array:
    """Sweep a path of (x, y, z, radius) around its direction: points, normals and colours, shape (9, n)."""
    along = (path[-1] - path[0])[:3] / np.linalg.norm((path[-1] - path[0])[:3])
    across = np.cross(along, (0, 1, 0)) / np.linalg.norm(np.cross(along, (0, 1, 0)))
    angles = np.linspace(0, 2 * math.pi, swell.shape[1], endpoint=False)
    circle = np.outer(across, np.cos(angles)) + np.outer(np.cross(along, across), np.sin(angles))
    points = path[:, :3].T[:, :, None] + np.maximum(path[:, 3:], 1e-3) * swell * circle.astype(np.float32)[:, None]
    around = np.roll(points, -1, axis=2) - np.roll(points, 1, axis=2)
    normals = np.cross(around, np.gradient(points, axis=1), axis=0)
    normals /= np.linalg.norm(normals, axis=0) + np.float32(1e-12)
    every = (path[:, 3:].max() / np.maximum(path[:, 3:], 1e-2)).astype(int)  # points crowd where a tube is thin
    keep = np.arange(swell.shape[1]) % every == 0
    return np.concatenate([plane[:, keep] for plane in (points, normals, colours)])


def _orient_fruit(is_lying: bool, angle_degrees: float) -> Array:
    """Build the rotation from the fruit's to the camera's coordinates: stand (nearly) or lie, turn, look down."""
    radians = np.radians([90 if is_lying else 7, angle_degrees, 32 if is_lying else 20])
    (c0, c1, c2), (s0, s1, s2) = np.cos(radians), np.sin(radians)
    stand, spin = [[c0, 0, s0], [-s0, 0, c0], [0, -1, 0]], [[c1, 0, s1], [0, 1, 0], [-s1, 0, c1]]
    look = [[1, 0, 0], [0, c2, -s2], [0, s2, c2]]
    return np.asarray(np.linalg.multi_dot([look, spin, stand]), np.float32)


def _turn(axes: Array, vectors: Array) -> Array:
    """Measure vectors, shape (3, n), along axes, shape (m, 3); BLAS would start threads, and round by machine."""
    return np.asarray(np.einsum("ij,jn->in", axes, vectors))


def _shade(normals: Array, colours: Array, exposure: float) -> npt.NDArray[np.uint8]:
    """Light points with a soft key light, sky, a highlight and a pale rim; shape (n, 3)."""
    direct, shine = _turn(_LIGHTS, normals)
    light = exposure * np.maximum((direct + 0.25) / 1.25, 0) + 0.22 + 0.1 * normals[1]
    highlight = _GLOSS * (0.75 * np.maximum(shine, 0) ** 60 + 0.25 * np.maximum(shine, 0) ** 12)
    linear = colours * light + highlight + 0.06 * (1 - np.clip(normals[2], 0, 1)) ** 3
    return np.asarray(np.rint(255 * np.clip(linear, 0, 1) ** (1 / _GAMMA)).astype(np.uint8).T)


class _Turntable:
    """One fruit, its points, normals and colours, shape (9, n), and the camera before it."""

    def __init__(self, class_name: str, size_px: int, seed: int) -> None:
        self._species, self._size_px = _SPECIES[class_name], size_px
        self._key = [seed, CLASS_NAMES.index(class_name)]
        self._n_px = min(_SUPERSAMPLING * size_px, _MAX_DRAWN_PX)
        self._step, self._rng = _SPACING_PX * 2 * _HALF_WIDTH / self._n_px / _SWELL, np.random.default_rng(self._key)
        meridian = zip(self._species.axial, self._species.radial, strict=True)
        outline = [(0, 0, axial, radial) for axial, radial in meridian]
        parts = [self._build_tube(outline, self._species.skin, self._species.coats)]
        for n, colour, knots in self._species.tubes:
            closed = np.array([*knots, (*knots[-1][:3], 0)])
            for angle in np.arange(n) * 2 * math.pi / n:
                c, s = math.cos(angle), math.sin(angle)
                turn = [[c, s, 0, 0], [-s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
                parts.append(self._build_tube(closed @ turn, colour, ()))
        self._fruit = np.concatenate(parts, axis=1)

    def _build_tube(self, knots: npt.ArrayLike, skin: str, coats: tuple[_Coat, ...]) -> Array:
        path = _smooth_path(knots, self._step)
        n_columns = 8 + int(2 * math.pi * path[:, 3].max() / self._step)
        surface = _Skin(path[:, 2], path[:, 3], n_columns, self._step, self._rng)
        bent = path + np.array([_BEND * self._species.is_lying, 0, 0, 0], np.float32) * path[:, 2:3] ** 2
        return _sweep(bent, surface.swell(), surface.paint(skin, coats))

    def photograph(self, angle_degrees: float) -> Image.Image:
        """Draw the fruit at an angle; exposure, position and angle vary a little, as in a real series."""
        rng = np.random.default_rng([*self._key, round(angle_degrees % 360 * 1000)])
        exposure, wobble, right, up = rng.uniform(-1, 1, 4).tolist()
        turn = _orient_fruit(self._species.is_lying, angle_degrees + wobble)
        facing = np.flatnonzero(_turn(turn[2:], self._fruit[3:6])[0] > 0)
        x, y, depth = _turn(turn, self._fruit[:3, facing])
        places = np.stack([_HALF_WIDTH + 0.01 * up - y, _HALF_WIDTH + 0.01 * right + x])
        row, column = (places * (self._n_px / 2 / _HALF_WIDTH)).astype(np.int32).clip(0, self._n_px - 1)
        pixel = row * self._n_px + column
        nearest = np.full(self._n_px**2, -np.inf, np.float32)
        np.maximum.at(nearest, pixel, depth)
        seen = np.flatnonzero(depth == nearest[pixel])
        points = self._fruit[3:, facing[seen]]
        pixels = np.full((self._n_px**2, 3), 255, np.uint8)
        pixels[pixel[seen]] = _shade(_turn(turn, points[:3]), points[3:], 0.95 + 0.03 * exposure)
        image = Image.fromarray(pixels.reshape(self._n_px, self._n_px, 3))
        return image.resize((self._size_px, self._size_px), Image.Resampling.HAMMING)


def _check_at_least(name: str, value: int, minimum: int) -> None:
    """Refuse a number that is too small."""
    if value < minimum:
        raise ConfigError(f"Expected {name} to be at least {minimum}, found {value}; give a larger number.")


def render_fruit(class_name: str, *, angle_degrees: float, size_px: int = 160, seed: int = 0) -> Image.Image:
    """Draw one fruit on its turntable, on white; equal arguments draw equal pixels.

    >>> render_fruit("pear_1", angle_degrees=30, size_px=32).size
    (32, 32)
    """
    if class_name not in _SPECIES:
        raise ConfigError(
            f"Expected a class of the sample data set, found {class_name!r}; use one of {', '.join(CLASS_NAMES)}."
        )
    _check_at_least("size_px", size_px, _MIN_SIZE_PX)
    _check_at_least("seed", seed, 0)
    return _Turntable(class_name, size_px, seed).photograph(angle_degrees)


def _open_scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """Open a temporary folder beside the one to be created; an empty one there makes way."""
    if os.path.lexists(folder):
        folder.rmdir()  # refuses whatever is not an empty folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent)


def draw_sample(folder: str | Path, *, per_class: int = 24, size_px: int = 160, seed: int = 0) -> int:
    """
    Draw a data set of every class, laid out like Fruits-360: ``<folder>/<class>/r0_<k>.jpg``.

    The folder appears at once and complete: the images are drawn into a temporary folder beside it, which is renamed
    at the end, so that an interrupted drawing never leaves half a data set.

    Parameters
    ----------
    folder : str or pathlib.Path
        Where the data set goes: a folder that does not exist yet, or an empty one. Missing parents are created.
    per_class : int, default 24
        Images of each class, at least 1; their angles are spread evenly over a full turn.
    size_px : int, default 160
        Width and height of each image, at least 16.
    seed : int, default 0
        Which fruits: equal arguments write equal bytes. Not negative.

    Returns
    -------
    int
        The number of images written.

    Raises
    ------
    fruitdask.errors.ConfigError
        If a number is too small.
    fruitdask.errors.OutputError
        If the folder is not empty, is a file, or cannot be created.

    Notes
    -----
    The files are JPEG of quality 92 without metadata.
    """
    leave_imported_script()
    _check_at_least("per_class", per_class, 1)
    _check_at_least("size_px", size_px, _MIN_SIZE_PX)
    _check_at_least("seed", seed, 0)
    target = Path(folder).absolute()
    try:
        with _open_scratch(target) as scratch:
            draft = Path(scratch) / target.name
            for class_name in CLASS_NAMES:
                (draft / class_name).mkdir(parents=True)
                turntable = _Turntable(class_name, size_px, seed)
                for k in range(per_class):
                    image = turntable.photograph(360 * k / per_class)
                    image.save(draft / class_name / f"r0_{k}.jpg", quality=_JPEG_QUALITY)
            draft.rename(target)
    except OSError as error:
        raise OutputError(
            f"Expected a new or empty folder for the sample, but {target} cannot be created"
            f" ({error.strerror or error}); name another folder."
        ) from error
    return len(CLASS_NAMES) * per_class
