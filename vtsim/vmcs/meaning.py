"""What the value of a VMCS field says, in words: for reports that people read.

SDM: "Guest-State Area"; "Guest Non-Register State"; "VM-Execution Control Fields"; "Basic VM-Exit Information".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from vtsim.vmcs import events as ev
from vtsim.vmcs import instruction_information, qualification, reasons
from vtsim.vmcs.controls import CONTROLS, WORDS, ControlWord

Values = Mapping[str, int]
NO_POINTER: Final = (1 << 64) - 1

# fmt: off
CR0_BITS: Final     = {0: "PE", 1: "MP", 2: "EM", 3: "TS", 4: "ET", 5: "NE", 16: "WP", 18: "AM", 29: "NW", 30: "CD",
                       31: "PG"}
CR4_BITS: Final     = {0: "VME", 1: "PVI", 2: "TSD", 3: "DE", 4: "PSE", 5: "PAE", 6: "MCE", 7: "PGE", 8: "PCE",
                       9: "OSFXSR", 10: "OSXMMEXCPT", 11: "UMIP", 12: "LA57", 13: "VMXE", 14: "SMXE", 16: "FSGSBASE",
                       17: "PCIDE", 18: "OSXSAVE", 19: "KL", 20: "SMEP", 21: "SMAP", 22: "PKE", 23: "CET", 24: "PKS",
                       25: "UINTR", 27: "LASS", 28: "LAM_SUP", 32: "FRED"}
RFLAGS_BITS: Final  = {0: "CF", 2: "PF", 4: "AF", 6: "ZF", 7: "SF", 8: "TF", 9: "IF", 10: "DF", 11: "OF", 14: "NT",
                       16: "RF", 17: "VM", 18: "AC", 19: "VIF", 20: "VIP", 21: "ID"}
EFER_BITS: Final    = {0: "SCE", 8: "LME", 10: "LMA", 11: "NXE"}
DEBUGCTL_BITS: Final = {0: "LBR", 1: "BTF", 2: "BLD", 6: "TR", 7: "BTS", 8: "BTINT", 9: "BTS_OFF_OS", 10: "BTS_OFF_USR",
                       11: "FREEZE_LBRS_ON_PMI", 12: "FREEZE_PERFMON_ON_PMI", 14: "FREEZE_WHILE_SMM", 15: "RTM"}
DR7_BITS: Final     = {0: "L0", 1: "G0", 2: "L1", 3: "G1", 4: "L2", 5: "G2", 6: "L3", 7: "G3", 8: "LE", 9: "GE",
                       11: "RTM", 13: "GD"}
PENDING_BITS: Final = {0: "B0", 1: "B1", 2: "B2", 3: "B3", 11: "BLD", 12: "enabled breakpoint", 14: "BS", 16: "RTM"}
MEMORY_TYPES: Final = {0: "uncacheable", 1: "write-combining", 4: "write-through", 5: "write-protected",
                       6: "write-back"}
CODE_TYPES: Final   = ("execute-only", "execute-only", "execute/read", "execute/read", "execute-only conforming",
                       "execute-only conforming", "execute/read conforming", "execute/read conforming")
DATA_TYPES: Final   = ("read-only", "read-only", "read/write", "read/write", "read-only expand-down",
                       "read-only expand-down", "read/write expand-down", "read/write expand-down")
SYSTEM_TYPES: Final = {1: "available 16-bit TSS", 2: "LDT", 3: "busy 16-bit TSS", 9: "available TSS", 11: "busy TSS"}
UNUSABLE: Final     = 1 << 16
# fmt: on


def bits(names: Mapping[int, str], value: int, always: int = 0) -> str:
    """The names of the bits that are set but for those that always are, and the number that the nameless ones make."""
    value &= ~always
    words = [name for bit, name in sorted(names.items()) if value >> bit & 1]
    nameless = value & ~sum(1 << bit for bit in names)
    return " ".join(words + ([f"and 0x{nameless:x}"] if nameless else []))


def controls(word: ControlWord, value: int) -> str:
    """The names of the controls that are set, without the reserved bits that are 1 in every processor."""
    names = {control.bit: control.name for control in CONTROLS if control.word is word}
    return bits(names, value, word.default1 & ~sum(1 << bit for bit in names))


def access_rights(value: int) -> str:
    """A segment's access rights in words."""
    if value & UNUSABLE:
        return "unusable"
    kind = value & 0xF
    if not value & 0x10:
        what = SYSTEM_TYPES.get(kind, f"system type {kind}")
    elif kind & 8:
        what = f"code {CODE_TYPES[kind & 7]}"
    else:
        what = f"data {DATA_TYPES[kind & 7]}"
    words = [what, f"DPL {value >> 5 & 3}"]
    words += ["accessed"] if value & 0x10 and kind & 1 else []
    words += [] if value & 1 << 7 else ["not present"]
    words += ["64-bit"] if value & 1 << 13 else []
    words += ["32-bit"] if value & 1 << 14 else []
    words += ["4 KiB units"] if value & 1 << 15 else []
    return ", ".join(words)


def ept_pointer(value: int) -> str:
    """An EPTP in words."""
    words = [f"root 0x{value & ~0xFFF:x}", MEMORY_TYPES.get(value & 7, f"memory type {value & 7}")]
    words.append(f"{(value >> 3 & 7) + 1} levels")
    words += ["accessed and dirty flags"] if value & 1 << 6 else []
    words += ["supervisor shadow stack"] if value & 1 << 7 else []
    return ", ".join(words)


def exit_reason(value: int) -> str:
    """An exit reason in words."""
    number = value & reasons.BASIC_REASON
    known = reasons.BY_NUMBER.get(number)
    words = [f"basic reason {number}, which the manual leaves undefined"]
    if known:
        words = [known.name] if known.name == known.title else [known.name, known.title]
    words += ["VM-entry failure"] if value & reasons.ENTRY_FAILURE else []
    return ", ".join(words)


def _exit_qualification(value: int, values: Values) -> str:
    reason = values.get("EXIT_REASON", 0) & reasons.BASIC_REASON
    return qualification.describe(reason, value, values.get("EXIT_INTERRUPTION_INFORMATION", 0))


def _instruction_information(value: int, values: Values) -> str:
    parts = instruction_information.decode(values.get("EXIT_REASON", 0) & reasons.BASIC_REASON, value)
    return ", ".join(f"{name.lower().replace('_', ' ')} {part}" for name, part in parts.items())


def _exceptions(value: int) -> str:
    return bits({vector: name for vector, name in enumerate(ev.EXCEPTIONS) if name}, value)


def _interrupt_status(value: int) -> str:
    return f"requesting {value & 0xFF}, servicing {value >> 8}"


def _interruptibility(value: int) -> str:
    return ", ".join(words for mask, words in ev.INTERRUPTIBILITY.items() if value & mask)


def _alone(say: Callable[[int], str]) -> Callable[[int, Values], str]:
    return lambda value, _: say(value)


def _named(names: Mapping[int, str], always: int = 0) -> Callable[[int, Values], str]:
    return lambda value, _: bits(names, value, always)


# fmt: off
_SAYS: Final[Mapping[str, Callable[[int, Values], str]]] = {
    **{word.field: _alone(lambda value, word=word: controls(word, value)) for word in WORDS},  # type: ignore[misc]
    "EXIT_REASON":                    _alone(exit_reason),
    "EXIT_QUALIFICATION":             _exit_qualification,
    "EXIT_INSTRUCTION_INFORMATION":   _instruction_information,
    "EXIT_INTERRUPTION_INFORMATION":  _alone(ev.describe_event),
    "IDT_VECTORING_INFORMATION":      _alone(ev.describe_event),
    "ENTRY_INTERRUPTION_INFORMATION": _alone(ev.describe_event),
    "VM_INSTRUCTION_ERROR":           _alone(lambda value: ev.INSTRUCTION_ERRORS.get(value, "")),
    "EPT_POINTER":                    _alone(ept_pointer),
    "EXCEPTION_BITMAP":               _alone(_exceptions),
    "VMCS_LINK_POINTER":              _alone(lambda value: "none" if value == NO_POINTER else "shadow VMCS"),
    "GUEST_ACTIVITY_STATE":           _alone(lambda value: ev.ACTIVITY_STATES.get(value, "reserved")),
    "GUEST_INTERRUPTIBILITY_STATE":   _alone(_interruptibility),
    "GUEST_PENDING_DEBUG_EXCEPTIONS": _named(PENDING_BITS),
    "GUEST_INTERRUPT_STATUS":         _alone(_interrupt_status),
    "GUEST_RFLAGS":                   _named(RFLAGS_BITS, 1 << 1),
    "GUEST_DR7":                      _named(DR7_BITS, 1 << 10),
    "GUEST_IA32_DEBUGCTL":            _named(DEBUGCTL_BITS),
    **{name: _named(CR0_BITS) for name in ("GUEST_CR0", "HOST_CR0", "CR0_GUEST_HOST_MASK", "CR0_READ_SHADOW")},
    **{name: _named(CR4_BITS) for name in ("GUEST_CR4", "HOST_CR4", "CR4_GUEST_HOST_MASK", "CR4_READ_SHADOW")},
    **{name: _named(EFER_BITS) for name in ("GUEST_IA32_EFER", "HOST_IA32_EFER")},
}
# fmt: on


def meaning(name: str, values: Values) -> str:
    """What a field says, in words; empty where the number says all there is. `values` has the other fields."""
    value = values[name]
    if name.endswith("_ACCESS_RIGHTS"):
        return access_rights(value)
    return _SAYS[name](value, values) if name in _SAYS else ""


# --- groups ---------------------------------------------------------------------------------------------------------

# fmt: off
_EXIT_CONTROL: Final  = ("EXIT_CONTROLS", "SECONDARY_EXIT_CONTROLS", "EXIT_MSR_STORE_COUNT", "EXIT_MSR_STORE_ADDRESS",
                         "EXIT_MSR_LOAD_COUNT", "EXIT_MSR_LOAD_ADDRESS")
_ENTRY_CONTROL: Final = ("ENTRY_CONTROLS", "ENTRY_MSR_LOAD_COUNT", "ENTRY_MSR_LOAD_ADDRESS",
                         "ENTRY_INTERRUPTION_INFORMATION", "ENTRY_EXCEPTION_ERROR_CODE", "ENTRY_INSTRUCTION_LENGTH",
                         "INJECTED_EVENT_DATA")
# fmt: on
SEGMENTS: Final = ("CS", "SS", "DS", "ES", "FS", "GS", "LDTR", "TR")
SEGMENT_PARTS: Final = ("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS")


def groups(fields: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """The fields of a VMCS in the groups of the manual; `fields` gives the name of the area of each."""
    apart = {*_EXIT_CONTROL, *_ENTRY_CONTROL}
    yield "Guest-state area", [name for name, area in fields.items() if area == "GUEST"]
    yield "Host-state area", [name for name, area in fields.items() if area == "HOST"]
    control = [name for name, area in fields.items() if area == "CONTROL" and name not in apart]
    yield "VM-execution control fields", control
    yield "VM-exit control fields", [name for name in _EXIT_CONTROL if name in fields]
    yield "VM-entry control fields", [name for name in _ENTRY_CONTROL if name in fields]
    yield "VM-exit information fields", [name for name, area in fields.items() if area == "EXIT_INFO"]
