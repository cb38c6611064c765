"""Sensitive and privileged operations: their faults, the VM exits they cause, and what they do otherwise.

SDM: "Instructions That Cause VM Exits Conditionally"; "Exit Qualification".
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_DECODE
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import (
    ARITHMETIC,
    EVENT,
    GP,
    JUMPED,
    NEXT,
    RF_CF,
    RF_IF,
    RF_RF,
    SOFTWARE_INTERRUPT,
    UD,
)
from vtsim.cpu.exit_rules import REASON, RING, SENSITIVE, UNDEFINED
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.access import effective, read64, read_as, write_as
from vtsim.cpu.kernels.caches import forget
from vtsim.cpu.kernels.contexts import CR4_PCIDE, LINEAR_KEY
from vtsim.cpu.kernels.control_registers import move_cr
from vtsim.cpu.kernels.cpuid import cpuid
from vtsim.cpu.kernels.cursor import set_limit, set_privilege
from vtsim.cpu.kernels.decoded_system import NOT_HERE, debug_register, decoded_rest, read_extended_control
from vtsim.cpu.kernels.digest import roll, saw
from vtsim.cpu.kernels.events import deliver
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.far import interrupt_return
from vtsim.cpu.kernels.invalidate import drop_contexts, drop_page
from vtsim.cpu.kernels.ledger import record, settle
from vtsim.cpu.kernels.msrs import command, msr_exits, read_msr, time_stamp, write_msr
from vtsim.cpu.kernels.ports import in_out
from vtsim.cpu.kernels.rights import CR4_PKE, RFLAGS_AC
from vtsim.cpu.kernels.segment_ops import segment_op
from vtsim.cpu.kernels.segments import load_system_segment
from vtsim.cpu.kernels.sensitive import before_exits, exit_by_instruction, exits_by_rule, port_op, undefined
from vtsim.cpu.kernels.vm_functions import EXITS
from vtsim.cpu.kernels.vmx import vmx
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs.events import BLOCKING_BY_STI, HLT_STATE

# fmt: off
CR4_TSD, CR4_PCE, CR4_SMXE, CR4_OSXSAVE = 1 << 2, 1 << 8, 1 << 14, 1 << 18
DR7_GD, DR6_BD = 1 << 13, 1 << 13
CODE_64: int = 0xA09B                    # access rights of a 64-bit code segment of ring 0
CODE_32, STACK_32 = 0xC09B, 0xC093        # and of a 32-bit one, and of its stack
COUNTERS: int = 2                  # of processors that do not enumerate them
# fmt: on


@kernel
def return_from_interrupt(m: Record, a: Arena, t: Tags) -> int:
    """IRET in 64-bit mode.

    SDM: "IRET/IRETD/IRETQ—Interrupt Return".
    """
    rsp = m[s.GPR + s.RSP]
    user = m[s.PRIVILEGE] & 1
    rip = read_as(m, a, t, rsp, user)
    cs = 0
    flags = 0
    stack = 0
    ss = 0
    if m[s.FAULT_KIND] == 0:
        cs = read_as(m, a, t, rsp + 8, user)
    if m[s.FAULT_KIND] == 0:
        flags = read_as(m, a, t, rsp + 16, user)
    if m[s.FAULT_KIND] == 0:
        stack = read_as(m, a, t, rsp + 24, user)
    if m[s.FAULT_KIND] == 0:
        ss = read_as(m, a, t, rsp + 32, user)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if user:
        if cs & 3 != 3:
            return raise_exception(m, GP, 1, cs & 0xFFFC)
        kept = 0x3000 if (m[s.RFLAGS] >> 12) & 3 == 3 else 0x3000 | RF_IF
        flags = (flags & ~kept) | (m[s.RFLAGS] & kept)
    before = m[s.PRIVILEGE]
    m[s.RIP] = rip
    m[s.CS_SELECTOR] = cs & 0xFFFF
    m[s.RFLAGS] = flags | 2
    m[s.GPR + s.RSP] = stack
    m[s.SS_SELECTOR] = ss & 0xFFFF
    m[s.NMI_BLOCKED] = 0
    set_privilege(m, a, cs & 3)
    set_limit(m, a)
    if m[s.TRACE_ON]:
        record(m, a, before, tr.IRET, 0, 0, 0, 0)
    return JUMPED


@kernel
def system_call(m: Record, a: Arena, op: int) -> int:
    """SYSCALL, SYSRET, SYSENTER, SYSEXIT.

    SDM: "Fast System Calls in 64-Bit Mode".
    """
    before = m[s.PRIVILEGE]
    if op == o.SYSCALL:
        m[s.GPR + s.RCX] = m[s.RIP] + m[s.OP_LENGTH]
        m[s.GPR + s.R11] = m[s.RFLAGS]
        m[s.RIP] = m[s.MSR_LSTAR]
        m[s.RFLAGS] &= ~m[s.MSR_FMASK]
        m[s.CS_SELECTOR] = (m[s.MSR_STAR] >> 32) & 0xFFFC
        m[s.SS_SELECTOR] = m[s.CS_SELECTOR] + 8
        a[m[s.OWNER] + k.SYSCALLS] += 1
        set_privilege(m, a, 0)
        if a[A_DECODE]:
            m[s.CS_ACCESS_RIGHTS] = CODE_64
    elif op == o.SYSRET:
        m[s.RIP] = m[s.GPR + s.RCX]
        m[s.RFLAGS] = (m[s.GPR + s.R11] & 0x3C7FD7) | 2
        m[s.CS_SELECTOR] = (((m[s.MSR_STAR] >> 48) & 0xFFFF) + 16) | 3
        m[s.SS_SELECTOR] = (((m[s.MSR_STAR] >> 48) & 0xFFFF) + 8) | 3
        set_privilege(m, a, 3)
        if a[A_DECODE]:
            m[s.CS_ACCESS_RIGHTS] = CODE_64 | 3 << 5
        if m[s.BELIEVED] == 0:
            roll(m, a, 0, op, 0, 0, m[s.GPR + s.RAX], m[s.RIP])
    elif op == o.SYSENTER:
        m[s.RIP] = m[s.SYSENTER_EIP]
        m[s.GPR + s.RSP] = m[s.SYSENTER_ESP]
        m[s.RFLAGS] &= ~RF_IF
        a[m[s.OWNER] + k.SYSCALLS] += 1
        if m[s.MODE]:
            load_flat(m, 0, m[s.SYSENTER_CS] & 0xFFFC)
        set_privilege(m, a, 0)
    else:
        if m[s.MODE]:
            load_flat(m, 3, (m[s.SYSENTER_CS] & 0xFFFC) + 16)
        m[s.RIP] = m[s.GPR + s.RDX]
        m[s.GPR + s.RSP] = m[s.GPR + s.RCX]
        set_privilege(m, a, 3)
        roll(m, a, 0, o.SYSRET, 0, 0, m[s.GPR + s.RAX], m[s.RIP])
    set_limit(m, a)
    if m[s.TRACE_ON]:
        record(m, a, before, tr.SYSRET if op == o.SYSRET or op == o.SYSEXIT else tr.SYSCALL, m[s.GPR + s.RAX], 0, 0, 0)
    return JUMPED


@kernel
def load_flat(m: Record, ring: int, selector: int) -> None:
    """CS and SS of SYSENTER and SYSEXIT outside 64-bit mode: no descriptor is read. IA-32e mode enters 64-bit code.

    SDM: "SYSENTER—Fast System Call"; "SYSEXIT—Fast Return from Fast System Call".
    """
    code = CODE_64 if ring == 0 and m[s.EFER] & modes.LMA else CODE_32
    modes.flat(m, modes.CS, selector | ring, code | ring << 5)
    modes.flat(m, modes.SS, selector + 8 | ring, STACK_32 | ring << 5)
    modes.set_mode(m)


@kernel
def halt(m: Record, a: Arena) -> int:
    """HLT: nothing runs until an interrupt."""
    a[m[s.OWNER] + k.HALTS] += 1
    settle(m, a)
    m[s.HALTED] = 1
    m[s.ACTIVITY_STATE] = HLT_STATE
    m[s.LIMIT] = 0
    m[s.HALTED_AT] = m[s.CYCLE]
    return NEXT


@kernel
def system(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """Execute one sensitive or privileged op: how it ended (NEXT, JUMPED, EVENT, STOPPED, AGAIN)."""
    if UNDEFINED[op] and undefined(m, a, op):
        return raise_exception(m, UD, 0, 0)
    if m[s.SENSITIVE_TRAPS] and m[s.PRIVILEGE] & 1 and SENSITIVE[op]:
        return raise_exception(m, GP, 1, 0)
    decoded = a[r + o.ROW_MEM] & o.MEM_DECODED
    if decoded and (op == o.MOV_TO_DR or op == o.MOV_FROM_DR):
        return debug_register(m, a, r, op)
    if decoded and before_exits(m, a, t, r, op):
        return EVENT
    ring3 = m[s.PRIVILEGE] & 1
    if RING[op] == 3:
        ended = vmx(m, a, t, r, op)
        return exit_by_instruction(m, a, r, op, REASON[op]) if ended == EXITS else ended
    if m[s.NONROOT]:
        if ring3 and RING[op] == 1:
            return raise_exception(m, GP, 1, 0)
        if exits_by_rule(m, a, op):
            return exit_by_instruction(m, a, r, op, REASON[op])
    if ring3:
        if RING[op] == 1 or (RING[op] == 2 and (m[s.RFLAGS] >> 12) & 3 != 3 and not port_op(decoded, op)):
            return raise_exception(m, GP, 1, 0)
    if op == o.RDMSR or op == o.WRMSR:
        index = m[s.GPR + s.RCX] & 0xFFFFFFFF
        if m[s.NONROOT] and msr_exits(m, a, index, op == o.WRMSR):
            return exit_by_instruction(m, a, r, op, x.MSR_WRITE if op == o.WRMSR else x.MSR_READ)
        if op == o.RDMSR:
            return read_msr(m, a, index)
        if command(m, a, t, index):
            return NEXT
        return write_msr(m, a, index, (m[s.GPR + s.RAX] & 0xFFFFFFFF) | (m[s.GPR + s.RDX] << 32))
    if op == o.IN or op == o.OUT or op == o.INS or op == o.OUTS:
        return in_out(m, a, t, r, op)
    if op == o.MOV_TO_CR or op == o.MOV_FROM_CR or op == o.CLTS or op == o.LMSW:
        return move_cr(m, a, t, r, op)
    if op == o.IRET:
        return interrupt_return(m, a, t, r) if decoded else return_from_interrupt(m, a, t)
    if op == o.SYSCALL or op == o.SYSRET or op == o.SYSENTER or op == o.SYSEXIT:
        if (a[A_DECODE] or m[s.MODE] or m[s.MONITORED]) and (op == o.SYSENTER or op == o.SYSEXIT):
            if m[s.MODE] & modes.REAL or m[s.SYSENTER_CS] & 0xFFFC == 0:
                return raise_exception(m, GP, 1, 0)
        return system_call(m, a, op)
    if decoded:
        ended = decoded_rest(m, a, t, r, op)
        if ended != NOT_HERE:
            return ended
    return system_rest(m, a, t, r, op)


@kernel
def system_rest(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """The sensitive ops that need no decision of their own any more."""
    g = s.GPR + (a[r + o.ROW_R1] & 15)
    if op == o.CPUID:
        cpuid(m, a)
    elif op == o.RDTSC or op == o.RDTSCP:
        tsc = time_stamp(m, a)
        m[s.GPR + s.RAX] = tsc & 0xFFFFFFFF
        m[s.GPR + s.RDX] = (tsc >> 32) & 0xFFFFFFFF
        if op == o.RDTSCP:
            m[s.GPR + s.RCX] = m[s.MSR_TSC_AUX]
    elif op == o.RDPMC:
        m[s.GPR + s.RAX] = m[s.RETIRED] & 0xFFFFFFFF
        m[s.GPR + s.RDX] = 0
    elif op == o.HLT or op == o.MWAIT:
        return halt(m, a)
    elif op == o.CLI:
        m[s.RFLAGS] &= ~RF_IF
        set_limit(m, a)
    elif op == o.STI:
        if m[s.RFLAGS] & RF_IF == 0:
            m[s.RFLAGS] |= RF_IF
            m[s.INTERRUPT_SHADOW] = 2
            m[s.SHADOW_KIND] = BLOCKING_BY_STI
            m[s.LIMIT] = 0
    elif op == o.PUSHF:
        flags = m[s.RFLAGS] & ~RF_RF
        fault = write_as(m, a, t, m[s.GPR + s.RSP] - 8, flags, m[s.PRIVILEGE] & 1)
        if fault:
            return raise_fault(m, a, t, fault)
        m[s.GPR + s.RSP] -= 8
        saw(m, a, op, 0, 0, flags)
    elif op == o.POPF:
        flags = read_as(m, a, t, m[s.GPR + s.RSP], m[s.PRIVILEGE] & 1)
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        m[s.GPR + s.RSP] += 8
        kept = 0
        if m[s.PRIVILEGE] & 1:
            kept = 0x3000 if (m[s.RFLAGS] >> 12) & 3 == 3 else 0x3000 | RF_IF
        m[s.RFLAGS] = (flags & 0x257FD5 & ~kept) | (m[s.RFLAGS] & kept) | 2
        set_limit(m, a)
        saw(m, a, op, 0, 0, m[s.RFLAGS])
    elif op == o.STAC:
        m[s.RFLAGS] |= RFLAGS_AC
    elif op == o.CLAC:
        m[s.RFLAGS] &= ~RFLAGS_AC
    elif op == o.RDPKRU or op == o.WRPKRU:
        if m[s.CR4] & CR4_PKE == 0:
            return raise_exception(m, UD, 0, 0)
        if m[s.GPR + s.RCX] & 0xFFFFFFFF or (op == o.WRPKRU and m[s.GPR + s.RDX] & 0xFFFFFFFF):
            return raise_exception(m, GP, 1, 0)
        if op == o.WRPKRU:
            m[s.PKRU] = m[s.GPR + s.RAX] & 0xFFFFFFFF
        else:
            m[s.GPR + s.RAX], m[s.GPR + s.RDX] = m[s.PKRU], 0
    elif op == o.SWAPGS:
        m[s.GS_BASE], m[s.MSR_KERNEL_GS_BASE] = m[s.MSR_KERNEL_GS_BASE], m[s.GS_BASE]
    elif op == o.INVLPG:
        drop_page(m, a, m[s.CONTEXT_KEY], effective(m, a, r))
    elif op == o.INVPCID:
        return invpcid(m, a, t, r)
    elif op == o.MOV_TO_DR:
        number = a[r + o.ROW_IMM]
        if number == 7:
            m[s.DR7] = m[g]
        elif number == 6:
            m[s.DR6] = m[g]
    elif op == o.MOV_FROM_DR:
        number = a[r + o.ROW_IMM]
        m[g] = m[s.DR7] if number == 7 else (m[s.DR6] if number == 6 else 0)
    elif op == o.SMSW:
        value = m[s.CR0]
        if m[s.NONROOT]:
            mask = a[m[s.VMCS] + v.CR0_GUEST_HOST_MASK]
            value = (value & ~mask) | (a[m[s.VMCS] + v.CR0_READ_SHADOW] & mask)
        m[g] = value
        saw(m, a, op, 0, 0, value)
    elif op == o.LGDT or op == o.LIDT:
        gva = effective(m, a, r)
        limit = read64(m, a, t, gva) & 0xFFFF
        base = read64(m, a, t, gva + 8) if m[s.FAULT_KIND] == 0 else 0
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        m[s.GDTR_BASE if op == o.LGDT else s.IDTR_BASE] = base
        m[s.GDTR_LIMIT if op == o.LGDT else s.IDTR_LIMIT] = limit
    elif op == o.SGDT or op == o.SIDT:
        gva = effective(m, a, r)
        user = m[s.PRIVILEGE] & 1
        fault = write_as(m, a, t, gva, m[s.GDTR_LIMIT if op == o.SGDT else s.IDTR_LIMIT], user)
        if fault == 0:
            fault = write_as(m, a, t, gva + 8, m[s.GDTR_BASE if op == o.SGDT else s.IDTR_BASE], user)
        if fault:
            return raise_fault(m, a, t, fault)
        saw(m, a, op, 0, 0, m[s.GDTR_LIMIT if op == o.SGDT else s.IDTR_LIMIT])
        saw(m, a, op, 0, 1, m[s.GDTR_BASE if op == o.SGDT else s.IDTR_BASE])
    elif op == o.LLDT:
        return load_system_segment(m, a, t, modes.LDTR, m[g] & 0xFFFF if a[r + o.ROW_R1] < 16 else 0)
    elif op == o.SLDT:
        m[g] = m[s.LDTR_SELECTOR]
        saw(m, a, op, 0, 0, m[g])
    elif op == o.LTR:
        m[s.TR_SELECTOR] = m[g] & 0xFFFF
        m[s.TR_BASE] = m[s.GPR + (a[r + o.ROW_R2] & 15)]
    elif op == o.STR:
        m[g] = m[s.TR_SELECTOR]
        saw(m, a, op, 0, 0, m[g])
    elif op == o.XSETBV:
        if m[s.PRIVILEGE] & 1:
            return raise_exception(m, GP, 1, 0)
        m[s.XCR0] = (m[s.GPR + s.RAX] & 0xFFFFFFFF) | m[s.GPR + s.RDX] << 32
    elif op == o.WBINVD or op == o.INVD:
        for cache in range(s.L1I, s.L3 + 8, 8):
            forget(m, t, cache)
        m[s.FETCH_GENERATION] += 1
    elif op == o.PAUSE:
        m[s.PAUSED] = m[s.CYCLE]
    elif op == o.RDRAND or op == o.RDSEED:
        state = m[s.CYCLE] * 0x9E3779B1 + 0x7F4A7C15
        m[g] = state ^ ((state >> 17) & 0xFFFF)
        m[s.RFLAGS] = (m[s.RFLAGS] & ~ARITHMETIC) | RF_CF
    elif op == o.GETSEC or op == o.UD:
        return raise_exception(m, UD, 0, 0)
    elif op == o.INT:
        m[s.EVENT_VECTOR] = a[r + o.ROW_IMM]
        m[s.EVENT_TYPE] = SOFTWARE_INTERRUPT
        m[s.EVENT_HAS_ERROR] = 0
        m[s.EVENT_ERROR] = 0
        m[s.EVENT_LENGTH] = m[s.OP_LENGTH]
        return deliver(m, a, t)
    elif op == o.XGETBV:
        return read_extended_control(m)
    elif op == o.RETPOLINE:
        m[s.CYCLE] += (a[r + o.ROW_IMM] - 1) * m[s.PRICE + op]
        m[s.RETIRED] -= 1  # nothing that the length of the code does not count
    elif op >= o.MOVE and op != o.TOUCH:  # which an assembled program pays for, no more
        return segment_op(m, a, t, r, op)
    return NEXT


@kernel
def invpcid(m: Record, a: Arena, t: Tags, r: int) -> int:
    """INVPCID: individual address, single context, all with globals, all but globals.

    SDM: "INVPCID—Invalidate Process-Context Identifier".
    """
    kind = m[s.GPR + (a[r + o.ROW_R1] & 15)]
    gva = effective(m, a, r)
    low = read64(m, a, t, gva)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    address = read64(m, a, t, gva + 8)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if kind < 0 or kind > 3 or low & ~0xFFF:
        return raise_exception(m, GP, 1, 0)
    if kind < 2 and low and m[s.CR4] & CR4_PCIDE == 0:
        return raise_exception(m, GP, 1, 0)
    if kind == 0 and m[s.MODE] == 0 and not modes.canonical(m, address):
        return raise_exception(m, GP, 1, 0)
    key = (m[s.CONTEXT_KEY] & ~(0xFFF << 16)) | low << 16
    if kind == 0:
        drop_page(m, a, key, address)
    elif kind == 1:
        drop_contexts(m, a, LINEAR_KEY, key & LINEAR_KEY, False)
    else:
        drop_contexts(m, a, 0xFFFF, key & 0xFFFF, kind == 2)
    return NEXT
