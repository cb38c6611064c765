"""YAML as a tree that knows where each value was written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import numpy as np
from attrs import frozen
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from vtsim.base.errors import Problem
from vtsim.base.units import shown

DEEPEST = 40
MOST_NODES = 100_000  # after every alias is expanded
LONGEST_NUMBER = 40
LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
TAG = "tag:yaml.org,2002:"
CONSTANTS = {"true": True, "false": False}


@frozen
class Source:
    """A text that was read: a file, or one --set."""

    label: str
    lines: tuple[str, ...] = ()  # empty for a --set, which is quoted whole by its label

    @classmethod
    def of(cls, label: str, text: str) -> Source:
        """Split a text into lines where YAML does."""
        return cls(label, tuple(LINE_BREAK.split(text)[: None if text and text[-1] not in "\r\n" else -1]))

    def problem(self, at: tuple[int, int], message: str, *, path: str = "", help: str = "") -> Problem:
        """Return a problem at a place in this text, lines and columns counted from 0."""
        line, column = at
        if self.lines and line >= len(self.lines):
            line, column = len(self.lines) - 1, len(self.lines[-1])
        if not self.lines:
            return Problem(message=message, path=path, help=help, file=self.label)
        return Problem(
            message=message,
            path=path,
            help=help,
            file=self.label,
            line=line + 1,
            column=column,
            source=self.lines[line],
        )


@frozen(kw_only=True, eq=False)
class Node:
    """A value with the place it was written at."""

    value: Any  # None, bool, int, float, str, dict[str, Node] or list[Node]
    source: Source
    at: tuple[int, int]
    keys: dict[str, tuple[int, int]] = attrs.field(factory=dict)  # where each key of a mapping was written

    def child(self, step: str) -> Node | None:
        """Return the value under a key or a list index."""
        if isinstance(self.value, dict):
            found: Node | None = self.value.get(step)
            return found
        if isinstance(self.value, list) and step.isdecimal() and len(step) < 6 and int(step) < len(self.value):
            item: Node = self.value[int(step)]
            return item
        return None

    def find(self, path: str) -> Node:
        """Return the value at a dotted path, or the innermost one on the way; keys may have dots in them."""
        return self.locate(path)[0]

    def locate(self, path: str) -> tuple[Node, tuple[int, int]]:
        """Return that and where to show it: where it was written, or the key of what lacks the rest of the path."""
        node, steps, key = self, path.split("."), self.at
        while steps:
            for length in range(len(steps), 0, -1):
                step = ".".join(steps[:length])
                inner = node.child(step)
                if inner is not None:
                    key = node.keys.get(step, inner.at) if inner.source is node.source else inner.at
                    node, steps = inner, steps[length:]
                    break
            else:
                return node, key
        return node, node.at

    def plain(self) -> Any:
        """Return the value without places."""
        if isinstance(self.value, dict):
            return {key: inner.plain() for key, inner in self.value.items()}
        if isinstance(self.value, list):
            return [inner.plain() for inner in self.value]
        return self.value


def compose(text: str, source: Source, problems: list[Problem]) -> Node | None:
    """Read one YAML document; what is wrong with it is added to `problems`."""
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = (mark.line, mark.column) if mark else (0, 0)
        what = error.problem or error.context or "no reason given"
        problems.append(source.problem(at, f"this is not YAML: {what}", help=_YAML_HELP))
        return None
    except ReaderError as error:
        at = (text.count("\n", 0, error.position), 0)
        problems.append(source.problem(at, "a character that no text file has", help="remove it"))
        return None
    except RecursionError:
        problems.append(source.problem((0, 0), f"nested more than {DEEPEST} levels deep"))
        return None
    except Exception:  # the parser trips over some malformed input; to the user that is malformed input
        problems.append(source.problem((0, 0), "this is not YAML", help=_YAML_HELP))
        return None
    if root is None:
        return None
    tree = _Tree(source, problems)
    node = tree.convert(root, 0)
    if tree.endless:
        return None
    if tree.sizes[id(root)] > MOST_NODES:
        problems.append(source.problem((0, 0), f"more than {MOST_NODES} values once aliases are expanded"))
        return None
    return node


_YAML_HELP = "look at the indentation, quotes and brackets here and just before"


def of_data(value: Any, source: Source, problems: list[Problem], path: str = "", above: tuple[int, ...] = ()) -> Node:
    """Plain data as such a tree; what no YAML could say is added to `problems`, by its path."""

    def refuse(message: str, help: str = "") -> None:
        problems.append(source.problem((0, 0), message, path=path, help=help))

    def inner(step: object, each: Any) -> Node:
        return of_data(each, source, problems, f"{path}.{step}".lstrip("."), (*above, id(value)))

    if isinstance(value, np.generic):  # one element of an array, which is how programs count
        value = value.item()
    found: Any = None
    if len(above) > DEEPEST or id(value) in above:
        refuse(f"nested more than {DEEPEST} levels deep, or within itself")
    elif isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                refuse(f"key {shown(key)} is not text", "put it in quotes")
        found = {key: inner(key, value[key]) for key in value if isinstance(key, str)}
    elif isinstance(value, list | tuple):
        found = [inner(number, item) for number, item in enumerate(value)]
    elif value is None or isinstance(value, bool | int | float | str):
        found = value
    else:
        refuse(f"{shown(value)} is not possible here", "it can be text, a number, true, false, a list or a mapping")
    return Node(value=found, source=source, at=(0, 0))


class _Tree:
    """Converts the parser's nodes; a node that several aliases share is converted once."""

    def __init__(self, source: Source, problems: list[Problem]) -> None:
        self.source, self.problems = source, problems
        self.done: dict[int, Node] = {}
        self.sizes: dict[int, int] = {}
        self.endless = False  # cut short, so that what is missing is not the user's mistake

    def convert(self, raw: Any, depth: int) -> Node:
        if id(raw) in self.done:
            return self.done[id(raw)]
        at = (raw.start_mark.line, raw.start_mark.column)
        nothing = Node(value=None, source=self.source, at=at)
        if id(raw) in self.sizes or depth > DEEPEST:
            why = (
                "an alias inside what it stands for"
                if id(raw) in self.sizes
                else f"nested more than {DEEPEST} levels deep"
            )
            self.endless = True
            self.problems.append(self.source.problem(at, why))
            return nothing
        self.sizes[id(raw)] = 1
        keys: dict[str, tuple[int, int]] = {}
        value: Any = None
        if isinstance(raw, MappingNode):
            value = dict(self._entries(raw, keys, depth))
        elif isinstance(raw, SequenceNode):
            value = [self._inner(raw, item, depth) for item in raw.value]
        elif isinstance(raw, ScalarNode):
            value = self._scalar(raw, at)
        self.done[id(raw)] = Node(value=value, source=self.source, at=at, keys=keys)
        return self.done[id(raw)]

    def _inner(self, outer: Any, raw: Any, depth: int) -> Node:
        node = self.convert(raw, depth + 1)
        self.sizes[id(outer)] += self.sizes.get(id(raw), 1)
        return node

    def _entries(self, raw: Any, keys: dict[str, tuple[int, int]], depth: int) -> Iterator[tuple[str, Node]]:
        for key, value in raw.value:
            at = (key.start_mark.line, key.start_mark.column)
            if not isinstance(key, ScalarNode) or key.tag not in (
                f"{TAG}str",
                f"{TAG}merge",
                f"{TAG}timestamp",
            ):
                what = f"key {key.value[:60]!r}" if isinstance(key, ScalarNode) else "this key"
                self.problems.append(self.source.problem(at, f"{what} is not text", help="put it in quotes"))
            elif key.value in keys:
                first = keys[key.value][0] + 1
                self.problems.append(
                    self.source.problem(
                        at, f"key {key.value[:60]!r} is given twice", help=f"the first is in line {first}"
                    )
                )
            else:
                keys[key.value] = at
                yield key.value, self._inner(raw, value, depth)

    def _scalar(self, raw: Any, at: tuple[int, int]) -> Any:
        text = raw.value
        match raw.tag.removeprefix(TAG):
            case "null":
                return None
            case "bool":
                return CONSTANTS.get(text.lower(), text)
            case "int" | "float" as kind if len(text) <= LONGEST_NUMBER:
                return _number(text, kind)
            case "int" | "float" | "str" | "timestamp" | "merge":
                return text
        self.problems.append(self.source.problem(at, f"unknown YAML tag {raw.tag[:60]!r}", help="remove the tag"))
        return None


def _number(text: str, kind: str) -> int | float | str:
    plain = text.replace("_", "").lower()
    try:
        if kind == "int":
            return int(plain, 0) if plain.lstrip("+-").startswith(("0x", "0o", "0b")) else int(plain)
        value = float(plain.replace(".inf", "inf").replace(".nan", "nan"))
        return value if math.isfinite(value) else text
    except ValueError:
        return text
