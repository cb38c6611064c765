"""A monitor for recorded guests that handles exits in Python: the rules of kvm_intel, nothing of its cost.

It shows what the engine does with a recorded guest without any hypervisor of ours: every exit comes from controls,
bitmaps and EPT entries that stand in simulated memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np
from attrs import Factory, define, field

from vtsim.base import memory as mem
from vtsim.base.jit import quiet
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.codes import PLATFORM_HOOK, PROGRAM_END
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.kernels.invalidate import drop_guest_physical
from vtsim.cpu.profile import Profile
from vtsim.ept import spec as e
from vtsim.ept.tables import PAGING, host_table
from vtsim.guest.replay.build import RESET_RFLAGS, Recording, lay_out
from vtsim.guest.replay.exits import REASON_SHIFT, exit_log
from vtsim.guest.traces.paging import RESET_CR0
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.controls import WORDS
from vtsim.vmcs.fields import SLOT
from vtsim.vmcs.generations import GENERATIONS

# fmt: off
EXITED: Final = 200                   # the hook that hands an exit to Python
HOST_VECTOR: Final = 0xF3
PRIMARY: Final = (b.HLT_EXITING | b.MOV_DR_EXITING | b.UNCONDITIONAL_IO_EXITING | b.USE_MSR_BITMAPS
                  | b.ACTIVATE_SECONDARY_CONTROLS)
SECONDARY: Final = b.ENABLE_EPT | b.ENABLE_VPID | b.WBINVD_EXITING | b.UNRESTRICTED_GUEST
EXIT: Final = b.EXIT_ACKNOWLEDGE_INTERRUPT | b.EXIT_SAVE_IA32_EFER | b.EXIT_HOST_ADDRESS_SPACE_SIZE
HOST_CR0, HOST_CR4 = 0x8000_0031, 0x2020
EXCEPTIONS: Final = 1 << 1 | 1 << 6 | 1 << 17 | 1 << 18     # #DB #UD #AC #MC
CR0_GUEST: Final = 1 << 3                                   # TS
CR4_GUEST: Final = sum(1 << n for n in (1, 2, 3, 7, 8, 9, 10, 16))
PASSED_THROUGH: Final = (0x174, 0x175, 0x176, 0xC000_0100, 0xC000_0101, 0xC000_0102)
READ_THROUGH: Final = 0x10
RAM_END: Final = 0x800_0000
APIC_PAGE: Final = 0xFEE00
MISCONFIGURED: Final = 0x6            # write and execute without read
WRITE_BACK: Final = 6 << 3
LARGE: Final = 1 << 7
R, W, X = 1, 2, 4
# fmt: on


class FlatMap:
    """Guest-physical memory of pc-i440fx with 128 MiB, from its PAM registers."""

    def __init__(self) -> None:
        self.pam = dict.fromkeys(range(0x59, 0x60), 0)
        self.address = 0
        self.slots = self.flat()

    def flat(self) -> list[tuple[int, int, str]]:
        parts = [(0, 0xC0000, "ram")]
        nibbles = [(0xC0000 + n * 0x4000, 0x4000, self.pam[0x5A + n // 2] >> 4 * (n & 1) & 3) for n in range(12)]
        nibbles.append((0xF0000, 0x10000, self.pam[0x59] >> 4 & 3))
        for base, size, value in nibbles:
            rom = "pc.rom" if base < 0xE0000 else "isa-bios"
            parts.append((base, base + size, {0: rom, 2: rom, 1: "ram-ro", 3: "ram"}[value]))
        parts += [(0x100000, RAM_END, "ram"), (0xFFFC0000, 1 << 32, "pc.bios")]
        merged = parts[:1]
        for part in parts[1:]:
            if part[2] == merged[-1][2] and part[0] == merged[-1][1]:
                merged[-1] = (merged[-1][0], part[1], part[2])
            else:
                merged.append(part)
        return merged

    def out(self, port: int, value: int, size: int) -> bool:
        """A port write; has the map changed?"""
        if port == 0xCF8:
            self.address = value
            return False
        if port & ~3 != 0xCFC or self.address & 0x7FFF_FF00:
            return False
        first = (self.address & 0xFC) + (port & 3)
        for n in range(size):
            if first + n in self.pam:
                self.pam[first + n] = value >> 8 * n & 0xFF
        before, self.slots = self.slots, self.flat()
        return self.slots != before

    def slot(self, gpa: int) -> tuple[int, int, str] | None:
        return next((part for part in self.slots if part[0] <= gpa < part[1]), None)


@define(eq=False)
class Monitor:
    """One recorded guest in a VM on one CPU."""

    engine: Engine
    recording: Recording
    huge_pages: bool
    nx_huge_pages: bool
    apic_slot: bool
    vmcs: np.ndarray
    root: int
    flat: FlatMap = Factory(FlatMap)
    small: set[int] = Factory(set)
    huge: set[int] = Factory(set)
    written: set[int] = Factory(set)
    retried: tuple[int, int] = (0, 0)
    steps: dict[int, Callable[[int], None]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.steps = {
            x.EPT_VIOLATION: self.violation,
            x.EPT_MISCONFIG: self.emulate_device,
            x.IO_INSTRUCTION: self.port,
            x.EXTERNAL_INTERRUPT: self.interrupt,
            x.CR_ACCESS: self.control_register,
            x.DR_ACCESS: self.debug_register,
            x.EXCEPTION_NMI: self.reflect,
        }

    @property
    def m(self) -> np.ndarray:
        return self.engine.cpus[0]

    # --- EPT ---------------------------------------------------------------------------------------------
    def entry(self, gpa: int, leaf: int) -> tuple[np.ndarray, int]:
        """The table that holds the entry of a level, and its index there; tables above are made."""
        table = self.root
        for level in range(4, leaf, -1):
            words = self.engine.contents(table, mem.TABLE)
            index = gpa >> (3 + 9 * level) & 511
            if not int(words[index]) & 7 or int(words[index]) & LARGE:
                words[index] = self.engine.allocate() << 12 | R | W | X
            table = int(words[index]) >> 12
        return self.engine.contents(table, mem.TABLE), gpa >> (3 + 9 * leaf) & 511

    def map(self, gpa: int, rights: int, level: int = 1) -> None:
        hpa = gpa & -(1 << (3 + 9 * level))
        if gpa >= RAM_END:  # firmware: its contents do not matter here
            hpa = (self.recording.trace.guest.memory_bytes * 2) - 4096
        words, index = self.entry(gpa, level)
        words[index] = hpa | rights | WRITE_BACK | (LARGE if level == 2 else 0)
        self.flush()

    def flush(self) -> None:
        with quiet():
            drop_guest_physical(self.m, self.engine.arena, 0)

    def zap(self) -> None:
        self.engine.contents(self.root, mem.TABLE)[:] = 0
        self.small.clear()
        self.huge.clear()
        self.flush()

    def violation(self, qualification: int) -> None:
        gpa = int(self.vmcs[v.GUEST_PHYSICAL_ADDRESS])
        access = qualification & 7
        slot = self.flat.slot(gpa)
        if slot is None:
            if gpa >> 12 == APIC_PAGE and self.apic_slot:
                return self.apic_page(gpa, access)
            words, index = self.entry(gpa, 1)
            words[index] = MISCONFIGURED
            return self.emulate_device(qualification)
        begin, end, kind = slot
        region, page = gpa >> 21, gpa >> 12
        large = self.huge_pages and kind == "ram" and begin <= region << 21 and end >= region + 1 << 21
        writable = kind == "ram"
        if access & W and not writable:
            return self.emulate_device(qualification)
        if large and region not in self.small:
            if not access & X or not self.nx_huge_pages:
                self.huge.add(region)
                self.map(gpa, R | W | (0 if self.nx_huge_pages else X), 2)
                return None
            self.small.add(region)
            if region in self.huge:
                words, index = self.entry(region << 21, 2)
                words[index] = 0
                self.huge.discard(region)
        if access & W and (qualification >> 3) & 7 and writable and not self.huge_pages:
            words, index = self.entry(gpa, 1)  # the zero page is given up: the mapping goes first
            words[index] = 0
            self.written.add(page)
            return self.flush()
        if access & W:
            self.written.add(page)
        loaded = page >= 0x100
        full = writable and (self.huge_pages or loaded or page in self.written)
        return self.map(gpa, R | X | (W if full else 0))

    def apic_page(self, gpa: int, access: int) -> None:
        this = (int(self.vmcs[v.GUEST_RIP]), gpa)
        if access & R and self.retried != this:
            self.retried = this
            return
        self.retried = (0, 0)
        self.skip()

    # --- the rest ------------------------------------------------------------------------------------------
    def skip(self) -> None:
        self.vmcs[v.GUEST_RIP] += self.vmcs[v.EXIT_INSTRUCTION_LENGTH]

    def emulate_device(self, qualification: int) -> None:
        del qualification
        self.retried = (0, 0)
        self.skip()

    def port(self, qualification: int) -> None:
        size, port = (qualification & 7) + 1, qualification >> 16 & 0xFFFF
        registers = self.m[s.GPR : s.GPR + 16]
        if qualification & 0x20 and registers[s.RCX]:
            registers[s.RCX] = 0
            return
        if not qualification & 8 and self.flat.out(port, int(registers[s.RAX]), size):
            self.zap()
        self.skip()

    def interrupt(self, qualification: int) -> None:
        del qualification
        self.m[s.APIC_ISR : s.APIC_ISR + 4] = 0
        vector = self.engine.load(int(self.m[s.WIRE_MESSAGE]))
        self.vmcs[v.ENTRY_INTERRUPTION_INFORMATION] = 1 << 31 | vector

    def control_register(self, qualification: int) -> None:
        number, kind = qualification & 15, qualification >> 4 & 3
        value = int(self.m[s.GPR + (qualification >> 8 & 15)])
        if kind == 0 and number in (0, 4):
            shadow, field_ = (v.CR0_READ_SHADOW, v.GUEST_CR0) if number == 0 else (v.CR4_READ_SHADOW, v.GUEST_CR4)
            self.vmcs[shadow] = self.vmcs[field_] = value
        elif kind == 0:
            self.vmcs[v.GUEST_CR3] = value
        self.skip()

    def debug_register(self, qualification: int) -> None:
        del qualification
        self.vmcs[v.PRIMARY_PROC_CONTROLS] &= ~b.MOV_DR_EXITING

    def reflect(self, qualification: int) -> None:
        self.vmcs[v.ENTRY_INTERRUPTION_INFORMATION] = self.vmcs[v.EXIT_INTERRUPTION_INFORMATION]
        self.vmcs[v.ENTRY_EXCEPTION_ERROR_CODE] = self.vmcs[v.EXIT_INTERRUPTION_ERROR_CODE]
        self.m[s.CR2] = qualification

    def exits(self) -> Counter[str]:
        """Exits so far by reason."""
        reasons = exit_log(self.engine)[:, 0] >> REASON_SHIFT
        return Counter(x.BY_NUMBER[reason].name for reason in reasons.tolist())

    def qualifications(self) -> Counter[int]:
        """EPT violations so far by exit qualification."""
        log = exit_log(self.engine)
        return Counter(log[log[:, 0] >> REASON_SHIFT == x.EPT_VIOLATION, 1].tolist())

    def run(self) -> None:
        """Replay to the end."""
        armed = int(self.vmcs[v.PRIMARY_PROC_CONTROLS]) & b.MOV_DR_EXITING
        while True:
            code = self.engine.run()
            if code == PROGRAM_END:
                self.engine.check_clock()
                return
            assert code == PLATFORM_HOOK, code
            self.vmcs[v.PRIMARY_PROC_CONTROLS] |= armed
            reason = int(self.vmcs[v.EXIT_REASON])
            vectoring = int(self.vmcs[v.IDT_VECTORING_INFORMATION])
            if vectoring:
                self.vmcs[v.ENTRY_INTERRUPTION_INFORMATION] = vectoring
                self.vmcs[v.ENTRY_INSTRUCTION_LENGTH] = self.vmcs[v.EXIT_INSTRUCTION_LENGTH]
            step = self.steps.get(reason)
            if step:
                step(int(self.vmcs[v.EXIT_QUALIFICATION]))
            else:
                self.skip()


def monitor(
    profile: Profile,
    recording: Recording,
    *,
    huge_pages: bool = True,
    nx_huge_pages: bool = True,
    apic_slot: bool = True,
    fields: dict[int, int] | None = None,
) -> Monitor:
    """A machine with one VM that is about to start; `fields` overrides VMCS fields by slot."""
    ram = recording.trace.guest.memory_bytes
    engine = Engine(
        profile, Geometry(memory_bytes=2 * ram + (64 << 20), pool_pages=1 << 14, extra_words=recording.words)
    )
    engine.frames_from((2 * ram) >> 12, (64 << 20) >> 12, shuffled=False, seed=1)
    rip = lay_out(engine, recording, engine.extra)
    frame = {name: engine.allocate() for name in ("program", "vmcs", "root", "bitmap", "message")}
    a = Assembler("monitor", frame["program"] << 12, activity=o.EXIT_HANDLER)
    a.hook(EXITED)
    a.label("enter")
    a.op(o.VMRESUME)
    program = a.assemble()
    engine.place(program, lambda page: page >> 12)
    table = host_table(engine, PAGING)
    table.map(program.base, program.base >> 12, e.PTE_PRESENT)
    bitmap = engine.contents(frame["bitmap"], mem.BITMAP)
    bitmap[:] = -1
    for index in (*PASSED_THROUGH, READ_THROUGH):
        for write in (False, True):
            if write and index == READ_THROUGH:
                continue
            bit = (index & 0x1FFF) + (1024 * 8 if index >> 28 else 0) + (2048 * 8 if write else 0)
            bitmap[bit >> 6] &= ~np.int64(np.uint64(1 << (bit & 63)).astype(np.int64))
    vmcs = engine.contents(frame["vmcs"], mem.VMCS_REGION)
    values = {
        h.V_OWNER: engine.owner("guest"), h.V_EXIT_REASON: -1, h.V_LAUNCHED: h.LAUNCHED,
        v.PIN_CONTROLS: b.EXTERNAL_INTERRUPT_EXITING, v.PRIMARY_PROC_CONTROLS: PRIMARY,
        v.SECONDARY_PROC_CONTROLS: SECONDARY, v.EXIT_CONTROLS: EXIT,
        v.ENTRY_CONTROLS: b.ENTRY_LOAD_IA32_EFER, v.EXCEPTION_BITMAP: EXCEPTIONS,
        v.CR0_GUEST_HOST_MASK: ~CR0_GUEST, v.CR4_GUEST_HOST_MASK: ~CR4_GUEST,
        v.CR0_READ_SHADOW: RESET_CR0, v.CR4_READ_SHADOW: 0, v.GUEST_CR0: RESET_CR0, v.GUEST_CR4: 0,
        v.MSR_BITMAPS: frame["bitmap"] << 12, v.EPT_POINTER: frame["root"] << 12 | 1 << 6 | 3 << 3 | 6, v.VPID: 1,
        v.GUEST_RIP: rip, v.GUEST_RFLAGS: RESET_RFLAGS, v.GUEST_SS_ACCESS_RIGHTS: 0xC093, v.VMCS_LINK_POINTER: -1,
        v.HOST_RIP: frame["program"] << 12, v.HOST_CR0: HOST_CR0, v.HOST_CR3: table.root << 12, v.HOST_CR4: HOST_CR4,
        v.HOST_CS_SELECTOR: 0x10, v.HOST_SS_SELECTOR: 0x18, v.HOST_TR_SELECTOR: 0x40,
        **(fields or {}),
    }  # fmt: skip
    capabilities = GENERATIONS[profile.vmx.generation].capabilities()
    for word in WORDS:
        if SLOT[word.field] in values:  # reserved bits as the processor asks for them
            values[SLOT[word.field]] = capabilities.adjust(word, values[SLOT[word.field]])
    for slot, value in values.items():
        vmcs[slot] = value
    m = engine.cpus[0]
    m[s.VMXON], m[s.VMCS_POINTER] = 1, frame["vmcs"] << 12
    m[s.VMCS] = int(mem.contents(engine.arena, frame["vmcs"]))
    m[s.CR0], m[s.CR3], m[s.CR4], m[s.RIP] = HOST_CR0, table.root << 12, HOST_CR4, program.labels["enter"]
    m[s.WIRE_HOST_VECTOR], m[s.WIRE_MESSAGE] = HOST_VECTOR, frame["message"] << 12
    engine.sync()
    return Monitor(engine, recording, huge_pages, nx_huge_pages, apic_slot, vmcs, frame["root"])
