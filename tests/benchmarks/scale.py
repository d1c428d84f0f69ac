"""What one ordinary client takes for a million images, or ten: seconds and memory of each stage of each command.

    python tests/benchmarks/scale.py --images 1000000 [--classes 100] [--commands run rerun grow verify report erase]

The commands are real, each in its own process, with listing, catalog, partitions, a local cluster of two workers, and
all files of the output. These parts are made up:

- the input, a file system of fsspec that invents names, sizes and versions folder by folder;
- the images: no task reads any. One that featurizes stores clusters of random features (16 of them, set --features) and
  outcomes, one in a thousand of them a failure; one that explores stores random findings. Both store them through the
  functions that the real tasks call. Nothing imports TensorFlow.

``grow`` is a run after each class has gained 1 % more images, which sort between the others; ``erase`` erases one image
of each class; it and ``explore`` are left out by default. Seconds of CPU and memory, the largest resident in each stage
as Linux counts it, are those of the client's own process. With several sizes, as in --images 100000 1000000, it prints
how seconds grow from one to the next.

"""

import argparse
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
from measuring import print_table

COMMANDS = ("run", "rerun", "grow", "verify", "report", "erase", "explore")
CHILD = "import sys, scale; scale.carry_out(sys.argv[1], sys.argv[2:])"
MB = 1_000_000


class MadeUp(fsspec.AbstractFileSystem):
    """An input whose URL says how many images it has: ``madeup://IMAGES/CLASSES``."""

    protocol = "madeup"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("madeup://").rstrip("/")

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List the classes, or the images of one."""
        n_images, n_classes, *folder = self._strip_protocol(path).split("/")
        top = f"{n_images}/{n_classes}"
        if not folder:
            found = [{"name": f"{top}/class_{n:05}", "type": "directory", "size": 0} for n in range(int(n_classes))]
        else:
            n_here = len(range(int(folder[0][6:]), int(n_images), int(n_classes)))
            found = [
                {
                    "name": f"{top}/{folder[0]}/photo_{n:07}.jpg",
                    "type": "file",
                    "size": 100_000 + n,
                    "ETag": f"{n:032x}",
                }
                for n in range(n_here)
            ]
        return found if detail else [each["name"] for each in found]

    def find(self, path: str, **_: Any) -> dict[str, Any]:
        """List the images of a class: fsspec would look for folders in it."""
        return {each["name"]: each for each in self.ls(path)}

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Describe a file or folder."""
        kind = "file" if path.endswith(".jpg") else "directory"
        return {"name": self._strip_protocol(path), "type": kind, "size": 0}


fsspec.register_implementation("madeup", MadeUp, clobber=True)


def invent_partition(partition: Any, artifact: Any, job: Any) -> Any:
    """Store what the task of a partition stores, without its images and network."""
    from fruitdask.store import OUTCOME_COLUMNS
    from fruitdask.worker import featurize

    partition, before = featurize._read_before(partition, job.output)
    chosen = partition.select(partition.places_to_read)
    crcs = np.array([zlib.crc32(path.encode()) for path in chosen.paths], np.uint32)
    means = np.array([zlib.crc32(label.encode()) for label in chosen.labels], np.uint32)
    features = _scatter(means, artifact.n_features) + 0.3 * _scatter(crcs, artifact.n_features)
    is_failed = crcs % 1000 == 0
    features[is_failed] = np.nan
    columns = (chosen.paths, chosen.labels, np.where(is_failed, "unreadable", "ok"))
    errors = np.where(is_failed, "cannot identify image file", "")
    table = pd.DataFrame(dict(zip(OUTCOME_COLUMNS, (*columns, errors, np.ones(len(crcs), np.int64)), strict=True)))
    featurize._store(partition, job.output, features, table, before)
    statuses = table["status"].value_counts().to_dict()
    return featurize.PartitionSummary(partition.index, len(table), statuses, 0, {"predict": 0.0})


def invent_findings(partition: Any, job: Any) -> Any:
    """Store what the task that explores a partition stores, without its images."""
    from fruitdask.worker import explore

    crcs = np.array([zlib.crc32(path.encode()) for path in partition.paths], np.uint32)
    is_ok, random = crcs % 1000 > 0, np.random.default_rng(partition.index)
    columns = explore._EMPTY | {
        "path": partition.paths,
        "label": partition.labels,
        "status": np.where(is_ok, "ok", "unreadable"),
        "bytes": partition.bytes,
        # Images whose names have the same checksum are copies, about one in a thousand of ten million.
        "content_hash": [hashlib.sha256(crc).hexdigest() for crc in crcs],
        "perceptual_hash": [f"{n:016x}" for n in random.integers(0, 1 << 64, len(crcs), np.uint64)],
        "format": "JPEG",
    }
    rows = pd.DataFrame(columns).astype(explore._TYPES)
    for name in explore._TYPES:
        rows[name] = np.where(is_ok, random.integers(1, 256, len(crcs)), rows[name])
    rows.loc[~is_ok, "perceptual_hash"] = ""
    labels, classes = np.array(partition.labels), sorted(set(partition.labels))
    thumbnails, sums = np.zeros(len(crcs), job.workspace.thumbnail_type), np.zeros(
        len(classes), job.workspace.sums_type
    )
    pixels = random.integers(0, 256, (256, *sums["pixels"].shape[1:]), np.uint8)[crcs % 256]
    step = pixels.shape[1] // thumbnails["pixels"].shape[1]
    thumbnails["is_readable"], thumbnails["pixels"] = is_ok, pixels[:, ::step, ::step]
    for label, record in zip(classes, sums, strict=True):
        here = is_ok & (labels == label)
        explore.ClassSums.measure(pixels[here], thumbnails["pixels"][here]).add_to(record)
    job.workspace.write_partition(partition.index, rows, sums=sums, thumbnails=thumbnails)
    return explore.ExploredPartition(partition.index, len(rows), {"unreadable": int((~is_ok).sum())})


def _scatter(seeds: Any, n_features: int) -> Any:
    """Scatter seeds over a cube, shape (n, n_features), float32."""
    mixed = (seeds[:, np.newaxis].astype(np.uint64) + np.arange(1, n_features + 1, dtype=np.uint64)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    return ((mixed >> np.uint64(40)).astype(np.float32) / 2**24) - np.float32(0.5)


class Meter:
    """Seconds and peak memory of this process by stage; a stage begins when fruitdask reports it."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float, float, int]] = []
        self._begin("Starting")

    def _begin(self, name: str) -> None:
        self._name, self._started, self._cpu_started = name, time.perf_counter(), time.process_time()
        Path("/proc/self/clear_refs").write_text("5")  # This resets the high-water mark.

    def begin(self, name: str) -> None:
        """Finish a stage and begin the next one."""
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        seconds = time.perf_counter() - self._started, time.process_time() - self._cpu_started
        self.stages.append((self._name, *seconds, peak))
        self._begin(name)


@contextmanager
def _no_building(config: Any) -> Iterator[Any]:
    """Stand in for the child that builds the network."""
    from fruitdask.worker.models import ModelArtifact

    n_features = int(os.environ["SCALE_FEATURES"])
    yield lambda: ModelArtifact(b"stub", "tensorflow", "MobileNetV2", "tf", input_px=32, n_features=n_features)


def carry_out(target: str, arguments: list[str]) -> None:
    """Carry out a command of the command line in this process, and write what its stages took."""
    meter = Meter()
    from fruitdask import cli
    from fruitdask.cluster import local
    from fruitdask.core.progress import RunProgress
    from fruitdask.pipeline import explore, featurize
    from fruitdask.worker import featurize as tasks

    # Workers need the file system that this module registers.
    local._PRELOADED.append("scale")
    featurize.start_building = _no_building  # type: ignore[assignment]
    tasks.prepare_workers = lambda client, engine: []
    tasks.featurize_partition = invent_partition
    explore.explore_partition = invent_findings  # type: ignore[attr-defined]
    RunProgress.begin = lambda self, stage: meter.begin(stage)  # type: ignore[method-assign]
    gc.freeze()
    try:
        cli.cli(arguments)
    finally:
        meter.begin("")
        Path(target).write_text(json.dumps(meter.stages))


def measure_command(command: str, folder: Path, n_images: int, arguments: argparse.Namespace) -> list[Any]:
    """Run a command in a process of its own; returns its stages."""
    output = folder / ("explored" if command == "explore" else "output")
    settings = [
        f"input.url=madeup://{n_images}/{arguments.classes}",
        f"output.url={output}",
        "model.weights=random",
        "model.input_px=32",
        "cluster.n_workers=2",
        "cluster.threads_per_worker=1",
        "explore.enabled=false",
        "explore.thumbnail_px=16",
        "reduce.n_components=10",
        "reduce.tsne.max_rows=1000",
        "quality.max_rows=2000",
        f"check.enabled={str(arguments.check).lower()}",
        *arguments.settings,
    ]
    options = [each for setting in settings for each in ("--set", setting)]
    config = folder / "config.yaml"
    config.write_text("input: {url: .}\noutput: {url: .}\n")
    verb = {"rerun": "run", "grow": "run"}.get(command, command)
    line = {
        "verify": ["verify", str(output)],
        "erase": ["erase", str(output), "--path", "*/photo_0000005.jpg", "--yes"],
    }.get(command, [verb, str(config), *options])
    target = folder / "stages.json"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "SCALE_FEATURES": str(arguments.features)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(target), *line], env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{command} ended with exit code {done.returncode}: {done.stdout}")
    return json.loads(target.read_text())  # type: ignore[no-any-return]


def measure_size(n_images: int, arguments: argparse.Namespace) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Carry out the commands one after the other; returns seconds, seconds of CPU and MB by command and stage."""
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=arguments.folder))
    try:
        n_listed = n_images
        for command in arguments.commands:
            n_listed += n_images // 100 if command == "grow" else 0
            stages = measure_command(command, folder, n_listed, arguments)
            sums = (sum(stage[place] for stage in stages) for place in (1, 2))
            stages.append(("all", *sums, max(stage[3] for stage in stages)))
            for stage, seconds, cpu_seconds, peak in stages:
                found[command, stage] = seconds, cpu_seconds, peak / MB
                line = f"{seconds:8.1f} s{cpu_seconds:8.1f} s of CPU{peak / MB:8.0f} MB"
                print(f"{n_listed:>11,} {command:8}{stage:46}{line}", flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    return found


def main() -> None:
    """Measure each size, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS[:-2])
    parser.add_argument("--check", action="store_true", help="List photographs to check too.")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--folder", type=Path, help="Where the outputs go; 3 GB per ten million images.")
    parser.add_argument("--keep", action="store_true", help="Keep the outputs.")
    parser.add_argument("--markdown", type=Path, help="Append the table to this file too.")
    arguments = parser.parse_args()
    measured = {n_images: measure_size(n_images, arguments) for n_images in arguments.images}
    columns = ["command", "stage", *(f"{n:,}: {unit}" for n in measured for unit in ("s", "CPU s", "MB"))]
    rows = [
        [*key, *(f"{value:,.{place < 2:d}f}" for size in measured.values() for place, value in enumerate(size[key]))]
        for key in measured[arguments.images[0]]
    ]
    print_table(columns, rows, arguments.markdown)


if __name__ == "__main__":
    main()
