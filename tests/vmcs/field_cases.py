"""For each VMCS field with an effect of its own: two values and what comes of each; values that registers can be loaded with."""

from __future__ import annotations

from typing import Final

from tests.vmcs import guests as g
from tests.vmcs.control_cases import (
    APIC,
    CASES,
    ICR,
    IF,
    IN_VALID,
    LINEAR,
    MORE_EXIT,
    NO_EXIT,
    RDMSR,
    READ,
    SCALED,
    SELF,
    THIRD,
    WRITE,
    WRMSR,
    exits,
    faults,
)
from tests.vmcs.guests import Expected, Guest, quad
from vtsim.cpu import slots as s
from vtsim.vmcs import reasons as x

FieldCase = tuple[Guest, int, Expected, int, Expected]
OTHER = 0x826000  # a free page


def posted(vector: int) -> Guest:
    return Guest(
        code="9090", controls=f"{APIC} PROCESS_POSTED_INTERRUPTS EXIT_ACKNOWLEDGE_INTERRUPT", send=SELF | vector,
        fields={"GUEST_RFLAGS": IF}, memory={g.POSTED: quad(0, 1 << 0x71 - 64)},
    )  # fmt: skip


def leaf(code: str, control: str) -> Guest:
    return Guest(code=code, controls=control)


def end_of_interrupt(vector: int) -> Guest:
    return Guest(
        code=WRITE, controls=f"{APIC} {LINEAR}", gpr={"rcx": g.APIC_ACCESS + 0xB0},
        fields={"GUEST_INTERRUPT_STATUS": vector << 8},
    )  # fmt: skip


def masked(register: int) -> Guest:
    """MOV EAX from CR0 or CR4."""
    return Guest(code=f"0f20{0xC0 | register << 3:02x}")


def target(n: int) -> Guest:
    """MOV to CR3 of the value that CR3 has."""
    return Guest(code="0f22d8", controls="CR3_LOAD_EXITING", gpr={"rax": 0x808000}, fields={"CR3_TARGET_COUNT": n + 1})


PAGE_FAULT = Guest(code=WRITE, base="b32", gpr={"rcx": 0x830000}, memory={0x80E0C0: "00000000"})
INJECTED = Guest(
    code="9090",
    fields={"ENTRY_INTERRUPTION_INFORMATION": IN_VALID | 0xB0D, "EXCEPTION_BITMAP": 1 << 11},
    memory={0x804000 + 16 * 13 + 5: "0e"},
)  # the gate of #GP is not present
STORE = Guest(
    fields={"EXIT_MSR_STORE_COUNT": 1}, memory={OTHER: quad(0x277, 0), g.STORE_AREA: quad(0x277, 0)}, dump=(OTHER, 16)
)
HOST = Guest(fields={"EXIT_MSR_LOAD_COUNT": 1}, memory={OTHER: quad(0x174, 7), g.HOST_AREA: quad(0x174, 9)})
GUEST = Guest(fields={"ENTRY_MSR_LOAD_COUNT": 1}, memory={OTHER: quad(0x174, 7), g.GUEST_AREA: quad(0x174, 9)})
INFORMATION = Guest(
    code=READ, controls="EPT_VIOLATION_VE", gpr={"rcx": g.DATA1}, memory={g.EPT_DATA: quad(0x829030)}, dump=(OTHER, 4)
)
PAT = 0x0007040600070406
STATUS = Guest(code="9090", controls=APIC, memory={g.VIRTUAL_APIC + 0x220: "02"}, fields={"GUEST_RFLAGS": IF})

# fmt: off
CONTROL_FIELDS: Final[dict[str, FieldCase]] = {
    "VPID":                       (Guest(), 3, {s.VPID: 3}, 0xFFFF, {s.VPID: 0xFFFF}),
    "POSTED_INTERRUPT_NOTIFICATION_VECTOR": (posted(0xA5), 0xA5, faults(0x71), 0xA6, exits(x.EXTERNAL_INTERRUPT)),
    "EPTP_INDEX":                 (Guest(code=READ, controls="EPT_VIOLATION_VE", gpr={"rcx": g.DATA1},
                                         memory={g.EPT_DATA: quad(0x829030)}, dump=(0x823020, 2)),
                                   3, {"dump": "0300"}, 0x102, {"dump": "0201"}),
    "LAST_PID_POINTER_INDEX":     (Guest(code=ICR.code, controls=f"{ICR.controls} IPI_VIRTUALIZATION", gpr=ICR.gpr,
                                         memory=ICR.memory, fields=ICR.fields),
                                   2, NO_EXIT, 1, {"reason": x.APIC_WRITE, "qualification": 0x300}),
    "IO_BITMAP_A":                (Guest(code="e480", controls="USE_IO_BITMAPS", memory={OTHER + 0x10: "01"}),
                                   OTHER, exits(x.IO_INSTRUCTION), g.IO_BITMAP_A, NO_EXIT),
    "IO_BITMAP_B":                (Guest(code="ec", controls="USE_IO_BITMAPS", memory={OTHER: "01"}, gpr={"rdx": 0x8000}),
                                   OTHER, exits(x.IO_INSTRUCTION), g.IO_BITMAP_A, NO_EXIT),
    "MSR_BITMAPS":                (Guest(code=RDMSR, controls="USE_MSR_BITMAPS", memory={OTHER + 2: "01"},
                                         gpr={"rcx": 0x10}), OTHER, exits(x.MSR_READ), g.MSR_BITMAPS, NO_EXIT),
    "EXIT_MSR_STORE_ADDRESS":     (STORE, OTHER, {"dump": quad(0x277, PAT)}, g.STORE_AREA, {"dump": quad(0x277, 0)}),
    "EXIT_MSR_LOAD_ADDRESS":      (HOST, OTHER, {s.SYSENTER_CS: 7}, g.HOST_AREA, {s.SYSENTER_CS: 9}),
    "ENTRY_MSR_LOAD_ADDRESS":     (GUEST, OTHER, {"GUEST_IA32_SYSENTER_CS": 7}, g.GUEST_AREA, {"GUEST_IA32_SYSENTER_CS": 9}),
    "PML_ADDRESS":                (Guest(code=WRITE, controls="ENABLE_PML", gpr={"rcx": g.DATA1},
                                         fields={"EPT_POINTER": 0x81005E, "PML_INDEX": 0}, dump=(OTHER, 4)),
                                   OTHER, {"dump": "00808000"}, 0x824000, {"dump": "00000000"}),  # CR3's page comes first
    "TSC_OFFSET":                 (Guest(code="0f31", controls="USE_TSC_OFFSETTING"),
                                   5 << 40, {"rdx": 5 << 8}, 6 << 40, {"rdx": 6 << 8}),
    "VIRTUAL_APIC_ADDRESS":       (Guest(code="440f20c0", controls="USE_TPR_SHADOW", memory={OTHER + 0x80: "70"}),
                                   OTHER, {"rax": 7}, g.VIRTUAL_APIC, {"rax": 0}),
    "APIC_ACCESS_ADDRESS":        (Guest(code=READ, controls=LINEAR, gpr={"rcx": OTHER}),
                                   OTHER, exits(x.APIC_ACCESS), g.APIC_ACCESS, NO_EXIT),
    "POSTED_INTERRUPT_DESCRIPTOR_ADDRESS": (posted(0xF2), g.POSTED, faults(0x71), OTHER, NO_EXIT),
    "VM_FUNCTION_CONTROLS":       (CASES["EPTP_SWITCHING"][0], 1, NO_EXIT, 0, exits(x.VMFUNC)),
    "EPT_POINTER":                (Guest(), 0x81001E, NO_EXIT, OTHER | 0x1E, exits(x.EPT_VIOLATION)),
    **{f"EOI_EXIT_BITMAP_{n}":    (end_of_interrupt(64 * n + 41), 1 << 41,
                                   {"reason": x.EOI_INDUCED, "qualification": 64 * n + 41}, ~(1 << 41), NO_EXIT)
       for n in range(4)},
    "EPTP_LIST_ADDRESS":          (Guest(code="0f01d4", controls="ENABLE_VM_FUNCTIONS EPTP_SWITCHING",
                                         memory={g.EPTP_LIST: quad(0x81001E)}),
                                   g.EPTP_LIST, NO_EXIT, OTHER, exits(x.VMFUNC)),
    "VMREAD_BITMAP_ADDRESS":      (Guest(code="0f78d8", controls="VMCS_SHADOWING", gpr={"rbx": 0x681E},
                                         memory={OTHER + (0x681E >> 3): "40"}), OTHER, exits(x.VMREAD), 0x81B000, NO_EXIT),
    "VMWRITE_BITMAP_ADDRESS":     (Guest(code="0f79d8", controls="VMCS_SHADOWING", gpr={"rbx": 0x681E},
                                         memory={OTHER + (0x681E >> 3): "40"}), OTHER, exits(x.VMWRITE), 0x81C000, NO_EXIT),
    "VE_INFORMATION_ADDRESS":     (INFORMATION, OTHER, {"dump": "30000000"}, 0x823000, {"dump": "00000000"}),
    "XSS_EXITING_BITMAP":         (Guest(code="0fc729", controls="ENABLE_XSAVES_XRSTORS", gpr={"rax": 0x100, "rcx": g.DATA},
                                         record={s.MSR_XSS: 0x100}), 0x100, exits(x.XSAVES), 0x200, NO_EXIT),
    "ENCLS_EXITING_BITMAP":       (leaf("0f01cf", "ENABLE_ENCLS_EXITING"), 1, exits(x.ENCLS), ~1, faults(g.GP)),
    "TSC_MULTIPLIER":             (Guest(code="0f31", controls="USE_TSC_OFFSETTING USE_TSC_SCALING", record=SCALED),
                                   5 << 48, {"rdx": 0x500}, 1 << 47, {"rdx": 0x80}),
    "ENCLV_EXITING_BITMAP":       (leaf("0f01c0", "ENABLE_ENCLV_EXITING"), 1, exits(x.ENCLV), ~1, faults(g.GP)),
    "PCONFIG_EXITING_BITMAP":     (leaf("0f01c5", "ENABLE_PCONFIG"), 1, exits(x.PCONFIG), ~1, faults(g.GP)),
    "PID_POINTER_TABLE_ADDRESS":  (Guest(code=ICR.code, controls=f"{ICR.controls} IPI_VIRTUALIZATION", gpr=ICR.gpr,
                                         memory=ICR.memory, fields=ICR.fields),
                                   g.PID_TABLE, NO_EXIT, OTHER, exits(x.APIC_WRITE)),
    "IA32_SPEC_CTRL_MASK":        (Guest(code=WRMSR, controls=f"USE_MSR_BITMAPS {THIRD} VIRTUALIZE_IA32_SPEC_CTRL",
                                         gpr={"rcx": 0x48, "rax": 5}, record={s.MSR_SPEC_CTRL: 2}),
                                   7, {s.MSR_SPEC_CTRL: 2, "IA32_SPEC_CTRL_SHADOW": 5},
                                   3, {s.MSR_SPEC_CTRL: 6, "IA32_SPEC_CTRL_SHADOW": 5}),
    "IA32_SPEC_CTRL_SHADOW":      (Guest(code=RDMSR, controls=f"USE_MSR_BITMAPS {THIRD} VIRTUALIZE_IA32_SPEC_CTRL",
                                         gpr={"rcx": 0x48}), 1, {"rax": 1}, 4, {"rax": 4}),
    "EXCEPTION_BITMAP":           (Guest(code="0f0b"), 1 << 6, exits(x.EXCEPTION_NMI), ~(1 << 6) & 0xFFFFFFFF, faults(g.UD)),
    "PAGE_FAULT_ERROR_CODE_MASK": (Guest(code=PAGE_FAULT.code, base="b32", gpr=PAGE_FAULT.gpr, memory=PAGE_FAULT.memory,
                                         fields={"EXCEPTION_BITMAP": 1 << 14, "PAGE_FAULT_ERROR_CODE_MATCH": 2}),
                                   3, exits(x.EXCEPTION_NMI), 1, faults(g.PF)),
    "PAGE_FAULT_ERROR_CODE_MATCH": (Guest(code=PAGE_FAULT.code, base="b32", gpr=PAGE_FAULT.gpr, memory=PAGE_FAULT.memory,
                                          fields={"EXCEPTION_BITMAP": 1 << 14, "PAGE_FAULT_ERROR_CODE_MASK": 3}),
                                    2, exits(x.EXCEPTION_NMI), 3, faults(g.PF)),
    "CR3_TARGET_COUNT":           (Guest(code="0f22d8", controls="CR3_LOAD_EXITING", gpr={"rax": 0x808000},
                                         fields={"CR3_TARGET_VALUE_1": 0x808000}), 2, NO_EXIT, 1, exits(x.CR_ACCESS)),
    "EXIT_MSR_STORE_COUNT":       (Guest(memory={g.STORE_AREA: quad(0x277, 0)}, dump=(g.STORE_AREA, 16)),
                                   1, {"dump": quad(0x277, PAT)}, 0, {"dump": quad(0x277, 0)}),
    "EXIT_MSR_LOAD_COUNT":        (Guest(memory={g.HOST_AREA: quad(0x174, 5, 0x174, 6)}),
                                   1, {s.SYSENTER_CS: 5}, 2, {s.SYSENTER_CS: 6}),
    "ENTRY_MSR_LOAD_COUNT":       (Guest(memory={g.GUEST_AREA: quad(0x174, 5, 0x174, 6)}),
                                   1, {"GUEST_IA32_SYSENTER_CS": 5}, 2, {"GUEST_IA32_SYSENTER_CS": 6}),
    "ENTRY_INTERRUPTION_INFORMATION": (Guest(code="9090", fields={"GUEST_RFLAGS": IF}),
                                       IN_VALID | 0x30, faults(0x30), 0x30, NO_EXIT),
    "ENTRY_EXCEPTION_ERROR_CODE": (INJECTED, 0x18, {"IDT_VECTORING_ERROR_CODE": 0x18},
                                   0x20, {"IDT_VECTORING_ERROR_CODE": 0x20}),
    "ENTRY_INSTRUCTION_LENGTH":   (Guest(fields={"ENTRY_INTERRUPTION_INFORMATION": IN_VALID | 0x603}, dump=(g.STACK - 40, 8)),
                                   1, {**faults(3), "dump": quad(g.CODE + 1)}, 4, {**faults(3), "dump": quad(g.CODE + 4)}),
    "TPR_THRESHOLD":              (Guest(code="440f22c0", controls="USE_TPR_SHADOW", gpr={"rax": 4},
                                         memory={g.VIRTUAL_APIC + 0x80: "f0"}),
                                   5, exits(x.TPR_BELOW_THRESHOLD), 4, NO_EXIT),
    "PLE_GAP":                    (Guest(code="f390f390", controls="PAUSE_LOOP_EXITING", fields={"PLE_WINDOW": 0}),
                                   0x1000, exits(x.PAUSE_INSTRUCTION), 0, NO_EXIT),
    "PLE_WINDOW":                 (Guest(code="f390f390", controls="PAUSE_LOOP_EXITING"),
                                   0, exits(x.PAUSE_INSTRUCTION), 0x10000, NO_EXIT),
    "CR0_GUEST_HOST_MASK":        (Guest(code="0f22c0", gpr={"rax": 0x80010031}), 1 << 16, exits(x.CR_ACCESS), 2, NO_EXIT),
    "CR4_GUEST_HOST_MASK":        (Guest(code="0f22e0", gpr={"rax": 0x426A0}), 1 << 7, exits(x.CR_ACCESS), 1 << 8, NO_EXIT),
    "CR0_READ_SHADOW":            (Guest(code="0f20c0", fields={"CR0_GUEST_HOST_MASK": 0xE}), 0xA, {"rax": 0x8000003B},
                                   0x4, {"rax": 0x80000035}),
    "CR4_READ_SHADOW":            (Guest(code="0f20e0", fields={"CR4_GUEST_HOST_MASK": 0xF}), 0xA, {"rax": 0x4262A},
                                   0x5, {"rax": 0x42625}),
    **{f"CR3_TARGET_VALUE_{n}":   (target(n), 0x808000, NO_EXIT, 0x809000, exits(x.CR_ACCESS)) for n in range(4)},
}

# guest-state fields that are no registers
STATE_FIELDS: Final[dict[str, FieldCase]] = {
    "GUEST_INTERRUPT_STATUS":     (STATUS, 0x41, faults(0x41), 0x4141, NO_EXIT),
    "PML_INDEX":                  (Guest(code=WRITE, controls="ENABLE_PML", gpr={"rcx": g.DATA1},
                                         fields={"EPT_POINTER": 0x81005E}), 0x200, exits(x.PML_FULL), 0x1FF, NO_EXIT),
    "VMCS_LINK_POINTER":          (Guest(code="0f78d8", controls="VMCS_SHADOWING", gpr={"rbx": 0x681E, "rax": 3},
                                         memory={g.SHADOW_VMCS + 3: "80"}),
                                   g.SHADOW_VMCS, {**NO_EXIT, "rax": 0}, (1 << 64) - 1, {**NO_EXIT, "rax": 3}),
    "GUEST_INTERRUPTIBILITY_STATE": (Guest(code="0fa2", fields={"GUEST_RFLAGS": IF}),
                                     8, {"GUEST_INTERRUPTIBILITY_STATE": 8}, 2, {"GUEST_INTERRUPTIBILITY_STATE": 2}),
    "GUEST_ACTIVITY_STATE":       (Guest(code="9090"), 0, NO_EXIT,
                                   1, {"reason": x.EXTERNAL_INTERRUPT, "GUEST_ACTIVITY_STATE": 1}),
    "PREEMPTION_TIMER_VALUE":     (Guest(code="f4", controls="ACTIVATE_PREEMPTION_TIMER EXIT_SAVE_PREEMPTION_TIMER"),
                                   100, {"reason": x.PREEMPTION_TIMER, "PREEMPTION_TIMER_VALUE": 0},
                                   0, {"reason": x.PREEMPTION_TIMER, "GUEST_RIP": g.CODE}),
    "GUEST_PENDING_DEBUG_EXCEPTIONS": (Guest(code="9090", fields={"EXCEPTION_BITMAP": 2}),
                                       0x1001, {"reason": x.EXCEPTION_NMI, "qualification": 1}, 0, NO_EXIT),
    "GUEST_SMBASE":               (Guest(), 0x5000, {"GUEST_SMBASE": 0x5000}, 0, {"GUEST_SMBASE": 0}),
}

# exit-information fields: a guest whose exit leaves the value
EXIT_FIELDS: Final[dict[str, tuple[Guest, int]]] = {
    "GUEST_PHYSICAL_ADDRESS":     (Guest(code=READ, gpr={"rcx": g.DATA1}, memory={g.EPT_DATA: quad(0)}), g.DATA1),
    "VM_INSTRUCTION_ERROR":       (Guest(fields={"HOST_TR_SELECTOR": 0}), 8),
    "EXIT_REASON":                (Guest(code="0fa2"), x.CPUID),
    "EXIT_INTERRUPTION_INFORMATION": (Guest(code="0f0b", fields={"EXCEPTION_BITMAP": 1 << 6}), IN_VALID | 0x306),
    "EXIT_INTERRUPTION_ERROR_CODE": (Guest(code="8ed8", gpr={"rax": 0xFFF8}, fields={"EXCEPTION_BITMAP": 1 << 13}), 0xFFF8),
    "IDT_VECTORING_INFORMATION":  (INJECTED, IN_VALID | 0xB0D),
    "IDT_VECTORING_ERROR_CODE":   (Guest(code="8ed8", gpr={"rax": 0xFFF8}, fields={"EXCEPTION_BITMAP": 1 << 11},
                                         memory={0x804000 + 16 * 13 + 5: "0e"}), 0xFFF8),
    "EXIT_INSTRUCTION_LENGTH":    (Guest(code="660fc731"), 4),
    "EXIT_INSTRUCTION_INFORMATION": (Guest(code="0f78d8"), 1 << 10 | 3 << 28),
    "EXIT_QUALIFICATION":         (Guest(code="e480", controls="UNCONDITIONAL_IO_EXITING"), 8 | 1 << 6 | 0x80 << 16),
    "GUEST_LINEAR_ADDRESS":       (Guest(code="6c", controls="UNCONDITIONAL_IO_EXITING", gpr={"rdi": 0x828123}), 0x828123),
}

# registers: a field, the value that VM entry loads, and another that the guest might have at the VM exit
LOAD_ALL = ("ENTRY_LOAD_IA32_PAT ENTRY_LOAD_IA32_EFER ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL ENTRY_LOAD_IA32_BNDCFGS "
            "ENTRY_LOAD_IA32_RTIT_CTL ENTRY_LOAD_IA32_LBR_CTL ENTRY_LOAD_PKRS ENTRY_LOAD_CET_STATE ENTRY_LOAD_UINV "
            "ENTRY_LOAD_FRED ENTRY_LOAD_IA32_SPEC_CTRL")
SAVE_ALL = f"EXIT_SAVE_IA32_PAT EXIT_SAVE_IA32_EFER EXIT_SAVE_IA32_PERF_GLOBAL_CTRL {MORE_EXIT} EXIT_SAVE_FRED"
HOST_ALL = ("EXIT_LOAD_IA32_PAT EXIT_LOAD_IA32_EFER EXIT_LOAD_IA32_PERF_GLOBAL_CTRL EXIT_LOAD_PKRS EXIT_LOAD_CET_STATE "
            f"{MORE_EXIT} EXIT_LOAD_FRED EXIT_LOAD_IA32_SPEC_CTRL")
REGISTERS: Final[dict[str, tuple[int, int]]] = {
    **{f"{name}_SELECTOR": (0x28, 0x30) for name in ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")},
    **{f"{name}_LIMIT": (0xFFFFF, 0x7FFFF) for name in ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR")},
    "TR_LIMIT": (0x87, 0x97), "GDTR_LIMIT": (0x7FF, 0x6FF), "IDTR_LIMIT": (0x7FF, 0x6FF),
    **{f"{name}_ACCESS_RIGHTS": (0xC091, 0xC095) for name in ("ES", "DS", "FS", "GS")},
    "CS_ACCESS_RIGHTS": (0xA099, 0xA09D), "SS_ACCESS_RIGHTS": (0xC097, 0xC093), "TR_ACCESS_RIGHTS": (0x8B, 0x89),
    "LDTR_ACCESS_RIGHTS": (0x10082, 0x82),
    **{f"{name}_BASE": (0x1000, 0x2000) for name in ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR")},
    "TR_BASE": (0x807000, 0x806000), "GDTR_BASE": (0x803040, 0x803080), "IDTR_BASE": (0x804040, 0x804080),
    "CR0": (0x80010031, 0x80000033), "CR3": (0x809000, 0x80A000), "CR4": (0x426A0, 0x426E0), "DR7": (0x403, 0x40C),
    "RSP": (0x802D00, 0x802C00), "RIP": (0x800010, 0x800020), "RFLAGS": (0x246, 0x202),
    "IA32_SYSENTER_CS": (0x30, 0x40), "IA32_SYSENTER_ESP": (0x1000, 0x2000), "IA32_SYSENTER_EIP": (0x3000, 0x4000),
    "IA32_S_CET": (3, 1), "SSP": (0x5000, 0x6000), "IA32_INTERRUPT_SSP_TABLE_ADDR": (0x7000, 0x8000),
    "IA32_DEBUGCTL": (1, 2), "IA32_PAT": (0x0606060606060606, 0x0404040404040404), "IA32_EFER": (0xD00, 0xD01),
    "IA32_PERF_GLOBAL_CTRL": (7, 3), "IA32_BNDCFGS": (0x5001, 0x6001), "IA32_RTIT_CTL": (0x2000, 0x4000),
    "IA32_LBR_CTL": (0xF, 3), "IA32_PKRS": (0x55, 0x66), "UINV": (0x41, 0x42), "IA32_SPEC_CTRL": (5, 4),
    "IA32_FRED_CONFIG": (0x1000, 0x2000), "IA32_FRED_STKLVLS": (0x1234, 0x4321),
    **{f"IA32_FRED_RSP{n}": (0x5000 * n, 0x6000 * n) for n in (1, 2, 3)},
    **{f"IA32_FRED_SSP{n}": (0x5008 * n, 0x6008 * n) for n in (1, 2, 3)},
    **{f"PDPTE{n}": (0x80D001, 0x80F001) for n in range(4)},
}
RUN_BY = {"CS_ACCESS_RIGHTS", "CR0", "RFLAGS", "IA32_EFER"}  # the host has other values, and needs them
NOT_SAVED = {"IA32_SPEC_CTRL"}  # see kernels.rare_msrs
# fmt: on
