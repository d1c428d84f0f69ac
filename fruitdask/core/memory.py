"""Freed memory that the process has not returned to the system."""

import ctypes
from contextlib import suppress

import pyarrow as pa


def return_freed_memory() -> None:
    """Return freed memory to the system, if the C library can: reading in blocks leaves gaps between live objects."""
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
