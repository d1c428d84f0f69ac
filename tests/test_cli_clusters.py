"""The commands that list and terminate instances on EC2, and ask before they terminate any."""

import re
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ec2_gateway import Refusal
from loopback_ec2 import LoopbackEC2
from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends

from fruitdask.cli import cli
from fruitdask.core.aws import RUN_TAG

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.skipif(sys.platform != "linux", reason="the loopback EC2 needs all of 127.0.0.0/8, and /proc"),
]


def invoke(*arguments: str, answer: str | None = None) -> Result:
    """Run the command line in this process."""
    return CliRunner(env={"COLUMNS": "120"}).invoke(cli, ["clusters", *arguments], input=answer)


def launch(cloud: LoopbackEC2, run_id: str, *, n_instances: int = 1, **options: Any) -> list[str]:
    """Launch instances of a run, and return their ids."""
    tags = [{"ResourceType": "instance", "Tags": [{"Key": RUN_TAG, "Value": run_id}]}]
    counts = {"MinCount": n_instances, "MaxCount": n_instances}
    options = {"ImageId": cloud.ami, "InstanceType": "m6i.large", **options}
    with cloud.client("ec2") as client:
        answer = client.run_instances(TagSpecifications=tags, **counts, **options)
    return [entry["InstanceId"] for entry in answer["Instances"]]


def list_ranges(cloud: LoopbackEC2, group_id: str) -> list[str]:
    """List the addresses that a security group admits."""
    with cloud.client("ec2") as client:
        [group] = client.describe_security_groups(GroupIds=[group_id])["SecurityGroups"]
    return [part["CidrIp"] for rule in group["IpPermissions"] for part in rule["IpRanges"]]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackEC2]:
    """A loopback EC2 in Ireland."""
    with LoopbackEC2() as cloud:
        cloud.use(monkeypatch)
        yield cloud


@pytest.fixture
def group_id(cloud: LoopbackEC2) -> str:
    """A security group as runs create it, which still admits the machine of a run that has ended."""
    tags = [{"ResourceType": "security-group", "Tags": [{"Key": "fruitdask", "Value": "cluster"}]}]
    with cloud.client("ec2") as client:
        group: str = client.create_security_group(
            GroupName="fruitdask", Description="a run's", VpcId=cloud.vpc_id, TagSpecifications=tags
        )["GroupId"]
        inside = {"IpProtocol": "tcp", "FromPort": 0, "ToPort": 65535, "UserIdGroupPairs": [{"GroupId": group}]}
        client_side = {
            "IpProtocol": "tcp",
            "FromPort": 8786,
            "ToPort": 8786,
            "IpRanges": [{"CidrIp": "203.0.113.7/32"}],
        }
        client.authorize_security_group_ingress(GroupId=group, IpPermissions=[inside, client_side])
    return group


@pytest.mark.parametrize("command", ["list", "cleanup"])
def test_nothing_found_says_so(cloud: LoopbackEC2, command: str) -> None:
    result = invoke(command)
    assert (result.exit_code, result.output) == (0, "No instance of fruitdask in eu-west-1.\n")


def test_list_shows_runs_with_age_and_cost(cloud: LoopbackEC2) -> None:
    ids = launch(cloud, "run-1", InstanceType="t3.medium")
    ids += launch(cloud, "run-1", n_instances=2, InstanceMarketOptions={"MarketType": "spot"})
    for instance_id in ids:
        ec2_backends[DEFAULT_ACCOUNT_ID][cloud.region].get_instance(instance_id).launch_time -= timedelta(hours=2)
    launch(cloud, "run-2", InstanceType="g5.2xlarge")
    result = invoke("list")
    assert result.exit_code == 0
    [one] = [line for line in result.output.splitlines() if "run-1" in line]
    cells = [cell.strip() for cell in one.strip("│").split("│")]
    assert cells[:4] == ["run-1", "eu-west-1", "3", "m6i.large (spot), t3.medium"]
    # Prices of t3.medium and m6i.large in Ireland, of January 2026.
    assert cells[4:] == ["2\u202fh 0\u202fmin", f"${2 * (0.0456 + 2 * 0.107):.2f}"]
    [other] = [line for line in result.output.splitlines() if "run-2" in line]
    assert [cell.strip() for cell in other.strip("│").split("│")][5] == "-", "a price that is not known"


def test_cleanup_asks_first(cloud: LoopbackEC2) -> None:
    launch(cloud, "run-1", n_instances=2)
    result = invoke("cleanup", answer="n\n")
    assert "run-1" in result.output and "Terminate 2 instances? [y/N]: n\nAborted!\n" in result.output
    assert result.exit_code == 1 and len(cloud.instances()) == 2


@pytest.mark.parametrize(("arguments", "answer"), [((), "y\n"), (("--yes",), None)], ids=["asked", "told"])
def test_cleanup_terminates_and_closes(
    cloud: LoopbackEC2, group_id: str, arguments: tuple[str, ...], answer: str | None
) -> None:
    first, second = launch(cloud, "run-1"), launch(cloud, "run-2")
    result = invoke("cleanup", *arguments, answer=answer)
    assert result.exit_code == 0 and ("Terminate 2 instances?" in result.output) == (answer is not None)
    assert f"Terminated {first[0]} of run run-1 in eu-west-1.\n" in result.output
    assert f"Terminated {second[0]} of run run-2 in eu-west-1.\n" in result.output
    assert "Closed the security group in eu-west-1, which still admitted 1 range(s)" in result.output
    assert cloud.instances() == [] and list_ranges(cloud, group_id) == []
    with cloud.client("ec2") as client:
        [group] = client.describe_security_groups(GroupIds=[group_id])["SecurityGroups"]
    assert [pair["GroupId"] for rule in group["IpPermissions"] for pair in rule["UserIdGroupPairs"]] == [group_id]


@pytest.mark.slow
def test_cleanup_of_one_run_leaves_the_others_and_their_rules(cloud: LoopbackEC2, group_id: str) -> None:
    launch(cloud, "run-1")
    others = launch(cloud, "run-2")
    assert invoke("cleanup", "--run", "run-1", "--yes").exit_code == 0
    assert [one.id for one in cloud.instances()] == others
    assert list_ranges(cloud, group_id) == ["203.0.113.7/32"]
    assert invoke("cleanup", "--run", "run-1", "--yes").output == "No instance of run run-1 in eu-west-1.\n"


def test_cleanup_without_access_to_security_groups_still_terminates(cloud: LoopbackEC2) -> None:
    launch(cloud, "run-1")
    cloud.faults.refusals.append(Refusal("UnauthorizedOperation", "DescribeSecurityGroups"))
    result = invoke("cleanup", "--yes")
    assert result.exit_code == 0 and cloud.instances() == []
    assert "fruitdask: cannot close the security group of fruitdask: DescribeSecurityGroups: " in result.output


@pytest.mark.slow
def test_only_the_given_regions_are_searched(cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")  # Moto has a thousand for each region.
    result = invoke("list", "--region", "eu-west-3", "--region", "eu-west-1", "--region", "eu-west-3")
    assert result.output == "No instance of fruitdask in eu-west-3, eu-west-1.\n"
    with cloud.client("ec2") as client:
        names = sorted(region["RegionName"] for region in client.describe_regions()["Regions"])
    assert invoke("list", "--all-regions").output == f"No instance of fruitdask in {', '.join(names)}.\n"


@pytest.mark.parametrize("command", ["list", "cleanup"])
def test_a_refusal_is_a_sentence_with_exit_code_5(cloud: LoopbackEC2, command: str) -> None:
    cloud.faults.refusals.append(Refusal("ExpiredToken", "DescribeInstances", status=400))
    result = invoke(command)
    assert result.exit_code == 5
    assert re.fullmatch(r"fruitdask: cannot list the instances .* expired; log in again .*\n", result.output)


@pytest.mark.parametrize("command", ["list", "cleanup"])
def test_no_region_is_a_sentence_with_exit_code_2(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    result = invoke(command)
    assert (result.exit_code, result.output) == (
        2,
        "fruitdask: no AWS region is set; give --region NAME or --all-regions, or set AWS_DEFAULT_REGION\n",
    )


def test_invalid_region_is_a_sentence_with_exit_code_2() -> None:
    result = invoke("list", "--region", "eu west 3")
    assert (result.exit_code, result.output) == (
        2,
        "fruitdask: --region eu west 3: expected the name of a region such as eu-west-3\n",
    )
