"""Streams of memory accesses in one tight loop, with as much overlap as the profile's miss buffers and walkers allow.

An independent access waits only for a free miss buffer and for room in the reorder buffer, which instructions leave in
order; its walk waits for a free walker. Where an address is computed first, walk and access begin when it is known;
what hits everywhere waits for nothing. An update has one address for its load and its store, so that both miss the TLB
at once: the load's walk begins first, and where another walker is idle then, the store begins a walk of its own, which
waits for the same lines and ends with it; else the store finds the translation when that has ended. A pointer chase
waits for every access, a look-up for what an address was loaded from and for decisions that were mispredicted
(`wrong_paths`). A stream that ends or is interrupted waits for what is still outstanding.

SDM: "Interrupts During REP".
Not modelled: prefetchers that follow strides; store-to-load forwarding; bandwidth limits of caches.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory, touch
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import DEVICE_READ, DEVICE_WRITE, MODEL_FAULT, NEXT, STOPPED, WINDOW_EMPTY
from vtsim.cpu.kernels.caches import probe, probe_at_once
from vtsim.cpu.kernels.exceptions import raise_fault
from vtsim.cpu.kernels.foresight import DATA_AHEAD, NESTED_AHEAD, TABLE_AHEAD, foresee
from vtsim.cpu.kernels.ledger import charge
from vtsim.cpu.kernels.lines import data_miss, data_uncached, own_line
from vtsim.cpu.kernels.overlap import drain, held_back, next_random, overlapped, passes, walked
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.cpu.kernels.translate import translate
from vtsim.cpu.kernels.wrong_paths import arrival, decide, drawn, step_place

QUANTILES: int = 4096  # intervals of a zipf table
LINE: int = 64
RECORDED_ACCESS: int = (1 << o.RECORDED_WORK) - 1
FOLLOWING: int = o.STEP_FOLLOWS | o.STEP_FOLLOWS_BEFORE
KNOWN_LATER: int = o.STEP_KNOWN | o.STEP_KNOWN_BEFORE
DECIDING: int = o.STEP_BY_BEFORE | o.STEP_SUMS  # before their work
FORESEEN_LINES, FORESEEN_ACCESSES = 1 << 15, 64  # 2 MiB: smaller regions are in the host's caches anyway


@kernel
def place(a: Arena, pattern: int, random: int, base: int, lines: int, table: int) -> int:
    """The address that a random number stands for in a uniform, zipf or chased stream."""
    high = (random >> 33) & 0x7FFFFFFF
    if pattern == o.ZIPF:
        at = table + (high >> 19)
        rank = a[at] + (((a[at + 1] - a[at]) * (high & 0x7FFFF)) >> 19)
        return base + ((rank * 0x9E3779B1) % lines << 6)
    return base + ((high * lines) >> 31 << 6) + ((random >> 20) & 7) * 8


@kernel
def stream(m: Record, a: Arena, t: Tags, r: int) -> int:
    """Run RCX accesses, or as many as fit before LIMIT. Progress stays in registers, so RIP can stay on the op."""
    packed = a[r + o.ROW_IMM]
    pattern = packed & 15
    writes = (packed >> o.STREAM_WRITES) & 0x7FF
    work = (packed >> o.STREAM_WORK) & 0xFFFF
    user = m[s.PRIVILEGE] & 1
    base = m[s.GPR + s.RSI]
    region = m[s.GPR + s.RDX]
    lines = max(region >> 6, 1)
    position = m[s.GPR + s.RDI]
    stride = m[s.GPR + s.R8]
    random = m[s.GPR + s.RBX]
    table = m[s.GPR + s.R9]
    left = m[s.GPR + s.RCX]
    price = m[s.PRICE + o.LD]
    queued = m[s.RANKS] != 0 and pattern != o.CHASE  # do lines wait for banks from when a buffer asks for them?
    ended = NEXT
    done = 0
    foreseen = (pattern == o.UNIFORM or pattern == o.ZIPF) and lines >= FORESEEN_LINES and left >= FORESEEN_ACCESSES
    next_ = random  # where the generator will be
    soon = random
    future = random
    if foreseen:
        for n in range(TABLE_AHEAD):
            future = next_random(future)
            if n <= NESTED_AHEAD:
                soon = next_random(soon)
            if n <= DATA_AHEAD:
                next_ = next_random(next_)
    if pattern == o.ZIPF and (table < 0 or table + QUANTILES >= a.shape[0]):
        m[s.STOP] = MODEL_FAULT
        return STOPPED
    empty = False
    words = 0  # arena index of the word with number 0
    last = 0
    if pattern == o.RECORDED:
        words = table + o.WINDOW_WORDS - a[table + o.WINDOW_FIRST]
        last = a[table + o.WINDOW_END]
        if position < a[table + o.WINDOW_FIRST] or words + last > a.shape[0]:
            m[s.STOP] = MODEL_FAULT
            return STOPPED
    fraction = 0
    turn = 0
    step = 0
    flags = 0
    page = -1
    there = 0
    begins = 0
    translated = 0
    after = 0
    updates = 0
    if pattern == o.LOOKUP:
        last = a[table]
        if position < 0 or position >= last or table + 1 + last * o.STEP_WORDS > a.shape[0]:
            m[s.STOP] = MODEL_FAULT
            return STOPPED
    while left > 0 and m[s.CYCLE] < m[s.LIMIT]:
        access = READ
        batch = 1
        before = random
        if pattern == o.RECORDED:
            if position >= last:
                empty = True
                break
            entry = a[words + position]
            work = (entry >> o.RECORDED_WORK) & 0x7FFF
            if entry < 0:
                passes(m, work)
                position += 1
                left -= 1
                continue
            gva = base ^ (entry & RECORDED_ACCESS) >> 1
            access = entry & 1
        elif pattern == o.LOOKUP:
            step = table + 1 + position * o.STEP_WORDS
            flags = a[step + o.STEP_FLAGS]
            work = 0 if flags & DECIDING else flags >> o.STEP_WORK
            fraction = stride
            turn = region
            if flags & o.STEP_DRAWS:
                random = next_random(random)
                fraction = drawn(random)
            if flags & o.STEP_TURNS:
                turn += 1
            gva = base + step_place(a, step, fraction, turn)
            after = a[step + o.STEP_AFTER]
            updates = flags & o.STEP_LOADS
            if flags & o.STEP_STORES:
                access = WRITE
            if flags & o.STEP_NEEDS:
                drain(m, a)
                charge(m, a, o.DATA_STALL, m[s.L1D + s.LATENCY] - price)
            elif flags & FOLLOWING:
                known = m[s.LOADED] if flags & o.STEP_FOLLOWS else m[s.LOADED_BEFORE]
                charge(m, a, o.DATA_STALL, max(known - m[s.CYCLE], 0) + m[s.L1D + s.LATENCY] - price)
        else:
            if pattern == o.SEQUENTIAL or pattern == o.STRIDED:
                gva = base + position
                if writes:
                    random = next_random(random)
                if 0 < stride < LINE:
                    batch = min(left, max((LINE - (gva & (LINE - 1)) + stride - 1) // stride, 1))
            else:
                random = next_random(random)
                gva = place(a, pattern, random, base, lines, table)
                if foreseen:
                    future = next_random(future)
                    foresee(m, a, t, place(a, pattern, future, base, lines, table), TABLE_AHEAD)
                    foresee(m, a, t, place(a, pattern, soon, base, lines, table), NESTED_AHEAD)
                    foresee(m, a, t, place(a, pattern, next_, base, lines, table), DATA_AHEAD)
                    soon = next_random(soon)
                    next_ = next_random(next_)
            if writes and random & 1023 < writes:
                access = WRITE
        if queued:
            m[s.HELD_BACK] = max(held_back(m), 0)
        m[s.STALL] = 0
        hpa = translate(m, a, t, gva, access, user)
        walk = m[s.STALL]
        if hpa < 0:
            if walk:
                charge(m, a, o.PAGE_WALK, walk)
            ended = hpa
            random = before  # the access will be made again
            break
        if not is_memory(a, hpa):
            m[s.STOP] = DEVICE_WRITE if access == WRITE else DEVICE_READ
            m[s.STOP_A] = hpa
            ended = 1
            break
        line = hpa >> 6
        taken = 0
        if pattern == o.LOOKUP:
            page = gva >> 12
            there = m[s.CYCLE]
            translated = 0
            begins = 0
            if flags & KNOWN_LATER:
                begins = m[s.LOADED] if flags & o.STEP_KNOWN else m[s.LOADED_BEFORE]
                begins += m[s.L1D + s.LATENCY] - price
                there = max(there, begins)
                begins += after
            if walk <= m[s.STLB_HIT_CYCLES]:
                translated = walked(m, page) + price  # after the access that walks
                if translated <= there:
                    translated = 0
            if m[s.WRONG_UNTIL] > there:
                taken = max(arrival(m, line) - max(there + after, translated), 0)
        if access == WRITE:
            touch(a, hpa >> 12)
            taken = max(taken, own_line(m, a, t, line))
        if m[s.UNCACHED]:  # one after the other, each of its own
            batch = 1
            drain(m, a)
            charge(m, a, o.PAGE_WALK, walk)
            charge(m, a, o.DATA_STALL, data_uncached(m, a, line, access))
            walk = taken = 0
            hit = True
        else:
            hit = probe(m, t, s.L1D, line) if pattern <= o.STRIDED else probe_at_once(m, t, s.L1D, line)
        if hit and taken == 0:
            if walk or translated:
                if pattern == o.CHASE:
                    charge(m, a, o.PAGE_WALK, walk)
                else:
                    there = overlapped(m, a, walk, 0, after, updates, page, max(translated, begins))
            if pattern == o.CHASE:
                charge(m, a, o.DATA_STALL, m[s.L1D + s.LATENCY] - price)
        else:
            miss = taken if hit else max(taken, data_miss(m, a, t, line, access, walk))
            if pattern == o.CHASE:
                charge(m, a, o.PAGE_WALK, walk)
                charge(m, a, o.DATA_STALL, miss + m[s.L1D + s.LATENCY] - price)
            else:
                there = overlapped(m, a, walk, miss, after, updates, page, max(translated, begins))
        if queued:
            m[s.HELD_BACK] = 0
        m[s.CYCLE] += price * batch
        m[s.RETIRED] += batch
        if work:
            passes(m, work * batch)
        left -= batch
        done += batch
        if pattern == o.RECORDED:
            position += 1
        elif pattern == o.LOOKUP:
            m[s.LOADED_BEFORE] = m[s.LOADED]
            m[s.LOADED] = there
            if a[step + o.STEP_CHOICES]:
                decide(m, a, t, step, position + 1, fraction, random, turn)
                if flags & DECIDING:
                    passes(m, flags >> o.STEP_WORK)
            stride = fraction
            region = turn
            position += 1
            if position == last:
                position = 0
        elif pattern == o.SEQUENTIAL or pattern == o.STRIDED:
            position += stride * batch
            if position >= region:
                position = 0
    if queued:
        m[s.HELD_BACK] = 0
    if empty:  # the engine stops at the boundary before the next op, where a horizon would cut the stream too
        m[s.STOP] = WINDOW_EMPTY
        m[s.STOP_A] = table
        m[s.LIMIT] = 0
    elif left <= 0 or ended != NEXT:  # cut by LIMIT, it waits only if an event is taken there
        drain(m, a)
    a[m[s.OWNER] + k.ACCESSES] += done
    m[s.GPR + s.RCX] = left
    m[s.GPR + s.RDI] = position
    m[s.GPR + s.RBX] = random
    if pattern == o.LOOKUP:
        m[s.GPR + s.R8] = stride
        m[s.GPR + s.RDX] = region
    if ended < 0:
        return raise_fault(m, a, t, ended)
    return STOPPED if ended else NEXT
