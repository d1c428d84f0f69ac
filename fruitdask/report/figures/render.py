"""Renders figures: PNG for slides, SVG for the page."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.dom import minidom

from fruitdask.report.figures.canvas import standard_settings, tidy_label
from fruitdask.report.figures.fonts import BOXES, lacks_letters
from fruitdask.report.figures.styles import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: matplotlib refuses images of 65,536 pixels or more in either direction.
_MAX_PX = 65_000
#: Resolution of images inside an SVG.
_IMAGE_DPI = 144
_MAX_LABEL = 1000
_PX_PER_POINT = 96 / 72
#: References between parts of an SVG.
_REFERENCE = re.compile(r"(url\(#|^#)([^)]+)")
_USED = re.compile(r'(?:xlink:href="#|url\(#)([^")]+)')
_FAMILY = re.compile(r"font-family:[^;]*;?\s*")


@standard_settings()
def render_png(figure: Figure, *, dpi: int) -> bytes:
    """Render a figure as PNG."""
    buffer = io.BytesIO()
    dpi = min(dpi, int(_MAX_PX / max(figure.get_size_inches())))
    with _noted(figure):
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _noted(figure: Figure) -> Iterator[None]:
    """Add a note about missing letters, if any, below the title; only in a PNG, as browsers have their own fonts."""
    notes = figure.texts[1:2] if lacks_letters(figure) else []
    texts = [note.get_text() for note in notes]
    for note, text in zip(notes, texts, strict=True):
        note.set_text(f"{text.rstrip('.')}. {BOXES}" if text else BOXES)
        if note.get_window_extent().x1 > figure.bbox.x1:
            note.set_text(BOXES)
    yield
    for note, text in zip(notes, texts, strict=True):
        note.set_text(text)


@standard_settings()
def render_svg(figure: Figure, *, label: str = "") -> str:
    """Render a figure as inline SVG for an HTML page, with unique ids."""
    label = tidy_label(label or str(figure.get_label()), n_characters=_MAX_LABEL)
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, dpi=_IMAGE_DPI, metadata=metadata)
    text = buffer.getvalue()
    prefix = f"f{hashlib.sha256((label + text).encode()).hexdigest()[:10]}-"
    names = {name: prefix + name for name in _USED.findall(text)}
    with minidom.parseString(text.encode()) as document:
        (root,) = document.getElementsByTagName("svg")
        for element in list(root.getElementsByTagName("*")):
            _clean(element, names=names)
        width = float(root.getAttribute("viewBox").split()[2]) * _PX_PER_POINT
        for name in ("height", "version"):
            root.removeAttribute(name)
        style = f"max-width:{width:.0f}px;stroke-linejoin:round;stroke-linecap:butt"
        for name, value in {"width": "100%", "role": "img", "aria-label": label, "style": style}.items():
            root.setAttribute(name, value)
        return root.toxml()


def _clean(element: minidom.Element, *, names: Mapping[str, str]) -> None:
    """Make ids unique, and drop links out of the figure and useless elements."""
    parent = element.parentNode
    if element.tagName in ("metadata", "style") and parent is not None:
        parent.removeChild(element)
        return
    for name, value in element.attributes.items():
        if name == "id" and value not in names:
            element.removeAttribute(name)
        else:
            element.setAttribute(name, _clean_attribute(name, value, names=names))
    if element.tagName != "text":
        for child in [child for child in element.childNodes if child.nodeType != child.ELEMENT_NODE]:
            element.removeChild(child)


def _clean_attribute(name: str, value: str, *, names: Mapping[str, str]) -> str:
    """Rewrite the value of an attribute."""
    if name == "id":
        return names[value]
    if name == "xlink:href" and value.startswith("data:"):
        return "".join(value.split())
    if name == "style":
        value = _FAMILY.sub("", value)
    value = _REFERENCE.sub(lambda found: found[1] + names.get(found[2], found[2]), value)
    return " ".join(value.split()).replace(INK, "currentColor")
