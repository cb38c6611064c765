"""A write to a page that only logging protects, as KVM handled it before Linux 3.6: under mmu_lock, as any fault.

Every step of Linux 3.4's tdp_page_fault that touches memory is executed: three caches of objects are looked at
(mmu_topup_memory_caches), the memory slot is searched four times (mapping_level_dirty_bitmap, gfn_to_hva,
mark_page_dirty, page_header_update_slot), the host's own page tables are walked with interrupts off
(__get_user_pages_fast), the page's descriptor is marked and counted up and down again, a ticket of the lock is taken,
notifier and room for tables are looked at, the hash of shadowed frames (mmu_need_write_protect) and the EPT page's
header are read, and the leaf is stored.

Source: Linux 3.4, arch/x86/kvm/mmu.c, virt/kvm/kvm_main.c, arch/x86/mm/gup.c.
Not modelled: asynchronous page faults of such a hypervisor; the reverse map, which stays as it is; refilling the
caches, which no such fault empties.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R9, R11, R12, R13, R14, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import spec as e
from vtsim.ept.memory_slots import SLOT
from vtsim.vmm import layout as at
from vtsim.vmm.programs import dirty_log, several
from vtsim.vmm.programs.ept_leaf import LARGE, about_user_page, find_slot, leaf_of
from vtsim.vmm.programs.words import vcpu, work
from vtsim.vmm.registry import Path
from vtsim.vmm.spec import VmmSpec

# fmt: off
DESCRIPTOR_BYTES, DESCRIPTOR_BITS = 64, 6      # of struct page
(D_FLAGS, D_COUNT, D_PRIVATE)     = (0, 8, 48)
HASH_BUCKETS: Final               = 1024       # KVM_MMU_HASH_SHIFT is 10
CACHES: Final                     = (("CACHED_LISTS", 16), ("CACHED_PAGES", 8), ("CACHED_HEADERS", 4))
CACHE_OBJECTS: Final              = 40         # KVM_NR_MEM_OBJS
# fmt: on


def wanted(vmm: VmmSpec, parameters: dict[str, int]) -> bool:
    """Does a hypervisor with these parameters handle faults so?"""
    return vmm.dirty_log.on and vmm.paging == "ept" and not parameters.get("lockless_faults", 1)


def descriptor_frames(frames: int) -> int:
    """Frames for the descriptors of so many frames, and for the hash."""
    return -(-frames * DESCRIPTOR_BYTES // 4096) + HASH_BUCKETS * 8 // 4096


def _descriptor(a: Assembler, path: Path, register: int) -> None:
    """The address of the descriptor of the frame whose physical address the register holds. Changes RAX."""
    a.shr(register, 12)
    a.shl(register, DESCRIPTOR_BITS)
    a.mov(RAX, path.addresses["frames"])
    a.add(register, register=RAX)


def protected_page(a: Assembler, path: Path) -> None:
    """The write at R13 with qualification R12, if it is one to a protected page; else on at the common handler."""
    if not wanted(path.vmm, dict(path.parameters)):
        return
    a.ld(RAX, several.vm_word(a, path, "LOGGING", RAX))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "not_protected")
    a.test(R12, e.Q_WRITE)
    a.jcc(ops.CC_Z, "not_protected")
    for name, least in CACHES:
        a.ld(RAX, vcpu(name), comment="mmu_topup_memory_caches")
        a.cmp(RAX, least)
        a.jcc(ops.CC_B, "not_protected")
    find_slot(a, "level_slot", "not_protected")
    a.ld(RAX, Mem(R14, SLOT["FLAGS"]), comment="is its log on? no large page, then")
    a.ld(RBX, several.vm_word(a, path, "NOTIFIER_SEQUENCE", RBX))
    find_slot(a, "hva_slot", "not_protected")
    _pin_page(a, path)
    _lock(a, path)
    a.ld(RAX, several.vm_word(a, path, "NOTIFIER_COUNT", RAX), comment="mmu_notifier_retry")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "locked_other")
    a.ld(RAX, several.vm_word(a, path, "NOTIFIER_SEQUENCE", RAX))
    a.cmp(RAX, register=RBX)
    a.jcc(ops.CC_NZ, "locked_other")
    a.ld(RAX, several.vm_word(a, path, "TABLES_LEFT", RAX), comment="kvm_mmu_free_some_pages")
    work(a, path, "map_page")
    leaf_of(a, R13)
    a.copy(R9, RCX)
    a.copy(RBX, RAX)
    a.mov(RDI, dirty_log.WAS_WRITABLE)
    a.test(RAX, register=RDI)
    a.jcc(ops.CC_Z, "locked_other")
    _set_leaf(a, path)
    a.mov(RAX, -1)
    a.xadd(Mem(RBP, D_COUNT), RAX)
    _unlock(a, path)
    a.jmp("reenter")
    a.label("locked_other")
    a.mov(RAX, -1)
    a.xadd(Mem(RBP, D_COUNT), RAX)
    _unlock(a, path)
    a.label("not_protected")


def _lock(a: Assembler, path: Path) -> None:
    """The VM's lock, mmu_lock. Changes RAX, RCX and RDI."""
    if path.several:
        several.lock_tables(a, path)
    else:
        several.lock(a, vcpu("TABLES_TICKET"), vcpu("TABLES_SERVING"))


def _unlock(a: Assembler, path: Path) -> None:
    """The lock is free again. Changes RAX and RDI."""
    if path.several:
        several.unlock_tables(a, path)
    else:
        several.unlock(a, vcpu("TABLES_SERVING"))


def _pin_page(a: Assembler, path: Path) -> None:
    """RBP <- descriptor of the host's page, which is referenced once more: the walk of __get_user_pages_fast."""
    work(a, path, "get_user_page")
    about_user_page(a)
    a.op(ops.PUSHF)
    a.op(ops.CLI)
    a.hook(hooks.TABLE_LOOKUP)
    a.op(ops.POPF)
    a.test(RAX, e.PTE_WRITE, comment="nothing there, or somebody else has it, too")
    a.jcc(ops.CC_Z, "not_protected")
    a.mov(RBP, e.ADDRESS)
    a.and_(RBP, register=RAX)
    a.cmp(RDX, 1)
    a.jcc(ops.CC_Z, "pinned_small")
    a.and_(RBP, -LARGE)
    a.copy(RAX, R13)
    a.and_(RAX, LARGE - 4096)
    a.or_(RBP, register=RAX)
    a.label("pinned_small")
    _descriptor(a, path, RBP)
    a.ld(RAX, Mem(RBP, D_FLAGS), comment="PageCompound")
    a.mov(RAX, 1)
    a.xadd(Mem(RBP, D_COUNT), RAX)
    a.mov(RAX, 0)
    a.xadd(Mem(RBP, D_FLAGS), RAX)  # SetPageReferenced, a locked operation that changes nothing the second time


def _set_leaf(a: Assembler, path: Path) -> None:
    """set_spte and mmu_set_spte of the leaf RBX, which stands at R9: writable, and the page is noted."""
    a.copy(RSI, R13)
    a.shr(RSI, 12)
    a.and_(RSI, HASH_BUCKETS - 1)
    a.mov(RDI, path.addresses["frame_hash"])
    a.ld(R11, Mem(RDI, index=RSI, scale=8), comment="mmu_need_write_protect: no table of the guest is shadowed")
    find_slot(a, "dirty_slot", "locked_other")
    dirty_log.note_page(a, path)
    if path.vmm.ept.accessed_dirty:  # flags that processors set meanwhile stay: mmu_spte_update
        a.mov(RAX, e.EPT_WRITE - dirty_log.WAS_WRITABLE)
        a.xadd(Mem(R9), RAX)
    else:
        a.mov(RAX, ~dirty_log.WAS_WRITABLE)
        a.and_(RBX, register=RAX)
        a.or_(RBX, e.EPT_WRITE)
        a.st(Mem(R9), RBX)
    find_slot(a, "header_slot", "locked_other")
    a.copy(RSI, R9)
    a.mov(RAX, at.HOST_DIRECT)
    a.sub(RSI, register=RAX)
    _descriptor(a, path, RSI)
    a.ld(RAX, Mem(RSI, D_PRIVATE), comment="page_header, slot_bitmap")
    a.or_(RAX, 1)
    a.st(Mem(RSI, D_PRIVATE), RAX)
