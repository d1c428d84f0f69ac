"""Figures of the features: the map of all images, what its axes explain, and whose neighbours are whose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.report.figures.canvas import (
    ACCENT,
    FAINT,
    HAIRLINE,
    HEADER,
    INK,
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
from fruitdask.report.figures.styles import MARKERS, ClassStyle, style_classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAP_INCHES = (6.4, 5.0)
#: Points up to which a map stays a drawing in an SVG; more become an image in it.
_MAX_VECTOR_POINTS = 2_000
#: Classes in a legend at most.
_MAX_ENTRIES = 300
#: Axes are drawn to the same scale unless one is so many times as long as the other.
_MAX_ASPECT = 3.0
#: Components from which on their axis is logarithmic.
_MAX_LINEAR = 30
#: Slender shapes are drawn larger, to look as large as the others.
_AREAS = {"star": 1.7, "square_pin": 1.7, "diamond": 1.3, "hex": 1.2, "plus": 1.2, "square": 0.85}
#: Cells up to which a heat map holds numbers.
_MAX_NUMBERED = 26


@dataclass(frozen=True)
class _Legend:
    """Names of classes in columns, as many as the width holds, read downwards."""

    names: list[str]
    size: float
    row_inches: float
    n_rows: int
    column_inches: list[float]

    @classmethod
    def arrange(cls, labels: Sequence[str], *, width: float) -> _Legend:
        """Choose the size of type and the number of columns."""
        is_short = len(labels) <= 30
        names = [tidy_label(label, n_characters=30 if is_short else 24) for label in labels[:_MAX_ENTRIES]]
        if len(labels) > _MAX_ENTRIES:
            names[-1] = f"… and {len(labels) - _MAX_ENTRIES + 1:,} more"
        size, row_inches = (TEXT_SIZE, 0.21) if is_short else (7.0, 0.155)
        inches = [measure_width([name], size=size) + 0.34 for name in names]
        for n_columns in range(min(len(names), 8), 0, -1):
            n_rows = math.ceil(len(names) / n_columns)
            columns = [max(inches[start : start + n_rows]) for start in range(0, len(names), n_rows)]
            if sum(columns) <= width:
                break
        return cls(names, size, row_inches, n_rows, columns)

    @property
    def height(self) -> float:
        """Its height in inches."""
        return self.n_rows * self.row_inches

    def draw(self, figure: Figure, left: float, top: float, styles: Sequence[ClassStyle]) -> None:
        """Draw a marker and a name for each class."""
        width = sum(self.column_inches)
        axes = add_axes(figure, left, top, width, self.height)
        hide_axes(axes)
        axes.set(xlim=(0, width), ylim=(self.n_rows, 0), label="legend")
        lefts = np.cumsum([0.0, *self.column_inches])
        for number, (name, style) in enumerate(zip(self.names, styles, strict=False)):
            column, row = divmod(number, self.n_rows)
            x, y = float(lefts[column]), row + 0.5
            if not name.startswith("… and"):
                axes.scatter([x + 0.07], [y], clip_on=False, **_translate_style(style, 0.6 * self.size**2))
            write(axes, x + 0.18, y, name, size=self.size, va="center_baseline")


@standard_settings()
def plot_map(
    table: pd.DataFrame, *, x: str, y: str, title: str, x_label: str | None = None, y_label: str | None = None
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

    Returns
    -------
    matplotlib.figure.Figure
        The map, with all classes beneath it; the map is as large whatever their number. Classes are drawn in turns, so that none is
        hidden by those after it, and small ones above large ones.
    """
    labels = [str(label) for label in sorted(table["label"].unique())]
    points = table[["label", x, y]][np.isfinite(table[[x, y]].to_numpy(float)).all(axis=1)]
    if points.empty:
        return plot_nothing(title, "No image has a position.")
    present = set(points["label"].unique())
    styles = {label: style for label, style in style_classes(labels).items() if label in present}
    width, height = _MAP_INCHES
    left, bottom = MARGIN + 0.45, 0.5
    legend = _Legend.arrange(list(styles), width=left + width)
    note = f"{len(points):,} images" + (f"; {n:,} without a position" if (n := len(table) - len(points)) else "")
    figure = start_figure(
        left + width + MARGIN, HEADER + height + bottom + legend.height + MARGIN, title=title, note=note
    )
    axes = add_axes(figure, left, HEADER, width, height)
    _draw_points(axes, points, x=x, y=y, styles=styles)
    _label_map(axes, x_label or _name_axis(x), y_label or _name_axis(y), is_plain=x.startswith("tsne_"))
    legend.draw(figure, MARGIN, HEADER + height + bottom, list(styles.values()))
    return figure


@standard_settings()
def plot_explained_variance(
    ratio: Sequence[float] | npt.NDArray[np.floating[Any]], n_components: Mapping[str, int | None]
) -> Figure:
    """Plot how much of the features' variance the first components explain together.

    ratio: Sequence[float] or numpy.ndarray, fraction (0 to 1) of each component, the largest first.
    """
    title = "Explained variance"
    shares = np.asarray(ratio, float)
    explained = np.cumsum(shares[np.isfinite(shares)])
    if not len(explained):
        return plot_nothing(title, "No component is known.")
    texts = {float(share): _describe_components(float(share), n) for share, n in n_components.items()}
    right = measure_width(texts.values(), size=SMALL_SIZE) + 0.2
    width, height, left = 3.9, 2.7, MARGIN + 0.45
    figure = start_figure(
        left + width + right + MARGIN,
        HEADER + height + 0.55,
        title=title,
        note="Fraction of the features' variance that the first components hold together",
    )
    axes = add_axes(figure, left, HEADER, width, height)
    is_log = len(explained) > _MAX_LINEAR
    first = 1 if is_log else 0
    axes.step(
        [first, *range(1, len(explained) + 1)],
        [0.0, *explained],
        where="post",
        color=ACCENT,
        linewidth=1.6,
        clip_on=False,
    )
    axes.set(ylim=(0, 1), xlim=(first, len(explained)), xscale="log" if is_log else "linear")
    axes.set_xticks(ticks := _choose_ticks(len(explained)), [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(np.linspace(0, 1, 6), [f"{share:.0%}".replace("%", " %") for share in np.linspace(0, 1, 6)])
    axes.set_xlabel("number of components" + (" (logarithmic)" if is_log else ""), size=SMALL_SIZE, color=MUTED)
    _mark_shares(axes, texts, n_components, line=0.16 / height)
    return figure


@standard_settings()
def plot_confusion(labels: Sequence[str], share: Sequence[Sequence[float]] | npt.NDArray[np.floating[Any]]) -> Figure:
    """Plot which classes the nearest neighbours of each class's images belong to.

    share: Sequence[Sequence[float]] or numpy.ndarray, fractions (0 to 1): the image's class in rows, its neighbours' in
    columns.
    """
    title = "Classes of nearest neighbours"
    shares = np.asarray(share, float).reshape(len(labels), len(labels))
    if not len(labels):
        return plot_nothing(title, "There are no classes to show.")
    n = len(labels)
    names = [tidy_label(label, n_characters=26) for label in labels]
    cell, size = (0.5, TEXT_SIZE) if n <= 8 else (0.3, SMALL_SIZE) if n <= _MAX_NUMBERED else (max(0.08, 6 / n), 5.0)
    cell = min(cell, 26 / n)
    name_inches = measure_width(names, size=size) + 0.1
    side = n * cell
    note = "Row: class of an image. Column: classes of its nearest neighbours" + (
        ", in %." if n <= _MAX_NUMBERED else "."
    )
    scale_inches = 0.0 if n <= _MAX_NUMBERED else 0.48
    figure = start_figure(
        name_inches + side + 2 * MARGIN, HEADER + scale_inches + side + name_inches + MARGIN, title=title, note=note
    )
    axes = add_axes(figure, MARGIN + name_inches, HEADER + scale_inches, side, side)
    axes.imshow(_shade(shares), interpolation="none", aspect="auto")
    axes.spines[:].set(visible=True, edgecolor=HAIRLINE)
    step = math.ceil(size * 1.02 / (72 * cell))
    for axis, rotation in ((axes.xaxis, 90), (axes.yaxis, 0)):
        # Anchored at their ends: in a page's font a name is not as long as in matplotlib's.
        anchor: dict[str, Any] = {"rotation": rotation, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        axis.set_ticks(range(0, n, step), names[::step], size=size, color=INK, parse_math=False, **anchor)
        axis.set_tick_params(length=0, pad=3)
    if n <= _MAX_NUMBERED:
        _write_shares(axes, shares, size=size)
    else:
        _draw_scale(figure, MARGIN + name_inches)
    return figure


def _draw_points(axes: Axes, points: pd.DataFrame, *, x: str, y: str, styles: Mapping[str, ClassStyle]) -> None:
    """Draw the classes in turns, the largest first."""
    n_points = len(points)
    area = float(np.clip(36 * math.sqrt(400 / n_points), 3.0, 36.0))
    alpha = float(np.clip(0.85 * (2000 / n_points) ** 0.2, 0.4, 0.85))
    n_turns = 1 if n_points <= _MAX_VECTOR_POINTS else 8
    places = {label: group[[x, y]].to_numpy(float) for label, group in points.groupby("label", observed=True)}
    order = sorted(places, key=lambda label: (-len(places[label]), label))
    for turn in range(n_turns):
        for label in order:
            if len(place := places[label][turn::n_turns]):
                axes.scatter(
                    *place.T,
                    alpha=alpha,
                    rasterized=n_points > _MAX_VECTOR_POINTS,
                    **_translate_style(styles[str(label)], area),
                )


def _translate_style(style: ClassStyle, area: float) -> dict[str, Any]:
    """Say a style in matplotlib's words; `area` is that of a circle's square, in square points."""
    fill = {"facecolors": style.colour, "edgecolors": "none"}
    outline = {"facecolors": "none", "edgecolors": style.colour, "linewidths": 0.14 * math.sqrt(area)}
    shape = {"marker": MARKERS[style.marker], "s": area * _AREAS.get(style.marker, 1.0)}
    return shape | (fill if style.is_filled else outline)


def _label_map(axes: Axes, x_label: str, y_label: str, *, is_plain: bool) -> None:
    """Name the axes, to the same scale where that leaves room for the points; t-SNE's numbers mean nothing."""
    spans = np.ptp([axes.get_xlim(), axes.get_ylim()], axis=1)
    if spans.max() <= _MAX_ASPECT * spans.min():
        axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(tidy_label(x_label, n_characters=80), size=SMALL_SIZE, color=MUTED, parse_math=False)
    axes.set_ylabel(tidy_label(y_label, n_characters=60), size=SMALL_SIZE, color=MUTED, parse_math=False)
    axes.locator_params(nbins=6)
    if is_plain:
        axes.set(xticks=[], yticks=[])


def _name_axis(column: str) -> str:
    """Say a column's name in words."""
    kind, _, number = column.rpartition("_")
    return {"pca": f"Principal component {number}", "tsne": f"t-SNE {number}"}.get(kind, column)


def _choose_ticks(n: int) -> list[int]:
    """Choose whole numbers up to n: from 1, 2, 5, 10 ... where there are many."""
    if n > _MAX_LINEAR:
        return [tick for power in range(7) for tick in (10**power, 2 * 10**power, 5 * 10**power) if tick <= n]
    return list(range(0, n + 1, math.ceil(n / 10)))


def _describe_components(share: float, n: int | None) -> str:
    """Say how many components explain a share of the variance."""
    percent = f"{share * 100:g} %:"
    return f"{percent} more than are known" if n is None else f"{percent} {n:,} component{'' if n == 1 else 's'}"


def _mark_shares(
    axes: Axes, texts: Mapping[float, str], n_components: Mapping[str, int | None], *, line: float
) -> None:
    """Draw a line from the curve to each number of components, written far enough apart to be read."""
    right = axes.get_xlim()[1]
    place = 1.0 + line
    found = {float(share): n for share, n in n_components.items()}
    for share, text in sorted(texts.items(), reverse=True):
        place = min(share, place - line)
        if (n := found[share]) is not None:
            axes.plot([n, right], [share, share], color=FAINT, linewidth=0.6)
            axes.plot([n], [share], marker="o", markersize=4, color=ACCENT, clip_on=False)
        axes.annotate(
            text,
            (1, share),
            xycoords=("axes fraction", "data"),
            xytext=(1.05, place),
            textcoords=("axes fraction", "data"),
            va="center",
            size=SMALL_SIZE,
            color=INK if n is not None else MUTED,
            parse_math=False,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0},
        )


def _shade(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Turn shares into colours with opacity; nothing where there is no share."""
    from matplotlib.colors import to_rgb

    opacity = np.sqrt(np.clip(np.nan_to_num(shares), 0, 1))
    return np.dstack([np.broadcast_to(to_rgb(ACCENT), (*shares.shape, 3)), opacity])


def _write_shares(axes: Axes, shares: npt.NDArray[np.float64], *, size: float) -> None:
    """Write shares of at least half a percent into their cells, in white where the blue is dark on any page."""
    for (row, column), value in np.ndenumerate(np.nan_to_num(shares)):
        if value >= 0.005:
            colour = "#ffffff" if value > 0.7 else INK
            write(axes, column, row, f"{100 * value:.0f}", size=size, color=colour, ha="center", va="center_baseline")


def _draw_scale(figure: Figure, left: float) -> None:
    """Draw what the shades of the heat map mean."""
    axes = add_axes(figure, left, HEADER + 0.02, 2.4, 0.12)
    opacity = np.linspace(0, 1, 128)
    axes.imshow(_shade(opacity[None, :] ** 2), aspect="auto", extent=(0, 1, 0, 1), interpolation="none")
    axes.spines[:].set(visible=True, edgecolor=HAIRLINE)
    shares = np.array([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    axes.set(yticks=[])
    axes.set_xticks(np.sqrt(shares), ["0", "1 %", "5", "10", "25", "50", "100 %"])
