"""Mapping: a function over partitions on a cluster, a bounded number in flight, and a value that all tasks need delivered to it."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from fruitdask.core.partition import Partition
from fruitdask.errors import FruitdaskError, PartitionError

Result = TypeVar("Result")

#: Partitions in flight for each thread of the cluster: one that ends, one in work, one waiting at the worker.
_PARTITIONS_PER_THREAD = 3
#: How often a task that fails is tried again.
_TASK_RETRIES = 2
#: How often a partition may be lost with the last worker that held what tasks need, before it is suspected. Dask counts the deaths of
#: workers that leave another one behind: more than ``distributed.scheduler.allowed-failures`` (3), and the task has failed.
_MAX_LOSSES = 3
#: How often the value is delivered again without a single task being done: something must be wrong with all of them.
_MAX_DELIVERIES_IN_VAIN = 60
#: How long to wait for a worker after the last one died: a nanny starts another in seconds, a cloud in minutes.
_WORKER_TIMEOUT_SECONDS = 600
#: How often in a row it may break off.
_MAX_BROKEN_DELIVERIES = 3
#: How often to look whether all workers have paused, and how often in a row they may have, with nothing done meanwhile: half a minute.
_LOOK_SECONDS, _MAX_PAUSES_SEEN = 10, 4


def map_partitions(
    client: Any,
    function: Callable[..., Result],
    partitions: Iterable[Partition],
    *arguments: Any,
    delivered: Any,
    on_result: Callable[[Result], None],
    probe: Callable[..., object] | None = None,
) -> None:
    """Call ``function(partition, delivered, *arguments)`` for each partition on a cluster, a bounded number at a time.

    What all tasks need is scattered to all workers once. If the last worker that holds it dies, it is scattered again
    and what was in flight is submitted again. A partition whose workers die again and again is put off until all others
    are done; then halves of it are tried until the images are found that do it, and the function is called with a
    partition that says to avoid them.
    """
    tasks = _Tasks(client, delivered, arguments)
    deadly: list[Partition] = []
    watch = _PauseWatch(client, tasks)
    try:
        watch.start()
        for partition, result in tasks.run(function, partitions):
            if isinstance(result, _Death):
                deadly.append(partition)
            else:
                on_result(result)
        for partition in deadly:
            on_result(_run_deadly(tasks, function, partition, probe))
    except (OSError, TimeoutError) as error:
        if isinstance(error, FruitdaskError):
            raise
        raise PartitionError(
            f"the cluster was lost: {str(error) or type(error).__name__}; what is stored stays, run again to go on"
        ) from error
    finally:
        watch.stop()
        tasks.cancel()


@dataclass(frozen=True)
class _Death:
    """Instead of a result: how the workers of a task have died."""

    message: str


class _Tasks:
    """Tasks on a cluster, and what all of them need."""

    def __init__(self, client: Any, delivered: Any, arguments: tuple[Any, ...]) -> None:
        self._client = client
        self._arguments = arguments
        self._delivery = _Delivery(client, delivered, self._check)
        self._in_flight: dict[Any, Partition] = {}
        self._verdict = ""
        self.n_done = 0

    def run(
        self, function: Callable[..., Result], partitions: Iterable[Partition]
    ) -> Iterator[tuple[Partition, Result | _Death]]:
        """Run a function over partitions, as many at a time as the cluster is large; gives results in the order of completion."""
        from distributed import as_completed

        queue, completed, n_losses = iter(partitions), as_completed(), Counter[int]()
        self._delivery.renew()

        def submit(partition: Partition) -> None:
            self._check()
            arguments = (partition, self._delivery.future, *self._arguments)
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
                self._delivery.n_in_vain = 0
                self.n_done += 1
            except CancelledError:
                self._check()
                self._delivery.renew()
                n_losses[partition.index] += 1
                if n_losses[partition.index] <= _MAX_LOSSES:
                    submit(partition)
                    continue
                result = _Death(f"the last worker died {_MAX_LOSSES + 1} times over while it was in work")
            yield partition, result
            for partition in islice(queue, max(0, _count_window(self._client) - len(self._in_flight))):
                submit(partition)

    def run_alone(self, function: Callable[..., Result], partition: Partition) -> Result | _Death:
        """Run a function on a partition while nothing else runs that could be to blame."""
        ((_, result),) = self.run(function, [partition])
        return result

    def give_up(self, verdict: str) -> None:
        """Cancel what is in flight, from another thread, for a reason in words."""
        self._verdict = verdict
        self.cancel()

    def _check(self) -> None:
        """End the work that was given up."""
        if self._verdict:
            raise PartitionError(self._verdict)

    def cancel(self) -> None:
        """Cancel what is in flight; where the scheduler is gone there is nothing left to cancel."""
        from distributed.client import ClosedClientError

        with suppress(OSError, TimeoutError, ClosedClientError):
            self._client.cancel(list(self._in_flight), force=True)


def _run_deadly(
    tasks: _Tasks, function: Callable[..., Result], partition: Partition, probe: Callable[..., object] | None
) -> Result:
    """Run a function on a partition that has killed workers, or was near one that did, without the images that do it."""
    result = tasks.run_alone(function, partition)
    if isinstance(result, _Death) and probe is not None:
        everything = frozenset(range(len(partition.paths)))

        def kills(places: Sequence[int]) -> bool:
            return isinstance(tasks.run_alone(probe, replace(partition, avoided=everything.difference(places))), _Death)

        found = frozenset(_find_deadly(sorted(everything - partition.avoided), kills))
        result = tasks.run_alone(function, replace(partition, avoided=partition.avoided | found))
    if isinstance(result, _Death):
        raise PartitionError(
            f"{_name(partition)} kills its workers, whichever of its images is left out ({result.message}); give workers more memory, or "
            "set a smaller featurize.max_pixels or featurize.images_per_partition"
        )
    return result


def _find_deadly(places: Sequence[int], kills: Callable[[Sequence[int]], bool]) -> list[int]:
    """Find the images that kill workers by themselves, among some that do together."""
    if len(places) == 1:
        return list(places) if kills(places) else []
    left, right = places[: len(places) // 2], places[len(places) // 2 :]
    if not kills(left):
        return _find_deadly(right, kills)
    return _find_deadly(left, kills) + (_find_deadly(right, kills) if kills(right) else [])


def let_next_begin() -> None:
    """
    Let a worker begin its next partition while this one ends; to be called by a task when it has asked for all that it reads.

    The next one's files arrive while this one computes, and it computes while this one writes. Where there is no worker, nothing
    happens.
    """
    from distributed import get_worker, secede

    try:
        get_worker()
    except ValueError:
        return
    secede()


class _PauseWatch:
    """Looks whether every worker has paused for want of memory with nothing in work, for then nothing will ever be: Dask waits."""

    def __init__(self, client: Any, tasks: _Tasks) -> None:
        self._client = client
        self._tasks = tasks
        self._end = threading.Event()

    def start(self) -> None:
        """Begin to look, in a thread."""
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._end.set()

    def _watch(self) -> None:
        n_seen, n_done = 0, 0
        while not self._end.wait(_LOOK_SECONDS):
            try:
                finding = _find_pause(self._client)
            except Exception:
                # That the cluster is closed or lost, whoever waits for it will say.
                continue
            n_seen = n_seen + 1 if finding and n_done == self._tasks.n_done else bool(finding)
            n_done = self._tasks.n_done
            if n_seen == _MAX_PAUSES_SEEN:
                return self._tasks.give_up(f"{finding}; what is stored stays, run again to go on")


def _find_pause(client: Any) -> str:
    """Say that every worker has paused, if so, with nothing in work whose end could free memory."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    busy = ("executing", "long-running", "cancelled")
    if not workers or any(
        worker["status"] != "paused" or any(worker["metrics"]["task_counts"].get(state) for state in busy)
        for worker in workers
    ):
        return ""
    used, limit = max((worker["metrics"]["memory"], worker["memory_limit"]) for worker in workers)
    return (
        f"every worker has paused, for its memory is nearly full ({used / 1e6:,.0f} of {limit / 1e6:,.0f} MB with nothing in work); give "
        "workers more memory (cluster.memory_limit) or have fewer of them"
    )


class _Delivery:
    """A value to scatter, and to scatter again."""

    def __init__(self, client: Any, value: Any, check: Callable[[], None]) -> None:
        self._client = client
        self._value = value
        self._check = check
        self.n_in_vain = 0
        self.future: Any = None

    def renew(self) -> None:
        """Scatter the value where that was not done, or once for all the tasks that one loss has cancelled."""
        if self.future is not None and self.future.status == "finished":
            return
        if self.n_in_vain >= _MAX_DELIVERIES_IN_VAIN:
            raise PartitionError(
                f"every worker that held the {type(self._value).__name__} of this run died, {self.n_in_vain} times over, and nothing was "
                "done meanwhile; give workers more memory, or see their logs for why"
            )
        self.n_in_vain += self.future is not None
        for _ in range(_MAX_BROKEN_DELIVERIES):
            self._wait_for_worker()
            try:
                # To every worker, under a new key each time, for the scheduler remembers the lost one.
                self.future = self._client.scatter(self._value, broadcast=True, hash=False)
                return
            except OSError as error:
                # One that dies while it receives it takes the connection to the scheduler along; the next attempt opens another.
                if self._client.status != "running":
                    raise
                cause = error
        raise PartitionError(
            f"cannot deliver the {type(self._value).__name__} to the workers: {cause}; give them more memory, or see their logs for why"
        ) from cause

    def _wait_for_worker(self) -> None:
        """Wait until there is a worker, but not for ever: one that has died of its start is not started again."""
        deadline = time.monotonic() + _WORKER_TIMEOUT_SECONDS
        while True:
            self._check()
            try:
                return self._client.wait_for_workers(1, timeout=_LOOK_SECONDS)  # type: ignore[no-any-return]
            except TimeoutError as error:
                if time.monotonic() > deadline:
                    raise PartitionError(
                        f"the cluster was lost: no worker has come in {_WORKER_TIMEOUT_SECONDS} seconds; give workers more memory, or see "
                        "their logs for why; what is stored stays, run again to go on"
                    ) from error


def _count_window(client: Any) -> int:
    """Count the partitions that may be in flight on the cluster as it is now."""
    n_threads: int = sum(client.nthreads().values())
    return max(1, _PARTITIONS_PER_THREAD * n_threads)


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function on a worker; its errors leave their causes behind, of which some cannot travel and would keep them from it."""
    try:
        return function(*arguments)
    except FruitdaskError as error:
        finished = type(error)(str(error))
    raise finished


def _get_result(future: Any, partition: Partition) -> Any:
    """Get a task's result, or say which images it stood for; raises CancelledError where it was lost with its worker."""
    from distributed import KilledWorker

    try:
        return future.result()
    except CancelledError:
        raise
    except KilledWorker as error:
        return _Death(str(error))
    except Exception as error:
        raise PartitionError(
            f"{_name(partition)} failed: {str(error) or type(error).__name__}"
            + ("" if isinstance(error, FruitdaskError) else f" ({type(error).__name__})")
        ) from error


def _name(partition: Partition) -> str:
    """Name a partition by its images."""
    return f"partition {partition.index} ({partition.paths[0]} to {partition.paths[-1]})"
