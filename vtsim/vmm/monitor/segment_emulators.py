"""Emulators of what asks for descriptors and segment registers, on the virtual CPU's tables and registers.

They find the number of register R1 in RCX, and in R8 what `EMULATORS` says: a selector, or the immediate.

SDM: "LAR—Load Access Rights Byte"; "LSL—Load Segment Limit"; "VERR/VERW—Verify a Segment for Reading or Writing";
"LLDT—Load Local Descriptor Table Register"; "RET—Return From Procedure".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels.modes import CS, FS
from vtsim.cpu.kernels.segment_ops import ACCESS_RIGHTS, LAR_TYPES, LSL_TYPES
from vtsim.cpu.slots import R8, R9, R10, R15, RAX, RCX, RDX, RSI, RSP
from vtsim.vmm.monitor.crossing import RING_3
from vtsim.vmm.monitor.layout import F_RIP, V, saved, vcpu
from vtsim.vmm.monitor.segments import (
    CODE,
    CONFORMING,
    INDEX,
    LOCAL,
    NULL,
    ORDINARY,
    READABLE,
    REGISTER,
    SELECTOR,
    TARGET,
    Ways,
    descriptor_base,
    descriptor_limit,
    field,
    ring,
    show,
    unless,
)

LDT_TYPE: Final = 2


def look(a: Assembler, ways: Ways, op: int) -> None:
    """LAR, LSL, VERR, VERW of selector R8."""
    name = ops.OPS[op].name
    a.st(REGISTER, RCX)
    a.and_(R8, 0xFFFF)
    a.test(R8, NULL)
    a.jcc(ops.CC_Z, f"{name}_refused")
    a.call("find_descriptor")
    unless(a, ops.CC_Z, R9, 0, f"{name}_refused")
    field(a, RDX, R10, 40, 0x1F)
    a.test(RDX, ORDINARY)
    a.jcc(ops.CC_NZ, f"{name}_ordinary")
    if op in (ops.LAR, ops.LSL):
        a.mov(RCX, LAR_TYPES if op == ops.LAR else LSL_TYPES)
        a.emit(ops.SHR, RCX, RDX)
        a.test(RCX, 1)
        a.jcc(ops.CC_NZ, f"{name}_privilege")
    a.jmp(f"{name}_refused")
    a.label(f"{name}_ordinary")
    field(a, RCX, RDX, 0, CODE | READABLE)
    if op == ops.VERR:
        unless(a, ops.CC_Z, RCX, CODE, f"{name}_refused")
    if op == ops.VERW:
        unless(a, ops.CC_NZ, RCX, READABLE, f"{name}_refused")
    field(a, RCX, RDX, 0, CODE | CONFORMING)
    unless(a, ops.CC_Z, RCX, CODE | CONFORMING, f"{name}_granted")
    a.label(f"{name}_privilege")
    field(a, RDX, R10, 45, RING_3)
    field(a, RCX, R8, 0, RING_3)
    a.cmp(RCX, register=RDX)
    a.jcc(ops.CC_A, f"{name}_refused")
    ring(a, RCX)
    a.cmp(RCX, register=RDX)
    a.jcc(ops.CC_A, f"{name}_refused")
    a.label(f"{name}_granted")
    a.mov(RAX, 0)
    if op == ops.LAR:
        field(a, RAX, R10, 32, ACCESS_RIGHTS)
    if op == ops.LSL:
        descriptor_limit(a, "LSL_in_bytes")
    if op in (ops.LAR, ops.LSL):
        a.ld(RCX, REGISTER)
        a.st(Mem(R15, V["REGISTERS"], index=RCX, scale=8), RAX)
        a.shl(RAX, 1)
    a.or_(RAX, 1)
    a.jmp(f"{name}_ends")
    a.label(f"{name}_refused")
    a.mov(R9, 0)
    a.mov(RAX, 0)
    a.label(f"{name}_ends")
    show(a, op)
    ways.zero_flag(a)
    a.jmp("skip")


def move_from(a: Assembler, ways: Ways) -> None:
    """MOV from segment register R8."""
    a.st(REGISTER, RCX)
    a.call("segment_selector")
    show(a, ops.MOV_FROM_SEGMENT)
    a.ld(RCX, REGISTER)
    a.st(Mem(R15, V["REGISTERS"], index=RCX, scale=8), RAX)
    a.jmp("skip")


def move_to(a: Assembler, ways: Ways) -> None:
    """MOV to segment register R8."""
    a.st(REGISTER, R8)
    a.ld(R8, Mem(R15, V["REGISTERS"], index=RCX, scale=8))
    a.call("load_segment")
    a.jmp("skip")


def push(a: Assembler, ways: Ways) -> None:
    """PUSH of segment register R8, FS or GS."""
    unless(a, ops.CC_B, R8, FS, ways.undefined)
    a.st(REGISTER, R8)
    a.call("segment_selector")
    a.copy(R8, RAX)
    a.ld(RSI, saved(RSP))
    a.sub(RSI, 8)
    ways.store(a)
    a.st(saved(RSP), RSI)
    a.copy(RAX, R8)
    a.ld(R8, REGISTER)
    show(a, ops.PUSH_SEGMENT)
    a.jmp("skip")


def pop(a: Assembler, ways: Ways) -> None:
    """POP of segment register R8, FS or GS."""
    unless(a, ops.CC_B, R8, FS, ways.undefined)
    a.st(REGISTER, R8)
    a.ld(RSI, saved(RSP))
    ways.load(a)
    a.copy(R8, RAX)
    a.call("load_segment")
    a.ld(RSI, saved(RSP))
    a.add(RSI, 8)
    a.st(saved(RSP), RSI)
    a.jmp("skip")


def far_jump(a: Assembler, ways: Ways) -> None:
    """JMP to the far pointer at RSI."""
    _pointer(a, ways)
    a.call("take_code")
    a.ld(RAX, TARGET)
    ways.go(a)


def far_call(a: Assembler, ways: Ways) -> None:
    """CALL of the far pointer at RSI."""
    _pointer(a, ways)
    a.st(SELECTOR, R8)
    a.mov(R8, CS)
    a.call("segment_selector")
    a.copy(R8, RAX)
    a.ld(RSI, saved(RSP))
    a.sub(RSI, 8)
    ways.store(a)
    a.ld(R8, F_RIP)
    a.ld(RAX, vcpu("LENGTH"))
    a.add(R8, register=RAX)
    a.sub(RSI, 8)
    ways.store(a)
    a.st(saved(RSP), RSI)
    a.add(RSI, 8)
    ways.load(a)
    a.ld(R8, SELECTOR)
    show(a, ops.CALL_FAR)
    a.call("take_code")
    a.ld(RAX, TARGET)
    ways.go(a)


def _pointer(a: Assembler, ways: Ways) -> None:
    """TARGET and R8 <- the far pointer at RSI, to where the guest may go."""
    ways.load(a)
    a.st(TARGET, RAX)
    a.add(RSI, 8)
    ways.load(a)
    a.copy(R8, RAX)
    a.call("find_code")


def far_return(a: Assembler, ways: Ways) -> None:
    """RET to another code segment of the same ring, releasing R8 bytes."""
    a.st(REGISTER, R8)
    a.ld(RSI, saved(RSP))
    _pointer(a, ways)
    a.call("take_code")
    a.ld(RSI, saved(RSP))
    a.ld(RAX, REGISTER)
    a.lea(RSI, Mem(RSI, 16, index=RAX))
    a.st(saved(RSP), RSI)
    a.ld(RAX, TARGET)
    ways.go(a)


def load_local_table(a: Assembler, ways: Ways) -> None:
    """LLDT of selector R8."""
    a.and_(R8, 0xFFFF)
    a.test(R8, NULL)
    a.jcc(ops.CC_NZ, "lldt_described")
    a.st_value(vcpu("LDT"), -1)
    a.jmp("lldt_ends")
    a.label("lldt_described")
    a.test(R8, LOCAL)
    a.jcc(ops.CC_NZ, "segment_protect")
    a.call("find_descriptor")
    unless(a, ops.CC_Z, R9, 0, "segment_protect")
    field(a, RDX, R10, 40, 0x1F)
    unless(a, ops.CC_NZ, RDX, LDT_TYPE, "segment_protect")
    field(a, RDX, R10, 47, 1)
    unless(a, ops.CC_Z, RDX, 0, "segment_absent")
    field(a, RSI, R8, 0, INDEX)
    a.ld(RAX, vcpu("GDTR", 1))
    a.add(RSI, register=RAX)
    a.add(RSI, 8)
    ways.table(a)
    a.shl(RAX, 32)
    a.copy(RSI, RAX)
    descriptor_base(a)
    a.or_(RSI, register=RAX)
    descriptor_limit(a, "lldt_in_bytes")
    a.st(vcpu("LDT"), RAX)
    a.st(vcpu("LDT", 1), RSI)
    a.label("lldt_ends")
    a.st(vcpu("LDTR"), R8)
    a.jmp("skip")


# fmt: off
Emulator = Callable[[Assembler, Ways], None]
# where an emulator finds R8: a selector in register R2 or R1, the immediate; RSI: a memory operand
BY_R2, BY_R1, BY_IMMEDIATE, BY_MEMORY = range(4)
EMULATORS: Final[Mapping[int, tuple[int, Emulator]]] = {
    ops.LAR: (BY_R2, partial(look, op=ops.LAR)),                ops.LSL: (BY_R2, partial(look, op=ops.LSL)),
    ops.VERR: (BY_R1, partial(look, op=ops.VERR)),              ops.VERW: (BY_R1, partial(look, op=ops.VERW)),
    ops.MOV_FROM_SEGMENT: (BY_IMMEDIATE, move_from),            ops.MOV_TO_SEGMENT: (BY_IMMEDIATE, move_to),
    ops.PUSH_SEGMENT: (BY_IMMEDIATE, push),                     ops.POP_SEGMENT: (BY_IMMEDIATE, pop),
    ops.JMP_FAR: (BY_MEMORY, far_jump),                         ops.CALL_FAR: (BY_MEMORY, far_call),
    ops.RET_FAR: (BY_IMMEDIATE, far_return),
}
PRIVILEGED_EMULATORS: Final[Mapping[int, tuple[int, Emulator]]] = {ops.LLDT: (BY_R1, load_local_table)}
# fmt: on
