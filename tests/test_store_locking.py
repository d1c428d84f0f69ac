"""The lock of an output folder: one run at a time, and a dead run blocks no other."""

import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fruitdask.core.storage import Location
from fruitdask.errors import DamageError, FruitdaskError, OutageError, OutputError, StorageError
from fruitdask.store import OutputLock, locked

LOCK = "run.lock"


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An output folder, on disk and on S3."""
    if request.param == "disk":
        return Location(str(tmp_path / "out"))
    bucket, options = request.getfixturevalue("s3_bucket")
    return Location(f"s3://{bucket}/out", options)


def read_lock(output: Location) -> dict[str, Any]:
    """Read the lock."""
    return dict(json.loads(output.fs.cat_file(output.child(LOCK).path)))


def write_lock(output: Location, **owner: Any) -> None:
    """Leave a lock of another run."""
    now = datetime.now(UTC).isoformat()
    owner = {"id": "theirs", "user": "eve", "host": "elsewhere", "pid": 1, "since": now, "seen": now} | owner
    location = output.child(LOCK)
    location.fs.makedirs(output.path, exist_ok=True)
    location.fs.pipe_file(location.path, json.dumps(owner).encode())


def find_dead_process() -> int:
    """Find the process id of a dead process."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


def test_second_run_is_refused_and_names_the_owner_of_the_lock(output: Location) -> None:
    with locked(output) as lock:
        assert read_lock(output)["pid"] == os.getpid()
        expected = (
            rf"another run is using this output folder \(process {os.getpid()} of .* on .*, since .*, last seen .*\); "
            r"wait for it or .*; if it is dead, delete .*run.lock and run again"
        )
        with pytest.raises(OutputError, match=expected), locked(output):
            pass
        lock.check()
    assert not output.fs.exists(output.child(LOCK).path)
    with locked(output):
        pass


def test_only_one_of_many_runs_at_once_gets_the_lock(output: Location) -> None:
    barrier, winners, losers = threading.Barrier(8), [], []

    def take() -> None:
        lock = OutputLock(output)
        barrier.wait()
        try:
            lock.take()
            winners.append(lock)
        except OutputError:
            losers.append(lock)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(winners), len(losers)) == (1, 7)


@pytest.mark.parametrize("owner", ["a dead process here", "a silent one elsewhere"])
def test_lock_of_a_dead_run_is_taken_over(output: Location, owner: str) -> None:
    if owner == "a dead process here":
        write_lock(output, host=os.uname().nodename, pid=find_dead_process())
    else:
        write_lock(output, seen=(datetime.now(UTC) - timedelta(minutes=6)).isoformat())
    with locked(output):
        assert read_lock(output)["id"] != "theirs"


@pytest.mark.parametrize(
    "owner",
    [{}, {"host": os.uname().nodename, "pid": os.getppid(), "seen": "2020-01-01T00:00:00+00:00"}, {"seen": "what?"}],
    ids=["elsewhere", "here and alive, though silent", "unknown time"],
)
def test_lock_of_a_run_that_may_be_alive_is_respected(output: Location, owner: dict[str, Any]) -> None:
    write_lock(output, **owner)
    with pytest.raises(OutputError, match="another run is using this output folder .*of eve"), locked(output):
        pass
    assert read_lock(output)["id"] == "theirs"


def test_damaged_lock_is_respected_and_says_how_to_break_it(output: Location) -> None:
    write_lock(output)
    output.fs.pipe_file(output.child(LOCK).path, b"{half a lo")
    with pytest.raises(OutputError, match=r"\(unknown\); .*if it is dead, delete .*run.lock"), locked(output):
        pass


def test_run_whose_lock_was_taken_ends_and_leaves_the_other_lock(output: Location) -> None:
    with locked(output) as lock:
        write_lock(output)
        lock.renew()
        with pytest.raises(OutputError, match="another run has taken over this output folder"):
            lock.check()
    assert read_lock(output)["id"] == "theirs"


def test_heartbeat_renews_the_lock(output: Location) -> None:
    lock = OutputLock(output)
    lock.take()
    first = read_lock(output)
    output.fs.pipe_file(output.child(LOCK).path, json.dumps(first | {"seen": "2020-01-01T00:00:00+00:00"}).encode())
    lock.renew()
    assert read_lock(output)["seen"] >= first["seen"]


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write .*file/out/run.lock: "), locked(
        Location(f"{tmp_path}/file/out")
    ):
        pass


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(StorageError, OutageError), (OutageError, OutageError), (DamageError, DamageError), (OutputError, OutputError)],
    ids=["storage", "outage", "damage", "another error"],
)
def test_outage_under_a_lock_is_distinguished_from_a_wrong_output(
    tmp_path: Path, raised: type[FruitdaskError], expected: type[FruitdaskError]
) -> None:
    with pytest.raises(FruitdaskError, match="^cannot write x$") as caught, locked(Location(f"{tmp_path}/out")):
        raise raised("cannot write x")
    assert type(caught.value) is expected
