"""Runs commands in processes of their own, forked from one that has imported what they need.

A command then takes half a second of CPU instead of three. Signals, exit codes and output are the same; a test of an
import or of the start of Python needs ``python -m fruitdask``.
"""

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

#: More bytes than a process id or an exit code takes.
_MAX_BYTES = 64


class Command:
    """A running command, with the methods of `subprocess.Popen`."""

    def __init__(self, pid: int, end: int) -> None:
        self.pid, self.returncode = pid, None
        self._end = open(end, "rb", buffering=0)

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code."""
        if self.returncode is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(["fruitdask"], timeout or 0)
            with self._end:
                self.returncode = int(self._end.read())
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to this process alone, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


class CommandHost:
    """The process from which commands are forked."""

    def __enter__(self) -> Self:
        """Start it."""
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        return self

    def __exit__(self, *_: object) -> None:
        """End it; running commands continue."""
        self._channel.close()
        self._process.wait()

    def start(
        self,
        *arguments: str,
        stdout: IO[Any],
        stderr: IO[Any],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> Command:
        """Start ``python -m fruitdask`` with these arguments, in its own process group."""
        ours, theirs = os.pipe()
        request = {
            "arguments": arguments,
            "environment": dict(os.environ if environment is None else environment),
            "folder": str(folder or Path.cwd()),
        }
        files = [stdout.fileno(), stderr.fileno(), theirs]
        socket.send_fds(self._channel, [json.dumps(request).encode()], files)
        os.close(theirs)
        return Command(int(self._channel.recv(_MAX_BYTES)), ours)

    def run(
        self, *arguments: str, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; returns its output."""
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            command = self.start(*arguments, stdout=stdout, stderr=stderr, environment=environment, folder=folder)
            code = command.wait()
            printed = [file.seek(0) or file.read() for file in (stdout, stderr)]
        return subprocess.CompletedProcess(arguments, code, *printed)


def _host(channel: socket.socket) -> None:
    """Start a command for each request, until the channel is closed."""
    from machine_host import fork_for_requests

    import fruitdask.analysis.evaluation
    import fruitdask.analysis.pca
    import fruitdask.pipeline.run
    import fruitdask.worker.images.kernel  # noqa: F401
    from fruitdask.errors import EngineError
    from fruitdask.worker.models.openvino import _import_openvino

    with suppress(EngineError):
        _import_openvino()
    fork_for_requests(channel, _wait_for_command)


def _wait_for_command(request: dict[str, Any], channel: socket.socket, stdout: int, stderr: int, end: int) -> None:
    """Fork a command; send its process id, and its exit code when it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        os.close(end)
        channel.close()
        for number, file in enumerate((stdout, stderr), 1):
            os.dup2(file, number)
            os.close(file)
        return _run(**request)
    channel.send(str(pid).encode())
    channel.close()
    os.write(end, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def _run(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Run a command as if in a new process."""
    import dask.config
    from machine_host import keep_spare

    os.setsid()
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    # These modules have read the previous environment.
    tempfile.tempdir = None
    dask.config.refresh()
    sys.path[0] = folder
    sys.argv = ["fruitdask", *arguments]
    keep_spare()
    runpy.run_module("fruitdask", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _host(socket.socket(fileno=int(sys.argv[1])))
