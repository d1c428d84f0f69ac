"""Tables, figures and the page of a run, as files for people and programs."""

from fruitdask.report.files import PAGE, list_figures, write_figures, write_page
from fruitdask.report.page import ReportData, render_page
from fruitdask.report.tables import (
    RESULTS,
    Counts,
    CsvComparison,
    check_failures,
    compare_rows,
    list_parts,
    read_failures,
    read_results,
    write_failures,
    write_results,
)

__all__ = [
    "PAGE",
    "RESULTS",
    "Counts",
    "CsvComparison",
    "ReportData",
    "check_failures",
    "compare_rows",
    "list_figures",
    "list_parts",
    "read_failures",
    "read_results",
    "render_page",
    "write_failures",
    "write_figures",
    "write_page",
    "write_results",
]
