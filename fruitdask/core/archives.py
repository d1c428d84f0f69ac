"""Archives of images, zip and tar, as file systems that threads can read concurrently."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import struct
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
from fsspec.archive import AbstractArchiveFileSystem

from fruitdask.errors import DamageError, StorageError

PROTOCOLS = ("zip", "tar")
#: Compressions that zipfile can undo within a limit of bytes; it cannot for bzip2 and lzma.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
#: A deflated file may be a little longer than the file.
_MAX_GROWTH, _GROWTH_BYTES = 2, 1 << 16
#: A member's local header in a zip: its size, and the offset of the lengths of the name and the extra field
#: (APPNOTE 6.3.10, 4.3.7).
_HEADER_BYTES, _LENGTHS_AT = 30, 26
#: The extra field of the local header may be longer than that of the directory.
_SPARE_BYTES = 256
_ENCRYPTED, _UTF8 = 0x1, 0x800
#: Size of the reads from the directory of a remote archive.
_BLOCK_BYTES = 1 << 20
#: Openers of archives that are compressed as a whole, by their first bytes.
_OPENERS: Mapping[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class Archive(AbstractArchiveFileSystem):  # type: ignore[misc]
    """The files in an archive; each is read separately, so that threads do not wait for each other.

    fsspec's own archive file systems share one file between threads (for tar without a lock), and keep an archive open
    that was replaced.
    """

    root_marker = ""
    cachable = False

    def __init__(self, protocol: str, fs: fsspec.AbstractFileSystem, path: str) -> None:
        super().__init__()
        self.kind, self.fo = protocol, path
        self._fs, self._path = fs, path
        self._lock = threading.Lock()
        self._opened: _Zip | _Tar | None = None

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget the archive: it may have been replaced."""
        self._fs.invalidate_cache()
        self._opened = None

    def read_version(self) -> str:
        """Read a text that changes when the archive does."""
        return _read_version(self._fs, self._path)

    def _get_dirs(self) -> None:
        """Read the directory of the archive."""
        self._members()

    @property
    def dir_cache(self) -> dict[str, dict[str, Any]]:
        """The files and folders, by path."""
        return self._members().entries

    def _members(self) -> "_Zip | _Tar":
        """Open the archive once for all threads."""
        with self._lock:
            if self._opened is None:
                self._opened = (_Zip if self.kind == "zip" else _Tar)(self._fs, self._path)
            return self._opened

    def find(self, path: str, *args: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
        """Describe the files below a folder."""
        below, entries = f"{path}/" if path else "", self.dir_cache
        return {name: each for name, each in entries.items() if each["type"] == "file" and name.startswith(below)}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Read a file, or a part of it."""
        return self._members().read(path.strip("/"))[start:end]

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> io.BytesIO:
        """Read a file into memory."""
        return io.BytesIO(self.cat_file(path))


@contextmanager
def _decoded(path: str, kind: str) -> Iterator[None]:
    """Turn any error about the directory of an archive into one sentence."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise StorageError(
            f"{path}: expected a {kind} archive, found something else or a part of one ({error})"
        ) from error


class _Members:
    """The files and folders in an archive."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs, self._path = fs, path
        self.entries: dict[str, dict[str, Any]] = {}

    def add(self, name: str, size: int, version: str) -> str:
        """Add a file and its folders, and return its normalized name."""
        name = name.lstrip("/")
        while name.startswith("./"):
            name = name[2:].lstrip("/")
        self.entries[name] = {"name": name, "size": size, "type": "file", "version": version}
        folder = name.rpartition("/")[0]
        while folder and folder not in self.entries:
            self.entries[folder] = {"name": folder, "size": 0, "type": "directory"}
            folder = folder.rpartition("/")[0]
        return name

    def read_range(self, start: int, end: int) -> bytes:
        """Read a part of the archive."""
        return bytes(self._fs.cat_file(self._path, start=start, end=end))


class _Zip(_Members):
    """The files of a zip archive; their versions are the checksums of their content."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        super().__init__(fs, path)
        with fs.open(path, "rb", block_size=_BLOCK_BYTES) as file, _decoded(path, "zip"):
            infos = [info for info in zipfile.ZipFile(file).infolist() if not info.is_dir()]
        self._infos: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            if info.flag_bits & _ENCRYPTED or info.compress_type not in _COMPRESSIONS:
                what = "encrypted" if info.flag_bits & _ENCRYPTED else "compressed by another method than deflate"
                raise StorageError(f"{path}: {info.filename} in this archive is {what}; unpack it, or pack it again")
            name = self.add(_read_name(info), info.file_size, f"crc32 {info.CRC:08x}")
            self._infos[name] = info

    def read(self, name: str) -> bytes:
        """Read a file."""
        info = self._infos.get(name)
        if info is None:
            raise FileNotFoundError(name)
        if info.header_offset < 0 or info.compress_size > _MAX_GROWTH * info.file_size + _GROWTH_BYTES:
            raise DamageError("the archive is damaged: its directory has impossible values for this file")
        start, n_name = info.header_offset, len(info.orig_filename.encode("utf-8"))
        n_extra = len(info.extra) + _SPARE_BYTES
        data = self.read_range(start, start + _HEADER_BYTES + n_name + n_extra + info.compress_size)
        if not data.startswith(b"PK\x03\x04") or len(data) < _HEADER_BYTES:
            raise DamageError("the archive has changed or is damaged: this file is not where its directory says")
        begin = _HEADER_BYTES + sum(struct.unpack_from("<HH", data, _LENGTHS_AT))
        if len(data) < begin + info.compress_size:
            data, begin = self.read_range(start + begin, start + begin + info.compress_size), 0
        try:
            with zipfile.ZipExtFile(io.BytesIO(data[begin : begin + info.compress_size]), "r", info) as file:
                return file.read(info.file_size)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
            raise DamageError(f"the archive is damaged: {error or 'it ends too early'}") from error


def _read_name(info: zipfile.ZipInfo) -> str:
    """Read a name as intended: macOS writes UTF-8 without the flag, and some Windows tools write backslashes."""
    name = info.filename
    if not (info.flag_bits & _UTF8 or name.isascii()):
        # If it is not UTF-8, zipfile's decoding with code page 437 stays.
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/") if info.create_system == 0 else name


class _Tar(_Members):
    """The files of a tar archive; a compressed one is unpacked once, into a temporary file."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        super().__init__(fs, path)
        self._places: dict[str, tuple[int, int]] = {}
        with fs.open(path, "rb", block_size=_BLOCK_BYTES) as file:
            self._unpacked = _unpack(file, path)
            if self._unpacked is not None:
                weakref.finalize(self, self._unpacked.close)
            with _decoded(path, "tar"), tarfile.open(fileobj=self._unpacked or file, mode="r:") as archive:
                members = [member for member in archive if member.isreg() and not member.issparse()]
        times = {member.mtime for member in members}
        # If all files have the same time, it says nothing about their content.
        common = _read_version(fs, path) if len(times) == 1 else ""
        for member in members:
            name = self.add(member.name, member.size, f"{member.mtime} {common}")
            self._places[name] = member.offset_data, member.size

    def read(self, name: str) -> bytes:
        """Read a file."""
        if name not in self._places:
            raise FileNotFoundError(name)
        start, size = self._places[name]
        # Threads share the temporary file, so they must not move its position.
        is_unpacked = self._unpacked is not None
        data = os.pread(self._unpacked.fileno(), size, start) if is_unpacked else self.read_range(start, start + size)
        if len(data) != size:
            raise OSError("the archive has changed or is damaged: it ends within this file")
        return data


def _read_version(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Read a text that changes when an archive does."""
    info = fs.info(path)
    return "/".join(str(info[key]) for key in ("size", "ETag", "etag", "mtime", "LastModified") if info.get(key))


def _unpack(file: Any, path: str) -> Any:
    """Decompress an archive that is compressed as a whole into a temporary file; None if it is not compressed."""
    first = file.read(8)
    file.seek(0)
    opener = next((opener for mark, opener in _OPENERS.items() if first.startswith(mark)), None)
    if opener is None:
        return None
    unpacked = tempfile.TemporaryFile()
    try:
        with opener(file) as stream:
            shutil.copyfileobj(stream, unpacked, _BLOCK_BYTES)
    except (EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        unpacked.close()
        raise StorageError(f"{path}: the archive is damaged or incomplete ({error}); fetch it again") from error
    unpacked.seek(0)
    return unpacked
