"""Erasing images from the results of a run (GDPR, article 17)."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import store
from fruitdask.cluster.regions import check_regions
from fruitdask.core.config import Config
from fruitdask.core.guard import leave_imported_script
from fruitdask.core.progress import RunProgress
from fruitdask.core.storage import Location
from fruitdask.errors import (
    CatalogError,
    ConfigError,
    FruitdaskError,
    OutputError,
    StorageError,
)
from fruitdask.pipeline.inputs import open_output
from fruitdask.pipeline.results import RunResult
from fruitdask.pipeline.run import run
from fruitdask.store.catalog import hash_catalog, list_images, match_paths, take_listing
from fruitdask.store.schema import ErasureRecord


@dataclass(frozen=True, eq=False)
class ErasurePlan:
    """Which images of a run an erasure is about."""

    config: Config
    patterns: tuple[str, ...] = field(repr=False)
    #: All images of the run, in the order of its rows.
    images: pd.DataFrame = field(repr=False)
    is_erased: npt.NDArray[np.bool_] = field(repr=False)
    #: The catalog of the input as it is now; None where it cannot be listed.
    listing: pd.DataFrame | None = field(repr=False)
    #: Whether the run has the features of all images.
    is_complete: bool
    images_per_partition: int

    @property
    def n_erased(self) -> int:
        """Images to erase."""
        return int(self.is_erased.sum())

    @property
    def n_in_input(self) -> int | None:
        """Images in the input that match; None where it cannot be listed."""
        return None if self.listing is None else int(match_paths(self.listing["path"], self.patterns).sum())


@dataclass(frozen=True)
class Erasure:
    """
    What was erased, in numbers.

    Parameters
    ----------
    n_erased : int
        Images that were erased.
    n_images : int
        Images that there were before.
    n_in_input : int or None
        Images that are still in the input and would be read by the next run; None where it cannot be listed.
    keeps_versions : bool
        Whether the output is a bucket that keeps older versions of objects.
    result : RunResult or None
        The results without them; None where the run was not complete, so that there were none.
    """

    n_erased: int
    n_images: int
    n_in_input: int | None
    keeps_versions: bool
    result: RunResult | None = field(repr=False)


def erase(
    config: Config, patterns: Sequence[str], *, client: Any = None, progress: RunProgress | None = None
) -> Erasure:
    """
    Erase images from the results of a run, and compute what depends on all images again without them.

    Their rows, names, features and thumbnails are deleted, not marked; the manifest keeps how many there were, and when. The images
    themselves stay where they are.

    Parameters
    ----------
    config : Config
        The configuration of the run.
    patterns : Sequence[str]
        Patterns of paths relative to ``input.url``, as of Python's ``fnmatch.fnmatchcase``: ``*`` stands for slashes too.
    client : distributed.Client, optional
        A cluster to use instead of the one that the configuration describes; it is left open.
    progress : RunProgress, optional
        Where to show progress; nowhere by default.

    Returns
    -------
    Erasure
        Counts, and the new results.

    Raises
    ------
    FruitdaskError
        If nothing matches, or there is no run; or if the results cannot be computed again, which its message says.
    """
    leave_imported_script()
    return carry_out(plan_erasure(config, patterns), client=client, progress=progress)


def plan_erasure(config: Config, patterns: Sequence[str]) -> ErasurePlan:
    """Find the images of a run that match patterns. An erasure that was interrupted is finished first."""
    if config.privacy.allowed_regions is not None:
        check_regions(config)
    output = open_output(config)
    _read_run(output)
    with store.locked(output):
        store.finish_erasing(output)
    manifest = _read_run(output)
    listing = _list_input(config)
    size, images = manifest.images_per_partition, store.read_catalog(output)
    if images is None:
        raise OutputError(
            f"{output.child(store.CATALOG).url}: expected the catalog of a run, found none, so nothing was erased; "
            f"{store.advise_repair(output)} first"
        )
    is_complete = store.list_committed(output).issuperset(range(-(-len(images) // size)))
    is_erased = match_paths(images["path"], patterns)
    if not is_erased.any():
        raise ConfigError(
            f"{output.url}: none of the {len(images):,} images there matches; expected patterns of paths relative to input.url, "
            "such as 'pear_1/r0_0.jpg' or '*/IMG_20*'"
        )
    if is_erased.all():
        raise ConfigError(
            f"{output.url}: all {len(images):,} images there match, so that nothing would be left; delete the folder instead"
        )
    return ErasurePlan(config, tuple(patterns), images, is_erased, listing, is_complete, size)


def carry_out(plan: ErasurePlan, *, client: Any = None, progress: RunProgress | None = None) -> Erasure:
    """Erase what was planned, and compute the results again."""
    progress = progress or RunProgress()
    with progress:
        progress.begin("Erasing")
        with store.locked(open_output(plan.config)):
            remove_images(plan)
        result = _run_without(plan, client, progress) if plan.is_complete else None
    return Erasure(
        n_erased=plan.n_erased,
        n_images=len(plan.images),
        n_in_input=plan.n_in_input,
        keeps_versions=_keeps_versions(open_output(plan.config)),
        result=result,
    )


def remove_images(plan: ErasurePlan) -> None:
    """Remove images from what a run has stored, and delete all that was made of it."""
    output = open_output(plan.config)
    manifest, kept = _read_run(output), plan.images[~plan.is_erased]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    erasing = manifest.begin_erasing(
        n_kept=len(kept),
        catalog=hash_catalog(take_listing(kept)),
        erasure=ErasureRecord(at=now, n_images=plan.n_erased),
    )
    store.stage_rows(
        output,
        np.flatnonzero(~plan.is_erased),
        images_per_partition=plan.images_per_partition,
        attributes={"fingerprint": erasing.fingerprint, "class_names": sorted(set(kept["label"]))},
    )
    store.write_manifest(output, erasing)
    store.finish_erasing(output)


def _read_run(output: Location) -> store.RunManifest:
    """Read the manifest of a run, or say what there is instead."""
    manifest, exploration = store.read_run(output), store.read_exploration_manifest(output)
    if manifest is not None:
        return manifest
    if exploration is not None:
        raise OutputError(
            f"{output.url}: expected the results of a run, found an exploration alone, all of which is made of the images again: "
            "delete them from the input, or name them in input.exclude, and use fruitdask explore with --overwrite"
        )
    raise OutputError(f"{output.url}: expected the results of a run, found none; check output.url")


def _list_input(config: Config) -> pd.DataFrame | None:
    """List the input, if that is possible."""
    with suppress(CatalogError, StorageError):
        return list_images(config.input)
    return None


def _run_without(plan: ErasurePlan, client: Any, progress: RunProgress) -> RunResult:
    """Run again without the images, wherever they still are."""
    config = plan.config
    without = config.input.model_copy(update={"exclude": (*config.input.exclude, *plan.patterns)})
    kept = config.output.model_copy(update={"overwrite": False})
    try:
        return run(config.model_copy(update={"input": without, "output": kept}), client=client, progress=progress)
    except FruitdaskError as error:
        raise type(error)(
            f"{plan.n_erased:,} of {len(plan.images):,} images were erased; the results must still be computed without them, "
            f"by fruitdask run: {error}"
        ) from error


def _keeps_versions(output: Location) -> bool:
    """Ask a bucket whether it keeps, or has kept, older versions of objects; a refusal counts as no."""
    if not output.url.startswith(("s3://", "s3a://")):
        return False
    with suppress(OSError):
        bucket = output.fs.split_path(output.path)[0]
        return "Status" in output.fs.call_s3("get_bucket_versioning", Bucket=bucket)
    return False
