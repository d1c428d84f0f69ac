"""Texts that a page shows without secrets: places, nested values, and the title."""

import base64
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd

from fruitdask.core.config import Config
from fruitdask.core.escaping import format_csv
from fruitdask.core.storage import hide_secrets

#: View of a section: what the template shows, under the names that it uses.
View = dict[str, Any]


def map_texts(change: Callable[[str], str], tree: Any) -> Any:
    """Change every text of nested mappings and lists."""
    if isinstance(tree, Mapping):
        return {key: map_texts(change, child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [map_texts(change, child) for child in tree]
    return change(tree) if isinstance(tree, str) else tree


def show_place(text: str) -> str:
    """Format a path or URL for a page that people share: without secrets and the name of the home folder."""
    home = str(Path.home())
    # For a folder in an archive, the archive has the path.
    chain, separator, place = hide_secrets(text).rpartition("::")
    shown = "~" + place[len(home) :] if len(home) > 1 and f"{place}/".startswith(f"{home}/") else place
    return chain + separator + shown


def list_facts(value: Any) -> list[tuple[str, str]]:
    """Flatten nested values into names and texts.

    >>> list_facts({"input": {"region": "eu-central-1"}, "n_workers": 2})
    [('input region', 'eu-central-1'), ('n workers', '2')]
    """
    return [(name, text) for name, text in _walk_facts(value, ())]


def _walk_facts(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Walk through nested values, depth first."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _walk_facts(child, (*keys, str(key)))
    elif isinstance(value, list | tuple):
        yield " ".join(keys).replace("_", " "), ", ".join(map(str, value))
    elif value is not None:
        yield " ".join(keys).replace("_", " "), str(map_texts(show_place, value))


def embed_csv(table: pd.DataFrame) -> str:
    """Format a table as CSV in Base64, for a link that downloads it."""
    return base64.b64encode(format_csv(table).encode()).decode("ascii")


def choose_title(config: Config) -> str:
    """Choose the title of the page: as configured, or the last two parts of the input's path."""
    if config.report.title:
        return config.report.title
    url = str(show_place(config.input.url))
    host, path = urlsplit(url)[1:3] if "://" in url else ("", url)
    parts = [part for part in (host, *path.replace("\\", "/").split("/")) if part]
    return "/".join(parts[-2:]) or "Images"
