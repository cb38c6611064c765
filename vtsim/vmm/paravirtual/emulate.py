"""Privileged operations that a paravirtual kernel still executes: they fault, and the hypervisor does them instead.

A kernel built for the hypervisor has few: ports, MSRs, and what drivers do without asking. What is not in the table is
a #GP of the guest.

SDM: "Privileged Instructions".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, R13, R15, RAX, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import direct as d
from vtsim.vmm.monitor import emulate as monitor
from vtsim.vmm.monitor import virtual_state as state
from vtsim.vmm.monitor.crossing import GENERAL_PROTECTION, decode, step_over
from vtsim.vmm.monitor.layout import F_ERROR, V, saved
from vtsim.vmm.paravirtual.layout import count, vcpu

OPS: Final = 256


def set_mask(a: Assembler, masked: int) -> None:
    """CLI and STI, where they were not replaced."""
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.st_value(Mem(RDI, d.UPCALL_MASK), masked)
    a.jmp("skip")


def halt(a: Assembler) -> None:
    """HLT: as the hypercall that waits for an event."""
    a.call("step_over")
    a.jmp("block")


def write_msr(a: Assembler) -> None:
    """WRMSR: the bases of FS and GS, and a table of MSRs that do nothing here; else #GP."""
    a.ld(RCX, saved(RCX, 4))
    for index in (state.FS_BASE, state.GS_BASE, state.KERNEL_GS_BASE):
        a.cmp(RCX, index)
        a.jcc(ops.CC_Z, "write_base")
    a.call("find_msr")
    a.copy(RSI, RAX)
    a.ld(RAX, saved(RAX, 4))
    a.ld(RDX, saved(RDX, 4))
    a.shl(RDX, 32)
    a.or_(RAX, register=RDX)
    a.st(Mem(RSI, 8), RAX)
    a.jmp("skip")
    a.label("write_base")
    a.ld(RAX, saved(RAX, 4))
    a.ld(RDX, saved(RDX, 4))
    a.op(ops.WRMSR)
    a.jmp("skip")


def move_to_cr8(a: Assembler) -> None:
    """MOV to CR8, which masks nothing here; the other control registers are for hypercalls."""
    a.cmp(RBX, 8)
    a.jcc(ops.CC_NZ, "reflect")
    a.ld(RAX, Mem(R15, V["REGISTERS"], index=RCX, scale=8))
    a.st(vcpu("CR8"), RAX)
    a.jmp("skip")


EMULATORS: Final[Mapping[int, Callable[[Assembler], None]]] = {
    ops.CLI: lambda a: set_mask(a, 1), ops.STI: lambda a: set_mask(a, 0), ops.HLT: halt,
    ops.IN: monitor.port_in, ops.OUT: monitor.port_out, ops.WBINVD: monitor.nothing, ops.INVD: monitor.nothing,
    ops.CLTS: state.clear_ts, ops.RDMSR: state.read_msr, ops.WRMSR: write_msr,
    ops.MOV_FROM_CR: state.move_from_cr, ops.MOV_FROM_DR: state.move_from_dr, ops.MOV_TO_DR: state.move_to_dr,
    ops.MOV_TO_CR: move_to_cr8,
}  # fmt: skip


def emulation(a: Assembler, table: int) -> list[str]:
    """`emulate`: a #GP of the kernel, by the table at `table`. The emulators' labels by op."""
    a.activity = ops.EXIT_DISPATCH
    a.label("emulate")
    decode(a, "reflect")
    a.jmp_mem(Mem(displacement=table, index=RAX, scale=8))
    labels = ["reflect"] * OPS
    for op, emulator in EMULATORS.items():
        a.activity = ops.EXIT_HANDLER
        labels[op] = a.label(f"emulate_{ops.OPS[op].name}")
        emulator(a)
    monitor.subroutines(a)
    a.label("reflect")
    a.mov(R8, GENERAL_PROTECTION)
    a.ld(R13, F_ERROR)
    a.jmp("exception")
    a.label("skip")
    a.call("step_over")
    a.jmp("leave")
    stepping(a)
    return labels


def stepping(a: Assembler) -> None:
    """`step_over`: the guest goes on behind the instruction at F_RIP, which was done in its place."""
    a.label("step_over")
    step_over(a)
    count(a, "TRAPS")
    a.ld(RAX, vcpu("EMULATED", 1))
    a.add(RAX, 1)
    a.st(vcpu("EMULATED", 1), RAX)
    a.ret()
