"""The lock of an output folder, so that two runs never write to the same one."""

import getpass
import json
import os
import platform
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from fruitdask.core.storage import Location, create_file, exists, explained, write_file
from fruitdask.errors import DamageError, FruitdaskError, OutageError, OutputError, StorageError
from fruitdask.store.layout import LOCK
from fruitdask.store.manifests import delete_result

#: Interval of heartbeats, and how long they may be missing: clocks differ, and laptops sleep.
_HEARTBEAT_SECONDS = 20.0
_LEASE_SECONDS = 300.0


class OutputLock:
    """A lease on an output folder, renewed by a heartbeat; taken by `locked`."""

    def __init__(self, output: Location) -> None:
        self._output, self._location = output, output.child(LOCK)
        self._owner = {
            "id": uuid.uuid4().hex,
            "user": _name_user(),
            "host": platform.node(),
            "pid": os.getpid(),
            "since": _now(),
        }
        self._is_lost = False
        self._is_over = threading.Event()
        self._heartbeat = threading.Thread(target=self._send_heartbeats, name=_name_thread(self._owner), daemon=True)

    def check(self) -> None:
        """Stop a run that has lost its lock to another run."""
        if self._is_lost:
            raise OutputError(
                f"{self._location.url}: another run has taken over this output folder, because this run seemed dead; "
                "this run ends, the other one continues"
            )

    def take(self) -> None:
        """Take the lock, after deleting that of a dead run."""
        self._heartbeat.start()
        try:
            other = self._try_to_take()
            if other is not None and _is_dead(other):
                delete_result(self._output, LOCK)
                other = self._try_to_take()
            if other is not None:
                raise OutputError(_explain(other, self._location))
        except BaseException:
            self._stop_heartbeat()
            raise

    def renew(self) -> None:
        """Write a heartbeat, unless another run has the lock; if the storage fails, the run will notice."""
        with suppress(FruitdaskError):
            found = self._read()
            if found is not None and found.get("id") != self._owner["id"]:
                self._is_lost = True
                return
            write_file(self._location, self._dump())

    def release(self) -> None:
        """Delete the lock if it is ours; if that fails, its missing heartbeat shows that it is dead."""
        self._stop_heartbeat()
        with suppress(FruitdaskError):
            found = self._read()
            if found is not None and found.get("id") == self._owner["id"]:
                delete_result(self._output, LOCK)
        if self._output.is_local:
            # A run that was refused before it wrote anything must not leave an empty folder.
            with suppress(OSError):
                os.rmdir(self._output.path)

    def _send_heartbeats(self) -> None:
        """Write heartbeats until the lock is released."""
        while not self._is_over.wait(_HEARTBEAT_SECONDS):
            self.renew()

    def _stop_heartbeat(self) -> None:
        """Stop the heartbeats."""
        self._is_over.set()
        self._heartbeat.join()

    def _try_to_take(self) -> dict[str, Any] | None:
        """Take the lock; return its owner if it is taken."""
        with explained(self._location, "write"):
            try:
                create_file(self._location, self._dump())
            except OSError:
                found = self._read()
                if found is None:
                    raise
                # It is ours if only the response to our request was lost.
                return found if found.get("id") != self._owner["id"] else None
        return None

    def _dump(self) -> bytes:
        """Return the owner and the time of the heartbeat as JSON."""
        return json.dumps(self._owner | {"seen": _now()}, indent=2).encode()

    def _read(self) -> dict[str, Any] | None:
        """Read the owner of the lock; an empty one if the file is damaged."""
        with explained(self._location, "read"):
            if not exists(self._location):
                return None
            data = self._location.fs.cat_file(self._location.path)
        try:
            found = json.loads(data)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


@contextmanager
def locked(output: Location) -> Iterator[OutputLock]:
    """Hold the lock of an output folder."""
    lock = OutputLock(output)
    lock.take()
    try:
        yield lock
    except DamageError:
        raise
    except StorageError as error:
        raise OutageError(str(error)) from error
    finally:
        lock.release()


def _is_dead(found: dict[str, Any]) -> bool:
    """Whether the owner of a lock is dead: on this machine by its process, elsewhere by a missing heartbeat."""
    if found.get("host") == platform.node() and isinstance(found.get("pid"), int):
        if found["pid"] == os.getpid():
            # An earlier run of this process could not delete its lock, because the storage failed.
            return _name_thread(found) not in {thread.name for thread in threading.enumerate()}
        return not _is_running(found["pid"])
    try:
        seen = datetime.fromisoformat(str(found.get("seen")))
    except ValueError:
        return False
    return (datetime.now(UTC) - seen).total_seconds() > _LEASE_SECONDS


def _name_thread(owner: dict[str, Any]) -> str:
    """Return the name of the heartbeat thread of an owner."""
    return f"fruitdask-lock-{owner.get('id')}"


def _is_running(pid: int) -> bool:
    """Whether there is a process with this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _explain(found: dict[str, Any], location: Location) -> str:
    """Name who holds the lock, and what to do."""
    owner = (
        f"process {found['pid']} of {found['user']} on {found['host']}, since {found['since']}, last seen "
        f"{found['seen']}"
        if {"pid", "user", "host", "since", "seen"} <= found.keys()
        else "unknown"
    )
    return (
        f"another run is using this output folder ({owner}); wait for it or choose another output.url; "
        f"if it is dead, delete {location.url} and run again"
    )


def _name_user() -> str:
    """Return the name of the user, if the system knows it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _now() -> str:
    """Return the time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
