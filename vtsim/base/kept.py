"""What a process builds once and uses in one run after another: some values of each kind, by what they depend on.

A value depends on its key alone, so that a run is the same whether it was built or found. `nothing_kept` is how a test
sees that it is.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from threading import Lock
from typing import Any, Final, Generic, TypeVar

from attrs import define, field

V = TypeVar("V")


@define(eq=False)
class Kept(Generic[V]):
    """At most `most` values; the one that was not used for longest goes first."""

    most: int
    _values: OrderedDict[Hashable, V] = field(factory=OrderedDict, init=False)
    _lock: Lock = field(factory=Lock, init=False)  # a worker of a cluster may have several threads

    def __attrs_post_init__(self) -> None:
        EVERY.append(self)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, build: Callable[[], V]) -> V:
        """Return the value of a key, built where there is none."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = build()
        with self._lock:
            if KEEPS[0]:
                self._values[key] = value
                if len(self._values) > self.most:
                    self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()


EVERY: Final[list[Kept[Any]]] = []
KEEPS: Final = [True]


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Build everything anew within; what was kept is forgotten."""
    before, KEEPS[0] = KEEPS[0], False
    for each in EVERY:
        each.clear()
    try:
        yield
    finally:
        KEEPS[0] = before
