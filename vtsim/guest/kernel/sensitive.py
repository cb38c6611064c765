"""The instructions that show or change the system's state in any ring, as a kernel executes them.

Robin and Irvine (2000), "Analysis of the Intel Pentium's Ability to Support a Secure Virtual Machine Monitor": each is
given operands for which its answer in ring 3 is another than in ring 0, where there are such operands in 64-bit mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from attrs import frozen

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels.modes import CS, ES, FS, SS
from vtsim.guest.kernel import layout as at

CR0_TS: Final = 1 << 3
NO_INTERRUPTS: Final = 2  # RFLAGS


@frozen
class Place:
    """Where a list stands: in the kernel or in a process; a prefix of its own for the label of each instruction."""

    a: Assembler
    name: str
    user: bool

    @property
    def code(self) -> int:
        """The selector of the code that executes it."""
        return at.USER_CODE if self.user else at.KERNEL_CODE

    @property
    def data(self) -> int:
        """The selector of data of the same ring."""
        return at.USER_DATA if self.user else at.KERNEL_STACK


Emit = Callable[[Place], None]


def _table(op: int) -> Emit:
    """SGDT or SIDT."""

    def emit(here: Place) -> None:
        here.a.sub(s.RSP, 16)
        here.a.op(op, mem=Mem(s.RSP))
        here.a.add(s.RSP, 16)

    return emit


def _local_table(here: Place) -> None:
    """SLDT; the kernel has loaded a table before."""
    if not here.user:
        here.a.mov(s.RAX, at.LOCAL_TABLE)
        here.a.op(ops.LLDT, s.RAX)
    here.a.op(ops.SLDT, s.RDX)


def _machine_status(here: Place) -> None:
    """SMSW; the kernel has set CR0.TS before, and clears it."""
    if not here.user:
        here.a.op(ops.MOV_FROM_CR, s.RAX, imm=0)
        here.a.or_(s.RAX, CR0_TS)
        here.a.op(ops.MOV_TO_CR, s.RAX, imm=0)
    here.a.op(ops.SMSW, s.RDX)
    if not here.user:
        here.a.op(ops.CLTS)


def _push_flags(here: Place) -> None:
    here.a.op(ops.PUSHF)
    here.a.pop(s.RAX)


def _pop_flags(here: Place) -> None:
    here.a.push(value=NO_INTERRUPTS)
    here.a.op(ops.POPF)


def _look(op: int, *selectors: int) -> Emit:
    """LAR, LSL, VERR or VERW of some selectors."""

    def emit(here: Place) -> None:
        for selector in (*selectors, at.USER_DATA):
            here.a.mov(s.RCX, selector)
            if op in (ops.LAR, ops.LSL):
                here.a.op(op, s.RAX, s.RCX)
            else:
                here.a.op(op, s.RCX)

    return emit


def _move_from(here: Place) -> None:
    for segment in (CS, SS):
        here.a.op(ops.MOV_FROM_SEGMENT, s.RAX, imm=segment)


def _refused(here: Place, emit: Callable[[], None]) -> None:
    """What raises an exception in ring 0, after which the kernel goes on: as it does where there was none."""
    a = here.a
    a.copy(s.RBX, s.RSP)
    a.ld(s.RCX, at.cpu_word(at.CURRENT))
    a.mov(s.RDX, f"{here.name}_refused")
    a.st(Mem(s.RCX, at.T_FIXUP), s.RDX)
    emit()
    a.label(f"{here.name}_refused")
    a.copy(s.RSP, s.RBX)
    a.ld(s.RCX, at.cpu_word(at.CURRENT))
    a.st_value(Mem(s.RCX, at.T_FIXUP), 0)


def _move_to(here: Place) -> None:
    a = here.a
    for selector in (here.data, 0):
        a.mov(s.RAX, selector)
        a.op(ops.MOV_TO_SEGMENT, s.RAX, imm=ES)
    if not here.user:
        a.mov(s.RAX, at.USER_DATA)
        _refused(here, lambda: a.op(ops.MOV_TO_SEGMENT, s.RAX, imm=SS))


def _push(here: Place) -> None:
    here.a.op(ops.PUSH_SEGMENT, imm=FS)
    here.a.pop(s.RAX)


def _pop(here: Place) -> None:
    for selector in (here.data, 0):
        here.a.push(value=selector)
        here.a.op(ops.POP_SEGMENT, imm=FS)


def _transfer(op: int, words: int) -> Emit:
    """A far jump, or a far call that never returns, to the segment that executes it; in ring 0 also to that of ring 3.

    So many words are left on the stack.
    """

    def emit(here: Place) -> None:
        a = here.a
        a.sub(s.RSP, 16)
        a.mov(s.RAX, f"{here.name}_there")
        a.st(Mem(s.RSP), s.RAX)
        a.st_value(Mem(s.RSP, 8), here.code)
        a.op(op, mem=Mem(s.RSP))
        a.label(f"{here.name}_there")
        a.add(s.RSP, 8 * words)
        if not here.user:
            a.mov(s.RAX, f"{here.name}_refused")
            a.st(Mem(s.RSP), s.RAX)
            a.st_value(Mem(s.RSP, 8), at.USER_CODE)
            _refused(here, lambda: a.op(op, mem=Mem(s.RSP)))
        a.add(s.RSP, 16)

    return emit


def _far_return(here: Place) -> None:
    here.a.push(value=here.code)
    here.a.mov(s.RAX, f"{here.name}_there")
    here.a.push(s.RAX)
    here.a.op(ops.RET_FAR)
    here.a.label(f"{here.name}_there")


def _interrupt(here: Place) -> None:
    """INT n, which the gates here do not let through from ring 3."""
    if not here.user:
        here.a.op(ops.INT, imm=at.NOTHING_VECTOR)


# fmt: off
INSTRUCTIONS: Final[Mapping[str, Emit]] = {
    "sgdt": _table(ops.SGDT), "sidt": _table(ops.SIDT), "sldt": _local_table, "smsw": _machine_status,
    "pushf": _push_flags, "popf": _pop_flags,
    "lar": _look(ops.LAR, at.KERNEL_CODE, at.TASK_STATE, at.IN_LOCAL_TABLE),
    "lsl": _look(ops.LSL, at.KERNEL_CODE, at.TASK_STATE, at.IN_LOCAL_TABLE),
    "verr": _look(ops.VERR, at.KERNEL_CODE), "verw": _look(ops.VERW, at.KERNEL_STACK),
    "pop": _pop, "push": _push, "call": _transfer(ops.CALL_FAR, 2), "jmp": _transfer(ops.JMP_FAR, 0),
    "int": _interrupt, "ret": _far_return, "str": lambda here: here.a.op(ops.STR, s.RAX), "mov_from": _move_from,
    "mov_to": _move_to,
}
# fmt: on


def execute(a: Assembler, names: Iterable[str], prefix: str, *, user: bool = False) -> None:
    """Each instruction once, behind a label of its own. RAX to RBX change; in ring 0 interrupts are off afterwards."""
    for name in names:
        INSTRUCTIONS[name](Place(a, a.label(f"{prefix}_{name}"), user))
