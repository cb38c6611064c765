"""From a tree of YAML to specs: driven by the kinds of their fields, every error at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from vtsim.base.errors import ConfigError, Problem, alternatives
from vtsim.base.spec import FilePath, Free, Group, Kind, Many, Tagged, kind_of, settings
from vtsim.base.units import shown
from vtsim.config.kinds import Anything, ByPath
from vtsim.config.nodes import Node

FORMER = {"paging_levels": ("paging", {4: "4-level", 5: "5-level"})}  # key that was: (key, value by value that was)
FAILED = object()  # stands for a value whose problem has been reported


class Structuring:
    """One pass over one tree, collecting problems."""

    def __init__(self, folder: Path, problems: list[Problem]) -> None:
        self.folder, self.problems = folder, problems

    def build(self, kind: Kind, node: Node, path: str) -> Any:
        """Return the value that `node` stands for, or `FAILED`."""
        match kind:
            case Group():
                return self._group(kind.spec, node, path)
            case Tagged():
                return self._tagged(kind, node, path)
            case Many():
                return self._many(kind, node, path)
            case FilePath():
                return self._file(kind, node, path)
            case ByPath():
                return self._by_path(kind, node, path)
            case Free() | Anything():
                return self._scalar(kind, node, path)
        if isinstance(node.value, dict | list):
            return self._refuse(node, path, f"{shown(node.value)} is not possible here", f"write {kind.accepted()}")
        return self._scalar(kind, node, path)

    def _refuse(self, node: Node, path: str, message: str, help: str = "") -> Any:
        self.problems.append(node.source.problem(node.at, message, path=path, help=help))
        return FAILED

    def _scalar(self, kind: Kind, node: Node, path: str) -> Any:
        try:
            return kind.convert(node.plain())
        except ConfigError as error:
            return self._report(error, node, path)

    def _report(self, error: ConfigError, node: Node, path: str) -> Any:
        self.problems += [place(problem, node, path) for problem in error.problems]
        return FAILED

    def _file(self, kind: Kind, node: Node, path: str) -> Any:
        name = self._scalar(kind, node, path)
        if name is FAILED:
            return FAILED
        file = (self.folder / name).absolute()
        if not _is_file(file):
            return self._refuse(
                node, path, f"there is no file {shown(name)}", "the name is relative to the scenario's folder"
            )
        return str(file)

    def _many(self, kind: Many, node: Node, path: str) -> Any:
        if not isinstance(node.value, list):
            return self._refuse(node, path, f"{shown(node.plain())} is not a list", "begin each item with '- '")
        items = [self.build(kind.item, item, f"{path}.{index}") for index, item in enumerate(node.value)]
        if len(items) < kind.least:
            return self._refuse(node, path, f"the list has {len(items)} items", f"give at least {kind.least}")
        return FAILED if any(item is FAILED for item in items) else tuple(items)

    def _by_path(self, kind: ByPath, node: Node, path: str) -> Any:
        if not isinstance(node.value, dict) or len(node.value) < kind.least:
            return self._scalar(kind, node, path)
        values = {key: self.build(kind.item, inner, f"{path}.{key}") for key, inner in node.value.items()}
        return FAILED if any(value is FAILED for value in values.values()) else values

    def _tagged(self, kind: Tagged, node: Node, path: str) -> Any:
        legal = ", ".join(kind.registry)
        if not isinstance(node.value, dict):
            return self._refuse(
                node,
                path,
                f"{shown(node.plain())} is not a mapping",
                f"write {kind.tag}: and its keys; {kind.tag} can be {legal}",
            )
        tag = node.value.get(kind.tag)
        if tag is None:
            help = next(filter(None, (_spaced(key, [kind.tag]) for key in node.value)), f"{kind.tag} can be {legal}")
            return self._refuse(node, path, f"missing key {kind.tag!r}", help)
        if not isinstance(tag.value, str) or tag.value not in kind.registry:
            help = alternatives(kind.tag, tag.plain(), kind.registry)
            message = f"unknown {kind.registry.noun} {shown(tag.plain())}"
            return self._refuse(tag, f"{path}.{kind.tag}", message, help)
        return self._group(kind.registry[tag.value], node, path, tag=kind.tag)

    def _group(self, spec: type[Any], node: Node, path: str, tag: str | None = None) -> Any:
        fields = settings(spec)
        written = {} if node.value is None else node.value
        if not isinstance(written, dict):
            keys = ", ".join(fields)
            return self._refuse(node, path, f"{shown(node.plain())} is not a mapping", f"keys here are {keys}")
        values: dict[str, Any] = {}
        for key, inner in written.items():
            if key in fields:
                values[key] = self.build(kind_of(fields[key]), inner, f"{path}.{key}".lstrip("."))
            elif key != tag:
                values[key] = self._unknown_key(node, key, inner, path, [tag, *fields] if tag else list(fields))
        missing = [name for name, field in fields.items() if field.default is attrs.NOTHING and name not in values]
        for name in missing:
            help = f"{name}: {kind_of(fields[name]).accepted()}"
            self._refuse(node, path, f"missing key {name!r}", help)
        if missing or any(value is FAILED for value in values.values()):
            return FAILED
        try:
            return spec(**values)
        except ConfigError as error:
            return self._report(error, node, path)

    def _unknown_key(self, node: Node, key: str, inner: Node, path: str, legal: list[str]) -> Any:
        """Report a key at the key; a --set has no line to show, so it names every legal key."""
        help = _spaced(key, legal) or _former(key, inner.plain(), legal)
        help = help or alternatives("key", key, legal).replace("key can be", "keys here are")
        at = inner.source.problem(node.keys.get(key, inner.at), f"unknown key {shown(key)}", path=path, help=help)
        if at.line is None and help.startswith("did you mean"):
            at = attrs.evolve(at, help=f"{help} keys here are {', '.join(legal)}")
        self.problems.append(at)
        return FAILED


def place(problem: Problem, node: Node, path: str) -> Problem:
    """Find the line of a problem whose path starts at `node`, which is at `path`."""
    if problem.file:
        return problem
    found, at = node.locate(problem.path)
    if found is node and not path and problem.path:  # a default is what is wrong: there is no line to show
        return attrs.evolve(problem, file=node.source.label)
    full = ".".join(part for part in (path, problem.path) if part)
    return found.source.problem(at, problem.message, path=full, help=problem.help)


def _spaced(key: str, legal: Sequence[str]) -> str:
    """Say how a legal key is written where YAML took `key:value` for one word."""
    name, colon, value = key.partition(":")
    return f"write '{name}: {value}', with a space after the colon" if colon and name in legal else ""


def _former(key: str, value: Any, legal: Sequence[str]) -> str:
    """Say how what a former key said is written now."""
    now, values = FORMER.get(key, ("", {}))
    if now not in legal:
        return ""
    written = [values[value]] if isinstance(value, int) and value in values else values.values()
    return f"this is {now} now: write " + " or ".join(f"'{now}: {each}'" for each in written)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be read
        return False
