"""Resizing is Pillow's, bit for bit; where the kernels cannot be used, Pillow does it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from PIL import Image

from fruitdask.worker.images import kernel, resize


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Make noise of extreme values, which overshoots and is clipped."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.choice(np.array([0, 1, 127, 254, 255], np.uint8), (height, width, 3)))


def resize_by_pillow(image: Image.Image, side_px: int) -> np.ndarray:
    """Resize as Keras does in load_img."""
    return np.asarray(image.resize((side_px, side_px), Image.Resampling.BICUBIC))


@settings(max_examples=300)
@given(width=st.integers(1, 700), height=st.integers(1, 700), side_px=st.integers(1, 300), seed=st.integers(0, 99))
@example(width=500, height=776, side_px=224, seed=0)
@example(width=500, height=777, side_px=224, seed=0)
@example(width=40, height=32, side_px=32, seed=0)
@example(width=40, height=31, side_px=8, seed=0)
@example(width=32, height=33, side_px=32, seed=0)
@example(width=1, height=700, side_px=224, seed=0)
def test_resize_square_is_exact(width: int, height: int, side_px: int, seed: int) -> None:
    """All shapes are exact: larger, smaller, tall, wide, and of a size that needs no change."""
    image = make_image(width, height, seed)
    assert np.array_equal(resize.resize_square(image, side_px), resize_by_pillow(image, side_px))


@pytest.mark.parametrize("size", [(4000, 3000), (2001, 2003), (31_251, 40), (31_250, 33)], ids=str)
def test_resize_square_of_several_blocks(size: tuple[int, int]) -> None:
    """Pillow holds these images in several blocks of memory; two of them are about as wide as the kernels accept."""
    image = make_image(*size)
    assert np.array_equal(resize.resize_square(image, 96), resize_by_pillow(image, 96))


def test_resize_square_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels resize an image of a usual shape; Pillow resizes one whose columns it would resize first."""
    image, tall = make_image(300, 376), make_image(300, 377)
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("Pillow has resized it"))
    assert resize.resize_square(image, 224).shape == (224, 224, 3)
    with pytest.raises(pytest.fail.Exception, match="Pillow has resized it"):
        resize.resize_square(tall, 224)


def test_kernels_that_differ_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and Pillow may differ after a change of Pillow."""
    resize._load_kernel.cache_clear()
    monkeypatch.setattr(resize, "_A", -0.75)
    resize._compute_coefficients.cache_clear()
    try:
        assert resize._load_kernel() is None
        image = make_image(300, 300)
        assert np.array_equal(resize.resize_square(image, 64), resize_by_pillow(image, 64))
    finally:
        monkeypatch.undo()
        resize._compute_coefficients.cache_clear()
        resize._load_kernel.cache_clear()
    assert resize._load_kernel() is kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "variables"),
    [
        ("import numba, sys; sys.modules['numba'] = None", {}),
        ("", {"NUMBA_CACHE_DIR": "/proc/no/such/folder"}),
        ("", {"NUMBA_DISABLE_JIT": "1"}),
    ],
    ids=["without Numba", "nowhere to keep them", "compiler switched off"],
)
def test_resize_square_without_kernels(code: str, variables: dict[str, str]) -> None:
    """The result is the same if Numba is missing, or cannot cache or compile the kernels."""
    check = f"""{code}
import numpy as np
from PIL import Image
from fruitdask.worker.images.resize import resize_square
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 180, 3), np.uint8))
assert np.array_equal(resize_square(image, 64), np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)))
"""
    root = Path(resize.__file__).parents[3]
    subprocess.run([sys.executable, "-c", check], env=os.environ | variables, cwd=root, check=True, timeout=300)
