"""Renders figures and the page from stored results; needs neither a cluster nor images."""

import html
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pandas as pd

from fruitdask import report, store
from fruitdask.analysis.duplicates import choose_groups
from fruitdask.core.config import Config
from fruitdask.core.storage import Location, exists, explained
from fruitdask.errors import OutputError
from fruitdask.pipeline.inputs import dump_config, open_output
from fruitdask.report import ReportData
from fruitdask.report.sections.data import MAX_GROUPS, MAX_LISTED
from fruitdask.store.exploration import (
    Exploration,
    list_unreadable,
    open_exploration,
    read_classes,
    read_groups,
    read_sizes,
)

_FRAME_HEIGHT_PX = 800
#: Maximum number of images whose sizes are drawn; if there are more, an even sample is drawn.
_MAX_SIZES = 1_000_000
#: Images in a figure: more would hide each other.
_MAX_DRAWN = 200_000
#: The sections of the configuration that determine figures, page and the record of processing on it.
_SECTIONS = ("plots", "report", "privacy")


@dataclass(frozen=True)
class Report:
    """
    A rendered page; a notebook shows it in place.

    Parameters
    ----------
    location : Location
        The HTML file.
    """

    location: Location

    def read(self) -> str:
        """
        Read the page.

        Returns
        -------
        str
            HTML that needs no other file.

        Raises
        ------
        StorageError
            If it cannot be read.
        """
        with explained(self.location, "read"):
            content: bytes = self.location.fs.cat_file(self.location.path)
        return content.decode()

    def _repr_html_(self) -> str:
        """Show the page in a frame."""
        page = html.escape(self.read(), quote=True)
        style = f"width: 100%; height: {_FRAME_HEIGHT_PX}px; border: 0"
        return f'<iframe title="fruitdask report" srcdoc="{page}" style="{style}"></iframe>'


def render_report(config: Config) -> Report:
    """
    Render the figures and the page of a finished run or exploration again, from what it has stored.

    Parameters
    ----------
    config : Config
        Names the output folder, and determines how figures and page look.

    Returns
    -------
    Report
        The page.

    Raises
    ------
    OutputError
        If there is no finished run or exploration.
    """
    output = open_output(config)
    with store.locked(output) if store.has_begun(output) else nullcontext():
        store.finish_erasing(output)
        render(config.model_copy(update={"report": config.report.model_copy(update={"enabled": True})}), output)
    return Report(output.child(store.PAGE))


def fetch_page(url: str, *, storage_options: Mapping[str, Any] | None = None) -> Path:
    """Return the page of some results as a file of this machine: a copy if they are elsewhere."""
    output = Location(url.rstrip("/") or "/", storage_options or {})
    location = output.child(store.PAGE)
    if not exists(location):
        found = (
            "results without a page; draw it with fruitdask report"
            if store.has_begun(output)
            else "no results; check the folder"
        )
        raise OutputError(f"{location.url}: expected the page of a run or an exploration, found {found}")
    if location.is_local:
        return Path(location.path)
    with NamedTemporaryFile("w", encoding="utf-8", prefix="fruitdask-", suffix=".html", delete=False) as file:
        file.write(Report(location).read())
    return Path(file.name)


def describe_rendering(config: Config, output: Location) -> dict[str, Any]:
    """Return what the figures and the page depend on, in addition to the run."""
    exploration = store.read_exploration_manifest(output)
    sections = dump_config(config)
    finished = exploration.finished if exploration is not None else None
    return {name: sections[name] for name in _SECTIONS} | {"exploration": finished}


def render(config: Config, output: Location) -> store.RunManifest | None:
    """Write the configured figures and page, and record that in the run's manifest."""
    manifest = _read_complete(output)
    data = _read_data(config, output, manifest) if config.plots.enabled or config.report.enabled else None
    if manifest is not None and manifest.presented is not None:
        manifest = manifest.begin_rendering()
        store.write_manifest(output, manifest)
    if data is not None:
        if config.plots.enabled:
            report.write_figures(output, data)
        if config.report.enabled:
            report.write_page(output, data)
    if manifest is not None:
        mark = describe_rendering(config, output)
        manifest = manifest.end_rendering(mark, {name: mark[name] for name in _SECTIONS})
        store.write_manifest(output, manifest)
    return manifest


def _read_complete(output: Location) -> store.RunManifest | None:
    """Read the manifest of a run that was completed."""
    manifest = store.read_run(output)
    return manifest if manifest is not None and manifest.is_complete else None


def _read_data(config: Config, output: Location, manifest: store.RunManifest | None) -> ReportData:
    """Read the stored results of a run, an exploration, or both."""
    is_run = manifest is not None
    exploration = _open_exploration(output)
    if not is_run and exploration is None:
        raise OutputError(
            f"{output.url}: expected a finished run or exploration, found none; use fruitdask run or fruitdask explore "
            "first"
        )
    results, n_hidden = None, 0
    if manifest is not None:
        ratio = manifest.pca.explained_variance_ratio if manifest.pca is not None else ()
        results, n_hidden = report.read_points(
            output,
            config.plots.components,
            ratio,
            max_points=max(_MAX_DRAWN, config.report.max_points),
            with_thumbnail=report.Thumbnails(exploration, max_bytes=0).paths,
        )
    return ReportData(
        config=config,
        manifest=manifest.dump() if manifest is not None else None,
        exploration=exploration,
        results=results,
        n_hidden=n_hidden,
        sizes=None if exploration is None else _read_sizes(output, exploration),
        failures=report.read_failures(output) if exploration is None or is_run else list_unreadable(output),
        quality=store.read_quality(output) if is_run else None,
        classifier=_read_classifier(output, manifest),
        predictions=_read_predictions(output),
        issues=store.read_table(output, store.ISSUES) if manifest is not None and manifest.issues else None,
    )


def _read_classifier(output: Location, manifest: store.RunManifest | None) -> dict[str, Any] | None:
    """Read the evaluation of the classifier, and whether it holds for the images as they are now."""
    report = store.read_json(output.child(store.CLASSIFIER_REPORT))
    if report is None or manifest is None:
        return None
    return {**report, "is_current": report.get("trained_on") == manifest.trained_on}


def _read_predictions(output: Location) -> pd.DataFrame | None:
    """Read the predictions for the images of an output, if there are any."""
    return store.read_table(output, store.PREDICTIONS) if exists(output.child(store.PREDICTIONS)) else None


def _open_exploration(output: Location) -> Exploration | None:
    """Open an exploration with the images that the page shows or lists."""
    summary = store.read_exploration_manifest(output)
    if summary is None or not summary.is_complete:
        return None
    codes, *groups = read_groups(output, read_classes(output).index)
    shown = [choose_groups(each, codes, n_groups=MAX_GROUPS, n_rows=MAX_LISTED) for each in groups]
    return open_exploration(output, np.concatenate(shown))


def _read_sizes(output: Location, exploration: Exploration) -> pd.DataFrame:
    """Read the sizes of images for histograms."""
    return read_sizes(output, n_images=exploration.summary["n_images"], max_images=_MAX_SIZES)
