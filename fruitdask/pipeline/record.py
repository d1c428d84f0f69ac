"""The record of processing (GDPR, article 30): what was done with photographs, for whom, how protected, and how long it is kept."""

from datetime import UTC, datetime, timedelta
from typing import Any

from fruitdask.cluster.regions import is_loopback
from fruitdask.core.config import Config
from fruitdask.core.storage import Location, find_encryption, hide_secrets
from fruitdask.errors import ResidencyError


def describe_processing(config: Config, *, since: str | None = None) -> dict[str, Any]:
    """Describe a processing as its configuration does; `describe_protection` adds what is found out."""
    privacy = config.privacy
    days = privacy.retention_days
    begin = datetime.fromisoformat(since) if since else datetime.now(UTC)
    return {
        "data": "photographs; features, small pictures, paths and classes made from them",
        "metadata": "counted, never kept",
        "purpose": privacy.purpose,
        "controller": privacy.controller,
        "retention_days": days,
        "keep_until": (begin + timedelta(days=days)).date().isoformat() if days else None,
    }


def describe_protection(config: Config, written: Location, client: Any = None) -> dict[str, str | None]:
    """Describe how data are encrypted, as found on what was written first and on the cluster."""
    at_rest = find_encryption(written)
    if config.privacy.require_encryption and at_rest is None and not written.is_local:
        raise ResidencyError(
            f"output: {hide_secrets(written.url)} was stored without encryption, which privacy.require_encryption asks for; turn "
            "on the default encryption of the bucket, or ask for it by output.storage_options: "
            "{s3_additional_kwargs: {ServerSideEncryption: AES256}}"
        )
    in_transit = {} if client is None else {"in_transit": _describe_transport(client.scheduler.address)}
    return {"at_rest": at_rest, **in_transit}


def _describe_transport(address: str) -> str:
    """Say how the processes of a cluster talk with each other."""
    if address.startswith(("tls://", "wss://")):
        return "TLS"
    return "one machine" if is_loopback(address) else "none"
