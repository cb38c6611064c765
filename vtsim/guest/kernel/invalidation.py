"""Invalidation of translations of devices, as Linux does it: a descriptor, a wait descriptor, the tail, and a wait.

Where the device has a device-TLB, its invalidation follows when that of the IOTLB is done, with a wait of its own: what
the device asks for in between must not come from the IOTLB. One that is not answered in time stops the queue
(Invalidation Time-out Error): whoever sees it marks the waits that were aborted, clears the error, and who waited for
these queues them again. A device that has answered none of `TRIES` is given up: its context entry is no longer present,
which blocks all that it sends, and its process ends when it waits for the device.

The status word that the unit writes is polled; between two looks the fault status register is read, which is a
read of a device. CPUs take turns at the queue, and let go of it between two looks.

VT-d: "Queued Invalidation Interface"; "Invalidation Wait Descriptor"; "Queued Invalidation Error Handling".
Not modelled: a queue that is full (each CPU waits for each of its invalidations).
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel.lengths import length
from vtsim.guest.kernel.smp import lock, unlock
from vtsim.guest.kernel.timer import read_tsc
from vtsim.iommu import spec as sp
from vtsim.iommu.descriptors import PAGE_GROUP_RESPONSE, descriptor

ERRORS = sp.IQE | sp.ITE | sp.ICE


@path("invalidation")
def invalidation(a: Assembler, kernel: KernelOptions) -> None:
    """`invalidate`: the descriptor in RAX and RDX, and wait; `invalidate_pages`: RSI pages from address RDI on.

    A page group response is queued as an invalidation is, and counts as none.

    Interrupts are off. R15 is the port; all but callee-saved registers change.
    """
    dma = kernel.dma
    if dma is None or dma.mode == "identity":
        return
    unit, entries, order = dma.unit, d.UNIT_ENTRIES >> dma.wide, 4 + dma.wide
    turn = Mem(displacement=unit + d.U_TICKET), Mem(displacement=unit + d.U_SERVING)
    a.activity = ops.INVALIDATION
    a.label("invalidate_pages")
    a.mov(s.RDX, 0)
    a.mov(s.RAX, 1)
    a.label("invalidate_order")  # a power of two of pages, to whose size they are aligned
    a.cmp(s.RAX, register=s.RSI)
    a.jcc(ops.CC_AE, "invalidate_known")
    a.shl(s.RAX, 1)
    a.add(s.RDX, 1)
    a.jmp("invalidate_order")
    a.label("invalidate_known")
    if dma.device_tlbs:
        _range_of_device(a)
    a.or_(s.RDX, register=s.RDI)
    a.ld(s.RAX, Mem(s.R15, d.P_PAGE_LOW))

    a.label("invalidate")
    a.work(length("invalidate"))
    if dma.device_tlbs:
        a.push(s.R11)
    a.push(s.RAX)
    a.push(s.RDX)
    read_tsc(a, s.R8)
    a.pop(s.RDX)
    a.pop(s.RCX)
    if dma.device_tlbs:
        a.label("invalidate_submit")
        a.push(s.RCX)
        a.push(s.RDX)
        a.label("invalidate_again")
        a.ld(s.RDX, Mem(s.RSP))
        a.ld(s.RCX, Mem(s.RSP, 8))
    lock(a, *turn, s.RDI)
    a.ld(s.R9, Mem(displacement=unit + d.U_NEXT))
    a.copy(s.R10, s.R9)
    a.shl(s.R10, order)
    a.st(Mem(s.R10, dma.queue), s.RCX)
    a.st(Mem(s.R10, dma.queue + 8), s.RDX)
    a.add(s.R9, 1)
    a.and_(s.R9, entries - 1)
    a.st_value(Mem(displacement=unit + d.U_STATUS, index=s.R9, scale=4, size=4), d.IN_USE)
    a.copy(s.R10, s.R9)
    a.shl(s.R10, 2)
    a.mov(s.RAX, dma.unit_physical + d.U_STATUS)
    a.add(s.RAX, register=s.R10)
    a.shl(s.R10, order - 2)
    wait, _ = descriptor("WAIT", SW=1, STDATA=d.DONE)
    a.mov(s.RCX, wait)
    a.st(Mem(s.R10, dma.queue), s.RCX)
    a.st(Mem(s.R10, dma.queue + 8), s.RAX)
    a.copy(s.R10, s.R9)
    a.add(s.R10, 1)
    a.and_(s.R10, entries - 1)
    a.st(Mem(displacement=unit + d.U_NEXT), s.R10)
    a.shl(s.R10, order)
    a.st(Mem(displacement=dma.registers + sp.IQT, size=4), s.R10, "the unit begins")
    a.label("invalidate_wait")
    a.ld(s.RAX, Mem(displacement=unit + d.U_STATUS, index=s.R9, scale=4, size=4))
    a.cmp(s.RAX, d.DONE)
    a.jcc(ops.CC_Z, "invalidated")
    if dma.device_tlbs:
        a.cmp(s.RAX, d.ABORTED)
        a.jcc(ops.CC_Z, "invalidate_aborted")
    a.ld(s.RAX, Mem(displacement=dma.registers + sp.FSTS, size=4))
    a.test(s.RAX, ERRORS)
    a.jcc(ops.CC_NZ, "invalidate_error" if dma.device_tlbs else "dma_exhausted")
    a.label("invalidate_looked")
    count(a, d.S_SPINS)
    unlock(a, turn[1])
    a.op(ops.PAUSE)
    lock(a, *turn, s.RDI)
    a.jmp("invalidate_wait")
    a.label("invalidated")
    unlock(a, turn[1])
    if dma.askers:
        a.ld(s.RAX, Mem(s.RSP, 8))
        a.and_(s.RAX, 0xF)
        a.cmp(s.RAX, PAGE_GROUP_RESPONSE)
        a.jcc(ops.CC_Z, "invalidate_answered")
    if dma.device_tlbs:
        _then_device(a)
    read_tsc(a, s.RCX)
    a.sub(s.RCX, register=s.R8)
    add_to(a, d.S_INVALIDATION_CYCLES, s.RCX)
    count(a, d.S_INVALIDATIONS)
    a.ret()
    if dma.askers:
        a.label("invalidate_answered")
        a.add(s.RSP, 16)
        a.pop(s.R11)
        a.ret()
    if dma.device_tlbs:
        _error(a, dma)
        a.label("invalidate_aborted")
        unlock(a, turn[1])
        a.jmp("invalidate_unless_silent")


def _range_of_device(a: Assembler) -> None:
    """R11 <- second word of the device-TLB invalidation of RAX pages, 2 to the RDX, from RDI on."""
    a.copy(s.R11, s.RAX)
    a.shl(s.R11, 11)
    a.sub(s.R11, 1)
    a.and_(s.R11, ~0xFFF)
    a.or_(s.R11, register=s.RDI)
    a.test(s.RDX, -1)
    a.jcc(ops.CC_Z, "invalidate_single")
    a.or_(s.R11, 1)
    a.label("invalidate_single")


def _then_device(a: Assembler) -> None:
    """What was invalidated, the IOTLB or the device-TLB, is on the stack, and below it the range: on to the second."""
    a.pop(s.RDX)
    a.pop(s.RCX)
    a.ld(s.RAX, Mem(s.R15, d.P_DEVICE_LOW))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "invalidate_over")
    a.cmp(s.RCX, register=s.RAX)
    a.jcc(ops.CC_Z, "invalidate_over")
    a.copy(s.RCX, s.RAX)
    a.ld(s.RDX, Mem(s.RSP))
    a.st_value(Mem(s.R15, d.P_TRIES), 0)
    count(a, d.S_DEVICE_INVALIDATIONS)
    a.jmp("invalidate_submit")
    a.label("invalidate_over")
    a.pop(s.R11)


def _error(a: Assembler, dma: d.DmaOptions) -> None:
    """RAX is the fault status, with an error. Waits stand at odd places of the queue; R9 is one's own."""
    entries, order = d.UNIT_ENTRIES >> dma.wide, 4 + dma.wide
    status = Mem(displacement=dma.unit + d.U_STATUS, index=s.R10, scale=4, size=4)
    faults = Mem(displacement=dma.registers + sp.FSTS, size=4)
    a.label("invalidate_error")
    a.test(s.RAX, sp.IQE)
    a.jcc(ops.CC_NZ, "dma_exhausted")
    a.test(s.RAX, sp.ITE)
    a.jcc(ops.CC_Z, "invalidate_unexpected")
    a.ld(s.RAX, Mem(displacement=dma.registers + sp.IQERCD + 4, size=4), "of which device")
    a.and_(s.RAX, 0xFFFF)
    for source, port in dma.device_tlbs:
        a.cmp(s.RAX, source)
        a.jcc(ops.CC_NZ, f"invalidate_not_{source:x}")
        a.mov(s.RDI, port)
        a.ld(s.R10, Mem(s.RDI, d.P_TRIES))
        a.add(s.R10, 1)
        a.st(Mem(s.RDI, d.P_TRIES), s.R10)
        a.label(f"invalidate_not_{source:x}")
    for register, where in ((s.R10, sp.IQH), (s.RDI, sp.IQT)):
        a.ld(register, Mem(displacement=dma.registers + where, size=4))
        a.shr(register, order)
        a.sub(register, 1)
        a.and_(register, entries - 1)
        a.or_(register, 1)
    a.mov(s.RAX, sp.ITE)
    a.st(faults, s.RAX, "the queue goes on")
    a.label("invalidate_abort")
    a.ld(s.RAX, status)
    a.cmp(s.RAX, d.IN_USE)
    a.jcc(ops.CC_NZ, "invalidate_before")
    a.st_value(status, d.ABORTED)
    a.label("invalidate_before")
    a.sub(s.R10, 2)
    a.and_(s.R10, entries - 1)
    a.cmp(s.R10, register=s.RDI)
    a.jcc(ops.CC_NZ, "invalidate_abort")
    count(a, d.S_TIMEOUTS)
    a.jmp("invalidate_wait")
    a.label("invalidate_unexpected")
    a.mov(s.RAX, sp.ICE)
    a.st(faults, s.RAX)
    a.jmp("invalidate_looked")


def count(a: Assembler, word: int) -> None:
    """One more in a word of the port. Clobbers RAX."""
    a.ld(s.RAX, Mem(s.R15, word))
    a.add(s.RAX, 1)
    a.st(Mem(s.R15, word), s.RAX)


def add_to(a: Assembler, word: int, register: int) -> None:
    """Add a register to a word of the port. Clobbers RAX."""
    a.ld(s.RAX, Mem(s.R15, word))
    a.add(s.RAX, register=register)
    a.st(Mem(s.R15, word), s.RAX)
