"""System operations of the guest: who may execute them, and what each does to the virtual CPU.

What a monitor of deprivileged kernels emulates without memory accesses of the guest is emulated by the same programs.

SDM: "Privileged Instructions"; "Fast System Calls in 64-Bit Mode"; "IRET/IRETD/IRETQ—Interrupt Return".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.exit_rules import IO_PRIVILEGED, PRIVILEGED
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R8, R9, R10, R11, R14, RAX, RBX, RCX, RDX, RSI, RSP
from vtsim.vmm.monitor import segment_emulators, segments
from vtsim.vmm.monitor import virtual_state as state
from vtsim.vmm.monitor.crossing import (
    GENERAL_PROTECTION,
    RING_3,
    illegal,
    mask_of_system_call,
    segments_of_system_call,
    take_interrupt_flag,
    wait_for_interrupt,
)
from vtsim.vmm.monitor.emulate import cli, invpcid, nothing, port_in, port_out
from vtsim.vmm.monitor.emulate import subroutines as msr_subroutines
from vtsim.vmm.monitor.layout import F_CS, F_RIP, F_SS, saved, vcpu
from vtsim.vmm.monitor.memory import count
from vtsim.vmm.software import layout as w
from vtsim.vmm.software.mmu import address, load
from vtsim.vmm.software.native import native_method
from vtsim.vmm.software.segment_ways import WAYS, of_segments

BASES: Final = {state.FS_BASE: "FS_BASE", state.GS_BASE: "GS_BASE", state.KERNEL_GS_BASE: "KERNEL_GS_BASE"}
Emulator = Callable[[Assembler], None]


def prepare(a: Assembler, *, borrowed: bool) -> None:
    """Put the guest's RIP into memory and the length into R9.

    Emulators that are `borrowed` from the monitor of deprivileged kernels make no access that faults, and expect the
    immediate in RBX and the register's number in RCX.
    """
    a.st(F_RIP, RBX)
    a.ld(R9, w.entry("LENGTH"))
    a.st(vcpu("LENGTH"), R9)
    if borrowed:
        a.ld(RBX, w.entry("C"))
        a.ld(RCX, w.entry("A"))


def ways_back(a: Assembler) -> None:
    """`skip`: step over what was emulated. `view_find`: an address space was loaded. `illegal`: the VM ends."""
    a.activity = ops.EXIT_HANDLER
    a.label("skip")
    a.ld(RBX, F_RIP)
    a.ld(RAX, vcpu("LENGTH"))
    a.add(RBX, register=RAX)
    a.add(R14, 1)
    a.jmp("next")
    a.label("view_find")
    a.jmp("flush")
    illegal(a)


def sti(a: Assembler) -> None:
    """STI; the instruction behind it comes before an interrupt that waits."""
    a.st_value(vcpu("INTERRUPTS"), 1)
    a.add(RBX, register=R9)
    a.add(R14, 1)
    a.jmp("next_unchecked")


def halt(a: Assembler) -> None:
    """HLT: the processor waits in the guest's place until an interrupt is there for it."""
    a.call("spill")
    a.op(ops.CLI)
    wait_for_interrupt(a, "halt_ends")
    a.label("halt_ends")
    a.op(ops.STI)
    a.jmp("skip")


def swap_gs(a: Assembler) -> None:
    """SWAPGS."""
    a.ld(RAX, vcpu("GS_BASE"))
    a.ld(RDX, vcpu("KERNEL_GS_BASE"))
    a.st(vcpu("GS_BASE"), RDX)
    a.st(vcpu("KERNEL_GS_BASE"), RAX)
    a.jmp("skip")


def invlpg(a: Assembler) -> None:
    """INVLPG."""
    a.activity = ops.MEMORY_MANAGEMENT
    address(a, indexed=False)
    a.call("forget_page")
    a.jmp("skip")


def read_msr(a: Assembler) -> None:
    """RDMSR: segment bases stand in memory."""
    a.ld(RAX, saved(RCX, 4))
    for index, field in BASES.items():
        a.cmp(RAX, index)
        a.jcc(ops.CC_NZ, f"soft_read_not_{field}")
        a.ld(RAX, vcpu(field))
        a.jmp("msr_value")
        a.label(f"soft_read_not_{field}")
    state.read_msr(a)


def write_msr(a: Assembler) -> None:
    """WRMSR."""
    a.ld(RAX, saved(RCX, 4))
    for index, field in BASES.items():
        a.cmp(RAX, index)
        a.jcc(ops.CC_NZ, f"soft_write_not_{field}")
        a.ld(RAX, saved(RAX, 4))
        a.ld(RDX, saved(RDX, 4))
        a.shl(RDX, 32)
        a.or_(RAX, register=RDX)
        a.st(vcpu(field), RAX)
        a.jmp("skip")
        a.label(f"soft_write_not_{field}")
    state.write_msr(a)


def system_call(a: Assembler) -> None:
    """SYSCALL of a process."""
    a.call("flags")
    a.st(saved(R11), RAX)
    a.ld(RAX, F_RIP)
    a.add(RAX, register=R9)
    a.st(saved(RCX), RAX)
    count(a, "SYSTEM_CALLS")
    a.add(R14, 1)
    a.call("spill")
    a.st_value(vcpu("KERNEL"), 1)
    a.call("use_ring")
    mask_of_system_call(a)
    a.ld(RDX, saved(R11))
    a.and_(RAX, register=RDX)
    a.call("take_flags")
    segments_of_system_call(a)
    a.ld(RBX, vcpu("LSTAR"))
    a.jmp("next")


def sysret(a: Assembler) -> None:
    """SYSRET to a process."""
    a.ld(RBX, saved(RCX))
    a.ld(RAX, saved(R11))
    a.call("enter_flags")
    a.add(R14, 1)
    a.call("spill")
    a.ld(RAX, vcpu("STAR"))
    a.shr(RAX, 48)
    a.add(RAX, 16)
    a.or_(RAX, RING_3)
    a.st(F_CS, RAX)
    a.sub(RAX, 8)
    a.st(F_SS, RAX)
    a.st_value(vcpu("KERNEL"), 0)
    a.call("use_ring")
    a.ld(RAX, saved(RAX))
    state.show(a, ops.SYSRET)
    a.jmp("next")


def iret(a: Assembler) -> None:
    """IRET: to a process or to the kernel itself; a process may only stay one."""
    a.ld(RSI, saved(RSP))
    for word in range(5):  # RIP, CS, RFLAGS, RSP, SS
        load(a)
        a.st(vcpu("SCRATCH", word), RAX)
        a.add(RSI, 8)
    a.ld(R8, vcpu("SCRATCH", 1))
    a.ld(RCX, vcpu("KERNEL"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_NZ, "iret_allowed")
    a.copy(RCX, R8)
    a.and_(RCX, RING_3)
    a.cmp(RCX, RING_3)
    a.jcc(ops.CC_NZ, "general_protection")
    a.label("iret_allowed")
    a.add(R14, 1)
    a.ld(RBX, vcpu("SCRATCH"))
    a.ld(RAX, vcpu("SCRATCH", 3))
    a.st(saved(RSP), RAX)
    a.ld(RDX, vcpu("SCRATCH", 4))
    a.ld(RAX, vcpu("SCRATCH", 2))
    a.test(R8, RING_3)
    a.jcc(ops.CC_Z, "iret_to_kernel")
    a.st(F_CS, R8)
    a.st(F_SS, RDX)
    a.ld(RCX, vcpu("KERNEL"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_NZ, "iret_to_process")
    a.call("take_flags")
    a.jmp("next")
    a.label("iret_to_process")
    a.call("enter_flags")
    a.call("spill")
    a.st_value(vcpu("KERNEL"), 0)
    a.call("use_ring")
    a.jmp("next")
    a.label("iret_to_kernel")
    a.st(vcpu("CS"), R8)
    a.st(vcpu("SS"), RDX)
    a.call("enter_flags")
    a.jmp("next")


def software_interrupt(a: Assembler) -> None:
    """INT n: through the guest's gate, which a process may only use if its DPL is 3."""
    a.ld(R10, w.entry("C"))
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "soft_int_allowed")
    a.st_value(vcpu("KERNEL"), 1)  # the table is read as the processor reads it
    a.call("use_ring")
    a.copy(RSI, R10)
    a.shl(RSI, 4)
    a.ld(RAX, vcpu("IDTR", 1))
    a.add(RSI, register=RAX)
    a.call("load")
    a.copy(R8, RAX)
    a.st_value(vcpu("KERNEL"), 0)
    a.call("use_ring")
    a.shr(R8, 45)
    a.and_(R8, 3)
    a.cmp(R8, 3)
    a.jcc(ops.CC_Z, "soft_int_allowed")
    a.shl(R10, 3)
    a.or_(R10, 2)
    a.st_value(vcpu("SCRATCH"), GENERAL_PROTECTION)
    a.st(vcpu("SCRATCH", 1), R10)
    a.jmp("inject_exception")
    a.label("soft_int_allowed")
    a.ld(RAX, vcpu("LENGTH"))
    a.add(RBX, register=RAX)
    a.add(R14, 1)
    a.st(vcpu("SCRATCH"), R10)
    a.st_value(vcpu("SCRATCH", 1), -1)
    a.jmp("inject")


def descriptor_table(a: Assembler, field: str, *, stores: bool) -> None:
    """LGDT, LIDT, SGDT, SIDT."""
    address(a, indexed=False)
    if stores:
        for word in range(2):
            a.ld(R8, vcpu(field, word))
            a.call("store")
            a.add(RSI, 8)
        state.show_table(a, field)
        a.jmp("skip")
        return
    a.call("load")
    a.and_(RAX, 0xFFFF)
    a.copy(R8, RAX)
    a.add(RSI, 8)
    a.call("load")
    a.st(vcpu(field), R8)
    a.st(vcpu(field, 1), RAX)
    a.jmp("skip")


def push_flags(a: Assembler) -> None:
    """PUSHF."""
    a.call("flags")
    a.copy(R8, RAX)
    a.ld(RSI, saved(RSP))
    a.sub(RSI, 8)
    a.call("store")
    a.st(saved(RSP), RSI)
    a.copy(RAX, R8)
    state.show(a, ops.PUSHF)
    a.jmp("skip")


def pop_flags(a: Assembler) -> None:
    """POPF; a process keeps its interrupt flag."""
    a.ld(RSI, saved(RSP))
    a.call("load")
    a.add(RSI, 8)
    a.st(saved(RSP), RSI)
    a.ld(RCX, vcpu("KERNEL"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "soft_pop_in_process")
    a.call("enter_flags")
    a.jmp("soft_popped")
    a.label("soft_pop_in_process")
    a.call("take_flags")
    a.label("soft_popped")
    a.call("flags")
    state.show(a, ops.POPF)
    a.jmp("skip")


def cpuid(a: Assembler) -> None:
    """CPUID: what the processor says."""
    a.ld(RAX, saved(RAX))
    a.ld(RSI, saved(RAX, 4))
    a.ld(RCX, saved(RCX))
    a.op(ops.CPUID)
    for register in (RAX, RBX, RCX, RDX):
        a.st(saved(register), register)
    a.copy(RCX, RSI)
    for part, register in enumerate((RAX, RBX, RCX, RDX)):
        a.ld(RAX, saved(register))
        a.mov(RDX, ops.CPUID | part << 8)
        a.hook(hooks.SHOW)
    a.jmp("skip")


def time_stamp(a: Assembler) -> None:
    """RDTSC."""
    a.op(ops.RDTSC)
    for register in (RAX, RDX):
        a.st(saved(register), register)
    a.jmp("skip")


def random(a: Assembler, op: int) -> None:
    """RDRAND, RDSEED."""
    a.op(op, RAX)
    a.jmp("put_register")


def stop(a: Assembler) -> None:
    """The end of the guest's program: the platform sees it."""
    a.call("spill")
    a.op(ops.STOP_OP)


def subroutines(a: Assembler) -> None:
    """`enter_flags`: RFLAGS <- RAX, with the interrupt flag. Clobbers RAX and RCX."""
    a.label("enter_flags")
    take_interrupt_flag(a, RAX, RCX)
    a.jmp("take_flags")
    msr_subroutines(a)


# fmt: off
KERNEL_ONLY: Final[Mapping[int, Emulator]] = {
    ops.CLI: cli, ops.STI: sti, ops.HLT: halt, ops.SWAPGS: swap_gs, ops.CLTS: state.clear_ts,
    ops.MOV_FROM_CR: state.move_from_cr, ops.MOV_TO_CR: state.move_to_cr,
    ops.MOV_FROM_DR: state.move_from_dr, ops.MOV_TO_DR: state.move_to_dr,
    ops.INVLPG: invlpg, ops.INVPCID: invpcid, ops.WBINVD: nothing, ops.INVD: nothing, ops.XSETBV: nothing,
    ops.SYSRET: sysret, ops.IN: port_in, ops.OUT: port_out, ops.RDMSR: read_msr, ops.WRMSR: write_msr,
    ops.LGDT: lambda a: descriptor_table(a, "GDTR", stores=False),
    ops.LIDT: lambda a: descriptor_table(a, "IDTR", stores=False),
    ops.STOP_OP: stop,
    **{op: of_segments(*how) for op, how in segment_emulators.PRIVILEGED_EMULATORS.items()},
}
ANYONE: Final[Mapping[int, Emulator]] = {
    ops.SYSCALL: system_call, ops.IRET: iret, ops.INT: software_interrupt, ops.CPUID: cpuid,
    ops.RDTSC: time_stamp, ops.RDTSCP: state.read_tscp,
    ops.RDRAND: lambda a: random(a, ops.RDRAND), ops.RDSEED: lambda a: random(a, ops.RDSEED),
    ops.SGDT: lambda a: descriptor_table(a, "GDTR", stores=True),
    ops.SIDT: lambda a: descriptor_table(a, "IDTR", stores=True),
    ops.SLDT: lambda a: state.store_word(a, "LDTR"), ops.STR: lambda a: state.store_word(a, "TR"),
    ops.SMSW: lambda a: state.store_word(a, "CR0"), ops.PUSHF: push_flags, ops.POPF: pop_flags,
    ops.XGETBV: state.read_xcr,
    **{op: of_segments(*how) for op, how in segment_emulators.EMULATORS.items()},
}
BORROWED: Final = (
    ops.CLTS, ops.MOV_FROM_CR, ops.MOV_TO_CR, ops.MOV_FROM_DR, ops.MOV_TO_DR, ops.IN, ops.OUT, ops.RDMSR, ops.WRMSR,
    ops.SLDT, ops.STR, ops.SMSW, ops.RDRAND, ops.RDSEED, ops.RDTSCP,
)
UNDEFINED: Final = (ops.UD, ops.VMCALL, ops.VMFUNC, ops.GETSEC, ops.VMXON)
# fmt: on


def emit(a: Assembler, *, native_methods: bool) -> dict[int, str]:
    """Emit every emulator with its preparation; the labels by op."""
    names = dict.fromkeys(UNDEFINED, "undefined")
    anyone = {**ANYONE, ops.VMCALL: native_method} if native_methods else ANYONE
    for table, privileged in ((KERNEL_ONLY, True), (anyone, False)):
        for op, emulator in table.items():
            a.activity = ops.EXIT_HANDLER
            names[op] = a.label(f"system_{ops.OPS[op].name}")
            if privileged:
                a.ld(RAX, vcpu("KERNEL"))
                a.test(RAX, register=RAX)
                a.jcc(ops.CC_Z, "general_protection")
            prepare(a, borrowed=op in BORROWED)
            if op == ops.IN:
                a.ld(RDX, w.entry("B"))
            emulator(a)
    a.activity = ops.EXIT_HANDLER
    for op in (*PRIVILEGED, *IO_PRIVILEGED):
        if op not in names:
            names[op] = a.label(f"system_{ops.OPS[op].name}")
            a.ld(RAX, vcpu("KERNEL"))
            a.test(RAX, register=RAX)
            a.jcc(ops.CC_Z, "general_protection")
            a.mov(RAX, op)
            a.jmp("illegal")
    ways_back(a)
    subroutines(a)
    segments.subroutines(a, WAYS)
    return names
