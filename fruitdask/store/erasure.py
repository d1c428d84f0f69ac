"""Erasing images from a run: what is kept is copied aside, everything else is deleted, and the copy takes its place.

Until the manifest says ``ERASING`` nothing has changed; from then on nothing is needed to finish but what lies in the folder, so an
interrupted erasure either has not happened or is finished by the next command.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.core.storage import Location, exists, explained
from fruitdask.store.arrays import StoredArray, create_store, open_store, write_partition
from fruitdask.store.catalog import read_catalog, write_catalog
from fruitdask.store.checks import find_strays
from fruitdask.store.layout import (
    EXPLORATION_NAMES,
    FEATURES,
    MANIFEST,
    OUTCOME_COLUMNS,
    PARTITIONS,
    RUN_NAMES,
    STAGING,
    VERSION_COLUMNS,
)
from fruitdask.store.manifests import delete_result, read_run, write_manifest
from fruitdask.store.outcomes import list_committed, read_rows


def stage_rows(
    output: Location, rows: npt.NDArray[np.int64], *, images_per_partition: int, attributes: Mapping[str, Any]
) -> None:
    """Copy some rows of a run aside, as a store without gaps; a partition of which some row was not computed yet is left
    out.

    rows: numpy.ndarray, the rows to keep, ascending, int64.
    """
    staging = output.child(STAGING)
    delete_result(output, STAGING)
    store: Any = open_store(output)
    if store is None:
        return
    features, committed, catalog = StoredArray(store["features"], output), list_committed(output), read_catalog(output)
    if catalog is None:
        return
    columns = OUTCOME_COLUMNS + VERSION_COLUMNS
    create_store(
        staging,
        n_images=len(rows),
        n_features=features.shape[1],
        images_per_partition=images_per_partition,
        attributes={**store.attrs, **attributes},
    )
    for index, start in enumerate(range(0, len(rows), images_per_partition)):
        chosen = rows[start : start + images_per_partition]
        sources = np.unique(chosen // images_per_partition).tolist()
        if not committed.issuperset(sources):
            continue
        read = read_rows(output, sources, images_per_partition=images_per_partition, columns=columns)
        outcomes = pd.concat(read)
        # One that was the last before the input grew may not have been filled up.
        if np.isin(chosen, outcomes.index).all():
            kept = features[chosen, :]
            write_partition(staging, index=index, start=start, features=kept, outcomes=outcomes.loc[chosen])
    write_catalog(staging, catalog.iloc[rows])


def finish_erasing(output: Location) -> None:
    """Finish an erasure that the manifest says has begun: delete all results, and put the rows that were staged in their
    place.
    """
    manifest = read_run(output)
    if manifest is None:
        return
    if manifest.status == "erasing":
        for name in EXPLORATION_NAMES + RUN_NAMES:
            if name not in (STAGING, MANIFEST):
                delete_result(output, name)
        delete_strays(output)
        for name in (FEATURES, PARTITIONS):
            _copy_folder(output.child(STAGING, name), output.child(name))
        _copy_catalog(output)
        write_manifest(output, manifest.end_erasing())
    delete_result(output, STAGING)


def delete_strays(output: Location) -> None:
    """Delete what killed processes left of files that they were writing."""
    for stray in find_strays(output):
        delete_result(output, stray.where)


def _copy_folder(source: Location, target: Location) -> None:
    """Copy a folder, if it is there, to a place where there is none."""
    with explained(target, "write"):
        if exists(source):
            source.fs.copy(f"{source.path}/", f"{target.path}/", recursive=True)
            target.fs.invalidate_cache()


def _copy_catalog(output: Location) -> None:
    """Put the catalog that was staged, if any, in its place."""
    catalog = read_catalog(output.child(STAGING))
    if catalog is not None:
        write_catalog(output, catalog)
