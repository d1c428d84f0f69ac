"""Artifacts that were built before, by content, in the user's cache folder."""

import hashlib
import json
import logging
import platform
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fruitdask.core.config import ModelConfig
from fruitdask.core.storage import Location, write_file
from fruitdask.core.version import __version__
from fruitdask.errors import StorageError
from fruitdask.worker.models.artifact import ModelArtifact
from fruitdask.worker.models.build import fingerprint_model
from fruitdask.worker.models.engines import choose_engine

logger = logging.getLogger(__name__)

#: Packages that can change what is built; ndf brings SqueezeNet's weights.
_PACKAGES = ("keras", "tensorflow", "numpy", "h5py", "ndf")


def find_artifact(config: ModelConfig) -> ModelArtifact | None:
    """Find an artifact that was built before."""
    description, payload = _name_files(config)
    try:
        fields = json.loads(description.read_text())
        sha256 = fields.pop("sha256")
        artifact = ModelArtifact(payload=payload.read_bytes(), **fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return artifact if artifact.sha256 == sha256 else None


def keep_artifact(config: ModelConfig, artifact: ModelArtifact) -> None:
    """Keep an artifact for the next run, if the cache folder can be written."""
    if artifact.has_foreign_code:
        logger.info("the network is built anew next time: it has layers whose code may change")
        return
    description, payload = _name_files(config)
    fields = asdict(artifact) | {"sha256": artifact.sha256}
    del fields["payload"]
    try:
        write_file(Location(str(payload)), artifact.payload)
        write_file(Location(str(description)), json.dumps(fields).encode())
    except StorageError as error:
        logger.info("the network is built anew next time: %s", error)


def _name_files(config: ModelConfig) -> tuple[Path, Path]:
    """Name the files of an artifact after all that determines it."""
    import platformdirs

    engine = choose_engine(config)
    # Whatever runs the network, Keras builds it on TensorFlow.
    versions = {name: _find_version(name) for name in (*_PACKAGES, engine)}
    # What was built where code was allowed must not be found where it is not; such code is Python's own bytecode.
    parts = [fingerprint_model(config), config.allow_code, engine, platform.python_version(), versions, _hash_code()]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = platformdirs.user_cache_path("fruitdask") / "models"
    return folder / f"{key}.json", folder / f"{key}.bin"


def _find_version(package: str) -> str | None:
    """Find the version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _hash_code() -> str:
    """Hash the code that builds networks: with a checkout, it changes while the version stays."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
