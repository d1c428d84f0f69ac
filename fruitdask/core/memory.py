"""Memory that was freed, but that the process still holds."""

import ctypes
from contextlib import suppress

import pyarrow as pa


def return_freed_memory() -> None:
    """Return freed memory to the system, if the C library can: reading in blocks leaves gaps between what stays."""
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
