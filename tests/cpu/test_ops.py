"""What each op computes, at its edges."""

from __future__ import annotations

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import DATA, TEXT, USER_TEXT, Native, native, o_mem, virtual
from vtsim.base import jit
from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.vmcs.reasons import MSR_READ

EXAMPLES = 25 if jit.DISABLED else 100
M = (1 << 64) - 1
edges = st.one_of(st.sampled_from([0, 1, 2**63 - 1, 2**63, M, M - 1, 2**32]), st.integers(0, M))
CF, ZF, SF, OF = 1, 64, 128, 1 << 11


def finished(bench: Native) -> Native:
    assert int(bench.m[s.STOP]) == 4, int(bench.m[s.STOP])
    return bench


def expected(op: int, left: int, right: int) -> tuple[int, int]:
    """Result and flags on unbounded integers."""
    wide = {
        o.ADD: left + right, o.SUB: left - right, o.CMP: left - right, o.AND: left & right, o.TEST: left & right,
        o.OR: left | right, o.XOR: left ^ right, o.SHL: left << (right & 63), o.SHR: left >> (right & 63),
    }[op]  # fmt: skip
    result = wide & M
    flags = (ZF if result == 0 else 0) | (SF if result >> 63 else 0)
    if op in (o.ADD, o.SUB, o.CMP):
        flags |= CF if wide != result else 0
        exact = mem.signed(left) + mem.signed(right) if op == o.ADD else mem.signed(left) - mem.signed(right)
        flags |= OF if exact != mem.signed(result) else 0
    return result, flags


@pytest.mark.parametrize(
    "op", [o.ADD, o.SUB, o.AND, o.OR, o.XOR, o.SHL, o.SHR, o.CMP, o.TEST], ids=lambda op: o.OPS[op].name
)
@pytest.mark.parametrize("immediate", [False, True])
@settings(max_examples=EXAMPLES // 4)
@given(left=edges, right=edges)
def test_arithmetic_and_its_flags_are_those_of_unbounded_integers(
    op: int, immediate: bool, left: int, right: int
) -> None:
    bench = native()

    def write(a: Assembler) -> None:
        a.mov(s.RAX, left)
        a.mov(s.RBX, right)
        a.emit(op, s.RAX, 16 if immediate else s.RBX, imm=right)
        a.op(o.STOP_OP)

    bench.run(write)
    finished(bench)
    result, flags = expected(op, left, right)

    assert bench.reg(s.RAX) & M == (left if op in (o.CMP, o.TEST) else result)
    assert int(bench.m[s.RFLAGS]) & (CF | ZF | SF | OF) == flags


CONDITIONS = {
    "Z": lambda x, y: x == y, "NZ": lambda x, y: x != y, "B": lambda x, y: x < y, "AE": lambda x, y: x >= y,
    "S": lambda x, y: (x - y) >> 63 & 1, "NS": lambda x, y: not (x - y) >> 63 & 1,
    "L": lambda x, y: mem.signed(x) < mem.signed(y), "GE": lambda x, y: mem.signed(x) >= mem.signed(y),
    "LE": lambda x, y: mem.signed(x) <= mem.signed(y), "G": lambda x, y: mem.signed(x) > mem.signed(y),
    "BE": lambda x, y: x <= y, "A": lambda x, y: x > y,
}  # fmt: skip


@settings(max_examples=EXAMPLES // 2)
@given(left=edges, right=edges)
def test_conditions_compare_as_their_names_say(left: int, right: int) -> None:
    bench = native()

    def write(a: Assembler) -> None:
        a.mov(s.RBX, 0)
        for n in range(len(o.CONDITIONS)):
            a.mov(s.RAX, left)
            a.cmp(s.RAX, right)
            a.jcc(n, f"yes{n}")
            a.jmp(f"no{n}")
            a.label(f"yes{n}")
            a.or_(s.RBX, 1 << n)
            a.label(f"no{n}")
        a.op(o.STOP_OP)

    bench.run(write)
    finished(bench)

    assert [bool(bench.reg(s.RBX) >> n & 1) for n in range(12)] == [
        bool(CONDITIONS[c](left, right)) for c in o.CONDITIONS
    ]


@settings(max_examples=EXAMPLES)
@given(
    at=st.one_of(st.integers(0, 0x1FF0), st.integers(0xFF0, 0x1008)),
    size=st.sampled_from((1, 2, 4, 8)),
    value=edges,
    old=edges,
)
def test_stores_and_loads_of_any_size_at_any_place_agree_with_bytes(at: int, size: int, value: int, old: int) -> None:
    bench = native()
    image = bytearray(0x2000)
    space = bench.space
    for n in range(-8, 16):
        if 0 <= at + n < 0x2000:
            image[at + n] = old >> (n % 8 * 8) & 0xFF
            space.put(DATA + at + n, image[at + n], 1)

    def write(a: Assembler) -> None:
        a.mov(s.RAX, value)
        a.st(o_mem(DATA + at, size), s.RAX)
        a.ld(s.RBX, o_mem(DATA + at, size))
        a.mov(s.RCX, 5)
        a.xadd(o_mem(DATA + at, size), s.RCX)
        a.op(o.STOP_OP)

    bench.run(write)
    finished(bench)
    stored = value & (1 << 8 * size) - 1
    image[at : at + size] = ((stored + 5) & (1 << 8 * size) - 1).to_bytes(size, "little")

    assert bench.reg(s.RBX) & M == bench.reg(s.RCX) & M == stored
    for n in range(-8, 16):
        if 0 <= at + n < 0x2000:
            assert space.get(DATA + at + n, 1) == image[at + n]


@settings(max_examples=EXAMPLES)
@given(
    size=st.sampled_from((1, 2, 4, 8)), held=edges, compared=edges, given_value=edges, same=st.booleans(),
    register=st.booleans(),
)  # fmt: skip
def test_compare_and_exchange_writes_where_it_is_equal_and_else_loads_what_is_there(
    size: int, held: int, compared: int, given_value: int, same: bool, register: bool
) -> None:
    """CMPXCHG of the SDM: ZF says which of both; an accumulator of 4 bytes that is loaded is zero-extended."""
    bench, part = native(), (1 << 8 * size) - 1
    compared = compared & ~part | held & part if same else compared
    bench.space.put(DATA, held)
    attributes = o.MEM_DECODED | 2 << o.MEM_ADDRESS_SIZE | (o.MEM_REGISTER if register else 0)
    place = o_mem(DATA, size)
    place = evolve(place, attributes=place.attributes | attributes)

    def write(a: Assembler) -> None:
        a.mov(s.RAX, compared)
        a.mov(s.RBX, held)
        a.mov(s.RCX, given_value)
        a.emit(o.EXCHANGE, s.RCX, s.RBX, mem=place, extra=o.X_COMPARE)
        a.op(o.PUSHF)
        a.pop(s.RDX)
        a.ld(s.RSI, o_mem(DATA, 8))
        a.op(o.STOP_OP)

    bench.run(write)
    finished(bench)
    equal = compared & part == held & part
    wide = size == 4 and register  # a register of 4 bytes that is written is zero-extended
    left = (given_value if equal else held) & part
    found = bench.reg(s.RBX if register else s.RSI) & M
    assert found == (left if wide else held & ~part | left)
    loaded = held & part if size == 4 else compared & ~part | held & part
    assert bench.reg(s.RAX) & M == (compared if equal else loaded)
    assert bool(bench.reg(s.RDX) & ZF) == equal
    assert bool(bench.reg(s.RDX) & CF) == (compared & part < held & part)


@pytest.mark.parametrize("op", [o.LD, o.ST, o.XADD, o.LDM, o.STM, o.PUSH, o.POP])
def test_an_access_whose_second_page_is_missing_commits_nothing(op: int) -> None:
    bench = native()
    at = 0x700000
    bench.space.page(at)
    place = at + 0x1000 - (8 if op in (o.LDM, o.STM) else 4)
    bench.space.put(at + 0xFF0, 0x1111_2222_3333_4444)
    bench.space.put(at + 0xFF8, 0x5555_6666_7777_8888)
    bench.space.gate(14, TEXT + 0x8000)
    bench.space.code(lambda a: a.op(o.STOP_OP, imm=14), TEXT + 0x8000)

    def write(a: Assembler) -> None:
        for register in (s.RAX, s.RCX, s.RDX, s.RBX, s.RSI):
            a.mov(register, place)
        if op in (o.PUSH, o.POP):
            a.mov(s.RSP, place + (8 if op == o.PUSH else 0))
        a.emit(op, s.RAX, imm=0b1111 if op in (o.LDM, o.STM) else 0, mem=Mem(base=s.RSI))
        a.op(o.STOP_OP, imm=1)

    bench.space.gate(14, TEXT + 0x8000, ist=1)
    bench.run(write)
    finished(bench)

    assert int(bench.m[s.STOP_A]) == 14
    assert int(bench.m[s.CR2]) & ~0x3F == at + 0x1000
    assert [bench.reg(r) for r in (s.RAX, s.RCX, s.RDX, s.RBX)] == [place] * 4
    assert [bench.space.get(at + n) for n in (0xFF0, 0xFF8)] == [0x1111_2222_3333_4444, 0x5555_6666_7777_8888]


def test_ldm_and_stm_move_registers_in_ascending_order_and_count_one_instruction_each() -> None:
    bench = native()

    def write(a: Assembler) -> None:
        for n, register in enumerate((s.RBX, s.R9, s.R15)):
            a.mov(register, 100 + n)
        a.stm(o_mem(DATA + 0xFF0), (s.R15, s.RBX, s.R9))
        a.ldm(o_mem(DATA + 0xFF0), (s.RDX, s.RCX, s.R8))
        a.op(o.STOP_OP)

    bench.run(write)
    finished(bench)

    assert [bench.space.get(DATA + 0xFF0 + 8 * n) for n in range(3)] == [100, 101, 102]
    assert [bench.reg(r) for r in (s.RCX, s.RDX, s.R8)] == [100, 101, 102]
    assert int(bench.m[s.RETIRED]) == 3 + 3 + 3


def test_an_effective_address_is_base_index_scale_displacement_and_segment() -> None:
    bench = native()

    def write(a: Assembler) -> None:
        a.mov(s.RAX, 0x1000)
        a.mov(s.RBX, -3)
        a.lea(s.RCX, Mem(base=s.RAX, index=s.RBX, scale=8, displacement=0x20))
        a.lea(s.RDX, Mem(displacement=-8))
        a.op(o.SWAPGS)
        a.lea(s.RSI, Mem(displacement=5, segment=2))
        a.op(o.STOP_OP)

    bench.m[s.MSR_KERNEL_GS_BASE] = 0x7000
    bench.run(write)
    finished(bench)

    assert [bench.reg(r) for r in (s.RCX, s.RDX, s.RSI)] == [0x1000 - 24 + 0x20, -8, 0x7005]


def test_calls_and_returns_use_the_stack_in_memory() -> None:
    bench = native()

    def write(a: Assembler) -> None:
        a.copy(s.RBP, s.RSP)
        a.call("f")
        a.label("back")
        a.op(o.STOP_OP)
        a.label("f")
        a.ld(s.RAX, Mem(base=s.RSP))
        a.mov(s.RBX, "back")
        a.copy(s.RCX, s.RSP)
        a.ret()

    bench.run(write)
    finished(bench)

    assert bench.reg(s.RAX) == bench.reg(s.RBX) == TEXT + 5 + 5
    assert bench.reg(s.RSP) == bench.reg(s.RBP) == bench.reg(s.RCX) + 8


@pytest.mark.parametrize("target", [1 << 47, -(1 << 47) - 4096, (1 << 62) | USER_TEXT, TEXT ^ 1 << 62, TEXT ^ 1 << 57])
def test_a_jump_to_no_canonical_address_is_a_general_protection_fault_there(target: int) -> None:
    bench = native()
    bench.space.code(lambda a: (a.op(o.NOP), a.op(o.STOP_OP, imm=1))[0], USER_TEXT)
    bench.space.gate(13, TEXT + 0x8000)
    bench.space.code(
        lambda a: (a.ld(s.RAX, Mem(base=s.RSP, displacement=8)), a.op(o.STOP_OP, imm=13))[0], TEXT + 0x8000
    )

    def write(a: Assembler) -> None:
        a.mov(s.RBX, USER_TEXT)
        a.mov(s.RAX, target)
        a.op(o.JMP_REG, s.RAX)

    bench.run(write)
    finished(bench)

    assert (int(bench.m[s.STOP_A]), bench.reg(s.RAX)) == (13, target)


def test_a_byte_without_an_instruction_is_an_invalid_opcode() -> None:
    bench = native()
    bench.space.gate(6, TEXT + 0x8000)
    bench.space.code(lambda a: a.op(o.STOP_OP, imm=6), TEXT + 0x8000)
    bench.run(lambda a: a.jmp(TEXT + 1))

    assert int(finished(bench).m[s.STOP_A]) == 6


def test_a_store_beside_code_leaves_the_code_alone() -> None:
    bench = native()

    def write(a: Assembler) -> None:
        a.mov(s.RAX, 3)
        a.st(o_mem(0x700800), s.RAX)
        a.jmp(0x700000)

    frame = bench.space.page(0x700000)
    bench.engine.contents(frame, mem.VALUES)[5] = 9  # the frame had contents before
    bench.space.code(lambda a: (a.ld(s.RBX, o_mem(0x700800)), a.op(o.STOP_OP, imm=8))[0], 0x700000)
    bench.run(write)

    assert int(finished(bench).m[s.STOP_A]) == 8
    assert (bench.reg(s.RBX), bench.engine.contents(frame, mem.VALUES)[5]) == (3, 9)


@pytest.mark.parametrize("op", [o.LGDT, o.LIDT])
def test_a_table_register_whose_second_word_is_missing_is_not_loaded(op: int) -> None:
    bench = native()
    bench.space.page(0x700000)
    bench.space.gate(14, TEXT + 0x8000)
    bench.space.code(lambda a: a.op(o.STOP_OP, imm=14), TEXT + 0x8000)
    bench.run(lambda a: a.op(op, mem=o_mem(0x700FF8)))

    assert int(finished(bench).m[s.STOP_A]) == 14
    assert bench.m[s.GDTR_LIMIT] == 0xFFFF


@pytest.mark.parametrize(
    ("register", "divisor"), [(0xB, 1), (0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128)]
)
def test_the_apic_timer_counts_at_the_divided_clock(register: int, divisor: int) -> None:
    """SDM, "APIC Timer": the encodings of the divide configuration register."""
    bench = native()

    def write(a: Assembler) -> None:
        for index, value in ((0x83E, register), (0x832, 0x10040), (0x838, 1000)):
            a.mov(s.RCX, index)
            a.mov(s.RAX, value)
            a.mov(s.RDX, 0)
            a.op(o.WRMSR)
        a.mov(s.RCX, 0x83E)
        a.op(o.RDMSR)
        a.op(o.STOP_OP)

    bench.run(write)
    finished(bench)

    assert int(bench.m[s.APIC_PERIOD]) == 1000 * divisor
    assert bench.reg(s.RAX) == register


@pytest.mark.parametrize("hfn", [-1, 8192, 1 << 40])
def test_a_frame_beyond_memory_is_our_mistake(hfn: int) -> None:
    engine = native().engine
    for reach in (
        lambda: engine.contents(hfn, mem.TABLE),
        lambda: engine.load(hfn << 12),
        lambda: engine.store(hfn << 12, 1),
    ):
        with pytest.raises(ModelError, match="no such frame of memory"):
            reach()


def test_a_bitmap_outside_memory_lets_everything_exit() -> None:
    bench = virtual()
    bench.set(MSR_BITMAPS=1 << 40)
    bench.run(lambda a: (a.mov(s.RCX, 0x10), a.op(o.RDMSR))[0])

    assert bench.reason == MSR_READ


def test_every_op_has_a_price_slot_of_its_own() -> None:
    assert s.PRICE + len(o.OPS) <= s.P_EXCEPTION
