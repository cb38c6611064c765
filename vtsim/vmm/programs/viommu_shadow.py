"""Caching mode: shadow tables follow a guest's second-level tables, page by page, or as a whole.

A page is looked up in the guest's tables, through as many levels as it has there, and written into the shadow table
with the rights that all levels leave. As a whole, every page is looked at that either table has: first the shadow's, so
that what is gone goes, then the guest's. A guest's tables may lead round in circles; each way through them looks at as
many tables as the guest has pages at most, and what is more ends the VM, as does a want of memory for shadow tables.

VT-d: "Caching Mode"; "Second-Stage Paging Entries".
Not modelled: large pages in the shadow of large pages; shadow tables that go back.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R8, R9, R10, R11, R12, R13, R14, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.iommu import entries as e
from vtsim.vmm import layout as at
from vtsim.vmm.programs import viommu_words as unit
from vtsim.vmm.programs.words import work, zero
from vtsim.vmm.registry import Path


def subroutines(a: Assembler, path: Path) -> None:
    """`viommu_sync_pages` (R12, R13 a descriptor), `viommu_refresh`: of the device in R11; both invalidate."""
    a.label("viommu_sync_pages")
    a.push(R12)
    a.push(R13)
    a.copy(RCX, R13)
    a.and_(RCX, 0x3F)
    a.mov(R12, 1)
    a.label("viommu_order")
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "viommu_counted")
    a.shl(R12, 1)
    a.sub(RCX, 1)
    a.jmp("viommu_order")
    a.label("viommu_counted")
    a.copy(RAX, R12)
    a.sub(RAX, 1)
    a.shl(RAX, 12)
    a.and_(R13, e.POINTER)
    a.or_(R13, register=RAX)  # an address that is not aligned to its mask is taken as if it were
    a.sub(R13, register=RAX)
    zero(a, RBP)
    a.call("viommu_sync")
    a.pop(R13)
    a.pop(R12)
    a.test(RBP, unit.READ_WRITE)
    a.jcc(ops.CC_NZ, "viommu_flush_pages")
    a.ret()

    a.label("viommu_refresh")
    a.push(R12)
    a.push(R13)
    zero(a, RBP)
    _all(a, "shadow")
    _all(a, "guest")
    a.pop(R13)
    a.pop(R12)
    a.test(RBP, unit.READ_WRITE)
    a.jcc(ops.CC_NZ, "viommu_flush_domain")
    a.ret()
    _tree(a, "shadow", guest=False)
    _tree(a, "guest", guest=True)
    _sync(a, path)


def _all(a: Assembler, name: str) -> None:
    a.ld(RAX, Mem(RBX, unit.VI_MOST))
    a.st(Mem(RBX, unit.VI_BUDGET), RAX)
    zero(a, R13)
    a.ld(R9, Mem(R11, unit.VD_SHADOW if name == "shadow" else unit.VD_GUEST))
    a.test(R9, register=R9)
    a.jcc(ops.CC_Z, f"viommu_no_{name}")
    a.call(f"viommu_{name}_4")
    a.label(f"viommu_no_{name}")


def _tree(a: Assembler, name: str, *, guest: bool) -> None:
    """`viommu_NAME_4`: look at every page of the table at R9, whose first page has the address R13."""
    for level in (4, 3, 2, 1):
        here = f"viommu_{name}_{level}"
        a.label(here)
        a.ld(RAX, Mem(RBX, unit.VI_BUDGET))
        a.sub(RAX, 1)
        a.jcc(ops.CC_Z, "fetch_failed")
        a.st(Mem(RBX, unit.VI_BUDGET), RAX)
        a.copy(RSI, R9)
        a.and_(RSI, e.ADDRESS)
        if guest:
            a.call("guest_memory")
        else:
            a.mov(RDI, at.HOST_DIRECT)
            a.add(RDI, register=RSI)
        a.mov(R12, 512)
        a.label(f"{here}_entry")
        a.ld(R9, Mem(RDI))
        a.test(R9, unit.READ_WRITE)
        a.jcc(ops.CC_Z, f"{here}_on")
        a.push(RDI)
        a.push(R12)
        a.push(R13)
        if level > 1:
            if guest and level < 4:
                a.test(R9, e.SL_PS)
                a.jcc(ops.CC_Z, f"{here}_below")
                a.mov(R12, 1 << 9 * (level - 1))
                a.call("viommu_sync")
                a.jmp(f"{here}_back")
                a.label(f"{here}_below")
            a.call(f"viommu_{name}_{level - 1}")
            if guest and level < 4:
                a.label(f"{here}_back")
        else:
            a.mov(R12, 1)
            a.call("viommu_sync")
        a.pop(R13)
        a.pop(R12)
        a.pop(RDI)
        a.label(f"{here}_on")
        a.add(RDI, 8)
        a.mov(RAX, 1 << 12 + 9 * (level - 1))
        a.add(R13, register=RAX)
        a.sub(R12, 1)
        a.jcc(ops.CC_NZ, f"{here}_entry")
        a.ret()


def _sync(a: Assembler, path: Path) -> None:
    """`viommu_sync`: R12 pages from R13 on; RBP gathers the entries that were replaced by others."""
    a.label("viommu_sync")
    work(a, path, "map_dma")
    _count_page(a)
    a.mov(R14, unit.READ_WRITE)
    a.ld(R9, Mem(R11, unit.VD_GUEST))
    a.test(R9, register=R9)
    a.jcc(ops.CC_Z, "viommu_nothing")
    for level in (4, 3, 2, 1):
        a.and_(R9, e.ADDRESS)
        a.copy(RSI, R13)
        a.shr(RSI, 9 * level)
        a.and_(RSI, 0xFF8)
        a.add(RSI, register=R9)
        a.call("guest_memory")
        a.ld(R9, Mem(RDI))
        a.and_(R14, register=R9)
        a.jcc(ops.CC_Z, "viommu_nothing")
        if level in (3, 2):
            a.test(R9, e.SL_PS)
            a.jcc(ops.CC_Z, f"viommu_below_{level}")
            within = (1 << 12 + 9 * (level - 1)) - 1
            a.and_(R9, e.ADDRESS & ~within)
            a.copy(RSI, R13)
            a.and_(RSI, within)
            a.or_(RSI, register=R9)
            a.jmp("viommu_translated")
            a.label(f"viommu_below_{level}")
    a.copy(RSI, R9)
    a.and_(RSI, e.ADDRESS)
    a.label("viommu_translated")
    a.call("guest_memory")
    a.copy(RDX, RDI)
    a.sub(RDX, register=R8)
    a.or_(RDX, register=R14)
    a.jmp("viommu_write")
    a.label("viommu_nothing")
    zero(a, RDX)
    a.label("viommu_write")
    a.push(RDX)
    a.push(R11)
    a.ld(RDI, Mem(R11, unit.VD_SHADOW))
    a.copy(RSI, R13)
    a.mov(RCX, 1)
    a.mov(R8, at.HOST_DIRECT)
    a.lea(R9, Mem(RBX, unit.VI_TABLES))
    a.mov(R10, unit.READ_WRITE)
    zero(a, R11)
    a.hook(hooks.TABLE_MAP)
    a.pop(R11)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "fetch_failed")
    a.pop(RAX)
    a.cmp(RAX, register=RDX)
    a.jcc(ops.CC_Z, "viommu_same")
    a.or_(RBP, register=RDX)
    a.label("viommu_same")
    a.add(R13, 4096)
    a.sub(R12, 1)
    a.jcc(ops.CC_NZ, "viommu_sync")
    a.ret()


def _count_page(a: Assembler) -> None:
    a.ld(RCX, Mem(RBX, unit.VI_PAGES))
    a.add(RCX, 1)
    a.st(Mem(RBX, unit.VI_PAGES), RCX)
