"""Costs, compared with arithmetic by hand and AWS's own examples."""

import pytest

from fruitdask.cluster.cloud.prices import (
    Usage,
    compute_cost,
    compute_request_cost,
    compute_transfer_cost,
    find_hourly_price,
)
from fruitdask.core.config import EC2ClusterConfig

pytestmark = pytest.mark.cloud

REGIONS = ["us-east-1", "eu-west-1", "eu-west-3", "eu-central-1", "eu-north-1"]


@pytest.mark.parametrize(
    ("name", "region", "is_spot", "own", "expected"),
    [
        ("m6i.large", "eu-west-3", False, {}, 0.112),
        ("g4dn.xlarge", "eu-central-1", False, {}, 0.658),
        ("m6i.large", "eu-west-3", True, {}, 0.112),
        ("m6i.large", "eu-west-3", False, {"m6i.large": 0.2, "spot:m6i.large": 0.1}, 0.2),
        ("m6i.large", "eu-west-3", True, {"m6i.large": 0.2, "spot:m6i.large": 0.1}, 0.1),
        ("m6i.large", "eu-west-3", True, {"m6i.large": 0.2}, 0.2),
        ("m6i.large", "eu-west-3", False, {"spot:m6i.large": 0.1}, 0.112),
        ("m6i.large", "ap-south-1", False, {}, None),
        ("p9.huge", "eu-west-3", False, {}, None),
        ("p9.huge", "eu-west-3", False, {"p9.huge": 99}, 99),
        ("m6i.xlarge", "eu-west-3", False, {"m6i.large": 0.2}, 0.224),
    ],
    ids="table gpu spot own own-spot spot-by-own not-by-spot region type own-type own-size-alone".split(),
)
def test_find_hourly_price(
    name: str, region: str, is_spot: bool, own: dict[str, float], expected: float | None
) -> None:
    assert find_hourly_price(name, region=region, is_spot=is_spot, hourly_prices=own) == expected


@pytest.mark.parametrize(
    ("name", "region", "expected"),
    [
        ("t3.medium", "us-east-1", 0.0416),
        ("t3.medium", "eu-west-3", 0.0472),
        ("t3.xlarge", "eu-central-1", 0.192),
        ("m6i.xlarge", "eu-west-1", 0.214),
        ("m6i.2xlarge", "eu-north-1", 0.408),
        ("c6i.2xlarge", "eu-west-1", 0.3648),
        ("t3.small", "us-east-1", None),
        ("g5.2xlarge", "us-east-1", None),
    ],
)
def test_costs_of_all_sizes_of_a_family_equal_the_price_list(name: str, region: str, expected: float | None) -> None:
    assert find_hourly_price(name, region=region, is_spot=False) == pytest.approx(expected)


@pytest.mark.parametrize("region", REGIONS)
def test_default_instance_types_have_a_price(region: str) -> None:
    types = EC2ClusterConfig(kind="ec2", docker_image="any").types
    assert compute_cost([Usage(name, False, region, 1) for name in types]).unpriced == ()


@pytest.mark.parametrize(
    ("seconds", "billed"),
    [(0, 60), (1, 60), (60, 60), (61, 61), (7201.5, 7201.5)],
    ids="nothing short a-minute 61 hours".split(),
)
def test_instances_are_billed_by_the_second_for_at_least_a_minute(seconds: float, billed: float) -> None:
    cost = compute_cost([Usage("m6i.large", False, "us-east-1", seconds)], volume_gb=100, has_address=True)
    assert cost.instances == pytest.approx(0.096 / 3600 * billed)
    assert cost.volumes == pytest.approx(0.0952 * 100 / (30 * 86400) * billed)
    assert cost.addresses == pytest.approx(0.005 / 3600 * billed)
    assert cost.dollars == pytest.approx(cost.instances + cost.volumes + cost.addresses)


def test_cost_of_a_volume_equals_the_example_of_aws() -> None:
    """Example 1 of https://aws.amazon.com/ebs/pricing: 2,000 GB for 12 hours of a 30-day month."""
    cost = compute_cost([Usage("m6i.large", False, "us-east-1", 43_200)], volume_gb=2000)
    assert cost.volumes == pytest.approx(0.0952 * 2000 * 43_200 / (86_400 * 30)) and cost.addresses == 0


def test_cost_of_several_instances_is_their_sum_and_names_those_without_a_price() -> None:
    usages = [
        Usage("t3.medium", False, "eu-west-1", 3600),
        Usage("m6i.large", True, "eu-west-1", 1800),
        Usage("m6i.large", True, "eu-west-1", 30),
        Usage("p9.huge", False, "eu-west-1", 3600),
        Usage("p9.huge", False, "eu-west-1", 3600),
    ]
    cost = compute_cost(usages, {"spot:m6i.large": 0.04})
    assert cost.dollars == pytest.approx(0.0456 + 0.04 / 2 + 0.04 / 60)
    assert cost.unpriced == ("p9.huge in eu-west-1",)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("eu-west-1", "eu-west-1", 0),
        ("eu-west-1", "eu-west-3", 0.02 * 5),
        ("eu-west-1", None, 0.09 * 5),
        (None, "eu-west-1", 0),
        (None, None, 0),
    ],
    ids=["within", "between", "out", "in", "elsewhere"],
)
def test_compute_transfer_cost(source: str | None, target: str | None, expected: float) -> None:
    assert compute_transfer_cost(5e9, source=source, target=target) == pytest.approx(expected)


def test_compute_request_cost() -> None:
    assert compute_request_cost(n_reads=1_000_000, n_writes=10_000) == pytest.approx(0.43 + 0.054)
