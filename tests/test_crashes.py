"""Processes that are killed while they change a file: the next run repairs what they left, and what was committed stays
as it was.
"""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

import fruitdask
from fruitdask.core.config import Config, ModelConfig
from fruitdask.errors import EngineError
from fruitdask.worker.models.openvino import _import_openvino

pytestmark = pytest.mark.slow

#: Events by which a process changes files: https://docs.python.org/3/library/audit_events.html
CHANGES = ("open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir")
#: Far longer than a run takes.
PATIENCE_SECONDS = 120


def find_change(event: str, arguments: tuple[Any, ...], folder: str) -> str | None:
    """Find the file or folder inside a folder that an event changes."""
    if event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
        return None
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return None
    path = os.fspath(arguments[0])
    # Trees are removed relative to an open folder.
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
    return path if path.startswith(folder) else None


def leave_half(event: str, path: str) -> None:
    """Leave what a process leaves if it is killed while it writes: an empty file, or half of a file to be renamed."""
    if event == "open" and not os.path.exists(path):
        open(path, "xb").close()
    elif event in ("os.rename", "os.link") and os.path.isfile(path):
        os.truncate(path, os.path.getsize(path) // 2)


def die_at(number: int, folder: str, *, is_half: bool) -> None:
    """Make this process kill itself at the n-th change."""
    n_changes = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal n_changes
        path = find_change(event, arguments, folder)
        if path is None:
            return
        n_changes += 1
        if n_changes == number:
            if is_half:
                leave_half(event, path)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def record(folder: str, log: str) -> None:
    """Make this process record what it changes."""

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        path = find_change(event, arguments, folder)
        if path is not None:
            with open(log, "a") as file:
                file.write(json.dumps([event, path]) + "\n")

    sys.addaudithook(look)


def run_in_one_process(config: Config) -> None:
    """Run with scheduler and worker in this process."""
    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        fruitdask.run(config, client=client)


def run_and_die(config: Config, number: int, is_half: bool) -> None:
    """Run until the n-th change."""
    die_at(number, config.output.url, is_half=is_half)
    run_in_one_process(config)


def run_and_record(config: Config, log: str) -> None:
    """Run, and record the changes."""
    record(config.output.url, log)
    run_in_one_process(config)


def fork_calls(connection: Connection) -> None:
    """Import what a run needs, then call each function that is sent in a fork of this process; send exit codes."""
    import fruitdask.analysis.evaluation
    import fruitdask.analysis.pca
    import fruitdask.pipeline.run
    import fruitdask.worker.featurize  # noqa: F401

    with suppress(EngineError):
        _import_openvino()
    while True:
        function, arguments = connection.recv()
        child = os.fork()
        if not child:
            function(*arguments)
            os._exit(0)
        connection.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


class Scene:
    """Images, a network, and an undisturbed run of it."""

    def __init__(self, sample_folder: Path, model: ModelConfig, folder: Path, client: Any, forker: Connection) -> None:
        self._images, self._model, self._folder, self.client = sample_folder, model, folder, client
        self._forker = forker
        config = self.make_config()
        log = folder / "changes.jsonl"
        assert self.start(run_and_record, config, str(log)) == 0
        self.changes = [json.loads(line) for line in log.read_text().splitlines()]
        self.undisturbed = fruitdask.run(config)
        self.files = hash_files(Path(config.output.url))

    def start(self, function: Any, *arguments: Any) -> int:
        """Call a function in a new process; return its exit code."""
        self._forker.send((function, arguments))
        assert self._forker.poll(PATIENCE_SECONDS)
        code: int = self._forker.recv()
        return code

    def make_config(self) -> Config:
        """Make the configuration of a run with its own output."""
        output = self._folder / f"out-{len(list(self._folder.iterdir()))}"
        output.mkdir()
        return fruitdask.load_config(
            {
                "input": {"url": str(self._images), "limit": 12},
                "model": self._model.model_dump(),
                "featurize": {"images_per_partition": 3},
                "plots": {"enabled": False},
                "report": {"enabled": False},
                "output": {"url": str(output)},
            }
        )

    def check(self, config: Config, before: dict[str, str]) -> None:
        """Run again after a kill; check that results equal those of an undisturbed run, and committed files are
        untouched.
        """
        result = fruitdask.run(config, client=self.client)
        pd.testing.assert_frame_equal(result.table, self.undisturbed.table)
        np.testing.assert_array_equal(result.features.compute(), self.undisturbed.features.compute())
        assert result.exploration is not None and self.undisturbed.exploration is not None
        pd.testing.assert_frame_equal(result.exploration.images, self.undisturbed.exploration.images)
        files = hash_files(Path(config.output.url))
        assert sorted(files) == sorted(self.files)
        kept = {name: digest for name, digest in files.items() if is_kept(name)}
        assert kept == {name: digest for name, digest in self.files.items() if is_kept(name)}
        for name in (name for name in before if re.fullmatch(r"partitions/\d+\.parquet", name)):
            index = int(Path(name).stem)
            for file in (name, f"features.zarr/features/c/{index}/0", f"features.zarr/status/c/{index}"):
                assert files[file] == before[file]


def hash_files(folder: Path) -> dict[str, str]:
    """Hash all files of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def is_kept(name: str) -> bool:
    """Return whether a file does not depend on time and place of a run."""
    return name.startswith(
        ("features.zarr/features/c", "features.zarr/status/c", "partitions/", "results.", "pca.zarr/mean")
    )


@pytest.fixture(scope="module")
def scene(
    sample_folder: Path, tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory, client: Any
) -> Iterator[Scene]:
    """An undisturbed run, and its changes in order."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=fork_calls, args=(theirs,))
    process.start()
    try:
        yield Scene(sample_folder, tiny_model, tmp_path_factory.mktemp("crashes"), client, ours)
    finally:
        process.kill()
        process.join()


def test_files_are_written_under_a_temporary_name(scene: Scene) -> None:
    assert len(scene.changes) > 100
    opened = [path for event, path in scene.changes if event == "open"]
    assert [path for path in opened if not path.endswith((".part", ".partial"))] == []


@settings(max_examples=5)
@given(share=st.floats(0, 1), is_half=st.booleans())
def test_run_killed_at_any_change_is_repaired_by_the_next(scene: Scene, share: float, is_half: bool) -> None:
    config = scene.make_config()
    # The order of threads differs each time, and there may be fewer changes.
    number = 1 + int(share * 0.97 * len(scene.changes))
    assert scene.start(run_and_die, config, number, is_half) == -signal.SIGKILL
    scene.check(config, hash_files(Path(config.output.url)))


@settings(max_examples=3)
@given(number=st.integers(1, 8), is_half=st.booleans())
def test_worker_killed_at_any_change_is_replaced(scene: Scene, number: int, is_half: bool) -> None:
    config = scene.make_config()
    doomed = sorted(scene.client.nthreads())[0]
    scene.client.run(die_at, number, config.output.url, is_half=is_half, workers=[doomed])
    scene.check(config, {})
    scene.client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
