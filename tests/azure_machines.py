"""The virtual machines of the loopback Azure: they boot, run their container, and end as on Azure."""

import base64
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

from machines import Container, build_environment, localize, read_plan

if TYPE_CHECKING:
    from loopback_azure import LoopbackAzure

#: How long a container may take to end after SIGTERM.
_GRACE_SECONDS = 0.05


class Machine:
    """A virtual machine: starting, running, stopped (which still costs money) or deleted."""

    def __init__(self, cloud: "LoopbackAzure", path: str, body: dict[str, Any], address: str) -> None:
        self.cloud, self.path, self.name, self.address = cloud, path, path.rsplit("/", 1)[1], address
        self.body, self.power, self.was_evicted = body, "starting", False
        self.custom_data = base64.b64decode(body["properties"]["osProfile"].get("customData", "")).decode()
        self.plan = read_plan(self.custom_data)
        self.folder = cloud.folder / self.name
        self.log_path = self.folder / "log.txt"
        self.has_identity = bool(body.get("identity", {}).get("userAssignedIdentities"))
        self._over = threading.Event()
        self._container: Container | None = None
        for name in ("cwd", "home", "tmp"):
            (self.folder / name).mkdir(parents=True)
        self._thread = threading.Thread(target=self._live, name=self.name, daemon=True)
        self._thread.start()

    @property
    def is_spot(self) -> bool:
        """Whether Azure may evict the machine."""
        return self.body["properties"].get("priority") == "Spot"

    def delete(self, *, was_evicted: bool = False) -> None:
        """End the machine."""
        self.was_evicted = was_evicted
        self._set_power("deleted")
        self._over.set()

    def join(self) -> None:
        """Wait until all processes of the machine have ended."""
        self._thread.join(30)

    def log(self) -> str:
        """Read the output of the machine."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _set_power(self, power: str) -> None:
        with self.cloud.changed:
            if self.power != "deleted":
                self.power = power
            self.cloud.changed.notify_all()

    def _live(self) -> None:
        """Boot, wait for the end of the machine, and clean up."""
        self._set_power("running")
        if self.plan.role in self.cloud.faults.never_boots:
            self._over.wait()
        else:
            self._boot()
        if self._container is not None:
            if not (self.was_evicted or self.cloud.is_closing):
                self._container.stop(_GRACE_SECONDS)
            self._container.kill()
            self._container.close()
        with self.cloud.changed:
            self.cloud.changed.notify_all()

    def _boot(self) -> None:
        """Execute the custom data until the machine is deleted."""
        if self.plan.problem or self.plan.image in self.cloud.faults.unpullable:
            self.log_path.write_text(f"docker: cannot pull the image {self.plan.image!r} {self.plan.problem}\n")
        elif self.plan.command:
            self._container = Container(
                localize(self.plan.command, self.address),
                folder=self.folder / "cwd",
                log=self.log_path,
                environment=build_environment(self.folder) | self.plan.variables,
            )
            while not self._over.is_set() and not self._container.wait(0.02):
                if self.cloud.lifetime_is_over.is_set() and self.plan.lifetime_minutes is not None:
                    break
        if not self._over.is_set() and self.plan.shuts_down:
            self._end_itself()

    def _end_itself(self) -> None:
        """Run the script in the custom data that deletes the machine; if it fails, the shell only stops the machine."""
        [script] = self.plan.files.values()
        (self.folder / "end.py").write_text(script.replace("(1, 5, 10, 30, 60)", "(0,)"))
        environment = build_environment(self.folder) | self.cloud.build_proxy(self.name)
        command = [sys.executable, str(self.folder / "end.py")]
        done = subprocess.run(command, env=environment, cwd=self.folder / "cwd", capture_output=True, text=True)
        with self.log_path.open("a") as log:
            log.write(done.stdout + done.stderr)
        if done.returncode:
            self._set_power("stopped")
        self._over.wait()
