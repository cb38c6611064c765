"""Frames of the host from its buddy allocator, on the node that the scenario says.

Where vCPUs run on several CPUs, a zone has a lock, held with interrupts off: the disk's handler gives frames too.

Not modelled: compaction and reclaim where no block of 2 MiB is free.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels.buddy import LARGEST_ORDER
from vtsim.cpu.kernels.memory_hooks import BUDDY_GIVE, BUDDY_TAKE
from vtsim.cpu.slots import R13, RAX, RCX, RDI, RSI
from vtsim.vmm.buddy import ZONE_BYTES, ZONE_SERVING, ZONE_TICKET
from vtsim.vmm.programs import several
from vtsim.vmm.programs.words import count, vcpu, zero
from vtsim.vmm.registry import Path


def subroutines(a: Assembler, path: Path) -> None:
    """`take_frame`, `take_block`: RAX <- (first) frame for the guest-physical address in R13, or -1. Changes RCX RDI.

    `give_frame`: the frame in RSI is free; changes RAX RCX RDI.
    A frame that its node lacks comes from the other one; a block does not, as small local pages are better.
    """
    a.label("take_frame")
    _zone(a, path, 12)
    locked_hook(a, path, BUDDY_TAKE, 0)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NS, "frame_taken")
    a.ld(RCX, vcpu("ZONE"))
    a.ld(RAX, vcpu("OTHER_ZONE"))
    a.cmp(RAX, register=RCX)
    a.jcc(ops.CC_Z, "no_frame_at_all")
    a.cmp(RDI, register=RCX)
    a.copy(RDI, RCX)
    a.jcc(ops.CC_NZ, "take_elsewhere")
    a.copy(RDI, RAX)
    a.label("take_elsewhere")
    locked_hook(a, path, BUDDY_TAKE, 0)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_S, "no_frame_at_all")
    a.copy(RCX, RAX)
    count(a, "OTHER_NODE")
    a.copy(RAX, RCX)
    a.label("frame_taken")
    a.ret()
    a.label("no_frame_at_all")
    a.mov(RAX, -1)
    a.ret()

    a.label("give_frame")
    a.mov(RDI, path.addresses["zones"])
    if path.addresses["second_node"]:
        a.cmp(RSI, path.addresses["second_node"])
        a.jcc(ops.CC_B, "frame_of_first")
        a.add(RDI, ZONE_BYTES)
        a.label("frame_of_first")
    locked_hook(a, path, BUDDY_GIVE, 0)
    a.ret()

    a.label("take_block")
    _zone(a, path, 21)
    locked_hook(a, path, BUDDY_TAKE, LARGEST_ORDER)
    a.ret()


def locked_hook(a: Assembler, path: Path, hook: int, order: int) -> None:
    """A hook on the zone at RDI, for blocks of an order. Changes RCX, and RAX where it takes or CPUs are several."""
    ticket, serving = Mem(RDI, ZONE_TICKET), Mem(RDI, ZONE_SERVING)
    if path.parallel:
        a.op(ops.PUSHF)
        a.op(ops.CLI)
        several.lock(a, ticket, serving)
    if order:
        a.mov(RCX, order)
    else:
        zero(a, RCX)
    a.hook(hook)
    if path.parallel:
        several.unlock(a, serving, spare=RCX)
        a.op(ops.POPF)


def _zone(a: Assembler, path: Path, shift: int) -> None:
    """RDI <- the zone for the page of R13. Changes RAX."""
    label = f"zone_of_{shift}"
    a.ld(RDI, vcpu("ZONE"))
    if path.vmm.memory.data == "interleaved":
        a.copy(RAX, R13)
        a.shr(RAX, shift)
        a.test(RAX, 1)
        a.jcc(ops.CC_Z, label)
        a.ld(RDI, vcpu("OTHER_ZONE"))
        a.label(label)
