"""Shipped verdicts change with what they are about and with nothing else; their figures are those of the run.

`pytest -m long tests/study/test_verdict_changes.py` takes one to five minutes.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Final

import pytest

from vtsim.config import load_scenario
from vtsim.study import verdict as v
from vtsim.study.run import simulate

pytestmark = [pytest.mark.long, pytest.mark.compiled_only]

WORKLOADS: Final = Path(__file__).parents[2] / "workloads"
SAME, OTHER, PI, JAVA = (
    f"requirements/{name}.yaml"
    for name in ("virtualbox_same_devices", "virtualbox_other_devices", "qemu_raspberry_pi", "java_vm")
)
EQUIVALENT, EFFICIENT, ISOLATED = v.REASONS
ASSIGNED: Final = "vms.0.assigned=[pro-1000]"
# scenario, what is changed: the requirements that then do not hold
CASES: Final[tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = (
    (SAME, ("seed=7",), ()),
    (SAME, ("machine.profile=skx-4114",), ()),
    (SAME, ("vmm.paging=shadow",), ()),
    (SAME, ("vmm.personality=minimal",), ()),
    (SAME, ("vms.0.vcpus=2", "machine.cpus=2"), ()),
    (SAME, ("vmm.technique=binary-translation",), ()),
    (SAME, ("vmm.technique=paravirtual",), ()),
    (SAME, ("vmm.technique=interpreter",), (EFFICIENT,)),
    (SAME, ("vmm.technique=trap-and-emulate",), (EQUIVALENT,)),
    (SAME, ("vmm.technique=trap-and-emulate", "machine.isa=virtualizable"), ()),
    (SAME, ("vmm.technique=native",), (ISOLATED,)),
    (SAME, (ASSIGNED,), ()),
    (SAME, (ASSIGNED, "machine.iommu.mode=off"), (ISOLATED,)),
    (OTHER, (), (EQUIVALENT,)),
    (OTHER, ("machine.devices=[vga, rtl8111e, aic-7870]",), ()),
    (PI, ("seed=7",), (EQUIVALENT, EFFICIENT)),
    (PI, ("vms.0.isa=x86", "vms.0.devices=[vga, pro-1000, piix4-ide]"), (EFFICIENT,)),
    (JAVA, ("vmm.native_methods=false",), (EQUIVALENT, EFFICIENT)),
    ("two_vms.yaml", (), ()),
    ("iommu/viommu.yaml", (), ()),
    ("iommu/hostile_window.yaml", (), (ISOLATED,)),
)


@pytest.mark.parametrize(("name", "sets", "fails"), CASES, ids=[" ".join((name, *sets)) for name, sets, _ in CASES])
def test_a_verdict_changes_with_what_it_is_about(name: str, sets: tuple[str, ...], fails: tuple[str, ...]) -> None:
    scenario = load_scenario(WORKLOADS / name, sets)
    found, run = v.judge(scenario), simulate(scenario)
    direct = found.efficiency.evidence

    assert found.because == fails
    assert direct.share == run.efficiency.overall
    assert direct.executed == run.guest.ring0.executed + run.guest.ring3.executed
    assert direct.emulated == run.guest.ring0.emulated + run.guest.ring3.emulated
    # Wilson's end is the share from which the measured one is as far as the confidence says, in its own deviation
    assert direct.at_least is not None and direct.share is not None
    spread = sqrt(direct.at_least * (1 - direct.at_least) / direct.executed)
    assert direct.share - direct.at_least == pytest.approx(NormalDist().inv_cdf(0.99) * spread, rel=1e-6)
