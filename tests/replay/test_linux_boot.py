"""Recorded Linux guests under the kvm personality, beside what real kvm_intel did with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.replay.recordings import BOOT, boot
from vtsim.config import load_scenario
from vtsim.guest.traces.recorded_exits import RecordedExits
from vtsim.platform.machine import Machine
from vtsim.study.replay_table import recorded_for, replay_table
from vtsim.vmcs.reasons import EXCEPTION_NMI

SCENARIO = Path(BOOT).with_name("linux-boot.yaml")
# recorded by another tool: without page-table isolation; with PCIDs and INVPCID; with 32-bit addresses and two levels
OTHERS = [SCENARIO.with_name(f"{name}.yaml") for name in ("linux-fork", "linux-pcid", "linux-686", "linux-kaslr")]
TOLERANCE_PERCENT = 5.0
# known: docs/replay.md says what is open there; two recordings of it differ by 1.4 % in that phase
# linux-pcid: 1.4 % until false zeroing went that hid it; docs/replay.md has the supposed cause
FARTHER = {("linux-fork", "mark3"): 0.04, ("linux-pcid", "mark3"): 0.05, ("linux-kaslr", "mark1"): 0.04}
NOT_IN_THE_RECORDING = {"EXCEPTION_NMI"}  # the RSM of system-management mode, whose code was not recorded


def deviations(scenario):
    """Of each reason that can be compared: how far the run's exits are from real KVM's, in percent."""
    outcome = Machine(scenario).run()
    assert [vm.stopped for vm in outcome.vms] == [None]
    file = recorded_for(scenario)
    assert outcome.replayed is not None
    assert file is not None
    table = replay_table(outcome.replayed, RecordedExits.load(file))
    return {e.reason: e.deviation_percent for e in table.exits if e.deviation_percent is not None}


@pytest.mark.compiled_only
@pytest.mark.parametrize("huge_pages", ["always", "never"])
def test_every_compared_reason_is_within_five_percent_of_real_kvm(huge_pages):
    scenario = load_scenario(SCENARIO, [f"vmm.huge_pages={huge_pages}"])
    compared = deviations(scenario)
    assert set(compared) >= {"CPUID", "MSR_READ", "MSR_WRITE", "IO_INSTRUCTION", "EPT_VIOLATION", "EPT_MISCONFIG"}
    assert {r for r, d in compared.items() if abs(d) > TOLERANCE_PERCENT} == NOT_IN_THE_RECORDING


@pytest.mark.compiled_only
def test_on_shadow_tables_every_compared_reason_is_near_real_kvm_without_ept():
    scenario = load_scenario(SCENARIO, ["vmm.paging=shadow"])
    compared = deviations(scenario)
    assert set(compared) >= {"CR_ACCESS", "EXCEPTION_NMI", "INVLPG", "CPUID", "IO_INSTRUCTION", "MSR_READ", "MSR_WRITE"}
    # the recording has 5.9 % more INVLPG than its real run had
    assert {r for r, d in compared.items() if abs(d) > TOLERANCE_PERCENT} <= {"INVLPG"}
    assert abs(compared["INVLPG"]) < TOLERANCE_PERCENT + 1
    # refused by SMAP, page faults would be 3.2 % more; without what later uses say of tables, 3.8 %
    assert abs(compared["EXCEPTION_NMI"]) < 2


@pytest.mark.compiled_only
@pytest.mark.parametrize("paging", ["ept", "shadow"])
@pytest.mark.parametrize("scenario", OTHERS, ids=lambda path: path.stem)
def test_other_guests_take_the_exits_that_they_took_of_real_kvm(scenario, paging):
    compared = deviations(load_scenario(scenario, [f"vmm.paging={paging}"]))
    assert set(compared) >= {"CR_ACCESS", "CPUID", "IO_INSTRUCTION", "MSR_READ", "MSR_WRITE"}
    assert {r for r, d in compared.items() if abs(d) > 3} <= (NOT_IN_THE_RECORDING if paging == "ept" else set())


@pytest.mark.compiled_only
@pytest.mark.parametrize("scenario", [SCENARIO, *OTHERS], ids=lambda path: path.stem)
def test_on_shadow_tables_page_faults_agree_in_each_phase_with_programs(scenario):
    loaded = load_scenario(scenario, ["vmm.paging=shadow"])
    predicted = Machine(loaded).run().replayed
    real = RecordedExits.load(recorded_for(loaded))
    assert predicted is not None
    for number, phase in enumerate(predicted.phases):
        if phase.startswith("mark"):
            found = sum(per_phase[number] for key, per_phase in predicted.counts.items() if key[0] == EXCEPTION_NMI)
            # 12 % too few where a page that was a table before is not one again, 7 % where upper tables are not known
            within = FARTHER.get((scenario.stem, phase), 0.03)
            assert found == pytest.approx(real.tables["reasons"]["EXCEPTION_NMI"][number], rel=within)


@pytest.mark.compiled_only
def test_the_boot_runs_natively_to_its_end():
    machine = Machine(load_scenario(SCENARIO, ["vmm.technique=native", "vmm.paging=none"]))
    outcome = machine.run()
    assert [vm.stopped for vm in outcome.vms] == [None]
    (guest,) = (owner for name, owner in outcome.owners.items() if name != "host")
    assert guest.counters["syscalls"] == boot().counts()["SYSCALL"][0]
