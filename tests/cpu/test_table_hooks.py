"""Hooks on radix tables come to the same end and take the same frames, however often and wherever they are refused."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest

from vtsim.base.jit import quiet
from vtsim.cpu import slots as s
from vtsim.cpu.kernels import table_hooks

REFUSED = -2
ALLOCATOR, FIRST, END = 0x1000, 0x100, 0x180
ROOT, CHILD = 0x20, 0x30
PRESENT, WRITABLE, USER = 1, 2, 4
ENTRY = PRESENT | WRITABLE | USER
ADDRESSES = (0x400000, 0x401000, 0x600000, 0x10_0000_0000, 0x10_0020_0000, 0x7FFF_FFFF_E000)


class Memory:
    """Words by address; `refuses` says of each access whether it is refused."""

    def __init__(self, refuses: Callable[[], bool]) -> None:
        self.words = {ALLOCATOR: FIRST, ALLOCATOR + 8: END}
        self.refuses = refuses

    def refused(self, m: Any) -> bool:
        m[s.FAULT_KIND] = REFUSED if self.refuses() else 0
        return bool(m[s.FAULT_KIND])

    def load(self, m: Any, a: Any, t: Any, at: int) -> int:
        return 0 if self.refused(m) else self.words.get(int(at), 0)

    def store(self, m: Any, a: Any, t: Any, at: int, value: int) -> int:
        if not self.refused(m):
            self.words[int(at)] = int(value)
        return int(m[s.FAULT_KIND])

    def zero(self, m: Any, a: Any, t: Any, at: int) -> int:
        if not self.refused(m):
            self.words |= dict.fromkeys((word for word in self.words if word >> 12 == int(at) >> 12), 0)
        return int(m[s.FAULT_KIND])


def plain(kernel: Any) -> Any:
    return getattr(kernel, "py_func", kernel)


def until_done(hook: Any, **registers: int) -> int:
    """The hook is made again until nothing refuses it, as by a CPU that goes on at the same instruction: RAX."""
    m = np.zeros(4096, np.int64)
    for name, value in {"R9": ALLOCATOR, **registers}.items():
        m[s.GPR + getattr(s, name)] = value
    with quiet():
        for _ in range(10_000):
            if plain(hook)(m, None, None) == 0:
                return int(m[s.GPR + s.RAX])
    raise AssertionError("the hook never came to its end")


def fork(monkeypatch: pytest.MonkeyPatch, refuses: Callable[[], bool]) -> tuple[dict[int, int], int]:
    """Six pages are mapped, and their space is copied: what stands in memory then, and how many leaves were copied."""
    memory = Memory(refuses)
    for name, does in (("hook_load", memory.load), ("hook_store", memory.store), ("zero_page", memory.zero)):
        monkeypatch.setattr(table_hooks, name, does)
    for name in ("new_table", "stand"):
        monkeypatch.setattr(table_hooks, name, plain(getattr(table_hooks, name)))
    for n, address in enumerate(ADDRESSES):
        leaf = (0x1000 + n) << 12 | ENTRY
        assert until_done(table_hooks.table_map, RDI=ROOT << 12, RSI=address, RDX=leaf, RCX=1, R10=ENTRY) == 0
    copied = until_done(table_hooks.table_copy, RDI=ROOT << 12, RSI=CHILD << 12, RCX=255, R10=WRITABLE)
    return {at: word for at, word in memory.words.items() if word}, copied


@pytest.mark.parametrize("seed", range(25))
def test_tables_that_are_mapped_and_copied_under_refusals_are_those_without(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = Random(seed)
    with monkeypatch.context() as patched:
        expected, copied = fork(patched, lambda: False)
    with monkeypatch.context() as patched:
        found, again = fork(patched, lambda: r.random() < 0.2)

    assert copied == again == len(ADDRESSES)
    assert found == expected  # the allocator's next frame is among them


def test_an_empty_allocator_is_told_from_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cpu.test_table_hooks.END", FIRST + 13)

    assert fork(monkeypatch, lambda: False)[1] == -1
