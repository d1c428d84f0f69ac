"""What all figures share: style, title and note, and a size that follows from the content."""

from __future__ import annotations

import os
import sys
import threading
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

from fruitdask.errors import ConfigError
from fruitdask.report.figures.fonts import list_families, quiet_search
from fruitdask.report.figures.styles import FAINT, HAIRLINE, INK, MUTED, SMALL_SIZE, TEXT_SIZE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

#: In inches: around figures and between axes, and the height of title and note.
_MARGIN, _HEADER = 0.12, 0.46
_TICKS = {"color": FAINT, "labelcolor": MUTED, "labelsize": SMALL_SIZE}
_TICKS |= {"major.size": 3, "major.width": 0.6, "minor.size": 0}
#: Some fonts of browsers are wider than matplotlib's own.
_SLACK = 1.04
#: Added to matplotlib's defaults. Names of classes are plain text, never formulas.
_STYLE: dict[str, Any] = {
    "text.color": INK,
    "text.parse_math": False,
    "font.size": TEXT_SIZE,
    "axes.facecolor": "none",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.labelsize": SMALL_SIZE,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": TEXT_SIZE,
    **{f"{axis}tick.{name}": value for axis in "xy" for name, value in _TICKS.items()},
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.borderaxespad": 1.0,
    "legend.handlelength": 1.0,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.6,
    # Unhinted text has the same width at any resolution.
    "text.hinting": "no_hinting",
    "svg.fonttype": "none",
    "svg.hashsalt": "fruitdask",
}
#: Warning filters and the settings of matplotlib are global: only one thread at a time may change them.
_LOCK = threading.RLock()


def load_matplotlib() -> None:
    """Import matplotlib, ignoring a wrong MPLBACKEND, because no figure here needs a backend."""
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"matplotlib cannot be imported: {error}; correct or delete the file matplotlibrc in this folder or in the "
            "folder of matplotlib's settings"
        ) from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


@contextmanager
def standard_settings() -> Iterator[None]:
    """Draw in one style regardless of the user's matplotlibrc, without warnings about missing glyphs."""
    load_matplotlib()
    from matplotlib import style

    named = _STYLE | {"font.family": list_families()}
    with _LOCK, quiet_search(), warnings.catch_warnings(), style.context(["default", named]):
        warnings.filterwarnings("ignore", message=r"Glyph \d+ ")
        yield


def start_figure(title: str, note: str = "") -> Figure:
    """Start a figure with a title and a line on how to read it; add axes, then call ``fit_figure``."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import ScaledTranslation

    title, note = tidy_label(title, n_characters=90), tidy_label(note, n_characters=200)
    figure = Figure(label=title)
    figure.set_layout_engine("constrained", w_pad=_MARGIN, h_pad=_MARGIN, wspace=0, hspace=0)
    upper, lower = (
        figure.transFigure + ScaledTranslation(_MARGIN, -top, figure.dpi_scale_trans) for top in (0.24, 0.42)
    )
    figure.text(0, 1, title + pad_label(title), transform=upper, size=11, weight="bold")
    figure.text(0, 1, note + pad_label(note), transform=lower, size=SMALL_SIZE, color=MUTED)
    return figure


def fit_figure(figure: Figure, *, width: float = 0.0, height: float = 0.0) -> Figure:
    """Set the total width and the height of a row of axes in inches; labels around them come on top."""
    # Labels take the same inches in a figure of any size, so the slowest step, the layout, is done once in a large one.
    wide, high = width + 12.0, height + 20.0
    _lay_out(figure, wide, high)
    slots = [axes.get_position(original=True) for axes in figure.axes]
    around = wide * (1 - sum(slot.width for slot in slots)) if slots else 0.0
    above = high * (1 - max(slot.height for slot in slots)) if slots else _HEADER + _MARGIN
    texts = [*figure.texts, *figure.legends]
    widest = _SLACK * max(text.get_window_extent().width for text in texts) / figure.dpi
    total_width, total_height = max(width + around, widest + 2 * _MARGIN), height + above
    inner = (total_width - around) / max(len(slots), 1)
    for number, (axes, slot) in enumerate(zip(figure.axes, slots, strict=True)):
        left = slot.x0 * wide - number * (slot.width * wide - inner)
        bottom = slot.y0 * high
        axes.set_position((left / total_width, bottom / total_height, inner / total_width, height / total_height))
    figure.set_size_inches(total_width, total_height)
    figure.set_layout_engine(None)
    return figure


def _lay_out(figure: Figure, width: float, height: float) -> None:
    """Lay out a figure of that size below its title and note."""
    figure.set_size_inches(width, height)
    engine = cast("ConstrainedLayoutEngine", figure.get_layout_engine())
    engine.set(rect=(0, 0, 1, 1 - _HEADER / height))
    if figure.axes:
        engine.execute(figure)


def plot_nothing(title: str, reason: str) -> Figure:
    """Return a figure that says why there is nothing to show."""
    return fit_figure(start_figure(title, reason))


def tidy_label(label: str, *, n_characters: int = 34) -> str:
    """Shorten a name to one line."""
    text = "".join(character if character.isprintable() else " " for character in str(label))
    if count_cells(text) <= n_characters:
        return text
    tail = _cut(text[::-1], n_characters // 2)[::-1].lstrip()
    return f"{_cut(text, n_characters - 1 - n_characters // 2).rstrip()}…{tail}"


def name_rows(labels: Iterable[str], *, n_characters: int) -> list[str]:
    """Return tick labels, which end at the axes."""
    names = [tidy_label(label, n_characters=n_characters) for label in labels]
    return [pad_label(name) + name for name in names]


def pad_label(text: str) -> str:
    """Return spaces for the extra width that wide characters have in a browser."""
    return "\u2002" * (count_cells(text) - len(text))


def count_cells(text: str) -> int:
    """Count the cells of a text: two for each wide East Asian character."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _cut(text: str, n_cells: int) -> str:
    """Cut text after a number of cells."""
    while count_cells(text) > n_cells:
        text = text[:-1]
    return text
