"""The page that says what was found: one HTML file that needs nothing else, for people who never open Python."""

import base64
import hashlib
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fruitdask.core.config import Config
from fruitdask.report import figures, formats, sections
from fruitdask.report.figures import styles
from fruitdask.report.maps import Maps, build_maps, choose_axes
from fruitdask.report.plots import Plots, list_plots
from fruitdask.report.thumbnails import Thumbnails
from fruitdask.store.exploration import Exploration

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

_FOLDER = Path(__file__).parent
#: Characters of Base64 for pictures to check, examples, duplicates and the maps. With Bokeh's 1.3 MB, figures and
#: points, the page stays well under 10 MB.
_ISSUES_BYTES, _EXAMPLES_BYTES, _DUPLICATES_BYTES, _MAP_BYTES = 1_000_000, 2_000_000, 750_000, 3_000_000
#: How much larger than in print a figure may be on a desktop.
_ZOOM = 1.35
#: Sections by their anchor, in their order on the page.
_SECTIONS = {
    "summary": "Summary",
    "predictions": "Predictions",
    "check": "To check",
    "maps": "Map",
    "classes": "Classes",
    "examples": "Examples",
    "quality": "Quality",
    "classifier": "Classifier",
    "data": "Data",
    "record": "Record",
}


@dataclass(frozen=True, eq=False)
class ReportData:
    """The data of a report; sections without data are left out."""

    config: Config
    manifest: dict[str, Any] | None
    exploration: Exploration | None = field(repr=False)
    #: The table of all images with their coordinates, or of the images that are drawn.
    results: pd.DataFrame | None = field(repr=False)
    #: ``path``, ``label``, ``status``, ``error`` and ``attempts`` of the images that could not be used.
    failures: pd.DataFrame = field(repr=False)
    #: How well the features separate the classes.
    quality: dict[str, Any] | None = field(repr=False)
    #: Photographs to check; None without a list.
    issues: pd.DataFrame | None = field(default=None, repr=False)
    #: What cross-validation says of the classifier that was trained on these images.
    classifier: dict[str, Any] | None = field(default=None, repr=False)
    #: Labels that the classifier of another run predicts for these images.
    predictions: pd.DataFrame | None = field(default=None, repr=False)
    #: Sizes of the files of the images that were explored, or of an even sample; None if `exploration` has all images.
    sizes: pd.DataFrame | None = field(default=None, repr=False)
    #: Images with coordinates that are not in `results`.
    n_hidden: int = 0

    @cached_property
    def plots(self) -> Plots:
        """The figures that the data allow."""
        return list_plots(self)


def render_page(data: ReportData) -> str:
    """Render the page."""
    return _load_template().render(_build_context(data)).lstrip()


@cache
def _load_template() -> "Template":
    """Load the template of the page, whose compilation takes as long as several figures."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        lstrip_blocks=True,
    )
    # Bokeh's documents define a model where they name it first, so their keys must stay in order.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}
    environment.filters |= {
        name.removeprefix("format_"): value for name, value in vars(formats).items() if name.startswith("format_")
    }
    return environment.get_template("page.html")


def _build_context(data: ReportData) -> dict[str, Any]:
    """Build what the template shows."""
    views = _build_views(data)
    scripts = [_read_bokeh()] * bool(views["maps"]) + [(_FOLDER / "page.js").read_text(encoding="utf-8")]
    return {
        "title": sections.choose_title(data.config),
        "sections": {anchor: name for anchor, name in _SECTIONS.items() if views[anchor]},
        "palette": styles,
        "scripts": [_trust(script) for script in scripts],
        "script_hashes": [_hash_script(script) for script in scripts],
        "views": views,
    }


def _build_views(data: ReportData) -> dict[str, Any]:
    """Build the views of all sections; None for a section without data."""
    config, manifest, exploration, quality = data.config, data.manifest, data.exploration, data.quality
    counts = sections.count_images(manifest, data.results, exploration)
    return {
        "summary": sections.describe_summary(
            config, counts=counts, manifest=manifest, exploration=exploration, quality=quality
        ),
        "predictions": None if data.predictions is None else _describe_predictions(data.predictions, exploration),
        "check": None if data.issues is None else _describe_issues(data.issues, exploration),
        "maps": _describe_maps(data),
        "classes": sections.describe_classes(counts, exploration, quality),
        "examples": None if exploration is None else _describe_examples(exploration, config),
        "quality": None if quality is None else _describe_quality(quality, data),
        "classifier": None if data.classifier is None else _describe_classifier(data.classifier),
        "data": _describe_data(data),
        "record": {
            "performance": manifest and sections.describe_performance(manifest, n_images=counts.n_images),
            "protection": sections.describe_protection(config, manifest, exploration),
            "reproduce": sections.describe_reproduction(config, manifest, exploration),
        },
    }


def _describe_issues(issues: pd.DataFrame, exploration: Exploration | None) -> sections.View:
    """Describe the photographs to check."""
    thumbnails = Thumbnails(exploration, max_bytes=_ISSUES_BYTES, n_wanted=sections.count_pictured(issues["kind"]))
    return sections.describe_issues(issues, thumbnails)


def _describe_predictions(predictions: pd.DataFrame, exploration: Exploration | None) -> sections.View:
    """Describe predicted labels."""
    n_wanted = sections.count_pictured(predictions["label"])
    thumbnails = Thumbnails(exploration, max_bytes=_ISSUES_BYTES, n_wanted=n_wanted)
    return sections.describe_predictions(predictions, thumbnails)


def _describe_examples(exploration: Exploration, config: Config) -> sections.View | None:
    """Describe pictures of each class."""
    n_classes, per_class = len(exploration.classes), config.report.examples_per_class
    n_wanted = n_classes * (3 + sections.count_examples(n_classes, per_class))
    thumbnails = Thumbnails(exploration, max_bytes=_EXAMPLES_BYTES, n_wanted=n_wanted)
    return sections.describe_examples(exploration, thumbnails, per_class=per_class)


def _describe_classifier(report: dict[str, Any]) -> sections.View:
    """Describe what cross-validation says of a classifier."""
    probe = report["linear_probe"]
    shown = probe.get("confused", report["classes"])
    totals = np.array([probe["by_class"][name]["n_images"] for name in shown])
    shares = (np.array(probe["confusion"], float) / totals[:, np.newaxis]).tolist()
    figure = _draw(
        figures.plot_confusion(
            shown,
            shares,
            title="Predicted classes",
            columns="the predicted class",
            n_classes=len(report["classes"]),
        ),
        "Heat map: the class of an image in rows, the predicted classes in columns.",
    )
    return {**report, "confusion_figure": figure}


def _describe_quality(quality: dict[str, Any], data: ReportData) -> sections.View:
    """Describe the features and their quality."""
    drawn = {
        "confusion_figure": _draw(
            data.plots["neighbors"](),
            "Heat map: the class of an image in rows, the classes of its nearest neighbours in columns.",
        ),
        "variance_figure": quality.get("explained_variance")
        and _draw(
            data.plots["explained_variance"](),
            "Explained variance by number of components; the numbers of interest are in the table below.",
        ),
    }
    return sections.describe_quality(quality) | drawn | {"model": (data.manifest or {}).get("model")}


def _describe_data(data: ReportData) -> sections.View | None:
    """Describe the files: their sizes, duplicates, and what could not be used."""
    view: sections.View = {"failures": sections.describe_failures(data.failures), "duplicates": [], "sizes": []}
    if data.exploration is not None:
        images = data.exploration.images
        n_wanted = int(images[["duplicate_group", "near_duplicate_group"]].notna().sum().sum())
        thumbnails = Thumbnails(data.exploration, max_bytes=_DUPLICATES_BYTES, n_wanted=n_wanted)
        view["duplicates"] = sections.describe_duplicates(data.exploration, thumbnails)
        view["bytes_total"] = int(data.exploration.classes["bytes_total"].sum())
        sizes = images if data.sizes is None else data.sizes
        of = {"n_images": int(data.exploration.classes["n_images"].sum())}
        view["sizes"] = [
            _draw(figures.plot_sizes(sizes, parts=[part], **of), f"Histogram of the images: {part.lower()}.")
            for part in figures.SIZES
        ]
    return view if any(view.values()) else None


def _describe_maps(data: ReportData) -> Maps | None:
    """Describe the interactive maps."""
    if data.results is None:
        return None
    ratio = (data.manifest or {}).get("pca", {}).get("explained_variance_ratio", [])
    axes = choose_axes(list(data.results.columns), data.config.plots.components, ratio)
    thumbnails = Thumbnails(data.exploration, max_bytes=_MAP_BYTES)
    return (
        build_maps(
            data.results,
            axes,
            thumbnails=thumbnails,
            max_points=data.config.report.max_points,
            n_hidden=data.n_hidden,
        )
        if axes
        else None
    )


def _draw(figure: "Figure", label: str) -> Any:
    """Draw a figure into the page, with a label for screen readers; on a desktop it may be larger."""
    svg = figures.render_svg(figure, label=label)
    return _trust(re.sub(r"max-width:(\d+)px", lambda found: f"max-width:{int(found[1]) * _ZOOM:.0f}px", svg, count=1))


def _trust(text: str) -> Any:
    """Mark our own HTML, and figures, in which matplotlib has escaped all text."""
    from markupsafe import Markup

    return Markup(text)


def _read_bokeh() -> str:
    """Read the script that draws the maps."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="error").js_raw)


def _hash_script(script: str) -> str:
    """Hash a script, so that the page's policy lets the browser run it and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
