"""The fast part of the execution loop: rows that can neither fault, exit nor wait, with the cursor in locals.

Loads and stores belong to it while they hit: the first-level TLB that answered last, L1D, a frame that has contents,
one aligned word. Nothing is filled here. Whatever else a row needs is left to the rest of the loop, which finds it
untouched.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, copy_16, kernel, lowest_bit
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import FOREVER, RF_IF
from vtsim.cpu.kernels.access import effective
from vtsim.cpu.kernels.alu import below, holds, shifted_right, with_flags
from vtsim.cpu.kernels.data_pages import stamp_now, words_at
from vtsim.cpu.kernels.fetch import fetch
from vtsim.cpu.kernels.ledger import settle
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.vmcs import state as h
from vtsim.vmcs.groups import ALL_GROUPS

ALL_REGISTERS: int = 0xFFFF
# ops by number, as bits
STACK_OPS: int = 1 << o.PUSH | 1 << o.POP | 1 << o.CALL | 1 << o.CALL_REG | 1 << o.RET
MEMORY_OPS: int = 1 << o.LD | 1 << o.ST | 1 << o.LDM | 1 << o.STM | 1 << o.JMP_MEM | STACK_OPS
STORES: int = 1 << o.ST | 1 << o.STM | 1 << o.PUSH | 1 << o.CALL | 1 << o.CALL_REG


@kernel
def transfer(m: Record, a: Arena, at: int, mask: int, stores: bool) -> None:
    """Move the registers of a mask to or from consecutive words of the arena."""
    if mask == ALL_REGISTERS:
        if stores:
            copy_16(a, at, m, s.GPR)
        else:
            copy_16(m, s.GPR, a, at)
        return
    while mask:
        register = lowest_bit(mask)
        if stores:
            a[at] = m[s.GPR + register]
        else:
            m[s.GPR + register] = a[at]
        at += 1
        mask &= mask - 1


@kernel
def straight(m: Record, a: Arena, t: Tags, r: int) -> int:
    """Execute rows from `r` on: a row for others, whose line is fetched and whose activity is set; else ~row.

    ~row is where to go on once the budget and what is due at LIMIT were looked after, ~0 where RIP must be looked up
    first. At least one row is executed here or left to others, even when LIMIT is reached: what comes before a row at
    LIMIT was done. Nothing comes between the fetch of a row and its execution, so that it is all the same where a run
    was cut.
    """
    cycle = m[s.CYCLE]
    limit = m[s.LIMIT]
    retired = m[s.RETIRED]
    before = m[s.OPS_LEFT]
    left = before
    spare = 0
    if cycle >= limit:
        spare = left - 1
        left = 1
        limit = FOREVER
    rip = m[s.RIP]
    rflags = m[s.RFLAGS]
    fraction = m[s.FRACTION]
    lines = m[s.LINES]
    generation = m[s.FETCH_GENERATION]
    hypervisor = m[s.PRIVILEGE] == o.R0
    vmcs = m[s.VMCS] if hypervisor else 0
    seen = -1
    accesses = 0
    stamp = stamp_now(m, m[s.PRIVILEGE] & 1)
    while True:
        if left <= 0 or cycle >= limit:
            r = ~r
            break
        meta = a[r]
        op = meta & 0xFF
        length = (meta >> o.META_LENGTH) & 0xFFFF
        around = (meta >> (o.META_OFFSET + 6)) & 0xFFF  # line of the page, 64 if it reaches into the next, activity
        if around != seen:
            m[s.CYCLE] = cycle
            m[s.RETIRED] = retired
            if around >> 7 != m[s.ACTIVITY]:
                settle(m, a)
                m[s.ACTIVITY] = around >> 7
            if around & 64 or a[lines + (around & 63)] != generation:
                fetch(m, a, t, (meta >> o.META_OFFSET) & 0xFFF, length)
                cycle = m[s.CYCLE]
                generation = m[s.FETCH_GENERATION]
                stamp = stamp_now(m, m[s.PRIVILEGE] & 1)
            seen = around & ~64
        following = r + o.ROW_WORDS
        if (meta >> o.META_LAST) & 1:
            following = 0
        target = s.GPR + (a[r + o.ROW_R1] & 15)
        immediate = a[r + o.ROW_IMM]
        left_value = m[target]
        right_value = m[s.GPR + (a[r + o.ROW_R2] & 15)] if a[r + o.ROW_R2] < 16 else immediate
        # one chain of equalities: a jump table
        if op == o.WORK:
            instructions = immediate * m[s.WORK_SCALE]
            total = fraction + instructions * m[s.CPI_NUMERATOR]
            passed = total // 100
            fraction = total - passed * 100
            cycle += passed
            retired += instructions - 1
        elif op == o.MOV:
            m[target] = right_value
        elif op == o.ADD:
            result = left_value + right_value
            m[target] = result
            overflow = (left_value ^ result) & (right_value ^ result) < 0
            rflags = with_flags(rflags, result, below(result, left_value), overflow)
        elif op == o.SUB:
            result = left_value - right_value
            m[target] = result
            overflow = (left_value ^ right_value) & (left_value ^ result) < 0
            rflags = with_flags(rflags, result, below(left_value, right_value), overflow)
        elif op == o.CMP:
            result = left_value - right_value
            overflow = (left_value ^ right_value) & (left_value ^ result) < 0
            rflags = with_flags(rflags, result, below(left_value, right_value), overflow)
        elif op == o.AND:
            m[target] = left_value & right_value
            rflags = with_flags(rflags, left_value & right_value, False, False)
        elif op == o.TEST:
            rflags = with_flags(rflags, left_value & right_value, False, False)
        elif op == o.OR:
            m[target] = left_value | right_value
            rflags = with_flags(rflags, left_value | right_value, False, False)
        elif op == o.XOR:
            m[target] = left_value ^ right_value
            rflags = with_flags(rflags, left_value ^ right_value, False, False)
        elif op == o.SHL:
            result = left_value << (right_value & 63)
            m[target] = result
            rflags = with_flags(rflags, result, False, False)
        elif op == o.SHR:
            result = shifted_right(left_value, right_value & 63)
            m[target] = result
            rflags = with_flags(rflags, result, False, False)
        elif op == o.LEA:
            m[target] = effective(m, a, r)
        elif op == o.JCC:
            if holds(rflags, a[r + o.ROW_DISP]):
                rip = a[r + o.ROW_EXTRA] - length
                following = a[r + o.ROW_TARGET]
        elif op == o.JMP:
            rip = a[r + o.ROW_EXTRA] - length
            following = a[r + o.ROW_TARGET]
        elif op == o.LOOP:
            m[s.GPR + s.RCX] -= 1
            if m[s.GPR + s.RCX] != 0:
                rip = a[r + o.ROW_EXTRA] - length
                following = a[r + o.ROW_TARGET]
        elif op == o.JMP_REG:
            rip = left_value - length
            following = 0
        elif op == o.VMREAD:
            if vmcs == 0 or a[r + o.ROW_R2] < 16:
                break
            m[target] = a[vmcs + a[r + o.ROW_EXTRA]]
        elif op == o.VMWRITE:
            if vmcs == 0 or a[r + o.ROW_R2] < 16:
                break
            kept = a[r + o.ROW_TARGET]  # in its low bits, of the groups of checks
            a[vmcs + a[r + o.ROW_EXTRA]] = left_value & (kept | ALL_GROUPS)
            a[vmcs + h.V_CHECKED] &= kept
        elif op == o.NOP:
            pass
        elif op == o.RDTSC:
            if not hypervisor:
                break
            tsc = cycle + m[s.PRICE + op] + m[s.MSR_TSC_ADJUST]
            m[s.GPR + s.RAX] = tsc & 0xFFFFFFFF
            m[s.GPR + s.RDX] = (tsc >> 32) & 0xFFFFFFFF
        elif op == o.MOV_FROM_CR:
            if not hypervisor or immediate != 2:
                break
            m[target] = m[s.CR2]
        elif op == o.CLI:
            if not hypervisor:
                break
            rflags &= ~RF_IF  # LIMIT may now be too early, never too late
        elif op < 64 and (MEMORY_OPS >> op) & 1:
            access = WRITE if (STORES >> op) & 1 else READ
            words = 1
            if (STACK_OPS >> op) & 1:
                gva = m[s.GPR + s.RSP]
                if access == WRITE:
                    gva -= 8
                size = 8
            else:
                gva = effective(m, a, r)
                size = (a[r + o.ROW_MEM] >> o.MEM_SIZE) & 15
                if op == o.LDM or op == o.STM:
                    words = a[r + o.ROW_EXTRA]
                    size = 8 * words
            if (gva & 7) + size > 8 and (words == 1 or gva & 7 or (gva & 0xFFF) + size > 4096):
                break
            at = words_at(m, a, t, gva, size, access, stamp)
            if at < 0:
                break
            accesses += words
            if op == o.LD:
                value = a[at]
                if size < 8:
                    value = (value >> ((gva & 7) << 3)) & ((1 << (size << 3)) - 1)
                m[target] = value
            elif op == o.ST or op == o.PUSH:
                value = left_value if a[r + o.ROW_R1] < 16 else immediate
                if size < 8:
                    shift = (gva & 7) << 3
                    part = ((1 << (size << 3)) - 1) << shift
                    value = (a[at] & ~part) | ((value << shift) & part)
                a[at] = value
                if op == o.PUSH:
                    m[s.GPR + s.RSP] = gva
            elif op == o.LDM or op == o.STM:
                transfer(m, a, at, immediate, op == o.STM)
                cycle += (words - 1) * m[s.PRICE + op]
                retired += words - 1
            elif op == o.POP:
                m[s.GPR + s.RSP] += 8
                m[target] = a[at]
            elif op == o.RET:
                m[s.GPR + s.RSP] += 8
                rip = a[at] - length
                following = 0
            elif op == o.JMP_MEM:
                rip = a[at] - length
                following = 0
            else:
                a[at] = rip + length
                m[s.GPR + s.RSP] = gva
                rip = (a[r + o.ROW_EXTRA] if op == o.CALL else left_value) - length
                following = 0
        else:
            break
        cycle += m[s.PRICE + op]
        retired += 1 - ((meta >> o.META_UNCOUNTED) & 1)
        left -= 1
        rip += length
        r = following
        if r == 0:
            r = ~r
            break
    m[s.CYCLE] = cycle
    m[s.RETIRED] = retired
    left += spare
    m[s.OPS] += before - left
    m[s.OPS_LEFT] = left
    m[s.RIP] = rip
    m[s.RFLAGS] = rflags
    m[s.FRACTION] = fraction
    a[m[s.OWNER] + k.ACCESSES] += accesses
    return r
