"""Partitions and blocks of classes: what is computed, stored and retried as one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

#: Value of the catalog's ``bytes`` for an image that is no longer in the input.
VANISHED_BYTES = -1
#: Values of ``bytes`` and ``version`` for an image that the table of labels names and the input does not have.
UNLISTED = (0, 0)


@dataclass(frozen=True)
class Partition:
    """A contiguous range of catalog rows: the unit of scheduling, storage, commit and retry.

    Only workers use `rows` and `excluded`. They are here because a task gets nothing else that differs between
    partitions: the scheduler changes them to retry a partition without its poison images.
    """

    #: Index of its chunk in the store, from 0.
    index: int
    #: Catalog row of its first image.
    start: int
    #: Paths of its images, relative to the input URL.
    paths: tuple[str, ...]
    labels: tuple[str, ...]
    #: Sizes and versions of the files in the catalog. Files that have vanished are not read.
    bytes: tuple[int, ...] = ()
    versions: tuple[int, ...] = ()
    #: Places, from 0, of the images to compute if the store has the others already; all by default.
    rows: tuple[int, ...] | None = None
    #: Places of poison images, which kill the process that opens them.
    excluded: frozenset[int] = frozenset()

    def __str__(self) -> str:
        """Name it by its images."""
        return f"partition {self.index} ({self.paths[0]} to {self.paths[-1]})"

    @property
    def places_to_read(self) -> tuple[int, ...]:
        """Places of the images to compute that have not vanished."""
        places = range(len(self.paths)) if self.rows is None else self.rows
        return tuple(place for place in places if not self.bytes or self.bytes[place] != VANISHED_BYTES)

    @property
    def unlisted_places(self) -> tuple[int, ...]:
        """Places of the images that the input does not have."""
        rows = zip(self.bytes, self.versions, strict=False)
        return tuple(place for place, row in enumerate(rows) if row == UNLISTED)

    def select(self, places: Sequence[int]) -> "Partition":
        """Select some of the images."""
        if len(places) == len(self.paths):
            return self
        columns = {name: getattr(self, name) for name in ("paths", "labels", "bytes", "versions")}
        chosen: dict[str, Any] = {
            name: tuple(column[place] for place in places) for name, column in columns.items() if column
        }
        excluded = frozenset(row for row, place in enumerate(places) if place in self.excluded)
        return replace(self, **chosen, rows=None, excluded=excluded)


@dataclass(frozen=True)
class ClassBlock:
    """A range of classes in alphabetical order; one task adds up their sums."""

    index: int
    #: Position of the first class among all, and that after the last.
    start: int
    stop: int
    #: The partitions that hold these classes, each with the range of these among its own classes.
    pieces: tuple[tuple[int, int, int], ...]
    #: The position of each class in these ranges.
    codes: tuple[int, ...]

    def __str__(self) -> str:
        """Name it by its number of classes."""
        return f"the comparison of {self.stop - self.start:,} classes"
