"""What comes before a sensitive op does anything: exceptions that have priority over VM exits, and the VM exits.

SDM: "Relative Priority of Faults and VM Exits"; "Instructions That Cause VM Exits Conditionally".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_DECODE
from vtsim.cpu import exit_rules as rules
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import (
    GP,
    JUMPED,
    RF_RF,
    UD,
)
from vtsim.cpu.exit_rules import BIT, LEAF_7, NEEDED, UNDEFINED, WHERE
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.access import effective
from vtsim.cpu.kernels.active_controls import secondary_controls, tertiary_controls
from vtsim.cpu.kernels.exceptions import raise_exception
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.information import instruction_information, instruction_qualification
from vtsim.cpu.kernels.v86_extensions import redirects
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs.kernels.values import cpuid_register

# fmt: off
CR4_TSD, CR4_PCE, CR4_SMXE, CR4_OSXSAVE = 1 << 2, 1 << 8, 1 << 14, 1 << 18
DR7_GD, DR6_BD = 1 << 13, 1 << 13
CR4_KL: int = 1 << 19
CR4_FSGSBASE: int = 1 << 16
LEAVES: int = 63                  # leaves with a bit of their own in a bitmap; one more stands for the rest
COUNTERS: int = 2                  # of processors that do not enumerate them
# fmt: on


@kernel
def exits_by_rule(m: Record, a: Arena, op: int) -> bool:
    """Does this op, in non-root mode, exit always, because of one control bit, or by a rule of its own?"""
    where = WHERE[op]
    if where == rules.PRIMARY:
        return a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & BIT[op] != 0
    if where == rules.SECONDARY:
        return secondary_controls(m, a) & BIT[op] != 0
    if where == rules.SPECIAL:
        return exits_by_itself(m, a, op)
    return where == rules.ALWAYS


@kernel
def exits_by_itself(m: Record, a: Arena, op: int) -> bool:
    """The ops whose VM exits depend on more than one bit.

    SDM: "Instructions That Cause VM Exits Conditionally".
    """
    at = m[s.VMCS]
    controls = secondary_controls(m, a)
    if op == o.PAUSE:
        if a[at + v.PRIMARY_PROC_CONTROLS] & b.PAUSE_EXITING:
            return True
        if controls & b.PAUSE_LOOP_EXITING == 0 or m[s.PRIVILEGE] & 1:
            return False
        return pause_loop(m, a)
    if op == o.LOADIWKEY:
        return tertiary_controls(m, a) & b.LOADIWKEY_EXITING != 0
    if op == o.ENCLS:
        return controls & b.ENABLE_ENCLS_EXITING != 0 and leaf_exits(m, a[at + v.ENCLS_EXITING_BITMAP])
    if op == o.ENCLV:
        return controls & b.ENABLE_ENCLV_EXITING != 0 and leaf_exits(m, a[at + v.ENCLV_EXITING_BITMAP])
    if op == o.PCONFIG:
        return leaf_exits(m, a[at + v.PCONFIG_EXITING_BITMAP])
    wanted = (m[s.GPR + s.RAX] & 0xFFFFFFFF) | m[s.GPR + s.RDX] << 32  # XSAVES, XRSTORS
    return wanted & m[s.MSR_XSS] & a[at + v.XSS_EXITING_BITMAP] != 0


@kernel
def leaf_exits(m: Record, bitmap: int) -> bool:
    """Is the leaf in EAX one whose bit is set? Bit 63 stands for leaf 63 and all beyond.

    SDM: "ENCLS-Exiting Bitmap"; "ENCLV-Exiting Bitmap"; "PCONFIG-Exiting Bitmap".
    """
    leaf = m[s.GPR + s.RAX] & 0xFFFFFFFF
    return (bitmap >> min(leaf, LEAVES)) & 1 != 0


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
    if rule & rules.ENUMERATED and not enumerated(m, a, op):
        return True
    if rule & rules.RING0 and m[s.PRIVILEGE] & 1:
        return True
    if rule & rules.EXTENDED and m[s.CR4] & CR4_OSXSAVE == 0 and a[A_DECODE]:
        return True
    if rule & rules.FSGSBASE:
        return mode != 0 or m[s.CR4] & CR4_FSGSBASE == 0
    if rule & rules.CONTROL:
        return m[s.NONROOT] != 0 and secondary_controls(m, a) & NEEDED[op] == 0 and a[A_DECODE] != 0
    if rule & rules.SCE:
        return mode != 0 or m[s.EFER] & 1 == 0
    return rule & rules.SMX != 0 and m[s.CR4] & CR4_SMXE == 0 and a[A_DECODE] != 0


@kernel
def enumerated(m: Record, a: Arena, op: int) -> bool:
    """Does CPUID say that the processor has this instruction, and CR4 that it may be used?"""
    if (cpuid_register(a, 7, 0, LEAF_7[op, 0]) >> LEAF_7[op, 1]) & 1 == 0:
        return False
    return op != o.LOADIWKEY or m[s.CR4] & CR4_KL != 0


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
    if ring3 and (op == o.RDTSC or op == o.RDTSCP or op == o.TPAUSE or op == o.UMWAIT) and m[s.CR4] & CR4_TSD:
        return raise_exception(m, GP, 1, 0)
    if op == o.INT and m[s.MODE] & modes.V86 and redirects(m, a, t, a[r + o.ROW_IMM]):
        return 0
    if m[s.MODE] & modes.V86 and (m[s.RFLAGS] >> 12) & 3 != 3:
        if op == o.INT or op == o.IRET or op == o.PUSHF or op == o.POPF:
            return raise_exception(m, GP, 1, 0)
    return 0


@kernel
def port_op(decoded: int, op: int) -> bool:
    """Does the I/O permission bitmap decide, and not IOPL alone?"""
    return decoded != 0 and op != o.CLI and op != o.STI
