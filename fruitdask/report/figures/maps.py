"""Figures of the features: maps, explained variance, and the classes of nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.report.figures.canvas import (
    count_cells,
    fit_figure,
    name_rows,
    pad_label,
    plot_nothing,
    standard_settings,
    start_figure,
    tidy_label,
)
from fruitdask.report.figures.styles import (
    ACCENT,
    FAINT,
    INK,
    MARKERS,
    SMALL_SIZE,
    TEXT_SIZE,
    ClassStyle,
    style_classes,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAP_INCHES, _VARIANCE_INCHES = (6.4, 5.0), (3.9, 3.7)
_LEGEND_INCHES = 6.9
#: Maximum number of points that stay vectors in an SVG; more become an image.
_MAX_VECTOR_POINTS = 2_000
#: Maximum number of classes in a legend, and of those with large type.
_MAX_ENTRIES, _MAX_LARGE_ENTRIES = 300, 30
#: Axes have the same scale unless one is this many times as long as the other.
_MAX_ASPECT = 3.0
#: Number of components from which their axis is logarithmic.
_MAX_LINEAR = 30
#: Scale factors of slender shapes, so that they look as large as the others.
_FACTORS = {"star": 1.3, "square_pin": 1.3, "diamond": 1.14, "hex": 1.1, "plus": 1.1, "square": 0.92}
#: Maximum number of cells of a heat map with numbers; larger ones have a legend of these shares.
_MAX_NUMBERED, _SHARES = 26, (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


@standard_settings()
def plot_map(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    title: str,
    x_label: str | None = None,
    y_label: str | None = None,
    n_hidden: int = 0,
) -> Figure:
    """
    Plot images as points, coloured by class.

    Parameters
    ----------
    table : pandas.DataFrame
        The results table; ``label`` and the columns below are used.
    x, y : str
        Columns of the coordinates; rows without them are left out.
    title : str
        What the figure is about.
    x_label, y_label : str, optional
        Names of the axes; by default "Principal component 1" for ``pca_1``, and so on.
    n_hidden : int
        Number of images that the table lacks because there are too many to draw.

    Returns
    -------
    matplotlib.figure.Figure
        The map, with all classes beneath it. Its size does not depend on their number. Classes are drawn in turns, so
        that none hides another, and small ones above large ones.
    """
    labels = [str(label) for label in sorted(table["label"].unique())]
    points = table[["label", x, y]][np.isfinite(table[[x, y]].to_numpy(float)).all(axis=1)]
    if points.empty:
        return plot_nothing(title, "No image has coordinates.")
    present = {str(label) for label in points["label"].unique()}
    styles = {label: style for label, style in style_classes(labels).items() if label in present}
    n_without = len(table) - len(points)
    said = f"{len(points):,} of {len(table) + n_hidden:,} images" if n_hidden else f"{len(points):,} images"
    said += f"; {n_without:,} without coordinates" if n_without and not n_hidden else ""
    figure = start_figure(title, said)
    axes = figure.subplots()
    _draw_points(axes, points, x=x, y=y, styles=styles)
    spans = np.ptp([axes.get_xlim(), axes.get_ylim()], axis=1)
    axes.set_xlabel(tidy_label(x_label or _name_axis(x), n_characters=58))
    axes.set_ylabel(tidy_label(y_label or _name_axis(y), n_characters=44))
    axes.locator_params(nbins=6)
    if x.startswith("tsne_"):
        # Coordinates of t-SNE have no meaning.
        axes.set(xticks=[], yticks=[])
    _add_class_legend(figure, styles)
    fit_figure(figure, width=_MAP_INCHES[0], height=_MAP_INCHES[1])
    if spans.max() <= _MAX_ASPECT * spans.min():
        axes.set_aspect("equal", adjustable="datalim")
    return figure


@standard_settings()
def plot_explained_variance(
    ratio: Sequence[float] | npt.NDArray[np.floating[Any]], n_components: Mapping[str, int | None]
) -> Figure:
    """Plot the cumulative explained variance.

    `ratio` is the fraction (0 to 1) of each component, the largest first.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter, StrMethodFormatter

    title = "Explained variance"
    shares = np.asarray(ratio, float)
    explained = np.cumsum(shares[np.isfinite(shares)])
    n = len(explained)
    if not n:
        return plot_nothing(title, "No components were computed.")
    figure = start_figure(title, "Fraction of the features' variance that the first components hold together")
    axes = figure.subplots()
    first = 1 if n > _MAX_LINEAR else 0
    axes.step([first, *range(1, n + 1)], [0, *explained], where="post", color=ACCENT, linewidth=1.6, clip_on=False)
    axes.set(ylim=(0, 1), xlim=(first, n), xscale="log" if first else "linear")
    axes.set_xlabel("number of components" + (" (logarithmic)" if first else ""))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if first else MaxNLocator(10, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    known = {float(share): found for share, found in n_components.items() if found is not None}
    axes.hlines(list(known), list(known.values()), n, color=FAINT, linewidth=0.6)
    axes.plot(list(known.values()), list(known), marker="o", markersize=4, linestyle="", color=ACCENT, clip_on=False)
    right = axes.secondary_yaxis("right")
    right.spines["right"].set_visible(False)
    right.tick_params(labelcolor=INK)
    right.set_yticks(list(map(float, n_components)), [_describe_components(*item) for item in n_components.items()])
    return fit_figure(figure, width=_VARIANCE_INCHES[0], height=_VARIANCE_INCHES[1])


@standard_settings()
def plot_confusion(
    labels: Sequence[str],
    share: Sequence[Sequence[float]] | npt.NDArray[np.floating[Any]],
    *,
    title: str = "Classes of nearest neighbours",
    columns: str = "classes of its nearest neighbours",
    n_classes: int = 0,
) -> Figure:
    """Plot which classes the nearest neighbours of each class's images belong to, or what else `columns` names.

    `share` holds fractions (0 to 1): the class of an image in rows, those of its neighbours in columns. `n_classes` is
    the number of all classes, if only those that are confused most are shown.
    """
    n = len(labels)
    if not n:
        return plot_nothing(title, "There are no classes to show.")
    shares = np.asarray(share, float).reshape(n, n)
    is_numbered = n <= _MAX_NUMBERED
    cell, size = (0.5, TEXT_SIZE) if n <= 8 else (0.3, SMALL_SIZE) if is_numbered else (max(0.08, 6 / n), 5.0)
    cell = min(cell, 26 / n)
    note = f"Row: class of an image. Column: {columns}" + (", in %." if is_numbered else ".")
    note += f" The {n} classes that are confused most, of {n_classes:,}." if n_classes > n else ""
    figure = start_figure(title, note)
    axes = figure.subplots()
    # An image of 300 classes would take 1.8 GB to enlarge.
    edges = np.arange(n + 1) - 0.5
    axes.pcolormesh(edges, edges, _shade(shares), rasterized=True)
    axes.invert_yaxis()
    axes.spines[:].set_visible(True)
    step = math.ceil(size * 1.02 / (72 * cell))
    names = name_rows(labels, n_characters=26)
    for axis, rotation in ((axes.xaxis, 90), (axes.yaxis, 0)):
        # Anchored at their ends: in a page's font a name is not as long as in matplotlib's.
        anchor: dict[str, Any] = {"rotation": rotation, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        axis.set_ticks(range(0, n, step), names[::step], size=size, color=INK, **anchor)
        axis.set_tick_params(length=0)
    if is_numbered:
        _write_shares(axes, shares, size=size)
    else:
        _add_share_legend(figure)
    fit_figure(figure, width=n * cell, height=n * cell)
    axes.set_aspect("equal", anchor="NW")
    return figure


def _draw_points(axes: Axes, points: pd.DataFrame, *, x: str, y: str, styles: Mapping[str, ClassStyle]) -> None:
    """Draw the classes, the largest first."""
    n_points = len(points)
    look: dict[str, Any] = {
        "alpha": float(np.clip(0.85 * (2000 / n_points) ** 0.2, 0.4, 0.85)),
        "rasterized": n_points > _MAX_VECTOR_POINTS,
    }
    side = float(np.clip(6 * (400 / n_points) ** 0.25, 1.7, 6))
    n_turns = 1 if n_points <= _MAX_VECTOR_POINTS else 8
    # A plot per style, not per class: with thousands of classes, styles repeat, and each plot takes milliseconds.
    places: dict[ClassStyle, list[npt.NDArray[np.float64]]] = {}
    for label, group in points.groupby("label", observed=True):
        places.setdefault(styles[str(label)], []).append(group[[x, y]].to_numpy(float))
    series = sorted(((style, np.concatenate(parts)) for style, parts in places.items()), key=lambda one: -len(one[1]))
    for turn in range(n_turns):
        for style, place in series:
            if len(place := place[turn::n_turns]):
                axes.plot(*place.T, **look, **_translate_style(style, side))


def _translate_style(style: ClassStyle, side: float) -> dict[str, Any]:
    """Return a style as arguments of matplotlib; `side` is the size of a marker in points."""
    fill = {"markerfacecolor": style.colour, "markeredgewidth": 0}
    outline = {"markerfacecolor": "none", "markeredgecolor": style.colour, "markeredgewidth": 0.14 * side}
    shape = {"linestyle": "", "marker": MARKERS[style.marker], "markersize": side * _FACTORS.get(style.marker, 1.0)}
    return shape | (fill if style.is_filled else outline)


def _add_class_legend(figure: Figure, styles: Mapping[str, ClassStyle]) -> None:
    """Add a legend of classes below a map, in as many columns as fit."""
    from matplotlib.lines import Line2D

    size, n_characters = (TEXT_SIZE, 30) if len(styles) <= _MAX_LARGE_ENTRIES else (7.0, 24)
    names = [tidy_label(label, n_characters=n_characters) for label in styles]
    handles: list[Artist] = [Line2D([], [], **_translate_style(style, 0.77 * size)) for style in styles.values()]
    if n_more := max(0, len(names) - _MAX_ENTRIES):
        names[_MAX_ENTRIES - 1 :] = [f"… and {n_more + 1:,} more"]
        handles[_MAX_ENTRIES - 1 :] = [Line2D([], [], linestyle="")]
    # A letter takes about 0.55 of its size, and a marker about four letters.
    n_columns = int(72 * _LEGEND_INCHES / (0.55 * size * (max(map(count_cells, names)) + 4)))
    _add_legend(figure, handles, names, n_columns=min(max(n_columns, 1), 8), size=size)


def _add_legend(figure: Figure, handles: list[Artist], names: list[str], *, n_columns: int, size: float) -> None:
    """Add a legend at the bottom of a figure."""
    texts = [name + pad_label(name) for name in names]
    figure.legend(handles, texts, loc="outside lower left", ncols=n_columns, fontsize=size, labelspacing=0.3)


def _name_axis(column: str) -> str:
    """Return the label of a column."""
    kind, _, number = column.rpartition("_")
    return {"pca": f"Principal component {number}", "tsne": f"t-SNE {number}"}.get(kind, column)


def _describe_components(share: str, n: int | None) -> str:
    """Describe how many components explain a share of the variance."""
    found = "more than were computed" if n is None else f"{n:,} component{'' if n == 1 else 's'}"
    return f"{float(share) * 100:g} %: {found}"


def _shade(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Convert shares to colours with opacity; NaN is transparent."""
    from matplotlib.colors import to_rgb

    opacity = np.sqrt(np.clip(np.nan_to_num(shares), 0, 1))
    return np.dstack([np.broadcast_to(to_rgb(ACCENT), (*shares.shape, 3)), opacity])


def _write_shares(axes: Axes, shares: npt.NDArray[np.float64], *, size: float) -> None:
    """Write shares of at least half a percent into their cells, in white on dark blue; 100 only where it is all."""
    for (row, column), value in np.ndenumerate(np.nan_to_num(shares)):
        if value >= 0.005:
            colour = "#ffffff" if value > 0.7 else INK
            shown = 1.0 if np.isclose(value, 1, rtol=0, atol=1e-9) else min(value, 0.99)
            axes.text(column, row, f"{100 * shown:.0f}", size=size, color=colour, ha="center", va="center_baseline")


def _add_share_legend(figure: Figure) -> None:
    """Add a legend of the shades of a heat map."""
    from matplotlib.patches import Patch

    look: dict[str, Any] = {"edgecolor": FAINT, "linewidth": 0.5}
    swatches: list[Artist] = [Patch(facecolor=(ACCENT, math.sqrt(share)), **look) for share in _SHARES]
    names = [f"{share:.0%}".replace("%", " %") for share in _SHARES]
    _add_legend(figure, swatches, names, n_columns=len(names), size=SMALL_SIZE)
