"""What is remembered of pages of data is forgotten when the TLB or L1D that it stands for may no longer hold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.cpu.bench import DATA, KERNEL_STACK, TEXT, Native, native, o_mem
from tests.cpu.test_invalidation import ENTRY, NEW, OLD, two_frames
from vtsim.base.jit import quiet
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.kernels.access import access_as
from vtsim.cpu.kernels.data_pages import WORDS, place_of
from vtsim.cpu.kernels.rights import EXECUTE, READ, WRITE
from vtsim.ept.spec import PTE_NO_EXECUTE
from vtsim.ept.tables import KERNEL_PAGE

ROUNDS = 6
PF, PRESENT_USER = 14, 5


@pytest.mark.parametrize("bits", range(1, 37))
def test_areas_that_begin_alike_are_remembered_in_several_places(bits: int) -> None:
    """Stacks, tables and a hypervisor's areas lie at round addresses: low bits do not tell them apart."""
    places = {int(place_of((0xFFFF_8880_0000_0000 - (1 << 64) >> 12) + (n << bits))) for n in range(8)}

    assert len(places) >= 4
    assert all((place - s.DATA_PAGES) % WORDS == 0 for place in places)
    assert s.DATA_PAGES <= min(places) <= max(places) < s.DATA_PAGES + s.DATA_PAGE_COUNT * WORDS


def counted(bench: Native, counter: int) -> int:
    return int(bench.engine.arena[bench.engine.owners["host"] + counter])


def test_invlpg_is_seen_when_nothing_is_filled_any_more() -> None:
    """Code, entry and both pages are in all caches: the second time around only INVLPG says that anything changed."""
    bench = native()
    entry, at = two_frames(bench)
    at += 0x1000  # the same table again
    assert place_of(at >> 12) != place_of(DATA >> 12)
    leaf = bench.space.table.find(DATA)
    assert leaf is not None
    bench.space.table.map(ENTRY + 0x1000, leaf.table, KERNEL_PAGE)
    former = int(np.int64(bench.space.table.words(leaf.table)[leaf.index]))

    def write(a: Assembler) -> None:
        a.mov(s.RCX, ROUNDS)
        a.label("again")
        for register, value in ((s.RBX, former), (s.RBP, entry)):
            a.mov(s.RAX, value)
            a.st(o_mem(at), s.RAX)
            a.op(o.INVLPG, mem=o_mem(DATA))
            a.ld(register, o_mem(DATA))
            a.ld(register, o_mem(DATA))
        a.loop("again")
        a.op(o.STOP_OP)

    assert bench.run(write) == 4
    assert [bench.reg(s.RBX), bench.reg(s.RBP)] == [OLD, NEW]
    assert counted(bench, k.DTLB_MISSES) >= 2 * ROUNDS


def loads_of_each(offsets: Sequence[int]) -> Callable[[Assembler], None]:
    """A program that loads each place of DATA twice, one after the other, again and again."""

    def write(a: Assembler) -> None:
        a.mov(s.RCX, ROUNDS)
        a.label("again")
        for offset in offsets:
            a.ld(s.RAX, o_mem(DATA + offset))
            a.ld(s.RAX, o_mem(DATA + offset))
        a.loop("again")
        a.op(o.STOP_OP)

    return write


@pytest.mark.parametrize("pages", [4, 5])
def test_pages_beyond_the_tlb_miss_it_each_time(pages: int) -> None:
    bench = native({"tlb.dtlb4k.entries": 4, "tlb.dtlb4k.ways": 4})

    assert bench.run(loads_of_each([0x1000 * page for page in range(pages)])) == 4
    again = counted(bench, k.DTLB_MISSES) - pages
    assert again == 0 if pages <= 4 else again >= ROUNDS - 1


@pytest.mark.parametrize("lines", [2, 3])
def test_lines_beyond_l1d_miss_it_each_time(lines: int) -> None:
    bench = native({"cache.l1d.bytes": 128, "cache.l1d.ways": 2})
    bench.engine.cpus[0, s.WALKS_IN_L1D] = 0

    assert bench.run(loads_of_each([64 * line for line in range(lines)])) == 4
    missed = sum(counted(bench, counter) for counter in (k.DATA_L2, k.DATA_L2 + 1, k.DATA_L2 + 2))
    assert missed == lines if lines <= 2 else missed >= lines + ROUNDS - 1


@pytest.mark.parametrize("pushed", [1, 2])
def test_a_stack_that_ring_0_was_pushed_to_is_closed_to_ring_3(pushed: int) -> None:
    """The second event finds the stack where the first one left it: all that tells is who asks."""
    bench = native()
    bench.space.page(TEXT, user=False, write=False)
    bench.space.code(lambda a: a.op(o.IRET), TEXT)
    bench.space.code(lambda a: a.op(o.STOP_OP, imm=PF), TEXT + 0x1000)
    bench.space.gate(0x80, TEXT, dpl=3)
    bench.space.gate(PF, TEXT + 0x1000)

    def write(a: Assembler) -> None:
        for _ in range(pushed):
            a.op(o.INT, imm=0x80)
        a.ld(s.RAX, o_mem(KERNEL_STACK - 8))
        a.op(o.STOP_OP)

    bench.run(write, ring=3)

    assert int(bench.m[s.STOP_A]) == PF
    assert bench.space.get(bench.reg(s.RSP)) == PRESENT_USER


def test_a_page_that_was_read_is_not_fetched_against_its_nx() -> None:
    """As by a recorded guest on shadow tables, whose rows fetch nothing else."""
    bench = native()
    at = 0x900000
    bench.space.page(at, extra=PTE_NO_EXECUTE)
    bench.start(ring=3)
    accesses = (READ, READ, READ, EXECUTE, WRITE, WRITE, EXECUTE)
    with quiet():
        found = [int(access_as(bench.m, bench.engine.arena, bench.engine.tags, at, access, 1)) for access in accesses]

    assert [hpa < 0 for hpa in found] == [access == EXECUTE for access in accesses]


def test_another_process_at_the_same_address_has_a_page_of_its_own() -> None:
    """MOV to CR3 with PCIDs keeps everything, and the address means another frame."""
    bench = native()
    bench.space.page(TEXT, user=False, write=False)
    bench.space.put(DATA, OLD)
    root = bench.space.table.root
    other = bench.space.page(0x6A0000)
    bench.space.put(0x6A0000, NEW)
    second = bench.space.take()
    bench.space.table.words(second)[:] = bench.space.table.words(root)
    table = second
    for level in (4, 3, 2):  # a copy of the way to DATA
        index = (DATA >> (3 + 9 * level)) & 511
        copy = bench.space.take()
        words = bench.space.table.words(table)
        bench.space.table.words(copy)[:] = bench.space.table.words((int(words[index]) >> 12) & 0xF_FFFF_FFFF)
        words[index] = int(words[index]) & 0xFFF | copy << 12
        table = copy
    words = bench.space.table.words(table)
    words[(DATA >> 12) & 511] = other << 12 | KERNEL_PAGE

    def write(a: Assembler) -> None:
        a.op(o.MOV_FROM_CR, s.RDX, imm=4)
        a.alu(o.OR, s.RDX, 1 << 17)
        a.op(o.MOV_TO_CR, s.RDX, imm=4)
        a.mov(s.RCX, ROUNDS)
        a.label("again")
        for register, frame, pcid in ((s.RBX, root, 1), (s.RBP, second, 2)):
            a.mov(s.RAX, (frame << 12 | pcid | 1 << 63) - (1 << 64))
            a.op(o.MOV_TO_CR, s.RAX, imm=3)
            a.ld(register, o_mem(DATA))
        a.loop("again")
        a.op(o.STOP_OP)

    assert bench.run(write) == 4
    assert [bench.reg(s.RBX), bench.reg(s.RBP)] == [OLD, NEW]
