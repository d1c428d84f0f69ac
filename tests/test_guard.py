"""Scripts without ``if __name__ == "__main__":``, as people write them."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import fruitdask
from fruitdask.core.config import Config, ModelConfig
from fruitdask.core.sample import draw_sample

LOAD = """
import fruitdask, sys
config = fruitdask.load_config({{
    "input": {{"url": {images!r}}},
    "model": {model!r},
    "cluster": {{"n_workers": 2, "dashboard_address": None}},
    "output": {{"url": "out"}},
}})
"""
BUILD = """
from fruitdask.worker.models import start_building
with start_building(config.model) as wait:
    wait()
"""
CONNECT = """
with fruitdask.open_client(config.cluster) as client:
    print(len(client.scheduler_info(n_workers=-1)["workers"]), __name__)
"""


def run_script(
    text: str, tmp_path: Path, *, is_file: bool = True
) -> tuple[subprocess.CompletedProcess[str], list[psutil.Process]]:
    """Run a script in its own session; returns its output, and which of its processes are left."""
    (tmp_path / "script.py").write_text(text)
    before = set(psutil.pids())
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py") if is_file else "-"],
        input=None if is_file else text,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        # The cache is empty, so that a network has to be built.
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "FRUITDASK_TEST": str(tmp_path)},
        timeout=120,
    )
    new = [psutil.Process(pid) for pid in psutil.pids() if pid not in before and psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs([one for one in new if is_of(one, tmp_path)], timeout=20)
    return done, alive


def is_of(process: psutil.Process, tmp_path: Path) -> bool:
    """Return whether a process belongs to a script."""
    try:
        return process.environ().get("FRUITDASK_TEST") == str(tmp_path)
    except psutil.Error:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fruitdask.run(config)", BUILD], ids=["run", "build"])
def test_script_without_guard_is_asked_to_add_one(
    sample_folder: Path, tiny_model: ModelConfig, tmp_path: Path, call: str
) -> None:
    load = LOAD.format(images=str(sample_folder), model=tiny_model.model_dump(exclude_defaults=True))
    done, left = run_script(f"{load}\n{call}\nprint('done')\n", tmp_path)
    assert (done.returncode, done.stdout, left) == (1, "", [])
    assert done.stderr == (
        f'{tmp_path}/script.py: put the calls of fruitdask below if __name__ == "__main__": '
        "(each process that fruitdask starts imports this script first)\n"
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda config: fruitdask.explore(config),
        lambda config: fruitdask.plan(config),
        lambda config: fruitdask.run(config),
        lambda config: fruitdask.erase(config, ["*"]),
        lambda config: draw_sample(config.input.url),
    ],
    ids=["explore", "plan", "run", "erase", "sample"],
)
def test_script_that_is_imported_again_ends_quietly(
    call: Callable[[Config], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = fruitdask.load_config({"input": {"url": str(tmp_path / "in")}, "output": {"url": str(tmp_path / "out")}})
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit, match="77"):
        call(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("is_file", [True, False], ids=["guarded file", "standard input"])
def test_script_that_needs_no_other_guard_works(sample_folder: Path, tmp_path: Path, is_file: bool) -> None:
    lines = (LOAD.format(images=str(sample_folder), model={}) + CONNECT).splitlines()
    indented = "\n".join("    " + line if line else line for line in lines)
    text = f'if __name__ == "__main__":\n{indented}\n' if is_file else "\n".join(lines)
    done, left = run_script(text, tmp_path, is_file=is_file)
    assert (done.returncode, done.stdout, left) == (0, "2 __main__\n", []), done.stderr


def test_error_of_a_script_is_an_error_of_fruitdask() -> None:
    from fruitdask.errors import FruitdaskError, ScriptError

    with pytest.raises(FruitdaskError, match="put it there") as caught:
        raise ScriptError("put it there")
    assert isinstance(caught.value, SystemExit) and caught.value.code == "put it there"
