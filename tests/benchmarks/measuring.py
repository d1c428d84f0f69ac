"""Run a command and measure it with all the processes it starts; describe the machine it ran on."""

import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil

CONFIG = Path(__file__).parents[2] / "configs" / "local.yaml"
#: Stages that the programs compared with fruitdask do not have.
EXTRAS = ("explore.enabled", "quality.enabled", "check.enabled", "plots.enabled", "report.enabled")
_SECONDS_BETWEEN_SAMPLES = 0.05


@dataclass(frozen=True)
class Measurement:
    """
    What a command took.

    Parameters
    ----------
    seconds : float
        From its start to its end.
    client_bytes : int
        Largest resident memory of the command's own process.
    worker_bytes : int
        Largest resident memory of a Dask worker that it started; 0 if it started none.
    tree_bytes : int
        Largest sum of the resident memory of all its processes.
    cpu_seconds : float
        Seconds of CPU of all its processes, as far as sampling sees the end of each.
    output : str
        What it printed.
    """

    seconds: float
    client_bytes: int
    worker_bytes: int
    tree_bytes: int
    cpu_seconds: float
    output: str


def measure(command: list[str], **environment: str) -> Measurement:
    """
    Run a command to its end.

    Parameters
    ----------
    command : list[str]
        Program and arguments.
    **environment : str
        Environment variables to add.

    Returns
    -------
    Measurement
        Seconds, memory and output.
    """
    client_bytes = worker_bytes = tree_bytes = 0
    cpu_seconds: dict[int, float] = {}
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, env=os.environ | environment)
        while process.returncode is None:
            # A process may have just ended.
            with suppress(psutil.Error):
                root = psutil.Process(process.pid)
                children = root.children(recursive=True)
                used = {each.pid: each.memory_info().rss for each in (root, *children)}
                client_bytes, tree_bytes = max(client_bytes, used[root.pid]), max(tree_bytes, sum(used.values()))
                workers = [used[child.pid] for child in children if _is_worker(child, root)]
                worker_bytes = max([worker_bytes, *workers])
                cpu_seconds |= {each.pid: sum(each.cpu_times()[:2]) for each in (root, *children)}
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_BETWEEN_SAMPLES)
        seconds = time.perf_counter() - start
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return Measurement(seconds, client_bytes, worker_bytes, tree_bytes, sum(cpu_seconds.values()), printed)


def measure_run(
    photographs: Path, weights: Path, output: Path, *settings: str, with_extras: bool = False
) -> Measurement:
    """
    Run fruitdask on a folder, for features and two principal components; networks are cached beside the output.

    Parameters
    ----------
    photographs : Path
        A folder of classes.
    weights : Path
        The file of MobileNetV2's weights without its top.
    output : Path
        Where results go.
    *settings : str
        Further settings, such as ``model.engine=openvino``.
    with_extras : bool
        Explore, judge and draw as well.

    Returns
    -------
    Measurement
        What it took.
    """
    overrides = [
        f"input.url={photographs}",
        f"model.weights={weights}",
        f"output.url={output}",
        "reduce.n_components=2",
        "reduce.tsne.enabled=false",
        *(f"{extra}={str(with_extras).lower()}" for extra in EXTRAS),
        *settings,
    ]
    arguments = [argument for setting in overrides for argument in ("--set", setting)]
    command = [sys.executable, "-m", "fruitdask", "run", str(CONFIG), *arguments]
    return measure(command, XDG_CACHE_HOME=str(output.parent / "cache"))


def describe_machine() -> str:
    """Describe the machine, the versions and the date of a measurement."""
    names = ("dask", "keras", "openvino", "pillow", "tensorflow")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return (
        f"{_read_processor()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB, "
        f"Python {platform.python_version()}, "
        f"{versions}; {date.today().isoformat()}."
    )


def print_table(columns: list[str], rows: list[list[str]], markdown: Path | None = None) -> None:
    """
    Print a Markdown table with aligned columns.

    Parameters
    ----------
    columns : list[str]
        Their titles.
    rows : list[list[str]]
        Their cells.
    markdown : Path, optional
        A file to which the table and the description of the machine are appended.
    """
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]

    def align(cells: list[str]) -> str:
        first, *others = (
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    rule = "|".join(["-" * (widths[0] + 2), *(f"{'-' * (width + 1)}:" for width in widths[1:])])
    lines = [align(columns), f"|{rule}|", *map(align, rows)]
    print("\n".join(lines), flush=True)
    if markdown is not None:
        with markdown.open("a") as file:
            file.write("\n".join([*lines, "", describe_machine(), "", ""]))


def _read_processor() -> str:
    """Read the name of the processor, where Linux reports it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _is_worker(process: psutil.Process, client: psutil.Process) -> bool:
    """Distinguish a worker from the child that builds the network: Dask's nanny sets OMP_NUM_THREADS for workers."""
    return process.environ().get("OMP_NUM_THREADS") == "1" and client.environ().get("OMP_NUM_THREADS") != "1"


def repeat_images(photographs: Path, target: Path, times: int) -> Path:
    """Give each image several names, without copying it."""
    for path in photographs.glob("*/*.jpg"):
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        for number in range(times):
            os.symlink(path.resolve(), target / path.parent.name / f"{number}_{path.name}")
    return target


def print_header() -> None:
    """Print the titles of the columns."""
    print(f"{'':44}{'seconds':>9}{'ratio':>8}{'client MB':>11}{'worker MB':>11}")


def print_line(title: str, measurement: Measurement, baseline: Measurement) -> None:
    """Print one measurement."""
    ratio = measurement.seconds / baseline.seconds
    megabytes = f"{measurement.client_bytes / 1e6:11.0f}{measurement.worker_bytes / 1e6:11.0f}"
    print(f"{title:44}{measurement.seconds:9.1f}{ratio:8.2f}{megabytes}", flush=True)
