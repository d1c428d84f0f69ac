"""The reference of the configuration as Markdown, made from the sections themselves."""

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from fruitdask.core.config.base import Section
from fruitdask.core.config.messages import SECTIONS

_INTRODUCTION = """\
# The configuration

A run is one YAML file. Only `input.url` and `output.url` are required; every other key has the default in this table.
Relative paths are relative to the file. `${NAME}` is an environment variable. `--set section.key=value` overrides a key
on the command line; its relative paths are relative to the current folder. Durations are seconds or text such as
`20 minutes`.

- `fruitdask init PHOTOS` writes a file to start from; the other files here are examples.
- `fruitdask validate FILE` lists all mistakes with their lines, without reading any data.
- `fruitdask schema > fruitdask.json` writes a JSON schema. With `# yaml-language-server: $schema=fruitdask.json` as the
  first line of a configuration, editors complete and check it as you type.

This file is written by `fruitdask schema --markdown > configs/README.md`.
"""


def build_reference() -> str:
    """Describe every key in a table per section."""
    return "\n".join([_INTRODUCTION, *(line for place in _list_tables() for line in _describe(place))])


def _list_tables() -> Iterator[tuple[str, ...]]:
    """List the sections that have their own table: those at the top, and each kind of cluster."""
    for place in SECTIONS:
        if len(place) == 1 or (len(place) == 2 and "kind" in SECTIONS[place].model_fields):
            yield tuple(map(str, place))


def _describe(place: tuple[str, ...]) -> Iterator[str]:
    """Describe a section by a heading, a sentence and a table."""
    section = SECTIONS[place]
    kind = f" with `kind: {place[1]}`" if len(place) > 1 else ""
    yield f"## `{place[0]}`{kind}\n"
    yield f"{str(section.__doc__).strip().splitlines()[0]}\n"
    yield "| key | default | meaning |\n|---|---|---|"
    yield from _list_rows(section, place)
    yield ""


def _list_rows(section: type[Section], place: tuple[str, ...], inside: str = "") -> Iterator[str]:
    """List the rows of a section's keys, and of the keys of the sections inside it."""
    for name, field in section.model_fields.items():
        key = f"{inside}{field.alias or name}"
        if inner := SECTIONS.get((*place, name)):
            if field.description:
                yield _format_row(key, field)
            yield from _list_rows(inner, (*place, name), f"{key}.")
        elif name != "kind":
            yield _format_row(key, field)


def _format_row(key: str, field: FieldInfo) -> str:
    """Format the row of a key."""
    default = "required" if field.is_required() else _format_default(field.default)
    choices = [f"`{choice}`" for choice in _list_choices(field.annotation)]
    # A single word is one of many values, such as `eu` beside the names of regions.
    meaning = f"{field.description} One of {', '.join(choices)}." if len(choices) > 1 else str(field.description)
    return f"| `{key}` | {default} | {meaning.replace('|', '&#124;')} |"


def _format_default(value: Any) -> str:
    """Format a default as YAML has it."""
    is_word = isinstance(value, str) and value
    return f"`{value if is_word else json.dumps(value)}`"


def _list_choices(annotation: Any) -> list[str]:
    """List the words that a key accepts."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _list_choices(part)]
