"""EPT violations: find the memory slot, find or make the host page, map it.

The host page is found in the page tables of the VM's process; where it is missing the host's own page-fault code
makes it. Leaf sizes follow what backs the memory.

Memory is write-back in EPT. KVM also has the guest's PAT ignored (`ignore_pat`), so that a guest whose types differ
from the host's own cannot have one line under two; it lets a guest have a say only where a device is assigned whose
DMA the unit cannot have snooped, and every unit here can (snoop control).

SDM: "EPT Violations"; "Exit Qualification for EPT Violations"; "EPT Misconfigurations".
Not modelled: a background thread that makes large pages of EPT again which code has split (nx_huge_pages).
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.kernels.shadow_hooks import SHADOW_UNMAP
from vtsim.cpu.kernels.shadow_pool import FLUSH
from vtsim.cpu.slots import R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import spec as e
from vtsim.ept.memory_slots import SLOT, SLOT_PRIVATE, SLOT_READ_ONLY
from vtsim.ept.tables import EPT_PAGE
from vtsim.vmm import layout as at
from vtsim.vmm.memory import EPT_WRITTEN, RAM_PAGE
from vtsim.vmm.programs import agile, dirty_log, frames, locked_fault, several, swap, views
from vtsim.vmm.programs.ept_leaf import LARGE, about_user_page, find_slot, leaf_of
from vtsim.vmm.programs.words import count, kill, vcpu, work, zero
from vtsim.vmm.registry import Path

# fmt: off
OUT_OF_HOST_MEMORY: Final = 1 << 17   # codes of DEATH
OUT_OF_TABLES: Final      = 1 << 18
MMIO_ENTRY: Final         = e.EPT_WRITE | e.EPT_EXECUTE           # write without read: a misconfiguration on purpose
READ_EXECUTE: Final       = EPT_PAGE & ~e.EPT_WRITE | e.EPT_ACCESSED
ZERO_PAGE: Final          = RAM_PAGE & ~(e.PTE_WRITE | e.PTE_DIRTY)
# fmt: on


def violation(a: Assembler, path: Path) -> None:
    """A guest-physical access without a mapping that allows it. R12 qualification, R13 address, R14 slot."""
    a.activity = ops.MEMORY_MANAGEMENT
    a.vmread(R12, "EXIT_QUALIFICATION")
    a.vmread(R13, "GUEST_PHYSICAL_ADDRESS")
    work(a, path, "ept_violation")
    if path.vmm.paging == "agile":
        agile.violation(a, path)
        return
    views.violation(a, path)
    if path.vmm.dirty_log.on:
        dirty_log.protected_page(a, path)
        locked_fault.protected_page(a, path)
    a.label("resolve_violation")
    find_slot(a, "slot", "no_slot")
    a.ld(RAX, Mem(R14, SLOT["FLAGS"]))
    a.test(RAX, SLOT_PRIVATE)
    a.jcc(ops.CC_NZ, "emulate_or_retry")
    a.test(RAX, SLOT_READ_ONLY)
    a.jcc(ops.CC_Z, "lock_page" if path.several else "find_page")
    a.test(R12, e.Q_WRITE)
    a.jcc(ops.CC_NZ, "emulate")
    if path.several:
        a.label("lock_page")
    several.lock_tables(a, path)
    several.because(a, path, at.FOR_FAULTS)
    find_page(a, path)
    map_page(a, path)
    make_page(a, path)


def find_page(a: Assembler, path: Path) -> None:
    """`find_page`: RBX <- entry of the host's page tables for the address in R13, RBP its level (1 or 2)."""
    a.label("find_page")
    work(a, path, "get_user_page")
    about_user_page(a)
    a.hook(hooks.TABLE_LOOKUP)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "make_page")
    if path.vmm.swap.on:
        a.copy(R9, RCX)
    a.copy(RBX, RAX)
    a.copy(RBP, RDX)
    a.test(R12, e.Q_WRITE)
    a.jcc(ops.CC_Z, "map_page")
    a.test(RBX, e.PTE_WRITE)
    a.jcc(ops.CC_Z, "break_sharing")


def map_page(a: Assembler, path: Path) -> None:
    """`map_page`: write the EPT leaf for it: 2 MiB where slot, host page and the code in it allow, else 4 KiB."""
    a.label("map_page")
    work(a, path, "map_page")
    a.mov(R11, 1)
    if path.vmm.ept.page_size >= LARGE:
        if path.vmm.dirty_log.on:
            a.ld(RAX, several.vm_word(a, path, "LOGGING", RAX))
            a.test(RAX, register=RAX)
            a.jcc(ops.CC_NZ, "map_small")
        a.cmp(RBP, 2)
        a.jcc(ops.CC_NZ, "map_small")
        _in_one_slot(a, "map_small")
        leaf_of(a, R13)
        a.cmp(RDX, 1)
        a.jcc(ops.CC_Z, "map_small", comment="there is a table of small pages already")
        if path.parameters.get("nx_huge_pages", 0):
            a.test(R12, e.Q_FETCH)
            a.jcc(ops.CC_Z, "map_large")
            a.test(RAX, register=RAX)
            a.jcc(ops.CC_Z, "map_small")
            zero(a, RAX)
            a.st(Mem(RCX), RAX, comment="the large leaf goes, and is not split")
            a.call("flush_ept")
            a.jmp("map_small")
        a.label("map_large")
        a.mov(R11, 2)
        a.copy(RDX, RBX)
        a.and_(RDX, e.ADDRESS & ~(LARGE - 1))
        rights = EPT_WRITTEN & ~e.EPT_EXECUTE if path.parameters.get("nx_huge_pages", 0) else EPT_WRITTEN
        a.or_(RDX, rights | path.ignores_pat | e.EPT_LARGE)
        a.jmp("map_write")
        a.label("map_small")
    a.copy(RDX, RBX)
    a.and_(RDX, e.ADDRESS)
    a.cmp(RBP, 2)
    a.jcc(ops.CC_NZ, "map_whole")
    a.and_(RDX, ~(LARGE - 1))
    a.copy(RAX, R13)
    a.and_(RAX, LARGE - 4096)
    a.or_(RDX, register=RAX)
    a.label("map_whole")
    a.test(RBX, e.PTE_WRITE)
    a.jcc(ops.CC_Z, "map_read_only")
    a.ld(RAX, Mem(R14, SLOT["FLAGS"]))
    a.test(RAX, SLOT_READ_ONLY)
    a.jcc(ops.CC_NZ, "map_read_only")
    if path.vmm.swap.on:
        _clean_page(a, path)
    a.or_(RDX, EPT_WRITTEN | path.ignores_pat)
    if path.vmm.dirty_log.on:
        dirty_log.mark(a, path, "map_write")
    a.jmp("map_write")
    a.label("map_read_only")
    a.or_(RDX, READ_EXECUTE | path.ignores_pat)
    a.label("map_write")
    a.copy(RCX, R11)
    a.call("write_ept")
    a.jmp(several.unlocked(path))


def _clean_page(a: Assembler, path: Path) -> None:
    """A page that the disk has as it is stays known as such until it is written. RBX entry of the process, at R9."""
    a.test(RBX, e.PTE_DIRTY)
    a.jcc(ops.CC_NZ, "map_dirty")
    a.test(R12, e.Q_WRITE)
    a.jcc(ops.CC_NZ, "make_dirty")
    if path.vmm.ept.accessed_dirty:
        a.or_(RDX, EPT_WRITTEN & ~e.EPT_DIRTY | path.ignores_pat)
        a.jmp("map_write")
    else:
        a.jmp("map_read_only")
    a.label("make_dirty")
    a.or_(RBX, e.PTE_DIRTY)
    a.st(Mem(R9), RBX)
    a.label("map_dirty")


def _in_one_slot(a: Assembler, otherwise: str) -> None:
    """RSI <- R13 rounded down to 2 MiB; a jump where those 2 MiB are not all in the slot of R14."""
    a.copy(RSI, R13)
    a.and_(RSI, ~(LARGE - 1))
    a.ld(RAX, Mem(R14, SLOT["FIRST"]))
    a.cmp(RSI, register=RAX)
    a.jcc(ops.CC_B, otherwise)
    a.ld(RAX, Mem(R14, SLOT["END"]))
    a.lea(RDX, Mem(RSI, LARGE))
    a.cmp(RDX, register=RAX)
    a.jcc(ops.CC_A, otherwise)


def subroutines(a: Assembler, path: Path) -> None:
    """`write_ept` (leaf RDX, level RCX, address R13), `unmap_leaf` (address R13; keeps RBX RBP R9), `flush_ept`.

    `unmap_leaf` takes the leaf away at once, with the flags that processors have set, and leaves it in RAX.
    """
    a.label("write_ept")
    a.copy(RSI, R13)
    a.ld(RDI, vcpu("EPT_ROOT"))
    a.mov(R8, at.HOST_DIRECT)
    several.of_vm(a, path, R9, "EPT_ALLOCATOR")
    a.mov(R10, e.EPT_RWX)
    zero(a, R11)
    if path.vmm.views > 1:
        a.ld(RAX, Mem(R9))
        a.push(RAX)
    a.hook(hooks.TABLE_MAP)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "no_tables")
    if path.vmm.views > 1:
        a.pop(RDX)
        a.jmp("suppress_new")
    else:
        a.ret()
    a.label("no_tables")
    several.unlock_tables(a, path)
    a.copy(4, R15, comment="the stack is given up")
    kill(a, OUT_OF_TABLES)

    a.label("unmap_leaf")
    work(a, path, "unmap_notifier")
    leaf_of(a, R13)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "leaf_unmapped")
    zero(a, RDX)
    a.xchg(Mem(RCX), RDX)
    a.push(RDX)
    a.call("flush_ept")
    a.pop(RAX)
    a.label("leaf_unmapped")
    a.ret()

    a.label("flush_ept")
    several.flush_here(a, path)
    if path.several:
        a.jmp("flush_others")
    else:
        a.ret()


def make_page(a: Assembler, path: Path) -> None:
    """`make_page`: the host's page fault for memory of the process that has no page yet; then look again."""
    a.label("make_page")
    work(a, path, "host_page_fault")
    if path.vmm.swap.on:
        if path.vmm.huge_pages == "never":
            _jump_if_zeroes_do(a)
        swap.before_page(a, path)
    if path.vmm.huge_pages == "always" and path.vmm.ept.page_size >= LARGE:
        _make_block(a, path)
    if path.vmm.huge_pages == "never":
        a.test(R12, e.Q_WRITE)
        a.jcc(ops.CC_NZ, "make_small")
        a.label("make_zeroes")
        a.mov(RDX, path.addresses["zero_page"] << 12 | ZERO_PAGE)
        a.jmp("make_mapping")
    a.label("make_small")
    _fresh_page(a, path)
    a.label("make_mapping")
    _map_user(a, path, level=1)
    a.jmp("find_page")

    a.label("break_sharing")  # the shared zero page is written: a page of its own, and the mapping goes
    zeroes_go = path.vmm.swap.on and path.vmm.huge_pages == "never"
    if path.vmm.sharing.on:
        a.mov(RCX, e.ADDRESS)
        a.and_(RCX, register=RBX)
        a.cmp(RCX, path.addresses["zero_page"] << 12)
        a.jcc(ops.CC_Z, "break_zero")
        work(a, path, "host_page_fault")
        if path.several:
            a.call("unmap_leaf", comment="nobody reads the shared frame any more when it is given back")
        a.call("unshare")
        a.mov(RAX, RAM_PAGE)
        a.or_(RDX, register=RAX)
        _map_user(a, path, level=1)
        if not zeroes_go:
            a.jmp("mapping_goes")
        a.label("break_zero")
    if zeroes_go:
        zero(a, RAX)
        a.st(Mem(R9), RAX, comment="the guest tries again, and finds none: room is made for one then")
    else:
        work(a, path, "host_page_fault")
        _fresh_page(a, path)
        _map_user(a, path, level=1)
    a.label("mapping_goes")
    _flush_user(a)
    work(a, path, "unmap_notifier")
    if path.vmm.on_shadow:
        a.copy(RSI, R13)
        a.ld(RDI, vcpu("SHADOW"))
        a.hook(SHADOW_UNMAP)
        if path.several:
            a.or_(RDX, FLUSH, comment="also of others that read the guest's tables where nothing maps the page")
        several.because(a, path, at.FOR_FAULTS)
        a.call("shadow_settle")
        a.jmp(several.unlocked(path))
    else:
        leaf_of(a, R13)
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_Z, several.unlocked(path))
        zero(a, RAX)
        a.st(Mem(RCX), RAX)
        a.call("flush_ept")
        a.jmp(several.unlocked(path))

    if path.vmm.collapse.on:
        a.label("map_large_user")
        a.mov(RSI, at.USER_RAM)
        a.add(RSI, register=R13)
        a.mov(RCX, 2)
        _write_user(a, path)
        a.ret()

    a.label("no_host_memory")
    several.unlock_tables(a, path)
    kill(a, OUT_OF_HOST_MEMORY)
    if path.vmm.memory.buddy:
        frames.subroutines(a, path)


def _jump_if_zeroes_do(a: Assembler) -> None:
    """To `make_zeroes`, which takes no frame, for a read of a page that is not on the disk (entry RCX, level RDX)."""
    a.test(R12, e.Q_WRITE)
    a.jcc(ops.CC_NZ, "make_own")
    a.cmp(RDX, 1)
    a.jcc(ops.CC_NZ, "make_zeroes")
    a.ld(RAX, Mem(RCX))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "make_zeroes")
    a.label("make_own")


def _fresh_page(a: Assembler, path: Path) -> None:
    """RDX <- entry for a new zeroed page of the host."""
    if path.vmm.memory.buddy:
        a.call("take_frame")
    else:
        a.hook(hooks.FRAME_ALLOCATE)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_S, "no_host_memory")
    a.shl(RAX, 12)
    a.copy(RBX, RAX)
    a.mov(RDI, at.HOST_DIRECT)
    a.add(RDI, register=RAX)
    a.hook(hooks.PAGE_ZERO)
    a.copy(RDX, RBX)
    a.mov(RAX, RAM_PAGE)
    a.or_(RDX, register=RAX)


def _make_block(a: Assembler, path: Path) -> None:
    """A 2 MiB page of the host, where the slot holds all of it and one is free."""
    _in_one_slot(a, "make_small")
    if path.vmm.memory.buddy:
        a.call("take_block")
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_S, "no_block")
        a.copy(RBX, RAX)
    else:
        a.mov(RDI, path.addresses["blocks"])
        a.ld(RAX, Mem(RDI), comment="blocks taken")
        a.ld(RCX, Mem(RDI, 8), comment="blocks")
        a.cmp(RAX, register=RCX)
        a.jcc(ops.CC_AE, "no_block")
        a.ld(RBX, Mem(RDI, 16, index=RAX, scale=8))
        a.add(RAX, 1)
        a.st(Mem(RDI), RAX)
    count(a, "LARGE_PAGES")
    a.shl(RBX, 12)
    a.mov(RDI, at.HOST_DIRECT)
    a.add(RDI, register=RBX)
    a.mov(RCX, LARGE // 4096)
    a.label("clear_block")
    a.hook(hooks.PAGE_ZERO)
    a.add(RDI, 4096)
    a.loop("clear_block")
    a.mov(RDX, RAM_PAGE | e.PTE_LARGE)
    a.or_(RDX, register=RBX)
    _map_user(a, path, level=2)
    a.jmp("find_page")
    a.label("no_block")
    count(a, "LARGE_MISSING")
    a.jmp("make_small")


def _map_user(a: Assembler, path: Path, level: int) -> None:
    """Write RDX as the process's entry of a level for the address in R13."""
    a.mov(RCX, level)
    a.ld(RSI, Mem(R14, SLOT["USER"]))
    a.add(RSI, register=R13)
    _write_user(a, path)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "no_host_memory")


def _flush_user(a: Assembler) -> None:
    """The process has another page at the address in R13: what this CPU has cached of it goes. Changes RSI."""
    a.ld(RSI, Mem(R14, SLOT["USER"]))
    a.add(RSI, register=R13)
    a.op(ops.INVLPG, mem=Mem(RSI))


def _write_user(a: Assembler, path: Path) -> None:
    """The same for the user-space address in RSI; RAX <- 1 if there is no frame for a table."""
    a.ld(RDI, vcpu("HOST_ROOT"))
    a.mov(R8, at.HOST_DIRECT)
    several.of_vm(a, path, R9, "BACKING_ALLOCATOR")
    a.mov(R10, e.PTE_PRESENT | e.PTE_WRITE | e.PTE_USER | e.PTE_ACCESSED)
    zero(a, R11)
    a.hook(hooks.TABLE_MAP)
