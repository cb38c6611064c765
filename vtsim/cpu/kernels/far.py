"""Far jumps and calls, returns from interrupts, and RFLAGS on the stack, in every mode.

SDM: "JMP—Jump"; "CALL—Call Procedure"; "IRET/IRETD/IRETQ—Interrupt Return"; "Treatment of Task Switches".
Not modelled: task switches outside VMX non-root operation.
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import GP, JUMPED, NEXT, NP, RF_IF, RF_NT
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.call_gates import CALL_GATE_16, CALL_GATE_32, push_far, through_call_gate
from vtsim.cpu.kernels.cursor import set_limit, set_privilege
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.far_returns import (
    leave_segments,
    load_returned_stack,
    outside_code,
    return_to_v86,
    returned_stack,
    returned_to,
)
from vtsim.cpu.kernels.ledger import record
from vtsim.cpu.kernels.modes import LOW32, cpl, set_mode
from vtsim.cpu.kernels.operands import (
    SEGMENT_REFUSED,
    load_linear,
    load_segment,
    moved_stack,
    operand_bytes,
    set_stack,
    store_segment,
)
from vtsim.cpu.kernels.pending import arm
from vtsim.cpu.kernels.segments import fetch_descriptor, load_cached, load_real, refuse_code, rights_of
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v

# fmt: off
BY_CALL, BY_IRET, BY_JMP = 0, 1 << 30, 2 << 30
RF_IOPL, RF_VM, RF_VIP_VIF = 3 << 12, 1 << 17, 3 << 19
WRITABLE_FLAGS: int = 0x257FD5
# fmt: on


@kernel
def task_switch(m: Record, a: Arena, t: Tags, selector: int, source: int) -> int:
    """A task switch by CALL, JMP or IRET: the TSS descriptor is checked, then VMX non-root operation exits."""
    error = selector & 0xFFFC
    busy = source == BY_IRET
    vector = 10 if busy else GP
    descriptor = fetch_descriptor(m, a, t, selector)
    if selector & 4 or m[s.FAULT_KIND] == SEGMENT_REFUSED:
        return raise_exception(m, vector, 1, error)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    rights = rights_of(descriptor)
    kind = rights & 0x1F
    if (kind != 11 and kind != 3) if busy else (kind != 9 and kind != 1):
        return raise_exception(m, vector, 1, error)
    if rights & modes.AR_P == 0:
        return raise_exception(m, NP, 1, error)
    m[s.RFLAGS] &= ~(1 << 16)
    vm_exit(m, a, x.TASK_SWITCH, source | selector, m[s.OP_LENGTH])
    return JUMPED


@kernel
def far_transfer(m: Record, a: Arena, t: Tags, selector: int, offset: int, call: bool, size: int) -> int:
    """JMP and CALL to another code segment, or to a task."""
    if m[s.MODE] & (modes.REAL | modes.V86):
        if call:
            fault = push_far(m, a, t, size)
            if fault:
                return raise_fault(m, a, t, fault)
        load_real(m, modes.CS, selector)
        m[s.RIP] = offset & 0xFFFF if size == 2 else offset
        set_mode(m)
        return JUMPED
    error = selector & 0xFFFC
    if error == 0:
        return raise_exception(m, GP, 1, 0)
    descriptor = fetch_descriptor(m, a, t, selector)
    if m[s.FAULT_KIND]:
        return refuse_code(m, a, t, error)
    rights = rights_of(descriptor)
    kind = rights & 0x1F
    ring = cpl(m)
    if rights & modes.AR_S == 0:
        dpl = (rights >> 5) & 3
        if m[s.EFER] & modes.LMA:
            if kind == CALL_GATE_32:
                return through_call_gate(m, a, t, selector, descriptor, call)
            return raise_exception(m, GP, 1, error)
        if kind == 5:  # a task gate
            if dpl < ring or dpl < selector & 3:
                return raise_exception(m, GP, 1, error)
            if rights & modes.AR_P == 0:
                return raise_exception(m, NP, 1, error)
            return task_switch(m, a, t, (descriptor >> 16) & 0xFFFF, BY_CALL if call else BY_JMP)
        if kind == 1 or kind == 3 or kind == 9 or kind == 11:
            if dpl < ring or dpl < selector & 3:
                return raise_exception(m, GP, 1, error)
            return task_switch(m, a, t, selector, BY_CALL if call else BY_JMP)
        if kind == CALL_GATE_16 or kind == CALL_GATE_32:
            return through_call_gate(m, a, t, selector, descriptor, call)
        return raise_exception(m, GP, 1, error)
    dpl = (rights >> 5) & 3
    refused = rights & 8 == 0 or (dpl > ring if rights & 4 else (dpl != ring or selector & 3 > ring))
    if m[s.EFER] & modes.LMA and rights & modes.AR_L and rights & modes.AR_D:
        refused = True
    if refused:
        return raise_exception(m, GP, 1, error)
    if rights & modes.AR_P == 0:
        return raise_exception(m, NP, 1, error)
    if call:
        fault = push_far(m, a, t, size)
        if fault:
            return raise_fault(m, a, t, fault)
    load_cached(m, modes.CS, (selector & 0xFFFC) | ring, descriptor)
    m[s.RIP] = offset & (0xFFFF if size == 2 else (LOW32 if size == 4 else -1))
    set_mode(m)
    return JUMPED


@kernel
def push_flags(m: Record, a: Arena, t: Tags, size: int) -> int:
    """PUSHF of an operand size: NEXT, or how it ended.

    SDM: "PUSHF/PUSHFD/PUSHFQ—Push EFLAGS Register Onto the Stack".
    """
    at = moved_stack(m, -size)
    fault = store_segment(m, a, t, modes.SS, at, size, m[s.RFLAGS] & ~(RF_VM | 1 << 16))
    if fault:
        return raise_fault(m, a, t, fault)
    set_stack(m, at)
    return NEXT


@kernel
def kept_flags(m: Record) -> int:
    """The flags that POPF and IRET leave alone for want of privilege."""
    ring = cpl(m)
    if m[s.MODE] & modes.REAL or ring == 0:
        return 0
    return RF_IOPL if (m[s.RFLAGS] >> 12) & 3 >= ring else RF_IOPL | RF_IF


@kernel
def pop_flags(m: Record, a: Arena, t: Tags, size: int) -> int:
    """POPF of an operand size: NEXT, or how it ended.

    SDM: "POPF/POPFD/POPFQ—Pop Stack Into EFLAGS Register".
    """
    flags = load_segment(m, a, t, modes.SS, moved_stack(m, 0), size)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    set_stack(m, moved_stack(m, size))
    change = WRITABLE_FLAGS & ~kept_flags(m)
    if m[s.MODE] & modes.V86:
        change &= ~RF_IOPL
    if size == 2:
        change &= 0xFFFF
    m[s.RFLAGS] = (m[s.RFLAGS] & ~change & ~(1 << 16)) | (flags & change) | 2
    arm(m, a)
    set_limit(m, a)
    return NEXT


@kernel
def interrupt_return(m: Record, a: Arena, t: Tags, r: int) -> int:
    """IRET in every mode.

    SDM: "IRET/IRETD/IRETQ—Interrupt Return".
    """
    size = operand_bytes(a[r + o.ROW_MEM])
    before = m[s.PRIVILEGE]
    long = m[s.MODE] == 0
    unblock_nmis(m, a)
    if m[s.RFLAGS] & RF_NT and m[s.MODE] & (modes.REAL | modes.V86) == 0:
        if m[s.EFER] & modes.LMA:
            return raise_exception(m, GP, 1, 0)
        link = task_link(m, a, t)
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        return task_switch(m, a, t, link, BY_IRET)
    flags = load_segment(m, a, t, modes.SS, moved_stack(m, 2 * size), size)
    cs = 0
    rip = 0
    if m[s.FAULT_KIND] == 0:
        cs = load_segment(m, a, t, modes.SS, moved_stack(m, size), size) & 0xFFFF
    if m[s.FAULT_KIND] == 0:
        rip = load_segment(m, a, t, modes.SS, moved_stack(m, 0), size)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    change = (WRITABLE_FLAGS | 1 << 16) & ~kept_flags(m)
    if size == 2:
        change &= 0xFFFF
    if m[s.MODE] & (modes.REAL | modes.V86):
        if rip > 0xFFFF:
            return raise_exception(m, GP, 1, 0)
        if m[s.MODE] & modes.V86:
            change &= ~RF_IOPL
        set_stack(m, moved_stack(m, 3 * size))
        m[s.RFLAGS] = (m[s.RFLAGS] & ~change) | (flags & change) | 2
        load_real(m, modes.CS, cs)
        m[s.RIP] = rip
        return returned(m, a, before)
    if flags & RF_VM and size == 4 and cpl(m) == 0 and m[s.EFER] & modes.LMA == 0:
        ended = return_to_v86(m, a, t, rip, cs, flags)
        return returned(m, a, before) if ended == 0 else ended
    ended, descriptor = returned_to(m, a, t, cs)
    if ended:
        return ended
    rights = rights_of(descriptor)
    ring = cpl(m)
    to = cs & 3
    words = 3
    stack = m[s.GPR + s.RSP]
    ss = m[s.SS_SELECTOR]
    ss_descriptor = 0
    if long or to != ring:
        words = 5
        stack = load_segment(m, a, t, modes.SS, moved_stack(m, 3 * size), size)
        if m[s.FAULT_KIND] == 0:
            ss = load_segment(m, a, t, modes.SS, moved_stack(m, 4 * size), size) & 0xFFFF
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        ended, ss_descriptor = returned_stack(m, a, t, ss, to, rights)
        if ended:
            return ended
    if outside_code(m, descriptor, rip):
        return raise_exception(m, GP, 1, 0)
    if words == 3:
        set_stack(m, moved_stack(m, 3 * size))
    else:
        m[s.GPR + s.RSP] = stack
        load_returned_stack(m, ss, ss_descriptor)
    m[s.RFLAGS] = (m[s.RFLAGS] & ~change) | (flags & change) | 2
    load_cached(m, modes.CS, cs, descriptor)
    m[s.RIP] = rip
    if to > ring:
        leave_segments(m, to)
    set_privilege(m, a, to)
    return returned(m, a, before)


@kernel
def unblock_nmis(m: Record, a: Arena) -> None:
    """IRET ends blocking by NMI, of virtual NMIs where there are some, even if it faults.

    SDM: "Changes to Instruction Behavior in VMX Non-Root Operation"; "Handling Multiple NMIs".
    """
    pin = a[m[s.VMCS] + v.PIN_CONTROLS] if m[s.NONROOT] else 0
    slot = s.NMI_BLOCKED
    if pin & b.VIRTUAL_NMIS:
        slot = s.VIRTUAL_NMI_BLOCKED
    m[s.IRET_UNBLOCKED] = m[slot]
    if pin & b.VIRTUAL_NMIS or pin & b.NMI_EXITING == 0:
        m[slot] = 0


@kernel
def task_link(m: Record, a: Arena, t: Tags) -> int:
    """The back link of the current TSS."""
    return load_linear(m, a, t, m[s.TR_BASE] & LOW32, 2, 0)


@kernel
def returned(m: Record, a: Arena, before: int) -> int:
    """What every IRET ends with: mode and limits follow."""
    m[s.IRET_UNBLOCKED] = 0
    m[s.BEGUN_FLAGS] &= ~(1 << 16)  # RF as it was loaded holds for the next instruction
    set_mode(m)
    arm(m, a)
    set_limit(m, a)
    if m[s.TRACE_ON]:
        record(m, a, before, tr.IRET, 0, 0, 0, 0)
    return JUMPED
