"""A guest that maps files has the same results in every way of virtualizing its MMU and its CPU."""

from __future__ import annotations

import pytest

from vtsim.config import parse_scenario, resolve
from vtsim.platform.witness import APPLICATION
from vtsim.study import equivalence as e
from vtsim.study.run import without_hypervisor

TEXT = """
machine: {machine}
vms:
  - memory: 64 MiB
    vcpus: {vcpus}
    guest:
      kernel: {kernel}
      processes:
        - threads: {vcpus}
          phases:
            - {{primitive: map_file, region: 72 KiB, invalidate: true, iterations: 2}}
            - {{primitive: map_file, region: 100 KiB, write: 50 %, iterations: 1}}
            - {{primitive: map_file, region: 144 KiB, touched: 50 %, order: strided, stride: 16 KiB, write: 100 %, iterations: 1}}
"""
WAYS = {
    "EPT": ("vmm.paging=ept",),
    "shadow": ("vmm.paging=shadow",),
    "agile": ("vmm.paging=agile",),
    "direct": ("vmm.paging=direct-pv",),
    "trap and emulate": ("vmm.technique=trap-and-emulate", "machine.isa=virtualizable"),
    "binary translation": ("vmm.technique=binary-translation",),
    "interpreter": ("vmm.technique=interpreter",),
    "dynamic translation": ("vmm.technique=dynamic-translation",),
    "paravirtual": ("vmm.technique=paravirtual",),
    "user mode": ("vmm.technique=user-mode",),
    "hosted": ("vmm.technique=binary-translation", "vmm.hosted=true"),
}


SLOW = ("agile", "trap and emulate", "binary translation", "interpreter", "dynamic translation", "user mode", "hosted")
# system calls of a round, and rounds
CALLS = 3 * 2 + 2 * 1 + 2 * 1


def compared(sets: tuple[str, ...], vcpus: int = 1, kernel: str = "{tick: off}") -> e.Equivalence:
    text = TEXT.format(machine=f"{{memory: 256 MiB, cpus: {vcpus}}}", vcpus=vcpus, kernel=kernel)
    there = resolve(parse_scenario(text, list(sets)), "test")
    return e.compare(without_hypervisor(there), there)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.compiled_only] if way in SLOW else []) for way in WAYS]
)
def test_a_guest_that_maps_files_sees_the_same_however_it_is_virtualized(way: str) -> None:
    found = compared(WAYS[way])

    assert found.differences == ()
    assert found.compared[APPLICATION] >= CALLS


def test_threads_that_map_files_beside_each_other_see_what_they_see_natively() -> None:
    """With KPTI; each thread maps at a place of its own, and all map the same pages."""
    found = compared(("vmm.paging=ept",), vcpus=2, kernel="{tick: off, kpti: true}")

    assert found.differences == ()
    assert found.compared[APPLICATION] >= 2 * CALLS


@pytest.mark.parametrize("kind", ["disk", "host"])
@pytest.mark.parametrize("way", ["EPT", "shadow"])
def test_a_guest_whose_file_is_written_back_sees_what_it_sees_natively(way: str, kind: str) -> None:
    """Its own faults, too: a page that is being written is taken from it in every way."""
    found = compared(
        (*WAYS[way], "vms.0.guest.processes.0.phases.1.sync=true", "vms.0.guest.processes.0.phases.2.passes=2"),
        kernel=f"{{tick: off, file_system: {{kind: {kind}, write: 5 us, at_once: 1, background: 0 %}}}}",
    )

    assert found.differences == ()
    assert found.compared[APPLICATION] >= CALLS + 1
