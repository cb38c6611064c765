"""Twice the ordinary work between operations changes no count: exits, walks and what guests see come from operations.

Ticks are off, for a clock goes on while a guest works. What differs all the same, and why, is named here.
`pytest -m long tests/study/test_work_scale.py` runs every shipped scenario with every technique and paging that it can
have, in a quarter of an hour to an hour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from attrs import evolve

from vtsim.base.errors import ConfigError
from vtsim.config import load_scenario
from vtsim.platform.machine import Machine
from vtsim.platform.spec import Scenario
from vtsim.platform.witness import Wanted
from vtsim.study.compare import LEFT_OPEN
from vtsim.study.measure import result_of
from vtsim.vmm.techniques import techniques

pytestmark = [pytest.mark.long, pytest.mark.compiled_only]

WAYS: Final = {
    "as it is": (),
    "native": ("vmm.technique=native",),
    "EPT": ("vmm.paging=ept",),
    "shadow paging": ("vmm.paging=shadow",),
    "agile paging": ("vmm.paging=agile",),
    "direct tables": ("vmm.paging=direct-pv",),
    "trap and emulate": ("vmm.technique=trap-and-emulate", "machine.isa=virtualizable"),
    "binary translation": ("vmm.technique=binary-translation",),
    "paravirtual": ("vmm.technique=paravirtual",),
    "user mode": ("vmm.technique=user-mode",),
    "interpreter": ("vmm.technique=interpreter",),
    "dynamic translation": ("vmm.technique=dynamic-translation",),
}
FILES: Final = sorted(str(path) for path in Path("workloads").rglob("*.yaml") if path.parts[1] != "studies")
# whose counts hang on time, and what of it
TIMED: Final = {
    "workloads/two_vms.yaml": "two VMs take turns on a CPU, which a timer interrupts",
    "workloads/memory/hyper_threads.yaml": "two VMs share what a core has",
    "workloads/memory/shared_line.yaml": "threads fault at the same pages",
    "workloads/paging/fault_threads.yaml": "threads fault at the same pages, and wait for each other's locks",
    "workloads/paging/mmap_file.yaml": "a server takes its time",
    "workloads/paging/shootdown.yaml": "threads wait for each other's locks and acknowledgements",
    "workloads/vmexit/ipi.yaml": "a CPU looks for what another one answers",
    "workloads/overcommit/vcpus.yaml": "a daemon of the host wakes by the clock",
    "workloads/overcommit/balloon.yaml": "a balloon driver wakes by the clock",
    "workloads/overcommit/sharing.yaml": "a daemon of the host wakes by the clock",
    "workloads/overcommit/swap.yaml": "a disk takes its time",
    "workloads/host_memory/collapse.yaml": "a daemon of the host wakes by the clock",
    "workloads/host_memory/dirty_log_vcpus.yaml": "what was written is collected by the clock",
    "workloads/host_memory/dirty_log_and_back.yaml": "a daemon of the host wakes by the clock",
    "workloads/iommu": "devices take their time",
    "workloads/real/linux-": "the recorded kernels read clocks until time has passed",
}
# whose walks hang on time: what is loaded on a wrong path is as much as comes before its branch is resolved
SPECULATIVE: Final = ("workloads/memory/canneal.yaml",)
SOFTWARE_TAKES_MINUTES: Final = ("workloads/paging/random_access.yaml", "workloads/memory", "workloads/real")


def timed(file: str) -> bool:
    """Does a clock, a device, or another CPU decide what comes when?"""
    return any(file.startswith(each) for each in TIMED)


def variant(file: str, sets: tuple[str, ...]) -> Scenario:
    """The scenario in one way, without ticks; raises `ConfigError` where it cannot have that."""
    ticks = [f"vms.{n}.guest.kernel.tick=off" for n in range(len(load_scenario(file).vms))]
    try:
        return load_scenario(file, [*sets, *ticks])
    except ConfigError:
        return load_scenario(file, [*sets, *ticks, *LEFT_OPEN])


def counts(scenario: Scenario, scale: int) -> dict[str, object]:
    """What must not hang on time."""
    run = evolve(scenario.run, work_scale=scale, limit=100 * scale * scenario.run.limit)
    machine = Machine(evolve(scenario, run=run), wanted=Wanted())
    outcome = machine.run()
    result, technique = result_of([outcome]), techniques[scenario.vmm.technique]
    found: dict[str, object] = {
        "stopped": dict(result.stopped),
        "seen": {
            (vm, vcpu, name): (stream.count, stream.digest)
            for (vm, vcpu), seen in machine.witnessed().items()
            for name, stream in seen.streams.items()
        },
        "hypercalls": outcome.hypercalls,
        "monitor": outcome.monitor,
    }
    if scenario.vmm.paging == "agile":  # which counts stores to tables in an interval of a millisecond
        return found
    found["exits"] = {each.reason: each.count for each in result.exits}
    if not technique.in_software:  # there ordinary work is emulated too
        found["emulated"] = (result.guest.ring0.emulated, result.guest.ring3.emulated)
        found["translations"] = outcome.translations
    if scenario.vmm.technique != "dynamic-translation":  # which makes code of ordinary work, so that it has more pages
        found["references"] = result.walks.references
    return found


@pytest.mark.parametrize("file", [file for file in FILES if not timed(file)])
def test_twice_the_ordinary_work_changes_no_count_in_any_way(file: str) -> None:
    done, differences = set(), {}
    for way, sets in WAYS.items():
        try:
            scenario = variant(file, sets)
        except ConfigError:
            continue
        which, software = (scenario.vmm.technique, scenario.vmm.paging), techniques[scenario.vmm.technique].in_software
        if which in done or (software and any(file.startswith(each) for each in SOFTWARE_TAKES_MINUTES)):
            continue
        done.add(which)
        once, twice = counts(scenario, 1), counts(scenario, 2)
        names = once.keys() - ({"references"} if file in SPECULATIVE else set())
        if differing := {name: (once[name], twice[name]) for name in names if once[name] != twice[name]}:
            differences[way] = differing

    assert done
    assert differences == {}
