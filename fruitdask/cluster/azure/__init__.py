"""Clusters on virtual machines of Azure that start and end with a run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from fruitdask.cluster.azure.machines import Arm, check_installed, find_subscription
from fruitdask.cluster.azure.network import find_network
from fruitdask.cluster.azure.options import build_machine, build_options, find_identity, find_image
from fruitdask.cluster.cloud import Blueprint, open_cloud
from fruitdask.cluster.cloud.options import check_options
from fruitdask.core.config import AzureClusterConfig

if TYPE_CHECKING:
    from fruitdask.cluster.azure.cluster import RunCluster
    from fruitdask.cluster.cloud.cluster import Settings


@contextmanager
def open_azure(config: AzureClusterConfig) -> Iterator[Any]:
    """Start a scheduler and workers on Azure, and delete them at the end, whatever happens."""
    check_installed()
    check_options(config, remedy="give machines an identity instead: cluster.identity")
    with open_cloud(config, lambda stack: _prepare(config, stack), cloud="Azure") as client:
        yield client


def _prepare(config: AzureClusterConfig, stack: ExitStack) -> Blueprint:
    """Find the network, and describe the machines."""
    subscription = find_subscription(config.subscription_id)
    arm = Arm(subscription, config.resource_group)
    stack.callback(arm.close)
    network, identity = find_network(config, arm), find_identity(config, subscription)

    def build(settings: "Settings", options: dict[str, Any]) -> "RunCluster":
        from fruitdask.cluster.azure.cluster import RunCluster

        own = build_options(config, subscription=subscription)
        return RunCluster(settings=settings, arm=arm, network=network, tags=config.tags, **options, **own)

    def describe(*, is_spot: bool, has_gpu: bool) -> dict[str, Any]:
        model = build_machine(config, is_spot=is_spot, identity=identity)
        return {"vm_image": find_image(config, has_gpu=has_gpu), "gpu_instance": has_gpu, "model": model}

    return Blueprint(
        scheduler=describe(is_spot=False, has_gpu=False),
        worker=describe(is_spot=config.spot, has_gpu=config.has_gpu),
        build=build,
    )
