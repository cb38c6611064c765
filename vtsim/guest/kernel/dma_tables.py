"""Tables of a domain as the kernel writes them, second-level or first-level: the way down to an entry, and new tables.

R15 is the port. Where the unit does not snoop, each store is followed by CLFLUSH.

VT-d: "Second-Stage Paging Entries".
Not modelled: tables that go back when all below them is unmapped; that CLFLUSH takes a line out of the caches.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.lengths import length
from vtsim.iommu import entries as e

LINE = 64


def flush_line(a: Assembler, kernel: KernelOptions, mem: Mem) -> None:
    """Make a store to a table visible to a unit that does not snoop."""
    assert kernel.dma is not None
    if not kernel.dma.coherent:
        a.emit(ops.TOUCH, mem=mem, extra=ops.TOUCH_FLUSH)


@path("domain tables")
def tables(a: Assembler, kernel: KernelOptions) -> None:
    """`dma_entry_1`, `dma_entry_2`: RCX <- where the entry of address RSI stands that maps 4 KiB, or 2 MiB.

    `dma_known_1`: the same, or 0 where no table leads there. Clobbers RAX, RDX, RDI.
    """
    if kernel.dma is None or kernel.dma.mode == "identity":
        return
    a.activity = ops.DMA_MAP
    for leaf in (1, 2) if kernel.dma.large else (1,):
        _way_down(a, f"dma_entry_{leaf}", leaf, kernel.dma.rights, make=True)
    if kernel.dma.askers:
        _way_down(a, "dma_known_1", 1, kernel.dma.rights, make=False)
        a.label("dma_unknown")
        a.mov(s.RCX, 0)
        a.ret()
    a.label("dma_table")  # the entry at RCX leads to a new table; RDX <- the entry
    a.work(length("page_get"))
    a.ld(s.RDX, Mem(s.R15, d.P_TABLES))
    a.ld(s.RAX, Mem(s.R15, d.P_TABLES_END))
    a.cmp(s.RDX, register=s.RAX)
    a.jcc(ops.CC_AE, "dma_exhausted")
    a.copy(s.RAX, s.RDX)
    a.add(s.RAX, 1)
    a.st(Mem(s.R15, d.P_TABLES), s.RAX)
    a.shl(s.RDX, 12)
    a.mov(s.RDI, at.DIRECT)
    a.add(s.RDI, register=s.RDX)
    a.hook(hooks.PAGE_ZERO)
    if not kernel.dma.coherent:
        a.mov(s.RAX, at.PAGE // LINE)
        a.label("dma_table_line")
        flush_line(a, kernel, Mem(s.RDI))
        a.add(s.RDI, LINE)
        a.sub(s.RAX, 1)
        a.jcc(ops.CC_NZ, "dma_table_line")
    a.or_(s.RDX, kernel.dma.rights)
    a.st(Mem(s.RCX), s.RDX)
    flush_line(a, kernel, Mem(s.RCX))
    a.ret()
    a.label("dma_exhausted")  # no address, no table: the task ends
    a.mov(s.R15, at.NO_MEMORY)
    a.jmp("write_log")


def _way_down(a: Assembler, name: str, leaf: int, rights: int, *, make: bool) -> None:
    a.label(name)
    a.ld(s.RDX, Mem(s.R15, d.P_ROOT))
    for level in range(4, leaf - 1, -1):
        a.mov(s.RAX, at.DIRECT)
        a.add(s.RDX, register=s.RAX)
        a.copy(s.RCX, s.RSI)
        a.shr(s.RCX, 9 * level)
        a.and_(s.RCX, 0xFF8)
        a.add(s.RCX, register=s.RDX)
        if level > leaf:
            a.ld(s.RDX, Mem(s.RCX))
            a.test(s.RDX, rights)
            if make:
                a.jcc(ops.CC_NZ, f"{name}_{level}")
                a.call("dma_table")
                a.label(f"{name}_{level}")
            else:
                a.jcc(ops.CC_Z, "dma_unknown")
            a.and_(s.RDX, e.ADDRESS)
    a.ret()
