"""Faults of stored parts, and what repairs them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr

from fruitdask.core.storage import Location, describe_cause, exists, explained, hash_file, write_file
from fruitdask.errors import DamageError, FormatError, OutputError
from fruitdask.store.arrays import StoredArray, check_chunks, create_store, name_store
from fruitdask.store.layout import EXPLORATION, FEATURES, MANIFEST, STATUSES, name_outcomes
from fruitdask.store.manifests import advise_repair, read_exploration_manifest, read_quality, read_run
from fruitdask.store.outcomes import read_outcomes
from fruitdask.store.schema import check_format, is_intact

#: Names of partial files that a killed process leaves: those of fruitdask, and those of Zarr.
_LEFTOVER = re.compile(r".+\.[0-9a-f]{32}\.part(ial)?")
#: Entries of ``zarr.json`` (Zarr v3, sections 4 and 5), and of the objects in it. Zarr ignores others and uses
#: defaults.
_ZARR_KEYS = frozenset(
    "zarr_format node_type attributes consolidated_metadata shape data_type chunk_grid chunk_key_encoding fill_value "
    "codecs "
    "dimension_names storage_transformers".split()
)
_EXTENSION_KEYS = frozenset({"name", "configuration"})
#: Metadata files of features and statuses.
_DESCRIPTIONS = ("zarr.json", "features/zarr.json", "status/zarr.json")


#: What repairs a fault: the next run, or `verify --repair`.
Remedy = Literal["compute", "reduce", "explore", "draw", "restore", "delete", "none"]
_REMEDIES: Mapping[Remedy, str] = {
    "compute": "the next run computes the partition again",
    "reduce": "the next run reduces the features and writes the tables again",
    "explore": "the next run explores all images again",
    "draw": "the next run renders figures and page again",
    "restore": "a repair restores it from other stored parts",
    "delete": "a repair deletes it",
    "none": "it cannot be restored; start again with --overwrite",
}


@dataclass(frozen=True)
class Fault:
    """A fault in an output folder."""

    #: The file, array or partition, below the output folder.
    where: str
    what: str
    remedy: Remedy
    #: The partition it belongs to, if any.
    partition: int | None = None

    def __str__(self) -> str:
        """Return one sentence."""
        return f"{self.where}: {self.what}; {_REMEDIES[self.remedy]}"


@dataclass(frozen=True, eq=False)
class CheckedPartition:
    """The content of a partition, and its faults."""

    index: int
    faults: tuple[Fault, ...]
    #: None if damaged.
    outcomes: pd.DataFrame | None
    #: None if damaged.
    features: npt.NDArray[np.float32] | None


def check_partition(
    output: Location, arrays: Mapping[str, StoredArray], index: int, *, may_grow: bool = False
) -> CheckedPartition:
    """Check that a committed partition can be read, and that its parts agree."""
    size = arrays["features"].chunks[0]
    rows, faults, found = slice(index * size, (index + 1) * size), [], dict[str, Any]()
    for name in ("features", "status", "outcomes"):
        try:
            found[name] = next(read_outcomes(output, [index])) if name == "outcomes" else arrays[name][rows]
        except DamageError as error:
            where = name_outcomes(index) if name == "outcomes" else f"{FEATURES}/{name}, chunk {index}"
            faults.append(Fault(where, describe_damage(error), "compute", index))
    if len(found) == 3:
        if may_grow:
            found |= {name: found[name][: len(found["outcomes"])] for name in ("features", "status")}
        said = _compare_parts(found["outcomes"], found["features"], found["status"])
        faults += [Fault(f"partition {index}", what, "compute", index) for what in said]
    return CheckedPartition(index, tuple(faults), found.get("outcomes"), found.get("features"))


def _compare_parts(
    outcomes: pd.DataFrame, features: npt.NDArray[np.float32], codes: npt.NDArray[np.uint8]
) -> Iterator[str]:
    """Describe how the parts of a partition disagree."""
    if len(outcomes) != len(codes):
        yield f"expected outcomes of {len(codes):,} images, found {len(outcomes):,}"
        return
    if not outcomes["path"].is_unique:
        yield "expected each path once, found one twice"
    is_ok = (outcomes["status"] == "ok").to_numpy()
    expected = outcomes["status"].map({status: code for code, status in enumerate(STATUSES) if code}).to_numpy()
    for what, is_wrong in (
        ("the status differs from the outcome", codes != expected),
        ("the features are not finite, although the outcome is ok", is_ok & ~np.isfinite(features).all(axis=1)),
        ("there are features, although the outcome is a failure", ~is_ok & ~np.isnan(features).all(axis=1)),
    ):
        if is_wrong.any():
            yield f"of {is_wrong.sum():,} images {what}, first of {outcomes['path'].iloc[int(is_wrong.argmax())]}"


def check_json(output: Location, name: str, remedy: Remedy) -> Iterator[Fault]:
    """Check a JSON file, if it is there."""
    try:
        if name == MANIFEST:
            read_run(output)
        elif name == EXPLORATION:
            read_exploration_manifest(output)
        else:
            read_quality(output)
    except FormatError:
        raise
    except (DamageError, OutputError, ValueError) as error:
        yield Fault(name, describe_damage(error), remedy)


def check_digests(
    output: Location, digests: Mapping[str, str], names: Sequence[str], remedy: Remedy
) -> Iterator[Fault]:
    """Check files against the digests in a manifest."""
    for name in names:
        location = output.child(name)
        if not exists(location):
            if name in digests:
                yield Fault(name, "it is missing", remedy)
        elif f"sha256:{hash_file(location)}" != digests.get(name):
            yield Fault(name, "it is not what was written", remedy)


def check_store(
    output: Location,
    *,
    n_images: int,
    n_features: int,
    images_per_partition: int,
    can_restore: bool,
    may_grow: bool = False,
) -> Iterator[Fault]:
    """Check the metadata of features and statuses: arrays have the shape of the run, and attributes match their
    checksum.
    """
    with TemporaryDirectory() as folder:
        shape = {"n_images": n_images, "n_features": n_features, "images_per_partition": images_per_partition}
        create_store(Location(folder), **shape, attributes={})
        for name in _DESCRIPTIONS:
            what = _compare_descriptions(output, Location(folder), name, may_grow=may_grow)
            if what:
                remedy: Remedy = "restore" if can_restore or name != "zarr.json" else "none"
                yield Fault(f"{FEATURES}/{name}", what, remedy)


def restore_store(
    output: Location,
    names: Sequence[str],
    *,
    n_images: int,
    n_features: int,
    images_per_partition: int,
    attributes: Mapping[str, Any],
) -> None:
    """Write the metadata of features and statuses again; chunks are kept."""
    with TemporaryDirectory() as folder:
        shape = {"n_images": n_images, "n_features": n_features, "images_per_partition": images_per_partition}
        create_store(Location(folder), **shape, attributes=attributes)
        for name in names:
            source = Location(folder).child(name)
            write_file(output.child(name), source.fs.cat_file(source.path))


def _compare_descriptions(output: Location, model: Location, name: str, *, may_grow: bool) -> str:
    """Describe how metadata differs from a model; attributes of the group have a checksum instead."""
    if not exists(output.child(FEATURES, name)):
        return "it is missing"
    try:
        found, expected = (_read_description(place, name) for place in (output, model))
    except DamageError as error:
        return describe_damage(error)
    if name == "zarr.json":
        is_whole = "fingerprint" in found["attributes"] and is_intact(found["attributes"])
        if not is_whole:
            return "its attributes do not match their checksum"
        # Stores from before consolidated metadata are valid without.
        repeated = (found.get("consolidated_metadata") or expected["consolidated_metadata"])["metadata"]
        arrays = {array: dict(described) for array, described in expected["consolidated_metadata"]["metadata"].items()}
        said = [_compare_arrays(repeated.get(array, {}), arrays[array], may_grow=may_grow) for array in arrays]
        return (
            f"its consolidated metadata do not describe the run: {', '.join(filter(None, said))}" if any(said) else ""
        )
    differing = _compare_arrays(found, expected, may_grow=may_grow)
    return f"it does not describe the run: {differing}" if differing else ""


def _compare_arrays(found: dict[str, Any], expected: dict[str, Any], *, may_grow: bool) -> str:
    """Name the entries of the metadata of an array that differ; one that may grow may have fewer rows."""
    shape = tuple(found.get("shape", ()))
    if may_grow and shape[:1] < expected["shape"][:1]:
        found = found | {"shape": (*expected["shape"][:1], *shape[1:])}
    return ", ".join(key for key in expected if found.get(key) != expected[key])


def _read_description(output: Location, name: str) -> dict[str, Any]:
    """Read the metadata of the group or an array, as readers see it."""
    location = output.child(FEATURES, *name.split("/")[:-1])
    _check_keys(location, output)
    with explained(location, "read", remedy=advise_repair(output)):
        description: dict[str, Any] = zarr.open(**name_store(location), mode="r").metadata.to_dict()
    description["codecs"] = [codec for codec in description.get("codecs", []) if codec["name"] != "crc32c"]
    return description


def _check_keys(location: Location, output: Location) -> None:
    """Check that metadata has no entries that Zarr does not know."""
    with explained(location, "read", remedy=advise_repair(output)):
        tree = json.loads(location.fs.cat_file(location.child("zarr.json").path))
        unknown = set(tree) - _ZARR_KEYS
        for part in (tree.get("chunk_grid", {}), tree.get("chunk_key_encoding", {}), *tree.get("codecs", [])):
            unknown |= set(part) - _EXTENSION_KEYS
        if unknown:
            raise ValueError(f"it has the unknown entry {min(unknown)!r}")


def check_arrays(
    output: Location, name: str, dimensions: Mapping[str, Sequence[str]], remedy: Remedy
) -> Iterator[Fault]:
    """Check a group of small arrays and its metadata."""
    location = output.child(name)
    places = (location, *(location.child(array) for array in dimensions))
    missing = [place.child("zarr.json") for place in places if not exists(place.child("zarr.json"))]
    if missing:
        yield Fault(missing[0].url[len(output.url) + 1 :], "it is missing", remedy)
        return
    try:
        for place in places:
            _check_keys(place, output)
        with explained(location, "read", remedy=advise_repair(output)):
            group = zarr.open_group(**name_store(location), mode="r")
            arrays: dict[str, Any] = dict(group.arrays())
            attributes = dict(group.attrs)
    except DamageError as error:
        yield Fault(name, describe_damage(error), remedy)
        return
    check_format(attributes, location.url)
    if not is_intact(attributes):
        yield Fault(f"{name}/zarr.json", "its attributes do not match their checksum", remedy)
    try:
        check_chunks(location, advise_repair(output))
    except DamageError as error:
        yield Fault(name, describe_damage(error), remedy)
    found = {array: stored.metadata.dimension_names for array, stored in arrays.items()}
    if found != {array: tuple(names) for array, names in dimensions.items()}:
        yield Fault(name, f"expected the arrays {', '.join(dimensions)} with their dimensions, found others", remedy)


def find_strays(output: Location) -> Iterator[Fault]:
    """Find partial files of killed processes; object stores never keep partial objects."""
    with explained(output, "list"):
        paths = output.fs.find(output.path) if output.is_local else []
    for path in paths:
        if _LEFTOVER.fullmatch(path):
            where = path[len(output.path) + 1 :]
            yield Fault(where, "it is a partial file of a killed process", "delete")


def describe_damage(error: Exception) -> str:
    """Describe the damage that a decoder or a checksum has found."""
    if error.__cause__ is not None:
        return f"it is damaged ({describe_cause(error.__cause__)})"
    return "its checksum does not match its content" if isinstance(error, DamageError) else "it is damaged"
