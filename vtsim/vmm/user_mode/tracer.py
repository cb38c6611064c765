"""The tracing thread: a process of the host that waits for stops of its guest's processes, and lets them go on."""

from __future__ import annotations

from functools import cache

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Program
from vtsim.cpu.slots import R12, RAX
from vtsim.ept.direct import HOST_VECTOR
from vtsim.vmm.user_mode import layout as at
from vtsim.vmm.user_mode.lengths import LENGTHS


@cache
def tracing_thread() -> Program:
    """Its program, whose label `stopped` is where it finds in RAX why a process stopped.

    A system call is annulled, by its number, and a signal is sent in its place, whose handler is the guest's kernel.
    Its end lets the process return. A signal is passed on.
    """
    a = Assembler("tracing thread", at.TRACER_TEXT)
    a.activity = ops.SCHEDULING
    a.label("stopped")
    a.copy(R12, RAX)
    a.work(LENGTHS["tracer"], comment="tracer")
    a.cmp(R12, at.CALL)
    a.jcc(ops.CC_NZ, "go_on")
    _ask(a, at.GET_REGISTERS)
    _ask(a, at.POKE)
    a.label("go_on")
    _ask(a, at.CONTINUE)
    _ask(a, at.WAIT)
    a.jmp("stopped")
    return a.assemble()


def _ask(a: Assembler, number: int) -> None:
    a.work(LENGTHS["tracer_call"], comment="tracer_call")
    a.mov(RAX, number)
    a.op(ops.INT, imm=HOST_VECTOR)
