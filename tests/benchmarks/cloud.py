"""A whole run in a simulated cloud on this machine: photographs in S3, two spot workers, one of which is interrupted,
and results in S3.

    python tests/benchmarks/cloud.py PHOTOGRAPHS WEIGHTS

The cloud is the loopback EC2 of the tests: real processes and TLS, but no boot, no docker and no distance. PHOTOGRAPHS
is a folder of classes, WEIGHTS the file of MobileNetV2's weights without its top. Prints seconds, their ratio to the
same run on this machine from disk, the largest relative difference of a feature to that run's, and what is left
running.
"""

import argparse
import os
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr
from measuring import measure

sys.path.insert(0, str(Path(__file__).parents[1]))

from loopback_ec2 import LoopbackEC2  # noqa: E402
from runs import EXTRAS, OFF  # noqa: E402
from test_cloud import BUCKET, describe_cluster, interrupt_a_worker, upload  # noqa: E402


def build_config(photographs: Path | str, output: Path | str, weights: Path, **sections: dict) -> dict:
    """Build the sections of a run."""
    return {
        "input": {"url": str(photographs)},
        "model": {"weights": str(weights), "engine": "openvino"},
        "featurize": {"images_per_partition": 8},
        "output": {"url": str(output)},
        **dict.fromkeys(EXTRAS, OFF),
        **sections,
    }


def run(path: Path, sections: dict) -> float:
    """Run a configuration; returns the seconds of the whole command."""
    path.write_text(yaml.safe_dump(sections))
    return measure([sys.executable, "-m", "fruitdask", "run", str(path)]).seconds


def main() -> None:
    """Run both, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=lambda path: Path(path).resolve())
    parser.add_argument("weights", type=lambda path: Path(path).resolve())
    arguments = parser.parse_args()
    n_images = sum(1 for _ in arguments.photographs.glob("*/*.jpg"))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch, LoopbackEC2() as cloud:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        local_seconds = run(
            folder / "local.yaml", build_config(arguments.photographs, folder / "results", arguments.weights)
        )
        cloud.use(patch)
        upload(cloud, arguments.photographs)
        places = (f"s3://{BUCKET}/images", f"s3://{BUCKET}/results")
        interrupting = threading.Thread(target=interrupt_a_worker, args=(cloud,))
        interrupting.start()
        seconds = run(
            folder / "aws.yaml", build_config(*places, arguments.weights, cluster=describe_cluster(cloud), privacy={})
        )
        interrupting.join()
        is_quiet = cloud.wait_until_quiet(60)
        expected = np.asarray(zarr.open_group(folder / "results" / "features.zarr", mode="r")["features"])
        found = np.asarray(zarr.open_group(f"{places[1]}/features.zarr", mode="r")["features"])
        launched = len(cloud.instances(states=None))
        left = len(cloud.instances()), len(cloud.processes())
    difference = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    print(
        f"{n_images} photographs, {np.isfinite(found).all(axis=1).sum()} with features, {launched} instances launched"
    )
    print(f"{seconds:.1f} s in the cloud, {local_seconds:.1f} s here: ratio {seconds / local_seconds:.2f}")
    print(f"largest relative difference of an image's features: {difference.max():.1e}")
    print(f"left running: {left[0]} instances, {left[1]} processes; quiet within a minute: {is_quiet}")


if __name__ == "__main__":
    main()
