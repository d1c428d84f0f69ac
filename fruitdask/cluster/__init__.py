"""Dask clusters: start one or connect to one, provide its client, and close both."""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

from fruitdask.cluster.address import open_address
from fruitdask.cluster.azure import open_azure
from fruitdask.cluster.cloud.prices import Usage
from fruitdask.cluster.custom import open_custom
from fruitdask.cluster.ec2 import open_ec2
from fruitdask.cluster.local import choose_workers, open_local, prepare_local
from fruitdask.core.config import ClusterConfig
from fruitdask.core.guard import leave_imported_script

__all__ = ["choose_workers", "describe_workers", "list_usage", "open_client", "prepare_local"]

_OPENERS: dict[str, Callable[[Any], AbstractContextManager[Any]]]
_OPENERS = {
    "local": open_local,
    "address": open_address,
    "ec2": open_ec2,
    "azure": open_azure,
    "custom": open_custom,
}


def open_client(config: ClusterConfig) -> AbstractContextManager[Any]:
    """
    Open a client of the cluster that a configuration describes, and close both at the end.

    Parameters
    ----------
    config : LocalClusterConfig, AddressClusterConfig, EC2ClusterConfig, AzureClusterConfig or CustomClusterConfig
        Which cluster. One that was already running is left running.

    Returns
    -------
    contextlib.AbstractContextManager[distributed.Client]
        A context manager that yields the client of a cluster with at least one worker.

    Raises
    ------
    ClusterStartError
        On entry, if the cluster does not start or cannot be reached in time; on exit, if it cannot be stopped.
    ConfigError
        On entry, if options cannot be passed on to instances, or do not fit the class of the cluster.
    ScriptError
        On entry, if a script without the guard ``if __name__ == "__main__":`` opens it.
    """
    leave_imported_script()
    return _OPENERS[config.kind](config)


def list_usage(client: Any) -> list[Usage]:
    """List the running times of a client's instances, even after it was closed."""
    list_usage_of = getattr(getattr(client, "cluster", None), "list_usage", list)
    usage: list[Usage] = list_usage_of()
    return usage


def describe_workers(client: Any) -> dict[str, float]:
    """Return the number of workers for the progress; nothing while the scheduler does not answer."""
    with suppress(OSError):
        return {"n_workers": len(client.nthreads())}
    return {}
