"""Options of EC2Cluster from the configuration."""

import math
from datetime import UTC, datetime
from typing import Any

from fruitdask.cluster.cloud.options import INSTALL_DOCKER, build_shared_options, quote_commands
from fruitdask.core.aws import RUN_TAG
from fruitdask.core.config import EC2ClusterConfig

#: Tag of instances and volumes with the start of their run.
_STARTED_TAG = "fruitdask:started"
#: Options that EC2Cluster takes unchanged.
_UNCHANGED = ("spot", "iam_instance_profile", "key_name", "enable_detailed_monitoring", "use_private_ip")


def build_options(config: EC2ClusterConfig, *, run_id: str) -> dict[str, Any]:
    """Build the options of EC2Cluster that need no query of AWS."""
    tags = {RUN_TAG: run_id, _STARTED_TAG: datetime.now(UTC).isoformat(timespec="seconds")}
    return {
        **build_shared_options(config),
        **{name: getattr(config, name) for name in _UNCHANGED},
        "scheduler_instance_type": config.types[0],
        "worker_instance_type": config.types[1],
        "bootstrap": config.bootstrap or False,
        "extra_bootstrap": _build_bootstrap(config),
        "instance_tags": config.instance_tags | tags,
        "volume_tags": config.volume_tags | tags,
    }


def _build_bootstrap(config: EC2ClusterConfig) -> list[str]:
    """Build the commands before the container; first the shutdown after the lifetime, whatever fails later."""
    commands = [f"shutdown -h +{math.ceil(config.max_lifetime / 60)}"]
    if config.bootstrap is None:
        commands.append(INSTALL_DOCKER)
    return quote_commands([*commands, *config.extra_bootstrap])
