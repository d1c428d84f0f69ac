"""Mapping over partitions on real clusters: bounded, and complete whatever happens to the workers."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster

from fruitdask.cluster import open_client, scheduling
from fruitdask.cluster.scheduling import let_next_begin, map_partitions
from fruitdask.core.config import LocalClusterConfig
from fruitdask.core.partition import Partition
from fruitdask.errors import PartitionError

PARTITIONS = [Partition(index, index, (f"a/{index}.jpg",), ("a",)) for index in range(12)]
ONE_WORKER = LocalClusterConfig(n_workers=1, threads_per_worker=1, dashboard_address=None)

TWO_WORKERS = ONE_WORKER.model_copy(update={"n_workers": 2})
ONE_GIBIBYTE = ONE_WORKER.model_copy(update={"memory_limit": "1GiB"})


def write_note(partition: Partition, folder: Path, text: str) -> int:
    """Write a file for each partition, as a record of what was done."""
    (folder / str(partition.index)).write_text(text + partition.paths[0])
    return partition.index


def wait_for_next(partition: Partition, folder: Path, patience_seconds: float) -> bool:
    """Write a file, let the next partition begin, and return whether its file appeared in time."""
    (folder / str(partition.index)).touch()
    let_next_begin()
    deadline = time.monotonic() + patience_seconds * (partition.index < len(PARTITIONS) - 1)
    while time.monotonic() < deadline:
        if (folder / str(partition.index + 1)).exists():
            return True
        os.sched_yield()
    return False


def die_of_some(partition: Partition, deadly: str) -> tuple[int, frozenset[int]]:
    """Kill the process if it opens a deadly image."""
    opened = [path for place, path in enumerate(partition.paths) if place not in partition.excluded]
    if set(deadly.split()).intersection(opened):
        os.kill(os.getpid(), signal.SIGKILL)
    return partition.index, partition.excluded


def die_together(partition: Partition, size: int) -> int:
    """Kill the process if it opens at least `size` images at once."""
    if len(partition.paths) - len(partition.excluded) >= size:
        os.kill(os.getpid(), signal.SIGKILL)
    return partition.index


_ballast: list[bytes] = []


def fill_memory(partition: Partition, fraction: float, seconds: float) -> int:
    """Fill a fraction of the memory that Dask allows the process, and free it some time after this task has ended."""
    from distributed import get_worker

    worker = get_worker()
    free = fraction * worker.memory_manager.memory_limit - worker.monitor.get_process_memory()
    _ballast.append(b"x" * max(0, int(free)))
    timer = threading.Timer(seconds, _ballast.clear)
    timer.daemon = True
    timer.start()
    time.sleep(0.05)
    return partition.index


class DeadlyOnce:
    """Kills the first process that receives it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (str(self.mark),)

    def write(self, name: str) -> None:
        """Write a file beside the mark."""
        self.mark.with_name(name).touch()


def _receive(mark: str) -> DeadlyOnce:
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return DeadlyOnce(Path(mark))


def use_delivery(partition: Partition, delivered: DeadlyOnce) -> int:
    """Use the value that was broadcast."""
    delivered.write(partition.paths[0].replace("/", "-"))
    return partition.index


def kill_worker(client: Any) -> None:
    """Kill the only worker."""
    (pid,) = client.run(os.getpid).values()
    os.kill(pid, signal.SIGKILL)


def test_map_partitions_calls_with_all_arguments_and_keeps_a_bounded_number_in_flight(
    client: Any, tmp_path: Path
) -> None:
    taken, most, done = 0, 0, []

    def take() -> Iterator[Partition]:
        nonlocal taken, most
        for partition in PARTITIONS:
            taken += 1
            most = max(most, taken - len(done))
            yield partition

    map_partitions(client, write_note, take(), "saw ", delivered=tmp_path, on_result=done.append)
    n_threads = 4
    assert sorted(done) == list(range(12)) and most == 3 * n_threads
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        str(index): f"saw a/{index}.jpg" for index in range(12)
    }


def test_next_partition_begins_while_one_ends(tmp_path: Path) -> None:
    last = Partition(len(PARTITIONS), 0, ("a/last.jpg",), ("a",))
    saw: list[bool] = []
    with open_client(ONE_WORKER) as client:
        map_partitions(client, wait_for_next, PARTITIONS, 20, delivered=tmp_path, on_result=saw.append)
        assert wait_for_next(last, tmp_path, 0) is False, "without a worker nothing happens"
    # The last partition has no successor.
    assert sorted(saw) == [False] + [True] * 11


def test_map_partitions_delivers_again_when_every_worker_dies(tmp_path: Path) -> None:
    done: list[int] = []
    with open_client(ONE_WORKER) as client:

        def kill_after_the_third(index: int) -> None:
            done.append(index)
            if len(done) == 3:
                kill_worker(client)

        map_partitions(client, write_note, PARTITIONS, "", delivered=tmp_path, on_result=kill_after_the_third)
    assert sorted(done) == list(range(12))


def test_map_partitions_delivers_again_when_a_worker_dies_while_receiving(tmp_path: Path) -> None:
    done: list[int] = []
    with open_client(ONE_WORKER) as client:
        map_partitions(client, use_delivery, PARTITIONS, delivered=DeadlyOnce(tmp_path / "mark"), on_result=done.append)
    assert sorted(done) == list(range(12))
    assert len(list(tmp_path.iterdir())) == 13


@pytest.mark.slow
def test_map_partitions_ends_when_every_worker_stays_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_POLL_SECONDS", 1)
    done: list[int] = []
    with open_client(ONE_GIBIBYTE) as client:
        # Dask pauses at 80 %, and kills at 95 %.
        with pytest.raises(PartitionError, match=r"every worker is paused.*\(9\d\d of 1,074 MB.*memory_limit"):
            map_partitions(client, fill_memory, PARTITIONS * 10, 600, delivered=0.87, on_result=done.append)
    assert 0 < len(done) < 120


@pytest.mark.slow
def test_map_partitions_continues_if_workers_pause_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_POLL_SECONDS", 2)
    done: list[int] = []
    with open_client(ONE_GIBIBYTE) as client:
        map_partitions(client, fill_memory, PARTITIONS[:6], 2, delivered=0.87, on_result=done.append)
    assert sorted(done) == [0, 1, 2, 3, 4, 5]


def test_map_partitions_survives_the_loss_of_results(tmp_path: Path) -> None:
    done: list[int] = []
    with open_client(ONE_WORKER) as client:

        def kill_when_a_second_is_written(index: int) -> None:
            done.append(index)
            if len(done) == 1:
                while len(list(tmp_path.iterdir())) < 2:
                    os.sched_yield()
                kill_worker(client)

        map_partitions(client, write_note, PARTITIONS, "", delivered=tmp_path, on_result=kill_when_a_second_is_written)
    assert sorted(done) == list(range(12))


@pytest.fixture
def impatient_client() -> Iterator[Any]:
    """Two workers, and a scheduler that fails a task after the first death, as a user may configure."""
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}), open_client(TWO_WORKERS) as client:
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("deadly", [{2}, {0, 5}, {6}, set(range(7))], ids=["one", "two", "last", "all"])
def test_images_that_kill_workers_are_found_and_excluded(deadly: set[int], impatient_client: Any) -> None:
    partitions = [
        Partition(index, 7 * index, tuple(f"{index}/{place}.jpg" for place in range(7)), ("a",) * 7)
        for index in range(4)
    ]
    paths = " ".join(f"2/{place}.jpg" for place in deadly)
    avoided: dict[int, frozenset[int]] = {}
    map_partitions(
        impatient_client,
        die_of_some,
        partitions,
        delivered=paths,
        on_result=lambda result: avoided.update([result]),
        probe=die_of_some,
    )
    assert avoided == {0: frozenset(), 1: frozenset(), 2: deadly, 3: frozenset()}


def test_partition_that_kills_workers_without_a_poison_image_is_named(impatient_client: Any) -> None:
    partition = Partition(3, 0, ("a/0.jpg", "a/1.jpg", "a/2.jpg"), ("a",) * 3)
    with pytest.raises(PartitionError, match=r"partition 3 \(a/0.jpg to a/2.jpg\) kills its workers, "):
        map_partitions(
            impatient_client, die_together, [partition], delivered=2, on_result=lambda index: None, probe=die_together
        )


def test_map_partitions_says_which_partition_failed(client: Any, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    with pytest.raises(PartitionError, match=r"partition 0 \(a/0.jpg to .* failed: .*\(IsADirectoryError\)"):
        map_partitions(client, write_note, PARTITIONS, "", delivered=tmp_path, on_result=lambda index: None)


@pytest.mark.slow
def test_map_partitions_says_that_no_worker_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scheduling, "_WORKER_TIMEOUT_SECONDS", 1)
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", host="127.0.0.1") as cluster, Client(
        cluster
    ) as client:
        with pytest.raises(PartitionError, match="no worker started within 1 seconds; give workers more memory"):
            map_partitions(client, write_note, PARTITIONS, "", delivered=tmp_path, on_result=lambda index: None)


def test_map_partitions_says_that_the_scheduler_is_gone(tmp_path: Path) -> None:
    cluster = LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        dashboard_address="127.0.0.1:0",
        host="127.0.0.1",
    )
    with cluster, Client(cluster.scheduler_address, timeout=2) as client:

        def close(index: int) -> None:
            cluster.close()

        with pytest.raises(PartitionError, match="cluster was lost: .*results are kept, run again to resume"):
            map_partitions(client, write_note, PARTITIONS, "", delivered=tmp_path, on_result=close)
