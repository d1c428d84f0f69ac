"""Featurizing: one outcome per image, whatever happens to images, files and workers."""

import io
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from fruitdask import store
from fruitdask.cluster import open_client
from fruitdask.cluster.scheduling import map_partitions
from fruitdask.core.config import InputConfig, LocalClusterConfig, ModelConfig
from fruitdask.core.partition import Partition
from fruitdask.core.storage import Location
from fruitdask.errors import PartitionError
from fruitdask.store.catalog import list_images, split_catalog
from fruitdask.worker.featurize import FeaturizeJob, PartitionSummary, featurize_partition
from fruitdask.worker.fetch import ImageSource
from fruitdask.worker.models import ModelArtifact, build_artifact, engines, load_predictor


def prepare(
    source: Location, output: Location, *, images_per_partition: int, n_features: int = 6, **settings: Any
) -> tuple[pd.DataFrame, list[Partition], FeaturizeJob]:
    """List a folder and create the store for it."""
    catalog = list_images(InputConfig(url=source.url, storage_options=dict(source.storage_options)))
    store.create_store(
        output, n_images=len(catalog), n_features=n_features, images_per_partition=images_per_partition, attributes={}
    )
    defaults = {"batch_size": 4, "max_pixels": 10_000_000, "fetch_attempts": 3, "concurrent_reads": 4}
    job = FeaturizeJob(ImageSource(source, **(defaults | settings)), output)
    return catalog, list(split_catalog(catalog, images_per_partition)), job


def read_features(output: Location) -> np.ndarray:
    """Read all features of a store."""
    group: Any = store.open_store(output)
    return np.asarray(group["features"][:])


def compute_colours(paths: list[Path]) -> np.ndarray:
    """Compute what the tiny model computes, with Pillow and NumPy alone."""
    images = [Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC) for path in paths]
    pixels = np.stack([np.asarray(image, np.float64) for image in images])
    return np.concatenate([pixels.mean(axis=(1, 2)), pixels.max(axis=(1, 2))], axis=1)


@pytest.mark.parametrize(("images_per_partition", "batch_size"), [(5, 2), (5, 100), (100, 7)])
def test_featurize_partition_gives_the_same_features_whatever_the_sizes(
    sample_folder: Path, tiny_artifact: ModelArtifact, tmp_path: Path, images_per_partition: int, batch_size: int
) -> None:
    output = Location(str(tmp_path))
    catalog, partitions, job = prepare(
        Location(str(sample_folder)), output, images_per_partition=images_per_partition, batch_size=batch_size
    )
    summaries = [featurize_partition(partition, tiny_artifact, job) for partition in partitions]
    expected = compute_colours([sample_folder / path for path in catalog["path"]])
    np.testing.assert_allclose(read_features(output), expected, rtol=1e-5)
    assert sum(summary.n_images for summary in summaries) == len(catalog)
    assert sum(summary.bytes_read for summary in summaries) == catalog["bytes"].sum()
    assert all(set(summary.seconds) == {"load", "fetch", "decode", "predict", "write"} for summary in summaries)
    outcomes = pd.concat(store.read_outcomes(output, sorted(store.list_committed(output))))
    assert list(outcomes["path"]) == list(catalog["path"]) and set(outcomes["status"]) == {"ok"}


def encode(image: Image.Image, kind: str) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_featurize_partition_gives_each_bad_image_its_outcome(tiny_artifact: ModelArtifact, tmp_path: Path) -> None:
    source, output = tmp_path / "in", Location(str(tmp_path / "out"))
    good = encode(Image.new("RGB", (50, 40), (10, 200, 30)), "JPEG")
    files = {
        "a_good.jpg": good,
        "b_large.png": encode(Image.new("1", (300, 300)), "PNG"),
        "c_empty.jpg": b"",
        "d_text.jpg": b"not an image",
        "e_truncated.jpg": good[: len(good) // 2],
        "f_vanished.jpg": good,
        "g_good.png": encode(Image.new("RGB", (50, 40), (1, 2, 3)), "PNG"),
    }
    (source / "apple").mkdir(parents=True)
    for name, data in files.items():
        (source / "apple" / name).write_bytes(data)
    catalog, partitions, job = prepare(
        Location(str(source)), output, images_per_partition=10, max_pixels=80_000, batch_size=3
    )
    (source / "apple" / "f_vanished.jpg").unlink()
    summary = featurize_partition(partitions[0], tiny_artifact, job)
    assert summary.statuses == {"ok": 2, "too_large": 1, "unreadable": 3, "missing": 1} and summary.n_failed == 5
    (outcomes,) = store.read_outcomes(output, [0])
    assert list(outcomes["status"]) == ["ok", "too_large", "unreadable", "unreadable", "unreadable", "missing", "ok"]
    assert list(outcomes["label"]) == ["apple"] * 7
    errors = dict(zip(outcomes["path"], outcomes["error"], strict=True))
    assert "300 x 300 = 90,000" in errors["apple/b_large.png"] and "empty file" in errors["apple/c_empty.jpg"]
    features = read_features(output)
    np.testing.assert_array_equal(np.isnan(features).all(axis=1), outcomes["status"] != "ok")
    np.testing.assert_allclose(features[6], [1, 2, 3, 1, 2, 3], rtol=1e-6)


class FlakyFileSystem(LocalFileSystem):
    """A file system on disk that fails each read of a file a number of times, found in the file's name."""

    protocol = "flaky"
    reads: dict[str, int] = {}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Read a file, or fail."""
        path = self._strip_protocol(path)
        self.reads[path] = self.reads.get(path, 0) + 1
        if self.reads[path] <= int(Path(path).stem.split("_")[1]):
            raise OSError("the connection was reset")
        with open(path, "rb") as file:
            return file.read()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("flaky://"))


@pytest.fixture
def flaky() -> Iterator[None]:
    """Register the flaky file system."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.reads.clear()
    yield


@pytest.mark.usefixtures("flaky")
def test_featurize_partition_reads_again_up_to_a_limit(tiny_artifact: ModelArtifact, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n_faults in (0, 2, 3):
        Image.new("RGB", (40, 40)).save(tmp_path / "in" / f"fails_{n_faults}.png")
    output = Location(str(tmp_path / "out"))
    _, partitions, job = prepare(Location(f"flaky://{tmp_path}/in"), output, images_per_partition=3, fetch_attempts=3)
    featurize_partition(partitions[0], tiny_artifact, job)
    (outcomes,) = store.read_outcomes(output, [0])
    assert list(outcomes["status"]) == ["ok", "ok", "unreachable"]
    assert list(outcomes["attempts"]) == [1, 3, 3]
    assert outcomes["error"][2] == f"cannot read flaky://{tmp_path}/in/fails_3.png: the connection was reset"


@pytest.mark.slow
def test_featurize_partition_reads_and_writes_s3(
    sample_folder: Path, tiny_artifact: ModelArtifact, s3_bucket: tuple[str, dict], s3_client: Any
) -> None:
    bucket, options = s3_bucket
    paths = sorted(sample_folder.rglob("*.jpg"))
    for path in paths:
        s3_client.upload_file(str(path), bucket, f"in/{path.relative_to(sample_folder)}")
    output = Location(f"s3://{bucket}/out", options)
    _, partitions, job = prepare(Location(f"s3://{bucket}/in", options), output, images_per_partition=10)
    for partition in partitions:
        featurize_partition(partition, tiny_artifact, job)
    np.testing.assert_allclose(read_features(output), compute_colours(paths), rtol=1e-5)
    assert store.list_committed(output) == set(range(len(partitions)))


def test_predictor_is_shared_by_partitions(tiny_artifact: ModelArtifact) -> None:
    assert load_predictor(tiny_artifact, n_threads=1) is load_predictor(tiny_artifact, n_threads=2)


def test_featurize_partition_fails_images_whose_features_are_not_finite(tmp_path: Path) -> None:
    import keras

    # The largest float32 is 3.4e38: a mean of more than 3 overflows.
    layers = [keras.layers.GlobalAveragePooling2D(), keras.layers.Rescaling(1e38), keras.layers.Dense(1)]
    keras.Sequential([keras.Input((32, 32, 3)), *layers]).save(tmp_path / "overflow.keras")
    artifact = build_artifact(ModelConfig(weights=str(tmp_path / "overflow.keras"), preprocessing="none"))
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 40), (1, 4, 1)).save(tmp_path / "in" / "bright.png")
    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "in" / "dark.png")
    output = Location(str(tmp_path / "out"))
    _, partitions, job = prepare(Location(str(tmp_path / "in")), output, images_per_partition=2, n_features=3)
    featurize_partition(partitions[0], artifact, job)
    (outcomes,) = store.read_outcomes(output, [0])
    assert list(outcomes["status"]) == ["not_finite", "ok"]
    np.testing.assert_allclose(
        read_features(output), np.array([[np.nan] * 3, [1e38, 2e38, 3e38]], np.float32), rtol=1e-5
    )


def install_counter() -> None:
    """Count the networks that this process builds from now on, and drop those that it has."""

    def count(load: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        os.environ["N_BUILDS"] = str(int(os.environ.get("N_BUILDS", 0)) + 1)
        return load(*arguments, **settings)

    engines._predictors.clear()
    for name, engine in engines.ENGINES.items():
        engines.ENGINES[name] = replace(engine, load_network=partial(count, engine.load_network))


@pytest.mark.slow
def test_network_is_built_once_per_process(
    client: Any, sample_folder: Path, tiny_artifact: ModelArtifact, tmp_path: Path
) -> None:
    output = Location(str(tmp_path))
    catalog, partitions, job = prepare(Location(str(sample_folder)), output, images_per_partition=1)
    client.run(install_counter)
    done: list[PartitionSummary] = []
    map_partitions(client, featurize_partition, partitions, job, delivered=tiny_artifact, on_result=done.append)
    assert len(done) == len(catalog) == 24
    # A worker that was busy with other work may have computed nothing.
    counts = set(client.run(lambda: os.environ.get("N_BUILDS", "0")).values())
    assert {"1"} <= counts <= {"0", "1"}
    np.testing.assert_allclose(
        read_features(output), compute_colours([sample_folder / path for path in catalog["path"]]), rtol=1e-5
    )


@pytest.mark.slow
def test_features_are_the_same_when_every_worker_dies(
    sample_folder: Path, tiny_artifact: ModelArtifact, tmp_path: Path
) -> None:
    output = Location(str(tmp_path))
    catalog, partitions, job = prepare(Location(str(sample_folder)), output, images_per_partition=2)
    done: list[PartitionSummary] = []
    with open_client(LocalClusterConfig(n_workers=1, threads_per_worker=1, dashboard_address=None)) as client:

        def kill_after_the_third(summary: PartitionSummary) -> None:
            done.append(summary)
            if len(done) == 3:
                (pid,) = client.run(os.getpid).values()
                os.kill(pid, signal.SIGKILL)

        map_partitions(
            client, featurize_partition, partitions, job, delivered=tiny_artifact, on_result=kill_after_the_third
        )
    assert sorted({summary.index for summary in done}) == list(range(len(partitions)))
    np.testing.assert_allclose(
        read_features(output), compute_colours([sample_folder / path for path in catalog["path"]]), rtol=1e-5
    )


def test_partition_that_cannot_be_stored_is_named(
    client: Any, sample_folder: Path, tiny_artifact: ModelArtifact, tmp_path: Path
) -> None:
    output = Location(str(tmp_path))
    _, partitions, job = prepare(Location(str(sample_folder)), output, images_per_partition=24)
    (tmp_path / "partitions").write_text("a file where the folder of commit marks should be")
    with pytest.raises(PartitionError, match=r"partition 0 \(apple_.*/r0_0.jpg to .*cannot write .*/00000"):
        map_partitions(
            client, featurize_partition, partitions, job, delivered=tiny_artifact, on_result=lambda summary: None
        )
