"""Exploring compared with a plain loop that only sums, and its memory when the images are repeated.

    python tests/benchmarks/exploration.py PHOTOGRAPHS [--repeat 10]

PHOTOGRAPHS is a folder of classes. The plain loop reads, decodes and resizes each image in one process and keeps the
sums from which the differences within classes follow; fruitdask also hashes, looks for duplicates and metadata, and
draws figures and page.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measuring import Measurement, measure, print_header, print_line, repeat_images

LOOP = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
for folder in sorted(Path(sys.argv[1]).iterdir()):
    n, total, squares = 0, np.zeros((224, 224, 3)), 0.0
    for path in sorted(folder.iterdir()):
        resized = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        pixels = np.asarray(resized, np.float64) / 127.5 - 1
        n, total, squares = n + 1, total + pixels, squares + (pixels**2).sum()
    print(folder.name, 2 * (n * squares - (total**2).sum()) / (n * (n - 1) * total.size))
"""


def run_fruitdask(photographs: Path, folder: Path, name: str) -> Measurement:
    """Explore a folder."""
    config = folder / f"{name}.yaml"
    config.write_text(f"input: {{url: {photographs}}}\noutput: {{url: {folder / name}}}\n")
    return measure([sys.executable, "-m", "fruitdask", "explore", str(config)])


def main() -> None:
    """Run everything once and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=lambda path: Path(path).resolve())
    parser.add_argument("--repeat", type=int, default=10, help="Names per image in the last line.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print_header()
        loop = measure([sys.executable, "-c", LOOP, str(arguments.photographs)])
        print_line("plain loop", loop, loop)
        print_line("fruitdask explore", run_fruitdask(arguments.photographs, folder, "once"), loop)
        repeated = repeat_images(arguments.photographs, folder / "repeated", arguments.repeat)
        print_line(f"each image {arguments.repeat} times", run_fruitdask(repeated, folder, "more"), loop)


if __name__ == "__main__":
    main()
