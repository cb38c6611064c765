"""One value of a scenario replaced from the command line: `--set path=value`."""

from __future__ import annotations

import attrs

from vtsim.base.errors import ConfigError, Problem
from vtsim.base.units import shown
from vtsim.config.nodes import Node, Source, compose


def override(root: Node, assignment: str) -> Node:
    """Return the tree with `path=value` done; the tree given is not changed."""
    source = Source(f"--set {assignment if len(assignment) < 200 else assignment[:197] + '...'}")
    path, equals, text = assignment.partition("=")
    steps = [step.strip() for step in path.split(".")]
    if not equals or not all(steps) or len(steps) > 20:
        raise _error(source, "this is not path=value", "write it like --set machine.profile=skx-4114")
    problems: list[Problem] = []
    value = compose(text, source, problems)
    if problems:
        raise ConfigError.of(problems)
    return _put(root, steps, value or Node(value=None, source=source, at=(0, 0)), "", source)


def _error(source: Source, message: str, help: str, path: str = "") -> ConfigError:
    return ConfigError.of([source.problem((0, 0), message, path=path, help=help)])


def _put(node: Node, steps: list[str], value: Node, path: str, source: Source) -> Node:
    if not steps:
        return value
    if isinstance(node.value, list):
        return _put_item(node, steps, value, path, source)
    if node.value is not None and not isinstance(node.value, dict):
        message = f"{shown(node.value)} is a value and has no key {shown(steps[0])}"
        raise _error(source, message, f"write --set {path}=value", path)
    entries: dict[str, Node] = node.value or {}
    key, rest = _known_key(entries, steps)
    empty = Node(value=None, source=source, at=(0, 0))
    inner = _put(entries.get(key, empty), rest, value, f"{path}.{key}".lstrip("."), source)
    return attrs.evolve(node, value={**entries, key: inner})


def _known_key(entries: dict[str, Node], steps: list[str]) -> tuple[str, list[str]]:
    """Find a key that was written with dots in it before taking the path step by step."""
    for length in range(len(steps), 0, -1):
        key = ".".join(steps[:length])
        if key in entries:
            return key, steps[length:]
    return steps[0], steps[1:]


def _put_item(node: Node, steps: list[str], value: Node, path: str, source: Source) -> Node:
    items: list[Node] = list(node.value)
    inner = node.child(steps[0])
    if inner is None:
        legal = f"items here are 0 to {len(items) - 1}" if items else "the list is empty"
        raise _error(source, f"there is no item {shown(steps[0])}", legal, path)
    index = int(steps[0])
    items[index] = _put(inner, steps[1:], value, f"{path}.{index}", source)
    return attrs.evolve(node, value=items)
