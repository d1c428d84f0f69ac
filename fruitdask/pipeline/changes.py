"""Compares an output with its input, which may have changed: which rows are kept, and which are computed.

Only the outcome files say what is done. Each names the versions of its image files, and a row with another version in
the catalog is computed again. So a run resumes from any interruption, even if the input has changed meanwhile.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import store
from fruitdask.core.memory import return_freed_memory
from fruitdask.core.partition import VANISHED_BYTES
from fruitdask.core.storage import Location, exists
from fruitdask.errors import StoreMismatchError
from fruitdask.pipeline.inputs import Inputs
from fruitdask.store.catalog import merge_listing
from fruitdask.store.schema import ComponentsRecord

#: Kinds of changes and their words, in the order in which they are shown.
_WORDS = {"added": "new", "changed": "changed", "vanished": "vanished", "retried": "retried", "kept": "kept"}

#: Rows compared at once.
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, eq=False)
class Rows:
    """The images of an output in the order of its rows."""

    #: The catalog; images that are missing from the input are marked.
    catalog: pd.DataFrame
    #: Number of images ``added``, ``changed``, ``vanished`` and ``kept`` since the stored catalog was written; empty
    #: without one.
    changes: dict[str, int]


@dataclass(frozen=True, eq=False)
class PendingWork:
    """What a run has to compute."""

    #: Partitions to compute, each with the positions of its images to compute; None stands for all.
    todo: dict[int, tuple[int, ...] | None]
    #: Number of images to read; missing ones are not read.
    n_images: int
    #: Number of failed images that are not retried; missing ones do not count.
    n_failed: int
    #: Number of failed images that are retried: on request, or because they could not be reached.
    n_retried: int
    #: Partitions that are final; completed ones are added.
    done: set[int]


def order_images(inputs: Inputs, *, has_commits: bool) -> Rows:
    """Order the images of the input like the rows of the output."""
    if not (has_commits and exists(inputs.output.child(store.CATALOG))):
        return Rows(inputs.catalog, {})
    changes = Counter[str]()
    stored = store.read_catalog_blocks(inputs.output)
    catalog = merge_listing(
        stored, inputs.catalog, on_block=lambda before, now: changes.update(_count_changes(before, now))
    )
    # A quarter of the process at ten million images.
    return_freed_memory()
    changes["added"] += len(catalog) - changes.total()
    del changes["absent"]
    n_left = changes["changed"] + changes["kept"]
    n_before = n_left + changes["vanished"]
    if 2 * n_left < n_before:
        raise StoreMismatchError(
            store.describe_mismatch(
                inputs.output, f"only {n_left:,} of its {n_before:,} images are in the input of this run"
            )
        )
    return Rows(catalog, dict(changes))


def find_pending(
    output: Location, rows: Rows, committed: frozenset[int], *, images_per_partition: int, retry_failed: bool
) -> PendingWork:
    """Find the rows to compute: not committed, of another version of the file, unreachable before, or failed and to be
    retried.
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
        is_done[read.index] = _equal(read, catalog[["label", *versions]].iloc[read.index], ("label", *versions))
        is_failed[read.index] = read["status"] != "ok"
        is_out_of_reach[read.index] = read["status"] == "unreachable"
    is_failed &= is_done & is_present
    # An image that could not be reached may be reachable now.
    is_retried = is_failed & (retry_failed | is_out_of_reach)
    is_done &= ~is_retried
    todo = _list_todo(is_done, committed, images_per_partition)
    return PendingWork(
        todo,
        n_images=int((is_present & ~is_done).sum()),
        n_failed=int((is_failed & is_done).sum()),
        n_retried=int(is_retried.sum()),
        done=set(committed - todo.keys()),
    )


def format_changes(changes: Mapping[str, int]) -> str:
    """Describe changes in words.

    >>> format_changes({"added": 12, "changed": 0, "vanished": 1, "kept": 842})
    '12 new, 1 vanished, 842 kept'
    """
    return ", ".join(f"{changes[name]:,} {word}" for name, word in _WORDS.items() if changes.get(name))


def carry_components(manifest: store.RunManifest | None, n_changed: int) -> ComponentsRecord | None:
    """Return the record of earlier principal components, with the changes since they were fitted."""
    if manifest is None or manifest.pca is None:
        return None
    fit = manifest.pca.fit
    return manifest.pca.change(fit=fit.change(n_changed=fit.n_changed + n_changed))


def _count_changes(before: pd.DataFrame, now: pd.DataFrame) -> dict[str, int]:
    """Count the differences between rows of a stored catalog and the same rows now; what has come back is new."""
    was, is_there = ((table["bytes"] != VANISHED_BYTES).to_numpy() for table in (before, now))
    is_equal = _equal(before, now, ("label", *store.VERSION_COLUMNS))
    return {
        "added": int((is_there & ~was).sum()),
        "changed": int((is_there & was & ~is_equal).sum()),
        "vanished": int((was & ~is_there).sum()),
        "kept": int((was & is_there & is_equal).sum()),
        "absent": int((~was & ~is_there).sum()),
    }


def _equal(table: pd.DataFrame, other: pd.DataFrame, columns: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Return a mask of rows that are equal in some columns; read in blocks, as classes are text in one table and
    categories in the other.
    """
    blocks = [slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(table), _ROWS_AT_ONCE)]
    equal = [_equal_block(table.iloc[block], other.iloc[block], columns) for block in blocks]
    return np.concatenate([np.empty(0, bool), *equal])


def _equal_block(table: pd.DataFrame, other: pd.DataFrame, columns: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Return a mask of rows of a block that are equal in some columns."""
    pairs = (
        [each[name].astype("str") if name == "label" else each[name] for each in (table, other)] for name in columns
    )
    equal: npt.NDArray[np.bool_] = np.logical_and.reduce([left.to_numpy() == right.to_numpy() for left, right in pairs])
    return equal


def _list_todo(
    is_done: npt.NDArray[np.bool_], committed: frozenset[int], images_per_partition: int
) -> dict[int, tuple[int, ...] | None]:
    """List the partitions to compute, and which of their images; one that is not committed is computed as a whole."""
    todo: dict[int, tuple[int, ...] | None] = {}
    for index, start in enumerate(range(0, len(is_done), images_per_partition)):
        places = np.flatnonzero(~is_done[start : start + images_per_partition])
        if len(places):
            todo[index] = tuple(places.tolist()) if index in committed else None
    return todo
