"""What the monitor does in place of a privileged operation of the guest's kernel.

A #GP of the kernel is looked up: the row at the guest's RIP names the operation, a table its emulator, which works on
the virtual CPU in memory. What is privileged and not in the table ends the VM. A #GP of a process is its own, unless
the ISA makes sensitive operations trap (`machine.isa`).

SDM: "Privileged Instructions"; "Fast System Calls in 64-Bit Mode"; "IRET/IRETD/IRETQ—Interrupt Return".
Not modelled: under a monitor, LTR, string port instructions, immediate port 0, MSRs beyond those of
the guest kernels here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.exit_rules import IO_PRIVILEGED, PRIVILEGED
from vtsim.cpu.kernels import hooks
from vtsim.cpu.kernels import shadow_hooks as h
from vtsim.cpu.slots import R9, R11, R12, R13, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.vmm.monitor import hosted, segment_emulators, segments
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor import virtual_state as state
from vtsim.vmm.monitor.crossing import (
    GENERAL_PROTECTION,
    INVALID_OPCODE,
    RING_3,
    X2APIC_SELF_IPI,
    decode,
    illegal,
    return_by_sysret,
    save,
    step_over,
    wait_for_interrupt,
    write_msr,
)
from vtsim.vmm.monitor.entry import enter_flags
from vtsim.vmm.monitor.layout import F_CS, F_ERROR, F_RFLAGS, F_RIP, F_SS, V, saved, vcpu
from vtsim.vmm.monitor.memory import count, hook
from vtsim.vmm.monitor.segment_ways import WAYS, of_segments
from vtsim.vmm.programs.ports import DEVICE_WORDS, read_latch_or_window

Emulator = Callable[[Assembler], None]


def general_protection(a: Assembler, tables: int, translates: bool) -> None:
    """`trap_13`: a #GP of the guest.

    `tables` is the address of the emulators by op: of processes, then of the kernel.
    """
    a.activity = ops.EXIT_DISPATCH
    a.label(f"trap_{GENERAL_PROTECTION}")
    save(a, 48)
    count(a, "TRAPS")
    if translates:
        a.call("original")
    a.label("emulate")
    a.st_value(vcpu("EMULATING"), 1)
    decode(a, "reflect")
    a.ld(R13, vcpu("KERNEL"))
    a.shl(R13, 8)
    a.add(RAX, register=R13)
    a.jmp_mem(Mem(displacement=tables, index=RAX, scale=8))
    a.label("reflect")
    a.activity = ops.INJECTION
    a.mov(R12, GENERAL_PROTECTION)
    a.ld(R13, F_ERROR)
    a.jmp("inject_exception")
    illegal(a)


def cli(a: Assembler) -> None:
    """CLI."""
    a.st_value(vcpu("INTERRUPTS"), 0)
    a.jmp("skip")


def sti(a: Assembler) -> None:
    """STI; HLT behind it comes before an interrupt that waits, as in its shadow."""
    a.st_value(vcpu("INTERRUPTS"), 1)
    a.ld(RAX, vcpu("PENDING"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "skip")
    a.ld(RSI, F_RIP)
    a.add(RSI, register=R9)
    a.copy(RDI, RSI)
    a.hook(hooks.DECODE)
    a.cmp(RAX, ops.HLT)
    a.jcc(ops.CC_NZ, "skip")
    step_over(a)
    count(a, "EMULATED", 1)
    a.st(vcpu("LENGTH"), R9)
    a.jmp("skip")


def halt(a: Assembler) -> None:
    """HLT: the processor waits in the guest's place until an interrupt is there for it."""
    wait_for_interrupt(a, "skip")


def swap_gs(a: Assembler) -> None:
    """SWAPGS: the processor's GS bases are the guest's, because the monitor uses none."""
    a.op(ops.SWAPGS)
    a.jmp("skip")


def invlpg(a: Assembler) -> None:
    """INVLPG: the shadow entry is as the guest's since the guest wrote it; the translation goes."""
    a.activity = ops.MEMORY_MANAGEMENT
    a.call("operand")
    a.copy(R12, RAX)
    a.copy(RSI, RAX)
    hook(a, h.SHADOW_INVLPG)
    a.call("settle")
    a.op(ops.INVLPG, mem=Mem(R12))
    a.jmp("skip")


def invpcid(a: Assembler) -> None:
    """INVPCID: all translations go."""
    a.activity = ops.MEMORY_MANAGEMENT
    a.call("flush")
    a.jmp("skip")


def nothing(a: Assembler) -> None:
    """An instruction that has no effect in a VM."""
    a.jmp("skip")


def sysret(a: Assembler) -> None:
    """SYSRET: to the process, by SYSRET. An interrupt that waits is raised again, and comes at once."""
    a.ld(RAX, saved(R11))
    enter_flags(a, RAX, RCX)
    a.st(saved(R11), RAX)
    count(a, "EMULATED", 1)
    a.st_value(vcpu("KERNEL"), 0)
    a.call("view")
    a.activity = ops.REENTRY
    a.ld(RAX, vcpu("PENDING"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "sysret_now")
    write_msr(a, X2APIC_SELF_IPI, at.TIMER_VECTOR)
    a.label("sysret_now")
    return_by_sysret(a)


def iret(a: Assembler) -> None:
    """IRET of the kernel: to a process or to itself."""
    a.ld(RSI, saved(RSP))
    a.ld(RAX, Mem(RSI))
    a.ld(RCX, Mem(RSI, 8))
    a.ld(RDX, Mem(RSI, 16))
    a.ld(RBX, Mem(RSI, 24))
    a.ld(RDI, Mem(RSI, 32))
    a.st(F_RIP, RAX)
    a.st(saved(RSP), RBX)
    enter_flags(a, RDX, RAX)
    a.st(F_RFLAGS, RDX)
    a.test(RCX, RING_3)
    a.jcc(ops.CC_Z, "iret_to_kernel")
    a.st(F_CS, RCX)
    a.st(F_SS, RDI)
    count(a, "EMULATED", 1)
    a.st_value(vcpu("KERNEL"), 0)
    a.call("view")
    a.jmp("check")
    a.label("iret_to_kernel")
    a.st(vcpu("CS"), RCX)
    a.st(vcpu("SS"), RDI)
    a.jmp("emulated")


def user_iret(a: Assembler) -> None:
    """IRET of a process, which stays in ring 3 and keeps IF and IOPL."""
    a.ld(RSI, saved(RSP))
    a.ld(RCX, Mem(RSI, 8))
    a.copy(RAX, RCX)
    a.and_(RAX, RING_3)
    a.cmp(RAX, RING_3)
    a.jcc(ops.CC_NZ, "reflect")
    a.ld(RAX, Mem(RSI))
    a.st(F_RIP, RAX)
    a.ld(RDX, Mem(RSI, 16))
    a.and_(RDX, ~at.IOPL)
    a.or_(RDX, at.RF_IF | 2)
    a.st(F_RFLAGS, RDX)
    a.ld(RBX, Mem(RSI, 24))
    a.st(saved(RSP), RBX)
    a.jmp("emulated")


def software_interrupt(a: Assembler) -> None:
    """INT n: through the guest's gate, which a process may only use if its DPL is 3."""
    a.copy(R12, RBX)
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "int_allowed")
    a.copy(RDX, RBX)
    a.shl(RDX, 4)
    a.ld(RDI, vcpu("IDTR", 1))
    a.add(RDI, register=RDX)
    a.ld(RAX, Mem(RDI))
    a.shr(RAX, 45)
    a.and_(RAX, 3)
    a.cmp(RAX, 3)
    a.jcc(ops.CC_Z, "int_allowed")
    a.copy(R13, RBX)
    a.shl(R13, 3)
    a.or_(R13, 2)
    a.mov(R12, GENERAL_PROTECTION)
    a.jmp("inject_exception")
    a.label("int_allowed")
    a.ld(RAX, F_RIP)
    a.add(RAX, register=R9)
    a.st(F_RIP, RAX)
    a.mov(R13, -1)
    a.jmp("inject")


def port_in(a: Assembler) -> None:
    """IN: from a port device of the table; a port that nobody gave the guest reads as ones. RDX is the width."""
    read_port(a)
    show_port(a)


def port_in_of_host(a: Assembler) -> None:
    """The same from the host."""
    hosted.port_in(a)
    show_port(a)


def read_port(a: Assembler) -> None:
    """RAX <- what the port that the guest names reads as; RBX is the width."""
    a.activity = ops.DEVICE_EMULATION
    a.copy(RBX, RDX)
    a.ld(RSI, saved(RDX, 2))
    find_port(a)
    read_latch_or_window(a, "in", find_port)


def show_port(a: Assembler) -> None:
    """The guest's RAX <- as many bytes of RAX as RBX says."""
    a.ld(RCX, saved(RDX, 2))
    a.mov(RDX, ops.IN)
    for size in (1, 2, 4):
        a.cmp(RBX, size)
        a.jcc(ops.CC_NZ, f"in_not_{size}")
        a.and_(RAX, (1 << 8 * size) - 1)
        a.hook(hooks.SHOW)
        if size == 4:
            a.st(saved(RAX), RAX)
        else:
            a.st(saved(RAX, size), RAX)
        a.label(f"in_not_{size}")
    a.jmp("skip")


def port_out(a: Assembler) -> None:
    """OUT: to a port device of the table; else nobody hears it. RDX is the width."""
    a.activity = ops.DEVICE_EMULATION
    a.ld(RSI, saved(RDX, 2))
    find_port(a)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "skip")
    a.ld(RCX, saved(RAX, 4))
    a.st(Mem(RAX, 16), RCX)
    a.jmp("skip")


def find_port(a: Assembler) -> None:
    """RAX <- entry of the table of port devices for RSI, or 0; RCX RDX RDI change."""
    a.ld(RDI, vcpu("PORTS"))
    a.ld(RDX, vcpu("PORT_ENTRIES"))
    a.mov(RCX, DEVICE_WORDS)
    a.hook(hooks.FIND)


def subroutines(a: Assembler) -> None:
    """`operand`: RAX <- address of the operand. `find_msr`: RAX <- the table's line of MSR RCX, else #GP."""
    a.label("operand")
    a.ld(RDI, F_RIP)
    a.lea(RSI, Mem(R15, V["REGISTERS"]))
    a.hook(hooks.OPERAND)
    a.ret()
    a.label("find_msr")
    a.copy(RSI, RCX)
    a.ld(RDI, vcpu("MSR_TABLE"))
    a.ld(RDX, vcpu("MSR_ENTRIES"))
    a.mov(RCX, 2)
    a.hook(hooks.FIND)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "no_msr")
    a.ret()
    a.label("no_msr")
    a.add(RSP, 8)
    a.jmp("reflect")


def for_field(emulator: Callable[[Assembler, str], None], field: str) -> Emulator:
    """An emulator of something that stands in a field of the structure."""
    return lambda a: emulator(a, field)


# fmt: off
KERNEL: Final[dict[int, Emulator]] = {   # of the guest's kernel
    ops.CLI: cli, ops.STI: sti, ops.HLT: halt, ops.SWAPGS: swap_gs, ops.CLTS: state.clear_ts,
    ops.MOV_FROM_CR: state.move_from_cr, ops.MOV_TO_CR: state.move_to_cr,
    ops.MOV_FROM_DR: state.move_from_dr, ops.MOV_TO_DR: state.move_to_dr,
    ops.INVLPG: invlpg, ops.INVPCID: invpcid, ops.WBINVD: nothing, ops.INVD: nothing, ops.XSETBV: nothing,
    ops.SYSRET: sysret, ops.IRET: iret, ops.INT: software_interrupt,
    ops.IN: port_in, ops.OUT: port_out, ops.RDMSR: state.read_msr, ops.WRMSR: state.write_msr,
    ops.LGDT: for_field(state.load_table, "GDTR"), ops.LIDT: for_field(state.load_table, "IDTR"),
    **{op: of_segments(*how) for op, how in segment_emulators.PRIVILEGED_EMULATORS.items()},
}
SENSITIVE: Final[dict[int, Emulator]] = {   # of kernel and processes, on an ISA where they trap
    ops.SGDT: for_field(state.store_table, "GDTR"), ops.SIDT: for_field(state.store_table, "IDTR"),
    ops.SLDT: for_field(state.store_word, "LDTR"), ops.STR: for_field(state.store_word, "TR"),
    ops.SMSW: for_field(state.store_word, "CR0"), ops.PUSHF: state.push_flags, ops.POPF: state.pop_flags,
    ops.XGETBV: state.read_xcr, ops.RDTSCP: state.read_tscp,
    **{op: of_segments(*how) for op, how in segment_emulators.EMULATORS.items()},
}
OF_HOST: Final[dict[int, Emulator]] = {  # of the kernel, where the monitor is hosted
    ops.HLT: hosted.halt, ops.IN: port_in_of_host, ops.OUT: hosted.port_out,
}
# fmt: on


def emulators(a: Assembler, translates: bool, by_host: bool) -> list[str]:
    """Emit every emulator once; the labels by op, for processes and then for the kernel.

    `by_host`: what needs a device or time is the host's to do.
    """
    names = {}
    for op, emulator in (KERNEL | SENSITIVE | (OF_HOST if by_host else {})).items():
        a.activity = ops.EXIT_HANDLER
        names[op] = a.label(f"emulate_{ops.OPS[op].name}")
        emulator(a)
    a.activity = ops.EXIT_HANDLER
    a.label("emulate_user_IRET")
    user_iret(a)
    subroutines(a)
    segments.subroutines(a, WAYS)
    a.label("undefined")
    a.mov(R12, INVALID_OPCODE)
    a.mov(R13, -1)
    a.jmp("inject_exception")
    process = {op: names[op] for op in (*SENSITIVE, ops.INT)} | {ops.IRET: "emulate_user_IRET"}
    kernel = dict.fromkeys((*PRIVILEGED, *IO_PRIVILEGED), "illegal") | names
    if translates:
        kernel[ops.ST] = "table_store"
    return [table.get(op, "reflect") for table in (process, kernel) for op in range(256)]
