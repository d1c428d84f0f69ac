"""Options of machines in a cloud: refuse those that cannot be passed on, and replace harmful defaults."""

import json
import re
from typing import Any

from fruitdask.cluster.allocator import MALLOC_VARIABLES
from fruitdask.core.config import CloudClusterConfig
from fruitdask.errors import ConfigError

_VARIABLE_NAME = re.compile(r"[A-Za-z_]\w*")
_CREDENTIAL = re.compile(
    r"PASSWORD|PASSWD|SECRET|TOKEN(?!IZER)|CREDENTIAL|CONNECTION_?STRING|" r"(ACCESS|ACCOUNT|API|PRIVATE|STORAGE)_?KEY",
    re.IGNORECASE,
)
_SPECIAL_IN_SHELL = re.compile(r"[\"'`$\\\x00-\x1f]")
#: Ubuntu's package; machine images for GPUs have Docker already.
INSTALL_DOCKER = (
    "command -v docker || (apt-get update -y && DEBIAN_FRONTEND=noninteractive apt-get install -y docker.io)"
)
#: Options that reach a machine through its shell.
_SHELL = ("docker_image", "docker_args", "worker_module", "worker_class", "worker_options", "scheduler_options")


def check_options(config: CloudClusterConfig, *, remedy: str) -> None:
    """Refuse options that the shell of a machine would break, and environment variables that look like secrets."""
    for name, value in config.env_vars.items():
        if not _VARIABLE_NAME.fullmatch(name):
            raise ConfigError(
                f"cluster.env_vars: {name!r} is not a name of an environment variable; use letters, digits and _"
            )
        if _CREDENTIAL.search(name):
            raise ConfigError(
                f"cluster.env_vars: {name} looks like a credential, and anyone who may describe machines could "
                f"read it; {remedy}"
            )
        if _SPECIAL_IN_SHELL.search(value):
            raise ConfigError(
                f"cluster.env_vars: the value of {name} has a quote, a backquote, a backslash, a $ or a line break, "
                "which the shell of the machine would change; put it into cluster.docker_image"
            )
    for option in _SHELL:
        text = json.dumps(getattr(config, option))
        if "'" in text or "\\n" in text:
            raise ConfigError(
                f"cluster.{option}: expected no single quote and no line break, which the shell of the machine would "
                "change; remove it"
            )


def build_shared_options(config: CloudClusterConfig) -> dict[str, Any]:
    """Build the options that the clusters of all clouds have."""
    n_workers = config.n_workers
    if config.adaptive:
        n_workers = max(1, config.adaptive.minimum, min(n_workers, config.adaptive.maximum))
    return {
        "n_workers": n_workers,
        "docker_image": config.docker_image,
        "docker_args": config.docker_args,
        "worker_class": config.worker_class,
        # Variables of the container win over Dask's settings.
        "env_vars": MALLOC_VARIABLES | config.env_vars,
        "worker_options": {"death_timeout": config.idle_timeout, **config.worker_options},
        "scheduler_options": {"idle_timeout": f"{config.idle_timeout}s", **config.scheduler_options},
    }


def quote_commands(commands: list[str]) -> list[str]:
    """Quote commands before the container: dask-cloudprovider writes them into YAML, where a colon has a meaning."""
    return [json.dumps(command) for command in commands]
