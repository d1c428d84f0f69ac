"""Verifies an output folder: reads everything again, and compares what is stored twice.

Only the output folder is read. So two things cannot be checked: that the fingerprint is that of the input (it hashes
sizes and versions of files), and that features belong to their images.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from fruitdask import report, store
from fruitdask.core.config import ExploreConfig, QualityConfig, ReduceConfig
from fruitdask.core.progress import RunProgress, resolve_progress
from fruitdask.core.storage import Location, exists
from fruitdask.errors import DamageError, FruitdaskError, OutputError
from fruitdask.pipeline.repair import repair_faults, restore_manifest, shape_store
from fruitdask.pipeline.stored import StoredRun, Totals, check_components, check_partitions, read_components
from fruitdask.store import Fault
from fruitdask.store.exploration import check_exploration

#: Entries on the network that must agree in manifest and features; the engine may change after an interruption.
_SAME_OF_MODEL = ("name", "preprocessing", "input_px", "n_features")


@dataclass(frozen=True)
class Verification:
    """
    What is wrong with an output folder, and what is not done yet.

    Parameters
    ----------
    output : Location
        The output folder.
    faults : tuple[Fault, ...]
        What is wrong.
    notes : tuple[str, ...]
        What is not done yet or could not be checked.
    n_images : int
        Images whose features and outcomes were verified.
    n_partitions : int
        Verified partitions.
    is_repaired : bool
        Whether the folder was prepared for the next run.
    """

    output: Location
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = field(repr=False)
    n_images: int
    n_partitions: int
    is_repaired: bool

    @property
    def is_well(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    @property
    def can_be_mended(self) -> bool:
        """Whether a repair and the next run would fix everything."""
        return all(fault.remedy != "none" for fault in self.faults)


@dataclass
class _Findings:
    """What was found so far."""

    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    catalog: pd.DataFrame | None = None
    n_images: int = 0
    n_partitions: int = 0


def verify(
    output_url: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    repair: bool = False,
    progress: RunProgress | bool | None = None,
) -> Verification:
    """
    Read everything in an output folder again, and report what is damaged or inconsistent.

    Parameters
    ----------
    output_url : str
        Folder or URL of the results.
    storage_options : Mapping[str, Any], optional
        Options of the fsspec file system.
    repair : bool
        Delete or restore what is damaged, so that the next run computes only the damaged parts again.
    progress : RunProgress or bool, optional
        How to show progress; by default, only on a terminal and in a notebook. False shows none.

    Returns
    -------
    Verification
        What is wrong; for an unfinished run, in the finished part.

    Raises
    ------
    OutputError
        If there are no results, or another run is using the folder to be repaired.
    StorageError
        If the storage fails.
    """
    output, progress = Location(str(output_url).rstrip("/") or "/", storage_options or {}), resolve_progress(progress)
    with progress, store.locked(output) if repair and store.has_begun(output) else nullcontext():
        found = _verify(output, progress)
        faults = list(found.faults)
        if repair:
            repair_faults(output, faults)
            if any(fault.remedy == "restore" for fault in faults):
                # What was restored may reveal more faults.
                more = [fault for fault in _verify(output, progress).faults if fault not in faults]
                repair_faults(output, more)
                faults += more
    return Verification(output, tuple(faults), tuple(found.notes), found.n_images, found.n_partitions, repair)


def _verify(output: Location, progress: RunProgress) -> _Findings:
    """Check the run and the exploration, if they exist."""
    found = _Findings()
    progress.begin("Verifying")
    has_run = any(exists(output.child(name)) for name in (store.MANIFEST, store.FEATURES))
    has_exploration = any(exists(output.child(name)) for name in (store.EXPLORATION, store.EXPLORED_ARRAYS))
    if not (has_run or has_exploration):
        raise OutputError(
            f"{output.url}: expected the results of a run or an exploration, found none; check the folder"
        )
    found.faults += store.find_strays(output)
    manifest = _read_manifest(output, found) if has_run else None
    if manifest is not None and manifest.status == "erasing":
        found.notes.append("an erasure was interrupted; run again to finish it, then verify")
        return found
    if exists(output.child(store.STAGING)):
        found.faults.append(Fault(store.STAGING, "it is left over from an interrupted erasure", "delete"))
    if manifest is not None:
        _check_run(output, manifest, found, progress)
    if has_exploration or manifest is not None and _expects_exploration(manifest):
        progress.begin("Verifying the exploration")
        found.faults += _check_exploration(output, manifest, found)
    return found


def _read_manifest(output: Location, found: _Findings) -> store.RunManifest | None:
    """Read the manifest of the run, or restore it from the features."""
    faults = list(store.check_json(output, store.MANIFEST, "restore"))
    if not (faults or exists(output.child(store.MANIFEST))):
        faults = [Fault(store.MANIFEST, "it is missing", "restore")]
    if not faults:
        return store.read_run(output)
    manifest = restore_manifest(output)
    if manifest is None:
        faults = [Fault(fault.where, fault.what, "none") for fault in faults]
    found.faults += faults
    return manifest


def _check_run(output: Location, manifest: store.RunManifest, found: _Findings, progress: RunProgress) -> None:
    """Check a run, from its metadata to its results."""
    is_complete, committed = manifest.is_complete, store.list_committed(output)
    if not (is_complete or committed):
        found.notes.append("the run is not finished: no partition is done")
        return
    faults = list(store.check_store(output, **shape_store(manifest), can_restore=True, may_grow=not is_complete))
    found.faults += faults
    if faults:
        found.notes.append("features, outcomes and results were not read, because their metadata is damaged")
        return
    stored = store.open_store(output)
    if stored is None:
        raise OutputError(f"{output.url}: expected features, found none: another command is deleting them")
    found.faults += _compare_descriptions(manifest, stored.attrs)
    components, faults = None, []
    if is_complete and manifest.pca is not None:
        components, faults = read_components(output, n_features=stored["features"].shape[1])
    found.faults += faults
    catalog = _read_catalog(output, manifest, found)
    run = StoredRun(output, manifest, stored.arrays, frozenset(committed), components, catalog)
    found.faults += _check_marks(run, found.notes)
    totals = check_partitions(run, progress)
    found.faults += totals.faults
    found.n_images, found.n_partitions = totals.n_images, len(committed)
    if is_complete:
        _check_results(run, totals, found, progress)


def _read_catalog(output: Location, manifest: store.RunManifest, found: _Findings) -> pd.DataFrame | None:
    """Read the catalog; the outcomes of all images can restore it."""
    remedy: store.Remedy = "restore" if manifest.is_complete else "none"
    try:
        catalog = store.read_catalog(output)
    except DamageError as error:
        found.faults.append(Fault(store.CATALOG, store.describe_damage(error), remedy))
        return None
    if catalog is None:
        found.faults.append(Fault(store.CATALOG, "it is missing", remedy))
    # An interrupted run may have written its manifest, but not yet its catalog.
    if catalog is not None and len(catalog) < manifest.n_images and manifest.is_complete:
        what = f"expected {manifest.n_images:,} images, found {len(catalog):,}"
        found.faults.append(Fault(store.CATALOG, what, remedy))
        return None
    return catalog


def _compare_descriptions(manifest: store.RunManifest, attributes: dict[str, Any]) -> Iterator[Fault]:
    """Compare the manifest with the attributes of the features."""
    where = f"{store.FEATURES}/zarr.json"
    for name, theirs in attributes["fingerprint"].items():
        # After an erasure the manifest follows the input, and an interrupted run may have written the manifest only.
        may_differ = name == "catalog" and (manifest.erasures or not manifest.is_complete)
        if manifest.fingerprint.get(name) != theirs and not may_differ:
            yield Fault(where, f"the fingerprint of its {name} differs from {store.MANIFEST}", "none")
    for name in _SAME_OF_MODEL:
        if getattr(manifest.model, name) != attributes["model"].get(name):
            yield Fault(where, f"the {name} of its model differs from {store.MANIFEST}", "none")


def _check_marks(run: StoredRun, notes: list[str]) -> Iterator[Fault]:
    """Check that exactly the partitions of the run have outcomes."""
    missing = sorted(set(range(run.n_partitions)) - run.committed)
    if run.is_complete:
        for index in missing:
            yield Fault(store.name_outcomes(index), "it is missing", "compute", index)
    else:
        todo = f"{len(missing):,} of {run.n_partitions:,} partitions and the results" if missing else "the results"
        notes.append(f"the run is not finished: {todo} are still to be computed")
    for index in sorted(run.committed - set(range(run.n_partitions))):
        yield Fault(store.name_outcomes(index), "the run has no such partition", "delete")


def _check_results(run: StoredRun, totals: Totals, found: _Findings, progress: RunProgress) -> None:
    """Check what was computed from all partitions together."""
    output, manifest = run.output, run.manifest
    if totals.n_images == run.n_images:
        found.catalog = run.catalog
    if manifest.read_settings("quality", QualityConfig).enabled and not exists(output.child(store.QUALITY)):
        found.faults.append(Fault(store.QUALITY, "it is missing", "reduce"))
    found.faults += store.check_json(output, store.QUALITY, "reduce")
    found.faults += _check_issues(run)
    found.faults += _check_drawings(run)
    if not run.has_components:
        if exists(output.child(store.COMPONENTS)):
            found.faults.append(Fault(store.COMPONENTS, f"{store.MANIFEST} does not mention it", "delete"))
        return
    if any(fault.remedy == "compute" for fault in found.faults):
        found.notes.append(f"{store.COMPONENTS} was not compared with the features, because some are damaged")
        return
    if manifest.pca is not None and manifest.pca.fit.n_changed:
        found.notes.append(
            f"{store.COMPONENTS} was not compared with the features, because some were computed after it was fitted"
        )
        return
    if manifest.applied is not None:
        found.notes.append(f"{store.COMPONENTS} was not compared with the features: it is of {manifest.applied.output}")
        if run.components is not None and store.hash_arrays(output.child(store.COMPONENTS)) != manifest.applied.sha256:
            found.faults.append(Fault(store.COMPONENTS, f"it is not what {manifest.applied.output} has", "reduce"))
        return
    progress.begin("Verifying principal components")
    found.faults += check_components(run)


def _check_issues(run: StoredRun) -> Iterator[Fault]:
    """Check the list of photographs to check."""
    if run.manifest.issues is None:
        return
    try:
        counts = store.read_table(run.output, store.ISSUES)["kind"].value_counts().to_dict()
    except FruitdaskError as error:
        yield Fault(store.ISSUES, store.describe_damage(error), "reduce")
        return
    if counts != run.manifest.issues.by_kind:
        yield Fault(store.ISSUES, f"it does not have the rows that {store.MANIFEST} counts", "reduce")
    yield from store.check_digests(run.output, run.manifest.digests, (store.ISSUES_CSV,), "reduce")


def _check_drawings(run: StoredRun) -> Iterator[Fault]:
    """Check that the rendered page and figures exist; their content is not compared."""
    manifest = run.manifest
    drawn = manifest.presented
    if drawn is None:
        return
    names = [store.PAGE] if drawn.get("report", {}).get("enabled") else []
    if drawn.get("plots", {}).get("enabled"):
        has_components = manifest.pca is not None
        figures = report.list_figures(
            n_components=manifest.pca.n_components if manifest.pca is not None else 0,
            has_tsne=has_components and manifest.read_settings("reduce", ReduceConfig).tsne.enabled,
            has_exploration=drawn.get("exploration") is not None,
            has_quality=manifest.read_settings("quality", QualityConfig).enabled,
        )
        names += map(store.name_figure, figures)
    for name in names:
        if not exists(run.output.child(name)):
            yield Fault(name, "it is missing", "draw")


def _expects_exploration(manifest: store.RunManifest) -> bool:
    """Whether a run has explored its images too."""
    return manifest.is_complete and manifest.read_settings("explore", ExploreConfig).enabled


def _check_exploration(output: Location, manifest: store.RunManifest | None, found: _Findings) -> Iterator[Fault]:
    """Check an exploration, and compare its images with those of the run, if both have the same input."""
    faults = list(store.check_json(output, store.EXPLORATION, "explore"))
    if not (faults or exists(output.child(store.EXPLORATION))):
        faults = [Fault(store.EXPLORATION, "it is missing", "explore")]
    yield from faults
    summary = None if faults else store.read_exploration_manifest(output)
    if summary is None:
        return
    if not summary.is_complete:
        found.notes.append("the exploration is not finished: the next run finishes it")
        return
    is_same = manifest is not None and manifest.fingerprint.get("catalog") == summary.fingerprint["catalog"]
    if manifest is not None and not is_same:
        if _expects_exploration(manifest):
            yield Fault(store.EXPLORATION, "its images are not those of the run", "explore")
        elif manifest.is_complete:
            found.notes.append(
                "the exploration is older than the last change of the images; a run with explore.enabled explores all "
                "images again"
            )
    yield from check_exploration(output, summary, found.catalog if is_same else None)
    if exists(output.child(store.EXPLORING)):
        yield Fault(store.EXPLORING, "it is left over from a finished exploration", "delete")
