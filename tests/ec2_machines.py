"""The instances of the loopback EC2: they boot, run their container, and end as on EC2."""

import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from machines import Container, build_environment, localize, read_plan
from moto.ec2.models.instances import Instance, InstanceState, StateReason

if TYPE_CHECKING:
    from loopback_ec2 import LoopbackEC2

_STATE_CODES = {"pending": 0, "running": 16, "shutting-down": 32, "terminated": 48, "stopping": 64, "stopped": 80}
PENDING = InstanceState("pending", _STATE_CODES["pending"])
_REASONS = {
    "user": ("Client.UserInitiatedShutdown", "User initiated shutdown"),
    "instance": ("Client.InstanceInitiatedShutdown", "Instance initiated shutdown"),
    "spot": ("Server.SpotInstanceTermination", "Spot instance termination"),
}


@dataclass(frozen=True)
class LoopbackInstance:
    """A snapshot of an instance."""

    id: str
    role: str
    instance_type: str
    is_spot: bool
    tags: dict[str, str]
    user_data: str
    address: str
    launched_at: datetime
    state: str
    state_reason: str
    image: str


class Machine:
    """Runs an instance of moto, from boot to termination."""

    def __init__(self, cloud: "LoopbackEC2", instance: Instance) -> None:
        self.cloud = cloud
        self.instance = instance
        self.user_data = instance.user_data.decode() if instance.user_data else ""
        self.plan = read_plan(self.user_data)
        self.folder = cloud.folder / instance.id
        self.ending: str | None = None
        self.container: Container | None = None
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._live, name=instance.id, daemon=True)]

    @property
    def log_path(self) -> Path:
        """The file with the output of its processes."""
        return self.folder / "log.txt"

    def describe(self) -> LoopbackInstance:
        """Take a snapshot of the instance."""
        instance = self.instance
        return LoopbackInstance(
            id=instance.id,
            role=self.plan.role,
            instance_type=instance.instance_type,
            is_spot=instance.lifecycle == "spot",
            tags={tag["key"]: tag["value"] for tag in instance.get_tags()},
            user_data=self.user_data,
            address=instance.private_ip or "",
            launched_at=instance.launch_time.replace(tzinfo=UTC),
            state=instance.state,
            state_reason=instance.state_reason.code,
            image=self.plan.image,
        )

    def power_on(self) -> None:
        """Start the instance, unless it has been terminated already."""
        with self.cloud.changed:
            if self.ending is None:
                self.folder.mkdir()
                self._threads[0].start()

    def power_off(self, ending: str) -> None:
        """End the instance, unless it is already ending for another reason."""
        with self.cloud.changed:
            if self.ending is not None:
                return
            self.ending = ending
            if ending == "instance" and self.instance.instance_initiated_shutdown_behavior == "stop":
                self._set_state("stopping")
            else:
                self.cloud.originals["terminate"](self.instance)
                self._set_state("shutting-down")
            for nic in self.instance.nics.values():
                nic.public_ip = None
        self._over.set()

    def join(self, timeout: float) -> None:
        """Wait until its threads have ended."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout)

    def _set_state(self, name: str) -> None:
        """Set the state in moto, and notify all waiting threads."""
        with self.cloud.changed:
            self.instance._state = InstanceState(name, _STATE_CODES[name])
            if self.ending is not None:
                code, message = _REASONS[self.ending]
                self.instance.state_reason = StateReason(f"{code}: {message}", code)
            self.cloud.changed.notify_all()

    def _live(self) -> None:
        """Boot, wait for the end of the instance, and clean up."""
        with self.cloud.changed:
            if self.ending is None:
                self._set_state("running")
                if self.cloud.wants_public.get(self.instance.id):
                    self.instance.nics[0].public_ip = self.instance.private_ip
        if not self._over.wait(self.cloud.faults.boot_delay_seconds):
            self._boot()
        self._clean_up()

    def _boot(self) -> None:
        """Execute the user data."""
        if self.plan.role in self.cloud.faults.never_boots:
            self._over.wait()
            return
        if self.plan.problem:
            self.log_path.write_text(self.plan.problem + "\n")
        self._run_docker()
        minutes = self.plan.lifetime_minutes
        if not self._over.wait(None if minutes is None else minutes * self.cloud.seconds_per_minute):
            self.power_off("instance")

    def _run_docker(self) -> None:
        """Run the command of the container, unless its image cannot be pulled."""
        if self.plan.image in self.cloud.faults.unpullable:
            self.log_path.write_text(f"docker: cannot pull the image '{self.plan.image}'\n")
        elif self.plan.command:
            self.container = self._start()
            monitor = threading.Thread(target=self._monitor, args=(self.container,), name=self.instance.id, daemon=True)
            self._threads.append(monitor)
            monitor.start()
            return
        if self.plan.shuts_down:
            self.power_off("instance")

    def _start(self) -> Container:
        """Start the command of the container in an empty folder."""
        for name in ("cwd", "home", "tmp"):
            (self.folder / name).mkdir()
        return Container(
            localize(self.plan.command, self.instance.private_ip or ""),
            folder=self.folder / "cwd",
            log=self.log_path,
            environment=self._build_environment(),
        )

    def _build_environment(self) -> dict[str, str]:
        """Build the environment of the container; variables in the user data take precedence."""
        environment = build_environment(self.folder)
        environment |= self.cloud.build_environment(self.instance.id, has_credentials=self._has_credentials())
        return environment | self.plan.variables

    def _has_credentials(self) -> bool:
        """Whether the metadata service would return credentials."""
        profiles = self.instance.ec2_backend.iam_instance_profile_associations
        return not self.cloud.needs_profile or self.instance.id in profiles

    def _monitor(self, container: Container) -> None:
        """Wait until the container ends, and continue as cloud-init would."""
        container.wait()
        container.kill()
        if self.plan.shuts_down:
            self.power_off("instance")

    def _clean_up(self) -> None:
        """End all processes of the instance."""
        if self.container is not None:
            if self.ending != "spot" and not self.cloud.is_closing:
                self.container.stop(self.cloud.grace_seconds)
            self.container.kill()
            self._threads[-1].join()
            self.container.close()
        with self.cloud.changed:
            self._set_state("stopped" if self.instance.state == "stopping" else "terminated")
