"""The sensitive unprivileged instructions, as a guest's kernel executes them: who is told, and who computes otherwise."""

from __future__ import annotations

from functools import cache

import attrs
import pytest

from vtsim.base.errors import ConfigError
from vtsim.config import load_scenario, parse_scenario, resolve
from vtsim.cpu.assembler import Program
from vtsim.guest.spec import ROBIN_IRVINE
from vtsim.platform.machine import Machine
from vtsim.platform.spec import Scenario
from vtsim.platform.witness import APPLICATION, EXCEPTION, KERNEL, STREAMS, Stream, Wanted, Witnessed
from vtsim.study import equivalence as e
from vtsim.study.run import without_hypervisor

FILE = "workloads/techniques/sensitive.yaml"
ON_X86 = ["machine.isa=x86"]
WAYS = {
    "trap and emulate where they trap": ("machine.isa=virtualizable",),
    "VT-x with EPT": ("vmm.technique=hardware",),
    "hosted, shadow paging": ("vmm.technique=hardware", "vmm.personality=kvm", "vmm.paging=shadow"),
    "binary translation": ("vmm.technique=binary-translation",),
    "interpreter": ("vmm.technique=interpreter",),
    "dynamic translation": ("vmm.technique=dynamic-translation",),
}
# what a monitor on x86 learns of, or what shows nothing of the ring, in 64-bit mode
PROCESS = """
machine: {memory: 64 MiB}
vms:
  - memory: 16 MiB
    guest: {kernel: {tick: off}, processes: [{phases: [{primitive: sensitive_user, iterations: 1}]}]}
"""
NOT_CAUGHT = {
    "pop": "POP of FS in ring 3 faults where the segment is the kernel's",
    "push": "PUSH of FS shows a selector that any ring may have loaded",
    "int": "the monitor's gates are of ring 0, so that INT faults",
    "ret": "a far return to a segment of ring 0 faults in ring 3",
}


def boots_only(scenario: Scenario) -> Scenario:
    """The same whose kernel executes the list at boot only, so that each place is seen once."""
    (vm,) = scenario.vms
    (process,) = vm.guest.processes
    guest = attrs.evolve(vm.guest, processes=(attrs.evolve(process, phases=process.phases[1:]),))
    return attrs.evolve(scenario, vms=(attrs.evolve(vm, guest=guest),))


def witnessed(scenario: Scenario) -> Witnessed:
    machine = Machine(scenario, wanted=Wanted())
    machine.run()
    (seen,) = machine.witnessed().values()
    return seen


@cache
def natively() -> Witnessed:
    return witnessed(without_hypervisor(load_scenario(FILE, ON_X86)))


def values(stream: Stream, text: Program, name: str) -> list[tuple[int, int, int, int]]:
    """What the instructions behind a label of the kernel's boot showed."""
    first = text.labels[f"boot_{name}"]
    inner = (f"boot_{name}_there", f"boot_{name}_refused", f"boot_{name}")
    end = min(at for label, at in text.labels.items() if at > first and label not in inner)
    return [(row.op, row.of, row.part, row.value) for row in stream.rows if first <= row.rip < end]


def test_a_monitor_on_x86_is_caught_by_each_instruction_that_does_not_trap() -> None:
    scenario = boots_only(load_scenario(FILE, ON_X86))
    first, second = witnessed(without_hypervisor(scenario)), witnessed(scenario)
    caught = {
        name
        for name in ROBIN_IRVINE
        for stream in (KERNEL, EXCEPTION)
        if values(first.streams[stream], first.texts[0], name) != values(second.streams[stream], second.texts[0], name)
    }

    assert caught == set(ROBIN_IRVINE) - set(NOT_CAUGHT)


@pytest.mark.compiled_only
@pytest.mark.parametrize("way", WAYS)
def test_where_the_monitor_learns_of_each_of_them_or_need_not_the_guest_sees_the_same(way: str) -> None:
    there, natives = witnessed(load_scenario(FILE, [*ON_X86, *WAYS[way]])), natively()

    for stream in STREAMS:
        here, expected = there.streams[stream], natives.streams[stream]
        assert (here.count, here.digest) == (expected.count, expected.digest), stream
        assert expected.count


@pytest.mark.compiled_only
def test_applications_see_the_same_but_where_they_run_directly_and_nothing_traps() -> None:
    def seen(*sets: str) -> tuple[int, int]:
        stream = witnessed(parse_scenario(PROCESS, list(sets))).streams[APPLICATION]
        return stream.count, stream.digest

    natives = seen("vmm.technique=native")
    assert natives[0] > len(ROBIN_IRVINE)
    assert {way for way, sets in WAYS.items() if seen("vmm.technique=trap-and-emulate", *sets) != natives} == {
        "binary translation"  # of kernels only: processes run directly
    }


@pytest.mark.parametrize("phases", ["{primitive: sensitive}", "{primitive: syscall}"])
def test_a_kernel_built_for_ring_3_is_not_asked_for_them(phases: str) -> None:
    text = PROCESS.replace("{primitive: sensitive_user, iterations: 1}", phases)
    listed = [] if "sensitive" in phases else ["vms.0.guest.kernel.sensitive=[sgdt]"]

    with pytest.raises(ConfigError, match="kernels are built for ring 3"):
        resolve(parse_scenario(text, ["vmm.technique=paravirtual", *listed]), "test")


@pytest.mark.compiled_only
def test_the_first_difference_on_x86_is_the_first_of_the_list() -> None:
    there = load_scenario(FILE, ON_X86)
    (difference,) = e.compare(without_hypervisor(there), there).differences

    assert (difference.stream, difference.operation) == ("kernel", "SGDT")
    assert difference.place.startswith("guest kernel, boot_sgdt")
    assert difference.first.startswith("limit ") and difference.first != difference.second
