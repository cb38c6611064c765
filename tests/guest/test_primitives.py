"""Does each primitive execute what it says, as often as it says?"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.guest.conftest import native
from tests.guest.test_kernel import WAY_OUT, ended
from vtsim.base.memory import TABLE
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.ept.tables import PAGING, Table
from vtsim.guest import spec as g
from vtsim.guest.address_space import address_space
from vtsim.guest.kernel.layout import REGIONS
from vtsim.guest.primitives import lowerings
from vtsim.guest.primitives.memory import QUANTILES, zipf_table
from vtsim.guest.programs import Stages, process_text

KIB, MIB, PAGE = 1 << 10, 1 << 20, 4096


def test_every_primitive_has_a_program_or_is_a_guest_of_its_own() -> None:
    assert set(g.primitives.values()) - set(lowerings) == {g.ReplaySpec}


# Instructions of one round, and before the first.
LOOPS = [
    (g.CpuidSpec, {}, 5, 1),
    (g.RdtscSpec, {}, 2, 1),
    (g.PauseSpec, {}, 2, 1),
    (g.SyscallSpec, {"work": 0}, 4, 2),
    (g.ContextSwitchSpec, {}, 4, 1),
]
KERNEL_LOOPS = [
    (g.RdmsrSpec, {"msr": 0x3B}, 3),
    (g.WrmsrSpec, {"msr": 0x3B}, 3),
    (g.PortInSpec, {"port": 0x80}, 2),
    (g.PortOutSpec, {"port": 0x80}, 2),
    (g.MovFromCr8Spec, {}, 2),
    (g.MovToCr8Spec, {"value": 3}, 2),
    (g.MovToCr3Spec, {}, 2),
]


@pytest.mark.parametrize(("spec", "settings", "each", "before"), LOOPS)
def test_a_round_is_the_instruction_and_its_loop(
    spec: type[g.Phase], settings: dict[str, int], each: int, before: int
) -> None:
    rounds = 7
    harness = ended(native((spec(iterations=rounds, **settings),)))  # type: ignore[call-arg]
    assert harness.instructions(o.R3) == before + rounds * each + WAY_OUT


@pytest.mark.parametrize(("spec", "settings", "each"), KERNEL_LOOPS)
def test_a_round_in_ring_0_is_the_instruction_and_its_loop(
    spec: type[g.Phase], settings: dict[str, int], each: int
) -> None:
    few, many = (
        ended(native((spec(iterations=n, **settings),))).instructions(o.R0)  # type: ignore[call-arg]
        for n in (3, 10)
    )
    assert many - few == 7 * each


def test_the_kernel_spends_what_a_system_call_says() -> None:
    few, many = (ended(native((g.SyscallSpec(iterations=5, work=work),))).instructions(o.R0) for work in (0, 1000))
    assert many - few == 5 * 1000


@pytest.mark.parametrize("pattern", g.PATTERNS)
def test_a_stream_makes_as_many_accesses_as_asked_for(pattern: str) -> None:
    few, many = (
        ended(native((g.StreamSpec(pattern=pattern, region=64 * KIB, accesses=n, work=3),), populate="prebuilt"))
        for n in (100, 300)
    )
    assert many.count(k.ACCESSES) - few.count(k.ACCESSES) == 200
    assert many.instructions(o.R3) - few.instructions(o.R3) == 200 * (1 + 3)


def test_a_stream_with_much_work_between_accesses_executes_all_of_it() -> None:
    work = 100_000
    few, many = (
        ended(native((g.StreamSpec(region=PAGE, accesses=n, work=work),), populate="prebuilt")) for n in (1, 3)
    )
    assert many.count(k.ACCESSES) - few.count(k.ACCESSES) == 2
    rest = (many.instructions(o.R3) - few.instructions(o.R3)) - 2 * (1 + work)
    assert rest == 2 * 4  # two MOV of counts, SUB, Jcc


@pytest.mark.parametrize("instructions", [100, 700])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("pattern", g.PATTERNS)
def test_a_mix_executes_exactly_its_instructions(pattern: str, share: float, instructions: int) -> None:
    phase = g.MixSpec(instructions=instructions, memory=share, pattern=pattern, region=32 * KIB)
    harness = ended(native((phase,), populate="prebuilt"))
    assert 2 <= harness.instructions(o.R3) - instructions - WAY_OUT <= 3  # MOVs of the registers


def test_a_mix_has_the_share_of_memory_accesses_asked_for() -> None:
    few, many = (ended(native((g.MixSpec(instructions=n, memory=0.3),), populate="prebuilt")) for n in (6_000, 18_000))
    accesses = many.count(k.ACCESSES) - few.count(k.ACCESSES)
    assert accesses / 12_000 == pytest.approx(0.3, abs=0.005)


def test_a_mix_has_at_most_8_instructions_in_a_row_without_an_operation_of_their_own() -> None:
    harness = native((g.MixSpec(instructions=5000, memory=0.02),))
    guest = harness.vm.guest
    bases = address_space(guest.processes[0], guest.kernel, 1, True).by_thread
    stages = Stages(profile=harness.profile, seed=1, scaled=lambda n: n, place_table=lambda table: 0)
    text = process_text(guest, 0, bases, stages)
    assert max(i.imm for i in text.instructions if i.op == o.WORK) == 8


def test_work_scale_multiplies_rounds() -> None:
    harness = ended(native((g.RdtscSpec(iterations=10),), work_scale=2.5))
    assert harness.instructions(o.R3) == 1 + 25 * 2 + WAY_OUT


@pytest.mark.parametrize("theta", [0.0, 0.5, 0.99, 1.0, 1.5])
def test_a_zipf_table_follows_the_law(theta: float) -> None:
    lines = 4096
    table = zipf_table(lines * 64, theta)
    assert table[0] == 0
    assert table[-1] == lines
    assert (np.diff(table) >= 0).all()
    rank = np.arange(1, lines + 1, dtype=float)
    law = np.cumsum(rank**-theta) / np.sum(rank**-theta)
    for share in (0.5, 0.75, 0.9):
        expected = np.searchsorted(law, share) / lines
        assert table[int(share * QUANTILES)] / lines == pytest.approx(expected, abs=0.03)


def test_the_same_seed_gives_the_same_bytes() -> None:
    def run() -> np.ndarray:
        return ended(native((g.MixSpec(instructions=3000, pattern="zipf"),))).engine.arena

    first, second = run(), run()
    assert np.array_equal(first, second)


@pytest.mark.parametrize("shuffled", [False, True])
def test_frames_of_neighbouring_pages_are_scattered_or_in_order(shuffled: bool) -> None:
    harness = native((g.StreamSpec(region=256 * KIB, accesses=1),), populate="prebuilt", shuffled=shuffled)
    table = Table(
        root=harness.start.roots[1] >> 12,
        format=PAGING,
        take=lambda: 0,
        words=lambda gfn: harness.engine.contents(gfn, TABLE),
    )
    leaves = [table.find(REGIONS + n * PAGE) for n in range(64)]
    frames = [leaf.frame for leaf in leaves if leaf]
    steps = [after - before for before, after in itertools.pairwise(frames)]
    assert len(frames) == 64
    assert (steps == [1] * 63) != shuffled
