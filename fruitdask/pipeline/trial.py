"""Measures some images of a run on this machine, to estimate a run of all of them."""

import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fruitdask import store
from fruitdask.cluster import open_client
from fruitdask.cluster.scheduling import map_partitions
from fruitdask.core.config import LocalClusterConfig
from fruitdask.core.partition import Partition
from fruitdask.core.storage import Location
from fruitdask.pipeline.inputs import Inputs
from fruitdask.store.catalog import sample_evenly, split_catalog
from fruitdask.worker.explore import ExploreJob
from fruitdask.worker.models import ModelArtifact, load_predictor
from fruitdask.worker.sums import COLOUR_LEVELS

if TYPE_CHECKING:
    from fruitdask.worker.featurize import FeaturizeJob, PartitionSummary

#: Images that are measured; the first partition only warms up.
_N_PARTITIONS, _IMAGES_PER_PARTITION = 3, 16
#: Stages of a task whose time grows with its number of images; the other stages take the same time per partition.
_IMAGE_STAGES = ("fetch", "decode", "predict", "explore")
_ONE_WORKER = LocalClusterConfig(n_workers=1, threads_per_worker=1, dashboard_address=None)


@dataclass(frozen=True)
class Sample:
    """Measurements on some images, in one process with one thread."""

    n_images: int
    #: Images without features, warm-up included.
    n_failed: int
    #: Seconds per image by stage: ``fetch``, ``decode``, ``predict``, ``explore``.
    image_seconds: dict[str, float]
    #: Further seconds per partition, mostly to write it.
    partition_seconds: float
    #: Seconds to start the process and load the network.
    start_seconds: float
    #: Memory of the process with the network.
    base_bytes: int
    thread_bytes: int

    def count_bytes(self, n_threads: int) -> int:
        """Return the memory of a process with that many threads, in bytes."""
        return self.base_bytes + n_threads * self.thread_bytes


@dataclass(frozen=True)
class _Trial:
    """A measured partition."""

    summary: "PartitionSummary"
    load_seconds: float
    task_seconds: float
    base_bytes: int
    peak_bytes: int


def try_images(inputs: Inputs, artifact: ModelArtifact) -> Sample:
    """Fetch, decode, explore and predict a few dozen images, evenly over the classes, as a run does."""
    from fruitdask.worker.featurize import FeaturizeJob

    chosen = inputs.catalog.iloc[sample_evenly(inputs.catalog, _N_PARTITIONS * _IMAGES_PER_PARTITION)]
    trials: list[_Trial] = []
    start = time.perf_counter()
    with TemporaryDirectory() as folder, open_client(_ONE_WORKER) as client:
        open_seconds = time.perf_counter() - start
        explore = _prepare_output(inputs, artifact, Location(folder), n_images=len(chosen))
        job = FeaturizeJob(inputs.source, Location(folder), explore)
        # One after the other, because overlapping partitions cannot be measured.
        for partition in split_catalog(chosen, _IMAGES_PER_PARTITION):
            map_partitions(client, _try_partition, [partition], job, delivered=artifact, on_result=trials.append)
    return _summarize(trials, open_seconds)


def _prepare_output(inputs: Inputs, artifact: ModelArtifact, output: Location, *, n_images: int) -> ExploreJob | None:
    """Prepare a folder for results, and return the exploration job."""
    shape = {"n_images": n_images, "images_per_partition": _IMAGES_PER_PARTITION}
    store.create_store(output, n_features=artifact.n_features, attributes={}, **shape)
    settings = inputs.config.explore
    if not settings.enabled or settings.input_px not in (None, artifact.input_px):
        return None
    thumbnail_px = settings.choose_thumbnail_px(len(inputs.catalog))
    workspace = store.Workspace(output, "trial", thumbnail_px, artifact.input_px, n_colours=COLOUR_LEVELS**3)
    return ExploreJob(inputs.source, workspace, artifact.input_px)


def _try_partition(partition: Partition, artifact: ModelArtifact, job: "FeaturizeJob") -> _Trial:
    """Featurize a partition on the worker and measure it."""
    from fruitdask.worker.featurize import featurize_partition

    start = time.perf_counter()
    load_predictor(artifact, n_threads=1)
    loaded, base_bytes = time.perf_counter(), _read_memory("VmRSS")
    summary = featurize_partition(partition, artifact, job)
    return _Trial(summary, loaded - start, time.perf_counter() - loaded, base_bytes, _read_memory("VmHWM"))


def _summarize(trials: list[_Trial], open_seconds: float) -> Sample:
    """Combine trials; the first only warms up, unless it is the only one."""
    first, measured = trials[0], trials[1:] or trials
    n_images = sum(trial.summary.n_images for trial in measured)
    stages: Counter[str] = Counter()
    for trial in measured:
        stages.update({stage: trial.summary.seconds.get(stage, 0.0) for stage in _IMAGE_STAGES})
    rest = sum(trial.task_seconds for trial in measured) - sum(stages.values())
    return Sample(
        n_images=n_images,
        n_failed=sum(trial.summary.n_failed for trial in trials),
        image_seconds={stage: stages[stage] / n_images for stage in _IMAGE_STAGES},
        partition_seconds=rest / len(measured),
        start_seconds=open_seconds + first.load_seconds,
        base_bytes=first.base_bytes,
        thread_bytes=max(trial.peak_bytes for trial in trials) - first.base_bytes,
    )


def _read_memory(field: str) -> int:
    """Read the current (VmRSS) or peak (VmHWM) memory of this process; the current in both cases if not on Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        from distributed import get_worker

        return int(get_worker().monitor.get_process_memory())
    found = re.search(rf"{field}:\s*(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0
