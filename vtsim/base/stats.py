"""Statistics: declared with a unit and a meaning, counted in an array, believed once their laws hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar, overload

import numpy as np
import numpy.typing as npt

from vtsim.base.errors import ModelError

Law = TypeVar("Law", bound=Callable[[Any], bool])


class Counter:
    """On the class, a declaration with a unit and a meaning; on an instance, the value."""

    name: str
    slot: int  # a plain int: a compile-time constant inside kernels

    def __init__(self, unit: str, meaning: str) -> None:
        self.unit, self.meaning = unit, meaning

    def __set_name__(self, owner: type[StatGroup], name: str) -> None:
        self.name, self.slot = name, len(owner.NAMES)
        owner.NAMES = (*owner.NAMES, name)

    @overload
    def __get__(self, group: None, owner: type[StatGroup]) -> Counter: ...
    @overload
    def __get__(self, group: StatGroup, owner: type[StatGroup]) -> int: ...
    def __get__(self, group: StatGroup | None, owner: type[StatGroup]) -> Counter | int:
        return self if group is None else int(group.array[self.slot])

    def __set__(self, group: StatGroup, value: int) -> None:
        group.array[self.slot] = value


def law(claim: Law) -> Law:
    """Mark a method that must be true of every finished run."""
    claim.is_law = True  # type: ignore[attr-defined]
    return claim


class StatGroup:
    """Counters of one part of the machine; kernels index `.array` by each counter's `.slot`."""

    NAMES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, owner: str, memory: npt.NDArray[np.int64] | None = None, offset: int = 0) -> None:
        """Count in fresh memory, or in the engine's `memory` from `offset` on."""
        self.owner = owner
        size = len(self.NAMES)
        self.array = np.zeros(size, np.int64) if memory is None else memory[offset : offset + size]
        if self.array.shape != (size,):
            raise ModelError(f"{owner}: {size} counters do not fit at offset {offset}")

    @classmethod
    def counters(cls) -> tuple[Counter, ...]:
        """Return the declarations, in slot order."""
        return tuple(getattr(cls, name) for name in cls.NAMES)

    def as_dict(self) -> dict[str, int]:
        """Return every counter's value by name, in slot order."""
        return {name: int(self.array[slot]) for slot, name in enumerate(self.NAMES)}

    @classmethod
    def laws(cls) -> tuple[str, ...]:
        """Return the names of the laws, inherited ones first."""
        declared = (name for base in reversed(cls.__mro__) for name in vars(base))
        return tuple(n for n in dict.fromkeys(declared) if getattr(getattr(cls, n), "is_law", False))


def check_laws(groups: Iterable[StatGroup]) -> None:
    """Raise `ModelError` with the counters for the first law that is false."""
    for group in groups:
        for name in group.laws():
            if not getattr(group, name)():
                raise ModelError(f"{group.owner}: {name.replace('_', ' ')} is false", group.as_dict())
