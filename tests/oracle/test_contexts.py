"""Tables that change under cached translations of several VPIDs, PCIDs and EPT pointers.

The oracle keeps every value that an entry ever had. A translation may be made of any of them that no invalidation has
forbidden since: what the engine says must be among those, and no more is allowed.

SDM: "Caching Translation Information"; "Operations that Invalidate TLBs and Paging-Structure Caches";
"Operations that Invalidate Cached Mappings".
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import machine
from tests.oracle.examples import MORE_EXAMPLES
from tests.oracle.test_walk import SIZES
from vtsim.base import jit
from vtsim.base import memory as mem
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels import control_registers, ept_walk, invalidate
from vtsim.cpu.kernels import translate as k

STEPS = 60 if jit.DISABLED else 250
EXAMPLES = 8 if jit.DISABLED else 25 * MORE_EXAMPLES
EPT_ROOTS = (16, 17)
EPT_FRAMES = {4: EPT_ROOTS, 3: (18, 19), 2: (20, 21), 1: (22, 23, 24)}
GUEST_FRAMES = tuple(range(32, 40))
INDEXES = (0, 1, 300)
FAULT, VIOLATION = "page fault", "EPT violation"
GUEST_FLAGS, EPT_FLAGS = 0x67, 0x337  # everything allowed, flags set: nothing is written back
ADDRESS = (1 << 52) - 4096
Context = tuple[int, int, int]  # VPID, PCID, EPT pointer


@define
class History:
    """The values that a word had, each with the moment from which on."""

    values: list[tuple[int, int]]

    def since(self, moment: int) -> set[int]:
        """What the word held at a moment or after it."""
        before = [value for at, value in self.values if at <= moment]
        return {*before[-1:], *(value for at, value in self.values if at > moment)}


@define
class World:
    """One engine in a guest, its tables with their history, and what was invalidated when."""

    chance: random.Random
    sizes: str
    engine: Any = field(init=False)
    words: dict[int, History] = field(factory=dict, init=False)
    roots: dict[Context, History] = field(factory=dict, init=False)
    linear: dict[Context, int] = field(factory=dict, init=False)  # when a context was invalidated
    pages: dict[tuple[Context, int], int] = field(factory=dict, init=False)  # when an address in it was
    physical: dict[int, int] = field(factory=dict, init=False)  # when an EPT pointer was
    now: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.engine = machine(SIZES[self.sizes])
        for level, frames in EPT_FRAMES.items():
            for frame in frames:
                for index in self.used(level):
                    self.write(frame, index, self.ept_entry(level))
        for frame in GUEST_FRAMES:
            for index in INDEXES:
                self.write(frame, index, self.guest_entry())
        self.m[s.CR0], self.m[s.CR4], self.m[s.EFER] = 0x80050033, 0x20 | 1 << 17, 0xD01
        self.m[s.NONROOT], self.m[s.PRIVILEGE] = 1, o.N0
        self.enter(1, EPT_ROOTS[0])
        self.load_cr3(0, False)

    @property
    def m(self) -> Any:
        return self.engine.cpus[0]

    @property
    def context(self) -> Context:
        m = self.m
        return int(m[s.VPID]), int(m[s.CR3]) & 0xFFF, int(m[s.EPTP]) >> 12

    def used(self, level: int) -> tuple[int, ...]:
        """The indexes of an EPT table that the guest's few frames use."""
        return GUEST_FRAMES if level == 1 else (0,)

    def guest_entry(self) -> int:
        return self.chance.choice(GUEST_FRAMES) << 12 | (GUEST_FLAGS if self.chance.random() < 0.95 else 0)

    def ept_entry(self, level: int) -> int:
        frames = GUEST_FRAMES if level == 1 else EPT_FRAMES[level - 1]
        return self.chance.choice(frames) << 12 | ((EPT_FLAGS if level == 1 else 0x107) * (self.chance.random() < 0.97))

    def address(self) -> int:
        gva = 0
        for choice in (INDEXES[:2], INDEXES, INDEXES, INDEXES):
            gva = gva << 9 | self.chance.choice(choice)
        return gva << 12

    # --- what happens, to the engine and in the books -----------------------------------------------------------------
    def write(self, frame: int, index: int, entry: int) -> None:
        self.engine.contents(frame, mem.TABLE)[index] = entry
        self.words.setdefault(frame << 12 | index << 3, History([])).values.append((self.now, entry))

    def change(self) -> None:
        self.now += 1
        c = self.chance
        if c.random() < 0.6:
            self.write(c.choice(GUEST_FRAMES), c.choice(INDEXES), self.guest_entry())
        else:
            level = c.randint(1, 4)
            self.write(c.choice(EPT_FRAMES[level]), c.choice(self.used(level)), self.ept_entry(level))

    def enter(self, vpid: int, root: int) -> None:
        """As VM entries with another VPID or EPT pointer do: nothing is invalidated."""
        self.m[s.VPID], self.m[s.EPTP] = vpid, root << 12 | 0x1E
        self.engine.sync()
        self.loaded()

    def loaded(self) -> None:
        self.now += 1
        self.roots.setdefault(self.context, History([])).values.append((self.now, int(self.m[s.CR3]) & ADDRESS))

    def load_cr3(self, pcid: int, keep: bool) -> None:
        value = self.chance.choice(GUEST_FRAMES) << 12 | pcid
        with jit.quiet():
            control_registers.load_cr3(self.m, self.engine.arena, np.int64(mem.signed(value | keep << 63)))
        self.loaded()
        if not keep:
            self.linear[self.context] = self.now

    def invalidate(self) -> None:
        """One of the instructions that invalidate, as the manual and the engine understand it."""
        self.now += 1
        m, a, c = self.m, self.engine.arena, self.chance
        kind, gva = c.choice(("INVLPG", "INVPCID", "INVVPID", "all VPIDs", "INVEPT", "all EPT")), self.address()
        vpid, pcid, root = self.context
        known = set(self.roots)
        if kind == "INVLPG":
            invalidate.drop_page(m, a, m[s.CONTEXT_KEY], np.int64(gva))
            self.pages[self.context, gva] = self.now
            return
        if kind == "INVPCID":
            pcid = c.randrange(3)
            key = int(m[s.CONTEXT_KEY]) & ~(0xFFF << 16) | pcid << 16
            invalidate.drop_contexts(m, a, -1, np.int64(key), False)
            reached = {(vpid, pcid, root)}
        elif kind == "INVVPID":
            vpid = c.randint(1, 2)
            invalidate.drop_contexts(m, a, 0xFFFF, vpid, True)
            reached = {each for each in known if each[0] == vpid}
        elif kind == "all VPIDs":
            for one in (1, 2):
                invalidate.drop_contexts(m, a, 0xFFFF, one, True)
            reached = known
        else:
            root = c.choice(EPT_ROOTS)
            invalidate.drop_guest_physical(m, a, root << 12 if kind == "INVEPT" else 0)
            hit = {root} if kind == "INVEPT" else set(EPT_ROOTS)
            reached = {each for each in known if each[2] in hit}
            self.physical |= dict.fromkeys(hit, self.now)
        self.linear |= dict.fromkeys(reached, self.now)

    # --- what may come of an access -------------------------------------------------------------------------------------
    def host(self, gpa: int, moment: int) -> set[Any]:
        tables: set[Any] = {int(self.m[s.EPTP]) >> 12 << 12}
        found: set[Any] = set()
        for shift in (39, 30, 21, 12):
            entries: set[int] = set()
            for table in tables:
                entries |= self.words[table | (gpa >> shift & 511) << 3].since(moment)
            found |= {VIOLATION for entry in entries if not entry & 7}
            tables = {entry & ADDRESS for entry in entries if entry & 7}
        return found | tables

    def allowed(self, gva: int) -> set[Any]:
        """Every outcome that is made of values which were current at the last invalidation or after it."""
        context = self.context
        moment = max(self.linear.get(context, 0), self.pages.get((context, gva), 0))
        physical = self.physical.get(context[2], 0)
        tables, found = self.roots[context].since(moment), set()
        for shift in (39, 30, 21, 12):
            entries: set[int] = set()
            for table in tables:
                for at in self.host(table, physical):
                    if at == VIOLATION:
                        found.add(VIOLATION)
                    else:
                        entries |= self.words[at | (gva >> shift & 511) << 3].since(moment)
            found |= {FAULT for entry in entries if not entry & 1}
            tables = {entry & ADDRESS for entry in entries if entry & 1}
        return found.union(*(self.host(table, physical) for table in tables)) if tables else found

    def access(self, gva: int) -> Any:
        with jit.quiet():
            got = int(k.translate(self.m, self.engine.arena, self.engine.tags, np.int64(gva), 0, 1))
        return {ept_walk.PAGE_FAULT: FAULT, ept_walk.VIOLATION: VIOLATION}.get(got, got)

    def fresh(self, gva: int) -> set[Any]:
        """The outcome without anything cached."""
        context = self.context
        kept = self.linear, self.physical
        self.linear, self.physical = {context: self.now}, dict.fromkeys(EPT_ROOTS, self.now)
        now = self.allowed(gva)
        self.linear, self.physical = kept
        return now

    def step(self) -> bool:
        """Do something, then access something; was the outcome out of date?"""
        c = self.chance
        what = c.random()
        if what < 0.35:
            self.change()
        elif what < 0.5:
            self.enter(c.randint(1, 2), c.choice(EPT_ROOTS))
        elif what < 0.65:
            self.load_cr3(c.randrange(3), c.random() < 0.7)
        elif what < 0.75:
            self.invalidate()
        gva = self.address()
        got, may = self.access(gva), self.allowed(gva)

        assert got in may, (hex(gva), got, may)
        return got not in self.fresh(gva)


@pytest.mark.parametrize("sizes", list(SIZES))
@settings(max_examples=EXAMPLES)
@given(seed=st.integers(0, 2**32))
def test_no_translation_is_made_of_what_an_invalidation_has_forbidden(sizes: str, seed: int) -> None:
    world = World(random.Random(seed), sizes)
    stale = [world.step() for _ in range(STEPS)]

    assert sizes != "none" or not any(stale)


def test_without_an_invalidation_stale_translations_are_used() -> None:
    """So the property above has something to forbid."""
    world = World(random.Random(1), "full")

    assert any(world.step() for _ in range(2 * STEPS))


@pytest.mark.parametrize("instruction", ["drop_page", "drop_contexts", "drop_guest_physical"])
def test_an_invalidation_that_does_nothing_is_found_out(instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invalidate, instruction, lambda *_: None)

    with pytest.raises(AssertionError):
        for seed in range(40):
            world = World(random.Random(seed), "full")
            for _ in range(STEPS):
                world.step()
