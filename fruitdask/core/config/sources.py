"""Sources of settings: YAML files and overrides, with the line of each key."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fruitdask.errors import ConfigError, SettingsError

#: Limit of values after aliases are expanded: a few lines of them can stand for billions.
_MAX_VALUES = 100_000
_SLASHES = "a backslash in double quotes begins an escape; write Windows paths in single quotes or with forward slashes"
#: A Windows path in double quotes whose backslashes are not doubled.
_WINDOWS_PATH = re.compile(r'"[A-Za-z]:\\(?!\\)')
#: Advice by a part of PyYAML's message.
_ADVICE = (
    ("'\\t'", "write spaces instead of tabs"),
    ("mapping values are not allowed", "check the indentation, and put a value with a colon and a space in quotes"),
    ("alias", "put a value that begins with * or & in quotes"),
    ("that cannot start any token", "put a value that begins with this character in quotes"),
    ("constructor for the tag", "put a value that begins with ! in quotes"),
    ("expected <block end>", "check the indentation: all keys of a section begin in the same column"),
    ("expected ',' or", "close the brackets, and put a value that holds such characters in quotes"),
    ("unexpected end of stream", "close the quotes"),
    ("unhashable key", "write keys as plain words"),
    ("could not find expected ':'", "write a key, a colon, a space and a value"),
    ("but found another document", "write one document, without a line of --- in between"),
)


@dataclass(frozen=True)
class Source:
    """A file, a mapping or an override that holds settings."""

    #: Its name in messages.
    name: str
    #: Its YAML; None for Python mappings.
    root: yaml.Node | None = None
    #: The key that an override sets; empty for others.
    path: tuple[str, ...] = ()

    def sets(self, location: Sequence[str]) -> bool:
        """Whether it is an override of a key, of its section, or of a part of it."""
        n_common = min(len(self.path), len(location))
        return n_common > 0 and self.path[:n_common] == tuple(location[:n_common])

    def find_line(self, location: Sequence[str]) -> int | None:
        """Find the line of the deepest key on the way to a location; None for overrides and Python mappings."""
        lines = [line for line, _ in self._follow(location)]
        return lines[-1] if lines and not self.path else None

    def find_text(self, location: Sequence[str]) -> str | None:
        """Find the value of a key as written, before YAML reads it as a number or a date; None for other nodes."""
        if len(location) < len(self.path):
            return None
        rest = location[len(self.path) :]
        nodes = [self.root, *(node for _, node in self._follow(rest))]
        is_whole = len(nodes) == len(rest) + 1
        return nodes[-1].value if is_whole and isinstance(nodes[-1], yaml.ScalarNode) else None

    def describe(self, location: Sequence[str]) -> str:
        """Describe where a key is written."""
        line = self.find_line(location)
        return self.name if line is None else f"{self.name}, line {line}"

    def _follow(self, location: Sequence[str]) -> Iterator[tuple[int, yaml.Node]]:
        """Follow a location into the YAML: the line and the value of each part."""
        node = self.root
        for part in location:
            found = next(((line, value) for key, line, value in _list_items(node) if key == part), None)
            if found is None:
                return
            yield found
            node = found[1]


def _list_items(node: yaml.Node | None) -> Iterator[tuple[str, int, yaml.Node]]:
    """List the keys of a mapping, or the positions in a list, each with its line and its value."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield str(number), value.start_mark.line + 1, value


def parse_file(text: str, name: str) -> tuple[dict[str, Any], Source]:
    """Parse the YAML of a configuration file."""
    try:
        tree, root = _load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        # PyYAML passes on the ValueError of a date that does not exist.
        raise SettingsError(_explain(error, name)) from error
    if tree is None:
        raise ConfigError(
            f"{name}: the file is empty; it needs at least the sections input: and output:, each with a url:"
        )
    if not isinstance(tree, dict):
        found = "a list; write the sections without the leading -" if isinstance(tree, list) else f"{tree!r}"
        raise ConfigError(f"{name}: expected sections such as input: and output:, found {found}")
    if faults := sorted(_find_faults(root, (), set()), key=lambda fault: fault[0]):
        raise SettingsError("\n".join(f"{name}, line {line}: {sentence}" for line, sentence in faults))
    return tree, Source(name, root)


def parse_override(override: str) -> tuple[dict[str, Any], Source] | None:
    """Parse ``a.b=value``, whose value is YAML, into nested mappings; None if it does not have that form."""
    key, separator, value = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not separator or len(path) < 2 or not all(path):
        return None
    try:
        tree, root = _load_yaml(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"--set {override}: {value!r} is not a YAML value; if it is text, write --set '{key}=\"{value}\"'"
        ) from error
    if "#" in (comment := value[0 if root is None else root.end_mark.index :].strip()):
        # A folder may be named photos #2.
        raise ConfigError(
            f"--set {override}: YAML reads {comment!r} as a comment; if it is text, write --set '{key}=\"{value}\"'"
        )
    for part in reversed(path):
        tree = {part: tree}
    return dict(tree), Source(f"--set {override}", root, path)


class _BoundedLoader(yaml.SafeLoader):
    """A loader of plain values that refuses nested aliases before it expands them."""

    def get_single_node(self) -> yaml.Node | None:
        """Read the document, and count its values."""
        node = super().get_single_node()
        if node is not None and _count_values(node, {}) > _MAX_VALUES:
            raise yaml.YAMLError(f"expected at most {_MAX_VALUES:,} values, found aliases (*) that stand for more")
        return node


def _load_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Load YAML as plain values and as nodes; refuse tags that would run code."""
    loader = _BoundedLoader(text)
    try:
        root = loader.get_single_node()
        return (None if root is None else loader.construct_document(root)), root
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Count the values below a node, each as often as it is used."""
    if id(node) not in counted:
        # A node that contains itself fails later.
        counted[id(node)] = 1
        below = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if not isinstance(node, yaml.ScalarNode):
            counted[id(node)] += sum(_count_values(each, counted) for each in below)
    return counted[id(node)]


def _explain(error: Exception, name: str) -> str:
    """Explain what PyYAML did not understand, where, and what to do."""
    if not isinstance(error, yaml.YAMLError):
        return f"{name}: not valid YAML: {error}; put text that looks like a date in quotes"
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{name}: not valid YAML: {' '.join(str(error).split())}"
    mark = error.problem_mark or error.context_mark
    where = name if mark is None else f"{name}, line {mark.line + 1}"
    said = f"{error.context or ''} {error.problem or ''}"
    if "double-quoted" in said and "escape" in said:
        return f"{where}: not valid YAML: {_SLASHES}"
    advice = next((advice for part, advice in _ADVICE if part in said), None)
    start, problem = error.context_mark, error.problem or error.context
    if error.problem and error.problem.startswith("but "):
        problem = f"{error.context}, {error.problem}"
    elif start and mark and start.line != mark.line:
        problem = f"{problem} ({error.context}, line {start.line + 1})"
    return f"{where}: not valid YAML: {problem}" + (f"; {advice}" if advice else "")


def _find_faults(node: yaml.Node | None, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[int, str]]:
    """Find mistakes that YAML accepts: duplicate keys, and Windows paths whose backslashes it reads as escapes."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        mark = node.start_mark
        if node.style == '"' and mark.buffer and _WINDOWS_PATH.match(mark.buffer, mark.pointer):
            yield mark.line + 1, f"{'.'.join(path)}: {_SLASHES}"
        return
    first: dict[str, int] = {}
    for key, line, value in _list_items(node):
        inner = (*path, key)
        if key in first and key != "<<":
            yield line, f"the key {'.'.join(inner)} is a duplicate of that in line {first[key]}; keep one of them"
        first.setdefault(key, line)
        yield from _find_faults(value, inner, seen)
