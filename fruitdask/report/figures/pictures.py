"""Figures of the images: examples of each class, and sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.report.figures.canvas import fit_figure, name_rows, plot_nothing, standard_settings, start_figure
from fruitdask.report.figures.styles import ACCENT, INK, TEXT_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

    from fruitdask.store.exploration import Exploration

#: Maximum number of classes, and the number from which the grid has two halves side by side.
_MAX_CLASSES, _CLASSES_PER_BLOCK = 40, 20
_CELL_INCHES, _HISTOGRAM_INCHES = 0.67, (3.0, 1.7)
#: The part of a cell that its picture fills.
_PICTURE = np.array([0.04, 0.96])
#: Histograms of sizes.
SIZES = ("File size", "Longer side")
_HEADINGS = ("mean", "most\ntypical", "least\ntypical")
_N_BINS = 30
#: Sizes with a larger ratio are shown on a logarithmic axis.
_LOG_SPAN = 30.0

Image = npt.NDArray[np.uint8]


@standard_settings()
def plot_examples(exploration: Exploration, *, per_class: int) -> Figure:
    """Plot images of each class."""
    title, classes = "Examples of each class", exploration.classes
    if classes.empty:
        return plot_nothing(title, "There are no classes to show.")
    largest = classes.sort_index().sort_values("n_images", ascending=False, kind="stable").index[:_MAX_CLASSES]
    shown = largest.sort_values()
    n_blocks = 1 if len(shown) <= _CLASSES_PER_BLOCK else 2
    n_rows, n_pictures = math.ceil(len(shown) / n_blocks), len(_HEADINGS) + per_class
    n_left_out = len(classes) - len(shown)
    figure = start_figure(title, f"{n_left_out:,} smaller classes are not shown" if n_left_out else "")
    for number, axes in enumerate(figure.subplots(1, n_blocks, squeeze=False)[0]):
        labels = shown[number * n_rows : (number + 1) * n_rows]
        for row, label in enumerate(labels):
            for column, picture in _choose_pictures(exploration, label, per_class=per_class):
                extent = (*(column + _PICTURE), *(row + _PICTURE[::-1]))
                axes.imshow(picture, extent=extent, interpolation="bilinear", aspect="auto", clip_on=False)
        axes.set(xlim=(0, n_pictures), ylim=(n_rows, 0))
        names = name_rows(labels, n_characters=26)
        axes.set_yticks(np.arange(len(labels)) + 0.5, names, size=TEXT_SIZE, color=INK)
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
def plot_sizes(images: pd.DataFrame, *, parts: Sequence[str] = SIZES, n_images: int | None = None) -> Figure:
    """Plot how large the images, or a sample of `n_images`, are: the histograms of `parts` side by side."""
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    title = "Sizes of the images" if len(parts) > 1 else parts[0]
    if images.empty:
        return plot_nothing(title, "There are no images.")
    sides = images[["width_px", "height_px"]].dropna().to_numpy(float)
    # Files that are missing have no size.
    n_bytes = images.loc[images["bytes"] > 0, "bytes"].to_numpy(float)
    shown, n_all = f"{len(images):,}", len(images) if n_images is None else n_images
    shown += f" of {n_all:,}" if n_all != len(images) else ""
    figure = start_figure(title, f"{shown} image{'' if n_all == 1 else 's'}")
    for part, axes in zip(parts, figure.subplots(1, len(parts), squeeze=False)[0], strict=True):
        heading = part if len(parts) > 1 else ""
        if part == SIZES[0]:
            _draw_histogram(axes, n_bytes, EngFormatter("B"), heading=heading)
            axes.set_xlabel(_describe_bytes(n_bytes))
        else:
            _draw_histogram(axes, sides.max(axis=1, initial=0), StrMethodFormatter("{x:,.0f} px"), heading=heading)
            axes.set_xlabel(_describe_sides(sides))
    return fit_figure(figure, width=len(parts) * _HISTOGRAM_INCHES[0], height=_HISTOGRAM_INCHES[1])


def _choose_pictures(exploration: Exploration, label: str, *, per_class: int) -> Iterator[tuple[int, Image]]:
    """Choose the pictures of a class, each with its column."""
    place = exploration.classes.index.get_loc(label)
    row = exploration.classes.iloc[place]
    if row["n_ok"]:
        yield 0, exploration.means[place]
    images = exploration.images.iloc[exploration.thumbnail_rows]
    numbers = np.flatnonzero(images["label"] == label)
    paths = images["path"].iloc[numbers]
    typical = [row["most_typical"], row["least_typical"]]
    for column, path in enumerate(typical, start=1):
        yield from ((column, exploration.thumbnails[number]) for number in numbers[paths == path])
    others = numbers[~paths.isin(typical)]
    evenly = np.linspace(0, len(others) - 1, min(per_class, len(others))).round().astype(int)
    yield from enumerate(exploration.thumbnails[others[evenly]], start=len(_HEADINGS))


def _draw_histogram(axes: Axes, values: npt.NDArray[np.float64], unit: Formatter, *, heading: str) -> None:
    """Draw a histogram with units on its axis."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set_title(heading)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if not len(values):
        axes.set(xticks=[], yticks=[])
        return
    low, high = values.min(), values.max()
    is_log = low > 0 and high > _LOG_SPAN * low
    # Bins are at least one byte or pixel wide.
    step = max(1, math.ceil((high - low + 1) / _N_BINS))
    edges = np.geomspace(low, high * (1 + 1e-9), _N_BINS + 1) if is_log else np.arange(low - 0.5, high + step, step)
    axes.hist(values, list(edges), histtype="stepfilled", color=ACCENT)
    axes.set_xscale("log" if is_log else "linear")
    subs = (1, 3) if high < 300 * low else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=5) if is_log else MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(unit)
    if low == high:
        axes.set(xlim=(low - 8, low + 8), xticks=[low])
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y")


def _describe_bytes(n_bytes: npt.NDArray[np.float64]) -> str:
    """Describe the range of file sizes, to three digits."""
    from matplotlib.ticker import EngFormatter

    if not len(n_bytes):
        return "unknown"
    quantiles = np.quantile(n_bytes, (0, 0.5, 1))
    low, middle, high = (EngFormatter("B")(float(f"{value:.3g}")) for value in quantiles)
    return f"all {middle}" if low == high else f"median {middle}, {low} to {high}"


def _describe_sides(sides: npt.NDArray[np.float64]) -> str:
    """Describe the range of pixel sizes."""
    if not len(sides):
        return "no image could be read"
    width, height = np.median(sides, axis=0)
    longer = sides.max(axis=1)
    if (sides == sides[0]).all():
        return f"all {width:,.0f} × {height:,.0f} px"
    return f"median {width:,.0f} × {height:,.0f} px, {longer.min():,.0f} to {longer.max():,.0f} px"
