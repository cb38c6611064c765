"""Recorded events of a real guest that are not instructions of ours: the op REPLAY_EVENT.

Rows of a recorded guest stand in a window of linear addresses, one per byte (`ops.REPLAY_BASE`). Instructions that can
exit are ordinary rows; what surrounds them is here. EPT state alone decides what an access does.

SDM: "EPT Violations"; "Exception Bitmap"; "External Interrupts".
Not modelled: data and code accesses of a recorded guest beyond the recorded first touches.
"""

from __future__ import annotations

from typing import Final

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import PAGE_WORDS, contents, is_memory, store
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import AGAIN, JUMPED, MODEL_FAULT, NEXT, OUT_OF_MEMORY, RF_IF, STOPPED
from vtsim.cpu.exit_rules import REASON
from vtsim.cpu.kernels.access import access_as, touch_physical
from vtsim.cpu.kernels.apic import request
from vtsim.cpu.kernels.cursor import set_limit, set_privilege
from vtsim.cpu.kernels.ept_walk import nested
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.ledger import charge, record
from vtsim.cpu.kernels.rights import EXECUTE, RFLAGS_AC, WRITE
from vtsim.cpu.kernels.sensitive import exits_by_rule
from vtsim.ept.spec import ADDRESS, EPT_EXECUTE, EPT_READ, EPT_WRITE

# fmt: off
(REGISTERS, ACCESS, WALK, TABLE_WRITE, RING, EXCEPTION, WIRE, WAIT, LIKE, COUNT, COUNT_AGAIN, UNTIL,
 UNTIL_AGAIN, FILL, CLEAR, IDT) = range(16)
EVENTS: Final = (
    # name          operands                                 what happens
    ("REGISTERS",   "IMM, DISP, EXTRA, R2",                  "RAX, RCX, RDX, RSI and RDI <- what was left in them"),
    ("ACCESS",      "R2 read write execute, IMM gPA, DISP gVA", "the next instruction accesses memory"),
    ("WALK",        "IMM gPA of an entry, DISP gVA",         "a page walk reads that entry"),
    ("TABLE_WRITE", "IMM gPA, DISP value",                   "a store into a paging structure"),
    ("RING",        "R2 op or 0, IMM ring",                  "that op's change of ring; 0: one that was not recorded"),
    ("EXCEPTION",   "R2 has error code, IMM vector, DISP error code, EXTRA CR2", "an exception is raised"),
    ("WIRE",        "IMM vector, DISP cycles",               "a device will assert its interrupt in so many cycles"),
    ("WAIT",        "",                                      "until that interrupt was delivered"),
    ("LIKE",        "R2 op",                                 "that op, without operands"),
    ("COUNT",       "IMM repetitions",                       "begins a loop"),
    ("COUNT_AGAIN", "IMM rows back",                         "ends it"),
    ("UNTIL",       "IMM cycles",                            "begins a loop that lasts so long"),
    ("UNTIL_AGAIN", "IMM rows back",                         "ends it"),
    ("FILL",        "R2 bytes, DISP value, EXTRA host-physical address", "the guest had written a word unseen"),
    ("CLEAR",       "EXTRA host-physical address",           "the guest had zeroed a page unseen"),
    ("IDT",         "IMM linear address, DISP limit",        "the IDT from which events are delivered; 0: not known"),
)
MOST_REFUSALS: Final = 3   # then a real monitor would have emulated the instruction
# fmt: on


@kernel
def assert_wire(m: Record, a: Arena) -> None:
    """A device asserts its recorded interrupt: natively with the guest's vector, else with the host's and a message."""
    m[s.WIRE_AT] = 0
    vector = m[s.WIRE_VECTOR]
    if m[s.WIRE_HOST_VECTOR]:
        store(a, m[s.WIRE_MESSAGE], 8, vector)
        vector = m[s.WIRE_HOST_VECTOR]
    request(m, a, vector)


@kernel
def physical_access(m: Record, a: Arena, t: Tags, gpa: int, gva: int, access: int, walking: bool) -> int:
    """Access guest-physical memory as the recorded instruction did: host-physical address, or a fault of EPT."""
    hpa = gpa
    if m[s.NONROOT] and m[s.EPTP] == 0:
        m[s.RFLAGS] |= RFLAGS_AC  # STAC and CLAC are not recorded, and this access was allowed: a monitor sees so, too
        hpa = access_as(m, a, t, gva, access, m[s.PRIVILEGE] & 1)
        if hpa >= 0:
            m[s.RFLAGS] &= ~RFLAGS_AC
        return hpa
    if m[s.NONROOT] and m[s.EPTP]:
        need = EPT_READ
        if access == WRITE:
            need = EPT_WRITE
        elif access == EXECUTE:
            need = EPT_EXECUTE
        m[s.WALK_LATENCY] = 0
        host = nested(m, a, t, gpa & ~0xFFF, need, walking)
        if m[s.WALK_LATENCY]:
            charge(m, a, o.PAGE_WALK, m[s.WALK_LATENCY])
        if host < 0:
            m[s.FAULT_GVA] = gva
            m[s.FAULT_GPA] = gpa
            return host
        hpa = (host & ADDRESS) | (gpa & 0xFFF)
    if access != EXECUTE and is_memory(a, hpa):
        a[m[s.OWNER] + k.ACCESSES] += 1
        touch_physical(m, a, t, hpa, access)
    return hpa


@kernel
def change_ring(m: Record, a: Arena, op: int, ring: int) -> None:
    """SYSCALL, SYSRET, IRET and the like as far as a recording knows them: their price and the ring afterwards."""
    before = m[s.PRIVILEGE]
    m[s.CYCLE] += m[s.PRICE + op]
    m[s.RETIRED] += 1
    kind = tr.IRET
    if op == o.SYSCALL or op == o.SYSENTER:
        a[m[s.OWNER] + k.SYSCALLS] += 1
        kind = tr.SYSCALL
    elif op == o.SYSRET or op == o.SYSEXIT:
        kind = tr.SYSRET
    set_privilege(m, a, ring)
    if m[s.TRACE_ON]:
        record(m, a, before, kind, 0, 0, 0, 0)


@kernel
def given_up(m: Record) -> bool:
    """Under shadow paging: has the monitor refused this row so often that more exits would not be the guest's?"""
    if m[s.EPTP] or m[s.NONROOT] == 0:
        return False
    if m[s.GPR + s.R15] != m[s.RIP]:
        m[s.GPR + s.R15], m[s.GPR + s.R11] = m[s.RIP], 0
    m[s.GPR + s.R11] += 1
    return m[s.GPR + s.R11] > MOST_REFUSALS


@kernel
def replay_event(m: Record, a: Arena, t: Tags, r: int) -> int:
    """One recorded event: how it ended (NEXT, JUMPED, EVENT, STOPPED, AGAIN)."""
    m[s.RETIRED] -= 1
    m[s.IN_FLIGHT] = 0
    kind = a[r + o.ROW_R1]
    second = a[r + o.ROW_R2]
    value = a[r + o.ROW_IMM]
    third = a[r + o.ROW_DISP]
    if kind == REGISTERS:
        m[s.GPR + s.RAX] = value
        m[s.GPR + s.RCX] = third
        m[s.GPR + s.RDX] = a[r + o.ROW_EXTRA]
        m[s.GPR + s.RSI] = second
        m[s.GPR + s.RDI] = second
    elif kind == ACCESS or kind == WALK:
        hpa = physical_access(m, a, t, value, third, second, kind == WALK)
        if hpa < 0 and not given_up(m):
            return raise_fault(m, a, t, hpa)
    elif kind == TABLE_WRITE:
        hpa = physical_access(m, a, t, value, value, WRITE, False)
        if hpa < 0:
            return raise_fault(m, a, t, hpa)
        if is_memory(a, hpa) and store(a, hpa, 8, third) < 0:
            m[s.STOP] = OUT_OF_MEMORY
            return STOPPED
    elif kind == RING:
        if second:
            change_ring(m, a, second, value)
        else:
            set_privilege(m, a, value)
    elif kind == EXCEPTION:
        if m[s.NONROOT] and m[s.EPTP] == 0:
            if m[s.GPR + s.R12] == m[s.RIP]:  # not the guest's after all, says the monitor: the recording knew more
                m[s.GPR + s.R12] = 0
                return NEXT
            m[s.GPR + s.R12] = m[s.RIP]
        m[s.EVENT_CR2] = a[r + o.ROW_EXTRA]
        return raise_exception(m, value, second, third)
    elif kind == WIRE:
        if m[s.NONROOT] and m[s.WIRE_HOST_VECTOR] == 0:
            m[s.STOP] = MODEL_FAULT
            return STOPPED
        m[s.GPR + s.R13] = value + 1
        m[s.WIRE_VECTOR] = value
        m[s.WIRE_AT] = max(m[s.CYCLE] + third, 1)
        m[s.RFLAGS] |= RF_IF
        set_limit(m, a)
    elif kind == WAIT:
        if m[s.GPR + s.R13]:
            m[s.CYCLE] += m[s.PRICE + o.PAUSE]
            return AGAIN
    elif kind == LIKE:
        m[s.RETIRED] += 1
        m[s.IN_FLIGHT] = 1
        if m[s.NONROOT] and exits_by_rule(m, a, second):
            vm_exit(m, a, REASON[second], 0, m[s.OP_LENGTH])
            return JUMPED
        m[s.CYCLE] += m[s.PRICE + second]
    elif kind == FILL:
        if store(a, a[r + o.ROW_EXTRA], second, third) < 0:
            m[s.STOP] = OUT_OF_MEMORY
            return STOPPED
    elif kind == CLEAR:
        at = contents(a, a[r + o.ROW_EXTRA] >> 12)
        if at:
            for n in range(PAGE_WORDS):
                a[at + n] = 0
    elif kind == IDT:
        m[s.IDTR_BASE] = value
        m[s.IDTR_LIMIT] = third
    elif kind == COUNT:
        m[s.GPR + s.R14] = value
    elif kind == UNTIL:
        m[s.GPR + s.R14] = m[s.CYCLE] + value
    else:
        again = m[s.CYCLE] < m[s.GPR + s.R14]
        if kind == COUNT_AGAIN:
            m[s.GPR + s.R14] -= 1
            again = m[s.GPR + s.R14] > 0
        if again:
            m[s.RIP] -= value
            return JUMPED
    return NEXT
