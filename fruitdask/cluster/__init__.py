"""Dask clusters: started or found, handed over as a client, and closed again."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from fruitdask.cluster.address import open_address
from fruitdask.cluster.local import choose_workers, open_local
from fruitdask.config import ClusterConfig

__all__ = ["choose_workers", "open_client"]


def open_client(config: ClusterConfig) -> AbstractContextManager[Any]:
    """
    Open a client of the cluster that a configuration describes, and close both at the end.

    Parameters
    ----------
    config : LocalClusterConfig, AddressClusterConfig or EC2ClusterConfig
        Which cluster. One that was already running is left running.

    Returns
    -------
    contextlib.AbstractContextManager[distributed.Client]
        A context manager that gives the client of a cluster with at least one worker.

    Raises
    ------
    ClusterStartError
        On entering it, if the cluster does not start or cannot be reached in time.
    """
    openers: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {"local": open_local, "address": open_address}
    return openers[config.kind](config)
