"""Loading of the host-state area, by VM exits and by VM entries that fail after their checks of the host.

SDM: "Loading Host State"; "VM-Entry Failures During or After Loading Guest State".
Not modelled: limits and access rights of data segments, which nothing in root operation reads.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import FOREVER
from vtsim.cpu.kernels.contexts import set_context
from vtsim.cpu.kernels.invalidate import drop_contexts
from vtsim.cpu.kernels.rare_msrs import LOADING, load_rare_host_msrs
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs.kernels.values import EFER_LMA, EFER_LME

# fmt: off
CR0_KEPT: int = 1 << 4 | 1 << 29 | 1 << 30 | 0x1FF80000 | 1 << 17 | 0xFFC0    # ET, NW, CD and reserved bits
# fmt: on


@kernel
def load_host_state(m: Record, a: Arena) -> None:
    """Leave non-root operation, or never reach it: load what the host-state area of the current VMCS holds.

    SDM: "Loading Host State".
    """
    at = m[s.VMCS]
    vmcs = a[at : at + 512]
    controls = vmcs[v.EXIT_CONTROLS]
    m[s.NONROOT] = 0
    m[s.MODE] = 0
    m[s.PENDING] = 0
    m[s.VIRTUAL_PENDING] = 0
    m[s.IRET_UNBLOCKED] = 0
    m[s.INJECTED] = 0
    m[s.HALTED] = 0
    m[s.INTERRUPT_SHADOW] = 0
    m[s.TIMER_DEADLINE] = FOREVER
    m[s.PRIVILEGE] = o.R0
    m[s.OWNER] = m[s.HOST_OWNER]
    m[s.ACTIVITY] = o.EXIT_DISPATCH
    m[s.CR0] = (m[s.CR0] & CR0_KEPT) | (vmcs[v.HOST_CR0] & ~CR0_KEPT)
    m[s.CR3] = vmcs[v.HOST_CR3]
    m[s.CR4] = vmcs[v.HOST_CR4]
    for n in range(6):
        m[s.ES_SELECTOR + n] = vmcs[v.HOST_ES_SELECTOR + n]
    m[s.LDTR_SELECTOR] = 0
    m[s.TR_SELECTOR] = vmcs[v.HOST_TR_SELECTOR]
    m[s.CS_ACCESS_RIGHTS] = 0xA09B if controls & b.EXIT_HOST_ADDRESS_SPACE_SIZE else 0xC09B
    m[s.SS_ACCESS_RIGHTS] = 0xC093
    m[s.FS_BASE] = vmcs[v.HOST_FS_BASE]
    m[s.GS_BASE] = vmcs[v.HOST_GS_BASE]
    m[s.TR_BASE] = vmcs[v.HOST_TR_BASE]
    m[s.GDTR_BASE] = vmcs[v.HOST_GDTR_BASE]
    m[s.IDTR_BASE] = vmcs[v.HOST_IDTR_BASE]
    m[s.GDTR_LIMIT] = 0xFFFF
    m[s.IDTR_LIMIT] = 0xFFFF
    m[s.SYSENTER_CS] = vmcs[v.HOST_IA32_SYSENTER_CS]
    m[s.SYSENTER_ESP] = vmcs[v.HOST_IA32_SYSENTER_ESP]
    m[s.SYSENTER_EIP] = vmcs[v.HOST_IA32_SYSENTER_EIP]
    m[s.GPR + s.RSP] = vmcs[v.HOST_RSP]
    m[s.RIP] = vmcs[v.HOST_RIP]
    m[s.RFLAGS] = 2
    m[s.DR7] = 0x400
    m[s.DEBUGCTL] = 0
    if controls & b.EXIT_LOAD_IA32_EFER:
        m[s.EFER] = vmcs[v.HOST_IA32_EFER]
    elif controls & b.EXIT_HOST_ADDRESS_SPACE_SIZE:
        m[s.EFER] |= EFER_LMA | EFER_LME
    else:
        m[s.EFER] &= ~(EFER_LMA | EFER_LME)
    if controls & b.EXIT_LOAD_IA32_PAT:
        m[s.PAT] = vmcs[v.HOST_IA32_PAT]
    if controls & LOADING:
        load_rare_host_msrs(m, a, at, controls)
    if m[s.VPID] == 0:
        drop_contexts(m, a, 0xFFFF, 0, True)
    set_context(m, a)
