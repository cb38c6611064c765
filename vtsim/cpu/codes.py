"""Numbers that kernels hand each other: how an op ended, why the engine stopped, event types, vectors, flags.

SDM: "Event Injection"; "Exceptions and Interrupts".
"""

from __future__ import annotations

# fmt: off
# how an op ended
NEXT, JUMPED, EVENT, STOPPED, AGAIN = range(5)
# why the engine stopped
(RUNNING, HORIZON, BUDGET, PLATFORM_HOOK, PROGRAM_END, TRIPLE_FAULTED, MODEL_FAULT, TRACE_FULL, OUT_OF_MEMORY,
 ENTRY_FAILED, DEVICE_READ, DEVICE_WRITE, PORT_READ, PORT_WRITE, SHUTDOWN, UNDECODED,
 WINDOW_EMPTY) = range(17)
STOPS = ("running", "horizon", "op budget", "platform hook", "end of program", "triple fault", "model fault",
         "trace full", "out of memory", "VM-entry failure", "device read", "device write", "port read", "port write",
         "shutdown", "undecoded", "window empty")
# event types of interruption information
EXTERNAL, NMI_EVENT, HARDWARE_EXCEPTION, SOFTWARE_INTERRUPT, PRIVILEGED_EXCEPTION, SOFTWARE_EXCEPTION = 0, 2, 3, 4, 5, 6
DE, DB, BP, OF, BR, UD, NM, DF, TS, NP, SS, GP, PF, AC, VE = 0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 17, 20
VALID = 1 << 31
ERROR_VALID = 1 << 11
RF_IF, RF_TF, RF_NT, RF_RF = 1 << 9, 1 << 8, 1 << 14, 1 << 16
FOREVER = 1 << 62
RF_CF, RF_PF, RF_AF, RF_ZF, RF_SF, RF_OF = 1, 4, 16, 64, 128, 1 << 11
# who runs in ring 3 where there is a monitor without VT-x, beside the guest's processes (0)
KERNEL_IN_RING_3, HOST_PROCESS = 1, 2
ARITHMETIC = RF_CF | RF_PF | RF_AF | RF_ZF | RF_SF | RF_OF
# fmt: on
