"""The interactive maps of the page: their points, and the Bokeh document that draws them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.core.storage import Location
from fruitdask.report import figures
from fruitdask.report.formats import format_share
from fruitdask.report.tables import read_parts
from fruitdask.report.thumbnails import Thumbnails

if TYPE_CHECKING:
    from bokeh.models import ColumnDataSource, Filter
    from bokeh.plotting import figure as Figure

#: Opacity of the points of a muted class, and of those outside a selection.
_FADED_ALPHA = 0.08
#: Size of points in pixels, on a map with few of them and on one with thousands.
_POINT_PX, _SMALL_POINT_PX, _MANY_POINTS = 8, 6, 3_000
_SEED = 0


@dataclass(frozen=True)
class MapAxes:
    """One map: the columns of the results that it shows, and its labels."""

    name: str
    title: str
    x: str
    y: str
    x_label: str
    y_label: str


@dataclass(frozen=True, eq=False)
class Maps:
    """What the page needs to draw its maps."""

    axes: list[MapAxes]
    #: Colour and marker of each class, in alphabetical order.
    styles: dict[str, figures.ClassStyle]
    #: The outline of each marker that occurs, as the ``d`` of an SVG path.
    symbols: dict[str, str]
    #: Images in the maps, and images with features.
    n_shown: int
    n_total: int
    #: The data of the script of the page, as JSON.
    payload: dict[str, Any] = field(repr=False)


def choose_axes(columns: Sequence[str], components: tuple[int, int], ratio: Sequence[float]) -> list[MapAxes]:
    """Return the maps that can be drawn from a table of results."""
    maps = []
    x, y = components if all(f"pca_{number}" in columns for number in components) else (1, 2)
    if f"pca_{x}" in columns and f"pca_{y}" in columns:
        labels = [_label_component(number, ratio) for number in (x, y)]
        maps.append(MapAxes("pca", "Principal components (PCA)", f"pca_{x}", f"pca_{y}", *labels))
    if "tsne_1" in columns and "tsne_2" in columns:
        maps.append(MapAxes("tsne", "Neighbourhoods (t-SNE)", "tsne_1", "tsne_2", "t-SNE 1", "t-SNE 2"))
    return maps


def _label_component(number: int, ratio: Sequence[float]) -> str:
    """Return the label of a principal component, with its explained variance."""
    share = f" ({format_share(ratio[number - 1])} of the variance)" if number <= len(ratio) else ""
    return f"Component {number}{share}"


def read_points(
    output: Location,
    components: tuple[int, int],
    ratio: Sequence[float],
    *,
    max_points: int,
    with_thumbnail: frozenset[str],
) -> tuple[pd.DataFrame, int]:
    """Read what maps need from the table of all images; if there are very many, of the sample from `sample_points`.

    Returns the table, and the number of images with coordinates that it lacks.
    """
    kept, n_known, random = list[pd.DataFrame](), 0, np.random.default_rng(_SEED)
    for part in read_parts(output):
        axes = choose_axes(list(part.columns), components, ratio)
        columns = dict.fromkeys(["path", "label", *(column for each in axes for column in (each.x, each.y))])
        kept.append(part[list(columns)].assign(_order=random.random(len(part))))
        n_known += int(_count_maps(part, axes).astype(bool).sum())
        if sum(map(len, kept)) > 2 * max_points:
            kept = [_choose_points(pd.concat(kept, ignore_index=True), axes, max_points, with_thumbnail)]
    table = pd.concat(kept, ignore_index=True)
    if len(table) > max_points:
        table = _choose_points(table, axes, max_points, with_thumbnail)
    n_hidden = n_known - int(_count_maps(table, axes).astype(bool).sum())
    return table.drop(columns="_order"), n_hidden


def _choose_points(
    table: pd.DataFrame, axes: Sequence[MapAxes], max_points: int, with_thumbnail: frozenset[str]
) -> pd.DataFrame:
    """Keep only the images that the maps draw."""
    order = table["_order"].to_numpy()
    chosen = sample_points(table, axes, max_points=max_points, with_thumbnail=with_thumbnail, order=order)
    return table.iloc[chosen].reset_index(drop=True)


def _count_maps(results: pd.DataFrame, axes: Sequence[MapAxes]) -> npt.NDArray[np.int64]:
    """Count the maps that each image is on."""
    n_maps = np.zeros(len(results), np.int64)
    for each in axes:
        n_maps += np.isfinite(results[[each.x, each.y]].to_numpy()).all(axis=1)
    return n_maps


def sample_points(
    results: pd.DataFrame,
    axes: Sequence[MapAxes],
    *,
    max_points: int,
    with_thumbnail: frozenset[str],
    order: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.intp]:
    """Choose the images that the maps show: evenly over the classes, the same ones every time.

    Images on more of the maps come first, then images with a thumbnail, then any, in a given order or at random:
    neighbours in the catalog are often shots of one series. Images that are chosen from all are also chosen from any
    subset that contains them.

    Returns positions of rows, ascending; images without coordinates are left out.
    """
    n_maps = _count_maps(results, axes)
    rank = 2 * n_maps + results["path"].isin(with_thumbnail).to_numpy()
    rows = np.flatnonzero(n_maps)
    chances = np.random.default_rng(_SEED).random(len(rows)) if order is None else order[rows]
    ordered = rows[np.lexsort((chances, -rank[rows]))]
    return np.sort(_deal(results["label"].to_numpy()[ordered], ordered)[:max_points])


def _deal(labels: npt.NDArray[Any], rows: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Reorder rows so that classes alternate."""
    turn = pd.Series(labels).groupby(labels).cumcount().to_numpy()
    return rows[np.argsort(turn, kind="stable")]


def build_maps(
    results: pd.DataFrame, axes: Sequence[MapAxes], *, thumbnails: Thumbnails, max_points: int, n_hidden: int = 0
) -> Maps | None:
    """Build the maps of a run's results, from whose table some images with coordinates may be left out."""
    chosen = sample_points(results, axes, max_points=max_points, with_thumbnail=thumbnails.paths)
    if not len(chosen):
        return None
    points = results.iloc[chosen].reset_index(drop=True)
    # Styles are assigned over all classes, so that figures and maps agree.
    styles = figures.style_classes(sorted(results["label"].unique()))
    styles = {label: styles[label] for label in sorted(points["label"].unique())}
    n_total = n_hidden + int(np.isfinite(results[[each.x for each in axes]].to_numpy()).any(axis=1).sum())
    return Maps(
        axes=list(axes),
        styles=styles,
        symbols={style.marker: _trace_marker(style.marker) for style in styles.values()},
        n_shown=len(points),
        n_total=n_total,
        payload=_describe_points(points, list(styles), thumbnails) | _build_document(points, axes, styles),
    )


def _describe_points(points: pd.DataFrame, labels: list[str], thumbnails: Thumbnails) -> dict[str, Any]:
    """List the path, class and thumbnail of each point."""
    pictures: list[str] = []
    picture_of_point = np.full(len(points), -1)
    paths = points["path"].to_list()
    for row in _deal(points["label"].to_numpy(), np.arange(len(points))):
        picture = thumbnails.encode(paths[row])
        if picture is not None:
            picture_of_point[row] = len(pictures)
            pictures.append(picture)
    return {
        "paths": paths,
        "labels": labels,
        "class_of_point": pd.Categorical(points["label"], categories=labels).codes.tolist(),
        "picture_of_point": picture_of_point.tolist(),
        "pictures": pictures,
    }


def _build_document(
    points: pd.DataFrame, axes: Sequence[MapAxes], styles: Mapping[str, figures.ClassStyle]
) -> dict[str, Any]:
    """Build the Bokeh document: one source, so that maps share a selection, and one renderer per style: of more than
    144 classes some look the same, and thousands of renderers would stop a browser.
    """
    from bokeh.document import Document
    from bokeh.models import ColumnDataSource, IndexFilter

    columns = sorted({column for each in axes for column in (each.x, each.y)})
    source = ColumnDataSource({name: points[name].to_numpy(np.float32) for name in columns}, name="points")
    # The first class of each style stands for all of them.
    first = {style: number for number, style in reversed(list(enumerate(styles.values())))}
    drawn_with = [first[style] for style in styles.values()]
    number_of_point = np.array(drawn_with)[pd.Categorical(points["label"], categories=list(styles)).codes]
    filters: dict[int, Filter] = {
        number: IndexFilter(indices=np.flatnonzero(number_of_point == number).tolist())
        for number in dict.fromkeys(drawn_with)
    }
    document = Document()
    for each in axes:
        document.add_root(_draw_map(each, source, filters, list(styles.values())))
    return {
        "drawn_with": drawn_with,
        "document": document.to_json(deferred=False),
        "roots": {root.ref["id"]: f"map-{each.name}" for root, each in zip(document.roots, axes, strict=True)},
    }


def _draw_map(
    axes: MapAxes,
    source: "ColumnDataSource",
    filters: Mapping[int, "Filter"],
    styles: Sequence[figures.ClassStyle],
) -> "Figure":
    """Draw one map; the page sets the colours of axes and grid, depending on dark mode."""
    from bokeh.models import CDSView
    from bokeh.plotting import figure

    options: dict[str, Any] = {
        "name": f"plot-{axes.name}",
        "sizing_mode": "stretch_width",
        "aspect_ratio": 1.1,
        "min_height": 280,
        "x_axis_label": axes.x_label,
        "y_axis_label": axes.y_label,
        "tools": _make_tools(),
        "active_drag": None,
        "active_scroll": None,
        "toolbar_location": "above",
        "background_fill_color": None,
        "border_fill_color": None,
        "lod_threshold": None,
        # The page releases this hold once it has set the colours, so that points are drawn once.
        "hold_render": True,
        "min_border_right": 12,
    }
    plot = figure(**options)
    plot.toolbar.logo = None
    size = _POINT_PX if len(source.data[axes.x]) <= _MANY_POINTS else _SMALL_POINT_PX
    for number, filtered in filters.items():
        style = styles[number]
        plot.scatter(
            axes.x,
            axes.y,
            source=source,
            view=CDSView(filter=filtered),
            name=f"class-{number}",
            marker=style.marker,
            size=size,
            line_color=style.colour,
            fill_color=style.colour if style.is_filled else None,
            fill_alpha=0.65,
            muted_alpha=_FADED_ALPHA,
            nonselection_alpha=_FADED_ALPHA,
        )
    return plot


def _make_tools() -> list[Any]:
    """Return the tools of one map, in the order of their icons."""
    from bokeh import models

    return [
        models.PanTool(),
        models.WheelZoomTool(description="Zoom with the wheel or two fingers"),
        models.BoxZoomTool(),
        models.ZoomInTool(),
        models.ZoomOutTool(),
        models.BoxSelectTool(),
        models.LassoSelectTool(),
        models.TapTool(),
        # The page shows its own box beside the pointer, made of text nodes: no template to escape paths for.
        models.HoverTool(tooltips=None, visible=False),
        models.ResetTool(),
        models.SaveTool(),
    ]


def _trace_marker(marker: str) -> str:
    """Trace the outline of a marker in a square of side 1 around the origin, as an SVG path."""
    figures.load_matplotlib()
    from matplotlib.markers import MarkerStyle
    from matplotlib.path import Path

    style = MarkerStyle(figures.MARKERS[marker])
    path = style.get_path().transformed(style.get_transform())
    letters = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}
    parts = []
    for values, code in path.iter_segments():
        # An SVG's y axis points down.
        numbers = " ".join(f"{value:.3g}" for value in np.asarray(values) * np.tile([1, -1], len(values) // 2))
        parts.append("Z" if code == Path.CLOSEPOLY else f"{letters[code]}{numbers}")
    return "".join(parts)
