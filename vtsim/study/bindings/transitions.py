"""Hardware cost of VMX transitions and instructions; these rows set parameters, so they test the wiring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from vtsim.study.binding import Figure, Run, bind, cycles_per_exit, cycles_per_repetition, repeated

SCENARIO: Final = "workloads/vmexit/cpuid.yaml"
MINIMAL: Final[dict[str, tuple[str, ...]]] = {
    "p4-672": ("vmm.personality=minimal", "vmm.paging=shadow"),
    "nehalem-ep": ("vmm.personality=minimal",),
    "snb-e5-2450": ("vmm.personality=minimal",),
}
ONE_PRICE: Final = "the model has one exit price for every reason"


def _hardware(key: str, profile: str, activities: Sequence[str], tolerance: float, note: str = "") -> Figure:
    sets = (f"machine.profile={profile}", *MINIMAL[profile])
    return Figure(
        key=key,
        published=key,
        runs=(Run(scenario=SCENARIO, sets=sets, baseline=False),),
        compute=cycles_per_exit(*activities),
        unit="cycles",
        tolerance_percent=tolerance,
        note=note,
    )


def _price(key: str, profile: str, *operations: str) -> Figure:
    def compute(_: Sequence[Any]) -> float:
        from vtsim.cpu.profile import load_profile

        return float(sum(load_profile(profile).prices[operation] for operation in operations))

    note = " and ".join(f"the parameter prices.{operation}" for operation in operations) + f" of {profile} itself"
    return Figure(key=key, published=key, runs=(), compute=compute, unit="cycles", tolerance_percent=1.0, note=note)


def _native(key: str, profile: str, phase: str, tolerance: float = 10.0) -> Figure:
    sets = (
        f"machine.profile={profile}",
        "vmm.technique=native",
        f"vms.0.guest.processes.0.phases.0={{primitive: {phase}}}",
    )
    compute: Callable[[Sequence[Any]], float] = cycles_per_repetition
    return Figure(
        key=key,
        published=key,
        runs=repeated(SCENARIO, *sets),
        compute=compute,
        unit="cycles",
        tolerance_percent=tolerance,
        note="the loop around the instruction included",
    )


ROUND_TRIP: Final = ("vm_exit", "vm_entry")

bind(
    "EXIT-HW-RT",
    _hardware("prescott", "p4-672", ROUND_TRIP, 10.0, "set from EXIT-PF-HALVES, which is 9.5 % above"),
    _hardware("nehalem", "nehalem-ep", ROUND_TRIP, 1.0),
    _hardware("sandy_bridge", "snb-e5-2450", ROUND_TRIP, 1.0),
    unbound="merom, penryn and westmere have no profile",
)

bind(
    "EXIT-PF-HSSV",
    _hardware("prescott", "p4-672", ["vm_exit"], 10.0, ONE_PRICE),
    _hardware("sandy_bridge", "snb-e5-2450", ["vm_exit"], 1.0, ONE_PRICE),
    unbound="merom, penryn, westmere, ivy_bridge, haswell and broadwell have no profile",
)

bind(
    "EXIT-PF-HALVES",
    _hardware("p4_672.vm_entry", "p4-672", ["vm_entry"], 1.0),
    _hardware("p4_672.pf_vm_exit", "p4-672", ["vm_exit"], 1.0, ONE_PRICE),
    _price("p4_672.vmcs_read", "p4-672", "VMREAD"),
    _price("p4_672.vmcs_write", "p4-672", "VMWRITE"),
    unbound="core2duo has no profile",
)

bind(
    "VMFUNC-TLB-OPS",
    _price("vmfunc_kvm_test_cycles", "skx-4114", "VMFUNC"),
    _price("cr3_write_cycles", "skx-4114", "MOV_TO_CR3"),
    _price("invlpg_cycles", "skx-4114", "INVLPG"),
    _price("invlpg_plus_invpcid_cycles", "skx-4114", "INVLPG", "INVPCID"),
    unbound="figures in nanoseconds come without a clock",
)

CORES: Final = {
    "prescott_p4_3200": "p4-672",
    "nehalem_ep": "nehalem-ep",
    "sandybridge_ep": "snb-e5-2450",
    "skylake_x": "skx-4114",
    "cascadelake_8280": "clx-6252",
}
PHASES: Final = {
    "cpuid0": "cpuid, leaf: 0",
    "cpuid1": "cpuid, leaf: 1",
    "rdtsc": "rdtsc",
    "pause": "pause",
}

bind(
    "NATIVE-CPUID",
    *(
        _native(f"{core}.{name}", profile, phase, tolerance=30.0 if name in ("rdtsc", "pause") else 10.0)
        for core, profile in CORES.items()
        for name, phase in PHASES.items()
    ),
    unbound="merom, penryn, haswell_ep, broadwell_e and alderlake_P have no profile",
)
