"""Every fault reason of the specification: its code, the conditions that lead to it, and whether FPD silences it.

A reason that is not qualified is recorded whatever the entries on the way say. `answer` is what a translation request
(ATS) gets instead of a translation: an unsupported request, a completer abort, or a success without rights, which is
not a fault at all.

VT-d: "Fault Conditions and Remapping Hardware Behavior for Various Requests"; "Interrupt Remapping Fault Conditions".
"""

from __future__ import annotations

from typing import Final

import attrs

# fmt: off
# --- codes that kernels name ---------------------------------------------------------------------------------------
ROOT_NOT_PRESENT: Final = 0x01
CONTEXT_NOT_PRESENT: Final = 0x02
CONTEXT_INVALID: Final = 0x03
BEYOND_MGAW: Final = 0x04
NO_WRITE: Final = 0x05
NO_READ: Final = 0x06
SECOND_LEVEL_ACCESS: Final = 0x07
ROOT_ACCESS: Final = 0x08
CONTEXT_ACCESS: Final = 0x09
ROOT_RESERVED: Final = 0x0A
CONTEXT_RESERVED: Final = 0x0B
SECOND_LEVEL_RESERVED: Final = 0x0C
TYPE_BLOCKED: Final = 0x0D
INTERRUPT_ADDRESS: Final = 0x0E
INTERRUPT_RESERVED: Final = 0x20
INTERRUPT_INDEX: Final = 0x21
IRTE_NOT_PRESENT: Final = 0x22
IRTE_ACCESS: Final = 0x23
IRTE_RESERVED: Final = 0x24
COMPATIBILITY_BLOCKED: Final = 0x25
INTERRUPT_SOURCE: Final = 0x26
DESCRIPTOR_ACCESS: Final = 0x27
DESCRIPTOR_RESERVED: Final = 0x28
INTERRUPT_PASID: Final = 0x29
INVALID_ROOT_TABLE: Final = 0x30
LEGACY_PASID: Final = 0x31
LEGACY_PAGE_REQUEST: Final = 0x32
ABORT_MODE: Final = 0x33
SCALABLE_ROOT_ACCESS: Final = 0x38
SCALABLE_ROOT_NOT_PRESENT: Final = 0x39
SCALABLE_ROOT_RESERVED: Final = 0x3A
SCALABLE_CONTEXT_ACCESS: Final = 0x40
SCALABLE_CONTEXT_NOT_PRESENT: Final = 0x41
SCALABLE_CONTEXT_RESERVED: Final = 0x42
SCALABLE_CONTEXT_INVALID: Final = 0x43
DEVICE_TLB_DISABLED: Final = 0x44
PASID_DISABLED: Final = 0x45
PASID_BEYOND_DIRECTORY: Final = 0x46
PAGE_REQUEST_DISABLED: Final = 0x47
RID_PASID_BEYOND_DIRECTORY: Final = 0x48
DIRECTORY_ACCESS: Final = 0x50
DIRECTORY_NOT_PRESENT: Final = 0x51
DIRECTORY_RESERVED: Final = 0x52
PASID_ACCESS: Final = 0x58
PASID_NOT_PRESENT: Final = 0x59
PASID_RESERVED: Final = 0x5A
PASID_INVALID: Final = 0x5B
EXECUTE_DISABLED: Final = 0x5C
SUPERVISOR_DISABLED: Final = 0x5D
FIRST_LEVEL_ACCESS: Final = 0x70
FIRST_LEVEL_NOT_PRESENT: Final = 0x71
FIRST_LEVEL_RESERVED: Final = 0x72
FIRST_LEVEL_TOP_ACCESS: Final = 0x73
FIRST_LEVEL_BEYOND: Final = 0x74
NESTED_NO_READ_TOP: Final = 0x75
NESTED_NO_READ: Final = 0x76
NESTED_NO_WRITE: Final = 0x77
SCALABLE_SECOND_ACCESS: Final = 0x78
SCALABLE_SECOND_NOT_PRESENT: Final = 0x79
SCALABLE_SECOND_RESERVED: Final = 0x7A
SCALABLE_SECOND_TOP_ACCESS: Final = 0x7B
SECOND_FLAGS_NOT_SNOOPED: Final = 0x7C
SECOND_FLAGS_FAILED: Final = 0x7D
NOT_CANONICAL: Final = 0x80
SUPERVISOR_PAGE: Final = 0x81
NO_EXECUTE: Final = 0x82
SCALABLE_BEYOND_MGAW: Final = 0x83
NESTED_BEYOND: Final = 0x84
SCALABLE_NO_WRITE: Final = 0x85
SCALABLE_NO_READ: Final = 0x86
SCALABLE_INTERRUPT_ADDRESS: Final = 0x87
FIRST_FLAGS_NOT_SNOOPED: Final = 0x90
FIRST_FLAGS_FAILED: Final = 0x91
# fmt: on

UR, CA, SUCCESS = "unsupported request", "completer abort", "success without rights"


@attrs.frozen
class Fault:
    """A fault reason: code, condition as the specification names it, qualified, answer to ATS, meaning."""

    code: int
    condition: str
    name: str
    qualified: bool
    answer: str
    title: str


# fmt: off
FAULTS: Final[tuple[Fault, ...]] = tuple(Fault(*row) for row in (
    # legacy mode
    (0x01, "LRT.2", "ROOT_NOT_PRESENT",             False, UR,      "the root entry is not present"),
    (0x02, "LCT.2", "CONTEXT_NOT_PRESENT",          True,  UR,      "the context entry is not present"),
    (0x03, "LCT.4", "CONTEXT_INVALID",              True,  CA,      "the context entry is programmed in a way that is not valid"),
    (0x04, "LGN.1", "BEYOND_MGAW",                  True,  SUCCESS, "the address is beyond the guest address width"),
    (0x05, "LGN.2", "NO_WRITE",                     True,  SUCCESS, "no write permission"),
    (0x06, "LGN.3", "NO_READ",                      True,  SUCCESS, "no read permission"),
    (0x07, "LSL.1", "SECOND_LEVEL_ACCESS",          True,  CA,      "error reading a second-level paging entry"),
    (0x08, "LRT.1", "ROOT_ACCESS",                  False, CA,      "error reading the root entry"),
    (0x09, "LCT.1", "CONTEXT_ACCESS",               False, CA,      "error reading the context entry"),
    (0x0A, "LRT.3", "ROOT_RESERVED",                False, CA,      "reserved bits are set in the root entry"),
    (0x0B, "LCT.3", "CONTEXT_RESERVED",             True,  CA,      "reserved bits are set in the context entry"),
    (0x0C, "LSL.2", "SECOND_LEVEL_RESERVED",        True,  CA,      "reserved bits are set in a second-level paging entry"),
    (0x0D, "LCT.5", "TYPE_BLOCKED",                 True,  UR,      "the translation type of the context entry blocks this request"),
    (0x0E, "LGN.4", "INTERRUPT_ADDRESS",            True,  SUCCESS, "the address leads to the interrupt address range"),
    # interrupt remapping: IR.n are names of this project, not transcribed ones
    (0x20, "IR.1",  "INTERRUPT_RESERVED",           False, "",      "reserved bits are set in the interrupt request"),
    (0x21, "IR.2",  "INTERRUPT_INDEX",              False, "",      "the interrupt index is beyond the interrupt remapping table"),
    (0x22, "IR.3",  "IRTE_NOT_PRESENT",             True,  "",      "the interrupt remapping table entry is not present"),
    (0x23, "IR.4",  "IRTE_ACCESS",                  False, "",      "error reading the interrupt remapping table entry"),
    (0x24, "IR.5",  "IRTE_RESERVED",                True,  "",      "reserved bits are set in the interrupt remapping table entry"),
    (0x25, "IR.6",  "COMPATIBILITY_BLOCKED",        False, "",      "an interrupt request in compatibility format is blocked"),
    (0x26, "IR.7",  "INTERRUPT_SOURCE",             True,  "",      "the interrupt request failed source-id verification"),
    (0x27, "IR.8",  "DESCRIPTOR_ACCESS",            True,  "",      "error reading the posted-interrupt descriptor"),
    (0x28, "IR.9",  "DESCRIPTOR_RESERVED",          True,  "",      "reserved bits are set in the posted-interrupt descriptor"),
    (0x29, "IR.10","INTERRUPT_PASID",              False, "",      "an interrupt request is not valid with a PASID"),
    # root table address register
    (0x30, "RTA.1", "INVALID_ROOT_TABLE",           False, CA,      "the root table address register is programmed in a way that is not valid"),
    (0x31, "RTA.2", "LEGACY_PASID",                 False, UR,      "a request with PASID in legacy mode"),
    (0x32, "RTA.3", "LEGACY_PAGE_REQUEST",          False, UR,      "a page request in legacy mode"),
    (0x33, "RTA.4", "ABORT_MODE",                   False, UR,      "the remapping unit is in abort-DMA mode"),
    # scalable mode
    (0x38, "SRT.1", "SCALABLE_ROOT_ACCESS",         False, CA,      "error reading the scalable-mode root entry"),
    (0x39, "SRT.2", "SCALABLE_ROOT_NOT_PRESENT",    False, UR,      "the half of the scalable-mode root entry is not present"),
    (0x3A, "SRT.3", "SCALABLE_ROOT_RESERVED",       False, CA,      "reserved bits are set in the scalable-mode root entry"),
    (0x40, "SCT.1", "SCALABLE_CONTEXT_ACCESS",      False, CA,      "error reading the scalable-mode context entry"),
    (0x41, "SCT.2", "SCALABLE_CONTEXT_NOT_PRESENT", True,  UR,      "the scalable-mode context entry is not present"),
    (0x42, "SCT.3", "SCALABLE_CONTEXT_RESERVED",    True,  CA,      "reserved bits are set in the scalable-mode context entry"),
    (0x43, "SCT.4", "SCALABLE_CONTEXT_INVALID",     True,  CA,      "the scalable-mode context entry is programmed in a way that is not valid"),
    (0x44, "SCT.5", "DEVICE_TLB_DISABLED",          True,  UR,      "translation and translated requests are not enabled by the context entry"),
    (0x45, "SCT.6", "PASID_DISABLED",               True,  UR,      "requests with PASID are not enabled by the context entry"),
    (0x46, "SCT.7", "PASID_BEYOND_DIRECTORY",       True,  UR,      "the PASID is beyond the PASID directory"),
    (0x47, "SCT.8", "PAGE_REQUEST_DISABLED",        True,  UR,      "page requests are not enabled by the context entry"),
    (0x48, "SCT.9", "RID_PASID_BEYOND_DIRECTORY",   True,  UR,      "RID_PASID of the context entry is beyond the PASID directory"),
    (0x50, "SPD.1", "DIRECTORY_ACCESS",             True,  CA,      "error reading the PASID directory entry"),
    (0x51, "SPD.2", "DIRECTORY_NOT_PRESENT",        True,  UR,      "the PASID directory entry is not present"),
    (0x52, "SPD.3", "DIRECTORY_RESERVED",           True,  CA,      "reserved bits are set in the PASID directory entry"),
    (0x58, "SPT.1", "PASID_ACCESS",                 True,  CA,      "error reading the PASID table entry"),
    (0x59, "SPT.2", "PASID_NOT_PRESENT",            True,  UR,      "the PASID table entry is not present"),
    (0x5A, "SPT.3", "PASID_RESERVED",               True,  CA,      "reserved bits are set in the PASID table entry"),
    (0x5B, "SPT.4", "PASID_INVALID",                True,  CA,      "the PASID table entry is programmed in a way that is not valid"),
    (0x5C, "SPT.5", "EXECUTE_DISABLED",             True,  UR,      "requests for execute permission are not enabled by the PASID table entry"),
    (0x5D, "SPT.6", "SUPERVISOR_DISABLED",          True,  UR,      "requests with supervisor privilege are not enabled by the PASID table entry"),
    (0x70, "SFS.1", "FIRST_LEVEL_ACCESS",           True,  CA,      "error reading a first-level paging entry"),
    (0x71, "SFS.2", "FIRST_LEVEL_NOT_PRESENT",      True,  SUCCESS, "a first-level paging entry is not present"),
    (0x72, "SFS.3", "FIRST_LEVEL_RESERVED",         True,  CA,      "reserved bits are set in a first-level paging entry"),
    (0x73, "SFS.4", "FIRST_LEVEL_TOP_ACCESS",       True,  CA,      "error reading the top first-level paging entry"),
    (0x74, "SFS.5", "FIRST_LEVEL_BEYOND",           True,  CA,      "a first-level table is beyond the guest address width of nested translation"),
    (0x75, "SFS.6", "NESTED_NO_READ_TOP",           True,  SUCCESS, "no second-level read permission to the top first-level table"),
    (0x76, "SFS.7", "NESTED_NO_READ",               True,  SUCCESS, "no second-level read permission to a first-level table"),
    (0x77, "SFS.8", "NESTED_NO_WRITE",              True,  SUCCESS, "no second-level write permission to update first-level flags"),
    (0x78, "SSS.1", "SCALABLE_SECOND_ACCESS",       True,  CA,      "error reading a second-level paging entry"),
    (0x79, "SSS.2", "SCALABLE_SECOND_NOT_PRESENT",  True,  SUCCESS, "a second-level paging entry permits nothing"),
    (0x7A, "SSS.3", "SCALABLE_SECOND_RESERVED",     True,  CA,      "reserved bits are set in a second-level paging entry"),
    (0x7B, "SSS.4", "SCALABLE_SECOND_TOP_ACCESS",   True,  CA,      "error reading the top second-level paging entry"),
    (0x7C, "SSS.5", "SECOND_FLAGS_NOT_SNOOPED",     True,  CA,      "second-level flags need an update while page walks do not snoop"),
    (0x7D, "SSS.6", "SECOND_FLAGS_FAILED",          True,  CA,      "the update of second-level flags failed"),
    (0x80, "SGN.1", "NOT_CANONICAL",                True,  SUCCESS, "the address is not canonical"),
    (0x81, "SGN.2", "SUPERVISOR_PAGE",              True,  SUCCESS, "a request with user privilege to a supervisor page"),
    (0x82, "SGN.3", "NO_EXECUTE",                   True,  SUCCESS, "no execute permission"),
    (0x83, "SGN.4", "SCALABLE_BEYOND_MGAW",         True,  SUCCESS, "the address is beyond what the remapping unit translates"),
    (0x84, "SGN.5", "NESTED_BEYOND",                True,  SUCCESS, "the first-level output is beyond the guest address width of nested translation"),
    (0x85, "SGN.6", "SCALABLE_NO_WRITE",            True,  SUCCESS, "no write permission"),
    (0x86, "SGN.7", "SCALABLE_NO_READ",             True,  SUCCESS, "no read permission"),
    (0x87, "SGN.8", "SCALABLE_INTERRUPT_ADDRESS",   True,  SUCCESS, "the address leads to the interrupt address range"),
    (0x90, "SFS.9", "FIRST_FLAGS_NOT_SNOOPED",      True,  CA,      "first-level flags need an update while page walks do not snoop"),
    (0x91, "SFS.10", "FIRST_FLAGS_FAILED",          True,  CA,      "the update of first-level flags failed"),
))
# fmt: on
BY_NAME: Final = {each.name: each for each in FAULTS}
BY_CODE: Final = {each.code: each for each in FAULTS}

# How a fault reason is answered, as numbers for kernels.
ANSWER_UR, ANSWER_CA, ANSWER_SUCCESS = range(3)


def _masks(chosen: set[int]) -> tuple[int, int, int]:
    """Codes as bits of three words of 63."""
    words = [0, 0, 0]
    for code in chosen:
        words[code // 63] |= 1 << code % 63
    return words[0], words[1], words[2]


QUALIFIED: Final = _masks({each.code for each in FAULTS if each.qualified})
ABORTED: Final = _masks({each.code for each in FAULTS if each.answer == CA})
WITHOUT_RIGHTS: Final = _masks({each.code for each in FAULTS if each.answer == SUCCESS})


def title(code: int) -> str:
    """What a fault reason says, or that it is none."""
    return BY_CODE[code].title if code in BY_CODE else "no fault"
