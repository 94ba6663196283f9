"""Strict reading of YAML files: plain values only, no duplicate keys, limited size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dgm.common.errors import UserError, access_fault

_MAX_BYTES = 2**20
_MAX_DEPTH = 40
_MAX_VALUES = 20_000  # including those that aliases and merges repeat
_MAX_DIGITS = 100
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


# As on the trainers' command line and unlike YAML 1.1, 010 is ten, 1e-4 is a number, and 1:30,
# dates and = are strings.
_INT = re.compile(r"[-+]?(0x[\da-fA-F_]+|0b[01_]+|\d[\d_]*)$")
_FLOAT = re.compile(
    r"([-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+"
    r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"
)
_REPLACED = {_TAG + kind for kind in ("int", "float", "timestamp", "value")}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A safe loader that reads numbers as described above."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - an attribute of PyYAML
        first: [(tag, rule) for tag, rule in rules if tag not in _REPLACED]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a scalar as an integer; raise ValueError if it is not one."""
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 0 if re.match(r"[-+]?0[xb]", text) else 10)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes strings which this or PyYAML's loader would read as numbers."""


_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
    _kind.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


def write_yaml(content: dict[str, Any]) -> str:
    """Return keys and values as YAML, which `read_yaml` reads back exactly."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def read_value(text: str) -> Any:
    """Return the value of a command-line word; raise yaml.YAMLError if it is not YAML."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path, as_text: bool = False) -> dict[str, Any]:
    """Read a YAML mapping; an empty file has no keys. as_text: return every value as a string.

    Raise UserError with file, line and remedy.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except PermissionError as error:
        denied = access_fault(path) or f"{path} may not be read"
        raise UserError(f"{denied} ({error.strerror}), or name a YAML file of your own") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a YAML file") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path} has more than {_MAX_BYTES:,} bytes: name a smaller YAML file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not valid UTF-8 (line {line}): save it as UTF-8") from None
    try:
        return _parse(path, text, as_text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        reason = " ".join(reason.split())
        if "nesting depth" in reason:  # PyYAML from 6.0.4 has its own limit
            raise UserError(_too_deep(path, _marked_line(error, text) + 1)) from None
        line, remedy = _find_mistake(_marked_line(error, text), reason, text.split("\n"))
        raise UserError(f"{path} is not valid YAML (line {line + 1}: {reason}): {remedy}") from None


def _marked_line(error: yaml.YAMLError, text: str) -> int:
    """Return the line, from 0, at which the parser stopped."""
    mark = getattr(error, "problem_mark", None)
    last = text.rstrip().count("\n")
    context = getattr(error, "context_mark", None)
    # At the end of the file, or after a key without a colon, the cause is above.
    if mark and context and (mark.line > last or "expected ':'" in str(error)):
        mark = context
    position = getattr(error, "position", None)  # of a character that YAML forbids
    line = mark.line if mark else text.count("\n", 0, position) if position else 0
    return min(line, last)


def _find_mistake(line: int, reason: str, lines: list[str]) -> tuple[int, str]:
    """Return the faulty line, from 0, and the remedy.

    The parser may notice a tab or a missing colon only one line later.
    """
    written = [k for k in range(line + 1) if lines[k].strip() and lines[k].strip()[0] != "#"]
    for k in reversed(written[-2:]):
        indent = lines[k][: len(lines[k]) - len(lines[k].lstrip())]
        if "\t" in indent and "expected ','" not in reason:
            return k, "indent by spaces, not by tabs"
    for k in reversed(written[-2:]):
        key = lines[k].strip().split(" #")[0]
        if (
            ("mapping values" in reason or "expected ':'" in reason)
            and re.fullmatch(r"\w[\w.]*(:\S.*|\s.*)?", key)
            and not re.search(r":(\s|$)", key)
        ):
            return k, f"write '{key.split()[0].split(':')[0]}: ', with a colon and a space"
    return line, "indent by spaces, not by tabs" if "\t" in lines[line] else "correct that line"


def _parse(path: Path, text: str, as_text: bool) -> dict[str, Any]:
    depth = 0
    for count, event in enumerate(yaml.parse(text, _Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise UserError(_too_deep(path, event.start_mark.line + 1))
        if count > 2 * _MAX_VALUES:
            _refuse(path, event, f"has more than {_MAX_VALUES:,} values", "divide the file")
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return {}
        _Checker(path, as_text).size(root)
        try:
            content = loader.construct_document(root)
        except (ValueError, LookupError) as error:  # such as !!int x
            raise UserError(
                f"{path} has a value that does not fit its tag ({error}): correct it"
            ) from None
    finally:
        loader.dispose()
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a YAML file of keys: write lines of KEY: VALUE")
    return content


class _Checker:
    """Checks the nodes of a document before objects are constructed."""

    def __init__(self, path: Path, as_text: bool):
        self.path, self.as_text = path, as_text
        self.sizes: dict[int, int | None] = {}

    def size(self, node: yaml.Node) -> int:
        """Return the number of values in a node, counting those of an alias each time."""
        if id(node) in self.sizes:
            known = self.sizes[id(node)]
            if known is None:
                _refuse(self.path, node, "has a value that contains itself", "write it out")
            return known
        self.sizes[id(node)] = None
        self.check(node)
        count = 1 + sum(map(self.size, _inside(node)))
        if count > _MAX_VALUES:
            _refuse(self.path, node, f"has more than {_MAX_VALUES:,} values", "use fewer aliases")
        self.sizes[id(node)] = count
        return count

    def check(self, node: yaml.Node) -> None:
        if node.tag not in _PLAIN:
            tag = node.tag.replace(_TAG, "!!")
            _refuse(self.path, node, f"has the tag {tag}", "remove it and write a plain value")
        if isinstance(node, yaml.MappingNode):
            self.check_keys(node)
        elif isinstance(node, yaml.ScalarNode):
            if "\0" in node.value:
                _refuse(self.path, node, "has a zero byte in a value", "remove it")
            number = node.tag in (_TAG + "int", _TAG + "float")
            if number and len(node.value) > _MAX_DIGITS:
                _refuse(self.path, node, f"has a number of {len(node.value)} digits", "shorten it")
            if self.as_text and node.tag != _TAG + "merge":
                node.tag = _TAG + "str"

    def check_keys(self, node: yaml.MappingNode) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(
                    self.path, key, "has a key that is a list or a mapping", "name it by a word"
                )
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(
                    f"{self.path} gives {key.value} twice, in lines {lines[key.value]} and {line}: "
                    "remove one"
                )
            lines[key.value] = line
            if key.tag in _PLAIN - {_TAG + "merge"}:
                key.tag = _TAG + "str"  # the keys on and 1 are strings


def _inside(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _too_deep(path: Path, line: int) -> str:
    return f"{path} nests values deeper than {_MAX_DEPTH} levels in line {line}: write it flatter"


def _refuse(path: Path, at: yaml.Node | yaml.Event, what: str, remedy: str) -> NoReturn:
    raise UserError(f"{path} {what} in line {at.start_mark.line + 1}: {remedy}")
