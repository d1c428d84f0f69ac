"""Loading: defaults, then a YAML file, then overrides, merged once."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fruitdask.core.config.messages import explain, explain_override
from fruitdask.core.config.sections import Config
from fruitdask.core.config.sources import Source, parse_file, parse_override
from fruitdask.errors import ConfigError, SettingsError

#: Keys that hold a path or a URL; a relative path is relative to its file, or in ``--set`` to the working directory.
URL_KEYS = (
    ("input", "url"),
    ("input", "manifest"),
    ("input", "inventory"),
    ("model", "weights"),
    ("output", "url"),
)
_WORDS_FOR_WEIGHTS = ("imagenet", "random")
#: A configuration of every key is a few kilobytes.
_MAX_BYTES = 1 << 20
#: Characters that no path or UTF-8 file can hold: null, and surrogates, which stand for bytes that are not UTF-8.
_UNUSABLE = re.compile(r"[\0\ud800-\udfff]")
#: URLs; `InputConfig` reports one with a slash too few.
_URL = re.compile(r".*://|[A-Za-z][A-Za-z0-9+.-]+:/", re.DOTALL)
_ENV_PATTERN = re.compile(r"\$\{(\w+)\}")


def load_config(source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = ()) -> Config:
    """
    Load a configuration.

    Parameters
    ----------
    source : str, Path or Mapping
        A YAML file, or the sections themselves as nested mappings. Relative paths are relative to the file (for
        mappings: to the working directory), and ``${NAME}`` in a string becomes the environment variable NAME.
    overrides : Sequence[str]
        Settings such as ``"model.pooling=max"`` that override the file; their relative paths are relative to the
        working directory.

    Returns
    -------
    Config
        The validated, frozen configuration.

    Raises
    ------
    ConfigError
        If the file is missing, is not YAML, or does not describe a run; a `SettingsError` has a line for each mistake.

    Examples
    --------
    >>> sections = {"input": {"url": "s3://fruits/Test"}, "output": {"url": "s3://fruits/run"}}
    >>> config = load_config(sections, overrides=["model.pooling=max"])
    >>> config.model.name, config.model.pooling
    ('MobileNetV2', 'max')
    """
    name = "the configuration" if isinstance(source, Mapping) else str(source)
    try:
        tree, sources = _read_sources(source, name, overrides)
    except RecursionError as error:
        raise ConfigError(f"{name}: expected sections of keys and values, found endless nesting") from error
    if isinstance(tree.get("cluster"), dict):
        kinds = {"address": "address", "class": "custom"}
        kind = next((kind for key, kind in kinds.items() if key in tree["cluster"]), "local")
        tree["cluster"] = {"kind": kind} | tree["cluster"]
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(explain(error, sources)) from error


def build_schema() -> dict[str, Any]:
    """Build the JSON schema of a configuration file."""
    return Config.model_json_schema()


def _read_sources(
    source: str | Path | Mapping[str, Any], name: str, overrides: Sequence[str]
) -> tuple[dict[str, Any], list[Source]]:
    """Read a file or mappings, and overrides: the merged settings, and their sources."""
    if isinstance(source, Mapping):
        base, tree, origin = Path.cwd(), dict(source), Source(name)
    else:
        base = Path(source).resolve().parent
        tree, origin = parse_file(_read_text(Path(source)), name)
    tops = []
    for override in overrides:
        parsed = parse_override(override)
        if parsed is None:
            raise ConfigError(explain_override(override))
        tops.append(parsed)
        tree = _drop_overridden(tree, parsed[0])
    tree, sources = _resolve_paths(_expand_env(tree, origin), base, name), [origin]
    for top, origin in tops:
        tree = _merge(tree, _resolve_paths(_expand_env(top, origin), Path.cwd(), "--set"))
        sources.append(origin)
    return tree, sources


def _read_text(path: Path) -> str:
    """Read a configuration file."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: there is no such configuration file; configs/demo.yaml in the project is an example"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a YAML file in UTF-8, but it cannot be read: {error}") from error
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{path}: expected a configuration of at most {_MAX_BYTES:,} characters, found more")
    return text


def _drop_overridden(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Drop values that others override: the environment variables in them need not be set."""
    kept = {}
    for key, value in base.items():
        if isinstance(value, Mapping) and isinstance(top.get(key), Mapping):
            kept[key] = _drop_overridden(value, top[key])
        elif key not in top:
            kept[key] = value
    return kept


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; the top one wins."""
    merged = dict(base)
    for key, value in top.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_mappings else value
    return merged


def _expand_env(tree: Any, source: Source) -> Any:
    """Replace ``${NAME}`` in every string of a source."""
    mistakes: dict[str, None] = {}

    def expand(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: expand(each, (*path, str(key))) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [expand(each, (*path, str(number))) for number, each in enumerate(value)]
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str):
            return text
        where = f"{source.describe(path)}: {'.'.join(path)}"
        for name in _ENV_PATTERN.findall(text):
            if name not in os.environ:
                mistakes[f"{where}: the environment variable {name} is not set; set it or write the value out"] = None
        text = _ENV_PATTERN.sub(lambda match: os.environ.get(match[1], ""), text)
        if _UNUSABLE.search(text):
            mistakes[f"{where}: expected text in UTF-8 without null characters"] = None
        return text

    expanded = expand(tree, ())
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return expanded


def _resolve_paths(tree: dict[str, Any], base: Path, name: str) -> dict[str, Any]:
    """Make the paths of a tree absolute; URLs stay as they are."""
    for section, key in URL_KEYS:
        value = tree.get(section, {}).get(key) if isinstance(tree.get(section), dict) else None
        is_word = section == "model" and value in _WORDS_FOR_WEIGHTS
        # In zip://Test::x.zip, the path is that of the archive.
        head, sep, tail = str(value or "").rpartition("::")
        chain, path = (head + sep, tail) if "://" in head else ("", value)
        if isinstance(path, str) and path and not _URL.match(path) and not is_word:
            try:
                path = base / Path(path).expanduser()
            except RuntimeError as error:
                raise ConfigError(f"{name}: {section}.{key}: {value} has no home folder; write it out") from error
            tree = _merge(tree, {section: {key: chain + os.path.normpath(path)}})
    return tree
