"""Loading: defaults, then a YAML file, then overrides, merged once."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fruitdask.config.clusters import AdaptiveConfig, AddressClusterConfig, EC2ClusterConfig, LocalClusterConfig
from fruitdask.config.sections import (
    Config,
    ExploreConfig,
    FeaturizeConfig,
    InputConfig,
    LimitsConfig,
    ModelConfig,
    OutputConfig,
    PlotsConfig,
    PrivacyConfig,
    QualityConfig,
    ReduceConfig,
    ReportConfig,
    SampleConfig,
    TsneConfig,
)
from fruitdask.errors import ConfigError

#: Keys that hold a path or a URL; a relative path is resolved against the file (or the working directory) it was written in.
URL_KEYS = (("input", "url"), ("input", "manifest"), ("model", "weights"), ("output", "url"))
_WORDS_FOR_WEIGHTS = ("imagenet", "random")
#: A configuration of every key is a few kilobytes.
_MAX_BYTES = 1 << 20
#: Values of a YAML file with its aliases written out, which can stand for billions in a few lines.
_MAX_VALUES = 100_000
#: What is no path; one slash too few is told by the section.
_URL = re.compile(r".*://|[A-Za-z][A-Za-z0-9+.-]+:/", re.DOTALL)
_ENV_PATTERN = re.compile(r"\$\{(\w+)\}")

#: The sections by their place, a cluster's kind standing for the alternative that pydantic took.
_SECTIONS: dict[tuple[int | str, ...], type[BaseModel]] = {
    (): Config,
    ("input",): InputConfig,
    ("input", "sample"): SampleConfig,
    ("model",): ModelConfig,
    ("cluster", "local"): LocalClusterConfig,
    ("cluster", "address"): AddressClusterConfig,
    ("cluster", "ec2"): EC2ClusterConfig,
    ("cluster", "ec2", "adaptive"): AdaptiveConfig,
    ("featurize",): FeaturizeConfig,
    ("reduce",): ReduceConfig,
    ("reduce", "tsne"): TsneConfig,
    ("explore",): ExploreConfig,
    ("quality",): QualityConfig,
    ("plots",): PlotsConfig,
    ("report",): ReportConfig,
    ("privacy",): PrivacyConfig,
    ("limits",): LimitsConfig,
    ("output",): OutputConfig,
}


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
        If the file is missing, is not YAML, or does not describe a run.

    Examples
    --------
    >>> config = load_config({"input": {"url": "s3://fruits/Test"}, "output": {"url": "s3://fruits/run"}}, overrides=["model.pooling=max"])
    >>> config.model.name, config.model.pooling
    ('MobileNetV2', 'max')
    """
    name, text = ("the configuration", "") if isinstance(source, Mapping) else (str(source), _read_text(Path(source)))
    base = Path.cwd() if isinstance(source, Mapping) else Path(source).resolve().parent
    try:
        tree = dict(source) if isinstance(source, Mapping) else _parse_yaml(text, name)
        tree = _resolve_paths(_expand_env(tree, name), base, name)
        for override in overrides:
            top = _resolve_paths(_expand_env(_parse_override(override), f"--set {override}"), Path.cwd(), "--set")
            tree = _merge(tree, top)
    except RecursionError as error:
        raise ConfigError(
            f"{name}: expected sections of keys and values, found something nested without end"
        ) from error
    if isinstance(tree.get("cluster"), dict):
        tree["cluster"] = {"kind": "address" if "address" in tree["cluster"] else "local"} | tree["cluster"]
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, name, text, overrides)) from error


def build_schema() -> dict[str, Any]:
    """
    Build the JSON schema of a configuration file.

    Returns
    -------
    dict
        The schema; editors use it to complete and check the YAML.
    """
    return Config.model_json_schema()


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


def _parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse YAML whose top level is a mapping."""
    try:
        tree = _load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        # PyYAML lets the ValueError of a date that does not exist through.
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: expected sections such as input: and output:, found {type(tree).__name__}")
    return tree


class _BoundedLoader(yaml.SafeLoader):
    """A loader of plain values only, that refuses aliases of aliases of aliases before they are written out."""

    def get_single_node(self) -> yaml.Node | None:
        """Read the document, and count."""
        node = super().get_single_node()
        if node is not None and _count_values(node, {}) > _MAX_VALUES:
            raise yaml.YAMLError(f"expected at most {_MAX_VALUES:,} values, found aliases (*) that stand for more")
        return node


def _load_yaml(text: str) -> Any:
    """Load YAML as plain values; tags that would run code are refused."""
    loader = _BoundedLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Count the values below a node, each as often as it is used."""
    if id(node) not in counted:
        # A node within itself is found out later.
        counted[id(node)] = 1
        below = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if not isinstance(node, yaml.ScalarNode):
            counted[id(node)] += sum(_count_values(each, counted) for each in below)
    return counted[id(node)]


def _parse_override(override: str) -> dict[str, Any]:
    """Turn ``a.b=value`` into nested mappings; the value is YAML."""
    key, separator, value = override.partition("=")
    if not separator or "." not in key:
        raise ConfigError(f"--set {override}: expected section.key=value, for example model.pooling=max")
    try:
        tree: Any = _load_yaml(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override}: {value!r} is not a YAML value") from error
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return dict(tree)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; the upper one wins."""
    merged = dict(base)
    for key, value in top.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_mappings else value
    return merged


def _expand_env(tree: Any, name: str) -> Any:
    """Replace ``${NAME}`` in every string."""
    if isinstance(tree, Mapping):
        return {key: _expand_env(value, name) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_expand_env(value, name) for value in tree]
    if not isinstance(tree, str):
        return tree

    def replace(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(
                f"{name}: the environment variable {match[1]} of {tree!r} is not set; set it or write the value out"
            )
        return os.environ[match[1]]

    return _ENV_PATTERN.sub(replace, tree)


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


def _explain(error: ValidationError, name: str, text: str, overrides: Sequence[str]) -> str:
    """Say the first thing that is wrong, where it stands and what would be right."""
    first = error.errors()[0]
    section, location = _locate(first["loc"])
    key = ".".join(location) or "the file"
    where = _find_override(overrides, location) or f"{name}{_find_line(text, location)}"
    if first["type"] == "extra_forbidden":
        valid = sorted(section.model_fields)
        nearest = difflib.get_close_matches(location[-1], valid, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"valid keys: {', '.join(valid)}"
        return f"{where}: unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"{where}: the key {key} is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    # Options of file systems and variables of containers hold secrets.
    is_hidden = any(part in section.model_fields and not section.model_fields[part].repr for part in location)
    found = "" if is_hidden or first["type"] == "value_error" else f", found {first['input']!r}"
    return f"{where}: {key}: {message[0].lower() + message[1:]}{found}"


def _locate(loc: tuple[int | str, ...]) -> tuple[type[BaseModel], list[str]]:
    """Find the section of an error and its key as the user wrote it; pydantic also names the alternatives that it tried."""
    depth = max(n for n in range(len(loc)) if loc[:n] in _SECTIONS) if loc else 0
    parts = [*loc[: depth + 1], *(part for part in loc[depth + 1 :] if isinstance(part, int))]
    if loc[:1] == ("cluster",) and len(parts) > 1:
        del parts[1]
    return _SECTIONS[loc[:depth]], [str(part) for part in parts]


def _find_override(overrides: Sequence[str], location: Sequence[str]) -> str | None:
    """Find the override that set a key, the last one if there are several."""
    for override in reversed(overrides):
        parts = override.partition("=")[0].split(".")
        n_common = min(len(parts), len(location))
        if n_common and parts[:n_common] == list(location[:n_common]):
            return f"--set {override}"
    return None


def _find_line(text: str, location: Sequence[str]) -> str:
    """Find the line of the deepest key of a location that stands in the text."""
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader) if text else None
    line = None
    for part in location:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = next(((key, value) for key, value in pairs if key.value == part), None)
        if match is None:
            break
        line, node = match[0].start_mark.line + 1, match[1]
    return f", line {line}" if line else ""
