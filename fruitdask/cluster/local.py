"""Clusters of processes on this machine."""

import logging
import math
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fruitdask.cluster.allocator import MALLOC_VARIABLES
from fruitdask.core.config import LocalClusterConfig
from fruitdask.core.guard import check_script, forget_missing_script
from fruitdask.errors import ClusterStartError

#: TensorFlow, a network and a batch need 1 to 1.2 GB per process (measured with MobileNetV2, 16 images per batch).
_BYTES_PER_WORKER = 2 * 1024**3

#: Ctrl-C in a terminal reaches every process of the group; only the client handles it, and closes the workers.
_IGNORE_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
#: Modules that the process imports from which workers are forked; the first is Dask's own.
_PRELOADED = ["distributed.nanny", "fruitdask.worker.featurize", "fruitdask.worker.images.kernel"]
#: Variables to set before a worker starts, overriding the environment: Dask leaves its own values in the environment of
#: a process that has started workers. The first three are Dask's defaults.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | MALLOC_VARIABLES

#: Prefixes of variables that workers take from the client as they are now: the process that forks workers may have
#: started before one was changed, such as AWS_PROFILE in a notebook.
_CLOUDS = ("AWS_", "AZURE_", "GOOGLE_")

_START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
#: Settings of Dask, also for workers that replace others.
_SETTINGS = {
    "distributed.worker.multiprocessing-method": _START_METHOD,
    "distributed.nanny.pre-spawn-environ": _ENVIRONMENT,
    # After this time, Dask gives up a lost worker that is down, as it may be while a poison image keeps killing it.
    "distributed.deploy.lost-worker-timeout": "10000 hours",
    # Messages that Dask keeps for its developers, by default a thousand; here each holds a partition.
    "distributed.admin.low-level-log-length": 10,
    # Dask's profiler may hang a worker forever: listing the frames of all threads deadlocks if garbage is collected
    # while a thread starts (https://github.com/python/cpython/issues/106883).
    "distributed.worker.profile.enabled": False,
    # Each process measures its event loop fifty times per second, and itself twice, which takes 1 % of a core.
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
    # Users may have set these for long-lived clusters; this one ends only with its run.
    "distributed.scheduler.idle-timeout": None,
    "distributed.scheduler.no-workers-timeout": None,
    "distributed.worker.lifetime.duration": None,
}


def choose_workers(config: LocalClusterConfig, *, n_cores: int, memory_bytes: int) -> tuple[int, int]:
    """Choose the numbers of processes and of threads per process of a local cluster.

    >>> choose_workers(LocalClusterConfig(), n_cores=8, memory_bytes=32 * 1024**3)
    (8, 1)
    >>> choose_workers(LocalClusterConfig(), n_cores=8, memory_bytes=8 * 1024**3)
    (4, 2)
    >>> choose_workers(LocalClusterConfig(n_workers=2), n_cores=8, memory_bytes=32 * 1024**3)
    (2, 4)
    """
    threads = config.threads_per_worker
    n_workers = config.n_workers or max(1, min(n_cores // (threads or 1), memory_bytes // _BYTES_PER_WORKER))
    return n_workers, threads or max(1, math.floor(n_cores / n_workers))


def prepare_local() -> None:
    """Start the process from which workers are forked, so that it imports their modules while the client works.

    Workers then start faster, and share one import. Only on Linux, where libraries support forking; elsewhere each
    worker imports separately.
    """
    if sys.platform != "linux":
        return
    from multiprocessing import forkserver

    # Reads the files of Dask's settings: an invalid one raises an exception here, not a traceback in the other process.
    import dask.config  # noqa: F401

    multiprocessing.set_forkserver_preload(_PRELOADED)
    saved = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
    for name in saved:
        if name.startswith(_CLOUDS):
            del os.environ[name]
    try:
        forkserver.ensure_running()
    finally:
        for name in _ENVIRONMENT:
            os.environ.pop(name)
        os.environ.update(saved)


@contextmanager
def open_local(config: LocalClusterConfig) -> Iterator[Any]:
    """Start workers on this machine that listen on the loopback interface only."""
    prepare_local()
    forget_missing_script()
    import dask
    from distributed import Client

    with dask.config.set(_SETTINGS), _start_cluster(config) as cluster, Client(cluster) as client:
        yield client


def _start_cluster(config: LocalClusterConfig) -> Any:
    """Start the scheduler and the workers."""
    import dask
    from dask.system import CPU_COUNT
    from distributed import Security
    from distributed.system import MEMORY_LIMIT

    from fruitdask.cluster.tolerant import TolerantLocalCluster

    n_workers, threads = choose_workers(config, n_cores=CPU_COUNT, memory_bytes=MEMORY_LIMIT)
    is_encrypted = dask.config.get("distributed.comm.require-encryption")
    try:
        with warnings.catch_warnings():
            # If another run uses the dashboard's port, Dask takes a free one, and shows the right link.
            warnings.filterwarnings("ignore", "Port .* is already in use", UserWarning)
            return TolerantLocalCluster(
                n_workers=n_workers,
                threads_per_worker=threads,
                memory_limit=config.memory_limit or "auto",
                # Without a dashboard, Dask still serves health and metrics, by default on the usual port.
                dashboard_address=config.dashboard_address or "127.0.0.1:0",
                scheduler_kwargs={"dashboard": config.dashboard_address is not None},
                host="127.0.0.1",
                # If the user's settings of Dask require encryption, this cluster has its own keys.
                security=Security.temporary() if is_encrypted else None,
                protocol="tls://" if is_encrypted else "tcp://",
                # A task's error returns as its exception; and closing workers would log that the scheduler has ended.
                silence_logs=logging.CRITICAL,
                preload=[_IGNORE_INTERRUPTS],
                # The process that forks them may be older than a variable, such as AWS_PROFILE in a notebook.
                env=os.environ | _ENVIRONMENT,
            )
    except Exception as error:
        check_script(_START_METHOD)
        # Dask raises any error that prevents a start: OSError, ValueError of an option, TimeoutError ...
        raise ClusterStartError(
            f"the local cluster ({n_workers} workers) did not start: {error}; check the section cluster, and your "
            "settings of Dask (files in ~/.config/dask, variables DASK_...)"
        ) from error
