"""Interrupts of a VM's own devices, remapped to the host or posted to a vCPU: exits, halts, turns on a CPU.

VT-d: "Interrupt-Posting Hardware Operation".
SDM: "Posted-Interrupt Processing".
"""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st_

from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.platform.machine import Machine
from vtsim.study.measure import result_of
from vtsim.study.result import Driver
from vtsim.vmm import layout as at
from vtsim.vmm.build import build_hypervisor

POSTED: Final = "apicv: true, posted_interrupts: true"
REMAPPED: Final = "apicv: true"
PHASE: Final = "primitive: dma_buffers, groups: 2, group: 4, bytes: 256"


def run(
    vmm: str, phase: str, *, cpus: int = 1, vcpus: int = 1, devices: int = 1, rival: int = 0, up: int = 175
) -> tuple[list[Driver], dict[str, int], Machine]:
    """Drivers, exits and the machine after a run; `rival`: instructions of a VM that shares CPU 0.

    `up`: nanoseconds from a device to the unit.
    """
    names = "abcd"[:devices]
    dma = ", ".join(f"{{name: {name}, source: '0{3 + n}:00.0', link: {{up_ns: {up}}}}}" for n, name in enumerate(names))
    processes = ", ".join(f"{{name: {name}, phases: [{{{PHASE}, device: {name}, {phase}}}]}}" for name in names)
    other = ""
    if rival:
        other = f", {{memory: 32 MiB, cpu: 0, guest: {{processes: [{{phases: [{{primitive: work, instructions: {rival}}}]}}]}}}}"
    first = ", cpu: 0" if vcpus == 1 else ""
    machine = Machine(
        parse_scenario(
            f"run: {{limit: 20 ms}}\nmachine: {{memory: 256 MiB, cpus: {cpus}}}\nvmm: {{{vmm}}}\ndma: [{dma}]\n"
            f"vms: [{{memory: 32 MiB, vcpus: {vcpus}{first}, guest: {{kernel: {{dma: identity, tick: off}}, "
            f"processes: [{processes}]}}}}{other}]\n"
        )
    )
    result = result_of([machine.run()])
    assert not result.stopped, "an interrupt that was lost leaves a driver halted for ever"
    drivers = [each.driver for each in result.dma]
    assert all(driver is not None and driver.done == driver.descriptors for driver in drivers)
    exits = {each.reason: each.count for each in result.exits}
    return [driver for driver in drivers if driver is not None], exits, machine


@pytest.mark.parametrize("personality", ["minimal", "kvm"])
def test_an_interrupt_of_a_device_exits_if_it_is_remapped_and_not_if_it_is_posted_to_a_guest_that_runs(
    personality: str,
) -> None:
    counts = {}
    for way in (REMAPPED, POSTED):
        (driver,), exits, machine = run(f"personality: {personality}, {way}", "wait: poll, iterations: 12")
        assert driver.interrupts == 12 + 2
        missing = driver.interrupts - driver.interrupts_handled - driver.interrupts_merged
        assert 0 <= missing <= 1, "only of the last one the guest need not take notice: its work is seen done before"
        assert machine.driven is not None
        unit = machine.driven.unit.statistics()
        assert unit["interrupt requests posted"] == (driver.interrupts if way == POSTED else 0)
        assert unit["notifications"] <= unit["interrupt requests posted"]
        counts[way] = exits.get("EXTERNAL_INTERRUPT", 0), driver.interrupts_handled
        assert "HLT" not in exits

    assert 0 < counts[REMAPPED][1] <= counts[REMAPPED][0] <= counts[REMAPPED][1] + 1
    assert counts[POSTED][0] == 0 < counts[POSTED][1]


@pytest.mark.slow
@settings(max_examples=2, deadline=None)
@given(
    way=st_.sampled_from([REMAPPED, POSTED, POSTED]),
    personality=st_.sampled_from(["minimal", "kvm"]),
    wait=st_.sampled_from(["interrupt", "interrupt", "poll"]),
    work=st_.integers(0, 3000),
    turn=st_.integers(3_000, 60_000),
    rival=st_.integers(0, 400_000),
    vcpus=st_.integers(1, 2),
    up=st_.sampled_from([100, 700, 2000, 6000]),
)
@example(POSTED, "kvm", "interrupt", 0, 5_000, 400_000, 1, 4000)
@example(POSTED, "minimal", "poll", 500, 20_000, 300_000, 1, 300)
@example(POSTED, "minimal", "interrupt", 100, 7_000, 200_000, 2, 4000)
@example(REMAPPED, "kvm", "interrupt", 0, 5_000, 400_000, 1, 4000)
def test_no_interrupt_is_lost_or_invented_whenever_a_vcpu_runs_halts_or_waits(
    way: str, personality: str, wait: str, work: int, turn: int, rival: int, vcpus: int, up: int
) -> None:
    defaults = build_hypervisor.__kwdefaults__
    assert defaults is not None
    kept, defaults["tick_ns"] = defaults["tick_ns"], turn
    try:
        drivers, exits, machine = run(
            f"personality: {personality}, {way}", f"wait: {wait}, work: {work}, iterations: 5", cpus=2, vcpus=vcpus,
            devices=vcpus, rival=rival, up=up,
        )  # fmt: skip
    finally:
        defaults["tick_ns"] = kept

    for driver in drivers:
        assert driver.interrupts == 5 + 2
        assert 0 < driver.interrupts_handled <= driver.interrupts
        assert driver.interrupts_blocked == 0
    assert ("HLT" in exits) <= (wait == "interrupt")
    hypervisor = machine.hypervisor
    assert hypervisor is not None
    if way == POSTED:  # each descriptor leads to the CPU of its vCPU
        for vcpu in hypervisor.vcpus:
            notify = hypervisor.host.load(vcpu.address + at.V["POSTED"] + 32)
            assert notify >> 32 == vcpu.cpu and notify >> 16 & 0xFF in (at.POSTED_VECTOR, at.KICK_VECTOR)


def test_posting_is_refused_without_what_it_needs() -> None:
    guest = "guest: {processes: [{phases: [{primitive: work}]}]}"
    for vmm, message in (
        ("posted_interrupts: true", "where the processor keeps the virtual local APIC"),
        (POSTED, "no VM has a device whose interrupts could be posted"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_scenario(f"vmm: {{{vmm}}}\nvms: [{{memory: 64 MiB, {guest}}}]\n")
