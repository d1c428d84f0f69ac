"""Scheduling: map a function over partitions on a cluster, a bounded number in flight, with a broadcast value."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias, TypeVar

from fruitdask.core.partition import ClassBlock, Partition
from fruitdask.errors import FruitdaskError, PartitionError

Result = TypeVar("Result")
#: The unit of scheduling.
Piece: TypeAlias = Partition | ClassBlock

#: Partitions in flight per thread of the cluster: one finishing, one running, one waiting at the worker.
_PARTITIONS_PER_THREAD = 3
_TASK_RETRIES = 2
#: How often a partition may be lost with the last worker that holds the broadcast value, before it is suspected. If
#: another worker remains, Dask counts: the task fails after ``distributed.scheduler.allowed-failures`` (3) deaths.
_MAX_LOSSES = 3
#: Broadcasts in a row without a finished task in between.
_MAX_USELESS_BROADCASTS = 60
#: Timeout for a new worker after the last one died: a nanny needs seconds, a cloud minutes.
_WORKER_TIMEOUT_SECONDS = 600
#: Attempts of one broadcast whose connection breaks.
_BROADCAST_ATTEMPTS = 3
#: Interval of checks whether all workers are paused, and the number in a row, without a finished task, that ends a run.
_POLL_SECONDS, _MAX_PAUSED_POLLS = 10, 4


def map_partitions(
    client: Any,
    function: Callable[..., Result],
    partitions: Iterable[Piece],
    *arguments: Any,
    delivered: Any,
    on_result: Callable[[Result], None],
    probe: Callable[..., object] | None = None,
) -> None:
    """Call ``function(partition, delivered, *arguments)`` for each partition on a cluster, a bounded number at a time.

    The value ``delivered`` is broadcast to all workers once. If the last worker that holds it dies, it is broadcast
    again, and the partitions in flight are submitted again. A partition whose workers die repeatedly is postponed until
    all others are done; then a bisection with ``probe`` finds its poison images, and the function is called with a
    partition that excludes them.
    """
    tasks = _Tasks(client, delivered, arguments)
    deadly: list[Piece] = []
    ended = threading.Event()
    try:
        threading.Thread(target=_monitor_pauses, args=(client, tasks, ended), daemon=True).start()
        for partition, result in tasks.run(function, partitions):
            if isinstance(result, _Death):
                deadly.append(partition)
            else:
                on_result(result)
        for partition in deadly:
            on_result(_run_without_poison(tasks, function, partition, probe))
    except (OSError, TimeoutError) as error:
        if isinstance(error, FruitdaskError):
            raise
        raise PartitionError(
            f"the cluster was lost: {str(error) or type(error).__name__}; stored results are kept, run again to resume"
        ) from error
    finally:
        ended.set()
        tasks.cancel()


@dataclass(frozen=True)
class _Death:
    """How the workers of a task died, in place of its result."""

    message: str


class _Tasks:
    """Tasks on a cluster, and the value that all of them need."""

    def __init__(self, client: Any, delivered: Any, arguments: tuple[Any, ...]) -> None:
        self._client = client
        self._arguments = arguments
        self._broadcast = _Broadcast(client, delivered, self._check)
        self._in_flight: dict[Any, Piece] = {}
        self._reason = ""
        self.n_done = 0

    def run(
        self, function: Callable[..., Result], partitions: Iterable[Piece]
    ) -> Iterator[tuple[Piece, Result | _Death]]:
        """Run a function over partitions, a bounded number at a time, and yield results in the order of completion."""
        from distributed import as_completed

        queue, completed, n_losses = iter(partitions), as_completed(), Counter[int]()
        self._broadcast.renew()

        def submit(partition: Piece) -> None:
            self._check()
            arguments = (partition, self._broadcast.future, *self._arguments)
            key = f"{function.__name__}-{uuid.uuid4().hex}"
            future = self._client.submit(_call, function, *arguments, key=key, pure=False, retries=_TASK_RETRIES)
            self._in_flight[future] = partition
            completed.add(future)

        for partition in islice(queue, _count_window(self._client)):
            submit(partition)
        for future in completed:
            partition = self._in_flight.pop(future)
            try:
                result = _get_result(future, partition)
                self._broadcast.n_useless = 0
                self.n_done += 1
            except CancelledError:
                self._check()
                self._broadcast.renew()
                n_losses[partition.index] += 1
                if n_losses[partition.index] <= _MAX_LOSSES:
                    submit(partition)
                    continue
                result = _Death(f"the last worker died {_MAX_LOSSES + 1} times while it was running")
            yield partition, result
            for partition in islice(queue, max(0, _count_window(self._client) - len(self._in_flight))):
                submit(partition)

    def run_alone(self, function: Callable[..., Result], partition: Piece) -> Result | _Death:
        """Run a function on a partition while no other task runs that could kill a worker."""
        ((_, result),) = self.run(function, [partition])
        return result

    def abort(self, reason: str) -> None:
        """Cancel all tasks from another thread, and raise the reason in the thread that runs them."""
        self._reason = reason
        self.cancel()

    def _check(self) -> None:
        """Raise the reason if the tasks were aborted."""
        if self._reason:
            raise PartitionError(self._reason)

    def cancel(self) -> None:
        """Cancel the tasks in flight, unless the scheduler has ended."""
        from distributed.client import ClosedClientError

        with suppress(OSError, TimeoutError, ClosedClientError):
            self._client.cancel(list(self._in_flight), force=True)


def _run_without_poison(
    tasks: _Tasks, function: Callable[..., Result], partition: Piece, probe: Callable[..., object] | None
) -> Result:
    """Run a function on a partition that was running when workers died, excluding its poison images."""
    result = tasks.run_alone(function, partition)
    if isinstance(result, _Death) and probe is not None and isinstance(partition, Partition):
        everything = frozenset(range(len(partition.paths)))

        def kills(places: Sequence[int]) -> bool:
            others = everything.difference(places)
            return isinstance(tasks.run_alone(probe, replace(partition, excluded=others)), _Death)

        found = frozenset(_find_poison(sorted(everything - partition.excluded), kills))
        result = tasks.run_alone(function, replace(partition, excluded=partition.excluded | found))
    if isinstance(result, _Death):
        raise PartitionError(
            f"{partition} kills its workers, whichever images are excluded ({result.message}); give workers "
            "more memory, or set a smaller featurize.max_pixels or featurize.images_per_partition"
        )
    return result


def _find_poison(places: Sequence[int], kills: Callable[[Sequence[int]], bool]) -> list[int]:
    """Find the images that each kill a worker, by bisection of images that kill workers together."""
    if len(places) == 1:
        return list(places) if kills(places) else []
    left, right = places[: len(places) // 2], places[len(places) // 2 :]
    if not kills(left):
        return _find_poison(right, kills)
    return _find_poison(left, kills) + (_find_poison(right, kills) if kills(right) else [])


def let_next_begin() -> None:
    """Let the worker start its next partition; a task calls this once it has requested all files that it reads.

    The files of the next partition then arrive while this one computes, and it computes while this one writes. Outside
    a worker, nothing happens.
    """
    from distributed import get_worker, secede

    try:
        get_worker()
    except ValueError:
        return
    secede()


def _monitor_pauses(client: Any, tasks: _Tasks, ended: threading.Event) -> None:
    """Abort the tasks if all workers stay paused for lack of memory: Dask would wait forever."""
    n_paused, n_done = 0, 0
    while not ended.wait(_POLL_SECONDS):
        try:
            problem = _describe_pause(client)
        except Exception:
            # The thread that runs the tasks reports a closed or lost cluster.
            continue
        n_paused = n_paused + 1 if problem and n_done == tasks.n_done else bool(problem)
        n_done = tasks.n_done
        if n_paused == _MAX_PAUSED_POLLS:
            return tasks.abort(f"{problem}; stored results are kept, run again to resume")


def _describe_pause(client: Any) -> str:
    """Describe that all workers are paused without a running task that could free memory; empty if not."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    busy = ("executing", "long-running", "cancelled")
    if not workers or any(
        worker["status"] != "paused" or any(worker["metrics"]["task_counts"].get(state) for state in busy)
        for worker in workers
    ):
        return ""
    used, limit = max((worker["metrics"]["memory"], worker["memory_limit"]) for worker in workers)
    return (
        f"every worker is paused because its memory is nearly full ({used / 1e6:,.0f} of {limit / 1e6:,.0f} MB without "
        "a running task); give workers more memory (cluster.memory_limit), or use fewer workers"
    )


class _Broadcast:
    """A value on all workers, which is broadcast again when its last holder dies."""

    def __init__(self, client: Any, value: Any, check: Callable[[], None]) -> None:
        self._client = client
        self._value = value
        self._check = check
        self.n_useless = 0
        self.future: Any = None

    def renew(self) -> None:
        """Broadcast the value if no worker has it: once for all tasks that one loss has cancelled."""
        if self.future is not None and self.future.status == "finished":
            return
        name = type(self._value).__name__
        if self.n_useless >= _MAX_USELESS_BROADCASTS:
            raise PartitionError(
                f"every worker that held the {name} of this run died, {self.n_useless} times, without a finished task; "
                "give workers more memory, or find the cause in their logs"
            )
        self.n_useless += self.future is not None
        for _ in range(_BROADCAST_ATTEMPTS):
            self._wait_for_worker()
            try:
                # Under a new key each time, because the scheduler remembers the lost one.
                self.future = self._client.scatter(self._value, broadcast=True, hash=False)
                return
            except OSError as error:
                # A worker that dies while receiving the value breaks this connection; the next attempt opens another.
                if self._client.status != "running":
                    raise
                cause = error
        raise PartitionError(
            f"cannot send the {name} to the workers: {cause}; give them more memory, or find the cause in their logs"
        ) from cause

    def _wait_for_worker(self) -> None:
        """Wait for a worker, up to a timeout: a worker that dies at its start is not started again."""
        deadline = time.monotonic() + _WORKER_TIMEOUT_SECONDS
        while True:
            self._check()
            try:
                return self._client.wait_for_workers(1, timeout=_POLL_SECONDS)  # type: ignore[no-any-return]
            except TimeoutError as error:
                if time.monotonic() > deadline:
                    raise PartitionError(
                        f"the cluster was lost: no worker started within {_WORKER_TIMEOUT_SECONDS} seconds; give "
                        "workers more memory, or find the cause in their logs; stored results are kept, run again to "
                        "resume"
                    ) from error


def _count_window(client: Any) -> int:
    """Count the partitions that may be in flight on the cluster at its current size."""
    n_threads: int = sum(client.nthreads().values())
    return max(1, _PARTITIONS_PER_THREAD * n_threads)


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function on a worker, and drop the causes of its errors, as some cannot be pickled."""
    try:
        return function(*arguments)
    except FruitdaskError as error:
        finished = type(error)(str(error))
    raise finished


def _get_result(future: Any, partition: Piece) -> Any:
    """Get a task's result, or name its images in the error; raises CancelledError if it was lost with its worker."""
    from distributed import KilledWorker

    try:
        return future.result()
    except CancelledError:
        raise
    except KilledWorker as error:
        return _Death(str(error))
    except Exception as error:
        kind = "" if isinstance(error, FruitdaskError) else f" ({type(error).__name__})"
        raise PartitionError(f"{partition} failed: {str(error) or type(error).__name__}{kind}") from error
