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
LOW_ADDRESSES = (0x400000, 0x401000, 0x600000, 0x4000_0000, 0x7000_0000, 0xBFFF_E000)
MODES = {  # addresses, last user entry of the root, tables that they need
    table_hooks.FOUR_LEVELS: (ADDRESSES, 255, 10), table_hooks.PAE: (LOW_ADDRESSES, 2, 5),
    table_hooks.NARROW: (LOW_ADDRESSES, 767, 4),
}  # fmt: skip
DIRECTORIES = 0x40  # of PAE paging, which are there beforehand: those of the space, then those of its copy


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

    def load_half(self, m: Any, a: Any, t: Any, at: int) -> int:
        word = self.load(m, a, t, at & ~7)
        return word >> 32 if at & 4 else word & 0xFFFF_FFFF

    def store_half(self, m: Any, a: Any, t: Any, at: int, value: int) -> int:
        other = self.words.get(int(at) & ~7, 0) & (0xFFFF_FFFF if at & 4 else ~0xFFFF_FFFF)
        return self.store(m, a, t, at & ~7, other | (value << 32 if at & 4 else value))

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


def fork(
    monkeypatch: pytest.MonkeyPatch, mode: int, refuses: Callable[[], bool]
) -> tuple[dict[int, int], int, list[int], int]:
    """Six pages are mapped, and their space is copied.

    What stands in memory then, how many leaves were copied, the leaves that are found in the copy, and how many are
    left when those of the first three pages were cleared.
    """
    memory = Memory(refuses)
    doers = {
        "hook_load": memory.load, "hook_store": memory.store, "zero_page": memory.zero,
        "load_half": memory.load_half, "store_half": memory.store_half,
    }  # fmt: skip
    for name, does in doers.items():
        monkeypatch.setattr(table_hooks, name, does)
    for name in ("new_table", "stand", "load_entry", "store_entry"):
        monkeypatch.setattr(table_hooks, name, plain(getattr(table_hooks, name)))
    addresses, last, _ = MODES[mode]
    root, child = (frame << 12 | mode << table_hooks.MODE_SHIFT for frame in (ROOT, CHILD))
    if mode == table_hooks.PAE:
        for n in range(3):
            memory.words[(ROOT << 12) + 8 * n] = DIRECTORIES + n << 12 | PRESENT
            memory.words[(CHILD << 12) + 8 * n] = DIRECTORIES + 3 + n << 12 | PRESENT
    for n, address in enumerate(addresses):
        leaf = (0x1000 + n) << 12 | ENTRY
        assert until_done(table_hooks.table_map, RDI=root, RSI=address, RDX=leaf, RCX=1, R10=ENTRY) == 0
    copied = until_done(table_hooks.table_copy, RDI=root, RSI=child, RCX=last, R10=WRITABLE)
    words = {at: word for at, word in memory.words.items() if word}
    leaves = [until_done(table_hooks.table_lookup, RDI=child, RSI=at, R10=PRESENT) for at in addresses]
    cleared = until_done(table_hooks.table_clear, RDI=child, RSI=addresses[0], RDX=0x201)
    return words, copied, leaves, cleared


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(25))
def test_tables_that_are_mapped_and_copied_under_refusals_are_those_without(
    mode: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = Random(seed)
    with monkeypatch.context() as patched:
        expected = fork(patched, mode, lambda: False)
    with monkeypatch.context() as patched:
        found = fork(patched, mode, lambda: r.random() < 0.2)

    assert found == expected  # the allocator's next frame is among them
    assert found[1] == len(ADDRESSES)
    assert found[2] == [(0x1000 + n) << 12 | ENTRY & ~WRITABLE for n in range(len(ADDRESSES))]
    assert found[3] == 3


@pytest.mark.parametrize("mode", MODES)
def test_a_space_and_its_copy_take_the_tables_that_their_addresses_need(
    mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, copied, _, _ = fork(monkeypatch, mode, lambda: False)

    assert copied == len(ADDRESSES)
    assert words[ALLOCATOR] == FIRST + 2 * MODES[mode][2]


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_allocator_is_told_from_a_copy(mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cpu.test_table_hooks.END", FIRST + MODES[mode][2] + 3)

    assert fork(monkeypatch, mode, lambda: False)[1] == -1
