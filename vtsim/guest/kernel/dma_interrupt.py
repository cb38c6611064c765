"""Completion of DMA: a task waits for what its device has done, by looking again and again or asleep."""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.invalidation import count
from vtsim.guest.kernel.lengths import length


@path("DMA completion")
def completion(a: Assembler, kernel: KernelOptions) -> None:
    """`dma_poll`, `dma_sleep`: until the device of the port R15 has done RSI descriptors; `dma_done`: its interrupt."""
    if kernel.dma is None:
        return
    a.activity = ops.DRIVER
    a.label("dma_poll")
    a.ld(s.RDX, Mem(s.R15, d.P_STATUS))
    a.label("dma_poll_again")
    a.ld(s.RAX, Mem(s.RDX))
    a.cmp(s.RAX, register=s.RSI)
    a.jcc(ops.CC_AE, "dma_polled")
    _unless_gone(a, kernel.dma)
    a.op(ops.PAUSE)
    a.jmp("dma_poll_again")
    a.label("dma_polled")
    a.ret()

    a.label("dma_sleep")
    a.push(s.RBX)
    a.push(s.RBP)
    a.copy(s.RBP, s.RSI)
    a.label("dma_sleep_again")
    a.op(ops.CLI)
    a.ld(s.RDX, Mem(s.R15, d.P_STATUS))
    a.ld(s.RAX, Mem(s.RDX))
    a.cmp(s.RAX, register=s.RBP)
    a.jcc(ops.CC_AE, "dma_slept")
    _unless_gone(a, kernel.dma)
    a.work(length("wait_event"))
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.st(Mem(s.R15, d.P_WAITER), s.RBX)
    a.st_value(Mem(s.RBX, at.T_STATE), at.DEVICE_WAIT)
    a.call("schedule")
    a.jmp("dma_sleep_again")
    a.label("dma_slept")
    a.op(ops.STI)
    a.pop(s.RBP)
    a.pop(s.RBX)
    a.ret()

    a.activity = ops.INTERRUPT_PATH
    a.label("dma_done")  # RBX: the vector
    if kernel.dma.askers:
        a.cmp(s.RBX, d.PAGE_REQUEST_VECTOR)
        a.jcc(ops.CC_Z, "page_request_event")
    for number, port in enumerate(kernel.dma.ports):
        a.mov(s.R15, port)
        a.cmp(s.RBX, d.DMA_VECTOR + number)
        a.jcc(ops.CC_Z, "dma_device")
    a.jmp("interrupt_done")
    a.label("dma_device")
    a.work(length("device_interrupt"))
    count(a, d.S_INTERRUPTS)
    wake_waiter(a, "interrupt_done")
    a.jmp("interrupt_done")


def wake_waiter(a: Assembler, nobody: str) -> None:
    """Wake the task that waits for the device of the port R15, or go to a label if none does; clobbers RSI."""
    a.ld(s.RSI, Mem(s.R15, d.P_WAITER))
    a.test(s.RSI, -1)
    a.jcc(ops.CC_Z, nobody)
    a.work(length("wake"))
    a.st_value(Mem(s.R15, d.P_WAITER), 0)
    a.st_value(Mem(s.RSI, at.T_STATE), at.RUNNABLE)
    a.st_value(at.cpu_word(at.NEED_RESCHED), 1)


def _unless_gone(a: Assembler, dma: d.DmaOptions) -> None:
    """A task waits in vain for a device that was given up."""
    if dma.device_tlbs:
        a.ld(s.RAX, Mem(s.R15, d.S_GIVEN_UP))
        a.test(s.RAX, -1)
        a.jcc(ops.CC_NZ, "dma_gone")
