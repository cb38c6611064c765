"""Small numbered lists around VMX transitions: instruction errors, events, activity, interruptibility.

SDM: "VM-Instruction Error Numbers"; "VM-Entry Controls for Event Injection".
SDM: "Information for VM Exits Due to Vectored Events"; "Guest Non-Register State".
"""

from __future__ import annotations

from typing import Final

# fmt: off
INSTRUCTION_ERRORS: Final[dict[int, str]] = {
     1: "VMCALL executed in VMX root operation",
     2: "VMCLEAR with invalid physical address",
     3: "VMCLEAR with VMXON pointer",
     4: "VMLAUNCH with non-clear VMCS",
     5: "VMRESUME with non-launched VMCS",
     6: "VMRESUME after VMXOFF",
     7: "VM entry with invalid control field(s)",
     8: "VM entry with invalid host-state field(s)",
     9: "VMPTRLD with invalid physical address",
    10: "VMPTRLD with VMXON pointer",
    11: "VMPTRLD with incorrect VMCS revision identifier",
    12: "VMREAD/VMWRITE from/to unsupported VMCS component",
    13: "VMWRITE to read-only VMCS component",
    15: "VMXON executed in VMX root operation",
    16: "VM entry with invalid executive-VMCS pointer",
    17: "VM entry with non-launched executive VMCS",
    18: "VM entry with executive-VMCS pointer not VMXON pointer",
    19: "VMCALL with non-clear VMCS",
    20: "VMCALL with invalid VM-exit control fields",
    22: "VMCALL with incorrect MSEG revision identifier",
    23: "VMXOFF under dual-monitor treatment of SMIs and SMM",
    24: "VMCALL with invalid SMM-monitor features",
    25: "VM entry with invalid VM-execution control fields in executive VMCS",
    26: "VM entry with events blocked by MOV SS",
    28: "Invalid operand to INVEPT/INVVPID",
}
# fmt: on

VMCALL_IN_ROOT: Final = 1
VMCLEAR_INVALID_ADDRESS: Final = 2
VMCLEAR_VMXON_POINTER: Final = 3
VMLAUNCH_NON_CLEAR: Final = 4
VMRESUME_NON_LAUNCHED: Final = 5
VMRESUME_AFTER_VMXOFF: Final = 6
ENTRY_INVALID_CONTROLS: Final = 7
ENTRY_INVALID_HOST_STATE: Final = 8
VMPTRLD_INVALID_ADDRESS: Final = 9
VMPTRLD_VMXON_POINTER: Final = 10
VMPTRLD_WRONG_REVISION: Final = 11
UNSUPPORTED_COMPONENT: Final = 12
READ_ONLY_COMPONENT: Final = 13
VMXON_IN_ROOT: Final = 15
ENTRY_INVALID_EXECUTIVE_POINTER: Final = 16
ENTRY_NON_LAUNCHED_EXECUTIVE: Final = 17
ENTRY_EXECUTIVE_NOT_VMXON: Final = 18
VMCALL_NON_CLEAR: Final = 19
VMCALL_INVALID_EXIT_CONTROLS: Final = 20
VMCALL_WRONG_MSEG_REVISION: Final = 22
VMXOFF_UNDER_DUAL_MONITOR: Final = 23
VMCALL_INVALID_SMM_FEATURES: Final = 24
ENTRY_INVALID_EXECUTIVE_CONTROLS: Final = 25
ENTRY_BLOCKED_BY_MOV_SS: Final = 26
INVALID_INVALIDATION_OPERAND: Final = 28

# interruption information: vector 7:0, type 10:8, then single bits
VECTOR: Final = 0xFF
TYPE_SHIFT: Final = 8
TYPE: Final = 7 << TYPE_SHIFT
DELIVER_ERROR_CODE: Final = 1 << 11
NMI_UNBLOCKING_BY_IRET: Final = 1 << 12
NESTED_EXCEPTION: Final = 1 << 13
VALID: Final = 1 << 31

# event types; 7 means a pending MTF exit on injection and, with FRED, an instruction's event otherwise
EXTERNAL: Final = 0
NMI: Final = 2
HARDWARE_EXCEPTION: Final = 3
SOFTWARE_INTERRUPT: Final = 4
PRIVILEGED_SOFTWARE_EXCEPTION: Final = 5
SOFTWARE_EXCEPTION: Final = 6
OTHER_EVENT: Final = 7

EVENT_TYPES: Final[dict[int, str]] = {
    EXTERNAL: "external interrupt",
    NMI: "non-maskable interrupt",
    HARDWARE_EXCEPTION: "hardware exception",
    SOFTWARE_INTERRUPT: "software interrupt",
    PRIVILEGED_SOFTWARE_EXCEPTION: "privileged software exception",
    SOFTWARE_EXCEPTION: "software exception",
    OTHER_EVENT: "other event",
}

# guest activity state
ACTIVE: Final = 0
HLT_STATE: Final = 1
SHUTDOWN: Final = 2
WAIT_FOR_SIPI: Final = 3

ACTIVITY_STATES: Final[dict[int, str]] = {
    ACTIVE: "active",
    HLT_STATE: "HLT",
    SHUTDOWN: "shutdown",
    WAIT_FOR_SIPI: "wait-for-SIPI",
}

# guest interruptibility state
BLOCKING_BY_STI: Final = 1 << 0
BLOCKING_BY_MOV_SS: Final = 1 << 1
BLOCKING_BY_SMI: Final = 1 << 2
BLOCKING_BY_NMI: Final = 1 << 3
ENCLAVE_INTERRUPTION: Final = 1 << 4

INTERRUPTIBILITY: Final[dict[int, str]] = {
    BLOCKING_BY_STI: "blocking by STI",
    BLOCKING_BY_MOV_SS: "blocking by MOV SS",
    BLOCKING_BY_SMI: "blocking by SMI",
    BLOCKING_BY_NMI: "blocking by NMI",
    ENCLAVE_INTERRUPTION: "enclave interruption",
}

# exit qualification of a VM entry that failed on guest state, where it is not 0
ENTRY_FAILURE_PDPTE: Final = 2
ENTRY_FAILURE_NMI_INJECTION: Final = 3
ENTRY_FAILURE_LINK_POINTER: Final = 4

EXCEPTIONS: Final[tuple[str, ...]] = (
    *("#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "", "#TS", "#NP", "#SS", "#GP", "#PF"),
    *("", "#MF", "#AC", "#MC", "#XM", "#VE", "#CP"),
)
"""The mnemonic of each exception vector, empty where the vector is reserved."""


def describe_event(information: int) -> str:
    """Say what an interruption-information value holds, for traces."""
    if not information & VALID:
        return "none"
    vector, kind = information & VECTOR, (information & TYPE) >> TYPE_SHIFT
    words = [EVENT_TYPES.get(kind, f"type {kind}")]
    if kind in (HARDWARE_EXCEPTION, PRIVILEGED_SOFTWARE_EXCEPTION, SOFTWARE_EXCEPTION):
        name = EXCEPTIONS[vector] if vector < len(EXCEPTIONS) else ""
        words.append(name or f"vector {vector}")
    elif kind != NMI:
        words.append(f"vector {vector}")
    if information & DELIVER_ERROR_CODE:
        words.append("with error code")
    return " ".join(words)
