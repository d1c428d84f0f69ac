"""Runs the containers of `machines.py`: it imports what Dask's commands need, and forks a process for each container.

A Python command then starts in a tenth of a second instead of two. The container is a process with its own session. As
docker does, it passes SIGTERM on to the first process only. No process survives its container or the test.
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
from collections.abc import Callable
from typing import Any, NoReturn

import dask.config
import distributed.nanny  # noqa: F401
import s3fs  # noqa: F401

import fruitdask.worker.featurize  # noqa: F401

#: More bytes than the environment and the command of any container here.
_MAX_BYTES = 1 << 20
_MAX_FILES = 16
_PR_SET_PDEATHSIG = 1
#: Above the descriptors of any process here.
_FREE_DESCRIPTOR = 500


def fork_for_requests(channel: socket.socket, answer: Callable[..., None]) -> None:
    """Call a function in a fork for each request, with the channel and the files that came with it, until the channel
    is closed.
    """
    # Nobody waits for these processes here: a pipe reports their end.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(channel, _MAX_BYTES, _MAX_FILES)
        if not message:
            return
        if not os.fork():
            return answer(json.loads(message), channel, *files)
        for file in files:
            os.close(file)


def _contain(request: dict[str, Any], channel: socket.socket, life: int, log: int, end: int) -> None:
    """Run a command, and kill all processes that it has started when it or the test ends.

    Only the test holds the other end of ``life``, and only this process holds ``end``.
    """
    # The processes of a container are found by their folder, so it must be set before the answer.
    os.chdir(request.pop("folder"))
    channel.send(str(os.getpid()).encode())
    channel.close()
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
    # The signal is sent when the parent thread ends, and the container had only one thread when it forked.
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
    # These modules have read the previous environment.
    tempfile.tempdir = None
    dask.config.refresh()
    sys.argv = command[2:]
    keep_spare()
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)


def keep_spare() -> None:
    """Fork the first process that multiprocessing will start while there is only one thread: a nanny's worker, or the
    process from which workers are forked.
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
            # multiprocessing starts it first.
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
    # A Ctrl-C for the whole process group is not for this process.
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
    fork_for_requests(socket.socket(fileno=int(sys.argv[1])), _contain)
