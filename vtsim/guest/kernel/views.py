"""Virtualization exceptions of the kernel: a store that the view of memory in use does not allow.

The handler is what a monitor inside the guest is: it notes the page, decodes the store, makes it in the permissive
view, and goes on behind it, without a VM exit. While the busy word of the information area is set, a second one exits.

SDM: "Virtualization Exceptions"; "Virtualization-Exception Information"; "EPTP Switching".
Not modelled: stores of other sizes than 8 bytes, and other instructions; such a task is killed.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.codes import VE
from vtsim.cpu.kernels import hooks
from vtsim.ept import views as w
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.lengths import length

NOTED, NOTED_AT = at.PAGE, at.PAGE + 8  # in the page behind the information area: how many, the last one's address
IMMEDIATE: Final = 16  # as DECODE names it
WORD: Final = 8


def look(a: Assembler, kernel: KernelOptions) -> None:
    """Part of the way in: RAX vector; to the handler with a virtualization exception."""
    if kernel.views > 1:
        a.cmp(s.RAX, VE)
        a.jcc(ops.CC_Z, "virtualization_exception")


def function(a: Assembler) -> None:
    """To the view in RCX. Changes RAX."""
    a.mov(s.RAX, 0)
    a.op(ops.VMFUNC)


@path("virtualization exception")
def virtualization_exception(a: Assembler, kernel: KernelOptions) -> None:
    """`virtualization_exception`: the store is noted and made, and the task goes on behind it."""
    if kernel.views == 1:
        return
    a.activity = ops.PAGE_FAULT_PATH
    a.label("virtualization_exception")
    a.work(length("virtualization_exception"))
    a.mov(s.R13, kernel.exception_page)
    a.ld(s.RAX, Mem(s.R13, NOTED))
    a.add(s.RAX, 1)
    a.st(Mem(s.R13, NOTED), s.RAX)
    a.ld(s.RAX, Mem(s.R13, w.PHYSICAL))
    a.st(Mem(s.R13, NOTED_AT), s.RAX)
    a.ld(s.RSI, kernel.word(at.F_RIP))
    a.copy(s.RDI, s.RSI)
    a.hook(hooks.DECODE)
    a.cmp(s.RAX, ops.ST)
    a.jcc(ops.CC_NZ, "kill")
    a.cmp(s.RDX, WORD)
    a.jcc(ops.CC_NZ, "kill")
    a.cmp(s.RCX, IMMEDIATE)
    a.jcc(ops.CC_Z, "ve_value")
    a.cmp(s.RCX, s.RSP, comment="which the frame leaves out")
    a.jcc(ops.CC_B, "ve_register")
    a.sub(s.RCX, 1)
    a.label("ve_register")
    a.ld(s.RBX, Mem(s.RSP, index=s.RCX, scale=8))
    a.label("ve_value")
    a.ld(s.RDI, Mem(s.R13, w.LINEAR))
    a.ld(s.R12, Mem(s.R13, w.INDEX, size=2))
    a.mov(s.RCX, w.PERMISSIVE)
    function(a)
    a.st(Mem(s.RDI), s.RBX)
    a.copy(s.RCX, s.R12)
    function(a)
    a.st_value(Mem(s.R13, w.BUSY, size=4), 0)
    a.ld(s.RAX, kernel.word(at.F_RIP))
    a.add(s.RAX, register=s.R9)
    a.st(kernel.word(at.F_RIP), s.RAX)
    a.jmp("leave")
