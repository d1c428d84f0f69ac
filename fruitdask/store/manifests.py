"""The JSON files of an output folder, and checks of whether a run may write or delete there."""

import errno
import hashlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import ValidationError

from fruitdask.core.fingerprint import compare_fingerprints
from fruitdask.core.storage import Location, exists, explained, open_new, write_file
from fruitdask.errors import DamageError, OutputError, StorageError, StoreMismatchError
from fruitdask.store.layout import (
    ALL_NAMES,
    CATALOG,
    CHECKSUM,
    EXPLORATION,
    EXPLORATION_NAMES,
    MANIFEST,
    QUALITY,
    RUN_NAMES,
)
from fruitdask.store.schema import (
    ExplorationManifest,
    Manifest,
    Quality,
    RunManifest,
    check_format,
    describe_invalid,
    is_intact,
    seal,
)

AnyManifest = TypeVar("AnyManifest", bound=Manifest)

_DELETE_ATTEMPTS, _DELETE_PAUSE_SECONDS = 5, 0.2
_FILES: Mapping[type[Manifest], str] = {RunManifest: MANIFEST, ExplorationManifest: EXPLORATION}


def check_output(
    output: Location, fingerprint: Mapping[str, Any], *, overwrite: bool, may_grow: bool = False
) -> RunManifest | None:
    """Decide whether a run may use an output folder; returns the manifest of the run that it continues."""
    manifest, exploration = read_run(output), read_exploration_manifest(output)
    if manifest is None:
        names = ALL_NAMES if exploration is None else RUN_NAMES
        foreign = [name for name in names if exists(output.child(name))]
        if foreign:
            raise OutputError(
                f"{output.url}: expected an empty or new folder for the results, found {foreign[0]}, which no "
                "fruitdask run wrote; choose another output.url"
            )
    if overwrite:
        return None
    theirs = (
        manifest or exploration or ExplorationManifest(fruitdask="", status="running", fingerprint={})
    ).fingerprint
    differences = list(compare_fingerprints(theirs, fingerprint))
    if differences:
        raise StoreMismatchError(describe_mismatch(output, "; ".join(differences)))
    if "catalog" in theirs and "catalog" in fingerprint and theirs["catalog"] != fingerprint["catalog"]:
        _check_other_images(output, manifest, may_grow=may_grow)
    return manifest


def _check_other_images(output: Location, manifest: RunManifest | None, *, may_grow: bool) -> None:
    """Refuse an input with other images than the results, unless a run may update the results."""
    if manifest is not None and manifest.erasures:
        n_erased = sum(erasure.n_images for erasure in manifest.erasures)
        raise StoreMismatchError(
            f"{output.url}: since {n_erased:,} images were erased from these results, the input no longer matches "
            "them; delete the erased ones from the input too or name them in input.exclude, or start again with "
            "--overwrite"
        )
    can_grow = manifest is not None and exists(output.child(CATALOG))
    if not (can_grow and may_grow):
        advice = "; fruitdask run brings its results up to date with the input" if can_grow else ""
        raise StoreMismatchError(
            describe_mismatch(output, f"the input had other images or other versions of them{advice}")
        )


def describe_mismatch(output: Location, difference: str) -> str:
    """State that an output folder holds the results of another run."""
    return (
        f"{output.url} belongs to another run: {difference}; choose another output.url, or --overwrite to delete those "
        "results"
    )


def read_run(output: Location) -> RunManifest | None:
    """Read the manifest of a run; None if there is none."""
    return _read_manifest(output, RunManifest)


def read_exploration_manifest(output: Location) -> ExplorationManifest | None:
    """Read the manifest of an exploration; None if there is none."""
    return _read_manifest(output, ExplorationManifest)


def _read_manifest(output: Location, kind: type[AnyManifest]) -> AnyManifest | None:
    """Read and parse a manifest."""
    location = output.child(_FILES[kind])
    try:
        tree = read_json(location)
        return None if tree is None else kind.model_validate(tree)
    except ValidationError as error:
        found = describe_invalid(error)
    except (ValueError, RecursionError):
        found = "something else"
    raise OutputError(
        f"{location.url}: expected the manifest of a fruitdask run, found {found}; choose another output.url, "
        f"or if it is that of a run, {advise_repair(output)}"
    )


def has_begun(output: Location) -> bool:
    """Whether a run or an exploration has begun in an output folder."""
    return any(exists(output.child(name)) for name in _FILES.values())


def write_manifest(output: Location, manifest: Manifest) -> None:
    """Write the manifest of a run or of an exploration."""
    write_json(output.child(_FILES[type(manifest)]), manifest.dump())


def read_json(location: Location) -> Any:
    """Read a JSON file; None if there is none."""
    with explained(location, "read"):
        if not exists(location):
            return None
        tree = json.loads(location.fs.cat_file(location.path))
    check_format(tree, location.url)
    if not isinstance(tree, dict) or CHECKSUM not in tree:
        raise ValueError("it has no checksum")
    if not is_intact(tree):
        folder = Location(location.url.rpartition("/")[0], location.storage_options)
        raise DamageError(
            f"{location.url} is damaged (its checksum does not match its content); {advise_repair(folder)}"
        )
    tree.pop(CHECKSUM)
    return tree


def read_quality(output: Location) -> dict[str, Any] | None:
    """Read how well the features of a run separate the classes."""
    location = output.child(QUALITY)
    try:
        tree = read_json(location)
        return None if tree is None else Quality.model_validate(tree).dump()
    except ValidationError as error:
        found = f"found {describe_invalid(error)}"
    except (ValueError, RecursionError) as error:
        found = str(error)
    raise DamageError(f"{location.url} is damaged ({found}); {advise_repair(output)}")


def write_json(location: Location, tree: Mapping[str, Any]) -> None:
    """Write a JSON file with its format and checksum."""
    write_file(location, json.dumps(seal(tree), indent=2, allow_nan=False).encode() + b"\n")


def write_digested(output: Location, name: str, data: bytes) -> dict[str, str]:
    """Write a file and return its digest, which a manifest keeps."""
    digests = dict[str, str]()
    with open_digested(output, name, digests) as write:
        write(data)
    return digests


@contextmanager
def open_digested(output: Location, name: str, digests: dict[str, str]) -> Iterator[Callable[[bytes], None]]:
    """Open a file to be written piece by piece; its digest is added to others at the end."""
    digest = hashlib.sha256()
    with open_new(output.child(name)) as file:

        def write(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        yield write
    digests[name] = f"sha256:{digest.hexdigest()}"


def advise_repair(output: Location) -> str:
    """Describe what to do about damage."""
    return f"use fruitdask verify {shlex.quote(output.url)} --repair, and run again"


def clear_output(output: Location) -> None:
    """Delete the results of a run and of an exploration, and nothing else in the folder."""
    for manifest in (read_run(output), read_exploration_manifest(output)):
        if manifest is not None:
            write_manifest(output, manifest.mark_deleting())
    for name in ALL_NAMES:
        delete_result(output, name)


def delete_outdated(output: Location, catalog: str) -> None:
    """Delete the exploration if it is of other images than those of a catalog, given by its hash."""
    exploration = read_exploration_manifest(output)
    if exploration is not None and exploration.fingerprint.get("catalog") != catalog:
        write_manifest(output, exploration.mark_deleting())
        for name in EXPLORATION_NAMES:
            delete_result(output, name)


def delete_result(output: Location, name: str) -> None:
    """Delete a file or folder of the results, if it exists."""
    location = output.child(name)
    with explained(location, "delete"):
        if exists(location):
            _remove(location)
            # s3fs ignores objects that S3 refuses to delete.
            if exists(location):
                raise StorageError(
                    f"cannot delete {location.url}: it still exists; check the permission to delete it "
                    "(s3:DeleteObject)"
                )


def _remove(location: Location) -> None:
    """Delete a file or folder; retry if a leftover task of an interrupted run has just written into it."""
    for attempt in range(_DELETE_ATTEMPTS):
        try:
            location.fs.rm(location.path, recursive=True)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt == _DELETE_ATTEMPTS - 1:
                raise
            time.sleep(_DELETE_PAUSE_SECONDS)
