"""Addresses of devices, kept in magazines for each size, as Linux keeps them for each CPU; what none has, the tree has.

R15 is the port. A magazine holds how many addresses it has, then these. Full ones go to a depot.

Not modelled: magazines of other CPUs; what a full depot frees at once (here each address goes back to the tree).
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel.iova_tree import lock, unlock
from vtsim.guest.kernel.lengths import length


def _class_of(a: Assembler, name: str, beyond: str) -> None:
    """RSI <- RSI pages rounded up to a power of two, RBX <- the magazines of that size; else to `beyond`."""
    a.mov(s.RCX, 0)
    a.mov(s.RAX, 1)
    a.label(f"{name}_order")
    a.cmp(s.RAX, register=s.RSI)
    a.jcc(ops.CC_AE, f"{name}_known")
    a.shl(s.RAX, 1)
    a.add(s.RCX, d.CLASS_BYTES)
    a.jmp(f"{name}_order")
    a.label(f"{name}_known")
    a.copy(s.RSI, s.RAX)
    a.cmp(s.RCX, d.CLASS_COUNT * d.CLASS_BYTES)
    a.jcc(ops.CC_AE, beyond)
    a.lea(s.RBX, Mem(s.R15, d.CLASSES, index=s.RCX))


def _depot(a: Assembler) -> None:
    """R10 <- where the depot of the class at RBX stands."""
    a.copy(s.R10, s.RBX)
    a.sub(s.R10, register=s.R15)
    a.sub(s.R10, d.CLASSES)
    a.shl(s.R10, 2)
    a.add(s.R10, register=s.R15)


@path("address cache")
def cache(a: Assembler, kernel: KernelOptions) -> None:
    """`iova_take`: RAX <- first page of RSI pages; `iova_give`: RSI pages from RDI on. Both with interrupts off."""
    if kernel.dma is None or kernel.dma.mode == "identity":
        return
    a.activity = ops.DMA_MAP
    a.label("iova_take")
    a.push(s.RBX)
    cached = kernel.dma.cached
    _class_of(a, "take", "take_from_tree")
    if cached:
        lock(a, Mem(s.RBX, d.C_LOCK))
        a.ld(s.R8, Mem(s.RBX, d.C_LOADED))
        a.ld(s.RCX, Mem(s.R8))
        a.test(s.RCX, -1)
        a.jcc(ops.CC_NZ, "take_pop")
        a.ld(s.R9, Mem(s.RBX, d.C_PREVIOUS))
        a.ld(s.RCX, Mem(s.R9))
        a.test(s.RCX, -1)
        a.jcc(ops.CC_Z, "take_from_depot")
        a.st(Mem(s.RBX, d.C_LOADED), s.R9)
        a.st(Mem(s.RBX, d.C_PREVIOUS), s.R8)
        a.copy(s.R8, s.R9)
        a.label("take_pop")
        a.ld(s.RAX, Mem(s.R8, 0, index=s.RCX, scale=8))
        a.sub(s.RCX, 1)
        a.st(Mem(s.R8), s.RCX)
        unlock(a, Mem(s.RBX, d.C_LOCK))
        a.pop(s.RBX)
        a.ret()
        a.label("take_from_depot")
        a.ld(s.RCX, Mem(s.RBX, d.C_FULL))
        a.test(s.RCX, -1)
        a.jcc(ops.CC_Z, "take_none")
        a.sub(s.RCX, 1)
        a.st(Mem(s.RBX, d.C_FULL), s.RCX)
        a.ld(s.RAX, Mem(s.R15, d.P_MAGAZINES))
        a.st(Mem(s.R8), s.RAX)
        a.st(Mem(s.R15, d.P_MAGAZINES), s.R8)
        _depot(a)
        a.ld(s.R8, Mem(s.R10, d.DEPOTS, index=s.RCX, scale=8))
        a.st(Mem(s.RBX, d.C_LOADED), s.R8)
        a.ld(s.RCX, Mem(s.R8))
        a.jmp("take_pop")
        a.label("take_none")
        unlock(a, Mem(s.RBX, d.C_LOCK))
    a.label("take_from_tree")
    a.call("tree_take")
    a.pop(s.RBX)
    a.ret()

    a.activity = ops.DMA_UNMAP
    a.label("iova_give")
    a.push(s.RBX)
    _class_of(a, "give", "give_to_tree")
    if cached:
        lock(a, Mem(s.RBX, d.C_LOCK))
        a.ld(s.R8, Mem(s.RBX, d.C_LOADED))
        a.ld(s.RCX, Mem(s.R8))
        a.cmp(s.RCX, d.MAGAZINE_LIMIT)
        a.jcc(ops.CC_B, "give_push")
        a.ld(s.R9, Mem(s.RBX, d.C_PREVIOUS))
        a.ld(s.RCX, Mem(s.R9))
        a.cmp(s.RCX, d.MAGAZINE_LIMIT)
        a.jcc(ops.CC_AE, "give_to_depot")
        a.st(Mem(s.RBX, d.C_LOADED), s.R9)
        a.st(Mem(s.RBX, d.C_PREVIOUS), s.R8)
        a.copy(s.R8, s.R9)
        a.label("give_push")
        a.add(s.RCX, 1)
        a.st(Mem(s.R8, 0, index=s.RCX, scale=8), s.RDI)
        a.st(Mem(s.R8), s.RCX)
        unlock(a, Mem(s.RBX, d.C_LOCK))
        a.pop(s.RBX)
        a.ret()
        a.label("give_to_depot")
        a.ld(s.RCX, Mem(s.RBX, d.C_FULL))
        a.cmp(s.RCX, d.DEPOT_LIMIT)
        a.jcc(ops.CC_AE, "give_no_room")
        a.work(length("object_get"))
        a.ld(s.R9, Mem(s.R15, d.P_MAGAZINES))
        a.test(s.R9, -1)
        a.jcc(ops.CC_Z, "give_no_room")
        a.ld(s.RAX, Mem(s.R9))
        a.st(Mem(s.R15, d.P_MAGAZINES), s.RAX)
        _depot(a)
        a.st(Mem(s.R10, d.DEPOTS, index=s.RCX, scale=8), s.R8)
        a.add(s.RCX, 1)
        a.st(Mem(s.RBX, d.C_FULL), s.RCX)
        a.st(Mem(s.RBX, d.C_LOADED), s.R9)
        a.copy(s.R8, s.R9)
        a.mov(s.RCX, 0)
        a.jmp("give_push")
        a.label("give_no_room")
        unlock(a, Mem(s.RBX, d.C_LOCK))
    a.label("give_to_tree")
    a.call("tree_give")
    a.pop(s.RBX)
    a.ret()
