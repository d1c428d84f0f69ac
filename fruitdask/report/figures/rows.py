"""Figures with one row per class: counts, differences, silhouettes, colours."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fruitdask.report.figures.canvas import fit_figure, name_rows, plot_nothing, standard_settings, start_figure
from fruitdask.report.figures.styles import ACCENT, ALARM, FAINT, INK, MUTED, TEXT_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

#: Rows per column of classes, and maximum number of columns.
_ROWS_PER_COLUMN, _MAX_COLUMNS = 36, 3
#: Maximum number of rows of a figure.
_MAX_ROWS = 300
#: Number of rows that are spaced widely; inches per row and type size, spaced widely and closely.
_MAX_WIDE, _WIDE, _CLOSE = 26, (0.235, TEXT_SIZE), (0.165, 7.5)
#: Total width of the columns in inches, without names and numbers, by number of columns.
_PLOT_INCHES = {1: 4.2, 2: 4.4, 3: 4.5}
_NO_CLASSES = "There are no classes to show."
_DASH = "–"


@standard_settings()
def plot_class_counts(classes: pd.DataFrame) -> Figure:
    """Plot how many images each class has."""
    title, largest = "Images per class", classes["n_images"].max()
    if classes.empty:
        return plot_nothing(title, _NO_CLASSES)
    note = f"{classes['n_images'].sum():,} images in {len(classes):,} {'class' if len(classes) == 1 else 'classes'}"
    if n_failed := int((classes["n_images"] - classes["n_ok"]).sum()):
        note += f"; orange: {n_failed:,} that could not be read"

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        n_failed = rows["n_images"] - rows["n_ok"]
        axes.barh(range(len(rows)), rows["n_ok"], height=0.68, color=ACCENT)
        bars = axes.barh(range(len(rows)), n_failed, left=rows["n_ok"], height=0.68, color=ALARM)
        _write_values(axes, bars, [f"{n:,}" for n in rows["n_images"]])
        axes.set_xlim(0, max(largest, 1))

    return _plot_rows(classes, draw, by="n_images", title=title, note=note)


@standard_settings()
def plot_differences(classes: pd.DataFrame) -> Figure:
    """Plot how much the images of each class differ from each other."""
    title, mean = "Differences between images of a class", "mean_squared_difference"
    if classes[mean].isna().all():
        return plot_nothing(title, "No class has two images that could be read.")
    limit = np.nanmax([classes["pair_q95"], classes[mean] + classes["standard_error"].fillna(0)])

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        y, low = np.arange(len(rows)), rows["pair_q05"]
        axes.barh(y, rows["pair_q95"] - low, left=low, height=0.5, color=ACCENT, alpha=0.38)
        whiskers: dict[str, Any] = {"ecolor": INK, "elinewidth": 0.9}
        axes.errorbar(rows[mean], y, xerr=rows["standard_error"], fmt="o", markersize=4, color=ACCENT, **whiskers)
        axes.set_xlim(0, max(1.03 * limit, 1e-9))
        _mark_missing(axes, rows[mean].isna())

    note = "Dot: mean over all pairs of images, with its standard error. Bar: 5 % to 95 % of a sample of pairs."
    return _plot_rows(classes, draw, by=mean, title=title, note=note, axis_label="mean squared difference")


@standard_settings()
def plot_silhouettes(silhouette: Mapping[str, Any]) -> Figure:
    """Plot how well each class is separated from the others."""
    title, mean = "Silhouette of each class", silhouette.get("mean")
    classes = pd.DataFrame({"value": pd.Series(dict(silhouette["by_class"]), dtype=float)})
    if classes.empty:
        return plot_nothing(title, _NO_CLASSES)
    limits = np.nanmin([*classes["value"], 0.0]), np.nanmax([*classes["value"], 0.05])

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        values = rows["value"].fillna(0)
        axes.barh(range(len(rows)), values.clip(upper=0), height=0.68, color=ALARM)
        bars = axes.barh(range(len(rows)), values.clip(lower=0), height=0.68, color=ACCENT)
        _write_values(axes, bars, [_format_signed(value) for value in rows["value"]])
        axes.axvline(0, color=FAINT, linewidth=0.6)
        axes.set_xlim(*limits)

    note = "" if mean is None else f"Mean of all images {_format_signed(mean)}. "
    note += "1: far from other classes; 0: between two; below 0: nearer to another."
    return _plot_rows(classes, draw, by="value", title=title, note=note)


@standard_settings()
def plot_colours(classes: pd.DataFrame) -> Figure:
    """Plot the most frequent colours of each class."""
    title = "Most frequent colours"
    if classes.empty:
        return plot_nothing(title, _NO_CLASSES)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        for row, palette in enumerate(map(_parse_palette, rows["palette"])):
            shares = np.array([share for _, share in palette])
            colours = [colour for colour, _ in palette]
            axes.barh([row] * len(shares), shares, left=np.cumsum(shares) - shares, height=0.74, color=colours)
        axes.barh(range(len(rows)), 1, height=0.74, fill=False, edgecolor=FAINT, linewidth=0.5, clip_on=False)
        axes.set_xlim(0, 1)
        _mark_missing(axes, rows["palette"] == "")

    note = "Width of a colour: its share of the pixels of the class without the background. Blank: rarer colours."
    return _plot_rows(classes, draw, by=None, title=title, note=note)


def _plot_rows(
    classes: pd.DataFrame,
    draw: Callable[[Axes, pd.DataFrame], None],
    *,
    by: str | None,
    title: str,
    note: str,
    axis_label: str = "",
) -> Figure:
    """Draw one row per class in one to three columns, in the order of all tables: by name.

    Of very many classes, those with the largest values are shown.
    """
    ordered = classes.sort_index()
    largest = ordered if by is None else ordered.sort_values(by, ascending=False, kind="stable", na_position="last")
    shown = largest.iloc[:_MAX_ROWS].sort_index()
    if len(shown) < len(classes):
        which = "first" if by is None else "largest"
        note += f" The {which} {_MAX_ROWS} of {len(classes):,} classes."
    n_columns = min(_MAX_COLUMNS, math.ceil(len(shown) / _ROWS_PER_COLUMN))
    n_rows = math.ceil(len(shown) / n_columns)
    row_inches, size = _WIDE if len(shown) <= _MAX_WIDE else _CLOSE
    figure = start_figure(title, note)
    for number, axes in enumerate(figure.subplots(1, n_columns, squeeze=False)[0]):
        rows = shown.iloc[number * n_rows : (number + 1) * n_rows]
        draw(axes, rows)
        names = name_rows(rows.index, n_characters=34 if n_columns == 1 else 26)
        axes.set_yticks(range(len(rows)), names, size=size, color=INK)
        axes.set_ylim(n_rows - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        if axis_label:
            axes.set_xlabel(axis_label)
            axes.locator_params(axis="x", nbins=8 if n_columns == 1 else 4)
            axes.grid(axis="x")
        else:
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
    return fit_figure(figure, width=_PLOT_INCHES[n_columns], height=n_rows * row_inches)


def _write_values(axes: Axes, bars: BarContainer, texts: Sequence[str]) -> None:
    """Write numbers next to bars."""
    axes.bar_label(bars, texts, padding=3, size=7.5, color=MUTED)


def _mark_missing(axes: Axes, is_missing: pd.Series) -> None:
    """Write a dash in rows without a value."""
    for row in np.flatnonzero(is_missing):
        axes.annotate(_DASH, (0, row), (3, 0), textcoords="offset points", va="center_baseline", color=MUTED)


def _format_signed(value: float) -> str:
    """Write a number with two decimals and a real minus; a dash if there is none."""
    return _DASH if math.isnan(value) else f"{value:.2f}".replace("-", "−")


def _parse_palette(text: str) -> list[tuple[str, float]]:
    """Read "#f0f0f0 0.712, #b03020 0.103"; a colour equal to that of the text is changed by one step."""
    found = re.findall(r"(#[0-9a-fA-F]{6}) ([0-9.]+)", text)
    return [(colour.lower().replace(INK, "#1b1d22"), float(share)) for colour, share in found]
