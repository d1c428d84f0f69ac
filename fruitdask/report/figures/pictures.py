"""Figures of the images themselves: examples of each class, and sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.report.figures.canvas import (
    ACCENT,
    HAIRLINE,
    HEADER,
    MARGIN,
    MUTED,
    SMALL_SIZE,
    TEXT_SIZE,
    add_axes,
    hide_axes,
    measure_width,
    plot_nothing,
    standard_settings,
    start_figure,
    tidy_label,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fruitdask.store.exploration import Exploration

_MAX_CLASSES = 40
#: Classes from which on the grid has two halves side by side.
_CLASSES_PER_BLOCK = 20
_PICTURE_INCHES, _GAP_INCHES, _HEADING_INCHES = 0.62, 0.05, 0.34
_HEADINGS = (("mean", ""), ("most", "typical"), ("least", "typical"))
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
    names = [tidy_label(label, n_characters=26) for label in shown]
    n_blocks = 1 if len(shown) <= _CLASSES_PER_BLOCK else 2
    n_rows = math.ceil(len(shown) / n_blocks)
    cell = _PICTURE_INCHES + _GAP_INCHES
    name_inches = measure_width(names, size=TEXT_SIZE) + 0.12
    n_pictures = len(_HEADINGS) + per_class
    block = name_inches + n_pictures * cell
    note = "The largest classes first" if len(classes) > 1 else ""
    if n_left_out := len(classes) - len(shown):
        note += f"; {n_left_out:,} smaller classes are not shown"
    figure = start_figure(
        2 * MARGIN + n_blocks * block + (n_blocks - 1) * 0.3,
        HEADER + _HEADING_INCHES + n_rows * cell + MARGIN,
        title=title,
        note=note,
    )
    pictures = _Pictures(exploration)
    for number in range(n_blocks):
        left, rows = MARGIN + number * (block + 0.3) + name_inches, slice(number * n_rows, (number + 1) * n_rows)
        axes = add_axes(figure, left, HEADER + _HEADING_INCHES, n_pictures * cell, n_rows * cell)
        hide_axes(axes)
        axes.set(xlim=(0, n_pictures), ylim=(n_rows, 0))
        _write_headings(figure, left, cell, per_class=per_class)
        for row, (label, name) in enumerate(zip(shown[rows], names[rows], strict=True)):
            write(axes, -0.1, row + 0.46, name, ha="right", va="center_baseline")
            for column, picture in pictures.choose(label, per_class=per_class):
                _draw_picture(axes, picture, column=column, row=row)
    return figure


@standard_settings()
def plot_sizes(images: pd.DataFrame) -> Figure:
    """Plot how large the images are."""
    title = "Sizes of the images"
    if images.empty:
        return plot_nothing(title, "There are no images.")
    sides = images[["width_px", "height_px"]].dropna().to_numpy(float)
    n_bytes = images["bytes"].dropna().to_numpy(float)
    width, height, left, gap = 2.75, 1.7, MARGIN + 0.42, 0.65
    top = HEADER + 0.34
    figure = start_figure(left + 2 * width + gap + MARGIN + 0.1, top + height + 0.42, title=title)
    for number, (values, heading, note, unit) in enumerate(
        (
            (n_bytes, "File size", _describe_bytes(n_bytes), _format_bytes),
            (sides.max(axis=1, initial=0), "Longer side", _describe_sides(sides), _format_px),
        )
    ):
        start = left + number * (width + gap)
        write(figure, start, 0.52, heading, size=TEXT_SIZE)
        write(figure, start, 0.7, note, size=SMALL_SIZE, color=MUTED)
        _draw_histogram(add_axes(figure, start, top, width, height), values, unit)
    return figure


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


def _write_headings(figure: Figure, left: float, cell: float, *, per_class: int) -> None:
    """Write above the columns what is in them."""
    middle = (_PICTURE_INCHES / 2, HEADER + 0.14, HEADER + 0.28)
    for column, lines in enumerate(_HEADINGS):
        for line, top in zip(lines if lines[1] else reversed(lines), middle[1:], strict=True):
            write(figure, left + column * cell + middle[0], top, line, size=SMALL_SIZE, color=MUTED, ha="center")
    if per_class:
        write(figure, left + len(_HEADINGS) * cell, middle[2], "others", size=SMALL_SIZE, color=MUTED)


def _draw_picture(axes: Axes, picture: Image, *, column: int, row: int) -> None:
    """Draw a picture into its cell."""
    side = _PICTURE_INCHES / (_PICTURE_INCHES + _GAP_INCHES)
    extent = (column, column + side, row + side, row)
    axes.imshow(picture, extent=extent, aspect="auto", interpolation="bilinear", clip_on=False)


def _draw_histogram(axes: Axes, values: npt.NDArray[np.float64], unit: Callable[[float], str]) -> None:
    """Draw a histogram whose axes say the unit."""
    if not len(values):
        hide_axes(axes)
        return
    low, high = values.min(), values.max()
    is_log = low > 0 and high > _LOG_SPAN * low
    edges = _choose_edges(low, high, is_log=is_log)
    counts, _ = np.histogram(values, edges)
    axes.stairs(counts, edges, fill=True, color=ACCENT)
    axes.set(xscale="log" if is_log else "linear", ylim=(0, 1.05 * counts.max()))
    ticks = _choose_ticks(axes, low, high, is_log=is_log)
    # Ticks closer together than the numbers are written exactly would carry the same number.
    axes.set_xticks(list({unit(tick): tick for tick in reversed(ticks)}.values()))
    axes.xaxis.set_major_formatter(lambda value, _: unit(value))
    axes.minorticks_off()
    axes.locator_params(axis="y", nbins=4, integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=HAIRLINE, linewidth=0.6)


def _choose_edges(low: float, high: float, *, is_log: bool) -> npt.NDArray[np.float64]:
    """Choose the edges of bins, at least one unit wide."""
    if is_log:
        return np.geomspace(low, high * (1 + 1e-9), _N_BINS + 1)
    step = max(1.0, math.ceil((high - low + 1) / _N_BINS))
    return np.arange(low - 0.5, high + step, step)


def _choose_ticks(axes: Axes, low: float, high: float, *, is_log: bool) -> list[float]:
    """Choose a few round numbers."""
    if low == high:
        axes.set_xlim(low - 8, low + 8)
        return [low]
    if not is_log:
        from matplotlib.ticker import MaxNLocator

        return [float(tick) for tick in MaxNLocator(4, integer=True).tick_values(low, high) if low <= tick <= high]
    decades = math.log10(high / low)
    factors = (1,) if decades > 3 else (1, 3) if decades > 2 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for factor in factors if low <= (tick := factor * 10.0**power) <= high]


def _describe_bytes(n_bytes: npt.NDArray[np.float64]) -> str:
    """Say the range of file sizes."""
    if not len(n_bytes):
        return "unknown"
    low, middle, high = (_format_bytes(float(np.quantile(n_bytes, share))) for share in (0, 0.5, 1))
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


def _format_bytes(value: float) -> str:
    """Write bytes with a unit of powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _format_px(value: float) -> str:
    """Write pixels."""
    return f"{value:,.0f} px"
