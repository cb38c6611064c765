"""What the manual says about VMCS fields, and nothing that acts on them.

A field's slot is its place in the array that holds one VMCS: by area, then by width, then by the index of
the manual. Slot 0 is no field: there the region has its revision identifier and the VMX-abort indicator.

SDM: "Structure of VMCS Component Encoding"; "Field Encoding in VMCS"; "Format of the VMCS Region".
Not modelled: the fields of Intel TDX (shared EPT pointer, guest key identifier).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt


class Width(IntEnum):
    """How wide a field is; the value is what the encoding holds in bits 14:13."""

    W16 = 0
    W64 = 1
    W32 = 2
    NATURAL = 3


class Area(IntEnum):
    """Which part of the VMCS a field is in; the value is what the encoding holds in bits 11:10."""

    CONTROL = 0
    EXIT_INFO = 1
    GUEST = 2
    HOST = 3


_BITS: Final = {Width.W16: 16, Width.W64: 64, Width.W32: 32, Width.NATURAL: 64}


@attrs.frozen(kw_only=True)
class Field:
    """One VMCS field; `index` is the manual's index, not a byte offset.

    It exists where the processor supports any of the controls in `needs`; with none, it exists everywhere.
    """

    name: str
    area: Area
    width: Width
    index: int
    needs: tuple[str, ...] = ()

    @property
    def encoding(self) -> int:
        """The operand of VMREAD and VMWRITE that reaches the whole field."""
        return self.width << 13 | self.area << 10 | self.index << 1

    @property
    def high_encoding(self) -> int | None:
        """The operand that reaches the upper half; only 64-bit fields have one."""
        return self.encoding | 1 if self.width is Width.W64 else None

    @property
    def bits(self) -> int:
        """How many bits the field holds on a processor with Intel 64."""
        return _BITS[self.width]

    @property
    def read_only(self) -> bool:
        """Whether VMWRITE is refused unless the processor allows writes to exit information."""
        return self.area is Area.EXIT_INFO


def _run(area: Area, width: Width, *rows: tuple[int, str, str]) -> tuple[Field, ...]:
    return tuple(
        Field(name=name, area=area, width=width, index=index, needs=tuple(needs.split())) for index, name, needs in rows
    )


_SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")


def _per_segment(what: str, first: int) -> tuple[tuple[int, str, str], ...]:
    return tuple((first + index, f"GUEST_{segment}_{what}", "") for index, segment in enumerate(_SEGMENTS))


# fmt: off
_CONTROL = (
    *_run(Area.CONTROL, Width.W16,
        ( 0, "VPID",                                  "ENABLE_VPID"),
        ( 1, "POSTED_INTERRUPT_NOTIFICATION_VECTOR",  "PROCESS_POSTED_INTERRUPTS"),
        ( 2, "EPTP_INDEX",                            "EPT_VIOLATION_VE"),
        ( 3, "HLAT_PREFIX_SIZE",                      "ENABLE_HLAT"),
        ( 4, "LAST_PID_POINTER_INDEX",                "IPI_VIRTUALIZATION"),
        ( 5, "VIRTUAL_TIMER_VECTOR",                  "APIC_TIMER_VIRTUALIZATION"),
    ),
    *_run(Area.CONTROL, Width.W64,
        ( 0, "IO_BITMAP_A",                           ""),
        ( 1, "IO_BITMAP_B",                           ""),
        ( 2, "MSR_BITMAPS",                           "USE_MSR_BITMAPS"),
        ( 3, "EXIT_MSR_STORE_ADDRESS",                ""),
        ( 4, "EXIT_MSR_LOAD_ADDRESS",                 ""),
        ( 5, "ENTRY_MSR_LOAD_ADDRESS",                ""),
        ( 6, "EXECUTIVE_VMCS_POINTER",                ""),
        ( 7, "PML_ADDRESS",                           "ENABLE_PML"),
        ( 8, "TSC_OFFSET",                            ""),
        ( 9, "VIRTUAL_APIC_ADDRESS",                  "USE_TPR_SHADOW"),
        (10, "APIC_ACCESS_ADDRESS",                   "VIRTUALIZE_APIC_ACCESSES"),
        (11, "POSTED_INTERRUPT_DESCRIPTOR_ADDRESS",   "PROCESS_POSTED_INTERRUPTS"),
        (12, "VM_FUNCTION_CONTROLS",                  "ENABLE_VM_FUNCTIONS"),
        (13, "EPT_POINTER",                           "ENABLE_EPT"),
        (14, "EOI_EXIT_BITMAP_0",                     "VIRTUAL_INTERRUPT_DELIVERY"),
        (15, "EOI_EXIT_BITMAP_1",                     "VIRTUAL_INTERRUPT_DELIVERY"),
        (16, "EOI_EXIT_BITMAP_2",                     "VIRTUAL_INTERRUPT_DELIVERY"),
        (17, "EOI_EXIT_BITMAP_3",                     "VIRTUAL_INTERRUPT_DELIVERY"),
        (18, "EPTP_LIST_ADDRESS",                     "EPTP_SWITCHING"),
        (19, "VMREAD_BITMAP_ADDRESS",                 "VMCS_SHADOWING"),
        (20, "VMWRITE_BITMAP_ADDRESS",                "VMCS_SHADOWING"),
        (21, "VE_INFORMATION_ADDRESS",                "EPT_VIOLATION_VE"),
        (22, "XSS_EXITING_BITMAP",                    "ENABLE_XSAVES_XRSTORS"),
        (23, "ENCLS_EXITING_BITMAP",                  "ENABLE_ENCLS_EXITING"),
        (24, "SUB_PAGE_PERMISSION_TABLE_POINTER",     "SUB_PAGE_WRITE_PERMISSIONS"),
        (25, "TSC_MULTIPLIER",                        "USE_TSC_SCALING"),
        (26, "TERTIARY_PROC_CONTROLS",                "ACTIVATE_TERTIARY_CONTROLS"),
        (27, "ENCLV_EXITING_BITMAP",                  "ENABLE_ENCLV_EXITING"),
        (28, "LOW_PASID_DIRECTORY_ADDRESS",           "PASID_TRANSLATION"),
        (29, "HIGH_PASID_DIRECTORY_ADDRESS",          "PASID_TRANSLATION"),
        (31, "PCONFIG_EXITING_BITMAP",                "ENABLE_PCONFIG"),
        (32, "HLAT_POINTER",                          "ENABLE_HLAT"),
        (33, "PID_POINTER_TABLE_ADDRESS",             "IPI_VIRTUALIZATION"),
        (34, "SECONDARY_EXIT_CONTROLS",               "EXIT_ACTIVATE_SECONDARY_CONTROLS"),
        (37, "IA32_SPEC_CTRL_MASK",                   "VIRTUALIZE_IA32_SPEC_CTRL"),
        (38, "IA32_SPEC_CTRL_SHADOW",                 "VIRTUALIZE_IA32_SPEC_CTRL"),
        (39, "GUEST_DEADLINE_SHADOW",                 "APIC_TIMER_VIRTUALIZATION"),
        (41, "INJECTED_EVENT_DATA",                   "ENTRY_LOAD_FRED"),
    ),
    *_run(Area.CONTROL, Width.W32,
        ( 0, "PIN_CONTROLS",                          ""),
        ( 1, "PRIMARY_PROC_CONTROLS",                 ""),
        ( 2, "EXCEPTION_BITMAP",                      ""),
        ( 3, "PAGE_FAULT_ERROR_CODE_MASK",            ""),
        ( 4, "PAGE_FAULT_ERROR_CODE_MATCH",           ""),
        ( 5, "CR3_TARGET_COUNT",                      ""),
        ( 6, "EXIT_CONTROLS",                         ""),
        ( 7, "EXIT_MSR_STORE_COUNT",                  ""),
        ( 8, "EXIT_MSR_LOAD_COUNT",                   ""),
        ( 9, "ENTRY_CONTROLS",                        ""),
        (10, "ENTRY_MSR_LOAD_COUNT",                  ""),
        (11, "ENTRY_INTERRUPTION_INFORMATION",        ""),
        (12, "ENTRY_EXCEPTION_ERROR_CODE",            ""),
        (13, "ENTRY_INSTRUCTION_LENGTH",              ""),
        (14, "TPR_THRESHOLD",                         "USE_TPR_SHADOW"),
        (15, "SECONDARY_PROC_CONTROLS",               "ACTIVATE_SECONDARY_CONTROLS"),
        (16, "PLE_GAP",                               "PAUSE_LOOP_EXITING"),
        (17, "PLE_WINDOW",                            "PAUSE_LOOP_EXITING"),
        (18, "INSTRUCTION_TIMEOUT_CONTROL",           "INSTRUCTION_TIMEOUT"),
    ),
    *_run(Area.CONTROL, Width.NATURAL,
        ( 0, "CR0_GUEST_HOST_MASK",                   ""),
        ( 1, "CR4_GUEST_HOST_MASK",                   ""),
        ( 2, "CR0_READ_SHADOW",                       ""),
        ( 3, "CR4_READ_SHADOW",                       ""),
        ( 4, "CR3_TARGET_VALUE_0",                    ""),
        ( 5, "CR3_TARGET_VALUE_1",                    ""),
        ( 6, "CR3_TARGET_VALUE_2",                    ""),
        ( 7, "CR3_TARGET_VALUE_3",                    ""),
    ),
)

_EXIT_INFO = (
    *_run(Area.EXIT_INFO, Width.W64,
        ( 0, "GUEST_PHYSICAL_ADDRESS",                "ENABLE_EPT"),
        ( 1, "MSR_DATA",                              "ENABLE_MSR_LIST_INSTRUCTIONS"),
        ( 2, "ORIGINAL_EVENT_DATA",                   "ENTRY_LOAD_FRED"),
    ),
    *_run(Area.EXIT_INFO, Width.W32,
        ( 0, "VM_INSTRUCTION_ERROR",                  ""),
        ( 1, "EXIT_REASON",                           ""),
        ( 2, "EXIT_INTERRUPTION_INFORMATION",         ""),
        ( 3, "EXIT_INTERRUPTION_ERROR_CODE",          ""),
        ( 4, "IDT_VECTORING_INFORMATION",             ""),
        ( 5, "IDT_VECTORING_ERROR_CODE",              ""),
        ( 6, "EXIT_INSTRUCTION_LENGTH",               ""),
        ( 7, "EXIT_INSTRUCTION_INFORMATION",          ""),
    ),
    *_run(Area.EXIT_INFO, Width.NATURAL,
        ( 0, "EXIT_QUALIFICATION",                    ""),
        ( 1, "IO_RCX",                                ""),
        ( 2, "IO_RSI",                                ""),
        ( 3, "IO_RDI",                                ""),
        ( 4, "IO_RIP",                                ""),
        ( 5, "GUEST_LINEAR_ADDRESS",                  ""),
    ),
)

_GUEST = (
    *_run(Area.GUEST, Width.W16,
        *_per_segment("SELECTOR", 0),
        ( 8, "GUEST_INTERRUPT_STATUS",                "VIRTUAL_INTERRUPT_DELIVERY"),
        ( 9, "PML_INDEX",                             "ENABLE_PML"),
        (10, "GUEST_UINV",                            "ENTRY_LOAD_UINV EXIT_CLEAR_UINV"),
    ),
    *_run(Area.GUEST, Width.W64,
        ( 0, "VMCS_LINK_POINTER",                     ""),
        ( 1, "GUEST_IA32_DEBUGCTL",                   ""),
        ( 2, "GUEST_IA32_PAT",                        "ENTRY_LOAD_IA32_PAT EXIT_SAVE_IA32_PAT"),
        ( 3, "GUEST_IA32_EFER",                       "ENTRY_LOAD_IA32_EFER EXIT_SAVE_IA32_EFER"),
        ( 4, "GUEST_IA32_PERF_GLOBAL_CTRL",
             "ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL EXIT_SAVE_IA32_PERF_GLOBAL_CTRL"),
        ( 5, "GUEST_PDPTE0",                          "ENABLE_EPT"),
        ( 6, "GUEST_PDPTE1",                          "ENABLE_EPT"),
        ( 7, "GUEST_PDPTE2",                          "ENABLE_EPT"),
        ( 8, "GUEST_PDPTE3",                          "ENABLE_EPT"),
        ( 9, "GUEST_IA32_BNDCFGS",                    "ENTRY_LOAD_IA32_BNDCFGS EXIT_CLEAR_IA32_BNDCFGS"),
        (10, "GUEST_IA32_RTIT_CTL",                   "ENTRY_LOAD_IA32_RTIT_CTL EXIT_CLEAR_IA32_RTIT_CTL"),
        (11, "GUEST_IA32_LBR_CTL",                    "ENTRY_LOAD_IA32_LBR_CTL EXIT_CLEAR_IA32_LBR_CTL"),
        (12, "GUEST_IA32_PKRS",                       "ENTRY_LOAD_PKRS"),
        (13, "GUEST_IA32_FRED_CONFIG",                "ENTRY_LOAD_FRED"),
        (14, "GUEST_IA32_FRED_RSP1",                  "ENTRY_LOAD_FRED"),
        (15, "GUEST_IA32_FRED_RSP2",                  "ENTRY_LOAD_FRED"),
        (16, "GUEST_IA32_FRED_RSP3",                  "ENTRY_LOAD_FRED"),
        (17, "GUEST_IA32_FRED_STKLVLS",               "ENTRY_LOAD_FRED"),
        (18, "GUEST_IA32_FRED_SSP1",                  "ENTRY_LOAD_FRED"),
        (19, "GUEST_IA32_FRED_SSP2",                  "ENTRY_LOAD_FRED"),
        (20, "GUEST_IA32_FRED_SSP3",                  "ENTRY_LOAD_FRED"),
        (23, "GUEST_IA32_SPEC_CTRL",                  "ENTRY_LOAD_IA32_SPEC_CTRL"),
        (24, "GUEST_DEADLINE",                        "APIC_TIMER_VIRTUALIZATION"),
    ),
    *_run(Area.GUEST, Width.W32,
        *_per_segment("LIMIT", 0),
        ( 8, "GUEST_GDTR_LIMIT",                      ""),
        ( 9, "GUEST_IDTR_LIMIT",                      ""),
        *_per_segment("ACCESS_RIGHTS", 10),
        (18, "GUEST_INTERRUPTIBILITY_STATE",          ""),
        (19, "GUEST_ACTIVITY_STATE",                  ""),
        (20, "GUEST_SMBASE",                          ""),
        (21, "GUEST_IA32_SYSENTER_CS",                ""),
        (23, "PREEMPTION_TIMER_VALUE",                "ACTIVATE_PREEMPTION_TIMER"),
    ),
    *_run(Area.GUEST, Width.NATURAL,
        ( 0, "GUEST_CR0",                             ""),
        ( 1, "GUEST_CR3",                             ""),
        ( 2, "GUEST_CR4",                             ""),
        *_per_segment("BASE", 3),
        (11, "GUEST_GDTR_BASE",                       ""),
        (12, "GUEST_IDTR_BASE",                       ""),
        (13, "GUEST_DR7",                             ""),
        (14, "GUEST_RSP",                             ""),
        (15, "GUEST_RIP",                             ""),
        (16, "GUEST_RFLAGS",                          ""),
        (17, "GUEST_PENDING_DEBUG_EXCEPTIONS",        ""),
        (18, "GUEST_IA32_SYSENTER_ESP",               ""),
        (19, "GUEST_IA32_SYSENTER_EIP",               ""),
        (20, "GUEST_IA32_S_CET",                      "ENTRY_LOAD_CET_STATE"),
        (21, "GUEST_SSP",                             "ENTRY_LOAD_CET_STATE"),
        (22, "GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR",   "ENTRY_LOAD_CET_STATE"),
    ),
)

_HOST = (
    *_run(Area.HOST, Width.W16,
        ( 0, "HOST_ES_SELECTOR",                      ""),
        ( 1, "HOST_CS_SELECTOR",                      ""),
        ( 2, "HOST_SS_SELECTOR",                      ""),
        ( 3, "HOST_DS_SELECTOR",                      ""),
        ( 4, "HOST_FS_SELECTOR",                      ""),
        ( 5, "HOST_GS_SELECTOR",                      ""),
        ( 6, "HOST_TR_SELECTOR",                      ""),
    ),
    *_run(Area.HOST, Width.W64,
        ( 0, "HOST_IA32_PAT",                         "EXIT_LOAD_IA32_PAT"),
        ( 1, "HOST_IA32_EFER",                        "EXIT_LOAD_IA32_EFER"),
        ( 2, "HOST_IA32_PERF_GLOBAL_CTRL",            "EXIT_LOAD_IA32_PERF_GLOBAL_CTRL"),
        ( 3, "HOST_IA32_PKRS",                        "EXIT_LOAD_PKRS"),
        ( 4, "HOST_IA32_FRED_CONFIG",                 "EXIT_LOAD_FRED"),
        ( 5, "HOST_IA32_FRED_RSP1",                   "EXIT_LOAD_FRED"),
        ( 6, "HOST_IA32_FRED_RSP2",                   "EXIT_LOAD_FRED"),
        ( 7, "HOST_IA32_FRED_RSP3",                   "EXIT_LOAD_FRED"),
        ( 8, "HOST_IA32_FRED_STKLVLS",                "EXIT_LOAD_FRED"),
        ( 9, "HOST_IA32_FRED_SSP1",                   "EXIT_LOAD_FRED"),
        (10, "HOST_IA32_FRED_SSP2",                   "EXIT_LOAD_FRED"),
        (11, "HOST_IA32_FRED_SSP3",                   "EXIT_LOAD_FRED"),
        (13, "HOST_IA32_SPEC_CTRL",                   "EXIT_LOAD_IA32_SPEC_CTRL"),
    ),
    *_run(Area.HOST, Width.W32,
        ( 0, "HOST_IA32_SYSENTER_CS",                 ""),
    ),
    *_run(Area.HOST, Width.NATURAL,
        ( 0, "HOST_CR0",                              ""),
        ( 1, "HOST_CR3",                              ""),
        ( 2, "HOST_CR4",                              ""),
        ( 3, "HOST_FS_BASE",                          ""),
        ( 4, "HOST_GS_BASE",                          ""),
        ( 5, "HOST_TR_BASE",                          ""),
        ( 6, "HOST_GDTR_BASE",                        ""),
        ( 7, "HOST_IDTR_BASE",                        ""),
        ( 8, "HOST_IA32_SYSENTER_ESP",                ""),
        ( 9, "HOST_IA32_SYSENTER_EIP",                ""),
        (10, "HOST_RSP",                              ""),
        (11, "HOST_RIP",                              ""),
        (12, "HOST_IA32_S_CET",                       "EXIT_LOAD_CET_STATE"),
        (13, "HOST_SSP",                              "EXIT_LOAD_CET_STATE"),
        (14, "HOST_IA32_INTERRUPT_SSP_TABLE_ADDR",    "EXIT_LOAD_CET_STATE"),
    ),
)
# fmt: on

FIELDS: Final[tuple[Field, ...]] = (*_CONTROL, *_EXIT_INFO, *_GUEST, *_HOST)
FIRST_SLOT: Final = 1
SLOT: Final[dict[str, int]] = {field.name: slot for slot, field in enumerate(FIELDS, FIRST_SLOT)}
BY_NAME: Final[dict[str, Field]] = {field.name: field for field in FIELDS}
BY_ENCODING: Final[dict[int, Field]] = {field.encoding: field for field in FIELDS}

ENCODINGS: Final = 1 << 15
"""Encodings are below this; every operand at or above it names no field."""


def _encoding_to_slot() -> npt.NDArray[np.int16]:
    slots = np.full(ENCODINGS, -1, np.int16)
    for slot, field in enumerate(FIELDS, FIRST_SLOT):
        slots[field.encoding] = slot
        if field.high_encoding is not None:
            slots[field.high_encoding] = slot
    return slots


ENCODING_TO_SLOT: Final = _encoding_to_slot()
"""The slot for each encoding, -1 where there is no field; a high encoding gives the slot of its field."""

WIDTH_MASK: Final[npt.NDArray[np.int64]] = np.array(
    [0, *(-1 if field.bits == 64 else (1 << field.bits) - 1 for field in FIELDS)], np.int64
)
"""The bits each slot can hold, as two's complement."""

READ_ONLY: Final[npt.NDArray[np.bool_]] = np.array([True, *(field.read_only for field in FIELDS)], np.bool_)
"""Whether each slot is exit information."""


def describe_fields() -> str:
    """List every field in slot order, one line each, in fixed columns."""
    lines = [f"{'slot':>4}  {'encoding':<8}  {'area':<9}  {'width':<7}  {'name':<36}  exists with"]
    for slot, field in enumerate(FIELDS, FIRST_SLOT):
        needs = " or ".join(field.needs) or "-"
        lines.append(
            f"{slot:>4}  0x{field.encoding:04x}    {field.area.name:<9}  {field.width.name:<7}"
            f"  {field.name:<36}  {needs}"
        )
    return "\n".join(lines)
