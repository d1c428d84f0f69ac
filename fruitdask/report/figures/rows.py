"""Figures with a row for each class: counts, differences, silhouettes, colours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.report.figures.canvas import (
    ACCENT,
    ALARM,
    FAINT,
    HAIRLINE,
    HEADER,
    INK,
    MARGIN,
    MUTED,
    SMALL_SIZE,
    add_axes,
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

#: Rows in a column of classes before they go on in another, and columns at most.
_ROWS_PER_COLUMN, _MAX_COLUMNS = 36, 3
#: Rows at most: beyond, a figure is too long for any page or printer.
_MAX_ROWS = 300
#: Width of the part with the data, in inches, by number of columns.
_PLOT_INCHES = {1: 4.0, 2: 2.2, 3: 1.35}
_AXIS_INCHES = 0.5
_NO_CLASSES = "There are no classes to show."


@dataclass(frozen=True, eq=False)
class _Column:
    """Axes whose rows, counted from the top, are the classes `start` to `stop`."""

    axes: Axes
    start: int
    stop: int

    @property
    def y(self) -> npt.NDArray[np.int_]:
        """Where the rows are."""
        return np.arange(self.stop - self.start)

    def of(self, values: Any) -> npt.NDArray[Any]:
        """Take the values of this column's classes."""
        return np.asarray(values)[self.start : self.stop]


@standard_settings()
def plot_class_counts(classes: pd.DataFrame) -> Figure:
    """Plot how many images each class has."""
    title = "Images per class"
    if classes.empty:
        return plot_nothing(title, _NO_CLASSES)
    ordered, left_out = _order(classes, "n_images")
    counts, ok = ordered["n_images"].to_numpy(float), ordered["n_ok"].to_numpy(float)
    note = f"{classes['n_images'].sum():,} images in {len(classes):,} {'class' if len(classes) == 1 else 'classes'}"
    if n_failed := int((classes["n_images"] - classes["n_ok"]).sum()):
        note += f"; orange: {n_failed:,} that could not be read"
    numbers = [f"{count:,.0f}" for count in counts]
    figure, columns, size = _start_rows(
        ordered.index, title=title, note=note + left_out, right=measure_width(numbers, size=SMALL_SIZE) + 0.06
    )
    for column in columns:
        axes, y, n, n_ok = column.axes, column.y, column.of(counts), column.of(ok)
        axes.barh(y, n_ok, height=0.68, color=ACCENT)
        axes.barh(y, n - n_ok, left=n_ok, height=0.68, color=ALARM)
        axes.set(xlim=(0, max(counts.max(), 1)), xticks=[])
        axes.spines["bottom"].set_visible(False)
        for row, value, text in zip(y, n, column.of(numbers), strict=True):
            _write_beside(axes, value, row, text, size=size)
    return figure


@standard_settings()
def plot_differences(classes: pd.DataFrame) -> Figure:
    """Plot how much the images of each class differ from each other."""
    title = "Differences between images of a class"
    if classes["mean_squared_difference"].isna().all():
        return plot_nothing(title, "No class has two images that could be read.")
    ordered, left_out = _order(classes, "mean_squared_difference")
    mean, error, low, high = (
        ordered[name].to_numpy(float) for name in ("mean_squared_difference", "standard_error", "pair_q05", "pair_q95")
    )
    note = "Dot: mean over all pairs of images, with its standard error. Bar: 5 % to 95 % of a sample of pairs."
    figure, columns, size = _start_rows(
        ordered.index, title=title, note=note + left_out, axis_label="mean squared difference"
    )
    limit = 1.03 * max(_find_largest(high, mean + np.nan_to_num(error)), 1e-9)
    for column in columns:
        axes, y = column.axes, column.y
        axes.barh(y, column.of(high - low), left=column.of(low), height=0.5, color=ACCENT, alpha=0.38)
        axes.errorbar(
            column.of(mean), y, xerr=column.of(error), fmt="o", markersize=4, color=ACCENT, ecolor=INK, elinewidth=0.9
        )
        axes.set_xlim(0, limit)
        _mark_missing(column, mean, x=0.0, size=size)
    return figure


@standard_settings()
def plot_silhouettes(silhouette: Mapping[str, Any]) -> Figure:
    """Plot how well each class keeps apart from the others."""
    title = "Silhouette of each class"
    by_class = pd.DataFrame({"value": pd.Series(dict(silhouette["by_class"]), dtype=float)})
    if by_class.empty:
        return plot_nothing(title, _NO_CLASSES)
    ordered, left_out = _order(by_class, "value")
    values = ordered["value"].to_numpy()
    mean = silhouette.get("mean")
    note = "" if mean is None else f"Mean of all images {_format_signed(mean)}. "
    note += "1: far from other classes; 0: between two; below 0: nearer to another."
    figure, columns, size = _start_rows(
        ordered.index, title=title, note=note + left_out, right=measure_width(["−0.00"], size=SMALL_SIZE) + 0.1
    )
    limits = min(0.0, float(np.nanmin([*values, 0]))), max(_find_largest(values), 0.05)
    for column in columns:
        axes, y, of_column = column.axes, column.y, column.of(values)
        axes.barh(y, of_column, height=0.68, color=[ALARM if value < 0 else ACCENT for value in of_column])
        axes.axvline(0, color=FAINT, linewidth=0.6)
        axes.set(xlim=limits, xticks=[])
        axes.spines[:].set_visible(False)
        for row, value in zip(y, of_column, strict=True):
            _write_beside(axes, np.nanmax([value, 0.0]), row, _format_signed(value), size=size)
    return figure


@standard_settings()
def plot_colours(classes: pd.DataFrame) -> Figure:
    """Plot the most frequent colours of each class."""
    title = "Most frequent colours"
    if classes.empty:
        return plot_nothing(title, _NO_CLASSES)
    shown = classes.iloc[:_MAX_ROWS]
    left_out = _describe_left_out(len(classes))
    palettes = [_parse_palette(text) for text in shown["palette"]]
    note = "A colour is as wide as its share of all pixels of the class; the rest is left empty."
    figure, columns, size = _start_rows(shown.index, title=title, note=note + left_out)
    for column in columns:
        axes = column.axes
        for row, palette in zip(column.y, palettes[column.start : column.stop], strict=True):
            shares = np.array([share for _, share in palette])
            axes.barh(
                np.full(len(palette), row),
                shares,
                left=np.cumsum(shares) - shares,
                height=0.74,
                color=[colour for colour, _ in palette],
            )
        axes.barh(column.y, 1, height=0.74, fill=False, edgecolor=FAINT, linewidth=0.5, clip_on=False)
        axes.set(xlim=(0, 1), xticks=[])
        axes.spines[:].set_visible(False)
        _mark_missing(column, [1.0 if palette else np.nan for palette in palettes], x=0.01, size=size)
    return figure


def _order(classes: pd.DataFrame, by: str) -> tuple[pd.DataFrame, str]:
    """Sort classes, the largest value first and equal ones by name; keep what a figure holds and say what is left out."""
    ordered = classes.sort_index().sort_values(by, ascending=False, kind="stable", na_position="last")
    return ordered.iloc[:_MAX_ROWS], _describe_left_out(len(classes))


def _describe_left_out(n_classes: int) -> str:
    """Say how many of the classes are shown, where not all are."""
    return f" The first {_MAX_ROWS} of {n_classes:,} classes." if n_classes > _MAX_ROWS else ""


def _start_rows(
    labels: Iterable[str], *, title: str, note: str, right: float = 0.0, axis_label: str = ""
) -> tuple[Figure, list[_Column], float]:
    """Lay out rows of classes in one to three columns, with their names; the last is the size of type."""
    names = [str(label) for label in labels]
    n_columns = min(_MAX_COLUMNS, math.ceil(len(names) / _ROWS_PER_COLUMN))
    n_rows = math.ceil(len(names) / n_columns)
    names = [tidy_label(name, n_characters=34 if n_columns == 1 else 26) for name in names]
    size, row_inches = (9.0, 0.235) if len(names) <= 26 else (7.5, 0.165)
    starts = range(0, len(names), n_rows)
    label_inches = [measure_width(names[start : start + n_rows], size=size) + 0.1 for start in starts]
    plot_inches = _PLOT_INCHES[n_columns]
    if n_columns == 1:
        plot_inches = max(plot_inches, 6.3 - label_inches[0] - right - 2 * MARGIN)
    gap, bottom = 0.2, _AXIS_INCHES if axis_label else MARGIN
    width = 2 * MARGIN + sum(label_inches) + len(starts) * (plot_inches + right + gap) - gap
    figure = start_figure(width, HEADER + n_rows * row_inches + bottom, title=title, note=note)
    columns, left = [], MARGIN
    for start, inches in zip(starts, label_inches, strict=True):
        stop = min(start + n_rows, len(names))
        axes = add_axes(figure, left + inches, HEADER, plot_inches, n_rows * row_inches)
        axes.set_ylim(n_rows - 0.5, -0.5)
        axes.set_yticks(range(stop - start), names[start:stop], size=size, color=INK, parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        if axis_label:
            axes.set_xlabel(axis_label, size=SMALL_SIZE, color=MUTED)
            axes.locator_params(axis="x", nbins=8 if n_columns == 1 else 4)
            axes.grid(axis="x", color=HAIRLINE, linewidth=0.6)
        columns.append(_Column(axes, start, stop))
        left += inches + plot_inches + right + gap
    return figure, columns, size


def _write_beside(axes: Axes, x: float, row: int, text: str, *, size: float) -> None:
    """Write a number to the right of a bar's end."""
    axes.annotate(
        text,
        (x, row),
        xytext=(3, 0),
        textcoords="offset points",
        va="center_baseline",
        size=min(size, SMALL_SIZE),
        color=MUTED,
        parse_math=False,
        annotation_clip=False,
    )


def _mark_missing(column: _Column, values: Sequence[float] | npt.NDArray[Any], *, x: float, size: float) -> None:
    """Write a dash in rows without a value."""
    for row, value in zip(column.y, column.of(values), strict=True):
        if np.isnan(value):
            write(column.axes, x, row, "–", size=size, color=MUTED, va="center_baseline")


def _find_largest(*values: npt.NDArray[np.floating[Any]]) -> float:
    """Find the largest number; 0 where there is none above."""
    return float(np.nanmax(np.concatenate([*values, [0.0]])))


def _format_signed(value: float) -> str:
    """Write a number with two decimals and a real minus; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.2f}".replace("-", "−")


def _parse_palette(text: str) -> list[tuple[str, float]]:
    """Read "#f0f0f0 0.712, #b03020 0.103"; a colour that happens to be the ink's is moved off it by one step."""
    found = re.findall(r"(#[0-9a-fA-F]{6}) ([0-9.]+)", text)
    return [(colour.lower().replace(INK, "#1b1d22"), float(share)) for colour, share in found]
