"""The version of fruitdask, and those of other packages."""

from functools import cache

__version__ = "0.1.0"


@cache
def find_version(package: str) -> str | None:
    """Find the version of a package; None if it is not installed. Its metadata take milliseconds to read."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
