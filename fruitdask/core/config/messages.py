"""Sentences about mistakes in a configuration: where each is, what was expected and found, and what to write."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fruitdask.core.config.base import Section
from fruitdask.core.config.sections import Config
from fruitdask.core.config.sources import Source


def _list_sections(section: type[Section], place: tuple[str, ...] = ()) -> Iterator[tuple[Any, type[Section]]]:
    """List a section and those inside it by their place, in which the kind of a cluster follows the key cluster."""
    yield place, section
    for name, field in section.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                kinds = get_args(part.model_fields["kind"].annotation) if "kind" in part.model_fields else ()
                yield from _list_sections(part, (*place, name, *kinds))


#: The sections by their place.
SECTIONS: dict[tuple[int | str, ...], type[Section]] = dict(_list_sections(Config))

#: What pydantic expected, by the type of its error: first values of the wrong type, then values out of bounds.
_TYPES = {
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    **dict.fromkeys(("dict_type", "model_attributes_type", "model_type"), "keys and values"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("int_from_float", "int_parsing", "int_parsing_size", "int_type"), "an integer"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    "string_type": "text",
}
_BOUNDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "finite_number": lambda context: "a finite number",
    "greater_than": lambda context: f"a number greater than {_trim(context['gt'])}",
    "greater_than_equal": lambda context: f"at least {_trim(context['ge'])}",
    "less_than": lambda context: f"a number less than {_trim(context['lt'])}",
    "less_than_equal": lambda context: f"at most {_trim(context['le'])}",
    "literal_error": lambda context: str(context["expected"]).replace("'", ""),
    "string_too_short": lambda context: "text that is not empty",
    "too_long": lambda context: f"a list of at most {context['max_length']}",
    "too_short": lambda context: f"a list of at least {context['min_length']}",
    "union_tag_invalid": lambda context: " or ".join(str(context["expected_tags"]).replace("'", "").rsplit(", ", 1)),
}
_MAX_SHOWN = 100
#: The key that is probably meant if a section is written as text.
_MAIN_KEYS = {"input": "url", "output": "url", "model": "name", "cluster": "kind"}


def explain(error: ValidationError, sources: Sequence[Source]) -> str:
    """Describe all mistakes, one per line: where each is and what would be right."""
    mistakes: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in error.errors():
        mistakes.setdefault(_locate(detail)[1], []).append(detail)
    suggested = {(*key[:-1], _find_key(details[0])) for key, details in mistakes.items()}
    found = []
    for key, details in mistakes.items():
        # Of the alternatives that pydantic tried, the user probably meant the one that matched deepest.
        is_superseded = any(key != other and key == other[: len(key)] for other in mistakes)
        if is_superseded or (details[0]["type"] == "missing" and key in suggested):
            continue
        source = next((one for one in reversed(sources) if one.sets(key)), sources[0])
        sentence = f"{source.describe(key)}: {_describe(details, source)}"
        found.append((sources.index(source), source.find_line(key) or 0, _escape(sentence)))
    return "\n".join(sentence for _, _, sentence in sorted(found, key=lambda item: item[:2]))


def explain_override(override: str) -> str:
    """Describe how to write an override that is not of the form section.key=value."""
    key, separator, value = (part.strip() for part in override.partition("="))
    meant = ""
    if separator and key in _MAIN_KEYS:
        meant = f"{key}.{_MAIN_KEYS[key]}={value}"
    elif separator and key:
        meant = ", ".join(f"{home}={value}" for home in _find_homes(key))
    elif not separator and "." in key:
        name, _, value = key.partition(" ")
        meant = f"{name}={value or 'VALUE'}"
    hint = f"; did you mean {meant}?" if meant else ""
    return _escape(f"--set {override}: expected section.key=value, for example model.pooling=max{hint}")


def _locate(detail: ErrorDetails) -> tuple[type[Section], tuple[str, ...]]:
    """Find the section of an error, and the key as the user wrote it: without the alternatives that pydantic tried."""
    loc = detail["loc"]
    depth = max(n for n in range(len(loc)) if loc[:n] in SECTIONS) if loc else 0
    section, rest = SECTIONS[loc[:depth]], loc[depth + 1 :]
    field = section.model_fields.get(str(loc[depth])) if loc else None
    holds_keys = field is not None and get_origin(field.annotation) is dict
    rest = tuple(part for part in rest if (part != "[key]" if holds_keys else isinstance(part, int)))
    parts = [*loc[: depth + 1], *rest]
    if loc[:1] == ("cluster",) and len(parts) > 1:
        del parts[1]
    if detail["type"] == "union_tag_invalid":
        parts.append("kind")
    return section, tuple(str(part) for part in parts)


def _describe(details: Sequence[ErrorDetails], source: Source) -> str:
    """Describe one mistake: what was expected, what was found, and what to write."""
    detail = details[0]
    section, key = _locate(detail)
    name = ".".join(key)
    if detail["type"] == "extra_forbidden":
        return f"unknown key {name}; {_suggest_key(section, key[-1])}"
    if detail["type"] == "missing" and key[-1].isdigit():
        n_values = len(get_args(section.model_fields[key[-2]].annotation))
        return f"{'.'.join(key[:-1])}: expected a list of {n_values} values, found {detail['input']!r}"
    if detail["type"] == "missing":
        return f"the key {name} is missing; add it"
    if detail["type"] == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"{name}: {message[0].lower() + message[1:]}" if name else message
    if detail["type"] == "invalid_key" or detail["loc"][-1:] == ("[key]",):
        return f"{name}: expected text as a key; put it in quotes"
    return f"{name}: {_describe_value(details, section, key, source)}"


def _describe_value(
    details: Sequence[ErrorDetails], section: type[Section], key: tuple[str, ...], source: Source
) -> str:
    """Describe a value of the wrong type, or out of bounds."""
    types, value = {detail["type"] for detail in details}, details[0]["input"]
    phrases = {_describe_expected(detail): None for detail in details}
    if "a number" in phrases:
        phrases.pop("an integer", None)
    expected, text, hint = " or ".join(phrases), source.find_text(key), ""
    if "union_tag_invalid" in types:
        value = value["kind"]
    if isinstance(value, str) and types & {"literal_error", "union_tag_invalid"}:
        nearest = _find_nearest(value, re.split(", | or ", expected))
        hint = f"did you mean {nearest}?" if nearest else ""
    hint = hint or _suggest_value(types, key, value, text, is_override=source.path == key)
    # Options of file systems and variables of containers hold secrets.
    if any(part in section.model_fields and not section.model_fields[part].repr for part in key):
        return f"expected {expected}" + ("; put it in quotes" if "in quotes" in hint else "")
    return f"expected {expected}, found {_show(value, text)}" + (f"; {hint}" if hint else "")


def _describe_expected(detail: ErrorDetails) -> str:
    """Describe what pydantic expected."""
    if detail["type"] in _BOUNDS:
        return _BOUNDS[detail["type"]](detail["ctx"] if "ctx" in detail else {})
    return _TYPES.get(detail["type"]) or detail["msg"].lower()


def _trim(number: float) -> str:
    """Write a number without trailing zeros."""
    return str(int(number) if number == int(number) else number)


def _show(value: Any, text: str | None) -> str:
    """Show a value as it is written in YAML."""
    if value is None:
        return "nothing"
    if isinstance(value, bool) or value in ("true", "false"):
        word = str(value).lower()
        return word if text is None or text.lower() == word else f"{text}, which YAML reads as {word}"
    shown = repr(value) if isinstance(value, str | list | dict) else text or str(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."


def _suggest_value(types: set[str], key: tuple[str, ...], value: Any, text: str | None, *, is_override: bool) -> str:
    """Suggest what to write instead of a value of the wrong type."""
    name = ".".join(key)
    if types & {"model_type", "model_attributes_type"}:
        return _suggest_section(key, value, is_override=is_override)
    if types & {"tuple_type", "list_type"} and isinstance(value, str):
        return f"write {name}=[{value}]" if is_override else f"write [{value}]"
    if "string_type" in types and not isinstance(value, list | dict | None):
        quoted = f'"{str(value).lower() if text is None and isinstance(value, bool) else text or value}"'
        return f"put it in quotes: --set '{name}={quoted}'" if is_override else f"put it in quotes: {quoted}"
    return ""


def _suggest_section(key: tuple[str, ...], value: Any, *, is_override: bool) -> str:
    """Suggest what to write instead of one value for a whole section."""
    name, section = ".".join(key), SECTIONS.get(key)
    if value is None:
        return "write its keys below it, or leave it out"
    if isinstance(value, str) and re.match(r"\w+:\S", value) and "://" not in value[: value.find(":") + 3]:
        return "put a space after the colon"
    inner = ""
    if isinstance(value, bool) and section is not None and "enabled" in section.model_fields:
        inner, value = "enabled", str(value).lower()
    elif isinstance(value, str):
        inner = _MAIN_KEYS.get(name, "")
    if inner:
        return f"write {name}.{inner}={value}" if is_override else f"write {key[-1]}: {{{inner}: {value}}}"
    return f"its keys are {', '.join(sorted(_list_keys(section)))}" if section else ""


def _suggest_key(section: type[Section], name: str) -> str:
    """Suggest a valid key for an unknown one."""
    parent, _, inner = name.partition(".")
    if inner and parent in section.model_fields:
        return f"write {parent}: {{{inner}: ...}}"
    if nearest := _find_nearest(name, _list_keys(section)):
        return f"did you mean {nearest}?"
    if homes := _find_homes(name):
        if "kind" in section.model_fields and homes[0].startswith("cluster."):
            kinds = " or ".join(home.partition("kind: ")[2] for home in homes if home.startswith("cluster."))
            return f"only a cluster with kind: {kinds} has this key"
        return f"did you mean {' or '.join(homes)}?"
    return f"valid keys: {', '.join(sorted(_list_keys(section)))}"


def _find_key(detail: ErrorDetails) -> str:
    """Find the valid key that an unknown one stands for; empty for other mistakes."""
    section, key = _locate(detail)
    if detail["type"] != "extra_forbidden":
        return ""
    return _find_nearest(key[-1], _list_keys(section)) or key[-1].partition(".")[0]


def _list_keys(section: type[Section]) -> list[str]:
    """List the keys of a section as the user writes them."""
    return [field.alias or name for name, field in section.model_fields.items()]


def _find_nearest(word: str, words: Iterable[str]) -> str:
    """Find the most similar word, in any case; empty if none is similar."""
    return next(iter(difflib.get_close_matches(_normalize(word), list(words), n=1)), "")


def _normalize(word: str) -> str:
    """Spell a word as keys are spelled."""
    return word.strip().lower().replace("-", "_")


def _find_homes(name: str) -> list[str]:
    """Find the sections that have a key."""
    homes, name = [], _normalize(name)
    for path, section in SECTIONS.items():
        if path and name in _list_keys(section):
            kind = path[1] if path[0] == "cluster" else ""
            place = ".".join(str(part) for part in path if part != kind)
            homes.append(f"{place}.{name}{f' with kind: {kind}' if kind else ''}")
    return homes


def _escape(sentence: str) -> str:
    """Escape line breaks and terminal controls that a key or a value may hold."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in sentence
    )
