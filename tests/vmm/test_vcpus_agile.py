"""Agile paging with several vCPUs: tables move between both ways under all of them, and nobody uses what was changed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.vmm.changing_vcpus import pair
from tests.vmm.machines import Machine
from tests.vmm.test_agile import LARGE, LISTED, of_pool
from tests.vmm.test_shadow import NEWER
from tests.vmm.test_vcpus_shadow import KERNELS, PAGING, SLOW, STEPS, UNTIL_FOUND, cases, check, few_pages, nothing, ran
from vtsim.base import jit
from vtsim.base.kept import nothing_kept
from vtsim.config import parse_scenario
from vtsim.ept import shadow as d
from vtsim.study import equivalence
from vtsim.study.run import without_hypervisor
from vtsim.vmcs.state import CR3_PAIRS
from vtsim.vmm.programs import several

__all__ = ("few_pages",)  # a fixture

AGILE: dict[str, Any] = {"paging": "agile", "profile": NEWER}
BACK_AND_FORTH = ("agile_interval", 10)
MACHINES: dict[str, dict[str, Any]] = {
    "kvm": {"personality": "kvm"},
    "kvm, back and forth": {"personality": "kvm", "parameters": (BACK_AND_FORTH,)},
    "minimal, back and forth": {"personality": "minimal", "parameters": (BACK_AND_FORTH,)},
    "kvm in few pages, back and forth": {"personality": "kvm", "parameters": (BACK_AND_FORTH, ("shadow_permille", 0))},
    "without VPID, back and forth": {"vpid": False, "parameters": (BACK_AND_FORTH,)},
    "kvm in large pages, back and forth": {"personality": "kvm", "parameters": (BACK_AND_FORTH,), **LARGE},
    "roots listed": {"profile": LISTED},
    "roots listed in few pages, back and forth": {
        "profile": LISTED,
        "parameters": (BACK_AND_FORTH, ("shadow_permille", 0)),
    },
}
FIRST = ("kvm, back and forth",)


def check_roots(m: Machine) -> None:
    """Roots count who has loaded them and whose lists they are in; what was given up, nobody lists unless asked to go."""
    load, first = m.hypervisor.host.load, m.vcpu.shadow
    assert first is not None

    def record(page: int, name: str) -> int:
        return load(m.hypervisor.host.address(first.records) + page * d.RECORD_BYTES + d.RECORD[name])

    uses: Counter[int] = Counter()
    for vcpu in m.hypervisor.vcpus:
        assert vcpu.shadow is not None
        held = load(vcpu.shadow.address + d.POOL["HELD"])
        listed = [load(vcpu.shadow.address + d.POOL["LISTED"] + 8 * n) for n in range(CR3_PAIRS)]
        uses.update(page - 1 for page in (held, *listed) if page)
        if not m.hypervisor.word(vcpu, "ASKED_ROOT"):
            assert all(record(page - 1, "STATE") & d.IN_USE for page in listed if page)
    assert {page: record(page, "ROOTS") for page in range(first.pages) if record(page, "ROOTS")} == uses


@pytest.mark.slow
@pytest.mark.usefixtures("few_pages")
@pytest.mark.parametrize(("paging", "seed", "name"), cases(MACHINES, FIRST))
def test_two_vcpus_see_what_the_slow_walker_says(paging: str, seed: int, name: str) -> None:
    made = pair(seed, STEPS, PAGING[paging])
    m = ran(made, **{**AGILE, **MACHINES[name]})

    check(made, m.vcpu.memory.load)
    if "few pages" not in name and not jit.DISABLED:  # few are given up before their tables are written twice
        assert of_pool(m, "TO_NESTED") > 0
        assert of_pool(m, "ROOTS_NESTED") > 0
        assert (of_pool(m, "TO_SHADOW") > 0) == name.endswith("forth")
        assert (of_pool(m, "EPT_SPLIT") > 0) == ("large" in name)
    assert m.hypervisor.memory_statistics(m.vcpu)["remote_flushes"] > 0
    check_roots(m)


@pytest.mark.usefixtures("few_pages")
@SLOW
@pytest.mark.parametrize("left_out", ["flush_as_asked", "kick_others"])
def test_a_hypervisor_that_leaves_one_of_them_out_is_found_out(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, left_out, nothing)

    with nothing_kept(), pytest.raises(AssertionError):
        for seed in UNTIL_FOUND:
            made = pair(seed, STEPS, PAGING[""])
            check(made, ran(made, **AGILE, **MACHINES["kvm in few pages, back and forth"]).vcpu.memory.load)


@SLOW
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("vmm.personality=minimal", "vmm.parameters.agile_interval=20"),
        ("vms.0.guest.kernel.kpti=true", "machine.cpu.features.agile_cr3=true"),
    ],
    ids=["", "minimal, back and forth", "KPTI, roots listed"],
)
def test_a_kernel_on_four_vcpus_sees_what_it_sees_natively(settings: tuple[str, ...]) -> None:
    there = parse_scenario(KERNELS, ("vmm.paging=agile", *settings))
    found = equivalence.compare(without_hypervisor(there), there)

    assert found.equivalent, [each.sentence(found.first, found.second) for each in found.differences]
