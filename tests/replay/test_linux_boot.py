"""Recorded Linux guests under the kvm personality, beside what real kvm_intel did with them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.replay.recordings import BOOT, boot
from vtsim.config import load_scenario
from vtsim.guest.traces.recorded_exits import RecordedExits
from vtsim.platform.machine import Machine
from vtsim.study.replay_table import recorded_for, replay_table
from vtsim.vmcs.reasons import EXCEPTION_NMI

SCENARIO = Path(BOOT).with_name("linux-boot.yaml")
# recorded by another tool: without page-table isolation; with PCIDs and INVPCID; with 32-bit addresses and two levels; at a
# random address; many short programs
NAMES = ("linux-fork", "linux-pcid", "linux-686", "linux-kaslr", "linux-cloud")
OTHERS = [SCENARIO.with_name(f"{name}.yaml") for name in NAMES]
TOLERANCE_PERCENT = 5.0
# known: docs/replay.md says what is open there; two recordings of it differ by 1.4 % in that phase
FARTHER = {("linux-fork", "mark3"): 0.04}
NOT_IN_THE_RECORDING = {"EXCEPTION_NMI"}  # the RSM of system-management mode, whose code was not recorded


@cache
def predicted_and_real(path, *settings):
    """The exits of a run and those of real KVM."""
    scenario = load_scenario(path, list(settings))
    outcome = Machine(scenario).run()
    assert [vm.stopped for vm in outcome.vms] == [None]
    file = recorded_for(scenario)
    assert outcome.replayed is not None
    assert file is not None
    return outcome.replayed, RecordedExits.load(file)


def deviations(path, *settings):
    """Of each reason that can be compared: how far the run's exits are from real KVM's, in percent."""
    table = replay_table(*predicted_and_real(path, *settings))
    return {e.reason: e.deviation_percent for e in table.exits if e.deviation_percent is not None}


@pytest.mark.compiled_only
@pytest.mark.parametrize("huge_pages", ["always", "never"])
def test_every_compared_reason_is_within_five_percent_of_real_kvm(huge_pages):
    compared = deviations(SCENARIO, f"vmm.huge_pages={huge_pages}")
    assert set(compared) >= {"CPUID", "MSR_READ", "MSR_WRITE", "IO_INSTRUCTION", "EPT_VIOLATION", "EPT_MISCONFIG"}
    assert {r for r, d in compared.items() if abs(d) > TOLERANCE_PERCENT} == NOT_IN_THE_RECORDING


@pytest.mark.compiled_only
def test_on_shadow_tables_every_compared_reason_is_near_real_kvm_without_ept():
    compared = deviations(SCENARIO, "vmm.paging=shadow")
    assert set(compared) >= {"CR_ACCESS", "EXCEPTION_NMI", "INVLPG", "CPUID", "IO_INSTRUCTION", "MSR_READ", "MSR_WRITE"}
    # the recording has 5.9 % more INVLPG than its real run had
    assert {r for r, d in compared.items() if abs(d) > TOLERANCE_PERCENT} <= {"INVLPG"}
    assert abs(compared["INVLPG"]) < TOLERANCE_PERCENT + 1
    # refused by SMAP, page faults would be 3.2 % more; without what later uses say of tables, 3.8 %
    assert abs(compared["EXCEPTION_NMI"]) < 1


@pytest.mark.compiled_only
@pytest.mark.parametrize("paging", ["ept", "shadow"])
@pytest.mark.parametrize("scenario", OTHERS, ids=lambda path: path.stem)
def test_other_guests_take_the_exits_that_they_took_of_real_kvm(scenario, paging):
    compared = deviations(scenario, f"vmm.paging={paging}")
    assert set(compared) >= {"CR_ACCESS", "CPUID", "IO_INSTRUCTION", "MSR_READ", "MSR_WRITE"}
    assert {r for r, d in compared.items() if abs(d) > 3} <= (NOT_IN_THE_RECORDING if paging == "ept" else set())


@pytest.mark.compiled_only
@pytest.mark.parametrize("scenario", [SCENARIO, *OTHERS], ids=lambda path: path.stem)
def test_on_shadow_tables_page_faults_agree_in_each_phase_with_programs(scenario):
    predicted, real = predicted_and_real(scenario, "vmm.paging=shadow")
    for number, phase in enumerate(predicted.phases):
        if phase.startswith("mark"):
            found = sum(per_phase[number] for key, per_phase in predicted.counts.items() if key[0] == EXCEPTION_NMI)
            # 12 % too few where a page that was a table before is not one again, 7 % where upper tables are not known
            within = FARTHER.get((scenario.stem, phase), 0.02)
            assert found == pytest.approx(real.tables["reasons"]["EXCEPTION_NMI"][number], rel=within)


@pytest.mark.compiled_only
def test_the_boot_runs_natively_to_its_end():
    machine = Machine(load_scenario(SCENARIO, ["vmm.technique=native", "vmm.paging=none"]))
    outcome = machine.run()
    assert [vm.stopped for vm in outcome.vms] == [None]
    (guest,) = (owner for name, owner in outcome.owners.items() if name != "host")
    assert guest.counters["syscalls"] == boot().counts()["SYSCALL"][0]
