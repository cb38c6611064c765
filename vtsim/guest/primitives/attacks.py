"""Attacks as programs: what they read is put where the process's log line has room, for whoever measures.

Not modelled: attacks by side channels, by faulty microcode, by rowhammer; accesses to devices' memory.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.memory import signed
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import PAGE, Assembler, Mem
from vtsim.ept import direct
from vtsim.ept import spec as e
from vtsim.guest import attack_spec as spec
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel import layout
from vtsim.guest.kernel.dma_map import name_of
from vtsim.guest.kernel.hypercalls import look_up
from vtsim.guest.primitives import Stage, again, counted_in_r12, lowering

# fmt: off
TOP_INDEX: Final = 384                        # an entry of the fourth-level table that no kernel here uses
WINDOW: Final = signed(0xFFFF << 48 | TOP_INDEX << 39)
LOOT: Final = layout.L_LOOT                  # offset in the log line: what was read
MARK: Final = 0x5AFE_5AFE                     # what is written
TO_TABLE: Final = e.PTE_PRESENT | e.PTE_WRITE | e.PTE_ACCESSED
LEAF: Final = TO_TABLE | e.PTE_DIRTY
LARGE: Final = 1 << 7
X2APIC_SELF_IPI: Final = 0x83F
EFER: Final = 0xC000_0080
MULTIPLIER, INCREMENT = 6364136223846793005, 1442695040888963407  # Knuth's MMIX generator
FUZZED: Final = {s.RAX: 8, s.RBX: 64, s.RCX: 64, s.RDX: 64, s.RSI: 64, s.RDI: 64}  # bits of each that are random
MACHINE_BITS: Final = 29                      # of an address that most machines have
# bits that are changed: write protection, time-stamp disable, SYSCALL enable
CHANGED: Final = {"cr0": 1 << 16, "cr4": 1 << 2, "efer": 1}
ELSEWHERE: Final = layout.DIRECT + PAGE       # where a descriptor table is said to be
UNMAPPED: Final = layout.DIRECT + (1 << 30) - (1 << 21)  # with less than 1 GiB, an address that has no last-level table
WAITS: Final = 20_000                         # looks for what another vCPU should have done
# fmt: on


@lowering(spec.AttackMemorySpec, ring=0)
def attack_memory(a: Assembler, phase: spec.AttackMemorySpec, at: Stage) -> None:
    """Pages of the kernel stack that are free become page tables; the address is read through them, then written."""
    level = layout_of(phase.page_size)
    a.ld(s.RBX, layout.cpu_word(layout.CURRENT))
    a.ld(s.R12, Mem(s.RBX, layout.T_STACK_TOP))
    a.mov(s.R13, layout.DIRECT)
    a.sub(s.R12, 2 * PAGE)
    a.mov(s.R8, phase.target & ~(phase.page_size - 1) | LEAF | (LARGE if level < 3 else 0))
    for _ in range(level - 1):  # from the top: an entry of one page leads to the page below it
        a.copy(s.RDX, s.R12)
        a.sub(s.RDX, PAGE)
        a.sub(s.RDX, register=s.R13)
        a.or_(s.RDX, TO_TABLE)
        a.st(Mem(s.R12), s.RDX)
        a.sub(s.R12, PAGE)
    a.st(Mem(s.R12), s.R8)
    a.add(s.R12, (level - 1) * PAGE)
    a.sub(s.R12, register=s.R13)
    a.or_(s.R12, TO_TABLE)
    a.op(ops.MOV_FROM_CR, s.RAX, imm=3)
    a.mov(s.RCX, e.ADDRESS)
    a.and_(s.RAX, register=s.RCX)
    a.add(s.RAX, register=s.R13)
    if phase.levels == 5:  # the kernel's half is behind the last entry
        a.ld(s.RAX, Mem(s.RAX, 8 * 511))
        a.and_(s.RAX, register=s.RCX)
        a.add(s.RAX, register=s.R13)
    a.st(Mem(s.RAX, 8 * TOP_INDEX), s.R12)
    a.mov(s.RSI, WINDOW + (phase.target & (phase.page_size - 1)))
    a.op(ops.INVLPG, mem=Mem(s.RSI))
    take(a)


def take(a: Assembler) -> None:
    """Read what is at the linear address RSI, keep it where it is found afterwards, and write over it."""
    a.ld(s.RBX, layout.cpu_word(layout.CURRENT))
    a.ld(s.RAX, Mem(s.RSI))
    a.ld(s.RDI, Mem(s.RBX, layout.T_LOG))
    a.st(Mem(s.RDI, LOOT), s.RAX)
    a.mov(s.RAX, MARK)
    a.st(Mem(s.RSI), s.RAX)


@lowering(spec.AttackLinearSpec, ring=0)
def attack_linear(a: Assembler, phase: spec.AttackLinearSpec, at: Stage) -> None:
    """A linear address is read and written."""
    a.mov(s.RSI, extended(phase.target))
    take(a)


def layout_of(page_size: int) -> int:
    """How many tables below the top one lead to a page of this size."""
    return {1 << 30: 1, 1 << 21: 2, 1 << 12: 3}[page_size]


@lowering(spec.AttackNativeSpec, ring=0)
def attack_native(a: Assembler, phase: spec.AttackNativeSpec, at: Stage) -> None:
    """Native methods by VMCALL: a load, a store."""
    a.mov(s.RBX, extended(phase.target))
    a.mov(s.RAX, layout.NATIVE_LOAD)
    a.op(ops.VMCALL)
    a.ld(s.RSI, layout.cpu_word(layout.CURRENT))
    a.ld(s.RDI, Mem(s.RSI, layout.T_LOG))
    a.st(Mem(s.RDI, LOOT), s.RAX)
    a.mov(s.RCX, MARK)
    a.mov(s.RAX, layout.NATIVE_STORE)
    a.op(ops.VMCALL)


@lowering(spec.AttackDmaSpec, ring=0)
def attack_dma(a: Assembler, phase: spec.AttackDmaSpec, at: Stage) -> None:
    """Two descriptors of 8 bytes at the address, after each of which the device is waited for: it reads, it writes."""
    assert at.dma is not None
    a.mov(s.R15, at.dma.port)
    for writes in (0, d.DEVICE_WRITES):
        a.mov(s.RDI, phase.target & -PAGE)
        a.mov(s.RSI, 1)
        a.call(name_of("map", 1))
        a.add(s.RAX, phase.target & PAGE - 1)
        a.ld(s.RDX, Mem(s.R15, d.P_PRODUCER))
        a.copy(s.RCX, s.RDX)
        a.and_(s.RCX, d.RING_ENTRIES - 1)
        a.shl(s.RCX, 4)
        a.ld(s.RBX, Mem(s.R15, d.P_RING))
        a.add(s.RCX, register=s.RBX)
        a.st(Mem(s.RCX), s.RAX)
        a.mov(s.RAX, 8 | d.CARRIES | writes)
        a.st(Mem(s.RCX, 8), s.RAX)
        a.add(s.RDX, 1)
        a.st(Mem(s.R15, d.P_PRODUCER), s.RDX)
        a.ld(s.RCX, Mem(s.R15, d.P_DOORBELL))
        a.st(Mem(s.RCX, size=4), s.RDX, "the doorbell")
        a.copy(s.RSI, s.RDX)
        a.call("dma_poll")


def extended(address: int) -> int:
    """A linear address of 48 bits, sign-extended."""
    return (address ^ 1 << 47) - (1 << 47)


def change_state(a: Assembler, register: str) -> None:
    """Change a privileged register."""
    if register in ("cr0", "cr4"):
        number = int(register[2:])
        a.op(ops.MOV_FROM_CR, s.RAX, imm=number)
        a.emit(ops.XOR, s.RAX, imm=CHANGED[register])
        a.op(ops.MOV_TO_CR, s.RAX, imm=number)
    elif register == "efer":
        a.mov(s.RCX, EFER)
        a.op(ops.RDMSR)
        a.emit(ops.XOR, s.RAX, imm=CHANGED[register])
        a.op(ops.WRMSR)
    elif register == "tr":
        a.mov(s.RAX, layout.TASK_STATE)
        a.mov(s.RDX, ELSEWHERE)
        a.op(ops.LTR, s.RAX, s.RDX)
    else:
        a.mov(s.RAX, ELSEWHERE)
        a.push(s.RAX)
        a.push(value=0xFFF)
        a.op(ops.LIDT if register == "idt" else ops.LGDT, mem=Mem(s.RSP))
        a.add(s.RSP, 16)


@lowering(spec.AttackStateSpec, ring=0)
def attack_state(a: Assembler, phase: spec.AttackStateSpec, at: Stage) -> None:
    """A privileged register is changed by the kernel."""
    change_state(a, phase.register)


@lowering(spec.AttackStateUserSpec)
def attack_state_user(a: Assembler, phase: spec.AttackStateUserSpec, at: Stage) -> None:
    """A privileged register is changed by a process, which its kernel then ends."""
    change_state(a, phase.register)


@lowering(spec.AttackInterruptsSpec, ring=0)
def attack_interrupts(a: Assembler, phase: spec.AttackInterruptsSpec, at: Stage) -> None:
    """Self-IPIs by the x2APIC, interrupts off."""
    a.op(ops.CLI)
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    a.mov(s.RCX, X2APIC_SELF_IPI)
    a.mov(s.RAX, phase.vector)
    a.mov(s.RDX, 0)
    a.op(ops.WRMSR)
    again(a, label)


def call(a: Assembler, how: str) -> None:
    """A hypercall by the instruction that the hypervisor answers."""
    if how == "syscall":
        a.call("hypercall")
    else:
        a.op(ops.VMCALL)


@lowering(spec.AttackHypercallsSpec, ring=0)
def attack_hypercalls(a: Assembler, phase: spec.AttackHypercallsSpec, at: Stage) -> None:
    """Hypercalls with constants drawn beforehand from a generator that the seed begins."""
    drawn = at.seed
    for number in range(at.scaled(phase.iterations)):
        for register, bits in FUZZED.items():
            drawn = (drawn * MULTIPLIER + INCREMENT) & (1 << 64) - 1
            of_machine = phase.tables and register in (s.RDI, s.RSI)
            a.mov(register, drawn >> 64 - (MACHINE_BITS if of_machine else bits))
        if phase.tables and number % 4:
            a.mov(s.RAX, (direct.CALL_REQUEST, direct.CALL_UPDATE_VA)[number & 1])
        call(a, phase.call)


@lowering(spec.AttackUpdateSpec, ring=0)
def attack_update(a: Assembler, phase: spec.AttackUpdateSpec, at: Stage) -> None:
    """The entry of a free page of the kernel stack is to lead to the frame; or to its table, then the next entry."""
    a.ld(s.RBX, layout.cpu_word(layout.CURRENT))
    a.ld(s.R12, Mem(s.RBX, layout.T_STACK_TOP))
    a.sub(s.R12, 3 * PAGE)
    a.copy(s.RSI, s.R12)
    look_up(a)
    a.mov(s.R13, phase.target & -PAGE | LEAF | e.PTE_USER)
    a.copy(s.RSI, s.R13)
    if phase.by == "table":
        a.copy(s.RSI, s.R11)
        a.and_(s.RSI, -PAGE)
        a.or_(s.RSI, LEAF | e.PTE_USER)
    a.copy(s.RDI, s.R11)
    a.mov(s.RAX, direct.CALL_REQUEST)
    call(a, phase.call)
    flush_page(a, phase.call)
    if phase.by == "table":
        a.and_(s.R11, PAGE - 1)
        a.emit(ops.XOR, s.R11, imm=8)
        a.add(s.R11, register=s.R12)
        a.st(Mem(s.R11), s.R13)
        a.emit(ops.XOR, s.R12, imm=PAGE)
        flush_page(a, phase.call)
    a.copy(s.RSI, s.R12)
    a.add(s.RSI, phase.target & PAGE - 1)
    take(a)


@lowering(spec.AttackStaleSpec, ring=0)
def attack_stale(a: Assembler, phase: spec.AttackStaleSpec, at: Stage) -> None:
    """A free page of the first thread's kernel stack is made read-only and a table; then the other thread stores to it.

    The page above it says how far they are: written to by the second, made a table by the first, written to again.
    """

    def wait(word: int) -> None:
        """Until the other is so far, or for so long that it never will be."""
        a.mov(s.RCX, WAITS)
        label = a.label(at.label(f"wait_{word}"))
        a.ld(s.RAX, Mem(s.R12, PAGE + 8 * word))
        a.test(s.RAX, -1)
        a.jcc(ops.CC_NZ, at.label(f"come_{word}"))
        a.op(ops.PAUSE)
        a.loop(label)
        a.label(at.label(f"come_{word}"))

    a.ld(s.RBX, layout.cpu_word(layout.CURRENT))
    a.ld(s.RDI, Mem(s.RBX, layout.T_SPACE))
    a.ld(s.R12, Mem(s.RDI, layout.T_STACK_TOP))
    a.sub(s.R12, 3 * PAGE)
    a.cmp(s.RDI, register=s.RBX)
    a.jcc(ops.CC_Z, at.label("first"))
    a.st_value(Mem(s.R12), 0)
    a.st_value(Mem(s.R12, PAGE), 1)
    wait(1)
    a.mov(s.RAX, phase.target & -PAGE | LEAF | e.PTE_USER)
    a.st(Mem(s.R12), s.RAX)
    a.st_value(Mem(s.R12, PAGE + 16), 1)
    a.jmp(at.label("done"))
    a.label(at.label("first"))
    wait(0)
    a.copy(s.RSI, s.R12)
    look_up(a)
    a.copy(s.R13, s.RAX)
    a.and_(s.R13, ~(e.PTE_WRITE | e.PTE_DIRTY))
    update(a, s.R13)
    a.mov(s.RCX, e.ADDRESS)
    a.and_(s.R13, register=s.RCX)
    a.or_(s.R13, TO_TABLE)
    a.mov(s.R14, UNMAPPED)
    a.copy(s.RSI, s.R14)
    look_up(a)
    update(a, s.R13)
    a.st_value(Mem(s.R12, PAGE + 8), 1)
    wait(2)
    a.copy(s.RSI, s.R14)
    a.add(s.RSI, phase.target & PAGE - 1)
    take(a)
    a.label(at.label("done"))


def update(a: Assembler, entry: int) -> None:
    """The entry that was looked up is to be the one in a register."""
    a.copy(s.RDI, s.R11)
    a.copy(s.RSI, entry)
    a.mov(s.RAX, direct.CALL_REQUEST)
    a.op(ops.VMCALL)


def flush_page(a: Assembler, how: str) -> None:
    """Translations of the address in R12 are dropped."""
    a.mov(s.RDI, direct.FLUSH_PAGE)
    a.copy(s.RSI, s.R12)
    a.mov(s.RAX, direct.CALL_REQUEST)
    call(a, how)


@lowering(spec.AttackTimeSpec, ring=0)
def attack_time(a: Assembler, phase: spec.AttackTimeSpec, at: Stage) -> None:
    """CLI, and ordinary instructions for ever."""
    a.op(ops.CLI)
    a.label(at.label("loop"))
    a.mov(s.RCX, 1 << 40)
    a.emit(ops.LONG_WORK)
    a.jmp(at.label("loop"))
