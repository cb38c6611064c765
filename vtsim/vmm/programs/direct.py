"""Direct page tables: the hypercalls of a paravirtual guest, each update validated before it is made.

A frame that becomes a table is validated entry by entry, and the frames that its entries lead to before it; one that no
entry relies on any more is let go the same way. Translations are dropped wherever a frame becomes a table or ceases to
be one, since what a TLB holds of its earlier use would let the guest write to tables.

SDM: "VMCALL—Call to VM Monitor"; "Caching Translation Information".
Not modelled: large pages in direct tables; grants of pages between VMs; five levels; device memory of a paravirtual
guest; string I/O of a paravirtual guest.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, R9, R10, R12, R13, R14, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import direct as d
from vtsim.ept import spec as e
from vtsim.vmm import layout as at
from vtsim.vmm.programs.shadow import drop_address
from vtsim.vmm.programs.words import GENERAL_PROTECTION, saved, vcpu, work, zero
from vtsim.vmm.registry import Path
from vtsim.vmm.shadow import EFER_NX

# fmt: off
INDIVIDUAL, SINGLE, KEEP_GLOBALS = 0, 1, 3          # types of INVVPID
DROP, DROP_ALL = 1, 2                               # RBP: what is left to do at the end of a hypercall
CR0_FIXED: Final = 1 << 31 | 1 << 16 | 1            # PG, WP, PE
CR4_FIXED: Final = 1 << 5 | 1 << 12 | 1 << 17       # PAE, LA57, PCIDE
EFER_FIXED: Final = EFER_NX | 1 << 10 | 1 << 8      # NXE, LMA, LME
REFUSED: Final = 1
# fmt: on


def hypercall(a: Assembler, path: Path) -> None:
    """VMCALL. R14 counts requests, R12 and R13 hold one, RBX how many are left."""
    a.activity = ops.MEMORY_MANAGEMENT
    work(a, path, "hypercall")
    a.ld(RAX, saved(RAX))
    a.ld(R12, saved(RDI))
    a.ld(R13, saved(RSI))
    for register in (R14, RBP):
        zero(a, register)
    a.cmp(RAX, d.CALL_REQUEST)
    a.jcc(ops.CC_Z, "direct_single")
    a.cmp(RAX, d.CALL_MULTI)
    a.jcc(ops.CC_NZ, "direct_done")
    a.copy(RBX, R13)
    a.cmp(RBX, d.BATCH_LIMIT)
    a.jcc(ops.CC_A, "direct_done")
    a.test(RBX, register=RBX)
    a.jcc(ops.CC_Z, "direct_done")
    a.label("direct_next")
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.copy(RAX, R14)
    a.shl(RAX, 4)
    a.ldm(Mem(RDI, d.SHARED_REQUESTS, index=RAX), (R12, R13))
    a.call("direct_request")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "direct_refused")
    a.add(R14, 1)
    a.sub(RBX, 1)
    a.jcc(ops.CC_NZ, "direct_next")
    a.jmp("direct_done")
    a.label("direct_single")
    a.call("direct_request")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "direct_refused")
    a.add(R14, 1)
    a.jmp("direct_done")
    a.label("direct_refused")
    a.ld(RAX, vcpu("REFUSALS"))
    a.add(RAX, 1)
    a.st(vcpu("REFUSALS"), RAX)
    a.label("direct_done")
    a.st(saved(RAX), R14)
    if path.vmm.vpid:  # without a tag the next VM entry drops everything
        a.test(RBP, register=RBP)
        a.jcc(ops.CC_Z, "skip")
        keeps = path.capabilities.supports("INVVPID_SINGLE_CONTEXT_KEEPING_GLOBALS")
        a.mov(RCX, KEEP_GLOBALS if keeps else SINGLE)
        a.test(RBP, DROP_ALL)
        a.jcc(ops.CC_Z, "direct_drop")
        a.mov(RCX, SINGLE)
        a.label("direct_drop")
        a.vmread(RAX, "VPID")
        a.st(vcpu("DESCRIPTOR"), RAX)
        a.emit(ops.INVVPID, RCX, mem=vcpu("DESCRIPTOR"))
    a.jmp("skip")


def subroutines(a: Assembler, path: Path) -> None:
    """`direct_request`, the counting of frames, and what the guest may do to control registers and EFER."""
    a.activity = ops.MEMORY_MANAGEMENT
    _request(a, path)
    _other_requests(a, path)
    _frames(a, path)
    _entries(a, path)
    a.activity = ops.EXIT_HANDLER
    _registers(a, path)


def _request(a: Assembler, path: Path) -> None:
    """`direct_request`: carry out R12, R13; RAX <- 0, or not. R14, RBX stay, as in all of these."""
    a.label("direct_request")
    a.copy(RAX, R12)
    a.and_(RAX, d.KIND)
    a.jcc(ops.CC_NZ, "direct_other")
    work(a, path, "update_entry")
    a.copy(RSI, R12)
    a.shr(RSI, 12)
    a.call("frame_word")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "request_end")
    a.copy(R8, RCX)
    a.shr(R8, d.TYPE)
    a.and_(R8, d.TYPE_MASK)
    a.jcc(ops.CC_Z, "request_refused")
    a.cmp(R8, d.WRITABLE)
    a.jcc(ops.CC_Z, "request_refused")
    a.cmp(R8, 4)
    a.jcc(ops.CC_NZ, "update_new")
    a.test(R12, 8 * d.KERNEL_HALF)
    a.jcc(ops.CC_NZ, "request_refused")
    a.label("update_new")
    a.test(R13, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "update_old")
    a.copy(RSI, R13)
    a.call("entry_get")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "request_end")
    a.label("update_old")
    a.mov(RDI, at.HOST_DIRECT)
    a.add(RDI, register=R12)
    a.ld(RSI, Mem(RDI))
    a.st(Mem(RDI), R13)
    a.test(RSI, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "request_done")
    a.call("entry_put")
    a.label("request_done")
    zero(a, RAX)
    a.label("request_end")
    a.ret()
    a.label("request_refused")
    a.mov(RAX, REFUSED)
    a.ret()


def _other_requests(a: Assembler, path: Path) -> None:
    """Flushes, pins and CR3; the kind is in RAX."""
    kinds = {
        d.FLUSH_PAGE: "request_flush_page", d.FLUSH_ALL: "request_flush", d.PIN: "request_pin",
        d.UNPIN: "request_unpin", d.LOAD: "request_load",
    }  # fmt: skip
    a.label("direct_other")
    for kind, label in kinds.items():
        a.cmp(RAX, kind)
        a.jcc(ops.CC_Z, label)
    a.jmp("request_refused")

    a.label("request_flush_page")
    work(a, path, "invlpg")
    drop_address(a, path, R13)
    a.jmp("request_done")
    a.label("request_flush")
    a.or_(RBP, DROP)
    a.jmp("request_done")

    a.label("request_pin")
    work(a, path, "pin_table")
    a.call("frame_of_value")
    a.jcc(ops.CC_NZ, "request_refused")
    a.copy(RAX, RCX)
    a.shr(RAX, d.TYPE)
    a.and_(RAX, d.TYPE_MASK)
    a.jcc(ops.CC_NZ, "request_refused", comment="in use already, as a root or otherwise")
    a.mov(R8, 4)
    a.call("type_get")
    a.ret()
    a.label("request_unpin")
    work(a, path, "pin_table")
    a.call("frame_of_value")
    a.jcc(ops.CC_NZ, "request_refused")
    a.call("is_root")
    a.jcc(ops.CC_NZ, "request_refused")
    for current in ("GUEST_CR3", ""):
        if current:
            a.vmread(RAX, current)
        else:
            a.ld(RAX, vcpu("KERNEL_ROOT"))
        a.and_(RAX, e.ADDRESS)
        a.shr(RAX, 12)
        a.cmp(RAX, register=RSI)
        a.jcc(ops.CC_Z, "request_refused")
    a.mov(R8, 4)
    a.call("type_put")
    a.jmp("request_done")

    a.label("request_load")
    work(a, path, "load_cr3")
    a.mov(RAX, ~(e.ADDRESS | 0xFFF | e.PTE_NO_EXECUTE))
    a.test(RAX, register=R13)
    a.jcc(ops.CC_NZ, "request_refused")
    a.call("frame_of_value")
    a.jcc(ops.CC_NZ, "request_refused")
    a.call("is_root")
    a.jcc(ops.CC_NZ, "request_refused")
    a.copy(RAX, R13)
    a.shl(RAX, 1)
    a.shr(RAX, 1)
    a.vmwrite("GUEST_CR3", RAX)
    a.test(R13, register=R13)
    a.jcc(ops.CC_S, "request_done", comment="bit 63: keep translations")
    a.or_(RBP, DROP)
    a.jmp("request_done")

    a.label("frame_of_value")  # RSI <- frame that R13 names; flags: is it the guest's?
    a.copy(RSI, R13)
    a.and_(RSI, e.ADDRESS)
    a.shr(RSI, 12)
    a.call("frame_word")
    a.test(RAX, register=RAX)
    a.ret()
    a.label("is_root")  # of the word in RCX; flags
    a.copy(RAX, RCX)
    a.shr(RAX, d.TYPE)
    a.and_(RAX, d.TYPE_MASK)
    a.cmp(RAX, 4)
    a.ret()


def _frames(a: Assembler, path: Path) -> None:
    """`frame_word`, `type_get`, `type_put`: the word of frame RSI; one more or less entry relies on its type R8."""
    a.label("frame_word")  # RDX <- its address, RCX <- the word, RAX <- 0 if the frame is the guest's
    a.cmp(RSI, path.addresses["frame_count"])
    a.jcc(ops.CC_AE, "frame_foreign")
    a.mov(RDX, path.addresses["frame_words"])
    a.lea(RDX, Mem(RDX, 0, index=RSI, scale=8))
    a.ld(RCX, Mem(RDX))
    a.copy(RAX, RCX)
    a.shr(RAX, d.OWNER)
    a.ld(RDI, vcpu("NUMBER"))
    a.add(RDI, 1)
    a.sub(RAX, register=RDI)
    a.ret()
    a.label("frame_foreign")
    a.mov(RAX, REFUSED)
    a.ret()

    a.label("type_get")  # RAX <- 0, or not
    a.call("frame_word")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "type_end")
    a.copy(RAX, RCX)
    a.shr(RAX, d.TYPE)
    a.and_(RAX, d.TYPE_MASK)
    a.jcc(ops.CC_Z, "type_new")
    a.cmp(RAX, register=R8)
    a.jcc(ops.CC_NZ, "type_refused")
    a.add(RCX, 1)
    a.st(Mem(RDX), RCX)
    zero(a, RAX)
    a.label("type_end")
    a.ret()
    a.label("type_refused")
    a.mov(RAX, REFUSED)
    a.ret()
    a.label("type_new")
    work(a, path, "validate_table")
    a.copy(RAX, R8)
    a.shl(RAX, d.TYPE)
    a.or_(RCX, register=RAX)
    a.add(RCX, 1)
    a.st(Mem(RDX), RCX)
    a.or_(RBP, DROP_ALL)
    _begin_table(a)
    a.label("validate_next")
    a.ld(RSI, Mem(R9, 0, index=R10, scale=8))
    a.cmp(R8, 4)
    a.jcc(ops.CC_NZ, "validate_entry")
    a.cmp(R10, d.KERNEL_HALF)
    a.jcc(ops.CC_B, "validate_entry")
    a.mov(RDI, at.HOST_DIRECT)
    a.ld(RAX, vcpu("KERNEL_ROOT"))
    a.add(RDI, register=RAX)
    a.ld(RAX, Mem(RDI, 0, index=R10, scale=8))
    a.emit(ops.XOR, RAX, RSI)
    a.and_(RAX, ~e.PTE_ACCESSED)
    a.jcc(ops.CC_NZ, "validate_undo")
    a.jmp("validate_good")
    a.label("validate_entry")
    a.test(RSI, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "validate_good")
    a.call("entry_get")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "validate_undo")
    a.label("validate_good")
    a.add(R10, 1)
    a.cmp(R10, 512)
    a.jcc(ops.CC_NZ, "validate_next")
    _end_table(a)
    zero(a, RAX)
    a.ret()
    a.label("validate_undo")
    a.call("let_go")
    _end_table(a)
    a.call("frame_word")
    a.call("no_type")
    a.mov(RAX, REFUSED)
    a.ret()

    a.label("type_put")
    a.call("frame_word")
    a.label("type_less")
    a.sub(RCX, 1)
    a.st(Mem(RDX), RCX)
    a.mov(RAX, d.COUNT)
    a.test(RAX, register=RCX)
    a.jcc(ops.CC_NZ, "type_end")
    work(a, path, "validate_table")
    a.call("no_type")
    a.or_(RBP, DROP_ALL)
    _begin_table(a)
    a.mov(R10, 512)
    a.cmp(R8, 4)
    a.jcc(ops.CC_NZ, "put_entries")
    a.mov(R10, d.KERNEL_HALF)
    a.label("put_entries")
    a.call("let_go")
    _end_table(a)
    a.ret()

    a.label("no_type")  # of the frame whose word is RCX at RDX
    a.shr(RCX, d.OWNER)
    a.shl(RCX, d.OWNER)
    a.st(Mem(RDX), RCX)
    a.ret()

    a.label("let_go")  # nothing relies any more on what the R10 first entries of the table at R9 lead to
    a.cmp(R8, 4)
    a.jcc(ops.CC_NZ, "let_go_next")
    a.cmp(R10, d.KERNEL_HALF)
    a.jcc(ops.CC_BE, "let_go_next")
    a.mov(R10, d.KERNEL_HALF)
    a.label("let_go_next")
    a.test(R10, register=R10)
    a.jcc(ops.CC_Z, "type_end")
    a.sub(R10, 1)
    a.ld(RSI, Mem(R9, 0, index=R10, scale=8))
    a.test(RSI, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "let_go_next")
    a.call("entry_put")
    a.jmp("let_go_next")


def _begin_table(a: Assembler) -> None:
    """R9 <- the linear address of table RSI, R10 <- its first entry; what they were is kept, with RSI."""
    for register in (RSI, R9, R10):
        a.push(register)
    a.shl(RSI, 12)
    a.mov(R9, at.HOST_DIRECT)
    a.add(R9, register=RSI)
    zero(a, R10)


def _end_table(a: Assembler) -> None:
    for register in (R10, R9, RSI):
        a.pop(register)


def _entries(a: Assembler, path: Path) -> None:
    """`entry_get`, `entry_put`: entry RSI of a table of level R8 begins or ceases to rely on its frame."""
    a.label("entry_get")  # RAX <- 0, or not
    a.mov(RAX, ~d.LEGAL)
    a.test(RAX, register=RSI)
    a.jcc(ops.CC_NZ, "type_refused")
    a.cmp(R8, 1)
    a.jcc(ops.CC_Z, "leaf_get")
    a.sub(R8, 1)
    a.and_(RSI, e.ADDRESS)
    a.shr(RSI, 12)
    a.call("type_get")
    a.add(R8, 1)
    a.ret()
    a.label("leaf_get")
    a.push(RSI)
    a.and_(RSI, e.ADDRESS)
    a.shr(RSI, 12)
    a.call("frame_word")
    a.pop(RSI)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "type_end")
    a.test(RSI, e.PTE_WRITE)
    a.jcc(ops.CC_Z, "type_end")
    a.copy(RAX, RCX)
    a.shr(RAX, d.TYPE)
    a.and_(RAX, d.TYPE_MASK)
    a.jcc(ops.CC_Z, "leaf_writable")
    a.cmp(RAX, d.WRITABLE)
    a.jcc(ops.CC_NZ, "type_refused")
    a.label("leaf_writable")
    a.mov(RAX, d.WRITABLE << d.TYPE)
    a.or_(RCX, register=RAX)
    a.add(RCX, 1)
    a.st(Mem(RDX), RCX)
    zero(a, RAX)
    a.ret()

    a.label("entry_put")
    a.cmp(R8, 1)
    a.jcc(ops.CC_Z, "leaf_put")
    a.sub(R8, 1)
    a.and_(RSI, e.ADDRESS)
    a.shr(RSI, 12)
    a.call("type_put")
    a.add(R8, 1)
    a.ret()
    a.label("leaf_put")
    a.test(RSI, e.PTE_WRITE)
    a.jcc(ops.CC_Z, "type_end")
    a.and_(RSI, e.ADDRESS)
    a.shr(RSI, 12)
    a.call("frame_word")
    a.sub(RCX, 1)
    a.st(Mem(RDX), RCX)
    a.mov(RAX, d.COUNT)
    a.test(RAX, register=RCX)
    a.jcc(ops.CC_NZ, "type_end")
    a.jmp("no_type")


def _registers(a: Assembler, path: Path) -> None:
    """`cr_to_0`, `cr_to_3`, `cr_to_4`, `efer_written`: what would end the hypervisor's hold on tables is #GP."""
    for number, fixed in ((0, CR0_FIXED), (4, CR4_FIXED)):
        a.label(f"cr_to_{number}")
        a.vmread(RCX, f"CR{number}_READ_SHADOW")
        a.emit(ops.XOR, RCX, RAX)
        a.test(RCX, fixed)
        a.jcc(ops.CC_NZ, "cr_to_3")
        a.vmwrite(f"CR{number}_READ_SHADOW", RAX)
        if number == 4:
            a.or_(RAX, 1 << 13, comment="VMXE")
        a.vmwrite(f"GUEST_CR{number}", RAX)
        a.jmp("skip")
    a.label("efer_written")
    a.vmread(RCX, "GUEST_IA32_EFER")
    a.emit(ops.XOR, RCX, RAX)
    a.test(RCX, EFER_FIXED)
    a.jcc(ops.CC_NZ, "cr_to_3")
    a.vmwrite("GUEST_IA32_EFER", RAX)
    a.jmp("skip")
    a.label("cr_to_3")
    a.mov(RAX, GENERAL_PROTECTION)
    zero(a, RDX)
    a.jmp("inject")
