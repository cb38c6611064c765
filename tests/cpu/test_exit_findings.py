"""What replays of recorded cases found: the TPR threshold at VM entry, SYSCALL, repetitions, MSR areas."""

from __future__ import annotations

import pytest

from tests.cpu.guest import CODE, PRIMARY, SECONDARY_ON, VIRTUAL_APIC, enter

TPR_BELOW_THRESHOLD, MONITOR_TRAP_FLAG, CPUID, VMCALL = 43, 37, 10, 18
TPR_SHADOW, MONITOR_TRAP, VIRTUALIZE_ACCESSES, EPT_AND_VPID = 1 << 21, 1 << 27, 1 << 0, 0x22
RF, IO_PRIVILEGE = 1 << 16, 3 << 12


@pytest.mark.parametrize(
    ("priority", "threshold", "secondary", "reason"),
    [
        (0x20, 3, VIRTUALIZE_ACCESSES, TPR_BELOW_THRESHOLD),
        (0x30, 3, VIRTUALIZE_ACCESSES, VMCALL),
    ],
)  # fmt: skip
def test_a_guest_whose_tpr_is_below_its_threshold_is_left_at_once(
    priority: int, threshold: int, secondary: int, reason: int
) -> None:
    got = enter(
        "b64e", "",
        vmcs={
            "proc_controls": PRIMARY | SECONDARY_ON | TPR_SHADOW, "tpr_threshold": threshold,
            "secondary_proc_controls": EPT_AND_VPID | secondary,
        },
        memory={VIRTUAL_APIC + 0x80: f"{priority:02x}000000"},
    )  # fmt: skip

    assert (got["reason"], got["vmcs"]["GUEST_RIP"]) == (reason, CODE)


def test_syscall_leaves_a_code_segment_of_ring_0() -> None:
    got = enter("b64_cpl3", "0f05")

    assert got["vmcs"]["GUEST_CS_ACCESS_RIGHTS"] >> 5 & 3 == 0
    assert got["vmcs"]["GUEST_SS_ACCESS_RIGHTS"] >> 5 & 3 == 0


@pytest.mark.parametrize(("count", "flag"), [(2, RF), (1, 0)])
def test_the_resume_flag_is_set_between_iterations_and_clear_after_the_last(count: int, flag: int) -> None:
    got = enter(
        "b64", "f36e",  # REP OUTSB
        vmcs={"proc_controls": PRIMARY | MONITOR_TRAP, "guest_rflags": 2},
        gpr={"rcx": count, "rdx": 0x80, "rsi": 0x828000},
    )  # fmt: skip

    assert (got["reason"], got["vmcs"]["GUEST_RFLAGS"] & RF) == (MONITOR_TRAP_FLAG, flag)
    assert got["gpr"]["rcx"] == count - 1


def test_capability_msrs_can_be_stored_at_a_vm_exit() -> None:
    got = enter(
        "b64", "0fa2",
        vmcs={"exit_msr_store_count": 1},
        memory={0x820000: "8004000000000000ffffffffffffffff"},
        dump=(0x820000, 16),
    )  # fmt: skip

    assert (got["reason"], got["dump"]) == (CPUID, "80040000000000002b0000000010d800")


def test_a_step_that_exits_from_a_halted_cpu_saves_that_it_was_halted() -> None:
    got = enter("b64", "f4", vmcs={"guest_rflags": 0x102, "exception_bitmap": 1 << 1})

    assert (got["reason"], got["vmcs"]["GUEST_ACTIVITY_STATE"]) == (0, 1)
