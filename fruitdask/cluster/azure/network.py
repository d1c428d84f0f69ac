"""The network of machines on Azure, which the user has created."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fruitdask.cluster.azure.machines import Arm
from fruitdask.core.azure import explain_azure_error
from fruitdask.core.config import AzureClusterConfig
from fruitdask.errors import ClusterStartError


@dataclass(frozen=True)
class Network:
    """Ids of the subnet and the security group of machines."""

    subnet_id: str
    security_group_id: str


def find_network(config: AzureClusterConfig, arm: Arm) -> Network:
    """Find the subnet and the security group, and check that they are in the location of the cluster."""
    vnet: Any
    group: Any
    with _explained(config, f"virtual network {config.vnet}"):
        vnet = arm.network.virtual_networks.get(arm.group, config.vnet)
    with _explained(config, f"security group {config.security_group}"):
        group = arm.network.network_security_groups.get(arm.group, config.security_group)
    for key, found in (("vnet", vnet), ("security_group", group)):
        if found.location.replace(" ", "").lower() != config.location:
            raise ClusterStartError(
                f"cluster.{key} {found.name} is in {found.location}, but cluster.location is {config.location}; "
                "correct one of them"
            )
    subnets = {subnet.name: subnet.id for subnet in vnet.subnets or ()}
    name = config.subnet or next(iter(subnets), "")
    if name not in subnets:
        raise ClusterStartError(
            f"the virtual network {config.vnet} has no subnet {name} (it has {', '.join(subnets) or 'none'}); correct "
            "cluster.subnet"
        )
    return Network(subnets[name], group.id)


@contextmanager
def _explained(config: AzureClusterConfig, what: str) -> Iterator[None]:
    """Turn an error of Azure into a sentence: what does not exist, or why the search failed."""
    from azure.core.exceptions import AzureError

    try:
        yield
    except AzureError as error:
        if getattr(getattr(error, "error", None), "code", None) == "ResourceNotFound":
            raise ClusterStartError(
                f"the resource group {config.resource_group} has no {what}; create it, or correct its name"
            ) from error
        raise ClusterStartError(f"cannot find the {what}: {explain_azure_error(error) or error}") from error
