"""What happens to clusters in the cloud, for the tests of each of them."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

#: How long to wait for what comes soon.
PATIENCE_SECONDS = 60


def wait_until(condition: Callable[[], Any], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


def interrupt_self(number: int = signal.SIGINT) -> None:
    """Type Ctrl-C."""
    os.kill(os.getpid(), number)


def raise_error() -> None:
    """Fail."""
    raise LookupError("in the block")


def make_slow_square() -> Callable[[int], int]:
    """Make a function that takes some time; being local, it travels by value to workers that do not have this module."""

    def square(number: int) -> int:
        time.sleep(0.2)
        return number**2

    return square
