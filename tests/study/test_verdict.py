"""Attacks get through exactly where nothing stops them, and the verdict follows from what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from vtsim.base.errors import ConfigError
from vtsim.base.jit import quiet
from vtsim.config import load_scenario, parse_scenario, resolve
from vtsim.platform.machine import Machine
from vtsim.platform.spec import Scenario
from vtsim.study import attacks as at
from vtsim.study import verdict as v
from vtsim.study.attacks import Attempt, Skipped, Suite
from vtsim.study.equivalence import NOTHING, Difference, Equivalence, compare
from vtsim.study.json_object import plain
from vtsim.study.run import without_hypervisor
from vtsim.vmm import build
from vtsim.vmm import vmcs as fields

WORKLOADS = Path(__file__).parents[2] / "workloads" / "requirements"
TEXT = """
machine: {memory: 512 MiB, devices: [vga, pro-1000]}
vmm: {technique: hardware, personality: minimal}
vms:
  - memory: 16 MiB
    devices: [vga, pro-1000]
    guest:
      kernel: {tick: off}
      processes: [{phases: [{primitive: cpuid, iterations: 1}, {primitive: syscall, iterations: 3}]}]
"""
SMALL, HOST, OTHER = "4 KiB", "the host's memory", "another VM's memory"


def scenario(*sets: str) -> Scenario:
    return resolve(parse_scenario(TEXT, list(sets)), "test")


def named(suite: Suite, *parts: str) -> Attempt:
    """The one attack of the suite whose name has these parts, made."""
    (attack,) = (one for one in at.attacks(suite.scenario) if all(part in one.name for part in parts))
    return suite.attempt(attack)


@contextmanager
def only_few() -> Iterator[None]:
    """Of the suite only three attacks, none that takes time."""
    real: Callable[[Scenario], Iterator[Any]] = at.attacks
    kept = (f"{HOST}, mapped by a page of {SMALL}", f"{HOST}, by native methods", "port 0x4d0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at, "attacks", lambda scenario: (one for one in real(scenario) if one.name in kept))
        yield


@pytest.fixture
def few() -> Iterator[None]:
    """The same for one test."""
    with only_few():
        yield


@pytest.fixture(scope="module")
def measured() -> v.Measurements:
    """What is measured where the VM is shown the machine's devices."""
    with quiet(), only_few():
        return v.measure(scenario())


@pytest.fixture(scope="module")
def same(measured: v.Measurements) -> v.Verdict:
    """The verdict on it."""
    return v.decide(scenario(), measured, v.Thresholds())


# --- attacks --------------------------------------------------------------------------------------------------------
def test_natively_an_attack_reaches_what_it_is_after() -> None:
    suite = Suite(scenario("vmm.technique=native"))

    for parts in ((HOST, SMALL), (HOST, "2 MiB"), (HOST, "own addresses")):
        assert named(suite, *parts).effects == ("the host's canary was read", "the host's canary was overwritten")
    (effect,) = named(suite, "IDT", "kernel").effects
    assert effect.startswith("IDTR of the machine is 0xffff888000001000")
    assert named(suite, "IA32_MISC_ENABLE").effects == ("IA32_MISC_ENABLE of the machine is 0x800, not 0x1",)
    assert named(suite, "port 0x4d0").effects == ("port 0x4d0 of the machine is 0x5a, not 0x0",)


def test_natively_the_processor_itself_stops_a_process() -> None:
    suite = Suite(scenario("vmm.technique=native"))

    attempt = named(suite, "CR0", "ring 3")

    assert attempt.contained
    assert attempt.ended.startswith("process 'attacker' was killed by #GP")


@pytest.mark.parametrize(
    "way",
    [
        ("vmm.paging=ept",),
        ("vmm.paging=shadow", "vmm.personality=kvm"),
        ("vmm.technique=binary-translation",),
    ],
    ids=" ".join,
)
def test_a_hypervisor_keeps_its_memory_another_vms_and_the_machines_state(way: tuple[str, ...]) -> None:
    suite = Suite(scenario(*way))

    for parts in ((HOST, "own addresses"), (OTHER, SMALL), ("IDT", "kernel")):
        assert named(suite, *parts).effects == ()


def test_starving_and_storming_guests_take_no_more_than_their_turns() -> None:
    suite = Suite(scenario())

    for name in ("storm of port accesses", "storm of interrupts", "starvation"):
        assert named(suite, name).effects == ()


def test_a_second_vm_that_gets_less_than_its_turns_is_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that ticks twice as seldom as it promises gives the attacker two turns where one is owed."""
    suite = Suite(scenario())
    monkeypatch.setattr(at, "TICK_NS", at.TICK_NS // 8)
    monkeypatch.setattr(at, "BYSTANDER_NS", 3_000_000)

    (effect,) = named(suite, "starvation").effects

    assert "of the CPU, not" in effect


def test_a_hole_in_the_msr_bitmap_lets_exactly_the_attacks_on_msrs_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "msr_bitmap", lambda passed: [0] * 512)
    suite = Suite(scenario())

    assert named(suite, "IA32_MISC_ENABLE").effects == ("IA32_MISC_ENABLE of the machine is 0x800, not 0x1",)
    assert named(suite, "IDT", "kernel").contained
    assert named(suite, HOST, SMALL).contained
    assert build.vmcs is fields


@pytest.mark.slow
def test_native_methods_are_a_way_to_the_host_that_nothing_else_opens() -> None:
    way = ("vmm.technique=dynamic-translation", "vmm.native_methods=true", "vms.0.isa=jvm")
    suite = Suite(scenario(*way))

    attempt = named(suite, "native methods")

    assert attempt.effects == ("the host's canary was read", "the host's canary was overwritten")
    assert named(Suite(scenario()), "native methods").contained


def test_native_methods_need_a_program_that_executes_the_guest() -> None:
    with pytest.raises(ConfigError, match="technique 'hardware' has no program that executes its guests"):
        scenario("vmm.native_methods=true")


@pytest.mark.slow
def test_a_guest_for_another_processor_ends_natively_where_it_begins() -> None:
    there = scenario("vmm.technique=dynamic-translation", "vms.0.isa=arm")
    found = compare(without_hypervisor(there), there)

    (difference,) = found.differences
    assert difference.step == 0
    assert difference.first == "nothing more, for the VM ended: triple fault"


ASSIGNED, HOSTS, OTHERS = "vms.0.assigned=[pro-1000]", "the host's canary", "the second VM's canary"
DRIVEN = """
machine: {memory: 512 MiB}
vmm: {technique: native}
dma: [{name: nic}]
vms:
  - memory: 64 MiB
    guest:
      kernel: {tick: 4 ms, dma: deferred}
      processes: [{phases: [{primitive: dma_buffers, iterations: 1}]}]
"""


@pytest.mark.parametrize("mode", ["translate", "pass-through", "off"])
def test_the_driver_of_a_vm_reaches_others_by_its_device_where_nothing_remaps_and_nowhere_else(mode: str) -> None:
    host, other, late = Suite(scenario(ASSIGNED, f"machine.iommu.mode={mode}")).dma()

    assert isinstance(host, Attempt) and isinstance(other, Attempt)
    through = mode != "translate"
    assert host.effects == through * (f"{HOSTS} was read", f"{HOSTS} was overwritten")
    assert other.effects == through * (f"{OTHERS} was read", f"{OTHERS} was overwritten")
    assert late == Skipped(name="DMA to a buffer that was unmapped", why="the guest's driver unmaps nothing")


def test_without_a_device_there_is_no_dma() -> None:
    assert list(Suite(scenario()).dma()) == [
        Skipped(name="DMA to memory of others", why="no device is assigned to a VM")
    ]


@pytest.mark.parametrize("mode", ["translate", "off"])
def test_where_a_vm_cannot_drive_its_device_the_device_asks_by_itself(mode: str) -> None:
    refused, *made = Suite(scenario(ASSIGNED, "vmm.paging=shadow", f"machine.iommu.mode={mode}")).dma()

    assert isinstance(refused, Skipped)
    assert refused.why == "devices are assigned to VMs on EPT only"
    assert [isinstance(one, Attempt) and one.contained for one in made] == [mode == "translate"] * 2


@pytest.mark.compiled_only
@pytest.mark.parametrize(("mode", "contained", "within"), [("strict", True, False), ("deferred", True, True)])
def test_a_device_writes_to_what_was_unmapped_for_no_longer_than_the_kernel_lets_it(
    mode: str, contained: bool, within: bool
) -> None:
    """Deferred invalidation promises a flush after 10 ms, which a tick of 4 ms may find late by its period."""
    suite = Suite(resolve(parse_scenario(DRIVEN, [f"vms.0.guest.kernel.dma={mode}"]), "test"))

    (*_, late) = suite.dma()

    assert isinstance(late, Attempt)
    assert late.contained is contained
    assert bool(late.within) is within
    assert not within or "deferred invalidation allows 14.000 ms" in late.within


@pytest.mark.compiled_only
def test_a_kernel_that_invalidates_nothing_promises_nothing() -> None:
    suite = Suite(resolve(parse_scenario(DRIVEN, ["vms.0.guest.kernel.dma=never"]), "test"))

    (*_, late) = suite.dma()

    assert isinstance(late, Attempt)
    assert not late.contained
    assert "writes went through" in late.effects[0]


@pytest.mark.compiled_only
def test_a_window_longer_than_the_promise_is_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at, "QUEUE_TIMEOUT_NS", -4_000_000 + 1)
    suite = Suite(resolve(parse_scenario(DRIVEN), "test"))

    (*_, late) = suite.dma()

    assert isinstance(late, Attempt)
    assert not late.contained


# --- verdicts -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_verdict_flips_with_the_devices_that_are_shown_and_with_nothing_but_equivalence(
    few: None, same: v.Verdict
) -> None:
    other = v.judge(scenario("vms.0.devices=[vga, rtl8111e]"))

    assert same.is_virtual_machine
    assert same.because == ()
    assert not other.is_virtual_machine
    assert other.because == ("it is not equivalent to the machine",)
    assert (other.efficiency, other.isolation) == (same.efficiency, same.isolation)


def test_a_verdict_flips_with_the_remapping_unit_and_with_nothing_but_isolation(few: None, same: v.Verdict) -> None:
    open_ = v.judge(scenario(ASSIGNED, "machine.iommu.mode=off"))

    assert open_.because == ("it does not isolate",)
    assert open_.isolation.evidence.made == same.isolation.evidence.made + 2
    assert open_.isolation.evidence.contained == same.isolation.evidence.contained
    assert (open_.equivalence, open_.efficiency) == (same.equivalence, same.efficiency)


def test_a_threshold_moves_the_verdict_to_where_the_measurement_is(measured: v.Measurements, same: v.Verdict) -> None:
    bound = same.efficiency.evidence.at_least
    assert bound is not None and 0.5 < bound < 1

    stricter = v.decide(scenario(), measured, v.thresholds_of([f"efficiency={bound + 0.0001}"]))

    assert stricter.because == ("the processor does not execute most of it",)
    assert stricter.efficiency.evidence == same.efficiency.evidence
    assert v.decide(scenario(), measured, v.thresholds_of([f"efficiency={bound - 0.0001}"])).is_virtual_machine


def test_a_threshold_is_printed_as_it_was_given(measured: v.Measurements) -> None:
    verdict = v.decide(scenario(), measured, v.thresholds_of(["efficiency=0.9999", "confidence=0.995"]))

    assert "with 99.5% confidence; needed: more than 99.99%\n" in v.verdict_text(verdict)


def test_a_run_whose_time_limit_comes_before_it_sees_anything_is_not_called_equivalent() -> None:
    there = scenario("run.limit=1 us")
    found = compare(without_hypervisor(there), there)
    verdict = v.decide(
        there, v.Measurements(equivalence=found, executed=0, emulated=0, attempts=(), skipped=()), v.Thresholds()
    )

    assert found.left_out == (NOTHING,)
    assert not verdict.equivalence.holds


def test_random_hypercalls_to_a_user_mode_kernels_host_end_no_more_than_their_guest() -> None:
    machine = "machine={memory: 512 MiB}"
    suite = Suite(scenario("vmm={technique: user-mode}", machine, "vms.0.devices=[]"))

    assert named(suite, "random hypercalls").contained


def test_wilsons_lower_end_is_what_its_formula_says() -> None:
    """Of 90 of 100 at one-sided 97.5 %, z = 1.96: (0.9 + z²/200 - z √(0.09/100 + z²/40000)) / (1 + z²/100) = 0.8256."""
    assert v.at_least(90, 100, 0.975) == pytest.approx(0.8256, abs=1e-4)
    assert v.at_least(0, 0, 0.9) is None
    assert v.at_least(10, 10, 0.5) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("eficiency=0.9", "--threshold: unknown threshold 'eficiency'\n help: did you mean 'efficiency'?"),
        ("efficiency=most", "--threshold: 'most' is not a share\n help: efficiency is a number from 0 to 1, as in efficiency=0.9"),
        ("isolation=2", "--threshold: '2' is not a share\n help: isolation is a number from 0 to 1, as in isolation=0.9"),
    ],
)  # fmt: skip
def test_a_threshold_that_is_none_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        v.thresholds_of([setting])

    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["efficiency=0.5", "efficiency=0.6"], "--threshold: efficiency is given twice"),
        (["confidence=0"], "--threshold: no interval has a confidence of 0"),
        (["confidence=1.0"], "--threshold: no interval has a confidence of 1.0"),
    ],
)
def test_a_threshold_is_given_once_and_a_confidence_lies_between_0_and_1(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        v.thresholds_of(settings)

    assert str(raised.value).startswith(f"{message}\n help: ")


@pytest.mark.parametrize(
    ("sets", "field"),
    [("machine.devices=[vgaa]", "machine.devices"), ("vms.0.devices=[rtl8111]", "vms.0.devices")],
)
def test_a_misspelt_device_is_refused_with_the_one_that_was_meant(sets: str, field: str) -> None:
    with pytest.raises(ConfigError, match="did you mean") as raised:
        scenario(sets)

    assert raised.value.problems[0].path.startswith(field)


def found() -> v.Verdict:
    """A verdict with something of everything."""
    difference = Difference(
        vm="pc", vcpu=0, stream="kernel", step=12, operation="IN from port 0xcfc, device 00:02.0 register 0x00",
        place="guest kernel, probe_00", first="Intel", second="Realtek",
    )  # fmt: skip
    attempts = (
        Attempt(name="port 0x4d0", contained=False, effects=("port 0x4d0 of the machine is 0x5a, not 0x0",), ended=""),
        Attempt(name="random hypercalls", contained=True, effects=(), ended="killed"),
    )
    skipped = tuple(Skipped(name=name, why="no second VM") for name in ("a storm", "starvation"))
    return v.Verdict(
        scenario="example",
        technique="hardware (ept)",
        profile="skx-4114",
        thresholds=v.Thresholds(),
        equivalence=v.OfEquivalence(
            holds=False,
            evidence=Equivalence(
                first="native", second="hardware (ept)", equivalent=False, compared={"application": 7, "kernel": 1234},
                left_out=("something",), differences=(difference,),
            ),
        ),
        efficiency=v.OfEfficiency(
            holds=True, evidence=v.Direct(executed=10_000, emulated=100, share=0.99, at_least=0.98765)
        ),
        isolation=v.OfIsolation(
            holds=False, evidence=v.Attempts(made=2, contained=1, attempts=attempts, skipped=skipped)
        ),
        is_virtual_machine=False,
        because=("it is not equivalent to the machine", "it does not isolate"),
    )  # fmt: skip


def test_the_text_says_all_of_it() -> None:
    golden = Path(__file__).parents[1] / "golden" / "verdict.txt"

    assert v.verdict_text(found()) == golden.read_text(encoding="utf-8")


def test_the_text_of_a_verdict_that_was_read_from_json_is_the_same() -> None:
    again = v.Verdict.from_dict(json.loads(v.verdict_json(found())))

    assert v.verdict_text(again) == v.verdict_text(found())
    assert plain(again) == plain(found())
    assert [*plain(again)][4:8] == ["equivalence", "efficiency", "isolation", "is_virtual_machine"]
    assert all([*plain(again)[name]] == ["holds", "evidence"] for name in ("equivalence", "efficiency", "isolation"))


@pytest.mark.compiled_only
@pytest.mark.parametrize(
    ("name", "whole", "fails"),
    [
        ("virtualbox_same_devices", True, ()),
        ("virtualbox_other_devices", False, v.REASONS[:1]),
        ("qemu_raspberry_pi", True, v.REASONS[:2]),
        ("java_vm", False, v.REASONS),
    ],
)
def test_the_shipped_scenarios_get_their_verdicts_from_measurements(
    name: str, whole: bool, fails: tuple[str, ...]
) -> None:
    with nullcontext() if whole else only_few():
        found = v.judge(load_scenario(WORKLOADS / f"{name}.yaml"))

    assert found.because == fails


def test_no_canary_lies_where_the_attacker_may_go() -> None:
    """The host's frame is none of a VM's, and the second VM's is none of the attacker's."""
    machine = Machine(at.scenario_of(scenario(), at.QUIET, 0))
    frames = at.canary_frames(machine)
    attacker = machine.vms[0].memory
    assert attacker is not None
    mine = {attacker.frame(gfn) for gfn in range(0, 64) if attacker.peek(gfn << 12) is not None}  # type: ignore[attr-defined]

    assert not mine & set(frames.values())
    assert len(set(frames.values())) == 2
