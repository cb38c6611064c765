"""One value of a scenario replaced from the command line: `--set path=value`."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from vtsim.base.errors import ConfigError, Problem
from vtsim.base.units import shown
from vtsim.config.nodes import Node, Source, compose


def label(assignment: str) -> str:
    """What errors call an assignment."""
    return f"--set {assignment if len(assignment) < 200 else assignment[:197] + '...'}"


def said_of(error: ConfigError, options: Mapping[str, str]) -> ConfigError:
    """The same mistake, said of the option that an assignment was written after where that is not `--set`."""
    known = {label(assignment): option for assignment, option in options.items()}
    return ConfigError.of(
        attrs.evolve(
            problem,
            file=problem.file.replace("--set", known[problem.file], 1),
            help=problem.help.replace("--set", known[problem.file]),
        )
        if problem.file in known
        else problem
        for problem in error.problems
    )


def override(root: Node, assignment: str) -> Node:
    """Return the tree with `path=value` done; the tree given is not changed."""
    source = Source(label(assignment))
    path, equals, text = assignment.partition("=")
    nothing = Node(value=None, source=source, at=(0, 0))
    if not equals or _steps(path) is None:
        raise _error(nothing, "this is not path=value", "write it like --set machine.profile=skx-4114")
    problems: list[Problem] = []
    value = compose(text, source, problems)
    if problems:
        raise ConfigError.of(problems)
    return put(root, path, value or nothing)


def put(root: Node, path: str, value: Node) -> Node:
    """Return the tree with a value at a dotted path; what cannot be is a problem at the place of the value."""
    steps = _steps(path)
    if steps is None:
        raise _error(value, f"{shown(path)} is not a path", "write it like machine.profile")
    return _put(root, steps, value, "")


def _steps(path: str) -> list[str] | None:
    steps = [step.strip() for step in path.split(".")]
    return steps if all(steps) and len(steps) <= 20 else None


def _error(value: Node, message: str, help: str, path: str = "") -> ConfigError:
    return ConfigError.of([value.source.problem(value.at, message, path=path, help=help)])


def _put(node: Node, steps: list[str], value: Node, path: str) -> Node:
    if not steps:
        return value
    if isinstance(node.value, list):
        return _put_item(node, steps, value, path)
    if node.value is not None and not isinstance(node.value, dict):
        message = f"{shown(node.value)} is a value and has no key {shown(steps[0])}"
        raise _error(value, message, f"the path is {path}" if value.source.lines else f"write --set {path}=value", path)
    if node.value is None and steps[0].isdecimal():
        raise _error(value, f"there is no item {shown(steps[0])}", f"nothing is written at {path or 'the top'}", path)
    entries: dict[str, Node] = node.value or {}
    key, rest = _known_key(entries, steps)
    empty = attrs.evolve(value, value=None)
    inner = _put(entries.get(key, empty), rest, value, f"{path}.{key}".lstrip("."))
    return attrs.evolve(node, value={**entries, key: inner})


def _known_key(entries: dict[str, Node], steps: list[str]) -> tuple[str, list[str]]:
    """Find a key that was written with dots in it before taking the path step by step."""
    for length in range(len(steps), 0, -1):
        key = ".".join(steps[:length])
        if key in entries:
            return key, steps[length:]
    return steps[0], steps[1:]


def _put_item(node: Node, steps: list[str], value: Node, path: str) -> Node:
    items: list[Node] = list(node.value)
    inner = node.child(steps[0])
    if inner is None:
        legal = f"items here are 0 to {len(items) - 1}" if items else "the list is empty"
        raise _error(value, f"there is no item {shown(steps[0])}", legal, path)
    index = int(steps[0])
    items[index] = _put(inner, steps[1:], value, f"{path}.{index}")
    return attrs.evolve(node, value=items)
