"""Clusters on Amazon EC2 that start and end with a run."""

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from fruitdask.cluster.closing import close_uninterrupted
from fruitdask.cluster.ec2.instances import terminate_run
from fruitdask.cluster.ec2.machines import describe_types, find_image
from fruitdask.cluster.ec2.network import Network, find_network
from fruitdask.cluster.ec2.options import build_options, check_options
from fruitdask.core.config import EC2ClusterConfig
from fruitdask.errors import ClusterStartError, FruitdaskError

if TYPE_CHECKING:
    from fruitdask.cluster.ec2.cluster import RunCluster

logger = logging.getLogger(__name__)

_CLIENT_CLOSE_SECONDS = 5
_END_SECONDS = 60
#: A worker ends after a minute without work: a new one takes minutes to start, and AWS bills at least a minute.
_ADAPT = {"interval": "5s", "wait_count": 12}


@contextmanager
def open_ec2(config: EC2ClusterConfig) -> Iterator[Any]:
    """Start a scheduler and workers on EC2, and terminate them at the end, whatever happens."""
    check_options(config)
    stack = ExitStack()
    try:
        yield _start(config, stack)
    finally:
        close_uninterrupted(stack)


def _start(config: EC2ClusterConfig, stack: ExitStack) -> Any:
    """Start a cluster, and push each cleanup on the stack before it can be needed."""
    from fruitdask.cluster.ec2.cluster import explain_cause

    network = find_network(config)
    stack.callback(_try, network.withdraw)
    try:
        return _connect(config, _build_cluster(config, network, stack), stack)
    except FruitdaskError:
        raise
    except Exception as error:
        # Dask and dask-cloudprovider raise any error, mostly a RuntimeError from the cause.
        raise ClusterStartError(f"the cluster on EC2 did not start: {explain_cause(error)}") from error


def _build_cluster(config: EC2ClusterConfig, network: Network, stack: ExitStack) -> "RunCluster":
    """Build a cluster without launching anything."""
    from distributed.utils import LoopRunner, silence_logging_cmgr, sync

    from fruitdask.cluster.ec2.cluster import RunCluster, Settings
    from fruitdask.cluster.ec2.security import make_security, serialize_settings

    types = describe_types(network.region, config.types, zones=[network.zone])
    # EC2Cluster documents this option for workers but does not accept it.
    module = {"worker_module": config.worker_module, "worker_class": None} if config.worker_module else {}
    scheduler_image, worker_image = images = [
        find_image(network.region, architecture=one.architecture, has_gpu=one.has_gpu, ami=config.ami)
        for one in (types[name] for name in config.types)
    ]
    security, run_id = make_security(lifetime_seconds=config.max_lifetime), uuid.uuid4().hex[:12]
    settings = Settings(
        run_id=run_id,
        start_timeout_seconds=config.start_timeout,
        root_devices={image.id: image.root_device_name for image in images},
        inherited=serialize_settings(security, no_workers_timeout_seconds=config.start_timeout),
        scheduler={"ami": scheduler_image.id, "gpu_instance": False},
        worker={"ami": worker_image.id, "gpu_instance": types[config.types[1]].has_gpu, **module},
    )
    # A task's error returns as its exception, as with a local cluster.
    stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
    runner = LoopRunner()
    runner.start()
    stack.callback(runner.stop)

    async def build() -> RunCluster:
        # Constructed on the loop, a cluster does not start yet, so that its cleanup can be registered before.
        return RunCluster(
            settings=settings,
            loop=runner.loop,
            security=security,
            protocol="tls",
            region=network.region,
            vpc=network.vpc,
            subnet_id=network.subnet_id,
            security_groups=network.security_groups,
            filesystem_size=max(config.filesystem_size, *(image.root_volume_gb for image in images)),
            **build_options(config, run_id=run_id),
        )

    cluster: RunCluster = sync(runner.loop, build)
    stack.callback(_terminate, cluster)
    stack.callback(_try, lambda: sync(runner.loop, cluster.end, callback_timeout=_END_SECONDS))
    return cluster


def _connect(config: EC2ClusterConfig, cluster: "RunCluster", stack: ExitStack) -> Any:
    """Launch a cluster's instances, and connect to it."""
    from distributed import Client

    from fruitdask.cluster.versions import check_versions

    logger.info("starting run %s in %s", cluster.settings.run_id, cluster.region)
    cluster.sync(cluster.launch)
    client = Client(cluster)
    stack.callback(_try, lambda: client.close(timeout=_CLIENT_CLOSE_SECONDS))
    check_versions(client, image=config.docker_image)
    if config.adaptive:
        cluster.adapt(minimum=config.adaptive.minimum, maximum=config.adaptive.maximum, **_ADAPT)
    return client


def _terminate(cluster: "RunCluster") -> None:
    """Terminate the instances of a run by their tag."""
    if not cluster.fleet.has_asked:
        return
    try:
        ended = terminate_run(cluster.region, cluster.settings.run_id)
    except Exception as error:
        # Instances that still run cost money, so the user must know, whatever the error.
        left = ", ".join(cluster.list_running()) or "instances, if any,"
        raise ClusterStartError(
            f"{left} of run {cluster.settings.run_id} may still run, because they could not be terminated ({error}); "
            f"terminate them: fruitdask clusters cleanup --region {cluster.region}"
        ) from error
    for instance_id in cluster.list_running():
        cluster.fleet.note_end(instance_id)
    logger.info("run %s has ended; terminated: %s", cluster.settings.run_id, ", ".join(ended) or "nothing was left")


def _try(function: Callable[[], Any]) -> None:
    """Run a cleanup, and only log its failure."""
    try:
        function()
    except Exception as error:
        logger.warning("at the end of the cluster: %s", error)
