"""The whole way: photographs in S3, a cluster on (a loopback) EC2 that loses a worker, results in S3, nothing left."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import s3fs
import yaml
import zarr
from loopback_ec2 import LoopbackEC2

from fruitdask.core.config import Config, load_config
from fruitdask.pipeline.run import run

pytestmark = [pytest.mark.cloud, pytest.mark.slow]

N_IMAGES = 160
EXTRAS = {name: {"enabled": False} for name in ("explore", "quality", "plots", "report")}


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackEC2]:
    with LoopbackEC2() as cloud:
        cloud.use(monkeypatch)
        yield cloud


def build_config(photographs: Path | str, output: Path | str, weights: Path, **sections: Any) -> dict[str, Any]:
    return {
        "input": {"url": str(photographs)},
        "model": {"weights": str(weights), "engine": "openvino"},
        "featurize": {"images_per_partition": 8},
        "output": {"url": str(output)},
        **EXTRAS,
        **sections,
    }


def upload(cloud: LoopbackEC2, photographs: Path, n_images: int, bucket: str) -> None:
    paths = sorted(photographs.glob("*/*.jpg"))
    with cloud.client("s3") as s3:
        s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": cloud.region})
        for path in paths[:: max(1, len(paths) // n_images)][:n_images]:
            s3.put_object(Bucket=bucket, Key=f"photographs/{path.parent.name}/{path.name}", Body=path.read_bytes())


def describe_cluster(cloud: LoopbackEC2) -> dict[str, Any]:
    return {
        "kind": "ec2",
        "region": cloud.region,
        "n_workers": 2,
        "docker_image": "fruitdask:test",
        "ami": cloud.ami,
        "subnet_id": cloud.subnet_id,
        "security_groups": [cloud.security_group_id],
        "spot": True,
        "worker_options": {"nthreads": 1},
    }


def interrupt_a_worker(cloud: LoopbackEC2, bucket: str) -> None:
    """Take a worker away as soon as a partition is stored."""
    with cloud.client("s3") as s3, cloud.changed:
        while not s3.list_objects_v2(Bucket=bucket, Prefix="results/partitions/").get("KeyCount"):
            cloud.changed.wait(0.1)
    worker = next(instance for instance in cloud.instances() if instance.role == "worker")
    cloud.interrupt(worker.id)


def test_run_on_ec2_survives_an_interruption(
    cloud: LoopbackEC2, photographs: Path, mobilenet_weights: Path, tmp_path: Path
) -> None:
    bucket = "fruits"
    upload(cloud, photographs, N_IMAGES, bucket)
    sections = build_config(
        f"s3://{bucket}/photographs",
        f"s3://{bucket}/results",
        mobilenet_weights,
        cluster=describe_cluster(cloud),
        privacy={"allowed_regions": ["eu-west-1"]},
        limits={"max_cost": 1},
    )
    path = tmp_path / "aws.yaml"
    path.write_text(yaml.safe_dump(sections))
    command = [sys.executable, "-m", "fruitdask", "run", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    interrupt_a_worker(cloud, bucket)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert f"{N_IMAGES} ok, 0 failed" in printed and "cost" in printed
    assert cloud.wait_until_quiet(30)
    launched = [instance.role for instance in cloud.instances(states=None)]
    assert launched.count("scheduler") == 1 and launched.count("worker") >= 2

    files = s3fs.S3FileSystem(endpoint_url=cloud.endpoint_url)
    local = run(make_local(photographs, files.find(f"{bucket}/photographs"), mobilenet_weights, tmp_path))
    there = zarr.open_group(f"s3://{bucket}/results/features.zarr", mode="r")
    np.testing.assert_allclose(np.asarray(there["features"]), local.features.compute(), rtol=1e-6, atol=1e-6)
    with files.open(f"{bucket}/results/results.csv") as table:
        assert list(pd.read_csv(table)["path"]) == list(local.table["path"])


def make_local(photographs: Path, keys: list[str], weights: Path, folder: Path) -> Config:
    """Describe a run of the same images on this machine, from disk."""
    names = ["/".join(key.split("/")[-2:]) for key in keys]
    manifest = folder / "manifest.csv"
    pd.DataFrame({"path": names, "label": [name.split("/")[0] for name in names]}).to_csv(manifest, index=False)
    sections = build_config(photographs, folder / "results", weights)
    sections["input"]["manifest"] = str(manifest)
    return load_config(sections | {"cluster": {"n_workers": 2}})
