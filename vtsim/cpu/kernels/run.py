"""The execution loop: fetches rows, executes them across all privilege states, and stops only when it must.

It stops for the time horizon, a platform hook or device, the end of a program, or a mistake; hot exits, exceptions,
system calls and VM entries complete inside.
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Records, Tags, kernel
from vtsim.base.memory import (
    A_CODE_MAPS,
    A_CODE_OF,
    A_DECODE,
    A_FRAMES,
    A_REPLAY_LINES,
    A_REPLAY_ROWS,
    A_ROWS,
    A_TRACE_LENGTH,
    A_TRACE_LIMIT,
    CODE,
    FRAME_KIND,
    KIND_MASK,
    VALUES,
    contents,
    give_contents,
    is_memory,
    load,
    store,
    touch,
)
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import (
    AGAIN,
    ARITHMETIC,
    BUDGET,
    DEVICE_READ,
    DEVICE_WRITE,
    EVENT,
    EXTERNAL,
    FOREVER,
    HORIZON,
    JUMPED,
    MODEL_FAULT,
    NEXT,
    OUT_OF_MEMORY,
    PLATFORM_HOOK,
    PROGRAM_END,
    RF_CF,
    RF_IF,
    RF_OF,
    RF_SF,
    RF_ZF,
    STOPPED,
    TRACE_FULL,
    UD,
    UNDECODED,
    VALID,
)
from vtsim.cpu.kernels.access import effective, load_across, store_across
from vtsim.cpu.kernels.apic import acknowledge, evaluate, timer_fires
from vtsim.cpu.kernels.breakpoints import instruction_breakpoint
from vtsim.cpu.kernels.caches import data_miss, fetch_line, probe
from vtsim.cpu.kernels.contexts import CONTEXT_SHIFT, TAG_SHIFT, VPN_MASK, recorded
from vtsim.cpu.kernels.cursor import deliverable, set_limit
from vtsim.cpu.kernels.events import deliver, raise_exception, raise_fault, through_idt
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.hooks import FIRST_PLATFORM_HOOK, hook
from vtsim.cpu.kernels.ledger import TRACE_SLACK, charge, record, settle
from vtsim.cpu.kernels.modes import code_address
from vtsim.cpu.kernels.pending import DELIVER, arm, begin, debug_exception, rare_event
from vtsim.cpu.kernels.replay import assert_wire, replay_event
from vtsim.cpu.kernels.stream import drain, passes, stream
from vtsim.cpu.kernels.system import system
from vtsim.cpu.kernels.translate import translate, translate_code
from vtsim.cpu.kernels.walk import READ, WRITE
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.groups import ALL_GROUPS

FETCH_ENTRIES: int = 64  # page look-ups remembered per fetch generation: no hardware, only the simulator's memory
FETCH_WORDS: int = 4
EVERY_CPU: int = -1


@kernel
def boundary(m: Record, a: Arena, t: Tags) -> int:
    """Between two ops with LIMIT reached: timers, interrupts, windows, halting, the horizon. RUNNING (0) to go on.

    SDM: "Priority Among Concurrent Events"; "VM-Execution Control Fields".
    """
    while True:
        if a[A_TRACE_LENGTH] + TRACE_SLACK >= a[A_TRACE_LIMIT] and m[s.TRACE_ON]:
            return TRACE_FULL
        if m[s.STOP]:
            return m[s.STOP]
        if m[s.PENDING_DRAIN]:
            return HORIZON
        if m[s.CYCLE] >= m[s.APIC_DEADLINE]:
            timer_fires(m, a)
            continue
        if m[s.WIRE_AT] and m[s.CYCLE] >= m[s.WIRE_AT]:
            assert_wire(m, a)
            continue
        if m[s.PENDING]:
            found = rare_event(m, a)
            if found:
                m[s.ROW] = 0
                if found == DELIVER and deliver(m, a, t) == STOPPED:
                    return m[s.STOP]
                begin(m)
                continue
        if m[s.NONROOT] and m[s.CYCLE] >= m[s.TIMER_DEADLINE] and m[s.INTERRUPT_SHADOW] == 0:
            drain(m, a)
            vm_exit(m, a, x.PREEMPTION_TIMER, 0, 0)
            m[s.ROW] = 0
            continue
        if m[s.NONROOT] and m[s.WINDOW] and m[s.RFLAGS] & RF_IF and m[s.INTERRUPT_SHADOW] == 0:
            drain(m, a)
            vm_exit(m, a, x.INTERRUPT_WINDOW, 0, 0)
            m[s.ROW] = 0
            continue
        if m[s.CYCLE] >= m[s.UNTIL]:
            return HORIZON
        if m[s.INTERRUPT_SHADOW] == 0 and deliverable(m, a):
            if m[s.NONROOT] and a[m[s.VMCS] + v.PIN_CONTROLS] & b.EXTERNAL_INTERRUPT_EXITING:
                drain(m, a)
                halted = m[s.HALTED]
                wake(m, a)
                m[s.HALTED] = halted  # saved as the guest's activity state
                if a[m[s.VMCS] + v.EXIT_CONTROLS] & b.EXIT_ACKNOWLEDGE_INTERRUPT:
                    m[s.EXIT_INTERRUPTION] = acknowledge(m, a) | VALID
                vm_exit(m, a, x.EXTERNAL_INTERRUPT, 0, 0)
                m[s.ROW] = 0
                continue
            if m[s.RFLAGS] & RF_IF:
                drain(m, a)
                wake(m, a)
                m[s.EVENT_VECTOR] = acknowledge(m, a)
                m[s.EVENT_TYPE] = EXTERNAL
                m[s.EVENT_HAS_ERROR] = 0
                m[s.EVENT_ERROR] = 0
                m[s.EVENT_LENGTH] = 0
                m[s.OP_LENGTH] = 0
                m[s.ROW] = 0
                if through_idt(m, a, t) == STOPPED:
                    return m[s.STOP]
                continue
        if m[s.INTERRUPT_SHADOW] == 1:
            m[s.INTERRUPT_SHADOW] = 0
            continue
        if m[s.HALTED]:
            target = min(m[s.UNTIL], m[s.APIC_DEADLINE])
            if m[s.NONROOT]:
                target = min(target, m[s.TIMER_DEADLINE])
            if m[s.WIRE_AT]:
                target = min(target, m[s.WIRE_AT])
            m[s.INTERRUPT_SHADOW] = 0
            if deliverable(m, a):
                continue
            if target > m[s.CYCLE]:
                charge(m, a, o.HALTED_CYCLES, target - m[s.CYCLE])
            continue
        if m[s.PENDING]:
            hit = instruction_breakpoint(m)
            if hit:
                debug_exception(m, hit)
                m[s.ROW] = 0
                if deliver(m, a, t) == STOPPED:
                    return m[s.STOP]
                begin(m)
                continue
            begin(m)
            arm(m, a)
        if m[s.INTERRUPT_SHADOW]:
            m[s.INTERRUPT_SHADOW] = 1
            m[s.LIMIT] = m[s.CYCLE]
            return 0
        set_limit(m, a)
        return 0


@kernel
def wake(m: Record, a: Arena) -> None:
    """Leave the halted state, which takes time."""
    if m[s.HALTED]:
        m[s.HALTED] = 0
        charge(m, a, o.HALTED_CYCLES, m[s.WAKE_CYCLES])
        if m[s.TRACE_ON]:
            record(m, a, m[s.PRIVILEGE], tr.HALT, -1, m[s.CYCLE] - m[s.HALTED_AT], 0, 0)


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
        m[s.FETCH_HPA] = a[at + 3]
    else:
        m[s.STALL] = 0
        hpa = translate_code(m, a, t, rip, user)
        if m[s.STALL]:
            charge(m, a, o.PAGE_WALK, m[s.STALL])
            m[s.STALL] = 0
        if hpa < 0:
            m[s.OP_LENGTH] = 0
            return -1 if raise_fault(m, a, t, hpa) == EVENT else 0
        if not is_memory(a, hpa) or (a[a[A_FRAMES] + (hpa >> 12)] >> FRAME_KIND) & KIND_MASK != CODE:
            return no_row(m, a, hpa)
        page = a[a[A_CODE_OF] + (hpa >> 12)]
        m[s.FETCH_HPA] = hpa & ~0xFFF
        a[at] = key if key >= 0 else -1
        a[at + 1] = m[s.FETCH_GENERATION]
        a[at + 2] = page
        a[at + 3] = m[s.FETCH_HPA]
    row = t[a[A_CODE_MAPS] + page * 4096 + (rip & 0xFFF)]
    if row < 0:
        return no_row(m, a, m[s.FETCH_HPA] | (rip & 0xFFF))
    m[s.LINES] = m[s.LINE_GENERATIONS] + page * 64
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
    for line in range(offset >> 6, ((offset + length - 1) >> 6) + 1):
        if a[lines + line] != m[s.FETCH_GENERATION]:
            stall = fetch_line(m, a, t, m[s.FETCH_HPA] + (line << 6))
            if stall:
                charge(m, a, o.FETCH_STALL, stall)
            if m[s.L1I + s.WAYS] > 0:
                a[lines + line] = m[s.FETCH_GENERATION]


@kernel
def holds(flags: int, condition: int) -> bool:
    """Does a condition hold in these flags?"""
    zero = flags & RF_ZF != 0
    carry = flags & RF_CF != 0
    sign = flags & RF_SF != 0
    less = sign != (flags & RF_OF != 0)
    if condition == o.CC_Z:
        return zero
    if condition == o.CC_NZ:
        return not zero
    if condition == o.CC_B:
        return carry
    if condition == o.CC_AE:
        return not carry
    if condition == o.CC_S:
        return sign
    if condition == o.CC_NS:
        return not sign
    if condition == o.CC_L:
        return less
    if condition == o.CC_GE:
        return not less
    if condition == o.CC_LE:
        return less or zero
    if condition == o.CC_G:
        return not less and not zero
    if condition == o.CC_BE:
        return carry or zero
    return not carry and not zero


@kernel
def below(left: int, right: int) -> bool:
    """Unsigned comparison of two's-complement words."""
    if (left < 0) != (right < 0):
        return right < 0
    return left < right


@kernel
def arithmetic(m: Record, a: Arena, r: int, op: int) -> None:
    """ADD SUB AND OR XOR SHL SHR CMP TEST with the flags that conditions read."""
    target = s.GPR + a[r + o.ROW_R1]
    left = m[target]
    source = a[r + o.ROW_R2]
    right = m[s.GPR + source] if source < 16 else a[r + o.ROW_IMM]
    flags = 0
    if op == o.ADD:
        result = left + right
        if below(result, left):
            flags = RF_CF
        if (left ^ result) & (right ^ result) < 0:
            flags |= RF_OF
    elif op == o.SUB or op == o.CMP:
        result = left - right
        if below(left, right):
            flags = RF_CF
        if (left ^ right) & (left ^ result) < 0:
            flags |= RF_OF
    elif op == o.AND or op == o.TEST:
        result = left & right
    elif op == o.OR:
        result = left | right
    elif op == o.XOR:
        result = left ^ right
    elif op == o.SHL:
        result = left << (right & 63)
    else:
        bits = right & 63
        result = left
        if bits:
            result = (left >> bits) & ((1 << (64 - bits)) - 1)
    if result == 0:
        flags |= RF_ZF
    elif result < 0:
        flags |= RF_SF
    m[s.RFLAGS] = (m[s.RFLAGS] & ~ARITHMETIC) | flags
    if op != o.CMP and op != o.TEST:
        m[target] = result


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
            if not probe(m, t, s.L1D, hpa >> 6):
                charge(m, a, o.DATA_STALL, data_miss(m, a, t, hpa >> 6))
    return hpa


@kernel
def device(m: Record, a: Arena, hpa: int, size: int, write: bool, value: int, register: int) -> int:
    """A memory access that reaches no memory: the platform's device answers. RIP moves on before the stop."""
    a[m[s.OWNER] + k.DEVICE_ACCESSES] += 1
    charge(m, a, o.BUS, m[s.MMIO_CYCLES])
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
        last = gva - 8
        for register in range(16):
            last += 8 * ((wanted >> register) & 1)
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
def run(m: Record, a: Arena, t: Tags) -> int:
    """Execute until a reason to stop; the reason is returned and its evidence left in STOP_A to STOP_C.

    State between ops is entirely in the record and the arenas: a run cut anywhere and resumed gives the same bytes.
    """
    m[s.STOP] = 0
    r = m[s.ROW]
    set_limit(m, a)
    while True:
        if m[s.OPS_LEFT] <= 0:  # before the boundary: what that decides belongs to the op after it
            m[s.ROW] = r
            settle(m, a)
            return BUDGET
        if m[s.CYCLE] >= m[s.LIMIT]:
            m[s.ROW] = r
            m[s.IN_FLIGHT] = 0
            code = boundary(m, a, t)
            r = m[s.ROW]
            if code:
                settle(m, a)
                return code
        m[s.OPS_LEFT] -= 1
        ended = NEXT
        op = o.NOP
        length = 0
        if r <= 0:
            m[s.IN_FLIGHT] = 0
            r = locate(m, a, t)
            if r <= 0:
                ended = EVENT if r < 0 else JUMPED
                r = 0
        if r > 0:
            meta = a[r]
            op = meta & 0xFF
            length = (meta >> o.META_LENGTH) & 0xFFFF
            activity = (meta >> o.META_ACTIVITY) & 31
            if activity != m[s.ACTIVITY]:
                settle(m, a)
                m[s.ACTIVITY] = activity
            offset = (meta >> o.META_OFFSET) & 0xFFF
            if a[m[s.LINES] + (offset >> 6)] != m[s.FETCH_GENERATION] or (offset & 63) + length > 64:
                fetch(m, a, t, offset, length)
            m[s.OP_LENGTH] = length
            m[s.OPS] += 1
            if op == o.WORK:
                passes(m, a[r + o.ROW_IMM] * m[s.WORK_SCALE])
            else:
                price = m[s.PRICE + op]
                m[s.CYCLE] += price
                m[s.RETIRED] += 1
                m[s.IN_FLIGHT] = price + 1
                if op == o.MOV:
                    source = a[r + o.ROW_R2]
                    m[s.GPR + a[r + o.ROW_R1]] = m[s.GPR + source] if source < 16 else a[r + o.ROW_IMM]
                elif op <= o.TEST:
                    arithmetic(m, a, r, op)
                elif op == o.LEA:
                    m[s.GPR + a[r + o.ROW_R1]] = effective(m, a, r)
                elif op == o.JMP:
                    m[s.RIP] = a[r + o.ROW_EXTRA]
                    r = a[r + o.ROW_TARGET]
                    continue
                elif op == o.JCC:
                    if holds(m[s.RFLAGS], a[r + o.ROW_IMM]):
                        m[s.RIP] = a[r + o.ROW_EXTRA]
                        r = a[r + o.ROW_TARGET]
                        continue
                elif op == o.LOOP:
                    m[s.GPR + s.RCX] -= 1
                    if m[s.GPR + s.RCX] != 0:
                        m[s.RIP] = a[r + o.ROW_EXTRA]
                        r = a[r + o.ROW_TARGET]
                        continue
                elif op == o.VMREAD or op == o.VMWRITE:
                    if m[s.PRIVILEGE] == o.R0 and m[s.VMCS] and a[r + o.ROW_R2] >= 16:
                        field = m[s.VMCS] + a[r + o.ROW_EXTRA]
                        if op == o.VMREAD:
                            m[s.GPR + a[r + o.ROW_R1]] = a[field]
                        else:
                            kept = a[r + o.ROW_TARGET]  # in its low bits, of the groups of checks
                            a[field] = m[s.GPR + a[r + o.ROW_R1]] & (kept | ALL_GROUPS)
                            a[m[s.VMCS] + h.V_CHECKED] &= kept
                    else:
                        ended = system(m, a, t, r, op)
                elif op <= o.JMP_MEM or op == o.XADD:
                    ended = memory_op(m, a, t, r, op)
                elif op == o.NOP:
                    pass
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
            m[s.IN_FLIGHT] = m[s.IN_FLIGHT] if ended == EVENT else 0
            if ended == NEXT:
                m[s.RIP] += length
                if (meta >> o.META_LAST) & 1 or op == o.MOV_TO_CR or op == o.INVLPG or op == o.INVPCID:
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
            m[s.ROW] = 0
            settle(m, a)
            return m[s.STOP]
        if m[s.STOP]:
            m[s.ROW] = 0
            settle(m, a)
            return m[s.STOP]


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


@kernel
def run_all(cpus: Records, a: Arena, t: Tags, until: int, quantum: int, only: int) -> int:
    """Advance every CPU to `until`, always the one furthest behind, by at most a quantum; or only one CPU.

    Returns why it stopped, with the number of the CPU from bit 8 on; HORIZON says that all arrived.

    With one CPU there is no quantum. Inter-processor interrupts are routed here.

    Not modelled: the flight time of an inter-processor interrupt; it arrives at the receiver's next op.
    """
    count = cpus.shape[0]
    while True:
        chosen = only
        if only < 0:
            chosen = 0
            for n in range(1, count):
                if cpus[n, s.CYCLE] < cpus[chosen, s.CYCLE]:
                    chosen = n
            if cpus[chosen, s.CYCLE] >= until:
                return HORIZON
        m = cpus[chosen]
        m[s.UNTIL] = until
        if only < 0 and count > 1:
            second = until
            for n in range(count):
                if n != chosen and cpus[n, s.CYCLE] < second:
                    second = cpus[n, s.CYCLE]
            m[s.UNTIL] = min(until, second + quantum)
        code = run(m, a, t)
        if m[s.PENDING_DRAIN]:
            value = m[s.PENDING_DRAIN]
            m[s.PENDING_DRAIN] = 0
            target = (value >> 32) & 0xFFFF
            for n in range(count):
                shorthand = (value >> 18) & 3
                if (shorthand == 0 and n == target) or shorthand == 2 or (shorthand == 3 and n != chosen):
                    other = cpus[n]
                    other[s.APIC_IRR + ((value & 0xFF) >> 6)] |= 1 << (value & 63)
                    evaluate(other, a)
        if code != HORIZON or only >= 0:
            return code | chosen << 8
