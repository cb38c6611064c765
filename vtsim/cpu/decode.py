"""Decodes machine code into rows: prefixes, opcode maps, ModRM, SIB, displacement and immediates as tables.

Only instructions that matter to virtualization and their near relatives are listed; any other byte sequence is #UD.

SDM: "Instruction Format"; "Addressing-Mode Encoding of ModR/M and SIB Bytes".
Not modelled: VEX, EVEX and x87 instructions other than FNINIT; the operands of instructions that are not listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from attrs import define, field

from vtsim.cpu import ops as o
from vtsim.cpu.assembler import Instruction, Mem
from vtsim.cpu.opcodes import (
    FORMS,
    LOCKABLE,
    MODRM_IS_OPCODE,
    NO_PREFIX,
    PREFIXED_REGISTER_FORMS,
    REGISTER_FORMS,
    Form,
)
from vtsim.cpu.slots import NO_REGISTER, RAX, RBP, RSP

LONGEST: Final = 15
BITS16, BITS32, BITS64 = range(3)  # sizes as instruction information writes them
BYTES: Final = (2, 4, 8)

# fmt: off
PREFIX_SEGMENTS: Final = {
    0x26: o.SEGMENT_ES, 0x2E: o.SEGMENT_CS, 0x36: o.SEGMENT_SS, 0x3E: o.SEGMENT_DS, 0x64: o.SEGMENT_FS,
    0x65: o.SEGMENT_GS,
}
# base and index of the eight 16-bit addressing forms
RBX_, RSI_, RDI_ = 3, 6, 7
FORMS16: Final = (
    (RBX_, RSI_), (RBX_, RDI_), (RBP, RSI_), (RBP, RDI_), (RSI_, NO_REGISTER), (RDI_, NO_REGISTER), (RBP, NO_REGISTER),
    (RBX_, NO_REGISTER),
)
# fmt: on


@define
class _Reader:
    """The bytes of one instruction and what its prefixes said."""

    code: bytes
    bits: int
    at: int = 0
    segment: int = o.NO_SEGMENT
    operand66: bool = False
    address67: bool = False
    lock: bool = False
    rep: int = 0
    rex: int = 0
    seen: list[int] = field(factory=list)

    def byte(self) -> int:
        if self.at >= min(len(self.code), LONGEST):
            raise EOFError
        self.at += 1
        return self.code[self.at - 1]

    def number(self, size: int) -> int:
        """A little-endian, sign-extended constant of the instruction."""
        return int.from_bytes(bytes(self.byte() for _ in range(size)), "little", signed=True)

    def prefixes(self) -> int:
        """Read the prefixes; the first opcode byte."""
        while True:
            b = self.byte()
            if b in PREFIX_SEGMENTS:
                if self.bits != 64 or b in (0x64, 0x65):
                    self.segment = PREFIX_SEGMENTS[b]
            elif b == 0x66:
                self.operand66 = True
            elif b == 0x67:
                self.address67 = True
            elif b == 0xF0:
                self.lock = True
            elif b in (0xF2, 0xF3):
                self.rep = b
            elif self.bits == 64 and 0x40 <= b <= 0x4F:
                self.rex = b
                following = self.byte()  # a REX that is not last counts for nothing
                if following in PREFIX_SEGMENTS or following in (0x66, 0x67, 0xF0, 0xF2, 0xF3) or following >> 4 == 4:
                    self.rex = 0
                    self.at -= 1
                    continue
                return following
            else:
                return b

    def opcode(self) -> str:
        text = f"{self.prefixes():02X}"
        if text == "0F":
            second = f"{self.byte():02X}"
            text += second
            if second in ("38", "3A"):
                text += f"{self.byte():02X}"
        return text

    @property
    def operand_size(self) -> int:
        if self.bits == 64 and self.rex & 8:
            return BITS64
        return BITS16 if (self.bits == 16) != self.operand66 else BITS32

    @property
    def address_size(self) -> int:
        if self.bits == 64:
            return BITS32 if self.address67 else BITS64
        return BITS16 if (self.bits == 16) != self.address67 else BITS32

    @property
    def mandatory(self) -> str:
        if self.rep:
            return f"{self.rep:02X}"
        return "66" if self.operand66 else ""


@define
class _Operands:
    """The ModRM byte and what follows it."""

    mode: int = 3
    reg: int = 0
    rm: int = 0
    base: int = NO_REGISTER
    index: int = NO_REGISTER
    scale: int = 0
    displacement: int = 0
    segment: int = o.SEGMENT_DS


def _modrm(read: _Reader) -> _Operands:
    b = read.byte()
    got = _Operands(b >> 6, b >> 3 & 7 | (read.rex << 1 & 8), b & 7)
    if got.mode == 3:
        got.rm |= read.rex << 3 & 8
        return got
    if read.address_size == BITS16:
        got.base, got.index = FORMS16[got.rm]
        if got.mode == 0 and got.rm == 6:
            got.base, got.displacement = NO_REGISTER, read.number(2)
        elif got.mode:
            got.displacement = read.number(got.mode)
    else:
        if got.rm == 4:
            sib = read.byte()
            got.scale = sib >> 6
            got.index = sib >> 3 & 7 | (read.rex << 2 & 8)
            if got.index == RSP:
                got.index = NO_REGISTER
            got.base = sib & 7 | (read.rex << 3 & 8)
            if sib & 7 == RBP and got.mode == 0:
                got.base, got.displacement = NO_REGISTER, read.number(4)
        elif got.rm == RBP and got.mode == 0:
            got.base, got.displacement = o.RIP_BASE if read.bits == 64 else NO_REGISTER, read.number(4)
        else:
            got.base = got.rm | (read.rex << 3 & 8)
        if got.mode:
            got.displacement = read.number((1, 4)[got.mode - 1])
    if got.base in (RSP, RBP):
        got.segment = o.SEGMENT_SS
    return got


def undefined(at: int, activity: int, length: int = 1) -> Instruction:
    """What no table lists."""
    return Instruction(at, o.UD, length, activity)


def decode(code: bytes, bits: int, at: int = 0, activity: int = o.APPLICATION) -> Instruction:
    """The first instruction of some bytes, as a row for address `at`; `bits` is 16, 32 or 64.

    Raises EOFError where the bytes end too early.
    """
    read = _Reader(code, bits)
    text = read.opcode()
    form, operands = _form(read, text)
    if form is None:
        return undefined(at, activity, read.at)
    size = read.operand_size
    if form.when == "d64" and bits == 64 and size == BITS32:
        size = BITS64
    return _Row(read, form, operands, size, text).row(at, activity)


def _form(read: _Reader, text: str) -> tuple[Form | None, _Operands | None]:
    """Find the table row, reading ModRM where there is one."""
    operands: _Operands | None = None
    found: Form | None = None
    for key in (read.mandatory, "NP", ""):
        found = found or FORMS.get((text, None, key))
    if found is None or any(part[0] in "EGMRSCD" for part in found.operands.split(",") if part):
        at = read.at
        try:
            b = read.byte()
        except EOFError:
            return found, None
        read.at = at
        if text in MODRM_IS_OPCODE and b >> 6 == 3:
            special = FORMS.get((f"{text}{b:02X}", None, ""))
            if special is not None:
                read.at += 1
                return _legal(read, special, None), None
        if found is None and not any(key[0] == text for key in FORMS):
            return None, None
        operands = _modrm(read)
        if found is None:
            digit = operands.reg & 7
            if operands.mode == 3 and (text, digit, read.mandatory) in PREFIXED_REGISTER_FORMS:
                found = PREFIXED_REGISTER_FORMS[text, digit, read.mandatory]
            elif operands.mode == 3 and (text, digit) in REGISTER_FORMS:
                found = REGISTER_FORMS[text, digit] if not read.rep else None
            else:
                for key in (read.mandatory, ""):
                    found = found or FORMS.get((text, digit, key))
    return (_legal(read, found, operands), operands) if found else (None, operands)


def _legal(read: _Reader, form: Form, operands: _Operands | None) -> Form | None:
    """The form, unless mode, prefixes or ModRM make it #UD."""
    if (form.when == "64" and read.bits != 64) or (form.when == "legacy" and read.bits == 64):
        return None
    memory_only = any(part.startswith("M") for part in form.operands.split(","))
    if memory_only and (operands is None or operands.mode == 3):
        return None
    if any(part.startswith("R") for part in form.operands.split(",")) and operands is not None and operands.mode != 3:
        return None
    if read.lock and not _lockable(read, form, operands):
        return None
    if form.op in NO_PREFIX and (read.operand66 or read.rep):
        return None
    return form


def _lockable(read: _Reader, form: Form, operands: _Operands | None) -> bool:
    """Is LOCK legal: a read-modify-write of memory, or MOV CR8 spelled with LOCK (not here)."""
    first = form.operands.split(",")[0]
    writes = form.extra not in (o.K_CMP, o.K_TEST) or form.op == o.EXCHANGE
    return form.op in LOCKABLE and first.startswith("E") and operands is not None and operands.mode != 3 and writes


@define
class _Row:
    """Turns a form and its ModRM byte into a row."""

    read: _Reader
    form: Form
    operands: _Operands | None
    size: int
    text: str
    r1: int = NO_REGISTER
    r2: int = NO_REGISTER
    imm: int = 0
    extra: int = 0
    bytes: int = 0
    attributes: int = 0

    def row(self, at: int, activity: int) -> Instruction:
        read, form = self.read, self.form
        self.extra = form.extra
        got = self.operands or _Operands()
        for position, operand in enumerate(part for part in form.operands.split(",") if part):
            self._operand(operand[0], operand[1], position, got)
        size = self.size
        if read.bits == 64 and (form.operands[:1] in ("C", "D") or form.operands in ("Ey,Gy", "Gy,Ey", "Gy,Mn")):
            size = BITS64
        elif form.operands[:1] in ("C", "D") or form.operands in ("Ey,Gy", "Gy,Ey", "Gy,Mn"):
            size = BITS32
        segment = read.segment or (got.segment if self.operands else o.SEGMENT_DS)
        attributes = (
            self.attributes | o.MEM_DECODED | read.address_size << o.MEM_ADDRESS_SIZE | size << o.MEM_OPERAND_SIZE
            | (o.MEM_REGISTER if got.mode == 3 and self.operands else 0)
            | (o.MEM_REP if read.rep == 0xF3 else 0) | (o.MEM_REPNE if read.rep == 0xF2 else 0)
            | (o.MEM_LOCK if read.lock else 0)
        )  # fmt: skip
        op = form.op
        if op in (o.VMREAD, o.VMWRITE):  # R1 the operand, R2 the register with the encoding
            self.r1, self.r2 = self.r2, self.r1
        if self.text == "90" and read.rep == 0xF3:
            op = o.PAUSE
        elif self.text == "90" and read.rex & 1:
            op, self.r1, self.r2 = o.EXCHANGE, RAX, 8
            attributes |= o.MEM_REGISTER
        mem = Mem(got.base, got.displacement, got.index, 1 << got.scale, self.bytes, segment, attributes)
        return Instruction(at, op, read.at, activity, self.r1, self.r2, self.imm, mem, None, self.extra)

    def _register(self, number: int, size: str) -> int:
        """Byte registers 4 to 7 are AH to BH unless there is a REX prefix."""
        if size == "b" and not self.read.rex and 4 <= number < 8:
            return o.HIGH_BYTES + number - 4
        return number

    def _operand(self, where: str, size: str, position: int, mem: _Operands) -> None:
        read = self.read
        width = self._width(size)
        if where in "EMR":
            self.bytes = width
            if mem.mode == 3:
                self.r2 = self._register(mem.rm, size)
            if position == 0:
                self.attributes |= o.MEM_TO_RM
        elif where == "G":
            self.r1 = self._register(mem.reg, size)
        elif where == "Z":
            number = int(self.text[-2:], 16) & 7 | (read.rex << 3 & 8)
            self.r2 = self._register(number, size)
            self.bytes = width
            self.attributes |= o.MEM_REGISTER | o.MEM_TO_RM
        elif where == "A":
            if self.form.operands.startswith("A"):
                self.r2 = RAX
                self.attributes |= o.MEM_REGISTER | o.MEM_TO_RM
                if ",O" in self.form.operands:
                    self.r1, self.r2 = RAX, NO_REGISTER
                    self.attributes &= ~(o.MEM_REGISTER | o.MEM_TO_RM)
            else:
                self.r1 = RAX
            self.bytes = width
        elif where == "O":
            mem.mode, mem.displacement = 0, read.number(BYTES[read.address_size])
            mem.segment = o.SEGMENT_DS
            self.operands = mem
            self.bytes = width
            if position == 0:
                self.attributes |= o.MEM_TO_RM
        elif where == "I":
            self.imm = read.number(width if size == "v" else min(width, 4))
            if size == "b" and self.form.op == o.INT:
                self.imm &= 0xFF
            self.attributes |= o.MEM_IMMEDIATE
            if self.form.op == o.PUSH_OPERAND:
                self.bytes = BYTES[self.size]
            if self.form.op in (o.IN, o.OUT):
                self.imm &= 0xFF
                self.r2 = NO_REGISTER
        elif where == "P":
            self.bytes = width
            self.r2 = 2  # DX, unless an immediate follows
        elif where in "XY":
            self.bytes = width
        elif where == "C" or where == "D":
            self.imm = mem.reg
            self.r1 = mem.rm if mem.mode == 3 else (mem.rm | (read.rex << 3 & 8))
        elif where == "S":
            self.extra = mem.reg & 7
        elif where == "F":
            self.imm = read.number(BYTES[self.size]) & ((1 << 8 * BYTES[self.size]) - 1)
            self.extra = read.number(2) & 0xFFFF

    def _width(self, size: str) -> int:
        fixed = {"b": 1, "w": 2, "d": 4, "q": 8, "s": 0, "n": 0, "p": 0, "0": 0}
        if size in fixed:
            return fixed[size]
        if size == "y":
            return 8 if self.read.bits == 64 else 4
        if size == "t":
            return min(BYTES[self.size], 4)
        return BYTES[self.size]


def sequence(code: bytes, bits: int, at: int, limit: int = 16) -> Iterator[Instruction]:
    """Instructions one after the other, up to `limit` or the end of the bytes or of the page."""
    offset = 0
    for _ in range(limit):
        try:
            row = decode(code[offset : offset + LONGEST], bits, at + offset)
        except EOFError:
            return
        yield row
        offset += row.length
        if row.op == o.UD or (at + offset) & 0xFFF == 0 or ((at + offset) ^ at) >> 12:
            return
