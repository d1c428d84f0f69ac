"""Waiting, and ways to end a cluster early, for the tests of each cloud."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

#: How long to wait for an event that is due soon.
PATIENCE_SECONDS = 60


def wait_until(condition: Callable[[], Any], what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.02)


def interrupt_self(number: int = signal.SIGINT) -> None:
    """Send this process a signal, by default that of Ctrl-C."""
    os.kill(os.getpid(), number)


def raise_error() -> None:
    """Raise an error, as user code may."""
    raise LookupError("in the block")


#: What ends a block early, and the exception that leaves it.
ENDS = [
    pytest.param(raise_error, LookupError, id="exception"),
    pytest.param(interrupt_self, KeyboardInterrupt, id="ctrl-c"),
    pytest.param(lambda: interrupt_self(signal.SIGTERM), SystemExit, id="sigterm"),
]


def end_in_the_middle(
    cluster: AbstractContextManager[Any], what: Callable[[], None], expected: type[BaseException]
) -> None:
    """Leave the block of a cluster while a task runs."""
    # As the command line does.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(expected, match="in the block|143|^$"):
            with cluster as client:
                future = client.submit(time.sleep, 600)
                wait_until(lambda: client.processing(), "the task runs")
                what()
                future.result(PATIENCE_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, previous)


def make_slow_square() -> Callable[[int], int]:
    """Make a slow function; as it is local, it is pickled by value, for workers that lack this module."""

    def square(number: int) -> int:
        time.sleep(0.2)
        return number**2

    return square
