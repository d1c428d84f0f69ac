"""The palette of figures, maps and page, and the styles of classes: colour, shape and filling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

#: Colour of text and lines. ``render_svg`` replaces it by the text colour of the page.
INK = "#1b1d21"
MUTED, FAINT, HAIRLINE = (INK, 0.68), (INK, 0.28), (INK, 0.12)
#: Sizes of type in points: of names and of numbers.
TEXT_SIZE, SMALL_SIZE = 9.0, 8.0
#: Colours of Okabe and Ito: one for data, one for failures. The light form of the first is for dark pages.
ACCENT, LIGHT_ACCENT, ALARM = "#0072b2", "#56b4e9", "#d55e00"
#: Colours of Okabe and Ito (2008), "Color Universal Design". A grey replaces their black, which would vanish on a dark
#: page, and a darker yellow theirs (#f0e442), which nearly vanishes on a white one: each has a contrast of at least 1.6
#: to both.
COLOURS = (ACCENT, "#e69f00", "#009e73", "#cc79a7", LIGHT_ACCENT, ALARM, "#777777", "#e0cc1a")
#: Shapes that can be filled or open: Bokeh's name, and matplotlib's marker that looks the same. Their number has no
#: factor in common with that of the colours, so that both change from class to class.
MARKERS: Mapping[str, str | tuple[int, int, float]] = MappingProxyType(
    {
        "circle": "o",
        "square": "s",
        "triangle": "^",
        "diamond": "d",
        "inverted_triangle": "v",
        "plus": "P",
        "star": "*",
        "hex": "h",
        "square_pin": (4, 1, 45),
    }
)


@dataclass(frozen=True)
class ClassStyle:
    """The style of the points of a class."""

    colour: str
    marker: str
    #: Whether the shape is filled; otherwise it is an outline.
    is_filled: bool


def style_classes(labels: Sequence[str]) -> dict[str, ClassStyle]:
    """Choose a style for each class."""
    markers = tuple(MARKERS)
    n_pairs = len(COLOURS) * len(markers)
    return {
        label: ClassStyle(
            colour=COLOURS[number % len(COLOURS)],
            marker=markers[number % len(markers)],
            is_filled=number // n_pairs % 2 == 0,
        )
        for number, label in enumerate(dict.fromkeys(labels))
    }
