"""Steps that KVM makes for an exit with a handler and for one without (`fast_path`).

Source: Linux 6.1, arch/x86/kvm/vmx/vmx.c: skip_emulated_instruction, vmx_set_interrupt_shadow.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.slots import RAX, RCX, RDX
from vtsim.vmm.programs.words import vcpu, work
from vtsim.vmm.registry import Path


def note_time(a: Assembler) -> None:
    """When the exit was. Changes RAX and RDX."""
    a.op(ops.RDTSC)
    a.stm(vcpu("LAST_TSC"), (RAX, RDX))


def step_over(a: Assembler, path: Path, blocked: str) -> None:
    """RDX <- GUEST_RIP behind the instruction; to `blocked`, RAX the state, where its end lets interrupts in again."""
    work(a, path, "skip")
    a.vmread(RAX, "GUEST_RFLAGS", comment="trap flag?")
    a.vmread(RCX, "EXIT_INSTRUCTION_LENGTH")
    a.vmread(RDX, "GUEST_RIP")
    a.add(RDX, register=RCX)
    a.vmwrite("GUEST_RIP", RDX)
    a.vmread(RAX, "GUEST_INTERRUPTIBILITY_STATE")
    a.test(RAX, 3)
    a.jcc(ops.CC_NZ, blocked)


def end_blocking(a: Assembler) -> None:
    """Nothing is blocked by STI or MOV SS any more; RAX the interruptibility state."""
    a.and_(RAX, ~3)
    a.vmwrite("GUEST_INTERRUPTIBILITY_STATE", RAX)
