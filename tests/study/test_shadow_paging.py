"""What a result says of shadow paging: each page fault that exits is of one kind, and the kinds add up."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from vtsim.study.binding import PHASE
from vtsim.study.result import Result, ShadowPaging
from vtsim.study.run import run

PAGING = Path(__file__).parents[2] / "workloads" / "paging"
DEVICE = PAGING.parent / "vmexit" / "mmio_to_user.yaml"
SHORT = {
    "fork": f"{PHASE}.iterations=3",
    "exec": f"{PHASE}.iterations=3",
    "protect": f"{PHASE}.iterations=2",
    "page_fault": f"{PHASE}.iterations=1",
}


@cache
def of(name: str, paging: str, *sets: str) -> Result:
    return run(PAGING / f"{name}.yaml", sets=(f"vmm.paging={paging}", SHORT[name], "run.baseline=false", *sets))


def block(result: Result) -> ShadowPaging:
    (vm,) = result.vms.values()
    assert vm.shadow is not None
    return vm.shadow


@pytest.mark.compiled_only
@pytest.mark.parametrize("paging", ["shadow", "agile"])
@pytest.mark.parametrize("name", SHORT)
def test_a_page_fault_that_exits_is_true_or_hidden_or_one_on_a_table(name: str, paging: str) -> None:
    """Guests of one vCPU without devices: nothing is tried again. Every exception that exits is a page fault."""
    result = of(name, paging)
    counted = block(result)
    kinds = (counted.true_page_faults, counted.hidden_page_faults, counted.unprotecting_page_faults)

    assert [one.count for one in result.exits if one.reason == "EXCEPTION_NMI"] == [counted.page_faults]
    assert counted.page_faults == sum(kinds) + counted.other_page_faults
    assert min(*kinds, counted.other_page_faults) >= 0 and counted.hidden_page_faults > 0
    if paging == "shadow":  # with agile paging stores exit for EPT, too
        assert counted.other_page_faults == counted.table_writes


@pytest.mark.compiled_only
@pytest.mark.parametrize("name", SHORT)
def test_true_page_faults_are_those_that_the_guest_has_natively(name: str) -> None:
    """The kernel's own first touches of memory are no faults of the guest: they are the hypervisor's, and hidden."""
    native = of(name, "none").events["page_faults"]

    assert block(of(name, "shadow")).true_page_faults == native == of(name, "shadow").events["page_faults"]
    assert block(of(name, "agile")).true_page_faults < native == of(name, "agile").events["page_faults"]


@pytest.mark.compiled_only
@pytest.mark.parametrize("paging", ["none", "ept", "direct-pv"])
def test_only_a_vm_with_shadow_pages_has_counts_of_them(paging: str) -> None:
    assert [vm.shadow for vm in of("protect", paging).vms.values()] == [None]


@pytest.mark.compiled_only
def test_an_access_to_a_device_is_a_page_fault_that_is_neither_true_nor_hidden() -> None:
    """What ten accesses more add: shadow entries of a device's registers are reserved, and KVM emulates the access."""
    few, many = (
        block(run(DEVICE, sets=("vmm.paging=shadow", f"{PHASE}.iterations={n}", "run.baseline=false")))
        for n in (10, 20)
    )

    assert many.other_page_faults - few.other_page_faults == many.page_faults - few.page_faults == 10
    assert many.table_writes == few.table_writes
