"""Comparisons that a point of a study must pass: `vmm.paging != shadow or vmm.ept.page_size <= 2 MiB`."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import Any, Final

from attrs import frozen

from vtsim.base.errors import ConfigError, alternatives
from vtsim.base.units import quantity

OPERATORS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
SPLIT: Final = re.compile("(<=|>=|==|!=|<|>)")
WORDS: Final = {"true": True, "false": False}
HELP: Final = "a constraint compares axes and values, as in 'vmm.paging != shadow or vmm.ept.page_size <= 2 MiB'"


@frozen
class Operand:
    """An axis, or a value."""

    path: str = ""
    value: Any = None

    def of(self, values: Mapping[str, Any]) -> Any:
        """Return what it is at a point."""
        return values[self.path] if self.path else self.value


@frozen
class Comparison:
    """Operands, and the operators between neighbours: `a < b < c` is both."""

    operands: tuple[Operand, ...]
    operators: tuple[str, ...]

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Do all of its neighbours compare as they should?"""
        found = [operand.of(values) for operand in self.operands]
        return all(OPERATORS[name](*pair) for name, pair in zip(self.operators, pairwise(found), strict=True))


@frozen
class Constraint:
    """Comparisons joined by `or` and, more closely, by `and`."""

    text: str
    any_of: tuple[tuple[Comparison, ...], ...]

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Does a point pass? Raises `ConfigError` where text and a number have no order."""
        try:
            return any(all(each.holds(values) for each in group) for group in self.any_of)
        except TypeError:
            raise ConfigError(
                f"{self.text!r} orders things that have no order", help="order numbers; compare text by == and !="
            ) from None

    @classmethod
    def parse(cls, text: str, paths: Collection[str]) -> Constraint:
        """Read one; `paths` are those of the axes."""
        groups = [
            tuple(_comparison(part, paths) for part in re.split(r"\s+and\s+", group))
            for group in re.split(r"\s+or\s+", text.strip())
        ]
        return cls(text, tuple(groups))


def _comparison(text: str, paths: Collection[str]) -> Comparison:
    if re.match(r"\s*(not\b|\()", text):
        raise ConfigError(
            f"{text.strip()!r}: there is no 'not' and there are no brackets",
            help=f"{HELP}; the opposite of == is !=, of < is >=",
        )
    parts = [part.strip() for part in SPLIT.split(text)]
    if len(parts) < 3 or not all(parts) or any("=" in part for part in parts[::2]):
        raise ConfigError(f"{text.strip()!r} is no comparison", help=HELP)
    return Comparison(tuple(_operand(part, paths) for part in parts[::2]), tuple(parts[1::2]))


def _operand(text: str, paths: Collection[str]) -> Operand:
    if text in paths:
        return Operand(path=text)
    if text[0] in "'\"" and text[-1] == text[0] and len(text) > 1:
        return Operand(value=text[1:-1])
    if text in WORDS:
        return Operand(value=WORDS[text])
    with contextlib.suppress(ValueError):
        return Operand(value=float(text) if "." in text or "e" in text.lower() else int(text, 0))
    number = quantity(text)
    if number is None and "." in text:
        raise ConfigError(f"{text!r} is no axis of this study", help=alternatives("axis", text, paths))
    if number is None and not re.fullmatch(r"[\w-]+", text):
        raise ConfigError(f"{text!r} is neither an axis nor a value", help=HELP)
    return Operand(value=text if number is None else number)
