"""Opens the results of a finished run, given only their folder."""

from collections.abc import Mapping
from typing import Any

from fruitdask import store
from fruitdask.core.storage import Location
from fruitdask.errors import OutputError
from fruitdask.pipeline.results import RunResult


def open(url: str, storage_options: Mapping[str, Any] | None = None) -> RunResult:
    """
    Open the results of a finished run; needs neither its configuration nor its images.

    Parameters
    ----------
    url : str
        Folder or URL of the results.
    storage_options : Mapping[str, Any], optional
        Options of the fsspec file system.

    Returns
    -------
    RunResult
        The results, read on demand.

    Raises
    ------
    OutputError
        If the folder holds no results, only an exploration, or those of a run that is not finished.
    FormatError
        If a later version of fruitdask wrote it.
    DamageError
        If its manifest is damaged.
    StorageError
        If it cannot be read.

    Examples
    --------
    >>> import fruitdask
    >>> fruitdask.open("/nowhere")
    Traceback (most recent call last):
    fruitdask.errors.OutputError: /nowhere: expected the results of a run, found none; check the folder
    """
    output = Location(str(url).rstrip("/") or "/", storage_options or {})
    manifest = store.read_run(output)
    if manifest is None:
        is_explored = store.read_exploration_manifest(output) is not None
        found = "only an exploration; use fruitdask run" if is_explored else "none; check the folder"
        raise OutputError(f"{output.url}: expected the results of a run, found {found}")
    if not manifest.is_complete:
        raise OutputError(
            f"{output.url}: expected the results of a finished run, found one that is not finished; use fruitdask run "
            "with its configuration to resume it"
        )
    return RunResult(output, manifest.dump(), n_computed=0)
