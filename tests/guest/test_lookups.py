"""Programs that follow data structures make the accesses of their structure, in its memory, in its order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import pytest
from attrs import evolve, frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.cpu.bench import NO_STREAMER
from tests.cpu.programs import HOW
from tests.guest.conftest import Harness, native
from tests.guest.test_kernel import ended
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import HORIZON
from vtsim.cpu.kernels.overlap import overlapped, passes
from vtsim.guest import structures as g
from vtsim.guest.address_space import address_space
from vtsim.guest.primitives.btree import btree_steps
from vtsim.guest.primitives.cross_sections import MATERIALS, cross_section_steps, material_order
from vtsim.guest.primitives.graph_gather import graph_steps
from vtsim.guest.primitives.key_values import key_value_steps
from vtsim.guest.primitives.lookups import Step
from vtsim.guest.primitives.netlist_swaps import DECISION_WORK, NEIGHBOUR_WORK, netlist_steps
from vtsim.guest.primitives.updates import update_steps
from vtsim.guest.spec import GROWN_HEAP, SLAB, SLABS, SLABS_APART, StreamSpec, WorkSpec

SMALL: dict[Any, Callable[[Any], Sequence[Step]]] = {
    g.UpdatesSpec(table=1 << 20, accesses=900): update_steps,
    g.BTreeSpec(records=5000, accesses=900): btree_steps,
    g.BTreeSpec(records=5000, children=8, slabs=True, accesses=900): btree_steps,
    g.NetlistSwapsSpec(elements=3000, accesses=900): netlist_steps,
    g.NetlistSwapsSpec(elements=3000, grown_heap=True, accesses=900): netlist_steps,
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
    grown = [step for step in steps if step.offset >= GROWN_HEAP]
    solid = phase.region_bytes - phase.slab_bytes - phase.grown_bytes
    last = max(step.place(step.count - 1) for step in steps if not step.slab and step not in grown)
    assert solid - 256 <= last < solid  # and uses all of it
    if grown:
        last = max(step.place(step.count - 1) for step in grown) - GROWN_HEAP
        assert phase.grown_bytes - 256 <= last < phase.grown_bytes
    for step in steps:
        if step.slab:
            slab, within = divmod(step.place(step.count - 1) - SLABS, SLABS_APART)
            assert within < SLAB and slab * SLAB + within < phase.slab_bytes


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


def test_in_slabs_a_node_lies_among_those_that_it_leads_to_unless_a_second_pass_made_them() -> None:
    """Look-ups come in pairs, one for each pass. A key's node and its leaf are one inner node's share of the heap apart."""
    tree = g.BTreeSpec(records=100_000, children=8, slabs=True)
    depth = len(tree.levels)
    of_passes = [btree_steps(tree)[: 3 * depth + 2], btree_steps(tree)[3 * depth + 2 :]]
    nodes, leaves = sum(tree.levels), tree.levels[-1]

    def place(step: Step, fraction: float) -> float:
        return step.offset + int(fraction * step.count) * step.stride

    for later, steps in enumerate(of_passes):
        arrays = [step for step in steps[1::3]][:depth]
        structures = [step for step in steps[::3]][:depth]
        heap = arrays[0].offset
        assert heap == 0 and tree.slab_bytes >= nodes * tree.STRUCTURE
        assert {(step.slab, step.slab + step.gap, step.offset % SLABS_APART) for step in structures} == {
            (SLAB, SLABS_APART, 0)
        }
        assert arrays[-1].count == (leaves // 2 if later else leaves - leaves // 2)
        for fraction in (0.0, 0.3, 0.999):
            parent, leaf = (place(step, fraction) - heap for step in arrays[-2:])
            assert (leaf > place(of_passes[0][1::3][depth - 1], 0.999_999) - heap) == bool(later)
            assert later or abs(leaf - parent) < arrays[-2].stride
        # a structure is known from the pointer above, both arrays from the structure, which child from the keys
        assert [step.follows for step in steps] == [0, 1, 0] + [1, 1, 0] * (depth - 1) + [1, 1]
        assert [n for n, step in enumerate(steps) if step.choices] == [3 * n + 2 for n in range(depth)]
        assert {(step.by, step.choices) for step in steps if step.choices} == {(2, 8)}
        assert not any(step.needs for step in steps)


def test_a_swap_computes_one_element_from_memory_and_one_from_the_cache() -> None:
    """New are an element, its place, its arrays and its neighbours with theirs; both elements' neighbours take the work."""
    netlist = g.NetlistSwapsSpec(elements=1000, neighbours=6)
    swap = netlist_steps(netlist)

    assert len(swap) == 2 + 2 + 2 * 2 * 6 and all(step.draws for step in swap)
    assert sum(step.work for step in swap) == 2 * 2 * 6 * NEIGHBOUR_WORK + DECISION_WORK
    # one after the other: the element, its place, an array, and twice as many elements and places as it points to
    waits = [n for n, step in enumerate(swap) if step.needs or step.follows]
    assert waits == [1, 2, 3, 9, 16, 22]
    # and the decision by all that was loaded, after which any element is next
    assert [n for n, step in enumerate(swap) if step.choices] == [27]
    assert (swap[27].by, swap[27].choices, swap[27].within) == (0, 2, 0)


def test_a_vector_that_grew_by_doubling_has_room_for_a_power_of_two() -> None:
    assert [g.NetlistSwapsSpec(neighbours=n).array_bytes for n in (1, 2, 3, 5, 8, 9)] == [24, 32, 48, 80, 80, 144]


def test_a_search_halves_its_interval_at_each_step() -> None:
    phase = g.CrossSectionsSpec(nuclides=68, points=20)
    depth = (phase.energies - 1).bit_length()
    search = cross_section_steps(phase)[:depth]
    assert [step.half for step in search] == [1 << n for n in reversed(range(depth))]
    assert {(step.follows, step.known, step.choices, step.by) for step in search} == {(0, 0, 2, 1)}
    assert [step.needs for step in search] == [True] + [False] * (depth - 1)  # an energy is made of the last result


def test_each_nuclide_is_an_index_and_all_lines_of_two_points_that_it_tells() -> None:
    """In instructions as the binary has them: 65 a nuclide, of a search 11 or 12 a step."""
    phase = g.CrossSectionsSpec(nuclides=68, points=20)
    depth = (phase.energies - 1).bit_length()
    steps = cross_section_steps(phase)[depth : depth + 4 * 4]
    assert [step.known for step in steps] == [1, 1, 2, 0] + [
        0,
        1,
        2,
        0,
    ] * 3  # the row of indexes is found beside an energy
    assert not any(step.needs or step.follows or step.choices or step.half for step in steps)
    for n in range(0, len(steps), 4):
        assert sum(1 + step.work for step in steps[n : n + 4]) == 65
        assert steps[n + 2].offset - steps[n + 1].offset == steps[n + 1].stride == 48
        for element in range(8):
            first = steps[n + 1].place(element)
            touched = {step.place(element) // 64 for step in steps[n + 1 : n + 4]}
            assert touched == {byte // 64 for byte in range(first, first + 96)}


def test_materials_are_hit_as_often_as_in_xsbench() -> None:
    shares = (0.140, 0.052, 0.275, 0.134, 0.154, 0.064, 0.066, 0.055, 0.008, 0.015, 0.025, 0.013)
    assert all(abs(times / 200 - share) <= 0.0035 for (_, times), share in zip(MATERIALS, shares, strict=True))
    assert Counter(material_order()) == Counter(nuclides for nuclides, times in MATERIALS for _ in range(times))


def test_a_step_that_needs_the_last_one_waits_for_it() -> None:
    """Two of a node's three parts are read at once, and a child when they are there; a graph's gathers overlap."""
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
    beyond = dram - chain.profile.cache.l1d.hit_cycles
    assert waits[0] > beyond * 2 / 3 and beyond > 2 * waits[1]


@pytest.mark.parametrize("together", [1, 2, 4])
def test_as_many_misses_overlap_as_fit_the_reorder_buffer(together: int) -> None:
    """Lines that nobody has, one of a pair, with 49 instructions between: in flight are those of `together` accesses."""

    def cycles(accesses: int) -> int:
        phase = StreamSpec(pattern="strided", region=8 << 20, stride=128, accesses=accesses, work=49)
        harness = native((phase,), page_size=2 << 20, populate="prebuilt", memory=256 << 20)
        profile = harness.profile.with_overrides({"work.reorder_buffer": 50 * together, **NO_STREAMER})
        return int(ended(Harness(profile, harness.vm)).engine.cpus[0][s.CYCLE])

    profile = native((StreamSpec(region=4096),)).profile
    dram = profile.cycles(profile.dram.local_ns) - profile.cache.l1d.hit_cycles
    issue = 1 + 49 * profile.work.cycles_per_100_instructions / 100
    assert (cycles(3000) - cycles(1000)) / 2000 == pytest.approx(max(dram / together, issue), rel=0.02)


@frozen
class Access:
    """An independent access as `overlapped` is told of it, and the instructions after it."""

    walk: int
    miss: int
    after: int
    updates: bool
    work: int


@frozen
class Core:
    """What bounds the overlap of accesses."""

    mlp: int
    walkers: int
    reorder_buffer: int
    stlb_hit: int = 9


def waited(core: Core, accesses: Sequence[Access]) -> tuple[list[int], int, int]:
    """When each access is complete, the clock after the last, and how long stores walked beside their loads.

    From the whole history: a buffer is that of the access `mlp` before, a walker that of the walk `walkers` before.
    """
    clock = retired = of_stores = 0
    entered: list[int] = []
    done: list[int] = []
    busy: list[list[int]] = [[0] for _ in range(core.walkers)]  # until when each walker was, at each of its walks
    turn = 0
    for each in accesses:
        far = [end for n, end in zip(entered, done, strict=True) if n <= retired - core.reorder_buffer]
        clock = max([clock, *far, *done[: max(len(done) - core.mlp + 1, 0)][-1:]])
        known = clock + each.after
        begin, walk = known, each.walk
        if each.walk > core.stlb_hit:
            known += core.stlb_hit  # looked up first, without a walker
            walk -= core.stlb_hit
            mine, beside = busy[turn % core.walkers], busy[(turn + 1) % core.walkers]
            begin = max(known, mine[-1])
            alone = each.updates and core.walkers > 1 and mine[-1] <= known and beside[-1] <= known
            for walker in (mine, beside) if alone else (mine,):
                walker.append(begin + walk)
            of_stores += walk * alone
            turn += 1
        entered.append(retired)
        done.append(begin + walk + each.miss)
        clock += each.work
        retired += each.work
    return done, clock, of_stores


def shown(core: Core, accesses: Sequence[Access]) -> tuple[list[int], int, int]:
    """The same of the kernel, where a cycle is an instruction."""
    harness = native((WorkSpec(),))
    m, a = harness.engine.cpus[0], harness.engine.arena
    m[[s.MLP, s.WALKERS, s.ROB, s.STLB_HIT_CYCLES]] = core.mlp, core.walkers, core.reorder_buffer, core.stlb_hit
    m[[s.CYCLE, s.RETIRED, s.FRACTION]] = 0
    m[s.CPI_NUMERATOR] = 100
    before = harness.count(k.WALK_CYCLES)
    done = []
    for each in accesses:
        slot = s.MISS_WINDOW + m[s.MISS_NEXT]
        overlapped(m, a, each.walk, each.miss, each.after, int(each.updates), -1, 0)
        done.append(int(m[slot]))
        passes(m, each.work)
    return done, int(m[s.CYCLE]), harness.count(k.WALK_CYCLES) - before


few = st.integers(0, 4).map(lambda n: (0, 1, 9, 60, 200)[n])
access = st.builds(
    Access, walk=few, miss=few, after=st.sampled_from((0, 1, 42)), updates=st.booleans(), work=st.integers(0, 60)
)
core = st.builds(Core, mlp=st.integers(1, 12), walkers=st.integers(1, 4), reorder_buffer=st.integers(1, 224))


@settings(max_examples=60, deadline=None)
@given(core=core, accesses=st.lists(access, min_size=1, max_size=30))
@example(core=Core(1, 1, 1), accesses=[Access(200, 0, 42, True, 0)] * 3)
@example(
    core=Core(12, 2, 224),
    accesses=[Access(200, 0, 0, False, 70), Access(60, 0, 0, False, 70), Access(60, 0, 0, True, 0)],
)
@example(core=Core(12, 2, 224), accesses=[Access(200, 178, 42, True, 48), Access(200, 178, 42, True, 3)] * 6)
def test_overlap_is_that_of_the_whole_history(core: Core, accesses: list[Access]) -> None:
    assert shown(core, accesses) == waited(core, accesses)


def test_a_store_walks_by_itself_where_a_walker_is_idle_when_its_address_is_known() -> None:
    """By hand: walks of 91 cycles, 9 after an address is known, of one update, of two at once, and with one walker."""
    alone = [Access(100, 0, 42, True, 0)]
    assert shown(Core(12, 2, 224), alone) == ([142], 0, 91)
    assert shown(Core(12, 1, 224), alone) == ([142], 0, 0)
    assert shown(Core(12, 2, 224), alone * 2) == ([142, 233], 0, 91)  # the second waits for both, and finds one busy
    assert shown(Core(12, 2, 224), [evolve(alone[0], updates=False)] * 2) == ([142, 142], 0, 0)


def cycles_of_updates(reorder_buffer: int, **phase: Any) -> float:
    """Cycles of an update, in the middle of many."""

    def cycles(accesses: int) -> int:
        spec = g.UpdatesSpec(accesses=accesses, **phase)
        harness = native((spec,), page_size=2 << 20, populate="prebuilt", memory=256 << 20)
        profile = harness.profile.with_overrides({"work.reorder_buffer": reorder_buffer})
        return int(ended(Harness(profile, harness.vm)).engine.cpus[0][s.CYCLE])

    return (cycles(1500) - cycles(500)) / 1000


def test_each_update_waits_for_its_division_where_none_fits_beside_another() -> None:
    """With a reorder buffer of one instruction nothing overlaps: each waits for its place, then for its data."""
    waits = [cycles_of_updates(1, division=division, table=1 << 20) for division in (0, 42, 142)]
    assert waits[1] - waits[0] == pytest.approx(42, abs=25)  # less what passes meanwhile
    assert waits[2] - waits[1] == pytest.approx(100, rel=0.02)  # a few lines are hit again


def test_updates_of_one_line_wait_for_nothing() -> None:
    """A table of one line: no walk and no miss, only instructions."""
    phase = g.UpdatesSpec(table=64, division=0)
    issue = 1 + sum(step.work for step in update_steps(phase)) / 2 * 0.5
    assert cycles_of_updates(224, table=64, division=0) == pytest.approx(issue, rel=0.01)
    assert cycles_of_updates(224, table=64, division=42) == pytest.approx(issue, rel=0.01)


def test_an_update_changes_the_line_that_it_loads() -> None:
    one = ended(native((g.UpdatesSpec(table=1 << 20, accesses=1),), populate="prebuilt"))
    none = ended(native((WorkSpec(instructions=1),), populate="prebuilt"))
    assert one.count(k.ACCESSES) - none.count(k.ACCESSES) == 1


def test_elements_in_slabs_lie_where_their_slab_lies() -> None:
    step = Step(64, 40, 96, draws=True, slab=256, gap=4096)
    assert [step.place(n) for n in (0, 1, 2, 3, 39)] == [64, 160, 256, 64 + 288 + 4096, 64 + 39 * 96 + 14 * 4096]


def test_slabs_are_mapped_where_the_look_ups_go_and_nothing_between_them() -> None:
    """Records in three slabs: no look-up faults, each slab has 64 pages and a table, and 2 MiB lie from one to the next."""
    tree = g.BTreeSpec(records=40_000, children=8, slabs=True, accesses=2000)
    harness = native((tree,), populate="prebuilt", memory=128 << 20)
    space = address_space(harness.vm.guest.processes[0], harness.vm.guest.kernel, 1, pages_1g=True)
    (area,) = [area for area in space.areas if area.name == "slabs"]
    slabs = (tree.structures_bytes + 40_000 * tree.RECORD) / SLAB
    assert list(area.runs(1 << 20)) == [
        (area.start + n * SLABS_APART, min(64, round((slabs - n) * 64 + 0.49))) for n in range(ceil(slabs))
    ]
    assert ended(harness).count(k.WALKS_FAULTED) == 0


@pytest.mark.parametrize("page_size", [4 << 10, 2 << 20])
def test_a_heap_that_grew_piece_by_piece_has_small_pages_whatever_the_kernels_are(page_size: int) -> None:
    netlist = g.NetlistSwapsSpec(elements=40_000, grown_heap=True, accesses=2000)
    harness = native((netlist,), populate="prebuilt", memory=128 << 20, page_size=page_size)
    space = address_space(harness.vm.guest.processes[0], harness.vm.guest.kernel, 1, pages_1g=True)
    areas = {area.name: area for area in space.areas}
    elements = 40_000 * netlist.ELEMENT

    assert (areas["region"].page_bytes, areas["region"].bytes) == (page_size, elements)
    assert (areas["heap"].page_bytes, areas["heap"].bytes) == (4096, netlist.region_bytes - elements)
    assert ended(harness).count(k.WALKS_FAULTED) == 0
