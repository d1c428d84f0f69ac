"""dask-cloudprovider's AzureVMCluster, hardened."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.request import urlopen

from dask_cloudprovider.azure.azurevm import AzureVMCluster, AzureVMScheduler, AzureVMWorker

from azure.core.exceptions import AzureError, HttpResponseError
from fruitdask.cluster.azure.machines import Arm, delete_machine, list_states, name_part, terminate_run
from fruitdask.cluster.azure.network import Network
from fruitdask.cluster.azure.options import add_end
from fruitdask.cluster.cloud.cluster import CloudCluster, Machine, SchedulerMachine, WorkerMachine
from fruitdask.cluster.cloud.fleet import State
from fruitdask.core.azure import RUN_TAG

#: https://learn.microsoft.com/azure/virtual-machines/custom-data
_MAX_CUSTOM_DATA_BYTES = 65_535
_POLL_SECONDS = 0.2
_CONSOLE_SECONDS = 10
_N_CONSOLE_LINES = 5


class _Machine(Machine):
    """A virtual machine, with a disk, a network interface and perhaps a public address that end with it."""

    cluster: "RunCluster"
    admin_username: str
    admin_password: str
    docker_image: str
    vm_image: dict[str, str]
    vm_size: str
    #: Its properties for Resource Manager, except its name, image, disk and network.
    model: dict[str, Any]

    def __init__(self, *args: Any, model: dict[str, Any], **options: Any) -> None:
        super().__init__(*args, **options)
        self.model = model
        self.id = ""

    async def create_vm(self) -> tuple[str, str | None]:
        """Launch it; if that fails, leave nothing behind."""
        self.check_start_data()
        try:
            public = await self._create_address() if self.public_ingress else None
            nic = await self._create_interface(public)
            await self._create_machine(nic)
        except (AzureError, OSError):
            with contextlib.suppress(*self.cluster.errors):
                await self.end_vm()
            raise
        self.id = self.name
        is_spot = "priority" in self.model["properties"]
        self.fleet.note_launch(self.id, name=self.name, size=self.vm_size, is_spot=is_spot)
        return nic.ip_configurations[0].private_ip_address, public.ip_address if public else None

    async def end_vm(self) -> None:
        """Delete it, with its disk, network interface and address."""
        await self.cluster.call_async(delete_machine, self.cluster.arm, self.cluster.settings.run_id, self.name)

    async def describe(self) -> str:
        """Describe its state, with the end of its console output."""
        image = f"image {self.docker_image}, {self.vm_image.get('offer') or self.vm_image.get('id')}"
        described = f"machine {self.id} ({self.vm_size}, {image}) is {self.state.description}"
        lines = await self.cluster.call_async(_read_console, self.cluster.arm, self.id)
        return f"{described}; its console ends: {' | '.join(lines[-_N_CONSOLE_LINES:])}" if lines else described

    async def _create_address(self) -> Any:
        """Create a public address."""
        properties = {"publicIPAllocationMethod": "Static", "publicIPAddressVersion": "IPv4"}
        return await self._create("public address", {"sku": {"name": "Standard"}, "properties": properties})

    async def _create_interface(self, public: Any) -> Any:
        """Create the network interface."""
        network = self.cluster.network
        configuration: dict[str, Any] = {"subnet": {"id": network.subnet_id}}
        if public is not None:
            configuration["publicIPAddress"] = {"id": public.id, "properties": {"deleteOption": "Delete"}}
        properties = {
            "ipConfigurations": [{"name": "fruitdask", "properties": configuration}],
            "networkSecurityGroup": {"id": network.security_group_id},
        }
        return await self._create("network interface", {"properties": properties})

    async def _create_machine(self, nic: Any) -> None:
        """Create the machine itself."""
        custom_data = self.cluster.render_process_cloud_init(self).encode()
        properties = self.model["properties"] | {
            "hardwareProfile": {"vmSize": self.vm_size},
            "osProfile": {
                "computerName": self.name,
                "adminUsername": self.admin_username,
                # A random password that is not kept.
                "adminPassword": self.admin_password,
                "customData": base64.b64encode(custom_data).decode(),
            },
            "storageProfile": {
                "imageReference": self.vm_image,
                "osDisk": {
                    "name": name_part(self.name, "disk"),
                    "createOption": "FromImage",
                    "diskSizeGB": self.disk_size,
                    "deleteOption": "Delete",
                },
            },
            "networkProfile": {"networkInterfaces": [{"id": nic.id, "properties": {"deleteOption": "Delete"}}]},
        }
        await self._create("virtual machine", self.model | {"properties": properties})

    async def _create(self, kind: str, body: dict[str, Any]) -> Any:
        """Create a part of the machine, and wait until it exists."""
        cluster = self.cluster
        content = json.dumps({"location": cluster.location, "tags": cluster.get_tags(), **body}).encode()
        create = cluster.arm.kinds[kind].begin_create_or_update
        poller = await self.fleet.request(
            cluster.call_async(create, cluster.arm.group, name_part(self.name, kind), content)
        )
        while not poller.done():
            await asyncio.sleep(_POLL_SECONDS)
        return poller.result()


class _RunScheduler(_Machine, SchedulerMachine, AzureVMScheduler):  # type: ignore[misc]
    """The machine of the scheduler."""

    @property
    def advice(self) -> str:  # type: ignore[override]
        """What to check if nothing can connect to it."""
        way = "from the internet" if self.public_ingress else "in the virtual network, or one that reaches it"
        return (
            f"check that this machine is {way}, that the security group {self.security_group} admits it (port "
            f"{self.port}), and that the subnet reaches the internet, for example by a NAT gateway"
        )


class _RunWorker(_Machine, WorkerMachine, AzureVMWorker):  # type: ignore[misc]
    """The machine of a worker."""

    @property
    def advice(self) -> str:  # type: ignore[override]
        """What to check if it does not connect."""
        return (
            f"check that the security group {self.security_group} lets machines reach each other, and that the subnet "
            "reaches the internet, for example by a NAT gateway"
        )


class RunCluster(CloudCluster, AzureVMCluster):  # type: ignore[misc]
    """The cluster of a run on Azure."""

    cloud = "Azure"
    start_data = ("custom data of a machine", _MAX_CUSTOM_DATA_BYTES)
    machines = (_RunScheduler, _RunWorker)
    errors = (AzureError,)
    final_errors = (HttpResponseError,)
    poll_seconds = 5.0

    def __init__(self, *, arm: Arm, network: Network, tags: Mapping[str, str], **options: Any) -> None:
        super().__init__(**options)
        self.arm, self.network = arm, network
        # The names of machines contain the run.
        self.uuid = self.settings.run_id
        self._tags = dict(tags)

    @property
    def place(self) -> str:
        """The location."""
        return str(self.location)

    @property
    def cleanup_command(self) -> str:
        """The command that deletes machines that may still exist."""
        arm = self.arm
        return (
            f"fruitdask clusters cleanup --cloud azure --subscription {arm.subscription} --resource-group {arm.group}"
        )

    def terminate(self) -> list[str]:
        """Delete the machines of the run by their tag."""
        return terminate_run(self.arm, self.settings.run_id)

    def get_tags(self) -> dict[str, str]:
        """The tags of everything that the run creates."""
        return self._tags | {RUN_TAG: self.settings.run_id}

    def render_process_cloud_init(self, process: Any) -> str:
        """Render custom data that make a machine delete itself at the end."""
        return add_end(super().render_process_cloud_init(process))

    @contextlib.asynccontextmanager
    async def open_states(self) -> AsyncIterator[Callable[[], Awaitable[Mapping[str, State]]]]:
        """Yield a function that asks Azure for the states of the run's machines."""
        yield self._list_states

    async def _list_states(self) -> Mapping[str, State]:
        """Ask for the states, individually only for machines without a connected worker."""
        connected = {name for name in self.workers if name in self.observed}
        suspects = [name for name in self.list_running() if name not in connected]
        states: Mapping[str, State] = await self.call_async(list_states, self.arm, self.settings.run_id, suspects)
        return states

    def _discard(self, worker: WorkerMachine) -> None:
        """Delete what is left of a failed worker: a machine that has only stopped still costs money."""
        self._tasks.append(asyncio.create_task(worker.destroy_vm()))


def _read_console(arm: Arm, name: str) -> list[str]:
    """Read the boot log of a machine, if Azure has one."""
    try:
        found: Any = arm.compute.virtual_machines.retrieve_boot_diagnostics_data(arm.group, name)
        with urlopen(found.serial_console_log_blob_uri, timeout=_CONSOLE_SECONDS) as log:
            text = log.read().decode(errors="replace")
    except (AzureError, OSError, ValueError, AttributeError):
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]
