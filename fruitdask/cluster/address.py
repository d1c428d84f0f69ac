"""Clusters that are already running."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fruitdask.core.config import AddressClusterConfig
from fruitdask.errors import ClusterStartError


@contextmanager
def open_address(config: AddressClusterConfig) -> Iterator[Any]:
    """Connect to a running scheduler that has a worker."""
    from distributed import Client

    from fruitdask.cluster.versions import check_versions

    where, timeout = f"cluster.address {config.address}", f"{config.timeout_seconds:g} s"
    try:
        client = Client(config.address, timeout=config.timeout_seconds)
    except (OSError, ValueError) as error:
        raise ClusterStartError(f"{where}: no scheduler answered within {timeout}; check that it runs there") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=config.timeout_seconds)
        except TimeoutError as error:
            raise ClusterStartError(
                f"{where}: no worker within {timeout}; start one: dask worker {config.address}"
            ) from error
        check_versions(client)
        yield client
