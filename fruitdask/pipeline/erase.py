"""Erases images from the results of a run (GDPR, article 17)."""

import glob
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
from fruitdask.core.progress import RunProgress, resolve_progress
from fruitdask.core.storage import Location, keeps_versions
from fruitdask.errors import (
    CatalogError,
    ConfigError,
    FruitdaskError,
    OutputError,
    StorageError,
)
from fruitdask.pipeline.config import write_config
from fruitdask.pipeline.inputs import open_output
from fruitdask.pipeline.results import RunResult
from fruitdask.pipeline.run import run
from fruitdask.store.catalog import escape_paths, hash_listing, list_images, match_paths
from fruitdask.store.schema import ErasureRecord


@dataclass(frozen=True, eq=False)
class ErasurePlan:
    """The images of a run, and which of them are to be erased."""

    config: Config
    patterns: tuple[str, ...] = field(repr=False)
    #: Mask of the images to erase, in the order of the rows of the run.
    is_erased: npt.NDArray[np.bool_] = field(repr=False)
    #: Classes of the other images, in alphabetical order.
    class_names: tuple[str, ...] = field(repr=False)
    #: Patterns that match no image.
    unmatched: tuple[str, ...] = field(repr=False)
    #: Number of matching images in the input; None if that cannot be listed.
    n_in_input: int | None
    #: Whether the run has the features of all images.
    is_complete: bool
    #: The manifest of the run when the plan was made.
    manifest: store.RunManifest = field(repr=False)

    @property
    def n_images(self) -> int:
        """Number of images of the run."""
        return len(self.is_erased)

    @property
    def n_erased(self) -> int:
        """Number of images to erase."""
        return int(self.is_erased.sum())


@dataclass(frozen=True)
class Erasure:
    """
    Counts of an erasure, and the new results.

    Parameters
    ----------
    n_erased : int
        Images that were erased.
    n_images : int
        Images before.
    n_in_input : int or None
        Erased images that are still in the input, where the next run would read them; None if it cannot be listed.
    unmatched : tuple[str, ...]
        Patterns that match no image of the run.
    keeps_versions : bool
        Whether the output is a bucket that keeps old versions of objects, or an Azure account that keeps deleted blobs.
    result : RunResult or None
        The results without the erased images; None if the run was not complete.
    """

    n_erased: int
    n_images: int
    n_in_input: int | None
    unmatched: tuple[str, ...] = field(repr=False)
    keeps_versions: bool
    result: RunResult | None = field(repr=False)


def erase(
    config: Config, patterns: Sequence[str], *, client: Any = None, progress: RunProgress | bool | None = None
) -> Erasure:
    """
    Erase images from the results of a run, and compute everything that depends on all images again without them.

    Their rows, names, features and thumbnails are deleted, not marked as deleted. The manifest records their number and
    the time. The image files themselves are not touched.

    Parameters
    ----------
    config : Config
        The configuration of the run.
    patterns : Sequence[str]
        Paths relative to ``input.url``, or patterns as for ``fnmatch.fnmatchcase``: ``*`` matches slashes too.
    client : distributed.Client, optional
        A cluster to use instead of the configured one; it is left open.
    progress : RunProgress or bool, optional
        How to show progress; by default, only on a terminal and in a notebook. False shows none.

    Returns
    -------
    Erasure
        Counts, and the new results.

    Raises
    ------
    FruitdaskError
        If nothing matches, there is no run, or the results cannot be computed again.
    """
    leave_imported_script()
    return carry_out(plan_erasure(config, patterns), client=client, progress=progress)


def plan_erasure(config: Config, patterns: Sequence[str]) -> ErasurePlan:
    """Find the images of a run that match patterns, after finishing an interrupted erasure."""
    if config.privacy.allowed_regions is not None:
        check_regions(config)
    output = open_output(config)
    _read_run(output)
    with store.locked(output):
        store.finish_erasing(output)
    manifest, catalog = _read_run(output), store.read_catalog(output, ["path", "label"])
    if catalog is None:
        raise OutputError(
            f"{output.child(store.CATALOG).url}: expected the catalog of a run, found none, so nothing was erased; "
            f"{store.advise_repair(output)} first"
        )
    paths = catalog.pop("path")
    patterns = escape_paths(patterns, paths)
    is_erased = match_paths(paths, patterns)
    if not is_erased.any():
        raise ConfigError(
            f"{output.url}: none of the {len(paths):,} images matches; expected paths relative to input.url or "
            "patterns of them, such as 'pear_1/r0_0.jpg' or '*/IMG_20*'"
        )
    if is_erased.all():
        raise ConfigError(
            f"{output.url}: all {len(paths):,} images match, so nothing would be left; delete the folder instead"
        )
    unmatched, class_names = _list_unmatched(patterns, paths[is_erased]), sorted(catalog["label"][~is_erased].unique())
    is_complete = store.list_committed(output).issuperset(range(-(-len(paths) // manifest.images_per_partition)))
    # Listing takes memory too.
    del catalog, paths
    return ErasurePlan(
        config=config,
        patterns=patterns,
        is_erased=is_erased,
        class_names=tuple(class_names),
        unmatched=unmatched,
        n_in_input=_count_in_input(config, patterns),
        is_complete=is_complete,
        manifest=manifest,
    )


def carry_out(plan: ErasurePlan, *, client: Any = None, progress: RunProgress | bool | None = None) -> Erasure:
    """Erase the planned images, and compute the results again."""
    progress = resolve_progress(progress)
    with progress:
        progress.begin("Erasing")
        with store.locked(open_output(plan.config)):
            remove_images(plan)
        result = _run_without(plan, client, progress) if plan.is_complete else None
    return Erasure(
        n_erased=plan.n_erased,
        n_images=plan.n_images,
        n_in_input=plan.n_in_input,
        unmatched=plan.unmatched,
        keeps_versions=keeps_versions(open_output(plan.config)),
        result=result,
    )


def remove_images(plan: ErasurePlan) -> None:
    """Remove images from the stored features and outcomes, and delete everything made from them."""
    output, is_kept = open_output(plan.config), ~plan.is_erased
    if _read_run(output) != plan.manifest:
        raise OutputError(
            f"{output.url}: another command has changed the results meanwhile, so nothing was erased; erase again"
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    erasing = plan.manifest.begin_erasing(
        n_kept=int(is_kept.sum()),
        catalog=hash_listing(store.read_catalog_blocks(output, is_kept)),
        erasure=ErasureRecord(at=now, n_images=plan.n_erased),
    )
    store.stage_rows(
        output,
        is_kept,
        images_per_partition=plan.manifest.images_per_partition,
        attributes={"fingerprint": erasing.fingerprint, "class_names": list(plan.class_names)},
    )
    store.write_manifest(output, erasing)
    store.finish_erasing(output)


def _read_run(output: Location) -> store.RunManifest:
    """Read the manifest of a run, or raise an error that says what is there instead."""
    manifest, exploration = store.read_run(output), store.read_exploration_manifest(output)
    if manifest is not None:
        return manifest
    if exploration is not None:
        raise OutputError(
            f"{output.url}: expected the results of a run, found only an exploration; to erase images from it, "
            "delete them from the input or name them in input.exclude, and use fruitdask explore with --overwrite"
        )
    raise OutputError(f"{output.url}: expected the results of a run, found none; check output.url")


def _list_unmatched(patterns: Sequence[str], erased: pd.Series) -> tuple[str, ...]:
    """List the patterns that match none of the erased paths."""
    known = {*erased, *map(glob.escape, erased)}
    left = (pattern for pattern in patterns if pattern not in known)
    return tuple(pattern for pattern in left if not match_paths(erased, [pattern]).any())


def _count_in_input(config: Config, patterns: Sequence[str]) -> int | None:
    """Count the matching images in the input; None if that cannot be listed."""
    with suppress(CatalogError, StorageError):
        return int(match_paths(list_images(config.input)["path"], patterns).sum())
    return None


def _run_without(plan: ErasurePlan, client: Any, progress: RunProgress) -> RunResult:
    """Run again without the erased images, even if they are still in the input."""
    config = plan.config
    without = config.input.model_copy(update={"exclude": (*config.input.exclude, *plan.patterns)})
    kept = config.output.model_copy(update={"overwrite": False})
    try:
        result = run(config.model_copy(update={"input": without, "output": kept}), client=client, progress=progress)
    except FruitdaskError as error:
        raise type(error)(
            f"{plan.n_erased:,} of {plan.n_images:,} images were erased, but the results could not be computed "
            f"without them; use fruitdask run: {error}"
        ) from error
    if plan.n_in_input == 0:
        # Without the variables in place of erased names. While the files exist, these keep a run from reading them.
        write_config(result.output, config)
    return result
