"""Basic exit reasons: numbers, the names that Linux and perf print, and the manual's words.

Where Linux has no name, the instruction's mnemonic or the manual's words stand in its style. Numbers that the
manual leaves undefined are absent.

SDM: "VMX Basic Exit Reasons"; "Basic VM-Exit Information".
"""

from __future__ import annotations

from typing import Final

import attrs

EXCEPTION_NMI: Final = 0
EXTERNAL_INTERRUPT: Final = 1
TRIPLE_FAULT: Final = 2
INIT_SIGNAL: Final = 3
SIPI_SIGNAL: Final = 4
IO_SMI: Final = 5
OTHER_SMI: Final = 6
INTERRUPT_WINDOW: Final = 7
NMI_WINDOW: Final = 8
TASK_SWITCH: Final = 9
CPUID: Final = 10
GETSEC: Final = 11
HLT: Final = 12
INVD: Final = 13
INVLPG: Final = 14
RDPMC: Final = 15
RDTSC: Final = 16
RSM: Final = 17
VMCALL: Final = 18
VMCLEAR: Final = 19
VMLAUNCH: Final = 20
VMPTRLD: Final = 21
VMPTRST: Final = 22
VMREAD: Final = 23
VMRESUME: Final = 24
VMWRITE: Final = 25
VMOFF: Final = 26
VMON: Final = 27
CR_ACCESS: Final = 28
DR_ACCESS: Final = 29
IO_INSTRUCTION: Final = 30
MSR_READ: Final = 31
MSR_WRITE: Final = 32
INVALID_STATE: Final = 33
MSR_LOAD_FAIL: Final = 34
MWAIT_INSTRUCTION: Final = 36
MONITOR_TRAP_FLAG: Final = 37
MONITOR_INSTRUCTION: Final = 39
PAUSE_INSTRUCTION: Final = 40
MCE_DURING_VMENTRY: Final = 41
TPR_BELOW_THRESHOLD: Final = 43
APIC_ACCESS: Final = 44
EOI_INDUCED: Final = 45
GDTR_IDTR: Final = 46
LDTR_TR: Final = 47
EPT_VIOLATION: Final = 48
EPT_MISCONFIG: Final = 49
INVEPT: Final = 50
RDTSCP: Final = 51
PREEMPTION_TIMER: Final = 52
INVVPID: Final = 53
WBINVD: Final = 54
XSETBV: Final = 55
APIC_WRITE: Final = 56
RDRAND: Final = 57
INVPCID: Final = 58
VMFUNC: Final = 59
ENCLS: Final = 60
RDSEED: Final = 61
PML_FULL: Final = 62
XSAVES: Final = 63
XRSTORS: Final = 64
PCONFIG: Final = 65
SPP_EVENT: Final = 66
UMWAIT: Final = 67
TPAUSE: Final = 68
LOADIWKEY: Final = 69
ENCLV: Final = 70
ENQCMD: Final = 72
ENQCMDS: Final = 73
BUS_LOCK: Final = 74
NOTIFY: Final = 75
SEAMCALL: Final = 76
TDCALL: Final = 77
RDMSRLIST: Final = 78
WRMSRLIST: Final = 79
URDMSR: Final = 80
UWRMSR: Final = 81
MSR_READ_IMM: Final = 84
MSR_WRITE_IMM: Final = 85

REASON_COUNT: Final = 86
"""One more than the largest basic exit reason: the length of a table indexed by reason."""

ENTRY_FAILURE: Final = 1 << 31
"""Set in the exit-reason field when a VM entry failed after its controls and host state were found good."""

BASIC_REASON: Final = 0xFFFF
"""The bits of the exit-reason field that hold the basic exit reason."""


@attrs.frozen(kw_only=True)
class Reason:
    """One basic exit reason.

    `instruction` says that the cause always is an instruction: the exit is fault-like, RIP points at the
    instruction and the VM-exit instruction length is valid.
    """

    number: int
    name: str
    title: str
    instruction: bool


def _reason(number: int, name: str, title: str, instruction: bool) -> Reason:
    return Reason(number=number, name=name, title=title, instruction=instruction)


# fmt: off
REASONS: Final[tuple[Reason, ...]] = (
    #       number               name                   the manual's words                       instruction
    _reason(EXCEPTION_NMI,       "EXCEPTION_NMI",       "Exception or non-maskable interrupt",     False),
    _reason(EXTERNAL_INTERRUPT,  "EXTERNAL_INTERRUPT",  "External interrupt",                      False),
    _reason(TRIPLE_FAULT,        "TRIPLE_FAULT",        "Triple fault",                            False),
    _reason(INIT_SIGNAL,         "INIT_SIGNAL",         "INIT signal",                             False),
    _reason(SIPI_SIGNAL,         "SIPI_SIGNAL",         "Start-up IPI",                            False),
    _reason(IO_SMI,              "IO_SMI",              "I/O system-management interrupt",         False),
    _reason(OTHER_SMI,           "OTHER_SMI",           "Other SMI",                               False),
    _reason(INTERRUPT_WINDOW,    "INTERRUPT_WINDOW",    "Interrupt window",                        False),
    _reason(NMI_WINDOW,          "NMI_WINDOW",          "NMI window",                              False),
    _reason(TASK_SWITCH,         "TASK_SWITCH",         "Task switch",                             False),
    _reason(CPUID,               "CPUID",               "CPUID",                                   True),
    _reason(GETSEC,              "GETSEC",              "GETSEC",                                  True),
    _reason(HLT,                 "HLT",                 "HLT",                                     True),
    _reason(INVD,                "INVD",                "INVD",                                    True),
    _reason(INVLPG,              "INVLPG",              "INVLPG",                                  True),
    _reason(RDPMC,               "RDPMC",               "RDPMC",                                   True),
    _reason(RDTSC,               "RDTSC",               "RDTSC",                                   True),
    _reason(RSM,                 "RSM",                 "RSM",                                     True),
    _reason(VMCALL,              "VMCALL",              "VMCALL",                                  True),
    _reason(VMCLEAR,             "VMCLEAR",             "VMCLEAR",                                 True),
    _reason(VMLAUNCH,            "VMLAUNCH",            "VMLAUNCH",                                True),
    _reason(VMPTRLD,             "VMPTRLD",             "VMPTRLD",                                 True),
    _reason(VMPTRST,             "VMPTRST",             "VMPTRST",                                 True),
    _reason(VMREAD,              "VMREAD",              "VMREAD",                                  True),
    _reason(VMRESUME,            "VMRESUME",            "VMRESUME",                                True),
    _reason(VMWRITE,             "VMWRITE",             "VMWRITE",                                 True),
    _reason(VMOFF,               "VMOFF",               "VMXOFF",                                  True),
    _reason(VMON,                "VMON",                "VMXON",                                   True),
    _reason(CR_ACCESS,           "CR_ACCESS",           "Control-register accesses",               True),
    _reason(DR_ACCESS,           "DR_ACCESS",           "MOV DR",                                  True),
    _reason(IO_INSTRUCTION,      "IO_INSTRUCTION",      "I/O instruction",                         True),
    _reason(MSR_READ,            "MSR_READ",            "RDMSR",                                   True),
    _reason(MSR_WRITE,           "MSR_WRITE",           "WRMSR or WRMSRNS",                        True),
    _reason(INVALID_STATE,       "INVALID_STATE",       "VM-entry failure due to invalid guest state", False),
    _reason(MSR_LOAD_FAIL,       "MSR_LOAD_FAIL",       "VM-entry failure due to MSR loading",     False),
    _reason(MWAIT_INSTRUCTION,   "MWAIT_INSTRUCTION",   "MWAIT",                                   True),
    _reason(MONITOR_TRAP_FLAG,   "MONITOR_TRAP_FLAG",   "Monitor trap flag",                       False),
    _reason(MONITOR_INSTRUCTION, "MONITOR_INSTRUCTION", "MONITOR",                                 True),
    _reason(PAUSE_INSTRUCTION,   "PAUSE_INSTRUCTION",   "PAUSE",                                   True),
    _reason(MCE_DURING_VMENTRY,  "MCE_DURING_VMENTRY",  "VM-entry failure due to machine-check event", False),
    _reason(TPR_BELOW_THRESHOLD, "TPR_BELOW_THRESHOLD", "TPR below threshold",                     False),
    _reason(APIC_ACCESS,         "APIC_ACCESS",         "APIC access",                             False),
    _reason(EOI_INDUCED,         "EOI_INDUCED",         "Virtualized EOI",                         False),
    _reason(GDTR_IDTR,           "GDTR_IDTR",           "Access to GDTR or IDTR",                  True),
    _reason(LDTR_TR,             "LDTR_TR",             "Access to LDTR or TR",                    True),
    _reason(EPT_VIOLATION,       "EPT_VIOLATION",       "EPT violation",                           False),
    _reason(EPT_MISCONFIG,       "EPT_MISCONFIG",       "EPT misconfiguration",                    False),
    _reason(INVEPT,              "INVEPT",              "INVEPT",                                  True),
    _reason(RDTSCP,              "RDTSCP",              "RDTSCP",                                  True),
    _reason(PREEMPTION_TIMER,    "PREEMPTION_TIMER",    "VMX-preemption timer expired",            False),
    _reason(INVVPID,             "INVVPID",             "INVVPID",                                 True),
    _reason(WBINVD,              "WBINVD",              "WBINVD or WBNOINVD",                      True),
    _reason(XSETBV,              "XSETBV",              "XSETBV",                                  True),
    _reason(APIC_WRITE,          "APIC_WRITE",          "APIC write",                              False),
    _reason(RDRAND,              "RDRAND",              "RDRAND",                                  True),
    _reason(INVPCID,             "INVPCID",             "INVPCID",                                 True),
    _reason(VMFUNC,              "VMFUNC",              "VMFUNC",                                  True),
    _reason(ENCLS,               "ENCLS",               "ENCLS",                                   True),
    _reason(RDSEED,              "RDSEED",              "RDSEED",                                  True),
    _reason(PML_FULL,            "PML_FULL",            "Page-modification log full",              False),
    _reason(XSAVES,              "XSAVES",              "XSAVES",                                  True),
    _reason(XRSTORS,             "XRSTORS",             "XRSTORS",                                 True),
    _reason(PCONFIG,             "PCONFIG",             "PCONFIG",                                 True),
    _reason(SPP_EVENT,           "SPP_EVENT",           "SPP-related event",                       False),
    _reason(UMWAIT,              "UMWAIT",              "UMWAIT",                                  True),
    _reason(TPAUSE,              "TPAUSE",              "TPAUSE",                                  True),
    _reason(LOADIWKEY,           "LOADIWKEY",           "LOADIWKEY",                               True),
    _reason(ENCLV,               "ENCLV",               "ENCLV",                                   True),
    _reason(ENQCMD,              "ENQCMD",              "ENQCMD PASID translation failure",        True),
    _reason(ENQCMDS,             "ENQCMDS",             "ENQCMDS PASID translation failure",       True),
    _reason(BUS_LOCK,            "BUS_LOCK",            "Bus lock",                                False),
    _reason(NOTIFY,              "NOTIFY",              "Instruction timeout",                     False),
    _reason(SEAMCALL,            "SEAMCALL",            "SEAMCALL",                                True),
    _reason(TDCALL,              "TDCALL",              "TDCALL",                                  True),
    _reason(RDMSRLIST,           "RDMSRLIST",           "RDMSRLIST",                               True),
    _reason(WRMSRLIST,           "WRMSRLIST",           "WRMSRLIST",                               True),
    _reason(URDMSR,              "URDMSR",              "URDMSR",                                  True),
    _reason(UWRMSR,              "UWRMSR",              "UWRMSR",                                  True),
    _reason(MSR_READ_IMM,        "MSR_READ_IMM",        "RDMSR with immediate operand",            True),
    _reason(MSR_WRITE_IMM,       "MSR_WRITE_IMM",       "WRMSRNS with immediate operand",          True),
)
# fmt: on

REASON: Final[dict[str, Reason]] = {reason.name: reason for reason in REASONS}
BY_NUMBER: Final[dict[int, Reason]] = {reason.number: reason for reason in REASONS}


def reason_name(number: int) -> str:
    """Name a basic exit reason, whatever its number is."""
    known = BY_NUMBER.get(number)
    return known.name if known else f"REASON_{number}"
