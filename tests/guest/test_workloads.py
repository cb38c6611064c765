"""Do the shipped scenarios say what they are, and do their guests run?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.conftest import Harness
from vtsim.config.load import load_scenario
from vtsim.cpu.codes import DEVICE_WRITE, PROGRAM_END
from vtsim.cpu.profile import load_profile
from vtsim.guest.kernel import layout
from vtsim.platform.machine import Machine

WORKLOADS = Path(__file__).parents[2] / "workloads"
SCENARIOS = sorted(path for path in WORKLOADS.rglob("*.yaml") if path.parent.name not in ("real", "studies"))
NEED_A_HYPERVISOR = {"vmcall", "rd_unknown_msr"}
NEED_DEVICES = {"mmio_event", "mmio_to_user", "mmap_file"}
# more than eight seconds interpreted
LONGER = {
    "balloon", "device_tlb_driver", "fault_threads", "map_unmap", "page_fault2", "random_access", "ring3", "sharing",
    "storm_cores", "swap", "vcpus", "viommu",
}  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path.stem in LONGER else [], id=path.stem) for path in SCENARIOS],
)
def test_a_scenario_describes_itself_and_its_guests_run(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.description
    if scenario.dma and scenario.vms:
        outcome = Machine(scenario).run()
        assert [vm.stopped for vm in outcome.vms] == [None] * len(scenario.vms)
        return
    for vm in scenario.vms:
        harness = Harness(load_profile(scenario.machine.profile), vm, work_scale=0.001)
        if path.stem in NEED_DEVICES:
            assert harness.issue() == DEVICE_WRITE
            continue
        assert harness.issue() == PROGRAM_END
        harness.engine.check_clock()
        reasons = {harness.reason(n) for n in range(len(vm.guest.processes))}
        assert reasons == {layout.KILLED if path.stem in NEED_A_HYPERVISOR else layout.ENDED}


def test_the_exit_benchmarks_of_kvm_unit_tests_are_there() -> None:
    names = {path.stem for path in SCENARIOS if path.parent.name == "vmexit"}
    assert names >= {
        "cpuid", "vmcall", "mov_from_cr8", "mov_to_cr8", "inl_from_pmtimer", "inl_from_qemu", "inl_from_kernel",
        "outl_to_kernel", "outl_to_qemu", "wr_tsc_adjust_msr", "rd_tsc_adjust_msr",
    }  # fmt: skip
