"""Run a command and measure it with all the processes it starts."""

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

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
        Seconds that all its processes have kept cores busy, as far as sampling sees the end of each.
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
        while process.poll() is None:
            try:
                root = psutil.Process(process.pid)
                children = root.children(recursive=True)
                used = {each.pid: each.memory_info().rss for each in (root, *children)}
                client_bytes, tree_bytes = max(client_bytes, used[root.pid]), max(tree_bytes, sum(used.values()))
                workers = [used[child.pid] for child in children if _is_worker(child, root)]
                worker_bytes = max([worker_bytes, *workers])
                cpu_seconds |= {each.pid: sum(each.cpu_times()[:2]) for each in (root, *children)}
            except psutil.Error:
                pass  # A process has just ended.
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
        seconds = time.perf_counter() - start
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return Measurement(seconds, client_bytes, worker_bytes, tree_bytes, sum(cpu_seconds.values()), printed)


def _is_worker(process: psutil.Process, client: psutil.Process) -> bool:
    """Tell a worker from the child that builds the network: Dask's nanny sets OMP_NUM_THREADS for it."""
    return process.environ().get("OMP_NUM_THREADS") == "1" and client.environ().get("OMP_NUM_THREADS") != "1"


def repeat_images(photographs: Path, target: Path, times: int) -> Path:
    """Give each image several names, without copying it."""
    for path in photographs.glob("*/*.jpg"):
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        for number in range(times):
            os.symlink(path.resolve(), target / path.parent.name / f"{number}_{path.name}")
    return target


def print_header() -> None:
    """Print what the columns of the lines are."""
    print(f"{'':44}{'seconds':>9}{'ratio':>8}{'client MB':>11}{'worker MB':>11}")


def print_line(title: str, measurement: Measurement, baseline: Measurement) -> None:
    """Print one measurement."""
    ratio = measurement.seconds / baseline.seconds
    megabytes = f"{measurement.client_bytes / 1e6:11.0f}{measurement.worker_bytes / 1e6:11.0f}"
    print(f"{title:44}{measurement.seconds:9.1f}{ratio:8.2f}{megabytes}", flush=True)
