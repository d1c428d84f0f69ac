"""Options of EC2Cluster from the configuration: refuse those that cannot be passed on, and replace harmful defaults."""

import json
import math
import re
from datetime import UTC, datetime
from typing import Any

from fruitdask.cluster.allocator import MALLOC_VARIABLES
from fruitdask.core.aws import RUN_TAG
from fruitdask.core.config import EC2ClusterConfig
from fruitdask.errors import ConfigError

#: Tag of instances and volumes with the start of their run.
_STARTED_TAG = "fruitdask:started"

_VARIABLE_NAME = re.compile(r"[A-Za-z_]\w*")
_CREDENTIAL = re.compile(
    r"PASSWORD|PASSWD|SECRET|TOKEN(?!IZER)|CREDENTIAL|ACCESS_?KEY|API_?KEY|PRIVATE_?KEY", re.IGNORECASE
)
_SPECIAL_IN_SHELL = re.compile(r"[\"'`$\\\x00-\x1f]")
#: Ubuntu's package; machine images for GPUs have Docker already.
_INSTALL_DOCKER = (
    "command -v docker || (apt-get update -y && DEBIAN_FRONTEND=noninteractive apt-get install -y docker.io)"
)
#: Options that EC2Cluster takes unchanged, and those that reach an instance through its shell.
_UNCHANGED = (
    *("n_workers", "docker_image", "spot", "iam_instance_profile", "key_name", "worker_class", "docker_args"),
    *("enable_detailed_monitoring", "use_private_ip"),
)
_SHELL = ("docker_image", "docker_args", "worker_module", "worker_class", "worker_options", "scheduler_options")


def check_options(config: EC2ClusterConfig) -> None:
    """Refuse options that the shell of an instance would break, and environment variables that look like secrets."""
    for name, value in config.env_vars.items():
        if not _VARIABLE_NAME.fullmatch(name):
            raise ConfigError(
                f"cluster.env_vars: {name!r} is not a name of an environment variable; use letters, digits and _"
            )
        if _CREDENTIAL.search(name):
            raise ConfigError(
                f"cluster.env_vars: {name} looks like a credential, and everybody who may describe instances could "
                "read it; give workers a role instead: cluster.iam_instance_profile"
            )
        if _SPECIAL_IN_SHELL.search(value):
            raise ConfigError(
                f"cluster.env_vars: the value of {name} has a quote, a backquote, a backslash, a $ or a line break, "
                "which the shell of the instance would change; put it into cluster.docker_image"
            )
    for option in _SHELL:
        text = json.dumps(getattr(config, option))
        if "'" in text or "\\n" in text:
            raise ConfigError(
                f"cluster.{option}: expected no single quote and no line break, which the shell of the instance would "
                "change; remove it"
            )


def build_options(config: EC2ClusterConfig, *, run_id: str) -> dict[str, Any]:
    """Build the options of EC2Cluster that need no query of AWS."""
    tags = {RUN_TAG: run_id, _STARTED_TAG: datetime.now(UTC).isoformat(timespec="seconds")}
    options = {name: getattr(config, name) for name in _UNCHANGED}
    if config.adaptive:
        options["n_workers"] = max(1, config.adaptive.minimum, min(config.n_workers, config.adaptive.maximum))
    return options | {
        # Variables of the container win over Dask's settings.
        "env_vars": MALLOC_VARIABLES | config.env_vars,
        "scheduler_instance_type": config.types[0],
        "worker_instance_type": config.types[1],
        "bootstrap": config.bootstrap or False,
        "extra_bootstrap": _build_bootstrap(config),
        "instance_tags": config.instance_tags | tags,
        "volume_tags": config.volume_tags | tags,
        "worker_options": {"death_timeout": config.idle_timeout, **config.worker_options},
        "scheduler_options": {"idle_timeout": f"{config.idle_timeout}s", **config.scheduler_options},
    }


def _build_bootstrap(config: EC2ClusterConfig) -> list[str]:
    """Build the commands before the container; first the shutdown after the lifetime, whatever fails later."""
    commands = [f"shutdown -h +{math.ceil(config.max_lifetime / 60)}"]
    if config.bootstrap is None:
        commands.append(_INSTALL_DOCKER)
    # EC2Cluster writes them into YAML unquoted, where a colon or a # has a meaning; JSON strings are valid YAML.
    return [json.dumps(command) for command in [*commands, *config.extra_bootstrap]]
