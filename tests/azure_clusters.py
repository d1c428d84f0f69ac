"""Clusters on the loopback Azure: their configuration, and what they must not leave behind."""

from typing import Any

from cluster_events import PATIENCE_SECONDS, check_tls_is_restored
from loopback_azure import LoopbackAzure

from fruitdask.core.config import AzureClusterConfig

PLACE = {"location": "westeurope", "resource_group": "fruits", "vnet": "vnet", "security_group": "nsg"}


def describe(**options: Any) -> dict[str, Any]:
    """Describe a cluster with one worker whose machines may delete themselves."""
    defaults = {"docker_image": "any", "n_workers": 1, "worker_options": {"nthreads": 1}, "identity": "fruit-machines"}
    return {"kind": "azure", **PLACE, **defaults, **options}


def configure(**options: Any) -> AzureClusterConfig:
    """Configure such a cluster."""
    return AzureClusterConfig(**describe(**options))


def check_nothing_left(cloud: LoopbackAzure) -> None:
    """Check that no machine, disk, network interface, address, process or TLS setting is left."""
    assert cloud.wait_until_quiet(PATIENCE_SECONDS), [machine.log() for machine in cloud.alive()]
    assert cloud.list_resources() == [] and cloud.processes() == []
    check_tls_is_restored()
