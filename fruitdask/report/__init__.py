"""Tables, figures and the page of a run, as files for people and programs."""

from fruitdask.report.files import PAGE, write_figures, write_page
from fruitdask.report.page import ReportData, render_page
from fruitdask.report.tables import RESULTS, Counts, read_failures, read_results, write_failures, write_results

__all__ = [
    "PAGE",
    "RESULTS",
    "Counts",
    "ReportData",
    "read_failures",
    "read_results",
    "render_page",
    "write_failures",
    "write_figures",
    "write_page",
    "write_results",
]
