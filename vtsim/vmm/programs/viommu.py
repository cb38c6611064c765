"""A remapping unit for a VM: each of its invalidations exits, and is made in the real unit.

In caching mode the guest's unit caches what is not present too, so a guest invalidates whenever it changes an entry.
For each page of an invalidation the guest's table is walked and the entry of the shadow table written, which is the one
that the real unit walks. An entry that was replaced is invalidated there, as the host's own driver does it: a
descriptor, a wait descriptor, the tail, and a wait. With nested translation the real unit walks the guest's first-level
tables, and invalidations are passed on.

VT-d: "Queued Invalidation Interface"; "IOTLB Invalidate Register".
Not modelled: the way of an exit through a device process, where QEMU has its unit; invalidations of whole domains in
caching mode; pinning; registers of the guest's unit other than the queue's tail and the fault status; pages of 2 MiB in
caching mode.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R8, R9, R10, R11, R12, R13, R14, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp
from vtsim.iommu.descriptors import IOTLB_TYPE, WAIT, descriptor
from vtsim.vmm import layout as at
from vtsim.vmm.programs.words import work, zero
from vtsim.vmm.registry import Path

# fmt: off
# words of the guest's unit, then of each of its devices; and of the host's queue
(VI_HEAD, VI_QUEUE, VI_TABLES, VI_TABLES_END, HOST_NEXT, VI_EXITS, VI_PAGES, VI_FLUSHES) = range(0, 64, 8)
VI_DEVICES: Final = 64
DEVICE_BYTES: Final = 32
(VD_GUEST, VD_SHADOW, VD_LOW) = range(0, 24, 8)
HOST_STATUS: Final = 0x800
QUEUE_MASK: Final = 0xFF0
GRANULARITY: Final = 3 << 4
IN_USE, DONE = 1, 2
# fmt: on
READ_WRITE: Final = e.SL_R | e.SL_W


def registers(a: Assembler, path: Path) -> None:
    """`viommu`: an access to the unit's registers. R13 address, R12 write?, RAX value."""
    unit = path.addresses["viommu"]
    a.label("viommu")
    work(a, path, "in_kernel_device")
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "viommu_store")
    zero(a, RAX)
    a.jmp("load_completed")
    a.label("viommu_store")
    a.copy(RCX, R13)
    a.and_(RCX, 0xFFF)
    a.cmp(RCX, sp.IQT)
    a.jcc(ops.CC_NZ, "skip_decoded")
    a.copy(R14, RAX)
    a.mov(RBX, unit)
    _count(a, VI_EXITS)

    a.label("viommu_next")
    a.ld(RAX, Mem(RBX, VI_HEAD))
    a.cmp(RAX, register=R14)
    a.jcc(ops.CC_Z, "skip_decoded")
    a.ld(RSI, Mem(RBX, VI_QUEUE))
    a.add(RSI, register=RAX)
    a.add(RAX, 16)
    a.and_(RAX, QUEUE_MASK)
    a.st(Mem(RBX, VI_HEAD), RAX)
    a.call("guest_memory")
    a.ld(R12, Mem(RDI))
    a.ld(R13, Mem(RDI, 8))
    a.copy(RAX, R12)
    a.and_(RAX, 0xF)
    a.cmp(RAX, IOTLB_TYPE)
    a.jcc(ops.CC_Z, "viommu_pages")
    a.cmp(RAX, WAIT)
    a.jcc(ops.CC_NZ, "viommu_next")
    a.copy(RSI, R13)
    a.call("guest_memory")
    a.shr(R12, 32)
    a.st(Mem(RDI, size=4), R12)
    a.jmp("viommu_next")
    _pages(a, path)
    _flush(a, unit, path.addresses["viommu_step"])


def _pages(a: Assembler, path: Path) -> None:
    """Pages of a domain: R11 the device, R12 how many, R13 address; RBP gathers the entries that were replaced."""
    nested = path.addresses["viommu_step"] > 16
    a.label("viommu_pages")
    if not nested:
        a.copy(RAX, R12)
        a.and_(RAX, GRANULARITY)
        a.cmp(RAX, GRANULARITY, comment="page-selective")
        a.jcc(ops.CC_NZ, "viommu_next")
    a.copy(R11, R12)
    a.shr(R11, 16)
    a.and_(R11, 0xFFFF)
    a.sub(R11, 1)
    a.shl(R11, 5)
    a.add(R11, register=RBX)
    if nested:
        a.jmp("viommu_flush")
        return
    a.copy(RCX, R13)
    a.and_(RCX, 0x3F)
    a.push(R13)
    a.mov(R12, 1)
    a.label("viommu_order")
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "viommu_counted")
    a.shl(R12, 1)
    a.sub(RCX, 1)
    a.jmp("viommu_order")
    a.label("viommu_counted")
    a.and_(R13, e.POINTER)
    zero(a, RBP)

    a.label("viommu_page")
    work(a, path, "map_dma")
    _count(a, VI_PAGES)
    a.ld(R9, Mem(R11, VI_DEVICES + VD_GUEST))
    for level in (4, 3, 2, 1):
        a.and_(R9, e.ADDRESS)
        a.copy(RSI, R13)
        a.shr(RSI, 9 * level)
        a.and_(RSI, 0xFF8)
        a.add(RSI, register=R9)
        a.call("guest_memory")
        a.ld(R9, Mem(RDI))
        a.test(R9, READ_WRITE)
        a.jcc(ops.CC_Z, "viommu_nothing")
    a.copy(RSI, R9)
    a.and_(RSI, e.ADDRESS)
    a.call("guest_memory")
    a.copy(RDX, RDI)
    a.sub(RDX, register=R8)
    a.and_(R9, READ_WRITE)
    a.or_(RDX, register=R9)
    a.jmp("viommu_write")
    a.label("viommu_nothing")
    zero(a, RDX)
    a.label("viommu_write")
    a.push(R11)
    a.ld(RDI, Mem(R11, VI_DEVICES + VD_SHADOW))
    a.copy(RSI, R13)
    a.mov(RCX, 1)
    a.mov(R8, at.HOST_DIRECT)
    a.lea(R9, Mem(RBX, VI_TABLES))
    a.mov(R10, READ_WRITE)
    zero(a, R11)
    a.hook(hooks.TABLE_MAP)
    a.pop(R11)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "unexpected")
    a.or_(RBP, register=RDX)
    a.add(R13, 4096)
    a.sub(R12, 1)
    a.jcc(ops.CC_NZ, "viommu_page")
    a.pop(R13)
    a.test(RBP, READ_WRITE)
    a.jcc(ops.CC_Z, "viommu_next")


def _flush(a: Assembler, unit: int, step: int) -> None:
    """The pages of R13 are invalidated in the real unit, for the domain of the device R11."""
    queue = unit + 4096
    status = unit + HOST_STATUS
    a.label("viommu_flush")
    _count(a, VI_FLUSHES)
    a.ld(RDX, Mem(R11, VI_DEVICES + VD_LOW))
    if step > 16:  # pages of a PASID, or all
        a.and_(R12, GRANULARITY)
        a.or_(RDX, register=R12)
    a.ld(RSI, Mem(RBX, HOST_NEXT))
    a.st(Mem(RSI, queue), RDX)
    a.st(Mem(RSI, queue + 8), R13)
    a.add(RSI, step)
    a.and_(RSI, QUEUE_MASK)
    a.st_value(Mem(displacement=status, size=4), IN_USE)
    wait, _ = descriptor("WAIT", SW=1, STDATA=DONE)
    a.mov(RDX, wait)
    a.st(Mem(RSI, queue), RDX)
    a.mov(RDX, status - at.HOST_DIRECT)
    a.st(Mem(RSI, queue + 8), RDX)
    a.add(RSI, step)
    a.and_(RSI, QUEUE_MASK)
    a.st(Mem(RBX, HOST_NEXT), RSI)
    a.st(Mem(displacement=at.HOST_UNIT + sp.IQT, size=4), RSI)
    a.label("viommu_wait")
    a.ld(RAX, Mem(displacement=status, size=4))
    a.cmp(RAX, DONE)
    a.jcc(ops.CC_Z, "viommu_next")
    a.ld(RAX, Mem(displacement=at.HOST_UNIT + sp.FSTS, size=4))
    a.test(RAX, sp.IQE | sp.ITE | sp.ICE)
    a.jcc(ops.CC_NZ, "unexpected")
    a.op(ops.PAUSE)
    a.jmp("viommu_wait")


def _count(a: Assembler, word: int) -> None:
    """One more in a word of the guest's unit. Changes RCX."""
    a.ld(RCX, Mem(RBX, word))
    a.add(RCX, 1)
    a.st(Mem(RBX, word), RCX)
