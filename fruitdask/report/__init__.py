"""Tables, figures and the page of a run."""

from fruitdask.report.files import list_figures, write_figures, write_page
from fruitdask.report.maps import read_points
from fruitdask.report.page import ReportData, render_page
from fruitdask.report.tables import (
    Counts,
    compare_rows,
    list_parts,
    read_failures,
    read_parts,
    read_results,
    write_failures,
    write_results,
)
from fruitdask.report.thumbnails import Thumbnails
