"""Shadow paging: page faults, CR3, INVLPG and paging modes of a guest whose tables the processor never sees.

A page fault is the guest's own where its tables refuse the access; else the shadow entry was missing or too strict,
and is made. Tables of the guest are read-only for it: a store to one is emulated, or puts a leaf table out of sync
until the guest flushes translations.

SDM: "Memory Virtualization"; "Exception Bitmap"; "Exit Qualification for Control-Register Accesses".
Not modelled: under shadow paging, an interrupt whose delivery meets a fault of the guest is lost; that a store to a
table which is emulated has writes to the tables on its way counted anew.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.kernels import shadow_hooks as h
from vtsim.cpu.kernels.shadow_pool import FLUSH, NO_ROOT, STRANGE_ROOT
from vtsim.cpu.slots import R10, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept import shadow as d
from vtsim.ept import spec as e
from vtsim.ept.memory_slots import SLOT, SLOT_PRIVATE, SLOT_READ_ONLY
from vtsim.vmcs import reasons as x
from vtsim.vmm import layout as at
from vtsim.vmm.programs import agile, ept, instructions, mmio, several
from vtsim.vmm.programs import shadow_shared as shared
from vtsim.vmm.programs.cluster_table import remember_store
from vtsim.vmm.programs.ept_leaf import about_user_page, find_slot
from vtsim.vmm.programs.pdptes import CR0_PDPTES, CR4_PDPTES
from vtsim.vmm.programs.words import (
    GENERAL_PROTECTION,
    HARDWARE_EXCEPTION,
    VALID,
    WITH_ERROR,
    kill,
    saved,
    vcpu,
    work,
    zero,
)
from vtsim.vmm.registry import Path
from vtsim.vmm.shadow import CR0_FORCED, EFER_LMA, EFER_LME, EFER_NX

DOUBLE_FAULT, PAGE_FAULT = 8, 14
DOUBLE_FAULT_EVENT: Final = VALID | WITH_ERROR | HARDWARE_EXCEPTION | DOUBLE_FAULT
PAGE_FAULT_EVENT: Final = VALID | WITH_ERROR | HARDWARE_EXCEPTION | PAGE_FAULT
MAPPED, TO_TABLE, TO_WALK_AGAIN = range(3)  # what SHADOW_MAP answers
REFUSED_WRITE: Final = e.PF_PRESENT | e.PF_WRITE
VMXE, PAE, CR4_LA57, PCIDE, RFLAGS_AC = 1 << 13, 1 << 5, 1 << 12, 1 << 17, 1 << 18
MODE_BITS: Final = (  # register with the guest's CR0 or CR4, bit, paging mode
    (RAX, 16, d.MODE_WP), (RCX, 20, d.MODE_SMEP), (RCX, 21, d.MODE_SMAP), (RCX, 12, d.MODE_LA57),
    (RAX, 31, d.MODE_PAGING), (RCX, 5, d.MODE_PAE), (RCX, 4, d.MODE_PSE),
)  # fmt: skip


def exception(a: Assembler, path: Path) -> None:
    """An exception: of the guest, or on its way through the shadow tables."""
    a.vmread(RAX, "EXIT_INTERRUPTION_INFORMATION")
    known_exception(a, path)


def known_exception(a: Assembler, path: Path) -> None:
    """The same, with the interruption information in RAX."""
    if path.vmm.on_shadow:
        a.copy(RCX, RAX)
        a.and_(RCX, 0xFF)
        a.cmp(RCX, PAGE_FAULT)
        a.jcc(ops.CC_Z, "shadow_fault")
    instructions.reflect(a, path)
    if path.vmm.on_shadow:
        fault(a, path)


def hook(a: Assembler, number: int) -> None:
    """A hook on the pool of this VM."""
    a.ld(RDI, vcpu("SHADOW"))
    a.hook(number)


def fault(a: Assembler, path: Path) -> None:
    """`shadow_fault`: a page fault. R12 its error code, R13 the guest-physical address, R14 the memory slot.

    SDM: "Information for VM Exits Due to Vectored Events".
    """
    a.activity = ops.MEMORY_MANAGEMENT
    a.label("shadow_fault")
    work(a, path, "shadow_fault")
    a.vmread(RSI, "EXIT_QUALIFICATION")
    a.vmread(R12, "EXIT_INTERRUPTION_ERROR_CODE")
    a.test(R12, e.PF_RESERVED)
    a.jcc(ops.CC_NZ, "shadow_device")
    a.label("shadow_walk")
    work(a, path, "guest_walk")
    a.vmread(RDX, "GUEST_RFLAGS")
    a.and_(RDX, RFLAGS_AC)
    a.or_(RDX, register=R12)
    hook(a, h.SHADOW_WALK)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "true_fault")
    a.copy(R13, RCX)
    find_slot(a, "slot", "no_slot")
    _leave_if_tracked(a, path)
    a.ld(RAX, Mem(R14, SLOT["FLAGS"]))
    a.test(RAX, SLOT_PRIVATE)
    a.jcc(ops.CC_NZ, "emulate_or_retry")
    a.test(RAX, SLOT_READ_ONLY)
    a.jcc(ops.CC_Z, "lock_page" if path.several else "find_page")
    a.test(R12, e.PF_WRITE)
    a.jcc(ops.CC_NZ, "emulate")
    if path.several:
        a.label("lock_page")
        shared.begin(a, path, at.FOR_SHADOWING)
        a.label("walk_again")
        a.call("shadow_verify")
        a.jcc(ops.CC_NZ, "reenter_unlocked")
    ept.find_page(a, path)
    a.label("map_page")
    work(a, path, "map_shadow")
    a.copy(RCX, RBP)
    a.ld(R10, Mem(R14, SLOT["FLAGS"]))
    hook(a, h.SHADOW_MAP)
    if path.several:
        a.push(RAX)
        a.call("shadow_settle")
        a.pop(RAX)
        a.cmp(RAX, TO_WALK_AGAIN)
        a.jcc(ops.CC_Z, "walk_again")
        a.copy(R12, RAX)
        shared.end(a, path)
    else:
        a.copy(R12, RAX)
        a.call("shadow_settle")
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "table_write")
    a.jmp("reenter")
    ept.make_page(a, path)

    a.label("shadow_device")
    hook(a, h.SHADOW_FIND_DEVICE)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "shadow_walk")
    a.copy(R13, RAX)
    work(a, path, "misconfiguration")
    a.jmp("emulate")

    a.label("true_fault")
    a.st(vcpu("GUEST_CR2"), RSI)
    if not path.keeps_cr2:
        a.emit(ops.MOV_TO_CR, RSI, imm=2)
    a.ld(RCX, vcpu("PENDING"), comment="what the exit interrupted")
    a.and_(RCX, VALID | 0x7FF)
    a.mov(RAX, DOUBLE_FAULT_EVENT)
    a.cmp(RCX, VALID | HARDWARE_EXCEPTION | DOUBLE_FAULT)
    a.jcc(ops.CC_Z, "third_fault")
    a.cmp(RCX, VALID | HARDWARE_EXCEPTION | PAGE_FAULT)
    a.jcc(ops.CC_Z, "second_fault")
    a.mov(RAX, PAGE_FAULT_EVENT)
    a.jmp("inject")
    a.label("second_fault")
    zero(a, RDX)
    a.jmp("inject")
    a.label("third_fault")
    kill(a, x.TRIPLE_FAULT + 1)
    write_table(a, path)


def _leave_if_tracked(a: Assembler, path: Path) -> None:
    """To `tracked` if the fault, R12 at R13, is a write to an upper table of the guest, which no mapping allows.

    Changes RAX, RCX, RDX, RSI, RDI, R8 and R10.
    """
    a.copy(RAX, R12)
    a.and_(RAX, REFUSED_WRITE | e.PF_RESERVED)
    a.cmp(RAX, REFUSED_WRITE)
    a.jcc(ops.CC_NZ, "not_tracked")
    a.ld(RDI, vcpu("SHADOW"))
    a.ld(RDI, Mem(RDI, d.POOL["FRAMES"]))
    a.copy(RCX, R13)
    a.shr(RCX, 12)
    a.ld(RAX, Mem(RDI, index=RCX, scale=8))
    a.shr(RAX, d.UPPER_TABLES)
    a.test(RAX, d.COUNT_MASK)
    if path.vmm.huge_pages == "never":  # of a table that was only read the process has the page of zeroes
        a.jcc(ops.CC_Z, "not_tracked")
        test_own_page(a)
    a.jcc(ops.CC_NZ, "tracked")
    a.label("not_tracked")


def test_own_page(a: Assembler) -> None:
    """ZF <- may a store through the process's mapping of R13, slot R14, not be made? It would fault in the host.

    Changes RAX, RCX, RDX, RSI, RDI, R8 and R10.
    """
    about_user_page(a)
    a.hook(hooks.TABLE_LOOKUP)
    a.test(RAX, e.PTE_WRITE)


def store_decoded(a: Assembler, registers: int, memory: int, name: str = "table") -> None:
    """Make the guest's store that DECODE has found: RBX or, below 16, register RCX; RDX bytes; guest-physical R13.

    `registers` is where the vCPU in R15 keeps general registers, `memory` the linear address of guest memory; `name`
    is for labels.
    """
    a.cmp(RCX, 16)
    a.jcc(ops.CC_Z, f"{name}_value")
    a.ld(RBX, Mem(R15, registers, index=RCX, scale=8))
    a.label(f"{name}_value")
    a.mov(RDI, memory)
    a.add(RDI, register=R13)
    for size in (8, 4, 2, 1):
        a.cmp(RDX, size)
        a.jcc(ops.CC_NZ, f"{name}_not_{size}")
        a.st(Mem(RDI, size=size), RBX)
        a.label(f"{name}_not_{size}")


def write_table(a: Assembler, path: Path) -> None:
    """`table_write`: a store to a table of the guest, at R13, is emulated; any other instruction ends the table.

    `tracked`: the same without a look for the host's page. KVM's emulator walks the guest's tables once more for the
    operand, unless EPT has told where it is: `table_write_at`. Where that walk leads elsewhere, the guest tries again.

    Source: Linux 6.1, page_fault_handle_page_track, emulator_read_write_onepage.
    """
    walks = path.vmm.personality == "kvm"
    a.activity = ops.MEMORY_MANAGEMENT
    a.label("tracked")
    work(a, path, "tracked_write")
    a.label("table_write")
    if walks:
        a.ld(RDI, vcpu("SHADOW"))
        a.ld(R12, Mem(RDI, d.POOL["ERROR"]))
        a.ld(RBP, Mem(RDI, d.POOL["ADDRESS"]))
    a.label("table_write_at")
    work(a, path, "emulate")
    a.call("fetch_instruction")
    a.copy(RSI, R14)
    a.hook(hooks.DECODE)
    a.cmp(RAX, ops.ST)
    a.jcc(ops.CC_NZ, "no_table")
    a.st(vcpu("DECODED", 0), RCX)
    a.st(vcpu("DECODED", 1), RDX)
    mmio.decoded_at(a)
    remember_store(a, path)
    if walks:
        a.test(R12, register=R12)
        a.jcc(ops.CC_Z, "operand_known")
        work(a, path, "emulate_paged")
        a.copy(RSI, RBP)
        a.copy(RDX, R12)
        a.call("shadow_verify_at")
        a.jcc(ops.CC_NZ, "reenter")
        a.label("operand_known")
    shared.begin(a, path, at.FOR_WRITES)
    a.ld(RCX, vcpu("DECODED", 0))
    a.ld(RDX, vcpu("DECODED", 1))
    store_decoded(a, at.V["REGISTERS"], at.USER_RAM)
    a.copy(RCX, RDX)
    a.copy(RSI, R13)
    work(a, path, "table_written")
    hook(a, h.SHADOW_WRITE)
    a.call("shadow_settle")
    agile.note(a, path)
    shared.end(a, path)
    a.jmp("skip_decoded")
    a.label("no_table")
    shared.begin(a, path, at.FOR_WRITES)
    a.copy(RSI, R13)
    hook(a, h.SHADOW_UNPROTECT)
    a.call("shadow_settle")
    a.jmp(several.unlocked(path))


def subroutines(a: Assembler, path: Path) -> None:
    """`shadow_settle` (what a hook left in RDX), `write_root` (root RAX), `flush_guest`, `shadow_verify`."""
    shared.entries(a, path)
    shared.verify(a, path)
    if path.several:
        shared.subroutines(a, path)
    else:
        a.label("shadow_settle")
        shared.count_entries(a, path)
        a.test(RDX, NO_ROOT)
        a.jcc(ops.CC_NZ, "settle_root")
        if path.vmm.vpid or path.vmm.paging == "agile":
            a.test(RDX, FLUSH)
            a.jcc(ops.CC_NZ, "flush_guest")
        a.ret()
        a.label("settle_root")
        shared.load_root(a, path)
    a.label("flush_guest")
    several.flush_on_shadow(a, path)
    a.ret()
    if path.vmm.paging == "agile":
        agile.scan(a, path)

    a.label("write_root")
    a.ld(RCX, vcpu("GUEST_CR4"))
    a.test(RCX, PCIDE)
    a.jcc(ops.CC_Z, "root_without_pcid")
    a.ld(RCX, vcpu("SHADOW_CR3"))
    a.and_(RCX, 0xFFF)
    a.or_(RAX, register=RCX)
    a.label("root_without_pcid")
    a.vmwrite("GUEST_CR3", RAX)
    a.ret()


def control_registers(a: Assembler, path: Path) -> None:
    """`cr_to_0`, `cr_to_3`, `cr_to_4` with the guest's value in RAX; `paging_mode`; `efer_written`, `efer_read`."""
    a.label("cr_to_3")
    a.emit(ops.XOR, R12, R12)
    a.ld(RCX, vcpu("GUEST_CR4"))
    a.test(RCX, PCIDE)
    a.jcc(ops.CC_Z, "cr3_value")
    a.copy(R12, RAX)
    a.shr(R12, 63)  # 1: keep what the PCID has
    a.shl(RAX, 1)
    a.shr(RAX, 1)
    a.label("cr3_value")
    a.st(vcpu("SHADOW_CR3"), RAX)
    shared.begin(a, path, at.FOR_SYNC)
    a.mov(RCX, 1)
    shared.load_root(a, path, refused="cr3_refused")
    shared.settle(a, path)
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "cr3_kept")
    a.label("cr3_synchronize")
    work(a, path, "synchronize")
    shared.synchronize(a, path, h.SHADOW_SYNC)
    shared.end(a, path)
    a.call("flush_guest")
    a.jmp("skip")
    a.label("cr3_kept")
    a.test(RDX, STRANGE_ROOT)
    a.jcc(ops.CC_NZ, "cr3_synchronize")
    if not path.several:
        a.call("shadow_settle")
    shared.end(a, path)
    a.jmp("skip")

    for register, forced, watched in ((0, CR0_FORCED, CR0_PDPTES), (4, VMXE | PAE, CR4_PDPTES)):
        a.label(f"cr_to_{register}")
        a.vmread(R13, f"CR{register}_READ_SHADOW")
        a.copy(R12, RAX)
        a.emit(ops.XOR, R12, R13)
        a.and_(R12, watched)
        a.vmwrite(f"CR{register}_READ_SHADOW", RAX)
        if register == 4:
            a.st(vcpu("GUEST_CR4"), RAX)
        a.or_(RAX, forced)
        a.vmwrite(f"GUEST_CR{register}", RAX)
        if register == 0:
            a.jmp("paging_mode")
    a.label("paging_mode")
    a.ld(RDI, vcpu("SHADOW"))
    a.ld(RBX, Mem(RDI, d.POOL["MODE"]))
    a.and_(RBX, d.MODE_NX | d.MODE_AGILE | d.MODE_LEGACY | d.MODE_PAE_ROOT)
    a.label("paging_mode_nx")
    a.vmread(RAX, "CR0_READ_SHADOW")
    a.vmread(RCX, "CR4_READ_SHADOW")
    for register, bit, mode in MODE_BITS:
        a.test(register, 1 << bit)
        a.jcc(ops.CC_Z, f"mode_without_{mode}")
        a.or_(RBX, mode)
        a.label(f"mode_without_{mode}")
    if path.several:
        a.push(RBX)
        shared.begin(a, path, at.FOR_SYNC)
        a.pop(RBX)
    a.copy(RCX, R12)
    shared.load_root(a, path, mode=True, refused="pdptes_refused")
    shared.settle(a, path)
    work(a, path, "synchronize")
    shared.synchronize(a, path, h.SHADOW_SYNC_ALL)
    shared.end(a, path)
    a.call("flush_guest")
    a.jmp("skip")

    a.label("pdptes_refused")
    shared.end(a, path)
    a.test(R12, CR0_PDPTES)
    a.jcc(ops.CC_Z, "cr4_refused")
    a.vmwrite("CR0_READ_SHADOW", R13)
    a.or_(R13, CR0_FORCED)
    a.vmwrite("GUEST_CR0", R13)
    a.jmp("cr_refused")
    a.label("cr4_refused")
    a.vmwrite("CR4_READ_SHADOW", R13)
    a.st(vcpu("GUEST_CR4"), R13)
    a.or_(R13, VMXE | PAE)
    a.vmwrite("GUEST_CR4", R13)
    a.jmp("cr_refused")
    a.label("cr3_refused")
    shared.end(a, path)
    a.ld(RDI, vcpu("SHADOW"))
    a.ld(RAX, Mem(RDI, d.POOL["CR3"]))
    a.st(vcpu("SHADOW_CR3"), RAX)
    a.label("cr_refused")
    a.mov(RAX, GENERAL_PROTECTION)
    zero(a, RDX)
    a.jmp("inject")

    a.label("efer_written")
    zero(a, R12)
    a.copy(RBX, RAX)
    a.shr(RBX, 10)
    a.and_(RBX, d.MODE_NX)
    a.test(RAX, EFER_LME)
    a.jcc(ops.CC_NZ, "efer_long")
    a.or_(RBX, d.MODE_LEGACY)
    a.label("efer_long")
    if path.vmm.paging == "agile":
        a.or_(RBX, d.MODE_AGILE)
    a.or_(RAX, EFER_NX if path.profile.features.nx else 0)
    a.vmwrite("GUEST_IA32_EFER", RAX)
    a.jmp("paging_mode_nx")
    a.label("efer_read")  # the processor always has NX, for entries that are the monitor's own
    a.ld(RDI, vcpu("SHADOW"))
    a.ld(RBX, Mem(RDI, d.POOL["MODE"]))
    a.test(RBX, d.MODE_LEGACY)
    a.jcc(ops.CC_Z, "efer_read_nx")
    a.and_(RAX, ~(EFER_LME | EFER_LMA))
    a.label("efer_read_nx")
    a.test(RBX, d.MODE_NX)
    a.jcc(ops.CC_NZ, "msr_value")
    a.and_(RAX, ~EFER_NX)
    a.jmp("msr_value")


def drop_address(a: Assembler, path: Path, address: int) -> None:
    """Drop the translations of a guest's address, or all of its VPID where that is all there is. Changes RAX RCX."""
    if path.vmm.vpid:
        a.st(vcpu("DESCRIPTOR", 1), address)
        several.drop_address(a, path)


def invlpg(a: Assembler, path: Path) -> None:
    """INVLPG: the entry of a table that is out of sync is read again, and the translation goes."""
    a.activity = ops.MEMORY_MANAGEMENT
    work(a, path, "invlpg")
    a.vmread(RSI, "EXIT_QUALIFICATION")
    a.label("invlpg_address")
    a.copy(R13, RSI)
    shared.begin(a, path, at.FOR_SYNC)
    if path.several:
        a.copy(RSI, R13)
    hook(a, h.SHADOW_INVLPG)
    a.call("shadow_settle")
    shared.end(a, path)
    drop_address(a, path, R13)
    a.jmp("skip")


def invpcid(a: Assembler, path: Path) -> None:
    """INVPCID: of the roots loaded last, those that its descriptor names are synchronized, or an entry is read again.

    A recorded guest has no memory behind the operand: RAX and RCX are the descriptor, RDX is the type.

    SDM: "INVPCID—Invalidate Process-Context Identifier".
    """
    a.activity = ops.MEMORY_MANAGEMENT
    work(a, path, "invlpg")
    a.call("fetch_instruction")
    for register, saved_as in ((RBX, RAX), (RBP, RCX), (R12, RDX)):
        a.ld(register, saved(saved_as))
    a.test(RDI, register=RDI)
    a.jcc(ops.CC_Z, "invpcid_known")
    a.vmread(RAX, "GUEST_RSP")
    a.st(saved(RSP), RAX)
    a.copy(RSI, R14)
    a.hook(hooks.DECODE)
    a.ld(R12, Mem(R15, at.V["REGISTERS"], index=RCX, scale=8))
    a.copy(RSI, R15)
    a.add(RSI, at.V["REGISTERS"])
    a.hook(hooks.OPERAND)
    a.copy(R13, RAX)
    a.copy(R14, RAX)
    a.call("linear_memory")
    a.ld(RBP, Mem(RDI))
    a.copy(R14, R13)
    a.add(R14, 8)
    a.copy(R13, RBP)
    a.call("linear_memory")
    a.ld(RBP, Mem(RDI))
    a.copy(RBX, R13)
    a.label("invpcid_known")
    a.cmp(R12, 3)
    a.jcc(ops.CC_A, "invpcid_refused")
    a.copy(RAX, RBX)
    a.shr(RAX, 12)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "invpcid_refused")
    a.cmp(R12, 2)
    a.jcc(ops.CC_AE, "invpcid_allowed")
    a.vmread(RAX, "CR4_READ_SHADOW")
    a.test(RAX, PCIDE)
    a.jcc(ops.CC_NZ, "invpcid_address")
    a.test(RBX, register=RBX)
    a.jcc(ops.CC_NZ, "invpcid_refused")
    a.label("invpcid_address")
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "invpcid_allowed")
    a.copy(RCX, RBP)
    a.shr(RCX, 47)
    a.test(RAX, CR4_LA57)
    a.jcc(ops.CC_Z, "invpcid_canonical")
    a.shr(RCX, 9)
    a.shl(RCX, 9)
    a.or_(RCX, 511)  # of five levels, the highest eight bits are the sign
    a.cmp(RCX, 511)
    a.jcc(ops.CC_Z, "invpcid_allowed")
    a.label("invpcid_canonical")
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "invpcid_allowed")
    a.cmp(RCX, 0x1FFFF)
    a.jcc(ops.CC_Z, "invpcid_allowed")
    a.label("invpcid_refused")
    a.mov(RAX, GENERAL_PROTECTION)
    zero(a, RDX)
    a.jmp("inject")
    a.label("invpcid_allowed")
    shared.begin(a, path, at.FOR_SYNC)
    if path.several:
        a.test(R12, register=R12)
        a.jcc(ops.CC_Z, "invpcid_protected")
        shared.protect(a, path)
        a.label("invpcid_protected")
    a.copy(RSI, RBP)
    a.copy(RCX, R12)
    a.copy(R13, RBP)
    hook(a, h.SHADOW_INVPCID)
    a.copy(RBP, RAX)
    a.call("shadow_settle")
    shared.end(a, path)
    a.test(RBP, register=RBP)
    a.jcc(ops.CC_Z, "skip")  # whoever loads that root again finds it strange
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "invpcid_flush")
    drop_address(a, path, R13)
    a.jmp("skip")
    a.label("invpcid_flush")
    a.call("flush_guest")
    a.jmp("skip")


def zap_everything(a: Assembler) -> None:
    """The memory map changed: all shadow pages go."""
    hook(a, h.SHADOW_ZAP_ALL)
    a.call("shadow_settle")
