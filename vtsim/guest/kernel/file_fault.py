"""Faults on a mapped file, and the system calls that map it and unmap it.

A read maps the pages around the one that was asked for, too, as far as they are in the page cache: 16 in Linux
(fault_around_bytes). Their descriptors are found by one walk of the file's radix tree; nothing is zeroed, and no page
is charged to anybody, for the file has it already. A write maps one page, after the file system has had its say. An
entry that goes gives the page back to the cache, not to a zone.

Not modelled: private mappings of files; fork while a file is mapped; last-level tables that munmap frees; waiting for a
page that is locked.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept import direct as d
from vtsim.ept import spec as e
from vtsim.guest.kernel import KernelOptions, hypercalls, path, smp
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel import page_cache as cache
from vtsim.guest.kernel.fault import find_entry, lock_entry, map_entry, page_of
from vtsim.guest.kernel.flush import flush_range
from vtsim.guest.kernel.lengths import length
from vtsim.guest.kernel.page_cache import FileOptions
from vtsim.guest.kernel.ring3 import disable, enable

AROUND: Final = 16  # pages: fault_around_bytes is 64 KiB
WINDOW: Final = AROUND << 12
SPANS: Final = {level: 1 << (12 + 9 * (level - 1)) for level in (3, 4)}  # what an entry above a page directory maps


def _number(a: Assembler, register: int) -> None:
    """The number of the file's page that is mapped at the address in the register, of the area at R14. Clobbers RAX."""
    a.ld(s.RAX, Mem(s.R14, at.A_START))
    a.sub(register, register=s.RAX)
    a.shr(register, 12)


def _descriptor(a: Assembler, file: FileOptions, address: int, to: int) -> None:
    """`to` <- address of the descriptor of the page that belongs at an address. Clobbers RAX, RDX, R8, R9."""
    a.copy(s.RDX, address)
    _number(a, s.RDX)
    cache.find_slot(a, file)
    a.ld(to, Mem(s.RDX))


def _to_descriptor(a: Assembler, kernel: KernelOptions, file: FileOptions, spare: int) -> None:
    """RSI, an entry that maps a page of the file, becomes the address of the page's descriptor. Clobbers `spare`."""
    page_of(a, kernel, s.RSI, spare)
    cache.to_descriptor(a, file, s.RSI)


def _map_page(a: Assembler, kernel: KernelOptions, file: FileOptions) -> None:
    """Map the page whose descriptor is at RSI, with the bits in R15, at R12."""
    cache.to_frame(a, file, s.RSI)
    a.copy(s.RDX, s.RSI)
    a.or_(s.RDX, register=s.R15)
    map_entry(a, kernel, "file_no_tables")


@path("file fault")
def file_fault(a: Assembler, kernel: KernelOptions) -> None:
    """A fault at R12 in the area at R14, which maps a file: the pages around it, or for a write the page alone."""
    if kernel.file is None:
        return
    a.activity = ops.PAGE_FAULT_PATH
    a.label("file_fault")
    if kernel.several:
        a.call("lock_read")
        find_entry(a, kernel, s.RBX, s.R12)
        a.test(s.RAX, -1)
        a.jcc(ops.CC_NZ, "fault_settled")
    a.test(s.RBP, e.PF_WRITE)
    a.jcc(ops.CC_NZ, "file_write")
    a.work(length("file_fault", several=kernel.several))
    a.and_(s.R15, ~(e.PTE_WRITE | e.PTE_DIRTY))
    if kernel.several:
        lock_entry(a)
    else:
        find_entry(a, kernel, s.RBX, s.R12)
        a.cmp(s.RDX, 1)
        a.jcc(ops.CC_Z, "file_table_there")
        _map_one(a, kernel, kernel.file)
        find_entry(a, kernel, s.RBX, s.R12)
        a.label("file_table_there")
    _around(a, kernel, kernel.file)
    a.jmp("file_mapped")
    _write(a, kernel, kernel.file)
    a.label("file_mapped")
    smp.call(a, kernel, "unlock_table")
    a.jmp("fault_settled" if kernel.several else "fault_done")
    a.label("file_no_tables")
    smp.call(a, kernel, "unlock_table")
    a.jmp("no_memory")
    _page_of_file(a, kernel, kernel.file)


def _map_one(a: Assembler, kernel: KernelOptions, file: FileOptions) -> None:
    """The page that was asked for, with the bits in R15, where there is no last-level table yet."""
    _descriptor(a, file, s.R12, s.RSI)
    a.work(length("map_file_page"))
    cache.change(a, s.RSI, cache.P_COUNT, 1)
    cache.change(a, s.RSI, cache.P_MAPPED, 1)
    _map_page(a, kernel, file)


def _around(a: Assembler, kernel: KernelOptions, file: FileOptions) -> None:
    """The window: from a multiple of its size, or the area's beginning, within the table and the area.

    RCX is where the entry for R12 stands, R11 its host-physical address where tables are direct.
    """
    a.copy(s.R13, s.RCX)
    a.copy(s.RDI, s.R12)
    a.and_(s.RDI, -WINDOW)
    a.ld(s.RAX, Mem(s.R14, at.A_START))
    a.cmp(s.RDI, register=s.RAX)
    a.jcc(ops.CC_AE, "around_begins")
    a.copy(s.RDI, s.RAX)
    a.label("around_begins")
    a.copy(s.RBP, s.RDI)
    a.add(s.RBP, WINDOW)
    for limit in ("table", "area"):
        if limit == "table":
            a.copy(s.RAX, s.RDI)
            a.and_(s.RAX, -kernel.table_reach)
            a.add(s.RAX, kernel.table_reach)
        else:
            a.ld(s.RAX, Mem(s.R14, at.A_END))
        a.cmp(s.RBP, register=s.RAX)
        a.jcc(ops.CC_BE, f"within_{limit}")
        a.copy(s.RBP, s.RAX)
        a.label(f"within_{limit}")
    a.sub(s.RBP, register=s.RDI)
    a.shr(s.RBP, 12)
    a.copy(s.RAX, s.R12)
    a.sub(s.RAX, register=s.RDI)
    a.shr(s.RAX, 12 - (kernel.entry_bytes.bit_length() - 1))
    a.sub(s.R13, register=s.RAX)
    if kernel.paravirtual:
        a.sub(s.R11, register=s.RAX)
    a.copy(s.RDX, s.RDI)
    _number(a, s.RDX)
    cache.find_slot(a, file)
    a.label("around_page")
    a.ld(s.RSI, Mem(s.RDX))
    a.test(s.RSI, -1)
    a.jcc(ops.CC_Z, "around_next")
    a.ld(s.RAX, Mem(s.RSI, cache.P_FLAGS))
    a.test(s.RAX, cache.LOCKED)
    a.jcc(ops.CC_NZ, "around_next")
    a.work(length("map_file_page"))
    cache.change(a, s.RSI, cache.P_COUNT, 1)
    a.ld(s.RAX, Mem(s.R13, size=kernel.entry_bytes))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "around_put")
    cache.change(a, s.RSI, cache.P_MAPPED, 1)
    cache.to_frame(a, file, s.RSI)
    if kernel.paravirtual:
        hypercalls.to_machine(a, s.RSI)
    a.or_(s.RSI, register=s.R15)
    if kernel.paravirtual:
        a.copy(s.RDI, s.R11)
        a.call("pv_request")
    else:
        a.st(Mem(s.R13, size=kernel.entry_bytes), s.RSI)
    a.jmp("around_next")
    a.label("around_put")
    cache.change(a, s.RSI, cache.P_COUNT, -1)
    a.label("around_next")
    a.add(s.RDX, 8)
    a.add(s.R13, kernel.entry_bytes)
    if kernel.paravirtual:
        a.add(s.R11, 8)
    a.sub(s.RBP, 1)
    a.jcc(ops.CC_NZ, "around_page")
    if kernel.paravirtual:
        a.call("pv_send")


def _dirty(a: Assembler, file: FileOptions, *, unlock: bool) -> None:
    """Mark the page at RSI as dirty, and let it go where it was locked.

    Clobbers RAX; where pages are written RCX RDX RDI R8, too.
    """
    if file.queue:
        a.call("page_dirtied")
        if not unlock:
            return
    a.ld(s.RAX, Mem(s.RSI, cache.P_FLAGS))
    if not file.queue:
        a.or_(s.RAX, cache.DIRTY)
    if unlock:
        a.and_(s.RAX, ~cache.LOCKED)
    a.st(Mem(s.RSI, cache.P_FLAGS), s.RAX)


def _say(a: Assembler, file: FileOptions, name: str) -> None:
    """Lock the page at RSI while the file system makes it ready for a write, or waits for an earlier one.

    Clobbers RAX, and where it waits all that `schedule` does not keep but RSI.
    """
    if file.bounce:
        a.label(name)
        a.ld(s.RAX, Mem(s.RSI, cache.P_FLAGS))
        a.test(s.RAX, cache.WRITEBACK)
        a.jcc(ops.CC_Z, f"{name}_now")
        a.push(s.RSI)
        a.call("sleep_for_file")
        a.pop(s.RSI)
        a.jmp(name)
        a.label(f"{name}_now")
    a.ld(s.RAX, Mem(s.RSI, cache.P_FLAGS))
    a.or_(s.RAX, cache.LOCKED)
    a.st(Mem(s.RSI, cache.P_FLAGS), s.RAX)
    a.work(length("fuse_mkwrite" if file.bounce else "page_mkwrite"))


def _write(a: Assembler, kernel: KernelOptions, file: FileOptions) -> None:
    """`file_write`: the page alone, dirty and writable. Another thread may have mapped it meanwhile."""
    a.label("file_write")
    a.work(length("file_write_fault", several=kernel.several))
    _descriptor(a, file, s.R12, s.RSI)
    cache.change(a, s.RSI, cache.P_COUNT, 1)
    _say(a, file, "write_waits")
    if kernel.several:
        a.copy(s.R13, s.RSI)
        lock_entry(a)
        a.copy(s.RSI, s.R13)
        a.test(s.RAX, -1)
        a.jcc(ops.CC_Z, "file_write_first")
        _dirty(a, file, unlock=True)
        cache.change(a, s.RSI, cache.P_COUNT, -1)
        a.jmp("file_mapped")
        a.label("file_write_first")
    cache.change(a, s.RSI, cache.P_MAPPED, 1)
    _dirty(a, file, unlock=True)
    _map_page(a, kernel, file)
    if file.queue:
        a.label("file_dirtied")
        a.call("balance_dirty")


def _page_of_file(a: Assembler, kernel: KernelOptions, file: FileOptions) -> None:
    """`page_of_file`: a write to a page of the file that was mapped for reading. RAX is its entry, RCX where it is."""
    a.label("page_of_file")
    a.push(s.RCX)
    a.push(s.R11)
    a.copy(s.RSI, s.RAX)
    _to_descriptor(a, kernel, file, spare=s.RDX)
    _say(a, file, "mapped_waits")
    _dirty(a, file, unlock=True)
    a.pop(s.R11)
    a.pop(s.RCX)
    a.copy(s.RAX, s.RBP)
    a.or_(s.RAX, e.PTE_DIRTY)
    a.jmp("own_page")


# --- system calls ---------------------------------------------------------------------------------------------------
def _find_area(a: Assembler, kernel: KernelOptions, name: str) -> None:
    """R14 <- the area that begins at RDI, of the task at RBX. Clobbers RAX and RCX."""
    a.ld(s.R14, Mem(s.RBX, at.T_AREAS))
    a.ld(s.RCX, Mem(s.RBX, at.T_AREA_COUNT))
    a.label(name)
    a.ld(s.RAX, Mem(s.R14, at.A_START))
    a.cmp(s.RAX, register=s.RDI)
    a.jcc(ops.CC_Z, f"{name}_found")
    a.add(s.R14, at.AREA_BYTES)
    a.loop(name)
    a.mov(s.RAX, -22, "EINVAL")
    a.ret()
    a.label(f"{name}_found")


def _lock(a: Assembler, kernel: KernelOptions) -> None:
    """Interrupts off; the space is ours. Clobbers RAX, RCX, RDI; R12 <- the address, RBP <- the pages asked for."""
    disable(a, kernel)
    a.copy(s.R12, s.RDI)
    a.copy(s.RBP, s.RSI)
    smp.call(a, kernel, "lock_write")


def _done(a: Assembler, kernel: KernelOptions) -> None:
    smp.call(a, kernel, "unlock_write")
    enable(a, kernel)
    a.mov(s.RAX, 0)
    a.ret()


@path("file mappings")
def calls(a: Assembler, kernel: KernelOptions) -> None:
    """System calls: map RSI pages of the file at RDI; unmap them; msync with MS_INVALIDATE."""
    if kernel.file is None:
        return
    a.activity = ops.SYSCALL_PATH
    a.label("call_map_file")
    a.work(length("mmap_file"))
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    _find_area(a, kernel, "map_area")
    _lock(a, kernel)
    a.copy(s.RAX, s.RBP)
    a.shl(s.RAX, 12)
    a.add(s.RAX, register=s.R12)
    a.st(Mem(s.R14, at.A_END), s.RAX)
    _done(a, kernel)

    a.label("call_msync")
    if not kernel.file.queue:  # there is nothing to write
        a.label("call_sync")
    a.work(length("msync"))
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    _find_area(a, kernel, "msync_area")
    a.mov(s.RAX, 0)
    a.ret()

    a.label("call_unmap_file")
    a.work(length("unmap"))
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    _find_area(a, kernel, "unmap_area")
    _lock(a, kernel)
    a.st(Mem(s.R14, at.A_END), s.R12)
    a.push(s.R12)
    a.push(s.RBP)
    a.shl(s.RBP, 12)
    a.add(s.RBP, register=s.R12)
    a.mov(s.R15, 0)
    _drop(a, kernel, kernel.file)
    a.pop(s.RBP)
    a.pop(s.R12)
    a.test(s.R15, -1)
    a.jcc(ops.CC_Z, "file_unmapped")
    if kernel.paravirtual:
        hypercalls.request(a, d.FLUSH_ALL, 0)
        a.call("pv_send")
    else:
        a.copy(s.R15, s.RBP)
        a.push(s.R12)
        flush_range(a, kernel, "file_unmap", s.R15)
        a.pop(s.R12)
    if kernel.several:
        a.copy(s.RDI, s.R12)
        a.copy(s.RSI, s.RBP)
        a.call("shoot_down")
    a.label("file_unmapped")
    if kernel.file.bounce:
        a.mov(s.R15, 1)
        a.call("write_dirty")
    _done(a, kernel)


def _drop(a: Assembler, kernel: KernelOptions, file: FileOptions) -> None:
    """Clear the entries from R12 to RBP, a table after the other. R15 <- how many there were. Clobbers R13, too."""
    a.label("drop_table")
    find_entry(a, kernel, s.RBX, s.R12)
    for level, span in {2: kernel.table_reach, **SPANS}.items():
        a.cmp(s.RDX, level)
        a.jcc(ops.CC_NZ, f"drop_not_{level}")
        a.and_(s.R12, -span)
        a.add(s.R12, span)
        a.jmp("drop_beyond")
        a.label(f"drop_not_{level}")
    a.copy(s.R13, s.RCX)
    smp.call(a, kernel, "lock_table")
    a.label("drop_page")
    a.ld(s.RDX, Mem(s.R13, size=kernel.entry_bytes))
    a.test(s.RDX, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "drop_next")
    a.work(length("unmap_file_page"))
    if kernel.paravirtual:
        a.copy(s.RDI, s.R11)
        a.mov(s.RSI, 0)
        a.call("pv_request")
    else:
        a.st_value(Mem(s.R13, size=kernel.entry_bytes), 0)
    a.copy(s.RSI, s.RDX)
    _to_descriptor(a, kernel, file, spare=s.RAX)
    a.test(s.RDX, e.PTE_DIRTY)
    a.jcc(ops.CC_Z, "drop_clean")
    _dirty(a, file, unlock=False)
    a.label("drop_clean")
    cache.change(a, s.RSI, cache.P_MAPPED, -1)
    cache.change(a, s.RSI, cache.P_COUNT, -1)
    a.add(s.R15, 1)
    a.label("drop_next")
    a.add(s.R12, 4096)
    a.add(s.R13, kernel.entry_bytes)
    if kernel.paravirtual:
        a.add(s.R11, 8)
    a.cmp(s.R12, register=s.RBP)
    a.jcc(ops.CC_AE, "drop_done")
    a.test(s.R12, kernel.table_reach - 1)
    a.jcc(ops.CC_NZ, "drop_page")
    smp.call(a, kernel, "unlock_table")
    a.jmp("drop_table")
    a.label("drop_beyond")
    a.cmp(s.R12, register=s.RBP)
    a.jcc(ops.CC_B, "drop_table")
    a.label("drop_done")
    smp.call(a, kernel, "unlock_table")
