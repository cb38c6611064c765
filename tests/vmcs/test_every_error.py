"""Every VM-instruction error number, caused by the instruction that reports it; or the one place that excuses it.

SDM: "VM-Instruction Error Numbers"; "VM-Instruction Error Field".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from tests.vmcs.guests import Guest
from tests.vmcs.root import OTHER, REGION, VMCS, Ended, Root, capabilities
from vtsim.base import memory as mem
from vtsim.cpu import slots as s
from vtsim.vmcs import events as ev
from vtsim.vmcs import state as h
from vtsim.vmcs.coverage import WITHOUT_EFFECT


def root() -> Root:
    return Root().enter()


def launched() -> Root:
    found = root()
    words = found.engine.contents(VMCS >> 12, mem.VMCS_REGION)
    words[h.V_LAUNCHED], words[h.V_SESSION] = h.LAUNCHED, found.m[s.VMX_SESSION]
    return found


def after_vmxoff() -> Ended:
    found = launched()
    found.execute("VMXOFF")
    found.pointer("VMXON", REGION)
    found.pointer("VMPTRLD", VMCS)
    return found.execute("VMRESUME")


def wrong_revision() -> Ended:
    found = root()
    found.engine.store(OTHER, 0)
    return found.pointer("VMPTRLD", OTHER)


def blocked() -> Ended:
    found = root()
    found.m[s.INTERRUPT_SHADOW], found.m[s.SHADOW_KIND] = 2, 2
    return found.execute("VMLAUNCH")


def entry(**fields: int) -> Ended:
    got = Guest(fields=fields).run()
    assert got.got["kind"] == "vmfail_valid"
    return got.fields["VM_INSTRUCTION_ERROR"]


def read_only() -> Ended:
    without = Root(capabilities(without={"VMWRITE_EXIT_INFORMATION"})).enter()
    return without.execute("VMWRITE", rcx=0x4402)


# fmt: off
CAUSES: Final[dict[int, Callable[[], Ended]]] = {
    ev.VMCALL_IN_ROOT:               lambda: root().execute("VMCALL"),
    ev.VMCLEAR_INVALID_ADDRESS:      lambda: root().pointer("VMCLEAR", VMCS | 8),
    ev.VMCLEAR_VMXON_POINTER:        lambda: root().pointer("VMCLEAR", REGION),
    ev.VMLAUNCH_NON_CLEAR:           lambda: launched().execute("VMLAUNCH"),
    ev.VMRESUME_NON_LAUNCHED:        lambda: root().execute("VMRESUME"),
    ev.VMRESUME_AFTER_VMXOFF:        after_vmxoff,
    ev.ENTRY_INVALID_CONTROLS:       lambda: entry(PIN_CONTROLS=1),
    ev.ENTRY_INVALID_HOST_STATE:     lambda: entry(HOST_TR_SELECTOR=0),
    ev.VMPTRLD_INVALID_ADDRESS:      lambda: root().pointer("VMPTRLD", VMCS | 8),
    ev.VMPTRLD_VMXON_POINTER:        lambda: root().pointer("VMPTRLD", REGION),
    ev.VMPTRLD_WRONG_REVISION:       wrong_revision,
    ev.UNSUPPORTED_COMPONENT:        lambda: root().execute("VMREAD", rcx=0x7FFE),
    ev.READ_ONLY_COMPONENT:          read_only,
    ev.VMXON_IN_ROOT:                lambda: root().pointer("VMXON", OTHER),
    ev.ENTRY_BLOCKED_BY_MOV_SS:      blocked,
    ev.INVALID_INVALIDATION_OPERAND: lambda: root().descriptor("INVEPT", 9, 0),
}
# fmt: on


def test_every_error_has_a_cause_or_an_excuse_and_none_has_both() -> None:
    excused = {int(name.removeprefix("error ")) for name in WITHOUT_EFFECT if name.startswith("error ")}

    assert set(ev.INSTRUCTION_ERRORS) - set(CAUSES) == excused
    assert set(CAUSES) <= set(ev.INSTRUCTION_ERRORS)


@pytest.mark.parametrize("error", CAUSES, ids=ev.INSTRUCTION_ERRORS.get)
def test_what_the_manual_names_is_reported_with_its_number(error: int) -> None:
    assert CAUSES[error]() == error
