"""S3 by s3fs, with one layer that tries again: the client's, botocore."""

import io
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession
from fsspec import register_implementation
from s3fs import S3FileSystem


class S3(S3FileSystem):  # type: ignore[misc]
    """The file system of s3fs, which leaves it to its client to send a request again.

    s3fs tries again around its client, in reading a file twice over, which multiplies the attempts and their time; page
    by page listings it does not cover. The client covers all requests, with pauses that double and are drawn at random,
    up to a number of attempts and within a quota that is used up where a server fails all the time. Copies that are
    unpickled on workers, or made for Zarr, do the same.
    """

    retries = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = {"http_session_cls": _WholeSession, **(kwargs.pop("config_kwargs", None) or {})}
        super().__init__(*args, config_kwargs=config, **kwargs)


class _WholeSession(AIOHTTPSession):  # type: ignore[misc]
    """HTTP that hands a response on when all of it is there: one that breaks off is then a request that failed, and is sent again."""

    async def send(self, request: Any) -> Any:
        """Send a request and read the whole response; its body is in memory then."""
        request.stream_output = False
        response = await super().send(request)
        response.raw = _Raw(await response.content)
        return response


class _Raw:
    """What the client takes for the response of its HTTP library, whose content it reads."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.content = self

    async def read(self, n_bytes: int = -1) -> bytes:
        """Read the next bytes."""
        return self._file.read(n_bytes)

    def close(self) -> None:
        """Close nothing: the connection is back in the pool."""


# fsspec keeps what is registered to the end of the process. Clients that Zarr never closes complain of that if they are collected before.
register_implementation("fruitdask-s3", S3, clobber=True)
