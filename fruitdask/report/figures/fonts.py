"""Fonts for names in any script, where the system has them, and a note on a figure where it has none."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: matplotlib's own font, which has Latin, Greek, Cyrillic, Hebrew and Arabic.
_OWN = "DejaVu Sans"
#: Fonts of Linux, macOS and Windows for other scripts, in the order in which they are searched for a missing letter.
_OTHERS = re.compile(
    r"Noto Sans (CJK|SC|TC|JP|KR)|Source Han Sans|WenQuanYi|Droid Sans Fallback|PingFang|Hiragino (Sans|Kaku)|Heiti|"
    r"Apple SD Gothic|Microsoft (YaHei|JhengHei)|SimHei|Yu Gothic|Meiryo|MS Gothic|Malgun Gothic|Nanum Gothic|"
    r"Noto (Sans|Naskh) Arabic|Geeza Pro|"
    r"Noto Sans (Devanagari|Bengali|Tamil|Telugu|Thai|Ethiopic|Georgian|Armenian|Khmer|Lao|Myanmar)|"
    r"Nirmala UI|Leelawadee"
)
#: Added to the note of a figure in which letters are missing.
BOXES = "Boxes: this computer has no font for these letters."


@cache
def list_families() -> list[str]:
    """List matplotlib's own font, and the fonts of this computer for other scripts."""
    from matplotlib.font_manager import fontManager

    return [_OWN, *sorted({font.name for font in fontManager.ttflist if _is_taken(font.name)})]


def _is_taken(name: str) -> bool:
    """Whether a font is one for other scripts."""
    return _OTHERS.match(name) is not None and not name.endswith("Mono")


@contextmanager
def quiet_search() -> Iterator[None]:
    """Search fonts without warnings, such as one about missing bold letters."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def lacks_letters(figure: Figure) -> bool:
    """Whether a figure has letters that no font of this computer has."""
    from matplotlib.font_manager import fontManager, get_font
    from matplotlib.text import Text

    letters = {letter for text in figure.findobj(Text) for letter in text.get_text() if letter.isprintable()}
    for font in (font for name in list_families() for font in fontManager.ttflist if font.name == name):
        letters -= {letter for letter in letters if get_font(font.fname).get_char_index(ord(letter))}
        if not letters:
            return False
    return True
