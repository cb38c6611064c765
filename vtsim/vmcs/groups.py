"""Which checks a field decides: groups of checks that a write to it makes due again.

A VMCS remembers which groups held at its last VM entry (`V_CHECKED`). VMWRITE takes out the groups of the field that it
writes; what VM exit saves came from a legal guest and takes out none. Checks on an injected event, and those that
memory decides, are no group: they are made at every VM entry that they concern.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from vtsim.vmcs import checks as c
from vtsim.vmcs.fields import FIELDS, FIRST_SLOT, SLOT

# fmt: off
EXECUTION, EXITS, ENTRIES, HOST, REGISTERS, SEGMENTS, TABLES, FLOW, NON_REGISTER = (1 << n for n in range(9))
CONTROL_GROUPS: Final = 1 << 0 | 1 << 1 | 1 << 2
GUEST_GROUPS: Final = 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8
ALL_GROUPS: Final = CONTROL_GROUPS | 1 << 3 | GUEST_GROUPS

GROUP_OF_SECTION: Final[dict[str, int]] = {
    "VM-Execution Control Fields":                                   EXECUTION,
    "VM-Exit Control Fields":                                        EXITS,
    "VM-Entry Control Fields":                                       ENTRIES,
    "Checks on Host Control Registers, MSRs, and SSP":               HOST,
    "Checks on Host Segment and Descriptor-Table Registers":         HOST,
    "Checks Related to Address-Space Size":                          HOST,
    "Checks on Guest Control Registers, Debug Registers, and MSRs":  REGISTERS,
    "Checks on Guest Segment Registers":                             SEGMENTS,
    "Checks on Guest Descriptor-Table Registers":                    TABLES,
    "Checks on Guest RIP, RFLAGS, and SSP":                          FLOW,
    "Checks on Guest Non-Register State":                            NON_REGISTER,
}
# fields that say which checks of a group apply, beside those that a check is about
_DECIDERS: Final[dict[str, int]] = {
    "GUEST_RFLAGS": SEGMENTS,
    "GUEST_CR0": SEGMENTS,
    "SECONDARY_EXIT_CONTROLS": HOST,
}
# fmt: on
MADE_EVERY_TIME: Final = ("LINK_", "INJECTION_", "TPR_THRESHOLD_ABOVE")
OF_THE_EVENT: Final = ("ENTRY_INTERRUPTION_INFORMATION", "ENTRY_EXCEPTION_ERROR_CODE", "ENTRY_INSTRUCTION_LENGTH")


def _groups() -> npt.NDArray[np.int64]:
    groups = np.zeros(FIRST_SLOT + len(FIELDS), np.int64)
    for check in c.CHECKS:
        if not check.name.startswith(MADE_EVERY_TIME):
            for name in check.fields:
                groups[SLOT[name]] |= GROUP_OF_SECTION.get(check.section, 0)
    for name, group in _DECIDERS.items():
        groups[SLOT[name]] |= group
    for name in OF_THE_EVENT:
        groups[SLOT[name]] = 0
    return groups


GROUPS: Final = _groups()
"""The groups of checks that a write to each slot makes due."""
