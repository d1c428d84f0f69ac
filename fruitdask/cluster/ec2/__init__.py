"""Clusters on Amazon EC2 that start and end with a run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from fruitdask.cluster.cloud import Blueprint, open_cloud, try_to
from fruitdask.cluster.cloud.options import check_options
from fruitdask.cluster.ec2.machines import describe_types, find_image
from fruitdask.cluster.ec2.network import find_network
from fruitdask.cluster.ec2.options import build_options
from fruitdask.core.config import EC2ClusterConfig

if TYPE_CHECKING:
    from fruitdask.cluster.cloud.cluster import Settings
    from fruitdask.cluster.ec2.cluster import RunCluster


@contextmanager
def open_ec2(config: EC2ClusterConfig) -> Iterator[Any]:
    """Start a scheduler and workers on EC2, and terminate them at the end, whatever happens."""
    check_options(config, remedy="give workers a role instead: cluster.iam_instance_profile")
    with open_cloud(config, lambda stack: _prepare(config, stack), cloud="EC2") as client:
        yield client


def _prepare(config: EC2ClusterConfig, stack: ExitStack) -> Blueprint:
    """Find the network, the instance types and their images, and admit this machine."""
    network = find_network(config)
    stack.callback(try_to, network.withdraw)
    types = describe_types(network.region, config.types, zones=[network.zone])
    images = [
        find_image(network.region, architecture=one.architecture, has_gpu=one.has_gpu, ami=config.ami)
        for one in (types[name] for name in config.types)
    ]

    def build(settings: "Settings", options: dict[str, Any]) -> "RunCluster":
        from fruitdask.cluster.ec2.cluster import RunCluster

        return RunCluster(
            settings=settings,
            root_devices={image.id: image.root_device_name for image in images},
            region=network.region,
            vpc=network.vpc,
            subnet_id=network.subnet_id,
            security_groups=network.security_groups,
            filesystem_size=max(config.filesystem_size, *(image.root_volume_gb for image in images)),
            **options,
            **build_options(config, run_id=settings.run_id),
        )

    return Blueprint(
        scheduler={"ami": images[0].id, "gpu_instance": False},
        worker={"ami": images[1].id, "gpu_instance": types[config.types[1]].has_gpu},
        build=build,
    )
