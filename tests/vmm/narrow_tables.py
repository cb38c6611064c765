"""A guest with 32-bit addresses, PAE or 32-bit paging, that changes its own paging structures at random.

As `changing_tables`, also with rings: what it must see is worked out by a slow walker. The first 2 GiB are fixed. Its code is 64-bit code,
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
    CODE_FRAMES,
    CR4_PGE,
    CR4_SMEP,
    DATA_FRAMES,
    FIRST_DATA,
    FIRST_FREE,
    FIRST_TABLE,
    IDT,
    LOG,
    LOG_WORDS,
    NX,
    PS,
    RING_3,
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
    G,
    P,
    Plan,
    emit_handlers,
    fill_idt,
    place_rings,
    signed,
)
from vtsim.base import memory as mem
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.machine_view import PhysicalMemory, Start

# fmt: off
FIXED_DIRECTORIES = (0x1E0, 0x1E1)      # with PAE paging: of the first 2 GiB
ROOT_FRAMES = (0x1F0, 0x1F1)
LARGE_FRAMES = (1024, 2048)
FLAG_63_TO_52 = 1 << 60
WIDE_RESERVED = 1 << 21
CR0, CR0_WP = 0x80050033, 1 << 16
GDT = TSS + 0x800
FLAT = {2: 0xCF9B000000FFFF, 3: 0xCF93000000FFFF, 5: 0xCFF3000000FFFF, 6: 0xCFFB000000FFFF}  # descriptors; last: ring 3
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
    smep: bool = False  # is it switched on and off?

    @property
    def cr4(self) -> int:
        return self.pae << 5 | self.pse << 4 | CR4_PGE | self.smap << 21

    @property
    def word(self) -> int:
        """Bytes of a word of a stack frame."""
        return 4 if self.protected else 8


@define
class NarrowPlan(Plan):
    """A random program and its expected log."""

    loaded: tuple[int, int, int, int] = (0, 0, 0, 0)  # PDPTEs
    started: tuple[int, int, int, int] = (0, 0, 0, 0)  # those before the first instruction
    held: dict[int, list[int]] = field(factory=dict)
    cr4: int = 0
    write_protect: bool = True

    def __attrs_post_init__(self) -> None:
        self.cr4 = self.paging.cr4
        frames = [*ROOT_FRAMES, *TABLES[2], *TABLES[1]]
        self.words = Words({frame: [0] * 512 for frame in frames})
        for root in self.tops:
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
        if self.paging.rings:
            self.used = {at for at, level in self.leaves() if level > 1 and self.get(at, self.words.__getitem__) & A}
            self.forget_globals(self.addresses)

    # --- the format
    @property
    def tops(self) -> tuple[int, int]:
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
        one, two, three, four = (self.words[self.tops[root] + 8 * n] for n in range(4))
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
        rings = self.paging.rings
        if level == 2:
            if (pae or pse) and c.random() < 0.3:
                wrong = WIDE_RESERVED if c.random() < 0.1 and not pae else 0
                kept = c.choice((0, 0, G)) if rings else 0
                return c.choice(LARGE_FRAMES) << 12 | P | rights | flags | PS | wrong | kept
            ignored = PS if not pae and not pse and c.random() < 0.5 else 0
            used = c.choice((0, A)) if rings else A
            return c.choice(TABLES[1]) << 12 | P | rights | used | ignored
        if rings:
            flags |= c.choice((0, 0, G))
        if rings and c.random() < 0.3:
            return c.choice(CODE_FRAMES) << 12 | P | rights | flags
        frame = FIRST_DATA + c.randrange(DATA_FRAMES) if c.random() < 0.9 else c.choice(TABLES[1])
        return frame << 12 | P | (rights if frame >= FIRST_DATA else rights & NX) | flags

    def maps(self, level: int, entry: int) -> bool:
        return level == 1 or (level == 2 and entry & PS != 0 and (self.paging.pae or self.paging.pse))

    def path(self, root: int, address: int) -> tuple[int, ...]:
        kept = ~0 if self.paging.rings else ~A
        table = root
        found = []
        if self.paging.pae:
            pdptes = self.loaded if root == self.tops[self.root] else self.pdptes(self.tops.index(root))
            found = [pdptes[address >> 30]]
            table = found[0] & ~0xFFF
            if not found[0] & P:
                return (0,)
        for level in (2, 1):
            entry = self.get(self.slot(table, level, address), self.words.__getitem__)
            if not entry & P:
                return (*found, 0)
            if self.maps(level, entry):
                return (*found, entry)
            found.append(entry & kept)
            table = entry & 0xFFFFF000
        raise AssertionError

    def slot(self, table: int, level: int, address: int) -> int:
        """Where the entry of an address stands in a table."""
        shift = 3 + 9 * level if self.paging.pae else 2 + 10 * level
        return self.place(table, (address >> shift) & (511 if self.paging.pae else 1023))

    def upper_entries(self, address: int) -> set[int]:
        table = self.loaded[address >> 30] & ~0xFFF if self.paging.pae else self.tops[self.root]
        at = self.slot(table, 2, address)
        return set() if self.maps(2, self.get(at, self.words.__getitem__)) else {at}

    def to_globals(self, address: int) -> set[tuple[int, ...]]:
        path = self.path(self.tops[self.root], address)
        return {tuple(entry & ~(A | D) for entry in path)} if path[-1] & G and self.cr4 & CR4_PGE else set()

    def apply(self, change: Callable[[], None]) -> None:
        """Change tables, or what is loaded of them: what may have been kept of them is stale."""
        before = {a: self.path(self.tops[self.root], a) for a in self.addresses}
        change()
        for a, old in before.items():
            new = self.path(self.tops[self.root], a)
            if old != new and not (old[-1] == 0 and new[: len(old) - 1] == old[:-1]):
                self.stale[0].add(a)
        if self.paging.rings:
            self.may_keep()

    def write(self, at: int, value: int) -> None:
        """A store of the guest to one of its tables."""
        self.apply(lambda: self.put(at, value))
        (self.used.add if value & A else self.used.discard)(at)
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
                table = c.choice(self.tops) if top else c.choice(TABLES[level]) << 12
                self.write(self.place(table, c.choice(self.indexes[level])), self.entry(level))
            elif kind < 0.36:
                self.invalidate(self.likely(self.unsure() or self.stale[0]))
            elif kind < 0.46:
                self.load_root(c.randrange(2), False)
            elif kind < 0.48 and not self.paging.smap:
                self.write_protect = not self.write_protect
                self.write_register(0, CR0 & ~(0 if self.write_protect else CR0_WP))
            elif kind < 0.50:
                self.change_cr4(c.choice((CR4_PGE, CR4_SMEP)) if self.paging.smep else CR4_PGE)
            elif kind < 0.52 and self.paging.pae:
                self.wrong_pdpte()
            elif kind < 0.57 and self.paging.smap:
                self.alignment_check = not self.alignment_check
                self.emits.append(lambda a, op=ops.STAC if self.alignment_check else ops.CLAC: a.op(op))
            else:
                self.access()
        return self

    def change_cr4(self, flag: int = CR4_PGE) -> None:
        """CR4.PGE or CR4.SMEP changes: that flushes but for SMEP to 0, and with PAE paging the PDPTEs are loaded."""
        self.cr4 ^= flag
        self.apply(self.load_pdptes)
        if flag == CR4_PGE or self.cr4 & flag:
            self.stale[0].clear()
        if flag == CR4_PGE and self.paging.rings:
            self.forget_globals(self.addresses)
        self.write_register(4, self.cr4)

    def toggle_globals(self) -> None:
        self.change_cr4()
        self.change_cr4()

    def load_pdptes(self) -> None:
        self.loaded = self.pdptes(self.root)

    def wrong_pdpte(self) -> None:
        """One of the PDPTEs of a root has a reserved bit while they are to be loaded."""
        root = self.chance.randrange(2)
        place = self.place(self.tops[root], self.chance.choice(self.indexes[3]))
        wrong_cr4 = root == self.root and self.chance.random() < 0.5
        flag = self.chance.choice((CR4_PGE, CR4_SMEP)) if self.paging.smep else CR4_PGE
        self.refused_load(place, *((4, self.cr4 ^ flag) if wrong_cr4 else (3, self.tops[root])))

    def refused_load(self, place: int, register: int, value: int) -> None:
        """A PDPTE has a reserved bit for a while: a write of a register that loads it faults, and changes nothing."""
        before = self.words[place]
        self.write(place, TABLES[2][0] << 12 | P | self.chance.choice((WRITABLE, USER, A, NX, FLAG_63_TO_52)))
        number = len(self.log)
        self.log.append(Access(0, False, 0, 0))

        def emit(a: Assembler) -> None:
            for general, start in ((s.RAX, 0), (s.RBX, 0), (s.R14, -1), (s.R13, 0), (s.RCX, value)):
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

    def touch(self, address: int, store: bool, *, user: bool = False, fetch: bool = False) -> None:
        page = self.path(self.tops[self.root], address)[-1] >> 12 & 0xFFFFF
        store = store and (self.write_protect or page not in (*TABLES[1], *TABLES[2]))
        super().touch(address, store, user=user, fetch=fetch)

    def load_root(self, root: int, keep: bool) -> None:
        self.root = root
        self.load_pdptes()
        self.stale[0].clear()
        if self.paging.rings:
            self.may_keep()
        self.write_register(3, self.tops[root])

    def walker(self) -> LegacyWalker:
        return LegacyWalker(
            self.words, self.tops[self.root], pae=self.paging.pae, pse=self.paging.pse, pdptes=self.loaded,
            smap=self.paging.smap, alignment_check=self.alignment_check, wp=self.write_protect,
            smep=self.cr4 & CR4_SMEP != 0,
        )  # fmt: skip

    # --- the guest
    def fix(
        self, words: Callable[[int], np.ndarray], take: Callable[[], int], address: int, gfns: list[int], user: int = 0
    ) -> None:
        """Map pages of the first 2 GiB, for both roots."""
        for n, gfn in enumerate(gfns):
            at = address + 4096 * n
            if self.paging.pae:
                directory = words(FIXED_DIRECTORIES[at >> 30])
                index = (at >> 21) & 511
                if not directory[index]:
                    directory[index] = take() << 12 | P | WRITABLE | A | user
                words(int(directory[index]) >> 12)[(at >> 12) & 511] = gfn << 12 | P | WRITABLE | A | D | user
                continue
            table = self.held.get(at >> 22)
            if table is None:
                frame = take()
                for root in ROOT_FRAMES:
                    half = (frame << 12 | P | WRITABLE | A | user) << (32 if at >> 22 & 1 else 0)
                    words(root)[at >> 23] |= signed(half)
                table = self.held[at >> 22] = [frame]
            half = (gfn << 12 | P | WRITABLE | A | D | user) << (32 if at >> 12 & 1 else 0)
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
        emit_handlers(a, (13, 14), self.paging)
        program = a.assemble()
        frames = {}
        for page, _ in program.pages():
            gfn = take()
            self.fix(words, take, page, [gfn])
            frames[page] = memory.frame(gfn)
        memory.engine.place(program, frames.__getitem__)
        self.logs = [take() for _ in range(-(-len(self.log) * LOG_WORDS // 512) + 1)]
        idt, tss = take(), take()
        for address, gfns in (
            (LOG, self.logs), (STACK - 4096, [take()]), (IDT, [idt]), (TSS, [tss]),
            (WINDOW, list(range(WINDOW_FRAMES))),
        ):  # fmt: skip
            self.fix(words, take, address, gfns)
        if self.paging.rings:
            self.fix(words, take, RING_3, [place_rings(memory, take())], USER)
        for gfn in range(FIRST_DATA, FIRST_DATA + DATA_FRAMES):
            memory.store(gfn << 12, STAMP + gfn)
        for first in LARGE_FRAMES:
            for index in self.indexes[1]:
                memory.store(first + index << 12, STAMP + first + index)
        fill_idt(memory, idt, program, self.paging.word)
        memory.store(tss * 4096, STACK << 32)  # RSP0, or ESP0 and SS0, from byte 4 on
        memory.store(tss * 4096 + 8, 0x18 if self.paging.protected else 0)
        for index, descriptor in FLAT.items():
            memory.store(tss * 4096 + GDT - TSS + 8 * index, descriptor)
        protected = self.paging.protected
        return Start(
            rip=CODE, rsp=STACK, rflags=2, cr0=CR0, cr3=self.tops[0], cr4=self.paging.cr4, efer=0x801,
            idtr_base=IDT, idtr_limit=0x7FF if protected else 0xFFF, gdtr_base=GDT, gdtr_limit=0x7F, tr_base=TSS,
            cpl=0, msrs={}, gs_base=0, fs_base=0, protected=protected,
            pdptes=self.started if protected and self.paging.pae else (),
        )  # fmt: skip

    def leaves(self) -> Iterator[tuple[int, int]]:
        levels = (2, 1) if self.paging.pae else (1,)
        yield from ((self.place(t << 12, i), n) for n in levels for t in TABLES[n] for i in self.indexes[n])
        if not self.paging.pae:
            yield from ((self.place(root, i), 2) for root in self.tops for i in self.indexes[2])


def narrow_plan(seed: int, steps: int, paging: NarrowPaging) -> Plan:
    """The random program of a seed."""
    made = NarrowPlan(random.Random(seed), paging, steps)
    made.seed = seed
    return made.build()
