"""Helpers for the tests of each cloud: waiting for a condition, and ending a cluster early."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import dask.config

# Load its defaults before a test changes a setting: otherwise restoring the setting would also remove the defaults.
import dask_cloudprovider.config  # noqa: F401
import pytest

#: How long to wait for an event that is due soon.
PATIENCE_SECONDS = 60


def check_tls_is_restored() -> None:
    """Check that no TLS setting of a cluster is left."""
    assert dask.config.get("distributed.comm.tls.ca-file") is None
    assert not dask.config.get("distributed.comm.require-encryption")


def wait_until(condition: Callable[[], Any], what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.02)


def assert_says(caught: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    """Check that the message of an exception contains some parts."""
    assert [part for part in parts if part not in str(caught.value)] == []


def interrupt_self(number: int = signal.SIGINT) -> None:
    """Send a signal to this process, by default the one that Ctrl-C sends."""
    os.kill(os.getpid(), number)


def raise_error() -> None:
    """Raise an error, as a user's code might."""
    raise LookupError("in the block")


#: Functions that end a block early, and the exceptions that leave the block.
ENDS = [
    pytest.param(raise_error, LookupError, id="exception"),
    pytest.param(interrupt_self, KeyboardInterrupt, id="ctrl-c"),
    pytest.param(lambda: interrupt_self(signal.SIGTERM), SystemExit, id="sigterm"),
]


def end_while_tasks_run(
    cluster: AbstractContextManager[Any], what: Callable[[], None], expected: type[BaseException]
) -> None:
    """Open a cluster, and leave its block while a task runs."""
    # The command line handles SIGTERM in this way.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(expected, match="in the block|143|^$"):
            with cluster as client:
                future = client.submit(time.sleep, 600)
                wait_until(lambda: client.processing(), "a task runs")
                what()
                future.result(PATIENCE_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, previous)


def make_slow_square() -> Callable[[int], int]:
    """Make a slow function. It is local, so it is pickled by value, because workers do not have this module."""

    def square(number: int) -> int:
        # Simulates work.
        time.sleep(0.2)
        return number**2

    return square
