"""What is true of every program, tried on random ones and on one that touches every op."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import DATA, Virtual, native, o_mem, profile
from tests.cpu.programs import HOW, bytes_of, loaded_at_random, loaded_with_every_op
from tests.cpu.test_coherence import sharing
from vtsim.base import jit
from vtsim.base import memory as mem
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import BUDGET, HORIZON, MODEL_FAULT, PROGRAM_END, TRACE_FULL, TRIPLE_FAULTED
from vtsim.cpu.kernels.data_pages import WORDS

EXAMPLES, LENGTH, OPS = (4, 30, 150) if jit.DISABLED else (60, 60, 3000)
END = 1_000_000  # a CPU may halt for good
# caches in which hardly anything stays
SMALL = {"cache.l1d.bytes": 8 * 64, "cache.l1d.ways": 2, "tlb.dtlb4k.entries": 4, "tlb.dtlb4k.ways": 2}
REMEMBERED = slice(s.DATA_PAGES, s.DATA_PAGES + s.DATA_PAGE_COUNT * WORDS)
seeds = st.integers(0, 2**32)


def finish(bench: Virtual, ops: int = OPS) -> int:
    return bench.engine.run(ops=ops, until=END)


def test_every_op_is_executed() -> None:
    bench = loaded_with_every_op()
    at = {i.at: i.op for space in (bench.space, bench.guest) for p in space.programs for i in p.instructions}
    seen: set[int] = set()
    stop = BUDGET
    for _ in range(4000):
        if stop == BUDGET:
            seen.add(at[int(bench.m[s.RIP])])
            stop = bench.engine.run(ops=1)

    assert (stop, int(bench.m[s.STOP_A])) == (PROGRAM_END, 5)
    assert [op.name for op in o.OPS if op.number < o.MOVE and op.number not in seen] == []  # the others: decoded code
    bench.engine.check_clock()


@settings(max_examples=EXAMPLES)
@given(seeds)
def test_cycles_by_name_sum_to_the_clock_and_no_program_raises(seed: int) -> None:
    bench = loaded_at_random(random.Random(seed), LENGTH)
    stop = finish(bench)
    bench.engine.check_clock()

    assert stop in (BUDGET, PROGRAM_END, TRIPLE_FAULTED, HORIZON, MODEL_FAULT, 10, 11, 12, 13)


@settings(max_examples=EXAMPLES)
@given(seeds)
def test_every_reference_of_a_dimension_is_served_by_one_level(seed: int) -> None:
    bench = loaded_at_random(random.Random(seed), LENGTH)
    finish(bench)
    for owner in bench.engine.owners.values():
        block = bench.engine.arena[owner:]
        assert block[k.GUEST_REFERENCES] == block[k.GUEST_L1D : k.GUEST_DRAM + 1].sum()
        assert block[k.EPT_REFERENCES] == block[k.EPT_L1D : k.EPT_DRAM + 1].sum()
    assert bench.engine.arena[bench.engine.owners["host"] + k.WALKS] > 0


@settings(max_examples=EXAMPLES)
@given(seeds)
def test_how_ops_are_counted_out_changes_no_byte(seed: int) -> None:
    chance = random.Random(seed)
    whole, cut = (loaded_at_random(random.Random(seed), LENGTH, SMALL if seed & 1 else None) for _ in range(2))
    stop = finish(whole)
    done = 0
    while done < OPS:
        step = min(chance.randint(1, 40), OPS - done)
        last = finish(cut, step)
        done += step - int(cut.m[s.OPS_LEFT])
        if last != BUDGET:
            break

    assert stop == last
    assert bytes_of(whole) == bytes_of(cut)


@settings(max_examples=EXAMPLES)
@given(seeds)
def test_pages_that_are_remembered_change_nothing(seed: int) -> None:
    known, searched = (loaded_at_random(random.Random(seed), LENGTH, SMALL) for _ in range(2))
    stop = finish(known)
    last = BUDGET
    left = OPS
    while left and last == BUDGET:
        last = finish(searched, 1)
        left -= 1 - int(searched.m[s.OPS_LEFT])
        searched.m[REMEMBERED] = 0
    known.m[REMEMBERED] = 0

    assert stop == last
    assert bytes_of(known) == bytes_of(searched)


@settings(max_examples=EXAMPLES)
@given(seeds)
def test_the_horizon_changes_no_byte(seed: int) -> None:
    chance = random.Random(seed)
    whole, cut = (loaded_at_random(random.Random(seed), LENGTH, SMALL if seed & 1 else None) for _ in range(2))
    end = 8_000 if jit.DISABLED else 60_000
    stop = whole.engine.run(until=end)
    last = HORIZON
    while last == HORIZON and int(cut.m[s.CYCLE]) < end:
        last = cut.engine.run(until=min(int(cut.m[s.CYCLE]) + chance.choice((1, 3, 50, 700, 5000)), end))

    assert stop == last
    assert bytes_of(whole) == bytes_of(cut)


@settings(max_examples=EXAMPLES)
@given(seeds)
def test_a_saved_state_continues_to_the_same_bytes(seed: int) -> None:
    bench = loaded_at_random(random.Random(seed), LENGTH)
    finish(bench, random.Random(seed).randint(1, OPS // 2))
    saved = bench.engine.save()
    ends = []
    for _ in range(2):
        stop = finish(bench, OPS // 2)
        ends.append((stop, bytes_of(bench)))
        bench.engine.restore(saved)

    assert ends[0] == ends[1]


PRICES = (
    "prices.MOV", "prices.ADD", "prices.LD", "prices.ST", "prices.JCC", "prices.EXCEPTION", "prices.IRET", "prices.CPUID",
    "transitions.vm_exit_cycles", "transitions.vm_entry_cycles", "tlb.stlb.hit_cycles", "pwc.hit_cycles", "dram.local_ns",
    "cache.l2.hit_cycles", "work.cycles_per_100_instructions",
)  # fmt: skip


@pytest.mark.parametrize("price", PRICES)
def test_raising_a_price_never_lowers_the_total(price: str) -> None:
    """Of a program without timers and clocks, so that both runs execute the same ops."""
    totals = []
    for more in (0, 13):
        value = profile().sourced(price).value
        assert isinstance(value, int)
        bench = native({price: value + more})
        chance = random.Random(5)

        def write(a, chance=chance):  # type: ignore[no-untyped-def]
            a.mov(s.RCX, 30)
            a.label("again")
            for _ in range(40):
                at = DATA + chance.randrange(0x7000) // 8 * 8
                chance.choice(
                    (
                        lambda at=at: a.ld(s.RBX, o_mem(at)),
                        lambda at=at: a.st(o_mem(at), s.RBX),
                        lambda: a.work(7),
                    )
                )()
            a.loop("again")
            a.op(o.STOP_OP)

        assert bench.run(write) == PROGRAM_END
        totals.append(int(bench.m[s.CYCLE]))

    assert totals[0] <= totals[1]


DIGEST = """
import random
from tests.cpu.test_laws import digest_of_runs
print(digest_of_runs())
"""


def digest_of_runs() -> str:
    """One digest of the states after every op once, and of a few random programs."""
    digest = hashlib.sha256()
    bench = loaded_with_every_op()
    stop = finish(bench, 4000)
    digest.update(repr(stop).encode())
    for part in bytes_of(bench, ()):
        digest.update(part)
    for seed in range(12):
        bench = loaded_at_random(random.Random(seed), 60)
        digest.update(repr(finish(bench, 400)).encode())
        for part in bytes_of(bench, ()):
            digest.update(part)
    for seed in range(6):
        several = sharing(seed)
        several.run(6000, quantum=100)
        for part in bytes_of(several, ()):
            digest.update(part)
    return digest.hexdigest()


@pytest.mark.compiled_only
@pytest.mark.slow
def test_interpreted_and_compiled_kernels_leave_the_same_bytes() -> None:
    result = subprocess.run(
        [sys.executable, "-c", DIGEST], env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert result.stdout.strip() == digest_of_runs()


def test_recording_transitions_changes_no_register_and_no_cycle() -> None:
    plain, traced = loaded_with_every_op(), loaded_with_every_op()
    traced.m[s.TRACE_ON] = 1
    traced.engine.arena[mem.A_TRACE_LIMIT] = 40  # drained often
    finish(plain, 4000)
    transitions = 0
    while (stop := finish(traced, 4000)) == TRACE_FULL:
        transitions += int(traced.engine.arena[mem.A_TRACE_LENGTH])
        traced.engine.arena[mem.A_TRACE_LENGTH] = 0
    traced.m[s.TRACE_ON] = 0

    assert (stop, int(traced.m[s.STOP_A])) == (PROGRAM_END, 5)
    assert transitions > 40
    assert [n for n in range(s.RECORD_SLOTS) if plain.m[n] != traced.m[n] and n not in HOW] == []


def test_two_runs_leave_the_same_bytes() -> None:
    ends = []
    for _ in range(2):
        bench = loaded_with_every_op()
        bench.engine.run(ops=200)
        ends.append(bytes_of(bench, ()))

    assert ends[0] == ends[1]
