"""Emulators of accesses to the virtual CPU's state: control and debug registers, MSRs, descriptor tables, flags.

SDM: "Privileged Instructions".
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R15, RAX, RBX, RCX, RDX, RSI, RSP
from vtsim.ept import shadow as d
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.entry import believed_flags, enter_flags
from vtsim.vmm.monitor.layout import F_RFLAGS, V, saved, vcpu
from vtsim.vmm.monitor.memory import forget_views

CR0_PG, CR0_WP, CR0_TS = 1 << 31, 1 << 16, 1 << 3
CR4_PAE, CR4_LA57, CR4_VMXE, CR4_PCIDE, CR4_SMEP = 1 << 5, 1 << 12, 1 << 13, 1 << 17, 1 << 20
EFER_NX, EFER_LONG = 1 << 11, 5 << 8
POPPED: Final = 0x254DD5  # bits of RFLAGS that POPF changes
EFER, GS_BASE, FS_BASE, KERNEL_GS_BASE = 0xC0000080, 0xC0000101, 0xC0000100, 0xC0000102
X2APIC_TPR, X2APIC_EOI, X2APIC_LVT_TIMER = 0x808, 0x80B, 0x832
X2APIC_INITIAL, X2APIC_CURRENT, X2APIC_DIVIDE, TSC_DEADLINE = 0x838, 0x839, 0x83E, 0x6E0
PASSED: Final = (FS_BASE, GS_BASE, KERNEL_GS_BASE, X2APIC_INITIAL, X2APIC_DIVIDE, TSC_DEADLINE)
TSC_AUX: Final = 0xC0000103
READ_ALSO: Final = (X2APIC_CURRENT, 0x10)
KEPT: Final = {0xC0000081: "STAR", 0xC0000082: "LSTAR", 0xC0000084: "FMASK", X2APIC_TPR: "CR8"}


WORDS: Final = {"LDTR": ops.SLDT, "TR": ops.STR, "CR0": ops.SMSW}


def show(a: Assembler, op: int) -> None:
    """The guest sees RAX, by an operation. RCX and RDX change."""
    a.mov(RCX, 0)
    a.mov(RDX, op)
    a.hook(hooks.SHOW)


def move_from_cr(a: Assembler) -> None:
    """MOV from CR: what the guest believes."""
    for number in (0, 2, 3, 4, 8):
        a.cmp(RBX, number)
        a.jcc(ops.CC_NZ, f"from_not_{number}")
        a.ld(RAX, vcpu(f"CR{number}"))
        a.jmp("put_register")
        a.label(f"from_not_{number}")
    a.jmp("reflect")
    a.label("put_register")
    a.st(Mem(R15, V["REGISTERS"], index=RCX, scale=8), RAX)
    a.jmp("skip")


def move_to_cr(a: Assembler) -> None:
    """MOV to CR: another address space, or another paging mode; what the monitor cannot let it change ends the VM."""
    a.ld(RAX, Mem(R15, V["REGISTERS"], index=RCX, scale=8))
    for number in (2, 8):
        a.cmp(RBX, number)
        a.jcc(ops.CC_NZ, f"to_not_{number}")
        a.st(vcpu(f"CR{number}"), RAX)
        a.jmp("skip")
        a.label(f"to_not_{number}")
    a.cmp(RBX, 3)
    a.jcc(ops.CC_NZ, "to_not_3")
    a.activity = ops.MEMORY_MANAGEMENT
    a.shl(RAX, 1)  # bit 63 is no part of the value: it says that translations may stay
    a.shr(RAX, 1)
    a.st(vcpu("CR3"), RAX)
    forget_views(a)
    a.call("view_find")
    a.jmp("skip")
    a.label("to_not_3")
    a.cmp(RBX, 0)
    a.jcc(ops.CC_Z, "to_0")
    a.cmp(RBX, 4)
    a.jcc(ops.CC_NZ, "reflect")
    a.ld(RDX, vcpu("CR4"))
    a.emit(ops.XOR, RDX, RAX)
    a.test(RDX, CR4_PAE | CR4_LA57 | CR4_VMXE)
    a.jcc(ops.CC_NZ, "illegal_cr")
    a.st(vcpu("CR4"), RAX)
    a.jmp("paging_mode")
    a.label("to_0")
    a.ld(RDX, vcpu("CR0"))
    a.emit(ops.XOR, RDX, RAX)
    a.test(RDX, CR0_PG | 1)
    a.jcc(ops.CC_NZ, "illegal_cr")
    a.st(vcpu("CR0"), RAX)
    a.label("paging_mode")
    a.mov(RBX, d.MODE_PAGING)
    for field, mask, mode in (("CR0", CR0_WP, d.MODE_WP), ("CR4", CR4_SMEP, d.MODE_SMEP), ("EFER", EFER_NX, d.MODE_NX)):
        a.ld(RAX, vcpu(field))
        a.test(RAX, mask)
        a.jcc(ops.CC_Z, f"mode_without_{mode}")
        a.or_(RBX, mode)
        a.label(f"mode_without_{mode}")
    a.st(vcpu("MODE"), RBX)
    forget_views(a)
    a.call("view_find")
    a.jmp("skip")
    a.label("illegal_cr")
    a.mov(RAX, ops.MOV_TO_CR)
    a.jmp("illegal")


def clear_ts(a: Assembler) -> None:
    """CLTS."""
    a.ld(RAX, vcpu("CR0"))
    a.and_(RAX, ~CR0_TS)
    a.st(vcpu("CR0"), RAX)
    a.jmp("skip")


def move_from_dr(a: Assembler) -> None:
    """MOV from DR6 and DR7; the others read as 0."""
    a.mov(RAX, 0)
    for number in (6, 7):
        a.cmp(RBX, number)
        a.jcc(ops.CC_NZ, f"from_not_dr{number}")
        a.ld(RAX, vcpu(f"DR{number}"))
        a.label(f"from_not_dr{number}")
    a.jmp("put_register")


def move_to_dr(a: Assembler) -> None:
    """MOV to DR6 and DR7."""
    a.ld(RAX, Mem(R15, V["REGISTERS"], index=RCX, scale=8))
    for number in (6, 7):
        a.cmp(RBX, number)
        a.jcc(ops.CC_NZ, f"to_not_dr{number}")
        a.st(vcpu(f"DR{number}"), RAX)
        a.label(f"to_not_dr{number}")
    a.jmp("skip")


def read_msr(a: Assembler) -> None:
    """RDMSR: from the structure, from the processor where the MSR is the guest's, from a table; else #GP."""
    a.ld(RCX, saved(RCX, 4))
    for index, field in {**KEPT, EFER: "EFER", X2APIC_LVT_TIMER: "TIMER_LVT"}.items():
        a.cmp(RCX, index)
        a.jcc(ops.CC_NZ, f"read_not_{field}")
        a.ld(RAX, vcpu(field))
        a.jmp("msr_value")
        a.label(f"read_not_{field}")
    for index in (*PASSED, *READ_ALSO):
        a.cmp(RCX, index)
        a.jcc(ops.CC_Z, "read_passed")
    a.call("find_msr")
    a.ld(RAX, Mem(RAX, 8))
    a.jmp("msr_value")
    a.label("read_passed")
    a.op(ops.RDMSR)
    a.jmp("msr_halves")
    a.label("msr_value")
    a.copy(RDX, RAX)
    a.shr(RDX, 32)
    a.shl(RAX, 32)
    a.shr(RAX, 32)
    a.label("msr_halves")
    a.copy(RBX, RDX)
    a.shl(RDX, 32)
    a.or_(RAX, register=RDX)
    a.mov(RDX, ops.RDMSR)
    a.ld(RCX, saved(RCX, 4))
    a.hook(hooks.SHOW)
    a.shl(RAX, 32)
    a.shr(RAX, 32)
    a.copy(RDX, RBX)
    a.st(saved(RAX), RAX)
    a.st(saved(RDX), RDX)
    a.jmp("skip")


def write_msr(a: Assembler) -> None:
    """WRMSR: the same the other way; the timer's vector becomes the monitor's."""
    a.ld(RCX, saved(RCX, 4))
    a.ld(RAX, saved(RAX, 4))
    a.ld(RDX, saved(RDX, 4))
    for index in PASSED:
        a.cmp(RCX, index)
        a.jcc(ops.CC_Z, "write_passed")
    a.cmp(RCX, X2APIC_EOI)
    a.jcc(ops.CC_NZ, "write_not_eoi")
    a.st_value(vcpu("IN_SERVICE"), 0)
    a.jmp("skip")
    a.label("write_not_eoi")
    a.shl(RDX, 32)
    a.or_(RAX, register=RDX)
    for index, field in KEPT.items():
        a.cmp(RCX, index)
        a.jcc(ops.CC_NZ, f"write_not_{field}")
        a.st(vcpu(field), RAX)
        a.jmp("skip")
        a.label(f"write_not_{field}")
    a.cmp(RCX, X2APIC_LVT_TIMER)
    a.jcc(ops.CC_NZ, "write_not_timer")
    a.st(vcpu("TIMER_LVT"), RAX)
    a.and_(RAX, ~0xFF)
    a.or_(RAX, at.TIMER_VECTOR)
    a.mov(RDX, 0)
    a.label("write_passed")
    a.op(ops.WRMSR)
    a.jmp("skip")
    a.label("write_not_timer")
    a.cmp(RCX, EFER)
    a.jcc(ops.CC_NZ, "write_table")
    a.ld(RDX, vcpu("EFER"))
    a.emit(ops.XOR, RDX, RAX)
    a.test(RDX, EFER_LONG)
    a.jcc(ops.CC_NZ, "illegal_efer")
    a.st(vcpu("EFER"), RAX)
    a.jmp("paging_mode")
    a.label("illegal_efer")
    a.mov(RAX, ops.WRMSR)
    a.jmp("illegal")
    a.label("write_table")
    a.copy(RBX, RAX)
    a.call("find_msr")
    a.ld(RDX, vcpu("MSR_READ_ONLY"))
    a.cmp(RAX, register=RDX)
    a.jcc(ops.CC_AE, "reflect")
    a.st(Mem(RAX, 8), RBX)
    a.jmp("skip")


def load_table(a: Assembler, field: str) -> None:
    """LGDT or LIDT."""
    a.call("operand")
    a.ld(RCX, Mem(RAX))
    a.and_(RCX, 0xFFFF)
    a.ld(RDX, Mem(RAX, 8))
    a.st(vcpu(field), RCX)
    a.st(vcpu(field, 1), RDX)
    a.jmp("skip")


def store_table(a: Assembler, field: str) -> None:
    """SGDT or SIDT, where they trap."""
    a.call("operand")
    a.ld(RCX, vcpu(field))
    a.ld(RDX, vcpu(field, 1))
    a.st(Mem(RAX), RCX)
    a.st(Mem(RAX, 8), RDX)
    show_table(a, field)
    a.jmp("skip")


def show_table(a: Assembler, field: str) -> None:
    """The guest sees the limit and the base of a table. Clobbers RAX, RCX and RDX."""
    op = ops.SGDT if field == "GDTR" else ops.SIDT
    for part in range(2):
        a.ld(RAX, vcpu(field, part))
        show(a, op | part << 8)


def store_word(a: Assembler, field: str) -> None:
    """SLDT, STR or SMSW, where they trap."""
    a.ld(RAX, vcpu(field))
    a.copy(RSI, RCX)
    show(a, WORDS[field])
    a.copy(RCX, RSI)
    a.jmp("put_register")


def read_xcr(a: Assembler) -> None:
    """XGETBV, where it traps: the processor's is the guest's, which cannot change it."""
    a.ld(RCX, saved(RCX, 4))
    a.cmp(RCX, 1)
    a.jcc(ops.CC_A, "reflect")
    a.op(ops.XGETBV)
    a.st(saved(RAX), RAX)
    a.st(saved(RDX), RDX)
    a.jmp("skip")


def read_tscp(a: Assembler) -> None:
    """RDTSCP, where it traps: the time, and IA32_TSC_AUX as the guest has written it."""
    a.mov(RCX, TSC_AUX)
    a.call("find_msr")
    a.ld(RBX, Mem(RAX, 8))
    a.op(ops.RDTSC)
    for register, value in ((RAX, RAX), (RDX, RDX), (RCX, RBX)):
        a.st(saved(register), value)
    a.jmp("skip")


def push_flags(a: Assembler) -> None:
    """PUSHF, where it traps: the interrupt flag that the guest believes in."""
    a.ld(RDX, F_RFLAGS)
    believed_flags(a, RDX, RCX)
    a.ld(RAX, saved(RSP))
    a.sub(RAX, 8)
    a.st(Mem(RAX), RDX)
    a.st(saved(RSP), RAX)
    a.copy(RAX, RDX)
    show(a, ops.PUSHF)
    a.jmp("skip")


def pop_flags(a: Assembler) -> None:
    """POPF, where it traps: a process keeps its interrupt flag."""
    a.ld(RSI, saved(RSP))
    a.ld(RDX, Mem(RSI))
    a.add(RSI, 8)
    a.st(saved(RSP), RSI)
    a.and_(RDX, POPPED)
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "pop_in_process")
    enter_flags(a, RDX, RAX)
    a.label("pop_in_process")
    a.and_(RDX, ~at.IOPL)
    a.or_(RDX, at.RF_IF | 2)
    a.st(F_RFLAGS, RDX)
    believed_flags(a, RDX, RAX)
    a.copy(RAX, RDX)
    show(a, ops.POPF)
    a.jmp("skip")
