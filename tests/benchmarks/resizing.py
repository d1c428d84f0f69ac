"""Resizing photographs: milliseconds of CPU per image, compared with Pillow's bicubic filter, which it must match bit
for bit.

    python tests/benchmarks/resizing.py PHOTOGRAPHS [--side 224] [--markdown FILE]

Decodes each photograph, resizes it with both in turn, and shows the medians of five rounds. The kernels are compiled
beforehand.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measuring import print_table
from PIL import Image

from fruitdask.worker.images.resize import _load_kernel, resize_square

ROUNDS, MOST_IMAGES = 5, 200


def decode(path: Path) -> Image.Image:
    """Decode a photograph at its full size."""
    with Image.open(path) as image:
        return image.convert("RGB")


def measure_each(work: Callable[[object], object], items: list[object]) -> float:
    """Return the milliseconds of CPU that an item takes."""
    start = time.process_time()
    for item in items:
        work(item)
    return 1000 * (time.process_time() - start) / len(items)


def main() -> None:
    """Measure, and count the images whose bits differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    size = (options.side, options.side)
    files = sorted(options.photographs.rglob("*.jpg"))
    files = files[:: max(1, len(files) // MOST_IMAGES)]
    images = [decode(path) for path in files]
    assert _load_kernel() is not None, "the kernels cannot be compiled here"

    def by_pillow(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC))

    def by_kernel(image: Image.Image) -> np.ndarray:
        return resize_square(image, options.side)

    n_different = sum(not np.array_equal(by_pillow(image), by_kernel(image)) for image in images)
    rounds = [
        (measure_each(decode, files), measure_each(by_pillow, images), measure_each(by_kernel, images))
        for _ in range(ROUNDS)
    ]
    decoding, pillow, kernel = map(statistics.median, zip(*rounds, strict=True))
    rows = {"decode": decoding, "resize, Pillow": pillow, "resize, fruitdask": kernel}
    rows |= {"decode and resize, Pillow": decoding + pillow, "decode and resize, fruitdask": decoding + kernel}
    ratios = {
        "resize, fruitdask": pillow / kernel,
        "decode and resize, fruitdask": (decoding + pillow) / (decoding + kernel),
    }
    table = [[name, f"{value:.2f}", f"{ratios[name]:.2f}" if name in ratios else ""] for name, value in rows.items()]
    print(f"{len(images)} photographs, {n_different} of them differ in some bit")
    print_table(["step", "ms per image", "times as fast"], table, options.markdown)


if __name__ == "__main__":
    main()
