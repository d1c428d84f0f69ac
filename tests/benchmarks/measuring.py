"""Run a command and measure it with all the processes it starts."""

import os
import subprocess
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
    """

    seconds: float
    client_bytes: int
    worker_bytes: int


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
        Seconds and memory.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment)
    client_bytes = worker_bytes = 0
    while process.poll() is None:
        try:
            root = psutil.Process(process.pid)
            client_bytes = max(client_bytes, root.memory_info().rss)
            workers = [child for child in root.children(recursive=True) if _is_worker(child, root)]
            worker_bytes = max([worker_bytes, *(worker.memory_info().rss for worker in workers)])
        except psutil.Error:
            pass  # A process has just ended.
        time.sleep(_SECONDS_BETWEEN_SAMPLES)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return Measurement(seconds, client_bytes, worker_bytes)


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
