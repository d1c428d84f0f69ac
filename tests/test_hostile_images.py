"""Broken and malicious images, and thousands of mutated ones, in child processes of limited memory: none crashes or
stalls them.
"""

import os
import threading
from collections.abc import Iterator

import pytest
from chaos.fuzz_images import Opener, Tally, generate, open_all
from chaos.hostile_images import FILES, repeat_scan, truncate_seeds

from fruitdask.errors import ImageError
from fruitdask.worker.images import decode_image

#: About four seconds of one core; tests/chaos/fuzz_images.py takes any number.
N_INPUTS = 4_000
#: Files that take more than a second to open.
LASTING = {
    "png-49-megapixels-in-48-kB",
    "png-49-megapixels-transparent",
    "png-many-chunks",
    "png-fractions-for-orientation",
    "jpeg-enormous-exif",
    "jpeg-padding",
    "tiff-strips-over-each-other",
    "bmp-rle8-one-pixel-a-row",
    "bmp-rle8-jumps",
    "webp-49-megapixels-in-2-kB",
    "gif-49-megapixels",
    "heic-400-tiles",
}


def harm(data: bytes) -> str:
    """Do what a file says, as a vulnerable decoder would."""
    if data == b"crash":
        os.abort()
    if data == b"hang":
        threading.Event().wait()
    return str(bytearray(1 << 40 if data == b"memory" else 1))


@pytest.mark.slow
def test_opener_notices_harm_and_continues() -> None:
    tally = Tally()
    with Opener(harm, limit_seconds=5) as opener:
        outcomes = [opener.open(data, tally) for data in (b"crash", b"hang", b"memory", b"")]
    assert outcomes == ["crash", "hang", "raised MemoryError", str(bytearray(1))]
    assert tally.harmful[:3] == [b"crash", b"hang", b"memory"]


@pytest.fixture(scope="module")
def opener() -> Iterator[Opener]:
    """A child that opens files."""
    with Opener() as opener:
        yield opener


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LASTING else name for name in FILES]
)
def test_hostile_file_has_an_outcome(opener: Opener, name: str) -> None:
    expected, build = FILES[name]
    outcome = opener.open(build(), Tally())
    assert outcome in (("ok", "unreadable") if expected is None else (expected,))


@pytest.mark.slow
def test_truncated_files_have_outcomes() -> None:
    tally = open_all(truncate_seeds())
    assert tally.n_inputs > 800
    assert set(tally.outcomes) <= {"ok", "unreadable"}


@pytest.mark.slow
def test_mutated_files_have_outcomes() -> None:
    tally = open_all(generate(N_INPUTS, seed=1))
    assert tally.n_inputs == N_INPUTS
    assert set(tally.outcomes) == {"ok", "unreadable", "too_large"}


def test_refusal_names_the_limit_that_is_exceeded() -> None:
    with pytest.raises(ImageError, match="^expected an image with at most 100 scans, found 210$"):
        decode_image(repeat_scan(64, 200), size_px=16, max_pixels=1_000_000)
