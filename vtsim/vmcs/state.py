"""Where a VMCS lives: the header word, field slots, then the data that the processor keeps for itself.

SDM: "Format of the VMCS Region".
"""

from __future__ import annotations

from typing import Final

# fmt: off
# Implementation-specific VMCS data, behind the field slots of a VMCS frame's 512 words.
(V_OWNER, V_LAUNCHED, V_EXIT_AT, V_EXIT_RIP, V_EXIT_REASON, V_REGISTERS, V_DIGEST_APPLICATION, V_DIGEST_KERNEL, V_BELOW,
 V_HANDLED, V_REPLAY, V_TRACE_NAME, V_POINTER, V_SESSION, V_AGILE, V_DIGEST_EXCEPTION) = range(256, 272)
# V_REGISTERS: host-physical address of the general registers that the hypervisor keeps for the guest, by number.
# Arena offset of the log of what its guest sees (0 none); what the guest waits for since an exit: op (0 none), of what,
# at which RIP.
(V_SEEN, V_AWAITED, V_AWAITED_OF, V_AWAITED_AT) = range(280, 284)
# V_AGILE stands for a control that no processor has: CR3 names a shadow table; or with CR3_SWITCHES the guest's own
# root, by its host-physical address.
# V_CR3_LIST is a field that none has: host-physical address of the CR3 that the guest believes in, which the processor
# stores, and of CR3_PAIRS pairs behind it: CR3 that the guest loads, and what CR3 then holds (0: no pair).
V_CR3_LIST: Final = 284
CR3_PAIRS: Final = 4
# Which bits of CR0 and CR4 the guest's translations were worked out with that say what an access may do.
V_CONDITIONS: Final = 285
CR3_SWITCHES: Final = 1 << 60
# Groups of checks (`vtsim.vmcs.groups`) that held when they were last made and whose fields were not written since; the
# controls that guest checks depend on, as they were then; the check that failed the last VM entry, 0 if none.
(V_CHECKED, V_CHECKED_MODE, V_FAILED_CHECK) = range(272, 275)
# The header word: revision identifier (31 bits), shadow-VMCS indicator, VMX-abort indicator (32 bits).
V_REVISION: Final = 0
REVISION: Final = 0x7FFF_FFFF
SHADOW: Final = 1 << 31
ABORT_SHIFT: Final = 32
CLEAR, LAUNCHED = range(2)
# fmt: on
