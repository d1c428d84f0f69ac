"""What all figures share: ink, type, axes, and a layout in inches that leaves nothing to chance."""

from __future__ import annotations

import os
import sys
import threading
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from fruitdask.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

Colour: TypeAlias = str | tuple[str, float]

#: Text and lines. ``render_svg`` turns it into the colour of the page's text, wherever it appears.
INK = "#1b1d21"
MUTED: Colour = (INK, 0.68)
FAINT: Colour = (INK, 0.28)
HAIRLINE: Colour = (INK, 0.12)
#: Of Okabe and Ito's colours: for what is shown, and for what went wrong.
ACCENT, ALARM = "#0072b2", "#d55e00"
#: Around each figure, in inches, and the height of title and note.
MARGIN, HEADER = 0.12, 0.56
#: Type sizes in points.
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 11.0, 9.0, 8.0
_POINTS_PER_INCH = 72.0
#: A browser's fonts are seldom wider than matplotlib's own, but some are.
_SLACK = 1.04
#: Warning filters and the settings of matplotlib belong to the process; one thread at a time may change them.
_LOCK = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Measure or draw text, one thread at a time, without warnings of glyphs that a font lacks."""
    with _LOCK, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ ")
        yield


def load_matplotlib() -> None:
    """Import matplotlib. No figure here needs the backend of MPLBACKEND, so a wrong name there is not an error."""
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"matplotlib cannot be imported: {error}; correct or delete the file matplotlibrc in this folder or in the folder of "
            "matplotlib's settings"
        ) from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


@contextmanager
def standard_settings() -> Iterator[None]:
    """Use matplotlib's own defaults, so that figures look the same whatever the user's matplotlibrc says."""
    load_matplotlib()
    from matplotlib import style

    with quiet(), style.context("default"):
        yield


def start_figure(width: float, height: float, *, title: str, note: str = "") -> Figure:
    """Start a figure with a title and a line that says how to read it."""
    from matplotlib.figure import Figure

    title, note = tidy_label(title, n_characters=90), tidy_label(note, n_characters=200)
    needed = max(measure_width([title], size=TITLE_SIZE, weight="bold"), measure_width([note], size=SMALL_SIZE))
    figure = Figure(figsize=(max(width, needed + 2 * MARGIN), height), label=title)
    write(figure, MARGIN, 0.24, title, size=TITLE_SIZE, weight="bold")
    write(figure, MARGIN, 0.42, note, size=SMALL_SIZE, color=MUTED)
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes with thin lines at the left and at the bottom."""
    full_width, full_height = figure.get_size_inches()
    bottom = full_height - top - height
    axes = figure.add_axes(
        (left / full_width, bottom / full_height, width / full_width, height / full_height), facecolor="none"
    )
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), edgecolor=FAINT, linewidth=0.6)
    axes.tick_params(which="both", color=FAINT, labelcolor=MUTED, labelsize=SMALL_SIZE, length=3, width=0.6, pad=3)
    axes.minorticks_off()
    axes.grid(False)
    axes.set_axisbelow(True)
    return axes


def hide_axes(axes: Axes) -> None:
    """Leave only what is drawn."""
    axes.spines[:].set_visible(False)
    axes.set(xticks=[], yticks=[])


def write(target: Figure | Axes, x: float, y: float, text: str, **properties: Any) -> Text:
    """Write plain text: no formula is read into it."""
    from matplotlib.figure import Figure

    if isinstance(target, Figure):
        width, height = target.get_size_inches()
        x, y = x / width, 1 - y / height
    style: dict[str, Any] = {"size": TEXT_SIZE, "color": INK, "parse_math": False}
    return target.text(x, y, text, **style | properties)


def tidy_label(label: str, *, n_characters: int = 34) -> str:
    """Make a name fit into a line."""
    text = "".join(character if character.isprintable() else " " for character in str(label))
    if sum(map(_count_cells, text)) <= n_characters:
        return text
    tail = _cut(text[::-1], n_characters // 2)[::-1].lstrip()
    return f"{_cut(text, n_characters - 1 - n_characters // 2).rstrip()}…{tail}"


def measure_width(texts: Iterable[str], *, size: float, weight: str = "normal") -> float:
    """Measure how wide text will be."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    widest = 0.0
    with quiet():
        for text in texts:
            width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
            # The box drawn for a missing East Asian character is about half as wide as the character.
            width += 0.5 * size * sum(_count_cells(character) - 1 for character in text)
            widest = max(widest, width)
    return widest * _SLACK / _POINTS_PER_INCH


def plot_nothing(title: str, reason: str) -> Figure:
    """Make a figure that says why there is nothing to see."""
    return start_figure(4.0, HEADER, title=title, note=reason)


def _count_cells(character: str) -> int:
    """Count the cells that a character takes in a line: two where it is a wide East Asian one."""
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cut(text: str, n_cells: int) -> str:
    """Cut text after so many cells."""
    for end, character in enumerate(text):
        n_cells -= _count_cells(character)
        if n_cells < 0:
            return text[:end]
    return text
