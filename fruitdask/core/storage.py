"""Files behind URLs: open a file system; read, hash and write whole files; explain every failure in one sentence."""

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from fruitdask.core.archives import PROTOCOLS, Archive
from fruitdask.core.aws import explain_aws_error
from fruitdask.core.azure import explain_azure_error
from fruitdask.errors import DamageError, FruitdaskError, StorageError

_HASH_BLOCK_BYTES = 1 << 20

#: Defaults for S3 and Azure. Listings are not cached, because other processes write to the same folders. With one
#: transfer per file, no request for the size is needed before reading.
_CLOUD_OPTIONS: Mapping[str, Any] = {"use_listings_cache": False, "max_concurrency": 1}
#: Connections for all threads of a process; botocore's default is 10.
_S3_CONFIG: Mapping[str, Any] = {"max_pool_connections": 256}
#: Advice by the system's error number.
_ADVICE: Mapping[int | None, str] = {
    errno.ENOSPC: "make room there and run again",
    errno.EDQUOT: "make room there and run again",
    errno.EROFS: "make it writable and run again",
}
_USUAL_ADVICE = "check the path and the permissions"
#: Modules of clients whose errors do not derive from OSError.
_FOREIGN_ERRORS = ("botocore", "aiobotocore", "aiohttp", "azure", "google")
#: A folder in an archive, such as zip://Test::s3://bucket/x.zip: protocol, folder, archive.
_ARCHIVE = re.compile(rf"({'|'.join(PROTOCOLS)})://(.*?)::(.+)", re.DOTALL)
_PROTOCOL = re.compile(r"(?:^|(?<=::))[A-Za-z][A-Za-z0-9+.-]*(?=://)")
#: Archives whose directories a process keeps in memory.
_MAX_ARCHIVES = 8
#: Access keys of AWS, and signatures of its requests; the same of Azure, whose keys are 64 bytes in base64.
_SECRETS = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|(?<=Signature=)[\w%/+=-]+|(?<=X-Amz-Credential=)[\w%/+=-]+"
    r"|(?<=\bsig=)[\w%/+=-]+|(?<=AccountKey=)[^;\s]+|(?<![\w/+])[\w/+]{86}=="
)


@dataclass(frozen=True)
class Location:
    """A folder or file on any file system that fsspec knows; picklable."""

    #: A local path or a URL such as ``s3://bucket/prefix``, without a slash at the end.
    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    #: Attempts of each request to S3 or Azure, with backoff and jitter; on S3 fewer if a server fails all the time.
    attempts: int = 5
    #: Version of an archive; a process that has another version in memory opens it again.
    stamp: str = ""

    def __post_init__(self) -> None:
        """Write the protocol in lower case, as fsspec knows it."""
        object.__setattr__(self, "url", _PROTOCOL.sub(lambda match: match[0].lower(), self.url))

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system; fsspec keeps one instance for the same options."""
        return _open_filesystem(self)[0]

    @property
    def path(self) -> str:
        """The path inside the file system, without the protocol."""
        return str(_open_filesystem(self)[1])

    @property
    def options(self) -> dict[str, Any]:
        """The storage options, on S3 and Azure with our defaults for concurrent access."""
        options = dict(self.storage_options)
        if self.is_s3:
            retries = {"mode": "standard", "total_max_attempts": self.attempts}
            config = {**_S3_CONFIG, "retries": retries, **options.get("config_kwargs", {})}
            options = {**_CLOUD_OPTIONS, **options, "config_kwargs": config}
        elif self.is_azure:
            options = {**_CLOUD_OPTIONS, **options, "attempts": self.attempts}
        return options

    @property
    def is_s3(self) -> bool:
        """Whether this is on S3, from Amazon or another provider."""
        return self.url.startswith(("s3://", "s3a://"))

    @property
    def is_azure(self) -> bool:
        """Whether this is in Azure Blob Storage or Data Lake Storage."""
        return self.url.startswith(("abfs://", "abfss://", "az://"))

    @property
    def is_local(self) -> bool:
        """Whether this is on a disk of this machine."""
        return not self.is_archive and isinstance(self.fs, LocalFileSystem)

    @property
    def is_archive(self) -> bool:
        """Whether this is a folder or file in an archive."""
        return _ARCHIVE.fullmatch(self.url) is not None

    @property
    def base(self) -> "Location":
        """The outermost archive around this, or itself outside archives."""
        match = _ARCHIVE.fullmatch(self.url)
        return self if match is None else replace(self, url=match[3]).base

    def locate(self, name: str) -> str:
        """Find the path of a file below this folder in its file system."""
        path = self.path
        # The root of an archive is empty; that of a disk is empty before its slash.
        return f"{path}/{name}" if path or "::" not in self.url else name

    def child(self, *names: str) -> "Location":
        """Locate something inside this folder.

        >>> Location("s3://bucket/run").child("partitions", "00000.parquet").url
        's3://bucket/run/partitions/00000.parquet'
        """
        if match := _ARCHIVE.fullmatch(self.url):
            inner = "/".join(part for part in (match[2].rstrip("/"), *names) if part)
            return replace(self, url=f"{match[1]}://{inner}::{match[3]}")
        return replace(self, url="/".join((self.url.rstrip("/"), *names)))


def pin(location: Location) -> Location:
    """Add the version of an archive, for processes that may have an older one in memory."""
    if not location.is_archive:
        return location
    with explained(location, "read"):
        return replace(location, stamp=location.fs.read_version())


def hide_secrets(text: str) -> str:
    """Hide user names, passwords and signatures in a URL, or in a text that quotes one.

    >>> hide_secrets("https://me:secret@example.org/fruits?sig=abc")
    'https://***@example.org/fruits?***'
    >>> hide_secrets("s3://AKIA:ab/cd@bucket/fruits"), hide_secrets("/home/me@work/fruits?")
    ('s3://***@bucket/fruits', '/home/me@work/fruits?')
    """
    text = _SECRETS.sub("***", text)
    if "://" not in text:
        return text
    # After a colon, a password may contain slashes and at signs, as those of AWS do: hide up to the last at sign.
    # The container in abfss://container@account.dfs.core.windows.net is not a secret.
    hidden = re.sub(r"://[^@\s:]*:\S*@|(?<!\babfs)(?<!\babfss)(?<!\baz)://[^/@\s]+@", "://***@", text)
    return re.sub(r"([?#])\S+", r"\1***", hidden)


def _open_filesystem(location: Location) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open the file system of a location."""
    protocol = location.url.split("://")[0] if "://" in location.url else "file"
    if match := _ARCHIVE.fullmatch(location.url):
        archive = replace(location, url=match[3])
        return _open_archive(match[1], archive, archive.path), match[2].strip("/")
    if protocol in PROTOCOLS:
        raise StorageError(
            f"{location.url}: expected {protocol}://FOLDER::ARCHIVE, such as {protocol}://::photos.{protocol}"
        )
    try:
        if location.is_s3 or location.is_azure:
            return _open_own(location)
        # fsspec would take a folder named a::b for the folder a.
        fs, path = (
            fsspec.core.url_to_fs(location.url, **location.options)
            if "://" in location.url
            else (LocalFileSystem(**location.options), LocalFileSystem._strip_protocol(location.url))
        )
    except ImportError as error:
        hint = known_implementations.get(protocol, {}).get("err", str(error))
        if location.is_azure:
            hint = "Run pip install 'fruitdask[azure]', here and on the workers"
        raise StorageError(
            f"{location.url}: the protocol {protocol!r} needs a package that is not installed. {hint}"
        ) from error
    except (ValueError, TypeError) as error:
        # File systems raise a TypeError if a required option is missing.
        raise StorageError(
            f"{location.url}: expected a local path or a URL that fsspec can open (s3://, abfs://, gs://, https:// "
            f"...), found {error}"
        ) from error
    return fs, path.rstrip("/")


def _open_own(location: Location) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open S3 or Azure by a file system that lists page by page and retries in one layer."""
    kind: Any
    if location.is_s3:
        from fruitdask.core.s3 import S3 as kind
    else:
        from fruitdask.core.abfs import Azure as kind
    path = kind._strip_protocol(location.url).rstrip("/")
    try:
        return kind(**{**kind._get_kwargs_from_urls(location.url), **location.options}), path
    except (ValueError, TypeError) as error:
        raise StorageError(hide_secrets(f"cannot open {location.url}: {error}; check storage_options")) from error


@lru_cache(_MAX_ARCHIVES)
def _open_archive(protocol: str, archive: Location, path: str) -> Archive:
    """Open an archive once; the path is part of the key, as a relative URL may mean another archive later."""
    return Archive(protocol, archive.fs, path)


@contextmanager
def explained(location: Location, action: str, *, remedy: str | None = None) -> Iterator[None]:
    """Turn errors of a file system, and with a remedy those of a decoder, into one sentence that names the URL."""
    try:
        yield
    except FruitdaskError:
        raise
    except Exception as error:
        module = type(error).__module__
        # adlfs raises a RuntimeError from those of its client.
        origins = (error, error.__cause__) if isinstance(error, RuntimeError) else (error,)
        is_expected = isinstance(error, OSError) or any(_is_foreign(each) for each in origins)
        # Clients are created on first use, and only then refuse unknown options.
        is_option = isinstance(error, TypeError) and "unexpected keyword argument" in str(error)
        # Zarr's errors about content that it does not recognize derive from OSError.
        if remedy is not None and (not is_expected or module.startswith("zarr")):
            raise DamageError(f"{location.url} is damaged ({describe_cause(error)}); {remedy}") from error
        if not (is_expected or is_option):
            raise
        advice = "check storage_options" if is_option else _ADVICE.get(getattr(error, "errno", None), _USUAL_ADVICE)
        cause = explain_error(error) or f"{str(error) or type(error).__name__}; {advice}"
        raise StorageError(hide_secrets(f"cannot {action} {location.url}: {cause}")) from error


def _is_foreign(error: BaseException | None) -> bool:
    """Whether the client of a storage raised an error."""
    return type(error).__module__.startswith(_FOREIGN_ERRORS)


def explain_error(error: BaseException) -> str | None:
    """Explain an error of AWS or Azure and what to do; None for other errors."""
    return explain_aws_error(error) or explain_azure_error(error)


def describe_cause(error: BaseException) -> str:
    """Describe the error of a decoder in a few words.

    >>> describe_cause(ValueError("Stored and computed checksum do not match. Stored: b'ab'."))
    'Stored and computed checksum do not match'
    >>> describe_cause(KeyError("shape"))
    "KeyError: 'shape'"
    """
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {text}".removesuffix(": ") if isinstance(error, LookupError) or not text else text


def write_file(location: Location, data: bytes) -> None:
    """Write a whole file atomically: object stores commit at the end of an upload, local files are renamed."""
    if not location.is_local:
        with explained(location, "write"):
            location.fs.pipe_file(location.path, data)
        return
    with open_new(location) as file:
        file.write(data)


@contextmanager
def open_new(location: Location) -> Iterator[BinaryIO]:
    """Open a file to be written piece by piece; it appears, or replaces another, once all of it is written.

    For object stores, the pieces are collected in a temporary file of this machine.
    """
    fs, path = location.fs, location.path
    with explained(location, "write"):
        if location.is_local:
            with _temporary_file(path) as temporary:
                with open(temporary, "wb") as file:
                    yield file
                os.replace(temporary, path)
            return
        with TemporaryDirectory(prefix="fruitdask-") as folder:
            with open(os.path.join(folder, "file"), "wb") as file:
                yield file
            fs.put_file(file.name, path)


def create_file(location: Location, data: bytes) -> None:
    """Write a whole file atomically if it does not exist; of several concurrent writers, only one succeeds."""
    fs, path = location.fs, location.path
    if not location.is_local:
        # Amazon's S3 guarantees this; not all others do.
        fs.pipe_file(path, data, mode="create")
        return
    with _temporary_file(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:
            # The file system has no links: a process that dies now leaves an incomplete file.
            with open(path, "xb") as file:
                file.write(data)


@contextmanager
def _temporary_file(path: str) -> Iterator[str]:
    """Name a temporary file in the same folder, and delete it at the end if it is there."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.part"
    try:
        yield temporary
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def hash_file(location: Location) -> str:
    """Hash the content of a file."""
    digest = hashlib.sha256()
    with explained(location, "read"), location.fs.open(location.path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def exists(location: Location) -> bool:
    """Whether a file or folder exists."""
    with explained(location, "read"):
        if not location.is_local:
            location.fs.invalidate_cache()
            return bool(location.fs.exists(location.path))
        try:
            # fsspec takes what may not be read for missing, and a run would begin again.
            os.stat(location.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def check_bucket(location: Location) -> None:
    """Refuse a bucket or container that does not exist or cannot be reached; to `exists` it is an empty folder."""
    with explained(location, "read"):
        location.fs.list_page(location.path, n_max=1)


def find_encryption(location: Location) -> str | None:
    """Find how a file on S3 or Azure is encrypted at rest."""
    if not (location.is_s3 or location.is_azure):
        return None
    with explained(location, "read"):
        encryption: str | None = location.fs.find_encryption(location.path)
    return encryption


def keeps_versions(location: Location) -> bool:
    """Whether a bucket or an account keeps deleted or replaced files; a refusal counts as no."""
    return (location.is_s3 or location.is_azure) and bool(location.fs.keeps_versions(location.path))
