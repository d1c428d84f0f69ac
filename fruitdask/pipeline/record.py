"""The record of processing (GDPR, article 30): what is done with photographs, for whom, how protected and how long
kept.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from fruitdask.cluster.regions import is_loopback
from fruitdask.core.config.sections import PrivacyConfig
from fruitdask.core.storage import Location, find_encryption, hide_secrets
from fruitdask.errors import ResidencyError


def describe_processing(privacy: PrivacyConfig, *, since: str | None = None) -> dict[str, Any]:
    """Return the configured part of the record; `describe_protection` adds what is found."""
    days = privacy.retention_days
    begin = datetime.fromisoformat(since) if since else datetime.now(UTC)
    return {
        "data": "photographs; features, thumbnails, paths and classes derived from them",
        "metadata": "counted, never stored",
        "purpose": privacy.purpose,
        "controller": privacy.controller,
        "retention_days": days,
        "keep_until": (begin + timedelta(days=days)).date().isoformat() if days else None,
    }


def describe_protection(privacy: PrivacyConfig, written: Location, client: Any = None) -> dict[str, str | None]:
    """Return how data are encrypted, at rest (found on the first file written) and in transit."""
    at_rest = find_encryption(written)
    if privacy.require_encryption and at_rest is None and not written.is_local:
        raise ResidencyError(
            f"output: {hide_secrets(written.url)} was stored without encryption, but privacy.require_encryption is "
            "set; turn on default encryption for the bucket, or set output.storage_options: "
            "{s3_additional_kwargs: {ServerSideEncryption: AES256}}"
        )
    in_transit = {} if client is None else {"in_transit": _describe_transport(client.scheduler.address)}
    return {"at_rest": at_rest, **in_transit}


def _describe_transport(address: str) -> str:
    """Return how the processes of a cluster communicate."""
    if address.startswith(("tls://", "wss://")):
        return "TLS"
    return "one machine" if is_loopback(address) else "none"
