"""An output whose input has changed since: which rows stay as they are, and which are computed.

What is done is told by the outcome files alone: each says of which version of its files it is, and what the catalog has otherwise is
computed again. So the next run resumes one that was interrupted at any point, whatever has become of the input meanwhile.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import store
from fruitdask.core.partition import VANISHED_BYTES
from fruitdask.core.storage import Location
from fruitdask.errors import StoreMismatchError
from fruitdask.pipeline.inputs import Inputs
from fruitdask.store.catalog import merge_listing
from fruitdask.store.schema import ComponentsRecord

#: What counts of changes are called in words, in this order.
_WORDS = {"added": "new", "changed": "changed", "vanished": "vanished", "retried": "tried again", "kept": "kept"}

#: Rows compared at once.
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, eq=False)
class Rows:
    """The images of an output, in the order of its rows."""

    #: The images; those that have vanished from the input are marked.
    catalog: pd.DataFrame
    #: Images ``added``, ``changed``, ``vanished`` and ``kept`` since the store's own catalog was written; empty where
    #: it has none.
    changes: dict[str, int]


@dataclass(frozen=True, eq=False)
class Backlog:
    """What a run has to compute."""

    #: Partitions to compute, and the places in them; None stands for all.
    todo: dict[int, tuple[int, ...] | None]
    #: Images to read; those that have vanished are not read.
    n_images: int
    #: Images that have failed and are not computed again; those that have vanished do not count.
    n_failed: int
    #: Images that had failed and are computed again because that was asked for, or because they were out of reach.
    n_retried: int
    #: Partitions whose outcomes no task will change any more; those that are completed join them.
    done: set[int]


def order_images(inputs: Inputs, *, has_commits: bool) -> Rows:
    """Bring the images of the input into the order of the output's rows."""
    stored = store.read_catalog(inputs.output) if has_commits else None
    if stored is None:
        return Rows(inputs.catalog, {})
    catalog = merge_listing(stored, inputs.catalog)
    changes = _count_changes(stored, catalog)
    n_left = changes["changed"] + changes["kept"]
    n_before = n_left + changes["vanished"]
    if 2 * n_left < n_before:
        raise StoreMismatchError(
            store.describe_mismatch(
                inputs.output, f"only {n_left:,} of its {n_before:,} images are in this run's input"
            )
        )
    return Rows(catalog, changes)


def find_backlog(
    output: Location, rows: Rows, committed: frozenset[int], *, images_per_partition: int, retry_failed: bool
) -> Backlog:
    """Find what to compute: what is not committed, is of another version of the file, was out of reach, or failed where
    that is asked for.
    """
    catalog, n_images = rows.catalog, len(rows.catalog)
    is_present = (catalog["bytes"] != VANISHED_BYTES).to_numpy()
    is_done, is_failed, is_out_of_reach = (np.zeros(n_images, bool) for _ in range(3))
    versions = store.VERSION_COLUMNS if rows.changes else ()
    tables = store.read_rows(
        output,
        sorted(committed),
        images_per_partition=images_per_partition,
        columns=("label", "status", *versions),
    )
    for table in tables:
        read = table[table.index < n_images]
        is_done[read.index] = _equal(read, catalog.iloc[read.index], ("label", *versions))
        is_failed[read.index] = read["status"] != "ok"
        is_out_of_reach[read.index] = read["status"] == "unreachable"
    is_failed &= is_done & is_present
    # An image that could not be reached may be within reach by now.
    is_retried = is_failed & (retry_failed | is_out_of_reach)
    is_done &= ~is_retried
    todo = _group(np.flatnonzero(~is_done), committed, images_per_partition)
    return Backlog(
        todo,
        n_images=int((is_present & ~is_done).sum()),
        n_failed=int((is_failed & is_done).sum()),
        n_retried=int(is_retried.sum()),
        done=set(committed - todo.keys()),
    )


def format_changes(changes: Mapping[str, int]) -> str:
    """Say in words what has changed.

    >>> format_changes({"added": 12, "changed": 0, "vanished": 1, "kept": 842})
    '12 new, 1 vanished, 842 kept'
    """
    return ", ".join(f"{changes[name]:,} {word}" for name, word in _WORDS.items() if changes.get(name))


def carry_components(manifest: store.RunManifest | None, n_changed: int) -> ComponentsRecord | None:
    """Return the record of the principal components of an earlier run, with so many more images changed since they were fitted."""
    if manifest is None or manifest.pca is None:
        return None
    fit = manifest.pca.fit
    return manifest.pca.change(fit=fit.change(n_changed=fit.n_changed + n_changed))


def _count_changes(stored: pd.DataFrame, catalog: pd.DataFrame) -> dict[str, int]:
    """Count what is different in a catalog that goes on from another one."""
    same = catalog.iloc[: len(stored)]
    was, is_there = ((table["bytes"] != VANISHED_BYTES).to_numpy() for table in (stored, same))
    is_equal = _equal(stored, same, ("label", *store.VERSION_COLUMNS))
    return {
        "added": len(catalog) - len(stored) + int((is_there & ~was).sum()),
        "changed": int((is_there & was & ~is_equal).sum()),
        "vanished": int((was & ~is_there).sum()),
        "kept": int((was & is_there & is_equal).sum()),
    }


def _equal(table: pd.DataFrame, other: pd.DataFrame, columns: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Tell in which rows some columns of two tables are equal, some at a time: classes are words in one and categories in the other."""
    blocks = [slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(table), _ROWS_AT_ONCE)]
    equal = [_equal_block(table.iloc[block], other.iloc[block], columns) for block in blocks]
    return np.concatenate([np.empty(0, bool), *equal])


def _equal_block(table: pd.DataFrame, other: pd.DataFrame, columns: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Tell in which of few rows some columns are equal."""
    pairs = (
        [each[name].astype("str") if name == "label" else each[name] for each in (table, other)] for name in columns
    )
    equal: npt.NDArray[np.bool_] = np.logical_and.reduce([left.to_numpy() == right.to_numpy() for left, right in pairs])
    return equal


def _group(
    rows: npt.NDArray[np.int64], committed: frozenset[int], images_per_partition: int
) -> dict[int, tuple[int, ...] | None]:
    """Group rows by partition; one that is not committed is computed as a whole."""
    indices = rows // images_per_partition
    firsts = np.flatnonzero(np.diff(indices, prepend=-1))
    groups = np.split(rows, firsts[1:]) if len(rows) else []
    return {
        (index := int(group[0]) // images_per_partition): (
            tuple((group - index * images_per_partition).tolist()) if index in committed else None
        )
        for group in groups
    }
