"""Figures and the page, from what is stored: no cluster and no image is needed."""

import html
from dataclasses import dataclass
from typing import Any

from fruitdask import report, store
from fruitdask.config import Config
from fruitdask.errors import OutputError
from fruitdask.exploration import read_exploration
from fruitdask.pipeline.inputs import open_output
from fruitdask.report import PAGE, ReportData
from fruitdask.storage import Location, explained

_FRAME_HEIGHT_PX = 800


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
        """Show the page in a frame of its own."""
        page = html.escape(self.read(), quote=True)
        return f'<iframe title="fruitdask report" srcdoc="{page}" style="width: 100%; height: {_FRAME_HEIGHT_PX}px; border: 0"></iframe>'


def render_report(config: Config) -> Report:
    """
    Render the figures and the page of a finished run or exploration again, from what it has stored.

    Parameters
    ----------
    config : Config
        Names the output folder, and says what figures and page shall look like.

    Returns
    -------
    Report
        The page.

    Raises
    ------
    OutputError
        If nothing was finished there.
    """
    output = open_output(config)
    present(config.model_copy(update={"report": config.report.model_copy(update={"enabled": True})}), output)
    return Report(output.child(PAGE))


def present(config: Config, output: Location) -> None:
    """
    Write the figures and the page, as far as the configuration asks for them.

    Parameters
    ----------
    config : Config
        What they shall look like.
    output : Location
        The output folder.

    Raises
    ------
    OutputError
        If there is nothing to show.
    StorageError
        If something cannot be read or written.
    """
    if not (config.plots.enabled or config.report.enabled):
        return
    data = _read_data(config, output)
    if config.plots.enabled:
        report.write_figures(output, data)
    if config.report.enabled:
        report.write_page(output, data)


def _read_data(config: Config, output: Location) -> ReportData:
    """Read whatever a run or an exploration has left."""
    manifest = store.read_manifest(output)
    is_run = manifest is not None and manifest["status"] == "complete"
    exploration = read_exploration(output)
    if not is_run and exploration is None:
        raise OutputError(
            f"{output.url}: expected a finished run or exploration, found none; use fruitdask run or fruitdask explore first"
        )
    return ReportData(
        config=config,
        manifest=manifest if is_run else None,
        exploration=exploration,
        results=report.read_results(output) if is_run else None,
        failures=report.read_failures(output),
        quality=_read_quality(output) if is_run else None,
    )


def _read_quality(output: Location) -> dict[str, Any] | None:
    """Read what the features are worth; nothing where that was not asked for."""
    quality: dict[str, Any] | None = store.read_json(output.child(store.QUALITY))
    return quality
