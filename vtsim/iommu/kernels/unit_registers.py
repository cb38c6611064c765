"""The register file: reads and writes with their access rules, and what writing does.

VT-d: "Software Access to Registers"; "Global Command Register"; "Context Command Register";
"IOTLB Invalidate Register"; "Register-based Invalidation Interface".
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Arena, Record, kernel
from vtsim.iommu import spec as sp
from vtsim.iommu.kernels.invalidation_queue import run_queue
from vtsim.iommu.kernels.second_level import capable, extended
from vtsim.iommu.kernels.unit_caches import drop_all
from vtsim.iommu.kernels.unit_faults import (
    LOW_WORD,
    event_served,
    event_unmasked,
    faults_cleared,
    register_low,
    set_unit_register,
)
from vtsim.iommu.kernels.unit_invalidation import forget_contexts, forget_everything, forget_translations
from vtsim.iommu.kernels.unit_memory import flush_writes
from vtsim.iommu.kernels.virtual_commands import virtual_command
from vtsim.iommu.state import (
    CLEARED,
    FAULT_EVENT,
    FAULT_REGISTERS,
    HIDDEN,
    INTERRUPT_ENTRIES,
    INTERRUPT_TABLE,
    INVALIDATION_EVENT,
    PAGE_REQUEST_EVENT,
    PROTECTING,
    REGISTERS,
    ROOT_TABLE,
    WRITABLE,
)

# fmt: off
ESRTPS: Final = -(1 << 63)
ESIRTPS: Final = 1 << 62
GRANULARITY_CLEAR: Final = ~(3 << sp.CAIG)
PERFORMED_CLEAR: Final = ~(3 << sp.IAIG)
# fmt: on


@kernel
def read_unit_register(u: Record, offset: int, size: int) -> int:
    """What a read of 4 or 8 bytes returns; of another size, not aligned or outside the file: all ones."""
    if (size != 4 and size != 8) or offset & (size - 1) != 0 or offset < 0 or offset >= sp.REGISTER_BYTES:
        return -1 if size == 8 else LOW_WORD
    value = u[REGISTERS + (offset >> 3)] & ~u[HIDDEN + (offset >> 3)]
    if size == 4:
        value = (value >> ((offset & 4) << 3)) & LOW_WORD
    return value


@kernel
def write_unit_register(u: Record, a: Arena, offset: int, size: int, value: int) -> None:
    """Write 4 or 8 bytes by the access rules of each bit and do what the register is for; others are ignored."""
    if (size != 4 and size != 8) or offset & (size - 1) != 0 or offset < 0 or offset >= sp.REGISTER_BYTES:
        return
    write_half(u, a, offset, value & LOW_WORD)
    if size == 8:
        write_half(u, a, offset + 4, (value >> 32) & LOW_WORD)


@kernel
def write_half(u: Record, a: Arena, offset: int, value: int) -> None:
    """Write an aligned 32-bit half."""
    shift = (offset & 4) << 3
    word = offset >> 3
    old = register_low(u, offset)
    writable = (u[WRITABLE + word] >> shift) & LOW_WORD
    clears = (u[CLEARED + word] >> shift) & LOW_WORD
    set_unit_register(u, offset, ((old & ~writable) | (value & writable)) & ~(value & clears))
    if offset == sp.GCMD:
        command(u, a, value)
    elif offset == sp.CCMD + 4:
        context_command(u)
    elif offset == sp.IOTLB + 4:
        iotlb_command(u)
    elif offset == sp.FSTS:
        faults_cleared(u)
        run_queue(u, a)
    elif offset == sp.FECTL:
        event_unmasked(u, FAULT_EVENT)
    elif offset == sp.IECTL:
        event_unmasked(u, INVALIDATION_EVENT)
    elif offset == sp.PECTL:
        event_unmasked(u, PAGE_REQUEST_EVENT)
    elif offset == sp.ICS:
        if register_low(u, sp.ICS) & sp.IWC == 0:
            event_served(u, INVALIDATION_EVENT)
    elif offset == sp.PRS:
        if register_low(u, sp.PRS) & (sp.PRS_PPR | sp.PRS_PRO) == 0:
            event_served(u, PAGE_REQUEST_EVENT)
    elif offset == sp.IQT:
        run_queue(u, a)
    elif offset == sp.PMEN:
        enabled = value & sp.EPM if capable(u, sp.CAP_PLMR | sp.CAP_PHMR) else 0
        set_unit_register(u, sp.PMEN, enabled | enabled >> 31)
        u[PROTECTING] = enabled >> 31
    elif offset == sp.VCMD + 4:
        virtual_command(u)
    elif offset >= sp.FAULT_OFFSET and offset < sp.FAULT_OFFSET + 16 * u[FAULT_REGISTERS]:
        faults_cleared(u)


@kernel
def command(u: Record, a: Arena, value: int) -> None:
    """The global command register: one-shot commands are done at once, and the status register tells."""
    status = register_low(u, sp.GSTS)
    if value & sp.SRTP != 0:
        u[ROOT_TABLE] = u[REGISTERS + (sp.RTADDR >> 3)]
        status |= sp.SRTP
        if capable(u, ESRTPS):
            forget_everything(u)
    if value & sp.SIRTP != 0 and extended(u, sp.ECAP_IR):
        u[INTERRUPT_TABLE] = u[REGISTERS + (sp.IRTA >> 3)]
        status |= sp.SIRTP
        if capable(u, ESIRTPS):
            drop_all(u, INTERRUPT_ENTRIES)
    if value & sp.WBF != 0:
        flush_writes(u)
    if status & sp.TE != 0 and value & sp.TE == 0 and extended(u, sp.ECAP_SMTS):
        forget_everything(u)
    if status & sp.IRE != 0 and value & sp.IRE == 0 and capable(u, ESIRTPS):
        drop_all(u, INTERRUPT_ENTRIES)
    kept = sp.TE
    if extended(u, sp.ECAP_QI):
        kept |= sp.QIE
    if extended(u, sp.ECAP_IR):
        kept |= sp.IRE | sp.CFI
    if status & sp.QIE != 0 and value & sp.QIE == 0:
        u[REGISTERS + (sp.IQH >> 3)] = 0
    set_unit_register(u, sp.GSTS, (status & ~kept) | (value & kept))
    run_queue(u, a)


@kernel
def by_registers(u: Record) -> bool:
    """May registers ask for invalidations? Not while the queue is on, and in legacy mode only."""
    return register_low(u, sp.GSTS) & sp.QIE == 0 and (u[ROOT_TABLE] >> 10) & 3 == sp.TTM_LEGACY


@kernel
def is_beyond_mask(u: Record, mask_bits: int) -> bool:
    """Is an address mask more than the unit supports, where it supports any?"""
    return capable(u, sp.CAP_PSI) and mask_bits > (u[REGISTERS + (sp.CAP >> 3)] >> sp.CAP_MAMV) & 0x3F


@kernel
def context_command(u: Record) -> None:
    """Invalidate the context cache if ICC is set, say in CAIG what was done, and clear ICC; only in legacy mode."""
    at = REGISTERS + (sp.CCMD >> 3)
    word = u[at]
    if word & sp.ICC == 0:
        return
    asked = (word >> sp.CIRG) & 3
    done = 0
    if asked != 0 and by_registers(u):
        done = forget_contexts(u, asked, word & 0xFFFF, (word >> 16) & 0xFFFF, (word >> 32) & 3)
    u[at] = (word & ~sp.ICC & GRANULARITY_CLEAR) | done << sp.CAIG


@kernel
def iotlb_command(u: Record) -> None:
    """Invalidate IOTLBs if IVT is set, say in IAIG what was done, and clear IVT; only in legacy mode."""
    at = REGISTERS + (sp.IOTLB >> 3)
    word = u[at]
    if word & sp.IVT == 0:
        return
    address = u[REGISTERS + (sp.IVA >> 3)]
    asked = (word >> sp.IIRG) & 3
    done = 0
    if asked != 0 and by_registers(u) and not (asked == sp.FINEST_SELECTIVE and is_beyond_mask(u, address & 0x3F)):
        domain = (word >> 32) & 0xFFFF
        done = forget_translations(u, asked, domain, address >> 12, address & 0x3F, address & 0x40 != 0)
    u[at] = (word & ~sp.IVT & PERFORMED_CLEAR) | done << sp.IAIG
