"""How VMs and machines end before their time."""

from __future__ import annotations

import pytest

from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.platform import machine as module
from vtsim.platform.machine import Machine

GUEST = """
machine: {memory: 128 MiB}
vms:
  - memory: 64 MiB
    guest:
      kernel: {tick: off}
      processes:
        - {name: reader, phases: [{primitive: rdmsr, msr: 0xdead, iterations: 3}]}
        - {name: good, phases: [{primitive: cpuid, iterations: 3}]}
"""


@pytest.mark.parametrize("technique", ["hardware", "native"])
def test_a_process_that_touches_what_it_may_not_is_reported_and_the_others_go_on(technique: str) -> None:
    outcome = Machine(parse_scenario(GUEST, [f"vmm.technique={technique}"])).run()

    (vm,) = outcome.vms
    assert vm.stopped is not None
    assert vm.stopped.startswith("process 'reader' was killed by #GP, rip 0xffffffff81")
    assert ";" not in vm.stopped


def test_a_machine_that_this_computer_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "Engine", engine)

    with pytest.raises(ConfigError) as raised:
        Machine(parse_scenario(GUEST))
    assert str(raised.value) == (
        "machine.memory: this computer has too little memory to simulate that much\n"
        " help: give the machine and its VMs less memory, or fewer CPUs"
    )


def test_a_guest_that_needs_more_memory_than_its_vm_has_is_refused_by_its_path() -> None:
    scenario = parse_scenario(GUEST, ["vms.0.guest.processes.1.phases.0={primitive: fork, pages: 16384}"])

    with pytest.raises(ConfigError) as raised:
        Machine(scenario)
    assert str(raised.value).startswith("vms.0.memory: 64 MiB of memory are too little for ")


def test_a_vm_that_is_switched_away_in_user_mode_comes_back() -> None:
    text = """
vmm: {personality: minimal}
vms:
  - memory: 16 MiB
    cpu: 0
    guest: &same
      kernel: {tick: off}
      processes: [{phases: [{primitive: work, instructions: 60000000}]}]
  - {memory: 16 MiB, cpu: 0, guest: *same}
"""
    machine = Machine(parse_scenario(text))
    outcome = machine.run()

    assert [vm.stopped for vm in outcome.vms] == [None, None]
    exits = {each.reason: each.count for owner in outcome.owners.values() for each in owner.exits}
    assert exits[1] > 2  # external interrupts: the scheduler's tick
