"""What KVM's exits cost: in the kernel, through user space, and on several generations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from vtsim.study.binding import Figure, bind, cycles_per_repetition, quotient, repeated
from vtsim.study.published import Row

VMEXIT: Final = "workloads/vmexit"
HYPERCALL: Final = "hypercall"
APICV: Final = "vmm.apicv=true"
NO_FAST_IN: Final = "vmm.parameters.fast_pio_in=0"
EMULATED: Final = "KVM emulates IN, as it did up to Linux 4.16"
SPECTRE: Final = ("vmm.mitigations.spectre_v2=retpoline", "vmm.mitigations.spectre_v2_user=prctl")
NO_FAST_PATH: Final = "vmm.parameters.fast_ipi=0"  # before Linux 5.6


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


def _ratio(key: str, above: str, below: str, tests: tuple[str, str], profile: str, note: str, *sets: str) -> Figure:
    def published(row: Row) -> float:
        return row.value(above) / row.value(below)

    machine = f"machine.profile={profile}"
    runs = tuple(run for test in tests for run in repeated(f"{VMEXIT}/{test}.yaml", machine, *sets))
    compute = quotient(cycles_per_repetition, 2)
    return Figure(key=key, published=published, runs=runs, compute=compute, unit="ratio", note=note)


bind(
    "KVM-SKX-VMCALL",
    _cycles("before", "vmcall", "skx-4114", 15.0, "tolerance: two kernels of this series differ as much"),
    unbound="after_v1 and after_v2 differ by a PMU option that the personality does not have",
)

bind(
    "KVM-SKX-2019-RT",
    _cycles(
        *("round_trip", "vmcall", "skx-4114", None, "with what Linux 5.1 does against Spectre on this processor"),
        *SPECTRE,
    ),
    unbound="cyclictest needs a real-time guest",
    deviates="without mitigations it is 1544. Of the difference are 113 for stuffing the return stack and 19 for one "
    "indirect branch: Linux 6.1 has static calls where 5.1 called KVM's operations for VMX through a table, every one "
    "of them a thunk (19 cycles), and how many there are in an exit of 5.1 was not counted",
)

bind(
    "DVH-T3",
    _cycles("vm.hypercall", "vmcall", "skx-4114"),
    unbound="dev_notify, program_timer, send_ipi and nested guests come with later devices and nesting",
)

bind(
    "DALL17-X86",
    _cycles("hypercall", "vmcall", "snb-e5-2450"),
    _cycles("io_kernel", "inl_from_kernel", "snb-e5-2450", None, EMULATED, NO_FAST_IN),
    _cycles("io_user", "inl_from_qemu", "snb-e5-2450", None, EMULATED, NO_FAST_IN),
    _ratio(
        *("io_user / hypercall", "io_user", "hypercall"),
        ("inl_from_qemu", "vmcall"),
        "snb-e5-2450",
        "independent of the clock",
        NO_FAST_IN,
    ),
    _cycles(
        *("virtual_ipi", "ipi", "snb-e5-2450", None),
        "without posted interrupts, which that processor lacks, and without the fast path of Linux 5.6",
        NO_FAST_PATH,
    ),
    deviates=(
        "An in-kernel device is a PIC here, of 269 counted instructions, which is read; whether the published one "
        "is read or written is not said, and a write, which KVM never decoded, takes 1801 cycles. Emulating an IN "
        "takes 1455 of io_kernel's and io_user's, in Linux 4.19 as there; without (vmm.parameters.fast_pio_in=1) "
        "they are 1808 and 4662. Lengths of KVM and QEMU are counts of Linux 4.19 and QEMU 7.2: with three times "
        "as many instructions in QEMU io_user takes 8242 cycles, and what QEMU did beyond in 2017 is unknown. "
        "virtual_ipi: the published time ends where the receiver handles the interrupt, ours where the sender"
        " sees it and sends the next, which finds the receiver still ending the last one, with interrupts off: each of"
        " them waits for an interrupt window, one more exit. The way of an interrupt message to another "
        "CPU is an estimate (latency.ipi_ns); with 250 ns each causes an exit for an external interrupt beside, and it"
        " is 7839. How sender and receiver meet decides: with the fast path of Linux 6.1 (--set "
        "vmm.parameters.fast_ipi=1 on this row) it is 5580"
    ),
)

bind(
    "KVM-IPI-FASTPATH",
    _cycles(
        *("no_fastpath", "ipi", "skx-4114", None, "posted interrupts; the receiver runs, there it is halted"),
        *(APICV, NO_FAST_PATH),
    ),
    _cycles("ultra_fastpath", "ipi", "skx-4114", None, "the same with Linux 6.1's fast path", APICV),
    unbound="fastpath is Linux 5.6's, some of the code behind an exit later than ultra_fastpath, the way of 5.8 and "
    "6.1; that code is one length here",
    deviates="there the receiver wakes from HLT; whether that was an exit the mail does not say plainly. The way of an "
    "interrupt message is an estimate (latency.ipi_ns: with 250 ns in place of 500 they are 2633 and 2355). The fast "
    "path saves 945 cycles there and 278 here: 113 for `msr` and `apic_write`, which it passes by (3070 without them), "
    "and 165 because the interrupt is on its way before the rest of the exit. With so much more of that rest "
    "(exit_common=1223) no_fastpath is 3686, and ultra_fastpath stays 2905: what the kernel of 2020 did there, its "
    "mitigations included, is not known. The fast path itself is as long as in Linux 6.1, for 4.19 has none",
)

bind(
    "KVM-IPI-ICR2",
    _cycles(
        *("before", "ipi", "skx-4114", None, "posted interrupts; two register accesses fewer are not told apart"),
        *(APICV, NO_FAST_PATH),
    ),
    unbound="after differs by two accesses to the virtual-APIC page, which the personality does not make",
    deviates="as KVM-IPI-FASTPATH",
)

bind(
    "KVM-IOEVENTFD-2013",
    _ratio(
        *("portio_no_eventfd / portio_wildcard_eventfd", "portio_no_eventfd", "portio_wildcard_eventfd"),
        ("outl_to_qemu", "outl_to_kernel"),
        "snb-e5-2450",
        "hardware not stated, so only the ratio; an in-kernel port stands for the eventfd",
    ),
    _ratio(
        *("mmio_wildcard_eventfd / portio_wildcard_eventfd", "mmio_wildcard_eventfd", "portio_wildcard_eventfd"),
        ("mmio_event", "outl_to_kernel"),
        "snb-e5-2450",
        "as above; the instruction is decoded, as it was in 2013",
        "vmm.parameters.fast_mmio=0",
    ),
    _ratio(
        *("mmio_no_eventfd / mmio_wildcard_eventfd", "mmio_no_eventfd", "mmio_wildcard_eventfd"),
        ("mmio_to_user", "mmio_event"),
        "snb-e5-2450",
        "as above",
        "vmm.parameters.fast_mmio=0",
    ),
    deviates=(
        "Lengths are counts of Linux 4.19 and QEMU 7.2, and those of 2013 are not known: with three times as many "
        "instructions in QEMU the first ratio is 3.72 and the third 2.47"
    ),
    unbound="an eventfd that compares the datum costs the same there",
)


bind(
    "KVM-FASTMMIO-2014",
    Figure(
        key="mmio_wildcard_over_pio",
        published="mmio_wildcard_over_pio",
        runs=tuple(
            run
            for test in ("mmio_event", "outl_to_kernel")
            for run in repeated(f"{VMEXIT}/{test}.yaml", "machine.profile=snb-e5-2450")
        ),
        compute=quotient(cycles_per_repetition, 2),
        unit="ratio",
        note="hardware not stated; an in-kernel port stands for the port's eventfd",
    ),
)

bind(
    "PVM-T1-SINGLE",
    _microseconds("kvm_bm.hypercall", "kvm_bm.hypercall.1", "vmcall", "clx-8269cy"),
    _microseconds("kvm_bm.cpuid", "kvm_bm.cpuid.1", "cpuid", "clx-8269cy"),
    _microseconds("kvm_bm.exception_ud", "kvm_bm.exception_ud.1", "invalid_opcode", "clx-8269cy"),
    _microseconds(
        *("kvm_bm.msr_access", "kvm_bm.msr_access.1", "rd_unknown_msr", "clx-8269cy"),
        note="a read of the register, which this virtual CPU lacks and ignores",
    ),
    _microseconds("kvm_bm.pio_userspace, KPTI off", "kvm_bm.pio_userspace.1", "inl_from_qemu", "clx-8269cy"),
    _microseconds(
        *("kvm_bm.pio_userspace, KPTI on", "kvm_bm.pio_userspace.0", "inl_from_qemu", "clx-8269cy"),
        *("vms.0.guest.kernel.kpti=true", "vmm.mitigations.pti=true"),
        note="of guest and host: nothing of the guest's is on the way of an exit",
    ),
    _ratio(
        *("kvm_bm.pio_userspace / hypercall", "kvm_bm.pio_userspace.1", "kvm_bm.hypercall.1"),
        ("inl_from_qemu", "vmcall"),
        "clx-8269cy",
        "independent of the clock, which the paper does not state",
    ),
    deviates=(
        "The clock is not stated: at 3.2 GHz, within the processor's turbo, a hypercall takes 0.477 us and CPUID "
        "0.478. A process that answers a port is QEMU 7.2 here, whose instructions are counted: with three times as "
        "many pio_userspace takes 2.56 us and 4.19 hypercalls; RunD's monitor and its locks are not known. KPTI "
        "costs 0.40 us there and 0.17 here, where an exit is one system call of the monitor, two loads of CR3: it "
        "is what two or three take. Which other mitigations were on is not stated; of those of Linux 4.19 for this "
        "processor, retpolines take 0.065 us of a hypercall and 0.143 of pio_userspace (--set "
        "vmm.mitigations.spectre_v2=retpoline on this row)"
    ),
    unbound="pvm_bm is another hypervisor",
)


NOTHING_IN_THE_PROCESS: Final = tuple(
    f"vmm.parameters.{name}=0" for name in ("user_dispatch", "user_device", "user_again")
)


def _user_part(row: Row) -> float:
    return row.value("entry_to_pre_run") + row.value("post_run_to_ioctl_exit.0")


bind(
    "SVM-USEREXIT-2020",
    Figure(
        key="entry_to_pre_run + post_run_to_ioctl_exit",
        published=_user_part,
        runs=tuple(
            run
            for test in ("inl_from_qemu", "inl_from_kernel")
            for run in repeated(f"{VMEXIT}/{test}.yaml", "machine.profile=skx-4114", *NOTHING_IN_THE_PROCESS)
        ),
        compute=lambda results: cycles_per_repetition(results[:2]) - cycles_per_repetition(results[2:]),
        unit="cycles",
        note="an EPYC there, Skylake-SP here; ours: a port that an idle process answers less one that the kernel does",
    ),
    deviates=(
        "Of ours XSAVES and XRSTORS are 400 cycles and RDMSR and WRMSR 440, with each for nothing 1546 and 1506: "
        "what KVM's SVM half has in VMSAVE and VMLOAD, on the other side of the published mark, and EPYC's prices"
    ),
    unbound="pre_run_to_post_run is SVM's own world switch",
)

bind(
    "SPLITX-DIRECT",
    _cycles("direct", "vmcall", "nehalem-ep", note="the shortest exit through KVM"),
)
