"""A hosted hypervisor in the shape of Linux 6.1's kvm_intel: exits in the kernel, devices in a user-space process.

The frame of every exit follows vmx_vcpu_run, vcpu_enter_guest and vmx_handle_exit; what they do in VMX instructions,
control registers and memory are ops, the rest are path lengths (see `parameters`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import frozen

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R15, RAX, RBX, RCX, RDI, RSP
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmm import layout as at
from vtsim.vmm.personalities.kvm import fast_path, io, steps, user
from vtsim.vmm.personalities.kvm.parameters import TABLES
from vtsim.vmm.programs import (
    balloon,
    cluster_table,
    direct,
    dirty_log,
    ept,
    events,
    instructions,
    mitigations,
    mmio,
    pdptes,
    schedule,
    several,
    shadow,
    upcalls,
    views,
)
from vtsim.vmm.programs.common import emit_paths, emit_shared
from vtsim.vmm.programs.timer import want_cpu
from vtsim.vmm.programs.words import ALL, INVALID_OPCODE, VALID, saved, vcpu, work, zero
from vtsim.vmm.registry import ExitPath, Parameter, Path, exit_paths, personalities
from vtsim.vmm.vmcs import PASS_READ, PASS_WRITE, Wanted

NAME: Final = "kvm"
ENTRY_FAILURE: Final = 1 << 31
NO_SYSTEM_CALL: Final = -1000  # -KVM_ENOSYS
WITH_LOG: Final = ("ept", "agile")  # enable_pml is clear without EPT
# fmt: off
CR0_GUEST_OWNED: Final = 1 << 3                                     # TS
CR4_GUEST_OWNED: Final = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 16
#                        PVI      TSD      DE       PGE      PCE      OSFXSR   OSXMMEXCPT FSGSBASE
# fmt: on


def done(a: Assembler, path: Path) -> None:
    """The exit was handled before its handler's turn: go on."""
    a.jmp("reenter")


def hypercall(a: Assembler, path: Path) -> None:
    """VMCALL: those of direct tables, or KVM's; an unknown one of KVM answers -1000."""
    if path.vmm.paging == "direct-pv":
        direct.hypercall(a, path)
        return
    work(a, path, "hypercall")
    upcalls.hypercall(a, path)
    balloon.hypercall(a, path)
    views.hypercall(a, path)
    a.mov(RAX, NO_SYSTEM_CALL)
    a.st(saved(RAX), RAX)
    a.jmp("skip")


def exception(a: Assembler, path: Path) -> None:
    """An exception: an invalid opcode may be an instruction that only another vendor's processors have.

    So the emulator decodes what stands there, and gives the exception back where it is nothing of that kind.
    Not modelled: an instruction that is of that kind; reading the bytes outside of IA-32e mode.
    """
    a.vmread(RAX, "EXIT_INTERRUPTION_INFORMATION", comment="once: vmx_get_intr_info keeps it")
    a.copy(RCX, RAX)
    a.and_(RCX, 0xFF)
    a.cmp(RCX, INVALID_OPCODE & 0xFF)
    a.jcc(ops.CC_Z, "invalid_opcode")
    shadow.known_exception(a, path)
    a.activity = ops.EXIT_HANDLER
    a.label("invalid_opcode")
    work(a, path, "decode_refused")
    a.vmread(RAX, "ENTRY_CONTROLS")
    a.test(RAX, b.ENTRY_IA32E_MODE_GUEST)
    a.jcc(ops.CC_Z, "refused")
    mmio.keep_pages(a, path)
    a.call("fetch_instruction")
    a.test(RDI, register=RDI)
    a.jcc(ops.CC_Z, "bytes_read")
    a.ld(RAX, Mem(RDI))
    a.label("bytes_read")
    mmio.release_pages(a, path)
    a.label("refused")
    instructions.undefined(a, path)


def pause(a: Assembler, path: Path) -> None:
    """A vCPU that spins: let another one run."""
    work(a, path, "pause")
    want_cpu(a)
    a.jmp("skip")


# fmt: off
HANDLERS: Final[Mapping[int, ExitPath]] = {
    x.EXCEPTION_NMI:       exception,
    x.EXTERNAL_INTERRUPT:  done,
    x.TRIPLE_FAULT:        instructions.triple_fault,
    x.INVALID_STATE:       instructions.triple_fault,
    x.INTERRUPT_WINDOW:    events.interrupt_window,
    x.CPUID:               instructions.cpuid,
    x.HLT:                 schedule.halt,
    x.INVD:                instructions.ignore,
    x.INVLPG:              shadow.invlpg,
    x.INVPCID:             shadow.invpcid,
    x.RDPMC:               instructions.undefined,
    x.RDTSC:               instructions.read_tsc,
    x.RDTSCP:              instructions.read_tsc,
    x.TPR_BELOW_THRESHOLD: instructions.below_threshold,
    x.VMCALL:              hypercall,
    x.CR_ACCESS:           instructions.control_register,
    x.DR_ACCESS:           instructions.debug_registers,
    x.IO_INSTRUCTION:      io.port,
    x.MSR_READ:            instructions.read_msr,
    x.MSR_WRITE:           instructions.write_msr,
    x.MWAIT_INSTRUCTION:   instructions.ignore,
    x.MONITOR_INSTRUCTION: instructions.ignore,
    x.PAUSE_INSTRUCTION:   pause,
    x.MONITOR_TRAP_FLAG:   views.stepped,
    x.VMFUNC:              instructions.undefined,
    x.EPT_VIOLATION:       ept.violation,
    x.EPT_MISCONFIG:       mmio.misconfiguration,
    x.PML_FULL:            dirty_log.log_full,
    x.WBINVD:              instructions.ignore,
    x.XSETBV:              instructions.set_xcr0,
}
# fmt: on
for _reason, _handler in HANDLERS.items():
    exit_paths.register((NAME, _reason))(_handler)


@frozen
class Kvm:
    """Hosted, in the shape of Linux 6.1's kvm_intel: exits in the kernel, devices in a user-space process."""

    def parameters(self, lengths: str) -> Mapping[str, Parameter]:
        return TABLES[lengths]

    def wanted(self, path: Path) -> Wanted:
        return Wanted(
            needed=("EXTERNAL_INTERRUPT_EXITING", "NMI_EXITING", "HLT_EXITING", "UNCONDITIONAL_IO_EXITING",
                    "MOV_DR_EXITING", "MWAIT_EXITING", "MONITOR_EXITING", "RDPMC_EXITING", "USE_MSR_BITMAPS",
                    "USE_TSC_OFFSETTING", "EXIT_HOST_ADDRESS_SPACE_SIZE", "EXIT_ACKNOWLEDGE_INTERRUPT",
                    "EXIT_SAVE_DEBUG_CONTROLS", "ENTRY_LOAD_DEBUG_CONTROLS", "ENTRY_IA32E_MODE_GUEST"),
            used=("VIRTUAL_NMIS", "UNRESTRICTED_GUEST", "WBINVD_EXITING", "ENABLE_RDTSCP", "ENABLE_INVPCID",
                  "PAUSE_LOOP_EXITING", "ENABLE_XSAVES_XRSTORS", "EXIT_LOAD_IA32_EFER", "ENTRY_LOAD_IA32_EFER",
                  "EXIT_LOAD_IA32_PAT", "ENTRY_LOAD_IA32_PAT"),
            exceptions=("DB", "UD", "AC", "MC"),
            cr0_mask=~CR0_GUEST_OWNED & 0xFFFF_FFFF,
            cr4_mask=~CR4_GUEST_OWNED & 0xFFFF_FFFF,
            passed_msrs={index: PASS_READ | PASS_WRITE for index in (0x174, 0x175, 0x176, 0xC0000100, 0xC0000101,
                                                                     0xC0000102)} | {0x10: PASS_READ},
        )  # fmt: skip

    def kernel(self, a: Assembler, path: Path) -> None:
        after_exit(a, path)
        before_entry(a, path)
        a.activity = ops.EXIT_DISPATCH
        events.recover_interrupted(a, path, "recovered")
        a.label("external")
        events.external_interrupt(a, path)
        a.jmp("interrupts_on")
        fast_path.write_msr(a, path)
        emit_paths(a, path, NAME)
        user.kernel_side(a, path)
        mmio.emulator(a, path)
        io.memory(a, path)
        emit_shared(a, path)
        if path.vmm.paging == "ept":
            a.activity = ops.EXIT_HANDLER
            pdptes.load(a, path)

    def user(self, a: Assembler, path: Path) -> None:
        user.process(a, path)


def after_exit(a: Assembler, path: Path) -> None:
    """`exit`: from HOST_RIP to the jump to the handler. RBX the exit reason.

    Not modelled: XSAVE state that is loaded only in the guest; performance counters.
    """
    a.label("exit")
    a.activity = ops.EXIT_DISPATCH
    a.stm(Mem(RSP, at.V["REGISTERS"]), ALL)
    a.copy(R15, RSP)
    dirty_log.empty_first(a, path)
    several.left_guest(a, path)
    mitigations.left_guest(a, path)
    a.emit(ops.MOV_FROM_CR, RAX, imm=2)
    a.st(vcpu("GUEST_CR2"), RAX)
    a.vmread(RBX, "EXIT_REASON")
    a.vmread(RCX, "IDT_VECTORING_INFORMATION")
    a.test(RCX, VALID)
    a.jcc(ops.CC_NZ, "recover")
    a.label("recovered")
    fast_path.look(a, path)
    steps.note_time(a)
    a.cmp(RBX, x.EXTERNAL_INTERRUPT)
    a.jcc(ops.CC_Z, "external")
    a.label("interrupts_on")
    a.activity = ops.EXIT_DISPATCH
    a.op(ops.STI)
    work(a, path, "exit_common")
    may_log = path.vmm.paging in WITH_LOG and path.capabilities.supports("ENABLE_PML")
    if may_log and not (path.several and dirty_log.uses_log(path)):
        dirty_log.empty_at_exit(a, path)
    a.test(RBX, ENTRY_FAILURE)
    a.jcc(ops.CC_NZ, "unexpected")
    a.jmp_mem(Mem(displacement=path.addresses["handlers"], index=RBX, scale=8))


def before_entry(a: Assembler, path: Path) -> None:
    """`skip`, `reenter`: from the end of a handler to VMRESUME."""
    a.label("skip")
    a.activity = ops.REENTRY
    cluster_table.inside(a, path)
    steps.step_over(a, path, "end_shadow")
    cluster_table.look(a, path)
    a.label("reenter")
    a.activity = ops.REENTRY
    a.op(ops.CLI)
    several.before_entry(a, path)
    a.ld(RAX, vcpu("REQUEST"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "attention")
    a.label("enter")
    a.activity = ops.REENTRY
    work(a, path, "entry_common")
    mitigations.flush_l1d(a, path, "enter")
    a.emit(ops.MOV_FROM_CR, RAX, imm=2)
    a.ld(RCX, vcpu("GUEST_CR2"))
    a.cmp(RAX, register=RCX)
    a.jcc(ops.CC_NZ, "load_cr2")
    a.label("cr2_loaded")
    mitigations.enter_guest(a, path)
    a.ldm(Mem(RSP, at.V["REGISTERS"]), ALL)
    mitigations.clear_buffers(a, path)
    a.op(ops.VMRESUME)
    a.op(ops.UD)
    a.label("load_cr2")
    a.emit(ops.MOV_TO_CR, RCX, imm=2)
    a.jmp("cr2_loaded")
    a.label("end_shadow")
    steps.end_blocking(a)
    a.jmp("reenter")
    a.label("go_on")
    a.op(ops.STI)
    a.jmp("reenter")

    a.label("attention")
    a.ld(RCX, vcpu("DR_SWITCHED"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "requests")
    zero(a, RCX)  # the guest's turn with the debug registers ended with this exit
    a.st(vcpu("DR_SWITCHED"), RCX)
    a.ld(RCX, vcpu("PRIMARY"))
    a.or_(RCX, b.MOV_DR_EXITING)
    a.st(vcpu("PRIMARY"), RCX)
    a.vmwrite("PRIMARY_PROC_CONTROLS", RCX)
    a.jmp("requests")


personalities.register(NAME)(Kvm())
