"""Erases images from a run: the rows to keep are copied, everything else is deleted, and the copy takes its place.

Until the status of the manifest is ``erasing`` nothing has changed. After that the folder holds everything needed to
finish. So an interrupted erasure either has not happened, or the next command finishes it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.core.storage import Location, exists, explained
from fruitdask.store.arrays import create_store, open_store, write_partition
from fruitdask.store.catalog_file import read_catalog_blocks, write_catalog_blocks
from fruitdask.store.checks import find_strays
from fruitdask.store.layout import (
    ALL_NAMES,
    CATALOG,
    COMPONENTS,
    CONFIG,
    FEATURES,
    MANIFEST,
    OUTCOME_COLUMNS,
    PARTITIONS,
    STAGING,
    VERSION_COLUMNS,
)
from fruitdask.store.manifests import delete_result, read_run, write_manifest
from fruitdask.store.outcomes import list_committed, read_rows


def stage_rows(
    output: Location, is_kept: npt.NDArray[np.bool_], *, images_per_partition: int, attributes: Mapping[str, Any]
) -> None:
    """Copy rows of a run to a staging store without gaps, except partitions with a row that was not computed."""
    staging = output.child(STAGING)
    delete_result(output, STAGING)
    stored = open_store(output)
    if stored is None:
        return
    features, committed, rows = stored["features"], list_committed(output), np.flatnonzero(is_kept)
    columns = OUTCOME_COLUMNS + VERSION_COLUMNS
    create_store(
        staging,
        n_images=len(rows),
        n_features=features.shape[1],
        images_per_partition=images_per_partition,
        attributes={**stored.attrs, **attributes},
    )
    for index, start in enumerate(range(0, len(rows), images_per_partition)):
        chosen = rows[start : start + images_per_partition]
        sources = np.unique(chosen // images_per_partition).tolist()
        if not committed.issuperset(sources):
            continue
        read = read_rows(output, sources, images_per_partition=images_per_partition, columns=columns)
        outcomes = pd.concat(read)
        # A partition that was the last before the input grew may lack rows.
        if np.isin(chosen, outcomes.index).all():
            kept = features[chosen, :]
            write_partition(staging, index=index, start=start, features=kept, outcomes=outcomes.loc[chosen])
    write_catalog_blocks(staging, read_catalog_blocks(output, is_kept))


def finish_erasing(output: Location) -> None:
    """Finish an erasure that has begun: delete all results, and move the staged rows in their place."""
    manifest = read_run(output)
    if manifest is None:
        return
    if manifest.status == "erasing":
        kept = (STAGING, CONFIG, MANIFEST) + ((COMPONENTS,) if manifest.applied is not None else ())
        for name in ALL_NAMES:
            if name not in kept:
                delete_result(output, name)
        delete_strays(output)
        for name in (FEATURES, PARTITIONS):
            _copy_folder(output.child(STAGING, name), output.child(name))
        if exists(output.child(STAGING, CATALOG)):
            write_catalog_blocks(output, read_catalog_blocks(output.child(STAGING)))
        write_manifest(output, manifest.end_erasing())
    delete_result(output, STAGING)


def delete_strays(output: Location) -> None:
    """Delete partial files of killed processes."""
    for stray in find_strays(output):
        delete_result(output, stray.where)


def _copy_folder(source: Location, target: Location) -> None:
    """Copy a folder, if it exists, to a place that does not exist."""
    with explained(target, "write"):
        if exists(source):
            source.fs.copy(f"{source.path}/", f"{target.path}/", recursive=True)
            target.fs.invalidate_cache()
