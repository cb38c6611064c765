"""What VMCS fields say in words."""

from __future__ import annotations

import pytest

from vtsim.vmcs import bits as b
from vtsim.vmcs.fields import FIELDS
from vtsim.vmcs.meaning import groups, meaning


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("GUEST_CS_ACCESS_RIGHTS", 0xA09B, "code execute/read, DPL 0, accessed, 64-bit, 4 KiB units"),
        ("GUEST_SS_ACCESS_RIGHTS", 0xC0F2, "data read/write, DPL 3, 32-bit, 4 KiB units"),
        ("GUEST_DS_ACCESS_RIGHTS", 0x0016, "data read/write expand-down, DPL 0, not present"),
        ("GUEST_TR_ACCESS_RIGHTS", 0x008B, "busy TSS, DPL 0"),
        ("GUEST_LDTR_ACCESS_RIGHTS", 0x0082, "LDT, DPL 0"),
        ("GUEST_LDTR_ACCESS_RIGHTS", 0x10000, "unusable"),
        ("PIN_CONTROLS", 0x16 | b.NMI_EXITING | b.VIRTUAL_NMIS, "NMI_EXITING VIRTUAL_NMIS"),
        ("PIN_CONTROLS", 0x16 | 1 << 20, "and 0x100000"),
        ("SECONDARY_PROC_CONTROLS", b.ENABLE_EPT | b.ENABLE_VPID, "ENABLE_EPT ENABLE_VPID"),
        ("EPT_POINTER", 0x1234005E, "root 0x12340000, write-back, 4 levels, accessed and dirty flags"),
        ("EXIT_REASON", 10, "CPUID"),
        ("EXIT_REASON", 48, "EPT_VIOLATION, EPT violation"),
        ("EXIT_REASON", 1 << 31 | 33, "INVALID_STATE, VM-entry failure due to invalid guest state, VM-entry failure"),
        ("EXIT_REASON", 35, "basic reason 35, which the manual leaves undefined"),
        ("EXIT_INTERRUPTION_INFORMATION", 0x80000B0E, "hardware exception #PF with error code"),
        ("ENTRY_INTERRUPTION_INFORMATION", 0, "none"),
        ("VM_INSTRUCTION_ERROR", 7, "VM entry with invalid control field(s)"),
        ("EXCEPTION_BITMAP", 1 << 1 | 1 << 14, "#DB #PF"),
        ("GUEST_ACTIVITY_STATE", 1, "HLT"),
        ("GUEST_INTERRUPTIBILITY_STATE", 9, "blocking by STI, blocking by NMI"),
        ("GUEST_RFLAGS", 0x10202, "IF RF"),
        ("GUEST_DR7", 0x401, "L0"),
        ("GUEST_CR0", 0x80000031, "PE ET NE PG"),
        ("HOST_CR4", 0x20A0, "PAE PGE VMXE"),
        ("GUEST_IA32_EFER", 0xD01, "SCE LME LMA NXE"),
        ("VMCS_LINK_POINTER", (1 << 64) - 1, "none"),
        ("GUEST_PENDING_DEBUG_EXCEPTIONS", 1 << 14 | 1 << 12, "enabled breakpoint BS"),
        ("GUEST_RIP", 0x1000, ""),
    ],
)  # fmt: skip
def test_a_field_says_in_words_what_its_bits_mean(name: str, value: int, words: str) -> None:
    assert meaning(name, {name: value}) == words


def test_a_qualification_is_read_with_its_reason() -> None:
    values = {"EXIT_REASON": 28, "EXIT_QUALIFICATION": 0x103}

    assert meaning("EXIT_QUALIFICATION", values) == "CR3 <- RCX"


def test_instruction_information_is_read_with_its_reason() -> None:
    values = {"EXIT_REASON": 57, "EXIT_INSTRUCTION_INFORMATION": 2 << 11 | 3 << 3}

    assert meaning("EXIT_INSTRUCTION_INFORMATION", values) == "register1 3, operand size 2"


@pytest.mark.parametrize("value", [0, 1, (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1])
def test_any_value_of_any_field_can_be_said(value: int) -> None:
    for reason in (0, 1, 9, 28, 30, 48, 0xFFFF):
        values = {field.name: value & (1 << field.bits) - 1 for field in FIELDS} | {"EXIT_REASON": reason}
        for field in FIELDS:
            assert isinstance(meaning(field.name, values), str)


def test_the_groups_of_the_manual_hold_every_field_once() -> None:
    grouped = [name for _, names in groups({field.name: field.area.name for field in FIELDS}) for name in names]

    assert sorted(grouped) == sorted(field.name for field in FIELDS)
