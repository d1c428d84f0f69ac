"""What a partition costs besides its images: scheduling alone, and with reading, storing and committing one small
image.

    python tests/benchmarks/partitions.py [--partitions 2000]

Two workers of one thread. The ratio is to scheduling alone. The last line shows how small partitions may sensibly be:
the share of a partition's time that is not spent on its images, at 6 ms per image (MobileNetV2 with OpenVINO).
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import print_table
from PIL import Image

from fruitdask.cluster import open_client
from fruitdask.cluster.scheduling import map_partitions
from fruitdask.core.config import InputConfig, LocalClusterConfig
from fruitdask.core.partition import Partition
from fruitdask.core.storage import Location
from fruitdask.store import create_store
from fruitdask.store.catalog import list_images, split_catalog
from fruitdask.worker.featurize import FeaturizeJob, featurize_partition
from fruitdask.worker.fetch import ImageSource
from fruitdask.worker.models import ModelArtifact, engines

IMAGE_SECONDS = 0.006
STUB = ModelArtifact(b"stub", "stub", "stub", "none", input_px=32, n_features=1280)


def install_stub() -> None:
    """Install an engine that computes nothing."""

    def load_network(artifact: ModelArtifact, *, n_threads: int) -> Callable:
        return lambda images: np.zeros((len(images), artifact.n_features), np.float32)

    engines.ENGINES["stub"] = engines.Engine(lambda graph: graph, lambda *, n_threads: None, load_network)


def do_nothing(partition: Partition, artifact: ModelArtifact) -> int:
    """Do nothing with a partition."""
    return partition.index


def measure_seconds(client: Any, function: Callable, partitions: list[Partition], *arguments: Any) -> float:
    """Measure the seconds of mapping a function over partitions."""
    start = time.perf_counter()
    map_partitions(client, function, partitions, *arguments, delivered=STUB, on_result=lambda result: None)
    return time.perf_counter() - start


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partitions", type=int, default=2000)
    parser.add_argument("--markdown", type=Path, help="Append the table to this file too.")
    arguments = parser.parse_args()
    n_partitions = arguments.partitions
    with tempfile.TemporaryDirectory() as name:
        source, output = Location(f"{name}/in"), Location(f"{name}/out")
        Path(name, "in", "black").mkdir(parents=True)
        for number in range(n_partitions):
            Image.new("RGB", (32, 32)).save(f"{name}/in/black/{number:06d}.png")
        catalog = list_images(InputConfig(url=source.url))
        create_store(output, n_images=n_partitions, n_features=STUB.n_features, images_per_partition=1, attributes={})
        job = FeaturizeJob(ImageSource(source, 8, 10**6, fetch_attempts=1, concurrent_reads=16), output)
        partitions = list(split_catalog(catalog, 1))
        with open_client(LocalClusterConfig(n_workers=2, threads_per_worker=1, dashboard_address=None)) as client:
            client.run(install_stub)
            measure_seconds(client, featurize_partition, partitions[:20], job)
            nothing = measure_seconds(client, do_nothing, partitions)
            stub = measure_seconds(client, featurize_partition, partitions, job)
    rows = []
    for title, seconds in (("scheduling", nothing), ("with one stored image", stub)):
        each = seconds / n_partitions
        rows.append([title, f"{1 / each:.0f}", f"{each * 1000:.1f}", f"{seconds / nothing:.1f}"])
    print_table(["a partition of", "partitions/s", "ms each", "ratio"], rows, arguments.markdown)
    of_worker = 2 * stub / n_partitions
    for n_images in (8, 32, 128, 512):
        print(
            f"{n_images:4} images per partition: {of_worker / (of_worker + n_images * IMAGE_SECONDS):.1%} "
            "of a worker's time is not spent on images"
        )


if __name__ == "__main__":
    main()
