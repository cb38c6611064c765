"""Every VMCS field through the engine: what is done with two values of it; or the one place that excuses it.

That each can be written and read at its width is shown in test_fields_access.

SDM: "Guest-State Area"; "Host-State Area"; "Saving Guest State"; "Loading Guest State"; "Loading Host State".
"""

from __future__ import annotations

import pytest
from attrs import evolve

from tests.vmcs.checked import environment
from tests.vmcs.control_cases import CASES
from tests.vmcs.field_cases import (
    CONTROL_FIELDS,
    EXIT_FIELDS,
    HOST_ALL,
    LOAD_ALL,
    NOT_SAVED,
    REGISTERS,
    RUN_BY,
    SAVE_ALL,
    STATE_FIELDS,
)
from tests.vmcs.root import VMCS, Root
from vtsim.base import memory as mem
from vtsim.base.jit import quiet
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.study.vmx.entry_cases import Bench, bench
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.capabilities import FEATURES, Capabilities
from vtsim.vmcs.controls import CONTROL, WORDS
from vtsim.vmcs.coverage import WITHOUT_EFFECT
from vtsim.vmcs.fields import FIELDS, SLOT, Area, Field
from vtsim.vmcs.groups import ALL_GROUPS, GROUPS

HELD = {"RSP": s.GPR + s.RSP, "IA32_SPEC_CTRL": s.MSR_SPEC_CTRL}
OF_GUEST = [name for name in REGISTERS if f"GUEST_{name}" in SLOT]
OF_HOST = [name for name in REGISTERS if f"HOST_{name}" in SLOT]
TWO_VALUES = {**CONTROL_FIELDS, **STATE_FIELDS}


def place(name: str) -> int:
    """Where the record holds a register."""
    return HELD.get(name, s.STATE + SLOT[f"GUEST_{name}"] - v.GUEST_START)


def entered(name: str) -> Bench:
    """A machine that has entered a guest with one register's field changed."""
    value = REGISTERS[name][0]
    base = "bpaee" if name.startswith("PDPTE") else "b64e"
    controls = (
        LOAD_ALL + " " if base == "b64e" else ""
    ) + f"{SAVE_ALL} EXIT_SAVE_DEBUG_CONTROLS ENTRY_LOAD_DEBUG_CONTROLS"
    fields = {"GUEST_IA32_EFER": 0xD01, "GUEST_CR4": 0x42620} if base == "b64e" else {}
    if name.startswith("CS"):
        fields["GUEST_CS_LIMIT"] = 0xFFFFFFFF
    machine = bench()
    machine.prepare(environment(base, controls, **{**fields, f"GUEST_{name}": value}))
    if name not in RUN_BY:
        machine.m[place(name)] = ~value
    assert machine.enter("vmlaunch") == {"kind": "exit"}
    return machine


def test_every_field_has_a_case_or_an_excuse_and_none_has_both() -> None:
    words = {word.field for word in WORDS if any(CONTROL[name].word is word for name in CASES)}
    shown = {*words, *TWO_VALUES, *EXIT_FIELDS, *(f"GUEST_{n}" for n in OF_GUEST), *(f"HOST_{n}" for n in OF_HOST)}
    excused = {field.name for field in FIELDS} & WITHOUT_EFFECT.keys()

    assert {field.name for field in FIELDS} - shown == excused
    assert shown & excused == set()
    assert {f.name for f in FIELDS if f.area is Area.EXIT_INFO} - excused == EXIT_FIELDS.keys()


@pytest.mark.parametrize("name", TWO_VALUES)
def test_two_values_of_a_field_make_the_difference_that_the_manual_says(name: str) -> None:
    guest, one, of_one, other, of_other = TWO_VALUES[name]

    assert evolve(guest, fields={**guest.fields, name: one}).run().differs(of_one) == {}
    assert evolve(guest, fields={**guest.fields, name: other}).run().differs(of_other) == {}


@pytest.mark.parametrize("name", EXIT_FIELDS)
def test_a_vm_exit_or_a_failure_leaves_what_the_manual_says(name: str) -> None:
    guest, value = EXIT_FIELDS[name]

    assert guest.run().fields[name] == value


@pytest.mark.parametrize("name", OF_GUEST)
def test_vm_entry_loads_a_register_of_the_guest(name: str) -> None:
    assert int(entered(name).m[place(name)]) == REGISTERS[name][0]


@pytest.mark.parametrize("name", [name for name in OF_GUEST if name not in NOT_SAVED])
def test_a_vm_exit_saves_a_register_of_the_guest(name: str) -> None:
    machine = entered(name)
    machine.m[place(name)] = REGISTERS[name][1]
    with quiet():
        vm_exit(machine.m, machine.engine.arena, x.VMCALL, 0, 3)

    assert int(machine.vmcs()[SLOT[f"GUEST_{name}"]]) == REGISTERS[name][1]


@pytest.mark.parametrize("name", OF_HOST)
def test_a_vm_exit_loads_a_register_of_the_host(name: str) -> None:
    value = {"CS_SELECTOR": 0x28, "CR3": 0x209000, "IA32_EFER": 0xD00}.get(name, REGISTERS[name][0])
    machine = bench()
    machine.prepare(environment("b64e", f"{LOAD_ALL} {HOST_ALL}", GUEST_IA32_EFER=0xD01, **{f"HOST_{name}": value}))
    assert machine.enter("vmlaunch") == {"kind": "exit"}
    with quiet():
        vm_exit(machine.m, machine.engine.arena, x.VMCALL, 0, 3)

    assert int(machine.m[place(name)]) == value


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_field_that_vm_entry_checks_is_checked_again_after_vmwrite(field: Field) -> None:
    """VMWRITE makes the checks due that read the field: their groups are no longer held as checked."""
    root = Root(Capabilities.from_features(FEATURES, revision=0x4A)).enter()
    words = root.engine.contents(VMCS >> 12, mem.VMCS_REGION)
    words[h.V_CHECKED] = ALL_GROUPS
    slot = SLOT[field.name]
    assert root.execute("VMWRITE", rcx=field.encoding, rbx=0x5A) == "ok"

    assert int(words[h.V_CHECKED]) == ALL_GROUPS & ~int(GROUPS[slot])
