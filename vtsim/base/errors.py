"""Whose mistake was it? The user's is a `ConfigError`, ours is a `ModelError`; a guest's is a value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import attrs


@attrs.frozen(kw_only=True)
class Problem:
    """One thing that is wrong with what the user wrote, and where."""

    message: str
    path: str = ""  # dotted, as the user would write it after --set
    help: str = ""
    file: str = ""
    line: int | None = None  # counted from 1
    column: int | None = None  # counted from 0
    source: str | None = None  # the text of that line

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        lines = [": ".join(part for part in (where, self.path, self.message) if part)]
        if self.line is not None and self.source is not None:
            source, column = _window(self.source, self.column or 0)
            lines += [f"{self.line:>5} | {source}", f"      | {' ' * column}^"]
        if self.help:
            lines.append(f" help: {self.help}")
        return "\n".join(lines)


def _window(source: str, column: int, width: int = 100) -> tuple[str, int]:
    """Cut a long line to what surrounds the caret; show what cannot be printed as a dot."""
    start = max(0, column - width // 2) if len(source) > width else 0
    shown = "".join(c if c.isprintable() else "." for c in source[start : start + width])
    return shown, min(column - start, len(shown))


class ConfigError(Exception):
    """The user's mistake: what, where, why it cannot be, and what would be accepted."""

    def __init__(self, message: str, *, field: str = "", help: str = "", file: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(message=message, path=field, help=help, file=file),)
        super().__init__(message)

    def __str__(self) -> str:
        return "\n\n".join(str(problem) for problem in self.problems)

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> ConfigError:
        """Report several problems at once, in the given order."""
        found = tuple(problems)
        error = cls(found[0].message)
        error.problems = found
        return error

    @classmethod
    def unknown(cls, noun: str, key: object, legal: Iterable[object], *, field: str = "") -> ConfigError:
        """Refuse a name that is not in an open set, and say which name was probably meant."""
        return cls(f"unknown {noun} {key!r}", field=field, help=alternatives(noun, key, legal))


AS_CLOSE = 0.05  # two names are, if they are like what was written to within this share of their characters


def _likeness(written: str, name: str) -> float:
    return difflib.SequenceMatcher(None, name, written).ratio()


def alternatives(noun: str, key: object, legal: Iterable[object]) -> str:
    """Say what `key` was probably meant to be, each that is as close as any, or else everything it could be."""
    names = [str(name) for name in legal]
    written = str(key)[:100]
    likeness = {name: _likeness(written, name) for name in difflib.get_close_matches(written, names)}
    if likeness:
        closest = max(likeness.values()) - AS_CLOSE
        return f"did you mean {' or '.join(repr(name) for name, one in likeness.items() if one >= closest)}?"
    head = str(key).partition(".")[0]
    names = [name for name in names if name.startswith(f"{head}.")] or names  # of many, the family that was meant
    return f"{noun} can be {', '.join(names)}" if names else f"no {noun} is accepted here"


class ModelError(Exception):
    """Our mistake: a law of the model is broken, with the counters that show it."""

    def __init__(self, message: str, counters: Mapping[str, int] | None = None) -> None:
        self.message = message
        self.counters = dict(counters or {})
        super().__init__(message)

    def __str__(self) -> str:
        counts = ", ".join(f"{name}={value}" for name, value in self.counters.items())
        return f"{self.message}: {counts}" if counts else self.message
