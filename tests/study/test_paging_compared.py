"""Which way of virtualizing the MMU is faster for what: orders that must come out, not figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtsim.config import load_scenario
from vtsim.study import equivalence as e
from vtsim.study.binding import PHASE
from vtsim.study.run import run, without_hypervisor

WORKLOADS = Path(__file__).parents[2] / "workloads"
TLB_BOUND = (  # a chain that no TLB reaches, its pages mapped beforehand
    "memory/pointer_chase.yaml",
    ("vms.0.guest.kernel.populate=prebuilt", f"{PHASE}.region=64 MiB", "vms.0.memory=128 MiB"),
    ("accesses", 20_000, 60_000),
)
CHURN = {
    "fork": ("paging/fork.yaml", (), ("iterations", 4, 12)),
    "exec": ("paging/exec.yaml", (), ("iterations", 4, 12)),
    "context switch": ("paging/context_switch.yaml", (), ("iterations", 100, 300)),
}
PAGINGS = ("none", "ept", "shadow", "agile", "direct-pv")
pytestmark = pytest.mark.compiled_only


def cycles(program: tuple[str, tuple[str, ...], tuple[str, int, int]], *sets: str) -> int:
    """What the longer run takes beyond the shorter: beginnings and first touches are in both."""
    scenario, own, (setting, *sizes) = program
    short, long = (
        run(WORKLOADS / scenario, sets=(*own, *sets, f"{PHASE}.{setting}={n}", "run.baseline=false")) for n in sizes
    )
    return int(long.cycles.elapsed - short.cycles.elapsed)


def test_shadow_tables_win_over_ept_where_tlbs_miss_and_no_table_changes() -> None:
    shadow, nested = cycles(TLB_BOUND, "vmm.paging=shadow"), cycles(TLB_BOUND, "vmm.paging=ept")

    assert shadow < nested


@pytest.mark.parametrize("what", CHURN)
def test_shadow_tables_lose_to_ept_where_address_spaces_change(what: str) -> None:
    assert cycles(CHURN[what], "vmm.paging=shadow") > cycles(CHURN[what], "vmm.paging=ept")


def test_large_pages_of_ept_help_a_guest_that_has_small_ones() -> None:
    """Each of the walk's crossings is one entry shorter."""
    small, large = (cycles(TLB_BOUND, "vmm.paging=ept", f"vmm.ept.page_size={size}") for size in ("4 KiB", "2 MiB"))

    assert large < small


def test_guests_see_the_same_under_all_five_ways_of_paging_and_each_takes_its_own_time() -> None:
    sets, elapsed = (f"{PHASE}.accesses=40 k", "vms.0.guest.processes.1.phases.0.iterations=34"), {}
    for paging in PAGINGS:
        there = load_scenario(WORKLOADS / "paging/churn.yaml", (*sets, f"vmm.paging={paging}"))
        found, (outcome,) = e.compare_and_measure(without_hypervisor(there), there)
        elapsed[paging] = outcome.elapsed

        assert (there.vmm.technique, there.vmm.paging) == ("native" if paging == "none" else "hardware", paging)
        assert found.differences == () and found.compared["application"] >= 34
        # a kernel that is built for direct tables is another program, and faults elsewhere
        assert found.compared["exception"] > 0 or paging == "direct-pv"

    assert len(set(elapsed.values())) == len(PAGINGS)
    assert min(elapsed, key=elapsed.__getitem__) == "none"
