"""A whole run: images in S3, a cluster on a loopback EC2 that loses a worker, results in S3, nothing left running."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import s3fs
import yaml
import zarr
from commands import CommandHost
from loopback_ec2 import LoopbackEC2
from runs import Finish, configure

from fruitdask.core.config import ModelConfig
from fruitdask.core.sample import draw_sample

pytestmark = [pytest.mark.cloud, pytest.mark.slow]

N_IMAGES = 30
BUCKET = "fruits"


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackEC2]:
    """A loopback EC2, and S3."""
    with LoopbackEC2() as cloud:
        cloud.use(monkeypatch)
        yield cloud


def upload(cloud: LoopbackEC2, folder: Path) -> None:
    """Put images into a bucket."""
    with cloud.client("s3") as s3:
        s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": cloud.region})
        for path in folder.rglob("*.jpg"):
            s3.upload_file(str(path), BUCKET, f"images/{path.relative_to(folder).as_posix()}")


def describe_cluster(cloud: LoopbackEC2) -> dict[str, Any]:
    """Describe two workers on spot instances."""
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


def interrupt_a_worker(cloud: LoopbackEC2) -> None:
    """Interrupt a worker as soon as a partition is stored."""
    mark = f"{BUCKET}/results/partitions/"
    with cloud.changed:
        while not any(call.action == "PutObject" and call.summary.startswith(mark) for call in cloud.calls):
            cloud.changed.wait(0.1)
    worker = next(instance for instance in cloud.instances() if instance.role == "worker")
    cloud.interrupt(worker.id)


def test_run_on_ec2_survives_an_interruption(
    cloud: LoopbackEC2, tiny_model: ModelConfig, commands: CommandHost, finish: Finish, tmp_path: Path
) -> None:
    draw_sample(tmp_path / "images", per_class=N_IMAGES // 6, size_px=64)
    upload(cloud, tmp_path / "images")
    config = configure(
        f"s3://{BUCKET}/images",
        f"s3://{BUCKET}/results",
        tiny_model,
        cluster=describe_cluster(cloud),
        featurize={"images_per_partition": 2},
        privacy={"allowed_regions": ["eu-west-1"]},
        limits={"max_cost": 1},
    )
    path = tmp_path / "aws.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    with open(tmp_path / "log", "w") as log:
        process = commands.start("run", str(path), stdout=log, stderr=log)
    interrupt_a_worker(cloud)
    code, printed = process.wait(300), (tmp_path / "log").read_text()
    assert code == 0, printed
    assert f"{N_IMAGES} ok, 0 failed" in printed and "cost" in printed
    assert cloud.wait_until_quiet(30)
    launched = [instance.role for instance in cloud.instances(states=None)]
    assert launched.count("scheduler") == 1 and launched.count("worker") >= 2

    local = finish(configure(tmp_path / "images", tmp_path / "results", tiny_model))
    there = zarr.open_group(f"s3://{BUCKET}/results/features.zarr", mode="r")
    np.testing.assert_allclose(np.asarray(there["features"]), local.features.compute(), rtol=1e-6, atol=1e-6)
    with s3fs.S3FileSystem(endpoint_url=cloud.endpoint_url).open(f"{BUCKET}/results/results.csv") as table:
        assert list(pd.read_csv(table)["path"]) == list(local.table["path"])
