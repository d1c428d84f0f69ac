"""Credentials of Azure Blob Storage, and mistakes in its URLs and storage options."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from azure.storage.blob import ContainerSasPermissions, generate_container_sas
from azurite import ACCOUNT, CONTAINER, KEY, Server, connect_by, connect_by_key, open_account, run_azurite
from click.testing import CliRunner
from servers import make_certificate

from fruitdask.cli import cli
from fruitdask.core import abfs
from fruitdask.core.storage import Location, exists, hide_secrets, write_file
from fruitdask.errors import StorageError

pytestmark = [pytest.mark.slow, pytest.mark.browser]

FOLDER = "images"


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, sample_folder: Path) -> Iterator[Server]:
    """Start an account with the drawn images."""
    with open_account(request, sample_folder, FOLDER) as server:
        yield server


def make_sas(server: Server, *, is_valid: bool = True) -> str:
    """Make a SAS token that allows reading and listing."""
    expiry = datetime.now(UTC) + timedelta(hours=1 if is_valid else -1)
    permission = ContainerSasPermissions(read=True, list=True)
    return generate_container_sas(ACCOUNT, CONTAINER, account_key=KEY, permission=permission, expiry=expiry)


def test_sas_token_may_read_but_not_write(server: Server) -> None:
    options = {"account_name": ACCOUNT, "account_host": f"{server.url}/{ACCOUNT}", "sas_token": f"?{make_sas(server)}"}
    place = Location(f"abfs://{CONTAINER}/{FOLDER}", options)
    assert len(place.fs.find(place.path)) == 24
    with pytest.raises(StorageError, match=r"^cannot write .*\(Author\w+\): th.* credentials .*$") as caught:
        write_file(place.child("x"), b"1")
    assert "sig=" not in str(caught.value)


class Identity(BaseHTTPRequestHandler):
    """The service that issues tokens to machines in Azure if they send the right header."""

    def do_GET(self) -> None:
        """Respond with a token that Azurite accepts."""
        now = int(time.time())
        claims = {"aud": "https://storage.azure.com", "iss": f"https://sts.windows.net/{uuid.UUID(int=1)}/"}
        claims |= {"iat": now - 60, "nbf": now - 60, "exp": now + 3600}
        parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode() for part in ({"alg": "none"}, claims))
        token = {"access_token": f"{'.'.join(parts)}.x", "expires_on": str(now + 3600), "token_type": "Bearer"}
        is_allowed = self.headers.get("X-IDENTITY-HEADER") == "planted-4711"
        self.send_response(200 if is_allowed else 403)
        self.end_headers()
        self.wfile.write(json.dumps(token if is_allowed else {}).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


WITHOUT_KEYS = """
import sys
from fruitdask import store
from fruitdask.core.storage import Location, exists
place = Location("abfs://made/x", {"account_name": "fruits", "account_host": sys.argv[1]})
place.fs.mkdir("made")
store.create_store(place, n_images=2, n_features=3, images_per_partition=2, attributes={})
assert store.open_store(place)["features"].shape == (2, 3) and exists(place.child("features.zarr"))
"""


def test_managed_identity_needs_no_keys(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    with (
        run_azurite(request, "--oauth", "basic", "--cert", certificate, "--key", key) as port,
        ThreadingHTTPServer(("127.0.0.1", 0), Identity) as identity,
    ):
        thread = threading.Thread(target=identity.serve_forever)
        thread.start()
        endpoint = {"IDENTITY_ENDPOINT": f"http://127.0.0.1:{identity.server_port}/", "IDENTITY_HEADER": "planted-4711"}
        command = [sys.executable, "-c", WITHOUT_KEYS, f"127.0.0.1:{port}/{ACCOUNT}"]
        env = os.environ | endpoint | {"SSL_CERT_FILE": certificate}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        identity.shutdown()
        untrusted = Location(
            "abfs://made/x", {"account_name": ACCOUNT, "account_host": command[-1], "account_key": KEY}
        )
        with pytest.raises(StorageError, match="CERTIFICATE_VERIFY_FAILED.*: give the .* SSL_CERT_FILE$"):
            exists(replace(untrusted, attempts=1))
        thread.join()
    assert (done.returncode, done.stderr) == (0, "")


OTHER_KEY = base64.b64encode(bytes(64)).decode()
NO_ACCOUNT = {"account_name": "fruits-none-such", "account_key": KEY}
MISTAKES: dict[str, tuple[str, Callable[[Server], dict[str, Any]], str]] = {
    "wrong key": (
        f"abfs://{CONTAINER}/x",
        lambda server: connect_by_key(server.url, OTHER_KEY),
        r"cannot list .*\(Auth\w+\): the account refuses these credentials, .*; check account_key",
    ),
    "no key": (
        f"abfs://{CONTAINER}/x",
        lambda server: connect_by_key(server.url, "secret-4711"),
        "cannot list .*: the account key is malformed; correct account_key",
    ),
    "missing container": (
        "abfs://none-such/x",
        lambda server: server.options,
        r"cannot list .*\(ContainerNotFound\): there is no such container; create it, or check the URL",
    ),
    "name of a container": (
        "abfs://No_Such/x",
        lambda server: server.options,
        r"cannot list .*\(InvalidResourceName\): check the name of the container",
    ),
    "expired SAS": (
        f"abfs://{CONTAINER}/x",
        lambda server: connect_by(server.url, SharedAccessSignature=make_sas(server, is_valid=False)),
        r"cannot list .*\(Auth\w+\): .*; check account_key, sas_token",
    ),
    "SAS in the URL": (
        f"abfs://{CONTAINER}/x?sv=2024-01-01&sig=secret-4711",
        lambda server: server.options,
        r"cannot open abfs://photographs/x\?\*\*\* found a SAS token in the URL, expected it in sas_token; "
        "check storage_options",
    ),
    "unknown account": (
        f"abfss://{CONTAINER}@fruits-none-such.dfs.core.windows.net/x",
        lambda server: {"account_key": KEY},
        "cannot list abfss://photographs@fruits-none-such.*: no server answers there; "
        "check the name of the storage account",
    ),
    "no credentials": (
        f"abfs://{CONTAINER}/x",
        lambda server: {"account_name": ACCOUNT},
        r"cannot list .*: found no Azure credentials; log in \(az login\), or give account_key",
    ),
    "no account": (
        f"abfs://{CONTAINER}/x",
        lambda server: {},
        "cannot open .*: found no name of a storage account, in account_name",
    ),
    "unknown option": (
        f"abfs://{CONTAINER}/x",
        lambda server: server.options | {"acount": "x"},
        "cannot open .*: unknown option 'acount'; check storage_options",
    ),
}


@pytest.mark.parametrize(("url", "make_options", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_one_sentence_without_secrets(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    make_options: Callable[[Server], dict[str, Any]],
    sentence: str,
) -> None:
    monkeypatch.setattr(abfs, "_MAX_BACKOFF_SECONDS", 0.01)
    source = {"url": url, "storage_options": make_options(server)}
    tree = {"input": source, "output": {"url": str(tmp_path / "out")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "run.yaml"), "--verbose"])
    assert done.exit_code == 2, done.output
    assert re.match(f"fruitdask: {sentence}", done.stderr.splitlines()[-1])
    for secret in (KEY, OTHER_KEY, "secret-4711", "sig=s"):
        assert secret not in done.output


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("abfss://photos@eyes.dfs.core.windows.net/a/b", "https://eyes.blob.core.windows.net/"),
        ("abfs://photos@eyes.dfs.core.chinacloudapi.cn/a/b", "https://eyes.blob.core.chinacloudapi.cn/"),
        ("az://photos/a/b", "https://mine.blob.core.windows.net/"),
        ("ABFS://photos/a/b/", "https://mine.blob.core.windows.net/"),
    ],
    ids=["full", "another cloud", "az", "upper case"],
)
def test_account_and_path_are_found_in_each_form_of_url(url: str, host: str) -> None:
    place = Location(url, {"account_key": KEY} | ({} if "@" in url else {"account_name": "mine"}))
    assert (place.path, place.fs.service_client.url) == ("photos/a/b", host)
    assert hide_secrets(f"cannot read {url}: x") == f"cannot read {url}: x"


def test_secrets_are_hidden() -> None:
    text = f"{connect_by_key('https://x.test')['connection_string']} {KEY} https://x.test/a?sv=1&sig=ab%3D, sig=ab%3D&x"
    assert KEY not in hide_secrets(text) and "ab%3D" not in hide_secrets(text)
