"""Artifacts of earlier runs in the user's cache folder, named by the hash of their inputs."""

import hashlib
import json
import logging
import platform
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from fruitdask.core.config import ModelConfig
from fruitdask.core.storage import Location, write_file
from fruitdask.core.version import __version__, find_version
from fruitdask.errors import StorageError
from fruitdask.worker.models.artifact import ModelArtifact
from fruitdask.worker.models.build import fingerprint_model
from fruitdask.worker.models.engines import choose_engine

logger = logging.getLogger(__name__)

#: Packages that determine an artifact; ndf holds SqueezeNet's weights.
_PACKAGES = ("keras", "tensorflow", "numpy", "h5py", "ndf")


def find_artifact(config: ModelConfig) -> ModelArtifact | None:
    """Find an artifact in the cache."""
    description, payload = _name_files(config)
    try:
        fields = json.loads(description.read_text())
        sha256 = fields.pop("sha256")
        artifact = ModelArtifact(payload=payload.read_bytes(), **fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return artifact if artifact.sha256 == sha256 else None


def keep_artifact(config: ModelConfig, artifact: ModelArtifact) -> None:
    """Store an artifact in the cache, if its folder is writable."""
    if artifact.has_foreign_code:
        logger.info("not caching the network: it has layers whose code may change")
        return
    description, payload = _name_files(config)
    fields = asdict(artifact) | {"sha256": artifact.sha256}
    del fields["payload"]
    try:
        write_file(Location(str(payload)), artifact.payload)
        write_file(Location(str(description)), json.dumps(fields).encode())
    except StorageError as error:
        logger.info("not caching the network: %s", error)


def _name_files(config: ModelConfig) -> tuple[Path, Path]:
    """Name the files of an artifact after everything that determines it."""
    import platformdirs

    engine = choose_engine(config)
    versions = {name: find_version(name) for name in (*_PACKAGES, engine)}
    # An artifact built with allow_code must not be found without it; the code is bytecode of one Python version.
    parts = [fingerprint_model(config), config.allow_code, engine, platform.python_version(), versions, _hash_code()]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = platformdirs.user_cache_path("fruitdask") / "models"
    return folder / f"{key}.json", folder / f"{key}.bin"


@lru_cache(maxsize=1)
def _hash_code() -> str:
    """Hash the code that builds networks, which in a checkout changes without the version."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
