"""Events through the gates of any mode: descriptors, privilege, stacks, error codes, faults on the way.

SDM: "Exception- and Interrupt-Handler Procedures"; "Interrupt and Exception Handling in 64-bit Mode";
"Interrupt and Exception Handling in Real-Address Mode".
Not modelled: task switches outside VMX non-root operation, where they exit.
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import (
    DB,
    DF,
    EVENT,
    EXTERNAL,
    GP,
    HARDWARE_EXCEPTION,
    JUMPED,
    NMI_EVENT,
    NP,
    PF,
    RF_IF,
    RF_NT,
    RF_RF,
    RF_TF,
    SOFTWARE_EXCEPTION,
    SOFTWARE_INTERRUPT,
    SS,
    STOPPED,
    TRIPLE_FAULTED,
    TS,
    VALID,
)
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.cursor import set_limit, set_privilege
from vtsim.cpu.kernels.digest import saw_exception
from vtsim.cpu.kernels.exceptions import (
    becomes_double_fault,
    exception_exit,
    exception_exits,
    is_fault,
    raise_exception,
    raise_fault,
)
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.inner_stacks import inner_stack
from vtsim.cpu.kernels.ledger import charge, record
from vtsim.cpu.kernels.modes import BASES, LIMITS_AT, LOW32, RIGHTS, UNUSABLE, canonical, cpl, set_mode
from vtsim.cpu.kernels.operands import SEGMENT_REFUSED, linear, load_linear, store_linear
from vtsim.cpu.kernels.pending import arm
from vtsim.cpu.kernels.segments import base_of, fetch_descriptor, limit_of, load_cached, rights_of
from vtsim.vmcs import reasons as x

# fmt: off
TASK_GATE, INTERRUPT_16, TRAP_16, INTERRUPT_32, TRAP_32 = 5, 6, 7, 14, 15
BY_GATE: int = 3 << 30
RF_VM: int = 1 << 17
# fmt: on


@kernel
def gate_cycles(m: Record, kind: int, injected: int) -> int:
    """What it takes to go through a gate; an instruction that does so has paid its own price."""
    if kind == EXTERNAL:
        return m[s.P_INTERRUPT]
    if kind >= SOFTWARE_INTERRUPT and injected == 0:
        return 0
    return m[s.P_EXCEPTION]


@kernel
def through_gates(m: Record, a: Arena, t: Tags) -> int:
    """Deliver the event in EVENT_…; a fault on the way takes its place, or makes it a double fault."""
    injected = m[s.INJECTED]  # by VM entry: RF of its image is what was loaded
    m[s.INJECTED] = 0
    for _ in range(6):
        vector = m[s.EVENT_VECTOR]
        kind = m[s.EVENT_TYPE]
        error = m[s.EVENT_ERROR]
        m[s.VECTORING] = vector | kind << 8 | m[s.EVENT_HAS_ERROR] << 11 | VALID
        m[s.VECTORING_ERROR] = error
        m[s.VECTORING_LENGTH] = m[s.EVENT_LENGTH]
        before = m[s.PRIVILEGE]
        if vector == PF and kind == HARDWARE_EXCEPTION:
            m[s.CR2] = m[s.EVENT_CR2]
        if vector == DB and kind == HARDWARE_EXCEPTION:
            m[s.DR6] = (m[s.DR6] & ~0xF) | (m[s.EVENT_CR2] & 0xE00F)
            m[s.DR7] &= ~(1 << 13)
        charge(m, a, o.EVENT_DELIVERY, gate_cycles(m, kind, injected))
        flags = m[s.RFLAGS]
        if injected == 0 and is_fault(vector, kind):
            flags |= RF_RF
        elif injected == 0 and kind >= SOFTWARE_INTERRUPT:  # the instruction has cleared it
            flags &= ~RF_RF
        injected = 0
        ended = real_gate(m, a, t, flags) if m[s.MODE] & modes.REAL else protected_gate(m, a, t, flags)
        if ended == 0:
            if vector == PF and kind == HARDWARE_EXCEPTION:
                a[m[s.OWNER] + k.PAGE_FAULTS] += 1
            if kind == NMI_EVENT:
                m[s.NMI_BLOCKED] = 1
            a[m[s.OWNER] + (k.INTERRUPTS if kind == EXTERNAL else k.EXCEPTIONS)] += 1
            if kind == HARDWARE_EXCEPTION:
                saw_exception(m, a, vector, error if m[s.EVENT_HAS_ERROR] else -1)
            m[s.VECTORING] = 0
            m[s.HALTED] = 0
            m[s.INTERRUPT_SHADOW] = 0
            m[s.BEGUN_FLAGS] = 0
            m[s.IRET_UNBLOCKED] = 0
            set_mode(m)
            if m[s.PENDING]:
                arm(m, a)
            set_limit(m, a)
            if m[s.TRACE_ON]:
                record(m, a, before, tr.INTERRUPT if kind == EXTERNAL else tr.FAULT, vector, 0, error, m[s.CR2])
            return JUMPED
        if ended != EVENT:
            return ended
        m[s.RFLAGS] |= RF_RF
        second = m[s.EVENT_VECTOR]
        if m[s.NONROOT] and exception_exits(m, a, second):  # before the two are combined
            return exception_exit(m, a, second, HARDWARE_EXCEPTION, 0)
        if second == PF:
            m[s.CR2] = m[s.EVENT_CR2]
        if kind == HARDWARE_EXCEPTION and vector == DF:
            m[s.VECTORING] = 0
            m[s.VECTORING_ERROR] = 0
            if m[s.NONROOT]:
                vm_exit(m, a, x.TRIPLE_FAULT, 0, 0)
                return JUMPED
            m[s.STOP] = TRIPLE_FAULTED
            return STOPPED
        if becomes_double_fault(vector, kind, second):
            m[s.VECTORING] = 0  # what the double fault replaces is not reported
            m[s.VECTORING_ERROR] = 0
            raise_exception(m, DF, 1, 0)
            if m[s.NONROOT] and exception_exits(m, a, DF):
                return exception_exit(m, a, DF, HARDWARE_EXCEPTION, 0)
    m[s.STOP] = TRIPLE_FAULTED
    return STOPPED


@kernel
def external_bit(kind: int) -> int:
    """The EXT bit of an error code: the event was not raised by INT n, INT3 or INTO.

    SDM: "Error Code".
    """
    return 0 if kind == SOFTWARE_INTERRUPT or kind == SOFTWARE_EXCEPTION else 1


@kernel
def translated(m: Record, a: Arena, t: Tags, fault: int) -> int:
    """A memory access of the delivery was refused: EVENT, or JUMPED where it exited."""
    return raise_fault(m, a, t, fault)


@kernel
def protected_gate(m: Record, a: Arena, t: Tags, flags: int) -> int:
    """Deliver through the IDT of protected or IA-32e mode: 0, EVENT for a fault, JUMPED after an exit."""
    vector = m[s.EVENT_VECTOR]
    kind = m[s.EVENT_TYPE]
    long = m[s.EFER] & modes.LMA != 0
    ext = external_bit(kind)
    shift = 4 if long else 3
    if (vector << shift) + (1 << shift) - 1 > m[s.IDTR_LIMIT]:
        return raise_exception(m, GP, 1, vector << 3 | 2 | ext)
    at = m[s.IDTR_BASE] + (vector << shift)
    if not long:
        at &= LOW32
    gate = load_linear(m, a, t, at, 8, 0)
    if m[s.FAULT_KIND]:
        return translated(m, a, t, m[s.FAULT_KIND])
    high = 0
    if long:
        high = load_linear(m, a, t, at + 8, 8, 0)
        if m[s.FAULT_KIND]:
            return translated(m, a, t, m[s.FAULT_KIND])
    form = (gate >> 40) & 0x1F
    good = form == INTERRUPT_32 or form == TRAP_32
    if not long:
        good = good or form == INTERRUPT_16 or form == TRAP_16 or form == TASK_GATE
    if not good:
        return raise_exception(m, GP, 1, vector << 3 | 2 | ext)
    if (kind == SOFTWARE_INTERRUPT or kind == SOFTWARE_EXCEPTION) and (gate >> 45) & 3 < cpl(m):
        return raise_exception(m, GP, 1, vector << 3 | 2)
    if (gate >> 47) & 1 == 0:
        return raise_exception(m, NP, 1, vector << 3 | 2 | ext)
    if form == TASK_GATE:
        return task_gate(m, a, t, (gate >> 16) & 0xFFFF, ext, flags)
    selector = (gate >> 16) & 0xFFFF
    if selector & 0xFFFC == 0:
        return raise_exception(m, GP, 1, ext)
    descriptor = fetch_descriptor(m, a, t, selector)
    if m[s.FAULT_KIND] == SEGMENT_REFUSED:
        return raise_exception(m, GP, 1, (selector & 0xFFFC) | ext)
    if m[s.FAULT_KIND]:
        return translated(m, a, t, m[s.FAULT_KIND])
    rights = rights_of(descriptor)
    dpl = (rights >> 5) & 3
    refused = rights & 0x18 != 0x18 or dpl > cpl(m)
    if long and rights & (modes.AR_L | modes.AR_D) != modes.AR_L:
        refused = True
    if refused:
        return raise_exception(m, GP, 1, (selector & 0xFFFC) | ext)
    if rights & modes.AR_P == 0:
        return raise_exception(m, NP, 1, (selector & 0xFFFC) | ext)
    ring = cpl(m) if rights & 4 else dpl
    if m[s.MODE] & modes.V86 and ring != 0:
        return raise_exception(m, GP, 1, (selector & 0xFFFC) | ext)
    if long:
        return long_frame(m, a, t, gate, high, descriptor, ring, flags, ext)
    return legacy_frame(m, a, t, gate, descriptor, ring, flags, ext)


@kernel
def task_gate(m: Record, a: Arena, t: Tags, selector: int, ext: int, flags: int) -> int:
    """A task gate: the TSS is checked, then VMX non-root operation exits.

    SDM: "Treatment of Task Switches".
    """
    descriptor = fetch_descriptor(m, a, t, selector)
    error = (selector & 0xFFFC) | ext
    if selector & 4 or m[s.FAULT_KIND] == SEGMENT_REFUSED:
        return raise_exception(m, GP, 1, error)
    if m[s.FAULT_KIND]:
        return translated(m, a, t, m[s.FAULT_KIND])
    kind = rights_of(descriptor) & 0x1F
    if kind != 1 and kind != 9:
        return raise_exception(m, GP, 1, error)
    if rights_of(descriptor) & modes.AR_P == 0:
        return raise_exception(m, NP, 1, error)
    m[s.RFLAGS] = flags
    vm_exit(m, a, x.TASK_SWITCH, BY_GATE | selector, m[s.EVENT_LENGTH])
    return JUMPED


@kernel
def finish(m: Record, a: Arena, gate: int, selector: int, descriptor: int, ring: int, rip: int) -> None:
    """Enter the handler."""
    load_cached(m, modes.CS, (selector & 0xFFFC) | ring, descriptor)
    m[s.RIP] = rip
    m[s.RFLAGS] &= ~(RF_TF | RF_NT | RF_RF | RF_VM)
    if (gate >> 40) & 1 == 0:
        m[s.RFLAGS] &= ~RF_IF
    set_privilege(m, a, ring)


@kernel
def long_frame(
    m: Record, a: Arena, t: Tags, gate: int, high: int, descriptor: int, ring: int, flags: int, ext: int
) -> int:
    """The stack frame of IA-32e mode.

    SDM: "64-Bit Mode Stack Frame"; "Interrupt Stack Table".
    """
    has_error = m[s.EVENT_HAS_ERROR]
    inner = ring < cpl(m)
    table = (gate >> 32) & 7
    rsp = m[s.GPR + s.RSP]
    if m[s.MODE] and not inner:
        rsp &= LOW32
    if inner or table:
        offset = 28 + 8 * table if table else 4 + 8 * ring
        if offset + 7 > m[LIMITS_AT + modes.TR]:
            return raise_exception(m, TS, 1, (m[s.TR_SELECTOR] & 0xFFFC) | ext)
        rsp = load_linear(m, a, t, m[s.TR_BASE] + offset, 8, 0)
        if m[s.FAULT_KIND]:
            return translated(m, a, t, m[s.FAULT_KIND])
    if not canonical(m, rsp):
        return raise_exception(m, SS, 1, ext)
    target = (gate & 0xFFFF) | ((gate >> 48) & 0xFFFF) << 16 | (high & LOW32) << 32
    if not canonical(m, target):
        return raise_exception(m, GP, 1, ext)
    rsp &= ~15
    user = 1 if ring == 3 else 0
    words = 6 if has_error else 5
    for n in range(words):
        value = m[s.SS_SELECTOR]
        if n == 1:
            value = m[s.GPR + s.RSP]
        elif n == 2:
            value = flags
        elif n == 3:
            value = m[s.CS_SELECTOR]
        elif n == 4:
            value = m[s.RIP] + m[s.EVENT_LENGTH]
        elif n == 5:
            value = m[s.EVENT_ERROR]
        fault = store_linear(m, a, t, rsp - 8 * (n + 1), 8, value, user)
        if fault:
            return translated(m, a, t, fault)
    if inner:
        m[s.SS_SELECTOR] = ring
        m[RIGHTS + modes.SS] = UNUSABLE | ring << 5
        m[LIMITS_AT + modes.SS] = 0
        m[BASES + modes.SS] = 0
    m[s.GPR + s.RSP] = rsp - 8 * words
    finish(m, a, gate, (gate >> 16) & 0xFFFF, descriptor, ring, target)
    return 0


@kernel
def legacy_frame(m: Record, a: Arena, t: Tags, gate: int, descriptor: int, ring: int, flags: int, ext: int) -> int:
    """The stack frame of protected mode, for 16- and 32-bit gates, with a stack of the TSS for an inner ring."""
    has_error = m[s.EVENT_HAS_ERROR]
    form = (gate >> 40) & 0x1F
    size = 4 if form >= INTERRUPT_32 else 2
    inner = ring < cpl(m)
    v86 = m[s.MODE] & modes.V86 != 0
    old_ss = m[s.SS_SELECTOR]
    old_rsp = m[s.GPR + s.RSP]
    stack_base = m[BASES + modes.SS]
    stack_rights = m[RIGHTS + modes.SS]
    stack_limit = m[LIMITS_AT + modes.SS]
    ss = 0
    stack = 0
    rsp = old_rsp
    if inner:
        ended, ss, rsp, stack = inner_stack(m, a, t, ring, ext)
        if ended:
            return ended
        stack_rights = rights_of(stack)
        stack_base = base_of(stack)
        stack_limit = limit_of(stack)
    mask = LOW32 if stack_rights & modes.AR_D else 0xFFFF
    words = 3 + (2 if inner else 0) + (4 if v86 else 0) + (1 if has_error else 0)
    low = (rsp - size * words) & mask
    expand = stack_rights & 4 != 0
    top = low + size * words - 1
    if (not expand and top > stack_limit) or (expand and low <= stack_limit) or stack_rights & UNUSABLE:
        return raise_exception(m, SS, 1, ((ss & 0xFFFC) if inner else 0) | ext)
    target = (gate & 0xFFFF) | (((gate >> 48) & 0xFFFF) << 16 if size == 4 else 0)
    code_limit = limit_of(descriptor)
    user = 1 if ring == 3 else 0
    position = 0
    for n in range(10):
        value = 0
        if n < 4:  # GS, FS, DS, ES
            if not v86:
                continue
            value = m[modes.SELECTORS_AT + (modes.GS - n if n < 2 else modes.DS if n == 2 else modes.ES)]
        elif n == 4 or n == 5:
            if not inner:
                continue
            value = old_ss if n == 4 else old_rsp
        elif n == 6:
            value = flags
        elif n == 7:
            value = m[s.CS_SELECTOR]
        elif n == 8:
            value = m[s.RIP] + m[s.EVENT_LENGTH]
        else:
            if not has_error:
                continue
            value = m[s.EVENT_ERROR]
        position += 1
        fault = store_linear(m, a, t, (stack_base + ((rsp - size * position) & mask)) & LOW32, size, value, user)
        if fault:
            return translated(m, a, t, fault)
    if target > code_limit:
        return raise_exception(m, GP, 1, ext)
    if inner:
        load_cached(m, modes.SS, (ss & 0xFFFC) | ring, stack)
    if v86:
        for segment in range(modes.LDTR):
            if segment != modes.CS and segment != modes.SS:
                m[modes.SELECTORS_AT + segment] = 0
                m[RIGHTS + segment] = UNUSABLE
    m[s.GPR + s.RSP] = (rsp & ~mask & LOW32) | low
    finish(m, a, gate, (gate >> 16) & 0xFFFF, descriptor, ring, target)
    return 0


@kernel
def real_gate(m: Record, a: Arena, t: Tags, flags: int) -> int:
    """Deliver through the interrupt vector table of real-address mode; there are no error codes."""
    vector = m[s.EVENT_VECTOR]
    m[s.EVENT_HAS_ERROR] = 0
    if vector * 4 + 3 > m[s.IDTR_LIMIT]:
        return raise_exception(m, GP, 0, 0)
    entry = load_linear(m, a, t, m[s.IDTR_BASE] + vector * 4, 4, 0)
    if m[s.FAULT_KIND]:
        return translated(m, a, t, m[s.FAULT_KIND])
    rsp = m[s.GPR + s.RSP]
    mask = LOW32 if m[RIGHTS + modes.SS] & modes.AR_D else 0xFFFF
    if ((rsp - 6) & mask) + 5 > m[LIMITS_AT + modes.SS]:
        return raise_exception(m, SS, 0, 0)
    for n in range(3):
        value = flags & 0xFFFF
        if n == 1:
            value = m[s.CS_SELECTOR]
        elif n == 2:
            value = m[s.RIP] + m[s.EVENT_LENGTH]
        fault = store_linear(m, a, t, linear(m, modes.SS, (rsp - 2 * (n + 1)) & mask), 2, value, 0)
        if fault:
            return translated(m, a, t, fault)
    m[s.GPR + s.RSP] = (rsp & ~mask) | ((rsp - 6) & mask)
    m[s.RIP] = entry & 0xFFFF
    m[s.CS_SELECTOR] = (entry >> 16) & 0xFFFF
    m[BASES + modes.CS] = m[s.CS_SELECTOR] << 4
    m[s.RFLAGS] &= ~(RF_IF | RF_TF | RF_RF | (1 << 18))
    return 0
