"""Sensitive and privileged operations: their faults, the VM exits they cause, and what they do otherwise.

SDM: "Instructions That Cause VM Exits Conditionally"; "Exit Qualification".
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_CPUID, A_CPUID_COUNT, A_DECODE
from vtsim.cpu import accounts as k
from vtsim.cpu import exit_rules as rules
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import (
    ARITHMETIC,
    BP,
    DB,
    EVENT,
    GP,
    JUMPED,
    NEXT,
    OF,
    PRIVILEGED_EXCEPTION,
    RF_CF,
    RF_IF,
    RF_OF,
    RF_RF,
    SOFTWARE_EXCEPTION,
    SOFTWARE_INTERRUPT,
    UD,
)
from vtsim.cpu.exit_rules import BIT, NEEDED, REASON, RING, UNDEFINED, WHERE
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.access import effective, read64, read_as, write_as
from vtsim.cpu.kernels.contexts import GLOBAL_KEY
from vtsim.cpu.kernels.control_registers import move_cr
from vtsim.cpu.kernels.cursor import set_limit, set_privilege
from vtsim.cpu.kernels.digest import mix, saw
from vtsim.cpu.kernels.events import deliver
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.far import interrupt_return, pop_flags, push_flags
from vtsim.cpu.kernels.information import instruction_information, instruction_qualification
from vtsim.cpu.kernels.instructions import instruction
from vtsim.cpu.kernels.invalidate import drop_contexts, drop_page
from vtsim.cpu.kernels.ledger import record, settle
from vtsim.cpu.kernels.msrs import msr_exits, read_msr, time_stamp, write_msr
from vtsim.cpu.kernels.operands import (
    ON_DEVICE,
    address_mask,
    get_register,
    linear,
    load_operand,
    load_segment,
    offset_of,
    operand_bytes,
    segment_of,
    set_register,
    store_operand,
    store_segment,
)
from vtsim.cpu.kernels.pending import arm
from vtsim.cpu.kernels.ports import in_out
from vtsim.cpu.kernels.segments import load_system_segment
from vtsim.cpu.kernels.vm_functions import EXITS
from vtsim.cpu.kernels.vmx import vmx
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs.events import BLOCKING_BY_STI, HLT_STATE
from vtsim.vmcs.kernels.values import cpuid_register

# fmt: off
CR4_TSD, CR4_PCE, CR4_SMXE, CR4_OSXSAVE = 1 << 2, 1 << 8, 1 << 14, 1 << 18
DR7_GD, DR6_BD = 1 << 13, 1 << 13
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
    elif op == o.SYSRET:
        m[s.RIP] = m[s.GPR + s.RCX]
        m[s.RFLAGS] = (m[s.GPR + s.R11] & 0x3C7FD7) | 2
        m[s.CS_SELECTOR] = (((m[s.MSR_STAR] >> 48) & 0xFFFF) + 16) | 3
        m[s.SS_SELECTOR] = (((m[s.MSR_STAR] >> 48) & 0xFFFF) + 8) | 3
        set_privilege(m, a, 3)
        m[s.DIGEST_APPLICATION] = mix(m[s.DIGEST_APPLICATION], m[s.GPR + s.RAX])
    elif op == o.SYSENTER:
        m[s.RIP] = m[s.SYSENTER_EIP]
        m[s.GPR + s.RSP] = m[s.SYSENTER_ESP]
        m[s.RFLAGS] &= ~RF_IF
        a[m[s.OWNER] + k.SYSCALLS] += 1
        set_privilege(m, a, 0)
    else:
        m[s.RIP] = m[s.GPR + s.RDX]
        m[s.GPR + s.RSP] = m[s.GPR + s.RCX]
        set_privilege(m, a, 3)
        m[s.DIGEST_APPLICATION] = mix(m[s.DIGEST_APPLICATION], m[s.GPR + s.RAX])
    set_limit(m, a)
    if m[s.TRACE_ON]:
        record(m, a, before, tr.SYSRET if op == o.SYSRET or op == o.SYSEXIT else tr.SYSCALL, m[s.GPR + s.RAX], 0, 0, 0)
    return JUMPED


@kernel
def cpuid(m: Record, a: Arena) -> None:
    """CPUID from the machine's table; an unknown leaf reads as zero."""
    leaf = m[s.GPR + s.RAX] & 0xFFFFFFFF
    sub = m[s.GPR + s.RCX] & 0xFFFFFFFF
    line = a[A_CPUID]
    found = -1
    if leaf:
        m[s.CYCLE] += m[s.P_CPUID_1] - m[s.PRICE + o.CPUID]
    for n in range(a[A_CPUID_COUNT]):
        if a[line + 6 * n] == leaf and (a[line + 6 * n + 1] == -1 or a[line + 6 * n + 1] == sub):
            found = line + 6 * n
            break
    for n in range(4):
        value = a[found + 2 + n] if found >= 0 else 0
        register = s.RAX
        if n == 1:
            register = s.RBX
        elif n == 2:
            register = s.RCX
        elif n == 3:
            register = s.RDX
        m[s.GPR + register] = value
        saw(m, value)


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
def exits_by_rule(m: Record, a: Arena, op: int) -> bool:
    """Does this op, in non-root mode, exit always, because of one control bit, or by a rule of its own?"""
    where = WHERE[op]
    if where == rules.PRIMARY:
        return a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & BIT[op] != 0
    if where == rules.SECONDARY:
        return secondary(m, a) & BIT[op] != 0
    if where == rules.SPECIAL:
        return exits_by_itself(m, a, op)
    return where == rules.ALWAYS


@kernel
def secondary(m: Record, a: Arena) -> int:
    """The secondary processor-based controls in force."""
    if a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & b.ACTIVATE_SECONDARY_CONTROLS:
        return a[m[s.VMCS] + v.SECONDARY_PROC_CONTROLS]
    return 0


@kernel
def exits_by_itself(m: Record, a: Arena, op: int) -> bool:
    """The ops whose VM exits depend on more than one bit.

    SDM: "Instructions That Cause VM Exits Conditionally".
    """
    at = m[s.VMCS]
    controls = secondary(m, a)
    if op == o.PAUSE:
        if a[at + v.PRIMARY_PROC_CONTROLS] & b.PAUSE_EXITING:
            return True
        if controls & b.PAUSE_LOOP_EXITING == 0 or m[s.PRIVILEGE] & 1:
            return False
        return pause_loop(m, a)
    wanted = (m[s.GPR + s.RAX] & 0xFFFFFFFF) | m[s.GPR + s.RDX] << 32  # XSAVES, XRSTORS
    return wanted & m[s.MSR_XSS] & a[at + v.XSS_EXITING_BITMAP] != 0


@kernel
def pause_loop(m: Record, a: Arena) -> bool:
    """Is this PAUSE the one too many of a loop?

    SDM: "Controls for PAUSE-Loop Exiting".
    """
    now = m[s.CYCLE]
    at = m[s.VMCS]
    if now - m[s.PAUSE_LAST] > a[at + v.PLE_GAP] or m[s.PAUSE_LAST] == 0:
        m[s.PAUSE_FIRST] = now
    m[s.PAUSE_LAST] = now
    return now - m[s.PAUSE_FIRST] > a[at + v.PLE_WINDOW]


@kernel
def undefined(m: Record, a: Arena, op: int) -> bool:
    """Is this op #UD here, whatever the controls for exits say?

    SDM: "Relative Priority of Faults and VM Exits".
    """
    rule = UNDEFINED[op]
    mode = m[s.MODE]
    if rule & rules.NEVER_DEFINED:
        return True
    if rule & rules.PROTECTED and mode & (modes.REAL | modes.V86):
        return True
    if rule & rules.EXTENDED and m[s.CR4] & CR4_OSXSAVE == 0 and a[A_DECODE]:
        return True
    if rule & rules.CONTROL:
        return m[s.NONROOT] != 0 and secondary(m, a) & NEEDED[op] == 0 and a[A_DECODE] != 0
    if rule & rules.SCE:
        return mode != 0 or m[s.EFER] & 1 == 0
    if rule & rules.SMX:
        return m[s.CR4] & CR4_SMXE == 0 and a[A_DECODE] != 0
    return rule & rules.RING0 and m[s.PRIVILEGE] & 1 != 0


@kernel
def exit_by_instruction(m: Record, a: Arena, r: int, op: int, reason: int) -> int:
    """A VM exit because of an instruction: RFLAGS.RF is saved as 0."""
    m[s.RFLAGS] &= ~RF_RF
    qualification = 0
    packed = a[r + o.ROW_MEM]
    if packed & o.MEM_DECODED:
        m[s.EXIT_INSTRUCTION_INFO] = instruction_information(m, a, r, op)
        qualification = instruction_qualification(m, a, r, op)
    elif op == o.MOV_FROM_DR or op == o.MOV_TO_DR:
        qualification = a[r + o.ROW_IMM] | (16 if op == o.MOV_FROM_DR else 0) | (a[r + o.ROW_R1] & 15) << 8
    elif op == o.INVLPG:
        qualification = effective(m, a, r)
    elif packed & 31 < 16 or a[r + o.ROW_DISP] != 0:
        qualification = a[r + o.ROW_DISP]
    vm_exit(m, a, reason, qualification, m[s.OP_LENGTH])
    return JUMPED


@kernel
def debug_register(m: Record, a: Arena, r: int, op: int) -> int:
    """MOV to and from a debug register, whose VM exit has priority over its faults.

    SDM: "Instructions That Cause VM Exits Conditionally"; "MOV—Move to/from Debug Registers".
    """
    if m[s.NONROOT] and a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & b.MOV_DR_EXITING:
        return exit_by_instruction(m, a, r, op, x.DR_ACCESS)
    number = a[r + o.ROW_IMM]
    if number > 7 or ((number == 4 or number == 5) and m[s.CR4] & 8):
        return raise_exception(m, UD, 0, 0)
    if m[s.DR7] & DR7_GD:
        m[s.EVENT_CR2] = DR6_BD
        return raise_exception(m, DB, 0, 0)
    if m[s.PRIVILEGE] & 1:
        return raise_exception(m, GP, 1, 0)
    register = s.GPR + (a[r + o.ROW_R1] & 15)
    slot = s.DR0 + number
    if number >= 4:
        slot = s.DR6 if number & 1 == 0 else s.DR7
    if op == o.MOV_FROM_DR:
        m[register] = m[slot] if m[s.MODE] == 0 else m[slot] & 0xFFFFFFFF
        return NEXT
    value = m[register] if m[s.MODE] == 0 else m[register] & 0xFFFFFFFF
    if number >= 4:
        if value & ~0xFFFFFFFF:
            return raise_exception(m, GP, 1, 0)
        value = (value & 0xE00F) | 0xFFFF0FF0 if slot == s.DR6 else (value & 0xFFFF2FFF) | 0x400
    m[slot] = value
    if slot == s.DR7:
        arm(m, a)
        m[s.LIMIT] = 0
    return NEXT


@kernel
def before_exits(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """What comes before a VM exit in decoded code, beyond tables: 0, or EVENT (a fault in EVENT_…).

    SDM: "Relative Priority of Faults and VM Exits".
    """
    ring3 = m[s.PRIVILEGE] & 1
    if op == o.MOV_TO_CR or op == o.MOV_FROM_CR:
        number = a[r + o.ROW_IMM]
        if number != 0 and number != 2 and number != 3 and number != 4 and number != 8:
            return raise_exception(m, UD, 0, 0)
    if ring3 and op == o.RDPMC and m[s.CR4] & CR4_PCE == 0:
        return raise_exception(m, GP, 1, 0)
    if ring3 and (op == o.RDTSC or op == o.RDTSCP) and m[s.CR4] & CR4_TSD:
        return raise_exception(m, GP, 1, 0)
    if m[s.MODE] & modes.V86 and (m[s.RFLAGS] >> 12) & 3 != 3:
        if op == o.INT or op == o.IRET or op == o.PUSHF or op == o.POPF:
            return raise_exception(m, GP, 1, 0)
    return 0


@kernel
def system(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """Execute one sensitive or privileged op: how it ended (NEXT, JUMPED, EVENT, STOPPED, AGAIN)."""
    if UNDEFINED[op] and undefined(m, a, op):
        return raise_exception(m, UD, 0, 0)
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
        return write_msr(m, a, index, (m[s.GPR + s.RAX] & 0xFFFFFFFF) | (m[s.GPR + s.RDX] << 32))
    if op == o.IN or op == o.OUT or op == o.INS or op == o.OUTS:
        return in_out(m, a, t, r, op)
    if op == o.MOV_TO_CR or op == o.MOV_FROM_CR or op == o.CLTS or op == o.LMSW:
        return move_cr(m, a, t, r, op)
    if op == o.IRET:
        return interrupt_return(m, a, t, r) if decoded else return_from_interrupt(m, a, t)
    if op == o.SYSCALL or op == o.SYSRET or op == o.SYSENTER or op == o.SYSEXIT:
        if a[A_DECODE] and (op == o.SYSENTER or op == o.SYSEXIT):
            if m[s.MODE] & modes.REAL or m[s.SYSENTER_CS] & 0xFFFC == 0:
                return raise_exception(m, GP, 1, 0)
        return system_call(m, a, op)
    if decoded:
        return decoded_rest(m, a, t, r, op)
    return system_rest(m, a, t, r, op)


@kernel
def port_op(decoded: int, op: int) -> bool:
    """Does the I/O permission bitmap decide, and not IOPL alone?"""
    return decoded != 0 and op != o.CLI and op != o.STI


@kernel
def decoded_rest(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """The sensitive ops of decoded code that differ from assembled rows in their operands."""
    packed = a[r + o.ROW_MEM]
    size = operand_bytes(packed)
    in_register = packed & o.MEM_REGISTER != 0
    r2 = a[r + o.ROW_R2]
    if op == o.STI:
        if m[s.RFLAGS] & RF_IF == 0:
            m[s.RFLAGS] |= RF_IF
            m[s.INTERRUPT_SHADOW] = 2
            m[s.SHADOW_KIND] = BLOCKING_BY_STI
            m[s.LIMIT] = 0
    elif op == o.PUSHF:
        return push_flags(m, a, t, size)
    elif op == o.POPF:
        return pop_flags(m, a, t, size)
    elif op == o.LGDT or op == o.LIDT:
        return load_table(m, a, t, r, op)
    elif op == o.SGDT or op == o.SIDT:
        return store_table(m, a, t, r, op)
    elif op == o.SMSW or op == o.SLDT or op == o.STR:
        value = m[s.LDTR_SELECTOR] if op == o.SLDT else m[s.TR_SELECTOR]
        if op == o.SMSW:
            value = m[s.CR0]
            if m[s.NONROOT]:
                mask = a[m[s.VMCS] + v.CR0_GUEST_HOST_MASK]
                value = (value & ~mask) | (a[m[s.VMCS] + v.CR0_READ_SHADOW] & mask)
        if in_register:
            set_register(m, r2, size, value)
            return NEXT
        fault = store_operand(m, a, t, r, 2, value)
        return NEXT if fault == 0 else raise_fault(m, a, t, fault)
    elif op == o.LLDT or op == o.LTR:
        selector = get_register(m, r2, 2) if in_register else load_operand(m, a, t, r, 2)
        if not in_register and m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        return load_system_segment(m, a, t, modes.LDTR if op == o.LLDT else modes.TR, selector)
    elif op == o.INVLPG:
        drop_page(m, a, m[s.CONTEXT_KEY], linear(m, segment_of(packed), offset_of(m, a, r)))
    elif op == o.RDRAND or op == o.RDSEED:
        state = m[s.CYCLE] * 0x9E3779B1 + 0x7F4A7C15
        set_register(m, r2, size, state ^ ((state >> 17) & 0xFFFF))
        m[s.RFLAGS] = (m[s.RFLAGS] & ~ARITHMETIC) | RF_CF
    elif op == o.XGETBV:
        index = m[s.GPR + s.RCX] & 0xFFFFFFFF
        if index > 1:
            return raise_exception(m, GP, 1, 0)
        m[s.GPR + s.RAX] = m[s.XCR0] & 0xFFFFFFFF
        m[s.GPR + s.RDX] = (m[s.XCR0] >> 32) & 0xFFFFFFFF
    elif op == o.RDPMC:  # none of the counters is enabled
        if (m[s.GPR + s.RCX] & 0xFFFFFFFF) >= max((cpuid_register(a, 0xA, 0, 0) >> 8) & 0xFF, COUNTERS):
            return raise_exception(m, GP, 1, 0)
        m[s.GPR + s.RAX] = 0
        m[s.GPR + s.RDX] = 0
    elif op == o.MONITOR:
        if m[s.GPR + s.RCX] & 0xFFFFFFFF:
            return raise_exception(m, GP, 1, 0)
        load_segment(m, a, t, segment_of(packed), m[s.GPR + s.RAX] & address_mask(packed), 1)
        if m[s.FAULT_KIND] and m[s.FAULT_KIND] != ON_DEVICE:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        m[s.MONITOR_ARMED] = 1
    elif op == o.MWAIT:
        if m[s.GPR + s.RCX] & 0xFFFFFFFE:
            return raise_exception(m, GP, 1, 0)
        if m[s.MONITOR_ARMED] == 0:
            return NEXT
        m[s.MONITOR_ARMED] = 0
        return halt(m, a)
    elif op == o.INT3 or op == o.INT1 or op == o.INTO:
        return software_exception(m, a, t, op)
    elif op >= o.MOVE:
        return instruction(m, a, t, r, op)
    else:
        return system_rest(m, a, t, r, op)
    return NEXT


@kernel
def software_exception(m: Record, a: Arena, t: Tags, op: int) -> int:
    """INT3, INTO and INT1.

    SDM: "INT n/INTO/INT3/INT1—Call to Interrupt Procedure".
    """
    if op == o.INTO and m[s.RFLAGS] & RF_OF == 0:
        return NEXT
    vector = BP
    kind = SOFTWARE_EXCEPTION
    if op == o.INTO:
        vector = OF
    elif op == o.INT1:
        vector = DB
        kind = PRIVILEGED_EXCEPTION
    m[s.EVENT_VECTOR] = vector
    m[s.EVENT_TYPE] = kind
    m[s.EVENT_HAS_ERROR] = 0
    m[s.EVENT_ERROR] = 0
    m[s.EVENT_CR2] = 0
    m[s.EVENT_LENGTH] = m[s.OP_LENGTH]
    return deliver(m, a, t)


@kernel
def load_table(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """LGDT and LIDT of the mode's operand size.

    SDM: "LGDT/LIDT—Load Global/Interrupt Descriptor Table Register".
    """
    packed = a[r + o.ROW_MEM]
    segment = segment_of(packed)
    offset = offset_of(m, a, r)
    wide = m[s.MODE] == 0
    limit = load_segment(m, a, t, segment, offset, 2)
    base = 0
    if m[s.FAULT_KIND] == 0:
        base = load_segment(m, a, t, segment, offset + 2, 8 if wide else 4)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if wide and not modes.canonical(m, base):
        return raise_exception(m, GP, 1, 0)
    if not wide and operand_bytes(packed) == 2:
        base &= 0xFFFFFF
    m[s.GDTR_BASE if op == o.LGDT else s.IDTR_BASE] = base
    m[s.GDTR_LIMIT if op == o.LGDT else s.IDTR_LIMIT] = limit
    return NEXT


@kernel
def store_table(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """SGDT and SIDT."""
    segment = segment_of(a[r + o.ROW_MEM])
    offset = offset_of(m, a, r)
    fault = store_segment(m, a, t, segment, offset, 2, m[s.GDTR_LIMIT if op == o.SGDT else s.IDTR_LIMIT])
    if fault == 0:
        base = m[s.GDTR_BASE if op == o.SGDT else s.IDTR_BASE]
        fault = store_segment(m, a, t, segment, offset + 2, 8 if m[s.MODE] == 0 else 4, base)
    return NEXT if fault == 0 else raise_fault(m, a, t, fault)


@kernel
def system_rest(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """The sensitive ops that need no decision of their own any more."""
    g = s.GPR + (a[r + o.ROW_R1] & 15)
    if op == o.CPUID:
        cpuid(m, a)
    elif op == o.RDTSC or op == o.RDTSCP:
        tsc = time_stamp(m)
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
        fault = write_as(m, a, t, m[s.GPR + s.RSP] - 8, m[s.RFLAGS], m[s.PRIVILEGE] & 1)
        if fault:
            return raise_fault(m, a, t, fault)
        m[s.GPR + s.RSP] -= 8
    elif op == o.POPF:
        flags = read_as(m, a, t, m[s.GPR + s.RSP], m[s.PRIVILEGE] & 1)
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        m[s.GPR + s.RSP] += 8
        kept = 0
        if m[s.PRIVILEGE] & 1:
            kept = 0x3000 if (m[s.RFLAGS] >> 12) & 3 == 3 else 0x3000 | RF_IF
        m[s.RFLAGS] = (flags & 0x254DD5 & ~kept) | (m[s.RFLAGS] & kept) | 2
        set_limit(m, a)
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
        saw(m, value)
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
        saw(m, m[s.GDTR_BASE if op == o.SGDT else s.IDTR_BASE])
    elif op == o.LLDT:
        m[s.LDTR_SELECTOR] = m[g] & 0xFFFF
    elif op == o.SLDT:
        m[g] = m[s.LDTR_SELECTOR]
        saw(m, m[g])
    elif op == o.LTR:
        m[s.TR_SELECTOR] = m[g] & 0xFFFF
        m[s.TR_BASE] = m[s.GPR + (a[r + o.ROW_R2] & 15)]
    elif op == o.STR:
        m[g] = m[s.TR_SELECTOR]
        saw(m, m[g])
    elif op == o.XSETBV:
        if m[s.PRIVILEGE] & 1:
            return raise_exception(m, GP, 1, 0)
        m[s.XCR0] = (m[s.GPR + s.RAX] & 0xFFFFFFFF) | m[s.GPR + s.RDX] << 32
    elif op == o.WBINVD or op == o.INVD:
        for cache in range(s.L1I, s.L3 + 8, 8):
            forget(m, t, cache)
        m[s.FETCH_GENERATION] += 1
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
    return NEXT


@kernel
def forget(m: Record, t: Tags, cache: int) -> None:
    """Empty a cache."""
    for n in range(m[cache + s.SETS] * m[cache + s.WAYS]):
        t[m[cache] + n] = -1


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
    key = (m[s.CONTEXT_KEY] & ~(0xFFF << 16)) | (low & 0xFFF) << 16
    if kind == 0:
        drop_page(m, a, key, address)
    elif kind == 1:
        drop_contexts(m, a, -1, key, False)
    else:
        others = ~(0xFFF << 16) & ~GLOBAL_KEY
        drop_contexts(m, a, others, m[s.CONTEXT_KEY] & others, kind == 2)
    return NEXT
