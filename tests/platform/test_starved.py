"""A run whose guests get nowhere says so while it runs, and in its result."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtsim.config import load_scenario, parse_scenario
from vtsim.platform.starved import STRETCH
from vtsim.study.run import simulate

pytestmark = pytest.mark.compiled_only

SCENARIO = """
machine: {memory: 512 MiB}
run: {baseline: false, limit: 10 s}
vms:
  - memory: 64 MiB
    guest:
      processes:
        - phases:
            - {primitive: stream, region: 16 MiB, write: 50 %, accesses: 100 M}
"""
TICK = (
    "vm0 does nothing but handle interrupts: its kernel's tick of 1 us is shorter than handling one takes; "
    "vms.0.guest.kernel.tick can be longer, or off"
)
FOLDER = Path("workloads")


class User:
    """Stops a run as soon as it says something, or after some time that it was given."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.told: list[str] = []

    def __call__(self, stage: str, done: float, instructions: int) -> bool:
        self.looks -= 1
        return not self.told and self.looks > 0

    def remark(self, sentence: str) -> None:
        self.told.append(sentence)


def told(*sets: str) -> list[str]:
    """What a user hears within two stretches, who then has a result that says the same."""
    user = User(looks=2 * STRETCH >> 24)
    result = simulate(parse_scenario(SCENARIO, sets), progress=user)

    assert result.partial
    assert list(result.notes) == user.told
    return user.told


@pytest.mark.parametrize(
    "where",
    [
        ("vmm.technique=native",),
        (),
        ("vmm.paging=shadow",),
        ("vmm.technique=trap-and-emulate", "machine.isa=virtualizable"),
        ("vmm.technique=binary-translation",),
        ("vmm.technique=paravirtual",),
        ("vmm.technique=user-mode",),
    ],
    ids=" ".join,
)
def test_a_tick_that_is_shorter_than_its_handling_is_told(where: tuple[str, ...]) -> None:
    small = "vms.0.guest.processes.0.phases.0.region=256 KiB"  # else its page faults are progress for a while

    assert told(*where, small, "vms.0.guest.kernel.tick=1 us") == [TICK]


@pytest.mark.parametrize("technique", ["native", "hardware", "user-mode"])
def test_a_tick_that_leaves_time_is_not_told(technique: str) -> None:
    assert told(f"vmm.technique={technique}", "vms.0.guest.kernel.tick=100 us") == []


@pytest.mark.parametrize("daemon", ["dirty_log.method=pml", "sharing.on=true", "collapse.on=true"])
def test_a_daemon_whose_turn_is_longer_than_its_period_is_told(daemon: str) -> None:
    period = f"vmm.{daemon.partition('.')[0]}.period"

    (sentence,) = told(f"vmm.{daemon}", f"{period}=1 us")
    assert told(f"vmm.{daemon}", f"{period}=1 ms") == []

    has, _, why = sentence.partition(" % of the time, work on their memory takes the rest: ")
    assert why == f"{period} of 1 us is shorter than a turn takes, and can be longer"
    assert int(has.removeprefix("guests have ")) < 20


@pytest.mark.parametrize("daemon", ["dirty_log.method=pml", "sharing.on=true", "collapse.on=true"])
def test_a_guest_at_rest_is_not_starved(daemon: str) -> None:
    sets = ("run.limit=60 ms", f"vmm.{daemon}", f"vmm.{daemon.partition('.')[0]}.period=50 us")

    assert simulate(load_scenario(FOLDER / "idle.yaml", ["run.baseline=false", *sets])).notes == ()


def test_the_tick_is_no_reason_where_a_daemon_is_one() -> None:
    sets = ("run.baseline=false", "run.limit=100 ms", "vmm.sharing.period=1 us")

    assert simulate(load_scenario(FOLDER / "overcommit/sharing.yaml", sets)).notes == (
        "guests have 0 % of the time, work on their memory takes the rest: vmm.sharing.period of 1 us is shorter than a "
        "turn takes, and can be longer",
    )


@pytest.mark.parametrize(
    "phase",
    [
        "{primitive: cpuid, iterations: 100 k}",
        "{primitive: syscall, iterations: 500, work: 200 k}",
        "{primitive: hlt, iterations: 2000}",
        "{primitive: idle, duration: 200 ms}",
        "{primitive: wrmsr, msr: 0x174, iterations: 100 k}",
        "{primitive: page_fault, region: 16 MiB, iterations: 10}",
    ],
)
def test_work_of_any_kind_and_rest_are_no_reason(phase: str) -> None:
    sets = (f"vms.0.guest.processes.0.phases.0={phase}", "vms.0.guest.kernel.tick=100 us", "run.limit=1 s")

    assert simulate(parse_scenario(SCENARIO, sets)).notes == ()


@pytest.mark.parametrize("file", ["vmexit/ipi.yaml", "paging/shootdown.yaml", "overcommit/swap.yaml"])
def test_interrupts_of_others_and_a_slow_disk_are_no_reason(file: str) -> None:
    path = FOLDER / file
    assert simulate(load_scenario(path, ["run.baseline=false"])).notes == ()


def test_a_guest_that_its_monitor_lost_is_explained() -> None:
    sets = (
        "vmm.technique=trap-and-emulate",
        "vms.0.guest.processes.0.phases.0={primitive: page_fault, region: 64 KiB}",
    )
    lost = simulate(parse_scenario(SCENARIO, sets))

    assert lost.stopped
    assert lost.notes == (
        "sensitive operations of x86 do not trap in ring 3, and guests get lost; machine.isa can be virtualizable",
    )
    assert simulate(parse_scenario(SCENARIO, (*sets, "machine.isa=virtualizable"))).notes == ()
