"""Runs the containers of `machines.py`: has imported what Dask's commands need, and forks a process for each.

A command of Python's then starts in a tenth of a second instead of two. The container is a process of its own session
that passes SIGTERM on as docker does, to the first process alone; nothing survives it or the test.
"""

import ctypes
import fcntl
import json
import multiprocessing.spawn
import multiprocessing.util
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
from typing import Any, NoReturn

import dask.config
import distributed.nanny  # noqa: F401
import s3fs  # noqa: F401

import fruitdask.worker.featurize  # noqa: F401

#: Longer than any environment and command here.
_MAX_BYTES = 1 << 20
_MAX_FILES = 16
_PR_SET_PDEATHSIG = 1
#: Above the descriptors of any process here.
_FREE_DESCRIPTOR = 500


def main() -> None:
    """Start a container for each request, until nobody can ask any more."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    # Containers are not waited for here: their end is told by a pipe.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(channel, _MAX_BYTES, _MAX_FILES)
        if not message:
            return
        if not os.fork():
            request = json.loads(message)
            # Its folder is how the processes of a container are found, so it has that before anybody looks.
            os.chdir(request.pop("folder"))
            channel.send(str(os.getpid()).encode())
            channel.close()
            return _contain(request, *files)
        for file in files:
            os.close(file)


def _contain(request: dict[str, Any], life: int, log: int, end: int) -> None:
    """Run a command, and kill whatever it has started when it or the test ends.

    Only the test holds the other end of ``life``, and only this process ``end``.
    """
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    child = 0
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM) if child else os._exit(143))
    child = os.fork()
    if not child:
        for file in (life, log, end):
            os.close(file)
        return _run(**request)

    def watch() -> None:
        os.read(life, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"docker: the container ended with {code}", flush=True)
    os.killpg(0, signal.SIGKILL)


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Run a command as if in a new process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The container is one thread until now, so this one ends with it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    if command[:2] != [sys.executable, "-m"]:
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"docker: {command[0]}: {error}", flush=True)
            os._exit(127)
    # What these modules have read of the environment.
    tempfile.tempdir = None
    dask.config.refresh()
    sys.argv = command[2:]
    keep_spare()
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)


def keep_spare() -> None:
    """Fork the first process that multiprocessing will start, a nanny's worker or the one from which workers are forked,
    as long as there is one thread alone.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        ours.close()
        _wait_as_spare(its)
    its.close()
    spawn = multiprocessing.util.spawnv_passfds

    def spawn_once(path: bytes, arguments: list[str], files: list[int]) -> int:
        code = arguments[arguments.index("-c") + 1]
        if "resource_tracker" in code:
            # It is started first.
            pid_of_tracker: int = spawn(path, arguments, files)
            return pid_of_tracker
        multiprocessing.util.spawnv_passfds = spawn
        numbers = sorted(map(int, files))
        request = {"code": code, "environment": dict(os.environ), "numbers": numbers}
        with ours:
            socket.send_fds(ours, [json.dumps(request).encode()], numbers)
        return pid

    multiprocessing.util.spawnv_passfds = spawn_once


def _wait_as_spare(channel: socket.socket) -> NoReturn:
    """Become the process that multiprocessing spawns, with the files that it passes under the same numbers."""
    # Until then, nobody handles what reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    message, files, _, _ = socket.recv_fds(channel, _MAX_BYTES, _MAX_FILES)
    if not message:
        os._exit(0)
    request = json.loads(message)
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, _FREE_DESCRIPTOR) for file in files]
    for file in files:
        os.close(file)
    channel.close()
    for file, number in zip(moved, request["numbers"], strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["-c", "--multiprocessing-fork"]
    exec(request["code"], {"__name__": "__main__"})
    sys.exit()


if __name__ == "__main__":
    main()
