"""Ops that access memory at one place: loads, stores, stack, calls, table jumps."""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import VALUES, contents, give_contents, is_memory, load, store, touch
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import DEVICE_READ, DEVICE_WRITE, JUMPED, MODEL_FAULT, NEXT, OUT_OF_MEMORY, STOPPED
from vtsim.cpu.kernels.access import effective, load_across, store_across, touch_physical
from vtsim.cpu.kernels.contexts import recorded
from vtsim.cpu.kernels.events import raise_fault
from vtsim.cpu.kernels.ledger import charge
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.cpu.kernels.translate import translate


@kernel
def data_at(m: Record, a: Arena, t: Tags, gva: int, access: int) -> int:
    """Translate and time one data access of the running program: hpa, or a fault. Single accesses do not overlap."""
    m[s.STALL] = 0
    hpa = translate(m, a, t, gva, access, m[s.PRIVILEGE] & 1)
    if m[s.STALL]:
        charge(m, a, o.PAGE_WALK, m[s.STALL])
    if hpa >= 0:
        if is_memory(a, hpa):
            a[m[s.OWNER] + k.ACCESSES] += 1
            touch_physical(m, a, t, hpa, access)
    return hpa


@kernel
def device(m: Record, a: Arena, hpa: int, size: int, write: bool, value: int, register: int) -> int:
    """A memory access that reaches no memory: the platform's device answers. RIP moves on before the stop."""
    a[m[s.OWNER] + k.DEVICE_ACCESSES] += 1
    charge(m, a, o.BUS, m[s.POSTED_CYCLES] if write else m[s.MMIO_CYCLES])
    m[s.STOP] = DEVICE_WRITE if write else DEVICE_READ
    m[s.STOP_A] = hpa
    m[s.STOP_B] = size | register << 8
    m[s.STOP_C] = value
    return STOPPED


@kernel
def many(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """LDM and STM: consecutive words and a mask of registers; each word counts as one instruction."""
    gva = effective(m, a, r)
    wanted = a[r + o.ROW_IMM]
    hpa = -1
    moved = 0
    if gva & 7:
        m[s.STOP] = MODEL_FAULT
        return STOPPED
    if gva & 0xFFF > 4096 - 16 * 8:  # a refused second page must find nothing committed
        last = gva + 8 * (a[r + o.ROW_EXTRA] - 1)
        if (last ^ gva) >> 12:
            hpa = data_at(m, a, t, last, READ if op == o.LDM else WRITE)
            if hpa < 0:
                return raise_fault(m, a, t, hpa)
            hpa = -1
    lines = 0
    at = 0  # arena offset of the word, 0 where a frame that nothing was stored in is read
    for register in range(16):
        if (wanted >> register) & 1:
            if hpa < 0 or gva & 63 == 0:  # a line is looked up once
                hpa = data_at(m, a, t, gva, READ if op == o.LDM else WRITE)
                if hpa < 0:
                    return raise_fault(m, a, t, hpa)
                if not is_memory(a, hpa):
                    m[s.STOP] = MODEL_FAULT
                    return STOPPED
                lines += 1
                if op == o.LDM:
                    at = contents(a, hpa >> 12)
                else:
                    at = give_contents(a, hpa >> 12, VALUES)
                    if at < 0:
                        m[s.STOP] = OUT_OF_MEMORY
                        return STOPPED
                    touch(a, hpa >> 12)
                if at:
                    at += (hpa >> 3) & 511
            if op == o.STM:
                a[at] = m[s.GPR + register]
            else:
                m[s.GPR + register] = a[at] if at else 0
            gva += 8
            at += 1 if at else 0
            moved += 1
    a[m[s.OWNER] + k.ACCESSES] += max(moved - lines, 0)
    m[s.RETIRED] += moved - 1
    m[s.CYCLE] += (moved - 1) * m[s.PRICE + op]
    return NEXT


@kernel
def memory_op(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """LD ST LDM STM PUSH POP CALL RET and indirect jumps: one access at one place."""
    if op == o.LDM or op == o.STM:
        return many(m, a, t, r, op)
    register = a[r + o.ROW_R1]
    size = 8
    access = WRITE
    value = 0
    if op == o.JMP_REG:
        m[s.RIP] = m[s.GPR + register]
        return JUMPED
    if op == o.LD or op == o.ST or op == o.XADD or op == o.JMP_MEM:
        gva = effective(m, a, r)
        size = (a[r + o.ROW_MEM] >> o.MEM_SIZE) & 15
        if op == o.LD or op == o.JMP_MEM:
            access = READ
        else:
            value = m[s.GPR + register] if register < 16 else a[r + o.ROW_IMM]
    elif op == o.POP or op == o.RET:
        gva = m[s.GPR + s.RSP]
        access = READ
    else:
        gva = m[s.GPR + s.RSP] - 8
        if op == o.PUSH:
            value = m[s.GPR + register] if register < 16 else a[r + o.ROW_IMM]
        else:
            value = m[s.RIP] + m[s.OP_LENGTH]
    hpa = data_at(m, a, t, gva, access)
    if hpa < 0:
        return raise_fault(m, a, t, hpa)
    if not is_memory(a, hpa):
        if recorded(m, a):  # the recording knows what the device answered
            a[m[s.OWNER] + k.DEVICE_ACCESSES] += 1
            charge(m, a, o.BUS, m[s.MMIO_CYCLES])
            if access == READ:
                m[s.GPR + register] = a[r + o.ROW_EXTRA]
            return NEXT
        return device(m, a, hpa, size, access == WRITE, value, register)
    across = (gva & 0xFFF) + size > 4096
    user = m[s.PRIVILEGE] & 1
    if access == READ:
        value = load_across(m, a, t, gva, size, hpa, user) if across else load(a, hpa, size)
        if across and m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        if op == o.LD:
            m[s.GPR + register] = value
            return NEXT
        if op == o.JMP_MEM:
            m[s.RIP] = value
            return JUMPED
        m[s.GPR + s.RSP] += 8
        if op == o.POP:
            m[s.GPR + register] = value
            return NEXT
        m[s.RIP] = value
        return JUMPED
    old = 0
    if op == o.XADD:
        old = load_across(m, a, t, gva, size, hpa, user) if across else load(a, hpa, size)
        if across and m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        value += old
    if across:
        fault = store_across(m, a, t, gva, size, value, hpa, user)
        if fault:
            return raise_fault(m, a, t, fault)
        if m[s.STOP]:
            return STOPPED
    elif store(a, hpa, size, value) < 0:
        m[s.STOP] = OUT_OF_MEMORY
        return STOPPED
    if op == o.XADD:
        m[s.GPR + register] = old
        return NEXT
    if op == o.ST:
        return NEXT
    m[s.GPR + s.RSP] -= 8
    if op == o.PUSH:
        return NEXT
    m[s.RIP] = a[r + o.ROW_EXTRA] if op == o.CALL else m[s.GPR + register]
    return JUMPED
