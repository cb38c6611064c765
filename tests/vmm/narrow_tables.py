"""A guest with 32-bit addresses, PAE or 32-bit paging, that changes its own paging structures at random.

As `changing_tables`: what it must see is worked out by a slow walker. The first 2 GiB are fixed. Its code is 64-bit code,
which a recorded guest on shadow tables is like, or runs in 32-bit protected mode.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
from attrs import define, field, frozen

from tests.oracle.legacy_walker import LegacyWalker
from tests.oracle.walker import Words
from tests.vmm.changing_tables import (
    CODE,
    DATA_FRAMES,
    FIRST_DATA,
    FIRST_FREE,
    FIRST_TABLE,
    IDT,
    LOG,
    LOG_WORDS,
    PS,
    STACK,
    STAMP,
    TSS,
    USER,
    WINDOW,
    WINDOW_FRAMES,
    WRITABLE,
    A,
    Access,
    D,
    P,
    Plan,
    signed,
)
from vtsim.base import memory as mem
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import NO_MEMORY, Assembler, Mem
from vtsim.guest.kernel.entry import OPERANDS_OF_4_BYTES
from vtsim.guest.machine_view import PhysicalMemory, Start

# fmt: off
FIXED_DIRECTORIES = (0x1E0, 0x1E1)      # with PAE paging: of the first 2 GiB
ROOT_FRAMES = (0x1F0, 0x1F1)
LARGE_FRAMES = (1024, 2048)
NX, FLAG_63_TO_52 = 1 << 63, 1 << 60
WIDE_RESERVED = 1 << 21
CR0, CR0_WP, PGE = 0x80050033, 1 << 16, 1 << 7
GDT = IDT + 0x800
# indexes that change, by level
PAE_INDEXES = {3: (2, 3), 2: (0, 1, 2), 1: (0, 1, 7, 511)}
WIDE_INDEXES = {2: (512, 513, 514, 1023), 1: (0, 7, 512, 1023)}
TABLES = {2: (FIRST_TABLE, FIRST_TABLE + 1, FIRST_TABLE + 2), 1: tuple(range(FIRST_TABLE + 3, FIRST_TABLE + 7))}
# fmt: on


@frozen
class NarrowPaging:
    """How the guest's tables are read."""

    pae: bool = False
    pse: bool = True
    smap: bool = False
    pcid: bool = False
    protected: bool = False
    rings: bool = False

    @property
    def cr4(self) -> int:
        return self.pae << 5 | self.pse << 4 | PGE | self.smap << 21


@define
class NarrowPlan(Plan):
    """A random program and its expected log."""

    loaded: tuple[int, int, int, int] = (0, 0, 0, 0)  # PDPTEs
    started: tuple[int, int, int, int] = (0, 0, 0, 0)  # those before the first instruction
    held: dict[int, list[int]] = field(factory=dict)
    global_pages: bool = True
    write_protect: bool = True

    def __attrs_post_init__(self) -> None:
        frames = [*ROOT_FRAMES, *TABLES[2], *TABLES[1]]
        self.words = Words({frame: [0] * 512 for frame in frames})
        for root in self.roots:
            if self.paging.pae:
                for n, directory in enumerate(FIXED_DIRECTORIES):
                    self.words[root + 8 * n] = directory << 12 | P
            for index in self.indexes[max(self.indexes)]:
                self.put(self.place(root, index), self.entry(max(self.indexes)))
        for level in (2, 1) if self.paging.pae else (1,):
            for table in TABLES[level]:
                for index in self.indexes[level]:
                    self.put(self.place(table << 12, index), self.entry(level))
        self.loaded = self.started = self.pdptes(0)

    # --- the format
    @property
    def roots(self) -> tuple[int, int]:
        return (ROOT_FRAMES[0] << 12, ROOT_FRAMES[0] << 12 | 0x60) if self.paging.pae else (0x1F0000, 0x1F1000)

    @property
    def indexes(self) -> dict[int, tuple[int, ...]]:
        return PAE_INDEXES if self.paging.pae else WIDE_INDEXES

    @property
    def addresses(self) -> list[int]:
        i = self.indexes
        if self.paging.pae:
            return [three << 30 | two << 21 | one << 12 for three in i[3] for two in i[2] for one in i[1]]
        return [two << 22 | one << 12 for two in i[2] for one in i[1]]

    def place(self, table: int, index: int) -> int:
        return table + (8 if self.paging.pae else 4) * index

    def get(self, at: int, load: Callable[[int], int]) -> int:
        word = load(at & ~7) & (1 << 64) - 1
        return word if self.paging.pae else (word >> 32 if at & 4 else word) & 0xFFFF_FFFF

    def put(self, at: int, value: int) -> None:
        if not self.paging.pae:
            other = self.words[at & ~7] & (0xFFFF_FFFF << (0 if at & 4 else 32))
            value = other | value << (32 if at & 4 else 0)
        self.words[at & ~7] = value

    def pdptes(self, root: int) -> tuple[int, int, int, int]:
        one, two, three, four = (self.words[self.roots[root] + 8 * n] for n in range(4))
        return (one, two, three, four)

    # --- entries
    def entry(self, level: int) -> int:
        c, pae, pse = self.chance, self.paging.pae, self.paging.pse
        if level == 3:
            return c.choice(TABLES[2]) << 12 | P if c.random() < 0.8 else 0
        if c.random() < 0.2:
            return 0
        rights = (WRITABLE if c.random() < 0.75 else 0) | (USER if c.random() < self.user else 0)
        if pae:
            rights |= NX if c.random() < 0.3 else 0
            rights |= FLAG_63_TO_52 if c.random() < 0.05 else 0
        flags = c.choice((0, A, A, A | D, A | D))
        if level == 2:
            if (pae or pse) and c.random() < 0.3:
                wrong = WIDE_RESERVED if c.random() < 0.1 and not pae else 0
                return c.choice(LARGE_FRAMES) << 12 | P | rights | flags | PS | wrong
            ignored = PS if not pae and not pse and c.random() < 0.5 else 0
            return c.choice(TABLES[1]) << 12 | P | rights | A | ignored
        frame = FIRST_DATA + c.randrange(DATA_FRAMES) if c.random() < 0.9 else c.choice(TABLES[1])
        return frame << 12 | P | (rights if frame >= FIRST_DATA else rights & NX) | flags

    def large(self, level: int, entry: int) -> bool:
        return level == 2 and entry & PS != 0 and (self.paging.pae or self.paging.pse)

    def path(self, root: int, address: int) -> tuple[int, ...]:
        """Entries from the root down, without accessed and dirty flags of those that lead on."""
        table = self.roots[root]
        found = []
        if self.paging.pae:
            pdptes = self.loaded if root == self.root else self.pdptes(root)
            found = [pdptes[address >> 30]]
            table = found[0] & ~0xFFF
            if not found[0] & P:
                return (0,)
        for level in (2, 1):
            shift = 3 + 9 * level if self.paging.pae else 2 + 10 * level
            index = (address >> shift) & (511 if self.paging.pae else 1023)
            entry = self.get(self.place(table, index), self.words.__getitem__)
            if not entry & P:
                return (*found, 0)
            if level == 1 or self.large(level, entry):
                return (*found, entry)
            found.append(entry & ~A)
            table = entry & 0xFFFFF000
        raise AssertionError

    def write(self, at: int, value: int) -> None:
        """A store of the guest to one of its tables."""
        before = {a: self.path(self.root, a) for a in self.addresses}
        self.put(at, value)
        for a, old in before.items():
            new = self.path(self.root, a)
            if old != new and not (old[-1] == 0 and new[: len(old) - 1] == old[:-1]):
                self.stale[0].add(a)
        place = WINDOW + at
        halves = self.chance.random() < 0.5

        def emit(a: Assembler) -> None:
            if self.paging.pae and not halves:
                a.st_value(Mem(displacement=place), signed(value))
                return
            if self.paging.pae:
                a.st_value(Mem(displacement=place + 4, size=4), value >> 32)
            a.st_value(Mem(displacement=place, size=4), value & 0xFFFF_FFFF)

        self.emits.append(emit)

    # --- steps
    def build(self) -> Plan:
        c = self.chance
        for _ in range(self.steps):
            kind = c.random()
            if kind < 0.26:
                level = c.choice((1, 1, 1, 2, 2, 3)[: 6 if self.paging.pae else 5])
                top = level == max(self.indexes)
                table = c.choice(self.roots) if top else c.choice(TABLES[level]) << 12
                self.write(self.place(table, c.choice(self.indexes[level])), self.entry(level))
            elif kind < 0.36:
                self.invalidate(self.likely(self.stale[0]))
            elif kind < 0.46:
                self.load_root(c.randrange(2), False)
            elif kind < 0.48 and not self.paging.smap:
                self.write_protect = not self.write_protect
                self.stale[0].clear()
                self.write_register(0, CR0 & ~(0 if self.write_protect else CR0_WP))
            elif kind < 0.50:
                self.change_cr4()
            elif kind < 0.52 and self.paging.pae:
                self.wrong_pdpte()
            elif kind < 0.57 and self.paging.smap:
                self.alignment_check = not self.alignment_check
                self.emits.append(lambda a, op=ops.STAC if self.alignment_check else ops.CLAC: a.op(op))
            else:
                self.access()
        return self

    def change_cr4(self) -> None:
        """CR4.PGE changes: that flushes, and with PAE paging the PDPTEs are loaded."""
        self.global_pages = not self.global_pages
        self.loaded = self.pdptes(self.root)
        self.stale[0].clear()
        self.write_register(4, self.paging.cr4 ^ (0 if self.global_pages else PGE))

    def wrong_pdpte(self) -> None:
        """The PDPTEs of a root have a reserved bit for a while: loading them faults, and changes nothing."""
        root = self.chance.randrange(2)
        place = self.place(self.roots[root], self.chance.choice(self.indexes[3]))
        before = self.words[place]
        self.write(place, TABLES[2][0] << 12 | P | self.chance.choice((WRITABLE, USER, A, NX, FLAG_63_TO_52)))
        number = len(self.log)
        self.log.append(Access(0, False, 0, 0))
        value = self.paging.cr4 ^ (PGE if self.global_pages else 0)
        register, value = (4, value) if root == self.root and self.chance.random() < 0.5 else (3, self.roots[root])

        def emit(a: Assembler) -> None:
            for general, start in ((s.RAX, 0), (s.RBX, 0), (s.R14, -1), (s.RCX, value)):
                a.mov(general, start)
            a.mov(s.R15, f"after_{number}")
            a.op(ops.MOV_TO_CR, s.RCX, imm=register)
            a.label(f"after_{number}")
            a.stm(Mem(displacement=LOG + 8 * LOG_WORDS * number), (s.RAX, s.RBX, s.R14))

        self.emits.append(emit)
        self.write(place, before)

    def write_register(self, number: int, value: int) -> None:
        def emit(a: Assembler) -> None:
            a.mov(s.RAX, value)
            a.op(ops.MOV_TO_CR, s.RAX, imm=number)

        self.emits.append(emit)

    def touch(self, address: int, store: bool) -> None:
        page = self.path(self.root, address)[-1] >> 12 & 0xFFFFF
        super().touch(address, store and (self.write_protect or page not in (*TABLES[1], *TABLES[2])))

    def load_root(self, root: int, keep: bool) -> None:
        self.root = root
        self.loaded = self.pdptes(root)
        self.stale[0].clear()
        self.write_register(3, self.roots[root])

    def walker(self) -> LegacyWalker:
        return LegacyWalker(
            self.words, self.roots[self.root], pae=self.paging.pae, pse=self.paging.pse, pdptes=self.loaded,
            smap=self.paging.smap, alignment_check=self.alignment_check, wp=self.write_protect,
        )  # fmt: skip

    # --- the guest
    def fix(self, words: Callable[[int], np.ndarray], take: Callable[[], int], address: int, gfns: list[int]) -> None:
        """Map pages of the first 2 GiB, for both roots."""
        for n, gfn in enumerate(gfns):
            at = address + 4096 * n
            if self.paging.pae:
                directory = words(FIXED_DIRECTORIES[at >> 30])
                index = (at >> 21) & 511
                if not directory[index]:
                    directory[index] = take() << 12 | P | WRITABLE | A
                words(int(directory[index]) >> 12)[(at >> 12) & 511] = gfn << 12 | P | WRITABLE | A | D
                continue
            table = self.held.get(at >> 22)
            if table is None:
                frame = take()
                for root in ROOT_FRAMES:
                    half = (frame << 12 | P | WRITABLE | A) << (32 if at >> 22 & 1 else 0)
                    words(root)[at >> 23] |= signed(half)
                table = self.held[at >> 22] = [frame]
            half = (gfn << 12 | P | WRITABLE | A | D) << (32 if at >> 12 & 1 else 0)
            words(table[0])[(at >> 13) & 511] |= signed(half)

    def guest(self, memory: PhysicalMemory) -> Start:
        """Lay the guest into memory."""
        following = iter(range(FIRST_FREE, FIXED_DIRECTORIES[0]))

        def take() -> int:
            return next(following)

        def words(gfn: int) -> np.ndarray:
            return memory.contents(gfn, mem.TABLE)

        initial = NarrowPlan(random.Random(self.seed), self.paging, 0).words
        for frame, entries in initial.frames.items():
            words(frame)[:] = [signed(entry) for entry in entries]
        a = Assembler("narrow tables", CODE)
        for emit in self.emits:
            emit(a)
        a.op(ops.STOP_OP)
        protected = self.paging.protected
        word = Mem(s.RSP, size=4 if protected else 8)
        for vector in (13, 14):
            a.label(f"gate_{vector}")
            a.ld(s.R14, word)
            a.add(s.RSP, word.size)
            if vector == 14:
                a.op(ops.MOV_FROM_CR, s.RBX, imm=2)
            a.st(word, s.R15)
            a.op(ops.IRET, mem=Mem(attributes=OPERANDS_OF_4_BYTES) if protected else NO_MEMORY)
        program = a.assemble()
        frames = {}
        for page, _ in program.pages():
            gfn = take()
            self.fix(words, take, page, [gfn])
            frames[page] = memory.frame(gfn)
        memory.engine.place(program, frames.__getitem__)
        self.logs = [take() for _ in range(-(-len(self.log) * LOG_WORDS // 512) + 1)]
        idt = take()
        for address, gfns in (
            (LOG, self.logs), (STACK - 4096, [take()]), (IDT, [idt]), (TSS, [take()]),
            (WINDOW, list(range(WINDOW_FRAMES))),
        ):  # fmt: skip
            self.fix(words, take, address, gfns)
        for gfn in range(FIRST_DATA, FIRST_DATA + DATA_FRAMES):
            memory.store(gfn << 12, STAMP + gfn)
        for first in LARGE_FRAMES:
            for index in self.indexes[1]:
                memory.store(first + index << 12, STAMP + first + index)
        for vector in (13, 14):
            gate = program.labels[f"gate_{vector}"]
            at = idt * 4096 + (8 if protected else 16) * vector
            memory.store(at, (gate & 0xFFFF) | 0x10 << 16 | 0x8E << 40 | (gate >> 16) << 48)
            if not protected:
                memory.store(at + 8, gate >> 32)
        for index, descriptor in ((2, 0xCF9B000000FFFF), (3, 0xCF93000000FFFF)):
            memory.store(idt * 4096 + GDT - IDT + 8 * index, descriptor)
        return Start(
            rip=CODE, rsp=STACK, rflags=2, cr0=CR0, cr3=self.roots[0], cr4=self.paging.cr4, efer=0x801,
            idtr_base=IDT, idtr_limit=0x7FF if protected else 0xFFF, gdtr_base=GDT, gdtr_limit=0x7F, tr_base=TSS,
            cpl=0, msrs={}, gs_base=0, fs_base=0, protected=protected,
            pdptes=self.started if protected and self.paging.pae else (),
        )  # fmt: skip

    def leaves(self) -> Iterator[tuple[int, int]]:
        levels = (2, 1) if self.paging.pae else (1,)
        yield from ((self.place(t << 12, i), n) for n in levels for t in TABLES[n] for i in self.indexes[n])
        if not self.paging.pae:
            yield from ((self.place(root, i), 2) for root in self.roots for i in self.indexes[2])


def narrow_plan(seed: int, steps: int, paging: NarrowPaging) -> Plan:
    """The random program of a seed."""
    made = NarrowPlan(random.Random(seed), paging, steps)
    made.seed = seed
    return made.build()
