"""dask-cloudprovider's EC2Cluster, with deadlines, replacement of workers, and complete termination."""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiobotocore.session import AioSession
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from dask_cloudprovider.aws.ec2 import EC2Cluster, EC2Instance, EC2Scheduler, EC2Worker
from distributed.core import Status
from distributed.deploy.cluster import Cluster
from distributed.deploy.spec import ProcessInterface, SpecCluster

from fruitdask.cluster.ec2.prices import Usage
from fruitdask.core.aws import RUN_TAG, explain_aws_error
from fruitdask.errors import ClusterStartError, FruitdaskError

logger = logging.getLogger(__name__)

#: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-add-user-data.html
_MAX_USER_DATA_BYTES = 16_384
_ALIVE = ("pending", "running")
#: Intervals of polling EC2 for the instances: while some are starting, and otherwise.
_POLL_SECONDS, _SLOW_POLL_SECONDS = 1.0, 15.0
_WAIT_SECONDS = 0.1
#: How long to wait at the end for EC2's answers to launches: only known instances can be terminated reliably.
_LAUNCH_TIMEOUT_SECONDS = 30.0
#: Backoff between launches of workers that AWS refuses, or that end before they join.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
_CONNECT_TIMEOUT_SECONDS = 5.0
_N_CONSOLE_LINES = 5


@dataclass(frozen=True)
class Settings:
    """Settings of a run in addition to the options of EC2Cluster."""

    #: Value of the tag of the run's instances.
    run_id: str
    #: Timeout of the scheduler and the first worker together.
    start_timeout_seconds: float
    #: Names of root volumes by machine image.
    root_devices: Mapping[str, str]
    #: Settings of Dask for the instances, serialized.
    inherited: str = field(repr=False)
    scheduler: Mapping[str, Any]
    worker: Mapping[str, Any]


def explain_cause(error: BaseException) -> str:
    """Explain the cause of an error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FruitdaskError):
        cause = cause.__cause__
    return str(cause) if cause else explain_aws_error(error) or str(error) or type(error).__name__


@dataclass
class _Launch:
    """The launch of an instance, and its end."""

    instance_type: str
    is_spot: bool
    started: float
    ended: float | None = None


class _Fleet:
    """The instances of a run: requests, launches, and their states on EC2."""

    def __init__(self, start_timeout_seconds: float) -> None:
        self.launches: dict[str, _Launch] = {}
        self.requests: set[asyncio.Future[Any]] = set()
        self.has_asked = False
        self.is_ending = False
        self.changed = asyncio.Event()
        self.error: Exception | None = None
        self._seen: dict[str, dict[str, Any]] = {}
        self._deadline = time.monotonic() + start_timeout_seconds

    @property
    def is_late(self) -> bool:
        """Whether the start has timed out."""
        return time.monotonic() > self._deadline

    def note_request(self, request: "asyncio.Future[Any]") -> None:
        """Record a request for an instance until EC2 has answered it."""
        self.has_asked = True
        self.requests.add(request)

        def finish(done: "asyncio.Future[Any]") -> None:
            self.requests.discard(done)
            if not done.cancelled():
                # Retrieve the error, as possibly nobody awaits the request any more.
                done.exception()

        request.add_done_callback(finish)

    def note_launch(self, instance: "_RunInstance") -> None:
        """Record that EC2 has launched an instance."""
        logger.info("launched %s (%s) as %s", instance.id, instance.instance_type, instance.name)
        self.launches[instance.id] = _Launch(instance.instance_type, instance.spot, time.time())
        self.changed.set()

    def note_end(self, instance_id: str) -> None:
        """Record that an instance has ended."""
        launch = self.launches.get(instance_id)
        if launch is not None and launch.ended is None:
            launch.ended = time.time()
            logger.info("%s has ended", instance_id)

    async def poll(self, client: Any, run_id: str) -> None:
        """Ask EC2 for the states of the run's instances."""
        filters = [{"Name": f"tag:{RUN_TAG}", "Values": [run_id]}]
        before, self._seen = self._seen, {
            instance["InstanceId"]: instance
            async for page in client.get_paginator("describe_instances").paginate(Filters=filters)
            for reservation in page["Reservations"]
            for instance in reservation["Instances"]
        }
        for instance_id, found in self._seen.items():
            if found["State"] != before.get(instance_id, {}).get("State"):
                logger.info("%s is %s", instance_id, self.describe_state(instance_id))
            if self.has_ended(instance_id):
                self.note_end(instance_id)

    def find_public_address(self, instance_id: str) -> str | None:
        """Find the public address of an instance; None if it has none yet."""
        return self._seen.get(instance_id, {}).get("PublicIpAddress")

    def has_ended(self, instance_id: str) -> bool:
        """Whether an instance has ended on EC2; one that EC2 does not list yet has not."""
        return instance_id in self._seen and self._seen[instance_id]["State"]["Name"] not in _ALIVE

    def describe_state(self, instance_id: str) -> str:
        """Describe the state of an instance on EC2."""
        found = self._seen.get(instance_id, {})
        reason = found.get("StateReason", {}).get("Message", "")
        state = found.get("State", {}).get("Name", "not known to EC2 yet")
        return f"{state} ({reason})" if reason else str(state)


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


class _RunInstance(EC2Instance):  # type: ignore[misc]
    """An instance whose launch and end are recorded."""

    cluster: "RunCluster"
    command: str
    name: str
    instance_tags: dict[str, str]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fleet = self.cluster.fleet
        ours = f'env DASK_INTERNAL_INHERIT_CONFIG="{self.cluster.settings.inherited}"'
        self.command = self.command.replace(self.set_env, ours)

    @property
    def id(self) -> str:
        """Its id; empty before its launch."""
        return self.instance["InstanceId"] if self.instance else ""

    async def create_vm(self) -> tuple[str, str | None]:
        """Launch it; a cancellation does not cancel the request, whose outcome would then be unknown."""
        if self.fleet.is_ending:
            raise asyncio.CancelledError
        self._check_user_data()
        # Tags of the launch itself: an instance that is tagged later has a moment without them.
        self.instance_tags = self.instance_tags | {"Name": self.name, "Dask Cluster": self.cluster.uuid}
        request = asyncio.ensure_future(super().create_vm())
        self.fleet.note_request(request)
        addresses: tuple[str, str | None] = await asyncio.shield(request)
        return addresses

    async def configure_vm(self, client: Any) -> tuple[str, str | None]:
        """Record its launch."""
        self.fleet.note_launch(self)
        return self.instance["PrivateIpAddress"], None

    async def destroy_vm(self) -> None:
        """Terminate it, if it exists; if that fails, it is terminated by its tag at the end of the run."""
        if not self.id:
            return
        try:
            await super().destroy_vm()
        except (BotoCoreError, ClientError) as error:
            logger.warning("%s was not terminated: %s", self.id, explain_aws_error(error) or error)
        else:
            self.fleet.note_end(self.id)

    async def describe(self) -> str:
        """Describe its state, with the end of its console output."""
        state = self.fleet.describe_state(self.id)
        described = f"instance {self.id} ({self.instance_type}, image {self.docker_image}, {self.ami}) is {state}"
        lines = []
        with contextlib.suppress(BotoCoreError, ClientError):
            async with self.cluster.open_ec2() as client:
                answer = await client.get_console_output(InstanceId=self.id)
            lines = [line.strip() for line in answer.get("Output", "").splitlines() if line.strip()]
        return f"{described}; its console ends: {' | '.join(lines[-_N_CONSOLE_LINES:])}" if lines else described

    def _check_user_data(self) -> None:
        """Refuse user data that is too large for EC2, and name the large options."""
        n_bytes = len(self.cluster.render_process_cloud_init(self).encode())
        if n_bytes > _MAX_USER_DATA_BYTES:
            options = ("env_vars", "extra_bootstrap", "docker_args")
            sizes = {name: len(json.dumps(getattr(self, name))) for name in options}
            largest = ", ".join(f"cluster.{name}: {size:,}" for name, size in sizes.items() if size > 1000)
            raise ClusterStartError(
                f"the user data of an instance would have {n_bytes:,} bytes, but EC2 accepts {_MAX_USER_DATA_BYTES:,} "
                f"({largest}); move large parts into cluster.docker_image"
            )


class _RunScheduler(_RunInstance, EC2Scheduler):  # type: ignore[misc]
    """The instance of the scheduler, which must start in time."""

    def __init__(self, *args: Any, scheduler_options: Mapping[str, Any], **options: Any) -> None:
        arguments = dict(scheduler_options)
        has_dashboard = arguments.pop("dashboard", "dashboard_address" in arguments)
        if not has_dashboard:
            # Its port would still serve logs and metrics.
            arguments["dashboard_address"] = "127.0.0.1:0"
        super().__init__(*args, scheduler_options=arguments, **options)
        if not has_dashboard:
            self.command += " --no-dashboard"

    async def configure_vm(self, client: Any) -> tuple[str, str | None]:
        """Wait for the public address, for the client; workers use the private one, as the security group requires."""
        private, _ = await super().configure_vm(client)
        if self.use_private_ip:
            return private, None
        while not (public := self.fleet.find_public_address(self.id)):
            await self._check()
            await asyncio.sleep(_WAIT_SECONDS)
        return private, public

    async def wait_for_scheduler(self) -> None:
        """Wait until the scheduler accepts connections."""
        host, _, port = (self.external_address or self.address).rpartition("/")[2].partition(":")
        logger.info("waiting for the scheduler at %s:%s", host, port)
        while not await _can_connect(host, int(port)):
            await self._check()
            await asyncio.sleep(_WAIT_SECONDS)

    async def _check(self) -> None:
        """Raise an error if the scheduler cannot start any more."""
        self.cluster.check()
        if self.fleet.has_ended(self.id):
            raise ClusterStartError(
                f"the scheduler ended before it started to listen: {await self.describe()}; check that instances can "
                "pull cluster.docker_image, and that it contains Dask"
            )
        if self.fleet.is_late:
            timeout = self.cluster.settings.start_timeout_seconds
            raise ClusterStartError(
                f"the scheduler did not start within cluster.start_timeout ({timeout:g} s): {await self.describe()}; "
                f"check that the security groups {', '.join(self.security_groups)} admit this machine (port "
                f"{self.port}), and that the subnet {self.subnet_id} reaches the internet"
            )


class _RunWorker(_RunInstance, EC2Worker):  # type: ignore[misc]
    """The instance of a worker, which may fail without ending the run."""

    def __init__(self, *args: Any, name: str, **options: Any) -> None:
        super().__init__(*args, **options)
        # The scheduler retires workers by the name that the cluster gives them.
        self.command = self.command.replace(self.name, name)
        self.name = name
        self.has_joined = False
        self.failure: str | None = None

    async def start(self) -> None:
        """Launch it; the cluster retries if AWS refuses."""
        try:
            await super().start()
        except Exception as error:
            self.failure = explain_cause(error)
            logger.warning("worker %s: %s", self.name, self.failure)
            await ProcessInterface.start(self)

    async def close(self) -> None:
        """Retire it, so that the scheduler moves its results to other workers, and terminate it."""
        if self.name in self.cluster.observed and not self.fleet.is_ending:
            try:
                await self.cluster.scheduler_comm.retire_workers(names=[self.name], close_workers=True, remove=True)
            except OSError as error:
                logger.warning("worker %s could not be retired: %s", self.name, error)
        await super().close()


class RunCluster(EC2Cluster):  # type: ignore[misc]
    """The cluster of a run: constructed on its event loop, launched, and ended."""

    def __init__(self, *, settings: Settings, **options: Any) -> None:
        super().__init__(**options)
        self.settings = settings
        self.fleet = _Fleet(settings.start_timeout_seconds)
        self.boto_session = _Session(settings.root_devices)
        self.security.require_encryption = True
        self._tasks: list[asyncio.Task[None]] = []
        self._is_up = False
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._retry_at = 0.0

    async def launch(self) -> None:
        """Launch the scheduler, then the workers, and wait for the first of them."""
        self._tasks = [asyncio.create_task(self._monitor()), asyncio.create_task(self._launch())]
        await self._tasks[1]

    async def end(self) -> None:
        """Stop launching, wait for EC2's answers to requests, and close all connections."""
        logger.info("ending run %s", self.settings.run_id)
        self.fleet.is_ending = True
        for task in self._tasks:
            task.cancel()
        if going := {*self._tasks, *self.fleet.requests}:
            await asyncio.wait(going, timeout=_LAUNCH_TIMEOUT_SECONDS)
        await self._close()

    def list_usage(self) -> list[Usage]:
        """List the running times of instances, so far or, after the end, in total."""
        now = time.time()
        return [
            Usage(launch.instance_type, launch.is_spot, self.region, (launch.ended or now) - launch.started)
            for launch in list(self.fleet.launches.values())
        ]

    def list_running(self) -> list[str]:
        """List the instances that have not ended, as far as is known."""
        return [instance_id for instance_id, launch in self.fleet.launches.items() if launch.ended is None]

    def check(self) -> None:
        """Raise the error that prevents monitoring, because nothing would end the wait for instances."""
        if self.fleet.error is not None:
            raise self.fleet.error
        if self._tasks[0].done():
            self._tasks[0].result()

    def open_ec2(self) -> Any:
        """Open a client of EC2."""
        return self.boto_session.create_client("ec2", region_name=self.region)

    def _new_worker_name(self, _: int) -> str:
        """Name a worker uniquely: the scheduler may still remember one that has ended."""
        return f"dask-{self.uuid}-worker-{secrets.token_hex(4)}"

    def _log(self, log: str) -> None:
        """Log what dask-cloudprovider would print."""
        logger.info("%s", log)

    async def _start(self) -> None:
        """Start the scheduler, without VMCluster's warning that this takes more than ten seconds."""
        self.scheduler_spec = {"cls": _RunScheduler, "options": self.scheduler_options | self.settings.scheduler}
        self.new_spec = {"cls": _RunWorker, "options": self.worker_options | self.settings.worker}
        self.worker_spec = {self._new_worker_name(n): self.new_spec for n in range(self._n_workers)}
        await SpecCluster._start(self)

    async def _launch(self) -> None:
        """Start everything, and wait for the first worker."""
        await self._start()
        await self._correct_state()
        while not self.observed:
            self.check()
            failures = [worker.failure for worker in self.workers.values()]
            if failures and all(failures):
                raise ClusterStartError(f"no worker could be started: {failures[-1]}")
            if self.fleet.is_late:
                raise ClusterStartError(await self._describe_lateness())
            await asyncio.sleep(_WAIT_SECONDS)
        self._is_up = True

    async def _describe_lateness(self) -> str:
        """Describe that no worker has started in time, and what to check."""
        worker = next(worker for worker in self.workers.values() if not worker.failure)
        return (
            f"no worker started within cluster.start_timeout ({self.settings.start_timeout_seconds:g} s): "
            f"{await worker.describe()}; check that instances of the security groups "
            f"{', '.join(worker.security_groups)} may reach each other"
        )

    async def _close(self) -> None:
        """Close the connections; all instances are terminated together, by their tag."""
        if self.status not in (Status.closing, Status.closed):
            await Cluster._close(self)

    def _update_worker_status(self, op: str, msg: Any) -> None:
        """Update the state of a worker, and poll EC2 at once."""
        super()._update_worker_status(op, msg)
        self.fleet.changed.set()

    async def _watch_worker_status(self, comm: Any) -> None:
        """Follow the workers until the connection ends, and then poll EC2 for the scheduler at once."""
        await super()._watch_worker_status(comm)
        if not self.fleet.is_ending:
            logger.warning("the connection to the scheduler is lost")
            self.fleet.changed.set()

    async def _monitor(self) -> None:
        """Poll EC2 for the instances, and replace workers that have ended."""
        async with self.open_ec2() as client:
            while True:
                self.fleet.changed.clear()
                await self._poll(client)
                is_over = self._is_up and self.fleet.has_ended(self.scheduler.id)
                if self._is_up and not is_over:
                    self._replace()
                is_calm = is_over or (self._is_up and self.plan == self.observed)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.fleet.changed.wait(), _SLOW_POLL_SECONDS if is_calm else _POLL_SECONDS)

    async def _poll(self, client: Any) -> None:
        """Poll EC2 for the instances, and record which workers have joined and ended."""
        try:
            await self.fleet.poll(client, self.settings.run_id)
            self.fleet.error = None
        except (BotoCoreError, ClientError) as error:
            # AWS would refuse again, but the network may recover.
            self.fleet.error = error if isinstance(error, ClientError) else None
            logger.warning("cannot list the instances: %s", explain_aws_error(error) or error)
        for name, worker in self.workers.items():
            if not worker.has_joined and name in self.observed:
                worker.has_joined = True
                self._pause_seconds = _FIRST_PAUSE_SECONDS
            if not worker.failure and self.fleet.has_ended(worker.id):
                worker.failure = f"{worker.id} is {self.fleet.describe_state(worker.id)}"
                logger.warning("worker %s: %s", name, worker.failure)

    def _replace(self) -> None:
        """Replace failed workers: those that had joined at once, those that never joined after increasing pauses."""
        failed = {name: worker for name, worker in self.workers.items() if worker.failure}
        due = {name for name, worker in failed.items() if worker.has_joined}
        now = time.monotonic()
        if failed.keys() - due and now >= self._retry_at:
            due = set(failed)
            self._retry_at = now + self._pause_seconds
            self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        for name in due:
            del self.workers[name]
            if self.worker_spec.pop(name, None):
                self.worker_spec.update(self.new_worker_spec())
        # Dask closes a worker that the scheduler has lost, and leaves it in the specification.
        if due or self.worker_spec.keys() - self.workers.keys():
            self._correct_state()


async def _can_connect(host: str, port: int) -> bool:
    """Whether a port accepts connections."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _CONNECT_TIMEOUT_SECONDS)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
