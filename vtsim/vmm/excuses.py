"""Exit reasons that a personality has no path for, each with why it cannot be reached.

One that is reached all the same ends the VM with that sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vtsim.vmcs import reasons as x

NESTED: Final = "CPUID tells the guest that there is no VMX"
NOT_ASKED: Final = "the control that makes it exit is clear"
NO_SUCH: Final = "no processor of the shipped profiles has the instruction"
NO_EVENT: Final = "no such event is modelled"

# fmt: off
ALWAYS: Final[dict[int, str]] = {
    x.INIT_SIGNAL: NO_EVENT, x.SIPI_SIGNAL: NO_EVENT, x.IO_SMI: NO_EVENT, x.OTHER_SMI: NO_EVENT,
    x.NMI_WINDOW: NO_EVENT, x.TASK_SWITCH: "task gates are not modelled", x.GETSEC: "CR4.SMXE is clear, so it is #UD",
    x.RSM: "outside of system-management mode it is #UD", x.MCE_DURING_VMENTRY: NO_EVENT,
    x.MSR_LOAD_FAIL: "MSR areas are empty",
    x.VMCLEAR: NESTED, x.VMLAUNCH: NESTED, x.VMPTRLD: NESTED, x.VMPTRST: NESTED, x.VMREAD: NESTED, x.VMRESUME: NESTED,
    x.VMWRITE: NESTED, x.VMOFF: NESTED, x.VMON: NESTED, x.INVEPT: NESTED, x.INVVPID: NESTED,
    x.APIC_ACCESS: NOT_ASKED, x.EOI_INDUCED: NOT_ASKED, x.GDTR_IDTR: NOT_ASKED, x.LDTR_TR: NOT_ASKED,
    x.PREEMPTION_TIMER: NOT_ASKED, x.APIC_WRITE: NOT_ASKED, x.RDRAND: NOT_ASKED, x.RDSEED: NOT_ASKED,
    x.XSAVES: NOT_ASKED, x.XRSTORS: NOT_ASKED, x.ENCLS: NOT_ASKED, x.SPP_EVENT: NOT_ASKED, x.BUS_LOCK: NOT_ASKED,
    x.NOTIFY: NOT_ASKED,
    x.PCONFIG: NO_SUCH, x.UMWAIT: NO_SUCH, x.TPAUSE: NO_SUCH, x.LOADIWKEY: NO_SUCH, x.ENCLV: NO_SUCH, x.ENQCMD: NO_SUCH,
    x.ENQCMDS: NO_SUCH, x.SEAMCALL: NO_SUCH, x.TDCALL: NO_SUCH, x.RDMSRLIST: NO_SUCH, x.WRMSRLIST: NO_SUCH,
    x.URDMSR: NO_SUCH, x.UWRMSR: NO_SUCH, x.MSR_READ_IMM: NO_SUCH, x.MSR_WRITE_IMM: NO_SUCH,
}
EXCUSED: Final[Mapping[str, Mapping[int, str]]] = {
    "kvm":     ALWAYS,
    "minimal": ALWAYS | {x.DR_ACCESS: NOT_ASKED, x.RDPMC: NOT_ASKED, x.MWAIT_INSTRUCTION: NOT_ASKED,
                         x.MONITOR_INSTRUCTION: NOT_ASKED},
}
# fmt: on
