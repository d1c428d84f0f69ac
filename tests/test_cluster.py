"""Local clusters, and connections to running clusters."""

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import dask.config
import psutil
import pytest
from cluster_events import wait_until
from distributed import LocalCluster, Scheduler

from fruitdask.cluster import choose_workers, open_client
from fruitdask.core.config import AddressClusterConfig, LocalClusterConfig
from fruitdask.errors import ClusterStartError

GIB = 1024**3


@pytest.mark.parametrize(
    ("settings", "n_cores", "memory_bytes", "expected"),
    [
        ({}, 2, 24 * GIB, (2, 1)),
        ({}, 16, 16 * GIB, (8, 2)),
        ({}, 4, GIB, (1, 4)),
        ({"threads_per_worker": 4}, 16, 128 * GIB, (4, 4)),
        ({"n_workers": 3, "threads_per_worker": 5}, 2, GIB, (3, 5)),
        ({"n_workers": 8}, 2, GIB, (8, 1)),
    ],
    ids=["one process per core", "short of memory", "very short", "threads given", "both given", "more than cores"],
)
def test_choose_workers(settings: dict, n_cores: int, memory_bytes: int, expected: tuple[int, int]) -> None:
    chosen = choose_workers(LocalClusterConfig(**settings), n_cores=n_cores, memory_bytes=memory_bytes)
    assert chosen == expected


def test_local_cluster_listens_on_loopback_only(client: Any) -> None:
    info = client.scheduler_info()
    addresses = [info["address"], *info["workers"], client.dashboard_link.replace("http", "tcp")]
    assert all(address.startswith("tcp://127.0.0.1:") for address in addresses)
    assert sorted(client.nthreads().values()) == [2, 2]
    # Ask the kernel about this process and its children too, because they also have HTTP servers.
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    pids = {psutil.Process().pid, *client.run(os.getpid).values()}
    assert pids <= {process.pid for process in processes}
    sockets = [each for process in processes for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
    assert len(sockets) > 6 and all(ipaddress.ip_address(each.laddr.ip).is_loopback for each in sockets)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked only on Linux")
def test_local_workers_are_forked_with_what_they_need(client: Any) -> None:
    workers = list(
        client.run(
            lambda: (os.getppid(), dict(os.environ), {"fruitdask.worker.featurize", "dask_ml"} & {*sys.modules})
        ).values()
    )
    parents = {parent for parent, _, _ in workers}
    assert len(parents) == 1 and parents != {os.getpid()}
    # What only the client needs to reduce features is not loaded.
    assert all(loaded == {"fruitdask.worker.featurize"} for _, _, loaded in workers)
    # A decoded photograph takes a few megabytes; the allocator must keep and reuse memory of that size.
    thresholds = [int(environment["MALLOC_TRIM_THRESHOLD_"]) for _, environment, _ in workers]
    assert min(thresholds) >= 16 * 1024**2


def test_local_workers_do_not_run_the_profiler_that_may_hang_them(client: Any) -> None:
    assert not any(client.run(lambda dask_worker: "profile" in dask_worker.periodic_callbacks).values())


@pytest.mark.slow
def test_local_workers_get_the_environment_variables_of_their_client() -> None:
    script = """
import os
from fruitdask.cluster import open_client
from fruitdask.cluster.local import prepare_local
from fruitdask.core.config import LocalClusterConfig
os.environ["AWS_PROFILE"] = "old"
prepare_local()
assert os.environ.pop("AWS_PROFILE") == "old"
os.environ["FRUITDASK_TEST_LATE"] = "yes"
with open_client(LocalClusterConfig(n_workers=1, threads_per_worker=1, dashboard_address=None)) as client:
    for name in ("FRUITDASK_TEST_LATE", "AWS_PROFILE"):
        print(*client.run(os.getenv, name).values())
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert printed.stdout.split() == ["yes", "None"], printed.stderr


@pytest.mark.slow
def test_local_workers_that_die_repeatedly_are_replaced() -> None:
    # By default, Dask gives up a worker that is still down this long after its last death.
    patience = dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"})
    with patience, open_client(LocalClusterConfig(n_workers=1, threads_per_worker=1, dashboard_address=None)) as client:
        deadline = time.monotonic() + 2.5

        def kill_until_deadline() -> bool:
            for nanny in client.cluster.workers.values():
                # Between two processes, a nanny has no process id.
                with suppress(ProcessLookupError, TypeError):
                    os.kill(nanny.pid, signal.SIGKILL)
            return time.monotonic() > deadline

        wait_until(kill_until_deadline, "workers have died for longer than Dask's timeout")
        client.wait_for_workers(1, timeout=60)
        assert client.submit(sum, [1, 2]).result(60) == 3


def test_local_cluster_survives_a_worker_that_dies_while_it_registers() -> None:
    def remove(dask_scheduler: Scheduler) -> None:
        dask_scheduler.plugins["worker-status"].remove_worker(dask_scheduler, "tcp://127.0.0.1:1")

    # Closing the cluster waits for messages about its workers.
    with open_client(LocalClusterConfig(n_workers=1, threads_per_worker=1, dashboard_address=None)) as client:
        client.run_on_scheduler(remove)
        assert client.submit(sum, [1, 2]).result() == 3


def test_local_cluster_that_cannot_start_says_so() -> None:
    with pytest.raises(ClusterStartError, match="local cluster.* did not start: .*; check the section cluster"):
        with open_client(LocalClusterConfig(n_workers=1, memory_limit="a lot", dashboard_address=None)):
            pass


def test_local_cluster_is_encrypted_if_the_users_dask_settings_require_it() -> None:
    with dask.config.set({"distributed.comm.require-encryption": True}):
        with open_client(LocalClusterConfig(n_workers=1, threads_per_worker=1, dashboard_address=None)) as client:
            assert client.submit(sum, [1, 2]).result(60) == 3
            addresses = [client.scheduler.address, *client.nthreads()]
    assert all(address.startswith("tls://127.0.0.1:") for address in addresses)


def test_local_cluster_ignores_timeouts_in_the_users_dask_settings() -> None:
    timeouts = {"distributed.scheduler.idle-timeout": "1ms", "distributed.scheduler.no-workers-timeout": "1ms"}
    with dask.config.set(timeouts | {"distributed.worker.lifetime.duration": "1ms"}):
        with open_client(LocalClusterConfig(n_workers=1, threads_per_worker=1, dashboard_address=None)) as client:
            settings = ("idle_timeout", "no_workers_timeout")
            found = client.run_on_scheduler(lambda dask_scheduler: [getattr(dask_scheduler, key) for key in settings])
            assert found == [None, None]
            assert client.run(lambda dask_worker: dask_worker.lifetime, nanny=False).popitem()[1] is None
            assert client.submit(sum, [1, 2]).result(60) == 3


def test_address_cluster_is_left_running() -> None:
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        dashboard_address="127.0.0.1:0",
        host="127.0.0.1",
    ) as cluster:
        for _ in range(2):
            with open_client(AddressClusterConfig(kind="address", address=cluster.scheduler_address)) as client:
                assert client.submit(sum, [1, 2]).result() == 3


def test_unreachable_scheduler_times_out() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ClusterStartError, match=f"cluster.address {address}: no scheduler answered"):
        with open_client(AddressClusterConfig(kind="address", address=address, timeout_seconds=0.5)):
            pass


def test_scheduler_without_workers_times_out() -> None:
    with LocalCluster(
        n_workers=0, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0", host="127.0.0.1"
    ) as cluster:
        assert isinstance(cluster.scheduler, Scheduler)
        with pytest.raises(ClusterStartError, match="no worker within 0.5 s; start one: dask worker tcp://127"):
            config = AddressClusterConfig(kind="address", address=cluster.scheduler_address, timeout_seconds=0.5)
            with open_client(config):
                pass
