"""Exits that KVM handles at once, before interrupts are on again and before all else that follows an exit.

A command to the x2APIC for one CPU is sent there. What follows every exit follows then, too, but its handler.

Source: Linux 6.1, arch/x86/kvm/vmx/vmx.c (vmx_exit_handlers_fastpath, EXIT_FASTPATH_EXIT_HANDLED), x86.c
(handle_fastpath_set_msr_irqoff).
Not modelled: TSC deadlines that are set there, which takes the VMX-preemption timer; commands there of a VM with one
vCPU, which has nobody to interrupt.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.slots import RAX, RBX, RCX, RDX, RSI
from vtsim.vmcs import reasons as x
from vtsim.vmm.personalities.kvm.steps import end_blocking, note_time, step_over
from vtsim.vmm.programs.posted import MSR_ICR
from vtsim.vmm.programs.several import SHORTHAND
from vtsim.vmm.programs.words import join, saved, work
from vtsim.vmm.registry import Path

NOT_FIXED: Final = 7 << 8 | 1 << 11  # of a command: its delivery mode; a logical destination
BROADCAST: Final = 0xFFFF_FFFF
HANDLED: Final = x.EXTERNAL_INTERRUPT  # whose handler has nothing left to do


def look(a: Assembler, path: Path) -> None:
    """Behind an exit with reason RBX, interrupts off: to `fast_msr`, and from there back or to `interrupts_on`."""
    if path.several and path.parameters["fast_ipi"]:
        a.cmp(RBX, x.MSR_WRITE)
        a.jcc(ops.CC_Z, "fast_msr")
        a.label("no_fast_path")


def write_msr(a: Assembler, path: Path) -> None:
    """`fast_msr`: a write of ICR that names one CPU and a vector; any other write has its handler's turn."""
    if not (path.several and path.parameters["fast_ipi"]):
        return
    a.activity = ops.DEVICE_EMULATION
    a.label("fast_msr")
    a.ld(RSI, saved(RCX, 4))
    a.cmp(RSI, MSR_ICR)
    a.jcc(ops.CC_NZ, "no_fast_path")
    a.ld(RAX, saved(RAX, 4))
    a.test(RAX, SHORTHAND | NOT_FIXED)
    a.jcc(ops.CC_NZ, "no_fast_path")
    a.ld(RDX, saved(RDX, 4))
    a.mov(RCX, BROADCAST)
    a.cmp(RDX, register=RCX)
    a.jcc(ops.CC_Z, "no_fast_path")
    join(a)
    work(a, path, "fast_path")
    a.call("apic_command")
    step_over(a, path, "fast_blocked")
    a.label("fast_stepped")
    a.activity = ops.EXIT_DISPATCH
    note_time(a)
    a.mov(RBX, HANDLED)
    a.jmp("interrupts_on")
    a.label("fast_blocked")
    end_blocking(a)
    a.jmp("fast_stepped")
