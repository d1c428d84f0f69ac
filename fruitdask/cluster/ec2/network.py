"""The network of instances on AWS, and who may reach them."""

import ipaddress
import logging
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fruitdask.cluster.ec2.instances import list_instances, open_ec2
from fruitdask.core.config import EC2ClusterConfig
from fruitdask.errors import ClusterStartError, ConfigError

logger = logging.getLogger(__name__)

#: Name and tag of the security group that is made if the configuration has none.
GROUP_NAME = "fruitdask"
GROUP_TAG = ("fruitdask", "cluster")
_SCHEDULER_PORT = 8786
_ADDRESS_URL = "https://checkip.amazonaws.com"
_ADDRESS_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Network:
    """The network of a run's instances."""

    region: str
    zone: str
    vpc: str
    subnet_id: str
    security_groups: list[str]
    #: Revokes the rule that the run has added.
    withdraw: Callable[[], None]


def find_network(config: EC2ClusterConfig) -> Network:
    """Find the subnet and the security groups of a run; by default, make a group that admits only this machine."""
    with open_ec2(config.region, action="find a network for the cluster") as client:
        subnet = _find_subnet(client, config)
        vpc, groups = subnet["VpcId"], config.security_groups
        withdraw: Callable[[], None] = _do_nothing
        if groups is None:
            permission = _build_permission(client, config, vpc)
            groups = [_find_group(client, vpc)]
            withdraw = _admit(client, groups[0], permission)
        region: str = client.meta.region_name
    return Network(region, subnet["AvailabilityZone"], vpc, subnet["SubnetId"], groups, withdraw)


def withdraw_rules(region: str | None) -> int:
    """Revoke and count the rules that runs have left in fruitdask's security group; only if no instance is left."""
    kinds, n_ranges = ("IpRanges", "Ipv6Ranges"), 0
    key, value = GROUP_TAG
    filters = [{"Name": "group-name", "Values": [GROUP_NAME]}, {"Name": f"tag:{key}", "Values": [value]}]
    with open_ec2(region, action="close the security group of fruitdask") as client:
        for group in client.describe_security_groups(Filters=filters)["SecurityGroups"]:
            # Keep the rules by which instances reach each other.
            kept = {"UserIdGroupPairs", "PrefixListIds"}
            rules = [{key: rule[key] for key in rule if key not in kept} for rule in group["IpPermissions"]]
            open_rules = [rule for rule in rules if any(rule.get(kind) for kind in kinds)]
            n_ranges += sum(len(rule.get(kind, ())) for rule in open_rules for kind in kinds)
            if open_rules:
                client.revoke_security_group_ingress(GroupId=group["GroupId"], IpPermissions=open_rules)
    return n_ranges


def _do_nothing() -> None:
    """Do nothing."""


def _find_subnet(client: Any, config: EC2ClusterConfig) -> dict[str, Any]:
    """Find the subnet, the first by zone if there are several."""
    zones = [config.availability_zone] if isinstance(config.availability_zone, str) else config.availability_zone or []
    if config.subnet_id:
        found = client.describe_subnets(SubnetIds=[config.subnet_id])["Subnets"]
        where = f"cluster.subnet_id {config.subnet_id}"
    else:
        vpc = config.vpc or _find_default_vpc(client)
        found = client.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"]
        where = f"the VPC {vpc}"
    suitable = [subnet for subnet in found if not zones or subnet["AvailabilityZone"] in zones]
    if not suitable:
        there = ", ".join(sorted({subnet["AvailabilityZone"] for subnet in found})) or "none at all"
        raise ClusterStartError(
            f"{where} has no subnet in {' or '.join(zones) or client.meta.region_name} (zones: {there}); "
            "give another cluster.subnet_id or cluster.availability_zone"
        )
    return min(suitable, key=lambda subnet: (subnet["AvailabilityZone"], subnet["SubnetId"]))


def _find_default_vpc(client: Any) -> str:
    """Find the default VPC of the region."""
    found = client.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not found:
        raise ClusterStartError(
            f"the account has no default VPC in {client.meta.region_name}; give cluster.vpc or cluster.subnet_id, "
            "or create one: aws ec2 create-default-vpc"
        )
    vpc: str = found[0]["VpcId"]
    return vpc


def _find_group(client: Any, vpc: str) -> str:
    """Find or make the security group in which instances reach each other."""
    filters = [{"Name": "group-name", "Values": [GROUP_NAME]}, {"Name": "vpc-id", "Values": [vpc]}]
    found = client.describe_security_groups(Filters=filters)["SecurityGroups"]
    if not found:
        tags = [{"ResourceType": "security-group", "Tags": [dict(zip(("Key", "Value"), GROUP_TAG, strict=True))]}]
        description = "Dask clusters of fruitdask"
        found = [
            client.create_security_group(
                GroupName=GROUP_NAME, Description=description, VpcId=vpc, TagSpecifications=tags
            )
        ]
    group: str = found[0]["GroupId"]
    # Also for an existing group: a process may have been interrupted between creating it and this.
    inside = {"IpProtocol": "tcp", "FromPort": 0, "ToPort": 65535, "UserIdGroupPairs": [{"GroupId": group}]}
    _authorize(client, group, inside)
    return group


def _build_permission(client: Any, config: EC2ClusterConfig, vpc: str) -> dict[str, Any]:
    """Build the rule by which the client reaches the scheduler."""
    cidr = config.client_cidr
    if cidr is None and config.use_private_ip:
        cidr = client.describe_vpcs(VpcIds=[vpc])["Vpcs"][0]["CidrBlock"]
    cidr = cidr or _ask_own_address()
    try:
        is_ipv6 = ipaddress.ip_network(cidr).version == 6
    except ValueError as error:
        raise ConfigError(
            f"cluster.client_cidr: expected addresses such as 203.0.113.7/32, found {cidr}: {error}"
        ) from error
    ranges = {"Ipv6Ranges": [{"CidrIpv6": cidr}]} if is_ipv6 else {"IpRanges": [{"CidrIp": cidr}]}
    port = config.scheduler_options.get("port", _SCHEDULER_PORT)
    return {"IpProtocol": "tcp", "FromPort": port, "ToPort": port, **ranges}


def _ask_own_address() -> str:
    """Ask AWS for the public address of this machine."""
    try:
        with urllib.request.urlopen(_ADDRESS_URL, timeout=_ADDRESS_TIMEOUT_SECONDS) as answer:
            return str(ipaddress.ip_network(answer.read(100).decode().strip()))
    except (OSError, ValueError) as error:
        raise ClusterStartError(
            f"cannot find the public address of this machine ({_ADDRESS_URL}: {error}); set cluster.client_cidr, "
            "such as 203.0.113.7/32"
        ) from error


def _admit(client: Any, group: str, permission: dict[str, Any]) -> Callable[[], None]:
    """Admit the client to the scheduler, and return a function that revokes that."""
    is_new = _authorize(client, group, permission)
    region = client.meta.region_name

    def withdraw() -> None:
        # Another run of this machine needs the same rule.
        if any(not instance.is_ending for instance in list_instances(region)):
            return
        with open_ec2(region, action=f"revoke a rule of the security group {group}") as ec2:
            ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=[permission])

    return withdraw if is_new else _do_nothing


def _authorize(client: Any, group: str, permission: dict[str, Any]) -> bool:
    """Add a rule to a security group; False if it exists already."""
    from botocore.exceptions import ClientError

    try:
        client.authorize_security_group_ingress(GroupId=group, IpPermissions=[permission])
    except ClientError as error:
        if error.response["Error"]["Code"] != "InvalidPermission.Duplicate":
            raise
        return False
    return True
