"""Shared parts of the loopback clouds: the commands in the user data of a machine, its address, and its processes.

A container is a process of this machine, with this interpreter instead of the image's; see `machine_host.py`.
"""

import contextlib
import functools
import json
import os
import random
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import fruitdask

SCHEDULER_PORT = 8786

# Docker's other options are assumed to take a value.
_DOCKER_FLAGS = set("--rm --init --privileged --read-only --detach --interactive --tty -d -i -t -it".split())
_PYTHONS = {"python", "python3"}


@dataclass
class Plan:
    """What an instance does, according to its user data."""

    role: str = "other"
    image: str = ""
    command: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    lifetime_minutes: float | None = None
    shuts_down: bool = False
    files: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def read_plan(user_data: str) -> Plan:
    """Read cloud-config like cloud-init, which runs nothing if it cannot parse all of it."""
    if not user_data.startswith("#cloud-config"):
        return Plan(problem="the user data is not cloud-config")
    try:
        loaded = yaml.safe_load(user_data) or {}
    except yaml.YAMLError as error:
        return Plan(problem=f"cloud-init cannot read the user data: {error}")
    lines = loaded.get("runcmd") or []
    if not all(isinstance(line, str | list) for line in lines):
        return Plan(problem="cloud-init runs only strings and lists of strings")
    plan = Plan(files={file["path"]: file["content"] for file in loaded.get("write_files") or []})
    for line in lines:
        _read_line(plan, line if isinstance(line, str) else shlex.join(line))
        if plan.problem:
            break  # A shell runs nothing of a script that it cannot parse, not even the shutdown at its end.
    return plan


def _read_line(plan: Plan, line: str) -> None:
    """Read a command that cloud-init runs."""
    if re.match(r"\s*(sudo\s+)?docker\s+run\s", line):
        _read_docker(plan, _split_in_shell(line))
    elif seconds := re.match(r"systemd-run --on-active=(\d+)\s", line):
        plan.lifetime_minutes = int(seconds[1]) / 60
    elif minutes := re.search(r"\bshutdown\s+-[hP]\s+\+(\d+)", line):
        plan.lifetime_minutes = float(minutes[1])
    elif re.search(r"\bshutdown\s+-[hP]\s+now\b", line):
        plan.shuts_down = True


def _split_in_shell(line: str) -> list[str]:
    """Parse docker's arguments with a shell that can run no other program."""
    script = 'sudo() { "$@"; }\ndocker() { printf "%s\\0" "$@"; }\n' + line
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        env={"PATH": "/nonexistent"},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
    )
    return done.stdout.decode().split("\0")[:-1]


def _read_docker(plan: Plan, arguments: list[str]) -> None:
    """Read variables, image and command from docker's arguments."""
    rest = iter(arguments[1:])
    for argument in rest:
        if not argument.startswith("-"):
            plan.image = argument
            break
        if "=" in argument or argument in _DOCKER_FLAGS:
            continue
        value = next(rest, "")
        if argument in ("-e", "--env"):
            name, _, content = value.partition("=")
            plan.variables[name] = content
    plan.command = list(rest)
    if not plan.image:
        plan.problem = "the shell or docker cannot read the docker run line"
    if plan.command[:1] == ["env"]:
        while plan.command[1:] and "=" in plan.command[1]:
            name, _, content = plan.command.pop(1).partition("=")
            plan.variables[name] = content
        plan.command = plan.command[1:] or plan.command
    plan.role = _find_role(plan.command)


def _find_role(command: list[str]) -> str:
    """Find the role of an instance by its command."""
    if not command:
        return "other"
    text = " ".join(command[:3])
    return "scheduler" if "dask_scheduler" in text or "dask-scheduler" in text else "worker"


def localize(command: list[str], address: str) -> list[str]:
    """Make a command use this interpreter, and listen on one address only."""
    command = [sys.executable if part in _PYTHONS and not index else part for index, part in enumerate(command)]
    for index, part in enumerate(command[:-1]):
        if part == "--dashboard-address" and command[index + 1].startswith(":"):
            command[index + 1] = address + command[index + 1]
        if part == "--spec":
            command[index + 1] = _add_host(command[index + 1], address)
    program = " ".join(command[:3])
    if re.search(r"dask[-_](cuda[-_])?(worker|scheduler)", program) and "--host" not in command:
        command += ["--host", address]
    if re.search(r"dask[-_](worker|scheduler)", program) and not any("dashboard" in part for part in command):
        command.append("--no-dashboard")
    return command


def _add_host(spec: str, address: str) -> str:
    """Add the host to a worker's specification, or to several workers'."""
    try:
        loaded = json.loads(spec)
    except ValueError:
        return spec  # The worker reports the error.
    for worker in [loaded] if "cls" in loaded else loaded.values():
        worker["opts"].setdefault("host", address)
    return json.dumps(loaded)


def build_environment(folder: Path) -> dict[str, str]:
    """Build the environment of a container, without the settings of this process."""
    kept = ("LANG", "LC_ALL", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    # The fruitdask that the test imports, wherever it is.
    return environment | {"PYTHONPATH": str(Path(fruitdask.__file__).parents[1])}


class Container:
    """A process that runs a command, and all processes that the command starts."""

    def __init__(self, command: list[str], *, folder: Path, log: Path, environment: dict[str, str]) -> None:
        """Start the command in an empty folder and in its own session."""
        request = {"command": command, "environment": environment, "folder": str(folder)}
        self._folder = folder
        life, self._life = os.pipe()
        self._end, end = os.pipe()
        with log.open("wb") as file:
            self.pid = _start_host().start(request, (life, file.fileno(), end))
        os.close(life)
        os.close(end)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the process has ended; return whether it has."""
        readable, _, _ = select.select([self._end], [], [], timeout)
        return bool(readable)

    def stop(self, grace_seconds: float) -> None:
        """Ask the process to end, and wait until it has, or for the grace period."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        self.wait(grace_seconds)

    def kill(self) -> None:
        """Kill all processes of the container, including those that have left its session."""
        while left := find_processes(self._folder):
            for pid in left:
                _kill(pid)

    def close(self) -> None:
        """Close the pipes after the container has ended."""
        os.close(self._life)
        os.close(self._end)


def _kill(pid: int) -> None:
    """Kill a process, and wait until it has ended."""
    with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid)) as descriptor:
        signal.pidfd_send_signal(descriptor.fileno(), signal.SIGKILL)
        select.select([descriptor], [], [], 30)


def find_processes(folder: Path) -> list[int]:
    """Find the live processes whose working folder is inside a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        # Processes may end meanwhile or belong to other users, and a zombie has no folder.
        with contextlib.suppress(OSError):
            if path.readlink().is_relative_to(folder):
                found.append(int(path.parent.name))
    return found


class _Host:
    """The process that forks containers."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        path = Path(__file__).with_name("machine_host.py")
        # The fruitdask that the test imports, wherever it is.
        environment = os.environ | {"PYTHONPATH": str(Path(fruitdask.__file__).parents[1])}
        # Dask sets these for workers; NumPy reads them when it is imported.
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with theirs:
            theirs.set_inheritable(True)
            os.posix_spawn(sys.executable, [sys.executable, str(path), str(theirs.fileno())], environment)

    def start(self, request: dict[str, object], files: tuple[int, ...]) -> int:
        """Start a container; return its process id."""
        with self._lock:
            socket.send_fds(self._channel, [json.dumps(request).encode()], files)
            return int(self._channel.recv(100))


@functools.cache
def _start_host() -> _Host:
    """Start the host once; it ends with this process."""
    return _Host()


@contextlib.contextmanager
def reserve_network() -> Iterator[str]:
    """Reserve 127.A.B.0/24 among the simulators on this machine, by binding a port of its first address."""
    # The tests' own generator would choose the same network in processes that run at the same time.
    choose = random.SystemRandom().randrange
    for _ in range(100):
        network = f"127.{choose(1, 255)}.{choose(256)}"
        with contextlib.closing(socket.socket()) as mark:
            try:
                mark.bind((f"{network}.1", SCHEDULER_PORT))
            except OSError:
                continue
            yield network
            return
    raise RuntimeError(
        f"port {SCHEDULER_PORT} of 100 addresses such as {network}.1 is taken; does a program listen on it at 0.0.0.0?"
    )
