"""Kernels executed as plain Python with their calls of each other observed: the engine's own code, step by step.

A kernel behaves the same interpreted and compiled, so what is observed is what the compiled engine does, and the
compiled engine has no test for observers in it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, Final, Protocol

from attrs import define, field

from vtsim.base import jit

Function = Callable[..., Any]
PACKAGE: Final = "vtsim."


class Observer(Protocol):
    """Who is asked, for each call of one kernel by another, what is called instead."""

    def __call__(self, caller: str, callee: str, function: Function) -> Function: ...


@define(eq=False)
class Observed:
    """Copies of kernels whose calls of other kernels go by an observer."""

    observer: Observer
    _copies: dict[int, Function] = field(factory=dict, init=False)

    def copy(self, kernel: Function) -> Function:
        """A kernel as a Python function; also of those that it calls."""
        if id(kernel) in self._copies:
            return self._copies[id(kernel)]
        original: Any = getattr(kernel, "py_func", kernel)
        names = dict(original.__globals__)
        copied = FunctionType(original.__code__, names, original.__name__, original.__defaults__)
        self._copies[id(kernel)] = copied
        for name in original.__code__.co_names:
            callee: Any = names.get(name)
            if name in jit.PLAIN:
                names[name] = jit.PLAIN[name]
            elif _is_kernel(callee):
                names[name] = self.observer(original.__name__, name, self.copy(callee))
        return copied


def _is_kernel(value: Any) -> bool:
    function = getattr(value, "py_func", value)
    return isinstance(function, FunctionType) and function.__module__.startswith(PACKAGE)
