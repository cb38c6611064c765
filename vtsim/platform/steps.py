"""What one observed translation did: which entries it read, what served each, and which caches shortened it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from attrs import define, field, frozen

from vtsim.base.jit import quiet
from vtsim.cpu import slots as s
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels import translate
from vtsim.ept import spec as e
from vtsim.platform.observed import Function, Observed

GUEST, SHADOW, EPT = "guest", "shadow", "EPT"
SERVED: Final = ("L1D", "L2", "L3", "DRAM")  # in the order of each dimension's counters
ENTRY_NAMES: Final = ("", "PTE", "PDE", "PDPTE", "PML4E", "PML5E")
TLBS: Final = range(s.DTLB4K, s.PWC_PML5E)
PWCS: Final = range(s.PWC_PML5E, s.EPT_PML5E)
NAMES: Final = dict(zip(range(s.DTLB4K, s.NESTED_TLB + 1, 4), s.TRANSLATION_STRUCTURES, strict=True))
WALK_CACHE: Final = "walk cache"  # that holds entries, not tables
UNSIGNED: Final = (1 << 64) - 1
FETCHING: Final = 2


@frozen(kw_only=True)
class Reference:
    """One paging-structure entry that was looked at: of the guest's structures, of the shadow of them, or of EPT.

    `number` counts from 1. `level` is 1 for the last. `gpa` is None where a walk cache gave the table's host-physical
    address. `value` is the entry as read, `stored` as written back with flags set, or None. `served` is L1D, L2, L3,
    DRAM, `walk cache` (one that holds entries), or `nothing` where no memory answers. `cycles` include the write.
    """

    number: int
    dimension: str
    level: int
    gpa: int | None
    hpa: int
    value: int
    stored: int | None
    served: str
    cycles: int

    @property
    def name(self) -> str:
        """What the manual calls the entry."""
        return ENTRY_NAMES[self.level]


@frozen(kw_only=True)
class NestedWalk:
    """The translation of one guest-physical address.

    `cache` names what shortened or replaced the walk: `nested_tlb`, one of `ept_pwc`, or is empty. `hpa` is None after
    a fault. `for_flags`: it was made again because a flag had to be written.
    """

    gpa: int
    hpa: int | None
    cache: str
    cache_cycles: int
    for_flags: bool
    references: tuple[Reference, ...]
    cycles: int


@frozen(kw_only=True)
class Level:
    """One level of the guest's structures; the last has no entry: it is the page that is accessed."""

    level: int
    nested: tuple[NestedWalk, ...]
    entry: Reference | None


@define(eq=False)
class _Reading:
    """A reference whose entry is still to be read."""

    dimension: str
    level: int
    gpa: int | None
    hpa: int
    served: str
    cycles: int
    number: int
    value: int | None = None
    stored: int | None = None

    def done(self) -> Reference:
        value = 0 if self.value is None else self.value
        return Reference(
            number=self.number, dimension=self.dimension, level=self.level, gpa=self.gpa, hpa=self.hpa,
            value=value & UNSIGNED, stored=None if self.stored is None else self.stored & UNSIGNED,
            served=self.served, cycles=self.cycles,
        )  # fmt: skip


@define(eq=False)
class _Nesting:
    """A guest-physical address whose translation is not done."""

    gpa: int
    for_flags: bool
    cache: str = ""
    cache_cycles: int = 0
    references: list[_Reading] = field(factory=list)


@define(eq=False)
class Recorder:
    """Observes one translation: which kernels call which, and what that says about the walk.

    `on_shadow`: the tables that CR3 leads to are a hypervisor's, not the guest's own.
    """

    m: Any
    a: Any
    on_shadow: bool = False
    levels: list[Level] = field(factory=list)
    tlb: str = ""
    cache: str = ""
    cache_cycles: int = 0
    look_up_cycles: int = 0
    start_cycles: int = 0
    cycles: int = 0
    data: int = 0
    _numbers: int = 0
    _nesting: _Nesting | None = None
    _nested: list[NestedWalk] = field(factory=list)
    _entry: _Reading | None = None
    _final: bool = False

    def translate(self, engine: Engine, address: int, access: int, user: int) -> int:
        """Translate as the engine does; the host-physical address, or a fault."""
        observed = Observed(self.observe)
        m, a, t = engine.cpus[int(self.m[s.CPU])], engine.arena, engine.tags
        m[s.STALL] = 0
        at, arguments = np.int64(address), (access, user)
        with quiet():
            if access == FETCHING:
                got = int(observed.copy(translate.translate_code)(m, a, t, at, user))
            else:
                got = int(observed.copy(translate.translate)(m, a, t, at, *arguments))
        self._close()
        self.cycles = int(m[s.STALL])
        return got

    def observe(self, caller: str, callee: str, function: Function) -> Function:
        """What a kernel calls in place of another one."""
        watch: Callable[[str, Function], Function] | None = getattr(self, f"_on_{callee}", None)
        return function if watch is None else watch(caller, function)

    # --- translations that are kept -------------------------------------------------------------------------------
    def _on_find(self, caller: str, find: Function) -> Function:
        def observed(m: Any, a: Any, structure: int, index: int, tag: int) -> int:
            data: int = find(m, a, structure, index, tag)
            if data >= 0 and caller != "held_entry":
                self._found(structure, data)
            return data

        return observed

    def _found(self, structure: int, data: int) -> None:
        if structure in TLBS:
            self.tlb, self.data = NAMES[structure], data
        elif structure in PWCS:
            self.cache, self.cache_cycles = NAMES[structure], int(self.m[s.PWC_HIT_CYCLES])
        elif self._nesting is not None:
            self._nesting.cache = NAMES[structure]
            price = s.NESTED_HIT_CYCLES if structure == s.NESTED_TLB else s.EPT_PWC_HIT_CYCLES
            self._nesting.cache_cycles = int(self.m[price])

    def _on_walk(self, caller: str, walk: Function) -> Function:
        def observed(*arguments: Any) -> int:
            self.tlb = ""  # what a TLB had did not allow the access
            self.look_up_cycles, self.start_cycles = int(self.m[s.STALL]), int(self.m[s.WALK_LATENCY])
            self.data = walk(*arguments)
            return self.data

        return observed

    # --- the guest-physical dimension -----------------------------------------------------------------------------
    def _on_nested(self, caller: str, nested: Function) -> Function:
        def observed(m: Any, a: Any, t: Any, gpa: int, access: int, walking: bool) -> int:
            for_flags = walking and access == e.EPT_WRITE
            self._final = not walking
            if self._entry is not None and not for_flags:
                self._close()
            self._nesting = now = _Nesting(int(gpa), for_flags)
            before = int(m[s.WALK_LATENCY])
            got: int = nested(m, a, t, gpa, access, walking)
            self._nesting = None
            hit = now.cache == NAMES[s.NESTED_TLB] and not now.references
            if now.cache == NAMES[s.NESTED_TLB] and not hit:  # what it had did not allow the access
                now.cache, now.cache_cycles = "", 0
            self._nested.append(
                NestedWalk(
                    gpa=now.gpa,
                    hpa=int(got) & e.ADDRESS if got >= 0 else None,
                    cache=now.cache,
                    cache_cycles=now.cache_cycles,
                    for_flags=now.for_flags,
                    references=tuple(reading.done() for reading in now.references),
                    cycles=int(m[s.WALK_LATENCY]) - before,
                )
            )
            return got

        return observed

    # --- entries ----------------------------------------------------------------------------------------------------
    def _on_read_entry(self, caller: str, read_entry: Function) -> Function:
        def observed(m: Any, a: Any, t: Any, hpa: int, counter: int, uncached: bool) -> int:
            mine = sys._getframe(1).f_locals
            counts = a[m[s.OWNER] + counter :][: len(SERVED)]
            before = counts.copy()
            cycles: int = read_entry(m, a, t, hpa, counter, uncached)
            served = SERVED[int(np.flatnonzero(counts - before)[0])]
            self._begin(mine, int(hpa), served, int(cycles))
            return cycles

        return observed

    def _on_held_entry(self, caller: str, held_entry: Function) -> Function:
        def observed(m: Any, a: Any, last: int, at: int, context: int, price: int, hits: int) -> int:
            mine = sys._getframe(1).f_locals
            entry: int = held_entry(m, a, last, at, context, price, hits)
            if entry != -1:
                self._begin(mine, int(at), WALK_CACHE, int(m[price]))
                self._value(at, int(entry))
            return entry

        return observed

    def _begin(self, mine: Mapping[str, Any], hpa: int, served: str, cycles: int) -> None:
        """The entry at an address is being read; `mine` are the walker's own variables."""
        self._numbers += 1
        level = int(mine["level"])
        if self._nesting is not None:
            reading = _Reading(EPT, level, None, hpa, served, cycles, self._numbers)
            self._nesting.references.append(reading)
            return
        if self._entry is not None:
            self._close()
        gpa = self._nested[-1].gpa | hpa & 0xFFF if self._nested else None
        if not self.m[s.NONROOT] or not self.m[s.EPTP]:
            gpa = hpa
        dimension = SHADOW if self.on_shadow and not mine["through_ept"] else GUEST
        self._entry = _Reading(dimension, level, gpa, hpa, served, cycles, self._numbers)

    def _on_load_word(self, caller: str, load_word: Function) -> Function:
        def observed(a: Any, hpa: int) -> int:
            word: int = load_word(a, hpa)
            self._value(hpa, int(word))
            return word

        return observed

    def _on_load(self, caller: str, load: Function) -> Function:
        def observed(a: Any, hpa: int, size: int) -> int:
            word: int = load(a, hpa, size)
            if self._entry is not None and self._entry.hpa == hpa:
                self._entry.value = int(word)
            return word

        return observed

    def _reading(self, hpa: int) -> _Reading | None:
        """The reference that is in progress, if it is this address."""
        reading = self._nesting.references[-1] if self._nesting and self._nesting.references else self._entry
        return reading if reading is not None and reading.hpa == hpa else None

    def _value(self, hpa: int, word: int) -> None:
        reading = self._reading(hpa)
        if reading is not None and reading.value is None:
            reading.value = word

    def _on_store_word(self, caller: str, store_word: Function) -> Function:
        def observed(a: Any, hpa: int, value: int) -> int:
            if caller != "store":
                self._stored(hpa, int(value))
            done: int = store_word(a, hpa, value)
            return done

        return observed

    def _on_store(self, caller: str, store: Function) -> Function:
        def observed(a: Any, hpa: int, size: int, value: int) -> int:
            self._stored(hpa, int(value))
            done: int = store(a, hpa, size, value)
            return done

        return observed

    def _stored(self, hpa: int, value: int) -> None:
        reading = self._reading(hpa)
        if reading is not None:
            reading.stored = value
            reading.cycles += int(self.m[s.ATOMIC_CYCLES])

    def _close(self) -> None:
        """The level whose entry was read last is complete; or, at the end, there is none."""
        entry = None if self._entry is None else self._entry.done()
        if entry is None and not self._nested:
            return
        level = self._table_level() if entry is None else entry.level
        self.levels.append(Level(level=level, nested=tuple(self._nested), entry=entry))
        self._entry, self._nested = None, []

    def _table_level(self) -> int:
        """The level whose entry was not read: 0 is the page itself."""
        if self._final:
            return 0
        return self.levels[-1].level - 1 if self.levels else int(self.m[s.PAGING_LEVELS])
