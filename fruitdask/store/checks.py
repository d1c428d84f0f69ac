"""What can be wrong with what is stored, part by part, and what mends it."""

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

from fruitdask.core.storage import Location, describe_cause, exists, explained, write_file
from fruitdask.errors import DamageError, FormatError, OutputError
from fruitdask.store.arrays import StoredArray, create_store, name_store, read_arrays
from fruitdask.store.layout import EXPLORATION, FEATURES, MANIFEST, STATUSES, name_outcomes
from fruitdask.store.manifests import advise_repair, read_exploration_manifest, read_quality, read_run
from fruitdask.store.outcomes import read_outcomes
from fruitdask.store.schema import check_format, is_intact

#: What a process leaves that was killed while it wrote a file: fruitdask's own files, and Zarr's.
_LEFTOVER = re.compile(r".+\.[0-9a-f]{32}\.part(ial)?")
#: Entries of ``zarr.json`` (Zarr v3, sections 4 and 5), and of the objects in it. Zarr passes over others, and takes defaults instead.
_ZARR_KEYS = frozenset(
    "zarr_format node_type attributes consolidated_metadata shape data_type chunk_grid chunk_key_encoding fill_value codecs "
    "dimension_names storage_transformers".split()
)
_EXTENSION_KEYS = frozenset({"name", "configuration"})
#: What describes features and statuses.
_DESCRIPTIONS = ("zarr.json", "features/zarr.json", "status/zarr.json")


#: What mends a fault, and what a repair and the next run do about it.
Remedy = Literal["compute", "reduce", "explore", "draw", "restore", "delete", "none"]
_REMEDIES: Mapping[Remedy, str] = {
    "compute": "the next run computes the partition again",
    "reduce": "the next run reduces the features and writes the tables again",
    "explore": "the next run looks at all images again",
    "draw": "the next run draws figures and page again",
    "restore": "it is written again from what else is stored",
    "delete": "it is deleted",
    "none": "nothing that is stored says what it should be; begin again with --overwrite",
}


@dataclass(frozen=True)
class Fault:
    """Something in an output folder that is not as it should be."""

    #: The file, array or partition, below the output folder.
    where: str
    what: str
    #: What mends it: the next run computes the partition again (``compute``), reduces (``reduce``), explores
    #: (``explore``) or draws (``draw``), a repair restores it from what else is stored (``restore``) or deletes it
    #: (``delete``), or nothing does (``none``).
    remedy: Remedy
    #: Which partition it belongs to, if to one.
    partition: int | None = None

    def __str__(self) -> str:
        """Say it in one sentence."""
        return f"{self.where}: {self.what}; {_REMEDIES[self.remedy]}"


@dataclass(frozen=True, eq=False)
class CheckedPartition:
    """What a partition holds, and what is wrong with it."""

    index: int
    faults: tuple[Fault, ...]
    #: Its outcomes; None where they are damaged.
    outcomes: pd.DataFrame | None
    #: Its features; None where they are damaged.
    features: npt.NDArray[np.float32] | None


def check_partition(
    output: Location, arrays: Mapping[str, StoredArray], index: int, *, may_grow: bool = False
) -> CheckedPartition:
    """Check a partition that is committed: all of it can be read, and its parts agree."""
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
    """Say in what the parts of a partition do not agree."""
    if len(outcomes) != len(codes):
        yield f"expected outcomes of {len(codes):,} images, found {len(outcomes):,}"
        return
    if not outcomes["path"].is_unique:
        yield "expected each path once, found one twice"
    is_ok = (outcomes["status"] == "ok").to_numpy()
    expected = outcomes["status"].map({status: code for code, status in enumerate(STATUSES) if code}).to_numpy()
    for what, is_wrong in (
        ("the status is not that of its outcome", codes != expected),
        ("the features are not finite, though the outcome is ok", is_ok & ~np.isfinite(features).all(axis=1)),
        ("there are features, though the outcome is a failure", ~is_ok & ~np.isnan(features).all(axis=1)),
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


def check_store(
    output: Location,
    *,
    n_images: int,
    n_features: int,
    images_per_partition: int,
    can_restore: bool,
    may_grow: bool = False,
) -> Iterator[Fault]:
    """Check what describes features and statuses: the arrays have the shape of the run, and attributes are what was
    written.
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
    """Write again what describes features and statuses; chunks stay as they are."""
    with TemporaryDirectory() as folder:
        shape = {"n_images": n_images, "n_features": n_features, "images_per_partition": images_per_partition}
        create_store(Location(folder), **shape, attributes=attributes)
        for name in names:
            source = Location(folder).child(name)
            write_file(output.child(name), source.fs.cat_file(source.path))


def _compare_descriptions(output: Location, model: Location, name: str, *, may_grow: bool) -> str:
    """Say in what the description of the group or an array differs from a model; the group's attributes have a checksum instead."""
    if not exists(output.child(FEATURES, name)):
        return "it is missing"
    try:
        found, expected = (_read_description(place, name) for place in (output, model))
    except DamageError as error:
        return describe_damage(error)
    if name == "zarr.json":
        is_whole = "fingerprint" in found["attributes"] and is_intact(found["attributes"])
        return "" if is_whole else "its attributes are not what was written"
    if may_grow and found["shape"][0] < expected["shape"][0]:
        found["shape"] = (expected["shape"][0], *found["shape"][1:])
    differing = [key for key in expected if found.get(key) != expected[key]]
    return f"it does not describe the run: {', '.join(differing)}" if differing else ""


def _read_description(output: Location, name: str) -> dict[str, Any]:
    """Read what describes the group or an array, as readers see it; chunks without checksums are as good."""
    location = output.child(FEATURES, *name.split("/")[:-1])
    _check_keys(location, output)
    with explained(location, "read", remedy=advise_repair(output)):
        description: dict[str, Any] = zarr.open(**name_store(location), mode="r").metadata.to_dict()
    description["codecs"] = [codec for codec in description.get("codecs", []) if codec["name"] != "crc32c"]
    return description


def _check_keys(location: Location, output: Location) -> None:
    """Check that what describes a group or an array has no entries that Zarr does not know."""
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
    """Check what describes a group of small arrays."""
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
        yield Fault(f"{name}/zarr.json", "its attributes are not what was written", remedy)
    try:
        read_arrays(location)
    except DamageError as error:
        yield Fault(name, describe_damage(error), remedy)
    found = {array: stored.metadata.dimension_names for array, stored in arrays.items()}
    if found != {array: tuple(names) for array, names in dimensions.items()}:
        yield Fault(name, f"expected the arrays {', '.join(dimensions)} with their dimensions, found others", remedy)


def find_strays(output: Location) -> Iterator[Fault]:
    """Find what processes left that were killed while they wrote a file; an object store keeps no half of an object."""
    with explained(output, "list"):
        paths = output.fs.find(output.path) if output.is_local else []
    for path in paths:
        if _LEFTOVER.fullmatch(path):
            where = path[len(output.path) + 1 :]
            yield Fault(where, "it is half of a file, left by a process that was killed", "delete")


def describe_damage(error: Exception) -> str:
    """Say what a decoder, or a comparison with a checksum, has found."""
    if error.__cause__ is not None:
        return f"it is damaged ({describe_cause(error.__cause__)})"
    return "its checksum does not match its content" if isinstance(error, DamageError) else "it is damaged"
