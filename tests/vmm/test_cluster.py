"""Exit clusters: the same guest with fewer exits, and nothing else about it changed."""

from __future__ import annotations

import pytest

from tests.vmm.test_trap_and_emulate import PLAIN, run
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.platform.machine import Machine
from vtsim.platform.outcome import OwnerCounts

ROUNDS = 3
EPT, SHADOW = ("vmm.paging=ept",), ("vmm.paging=shadow",)
SYNCHRONOUS = ("vmm.personality=kvm", "vmm.parameters.out_of_sync=0")
MINIMAL = ("vmm.personality=minimal",)
CLUSTERS = "vmm.features.exit_clustering=true"
CONFIG = f"{{primitive: config_read, iterations: {ROUNDS}}}"
TABLE = f"{{primitive: pte_write, iterations: {2 * ROUNDS}}}"
PROTECT = "{primitive: protect, region: 8 KiB, iterations: 2}"

# Exits saved: every IN behind its OUT; every second store from the round on in which both are known; INVLPG behind a
# store that makes a page writable again, 4 pages in each round but the first, of which the first is not known yet.
CASES = {
    "ports, in the hypervisor": (CONFIG, (*EPT, *MINIMAL), ROUNDS),
    "ports, in user space": (CONFIG, (*EPT, "vmm.personality=kvm"), ROUNDS),
    "stores to tables": (TABLE, (*SHADOW, *MINIMAL), ROUNDS - 1),
    "stores to tables that the host has small pages for": (
        TABLE,
        (*SHADOW, *MINIMAL, "vmm.huge_pages=never"),
        ROUNDS - 1,
    ),
}


def seen(machine: Machine) -> tuple[int, int]:
    """Digests of what the guest's processes and its kernel saw."""
    return int(machine.engine.cpus[0][s.DIGEST_APPLICATION]), int(machine.engine.cpus[0][s.DIGEST_KERNEL])


def exits(counts: OwnerCounts) -> int:
    return sum(each.count for each in counts.exits)


def both(phase: str, sets: tuple[str, ...]) -> list[tuple[Machine, OwnerCounts]]:
    """Without and with clusters."""
    ran = [run((PLAIN, f"[{{phases: [{phase}]}}]"), (*sets, *more)) for more in ((), (CLUSTERS,))]
    assert [stopped for _, _, stopped in ran] == [None, None]
    return [(there, counts) for there, counts, _ in ran]


@pytest.mark.parametrize("case", CASES)
def test_each_exit_that_is_saved_is_one_less_and_the_guest_is_the_same(case: str) -> None:
    phase, sets, expected = CASES[case]
    (without, plain), (machine, clustered) = both(phase, sets)
    saved = machine.outcome().clusters

    assert saved is not None
    assert saved["exits_saved"] == expected == exits(plain) - exits(clustered)
    assert seen(machine) == seen(without)
    for ring in (0, 1):
        executed = [each.instructions[o.N0 + ring] + each.emulated[ring] for each in (plain, clustered)]
        assert executed[0] == executed[1]


def test_a_page_made_writable_and_flushed_is_one_exit() -> None:
    (without, plain), (machine, clustered) = both(PROTECT, (*SHADOW, *SYNCHRONOUS))
    flushes = [sum(e.count for e in each.exits if e.reason == INVLPG) for each in (plain, clustered)]
    saved = machine.outcome().clusters

    assert saved is not None
    assert saved["exits_saved"] == exits(plain) - exits(clustered) > 0
    assert flushes[0] - flushes[1] == saved["exits_saved"]
    assert seen(machine) == seen(without)


INVLPG = 14


def test_a_lonely_exit_begins_no_cluster() -> None:
    (_, plain), (machine, clustered) = both("{primitive: port_in, port: 0x80, iterations: 3}", (*EPT, *MINIMAL))

    assert machine.outcome().clusters == {"exits_saved": 0, "instructions": 0}
    assert exits(plain) == exits(clustered)


def test_a_hypervisor_without_clusters_has_no_program_for_them() -> None:
    (without, _), (machine, _) = both("{primitive: cpuid, iterations: 1}", (*EPT, *MINIMAL))
    assert without.hypervisor is not None
    assert machine.hypervisor is not None

    assert "cluster" not in without.hypervisor.program.labels
    assert "cluster" in machine.hypervisor.program.labels
    assert without.outcome().clusters is None
