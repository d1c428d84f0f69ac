"""The configuration in the results: a run writes it, and commands that are given the results read it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fruitdask import store
from fruitdask.core.config import URL_KEYS, Config, parse_file
from fruitdask.core.storage import Location, exists, explained, write_file
from fruitdask.core.version import __version__
from fruitdask.pipeline.inputs import dump_config

_HEAD = f"""\
# The configuration of the results in this folder, by fruitdask {__version__}; each run writes it again.
# To resume the run, or to bring it up to date with its images: fruitdask run {store.CONFIG}
"""
#: libyaml takes a tenth of the time, where PyYAML was built with it.
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_HIDDEN = "# Environment variables replace texts that may be secret: set them, or write the values out.\n"


def write_config(output: Location, config: Config) -> None:
    """Write a configuration to its results, as a file that can be run again."""
    text = yaml.dump(describe_config(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    write_file(output.child(store.CONFIG), f"{_HEAD}{_HIDDEN * ('${FRUITDASK_' in text)}{text}".encode())


def read_config(output: Location, *, sections: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Read the configuration in the results, with the folder's current location as output; None if there is none.

    With `sections`, the others are left out, and their environment variables need not be set.
    """
    location = output.child(store.CONFIG)
    if not (store.has_begun(output) and exists(location)):
        return None
    with explained(location, "read"):
        text = location.fs.cat_file(location.path).decode()
    tree, _ = parse_file(text, location.url)
    if sections is not None:
        # The input is required and named on the page, but not read.
        source = dict(tree.get("input") or {})
        named = {key: source[key] for key in ("url", "extensions") if key in source and "${" not in str(source[key])}
        tree = {name: tree[name] for name in sections if name in tree} | {"input": {"url": output.url} | named}
    return tree | {"output": tree.get("output", {}) | {"url": output.url}}


def describe_config(config: Config) -> dict[str, Any]:
    """Describe a configuration with environment variables in place of texts that may be secret."""
    described, whole = dump_config(config), config.model_dump()
    for name, section in whole.items():
        hidden = {key: value for key, value in section.items() if key not in described[name] and value}
        described[name] |= {key: _hide(value, f"{name}_{key}") for key, value in hidden.items()}
    for section, key in URL_KEYS:
        if described[section][key] != whole[section][key]:
            described[section][key] = _hide(whole[section][key], f"{section}_{key}")
    # Running the file again must not delete the results.
    described["output"]["overwrite"] = False
    return described


def _hide(value: Any, name: str) -> Any:
    """Replace the texts in a value by environment variables."""
    if isinstance(value, Mapping):
        return {key: _hide(each, f"{name}_{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(each, f"{name}_{number}") for number, each in enumerate(value, start=1)]
    if value is None or isinstance(value, bool | int | float):
        return value
    return f"${{FRUITDASK_{re.sub(r'[^A-Z0-9]+', '_', name.upper())}}}"
