"""Ways to deal with stores to watched memory: exits that each must have and no others, and the same memory at the end.

SDM: "VMFUNC—Invoke VM Function"; "Virtualization Exceptions".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from vtsim.base import memory as mem
from vtsim.config import load_scenario, scenario_of
from vtsim.ept.tables import PAGING, Table
from vtsim.guest.watched import WAYS
from vtsim.platform.machine import Machine
from vtsim.study import equivalence as e
from vtsim.study.binding import PHASE
from vtsim.study.run import run, without_hypervisor

SCENARIO = Path(__file__).parents[2] / "workloads" / "paging" / "views.yaml"
PAGE, LINE = 4096, 64
GROUPS, STORES, PAGES = 5, 3, 2
EXITS: Final = {  # beside the hypercalls that take rights and give them back, one for each page
    "nobody": {},
    "exit": {"EPT_VIOLATION": GROUPS * STORES, "MONITOR_TRAP_FLAG": GROUPS * STORES, "VMCALL": 2 * PAGES},
    "exception": {"VMCALL": 2 * PAGES + 2},  # and one that asks for exceptions, one that asks for none
    "vmfunc": {"VMCALL": 2 * PAGES},
    "vmcall": {"VMCALL": 2 * PAGES + 2 * GROUPS},
}


def document(by: str, *, views: int = 2, tick: str = "off", **more: Any) -> dict[str, Any]:
    phase = {
        "primitive": "watched_stores", "iterations": GROUPS, "stores": STORES, "pages": PAGES, "loads": 4,
        "region": "4 KiB", "by": by,
    }  # fmt: skip
    guest = {"kernel": {"tick": tick}, "processes": [{"phases": [phase | more.pop("phase", {})]}]}
    vmm = {"views": views, "personality": more.pop("personality", "minimal"), **more}
    return {"machine": {"memory": "256 MiB"}, "vmm": vmm, "vms": [{"memory": "16 MiB", "guest": guest}]}


def stored(pages: int, groups: int, stores: int) -> dict[int, int]:
    """What stands where at the end, by the spec alone: page after page, a line further each time; groups count down."""
    step, end = LINE + (PAGE if pages > 1 else 0), pages * PAGE
    words, at = {}, 0
    for group in range(groups, 0, -1):
        for _ in range(stores):
            words[at] = group
            at = (at + step) % end
    return words


def pages_of(machine: Machine, pages: int) -> dict[int, int]:
    """What the watched pages of the only process hold, by its own tables; words that are not zero."""
    (vm,) = machine.vms
    memory, space = vm.memory, vm.spaces[0]
    table = Table(
        root=space.cr3 >> 12 & (1 << 40) - 1, format=PAGING, take=lambda: 0,
        words=lambda gfn: memory.contents(gfn, mem.TABLE),
    )  # fmt: skip
    start = next(start for name, start, end in space.areas if name == "region" and end - start > pages * PAGE)
    words = {}
    for page in range(pages):
        leaf = table.find(start + page * PAGE)
        assert leaf is not None
        contents = memory.contents(leaf.frame, mem.VALUES)
        words |= {page * PAGE + 8 * n: int(word) for n, word in enumerate(contents) if word}
    return words


@pytest.mark.parametrize("personality", ["minimal", "kvm"])
@pytest.mark.parametrize("by", WAYS)
def test_a_way_has_the_exits_that_it_must_have_and_no_others(by: str, personality: str) -> None:
    result = run(document(by, personality=personality), sets=("run.baseline=false",))

    assert {one.reason: one.count for one in result.exits} == EXITS[by]
    assert result.host_memory.get("watched_writes", 0) == EXITS[by].get("EPT_VIOLATION", 0)
    assert result.events["exceptions"] - result.events["page_faults"] == GROUPS * STORES * (by == "exception")


@pytest.mark.parametrize(("by", "pages"), [*((way, PAGES) for way in ("native", *WAYS)), ("native", 1), ("exit", 1)])
def test_memory_holds_at_the_end_what_was_stored_whoever_watched(by: str, pages: int) -> None:
    native = by == "native"
    scenario = scenario_of(
        document("nobody" if native else by, technique="native" if native else "auto", phase={"pages": pages})
    )
    machine = Machine(scenario)

    assert machine.run().vms[0].stopped is None
    assert pages_of(machine, pages) == stored(pages, GROUPS, STORES)


@pytest.mark.parametrize("by", ["exit", "exception", "vmfunc"])
def test_applications_see_the_same_as_natively(by: str) -> None:
    """The system call's result is made of all that the watched pages hold."""
    there = scenario_of(document(by))
    found = e.compare(without_hypervisor(there), there)

    assert found.equivalent
    assert found.compared["application"] > 0


def test_each_thread_has_pages_of_its_own() -> None:
    """Were they the same, what a thread finds in them would depend on how far the other is."""
    threads = ("machine.cpus=2", "vms.0.vcpus=2", "vms.0.guest.processes.0.threads=2", "vmm.views=1")
    there = scenario_of(document("nobody"), threads)

    assert e.compare(without_hypervisor(there), there).equivalent


@pytest.mark.parametrize("by", ["vmfunc", "vmcall"])
def test_views_take_turns_and_one_that_is_named_is_used_alone(by: str) -> None:
    turns, named = (
        run(document(by, views=5, phase=phase), sets=("run.baseline=false",)) for phase in ({}, {"view": 3})
    )

    assert [one.count for one in turns.exits] == [one.count for one in named.exits] == [EXITS[by]["VMCALL"]]
    assert turns.walks.count > named.walks.count


def test_a_view_that_is_none_ends_the_process_by_vmfunc_and_leaves_it_in_its_own_by_hypercall() -> None:
    by_function, by_call = (
        run(document(by, phase={"view": 2}), sets=("run.baseline=false",)) for by in ("vmfunc", "vmcall")
    )

    assert "#UD" in by_function.stopped["vm0"]
    assert {one.reason: one.count for one in by_function.exits} == {"VMCALL": PAGES, "VMFUNC": 1}
    assert by_call.stopped == {}
    assert {one.reason: one.count for one in by_call.exits} == EXITS["exit"] | EXITS["vmcall"]


# --- larger ----------------------------------------------------------------------------------------------------------
@pytest.mark.compiled_only
@pytest.mark.parametrize("kpti", [False, True])
@pytest.mark.parametrize("by", ["exit", "exception"])
@pytest.mark.parametrize("personality", ["minimal", "kvm"])
def test_interrupts_of_the_guest_add_no_store(personality: str, by: str, kpti: bool) -> None:
    """They come between a store that exits and the next exit, or in the handler of an exception, if anything lets them."""
    sets = (f"vms.0.guest.kernel.kpti={'true' if kpti else 'false'}", f"{PHASE}.iterations=100", "run.baseline=false")
    result = run(document(by, personality=personality, tick="10 us"), sets=sets)

    assert result.events["interrupts"] > 20
    assert result.host_memory.get("watched_writes", 0) == (100 * STORES if by == "exit" else 0)
    assert result.events["exceptions"] - result.events["page_faults"] == (100 * STORES if by == "exception" else 0)


@pytest.mark.compiled_only
def test_the_shipped_scenario_shows_what_each_way_adds() -> None:
    sets = (f"{PHASE}.iterations=300", "run.baseline=false")
    cycles = {by: run(SCENARIO, sets=(*sets, f"{PHASE}.by={by}")).cycles.elapsed for by in WAYS}

    assert load_scenario(SCENARIO).vmm.views == 2
    assert cycles["nobody"] < cycles["vmfunc"] < cycles["vmcall"] < cycles["exit"]
    assert cycles["vmfunc"] < cycles["exception"] < cycles["exit"]


@pytest.mark.compiled_only
def test_there_can_be_as_many_views_as_a_list_has_room_for() -> None:
    result = run(document("vmfunc", views=512), sets=("machine.memory=1 GiB", f"{PHASE}.iterations=1100"))

    assert {one.reason: one.count for one in result.exits} == EXITS["vmfunc"]
    assert result.stopped == {}
