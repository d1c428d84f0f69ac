"""The loopback EC2 refuses, runs and terminates instances as EC2 does, and contacts no other machine."""

import contextlib
import operator
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from distributed import Client, Security, SpecCluster
from ec2_gateway import Refusal, find_foreign_addresses
from ec2_moto import CANONICAL, MAX_USER_DATA_BYTES
from loopback_ec2 import LoopbackEC2, keep_dask_config
from machines import read_plan

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8, and /proc"),
]

SLEEP = "docker run any sleep 600"
SHUTDOWN = "shutdown -h now"


@pytest.fixture
def cloud() -> Iterator[LoopbackEC2]:
    """Start a loopback EC2 that waits 10 ms for each minute of a scheduled shutdown."""
    with LoopbackEC2(seconds_per_minute=0.01) as cloud:
        yield cloud


def render(*lines: str) -> str:
    """Render user data that runs some commands."""
    return "\n".join(["#cloud-config", "runcmd:", *(f"  - '{line.replace(chr(39), chr(39) * 2)}'" for line in lines)])


def launch(cloud: LoopbackEC2, *lines: str, **options: Any) -> dict[str, Any]:
    """Launch an instance that runs some commands, and return EC2's response."""
    request = {
        "ImageId": cloud.ami,
        "InstanceType": "t3.medium",
        "MinCount": 1,
        "MaxCount": 1,
        "UserData": render(*lines),
        "InstanceInitiatedShutdownBehavior": "terminate",
        "NetworkInterfaces": [
            {
                "DeviceIndex": 0,
                "AssociatePublicIpAddress": True,
                "SubnetId": cloud.subnet_id,
                "Groups": [cloud.security_group_id],
            }
        ],
    }
    with cloud.client("ec2", config=Config(retries={"total_max_attempts": 2})) as client:
        return client.run_instances(**request | options)["Instances"][0]


def describe(cloud: LoopbackEC2, instance_id: str) -> dict[str, Any]:
    """Ask EC2 to describe an instance."""
    with cloud.client("ec2") as client:
        return client.describe_instances(InstanceIds=[instance_id])["Reservations"][0]["Instances"][0]


@contextlib.contextmanager
def open_pipe(path: Path) -> Iterator[int]:
    """Create a named pipe through which a process reports its progress."""
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_pipe(descriptor: int) -> str:
    """Wait until a process writes to a pipe, and return the text."""
    readable, _, _ = select.select([descriptor], [], [], 30)
    assert readable, "nothing was written within 30 s"
    return os.read(descriptor, 1000).decode()


def wait_for_state(cloud: LoopbackEC2, state: str) -> None:
    """Wait until all instances are in a state."""
    with cloud.changed:
        in_time = cloud.changed.wait_for(lambda: {instance.state for instance in cloud.instances(None)} == {state}, 30)
    assert in_time, cloud.instances(None)


def make_security() -> Security:
    """Create TLS settings with one elliptic-curve key, so that they fit into user data."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    certificate = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
    pem = certificate.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    ours = {f"tls_{role}_{part}": pem if part == "cert" else secret for role in ROLES for part in ("cert", "key")}
    return Security(tls_ca_file=pem, require_encryption=True, **ours)


ROLES = ("client", "scheduler", "worker")


# dask-cloudprovider does not close the sockets with which it probes the scheduler.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
# It also warns if the start takes 10 s, which can happen on a busy machine.
@pytest.mark.filterwarnings("ignore:Creating your cluster is taking:UserWarning")
def test_ec2cluster_computes_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unmodified EC2Cluster runs tasks over TLS, each process at its own address, and leaves no process."""
    from dask_cloudprovider.aws import EC2Cluster

    with LoopbackEC2(boot_delay_seconds=0.2) as cloud, keep_dask_config():
        cloud.use(monkeypatch)
        with EC2Cluster(
            region=cloud.region,
            ami=cloud.ami,
            vpc=cloud.vpc_id,
            subnet_id=cloud.subnet_id,
            security_groups=[cloud.security_group_id],
            docker_image="any",
            security=make_security(),
            n_workers=1,
            worker_options={"nthreads": 1},
            env_vars={"GREETING": "good day"},
            instance_type="t3.medium",
        ) as cluster:
            scheduler, worker = cloud.instances()
            with Client(cluster) as client:
                assert client.submit(operator.add, 40, 2).result(60) == 42
                assert client.submit(os.getenv, "GREETING").result(60) == "good day"
                assert client.submit(os.listdir, ".").result(60) == []
                assert [address.partition(":")[0] for address in client.scheduler_info()["workers"]] == ["tls"]
            assert cluster.scheduler_address == f"tls://{scheduler.address}:8786"
            assert (scheduler.role, worker.role) == ("scheduler", "worker")
            assert scheduler.address != worker.address and len(scheduler.user_data) < 6_000
            assert worker.tags["createdBy"] == "dask-cloudprovider" and not worker.is_spot
            assert len(cloud.processes()) >= 4  # A scheduler, a nanny, a worker, and a helper of multiprocessing.
        assert cloud.wait_until_quiet(30)
        assert cloud.processes() == [] and cloud.leaks == []
        actions = {call.action for call in cloud.calls}
        assert actions == {"RunInstances", "CreateTags", "DescribeInstances", "TerminateInstances"}


def test_run_instances_responds_before_the_instance_runs(cloud: LoopbackEC2) -> None:
    """RunInstances returns a pending instance without a public address; later it runs at a loopback address."""
    launched = launch(cloud, SLEEP)
    assert launched["State"]["Name"] == "pending" and "PublicIpAddress" not in launched
    wait_for_state(cloud, "running")
    described = describe(cloud, launched["InstanceId"])
    assert described["PublicIpAddress"] == described["PrivateIpAddress"] == cloud.instances()[0].address
    assert described["PublicIpAddress"].startswith("127.") and not described.get("PublicDnsName")


def test_run_instances_gives_a_public_address_only_on_request(cloud: LoopbackEC2) -> None:
    """An instance gets a public address only if its interface asks for one."""
    interface = {"DeviceIndex": 0, "AssociatePublicIpAddress": False, "SubnetId": cloud.subnet_id}
    instance_id = launch(cloud, SLEEP, NetworkInterfaces=[interface])["InstanceId"]
    wait_for_state(cloud, "running")
    assert "PublicIpAddress" not in describe(cloud, instance_id)


def test_addresses_of_other_machines_are_blocked(cloud: LoopbackEC2) -> None:
    """Responses with an address that moto made up are blocked: it may belong to a real machine."""
    with cloud.client("ec2") as client, pytest.raises(ClientError, match="LoopbackLeak"):
        client.create_network_interface(SubnetId=cloud.subnet_id)
    assert len(cloud.leaks) > 0


def test_unsigned_requests_are_refused(cloud: LoopbackEC2) -> None:
    """EC2 refuses requests without credentials."""
    with cloud.client("ec2", config=Config(signature_version=UNSIGNED)) as client:
        with pytest.raises(ClientError, match="AuthFailure"):
            client.describe_instances()


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        pytest.param("<a>127.3.4.5</a><b>127.3.4.255</b>", [], id="own"),
        pytest.param("<a>127.3.5.1</a><b>::1</b>", ["127.3.5.1", "::1"], id="another simulator's"),
        pytest.param("<privateIpAddress>10.1.2.3</privateIpAddress>", ["10.1.2.3"], id="private"),
        pytest.param("<publicIp>\n54.1.2.3\n</publicIp><a>2001:db8::1</a>", ["54.1.2.3", "2001:db8::1"], id="public"),
        pytest.param("<cidrIp>0.0.0.0/0</cidrIp><time>12:30:59</time><count>16</count>", [], id="no addresses"),
    ],
)
def test_find_foreign_addresses_finds_only_addresses(document: str, expected: list[str]) -> None:
    """Networks, times and counts are not mistaken for addresses."""
    assert find_foreign_addresses(document, "127.3.4") == expected


def test_made_up_address_of_an_instance_is_blocked(cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch) -> None:
    """If an instance has an address outside the loopback network, requests to launch or describe it fail."""
    monkeypatch.setattr(cloud, "_take_address", lambda: "192.0.2.1")
    for _ in range(2):
        with pytest.raises(ClientError, match=r"LoopbackLeak.*192\.0\.2\.1"):
            launch(cloud, SLEEP)
    with cloud.client("ec2") as client, pytest.raises(ClientError, match=r"LoopbackLeak.*192\.0\.2\.1"):
        client.describe_instances()


def test_user_data_is_limited_as_on_ec2(cloud: LoopbackEC2) -> None:
    """User data may have at most 16,384 bytes before Base64 encoding."""
    largest = render(SLEEP) + "\n#"
    largest += "x" * (MAX_USER_DATA_BYTES - len(largest))
    launch(cloud, UserData=largest)
    with pytest.raises(ClientError, match=r"InvalidParameterValue.*User data is limited to 16384 bytes"):
        launch(cloud, UserData=largest + "x")
    assert [instance.user_data for instance in cloud.instances()] == [largest]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"ImageId": "ami-0123456789abcdef0"}, r"InvalidAMIID\.NotFound", id="image"),
        pytest.param({"InstanceType": "t3.enormous"}, "InvalidParameterValue.*t3.enormous", id="type"),
        pytest.param({"InstanceType": "t4g.medium"}, "InvalidParameterValue.*architecture", id="architecture"),
        pytest.param({"InstanceType": "p5.48xlarge"}, r"Unsupported.*eu-west-1a", id="zone"),
        pytest.param({"group": "sg-0123456789abcdef0"}, r"InvalidGroup\.NotFound", id="group"),
        pytest.param({"IamInstanceProfile": {"Name": "nobody"}}, "nobody", id="profile"),
    ],
)
def test_run_instances_refuses_unknown_resources(cloud: LoopbackEC2, options: dict[str, Any], message: str) -> None:
    """Unknown images, types, groups and profiles are refused, as well as unsuitable types."""
    group = options.get("group", cloud.security_group_id)
    interface = {"DeviceIndex": 0, "SubnetId": cloud.subnet_id, "Groups": [group]}
    rest = {name: value for name, value in options.items() if name != "group"}
    with pytest.raises(ClientError, match=message):
        launch(cloud, SLEEP, NetworkInterfaces=[interface], **rest)
    assert cloud.instances(None) == []


def test_refusals_apply_to_a_number_of_calls(cloud: LoopbackEC2) -> None:
    """With skip=1 and count=2, the first call succeeds, the next two are refused, and the fourth succeeds."""
    cloud.faults.refusals.append(Refusal("VcpuLimitExceeded", skip=1, count=2))
    launch(cloud, SLEEP)
    for _ in range(2):
        with pytest.raises(ClientError, match="VcpuLimitExceeded"):
            launch(cloud, SLEEP)
    launch(cloud, SLEEP)
    assert len(cloud.instances()) == 2
    assert [call.action for call in cloud.calls] == ["RunInstances"] * 4


def test_clients_retry_if_capacity_is_insufficient(cloud: LoopbackEC2) -> None:
    """EC2 reports insufficient capacity as a server error, so clients retry."""
    cloud.faults.refusals.append(Refusal("InsufficientInstanceCapacity"))
    with pytest.raises(ClientError, match="InsufficientInstanceCapacity") as caught:
        launch(cloud, SLEEP)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 500
    assert len(cloud.calls) == 2


def test_refusals_select_calls(cloud: LoopbackEC2) -> None:
    """A refusal can apply only to launches of one role, only to spot launches, or to another action."""
    worker = "docker run any python -m distributed.cli.dask_spec tls://127.0.0.1:1 --spec {}"
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}}
    cloud.faults.boot_delay_seconds = 600
    cloud.faults.refusals += [
        Refusal("UnauthorizedOperation", role="scheduler"),
        Refusal("MaxSpotInstanceCountExceeded", is_spot=True),
        Refusal("InvalidInstanceID.NotFound", action="CreateTags", count=1),
    ]
    with pytest.raises(ClientError, match="UnauthorizedOperation"):
        launch(cloud, "docker run any python -m distributed.cli.dask_scheduler")
    with pytest.raises(ClientError, match="MaxSpotInstanceCountExceeded"):
        launch(cloud, worker, **spot)
    instance_id = launch(cloud, worker)["InstanceId"]
    with cloud.client("ec2") as client:
        tags = {"Resources": [instance_id], "Tags": [{"Key": "run", "Value": "1"}]}
        with pytest.raises(ClientError, match=r"InvalidInstanceID\.NotFound"):
            client.create_tags(**tags)
        client.create_tags(**tags)
    assert [(instance.role, instance.tags) for instance in cloud.instances()] == [("worker", {"run": "1"})]


def test_instance_is_terminated_when_its_container_ends(cloud: LoopbackEC2) -> None:
    """When the container ends, the next command shuts the instance down."""
    instance_id = launch(cloud, "docker run any sh -c 'echo done; exit 3'", SHUTDOWN)["InstanceId"]
    assert cloud.wait_until_quiet(30)
    described = describe(cloud, instance_id)
    assert described["State"]["Name"] == "terminated"
    assert described["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"
    assert cloud.log(instance_id).splitlines() == ["done", "docker: the container ended with 3"]


def test_instance_without_shutdown_outlives_its_container(cloud: LoopbackEC2, tmp_path: Path) -> None:
    """If the user data has no shutdown, the instance keeps running without a process."""
    with open_pipe(tmp_path / "pipe") as pipe:
        instance_id = launch(cloud, f"docker run any sh -c 'echo done > {tmp_path}/pipe'")["InstanceId"]
        assert read_pipe(pipe) == "done\n"
    assert not cloud.wait_until_quiet(0.3)
    assert [(instance.id, instance.state) for instance in cloud.instances()] == [(instance_id, "running")]
    assert cloud.processes() == []


def test_shutdown_stops_the_instance_by_default(cloud: LoopbackEC2) -> None:
    """By default, EC2 stops an instance that shuts down instead of terminating it."""
    launch(cloud, "docker run any true", SHUTDOWN, InstanceInitiatedShutdownBehavior="stop")
    wait_for_state(cloud, "stopped")
    assert cloud.processes() == []


@pytest.mark.parametrize("command", ["shutdown -h +60", "shutdown -P +60"], ids=["h", "P"])
def test_scheduled_shutdown_limits_the_lifetime(cloud: LoopbackEC2, command: str) -> None:
    """A scheduled shutdown terminates the instance even while its container runs."""
    instance_id = launch(cloud, command, SLEEP)["InstanceId"]
    assert cloud.wait_until_quiet(30)
    assert describe(cloud, instance_id)["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"


def test_termination_sends_sigterm_first(cloud: LoopbackEC2, tmp_path: Path) -> None:
    """The container of a terminated instance gets SIGTERM; terminating it again changes nothing."""
    script = f'trap "echo goodbye; exit" TERM; echo ready > {tmp_path}/pipe; while :; do sleep 0.02; done'
    with open_pipe(tmp_path / "pipe") as pipe, cloud.client("ec2") as client:
        instance_id = launch(cloud, f"docker run any sh -c '{script}'")["InstanceId"]
        read_pipe(pipe)
        change = client.terminate_instances(InstanceIds=[instance_id])["TerminatingInstances"][0]
        assert change["CurrentState"]["Name"] == "shutting-down" and change["PreviousState"]["Name"] == "running"
        assert cloud.wait_until_quiet(30)
        client.terminate_instances(InstanceIds=[instance_id])
    described = describe(cloud, instance_id)
    assert described["State"]["Name"] == "terminated" and "PublicIpAddress" not in described
    assert described["StateReason"]["Code"] == "Client.UserInitiatedShutdown"
    assert "goodbye" in cloud.log(instance_id)


def test_termination_kills_a_process_that_ignores_sigterm(tmp_path: Path) -> None:
    """The process is killed after the grace period."""
    script = f'trap "" TERM; echo ready > {tmp_path}/pipe; while :; do sleep 0.02; done'
    with LoopbackEC2(grace_seconds=0.1) as cloud, open_pipe(tmp_path / "pipe") as pipe, cloud.client("ec2") as client:
        instance_id = launch(cloud, f"docker run any sh -c '{script}'")["InstanceId"]
        read_pipe(pipe)
        client.terminate_instances(InstanceIds=[instance_id])
        assert cloud.wait_until_quiet(30)


def test_interruption_kills_without_sigterm(cloud: LoopbackEC2, tmp_path: Path) -> None:
    """All processes of an interrupted spot instance are killed at once, and EC2 reports the reason."""
    script = f'trap "echo goodbye; exit" TERM; setsid sleep 600 & echo ready > {tmp_path}/pipe; wait'
    with open_pipe(tmp_path / "pipe") as pipe:
        spot = launch(cloud, f"docker run any sh -c '{script}'", InstanceMarketOptions={"MarketType": "spot"})
        read_pipe(pipe)
    assert cloud.instances()[0].is_spot
    cloud.interrupt(spot["InstanceId"])
    assert cloud.wait_until_quiet(30)
    assert describe(cloud, spot["InstanceId"])["StateReason"]["Code"] == "Server.SpotInstanceTermination"
    assert "goodbye" not in cloud.log(spot["InstanceId"])


def test_instance_that_never_boots_does_nothing(cloud: LoopbackEC2) -> None:
    """An instance that never boots is reported as running, runs no command, and can be terminated."""
    cloud.faults.never_boots = {"worker"}
    instance_id = launch(cloud, "shutdown -h +1", SLEEP, SHUTDOWN)["InstanceId"]
    wait_for_state(cloud, "running")
    assert not cloud.wait_until_quiet(0.3)
    assert cloud.processes() == [] and cloud.log(instance_id) == ""
    with cloud.client("ec2") as client:
        client.terminate_instances(InstanceIds=[instance_id])
    assert cloud.wait_until_quiet(30)


def test_instance_ends_if_its_image_cannot_be_pulled(cloud: LoopbackEC2) -> None:
    """If docker cannot pull the image, cloud-init continues with the shutdown."""
    cloud.faults.unpullable = {"nobody/nothing:1"}
    instance_id = launch(cloud, "docker run --rm --net=host nobody/nothing:1 sleep 600", SHUTDOWN)["InstanceId"]
    assert cloud.wait_until_quiet(30)
    assert "nobody/nothing:1" in cloud.log(instance_id)


def test_instance_terminated_during_boot_runs_nothing(cloud: LoopbackEC2) -> None:
    """An instance that is terminated while it boots never starts its container."""
    cloud.faults.boot_delay_seconds = 600
    instance_id = launch(cloud, SLEEP)["InstanceId"]
    wait_for_state(cloud, "running")
    with cloud.client("ec2") as client:
        client.terminate_instances(InstanceIds=[instance_id])
    assert cloud.wait_until_quiet(30)
    assert cloud.log(instance_id) == ""


@pytest.mark.parametrize(
    ("line", "image", "command", "variables"),
    [
        pytest.param('docker run -e A="b c" -e D= img:1 run', "img:1", ["run"], {"A": "b c", "D": ""}, id="variables"),
        pytest.param(
            'docker run --gpus=all --shm-size 1g --rm img env "A=x=y" run', "img", ["run"], {"A": "x=y"}, id="options"
        ),
        pytest.param('docker run -e A="say "a b" now" img run', "b now", ["img", "run"], {"A": "say a"}, id="quotes"),
        pytest.param('docker run -e A="$HOME$(ls /)" img run', "img", ["run"], {"A": ""}, id="expansion"),
        pytest.param('docker run img run "', "", [], {}, id="unbalanced"),
    ],
)
def test_read_plan_parses_quotes_like_a_shell(
    line: str, image: str, command: list[str], variables: dict[str, str]
) -> None:
    """A shell parses the arguments of docker, including quotes."""
    plan = read_plan(render(line, SHUTDOWN))
    assert (plan.image, plan.command, plan.variables) == (image, command, variables)
    # A script that the shell cannot parse never reaches its shutdown.
    assert plan.shuts_down == (image != "")


@pytest.mark.parametrize(
    "user_data",
    [
        pytest.param("#!/bin/sh\ndocker run img run", id="script"),
        pytest.param("#cloud-config\nruncmd:\n  - docker run -e A: img run\n  - {a: b}", id="mapping"),
        pytest.param("#cloud-config\nruncmd:\n  - 'docker run img run", id="broken"),
    ],
)
def test_read_plan_runs_nothing_if_user_data_is_invalid(user_data: str) -> None:
    """As with cloud-init, an instance with invalid user data runs, but executes no command."""
    plan = read_plan(user_data)
    assert plan.problem and not plan.command and not plan.shuts_down


def test_instances_use_s3_and_their_calls_are_recorded(cloud: LoopbackEC2) -> None:
    """Instances get an endpoint and credentials of their own, by which their calls are recognized."""
    script = (
        "import boto3; s3 = boto3.client(chr(115) + chr(51)); s3.put_object(Bucket=str.lower(chr(65) * 3), Key=str(1))"
    )
    with cloud.client("s3") as client:
        client.create_bucket(Bucket="aaa", CreateBucketConfiguration={"LocationConstraint": cloud.region})
        instance_id = launch(cloud, f'docker run any python -c "{script}"', SHUTDOWN)["InstanceId"]
        assert cloud.wait_until_quiet(60), cloud.log(instance_id)
        assert client.get_object(Bucket="aaa", Key="1")["Body"].read() == b""
        client.list_objects_v2(Bucket="aaa", Prefix="b/")
    assert cloud.calls_by(instance_id) == [("s3", "PutObject", "aaa/1")]
    assert [call for call in cloud.calls if call.service == "s3"] == [
        ("s3", "CreateBucket", "aaa"),
        ("s3", "PutObject", "aaa/1"),
        ("s3", "GetObject", "aaa/1"),
        ("s3", "ListObjectsV2", "aaa/b/"),
    ]


def test_instances_without_profile_have_no_credentials() -> None:
    """With needs_profile, only instances with an instance profile have credentials."""
    with LoopbackEC2(needs_profile=True) as cloud:
        with cloud.client("iam") as client:
            client.create_instance_profile(InstanceProfileName="reader")
        bare = launch(cloud, "docker run any env", SHUTDOWN)["InstanceId"]
        trusted = launch(cloud, "docker run any env", SHUTDOWN, IamInstanceProfile={"Name": "reader"})["InstanceId"]
        assert cloud.wait_until_quiet(30)
        assert "AWS_SECRET_ACCESS_KEY" not in cloud.log(bare)
        assert "AWS_SECRET_ACCESS_KEY" in cloud.log(trusted)


def test_machine_images_are_found_by_name(cloud: LoopbackEC2) -> None:
    """The simulator has only two images by Canonical, one per architecture."""
    filters = [{"Name": "name", "Values": ["ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-*-server-*"]}]
    with cloud.client("ec2") as client:
        found = client.describe_images(Owners=[CANONICAL], Filters=filters)["Images"]
        assert len(client.describe_images()["Images"]) == 2
    assert {image["Architecture"]: image["ImageId"] for image in found} == {"x86_64": cloud.ami, "arm64": cloud.arm_ami}


def test_exit_deletes_everything_but_keeps_other_servers(s3_bucket: tuple[str, dict[str, Any]], s3_client: Any) -> None:
    """The simulator ends its processes and deletes its buckets, but not those of another server in this process."""
    with LoopbackEC2() as cloud:
        launch(cloud, SLEEP)
        with cloud.client("s3") as client:
            client.create_bucket(Bucket="loopback", CreateBucketConfiguration={"LocationConstraint": cloud.region})
            client.put_object(Bucket="loopback", Key="key", Body=b"body")
    assert cloud.processes() == [] and not cloud.folder.exists()
    with LoopbackEC2() as cloud:
        assert cloud.instances(None) == [] and cloud.calls == []
    names = {bucket["Name"] for bucket in s3_client.list_buckets()["Buckets"]}
    assert s3_bucket[0] in names and "loopback" not in names


def test_process_can_run_only_one_simulator(cloud: LoopbackEC2) -> None:
    """A second simulator is refused, because moto's state is global."""
    with pytest.raises(RuntimeError, match="this process already runs a loopback EC2"):
        LoopbackEC2().__enter__()
    launch(cloud, SLEEP)


@pytest.mark.slow
def test_use_redirects_every_client(cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients connect to the simulator, whatever profile and endpoint the environment sets."""
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("AWS_ENDPOINT_URL_EC2", "http://192.0.2.1")
    cloud.use(monkeypatch)
    for service in ("ec2", "s3", "iam", "sts"):
        with contextlib.closing(boto3.session.Session().client(service)) as client:
            assert client.meta.endpoint_url == cloud.endpoint_url
    with contextlib.closing(boto3.session.Session().client("sts")) as client:
        assert client.get_caller_identity()["Account"] == "123456789012"


def test_interpreter_does_not_close_clusters_left_open() -> None:
    """Closing a cluster that a test left open would call the real EC2 when the interpreter exits."""

    class Forgotten:
        boto_session = None
        shutdown_on_close = True

    forgotten = Forgotten()
    SpecCluster._instances.add(forgotten)
    try:
        with LoopbackEC2():
            pass
    finally:
        SpecCluster._instances.discard(forgotten)
    assert not forgotten.shutdown_on_close


@pytest.mark.slow
def test_containers_end_when_the_test_is_killed(tmp_path: Path) -> None:
    """If the process of the test is killed, the processes of its instances end."""
    line = f"docker run any sh -c 'exec 3> {tmp_path}/held; sleep 600 & echo ready > {tmp_path}/pipe; wait'"
    script = f"""
import signal
from pathlib import Path
from machines import Container, build_environment, read_plan
folder = Path({str(tmp_path)!r})
container = Container(
    read_plan({render(line)!r}).command, folder=folder, log=folder / "log", environment=build_environment(folder)
)
signal.pause()
"""
    here = Path(__file__).parent
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    with open_pipe(tmp_path / "pipe") as pipe, open_pipe(tmp_path / "held") as held:
        with subprocess.Popen([sys.executable, "-c", script], env=environment) as process:
            assert read_pipe(pipe) == "ready\n"
            process.kill()
        # The pipe is at its end once all processes that held it open have ended.
        assert read_pipe(held) == ""
