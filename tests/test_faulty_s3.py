"""Whole runs on an S3 server that sometimes fails: nothing is lost or doubled, and each failure is one sentence."""

import hashlib
import io
import pickle
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from faulty_s3 import KINDS, FaultyS3, open_faulty_s3
from runs import EXTRAS, OFF, configure

import fruitdask
from fruitdask import store
from fruitdask.core.config import Config, ModelConfig
from fruitdask.core.partition import Partition
from fruitdask.core.progress import RunProgress
from fruitdask.core.storage import Location, check_bucket, exists, explained, hash_file, write_file
from fruitdask.errors import FruitdaskError, PartitionError, StorageError
from fruitdask.pipeline.results import open_features
from fruitdask.worker.fetch import ImageSource, Outcome, Stopwatch, read_batches

# When a connection is reset, aiohttp opens another one within the same attempt, once: such a request arrives twice.

#: Faults that fail a request.
FAILING = [kind for kind in KINDS if kind != "delay"]
#: Images of a run.
N_IMAGES = 12
#: The client's timeouts, in seconds; the faulty server stalls for longer.
READ_TIMEOUT = 1.0


@pytest.fixture(scope="module")
def images(sample_folder: Path, s3_client: Any, s3_server: str, tiny_model: ModelConfig) -> str:
    """Name of a bucket with the drawn images, and a network."""
    s3_client.create_bucket(Bucket="drawn-fruits")
    for path in sample_folder.rglob("*.jpg"):
        s3_client.upload_file(str(path), "drawn-fruits", f"in/{path.relative_to(sample_folder).as_posix()}")
    s3_client.upload_file(tiny_model.weights, "drawn-fruits", "colours.keras")
    return "drawn-fruits"


@pytest.fixture(scope="module")
def undisturbed(
    client: Any, sample_folder: Path, tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> fruitdask.RunResult:
    """A run on the same images and the same network, on this disk."""
    config = configure(sample_folder, tmp_path_factory.mktemp("disk") / "out", tiny_model, input={"limit": N_IMAGES})
    return fruitdask.run(config, client=client)


def make_options(url: str) -> dict[str, Any]:
    """Make storage options for a server that may stall."""
    return {"endpoint_url": url, "config_kwargs": {"read_timeout": READ_TIMEOUT}}


def make_config(url: str, images: str, bucket: str, **settings: dict[str, Any]) -> Config:
    """Make the configuration of a run that reads and writes all it needs through one server."""
    options = {"storage_options": make_options(url)}
    sections: dict[str, dict[str, Any]] = {
        "input": {"url": f"s3://{images}/in", "limit": N_IMAGES, **options},
        "model": {"weights": f"s3://{images}/colours.keras", "preprocessing": "none", **options},
        "featurize": {"images_per_partition": 3, "max_failed_fraction": 0.1},
        **dict.fromkeys(EXTRAS, OFF),
        "output": {"url": f"s3://{bucket}/out", **options},
    }
    return fruitdask.load_config({name: section | settings.get(name, {}) for name, section in sections.items()})


def assert_same(result: fruitdask.RunResult, expected: fruitdask.RunResult) -> None:
    """Compare two runs: no image is lost or doubled, and all numbers are the same."""
    pd.testing.assert_frame_equal(result.table, expected.table)
    np.testing.assert_array_equal(result.features.compute(), expected.features.compute())
    assert result.manifest["counts"] == expected.manifest["counts"]


@pytest.mark.slow
def test_run_loses_nothing_to_faults(
    images: str,
    s3_server: str,
    s3_bucket: tuple[str, dict[str, Any]],
    client: Any,
    undisturbed: fruitdask.RunResult,
) -> None:
    with open_faulty_s3(s3_server, fraction=0.1, seed=3) as server:
        result = fruitdask.run(make_config(server.url, images, s3_bucket[0]), client=client)
        assert_same(result, undisturbed)
        n_requests, n_faults = server.requests.total(), server.injected.total()
    assert 0.03 < n_faults / n_requests < 0.2
    assert fruitdask.run(make_config(s3_server, images, s3_bucket[0])).n_computed == 0


@pytest.mark.slow
def test_run_that_lost_half_its_requests_is_finished_by_the_next(
    images: str,
    s3_server: str,
    s3_bucket: tuple[str, dict[str, Any]],
    client: Any,
    undisturbed: fruitdask.RunResult,
) -> None:
    few = {"featurize": {"images_per_partition": 3, "fetch_attempts": 2}, "output": {"attempts": 2}}
    kinds = [kind for kind in KINDS if kind != "stall"]
    with open_faulty_s3(s3_server, fraction=0, kinds=kinds) as server:
        config = make_config(server.url, images, s3_bucket[0], **few)
        with pytest.raises(FruitdaskError, match=r"^[^\n]*(s3://|failures\.csv)[^\n]*$"):
            fruitdask.run(config, client=client, progress=Storm(server))
        assert server.injected.total() > 10
        server.fraction = 0
        assert_same(fruitdask.run(config, client=client), undisturbed)


class Storm(RunProgress):
    """Makes half of all requests fail once the store exists."""

    def __init__(self, server: FaultyS3) -> None:
        super().__init__()
        self._server = server

    def begin(self, stage: str) -> None:
        """Start the faults with the stage that follows the creation of the store."""
        if stage == "Featurizing":
            self._server.fraction = 0.5


@pytest.mark.slow
def test_images_that_finally_failed_are_computed_by_the_next_run(
    images: str,
    s3_server: str,
    s3_bucket: tuple[str, dict[str, Any]],
    client: Any,
    undisturbed: fruitdask.RunResult,
) -> None:
    few = {"featurize": {"images_per_partition": 3, "fetch_attempts": 2}, "output": {"attempts": 2}}
    path = undisturbed.table["path"][7]
    broken = [path, "00003.parquet"]

    def is_broken(method: str, url: str) -> bool:
        return any(name in url for name in broken)

    with open_faulty_s3(s3_server, fraction=1, kinds=["503"], concerns=is_broken) as server:
        config = make_config(server.url, images, s3_bucket[0], **few)
        sentence = (
            r"^partition 3 \(.* failed: cannot write s3://.*/partitions/00003\.parquet: PutObject: .*\(SlowDown\): .*$"
        )
        with pytest.raises(PartitionError, match=sentence):
            fruitdask.run(config, client=client)
        broken.remove("00003.parquet")
        result = fruitdask.run(config, client=client)
        assert result.manifest["counts"]["by_status"] == {"ok": N_IMAGES - 1, "unreachable": 1}
        (failure,) = pd.read_csv(
            io.BytesIO(result.output.fs.cat_file(result.output.child("failures.csv").path))
        ).itertuples()
        # Attempts of the first run count too, if it reached this image.
        assert failure.path == path and failure.attempts in (2, 4)
        assert failure.error.startswith(f"cannot read s3://{images}/in/{path}: GetObject: ")
        assert "(SlowDown)" in failure.error
        broken.clear()
        again = fruitdask.run(config, client=client)
        assert again.n_computed == 1
        # Principal components stay those of the images of the first run.
        columns = ["path", "label", "status"]
        pd.testing.assert_frame_equal(again.table[columns], undisturbed.table[columns])
        np.testing.assert_array_equal(again.features.compute(), undisturbed.features.compute())
        assert not exists(again.output.child("failures.csv"))


class FirstTime:
    """Recognizes requests that are sent for the first time."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()

    def __call__(self, method: str, path: str) -> bool:
        """Return whether this request is the first of its kind."""
        is_new = (method, path) not in self._seen
        self._seen.add((method, path))
        return is_new


@pytest.mark.slow
def test_every_kind_of_request_is_sent_again(s3_server: str, s3_bucket: tuple[str, dict[str, Any]]) -> None:
    features = np.arange(8, dtype=np.float32).reshape(4, 2)
    outcomes = pd.DataFrame({"path": ["a/1.jpg", "a/2.jpg"], "label": "a", "status": "ok", "error": "", "attempts": 1})
    with open_faulty_s3(s3_server, fraction=1, kinds=FAILING, concerns=FirstTime()) as server:
        output = Location(f"s3://{s3_bucket[0]}/out", make_options(server.url))
        check_bucket(output)
        store.create_store(output, n_images=4, n_features=2, images_per_partition=2, attributes={})
        store.write_partition(output, index=0, start=0, features=features[:2], outcomes=outcomes)
        group: Any = store.open_store(output)
        np.testing.assert_array_equal(group["features"][:2], features[:2])
        assert store.list_committed(output) == {0}
        (table,) = store.read_outcomes(output, [0])
        pd.testing.assert_frame_equal(table, outcomes, check_dtype=False)
        store.write_json(output.child("x.json"), {"a": 1})
        assert store.read_json(output.child("x.json")) == {"format": 1, "a": 1} and not exists(output.child("y.json"))
        healthy = Location(output.url, s3_bucket[1]).child("x.json")
        assert hash_file(output.child("x.json")) == hashlib.sha256(healthy.fs.cat_file(healthy.path)).hexdigest()
        store.delete_result(output, "features.zarr")
        assert store.open_store(output) is None
    assert set(server.injected) == set(FAILING)
    assert set(server.requests) == {"GET", "HEAD", "PUT", "POST"}


def test_truncated_images_are_read_again(images: str, s3_server: str, sample_folder: Path) -> None:
    is_first = FirstTime()

    def is_concerned(method: str, path: str) -> bool:
        return is_image(method, path) and is_first(method, path)

    with open_faulty_s3(s3_server, fraction=1, kinds=["truncated"], concerns=is_concerned) as server:
        outcomes = read(Location(f"s3://{images}/in", make_options(server.url), attempts=1), fetch_attempts=2)
    assert {(outcome.status, outcome.attempts) for outcome in outcomes} == {("ok", 2)}
    assert len(outcomes) == server.injected["truncated"] == 24


def is_image(method: str, path: str) -> bool:
    """Return whether a request is for an image."""
    return path.endswith(".jpg")


def read(source: Location, *, fetch_attempts: int, n_images: int | None = None) -> list[Outcome]:
    """Read images of a folder; returns their outcomes."""
    names = sorted(path for path in source.fs.find(source.path))[:n_images]
    partition = Partition(0, 0, tuple(name.removeprefix(f"{source.path}/") for name in names), ("any",) * len(names))
    settings = ImageSource(source, 8, 10_000_000, fetch_attempts=fetch_attempts, concurrent_reads=16)
    batches = read_batches(partition, settings, input_px=32, watch=Stopwatch(), on_asked=lambda: None)
    return [outcome for batch in batches for outcome in batch.outcomes]


CAUSES = {
    "500": r"InternalError\): the server has failed",
    "503": r"SlowDown\): AWS received too many",
    "reset before": "the server closed the connection|no server answers there",
    "truncated": "the server closed the connection",
    "stall": "the server stopped answering",
}


@pytest.mark.parametrize("kind", CAUSES)
def test_image_is_requested_as_often_as_configured(images: str, s3_server: str, kind: str) -> None:
    with open_faulty_s3(s3_server, fraction=1, kinds=[kind], concerns=is_image) as server:
        source = Location(f"s3://{images}/in", make_options(server.url), attempts=1)
        (outcome,) = read(source, fetch_attempts=2, n_images=1)
    assert (outcome.status, outcome.attempts) == ("unreachable", 2)
    assert server.injected.total() == (4 if kind == "reset before" else 2)
    assert re.match(rf"cannot read s3://{images}/in/{outcome.path}: .*({CAUSES[kind]})", outcome.error)


OPERATIONS: dict[str, tuple[Callable[[Location], Any], str]] = {
    "write": (lambda place: write_file(place, b"1"), "write"),
    "exists": (exists, "read"),
    "hash": (hash_file, "read"),
    "list": (check_bucket, "read"),
    "read": (store.read_table, "read"),
}


@pytest.mark.parametrize(("operation", "verb"), OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize(("kind", "n_requests"), [("503", 2), ("reset after", 4)])
def test_request_is_sent_as_often_as_configured(
    s3_server: str,
    s3_bucket: tuple[str, dict[str, Any]],
    operation: Callable[[Location], Any],
    verb: str,
    kind: str,
    n_requests: int,
) -> None:
    write_file(Location(f"s3://{s3_bucket[0]}/x", s3_bucket[1]), b"1")
    with open_faulty_s3(s3_server, fraction=1, kinds=[kind]) as server:
        place = Location(f"s3://{s3_bucket[0]}/x", make_options(server.url), attempts=2)
        with pytest.raises(
            StorageError,
            match=f"^cannot {verb} {place.url}: .*(server|SlowDown|503).*$",
        ):
            operation(place)
    assert server.requests.total() == n_requests


@pytest.mark.slow
def test_features_that_cannot_be_opened_are_one_sentence_whichever_request_fails(
    s3_server: str, s3_bucket: tuple[str, dict[str, Any]]
) -> None:
    healthy = Location(f"s3://{s3_bucket[0]}/out", s3_bucket[1])
    store.create_store(healthy, n_images=2, n_features=2, images_per_partition=2, attributes={})
    outcomes = pd.DataFrame({"path": ["a", "b"], "label": "", "status": "ok", "error": "", "attempts": 1})
    store.write_partition(healthy, index=0, start=0, features=np.ones((2, 2), np.float32), outcomes=outcomes)
    for n_passed in count():
        requests = iter(range(n_passed))
        with open_faulty_s3(
            s3_server, fraction=1, kinds=["500"], concerns=lambda *_: next(requests, None) is None
        ) as server:
            try:
                open_features(Location(healthy.url, make_options(server.url), attempts=1))
                break
            except StorageError as error:
                assert str(error).startswith("cannot read ")
    # The metadata of the group and of two arrays, and the statuses.
    assert n_passed >= 4


@pytest.mark.slow
def test_chunk_is_requested_as_often_as_configured(s3_server: str, s3_bucket: tuple[str, dict[str, Any]]) -> None:
    with open_faulty_s3(s3_server, fraction=0, kinds=["truncated"]) as server:
        output = Location(f"s3://{s3_bucket[0]}/x", make_options(server.url), attempts=2)
        store.create_store(output, n_images=2, n_features=2, images_per_partition=2, attributes={})
        stored = store.open_store(output)
        assert stored is not None
        array = pickle.loads(pickle.dumps(stored["features"].array))
        n_before, server.fraction = server.requests.total(), 1
        with pytest.raises(StorageError, match="^cannot read .*: the server closed the connection"), explained(
            output, "read"
        ):
            array[:]
        assert server.requests.total() - n_before == 2
