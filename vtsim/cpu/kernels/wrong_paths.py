"""Decisions of look-ups: branches on what was loaded, whose outcome no predictor knows, and what is loaded meanwhile.

A step that decides is a branch that its own line resolves, or the line of the access before (`BY_BEFORE`), or all that
are outstanding (`SUMS`). Until then the
program runs on as predicted. Predicted right, nothing waits for the branch. Predicted wrong, the same program runs with
another element, and its loads begin as buffers, walkers and the reorder buffer allow; when the branch is resolved they
are given up, and the right path begins `work.mispredict_cycles` later. What was begun goes on: a walk fills TLBs and
walk caches, a line that was asked for fills caches. A load that is still waiting is never made, nor the line of a walk
that has not ended. Nothing a program sees changes: stores are not made, a walk that would set a flag or fault is
abandoned, and no device is asked.

What is predicted: in a search by halves one half or the other, with equal chances. In a linear search among `choices`
places, that the loop goes on to the last: at any place before it more outcomes lie ahead than the one here. Where both
ways lead to a random element (`within` 0), they lead to different ones, for one way draws another number.

SDM: "Caching Translation Information": translations may be cached for accesses that are never executed.
Not modelled: branches that are resolved on a wrong path; walks that end early where their load is given up; fetches of
a wrong path; what a predictor learns.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.caches import probe_at_once
from vtsim.cpu.kernels.ledger import charge
from vtsim.cpu.kernels.lines import data_miss
from vtsim.cpu.kernels.overlap import SQUASHED, next_random, outstanding, take_buffer, take_walker, walked
from vtsim.cpu.kernels.rights import READ
from vtsim.cpu.kernels.translate import quickly, translate_elsewhere

FRACTION: int = 0x7FFFFFFF  # of 2^31
NEVER: int = -1


@kernel
def drawn(random: int) -> int:
    """The fraction that a state of the generator stands for, in 2^-31."""
    return (random >> 33) & FRACTION


@kernel
def step_place(a: Arena, step: int, fraction: int, turn: int) -> int:
    """Where a step's element lies, in bytes from the beginning of the program's memory."""
    count = a[step + o.STEP_COUNT]
    element = turn % count if a[step + o.STEP_FLAGS] & o.STEP_BY_TURN else (fraction * count) >> 31
    half = a[step + o.STEP_HALF]
    if half:
        element = min((element & -2 * half) + half, count - 1)
    within = element * a[step + o.STEP_STRIDE]
    slab = a[step + o.STEP_SLAB]
    if slab:
        within += within // slab * a[step + o.STEP_GAP]
    return a[step + o.STEP_OFFSET] + within


@kernel
def chance(random: int, position: int) -> int:
    """A fraction for the decision of one step, independent of the others': products are not linear, as xorshift is."""
    x = (drawn(random) + (position + 1) * 0x1E3779B1) & FRACTION
    for _ in range(3):
        x = ((x ^ (x >> 15)) * 0x2C1B3C6D + position) & FRACTION
    return x ^ (x >> 16)


@kernel
def predicted(a: Arena, step: int, fraction: int, random: int, position: int) -> int:
    """The fraction with which a mispredicted decision runs on, or NEVER where it is predicted right."""
    choices = a[step + o.STEP_CHOICES]
    half = a[step + o.STEP_HALF]
    if half:
        if chance(random, position) & 1:
            return NEVER
        count = a[step + o.STEP_COUNT]
        other = min(((fraction * count) >> 31) ^ half, count - 1)
        return ((other << 31) + (1 << 30)) // count
    within = a[step + o.STEP_WITHIN]
    if within:
        scaled = fraction * within
        if ((scaled & FRACTION) * choices) >> 31 == choices - 1:
            return NEVER
        return min((scaled | FRACTION) // within, FRACTION)
    other = chance(random, position)
    return other if (other * choices) >> 31 else NEVER


@kernel
def decide(m: Record, a: Arena, t: Tags, step: int, position: int, fraction: int, random: int, turn: int) -> None:
    """A step that decides has made its access: go on, or run a wrong path until the branch is resolved.

    `position` is the step after it.
    """
    flags = a[step + o.STEP_FLAGS]
    loaded = m[s.LOADED_BEFORE] if flags & o.STEP_BY_BEFORE else m[s.LOADED]
    until = (outstanding(m) if flags & o.STEP_SUMS else loaded) + m[s.L1D + s.LATENCY]
    wrong = predicted(a, step, fraction, random, position)
    if wrong == NEVER:
        return
    a[m[s.OWNER] + k.MISPREDICTIONS] += 1
    if a[step + o.STEP_HALF] == 0 and a[step + o.STEP_WITHIN] == 0:
        random ^= wrong << 20  # other numbers are drawn
    run_astray(m, a, t, position, wrong, random, turn, until)
    charge(m, a, o.DATA_STALL, max(until - m[s.CYCLE], 0))
    m[s.CYCLE] += m[s.MISPREDICT_CYCLES]


@kernel
def run_astray(m: Record, a: Arena, t: Tags, position: int, fraction: int, random: int, turn: int, until: int) -> None:
    """Loads of a wrong path from this step on, as far as it comes until this cycle."""
    table = m[s.GPR + s.R9]
    steps = a[table]
    price = m[s.PRICE + o.LD]
    hit = m[s.L1D + s.LATENCY] - price
    retired = m[s.RETIRED]
    clock = m[s.CYCLE]
    loaded, before = m[s.LOADED], m[s.LOADED_BEFORE]
    latest = outstanding(m)
    while True:
        if position == steps:
            position = 0
        step = table + 1 + position * o.STEP_WORDS
        flags = a[step + o.STEP_FLAGS]
        if flags & o.STEP_DRAWS:
            random = next_random(random)
            fraction = drawn(random)
        if flags & o.STEP_TURNS:
            turn += 1
        if flags & o.STEP_NEEDS:
            clock = max(clock, latest) + hit
        elif flags & o.STEP_FOLLOWS:
            clock = max(clock, loaded) + hit
        elif flags & o.STEP_FOLLOWS_BEFORE:
            clock = max(clock, before) + hit
        for n in range(m[s.MLP]):  # what holds the reorder buffer
            if m[s.MISS_ISSUED + n] != SQUASHED and m[s.MISS_ISSUED + n] <= retired - m[s.ROB]:
                clock = max(clock, m[s.MISS_WINDOW + n])
        if clock >= until or retired - m[s.RETIRED] >= m[s.ROB]:  # the branch itself has not retired
            return
        done = clock
        if flags & (o.STEP_STORES | o.STEP_LOADS) != o.STEP_STORES:
            gva = m[s.GPR + s.RSI] + step_place(a, step, fraction, turn)
            known = clock
            if flags & o.STEP_KNOWN:
                known = max(known, loaded + hit)
            elif flags & o.STEP_KNOWN_BEFORE:
                known = max(known, before + hit)
            done = load_astray(m, a, t, gva, clock, known + a[step + o.STEP_AFTER], until)
        before = loaded
        loaded = done
        latest = max(latest, done)
        work = flags >> o.STEP_WORK
        retired += 1 + work
        clock += max(price, 1) + work * m[s.CPI_NUMERATOR] // 100
        position += 1


@kernel
def load_astray(m: Record, a: Arena, t: Tags, gva: int, now: int, known: int, until: int) -> int:
    """A load of a wrong path, whose address is known at a cycle: when is it there (`until`, where it is given up)?"""
    page = gva >> 12
    user = m[s.PRIVILEGE] & 1
    slot = s.MISS_WINDOW + m[s.MISS_NEXT]
    if max(now, m[slot]) >= until or known >= until:
        return until
    walk = 0
    ready = max(known, walked(m, page) + m[s.PRICE + o.LD])
    hpa = quickly(m, a, gva, READ, user)
    if hpa < 0:
        looked_up = m[s.STLB_HIT_CYCLES]
        if max(known + looked_up, m[s.WALK_WINDOW + m[s.WALK_NEXT]]) >= until:
            return until
        m[s.STALL] = 0
        m[s.SPECULATIVE] = 1
        hpa = translate_elsewhere(m, a, t, gva, READ, user)
        m[s.SPECULATIVE] = 0
        walk = m[s.STALL]
        ready += walk
        if walk > looked_up:
            ready = take_walker(m, known + looked_up, walk - looked_up, page)
    a[m[s.OWNER] + k.WRONG_LOADS] += 1
    uncached = m[s.UNCACHED] != 0  # of such memory nothing is loaded before it is known to be wanted
    m[s.UNCACHED] = 0
    if hpa < 0 or ready >= until or uncached or not is_memory(a, hpa):
        return until
    line = hpa >> 6
    if probe_at_once(m, t, s.L1D, line):
        return max(ready, arrival(m, line))
    asked = max(ready, m[slot])
    there = asked + data_miss(m, a, t, line, READ, asked - m[s.CYCLE])
    m[s.WRONG_LINE + m[s.MISS_NEXT]] = line
    m[s.WRONG_UNTIL] = max(m[s.WRONG_UNTIL], there)
    take_buffer(m, there, SQUASHED)
    return there


@kernel
def arrival(m: Record, line: int) -> int:
    """When a line that a wrong path asked for is there, or 0."""
    until = 0
    for n in range(m[s.MLP]):
        if m[s.MISS_ISSUED + n] == SQUASHED and m[s.WRONG_LINE + n] == line:
            until = max(until, m[s.MISS_WINDOW + n])
    return until
