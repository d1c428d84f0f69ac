"""fruitdask against what people use today, on the same photographs, in the same run.

    python tests/benchmarks/peers.py PHOTOGRAPHS WEIGHTS [--peers spark ray_data ...] [--repeat 12] [--markdown BENCHMARKS.md]

PHOTOGRAPHS is a folder of classes, WEIGHTS the file of MobileNetV2's weights without its top. Each peer runs in a virtual environment
of its own, which is made from the requirements beside its program in `peers/` the first time (Spark needs Java 17 as well). All do the
same job: features of every photograph and two principal components; fruitdask therefore leaves out exploring, quality, figures and page.
Seconds are those of the whole command, ratios those to the plain Keras loop: above 1 is faster than it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from main_job import EXTRAS
from measuring import Measurement, measure, repeat_images

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
BASELINE = "keras_loop"
PEERS = (BASELINE, "tf_data", "ray_data", "spark")
ENGINES = ("tensorflow", "openvino")
COLUMNS = ("program", "seconds", "ratio", "images/s", "ratio", "CPU seconds", "MB")


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
    images_per_second : float
        Images a second while featurizing, start-up left out.
    """

    name: str
    measurement: Measurement
    images_per_second: float


def run_peer(name: str, photographs: Path, weights: Path) -> Line:
    """Run a peer, making its environment first where there is none."""
    python = PROJECT / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        requirements = str(HERE / "peers" / f"{name}.txt")
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", requirements], check=True)
    command = [str(python), str(HERE / "peers" / f"{name}.py"), str(photographs), str(weights)]
    measurement = measure(command, TF_CPP_MIN_LOG_LEVEL="3", PYSPARK_PYTHON=str(python))
    told = json.loads(measurement.output.splitlines()[-1])
    return Line(name, measurement, told["n_images"] / told["featurize_seconds"])


def run_fruitdask(engine: str, photographs: Path, weights: Path, folder: Path) -> Line:
    """Run fruitdask twice: once to build and keep the network, once to be measured."""
    settings = [
        f"input.url={photographs}",
        f"model.weights={weights}",
        f"model.engine={engine}",
        "reduce.n_components=2",
        "reduce.tsne.enabled=false",
        *(f"{extra}=false" for extra in EXTRAS),
    ]
    config = PROJECT / "configs" / "local.yaml"
    for times, limit in (("first", 64), ("measured", None)):
        output = folder / f"{engine}-{times}"
        overrides = [*settings, f"output.url={output}"] + [f"input.limit={limit}"] * (limit is not None)
        arguments = [argument for setting in overrides for argument in ("--set", setting)]
        measurement = measure(
            [sys.executable, "-m", "fruitdask", "run", str(config), *arguments], XDG_CACHE_HOME=str(folder / "cache")
        )
    manifest = json.loads((output / "manifest.json").read_text())
    return Line(f"fruitdask, {engine}", measurement, manifest["n_images"] / manifest["seconds"]["featurize"])


def compare(title: str, peers: list[str], photographs: Path, weights: Path) -> list[str]:
    """Run all programs on some photographs; gives the rows of a table, which are printed as they come."""
    n_images = sum(1 for _ in photographs.glob("*/*.jpg"))
    rows = [
        f"### {title}: {n_images:,} images",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|---|{'---:|' * (len(COLUMNS) - 1)}",
    ]
    print("\n".join(rows), flush=True)
    baseline = None
    with tempfile.TemporaryDirectory() as folder:
        runs = [(run_peer, name) for name in peers] + [(None, engine) for engine in ENGINES]
        for run, name in runs:
            line = run(name, photographs, weights) if run else run_fruitdask(name, photographs, weights, Path(folder))
            baseline = baseline or line
            rows.append(format_line(line, baseline))
            print(rows[-1], flush=True)
    print(flush=True)
    return [*rows, ""]


def format_line(line: Line, baseline: Line) -> str:
    """Format a row of the table."""
    measured = line.measurement
    cells = [
        line.name,
        f"{measured.seconds:.1f}",
        f"{baseline.measurement.seconds / measured.seconds:.2f}",
        f"{line.images_per_second:.1f}",
        f"{line.images_per_second / baseline.images_per_second:.2f}",
        f"{measured.cpu_seconds:.0f}",
        f"{measured.tree_bytes / 1e6:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def describe_machine() -> str:
    """Say on what and when this was measured."""
    names = ("dask", "keras", "openvino", "pillow", "tensorflow")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}; {date.today().isoformat()}."


def main() -> None:
    """Run everything and print, or write, tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=lambda path: Path(path).resolve())
    parser.add_argument("weights", type=lambda path: Path(path).resolve())
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="The first one is the baseline.")
    parser.add_argument("--repeat", type=int, default=0, help="Names for each image in a second, longer table.")
    parser.add_argument("--markdown", type=Path, help="Write the tables to this file too.")
    arguments = parser.parse_args()
    rows = compare("Once", arguments.peers, arguments.photographs, arguments.weights)
    if arguments.repeat:
        with tempfile.TemporaryDirectory() as name:
            repeated = repeat_images(arguments.photographs, Path(name), arguments.repeat)
            rows += compare(f"Each {arguments.repeat} times", arguments.peers, repeated, arguments.weights)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join([*rows, describe_machine(), ""]))


if __name__ == "__main__":
    main()
