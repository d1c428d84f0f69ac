"""What the sections of the page say, as plain data.

Each function returns the view of one section, or None where its data is missing; the template beside its module renders
it.
"""

from fruitdask.report.sections.check import count_pictured, describe_issues, describe_predictions
from fruitdask.report.sections.classes import describe_classes
from fruitdask.report.sections.data import describe_duplicates, describe_failures
from fruitdask.report.sections.examples import count_examples, describe_examples
from fruitdask.report.sections.quality import describe_quality
from fruitdask.report.sections.record import describe_performance, describe_protection, describe_reproduction
from fruitdask.report.sections.summary import count_images, describe_summary
from fruitdask.report.sections.texts import View, choose_title, show_place

__all__ = [
    "View",
    "choose_title",
    "count_examples",
    "count_images",
    "count_pictured",
    "describe_classes",
    "describe_duplicates",
    "describe_examples",
    "describe_failures",
    "describe_issues",
    "describe_performance",
    "describe_predictions",
    "describe_protection",
    "describe_quality",
    "describe_reproduction",
    "describe_summary",
    "show_place",
]
