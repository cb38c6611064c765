"""VMWRITE then VMREAD returns the value masked to its width, for every field there is, in whole and by halves.

SDM: "VMREAD, VMWRITE, and Encodings of VMCS Fields".
SDM: "VMREAD—Read Field from Virtual-Machine Control Structure".
SDM: "VMWRITE—Write Field to Virtual-Machine Control Structure".
"""

from __future__ import annotations

from functools import cache

import pytest

from tests.vmcs.root import VMCS, Root, capabilities
from vtsim.base import memory as mem
from vtsim.cpu import slots as s
from vtsim.vmcs.capabilities import FEATURES, Capabilities
from vtsim.vmcs.fields import FIELDS, SLOT, Field, Width
from vtsim.vmcs.generations import GENERATIONS

ONES = (1 << 64) - 1
PATTERNS = (ONES, 0, 0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210)
EVERYTHING = Capabilities.from_features(FEATURES, revision=0x4A)


@cache
def whole() -> Root:
    """A processor with every feature, so that every field exists and can be written."""
    return Root(EVERYTHING).enter()


def read(root: Root, encoding: int) -> int:
    assert root.execute("VMREAD", rcx=encoding, rbx=0x5A5A) == "ok"
    return int(root.m[s.GPR + s.RBX]) & ONES


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_field_returns_what_was_written_masked_to_its_width(field: Field) -> None:
    for value in PATTERNS:
        assert whole().execute("VMWRITE", rcx=field.encoding, rbx=value) == "ok"
        assert read(whole(), field.encoding) == value & (1 << field.bits) - 1


@pytest.mark.parametrize("field", [field for field in FIELDS if field.width is Width.W64], ids=lambda field: field.name)
def test_the_upper_half_of_a_64_bit_field_is_a_component_of_its_own(field: Field) -> None:
    root, high = whole(), field.encoding + 1
    root.execute("VMWRITE", rcx=field.encoding, rbx=0x1122_3344_5566_7788)
    assert read(root, high) == 0x1122_3344
    assert root.execute("VMWRITE", rcx=high, rbx=0xAABB_CCDD_EEFF_0011) == "ok"

    assert read(root, field.encoding) == 0xEEFF_0011_5566_7788


@pytest.mark.parametrize(
    "field", [field for field in FIELDS if field.width is not Width.W64], ids=lambda field: field.name
)
def test_a_field_of_another_width_has_no_upper_half(field: Field) -> None:
    assert whole().execute("VMREAD", rcx=field.encoding + 1) == 12


def test_a_write_changes_one_word_of_the_vmcs() -> None:
    root = whole()
    words = root.engine.contents(VMCS >> 12, mem.VMCS_REGION)
    for field in FIELDS:
        before = words.copy()
        before[SLOT[field.name]] ^= -1
        root.execute("VMWRITE", rcx=field.encoding, rbx=int(before[SLOT[field.name]]))
        before[SLOT[field.name]] &= (1 << field.bits) - 1 if field.bits < 64 else -1

        assert (words == before).all(), field.name


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_processor_has_the_fields_that_its_controls_need_and_no_others(generation: str) -> None:
    made = GENERATIONS[generation].capabilities()
    root = Root(made).enter()
    has = {field.name for field in FIELDS if root.execute("VMREAD", rcx=field.encoding) == "ok"}

    assert has == {f.name for f in FIELDS if not f.needs or any(made.supports(name) for name in f.needs)}
    assert has < {field.name for field in FIELDS}


def test_no_other_encoding_is_supported() -> None:
    root = whole()
    known = {field.encoding for field in FIELDS} | {field.high_encoding for field in FIELDS}
    near = {f.encoding ^ 1 << bit for f in FIELDS for bit in range(0, 20, 3)} - known

    assert {root.execute("VMREAD", rcx=encoding) for encoding in near} == {12}


def test_a_field_can_be_taken_from_a_processor() -> None:
    assert Root(capabilities()).enter().execute("VMREAD", rcx=0x2032) == "ok"
    assert Root(capabilities(without={"USE_TSC_SCALING"})).enter().execute("VMREAD", rcx=0x2032) == 12
