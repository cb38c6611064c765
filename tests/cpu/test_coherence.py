"""Lines that move between CPUs, against a model of who may hold what; and programs that share lines."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import DATA, NO_PREFETCHERS, NO_STREAMER, TEXT, Space, Write, machine, o_mem
from tests.cpu.programs import bytes_of
from tests.cpu.test_ipi import Pair
from vtsim.base import jit
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels import hooks, memory_hooks
from vtsim.cpu.kernels.caches import probe
from vtsim.cpu.kernels.coherence import NOBODY, PEER_NODE, PEER_WORDS, SHARED, has_line, owner_of
from vtsim.cpu.kernels.data_pages import WORDS
from vtsim.cpu.kernels.lines import data_line, read_line
from vtsim.cpu.kernels.rights import READ, WRITE

EXAMPLES = 15 if jit.DISABLED else 60
CPUS = 3
REMEMBERED = slice(s.DATA_PAGES, s.DATA_PAGES + s.DATA_PAGE_COUNT * WORDS)
TINY = {
    "cache.l1i.bytes": 0, "cache.l1d.bytes": 128, "cache.l1d.ways": 1, "cache.l2.bytes": 256, "cache.l2.ways": 2,
    "cache.l3.bytes": 0,
}  # fmt: skip
ROOM = {**TINY, "cache.l1i.bytes": 32 << 10}  # the directory has room for lines of code, which nobody fetches
accesses = st.lists(
    st.tuples(st.integers(0, CPUS - 1), st.sampled_from((READ, READ, WRITE)), st.integers(0, 5)), max_size=80
)


def cycles_of(engine: Engine, cpu: int, access: int, line: int) -> int:
    """Of an access, where memory serves any number at once."""
    engine.cpus[:, s.LINE_TIME] = 0
    return int(data_line(engine.cpus[cpu], engine.arena, engine.tags, line, access))


@given(accesses)
@settings(max_examples=EXAMPLES)
def test_caches_without_end_are_in_the_four_states(script: list[tuple[int, int, int]]) -> None:
    """Modified and exclusive, shared, invalid: nothing is ever pushed out, so that states say what each access costs."""
    engine = machine(NO_PREFETCHERS, cpus=CPUS)
    p = engine.profile
    l1, l3, dram = p.cache.l1d.hit_cycles, p.cache.l3.hit_cycles, p.cycles(p.dram.local_ns)
    moved = p.cycles(p.latency.transfer_ns)
    assert l1 < l3 < moved < dram
    states: dict[int, dict[int, str]] = {}

    for cpu, access, line in script:
        state = states.setdefault(line, {})
        others = {n: had for n, had in state.items() if n != cpu}
        if access == READ:
            if cpu in state:
                cost = l1
            elif not others:
                cost = dram
            else:
                cost = moved if "owned" in others.values() else l3
            if cpu not in state:
                states[line] = dict.fromkeys((*others, cpu), "shared") if others else {cpu: "owned"}
        else:
            cost = moved if others else l1 if cpu in state else dram
            states[line] = {cpu: "owned"}
        assert cycles_of(engine, cpu, access, 100 + line) == cost - l1, (cpu, access, line, state)


@pytest.mark.parametrize("streamer", [False, True])
@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=EXAMPLES)
def test_one_writes_or_many_read_whatever_is_pushed_out(streamer: bool, seed: int) -> None:
    """Caches of a few lines and a directory that is too small for what is touched: the law holds all the time.

    What a streamer fetches may push out the very line that was asked for.
    """
    engine = machine(TINY if streamer else {**TINY, **NO_STREAMER}, cpus=CPUS)
    a, t = engine.arena, engine.tags
    generator = random.Random(seed)
    for step in range(300):
        cpu, access, line = generator.randrange(CPUS), generator.choice((READ, WRITE)), generator.randrange(90)
        cycles_of(engine, cpu, access, line)
        owner = int(owner_of(engine.cpus[0], t, line))
        if not (streamer and owner == NOBODY):
            assert has_line(engine.cpus[cpu], a, t, cpu, line)
            assert access == READ or owner == cpu
        if step % 20:
            continue
        for each in range(90):
            owner = int(owner_of(engine.cpus[0], t, each))
            holders = {n for n in range(CPUS) if has_line(engine.cpus[0], a, t, n, each)}
            if owner == NOBODY:
                assert not holders
            elif owner != SHARED:
                assert holders <= {owner}


@pytest.mark.parametrize("behind", [0, 1, 48])
@pytest.mark.parametrize("access", [READ, WRITE])
def test_a_line_is_sent_no_earlier_than_it_was_taken(access: int, behind: int) -> None:
    """CPUs are ahead of each other by up to a quantum: who is behind gets what another has written when that is done."""
    engine = machine(cpus=CPUS)
    p = engine.profile
    moved = p.cycles(p.latency.transfer_ns) - p.cache.l1d.hit_cycles
    for cpu, cycle in enumerate((1000, 1000 - behind, 1000 - behind)):
        engine.cpus[cpu, s.CYCLE] = cycle
    cycles_of(engine, 0, WRITE, 1)

    assert cycles_of(engine, 1, access, 1) == moved + behind
    assert cycles_of(engine, 1, READ, 1) == 0
    engine.cpus[1, s.CYCLE] += moved + behind
    if access == READ:  # it comes from L3, and was not there before either
        assert cycles_of(engine, 2, READ, 1) == p.cache.l3.hit_cycles - p.cache.l1d.hit_cycles + behind
    else:
        assert cycles_of(engine, 2, READ, 1) == moved


def pushed_out(engine: Engine, cpu: int) -> None:
    """Fill a CPU's caches with other lines."""
    for line in range(1000, 1100):
        cycles_of(engine, cpu, READ, line)


def test_who_dropped_a_line_sends_none() -> None:
    engine = machine(ROOM, cpus=CPUS)
    p = engine.profile
    cycles_of(engine, 0, WRITE, 1)
    pushed_out(engine, 0)

    assert cycles_of(engine, 1, READ, 1) == p.cycles(p.dram.local_ns) - p.cache.l1d.hit_cycles
    assert int(owner_of(engine.cpus[0], engine.tags, 1)) == 1


def test_a_store_to_a_line_that_was_shared_asks_l3_though_nobody_else_has_it_any_more() -> None:
    engine = machine({**ROOM, "cache.l3.bytes": 64 << 10, "cache.l3.ways": 16}, cpus=CPUS)
    p = engine.profile
    for cpu in (0, 1):
        cycles_of(engine, cpu, READ, 1)
    pushed_out(engine, 0)

    assert cycles_of(engine, 1, WRITE, 1) == p.cache.l3.hit_cycles - p.cache.l1d.hit_cycles
    assert int(engine.arena[engine.owners["host"] + k.LINES_TAKEN]) == 0


def test_what_has_no_room_in_the_directory_any_more_is_not_remembered() -> None:
    """Page walks that begin at L2 fill no L1D, but the directory: a line that it loses leaves this CPU's L1D, too."""
    engine = machine({**TINY, "features.walks_in_l1d": False}, cpus=2)
    m, a, t = engine.cpus[0], engine.arena, engine.tags
    cycles_of(engine, 0, WRITE, 0)
    known = int(m[s.DATA_GENERATION])
    for line in range(2, 100, 2):
        read_line(m, a, t, line << 6, k.GUEST_L1D)

    assert not has_line(m, a, t, 0, 0)
    assert int(m[s.DATA_GENERATION]) > known


def test_the_directory_keeps_what_is_loaded_again_and_again() -> None:
    engine = machine(TINY, cpus=2)
    hot = 10  # the fifth way of its set
    for line in range(2, hot + 1, 2):
        cycles_of(engine, 0, READ, line)
    for first in range(100, 600, 6):
        for line in (first, first + 2, first + 4):
            cycles_of(engine, 0, READ, line)
        assert int(owner_of(engine.cpus[0], engine.tags, hot)) == 0
        assert not has_line(engine.cpus[0], engine.arena, engine.tags, 0, hot)
        cycles_of(engine, 0, READ, hot)


@pytest.mark.parametrize("transfer_ns", [0, 1])
def test_lines_that_move_in_no_time_are_counted(transfer_ns: int) -> None:
    engine = machine({"latency.transfer_ns": transfer_ns}, cpus=2)
    p = engine.profile
    for cpu in (0, 1, 0):
        cycles_of(engine, cpu, WRITE, 1)
    cycles_of(engine, 1, READ, 1)
    host = engine.owners["host"]

    assert cycles_of(engine, 0, READ, 1) == 0
    assert [int(engine.arena[host + counter]) for counter in (k.LINES_TAKEN, k.LINES_FROM_OTHERS)] == [2, 1]
    assert cycles_of(engine, 1, WRITE, 1) == p.cache.l3.hit_cycles - p.cache.l1d.hit_cycles


@pytest.mark.parametrize("access", [READ, WRITE])
def test_a_line_that_moves_is_in_l3_again(access: int) -> None:
    engine = machine({"cache.l3.bytes": 2 * 64, "cache.l3.ways": 2}, cpus=CPUS)
    p = engine.profile
    cycles_of(engine, 0, WRITE, 1)
    for line in range(2, 6):
        cycles_of(engine, 2, READ, line)  # push it out of L3, not of CPU 0's caches

    assert cycles_of(engine, 1, access, 1) == p.cycles(p.latency.transfer_ns) - p.cache.l1d.hit_cycles
    assert probe(engine.cpus[2], engine.tags, s.L3, 1)


def test_the_place_of_a_line_that_was_taken_is_filled_first() -> None:
    engine = machine({**TINY, "cache.l1d.bytes": 256, "cache.l1d.ways": 4}, cpus=2)
    for line in (1, 2, 3):
        cycles_of(engine, 0, WRITE, line)
    cycles_of(engine, 1, WRITE, 2)
    for line in (4, 5):
        cycles_of(engine, 0, READ, line)

    assert all(has_line(engine.cpus[0], engine.arena, engine.tags, 0, line) for line in (1, 3))


def test_a_node_away_takes_longer() -> None:
    engine = machine(cpus=4, memory=64 << 20)
    for number, node in enumerate((0, 0, 1, 1)):
        engine.arena[int(engine.cpus[0][s.PEERS]) + PEER_WORDS * number + PEER_NODE] = node
    p = engine.profile
    l1 = p.cache.l1d.hit_cycles

    for taker, ns in ((1, p.latency.transfer_ns), (2, p.latency.remote_transfer_ns)):
        cycles_of(engine, 0, WRITE, 100)
        assert cycles_of(engine, taker, WRITE, 100) == p.cycles(ns) - l1


def test_one_cpu_has_no_directory() -> None:
    engine = machine()
    assert int(engine.cpus[0][s.PEERS]) == 0
    assert cycles_of(engine, 0, READ, 100) > 0
    assert cycles_of(engine, 0, WRITE, 100) == 0


def together(*writes: Write, changes: dict[str, Any] | None = None, threads: int = 1) -> Pair:
    """CPUs in one address space, each with a program of its own."""
    engine = machine(changes, cpus=len(writes), threads=threads)
    space = Space(engine)
    pair = Pair(engine, [space] * len(writes))
    for cpu, write in enumerate(writes):
        space.code(write, TEXT + 0x2000 * cpu)
        m = engine.cpus[cpu]
        for slot, value in space.state(TEXT + 0x2000 * cpu).items():
            m[slot] = value
        m[s.GPR + s.RSP] = space.stack(0) - 0x400 * cpu
        m[s.PRIVILEGE] = o.R0
        engine.sync(cpu)
    return pair


def counted(pair: Pair, counter: int) -> int:
    return int(pair.engine.arena[pair.engine.owners["host"] + counter])


def adds(offset: int, rounds: int, gap: int) -> Write:
    """A program that adds one to a word again and again, with ordinary instructions between."""

    def write(a: Assembler) -> None:
        a.mov(s.RCX, rounds)
        a.label("again")
        a.ld(s.RAX, o_mem(DATA + offset))
        a.add(s.RAX, 1)
        a.st(o_mem(DATA + offset), s.RAX)
        a.work(gap)
        a.loop("again")
        a.op(o.HLT)

    return write


def stores(a: Assembler) -> None:
    """A program that stores to one word without end."""
    a.label("again")
    a.st(o_mem(DATA), s.RAX)
    a.jmp("again")


def looks_at(times: int) -> Write:
    """A program that loads this word now and then."""

    def write(a: Assembler) -> None:
        a.mov(s.RCX, times)
        a.label("again")
        a.ld(s.RAX, o_mem(DATA))
        a.work(3000)
        a.loop("again")
        a.op(o.HLT)

    return write


@pytest.mark.parametrize("apart", [8, 64], ids=["one line", "two lines"])
def test_words_of_one_line_are_shared_falsely(apart: int) -> None:
    """Each round takes the line from the other CPU, though no word is shared; a line for each, and none moves."""
    rounds = 50
    pair = together(adds(0, rounds, 1000), adds(apart, rounds, 1000))
    pair.run(200_000)

    assert [pair.spaces[0].get(DATA + offset) for offset in (0, apart)] == [rounds, rounds]
    moved = counted(pair, k.LINES_FROM_OTHERS), counted(pair, k.LINES_TAKEN)
    if apart == 64:
        assert max(moved) <= 12  # entries of page tables for two pages, which both walks read, and flags
    else:
        assert rounds <= moved[0] + 1 <= 3 * rounds
        assert rounds <= moved[1] + 1 <= 2 * rounds + 4


def test_a_store_after_another_cpu_looked_waits_though_the_page_is_remembered() -> None:
    """The writer's page and line are remembered as its own; one look of the other CPU, and the next store takes it back."""
    looks = 7

    pair = together(stores, looks_at(looks))
    pair.run(80_000)
    before = counted(pair, k.LINES_TAKEN)
    pair.run(100_000)

    assert counted(pair, k.LINES_TAKEN) == before  # nobody looks any more
    assert looks <= before <= looks + 3


def test_a_load_after_another_cpu_stored_waits_though_the_page_is_remembered() -> None:
    """The reader's line is remembered as found; each store of the other CPU takes it away."""
    stores = 7

    def reader(a: Assembler) -> None:
        a.label("again")
        a.ld(s.RAX, o_mem(DATA))
        a.jmp("again")

    def writer(a: Assembler) -> None:
        a.mov(s.RCX, stores)
        a.label("again")
        a.st(o_mem(DATA), s.RCX)
        a.work(3000)
        a.loop("again")
        a.op(o.HLT)

    pair = together(reader, writer)
    pair.run(1500)  # both programs are in the caches
    before = counted(pair, k.LINES_FROM_OTHERS)
    pair.run(80_000)

    assert counted(pair, k.LINES_FROM_OTHERS) - before in (stores - 1, stores)


SOURCE, TARGETS = DATA + 0x2000, DATA + 0x3000
LINES_OF_A_PAGE = 64


@pytest.mark.parametrize("number", [hooks.PAGE_COPY, memory_hooks.PAGE_SUM], ids=["copied", "summed up"])
def test_a_page_that_many_read_over_is_taken_from_nobody(number: int) -> None:
    rounds = 5

    def reader(cpu: int) -> Write:
        def write(a: Assembler) -> None:
            source = s.RSI if number == hooks.PAGE_COPY else s.RDI
            a.mov(s.RDI, TARGETS + 0x1000 * cpu)
            a.mov(source, SOURCE)
            a.mov(s.RCX, rounds)
            a.label("again")
            a.hook(number)
            a.loop("again")
            a.op(o.HLT)

        return write

    pair = together(reader(0), reader(1))
    pair.run(150_000, quantum=200)

    assert [int(m[s.GPR + s.RCX]) for m in pair.cpus] == [0, 0]
    assert counted(pair, k.LINES_FROM_OTHERS) >= LINES_OF_A_PAGE
    assert counted(pair, k.LINES_TAKEN) <= 8  # entries of tables, whose flags are set


def at_random(chance: random.Random) -> Write:
    """A program without end of loads, stores and sums over lines that others use as well, a few and many."""
    r1 = (s.RAX, s.RBX, s.RDX)

    def write(a: Assembler) -> None:
        a.label("again")
        for _ in range(40):
            few = chance.random() < 0.7
            at = DATA + (chance.randrange(4) * 0x1040 + chance.randrange(8) * 8 if few else chance.randrange(4096) * 8)
            op = chance.choice((o.LD, o.LD, o.ST, o.XADD))
            a.emit(op, chance.choice(r1), mem=o_mem(at), length=2)
            if chance.random() < 0.05:
                a.mov(s.RDI, DATA + 0x1000 * chance.randrange(8))
                a.hook(memory_hooks.PAGE_SUM)
            a.work(chance.randrange(20))
        a.jmp("again")

    return write


def sharing(seed: int) -> Pair:
    """CPUs that run such programs, in caches of many shapes."""
    chance = random.Random(seed)
    code = {"cache.l1i.bytes": 1024, "cache.l1i.ways": 4}
    larger = {"cache.l1d.bytes": 512, "cache.l1d.ways": 4, "cache.l2.bytes": 1024, "cache.l2.ways": 4}
    shape = chance.choice((TINY | code, TINY | code | larger, {}))
    walks = {"features.walks_in_l1d": chance.random() < 0.5}
    return together(*(at_random(chance) for _ in range(CPUS)), changes={**shape, **walks})


@given(st.integers(0, 1 << 30))
@settings(max_examples=4 if jit.DISABLED else 40)
def test_pages_that_are_remembered_change_nothing_where_lines_move(seed: int) -> None:
    """Some ops of one CPU, then of another: at a time, or each with nothing remembered."""
    chance = random.Random(seed)
    known, searched = sharing(seed), sharing(seed)
    for _ in range(30):
        cpu, ops = chance.randrange(CPUS), chance.randint(1, 15 if jit.DISABLED else 150)
        known.engine.run(cpu, ops=ops)
        for _ in range(ops):
            searched.engine.run(cpu, ops=1)
            searched.cpus[cpu, REMEMBERED] = 0
    for pair in (known, searched):
        pair.cpus[:, REMEMBERED] = 0

    assert bytes_of(known) == bytes_of(searched)


@pytest.mark.slow
@pytest.mark.parametrize("quantum", [16, 49])
def test_who_pauses_sees_a_store_with_the_same_look_whatever_the_quantum(quantum: int) -> None:
    """A CPU ahead by a part of a pause would have its store seen by a look before it, a whole pause too early."""

    def waiter(a: Assembler) -> None:
        a.label("again")
        a.ld(s.RAX, o_mem(DATA))
        a.test(s.RAX, register=s.RAX)
        a.jcc(o.CC_NZ, "seen")
        a.op(o.PAUSE)
        a.jmp("again")
        a.label("seen")
        a.op(o.RDTSC)
        a.op(o.HLT)

    def seen_at(work: int, quantum: int) -> int:
        def storer(a: Assembler) -> None:
            a.work(work)
            a.mov(s.RAX, 1)
            a.st(o_mem(DATA), s.RAX)
            a.op(o.HLT)

        pair = together(storer, waiter)
        pair.run(20_000, quantum)
        return int(pair.cpus[1][s.GPR + s.RAX])

    works = range(6000, 6300, 7)  # two rounds of the loop, whatever a look is when the store is done
    assert [seen_at(work, quantum) for work in works] == [seen_at(work, 1) for work in works]
