"""Tables that change under cached translations of several VPIDs, PCIDs and EPT pointers, with pages of every size.

Both dimensions have four or five levels, and entries take rights away from ring 3, which reads, writes and fetches. What the engine says must be among the outcomes that `remembered` allows, and no more is allowed.

SDM: "Caching Translation Information"; "Operations that Invalidate TLBs and Paging-Structure Caches";
"Operations that Invalidate Cached Mappings".
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from attrs import define, evolve, field
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import machine
from tests.oracle.examples import MORE_EXAMPLES
from tests.oracle.remembered import (
    ADDRESS,
    ENTER_0,
    FAULT,
    FETCH,
    INVEPT,
    INVLPG,
    INVPCID,
    INVVPID,
    LARGE,
    MOV_CR3,
    NO_EXECUTE,
    OF_PAGE,
    OF_TABLE,
    PAGE_FAULT,
    PCIDS,
    PGE,
    READ,
    USER,
    VIOLATION,
    VPIDS,
    WRITABLE,
    WRITE,
    Context,
    Order,
    Outcome,
    Remembered,
)
from tests.oracle.test_walk import SIZES
from vtsim.base import jit
from vtsim.base import memory as mem
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.codes import NEXT
from vtsim.cpu.kernels import control_registers, ept_walk, invalidate, system, vmx
from vtsim.cpu.kernels import translate as k
from vtsim.ept.spec import Q_FINAL
from vtsim.vmcs import slots as v

STEPS = 60 if jit.DISABLED else 250
EXAMPLES = 6 if jit.DISABLED else 15 * MORE_EXAMPLES
EPT_ROOTS = (16, 17)
EPT_FRAMES = {4: (25, 26), 3: (18, 19), 2: (20, 21), 1: (22, 23, 24)}  # below the roots
GUEST_FRAMES = tuple(range(32, 40))  # of tables, wherever they are
LARGE_GUEST, LARGE_HOST = (0, 512), {0: (512,), 1: (512, 1024)}  # first frames of pages of 2 MiB: by entry of EPT
TABLES = (*GUEST_FRAMES, *(512 + frame for frame in GUEST_FRAMES))  # in host memory
INDEXES = (0, 1, 300)
CODE_FRAME, DESCRIPTOR, VMCS = 60, 61, 62
GUEST_FLAGS, EPT_FLAGS = 0x67, 0x337  # everything allowed, flags set: nothing is written back
FIVE = {"features.la57": True, "vmx.generation": "ice-lake-sp"}
MEMORY = 32 << 20
OPERAND = 0xC80  # where no table has an entry in use
CR0, CR4, CR4_PGE = 0x80050033, 1 << 5 | 1 << 13 | 1 << 17, 1 << 7
KINDS = (
    *(INVLPG, PGE, MOV_CR3), *(INVPCID(n) for n in range(4)), *(INVVPID(n) for n in range(4)), INVEPT(1), INVEPT(2)
)  # fmt: skip
Weaker = Callable[[Order], Order | None]


@define
class World:
    """One engine in a guest, and what it may remember.

    `weaken` says what is done in place of an operation: something else, or nothing.
    """

    chance: random.Random
    sizes: str
    weaken: dict[str, Weaker] = field(factory=dict)
    kinds: tuple[str, ...] = KINDS
    books: Remembered = field(init=False)
    engine: Any = field(init=False)
    rows: dict[int, int] = field(factory=dict, init=False)
    recent: list[int] = field(factory=list, init=False)
    operand: int = field(default=0, init=False)  # where a descriptor can be read
    aimed: int = field(default=-1, init=False)  # the address that was just invalidated
    large: bool = field(default=True, init=False)  # has the guest large pages, of which some will be kept in pieces?

    def __attrs_post_init__(self) -> None:
        levels = [self.chance.choice((4, 5)) for _ in range(2)]
        self.large = self.chance.random() < 0.7
        self.books = Remembered(EPT_ROOTS, *levels)
        self.engine = machine({**SIZES[self.sizes], **FIVE})
        self.assemble()
        for level in range(self.books.ept_levels, 0, -1):
            for frame in self.ept_frames(level):
                for index in self.used(level):
                    self.write(frame, index, self.ept_entry(level, index))
        for frame in TABLES:
            for index in INDEXES:
                self.write(frame, index, self.guest_entry())
        m = self.m
        m[s.CR0], m[s.CR4], m[s.EFER] = CR0, CR4 | CR4_PGE | (self.books.levels == 5) << 12, 0xD01
        m[s.NONROOT], m[s.PRIVILEGE] = 1, o.N0
        m[s.VPID], m[s.EPTP] = 1, self.eptp(EPT_ROOTS[0])
        self.engine.sync()
        self.order(Order(MOV_CR3), root=GUEST_FRAMES[0])

    def assemble(self) -> None:
        """Rows of instructions, executed one by one where the guest's tables let them find their operands."""
        a = Assembler("invalidations", 0x1000)
        a.op(o.INVLPG, mem=Mem(s.RAX))
        a.op(o.INVPCID, s.RDI, mem=Mem(s.RAX))
        a.op(o.MOV_TO_CR, s.RDX, imm=4)
        arena = self.engine.arena
        first = int(arena[mem.A_ROWS]) + int(arena[mem.A_ROW_COUNT]) * o.ROW_WORDS
        self.engine.place(a.assemble(), lambda _: CODE_FRAME)
        self.rows = {op: first + n * o.ROW_WORDS for n, op in enumerate((o.INVLPG, o.INVPCID, o.MOV_TO_CR))}
        view = self.engine.contents(VMCS, mem.VMCS_REGION)
        self.m[s.VMCS] = (view.ctypes.data - arena.ctypes.data) // arena.itemsize
        view[v.PRIMARY_PROC_CONTROLS] = 0

    @property
    def m(self) -> Any:
        return self.engine.cpus[0]

    @property
    def context(self) -> Context:
        m = self.m
        return int(m[s.VPID]), int(m[s.CR3]) & 0xFFF, int(m[s.EPTP]) >> 12

    def eptp(self, root: int) -> int:
        """The EPT pointer of a root: its own tables are write-back."""
        return root << 12 | self.books.ept_levels - 1 << 3 | 6

    def ept_frames(self, level: int) -> tuple[int, ...]:
        return EPT_ROOTS if level == self.books.ept_levels else EPT_FRAMES[level]

    def used(self, level: int) -> tuple[int, ...]:
        """The indexes of an EPT table that the guest's few frames use."""
        return {1: (*GUEST_FRAMES, *INDEXES), 2: (0, 1)}.get(level, (0,))

    def guest_entry(self) -> int:
        c = self.chance
        if c.random() < 0.05:
            return 0
        flags = GUEST_FLAGS | (c.random() < 0.4) << 8
        if c.random() < 0.15:
            flags ^= c.choice((WRITABLE, WRITABLE, USER, NO_EXECUTE, NO_EXECUTE))
        if self.large and c.random() < 0.12:
            return c.choice(LARGE_GUEST) << 12 | flags | LARGE
        return c.choice(GUEST_FRAMES) << 12 | flags

    def ept_entry(self, level: int, index: int) -> int:
        c = self.chance
        if c.random() < 0.03:
            return 0
        refused = c.choice((WRITE, FETCH)) if c.random() < (0.2 if level == 1 else 0.1) else 0
        if level == 2 and c.random() < 0.3:
            return c.choice(LARGE_HOST[index]) << 12 | EPT_FLAGS & ~refused | LARGE
        if level == 3 and c.random() < 0.1:
            return EPT_FLAGS & ~refused | LARGE
        if level > 1:
            return c.choice(self.ept_frames(level - 1)) << 12 | 0x107 & ~refused
        return c.choice(TABLES) << 12 | EPT_FLAGS & ~refused

    def address(self) -> int:
        c = self.chance
        if self.recent and c.random() < 0.6:
            return c.choice(self.recent)
        gva = 0
        for choice in (INDEXES[:2], *[INDEXES] * (self.books.levels - 1)):
            gva = gva << 9 | c.choice(choice)
        self.recent = [*self.recent[-7:], gva << 12]
        return gva << 12

    # --- what happens, to the engine and in the books
    def write(self, frame: int, index: int, entry: int) -> None:
        self.engine.contents(frame, mem.TABLE)[index] = mem.signed(entry)
        self.books.write(frame << 12 | index << 3, entry)

    def change(self) -> None:
        self.books.now += 1
        c = self.chance
        what = c.random()
        if what < 0.3 and self.recent:  # an entry by which an address is found
            gva = c.choice(self.recent)
            found = self.books.tables(self.context, gva)
            level, table = c.choice(found) if found else (1, c.choice(TABLES) << 12)
            self.write(table >> 12, gva >> 3 + 9 * level & 511, self.guest_entry())
        elif what < 0.6:
            self.write(c.choice(TABLES), c.choice(INDEXES), self.guest_entry())
        else:
            level = c.randint(1, self.books.ept_levels)
            index = c.choice(self.used(level))
            self.write(c.choice(self.ept_frames(level)), index, self.ept_entry(level, index))

    def enter(self, vpid: int, root: int) -> None:
        """A VM exit, and a VM entry with another VPID or EPT pointer: only mappings of VPID 0 are invalidated."""
        m = self.m
        for own in (int(m[s.VPID]), vpid):
            m[s.VPID] = own
            if own == 0:
                self.order(Order(ENTER_0))
        m[s.EPTP] = self.eptp(root)
        self.engine.sync()
        self.loaded()

    def loaded(self) -> None:
        self.books.now += 1
        self.books.load(self.context, int(self.m[s.CR3]) & ADDRESS)

    def load_cr3(self) -> None:
        c = self.chance
        pcid, root = c.choice(PCIDS), c.choice(GUEST_FRAMES)
        if MOV_CR3 not in self.kinds or c.random() < 0.7:
            self.mov_to_cr3(root, pcid, keep=True)
            self.loaded()
        else:
            self.order(Order(MOV_CR3, pcid=pcid), root=root)

    def mov_to_cr3(self, root: int, pcid: int, *, keep: bool) -> None:
        with jit.quiet():
            value = np.int64(mem.signed(root << 12 | pcid | keep << 63))
            control_registers.load_cr3(self.m, self.engine.arena, value)

    def order(self, order: Order, root: int = 0) -> None:
        """Do something that invalidates, unless that is weakened; the books do not know of it."""
        weaker = self.weaken.get(order.kind)
        done = weaker(order) if weaker else order
        if order.kind == MOV_CR3:
            self.mov_to_cr3(root, order.pcid, keep=done is None)
            self.loaded()
        elif done is not None:
            with jit.quiet():
                self.execute(done)
        self.books.note(order, self.context)

    def execute(self, order: Order) -> None:
        m, a, t, n = self.m, self.engine.arena, self.engine.tags, order.kind[-1]
        if order.kind == MOV_CR3:
            self.mov_to_cr3(int(m[s.CR3]) >> 12, int(m[s.CR3]) & 0xFFF, keep=False)
        elif order.kind == INVLPG:
            m[s.GPR + s.RAX] = order.gva
            system.system_rest(m, a, t, np.int64(self.rows[o.INVLPG]), np.int64(o.INVLPG))
        elif order.kind == PGE:
            m[s.GPR + s.RDX] = wanted = int(m[s.CR4]) ^ CR4_PGE
            control_registers.move_cr(m, a, t, np.int64(self.rows[o.MOV_TO_CR]), np.int64(o.MOV_TO_CR))
            assert m[s.CR4] == wanted
        elif order.kind == ENTER_0:
            invalidate.drop_contexts(m, a, np.int64(0xFFFF), np.int64(0), True)
        elif order.kind.startswith("INVPCID"):
            self.invpcid(order, int(n))
        else:  # in root operation, where linear addresses are physical ones
            root_of_ept, vpid = int(m[s.EPTP]), int(m[s.VPID])
            m[s.NONROOT], m[s.PRIVILEGE], m[s.CR0] = 0, o.R0, CR0 & ~(1 << 31)
            self.engine.sync()
            descriptor = self.eptp(order.root) if "EPT" in order.kind else order.vpid
            for word, value in enumerate((descriptor, order.gva if "VPID" in order.kind else 0)):
                self.engine.store(DESCRIPTOR << 12 | 8 * word, value)
            instruction = vmx.invept if "EPT" in order.kind else vmx.invvpid
            instruction(m, a, t, np.int64(DESCRIPTOR << 12), np.int64(int(n)))
            assert m[s.RFLAGS] & 0x41 == 0
            m[s.NONROOT], m[s.PRIVILEGE], m[s.CR0] = 1, o.N0, CR0
            assert (root_of_ept, vpid) == (int(m[s.EPTP]), int(m[s.VPID]))
            self.engine.sync()

    def invpcid(self, order: Order, kind: int) -> None:
        """Its descriptor lies in whatever page the guest's tables lead to."""
        m = self.m
        at = self.access(self.operand)
        assert isinstance(at, int)
        for word, value in enumerate((order.pcid, order.gva)):
            self.engine.store(at + OPERAND + 8 * word, value)
        m[s.GPR + s.RAX], m[s.GPR + s.RDI] = self.operand + OPERAND, kind
        assert system.invpcid(m, self.engine.arena, self.engine.tags, np.int64(self.rows[o.INVPCID])) == NEXT

    def invalidate(self) -> None:
        """One of the instructions that invalidate, for an address that was likely used."""
        c = self.chance
        kind = c.choice([each for each in self.kinds if each not in (MOV_CR3, ENTER_0)] or [""])
        if not kind:
            return
        order = Order(kind, c.choice(VPIDS), c.choice(PCIDS), c.choice(EPT_ROOTS), self.address())
        if kind in (INVVPID(0), INVVPID(1), INVVPID(3)):
            order = evolve(order, vpid=c.choice(VPIDS[1:]))
        if kind.startswith("INVPCID"):
            tried = (self.address() for _ in range(4))
            usable = (each for each in tried if not isinstance(at := self.look(each), str) and at < MEMORY)
            self.operand = next(usable, -1)
            if self.operand < 0:
                return
        self.order(order)
        self.aimed = order.gva

    def access(self, gva: int, need: int = READ) -> Outcome:
        at = self.m, self.engine.arena, self.engine.tags, np.int64(gva)
        with jit.quiet():
            got = int(k.translate_code(*at, 1) if need == FETCH else k.translate(*at, int(need == WRITE), 1))
        return {ept_walk.PAGE_FAULT: FAULT, ept_walk.VIOLATION: VIOLATION}.get(got, got)

    def look(self, gva: int, need: int = READ) -> Outcome:
        """Access an address: is the outcome allowed?"""
        got, may = self.access(gva, need), self.books.allowed(self.context, gva, need)
        assert got in may, (hex(gva), need, got, may)
        if got == FAULT:
            self.books.note(Order(PAGE_FAULT, gva=gva), self.context)
        elif got == VIOLATION:
            kind = OF_PAGE if int(self.m[s.FAULT_QUALIFICATION]) & Q_FINAL else OF_TABLE
            self.books.note(Order(kind, gva=gva, gpa=int(self.m[s.FAULT_GPA])), self.context)
        return got

    def step(self) -> bool:
        """Do something, then access something; was the outcome out of date?"""
        c = self.chance
        what = c.random()
        if what < 0.35:
            self.change()
        elif what < 0.45:
            self.enter(self.context[0] if c.random() < 0.5 else c.choice(VPIDS), c.choice(EPT_ROOTS))
        elif what < 0.55:
            self.load_cr3()
        elif what < 0.65:
            self.invalidate()
        gva = self.aimed if self.aimed >= 0 and c.random() < 0.8 else self.address()
        if self.aimed < 0 and self.recent and c.random() < 0.2:
            gva = self.recent[-1]
        self.aimed = -1
        need = c.choice((READ, READ, WRITE, FETCH))
        return self.look(gva, need) != self.books.fresh(self.context, gva, need)


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


def test_rights_that_ept_is_given_after_a_violation_are_seen() -> None:
    """A violation invalidates what led to it, so that there is none again of entries that are put right meanwhile."""
    refused = 0
    for seed in range(20):
        world = World(random.Random(seed), "full")
        for _ in range(30):
            world.step()
        for gva, need in ((gva, need) for gva in world.recent for need in (WRITE, FETCH)):
            if world.look(gva, need) == VIOLATION and isinstance(world.books.fresh(world.context, gva, READ), int):
                refused += 1
                for level in range(1, world.books.ept_levels + 1):
                    for frame, index in product(world.ept_frames(level), world.used(level)):
                        entry = world.books.words[frame << 12 | index << 3].now
                        world.write(frame, index, entry | READ | WRITE | FETCH if entry else 0)
                assert world.look(gva, need) != VIOLATION
                break

    assert refused > 2


def as_kind(kind: str) -> Weaker:
    return lambda order: evolve(order, kind=kind)


def elsewhere(order: Order) -> Order:
    """The same for what was not asked for."""
    other_root = EPT_ROOTS[order.root == EPT_ROOTS[0]]
    return evolve(order, vpid=3 - order.vpid, pcid=1 - order.pcid, root=other_root, gva=order.gva ^ 1 << 39)


WEAKER: dict[str, dict[str, Weaker]] = {
    **{f"{kind} does nothing": {kind: lambda _: None} for kind in (*KINDS, ENTER_0)},
    **{
        f"{kind} does it elsewhere": {kind: elsewhere}
        for kind in (INVLPG, INVPCID(1), INVVPID(0), INVVPID(1), INVVPID(3), INVEPT(1))
    },
    **{
        f"{kind} is {less}": {kind: as_kind(less)}
        for kind, less in (
            (INVPCID(2), INVPCID(3)), (INVPCID(2), MOV_CR3), (INVPCID(3), INVPCID(1)), (PGE, INVPCID(3)),
            (INVVPID(1), INVVPID(3)), (INVVPID(2), INVVPID(1)),
            (INVEPT(1), INVVPID(2)), (INVEPT(2), INVEPT(1)),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in WEAKER if not jit.DISABLED or "nothing" in case])
def test_an_invalidation_that_does_less_is_found_out(case: str) -> None:
    with pytest.raises(AssertionError):
        for seed in range(300):
            world = World(random.Random(seed), "full", WEAKER[case], tuple(WEAKER[case]))
            for _ in range(STEPS):
                world.step()
