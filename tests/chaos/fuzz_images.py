"""Feed mutated images to all code that opens untrusted files, in child processes, and count the outcomes.

python tests/chaos/fuzz_images.py [--inputs 10000] [--seed 0] [--keep FOLDER]
"""

import argparse
import multiprocessing
import os
import random
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos.hostile_images import build_seeds

SIDE_PX, MAX_PIXELS = 64, 50_000_000
#: Memory that a child may take on top of that at its start, and seconds per input; far more than any should need.
MORE_BYTES, LIMIT_SECONDS = 1_500 << 20, 60.0
#: Numbers that often break decoders.
TELLING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass
class Tally:
    """What happened: inputs by outcome, the slowest one's seconds, the most memory that a child had, and inputs that
    did harm.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    peak_bytes: int = 0
    harmful: list[bytes] = field(default_factory=list)

    @property
    def n_inputs(self) -> int:
        """All inputs."""
        return self.outcomes.total()


def open_like_a_worker(data: bytes) -> str:
    """Do all that a run and an exploration do with the bytes of a file; returns its status."""
    import imagehash
    from PIL import Image

    from fruitdask.errors import ImageError, ImageTooLargeError
    from fruitdask.worker.images import decode_image, read_header
    from fruitdask.worker.metadata import KINDS, find_metadata

    assert find_metadata(data) <= set(KINDS)
    header = read_header(data)
    status = "ok"
    for is_fast in (False, True):
        try:
            pixels = decode_image(data, size_px=SIDE_PX, max_pixels=MAX_PIXELS, is_fast=is_fast)
        except ImageTooLargeError:
            status = "too_large"
        except ImageError as error:
            assert str(error) and "\n" not in str(error)
            status = "unreadable"
        else:
            assert header is not None and pixels.shape == (SIDE_PX, SIDE_PX, 3)
            imagehash.phash(Image.fromarray(pixels))
    return status


def serve(connection: Connection, open_file: Callable[[bytes], str]) -> None:
    """Open each file that arrives, in a process of limited memory; send its outcome, seconds and the peak memory so
    far.
    """
    warnings.simplefilter("ignore")
    # libtiff prints warnings to this descriptor.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # Memory for imports does not count.
    open_file(b"")
    more = read_status("VmSize:") + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (more, more))
    while True:
        data = connection.recv_bytes()
        start = time.perf_counter()
        try:
            outcome = open_file(data)
        except Exception as error:
            outcome = f"raised {type(error).__name__}"
        connection.send((outcome, time.perf_counter() - start, read_status("VmHWM:")))


def read_status(name: str) -> int:
    """Read a size of this process from Linux, in bytes."""
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) * 1024


class Opener:
    """A child process that opens files; one that dies or stalls is replaced."""

    def __init__(
        self, open_file: Callable[[bytes], str] = open_like_a_worker, limit_seconds: float = LIMIT_SECONDS
    ) -> None:
        self._open_file, self._limit_seconds = open_file, limit_seconds
        self._start()

    def __enter__(self) -> Self:
        """Use it as a context manager, which ends the child."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child."""
        self._end()

    def open(self, data: bytes, tally: Tally) -> str:
        """Make the child open a file; returns the outcome: a status, ``raised ...``, ``crash`` or ``hang``."""
        outcome, seconds, peak_bytes = "hang", self._limit_seconds, 0
        try:
            self._connection.send_bytes(data)
            if self._connection.poll(self._limit_seconds):
                outcome, seconds, peak_bytes = self._connection.recv()
        except (EOFError, ConnectionError):
            outcome = "crash"
        if outcome in ("hang", "crash"):
            self._end()
            self._start()
        tally.outcomes[outcome] += 1
        tally.slowest_seconds = max(tally.slowest_seconds, seconds)
        tally.peak_bytes = max(tally.peak_bytes, peak_bytes)
        if outcome not in ("ok", "unreadable", "too_large"):
            tally.harmful.append(data)
        return outcome

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._open_file), daemon=True)
        self._process.start()
        theirs.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def mutate(data: bytes, source: random.Random, others: list[bytes]) -> bytes:
    """Change a file at a few places, more often near its start, where its headers are."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 3, 5, 8, 20))):
        at = source.randrange(min(len(changed), source.choice((64, 400, len(changed)))) or 1) if changed else 0
        n_bytes = source.choice((1, 2, 4))
        kind = source.randrange(7)
        if kind == 0:
            changed[at : at + 1] = bytes([(changed[at] if changed else 0) ^ 1 << source.randrange(8)])
        elif kind == 1:
            changed[at : at + n_bytes] = source.randbytes(n_bytes)
        elif kind == 2:
            number = source.choice(TELLING) & (1 << 8 * n_bytes) - 1
            changed[at : at + n_bytes] = number.to_bytes(n_bytes, source.choice(("little", "big")))
        elif kind == 3:
            del changed[at : at + source.randrange(1, 64)]
        elif kind == 4:
            changed[at:at] = changed[at : at + source.randrange(1, 200)] * source.randrange(1, 5)
        elif kind == 5:
            other = source.choice(others)
            start = source.randrange(len(other))
            changed[at : at + 40] = other[start : start + source.randrange(1, 200)]
        elif source.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def generate(n_inputs: int, seed: int) -> Iterator[bytes]:
    """Generate mutations of images of all formats, the same ones for the same seed."""
    source, seeds = random.Random(seed), build_seeds()
    for _ in range(n_inputs):
        yield mutate(source.choice(seeds), source, seeds)


def open_all(files: Iterable[bytes]) -> Tally:
    """Open files in a child."""
    tally = Tally()
    with Opener() as opener:
        for data in files:
            opener.open(data, tally)
    return tally


def main() -> int:
    """Print a table; the exit code is 1 where an input did harm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for inputs that did harm")
    arguments = parser.parse_args()
    start = time.perf_counter()
    tally = open_all(generate(arguments.inputs, arguments.seed))
    rows = {
        "inputs": f"{tally.n_inputs:,}",
        **{status: f"{tally.outcomes.pop(status, 0):,}" for status in ("ok", "unreadable", "too_large")},
        **{kind: f"{tally.outcomes.pop(kind, 0):,}" for kind in ("crash", "hang")},
        **{kind: f"{count:,}" for kind, count in sorted(tally.outcomes.items())},
        "slowest seconds": f"{tally.slowest_seconds:.2f}",
        "peak memory, MB": f"{tally.peak_bytes / 1e6:,.0f}",
        "all, seconds": f"{time.perf_counter() - start:.0f}",
    }
    for name, value in rows.items():
        print(f"{name:<20}{value:>12}")
    if arguments.keep and tally.harmful:
        os.makedirs(arguments.keep, exist_ok=True)
        for number, data in enumerate(tally.harmful):
            (arguments.keep / f"{number:05d}").write_bytes(data)
    return 1 if tally.harmful else 0


if __name__ == "__main__":
    raise SystemExit(main())
