"""The interrupt flag of a kernel, which in ring 3 is a word of the page shared with the hypervisor."""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept import direct as d
from vtsim.guest.kernel import KernelOptions
from vtsim.guest.kernel import layout as at


def shared(kernel: KernelOptions, word: int, index: int = s.NO_REGISTER) -> Mem:
    """A word of the page that this CPU shares with the hypervisor; `index`: a register with bytes beyond it."""
    if kernel.several:
        return Mem(displacement=at.SHARED - at.CPU_DATA + word, index=index, segment=2)
    return Mem(displacement=at.SHARED + word, index=index)


def disable(a: Assembler, kernel: KernelOptions) -> None:
    """Interrupts off."""
    if kernel.on_host:
        a.call("mask")
    elif kernel.ring3:
        a.st_value(shared(kernel, d.UPCALL_MASK), 1)
    else:
        a.op(ops.CLI)


def enable(a: Assembler, kernel: KernelOptions) -> None:
    """Interrupts on; one that waits comes at once. Changes flags."""
    if kernel.ring3:
        a.call("unmask")
    else:
        a.op(ops.STI)
