"""A guest that changes its own paging structures at random, and what it must see: worked out by a slow walker.

The guest runs in ring 0, and where its paging has rings it also goes to ring 3 for accesses, forbids and tries fetches
(some pages hold code that says where it stands), clears accessed flags of upper entries (each entry that a completed access used must have it set), and has global pages:
an address is used only while every page that may have been kept for all address spaces is the one there is. Changes that may leave stale translations make the addresses behind them unusable until the
guest has flushed them, as the manual asks; then every access has one answer only, natively, with EPT and on shadow
tables. `changing_vcpus` is the same guest on two vCPUs, `narrow_tables` one with 32-bit addresses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from attrs import define, field, frozen

from tests.oracle.walker import PageFault, R, Refused, W, Walker, Words, X
from vtsim.base import memory as mem
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import NO_MEMORY, Assembler, Mem, Program
from vtsim.ept.tables import KERNEL_PAGE, PAGING, USER_PAGE, Table
from vtsim.guest.kernel.entry import OPERANDS_OF_4_BYTES
from vtsim.guest.machine_view import PhysicalMemory, Start

# fmt: off
CODE, LOG, STACK, IDT, TSS = 0x1000_0000, 0x2000_0000, 0x3000_0000, 0x4000_0000, 0x4000_1000
RING_3 = 0x4800_0000                    # what ring 3 executes
WINDOW = 0x6000_0000                    # all guest-physical memory below WINDOW_FRAMES, for changes to tables
WINDOW_FRAMES = 1024
FIRST_FREE = 0x100
# tables that change: number of frames by level
COUNTS = {3: 2, 2: 3, 1: 4}
FIRST_TABLE = 0x200
FIRST_DATA, DATA_FRAMES = 0x280, 12
CODE_FRAMES = range(0x2A0, 0x2A6)       # with rings: pages that are not loaded nor stored but executed
LARGE_FRAMES = (1024, 1536)             # of large pages
TOPS, INDEXES = (1, 2), {3: (0, 1), 2: (0, 1, 2), 1: (0, 1, 2, 7)}
P, WRITABLE, USER, A, D, PS, G = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8
NOFLUSH, NX = 1 << 63, 1 << 63
USER_CODE, USER_STACK, SYSTEM_CALL = 0x33, 0x2B, 0x80
LOG_WORDS, STAMP = 4, 0x5000_0000
CR4_PGE, CR4_SMEP = 1 << 7, 1 << 20
# fmt: on


def table_frames(level: int) -> list[int]:
    first = FIRST_TABLE + sum(count for other, count in COUNTS.items() if other > level)
    return list(range(first, first + COUNTS[level]))


ROOTS, TOP_TABLES = (0x1F0, 0x1F1), (0x1F2, 0x1F3)  # the latter above, with five levels
# the level of the entries in a frame
LEVELS = {
    **{frame: level for level in COUNTS for frame in table_frames(level)}, **dict.fromkeys(ROOTS, 4),
    **dict.fromkeys(TOP_TABLES, 5),
}  # fmt: skip
OTHER_ROOT = 1 << 48  # an address whose walk goes through the other root, with five levels
ADDRESSES = [
    top << 39 | three << 30 | two << 21 | one << 12
    for top in TOPS
    for three in INDEXES[3]
    for two in INDEXES[2]
    for one in INDEXES[1]
]


@frozen
class Paging:
    """How the guest's tables are read."""

    pcid: bool = False
    smap: bool = False
    five: bool = False
    rings: bool = False
    smep: bool = False

    @property
    def cr4(self) -> int:
        return 0xA0 | self.five << 12 | self.pcid << 17 | self.smep << 20 | self.smap << 21

    @property
    def word(self) -> int:
        """Bytes of a word of a stack frame."""
        return 8


@frozen
class Access:
    """One access of the guest: what it must find."""

    address: int
    store: bool
    error: int  # -1: none
    value: int
    user: bool = False
    fetch: bool = False


@define
class Plan:
    """A random program and its expected log."""

    chance: random.Random
    paging: Paging
    steps: int
    emits: list[Callable[[Assembler], None]] = field(factory=list)
    log: list[Access] = field(factory=list)
    words: Words = field(init=False)
    root: int = 0
    alignment_check: bool = False
    fresh: set[int] = field(factory=set)  # invalidated last
    stale: dict[int, set[int]] = field(factory=lambda: {0: set(), 1: set()})
    memory: dict[int, int] = field(factory=dict)  # stored words, by guest-physical address
    kept: dict[int, set[tuple[int, ...]]] = field(factory=dict)  # paths to global pages since they were invalidated
    used: set[int] = field(factory=set)  # upper entries whose accessed flag must be set

    def __attrs_post_init__(self) -> None:
        frames = [*ROOTS, *TOP_TABLES, *(frame for level in COUNTS for frame in table_frames(level))]
        self.words = Words({frame: [0] * 512 for frame in frames})
        for number, top_table in enumerate(TOP_TABLES):
            self.words[top_table << 12] = ROOTS[number] << 12 | P | WRITABLE | USER | A
            self.words[top_table << 12 | 8] = self.above(1 - number)
        for root in ROOTS:
            for top in TOPS:
                self.words[root << 12 | top << 3] = self.upper(4)
        for level in (3, 2, 1):
            for frame in table_frames(level):
                for index in INDEXES[level]:
                    self.words[frame << 12 | index << 3] = self.entry(level)
        self.used = {at for at, level in self.leaves() if level > 1 and self.words[at] & A}
        if self.paging.rings:
            self.forget_globals(self.addresses)

    # --- entries
    @property
    def tops(self) -> tuple[int, ...]:
        """Where the tables are that CR3 names."""
        return tuple(frame << 12 for frame in (TOP_TABLES if self.paging.five else ROOTS))

    @property
    def user(self) -> float:
        """Which share of entries is for user mode."""
        return 0.9 if self.paging.smap or self.paging.rings else 0.5

    @property
    def addresses(self) -> list[int]:
        return [a | other for a in ADDRESSES for other in (0, OTHER_ROOT)[: 1 + self.paging.five]]

    def above(self, root: int) -> int:
        """An entry of level 5."""
        rights = self.chance.choice((WRITABLE | USER, WRITABLE | USER, WRITABLE, USER))
        return ROOTS[root] << 12 | P | A | rights

    def upper(self, level: int) -> int:
        c = self.chance
        if c.random() < 0.15:
            return 0
        rights = (WRITABLE if c.random() < 0.8 else 0) | (USER if c.random() < self.user else 0)
        if self.paging.rings:
            rights |= c.choice((0, 0, 0, 0, 0, NX))
            return c.choice(table_frames(level - 1)) << 12 | P | rights | c.choice((0, A))
        return c.choice(table_frames(level - 1)) << 12 | P | rights | A

    def entry(self, level: int) -> int:
        c = self.chance
        if level > 1 and not (level == 2 and c.random() < 0.2):
            return self.upper(level)
        if c.random() < 0.25:
            return 0
        rights = (WRITABLE if c.random() < 0.7 else 0) | (USER if c.random() < self.user else 0)
        flags = c.choice((0, A, A, A | D, A | D))
        if self.paging.rings:
            rights |= c.choice((0, 0, 0, NX)) | c.choice((0, 0, G))
        if level == 2:
            return c.choice(LARGE_FRAMES) << 12 | P | rights | flags | PS
        if self.paging.rings and c.random() < 0.3:
            return c.choice(CODE_FRAMES) << 12 | P | rights | flags
        frame = FIRST_DATA + c.randrange(DATA_FRAMES) if c.random() < 0.9 else c.choice(table_frames(1))
        return frame << 12 | P | (rights if frame in range(FIRST_DATA, FIRST_DATA + DATA_FRAMES) else 0) | flags

    # --- what the guest may rely on
    def path(self, root: int, address: int) -> tuple[int, ...]:
        """Entries from the root down, without accessed flags of those that lead on unless they are cleared at times."""
        kept = ~0 if self.paging.rings else ~A
        found = []
        table, frames = root, self.words.frames  # that the plan looks at them is nothing of the guest's
        for level in range(4 + self.paging.five, 0, -1):
            entry = frames[table >> 12][address >> 3 + 9 * level & 511]
            if not entry & P:
                return (*found, 0)
            if level == 1 or entry & PS:
                return (*found, entry)
            found.append(entry & kept)
            table = entry & (1 << 52) - 4096
        raise AssertionError

    def to_globals(self, address: int) -> set[tuple[int, ...]]:
        """How an address leads to global pages now, without accessed and dirty flags."""
        paths = [self.path(root, address) for root in self.tops]
        return {tuple(entry & ~(A | D) for entry in path) for path in paths if path[-1] & G}

    def forget_globals(self, addresses: list[int]) -> None:
        self.kept |= {address: self.to_globals(address) for address in addresses}

    def may_keep(self) -> None:
        """Pages that are global now may be kept from here on."""
        for address in self.addresses:
            self.kept[address] |= self.to_globals(address)

    def sure(self, address: int) -> bool:
        """Is what may have been kept of global pages at an address what its tables say?"""
        now = tuple(entry & ~(A | D) for entry in self.path(self.tops[self.root], address))
        return self.kept.get(address, set()) <= {now}

    def change(self, at: int, value: int) -> None:
        shift = 3 + 9 * LEVELS[at >> 12]
        through = [a for a in self.addresses if a >> shift & 511 == (at & 0xFFF) >> 3]
        before = {(root, a): self.path(root, a) for root in self.tops for a in through}
        self.words[at] = value
        (self.used.add if value & A else self.used.discard)(at)
        for (root, address), old in before.items():
            new = self.path(root, address)
            if old != new and not (old[-1] == 0 and new[: len(old) - 1] == old[:-1]):
                for pcid in (0, 1) if self.paging.pcid else (0,):
                    self.stale[pcid].add(address)
        if self.paging.rings:
            self.may_keep()
        self.emits.append(lambda a: a.st_value(Mem(displacement=WINDOW + at), signed(value)))

    # --- steps
    def build(self) -> Plan:
        for _ in range(self.steps):
            kind = self.chance.random()
            if kind < 0.22:
                level = self.chance.choice((1, 1, 1, 2, 3))
                frame = self.chance.choice(table_frames(level))
                self.change(frame << 12 | self.chance.choice(INDEXES[level]) << 3, self.entry(level))
            elif kind < 0.26:
                if self.paging.five and self.chance.random() < 0.5:
                    entry = self.above(self.chance.randrange(2)) if self.chance.random() < 0.8 else 0
                    self.change(TOP_TABLES[self.chance.randrange(2)] << 12 | 8, entry)
                else:
                    self.change(ROOTS[self.chance.randrange(2)] << 12 | self.chance.choice(TOPS) << 3, self.upper(4))
            elif kind < 0.31 and self.paging.pcid:
                root = self.chance.randrange(2)
                kind = self.chance.choice((0, 0, 0, 1, 2, 3))
                self.invalidate_pcid(kind, root, self.likely(self.stale[root]))
            elif kind < 0.36:
                self.invalidate(self.likely(self.unsure() or self.stale[self.now]))
            elif kind < 0.46:
                self.load_root(self.chance.randrange(2), self.paging.pcid and self.chance.random() < 0.5)
            elif kind < 0.50 and self.paging.rings:
                self.toggle_globals()
            elif kind < 0.52 and self.paging.smap:
                self.alignment_check = not self.alignment_check
                self.emits.append(lambda a, op=ops.STAC if self.alignment_check else ops.CLAC: a.op(op))
            else:
                self.access()
        return self

    @property
    def now(self) -> int:
        return self.root if self.paging.pcid else 0

    def unsure(self) -> set[int]:
        """Addresses where a global page may be kept that is there no more."""
        return {a for a in self.addresses if not self.sure(a)} if self.paging.rings else set()

    def likely(self, wanted: set[int]) -> int:
        """An address, rather one of those wanted."""
        return self.chance.choice(sorted(wanted) if wanted and self.chance.random() < 0.7 else self.addresses)

    def invalidate(self, address: int) -> None:
        self.fresh = {address}
        self.stale[self.now].discard(address)
        if self.paging.rings:
            self.forget_globals([address])
        self.emits.append(lambda a: a.op(ops.INVLPG, mem=Mem(displacement=address)))

    def toggle_globals(self) -> None:
        """CR4.PGE is cleared and set: everything is invalidated."""
        for stale in self.stale.values():
            stale.clear()
        self.forget_globals(self.addresses)

        def emit(a: Assembler) -> None:
            for value in (self.paging.cr4 & ~CR4_PGE, self.paging.cr4):
                a.mov(s.RAX, value)
                a.op(ops.MOV_TO_CR, s.RAX, imm=4)

        self.emits.append(emit)

    def invalidate_pcid(self, kind: int, root: int, address: int) -> None:
        """INVPCID: an address of a root's PCID, all of it, everything with and without globals."""
        if kind == 0:
            self.stale[root].discard(address)
            self.fresh = {address}
        for other in (0, 1):
            if kind > 1 or (kind == 1 and other == root):
                self.stale[other].clear()
        if kind == 2 and self.paging.rings:
            self.forget_globals(self.addresses)

        def emit(a: Assembler) -> None:
            a.st_value(Mem(s.RSP, -64), root + 1)
            a.st_value(Mem(s.RSP, -56), address)
            a.mov(s.RDX, kind)
            a.op(ops.INVPCID, s.RDX, mem=Mem(s.RSP, -64))

        self.emits.append(emit)

    def load_root(self, root: int, keep: bool) -> None:
        self.root = root
        value = self.tops[root] | (root + 1 if self.paging.pcid else 0) | (NOFLUSH if keep else 0)
        if not keep:
            self.stale[self.now].clear()

        def emit(a: Assembler) -> None:
            a.mov(s.RAX, signed(value))
            a.op(ops.MOV_TO_CR, s.RAX, imm=3)

        self.emits.append(emit)

    def access(self) -> None:
        usable = [
            a for a in self.addresses if a not in self.stale[self.now] and (not self.paging.rings or self.sure(a))
        ]
        if not usable:
            if self.paging.rings:
                self.toggle_globals()
            self.load_root(self.root, False)
            usable = [a for a in self.addresses if not self.paging.rings or self.sure(a)]
            if not usable:
                return
        address = self.likely(self.fresh & set(usable))
        if address not in usable:
            address = self.chance.choice(usable)
        store = self.chance.random() < 0.5
        if not self.paging.rings:
            self.touch(address, store)
            return
        if self.chance.random() < 0.3:  # few addresses lead to code
            address = self.chance.choice([a for a in usable if self.code(a)] or [address])
        user = self.chance.random() < 0.6
        fetch = self.code(address) or (self.chance.random() < 0.4 and self.refused(address, X, user))
        self.touch(address, store and not fetch, user=user, fetch=fetch)

    def code(self, address: int) -> bool:
        """Is there code at an address?"""
        entry = self.path(self.tops[self.root], address)[-1]
        return not entry & PS and (entry & (1 << 52) - 1) >> 12 in CODE_FRAMES

    def refused(self, address: int, kind: str, user: bool) -> bool:
        """Would an access fault? A fetch that does not would find no code."""
        walker = self.walker()
        walker.words = Words({frame: list(words) for frame, words in self.words.frames.items()})
        try:
            walker.translate(address, kind, user)
        except Refused:
            return True
        return False

    def walker(self) -> Walker:
        """The slow walker of the tables as they are now."""
        return Walker(
            self.words, self.tops[self.root], levels=4 + self.paging.five, smap=self.paging.smap,
            smep=self.paging.smep, alignment_check=self.alignment_check,
        )  # fmt: skip

    def expected(self, address: int, store: bool, user: bool = False, fetch: bool = False) -> Access:
        """What an access finds; if it stores its number, this is in memory."""
        try:
            gpa = self.walker().translate(address, X if fetch else W if store else R, user)
        except Refused as refused:
            fault = refused.args[0]
            assert isinstance(fault, PageFault)
            return Access(address, store, fault.code, 0, user, fetch)
        if self.paging.rings:
            self.used |= self.upper_entries(address)
        if store:
            self.memory[gpa + 8] = len(self.log)
            return Access(address, store, -1, 0, user)
        assert fetch == (gpa >> 12 in CODE_FRAMES)
        value = self.words[gpa] if gpa >> 12 in self.words.frames else STAMP + (gpa >> 12)
        return Access(address, store, -1, value, user, fetch)

    def upper_entries(self, address: int) -> set[int]:
        """Where the entries stand that lead to the one that maps an address."""
        found = set()
        table = self.tops[self.root]
        for level in range(4 + self.paging.five, 1, -1):
            at = table | ((address >> (3 + 9 * level)) & 511) << 3
            if self.words[at] & PS:
                break
            found.add(at)
            table = self.words[at] & (1 << 52) - 4096
        return found

    def touch(self, address: int, store: bool, *, user: bool = False, fetch: bool = False) -> None:
        """An access, and what it must find."""
        number = len(self.log)
        self.log.append(self.expected(address, store, user, fetch))
        flags = 2 | self.alignment_check << 18

        def emit(a: Assembler) -> None:
            registers = {s.RAX: 0, s.RBX: 0, s.R14: -1}
            if self.paging.rings:
                registers |= {s.R11: number, s.R12: address, s.R13: int(user)}
                a.copy(s.R10, s.RSP)
            for register, start in registers.items():
                a.mov(register, start)
            a.mov(s.R15, f"after_{number}")
            if user:
                to_ring_3(a, "fetch" if fetch else "store" if store else "load", flags, self.paging.word)
            elif fetch:
                a.op(ops.JMP_REG, s.R12)
            elif store:
                a.st_value(Mem(displacement=address + 8), number)
            else:
                a.ld(s.RAX, Mem(displacement=address))
            a.label(f"after_{number}")
            a.stm(Mem(displacement=LOG + 8 * LOG_WORDS * number), (s.RAX, s.RBX, s.R14))

        self.emits.append(emit)

    # --- the guest
    def guest(self, memory: PhysicalMemory) -> Start:
        """Lay the guest into memory."""
        following = iter(range(FIRST_FREE, ROOTS[0]))

        def words(gfn: int) -> np.ndarray:
            return memory.contents(gfn, mem.TABLE)

        words(ROOTS[0])
        table = Table(root=ROOTS[0], format=PAGING, take=lambda: next(following), words=words)
        a = Assembler("changing tables", CODE)
        for emit in self.emits:
            emit(a)
        a.op(ops.STOP_OP)
        emit_handlers(a, (14,), self.paging)
        program = a.assemble()
        frames = {}
        for page, _ in program.pages():
            gfn = next(following)
            table.map(page, [gfn], KERNEL_PAGE)
            frames[page] = memory.frame(gfn)
        memory.engine.place(program, frames.__getitem__)
        logs = [next(following) for _ in range(-(-len(self.log) * LOG_WORDS // 512) + 1)]
        idt, tss = next(following), next(following)
        for address, gfns in (
            (LOG, logs), (STACK - 4096, [next(following)]), (IDT, [idt]), (TSS, [tss]),
            (WINDOW, list(range(WINDOW_FRAMES))),
        ):  # fmt: skip
            table.map(address, gfns, KERNEL_PAGE)
        self.logs = logs
        if self.paging.rings:
            table.map(RING_3, [place_rings(memory, next(following))], USER_PAGE)
        words(ROOTS[1])[0] = words(ROOTS[0])[0]
        initial = Plan(random.Random(self.seed), self.paging, 0).words
        for frame, entries in initial.frames.items():
            held = words(frame)
            for index in range(1 if frame in ROOTS else 0, 512):
                held[index] = signed(entries[index])
        for gfn in range(FIRST_DATA, FIRST_DATA + DATA_FRAMES):
            memory.store(gfn << 12, STAMP + gfn)
        for first in LARGE_FRAMES:
            for index in INDEXES[1]:
                memory.store(first + index << 12, STAMP + first + index)
        memory.store(tss * 4096, STACK << 32)  # RSP0, from byte 4 on
        fill_idt(memory, idt, program, self.paging.word)
        return Start(
            rip=CODE, rsp=STACK, rflags=2, cr0=0x80050033, cr3=self.tops[0] | int(self.paging.pcid),
            cr4=self.paging.cr4, efer=0xD01,
            idtr_base=IDT, idtr_limit=0xFFF, gdtr_base=0, gdtr_limit=0x7F, tr_base=TSS, cpl=0, msrs={},
            gs_base=0, fs_base=0,
        )  # fmt: skip

    seed: int = 0
    logs: list[int] = field(factory=list)

    def seen(self, load: Callable[[int], int]) -> Iterator[tuple[Any, Any]]:
        """(expected, found) for every access, every stored word and every leaf of the tables."""
        for number, access in enumerate(self.log):
            at = number * LOG_WORDS * 8
            value, cr2, error = (load((self.logs[at >> 12] << 12) + (at & 0xFFF) + 8 * n) for n in range(3))
            target = access.address + 8 * access.store
            expected = (access.value, 0, -1) if access.error < 0 else (0, target, access.error)
            yield (number, access, expected), (number, access, (value & (1 << 64) - 1, cr2, error))
        for gpa, value in self.memory.items():
            yield (gpa, value), (gpa, load(gpa))
        for at, level in self.leaves():
            expected, found = self.get(at, self.words.__getitem__), self.get(at, load)
            kept = ~0 if self.maps(level, expected) else ~A
            yield (hex(at), hex(expected & kept)), (hex(at), hex(found & kept))
        if self.paging.rings:
            for at in sorted(self.used):
                yield (hex(at), A), (hex(at), self.get(at, load) & A)

    def get(self, at: int, load: Callable[[int], int]) -> int:
        """The entry at an address, in memory that is read like this."""
        return load(at) & (1 << 64) - 1

    def maps(self, level: int, entry: int) -> bool:
        """Does an entry of a level map a page?"""
        return level == 1 or entry & PS != 0

    def leaves(self) -> Iterator[tuple[int, int]]:
        """Where entries stand that change, and their levels."""
        for level in (3, 2, 1):
            for frame in table_frames(level):
                for index in INDEXES[level]:
                    yield frame << 12 | index << 3, level


# --- rings
def ring_3() -> Program:
    """A load, a store and a jump, of an address in R12, and back."""
    a = Assembler("ring 3", RING_3)
    a.label("load")
    a.ld(s.RAX, Mem(s.R12))
    a.op(ops.INT, imm=SYSTEM_CALL)
    a.label("store")
    a.st(Mem(s.R12, 8), s.R11)
    a.op(ops.INT, imm=SYSTEM_CALL)
    a.label("fetch")
    a.op(ops.JMP_REG, s.R12)
    return a.assemble()


IN_RING_3 = ring_3()


def to_ring_3(a: Assembler, label: str, flags: int, size: int) -> None:
    """To a place of what ring 3 executes, which has no use for its stack."""
    for n, value in enumerate((IN_RING_3.labels[label], USER_CODE, flags, RING_3, USER_STACK)):
        a.st_value(Mem(s.RSP, size * (n - 5), size=size), value)
    a.add(s.RSP, -5 * size)
    interrupt_return(a, size)


def interrupt_return(a: Assembler, size: int) -> None:
    a.op(ops.IRET, mem=Mem(attributes=OPERANDS_OF_4_BYTES) if size == 4 else NO_MEMORY)


def emit_handlers(a: Assembler, vectors: Iterable[int], paging: Any) -> None:
    """Of exceptions with an error code, which goes to R14, and of code that is done: control goes on at R15, in ring 0.

    From ring 3, and from the pages of code, with the stack that R10 has.
    """
    word = Mem(s.RSP, size=paging.word)
    for vector in vectors:
        a.label(f"gate_{vector}")
        a.ld(s.R14, word)
        a.add(s.RSP, word.size)
        if vector == 14:
            a.op(ops.MOV_FROM_CR, s.RBX, imm=2)
        if paging.rings:
            a.cmp(s.R13, 1)
            a.jcc(ops.CC_Z, f"gate_{SYSTEM_CALL}")
        a.st(word, s.R15)
        interrupt_return(a, word.size)
    a.label(f"gate_{SYSTEM_CALL}")
    a.copy(s.RSP, s.R10)
    a.op(ops.JMP_REG, s.R15)


def fill_idt(memory: PhysicalMemory, idt: int, program: Program, size: int) -> None:
    """Gates to a program's handlers, of 16 bytes or, where words of a frame have 4, of 8."""
    for vector, ring in ((13, 0), (14, 0), (SYSTEM_CALL, 3)):
        handler = program.labels.get(f"gate_{vector}", 0)
        at = idt * 4096 + 2 * size * vector
        memory.store(at, (handler & 0xFFFF) | 0x10 << 16 | (0x8E | ring << 5) << 40 | (handler >> 16 & 0xFFFF) << 48)
        if size == 8:
            memory.store(at + 8, handler >> 32)


def place_rings(memory: PhysicalMemory, gfn: int) -> int:
    """Place what ring 3 executes in a frame, which is returned, and the pages of code, wherever these are mapped.

    Such a page says which one it is, and calls.
    """
    memory.engine.place(IN_RING_3, lambda _: memory.frame(gfn))
    for frame in CODE_FRAMES:
        a = Assembler(f"code of {frame:#x}", 0)
        a.mov(s.RAX, STAMP + frame)
        a.op(ops.INT, imm=SYSTEM_CALL)
        memory.engine.place(a.assemble(), lambda _, frame=frame: memory.frame(frame))  # type: ignore[misc]
    return gfn


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def plan(seed: int, steps: int, paging: Paging) -> Plan:
    """The random program of a seed."""
    made = Plan(random.Random(seed), paging, steps)
    made.seed = seed
    return made.build()
