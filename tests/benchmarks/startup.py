"""What starting costs: importing the package, asking for help, and a run until its first image is done.

    python tests/benchmarks/startup.py [WEIGHTS PHOTOGRAPHS]

Each line gives the median seconds of eleven starts of Python (of five runs), and their ratio to a Python that does
nothing. With WEIGHTS (the file of MobileNetV2's weights without its top) and PHOTOGRAPHS (a folder of classes) a run
has four photographs, one per partition, with the network in the cache; the first is done when its outcome is committed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measuring import measure, measure_run, print_table

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import fruitdask": ["-c", "import fruitdask"],
    "fruitdask --help": ["-m", "fruitdask", "--help"],
    "fruitdask validate configs/demo.yaml": ["-m", "fruitdask", "validate", "configs/demo.yaml"],
}


def measure_first_image(weights: Path, photographs: Path, engine: str) -> list[tuple[float, float]]:
    """Measure seconds from the start of the process to the first image done, and to the end; network in the cache."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(6):
            output = Path(folder, str(number))
            settings = (f"model.engine={engine}", "input.limit=4", "featurize.images_per_partition=1")
            start = time.time()
            measurement = measure_run(photographs, weights, output, *settings)
            first = min(mark.stat().st_mtime for mark in (output / "partitions").iterdir())
            seconds.append((first - start, measurement.seconds))
    return seconds[1:]


def main() -> None:
    """Measure each command and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", type=lambda path: Path(path).resolve())
    parser.add_argument("photographs", nargs="?", type=lambda path: Path(path).resolve())
    parser.add_argument("--markdown", type=Path, help="Append the table to this file too.")
    arguments = parser.parse_args()
    lines = {
        title: statistics.median(measure([sys.executable, *command]).seconds for _ in range(11))
        for title, command in COMMANDS.items()
    }
    if arguments.photographs:
        for engine in ("openvino", "tensorflow"):
            firsts, wholes = zip(*measure_first_image(arguments.weights, arguments.photographs, engine), strict=True)
            lines[f"fruitdask run, {engine}: first image done"] = statistics.median(firsts)
            lines[f"fruitdask run, {engine}: four images, whole command"] = statistics.median(wholes)
    baseline = lines["python -c pass"]
    rows = [[title, f"{seconds:.2f}", f"{seconds / baseline:.0f}"] for title, seconds in lines.items()]
    print_table(["command", "seconds", "ratio"], rows, arguments.markdown)


if __name__ == "__main__":
    main()
