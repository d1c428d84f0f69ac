"""Figures of the images, of the features, and of how well these separate the classes.

Each function takes a table and returns a matplotlib figure, made without pyplot. ``render_png`` and ``render_svg``
render it.
"""

from fruitdask.report.figures.canvas import load_matplotlib
from fruitdask.report.figures.maps import plot_confusion, plot_explained_variance, plot_map
from fruitdask.report.figures.pictures import SIZES, plot_examples, plot_sizes
from fruitdask.report.figures.render import render_png, render_svg
from fruitdask.report.figures.rows import plot_class_counts, plot_colours, plot_differences, plot_silhouettes
from fruitdask.report.figures.styles import MARKERS, ClassStyle, style_classes

__all__ = [
    "MARKERS",
    "SIZES",
    "ClassStyle",
    "load_matplotlib",
    "plot_class_counts",
    "plot_colours",
    "plot_confusion",
    "plot_differences",
    "plot_examples",
    "plot_explained_variance",
    "plot_map",
    "plot_silhouettes",
    "plot_sizes",
    "render_png",
    "render_svg",
    "style_classes",
]
