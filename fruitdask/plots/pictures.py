"""Figures of the images themselves: examples of each class, and sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.plots.canvas import fit_figure, pad_label, plot_nothing, standard_settings, start_figure, tidy_label
from fruitdask.plots.styles import ACCENT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

    from fruitdask.exploration import Exploration

#: Classes at most, and those from which on the grid has two halves side by side.
_MAX_CLASSES, _CLASSES_PER_BLOCK = 40, 20
_CELL_INCHES, _HISTOGRAM_INCHES = 0.67, (2.75, 1.7)
#: The part of a cell that its picture fills, at its lower and upper end.
_PICTURE = np.array([0.04, 0.96])
_HEADINGS = ("mean", "most\ntypical", "least\ntypical")
_N_BINS = 30
#: Sizes that span more than this go on a logarithmic axis.
_LOG_SPAN = 30.0

Image = npt.NDArray[np.uint8]


@standard_settings()
def plot_examples(exploration: Exploration, *, per_class: int) -> Figure:
    """Plot images of each class."""
    title, classes = "Examples of each class", exploration.classes
    if classes.empty:
        return plot_nothing(title, "There are no classes to show.")
    shown = classes.sort_index().sort_values("n_images", ascending=False, kind="stable").index[:_MAX_CLASSES]
    n_blocks = 1 if len(shown) <= _CLASSES_PER_BLOCK else 2
    n_rows, n_pictures = math.ceil(len(shown) / n_blocks), len(_HEADINGS) + per_class
    note = "The largest classes first" if len(classes) > 1 else ""
    if n_left_out := len(classes) - len(shown):
        note += f"; {n_left_out:,} smaller classes are not shown"
    figure, pictures = start_figure(title, note), _Pictures(exploration)
    for number, axes in enumerate(figure.subplots(1, n_blocks, squeeze=False)[0]):
        labels = shown[number * n_rows : (number + 1) * n_rows]
        for row, label in enumerate(labels):
            for column, picture in pictures.choose(label, per_class=per_class):
                extent = (*(column + _PICTURE), *(row + _PICTURE[::-1]))
                axes.imshow(picture, extent=extent, interpolation="bilinear", aspect="auto", clip_on=False)
        axes.set(xlim=(0, n_pictures), ylim=(n_rows, 0))
        names = [tidy_label(label, n_characters=26) for label in labels]
        axes.set_yticks(np.arange(len(labels)) + 0.5, [pad_label(name) + name for name in names], size=9, color=INK)
        headings = dict(zip(np.arange(len(_HEADINGS)) + 0.5, _HEADINGS, strict=True))
        headings |= {len(_HEADINGS) + per_class / 2: "others"} if per_class else {}
        axes.set_xticks(list(headings), list(headings.values()))
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.spines[:].set_visible(False)
    fit_figure(figure, width=n_blocks * n_pictures * _CELL_INCHES, height=n_rows * _CELL_INCHES)
    for axes in figure.axes:
        axes.set_aspect("equal", anchor="NW")
    return figure


@standard_settings()
def plot_sizes(images: pd.DataFrame) -> Figure:
    """Plot how large the images are."""
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    title = "Sizes of the images"
    if images.empty:
        return plot_nothing(title, "There are no images.")
    sides = images[["width_px", "height_px"]].dropna().to_numpy(float)
    n_bytes = images["bytes"].dropna().to_numpy(float)
    figure = start_figure(title, f"{len(images):,} image{'' if len(images) == 1 else 's'}")
    left, right = figure.subplots(1, 2)
    _draw_histogram(left, n_bytes, EngFormatter("B"), heading="File size")
    left.set_xlabel(_describe_bytes(n_bytes))
    _draw_histogram(right, sides.max(axis=1, initial=0), StrMethodFormatter("{x:,.0f} px"), heading="Longer side")
    right.set_xlabel(_describe_sides(sides))
    return fit_figure(figure, width=2 * _HISTOGRAM_INCHES[0], height=_HISTOGRAM_INCHES[1])


class _Pictures:
    """Thumbnails by class and by path."""

    def __init__(self, exploration: Exploration) -> None:
        images = exploration.images.iloc[exploration.thumbnail_rows]
        self._exploration = exploration
        self._paths = {path: number for number, path in enumerate(images["path"])}
        self._of_class = images.groupby("label", observed=True).indices

    def choose(self, label: str, *, per_class: int) -> Iterator[tuple[int, Image]]:
        """Choose the pictures of a class, each with its column."""
        exploration = self._exploration
        place = exploration.classes.index.get_loc(label)
        chosen = [self._paths.get(exploration.classes[name].iloc[place]) for name in ("most_typical", "least_typical")]
        if exploration.classes["n_ok"].iloc[place]:
            yield 0, exploration.means[place]
        for column, number in enumerate(chosen, start=1):
            if number is not None:
                yield column, exploration.thumbnails[number]
        others = [number for number in self._of_class.get(label, ()) if number not in chosen]
        evenly = np.linspace(0, len(others) - 1, min(per_class, len(others))).round().astype(int)
        for column, number in enumerate(evenly, start=len(_HEADINGS)):
            yield column, exploration.thumbnails[others[number]]


def _draw_histogram(axes: Axes, values: npt.NDArray[np.float64], unit: Formatter, *, heading: str) -> None:
    """Draw a histogram whose axis says the unit."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set_title(heading)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if not len(values):
        axes.set(xticks=[], yticks=[])
        return
    low, high = values.min(), values.max()
    is_log = low > 0 and high > _LOG_SPAN * low
    axes.hist(values, _choose_edges(low, high, is_log=is_log), histtype="stepfilled", color=ACCENT)
    axes.set_xscale("log" if is_log else "linear")
    subs = (1, 3) if high < 300 * low else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=5) if is_log else MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(unit)
    if low == high:
        axes.set(xlim=(low - 8, low + 8), xticks=[low])
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y")


def _choose_edges(low: float, high: float, *, is_log: bool) -> list[float]:
    """Choose the edges of bins, at least one unit wide."""
    if is_log:
        return list(np.geomspace(low, high * (1 + 1e-9), _N_BINS + 1))
    step = max(1.0, math.ceil((high - low + 1) / _N_BINS))
    return list(np.arange(low - 0.5, high + step, step))


def _describe_bytes(n_bytes: npt.NDArray[np.float64]) -> str:
    """Say the range of file sizes, to three digits."""
    from matplotlib.ticker import EngFormatter

    if not len(n_bytes):
        return "unknown"
    quantiles = np.quantile(n_bytes, (0, 0.5, 1))
    low, middle, high = (EngFormatter("B")(float(f"{value:.3g}")) for value in quantiles)
    return f"all {middle}" if low == high else f"median {middle}, {low} to {high}"


def _describe_sides(sides: npt.NDArray[np.float64]) -> str:
    """Say the range of pixel sizes."""
    if not len(sides):
        return "no image could be read"
    width, height = np.median(sides, axis=0)
    longer = sides.max(axis=1)
    if (sides == sides[0]).all():
        return f"all {width:,.0f} × {height:,.0f} px"
    return f"median {width:,.0f} × {height:,.0f} px, {longer.min():,.0f} to {longer.max():,.0f} px"
