"""Checks on guest descriptor-table registers, RIP, RFLAGS, SSP, non-register state and PDPTEs.

SDM: "Checks on Guest Descriptor-Table Registers"; "Checks on Guest RIP, RFLAGS, and SSP".
SDM: "Checks on Guest Non-Register State"; "Checks on Guest Page-Directory-Pointer-Table Entries".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, kernel
from vtsim.base.memory import is_memory, load, load_word
from vtsim.vmcs import bits as b
from vtsim.vmcs import checks as c
from vtsim.vmcs import events as ev
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.kernels.execution_controls import effective_secondary
from vtsim.vmcs.kernels.guest_segments import LONG, RFLAGS_VM
from vtsim.vmcs.kernels.values import (
    BASIC,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EBX,
    MISC,
    bad_address,
    capability,
    cpuid_register,
    is_canonical,
    linear_bits,
)

# fmt: off
RFLAGS_RESERVED: int = ~0x3F7FFF | 1 << 15 | 1 << 5 | 1 << 3
RFLAGS_ONE, RFLAGS_TF, RFLAGS_IF = 1 << 1, 1 << 8, 1 << 9
DEBUGCTL_BTF: int = 1 << 1
PENDING_BREAKPOINT, PENDING_STEP, PENDING_RTM = 1 << 12, 1 << 14, 1 << 16
PENDING_DEFINED: int = 0xF | PENDING_BREAKPOINT | PENDING_STEP | PENDING_RTM
PENDING_BUS_LOCK: int = 1 << 11
PDPTE_RESERVED: int = 0x1E6
SHADOW_STATE: int = ev.BLOCKING_BY_STI | ev.BLOCKING_BY_MOV_SS
HAS_SGX, HAS_RTM = 1 << 2, 1 << 11
HAS_BUS_LOCK: int = 1 << 24
DB, MC = 1, 18
# fmt: on


@kernel
def descriptor_tables_failure(a: Arena, at: int) -> int:
    """The first failed check on GDTR and IDTR.

    SDM: "Checks on Guest Descriptor-Table Registers".
    """
    bits = linear_bits(a)
    if not is_canonical(a[at + v.GUEST_GDTR_BASE], bits):
        return c.GDTR_BASE
    if not is_canonical(a[at + v.GUEST_IDTR_BASE], bits):
        return c.IDTR_BASE
    if a[at + v.GUEST_GDTR_LIMIT] >> 16:
        return c.GDTR_LIMIT
    if a[at + v.GUEST_IDTR_LIMIT] >> 16:
        return c.IDTR_LIMIT
    return c.NONE


@kernel
def flow_failure(a: Arena, at: int) -> int:
    """The first failed check on RIP, RFLAGS and SSP.

    SDM: "Checks on Guest RIP, RFLAGS, and SSP".
    """
    controls = a[at + v.ENTRY_CONTROLS]
    flags = a[at + v.GUEST_RFLAGS]
    long_mode = controls & b.ENTRY_IA32E_MODE_GUEST != 0
    wide = long_mode and a[at + v.GUEST_CS_ACCESS_RIGHTS] & LONG != 0
    if not wide:
        if a[at + v.GUEST_RIP] >> 32:
            return c.RIP_HIGH
    else:
        high = a[at + v.GUEST_RIP] >> linear_bits(a)  # one bit less than a canonical address is held to
        if high != 0 and high != -1:
            return c.RIP_LINEAR
    if flags & RFLAGS_RESERVED or flags & RFLAGS_ONE == 0:
        return c.RFLAGS_RESERVED
    if flags & RFLAGS_VM and (long_mode or a[at + v.GUEST_CR0] & CR0_PE == 0):
        return c.RFLAGS_VM
    information = a[at + v.ENTRY_INTERRUPTION_INFORMATION]
    if information & ev.VALID and information & ev.TYPE == ev.EXTERNAL and flags & RFLAGS_IF == 0:
        return c.RFLAGS_IF
    if controls & b.ENTRY_LOAD_CET_STATE:
        if a[at + v.GUEST_SSP] & 3:
            return c.SSP_ALIGNMENT
        high = a[at + v.GUEST_SSP] >> (linear_bits(a) if wide else 32)
        if high != 0 and (high != -1 or not wide):
            return c.SSP_ADDRESS
    return c.NONE


@kernel
def activity_allows(state: int, information: int) -> bool:
    """May this event be injected into this activity state?

    SDM: "Checks on Guest Non-Register State".
    """
    vector = information & ev.VECTOR
    kind = (information & ev.TYPE) >> ev.TYPE_SHIFT
    if state == ev.HLT_STATE:
        if kind == ev.HARDWARE_EXCEPTION:
            return vector == DB or vector == MC
        return kind == ev.EXTERNAL or kind == ev.NMI or (kind == ev.OTHER_EVENT and vector == 0)
    if state == ev.SHUTDOWN:
        return kind == ev.NMI or (kind == ev.HARDWARE_EXCEPTION and vector == MC)
    return state == ev.ACTIVE


@kernel
def non_register_failure(a: Arena, at: int) -> int:
    """The first failed check on activity, interruptibility and pending debug exceptions.

    SDM: "Checks on Guest Non-Register State".
    Not modelled: processors that inject an NMI in spite of blocking by STI.
    """
    state = a[at + v.GUEST_ACTIVITY_STATE]
    blocking = a[at + v.GUEST_INTERRUPTIBILITY_STATE]
    information = a[at + v.ENTRY_INTERRUPTION_INFORMATION]
    injects = information & ev.VALID != 0
    kind = (information & ev.TYPE) >> ev.TYPE_SHIFT
    smm = a[at + v.ENTRY_CONTROLS] & b.ENTRY_TO_SMM != 0
    if state > ev.WAIT_FOR_SIPI or (state > 0 and (capability(a, MISC) >> (5 + state)) & 1 == 0):
        return c.ACTIVITY_VALUE
    if state == ev.HLT_STATE and a[at + v.GUEST_SS_ACCESS_RIGHTS] & 0x60:
        return c.ACTIVITY_HLT_DPL
    if state and blocking & SHADOW_STATE:
        return c.ACTIVITY_BLOCKING
    if injects and not activity_allows(state, information):
        return c.ACTIVITY_EVENT
    if smm and state == ev.WAIT_FOR_SIPI:
        return c.ACTIVITY_SMM
    if blocking >> 5:
        return c.BLOCKING_RESERVED
    if blocking & SHADOW_STATE == SHADOW_STATE:
        return c.BLOCKING_BOTH
    if blocking & ev.BLOCKING_BY_STI and a[at + v.GUEST_RFLAGS] & RFLAGS_IF == 0:
        return c.BLOCKING_STI_IF
    if injects and kind == ev.EXTERNAL and blocking & SHADOW_STATE:
        return c.BLOCKING_EXTERNAL
    if injects and kind == ev.NMI and blocking & ev.BLOCKING_BY_MOV_SS:
        return c.BLOCKING_NMI
    if injects and kind == ev.NMI and blocking & ev.BLOCKING_BY_STI:
        return c.BLOCKING_NMI_BY_STI
    if blocking & ev.BLOCKING_BY_SMI and not smm:
        return c.BLOCKING_SMI
    if smm and blocking & ev.BLOCKING_BY_SMI == 0:
        return c.BLOCKING_SMM_ENTRY
    if injects and kind == ev.NMI and blocking & ev.BLOCKING_BY_NMI and a[at + v.PIN_CONTROLS] & b.VIRTUAL_NMIS:
        return c.BLOCKING_VIRTUAL_NMI
    if blocking & ev.ENCLAVE_INTERRUPTION:
        if blocking & ev.BLOCKING_BY_MOV_SS or cpuid_register(a, 7, 0, EBX) & HAS_SGX == 0:
            return c.BLOCKING_ENCLAVE
    return pending_debug_failure(a, at, state, blocking)


@kernel
def pending_debug_failure(a: Arena, at: int, state: int, blocking: int) -> int:
    """The first failed check on pending debug exceptions.

    SDM: "Checks on Guest Non-Register State".
    """
    pending = a[at + v.GUEST_PENDING_DEBUG_EXCEPTIONS]
    if pending:
        defined = PENDING_DEFINED
        if pending & PENDING_BUS_LOCK and cpuid_register(a, 7, 0, 2) & HAS_BUS_LOCK:
            defined |= PENDING_BUS_LOCK
        if pending & ~defined:
            return c.PENDING_RESERVED
    if state == ev.HLT_STATE or blocking & SHADOW_STATE:
        traps = a[at + v.GUEST_RFLAGS] & RFLAGS_TF != 0 and a[at + v.GUEST_IA32_DEBUGCTL] & DEBUGCTL_BTF == 0
        if traps != (pending & PENDING_STEP != 0):
            return c.PENDING_STEP
    if pending & PENDING_RTM:
        if pending != PENDING_RTM | PENDING_BREAKPOINT or blocking & ev.BLOCKING_BY_MOV_SS:
            return c.PENDING_RTM
        if cpuid_register(a, 7, 0, EBX) & HAS_RTM == 0:
            return c.PENDING_RTM
    return c.NONE


@kernel
def link_pointer_failure(a: Arena, at: int, current: int, beyond: int) -> int:
    """The first failed check on the VMCS link pointer.

    SDM: "Checks on Guest Non-Register State".
    """
    pointer = a[at + v.VMCS_LINK_POINTER]
    if pointer == -1:
        return c.NONE
    if bad_address(pointer, 0xFFF, beyond):
        return c.LINK_ADDRESS
    revision = load(a, pointer, 4) if is_memory(a, pointer) else 0xFFFFFFFF
    if revision & 0x7FFFFFFF != capability(a, BASIC) & 0x7FFFFFFF:
        return c.LINK_REVISION
    if (revision >> 31) & 1 != (effective_secondary(a, at) >> 14) & 1:
        return c.LINK_SHADOW
    if pointer == current:
        return c.LINK_CURRENT
    return c.NONE


@kernel
def uses_pae(a: Arena, at: int) -> bool:
    """Will the guest use PAE paging?"""
    return (
        a[at + v.ENTRY_CONTROLS] & b.ENTRY_IA32E_MODE_GUEST == 0
        and a[at + v.GUEST_CR0] & CR0_PG != 0
        and a[at + v.GUEST_CR4] & CR4_PAE != 0
    )


@kernel
def pdpte(a: Arena, at: int, n: int) -> int:
    """A page-directory-pointer-table entry of a guest with PAE paging: from its field with EPT, else from memory.

    With agile paging CR3 names a shadow table, as without EPT.
    """
    if effective_secondary(a, at) & b.ENABLE_EPT and a[at + h.V_AGILE] == 0:
        return a[at + v.GUEST_PDPTE0 + n]
    address = (a[at + v.GUEST_CR3] & 0xFFFFFFE0) + 8 * n
    return load_word(a, address) if is_memory(a, address) else -1


@kernel
def pdptes_failure(a: Arena, at: int, beyond: int) -> int:
    """The check on page-directory-pointer-table entries, for a guest with PAE paging.

    SDM: "Checks on Guest Page-Directory-Pointer-Table Entries".
    """
    for n in range(4):
        entry = pdpte(a, at, n)
        if entry & 1 and entry & (PDPTE_RESERVED | beyond):
            return c.PDPTE_RESERVED
    return c.NONE
