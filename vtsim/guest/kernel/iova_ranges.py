"""Addresses for devices from the tree of those in use: the highest free range, searched from where the last one was.

R15 is the port.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel.iova_tree import find_node, lock, port, unlock
from vtsim.guest.kernel.lengths import length


@path("addresses from the tree")
def from_tree(a: Assembler, kernel: KernelOptions) -> None:
    """`tree_take`: RAX <- first of RSI free pages (a power of two), the highest below those in use; `tree_give`."""
    if kernel.dma is None or kernel.dma.mode == "identity":
        return
    a.activity = ops.DMA_MAP
    kept = (s.RBX, s.RBP, s.R12)
    a.label("tree_take")
    for register in kept:
        a.push(register)
    a.copy(s.R12, s.RSI)
    a.work(length("object_get"))
    a.ld(s.RBX, port(d.P_NODES))
    a.test(s.RBX, -1)
    a.jcc(ops.CC_Z, "dma_exhausted")
    a.ld(s.RAX, Mem(s.RBX))
    a.st(port(d.P_NODES), s.RAX)
    lock(a, port(d.P_LOCK))
    a.ld(s.RSI, port(d.P_CACHED))
    a.mov(s.R8, d.LAST_PAGE + 1)
    a.mov(s.R10, 0)
    a.sub(s.R10, register=s.R12)
    a.label("tree_look")  # R9: where it would lie, below the node RSI that becomes RBP
    a.ld(s.RAX, Mem(s.RSI, d.N_LOW))
    a.cmp(s.R8, register=s.RAX)
    a.jcc(ops.CC_BE, "tree_below")
    a.copy(s.R8, s.RAX)
    a.label("tree_below")
    a.copy(s.R9, s.R8)
    a.sub(s.R9, register=s.R12)
    a.jcc(ops.CC_BE, "dma_exhausted")
    a.and_(s.R9, register=s.R10)
    a.copy(s.RBP, s.RSI)
    a.call("iova_previous")
    a.test(s.RSI, -1)
    a.jcc(ops.CC_Z, "tree_fits")
    a.ld(s.RAX, Mem(s.RSI, d.N_HIGH))
    a.cmp(s.R9, register=s.RAX)
    a.jcc(ops.CC_BE, "tree_look")
    a.label("tree_fits")
    a.st(Mem(s.RBX, d.N_LOW), s.R9)
    a.copy(s.RAX, s.R9)
    a.add(s.RAX, register=s.R12)
    a.sub(s.RAX, 1)
    a.st(Mem(s.RBX, d.N_HIGH), s.RAX)
    a.st(port(d.P_CACHED), s.RBX)
    a.push(s.R9)
    a.copy(s.RSI, s.RBP)
    a.call("iova_insert")
    unlock(a, port(d.P_LOCK))
    a.pop(s.RAX)
    for register in reversed(kept):
        a.pop(register)
    a.ret()

    a.activity = ops.DMA_UNMAP
    a.label("tree_give")  # the pages from RDI on; all but callee-saved registers change
    a.push(s.RBX)
    a.push(s.RBP)
    lock(a, port(d.P_LOCK))
    a.ld(s.RBX, port(d.P_TREE))
    find_node(a, s.RBX, "give")
    a.ld(s.RSI, port(d.P_CACHED))
    a.ld(s.RAX, Mem(s.RSI, d.N_LOW))
    a.ld(s.RCX, Mem(s.RBX, d.N_LOW))
    a.cmp(s.RCX, register=s.RAX)
    a.jcc(ops.CC_B, "give_cached")
    a.copy(s.RSI, s.RBX)
    a.call("iova_next")
    a.st(port(d.P_CACHED), s.RSI)
    a.label("give_cached")
    a.call("iova_remove")
    unlock(a, port(d.P_LOCK))
    a.work(length("object_put"))
    a.ld(s.RAX, port(d.P_NODES))
    a.st(Mem(s.RBX), s.RAX)
    a.st(port(d.P_NODES), s.RBX)
    a.pop(s.RBP)
    a.pop(s.RBX)
    a.ret()
