"""What KVM's exits cost: in the kernel, through user space, and on several generations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from vtsim.study.binding import Figure, bind, cycles_per_repetition, quotient, repeated
from vtsim.study.published import Row

VMEXIT: Final = "workloads/vmexit"
HYPERCALL: Final = "hypercall"
APICV: Final = "vmm.apicv=true"


def _cycles(key: str, test: str, profile: str, tolerance: float | None = None, note: str = "", *sets: str) -> Figure:
    return Figure(
        key=key,
        published=key,
        runs=repeated(f"{VMEXIT}/{test}.yaml", f"machine.profile={profile}", *sets),
        compute=cycles_per_repetition,
        unit="cycles",
        tolerance_percent=tolerance,
        note=note,
    )


def _microseconds(key: str, published: str, test: str, profile: str, *sets: str, note: str = "") -> Figure:
    def compute(results: Sequence[Any]) -> float:
        return cycles_per_repetition(results) * 1e6 / float(results[0].clock_hz)

    runs = repeated(f"{VMEXIT}/{test}.yaml", f"machine.profile={profile}", *sets)
    return Figure(key=key, published=published, runs=runs, compute=compute, unit="us", note=note)


def _ratio(key: str, above: str, below: str, tests: tuple[str, str], profile: str, note: str) -> Figure:
    def published(row: Row) -> float:
        return row.value(above) / row.value(below)

    machine = f"machine.profile={profile}"
    runs = tuple(run for test in tests for run in repeated(f"{VMEXIT}/{test}.yaml", machine))
    compute = quotient(cycles_per_repetition, 2)
    return Figure(key=key, published=published, runs=runs, compute=compute, unit="ratio", note=note)


bind(
    "KVM-SKX-VMCALL",
    _cycles("before", "vmcall", "skx-4114", 15.0, "tolerance: two kernels of this series differ as much"),
    unbound="after_v1 and after_v2 differ by a PMU option that the personality does not have",
)

bind(
    "KVM-SKX-2019-RT",
    _cycles("round_trip", "vmcall", "skx-4114", note="the kernel of 2019 with its mitigations"),
    unbound="cyclictest needs a real-time guest",
)

bind(
    "DVH-T3",
    _cycles("vm.hypercall", "vmcall", "skx-4114"),
    unbound="dev_notify, program_timer, send_ipi and nested guests come with later devices and nesting",
)

bind(
    "DALL17-X86",
    _cycles("hypercall", "vmcall", "snb-e5-2450"),
    _cycles("io_kernel", "inl_from_kernel", "snb-e5-2450"),
    _cycles("io_user", "inl_from_qemu", "snb-e5-2450"),
    _ratio(
        *("io_user / hypercall", "io_user", "hypercall"),
        ("inl_from_qemu", "vmcall"),
        "snb-e5-2450",
        "independent of the clock",
    ),
    _cycles("virtual_ipi", "ipi", "snb-e5-2450", None, "without posted interrupts, which that processor lacks"),
    deviates="virtual_ipi: the way of an interrupt message to another CPU is an estimate "
    "(latency.ipi_ns), and the receiver ends its interrupt, which exits, before it says that it came",
)

bind(
    "KVM-IPI-FASTPATH",
    _cycles("no_fastpath", "ipi", "skx-4114", None, "posted interrupts; the receiver runs, there it is halted", APICV),
    unbound="fastpath and ultra_fastpath handle the write of ICR before interrupts are on again, which the personality "
    "does not",
    deviates="there the receiver wakes from HLT, which took it no exit",
)

bind(
    "KVM-IPI-ICR2",
    _cycles(
        "before", "ipi", "skx-4114", None, "posted interrupts; two register accesses fewer are not told apart", APICV
    ),
    unbound="after differs by two accesses to the virtual-APIC page, which the personality does not make",
)

bind(
    "KVM-IOEVENTFD-2013",
    _ratio(
        *("portio_no_eventfd / portio_wildcard_eventfd", "portio_no_eventfd", "portio_wildcard_eventfd"),
        ("inl_from_qemu", "outl_to_kernel"),
        "snb-e5-2450",
        "hardware not stated, so only the ratio; an in-kernel port stands for the eventfd",
    ),
    unbound="MMIO and eventfd come with virtio devices",
)

bind(
    "PVM-T1-SINGLE",
    _microseconds("kvm_bm.hypercall", "kvm_bm.hypercall.1", "vmcall", "clx-8269cy"),
    _microseconds("kvm_bm.cpuid", "kvm_bm.cpuid.1", "cpuid", "clx-8269cy"),
    _microseconds("kvm_bm.pio_userspace, KPTI off", "kvm_bm.pio_userspace.1", "inl_from_qemu", "clx-8269cy"),
    _microseconds(
        *("kvm_bm.pio_userspace, KPTI on", "kvm_bm.pio_userspace.0", "inl_from_qemu", "clx-8269cy"),
        "vms.0.guest.kernel.kpti=true",
        note="KPTI in the guest only: the host of the model runs without",
    ),
    _ratio(
        *("kvm_bm.pio_userspace / hypercall", "kvm_bm.pio_userspace.1", "kvm_bm.hypercall.1"),
        ("inl_from_qemu", "vmcall"),
        "clx-8269cy",
        "independent of the clock, which the paper does not state",
    ),
    unbound="exception_ud and msr_access need a guest handler and a PMU; pvm_bm is another hypervisor",
)

bind(
    "SPLITX-DIRECT",
    _cycles("direct", "vmcall", "nehalem-ep", note="the shortest exit through KVM"),
)
