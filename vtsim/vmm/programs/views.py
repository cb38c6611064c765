"""Views of a VM's memory: hypercalls for them, and stores to what the view in use protects.

Such a store exits. It is noted, and let through: the vCPU is in the permissive view for one instruction, behind which
the monitor trap flag has it exit again. Where the guest asked for virtualization exceptions, its own handler does all
that, and nothing exits.

SDM: "EPTP Switching"; "Monitor Trap Flag"; "Virtualization Exceptions"; "Operations that Invalidate Cached Mappings".
Not modelled: views of VMs with several vCPUs; interrupts held off between such an exit and the next where the processor
delivers them by itself (`vmm.apicv`): such a store exits once more.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, R9, R12, R13, RAX, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import spec as e
from vtsim.ept import views as w
from vtsim.vmcs import bits as b
from vtsim.vmm import layout as at
from vtsim.vmm.programs import several
from vtsim.vmm.programs.ept_leaf import leaf_of
from vtsim.vmm.programs.events import request
from vtsim.vmm.programs.words import count, saved, vcpu, work, zero
from vtsim.vmm.registry import Path

EXCEPTIONS: Final = "EPT_VIOLATION_VE"
PAGE: Final = 4096


def _kept(a: Assembler, word: str) -> Mem:
    """A word of the page behind the EPTP list. Changes RDI."""
    a.ld(RDI, vcpu("VIEWS"))
    return Mem(RDI, at.STEP[word])


def _tables_of(a: Assembler, eptp: int) -> None:
    """From now on EPT of this vCPU is that of the EPTP in a register, which changes."""
    a.and_(eptp, e.ADDRESS)
    a.st(vcpu("EPT_ROOT"), eptp)
    a.st(vcpu("EPT_TOP"), eptp)


def _use(a: Assembler, path: Path, eptp: int, index: int) -> None:
    """Go on in another view at the next VM entry. Its number is in the VMCS where processors tell guests of it."""
    a.vmwrite("EPT_POINTER", eptp)
    if path.capabilities.supports(EXCEPTIONS):
        a.vmwrite("EPTP_INDEX", index)


def _trap(a: Assembler, on: bool) -> None:
    """Exit after the next instruction of the guest, or do not any more. Changes RAX."""
    a.ld(RAX, vcpu("PRIMARY"))
    if on:
        a.or_(RAX, b.MONITOR_TRAP_FLAG)
    else:
        a.and_(RAX, ~b.MONITOR_TRAP_FLAG)
    a.st(vcpu("PRIMARY"), RAX)
    a.vmwrite("PRIMARY_PROC_CONTROLS", RAX)


def violation(a: Assembler, path: Path) -> None:
    """Part of the handler of EPT violations: a store to a page that its view protects; others are left to what follows.

    R12 exit qualification, R13 guest-physical address.
    """
    if path.vmm.views == 1:
        return
    a.vmread(RAX, "EPT_POINTER")
    a.copy(RBX, RAX)
    _tables_of(a, RAX)
    a.test(R12, e.Q_WRITE)
    a.jcc(ops.CC_Z, "not_watched")
    leaf_of(a, R13)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "not_watched")
    a.test(RAX, e.EPT_WRITE)
    a.jcc(ops.CC_NZ, "not_watched")
    work(a, path, "watched_write")
    count(a, "WATCHED_WRITES")
    a.st(_kept(a, "ADDRESS"), R13)
    a.st(_kept(a, "EPTP"), RBX)
    if path.capabilities.supports(EXCEPTIONS):
        a.vmread(RAX, "EPTP_INDEX")
        a.st(_kept(a, "INDEX"), RAX)
    a.ld(RBX, Mem(RDI, at.STEP["LIST"] + 8 * w.PERMISSIVE))
    a.mov(RCX, w.PERMISSIVE)
    _use(a, path, RBX, RCX)
    _trap(a, on=True)
    a.jmp("reenter")
    a.label("not_watched")


def stepped(a: Assembler, path: Path) -> None:
    """The store was made: back to the view in which it could not be.

    SDM: "Monitor Trap Flag".
    """
    a.activity = ops.MEMORY_MANAGEMENT
    work(a, path, "write_watched")
    a.ld(RBX, _kept(a, "EPTP"))
    a.ld(RCX, Mem(RDI, at.STEP["INDEX"]))
    _use(a, path, RBX, RCX)
    _trap(a, on=False)
    a.ld(RAX, Mem(RDI, at.STEP["HELD"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "reenter")
    zero(a, RAX)
    a.st(Mem(RDI, at.STEP["HELD"]), RAX)
    request(a)
    a.jmp("reenter")


def hypercall(a: Assembler, path: Path) -> None:
    """VMCALL, whose number is in the guest's RAX: the calls about views; others are left to what follows."""
    if path.vmm.views == 1:
        return
    a.ld(RAX, saved(RAX))
    for number, label in ((w.SWITCH, "view_switch"), (w.PROTECT, "view_protect"), (w.NOTIFY, "view_notify")):
        a.cmp(RAX, number)
        a.jcc(ops.CC_Z, label)


def subroutines(a: Assembler, path: Path) -> None:
    """`view_switch`, `view_protect`, `view_notify`: the answers, each in RAX of the guest; `suppress_new`."""
    if path.vmm.views == 1:
        return
    a.activity = ops.MEMORY_MANAGEMENT
    a.label("view_switch")
    work(a, path, "switch_view")
    _find(a, path)
    _use(a, path, RBX, RCX)
    a.label("view_done")
    zero(a, RAX)
    a.label("view_answer")
    a.st(saved(RAX), RAX)
    a.jmp("skip")
    a.label("view_refused")
    a.mov(RAX, w.REFUSED)
    a.jmp("view_answer")

    a.label("view_protect")
    work(a, path, "protect_in_view")
    a.ld(R12, saved(RDX))
    a.cmp(R12, w.ALLOWED)
    a.jcc(ops.CC_A, "view_refused")
    _find(a, path)
    a.cmp(RCX, w.PERMISSIVE)
    a.jcc(ops.CC_Z, "view_refused", comment="where stores are let through")
    _tables_of(a, RBX)
    a.ld(R13, saved(RSI))
    leaf_of(a, R13)
    a.cmp(RDX, 1)
    a.jcc(ops.CC_NZ, "view_refused")
    a.test(RAX, e.EPT_READ)
    a.jcc(ops.CC_Z, "view_refused", comment="no memory, or a device's")
    a.mov(RDX, e.EPT_WRITE | e.EPT_SUPPRESS_VE)
    a.cmp(R12, w.ALLOWED)
    a.jcc(ops.CC_Z, "view_allow")
    a.and_(RAX, ~e.EPT_WRITE)
    a.mov(RDX, e.EPT_SUPPRESS_VE)
    a.cmp(R12, w.EXITS)
    a.jcc(ops.CC_Z, "view_allow")
    a.emit(ops.XOR, RDX, imm=-1)
    a.and_(RAX, register=RDX)
    zero(a, RDX)
    a.label("view_allow")
    a.or_(RAX, register=RDX)
    a.st(Mem(RCX), RAX)
    several.flush_here(a, path)
    a.jmp("view_done")

    a.label("view_notify")
    work(a, path, "notify_of_views")
    if not path.capabilities.supports(EXCEPTIONS):
        a.jmp("view_refused")
    else:
        _notify(a)
    a.label("suppress_new")  # of tables that TABLE_MAP has made, RDX the first one; R8, R9 as for it
    a.ld(RAX, Mem(R9))
    a.cmp(RDX, register=RAX)
    a.jcc(ops.CC_AE, "suppressed")
    a.copy(RDI, RDX)
    a.shl(RDI, 12)
    a.add(RDI, register=R8)
    a.mov(RCX, PAGE // 8)
    a.label("suppress_entry")
    a.ld(RAX, Mem(RDI))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "entry_in_use")
    a.st_value(Mem(RDI), e.EPT_SUPPRESS_VE)
    a.label("entry_in_use")
    a.add(RDI, 8)
    a.loop("suppress_entry")
    a.add(RDX, 1)
    a.jmp("suppress_new")
    a.label("suppressed")
    a.ret()


def _find(a: Assembler, path: Path) -> None:
    """RCX <- the view in the guest's RDI, RBX <- its EPTP; refused if there is none. Changes RDI."""
    a.ld(RCX, saved(RDI))
    a.cmp(RCX, path.vmm.views)
    a.jcc(ops.CC_AE, "view_refused")
    a.ld(RDI, vcpu("VIEWS"))
    a.ld(RBX, Mem(RDI, at.STEP["LIST"], index=RCX, scale=8))


def _notify(a: Assembler) -> None:
    """The information area of virtualization exceptions is the guest's page at RDI, or there are none any more."""
    a.vmread(RBX, "SECONDARY_PROC_CONTROLS")
    a.and_(RBX, ~b.EPT_VIOLATION_VE)
    a.ld(R13, saved(RDI))
    a.test(R13, register=R13)
    a.jcc(ops.CC_Z, "view_silent")
    a.ld(RDI, vcpu("VIEWS"))
    a.ld(RAX, Mem(RDI, at.STEP["LIST"] + 8 * w.RESTRICTED))
    _tables_of(a, RAX)
    leaf_of(a, R13)
    a.cmp(RDX, 1)
    a.jcc(ops.CC_NZ, "view_refused")
    a.test(RAX, e.EPT_WRITE)
    a.jcc(ops.CC_Z, "view_refused")
    a.mov(RDX, e.ADDRESS)
    a.and_(RDX, register=RAX)
    a.vmwrite("VE_INFORMATION_ADDRESS", RDX)
    a.or_(RBX, b.EPT_VIOLATION_VE)
    a.label("view_silent")
    a.vmwrite("SECONDARY_PROC_CONTROLS", RBX)
    a.jmp("view_done")
