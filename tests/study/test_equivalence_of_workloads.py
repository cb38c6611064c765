"""Every shipped scenario gives its guests what they see natively, however its MMU and its CPU are virtualized.

`pytest -m long tests/study/test_equivalence_of_workloads.py` takes tens of minutes, `-k lmbench` some five.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vtsim.base.errors import ConfigError
from vtsim.config import load_scenario
from vtsim.study import equivalence as e
from vtsim.study.run import without_hypervisor

pytestmark = [pytest.mark.long, pytest.mark.compiled_only]

WAYS = {
    "as it is": (),
    "shadow paging": ("vmm.paging=shadow",),
    "agile paging": ("vmm.paging=agile",),
    "direct tables": ("vmm.paging=direct-pv",),
    "trap and emulate": ("vmm.technique=trap-and-emulate", "machine.isa=virtualizable"),
    "binary translation": ("vmm.technique=binary-translation",),
    "hosted binary translation": ("vmm.technique=binary-translation", "vmm.hosted=true"),
    "interpreter": ("vmm.technique=interpreter",),
    "dynamic translation": ("vmm.technique=dynamic-translation",),
    "paravirtual": ("vmm.technique=paravirtual",),
    "user mode": ("vmm.technique=user-mode",),
}
# what a scenario is about is that the VM is not the machine
OTHERWISE = {
    "workloads/requirements/virtualbox_other_devices.yaml": "other devices",
    "workloads/requirements/java_vm.yaml": "another instruction set",
    "workloads/requirements/qemu_raspberry_pi.yaml": "another instruction set",
    "workloads/overcommit/balloon.yaml": "a balloon, which only the VM has",
}
# recorded guests, studies, devices with which nobody computes; and operations whose answer is the hypervisor's to give
APART = ("real", "studies", "iommu", "vmexit")
FILES = sorted(
    str(path) for path in Path("workloads").rglob("*.yaml") if path.parts[1] not in APART and str(path) not in OTHERWISE
)


@pytest.mark.parametrize("file", FILES)
def test_guests_see_the_same_in_every_way_that_can_run_them(file: str) -> None:
    differences = {}
    for way, sets in WAYS.items():
        try:
            there = load_scenario(file, sets)
            if there.vmm.technique == "native":
                continue
            found = e.compare(without_hypervisor(there), there)
        except ConfigError:  # this way cannot have it
            continue
        if not found.equivalent:
            differences[way] = [each.sentence(found.first, found.second) for each in found.differences]

    assert differences == {}
