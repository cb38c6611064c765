"""The instructions that show or change the system's state in any ring, as a kernel executes them.

Robin and Irvine (2000), "Analysis of the Intel Pentium's Ability to Support a Secure Virtual Machine Monitor": each is
given operands for which its answer in ring 3 is another than in ring 0, where there are such operands in 64-bit mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels.modes import CS, ES, FS, SS
from vtsim.guest.kernel import layout as at

CR0_TS: Final = 1 << 3
NO_INTERRUPTS: Final = 2  # RFLAGS
Emit = Callable[[Assembler, str], None]


def _table(op: int) -> Emit:
    """SGDT or SIDT."""

    def emit(a: Assembler, name: str) -> None:
        a.sub(s.RSP, 16)
        a.op(op, mem=Mem(s.RSP))
        a.add(s.RSP, 16)

    return emit


def _local_table(a: Assembler, name: str) -> None:
    a.mov(s.RAX, at.LOCAL_TABLE)
    a.op(ops.LLDT, s.RAX)
    a.op(ops.SLDT, s.RDX)


def _machine_status(a: Assembler, name: str) -> None:
    a.op(ops.MOV_FROM_CR, s.RAX, imm=0)
    a.or_(s.RAX, CR0_TS)
    a.op(ops.MOV_TO_CR, s.RAX, imm=0)
    a.op(ops.SMSW, s.RDX)
    a.op(ops.CLTS)


def _push_flags(a: Assembler, name: str) -> None:
    a.op(ops.PUSHF)
    a.pop(s.RAX)


def _pop_flags(a: Assembler, name: str) -> None:
    a.push(value=NO_INTERRUPTS)
    a.op(ops.POPF)


def _look(op: int, *selectors: int) -> Emit:
    """LAR, LSL, VERR or VERW of some selectors."""

    def emit(a: Assembler, name: str) -> None:
        for selector in selectors:
            a.mov(s.RCX, selector)
            if op in (ops.LAR, ops.LSL):
                a.op(op, s.RAX, s.RCX)
            else:
                a.op(op, s.RCX)

    return emit


def _move_from(a: Assembler, name: str) -> None:
    for segment in (CS, SS):
        a.op(ops.MOV_FROM_SEGMENT, s.RAX, imm=segment)


def _refused(a: Assembler, name: str, emit: Callable[[], None]) -> None:
    """What raises an exception in ring 0, after which the kernel goes on: as it does where there was none."""
    a.copy(s.RBX, s.RSP)
    a.ld(s.RCX, at.cpu_word(at.CURRENT))
    a.mov(s.RDX, f"{name}_refused")
    a.st(Mem(s.RCX, at.T_FIXUP), s.RDX)
    emit()
    a.label(f"{name}_refused")
    a.copy(s.RSP, s.RBX)
    a.ld(s.RCX, at.cpu_word(at.CURRENT))
    a.st_value(Mem(s.RCX, at.T_FIXUP), 0)


def _move_to(a: Assembler, name: str) -> None:
    for selector in (at.KERNEL_STACK, 0):
        a.mov(s.RAX, selector)
        a.op(ops.MOV_TO_SEGMENT, s.RAX, imm=ES)
    a.mov(s.RAX, at.USER_DATA)
    _refused(a, name, lambda: a.op(ops.MOV_TO_SEGMENT, s.RAX, imm=SS))


def _push(a: Assembler, name: str) -> None:
    a.op(ops.PUSH_SEGMENT, imm=FS)
    a.pop(s.RAX)


def _pop(a: Assembler, name: str) -> None:
    for selector in (at.KERNEL_STACK, 0):
        a.push(value=selector)
        a.op(ops.POP_SEGMENT, imm=FS)


def _transfer(op: int, words: int) -> Emit:
    """A far jump, or a far call that never returns, to the kernel's own segment, and to that of processes.

    So many words are left on the stack.
    """

    def emit(a: Assembler, name: str) -> None:
        a.sub(s.RSP, 16)
        a.mov(s.RAX, f"{name}_there")
        a.st(Mem(s.RSP), s.RAX)
        a.st_value(Mem(s.RSP, 8), at.KERNEL_CODE)
        a.op(op, mem=Mem(s.RSP))
        a.label(f"{name}_there")
        a.add(s.RSP, 8 * words)
        a.mov(s.RAX, f"{name}_refused")
        a.st(Mem(s.RSP), s.RAX)
        a.st_value(Mem(s.RSP, 8), at.USER_CODE)
        _refused(a, name, lambda: a.op(op, mem=Mem(s.RSP)))
        a.add(s.RSP, 16)

    return emit


def _far_return(a: Assembler, name: str) -> None:
    a.push(value=at.KERNEL_CODE)
    a.mov(s.RAX, f"{name}_there")
    a.push(s.RAX)
    a.op(ops.RET_FAR)
    a.label(f"{name}_there")


# fmt: off
INSTRUCTIONS: Final[Mapping[str, Emit]] = {
    "sgdt": _table(ops.SGDT), "sidt": _table(ops.SIDT), "sldt": _local_table, "smsw": _machine_status,
    "pushf": _push_flags, "popf": _pop_flags,
    "lar": _look(ops.LAR, at.KERNEL_CODE, at.TASK_STATE, at.IN_LOCAL_TABLE),
    "lsl": _look(ops.LSL, at.KERNEL_CODE, at.TASK_STATE, at.IN_LOCAL_TABLE),
    "verr": _look(ops.VERR, at.KERNEL_CODE), "verw": _look(ops.VERW, at.KERNEL_STACK),
    "pop": _pop, "push": _push, "call": _transfer(ops.CALL_FAR, 2), "jmp": _transfer(ops.JMP_FAR, 0),
    "int": lambda a, name: a.op(ops.INT, imm=at.NOTHING_VECTOR), "ret": _far_return,
    "str": lambda a, name: a.op(ops.STR, s.RAX), "mov_from": _move_from, "mov_to": _move_to,
}
# fmt: on


def execute(a: Assembler, names: Iterable[str], prefix: str) -> None:
    """Each instruction once, behind a label of its own. RAX, RBX, RCX and RDX change; interrupts are off afterwards."""
    for name in names:
        label = a.label(f"{prefix}_{name}")
        INSTRUCTIONS[name](a, label)
