"""Which parts of a recorded outcome the architecture defines, and whether the model agrees in them.

An expectation is a value and the mask of its defined bits; what it is compared with is found under a dotted path in
the model's outcome. Where the recording has no value, the value before the VM entry, or zero, is expected.

SDM: "Recording VM-Exit Information and Updating VM-entry Control Fields"; "Saving Guest State".
Not modelled: exit-qualification bits 11:9 of EPT violations, which only some processors report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from attrs import frozen

from vtsim.study.vmx.cases import ENTRY, NO_EXIT, ONLY_REASON, ROOT, Case, Environment, Recorded
from vtsim.study.vmx.drivers import Outcome
from vtsim.study.vmx.shapes import number
from vtsim.vmcs import events as ev
from vtsim.vmcs import instruction_information as ii
from vtsim.vmcs import qualification as q
from vtsim.vmcs import reasons as x

ALL: Final = (1 << 64) - 1
RECORDERS_TIMER: Final = 0xF0
"""The vector with which the recorder ended guests that ran away: nothing else of such an exit is reproducible."""

# fmt: off
# which exit reasons define a field; what is not listed is special below
QUALIFIED: Final = frozenset({
    x.TASK_SWITCH, x.INVLPG, x.VMCLEAR, x.VMPTRLD, x.VMPTRST, x.VMREAD, x.VMWRITE, x.VMON, x.CR_ACCESS, x.DR_ACCESS,
    x.IO_INSTRUCTION, x.MWAIT_INSTRUCTION, x.MONITOR_INSTRUCTION, x.APIC_ACCESS, x.EOI_INDUCED, x.GDTR_IDTR, x.LDTR_TR,
    x.EPT_VIOLATION, x.INVEPT, x.INVVPID, x.APIC_WRITE, x.INVPCID, x.XSAVES, x.XRSTORS, x.SIPI_SIGNAL,
})
BY_INSTRUCTION: Final = frozenset({
    x.CPUID, x.GETSEC, x.HLT, x.INVD, x.INVLPG, x.RDPMC, x.RDTSC, x.RSM, x.VMCALL, x.VMCLEAR, x.VMLAUNCH, x.VMPTRLD,
    x.VMPTRST, x.VMREAD, x.VMRESUME, x.VMWRITE, x.VMOFF, x.VMON, x.CR_ACCESS, x.DR_ACCESS, x.IO_INSTRUCTION, x.MSR_READ,
    x.MSR_WRITE, x.MWAIT_INSTRUCTION, x.MONITOR_INSTRUCTION, x.PAUSE_INSTRUCTION, x.GDTR_IDTR, x.LDTR_TR, x.INVEPT,
    x.RDTSCP, x.INVVPID, x.WBINVD, x.XSETBV, x.RDRAND, x.INVPCID, x.VMFUNC, x.ENCLS, x.RDSEED, x.XSAVES, x.XRSTORS,
    x.PCONFIG, x.UMWAIT, x.TPAUSE, x.LOADIWKEY, x.ENCLV, x.MSR_READ_IMM, x.MSR_WRITE_IMM,
})
SOFTWARE_EVENTS: Final     = frozenset({ev.SOFTWARE_INTERRUPT, ev.PRIVILEGED_SOFTWARE_EXCEPTION, ev.SOFTWARE_EXCEPTION})
SOFTWARE_EXCEPTIONS: Final = frozenset({ev.PRIVILEGED_SOFTWARE_EXCEPTION, ev.SOFTWARE_EXCEPTION})
DEBUG, PAGE_FAULT = 1, 14

# bits of exit qualifications
IO_IN, IO_STRING         = 1 << 3, 1 << 4
CR_KIND_SHIFT, CR_MEMORY = 4, 1 << 6
TASK_SOURCE_SHIFT        = 30
EPT_ALWAYS, EPT_LINEAR   = 0x7F | q.NMI_UNBLOCKING, q.EPT_LINEAR_VALID | q.EPT_LINEAR_FINAL

# segment fields that mean nothing while the segment is unusable, and the bits of its access rights that do
UNUSABLE: Final          = 1 << 16
STACK_DPL: Final         = 3 << 5
SEGMENTS: Final          = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR")
COUNTS_DOWN: Final       = "PREEMPTION_TIMER_VALUE"
DR6_DEFINED: Final       = 0xE00F
# fmt: on


@frozen
class Difference:
    """One part of an outcome in which the model does not do what was recorded."""

    path: str
    recorded: Any
    model: Any


Expected = Iterator[tuple[str, Any, int]]
"""Path, value, mask of defined bits; a mask of -1 is for what is compared as it is."""


def compare(case: Case, environment: Environment, got: Sequence[Outcome]) -> list[Difference]:
    """The differences of one case; `got` has the model's outcomes in the order of the recorded ones."""
    differences: list[Difference] = []
    for place, recorded in enumerate(case.expected[: len(got)] if case.kind == ENTRY else case.expected):
        where = f"outcomes.{place}." if case.kind == ROOT else f"more.{place - 1}." if place else ""
        model = got[place] if place < len(got) else {}
        if place == 0 and _allowed(case, model):
            continue
        for path, value, mask in _expected(case, environment, recorded, first=place == 0):
            found = _find(model, path, environment)
            if mask == -1 and found != value:
                differences.append(Difference(where + path, value, found))
            elif mask != -1 and (not isinstance(found, int) or (found ^ value) & mask):
                shown = hex(found) if isinstance(found, int) else found
                differences.append(Difference(where + path, hex(value), shown))
    return differences


def _allowed(case: Case, model: Outcome) -> bool:
    """Whether the model did the other thing that the manual leaves open."""
    other = case.raw.get("also_allowed")
    return other is not None and all(model.get(key) == other.get(key) for key in ("kind", "error", "reason"))


def _find(model: Outcome, path: str, environment: Environment) -> Any:
    """The model's value under a path; VMCS fields are found by their names of the field table."""
    area, _, name = path.partition(".")
    if not name:
        return model.get(area, None if area in ("kind", "op", "result", "data", "guest_stack") else 0)
    inner: Mapping[str, Any] = model.get(area, {})
    if area == "gpr":
        return inner.get(name, environment.gpr.get(name, 0))
    field = environment.image.field_name(name) or name
    return inner.get(field, environment.vmcs.get(field, 0))


def _expected(case: Case, environment: Environment, recorded: Recorded, *, first: bool) -> Expected:
    kind = recorded["kind"]
    if kind in ("exit", NO_EXIT) and case.kind == ENTRY:
        yield "kind", "exit", -1  # that the VM entry succeeded is all that an entry case says
        return
    yield "kind", kind, -1
    yield from _KINDS.get(kind, _nothing)(case, environment, recorded, first)


def _nothing(case: Case, environment: Environment, recorded: Recorded, first: bool) -> Expected:
    yield from ()


def _failed(case: Case, environment: Environment, recorded: Recorded, first: bool) -> Expected:
    yield "error", recorded["error"], ALL


def _entry_failure(case: Case, environment: Environment, recorded: Recorded, first: bool) -> Expected:
    yield "reason", recorded["reason"], ALL
    if "qualification" in recorded:
        yield "qualification", number(recorded["qualification"]), ALL


def _memory(case: Case, environment: Environment, recorded: Recorded, first: bool) -> Expected:
    yield "data", recorded["data"], -1


def _operation(case: Case, environment: Environment, recorded: Recorded, first: bool) -> Expected:
    """How a VMX instruction in root operation, or another operation of the recorder's host, ended."""
    for key in ("op", "result"):
        if key in recorded:
            yield key, recorded[key], -1
    for key in ("error", "vector", "error_code", "value", "cr0", "cr4"):
        if key in recorded:
            yield key, number(recorded[key]), ALL


# --- VM exits -------------------------------------------------------------------------------------------------------


def _exit(case: Case, environment: Environment, recorded: Recorded, first: bool) -> Expected:
    reason = recorded["reason"]
    event = number(recorded.get("interruption_info", 0))
    yield "reason", reason, ALL
    if ONLY_REASON in recorded or (reason == x.EXTERNAL_INTERRUPT and event & ev.VECTOR == RECORDERS_TIMER):
        return
    whole = ALL if event & ev.VECTOR == PAGE_FAULT else 0xFFFF
    yield from _event("interruption", event, number(recorded.get("interruption_error_code", 0)), whole)
    delivered = number(recorded.get("idt_vectoring_info", 0))
    yield from _event("idt_vectoring", delivered, number(recorded.get("idt_vectoring_error_code", 0)), ALL)
    qualification = number(recorded.get("qualification", 0)) if _is_qualified(reason, event) else 0
    yield "qualification", qualification, _qualification_mask(case, reason, qualification)
    if _has_length(reason, qualification, event, delivered):
        yield "instruction_length", number(recorded.get("instruction_length", 0)), ALL
    information = number(recorded.get("instruction_info", 0))
    mask = _information_mask(case, reason, qualification, information)
    if mask:
        yield "instruction_info", information, mask
    if _has_linear_address(reason, qualification):
        yield "guest_linear_address", number(recorded.get("guest_linear_address", 0)), ALL
    if reason in (x.EPT_VIOLATION, x.EPT_MISCONFIG):
        yield "guest_physical_address", number(recorded.get("guest_physical_address", 0)), ALL
    yield from _saved_state(environment, recorded, first)
    yield from _registers(case, environment, recorded, first)


def _event(what: str, information: int, error_code: int, mask: int) -> Expected:
    """Interruption information or IDT-vectoring information: without a valid event, only that there is none.

    SDM: "Information for VM Exits Due to Vectored Events"; "Information for VM Exits That Occur During Event Delivery".
    """
    yield f"{what}_info", information, ALL if information & ev.VALID else ev.VALID
    if information & ev.VALID and information & ev.DELIVER_ERROR_CODE:
        yield f"{what}_error_code", error_code, mask


def _kind(information: int) -> int:
    return (information & ev.TYPE) >> ev.TYPE_SHIFT


def _is_qualified(reason: int, event: int) -> bool:
    """Does the exit qualification mean anything? Elsewhere the processor clears it.

    SDM: "Exit Qualification".
    """
    if reason == x.EXCEPTION_NMI:
        hardware = _kind(event) in (ev.HARDWARE_EXCEPTION, ev.PRIVILEGED_SOFTWARE_EXCEPTION)
        return hardware and event & ev.VECTOR in (DEBUG, PAGE_FAULT)
    return reason in QUALIFIED


def _qualification_mask(case: Case, reason: int, qualification: int) -> int:
    """The defined bits of an exit qualification.

    SDM: "Exit Qualification for EPT Violations".
    """
    if reason != x.EPT_VIOLATION:
        return ALL
    mask = EPT_ALWAYS | (EPT_LINEAR if qualification & q.EPT_LINEAR_VALID else q.EPT_LINEAR_VALID)
    instruction = case.raw.get("insn") or {}
    if qualification & (q.EPT_READ | q.EPT_WRITE) == q.EPT_WRITE and instruction.get("asm", "").startswith("add"):
        mask &= ~q.EPT_READ  # a read-modify-write may report the read too
    return mask


def _has_length(reason: int, qualification: int, event: int, delivered: int) -> bool:
    """Is the VM-exit instruction length defined?

    SDM: "Information for VM Exits Due to Instruction Execution".
    """
    if delivered & ev.VALID and _kind(delivered) in SOFTWARE_EVENTS:
        return True
    if reason == x.EXCEPTION_NMI:
        return _kind(event) in SOFTWARE_EXCEPTIONS
    if delivered & ev.VALID:
        return False
    if reason == x.TASK_SWITCH:
        return qualification >> TASK_SOURCE_SHIFT != q.TASK_BY_GATE
    return reason in BY_INSTRUCTION


def _information_mask(case: Case, reason: int, qualification: int, information: int) -> int:
    """The defined bits of the VM-exit instruction information, from the layouts of its parts.

    SDM: "Information for VM Exits Due to Instruction Execution".
    """
    parts = set(ii.LAYOUTS.get(reason, ()))
    if reason == x.IO_INSTRUCTION:
        if not qualification & IO_STRING:
            return 0
        if qualification & IO_IN:
            parts.discard(ii.SEGMENT)
    in_memory = ii.BASE in parts
    if ii.IN_REGISTER in parts and information >> ii.IN_REGISTER.low & 1:
        parts -= set(ii.MEMORY_ONLY)
    elif in_memory:
        parts.discard(ii.REGISTER1)
        parts.add(ii.IN_REGISTER)  # where there is no choice, the bit is clear
        if information >> ii.NO_INDEX.low & 1:
            parts -= {ii.INDEX, ii.SCALE}
        if information >> ii.NO_BASE.low & 1:
            parts.discard(ii.BASE)
    if (case.raw.get("insn") or {}).get("bits") == 64:
        parts.discard(ii.OPERAND_SIZE1)
    return sum((1 << part.width) - 1 << part.low for part in parts)


def _has_linear_address(reason: int, qualification: int) -> bool:
    """Is the guest-linear address defined?

    SDM: "Basic VM-Exit Information".
    """
    if reason == x.EPT_VIOLATION:
        return bool(qualification & q.EPT_LINEAR_VALID)
    if reason == x.IO_INSTRUCTION:
        return bool(qualification & IO_STRING)
    return reason == x.CR_ACCESS and qualification >> CR_KIND_SHIFT & 3 == q.LMSW and bool(qualification & CR_MEMORY)


def _saved_state(environment: Environment, recorded: Recorded, first: bool) -> Expected:
    """The guest-state fields: those recorded have changed, and after the first VM entry all others have not."""
    names = {name: environment.image.field_name(name) or name for name in environment.image.fields}
    changed = {names.get(name, name): number(value) for name, value in recorded.get("vmcs", {}).items()}
    before = environment.vmcs if first else {}
    rights = {**before, **changed}
    for recorded_name, name in names.items():
        if name == COUNTS_DOWN or not (name in changed or (name in before and name.startswith("GUEST_"))):
            continue
        mask = _saved_mask(name, rights)
        if mask and (name in changed or name not in EXIT_INFORMATION):
            yield f"vmcs.{recorded_name}", changed.get(name, before.get(name, 0)), mask


EXIT_INFORMATION: Final = frozenset({"GUEST_PHYSICAL_ADDRESS", "GUEST_LINEAR_ADDRESS"})


def _saved_mask(name: str, rights: Mapping[str, int]) -> int:
    """The defined bits of a saved field: of a segment that is unusable, only that it is (and the DPL of SS).

    SDM: "Saving Guest State".
    """
    for segment in SEGMENTS:
        if name.startswith(f"GUEST_{segment}_") and rights.get(f"GUEST_{segment}_ACCESS_RIGHTS", 0) & UNUSABLE:
            if name.endswith("_ACCESS_RIGHTS"):
                return UNUSABLE | (STACK_DPL if segment == "SS" else 0)
            return ALL if name.endswith("_SELECTOR") else 0
    return ALL


def _registers(case: Case, environment: Environment, recorded: Recorded, first: bool) -> Expected:
    """General registers, CR2, DR6 and the guest's handler that was reached."""
    if "gpr" not in case.raw.get("nondeterministic", ()):
        changed = recorded.get("gpr", {})
        before = environment.gpr if first else {}
        for name in (*changed, *(name for name in before if name not in changed and name != "rsp")):
            yield f"gpr.{name}", number(changed.get(name, before.get(name, 0))), ALL
    if "cr2" in recorded:
        yield "cr2", number(recorded["cr2"]), ALL
    if "dr6" in recorded:
        yield "dr6", number(recorded["dr6"]), DR6_DEFINED
    if "guest_handler_vector" in recorded:
        yield "guest_handler_vector", recorded["guest_handler_vector"], ALL
    if "guest_stack" in recorded:
        yield "guest_stack", list(recorded["guest_stack"]), -1


_KINDS: Final = {
    "vmfail_valid": _failed,
    "entry_failure": _entry_failure,
    "exit": _exit,
    "mem": _memory,
    "op": _operation,
}
