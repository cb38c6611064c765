"""Mapping of DMA buffers: `dma_map`, `dma_unmap`, and the queue of addresses that wait for a flush.

Strict: each unmap invalidates its pages and waits. Deferred: an address waits in a queue until one invalidation of the
whole domain, when the queue is full or after 10 ms; its page goes back to the driver at once, which is the window in
which a device still reaches it. Never: nothing is invalidated. Identity: devices use physical addresses.
A new entry needs no invalidation, but a flush of write buffers where the unit stands behind such.

Not modelled: bounce buffers; flush queues of other CPUs.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.dma_tables import flush_line
from vtsim.guest.kernel.invalidation import count
from vtsim.guest.kernel.iova_tree import lock, unlock
from vtsim.guest.kernel.lengths import length
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp

SIZES = {1: 1 << 12, 2: 1 << 21}  # by level of the entry
KEPT: Final = (s.RBX, s.RBP, s.R12, s.R13, s.R14)


def _port(word: int) -> Mem:
    return Mem(s.R15, word)


def name_of(what: str, leaf: int) -> str:
    """The routine that maps or unmaps pages of this level."""
    return f"dma_{what}_{leaf}"


@path("DMA mapping")
def mapping(a: Assembler, kernel: KernelOptions) -> None:
    """`dma_map_1`: RAX <- address for RSI pages at physical RDI; `dma_unmap_1`: RSI pages at RDI; `_2`: of 2 MiB.

    R15 is the port. All but callee-saved registers change.
    """
    dma = kernel.dma
    if dma is None:
        return
    for leaf in (1, 2) if dma.large else (1,):
        _map(a, kernel, leaf)
        _unmap(a, kernel, leaf)
    if dma.mode == "deferred":
        _flush_queue(a, kernel)


def _map(a: Assembler, kernel: KernelOptions, leaf: int) -> None:
    assert kernel.dma is not None
    a.activity = ops.DMA_MAP
    name = name_of("map", leaf)
    a.label(name)
    a.work(length("dma_map"))
    if kernel.dma.mode == "identity":
        a.copy(s.RAX, s.RDI)
        a.ret()
        return
    for register in KEPT:
        a.push(register)
    a.copy(s.R13, s.RDI)
    a.copy(s.R14, s.RSI)
    if leaf > 1:
        a.shl(s.RSI, 9)
    a.op(ops.CLI)
    a.call("iova_take")
    a.op(ops.STI)
    a.shl(s.RAX, 12)
    a.copy(s.R12, s.RAX)
    a.copy(s.RBX, s.RAX)
    _first_page(a, name, leaf, "dma_map_run")
    a.copy(s.RAX, s.R13)
    a.or_(s.RAX, kernel.dma.rights | (e.SL_PS if leaf > 1 else 0))
    a.st(Mem(s.RCX), s.RAX)
    flush_line(a, kernel, Mem(s.RCX))
    a.add(s.R13, SIZES[leaf])
    _next_page(a, name, leaf)
    if kernel.dma.caching_mode:
        a.copy(s.RDI, s.R12)
        a.copy(s.RSI, s.RBX)
        a.sub(s.RSI, register=s.R12)
        a.shr(s.RSI, 12)
        a.op(ops.CLI)
        a.call("invalidate_pages")
        a.op(ops.STI)
    elif kernel.dma.write_buffers:
        flush_writes(a, kernel.dma.registers, name)
    a.copy(s.RAX, s.R12)
    for register in reversed(KEPT):
        a.pop(register)
    a.ret()


def flush_writes(a: Assembler, registers: int, name: str) -> None:
    """Have the unit see the new entries: a command, with what is enabled as it is, and a wait until it is done."""
    a.mov(s.RAX, sp.TE | sp.QIE | sp.IRE | sp.WBF)
    a.st(Mem(displacement=registers + sp.GCMD, size=4), s.RAX, "flush write buffers")
    a.label(f"{name}_flushed")
    a.ld(s.RAX, Mem(displacement=registers + sp.GSTS, size=4))
    a.test(s.RAX, sp.WBF)
    a.jcc(ops.CC_NZ, f"{name}_flushed")


def _first_page(a: Assembler, name: str, leaf: int, code: str) -> None:
    """RCX <- the entry of the page at RBX; what follows is done for it, and for those behind it in its table."""
    a.label(f"{name}_table")
    a.work(length(code))
    a.copy(s.RSI, s.RBX)
    a.call(f"dma_entry_{leaf}")
    a.label(f"{name}_page")


def _next_page(a: Assembler, name: str, leaf: int) -> None:
    """On to the next page, as long as R14 are left."""
    a.add(s.RBX, SIZES[leaf])
    a.add(s.RCX, 8)
    a.sub(s.R14, 1)
    a.jcc(ops.CC_Z, f"{name}_done")
    a.test(s.RCX, 0xFFF)
    a.jcc(ops.CC_NZ, f"{name}_page")
    a.jmp(f"{name}_table")
    a.label(f"{name}_done")


def _unmap(a: Assembler, kernel: KernelOptions, leaf: int) -> None:
    dma = kernel.dma
    assert dma is not None
    a.activity = ops.DMA_UNMAP
    name = name_of("unmap", leaf)
    a.label(name)
    a.work(length("dma_unmap"))
    if dma.mode == "identity":
        a.ret()
        return
    for register in KEPT:
        a.push(register)
    a.copy(s.R12, s.RDI)
    a.copy(s.RBX, s.RDI)
    a.copy(s.R14, s.RSI)
    a.copy(s.R13, s.RSI)
    if leaf > 1:
        a.shl(s.R13, 9)
    _first_page(a, name, leaf, "dma_unmap_run")
    a.st_value(Mem(s.RCX), 0)
    flush_line(a, kernel, Mem(s.RCX))
    _next_page(a, name, leaf)
    a.op(ops.CLI)
    if dma.mode == "strict":
        a.copy(s.RDI, s.R12)
        a.copy(s.RSI, s.R13)
        a.call("invalidate_pages")
    a.copy(s.RDI, s.R12)
    a.shr(s.RDI, 12)
    a.copy(s.RSI, s.R13)
    a.call("dma_queue" if dma.mode == "deferred" else "iova_give")
    a.op(ops.STI)
    for register in reversed(KEPT):
        a.pop(register)
    a.ret()


def _flush_queue(a: Assembler, kernel: KernelOptions) -> None:
    """`dma_queue`: RSI pages from RDI on wait for a flush; `dma_tick`: what the timer does for the ports of a CPU."""
    assert kernel.dma is not None
    a.activity = ops.DMA_UNMAP
    a.label("dma_queue")
    a.push(s.RDI)
    a.push(s.RSI)
    lock(a, _port(d.Q_LOCK))
    a.call("dma_queue_free")
    a.ld(s.RCX, _port(d.Q_TAIL))
    _next(a, s.RCX)
    a.ld(s.RAX, _port(d.Q_HEAD))
    a.cmp(s.RAX, register=s.RCX)
    a.jcc(ops.CC_NZ, "dma_queue_room")
    a.call("dma_flush")
    a.call("dma_queue_free")
    a.label("dma_queue_room")
    a.pop(s.RSI)
    a.pop(s.RDI)
    a.ld(s.RCX, _port(d.Q_TAIL))
    _entry(a, s.R8, s.RCX)
    a.st(Mem(s.R8, d.E_PAGE), s.RDI)
    a.st(Mem(s.R8, d.E_PAGES), s.RSI)
    a.st_value(Mem(s.R8, d.E_FREE), 0)
    a.ld(s.RAX, _port(d.Q_STARTED))
    a.st(Mem(s.R8, d.E_COUNTER), s.RAX)
    _next(a, s.RCX)
    a.st(_port(d.Q_TAIL), s.RCX)
    unlock(a, _port(d.Q_LOCK))
    a.ld(s.RAX, _port(d.Q_ON))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "dma_queued")
    a.work(length("timer_add"))
    a.mov(s.RAX, 1)
    a.xadd(_port(d.Q_ON), s.RAX)
    a.ld(s.RAX, at.cpu_word(at.JIFFIES))
    a.add(s.RAX, kernel.dma.timeout_ticks)
    a.st(_port(d.Q_EXPIRES), s.RAX)
    a.label("dma_queued")
    a.ret()

    a.label("dma_queue_free")  # addresses of which the flush is done go back
    a.push(s.RBX)
    a.label("dma_free_next")
    a.ld(s.RBX, _port(d.Q_HEAD))
    a.ld(s.RAX, _port(d.Q_TAIL))
    a.cmp(s.RAX, register=s.RBX)
    a.jcc(ops.CC_Z, "dma_freed")
    _entry(a, s.R8, s.RBX)
    a.ld(s.RAX, Mem(s.R8, d.E_COUNTER))
    a.ld(s.RCX, _port(d.Q_FINISHED))
    a.cmp(s.RAX, register=s.RCX)
    a.jcc(ops.CC_AE, "dma_freed")
    a.ld(s.RDI, Mem(s.R8, d.E_PAGE))
    a.ld(s.RSI, Mem(s.R8, d.E_PAGES))
    a.call("iova_give")
    _next(a, s.RBX)
    a.st(_port(d.Q_HEAD), s.RBX)
    a.jmp("dma_free_next")
    a.label("dma_freed")
    a.pop(s.RBX)
    a.ret()

    a.label("dma_flush")
    for word in (d.Q_STARTED, d.Q_FINISHED):
        if word == d.Q_FINISHED:
            a.ld(s.RAX, _port(d.P_DOMAIN_LOW))
            a.mov(s.RDX, 0)
            if kernel.dma.device_tlbs:
                a.mov(s.R11, d.WHOLE)
            a.call("invalidate")
        a.mov(s.RAX, 1)
        a.xadd(_port(word), s.RAX)
    count(a, d.S_FLUSHES)
    a.ret()

    a.label("dma_tick")
    for number, port in enumerate(kernel.dma.ports):
        if kernel.several:
            a.ld(s.RAX, at.cpu_word(at.APIC_ID))
            a.cmp(s.RAX, kernel.dma.owners[number])
            a.jcc(ops.CC_NZ, f"dma_tick_{number}")
        a.mov(s.R15, port)
        a.ld(s.RAX, _port(d.Q_ON))
        a.test(s.RAX, -1)
        a.jcc(ops.CC_Z, f"dma_tick_{number}")
        a.ld(s.RAX, at.cpu_word(at.JIFFIES))
        a.ld(s.RCX, _port(d.Q_EXPIRES))
        a.cmp(s.RAX, register=s.RCX)
        a.jcc(ops.CC_B, f"dma_tick_{number}")
        a.work(length("timer_expire"))
        a.st_value(_port(d.Q_ON), 0)
        a.call("dma_flush")
        lock(a, _port(d.Q_LOCK))
        a.call("dma_queue_free")
        unlock(a, _port(d.Q_LOCK))
        a.label(f"dma_tick_{number}")
    a.ret()


def _next(a: Assembler, register: int) -> None:
    a.add(register, 1)
    a.and_(register, d.QUEUE_ENTRIES - 1)


def _entry(a: Assembler, to: int, number: int) -> None:
    """`to` <- where an entry of the queue stands. Clobbers RAX."""
    a.copy(to, number)
    a.shl(to, 5)
    a.ld(s.RAX, _port(d.Q_ENTRIES))
    a.add(to, register=s.RAX)
