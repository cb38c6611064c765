"""The shortest correct hypervisor: what a textbook would draw.

Save registers, read the reason, jump through a table, do the work, restore, resume. No user space, no mitigations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import frozen

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R15, RAX, RCX, RDX, RSP
from vtsim.vmcs import reasons as x
from vtsim.vmm import layout as at
from vtsim.vmm.programs import (
    balloon,
    cluster_table,
    direct,
    dirty_log,
    ept,
    events,
    instructions,
    mmio,
    ports,
    schedule,
    several,
    shadow,
    upcalls,
    views,
)
from vtsim.vmm.programs.common import emit_paths, emit_shared
from vtsim.vmm.programs.words import ALL, VALID, vcpu
from vtsim.vmm.registry import ExitPath, Parameter, Path, exit_paths, personalities
from vtsim.vmm.shadow import PLAIN_PARAMETERS
from vtsim.vmm.vmcs import PASS_READ, PASS_WRITE, Wanted

NAME: Final = "minimal"


def external(a: Assembler, path: Path) -> None:
    """Run the host's handler."""
    events.external_interrupt(a, path)
    a.jmp("reenter")


def hypercall(a: Assembler, path: Path) -> None:
    """VMCALL: those of direct tables, or the balloon's; others do nothing."""
    if path.vmm.paging == "direct-pv":
        direct.hypercall(a, path)
        return
    upcalls.hypercall(a, path)
    balloon.hypercall(a, path)
    views.hypercall(a, path)
    instructions.ignore(a, path)


# fmt: off
HANDLERS: Final[Mapping[int, ExitPath]] = {
    x.EXCEPTION_NMI:       shadow.exception,
    x.EXTERNAL_INTERRUPT:  external,
    x.TRIPLE_FAULT:        instructions.triple_fault,
    x.INVALID_STATE:       instructions.triple_fault,
    x.INTERRUPT_WINDOW:    events.interrupt_window,
    x.CPUID:               instructions.cpuid,
    x.HLT:                 schedule.halt,
    x.INVD:                instructions.ignore,
    x.INVLPG:              shadow.invlpg,
    x.INVPCID:             shadow.invpcid,
    x.RDTSC:               instructions.read_tsc,
    x.RDTSCP:              instructions.read_tsc,
    x.TPR_BELOW_THRESHOLD: instructions.below_threshold,
    x.VMCALL:              hypercall,
    x.CR_ACCESS:           instructions.control_register,
    x.IO_INSTRUCTION:      ports.in_hypervisor,
    x.MSR_READ:            instructions.read_msr,
    x.MSR_WRITE:           instructions.write_msr,
    x.EPT_VIOLATION:       ept.violation,
    x.EPT_MISCONFIG:       mmio.misconfiguration,
    x.PML_FULL:            dirty_log.log_full,
    x.WBINVD:              instructions.ignore,
    x.XSETBV:              instructions.set_xcr0,
    x.PAUSE_INSTRUCTION:   instructions.ignore,
    x.MONITOR_TRAP_FLAG:   views.stepped,
    x.VMFUNC:              instructions.undefined,
}
# fmt: on
for _reason, _handler in HANDLERS.items():
    exit_paths.register((NAME, _reason))(_handler)


@frozen
class Minimal:
    """The shortest correct path: what a textbook would draw."""

    def parameters(self, lengths: str) -> Mapping[str, Parameter]:
        return PLAIN_PARAMETERS

    def wanted(self, path: Path) -> Wanted:
        return Wanted(
            needed=("EXTERNAL_INTERRUPT_EXITING", "HLT_EXITING", "UNCONDITIONAL_IO_EXITING", "USE_MSR_BITMAPS",
                    "USE_TSC_OFFSETTING", "EXIT_HOST_ADDRESS_SPACE_SIZE", "EXIT_ACKNOWLEDGE_INTERRUPT",
                    "ENTRY_IA32E_MODE_GUEST", "EXIT_SAVE_DEBUG_CONTROLS", "ENTRY_LOAD_DEBUG_CONTROLS"),
            used=("EXIT_LOAD_IA32_EFER", "ENTRY_LOAD_IA32_EFER", "ENABLE_RDTSCP", "ENABLE_INVPCID",
                  "UNRESTRICTED_GUEST", "ENABLE_XSAVES_XRSTORS"),
            exceptions=(),
            cr0_mask=0,
            cr4_mask=1 << 13,
            passed_msrs={index: PASS_READ | PASS_WRITE for index in (0x174, 0x175, 0x176, 0xC0000100, 0xC0000101,
                                                                     0xC0000102)} | {0x10: PASS_READ},
        )  # fmt: skip

    def kernel(self, a: Assembler, path: Path) -> None:
        a.activity = ops.EXIT_DISPATCH
        a.label("exit")
        a.stm(Mem(RSP, at.V["REGISTERS"]), ALL)
        a.copy(R15, RSP)
        dirty_log.empty_first(a, path)
        several.left_guest(a, path)
        a.vmread(RCX, "IDT_VECTORING_INFORMATION")
        a.test(RCX, VALID)
        a.jcc(ops.CC_NZ, "recover")
        a.label("recovered")
        a.vmread(RAX, "EXIT_REASON")
        a.jmp_mem(Mem(displacement=path.addresses["handlers"], index=RAX, scale=8))

        a.label("skip")
        a.activity = ops.REENTRY
        cluster_table.inside(a, path)
        a.vmread(RAX, "EXIT_INSTRUCTION_LENGTH")
        a.vmread(RDX, "GUEST_RIP")
        a.add(RDX, register=RAX)
        cluster_table.look(a, path)
        a.vmwrite("GUEST_RIP", RDX)
        a.label("reenter")
        a.label("go_on")
        a.activity = ops.REENTRY
        several.before_entry(a, path)
        a.ld(RAX, vcpu("REQUEST"))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_NZ, "requests")
        a.label("enter")
        a.activity = ops.REENTRY
        a.ldm(Mem(RSP, at.V["REGISTERS"]), ALL)
        a.op(ops.VMRESUME)
        a.op(ops.UD)

        a.activity = ops.EXIT_DISPATCH
        events.recover_interrupted(a, path, "recovered")
        emit_paths(a, path, NAME)
        mmio.emulator(a, path)
        ports.memory_in_hypervisor(a, path)
        emit_shared(a, path)

    def user(self, a: Assembler, path: Path) -> None:
        return None


personalities.register(NAME)(Minimal())
