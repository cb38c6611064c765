"""Programs that follow data structures make the accesses of their structure, in its memory, in its order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.cpu.programs import HOW
from tests.guest.conftest import Harness, native
from tests.guest.test_kernel import ended
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import HORIZON
from vtsim.guest import structures as g
from vtsim.guest.primitives.btree import btree_steps
from vtsim.guest.primitives.cross_sections import MATERIALS, cross_section_steps, material_order
from vtsim.guest.primitives.graph_gather import graph_steps
from vtsim.guest.primitives.key_values import key_value_steps
from vtsim.guest.primitives.lookups import Step
from vtsim.guest.primitives.netlist_swaps import netlist_steps
from vtsim.guest.spec import StreamSpec

SMALL: dict[Any, Callable[[Any], Sequence[Step]]] = {
    g.BTreeSpec(records=5000, accesses=900): btree_steps,
    g.NetlistSwapsSpec(elements=3000, accesses=900): netlist_steps,
    g.CrossSectionsSpec(nuclides=68, points=20, accesses=900): cross_section_steps,
    g.GraphGatherSpec(vertices=5000, accesses=900): graph_steps,
    g.KeyValuesSpec(keys=3000, accesses=900): key_value_steps,
}
programs = pytest.mark.parametrize("phase", SMALL, ids=lambda phase: type(phase).__name__)


def state(harness: Harness) -> tuple[bytes, bytes, bytes]:
    cpus = harness.engine.cpus.copy()
    cpus[:, list(HOW)] = 0
    return cpus.tobytes(), harness.engine.arena.tobytes(), harness.engine.tags.tobytes()


@programs
def test_every_step_stays_in_its_programs_memory(phase: Any) -> None:
    steps = SMALL[phase](phase)
    assert all(step.offset >= 0 for step in steps)
    last = max(step.offset + (step.count - 1) * step.stride for step in steps)
    assert phase.region_bytes - 256 <= last < phase.region_bytes  # and uses all of it


@programs
def test_a_program_makes_the_accesses_it_is_asked_for(phase: Any) -> None:
    few, many = (
        ended(native((type(phase)(**{**values(phase), "accesses": n}),), populate="prebuilt")) for n in (100, 400)
    )
    assert many.count(k.ACCESSES) - few.count(k.ACCESSES) == 300
    steps = SMALL[phase](phase)
    work = [steps[n % len(steps)].work for n in range(400)]
    assert many.instructions(o.R3) - few.instructions(o.R3) == 300 + sum(work[100:])


def values(phase: Any) -> dict[str, Any]:
    return {field.name: getattr(phase, field.name) for field in type(phase).__attrs_attrs__}


@programs
def test_slices_of_time_change_no_byte(phase: Any) -> None:
    chance = random.Random(3)
    whole, cut = (native((phase,)) for _ in range(2))
    ended(whole)
    until = 0
    while cut.issue(until=until) == HORIZON:
        until += chance.randint(1, 6000)
    assert state(cut) == state(whole)


def test_a_b_tree_has_a_root_and_enough_leaves() -> None:
    tree = g.BTreeSpec(records=1000, children=3)
    assert tree.levels == (1, 2, 5, 13, 38, 112, 334)
    steps = btree_steps(tree)
    assert len(steps) == 7 * tree.node_lines + tree.record_lines
    assert [step.draws for step in steps] == [True] + [False] * (len(steps) - 1)


def test_a_search_halves_its_interval_at_each_step() -> None:
    phase = g.CrossSectionsSpec(nuclides=68, points=20)
    depth = (phase.energies - 1).bit_length()
    search = cross_section_steps(phase)[:depth]
    assert [step.half for step in search] == [1 << n for n in reversed(range(depth))]
    assert [step.needs for step in search] == [False] + [True] * (depth - 1)
    assert not cross_section_steps(phase)[depth].half


def test_materials_are_hit_as_often_as_in_xsbench() -> None:
    shares = (0.140, 0.052, 0.275, 0.134, 0.154, 0.064, 0.066, 0.055, 0.008, 0.015, 0.025, 0.013)
    assert all(abs(times / 200 - share) <= 0.0035 for (_, times), share in zip(MATERIALS, shares, strict=True))
    assert Counter(material_order()) == Counter(nuclides for nuclides, times in MATERIALS for _ in range(times))


def test_a_step_that_needs_the_last_one_waits_for_it() -> None:
    """A tree's chain takes its walks and misses one after the other, a graph's gathers overlap."""
    chain, gathers = (
        ended(native((phase,), memory=256 << 20, populate="prebuilt"))
        for phase in (
            g.BTreeSpec(records=300_000, accesses=2000),
            g.GraphGatherSpec(vertices=1_500_000, accesses=2000),
        )
    )
    waits = [
        (one.cycles(o.DATA_STALL) + one.cycles(o.PAGE_WALK)) / (one.count(k.DATA_DRAM) + 1) for one in (chain, gathers)
    ]
    dram = chain.profile.cycles(chain.profile.dram.local_ns)
    assert waits[0] > dram - chain.profile.cache.l1d.hit_cycles > 2 * waits[1]


@pytest.mark.parametrize("together", [1, 2, 4])
def test_as_many_misses_overlap_as_fit_the_reorder_buffer(together: int) -> None:
    """Lines that nobody has, one an access, with 49 instructions between: in flight are those of `together` accesses."""

    def cycles(accesses: int) -> int:
        phase = StreamSpec(pattern="strided", region=4 << 20, stride=64, accesses=accesses, work=49)
        harness = native((phase,), page_size=2 << 20, populate="prebuilt", memory=256 << 20)
        profile = harness.profile.with_overrides({"work.reorder_buffer": 50 * together})
        return int(ended(Harness(profile, harness.vm)).engine.cpus[0][s.CYCLE])

    profile = native((StreamSpec(region=4096),)).profile
    dram = profile.cycles(profile.dram.local_ns) - profile.cache.l1d.hit_cycles
    issue = 1 + 49 * profile.work.cycles_per_100_instructions / 100
    assert (cycles(3000) - cycles(1000)) / 2000 == pytest.approx(max(dram / together, issue), rel=0.02)
