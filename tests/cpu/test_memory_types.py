"""Memory that no cache holds: by PAT and by EPT, and what accesses to it, walks of tables in it and fetches take.

SDM: "EPT and Memory Typing"; "Memory Type Used for Translated Guest-Physical Addresses"; "Memory Type Used for Accessing
EPT Paging Structures"; "Paging and Memory Typing When the PAT is Supported (Pentium III and More Recent Processor
Families)"; "Caching Paging-Related Information about Memory Typing"; "Methods of Caching Available".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import DATA, NO_PREFETCHERS, OFF, TEXT, Native, Virtual, Write, machine, native, o_mem, virtual
from tests.cpu.test_invalidation import ENTRY, NEW, OLD
from vtsim.base import jit
from vtsim.base import memory as mem
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Program
from vtsim.cpu.codes import BUDGET
from vtsim.cpu.kernels import invalidate
from vtsim.cpu.kernels.ept_walk import ABANDONED
from vtsim.cpu.kernels.translate import translate
from vtsim.ept import spec as e
from vtsim.ept.tables import EPT, EPT_PAGE, KERNEL_PAGE, host_table

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


def set_outer(bench: Virtual, gva: int, kind: str, ignored: bool) -> None:
    """Give the page of an address a type in EPT, and say whether PAT is ignored."""
    page, ept = bench.guest.table.find(gva), bench.guest.ept
    assert page is not None and ept is not None
    leaf = ept.find(page.frame << 12)
    assert leaf is not None
    words = ept.words(leaf.table)
    words[leaf.index] = int(words[leaf.index]) & ~0x78 | NUMBERS[kind] << 3 | ignored << 6


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
    bench.guest.page(AT, extra=pat_bits(1))
    set_outer(bench, AT, outer, ignored)
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


# --- tables ---------------------------------------------------------------------------------------------------------------

WALKS_AGAIN = {name: value for name, value in OFF.items() if "tlb.dtlb" in name or "tlb.stlb" in name}
NO_PWC = {name: value for name, value in OFF.items() if name.startswith("pwc.")}
MODES = {"5 levels": 5, "4 levels": 4, "PAE": 2, "32-bit": 2}  # tables whose entries a walk reads


@define
class Chain:
    """One table at each level, all by entry 0, to a page; the types that are given to each are what a walk may see."""

    mode: str
    nested: bool
    changes: dict[str, Any]
    engine: Any = field(init=False)
    frames: list[int] = field(init=False)  # of tables from the root down, and the page
    eptes: dict[int, tuple[int, int]] = field(factory=dict)  # of each: table of EPT and index

    def __attrs_post_init__(self) -> None:
        self.engine = machine(self.changes)
        self.frames = [self.engine.allocate() for _ in range(MODES[self.mode] + 1)]
        for frame in self.frames:
            self.engine.contents(frame, mem.TABLE)
        m = self.m
        m[s.CR0], m[s.EFER] = 0x80050033, 0xD01 if "levels" in self.mode else 0
        m[s.CR4] = {"5 levels": 0x1020, "4 levels": 0x20, "PAE": 0x20, "32-bit": 0}[self.mode]
        m[s.PRIVILEGE] = o.N0 if self.nested else o.R0
        if self.nested:
            ept = host_table(self.engine, EPT)
            for frame in self.frames:
                ept.map(frame << 12, frame, EPT_PAGE)
                leaf = ept.find(frame << 12)
                assert leaf is not None
                self.eptes[frame] = leaf.table, leaf.index
            m[s.NONROOT], m[s.VPID], m[s.EPTP] = 1, 1, ept.root << 12 | 0x1E

    @property
    def m(self) -> Any:
        return self.engine.cpus[0]

    def lead(self, bits: Sequence[int]) -> None:
        """Give PWT and PCD to what leads to each table."""
        for number, (frame, kind) in enumerate(zip(self.frames, bits, strict=False)):
            if number:
                flags = e.PTE_PRESENT | e.PTE_WRITE | e.PTE_ACCESSED | e.PTE_DIRTY
                self.engine.store(self.frames[number - 1] << 12, frame << 12 | flags | kind << 3)
            elif self.mode == "PAE":
                self.m[s.PDPTE0] = frame << 12 | kind << 3 | e.PTE_PRESENT
            else:
                self.m[s.CR3] = frame << 12 | kind << 3
        self.engine.sync()

    def walk(self) -> Counter[str]:
        """Translate address 0, and what served the guest's entries."""
        names = {k.GUEST_L1D: "L1D", k.GUEST_L2: "L2", k.GUEST_L3: "L3", k.GUEST_DRAM: "DRAM"}
        counts = self.engine.arena[self.engine.owners["host"] :]
        before = {at: int(counts[at]) for at in names}
        with jit.quiet():
            got = int(translate(self.m, self.engine.arena, self.engine.tags, np.int64(0), 0, 0))
        assert got == self.frames[-1] << 12
        self.m[s.UNCACHED] = 0
        return Counter({name: int(counts[at]) - before[at] for at, name in names.items() if counts[at] > before[at]})


def not_cached(pat: Sequence[str], bits: int, outer: tuple[str, bool] | None) -> bool:
    """Is a table not cached that is led to with these bits, and lies in a page that EPT gives a type, or ignores PAT."""
    kind = pat[bits]
    if outer is not None:
        kind = outer[0] if outer[1] else TABLE[outer[0]].split()[COLUMNS.index(kind)]
    return kind in ("UC", "UC-", "WC")


def set_pat(chain: Chain, pat: Sequence[str]) -> None:
    chain.m[s.PAT] = mem.signed(sum(NUMBERS[kind] << 8 * n for n, kind in enumerate(pat)))


@pytest.mark.parametrize("nested", [False, True], ids=["native", "behind EPT"])
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=10 if jit.DISABLED else 60)
@given(data=st.data())
def test_a_table_is_cached_as_pat_says_of_what_leads_to_it(mode: str, nested: bool, data: st.DataObject) -> None:
    levels = MODES[mode]
    pat = data.draw(st.lists(st.sampled_from(COLUMNS), min_size=8, max_size=8))
    bits = data.draw(st.lists(st.integers(0, 3), min_size=levels, max_size=levels))
    types = st.tuples(st.sampled_from(list(TABLE)), st.booleans())
    outer = data.draw(st.lists(types, min_size=levels, max_size=levels)) if nested else [None] * levels
    expected = [not_cached(pat, its, there) for its, there in zip(bits, outer, strict=True)]
    for pwc in ({}, NO_PWC):
        chain = Chain(mode, nested, {**WALKS_AGAIN, **pwc})
        chain.lead([*bits, 0])
        set_pat(chain, pat)
        for frame, there in zip(chain.frames, outer, strict=False):
            if there is not None:
                table, index = chain.eptes[frame]
                chain.engine.contents(table, mem.TABLE)[index] = (
                    frame << 12 | e.EPT_RWX | NUMBERS[there[0]] << 3 | there[1] << 6
                )

        chain.walk()
        read = expected if pwc else expected[-1:]  # the PDE cache leads to the last table at once
        found = chain.walk()

        assert found == +Counter({"DRAM": sum(read), "L1D": len(read) - sum(read)})


def test_a_table_that_a_walk_cache_leads_to_has_the_type_that_it_had() -> None:
    chain = Chain("4 levels", False, WALKS_AGAIN)
    chain.lead([0, 0, 0, 0, 0])
    chain.walk()
    chain.lead([3, 3, 3, 3, 0])
    assert chain.walk() == {"L1D": 1}
    with jit.quiet():
        invalidate.drop_page(chain.m, chain.engine.arena, chain.m[s.CONTEXT_KEY], np.int64(0))
    assert chain.walk() == {"DRAM": 4}
    assert chain.walk() == {"DRAM": 1}


def test_with_pcids_the_low_bits_of_cr3_are_none_of_a_type() -> None:
    """PCID 3 << 3 has the bits that are PWT and PCD otherwise."""
    for pcide, served in ((1 << 17, {"L1D": 4}), (0, {"DRAM": 1, "L1D": 3})):
        chain = Chain("4 levels", False, {**WALKS_AGAIN, **NO_PWC})
        chain.m[s.CR4] |= pcide
        chain.lead([3, 0, 0, 0, 0])
        chain.walk()
        assert chain.walk() == served


def test_a_guest_with_caches_off_reads_its_tables_from_memory_under_ept() -> None:
    chain = Chain("4 levels", True, {**WALKS_AGAIN, **NO_PWC})
    chain.lead([0, 0, 0, 0, 0])
    chain.walk()
    assert chain.walk() == {"L1D": 4}
    chain.m[s.CR0] |= 1 << 30
    assert chain.walk() == {"DRAM": 4}


@pytest.mark.parametrize("nested", [False, True], ids=["native", "behind EPT"])
def test_no_wrong_path_reads_a_table_that_is_not_cached(nested: bool) -> None:
    chain = Chain("4 levels", nested, {**WALKS_AGAIN, **NO_PWC})
    for bits, abandoned in ((0, False), (3, True)):
        chain.lead([0, 0, bits, 0, 0])
        chain.m[s.SPECULATIVE] = 1
        before = int(chain.engine.arena[chain.engine.owners["host"] + k.GUEST_REFERENCES])
        with jit.quiet():
            got = int(translate(chain.m, chain.engine.arena, chain.engine.tags, np.int64(0), 0, 0))
        chain.m[s.SPECULATIVE] = 0
        read = int(chain.engine.arena[chain.engine.owners["host"] + k.GUEST_REFERENCES]) - before

        assert (got, read) == ((ABANDONED, 2) if abandoned else (chain.frames[-1] << 12, 4))


# --- code -------------------------------------------------------------------------------------------------------------------

CODE = 0x700000


def coded(write: Write, extra: int, *, step: int = 10_000) -> tuple[Native, Program]:
    """A program in pages of a type, run so many ops at a time; what came of it."""
    bench = native()
    for page in range(4):
        bench.space.page(CODE + 0x1000 * page, user=False, write=False, extra=extra)
    program = bench.space.code(write, CODE)
    bench.start(CODE)
    while (code := bench.engine.run(ops=step)) == BUDGET:
        pass
    assert code == 4
    bench.engine.check_clock()
    return bench, program


def fetched(bench: Native) -> int:
    return int(bench.engine.arena[bench.engine.owners["host"] + k.FETCH_L2 + 2])


def there_and_back(rounds: int, distance: int) -> Write:
    """Jumps to and fro between two places of code."""

    def write(a: Assembler) -> None:
        a.mov(s.RCX, rounds)
        a.jmp("there")
        a.align(64)
        a.label("back")
        a.jmp("there")
        for _ in range(distance // 64):
            a.align(64)
            a.op(o.NOP)
        a.align(64)
        a.label("there")
        a.loop("back")
        a.op(o.STOP_OP, imm=1)

    return write


def lines_of(program: Program, rounds: int) -> int:
    """How often the next op of `there_and_back` stands in another line than the one before it."""
    by_address = {each.at: each for each in program.instructions}
    back, there = program.labels["back"], program.labels["there"]
    loop = by_address[there]
    path = [CODE, CODE + by_address[CODE].length, *[there, back] * (rounds - 1), there, loop.end]
    lines = [line for at in path for line in range(at >> 6, (by_address[at].end - 1 >> 6) + 1)]
    return sum(now != before for before, now in zip([-1, *lines], lines, strict=False))


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("distance", [0, 0x1000])  # in one page; in two
def test_code_that_is_not_cached_is_fetched_whenever_control_comes_to_a_line(index: int, distance: int) -> None:
    (bench, program), (cached, _) = (coded(there_and_back(ROUNDS, distance), pat_bits(n)) for n in (index, 0))
    uncached = DEFAULT_PAT[index] in ("UC", "UC-")
    times = lines_of(program, ROUNDS)

    assert times >= 2 * ROUNDS
    assert fetched(cached) < ROUNDS
    assert fetched(bench) == (times if uncached else fetched(cached))
    if uncached:
        beyond = int(bench.m[s.DRAM_CYCLES] - bench.m[s.L1I + s.LATENCY])
        stalled = [int(each.engine.arena[each.engine.owners["host"] + o.FETCH_STALL]) for each in (bench, cached)]
        assert stalled[0] == times * beyond
        assert stalled[1] <= (fetched(cached) + 8) * beyond


def test_a_loop_within_a_line_is_fetched_once() -> None:
    def write(a: Assembler) -> None:
        a.mov(s.RCX, 50)
        a.jmp("again")
        a.align(64)
        a.label("again")
        a.loop("again")
        a.op(o.STOP_OP, imm=1)

    assert fetched(coded(write, pat_bits(3))[0]) == 2


@pytest.mark.parametrize("step", [1, 3])
def test_where_a_run_is_cut_changes_nothing_of_it(step: int) -> None:
    write = there_and_back(ROUNDS, 0x1000)
    whole, _ = coded(write, pat_bits(3))
    cut, _ = coded(write, pat_bits(3), step=step)

    assert (fetched(cut), int(cut.m[s.CYCLE])) == (fetched(whole), int(whole.m[s.CYCLE]))


def test_code_and_data_that_follow_code_that_is_not_cached_are() -> None:
    """Whether a page is cached is known of each fetch, by the walk, by each TLB, and of no access that follows."""

    def write(a: Assembler) -> None:
        a.mov(s.RCX, ROUNDS)
        a.ld(s.RAX, o_mem(DATA))
        a.jmp(CODE + 0x1000)

    def further(a: Assembler) -> None:
        for line in range(3):
            for _ in range(2):
                a.ld(s.RAX, o_mem(DATA + 64 * (line + 1)))
        a.op(o.STOP_OP, imm=1)

    found = []
    for extra in (0, pat_bits(3)):
        bench = native(NO_PREFETCHERS)
        for page in (CODE, CODE + 0x1000):
            bench.space.page(page, user=False, write=False, extra=extra)
        bench.space.code(write, CODE)
        bench.space.code(further, CODE + 0x1000)
        bench.start(CODE)
        assert bench.engine.run(ops=1000) == 4
        found.append(from_dram(bench))

    assert found == [4, 4]


def test_a_cached_subroutine_of_code_that_is_not_cached_is_fetched_once() -> None:
    def write(a: Assembler) -> None:
        a.mov(s.RCX, ROUNDS)
        a.label("again")
        a.call(TEXT)
        a.loop("again")
        a.op(o.STOP_OP, imm=1)

    bench = native()
    bench.space.code(lambda a: a.ret(), TEXT)
    bench.space.page(CODE, user=False, write=False, extra=pat_bits(3))
    bench.space.code(write, CODE)
    bench.start(CODE)

    assert bench.engine.run(ops=1000) == 4
    assert fetched(bench) == 2  # a line of each: the one that was fetched last of such memory is not left by others


def test_ept_says_whether_code_is_cached() -> None:
    found = []
    for kind, ignored in (("WB", 0), ("UC", 0), ("UC", 1), ("WB", 1)):
        bench = virtual()
        bench.guest.page(CODE, extra=pat_bits(3) if ignored else 0)
        bench.guest.code(there_and_back(ROUNDS, 0), CODE)
        set_outer(bench, CODE, kind, ignored)
        bench.host()
        bench.enter(CODE)
        assert bench.engine.run(ops=10_000) == 4
        found.append(int(bench.engine.arena[bench.engine.owners["vm"] + k.FETCH_L2 + 2]))

    assert found[0] == found[3] < ROUNDS < 2 * ROUNDS <= found[1] == found[2]
