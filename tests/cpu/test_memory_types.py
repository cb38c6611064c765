"""Memory that no cache holds: by PAT and by EPT, and what accesses to it take.

SDM: "EPT and Memory Typing"; "Memory Type Used for Translated Guest-Physical Addresses"; "Memory Type Used for Accessing
EPT Paging Structures".
"""

from __future__ import annotations

import pytest

from tests.cpu.bench import DATA, Native, Write, native, o_mem, virtual
from tests.cpu.test_invalidation import ENTRY, NEW, OLD
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.ept import spec as e
from vtsim.ept.tables import KERNEL_PAGE

AT, LARGE = 0x900000, 0xA00000
ROUNDS = 10
# how the manual has it: rows by MTRR, or EPT, columns by PAT
COLUMNS = ("UC", "UC-", "WC", "WT", "WB", "WP")
TABLE = {
    "UC": "UC UC WC UC UC UC", "WC": "UC WC WC UC WC UC", "WT": "UC UC WC WT WT WP", "WP": "UC WC WC UC WP WP",
    "WB": "UC UC WC WT WB WP",
}  # fmt: skip
NUMBERS = {"UC": 0, "WC": 1, "WT": 4, "WP": 5, "WB": 6, "UC-": 7}
DEFAULT_PAT = ("WB", "WT", "UC-", "UC", "WB", "WT", "UC-", "UC")


def pat_bits(index: int, large: bool = False) -> int:
    """PWT, PCD and PAT of an entry that maps a page."""
    return (index & 3) << 3 | (index >> 2) << (12 if large else 7)


def from_dram(bench: Native, owner: str = "host") -> int:
    return int(bench.engine.arena[bench.engine.owners[owner] + k.DATA_L2 + 2])


def accesses(op: str) -> Write:
    """A program that loads or stores one word again and again."""

    def write(a: Assembler) -> None:
        a.mov(s.RCX, ROUNDS)
        a.label("again")
        if op == "load":
            a.ld(s.RAX, o_mem(AT))
        else:
            a.st(o_mem(AT), s.RCX)
        a.loop("again")
        a.op(o.STOP_OP, imm=0x77)

    return write


def cycles(bench: Native, op: str) -> int:
    assert bench.run(accesses(op)) == 4
    return int(bench.m[s.CYCLE])


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("op", ["load", "store"])
def test_a_page_is_cached_as_its_entry_in_pat_says(index: int, op: str) -> None:
    bench, cached = native(), native()
    bench.space.page(AT, extra=pat_bits(index))
    cached.space.page(AT)
    taken, least = cycles(bench, op), cycles(cached, op)

    uncached = DEFAULT_PAT[index] in ("UC", "UC-")
    assert from_dram(cached) > 0
    assert from_dram(bench) - from_dram(cached) == (ROUNDS - 1 if uncached else 0)
    beyond = int(bench.m[s.DRAM_CYCLES] - bench.m[s.L1D + s.LATENCY])
    assert taken - least == (ROUNDS - 1) * beyond * uncached
    bench.engine.check_clock()


@pytest.mark.parametrize("pattern", [o.SEQUENTIAL, o.UNIFORM, o.CHASE])
def test_streams_reach_memory_with_every_access(pattern: int) -> None:
    """None shares a line's fill, and none overlaps with another one: they take as long as one after the other."""
    taken, found = [], []
    for extra in (0, pat_bits(3)):
        bench = native()
        for n in range(4):
            bench.space.page(AT + 0x1000 * n, extra=extra)

        def write(a: Assembler) -> None:
            for register, value in ((s.RSI, AT), (s.RDX, 0x4000), (s.RDI, 0), (s.RBX, 12345), (s.RCX, 200), (s.R8, 8)):
                a.mov(register, value)
            a.emit(o.STREAM, imm=pattern)
            a.op(o.STOP_OP, imm=1)

        assert bench.run(write) == 4
        assert bench.reg(s.RCX) == 0
        bench.engine.check_clock()
        taken.append(int(bench.m[s.CYCLE]))
        found.append(from_dram(bench))

    beyond = int(bench.m[s.DRAM_CYCLES] - bench.m[s.L1D + s.LATENCY])
    assert found[0] < 200 <= found[1]
    assert taken[1] > 200 * beyond
    assert pattern == o.CHASE or taken[0] < 200 * beyond


def test_stores_that_are_combined_wait_for_nothing_and_loads_do() -> None:
    taken = {}
    for kind in ("UC", "WC", "WB"):
        for op in ("load", "store"):
            bench = native()
            bench.space.page(AT, extra=pat_bits(1))
            bench.m[s.PAT] = NUMBERS["WB"] | NUMBERS[kind] << 8
            taken[kind, op] = cycles(bench, op)

    assert taken["WC", "store"] < taken["WB", "store"] < taken["UC", "store"]
    assert taken["WC", "load"] == taken["UC", "load"] > taken["WB", "load"]


@pytest.mark.parametrize("outer", TABLE)
@pytest.mark.parametrize("inner", COLUMNS)
@pytest.mark.parametrize("ignored", [False, True])
def test_types_of_ept_and_pat_combine(outer: str, inner: str, ignored: bool) -> None:
    bench = virtual()
    frame = bench.guest.page(AT, extra=pat_bits(1))
    ept = bench.guest.ept
    assert ept is not None
    leaf = ept.find(frame << 12)
    assert leaf is not None
    words = ept.words(leaf.table)
    words[leaf.index] = int(words[leaf.index]) & ~0x78 | NUMBERS[outer] << 3 | ignored << 6
    bench.guest.code(accesses("load"), 0x500000)
    bench.host()
    bench.enter(0x500000)
    bench.set(GUEST_IA32_PAT=NUMBERS["WB"] | NUMBERS[inner] << 8)
    bench.m[s.PAT] = NUMBERS["WB"] | NUMBERS[inner] << 8
    assert bench.engine.run(ops=10_000) == 4
    assert int(bench.m[s.STOP_A]) == 0x77

    effective = outer if ignored else TABLE[outer].split()[COLUMNS.index(inner)]
    found = from_dram(bench, "vm")
    assert found >= ROUNDS if effective in ("UC", "WC") else found < ROUNDS


def test_a_guest_with_caches_off_has_none_under_ept() -> None:
    found = []
    for off in (0, 1 << 30):
        bench = virtual()
        bench.guest.page(AT)
        bench.guest.code(accesses("load"), 0x500000)
        bench.host()
        bench.enter(0x500000)
        bench.m[s.CR0] |= off  # VM entries leave CD as it is
        assert bench.engine.run(ops=10_000) == 4
        found.append(from_dram(bench, "vm"))

    assert found[0] < ROUNDS <= found[1]


def test_eptp_says_whether_eptes_are_cached() -> None:
    served = []
    for eptp_type in (6, 0):
        bench = virtual({"ept_pwc.pde.entries": 0, "ept_pwc.pdpte.entries": 0, "nested_tlb.entries": 0})
        for n in range(4):
            bench.guest.page(AT + 0x1000 * n)
        bench.set(EPT_POINTER=bench.field("EPT_POINTER") & ~7 | eptp_type)

        def write(a: Assembler) -> None:
            for n in range(4):
                a.ld(s.RAX, o_mem(AT + 0x1000 * n))
            a.op(o.STOP_OP, imm=0x77)

        assert bench.run(write) == 4
        assert int(bench.m[s.STOP_A]) == 0x77
        block = bench.engine.arena[bench.engine.owners["vm"] :]
        assert block[k.EPT_REFERENCES] == block[k.EPT_L1D : k.EPT_DRAM + 1].sum()
        served.append((int(block[k.EPT_REFERENCES]), int(block[k.EPT_DRAM])))

    assert served[0][0] == served[1][0] == served[1][1] > served[0][1]


def test_a_large_page_that_is_not_cached_is_kept_in_pieces_and_all_go_together() -> None:
    """INVLPG of one address of it invalidates what its other addresses have."""
    bench = native()
    table = bench.space.table
    frames = [bench.engine.allocate() for _ in range(1536)]
    blocks = [frame for frame in frames if frame % 512 == 0][:2]
    flags = e.PTE_PRESENT | e.PTE_WRITE | pat_bits(3, large=True)
    for block, value in zip(blocks, (OLD, NEW), strict=True):
        table.map(LARGE, block, flags, 1)
        bench.engine.store((block << 12) + 0x5000, value)
    table.map(LARGE, blocks[0], flags, 1)
    leaf = table.find(LARGE)
    assert leaf is not None
    table.map(ENTRY, leaf.table, KERNEL_PAGE)

    def write(a: Assembler) -> None:
        for _ in range(2):
            a.ld(s.RBX, o_mem(LARGE + 0x3000))
            a.ld(s.RBX, o_mem(LARGE + 0x5000))
        a.mov(s.RAX, blocks[1] << 12 | flags | e.PTE_LARGE | e.PTE_ACCESSED)
        a.st(o_mem(ENTRY + 8 * leaf.index), s.RAX)
        a.ld(s.RDX, o_mem(LARGE + 0x5000))
        a.op(o.INVLPG, mem=o_mem(LARGE + 0x3000))
        a.ld(s.RBP, o_mem(LARGE + 0x5000))
        a.op(o.STOP_OP)

    assert bench.run(write) == 4
    assert [bench.reg(s.RBX), bench.reg(s.RDX), bench.reg(s.RBP)] == [OLD, OLD, NEW]
    assert from_dram(bench) >= 6  # each of the six loads


def test_what_a_tlb_holds_of_such_a_page_is_invalidated() -> None:
    bench = native()
    leaf = bench.space.table.find(DATA)
    assert leaf is not None
    extra = pat_bits(3)
    bench.space.table.words(leaf.table)[leaf.index] |= extra
    bench.space.table.map(ENTRY, leaf.table, KERNEL_PAGE)
    other = bench.space.page(0x6A0000)
    bench.space.put(DATA, OLD)
    bench.space.put(0x6A0000, NEW)
    entry = other << 12 | e.PTE_PRESENT | e.PTE_WRITE | extra

    def write(a: Assembler) -> None:
        a.ld(s.RBX, o_mem(DATA))
        a.ld(s.RBX, o_mem(DATA))
        a.mov(s.RAX, entry)
        a.st(o_mem(ENTRY + 8 * leaf.index), s.RAX)
        a.ld(s.RDX, o_mem(DATA))
        a.op(o.INVLPG, mem=o_mem(DATA))
        a.ld(s.RBP, o_mem(DATA))
        a.op(o.STOP_OP)

    assert bench.run(write) == 4
    assert [bench.reg(s.RBX), bench.reg(s.RDX), bench.reg(s.RBP)] == [OLD, OLD, NEW]
