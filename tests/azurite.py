"""An Azure Storage account on this machine, simulated by Microsoft's Azurite."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import BlobServiceClient
from servers import run_node

AZURITE = "azurite@3.35.0"
ACCOUNT, CONTAINER = "fruits", "photographs"
#: An account key that only the tests use.
KEY = base64.b64encode(bytes(range(64))).decode()


def connect_by(url: str, **settings: str) -> dict[str, Any]:
    """Make storage options for a server on this machine."""
    parts = {"DefaultEndpointsProtocol": "http", "BlobEndpoint": f"{url}/{ACCOUNT}"} | settings
    return {"connection_string": ";".join(f"{name}={value}" for name, value in parts.items()), "read_timeout": 1.5}


def connect_by_key(url: str, key: str = KEY) -> dict[str, Any]:
    """Make storage options with an account key."""
    return connect_by(url, AccountName=ACCOUNT, AccountKey=key)


@dataclass(frozen=True)
class Server:
    """Azurite, and a client that shares no code with our file system."""

    url: str
    client: BlobServiceClient

    @property
    def options(self) -> dict[str, Any]:
        """fruitdask's storage options for this server."""
        return connect_by_key(self.url)

    def list(self, folder: str = "") -> list[str]:
        """List the names of blobs."""
        return sorted(self.client.get_container_client(CONTAINER).list_blob_names(name_starts_with=folder))

    def put(self, name: str, data: bytes, **settings: Any) -> None:
        """Write a blob."""
        self.client.get_blob_client(CONTAINER, name).upload_blob(data, overwrite=True, **settings)

    def read(self, name: str) -> bytes:
        """Read a blob."""
        return self.client.get_blob_client(CONTAINER, name).download_blob().readall()


@contextmanager
def run_azurite(request: pytest.FixtureRequest, *arguments: str) -> Iterator[int]:
    """Run Azurite; yield its port."""
    listen = ["--blobHost", "127.0.0.1", "--blobPort", "0", "--silent", "--inMemoryPersistence"]
    listen += ["--disableTelemetry", "--skipApiVersionCheck"]
    accounts = {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    with run_node(request, AZURITE, "dist/src/blob/main.js", [*listen, *arguments], environment=accounts) as port:
        yield port


@contextmanager
def open_account(request: pytest.FixtureRequest, images: Path, folder: str) -> Iterator[Server]:
    """Start an account whose container has images in a folder."""
    with run_azurite(request) as port:
        url = f"http://127.0.0.1:{port}"
        with BlobServiceClient.from_connection_string(connect_by_key(url)["connection_string"]) as client:
            client.create_container(CONTAINER)
            server = Server(url, client)
            for path in images.rglob("*.jpg"):
                server.put(f"{folder}/{path.relative_to(images).as_posix()}", path.read_bytes())
            yield server
