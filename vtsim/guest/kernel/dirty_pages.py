"""Which pages of the mapped file are dirty, whether they are too many, and who maps them.

Source: Linux, mm/page-writeback.c (balance_dirty_pages), mm/rmap.c (page_mkclean).
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.ept import spec as e
from vtsim.guest.kernel import KernelOptions, path, smp
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel import page_cache as cache
from vtsim.guest.kernel.fault import find_entry, flush_user_page, put_entry
from vtsim.guest.kernel.lengths import length
from vtsim.guest.kernel.page_cache import FileOptions

RATE: Final = 32  # pages: DIRTY_POLL_THRESH
NEVER_RUNS: Final = (at.ZOMBIE, at.DEAD, at.FREE)


def written(kernel: KernelOptions) -> FileOptions | None:
    """The file, if its pages are written."""
    return kernel.file if kernel.file is not None and kernel.file.queue else None


def count(a: Assembler, file: FileOptions, word: int, by: int) -> None:
    """Count one of the file's counters up or down. Clobbers RAX and R8."""
    a.mov(s.R8, file.mapping)
    a.ld(s.RAX, Mem(s.R8, word))
    a.add(s.RAX, by)
    a.st(Mem(s.R8, word), s.RAX)


@path("dirty pages")
def dirty_pages(a: Assembler, kernel: KernelOptions) -> None:
    """`page_dirtied`: the page at RSI, and the nodes above it; `balance_dirty`: are they too many?"""
    file = written(kernel)
    if file is None:
        return
    a.activity = ops.PAGE_FAULT_PATH
    a.label("page_dirtied")  # keeps all but RAX RCX RDX RDI R8
    a.ld(s.RAX, Mem(s.RSI, cache.P_FLAGS))
    a.test(s.RAX, cache.DIRTY)
    a.jcc(ops.CC_NZ, "page_was_dirty")
    a.or_(s.RAX, cache.DIRTY)
    a.st(Mem(s.RSI, cache.P_FLAGS), s.RAX)
    a.push(s.RSI)
    a.ld(s.RDX, Mem(s.RSI, cache.P_INDEX))
    a.mov(s.R8, file.mapping)
    a.ld(s.R8, Mem(s.R8, cache.X_ROOT))
    for level in reversed(range(file.levels)):
        a.copy(s.RSI, s.RDX)
        if level:
            a.shr(s.RSI, level * cache.SLOT_BITS)
        a.and_(s.RSI, cache.SLOTS - 1)
        a.lea(s.RDI, Mem(s.R8, cache.NODE_DIRTY))
        a.hook(hooks.SET_BIT)
        if level:
            a.ld(s.R8, Mem(s.R8, cache.NODE_HEADER, index=s.RSI, scale=8))
    a.pop(s.RSI)
    count(a, file, cache.X_DIRTY, 1)
    count(a, file, cache.X_RATE, 1)
    a.label("page_was_dirty")
    a.ret()

    a.label("balance_dirty")
    a.mov(s.R8, file.mapping)
    a.ld(s.RAX, Mem(s.R8, cache.X_RATE))
    a.cmp(s.RAX, RATE)
    a.jcc(ops.CC_B, "balanced")
    a.st_value(Mem(s.R8, cache.X_RATE), 0)
    a.label("balance_again")
    a.work(length("balance_dirty"))
    a.mov(s.R8, file.mapping)
    a.ld(s.RAX, Mem(s.R8, cache.X_DIRTY))
    a.cmp(s.RAX, file.background)
    a.jcc(ops.CC_BE, "balance_written")
    a.mov(s.R15, 0)
    a.call("write_dirty")
    a.label("balance_written")
    a.mov(s.R8, file.mapping)
    a.ld(s.RAX, Mem(s.R8, cache.X_DIRTY))
    a.ld(s.RCX, Mem(s.R8, cache.X_WRITEBACK))
    a.add(s.RAX, register=s.RCX)
    a.cmp(s.RAX, file.ceiling)
    a.jcc(ops.CC_BE, "balanced")
    a.call("sleep_for_file")
    a.jmp("balance_again")
    a.label("balanced")
    a.ret()


@path("clean mappings")
def clean_mappings(a: Assembler, kernel: KernelOptions) -> None:
    """`clean_mappings`: nobody may store to the page whose descriptor is at R13. Keeps RBX, RBP, R12 to R15."""
    if written(kernel) is None:
        return
    a.activity = ops.DRIVER
    a.label("clean_mappings")
    kept = (s.RBX, s.RBP, s.R12, s.R13, s.R14, s.R15)
    for register in kept:
        a.push(register)
    a.ld(s.R13, Mem(s.R13, cache.P_INDEX))
    a.shl(s.R13, cache.FRAME_BITS)
    a.mov(s.R15, kernel.tasks)
    a.ld(s.RBX, at.cpu_word(at.FIRST_TASK))
    a.label("clean_task")
    a.ld(s.RAX, Mem(s.RBX, at.T_STATE))
    for state in NEVER_RUNS:
        a.cmp(s.RAX, state)
        a.jcc(ops.CC_Z, "clean_next_task")
    a.ld(s.R14, Mem(s.RBX, at.T_AREAS))
    a.ld(s.RBP, Mem(s.RBX, at.T_AREA_COUNT))
    a.label("clean_area")
    a.ld(s.RAX, Mem(s.R14, at.A_FILE))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "clean_next_area")
    a.ld(s.R12, Mem(s.R14, at.A_START))
    a.add(s.R12, register=s.R13)
    a.ld(s.RAX, Mem(s.R14, at.A_END))
    a.cmp(s.R12, register=s.RAX)
    a.jcc(ops.CC_AE, "clean_next_area")
    find_entry(a, kernel, s.RBX, s.R12)
    a.test(s.RAX, e.PTE_WRITE | e.PTE_DIRTY)
    a.jcc(ops.CC_Z, "clean_next_area")
    a.work(length("clean_page"))
    a.and_(s.RAX, ~(e.PTE_WRITE | e.PTE_DIRTY))
    put_entry(a, kernel)
    a.ld(s.RAX, at.cpu_word(at.CURRENT))
    a.cmp(s.RAX, register=s.RBX)
    a.jcc(ops.CC_NZ, "clean_other")
    flush_user_page(a, kernel)
    a.jmp("clean_next_area")
    a.label("clean_other")  # its space is not loaded
    smp.flush_when_loaded(a, kernel, s.RBX)
    a.label("clean_next_area")
    a.add(s.R14, at.AREA_BYTES)
    a.sub(s.RBP, 1)
    a.jcc(ops.CC_NZ, "clean_area")
    a.label("clean_next_task")
    a.ld(s.RBX, Mem(s.RBX, at.T_NEXT))
    a.sub(s.R15, 1)
    a.jcc(ops.CC_NZ, "clean_task")
    for register in reversed(kept):
        a.pop(register)
    a.ret()
