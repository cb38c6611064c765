"""Control registers: reads, writes, CLTS and LMSW, and what a change drops.

SDM: "Guest/Host Masks and Read Shadows for CR0 and CR4"; "CR3-Target Controls".
Not modelled: CR4 bits that a processor does not have, outside VMX operation.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory, load_word, store_word
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import GP, JUMPED, NEXT, RF_RF, RF_TF
from vtsim.cpu.kernels.access import touch_physical
from vtsim.cpu.kernels.active_controls import secondary_controls
from vtsim.cpu.kernels.apic import write_register
from vtsim.cpu.kernels.apic_virtualization import TPR, after_tpr, virtual_load, virtual_store
from vtsim.cpu.kernels.contexts import CR4_PCIDE, LINEAR_KEY, recorded, set_context
from vtsim.cpu.kernels.ept_walk import AGILE, nested
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.invalidate import drop_contexts
from vtsim.cpu.kernels.modes import set_mode
from vtsim.cpu.kernels.operands import get_register, linear, load_operand, offset_of, segment_of
from vtsim.cpu.kernels.register_checks import (
    CR0_DEFINED,
    ET,
    LMA,
    LME,
    PAE,
    PE,
    PG,
    cr0_illegal,
    cr0_refused,
    cr4_refused,
)
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.cpu.kernels.vmx_capabilities import HIGH_32, cr0_supported
from vtsim.ept.spec import ADDRESS, EPT_READ, Q_FINAL, Q_LINEAR_VALID
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h

# fmt: off
CR0_PAGING = (1 << 31) | (1 << 16) | 1
CR4_PAGING = (1 << 4) | (1 << 5) | (1 << 7) | (1 << 12) | (1 << 17) | (1 << 20) | (1 << 21) | (1 << 22)
# fmt: on


@kernel
def cr_exit(m: Record, a: Arena, qualification: int) -> int:
    """A VM exit for a control-register access; RFLAGS.RF is saved as 0."""
    m[s.RFLAGS] &= ~RF_RF
    vm_exit(m, a, x.CR_ACCESS, qualification, m[s.OP_LENGTH])
    return JUMPED


@kernel
def load_machine_status(m: Record, a: Arena, t: Tags, r: int) -> int:
    """LMSW of decoded code, from a register or memory.

    SDM: "Guest/Host Masks and Read Shadows for CR0 and CR4"; "LMSW—Load Machine Status Word".
    """
    packed = a[r + o.ROW_MEM]
    in_memory = packed & o.MEM_REGISTER == 0
    source = load_operand(m, a, t, r, 2) if in_memory else get_register(m, a[r + o.ROW_R2], 2)
    if in_memory and m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    value = (source & 15) | (m[s.CR0] & 1)
    mask = 0
    if m[s.NONROOT]:
        mask = a[m[s.VMCS] + v.CR0_GUEST_HOST_MASK] & 15
        shadow = a[m[s.VMCS] + v.CR0_READ_SHADOW]
        if (source ^ shadow) & mask & 14 or (mask & 1 and source & 1 and shadow & 1 == 0):
            if in_memory:
                m[s.EXIT_GLA] = linear(m, segment_of(packed), offset_of(m, a, r))
            return cr_exit(m, a, 3 << 4 | (1 << 6 if in_memory else 0) | source << 16)
    old = m[s.CR0]
    m[s.CR0] = (old & (mask | ~15)) | (value & 15 & ~mask)
    if (old ^ m[s.CR0]) & 1:
        flush_linear(m, a)
        set_mode(m)
        set_context(m, a)
        return jump_on(m)
    return NEXT


@kernel
def jump_on(m: Record) -> int:
    """The next instruction may be decoded for another mode: look it up again."""
    m[s.RIP] += m[s.OP_LENGTH]
    return JUMPED


@kernel
def refused_here(m: Record, a: Arena, number: int, value: int) -> bool:
    """Does CR0 or CR4 refuse a value in VMX non-root operation, where nothing exits?

    SDM: "Changes to Instruction Behavior in VMX Non-Root Operation"; "Control Registers".
    """
    if value & HIGH_32:
        return True
    if number == 4:
        return cr4_refused(m, a, value)
    exempt = PE | PG if secondary_controls(m, a) & b.UNRESTRICTED_GUEST else 0
    return cr0_illegal(m, value) or not cr0_supported(a, (value & CR0_DEFINED) | ET, exempt)


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
    decoded = a[r + o.ROW_MEM] & o.MEM_DECODED
    if op == o.LMSW and decoded:
        return load_machine_status(m, a, t, r)
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
        elif number == 3:
            value = m[s.CR3]
            if primary & b.CR3_STORE_EXITING:
                if a[at + h.V_CR3_LIST] == 0:
                    return cr_exit(m, a, q)
                value = listed_word(m, a, t, a[at + h.V_CR3_LIST])
        elif number == 8:
            if primary & b.CR8_STORE_EXITING:
                return cr_exit(m, a, q)
            value = m[s.CR8]
            if primary & b.USE_TPR_SHADOW:
                value = (virtual_load(m, a, TPR, 4) >> 4) & 15
        else:
            value = m[s.CR2]
        if number == 8:
            m[s.CYCLE] += m[s.P_MOV_FROM_CR8] - m[s.PRICE + o.MOV_FROM_CR]
        m[s.GPR + gpr] = value & 0xFFFFFFFF if m[s.MODE] else value
        return NEXT
    value = m[s.GPR + gpr]
    if m[s.MODE]:
        value &= 0xFFFFFFFF
    if op == o.CLTS:
        value = m[s.CR0] & ~8
        if nonroot:
            mask = a[at + v.CR0_GUEST_HOST_MASK]
            if mask & 8:
                if a[at + v.CR0_READ_SHADOW] & 8:
                    return cr_exit(m, a, q)
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
                return cr_exit(m, a, q)
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
                return cr_exit(m, a, q)
            value = (old & mask) | (value & ~mask)
        if recorded(m, a):  # the recorded machine took it; what else its registers held is not recorded
            refused = False
        elif nonroot:
            refused = refused_here(m, a, number, value)
        else:
            refused = cr0_refused(m, a, value) if number == 0 else cr4_refused(m, a, value)
        if refused:
            return raise_exception(m, GP, 1, 0)
        if number == 0:
            value = (value & CR0_DEFINED) | ET
        m[s.CYCLE] += m[s.P_MOV_TO_CR + number]
        m[slot] = value
        if (old ^ value) & (CR0_PAGING if number == 0 else CR4_PAGING):
            flush_linear(m, a)
        if number == 0 and (old ^ value) & (PE | PG):
            change_mode(m)
        if m[s.MODE] and m[s.PAGING_LEVELS] and needs_pdptes(m, old ^ value, number) and not recorded(m, a):
            fault = load_pdptes(m, a, t, m[s.CR3])
            if fault:
                m[slot] = old
                return fault
        set_context(m, a)
        return NEXT
    if number == 3:
        root = 0
        if primary & b.CR3_LOAD_EXITING:
            listed = False
            for n in range(min(a[at + v.CR3_TARGET_COUNT], 4)):
                listed = listed or a[at + v.CR3_TARGET_VALUE_0 + n] == value
            if not listed:
                root = listed_root(m, a, t, value & 0x7FFF_FFFF_FFFF_FFFF) if a[at + h.V_CR3_LIST] else 0
                if root == 0:
                    return cr_exit(m, a, q)
        if decoded and m[s.MODE] == 0 and value & 0x7FFF_FFFF_FFFF_FFFF & (m[s.RESERVED_BITS] | 0x7FF << 52):
            return raise_exception(m, GP, 1, 0)
        if decoded and value < 0 and m[s.CR4] & CR4_PCIDE == 0:
            return raise_exception(m, GP, 1, 0)
        if m[s.MODE] and m[s.CR4] & PAE and m[s.CR0] & PG and m[s.EFER] & LMA == 0 and not recorded(m, a):
            fault = load_pdptes(m, a, t, value)
            if fault:
                return fault
        if root:
            value = (value & ~(ADDRESS | h.CR3_SWITCHES)) | root
        m[s.CYCLE] += m[s.P_MOV_TO_CR3_NOFLUSH if value < 0 else s.P_MOV_TO_CR + 3]
        load_cr3(m, a, value)
        return NEXT
    if number == 8:
        if primary & b.CR8_LOAD_EXITING:
            return cr_exit(m, a, q)
        if value & ~15:
            return raise_exception(m, GP, 1, 0)
        m[s.CYCLE] += m[s.P_MOV_TO_CR + 8]
        if primary & b.USE_TPR_SHADOW:
            virtual_store(m, a, TPR, 4, (value & 15) << 4)
            if after_tpr(m, a):
                m[s.RIP] += m[s.OP_LENGTH]
                m[s.IN_FLIGHT] = 0  # trap-like: the op has retired
                m[s.INTERRUPT_SHADOW] = 0
                if m[s.RFLAGS] & RF_TF:
                    m[s.PENDING_DEBUG] |= 1 << 14
                m[s.RFLAGS] &= ~RF_RF
                vm_exit(m, a, x.TPR_BELOW_THRESHOLD, 0, m[s.OP_LENGTH])
                return JUMPED
            return NEXT
        write_register(m, a, 8, (value & 15) << 4)
        return NEXT
    m[s.CYCLE] += m[s.P_MOV_TO_CR + 2]
    m[s.CR2] = value
    return NEXT


@kernel
def change_mode(m: Record) -> None:
    """CR0.PE or CR0.PG changed: IA-32e mode begins or ends, and the mode follows.

    SDM: "Initializing IA-32e Mode".
    """
    if m[s.CR0] & PG and m[s.EFER] & LME:
        m[s.EFER] |= LMA
    elif m[s.CR0] & PG == 0:
        m[s.EFER] &= ~LMA
    set_mode(m)


@kernel
def needs_pdptes(m: Record, changed: int, number: int) -> bool:
    """Does a write of CR0 or CR4 that changed these bits load the PDPTEs?

    SDM: "PDPTE Registers".
    """
    if m[s.CR4] & PAE == 0 or m[s.CR0] & PG == 0 or m[s.EFER] & LMA:
        return False
    watched = PG | 3 << 29 if number == 0 else PAE | 1 << 4 | 1 << 7 | 1 << 20
    return changed & watched != 0


@kernel
def load_pdptes(m: Record, a: Arena, t: Tags, cr3: int) -> int:
    """Load the four PDPTEs of PAE paging: 0, EVENT for #GP, or JUMPED after an EPT violation.

    With agile paging they are those of the shadow table that CR3 names by its host-physical address.

    SDM: "PDPTE Registers".
    """
    loaded = (m[s.PDPTE0], m[s.PDPTE0 + 1], m[s.PDPTE0 + 2], m[s.PDPTE0 + 3])
    for n in range(4):
        at = (cr3 & 0xFFFFFFE0) + 8 * n
        if m[s.NONROOT] and m[s.EPTP] and m[s.EPT_FEATURES] & AGILE == 0:
            host = nested(m, a, t, at & ~0xFFF, EPT_READ, False)
            if host < 0:  # no linear address is behind this access
                m[s.FAULT_QUALIFICATION] &= ~(Q_LINEAR_VALID | Q_FINAL)
                m[s.FAULT_GVA] = 0
                keep_pdptes(m, loaded)
                return raise_fault(m, a, t, host)
            at = (host & ADDRESS) | (at & 0xFFF)
        entry = load_word(a, at) if is_memory(a, at) else 0
        if entry & 1 and entry & (m[s.RESERVED_BITS] | 0x1E6 | -(1 << 52)):
            keep_pdptes(m, loaded)
            return raise_exception(m, GP, 1, 0)
        m[s.PDPTE0 + n] = entry
    return 0


@kernel
def keep_pdptes(m: Record, loaded: tuple[int, int, int, int]) -> None:
    """Put the PDPTEs back that were loaded before: a write of CR3 that faults loads none."""
    for n in range(4):
        m[s.PDPTE0 + n] = loaded[n]


@kernel
def listed_word(m: Record, a: Arena, t: Tags, hpa: int) -> int:
    """A word of the list of CR3 values, which the processor loads as it loads data."""
    touch_physical(m, a, t, hpa, READ)
    return load_word(a, hpa)


@kernel
def listed_root(m: Record, a: Arena, t: Tags, cr3: int) -> int:
    """The shadow root that the hypervisor listed for a CR3 of its guest, which the guest then believes in; 0 for none.

    Agile paging (AGILE16) supposes a processor that remembers such pairs.
    """
    cr3_list = a[m[s.VMCS] + h.V_CR3_LIST]
    for n in range(h.CR3_PAIRS):
        at = cr3_list + 8 + 16 * n
        root = listed_word(m, a, t, at + 8)
        if root == 0:
            return 0
        if listed_word(m, a, t, at) == cr3:
            touch_physical(m, a, t, cr3_list, WRITE)
            store_word(a, cr3_list, cr3)
            return root
    return 0


@kernel
def load_cr3(m: Record, a: Arena, value: int) -> None:
    """Load CR3 and drop what that invalidates: nothing global, and nothing at all with PCIDs and bit 63 set.

    SDM: "Operations that Invalidate TLBs and Paging-Structure Caches"; "Operations that Invalidate Cached Mappings".
    """
    keep_all = m[s.CR4] & CR4_PCIDE != 0 and value < 0
    m[s.CR3] = value & 0x7FFF_FFFF_FFFF_FFFF
    set_context(m, a)
    if not keep_all:
        drop_contexts(m, a, LINEAR_KEY, m[s.CONTEXT_KEY] & LINEAR_KEY, False)
