"""VM-exit instruction information: which bits say what, for each family of instructions.

SDM: "Information for VM Exits Due to Instruction Execution".
"""

from __future__ import annotations

from typing import Final

import attrs

from vtsim.vmcs import reasons


@attrs.frozen
class Part:
    """Some bits of the field."""

    name: str
    low: int
    width: int


# fmt: off
SCALE          = Part("SCALE",          0,  2)  # log2
REGISTER1      = Part("REGISTER1",      3,  4)
ADDRESS_SIZE   = Part("ADDRESS_SIZE",   7,  3)  # 0 16-bit, 1 32-bit, 2 64-bit
IN_REGISTER    = Part("IN_REGISTER",    10, 1)  # the operand is REGISTER1, not memory
OPERAND_SIZE1  = Part("OPERAND_SIZE",   11, 1)  # 0 16-bit, 1 32-bit; undefined in 64-bit mode
OPERAND_SIZE2  = Part("OPERAND_SIZE",   11, 2)  # 0 16-bit, 1 32-bit, 2 64-bit
SEGMENT        = Part("SEGMENT",        15, 3)  # ES CS SS DS FS GS
INDEX          = Part("INDEX",          18, 4)
NO_INDEX       = Part("NO_INDEX",       22, 1)
BASE           = Part("BASE",           23, 4)
NO_BASE        = Part("NO_BASE",        27, 1)
REGISTER2      = Part("REGISTER2",      28, 4)
IDENTITY       = Part("IDENTITY",       28, 2)

_MEMORY: Final = (SCALE, ADDRESS_SIZE, SEGMENT, INDEX, NO_INDEX, BASE, NO_BASE)

STRING_IO:        Final = (ADDRESS_SIZE, SEGMENT)
INVALIDATE:       Final = (*_MEMORY, REGISTER2)
DESCRIPTOR_TABLE: Final = (*_MEMORY, OPERAND_SIZE1, IDENTITY)
SYSTEM_SEGMENT:   Final = (*_MEMORY, REGISTER1, IN_REGISTER, IDENTITY)
RANDOM_OR_WAIT:   Final = (REGISTER1, OPERAND_SIZE2)
MEMORY_ONLY:      Final = _MEMORY
VMCS_FIELD:       Final = (*_MEMORY, REGISTER1, IN_REGISTER, REGISTER2)
TWO_REGISTERS:    Final = (REGISTER1, REGISTER2)
ONE_REGISTER:     Final = (REGISTER1,)

LAYOUTS: Final[dict[int, tuple[Part, ...]]] = {
    reasons.IO_INSTRUCTION: STRING_IO,
    reasons.INVEPT:         INVALIDATE,
    reasons.INVPCID:        INVALIDATE,
    reasons.INVVPID:        INVALIDATE,
    reasons.GDTR_IDTR:      DESCRIPTOR_TABLE,
    reasons.LDTR_TR:        SYSTEM_SEGMENT,
    reasons.RDRAND:         RANDOM_OR_WAIT,
    reasons.RDSEED:         RANDOM_OR_WAIT,
    reasons.TPAUSE:         RANDOM_OR_WAIT,
    reasons.UMWAIT:         RANDOM_OR_WAIT,
    reasons.VMCLEAR:        MEMORY_ONLY,
    reasons.VMPTRLD:        MEMORY_ONLY,
    reasons.VMPTRST:        MEMORY_ONLY,
    reasons.VMON:           MEMORY_ONLY,
    reasons.XSAVES:         MEMORY_ONLY,
    reasons.XRSTORS:        MEMORY_ONLY,
    reasons.VMREAD:         VMCS_FIELD,
    reasons.VMWRITE:        VMCS_FIELD,
    reasons.LOADIWKEY:      TWO_REGISTERS,
    reasons.MSR_READ_IMM:   ONE_REGISTER,
    reasons.MSR_WRITE_IMM:  ONE_REGISTER,
}
# fmt: on

IDENTITIES: Final[dict[int, tuple[str, ...]]] = {
    reasons.GDTR_IDTR: ("SGDT", "SIDT", "LGDT", "LIDT"),
    reasons.LDTR_TR: ("SLDT", "STR", "LLDT", "LTR"),
}
"""Which instruction of a shared exit reason it was, by IDENTITY."""


def decode(reason: int, information: int) -> dict[str, int]:
    """Take an instruction-information value apart; reasons that define none have no parts."""
    return {part.name: information >> part.low & (1 << part.width) - 1 for part in LAYOUTS.get(reason, ())}


def memory_operand(scale: int, address_size: int, segment: int, index: int, base: int) -> int:
    """Return the bits that describe a memory operand; an index or base of -1 is none."""
    information = scale | address_size << 7 | segment << 15
    information |= index << 18 if index >= 0 else 1 << 22
    return information | (base << 23 if base >= 0 else 1 << 27)


def register_operand(register: int) -> int:
    """Return the bits that say that the operand is a register."""
    return register << 3 | 1 << 10
