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

#: TensorFlow, a network and a batch of images need 1 to 1.2 GB a process (measured with MobileNetV2 and 16 images a batch).
_BYTES_PER_WORKER = 2 * 1024**3

#: Ctrl-C in a terminal reaches every process of the group; the client alone answers it, and closes the workers.
_IGNORE_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
#: What workers import; the first is Dask's own. They are forked from one process that has imported it already.
_PRELOADED = ["distributed.nanny", "fruitdask.worker.featurize"]
#: What must be set before a worker starts. The first three are Dask's own settings. Dask leaves its settings in the environment of a
#: process that has started workers, so nothing there can be taken for the user's wish.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | MALLOC_VARIABLES

_START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
#: Settings of Dask, which hold for workers that replace others too.
_SETTINGS = {
    "distributed.worker.multiprocessing-method": _START_METHOD,
    "distributed.nanny.pre-spawn-environ": _ENVIRONMENT,
    # Dask looks some time after the loss of a worker whether it is back, and gives up its place for good if it is not: a worker that
    # dies again and again, of an image that kills it, may be down just then.
    "distributed.deploy.lost-worker-timeout": "10000 hours",
    # A user may have set these for long-lived clusters; this one ends with its run, and never meanwhile.
    "distributed.scheduler.idle-timeout": None,
    "distributed.scheduler.no-workers-timeout": None,
    "distributed.worker.lifetime.duration": None,
}


def choose_workers(config: LocalClusterConfig, *, n_cores: int, memory_bytes: int) -> tuple[int, int]:
    """Choose how many processes and threads a local cluster has.

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
    """
    Let the process start from which workers are forked, so that it imports what they need while the client does something else.

    Workers then start in a fraction of the time, and one import serves all of them. This is done on Linux, where libraries bear being
    forked; elsewhere each worker imports for itself.
    """
    if sys.platform != "linux":
        return
    from multiprocessing import forkserver

    # Reads the files of Dask's settings: a wrong one is told by an exception here, not by a traceback of the other process.
    import dask.config  # noqa: F401

    multiprocessing.set_forkserver_preload(_PRELOADED)
    saved = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
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
    """Start the scheduler and the workers; gives the cluster."""
    import dask
    from dask.system import CPU_COUNT
    from distributed import LocalCluster, Security
    from distributed.system import MEMORY_LIMIT

    n_workers, threads = choose_workers(config, n_cores=CPU_COUNT, memory_bytes=MEMORY_LIMIT)
    is_encrypted = dask.config.get("distributed.comm.require-encryption")
    try:
        with warnings.catch_warnings():
            # Another run has the dashboard's port; Dask takes a free one, and the link that is shown is right.
            warnings.filterwarnings("ignore", "Port .* is already in use", UserWarning)
            return LocalCluster(
                n_workers=n_workers,
                threads_per_worker=threads,
                memory_limit=config.memory_limit or "auto",
                # Without a dashboard Dask still serves its health and metrics there, and would take the usual port for them.
                dashboard_address=config.dashboard_address or "127.0.0.1:0",
                scheduler_kwargs={"dashboard": config.dashboard_address is not None},
                host="127.0.0.1",
                # Users whose settings of Dask require encryption get it here too, by keys of this cluster alone.
                security=Security.temporary() if is_encrypted else None,
                protocol="tls://" if is_encrypted else "tcp://",
                # A task's error comes back as its exception; workers also log that the scheduler is gone while they are closed.
                silence_logs=logging.CRITICAL,
                preload=[_IGNORE_INTERRUPTS],
                # They are forked from a process that may have started before a variable was set, such as AWS_PROFILE in a notebook.
                env=os.environ | _ENVIRONMENT,
            )
    except Exception as error:
        check_script(_START_METHOD)
        # Dask raises whatever kept a process from starting: OSError, ValueError of an option, TimeoutError ...
        raise ClusterStartError(
            f"the local cluster ({n_workers} workers) did not start: {error}; check the section cluster, and your "
            "settings of Dask (files in ~/.config/dask, variables DASK_...)"
        ) from error
