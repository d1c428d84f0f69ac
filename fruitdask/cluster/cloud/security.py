"""TLS of a cluster in the cloud: one key per run, which only its instances receive."""

from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

#: The clocks of instances and of this machine may differ.
_MARGIN = timedelta(days=1)


def make_security(*, lifetime_seconds: float) -> Any:
    """Make a key and a certificate for all roles of a cluster."""
    from distributed import Security

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fruitdask")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - _MARGIN)
    builder = builder.not_valid_after(now + timedelta(seconds=lifetime_seconds) + _MARGIN)
    certificate = builder.sign(key, hashes.SHA256())
    public = certificate.public_bytes(serialization.Encoding.PEM).decode()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    roles = ("client", "scheduler", "worker")
    return Security(
        # With True, dask-cloudprovider would leave the keys in the global configuration of Dask.
        require_encryption=False,
        tls_ca_file=public,
        **{f"tls_{role}_cert": public for role in roles},
        **{f"tls_{role}_key": secret for role in roles},
    )


def serialize_settings(security: Any, *, no_workers_timeout_seconds: float) -> str:
    """Serialize only those settings of Dask that instances need."""
    import dask.config

    tls = {"ca-file": security.tls_ca_file}
    for role in ("client", "scheduler", "worker"):
        tls[role] = {"cert": getattr(security, f"tls_{role}_cert"), "key": getattr(security, f"tls_{role}_key")}
    comm = {"default-scheme": "tls", "require-encryption": True, "tls": tls}
    scheduler = {"no-workers-timeout": f"{no_workers_timeout_seconds}s"}
    # Messages that Dask keeps for its developers, by default a thousand per worker; here each holds a partition.
    admin = {"low-level-log-length": 10}
    # Dask's profiler may hang a worker forever, as in local clusters.
    worker = {"profile": {"enabled": False}}
    sections = {"admin": admin, "comm": comm, "scheduler": scheduler, "worker": worker}
    serialized: str = dask.config.serialize({"distributed": sections})
    return serialized
