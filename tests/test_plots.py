"""Figures: what they show is what the tables say, nothing overlaps or is cut off, and the SVG fits into any page."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from bokeh.core.enums import MarkerType
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import Polygon
from matplotlib.text import Text
from PIL import Image

from fruitdask.report import figures
from fruitdask.report.figures import fonts, maps, rows
from fruitdask.report.figures.canvas import pad_label, standard_settings, tidy_label
from fruitdask.report.figures.styles import COLOURS, INK
from fruitdask.store.exploration import Exploration

LIGHT, DARK = "#ffffff", "#16181d"
HOSTILE = [
    '<script>alert("1")</script>',
    "$x^2$ and $\\frac",
    "a_b\nsecond line",
    "苹果 红富士 🍎",
    "_hidden",
    '"><image xlink:href="#x"/>',
]
LONG = "Tomato not ripened, of the variety with the longest name in the whole greenhouse"
NAMES = ("Apple Braeburn", "Banana", "Cherry Rainier", "Physalis with Husk", "Zucchini dark")


def list_labels(n: int) -> list[str]:
    """List labels like those of the real data set, with a few that are hard to draw."""
    labels = [f"{NAMES[number % 5]} {number // 5 + 1}" for number in range(n)]
    return sorted(labels if n < 20 else [LONG, *HOSTILE, *labels[: n - 1 - len(HOSTILE)]])


def make_classes(labels: list[str], *, seed: int = 0) -> pd.DataFrame:
    """Make the table of classes; where there are several, the second has no good image."""
    rng, n = np.random.default_rng(seed), len(labels)
    mean = rng.gamma(4, 0.03, n)
    classes = pd.DataFrame(
        {
            "n_images": (counts := rng.integers(2, 3000, n)),
            "n_ok": counts - rng.integers(0, 2, n),
            "mean_squared_difference": mean,
            "standard_error": mean / 20,
            "pair_q05": mean / 3,
            "pair_q95": mean * 2,
            "palette": [f"#fefefe 0.500, {INK} 0.250, #{number:06x} 0.125" for number in rng.integers(0, 2**24, n)],
            "most_typical": [f"{label}/1.jpg" for label in labels],
            "least_typical": [f"{label}/3.jpg" for label in labels],
        },
        index=pd.Index(labels, name="label"),
    )
    if n > 1:
        classes.loc[labels[1], ["mean_squared_difference", "standard_error", "pair_q05", "pair_q95"]] = np.nan
        classes.loc[labels[1], ["palette", "most_typical", "least_typical"]] = ""
        classes.loc[labels[1], "n_ok"] = 0
    return classes


def make_table(labels: list[str], n_points: int, *, seed: int = 0) -> pd.DataFrame:
    """Make a results table with at least one image per class, the first of which has failed."""
    rng = np.random.default_rng(seed)
    number = np.r_[0, np.arange(len(labels)), rng.integers(0, len(labels), n_points - len(labels) - 1)]
    place = rng.normal(0, 10, (len(labels), 2))[number] + rng.normal(0, 1, (n_points, 2))
    place[0] = np.nan
    table = pd.DataFrame(place.astype(np.float32), columns=["pca_1", "pca_2"])
    return table.assign(
        label=np.array(labels, object)[number], status="ok", tsne_1=table["pca_1"], tsne_2=table["pca_2"]
    )


def make_exploration(labels: list[str], *, per_class: int = 6, px: int = 8) -> Exploration:
    """Make an exploration whose thumbnails name their class and image in their first two pixels."""
    rows = [(f"{label}/{number}.jpg", label) for label in labels for number in range(per_class)]
    thumbnails = np.zeros((len(rows), px, px, 3), np.uint8)
    for row in range(len(rows)):
        thumbnails[row, 0, 0], thumbnails[row, 0, 1] = row // per_class, row % per_class
    means = np.full((len(labels), px, px, 3), 200, np.uint8)
    means[:, 0, 0] = np.arange(len(labels))[:, None]
    return Exploration(
        images=pd.DataFrame(rows, columns=["path", "label"]),
        classes=make_classes(labels),
        thumbnail_rows=np.arange(len(rows)),
        thumbnails=thumbnails,
        means=means,
        summary={},
    )


def make_images(*, width: Any, height: Any, n_bytes: Any) -> pd.DataFrame:
    """Make the columns of the table of images that hold sizes."""
    images = pd.DataFrame({"bytes": n_bytes, "width_px": width, "height_px": height})
    return images.astype({"width_px": "Int32", "height_px": "Int32"})


def make_shares(n: int) -> np.ndarray:
    """Make the confusion of nearest neighbours; where there are several classes, one has no image."""
    shares = 0.7 * np.eye(n) + 0.3 * np.random.default_rng(0).dirichlet(np.full(n, 0.2), n)
    if n > 1:
        shares[1] = np.nan
    return shares


def make_silhouette(labels: list[str]) -> dict[str, Any]:
    """Make silhouettes of both signs; where there are several classes, one has none."""
    values: list[float | None] = list(np.random.default_rng(0).uniform(-0.5, 0.9, len(labels)))
    if len(labels) > 1:
        values[1] = None
    return {"mean": 0.25, "by_class": dict(zip(labels, values, strict=True))}


@cache
def plot_all(n: int) -> dict[str, Figure]:
    """Plot every figure for a number of classes."""
    labels = list_labels(n)
    table, classes = make_table(labels, 5 * n + 20), make_classes(labels)
    rng = np.random.default_rng(0)
    ratio = rng.dirichlet(np.ones(10 * n))
    sides = rng.integers(12_345, 65_535, (50, 2))
    return {
        "map": figures.plot_map(table, x="pca_1", y="pca_2", title="Principal components"),
        "tsne": figures.plot_map(
            table, x="tsne_1", y="tsne_2", title=LONG + "果" * 9, x_label="W" * 99, y_label="W" * 99
        ),
        "counts": figures.plot_class_counts(classes),
        "sizes": figures.plot_sizes(
            make_images(width=sides[:, 0], height=sides[:, 1], n_bytes=rng.lognormal(10, 1, 50))
        ),
        "examples": figures.plot_examples(make_exploration(labels), per_class=3),
        "colours": figures.plot_colours(classes),
        "differences": figures.plot_differences(classes),
        "variance": figures.plot_explained_variance(
            np.sort(ratio)[::-1], {"0.8": 5 * n, "0.9": 7 * n, "0.95": 8 * n, "0.99": None}
        ),
        "confusion": figures.plot_confusion(labels, make_shares(n)),
        "silhouettes": figures.plot_silhouettes(make_silhouette(labels)),
    }


def list_texts(figure: Figure) -> list[str]:
    """List what is written in a figure."""
    texts = cast(list[Text], figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible()))
    return [text.get_text() for text in texts if text.get_text()]


def list_drawn(figure: Figure) -> list[Text]:
    """List the texts that are drawn: numbers of ticks outside the view are not."""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in (each for parent in figure.axes for each in (parent, *parent.child_axes)):
        texts += [*axes.texts, *axes.findobj(lambda artist: artist in (axes.title, axes._left_title))]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            margin = (high - low) * 1e-6
            ticks = [tick for tick in axis.get_major_ticks() if low - margin <= tick.get_loc() <= high + margin]
            texts += [axis.label, *(label for tick in ticks for label in (tick.label1, tick.label2))]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def list_legend(figure: Figure) -> list[str]:
    """List the names in a figure's legend."""
    return [text.get_text().rstrip("\u2002") for text in figure.legends[0].get_texts()]


def get_points(axes: Axes) -> np.ndarray:
    """Get the positions of all points in the order they are drawn."""
    return np.concatenate([np.asarray(line.get_xydata()) for line in axes.lines])


def get_rows(figure: Figure) -> list[str]:
    """Get the names of a figure's rows, from top to bottom and left to right."""
    return [label.get_text().lstrip("\u2002") for axes in figure.axes for label in axes.get_yticklabels()]


def get_bars(figure: Figure) -> list[tuple[float, float, str]]:
    """Get the left ends, widths and colours of a figure's bars."""
    return [
        (bar.get_x(), bar.get_width(), to_hex(bar.get_facecolor()))
        for axes in figure.axes
        for container in axes.containers
        for bar in getattr(container, "patches", [])
    ]


def compute_luminance(colour: str) -> float:
    """Compute the relative luminance of a colour (WCAG 2)."""
    return float(linearize(colour) @ [0.2126, 0.7152, 0.0722])


def linearize(colour: str) -> np.ndarray:
    """Turn an sRGB colour into linear light."""
    values = np.array(to_rgb(colour))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def compute_contrast(first: str, second: str) -> float:
    """Compute the contrast of two colours (WCAG 2), 1 to 21."""
    dark, light = sorted((compute_luminance(first), compute_luminance(second)))
    return (light + 0.05) / (dark + 0.05)


#: How people without one kind of cone see linear light: Machado, Oliveira and Fernandes (2009), table 1, severity 1.
VISIONS = {
    "everybody": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def compute_lab(light: np.ndarray) -> np.ndarray:
    """Compute CIELAB coordinates (D65) of linear light."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    xyz = np.array(to_xyz) @ light / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_style_classes_has_144_different_styles() -> None:
    styles = list(figures.style_classes([str(number) for number in range(150)]).values())
    assert len(set(styles[:144])) == 144
    assert styles[144:] == styles[:6]
    assert all(
        one.colour != two.colour and one.marker != two.marker for one, two in zip(styles, styles[1:], strict=False)
    )
    assert all(style.is_filled for style in styles[:72])
    assert figures.style_classes(["b", "a", "b"]) == {"b": styles[0], "a": styles[1]}


def test_markers_have_an_inside_in_bokeh_and_in_matplotlib() -> None:
    assert set(figures.MARKERS) <= set(MarkerType)
    for marker in figures.MARKERS.values():
        style = MarkerStyle(marker)
        assert style.is_filled() and len(style.get_path().vertices) > 2


def test_colours_are_seen_on_light_and_dark_pages_and_differ_for_the_colour_blind() -> None:
    assert min(compute_contrast(colour, page) for colour in COLOURS for page in (LIGHT, DARK)) > 1.6
    for vision in VISIONS.values():
        seen = [compute_lab(np.clip(np.array(vision) @ linearize(colour), 0, 1)) for colour in COLOURS]
        distances = [np.linalg.norm(one - two) for number, one in enumerate(seen) for two in seen[:number]]
        # About 2.3 is just noticeable side by side (Mahy and others, 1994).
        assert min(distances) > 9


@pytest.mark.parametrize("n_points", [300, 5000], ids=["drawing", "image"])
def test_plot_map_draws_each_image_where_the_table_says(n_points: int) -> None:
    table = make_table(labels := list_labels(7), n_points)
    (axes,) = figures.plot_map(table, x="pca_1", y="pca_2", title="Map").axes
    good = table.dropna()
    np.testing.assert_allclose(
        np.sort(get_points(axes), axis=0), np.sort(good[["pca_1", "pca_2"]].to_numpy(float), axis=0)
    )
    for label, style in figures.style_classes(labels).items():
        of_class = [line for line in axes.lines if line.get_markerfacecolor() == style.colour]
        drawn = np.concatenate([np.asarray(line.get_xydata()) for line in of_class])
        expected = good.loc[good["label"] == label, ["pca_1", "pca_2"]].to_numpy(float)
        np.testing.assert_allclose(drawn[drawn[:, 0].argsort()], expected[expected[:, 0].argsort()])
    assert {line.get_rasterized() for line in axes.lines} == {n_points > 2000}


def test_plot_map_draws_small_classes_last_and_none_all_at_once() -> None:
    labels = np.repeat(["large", "small", "tiny"], [4000, 40, 8])
    table = pd.DataFrame({"label": labels, "pca_1": np.arange(4048.0), "pca_2": 0.0})
    (axes,) = figures.plot_map(table, x="pca_1", y="pca_2", title="Map").axes
    drawn = labels[get_points(axes)[:, 0].astype(int)]
    turns = np.split(drawn, np.flatnonzero((drawn[1:] == "large") & (drawn[:-1] == "tiny")) + 1)
    assert len(turns) == 8
    for turn in turns:
        np.testing.assert_array_equal(turn, np.repeat(["large", "small", "tiny"], [500, 5, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 30, 80])
def test_plot_map_names_all_classes_and_keeps_its_size(n: int) -> None:
    figure, styles = plot_all(n)["map"], figures.style_classes(list_labels(n))
    assert list_legend(figure) == [tidy_label(label, n_characters=30 if n <= 30 else 24) for label in styles]
    for marker, style in zip(figure.legends[0].legend_handles, styles.values(), strict=True):
        assert isinstance(marker, Line2D)
        assert marker.get_markerfacecolor() == (style.colour if style.is_filled else "none")
        assert style.is_filled or marker.get_markeredgecolor() == style.colour
    np.testing.assert_allclose(figure.axes[0].get_position().size * figure.get_size_inches(), [6.4, 5.0], rtol=0.01)


def test_plot_map_leaves_absent_classes_out_of_the_legend_but_keeps_styles() -> None:
    table = make_table(["a", "b", "c"], 50)
    table.loc[table["label"] == "b", "pca_1"] = np.nan
    figure = figures.plot_map(table, x="pca_1", y="pca_2", title="Map")
    assert list_legend(figure) == ["a", "c"]
    handle = cast(Line2D, figure.legends[0].legend_handles[1])
    assert handle.get_markerfacecolor() == figures.style_classes(["a", "b", "c"])["c"].colour


@pytest.mark.parametrize(
    ("columns", "labels", "expected", "n_ticks"),
    [
        ("pca", {}, ("Principal component 1", "Principal component 2"), None),
        ("tsne", {}, ("t-SNE 1", "t-SNE 2"), 0),
        ("pca", {"x_label": "first: 31 %", "y_label": "$y$"}, ("first: 31 %", "$y$"), None),
    ],
    ids=["pca", "t-SNE", "own"],
)
def test_plot_map_names_axes(
    columns: str, labels: dict[str, str], expected: tuple[str, str], n_ticks: int | None
) -> None:
    table = make_table(["a", "b"], 30)
    (axes,) = figures.plot_map(table, x=f"{columns}_1", y=f"{columns}_2", title="Map", **labels).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == expected
    assert n_ticks is None or len(axes.get_xticks()) == n_ticks


def test_plot_class_counts_has_the_order_of_all_tables_and_shows_failures() -> None:
    classes = pd.DataFrame({"n_images": [5, 12345, 5, 40], "n_ok": [5, 12345, 5, 30]}, index=["b", "c", "a", "d"])
    figure = figures.plot_class_counts(classes)
    assert get_rows(figure) == ["a", "b", "c", "d"]
    good, failed = get_bars(figure)[:4], get_bars(figure)[4:]
    assert [bar[:2] for bar in good] == [(0, 5), (0, 5), (0, 12345), (0, 30)]
    assert [bar[:2] for bar in failed] == [(5, 0), (5, 0), (12345, 0), (30, 10)]
    assert {bar[2] for bar in good}.isdisjoint({bar[2] for bar in failed})
    assert "12,345" in list_texts(figure)
    assert "12,395 images in 4 classes; orange: 10 that could not be read" in list_texts(figure)


def test_plot_differences_shows_means_errors_and_ranges() -> None:
    classes = make_classes(labels := ["a", "b", "c"])
    figure = figures.plot_differences(classes)
    assert get_rows(figure) == labels
    known = classes.loc[["a", "c"]]
    ranges = np.c_[known["pair_q05"], known["pair_q95"] - known["pair_q05"]]
    np.testing.assert_allclose([bar[:2] for bar in get_bars(figure)][::2], ranges)
    (axes,) = figure.axes
    dots = next(line for line in axes.lines if line.get_marker() == "o")
    np.testing.assert_allclose(np.asarray(dots.get_xdata(), float)[::2], known["mean_squared_difference"])
    (whiskers,) = axes.collections
    ends = [path.vertices[:, 0] for path in whiskers.get_paths()][::2]
    np.testing.assert_allclose(np.diff(ends)[:, 0], 2 * known["standard_error"])
    assert [text.get_text() for text in axes.texts] == ["–"]


def test_plot_silhouettes_marks_what_is_below_zero() -> None:
    figure = figures.plot_silhouettes({"mean": -0.126, "by_class": {"a": -0.5, "b": None, "c": 0.75}})
    assert get_rows(figure) == ["a", "b", "c"]
    bars = get_bars(figure)
    assert [width for _, width, _ in bars] == [-0.5, 0, 0, 0, 0, 0.75]
    assert len({colour for _, _, colour in bars[:3]} | {bars[3][2]}) == 2
    assert [text.get_text() for text in figure.axes[0].texts] == ["−0.50", "–", "0.75"]
    assert any(text.startswith("Mean of all images −0.13.") for text in list_texts(figure))


def test_plot_colours_draws_shares_of_the_palette() -> None:
    classes = pd.DataFrame({"palette": [f"#F0F0F0 0.712, {INK} 0.103", ""]}, index=["apple", "none"])
    bars = get_bars(figure := figures.plot_colours(classes))
    np.testing.assert_allclose([bar[:2] for bar in bars[:2]], [(0, 0.712), (0.712, 0.103)])
    assert bars[0][2] == "#f0f0f0"
    # A pixel that has the colour of ink must not take the colour of the page's text.
    assert bars[1][2] != INK and max(abs(np.subtract(to_rgb(bars[1][2]), to_rgb(INK)))) < 2 / 255
    assert get_rows(figure) == ["apple", "none"]


def test_plot_explained_variance_marks_where_the_curve_reaches_the_shares() -> None:
    n_components = {"0.8": 3, "0.9": 4, "0.95": 4, "0.99": None}
    (axes,) = (figure := figures.plot_explained_variance([0.5, 0.2, 0.15, 0.1, 0.02], n_components)).axes
    curve = axes.lines[0]
    np.testing.assert_allclose(np.asarray(curve.get_ydata()), [0, 0.5, 0.7, 0.85, 0.95, 0.97])
    assert curve.get_drawstyle() == "steps-post"
    (dots,) = (line for line in axes.lines if line.get_marker() == "o")
    np.testing.assert_allclose(dots.get_xydata(), [(3, 0.8), (4, 0.9), (4, 0.95)])
    assert {"80 %: 3 components", "95 %: 4 components", "99 %: more than were computed"} <= set(list_texts(figure))


@pytest.mark.parametrize("n", [5, 40], ids=["with numbers", "with a legend"])
def test_plot_confusion_shades_by_share(n: int) -> None:
    (axes,) = (figure := figures.plot_confusion(list_labels(n), shares := make_shares(n))).axes
    image = np.asarray(axes.collections[0].get_array())
    np.testing.assert_allclose(image[..., 3] ** 2, np.nan_to_num(shares))
    numbers = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    expected = {place: f"{100 * share:.0f}" for place, share in np.ndenumerate(shares) if share >= 0.005}
    assert numbers == (expected if n == 5 else {})
    assert ("100 %" in list_texts(figure)) == (n == 40)


def test_plot_confusion_says_100_only_of_all() -> None:
    (axes,) = figures.plot_confusion(["a", "b"], np.array([[1, 0], [0.003, 0.997]])).axes
    assert [text.get_text() for text in axes.texts] == ["100", "99"]


def count_images(axes: Axes) -> float:
    """Count the images in a histogram by the heights of its steps."""
    corners = cast(Polygon, axes.patches[0]).get_xy()
    # Each step lies between two corners at the same height, and the outline returns along the bottom.
    is_step = (np.diff(corners[:, 1]) == 0) & (np.diff(corners[:, 0]) > 0)
    return float(corners[:-1][is_step][:, 1].sum())


def test_plot_sizes_counts_every_image_that_could_be_read() -> None:
    images = make_images(width=[100, 300, pd.NA], height=[200, 250, pd.NA], n_bytes=[1_000, 2_500_000, 40])
    sizes, sides = (figure := figures.plot_sizes(images)).axes
    assert [count_images(axes) for axes in (sizes, sides)] == [3, 2]
    assert (sizes.get_xscale(), sides.get_xscale()) == ("log", "linear")
    assert "median 200 × 225 px, 200 to 300 px" in list_texts(figure)
    assert "median 1 kB, 40 B to 2.5 MB" in list_texts(figure)


def test_plot_sizes_of_equal_images() -> None:
    figure = figures.plot_sizes(make_images(width=[100] * 4, height=[100] * 4, n_bytes=[5_100] * 4))
    for axes, tick, note in zip(figure.axes, ("5.1 kB", "100 px"), ("all 5.1 kB", "all 100 × 100 px"), strict=True):
        assert count_images(axes) == 4
        assert [label.get_text() for label in axes.get_xticklabels()] == [tick]
        assert note in list_texts(figure)


def test_plot_examples_chooses_pictures() -> None:
    exploration = make_exploration(["a", "b"])
    (axes,) = (figure := figures.plot_examples(exploration, per_class=3)).axes
    assert get_rows(figure) == (order := ["a", "b"])
    drawn: dict[str, list[tuple[int, int, int]]] = {"a": [], "b": []}
    for image in axes.images:
        left, _, _, top = image.get_extent()
        picture = np.asarray(image.get_array())
        assert picture[0, 0, 0] == ["a", "b"].index(label := order[int(top)])
        drawn[label].append((int(left), int(picture[0, 1, 0]), int(picture[-1, -1, 0])))
    # The mean, the most and the least typical, then of the others 0, 2, 4, 5 the first, one between and the last.
    assert [(column, number) for column, number, _ in drawn["a"]] == [(0, 200), (1, 1), (2, 3), (3, 0), (4, 4), (5, 5)]
    assert drawn["a"][0] == (0, 200, 200)
    # Class b has no good image: no mean, no typical ones.
    assert [column for column, _, _ in drawn["b"]] == [3, 4, 5]


def test_plot_examples_shows_the_largest_classes_and_says_how_many_are_left_out() -> None:
    exploration = make_exploration([f"class {number:03d}" for number in range(130)], per_class=1)
    figure = figures.plot_examples(exploration, per_class=1)
    largest = exploration.classes["n_images"].sort_values(ascending=False, kind="stable").index[:40]
    assert get_rows(figure) == sorted(largest)
    assert "90 smaller classes are not shown" in list_texts(figure)


EMPTY, TABLE = make_classes(["a"]).iloc[:0], make_table(["a"], 3)


NO_CLASSES = "There are no classes to show."
NO_PAIR = "No class has two images that could be read."
WITHOUT_DATA: list[tuple[Callable[[], Figure], str]] = [
    (lambda: figures.plot_class_counts(EMPTY), NO_CLASSES),
    (lambda: figures.plot_colours(EMPTY), NO_CLASSES),
    (lambda: figures.plot_differences(EMPTY), NO_PAIR),
    (lambda: figures.plot_differences(make_classes(["a"]).assign(mean_squared_difference=np.nan)), NO_PAIR),
    (lambda: figures.plot_silhouettes({"mean": None, "by_class": {}}), NO_CLASSES),
    (lambda: figures.plot_confusion([], []), NO_CLASSES),
    (lambda: figures.plot_explained_variance([], {}), "No components were computed."),
    (lambda: figures.plot_sizes(make_images(width=[], height=[], n_bytes=[])), "There are no images."),
    (
        lambda: figures.plot_map(TABLE.assign(pca_1=np.nan), x="pca_1", y="pca_2", title="Map"),
        "No image has coordinates.",
    ),
    (lambda: figures.plot_examples(cast(Exploration, SimpleNamespace(classes=EMPTY)), per_class=2), NO_CLASSES),
]


def test_figures_without_data_say_so() -> None:
    for plot, reason in WITHOUT_DATA:
        figure = plot()
        assert reason in list_texts(figure) and not figure.axes
        assert reason in figures.render_svg(figure)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 5, 30, 80])
def test_text_is_neither_cut_off_nor_overlapping(n: int) -> None:
    for name, figure in plot_all(n).items():
        with standard_settings():
            figure.draw_without_rendering()
            shown = list_drawn(figure)
            boxes = np.array([text.get_window_extent().extents for text in shown])
        assert (boxes[:, :2] >= -0.5).all() and (boxes[:, 2:] <= figure.bbox.size + 0.5).all(), name
        # Boxes are a little larger than the letters in them.
        low, high = boxes[:, :2] + 1.1, boxes[:, 2:] - 1.1
        overlap = (low[:, None] < high[None]).all(2) & (low[None] < high[:, None]).all(2)
        pairs = [(shown[i].get_text(), shown[k].get_text()) for i, k in np.argwhere(np.triu(overlap, 1))]
        assert pairs == [], name


def test_more_classes_than_a_figure_holds_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MAX_ROWS", 3)
    monkeypatch.setattr(maps, "_MAX_ENTRIES", 3)
    figure = figures.plot_class_counts(make_classes(labels := list("abcde")))
    assert len(get_rows(figure)) == 3
    assert any("The largest 3 of 5 classes." in text for text in list_texts(figure))
    legend = list_legend(figures.plot_map(make_table(labels, 20), x="pca_1", y="pca_2", title="Map"))
    assert legend == ["a", "b", "… and 3 more"]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("Apple 5", "Apple 5"),
        ("a\nb\tc\x00d\ud800e\u202ef", "a b c d e f"),
        ("0123456789" * 4, "0123456789012345…34567890123456789"),
        ("果" * 30, "果" * 8 + "…" + "果" * 8),
    ],
    ids=["plain", "control", "long", "wide"],
)
def test_tidy_label(label: str, expected: str) -> None:
    assert tidy_label(label) == expected


@pytest.mark.parametrize("dpi", [50, 150])
def test_render_png_has_the_configured_resolution_on_white(dpi: int) -> None:
    figure = figures.plot_class_counts(make_classes(["a", "苹果"]))
    with Image.open(io.BytesIO(figures.render_png(figure, dpi=dpi))) as image:
        np.testing.assert_allclose(image.size, figure.get_size_inches() * dpi, atol=1)
        np.testing.assert_allclose(image.info["dpi"], dpi, rtol=0.01)
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
        assert not {"Software", "Creation Time"} & set(image.info)


def test_render_png_stays_within_what_can_be_drawn() -> None:
    figure = Figure(figsize=(1, 200))
    with Image.open(io.BytesIO(figures.render_png(figure, dpi=600))) as image:
        assert 60_000 < image.height < 65_536


SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


@pytest.mark.slow
def test_render_svg_can_be_embedded_in_a_page() -> None:
    taken: set[str] = set()
    for name, figure in plot_all(30).items():
        svg = figures.render_svg(figure, label=f'{name} "of" <classes> & more')
        assert svg.startswith("<svg ") and "\n" not in svg.partition(">")[0]
        root = ElementTree.fromstring(svg)
        assert (root.get("role"), root.get("width"), root.get("height")) == ("img", "100%", None)
        assert root.get("aria-label") == f'{name} "of" <classes> & more'
        tags = {element.tag.removeprefix(SVG) for element in root.iter()}
        assert tags <= {"svg", "g", "defs", "path", "use", "text", "image", "clipPath", "rect"}
        ids = {value for element in root.iter() if (value := element.get("id"))}
        assert ids.isdisjoint(taken), name
        taken |= ids
        references = set(re.findall(r"url\(#([^)]+)\)", " ".join(v for e in root.iter() for v in e.attrib.values())))
        for element in root.iter():
            assert not any(key.startswith("on") for key in element.attrib)
            if (target := element.get(XLINK)) is not None:
                assert target.startswith(("#", "data:image/png;base64,"))
                references |= {target[1:]} if target.startswith("#") else set()
        assert references <= ids, name
        styles = " ".join(element.get("style", "") for element in root.iter())
        assert "currentColor" in styles and INK not in styles and "#000" not in styles and "font-family" not in styles


def test_render_svg_paints_no_ground_and_no_default_black() -> None:
    root = ElementTree.fromstring(figures.render_svg(figures.plot_differences(make_classes(["a", "b", "c"]))))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert f"max-width:{width * 96 / 72:.0f}px" in root.attrib["style"]
    assert all("fill: " in text.attrib["style"] for text in root.iter(SVG + "text"))
    for path in root.iter(SVG + "path"):
        numbers = np.array(re.findall(r"-?[\d.]+", path.get("d", "")), float).reshape(-1, 2)
        covers = len(numbers) and (np.ptp(numbers, axis=0) > [width - 1, height - 1]).all()
        assert not covers or "fill: none" in path.get("style", "")


@pytest.mark.parametrize("label", HOSTILE)
def test_render_svg_writes_hostile_names_as_text(label: str) -> None:
    svg = figures.render_svg(figures.plot_class_counts(make_classes([label])), label=label)
    root = ElementTree.fromstring(svg)
    assert pad_label(name := tidy_label(label)) + name in [element.text for element in root.iter(SVG + "text")]
    assert root.get("aria-label") == tidy_label(label)
    assert "<script" not in svg and "<image" not in svg


@pytest.mark.slow
def test_render_svg_is_reproducible_also_in_threads() -> None:
    def render(number: int) -> str:
        return figures.render_svg(figures.plot_class_counts(make_classes(list_labels(3 + number % 3))), label="Counts")

    alone = [render(number) for number in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, range(6))) == alone
    assert alone[0] == alone[3] != alone[1]


def test_render_svg_names_a_figure_by_its_title() -> None:
    svg = figures.render_svg(figures.plot_silhouettes(make_silhouette(["a", "b"])))
    assert ElementTree.fromstring(svg).get("aria-label") == "Silhouette of each class"


def test_a_hundred_thousand_points_make_a_small_svg() -> None:
    table = make_table(list_labels(20), 100_000)
    assert len(figures.render_svg(figures.plot_map(table, x="pca_1", y="pca_2", title="Map"))) < 1_500_000


#: Lines that a user's matplotlibrc may contain; any one of them would change the figures, or make them fail.
MATPLOTLIBRC = {
    "text.usetex": "True",
    "font.family": "serif",
    "font.size": "22",
    "mathtext.fontset": "cm",
    "figure.constrained_layout.use": "True",
    "figure.facecolor": "black",
    "figure.dpi": "31",
    "savefig.dpi": "47",
    "savefig.bbox": "tight",
    "savefig.transparent": "True",
    "axes.facecolor": "red",
    "axes.labelpad": "30",
    "axes.titlesize": "40",
    "axes.grid": "True",
    "axes.xmargin": "0.4",
    "axes.unicode_minus": "False",
    "axes.formatter.use_locale": "True",
    "axes.spines.top": "False",
    "xtick.direction": "in",
    "xtick.minor.visible": "True",
    "ytick.alignment": "top",
    "lines.linestyle": "--",
    "lines.antialiased": "False",
    "patch.force_edgecolor": "True",
    "scatter.edgecolors": "black",
    "errorbar.capsize": "9",
    "image.cmap": "hot",
    "image.origin": "lower",
    "path.sketch": "1, 100, 2",
    "svg.fonttype": "path",
}


def draw_all(drawn: dict[str, Figure]) -> dict[str, tuple[bytes, str]]:
    """Draw figures as PNG and as SVG."""
    return {name: (figures.render_png(figure, dpi=60), figures.render_svg(figure)) for name, figure in drawn.items()}


@pytest.mark.slow
def test_figures_are_the_same_whatever_the_users_matplotlibrc_and_leave_it_as_it_was() -> None:
    import matplotlib

    expected = draw_all(plot_all(5))
    with matplotlib.rc_context(MATPLOTLIBRC):
        before = dict(matplotlib.rcParams)
        found = draw_all(plot_all.__wrapped__(5))
        assert dict(matplotlib.rcParams) == before
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.slow
def test_matplotlib_loads_with_a_wrong_backend_and_keeps_a_right_one() -> None:
    code = (
        "import os; from fruitdask.report import figures; figures.load_matplotlib(); import matplotlib; "
        "print(matplotlib.get_backend(), os.environ['MPLBACKEND'])"
    )
    for backend, used in (("nonsense", "agg"), ("SVG", "svg")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"MPLBACKEND": backend},
            capture_output=True,
            text=True,
        )
        assert done.stdout.lower().split() == [used, backend.lower()], done.stderr


@pytest.mark.slow
def test_binary_matplotlibrc_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe")
    code = (
        "from fruitdask.report import figures\n"
        "try: figures.load_matplotlib()\nexcept Exception as e: print(type(e).__name__, e)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("ConfigError matplotlib cannot be imported: 'utf-8' codec can't decode")


def test_letters_without_a_font_are_noted_in_the_file_and_not_on_the_page() -> None:
    # Cuneiform: none of the fonts that are searched for has it.
    classes = pd.DataFrame({"n_images": [1, 2], "n_ok": [1, 2]}, index=["pear", "\U00012000\U00012001"])
    pear, other = (figures.plot_class_counts(classes.iloc[:n]) for n in (1, 2))
    assert [fonts.lacks_letters(figure) for figure in (pear, other)] == [False, True]
    # It is in the file, in the row of text below the title.
    short, long = (measure_note(figures.render_png(figure, dpi=100)) for figure in (pear, other))
    assert long > short + 100
    assert fonts.BOXES not in figures.render_svg(other)


def measure_note(png: bytes) -> int:
    """Find where the line below the title ends, in pixels at 100 dpi."""
    grey = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    return int(np.flatnonzero((grey[30:44] < 200).any(axis=0)).max())


def test_names_are_drawn_in_fonts_of_other_scripts_where_the_system_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    serif = next(font for font in fontManager.ttflist if font.name == "DejaVu Serif")
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist, replace(serif, name="Noto Sans CJK SC")])
    fonts.list_families.cache_clear()
    try:
        figure = figures.plot_class_counts(pd.DataFrame({"n_images": [1], "n_ok": [1]}, index=["pear"]))
        assert figure.axes[0].get_yticklabels()[0].get_fontfamily() == ["DejaVu Sans", "Noto Sans CJK SC"]
    finally:
        fonts.list_families.cache_clear()
