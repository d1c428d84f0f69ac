"""Runs that are damaged on purpose, and what is left of them after the next one.

    python tests/chaos/fault_runs.py [--runs 200] [--seed 0] [--at-once 2]

Each run featurizes 160 drawn images in 40 partitions with two workers. A seed chooses what happens and when: workers are killed
(SIGKILL), one or each in its turn or all, the command is killed, interrupted or asked to end, or one image kills every process that opens
it. A run that ended is started again until it is complete. Prints, by kind of fault, how many runs were complete, how many images were
lost or doubled, how many features differ from those of an undisturbed run, and how many committed files changed by a byte.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import yaml
import zarr

N_IMAGES, IMAGES_PER_PARTITION = 160, 4
_MAX_TRIES = 4
#: Far longer than any run takes; one that hangs is a failure, not a reason to wait.
_PATIENCE_SECONDS = 180
#: In a process that loads it, opening the poisonous image is deadly, as a crash in a decoder is.
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
        Whether it ended with results, in the end.
    n_tries : int
        Commands that it took.
    n_lost : int
        Images without an outcome, or with more than one.
    n_wrong : int
        Images whose features or status differ from what they must be.
    n_changed : int
        Files of partitions committed before the damage that differ afterwards.
    seconds : float
        From the first start to the last end.
    """

    kind: str
    is_complete: bool
    n_tries: int
    n_lost: int
    n_wrong: int
    n_changed: int
    seconds: float

    @property
    def is_well(self) -> bool:
        """Whether nothing was lost."""
        return self.is_complete and not (self.n_lost or self.n_wrong or self.n_changed)


class Scene:
    """
    Images, a network and the features of an undisturbed run.

    Parameters
    ----------
    folder : Path
        Where all that is kept.
    model : Path
        A small Keras model.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        from fruitdask.sample import draw_sample

        self.folder, self.model = folder, model
        # Six species; what is too much is left out by input.limit.
        draw_sample(folder / "images", per_class=-(-N_IMAGES // 6), size_px=32)
        output = folder / "undisturbed"
        assert self.start(output).wait(_PATIENCE_SECONDS) == 0
        self.paths = list(read_outcomes(output)["path"])
        self.features = read_features(output)

    def start(self, output: Path, *, poison: str | None = None) -> subprocess.Popen[bytes]:
        """Start the command, in a process group of its own."""
        config = output.with_suffix(".yaml")
        sections = {
            "input": {"url": str(self.folder / "images"), "limit": N_IMAGES},
            "model": {"weights": str(self.model), "preprocessing": "none"},
            "cluster": {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None},
            "featurize": {"images_per_partition": IMAGES_PER_PARTITION},
            **{section: {"enabled": False} for section in ("explore", "quality", "plots", "report")},
            "output": {"url": str(output)},
        }
        config.write_text(yaml.safe_dump(sections))
        environment = os.environ | {"XDG_CACHE_HOME": str(self.folder / "cache")}
        if poison is not None:
            (output.parent / f"{output.name}-site").mkdir(exist_ok=True)
            (output.parent / f"{output.name}-site" / "sitecustomize.py").write_text(_POISON.format(name=poison))
            paths = [str(output.parent / f"{output.name}-site"), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        log = open(output.with_suffix(".log"), "ab")
        with log:
            return subprocess.Popen(
                [sys.executable, "-m", "fruitdask", "run", str(config)],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )


def read_outcomes(output: Path) -> pd.DataFrame:
    """Read the outcomes of all partitions, in their order."""
    files = sorted((output / "partitions").glob("*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


def read_features(output: Path) -> np.ndarray:
    """Read the features."""
    group: Any = zarr.open_group(output / "features.zarr", mode="r")
    return np.asarray(group["features"][:])


def hash_committed(output: Path) -> dict[str, str]:
    """Hash the files of the partitions that are committed: outcomes, features, statuses."""
    hashes = {}
    for mark in (output / "partitions").glob("*.parquet"):
        index = int(mark.stem)
        chunks = [output / "features.zarr" / name for name in (f"features/c/{index}/0", f"status/c/{index}")]
        for file in (mark, *chunks):
            hashes[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashes


def wait_for(output: Path, n_committed: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until so many partitions are committed, or the command has ended."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        folder = output / "partitions"
        if folder.exists() and sum(1 for _ in folder.glob("*.parquet")) >= n_committed:
            return
        time.sleep(0.002)


def find_workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
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


def kill_a_worker(
    process: subprocess.Popen[bytes], output: Path, moments: Iterator[int], chance: random.Random
) -> None:
    """Kill one worker at some moment."""
    wait_for(output, next(moments), process)
    for worker in chance.sample(find_workers(process), 1) if find_workers(process) else ():
        kill(worker)


def kill_each_worker(
    process: subprocess.Popen[bytes], output: Path, moments: Iterator[int], chance: random.Random
) -> None:
    """Kill every worker that the run began with, one after the other."""
    wait_for(output, next(moments), process)
    for worker in find_workers(process):
        kill(worker)
        wait_for(output, next(moments), process)


def kill_all_workers(
    process: subprocess.Popen[bytes], output: Path, moments: Iterator[int], chance: random.Random
) -> None:
    """Kill all workers at once, so that nobody holds the network any more."""
    wait_for(output, next(moments), process)
    for worker in find_workers(process):
        kill(worker)


def make_signal(number: signal.Signals) -> Callable[..., None]:
    """Make a fault that sends a signal to the command alone."""

    def send(process: subprocess.Popen[bytes], output: Path, moments: Iterator[int], chance: random.Random) -> None:
        wait_for(output, next(moments), process)
        process.send_signal(number)

    return send


def kill_while_starting(
    process: subprocess.Popen[bytes], output: Path, moments: Iterator[int], chance: random.Random
) -> None:
    """Kill the command at some moment before its first partition is done."""
    try:
        process.wait(chance.uniform(0.1, 2.5))
    except subprocess.TimeoutExpired:
        process.kill()


FAULTS: dict[str, Callable[..., None]] = {
    "a worker killed": kill_a_worker,
    "each worker killed in its turn": kill_each_worker,
    "all workers killed at once": kill_all_workers,
    "the command killed": make_signal(signal.SIGKILL),
    "the command killed while starting": kill_while_starting,
    "Ctrl-C": make_signal(signal.SIGINT),
    "asked to end (SIGTERM)": make_signal(signal.SIGTERM),
    "an image that kills its worker": lambda *_: None,
}


def damage(scene: Scene, kind: str, seed: int) -> Verdict:
    """
    Damage a run, go on until it is complete, and compare.

    Parameters
    ----------
    scene : Scene
        Images, network and what must come out.
    kind : str
        One of `FAULTS`.
    seed : int
        Chooses when, and which.

    Returns
    -------
    Verdict
        What was lost: nothing, it is hoped.
    """
    chance, output = random.Random(seed), scene.folder / f"run-{seed}"
    n_partitions = N_IMAGES // IMAGES_PER_PARTITION
    moments = iter(sorted(chance.randint(0, n_partitions - 1) for _ in range(16)))
    poison = chance.choice(scene.paths) if kind == "an image that kills its worker" else None
    start, committed = time.monotonic(), dict[str, str]()
    for n_tries in range(1, _MAX_TRIES + 1):
        process = scene.start(output, poison=poison)
        if n_tries == 1:
            FAULTS[kind](process, output, moments, chance)
        code = process.wait(_PATIENCE_SECONDS)
        for path, found in hash_committed(output).items():
            committed.setdefault(path, found)
        if code == 0:
            break
    seconds = time.monotonic() - start
    if code:
        return Verdict(kind, False, n_tries, 0, 0, 0, seconds)
    return compare(scene, output, Verdict(kind, True, n_tries, 0, 0, 0, seconds), committed, poison)


def compare(scene: Scene, output: Path, verdict: Verdict, committed: dict[str, str], poison: str | None) -> Verdict:
    """Compare a run that is complete with the undisturbed one."""
    outcomes, features = read_outcomes(output), read_features(output)
    counts = outcomes["path"].value_counts()
    lost = sum(1 for path in scene.paths if counts.get(path, 0) != 1) + int((~outcomes["path"].isin(scene.paths)).sum())
    is_poison = np.array([path == poison for path in scene.paths])
    expected = np.where(is_poison[:, np.newaxis], np.float32(np.nan), scene.features)
    statuses = np.where(is_poison, "crashed", "ok")
    if lost or len(outcomes) != len(scene.paths):
        return Verdict(verdict.kind, True, verdict.n_tries, max(lost, 1), 0, 0, verdict.seconds)
    is_wrong = ~np.all((features == expected) | (np.isnan(features) & np.isnan(expected)), axis=1)
    is_wrong |= outcomes["status"].to_numpy() != statuses
    now = hash_committed(output)
    changed = sum(now.get(path) != found for path, found in committed.items())
    manifest = json.loads((output / "manifest.json").read_text())
    is_complete = manifest["status"] == "complete" and (output / "results.csv").exists()
    return Verdict(verdict.kind, is_complete, verdict.n_tries, lost, int(is_wrong.sum()), changed, verdict.seconds)


def build_model(path: Path) -> Path:
    """Build a small Keras model whose six features are the mean and the largest value of each colour."""
    script = (
        "import sys, keras; pixels = keras.Input((32, 32, 3)); "
        "features = keras.layers.Concatenate(name='colours')([keras.layers.GlobalAveragePooling2D()(pixels), "
        "keras.layers.GlobalMaxPooling2D()(pixels)]); keras.Model(pixels, keras.layers.Dense(2)(features)).save(sys.argv[1])"
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
    kinds = list(FAULTS)
    by_kind: dict[str, list[tuple[int, Verdict]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.at_once) as pool:
        scene = Scene(Path(name), build_model(Path(name) / "colours.keras"))
        seeds = range(arguments.seed, arguments.seed + arguments.runs)
        verdicts = pool.map(lambda seed: damage(scene, kinds[seed % len(kinds)], seed), seeds)
        for seed, verdict in zip(seeds, verdicts, strict=True):
            by_kind[verdict.kind].append((seed, verdict))
            if not verdict.is_well:
                print(f"seed {seed}: {verdict}", file=sys.stderr, flush=True)
                print((scene.folder / f"run-{seed}.log").read_text()[-2000:], file=sys.stderr, flush=True)
    print(
        "| fault | runs | complete | lost or doubled | features different | committed files changed | seconds a run |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    everything = [verdict for verdicts in by_kind.values() for _, verdict in verdicts]
    for kind, group in [
        *((kind, [v for _, v in by_kind[kind]]) for kind in kinds if by_kind[kind]),
        ("all", everything),
    ]:
        sums = [sum(getattr(v, name) for v in group) for name in ("is_complete", "n_lost", "n_wrong", "n_changed")]
        mean = sum(v.seconds for v in group) / len(group)
        print(f"| {kind} | {len(group)} | {' | '.join(map(str, sums))} | {mean:.1f} |")
    sys.exit(not all(verdict.is_well for verdict in everything))


if __name__ == "__main__":
    main()
