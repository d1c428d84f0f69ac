"""Clusters with other versions are refused; here, real workers and schedulers have other versions."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster

from fruitdask import __version__
from fruitdask.cluster import open_client
from fruitdask.cluster.versions import check_versions
from fruitdask.core.config import AddressClusterConfig
from fruitdask.errors import ClusterStartError

# Dask warns about the same differences.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatched versions found")

PYTHON = "{}.{}.{}".format(*sys.version_info[:3])
#: A Dask process runs this before it starts, and then reports another version of Python.
OTHER_PYTHON = """
import collections, sys
sys.version_info = collections.namedtuple("Version", "major minor micro level serial")(3, 99, 1, "final", 0)
"""

Start = Callable[..., Client]


def add_package(folder: Path, name: str, *, version: str | None) -> None:
    """Write the metadata of an installed package; without a version, Dask reports it as missing."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", *([f"Version: {version}"] if version else [])]
    (info / "METADATA").write_text("\n".join(lines))


def add_module(folder: Path, source: str) -> None:
    """Write another package with the name fruitdask."""
    (folder / "fruitdask").mkdir(parents=True)
    (folder / "fruitdask" / "__init__.py").write_text(source)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts workers, each of which prefers the packages in a folder."""
    with ExitStack() as stack:
        options = {"processes": False, "protocol": "tcp", "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
        cluster = stack.enter_context(LocalCluster(n_workers=0, **options))

        def start_worker(folder: Path, *arguments: str) -> None:
            command = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address, *arguments]
            environment = os.environ | {"PYTHONPATH": str(folder), "TMPDIR": str(tmp_path)}
            options = ["--no-nanny", "--no-dashboard", "--nthreads", "1", "--host", "127.0.0.1"]
            folder.mkdir(exist_ok=True)
            worker = subprocess.Popen([*command, *options], cwd=folder, env=environment, stderr=subprocess.DEVNULL)
            stack.callback(worker.wait)
            stack.callback(worker.kill)

        def start(*workers: tuple[Path, *tuple[str, ...]]) -> Client:
            for worker in workers:
                start_worker(*worker)
            client = stack.enter_context(Client(cluster))
            client.wait_for_workers(len(workers), timeout=60)
            return client

        yield start


@pytest.mark.slow
def test_check_versions_accepts_other_patch_releases(start: Start, tmp_path: Path) -> None:
    major, minor, patch = np.__version__.split(".")[:3]
    add_package(tmp_path / "patched", "numpy", version=f"{major}.{minor}.{int(patch) + 1}")
    check_versions(start((tmp_path / "patched",)))


@pytest.mark.slow
def test_check_versions_names_packages_that_differ_and_where(start: Start, tmp_path: Path) -> None:
    add_package(tmp_path / "old", "numpy", version="1.26.4")
    add_package(tmp_path / "old", "pandas", version="2.3.0")
    client = start((tmp_path / "same",), (tmp_path / "old", "--name", "old"))
    [address] = [key for key, worker in client.scheduler_info()["workers"].items() if worker["name"] == "old"]
    expected = (
        f"numpy 1.26.4 on {address}, {np.__version__} here; pandas 2.3.0 on {address}, .* here; install the versions"
    )
    with pytest.raises(ClusterStartError, match=expected):
        check_versions(client)


@pytest.mark.slow
def test_check_versions_counts_the_nodes_and_says_how_to_build_the_image(start: Start, tmp_path: Path) -> None:
    add_package(tmp_path, "zarr", version="2.18.0")
    client = start((tmp_path,), (tmp_path,))
    fix = "push it: .*python.* configs/docker/build.py me/fruitdask:1 "
    with pytest.raises(ClusterStartError, match=f"zarr 2.18.0 on tcp://\\S+ and 1 more, .* here; .*{fix}"):
        check_versions(client, image="me/fruitdask:1")


def test_check_versions_sends_no_code_to_another_python(start: Start, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(OTHER_PYTHON)
    add_module(tmp_path / "broken", "raise ImportError('was asked for')")
    client = start((tmp_path / "broken", "--preload", str(tmp_path / "other.py")))
    with pytest.raises(ClusterStartError, match=f": python 3.99.1 on tcp://\\S+, {PYTHON} here; install"):
        check_versions(client)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "raise ModuleNotFoundError('No module named fruitdask')",
            r"cannot be imported on tcp://\S+ \(ModuleNotFoundError: No ",
        ),
        ("__version__ = '0.0.1'", rf"fruitdask 0\.0\.1 on tcp://\S+, {__version__} here"),
    ],
    ids=["no fruitdask", "another fruitdask"],
)
def test_check_versions_requires_the_same_fruitdask(start: Start, tmp_path: Path, source: str, message: str) -> None:
    add_module(tmp_path, source)
    client = start((tmp_path,))
    with pytest.raises(ClusterStartError, match=message):
        check_versions(client)


@pytest.mark.slow
def test_check_versions_compares_engines_where_both_sides_have_them(start: Start, tmp_path: Path) -> None:
    add_package(tmp_path / "without", "openvino", version=None)
    add_package(tmp_path / "old", "openvino", version="2021.4.0")
    add_package(tmp_path / "old", "pillow", version=None)
    client = start((tmp_path / "without",), (tmp_path / "old",))
    expected = r"machine: pillow missing on (tcp://\S+), \S+ here; openvino 2021.4.0 on \1, \S+ here; install"
    with pytest.raises(ClusterStartError, match=expected):
        check_versions(client)


def test_cluster_at_an_address_with_other_versions_is_refused(start: Start, tmp_path: Path) -> None:
    add_package(tmp_path, "distributed", version="2020.1.0")
    client = start((tmp_path,))
    config = AddressClusterConfig(kind="address", address=client.scheduler.address)
    with pytest.raises(ClusterStartError, match="distributed 2020.1.0 on tcp"):
        with open_client(config):
            pass
