"""Mapping: a function over partitions on a cluster, a bounded number in flight, and a value that all tasks need delivered to it."""

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from fruitdask.catalog import Partition
from fruitdask.errors import FruitdaskError, PartitionError

Result = TypeVar("Result")

#: Partitions in flight for each thread of the cluster: one that ends, one in work, one waiting at the worker.
_PARTITIONS_PER_THREAD = 3
#: How often a task is tried again on another worker, and how often a value is delivered again after its last holder died.
_TASK_RETRIES = 2
_MAX_DELIVERIES = 20
#: How long to wait for a worker after the last one died: a nanny starts another in seconds, a cloud in minutes.
_WORKER_TIMEOUT_SECONDS = 600


def map_partitions(
    client: Any,
    function: Callable[..., Result],
    partitions: Iterable[Partition],
    *arguments: Any,
    delivered: Any,
    on_result: Callable[[Result], None],
) -> None:
    """
    Call ``function(partition, delivered, *arguments)`` for each partition on a cluster, a bounded number at a time.

    What all tasks need is scattered to all workers once. If the last worker that holds it dies, it is scattered again and what was in
    flight is submitted again.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    function : Callable
        A plain function; it may be called again for the same partition after a worker died.
    partitions : Iterable[Partition]
        What to do; it is read only as fast as the cluster works.
    *arguments : Any
        Further arguments, small ones.
    delivered : Any
        The value that is scattered; one object, for of a list or a mapping each item would be scattered.
    on_result : Callable
        Called for each result, in the order of completion; an exception from it ends the work.

    Raises
    ------
    PartitionError
        If the function fails for a partition, or the cluster is lost.
    """
    from distributed import as_completed

    queue = iter(partitions)
    in_flight: dict[Any, Partition] = {}
    completed = as_completed()
    delivery = _Delivery(client, delivered)

    def submit(partition: Partition) -> None:
        future = client.submit(function, partition, delivery.future, *arguments, pure=False, retries=_TASK_RETRIES)
        in_flight[future] = partition
        completed.add(future)

    try:
        for partition in islice(queue, _count_window(client)):
            submit(partition)
        for future in completed:
            partition = in_flight.pop(future)
            try:
                result = _get_result(future, partition)
            except CancelledError:
                delivery.renew()
                submit(partition)
                continue
            on_result(result)
            for partition in islice(queue, max(0, _count_window(client) - len(in_flight))):
                submit(partition)
    except (OSError, TimeoutError) as error:
        if isinstance(error, FruitdaskError):
            raise
        raise PartitionError(
            f"the cluster was lost: {str(error) or type(error).__name__}; what is stored stays, run again to go on"
        ) from error
    finally:
        # Where the scheduler is gone there is nothing left to cancel.
        with suppress(OSError, TimeoutError):
            client.cancel(list(in_flight), force=True)


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


class _Delivery:
    """A scattered value, and how to scatter it again."""

    def __init__(self, client: Any, value: Any) -> None:
        self._client = client
        self._value = value
        self._n_deliveries = 0
        self._scatter()

    def renew(self) -> None:
        """Scatter again, once for all the tasks that one loss has cancelled."""
        if self.future.status == "finished":
            return
        if self._n_deliveries >= _MAX_DELIVERIES:
            raise PartitionError(
                f"every worker that held the {type(self._value).__name__} of this run died, {self._n_deliveries} times over; "
                "see the workers' logs for why"
            )
        self._scatter()

    def _scatter(self) -> None:
        """Copy the value to every worker; a new key each time, for the scheduler remembers the lost one."""
        self._client.wait_for_workers(1, timeout=_WORKER_TIMEOUT_SECONDS)
        self.future = self._client.scatter(self._value, broadcast=True, hash=False)
        self._n_deliveries += 1


def _count_window(client: Any) -> int:
    """Count the partitions that may be in flight on the cluster as it is now."""
    n_threads: int = sum(client.nthreads().values())
    return max(1, _PARTITIONS_PER_THREAD * n_threads)


def _get_result(future: Any, partition: Partition) -> Any:
    """Get a task's result, or say which images it stood for; raises CancelledError where it was lost with its worker."""
    try:
        return future.result()
    except CancelledError:
        raise
    except Exception as error:
        raise PartitionError(
            f"partition {partition.index} ({partition.paths[0]} to {partition.paths[-1]}) failed: {str(error) or type(error).__name__}"
            + ("" if isinstance(error, FruitdaskError) else f" ({type(error).__name__})")
        ) from error
