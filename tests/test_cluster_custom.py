"""Clusters of a class that the configuration names."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_events import ENDS, wait_until
from distributed import LocalCluster
from runs import configure

import fruitdask
from fruitdask.cluster import custom, open_client
from fruitdask.cluster.custom import _list_options, load_class
from fruitdask.core.config import Config, CustomClusterConfig, ModelConfig, load_config
from fruitdask.errors import ClusterStartError, ConfigError, SettingsError
from fruitdask.pipeline.inputs import dump_config

CONFIGS = Path(__file__).parents[1] / "configs"
#: Options of a LocalCluster whose scheduler and workers are in this process.
INSIDE = {"processes": False, "protocol": "tcp", "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
INSIDE |= {"threads_per_worker": 1}


class OwnCluster(LocalCluster):
    """A cluster whose start and end can fail."""

    begun = threading.Event()
    released = threading.Event()
    built: list["OwnCluster"] = []

    def __init__(self, *, delay: float = 0.0, starts: bool = True, closes: bool = True, **options: Any) -> None:
        self.starts, self.closes = starts, closes
        self.begun.set()
        # Simulates a cluster that starts slowly.
        self.released.wait(delay)
        super().__init__(**options if starts else options | {"n_workers": 0})
        self.built.append(self)

    def scale(self, n: int = 0, memory: Any = None, cores: Any = None) -> Any:
        """Start workers only if `starts` is true."""
        return super().scale(n if self.starts else 0, memory, cores)

    def close(self, timeout: float | None = None) -> Any:
        """Close the cluster, then fail unless `closes` is true."""
        super().close(timeout)
        if not self.closes:
            raise OSError("the server does not answer")


class StrictCluster(LocalCluster):
    """A cluster with a required and an optional option, which starts without workers."""

    def __init__(self, queue: str, walltime: str = "") -> None:
        super().__init__(n_workers=0, **INSIDE)


def make(path: str = "distributed.LocalCluster", **settings: Any) -> CustomClusterConfig:
    """Configure a cluster in this process."""
    options = INSIDE | settings.pop("options", {})
    workers = {} if "adaptive" in settings else {"n_workers": 1}
    return CustomClusterConfig.model_validate(
        {"kind": "custom", "class": path, "options": options} | workers | settings
    )


@pytest.fixture
def own() -> str:
    """Return the import path of `OwnCluster`."""
    OwnCluster.begun.clear()
    OwnCluster.released.clear()
    OwnCluster.built.clear()
    return f"{__name__}.OwnCluster"


def test_cluster_gets_its_workers_and_is_closed_at_the_end() -> None:
    with open_client(make(n_workers=2)) as client:
        client.wait_for_workers(2, timeout=60)
        assert client.submit(sum, [1, 2]).result(60) == 3
        assert len(client.nthreads()) == 2
    assert client.status == "closed" and client.cluster.status.name == "closed"


def test_class_without_the_option_n_workers_is_scaled() -> None:
    config = make(f"{__name__}.StrictCluster", n_workers=2).model_copy(update={"options": {"queue": "a"}})
    with open_client(config) as client:
        client.wait_for_workers(2, timeout=60)
        assert len(client.nthreads()) == 2


def test_adaptive_cluster_grows_with_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom, "_ADAPT", {"interval": "100ms"})
    with open_client(make(adaptive={"minimum": 0, "maximum": 3})) as client:
        assert client.cluster._adaptive.minimum == 0 and client.cluster._adaptive.maximum == 3
        # Simulates work that takes some time: a cluster does not grow for tasks that take none.
        futures = client.map(lambda seconds: time.sleep(seconds) or 1, [0.5] * 40, pure=False)
        client.wait_for_workers(2, timeout=60)
        assert sum(client.gather(futures[:2])) == 2
        client.cancel(futures)
    assert client.cluster.status.name == "closed"


@pytest.fixture
def terminable() -> Any:
    """Make SIGTERM raise SystemExit, as the command line does."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.usefixtures("terminable")
@pytest.mark.parametrize(("end", "expected"), ENDS)
def test_cluster_is_closed_whatever_ends_the_run(end: Callable[[], None], expected: type[BaseException]) -> None:
    with pytest.raises(expected, match="in the block|143|^$"):
        with open_client(make()) as client:
            assert client.submit(sum, [1, 2]).result(60) == 3
            end()
            wait_until(lambda: False, "the signal arrives")
    assert client.cluster.status.name == "closed"


@pytest.mark.usefixtures("terminable")
@pytest.mark.parametrize(("end", "expected"), ENDS[1:])
def test_cluster_that_was_interrupted_while_it_started_is_closed(
    end: Callable[[], None], expected: type[BaseException], own: str
) -> None:
    def interrupt() -> None:
        OwnCluster.begun.wait(60)
        end()

    threading.Thread(target=interrupt).start()
    with pytest.raises(expected, match="143|^$"):
        with open_client(make(own, options={"delay": 0.5})):
            pass
    assert [cluster.status.name for cluster in OwnCluster.built] == ["closed"]


def test_cluster_that_starts_too_slowly_is_closed(own: str) -> None:
    with pytest.raises(ClusterStartError, match=r"cluster of class .*\.OwnCluster did not start within 0.2 s"):
        with open_client(make(own, options={"delay": 0.5}, start_timeout=0.2)):
            pass
    assert [cluster.status.name for cluster in OwnCluster.built] == ["closed"]


def test_cluster_without_workers_says_so(own: str) -> None:
    with pytest.raises(ClusterStartError, match="OwnCluster: no worker within 3 s; look for the reason"):
        with open_client(make(own, options={"starts": False}, start_timeout=3)) as client:
            pytest.fail(f"{client} has no worker")
    assert [cluster.status.name for cluster in OwnCluster.built] == ["closed"]


def test_cluster_that_cannot_start_all_workers_says_so(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(cluster: OwnCluster, n: int) -> Any:
        if n:
            raise TypeError(f"no host for {n} workers.")
        return LocalCluster.scale(cluster, n)

    monkeypatch.setattr(OwnCluster, "scale", scale)
    with pytest.raises(ClusterStartError, match="did not start: no host for 3 workers; check cluster.options"):
        with open_client(make(own, n_workers=3)):
            pass
    assert [cluster.status.name for cluster in OwnCluster.built] == ["closed"]


def test_cluster_that_starts_after_the_end_is_closed(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom, "_END_SECONDS", 0.1)
    with pytest.raises(ClusterStartError, match="is still starting; fruitdask closes it if it starts while"):
        with open_client(make(own, options={"delay": 60}, start_timeout=0.1)):
            pass
    assert OwnCluster.built == []
    OwnCluster.released.set()
    for thread in threading.enumerate():
        if thread.name == "start of the cluster":
            thread.join(60)
    assert [cluster.status.name for cluster in OwnCluster.built] == ["closed"]


def test_cluster_that_cannot_be_closed_is_named(own: str) -> None:
    message = r"may still run: closing it failed \(the server does not answer\); stop"
    with pytest.raises(ClusterStartError, match=message):
        with open_client(make(own, options={"closes": False})):
            pass


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("no_such_thing.Cluster", {}, "no_such_thing.Cluster cannot be imported .*: pip install no-such-thing$"),
        ("distributed.LocalClutser", {}, "the module distributed has no LocalClutser; check its name"),
        ("fractions.Fraction", {}, "expected a class of clusters of Dask .*, found the class Fraction"),
        ("os.system", {}, "expected a class of clusters of Dask .*, found a builtin_function_or_method"),
        ("distributed.Client", {}, "expected a class of clusters of Dask .*, found the class Client"),
        (
            "StrictCluster",
            {"queue": "a", "waltime": 1},
            "StrictCluster: .* argument 'waltime'; did you mean walltime",
        ),
        (
            "StrictCluster",
            {"queue": "a", "x": 1},
            "got an unexpected keyword argument 'x'; its options are queue, walltime$",
        ),
        ("StrictCluster", {}, "do not fit .*StrictCluster: missing a required argument: 'queue'; its options"),
        (
            "dask_cloudprovider.aws.FargateCluster",
            {"imag": "x"},
            "do not fit dask_cloudprovider.aws.FargateCluster: .* argument 'imag'; did you mean image",
        ),
        ("distributed.deploy.adaptive.Adaptive", {}, "expected a class of clusters"),
    ],
    ids=["package", "name", "class", "function", "client", "option", "strange", "missing", "option of a base", "other"],
)
def test_wrong_class_or_option_is_named(path: str, options: dict[str, Any], message: str) -> None:
    path = path if "." in path else f"{__name__}.{path}"
    settings = {"kind": "custom", "class": path, "options": options, "n_workers": 1}
    with pytest.raises(ConfigError, match=message):
        with open_client(CustomClusterConfig.model_validate(settings)):
            pass


def test_error_of_a_class_becomes_one_sentence() -> None:
    with pytest.raises(ClusterStartError, match="SSHCluster did not start: .*hosts.* must be a non empty list"):
        with open_client(
            CustomClusterConfig.model_validate({"kind": "custom", "class": "distributed.SSHCluster", "n_workers": 1})
        ):
            pass


SECTIONS = {"input": {"url": "s3://fruits/Test"}, "output": {"url": "s3://fruits/run"}}
CLASS = {"class": "dask_jobqueue.SLURMCluster"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cluster": CLASS}, "cluster: give either n_workers or adaptive"),
        ({"cluster": CLASS | {"n_workers": 1, "adaptive": {"maximum": 2}}}, "cluster: give either n_workers or"),
        ({"cluster": CLASS | {"options": {"n_workers": 3}}}, "as cluster.n_workers, not in options"),
        ({"cluster": CLASS | {"n_worker": 3}}, "unknown key cluster.n_worker; did you mean n_workers"),
        ({"cluster": {"kind": "custom", "n_workers": 3}}, "the key cluster.class is missing; add it"),
        ({"cluster": {"kind": "custom", "clas": "a.B"}}, "unknown key cluster.clas; did you mean class"),
        ({"cluster": {"class": "SLURMCluster", "n_workers": 1}}, "expected an import path such as .*, found 'SLURMC"),
        ({"cluster": {"class": "os.system('x')", "n_workers": 1}}, "expected an import path such as"),
        ({"cluster": CLASS | {"n_workers": 1}, "limits": {"max_cost": 3}}, "limits.max_cost needs known prices"),
    ],
    ids=["neither", "both", "in options", "misspelled", "no class", "misspelled class", "no path", "code", "cost"],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_config({**SECTIONS, **settings})


def test_manifest_names_the_class_without_its_options() -> None:
    config = load_config({**SECTIONS, "cluster": CLASS | {"n_workers": 3, "options": {"password": "hunter2"}}})
    dumped = dump_config(config)
    assert dumped["cluster"]["class"] == CLASS["class"] and "hunter2" not in str(dumped) + repr(config)
    assert load_config(dumped).cluster == config.cluster.model_copy(update={"options": {}})


@pytest.mark.parametrize("name", ["fargate", "kubernetes", "slurm"])
def test_examples_have_options_of_the_real_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    for variable in re.findall(r"\$\{(\w+)\}", text):
        monkeypatch.setenv(variable, "given")
    cluster = load_config(CONFIGS / f"{name}.yaml").cluster
    assert isinstance(cluster, CustomClusterConfig)
    package = cluster.class_path.partition(".")[0]
    if find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    known = set(_list_options(load_class(cluster.class_path)))
    commented = yaml.safe_load(re.sub(r"(?m)^    # (\w+: )", r"    \1", text))["cluster"]["options"]
    assert cluster.options and {*cluster.options, *commented} <= known


def make_run(sample_folder: Path, output: Path, model: ModelConfig, cluster: dict[str, Any]) -> Config:
    """Configure a small run on a cluster."""
    return configure(sample_folder, output, model, cluster={"kind": "custom"} | cluster)


@pytest.mark.slow
def test_plan_starts_no_cluster(sample_folder: Path, tiny_model: ModelConfig, tmp_path: Path) -> None:
    cluster = {"class": "no_such_thing.Cluster", "adaptive": {"maximum": 7}}
    planned = fruitdask.plan(make_run(sample_folder, tmp_path / "out", tiny_model, cluster))
    assert (planned.n_workers, planned.threads_per_worker) == (7, 1)
    assert any("no_such_thing.Cluster is not started for a plan" in warning for warning in planned.warnings)


SBATCH = """#!/bin/sh
# Runs a job as SLURM does, but without a queue: copy the script, run it, and print the id of the process.
job={folder}/job.$$
cp "$1" $job
setsid sh $job > $job.log 2>&1 &
echo $! >> {folder}/jobs
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
echo "$1" >> {folder}/cancelled
kill -TERM -- "-$1"
"""


def test_package_that_takes_over_ctrl_c_does_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import signal\nsignal.signal(signal.SIGINT, lambda *_: None)\nfrom distributed import LocalCluster\n"
    (tmp_path / "takes_signals.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    assert load_class("takes_signals.LocalCluster") is LocalCluster
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_run_on_jobs_of_dask_jobqueue(
    sample_folder: Path, tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("dask_jobqueue") is None:
        pytest.skip("needs the package dask-jobqueue")
    for name, text in {"sbatch": SBATCH, "scancel": SCANCEL}.items():
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(CONFIGS.parent), prepend=os.pathsep)
    options = {"cores": 1, "processes": 1, "memory": "2GB", "interface": "lo", "local_directory": str(tmp_path)}
    options |= {"scheduler_options": {"dashboard_address": "127.0.0.1:0"}}
    cluster = CLASS | {"options": options, "n_workers": 2, "start_timeout": 120}
    result = fruitdask.run(make_run(sample_folder, tmp_path / "out", tiny_model, cluster))
    assert result.n_computed == 24 and set(result.table["status"]) == {"ok"}
    assert result.manifest["cluster"]["kind"] == "custom" and result.manifest["regions"]["cluster"] == "unknown"
    jobs, cancelled = ((tmp_path / name).read_text().split() for name in ("jobs", "cancelled"))
    assert len(jobs) == 2 and set(cancelled) == set(jobs)
