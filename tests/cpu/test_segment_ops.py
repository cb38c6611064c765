"""What descriptors and segment registers show to the rings, natively and in a guest, assembled and as bytes.

Expected values follow the operation sections of the manual: here they are worked out from a descriptor's fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from tests.cpu.bench import CS0, CS3, DATA, SS0, SS3, TABLES, TEXT, USER_TEXT, Native, native, o_mem, virtual
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.decode import decode
from vtsim.cpu.kernels import modes

ZF: Final = 1 << 6
UD, GP = 6, 13
HANDLER: Final = TEXT + 0x4000
GDT: Final = TABLES + 0x1800
TASK, TABLE, GATE = 0x40, 0x50, 0x60  # system descriptors of 16 bytes
READ_ONLY, EXECUTE_ONLY, CONFORMING, BIG = 0x70, 0x78, 0x80, 0x88


def descriptor(rights: int, limit: int = 0xFFFFF, base: int = 0) -> int:
    """A descriptor of 8 bytes. `rights`: bits 23:8 of its second doubleword but the limit's, as the VMCS has them."""
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16
    return low | (rights & 0xFF) << 40 | (limit >> 16 | rights >> 12 << 4) << 48 | (base >> 24 & 0xFF) << 56


# selector: access rights, limit in bytes
SEGMENTS: Final = {
    CS0: (0xA09B, 0xFFFF_FFFF), SS0: (0xC093, 0xFFFF_FFFF), SS3 & ~3: (0xC0F3, 0xFFFF_FFFF),
    CS3 & ~3: (0xA0FB, 0xFFFF_FFFF), TASK: (0x008B, 0x67), TABLE: (0x0082, 0x17), GATE: (0x008C, 0),
    READ_ONLY: (0xC0F1, 0xFFFF_FFFF), EXECUTE_ONLY: (0xA0F9, 0xFFFF_FFFF), CONFORMING: (0xA09F, 0xFFFF_FFFF),
    BIG: (0xC0F3, 0x12345FFF),
}  # fmt: skip
SELECTORS: Final = (*SEGMENTS, *(each | 3 for each in SEGMENTS), 0, 3, 0x28 | 4, 0xFFF8)


def tables(bench: Native) -> Native:
    """A GDT that holds them."""
    for space in (bench.space, getattr(bench, "guest", bench.space)):
        for selector, (rights, limit) in SEGMENTS.items():
            pages = limit >> 12 if rights & 0x8000 else limit
            space.put(GDT + selector, descriptor(rights, pages, DATA if selector == TABLE else 0))
    return bench


def visible(op: int, selector: int, ring: int) -> bool:
    """May a program of a ring see the segment by an instruction?"""
    if selector & 0xFFFC == 0 or selector & ~3 not in SEGMENTS or selector & 4:
        return False
    rights = SEGMENTS[selector & ~3][0]
    kind, dpl, ordinary = rights & 15, rights >> 5 & 3, rights & 16
    if not ordinary:
        if not {o.LAR: kind in (2, 9, 11, 12), o.LSL: kind in (2, 9, 11)}.get(op, False):
            return False
    elif (op == o.VERR and kind & 10 == 8) or (op == o.VERW and kind & 10 != 2):
        return False
    return bool(ordinary and kind & 12 == 12) or max(ring, selector & 3) <= dpl


def shown(op: int, selector: int) -> int:
    """What LAR or LSL loads."""
    rights, limit = SEGMENTS[selector & ~3]
    return {o.LAR: (rights & 0xF0FF) << 8, o.LSL: limit}[op]


def start(bench: Native, write: Callable[[Assembler], None], ring: int) -> None:
    base = USER_TEXT if ring else TEXT
    bench.space.code(write, base)
    bench.space.code(lambda a: a.op(o.STOP_OP), HANDLER)
    for vector in (UD, GP):
        bench.space.gate(vector, HANDLER)
    bench.start(base, ring)
    bench.m[s.GDTR_BASE], bench.m[s.GDTR_LIMIT] = GDT, 0x8F
    bench.m[s.CR4] |= 1 << 16  # FSGSBASE
    bench.engine.sync()


def placed(a: Assembler, code: str) -> None:
    """An instruction as bytes, decoded."""
    row = decode(bytes.fromhex(code), 64, a.here)
    a.emit(row.op, row.r1, row.r2, row.imm, row.mem, extra=row.extra, length=row.length)


@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("op", [o.LAR, o.LSL, o.VERR, o.VERW], ids=lambda op: o.OPS[op].name)
@pytest.mark.parametrize("decoded", [False, True], ids=["assembled", "bytes"])
def test_a_program_sees_of_a_descriptor_what_its_ring_and_the_type_allow(op: int, ring: int, decoded: bool) -> None:
    bench = tables(native())
    names = {o.LAR: "0f02d9", o.LSL: "0f03d9", o.VERR: "0f00e1", o.VERW: "0f00e9"}  # EBX, CX

    def write(a: Assembler) -> None:
        if decoded:
            placed(a, names[op])
        elif op in (o.LAR, o.LSL):
            a.op(op, s.RBX, s.RCX)
        else:
            a.op(op, s.RCX)
        a.op(o.STOP_OP)

    start(bench, write, ring)
    began = bench.engine.save()
    seen = {}
    for selector in SELECTORS:
        bench.engine.restore(began)
        bench.m[s.GPR + s.RCX], bench.m[s.GPR + s.RBX] = selector, 77
        bench.engine.run(ops=1)
        seen[selector] = (bool(bench.m[s.RFLAGS] & ZF), bench.reg(s.RBX))

    def wanted(selector: int) -> tuple[bool, int]:
        found = visible(op, selector, ring)
        return found, shown(op, selector) if found and op in (o.LAR, o.LSL) else 77

    assert seen == {selector: wanted(selector) for selector in SELECTORS}


def test_a_descriptor_is_read_from_memory_at_the_price_of_an_access() -> None:
    bench = tables(native())
    start(bench, lambda a: [a.op(o.LAR, s.RBX, s.RCX) for _ in range(2)] and None, 0)  # type: ignore[func-returns-value]
    bench.m[s.GPR + s.RCX] = CS0
    times = []
    for _ in range(2):
        before = int(bench.m[s.CYCLE])
        bench.engine.run(ops=1)
        times.append(int(bench.m[s.CYCLE]) - before)

    assert times[0] > times[1] >= int(bench.m[s.PRICE + o.LAR])  # the first finds neither translation nor line


def test_what_a_guest_of_vt_x_asks_of_its_own_descriptors_does_not_exit() -> None:
    bench = tables(virtual())
    bench.host()

    def write(a: Assembler) -> None:
        a.mov(s.RCX, TASK)
        a.op(o.LAR, s.RBX, s.RCX)
        a.op(o.LSL, s.RDX, s.RCX)
        a.op(o.VERR, s.RCX)
        a.emit(o.MOV_FROM_SEGMENT, s.RSI, imm=modes.CS)
        a.op(o.HLT)

    bench.guest.code(write, TEXT)
    bench.enter(TEXT)
    bench.set(GUEST_GDTR_BASE=GDT, GUEST_GDTR_LIMIT=0x8F)
    bench.engine.run(ops=50)

    assert bench.field("EXIT_REASON") == 12  # the HLT
    assert (bench.reg(s.RBX), bench.reg(s.RDX), bench.reg(s.RSI)) == (shown(o.LAR, TASK), shown(o.LSL, TASK), CS0)


@pytest.mark.parametrize(
    ("selector", "ring", "refused"),
    [(SS3, 0, False), (SS0, 0, False), (SS3, 3, False), (SS0, 3, True), (TASK, 0, True), (0, 3, False)],
)
def test_a_segment_register_takes_a_segment_that_the_ring_may_use_and_shows_its_selector(
    selector: int, ring: int, refused: bool
) -> None:
    bench = tables(native())

    def write(a: Assembler) -> None:
        a.emit(o.MOV_TO_SEGMENT, s.RCX, imm=modes.FS)
        a.emit(o.MOV_FROM_SEGMENT, s.RBX, imm=modes.FS)
        a.emit(o.PUSH_SEGMENT, imm=modes.FS)
        a.emit(o.POP_SEGMENT, imm=modes.GS)
        a.emit(o.MOV_FROM_SEGMENT, s.RDX, imm=modes.GS)
        a.op(o.STOP_OP)

    start(bench, write, ring)
    bench.m[s.GPR + s.RCX] = selector
    if refused:
        bench.engine.run(ops=1)
        assert (int(bench.m[s.EVENT_VECTOR]), int(bench.m[s.EVENT_ERROR])) == (GP, selector & ~3)
        return
    stack = bench.reg(s.RSP)
    bench.engine.run(ops=5)
    assert (bench.reg(s.RBX), bench.reg(s.RDX), bench.reg(s.RSP)) == (selector, selector, stack)


@pytest.mark.parametrize("ring", [0, 3])
def test_a_far_call_pushes_its_code_segment_and_a_far_return_takes_it_back(ring: int) -> None:
    bench = tables(native())
    mine = CS3 if ring else CS0
    base = USER_TEXT if ring else TEXT

    def write(a: Assembler) -> None:
        a.emit(o.CALL_FAR, mem=o_mem(DATA))
        a.op(o.STOP_OP)
        a.align(256)
        a.op(o.RET_FAR)

    start(bench, write, ring)
    bench.space.put(DATA, base + 256)
    bench.space.put(DATA + 8, mine)
    stack = bench.reg(s.RSP)
    bench.engine.run(ops=1)
    assert (int(bench.m[s.RIP]), bench.reg(s.RSP)) == (base + 256, stack - 16)
    assert bench.space.get(stack - 8) == mine
    bench.engine.run(ops=1)
    assert (int(bench.m[s.RIP]), bench.reg(s.RSP)) == (base + o.OPS[o.CALL_FAR].length, stack)


def test_code_of_ring_3_cannot_jump_to_a_segment_of_ring_0() -> None:
    bench = tables(native())
    start(bench, lambda a: a.emit(o.JMP_FAR, mem=o_mem(DATA)), 3)
    bench.space.put(DATA, TEXT)
    bench.space.put(DATA + 8, CS0)
    bench.engine.run(ops=1)

    assert (int(bench.m[s.EVENT_VECTOR]), int(bench.m[s.EVENT_ERROR])) == (GP, CS0)


def test_the_bases_of_fs_and_gs_are_read_and_written_in_any_ring_where_cr4_says_so() -> None:
    bench = native()

    def write(a: Assembler) -> None:
        a.op(o.WRFSBASE, s.RCX)
        a.op(o.RDFSBASE, s.RBX)
        placed(a, "f3480faed9")  # WRGSBASE RCX
        placed(a, "f30faeca")  # RDGSBASE EDX
        a.op(o.STOP_OP)

    start(bench, write, 3)
    bench.m[s.GPR + s.RCX] = 0x1234_5678_9ABC
    bench.engine.run(ops=4)
    assert (bench.reg(s.RBX), bench.reg(s.RDX)) == (0x1234_5678_9ABC, 0x5678_9ABC)
    assert int(bench.m[s.GS_BASE]) == 0x1234_5678_9ABC
    start(bench, write, 3)
    bench.m[s.CR4] &= ~(1 << 16)
    bench.engine.run(ops=1)
    assert int(bench.m[s.EVENT_VECTOR]) == UD


def test_an_ldt_is_found_by_its_descriptor_and_searched_by_selectors_that_name_it() -> None:
    bench = tables(native())

    def write(a: Assembler) -> None:
        a.mov(s.RCX, TABLE)
        a.op(o.LLDT, s.RCX)
        a.mov(s.RCX, 8 | 4)
        a.op(o.LSL, s.RBX, s.RCX)
        a.mov(s.RCX, 0x18 | 4)  # beyond its end
        a.op(o.VERR, s.RCX)
        a.op(o.STOP_OP)

    start(bench, write, 0)
    bench.space.put(DATA + 8, descriptor(0x0092, 0x777))
    bench.engine.run(ops=6)

    assert bench.reg(s.RBX) == 0x777
    assert int(bench.m[s.LDTR_SELECTOR]) == TABLE
    assert not bench.m[s.RFLAGS] & ZF


def test_where_sensitive_instructions_trap_every_one_of_them_traps_in_ring_3_and_none_in_ring_0() -> None:
    rows = [
        (o.LAR, s.RBX, s.RCX), (o.LSL, s.RBX, s.RCX), (o.VERR, s.RCX), (o.VERW, s.RCX), (o.PUSHF,), (o.SLDT, s.RBX),
        (o.STR, s.RBX), (o.SMSW, s.RBX), (o.RET_FAR,), (o.PUSH_SEGMENT,), (o.POP_SEGMENT,), (o.MOV_TO_SEGMENT, s.RCX),
        (o.MOV_FROM_SEGMENT, s.RBX), (o.SGDT,), (o.SIDT,), (o.JMP_FAR,), (o.CALL_FAR,), (o.POPF,), (o.IRET,), (o.INT,),
    ]  # fmt: skip
    for op, *registers in rows:
        bench = tables(native())
        start(bench, lambda a, op=op, registers=registers: a.emit(op, *registers, mem=o_mem(DATA)), 3)  # type: ignore[misc]
        bench.m[s.SENSITIVE_TRAPS] = 1
        bench.engine.run(ops=1)
        assert int(bench.m[s.EVENT_VECTOR]) == GP, o.OPS[op].name
