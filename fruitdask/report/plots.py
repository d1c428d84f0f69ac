"""Which figures the results allow. Each is plotted when it is first needed, once for its file and the page."""

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

from fruitdask.report import figures
from fruitdask.report.maps import choose_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fruitdask.report.page import ReportData

#: Examples per class in the figure; the page has its own setting.
_EXAMPLES_PER_CLASS = 6

Plots: TypeAlias = dict[str, Callable[[], "Figure"]]


def list_plots(data: "ReportData") -> Plots:
    """List the figures by name, as functions that plot at the first call and return the same figure afterwards."""
    plots = _list_exploration(data) | _list_maps(data) | _list_quality(data)
    return {name: cache(plot) for name, plot in plots.items()}


def _list_exploration(data: "ReportData") -> Plots:
    """List the figures of the images themselves."""
    if data.exploration is None:
        return {}
    classes = data.exploration.classes
    sizes, n_images = data.sizes, int(classes["n_images"].sum())
    return {
        "classes": partial(figures.plot_class_counts, classes),
        "sizes": partial(figures.plot_sizes, data.exploration.images if sizes is None else sizes, n_images=n_images),
        "examples": partial(figures.plot_examples, data.exploration, per_class=_EXAMPLES_PER_CLASS),
        "colours": partial(figures.plot_colours, classes),
        "differences": partial(figures.plot_differences, classes),
    }


def _list_maps(data: "ReportData") -> Plots:
    """List the maps."""
    if data.results is None:
        return {}
    ratio: list[Any] = (data.manifest or {}).get("pca", {}).get("explained_variance_ratio", [])
    maps = choose_axes(list(data.results.columns), data.config.plots.components, ratio)
    return {
        axes.name: partial(
            figures.plot_map,
            data.results,
            x=axes.x,
            y=axes.y,
            title=axes.title,
            x_label=axes.x_label,
            y_label=axes.y_label,
            n_hidden=data.n_hidden,
        )
        for axes in maps
    }


def _list_quality(data: "ReportData") -> Plots:
    """List the figures of how well the features separate the classes."""
    if data.quality is None:
        return {}
    judged = data.quality.get("grouped") or data.quality
    explained, confusion = data.quality.get("explained_variance"), judged["neighbors"]["confusion"]
    plots: Plots = {
        "silhouettes": partial(figures.plot_silhouettes, judged["silhouette"]),
        "neighbors": partial(
            figures.plot_confusion,
            confusion["labels"],
            confusion["share"],
            n_classes=len(judged["neighbors"]["by_class"]),
        ),
    }
    if explained is not None:
        plots["explained_variance"] = partial(
            figures.plot_explained_variance, explained["ratio"], explained["n_components"]
        )
    return plots
