"""Memory and time to decode a large image, by kind of file, and the memory that threads keep afterwards.

    python tests/benchmarks/decoding.py [--side 10000]

Each line runs in its own process. The ratio is to the memory of the pixels, which Pillow keeps in 4 bytes each. The
last two lines decode 16 images on 4 threads, where only one at a time fits into ``max_pixels``: once with glibc's
defaults, and once with fruitdask's settings.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measuring import print_table
from PIL import Image

from fruitdask.cluster.allocator import MALLOC_VARIABLES
from fruitdask.worker.images import decode_image

N_IMAGES, N_THREADS = 16, 4


def draw_files(folder: Path, side: int) -> Iterator[Path]:
    """Draw an image and save it in each format that is decoded differently."""
    grey = Image.linear_gradient("L").resize((side, side))
    colours = Image.merge("RGB", (grey, grey.transpose(Image.Transpose.ROTATE_90), grey))
    transparent = colours.copy()
    transparent.putalpha(grey)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image, options in [
        ("baseline.jpg", colours, {}),
        ("turned.jpg", colours, {"exif": turned}),
        ("progressive.jpg", colours, {"progressive": True}),
        ("cmyk.jpg", colours.convert("CMYK"), {}),
        ("colours.png", colours, {"compress_level": 1}),
        ("palette.png", colours.quantize(64), {"transparency": 3}),
        ("16-bit.png", grey.convert("I;16"), {"compress_level": 1}),
        ("transparent.png", transparent, {"compress_level": 1}),
        ("colours.tif", colours, {"compression": "tiff_lzw"}),
        # A WebP has sides of at most 16,383 pixels.
        ("colours.webp", colours, {"method": 0, "quality": 50}),
    ]:
        image.save(folder / name, **options)
        yield folder / name


def decode_here(file: Path, n_images: int, n_threads: int) -> None:
    """Decode a file several times; print the peak growth of memory in bytes, and the seconds per image."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    data = file.read_bytes()
    with Image.open(file) as image:
        n_pixels = image.width * image.height
    before = read_peak()
    start = time.perf_counter()
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(lambda _: decode_image(data, size_px=224, max_pixels=n_pixels), range(n_images)))
    print(read_peak() - before, (time.perf_counter() - start) / n_images)


def read_peak() -> int:
    """Read the largest resident memory of this process so far, in bytes; this needs Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def decode(file: Path, *, n_images: int = 1, n_threads: int = 1, **environment: str) -> tuple[float, float]:
    """Decode a file in its own process; returns bytes and seconds."""
    command = [sys.executable, __file__, "--decode", str(file), str(n_images), str(n_threads)]
    finished = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True)
    grown, seconds = map(float, finished.stdout.split())
    return grown, seconds


def main() -> None:
    """Decode each kind of file and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=10_000, help="Of the image, in pixels.")
    parser.add_argument("--markdown", type=Path, help="Append the table to this file too.")
    parser.add_argument("--decode", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.decode:
        file, n_images, n_threads = arguments.decode
        return decode_here(Path(file), int(n_images), int(n_threads))
    pixels = 4 * arguments.side**2
    with tempfile.TemporaryDirectory() as folder:
        found = {file.name: decode(file) for file in draw_files(Path(folder), arguments.side)}
        many = Path(folder) / "transparent.png"
        shape = {"n_images": N_IMAGES, "n_threads": N_THREADS}
        found[f"{N_IMAGES} {many.name}, glibc's own settings"] = decode(many, **shape)
        found[f"{N_IMAGES} {many.name}, fruitdask's"] = decode(many, **shape, **MALLOC_VARIABLES)
    rows = [
        [name, f"{grown / 1e6:,.0f}", f"{grown / pixels:.1f}", f"{seconds:.1f}"]
        for name, (grown, seconds) in found.items()
    ]
    print_table(["file", "MB", "ratio", "seconds per image"], rows, arguments.markdown)


if __name__ == "__main__":
    main()
