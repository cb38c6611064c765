"""A machine small enough to think about: one address space, natively or behind EPT, with code, data, stacks and gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Program
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import Profile, load_profile
from vtsim.ept import spec as e
from vtsim.ept.tables import EPT, EPT_PAGE, PAGING, Table, host_table
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.capabilities import Capabilities
from vtsim.vmcs.controls import WORDS
from vtsim.vmcs.generations import GENERATIONS
from vtsim.vmcs.spec import SLOT

Write = Callable[[Assembler], None]

TEXT = -0x7F000000  # 0xffffffff81000000, ring 0
USER_TEXT = 0x400000
DATA, DATA_PAGES = 0x600000, 8  # ring 3 may use it too
KERNEL_STACK = -0x360000000000  # tops of the stacks
USER_STACK = 0x7FFF_FFFF_F000
TABLES = -0x310000000000  # IDT, TSS (ring 0), two pages
INTERRUPT_STACK = TABLES + 0x1000 + 0x1000
# nothing comes into caches but what was asked for
NO_STREAMER = {"cache.streamer.entries": 0}
NO_PREFETCHERS = {**NO_STREAMER, "cache.adjacent_line_prefetcher": False, "cache.next_line_prefetcher": False}
CS0, SS0, CS3, SS3 = 0x10, 0x18, 0x33, 0x2B

OFF = {
    f"{path}.entries": 0
    for path in (
        "tlb.dtlb4k", "tlb.dtlb2m", "tlb.dtlb1g", "tlb.itlb4k", "tlb.itlb2m", "tlb.stlb", "tlb.stlb1g", "pwc.pml5e",
        "pwc.pml4e", "pwc.pdpte", "pwc.pde", "ept_pwc.pml5e", "ept_pwc.pml4e", "ept_pwc.pdpte", "ept_pwc.pde", "nested_tlb",
    )
}  # fmt: skip


@cache
def profile(name: str = "skx-4114", *overrides: tuple[str, Any]) -> Profile:
    """A shipped profile with some values replaced."""
    return load_profile(name).with_overrides(dict(overrides))


def machine(
    changes: Mapping[str, Any] | None = None,
    *,
    cpus: int = 1,
    threads: int = 1,
    memory: int = 32 << 20,
    name: str = "skx-4114",
) -> Engine:
    """An engine whose frames are handed out in order from 16 on."""
    engine = Engine(
        profile(name, *sorted((changes or {}).items())),
        Geometry(
            cpus=cpus, threads=threads, memory_bytes=memory, pool_pages=600, code_pages=24, rows=4096, owners=2,
            trace_rows=256,
        ),
    )  # fmt: skip
    engine.frames_from(16, (memory >> 12) - 16, shuffled=False, seed=0)
    engine.cpus[:, s.TIMER_RATE] = 0  # tests count the VMX-preemption timer in cycles
    return engine


@define(eq=False)
class Space:
    """An address space of one engine, behind EPT or not."""

    engine: Engine
    ept: Table | None = None
    frames: dict[int, int] = field(factory=dict)  # gfn -> hfn, behind EPT
    table: Table = field(init=False)
    programs: list[Program] = field(factory=list)
    tss: int = TABLES + 0x1000

    def __attrs_post_init__(self) -> None:
        self.table = Table(root=self.take(), format=PAGING, take=self.take, words=self.words)
        for n in range(DATA_PAGES):
            self.page(DATA + 0x1000 * n)
        for n in range(2):
            self.page(TABLES + 0x1000 * n, user=False)
            self.page(KERNEL_STACK - 0x1000 * (n + 1), user=False)
            self.page(USER_STACK - 0x1000 * (n + 1))
        self.put(self.tss + 4, KERNEL_STACK)
        self.put(self.tss + 36, INTERRUPT_STACK)

    def take(self) -> int:
        """A new frame of this space's physical memory."""
        if self.ept is None:
            return self.engine.allocate()
        gfn = 0x100 + len(self.frames)
        self.frames[gfn] = self.engine.allocate()
        self.ept.map(gfn << 12, self.frames[gfn], EPT_PAGE)
        return gfn

    def hfn(self, frame: int) -> int:
        return frame if self.ept is None else self.frames[frame]

    def words(self, frame: int) -> npt.NDArray[np.int64]:
        return self.engine.contents(self.hfn(frame), mem.TABLE)

    def page(self, gva: int, *, user: bool = True, write: bool = True, extra: int = 0) -> int:
        """Map a fresh frame at a linear page; its number. Neither accessed nor dirty."""
        frame = self.take()
        flags = e.PTE_PRESENT | (e.PTE_USER if user else 0) | (e.PTE_WRITE if write else 0) | extra
        self.table.map(gva, frame, flags)
        return frame

    def hpa(self, gva: int) -> int:
        """Where a mapped linear address is in host-physical memory."""
        leaf = self.table.find(gva)
        assert leaf is not None, hex(gva)
        frame = leaf.frame + ((gva >> 12) & ((1 << 9 * leaf.size) - 1))
        return self.hfn(frame) << 12 | (gva & 0xFFF)

    def put(self, gva: int, value: int, size: int = 8) -> None:
        """Store bytes anywhere, also across pages."""
        for n in range(size):
            place, byte = divmod(self.hpa(gva + n), 8)
            kept = self.engine.load(place * 8) & ~(0xFF << 8 * byte)
            self.engine.store(place * 8, kept | ((value >> 8 * n) & 0xFF) << 8 * byte)

    def get(self, gva: int, size: int = 8) -> int:
        """Load bytes from anywhere, signed if 8."""
        value = 0
        for n in range(size):
            place, byte = divmod(self.hpa(gva + n), 8)
            value |= ((self.engine.load(place * 8) >> 8 * byte) & 0xFF) << 8 * n
        return mem.signed(value) if size == 8 else value

    def code(self, write: Write, base: int = TEXT, activity: int = o.APPLICATION) -> Program:
        """Assemble a program and map it for its ring."""
        a = Assembler("test", base, activity=activity)
        write(a)
        program = a.assemble()
        for page, _ in program.pages():
            if self.table.find(page) is None:
                self.page(page, user=base > 0, write=False)
        self.engine.place(program, lambda page: self.hpa(page) >> 12)
        self.programs.append(program)
        return program

    def gate(
        self,
        vector: int,
        handler: int,
        *,
        dpl: int = 0,
        ist: int = 0,
        trap: bool = False,
        present: bool = True,
    ) -> None:
        """Write a 64-bit gate of the IDT."""
        kind = 0xF if trap else 0xE
        low = (handler & 0xFFFF) | CS0 << 16 | ist << 32 | kind << 40 | dpl << 45 | present << 47
        self.put(TABLES + 16 * vector, low | (handler >> 16 & 0xFFFF) << 48)
        self.put(TABLES + 16 * vector + 8, handler >> 32 & 0xFFFF_FFFF)

    def state(self, rip: int, ring: int = 0) -> dict[int, int]:
        """The architectural state at the start, by record slot."""
        return {
            s.RIP: rip, s.CR3: self.table.root << 12, s.IDTR_BASE: TABLES, s.IDTR_LIMIT: 0xFFF, s.TR_BASE: self.tss,
            s.RFLAGS: 2, s.CR0: 0x80050033, s.CR4: 0x20A0, s.EFER: 0xD01,
            s.CS_SELECTOR: CS3 if ring else CS0, s.SS_SELECTOR: SS3 if ring else SS0,
            s.SS_ACCESS_RIGHTS: 0xC093 | (ring << 5), s.CS_ACCESS_RIGHTS: 0xA09B | (ring << 5), s.GDTR_LIMIT: 0xFFFF,
            s.DR7: 0x400, s.TR_SELECTOR: 0x40,
        }  # fmt: skip

    def stack(self, ring: int) -> int:
        return (USER_STACK if ring else KERNEL_STACK) - 64


@define(eq=False)
class Native:
    """A program on the machine itself."""

    engine: Engine
    space: Space = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.space = Space(self.engine)

    @property
    def m(self) -> npt.NDArray[np.int64]:
        record: npt.NDArray[np.int64] = self.engine.cpus[0]
        return record

    def reg(self, register: int) -> int:
        return int(self.m[s.GPR + register])

    def start(self, rip: int = TEXT, ring: int = 0) -> None:
        """Put the CPU at `rip` in a ring."""
        for slot, value in self.space.state(rip, ring).items():
            self.m[slot] = value
        self.m[s.GPR + s.RSP] = self.space.stack(ring)
        self.m[s.PRIVILEGE] = o.R3 if ring else o.R0
        self.engine.sync()

    def run(self, write: Write, ring: int = 0, ops: int = 10_000) -> int:
        """Assemble, start and run a program; the stop code."""
        base = USER_TEXT if ring else TEXT
        self.space.code(write, base)
        self.start(base, ring)
        return self.engine.run(ops=ops)


def native(changes: Mapping[str, Any] | None = None, **more: Any) -> Native:
    return Native(machine(changes, **more))


HOST_TEXT = -0x7E000000
CONTROL_WORDS = {word.field: word for word in WORDS}
UNUSABLE = 0x10000
SAVED = 96  # where the host program keeps exits of a guest: rows of (reason, qualification, length, rip) at DATA


@define(eq=False)
class Virtual(Native):
    """A program in a guest behind EPT; the host's program records each exit and resumes past the instruction, or stops.

    `skip` exits are stepped over, all others end the run with the guest's state in the VMCS.
    """

    guest: Space = field(init=False)
    vmcs: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        ept = host_table(self.engine, EPT)
        self.guest = Space(self.engine, ept)
        self.vmcs = self.engine.allocate()
        words = self.engine.contents(self.vmcs, mem.VMCS_REGION)
        words[h.V_OWNER], words[h.V_EXIT_REASON] = self.engine.owner("vm"), -1
        words[h.V_REVISION] = self.m[s.VMX_REVISION]
        self.space.put(DATA + 0x800, self.vmcs << 12)
        region = self.engine.allocate()
        self.engine.store(region << 12, int(self.m[s.VMX_REVISION]))
        self.space.put(DATA + 0x808, region << 12)
        self.set(
            PRIMARY_PROC_CONTROLS=b.ACTIVATE_SECONDARY_CONTROLS | b.USE_MSR_BITMAPS | b.HLT_EXITING,
            SECONDARY_PROC_CONTROLS=b.ENABLE_EPT | b.ENABLE_VPID | b.ENABLE_RDTSCP | b.ENABLE_INVPCID,
            PIN_CONTROLS=b.EXTERNAL_INTERRUPT_EXITING, EPT_POINTER=ept.root << 12 | 0x1E, VPID=1,
            EXIT_CONTROLS=b.EXIT_HOST_ADDRESS_SPACE_SIZE | b.EXIT_SAVE_IA32_EFER | b.EXIT_LOAD_IA32_EFER
            | b.EXIT_SAVE_DEBUG_CONTROLS,
            ENTRY_CONTROLS=b.ENTRY_IA32E_MODE_GUEST | b.ENTRY_LOAD_IA32_EFER | b.ENTRY_LOAD_DEBUG_CONTROLS,
            MSR_BITMAPS=self.engine.allocate() << 12, IO_BITMAP_A=self.engine.allocate() << 12,
            IO_BITMAP_B=self.engine.allocate() << 12, VIRTUAL_APIC_ADDRESS=self.engine.allocate() << 12,
            VMCS_LINK_POINTER=-1,
        )  # fmt: skip

    @property
    def words(self) -> npt.NDArray[np.int64]:
        return self.engine.contents(self.vmcs, mem.VMCS_REGION)

    @property
    def capabilities(self) -> Capabilities:
        """What the processor's VMX can do."""
        return GENERATIONS[self.engine.profile.vmx.generation].capabilities()

    def set(self, **fields: int) -> None:
        """Write fields from outside; a control word gets the reserved bits that the processor asks for."""
        for name, value in fields.items():
            word = CONTROL_WORDS.get(name)
            self.words[SLOT[name]] = mem.signed(self.capabilities.adjust(word, value) if word else value)
        self.words[h.V_CHECKED] = 0

    def field(self, name: str) -> int:
        return int(self.words[SLOT[name]])

    def host(self, handler: Write | None = None) -> None:
        """Write the host's program: VMX on, launch, then `handler` at each exit (default: stop)."""

        def write(a: Assembler) -> None:
            a.op(o.VMXON, mem=o_mem(DATA + 0x808))
            a.op(o.VMPTRLD, mem=o_mem(DATA + 0x800))
            a.op(o.VMLAUNCH)
            a.op(o.STOP_OP, imm=99)  # the entry failed
            a.label("exit")
            (handler or (lambda a: a.op(o.STOP_OP, imm=1)))(a)

        program = self.space.code(write, HOST_TEXT, o.EXIT_HANDLER)
        self.set(
            HOST_RIP=program.labels["exit"], HOST_RSP=KERNEL_STACK - 64, HOST_CR3=self.space.table.root << 12,
            HOST_CR0=0x80050033, HOST_CR4=0x20A0, HOST_IA32_EFER=0xD01, HOST_CS_SELECTOR=CS0, HOST_SS_SELECTOR=SS0,
            HOST_IDTR_BASE=TABLES, HOST_TR_BASE=self.space.tss, HOST_TR_SELECTOR=0x40,
        )  # fmt: skip

    def enter(self, rip: int, ring: int = 0) -> None:
        """Let the VMCS hold the guest's start and the CPU stand at the host program."""
        words = self.words
        for slot, value in self.guest.state(rip, ring).items():
            words[v.GUEST_START + slot - s.STATE] = value
        words[v.GUEST_ES_ACCESS_RIGHTS : v.GUEST_TR_ACCESS_RIGHTS] |= UNUSABLE
        words[[v.GUEST_CS_ACCESS_RIGHTS, v.GUEST_SS_ACCESS_RIGHTS]] &= ~UNUSABLE
        words[[v.GUEST_CS_LIMIT, v.GUEST_SS_LIMIT]] = 0xFFFFFFFF
        words[v.GUEST_TR_LIMIT], words[v.GUEST_TR_ACCESS_RIGHTS] = 0x67, 0x8B
        words[h.V_CHECKED] = 0
        words[v.GUEST_RSP] = self.guest.stack(ring)
        self.start(HOST_TEXT)

    def run(self, write: Write, ring: int = 0, ops: int = 10_000, handler: Write | None = None) -> int:
        base = USER_TEXT if ring else TEXT
        self.guest.code(write, base)
        self.host(handler)
        self.enter(base, ring)
        return self.engine.run(ops=ops)

    @property
    def reason(self) -> int:
        """Why the last exit happened."""
        return self.field("EXIT_REASON")


def virtual(changes: Mapping[str, Any] | None = None, **more: Any) -> Virtual:
    return Virtual(machine(changes, **more))


def o_mem(address: int, size: int = 8) -> Any:
    """An absolute memory operand."""
    from vtsim.cpu.assembler import Mem

    return Mem(displacement=address, size=size)


END = 0x77  # a guest that came so far stops with this


def exits(bench: Virtual, write: Callable[[Assembler], None], ring: int = 0) -> int | None:
    """The reason of the first exit of a program, or None if it ran to its end without one."""

    def whole(a: Assembler) -> None:
        write(a)
        a.op(o.STOP_OP, imm=END)

    bench.set(EXIT_REASON=0xFFFF)
    stop = bench.run(whole, ring)

    assert stop == 4
    return None if int(bench.m[s.STOP_A]) == END else bench.reason
