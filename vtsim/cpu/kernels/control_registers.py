"""Control registers: reads, writes, CLTS and LMSW, and what a change drops.

SDM: "Guest/Host Masks and Read Shadows for CR0 and CR4"; "CR3-Target Controls".
Not modelled: CR0 and CR4 consistency faults in non-root operation; PAE page-directory-pointer loads.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import load, store
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import GP, JUMPED, NEXT
from vtsim.cpu.kernels.apic import write_register
from vtsim.cpu.kernels.contexts import CR4_PCIDE, set_context
from vtsim.cpu.kernels.digest import saw
from vtsim.cpu.kernels.exceptions import raise_exception
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.invalidate import drop_contexts
from vtsim.cpu.kernels.register_checks import CR0_DEFINED, ET, cr0_refused, cr4_refused
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v

# fmt: off
CR0_PAGING = (1 << 31) | (1 << 16) | 1
CR4_PAGING = (1 << 4) | (1 << 5) | (1 << 7) | (1 << 12) | (1 << 17) | (1 << 20) | (1 << 21) | (1 << 22)
# fmt: on


@kernel
def flush_linear(m: Record, a: Arena) -> None:
    """Drop every linear and combined mapping of the current VPID: paging-mode bits changed."""
    drop_contexts(m, a, 0xFFFF, m[s.CONTEXT_KEY] & 0xFFFF, True)


@kernel
def move_cr(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """MOV to and from CR0, CR2, CR3, CR4, CR8; CLTS; LMSW.

    SDM: "Guest/Host Masks and Read Shadows for CR0 and CR4"; "CR3-Target Controls".
    """
    register = a[r + o.ROW_R1]
    number = a[r + o.ROW_IMM]
    at = m[s.VMCS]
    nonroot = m[s.NONROOT] != 0
    primary = a[at + v.PRIMARY_PROC_CONTROLS] if nonroot else 0
    kind = 0
    if op == o.MOV_FROM_CR:
        kind = 1
    elif op == o.CLTS:
        kind = 2
        number = 0
    elif op == o.LMSW:
        kind = 3
        number = 0
    gpr = register & 15
    q = number | kind << 4 | (gpr << 8 if kind < 2 else 0)
    if op == o.MOV_FROM_CR:
        if number == 0 or number == 4:
            slot = s.CR0 if number == 0 else s.CR4
            value = m[slot]
            if nonroot:
                mask = a[at + (v.CR0_GUEST_HOST_MASK if number == 0 else v.CR4_GUEST_HOST_MASK)]
                shadow = a[at + (v.CR0_READ_SHADOW if number == 0 else v.CR4_READ_SHADOW)]
                value = (value & ~mask) | (shadow & mask)
            saw(m, value)
        elif number == 3:
            if primary & b.CR3_STORE_EXITING:
                vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                return JUMPED
            value = m[s.CR3]
        elif number == 8:
            if primary & b.CR8_STORE_EXITING:
                vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                return JUMPED
            value = m[s.CR8]
            if primary & b.USE_TPR_SHADOW:
                value = (load(a, a[at + v.VIRTUAL_APIC_ADDRESS] + 0x80, 4) >> 4) & 15
        else:
            value = m[s.CR2]
        if number == 8:
            m[s.CYCLE] += m[s.P_MOV_FROM_CR8] - m[s.PRICE + o.MOV_FROM_CR]
        m[s.GPR + gpr] = value
        return NEXT
    value = m[s.GPR + gpr]
    if op == o.CLTS:
        value = m[s.CR0] & ~8
        if nonroot:
            mask = a[at + v.CR0_GUEST_HOST_MASK]
            if mask & 8:
                if a[at + v.CR0_READ_SHADOW] & 8:
                    vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                    return JUMPED
                return NEXT
        m[s.CR0] = value
        return NEXT
    if op == o.LMSW:
        q |= (value & 0xFFFF) << 16
        sets_pe = value & 1
        value = (m[s.CR0] & ~14) | (value & 15) | (m[s.CR0] & 1)
        if nonroot:
            mask = a[at + v.CR0_GUEST_HOST_MASK] & 15
            shadow = a[at + v.CR0_READ_SHADOW]
            if (value ^ shadow) & mask & 14 or (mask & 1 and sets_pe and shadow & 1 == 0):
                vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                return JUMPED
            value = (m[s.CR0] & (mask | ~15)) | (value & 15 & ~mask)
        m[s.CR0] = value
        return NEXT
    if number == 0 or number == 4:
        slot = s.CR0 if number == 0 else s.CR4
        old = m[slot]
        if nonroot:
            mask = a[at + (v.CR0_GUEST_HOST_MASK if number == 0 else v.CR4_GUEST_HOST_MASK)]
            shadow = a[at + (v.CR0_READ_SHADOW if number == 0 else v.CR4_READ_SHADOW)]
            if (value ^ shadow) & mask:
                vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                return JUMPED
            value = (old & mask) | (value & ~mask)
        elif cr0_refused(m, a, value) if number == 0 else cr4_refused(m, a, value):
            return raise_exception(m, GP, 1, 0)
        if number == 0:
            value = (value & CR0_DEFINED) | ET
        m[s.CYCLE] += m[s.P_MOV_TO_CR + number]
        m[slot] = value
        if (old ^ value) & (CR0_PAGING if number == 0 else CR4_PAGING):
            flush_linear(m, a)
        set_context(m, a)
        return NEXT
    if number == 3:
        if primary & b.CR3_LOAD_EXITING:
            listed = False
            for n in range(min(a[at + v.CR3_TARGET_COUNT], 4)):
                listed = listed or a[at + v.CR3_TARGET_VALUE_0 + n] == value
            if not listed:
                vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                return JUMPED
        m[s.CYCLE] += m[s.P_MOV_TO_CR3_NOFLUSH if value < 0 else s.P_MOV_TO_CR + 3]
        load_cr3(m, a, value)
        return NEXT
    if number == 8:
        if primary & b.CR8_LOAD_EXITING:
            vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
            return JUMPED
        m[s.CYCLE] += m[s.P_MOV_TO_CR + 8]
        if primary & b.USE_TPR_SHADOW:
            store(a, a[at + v.VIRTUAL_APIC_ADDRESS] + 0x80, 4, (value & 15) << 4)
            if value & 15 < a[at + v.TPR_THRESHOLD] & 15:
                m[s.RIP] += m[s.OP_LENGTH]
                m[s.IN_FLIGHT] = 0  # trap-like: the op has retired
                vm_exit(m, a, x.TPR_BELOW_THRESHOLD, 0, m[s.OP_LENGTH])
                return JUMPED
            return NEXT
        write_register(m, a, 8, (value & 15) << 4)
        return NEXT
    m[s.CYCLE] += m[s.P_MOV_TO_CR + 2]
    m[s.CR2] = value
    return NEXT


@kernel
def load_cr3(m: Record, a: Arena, value: int) -> None:
    """Load CR3 and drop what that invalidates: nothing global, and nothing at all with PCIDs and bit 63 set.

    SDM: "Operations that Invalidate TLBs and Paging-Structure Caches".
    """
    keep_all = m[s.CR4] & CR4_PCIDE != 0 and value < 0
    m[s.CR3] = value & 0x7FFF_FFFF_FFFF_FFFF
    set_context(m, a)
    if not keep_all:
        drop_contexts(m, a, -1, m[s.CONTEXT_KEY], False)
