"""Clusters on the loopback EC2: how they start, fail, scale and end; none of them leaves anything running."""

import contextlib
import operator
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from cluster_events import (
    ENDS,
    PATIENCE_SECONDS,
    assert_says,
    end_while_tasks_run,
    interrupt_self,
    make_slow_square,
    wait_until,
)
from distributed import wait
from ec2_clusters import check_nothing_left, configure, list_rules
from ec2_gateway import Refusal
from loopback_ec2 import LoopbackEC2

from fruitdask.cluster import list_usage, open_client
from fruitdask.cluster.cloud.fleet import Fleet
from fruitdask.cluster.ec2.instances import terminate_run
from fruitdask.cluster.ec2.network import find_network
from fruitdask.core.config import AdaptiveConfig
from fruitdask.errors import ClusterStartError, ConfigError

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8, and /proc"),
]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackEC2]:
    """Start a loopback EC2, and check at the end that the test left nothing on it."""
    with LoopbackEC2(grace_seconds=0.05) as cloud:
        cloud.use(monkeypatch)
        yield cloud
        check_nothing_left(cloud)


def drop_rules(cloud: LoopbackEC2) -> None:
    """Revoke the security group rules that a killed client left behind."""
    filters = [{"Name": "group-name", "Values": ["fruitdask"]}]
    with cloud.client("ec2") as client:
        for group in client.describe_security_groups(Filters=filters)["SecurityGroups"]:
            client.revoke_security_group_ingress(GroupId=group["GroupId"], IpPermissions=group["IpPermissions"])


def on_call(cloud: LoopbackEC2, patch: pytest.MonkeyPatch, action: str, n: int, do: Callable[[], Any]) -> None:
    """Call a function when the n-th request for an action arrives, before EC2 responds."""
    note, seen = cloud.note, []

    def note_and_do(caller: str, call: Any) -> None:
        note(caller, call)
        if call.action == action:
            seen.append(call)
            if len(seen) == n:
                do()

    patch.setattr(cloud, "note", note_and_do)


def test_list_usage_is_empty_for_a_local_cluster(client: Any) -> None:
    """A cluster on this machine costs nothing."""
    assert list_usage(client) == []


@pytest.mark.slow
def test_scheduler_that_never_starts(cloud: LoopbackEC2) -> None:
    """The start has a deadline, and the error says what to check."""
    cloud.faults.never_boots = {"scheduler"}
    message = r"scheduler did not start within cluster.start_timeout \(3 s\)"
    with pytest.raises(ClusterStartError, match=message) as caught:
        with open_client(configure(start_timeout=3)):
            pass
    assert_says(caught, "(t3.medium, image any, ami-", ") is running", "; its console ends: ")
    assert_says(
        caught, "check that the security groups sg-", "admit this machine (port 8786), and that the subnet subnet-"
    )
    assert [instance.role for instance in cloud.instances(None)] == ["scheduler"]


@pytest.mark.slow
def test_image_that_cannot_be_pulled(cloud: LoopbackEC2) -> None:
    """The instance ends, so the client notices long before the deadline."""
    cloud.faults.unpullable = {"nobody/nothing:1"}
    message = "scheduler ended before it started to listen: .*nobody/nothing"
    with pytest.raises(ClusterStartError, match=message) as caught:
        with open_client(configure(docker_image="nobody/nothing:1")):
            pass
    assert_says(caught, "Instance initiated shutdown", "check that it can pull cluster.docker_image")


def are_both_running(fleet: Fleet) -> bool:
    """Whether the cluster has seen that the instances of the scheduler and of a worker are running."""
    return [fleet.find_state(instance).description for instance in fleet.launches] == ["running"] * 2


@pytest.mark.slow
def test_workers_that_never_start(cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline applies to the first worker too; here it expires as soon as the worker's instance is running."""
    cloud.faults.never_boots = {"worker"}
    monkeypatch.setattr(Fleet, "is_late", property(are_both_running))
    message = r"no worker started within .*\(600 s\): .*m6i.large.*is running"
    with pytest.raises(ClusterStartError, match=message):
        with open_client(configure(start_timeout=600)):
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
    ],
)
def test_refused_launches(cloud: LoopbackEC2, role: str, code: str, expected: str) -> None:
    """The start fails at once, and the error explains the refusal."""
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
def test_missing_resources_are_named(
    cloud: LoopbackEC2,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    environment: dict[str, str | None],
    expected: str,
) -> None:
    """Nothing is launched, and the error names what is missing in one sentence."""
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.delenv(name) if value is None else patch.setenv(name, value)
        with pytest.raises(ClusterStartError, match=expected) as caught:
            with open_client(configure(**options)):
                pass
    assert "NoneType" not in str(caught.value)
    assert cloud.instances(None) == []


def test_expired_credentials(cloud: LoopbackEC2) -> None:
    """The first request to EC2 fails, and the error tells the user to log in again."""
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
    """Options that cannot be passed to an instance are refused before anything is launched."""
    with pytest.raises(ConfigError, match=expected):
        with open_client(configure(**options)):
            pass
    assert not any(call.action.startswith(("Run", "Create")) for call in cloud.calls)


def test_variable_that_only_looks_like_a_token_is_accepted(cloud: LoopbackEC2) -> None:
    """The variable passes the check of options; the start fails later, because the image does not exist."""
    with pytest.raises(ClusterStartError, match="check cluster.ami"):
        with open_client(configure(env_vars={"TOKENIZERS_PARALLELISM": "false"}, ami="ami-0123456789abcdef0")):
            pass


@pytest.mark.slow
def test_start_needs_only_the_first_worker(cloud: LoopbackEC2) -> None:
    """If EC2 refuses a spot worker, its launch is retried, and the run does not wait for it."""
    cloud.faults.refusals.append(Refusal("MaxSpotInstanceCountExceeded", is_spot=True, count=1))
    with open_client(configure(n_workers=2, spot=True)) as client:
        assert len(client.scheduler_info()["workers"]) == 1
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        assert [instance.is_spot for instance in cloud.instances()] == [False, True, True]


@pytest.mark.parametrize("n", [pytest.param(1, id="scheduler"), pytest.param(2, id="worker", marks=pytest.mark.slow)])
def test_ctrl_c_while_an_instance_is_being_launched(
    cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch, ending: threading.Event, n: int
) -> None:
    """The instance is terminated even if the user presses Ctrl-C before EC2 responds to the request to launch it."""

    def interrupt() -> None:
        interrupt_self()
        assert ending.wait(PATIENCE_SECONDS)
        # Simulates a slow response: a cluster that did not wait for it would find no instance to terminate.
        time.sleep(0.5)

    on_call(cloud, monkeypatch, "RunInstances", n, interrupt)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        with open_client(configure()):
            pass
    assert len(cloud.instances(None)) == n


def test_ctrl_c_while_the_scheduler_starts(cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C interrupts the wait, and a second Ctrl-C does not prevent the cleanup."""
    cloud.faults.never_boots = {"scheduler"}
    on_call(cloud, monkeypatch, "DescribeInstances", 3, interrupt_self)
    on_call(cloud, monkeypatch, "TerminateInstances", 1, interrupt_self)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        with open_client(configure()):
            pass
    assert len(cloud.instances(None)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("what", "expected"), ENDS)
def test_end_while_tasks_run(cloud: LoopbackEC2, what: Callable[[], None], expected: type[BaseException]) -> None:
    """The cluster is terminated however its block ends."""
    end_while_tasks_run(open_client(configure()), what, expected)


@pytest.mark.slow
def test_killed_client(cloud: LoopbackEC2, tmp_path: Path) -> None:
    """Instances shut themselves down after their client was killed."""
    script = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from fruitdask.cluster import open_client
from fruitdask.core.config import EC2ClusterConfig
config = EC2ClusterConfig(kind="ec2", docker_image="any", client_cidr="127.0.0.1/32", n_workers=1, idle_timeout=60)
if __name__ == "__main__":
    with open_client(config) as client:
        futures = client.map(time.sleep, [0.05 + n / 1e6 for n in range(2000)])
        futures[0].result()
        # Shorten the timeout only now: otherwise a cluster that starts slowly would end before it is used.
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "idle_timeout", 0.5))
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
    """The error names the instances that still cost money, and the command that terminates them."""
    refusal = Refusal("UnauthorizedOperation", action="TerminateInstances")
    with pytest.raises(ClusterStartError, match=r"of run \w+ may still run.*\(UnauthorizedOperation\)") as caught:
        with open_client(configure()):
            cloud.faults.refusals.append(refusal)
    assert_says(caught, "fruitdask clusters cleanup --region eu-west-1", *(one.id for one in cloud.instances()))
    cloud.faults.refusals.clear()
    assert len(terminate_run(cloud.region, cloud.instances()[0].tags["fruitdask:run"])) == 2
    drop_rules(cloud)


@pytest.mark.slow
def test_interrupted_worker_is_replaced(cloud: LoopbackEC2) -> None:
    """If a worker is interrupted, no result is lost and another worker is launched."""
    with open_client(configure(n_workers=2, spot=True)) as client:
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        futures = client.map(make_slow_square(), range(12))
        victim = cloud.instances()[-1].id
        wait(futures[:2], timeout=PATIENCE_SECONDS)
        cloud.interrupt(victim)
        assert client.gather(futures) == [number**2 for number in range(12)]
        wait_until(lambda: len(cloud.instances()) == 3, "another worker is launched")
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        assert victim not in {instance.id for instance in cloud.instances()}
    assert len(list_usage(client)) == 4


@pytest.mark.slow
def test_scaling_down_loses_nothing(cloud: LoopbackEC2) -> None:
    """Data that cannot be recomputed is moved to the remaining worker."""
    with open_client(configure(n_workers=2)) as client:
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        futures = client.scatter(list(range(24)))
        assert len(client.has_what()) == 2 and all(client.has_what().values())
        client.cluster.scale(1)
        wait_until(lambda: len(cloud.instances()) == 2, "a worker is terminated")
        assert client.gather(futures) == list(range(24))
        assert len(client.scheduler_info()["workers"]) == 1


@pytest.mark.slow
def test_adaptive_cluster_grows_and_shrinks(cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of workers follows the amount of work, and results of removed workers are kept."""
    # By default, an idle worker is kept for a minute.
    monkeypatch.setattr("fruitdask.cluster.cloud._ADAPT", {"interval": "100ms", "wait_count": 2})
    with open_client(configure(adaptive=AdaptiveConfig(minimum=1, maximum=2))) as client:
        futures = client.map(make_slow_square(), range(100))
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        data = client.scatter(list(range(24)))
        client.cancel(futures)
        wait_until(lambda: len(cloud.instances()) == 2, "a worker is terminated")
        assert client.gather(data) == list(range(24))


@pytest.mark.slow
def test_closing_a_cluster_that_has_ended(cloud: LoopbackEC2) -> None:
    """If the instances have ended, as after max_lifetime, closing raises no error and launches nothing."""
    with open_client(configure()) as client:
        # End the scheduler first: if its worker ended first, the cluster would rightly launch another one.
        cloud.interrupt(cloud.instances()[0].id)
        assert cloud.wait_until_quiet(PATIENCE_SECONDS)
        wait_until(lambda: not client.cluster.list_running(), "the cluster notices that both have ended")
    assert len(list_usage(client)) == 2


@pytest.mark.slow
def test_gpus_and_modules(cloud: LoopbackEC2) -> None:
    """Containers can use the GPU of their instance type; the dashboard and the worker module are configurable."""
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


def test_find_network_uses_given_groups_and_subnets(cloud: LoopbackEC2) -> None:
    """If the configuration names security groups, no group is created; the subnet is in the given zone."""
    config = configure(security_groups=["sg-1"], subnet_id=cloud.subnet_id)
    network = find_network(config)
    assert (network.vpc, network.subnet_id, network.security_groups) == (cloud.vpc_id, cloud.subnet_id, ["sg-1"])
    assert find_network(configure(security_groups=["sg-1"], availability_zone="eu-west-1b")).zone == "eu-west-1b"
    assert not any(call.action.startswith(("Create", "Authorize")) for call in cloud.calls)


def test_find_network_admits_the_vpc_if_addresses_are_private(cloud: LoopbackEC2) -> None:
    """The client is then in the VPC too."""
    network = find_network(configure(use_private_ip=True, client_cidr=None, scheduler_options={"port": 9000}))
    with cloud.client("ec2") as client:
        cidr = client.describe_vpcs(VpcIds=[cloud.vpc_id])["Vpcs"][0]["CidrBlock"]
    assert list_rules(cloud) == [(9000, 9000, cidr)]
    network.withdraw()


def test_find_network_shares_the_group(cloud: LoopbackEC2) -> None:
    """A second run uses the same group and keeps the rule of the first."""
    first, second = find_network(configure()), find_network(configure())
    assert first.security_groups == second.security_groups
    second.withdraw()
    assert list_rules(cloud) == [(8786, 8786, "127.0.0.1/32")]
    first.withdraw()


def test_find_network_needs_a_default_vpc(cloud: LoopbackEC2) -> None:
    """In an account without a default VPC, the error says so."""
    with contextlib.closing(boto3.client("ec2", region_name="eu-west-2")) as client:
        for subnet in client.describe_subnets()["Subnets"]:
            client.delete_subnet(SubnetId=subnet["SubnetId"])
        client.delete_vpc(VpcId=client.describe_vpcs()["Vpcs"][0]["VpcId"])
    with pytest.raises(ClusterStartError, match="has no default VPC in eu-west-2"):
        find_network(configure(region="eu-west-2"))
