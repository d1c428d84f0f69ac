"""Instances of runs are found by their tag, and terminated until none is left."""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from ec2_gateway import Call, Refusal
from loopback_ec2 import LoopbackEC2

from fruitdask.cluster.ec2.instances import list_instances, terminate_run
from fruitdask.core.aws import RUN_TAG
from fruitdask.errors import ClusterStartError

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.skipif(sys.platform != "linux", reason="the loopback EC2 needs all of 127.0.0.0/8, and /proc"),
]

SLEEP = "#cloud-config\nruncmd:\n  - docker run any sleep 600\n"


class LateEC2(LoopbackEC2):
    """A loopback EC2 in which another instance of a run appears while its instances are being terminated."""

    def note(self, caller: str, call: Call) -> None:
        """Launch it at the first request to terminate."""
        is_first = call.action == "TerminateInstances" and call.action not in [seen.action for seen in self.calls]
        super().note(caller, call)
        if is_first:
            launch(self, "run-1")


@pytest.fixture
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackEC2]:
    """Start a loopback EC2, of the class that the test gives."""
    with getattr(request, "param", LoopbackEC2)() as cloud:
        cloud.use(monkeypatch)
        yield cloud


def launch(
    cloud: LoopbackEC2, run_id: str | None, *, n_instances: int = 1, name: str = "", **options: Any
) -> list[str]:
    """Launch instances as EC2Cluster does, with or without the tag of a run; returns their ids."""
    tags = {"creator": "somebody", "Name": name} | ({RUN_TAG: run_id} if run_id else {})
    specification = {"ResourceType": "instance", "Tags": [{"Key": key, "Value": tags[key]} for key in tags]}
    with cloud.client("ec2") as client:
        answer = client.run_instances(
            ImageId=cloud.ami,
            SubnetId=cloud.subnet_id,
            MinCount=n_instances,
            MaxCount=n_instances,
            UserData=SLEEP,
            TagSpecifications=[specification],
            **{"InstanceType": "t3.medium", **options},
        )
    return [entry["InstanceId"] for entry in answer["Instances"]]


def test_list_instances_describes_only_instances_of_runs(cloud: LoopbackEC2) -> None:
    [scheduler] = launch(cloud, "run-1", name="dask-8f2a-scheduler")
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}, "InstanceType": "m6i.large"}
    [worker] = launch(cloud, "run-2", name="dask-8f2a-worker-1", **spot)
    launch(cloud, None)
    first, second = sorted(list_instances(cloud.region), key=lambda one: one.run_id)
    assert (first.id, first.run_id, first.role, first.instance_type) == (scheduler, "run-1", "scheduler", "t3.medium")
    assert (second.id, second.run_id, second.role, second.instance_type) == (worker, "run-2", "worker", "m6i.large")
    assert (first.is_spot, second.is_spot, second.region) == (False, True, cloud.region)
    assert first.state in ("pending", "running") and not first.is_ending
    assert first.tags["creator"] == "somebody"
    assert abs(datetime.now(UTC) - first.launched_at) < timedelta(minutes=1)
    assert first.age_seconds == pytest.approx((datetime.now(UTC) - first.launched_at).total_seconds(), abs=1)
    assert [one.id for one in list_instances(None, run_id="run-2")] == [worker]


def test_terminate_run_ends_only_the_instances_of_the_run(cloud: LoopbackEC2) -> None:
    ended = launch(cloud, "run-1", n_instances=3)
    others = launch(cloud, "run-2") + launch(cloud, None)
    assert sorted(terminate_run(cloud.region, "run-1")) == sorted(ended)
    assert sorted(one.id for one in cloud.instances()) == sorted(others)
    assert all(one.is_ending for one in list_instances(cloud.region, run_id="run-1"))
    assert terminate_run(cloud.region, "run-1") == []


@pytest.mark.parametrize("cloud", [LateEC2], indirect=True)
def test_terminate_run_finds_an_instance_that_appears_late(cloud: LoopbackEC2) -> None:
    [early] = launch(cloud, "run-1")
    first, second = terminate_run(cloud.region, "run-1")
    assert first == early and second != early
    assert cloud.instances() == []


def test_terminate_run_retries_while_ec2_does_not_know_the_instance(cloud: LoopbackEC2) -> None:
    ids = launch(cloud, "run-1")
    cloud.faults.refusals.append(Refusal("InvalidInstanceID.NotFound", "TerminateInstances", count=1, status=400))
    assert terminate_run(cloud.region, "run-1") == ids
    assert cloud.instances() == []


def test_terminate_run_without_permission_names_what_may_be_left(cloud: LoopbackEC2) -> None:
    launch(cloud, "run-1")
    cloud.faults.refusals.append(Refusal("UnauthorizedOperation", "TerminateInstances"))
    expected = (
        "cannot terminate the instances of run run-1, which may still be running: TerminateInstances: .*iam-policy"
    )
    with pytest.raises(ClusterStartError, match=expected):
        terminate_run(cloud.region, "run-1")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_PROFILE": "nobody"}, "the instances of fruitdask: .*nobody.*: there is no such profile"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "found no AWS credentials; log in"),
        ({"AWS_DEFAULT_REGION": None, "AWS_REGION": None}, "no AWS region is set; give cluster.region"),
    ],
    ids=["no such profile", "no credentials", "no region"],
)
def test_list_instances_explains_what_is_missing(
    cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str | None], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ClusterStartError, match=message):
        list_instances(None)
