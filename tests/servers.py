"""Servers that npm installs, once into the cache of the tests, and certificates for servers."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@contextmanager
def run_node(
    request: pytest.FixtureRequest,
    package: str,
    script: str,
    arguments: Sequence[str],
    *,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """Run a script of a package, given as name@version, with its arguments and Node's options; returns the port that it
    reports.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    name = package.partition("@")[0]
    if node is None or npm is None:
        pytest.skip(f"needs Node.js and npm for {name}")
    cache = request.config.cache
    assert cache is not None
    folder = cache.mkdir(name)
    file = folder / "node_modules" / name / script
    if not file.exists():
        install = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), package]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm cannot install {package}: {done.stderr.strip()[-200:]}")
    command, env = [node, *options, str(file), *arguments], {**os.environ, **(environment or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            found = (re.search(r"listen\w+ on (?:https?://)?[\d.]+:(\d+)", line) for line in process.stdout)
            yield next(int(match[1]) for match in found if match)
        finally:
            process.terminate()
            # Azurite fails if its last output is not read.
            process.communicate()


def make_certificate(folder: Path, *names: str) -> tuple[str, str]:
    """Make a self-signed certificate for this machine and these names; returns the files of certificate and key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, "loopback")]
    )
    now, address = datetime.now(UTC), x509.IPAddress(ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address, *map(x509.DNSName, names)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return str(folder / "cert.pem"), str(folder / "key.pem")
