"""Clusters on the loopback EC2: their configuration, and what they must not leave behind."""

from typing import Any

from cluster_events import PATIENCE_SECONDS, check_tls_is_restored
from loopback_ec2 import LoopbackEC2

from fruitdask.core.config import EC2ClusterConfig


def configure(**options: Any) -> EC2ClusterConfig:
    """Configure a cluster of one worker."""
    defaults = {"docker_image": "any", "client_cidr": "127.0.0.1/32", "n_workers": 1, "worker_options": {"nthreads": 1}}
    return EC2ClusterConfig(kind="ec2", **defaults | options)


def check_nothing_left(cloud: LoopbackEC2) -> None:
    """Check that no instance, process, rule or TLS setting is left."""
    assert cloud.wait_until_quiet(PATIENCE_SECONDS), [cloud.log(instance.id) for instance in cloud.instances()]
    assert cloud.instances() == [] and cloud.processes() == [] and cloud.leaks == []
    assert list_rules(cloud) == []
    check_tls_is_restored()


def list_rules(cloud: LoopbackEC2) -> list[tuple[int, int, str]]:
    """List the rules of fruitdask's security group: first port, last port, and the admitted address range."""
    filters = [{"Name": "group-name", "Values": ["fruitdask"]}]
    with cloud.client("ec2") as client:
        groups = client.describe_security_groups(Filters=filters)["SecurityGroups"]
    return [
        (rule["FromPort"], rule["ToPort"], entry["CidrIp"])
        for group in groups
        for rule in group["IpPermissions"]
        for entry in rule["IpRanges"]
    ]
