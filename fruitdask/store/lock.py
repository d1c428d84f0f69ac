"""The lock of an output folder: two runs at once would mix their results."""

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

#: How often an owner shows that it lives, and how long it may be silent: clocks of two machines differ, and a laptop sleeps a while.
_SECONDS_BETWEEN_SIGNS = 20.0
_SECONDS_OF_SILENCE = 300.0


class OutputLock:
    """The right to write into an output folder, taken by `locked`."""

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
        self._keeper = threading.Thread(target=self._keep, name=_name_keeper(self._owner), daemon=True)

    def check(self) -> None:
        """End a run whose lock was taken by somebody else."""
        if self._is_lost:
            raise OutputError(
                f"{self._location.url}: another run has taken this output folder, believing that this one is dead; it goes on there, so "
                "this one ends"
            )

    def take(self) -> None:
        """Take the lock; that of a run which is certainly dead is taken away first."""
        self._keeper.start()
        try:
            other = self._try_to_take()
            if other is not None and _is_dead(other):
                delete_result(self._output, LOCK)
                other = self._try_to_take()
            if other is not None:
                raise OutputError(_explain(other, self._location))
        except BaseException:
            self._stop_keeper()
            raise

    def show_life(self) -> None:
        """Write that this run lives, unless the lock is somebody else's by now; where it cannot be written, the run will notice itself."""
        with suppress(FruitdaskError):
            found = self._read()
            if found is not None and found.get("id") != self._owner["id"]:
                self._is_lost = True
                return
            write_file(self._location, self._dump())

    def release(self) -> None:
        """Take the lock away, if it is ours and can be; one that stays is known to be dead, for its keeper is."""
        self._stop_keeper()
        with suppress(FruitdaskError):
            found = self._read()
            if found is not None and found.get("id") == self._owner["id"]:
                delete_result(self._output, LOCK)
        if self._output.is_local:
            # A run that was refused before it wrote anything leaves no empty folder.
            with suppress(OSError):
                os.rmdir(self._output.path)

    def _keep(self) -> None:
        """Show life until it is over."""
        while not self._is_over.wait(_SECONDS_BETWEEN_SIGNS):
            self.show_life()

    def _stop_keeper(self) -> None:
        """Show no more life."""
        self._is_over.set()
        self._keeper.join()

    def _try_to_take(self) -> dict[str, Any] | None:
        """Take the lock, or say whose it is."""
        with explained(self._location, "write"):
            try:
                create_file(self._location, self._dump())
            except OSError:
                found = self._read()
                if found is None:
                    raise
                # It is ours where the answer to the request that wrote it was lost on its way.
                return found if found.get("id") != self._owner["id"] else None
        return None

    def _dump(self) -> bytes:
        """Write out whose the lock is, and that its owner lives."""
        return json.dumps(self._owner | {"seen": _now()}, indent=2).encode()

    def _read(self) -> dict[str, Any] | None:
        """Read whose the lock is; nothing is known of one that is damaged."""
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
    """Tell whether the owner of a lock is dead: its process, or its run in this one; elsewhere one that has been silent for long."""
    if found.get("host") == platform.node() and isinstance(found.get("pid"), int):
        if found["pid"] == os.getpid():
            # A run of this process that could not take its lock away: the storage had failed.
            return _name_keeper(found) not in {thread.name for thread in threading.enumerate()}
        return not _is_running(found["pid"])
    try:
        seen = datetime.fromisoformat(str(found.get("seen")))
    except ValueError:
        return False
    return (datetime.now(UTC) - seen).total_seconds() > _SECONDS_OF_SILENCE


def _name_keeper(owner: dict[str, Any]) -> str:
    """Name the thread that shows that the owner of a lock lives."""
    return f"fruitdask-lock-{owner.get('id')}"


def _is_running(pid: int) -> bool:
    """Tell whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _explain(found: dict[str, Any], location: Location) -> str:
    """Say who works in an output folder, and what to do about it."""
    owner = (
        f"process {found['pid']} of {found['user']} on {found['host']}, since {found['since']}, last seen {found['seen']}"
        if {"pid", "user", "host", "since", "seen"} <= found.keys()
        else "somebody"
    )
    return (
        f"another run works on this output folder ({owner}); wait for it or choose another output.url; "
        f"if it is dead, delete {location.url} and run again"
    )


def _name_user() -> str:
    """Name the user, as far as the system knows."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "somebody"


def _now() -> str:
    """Give the time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
