"""Virtual machines of runs on Azure, found by their tag: even if the process that started them has died."""

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fruitdask.cluster.cloud.fleet import State
from fruitdask.cluster.cloud.instances import Instance, find_role
from fruitdask.core.azure import RUN_TAG, explain_azure_error
from fruitdask.errors import ClusterStartError, ConfigError

#: Azure takes a minute to delete a machine, and reserves the network interface of one that it refused for 3 minutes.
_DELETE_TIMEOUT_SECONDS = 480.0
_POLL_SECONDS = 2.0
#: Statuses of responses to requests that succeed once other resources are deleted.
_CONFLICTS = (400, 409, 429)
#: The parts of a machine, in the order in which they can be deleted.
_KINDS = ("virtual machine", "network interface", "disk", "public address")
#: Finds the run in the name of a machine or a part.
_NAME = re.compile(r"dask-([0-9a-f]{12})-")
_STOPPED = ("stopped", "stopping", "deallocated", "deallocating")
_SETTINGS: dict[str, Any] = {"retry_total": 3, "connection_timeout": 10, "read_timeout": 60, "polling_interval": 5}


@dataclass(frozen=True)
class Resource:
    """A resource of a run."""

    kind: str
    name: str
    run_id: str
    found: Any


class Arm:
    """Azure Resource Manager, for one resource group."""

    def __init__(self, subscription: str, group: str) -> None:
        from azure.identity import DefaultAzureCredential
        from azure.mgmt.compute import ComputeManagementClient
        from azure.mgmt.network import NetworkManagementClient

        self.subscription, self.group = subscription, group
        self.credential = DefaultAzureCredential()
        self.compute: Any = ComputeManagementClient(self.credential, subscription, **_SETTINGS)
        self.network: Any = NetworkManagementClient(self.credential, subscription, **_SETTINGS)
        compute, network = self.compute, self.network
        operations = (compute.virtual_machines, network.network_interfaces, compute.disks, network.public_ip_addresses)
        self.kinds: dict[str, Any] = dict(zip(_KINDS, operations, strict=True))

    def close(self) -> None:
        """Close all connections."""
        for client in (self.compute, self.network, self.credential):
            client.close()

    def list_resources(self, run_id: str | None, kinds: Iterable[str] = _KINDS) -> list[Resource]:
        """List what fruitdask has created for a run, or for all runs."""
        found = []
        for kind in kinds:
            operations = self.kinds[kind]
            listing = operations.list_by_resource_group if kind == "disk" else operations.list
            for one in listing(self.group):
                # Azure creates the disk of a machine, and does not document whether the disk gets the machine's tags.
                of_run = _NAME.match(one.name) if kind == "disk" else None
                own = (one.tags or {}).get(RUN_TAG) or (of_run and of_run[1])
                if own and run_id in (None, own):
                    found.append(Resource(kind, one.name, own, one))
        return found

    def find_power(self, name: str) -> str:
        """Find whether a machine is running, stopped, or gone."""
        from azure.core.exceptions import ResourceNotFoundError

        try:
            statuses = self.compute.virtual_machines.instance_view(self.group, name).statuses or ()
        except ResourceNotFoundError:
            return "deleted"
        states = [str(status.code).partition("/") for status in statuses]
        return next((power for kind, _, power in states if kind == "PowerState"), "starting")


@contextmanager
def open_arm(group: str, *, subscription: str | None, action: str) -> Iterator[Arm]:
    """Open clients of Resource Manager, and explain its errors."""
    check_installed()
    from azure.core.exceptions import AzureError

    arm = Arm(find_subscription(subscription), group)
    try:
        yield arm
    except AzureError as error:
        raise ClusterStartError(f"cannot {action}: {explain_azure_error(error) or error}") from error
    finally:
        arm.close()


def check_installed() -> None:
    """Raise an error if the packages of the extra are not installed."""
    try:
        import azure.identity
        import azure.mgmt.compute
        import azure.mgmt.network  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"cluster.kind: azure needs packages that are not installed ({error.name}); run pip install "
            "'fruitdask[azure]'"
        ) from error


def find_subscription(subscription: str | None) -> str:
    """Find the subscription: the given one, else the one in the environment."""
    found = subscription or os.environ.get("AZURE_SUBSCRIPTION_ID")
    if not found:
        raise ConfigError(
            "no Azure subscription is set; give its id (az account show --query id) as cluster.subscription_id or "
            "--subscription, or set AZURE_SUBSCRIPTION_ID"
        )
    return found


def list_states(arm: Arm, run_id: str, suspects: Iterable[str]) -> dict[str, State]:
    """Ask for the states of a run's machines; those that may have ended are asked for one by one."""
    machines = {one.name: one.found for one in arm.list_resources(run_id, _KINDS[:1])}
    suspects = set(suspects)
    states = {name: State(False, "deleted") for name in suspects - machines.keys()}
    for name, machine in machines.items():
        power = arm.find_power(name) if name in suspects else "running"
        provisioning = str(machine.provisioning_state)
        is_alive = provisioning not in ("Deleting", "Failed") and power not in (*_STOPPED, "deleted")
        states[name] = State(is_alive, power if provisioning == "Succeeded" else f"{power} ({provisioning})")
    return states


def list_instances(arm: Arm, *, run_id: str | None = None) -> list[Instance]:
    """List the machines of fruitdask, and parts of deleted ones."""
    found = arm.list_resources(run_id)
    machines = [one for one in found if one.kind == _KINDS[0]]
    owners = tuple(machine.name for machine in machines)
    left = [one for one in found if one.kind != _KINDS[0] and not one.name.startswith(owners)]
    return sorted(map(_describe, machines + left), key=lambda one: (one.launched_at, one.id))


def terminate_run(arm: Arm, run_id: str) -> list[str]:
    """Delete everything that a run has created, and list it again until nothing is left."""
    deleted: dict[str, None] = {}
    deadline = time.monotonic() + _DELETE_TIMEOUT_SECONDS
    refused: Exception | None = None
    while left := arm.list_resources(run_id):
        names = [one.name for one in left]
        if time.monotonic() > deadline:
            raise ClusterStartError(
                f"run {run_id}: {', '.join(names)} could not be deleted within {_DELETE_TIMEOUT_SECONDS:g} s "
                f"({(refused and explain_azure_error(refused)) or 'still there'}); delete them in the resource group "
                f"{arm.group}"
            )
        machines = [one.name for one in left if one.kind == _KINDS[0]]
        deleted.update(dict.fromkeys(machines if machines or deleted else names))
        refused = _delete(arm, left)
        time.sleep(_POLL_SECONDS if refused else 0)
    return list(deleted)


def delete_machine(arm: Arm, run_id: str, name: str) -> None:
    """Delete a machine and its parts; the end of the run deletes the parts that cannot be deleted yet."""
    _delete(arm, [one for one in arm.list_resources(run_id) if one.name.startswith(name)])


def name_part(name: str, kind: str) -> str:
    """Name a part of a machine."""
    return name if kind == _KINDS[0] else f"{name}-{kind.replace(' ', '-')}"


def _delete(arm: Arm, resources: list[Resource]) -> Exception | None:
    """Delete resources, first the machines; return the last refusal that may not be final."""
    from azure.core.exceptions import HttpResponseError

    refused: Exception | None = None
    for kind in _KINDS:
        pollers = []
        for name in (one.name for one in resources if one.kind == kind):
            try:
                pollers.append(arm.kinds[kind].begin_delete(arm.group, name))
            except HttpResponseError as error:
                if error.status_code not in _CONFLICTS:
                    raise
                refused = error
        for poller in pollers:
            try:
                poller.wait(_DELETE_TIMEOUT_SECONDS)
            except HttpResponseError as error:
                refused = error
    return refused


def _describe(resource: Resource) -> Instance:
    """Convert Azure's description of a machine, or of a part that is left."""
    found, is_machine = resource.found, resource.kind == _KINDS[0]
    return Instance(
        id=resource.name,
        run_id=resource.run_id,
        role=find_role(resource.name),
        instance_type=str(found.hardware_profile.vm_size) if is_machine else resource.kind,
        is_spot=is_machine and str(found.priority) == "Spot",
        region=found.location,
        state=str(found.provisioning_state),
        launched_at=getattr(found, "time_created", None) or datetime.now(UTC),
        tags=dict(found.tags or {}),
    )
