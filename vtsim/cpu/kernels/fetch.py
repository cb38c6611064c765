"""Instruction fetch: the row at RIP, the code lines it stands in.

Code that is not cached is read from memory line by line, and the processor has the line that it fetched last of it: a
line is read whenever control comes to it from another one.

SDM: "Methods of Caching Available".
Not modelled: how much a processor has of such code at once, which no source tells: a line is taken.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import (
    A_CODE_MAPS,
    A_CODE_OF,
    A_DECODE,
    A_FRAMES,
    A_REPLAY_LINES,
    A_REPLAY_ROWS,
    A_ROWS,
    CODE,
    FRAME_KIND,
    KIND_MASK,
    is_memory,
)
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import EVENT, UD, UNDECODED
from vtsim.cpu.kernels.apic_virtualization import fetch_exit, on_apic_page
from vtsim.cpu.kernels.caches import probe
from vtsim.cpu.kernels.contexts import CONTEXT_SHIFT, TAG_SHIFT, VPN_MASK, recorded
from vtsim.cpu.kernels.events import raise_exception, raise_fault
from vtsim.cpu.kernels.ledger import charge
from vtsim.cpu.kernels.lines import fetch_line, fetch_uncached
from vtsim.cpu.kernels.modes import code_address
from vtsim.cpu.kernels.translate import translate_code

FETCH_ENTRIES: int = 64  # page look-ups remembered per fetch generation: no hardware, only the simulator's memory
FETCH_WORDS: int = 4


@kernel
def locate(m: Record, a: Arena, t: Tags) -> int:
    """The row at RIP: translate the page (ITLB and walk priced), find the row for the byte.

    0 says that an event took RIP elsewhere, -1 that an exception waits for delivery.

    A page looked up since the last fill or invalidation needs no second look: a hit would change nothing.
    """
    rip = m[s.RIP]
    if recorded(m, a):
        m[s.LINES] = a[A_REPLAY_LINES]
        return a[A_REPLAY_ROWS] + (rip - o.REPLAY_BASE) * o.ROW_WORDS
    if m[s.MODE]:
        rip = code_address(m)
    user = m[s.PRIVILEGE] & 1
    key = ((rip >> 12) & VPN_MASK) << TAG_SHIFT | m[s.CONTEXT] << CONTEXT_SHIFT | user
    if (rip >> 56) + 1 & ~1:
        key = -2  # not canonical, and nothing is kept under this
    mixed = (rip >> 12) ^ m[s.CONTEXT] * 7
    at = m[s.FETCH_PAGES] + (mixed & (FETCH_ENTRIES - 1)) * FETCH_WORDS
    if a[at] == key and a[at + 1] == m[s.FETCH_GENERATION]:
        page = a[at + 2]
        kept = a[at + 3]
    else:
        m[s.STALL] = 0
        hpa = translate_code(m, a, t, rip, user)
        uncached = m[s.UNCACHED]
        m[s.UNCACHED] = 0
        if m[s.STALL]:
            charge(m, a, o.PAGE_WALK, m[s.STALL])
            m[s.STALL] = 0
        if hpa < 0:
            m[s.OP_LENGTH] = 0
            return -1 if raise_fault(m, a, t, hpa) == EVENT else 0
        if not is_memory(a, hpa) or (a[a[A_FRAMES] + (hpa >> 12)] >> FRAME_KIND) & KIND_MASK != CODE:
            if on_apic_page(m, a, hpa):
                fetch_exit(m, a, hpa & 0xFFF)
                return 0
            return no_row(m, a, hpa)
        page = a[a[A_CODE_OF] + (hpa >> 12)]
        kept = hpa & ~0xFFF | uncached
        a[at] = key if key >= 0 else -1
        a[at + 1] = m[s.FETCH_GENERATION]
        a[at + 2] = page
        a[at + 3] = kept
    m[s.FETCH_HPA] = kept & ~0xFFF
    row = t[a[A_CODE_MAPS] + page * 4096 + (rip & 0xFFF)]
    if row < 0:
        return no_row(m, a, m[s.FETCH_HPA] | (rip & 0xFFF))
    m[s.LINES] = m[s.UNCACHED_LINES] if kept & 0xFFF else m[s.LINE_GENERATIONS] + page * 64
    return a[A_ROWS] + row * o.ROW_WORDS


@kernel
def no_row(m: Record, a: Arena, hpa: int) -> int:
    """No row stands at this address: whoever can decode its bytes is asked to, else #UD."""
    if a[A_DECODE] and is_memory(a, hpa):
        if m[s.INTERRUPT_SHADOW]:  # what the boundary decided belongs to the op that is still to come
            m[s.INTERRUPT_SHADOW] = 2
        m[s.STOP] = UNDECODED
        m[s.STOP_A] = hpa
        return 0
    raise_exception(m, UD, 0, 0)
    return -1


@kernel
def fetch(m: Record, a: Arena, t: Tags, offset: int, length: int) -> None:
    """Bring the code lines of one row into L1I, unless they were all seen since the last fill."""
    lines = m[s.LINES]
    if lines == a[A_REPLAY_LINES]:  # recorded rows have no code bytes
        a[lines] = m[s.FETCH_GENERATION]
        return
    if lines == m[s.UNCACHED_LINES]:
        for line in range(offset >> 6, ((offset + length - 1) >> 6) + 1):
            stall = fetch_uncached(m, a, m[s.FETCH_HPA] + (line << 6))
            if stall:
                charge(m, a, o.FETCH_STALL, stall)
        return
    for line in range(offset >> 6, ((offset + length - 1) >> 6) + 1):
        if a[lines + line] != m[s.FETCH_GENERATION]:
            stall = fetch_line(m, a, t, m[s.FETCH_HPA] + (line << 6))
            if stall:
                charge(m, a, o.FETCH_STALL, stall)
            if m[s.L1I + s.WAYS] > 0:
                a[lines + line] = m[s.FETCH_GENERATION]
    first = offset >> 6
    if a[lines + first] != m[s.FETCH_GENERATION] and probe(m, t, s.L1I, (m[s.FETCH_HPA] >> 6) + first):
        a[lines + first] = m[s.FETCH_GENERATION]  # filling the row's second line did not take its first away
