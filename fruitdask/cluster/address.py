"""Clusters that run already."""

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

    try:
        client = Client(config.address, timeout=config.timeout_seconds)
    except (OSError, ValueError) as error:
        raise ClusterStartError(
            f"cluster.address {config.address}: no scheduler answered within {config.timeout_seconds:g} s; check that it runs there"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=config.timeout_seconds)
        except TimeoutError as error:
            raise ClusterStartError(
                f"cluster.address {config.address}: no worker within {config.timeout_seconds:g} s; start one: dask worker {config.address}"
            ) from error
        check_versions(client)
        yield client
