"""One class serves every open set of named things; one function fills it from a package."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TypeVar

from vtsim.base.errors import ConfigError, ModelError

K = TypeVar("K")
V = TypeVar("V")
Implementation = TypeVar("Implementation")


class Registry(Mapping[K, V]):
    """An ordered, write-once map from a name to the thing that implements it."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._items: dict[K, V] = {}

    def register(self, key: K) -> Callable[[Implementation], Implementation]:
        """Decorate the one implementation of `key`."""

        def add(value: Implementation) -> Implementation:
            if key in self._items:
                raise ModelError(f"{self.noun} {key!r} is registered twice")
            self._items[key] = value  # type: ignore[assignment]  # Implementation keeps its own, narrower type
            return value

        return add

    def describe(self, key: K) -> str:
        """Return the first line of the docstring of what implements `key`."""
        return (inspect.getdoc(self[key]) or "").partition("\n")[0]

    def __getitem__(self, key: K) -> V:
        try:
            return self._items[key]
        except KeyError:
            raise ConfigError.unknown(self.noun, key, self._items) from None

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def import_all(package: ModuleType) -> None:
    """Import every module of `package`, in name order. A broken module breaks the import."""
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")
