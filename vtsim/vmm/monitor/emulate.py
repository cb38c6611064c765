"""What the monitor does in place of a privileged operation of the guest's kernel.

A #GP of the kernel is looked up: the row at the guest's RIP names the operation, a table its emulator, which works on
the virtual CPU in memory. What is privileged and not in the table ends the VM. A #GP of a process is its own, unless
the ISA makes sensitive operations trap (`machine.isa`).

SDM: "Privileged Instructions"; "Fast System Calls in 64-Bit Mode"; "IRET/IRETD/IRETQ—Interrupt Return".
Not modelled: under a monitor, LTR and LLDT, string port instructions, immediate port 0, MSRs beyond those of
the guest kernels here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.exit_rules import IO_PRIVILEGED, PRIVILEGED
from vtsim.cpu.kernels import hooks
from vtsim.cpu.kernels import shadow_hooks as h
from vtsim.cpu.slots import R9, R11, R12, R13, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept import shadow as d
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.entry import FROM_USER, GENERAL_PROTECTION, X2APIC_SELF_IPI, believed_flags, enter_flags, restore
from vtsim.vmm.monitor.layout import F_CS, F_ERROR, F_RFLAGS, F_RIP, F_RSP, F_SS, V, saved, vcpu
from vtsim.vmm.monitor.memory import ALL, count, die, forget_views, hook

CR0_PG, CR0_WP, CR0_TS = 1 << 31, 1 << 16, 1 << 3
CR4_PAE, CR4_LA57, CR4_VMXE, CR4_PCIDE, CR4_SMEP = 1 << 5, 1 << 12, 1 << 13, 1 << 17, 1 << 20
EFER_NX, EFER_LONG = 1 << 11, 5 << 8
POPPED: Final = 0x254DD5  # bits of RFLAGS that POPF changes
EFER, GS_BASE, FS_BASE, KERNEL_GS_BASE = 0xC0000080, 0xC0000101, 0xC0000100, 0xC0000102
X2APIC_TPR, X2APIC_EOI, X2APIC_SPURIOUS, X2APIC_LVT_TIMER = 0x808, 0x80B, 0x80F, 0x832
X2APIC_INITIAL, X2APIC_CURRENT, X2APIC_DIVIDE, TSC_DEADLINE = 0x838, 0x839, 0x83E, 0x6E0
PASSED: Final = (FS_BASE, GS_BASE, KERNEL_GS_BASE, X2APIC_INITIAL, X2APIC_DIVIDE, TSC_DEADLINE)
READ_ALSO: Final = (X2APIC_CURRENT, 0x10)
KEPT: Final = {0xC0000081: "STAR", 0xC0000082: "LSTAR", 0xC0000084: "FMASK", X2APIC_TPR: "CR8"}

Emulator = Callable[[Assembler], None]


def general_protection(a: Assembler, tables: int, translates: bool) -> None:
    """`trap_13`: a #GP of the guest.

    `tables` is the address of the emulators by op: of processes, then of the kernel.
    """
    a.activity = ops.EXIT_DISPATCH
    a.label(f"trap_{GENERAL_PROTECTION}")
    a.stm(Mem(RSP, 48 + V["REGISTERS"]), ALL)
    a.lea(R15, Mem(RSP, 48))
    a.ld(RAX, F_RSP)
    a.st(saved(RSP), RAX)
    count(a, "TRAPS")
    if translates:
        a.call("original")
    a.label("emulate")
    a.ld(RSI, F_RIP)
    a.copy(RDI, RSI)
    a.hook(hooks.DECODE)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_S, "reflect")
    a.st(vcpu("LENGTH"), R9)
    a.ld(R13, vcpu("KERNEL"))
    a.shl(R13, 8)
    a.add(RAX, register=R13)
    a.jmp_mem(Mem(displacement=tables, index=RAX, scale=8))
    a.label("reflect")
    a.activity = ops.INJECTION
    a.mov(R12, GENERAL_PROTECTION)
    a.ld(R13, F_ERROR)
    a.jmp("inject")
    a.label("illegal")
    a.and_(RAX, 0xFF)
    a.st(vcpu("DEATH_OP"), RAX)
    die(a, at.ILLEGAL)


def cli(a: Assembler) -> None:
    """CLI."""
    a.st_value(vcpu("INTERRUPTS"), 0)
    a.jmp("skip")


def sti(a: Assembler) -> None:
    """STI; HLT behind it comes before an interrupt that waits, as in its shadow."""
    a.st_value(vcpu("INTERRUPTS"), 1)
    a.ld(RAX, vcpu("PENDING"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "skip")
    a.ld(RSI, F_RIP)
    a.add(RSI, register=R9)
    a.copy(RDI, RSI)
    a.hook(hooks.DECODE)
    a.cmp(RAX, ops.HLT)
    a.jcc(ops.CC_NZ, "skip")
    a.ld(RAX, F_RIP)
    a.ld(RCX, vcpu("LENGTH"))
    a.add(RAX, register=RCX)
    a.st(F_RIP, RAX)
    count(a, "EMULATED", 1)
    a.st(vcpu("LENGTH"), R9)
    a.jmp("skip")


def halt(a: Assembler) -> None:
    """HLT: the processor waits in the guest's place until an interrupt is there for it."""
    a.label("halted")
    a.ld(RAX, vcpu("PENDING"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "halt_more")
    a.ld(RAX, vcpu("INTERRUPTS"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "skip")
    a.label("halt_more")
    a.op(ops.STI)
    a.op(ops.HLT)
    a.op(ops.CLI)
    a.jmp("halted")


def swap_gs(a: Assembler) -> None:
    """SWAPGS: the processor's GS bases are the guest's, because the monitor uses none."""
    a.op(ops.SWAPGS)
    a.jmp("skip")


def move_from_cr(a: Assembler) -> None:
    """MOV from CR: what the guest believes."""
    for number in (0, 2, 3, 4, 8):
        a.cmp(RBX, number)
        a.jcc(ops.CC_NZ, f"from_not_{number}")
        a.ld(RAX, vcpu(f"CR{number}"))
        a.jmp("put_register")
        a.label(f"from_not_{number}")
    a.jmp("reflect")
    a.label("put_register")
    a.st(Mem(R15, V["REGISTERS"], index=RCX, scale=8), RAX)
    a.jmp("skip")


def move_to_cr(a: Assembler) -> None:
    """MOV to CR: another address space, or another paging mode; what the monitor cannot let it change ends the VM."""
    a.ld(RAX, Mem(R15, V["REGISTERS"], index=RCX, scale=8))
    for number in (2, 8):
        a.cmp(RBX, number)
        a.jcc(ops.CC_NZ, f"to_not_{number}")
        a.st(vcpu(f"CR{number}"), RAX)
        a.jmp("skip")
        a.label(f"to_not_{number}")
    a.cmp(RBX, 3)
    a.jcc(ops.CC_NZ, "to_not_3")
    a.activity = ops.MEMORY_MANAGEMENT
    a.shl(RAX, 1)  # bit 63 is no part of the value: it says that translations may stay
    a.shr(RAX, 1)
    a.st(vcpu("CR3"), RAX)
    forget_views(a)
    a.call("view_find")
    a.jmp("skip")
    a.label("to_not_3")
    a.cmp(RBX, 0)
    a.jcc(ops.CC_Z, "to_0")
    a.cmp(RBX, 4)
    a.jcc(ops.CC_NZ, "reflect")
    a.ld(RDX, vcpu("CR4"))
    a.emit(ops.XOR, RDX, RAX)
    a.test(RDX, CR4_PAE | CR4_LA57 | CR4_VMXE)
    a.jcc(ops.CC_NZ, "illegal_cr")
    a.st(vcpu("CR4"), RAX)
    a.jmp("paging_mode")
    a.label("to_0")
    a.ld(RDX, vcpu("CR0"))
    a.emit(ops.XOR, RDX, RAX)
    a.test(RDX, CR0_PG | 1)
    a.jcc(ops.CC_NZ, "illegal_cr")
    a.st(vcpu("CR0"), RAX)
    a.label("paging_mode")
    a.mov(RBX, d.MODE_PAGING)
    for field, mask, mode in (("CR0", CR0_WP, d.MODE_WP), ("CR4", CR4_SMEP, d.MODE_SMEP), ("EFER", EFER_NX, d.MODE_NX)):
        a.ld(RAX, vcpu(field))
        a.test(RAX, mask)
        a.jcc(ops.CC_Z, f"mode_without_{mode}")
        a.or_(RBX, mode)
        a.label(f"mode_without_{mode}")
    a.st(vcpu("MODE"), RBX)
    forget_views(a)
    a.call("view_find")
    a.jmp("skip")
    a.label("illegal_cr")
    a.mov(RAX, ops.MOV_TO_CR)
    a.jmp("illegal")


def clear_ts(a: Assembler) -> None:
    """CLTS."""
    a.ld(RAX, vcpu("CR0"))
    a.and_(RAX, ~CR0_TS)
    a.st(vcpu("CR0"), RAX)
    a.jmp("skip")


def move_from_dr(a: Assembler) -> None:
    """MOV from DR6 and DR7; the others read as 0."""
    a.mov(RAX, 0)
    for number in (6, 7):
        a.cmp(RBX, number)
        a.jcc(ops.CC_NZ, f"from_not_dr{number}")
        a.ld(RAX, vcpu(f"DR{number}"))
        a.label(f"from_not_dr{number}")
    a.jmp("put_register")


def move_to_dr(a: Assembler) -> None:
    """MOV to DR6 and DR7."""
    a.ld(RAX, Mem(R15, V["REGISTERS"], index=RCX, scale=8))
    for number in (6, 7):
        a.cmp(RBX, number)
        a.jcc(ops.CC_NZ, f"to_not_dr{number}")
        a.st(vcpu(f"DR{number}"), RAX)
        a.label(f"to_not_dr{number}")
    a.jmp("skip")


def invlpg(a: Assembler) -> None:
    """INVLPG: the shadow entry is as the guest's since the guest wrote it; the translation goes."""
    a.activity = ops.MEMORY_MANAGEMENT
    a.call("operand")
    a.copy(R12, RAX)
    a.copy(RSI, RAX)
    hook(a, h.SHADOW_INVLPG)
    a.call("settle")
    a.op(ops.INVLPG, mem=Mem(R12))
    a.jmp("skip")


def invpcid(a: Assembler) -> None:
    """INVPCID: all translations go."""
    a.activity = ops.MEMORY_MANAGEMENT
    a.call("flush")
    a.jmp("skip")


def nothing(a: Assembler) -> None:
    """An instruction that has no effect in a VM."""
    a.jmp("skip")


def sysret(a: Assembler) -> None:
    """SYSRET: to the process, by SYSRET. An interrupt that waits is raised again, and comes at once."""
    a.ld(RAX, saved(R11))
    enter_flags(a, RAX, RCX)
    a.st(saved(R11), RAX)
    count(a, "EMULATED", 1)
    a.st_value(vcpu("KERNEL"), 0)
    a.call("view")
    a.activity = ops.REENTRY
    a.ld(RAX, vcpu("PENDING"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "sysret_now")
    a.mov(RCX, X2APIC_SELF_IPI)
    a.mov(RAX, at.TIMER_VECTOR)
    a.mov(RDX, 0)
    a.op(ops.WRMSR)
    a.label("sysret_now")
    a.copy(RSP, R15)
    restore(a, 0)
    a.ld(RSP, Mem(RSP, V["REGISTERS"] + 8 * RSP))
    a.op(ops.SYSRET)


def iret(a: Assembler) -> None:
    """IRET of the kernel: to a process or to itself."""
    a.ld(RSI, saved(RSP))
    a.ld(RAX, Mem(RSI))
    a.ld(RCX, Mem(RSI, 8))
    a.ld(RDX, Mem(RSI, 16))
    a.ld(RBX, Mem(RSI, 24))
    a.ld(RDI, Mem(RSI, 32))
    a.st(F_RIP, RAX)
    a.st(saved(RSP), RBX)
    enter_flags(a, RDX, RAX)
    a.st(F_RFLAGS, RDX)
    a.test(RCX, FROM_USER)
    a.jcc(ops.CC_Z, "iret_to_kernel")
    a.st(F_CS, RCX)
    a.st(F_SS, RDI)
    count(a, "EMULATED", 1)
    a.st_value(vcpu("KERNEL"), 0)
    a.call("view")
    a.jmp("check")
    a.label("iret_to_kernel")
    a.st(vcpu("CS"), RCX)
    a.st(vcpu("SS"), RDI)
    a.jmp("emulated")


def user_iret(a: Assembler) -> None:
    """IRET of a process, which stays in ring 3 and keeps IF and IOPL."""
    a.ld(RSI, saved(RSP))
    a.ld(RCX, Mem(RSI, 8))
    a.copy(RAX, RCX)
    a.and_(RAX, FROM_USER)
    a.cmp(RAX, FROM_USER)
    a.jcc(ops.CC_NZ, "reflect")
    a.ld(RAX, Mem(RSI))
    a.st(F_RIP, RAX)
    a.ld(RDX, Mem(RSI, 16))
    a.and_(RDX, ~at.IOPL)
    a.or_(RDX, at.RF_IF | 2)
    a.st(F_RFLAGS, RDX)
    a.ld(RBX, Mem(RSI, 24))
    a.st(saved(RSP), RBX)
    a.jmp("emulated")


def software_interrupt(a: Assembler) -> None:
    """INT n: through the guest's gate, which a process may only use if its DPL is 3."""
    a.copy(R12, RBX)
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "int_allowed")
    a.copy(RDX, RBX)
    a.shl(RDX, 4)
    a.ld(RDI, vcpu("IDTR", 1))
    a.add(RDI, register=RDX)
    a.ld(RAX, Mem(RDI))
    a.shr(RAX, 45)
    a.and_(RAX, 3)
    a.cmp(RAX, 3)
    a.jcc(ops.CC_Z, "int_allowed")
    a.copy(R13, RBX)
    a.shl(R13, 3)
    a.or_(R13, 2)
    a.mov(R12, GENERAL_PROTECTION)
    a.jmp("inject")
    a.label("int_allowed")
    a.ld(RAX, F_RIP)
    a.add(RAX, register=R9)
    a.st(F_RIP, RAX)
    a.mov(R13, -1)
    a.jmp("inject")


def port_in(a: Assembler) -> None:
    """IN from a port that nobody gave the guest: all ones."""
    a.activity = ops.DEVICE_EMULATION
    a.ld(RAX, saved(RAX))
    a.cmp(RDX, 4)
    a.jcc(ops.CC_Z, "in_long")
    a.cmp(RDX, 2)
    a.jcc(ops.CC_Z, "in_word")
    a.or_(RAX, 0xFF)
    a.jmp("in_done")
    a.label("in_word")
    a.or_(RAX, 0xFFFF)
    a.jmp("in_done")
    a.label("in_long")
    a.mov(RAX, 0xFFFF_FFFF)
    a.label("in_done")
    a.st(saved(RAX), RAX)
    a.jmp("skip")


def read_msr(a: Assembler) -> None:
    """RDMSR: from the structure, from the processor where the MSR is the guest's, from a table; else #GP."""
    a.ld(RCX, saved(RCX, 4))
    for index, field in {**KEPT, EFER: "EFER", X2APIC_LVT_TIMER: "TIMER_LVT"}.items():
        a.cmp(RCX, index)
        a.jcc(ops.CC_NZ, f"read_not_{field}")
        a.ld(RAX, vcpu(field))
        a.jmp("msr_value")
        a.label(f"read_not_{field}")
    for index in (*PASSED, *READ_ALSO):
        a.cmp(RCX, index)
        a.jcc(ops.CC_Z, "read_passed")
    a.call("find_msr")
    a.ld(RAX, Mem(RAX, 8))
    a.jmp("msr_value")
    a.label("read_passed")
    a.op(ops.RDMSR)
    a.jmp("msr_halves")
    a.label("msr_value")
    a.copy(RDX, RAX)
    a.shr(RDX, 32)
    a.shl(RAX, 32)
    a.shr(RAX, 32)
    a.label("msr_halves")
    a.st(saved(RAX), RAX)
    a.st(saved(RDX), RDX)
    a.jmp("skip")


def write_msr(a: Assembler) -> None:
    """WRMSR: the same the other way; the timer's vector becomes the monitor's."""
    a.ld(RCX, saved(RCX, 4))
    a.ld(RAX, saved(RAX, 4))
    a.ld(RDX, saved(RDX, 4))
    for index in PASSED:
        a.cmp(RCX, index)
        a.jcc(ops.CC_Z, "write_passed")
    a.cmp(RCX, X2APIC_EOI)
    a.jcc(ops.CC_NZ, "write_not_eoi")
    a.st_value(vcpu("IN_SERVICE"), 0)
    a.jmp("skip")
    a.label("write_not_eoi")
    a.shl(RDX, 32)
    a.or_(RAX, register=RDX)
    for index, field in KEPT.items():
        a.cmp(RCX, index)
        a.jcc(ops.CC_NZ, f"write_not_{field}")
        a.st(vcpu(field), RAX)
        a.jmp("skip")
        a.label(f"write_not_{field}")
    a.cmp(RCX, X2APIC_SPURIOUS)
    a.jcc(ops.CC_Z, "skip")
    a.cmp(RCX, X2APIC_LVT_TIMER)
    a.jcc(ops.CC_NZ, "write_not_timer")
    a.st(vcpu("TIMER_LVT"), RAX)
    a.and_(RAX, ~0xFF)
    a.or_(RAX, at.TIMER_VECTOR)
    a.mov(RDX, 0)
    a.label("write_passed")
    a.op(ops.WRMSR)
    a.jmp("skip")
    a.label("write_not_timer")
    a.cmp(RCX, EFER)
    a.jcc(ops.CC_NZ, "write_table")
    a.ld(RDX, vcpu("EFER"))
    a.emit(ops.XOR, RDX, RAX)
    a.test(RDX, EFER_LONG)
    a.jcc(ops.CC_NZ, "illegal_efer")
    a.st(vcpu("EFER"), RAX)
    a.jmp("paging_mode")
    a.label("illegal_efer")
    a.mov(RAX, ops.WRMSR)
    a.jmp("illegal")
    a.label("write_table")
    a.copy(RBX, RAX)
    a.call("find_msr")
    a.st(Mem(RAX, 8), RBX)
    a.jmp("skip")


def load_table(a: Assembler, field: str) -> None:
    """LGDT or LIDT."""
    a.call("operand")
    a.ld(RCX, Mem(RAX))
    a.and_(RCX, 0xFFFF)
    a.ld(RDX, Mem(RAX, 8))
    a.st(vcpu(field), RCX)
    a.st(vcpu(field, 1), RDX)
    a.jmp("skip")


def store_table(a: Assembler, field: str) -> None:
    """SGDT or SIDT, where they trap."""
    a.call("operand")
    a.ld(RCX, vcpu(field))
    a.ld(RDX, vcpu(field, 1))
    a.st(Mem(RAX), RCX)
    a.st(Mem(RAX, 8), RDX)
    a.copy(RAX, RDX)
    a.hook(hooks.SHOW)
    a.jmp("skip")


def store_word(a: Assembler, field: str) -> None:
    """SLDT, STR or SMSW, where they trap."""
    a.ld(RAX, vcpu(field))
    a.hook(hooks.SHOW)
    a.jmp("put_register")


def push_flags(a: Assembler) -> None:
    """PUSHF, where it traps: the interrupt flag that the guest believes in."""
    a.ld(RDX, F_RFLAGS)
    believed_flags(a, RDX, RCX)
    a.ld(RAX, saved(RSP))
    a.sub(RAX, 8)
    a.st(Mem(RAX), RDX)
    a.st(saved(RSP), RAX)
    a.jmp("skip")


def pop_flags(a: Assembler) -> None:
    """POPF, where it traps: a process keeps its interrupt flag."""
    a.ld(RSI, saved(RSP))
    a.ld(RDX, Mem(RSI))
    a.add(RSI, 8)
    a.st(saved(RSP), RSI)
    a.and_(RDX, POPPED)
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "pop_in_process")
    enter_flags(a, RDX, RAX)
    a.label("pop_in_process")
    a.and_(RDX, ~at.IOPL)
    a.or_(RDX, at.RF_IF | 2)
    a.st(F_RFLAGS, RDX)
    a.jmp("skip")


def subroutines(a: Assembler) -> None:
    """`operand`: RAX <- address of the operand. `find_msr`: RAX <- the table's line of MSR RCX, else #GP."""
    a.label("operand")
    a.ld(RDI, F_RIP)
    a.lea(RSI, Mem(R15, V["REGISTERS"]))
    a.hook(hooks.OPERAND)
    a.ret()
    a.label("find_msr")
    a.copy(RSI, RCX)
    a.ld(RDI, vcpu("MSR_TABLE"))
    a.ld(RDX, vcpu("MSR_ENTRIES"))
    a.mov(RCX, 2)
    a.hook(hooks.FIND)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "no_msr")
    a.ret()
    a.label("no_msr")
    a.add(RSP, 8)
    a.jmp("reflect")


def for_field(emulator: Callable[[Assembler, str], None], field: str) -> Emulator:
    """An emulator of something that stands in a field of the structure."""
    return lambda a: emulator(a, field)


# fmt: off
KERNEL: Final[Mapping[int, Emulator]] = {   # of the guest's kernel
    ops.CLI: cli, ops.STI: sti, ops.HLT: halt, ops.SWAPGS: swap_gs, ops.CLTS: clear_ts,
    ops.MOV_FROM_CR: move_from_cr, ops.MOV_TO_CR: move_to_cr, ops.MOV_FROM_DR: move_from_dr, ops.MOV_TO_DR: move_to_dr,
    ops.INVLPG: invlpg, ops.INVPCID: invpcid, ops.WBINVD: nothing, ops.INVD: nothing, ops.XSETBV: nothing,
    ops.SYSRET: sysret, ops.IRET: iret, ops.INT: software_interrupt,
    ops.IN: port_in, ops.OUT: nothing, ops.RDMSR: read_msr, ops.WRMSR: write_msr,
    ops.LGDT: for_field(load_table, "GDTR"), ops.LIDT: for_field(load_table, "IDTR"),
}
SENSITIVE: Final[Mapping[int, Emulator]] = {   # of kernel and processes, on an ISA where they trap
    ops.SGDT: for_field(store_table, "GDTR"), ops.SIDT: for_field(store_table, "IDTR"),
    ops.SLDT: for_field(store_word, "LDTR"), ops.STR: for_field(store_word, "TR"),
    ops.SMSW: for_field(store_word, "CR0"), ops.PUSHF: push_flags, ops.POPF: pop_flags,
}
# fmt: on


def emulators(a: Assembler, translates: bool) -> list[str]:
    """Emit every emulator once; the labels by op, for processes and then for the kernel."""
    names = {}
    for op, emulator in (*KERNEL.items(), *SENSITIVE.items()):
        a.activity = ops.EXIT_HANDLER
        names[op] = a.label(f"emulate_{ops.OPS[op].name}")
        emulator(a)
    a.activity = ops.EXIT_HANDLER
    a.label("emulate_user_IRET")
    user_iret(a)
    subroutines(a)
    process = {op: names[op] for op in (*SENSITIVE, ops.INT)} | {ops.IRET: "emulate_user_IRET"}
    kernel = dict.fromkeys((*PRIVILEGED, *IO_PRIVILEGED), "illegal") | names
    if translates:
        kernel[ops.ST] = "table_store"
    return [table.get(op, "reflect") for table in (process, kernel) for op in range(256)]
