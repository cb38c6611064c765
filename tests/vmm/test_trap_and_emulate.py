"""A guest whose kernel runs in ring 3: the same results where the ISA lets a monitor see everything, else none."""

from __future__ import annotations

import pytest

from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.platform.machine import Machine
from vtsim.platform.outcome import OwnerCounts

TEXT = """
machine: {{memory: 256 MiB}}
vms:
  - memory: 64 MiB
    guest:
      kernel: {kernel}
      processes: {processes}
"""
PLAIN, KPTI, TICK = "{tick: off}", "{tick: off, kpti: true}", "{tick: 50 us}"
CALLS = "[{phases: [{primitive: syscall, iterations: 3}]}]"
FORK = "[{phases: [{primitive: fork, iterations: 2, pages: 5}]}]"
FAULTS = "[{phases: [{primitive: page_fault, region: 48 KiB, iterations: 2}, {primitive: cpuid, iterations: 1}]}]"
SWITCHES = (
    "[{name: a, phases: [{primitive: work, instructions: 300000}, {primitive: context_switch, iterations: 3}, "
    "{primitive: idle, duration: 120 us}]}, "
    "{name: b, phases: [{primitive: context_switch, iterations: 3}]}]"
)
GUESTS = {"fork with KPTI": (KPTI, FORK), "faults": (PLAIN, FAULTS), "ticks, idling and switches": (TICK, SWITCHES)}
NATIVE = ("vmm.technique=native",)
MONITOR = ("vmm.technique=trap-and-emulate", "machine.isa=virtualizable")
ON_X86 = ("vmm.technique=trap-and-emulate",)


def machine(guest: tuple[str, str], sets: tuple[str, ...]) -> Machine:
    return Machine(parse_scenario(TEXT.format(kernel=guest[0], processes=guest[1]), list(sets)))


def run(guest: tuple[str, str], sets: tuple[str, ...]) -> tuple[Machine, OwnerCounts, str | None]:
    there = machine(guest, sets)
    outcome = there.run()
    (vm,) = outcome.vms
    return there, outcome.owners[vm.name], vm.stopped


def seen(machine: Machine) -> int:
    return int(machine.engine.cpus[0][s.DIGEST_APPLICATION])


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("profile", ["skx-4114", "p4-672"])
def test_processes_of_a_deprivileged_kernel_see_what_they_see_natively(guest: str, profile: str) -> None:
    processor = (f"machine.profile={profile}",)
    there, counts, stopped = run(GUESTS[guest], (*MONITOR, *processor))
    natively, expected, _ = run(GUESTS[guest], (*NATIVE, *processor))

    assert stopped is None
    assert seen(there) == seen(natively)
    assert counts.counters["page_faults"] == expected.counters["page_faults"]
    assert counts.counters["syscalls"] == expected.counters["syscalls"]


def test_every_instruction_of_the_guest_is_executed_in_ring_3_or_emulated() -> None:
    _, counts, _ = run((PLAIN, CALLS), MONITOR)
    _, natively, _ = run((PLAIN, CALLS), NATIVE)

    assert counts.instructions[o.R0] == 0
    assert counts.instructions[o.R3] - counts.deprivileged == natively.instructions[o.R3]
    assert counts.deprivileged + counts.emulated[0] == natively.instructions[o.R0]
    assert counts.emulated[1] == 0


def test_the_kernel_is_charged_to_the_ring_that_it_believes_in() -> None:
    _, counts, _ = run((PLAIN, CALLS), MONITOR)
    kernel, process = ([sum(row) for row in ring] for ring in counts.cycles)

    assert kernel[o.R3] > 0
    assert process[o.R3] > 0
    assert kernel[o.R0] == process[o.R0] == 0


def test_every_system_call_switches_to_the_tables_of_the_kernel_and_back() -> None:
    there, counts, _ = run((PLAIN, CALLS), MONITOR)
    assert there.monitor is not None
    found = there.monitor.statistics()

    assert found["system_calls"] == counts.counters["syscalls"] == 4  # the last one ends the process
    assert found["switches"] == 1 + 2 * 4 - 1  # the process is entered, and the last call does not return


def test_on_x86_a_kernel_in_ring_3_returns_to_a_process_unseen_and_is_lost() -> None:
    there, _, stopped = run((PLAIN, FAULTS), ON_X86)
    assert there.monitor is not None

    assert there.monitor.statistics()["switches"] == 0
    assert stopped == "the guest's stack or descriptor table was not mapped when an exception was delivered"


def test_what_the_monitor_does_not_emulate_ends_the_vm_and_says_so() -> None:
    no_long_mode = "[{phases: [{primitive: wrmsr, msr: 0xC0000080, value: 0, iterations: 1}]}]"

    assert run((PLAIN, no_long_mode), MONITOR)[2] == (
        "the guest's kernel asked for what the monitor does not emulate: WRMSR"
    )


def test_ports_that_nobody_gave_the_guest_are_emulated() -> None:
    for phase in ("port_in, port: 0x5000, iterations: 2", "port_out, port: 0x5000, value: 1, iterations: 2"):
        guest = (PLAIN, f"[{{phases: [{{primitive: {phase}}}]}}]")
        _, counts, stopped = run(guest, MONITOR)
        assert stopped is None
        assert counts.emulated[0] >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vmm.paging=ept", "technique 'trap-and-emulate' translates by shadow tables"),
        ("vmm.vpid=true", "technique 'trap-and-emulate' uses nothing of VT-x"),
        ("vms.0.guest.kernel.paging=5-level", "technique 'trap-and-emulate' has shadow tables of four levels"),
    ],
)
def test_a_monitor_is_not_asked_for_what_it_cannot_do(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        machine((PLAIN, CALLS), (*MONITOR, "machine.cpu={features.la57: true, vmx.generation: ice-lake-sp}", change))
