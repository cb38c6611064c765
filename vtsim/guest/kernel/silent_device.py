"""Devices that answer no invalidation of their device-TLB: given up, and blocked.

What a device holds in its device-TLB is believed, so one that does not forget is blocked before an unmap returns: its
context entry is made not present, and that is invalidated in place of the device-TLB. The process that waits for the
device ends.

VT-d: "Queued Invalidation Error Handling".
Not modelled: whether a device is still on its bus, which Linux asks (it asks again as long as it is).
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.dma_interrupt import wake_waiter
from vtsim.guest.kernel.dma_tables import flush_line
from vtsim.guest.kernel.invalidation import count


@path("silent devices")
def silent_devices(a: Assembler, kernel: KernelOptions) -> None:
    """`invalidate_unless_silent`: on with an aborted invalidation, which is on the stack; `dma_gone`: a task ends."""
    if kernel.dma is None or not kernel.dma.device_tlbs:
        return
    a.activity = ops.INVALIDATION
    a.label("invalidate_unless_silent")
    a.ld(s.RAX, Mem(s.RSP, 8))
    a.ld(s.RCX, Mem(s.R15, d.P_DEVICE_LOW))
    a.cmp(s.RAX, register=s.RCX)
    a.jcc(ops.CC_NZ, "invalidate_again")
    a.ld(s.RAX, Mem(s.R15, d.P_TRIES))
    a.cmp(s.RAX, d.TRIES)
    a.jcc(ops.CC_B, "invalidate_again")
    a.ld(s.RDI, Mem(s.R15, d.P_CONTEXT))
    a.st_value(Mem(s.RDI), 0, "not present")
    flush_line(a, kernel, Mem(s.RDI))
    a.st_value(Mem(s.R15, d.P_DEVICE_LOW), 0)
    count(a, d.S_GIVEN_UP)
    wake_waiter(a, "invalidate_nobody")
    a.label("invalidate_nobody")
    a.ld(s.RAX, Mem(s.R15, d.P_CONTEXT_LOW))
    a.st(Mem(s.RSP, 8), s.RAX)
    a.st_value(Mem(s.RSP), 0)
    a.jmp("invalidate_again")
    a.label("dma_gone")
    a.mov(s.R15, at.DEVICE_GONE)
    a.jmp("write_log")
