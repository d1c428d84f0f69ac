"""Tests of files behind URLs, on a disk, in memory and on a real S3 server."""

import hashlib
import pickle
import random
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fruitdask import store
from fruitdask.core.storage import (
    Location,
    check_bucket,
    exists,
    explained,
    find_encryption,
    hash_file,
    hide_secrets,
    open_new,
    write_file,
)
from fruitdask.errors import StorageError

MIB = 1 << 20


@dataclass(frozen=True)
class Place:
    """An empty folder, with ways to write and read files there without fruitdask."""

    root: Location
    put: Callable[[str, bytes], None]
    get: Callable[[str], bytes]


def open_local(request: pytest.FixtureRequest) -> Place:
    folder: Path = request.getfixturevalue("tmp_path")

    def put(name: str, data: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return Place(Location(str(folder)), put, lambda name: (folder / name).read_bytes())


def open_memory(request: pytest.FixtureRequest) -> Place:
    request.getfixturevalue("clean_memory")
    fs = fsspec.filesystem("memory")
    return Place(
        Location("memory://folder"),
        lambda name, data: fs.pipe_file(f"/folder/{name}", data),
        lambda name: MemoryFileSystem.store[f"/folder/{name}"].getvalue(),
    )


def open_s3(request: pytest.FixtureRequest) -> Place:
    bucket, options = request.getfixturevalue("s3_bucket")
    client = request.getfixturevalue("s3_client")

    def put(name: str, data: bytes) -> None:
        client.put_object(Bucket=bucket, Key=f"folder/{name}", Body=data)

    def get(name: str) -> bytes:
        body: bytes = client.get_object(Bucket=bucket, Key=f"folder/{name}")["Body"].read()
        return body

    return Place(Location(f"s3://{bucket}/folder", options), put, get)


@pytest.fixture
def clean_memory() -> Iterator[None]:
    """Empty fsspec's memory file system, which all tests of a process share."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=[open_local, open_memory, open_s3], ids=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest) -> Place:
    """An empty folder on each kind of file system."""
    opened: Place = request.param(request)
    return opened


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("url", "child"),
    [
        ("s3://b/run", "s3://b/run/a/b.zarr"),
        ("s3://b/run/", "s3://b/run/a/b.zarr"),
        ("/data/run", "/data/run/a/b.zarr"),
    ],
    ids=["url", "slash at the end", "path"],
)
def test_location_child_appends_to_the_url_and_keeps_the_options(url: str, child: str) -> None:
    assert Location(url, {"anon": True}).child("a", "b.zarr") == Location(child, {"anon": True})


@pytest.mark.parametrize(
    ("url", "path", "is_local"),
    [
        ("/data/run", "/data/run", True),
        ("/data/run/", "/data/run", True),
        ("file:///data/run", "/data/run", True),
        ("/data/a b#[1]*?", "/data/a b#[1]*?", True),
        ("memory://run/x", "/run/x", False),
        ("s3://bucket/run/", "bucket/run", False),
        ("s3://bucket", "bucket", False),
    ],
    ids=["path", "slash", "file url", "odd characters", "memory", "s3", "bucket alone"],
)
def test_location_path_drops_the_protocol(url: str, path: str, is_local: bool) -> None:
    location = Location(url)
    assert (location.path, location.is_local) == (path, is_local)


def test_location_hides_its_options_from_logs_and_survives_pickle() -> None:
    location = Location("s3://bucket/run", {"secret": "hunter2"})
    assert "hunter2" not in repr(location)
    assert pickle.loads(pickle.dumps(location)) == location


def test_location_fs_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fruitdask.core.abfs", raising=False)
    monkeypatch.setitem(sys.modules, "adlfs", None)  # Python's own way to make an import fail
    with pytest.raises(StorageError, match=r"the protocol 'abfs' needs a package .*'fruitdask\[azure\]'"):
        Location("abfs://c/x").fs


def test_location_fs_refuses_an_unknown_protocol() -> None:
    with pytest.raises(StorageError, match=r"foo://bar/x: expected a local path .* not known: foo"):
        Location("foo://bar/x").path


def test_write_file_writes_all_bytes_and_makes_the_folders(place: Place) -> None:
    data = bytes(range(256)) * 5000
    write_file(place.root.child("a", "b c", "ü#[1].bin"), data)
    assert place.get("a/b c/ü#[1].bin") == data


def test_write_file_replaces_an_existing_file(place: Place) -> None:
    place.put("x.bin", b"a longer content than the new one")
    write_file(place.root.child("x.bin"), b"new")
    assert place.get("x.bin") == b"new"


def test_write_file_leaves_only_the_file_itself(tmp_path: Path) -> None:
    write_file(Location(str(tmp_path / "x.bin")), b"1")
    write_file(Location(str(tmp_path / "x.bin")), b"2")
    assert list_names(tmp_path) == ["x.bin"]


def test_open_new_writes_pieces_and_makes_the_folders(place: Place) -> None:
    pieces = [bytes([number]) * MIB for number in range(12)]
    with open_new(place.root.child("a", "b c", "ü#[1].bin")) as file:
        for piece in pieces:
            file.write(piece)
    assert place.get("a/b c/ü#[1].bin") == b"".join(pieces)


def test_abandoned_open_new_keeps_the_old_content(place: Place) -> None:
    place.put("x.bin", b"old")
    with pytest.raises(ValueError, match="the pieces ended early"), open_new(place.root.child("x.bin")) as file:
        file.write(b"new")
        raise ValueError("the pieces ended early")
    assert place.get("x.bin") == b"old"
    assert place.root.fs.find(place.root.path) == [place.root.child("x.bin").path]


def test_write_file_onto_a_folder_fails_and_leaves_it_alone(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    (target / "inside.txt").write_text("kept")
    with pytest.raises(StorageError, match=f"write {re.escape(str(target))}: .*[Dd]irectory.*; check the"):
        write_file(Location(str(target)), b"data")
    assert list_names(tmp_path) == ["taken"]
    assert (target / "inside.txt").read_text() == "kept"


def test_write_file_below_a_file_fails_and_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(StorageError, match=r"cannot write .*file/x\.bin: .*; check the path and the"):
        write_file(Location(str(tmp_path / "file" / "x.bin")), b"data")
    assert list_names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_write_file_cut_short_keeps_the_old_content(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs POSIX resource limits")
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*x\.bin: .*File too large"):
            write_file(Location(str(target)), bytes(5 * MIB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list_names(tmp_path) == ["x.bin"]
    assert target.read_bytes() == b"old"


def test_write_file_never_shows_half_a_file(tmp_path: Path) -> None:
    target = Location(str(tmp_path / "x.bin"))
    contents = [bytes([k]) * (k * MIB // 4) for k in (1, 2)]
    write_file(target, contents[0])

    def write_in_turn() -> None:
        for k in range(100):
            write_file(target, contents[k % 2])

    writer = threading.Thread(target=write_in_turn)
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(hash_file(target))
    writer.join()
    assert seen <= {hashlib.sha256(content).hexdigest() for content in contents}


@pytest.mark.parametrize(
    "n_bytes", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB], ids=["empty", "1 B", "1 MiB - 1", "1 MiB", "1 MiB + 1", "3 MiB"]
)
def test_hash_file_equals_hashlib(tmp_path: Path, n_bytes: int) -> None:
    data = (b"0123456789abcdef!" * (n_bytes // 17 + 1))[:n_bytes]
    (tmp_path / "x.bin").write_bytes(data)
    assert hash_file(Location(str(tmp_path / "x.bin"))) == hashlib.sha256(data).hexdigest()


def test_hash_file_reads_every_file_system(place: Place) -> None:
    data = bytes(range(256)) * 6000
    place.put("x.bin", data)
    assert hash_file(place.root.child("x.bin")) == hashlib.sha256(data).hexdigest()


def test_hash_file_says_which_file_is_missing(place: Place) -> None:
    with pytest.raises(StorageError, match=f"read {re.escape(place.root.url)}/none.bin: .+; check the"):
        hash_file(place.root.child("none.bin"))


def test_hash_file_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*: .*[Dd]irectory"):
        hash_file(Location(str(tmp_path)))


def test_hash_file_says_which_bucket_is_missing(s3_server: str) -> None:
    location = Location("s3://no-such-bucket/x.bin", {"endpoint_url": s3_server})
    with pytest.raises(StorageError, match=r"cannot read s3://no-such-bucket/x\.bin: .+"):
        hash_file(location)


@pytest.mark.usefixtures("s3_server")
def test_hash_file_explains_an_unreachable_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        options = {
            "endpoint_url": f"http://127.0.0.1:{unused.getsockname()[1]}",
            "config_kwargs": {"retries": {"max_attempts": 0}},
        }
        with pytest.raises(StorageError, match=r"s3://bucket/x\.bin: .*connect to.*: no server answers there"):
            hash_file(Location("s3://bucket/x.bin", options))


def test_exists_finds_files_and_folders(place: Place) -> None:
    place.put("a/x.bin", b"1")
    found = {
        name: exists(place.root.child(*name)) for name in [("a", "x.bin"), ("a",), ("b",), ("a", "y.bin"), ("a", "x")]
    }
    assert found == {("a", "x.bin"): True, ("a",): True, ("b",): False, ("a", "y.bin"): False, ("a", "x"): False}


def test_exists_does_not_answer_from_a_cache(place: Place) -> None:
    place.put("a/x.bin", b"1")
    place.root.fs.find(place.root.path, detail=True)  # fills the listings cache of s3fs
    assert not exists(place.root.child("a", "y.bin"))
    place.put("a/y.bin", b"1")
    assert exists(place.root.child("a", "y.bin"))


@pytest.mark.parametrize(
    ("error", "cause"),
    [(PermissionError(13, "Permission denied"), "Permission denied"), (TimeoutError(), "TimeoutError")],
    ids=["with a message", "without a message"],
)
def test_explained_turns_an_oserror_into_a_sentence(error: OSError, cause: str) -> None:
    sentence = rf"^cannot list s3://b/x: .*{cause}; check the path and the permissions$"
    with pytest.raises(StorageError, match=sentence) as caught, explained(Location("s3://b/x"), "list"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [KeyError("unexpected"), StorageError("unexpected"), KeyboardInterrupt("unexpected")],
    ids=["a bug", "a sentence", "an interrupt"],
)
def test_explained_lets_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error), match="^'?unexpected'?$") as caught, explained(Location("s3://b/x"), "list"):
        raise error
    assert caught.value is error


def test_storage_error_survives_pickle(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read") as caught:
        hash_file(Location(str(tmp_path / "none")))
    copy: Any = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy)) == (StorageError, str(caught.value))
    assert isinstance(copy, OSError)


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ({}, {"max_pool_connections": 256, "retries": {"mode": "standard", "total_max_attempts": 5}}),
        (
            {"config_kwargs": {"read_timeout": 3, "retries": {"max_attempts": 1}}, "max_concurrency": 5},
            {"max_pool_connections": 256, "read_timeout": 3, "retries": {"max_attempts": 1}},
        ),
    ],
    ids=["none", "a user's"],
)
def test_location_options_of_the_user_override_ours(given: dict[str, Any], config: dict[str, Any]) -> None:
    ours = {"use_listings_cache": False, "max_concurrency": 1}
    assert Location("s3://bucket/x", given).options == ours | given | {"config_kwargs": config}
    assert Location("memory://x", given).options == Location("/x", given).options == given
    azure = {"use_listings_cache": False, "max_concurrency": 1} | given | {"attempts": 5}
    assert Location("abfs://container/x", given).options == azure


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("no AKIAIOSFODNN7EXAMPLE here", "no *** here"),
        ("https://b.s3.amazonaws.com/x?X-Amz-Signature=0f", "https://b.s3.amazonaws.com/x?***"),
        ("Credential=ASIAIOSFODNN7EXAMPLE/20240101, Signature=0f1a", "Credential=***/20240101, Signature=***"),
        ("100 % of /data/x?y #1", "100 % of /data/x?y #1"),
    ],
    ids=["access key", "presigned URL", "header", "nothing"],
)
def test_hide_secrets_hides_keys_and_signatures(text: str, hidden: str) -> None:
    assert hide_secrets(text) == hidden


@pytest.mark.parametrize(
    "options",
    [{"colour": "red"}, {"client_kwargs": {"colour": "red"}}, {"config_kwargs": {"colour": "red"}}],
    ids=["session", "client", "config"],
)
def test_unknown_storage_option_is_named(s3_server: str, options: dict[str, Any]) -> None:
    with pytest.raises(StorageError, match="read s3://bucket/x: .*'colour'; check storage_options$"):
        exists(Location("s3://bucket/x", {"endpoint_url": s3_server, **options}))


def test_times_of_s3_are_those_of_boto3(s3_bucket: tuple[str, dict[str, Any]], s3_client: Any) -> None:
    bucket, options = s3_bucket
    s3_client.put_object(Bucket=bucket, Key="a/1.jpg", Body=b"x")
    fs = Location(f"s3://{bucket}", options).fs
    # Listings have times in ISO 8601, headers in the format of e-mail.
    for operation, keys in (("list_objects_v2", {}), ("head_object", {"Key": "a/1.jpg"})):
        ours, theirs = fs.call_s3(operation, Bucket=bucket, **keys), getattr(s3_client, operation)(
            Bucket=bucket, **keys
        )
        times = [(found.get("Contents") or [found])[0]["LastModified"] for found in (ours, theirs)]
        assert times[0] == times[1] and times[0].utcoffset() == times[1].utcoffset()


def test_check_bucket_distinguishes_missing_and_empty_buckets(s3_bucket: tuple[str, dict[str, Any]]) -> None:
    bucket, options = s3_bucket
    check_bucket(Location(f"s3://{bucket}/none", options))
    check_bucket(Location(f"s3://{bucket}", options))
    with pytest.raises(StorageError, match="read s3://no-such-bucket/x: .*there is no such bucket; check"):
        check_bucket(Location("s3://no-such-bucket/x", options))


@pytest.mark.parametrize("asked", [None, "AES256", "aws:kms"])
def test_find_encryption_returns_the_configured_one(s3_bucket: tuple[str, dict[str, Any]], asked: str | None) -> None:
    bucket, options = s3_bucket
    location = Location(
        f"s3://{bucket}/x.bin", options | {"s3_additional_kwargs": {"ServerSideEncryption": asked} if asked else {}}
    )
    write_file(location, b"1")
    assert find_encryption(Location(location.url, options)) == asked


def test_find_encryption_is_for_s3_only(tmp_path: Path, s3_bucket: tuple[str, dict[str, Any]]) -> None:
    bucket, options = s3_bucket
    assert find_encryption(Location(str(tmp_path))) is None
    with pytest.raises(StorageError, match=r"s3://.*/none: HeadObject: Not Found \(404\): there is no"):
        find_encryption(Location(f"s3://{bucket}/none", options))


@pytest.mark.parametrize("n_bytes", [0, 10, 6 * MIB, 12 * MIB], ids=["empty", "small", "a part", "parts"])
@pytest.mark.parametrize("place", [open_local, open_s3], ids=["local", "s3"], indirect=True)
def test_streamed_file_is_complete_or_absent(place: Place, n_bytes: int) -> None:
    target, data = place.root.child("streamed", "a.bin"), random.Random(0).randbytes(n_bytes)

    def write(file: Any) -> None:
        for start in range(0, n_bytes, MIB):
            file.write(data[start : start + MIB])

    with pytest.raises(KeyboardInterrupt, match="in this test"), open_new(target) as file:
        write(file)
        raise KeyboardInterrupt("in this test")
    place.root.fs.invalidate_cache()
    assert place.root.fs.find(place.root.path) == []
    with open_new(target) as file:
        write(file)
    assert place.get("streamed/a.bin") == data
    assert place.root.fs.find(place.root.path) == [target.path]


def test_folder_with_two_colons_in_its_name_is_no_chain_of_file_systems(tmp_path: Path) -> None:
    # fsspec and Zarr would read and write the folder a instead.
    for name in ("a", "a::b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name.txt").write_text(name)
    folder = Location(str(tmp_path / "a::b"))
    assert folder.is_local and folder.fs.cat_file(folder.locate("name.txt")) == b"a::b"
    store.write_arrays(folder.child("explore.zarr"), {"rows": (np.ones(2), ["row"])}, {})
    assert store.read_arrays(folder.child("explore.zarr"))["rows"].tolist() == [1, 1]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["name.txt"]


def test_what_cannot_be_read_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "none")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = Location(str(tmp_path))
    assert [exists(folder.child(*names)) for names in (["file"], ["none"], ["broken"], ["file", "x"])] == [1, 0, 0, 0]
    # As without a permission, which root always has.
    with pytest.raises(StorageError, match="cannot read .*/loop/zarr.json: .*symbolic links.*; check the path and the"):
        exists(folder.child("loop", "zarr.json"))
