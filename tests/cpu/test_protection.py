"""Who may access a page: error codes of page faults, and what STAC, CLAC, POPF and WRPKRU change at once.

SDM: "Determination of Access Rights"; "Protection Keys"; "Page-Fault Exceptions".
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cpu.bench import DATA, TEXT, USER_TEXT, Native, native, o_mem, virtual
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.ept import spec as e
from vtsim.vmcs import bits as b
from vtsim.vmcs.reasons import EPT_VIOLATION

Emit = Callable[[Assembler], None]
P, W, U, RSVD, FETCH, KEY = (1 << n for n in range(6))
WP, SMEP, SMAP, PKE, PCIDE = 1 << 16, 1 << 20, 1 << 21, 1 << 22, 1 << 17
FAULTED, GENERAL, UNDEFINED, ENDED = 14, 13, 6, 1
TARGET = DATA + 0x2000


def run(bench: Native, *ops: Emit, ring: int = 0, cr4: int = 0, cr0: int = 0) -> int | None:
    """The error code of the page fault that the program ends with, or None; other exceptions end it negatively."""
    space = bench.space
    for vector in (FAULTED, GENERAL, UNDEFINED):
        at = TEXT + 0x8000 + 0x1000 * vector
        space.code(lambda a, stop=vector: a.op(o.STOP_OP, imm=stop), at)  # type: ignore[misc]
        space.gate(vector, at)

    def write(a: Assembler) -> None:
        for emit in ops:
            emit(a)
        a.op(o.STOP_OP, imm=ENDED)

    base = USER_TEXT if ring else TEXT
    space.code(write, base)
    bench.start(base, ring)
    bench.m[s.CR4] |= cr4
    bench.m[s.CR0] ^= cr0
    bench.engine.sync()
    assert bench.engine.run(ops=1000) == 4
    stopped = int(bench.m[s.STOP_A])
    if stopped == FAULTED:
        return space.get(bench.reg(s.RSP))
    return None if stopped == ENDED else -stopped


def load(a: Assembler) -> None:
    a.ld(s.RAX, o_mem(TARGET))


def store(a: Assembler) -> None:
    a.st_value(o_mem(TARGET), 1)


def jump(a: Assembler) -> None:
    a.mov(s.RAX, TARGET)
    a.op(o.JMP_REG, s.RAX)


def wrpkru(rights: int) -> Emit:
    def emit(a: Assembler) -> None:
        a.mov(s.RAX, rights)
        a.mov(s.RCX, 0)
        a.mov(s.RDX, 0)
        a.op(o.WRPKRU)

    return emit


def stac(a: Assembler) -> None:
    a.op(o.STAC)


def clac(a: Assembler) -> None:
    a.op(o.CLAC)


def popf(flags: int) -> Emit:
    def emit(a: Assembler) -> None:
        a.push(value=flags)
        a.op(o.POPF)

    return emit


USER, KERNEL = e.PTE_PRESENT | e.PTE_USER, e.PTE_PRESENT
NX = e.PTE_NO_EXECUTE
CASES = [
    # entry's flags, ring, CR4, CR0 bits flipped, ops, error code
    pytest.param(0, 0, 0, 0, [load], 0, id="not present, read by ring 0"),
    pytest.param(0, 3, 0, 0, [store], W | U, id="not present, written by ring 3"),
    pytest.param(0, 3, 0, 0, [jump], U | FETCH, id="not present, fetched by ring 3"),
    pytest.param(KERNEL, 3, 0, 0, [load], P | U, id="a supervisor page read by ring 3"),
    pytest.param(USER, 3, 0, 0, [store], P | W | U, id="read-only, written by ring 3"),
    pytest.param(KERNEL, 0, 0, 0, [store], P | W, id="read-only, written by ring 0 with WP"),
    pytest.param(KERNEL, 0, 0, WP, [store], None, id="read-only, written by ring 0 without WP"),
    pytest.param(USER | NX, 3, 0, 0, [jump], P | U | FETCH, id="execute-disable"),
    pytest.param(USER, 0, SMEP, 0, [jump], P | FETCH, id="SMEP"),
    pytest.param(USER | 1 << 51, 0, 0, 0, [load], P | RSVD, id="a reserved bit"),
    pytest.param(USER, 0, SMAP, 0, [load], P, id="SMAP"),
    pytest.param(USER | e.PTE_WRITE, 0, SMAP, 0, [store], P | W, id="SMAP, a write"),
    pytest.param(USER | e.PTE_WRITE, 3, SMAP, 0, [load, store], None, id="SMAP does not concern ring 3"),
    pytest.param(KERNEL | e.PTE_WRITE, 0, SMAP, 0, [load, store], None, id="SMAP does not concern supervisor pages"),
    pytest.param(USER, 0, SMAP, 0, [stac, load], None, id="STAC"),
    pytest.param(USER, 0, SMAP, 0, [stac, load, clac, load], P, id="CLAC, though the translation is cached"),
    pytest.param(USER, 0, SMAP, 0, [popf(1 << 18 | 2), load], None, id="POPF sets AC"),
    pytest.param(USER, 0, SMAP, 0, [stac, load, popf(2), load], P, id="POPF clears AC"),
    pytest.param(USER | 5 << 59, 3, PKE, 0, [wrpkru(0), load], None, id="a key that allows"),
    pytest.param(USER | 5 << 59, 3, PKE, 0, [wrpkru(1 << 10), load], P | U | KEY, id="access disabled"),
    pytest.param(USER | 5 << 59, 3, 0, 0, [load], None, id="no keys without CR4.PKE"),
    pytest.param(
        USER | e.PTE_WRITE | 5 << 59, 3, PKE, 0, [wrpkru(2 << 10), load, store], P | W | U | KEY, id="write disabled"
    ),
    pytest.param(
        USER | e.PTE_WRITE | 5 << 59, 3, PKE, 0, [store, wrpkru(1 << 10), load], P | U | KEY,
        id="WRPKRU holds at once, though the translation is cached",
    ),
    pytest.param(
        USER | e.PTE_WRITE | 5 << 59, 3, PKE, 0, [wrpkru(1 << 12), store, wrpkru(0), load], None, id="other keys"
    ),
    pytest.param(
        USER | e.PTE_WRITE | 5 << 59, 0, PKE, 0, [wrpkru(2 << 10), store], P | W | KEY, id="ring 0 with WP obeys"
    ),
    pytest.param(
        USER | e.PTE_WRITE | 5 << 59, 0, PKE, WP, [wrpkru(2 << 10), store], None, id="ring 0 without WP writes"
    ),
    pytest.param(
        KERNEL | e.PTE_WRITE | 5 << 59, 0, PKE, 0, [wrpkru(1 << 10), store], None, id="keys of supervisor pages"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "ring", "cr4", "cr0", "ops", "code"), CASES)
def test_a_page_fault_says_why(flags: int, ring: int, cr4: int, cr0: int, ops: list[Emit], code: int | None) -> None:
    bench = native()
    leaf = bench.space.table.find(TARGET)
    assert leaf is not None
    bench.space.table.words(leaf.table)[leaf.index] = leaf.frame << 12 | flags

    assert run(bench, *ops, ring=ring, cr4=cr4, cr0=cr0) == code


def test_stac_and_clac_cost_no_walk() -> None:
    """The translation is kept: what AC decides is looked up in the TLB entry."""
    bench = native()
    assert run(bench, stac, load, clac, stac, load, clac, stac, load, cr4=SMAP) is None

    assert int(bench.engine.arena[bench.engine.owner("host") + k.WALKS]) == 2  # the code's page, the data's


@pytest.mark.parametrize("op", [o.STAC, o.CLAC])
def test_ring_3_has_no_stac_and_no_clac(op: int) -> None:
    assert run(native(), lambda a: a.op(op), ring=3) == -UNDEFINED


def test_rdpkru_returns_what_wrpkru_wrote() -> None:
    bench = native()
    assert run(bench, wrpkru(0xABCD1234), lambda a: a.mov(s.RAX, 0), lambda a: a.op(o.RDPKRU), ring=3, cr4=PKE) is None

    assert (bench.reg(s.RAX), bench.reg(s.RDX)) == (0xABCD1234, 0)


@pytest.mark.parametrize(("op", "rcx", "rdx", "cr4", "ends"), [
    (o.RDPKRU, 0, 0, 0, -UNDEFINED), (o.WRPKRU, 0, 0, 0, -UNDEFINED), (o.RDPKRU, 1, 0, PKE, -GENERAL),
    (o.WRPKRU, 1, 0, PKE, -GENERAL), (o.WRPKRU, 0, 1, PKE, -GENERAL), (o.RDPKRU, 0, 1, PKE, None),
])  # fmt: skip
def test_pkru_wants_its_enable_bit_and_zeros(op: int, rcx: int, rdx: int, cr4: int, ends: int | None) -> None:
    def emit(a: Assembler) -> None:
        a.mov(s.RCX, rcx)
        a.mov(s.RDX, rdx)
        a.op(op)

    assert run(native(), emit, ring=3, cr4=cr4) == ends


@pytest.mark.parametrize(("kind", "low", "address", "cr4", "ends"), [
    (0, 0, DATA, 0, None), (0, 1, DATA, 0, -GENERAL), (1, 1, 0, 0, -GENERAL), (2, 1, 0, 0, None),
    (0, 1, DATA, PCIDE, None), (0, 0, 1 << 47, 0, -GENERAL), (1, 0, 1 << 47, 0, None), (1, 1 << 12, 0, PCIDE, -GENERAL),
    (4, 0, 0, PCIDE, -GENERAL),
])  # fmt: skip
def test_invpcid_refuses_what_the_manual_says(kind: int, low: int, address: int, cr4: int, ends: int | None) -> None:
    bench = native()
    bench.space.put(TARGET, low)
    bench.space.put(TARGET + 8, address)

    def emit(a: Assembler) -> None:
        a.mov(s.RDI, kind)
        a.op(o.INVPCID, s.RDI, mem=o_mem(TARGET))

    assert run(bench, emit, cr4=cr4) == ends


@pytest.mark.parametrize(("user_page", "bit", "violates"), [
    (True, 1 << 10, False), (True, 1 << 2, True), (False, 1 << 2, False), (False, 1 << 10, True),
])  # fmt: skip
def test_mode_based_execution_has_a_right_for_each_kind_of_address(user_page: bool, bit: int, violates: bool) -> None:
    """SDM: "Mode-Based Execute Control for EPT"."""
    bench = virtual()
    guest = bench.guest
    ring, base = (3, USER_TEXT) if user_page else (0, TEXT)
    guest.code(lambda a: a.op(o.STOP_OP, imm=ENDED), base)
    bench.host()
    leaf = guest.table.find(base)
    assert leaf is not None
    assert guest.ept is not None
    at = guest.ept.find(leaf.frame << 12)
    assert at is not None
    for table in guest.ept.tables():  # above the page both rights
        words = guest.ept.words(table)
        words[words & 7 != 0] |= 1 << 10
    guest.ept.words(at.table)[at.index] = at.frame << 12 | 6 << 3 | e.EPT_READ | e.EPT_WRITE | bit
    bench.set(SECONDARY_PROC_CONTROLS=bench.field("SECONDARY_PROC_CONTROLS") | b.MODE_BASED_EXECUTE_CONTROL)
    bench.enter(base, ring)
    bench.engine.run(ops=100)

    assert (bench.reason == EPT_VIOLATION) == violates
    if violates:
        said = bench.field("EXIT_QUALIFICATION")
        assert said & e.Q_FETCH
        assert bool(said & e.Q_EXECUTE_USER) == (bit == 1 << 10)
