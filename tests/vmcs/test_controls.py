"""Control bits stand where the manual puts them, and constants are the table."""

import pytest

from vtsim.vmcs import bits
from vtsim.vmcs.controls import (
    CONTROL,
    CONTROLS,
    ENTRY,
    EXIT,
    PIN,
    PRIMARY,
    SECONDARY,
    WORDS,
    describe_controls,
)
from vtsim.vmcs.fields import FIELDS, SLOT


def test_mask_constants_are_the_table():
    constants = {name: value for name, value in vars(bits).items() if isinstance(value, int)}

    assert constants == {control.name: control.mask for control in CONTROLS}


def test_no_two_controls_share_a_name_or_a_place():
    assert len(CONTROL) == len(CONTROLS) == len({(control.word.field, control.bit) for control in CONTROLS})


def test_every_word_is_a_field_as_wide_as_the_word():
    assert [FIELDS[SLOT[word.field]].bits for word in WORDS] == [word.bits for word in WORDS]


# reserved bits that are 1 in the oldest processors, as listed under each table of the manual
@pytest.mark.parametrize(
    "word, ones",
    [
        (PIN, {1, 2, 4}),
        (PRIMARY, {1, 4, 5, 6, 8, 13, 14, 15, 16, 26}),
        (SECONDARY, set()),
        (EXIT, {*range(9), 10, 11, 13, 14, 16, 17}),
        (ENTRY, {*range(9), 12}),
    ],
)
def test_default1_bits_are_those_the_manual_lists(word, ones):
    assert {bit for bit in range(32) if word.default1 >> bit & 1} == ones


@pytest.mark.parametrize(
    "name, field, bit",
    [
        ("EXTERNAL_INTERRUPT_EXITING", "PIN_CONTROLS", 0),
        ("HLT_EXITING", "PRIMARY_PROC_CONTROLS", 7),
        ("USE_MSR_BITMAPS", "PRIMARY_PROC_CONTROLS", 28),
        ("ENABLE_EPT", "SECONDARY_PROC_CONTROLS", 1),
        ("UNRESTRICTED_GUEST", "SECONDARY_PROC_CONTROLS", 7),
        ("IPI_VIRTUALIZATION", "TERTIARY_PROC_CONTROLS", 4),
        ("EXIT_HOST_ADDRESS_SPACE_SIZE", "EXIT_CONTROLS", 9),
        ("EXIT_LOAD_FRED", "SECONDARY_EXIT_CONTROLS", 1),
        ("ENTRY_IA32E_MODE_GUEST", "ENTRY_CONTROLS", 9),
        ("EPTP_SWITCHING", "VM_FUNCTION_CONTROLS", 0),
    ],
)
def test_controls_stand_where_the_manual_puts_them(name, field, bit):
    assert (CONTROL[name].word.field, CONTROL[name].bit) == (field, bit)


def test_a_control_value_is_described_by_the_names_of_its_bits():
    assert describe_controls(PIN, 0x17 | bits.NMI_EXITING) == (
        "EXTERNAL_INTERRUPT_EXITING | bit 1 | bit 2 | NMI_EXITING | bit 4"
    )
    assert describe_controls(SECONDARY, 0) == "0"
