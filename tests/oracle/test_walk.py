"""Random tables and random accesses: the engine's walker against the slow one, with caches of any size."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import OFF, machine
from tests.oracle.examples import MORE_EXAMPLES
from tests.oracle.legacy_walker import LegacyWalker
from tests.oracle.walker import (
    Misconfiguration,
    NotCanonical,
    PageFault,
    R,
    Refused,
    Violation,
    W,
    Walker,
    Words,
    X,
)
from vtsim.base import jit
from vtsim.base import memory as mem
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels import ept_walk, invalidate
from vtsim.cpu.kernels import translate as k

KINDS = (R, W, X)
EXAMPLES = 10 if jit.DISABLED else 40 * MORE_EXAMPLES
ACCESSES = 12 if jit.DISABLED else 60
SMALL = {
    "tlb.dtlb4k.entries": 4, "tlb.dtlb4k.ways": 2, "tlb.dtlb2m.entries": 2, "tlb.dtlb2m.ways": 1, "tlb.dtlb1g.entries": 1,
    "tlb.dtlb1g.ways": 1, "tlb.itlb4k.entries": 2, "tlb.itlb4k.ways": 1, "tlb.itlb2m.entries": 1, "tlb.itlb2m.ways": 1,
    "tlb.stlb.entries": 8, "tlb.stlb.ways": 2, "tlb.stlb1g.entries": 1, "tlb.stlb1g.ways": 1, "pwc.pde.entries": 2,
    "pwc.pde.ways": 2, "pwc.pdpte.entries": 1, "pwc.pdpte.ways": 1, "pwc.pml4e.entries": 1, "pwc.pml4e.ways": 1, "pwc.pml5e.entries": 1,
    "ept_pwc.pde.entries": 2, "ept_pwc.pde.ways": 2, "ept_pwc.pdpte.entries": 1, "ept_pwc.pdpte.ways": 1,
    "ept_pwc.pml4e.entries": 1, "ept_pwc.pml4e.ways": 1, "ept_pwc.pml5e.entries": 1, "nested_tlb.entries": 4, "nested_tlb.ways": 2,
}  # fmt: skip
ENTRIES = SMALL | {"features.entry_walk_cache": True, "pwc.pde.entries": 4, "pwc.pde.ways": 4}
SIZES: dict[str, dict[str, Any]] = {"none": dict(OFF), "small": SMALL, "full": {}, "entries": ENTRIES}
# leaves of tables at levels 4, 3, 2, 1 of EPT, then pages that any level of the guest may use as a table
EPT_FRAMES = {5: [26], 4: [16], 3: [17, 18], 2: [19, 20, 21], 1: [22, 23, 24, 25]}
GUEST_FRAMES = list(range(32, 44))
INDEXES = (0, 1, 300, 511)


@define
class World:
    """An engine with random tables, and the slow walker over a copy of them."""

    chance: random.Random
    sizes: str
    nested: bool
    engine: Any = field(init=False)
    walker: Walker = field(init=False)
    frames: list[int] = field(init=False)

    def __attrs_post_init__(self) -> None:
        c = self.chance
        self.engine = machine(SIZES[self.sizes])
        self.frames = [*(f for level in EPT_FRAMES.values() for f in level), *GUEST_FRAMES]
        for frame in self.frames:
            self.words(frame)[:] = 0
        for frame in GUEST_FRAMES:
            self.words(frame)[:] = [self.guest_entry() for _ in range(512)]
        ept_levels = 5 if c.random() < 0.3 else 4
        mode_based = self.nested and c.random() < 0.4
        for level, frames in EPT_FRAMES.items():
            for frame in frames:
                self.words(frame)[:] = [self.ept_entry(level) for _ in range(512)]
        levels = 5 if c.random() < 0.2 else 4
        wp, nxe, smep, pge, smap, pke = (c.random() < p for p in (0.7, 0.9, 0.5, 0.5, 0.4, 0.4))
        cr3 = c.choice(GUEST_FRAMES) << 12
        eptp = EPT_FRAMES[ept_levels][0] << 12 | (ept_levels - 1) << 3 | 6 | (0x40 if c.random() < 0.5 else 0)
        eptp *= self.nested
        m = self.engine.cpus[0]
        m[s.CR0] = 0x80040033 | wp << 16
        m[s.CR4] = 0x20 | pge << 7 | (levels == 5) << 12 | smep << 20 | smap << 21 | pke << 22
        m[s.EPT_FEATURES] = ept_walk.MODE_BASED if mode_based else 0
        m[s.EFER] = 0x501 | nxe << 11
        m[s.CR3], m[s.NONROOT] = cr3, int(self.nested)
        m[s.EPTP], m[s.EPT_AD], m[s.VPID] = eptp, eptp >> 6 & 1, 1
        m[s.PRIVILEGE] = o.N0 if self.nested else o.R0
        self.engine.sync()
        self.walker = Walker(
            self.memory(), cr3, levels, 46, wp, nxe, smep, eptp, mode_based=mode_based, smap=smap, pke=pke
        )  # fmt: skip

    def words(self, frame: int) -> Any:
        return self.engine.contents(frame, mem.TABLE)

    def memory(self) -> Words:
        return Words({frame: self.words(frame).view(np.uint64).tolist() for frame in self.frames})

    def guest_entry(self) -> int:
        c = self.chance
        entry = (
            1 | (c.random() < 0.8) << 1 | (c.random() < 0.9) << 2 | c.choice((0, 0x20, 0x60)) | (c.random() < 0.2) << 8
        )
        if c.random() < 0.1:  # a large page, where the level knows them
            entry |= 1 << 7 | c.choice((0, 1 << 12)) | (c.choice((0, 1, 3)) << 21 if c.random() < 0.7 else 0)
        else:
            entry |= c.choice(GUEST_FRAMES) << 12
        if c.random() < 0.02:
            entry ^= c.choice((1, 1 << 51, 1 << 46, 1 << 13, 1 << 20))
        entry |= c.choice((0, 0, 1, 9)) << 59
        return entry - (1 << 63 if c.random() < 0.1 else 0)

    def ept_entry(self, level: int) -> int:
        c = self.chance
        entry = c.choice((7, 7, 7, 7, 7, 7, 7, 3, 5)) | (c.random() < 0.3) << 8 | (c.random() < 0.2) << 9
        entry |= (c.random() < 0.8) << 10
        if level == 1:
            entry |= c.choice((0, 4, 6, 6, 6, 6)) << 3 | c.choice(GUEST_FRAMES) << 12
        elif level < 4 and c.random() < 0.1:
            entry |= 1 << 7 | 6 << 3
        else:
            entry |= c.choice(EPT_FRAMES[level - 1]) << 12
        if c.random() < 0.01:
            entry ^= c.choice((1, 2, 3, 7, 1 << 3, 1 << 4, 1 << 6, 1 << 7, 1 << 12, 1 << 47, 1 << 51))
        return entry

    def address(self) -> int:
        c = self.chance
        indexes = [c.choice(INDEXES) for _ in range(self.walker.levels)]
        gva = 0
        for index in indexes:
            gva = gva << 9 | index
        gva = gva << 12 | c.choice((0, 8, 0xFF8))
        width = 12 + 9 * self.walker.levels
        if c.random() < 0.98 and gva >> (width - 1):
            gva |= (1 << 64) - (1 << width)
        return gva

    def access(self, gva: int, kind: str, user: bool) -> Any:
        """What the engine says: an address, or a refusal with all that is reported about it."""
        m, a, t = self.engine.cpus[0], self.engine.arena, self.engine.tags
        at = np.int64(gva - (1 << 64) if gva >> 63 else gva)
        with jit.quiet():
            if kind == X:
                got = int(k.translate_code(m, a, t, at, int(user)))
            else:
                got = int(k.translate(m, a, t, at, KINDS.index(kind), int(user)))
        if got >= 0:
            return got
        if got == ept_walk.PAGE_FAULT:
            return PageFault(int(m[s.FAULT_GVA]) & (1 << 64) - 1, int(m[s.FAULT_CODE]))
        if got == ept_walk.VIOLATION:
            # SDM: "EPT Violations"
            assert int(m[s.FAULT_GVA]) & (1 << 64) - 1 == gva
            return Violation(int(m[s.FAULT_GPA]), int(m[s.FAULT_QUALIFICATION]))
        if got == ept_walk.MISCONFIGURATION:
            return Misconfiguration(int(m[s.FAULT_GPA]))
        return NotCanonical()

    def expected(self, gva: int, kind: str, user: bool) -> Any:
        try:
            return self.walker.translate(gva, kind, user)
        except Refused as refused:
            return refused.args[0]

    def compare(self, gva: int, kind: str, user: bool) -> None:
        want, got = self.expected(gva, kind, user), self.access(gva, kind, user)

        assert want == got, (hex(gva), kind, user)
        assert self.walker.words == self.memory(), (hex(gva), kind, user)

    def some_access(self) -> tuple[int, str, bool]:
        """RFLAGS.AC and PKRU change at any time, and nothing is invalidated for it."""
        m, c = self.engine.cpus[0], self.chance
        if c.random() < 0.3:
            self.walker.alignment_check = c.random() < 0.5
            self.walker.pkru = c.choice((0, 0, 1, 2, 4, 8, 3 << 18, 0x5555_5554))
            m[s.RFLAGS], m[s.PKRU] = 2 | self.walker.alignment_check << 18, self.walker.pkru
        return self.address(), self.chance.choice(KINDS), self.chance.random() < 0.5


@define
class LegacyWorld(World):
    """The same with 32-bit or PAE paging."""

    pae: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.pae = self.chance.random() < 0.6
        super().__attrs_post_init__()
        c, m, w = self.chance, self.engine.cpus[0], self.walker
        pse = c.random() < 0.8
        for frame in GUEST_FRAMES:
            self.words(frame)[:] = [self.guest_entry() for _ in range(512)]
        pdptes = tuple(c.choice(GUEST_FRAMES) << 12 | (c.random() < 0.9) for _ in range(4))
        m[s.CR4] = int(m[s.CR4]) & ~(1 << 12 | 1 << 22 | 0x30) | pse << 4 | self.pae << 5
        m[s.EFER] = int(m[s.EFER]) & ~0x500
        m[s.PDPTE0 : s.PDPTE0 + 4] = pdptes
        self.engine.sync()
        self.walker = LegacyWalker(
            self.memory(), w.cr3, 2, 46, w.wp, w.nxe, w.smep, w.eptp, mode_based=w.mode_based, smap=w.smap, pae=self.pae,
            pse=pse, pdptes=pdptes,
        )  # fmt: skip

    def guest_entry(self) -> int:
        """One entry of PAE paging, or two of 32-bit paging."""
        entry = super().guest_entry()
        if self.pae:
            return entry if self.chance.random() < 0.05 else entry & ~(0x7FF << 52)
        return mem.signed((entry & 0xFFFF_FFFF) << 32 | super().guest_entry() & 0xFFFF_FFFF)

    def address(self) -> int:
        c = self.chance
        index = c.choice((0, 1, 300, 511)) << 21 | c.choice(INDEXES) << 12
        return (c.randrange(4) << 30 | index | c.choice((0, 8, 0xFF8))) & 0xFFFF_FFFF


seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("nested", [False, True], ids=["native", "behind EPT"])
@pytest.mark.parametrize("sizes", list(SIZES))
@settings(max_examples=EXAMPLES)
@given(seed=seeds)
def test_legacy_paging_is_what_the_manual_says_whatever_is_cached(sizes: str, nested: bool, seed: int) -> None:
    world = LegacyWorld(random.Random(seed), sizes, nested)

    for _ in range(ACCESSES):
        world.compare(*world.some_access())


@pytest.mark.parametrize("nested", [False, True], ids=["native", "behind EPT"])
@pytest.mark.parametrize("sizes", list(SIZES))
@settings(max_examples=EXAMPLES)
@given(seed=seeds)
def test_caches_change_no_translation_no_fault_and_no_flag(sizes: str, nested: bool, seed: int) -> None:
    world = World(random.Random(seed), sizes, nested)

    for _ in range(ACCESSES):
        world.compare(*world.some_access())


def invlpg(world: World, gva: int) -> None:
    m = world.engine.cpus[0]
    invalidate.drop_page(m, world.engine.arena, m[s.CONTEXT_KEY], np.int64(gva - (1 << 64) if gva >> 63 else gva))


def all_contexts(world: World, gva: int) -> None:
    invalidate.drop_contexts(world.engine.cpus[0], world.engine.arena, 0xFFFF, 1 if world.nested else 0, True)


def invept(world: World, gva: int) -> None:
    invalidate.drop_guest_physical(world.engine.cpus[0], world.engine.arena, world.walker.eptp & ~0xFFF)


def invept_all(world: World, gva: int) -> None:
    invalidate.drop_guest_physical(world.engine.cpus[0], world.engine.arena, 0)


INVALIDATIONS: tuple[tuple[str, bool, str, Callable[[World, int], None]], ...] = (
    ("an address", False, "guest", invlpg),
    ("all contexts", False, "guest", all_contexts),
    ("an address behind EPT", True, "guest", invlpg),
    ("a VPID", True, "guest", all_contexts),
    ("an EP4TA", True, "ept", invept),
    ("all EP4TAs", True, "ept", invept_all),
)


@pytest.mark.parametrize("sizes", ["small", "full", "entries"])
@pytest.mark.parametrize("kind", [World, LegacyWorld], ids=["long mode", "legacy"])
@pytest.mark.parametrize(
    ("nested", "dimension", "invalidate"), [x[1:] for x in INVALIDATIONS], ids=[x[0] for x in INVALIDATIONS]
)
@settings(max_examples=EXAMPLES // 2)
@given(seed=seeds)
def test_after_an_invalidation_nothing_stale_is_returned(
    sizes: str, nested: bool, dimension: str, invalidate: Callable[[World, int], None], kind: type[World], seed: int
) -> None:
    world = kind(random.Random(seed), sizes, nested)
    c = world.chance
    for _ in range(ACCESSES // 3):
        world.compare(*world.some_access())
    for _ in range(6):
        world.compare(*(probe := world.some_access()))
        if dimension == "ept":
            level = c.randint(1, world.walker.ept_levels)
            frame, index, entry = c.choice(EPT_FRAMES[level]), c.choice(INDEXES), world.ept_entry(level)
        else:
            frame, index, entry = c.choice(GUEST_FRAMES), c.choice(INDEXES), world.guest_entry()
        world.words(frame)[index] = entry
        world.walker.words[frame << 12 | 8 * index] = entry & (1 << 64) - 1
        invalidate(world, probe[0])
        world.compare(*probe)
        all_contexts(world, 0)  # INVLPG answers for one address only
        world.compare(*world.some_access())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [World, LegacyWorld])
def test_the_oracle_meets_every_outcome(kind: type[World]) -> None:
    seen: dict[type, int] = {}
    codes: set[int] = set()
    for seed in range(60):
        world = kind(random.Random(seed), "none", True)
        for _ in range(100):
            outcome = world.expected(*world.some_access())
            seen[type(outcome)] = seen.get(type(outcome), 0) + 1
            codes |= {outcome.code} if isinstance(outcome, PageFault) else set()

    assert {int, PageFault, Violation, Misconfiguration} == set(seen) - {NotCanonical}
    assert (NotCanonical in seen) == (kind is World)
    assert seen[int] > sum(seen.values()) // 10
    # not present, protection, reserved, fetch, and for data of user-mode pages a key
    wanted = {0, 1, 2, 3, 4, 5, 6, 7, 9, 16, 17} | ({0x21, 0x23, 0x25, 0x27} if kind is World else set())
    assert wanted <= codes
