"""Values that MOV to CR0 and CR4 refuse with #GP.

SDM: "Control Registers"; "Restrictions on VMX Operation".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.vmx_capabilities import HIGH_32, cr0_supported, cr4_supported

# fmt: off
PE, ET, WP, NW, CD, PG = 1, 1 << 4, 1 << 16, 1 << 29, 1 << 30, 1 << 31
CR0_DEFINED: int = 0xE005003F      # writes of other bits are ignored
PAE, LA57, PCIDE, CET = 1 << 5, 1 << 12, 1 << 17, 1 << 23
LME, LMA, CS_L = 1 << 8, 1 << 10, 1 << 13
# fmt: on


@kernel
def cr0_refused(m: Record, a: Arena, value: int) -> bool:
    """Does CR0 refuse this value in root operation, or outside VMX operation?

    SDM: "Control Registers"; "Restrictions on VMX Operation".
    """
    if value & HIGH_32:
        return True
    if cr0_illegal(m, value):
        return True
    return m[s.VMXON] != 0 and not cr0_supported(a, (value & CR0_DEFINED) | ET, 0)


@kernel
def cr0_illegal(m: Record, value: int) -> bool:
    """Is this combination of CR0 bits illegal, in itself or with CR4, EFER and CS?

    SDM: "Control Registers".
    """
    if (value & PG and value & PE == 0) or (value & NW and value & CD == 0):
        return True
    if value & PG == 0 and m[s.CR0] & PG and (m[s.CR4] & PCIDE or (m[s.EFER] & LMA and m[s.CS_ACCESS_RIGHTS] & CS_L)):
        return True
    if value & PG and m[s.CR0] & PG == 0 and m[s.EFER] & LME:
        if m[s.CR4] & PAE == 0 or m[s.CS_ACCESS_RIGHTS] & CS_L:
            return True
    return value & WP == 0 and m[s.CR4] & CET != 0


@kernel
def cr4_refused(m: Record, a: Arena, value: int) -> bool:
    """Does CR4 refuse this value in root operation, or outside VMX operation?

    SDM: "Control Registers"; "Restrictions on VMX Operation".
    """
    changed = m[s.CR4] ^ value
    if value & HIGH_32:
        return True
    if m[s.EFER] & LMA and (value & PAE == 0 or changed & LA57):
        return True
    if changed & value & PCIDE and (m[s.EFER] & LMA == 0 or m[s.CR3] & 0xFFF):
        return True
    if value & CET and m[s.CR0] & WP == 0:
        return True
    return m[s.VMXON] != 0 and not cr4_supported(a, value)
