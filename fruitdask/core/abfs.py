"""Azure Blob Storage through adlfs, with retries in one layer only: Azure's client."""

import asyncio
import inspect
import io
import random
import re
from contextlib import suppress
from typing import Any

from adlfs import AzureBlobFileSystem
from fsspec import register_implementation
from fsspec.asyn import _run_coros_in_chunks, get_loop, sync, sync_wrapper

from azure.core.credentials import AzureSasCredential
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError
from azure.core.pipeline.transport import AioHttpTransport
from azure.storage.blob.aio import BlobServiceClient, ExponentialRetry

#: Seconds to connect, and between bytes, as for S3; the client's defaults are 20 and 60.
_CONNECT_SECONDS, _READ_SECONDS = 5, 15
#: Upper bound of the random pause before a retry, as for S3; the client's own pauses start at 15 seconds.
_MAX_BACKOFF_SECONDS = 20
#: Files up to this size come in one request, as from S3.
_MAX_SINGLE_GET_BYTES = 1 << 30
#: Files that are deleted or copied at the same time.
_N_AT_ONCE = 16
#: The form of a URL that Hadoop and Databricks use, in any of Azure's clouds: container@account.dfs.domain.
_FULL = re.compile(r"([^@/]+)@(([^./]+)\.)(?:dfs|blob)(\.[^/]+)")
#: Options of fsspec, and of DefaultAzureCredential.
_OTHER_OPTIONS = re.compile(
    r"use_listings_cache|listings_expiry_time|max_paths|skip_instance_cache|exclude_\w+_credential|\w+_client_id|"
    r"authority|process_timeout"
)


class Azure(AzureBlobFileSystem):  # type: ignore[misc]
    """The file system of adlfs, with retries only by its client, and blobs of any name.

    The client of adlfs waits 15 seconds and longer before a retry, and reads of a response that breaks off are retried
    by another layer, three times each. adlfs cuts a name off at a question mark or a number sign.
    """

    def __init__(self, *args: Any, attempts: int = 1, **kwargs: Any) -> None:
        known = inspect.signature(AzureBlobFileSystem.__init__).parameters
        for name in kwargs:
            if name not in known and not _OTHER_OPTIONS.fullmatch(name):
                raise TypeError(f"unknown option {name!r}")
        self._attempts = attempts
        super().__init__(*args, **kwargs)

    @property
    def loop(self) -> Any:
        """The loop in which the client is closed at the end: adlfs has none where Zarr made the file system."""
        return super().loop or get_loop()

    def do_connect(self) -> None:
        """Make the client."""
        settings: dict[str, Any] = {
            "retry_policy": _Retry(self._attempts),
            "transport": _WholeTransport(
                connection_timeout=self._timeout_kwargs.get("connection_timeout", _CONNECT_SECONDS),
                read_timeout=self._timeout_kwargs.get("read_timeout", _READ_SECONDS),
            ),
            "max_single_get_size": _MAX_SINGLE_GET_BYTES,
        }
        if self.connection_string is not None:
            self.service_client = BlobServiceClient.from_connection_string(self.connection_string, **settings)
            return
        if self.account_name is None:
            raise ValueError(
                "found no name of a storage account, in account_name, connection_string, AZURE_STORAGE_ACCOUNT_NAME or "
                "a URL such as abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/FOLDER"
            )
        credential: Any = _Credential(self.sync_credential) if self.sync_credential else self.credential
        if credential is None and self.account_key is not None:
            credential = {"account_name": self.account_name, "account_key": self.account_key}
        if credential is None and self.sas_token is not None:
            credential = AzureSasCredential(self.sas_token)
        host = getattr(self, "account_host", f"{self.account_name}.blob.core.windows.net")
        url = host if "://" in host else f"https://{host}"
        self.service_client = BlobServiceClient(url, credential=credential, **settings)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        """Remove the protocol and the account, and nothing else."""
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        path = re.sub(r"^(?:abfss?|az)://", "", path)
        return _FULL.sub(r"\1", path, count=1).lstrip("/") if _FULL.match(path) else path.lstrip("/")

    @staticmethod
    def _get_kwargs_from_urls(urlpath: str) -> dict[str, str]:
        """Find the account in a URL of the full form."""
        if re.search(r"[?&]sig=", urlpath):
            raise ValueError("found a SAS token in the URL, expected it in sas_token")
        match = _FULL.match(urlpath.partition("://")[2])
        return {"account_name": match[3], "account_host": f"{match[2]}blob{match[4]}"} if match else {}

    def split_path(self, path: str, *_: Any, **__: Any) -> tuple[str, str, None]:
        """Split a path into container and name; versions of blobs are not addressed."""
        container, _, name = self._strip_protocol(path).partition("/")
        return container, name, None

    async def _list_page(
        self, path: str, token: str | None = None, *, n_max: int | None = None, withdirs: bool = False
    ) -> tuple[list[tuple[str, int, str]], str | None]:
        """List a page of the files below a folder, by name, size and ETag; and the token of the next page."""
        container, key, _ = self.split_path(path)
        prefix = f"{key.rstrip('/')}/" if key else ""
        client = self.service_client.get_container_client(container)
        pages: Any = client.list_blobs(name_starts_with=prefix, include=["metadata"], results_per_page=n_max).by_page(
            token
        )
        rows = [
            (blob.name[len(prefix) :], blob.size, str(blob.etag).strip('"'))
            async for blob in await anext(pages)
            if withdirs or not _is_folder(blob)
        ]
        return rows, pages.continuation_token or None

    list_page = sync_wrapper(_list_page)

    async def _find(self, path: str, detail: bool = False, withdirs: bool = False, **_: Any) -> Any:
        """Find the files below a folder."""
        path = self._strip_protocol(path).rstrip("/")
        rows: list[tuple[str, int, str]] = []
        token: str | None = ""
        with suppress(ResourceNotFoundError):
            while token is not None:
                page, token = await self._list_page(path, token or None, withdirs=withdirs)
                rows.extend(page)
        files = {f"{path}/{name}": {"size": size, "ETag": etag} for name, size, etag in rows}
        if not files and await self._isfile(path):
            info = await self._info(path)
            files = {path: {"size": info["size"], "ETag": info["etag"]}}
        infos = {name: {"name": name, "type": "file", **found} for name, found in sorted(files.items())}
        return infos if detail else list(infos)

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        """Read a file, or a part of it; a refusal is a PermissionError, as with other file systems."""
        try:
            return await super()._cat_file(path, start=start, end=end, **kwargs)
        except HttpResponseError as error:
            if error.status_code in (401, 403):
                raise PermissionError(str(error.message)) from error
            raise

    async def _copy(self, path1: str, path2: str, recursive: bool = False, **_: Any) -> None:
        """Copy a file, or with `recursive` the files below a folder."""
        source, target = (self._strip_protocol(path).rstrip("/") for path in (path1, path2))
        names = await self._find(source) if recursive else [source]
        copies = [self._cp_file(name, target + name[len(source) :]) for name in names]
        await _run_coros_in_chunks(copies, batch_size=_N_AT_ONCE)

    async def _cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copy a file by reading and writing it: Azure may still be copying after its response."""
        await self._pipe_file(path2, await self._cat_file(path1))

    async def _rm(self, path: str, recursive: bool = False, **_: Any) -> None:
        """Delete a file with its snapshots, and with `recursive` those below a folder."""
        names = [path.rstrip("/"), *(await self._find(path, withdirs=True) if recursive else ())]
        # In accounts with folders, a folder must be empty before it can be deleted.
        folders = {name.rpartition("/")[0] for name in names}
        files = [self._rm_file(name) for name in names if name not in folders]
        await _run_coros_in_chunks(files, batch_size=_N_AT_ONCE)
        for name in sorted(folders.intersection(names), reverse=True):
            await self._rm_file(name, delete_snapshots=None)

    async def _rm_file(self, path: str, delete_snapshots: str | None = "include", **__: Any) -> None:
        """Delete a blob, if it exists."""
        container, name, _ = self.split_path(path)
        with suppress(ResourceNotFoundError):
            client = self.service_client.get_blob_client(container, name)
            await client.delete_blob(delete_snapshots=delete_snapshots)

    rm, cp_file = sync_wrapper(_rm), sync_wrapper(_cp_file)

    def find_encryption(self, path: str) -> str | None:
        """Find how a file is encrypted at rest: Azure Storage encrypts all blobs, and reports it."""
        container, name, _ = self.split_path(path)
        found = sync(self.loop, self.service_client.get_blob_client(container, name).get_blob_properties)
        return "AES256 by Azure Storage" if found.server_encrypted else None

    def keeps_versions(self, path: str) -> bool:
        """Whether the account keeps deleted or replaced blobs; False if the credentials may not ask."""
        with suppress(HttpResponseError):
            if sync(self.loop, self.service_client.get_service_properties)["delete_retention_policy"].enabled:
                return True
        with suppress(HttpResponseError):
            container, key, _ = self.split_path(path)
            for name, _, _ in self.list_page(path, n_max=1)[0]:
                client = self.service_client.get_blob_client(container, f"{key}/{name}" if key else name)
                # Blobs have versions only where old ones are kept.
                return bool(sync(self.loop, client.get_blob_properties).version_id)
        return False


def _is_folder(blob: Any) -> bool:
    """Whether a blob stands for a folder: by its name, or in accounts with a hierarchical namespace by its metadata."""
    metadata = {name.lower(): value for name, value in (blob.metadata or {}).items()}
    return blob.name.endswith("/") or "true" in (metadata.get("hdi_isfolder"), metadata.get("is_directory"))


class _Retry(ExponentialRetry):
    """Retries with exponential backoff and full jitter, up to a number of attempts."""

    def __init__(self, attempts: int) -> None:
        n = attempts - 1
        super().__init__(retry_total=n, retry_connect=n, retry_read=n, retry_status=n)

    def get_backoff_time(self, settings: dict[str, Any]) -> float:
        """Choose the pause before the next retry."""
        return random.uniform(0, min(2.0 ** (settings["count"] - 1), _MAX_BACKOFF_SECONDS))


class _WholeTransport(AioHttpTransport):  # type: ignore[misc]
    """HTTP that returns a response once it is complete, so that the client retries one whose connection breaks."""

    _opener: Any = None

    async def send(self, request: Any, *, stream: bool = False, **config: Any) -> Any:
        """Send a request and read the whole response into memory."""
        return await super().send(request, stream=False, **config)

    def _get_request_data(self, request: Any) -> Any:
        """Send the body in pieces: aiohttp warns of a large body in one piece, which blocks the loop."""
        data = super()._get_request_data(request)
        return io.BytesIO(data) if isinstance(data, bytes) else data

    async def open(self) -> None:
        """Open the connections, which then belong to one event loop."""
        self._opener = asyncio.get_running_loop()
        await super().open()

    async def close(self) -> None:
        """Close the connections, unless they belong to Zarr's loop and it has ended, as at the end of a process."""
        if self._opener is asyncio.get_running_loop():
            await super().close()


class _Credential:
    """A credential that gets its tokens in threads: Azure's asynchronous ones belong to a loop that may end first."""

    def __init__(self, credential: Any) -> None:
        self._credential = credential

    async def get_token(self, *scopes: str, **options: Any) -> Any:
        """Get a token, from memory while it is valid."""
        return await asyncio.to_thread(self._credential.get_token, *scopes, **options)


# fsspec keeps registered classes until the process ends, and with them clients that Zarr never closes.
register_implementation("fruitdask-azure", Azure, clobber=True)
