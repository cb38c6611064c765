"""The fast part of the execution loop: rows that can neither fault, exit nor wait, with the cursor in locals.

Loads and stores belong to it while they hit: the first-level TLB that answered last, L1D, a frame that has contents,
one aligned word. A hit on an entry whose reference bit is set changes nothing, and need not be repeated until something
was filled; nothing is filled here. Whatever else a row needs is left to the rest of the loop, which finds it untouched.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_FRAMES, A_POOL, SLOT_MASK, is_memory, touch
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import FOREVER
from vtsim.cpu.kernels.access import effective
from vtsim.cpu.kernels.alu import arithmetic, holds
from vtsim.cpu.kernels.caches import probe
from vtsim.cpu.kernels.ept_walk import READ, WRITE
from vtsim.cpu.kernels.fetch import fetch
from vtsim.cpu.kernels.ledger import settle
from vtsim.cpu.kernels.translate import quickly
from vtsim.vmcs import state as h
from vtsim.vmcs.groups import ALL_GROUPS

NOWHERE: int = 1 << 60  # no page's or line's number


@kernel
def straight(m: Record, a: Arena, t: Tags, r: int) -> int:
    """Execute rows from `r` on: the row to go on with, 0 where RIP must be looked up first.

    Where that is a row for others, its line is fetched and its activity set. At least one row is executed here or
    left to others, even when LIMIT is reached: what comes before a row at LIMIT was done.
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
    activity = m[s.ACTIVITY]
    lines = m[s.LINES]
    generation = m[s.FETCH_GENERATION]
    vmcs = m[s.VMCS] if m[s.PRIVILEGE] == o.R0 else 0
    seen = -1
    accesses = 0
    page = NOWHERE  # linear page, line and contents of the last load or store, and whether it may be written
    line = NOWHERE
    base = 0
    hfn = 0
    writable = False
    user = m[s.PRIVILEGE] & 1
    while left > 0 and cycle < limit:
        meta = a[r]
        op = meta & 0xFF
        length = (meta >> o.META_LENGTH) & 0xFFFF
        if (meta >> o.META_ACTIVITY) & 31 != activity:
            m[s.CYCLE] = cycle
            m[s.RETIRED] = retired
            settle(m, a)
            activity = (meta >> o.META_ACTIVITY) & 31
            m[s.ACTIVITY] = activity
        offset = (meta >> o.META_OFFSET) & 0xFFF
        if offset >> 6 != seen or (offset & 63) + length > 64:
            if a[lines + (offset >> 6)] != generation or (offset & 63) + length > 64:
                m[s.CYCLE] = cycle
                m[s.RETIRED] = retired
                fetch(m, a, t, offset, length)
                cycle = m[s.CYCLE]
                generation = m[s.FETCH_GENERATION]
            seen = offset >> 6
        if op == o.WORK:
            instructions = a[r + o.ROW_IMM] * m[s.WORK_SCALE]
            total = fraction + instructions * m[s.CPI_NUMERATOR]
            passed = total // 100
            fraction = total - passed * 100
            cycle += passed
            left -= 1
            retired += instructions
            rip += length
            if (meta >> o.META_LAST) & 1:
                r = 0
                break
            r += o.ROW_WORDS
            continue
        if op > o.VMWRITE:
            break
        if op == o.MOV:
            source = a[r + o.ROW_R2]
            m[s.GPR + a[r + o.ROW_R1]] = m[s.GPR + source] if source < 16 else a[r + o.ROW_IMM]
        elif op <= o.TEST:
            rflags = arithmetic(m, a, r, op, rflags)
        elif op == o.LEA:
            m[s.GPR + a[r + o.ROW_R1]] = effective(m, a, r)
        elif op <= o.LOOP:
            if op == o.JCC:
                taken = holds(rflags, a[r + o.ROW_IMM])
            elif op == o.LOOP:
                m[s.GPR + s.RCX] -= 1
                taken = m[s.GPR + s.RCX] != 0
            else:
                taken = True
            if taken:
                cycle += m[s.PRICE + op]
                retired += 1
                left -= 1
                rip = a[r + o.ROW_EXTRA]
                r = a[r + o.ROW_TARGET]
                if r == 0:
                    break
                continue
        elif op <= o.STM:
            gva = effective(m, a, r)
            access = READ if op == o.LD or op == o.LDM else WRITE
            mask = 0
            words = 1
            if op >= o.LDM:
                mask = a[r + o.ROW_IMM]
                words = 0
                for register in range(16):
                    words += (mask >> register) & 1
                size = 8 * words
                if gva & 7 or (gva & 0xFFF) + size > 4096:
                    break
            else:
                size = (a[r + o.ROW_MEM] >> o.MEM_SIZE) & 15
                if (gva & 7) + size > 8:
                    break
            if gva >> 12 != page or (access == WRITE and not writable):
                page = NOWHERE
                line = NOWHERE
                hpa = quickly(m, a, gva, access, user)
                if hpa < 0 or not is_memory(a, hpa):
                    break
                hfn = hpa >> 12
                slot = a[a[A_FRAMES] + hfn] & SLOT_MASK
                if slot == 0 and access == WRITE:
                    break
                base = a[A_POOL] + (slot << 9)  # of a frame without contents: the page of zeroes
                page = gva >> 12
                writable = access == WRITE
            if gva >> 6 != line:
                line = gva >> 6
                if not probe(m, t, s.L1D, hfn << 6 | (line & 63)):
                    line = NOWHERE
                    break
            last = (gva + size - 1) >> 6
            while line < last and probe(m, t, s.L1D, hfn << 6 | ((line + 1) & 63)):
                line += 1
            if line < last:
                break
            at = base + ((gva >> 3) & 511)
            if access == WRITE:
                touch(a, hfn)
            if op >= o.LDM:
                for register in range(16):
                    if (mask >> register) & 1:
                        if op == o.STM:
                            a[at] = m[s.GPR + register]
                        else:
                            m[s.GPR + register] = a[at]
                        at += 1
                cycle += (words - 1) * m[s.PRICE + op]
                retired += words - 1
            else:
                register = a[r + o.ROW_R1]
                shift = (gva & 7) << 3
                bits = size << 3
                if op == o.LD:
                    value = a[at]
                    if size < 8:
                        value = (value >> shift) & ((1 << bits) - 1)
                    m[s.GPR + register] = value
                else:
                    value = m[s.GPR + register] if register < 16 else a[r + o.ROW_IMM]
                    if size < 8:
                        part = ((1 << bits) - 1) << shift
                        value = (a[at] & ~part) | ((value << shift) & part)
                    a[at] = value
            accesses += words
        elif op == o.VMREAD or op == o.VMWRITE:
            if vmcs == 0 or a[r + o.ROW_R2] < 16:
                break
            field = vmcs + a[r + o.ROW_EXTRA]
            if op == o.VMREAD:
                m[s.GPR + a[r + o.ROW_R1]] = a[field]
            else:
                kept = a[r + o.ROW_TARGET]  # in its low bits, of the groups of checks
                a[field] = m[s.GPR + a[r + o.ROW_R1]] & (kept | ALL_GROUPS)
                a[vmcs + h.V_CHECKED] &= kept
        elif op != o.NOP:
            break
        cycle += m[s.PRICE + op]
        retired += 1
        left -= 1
        rip += length
        if (meta >> o.META_LAST) & 1:
            r = 0
            break
        r += o.ROW_WORDS
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
