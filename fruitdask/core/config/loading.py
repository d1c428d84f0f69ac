"""Loading: defaults, then a YAML file, then overrides, merged once."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from fruitdask.core.config.messages import SECTIONS, explain, explain_override
from fruitdask.core.config.sections import Config
from fruitdask.core.config.sources import Source, parse_file, parse_override
from fruitdask.errors import ConfigError, SettingsError

#: Keys that hold a path or a URL; a relative path is resolved against the file (or the working directory) it was written in.
URL_KEYS = (("input", "url"), ("input", "manifest"), ("model", "weights"), ("output", "url"))
_WORDS_FOR_WEIGHTS = ("imagenet", "random")
#: A configuration of every key is a few kilobytes.
_MAX_BYTES = 1 << 20
#: What neither a path nor a file in UTF-8 can hold: null characters, and halves of characters, such as of bytes that are not UTF-8.
_UNUSABLE = re.compile(r"[\0\ud800-\udfff]")
#: What is no path; one slash too few is told by the section.
_URL = re.compile(r".*://|[A-Za-z][A-Za-z0-9+.-]+:/", re.DOTALL)
_ENV_PATTERN = re.compile(r"\$\{(\w+)\}")


def load_config(source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = ()) -> Config:
    """
    Load a configuration.

    Parameters
    ----------
    source : str, Path or Mapping
        A YAML file, or the sections themselves as nested mappings. Relative paths are relative to the file (for mappings: to the
        working directory), and ``${NAME}`` in a string becomes the environment variable NAME.
    overrides : Sequence[str]
        Settings such as ``"model.pooling=max"`` that win over the file; their relative paths are relative to the working directory.

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
    >>> config = load_config({"input": {"url": "s3://fruits/Test"}, "output": {"url": "s3://fruits/run"}}, overrides=["model.pooling=max"])
    >>> config.model.name, config.model.pooling
    ('MobileNetV2', 'max')
    """
    name = "the configuration" if isinstance(source, Mapping) else str(source)
    try:
        tree, sources = _read_sources(source, name, overrides)
    except RecursionError as error:
        raise ConfigError(
            f"{name}: expected sections of keys and values, found something nested without end"
        ) from error
    if isinstance(tree.get("cluster"), dict):
        tree["cluster"] = {"kind": "address" if "address" in tree["cluster"] else "local"} | tree["cluster"]
    _spell_booleans(tree)
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
    """Read a file or mappings, and overrides; gives the settings merged, and where they are written."""
    if isinstance(source, Mapping):
        base, tree, origin = Path.cwd(), dict(source), Source(name)
    else:
        base = Path(source).resolve().parent
        tree, origin = parse_file(_read_text(Path(source)), name)
    tree, sources = _resolve_paths(_expand_env(tree, origin), base, name), [origin]
    for override in overrides:
        parsed = parse_override(override)
        if parsed is None:
            raise ConfigError(explain_override(override))
        top, origin = parsed
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
            f"{path}: there is no such configuration file; configs/demo.yaml in the project is one to start from"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a YAML file in UTF-8, but it cannot be read: {error}") from error
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{path}: expected a configuration of at most {_MAX_BYTES:,} characters, found more")
    return text


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; the upper one wins."""
    merged = dict(base)
    for key, value in top.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_mappings else value
    return merged


def _expand_env(tree: Any, source: Source) -> Any:
    """Replace ``${NAME}`` in every string of a source."""
    unset = [
        f"{source.describe(path)}: {'.'.join(path)}: the environment variable {name} is not set; set it or write the value out"
        for path, text in _list_strings(tree, ())
        for name in _ENV_PATTERN.findall(text)
        if name not in os.environ
    ]
    if unset:
        raise SettingsError("\n".join(dict.fromkeys(unset)))
    expanded = _replace_env(tree)
    unusable = [
        f"{source.describe(path)}: {'.'.join(path)}: expected text in UTF-8 without null characters"
        for path, text in _list_strings(expanded, ())
        if _UNUSABLE.search(text)
    ]
    if unusable:
        raise SettingsError("\n".join(unusable))
    return expanded


def _list_strings(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """List every string of a tree, with its place."""
    if isinstance(tree, str):
        yield path, tree
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        yield from _list_strings(value, (*path, str(key)))


def _replace_env(tree: Any) -> Any:
    """Replace variables that are set; a path of Python becomes text."""
    if isinstance(tree, os.PathLike):
        return _replace_env(os.fspath(tree))
    if isinstance(tree, Mapping):
        return {key: _replace_env(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_replace_env(value) for value in tree]
    return _ENV_PATTERN.sub(lambda match: os.environ[match[1]], tree) if isinstance(tree, str) else tree


def _spell_booleans(tree: dict[str, Any]) -> None:
    """Spell out booleans in place of numbers, so that they are refused: pydantic takes them for 1 and 0."""
    for place, section in SECTIONS.items():
        node: Any = tree
        for key in place:
            # The kind of a cluster stands in the place of a key.
            is_kind = isinstance(node, dict) and node.get("kind") == key
            node = node if is_kind else node.get(key) if isinstance(node, dict) else None
        for name, field in section.model_fields.items() if isinstance(node, dict) else ():
            kinds = {*get_args(field.annotation), field.annotation}
            if isinstance(node.get(name), bool) and kinds & {int, float}:
                node[name] = str(node[name]).lower()


def _resolve_paths(tree: dict[str, Any], base: Path, name: str) -> dict[str, Any]:
    """Make the paths of a tree absolute; URLs stay as they are."""
    for section, key in URL_KEYS:
        value = tree.get(section, {}).get(key) if isinstance(tree.get(section), dict) else None
        is_word = section == "model" and value in _WORDS_FOR_WEIGHTS
        # Of a folder in an archive (zip://Test::x.zip), the archive has the path.
        head, sep, tail = str(value or "").rpartition("::")
        chain, path = (head + sep, tail) if "://" in head else ("", value)
        if isinstance(path, str) and path and not _URL.match(path) and not is_word:
            try:
                path = base / Path(path).expanduser()
            except RuntimeError as error:
                raise ConfigError(
                    f"{name}: {section}.{key}: there is no home folder for {value}; write the path out"
                ) from error
            tree = _merge(tree, {section: {key: chain + os.path.normpath(path)}})
    return tree
