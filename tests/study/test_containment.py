"""Each containment has a mechanism: with it taken away the attack gets through, and with it the attack does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.study.test_verdict import named, scenario
from vtsim.base import memory as mem
from vtsim.base.kept import nothing_kept
from vtsim.base.memory import PAGE_BYTES
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler
from vtsim.ept import spec as e
from vtsim.ept.memory_slots import SLOT
from vtsim.platform.machine import Machine
from vtsim.study import attacks as at
from vtsim.study.attacks import Suite
from vtsim.vmcs.controls import CONTROL
from vtsim.vmm import layout
from vtsim.vmm import vmcs as fields
from vtsim.vmm.hypervisor import Hypervisor
from vtsim.vmm.memory import VmMemory
from vtsim.vmm.monitor import layout as monitor
from vtsim.vmm.monitor.virtual_cpus import Monitor
from vtsim.vmm.programs import direct, direct_tables

pytestmark = pytest.mark.compiled_only

READ = ("the host's canary was read", "the host's canary was overwritten")
BY_SLOTS = {
    "EPT": ("vmm.paging=ept",),
    "shadow paging": ("vmm.paging=shadow",),
    "trap and emulate": ("vmm.technique=trap-and-emulate", "machine.isa=virtualizable"),
    "binary translation": ("vmm.technique=binary-translation",),
}
DEPRIVILEGED = {
    "trap and emulate": BY_SLOTS["trap and emulate"],
    "binary translation": BY_SLOTS["binary translation"],
    "paravirtual": ("vmm.technique=paravirtual",),
}
DIRECT = {
    "VMX": ("vmm.paging=direct-pv",),
    "ring 3": ("vmm.technique=paravirtual",),
    "a process": ("vmm.technique=user-mode", "vms.0.devices=[]", "vms.0.guest.kernel.probe=false"),
}


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Machine, int], None]], None]:
    """Lets every machine of a suite be changed before it runs; the change is told the canary's frame."""

    def change(how: Callable[[Machine, int], None]) -> None:
        def built(*arguments: Any, **options: Any) -> Machine:
            machine = Machine(*arguments, **options)
            how(machine, at.canary_frames(Machine(*arguments))["host"])
            return machine

        monkeypatch.setattr(at, "Machine", built)

    return change


def give(machine: Machine, frame: int) -> None:
    """The attacker's memory slots and the page tables behind them have the frame too, at its own number."""
    below, memory = machine.below, machine.vms[0].memory
    assert below is not None and isinstance(memory, VmMemory)
    pools = below.vcpus[0].pools if isinstance(below, Hypervisor) else ()
    for each in pools:
        each.handed_over = False
    memory.backing.map(memory.base + frame * PAGE_BYTES, [frame], memory.leaf)
    for each in pools:
        each.hand_over()
    if isinstance(below, Hypervisor):
        slots = below.host.load(below.vcpus[0].address + layout.V["SLOTS"])
    else:
        slots = below.word(below.vcpus[0], "SLOTS")
    end = (slots - below.host.direct) % (1 << 64) + SLOT["END"]
    machine.engine.store(end, (frame + 1) * PAGE_BYTES)


@pytest.mark.parametrize("way", BY_SLOTS)
def test_a_frame_beyond_the_guests_memory_is_kept_by_the_slots_that_do_not_have_it(
    way: str, changed: Callable[[Callable[[Machine, int], None]], None]
) -> None:
    suite = Suite(scenario(*BY_SLOTS[way]))
    parts = ("the host's memory", "4 KiB")

    assert named(suite, *parts).contained
    changed(give)
    assert named(suite, *parts).effects == READ


def open_the_monitor(machine: Machine, frame: int) -> None:
    """User mode may use what the entries of the monitor's own tables lead to that map all of memory."""
    below = machine.below
    assert isinstance(below, Monitor)
    top = below.word(below.vcpus[0], "TOP") - monitor.DIRECT >> 12
    index = monitor.DIRECT // monitor.TOP_ENTRY % 512
    levels = [(top, range(index, index + 1))]
    for _ in range(4):
        below_them = []
        for table, entries in levels:
            words = machine.engine.contents(table, mem.TABLE)
            for entry in entries:
                if words[entry] & e.PTE_PRESENT:
                    words[entry] |= e.PTE_USER
                    if not words[entry] & e.PTE_LARGE:
                        below_them.append((int(words[entry] & e.ADDRESS) >> 12, range(512)))
        levels = below_them


@pytest.mark.parametrize("way", DEPRIVILEGED)
def test_the_monitors_own_memory_is_kept_by_the_bit_that_keeps_ring_3_out(
    way: str, changed: Callable[[Callable[[Machine, int], None]], None]
) -> None:
    suite = Suite(scenario(*DEPRIVILEGED[way]))
    parts = ("the host's memory", "own addresses")

    assert named(suite, *parts).contained
    changed(open_the_monitor)
    assert named(suite, *parts).effects == READ


@pytest.mark.parametrize("way", DIRECT)
def test_direct_tables_are_kept_by_the_types_and_owners_of_frames(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the jumps by which `leaf_get` refuses, an entry may lead anywhere, and a table may be written."""
    names = ("an entry asked for", "a table made writable")
    real = direct_tables._entries

    def entries(a: Assembler, ground: direct_tables.Ground) -> None:
        class Trusting:
            """An assembler that leaves these jumps out."""

            label_now = ""

            def __getattr__(self, name: str) -> Any:
                return getattr(a, name)

            def label(self, name: str) -> str:
                self.label_now = name
                return a.label(name)

            def jcc(self, condition: int, target: str, **options: Any) -> None:
                refuses = target == "type_refused" or condition == ops.CC_NZ
                if not (self.label_now in ("leaf_get", "leaf_writable") and refuses):
                    a.jcc(condition, target, **options)

        real(Trusting(), ground)  # type: ignore[arg-type]

    suite = Suite(scenario(*DIRECT[way]))
    before = [named(suite, "the host's memory", name).effects for name in names]
    monkeypatch.setattr(direct_tables, "_entries", entries)

    assert before == [(), ()]
    assert [named(suite, "the host's memory", name).effects for name in names] == [READ, READ]


@pytest.mark.parametrize("personality", ["kvm", "minimal"])
def test_direct_tables_are_kept_by_the_flush_of_other_vcpus_at_a_change_of_type(
    personality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = Suite(scenario(*DIRECT["VMX"], f"vmm.personality={personality}"))
    parts = [(whose, "a stale translation") for whose in ("the host's memory", "another VM's memory")]
    before = [named(suite, *each).effects for each in parts]
    monkeypatch.setattr(direct, "flush_for_types", lambda a: None)

    assert before == [(), ()]
    with nothing_kept():
        of_host, of_other = (named(suite, *each).effects for each in parts)
    assert of_host == READ
    assert "the second VM's canary was overwritten" in of_other


def test_ports_are_kept_by_the_control_that_makes_their_instructions_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    effect = without(monkeypatch, "UNCONDITIONAL_IO_EXITING", "port 0x4d0")

    assert effect == ("port 0x4d0 of the machine is 0x5a, not 0x0",)


def test_the_cpu_is_kept_by_the_control_that_makes_interrupts_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    (effect,) = without(monkeypatch, "EXTERNAL_INTERRUPT_EXITING", "starvation")

    assert "the second VM" in effect


def without(monkeypatch: pytest.MonkeyPatch, control: str, attack: str) -> tuple[str, ...]:
    """What an attack does that is contained, once a control is 0."""
    suite, real = Suite(scenario()), fields.controls
    assert named(suite, attack).contained

    def controls(*arguments: Any) -> dict[str, int]:
        which, found = CONTROL[control], real(*arguments)
        return {**found, which.word.field: found[which.word.field] & ~which.mask}

    monkeypatch.setattr(fields, "controls", controls)
    return named(suite, attack).effects
