"""Exit qualifications: built from what the guest did, and read back as a phrase for traces.

Builders are arithmetic on integers, so that kernels can call them once they are compiled.

SDM: "Basic VM-Exit Information"; "EPT Violations".
Not modelled: the asynchronous-access bit of APIC accesses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vtsim.vmcs import events, reasons

REGISTERS: Final = (
    *("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"),
    *("R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15"),
)

# access types of CR accesses
MOV_TO_CR: Final = 0
MOV_FROM_CR: Final = 1
CLTS: Final = 2
LMSW: Final = 3

# sources of task switches
TASK_BY_CALL: Final = 0
TASK_BY_IRET: Final = 1
TASK_BY_JMP: Final = 2
TASK_BY_GATE: Final = 3

# access types of APIC accesses
APIC_LINEAR_READ: Final = 0
APIC_LINEAR_WRITE: Final = 1
APIC_LINEAR_FETCH: Final = 2
APIC_LINEAR_DELIVERY: Final = 3
APIC_LINEAR_MONITORING: Final = 4
APIC_PHYSICAL_DELIVERY: Final = 10
APIC_PHYSICAL_MONITORING: Final = 11
APIC_PHYSICAL_INSTRUCTION: Final = 15

# EPT violations: what was tried (2:0), what the entries allowed (6:3), what the address was
EPT_READ: Final = 1 << 0
EPT_WRITE: Final = 1 << 1
EPT_FETCH: Final = 1 << 2
EPT_ALLOWED_SHIFT: Final = 3
EPT_ALLOWED: Final = 7 << EPT_ALLOWED_SHIFT
EPT_ALLOWED_USER_FETCH: Final = 1 << 6
EPT_LINEAR_VALID: Final = 1 << 7
EPT_LINEAR_FINAL: Final = 1 << 8
EPT_USER_ADDRESS: Final = 1 << 9
EPT_WRITABLE_ADDRESS: Final = 1 << 10
EPT_NO_EXECUTE_ADDRESS: Final = 1 << 11
NMI_UNBLOCKING: Final = 1 << 12


def cr_access(register: int, kind: int, gpr: int) -> int:
    """Qualify a MOV to or from a control register, or CLTS."""
    return register | kind << 4 | gpr << 8


def lmsw(source: int, in_memory: int) -> int:
    """Qualify LMSW, whose source data are part of the qualification."""
    return LMSW << 4 | in_memory << 6 | source << 16


def mov_dr(register: int, from_dr: int, gpr: int) -> int:
    """Qualify a MOV to or from a debug register."""
    return register | from_dr << 4 | gpr << 8


def io_instruction(port: int, size: int, is_in: int, string: int, rep: int, immediate: int) -> int:
    """Qualify an I/O instruction that moves `size` bytes, for a string instruction once per iteration."""
    return size - 1 | is_in << 3 | string << 4 | rep << 5 | immediate << 6 | port << 16


def ept_violation(tried: int, allowed: int, linear_valid: int, final: int) -> int:
    """Qualify an EPT violation.

    `tried` is of EPT_READ, EPT_WRITE and EPT_FETCH, `allowed` is the AND of bits 2:0 of the EPT entries used,
    `final` is 0 if the access was to a guest paging-structure entry.
    """
    return tried | allowed << EPT_ALLOWED_SHIFT | linear_valid << 7 | (final & linear_valid) << 8


def ept_linear_address(user: int, writable: int, no_execute: int) -> int:
    """Qualify further, on processors that report it, what the guest's paging says of the linear address."""
    return user << 9 | writable << 10 | no_execute << 11


def apic_access(offset: int, kind: int) -> int:
    """Qualify an access to the APIC-access page."""
    return offset | kind << 12


def task_switch(selector: int, source: int) -> int:
    """Qualify a task switch to the TSS of a selector."""
    return selector | source << 30


def _cr_access(qualification: int) -> str:
    register, kind = f"CR{qualification & 0xF}", qualification >> 4 & 3
    gpr = REGISTERS[qualification >> 8 & 0xF]
    if kind == LMSW:
        where = " from memory" if qualification >> 6 & 1 else ""
        return f"LMSW 0x{qualification >> 16 & 0xFFFF:x}{where}"
    return (f"{register} <- {gpr}", f"{gpr} <- {register}", "CLTS")[kind]


def _dr_access(qualification: int) -> str:
    register, gpr = f"DR{qualification & 7}", REGISTERS[qualification >> 8 & 0xF]
    return f"{gpr} <- {register}" if qualification >> 4 & 1 else f"{register} <- {gpr}"


def _io(qualification: int) -> str:
    size = (qualification & 7) + 1
    words = [f"port 0x{qualification >> 16 & 0xFFFF:x}", "in" if qualification >> 3 & 1 else "out"]
    words.append(f"{size} byte" if size == 1 else f"{size} bytes")
    words += ["string"] if qualification >> 4 & 1 else []
    words += ["rep"] if qualification >> 5 & 1 else []
    return " ".join(words)


def _ept_violation(qualification: int) -> str:
    names = {EPT_READ: "read", EPT_WRITE: "write", EPT_FETCH: "fetch"}
    tried = "+".join(word for bit, word in names.items() if qualification & bit)
    target = "paging-structure"
    if qualification & EPT_LINEAR_FINAL or not qualification & EPT_LINEAR_VALID:
        target = "instruction" if qualification & EPT_FETCH else "data"
    allowed = (qualification & EPT_ALLOWED) >> EPT_ALLOWED_SHIFT
    if not allowed:
        return f"gpa {target} {tried}, not present"
    rights = "".join(letter if allowed >> bit & 1 else "-" for bit, letter in enumerate("rwx"))
    return f"gpa {target} {tried}, allowed {rights}"


_APIC_KINDS: Final[dict[int, str]] = {
    APIC_LINEAR_READ: "linear read",
    APIC_LINEAR_WRITE: "linear write",
    APIC_LINEAR_FETCH: "linear fetch",
    APIC_LINEAR_DELIVERY: "linear, event delivery",
    APIC_LINEAR_MONITORING: "linear, monitoring",
    APIC_PHYSICAL_DELIVERY: "physical, event delivery",
    APIC_PHYSICAL_MONITORING: "physical, monitoring",
    APIC_PHYSICAL_INSTRUCTION: "physical, instruction",
}


def _apic_access(qualification: int) -> str:
    kind = qualification >> 12 & 0xF
    words = _APIC_KINDS.get(kind, f"type {kind}")
    # the page offset is defined for linear accesses only
    return f"offset 0x{qualification & 0xFFF:x} {words}" if kind < APIC_PHYSICAL_DELIVERY else words


def _task_switch(qualification: int) -> str:
    source = ("CALL", "IRET", "JMP", "task gate")[qualification >> 30 & 3]
    return f"{source} to selector 0x{qualification & 0xFFFF:x}"


_ENTRY_FAILURES: Final[dict[int, str]] = {
    events.ENTRY_FAILURE_PDPTE: "PDPTE loading",
    events.ENTRY_FAILURE_NMI_INJECTION: "NMI injection while events are blocked",
    events.ENTRY_FAILURE_LINK_POINTER: "VMCS link pointer",
}

_DEBUG_BITS: Final[dict[int, str]] = {
    0: "B0", 1: "B1", 2: "B2", 3: "B3", 11: "bus lock", 13: "BD", 14: "BS", 16: "RTM",
}  # fmt: skip


def _exception(qualification: int, interruption: int) -> str:
    vector = interruption & events.VECTOR
    name = events.EXCEPTIONS[vector] if vector < len(events.EXCEPTIONS) else ""
    if name == "#DB":
        return "#DB " + " ".join(word for bit, word in _DEBUG_BITS.items() if qualification >> bit & 1)
    if name == "#PF":
        return f"#PF at 0x{qualification:x}"
    return name or f"vector {vector}"


_DESCRIBED: Final[dict[int, Callable[[int], str]]] = {
    reasons.TASK_SWITCH: _task_switch,
    reasons.INVLPG: "linear 0x{:x}".format,
    reasons.CR_ACCESS: _cr_access,
    reasons.DR_ACCESS: _dr_access,
    reasons.IO_INSTRUCTION: _io,
    reasons.INVALID_STATE: lambda q: _ENTRY_FAILURES.get(q, ""),
    reasons.MSR_LOAD_FAIL: "entry {}".format,
    reasons.MWAIT_INSTRUCTION: lambda q: "monitor armed" if q & 1 else "monitor not armed",
    reasons.APIC_ACCESS: _apic_access,
    reasons.EOI_INDUCED: "vector {}".format,
    reasons.EPT_VIOLATION: _ept_violation,
    reasons.APIC_WRITE: "offset 0x{:x}".format,
    reasons.NOTIFY: lambda q: "context invalid" if q & 1 else "",
}


def describe(reason: int, qualification: int, interruption: int = 0) -> str:
    """Say in a few words what an exit qualification says; nothing if it says nothing."""
    qualification &= (1 << 64) - 1
    if reason == reasons.EXCEPTION_NMI:
        return _exception(qualification, interruption) if interruption & events.VALID else ""
    if reason in _DESCRIBED:
        return _DESCRIBED[reason](qualification)
    return f"0x{qualification:x}" if qualification else ""
