"""A small data set drawn in the style of Fruits-360's turntable photographs, for trying the tool without any data.

Each fruit is a body of revolution, given by its meridian in polar form and dented by a few slow waves, seen by an
orthographic camera: rays are marched to the surface, the skin is painted from value noise that turns with the body, and
stalks are chains of balls.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from fruitdask.core.guard import leave_imported_script
from fruitdask.errors import ConfigError, OutputError

Array: TypeAlias = npt.NDArray[np.float32]
Indices: TypeAlias = npt.NDArray[np.intp]

_JPEG_QUALITY = 92
_MIN_SIZE_PX = 16  # fruits drawn smaller can no longer be told apart
_SUPERSAMPLING = 2  # rays along a pixel's side, for clean edges
_SCAN_STEPS = 14  # a ray's steps through the bounding sphere: fine enough to find a fruit's neck and shoulders
_REFINE_STEPS = 2  # of false position: 99 rays in 100 then end within about a tenth of a supersampled pixel at 160 px
_PROFILE_ENTRIES = 2048
_NORMAL_STEP = 0.006  # about one supersampled pixel at 160 px
_BALLS_PER_RADIUS = 4  # enough that a chain looks like one piece
_LATTICE = 16  # noise cells along each axis before they repeat; a power of two, for indices are wrapped by a mask
_ASKEW = np.array([[2, -2, 1], [1, 2, 2], [-2, -1, 2]], np.float32) / np.float32(3)  # rotation that hides the lattice
_GAMMA = 2.2  # of sRGB, nearly
_HALF_WIDTH = 1.06  # of the image, in body lengths: the longest bodies are about 1, and the wobble needs a margin
_KEY_LIGHT = (-0.45, 0.62, 0.64)  # unit vector: x to the right, y up, z toward the camera
_TILT_DEGREES = 7.0  # of an upright fruit's axis: no fruit stands quite straight on its table
_UPRIGHT_ELEVATION_DEGREES = 20.0  # of the camera: high enough to look into an apple's hollow
_LYING_ELEVATION_DEGREES = 32.0
_STALK_GLOSS = 0.05
_WART_SCALE = (8, 8, 34)  # dot cells per unit, the same as those of the cucumber's pale dots


@dataclass(frozen=True)
class _Layer:
    """One coat of paint: a colour laid on where a field of the body's coordinates rises from `low` to `high`."""

    read: Callable[[Array, Array, _Grain], Array]
    scale: tuple[float, float, float]
    colour: str
    low: float
    high: float
    strength: float = 1.0


@dataclass(frozen=True)
class _Chain:
    """A run of balls along a smooth path in body coordinates: a stalk or a sepal."""

    path: tuple[tuple[float, float, float], ...]
    radii: tuple[float, ...]
    colours: tuple[str, str]


@dataclass(frozen=True)
class _Species:
    """
    What tells one class from another; the meridian (axial, radial) runs from the stalk's end to the other.

    Before it is drawn, the body is swollen by `bumps` (slow waves) and `lobes` (five, around the axis) as fractions of
    its radius, and bent; `stretch`, about its length over its width, only makes it round enough for the polar form.
    """

    axial: tuple[float, ...]
    radial: tuple[float, ...]
    skin: str
    layers: tuple[_Layer, ...]
    chains: tuple[_Chain, ...]
    gloss: float = 0.3
    lobes: float = 0.0
    bumps: float = 0.02
    drop: float = 0.0
    is_lying: bool = False
    stretch: float = 1.0
    bend: float = 0.0
    warts: float = 0.0


@dataclass(frozen=True)
class _Grain:
    """The random numbers that make one fruit an individual: noise lattice, dots, and waves of the outline."""

    lattice: Array
    dots: Array
    waves: Array
    phases: Array

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Grain:
        """Draw the numbers of one fruit."""
        return cls(
            rng.random(_LATTICE**3, np.float32),
            rng.random((4, 1024), np.float32),
            rng.normal(0.0, 1.7, (3, 3)).astype(np.float32),
            rng.uniform(0.0, 2 * math.pi, (3, 1)).astype(np.float32),
        )


def _ramp(values: Array, low: float, high: float) -> Array:
    """Rise smoothly from 0 at `low` to 1 at `high`."""
    t = np.asarray(np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1), np.float32)
    return t * t * (np.float32(3) - np.float32(2) * t)


def _decode_colour(colour: str) -> Array:
    """Turn an sRGB hex colour into linear light, shape (3, 1)."""
    return np.array([[(channel / 255) ** _GAMMA] for channel in bytes.fromhex(colour)], np.float32)


def _smooth_path(points: Array, n_points: int) -> Array:
    """Run a Catmull-Rom spline through control points, shape (n, d)."""
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    at = np.linspace(0, len(points) - 1, n_points, dtype=np.float32)
    low = np.minimum(np.floor(at), len(points) - 2)
    t = (at - low)[:, None]
    a, b, c, d = (padded[low.astype(np.intp) + k] for k in range(4))
    curve = b + t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a))) / 2
    return np.asarray(curve, np.float32)


def _interpolate_noise(points: Array, grain: _Grain) -> Array:
    """Evaluate periodic value noise in [0, 1] at points, shape (3, n)."""
    at = np.asarray(_ASKEW @ points, np.float32)
    low = np.floor(at)
    x, y, z = (w * w * (3 - 2 * w) for w in at - low)
    wrap = _LATTICE - 1
    here = low.astype(np.int32) & wrap
    there = (here + 1) & wrap
    edges: list[Array] = []
    for i in (here[0], there[0]):
        for j in (here[1], there[1]):
            row = (i * _LATTICE + j) * _LATTICE
            near = grain.lattice[row + here[2]]
            edges.append(near + z * (grain.lattice[row + there[2]] - near))
    left: Array = edges[0] + y * (edges[1] - edges[0])
    right: Array = edges[2] + y * (edges[3] - edges[2])
    noise: Array = left + x * (right - left)
    return noise


def _read_patches(q: Array, scale: Array, grain: _Grain) -> Array:
    """Read noise in space."""
    return _interpolate_noise(q * scale, grain)


def _read_stripes(q: Array, scale: Array, grain: _Grain) -> Array:
    """Read noise that varies with the azimuth more than along the axis."""
    radial = np.sqrt(q[0] ** 2 + q[1] ** 2) + np.float32(1e-3)
    return _interpolate_noise(np.stack([q[0] / radial, q[1] / radial, q[2]]) * scale, grain)


def _read_axis(q: Array, scale: Array, grain: _Grain) -> Array:
    """Read the place along the axis, roughened by noise."""
    place: Array = q[2] + _interpolate_noise(q * scale, grain) / 2 - np.float32(0.25)
    return place


def _read_cavity(q: Array, _scale: Array, _grain: _Grain) -> Array:
    """Read how near the axis a point of the stalk's half lies: 1 on it."""
    return np.where(q[2] > 0, 1 - np.sqrt(q[0] ** 2 + q[1] ** 2), np.float32(0))


def _read_dots(q: Array, scale: Array, grain: _Grain) -> Array:
    """Read scattered dots, 1 in the middle and 0 outside: each keeps inside its own cell, so one look-up will do."""
    at = q * scale
    cell = np.floor(at)
    x, y, z = cell.astype(np.int32)
    key = (x * 7919 ^ y * 6271 ^ z * 4799) & (grain.dots.shape[1] - 1)
    centre = grain.dots[:3, key] * np.float32(0.4) + np.float32(0.3)
    distance = np.sqrt(np.sum((at - cell - centre) ** 2, axis=0))
    nearness: Array = 1 - distance / (np.float32(0.1) + np.float32(0.2) * grain.dots[3, key])
    return np.maximum(nearness, np.float32(0))


class _Body:
    """One fruit's surface: a function of body coordinates (the axis is z) that is negative inside."""

    def __init__(self, species: _Species, grain: _Grain) -> None:
        self.species = species
        self.grain = grain
        axial, radial = _smooth_path(np.array([species.axial, species.radial], np.float32).T, 400).T
        axial = axial / np.float32(species.stretch)
        norm = np.hypot(axial, radial)
        order = np.argsort(axial / norm)
        cosines = np.linspace(-1, 1, _PROFILE_ENTRIES)
        self.radius: Array = np.interp(cosines, (axial / norm)[order], norm[order]).astype(np.float32)
        self.slope: Array = np.diff(self.radius, append=self.radius[-1:])

    def straighten(self, points: Array) -> Array:
        """Undo the bend and the stretch, so that the polar form of the meridian applies."""
        q = points.copy()
        q[0] -= np.float32(self.species.bend) * points[2] ** 2
        q[2] /= np.float32(self.species.stretch)
        return q

    def measure(self, points: Array) -> Array:
        """Measure how far points lie outside the surface, away from the centre."""
        q = self.straighten(points)
        norm = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2) + np.float32(1e-6)
        at = (q[2] / norm + 1) * np.float32((_PROFILE_ENTRIES - 1) / 2)
        low = np.floor(at)
        entry = low.astype(np.int32)
        radius = self.radius[entry] + (at - low) * self.slope[entry]
        waves = np.sin(self.grain.waves @ q + self.grain.phases).sum(axis=0)
        swell = 1 + np.float32(self.species.bumps) * waves
        if self.species.lobes:
            x, y = q[:2] / norm
            x2, y2 = x * x, y * y
            swell += np.float32(self.species.lobes) * x * (x2 * x2 - 10 * x2 * y2 + 5 * y2 * y2)
        outside: Array = norm - radius * swell
        return outside

    def measure_finely(self, points: Array) -> Array:
        """Measure with the warts, which are too low to move the outline but must catch the light."""
        value = self.measure(points)
        if self.species.warts:
            scale = np.array(_WART_SCALE, np.float32)[:, None]
            dots = _read_dots(self.straighten(points), scale, self.grain)
            value -= np.float32(self.species.warts) * _ramp(dots, 0, 1)
        return value

    def find_normals(self, points: Array) -> Array:
        """Differentiate the surface by four samples at the corners of a tetrahedron."""
        normals = np.zeros_like(points)
        for corner in np.array([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], np.float32)[..., None]:
            normals += corner * self.measure_finely(points + np.float32(_NORMAL_STEP) * corner)
        normals /= np.sqrt(np.sum(normals**2, axis=0)) + np.float32(1e-9)
        return normals

    def paint(self, points: Array) -> Array:
        """Colour the skin, in linear light."""
        q = self.straighten(points)
        colour = np.repeat(_decode_colour(self.species.skin), q.shape[1], axis=1)
        for layer in self.species.layers:
            value = layer.read(q, np.array(layer.scale, np.float32)[:, None], self.grain)
            cover = np.float32(layer.strength) * _ramp(value, layer.low, layer.high)
            colour += cover * (_decode_colour(layer.colour) - colour)
        return colour


def _scan_rays(body: _Body, base: Array, toward: Array) -> tuple[Indices, Array, Array, Array, Array]:
    """Find the rays that hit, their last depths outside and first inside, and the surface's values there."""
    squeeze = np.array([[1], [1], [1 / body.species.stretch]], np.float32)
    q, e = base * squeeze, toward[:, None] * squeeze
    bulge = 1 + len(body.grain.waves) * body.species.bumps + body.species.lobes
    reach = float(body.radius.max()) * bulge + body.species.bend
    a, b = np.sum(e * e), np.sum(q * e, axis=0)
    gap = b * b - a * (np.sum(q * q, axis=0) - np.float32(reach**2))
    rays: Indices = np.flatnonzero(gap > 0)
    half = np.sqrt(gap[rays]) / a
    outer, step, origin = half - b[rays] / a, 2 * half / _SCAN_STEPS, base[:, rays]
    outer_value = body.measure(origin + outer * toward[:, None])
    hits: list[tuple[npt.NDArray[Any], ...]] = []
    for _ in range(_SCAN_STEPS):
        inner = outer - step
        value = body.measure(origin + inner * toward[:, None])
        hit, miss = np.flatnonzero(value < 0), np.flatnonzero(value >= 0)
        hits.append(tuple(v[hit] for v in (rays, outer, inner, outer_value, value)))
        rays, outer, step, outer_value = rays[miss], inner[miss], step[miss], value[miss]
        origin = origin.take(miss, axis=1)
    rays, outer, inner, outer_value, value = (np.concatenate(v) for v in zip(*hits, strict=True))
    return rays, outer, inner, outer_value, value


def _march_rays(body: _Body, base: Array, toward: Array) -> tuple[Indices, Array]:
    """Find the rays base + depth * toward that hit the body, and their depths, by scanning and false position."""
    rays, outer, inner, outer_value, inner_value = _scan_rays(body, base, toward)
    origin = base[:, rays]
    depth = inner
    for _ in range(_REFINE_STEPS):
        depth = outer - (outer - inner) * (outer_value / (outer_value - inner_value))
        value = body.measure(origin + depth * toward[:, None])
        is_inside = value < 0
        inner, inner_value = np.where(is_inside, depth, inner), np.where(is_inside, value, inner_value)
        outer, outer_value = np.where(is_inside, outer, depth), np.where(is_inside, outer_value, value)
    return rays, depth


def _draw_body(frame: Array, body: _Body, turn: Array, shift: Array) -> None:
    """Draw the fruit; the rows of `turn` are the camera's axes in body coordinates."""
    n_px = frame.shape[1]
    line = np.linspace(1 / n_px - 1, 1 - 1 / n_px, n_px, dtype=np.float32) * np.float32(_HALF_WIDTH)
    x, y = np.meshgrid(line - shift[0], -line - shift[1])
    base = turn[0][:, None] * x.ravel() + turn[1][:, None] * y.ravel()
    rays, depth = _march_rays(body, base, turn[2])
    points = base[:, rays] + depth * turn[2][:, None]
    gloss = np.full_like(depth, body.species.gloss)
    frame.reshape(8, -1)[:, rays] = [depth, *(turn @ body.find_normals(points)), *body.paint(points), gloss]


def _draw_chain(frame: Array, chain: _Chain, turn: Array, shift: Array) -> None:
    """Draw a chain ball by ball."""
    knots = np.array(chain.path, np.float32)
    length = np.linalg.norm(np.diff(knots, axis=0), axis=1).sum()
    n_balls = 2 + int(_BALLS_PER_RADIUS * length / min(chain.radii[0], 0.05))
    balls = _smooth_path(knots, n_balls) @ turn.T + np.array([*shift, 0], np.float32)
    along = np.linspace(0, 1, n_balls, dtype=np.float32)
    radii = np.interp(along, np.linspace(0, 1, len(chain.radii)), chain.radii).astype(np.float32)
    first, last = (_decode_colour(colour)[:, 0] for colour in chain.colours)
    for centre, radius, t in zip(balls, radii, along, strict=True):
        _draw_ball(frame, centre, radius, first + t * (last - first))


def _draw_ball(frame: Array, centre: Array, radius: np.float32, colour: Array) -> None:
    """Draw one ball, given in camera coordinates, where it is nearer than what is there."""
    n_px = frame.shape[1]
    place = np.array([_HALF_WIDTH + centre[0], _HALF_WIDTH - centre[1], radius], np.float32)
    column, row, reach = place * np.float32(n_px / 2 / _HALF_WIDTH)
    bounds = np.rint([row - reach, row + reach, column - reach, column + reach])
    top, bottom, left, right = np.clip(bounds, 0, n_px).astype(int)
    u = (np.arange(left, right, dtype=np.float32) + np.float32(0.5) - column) / reach
    v = (row - np.arange(top, bottom, dtype=np.float32) - np.float32(0.5)) / reach
    height = np.sqrt(np.maximum(1 - u * u - (v * v)[:, None], 0))
    depth = centre[2] + radius * height
    window = frame[:, top:bottom, left:right]
    i, j = np.nonzero((height > 0) & (depth > window[0]))
    flat = np.ones_like(u[j])
    window[:, i, j] = [depth[i, j], u[j], v[i], height[i, j], *(c * flat for c in colour), _STALK_GLOSS * flat]


def _shade_frame(frame: Array, exposure: float) -> Image.Image:
    """Light what is seen with a soft key light, sky, a highlight and a pale rim; the background stays white."""
    is_seen = frame[0] > -np.inf
    seen = frame[:, is_seen]
    normal, albedo, gloss = seen[1:4], seen[4:7], seen[7]
    light = np.array(_KEY_LIGHT, np.float32)
    halfway = light + np.array([0, 0, 1], np.float32)
    shine = np.maximum(halfway @ normal / np.linalg.norm(halfway), 0)
    diffuse = np.maximum((light @ normal + np.float32(0.25)) / np.float32(1.25), 0)
    ambient = np.float32(0.22) + np.float32(0.10) * normal[1]
    highlight = gloss * (np.float32(0.75) * shine**60 + np.float32(0.25) * shine**12)
    rim = np.float32(0.06) * (1 - np.clip(normal[2], 0, 1)) ** 3
    linear = albedo * (np.float32(exposure) * diffuse + ambient) + highlight + rim
    pixels = np.full((*is_seen.shape, 3), 255, np.uint8)
    pixels[is_seen] = np.rint(255 * np.minimum(linear, 1) ** np.float32(1 / _GAMMA)).astype(np.uint8).T
    return Image.fromarray(pixels)


_APPLE_STALK = _Chain(
    ((0, 0, 0.42), (0, 0, 0.62), (0.03, 0.02, 0.80), (0.08, 0.05, 0.95)),
    (0.038, 0.024, 0.024, 0.037),
    ("5d6a2a", "5a3d22"),
)
_TOMATO_STALK = _Chain(((0, 0, 0.48), (0, 0, 0.62), (0.02, 0.03, 0.76)), (0.055, 0.038, 0.05), ("4f7a2a", "6f8a44"))
_SEPAL = _Chain(
    ((0.02, 0, 0.50), (0.16, 0, 0.58), (0.32, 0, 0.64), (0.50, 0, 0.63)),
    (0.05, 0.05, 0.04, 0.012),
    ("4f7a2a", "5f8a34"),
)
_PEAR_STALK = _Chain(
    ((0, 0, 0.76), (0, 0, 0.84), (0.03, 0.02, 0.94), (0.10, 0.05, 1.04)),
    (0.055, 0.028, 0.026, 0.036),
    ("6d5a2a", "4a3220"),
)
_CUCUMBER_STALK = _Chain(((0, 0, 0.9), (0, 0, 0.94), (0, 0.01, 0.965)), (0.03, 0.025, 0.03), ("5f7a3a", "9a8a5a"))
_ZUCCHINI_STALK = _Chain(((0, 0, 0.7), (0, 0, 0.8), (0, 0, 0.93)), (0.12, 0.07, 0.075), ("7a964c", "b5b27a"))
_RIDGE = _Chain(((0.10, 0, 0.67), (0.055, 0, 0.78), (0.06, 0, 0.94)), (0.045, 0.035, 0.04), ("6f9046", "a9a86c"))


def _repeat_around(chain: _Chain) -> tuple[_Chain, ...]:
    """Repeat a chain, given in the plane y = 0, five times around the axis."""
    turns = [2 * math.pi * k / 5 for k in range(5)]
    return tuple(
        replace(chain, path=tuple((x * math.cos(t), x * math.sin(t), z) for x, _, z in chain.path)) for t in turns
    )


_SPECIES: dict[str, _Species] = {
    "apple_granny_smith_1": _Species(
        axial=(0.49, 0.51, 0.64, 0.72, 0.61, 0.29, -0.08, -0.42, -0.66, -0.75, -0.68, -0.66),
        radial=(0, 0.07, 0.20, 0.41, 0.68, 0.86, 0.875, 0.73, 0.48, 0.27, 0.09, 0),
        skin="8aa83c",
        layers=(
            _Layer(_read_patches, (1.9, 1.9, 1.9), "b3bf58", 0.35, 0.8, 0.7),
            _Layer(_read_stripes, (5, 5, 1.3), "6f932f", 0.4, 0.9, 0.4),
            _Layer(_read_patches, (14, 14, 14), "a9bd5c", 0.4, 0.9, 0.4),
            _Layer(_read_dots, (12, 12, 12), "d9e2a4", 0.15, 0.7, 0.6),
            _Layer(_read_cavity, (1, 1, 1), "857339", 0.8, 0.97, 0.8),
        ),
        chains=(_APPLE_STALK,),
        lobes=0.012,
        drop=-0.04,
    ),
    "apple_red_1": _Species(
        axial=(0.50, 0.53, 0.68, 0.77, 0.64, 0.29, -0.10, -0.47, -0.71, -0.79, -0.71, -0.68),
        radial=(0, 0.07, 0.20, 0.42, 0.71, 0.84, 0.80, 0.63, 0.43, 0.26, 0.09, 0),
        skin="a8242a",
        layers=(
            _Layer(_read_patches, (1.5, 1.5, 1.1), "d0a955", 0.45, 0.9, 0.85),
            _Layer(_read_stripes, (10, 10, 1.6), "8f1722", 0.4, 0.75, 0.7),
            _Layer(_read_stripes, (23, 23, 2.6), "c4503a", 0.5, 0.85, 0.5),
            _Layer(_read_dots, (14, 14, 14), "e6bf90", 0.2, 0.8, 0.7),
            _Layer(_read_cavity, (1, 1, 1), "a98f45", 0.7, 0.95, 0.85),
        ),
        chains=(_APPLE_STALK,),
        lobes=0.016,
        drop=-0.04,
    ),
    "pear_1": _Species(
        axial=(0.80, 0.79, 0.71, 0.55, 0.32, 0.08, -0.19, -0.44, -0.67, -0.84, -0.88, -0.84),
        radial=(0, 0.08, 0.20, 0.27, 0.37, 0.51, 0.63, 0.65, 0.55, 0.33, 0.15, 0),
        skin="c3b84e",
        layers=(
            _Layer(_read_axis, (5, 5, 5), "97a646", 0.0, 0.6, 0.7),
            _Layer(_read_patches, (1.6, 1.6, 1.6), "c5853e", 0.5, 0.85, 0.7),
            _Layer(_read_dots, (17, 17, 17), "7a672c", 0.1, 0.6, 0.7),
            _Layer(_read_cavity, (1, 1, 1), "8a6a34", 0.8, 0.97, 0.7),
        ),
        chains=(_PEAR_STALK,),
        stretch=1.25,
        drop=-0.05,
    ),
    "tomato_1": _Species(
        axial=(0.45, 0.47, 0.54, 0.59, 0.50, 0.22, -0.08, -0.36, -0.55, -0.61, -0.61),
        radial=(0, 0.07, 0.19, 0.39, 0.67, 0.85, 0.86, 0.73, 0.49, 0.22, 0),
        skin="c0240f",
        layers=(
            _Layer(_read_patches, (1.5, 1.5, 1.5), "d94a14", 0.45, 0.8, 0.7),
            _Layer(_read_cavity, (1, 1, 1), "d07f2a", 0.6, 0.95, 0.7),
        ),
        chains=(_TOMATO_STALK, *_repeat_around(_SEPAL)),
        gloss=0.55,
        lobes=0.03,
    ),
    "cucumber_3": _Species(
        axial=(0.93, 0.92, 0.87, 0.77, 0.58, 0.2, -0.2, -0.58, -0.77, -0.87, -0.92, -0.93),
        radial=(0, 0.07, 0.13, 0.18, 0.21, 0.22, 0.225, 0.215, 0.185, 0.13, 0.07, 0),
        skin="294e1e",
        layers=(
            _Layer(_read_stripes, (5, 5, 0.6), "8ea552", 0.5, 0.85, 0.8),
            _Layer(_read_axis, (5, 5, 5), "294e1e", -0.12, 0.08, 0.85),
            _Layer(_read_patches, (16, 16, 60), "48702f", 0.4, 0.9, 0.5),
            _Layer(_read_dots, (8, 8, 34), "a9bd78", 0.35, 0.9, 0.6),
            _Layer(_read_cavity, (1, 1, 1), "8a8a4c", 0.93, 0.98, 0.8),
        ),
        chains=(_CUCUMBER_STALK,),
        is_lying=True,
        stretch=4.2,
        bend=0.12,
        bumps=0.012,
        warts=0.03,
    ),
    "zucchini_1": _Species(
        axial=(0.72, 0.71, 0.66, 0.4, 0.1, -0.3, -0.6, -0.79, -0.86, -0.87),
        radial=(0, 0.10, 0.145, 0.175, 0.20, 0.24, 0.245, 0.19, 0.10, 0),
        skin="5f8c38",
        layers=(
            _Layer(_read_stripes, (3, 3, 0.8), "8aab55", 0.4, 0.8, 0.7),
            _Layer(_read_dots, (17, 17, 55), "c3d294", 0.1, 0.7, 0.6),
            _Layer(_read_patches, (16, 16, 50), "8fae5c", 0.5, 0.9, 0.35),
        ),
        chains=(_ZUCCHINI_STALK, *_repeat_around(_RIDGE)),
        gloss=0.45,
        is_lying=True,
        stretch=3.6,
        bumps=0.01,
    ),
}

CLASS_NAMES: tuple[str, ...] = tuple(_SPECIES)


def _orient_body(species: _Species, angle_degrees: float) -> Array:
    """Build the rotation from body to camera coordinates: stand or lie, turn about the vertical, look down."""
    elevation = _LYING_ELEVATION_DEGREES if species.is_lying else _UPRIGHT_ELEVATION_DEGREES
    radians = np.radians([90.0 if species.is_lying else _TILT_DEGREES, angle_degrees, elevation])
    c, s = np.cos(radians), np.sin(radians)
    stand = np.array([[c[0], 0, s[0]], [-s[0], 0, c[0]], [0, -1, 0]])
    spin = np.array([[c[1], 0, s[1]], [0, 1, 0], [-s[1], 0, c[1]]])
    look = np.array([[1, 0, 0], [0, c[2], -s[2]], [0, s[2], c[2]]])
    return np.asarray(look @ spin @ stand, np.float32)


def _check_at_least(name: str, value: int, minimum: int) -> None:
    """Refuse a number that is too small."""
    if value < minimum:
        raise ConfigError(f"Expected {name} to be at least {minimum}, found {value}; give a larger number.")


def render_fruit(class_name: str, *, angle_degrees: float, size_px: int = 160, seed: int = 0) -> Image.Image:
    """Draw one fruit on its turntable, on white.

    Exposure, position and angle vary a little from image to image, as in a real series; equal arguments draw equal
    pixels.

    >>> render_fruit("pear_1", angle_degrees=30, size_px=32).size
    (32, 32)
    """
    if class_name not in _SPECIES:
        raise ConfigError(
            f"Expected a class of the sample data set, found {class_name!r}; use one of {', '.join(CLASS_NAMES)}."
        )
    _check_at_least("size_px", size_px, _MIN_SIZE_PX)
    _check_at_least("seed", seed, 0)
    species, index = _SPECIES[class_name], CLASS_NAMES.index(class_name)
    body = _Body(species, _Grain.draw(np.random.default_rng([seed, index])))
    millidegrees = round(angle_degrees % 360 * 1000)
    exposure, wobble, *shift = np.random.default_rng([seed, index, millidegrees]).uniform(-1, 1, 4)
    turn = _orient_body(species, angle_degrees + wobble)
    centre = np.array([0.01 * shift[0], 0.01 * shift[1] + species.drop], np.float32)
    n_px = size_px * _SUPERSAMPLING
    # Planes: depth (-inf is background), normal (3), albedo (3) and gloss, in camera coordinates and linear light.
    frame = np.full((8, n_px, n_px), -np.inf, np.float32)
    _draw_body(frame, body, turn, centre)
    for chain in species.chains:
        _draw_chain(frame, chain, turn, centre)
    return _shade_frame(frame, 0.95 + 0.03 * exposure).resize((size_px, size_px), Image.Resampling.HAMMING)


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
                for k in range(per_class):
                    image = render_fruit(class_name, angle_degrees=360 * k / per_class, size_px=size_px, seed=seed)
                    image.save(draft / class_name / f"r0_{k}.jpg", quality=_JPEG_QUALITY)
            draft.rename(target)
    except OSError as error:
        raise OutputError(
            f"Expected a new or an empty folder for the sample, found that {target} cannot be created"
            f" ({error.strerror or error}); name another folder."
        ) from error
    return len(CLASS_NAMES) * per_class
