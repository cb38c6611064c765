"""MSRs that VM transitions leave alone, exchanged in software between guest and host.

SDM: "VM-Exit Controls for MSRs".
Not modelled: IA32_TSC_AUX, which programs here do not read.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import RAX, RCX, RSP
from vtsim.vmm.layout import REQUEST_STATE, SWITCHED_MSRS, USER_RETURN_MSRS, V
from vtsim.vmm.programs import mitigations
from vtsim.vmm.programs.words import ALL, cpu, join, set_bit, split, vcpu, work, zero
from vtsim.vmm.registry import Path

KERNEL_GS_BASE = SWITCHED_MSRS[USER_RETURN_MSRS]


def enter_guest_msrs(a: Assembler, path: Path) -> None:
    """`requests_done`: put the guest's MSRs into the CPU, those that differ; on to `enter`, or the first VM entry."""
    a.label("requests_done")
    a.activity = ops.REENTRY
    a.ld(RAX, vcpu("GUEST_LOADED"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "guest_loaded")
    work(a, path, "load_guest")
    for n, index in enumerate(SWITCHED_MSRS):
        a.ld(RAX, vcpu("GUEST_MSRS", n))
        if n < USER_RETURN_MSRS:
            a.ld(RCX, cpu("MSRS", n))
            a.cmp(RAX, register=RCX)
            a.jcc(ops.CC_Z, f"load_guest_{n}")
            a.st(cpu("MSRS", n), RAX)
        split(a)
        a.mov(RCX, index)
        a.op(ops.WRMSR)
        a.label(f"load_guest_{n}")
    a.st_value(vcpu("GUEST_LOADED"), 1)
    a.label("guest_loaded")
    a.ld(RAX, vcpu("LAUNCHED"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "enter")
    a.st_value(vcpu("LAUNCHED"), 1)
    mitigations.flush_l1d(a, path, "launch")
    mitigations.enter_guest(a, path)
    a.ldm(Mem(RSP, V["REGISTERS"]), ALL)
    mitigations.clear_buffers(a, path)
    a.op(ops.VMLAUNCH)
    a.op(ops.UD)


def leave_guest_msrs(a: Assembler, path: Path, where: str) -> None:
    """Interrupts off: save the guest's KERNEL_GS_BASE, which it writes without an exit, and restore the host's."""
    a.ld(RAX, vcpu("GUEST_LOADED"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, f"{where}_left")
    work(a, path, "leave_guest")
    a.mov(RCX, KERNEL_GS_BASE)
    a.op(ops.RDMSR)
    join(a)
    a.st(vcpu("GUEST_MSRS", USER_RETURN_MSRS), RAX)
    a.ld(RAX, cpu("HOST_MSRS", USER_RETURN_MSRS))
    split(a)
    a.op(ops.WRMSR)
    if path.parameters.get("reload_gdt", 0):
        a.emit(ops.LGDT, mem=cpu("GDTR"))
    zero(a, RAX)
    a.st(vcpu("GUEST_LOADED"), RAX)
    set_bit(a, vcpu("REQUEST"), REQUEST_STATE)
    a.label(f"{where}_left")


def restore_user_msrs(a: Assembler, path: Path) -> None:
    """Before user space runs: the host's own values where the CPU holds others."""
    for n, index in enumerate(SWITCHED_MSRS[:USER_RETURN_MSRS]):
        a.ld(RAX, cpu("HOST_MSRS", n))
        a.ld(RCX, cpu("MSRS", n))
        a.cmp(RAX, register=RCX)
        a.jcc(ops.CC_Z, f"user_msr_{n}")
        a.st(cpu("MSRS", n), RAX)
        split(a)
        a.mov(RCX, index)
        a.op(ops.WRMSR)
        a.label(f"user_msr_{n}")


def write_switched(a: Assembler, n: int) -> None:
    """The guest writes one of them, value in RAX: into its own copy, and into the CPU."""
    a.st(vcpu("GUEST_MSRS", n), RAX)
    a.st(cpu("MSRS", n), RAX)
    split(a)
    a.mov(RCX, SWITCHED_MSRS[n])
    a.op(ops.WRMSR)
    a.jmp("skip")
