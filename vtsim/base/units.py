"""Quantities with units: text on the outside, integers of one unit on the inside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

import attrs

from vtsim.base.errors import ConfigError, alternatives

LARGEST = 2**62  # every quantity fits the engine's int64 with room for a sum
_TEXT = re.compile(r"([+-]?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?)\s*([A-Za-zµ%]*)", re.ASCII | re.DOTALL)


@attrs.frozen
class Dimension:
    """What a number measures, and the units that users may write it in; the first unit is the base."""

    name: str
    units: Mapping[str, Decimal]
    example: str
    written: tuple[str, ...]  # the units used when a value is printed, largest first
    whole: bool = True  # is the value an integer of the base unit?
    fractions: bool = True  # may it be written as a fraction of a larger unit?

    @property
    def base(self) -> str:
        """The unit of the integer inside."""
        return next(iter(self.units))

    @property
    def accepted(self) -> str:
        """Say in words what users may write."""
        units = ", ".join(unit for unit in self.units if unit)
        return f"a {self.name} is written like {self.example!r}" + (f" ({units})" if units else "")

    def parse(self, value: object) -> int | float:
        """Return the value in the base unit; a plain number already is."""
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{shown(value)} is too large", help=self.accepted)
        number, unit = self._split(value)
        if unit not in self.units:
            raise ConfigError(
                f"{shown(value)} is not a {self.name}: unknown unit {unit!r}",
                help=f"{_meant(unit, self.units)}{self.accepted}",
            )
        result = number * self.units[unit]
        if abs(result) > LARGEST:
            raise ConfigError(f"{shown(value)} is too large", help=self.accepted)
        if not self.whole:
            return float(result)
        if result != int(result):
            raise ConfigError(f"{shown(value)} is not a whole number of {self.base or 'units'}", help=self.accepted)
        return int(result)

    def _split(self, value: object) -> tuple[Decimal, str]:
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = Decimal(value) if isinstance(value, int) else Decimal(repr(value))
            if number.is_finite():
                return number, self.base
        elif isinstance(value, str) and (match := _TEXT.fullmatch(value.strip())) and len(value) < 100:
            return Decimal(match[1].replace("_", "")), match[2] or self.base
        raise ConfigError(f"{shown(value)} is not a {self.name}", help=self.accepted)

    def format(self, value: int | float) -> str:
        """Write the value in the largest unit that is exact; `parse` reads the same value back."""
        number = Decimal(value) if isinstance(value, int) else Decimal(repr(value))
        for unit in self.written:
            scaled = number / self.units[unit]
            digits = format(scaled.normalize(), "f")
            if "." in digits and not self.fractions and self.units[unit] > 1:
                continue
            if abs(scaled) >= 1 and len(digits) <= 6 and Decimal(digits) * self.units[unit] == number:
                return f"{digits} {unit}".strip()
        smallest = self.written[-1]
        scaled = (number / self.units[smallest]).normalize()
        digits = format(scaled, "f") if scaled.adjusted() > -20 else str(scaled)
        return f"{digits} {smallest}".strip()


class Hex(int):
    """An integer that is printed in hexadecimal."""

    def __repr__(self) -> str:
        return hex(self)

    __str__ = __repr__


def shown(value: object) -> str:
    """Quote what the user wrote, cut short; an integer may be too long to print at all."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "this number"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _meant(unit: str, units: Mapping[str, Decimal]) -> str:
    """Begin the help with the unit that differs in case only or is close."""
    for known in units:
        if known and unit.lower() == known.lower():
            return f"did you mean {known!r}? "
    help = alternatives("unit", unit, (u for u in units if u))
    return f"{help} " if help.startswith("did you mean") else ""


def _powers(base: int, *names: str) -> dict[str, Decimal]:
    return {name: Decimal(base) ** power for power, name in enumerate(names)}


SIZE = Dimension(
    "size",
    _powers(1024, "B", "KiB", "MiB", "GiB", "TiB") | {"kB": Decimal(10**3), "MB": Decimal(10**6), "GB": Decimal(10**9)},
    "2 MiB",
    ("TiB", "GiB", "MiB", "KiB", "B"),
)
DURATION = Dimension(
    "duration",
    _powers(1000, "ns", "us", "ms", "s") | {"µs": Decimal(1000)},
    "250 us",
    ("s", "ms", "us", "ns"),
)
FREQUENCY = Dimension("frequency", _powers(1000, "Hz", "kHz", "MHz", "GHz"), "2.2 GHz", ("GHz", "MHz", "kHz", "Hz"))
COUNT = Dimension("count", _powers(1000, "", "k", "M", "G", "T"), "10 M", ("T", "G", "M", "k", ""), fractions=False)
SHARE = Dimension("share", {"": Decimal(1), "%": Decimal(1) / 100}, "30 %", ("%",), whole=False)
NUMBER = Dimension("number", {"": Decimal(1)}, "0x608", ("",))
FACTOR = Dimension("number", {"": Decimal(1)}, "0.99", ("",), whole=False)
DIMENSIONS = (SIZE, DURATION, FREQUENCY, COUNT, SHARE)


def quantity(text: str) -> int | float | None:
    """Return the value of text that carries a unit of any dimension, or None when it carries none."""
    match = _TEXT.fullmatch(text.strip())
    for dimension in DIMENSIONS:
        if match and match[2] and match[2] in dimension.units:
            return dimension.parse(text)
    return None
