"""What interrupts the flow of a program: exceptions and interrupts through the IDT, VM exits and VM entries.

SDM: "Interrupt and Exception Handling"; "VM Exits"; "VM Entries"; "Saving Guest State"; "Loading Host State".
Not modelled: descriptor loads from the GDT and LDT on delivery; task gates; 16- and 32-bit gates; MSR areas.
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import (
    A_REPLAY_LOG,
    A_REPLAY_LOG_LIMIT,
    A_REPLAY_LOGGED,
    A_REPLAY_ROWS,
    A_TRACE,
    A_TRACE_LENGTH,
    A_TRACE_LIMIT,
    is_memory,
    load,
    store,
)
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.caches import data_miss, probe
from vtsim.cpu.kernels.translate import (
    MISCONFIGURATION,
    NOT_CANONICAL,
    PAGE_FAULT,
    READ,
    VIOLATION,
    WRITE,
    drop_contexts,
    recorded,
    set_context,
    translate,
)
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h

# fmt: off
# how an op ended
NEXT, JUMPED, EVENT, STOPPED, AGAIN = range(5)
# why the engine stopped
(RUNNING, HORIZON, BUDGET, PLATFORM_HOOK, PROGRAM_END, TRIPLE_FAULTED, MODEL_FAULT, TRACE_FULL, OUT_OF_MEMORY,
 ENTRY_FAILED, DEVICE_READ, DEVICE_WRITE, PORT_READ, PORT_WRITE, SHUTDOWN) = range(15)
STOPS = ("running", "horizon", "op budget", "platform hook", "end of program", "triple fault", "model fault",
         "trace full", "out of memory", "VM-entry failure", "device read", "device write", "port read", "port write",
         "shutdown")
# event types of interruption information
EXTERNAL, NMI_EVENT, HARDWARE_EXCEPTION, SOFTWARE_INTERRUPT, PRIVILEGED_EXCEPTION, SOFTWARE_EXCEPTION = 0, 2, 3, 4, 5, 6
DE, DB, BP, UD, NM, DF, TS, NP, SS, GP, PF = 0, 1, 3, 6, 7, 8, 10, 11, 12, 13, 14
VALID = 1 << 31
ERROR_VALID = 1 << 11
RF_IF, RF_TF, RF_NT, RF_RF = 1 << 9, 1 << 8, 1 << 14, 1 << 16
FOREVER = 1 << 62
SELECTORS, LIMITS, NATURALS = 8, 18, 20   # words in each run of guest state that every exit saves
TRACE_WORDS, TRACE_SLACK = 10, 16   # a record is a row of vtsim.base.trace
# fmt: on


@kernel
def settle(m: Record, a: Arena) -> None:
    """Charge cycles and instructions to whoever ran: before owner, privilege or activity change."""
    privilege = m[s.PRIVILEGE]
    owner = m[s.OWNER]
    at = owner + (privilege & 1) * k.RING_STRIDE + privilege * o.ACTIVITY_SLOTS + m[s.ACTIVITY]
    a[at] += m[s.CYCLE] - m[s.MARK]
    m[s.MARK] = m[s.CYCLE]
    a[owner + k.OWN_INSTRUCTIONS + privilege] += m[s.RETIRED] - m[s.RETIRED_MARK]
    m[s.RETIRED_MARK] = m[s.RETIRED]


@kernel
def charge(m: Record, a: Arena, activity: int, cycles: int) -> None:
    """Let cycles pass that belong to an activity of the CPU itself, not of the program."""
    privilege = m[s.PRIVILEGE]
    a[m[s.OWNER] + (privilege & 1) * k.RING_STRIDE + privilege * o.ACTIVITY_SLOTS + activity] += cycles
    m[s.CYCLE] += cycles
    m[s.MARK] += cycles


@kernel
def record(m: Record, a: Arena, before: int, kind: int, reason: int, cycles: int, detail: int, about: int) -> None:
    """Append a transition to the trace. Nearly full, it makes the engine stop at the next op, to be drained."""
    n = a[A_TRACE_LENGTH]
    if n + TRACE_SLACK >= a[A_TRACE_LIMIT]:
        m[s.LIMIT] = 0
        if n >= a[A_TRACE_LIMIT]:
            return
    at = a[A_TRACE] + n * TRACE_WORDS
    a[at] = m[s.CYCLE]
    a[at + 1] = m[s.CPU]
    a[at + 2] = before
    a[at + 3] = m[s.PRIVILEGE]
    a[at + 4] = kind
    a[at + 5] = reason
    a[at + 6] = cycles
    a[at + 7] = m[s.RIP]
    a[at + 8] = detail
    a[at + 9] = about
    a[A_TRACE_LENGTH] = n + 1


@kernel
def deliverable(m: Record, a: Arena) -> bool:
    """Would a pending external interrupt be taken at this op boundary, by delivery or by a VM exit?"""
    if m[s.APIC_PENDING] == 0:
        return False
    if m[s.NONROOT] and a[m[s.VMCS] + v.PIN_CONTROLS] & b.EXTERNAL_INTERRUPT_EXITING:
        return True
    return m[s.RFLAGS] & RF_IF != 0


@kernel
def set_limit(m: Record, a: Arena) -> None:
    """Work out the cycle at which the loop must look up: horizon, timers, or at once where an event may be taken."""
    limit = min(m[s.UNTIL], m[s.APIC_DEADLINE])
    if m[s.WIRE_AT]:
        limit = min(limit, m[s.WIRE_AT])
    if m[s.NONROOT]:
        limit = min(limit, m[s.TIMER_DEADLINE])
        if m[s.WINDOW] and m[s.RFLAGS] & RF_IF:
            limit = 0
    if m[s.INTERRUPT_SHADOW] or m[s.HALTED] or deliverable(m, a):
        limit = 0
    m[s.LIMIT] = limit


@kernel
def set_privilege(m: Record, a: Arena, ring: int) -> None:
    """Change ring; keeps SS.DPL, where VMX looks for it."""
    settle(m, a)
    m[s.PRIVILEGE] = (2 if m[s.NONROOT] else 0) + (1 if ring else 0)
    m[s.SS_ACCESS_RIGHTS] = (m[s.SS_ACCESS_RIGHTS] & ~0x60) | (ring << 5)


@kernel
def timed_access(m: Record, a: Arena, t: Tags, gva: int, access: int) -> int:
    """Translate and access memory as ring 0, charging walk and stall; the host-physical address or a fault."""
    return access_as(m, a, t, gva, access, 0)


@kernel
def access_as(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int) -> int:
    """Translate and access memory as a ring, charging walk and stall; the host-physical address or a fault."""
    m[s.STALL] = 0
    hpa = translate(m, a, t, gva, access, user)
    if m[s.STALL]:
        charge(m, a, o.PAGE_WALK, m[s.STALL])
        m[s.STALL] = 0
    if hpa < 0:
        return hpa
    if is_memory(a, hpa):
        a[m[s.OWNER] + k.ACCESSES] += 1
        if not probe(m, t, s.L1D, hpa >> 6):
            charge(m, a, o.DATA_STALL, data_miss(m, a, t, hpa >> 6))
    return hpa


@kernel
def read64(m: Record, a: Arena, t: Tags, gva: int) -> int:
    """Load 8 bytes as ring 0. FAULT_KIND is 0 if it worked."""
    return read_as(m, a, t, gva, 0)


@kernel
def read_as(m: Record, a: Arena, t: Tags, gva: int, user: int) -> int:
    """Load 8 bytes as a ring, across pages if need be. FAULT_KIND is 0 if it worked."""
    m[s.FAULT_KIND] = 0
    hpa = access_as(m, a, t, gva, READ, user)
    if hpa < 0:
        return 0
    if gva & 0xFFF > 4088:
        return load_across(m, a, t, gva, 8, hpa, user)
    return load(a, hpa, 8) if is_memory(a, hpa) else -1


@kernel
def load_across(m: Record, a: Arena, t: Tags, gva: int, size: int, hpa: int, user: int) -> int:
    """Load `size` bytes from two pages, the first of which is at `hpa`. FAULT_KIND is 0 if it worked."""
    m[s.FAULT_KIND] = 0
    first = 4096 - (gva & 0xFFF)
    second = access_as(m, a, t, gva + first, READ, user)
    if second < 0:
        m[s.FAULT_KIND] = second
        return 0
    if not is_memory(a, hpa) or not is_memory(a, second):
        return -1
    value = 0
    for n in range(size):
        value |= load(a, hpa + n if n < first else second + n - first, 1) << (8 * n)
    return value


@kernel
def write64(m: Record, a: Arena, t: Tags, gva: int, value: int) -> int:
    """Store 8 bytes as ring 0: 0, or a fault."""
    return write_as(m, a, t, gva, value, 0)


@kernel
def write_as(m: Record, a: Arena, t: Tags, gva: int, value: int, user: int) -> int:
    """Store 8 bytes as a ring, across pages if need be: 0, or a fault."""
    hpa = access_as(m, a, t, gva, WRITE, user)
    if hpa < 0:
        return hpa
    if gva & 0xFFF > 4088:
        return store_across(m, a, t, gva, 8, value, hpa, user)
    if is_memory(a, hpa) and store(a, hpa, 8, value) < 0:
        m[s.STOP] = OUT_OF_MEMORY
        m[s.LIMIT] = 0
    return 0


@kernel
def store_across(m: Record, a: Arena, t: Tags, gva: int, size: int, value: int, hpa: int, user: int) -> int:
    """Store `size` bytes in two pages, the first of which is at `hpa`: 0, or a fault with nothing stored."""
    first = 4096 - (gva & 0xFFF)
    second = access_as(m, a, t, gva + first, WRITE, user)
    if second < 0:
        return second
    if is_memory(a, hpa) and is_memory(a, second):
        for n in range(size):
            if store(a, hpa + n if n < first else second + n - first, 1, value >> (8 * n)) < 0:
                m[s.STOP] = OUT_OF_MEMORY
                m[s.LIMIT] = 0
    return 0


@kernel
def raise_exception(m: Record, vector: int, has_error: int, error: int) -> int:
    """Record an exception of the op in flight."""
    m[s.EVENT_VECTOR] = vector
    m[s.EVENT_HAS_ERROR] = has_error
    m[s.EVENT_ERROR] = error
    m[s.EVENT_TYPE] = HARDWARE_EXCEPTION
    m[s.EVENT_LENGTH] = 0
    return EVENT


@kernel
def raise_fault(m: Record, a: Arena, t: Tags, fault: int) -> int:
    """Turn a refused translation into an exception, or take the VM exit that it causes."""
    if fault == PAGE_FAULT:
        m[s.EVENT_CR2] = m[s.FAULT_GVA]
        return raise_exception(m, PF, 1, m[s.FAULT_CODE])
    if fault == NOT_CANONICAL:
        return raise_exception(m, GP, 1, 0)
    m[s.EXIT_GPA] = m[s.FAULT_GPA]
    m[s.EXIT_GLA] = m[s.FAULT_GVA]
    reason = x.EPT_VIOLATION if fault == VIOLATION else x.EPT_MISCONFIG
    vm_exit(m, a, reason, m[s.FAULT_QUALIFICATION], m[s.OP_LENGTH])
    return JUMPED


@kernel
def deliver(m: Record, a: Arena, t: Tags) -> int:
    """Deliver the event in EVENT_…: a VM exit if the exception bitmap says so, else through the IDT.

    SDM: "Exceptions and Interrupts"; "Exception Bitmap"; "Interrupt 8—Double Fault Exception (#DF)".
    """
    vector = m[s.EVENT_VECTOR]
    kind = m[s.EVENT_TYPE]
    if m[s.NONROOT] and kind != EXTERNAL and kind != SOFTWARE_INTERRUPT and kind != NMI_EVENT:
        if exception_exits(m, a, vector):
            m[s.EXIT_INTERRUPTION] = vector | kind << 8 | m[s.EVENT_HAS_ERROR] << 11 | VALID
            m[s.EXIT_ERROR_CODE] = m[s.EVENT_ERROR]
            vm_exit(m, a, x.EXCEPTION_NMI, m[s.EVENT_CR2] if vector == PF else 0, m[s.OP_LENGTH])
            return JUMPED
    return through_idt(m, a, t)


@kernel
def exception_exits(m: Record, a: Arena, vector: int) -> bool:
    """Does this exception, with the error code in EVENT_ERROR, exit?

    SDM: "Exception Bitmap".
    """
    at = m[s.VMCS]
    wanted = (a[at + v.EXCEPTION_BITMAP] >> vector) & 1 != 0
    if (
        vector == PF
        and m[s.EVENT_ERROR] & a[at + v.PAGE_FAULT_ERROR_CODE_MASK] != a[at + v.PAGE_FAULT_ERROR_CODE_MATCH]
    ):
        return not wanted
    return wanted


@kernel
def contributory(vector: int) -> bool:
    """Is this exception contributory to a double fault?"""
    return vector == DE or (vector >= TS and vector <= GP)


@kernel
def failed_delivery(m: Record, a: Arena, t: Tags, fault: int, vector: int) -> int:
    """Delivering `vector` faulted: VM exit, double fault or shutdown. EVENT asks the caller to deliver again."""
    if fault == VIOLATION or fault == MISCONFIGURATION:
        raise_fault(m, a, t, fault)
        return JUMPED
    exception = m[s.EVENT_TYPE] == HARDWARE_EXCEPTION
    if exception and vector == DF:
        m[s.VECTORING] = 0
        if m[s.NONROOT]:
            vm_exit(m, a, x.TRIPLE_FAULT, 0, 0)
            return JUMPED
        m[s.STOP] = TRIPLE_FAULTED
        return STOPPED
    if fault == PAGE_FAULT:
        again = exception and vector == PF
        m[s.EVENT_CR2] = m[s.FAULT_GVA]
        code = raise_exception(m, PF, 1, m[s.FAULT_CODE])
    else:
        again = exception and (contributory(vector) or vector == PF)
        external = 0 if m[s.EVENT_TYPE] == SOFTWARE_INTERRUPT else 1
        code = raise_exception(m, GP, 1, vector << 3 | 2 | external)
    if again:
        m[s.VECTORING] = 0  # what the double fault replaces is not reported
        code = raise_exception(m, DF, 1, 0)
    return code


@kernel
def through_idt(m: Record, a: Arena, t: Tags) -> int:
    """Push the interrupted context on the handler's stack and go to the handler.

    SDM: "Exception- and Interrupt-Handler Procedures"; "64-Bit Mode Stack Frame"; "Interrupt Stack Table".
    """
    if recorded(m, a):
        return recorded_delivery(m, a, t)
    for _ in range(3):
        vector = m[s.EVENT_VECTOR]
        kind = m[s.EVENT_TYPE]
        error = m[s.EVENT_ERROR]
        has_error = m[s.EVENT_HAS_ERROR]
        m[s.VECTORING] = vector | kind << 8 | has_error << 11 | VALID
        m[s.VECTORING_ERROR] = error
        m[s.VECTORING_LENGTH] = m[s.EVENT_LENGTH]
        ring = m[s.PRIVILEGE] & 1
        before = m[s.PRIVILEGE]
        if vector == PF and kind == HARDWARE_EXCEPTION:  # before the delivery, which may be refused
            m[s.CR2] = m[s.EVENT_CR2]
        charge(m, a, o.EVENT_DELIVERY, m[s.P_INTERRUPT] if kind == EXTERNAL else m[s.P_EXCEPTION])
        low = 0
        high = 0
        fault = 0
        rsp = m[s.GPR + s.RSP]
        if vector * 16 + 15 > m[s.IDTR_LIMIT]:
            fault = NOT_CANONICAL
        if fault == 0:
            low = read64(m, a, t, m[s.IDTR_BASE] + vector * 16)
            fault = m[s.FAULT_KIND]
        if fault == 0:
            high = read64(m, a, t, m[s.IDTR_BASE] + vector * 16 + 8)
            fault = m[s.FAULT_KIND]
        if fault == 0 and (low >> 47) & 1 == 0:
            fault = NOT_CANONICAL
        if fault == 0 and kind == SOFTWARE_INTERRUPT and ring and (low >> 45) & 3 != 3:
            fault = NOT_CANONICAL
        if fault == 0:
            table = (low >> 32) & 7
            if table:
                rsp = read64(m, a, t, m[s.TR_BASE] + 28 + 8 * table)
                fault = m[s.FAULT_KIND]
            elif ring:
                rsp = read64(m, a, t, m[s.TR_BASE] + 4)
                fault = m[s.FAULT_KIND]
        if fault == 0:
            rsp &= ~15
            fault = write64(m, a, t, rsp - 8, m[s.SS_SELECTOR])
        if fault == 0:
            fault = write64(m, a, t, rsp - 16, m[s.GPR + s.RSP])
        if fault == 0:
            fault = write64(m, a, t, rsp - 24, m[s.RFLAGS])
        if fault == 0:
            fault = write64(m, a, t, rsp - 32, m[s.CS_SELECTOR])
        if fault == 0:
            fault = write64(m, a, t, rsp - 40, m[s.RIP] + m[s.EVENT_LENGTH])
        if fault == 0 and has_error:
            fault = write64(m, a, t, rsp - 48, error)
        if fault == 0:
            if vector == PF and kind == HARDWARE_EXCEPTION:
                a[m[s.OWNER] + k.PAGE_FAULTS] += 1
            a[m[s.OWNER] + (k.INTERRUPTS if kind == EXTERNAL else k.EXCEPTIONS)] += 1
            m[s.GPR + s.RSP] = rsp - (48 if has_error else 40)
            set_privilege(m, a, 0)
            m[s.RIP] = (low & 0xFFFF) | ((low >> 48) & 0xFFFF) << 16 | (high & 0xFFFFFFFF) << 32
            m[s.CS_SELECTOR] = (low >> 16) & 0xFFFF
            m[s.SS_SELECTOR] = 0 if ring else m[s.SS_SELECTOR]
            m[s.RFLAGS] &= ~(RF_TF | RF_NT | RF_RF)
            if (low >> 40) & 1 == 0:  # interrupt gate
                m[s.RFLAGS] &= ~RF_IF
            m[s.VECTORING] = 0
            set_limit(m, a)
            if m[s.TRACE_ON]:
                record(m, a, before, tr.INTERRUPT if kind == EXTERNAL else tr.FAULT, vector, 0, error, m[s.CR2])
            return JUMPED
        ended = failed_delivery(m, a, t, fault, vector)
        if ended != EVENT:
            return ended
        vector = m[s.EVENT_VECTOR]
        if m[s.NONROOT] and exception_exits(m, a, vector):
            m[s.EXIT_INTERRUPTION] = vector | HARDWARE_EXCEPTION << 8 | ERROR_VALID | VALID
            m[s.EXIT_ERROR_CODE] = m[s.EVENT_ERROR]
            vm_exit(m, a, x.EXCEPTION_NMI, m[s.EVENT_CR2] if vector == PF else 0, 0)
            return JUMPED
    m[s.STOP] = TRIPLE_FAULTED
    return STOPPED


@kernel
def recorded_delivery(m: Record, a: Arena, t: Tags) -> int:
    """Deliver an event to a recorded guest: its handler is the rows that follow.

    An interrupt ends the wait for it (R13) and the HLT it came before; an exception or INT ends its own row.

    Not modelled: accesses to the stack, and outside real mode to the IDT, of a recorded guest's event delivery.
    """
    vector = m[s.EVENT_VECTOR]
    kind = m[s.EVENT_TYPE]
    before = m[s.PRIVILEGE]
    m[s.VECTORING] = vector | kind << 8 | m[s.EVENT_HAS_ERROR] << 11 | VALID
    m[s.VECTORING_ERROR] = m[s.EVENT_ERROR]
    m[s.VECTORING_LENGTH] = m[s.EVENT_LENGTH]
    charge(m, a, o.EVENT_DELIVERY, m[s.P_INTERRUPT] if kind == EXTERNAL else m[s.P_EXCEPTION])
    if m[s.CR0] & 1 == 0:
        hpa = timed_access(m, a, t, 4 * vector, READ)
        if hpa < 0:
            return failed_delivery(m, a, t, hpa, vector)
    m[s.VECTORING] = 0
    if kind == EXTERNAL:
        m[s.GPR + s.R13] = 0
        if a[a[A_REPLAY_ROWS] + (m[s.RIP] - o.REPLAY_BASE) * o.ROW_WORDS] & 0xFF == o.HLT:
            m[s.RIP] += 1
        if m[s.NONROOT] == 0:  # the row that ends the interrupt writes to the recorded machine's APIC, not to this one
            m[s.APIC_ISR + (vector >> 6)] &= ~(1 << (vector & 63))
    elif kind == SOFTWARE_INTERRUPT or kind == SOFTWARE_EXCEPTION:
        m[s.RIP] += m[s.EVENT_LENGTH]
    elif kind != NMI_EVENT:
        m[s.RIP] += 1
        if vector == PF:
            m[s.CR2] = m[s.EVENT_CR2]
            a[m[s.OWNER] + k.PAGE_FAULTS] += 1
    a[m[s.OWNER] + (k.INTERRUPTS if kind == EXTERNAL else k.EXCEPTIONS)] += 1
    set_privilege(m, a, 0)
    m[s.RFLAGS] &= ~RF_IF
    set_limit(m, a)
    if m[s.TRACE_ON]:
        record(m, a, before, tr.INTERRUPT if kind == EXTERNAL else tr.FAULT, vector, 0, m[s.EVENT_ERROR], m[s.CR2])
    return JUMPED


@kernel
def log_exit(m: Record, a: Arena, reason: int, qualification: int) -> None:
    """Note an exit of a recorded guest: row and reason, qualification."""
    n = a[A_REPLAY_LOGGED]
    if n < a[A_REPLAY_LOG_LIMIT]:
        at = a[A_REPLAY_LOG] + 2 * n
        a[at] = m[s.RIP] - o.REPLAY_BASE | reason << 32
        a[at + 1] = qualification
    a[A_REPLAY_LOGGED] = n + 1


@kernel
def vm_exit(m: Record, a: Arena, reason: int, qualification: int, length: int) -> None:
    """Save the guest, record why, load the host. Other exit information is taken from EXIT_… and cleared.

    SDM: "Recording VM-Exit Information and Updating VM-entry Control Fields"; "Saving Guest State";
    "Loading Host State".
    """
    if m[s.IN_FLIGHT]:  # the op that exits neither retires nor costs what it would have cost
        m[s.RETIRED] -= 1
        m[s.CYCLE] -= m[s.IN_FLIGHT] - 1
        m[s.IN_FLIGHT] = 0
    settle(m, a)
    if recorded(m, a):
        log_exit(m, a, reason, qualification)
    at = m[s.VMCS]
    vmcs = a[at : at + 512]
    before = m[s.PRIVILEGE]
    vmcs[h.V_EXIT_AT] = m[s.CYCLE]
    vmcs[h.V_EXIT_RIP] = m[s.RIP]
    vmcs[h.V_EXIT_REASON] = (reason & 0xFFFF) | (before & 1) << 16
    vmcs[h.V_DIGEST_APPLICATION] = m[s.DIGEST_APPLICATION]
    vmcs[h.V_DIGEST_KERNEL] = m[s.DIGEST_KERNEL]
    # exit information
    vmcs[v.EXIT_REASON] = reason
    vmcs[v.EXIT_QUALIFICATION] = qualification
    vmcs[v.EXIT_INSTRUCTION_LENGTH] = length
    vmcs[v.EXIT_INSTRUCTION_INFORMATION] = m[s.EXIT_INSTRUCTION_INFO]
    vmcs[v.GUEST_PHYSICAL_ADDRESS] = m[s.EXIT_GPA]
    vmcs[v.GUEST_LINEAR_ADDRESS] = m[s.EXIT_GLA]
    vmcs[v.EXIT_INTERRUPTION_INFORMATION] = m[s.EXIT_INTERRUPTION]
    vmcs[v.EXIT_INTERRUPTION_ERROR_CODE] = m[s.EXIT_ERROR_CODE]
    vmcs[v.IDT_VECTORING_INFORMATION] = m[s.VECTORING]
    vmcs[v.IDT_VECTORING_ERROR_CODE] = m[s.VECTORING_ERROR]
    if m[s.VECTORING] and (m[s.VECTORING] >> 8) & 7 in (SOFTWARE_INTERRUPT, SOFTWARE_EXCEPTION, PRIVILEGED_EXCEPTION):
        vmcs[v.EXIT_INSTRUCTION_LENGTH] = m[s.VECTORING_LENGTH]
    m[s.EXIT_INSTRUCTION_INFO] = 0
    m[s.EXIT_GPA] = 0
    m[s.EXIT_GLA] = 0
    m[s.EXIT_INTERRUPTION] = 0
    m[s.EXIT_ERROR_CODE] = 0
    m[s.VECTORING] = 0
    m[s.VECTORING_ERROR] = 0
    vmcs[v.ENTRY_INTERRUPTION_INFORMATION] &= ~VALID
    # guest state
    controls = vmcs[v.EXIT_CONTROLS]
    vmcs[v.GUEST_INTERRUPTIBILITY_STATE] = (1 if m[s.INTERRUPT_SHADOW] else 0) | m[s.NMI_BLOCKED] << 3
    vmcs[v.GUEST_ACTIVITY_STATE] = 1 if m[s.HALTED] else 0
    for n in range(SELECTORS):
        vmcs[v.GUEST_ES_SELECTOR + n] = m[s.ES_SELECTOR + n]
    for n in range(LIMITS):
        vmcs[v.GUEST_ES_LIMIT + n] = m[s.STATE + v.GUEST_ES_LIMIT - v.GUEST_START + n]
    dr7 = vmcs[v.GUEST_DR7]
    for n in range(NATURALS):
        vmcs[v.GUEST_CR0 + n] = m[s.CR0 + n]
    vmcs[v.GUEST_RSP] = m[s.GPR + s.RSP]
    vmcs[v.GUEST_IA32_SYSENTER_CS] = m[s.SYSENTER_CS]
    if controls & b.EXIT_SAVE_DEBUG_CONTROLS:
        vmcs[v.GUEST_IA32_DEBUGCTL] = m[s.DEBUGCTL]
    else:
        vmcs[v.GUEST_DR7] = dr7
    if controls & b.EXIT_SAVE_IA32_EFER:
        vmcs[v.GUEST_IA32_EFER] = m[s.EFER]
    if controls & b.EXIT_SAVE_IA32_PAT:
        vmcs[v.GUEST_IA32_PAT] = m[s.PAT]
    if controls & b.EXIT_SAVE_PREEMPTION_TIMER and vmcs[v.PIN_CONTROLS] & b.ACTIVATE_PREEMPTION_TIMER:
        left = m[s.TIMER_DEADLINE] - m[s.CYCLE]
        vmcs[v.PREEMPTION_TIMER_VALUE] = max(left, 0) >> m[s.TIMER_RATE]
    # host state
    m[s.NONROOT] = 0
    m[s.HALTED] = 0
    m[s.INTERRUPT_SHADOW] = 0
    m[s.TIMER_DEADLINE] = FOREVER
    m[s.PRIVILEGE] = o.R0
    m[s.OWNER] = m[s.HOST_OWNER]
    m[s.ACTIVITY] = o.EXIT_DISPATCH
    m[s.CR0] = vmcs[v.HOST_CR0]
    m[s.CR3] = vmcs[v.HOST_CR3]
    m[s.CR4] = vmcs[v.HOST_CR4]
    m[s.CS_SELECTOR] = vmcs[v.HOST_CS_SELECTOR]
    m[s.SS_SELECTOR] = vmcs[v.HOST_SS_SELECTOR]
    m[s.TR_SELECTOR] = vmcs[v.HOST_TR_SELECTOR]
    m[s.CS_ACCESS_RIGHTS] = 0xA09B
    m[s.SS_ACCESS_RIGHTS] = 0xC093
    m[s.FS_BASE] = vmcs[v.HOST_FS_BASE]
    m[s.GS_BASE] = vmcs[v.HOST_GS_BASE]
    m[s.TR_BASE] = vmcs[v.HOST_TR_BASE]
    m[s.GDTR_BASE] = vmcs[v.HOST_GDTR_BASE]
    m[s.IDTR_BASE] = vmcs[v.HOST_IDTR_BASE]
    m[s.GDTR_LIMIT] = 0xFFFF
    m[s.IDTR_LIMIT] = 0xFFFF
    m[s.SYSENTER_CS] = vmcs[v.HOST_IA32_SYSENTER_CS]
    m[s.SYSENTER_ESP] = vmcs[v.HOST_IA32_SYSENTER_ESP]
    m[s.SYSENTER_EIP] = vmcs[v.HOST_IA32_SYSENTER_EIP]
    m[s.GPR + s.RSP] = vmcs[v.HOST_RSP]
    m[s.RIP] = vmcs[v.HOST_RIP]
    m[s.RFLAGS] = 2
    m[s.DR7] = 0x400
    m[s.DEBUGCTL] = 0
    if controls & b.EXIT_LOAD_IA32_EFER:
        m[s.EFER] = vmcs[v.HOST_IA32_EFER]
    if controls & b.EXIT_LOAD_IA32_PAT:
        m[s.PAT] = vmcs[v.HOST_IA32_PAT]
    if m[s.VPID] == 0:
        drop_contexts(m, a, 0xFFFF, 0, True)
    m[s.CONTEXT_KEY] = -1
    set_context(m, a)
    charge(m, a, o.VM_EXIT, m[s.EXIT_CYCLES])
    set_limit(m, a)
    if m[s.TRACE_ON]:
        record(m, a, before, tr.EXIT, reason, m[s.EXIT_CYCLES], qualification, vmcs[v.GUEST_PHYSICAL_ADDRESS])


@kernel
def histogram_bucket(cycles: int) -> int:
    """The bucket of a duration: exact below 128, then 64 buckets per octave."""
    octave = 0
    while cycles >= 2 * k.BUCKETS_PER_OCTAVE:
        cycles >>= 1
        octave += 1
    bucket = octave * k.BUCKETS_PER_OCTAVE + cycles
    return min(bucket, k.HISTOGRAM_BUCKETS - 1)


@kernel
def close_exit(m: Record, a: Arena, at: int) -> None:
    """Account the exit that this VM entry ends: its time, and whether the monitor executed the instruction."""
    reason = a[at + h.V_EXIT_REASON]
    if reason < 0:
        return
    owner = a[at + h.V_OWNER]
    cycles = m[s.CYCLE] - a[at + h.V_EXIT_AT]
    line = owner + k.OWN_EXITS + (reason & 0xFF) * k.EXIT_WORDS
    a[line + k.EXIT_COUNT] += 1
    a[line + k.EXIT_TOTAL] += cycles
    a[line + k.EXIT_EXCLUSIVE] += cycles - a[at + h.V_BELOW]
    a[line + k.EXIT_LONGEST] = max(a[line + k.EXIT_LONGEST], cycles)
    a[owner + k.OWN_HISTOGRAMS + (reason & 0xFF) * k.HISTOGRAM_BUCKETS + histogram_bucket(cycles)] += 1
    if a[at + v.GUEST_RIP] != a[at + h.V_EXIT_RIP]:
        a[owner + k.OWN_EMULATED + ((reason >> 16) & 1)] += 1
    a[at + h.V_EXIT_REASON] = -1
    a[at + h.V_BELOW] = 0


@kernel
def vm_entry(m: Record, a: Arena, t: Tags) -> int:
    """Load the guest of the current VMCS and inject what it asks for.

    SDM: "Loading Guest State"; "Event Injection".
    """
    at = m[s.VMCS]
    vmcs = a[at : at + 512]
    before = m[s.PRIVILEGE]
    m[s.IN_FLIGHT] = 0
    settle(m, a)
    charge(m, a, o.VM_ENTRY, m[s.ENTRY_CYCLES])
    last = m[s.CYCLE] - vmcs[h.V_EXIT_AT]
    ended = vmcs[h.V_EXIT_REASON] & 0xFF if vmcs[h.V_EXIT_REASON] >= 0 else -1
    close_exit(m, a, at)
    primary = vmcs[v.PRIMARY_PROC_CONTROLS]
    secondary = vmcs[v.SECONDARY_PROC_CONTROLS] if primary & b.ACTIVATE_SECONDARY_CONTROLS else 0
    controls = vmcs[v.ENTRY_CONTROLS]
    m[s.EPTP] = vmcs[v.EPT_POINTER] if secondary & b.ENABLE_EPT else 0
    m[s.EPT_AD] = (m[s.EPTP] >> 6) & 1
    m[s.VPID] = vmcs[v.VPID] if secondary & b.ENABLE_VPID else 0
    m[s.NONROOT] = 1
    dr7 = m[s.DR7]
    for n in range(SELECTORS):
        m[s.ES_SELECTOR + n] = vmcs[v.GUEST_ES_SELECTOR + n]
    for n in range(LIMITS):
        m[s.STATE + v.GUEST_ES_LIMIT - v.GUEST_START + n] = vmcs[v.GUEST_ES_LIMIT + n]
    for n in range(NATURALS):
        m[s.CR0 + n] = vmcs[v.GUEST_CR0 + n]
    m[s.GPR + s.RSP] = vmcs[v.GUEST_RSP]
    m[s.SYSENTER_CS] = vmcs[v.GUEST_IA32_SYSENTER_CS]
    if controls & b.ENTRY_LOAD_DEBUG_CONTROLS:
        m[s.DEBUGCTL] = vmcs[v.GUEST_IA32_DEBUGCTL]
    else:
        m[s.DR7] = dr7
    if controls & b.ENTRY_LOAD_IA32_EFER:
        m[s.EFER] = vmcs[v.GUEST_IA32_EFER]
    if controls & b.ENTRY_LOAD_IA32_PAT:
        m[s.PAT] = vmcs[v.GUEST_IA32_PAT]
    m[s.INTERRUPT_SHADOW] = 2 if vmcs[v.GUEST_INTERRUPTIBILITY_STATE] & 3 else 0
    m[s.NMI_BLOCKED] = (vmcs[v.GUEST_INTERRUPTIBILITY_STATE] >> 3) & 1
    m[s.HALTED] = 1 if vmcs[v.GUEST_ACTIVITY_STATE] == 1 else 0
    m[s.PRIVILEGE] = o.N3 if (m[s.SS_ACCESS_RIGHTS] >> 5) & 3 else o.N0
    m[s.OWNER] = vmcs[h.V_OWNER]
    m[s.ACTIVITY] = o.APPLICATION
    m[s.DIGEST_APPLICATION] = vmcs[h.V_DIGEST_APPLICATION]
    m[s.DIGEST_KERNEL] = vmcs[h.V_DIGEST_KERNEL]
    m[s.TSC_OFFSET] = vmcs[v.TSC_OFFSET] if primary & b.USE_TSC_OFFSETTING else 0
    m[s.WINDOW] = 1 if primary & b.INTERRUPT_WINDOW_EXITING else 0
    m[s.TIMER_DEADLINE] = FOREVER
    if vmcs[v.PIN_CONTROLS] & b.ACTIVATE_PREEMPTION_TIMER:
        m[s.TIMER_DEADLINE] = m[s.CYCLE] + (vmcs[v.PREEMPTION_TIMER_VALUE] << m[s.TIMER_RATE])
    if m[s.VPID] == 0:
        drop_contexts(m, a, 0xFFFF, 0, True)
    m[s.CONTEXT_KEY] = -1
    set_context(m, a)
    vmcs[h.V_LAUNCHED] = h.LAUNCHED
    a[m[s.OWNER] + k.ENTRIES] += 1
    if m[s.TRACE_ON]:
        record(m, a, before, tr.ENTRY, ended, last, vmcs[v.ENTRY_INTERRUPTION_INFORMATION] & 0xFFFFFFFF, 0)
    information = vmcs[v.ENTRY_INTERRUPTION_INFORMATION]
    if information & VALID:
        m[s.HALTED] = 0
        a[m[s.OWNER] + k.INJECTIONS] += 1
        m[s.EVENT_VECTOR] = information & 0xFF
        m[s.EVENT_TYPE] = (information >> 8) & 7
        m[s.EVENT_HAS_ERROR] = (information >> 11) & 1
        m[s.EVENT_ERROR] = vmcs[v.ENTRY_EXCEPTION_ERROR_CODE]
        m[s.EVENT_CR2] = m[s.CR2]
        m[s.EVENT_LENGTH] = 0
        if m[s.EVENT_TYPE] >= SOFTWARE_INTERRUPT:
            m[s.EVENT_LENGTH] = vmcs[v.ENTRY_INSTRUCTION_LENGTH]
        set_limit(m, a)
        return through_idt(m, a, t)
    set_limit(m, a)
    return JUMPED
