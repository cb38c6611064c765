"""Which ops exit in non-root mode because of one control bit, or always: a table that the engine reads.

Conditions that need more than one bit (bitmaps, masks, shadows) are functions of kernels.system.

SDM: "Instructions That Cause VM Exits Unconditionally"; "Instructions That Cause VM Exits Conditionally".
"""

from __future__ import annotations

from typing import Final

import numpy as np

from vtsim.cpu import ops as o
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v

NEVER, ALWAYS, PRIMARY, SECONDARY, SPECIAL = range(5)

# fmt: off
#  op               where      bit                         reason
RULES: Final = (
    (o.CPUID,       ALWAYS,    0,                          x.CPUID),
    (o.GETSEC,      ALWAYS,    0,                          x.GETSEC),
    (o.INVD,        ALWAYS,    0,                          x.INVD),
    (o.XSETBV,      ALWAYS,    0,                          x.XSETBV),
    (o.VMCALL,      ALWAYS,    0,                          x.VMCALL),
    (o.VMCLEAR,     ALWAYS,    0,                          x.VMCLEAR),
    (o.VMLAUNCH,    ALWAYS,    0,                          x.VMLAUNCH),
    (o.VMRESUME,    ALWAYS,    0,                          x.VMRESUME),
    (o.VMPTRLD,     ALWAYS,    0,                          x.VMPTRLD),
    (o.VMPTRST,     ALWAYS,    0,                          x.VMPTRST),
    (o.VMREAD,      ALWAYS,    0,                          x.VMREAD),
    (o.VMWRITE,     ALWAYS,    0,                          x.VMWRITE),
    (o.VMXON,       ALWAYS,    0,                          x.VMON),
    (o.VMXOFF,      ALWAYS,    0,                          x.VMOFF),
    (o.INVEPT,      ALWAYS,    0,                          x.INVEPT),
    (o.INVVPID,     ALWAYS,    0,                          x.INVVPID),
    (o.HLT,         PRIMARY,   b.HLT_EXITING,              x.HLT),
    (o.INVLPG,      PRIMARY,   b.INVLPG_EXITING,           x.INVLPG),
    (o.MWAIT,       PRIMARY,   b.MWAIT_EXITING,            x.MWAIT_INSTRUCTION),
    (o.MONITOR,     PRIMARY,   b.MONITOR_EXITING,          x.MONITOR_INSTRUCTION),
    (o.RDPMC,       PRIMARY,   b.RDPMC_EXITING,            x.RDPMC),
    (o.RDTSC,       PRIMARY,   b.RDTSC_EXITING,            x.RDTSC),
    (o.RDTSCP,      PRIMARY,   b.RDTSC_EXITING,            x.RDTSCP),
    (o.MOV_FROM_DR, PRIMARY,   b.MOV_DR_EXITING,           x.DR_ACCESS),
    (o.MOV_TO_DR,   PRIMARY,   b.MOV_DR_EXITING,           x.DR_ACCESS),
    (o.PAUSE,       SPECIAL,   b.PAUSE_EXITING,            x.PAUSE_INSTRUCTION),
    (o.INVPCID,     PRIMARY,   b.INVLPG_EXITING,           x.INVPCID),
    (o.WBINVD,      SECONDARY, b.WBINVD_EXITING,           x.WBINVD),
    (o.RDRAND,      SECONDARY, b.RDRAND_EXITING,           x.RDRAND),
    (o.RDSEED,      SECONDARY, b.RDSEED_EXITING,           x.RDSEED),
    (o.LGDT,        SECONDARY, b.DESCRIPTOR_TABLE_EXITING, x.GDTR_IDTR),
    (o.SGDT,        SECONDARY, b.DESCRIPTOR_TABLE_EXITING, x.GDTR_IDTR),
    (o.LIDT,        SECONDARY, b.DESCRIPTOR_TABLE_EXITING, x.GDTR_IDTR),
    (o.SIDT,        SECONDARY, b.DESCRIPTOR_TABLE_EXITING, x.GDTR_IDTR),
    (o.LLDT,        SECONDARY, b.DESCRIPTOR_TABLE_EXITING, x.LDTR_TR),
    (o.SLDT,        SECONDARY, b.DESCRIPTOR_TABLE_EXITING, x.LDTR_TR),
    (o.LTR,         SECONDARY, b.DESCRIPTOR_TABLE_EXITING, x.LDTR_TR),
    (o.STR,         SECONDARY, b.DESCRIPTOR_TABLE_EXITING, x.LDTR_TR),
    (o.XSAVES,      SPECIAL,   b.ENABLE_XSAVES_XRSTORS,    x.XSAVES),
    (o.XRSTORS,     SPECIAL,   b.ENABLE_XSAVES_XRSTORS,    x.XRSTORS),
    (o.TPAUSE,      PRIMARY,   b.RDTSC_EXITING,            x.TPAUSE),
    (o.UMWAIT,      PRIMARY,   b.RDTSC_EXITING,            x.UMWAIT),
    (o.ENCLS,       SPECIAL,   b.ENABLE_ENCLS_EXITING,     x.ENCLS),
    (o.ENCLV,       SPECIAL,   b.ENABLE_ENCLV_EXITING,     x.ENCLV),
    (o.PCONFIG,     SPECIAL,   b.ENABLE_PCONFIG,           x.PCONFIG),
    (o.LOADIWKEY,   SPECIAL,   b.LOADIWKEY_EXITING,        x.LOADIWKEY),
)
# ops that are #UD in some modes or without some control, before anything else is considered (VMX instructions have
# rules of their own): PROTECTED in real and virtual-8086 mode, CONTROL in VMX non-root operation unless the secondary
# control is 1, EXTENDED unless CR4.OSXSAVE, SCE outside 64-bit mode and unless IA32_EFER.SCE, RING0 outside ring 0,
# SMX unless CR4.SMXE, FSGSBASE outside 64-bit mode and unless CR4.FSGSBASE, ENUMERATED unless CPUID says that there is
# such an instruction (LEAF_7), NEVER_DEFINED always.
PROTECTED, CONTROL, EXTENDED, SCE, RING0, NEVER_DEFINED, SMX, ENUMERATED, FSGSBASE = (1 << n for n in range(9))
UNDEFINED_RULES: Final = (
    *((op, PROTECTED, 0) for op in (o.SLDT, o.STR, o.LLDT, o.LTR, o.LAR, o.LSL, o.VERR, o.VERW)),
    *((op, FSGSBASE, 0) for op in (o.RDFSBASE, o.RDGSBASE, o.WRFSBASE, o.WRGSBASE)),
    (o.RDTSCP,  CONTROL,            b.ENABLE_RDTSCP),
    (o.INVPCID, CONTROL,            b.ENABLE_INVPCID),
    (o.XSAVES,  CONTROL | EXTENDED, b.ENABLE_XSAVES_XRSTORS),
    (o.XRSTORS, CONTROL | EXTENDED, b.ENABLE_XSAVES_XRSTORS),
    (o.XSETBV,  EXTENDED,           0),
    (o.XGETBV,  EXTENDED,           0),
    (o.SYSCALL, SCE,                0),
    (o.SYSRET,  SCE,                0),
    (o.MONITOR, RING0,              0),
    (o.MWAIT,   RING0,              0),
    (o.STAC,    RING0,              0),
    (o.CLAC,    RING0,              0),
    (o.GETSEC,  SMX,                0),
    (o.RSM,     NEVER_DEFINED,      0),
    (o.ENCLS,   ENUMERATED | RING0 | PROTECTED,   0),
    (o.ENCLV,   ENUMERATED | RING0 | PROTECTED,   0),
    (o.PCONFIG, ENUMERATED | RING0 | CONTROL,     b.ENABLE_PCONFIG),
    (o.LOADIWKEY, ENUMERATED,                     0),
    (o.TPAUSE,  ENUMERATED | CONTROL,             b.ENABLE_USER_WAIT_AND_PAUSE),
    (o.UMWAIT,  ENUMERATED | CONTROL,             b.ENABLE_USER_WAIT_AND_PAUSE),
    (o.UMONITOR, ENUMERATED | CONTROL,            b.ENABLE_USER_WAIT_AND_PAUSE),
    (o.UD,      NEVER_DEFINED,      0),
)

# of CPUID leaf 7, subleaf 0: register (1 EBX, 2 ECX, 3 EDX) and bit
LEAF_7_BITS: Final = (
    (o.ENCLS, 1, 2), (o.ENCLV, 1, 2), (o.PCONFIG, 3, 18), (o.LOADIWKEY, 2, 23), (o.TPAUSE, 2, 5), (o.UMWAIT, 2, 5),
    (o.UMONITOR, 2, 5),
)
# ops that raise #GP outside ring 0, before any exit is considered (XSETBV exits in every ring)
PRIVILEGED: Final = (
    o.RDMSR, o.WRMSR, o.MOV_FROM_CR, o.MOV_TO_CR, o.MOV_FROM_DR, o.MOV_TO_DR, o.CLTS, o.LMSW, o.LGDT, o.LIDT, o.LLDT,
    o.LTR, o.HLT, o.INVLPG, o.INVPCID, o.WBINVD, o.INVD, o.XSAVES, o.XRSTORS, o.SYSRET,
    o.SYSEXIT, o.SWAPGS, o.LOADIWKEY,
)
# ops that raise #GP in ring 3 unless RFLAGS.IOPL is 3
IO_PRIVILEGED: Final = (o.IN, o.OUT, o.INS, o.OUTS, o.CLI, o.STI)
# ops that tell or change the state of the system in ring 3 without a fault (Robin and Irvine, "Analysis of the Intel
# Pentium's Ability to Support a Secure Virtual Machine Monitor"; XGETBV and RDTSCP are younger): #GP in ring 3 while
# SENSITIVE_TRAPS is set
SENSITIVE_OPS: Final = (
    o.SGDT, o.SIDT, o.SLDT, o.STR, o.SMSW, o.PUSHF, o.POPF, o.INT, o.IRET, o.MOV_FROM_SEGMENT, o.MOV_TO_SEGMENT,
    o.CALL_FAR, o.JMP_FAR, o.RET_FAR, o.LAR, o.LSL, o.VERR, o.VERW, o.PUSH_SEGMENT, o.POP_SEGMENT,
    o.XGETBV, o.RDTSCP,
)
VMX_INSTRUCTIONS: Final = (
    o.VMREAD, o.VMWRITE, o.VMXON, o.VMXOFF, o.VMCLEAR, o.VMPTRLD, o.VMPTRST, o.VMLAUNCH, o.VMRESUME, o.INVEPT,
    o.INVVPID, o.VMCALL, o.VMFUNC,
)
# fmt: on

WHERE: Final = np.zeros(256, np.int64)
BIT: Final = np.zeros(256, np.int64)
REASON: Final = np.zeros(256, np.int64)
RING: Final = np.zeros(256, np.int64)  # 1 privileged, 2 I/O privileged, 3 VMX instruction
for _op, _where, _bit, _reason in RULES:
    WHERE[_op], BIT[_op], REASON[_op] = _where, _bit, _reason
UNDEFINED: Final = np.zeros(256, np.int64)
LEAF_7: Final = np.zeros((256, 2), np.int64)
for _op, _register, _bit in LEAF_7_BITS:
    LEAF_7[_op] = _register, _bit
NEEDED: Final = np.zeros(256, np.int64)
for _op, _rule, _bit in UNDEFINED_RULES:
    UNDEFINED[_op], NEEDED[_op] = _rule, _bit
REASON[o.VMFUNC] = x.VMFUNC  # where the function is not enabled, or refuses its operand
for _op in PRIVILEGED:
    RING[_op] = 1
for _op in IO_PRIVILEGED:
    RING[_op] = 2
SENSITIVE: Final = np.zeros(256, np.int64)
for _op in SENSITIVE_OPS:
    SENSITIVE[_op] = 1
for _op in VMX_INSTRUCTIONS:
    RING[_op] = 3
PRIMARY_SLOT: Final = v.PRIMARY_PROC_CONTROLS
SECONDARY_SLOT: Final = v.SECONDARY_PROC_CONTROLS
