"""fruitdask compared with what people use today, on the same photographs, in the same run.

    python tests/benchmarks/peers.py WEIGHTS FOLDER [FOLDER ...] [--steady 10000] [--peers spark ray_data ...]
    [--markdown BENCHMARKS.md]

WEIGHTS is the file of MobileNetV2's weights without its top. Each FOLDER holds one folder per class. --steady repeats
the images of the first one under several names, up to that number. Each peer runs in its own virtual environment, which
the first run creates from the requirements beside its program in `peers/` (Spark needs Java 17 as well). All do the
same job: features of every photograph and two principal components; fruitdask therefore leaves out exploring, quality,
figures and page. Seconds are those of the whole command; other seconds are those not spent featurizing: start-up,
reduction, end. Ratios are to the plain Keras loop: above 1 is faster.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measuring import Measurement, measure, measure_run, print_table, repeat_images

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
BASELINE = "keras_loop"
PEERS = (BASELINE, "tf_data", "ray_data", "spark")
ENGINES = ("tensorflow", "openvino")
COLUMNS = ["program", "seconds", "ratio", "images/s", "ratio", "other seconds", "CPU seconds", "MB"]


@dataclass(frozen=True)
class Line:
    """
    What a program took.

    Parameters
    ----------
    name : str
        The program.
    measurement : Measurement
        The whole command.
    n_images : int
        Images that it featurized.
    featurize_seconds : float
        Seconds of that alone.
    """

    name: str
    measurement: Measurement
    n_images: int
    featurize_seconds: float

    @property
    def images_per_second(self) -> float:
        """Images per second while featurizing."""
        return self.n_images / self.featurize_seconds


def run_peer(name: str, photographs: Path, weights: Path) -> Line:
    """Run a peer; make its environment first if there is none."""
    python = PROJECT / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        requirements = str(HERE / "peers" / f"{name}.txt")
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", requirements], check=True)
    command = [str(python), str(HERE / "peers" / f"{name}.py"), str(photographs), str(weights)]
    measurement = measure(command, TF_CPP_MIN_LOG_LEVEL="3", PYSPARK_PYTHON=str(python))
    told = json.loads(measurement.output.splitlines()[-1])
    return Line(name, measurement, told["n_images"], told["featurize_seconds"])


def run_fruitdask(engine: str, photographs: Path, weights: Path, folder: Path) -> Line:
    """Run fruitdask twice: once on few images to build and keep the network, once to be measured."""
    setting = f"model.engine={engine}"
    measure_run(photographs, weights, folder / f"{engine}-first", setting, "input.limit=64")
    measurement = measure_run(photographs, weights, folder / engine, setting)
    manifest = json.loads((folder / engine / "manifest.json").read_text())
    return Line(f"fruitdask, {engine}", measurement, manifest["n_images"], manifest["seconds"]["featurize"])


def compare(title: str, peers: list[str], photographs: Path, weights: Path, markdown: Path | None) -> None:
    """Run all programs on some photographs and print a table."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name in peers:
            lines.append(run_peer(name, photographs, weights))
            print(title, *format_line(lines[-1], lines[0]), file=sys.stderr, flush=True)
        for engine in ENGINES:
            lines.append(run_fruitdask(engine, photographs, weights, Path(folder)))
            print(title, *format_line(lines[-1], lines[0]), file=sys.stderr, flush=True)
    heading = f"### {title}: {lines[0].n_images:,} images\n"
    print(heading)
    if markdown is not None:
        with markdown.open("a") as file:
            file.write(f"{heading}\n")
    print_table(COLUMNS, [format_line(line, lines[0]) for line in lines], markdown)
    print(flush=True)


def format_line(line: Line, baseline: Line) -> list[str]:
    """Format a row of the table."""
    measured = line.measurement
    return [
        line.name,
        f"{measured.seconds:.1f}",
        f"{baseline.measurement.seconds / measured.seconds:.2f}",
        f"{line.images_per_second:.1f}",
        f"{line.images_per_second / baseline.images_per_second:.2f}",
        f"{measured.seconds - line.featurize_seconds:.1f}",
        f"{measured.cpu_seconds:.0f}",
        f"{measured.tree_bytes / 1e6:,.0f}",
    ]


def main() -> None:
    """Run everything and print, or write, tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=lambda path: Path(path).resolve())
    parser.add_argument("folders", nargs="+", type=lambda path: Path(path).resolve())
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="The first one is the baseline.")
    parser.add_argument("--steady", type=int, default=0, help="Number of images of a second, longer table.")
    parser.add_argument("--markdown", type=Path, help="Append the tables to this file too.")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        compare(folder.parent.name, arguments.peers, folder, arguments.weights, arguments.markdown)
    if arguments.steady:
        first = arguments.folders[0]
        times = -(-arguments.steady // sum(1 for _ in first.glob("*/*.jpg")))
        with tempfile.TemporaryDirectory() as name:
            repeated = repeat_images(first, Path(name), times)
            compare(
                f"{first.parent.name}, {times} times",
                arguments.peers,
                repeated,
                arguments.weights,
                arguments.markdown,
            )


if __name__ == "__main__":
    main()
