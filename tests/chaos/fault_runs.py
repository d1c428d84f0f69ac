"""Damages runs on purpose, and checks what is left of them after the next one.

    python tests/chaos/fault_runs.py [--runs 200] [--seed 0] [--at-once 2]

Each run featurizes 160 drawn images in 40 partitions with two workers. A seed chooses what happens and when: workers
are killed (SIGKILL), one, each in turn, or all at once; the command is killed, interrupted or terminated, one image
kills every process that opens it, or images and results are on an S3 where one in ten requests fails, and the command
is killed too. A run that ended is started again until it is complete. Prints, by kind of fault, how many runs were
complete, how many images were lost or doubled, how many features differ from those of an undisturbed run, how many
committed files changed by a byte, and how many committed partitions were computed again: only partitions that were in
flight may be.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import numpy as np
import pandas as pd
import psutil
import yaml
import zarr
from moto.server import ThreadedMotoServer

sys.path.insert(0, str(Path(__file__).parent.parent))

from commands import Command, CommandHost  # noqa: E402
from faulty_s3 import open_faulty_s3  # noqa: E402

N_IMAGES, IMAGES_PER_PARTITION = 160, 4
_MAX_TRIES = 4
_S3_FAULTS, _BUCKET, _KEYS = 0.1, "chaos", {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
#: Far longer than any run takes; a run that hangs counts as a failure.
_PATIENCE_SECONDS = 180
Process = Command | subprocess.Popen[bytes]
#: In a process that loads this, opening the poison image is fatal, as a crash in a decoder would be.
_POISON = """
import os, signal, sys
def _die(event, arguments):
    if event == "open" and str(arguments[0]).endswith({name!r}) and "forkserver" in " ".join(sys.orig_argv):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(_die)
"""


@dataclass(frozen=True)
class Verdict:
    """
    What is left of a damaged run.

    Parameters
    ----------
    kind : str
        What was done to it.
    is_complete : bool
        Whether it finally ended with results.
    n_tries : int
        Commands that it took.
    seconds : float
        From the first start to the last end.
    n_lost : int
        Images without an outcome, or with more than one.
    n_wrong : int
        Images whose features or status differ from what they must be.
    n_changed : int
        Files of partitions committed by a command that did not complete the run, which differ afterwards.
    n_again : int
        Partitions committed by such a command which a later one wrote again.
    """

    kind: str
    is_complete: bool
    n_tries: int
    seconds: float
    n_lost: int = 0
    n_wrong: int = 0
    n_changed: int = 0
    n_again: int = 0

    @property
    def is_well(self) -> bool:
        """Whether nothing was lost."""
        return self.is_complete and not (self.n_lost or self.n_wrong or self.n_changed or self.n_again)


class Scene:
    """
    Images, a network and the features of an undisturbed run.

    Parameters
    ----------
    folder : Path
        Where all of this is kept.
    model : Path
        A small Keras model.
    commands : CommandHost
        What starts commands.
    s3_server : str or None
        URL of an S3 server on this machine, which holds the images too, for faults of S3.
    """

    def __init__(self, folder: Path, model: Path, commands: CommandHost, s3_server: str | None = None) -> None:
        from fruitdask.core.sample import draw_sample

        self.folder, self.model, self.s3_server = folder, model, s3_server
        self._commands = commands
        # Six species; input.limit leaves out the surplus.
        draw_sample(folder / "images", per_class=-(-N_IMAGES // 6), size_px=32)
        output = folder / "undisturbed"
        assert self.start(output).wait(_PATIENCE_SECONDS) == 0
        self.paths = list(read_outcomes(output)["path"])
        self.features = read_features(output)
        if s3_server is not None:
            self.upload()

    def upload(self) -> None:
        """Put the images into a bucket too."""
        with self.open_s3() as s3:
            s3.create_bucket(Bucket=_BUCKET)
            for path in (self.folder / "images").rglob("*.jpg"):
                s3.upload_file(str(path), _BUCKET, path.relative_to(self.folder).as_posix())

    @contextmanager
    def open_s3(self) -> Iterator[Any]:
        """Open a client of the S3 server that bypasses the faults."""
        client = boto3.client("s3", endpoint_url=self.s3_server, region_name="us-east-1", **_KEYS)
        yield client
        client.close()

    def fetch(self, output: Path) -> None:
        """Copy what a run has written to S3 to where it would be on disk, with its times."""
        shutil.rmtree(output, ignore_errors=True)
        with self.open_s3() as s3:
            for page in s3.get_paginator("list_objects_v2").paginate(Bucket=_BUCKET, Prefix=f"{output.name}/"):
                for entry in page.get("Contents", ()):
                    file = output.parent / entry["Key"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    s3.download_file(_BUCKET, entry["Key"], str(file))
                    os.utime(file, (entry["LastModified"].timestamp(),) * 2)

    def start(self, output: Path, *, poison: str | None = None, s3_url: str | None = None) -> Process:
        """Start the command, in a process group of its own."""
        config, root, options = output.with_suffix(".yaml"), str(self.folder), {}
        if s3_url is not None:
            root, options = f"s3://{_BUCKET}", {"storage_options": {"endpoint_url": s3_url}}
        sections = {
            "input": {"url": f"{root}/images", "limit": N_IMAGES} | options,
            "model": {"weights": str(self.model), "preprocessing": "none"},
            "cluster": {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None},
            "featurize": {"images_per_partition": IMAGES_PER_PARTITION},
            **{section: {"enabled": False} for section in ("explore", "quality", "plots", "report")},
            "output": {"url": f"{root}/{output.name}"} | options,
        }
        config.write_text(yaml.safe_dump(sections))
        environment = os.environ | {name.upper(): value for name, value in _KEYS.items()}
        if poison is not None:
            (output.parent / f"{output.name}-site").mkdir(exist_ok=True)
            (output.parent / f"{output.name}-site" / "sitecustomize.py").write_text(_POISON.format(name=poison))
            paths = [str(output.parent / f"{output.name}-site"), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        with open(output.with_suffix(".log"), "ab") as log:
            if poison is None:
                return self._commands.start("run", str(config), stdout=log, stderr=log, environment=environment)
            # Only a new Python loads the module that poisons the image.
            command = [sys.executable, "-m", "fruitdask", "run", str(config)]
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def read_outcomes(output: Path) -> pd.DataFrame:
    """Read the outcomes of all partitions, in their order."""
    files = sorted((output / "partitions").glob("*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


def read_features(output: Path) -> np.ndarray:
    """Read the features."""
    group: Any = zarr.open_group(output / "features.zarr", mode="r")
    return np.asarray(group["features"][:])


class Stamp(NamedTuple):
    """The hash and the time of a file, which reveal whether it has changed, and whether it was written again."""

    sha256: str
    written_ns: int


def stamp_committed(output: Path) -> dict[Path, Stamp]:
    """Stamp the files of the partitions that are committed: outcomes, features, statuses."""
    stamps = {}
    for mark in (output / "partitions").glob("*.parquet"):
        index = int(mark.stem)
        chunks = [output / "features.zarr" / name for name in (f"features/c/{index}/0", f"status/c/{index}")]
        for file in (mark, *chunks):
            stamps[file] = Stamp(hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
    return stamps


def wait_for(output: Path, n_committed: int, process: Process) -> None:
    """Wait until a number of partitions are committed, or the command has ended."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        folder = output / "partitions"
        if folder.exists() and sum(1 for _ in folder.glob("*.parquet")) >= n_committed:
            return
        # Poll: another process writes the files, and the command may end at any time.
        time.sleep(0.002)


def find_workers(process: Process) -> list[psutil.Process]:
    """Find the workers: they are forked from a child of the command."""
    try:
        client = psutil.Process(process.pid)
        return [child for child in client.children(recursive=True) if child.ppid() != client.pid]
    except psutil.NoSuchProcess:
        return []


def kill(process: psutil.Process) -> None:
    """Kill a process that may have ended."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def kill_a_worker(process: Process, output: Path, moments: Iterator[int], chance: random.Random) -> None:
    """Kill one worker at some moment."""
    wait_for(output, next(moments), process)
    for worker in chance.sample(find_workers(process), 1) if find_workers(process) else ():
        kill(worker)


def kill_each_worker(process: Process, output: Path, moments: Iterator[int], chance: random.Random) -> None:
    """Kill every worker that the run began with, one after the other."""
    wait_for(output, next(moments), process)
    for worker in find_workers(process):
        kill(worker)
        wait_for(output, next(moments), process)


def kill_all_workers(process: Process, output: Path, moments: Iterator[int], chance: random.Random) -> None:
    """Kill all workers at once, so that no process holds the network any more."""
    wait_for(output, next(moments), process)
    for worker in find_workers(process):
        kill(worker)


def make_signal(number: signal.Signals) -> Callable[..., None]:
    """Make a fault that sends a signal to the command alone."""

    def send(process: Process, output: Path, moments: Iterator[int], chance: random.Random) -> None:
        wait_for(output, next(moments), process)
        process.send_signal(number)

    return send


def kill_while_starting(process: Process, output: Path, moments: Iterator[int], chance: random.Random) -> None:
    """Kill the command at some moment before its first partition is done."""
    kill_after(process, chance.uniform(0.1, 2.5))


def kill_at_any_time(process: Process, output: Path, moments: Iterator[int], chance: random.Random) -> None:
    """Kill the command at some moment, whatever is on disk by then."""
    kill_after(process, chance.uniform(1, 20))


def kill_after(process: Process, seconds: float) -> None:
    """Kill the command after some seconds, unless it has ended; its workers end by themselves."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()


_POISONED, _ON_S3 = "an image that kills its worker", "S3 at 10 % faults, the command killed"
FAULTS: dict[str, Callable[..., None]] = {
    "a worker killed": kill_a_worker,
    "each worker killed in turn": kill_each_worker,
    "all workers killed at once": kill_all_workers,
    "the command killed": make_signal(signal.SIGKILL),
    "the command killed while starting": kill_while_starting,
    "Ctrl-C": make_signal(signal.SIGINT),
    "SIGTERM": make_signal(signal.SIGTERM),
    _POISONED: lambda *_: None,
    _ON_S3: kill_at_any_time,
}


def damage(scene: Scene, kind: str, seed: int) -> Verdict:
    """
    Damage a run, start it again until it is complete, and compare.

    Parameters
    ----------
    scene : Scene
        Images, network and the expected features.
    kind : str
        One of `FAULTS`.
    seed : int
        Chooses when, and which.

    Returns
    -------
    Verdict
        What was lost, which should be nothing.
    """
    chance, output = random.Random(seed), scene.folder / f"run-{seed}"
    n_partitions = N_IMAGES // IMAGES_PER_PARTITION
    moments = iter(sorted(chance.randint(0, n_partitions - 1) for _ in range(16)))
    poison = chance.choice(scene.paths) if kind == _POISONED else None
    start, committed = time.monotonic(), dict[Path, Stamp]()
    with ExitStack() as stack:
        s3_url = None
        if kind == _ON_S3 and scene.s3_server is not None:
            proxy = open_faulty_s3(scene.s3_server, fraction=_S3_FAULTS, seed=seed, stall_seconds=1)
            s3_url = stack.enter_context(proxy).url
        for n_tries in range(1, _MAX_TRIES + 1):
            process = scene.start(output, poison=poison, s3_url=s3_url)
            if n_tries == 1:
                FAULTS[kind](process, output, moments, chance)
            try:
                code = process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                return Verdict(kind, False, n_tries, time.monotonic() - start)
            if s3_url is not None:
                scene.fetch(output)
            if code == 0:
                break
            for path, found in stamp_committed(output).items():
                committed.setdefault(path, found)
    verdict = Verdict(kind, code == 0, n_tries, time.monotonic() - start)
    return compare(scene, output, verdict, committed, poison) if code == 0 else verdict


def compare(scene: Scene, output: Path, verdict: Verdict, committed: dict[Path, Stamp], poison: str | None) -> Verdict:
    """Compare a run that is complete with the undisturbed one."""
    outcomes, features = read_outcomes(output), read_features(output)
    n_extra = int((~outcomes["path"].isin(scene.paths)).sum())
    counts = outcomes["path"].value_counts()
    n_lost = n_extra + sum(1 for path in scene.paths if counts.get(path, 0) != 1)
    if n_lost:
        return replace(verdict, n_lost=n_lost)
    is_poison = np.array([path == poison for path in scene.paths])
    expected = np.where(is_poison[:, np.newaxis], np.float32(np.nan), scene.features)
    is_wrong = ~np.all((features == expected) | (np.isnan(features) & np.isnan(expected)), axis=1)
    is_wrong |= outcomes["status"].to_numpy() != np.where(is_poison, "crashed", "ok")
    is_wrong |= outcomes["path"].to_numpy() != scene.paths
    now = stamp_committed(output)
    manifest = json.loads((output / "manifest.json").read_text())
    return replace(
        verdict,
        is_complete=manifest["status"] == "complete" and (output / "results.csv").exists(),
        n_wrong=int(is_wrong.sum()),
        n_changed=sum(path not in now or now[path].sha256 != found.sha256 for path, found in committed.items()),
        n_again=sum(path.suffix == ".parquet" and now.get(path) != found for path, found in committed.items()),
    )


def build_model(path: Path) -> Path:
    """Build a small Keras model whose six features are the mean and the largest value of each colour."""
    script = (
        "import sys, keras; pixels = keras.Input((32, 32, 3)); "
        "features = keras.layers.Concatenate(name='colours')([keras.layers.GlobalAveragePooling2D()(pixels), "
        "keras.layers.GlobalMaxPooling2D()(pixels)]); "
        "keras.Model(pixels, keras.layers.Dense(2)(features)).save(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(path)], check=True, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    )
    return path


def main() -> None:
    """Damage many runs and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="The first one.")
    parser.add_argument("--at-once", type=int, default=2)
    arguments = parser.parse_args()
    kinds, seeds = list(FAULTS), range(arguments.seed, arguments.seed + arguments.runs)
    by_kind: dict[str, list[Verdict]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as name,
        ThreadPoolExecutor(arguments.at_once) as pool,
        open_moto() as s3_server,
        CommandHost() as commands,
    ):
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        scene = Scene(Path(name), build_model(Path(name) / "colours.keras"), commands, s3_server)
        verdicts = pool.map(lambda seed: damage(scene, kinds[seed % len(kinds)], seed), seeds)
        for n_done, (seed, verdict) in enumerate(zip(seeds, verdicts, strict=True), 1):
            by_kind[verdict.kind].append(verdict)
            if not verdict.is_well:
                print(f"seed {seed}: {verdict}", file=sys.stderr)
                print((scene.folder / f"run-{seed}.log").read_text()[-2000:], file=sys.stderr)
            print(f"{n_done} of {len(seeds)} runs", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    everything = [verdict for verdicts in by_kind.values() for verdict in verdicts]
    print_table({kind: by_kind[kind] for kind in kinds if by_kind[kind]} | {"all": everything})
    sys.exit(not all(verdict.is_well for verdict in everything))


@contextmanager
def open_moto() -> Iterator[str]:
    """Run an S3 server in a thread of this process."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


def print_table(verdicts: dict[str, list[Verdict]]) -> None:
    """Print what became of the runs of each kind."""
    names = {
        "complete": "is_complete",
        "lost or doubled": "n_lost",
        "features different": "n_wrong",
        "committed files changed": "n_changed",
        "committed partitions computed again": "n_again",
    }
    print(f"| fault | runs | {' | '.join(names)} | seconds per run |")
    print("|---|" + "---:|" * (len(names) + 2))
    for kind, group in verdicts.items():
        sums = [sum(getattr(verdict, name) for verdict in group) for name in names.values()]
        mean = sum(verdict.seconds for verdict in group) / len(group)
        print(f"| {kind} | {len(group)} | {' | '.join(map(str, sums))} | {mean:.1f} |")


if __name__ == "__main__":
    main()
