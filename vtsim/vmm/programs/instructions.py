"""Emulation of instructions that exit: CPUID, MSRs, control registers and the small ones.

SDM: "Instructions That Cause VM Exits Unconditionally"; "Instructions That Cause VM Exits Conditionally".
Not modelled: CPUID leaves beyond the highest one answered with the highest's data; faults of CR0 and CR4 writes
but those of wrong PDPTEs.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R12, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.vmm import layout as at
from vtsim.vmm.programs import pdptes
from vtsim.vmm.programs.events import request
from vtsim.vmm.programs.msr_switch import write_switched
from vtsim.vmm.programs.timer import now
from vtsim.vmm.programs.words import GENERAL_PROTECTION, INVALID_OPCODE, LOW, join, saved, vcpu, work, zero
from vtsim.vmm.registry import Path

RESULTS: Final = (RAX, RCX, RDX, RBX)  # of CPUID, in the order of their numbers and of a table's entry
TSC, TSC_ADJUST, TSC_DEADLINE, EFER, PAT = 0x10, 0x3B, 0x6E0, 0xC0000080, 0x277
STAR, LSTAR, FMASK = at.SWITCHED_MSRS[: at.USER_RETURN_MSRS]
MSR_WORDS: Final = 2  # index, value
IGNORE_MSRS: Final = "ignore_msrs"

# fmt: off
MSR_PATHS: Final = (  # MSRs that are more than storage: index, label of the read, label of the write
    (TSC_DEADLINE, "msr_read_deadline", "write_tsc_deadline"),
    (TSC_ADJUST,   "msr_read_adjust",   "msr_write_adjust"),
    (TSC,          "msr_read_tsc",      "msr_write_tsc"),
    (EFER,         "msr_read_efer",     "msr_write_efer"),
    (PAT,          "msr_read_pat",      "msr_write_pat"),
    (STAR,         "msr_read_star",     "msr_write_star"),
    (LSTAR,        "msr_read_lstar",    "msr_write_lstar"),
    (FMASK,        "msr_read_fmask",    "msr_write_fmask"),
)
IN_VMCS: Final = (("efer", "GUEST_IA32_EFER"), ("pat", "GUEST_IA32_PAT"))
# fmt: on


def cpuid(a: Assembler, path: Path) -> None:
    """Answer from the vCPU's CPUID table; a leaf that is not there reads as zero."""
    work(a, path, "cpuid")
    a.ld(RSI, saved(RAX, 4))
    a.ldm(vcpu("CPUID_WORDS"), (RCX, RDX, RDI))
    a.hook(hooks.FIND)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "cpuid_zeroes")
    a.ld(RDX, Mem(RAX, 8), comment="subleaves")
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_NS, "cpuid_subleaf")
    a.label("cpuid_found")
    a.ldm(Mem(RAX, 16), RESULTS)
    a.stm(saved(RAX), RESULTS)
    a.jmp("skip")
    a.label("cpuid_subleaf")
    a.ld(RCX, saved(RCX, 4))
    a.cmp(RCX, register=RDX)
    a.jcc(ops.CC_AE, "cpuid_zeroes")
    a.copy(RDX, RCX)  # entry + 48 * subleaf
    a.shl(RDX, 4)
    a.shl(RCX, 5)
    a.add(RAX, register=RDX)
    a.add(RAX, register=RCX)
    a.jmp("cpuid_found")
    a.label("cpuid_zeroes")
    for register in RESULTS:
        zero(a, register)
    a.stm(saved(RAX), RESULTS)
    a.jmp("skip")


def read_msr(a: Assembler, path: Path) -> None:
    """Read an MSR of the virtual CPU: by its own path, or from the table of those that are storage, else #GP."""
    work(a, path, "msr")
    a.ld(RSI, saved(RCX, 4))
    a.lea(RCX, Mem(RSI, -0x800))
    a.cmp(RCX, 0x40)
    a.jcc(ops.CC_B, "apic_read")
    for index, label, _ in MSR_PATHS:
        a.cmp(RSI, index)
        a.jcc(ops.CC_Z, label)
    _find_msr(a, path, "read")
    a.ld(RAX, Mem(RAX, 8))
    a.label("msr_value")
    a.copy(RDX, RAX)
    a.shr(RDX, 32)
    a.and_(RAX, LOW)
    a.st(saved(RAX), RAX)
    a.st(saved(RDX), RDX)
    a.jmp("skip")

    for label, field in (("deadline", "TSC_DEADLINE"), ("adjust", "TSC_ADJUST")):
        a.label(f"msr_read_{label}")
        a.ld(RAX, vcpu(field))
        a.jmp("msr_value")
    for label, field in IN_VMCS:
        a.label(f"msr_read_{label}")
        a.vmread(RAX, field)
        a.jmp("efer_read" if label == "efer" and path.vmm.on_shadow else "msr_value")
    for n, label in enumerate(("star", "lstar", "fmask")):
        a.label(f"msr_read_{label}")
        a.ld(RAX, vcpu("GUEST_MSRS", n))
        a.jmp("msr_value")
    a.label("msr_read_tsc")
    now(a)
    a.ld(RCX, vcpu("TSC_OFFSET"))
    a.add(RAX, register=RCX)
    a.jmp("msr_value")


def write_msr(a: Assembler, path: Path) -> None:
    """Write an MSR of the virtual CPU."""
    work(a, path, "msr")
    a.ld(RAX, saved(RAX, 4))
    a.ld(RDX, saved(RDX, 4))
    join(a)
    a.ld(RSI, saved(RCX, 4))
    a.lea(RCX, Mem(RSI, -0x800))
    a.cmp(RCX, 0x40)
    a.jcc(ops.CC_B, "msr_write_apic")
    for index, _, label in MSR_PATHS:
        a.cmp(RSI, index)
        a.jcc(ops.CC_Z, label)
    a.copy(RBX, RAX)
    _find_msr(a, path, "write")
    a.st(Mem(RAX, 8), RBX)
    a.jmp("skip")

    a.label("msr_write_apic")
    a.call("apic_write")
    a.jmp("skip")
    for label, field in IN_VMCS:
        a.label(f"msr_write_{label}")
        if label == "efer" and path.vmm.paging != "ept":
            a.jmp("efer_written")
        else:
            a.vmwrite(field, RAX)
            a.jmp("skip")
    for n, label in enumerate(("star", "lstar", "fmask")):
        a.label(f"msr_write_{label}")
        write_switched(a, n)
    a.label("msr_write_tsc")
    a.copy(RBX, RAX)
    now(a)
    a.ld(RCX, vcpu("TSC_OFFSET"))
    a.add(RAX, register=RCX)
    a.sub(RBX, register=RAX, comment="the jump of guest time")
    a.ld(RAX, vcpu("TSC_ADJUST"))
    a.add(RAX, register=RBX)
    a.jmp("msr_adjusted")
    a.label("msr_write_adjust")
    a.ld(RCX, vcpu("TSC_ADJUST"))
    a.copy(RBX, RAX)
    a.sub(RBX, register=RCX)
    a.label("msr_adjusted")
    a.st(vcpu("TSC_ADJUST"), RAX)
    a.ld(RAX, vcpu("TSC_OFFSET"))
    a.add(RAX, register=RBX)
    a.st(vcpu("TSC_OFFSET"), RAX)
    a.vmwrite("TSC_OFFSET", RAX)
    a.jmp("skip")


def _find_msr(a: Assembler, path: Path, access: str) -> None:
    """RAX <- the table's entry for the MSR in RSI; an unknown one raises #GP, or is ignored."""
    a.ld(RDI, vcpu("MSR_TABLE"))
    a.ld(RDX, vcpu("MSR_ENTRIES"))
    a.mov(RCX, MSR_WORDS)
    a.hook(hooks.FIND)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, f"msr_{access}_known")
    if path.parameters.get(IGNORE_MSRS, 0):
        a.jmp("msr_value" if access == "read" else "skip")
    else:
        a.mov(RAX, GENERAL_PROTECTION)
        zero(a, RDX)
        a.jmp("inject")
    a.label(f"msr_{access}_known")


def control_register(a: Assembler, path: Path) -> None:
    """MOV to and from control registers, CLTS and LMSW, as the exit qualification says.

    SDM: "Exit Qualification for Control-Register Accesses".
    """
    work(a, path, "control_register")
    a.vmread(R12, "EXIT_QUALIFICATION")
    a.copy(RBX, R12)
    a.shr(RBX, 8)
    a.and_(RBX, 15)
    a.cmp(RBX, RSP, comment="which lives in the VMCS")
    a.jcc(ops.CC_NZ, "cr_operand_known")
    a.vmread(RAX, "GUEST_RSP")
    a.st(saved(RSP), RAX)
    a.label("cr_operand_known")
    a.copy(RCX, R12)
    a.and_(RCX, 15, comment="number")
    a.shr(R12, 4)
    a.test(R12, 3, comment="access type")
    a.jcc(ops.CC_NZ, "cr_not_to")
    a.ld(RAX, Mem(15, at.V["REGISTERS"], index=RBX, scale=8))
    for number, label in ((3, "cr_to_3"), (4, "cr_to_4"), (8, "cr_to_8")):
        a.cmp(RCX, number)
        a.jcc(ops.CC_Z, label)
    if path.vmm.paging != "ept":
        a.jmp("cr_to_0")
    else:
        loads = path.vmm.personality == "kvm"  # under others no write exits that loads PDPTEs
        a.label("cr_to_0")
        if loads:
            pdptes.written(a, 0, pdptes.CR0_PDPTES)
        a.vmwrite("CR0_READ_SHADOW", RAX)
        a.vmwrite("GUEST_CR0", RAX)
        a.jmp("skip")
        a.label("cr_to_4")
        if loads:
            pdptes.written(a, 4, pdptes.CR4_PDPTES)
        a.vmwrite("CR4_READ_SHADOW", RAX)
        a.or_(RAX, 1 << 13, comment="VMXE")
        a.vmwrite("GUEST_CR4", RAX)
        a.jmp("skip")
    a.label("cr_to_8")
    a.and_(RAX, 15)
    a.shl(RAX, 4)
    a.ld(RDI, vcpu("APIC_PAGE"))
    a.st(Mem(RDI, 0x80, size=4), RAX)
    request(a)
    a.jmp("skip")
    a.label("cr_not_to")
    a.test(R12, 2)
    a.jcc(ops.CC_NZ, "cr_status")
    a.cmp(RCX, 8)
    a.jcc(ops.CC_Z, "cr_from_8")
    if path.vmm.on_shadow:
        a.ld(RAX, vcpu("SHADOW_CR3"))
    else:
        a.vmread(RAX, "GUEST_CR3")
    a.jmp("cr_read")
    a.label("cr_from_8")
    a.ld(RDI, vcpu("APIC_PAGE"))
    a.ld(RAX, Mem(RDI, 0x80, size=4))
    a.shr(RAX, 4)
    a.label("cr_read")
    a.st(Mem(15, at.V["REGISTERS"], index=RBX, scale=8), RAX)
    a.cmp(RBX, RSP)
    a.jcc(ops.CC_NZ, "skip")
    a.vmwrite("GUEST_RSP", RAX)
    a.jmp("skip")

    a.label("cr_status")
    a.vmread(RAX, "CR0_READ_SHADOW")
    a.test(R12, 1)
    a.jcc(ops.CC_NZ, "cr_lmsw")
    a.and_(RAX, ~8)
    a.jmp("cr_to_0")
    a.label("cr_lmsw")
    a.shr(R12, 12)
    a.and_(R12, 15)
    a.and_(RAX, ~14)
    a.or_(RAX, register=R12)
    a.jmp("cr_to_0")


def load_cr3(a: Assembler, path: Path) -> None:
    """`cr_to_3` where EPT translates: give the CPU the guest's CR3 and drop the translations of this VPID."""
    a.label("cr_to_3")
    a.vmwrite("GUEST_CR3", RAX)
    if path.vmm.vpid:
        a.mov(RCX, 1)
        a.ld(RAX, vcpu("VPID"))
        a.st(vcpu("DESCRIPTOR"), RAX)
        a.emit(ops.INVVPID, RCX, mem=vcpu("DESCRIPTOR"))
    a.jmp("skip")


def below_threshold(a: Assembler, path: Path) -> None:
    """The guest lowered its task priority below what a waiting interrupt needs.

    SDM: "TPR Virtualization".
    """
    zero(a, RAX)
    a.vmwrite("TPR_THRESHOLD", RAX)
    request(a)
    a.jmp("reenter")


def reflect(a: Assembler, path: Path) -> None:
    """An exception of the guest's own, whose interruption information is in RAX: back to it.

    SDM: "Information for VM Exits Due to Vectored Events".
    """
    a.vmread(RDX, "EXIT_INTERRUPTION_ERROR_CODE")
    a.jmp("inject")


def undefined(a: Assembler, path: Path) -> None:
    """An instruction that this virtual CPU does not have."""
    a.mov(RAX, INVALID_OPCODE)
    zero(a, RDX)
    a.jmp("inject")


def ignore(a: Assembler, path: Path) -> None:
    """An instruction with nothing to do: step over it."""
    work(a, path, "ignored_instruction")
    a.jmp("skip")


def read_tsc(a: Assembler, path: Path) -> None:
    """RDTSC and RDTSCP, where the control makes them exit."""
    now(a)
    a.ld(RCX, vcpu("TSC_OFFSET"))
    a.add(RAX, register=RCX)
    a.jmp("msr_value")


def set_xcr0(a: Assembler, path: Path) -> None:
    """XSETBV: the extended state that the guest enables."""
    work(a, path, "set_xcr0")
    a.ld(RAX, saved(RAX, 4))
    a.ld(RDX, saved(RDX, 4))
    join(a)
    a.st(vcpu("XCR0"), RAX)
    a.jmp("skip")


def debug_registers(a: Assembler, path: Path) -> None:
    """MOV DR: let the guest have the debug registers until its next exit, and execute the instruction again."""
    work(a, path, "debug_registers")
    a.op(ops.CLI)
    a.ld(RAX, vcpu("REQUEST"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "reenter", comment="first things first: the instruction exits again")
    a.ld(RAX, vcpu("PRIMARY"))
    a.and_(RAX, ~(1 << 23))
    a.st(vcpu("PRIMARY"), RAX)
    a.vmwrite("PRIMARY_PROC_CONTROLS", RAX)
    a.st_value(vcpu("DR_SWITCHED"), 1)
    a.st_value(vcpu("REQUEST"), at.REQUEST_STATE, "seen to after the next exit")
    a.jmp("enter")


def triple_fault(a: Assembler, path: Path) -> None:
    """The guest is over."""
    a.vmread(RDX, "EXIT_QUALIFICATION")
    a.vmread(RAX, "EXIT_REASON")
    a.and_(RAX, 0xFFFF)
    a.add(RAX, 1)
    a.jmp("die")


def unexpected(a: Assembler, path: Path) -> None:
    """`unexpected`: an exit that the personality excuses itself from; the VM ends with its reason."""
    a.label("unexpected")
    triple_fault(a, path)
