"""The manifests, which say whose an output folder is, other small JSON files, and what may be deleted."""

import errno
import hashlib
import json
import shlex
import time
from collections.abc import Mapping
from typing import Any

from fruitdask.core.storage import Location, exists, explained, write_file
from fruitdask.errors import DamageError, OutputError, StorageError, StoreMismatchError
from fruitdask.store.layout import CATALOG, CHECKSUM, EXPLORATION, EXPLORATION_NAMES, MANIFEST, QUALITY, RUN_NAMES

_DELETE_ATTEMPTS, _DELETE_PAUSE_SECONDS = 5, 0.2


def check_output(
    output: Location, fingerprint: Mapping[str, str], *, overwrite: bool, may_grow: bool = False
) -> dict[str, Any] | None:
    """Decide whether a run may use an output folder."""
    manifest, exploration = read_manifest(output), read_manifest(output, name=EXPLORATION)
    if manifest is None:
        names = EXPLORATION_NAMES + RUN_NAMES if exploration is None else RUN_NAMES
        foreign = [name for name in names if exists(output.child(name))]
        if foreign:
            raise OutputError(
                f"{output.url}: expected an empty or new folder for the results, found {foreign[0]}, which no fruitdask run wrote; "
                "choose another output.url"
            )
    if overwrite:
        return None
    found = manifest or exploration or {"fingerprint": {}}
    for name in set(fingerprint) & set(found["fingerprint"]):
        theirs, ours = found["fingerprint"][name], fingerprint[name]
        if theirs != ours and name == "catalog" and found.get("erasures"):
            n_erased = sum(erasure["n_images"] for erasure in found["erasures"])
            raise StoreMismatchError(
                f"{output.url}: the input has other images than those that are left here after some were erased ({n_erased:,} in all); "
                "delete the erased ones from the input too or name them in input.exclude, or begin again with --overwrite"
            )
        if theirs != ours:
            can_grow = name == "catalog" and manifest is not None and exists(output.child(CATALOG))
            if can_grow and may_grow:
                continue
            difference = f"its {name} has the fingerprint {_shorten(theirs)}, this run's is {_shorten(ours)}"
            advice = "; use fruitdask run to bring its results up to date with the input" if can_grow else ""
            raise StoreMismatchError(describe_mismatch(output, difference + advice))
    return manifest


def describe_mismatch(output: Location, difference: str) -> str:
    """Say that an output folder holds the results of another run."""
    return f"{output.url} belongs to another run: {difference}; choose another output.url, or --overwrite to delete those results"


def read_manifest(output: Location, *, name: str = MANIFEST) -> dict[str, Any] | None:
    """Read the manifest of a run or of an exploration."""
    location = output.child(name)
    try:
        manifest = read_json(location)
        if manifest is None:
            return None
        texts = manifest["fruitdask"], manifest["status"]
        is_ours = all(isinstance(text, str) for text in texts) and isinstance(manifest["fingerprint"], dict)
    except (ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise OutputError(
            f"{location.url}: expected the manifest of a fruitdask run, found something else; choose another output.url, "
            f"or if it is that of a run, {advise_repair(output)}"
        )
    return dict(manifest)


def has_begun(output: Location) -> bool:
    """Tell whether a run or an exploration has begun in an output folder."""
    return any(exists(output.child(name)) for name in (MANIFEST, EXPLORATION))


def write_manifest(output: Location, manifest: Mapping[str, Any], *, name: str = MANIFEST) -> None:
    """Write the manifest of a run or of an exploration."""
    write_json(output.child(name), manifest)


def read_json(location: Location) -> Any:
    """Read a JSON file."""
    with explained(location, "read"):
        if not exists(location):
            return None
        tree = json.loads(location.fs.cat_file(location.path))
    if not is_intact(tree):
        folder = Location(location.url.rpartition("/")[0], location.storage_options)
        raise DamageError(
            f"{location.url} is damaged (its checksum is another than when it was written); {advise_repair(folder)}"
        )
    if isinstance(tree, dict):
        tree.pop(CHECKSUM, None)
    return tree


def read_quality(output: Location) -> dict[str, Any] | None:
    """Read how well the features of a run keep the classes apart."""
    location = output.child(QUALITY)
    try:
        quality: dict[str, Any] | None = read_json(location)
    except ValueError as error:
        raise DamageError(f"{location.url} is damaged ({error}); {advise_repair(output)}") from error
    return quality


def write_json(location: Location, tree: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    write_file(location, json.dumps(seal(tree), indent=2, allow_nan=False).encode() + b"\n")


def seal(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Add a checksum to a tree of JSON."""
    bare = {name: value for name, value in tree.items() if name != CHECKSUM}
    # Names of entries that are numbers are texts once they are read again.
    text = json.dumps(json.loads(json.dumps(bare)), sort_keys=True)
    return bare | {CHECKSUM: f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"}


def is_intact(tree: Any) -> bool:
    """Tell whether a tree of JSON is what was sealed."""
    return not isinstance(tree, dict) or CHECKSUM not in tree or seal(tree)[CHECKSUM] == tree[CHECKSUM]


def advise_repair(output: Location) -> str:
    """Say what to do about damage."""
    return f"use fruitdask verify {shlex.quote(output.url)} --repair, and run again"


def clear_output(output: Location) -> None:
    """Delete the results of a run and of an exploration, and nothing else that lies in the folder."""
    for name in (MANIFEST, EXPLORATION):
        # Should this be interrupted, what is left must not be taken for results.
        manifest = read_manifest(output, name=name)
        if manifest is not None:
            write_manifest(output, manifest | {"status": "deleting"}, name=name)
    for name in EXPLORATION_NAMES + RUN_NAMES:
        delete_result(output, name)


def delete_result(output: Location, name: str) -> None:
    """Delete one of a run's results if it is there."""
    location = output.child(name)
    with explained(location, "delete"):
        if exists(location):
            _remove(location)
            # s3fs passes over objects that S3 does not let it delete.
            if exists(location):
                raise StorageError(
                    f"cannot delete {location.url}: it is still there; check that you may delete it (s3:DeleteObject)"
                )


def _remove(location: Location) -> None:
    """Delete a folder, again where a task that an interrupted run left on a user's cluster has just put a file into it."""
    for attempt in range(_DELETE_ATTEMPTS):
        try:
            location.fs.rm(location.path, recursive=True)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt == _DELETE_ATTEMPTS - 1:
                raise
            time.sleep(_DELETE_PAUSE_SECONDS)


def _shorten(fingerprint: Any) -> str:
    """Shorten a hash; other fingerprints are words."""
    return fingerprint[:12] if isinstance(fingerprint, str) and len(fingerprint) == 64 else str(fingerprint)
