"""Instance types and machine images are described as EC2 does, and errors explain what is missing."""

import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from ec2_gateway import Refusal
from loopback_ec2 import LoopbackEC2
from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from moto.ec2.models.amis import Ami

from fruitdask.cluster.ec2.machines import Image, InstanceType, describe_types, find_image
from fruitdask.errors import ClusterStartError

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.skipif(sys.platform != "linux", reason="the loopback EC2 needs all of 127.0.0.0/8, and /proc"),
]

GIB = 1024**3
DRIVERS = "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04) 202610{day:02}"


@pytest.fixture(scope="module")
def cloud() -> Iterator[LoopbackEC2]:
    """Start a loopback EC2 in Ireland."""
    with LoopbackEC2() as cloud, pytest.MonkeyPatch.context() as patch:
        cloud.use(patch)
        yield cloud


def add_image(cloud: LoopbackEC2, name: str, *, day: int, owner: str = "amazon", **options: Any) -> str:
    """Publish a machine image on a day of October; returns its id."""
    backend = ec2_backends[DEFAULT_ACCOUNT_ID][cloud.region]
    ami_id = f"ami-{len(backend.amis):017}"
    created = datetime(2026, 10, day)
    backend.amis[ami_id] = Ami(backend, ami_id, name=name, owner_alias=owner, creation_date=created, **options)
    return ami_id


@pytest.mark.parametrize(
    "expected",
    [
        InstanceType("t3.medium", 2, 4 * GIB, 0, "x86_64"),
        InstanceType("m6i.large", 2, 8 * GIB, 0, "x86_64"),
        InstanceType("c7g.large", 2, 4 * GIB, 0, "arm64"),
        InstanceType("g4dn.xlarge", 4, 16 * GIB, 1, "x86_64"),
        InstanceType("g4dn.12xlarge", 48, 192 * GIB, 4, "x86_64"),
    ],
    ids=lambda expected: expected.name,
)
def test_describe_types(cloud: LoopbackEC2, expected: InstanceType) -> None:
    assert describe_types(cloud.region, [expected.name]) == {expected.name: expected}
    assert expected.has_gpu == expected.name.startswith("g")


def test_describe_types_finds_the_zones_that_offer_all_types(cloud: LoopbackEC2) -> None:
    found = describe_types(None, ("t3.medium", "m6i.large", "t3.medium"), zones=["eu-west-1a", "eu-west-1b"])
    assert set(found) == {"t3.medium", "m6i.large"}


@pytest.mark.parametrize(
    ("name", "zones", "message"),
    [
        ("m6i.tiny", [], "EC2 has no instance type m6i.tiny in eu-west-1; set another cluster.worker_"),
        ("g5g.xlarge", [], "EC2 has no instance type g5g.xlarge in eu-west-1"),
        (
            "m6i.large",
            ["eu-west-1a", "eu-west-1z"],
            "eu-west-1z does not offer .* m6i.large, but eu-west-1a, .* does; ",
        ),
    ],
    ids=["no such type", "not in the region", "not in the zone"],
)
def test_describe_types_names_what_is_not_offered(
    cloud: LoopbackEC2, name: str, zones: list[str], message: str
) -> None:
    with pytest.raises(ClusterStartError, match=message):
        describe_types(cloud.region, [name], zones=zones)


@pytest.mark.parametrize("architecture", ["x86_64", "arm64"])
def test_find_image_chooses_ubuntu_by_canonical(cloud: LoopbackEC2, architecture: str) -> None:
    found = find_image(cloud.region, architecture=architecture, has_gpu=False)
    assert found.id == {"x86_64": cloud.ami, "arm64": cloud.arm_ami}[architecture]
    assert found.root_device_name == "/dev/sda1"


def test_find_image_chooses_the_newest_with_gpu_drivers(cloud: LoopbackEC2) -> None:
    name = DRIVERS.format(day=9)
    newest = add_image(cloud, name, day=9, root_device_name="/dev/xvda")
    add_image(cloud, DRIVERS.format(day=1), day=1)
    add_image(cloud, name, day=10, owner="somebody")
    add_image(cloud, name.replace("Base", "ARM64 Base"), day=10, architecture="arm64")
    found = find_image(cloud.region, architecture="x86_64", has_gpu=True)
    assert found == Image(newest, "/dev/xvda", 15)  # Moto gives all images 15 GB.


def test_find_image_looks_up_a_given_image(cloud: LoopbackEC2) -> None:
    ami = add_image(cloud, "mine", day=2, root_device_name="/dev/xvda")
    found = find_image(cloud.region, architecture="x86_64", has_gpu=False, ami=ami)
    assert (found.id, found.root_device_name) == (ami, "/dev/xvda")


@pytest.mark.parametrize(
    ("region", "has_gpu", "ami", "message"),
    [
        (
            "eu-west-1",
            False,
            "ami-0123456789abcdef0",
            "find the machine image ami-0123456789abcdef0: .*check cluster.ami, or",
        ),
        ("eu-west-1", False, "ubuntu", "find the machine image ubuntu: .*check cluster.ami, or remove it"),
        (
            "eu-north-1",
            True,
            None,
            "no machine image 'Deep .*' in eu-north-1; set cluster.ami .* with NVIDIA's drivers",
        ),
    ],
    ids=["no such image", "no image id", "none with drivers"],
)
def test_find_image_says_which_setting_names_an_image(
    cloud: LoopbackEC2, region: str, has_gpu: bool, ami: str | None, message: str
) -> None:
    with pytest.raises(ClusterStartError, match=message):
        find_image(region, architecture="x86_64", has_gpu=has_gpu, ami=ami)


def test_describe_types_explains_a_refusal(cloud: LoopbackEC2) -> None:
    cloud.faults.refusals.append(Refusal("UnauthorizedOperation", "DescribeInstanceTypes", count=1))
    with pytest.raises(ClusterStartError, match="look up the instance types t3.medium: .*iam-policy CONFIG"):
        describe_types(cloud.region, ["t3.medium"])
