"""One cluster on the loopback EC2 in detail: its machines, their data and protection, and what it costs."""

import asyncio
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dask.config
import pytest
from cluster_events import PATIENCE_SECONDS
from ec2_clusters import check_nothing_left, configure, list_rules
from ec2_gateway import Call
from ec2_machines import LoopbackInstance
from iam_rules import is_allowed, list_questions_on_ec2
from loopback_ec2 import LoopbackEC2

import fruitdask
from fruitdask.cluster import list_usage, open_client
from fruitdask.cluster.cloud.prices import Usage
from fruitdask.cluster.ec2.policies import build_policies, list_actions
from fruitdask.core.config import EC2ClusterConfig

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8, and /proc"),
]

SECRET = "planted-4f1c"


@dataclass
class Run:
    """Observations of a run, during it and afterwards."""

    client: Any
    greeting: str | None
    threshold: str | None
    workers: list[dict[str, Any]]
    instances: list[LoopbackInstance]
    described: list[dict[str, Any]]
    volumes: list[dict[str, Any]]
    rules: list[tuple[int, int, str]]
    usage: list[Usage]
    global_tls: str | None
    config: EC2ClusterConfig
    calls: list[Call]


async def observe_run(cloud: LoopbackEC2) -> Run:
    """Start two workers inside a running event loop, as a notebook would, and observe them."""
    config = configure(
        region=cloud.region,
        n_workers=2,
        spot=True,
        env_vars={"GREETING": "good day: # 1"},
        extra_bootstrap=["echo 'a: b' # c"],
        instance_tags={"team": "fruits"},
        volume_tags={"cost": "42"},
    )
    with open_client(config) as client, cloud.client("ec2") as ec2:
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        reservations = ec2.describe_instances()["Reservations"]
        run = Run(
            client=client,
            greeting=client.submit(os.getenv, "GREETING").result(PATIENCE_SECONDS),
            threshold=client.submit(os.getenv, "MALLOC_TRIM_THRESHOLD_").result(PATIENCE_SECONDS),
            workers=list(client.scheduler_info(n_workers=-1)["workers"].values()),
            instances=cloud.instances(),
            described=[instance for reservation in reservations for instance in reservation["Instances"]],
            volumes=ec2.describe_volumes()["Volumes"],
            rules=list_rules(cloud),
            usage=list_usage(client),
            global_tls=dask.config.get("distributed.comm.tls.ca-file"),
            config=config,
            calls=[],
        )
    run.calls.extend(cloud.calls_by("client"))
    return run


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Observe a run, with a secret in the user's Dask settings."""
    with LoopbackEC2(grace_seconds=0.05) as cloud, pytest.MonkeyPatch.context() as patch:
        cloud.use(patch)
        with dask.config.set({"cloudprovider.digitalocean.token": SECRET}):
            run = asyncio.run(observe_run(cloud))
        check_nothing_left(cloud)
    yield run


@pytest.mark.slow
def test_cluster_computes(run: Run) -> None:
    """Tasks run on the instances with the configured environment, even if the client runs in an event loop."""
    assert run.greeting == "good day: # 1"
    # Dask's default is 64 kB.
    assert run.threshold == str(64 * 1024**2)
    assert [instance.role for instance in run.instances] == ["scheduler", "worker", "worker"]


@pytest.mark.slow
def test_cluster_uses_tls(run: Run) -> None:
    """All addresses use TLS, and the TLS settings do not affect other clusters in this process."""
    cluster = run.client.cluster
    assert cluster.scheduler_address == f"tls://{run.instances[0].address}:8786"
    assert all(worker["nanny"].startswith("tls://") for worker in run.workers)
    assert run.global_tls is None and cluster.security.require_encryption


@pytest.mark.slow
def test_scheduler_and_cluster_use_the_same_worker_names(run: Run) -> None:
    """The names must match, because the cluster asks the scheduler to retire workers by name."""
    names = {instance.tags["Name"] for instance in run.instances if instance.role == "worker"}
    assert {worker["name"] for worker in run.workers} == names


@pytest.mark.slow
def test_user_data_is_small_and_contains_no_secrets(run: Run) -> None:
    """User data contains only the Dask settings that the machines need, and stays far below EC2's limit."""
    for instance in run.instances:
        assert len(instance.user_data.encode()) < 8_000
        serialized = instance.user_data.partition('DASK_INTERNAL_INHERIT_CONFIG="')[2].partition('"')[0]
        settings = dask.config.deserialize(serialized)
        assert set(settings) == {"distributed"}
        assert set(settings["distributed"]) == {"admin", "comm", "scheduler", "worker"}
        assert settings["distributed"]["worker"] == {"profile": {"enabled": False}}
        assert SECRET not in instance.user_data + json.dumps(settings) and "LOOPBACK" not in instance.user_data
        assert settings["distributed"]["comm"]["tls"]["worker"]["key"].startswith("-----BEGIN PRIVATE KEY")


@pytest.mark.slow
def test_user_data_shuts_instances_down(run: Run) -> None:
    """Instances shut down after max_lifetime, after idle_timeout, and when their container ends."""
    for instance in run.instances:
        assert '"shutdown -h +720"' in instance.user_data and "- shutdown -h now" in instance.user_data
        assert "apt-get install -y docker.io" in instance.user_data and "download.docker.com" not in instance.user_data
        assert "\"echo 'a: b' # c\"" in instance.user_data and "--gpus" not in instance.user_data
    assert "--idle-timeout 1200s" in run.instances[0].user_data and "--no-dashboard" in run.instances[0].user_data
    assert all('"death_timeout": 1200' in instance.user_data for instance in run.instances[1:])


@pytest.mark.slow
def test_instances_are_tagged_at_launch(run: Run) -> None:
    """Instances and volumes have the tag of the run and the user's tags."""
    ids = {instance.tags["fruitdask:run"] for instance in run.instances}
    assert len(ids) == 1
    for tags in [instance.tags for instance in run.instances]:
        assert tags["team"] == "fruits" and tags["fruitdask:started"].endswith("+00:00")
    for volume in run.volumes:
        tags = {tag["Key"]: tag["Value"] for tag in volume["Tags"]}
        assert tags["fruitdask:run"] in ids and tags["cost"] == "42"
    assert "CreateTags" not in {call.action for call in run.calls}


@pytest.mark.slow
def test_volumes_are_encrypted_and_metadata_requires_tokens(run: Run) -> None:
    """Each instance has a single, encrypted volume, and version 1 of the metadata service is disabled."""
    assert len(run.volumes) == 3 and all(volume["Encrypted"] for volume in run.volumes)
    assert {volume["Size"] for volume in run.volumes} == {40}
    for instance in run.described:
        assert [mapping["DeviceName"] for mapping in instance["BlockDeviceMappings"]] == [instance["RootDeviceName"]]
        assert instance["MetadataOptions"]["HttpTokens"] == "required"


@pytest.mark.slow
def test_security_group_admits_only_this_machine(run: Run) -> None:
    """The security group admits this machine to the scheduler only, and only during the run."""
    assert run.rules == [(8786, 8786, "127.0.0.1/32")]
    assert "RevokeSecurityGroupIngress" in {call.action for call in run.calls}


@pytest.mark.slow
def test_policy_allows_the_requests_to_ec2(run: Run) -> None:
    """The policy allows every request that the launcher sends, and little else."""
    places = {"input": {"url": "s3://photos"}, "output": {"url": "s3://results"}}
    config = fruitdask.load_config(places | {"cluster": run.config.model_dump()})
    policy = build_policies(config)["launcher"]
    questions = [
        question
        for call in run.calls
        if call.service == "ec2"
        for question in list_questions_on_ec2(call.action, dict(re.findall(r"(\S+?)=(\S*)", call.summary)))
    ]
    assert [question for question in questions if not is_allowed(policy, *question)] == []
    actions = {need.action for need in list_actions(config) if need.action.startswith("ec2:")}
    # This permission is used only if an instance does not start.
    assert actions - {question[0] for question in questions} == {"ec2:GetConsoleOutput"}


@pytest.mark.slow
def test_usage_is_known_after_the_cluster_has_ended(run: Run) -> None:
    """Usage has one entry per instance, and no longer changes once the cluster has ended."""
    after = list_usage(run.client)
    assert [(one.instance_type, one.is_spot, one.region) for one in after] == [
        ("t3.medium", False, "eu-west-1"),
        ("m6i.large", True, "eu-west-1"),
        ("m6i.large", True, "eu-west-1"),
    ]
    assert all(0 < early.seconds < late.seconds < 120 for early, late in zip(run.usage, after, strict=True))
    assert list_usage(run.client) == after
