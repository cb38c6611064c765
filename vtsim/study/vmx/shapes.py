"""Shapes of the JSON values that a user writes: each adds to a list what is wrong with a value, and where."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final

from attrs import frozen

from vtsim.base.errors import Problem
from vtsim.study.vmx.places import Path, Places, problem_at, quoted

A_NUMBER: Final = 'a hexadecimal string is accepted, as in "0x10", or an integer'
NEARLY: Final = 0.8  # how alike a misspelt word is to the one that was meant
_NUMBER: Final = re.compile(r"(?:0[xX])?[0-9a-fA-F]{1,4000}")
_BYTES: Final = re.compile(r"(?:[0-9a-fA-F]{2})*")


@frozen
class Flaw:
    """One thing that is wrong with a JSON value: where, what, and what would be accepted."""

    path: Path
    message: str
    help: str
    at_key: bool = False

    def problem(self, text: str, file: str, line: int | None, places: Places) -> Problem:
        """The flaw as a problem of the text that the value was read from."""
        at = places.of_key(self.path) if self.at_key else places.of_value(self.path)
        return problem_at(text, at, file, line, self.message, self.help, self.path)


Flaws = list[Flaw]
Shape = Callable[[Any, Path, Flaws], None]
"""Adds to the flaws what is wrong with a value that stands under a path."""


def problems(flaws: Iterable[Flaw], text: str, file: str, line: int | None) -> list[Problem]:
    """Flaws of a value as problems of the text that it was read from."""
    places = Places.of(text)
    return [flaw.problem(text, file, line, places) for flaw in flaws]


def close_to(word: str, legal: Collection[str]) -> str:
    """The word that was meant, if this one is nearly a legal one; else nothing."""
    close = difflib.get_close_matches(word[:100], legal, n=1, cutoff=NEARLY)
    return close[0] if close else ""


def is_number(value: object) -> bool:
    """Is this a number of the recordings: an integer, or a hexadecimal string?"""
    if isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: int | str) -> int:
    """A number of the recordings: an integer, or a hexadecimal string."""
    return int(value, 16) if isinstance(value, str) else value


def numbers(values: Mapping[str, int | str]) -> dict[str, int]:
    """Named numbers of the recordings."""
    return {name: number(value) for name, value in values.items()}


def number_of(bits: int, what: str = "a number") -> Shape:
    """A number that is not negative and fits in some bits."""

    def check(value: Any, path: Path, flaws: Flaws) -> None:
        if not is_number(value):
            flaws.append(Flaw(path, f"{quoted(value)} is no number", A_NUMBER))
        elif not 0 <= number(value) < 1 << bits:
            help = f"a number from 0 to {(1 << bits) - 1:#x} is accepted"
            flaws.append(Flaw(path, f"{quoted(value)} does not fit in the {bits} bits of {what}", help))

    return check


def numbers_by_name(noun: str, names: Collection[str], each: Shape) -> Shape:
    """An object of numbers, of which the names are known."""

    def check(value: Any, path: Path, flaws: Flaws) -> None:
        if not check_object(value, path, flaws, f'{{"{next(iter(names))}": "0x10"}}'):
            return
        for name, one in value.items():
            if name in names:
                each(one, (*path, name), flaws)
            else:
                meant = close_to(name.lower(), names)
                help = f"did you mean {meant!r}?" if meant else f"{noun}s here are {', '.join(names)}"
                flaws.append(Flaw((*path, name), f"unknown {noun} {quoted(name)}", help, at_key=True))

    return check


def check_text(value: Any, path: Path, flaws: Flaws) -> None:
    """A string."""
    if not isinstance(value, str):
        flaws.append(Flaw(path, f"{quoted(value)} is no string", 'a string is accepted, as in "text"'))


def check_boolean(value: Any, path: Path, flaws: Flaws) -> None:
    """True or false."""
    if not isinstance(value, bool):
        flaws.append(Flaw(path, f"{quoted(value)} is neither true nor false", "true or false is accepted"))


def check_bytes(value: Any, path: Path, flaws: Flaws) -> None:
    """Bytes as hexadecimal digits."""
    if not isinstance(value, str) or not _BYTES.fullmatch(value):
        help = 'two hexadecimal digits a byte are accepted, as in "0fa2"'
        flaws.append(Flaw(path, f"{quoted(value)} is no row of bytes", help))


def check_anything(value: Any, path: Path, flaws: Flaws) -> None:
    """What says nothing about a processor, or is looked at elsewhere."""


def check_object(value: Any, path: Path, flaws: Flaws, example: str) -> bool:
    """Is this an object? If not, that is a flaw."""
    if not isinstance(value, dict):
        flaws.append(Flaw(path, f"{quoted(value)} is no object", f"an object is accepted, as in {example}"))
    return isinstance(value, dict)


def check_keys(
    value: Mapping[str, Any], path: Path, flaws: Flaws, table: Mapping[str, Shape], needed: Iterable[str], help: str
) -> None:  # fmt: skip
    """The keys of an object: each has its shape, some are needed, and one that is nearly another is a mistake."""
    for key in needed:
        if key not in value:
            flaws.append(Flaw(path, f"{key!r} is missing", help))
    for key, one in value.items():
        if key in table:
            table[key](one, (*path, key), flaws)
        elif (meant := close_to(key, table)) and table[meant] is not check_anything and meant not in value:
            flaws.append(Flaw((*path, key), f"unknown key {quoted(key)}", f"did you mean {meant!r}?", at_key=True))


def list_of(each: Shape, example: str) -> Shape:
    """A list of values of one shape."""

    def check(value: Any, path: Path, flaws: Flaws) -> None:
        if not isinstance(value, list):
            flaws.append(Flaw(path, f"{quoted(value)} is no list", f"a list is accepted, as in {example}"))
            return
        for index, one in enumerate(value):
            each(one, (*path, index), flaws)

    return check


def pair_of(first: Shape, second: Shape, example: str) -> Shape:
    """A list of two values."""

    def check(value: Any, path: Path, flaws: Flaws) -> None:
        if not isinstance(value, list) or len(value) != 2:
            flaws.append(Flaw(path, f"{quoted(value)} is no pair", f"a list of two is accepted, as in {example}"))
            return
        first(value[0], (*path, 0), flaws)
        second(value[1], (*path, 1), flaws)

    return check
