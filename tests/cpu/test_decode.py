"""Bytes of the manual's encodings and the rows that they become."""

from __future__ import annotations

import pytest

from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.decode import decode, sequence

NONE = s.NO_REGISTER
ES, CS, SS, DS, FS, GS = (
    o.SEGMENT_ES, o.SEGMENT_CS, o.SEGMENT_SS, o.SEGMENT_DS, o.SEGMENT_FS, o.SEGMENT_GS,
)  # fmt: skip


def row(code: str, bits: int = 64):  # type: ignore[no-untyped-def]
    return decode(bytes.fromhex(code), bits)


def address_size(code: str, bits: int) -> int:
    return (16, 32, 64)[row(code, bits).mem.attributes >> o.MEM_ADDRESS_SIZE & 3]


def operand_size(code: str, bits: int) -> int:
    return (16, 32, 64)[row(code, bits).mem.attributes >> o.MEM_OPERAND_SIZE & 3]


# fmt: off
ENCODINGS = [
    (64, "0fa2",         o.CPUID,        2),
    (64, "f4",           o.HLT,          1),
    (64, "f390",         o.PAUSE,        2),
    (64, "90",           o.NOP,          1),
    (64, "4190",         o.EXCHANGE,     2),   # XCHG R8, RAX
    (64, "0f01c1",       o.VMCALL,       3),
    (64, "0f01c8",       o.MONITOR,      3),
    (64, "0f01d1",       o.XSETBV,       3),
    (64, "0f01f8",       o.SWAPGS,       3),
    (32, "0f01f8",       o.UD,           3),
    (64, "0f0138",       o.INVLPG,       3),
    (64, "0fc730",       o.VMPTRLD,      3),
    (64, "660fc730",     o.VMCLEAR,      4),
    (64, "f30fc730",     o.VMXON,        4),
    (64, "0fc7f0",       o.RDRAND,       3),
    (64, "0fc7f8",       o.RDSEED,       3),
    (64, "660f388008",   o.INVEPT,       5),
    (64, "0f388008",     o.UD,           4),   # INVEPT needs 66
    (64, "0f0b",         o.UD,           2),
    (64, "ce",           o.UD,           1),   # no INTO in 64-bit mode
    (32, "ce",           o.INTO,         1),
    (32, "40",           o.ARITHMETIC,   1),   # INC EAX, a REX prefix in 64-bit mode
    (32, "9a000000008000", o.CALL_FAR,   7),
    (64, "9a",           o.UD,           1),
    (64, "f00fc101",     o.EXCHANGE,     4),   # LOCK XADD
    (64, "f0480fb111",   o.EXCHANGE,     5),   # LOCK CMPXCHG
    (64, "f08901",       o.UD,           3),   # LOCK MOV
    (64, "f00fa2",       o.UD,           3),   # LOCK CPUID
    (64, "66f30f01c1",   o.UD,           5),
]
# fmt: on


@pytest.mark.parametrize(("bits", "code", "op", "length"), ENCODINGS)
def test_an_encoding_is_its_instruction_and_as_long_as_its_bytes(bits: int, code: str, op: int, length: int) -> None:
    got = row(code, bits)

    assert (o.OPS[got.op].name, got.length) == (o.OPS[op].name, length)


# fmt: off
OPERANDS = [
    (64, "8b01",             s.RCX,      NONE,  1, 0,           DS),
    (64, "8b4508",           s.RBP,      NONE,  1, 8,           SS),
    (64, "8b4580",           s.RBP,      NONE,  1, -128,        SS),
    (64, "8b0424",           s.RSP,      NONE,  1, 0,           SS),
    (64, "8b0498",           s.RAX,      s.RBX, 4, 0,           DS),
    (64, "8b049d00000000",   NONE,       s.RBX, 4, 0,           DS),   # no base
    (64, "8b042500808200",   NONE,       NONE,  1, 0x828000,    DS),   # absolute
    (64, "8b0540000000",     o.RIP_BASE, NONE,  1, 0x40,        DS),   # RIP-relative
    (32, "8b0540000000",     NONE,       NONE,  1, 0x40,        DS),
    (64, "438b44b404",       s.R12,      s.R14, 4, 4,           DS),
    (64, "418b00",           s.R8,       NONE,  1, 0,           DS),
    (64, "64488b00",         s.RAX,      NONE,  1, 0,           FS),
    (64, "268b00",           s.RAX,      NONE,  1, 0,           DS),   # ES means nothing in 64-bit mode
    (32, "268b00",           s.RAX,      NONE,  1, 0,           ES),
    (32, "368b00",           s.RAX,      NONE,  1, 0,           SS),
    (16, "8b00",             s.RBX,      s.RSI, 1, 0,           DS),
    (16, "8b02",             s.RBP,      s.RSI, 1, 0,           SS),
    (16, "8b4600",           s.RBP,      NONE,  1, 0,           SS),
    (16, "8b060008",         NONE,       NONE,  1, 0x800,       DS),
    (16, "2e8b07",           s.RBX,      NONE,  1, 0,           CS),
    (16, "678b0470",         s.RAX,      s.RSI, 2, 0,           DS),
]
# fmt: on


@pytest.mark.parametrize(("bits", "code", "base", "index", "scale", "displacement", "segment"), OPERANDS)
def test_a_memory_operand_is_base_index_scale_displacement_and_segment(
    bits: int, code: str, base: int, index: int, scale: int, displacement: int, segment: int
) -> None:
    mem = row(code, bits).mem

    assert (mem.base, mem.index, mem.scale, mem.displacement, mem.segment) == (
        base,
        index,
        scale,
        displacement,
        segment,
    )


# fmt: off
SIZES = [
    ("8b01",     64, 64, 32), ("488b01",   64, 64, 64), ("668b01", 64, 64, 16), ("678b01", 64, 32, 32),
    ("8b01",     32, 32, 32), ("668b01",   32, 32, 16), ("678b07", 32, 16, 32),
    ("8b07",     16, 16, 16), ("668b07",   16, 16, 32), ("678b01", 16, 32, 16),
    ("ff31",     64, 64, 64), ("66ff31",   64, 64, 16), ("50",     64, 64, 64),   # PUSH defaults to 64 bits
    ("0f20c0",   64, 64, 64), ("0f20c0",   32, 32, 32), ("0f7803", 32, 32, 32),
]
# fmt: on


@pytest.mark.parametrize(("code", "bits", "address", "operand"), SIZES)
def test_prefixes_and_mode_decide_address_and_operand_size(code: str, bits: int, address: int, operand: int) -> None:
    assert (address_size(code, bits), operand_size(code, bits)) == (address, operand)


@pytest.mark.parametrize(
    ("code", "bits", "r1", "imm"),
    [("0f22c3", 64, s.RBX, 0), ("440f22c3", 64, s.RBX, 8), ("410f20c1", 64, s.R9, 0)],
)
def test_a_control_register_move_names_both_registers(code: str, bits: int, r1: int, imm: int) -> None:
    got = row(code, bits)

    assert (got.r1, got.imm) == (r1, imm)


@pytest.mark.parametrize(("code", "register"), [("b4ff", o.HIGH_BYTES), ("40b4ff", s.RSP), ("b0ff", s.RAX)])
def test_without_rex_byte_registers_four_to_seven_are_the_high_ones(code: str, register: int) -> None:
    assert row(code).r2 == register


@pytest.mark.parametrize(
    ("code", "r1", "r2"), [("0f78d8", s.RAX, s.RBX), ("450f78c7", s.R15, s.R8), ("0f7819", NONE, s.RBX)]
)
def test_vmread_has_its_operand_first_and_the_encoding_second(code: str, r1: int, r2: int) -> None:
    got = row(code)

    assert (got.r1, got.r2) == (r1, r2)


def test_bytes_that_end_too_early_are_no_instruction() -> None:
    with pytest.raises(EOFError):
        decode(b"\x0f", 64)


def test_a_sequence_ends_where_its_page_ends() -> None:
    rows = list(sequence(b"\x90" * 40, 64, 0x1FFD))

    assert [each.at for each in rows] == [0x1FFD, 0x1FFE, 0x1FFF]
