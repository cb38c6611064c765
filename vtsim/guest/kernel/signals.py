"""Signals: a handler is installed, a task sends itself one or faults, the handler runs and returns through the kernel.

The frame that the kernel puts on the user's stack is its own frame, as Linux copies registers into a sigcontext.

Not modelled: masks and queues of signals; signals to other tasks; floating-point state in the frame.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.lengths import length
from vtsim.guest.kernel.ring3 import disable

ACTION: Final = (s.RAX, s.RCX, s.RDX, s.R8)  # the words of a struct sigaction: handler, flags, restorer, mask
RED_ZONE: Final = 128
INFORMATION_WORDS: Final = 16  # of struct siginfo
RETURN_BYTES: Final = 8


def copy_frame(a: Assembler, kernel: KernelOptions, source: int, target: int) -> None:
    """The kernel's frame of a task from one place to another; RSI, RDI, R14 and R15 alone stay."""
    for part in kernel.frame_parts:
        a.ldm(Mem(source, part), at.CARRIERS)
        a.stm(Mem(target, part), at.CARRIERS)


@path("signal calls")
def calls(a: Assembler, kernel: KernelOptions) -> None:
    """System calls: the action at RDI becomes that of a signal; send oneself signal RDI; the end of a handler."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_sigaction")
    a.work(length("sigaction"))
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.ldm(Mem(s.RDI), ACTION)
    a.ldm(Mem(s.RBX, at.T_ACTION), at.CALLEE[2:])
    a.stm(Mem(s.RDI), at.CALLEE[2:])
    a.stm(Mem(s.RBX, at.T_ACTION), ACTION)
    a.mov(s.RAX, 0)
    a.ret()

    a.label("call_kill")
    a.work(length("kill_allowed"))
    a.test(s.RDI, -1)
    a.jcc(ops.CC_Z, "sent_none")
    a.work(length("send_signal"))
    disable(a, kernel)
    a.ld(s.RAX, at.cpu_word(at.NEED_RESCHED))
    a.or_(s.RAX, at.SIGNAL_PENDING)
    a.st(at.cpu_word(at.NEED_RESCHED), s.RAX)
    a.label("sent_none")
    a.mov(s.RAX, 0)
    a.ret()

    a.label("call_sigreturn")
    a.work(length("sigreturn"))
    disable(a, kernel)
    a.ld(s.RSI, kernel.word(at.F_RSP, more=RETURN_BYTES))
    a.lea(s.RDI, Mem(s.RSP, RETURN_BYTES))
    copy_frame(a, kernel, s.RSI, s.RDI)
    a.add(s.RSP, RETURN_BYTES)
    a.jmp("leave")


@path("signal delivery")
def deliver(a: Assembler, kernel: KernelOptions) -> None:
    """`signal_to_caller`, `signal_for_fault`: the way out, whose frame is at RSP, leads to the handler."""
    a.activity = ops.SYSCALL_PATH
    a.label("signal_to_caller")
    a.and_(s.RAX, ~at.SIGNAL_PENDING)
    a.st(at.cpu_word(at.NEED_RESCHED), s.RAX)
    _to_handler(a, kernel)
    a.jmp("syscall_exit")
    a.activity = ops.PAGE_FAULT_PATH
    a.label("signal_for_fault")
    a.work(length("send_signal"))
    _to_handler(a, kernel)
    a.jmp("leave")


def _to_handler(a: Assembler, kernel: KernelOptions) -> None:
    """The interrupted registers onto the user's stack; the handler's address and stack into the kernel's frame."""
    a.work(length("signal_frame"))
    a.ld(s.RSI, kernel.word(at.F_RSP))
    a.sub(s.RSI, RED_ZONE + kernel.frame_bytes + 8 * INFORMATION_WORDS)
    copy_frame(a, kernel, s.RSP, s.RSI)
    a.mov(s.RAX, 0)
    for word in range(INFORMATION_WORDS):
        a.st(Mem(s.RSI, kernel.frame_bytes + 8 * word), s.RAX)
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.ld(s.RAX, Mem(s.RBX, at.T_ACTION))
    a.st(kernel.word(at.F_RIP), s.RAX)
    a.st(Mem(s.RSP, at.AT[s.RCX]), s.RAX, "where SYSRET goes")
    a.st(kernel.word(at.F_RSP), s.RSI)
