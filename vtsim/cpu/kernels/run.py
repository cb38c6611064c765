"""The execution loop: fetches rows, executes them across all privilege states, and stops only when it must.

It stops for the time horizon, a platform hook or device, the end of a program, or a mistake; hot exits, exceptions,
system calls and VM entries complete inside.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Records, Tags, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import (
    AGAIN,
    BUDGET,
    DEVICE_READ,
    DEVICE_WRITE,
    EVENT,
    FOREVER,
    HORIZON,
    JUMPED,
    NEXT,
    PLATFORM_HOOK,
    PROGRAM_END,
    STOPPED,
    WINDOW_EMPTY,
)
from vtsim.cpu.kernels.boundary import boundary
from vtsim.cpu.kernels.coherence import forget_taken
from vtsim.cpu.kernels.cursor import set_limit
from vtsim.cpu.kernels.events import deliver
from vtsim.cpu.kernels.fetch import locate
from vtsim.cpu.kernels.hooks import FIRST_PLATFORM_HOOK, hook
from vtsim.cpu.kernels.hyper_threads import share_core, take_core
from vtsim.cpu.kernels.ipi import land_interrupts, send_interrupts
from vtsim.cpu.kernels.ledger import settle
from vtsim.cpu.kernels.memory_ops import memory_op
from vtsim.cpu.kernels.overlap import passes
from vtsim.cpu.kernels.replay import replay_event
from vtsim.cpu.kernels.straight import straight
from vtsim.cpu.kernels.stream import stream
from vtsim.cpu.kernels.system import system

EVERY_CPU: int = -1
LOOK: int = 64  # cycles after PAUSE in which a loop that waits has looked again


@kernel
def run(m: Record, a: Arena, t: Tags) -> int:
    """Execute until a reason to stop; the reason is returned and its evidence left in STOP_A to STOP_C.

    State between ops is entirely in the record and the arenas: a run cut anywhere and resumed gives the same bytes.
    """
    m[s.STOP] = 0
    r = m[s.ROW]
    set_limit(m, a)
    if m[s.PEERS]:
        forget_taken(m, a)
    while True:
        if m[s.OPS_LEFT] <= 0:  # before the boundary: what that decides belongs to the op after it
            m[s.ROW] = r
            settle(m, a)
            return BUDGET
        if m[s.CYCLE] >= m[s.LIMIT]:
            m[s.ROW] = r
            code = boundary(m, a, t)
            r = m[s.ROW]
            if code:
                settle(m, a)
                return code
        if r == 0:
            r = locate(m, a, t)
        if r > 0:
            r = straight(m, a, t, r)
            if r < 0:
                r = ~r
                continue
        m[s.OPS_LEFT] -= 1
        ended = EVENT if r < 0 else JUMPED
        length = 0
        if r > 0:
            ended = execute(m, a, t, r)
            length = m[s.OP_LENGTH]
            if ended == NEXT:
                m[s.RIP] += length
                op = a[r] & 0xFF
                if (a[r] >> o.META_LAST) & 1 or op == o.MOV_TO_CR or op == o.INVLPG or op == o.INVPCID:
                    r = 0  # the next op is on another page, or its page may be mapped otherwise now
                else:
                    r += o.ROW_WORDS
                continue
            if ended == AGAIN:
                continue
        if ended == EVENT:  # the op commits nothing: it did not retire
            if m[s.IN_FLIGHT]:
                m[s.RETIRED] -= 1
                m[s.IN_FLIGHT] = 0
            ended = deliver(m, a, t)
        r = 0
        if ended == STOPPED:
            if m[s.STOP] == PLATFORM_HOOK or m[s.STOP] == DEVICE_READ or m[s.STOP] == DEVICE_WRITE or m[s.STOP] >= 12:
                m[s.RIP] += length
        if ended == STOPPED or m[s.STOP]:
            m[s.ROW] = 0
            settle(m, a)
            return m[s.STOP]


@kernel
def execute(m: Record, a: Arena, t: Tags, r: int) -> int:
    """Execute one row that was fetched, of any op that `straight` left: how it ended."""
    op = a[r] & 0xFF
    price = m[s.PRICE + op]
    m[s.OP_LENGTH] = (a[r] >> o.META_LENGTH) & 0xFFFF
    m[s.OPS] += 1
    m[s.CYCLE] += price
    m[s.RETIRED] += 1 - ((a[r] >> o.META_UNCOUNTED) & 1)
    m[s.IN_FLIGHT] = price + 1
    if op <= o.JMP_MEM or op == o.XADD:
        ended = memory_op(m, a, t, r, op)
    elif op == o.STREAM:
        m[s.RETIRED] -= 1
        m[s.IN_FLIGHT] = 0
        ended = stream(m, a, t, r)
        if ended == NEXT and m[s.GPR + s.RCX] > 0:
            ended = AGAIN
    elif op == o.LONG_WORK:
        m[s.RETIRED] -= 1
        ended = long_work(m)
    elif op == o.HOOK:
        m[s.RETIRED] -= 1
        m[s.IN_FLIGHT] = 0
        number = a[r + o.ROW_IMM]
        if number < FIRST_PLATFORM_HOOK:
            ended = hook(m, a, t, number)
        else:
            m[s.STOP] = PLATFORM_HOOK
            m[s.HOOK_NUMBER] = number
            ended = STOPPED
    elif op == o.REPLAY_EVENT:
        ended = replay_event(m, a, t, r)
    elif op == o.STOP_OP:
        m[s.STOP] = PROGRAM_END
        m[s.STOP_A] = a[r + o.ROW_IMM]
        m[s.RETIRED] -= 1
        ended = STOPPED
    else:
        ended = system(m, a, t, r, op)
    if ended != EVENT:
        m[s.IN_FLIGHT] = 0
    return ended


@kernel
def long_work(m: Record) -> int:
    """Ordinary instructions counted in RCX, cut at LIMIT."""
    left = m[s.GPR + s.RCX]
    if left <= 0:
        return NEXT
    room = m[s.LIMIT] - m[s.CYCLE]
    cpi = max(m[s.CPI_NUMERATOR] * m[s.WORK_SCALE], 1)
    fits = left
    if room < FOREVER // 200:
        fits = min(left, max((room * 100 - m[s.FRACTION] + cpi - 1) // cpi, 1))
    passes(m, fits * m[s.WORK_SCALE])
    m[s.GPR + s.RCX] = left - fits
    return AGAIN if left > fits else NEXT


@kernel
def furthest_behind(cpus: Records) -> int:
    """Number of the CPU with the fewest cycles, the first of several."""
    behind = 0
    for n in range(1, cpus.shape[0]):
        if cpus[n, s.CYCLE] < cpus[behind, s.CYCLE]:
            behind = n
    return behind


@kernel
def run_all(cpus: Records, a: Arena, t: Tags, until: int, quantum: int, only: int) -> int:
    """Advance every CPU to `until`, always the one furthest behind, by at most a quantum; or only one CPU.

    Returns why it stopped, with the number of the CPU from bit 8 on; HORIZON says that all arrived.

    A CPU whose window is empty goes on where it stopped, as if it had never stopped: to the horizon that it had.
    With one CPU there is no quantum. A CPU that interrupts are on their way to stops where the first arrives. A CPU
    that has paused and looks next at what it waits for runs ahead of nobody, and nobody of it: one that is behind would
    see what is done later, and save a pause by it; one that is ahead would see too late what was done. CPUs of one
    core, which take its buffers in turn, are ahead of each other by a load from L2 at most while both run.
    """
    count = cpus.shape[0]
    refilled = -1
    for n in range(count):
        if cpus[n, s.STOP] == WINDOW_EMPTY:
            refilled = n
    while True:
        chosen = only
        if only < 0:
            chosen = refilled if refilled >= 0 else furthest_behind(cpus)
        m = cpus[chosen]
        sibling = m[s.SIBLING]
        horizon = until
        if only < 0 and refilled >= 0:
            horizon = m[s.UNTIL]
        elif only < 0:
            if m[s.CYCLE] >= until:
                return HORIZON
            soon = min(quantum, LOOK)
            looks = m[s.CYCLE] - m[s.PAUSED] < soon
            for n in range(count):
                if n != chosen:
                    now = cpus[n, s.CYCLE]
                    ahead = 1 if looks or now - cpus[n, s.PAUSED] < soon else quantum
                    if n == sibling and cpus[n, s.HALTED] == 0:
                        ahead = min(ahead, max(cpus[n, s.L2 + s.LATENCY], 1))
                    horizon = min(horizon, now + ahead)
        refilled = -1
        if m[s.IPI_AT] <= m[s.CYCLE]:
            land_interrupts(m, a)
        m[s.UNTIL] = min(horizon, m[s.IPI_AT])
        began, retired = m[s.CYCLE], m[s.RETIRED]
        if sibling >= 0:
            take_core(m, cpus[sibling])
        code = run(m, a, t)
        if sibling >= 0:
            share_core(m, a, cpus[sibling], began, retired)
        if m[s.PENDING_DRAIN]:
            send_interrupts(cpus, a, chosen)
        if code != HORIZON or (only >= 0 and m[s.CYCLE] >= until):
            return code | chosen << 8
