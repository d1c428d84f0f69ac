"""Runs whose workers, or command, are killed, or that meet an image that kills each process; `chaos/fault_runs.py`
makes hundreds of them.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from commands import CommandHost

from fruitdask.core.config import ModelConfig

sys.path.insert(0, str(Path(__file__).parent / "chaos"))

from fault_runs import FAULTS, Scene, damage, stamp_committed, wait_for  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="kills processes by signals")]


@pytest.fixture(scope="module")
def scene(tiny_model: ModelConfig, commands: CommandHost, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Images, a network, and the features of an undisturbed run."""
    return Scene(tmp_path_factory.mktemp("scene"), Path(tiny_model.weights), commands)


@pytest.mark.parametrize(
    "kind",
    [
        "each worker killed in turn",
        "all workers killed at once",
        "the command killed",
        "an image that kills its worker",
    ],
)
def test_nothing_is_lost(scene: Scene, kind: str) -> None:
    seed = list(FAULTS).index(kind)
    verdict = damage(scene, kind, seed=seed)
    said = f"{verdict}\n{(scene.folder / f'run-{seed}.log').read_text()}"
    assert verdict.is_well, said
    # Workers are replaced within the run; a command that was killed is started again.
    assert verdict.n_tries == (2 if kind == "the command killed" else 1), said


@pytest.mark.parametrize(
    ("n_interrupts", "kill"),
    [(1, os.killpg), (2, os.kill)],
    ids=["as a terminal does", "twice, the command alone"],
)
def test_ctrl_c_ends_everything_and_says_how_to_resume(
    scene: Scene, n_interrupts: int, kill: Callable[[int, int], None]
) -> None:
    output = scene.folder / f"interrupted-{n_interrupts}"
    process = scene.start(output)
    wait_for(output, 3, process)
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for _ in range(n_interrupts):
        kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    log = output.with_suffix(".log").read_text()
    assert "Traceback" not in log and "dashboard" not in log
    assert log.endswith("fruitdask: interrupted; stored results are kept, run the same command again to resume\n")
    left = [psutil.Process(pid) for pid in family if psutil.pid_exists(pid)]
    psutil.wait_procs(left, timeout=20)
    assert not [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    committed = stamp_committed(output)
    assert scene.start(output).wait(60) == 0
    after = stamp_committed(output)
    assert committed and all(after[path] == found for path, found in committed.items())
