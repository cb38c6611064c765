"""A small guest with direct page tables that makes requests of its own choice, and what must hold of its tables."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from attrs import define, evolve, field

from vtsim.base import memory as mem
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept import direct as d
from vtsim.ept import spec as e
from vtsim.ept.tables import KERNEL_PAGE, PAGING, Table
from vtsim.guest.machine_view import Start
from vtsim.vmm.memory import VmMemory

MIB = 1 << 20
MEMORY = 16 * MIB
CODE, STACK, IDT, TSS, LOG, SHARED, PROGRESS = (0x1000_0000 + n * 0x100_0000 for n in range(7))
NEXT_VCPU = 0x0800_0000  # from what a vCPU has of its own to that of the next: code, stack, log, shared page
WINDOW = 0x4000_0000  # all of guest memory
FREE = 0x400  # guest frames from here on are the guest's to play with
P, W, U, A, D, PS = e.PTE_PRESENT, e.PTE_WRITE, e.PTE_USER, e.PTE_ACCESSED, e.PTE_DIRTY, e.PTE_LARGE
VECTORS = (13, 14)
RING_3_CODE = 0x33
READ_ONLY = KERNEL_PAGE & ~(W | D)


@define(eq=False)
class DirectGuest:
    """What a guest's steps know of it while it is built: host-physical addresses, and how to make requests."""

    memory: VmMemory
    a: Assembler
    table: Table
    answers: int = 0
    ring3: bool = False
    vcpu: int = 0
    done: int = 0  # what it has told the other vCPUs

    def tell(self) -> int:
        """Let others know that it is here: how often it has, with this time."""
        self.done += 1
        self.a.st_value(Mem(displacement=PROGRESS + 8 * self.vcpu), self.done)
        return self.done

    def wait(self, vcpu: int, done: int) -> None:
        """Until another vCPU has told so many times."""
        name = f"wait_{self.a.here:x}"
        self.a.label(name)
        self.a.op(ops.PAUSE)
        self.a.ld(s.RAX, Mem(displacement=PROGRESS + 8 * vcpu))
        self.a.cmp(s.RAX, done)
        self.a.jcc(ops.CC_B, name)

    def machine(self, gfn: int) -> int:
        """The host-physical address of a guest frame."""
        return self.memory.frame(gfn) << 12

    def slot(self, address: int) -> int:
        """The host-physical address of the last-level entry of a linear address."""
        leaf = self.table.find(address)
        assert leaf is not None
        return leaf.table << 12 | leaf.index << 3

    def entry_of(self, gfn: int) -> int:
        """The same for a guest frame's place in the window."""
        return self.slot(WINDOW + (gfn << 12))

    def request(self, kind: int, value: int) -> None:
        """One request, whose answer is logged."""
        self.call(d.CALL_REQUEST, kind, value)

    def call(self, number: int, *arguments: int | str) -> None:
        """A hypercall, whose answer is logged; an argument may be a label."""
        for register, value in zip((s.RDI, s.RSI, s.RDX), arguments, strict=False):
            self.a.mov(register, value if isinstance(value, str) else mem.signed(value))
        self.a.mov(s.RAX, number)
        self.a.op(ops.SYSCALL if self.ring3 else ops.VMCALL)
        self.log(s.RAX)

    def log(self, register: int) -> None:
        """Log a register."""
        self.a.st(Mem(displacement=LOG + self.vcpu * NEXT_VCPU + 8 * self.answers), register)
        self.answers += 1

    def store(self, gfn: int, index: int, entry: int) -> None:
        """Store to a frame through the window."""
        self.a.st_value(Mem(displacement=WINDOW + (gfn << 12) + 8 * index), mem.signed(entry))

    def load(self, address: int) -> None:
        """Load from a linear address."""
        self.a.ld(s.RAX, Mem(displacement=address))

    def attempt(self, emit: Callable[[], None]) -> None:
        """Do what may fault; logged is the vector, or 0."""
        name = f"after_{self.answers}"
        self.a.mov(s.R14, 0)
        self.a.mov(s.R15, name)
        emit()
        self.a.label(name)
        self.log(s.R14)


Steps = Callable[[DirectGuest], None]


def _set_traps(a: Assembler) -> None:
    """Tell a hypervisor that has the kernel in ring 3 where faults go; a row is a vector and its handler."""
    for vector in VECTORS:
        a.mov(s.RAX, f"gate_{vector}")
        a.push(s.RAX)
        a.push(value=vector)
    a.copy(s.RDI, s.RSP)
    a.mov(s.RSI, len(VECTORS))
    a.mov(s.RAX, d.CALL_SET_TRAPS)
    a.op(ops.SYSCALL)
    a.add(s.RSP, 16 * len(VECTORS))


def direct_guest(steps: Steps, holder: dict[str, Any]) -> Callable[[Any], Start]:
    """A guest's builder; `holder` receives the guest, the frames of its tables' root and of its log."""
    return direct_guests((steps,), holder)


def direct_guests(steps: Sequence[Steps], holder: dict[str, Any]) -> Callable[[Any], Start]:
    """The same for a guest with the steps of each vCPU; it ends when all have done theirs."""

    def build(memory: VmMemory) -> Start:
        offer = memory.direct
        assert offer is not None
        numbers = iter(range(0x100, FREE))

        def take() -> int:
            return memory.frame(next(numbers))

        def words(hfn: int) -> np.ndarray:
            return memory.engine.contents(hfn, mem.TABLE)

        root = take()
        words(root)
        table = Table(root=root, format=PAGING, take=take, words=words)
        table.map(WINDOW, offer.machine(np.arange(MEMORY >> 12)), KERNEL_PAGE)
        guests = []
        for vcpu, its_steps in enumerate(steps):
            a = Assembler("direct guest", CODE + vcpu * NEXT_VCPU)
            guests.append(DirectGuest(memory, a, table, ring3=offer.ring3, vcpu=vcpu))
            if offer.ring3:
                _set_traps(a)
            its_steps(guests[-1])
        _end(guests)
        idt, logs, shared = next(numbers), [], []
        for guest in guests:
            program, shift = guest.a.assemble(), guest.vcpu * NEXT_VCPU
            frames = {}
            for page, _ in program.pages():
                frames[page] = take()
                table.map(page, [frames[page]], READ_ONLY)
            memory.engine.place(program, frames.__getitem__)
            logs.append([next(numbers) for _ in range(guest.answers // mem.PAGE_WORDS + 1)])
            shared.append(next(numbers))
            for address, hfns in (
                (STACK - 4096, [take()]), (LOG, list(map(memory.frame, logs[-1]))),
                (SHARED, [memory.frame(shared[-1])]),
            ):  # fmt: skip
                table.map(address + shift, hfns, KERNEL_PAGE)
            for vector in VECTORS if guest.vcpu == 0 else ():
                handler = program.labels[f"gate_{vector}"]
                low = (handler & 0xFFFF) | 0x10 << 16 | 0x8E << 40 | (handler >> 16) << 48
                memory.store(idt * 4096 + 16 * vector, low)
        for address, hfn in ((IDT, memory.frame(idt)), (TSS, take()), (PROGRESS, take())):
            table.map(address, [hfn], KERNEL_PAGE)
        holder.update(guest=guests[0], root=root, guests=guests, logs=logs)
        first = Start(
            rip=CODE, rsp=STACK, rflags=2, cr0=0x80050033, cr3=root << 12, cr4=0xA0, efer=0xD01,
            idtr_base=IDT, idtr_limit=0xFFF, gdtr_base=0, gdtr_limit=0x7F, tr_base=TSS, cpl=0, msrs={},
            gs_base=0, fs_base=0, roots=(root << 12,), shared=shared[0] << 12,
        )  # fmt: skip
        others = (
            evolve(first, rip=CODE + n * NEXT_VCPU, rsp=STACK + n * NEXT_VCPU, shared=shared[n] << 12)
            for n in range(1, len(steps))
        )
        return evolve(first, others=tuple(others))

    return build


def _end(guests: Sequence[DirectGuest]) -> None:
    """The first one stops when all have done their steps; handlers of exceptions are its, in ring 3 each one's own."""
    for guest in guests[1:]:
        guest.tell()
        guest.a.label("over")
        guest.a.op(ops.PAUSE)
        guest.a.jmp("over")
        guests[0].wait(guest.vcpu, guest.done)
    ring3 = guests[0].ring3
    guests[0].a.op(ops.STOP_OP)
    for a, vector in ((guest.a, vector) for guest in (guests if ring3 else guests[:1]) for vector in VECTORS):
        a.label(f"gate_{vector}")
        a.mov(s.R14, vector)
        a.add(s.RSP, 24 if ring3 else 8)
        a.st(Mem(s.RSP), s.R15)
        if ring3:
            a.st_value(Mem(s.RSP, 8), RING_3_CODE)
        a.op(ops.IRET)


def answers(holder: dict[str, Any], vcpu: int = 0) -> list[int]:
    """What a vCPU has logged."""
    guest = holder["guests"][vcpu]
    pages = holder["logs"][vcpu]
    per_page = mem.PAGE_WORDS
    return [guest.memory.load((pages[n // per_page] << 12) + n % per_page * 8) for n in range(guest.answers)]


@define(eq=False)
class Recount:
    """The types and counts of frames as the tables below some roots imply them, worked out anew."""

    words: Callable[[int], Any]
    levels: dict[int, int] = field(factory=dict)
    counts: dict[int, int] = field(factory=dict)
    writable: dict[int, int] = field(factory=dict)
    reached: set[int] = field(factory=set)
    own: range = range(0)  # entries of roots that are the hypervisor's

    def table(self, frame: int, level: int) -> None:
        """Somebody relies on a table."""
        self.counts[frame] = self.counts.get(frame, 0) + 1
        assert self.levels.setdefault(frame, level) == level
        if self.counts[frame] > 1:
            return
        for index, entry in enumerate(self.words(frame).tolist()):
            if not entry & P or (level == 4 and index in self.own):
                continue
            assert not entry & ~d.LEGAL
            target = (entry & e.ADDRESS) >> 12
            if level > 1:
                self.table(target, level - 1)
            else:
                self.reached.add(target)
                if entry & W:
                    self.writable[target] = self.writable.get(target, 0) + 1


def random_requests(seed: int, steps: int, roots: Sequence[int] = (d.PIN, d.UNPIN, d.LOAD)) -> Steps:
    """Requests of every kind on a few frames, sensible ones and others; some stores to frames, while they can be.

    `roots`: the kinds of those about roots.
    """

    def emit(guest: DirectGuest) -> None:
        chance = random.Random(seed)
        frames = [FREE + n for n in range(6)]

        def some() -> int:
            return chance.choice(frames)

        def place() -> int:
            kind = chance.random()
            if kind < 0.45:
                return guest.entry_of(some())
            return guest.machine(some()) | chance.choice((0, 1, 2, 511)) << 3

        def entry() -> int:
            if chance.random() < 0.2:
                return 0
            target = guest.machine(some()) if chance.random() < 0.95 else chance.randrange(1 << 13) << 12
            flags = P | (W if chance.random() < 0.4 else 0) | (PS if chance.random() < 0.03 else 0)
            return target | flags | chance.choice((0, A, U))

        for _ in range(steps):
            kind = chance.random()
            if kind < 0.2:
                gfn, index, what = some(), chance.choice((0, 1, 2, 511)), entry()
                guest.attempt(partial(guest.store, gfn, index, what))
            elif kind < 0.5:
                gfn = some()
                guest.request(guest.entry_of(gfn) | d.UPDATE, guest.machine(gfn) | chance.choice((P, P, P | W, 0)))
            elif kind < 0.85:
                guest.request(place() | d.UPDATE, entry())
            else:
                guest.request(chance.choice(roots), guest.machine(some()))

    return emit


def kept_words(words: Callable[[int], Any], first: int, frames: Iterator[int]) -> dict[int, int]:
    """What the hypervisor keeps of frames."""
    return {frame: int(words(first + frame // 512)[frame % 512]) for frame in frames}


def check_words(recount: Recount, kept: Mapping[int, int], owned: set[int], loaded: int) -> None:
    """The word kept of each frame is what the tables below the roots imply; the root that is loaded is one."""
    roots = [frame for frame, word in kept.items() if (word >> d.TYPE) & d.TYPE_MASK == 4]
    assert loaded in roots
    for root in roots:
        recount.table(root, 4)
    assert recount.reached | set(recount.levels) <= owned
    assert not set(recount.levels) & set(recount.writable)
    for frame, word in kept.items():
        expected = 1 << d.OWNER
        if frame in recount.levels:
            expected |= recount.levels[frame] << d.TYPE | recount.counts[frame]
        elif frame in recount.writable:
            expected |= d.WRITABLE << d.TYPE | recount.writable[frame]
        assert word == expected, hex(frame)
