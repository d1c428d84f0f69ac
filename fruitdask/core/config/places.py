"""Configurations of runs of which only the photographs are given."""

from pathlib import Path
from typing import Any

from fruitdask.errors import ConfigError

#: Archives by the end of their name, and the protocols that read them.
_ARCHIVES = {".zip": "zip", ".tar": "tar"}


def describe_place(place: str, results: str | None = None) -> dict[str, Any] | None:
    """Describe a run on a folder, an archive or a URL of photographs; None for another file, or one that is missing.

    By default the results are beside the photographs.

    >>> describe_place("s3://fruits/Test/")
    {'input': {'url': 's3://fruits/Test/'}, 'output': {'url': 's3://fruits/Test-results'}}
    >>> describe_place("run.yaml")
    """
    path = Path(place)
    if "://" in place:
        url, beside = place, _name_beside(place)
    elif path.is_dir():
        url, beside = place, str(path.resolve())
    elif path.is_file() and (protocol := _ARCHIVES.get(path.suffix.lower())):
        url, beside = f"{protocol}://::{path.resolve()}", str(path.resolve().with_suffix(""))
    else:
        return None
    if results is None and not beside:
        raise ConfigError(
            f"{place}: results cannot be stored beside a whole bucket; give their folder or URL as the second argument"
        )
    return {"input": {"url": url}, "output": {"url": results or f"{beside}-results"}}


def _name_beside(url: str) -> str:
    """Name a folder beside a folder or an archive at a URL, without an ending; empty for a whole bucket.

    >>> _name_beside("zip://Test::s3://fruits/all.zip"), _name_beside("s3://fruits/")
    ('s3://fruits/all', '')
    """
    _, separator, whole = url.rstrip("/").rpartition("::")
    stem = whole.removesuffix(Path(whole).suffix) if separator else whole
    return stem if "/" in stem.partition("://")[2] or "://" not in stem else ""
