"""dask-cloudprovider's EC2Cluster, hardened."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from aiobotocore.session import AioSession
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from dask_cloudprovider.aws.ec2 import EC2Cluster, EC2Scheduler, EC2Worker

from fruitdask.cluster.cloud.cluster import CloudCluster, Machine, SchedulerMachine, WorkerMachine
from fruitdask.cluster.cloud.fleet import State
from fruitdask.cluster.ec2.instances import terminate_run
from fruitdask.core.aws import RUN_TAG

#: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-add-user-data.html
_MAX_USER_DATA_BYTES = 16_384
_ALIVE = ("pending", "running")
_WAIT_SECONDS = 0.1
_N_CONSOLE_LINES = 5


class _Session(AioSession):  # type: ignore[misc]
    """A session whose clients retry only briefly, and which hardens the instances that it launches."""

    def __init__(self, root_devices: Mapping[str, str]) -> None:
        super().__init__()
        self._root_devices = root_devices
        self.register("before-parameter-build.ec2.RunInstances", self._harden)

    def create_client(self, *args: Any, config: Any = None, **options: Any) -> Any:
        """Create a client; with dask-cloudprovider's settings, it would retry ten times if AWS has no capacity."""
        ours = Config(retries={"mode": "standard", "total_max_attempts": 3}, connect_timeout=10, read_timeout=30)
        return super().create_client(*args, config=ours, **options)

    def _harden(self, params: dict[str, Any], **_: Any) -> None:
        """Encrypt the root volume, and disable version 1 of the metadata service."""
        volume = params["BlockDeviceMappings"][0]
        volume["DeviceName"] = self._root_devices[params["ImageId"]]
        volume["Ebs"]["Encrypted"] = True
        params["MetadataOptions"] = {"HttpTokens": "required"}


class _Instance(Machine):
    """An instance."""

    cluster: "RunCluster"
    instance: Any
    instance_tags: dict[str, str]
    instance_type: str
    spot: bool
    docker_image: str
    ami: str

    @property
    def id(self) -> str:  # type: ignore[override]
        """Its id; empty before its launch."""
        return str(self.instance["InstanceId"]) if self.instance else ""

    async def create_vm(self) -> tuple[str, str | None]:
        """Launch it."""
        self.check_start_data()
        # Tag at launch: an instance that is tagged later exists for a moment without tags.
        self.instance_tags = self.instance_tags | {"Name": self.name, "Dask Cluster": self.cluster.uuid}
        addresses: tuple[str, str | None] = await self.fleet.request(super().create_vm())
        return addresses

    async def configure_vm(self, client: Any) -> tuple[str, str | None]:
        """Record its launch."""
        self.fleet.note_launch(self.id, name=self.name, size=self.instance_type, is_spot=self.spot)
        return self.instance["PrivateIpAddress"], None

    async def describe(self) -> str:
        """Describe its state, with the end of its console output."""
        state = self.state.description
        described = f"instance {self.id} ({self.instance_type}, image {self.docker_image}, {self.ami}) is {state}"
        lines = []
        with contextlib.suppress(BotoCoreError, ClientError):
            async with self.cluster.open_ec2() as client:
                answer = await client.get_console_output(InstanceId=self.id)
            lines = [line.strip() for line in answer.get("Output", "").splitlines() if line.strip()]
        return f"{described}; its console ends: {' | '.join(lines[-_N_CONSOLE_LINES:])}" if lines else described


class _RunScheduler(_Instance, SchedulerMachine, EC2Scheduler):  # type: ignore[misc]
    """The instance of the scheduler."""

    async def configure_vm(self, client: Any) -> tuple[str, str | None]:
        """Wait for the public address, for the client; workers use the private one, as the security group requires."""
        private, _ = await super().configure_vm(client)
        if self.use_private_ip:
            return private, None
        while not (public := self.state.address):
            await self.check()
            await asyncio.sleep(_WAIT_SECONDS)
        return private, public

    @property
    def advice(self) -> str:  # type: ignore[override]
        """What to check if nothing can connect to it."""
        return (
            f"check that the security groups {', '.join(self.security_groups)} admit this machine (port {self.port}), "
            f"and that the subnet {self.subnet_id} reaches the internet"
        )


class _RunWorker(_Instance, WorkerMachine, EC2Worker):  # type: ignore[misc]
    """The instance of a worker."""

    @property
    def advice(self) -> str:  # type: ignore[override]
        """What to check if it does not connect."""
        groups = ", ".join(self.security_groups)
        return f"check that instances of the security groups {groups} may reach each other"


class RunCluster(CloudCluster, EC2Cluster):  # type: ignore[misc]
    """The cluster of a run on EC2."""

    cloud = "EC2"
    start_data = ("user data of an instance", _MAX_USER_DATA_BYTES)
    machines = (_RunScheduler, _RunWorker)
    errors = (BotoCoreError, ClientError)
    final_errors = (ClientError,)

    def __init__(self, *, root_devices: Mapping[str, str], **options: Any) -> None:
        super().__init__(**options)
        #: Names of root volumes by machine image.
        self.boto_session = _Session(root_devices)

    @property
    def place(self) -> str:
        """The region."""
        return str(self.region)

    @property
    def cleanup_command(self) -> str:
        """The command that terminates instances that may still run."""
        return f"fruitdask clusters cleanup --region {self.region}"

    def terminate(self) -> list[str]:
        """Terminate the instances of the run by their tag."""
        return terminate_run(self.region, self.settings.run_id)

    def open_ec2(self) -> Any:
        """Open a client of EC2."""
        return self.boto_session.create_client("ec2", region_name=self.region)

    @contextlib.asynccontextmanager
    async def open_states(self) -> AsyncIterator[Callable[[], Awaitable[Mapping[str, State]]]]:
        """Open a function that asks EC2 for the states of the run's instances."""
        async with self.open_ec2() as client:
            yield lambda: _list_states(client, self.settings.run_id)


async def _list_states(client: Any, run_id: str) -> dict[str, State]:
    """Ask EC2 for the states of a run's instances."""
    filters = [{"Name": f"tag:{RUN_TAG}", "Values": [run_id]}]
    return {
        instance["InstanceId"]: _describe_state(instance)
        async for page in client.get_paginator("describe_instances").paginate(Filters=filters)
        for reservation in page["Reservations"]
        for instance in reservation["Instances"]
    }


def _describe_state(instance: Mapping[str, Any]) -> State:
    """Convert EC2's description of the state of an instance."""
    name, reason = instance["State"]["Name"], instance.get("StateReason", {}).get("Message", "")
    return State(name in _ALIVE, f"{name} ({reason})" if reason else name, instance.get("PublicIpAddress"))
