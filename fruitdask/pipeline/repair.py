"""Prepares a damaged output folder for the next run, which then computes only the damaged parts again."""

from collections.abc import Callable, Iterable
from contextlib import suppress

import pandas as pd
from pydantic import ValidationError

from fruitdask import store
from fruitdask.core.storage import Location
from fruitdask.core.version import __version__
from fruitdask.errors import DamageError
from fruitdask.store import Fault, Remedy

#: Entries from which a manifest is restored; the next run writes the others (counts, versions, times) again.
_KNOWN = ("fruitdask", "fingerprint", "model")


def restore_manifest(output: Location) -> store.RunManifest | None:
    """Restore a manifest from the attributes of the features; None if these are damaged too."""
    try:
        stored = store.open_store(output)
    except DamageError:
        return None
    attributes = stored.attrs if stored is not None else {}
    if stored is None or not store.is_intact(attributes) or not set(_KNOWN) <= set(attributes):
        return None
    features = stored["features"]
    try:
        return store.RunManifest(
            status="running",
            n_images=features.shape[0],
            images_per_partition=features.chunks[0],
            **{name: attributes[name] for name in _KNOWN},
        )
    except ValidationError:
        return None


def repair_faults(output: Location, faults: Iterable[Fault]) -> None:
    """Delete or restore what is damaged, so that the next run computes it again."""
    by_remedy: dict[Remedy, list[Fault]] = {}
    for fault in faults:
        by_remedy.setdefault(fault.remedy, []).append(fault)
    names = [fault.where for fault in by_remedy.get("restore", ())]
    restored = restore_manifest(output) if store.MANIFEST in names else None
    if restored is not None:
        store.write_manifest(output, restored)
    if store.CATALOG in names:
        _restore_catalog(output)
    _restore_store(output, [name for name in names if name not in (store.MANIFEST, store.CATALOG)])
    if {"compute", "reduce"} & set(by_remedy):
        # The results are not valid until they are computed again.
        _change_manifest(output, store.RunManifest.reopen)
    if any(fault.where.startswith(store.COMPONENTS) for fault in by_remedy.get("reduce", ())):
        # Otherwise the next run might keep the damaged components.
        store.delete_result(output, store.COMPONENTS)
    for fault in by_remedy.get("compute", ()):
        store.delete_result(output, fault.where if fault.partition is None else store.name_outcomes(fault.partition))
    if "explore" in by_remedy:
        _reset_exploration(output)
    if "draw" in by_remedy:
        _change_manifest(output, store.RunManifest.begin_rendering)
    for fault in by_remedy.get("delete", ()):
        store.delete_result(output, fault.where)


def _restore_catalog(output: Location) -> None:
    """Restore the catalog from the outcomes of all images."""
    store.delete_result(output, store.CATALOG)
    columns = ("path", "label", *store.VERSION_COLUMNS)
    with suppress(DamageError):
        tables = list(store.read_outcomes(output, sorted(store.list_committed(output)), columns=columns))
        store.write_catalog(output, pd.concat(tables, ignore_index=True))
    # Outcomes hold neither splits nor groups; the next run writes them again.
    _change_manifest(output, store.RunManifest.drop_groupings)


def _restore_store(output: Location, names: list[str]) -> None:
    """Restore the metadata of the arrays of features and statuses."""
    manifest = store.read_run(output) if names else None
    if manifest is None:
        return
    labels = set(manifest.counts.by_class if manifest.counts is not None else ())
    for index in sorted(store.list_committed(output)):
        with suppress(DamageError):
            labels |= set(next(store.read_outcomes(output, [index]))["label"])
    described = manifest.dump()
    attributes = {name: described[name] for name in _KNOWN} | {"class_names": sorted(labels)}
    store.restore_store(output, names, **shape_store(manifest), attributes=attributes)


def shape_store(manifest: store.RunManifest) -> dict[str, int]:
    """Return the shape of the features of a run."""
    return {
        "n_images": manifest.n_images,
        "images_per_partition": manifest.images_per_partition,
        "n_features": manifest.model.n_features,
    }


def _change_manifest(output: Location, transition: Callable[[store.RunManifest], store.RunManifest]) -> None:
    """Change the manifest, if there is one."""
    manifest = store.read_run(output)
    if manifest is not None:
        store.write_manifest(output, transition(manifest))


def _reset_exploration(output: Location) -> None:
    """Mark the exploration as unfinished, with a new manifest, because the old one may be damaged."""
    store.write_manifest(output, store.ExplorationManifest(fruitdask=__version__, status="running", fingerprint={}))
