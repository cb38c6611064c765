"""Writes programs: labels, named registers, operands; lists them readably.

A program is position-dependent: it is assembled for the linear address at which it will stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Final

from attrs import define, evolve, field, frozen

from vtsim.base.errors import ModelError
from vtsim.cpu import ops
from vtsim.cpu.rows import Rows, packed
from vtsim.cpu.slots import NO_REGISTER, REGISTERS
from vtsim.vmcs.spec import BY_NAME as FIELDS
from vtsim.vmcs.spec import SLOT

PAGE: Final = 4096
WORK_BYTES_PER_INSTRUCTION: Final = 4  # mean x86-64 instruction length in compiled code, rounded
WORK_EXTENT: Final = 256  # longer WORK is a loop over so many bytes of code


@frozen
class Mem:
    """A memory operand: base + index * scale + displacement, 1, 2, 4 or 8 bytes wide."""

    base: int = NO_REGISTER
    displacement: int = 0
    index: int = NO_REGISTER
    scale: int = 1
    size: int = 8
    segment: int = 0
    attributes: int = 0  # what only decoded rows have, in place

    @property
    def packed(self) -> int:
        shift = {1: 0, 2: 1, 4: 2, 8: 3}[self.scale]
        return (
            self.base
            | self.index << ops.MEM_INDEX
            | shift << ops.MEM_SCALE
            | self.size << ops.MEM_SIZE
            | self.segment << ops.MEM_SEGMENT
            | self.attributes
        )

    def __str__(self) -> str:
        parts = [("", "fs:", "gs:", "es:", "cs:", "ss:", "ds:")[self.segment]] if self.segment else []
        terms = [(*REGISTERS, "", "RIP")[self.base]] if self.base != NO_REGISTER else []
        if self.index != NO_REGISTER:
            terms.append(f"{REGISTERS[self.index]}*{self.scale}")
        if self.displacement or not terms:
            terms.append(hex(self.displacement))
        return "".join(parts) + "[" + "+".join(terms) + "]"


NO_MEMORY: Final = Mem()


@frozen
class Instruction:
    """One row before it is packed: a place, an op, operands and what its cycles are charged to."""

    at: int
    op: int
    length: int
    activity: int
    r1: int = NO_REGISTER
    r2: int = NO_REGISTER
    imm: int = 0
    mem: Mem = NO_MEMORY
    target: int | str | None = None
    extra: int = 0
    comment: str = ""
    goal: str = ""  # the label that `target` was

    @property
    def end(self) -> int:
        return self.at + self.length


@frozen
class Program:
    """An assembled program: instructions in address order and the addresses of its labels."""

    name: str
    base: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @property
    def end(self) -> int:
        return self.instructions[-1].end if self.instructions else self.base

    @cached_property
    def packed(self) -> Rows:
        """Its rows as the engine has them."""
        return packed(self.instructions)

    def pages(self) -> Iterator[tuple[int, list[Instruction]]]:
        """Each page address with the instructions that start in it, in order."""
        page: list[Instruction] = []
        for instruction in self.instructions:
            if page and page[0].at // PAGE != instruction.at // PAGE:
                yield page[0].at // PAGE * PAGE, page
                page = []
            page.append(instruction)
        if page:
            yield page[0].at // PAGE * PAGE, page

    def listing(self) -> str:
        """The program as text: address, op, operands, activity, with labels on lines of their own."""
        names: dict[int, list[str]] = {}
        for label, at in self.labels.items():
            names.setdefault(at, []).append(label)
        lines = []
        for instruction in self.instructions:
            lines += [f"{label}:" for label in names.get(instruction.at, ())]
            lines.append(f"  {instruction.at & (1 << 64) - 1:#018x}  {render(instruction)}")
        return "\n".join(lines)


def render(i: Instruction) -> str:
    """One instruction in assembler notation."""
    operands: list[str] = []
    if i.op in (ops.VMREAD, ops.VMWRITE) and i.r2 == NO_REGISTER:
        name = FIELDS_BY_ENCODING[i.imm]
        operands = [REGISTERS[i.r1], name] if i.op == ops.VMREAD else [name, REGISTERS[i.r1]]
    else:
        if i.r1 != NO_REGISTER:
            operands.append(REGISTERS[i.r1])
        if i.r2 != NO_REGISTER:
            operands.append(REGISTERS[i.r2])
        if i.mem is not NO_MEMORY:
            operands.append(str(i.mem))
        constant = i.op <= ops.TEST and i.r2 == NO_REGISTER and i.target is None
        if i.op != ops.JCC and (i.imm or constant):
            operands.append(hex(i.imm) if i.imm > 9 else str(i.imm))
        if i.target is not None:
            operands.append(i.goal or (hex(i.target & (1 << 64) - 1) if isinstance(i.target, int) else i.target))
    name = f"J{ops.CONDITIONS[i.imm]}" if i.op == ops.JCC else ops.OPS[i.op].name
    text = f"{name} {', '.join(operands)}".rstrip()
    return f"{text:<44}; {i.comment}" if i.comment else text


FIELDS_BY_ENCODING: Final = {f.encoding: f.name for f in FIELDS.values()}


@define
class Assembler:
    """Collects instructions from `base` on; `assemble` resolves labels.

    `activity` is what following instructions are charged to until it is changed. `bits`: 32 for a program of 32-bit
    protected mode.
    """

    name: str
    base: int
    activity: int = ops.APPLICATION
    externals: dict[str, int] = field(factory=dict)
    bits: int = 64
    _at: int = field(init=False)
    _instructions: list[Instruction] = field(factory=list, init=False)
    _labels: dict[str, int] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._at = self.base

    @property
    def here(self) -> int:
        return self._at

    def label(self, name: str) -> str:
        """Name the next instruction's address."""
        if name in self._labels:
            raise ModelError(f"program {self.name}: label {name!r} is defined twice", {})
        self._labels[name] = self._at
        return name

    def align(self, size: int) -> None:
        """Leave a hole up to the next multiple of `size`."""
        self._at = -(-self._at // size) * size

    def emit(
        self,
        op: int,
        r1: int = NO_REGISTER,
        r2: int = NO_REGISTER,
        imm: int = 0,
        mem: Mem = NO_MEMORY,
        target: int | str | None = None,
        extra: int = 0,
        length: int | None = None,
        comment: str = "",
    ) -> None:
        size = ops.OPS[op].length if length is None else length
        if not 0 < size <= PAGE:
            raise ModelError(f"program {self.name}: an op is 1 to {PAGE} bytes long", {"bytes": size})
        if PAGE - self._at % PAGE < size:  # an op never crosses a page: a jump over the gap, as a linker pads
            gap = PAGE - self._at % PAGE
            self._put(ops.NOP, NO_REGISTER, NO_REGISTER, 0, NO_MEMORY, None, 0, gap, "padding")
        self._put(op, r1, r2, imm, mem, target, extra, size, comment)

    def _put(
        self,
        op: int,
        r1: int,
        r2: int,
        imm: int,
        mem: Mem,
        target: int | str | None,
        extra: int,
        length: int,
        comment: str,
    ) -> None:
        self._instructions.append(
            Instruction(self._at, op, length, self.activity, r1, r2, imm, mem, target, extra, comment)
        )
        self._at += length

    # --- ordinary work ---------------------------------------------------------------------------------------------
    def work(self, instructions: int, code_bytes: int | None = None, comment: str = "") -> None:
        """`instructions` ordinary instructions whose code is `code_bytes` long (default: 4 each, a loop beyond 256)."""
        if instructions <= 0:
            return
        size = code_bytes or min(instructions * WORK_BYTES_PER_INSTRUCTION, WORK_EXTENT)
        self.emit(ops.WORK, imm=instructions, length=size, comment=comment)

    def mov(self, to: int, value: int | str, comment: str = "") -> None:
        """`to` <- a constant, or the address of a label."""
        if isinstance(value, str):
            self.emit(ops.MOV, to, target=value, comment=comment)
        else:
            self.emit(ops.MOV, to, imm=value, comment=comment)

    def copy(self, to: int, source: int, comment: str = "") -> None:
        self.emit(ops.MOV, to, source, comment=comment)

    def alu(self, op: int, to: int, value: int = 0, *, register: int = NO_REGISTER, comment: str = "") -> None:
        self.emit(op, to, register, imm=value, comment=comment)

    def add(self, to: int, value: int = 0, *, register: int = NO_REGISTER, comment: str = "") -> None:
        self.alu(ops.ADD, to, value, register=register, comment=comment)

    def sub(self, to: int, value: int = 0, *, register: int = NO_REGISTER, comment: str = "") -> None:
        self.alu(ops.SUB, to, value, register=register, comment=comment)

    def and_(self, to: int, value: int = 0, *, register: int = NO_REGISTER, comment: str = "") -> None:
        self.alu(ops.AND, to, value, register=register, comment=comment)

    def or_(self, to: int, value: int = 0, *, register: int = NO_REGISTER, comment: str = "") -> None:
        self.alu(ops.OR, to, value, register=register, comment=comment)

    def shl(self, to: int, bits: int) -> None:
        self.alu(ops.SHL, to, bits)

    def shr(self, to: int, bits: int) -> None:
        self.alu(ops.SHR, to, bits)

    def cmp(self, left: int, value: int = 0, *, register: int = NO_REGISTER, comment: str = "") -> None:
        self.alu(ops.CMP, left, value, register=register, comment=comment)

    def test(self, left: int, value: int = 0, *, register: int = NO_REGISTER, comment: str = "") -> None:
        self.alu(ops.TEST, left, value, register=register, comment=comment)

    def lea(self, to: int, mem: Mem) -> None:
        self.emit(ops.LEA, to, mem=mem)

    # --- memory -----------------------------------------------------------------------------------------------------
    def ld(self, to: int, mem: Mem, comment: str = "") -> None:
        self.emit(ops.LD, to, mem=mem, comment=comment)

    def st(self, mem: Mem, source: int, comment: str = "") -> None:
        self.emit(ops.ST, source, mem=mem, comment=comment)

    def st_value(self, mem: Mem, value: int, comment: str = "") -> None:
        self.emit(ops.ST, imm=value, mem=mem, comment=comment)

    def ldm(self, mem: Mem, registers: Sequence[int], comment: str = "") -> None:
        self.emit(ops.LDM, imm=mask(registers), mem=mem, length=4 * len(registers), comment=comment)

    def stm(self, mem: Mem, registers: Sequence[int], comment: str = "") -> None:
        self.emit(ops.STM, imm=mask(registers), mem=mem, length=4 * len(registers), comment=comment)

    def xadd(self, mem: Mem, register: int) -> None:
        self.emit(ops.XADD, register, mem=mem)

    def xchg(self, mem: Mem, register: int) -> None:
        """Exchange `register` with memory, at once."""
        self._exchange(mem, register, ops.X_CHANGE)

    def cmpxchg(self, mem: Mem, register: int) -> None:
        """CC_Z, and memory <- `register`, where RAX is what stands there; else RAX <- that. At once."""
        self._exchange(mem, register, ops.X_COMPARE)

    def _exchange(self, mem: Mem, register: int, kind: int) -> None:
        mem = evolve(mem, attributes=mem.attributes | ops.MEM_DECODED | 2 << ops.MEM_ADDRESS_SIZE)
        self.emit(ops.EXCHANGE, register, mem=mem, extra=kind, length=5)

    def push(self, register: int = NO_REGISTER, value: int = 0) -> None:
        self.emit(ops.PUSH, register, imm=value)

    def pop(self, register: int) -> None:
        self.emit(ops.POP, register)

    # --- control ----------------------------------------------------------------------------------------------------
    def jmp(self, target: int | str) -> None:
        self.emit(ops.JMP, target=target)

    def jcc(self, condition: int, target: int | str, comment: str = "") -> None:
        self.emit(ops.JCC, imm=condition, target=target, comment=comment)

    def loop(self, target: int | str) -> None:
        self.emit(ops.LOOP, target=target)

    def call(self, target: int | str, comment: str = "") -> None:
        self.emit(ops.CALL, target=target, comment=comment)

    def ret(self) -> None:
        self.emit(ops.RET)

    def jmp_mem(self, mem: Mem, comment: str = "") -> None:
        self.emit(ops.JMP_MEM, mem=mem, comment=comment)

    # --- VMX ---------------------------------------------------------------------------------------------------------
    def vmread(self, to: int, field_name: str, comment: str = "") -> None:
        self.emit(ops.VMREAD, to, imm=FIELDS[field_name].encoding, extra=SLOT[field_name], comment=comment)

    def vmwrite(self, field_name: str, source: int, comment: str = "") -> None:
        self.emit(ops.VMWRITE, source, imm=FIELDS[field_name].encoding, extra=SLOT[field_name], comment=comment)

    def hook(self, number: int, comment: str = "") -> None:
        self.emit(ops.HOOK, imm=number, comment=comment)

    def op(self, op: int, r1: int = NO_REGISTER, r2: int = NO_REGISTER, imm: int = 0, mem: Mem = NO_MEMORY) -> None:
        """Any other op of the table, operands as its meaning says."""
        self.emit(op, r1, r2, imm, mem)

    def assemble(self) -> Program:
        """Resolve labels. A label that nobody defines is our mistake."""
        labels = {**self.externals, **self._labels}

        def resolved(i: Instruction) -> Instruction:
            if not isinstance(i.target, str):
                return i
            if i.target not in labels:
                raise ModelError(f"program {self.name}: label {i.target!r} is not defined", {})
            return evolve(i, target=labels[i.target], goal=i.target)

        return Program(self.name, self.base, tuple(map(resolved, self._instructions)), dict(self._labels))


def mask(registers: Sequence[int]) -> int:
    """The bit mask of LDM and STM; memory holds the registers in ascending number."""
    return sum(1 << r for r in set(registers))


Emitter = Callable[[Assembler], None]
