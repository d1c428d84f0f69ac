"""What clusters in all clouds have in common: they start and end with a run, whatever happens."""

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fruitdask.cluster.closing import close_uninterrupted
from fruitdask.core.config import CloudClusterConfig
from fruitdask.errors import ClusterStartError, FruitdaskError

if TYPE_CHECKING:
    from fruitdask.cluster.cloud.cluster import CloudCluster, Settings

logger = logging.getLogger(__name__)

_CLIENT_CLOSE_SECONDS = 5
_END_SECONDS = 60
#: A worker ends after a minute without work: a new one takes minutes to start, and clouds bill at least a minute.
_ADAPT: dict[str, Any] = {"interval": "5s", "wait_count": 12}


@dataclass(frozen=True)
class Blueprint:
    """The description of a cluster that is not launched yet."""

    #: Options of the machines of the scheduler and of the workers.
    scheduler: dict[str, Any]
    worker: dict[str, Any]
    #: Constructs the cluster of some settings, on its event loop.
    build: "Callable[[Settings, dict[str, Any]], CloudCluster]"


@contextmanager
def open_cloud(config: CloudClusterConfig, prepare: Callable[[ExitStack], Blueprint], *, cloud: str) -> Iterator[Any]:
    """Start a scheduler and workers, and end them whatever happens; then clean up what `prepare` has opened."""
    stack = ExitStack()
    try:
        yield _start(config, prepare, stack, cloud)
    finally:
        close_uninterrupted(stack)


def _start(config: CloudClusterConfig, prepare: Callable[[ExitStack], Blueprint], stack: ExitStack, cloud: str) -> Any:
    """Start a cluster, and push each cleanup on the stack before it can be needed."""
    blueprint = prepare(stack)
    from fruitdask.cluster.cloud.cluster import explain_cause

    try:
        return _connect(config, _build_cluster(config, blueprint, stack), stack)
    except FruitdaskError:
        raise
    except Exception as error:
        # Dask and dask-cloudprovider raise any error, mostly a RuntimeError from the cause.
        raise ClusterStartError(f"the cluster on {cloud} did not start: {explain_cause(error)}") from error


def _build_cluster(config: CloudClusterConfig, blueprint: Blueprint, stack: ExitStack) -> "CloudCluster":
    """Build a cluster without launching anything."""
    from distributed.utils import LoopRunner, silence_logging_cmgr, sync

    from fruitdask.cluster.cloud.cluster import Settings
    from fruitdask.cluster.cloud.security import make_security, serialize_settings

    # dask-cloudprovider documents this option for workers but does not accept it.
    module = {"worker_module": config.worker_module, "worker_class": None} if config.worker_module else {}
    security = make_security(lifetime_seconds=config.max_lifetime)
    settings = Settings(
        run_id=uuid.uuid4().hex[:12],
        start_timeout_seconds=config.start_timeout,
        inherited=serialize_settings(security, no_workers_timeout_seconds=config.start_timeout),
        scheduler=blueprint.scheduler,
        worker=blueprint.worker | module,
    )
    # A task's error returns as its exception, as with a local cluster.
    stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
    runner = LoopRunner()
    runner.start()
    stack.callback(runner.stop)

    async def build() -> "CloudCluster":
        # Constructed on the loop, a cluster does not start yet, so that its cleanup can be registered before.
        return blueprint.build(settings, {"loop": runner.loop, "security": security, "protocol": "tls"})

    cluster: CloudCluster = sync(runner.loop, build)
    stack.callback(_terminate, cluster)
    stack.callback(try_to, lambda: sync(runner.loop, cluster.end, callback_timeout=_END_SECONDS))
    return cluster


def _connect(config: CloudClusterConfig, cluster: "CloudCluster", stack: ExitStack) -> Any:
    """Launch a cluster's machines, and connect to it."""
    from distributed import Client

    from fruitdask.cluster.versions import check_versions

    logger.info("starting run %s in %s", cluster.settings.run_id, cluster.place)
    cluster.sync(cluster.launch)
    client = Client(cluster)
    stack.callback(try_to, lambda: client.close(timeout=_CLIENT_CLOSE_SECONDS))
    check_versions(client, image=config.docker_image)
    if config.adaptive:
        cluster.adapt(minimum=config.adaptive.minimum, maximum=config.adaptive.maximum, **_ADAPT)
    return client


def _terminate(cluster: "CloudCluster") -> None:
    """End the machines of a run by their tag."""
    from fruitdask.cluster.cloud.cluster import explain_cause

    if not cluster.fleet.has_asked:
        return
    try:
        ended = cluster.terminate()
    except Exception as error:
        # Machines that still run cost money, so the user must know, whatever the error.
        left = ", ".join(cluster.list_running()) or "machines, if any,"
        raise ClusterStartError(
            f"{left} of run {cluster.settings.run_id} may still run, because they could not be terminated "
            f"({explain_cause(error)}); terminate them: {cluster.cleanup_command}"
        ) from error
    for machine_id in cluster.list_running():
        cluster.fleet.note_end(machine_id)
    logger.info("run %s has ended; terminated: %s", cluster.settings.run_id, ", ".join(ended) or "nothing was left")


def try_to(function: Callable[[], Any]) -> None:
    """Run a cleanup, and only log its failure."""
    try:
        function()
    except Exception as error:
        logger.warning("at the end of the cluster: %s", error)
