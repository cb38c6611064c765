"""For each control of the VMCS: a guest, what comes of it with the control 0, and what with the control 1."""

from __future__ import annotations

from typing import Final

from tests.vmcs.guests import (
    APIC_ACCESS,
    DATA,
    DATA1,
    DESCRIPTOR,
    EPT_DATA,
    EPTP_LIST,
    GP,
    IO_BITMAP_A,
    PID_TABLE,
    POSTED,
    STACK,
    UD,
    VE,
    VIRTUAL_APIC,
    Expected,
    Guest,
    quad,
)
from vtsim.cpu import slots as s
from vtsim.cpu.kernels import rare_msrs as r
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v

Case = tuple[Guest, Expected, Expected]
NO_EXIT: Final[Expected] = {"reason": x.VMCALL, "vector": None}
IF, IN_VALID = 0x202, 1 << 31
SELF, ICR_NMI = 1 << 18, 4 << 8
APIC = "USE_TPR_SHADOW VIRTUAL_INTERRUPT_DELIVERY"
LINEAR = "VIRTUALIZE_APIC_ACCESSES"
THIRD, MORE_EXIT = "ACTIVATE_TERTIARY_CONTROLS", "EXIT_ACTIVATE_SECONDARY_CONTROLS"
READ, WRITE = "8b01", "8901"  # MOV EAX, [RCX] and back
RDMSR, WRMSR = "0f32", "0f30"
STATE = s.STATE - v.GUEST_START
ALL_LEAVES = (1 << 64) - 1
PAT, EFER = 0x0007010600070106, 0xD01
FRED_RSP1 = STATE + v.GUEST_IA32_FRED_RSP1


def exits(reason: int) -> Expected:
    return {"reason": reason}


def faults(vector: int) -> Expected:
    return {"reason": x.VMCALL, "vector": vector}


def by_instruction(code: str, reason: int, **more: object) -> Case:
    """An instruction that exits where the control is 1 and completes where it is 0."""
    return Guest(code=code, **more), NO_EXIT, exits(reason)  # type: ignore[arg-type]


def spared(code: str, reason: int, **more: object) -> Case:
    """An instruction that exits unless the control is 1."""
    return Guest(code=code, **more), exits(reason), NO_EXIT  # type: ignore[arg-type]


def enabled(code: str, **more: object) -> Case:
    """An instruction that is #UD unless the control is 1."""
    return Guest(code=code, **more), faults(UD), NO_EXIT  # type: ignore[arg-type]


def entry_loads(field: str, place: int, value: int, before: int, **more: object) -> Case:
    """An MSR that VM entry loads where the control is 1 and leaves alone where it is 0."""
    return Guest(fields={field: value}, record={place: before}, **more), {place: before}, {place: value}  # type: ignore[arg-type]


def exit_loads(field: str, place: int, value: int, before: int, controls: str = "") -> Case:
    """An MSR that VM exit loads where the control is 1 and leaves alone where it is 0."""
    guest = Guest(fields={field: value}, record={place: before}, controls=controls)
    return guest, {place: before}, {place: value}


def exit_clears(field: str, place: int, value: int) -> Case:
    """An MSR that VM exit saves in any case, and clears where the control is 1."""
    return Guest(record={place: value}), {place: value, field: value}, {place: 0, field: value}


def exit_saves(index: int, field: str, value: int, before: int, controls: str = "") -> Case:
    """An MSR that the guest writes and VM exit saves where the control is 1; without it the field stays."""
    guest = Guest(
        code=WRMSR, controls=f"USE_MSR_BITMAPS {controls}", fields={field: before},
        gpr={"rcx": index, "rax": value & 0xFFFFFFFF, "rdx": value >> 32},
    )  # fmt: skip
    return guest, {field: before, **NO_EXIT}, {field: value, **NO_EXIT}


TO_ITSELF = Guest(code="9090", fields={"GUEST_RFLAGS": IF}, send=SELF | 0x30)
HALTED: Final[Expected] = {"reason": x.EXTERNAL_INTERRUPT}  # the recorder's timer ends it
NMI = {s.NMI_PENDING: 1, s.NMI_BLOCKED: 1}  # the host blocks it until VM entry
RETURN = quad(0x800002, 8, 2, STACK, 0x10)
SCALED = {s.MSR_TSC_ADJUST: 1 << 40}
ICR = Guest(
    code=WRITE, controls=f"USE_TPR_SHADOW {LINEAR} {THIRD}", gpr={"rcx": APIC_ACCESS + 0x300, "rax": 0x55},
    memory={VIRTUAL_APIC + 0x310: "00000002", PID_TABLE: quad(0, 0, DESCRIPTOR | 1), DESCRIPTOR + 32: quad(0)},
    fields={"PID_POINTER_TABLE_ADDRESS": PID_TABLE, "LAST_PID_POINTER_INDEX": 2}, dump=(DESCRIPTOR, 40),
)  # fmt: skip

# fmt: off
CASES: Final[dict[str, Case]] = {
    # pin
    "EXTERNAL_INTERRUPT_EXITING": (TO_ITSELF, faults(0x30), exits(x.EXTERNAL_INTERRUPT)),
    "NMI_EXITING":                (Guest(code="9090", record=NMI), faults(2),
                                   {"reason": x.EXCEPTION_NMI, "EXIT_INTERRUPTION_INFORMATION": IN_VALID | 0x202}),
    "VIRTUAL_NMIS":               (Guest(code="48cf", controls="NMI_EXITING", memory={STACK: RETURN},
                                         fields={"GUEST_INTERRUPTIBILITY_STATE": 8}),
                                   {"GUEST_INTERRUPTIBILITY_STATE": 8, **NO_EXIT},
                                   {"GUEST_INTERRUPTIBILITY_STATE": 0, **NO_EXIT}),
    "ACTIVATE_PREEMPTION_TIMER":  (Guest(code="f4", fields={"PREEMPTION_TIMER_VALUE": 1000}), HALTED,
                                   exits(x.PREEMPTION_TIMER)),
    "PROCESS_POSTED_INTERRUPTS":  (Guest(code="9090", controls=f"{APIC} EXIT_ACKNOWLEDGE_INTERRUPT", send=SELF | 0xF2,
                                         fields={"GUEST_RFLAGS": IF}, dump=(POSTED, 40),
                                         memory={POSTED: quad(0, 1 << 0x71 - 64, 0, 0, 1)}),
                                   {"reason": x.EXTERNAL_INTERRUPT, "dump": quad(0, 1 << 0x71 - 64, 0, 0, 1)},
                                   {**faults(0x71), "dump": quad(0, 0, 0, 0, 0), "GUEST_INTERRUPT_STATUS": 0x7100}),
    # primary
    "INTERRUPT_WINDOW_EXITING":   (Guest(code="9090", fields={"GUEST_RFLAGS": IF}), NO_EXIT, exits(x.INTERRUPT_WINDOW)),
    "USE_TSC_OFFSETTING":         (Guest(code="0f31", fields={"TSC_OFFSET": 1 << 40}), {"rdx": 0}, {"rdx": 1 << 8}),
    "HLT_EXITING":                (Guest(code="f4"), HALTED, exits(x.HLT)),
    "INVLPG_EXITING":             by_instruction("0f0139", x.INVLPG),
    "MWAIT_EXITING":              by_instruction("0f01c9", x.MWAIT_INSTRUCTION),
    "RDPMC_EXITING":              by_instruction("0f33", x.RDPMC),
    "RDTSC_EXITING":              by_instruction("0f31", x.RDTSC),
    "CR3_LOAD_EXITING":           by_instruction("0f22d8", x.CR_ACCESS, gpr={"rax": 0x808000}),
    "CR3_STORE_EXITING":          by_instruction("0f20d8", x.CR_ACCESS),
    "ACTIVATE_TERTIARY_CONTROLS": by_instruction("f30f38dcc1", x.LOADIWKEY, controls="LOADIWKEY_EXITING",
                                                 fields={"GUEST_CR4": 0xC2620}),
    "CR8_LOAD_EXITING":           by_instruction("440f22c0", x.CR_ACCESS),
    "CR8_STORE_EXITING":          by_instruction("440f20c0", x.CR_ACCESS),
    "USE_TPR_SHADOW":             (Guest(code="440f20c0", memory={VIRTUAL_APIC + 0x80: "50"}), {"rax": 0}, {"rax": 5}),
    "NMI_WINDOW_EXITING":         by_instruction("9090", x.NMI_WINDOW, controls="NMI_EXITING VIRTUAL_NMIS"),
    "MOV_DR_EXITING":             by_instruction("0f21f8", x.DR_ACCESS),
    "UNCONDITIONAL_IO_EXITING":   by_instruction("e480", x.IO_INSTRUCTION),
    "USE_IO_BITMAPS":             by_instruction("e480", x.IO_INSTRUCTION, memory={IO_BITMAP_A + 0x10: "01"}),
    "MONITOR_TRAP_FLAG":          by_instruction("9090", x.MONITOR_TRAP_FLAG),
    "USE_MSR_BITMAPS":            spared(RDMSR, x.MSR_READ, gpr={"rcx": 0x10}),
    "MONITOR_EXITING":            by_instruction("0f01c8", x.MONITOR_INSTRUCTION, gpr={"rax": DATA}),
    "PAUSE_EXITING":              by_instruction("f390", x.PAUSE_INSTRUCTION),
    "ACTIVATE_SECONDARY_CONTROLS": by_instruction("0fc7f0", x.RDRAND, base="b64", controls="RDRAND_EXITING"),
    # secondary
    "VIRTUALIZE_APIC_ACCESSES":   by_instruction(READ, x.APIC_ACCESS, gpr={"rcx": APIC_ACCESS + 0x20}),
    "ENABLE_EPT":                 by_instruction(READ, x.EPT_VIOLATION, gpr={"rcx": DATA1}, memory={EPT_DATA: quad(0)},
                                                 base="b64", controls="ACTIVATE_SECONDARY_CONTROLS"),
    "DESCRIPTOR_TABLE_EXITING":   by_instruction("0f0101", x.GDTR_IDTR, gpr={"rcx": DATA}),
    "ENABLE_RDTSCP":              enabled("0f01f9"),
    "VIRTUALIZE_X2APIC_MODE":     (Guest(code=RDMSR, controls="USE_TPR_SHADOW USE_MSR_BITMAPS", gpr={"rcx": 0x808},
                                         memory={VIRTUAL_APIC + 0x80: "50"}),
                                   faults(GP), {"rax": 0x50, **NO_EXIT}),
    "ENABLE_VPID":                (Guest(fields={"VPID": 7}), {s.VPID: 0}, {s.VPID: 7}),
    "WBINVD_EXITING":             by_instruction("0f09", x.WBINVD),
    "UNRESTRICTED_GUEST":         (Guest(base="brealu"), {"kind": "entry_failure", "reason": x.INVALID_STATE}, NO_EXIT),
    "APIC_REGISTER_VIRTUALIZATION": (Guest(code=READ, controls=f"{LINEAR} USE_TPR_SHADOW",
                                           gpr={"rcx": APIC_ACCESS + 0x30}, memory={VIRTUAL_APIC + 0x30: "15000600"}),
                                     exits(x.APIC_ACCESS), {"rax": 0x60015, **NO_EXIT}),
    "VIRTUAL_INTERRUPT_DELIVERY": (Guest(code="9090", controls="USE_TPR_SHADOW", memory={VIRTUAL_APIC + 0x220: "02"},
                                         fields={"GUEST_INTERRUPT_STATUS": 0x41, "GUEST_RFLAGS": IF}),
                                   NO_EXIT, faults(0x41)),
    "PAUSE_LOOP_EXITING":         by_instruction("f390f390", x.PAUSE_INSTRUCTION, fields={"PLE_WINDOW": 0}),
    "RDRAND_EXITING":             by_instruction("0fc7f0", x.RDRAND),
    "ENABLE_INVPCID":             enabled("660f388201", gpr={"rcx": DATA, "rax": 2}, memory={DATA: quad(0, 0)}),
    "ENABLE_VM_FUNCTIONS":        (Guest(code="0f01d4"), faults(UD), exits(x.VMFUNC)),
    "VMCS_SHADOWING":             spared("0f78d8", x.VMREAD, gpr={"rbx": 0x681E}),
    "ENABLE_ENCLS_EXITING":       (Guest(code="0f01cf", fields={"ENCLS_EXITING_BITMAP": 1}), faults(GP), exits(x.ENCLS)),
    "RDSEED_EXITING":             by_instruction("0fc7f8", x.RDSEED),
    "ENABLE_PML":                 by_instruction(WRITE, x.PML_FULL, gpr={"rcx": DATA1},
                                                 fields={"EPT_POINTER": 0x81005E, "PML_INDEX": 0xFFFF}),
    "EPT_VIOLATION_VE":           (Guest(code=READ, gpr={"rcx": DATA1}, memory={EPT_DATA: quad(0x829030)}),
                                   exits(x.EPT_VIOLATION), faults(VE)),
    "ENABLE_XSAVES_XRSTORS":      enabled("0fc729", gpr={"rcx": DATA}),
    "MODE_BASED_EXECUTE_CONTROL": by_instruction("9090", x.EPT_VIOLATION),  # bit 10 is 0 in the entries, pages are user's
    "USE_TSC_SCALING":            (Guest(code="0f31", controls="USE_TSC_OFFSETTING", record=SCALED,
                                         fields={"TSC_MULTIPLIER": 3 << 47}), {"rdx": 0x100}, {"rdx": 0x180}),
    "ENABLE_USER_WAIT_AND_PAUSE": enabled("660faef0"),
    "ENABLE_PCONFIG":             (Guest(code="0f01c5", fields={"PCONFIG_EXITING_BITMAP": 1}), faults(UD),
                                   exits(x.PCONFIG)),
    "ENABLE_ENCLV_EXITING":       (Guest(code="0f01c0", fields={"ENCLV_EXITING_BITMAP": 1}), faults(GP), exits(x.ENCLV)),
    # tertiary
    "LOADIWKEY_EXITING":          by_instruction("f30f38dcc1", x.LOADIWKEY, controls=THIRD,
                                                 fields={"GUEST_CR4": 0xC2620}),
    "IPI_VIRTUALIZATION":         (ICR, {"reason": x.APIC_ACCESS}, {**NO_EXIT, "dump": quad(0, 1 << 0x55 - 64, 0, 0, 1)}),
    "VIRTUALIZE_IA32_SPEC_CTRL":  (Guest(code=RDMSR, controls=f"USE_MSR_BITMAPS {THIRD}", gpr={"rcx": 0x48},
                                         record={s.MSR_SPEC_CTRL: 2}, fields={"IA32_SPEC_CTRL_SHADOW": 5}),
                                   {"rax": 2}, {"rax": 5}),
    # exit
    "EXIT_SAVE_DEBUG_CONTROLS":   (Guest(code="0f23f8", gpr={"rax": 0x401}, fields={"GUEST_IA32_DEBUGCTL": 0}),
                                   {"GUEST_DR7": 0x400, **NO_EXIT}, {"GUEST_DR7": 0x401, **NO_EXIT}),
    "EXIT_HOST_ADDRESS_SPACE_SIZE": (Guest(base="b32"), {"kind": "vmfail_valid", "error": 8}, NO_EXIT),
    "EXIT_LOAD_IA32_PERF_GLOBAL_CTRL": exit_loads("HOST_IA32_PERF_GLOBAL_CTRL", r.PERF_GLOBAL_CTRL, 7, 3),
    "EXIT_ACKNOWLEDGE_INTERRUPT": (TO_ITSELF,
                                   {"reason": x.EXTERNAL_INTERRUPT, "EXIT_INTERRUPTION_INFORMATION": 0},
                                   {"reason": x.EXTERNAL_INTERRUPT, "EXIT_INTERRUPTION_INFORMATION": IN_VALID | 0x30}),
    "EXIT_SAVE_IA32_PAT":         exit_saves(0x277, "GUEST_IA32_PAT", PAT, 0x0606060606060606),
    "EXIT_LOAD_IA32_PAT":         exit_loads("HOST_IA32_PAT", s.PAT, 0x0606060606060606, PAT),
    "EXIT_SAVE_IA32_EFER":        exit_saves(0xC0000080, "GUEST_IA32_EFER", EFER & ~1, EFER),
    "EXIT_LOAD_IA32_EFER":        exit_loads("HOST_IA32_EFER", s.EFER, 0x500, 0xD01),
    "EXIT_SAVE_PREEMPTION_TIMER": (Guest(code="f4", controls="ACTIVATE_PREEMPTION_TIMER",
                                         fields={"PREEMPTION_TIMER_VALUE": 1000}),
                                   {"PREEMPTION_TIMER_VALUE": 1000}, {"PREEMPTION_TIMER_VALUE": 0}),
    "EXIT_CLEAR_IA32_BNDCFGS":    exit_clears("GUEST_IA32_BNDCFGS", r.BNDCFGS, 0x5001),
    "EXIT_CLEAR_IA32_RTIT_CTL":   exit_clears("GUEST_IA32_RTIT_CTL", r.RTIT_CTL, 0x2001),
    "EXIT_CLEAR_IA32_LBR_CTL":    exit_clears("GUEST_IA32_LBR_CTL", r.LBR_CTL, 0xF),
    "EXIT_CLEAR_UINV":            exit_clears("GUEST_UINV", r.UINV, 0x41),
    "EXIT_LOAD_CET_STATE":        exit_loads("HOST_IA32_S_CET", r.S_CET, 0x5001, 0x3),
    "EXIT_LOAD_PKRS":             exit_loads("HOST_IA32_PKRS", r.PKRS, 0x55, 0xAA),
    "EXIT_SAVE_IA32_PERF_GLOBAL_CTRL": exit_saves(0x38F, "GUEST_IA32_PERF_GLOBAL_CTRL", 7, 1),
    "EXIT_ACTIVATE_SECONDARY_CONTROLS": exit_loads("HOST_IA32_SPEC_CTRL", s.MSR_SPEC_CTRL, 5, 2,
                                                   "EXIT_LOAD_IA32_SPEC_CTRL"),
    "EXIT_SAVE_FRED":             exit_saves(0x1CD, "GUEST_IA32_FRED_RSP1", 0x5000, 0x4000, MORE_EXIT),
    "EXIT_LOAD_FRED":             exit_loads("HOST_IA32_FRED_RSP1", FRED_RSP1, 0x5000, 0x4000, MORE_EXIT),
    "EXIT_LOAD_IA32_SPEC_CTRL":   exit_loads("HOST_IA32_SPEC_CTRL", s.MSR_SPEC_CTRL, 5, 2, MORE_EXIT),
    # entry
    "ENTRY_LOAD_DEBUG_CONTROLS":  (Guest(fields={"GUEST_DR7": 0x403}, record={s.DR7: 0x401}),
                                   {"GUEST_DR7": 0x401}, {"GUEST_DR7": 0x403}),
    "ENTRY_IA32E_MODE_GUEST":     (Guest(base="b32"), NO_EXIT, {"kind": "entry_failure", "reason": x.INVALID_STATE}),
    "ENTRY_TO_SMM":               (Guest(), NO_EXIT, {"kind": "vmfail_valid", "error": 7}),
    "ENTRY_DEACTIVATE_DUAL_MONITOR": (Guest(), NO_EXIT, {"kind": "vmfail_valid", "error": 7}),
    "ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL": entry_loads("GUEST_IA32_PERF_GLOBAL_CTRL", r.PERF_GLOBAL_CTRL, 7, 3),
    "ENTRY_LOAD_IA32_PAT":        entry_loads("GUEST_IA32_PAT", s.PAT, 0x0606060606060606, PAT),
    "ENTRY_LOAD_IA32_EFER":       (Guest(code=RDMSR, controls="USE_MSR_BITMAPS", gpr={"rcx": 0xC0000080},
                                         fields={"GUEST_IA32_EFER": 0xD00}, record={s.EFER: 0xD01}),
                                   {"rax": 0xD01}, {"rax": 0xD00}),
    "ENTRY_LOAD_IA32_BNDCFGS":    entry_loads("GUEST_IA32_BNDCFGS", r.BNDCFGS, 0x5001, 0x6001),
    "ENTRY_LOAD_IA32_RTIT_CTL":   entry_loads("GUEST_IA32_RTIT_CTL", r.RTIT_CTL, 0x2000, 0x4000),
    "ENTRY_LOAD_UINV":            entry_loads("GUEST_UINV", r.UINV, 0x41, 0x42),
    "ENTRY_LOAD_CET_STATE":       entry_loads("GUEST_IA32_S_CET", r.S_CET, 0x5001, 0x3),
    "ENTRY_LOAD_IA32_LBR_CTL":    entry_loads("GUEST_IA32_LBR_CTL", r.LBR_CTL, 0xF, 1),
    "ENTRY_LOAD_PKRS":            entry_loads("GUEST_IA32_PKRS", r.PKRS, 0x55, 0xAA),
    "ENTRY_LOAD_FRED":            entry_loads("GUEST_IA32_FRED_RSP1", FRED_RSP1, 0x5000, 0x4000),
    "ENTRY_LOAD_IA32_SPEC_CTRL":  entry_loads("GUEST_IA32_SPEC_CTRL", s.MSR_SPEC_CTRL, 5, 2),
    # VM functions
    "EPTP_SWITCHING":             (Guest(code="0f01d4", controls="ENABLE_VM_FUNCTIONS",
                                         memory={EPTP_LIST: quad(0x81001E)}),
                                   exits(x.VMFUNC), NO_EXIT),
}
# fmt: on
