"""VM exits of guest instructions as bytes: which fault comes first, and what the exit says of the instruction.

SDM: "Information for VM Exits Due to Instruction Execution".
SDM: "Relative Priority of Faults and VM Exits".
SDM: "Unrestricted Guests".
"""

from __future__ import annotations

import pytest

from tests.cpu.guest import DATA, PRIMARY, SECONDARY_ON, enter
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x

GP, UD = 13, 6


def secondary(bits: int, primary: int = 0) -> dict[str, int]:
    return {"proc_controls": PRIMARY | SECONDARY_ON | primary, "secondary_proc_controls": bits}


# fmt: off
INFORMATION = [
    # VMCLEAR [RAX]: address size 64, segment DS, no index, base RAX
    ("b64", "660fc730",         2 << 7 | 3 << 15 | 1 << 22),
    # VMCLEAR [RSP]: segment SS, base RSP
    ("b64", "660fc73424",       2 << 7 | 2 << 15 | 1 << 22 | 4 << 23),
    # VMPTRLD [RAX+RBX*4]: scale 4, index RBX
    ("b64", "0fc73498",         2 | 2 << 7 | 3 << 15 | 3 << 18),
    # VMREAD RAX, RBX: register operands
    ("b64", "0f78d8",           1 << 10 | 3 << 28),
    # VMWRITE RBX, [RCX]
    ("b64", "0f7919",           2 << 7 | 3 << 15 | 1 << 22 | 1 << 23 | 3 << 28),
    # 32-bit code, 16-bit addressing: VMCLEAR [BX+SI+4]
    ("b32", "67660fc77004",     3 << 15 | 6 << 18 | 3 << 23),
    # 32-bit code, FS override: VMPTRST [EDX]
    ("b32", "640fc73a",         1 << 7 | 4 << 15 | 1 << 22 | 2 << 23),
]
# fmt: on


@pytest.mark.parametrize(("base", "code", "information"), INFORMATION)
def test_instruction_information_names_the_operands(base: str, code: str, information: int) -> None:
    got = enter(base, code)
    defined = ~(0xF << 18 | 3) if information >> 22 & 1 else ~0

    assert got["instruction_info"] & defined == information & defined


@pytest.mark.parametrize(
    ("bits", "code", "identity", "reason"),
    [
        (64, "0f0101", 0, x.GDTR_IDTR), (64, "0f0109", 1, x.GDTR_IDTR), (64, "0f0111", 2, x.GDTR_IDTR),
        (64, "0f0119", 3, x.GDTR_IDTR), (64, "0f0001", 0, x.LDTR_TR), (64, "0f0009", 1, x.LDTR_TR),
        (64, "0f0011", 2, x.LDTR_TR), (64, "0f0019", 3, x.LDTR_TR),
    ],
)  # fmt: skip
def test_descriptor_table_exits_name_their_instruction(bits: int, code: str, identity: int, reason: int) -> None:
    got = enter("b64", code, vmcs=secondary(b.DESCRIPTOR_TABLE_EXITING), gpr={"rcx": DATA})

    assert (got["reason"], got["instruction_info"] >> 28 & 3) == (reason, identity)


@pytest.mark.parametrize(("prefix", "wide"), [("", 1), ("66", 0)])
def test_a_descriptor_table_exit_of_32_bit_code_says_its_operand_size(prefix: str, wide: int) -> None:
    got = enter("b32", prefix + "0f0111", vmcs=secondary(b.DESCRIPTOR_TABLE_EXITING), gpr={"rcx": DATA})

    assert got["instruction_info"] >> 11 & 1 == wide


@pytest.mark.parametrize(("code", "size"), [("660fc7f0", 0), ("0fc7f0", 1), ("480fc7f0", 2)])
def test_a_random_number_exit_says_its_operand_size(code: str, size: int) -> None:
    got = enter("b64", code, vmcs=secondary(b.RDRAND_EXITING))

    assert (got["reason"], got["instruction_info"] >> 11 & 3) == (x.RDRAND, size)


@pytest.mark.parametrize(
    ("base", "code", "vmcs", "vector"),
    [
        ("b64_cpl3", "0f32", {}, GP),                                            # RDMSR: privilege first
        ("b64_cpl3", "f4", {"proc_controls": PRIMARY | b.HLT_EXITING}, GP),
        ("b64_cpl3", "0f20c0", {}, GP),
        ("b64", "0f20c8", {}, UD),                                               # there is no CR1
        ("b64", "0f01f9", secondary(0, b.RDTSC_EXITING), UD),                    # RDTSCP is not enabled
        ("b64", "660f388201", secondary(0, b.INVLPG_EXITING), UD),               # INVPCID is not enabled
        ("b64", "0f37", {}, UD),                                                 # GETSEC without CR4.SMXE
        ("b64", "0faa", {}, UD),                                                 # RSM outside SMM
        ("b64_cpl3", "0f01c8", {"proc_controls": PRIMARY | b.MONITOR_EXITING}, UD),
        ("brealu", "0f00d0", secondary(0xA2 | b.DESCRIPTOR_TABLE_EXITING), UD),  # LLDT in real mode
        ("bv86", "660fc737", {}, UD),                                            # VMCLEAR in virtual-8086 mode
        ("bcompat", "0f78d8", {}, UD),                                           # VMREAD in compatibility mode
        ("b64_cpl3", "ec", {"proc_controls": PRIMARY | b.UNCONDITIONAL_IO_EXITING}, GP),  # no I/O permission
    ],
)  # fmt: skip
def test_a_fault_of_mode_privilege_or_permission_comes_before_the_exit(
    base: str, code: str, vmcs: dict[str, int], vector: int
) -> None:
    got = enter(base, code, vmcs=vmcs)

    assert (got["reason"], got.get("guest_handler_vector")) == (x.VMCALL, vector)


@pytest.mark.parametrize(("base", "cr4", "code"), [("b64_cpl3", 0x42620, "0f21c3"), ("b64", 0x42628, "0f21eb")])
def test_mov_dr_exits_before_its_own_faults(base: str, cr4: int, code: str) -> None:
    got = enter(base, code, vmcs={"proc_controls": PRIMARY | b.MOV_DR_EXITING, "guest_cr4": cr4})

    assert got["reason"] == x.DR_ACCESS


def test_the_operand_of_an_instruction_that_exits_is_not_touched() -> None:
    got = enter("b64", "0f0101", vmcs=secondary(b.DESCRIPTOR_TABLE_EXITING), gpr={"rcx": 0x8000_0000_0000})

    assert got["reason"] == x.GDTR_IDTR


@pytest.mark.parametrize(
    ("source", "mask", "shadow", "leaves"),
    [(1, 1, 0, True), (1, 1, 1, False), (0, 1, 1, False), (8, 8, 0, True), (8, 0, 0, False), (4, 4, 4, False)],
)
def test_lmsw_exits_for_a_masked_bit_that_differs_but_never_for_clearing_pe(
    source: int, mask: int, shadow: int, leaves: bool
) -> None:
    got = enter("b64", "0f01f3", vmcs={"cr0_mask": mask, "cr0_shadow": 0x80000030 | shadow}, gpr={"rbx": source})

    assert (got["reason"] == x.CR_ACCESS) == leaves
    if leaves:
        assert got["qualification"] == 3 << 4 | source << 16


@pytest.mark.parametrize(
    ("code", "qualification"),
    [("ec", 8), ("66ed", 9), ("ed", 11), ("ee", 0), ("e680", 0x40 | 0x80 << 16), ("6e", 0x10), ("f36c", 0x38)],
)
def test_the_qualification_of_an_io_exit_says_what_was_done(code: str, qualification: int) -> None:
    got = enter(
        "b64",
        code,
        vmcs={"proc_controls": PRIMARY | b.UNCONDITIONAL_IO_EXITING},
        gpr={"rcx": 2, "rsi": DATA, "rdi": DATA},
    )

    assert (got["reason"], got["qualification"]) == (x.IO_INSTRUCTION, qualification)
    if qualification & 0x10:
        assert got["guest_linear_address"] == DATA


def test_what_an_exit_by_instruction_saves_has_rf_clear() -> None:
    got = enter("b64", "0fa2", vmcs={"guest_rflags": 0x10002})

    assert (got["reason"], got["vmcs"]["GUEST_RFLAGS"]) == (x.CPUID, 2)


@pytest.mark.parametrize(("base", "bits"), [("b64", 64), ("b32", 32), ("bpae", 32), ("bv86", 16), ("brealu", 16)])
def test_every_mode_executes_its_code_and_exits(base: str, bits: int) -> None:
    got = enter(base, "90" + "0fa2")

    assert (got["reason"], got["instruction_length"]) == (x.CPUID, 2)


@pytest.mark.parametrize(
    ("code", "at", "header", "vector"),
    [
        ("0fc719", DATA, "00" * 15 + "80" + "00" * 48, None),
        ("0fc719", DATA, "00" * 64, GP),                                        # not compacted
        ("0fc719", DATA, "01" + "00" * 14 + "80" + "00" * 48, GP),              # x87 state that XCOMP_BV lacks
        ("0fc719", DATA, "00" * 15 + "80" + "00" * 47 + "01", GP),              # reserved
        ("0fc719", DATA, "00" * 8 + "00" * 7 + "c0" + "00" * 48, GP),           # a component that XCR0 does not enable
        ("0fc719", DATA + 8, "00" * 15 + "80" + "00" * 48, GP),                 # not aligned to 64 bytes
        ("0fc729", DATA, "ff" * 64, None),
        ("0fc729", DATA + 8, "ff" * 64, GP),
    ],
)  # fmt: skip
def test_extended_state_is_saved_and_restored_by_its_header(
    code: str, at: int, header: str, vector: int | None
) -> None:
    got = enter(
        "b64", code, vmcs=secondary(b.ENABLE_XSAVES_XRSTORS), gpr={"rcx": at, "rax": 3, "rdx": 0},
        memory={at + 512: header}, dump=(at + 512, 16),
    )  # fmt: skip

    assert (got["reason"], got.get("guest_handler_vector")) == (x.VMCALL, vector)
    if code == "0fc729" and vector is None:
        present, components = got["dump"][:16], int.from_bytes(bytes.fromhex(got["dump"][16:]), "little")
        assert present == "00" * 8
        assert components & ~3 == 1 << 63
