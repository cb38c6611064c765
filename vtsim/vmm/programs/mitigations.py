"""What the host executes against transient-execution attacks, at the places where Linux does.

Every function emits nothing where the scenario does not ask for it (`vmm.mitigations`).

Source: Linux 6.1: arch/x86/entry (calling.h, entry_64.S), arch/x86/kvm/vmx (vmenter.S, vmx.c: vmx_l1d_flush,
vmx_vcpu_load_vmcs), arch/x86/include/asm/nospec-branch.h.
SDM: "Operations that Invalidate TLBs and Paging-Structure Caches"; "VERR/VERW—Verify a Segment for Reading or Writing".
Not modelled: retpolines of lengths that are not counted; guests that write IA32_SPEC_CTRL; LFENCE behind a stuffed
return stack; the return stack at a switch of threads; PCIDs of processes, so that a switch of processes flushes as it
does without isolation.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.vmm import layout as at
from vtsim.vmm.programs.words import ALL, FRAME, GS, cpu, vcpu, zero
from vtsim.vmm.registry import Path

MSR_SPEC_CTRL, MSR_PRED_CMD, MSR_FLUSH_CMD = 0x48, 0x49, 0x10B
IBRS = 1
RETURN_STACK: Final = 32  # RSB_CLEAR_LOOPS
PUSHED: Final = 40  # bytes that an interrupt pushes, above the saved registers
CARRIERS: Final = (RAX, RCX, RDX, RBX, RBP, RSI, R8)
IRET_WORDS: Final = CARRIERS[:5]
IRET_FRAME: Final = at.C["ENTRY_TOP"] - PUSHED


def _write(a: Assembler, msr: int, value: int) -> None:
    """Changes RAX, RCX and RDX."""
    a.mov(RCX, msr)
    a.mov(RAX, value)
    zero(a, RDX)
    a.op(ops.WRMSR)


# --- user space ------------------------------------------------------------------------------------------


def to_kernel_tables(a: Assembler, path: Path, register: int) -> None:
    """From the tables of user space to the kernel's, whose translations are kept where PCIDs tag them."""
    if path.vmm.mitigations.pti:
        pcid = path.profile.features.pcid
        a.emit(ops.MOV_FROM_CR, register, imm=3)
        a.and_(register, ~(at.USER_HALF | at.USER_PCID))
        if pcid:
            a.or_(register, at.NOFLUSH)
        a.emit(ops.MOV_TO_CR, register, imm=3)


def entered_kernel(a: Assembler, path: Path) -> None:
    """Behind a system call or an interrupt of user space. Changes RAX, RCX and RDX."""
    if path.vmm.mitigations.ibrs:
        _write(a, MSR_SPEC_CTRL, IBRS)


def leave_kernel(a: Assembler, path: Path) -> None:
    """Before user space runs, while registers are free. Changes RAX, RCX and RDX."""
    if path.vmm.mitigations.ibrs:
        _write(a, MSR_SPEC_CTRL, 0)
    if path.vmm.mitigations.pti:
        a.ld(RAX, cpu("USER_CR3"))
        a.st(cpu("USER_CR3_NOW"), RAX)
        if path.profile.features.pcid:  # a flush that was wanted is done by this load
            a.or_(RAX, at.NOFLUSH)
            a.st(cpu("USER_CR3"), RAX)


def to_user_tables(a: Assembler, path: Path) -> None:
    """Load what `leave_kernel` chose; RSP is lost."""
    if path.vmm.mitigations.pti:
        a.ld(RSP, cpu("USER_CR3_NOW"))
        a.emit(ops.MOV_TO_CR, RSP, imm=3)


def keep_user_stack(a: Assembler, path: Path) -> None:
    """Where user space goes on is in the thread's structure, which its tables lack. Changes RAX."""
    if path.vmm.mitigations.pti:
        a.ld(RAX, vcpu("USER_RSP"))
        a.st(cpu("USER_STACK"), RAX)


def user_stack(path: Path) -> Mem:
    """The stack pointer of user space, when its tables are loaded."""
    return cpu("USER_STACK") if path.vmm.mitigations.pti else vcpu("USER_RSP")


def clear_buffers(a: Assembler, path: Path) -> None:
    """VERW of a selector in memory; any will do. Registers stay.

    SDM: "VERR/VERW—Verify a Segment for Reading or Writing".
    """
    if path.vmm.mitigations.mds == "full":
        a.emit(ops.VERW, mem=cpu("SELECTOR"))


def interrupted_user(a: Assembler, path: Path) -> None:
    """An interrupt of user space, registers saved below what was pushed: from the entry stack to the thread's."""
    to_kernel_tables(a, path, RAX)
    if path.vmm.mitigations.pti:
        a.ld(RDI, cpu("CURRENT"))
        a.sub(RDI, FRAME + PUSHED)
        for offset in range(0, FRAME + PUSHED, 8 * len(CARRIERS)):
            a.ldm(Mem(RSP, offset), CARRIERS)
            a.stm(Mem(RDI, offset), CARRIERS)
        a.copy(RSP, RDI)
    entered_kernel(a, path)


def return_to_user(a: Assembler, path: Path) -> None:
    """The end of such an interrupt, up to SWAPGS; with page-table isolation all of it, by IRET from the entry stack."""
    leave_kernel(a, path)
    if path.vmm.mitigations.pti:
        a.ldm(Mem(RSP, FRAME), IRET_WORDS)
        a.stm(Mem(displacement=IRET_FRAME, segment=GS), IRET_WORDS)
        a.ldm(Mem(RSP), ALL)
        to_user_tables(a, path)
        a.ld(RSP, cpu("SELF"))
        a.add(RSP, IRET_FRAME)
    clear_buffers(a, path)
    if path.vmm.mitigations.pti:
        a.op(ops.SWAPGS)
        a.op(ops.IRET)


# --- guests ----------------------------------------------------------------------------------------------


def left_guest(a: Assembler, path: Path) -> None:
    """Behind a VM exit, registers saved: nothing that the guest left in the return stack is returned to."""
    mitigations = path.vmm.mitigations
    if mitigations.stuffs_return_stack:
        a.mov(RCX, RETURN_STACK // 2)
        a.label("stuff_return_stack")
        for half in ("once", "twice"):
            a.call(f"stuffed_{half}")
            a.op(ops.UD)
            a.label(f"stuffed_{half}")
        a.add(RSP, 16)
        a.sub(RCX, 1)
        a.jcc(ops.CC_NZ, "stuff_return_stack")
    if mitigations.ibrs:
        _write(a, MSR_SPEC_CTRL, IBRS)


def flush_l1d(a: Assembler, path: Path, where: str) -> None:
    """Before VM entry, with interrupts off. Changes RAX, RCX and RDX."""
    how = path.vmm.mitigations.vmentry_l1d_flush
    if how == "never":
        return
    if how == "cond":
        a.ld(RAX, cpu("L1D_UNSAFE"))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_Z, f"{where}_l1d_stays")
        a.st_value(cpu("L1D_UNSAFE"), 0)
    _write(a, MSR_FLUSH_CMD, 1)
    a.label(f"{where}_l1d_stays")


def enter_guest(a: Assembler, path: Path) -> None:
    """Before the guest's registers are loaded. Changes RAX, RCX and RDX."""
    if path.vmm.mitigations.ibrs:
        _write(a, MSR_SPEC_CTRL, 0)


# --- switches --------------------------------------------------------------------------------------------


def switched_process(a: Assembler, path: Path) -> None:
    """Behind the load of another process's tables, CR3 in RAX. Changes RAX, RCX and RDX."""
    if path.vmm.mitigations.pti:  # translations of user space go at the next way out
        a.or_(RAX, user_bits(pcid=path.profile.features.pcid))
        a.st(cpu("USER_CR3"), RAX)
    if path.vmm.mitigations.spectre_v2_user == "on":
        _write(a, MSR_PRED_CMD, 1)


def switched_vcpu(a: Assembler, path: Path) -> None:
    """Behind the load of another vCPU's VMCS. Changes RAX, RCX and RDX."""
    if path.vmm.mitigations.spectre_v2_user != "off":
        _write(a, MSR_PRED_CMD, 1)


def user_bits(*, pcid: bool) -> int:
    """What tells the CR3 of a process's user space from the kernel's."""
    return at.USER_HALF | (at.USER_PCID if pcid else 0)
