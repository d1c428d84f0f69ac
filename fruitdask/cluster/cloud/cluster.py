"""dask-cloudprovider's clusters of machines, with deadlines, replacement of workers, and a complete end."""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dask_cloudprovider.generic.vmcluster import VMCluster, VMInterface
from distributed.core import Status
from distributed.deploy.cluster import Cluster
from distributed.deploy.spec import ProcessInterface, SpecCluster

from fruitdask.cluster.cloud.fleet import Fleet, State
from fruitdask.cluster.cloud.prices import Usage
from fruitdask.cluster.tolerant import Tolerant
from fruitdask.core.aws import explain_aws_error
from fruitdask.core.azure import explain_azure_error
from fruitdask.errors import ClusterStartError, FruitdaskError

logger = logging.getLogger(__name__)

#: Interval of polling the cloud for the machines while none is starting.
_SLOW_POLL_SECONDS = 15.0
_WAIT_SECONDS = 0.1
#: How long to wait at the end for the cloud's answers to launches: only known machines can be ended reliably.
_LAUNCH_TIMEOUT_SECONDS = 30.0
#: Backoff between launches of workers that the cloud refuses, or that end before they join.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
_CONNECT_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Settings:
    """Settings of a run in addition to the options of dask-cloudprovider's cluster."""

    #: Value of the tag of the run's machines.
    run_id: str
    #: Timeout of the scheduler and the first worker together.
    start_timeout_seconds: float
    #: Settings of Dask for the machines, serialized.
    inherited: str = field(repr=False)
    scheduler: Mapping[str, Any]
    worker: Mapping[str, Any]


def explain_cause(error: BaseException) -> str:
    """Explain the cause of an error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FruitdaskError):
        cause = cause.__cause__
    return str(cause) if cause else explain_cloud_error(error)


def explain_cloud_error(error: BaseException) -> str:
    """Explain an error of a cloud."""
    return explain_aws_error(error) or explain_azure_error(error) or str(error) or type(error).__name__


class Machine(VMInterface):  # type: ignore[misc]
    """A machine whose launch and end are recorded."""

    cluster: "CloudCluster"
    command: str
    name: str
    #: Its id in the cloud; empty before its launch.
    id: str
    #: Its instance type or size.
    size: str
    set_env: str
    #: What to check if nothing can connect to it.
    advice: str

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fleet = self.cluster.fleet
        ours = f'env DASK_INTERNAL_INHERIT_CONFIG="{self.cluster.settings.inherited}"'
        self.command = self.command.replace(self.set_env, ours)

    @property
    def state(self) -> State:
        """Its state in the cloud."""
        return self.fleet.find_state(self.id)

    async def describe(self) -> str:
        """Describe its state, with its last output."""
        raise NotImplementedError

    async def end_vm(self) -> None:
        """End it in the cloud."""
        await super().destroy_vm()

    async def destroy_vm(self) -> None:
        """End it, if it exists; if that fails, it is ended by its tag at the end of the run."""
        if not self.id:
            return
        try:
            await self.end_vm()
        except self.cluster.errors as error:
            logger.warning("%s was not terminated: %s", self.id, explain_cloud_error(error))
        else:
            self.fleet.note_end(self.id)

    def check_start_data(self) -> None:
        """Refuse data for its start that are too large for the cloud, and name the large options."""
        kind, limit = self.cluster.start_data
        n_bytes = len(self.cluster.render_process_cloud_init(self).encode())
        if n_bytes > limit:
            options = ("env_vars", "extra_bootstrap", "docker_args")
            sizes = {name: len(json.dumps(getattr(self, name))) for name in options}
            largest = ", ".join(f"cluster.{name}: {size:,}" for name, size in sizes.items() if size > 1000)
            raise ClusterStartError(
                f"the {kind} would have {n_bytes:,} bytes, but {self.cluster.cloud} accepts {limit:,} ({largest}); "
                "move large parts into cluster.docker_image"
            )


class SchedulerMachine(Machine):
    """The machine of the scheduler, which must start in time."""

    address: str
    external_address: str | None

    def __init__(self, *args: Any, scheduler_options: Mapping[str, Any], **options: Any) -> None:
        arguments = dict(scheduler_options)
        has_dashboard = arguments.pop("dashboard", "dashboard_address" in arguments)
        if not has_dashboard:
            # Its port would still serve logs and metrics.
            arguments["dashboard_address"] = "127.0.0.1:0"
        super().__init__(*args, scheduler_options=arguments, **options)
        if not has_dashboard:
            self.command += " --no-dashboard"

    async def wait_for_scheduler(self) -> None:
        """Wait until the scheduler accepts connections."""
        host, _, port = (self.external_address or self.address).rpartition("/")[2].partition(":")
        logger.info("waiting for the scheduler at %s:%s", host, port)
        while not await _can_connect(host, int(port)):
            await self.check()
            await asyncio.sleep(_WAIT_SECONDS)

    async def check(self) -> None:
        """Raise an error if the scheduler cannot start any more."""
        self.cluster.check()
        if not self.state.is_alive:
            raise ClusterStartError(
                f"the scheduler ended before it started to listen: {await self.describe()}; check that it can pull "
                "cluster.docker_image, and that this contains Dask"
            )
        if self.fleet.is_late:
            timeout = self.cluster.settings.start_timeout_seconds
            raise ClusterStartError(
                f"the scheduler did not start within cluster.start_timeout ({timeout:g} s): {await self.describe()}; "
                f"{self.advice}"
            )


class WorkerMachine(Machine):
    """The machine of a worker, which may fail without ending the run."""

    def __init__(self, *args: Any, name: str, **options: Any) -> None:
        super().__init__(*args, **options)
        # The scheduler retires workers by the name that the cluster gives them.
        self.command = self.command.replace(self.name, name)
        self.name = name
        self.has_joined = False
        self.failure: str | None = None

    async def start(self) -> None:
        """Launch it; the cluster retries if the cloud refuses."""
        try:
            await super().start()
        except Exception as error:
            self.failure = explain_cause(error)
            logger.warning("worker %s: %s", self.name, self.failure)
            await ProcessInterface.start(self)

    async def close(self) -> None:
        """Retire it, so that the scheduler moves its results to other workers, and end it."""
        if self.name in self.cluster.observed and not self.fleet.is_ending:
            try:
                await self.cluster.scheduler_comm.retire_workers(names=[self.name], close_workers=True, remove=True)
            except OSError as error:
                logger.warning("worker %s could not be retired: %s", self.name, error)
        await super().close()


class CloudCluster(Tolerant, VMCluster):  # type: ignore[misc]
    """The cluster of a run: constructed on its event loop, launched, and ended. Subclasses know their cloud."""

    #: Name of the cloud in messages.
    cloud: ClassVar[str]
    #: Name of the data with which a machine starts, and how many bytes of them the cloud accepts.
    start_data: ClassVar[tuple[str, int]]
    #: Classes of the machines of the scheduler and of the workers.
    machines: ClassVar[tuple[type[SchedulerMachine], type[WorkerMachine]]]
    #: Errors of the cloud, and those of them that a retry does not help.
    errors: ClassVar[tuple[type[Exception], ...]]
    final_errors: ClassVar[tuple[type[Exception], ...]]
    #: Interval of polling the cloud for the machines while some are starting.
    poll_seconds: ClassVar[float] = 1.0

    def __init__(self, *, settings: Settings, **options: Any) -> None:
        super().__init__(**options)
        self.settings = settings
        self.fleet = Fleet(settings.start_timeout_seconds)
        self.security.require_encryption = True
        self._tasks: list[asyncio.Task[None]] = []
        self._is_up = False
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._retry_at = 0.0

    @property
    def place(self) -> str:
        """The region or location of the machines."""
        raise NotImplementedError

    @property
    def cleanup_command(self) -> str:
        """The command that terminates machines that may still run."""
        raise NotImplementedError

    def terminate(self) -> list[str]:
        """End the machines of the run by their tag, and list them."""
        raise NotImplementedError

    def open_states(self) -> AbstractAsyncContextManager[Callable[[], Awaitable[Mapping[str, State]]]]:
        """Open a function that asks the cloud for the states of the run's machines."""
        raise NotImplementedError

    async def launch(self) -> None:
        """Launch the scheduler, then the workers, and wait for the first of them."""
        self._tasks = [asyncio.create_task(self._monitor()), asyncio.create_task(self._launch())]
        await self._tasks[1]

    async def end(self) -> None:
        """Stop launching, wait for the cloud's answers to requests, and close all connections."""
        logger.info("ending run %s", self.settings.run_id)
        self.fleet.is_ending = True
        for task in self._tasks:
            task.cancel()
        if going := {*self._tasks, *self.fleet.requests}:
            await asyncio.wait(going, timeout=_LAUNCH_TIMEOUT_SECONDS)
        await self._close()

    def list_usage(self) -> list[Usage]:
        """List the running times of machines, so far or, after the end, in total."""
        now = time.time()
        return [
            Usage(launch.size, launch.is_spot, self.place, (launch.ended or now) - launch.started)
            for launch in list(self.fleet.launches.values())
        ]

    def list_running(self) -> list[str]:
        """List the machines that have not ended, as far as is known."""
        return self.fleet.list_running()

    def check(self) -> None:
        """Raise the error that has stopped monitoring: otherwise the wait for machines would never end."""
        if self.fleet.error is not None:
            raise self.fleet.error
        if self._tasks[0].done():
            self._tasks[0].result()

    def _new_worker_name(self, _: int) -> str:
        """Name a worker uniquely: the scheduler may still remember one that has ended."""
        return f"dask-{self.uuid}-worker-{secrets.token_hex(4)}"

    def _log(self, log: str) -> None:
        """Log what dask-cloudprovider would print."""
        logger.info("%s", log)

    async def _start(self) -> None:
        """Start the scheduler, without VMCluster's warning that this takes more than ten seconds."""
        scheduler_class, worker_class = self.machines
        self.scheduler_spec = {"cls": scheduler_class, "options": self.scheduler_options | self.settings.scheduler}
        self.new_spec = {"cls": worker_class, "options": self.worker_options | self.settings.worker}
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
        """Say that no worker has started in time, and what to check."""
        worker = next(worker for worker in self.workers.values() if not worker.failure)
        return (
            f"no worker started within cluster.start_timeout ({self.settings.start_timeout_seconds:g} s): "
            f"{await worker.describe()}; {worker.advice}"
        )

    async def _close(self) -> None:
        """Close the connections; all machines are ended together, by their tag."""
        if self.status not in (Status.closing, Status.closed):
            await Cluster._close(self)

    def _update_worker_status(self, op: str, msg: Any) -> None:
        """Update the state of a worker, and poll the cloud at once."""
        super()._update_worker_status(op, msg)
        self.fleet.changed.set()

    async def _watch_worker_status(self, comm: Any) -> None:
        """Follow the workers until the connection ends, and then poll the cloud for the scheduler at once."""
        await super()._watch_worker_status(comm)
        # From now on, nothing reports lost workers.
        self.scheduler_info["workers"].clear()
        if not self.fleet.is_ending:
            logger.warning("the connection to the scheduler is lost")
            self.fleet.changed.set()

    async def _monitor(self) -> None:
        """Poll the cloud for the machines, and replace workers that have ended."""
        async with self.open_states() as list_states:
            while True:
                self.fleet.changed.clear()
                await self._poll(list_states)
                is_over = self._is_up and not self.scheduler.state.is_alive
                if self._is_up and not is_over:
                    self._replace()
                is_calm = is_over or (self._is_up and self.plan == self.observed)
                with contextlib.suppress(TimeoutError):
                    pause = _SLOW_POLL_SECONDS if is_calm else self.poll_seconds
                    await asyncio.wait_for(self.fleet.changed.wait(), pause)

    async def _poll(self, list_states: Callable[[], Awaitable[Mapping[str, State]]]) -> None:
        """Poll the cloud for the machines, and record which workers have joined and ended."""
        try:
            self.fleet.note_states(await list_states())
            self.fleet.error = None
        except self.errors as error:
            # The network may recover; a refusal by the cloud is final.
            self.fleet.error = error if isinstance(error, self.final_errors) else None
            logger.warning("cannot list the machines: %s", explain_cloud_error(error))
        for name, worker in self.workers.items():
            if not worker.has_joined and name in self.observed:
                worker.has_joined = True
                self._pause_seconds = _FIRST_PAUSE_SECONDS
            if not worker.failure and not worker.state.is_alive:
                worker.failure = f"{worker.id} is {worker.state.description}"
                logger.warning("worker %s: %s", name, worker.failure)

    def _replace(self) -> None:
        """Replace failed workers: at once if they had joined, otherwise after increasing pauses."""
        failed = {name: worker for name, worker in self.workers.items() if worker.failure}
        due = {name for name, worker in failed.items() if worker.has_joined}
        now = time.monotonic()
        if failed.keys() - due and now >= self._retry_at:
            due = set(failed)
            self._retry_at = now + self._pause_seconds
            self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        for name in due:
            self._discard(self.workers.pop(name))
            if self.worker_spec.pop(name, None):
                self.worker_spec.update(self.new_worker_spec())
        # Dask closes a worker that the scheduler has lost, and leaves it in the specification.
        if due or self.worker_spec.keys() - self.workers.keys():
            self._correct_state()

    def _discard(self, worker: WorkerMachine) -> None:
        """Give up a failed worker, whose machine has ended."""


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
