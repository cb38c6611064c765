"""Shadow paging: what the guest sees is what its own tables say."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vmm.changing_tables import Paging, plan
from tests.vmm.machines import MIB, machine
from vtsim.base import jit
from vtsim.base.jit import quiet
from vtsim.cpu.codes import PROGRAM_END
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import load_profile
from vtsim.platform.machine import NativeMemory, apply

SEEDS = range(3 if jit.DISABLED else 40)
STEPS = 150 if jit.DISABLED else 600
WITHOUT_EPT = {"personality": "minimal", "profile": "p4-672", "vpid": False, "tpr_shadow": False}
MACHINES: dict[str, dict[str, Any]] = {
    "ept": {"personality": "kvm", "paging": "ept"},
    "kvm": {"personality": "kvm", "paging": "shadow"},
    "kvm without EPT": {
        "personality": "kvm",
        "paging": "shadow",
        "profile": "p4-672",
        "vpid": False,
        "tpr_shadow": False,
    },
    "kvm without VPID": {"personality": "kvm", "paging": "shadow", "vpid": False},
    "kvm always in sync": {"personality": "kvm", "paging": "shadow", "parameters": (("out_of_sync", 0),)},
    "kvm in large pages": {"personality": "kvm", "paging": "shadow", "page_size": 2 * MIB, "huge_pages": "always"},
    "minimal": {"personality": "minimal", "paging": "shadow"},
    "minimal without EPT": {"paging": "shadow", **WITHOUT_EPT},
}
PAGING = {
    "": Paging(),
    "pcid": Paging(pcid=True),
    "smap": Paging(pcid=True, smap=True),
    "five levels": Paging(pcid=True, five=True),
}
NEWER = load_profile("skx-4114").with_overrides({"features.la57": True, "vmx.generation": "ice-lake-sp"})
CASES = [(paging, seed) for paging in PAGING for seed in SEEDS if paging in ("", "pcid") or seed < 10]


def check(made: Any, load: Any) -> None:
    for expected, found in made.seen(load):
        assert found == expected


@pytest.mark.parametrize(("paging", "seed"), CASES)
def test_natively_the_guest_sees_what_the_slow_walker_says(paging: str, seed: int) -> None:
    made = plan(seed, STEPS, PAGING[paging])
    engine = Engine(NEWER, Geometry(memory_bytes=64 * MIB, pool_pages=4096))
    memory = NativeMemory(engine, 64 * MIB)
    with quiet():
        apply(engine, 0, made.guest(memory))
        assert engine.run() == PROGRAM_END
    check(made, lambda gpa: engine.load(gpa))


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(("paging", "seed"), CASES)
def test_the_guest_never_sees_a_wrong_frame(paging: str, seed: int, name: str) -> None:
    if paging and name.endswith("without EPT"):
        pytest.skip("that processor has no PCIDs")
    made = plan(seed, STEPS, PAGING[paging])
    newer = {"profile": NEWER} if PAGING[paging].five else {}
    m = machine(made.guest, **{**MACHINES[name], **newer}).run()
    assert m.finished == ["vm0"], m.hypervisor.death(m.vcpu)
    check(made, m.vcpu.memory.load)
