"""Roles on Azure for a configuration: what the launcher and the machines may do, where, and why.

The tables below are the only source of the roles, of their explanation, and of the permissions in a plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fruitdask.core.config import AzureClusterConfig, Config

Role = Literal["launcher", "workers"]

#: The launcher runs fruitdask; all machines compute, with the identity of the configuration.
ROLES: tuple[Role, ...] = ("launcher", "workers")
_STORAGE = ("abfs://", "abfss://", "az://")
_MACHINE, _INTERFACE = "Microsoft.Compute/virtualMachines", "Microsoft.Network/networkInterfaces"
_ADDRESS = "Microsoft.Network/publicIPAddresses"
_LAUNCHER = (
    (f"{_MACHINE}/read", "finds machines that have started, were evicted, or were left behind"),
    (f"{_MACHINE}/write", "creates machines"),
    (f"{_MACHINE}/delete", "deletes them"),
    (f"{_MACHINE}/instanceView/read", "finds machines that have stopped"),
    (f"{_MACHINE}/retrieveBootDiagnosticsData/action", "explains why a machine did not start"),
    ("Microsoft.Compute/disks/read", "finds disks that were left behind"),
    ("Microsoft.Compute/disks/write", "creates the disks of machines"),
    ("Microsoft.Compute/disks/delete", "deletes them"),
    (f"{_INTERFACE}/read", "finds network interfaces that were left behind"),
    (f"{_INTERFACE}/write", "creates the network interfaces of machines"),
    (f"{_INTERFACE}/join/action", "connects machines to them"),
    (f"{_INTERFACE}/delete", "deletes them"),
    (f"{_ADDRESS}/read", "finds public addresses that were left behind"),
    ("Microsoft.Network/virtualNetworks/read", "finds the virtual network and its subnets"),
    ("Microsoft.Network/virtualNetworks/subnets/join/action", "connects network interfaces to the subnet"),
    ("Microsoft.Network/networkSecurityGroups/read", "finds the security group"),
    ("Microsoft.Network/networkSecurityGroups/join/action", "protects network interfaces with it"),
)
_PUBLIC = (
    (f"{_ADDRESS}/write", "creates the public address of the scheduler"),
    (f"{_ADDRESS}/join/action", "gives it to the scheduler"),
    (f"{_ADDRESS}/delete", "deletes it"),
)
_IDENTITY = (("Microsoft.ManagedIdentity/userAssignedIdentities/assign/action", "gives machines their identity"),)
_MACHINES = (
    (f"{_MACHINE}/delete", "lets a machine delete itself (and any other in the resource group)"),
    ("Microsoft.Compute/disks/delete", "deletes its disk with it"),
    (f"{_INTERFACE}/delete", "deletes its network interface with it"),
)
_ADDRESS_OF_MACHINE = ((f"{_ADDRESS}/delete", "deletes its public address with it"),)


@dataclass(frozen=True)
class Permission:
    """An action that a role needs."""

    role: Role
    action: str
    reason: str


def list_permissions(config: Config) -> Iterator[Permission]:
    """List the actions that a configuration needs on Azure; none without a cluster there."""
    cluster = config.cluster
    if not isinstance(cluster, AzureClusterConfig):
        return
    own = _LAUNCHER + _PUBLIC * cluster.public_ingress + _IDENTITY * (cluster.identity is not None)
    yield from (Permission("launcher", action, reason) for action, reason in own)
    of_machines = _MACHINES + _ADDRESS_OF_MACHINE * cluster.public_ingress
    yield from (Permission("workers", action, reason) for action, reason in of_machines)


def build_roles(config: Config) -> dict[Role, dict[str, Any]]:
    """Build the custom roles of the launcher and of the machines, for one resource group."""
    cluster = config.cluster
    if not isinstance(cluster, AzureClusterConfig):
        return {}
    permissions = list(list_permissions(config))
    return {
        role: {
            "Name": f"fruitdask {role} in {cluster.resource_group}",
            "Description": "What fruitdask needs to run a cluster." if role == ROLES[0] else "Ends its own machine.",
            "AssignableScopes": [build_scope(cluster)],
            "Actions": [permission.action for permission in permissions if permission.role == role],
        }
        for role in ROLES
    }


def build_scope(cluster: AzureClusterConfig) -> str:
    """Build the id of the resource group."""
    subscription = cluster.subscription_id or "$AZURE_SUBSCRIPTION_ID"
    return f"/subscriptions/{subscription}/resourceGroups/{cluster.resource_group}"


def list_commands(cluster: AzureClusterConfig, config: Config) -> Iterator[str]:
    """List the commands that assign the roles, and those of Azure for storage."""
    scope = build_scope(cluster)
    identity = (cluster.identity or "IDENTITY").rsplit("/", 1)[-1]
    group = (cluster.identity or "").partition("/resourceGroups/")[2].partition("/")[0] or cluster.resource_group
    show = f"$(az identity show --resource-group {group} --name {identity} --query principalId --output tsv)"
    assignees = {"launcher": "--assignee LAUNCHER"}
    assignees["workers"] = f'--assignee-object-id "{show}" --assignee-principal-type ServicePrincipal'
    for role in ROLES:
        yield f"az role definition create --role-definition @{role}.json"
        yield _assign(f"fruitdask {role} in {cluster.resource_group}", assignees[role], scope)
    places = {"Storage Blob Data Reader": config.input.url, "Storage Blob Data Contributor": config.output.url}
    for name, url in places.items():
        if url.startswith(_STORAGE):
            yield from (_assign(name, assignees[role], "STORAGE_CONTAINER_ID") for role in ROLES)


def _assign(role: str, assignee: str, scope: str) -> str:
    """Build a command that assigns a role."""
    return f'az role assignment create --role "{role}" {assignee} --scope {scope}'
