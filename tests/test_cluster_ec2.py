"""Clusters on EC2, on the loopback EC2: real schedulers and workers over TLS. Whatever happens, nothing is left
running.
"""

import asyncio
import contextlib
import json
import operator
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import dask.config
import dask_cloudprovider.config  # noqa: F401  Its defaults come first: a setting that makes their section takes them along when it goes.
import pytest
from cluster_events import ENDS, PATIENCE_SECONDS, end_in_the_middle, interrupt_self, make_slow_square, wait_until
from distributed import wait
from loopback_ec2 import LoopbackEC2, LoopbackInstance, Refusal

from fruitdask.cluster import list_usage, open_client
from fruitdask.cluster.cloud.prices import Usage
from fruitdask.cluster.ec2.instances import terminate_run
from fruitdask.cluster.ec2.network import find_network
from fruitdask.core.config import AdaptiveConfig, EC2ClusterConfig
from fruitdask.errors import ClusterStartError, ConfigError

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8, and /proc"),
]

SECRET = "planted-4f1c"


def configure(**options: Any) -> EC2ClusterConfig:
    """Describe a cluster of one worker."""
    defaults = {"docker_image": "any", "client_cidr": "127.0.0.1/32", "n_workers": 1, "worker_options": {"nthreads": 1}}
    return EC2ClusterConfig(kind="ec2", **defaults | options)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackEC2]:
    """An EC2 on which nothing may be left."""
    with LoopbackEC2() as cloud:
        cloud.use(monkeypatch)
        yield cloud
        check_nothing_left(cloud)


def check_nothing_left(cloud: LoopbackEC2) -> None:
    """Make sure that no instance, process, rule or setting of TLS is left."""
    assert cloud.wait_until_quiet(PATIENCE_SECONDS), [cloud.log(instance.id) for instance in cloud.instances()]
    assert cloud.instances() == [] and cloud.processes() == [] and cloud.leaks == []
    assert list_rules(cloud) == []
    assert dask.config.get("distributed.comm.tls.ca-file") is None
    assert not dask.config.get("distributed.comm.require-encryption")


def list_rules(cloud: LoopbackEC2) -> list[tuple[int, int, str]]:
    """List the ranges of addresses that the security group of fruitdask lets in, and to which ports."""
    filters = [{"Name": "group-name", "Values": ["fruitdask"]}]
    with cloud.client("ec2") as client:
        groups = client.describe_security_groups(Filters=filters)["SecurityGroups"]
    return [
        (rule["FromPort"], rule["ToPort"], entry["CidrIp"])
        for group in groups
        for rule in group["IpPermissions"]
        for entry in rule["IpRanges"]
    ]


def drop_rules(cloud: LoopbackEC2) -> None:
    """Drop the rules of the security group that nobody was there any more to take back."""
    filters = [{"Name": "group-name", "Values": ["fruitdask"]}]
    with cloud.client("ec2") as client:
        for group in client.describe_security_groups(Filters=filters)["SecurityGroups"]:
            client.revoke_security_group_ingress(GroupId=group["GroupId"], IpPermissions=group["IpPermissions"])


def on_call(cloud: LoopbackEC2, patch: pytest.MonkeyPatch, action: str, n: int, do: Callable[[], Any]) -> None:
    """Do something before the n-th call of an action is answered."""
    note, seen = cloud.note, []

    def note_and_do(caller: str, call: Any) -> None:
        note(caller, call)
        if call.action == action:
            seen.append(call)
            if len(seen) == n:
                do()

    patch.setattr(cloud, "note", note_and_do)


@dataclass
class Run:
    """What could be seen of a run while it lasted, and afterwards."""

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
    actions: set[str]


async def observe_run(cloud: LoopbackEC2) -> Run:
    """Start two workers within a running event loop, as a notebook would, and look around."""
    config = configure(
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
            actions=set(),
        )
    run.actions.update(call.action for call in cloud.calls)
    return run


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """A run, with a secret in the user's settings of Dask, of which nothing is left."""
    with LoopbackEC2() as cloud, pytest.MonkeyPatch.context() as patch:
        cloud.use(patch)
        with dask.config.set({"cloudprovider.digitalocean.token": SECRET}):
            run = asyncio.run(observe_run(cloud))
        check_nothing_left(cloud)
    yield run


@pytest.mark.slow
def test_cluster_computes(run: Run) -> None:
    """Tasks run on the instances, with the environment of the configuration, in an event loop as in a script."""
    assert run.greeting == "good day: # 1"
    # Dask would have 64 kB.
    assert run.threshold == str(64 * 1024**2)
    assert [instance.role for instance in run.instances] == ["scheduler", "worker", "worker"]


@pytest.mark.slow
def test_cluster_talks_tls(run: Run) -> None:
    """All addresses are TLS ones, and the settings never were those of other clusters of this process."""
    cluster = run.client.cluster
    assert cluster.scheduler_address == f"tls://{run.instances[0].address}:8786"
    assert all(worker["nanny"].startswith("tls://") for worker in run.workers)
    assert run.global_tls is None and cluster.security.require_encryption


@pytest.mark.slow
def test_workers_have_names_that_the_cluster_knows(run: Run) -> None:
    """By these names the scheduler can be asked to retire them."""
    names = {instance.tags["Name"] for instance in run.instances if instance.role == "worker"}
    assert {worker["name"] for worker in run.workers} == names


@pytest.mark.slow
def test_user_data_are_small_and_hold_no_secrets(run: Run) -> None:
    """Of the settings of Dask only those of TLS travel."""
    for instance in run.instances:
        assert len(instance.user_data.encode()) < 8_000
        serialized = instance.user_data.partition('DASK_INTERNAL_INHERIT_CONFIG="')[2].partition('"')[0]
        settings = dask.config.deserialize(serialized)
        assert set(settings) == {"distributed"} and set(settings["distributed"]) == {"admin", "comm", "scheduler"}
        assert SECRET not in instance.user_data + json.dumps(settings) and "LOOPBACK" not in instance.user_data
        assert settings["distributed"]["comm"]["tls"]["worker"]["key"].startswith("-----BEGIN PRIVATE KEY")


@pytest.mark.slow
def test_user_data_end_instances(run: Run) -> None:
    """After max_lifetime, after idle_timeout, and after the container; the image's own Docker, or Ubuntu's."""
    for instance in run.instances:
        assert '"shutdown -h +720"' in instance.user_data and "- shutdown -h now" in instance.user_data
        assert "apt-get install -y docker.io" in instance.user_data and "download.docker.com" not in instance.user_data
        assert "\"echo 'a: b' # c\"" in instance.user_data and "--gpus" not in instance.user_data
    assert "--idle-timeout 1200s" in run.instances[0].user_data and "--no-dashboard" in run.instances[0].user_data
    assert all('"death_timeout": 1200' in instance.user_data for instance in run.instances[1:])


@pytest.mark.slow
def test_instances_are_tagged_at_launch(run: Run) -> None:
    """Instances and volumes carry the tags of the run and the user's."""
    ids = {instance.tags["fruitdask:run"] for instance in run.instances}
    assert len(ids) == 1
    for tags in [instance.tags for instance in run.instances]:
        assert tags["team"] == "fruits" and tags["fruitdask:started"].endswith("+00:00")
    for volume in run.volumes:
        tags = {tag["Key"]: tag["Value"] for tag in volume["Tags"]}
        assert tags["fruitdask:run"] in ids and tags["cost"] == "42"
    assert "CreateTags" not in run.actions


@pytest.mark.slow
def test_volumes_are_encrypted_and_metadata_need_tokens(run: Run) -> None:
    """Each instance has one volume, the image's root, encrypted; the metadata service's first version is off."""
    assert len(run.volumes) == 3 and all(volume["Encrypted"] for volume in run.volumes)
    assert {volume["Size"] for volume in run.volumes} == {40}
    for instance in run.described:
        assert [mapping["DeviceName"] for mapping in instance["BlockDeviceMappings"]] == [instance["RootDeviceName"]]
        assert instance["MetadataOptions"]["HttpTokens"] == "required"


@pytest.mark.slow
def test_security_group_admits_this_machine_alone(run: Run) -> None:
    """While it runs, and to the scheduler only."""
    assert run.rules == [(8786, 8786, "127.0.0.1/32")]
    assert "RevokeSecurityGroupIngress" in run.actions


@pytest.mark.slow
def test_usage_is_known_also_after_the_end(run: Run) -> None:
    """One entry an instance, which stands still after the end."""
    after = list_usage(run.client)
    assert [(one.instance_type, one.is_spot, one.region) for one in after] == [
        ("t3.medium", False, "eu-west-1"),
        ("m6i.large", True, "eu-west-1"),
        ("m6i.large", True, "eu-west-1"),
    ]
    assert all(0 < early.seconds < late.seconds < 120 for early, late in zip(run.usage, after, strict=True))
    assert list_usage(run.client) == after


def test_list_usage_is_empty_elsewhere(client: Any) -> None:
    """A cluster on this machine costs nothing."""
    assert list_usage(client) == []


@pytest.mark.slow
def test_scheduler_that_never_comes_up(cloud: LoopbackEC2) -> None:
    """The start has a deadline, and the error says what to look at."""
    cloud.faults.never_boots = {"scheduler"}
    expected = (
        r"scheduler did not start within cluster.start_timeout \(6 s\): instance i-\w+ \(t3.medium, image any, ami-\w+\) is running.*"
        r"its console ends: .*security groups sg-\w+ admit this machine \(port 8786\).*subnet-"
    )
    with pytest.raises(ClusterStartError, match=expected):
        with open_client(configure(start_timeout=6)):
            pass
    assert [instance.role for instance in cloud.instances(None)] == ["scheduler"]


@pytest.mark.slow
def test_image_that_cannot_be_pulled(cloud: LoopbackEC2) -> None:
    """It is noticed by the end of the instance, long before the deadline."""
    cloud.faults.unpullable = {"nobody/nothing:1"}
    expected = r"scheduler ended before it started to listen: .*nobody/nothing:1.* is \S+ \(.*Instance initiated shutdown\).*pull"
    with pytest.raises(ClusterStartError, match=expected):
        with open_client(configure(docker_image="nobody/nothing:1")):
            pass


@pytest.mark.slow
def test_workers_that_never_come_up(cloud: LoopbackEC2) -> None:
    """The same deadline holds for the first worker."""
    cloud.faults.never_boots = {"worker"}
    with pytest.raises(
        ClusterStartError, match=r"no worker started within .*\(5 s\): instance i-\w+ \(m6i.large.*is running"
    ):
        with open_client(configure(start_timeout=5)):
            pass


@pytest.mark.parametrize(
    ("role", "code", "expected"),
    [
        pytest.param(
            "scheduler", "InsufficientInstanceCapacity", "did not start: RunInstances: .*no capacity", id="capacity"
        ),
        pytest.param("scheduler", "UnauthorizedOperation", "did not start: RunInstances: .*iam-policy", id="denied"),
        pytest.param(
            "worker",
            "VcpuLimitExceeded",
            "no worker could be started: RunInstances.*quota",
            id="quota",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "worker",
            "InsufficientInstanceCapacity",
            "no worker could be .*no capacity",
            id="worker-capacity",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_refused_launches(cloud: LoopbackEC2, role: str, code: str, expected: str) -> None:
    """What AWS refuses is said in words, at once."""
    cloud.faults.refusals.append(Refusal(code, role=role))
    with pytest.raises(ClusterStartError, match=expected):
        with open_client(configure(n_workers=2)):
            pass


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        pytest.param({"ami": "ami-0123456789abcdef0"}, {}, "InvalidAMIID.*check cluster.ami", id="image"),
        pytest.param({"instance_type": "m6i.huge"}, {}, "no instance type m6i.huge in eu-west-1", id="type"),
        pytest.param(
            {"worker_instance_type": "hpc7a.12xlarge"}, {}, "eu-west-1a does not offer the instance", id="zone"
        ),
        pytest.param(
            {}, {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no AWS credentials", id="credentials"
        ),
        pytest.param({}, {"AWS_PROFILE": "nobody"}, "no such profile", id="profile"),
        pytest.param({}, {"AWS_DEFAULT_REGION": None, "AWS_REGION": None}, "give cluster.region", id="region"),
        pytest.param({"vpc": "vpc-0123456789abcdef0"}, {}, "VPC vpc-0123456789abcdef0 has no subnet", id="vpc"),
        pytest.param({"subnet_id": "subnet-0123456789abcdef0"}, {}, "check cluster.subnet_id", id="subnet"),
        pytest.param(
            {"availability_zone": ["eu-west-1z"]}, {}, r"no subnet in eu-west-1z \(zones: eu-west-1a, ", id="nozone"
        ),
        pytest.param(
            {"client_cidr": None}, {"https_proxy": "http://127.0.0.1:9"}, "set cluster.client_cidr", id="address"
        ),
        pytest.param(
            {"env_vars": {f"X{n}": "x" * 500 for n in range(40)}},
            {},
            r"24,\d+ bytes.*cluster.env_vars: 20,",
            id="user data",
        ),
    ],
)
def test_what_is_not_there(
    cloud: LoopbackEC2,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    environment: dict[str, str | None],
    expected: str,
) -> None:
    """Nothing is launched, and one sentence says what is missing."""
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.delenv(name) if value is None else patch.setenv(name, value)
        with pytest.raises(ClusterStartError, match=expected) as caught:
            with open_client(configure(**options)):
                pass
    assert "NoneType" not in str(caught.value)
    assert cloud.instances(None) == []


def test_expired_credentials(cloud: LoopbackEC2) -> None:
    """The first question to EC2 finds out."""
    cloud.faults.refusals.append(Refusal("RequestExpired", action="DescribeVpcs"))
    with pytest.raises(ClusterStartError, match="log in again"):
        with open_client(configure()):
            pass


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"env_vars": {"A": 'say "a"'}}, "the value of A has a quote", id="quote"),
        pytest.param({"env_vars": {"A": "`id`"}}, "the value of A has", id="backquote"),
        pytest.param({"env_vars": {"A": "$HOME"}}, "the value of A has", id="dollar"),
        pytest.param({"env_vars": {"A": "a\nb"}}, "the value of A has", id="newline"),
        pytest.param({"env_vars": {"A": "c:\\"}}, "the value of A has", id="backslash"),
        pytest.param({"env_vars": {"A B": "1"}}, "'A B' is not a name", id="name"),
        pytest.param(
            {"env_vars": {"AWS_SECRET_ACCESS_KEY": "1"}}, "AWS_SECRET_ACCESS_KEY looks like.*iam_instance", id="key"
        ),
        pytest.param({"env_vars": {"AWS_SESSION_TOKEN": "1"}}, "iam_instance_profile", id="token"),
        pytest.param({"env_vars": {"db_password": "1"}}, "db_password looks like a credential", id="password"),
        pytest.param({"docker_args": "-v '/a b:/a'"}, "cluster.docker_args: expected no single quote", id="arguments"),
        pytest.param({"worker_options": {"preload": "a\nb"}}, "cluster.worker_options", id="line break"),
        pytest.param({"client_cidr": "127.0.0.1/8"}, "cluster.client_cidr: expected addresses", id="cidr"),
    ],
)
def test_refused_options(cloud: LoopbackEC2, options: dict[str, Any], expected: str) -> None:
    """What would break on the way to an instance is refused before anything is asked of AWS that costs."""
    with pytest.raises(ConfigError, match=expected):
        with open_client(configure(**options)):
            pass
    assert not any(call.action.startswith(("Run", "Create")) for call in cloud.calls)


def test_tokenizers_are_no_tokens(cloud: LoopbackEC2) -> None:
    """A setting of a well-known library passes; that there is no such image ends it here."""
    with pytest.raises(ClusterStartError, match="check cluster.ami"):
        with open_client(configure(env_vars={"TOKENIZERS_PARALLELISM": "false"}, ami="ami-0123456789abcdef0")):
            pass


@pytest.mark.slow
def test_start_goes_on_with_the_first_worker(cloud: LoopbackEC2) -> None:
    """A spot worker that AWS refuses is tried again; the run does not wait for it."""
    cloud.faults.refusals.append(Refusal("MaxSpotInstanceCountExceeded", is_spot=True, count=1))
    with open_client(configure(n_workers=2, spot=True)) as client:
        assert len(client.scheduler_info()["workers"]) == 1
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        assert [instance.is_spot for instance in cloud.instances()] == [False, True, True]


@pytest.mark.parametrize("n", [pytest.param(1, id="scheduler"), pytest.param(2, id="worker", marks=pytest.mark.slow)])
def test_ctrl_c_while_an_instance_is_being_launched(
    cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch, ending: threading.Event, n: int
) -> None:
    """A launch that EC2 has been asked for does not escape, even if it is answered after a look that shows nothing."""

    def interrupt() -> None:
        interrupt_self()
        assert ending.wait(PATIENCE_SECONDS)
        # Several looks, each of which shows nothing.
        time.sleep(1)

    on_call(cloud, monkeypatch, "RunInstances", n, interrupt)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        with open_client(configure()):
            pass
    assert len(cloud.instances(None)) == n


def test_ctrl_c_while_the_scheduler_comes_up(cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting can be interrupted, and typing Ctrl-C once more does not keep instances alive."""
    cloud.faults.never_boots = {"scheduler"}
    on_call(cloud, monkeypatch, "DescribeInstances", 3, interrupt_self)
    on_call(cloud, monkeypatch, "TerminateInstances", 1, interrupt_self)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        with open_client(configure()):
            pass
    assert len(cloud.instances(None)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("what", "expected"), ENDS)
def test_end_in_the_middle(cloud: LoopbackEC2, what: Callable[[], None], expected: type[BaseException]) -> None:
    """While tasks run."""
    end_in_the_middle(open_client(configure()), what, expected)


@pytest.mark.slow
def test_killed_client(cloud: LoopbackEC2, tmp_path: Path) -> None:
    """Instances end by themselves when nobody is there any more to end them."""
    script = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from fruitdask.cluster import open_client
from fruitdask.core.config import EC2ClusterConfig
config = EC2ClusterConfig(kind="ec2", docker_image="any", client_cidr="127.0.0.1/32", n_workers=1, idle_timeout=8)
if __name__ == "__main__":
    with open_client(config) as client:
        futures = client.map(time.sleep, [0.05 + n / 1e6 for n in range(10_000)])
        futures[0].result()
        print("computing", flush=True)
        client.gather(futures)
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "computing\n"
        assert len(cloud.instances()) == 2
        process.kill()
    assert cloud.wait_until_quiet(PATIENCE_SECONDS)
    drop_rules(cloud)
    assert {instance.state_reason for instance in cloud.instances(None)} == {"Client.InstanceInitiatedShutdown"}


@pytest.mark.slow
def test_instances_that_cannot_be_terminated_are_named(cloud: LoopbackEC2) -> None:
    """Whoever pays for them is told which they are, and what to do."""
    refusal = Refusal("UnauthorizedOperation", action="TerminateInstances")
    expected = r"i-\w+, i-\w+ of run \w+ may still run.*\(UnauthorizedOperation\).*fruitdask clusters cleanup --region eu-west-1"
    with pytest.raises(ClusterStartError, match=expected) as caught:
        with open_client(configure()):
            cloud.faults.refusals.append(refusal)
    assert all(instance.id in str(caught.value) for instance in cloud.instances())
    cloud.faults.refusals.clear()
    assert len(terminate_run(cloud.region, cloud.instances()[0].tags["fruitdask:run"])) == 2
    drop_rules(cloud)


@pytest.mark.slow
def test_interrupted_worker_is_replaced(cloud: LoopbackEC2) -> None:
    """All results are there, although a worker went in the middle, and another came for it."""
    with open_client(configure(n_workers=2, spot=True)) as client:
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        futures = client.map(make_slow_square(), range(24))
        victim = cloud.instances()[-1].id
        wait(futures[:6], timeout=PATIENCE_SECONDS)
        cloud.interrupt(victim)
        assert client.gather(futures) == [number**2 for number in range(24)]
        wait_until(lambda: len(cloud.instances()) == 3, "another worker is launched")
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        assert victim not in {instance.id for instance in cloud.instances()}
    assert len(list_usage(client)) == 4


@pytest.mark.slow
def test_scaling_down_loses_nothing(cloud: LoopbackEC2) -> None:
    """Data that nobody could compute again are handed over to the worker that stays."""
    with open_client(configure(n_workers=2)) as client:
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        futures = client.scatter(list(range(24)))
        assert len(client.has_what()) == 2 and all(client.has_what().values())
        client.cluster.scale(1)
        wait_until(lambda: len(cloud.instances()) == 2, "a worker is terminated")
        assert client.gather(futures) == list(range(24))
        assert len(client.scheduler_info()["workers"]) == 1


@pytest.mark.slow
def test_adaptive_cluster_grows_and_shrinks(cloud: LoopbackEC2) -> None:
    """Workers come with the work and go with it; their results stay."""
    with open_client(configure(adaptive=AdaptiveConfig(minimum=1, maximum=2))) as client:
        futures = client.map(make_slow_square(), range(100))
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        data = client.scatter(list(range(24)))
        client.cancel(futures)
        # As it is, a worker is kept for a minute without work.
        client.cluster.adapt(interval="100ms", wait_count=2)
        wait_until(lambda: len(cloud.instances()) == 2, "a worker is terminated")
        assert client.gather(data) == list(range(24))


@pytest.mark.slow
def test_instances_that_ended_by_themselves(cloud: LoopbackEC2) -> None:
    """Closing what is gone, as after max_lifetime, is no error, and nothing is launched for a scheduler that is gone."""
    with open_client(configure()) as client:
        for instance in cloud.instances():
            cloud.interrupt(instance.id)
        assert cloud.wait_until_quiet(PATIENCE_SECONDS)
        wait_until(lambda: not client.cluster.list_running(), "the ends are noticed")
    assert len(list_usage(client)) == 2


@pytest.mark.slow
def test_gpus_and_modules(cloud: LoopbackEC2) -> None:
    """Only workers of a type with a GPU are given it; a dashboard is there for those who ask; a module runs the
    workers.
    """
    config = configure(
        ami=cloud.ami,
        worker_instance_type="g4dn.xlarge",
        worker_module="distributed.cli.dask_worker",
        scheduler_options={"dashboard_address": "127.0.0.1:0", "idle_timeout": "1h"},
    )
    with open_client(config) as client:
        scheduler, worker = cloud.instances()
        assert client.submit(operator.add, 40, 2).result(PATIENCE_SECONDS) == 42
        assert "--gpus=all" in worker.user_data and "--gpus" not in scheduler.user_data
        assert "distributed.cli.dask_worker tls://" in worker.user_data and "--nthreads 1" in worker.user_data
        assert "--idle-timeout 1h" in scheduler.user_data and "--no-dashboard" not in scheduler.user_data


def test_find_network_takes_what_is_given(cloud: LoopbackEC2) -> None:
    """With groups of the user's nothing is made; zone and subnet fit together."""
    config = configure(security_groups=["sg-1"], subnet_id=cloud.subnet_id)
    network = find_network(config)
    assert (network.vpc, network.subnet_id, network.security_groups) == (cloud.vpc_id, cloud.subnet_id, ["sg-1"])
    assert find_network(configure(security_groups=["sg-1"], availability_zone="eu-west-1b")).zone == "eu-west-1b"
    assert not any(call.action.startswith(("Create", "Authorize")) for call in cloud.calls)


def test_find_network_admits_the_vpc_where_addresses_are_private(cloud: LoopbackEC2) -> None:
    """The client is inside then."""
    network = find_network(configure(use_private_ip=True, client_cidr=None, scheduler_options={"port": 9000}))
    with cloud.client("ec2") as client:
        cidr = client.describe_vpcs(VpcIds=[cloud.vpc_id])["Vpcs"][0]["CidrBlock"]
    assert list_rules(cloud) == [(9000, 9000, cidr)]
    network.withdraw()


def test_find_network_shares_the_group(cloud: LoopbackEC2) -> None:
    """A second run uses the same group and leaves the first one's rule alone."""
    first, second = find_network(configure()), find_network(configure())
    assert first.security_groups == second.security_groups
    second.withdraw()
    assert list_rules(cloud) == [(8786, 8786, "127.0.0.1/32")]
    first.withdraw()


def test_find_network_needs_a_default_vpc(cloud: LoopbackEC2) -> None:
    """Some accounts have none."""
    with contextlib.closing(boto3.client("ec2", region_name="eu-west-2")) as client:
        for subnet in client.describe_subnets()["Subnets"]:
            client.delete_subnet(SubnetId=subnet["SubnetId"])
        client.delete_vpc(VpcId=client.describe_vpcs()["Vpcs"][0]["VpcId"])
    with pytest.raises(ClusterStartError, match="has no default VPC in eu-west-2"):
        find_network(configure(region="eu-west-2"))
