"""A guest's kernel and processes on shadow tables: the same results, and other exits than with EPT."""

from __future__ import annotations

from functools import cache

import pytest

from vtsim.base import jit
from vtsim.config import parse_scenario
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.ept import shadow as d
from vtsim.platform.machine import Machine
from vtsim.vmcs import state as h
from vtsim.vmcs.reasons import REASON
from vtsim.vmm.programs import ept

TEXT = """
machine: {{memory: 256 MiB}}
vms:
  - memory: 64 MiB
    guest:
      kernel: {kernel}
      processes: {processes}
"""
PLAIN, KPTI, PREBUILT = "{tick: off}", "{tick: off, kpti: true}", "{tick: off, populate: prebuilt}"
KPTI_ALONE = "{tick: off, kpti: true, pcid: false}"
LARGE = "{tick: off, populate: prebuilt, page_size: 2 MiB}"
FORK = "[{phases: [{primitive: fork, iterations: 2, pages: 5}]}]"
FAULTS = "[{phases: [{primitive: page_fault, region: 48 KiB, iterations: 3}]}]"
STREAM = "[{phases: [{primitive: stream, pattern: uniform, region: 4 MiB, accesses: 40, write: 0.5}]}]"
EXEC = "[{phases: [{primitive: exec, iterations: 2, pages: 5}]}]"
PROTECTION = "[{phases: [{primitive: protect, region: 48 KiB, iterations: 3}]}]"
SWITCHES = (
    "[{name: a, phases: [{primitive: context_switch, iterations: 6}, {primitive: page_fault, region: 160 KiB}]}, "
    "{name: b, phases: [{primitive: context_switch, iterations: 6}]}]"
)
GUESTS = {
    "fork": (PLAIN, FORK), "fork with KPTI": (KPTI, FORK), "fork with KPTI without PCID": (KPTI_ALONE, FORK),
    "faults": (PLAIN, FAULTS), "faults with KPTI": (KPTI, FAULTS), "switches": (PLAIN, SWITCHES),
    "protection": (PLAIN, PROTECTION), "exec": (KPTI, EXEC), "switches with KPTI": (KPTI, SWITCHES), "stream": (PREBUILT, STREAM), "stream of large pages": (LARGE, STREAM),
}  # fmt: skip
LIKE_FORK = ("exec", "protection")  # their tables are written as those of fork and faults are
LONG_INTERPRETED = (  # in large host pages, each of which is looked through
    "fork", "fork with KPTI", "fork with KPTI without PCID", "faults with KPTI", "switches", "switches with KPTI",
    "stream",
)  # fmt: skip
NATIVE = ("vmm.technique=native",)
EPT, SHADOW = (("vmm.paging=ept",), ("vmm.paging=shadow",))
WAYS = {
    "ept": EPT,
    "shadow": SHADOW,
    "shadow of minimal": (*SHADOW, "vmm.personality=minimal"),
    "shadow without VPID": (*SHADOW, "vmm.vpid=false"),
    "shadow in large host pages": (*SHADOW, "vmm.ept.page_size=2 MiB"),
    "shadow that is there beforehand": (*SHADOW, "vmm.ept.populate=prebuilt"),
    "shadow in few pages": (*SHADOW, "vmm.parameters.shadow_permille=0"),
}


def run(guest: tuple[str, str], sets: tuple[str, ...]) -> Machine:
    machine = Machine(parse_scenario(TEXT.format(kernel=guest[0], processes=guest[1]), list(sets)))
    outcome = machine.run()
    assert [vm.stopped for vm in outcome.vms] == [None]
    return machine


def digests(machine: Machine) -> tuple[int, int]:
    if machine.hypervisor is None:
        m = machine.engine.cpus[0]
        return int(m[s.DIGEST_APPLICATION]), int(m[s.DIGEST_KERNEL])
    words = machine.engine.contents(machine.hypervisor.vcpus[0].vmcs, 0)
    return int(words[h.V_DIGEST_APPLICATION]), int(words[h.V_DIGEST_KERNEL])


def exits(machine: Machine, name: str) -> int:
    (reason,) = (reason for reason in REASON.values() if reason.name == name)
    at = machine.vms[0].owner + k.OWN_EXITS + reason.number * k.EXIT_WORDS + k.EXIT_COUNT
    return int(machine.engine.arena[at])


def page_faults(machine: Machine) -> int:
    return int(machine.engine.arena[machine.vms[0].owner + k.PAGE_FAULTS])


def observed(machine: Machine) -> tuple[tuple[int, int], int]:
    """What the guest's processes and kernel saw, and its own page faults."""
    return digests(machine), page_faults(machine)


@cache
def observed_natively(kernel: str, processes: str, *sets: str) -> tuple[tuple[int, int], int]:
    return observed(run((kernel, processes), (*sets, *NATIVE)))


@pytest.mark.parametrize(
    ("guest", "way"),
    [
        (guest, way)
        for guest in GUESTS
        for way in WAYS
        if (guest not in LIKE_FORK or way in ("ept", "shadow"))
        and not (jit.DISABLED and guest in LONG_INTERPRETED and way == "shadow in large host pages")
    ],
)
def test_a_guest_ends_with_the_results_that_it_has_natively(guest: str, way: str) -> None:
    assert observed(run(GUESTS[guest], WAYS[way])) == observed_natively(*GUESTS[guest])


@pytest.mark.parametrize("paging", ["shadow", "agile"])
@pytest.mark.parametrize("guest", ["fork with KPTI", "switches", "stream of large pages"])
def test_a_guest_with_five_levels_ends_with_the_results_that_it_has_natively(guest: str, paging: str) -> None:
    kernel, processes = GUESTS[guest]
    five = (f"{kernel[:-1]}, paging: 5-level}}", processes)
    sets = ("machine.cpu={features: {la57: true, agile_paging: true}, vmx.generation: ice-lake-sp}",)
    assert observed(run(five, (*sets, f"vmm.paging={paging}"))) == observed_natively(*five, *sets)


def test_a_page_fault_of_the_guest_exits_on_shadow_tables_and_stays_inside_with_ept() -> None:
    pages = 48 // 4 * 3

    assert exits(run(GUESTS["faults"], EPT), "EXCEPTION_NMI") == 0
    assert exits(run(GUESTS["faults"], SHADOW), "EXCEPTION_NMI") >= pages


@pytest.mark.parametrize(("kernel", "each"), [(PLAIN, 0), (KPTI, 3), (KPTI_ALONE, 3)])
def test_isolated_page_tables_make_every_system_call_exit_for_cr3_on_shadow_tables(kernel: str, each: int) -> None:
    """A read and a load of CR3 on the way in, a load on the way out."""
    few, many = (f"[{{phases: [{{primitive: syscall, iterations: {n}}}]}}]" for n in (3, 13))
    counts = [exits(run((kernel, calls), SHADOW), "CR_ACCESS") for calls in (few, many)]

    assert counts[1] - counts[0] == 10 * each
    assert exits(run((kernel, many), EPT), "CR_ACCESS") == 0


def pool_word(machine: Machine, name: str) -> int:
    assert machine.hypervisor is not None
    pool = machine.hypervisor.vcpus[0].shadow
    assert pool is not None
    return machine.hypervisor.host.load(pool.address + d.POOL[name])


def run_in(pages: int, guest: tuple[str, str], *sets: str) -> Machine:
    """Run with so many shadow pages, fewer than a VM is given otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtsim.vmm.shadow.LEAST_PAGES", pages)
        machine = run(guest, (*SHADOW, "vmm.parameters.shadow_permille=0", *sets))
    assert pool_word(machine, "PAGES") == pages
    return machine


@pytest.mark.slow
@pytest.mark.parametrize("sets", [(), pytest.param(("vmm.personality=minimal",), marks=pytest.mark.compiled_only)])
def test_shadow_pages_are_evicted_when_there_are_few_and_the_guest_does_not_notice(sets: tuple[str, ...]) -> None:
    """Through 24 areas of 2 MiB, each of a leaf table, and back to the first; then through memory that changes."""
    spread = (
        "[{phases: [{primitive: stream, pattern: strided, stride: 2 MiB, region: 48 MiB, accesses: 30, write: 0.5},"
        " {primitive: page_fault, region: 48 KiB}, {primitive: fork, iterations: 1, pages: 5}]}]"
    )
    guest = ("{tick: off, populate: prebuilt}", spread)
    few, many = run_in(24, guest, *sets), run_in(512, guest, *sets)

    assert pool_word(few, "EVICTED") > 24  # every page at least once
    assert pool_word(many, "EVICTED") == 0
    for machine in (few, many):
        in_use = pool_word(machine, "PAGES") - pool_word(machine, "FREE_COUNT")
        assert pool_word(machine, "MADE") - pool_word(machine, "ZAPPED") + 1 == in_use
    assert observed(few) == observed(many) == observed_natively(*guest)
    assert page_faults(few) >= 12


def per_switch(processes: int, pages: int, *sets: str) -> dict[str, int]:
    """What 10 turns more of each process add: exits for CR3, shadow pages made, hidden page faults, page walks."""

    def counts(turns: int) -> dict[str, int]:
        phases = f"[{{primitive: context_switch, iterations: {turns}}}]"
        named = (f"{{name: p{n}, phases: {phases}}}" for n in range(processes))
        machine = run_in(pages, (PLAIN, f"[{', '.join(named)}]"), *sets)
        arena, owner = machine.engine.arena, machine.vms[0].owner
        return {
            "loads": exits(machine, "CR_ACCESS"),
            "made": pool_word(machine, "MADE"),
            "faults": exits(machine, "EXCEPTION_NMI"),
            "hidden": int(arena[owner + k.HIDDEN_PAGE_FAULTS]),
            "walks": int(arena[owner + k.WALKS]),
        }

    few, many = counts(5), counts(15)
    return {name: many[name] - few[name] for name in few}


@pytest.mark.parametrize("sets", [(), ("vmm.personality=minimal",)])
@pytest.mark.parametrize("processes", [2, 4])
def test_a_return_to_an_address_space_whose_root_is_kept_builds_nothing(processes: int, sets: tuple[str, ...]) -> None:
    """And translations stay, of the four spaces loaded last: no access walks a table."""
    beyond = per_switch(processes, 64, *sets)

    assert beyond.pop("loads") == 10 * processes
    assert beyond == {"made": 0, "faults": 0, "hidden": 0, "walks": 0}


def test_one_root_more_than_the_list_has_loses_translations_and_no_shadow_page() -> None:
    """Each load is of a root that left the list: its tables are there, what the TLB has of it may be stale."""
    beyond = per_switch(5, 64)

    assert beyond.pop("loads") == 10 * 5
    assert beyond.pop("walks") >= 10 * 5
    assert beyond == {"made": 0, "faults": 0, "hidden": 0}


@pytest.mark.slow
def test_one_root_more_than_there_are_shadow_pages_for_builds_tables_again_at_each_return() -> None:
    """In 28 pages there is room for the tables of three processes, with those that stay free; not for a fourth's."""
    enough, beyond = per_switch(3, 28), per_switch(4, 28)

    assert (enough["made"], enough["hidden"], enough["faults"]) == (0, 0, 0)
    assert beyond["loads"] == 10 * 4
    assert beyond["made"] >= beyond["loads"] and beyond["hidden"] >= beyond["loads"]
    assert beyond["faults"] == beyond["hidden"]


@pytest.mark.slow
def test_code_around_an_entry_is_executed_for_every_entry_that_is_filled_beside_or_held_against_the_guest() -> None:
    """Longer by so many instructions: what comes more is a multiple of them, for prefetching as many as there were.

    What is around a page comes at most once for each entry that is held against the guest.
    """
    longer = 1000

    def instructions(**lengths: int) -> tuple[int, int]:
        sets = (*SHADOW, *(f"vmm.parameters.{name}={longer + n}" for name, n in lengths.items()))
        machine = run(GUESTS["faults with KPTI"], sets)
        assert machine.hypervisor is not None
        pool = machine.hypervisor.vcpus[0].shadow
        assert pool is not None
        filled = machine.hypervisor.host.load(pool.address + d.POOL["PREFETCHED"])
        arena, owners = machine.engine.arena, machine.engine.owners.values()
        return sum(int(arena[owner + k.OWN_INSTRUCTIONS + o.R0]) for owner in owners), filled

    short, filled = instructions(prefetch_entry=0, synchronize_entry=0)
    assert filled > 0
    assert instructions(prefetch_entry=longer, synchronize_entry=0)[0] - short == longer * filled
    held = instructions(prefetch_entry=0, synchronize_entry=longer)[0] - short
    assert held > 0 and held % longer == 0
    pages = instructions(prefetch_entry=0, synchronize_entry=0, synchronize_page=longer)[0]
    pages -= instructions(prefetch_entry=0, synchronize_entry=0, synchronize_page=0)[0]
    assert 0 < pages <= held and pages % longer == 0


PROCESS = "[{phases: [{primitive: process, iterations: 1, pages: 8, written: 0, fresh: 1}, {primitive: select, iterations: 1}]}]"
OF_ZEROES = (*SHADOW, "vmm.huge_pages=never")


def ended(sets: tuple[str, ...]) -> str | None:
    outcome = Machine(parse_scenario(TEXT.format(kernel=PLAIN, processes=PROCESS), list(sets))).run()
    return outcome.vms[0].stopped


def test_a_table_in_the_page_of_zeroes_is_read_anew_once_it_has_a_page_of_its_own() -> None:
    """The hypervisor reads the guest's tables through its process, whose translation it drops with the page."""
    assert ended(OF_ZEROES) is None


def test_a_translation_of_the_page_of_zeroes_that_stays_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ept, "_flush_user", lambda a: None)

    assert ended(OF_ZEROES) is not None
