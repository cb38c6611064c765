"""JSON that the user wrote: read so that a key given twice is seen, and the place of each part can be shown."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any, Final

from attrs import frozen

from vtsim.base.errors import Problem

Path = tuple[str | int, ...]
"""The way to a part of a JSON value: keys and indexes."""

_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
_SCALAR: Final = re.compile(r"[^\s,\]}]+")
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_LONGEST: Final = 60  # characters of a value in a message
_TOO_BIG: Final = 4000  # digits of an integer


class _Twice(Exception):
    """An object has a key twice."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Twice
    return made


def _integer(digits: str) -> int:
    return int(digits[:_TOO_BIG])  # what is longer fits nowhere either


def read_json(text: str, file: str, line: int | None, help: str) -> tuple[Any, Problem | None]:
    """The value of a JSON text, or what is wrong with it. `line` is that of a text which is one line of a file."""
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_int=_integer), None
    except json.JSONDecodeError as error:
        return None, problem_at(text, error.pos, file, line, "this is not JSON", help)
    except RecursionError:
        return None, problem_at(text, 0, file, line, "this is nested too deeply", help)
    except _Twice:
        twice = Places.of(text).twice
        path, at = twice[0] if twice else ((), 0)
        return None, problem_at(text, at, file, line, "this key is given twice", "give it once", path)


def problem_at(
    text: str, at: int, file: str, line: int | None, message: str, help: str, path: Path = ()
) -> Problem:  # fmt: skip
    """A problem at an offset of a text, with its line and a caret."""
    begins = text.rfind("\n", 0, at) + 1
    source = text[begins:].split("\n", 1)[0]
    return Problem(
        message=message, help=help, path=shown(path), file=file, line=line or text.count("\n", 0, at) + 1,
        column=at - begins, source=source,
    )  # fmt: skip


def shown(path: Path) -> str:
    """A path as one would write it: `vmcs.guest_rip`, `steps[0][1]`."""
    made = "".join(f"[{step}]" if isinstance(step, int) else f".{printable(step)}" for step in path)
    return made.removeprefix(".")


def printable(text: str) -> str:
    """A text of the user's as it can be shown in a message."""
    kept = "".join(c if c.isprintable() else "." for c in text[:_LONGEST])
    return kept + ("…" if len(text) > _LONGEST else "")


def quoted(value: object) -> str:
    """A JSON value as a message shows it."""
    if isinstance(value, str):
        return f"'{printable(value)}'"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return "null" if value is None else printable(json.dumps(value))


@frozen
class Places:
    """Where the parts of a JSON text stand: offsets of values and of keys, by path; and keys that are given twice."""

    values: dict[Path, int]
    keys: dict[Path, int]
    twice: list[tuple[Path, int]]

    @classmethod
    def of(cls, text: str) -> Places:
        """Find all places of a text that is JSON; of one that is nested too deeply, as many as can be found."""
        found = cls({}, {}, [])
        with contextlib.suppress(RecursionError):
            found._value(text, _after_space(text, 0), ())
        return found

    def of_value(self, path: Path) -> int:
        """The offset of a value; of what it is in, where there is none."""
        while path not in self.values and path:
            path = path[:-1]
        return self.values.get(path, 0)

    def of_key(self, path: Path) -> int:
        """The offset of a key."""
        return self.keys.get(path, self.of_value(path))

    def _value(self, text: str, at: int, path: Path) -> int:
        """Note what begins at an offset; where it ends."""
        self.values.setdefault(path, at)
        if text[at] == '"':
            return _end(_STRING, text, at)
        if text[at] not in "{[":
            return _end(_SCALAR, text, at)
        closing, index = "}" if text[at] == "{" else "]", 0
        at = _after_space(text, at + 1)
        while text[at] != closing:
            step: str | int = index
            if closing == "}":
                end = _end(_STRING, text, at)
                step = json.loads(text[at:end])
                if (*path, step) in self.keys:
                    self.twice.append(((*path, step), at))
                self.keys.setdefault((*path, step), at)
                at = _after_space(text, _after_space(text, end) + 1)
            at = _after_space(text, self._value(text, at, (*path, step)))
            if text[at] == ",":
                at = _after_space(text, at + 1)
            index += 1
        return at + 1


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else len(text)


def _after_space(text: str, at: int) -> int:
    return _end(_SPACE, text, at)
