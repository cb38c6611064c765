"""Virtual commands: a unit that software emulates gives PASIDs to the driver of a guest, and takes them back.

VT-d: "Virtual Command Register"; "Virtual Command Response Register".
Not modelled: responses that take time: a command is done when its register is written.
"""

from __future__ import annotations

from vtsim.base.jit import Record, kernel
from vtsim.iommu import spec as sp
from vtsim.iommu.state import MOST_VIRTUAL_PASIDS, REGISTERS, VIRTUAL_PASIDS

OPERAND: int = 0xF_FFFF


@kernel
def virtual_command(u: Record) -> None:
    """Do what the virtual command register says; status and result go to its response. PASID 0 is kept back."""
    if u[VIRTUAL_PASIDS] == 0:
        return
    word = u[REGISTERS + (sp.VCMD >> 3)]
    asked = word & 0xFF
    status = sp.VC_UNKNOWN
    result = 0
    if asked == sp.VCMD_ALLOCATE:
        status = sp.VC_NO_PASID
        for pasid in range(1, MOST_VIRTUAL_PASIDS):
            if not is_given(u, pasid):
                status = sp.VC_SUCCESS
                result = pasid
                turn_given(u, pasid)
                break
    elif asked == sp.VCMD_FREE:
        pasid = (word >> sp.VC_OPERAND) & OPERAND
        status = sp.VC_NO_PASID
        if pasid < MOST_VIRTUAL_PASIDS and is_given(u, pasid):
            status = sp.VC_SUCCESS
            turn_given(u, pasid)
    u[REGISTERS + (sp.VCRSP >> 3)] = result << sp.VC_OPERAND | status << sp.VC_STATUS


@kernel
def is_given(u: Record, pasid: int) -> bool:
    """Has this PASID been given and not come back?"""
    return (u[u[VIRTUAL_PASIDS] + (pasid >> 6)] >> (pasid & 63)) & 1 != 0


@kernel
def turn_given(u: Record, pasid: int) -> None:
    """Mark a PASID that was free as given, or one that was given as free."""
    at = u[VIRTUAL_PASIDS] + (pasid >> 6)
    bit = pasid & 63
    u[at] ^= 1 << bit if bit < 63 else -(1 << 63)
