"""The field table agrees with the manual, with itself, and with a processor model that is not ours.

SDM: "Guest-State Area"; "Host-State Area"; "Field Encoding in VMCS".
"""

import json
from pathlib import Path

import numpy as np
import pytest

from vtsim.vmcs import slots
from vtsim.vmcs.controls import CONTROL
from vtsim.vmcs.fields import (
    BY_ENCODING,
    BY_NAME,
    ENCODING_TO_SLOT,
    ENCODINGS,
    FIELDS,
    FIRST_SLOT,
    READ_ONLY,
    SLOT,
    WIDTH_MASK,
    Area,
    Field,
    Width,
    describe_fields,
)

RECORDED = json.loads((Path(__file__).parent / "data" / "skylake_x.json").read_text())
SUPPORTED = {int(encoding, 16) for encoding in RECORDED["supported_field_encodings"]}
NAMED = {name: int(encoding, 16) for name, encoding in RECORDED["fields"].items()}
STARTS = {f"{area.name}_START" for area in Area} | {"FIELD_COUNT"}


@pytest.mark.parametrize(
    "name, encoding",
    [
        ("VPID", 0x0000),
        ("GUEST_CS_SELECTOR", 0x0802),
        ("HOST_TR_SELECTOR", 0x0C0C),
        ("EPT_POINTER", 0x201A),
        ("TSC_MULTIPLIER", 0x2032),
        ("GUEST_PHYSICAL_ADDRESS", 0x2400),
        ("VMCS_LINK_POINTER", 0x2800),
        ("HOST_IA32_EFER", 0x2C02),
        ("PRIMARY_PROC_CONTROLS", 0x4002),
        ("EXIT_REASON", 0x4402),
        ("PREEMPTION_TIMER_VALUE", 0x482E),
        ("EXIT_QUALIFICATION", 0x6400),
        ("GUEST_RIP", 0x681E),
        ("HOST_RIP", 0x6C16),
        ("TERTIARY_PROC_CONTROLS", 0x2034),
        ("INJECTED_EVENT_DATA", 0x2052),
        ("GUEST_IA32_FRED_SSP3", 0x2828),
        ("INSTRUCTION_TIMEOUT_CONTROL", 0x4024),
    ],
)
def test_encodings_are_those_printed_in_the_manual(name, encoding):
    assert BY_NAME[name].encoding == encoding


def test_names_and_encodings_are_unique():
    assert len(SLOT) == len(BY_ENCODING) == len(FIELDS)


def test_an_encoding_leads_back_to_its_slot():
    assert [int(ENCODING_TO_SLOT[field.encoding]) for field in FIELDS] == list(
        range(FIRST_SLOT, FIRST_SLOT + len(FIELDS))
    )


def test_only_fields_and_high_halves_of_64_bit_fields_have_a_slot():
    known = {field.encoding for field in FIELDS}
    known |= {field.encoding + 1 for field in FIELDS if field.width is Width.W64}

    assert set(np.flatnonzero(ENCODING_TO_SLOT >= 0).tolist()) == known
    assert len(ENCODING_TO_SLOT) == ENCODINGS


def test_a_high_encoding_has_the_slot_of_its_field():
    assert ENCODING_TO_SLOT[0x201B] == SLOT["EPT_POINTER"]
    assert BY_NAME["EPT_POINTER"].high_encoding == 0x201B
    assert BY_NAME["GUEST_RIP"].high_encoding is None


def test_slots_are_ordered_by_area_then_width_then_index():
    order = [(field.area, field.width, field.index) for field in FIELDS]

    assert order == sorted(order)


def test_slot_constants_are_the_table():
    constants = {name: value for name, value in vars(slots).items() if isinstance(value, int)}

    assert {name: value for name, value in constants.items() if name not in STARTS} == SLOT


@pytest.mark.parametrize("area", Area)
def test_an_area_starts_at_its_constant(area):
    first = min(SLOT[field.name] for field in FIELDS if field.area is area)

    assert getattr(slots, f"{area.name}_START") == first


def test_a_vmcs_has_as_many_slots_as_fields():
    assert len(FIELDS) == slots.FIELD_COUNT


@pytest.mark.parametrize(
    "name, mask",
    [("GUEST_CS_SELECTOR", 0xFFFF), ("EXIT_REASON", 0xFFFF_FFFF), ("EPT_POINTER", -1), ("GUEST_RIP", -1)],
)
def test_a_slot_holds_as_many_bits_as_its_field_is_wide(name, mask):
    assert WIDTH_MASK[SLOT[name]] == mask


def test_exit_information_and_nothing_else_is_read_only():
    read_only = {field.name for field, refused in zip(FIELDS, READ_ONLY[FIRST_SLOT:], strict=True) if refused}

    assert read_only == {field.name for field in FIELDS if field.area is Area.EXIT_INFO}


def test_every_field_needs_controls_that_exist():
    assert {need for field in FIELDS for need in field.needs} <= set(CONTROL)


def test_a_recorded_processor_supports_only_fields_of_the_table():
    assert {encoding for encoding in SUPPORTED if ENCODING_TO_SLOT[encoding] < 0} == set()


def test_every_field_of_a_recorded_state_is_known():
    recorded = {NAMED[name] for name in RECORDED["base_state_b64u"]}

    assert recorded <= set(BY_ENCODING)


def test_every_field_a_recorder_can_name_is_known_but_that_of_tdx():
    assert {name for name, encoding in NAMED.items() if encoding not in BY_ENCODING} == {"shared_ept_pointer"}


def test_recorded_values_fit_their_fields():
    for name, value in RECORDED["base_state_b64u"].items():
        assert int(value, 16) < 1 << BY_ENCODING[NAMED[name]].bits, name


def test_a_field_describes_itself_by_width_area_and_index():
    field = Field(name="MADE_UP", area=Area.HOST, width=Width.W32, index=3)

    assert (field.encoding, field.bits, field.read_only) == (2 << 13 | 3 << 10 | 3 << 1, 32, False)


def test_the_listing_has_one_line_per_field_under_a_heading():
    heading, *lines = describe_fields().splitlines()

    assert heading.split() == ["slot", "encoding", "area", "width", "name", "exists", "with"]
    assert len(lines) == len(FIELDS)
    assert lines[SLOT["EPT_POINTER"] - FIRST_SLOT].split() == [
        str(SLOT["EPT_POINTER"]), "0x201a", "CONTROL", "W64", "EPT_POINTER", "ENABLE_EPT",
    ]  # fmt: skip
