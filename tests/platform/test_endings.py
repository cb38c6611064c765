"""How VMs and machines end before their time."""

from __future__ import annotations

import pytest

from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.primitives import Stage, processes
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


PARENT = """
machine: {memory: 128 MiB}
vms:
  - memory: 64 MiB
    guest:
      kernel: {tick: off}
      processes: [{name: shell, phases: [{primitive: fork, iterations: 4, pages: 2}]}]
"""
ASTRAY = 0x1000  # where nothing is mapped
KILLED = f"killed by #PF on address {ASTRAY:#x}, rip 0x"


@pytest.mark.parametrize("technique", [pytest.param("hardware", marks=pytest.mark.slow), "native"])
@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (ops.CC_Z, f"a child of process 'shell' was {KILLED}"),  # the first of four, so that three others end behind it
        (ops.CC_NZ, f"3 children of process 'shell' were killed; the last was {KILLED}"),
    ],
)
def test_a_child_that_touches_what_it_may_not_is_reported_though_others_end_well(
    technique: str, condition: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch, calls = processes.touch, iter((False, True))

    def child_strays(a: Assembler, at: Stage, pages: int) -> None:
        if next(calls):  # R12 counts iterations down
            a.cmp(s.R12, 4)
            a.jcc(condition ^ 1, "no_stray")
            a.mov(s.RSI, ASTRAY)
            a.st(Mem(s.RSI), s.RSI)
            a.label("no_stray")
        touch(a, at, pages)

    monkeypatch.setattr(processes, "touch", child_strays)
    (vm,) = Machine(parse_scenario(PARENT, [f"vmm.technique={technique}"])).run().vms

    assert vm.stopped is not None
    assert vm.stopped.startswith(said)
    assert ";" not in vm.stopped.removeprefix(said)


def test_children_that_end_well_are_not_reported() -> None:
    (vm,) = Machine(parse_scenario(PARENT)).run().vms

    assert vm.stopped is None


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
