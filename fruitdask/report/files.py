"""Figures and the page, written to the output folder."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fruitdask.core.storage import Location, write_file
from fruitdask.report import figures
from fruitdask.report.maps import choose_axes
from fruitdask.report.page import ReportData, render_page
from fruitdask.store import FIGURE_NAMES, PAGE, delete_result, name_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Examples per class in the figure; the page has its own setting.
_EXAMPLES_PER_CLASS = 6


def write_page(output: Location, data: ReportData) -> None:
    """Write the page."""
    write_file(output.child(PAGE), render_page(data).encode())


def write_figures(output: Location, data: ReportData) -> None:
    """Write the figures that the data allow, and delete those of an earlier run."""
    for name in FIGURE_NAMES:
        delete_result(output, name_figure(name))
    for name, figure in _plot_all(data):
        write_file(output.child(name_figure(name)), figures.render_png(figure, dpi=data.config.plots.dpi))


def list_figures(*, n_components: int, has_tsne: bool, has_exploration: bool, has_quality: bool) -> list[str]:
    """List the figures of a run."""
    groups = [
        (has_exploration, FIGURE_NAMES[:5]),
        (n_components > 1, FIGURE_NAMES[5:6]),
        (has_tsne, FIGURE_NAMES[6:7]),
        (has_quality and n_components > 0, FIGURE_NAMES[7:8]),
        (has_quality, FIGURE_NAMES[8:]),
    ]
    return [name for is_there, names in groups if is_there for name in names]


def _plot_all(data: ReportData) -> Iterator[tuple[str, "Figure"]]:
    """Plot one figure at a time, with its name."""
    if data.exploration is not None:
        classes = data.exploration.classes
        yield "classes", figures.plot_class_counts(classes)
        yield "sizes", figures.plot_sizes(data.exploration.images)
        yield "examples", figures.plot_examples(data.exploration, per_class=_EXAMPLES_PER_CLASS)
        yield "colours", figures.plot_colours(classes)
        yield "differences", figures.plot_differences(classes)
    if data.results is not None:
        ratio = (data.manifest or {}).get("pca", {}).get("explained_variance_ratio", [])
        for axes in choose_axes(list(data.results.columns), data.config.plots.components, ratio):
            yield axes.name, figures.plot_map(
                data.results, x=axes.x, y=axes.y, title=axes.title, x_label=axes.x_label, y_label=axes.y_label
            )
    if data.quality is not None:
        judged = data.quality.get("grouped") or data.quality
        explained, neighbors = data.quality.get("explained_variance"), judged["neighbors"]
        if explained is not None:
            yield "explained_variance", figures.plot_explained_variance(explained["ratio"], explained["n_components"])
        yield "silhouettes", figures.plot_silhouettes(judged["silhouette"])
        yield "neighbors", figures.plot_confusion(neighbors["confusion"]["labels"], neighbors["confusion"]["share"])
