"""What each kind of recorded row becomes: ops and events of the engine, as a table that does nothing.

A field is a number or the name of a column: one of the trace, or one that `lower.columns` derives.
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtsim.cpu import ops as o
from vtsim.cpu.assembler import NO_MEMORY, Mem
from vtsim.cpu.kernels import replay as e
from vtsim.cpu.slots import NO_REGISTER, RAX, RBX, RDX

Operand = int | str
NOWHERE: Final = NO_MEMORY.packed
ABSOLUTE: Final = Mem(displacement=1).packed  # an absolute address, 8 bytes
ABSOLUTE_4: Final = Mem(displacement=1, size=4).packed
FIELDS: Final = ("r1", "r2", "imm", "mem", "disp", "extra")


@frozen
class Step:
    """One row of a lowered program."""

    op: int
    r1: Operand = NO_REGISTER
    r2: Operand = NO_REGISTER
    imm: Operand = 0
    mem: Operand = NOWHERE
    disp: Operand = 0
    extra: Operand = 0


def event(kind: int, second: Operand = 0, imm: Operand = 0, disp: Operand = 0, extra: Operand = 0) -> Step:
    """A recorded event."""
    return Step(o.REPLAY_EVENT, kind, second, imm, NOWHERE, disp, extra)


def registers(rax: Operand = 0, rcx: Operand = 0, rdx: Operand = 0) -> Step:
    """What the instructions before, which are only counted, left in registers."""
    return event(e.REGISTERS, 0, rax, rcx, rdx)


def like(op: int) -> tuple[Step, ...]:
    """An instruction whose operands were not recorded."""
    return (event(e.LIKE, op),)


def ring(op: int) -> tuple[Step, ...]:
    """An instruction that changes the ring."""
    return (event(e.RING, op, "ring"),)


def access(kind: int) -> tuple[Step, ...]:
    """A first touch."""
    return (event(e.ACCESS, kind, "a0", "a1"),)


READ, WRITE, FETCH = range(3)
# fmt: off
STEPS: Final[dict[str, tuple[Step, ...]]] = {
    "CPUID":       (registers("a0", "a1"), Step(o.CPUID)),
    "RDMSR":       (registers(0, "a0"), Step(o.RDMSR)),
    "WRMSR":       (registers("low", "a0", "high"), Step(o.WRMSR)),
    "IN":          (registers(0, 0, "port"), Step(o.IN, r2=RDX, mem="port_operand")),
    "OUT":         (registers("a1", 0, "port"), Step(o.OUT, r2=RDX, mem="port_operand")),
    "MMIO_R":      (Step(o.LD, RAX, mem="device_operand", disp="a0", extra="a1"),),
    "MMIO_W":      (registers("a1"), Step(o.ST, RAX, mem="device_operand", disp="a0")),
    "MOV_TO_CR":   (registers("a1"), Step(o.MOV_TO_CR, RAX, imm="a0")),
    "MOV_FROM_CR": (Step(o.MOV_FROM_CR, RBX, imm="a0"),),
    "CLTS":        (Step(o.CLTS),),
    "LMSW":        like(o.LMSW),
    "INVLPG":      (Step(o.INVLPG, mem=ABSOLUTE, disp="a0"),),
    "INVPCID":     (registers("a1", "a2", "a0"), *like(o.INVPCID)),
    "HLT":         (event(e.WIRE, 0, "next_vector", "halted_cycles"), Step(o.HLT), event(e.WAIT)),
    "PAUSE":       (Step(o.PAUSE),),
    "RDTSC":       (Step(o.RDTSC),),
    "RDTSCP":      (Step(o.RDTSCP),),
    "SYSCALL":     ring(o.SYSCALL),
    "SYSRET":      ring(o.SYSRET),
    "EXC":         (event(e.EXCEPTION, "has_error", "a0", "a1", "a2"),),
    "IRQ":         (event(e.WIRE, 0, "a0"), event(e.WAIT)),
    "IRET":        ring(o.IRET),
    "WBINVD":      (Step(o.WBINVD),),
    "INVD":        (Step(o.INVD),),
    "XSETBV":      (registers("low", "a0", "high"), Step(o.XSETBV)),
    "MOV_TO_DR":   (registers("a1"), Step(o.MOV_TO_DR, RAX, imm="a0")),
    "MOV_FROM_DR": (Step(o.MOV_FROM_DR, RBX, imm="a0"),),
    "LGDT":        like(o.LGDT),
    "LIDT":        (*like(o.LIDT), event(e.IDT, 0, "a0", "a1")),
    "LTR":         like(o.LTR),
    "LLDT":        like(o.LLDT),
    "MONITOR":     like(o.MONITOR),
    "MWAIT":       (event(e.WIRE, 0, "next_vector", "halted_cycles"), Step(o.MWAIT), event(e.WAIT)),
    "VMCALL":      (registers(), Step(o.VMCALL)),
    "RDPMC":       (registers(), Step(o.RDPMC)),
    "RDRAND":      (Step(o.RDRAND, RAX),),
    "RDSEED":      (Step(o.RDSEED, RAX),),
    "SYSENTER":    ring(o.SYSENTER),
    "INTN":        (Step(o.INT, imm="a0"),),
    "SMSW":        (Step(o.SMSW, RBX),),
    "TOUCH_R":     access(READ),
    "TOUCH_W":     access(WRITE),
    "TOUCH_F":     access(FETCH),
    "RETOUCH_R":   access(READ),
    "RETOUCH_W":   access(WRITE),
    "RETOUCH_F":   access(FETCH),
    "REARM":       (),   # the OUT before it says the same
    "PTW":         (event(e.TABLE_WRITE, 0, "entry", "a1"),),
    "ROOT":        (),   # a statement about memory, not an access
    "LEAF_R":      (event(e.WALK, READ, "leaf", "a0"),),
    "LEAF_W":      (event(e.WALK, READ, "leaf", "a0"),),
    "LEAF_F":      (event(e.WALK, READ, "leaf", "a0"),),
}
# fmt: on
# rows that are not instructions of their own
EVENTS: Final = tuple(
    name
    for name in STEPS
    if name in ("EXC", "IRQ", "REARM", "PTW", "ROOT") or name.startswith(("TOUCH", "RETOUCH", "LEAF"))
)  # fmt: skip
DELIVERED: Final = ("EXC", "IRQ", "INTN")
CHANGES_RING: Final = ("SYSCALL", "SYSRET", "EXC", "IRQ", "IRET", "SYSENTER", "INTN")
HALTS: Final = ("HLT", "MWAIT")
# what a loop that waits for time to pass consists of; a longer body is a repetition, not a wait
CLOCKS: Final = ("IN", "MMIO_R", "MMIO_W", "PAUSE", "RDTSC", "RDTSCP")
SPIN_INSTRUCTIONS: Final = 64
SHORT_WORK: Final = 256  # instructions; longer work can be interrupted anywhere
WITH_ERROR_CODE: Final = (8, 10, 11, 12, 13, 14, 17, 21)
