"""Figures and the page, written to the output folder."""

from fruitdask.core.storage import Location, write_file
from fruitdask.report import figures
from fruitdask.report.page import ReportData, render_page
from fruitdask.store import FIGURE_NAMES, PAGE, delete_result, name_figure


def write_page(output: Location, data: ReportData) -> None:
    """Write the page."""
    write_file(output.child(PAGE), render_page(data).encode())


def write_figures(output: Location, data: ReportData) -> None:
    """Write the figures that the data allow, and delete those of an earlier run."""
    for name in FIGURE_NAMES:
        delete_result(output, name_figure(name))
    for name, plot in data.plots.items():
        write_file(output.child(name_figure(name)), figures.render_png(plot(), dpi=data.config.plots.dpi))


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
