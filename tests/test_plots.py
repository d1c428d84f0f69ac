"""Figures: what they show is what the tables say, nothing overlaps or is cut off, and the SVG fits into any page."""

import io
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from bokeh.core.enums import MarkerType
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.text import Text
from PIL import Image

from fruitdask import plots
from fruitdask.exploration import Exploration
from fruitdask.plots.canvas import INK, quiet, tidy_label
from fruitdask.plots.styles import COLOURS

LIGHT, DARK = "#ffffff", "#16181d"
HOSTILE = [
    '<script>alert("1")</script>',
    "$x^2$ and $\\frac",
    "a_b\nsecond line",
    "苹果 红富士",
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
    """Make a results table with at least one image a class, of which the first has failed."""
    rng = np.random.default_rng(seed)
    number = np.r_[0, np.arange(len(labels)), rng.integers(0, len(labels), n_points - len(labels) - 1)]
    place = rng.normal(0, 10, (len(labels), 2))[number] + rng.normal(0, 1, (n_points, 2))
    place[0] = np.nan
    table = pd.DataFrame(place.astype(np.float32), columns=["pca_1", "pca_2"])
    return table.assign(
        label=np.array(labels, object)[number], status="ok", tsne_1=table["pca_1"], tsne_2=table["pca_2"]
    )


def make_exploration(labels: list[str], *, per_class: int = 6, px: int = 8) -> Exploration:
    """Make an exploration whose thumbnails tell by their first two pixels which class and which image they are of."""
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
    """Make the columns of the table of images that tell sizes."""
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


def plot_all(n: int) -> dict[str, Figure]:
    """Plot every figure for so many classes."""
    labels = list_labels(n)
    table, classes = make_table(labels, 5 * n + 20), make_classes(labels)
    rng = np.random.default_rng(0)
    ratio = rng.dirichlet(np.ones(10 * n))
    sides = rng.integers(200, 1500, (50, 2))
    return {
        "map": plots.plot_map(table, x="pca_1", y="pca_2", title="Principal components"),
        "tsne": plots.plot_map(table, x="tsne_1", y="tsne_2", title="t-SNE"),
        "counts": plots.plot_class_counts(classes),
        "sizes": plots.plot_sizes(make_images(width=sides[:, 0], height=sides[:, 1], n_bytes=rng.lognormal(10, 1, 50))),
        "examples": plots.plot_examples(make_exploration(labels), per_class=3),
        "colours": plots.plot_colours(classes),
        "differences": plots.plot_differences(classes),
        "variance": plots.plot_explained_variance(
            np.sort(ratio)[::-1], {"0.8": 5 * n, "0.9": 7 * n, "0.95": 8 * n, "0.99": None}
        ),
        "confusion": plots.plot_confusion(labels, make_shares(n)),
        "silhouettes": plots.plot_silhouettes(make_silhouette(labels)),
    }


def list_texts(figure: Figure) -> list[str]:
    """List what is written in a figure."""
    texts = cast(list[Text], figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible()))
    return [text.get_text() for text in texts if text.get_text()]


def list_drawn(figure: Figure) -> list[Text]:
    """List the texts that are drawn: numbers of ticks outside the view are not."""
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        margin = (high - low) * 1e-6
        texts += [
            axis.label,
            *(t.label1 for t in axis.get_major_ticks() if low - margin <= t.get_loc() <= high + margin),
        ]
    return [text for text in texts if text.get_text().strip()]


def get_axes(figure: Figure, label: str = "") -> Axes:
    """Get a figure's first axes, or those of its legend."""
    return next(axes for axes in figure.axes if axes.get_label() == label)


def get_points(axes: Axes) -> np.ndarray:
    """Get the positions of all points in the order they are drawn."""
    return np.concatenate([np.asarray(points.get_offsets()) for points in axes.collections])


def get_rows(figure: Figure) -> list[str]:
    """Get the names of a figure's rows, from top to bottom and left to right."""
    return [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]


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


def test_style_classes_tells_144_classes_apart() -> None:
    styles = list(plots.style_classes([str(number) for number in range(150)]).values())
    assert len(set(styles[:144])) == 144
    assert styles[144:] == styles[:6]
    assert all(
        one.colour != two.colour and one.marker != two.marker for one, two in zip(styles, styles[1:], strict=False)
    )
    assert all(style.is_filled for style in styles[:72])
    assert plots.style_classes(["b", "a", "b"]) == {"b": styles[0], "a": styles[1]}


@pytest.mark.parametrize("marker", plots.MARKERS)
def test_markers_have_an_inside_in_bokeh_and_in_matplotlib(marker: str) -> None:
    assert marker in MarkerType
    style = MarkerStyle(plots.MARKERS[marker])
    assert style.is_filled() and len(style.get_path().vertices) > 2


@pytest.mark.parametrize("page", [LIGHT, DARK])
def test_colours_are_seen_on_light_and_dark_pages(page: str) -> None:
    assert min(compute_contrast(colour, page) for colour in COLOURS) > 1.6


@pytest.mark.parametrize("vision", VISIONS)
def test_colours_differ_for_the_colour_blind(vision: str) -> None:
    seen = [compute_lab(np.clip(np.array(VISIONS[vision]) @ linearize(colour), 0, 1)) for colour in COLOURS]
    distances = [np.linalg.norm(one - two) for number, one in enumerate(seen) for two in seen[:number]]
    # About 2.3 is just noticeable side by side (Mahy and others, 1994).
    assert min(distances) > 9


@pytest.mark.parametrize("n_points", [300, 5000], ids=["drawing", "image"])
def test_plot_map_draws_each_image_where_the_table_says(n_points: int) -> None:
    table = make_table(labels := list_labels(7), n_points)
    axes = get_axes(plots.plot_map(table, x="pca_1", y="pca_2", title="Map"))
    good = table.dropna()
    np.testing.assert_allclose(
        np.sort(get_points(axes), axis=0), np.sort(good[["pca_1", "pca_2"]].to_numpy(float), axis=0)
    )
    for label, style in plots.style_classes(labels).items():
        of_class = [part for part in axes.collections if to_hex(part.get_facecolor()[0]) == style.colour]
        drawn = np.concatenate([np.asarray(part.get_offsets()) for part in of_class])
        expected = good.loc[good["label"] == label, ["pca_1", "pca_2"]].to_numpy(float)
        np.testing.assert_allclose(drawn[drawn[:, 0].argsort()], expected[expected[:, 0].argsort()])
    assert {part.get_rasterized() for part in axes.collections} == {n_points > 2000}


def test_plot_map_draws_small_classes_last_and_none_all_at_once() -> None:
    labels = np.repeat(["large", "small", "tiny"], [4000, 40, 8])
    table = pd.DataFrame({"label": labels, "pca_1": np.arange(4048.0), "pca_2": 0.0})
    axes = get_axes(plots.plot_map(table, x="pca_1", y="pca_2", title="Map"))
    drawn = labels[get_points(axes)[:, 0].astype(int)]
    turns = np.split(drawn, np.flatnonzero((drawn[1:] == "large") & (drawn[:-1] == "tiny")) + 1)
    assert len(turns) == 8
    for turn in turns:
        np.testing.assert_array_equal(turn, np.repeat(["large", "small", "tiny"], [500, 5, 1]))


@pytest.mark.parametrize("n", [1, 5, 24, 130])
def test_plot_map_names_all_classes_and_keeps_its_size(n: int) -> None:
    labels = list_labels(n)
    figure = plots.plot_map(make_table(labels, 5 * n + 20), x="pca_1", y="pca_2", title="Map")
    legend = get_axes(figure, "legend")
    styles = plots.style_classes(labels)
    assert [text.get_text() for text in legend.texts] == [
        tidy_label(label, n_characters=30 if n <= 30 else 24) for label in labels
    ]
    for marker, style in zip(legend.collections, styles.values(), strict=True):
        assert isinstance(marker, PathCollection)
        colours = marker.get_facecolor() if style.is_filled else marker.get_edgecolor()
        assert to_hex(colours[0]) == style.colour
        assert style.is_filled == bool(len(marker.get_facecolor()))
    inches = get_axes(figure).get_position().size * figure.get_size_inches()
    np.testing.assert_allclose(inches, [6.4, 5.0])


def test_plot_map_leaves_absent_classes_out_of_the_legend_but_keeps_styles() -> None:
    table = make_table(["a", "b", "c"], 50)
    table.loc[table["label"] == "b", "pca_1"] = np.nan
    legend = get_axes(plots.plot_map(table, x="pca_1", y="pca_2", title="Map"), "legend")
    assert [text.get_text() for text in legend.texts] == ["a", "c"]
    assert to_hex(legend.collections[1].get_facecolor()[0]) == plots.style_classes(["a", "b", "c"])["c"].colour


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
    axes = get_axes(plots.plot_map(table, x=f"{columns}_1", y=f"{columns}_2", title="Map", **labels))  # type: ignore[arg-type]
    assert (axes.get_xlabel(), axes.get_ylabel()) == expected
    assert n_ticks is None or len(axes.get_xticks()) == n_ticks


def test_plot_class_counts_sorts_bars_and_tells_failures() -> None:
    classes = pd.DataFrame({"n_images": [5, 12345, 5, 40], "n_ok": [5, 12345, 5, 30]}, index=["b", "c", "a", "d"])
    figure = plots.plot_class_counts(classes)
    assert get_rows(figure) == ["c", "d", "a", "b"]
    good, failed = get_bars(figure)[:4], get_bars(figure)[4:]
    assert [bar[:2] for bar in good] == [(0, 12345), (0, 30), (0, 5), (0, 5)]
    assert [bar[:2] for bar in failed] == [(12345, 0), (30, 10), (5, 0), (5, 0)]
    assert {bar[2] for bar in good}.isdisjoint({bar[2] for bar in failed})
    assert "12,345" in list_texts(figure)
    assert "12,395 images in 4 classes; orange: 10 that could not be read" in list_texts(figure)


def test_plot_differences_shows_means_errors_and_ranges() -> None:
    classes = make_classes(labels := ["a", "b", "c"])
    figure = plots.plot_differences(classes)
    by_mean = classes.loc[["a", "c"]].sort_values("mean_squared_difference", ascending=False)
    assert get_rows(figure) == [*by_mean.index, labels[1]]
    np.testing.assert_allclose(
        [bar[:2] for bar in get_bars(figure)][:2], np.c_[by_mean["pair_q05"], by_mean["pair_q95"] - by_mean["pair_q05"]]
    )
    (axes,) = figure.axes
    dots = next(line for line in axes.lines if line.get_marker() == "o")
    np.testing.assert_allclose(np.asarray(dots.get_xdata())[:2], by_mean["mean_squared_difference"])
    (whiskers,) = axes.collections
    ends = [path.vertices[:, 0] for path in whiskers.get_paths()][:2]
    np.testing.assert_allclose(np.diff(ends)[:, 0], 2 * by_mean["standard_error"])
    assert [text.get_text() for text in axes.texts] == ["–"]


def test_plot_silhouettes_sorts_and_marks_what_is_below_zero() -> None:
    figure = plots.plot_silhouettes({"mean": -0.126, "by_class": {"a": -0.5, "b": None, "c": 0.75}})
    assert get_rows(figure) == ["c", "a", "b"]
    (_, good, blue), (_, bad, orange), _ = get_bars(figure)
    assert (good, bad) == (0.75, -0.5) and blue != orange
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.75", "−0.50", "–"]
    assert any(text.startswith("Mean of all images −0.13.") for text in list_texts(figure))


def test_plot_colours_draws_shares_of_the_palette() -> None:
    classes = pd.DataFrame({"palette": [f"#F0F0F0 0.712, {INK} 0.103", ""]}, index=["apple", "none"])
    bars = get_bars(figure := plots.plot_colours(classes))
    np.testing.assert_allclose([bar[:2] for bar in bars[:2]], [(0, 0.712), (0.712, 0.103)])
    assert bars[0][2] == "#f0f0f0"
    # A pixel's colour that is the ink's must not follow the page's text.
    assert bars[1][2] != INK and max(abs(np.subtract(to_rgb(bars[1][2]), to_rgb(INK)))) < 2 / 255
    assert get_rows(figure) == ["apple", "none"]


def test_plot_explained_variance_marks_where_the_curve_reaches_the_shares() -> None:
    n_components = {"0.8": 3, "0.9": 4, "0.95": 4, "0.99": None}
    (axes,) = (figure := plots.plot_explained_variance([0.5, 0.2, 0.15, 0.1, 0.02], n_components)).axes
    curve = axes.lines[0]
    np.testing.assert_allclose(np.asarray(curve.get_ydata()), [0, 0.5, 0.7, 0.85, 0.95, 0.97])
    assert curve.get_drawstyle() == "steps-post"
    dots = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(sorted(map(tuple, dots)), [(3, 0.8), (4, 0.9), (4, 0.95)])
    assert {"80 %: 3 components", "95 %: 4 components", "99 %: more than are known"} <= set(list_texts(figure))


@pytest.mark.parametrize("n", [5, 40], ids=["with numbers", "with a scale"])
def test_plot_confusion_shades_by_share(n: int) -> None:
    axes = get_axes(figure := plots.plot_confusion(list_labels(n), shares := make_shares(n)))
    image = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(image[..., 3] ** 2, np.nan_to_num(shares))
    numbers = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    expected = {place: f"{100 * share:.0f}" for place, share in np.ndenumerate(shares) if share >= 0.005}
    assert numbers == (expected if n == 5 else {})
    assert ("100 %" in list_texts(figure)) == (n == 40)


def test_plot_sizes_counts_every_image_that_could_be_read() -> None:
    images = make_images(width=[100, 300, pd.NA], height=[200, 250, pd.NA], n_bytes=[1_000, 2_500_000, 40])
    sizes, sides = (figure := plots.plot_sizes(images)).axes
    assert [axes.patches[0].get_data().values.sum() for axes in (sizes, sides)] == [3, 2]  # type: ignore[attr-defined]
    assert (sizes.get_xscale(), sides.get_xscale()) == ("log", "linear")
    assert "median 200 × 225 px, 200 to 300 px" in list_texts(figure)
    assert "median 1 kB, 40 B to 2.5 MB" in list_texts(figure)


def test_plot_sizes_of_equal_images() -> None:
    figure = plots.plot_sizes(make_images(width=[100] * 4, height=[100] * 4, n_bytes=[5_100] * 4))
    for axes, tick, note in zip(figure.axes, ("5.1 kB", "100 px"), ("all 5.1 kB", "all 100 × 100 px"), strict=True):
        np.testing.assert_array_equal(axes.patches[0].get_data().values, [4])  # type: ignore[attr-defined]
        assert [label.get_text() for label in axes.get_xticklabels()] == [tick]
        assert note in list_texts(figure)


def test_plot_examples_chooses_pictures() -> None:
    exploration = make_exploration(["a", "b"])
    (axes,) = plots.plot_examples(exploration, per_class=3).axes
    order = list(exploration.classes["n_images"].sort_values(ascending=False).index)
    assert [text.get_text() for text in axes.texts] == order
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
    figure = plots.plot_examples(exploration, per_class=1)
    names = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert names == list(exploration.classes["n_images"].sort_values(ascending=False, kind="stable").index[:40])
    assert "The largest classes first; 90 smaller classes are not shown" in list_texts(figure)


EMPTY = make_classes(["a"]).iloc[:0]


@pytest.mark.parametrize(
    ("figure", "reason"),
    [
        (lambda: plots.plot_class_counts(EMPTY), "There are no classes to show."),
        (lambda: plots.plot_colours(EMPTY), "There are no classes to show."),
        (lambda: plots.plot_differences(EMPTY), "No class has two images that could be read."),
        (
            lambda: plots.plot_differences(make_classes(["a"]).assign(mean_squared_difference=np.nan)),
            "No class has two images that could be read.",
        ),
        (lambda: plots.plot_silhouettes({"mean": None, "by_class": {}}), "There are no classes to show."),
        (lambda: plots.plot_confusion([], []), "There are no classes to show."),
        (lambda: plots.plot_explained_variance([], {}), "No component is known."),
        (lambda: plots.plot_sizes(make_images(width=[], height=[], n_bytes=[])), "There are no images."),
        (
            lambda: plots.plot_map(make_table(["a"], 3).assign(pca_1=np.nan), x="pca_1", y="pca_2", title="Map"),
            "No image has a position.",
        ),
        (
            lambda: plots.plot_examples(cast(Exploration, SimpleNamespace(classes=EMPTY)), per_class=2),
            "There are no classes to show.",
        ),
    ],
    ids=[
        "counts",
        "colours",
        "no class",
        "no pair",
        "silhouettes",
        "confusion",
        "variance",
        "sizes",
        "map",
        "examples",
    ],
)
def test_figures_without_data_say_so(figure: Any, reason: str) -> None:
    drawn = figure()
    assert reason in list_texts(drawn) and not drawn.axes
    assert reason in plots.render_svg(drawn)


@pytest.mark.parametrize("n", [1, 5, 24, pytest.param(130, marks=pytest.mark.slow)])
def test_text_is_neither_cut_off_nor_overlapping(n: int) -> None:
    for name, figure in plot_all(n).items():
        # Names of axes are placed when they are drawn, for the dots per inch that then hold.
        plots.render_png(figure, dpi=int(figure.dpi))
        renderer = FigureCanvasAgg(figure).get_renderer()
        shown = list_drawn(figure)
        with quiet():
            boxes = np.array([text.get_window_extent(renderer).extents for text in shown])
        width, height = figure.bbox.size
        assert (boxes[:, :2] >= -0.5).all() and (boxes[:, 2] <= width + 0.5).all(), name
        assert (boxes[:, 3] <= height + 0.5).all(), name
        # Boxes are a little larger than the letters in them.
        low, high = boxes[:, :2] + 1.1, boxes[:, 2:] - 1.1
        overlap = (low[:, None] < high[None]).all(2) & (low[None] < high[:, None]).all(2)
        pairs = [(shown[i].get_text(), shown[k].get_text()) for i, k in np.argwhere(np.triu(overlap, 1))]
        assert pairs == [], name


def test_more_classes_than_a_figure_holds_are_counted() -> None:
    classes = make_classes([f"class {number:04d}" for number in range(320)])
    figure = plots.plot_class_counts(classes)
    assert len(get_rows(figure)) == 300
    assert any("The first 300 of 320 classes." in text for text in list_texts(figure))
    table = make_table(list(classes.index), 1000)
    legend = get_axes(plots.plot_map(table, x="pca_1", y="pca_2", title="Map"), "legend")
    assert len(legend.texts) == 300 and legend.texts[-1].get_text() == "… and 21 more"


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
def test_render_png_has_the_dots_asked_for_on_white(dpi: int) -> None:
    figure = plots.plot_class_counts(make_classes(["a", "苹果"]))
    with Image.open(io.BytesIO(plots.render_png(figure, dpi=dpi))) as image:
        np.testing.assert_allclose(image.size, figure.get_size_inches() * dpi, atol=1)
        np.testing.assert_allclose(image.info["dpi"], dpi, rtol=0.01)
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
        assert not {"Software", "Creation Time"} & set(image.info)


def test_render_png_stays_within_what_can_be_drawn() -> None:
    figure = Figure(figsize=(1, 200))
    with Image.open(io.BytesIO(plots.render_png(figure, dpi=600))) as image:
        assert 60_000 < image.height < 65_536


SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


@pytest.mark.parametrize("n", [1, 24, 130])
def test_render_svg_is_a_part_of_a_page(n: int) -> None:
    taken: set[str] = set()
    for name, figure in plot_all(n).items():
        svg = plots.render_svg(figure, label=f'{name} "of" <classes> & more')
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
    root = ElementTree.fromstring(plots.render_svg(plots.plot_differences(make_classes(["a", "b", "c"]))))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert f"max-width:{width * 96 / 72:.0f}px" in root.attrib["style"]
    assert all("fill: " in text.attrib["style"] for text in root.iter(SVG + "text"))
    for path in root.iter(SVG + "path"):
        numbers = np.array(re.findall(r"-?[\d.]+", path.get("d", "")), float).reshape(-1, 2)
        covers = len(numbers) and (np.ptp(numbers, axis=0) > [width - 1, height - 1]).all()
        assert not covers or "fill: none" in path.get("style", "")


@pytest.mark.parametrize("label", HOSTILE)
def test_render_svg_writes_hostile_names_as_text(label: str) -> None:
    svg = plots.render_svg(plots.plot_class_counts(make_classes([label])), label=label)
    root = ElementTree.fromstring(svg)
    assert tidy_label(label) in [element.text for element in root.iter(SVG + "text")]
    assert root.get("aria-label") == tidy_label(label)
    assert "<script" not in svg and "<image" not in svg


def test_render_svg_is_reproducible_also_in_threads() -> None:
    def render(number: int) -> str:
        return plots.render_svg(plots.plot_class_counts(make_classes(list_labels(24 + number % 3))), label="Counts")

    alone = [render(number) for number in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, range(6))) == alone
    assert alone[0] == alone[3] != alone[1]


def test_render_svg_names_a_figure_by_its_title() -> None:
    svg = plots.render_svg(plots.plot_silhouettes(make_silhouette(["a", "b"])))
    assert ElementTree.fromstring(svg).get("aria-label") == "Silhouette of each class"


def test_a_hundred_thousand_points_make_a_small_svg() -> None:
    table = make_table(list_labels(130), 100_000)
    assert len(plots.render_svg(plots.plot_map(table, x="pca_1", y="pca_2", title="Map"))) < 1_500_000


def test_plots_leave_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    for figure in plot_all(5).values():
        plots.render_png(figure, dpi=50)
        plots.render_svg(figure)
    assert dict(matplotlib.rcParams) == before
    assert to_rgba(before["text.color"]) == (0, 0, 0, 1)


#: What a user's matplotlibrc may hold; with any of these lines alone the figures would look different, or fail.
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


def draw_all(n: int) -> dict[str, tuple[bytes, str]]:
    """Draw every figure as PNG and as SVG."""
    return {name: (plots.render_png(figure, dpi=60), plots.render_svg(figure)) for name, figure in plot_all(n).items()}


def test_figures_are_the_same_whatever_the_users_matplotlibrc() -> None:
    import matplotlib

    expected = draw_all(5)
    with matplotlib.rc_context(MATPLOTLIBRC):
        found = draw_all(5)
    assert [name for name in expected if found[name] != expected[name]] == []


def test_matplotlib_loads_with_a_wrong_backend_and_keeps_a_right_one(tmp_path: Path) -> None:
    code = (
        "import os; from fruitdask import plots; plots.load_matplotlib(); import matplotlib; "
        "print(matplotlib.get_backend(), os.environ['MPLBACKEND'])"
    )
    for backend, used in (("nonsense", "agg"), ("SVG", "svg")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"MPLBACKEND": backend, "MPLCONFIGDIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.stdout.lower().split() == [used, backend.lower()], done.stderr


def test_matplotlibrc_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe")
    code = "from fruitdask import plots\ntry: plots.load_matplotlib()\nexcept Exception as e: print(type(e).__name__, e)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("ConfigError matplotlib cannot be imported: 'utf-8' codec can't decode")
