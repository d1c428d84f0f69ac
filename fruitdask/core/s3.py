"""S3 through s3fs, with retries in one layer only: botocore's client."""

import io
from contextlib import suppress
from datetime import datetime
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.utils import parse_timestamp
from fsspec import register_implementation
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from fruitdask.core.prefixes import Row, get_name

#: Pages of 1,000 files and folders, beyond which a folder has many.
_MAX_LEVEL_PAGES = 10


class S3(S3FileSystem):  # type: ignore[misc]
    """The file system of s3fs, with retries only by its client.

    s3fs retries around its client, for reads twice over, which multiplies the attempts and their time, and does not
    retry pages of listings. The client retries all requests, with backoff and jitter, up to a number of attempts and
    within a quota that runs out if a server fails all the time. Copies that workers unpickle or Zarr makes do the same.
    """

    retries = 1
    session: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = {"http_session_cls": _WholeSession, **(kwargs.pop("config_kwargs", None) or {})}
        super().__init__(*args, config_kwargs=config, **kwargs)

    async def set_session(self, *args: Any, **kwargs: Any) -> Any:
        """Connect with a session that parses times of modification fast: that takes most of the time of a listing."""
        if self.session is None:
            self.session = AioSession(**self.kwargs)
            parsers = self.session.get_component("response_parser_factory")
            parsers.set_parser_defaults(timestamp_parser=_parse_timestamp)
        return await super().set_session(*args, **kwargs)

    async def _exists(self, path: str) -> bool:
        """Whether there is an object, or one anywhere below it; s3fs asks for folders, which not all servers list."""
        bucket, key, _ = self.split_path(path)
        if not key:
            return bool(await super()._exists(path))
        with suppress(FileNotFoundError):
            await self._call_s3("head_object", Bucket=bucket, Key=key)
            return True
        with suppress(FileNotFoundError):
            page = await self._call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/", MaxKeys=1)
            return bool(page.get("Contents"))
        return False

    exists = sync_wrapper(_exists)

    def list_page(
        self, path: str, token: str | None = None, *, n_max: int = 1000, folder: str = ""
    ) -> tuple[list[Row], str | None]:
        """List a page of the files below a folder, or below a folder in it; and the token of the next page."""
        bucket, prefix = self._split_folder(path)
        request = {"ContinuationToken": token} if token else {}
        page = self.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix + folder, MaxKeys=n_max, **request)
        return _read_rows(page, prefix), page["NextContinuationToken"] if page.get("IsTruncated") else None

    def list_level(self, path: str, folder: str) -> list[Row | str] | None:
        """List the files and the names of folders, which end in a slash, in a folder below a path, sorted.

        Returns None if there are many, or if the first ones are all files.
        """
        bucket, prefix = self._split_folder(path)
        found, request = list[Row | str](), dict[str, str]()
        for _ in range(_MAX_LEVEL_PAGES):
            page = self.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix + folder, Delimiter="/", **request)
            folders = [entry["Prefix"][len(prefix) :] for entry in page.get("CommonPrefixes", ())]
            found += [*_read_rows(page, prefix), *folders]
            if not page.get("IsTruncated"):
                return sorted(found, key=get_name)
            if not folders:
                break
            request = {"ContinuationToken": page["NextContinuationToken"]}
        return None

    def _split_folder(self, path: str) -> tuple[str, str]:
        """Split the path of a folder into the bucket and the beginning of the keys below it."""
        bucket, key, _ = self.split_path(path)
        return bucket, f"{key}/" if key else ""

    def find_encryption(self, path: str) -> str | None:
        """Find how a file is encrypted at rest."""
        bucket, key, _ = self.split_path(path)
        head = self.call_s3("head_object", Bucket=bucket, Key=key)
        encryption: str | None = head.get("ServerSideEncryption")
        return encryption or ("SSE-C" if head.get("SSECustomerAlgorithm") else None)

    def keeps_versions(self, path: str) -> bool:
        """Whether a bucket keeps, or has kept, old versions of objects; a refusal counts as no."""
        with suppress(OSError):
            return "Status" in self.call_s3("get_bucket_versioning", Bucket=self.split_path(path)[0])
        return False


def _read_rows(page: Any, prefix: str) -> list[Row]:
    """Read the files of a page of a listing: names below a prefix, sizes and ETags."""
    return [
        (entry["Key"][len(prefix) :], entry["Size"], entry.get("ETag", "").strip('"'))
        for entry in page.get("Contents", ())
        # A name that ends in a slash marks a folder.
        if not entry["Key"].endswith("/")
    ]


def _parse_timestamp(value: Any) -> datetime:
    """Parse a time as S3 writes it, and any other as botocore does."""
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        parsed: datetime = parse_timestamp(value)
        return parsed


class _WholeSession(AIOHTTPSession):  # type: ignore[misc]
    """HTTP that returns a response once it is complete, so that the client retries one whose connection breaks."""

    async def send(self, request: Any) -> Any:
        """Send a request and read the whole response into memory."""
        request.stream_output = False
        response = await super().send(request)
        response.raw = _Raw(await response.content)
        return response


class _Raw:
    """A response in memory, with the interface of the client's HTTP library."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.content = self

    async def read(self, n_bytes: int = -1) -> bytes:
        """Read the next bytes."""
        return self._file.read(n_bytes)

    def close(self) -> None:
        """Do nothing: the connection is back in the pool."""


# fsspec keeps registered classes until the process ends. Collected earlier, clients that Zarr never closes would warn.
register_implementation("fruitdask-s3", S3, clobber=True)
