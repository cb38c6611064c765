"""A program that touches every op, and random programs that a machine must survive."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from tests.cpu.bench import (
    DATA,
    KERNEL_STACK,
    TABLES,
    TEXT,
    USER_STACK,
    USER_TEXT,
    Space,
    Virtual,
    o_mem,
    virtual,
)
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels import hooks
from vtsim.vmcs import bits as b

HANDLER = TEXT + 0x8000
GENERAL = (s.RAX, s.RCX, s.RDX, s.RBX, s.RBP, s.RSI, s.RDI, s.R8, s.R9, s.R10, s.R11)


def fault_handler(a: Assembler) -> None:
    """Step over whatever faulted, which is two bytes long, and count in R15; error codes are dropped by the gate's stub."""
    a.add(s.R15, 1)
    a.push(s.RAX)
    a.ld(s.RAX, Mem(base=s.RSP, displacement=8))
    a.add(s.RAX, register=s.R14)
    a.st(Mem(base=s.RSP, displacement=8), s.RAX)
    a.pop(s.RAX)
    a.op(o.IRET)


def with_error(a: Assembler) -> None:
    a.add(s.RSP, 8)
    a.jmp(HANDLER)


def interrupt_handler(a: Assembler) -> None:
    a.add(s.R13, 1)
    for register in (s.RAX, s.RCX, s.RDX):
        a.push(register)
    a.mov(s.RCX, 0x80B)
    a.op(o.WRMSR)
    for register in (s.RDX, s.RCX, s.RAX):
        a.pop(register)
    a.op(o.IRET)


def handlers(space: Space) -> None:
    """Gates for all exceptions, two software interrupts and one timer vector."""
    space.code(fault_handler, HANDLER)
    space.code(with_error, HANDLER + 0x1000)
    space.code(interrupt_handler, HANDLER + 0x2000)
    space.code(lambda a: a.op(o.IRET), HANDLER + 0x1800)
    for vector in range(32):
        has_error = vector in (8, 10, 11, 12, 13, 14)
        space.gate(vector, HANDLER + (0x1000 if has_error else 0))
    space.gate(3, HANDLER + 0x1800, dpl=3)
    space.gate(0x40, HANDLER + 0x2000)
    space.gate(0x80, HANDLER + 0x1800, dpl=3)


def arm_timer(a: Assembler, cycles: int) -> None:
    for index, low in ((0x83E, 0xB), (0x832, 0x40 | 1 << 17), (0x838, cycles)):
        a.mov(s.RCX, index)
        a.mov(s.RAX, low)
        a.mov(s.RDX, 0)
        a.op(o.WRMSR)


def step_over(a: Assembler) -> None:
    """A host's handler: past the instruction, again into the guest."""
    a.stm(Mem(displacement=DATA + 0x1000), (s.RAX, s.RCX))
    a.vmread(s.RAX, "EXIT_REASON")
    a.and_(s.RAX, 0xFFFF)
    a.cmp(s.RAX, 2)  # triple fault
    a.jcc(o.CC_Z, "end")
    a.cmp(s.RAX, 1)
    a.jcc(o.CC_Z, "interrupt")
    a.vmread(s.RAX, "GUEST_RIP")
    a.vmread(s.RCX, "EXIT_INSTRUCTION_LENGTH")
    a.add(s.RAX, register=s.RCX)
    a.vmwrite("GUEST_RIP", s.RAX)
    a.label("again")
    a.ldm(Mem(displacement=DATA + 0x1000), (s.RAX, s.RCX))
    a.op(o.VMRESUME)
    a.label("end")
    a.op(o.STOP_OP, imm=7)
    a.label("interrupt")
    a.push(s.RDX)
    a.op(o.STI)
    a.op(o.NOP)
    a.op(o.CLI)
    a.pop(s.RDX)
    a.jmp("again")


def every_op(a: Assembler) -> None:
    """Each op of the table at least once, in ring 0 of a guest or of the machine, then ring 3 and back."""
    arm_timer(a, 3000)
    a.op(o.STI)
    a.work(40)
    a.mov(s.RAX, 0x1234_5678_9ABC_DEF0)
    a.copy(s.RBX, s.RAX)
    for op in (o.ADD, o.SUB, o.AND, o.OR, o.XOR, o.CMP, o.TEST):
        a.alu(op, s.RBX, 0x77)
    a.shl(s.RBX, 3)
    a.shr(s.RBX, 5)
    a.lea(s.RSI, Mem(base=s.RBX, displacement=8, index=s.RAX, scale=4))
    a.jmp("on")
    a.label("on")
    a.mov(s.RCX, 3)
    a.label("loop")
    a.op(o.NOP)
    a.loop("loop")
    for size in (1, 2, 4, 8):
        a.st(o_mem(DATA + 0x11, size), s.RAX)
        a.ld(s.RDX, o_mem(DATA + 0x11, size))
        a.xadd(o_mem(DATA + 0x21, size), s.RDX)
    a.st(o_mem(DATA + 0xFFD), s.RAX)
    a.ld(s.RDX, o_mem(DATA + 0xFFD))
    a.stm(o_mem(DATA + 0x2FC0), range(16))
    a.ldm(o_mem(DATA + 0x2FC0), (s.RDX, s.RBX, s.R8, s.R9, s.R10))
    a.push(s.RAX)
    a.push(value=55)
    a.pop(s.RDX)
    a.pop(s.RDX)
    a.call("function")
    a.mov(s.RDX, "function")
    a.op(o.CALL_REG, s.RDX)
    a.mov(s.RDX, "register")
    a.op(o.JMP_REG, s.RDX)
    a.label("function")
    a.ret()
    a.label("register")
    a.mov(s.RDX, "memory")
    a.st(o_mem(DATA + 0x100), s.RDX)
    a.jmp_mem(o_mem(DATA + 0x100))
    a.label("memory")
    for pattern in (o.SEQUENTIAL, o.STRIDED, o.UNIFORM, o.CHASE):
        a.mov(s.RCX, 150)
        a.mov(s.RSI, DATA)
        a.mov(s.RDX, 0x4000)
        a.mov(s.RDI, 0)
        a.mov(s.R8, 24 if pattern == o.SEQUENTIAL else 192)
        a.mov(s.RBX, 99991)
        a.op(o.STREAM, imm=pattern | 300 << o.STREAM_WRITES | 3 << o.STREAM_WORK)
    a.mov(s.RCX, 5000)
    a.op(o.LONG_WORK)
    for leaf in (0, 1, 7):
        a.mov(s.RAX, leaf)
        a.op(o.CPUID)
    for op in (o.RDTSC, o.RDTSCP, o.RDPMC):
        a.op(op)
    for index in (0x10, 0x1B, 0xC0000082, 0x802, 0x480, 0x12345):
        a.mov(s.RCX, index)
        a.op(o.RDMSR)
    a.mov(s.RCX, 0xC0000081)
    a.mov(s.RAX, 0)
    a.mov(s.RDX, 0x0023_0010)
    a.op(o.WRMSR)
    a.mov(s.RCX, 0xC0000082)
    a.mov(s.RAX, (TEXT + 0xA800) & 0xFFFFFFFF)
    a.mov(s.RDX, 0xFFFFFFFF)
    a.op(o.WRMSR)
    for number in (0, 2, 3, 4, 8):
        a.op(o.MOV_FROM_CR, s.RDX, imm=number)
        a.op(o.MOV_TO_CR, s.RDX, imm=number)
    for number in (6, 7):
        a.op(o.MOV_FROM_DR, s.RDX, imm=number)
        a.op(o.MOV_TO_DR, s.RDX, imm=number)
    a.op(o.CLTS)
    a.op(o.SMSW, s.RDX)
    a.op(o.LMSW, s.RDX)
    for store, load in ((o.SGDT, o.LGDT), (o.SIDT, o.LIDT)):
        a.op(store, mem=o_mem(DATA + 0x200))
        a.op(load, mem=o_mem(DATA + 0x200))
    a.op(o.SLDT, s.RDX)
    a.op(o.LLDT, s.RDX)
    a.op(o.STR, s.RDX)
    a.mov(s.RBX, TABLES + 0x1000)
    a.op(o.LTR, s.RDX, s.RBX)
    a.op(o.PUSHF)
    a.op(o.POPF)
    a.op(o.CLI)
    a.op(o.STI)
    a.op(o.PAUSE)
    a.op(o.MONITOR)
    a.op(o.HLT)
    a.op(o.MWAIT)
    a.op(o.INVLPG, mem=o_mem(DATA + 0x1000))
    a.mov(s.RDX, 2)
    a.op(o.INVPCID, s.RDX, mem=o_mem(DATA + 0x300))
    a.op(o.WBINVD)
    a.op(o.INVD)
    a.mov(s.RCX, 0)
    a.mov(s.RAX, 7)
    a.mov(s.RDX, 0)
    a.op(o.XSETBV)
    a.emit(o.OUT, imm=0x70, mem=Mem(size=1))
    a.emit(o.IN, imm=0x71, mem=Mem(size=1))
    a.mov(s.RDX, 0x608)
    a.mov(s.RDI, DATA + 0x400)
    a.mov(s.RSI, DATA + 0x400)
    a.emit(o.INS, mem=Mem(size=4))
    a.mov(s.RCX, 3)
    a.emit(o.OUTS, mem=Mem(size=2), extra=1)
    a.op(o.RDRAND, s.RDX)
    a.op(o.RDSEED, s.RDX)
    a.op(o.XSAVES)
    a.op(o.XRSTORS)
    a.op(o.SWAPGS)
    a.op(o.SWAPGS)
    a.op(o.INT, imm=0x80)
    for op in (o.VMCALL, o.VMFUNC, o.GETSEC, o.UD):
        a.emit(op, length=2)
    for op in (o.VMXON, o.VMCLEAR, o.VMPTRLD, o.VMPTRST):
        a.emit(op, mem=o_mem(DATA + 0x500), length=2)
    for op in (o.INVEPT, o.INVVPID):
        a.emit(op, s.RDX, mem=o_mem(DATA + 0x500), length=2)
    for op in (o.VMLAUNCH, o.VMRESUME, o.VMXOFF):
        a.emit(op, length=2)
    a.emit(o.VMREAD, s.RDX, s.RBX, length=2)
    a.emit(o.VMWRITE, s.RDX, s.RBX, length=2)
    a.mov(s.RDI, DATA)
    a.mov(s.RSI, 77)
    a.hook(hooks.SET_BIT)
    a.emit(o.REPLAY_EVENT, imm=0)
    a.mov(s.RCX, USER_TEXT)
    a.mov(s.R11, 0x202)
    a.mov(s.RSP, USER_STACK - 64)
    a.op(o.SYSRET)


def user_part(a: Assembler) -> None:
    a.op(o.CPUID)
    a.emit(o.CLI, length=2)
    a.emit(o.HLT, length=2)
    a.mov(s.RAX, 39)
    a.op(o.SYSCALL)
    a.ld(s.RAX, o_mem(DATA))
    a.op(o.INT, imm=3)
    a.op(o.SYSENTER)


def kernel_entry(a: Assembler) -> None:
    a.mov(s.RBP, KERNEL_STACK - 512)
    a.op(o.SYSRET)


def last_entry(a: Assembler) -> None:
    """Where SYSENTER leads: the second time is the end."""
    a.add(s.R12, 1)
    a.cmp(s.R12, 2)
    a.jcc(o.CC_Z, "end")
    a.mov(s.RCX, USER_STACK - 64)
    a.mov(s.RDX, USER_TEXT + 0x800)
    a.op(o.SYSEXIT)
    a.label("end")
    a.op(o.STOP_OP, imm=5)


def user_again(a: Assembler) -> None:
    a.op(o.SYSENTER)


def loaded_with_every_op(changes: dict[str, int] | None = None) -> Virtual:
    """A guest about to run every op, with a host that steps over its exits."""
    bench = virtual(changes)
    guest = bench.guest
    handlers(guest)
    guest.code(kernel_entry, TEXT + 0xA800)
    guest.code(last_entry, TEXT + 0xB800)
    guest.code(user_part, USER_TEXT)
    guest.code(user_again, USER_TEXT + 0x800)
    guest.code(every_op, TEXT)
    handlers(bench.space)
    bench.host(step_over)
    bench.set(
        PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") & ~b.HLT_EXITING,
        PIN_CONTROLS=0, GUEST_IA32_SYSENTER_EIP=TEXT + 0xB800, GUEST_IA32_SYSENTER_ESP=KERNEL_STACK - 64,
    )  # fmt: skip
    bench.enter(TEXT)
    bench.m[s.GPR + s.R14], bench.m[s.GPR + s.R12] = 2, 0
    bench.engine.port(0x70, 1)
    bench.engine.port(0x608, 2)
    return bench


# --- random programs --------------------------------------------------------------------------------------------------

UNSAFE = (
    o.HOOK,
    o.REPLAY_EVENT,
    o.STREAM,
    o.LONG_WORK,
    o.WORK,
    o.LDM,
    o.STM,
    o.VMXON,
    o.VMPTRLD,
    o.VMLAUNCH,
    o.VMRESUME,
)
PLACES = (DATA, DATA + 0xFFC, DATA + 0x1000, DATA + 0x5003, 0x123456789, -1, TABLES, TEXT, 1 << 47, DATA - 8)


def random_program(chance: random.Random, length: int) -> Callable[[Assembler], None]:
    """Ops of all kinds with operands of all kinds, labels to jump to, small loops."""

    def memory() -> Mem:
        return Mem(
            base=chance.choice((16, 16, *GENERAL)), displacement=chance.choice(PLACES), index=16,
            size=chance.choice((1, 2, 4, 8)),
        )  # fmt: skip

    def write(a: Assembler) -> None:
        a.mov(s.RSI, DATA)
        a.mov(s.RDI, DATA + 0x2000)
        for n in range(length):
            a.label(f"l{n}")
            pick = chance.random()
            r1, r2 = chance.choice(GENERAL), chance.choice((16, *GENERAL))
            value = chance.choice((0, 1, -1, 2**63 - 1, -(2**63), chance.getrandbits(32), DATA))
            if pick < 0.3:
                a.emit(
                    chance.choice((o.MOV, o.ADD, o.SUB, o.AND, o.OR, o.XOR, o.SHL, o.SHR, o.CMP, o.TEST)),
                    r1,
                    r2,
                    imm=value,
                )
            elif pick < 0.5:
                a.emit(chance.choice((o.LD, o.ST, o.XADD, o.LEA)), r1, mem=memory(), length=2)
            elif pick < 0.58:
                a.jcc(chance.randrange(12), f"l{chance.randrange(length)}")
            elif pick < 0.62:
                a.mov(s.RCX, chance.randint(1, 40))
                a.mov(s.R8, chance.choice((0, 8, 64, 4096)))
                a.mov(s.RDX, chance.choice((0x1000, 0x6000)))
                a.emit(
                    o.STREAM,
                    imm=chance.choice((o.SEQUENTIAL, o.UNIFORM, o.CHASE)) | chance.randrange(1024) << 4,
                    length=2,
                )
            elif pick < 0.65:
                a.mov(s.RCX, chance.choice((1, 100, 3000)))
                a.op(o.LONG_WORK)
            elif pick < 0.68:
                a.emit(
                    chance.choice((o.LDM, o.STM)),
                    imm=chance.getrandbits(16) & ~0xF010,
                    mem=memory(),
                    length=2,
                )
            elif pick < 0.72:
                a.mov(s.RCX, chance.choice((0x10, 0x808, 0x832, 0x838, 0x83E, 0x83F, 0xC0000084, 0x1A0, 0x7777)))
                a.mov(s.RAX, chance.choice((0x40, 0x20040, 0x10040, 900, 0)))
                a.mov(s.RDX, 0)
                a.emit(chance.choice((o.RDMSR, o.WRMSR)), length=2)
            elif pick < 0.75:
                a.work(chance.randint(1, 60))
            elif pick < 0.85:
                a.emit(
                    chance.choice((o.STI, o.CLI, o.PUSH, o.POP, o.PUSHF, o.PAUSE, o.INVLPG)),
                    r1,
                    imm=value,
                    mem=memory(),
                    length=2,
                )
            else:
                op = chance.choice([x.number for x in o.OPS if x.number not in UNSAFE])
                target = f"l{chance.randrange(length)}" if op in (o.JMP, o.JCC, o.LOOP, o.CALL) else None
                number = chance.choice((0, 2, 3, 4, 6, 7, 8)) if op != o.MOV_TO_CR else chance.choice((2, 8))
                if op in (
                    o.LIDT,
                    o.LTR,
                    o.VMXOFF,
                    o.SYSRET,
                    o.SYSEXIT,
                    o.VMCLEAR,
                    o.IN,
                    o.OUT,
                    o.INS,
                    o.OUTS,
                ):
                    op = o.CPUID
                a.emit(
                    op,
                    r1,
                    r2 if op not in (o.VMREAD, o.VMWRITE) else s.RBX,
                    imm=number,
                    mem=memory(),
                    target=target,
                    length=2,
                )
        a.op(o.STOP_OP, imm=3)

    return write


def loaded_at_random(chance: random.Random, length: int, changes: dict[str, int] | None = None) -> Virtual:
    """A guest about to run a random program in ring 0 or 3, interrupted by a timer of the host or its own."""
    bench = virtual(changes)
    handlers(bench.guest)
    handlers(bench.space)
    ring = 3 if chance.random() < 0.3 else 0
    base = USER_TEXT if ring else TEXT
    bench.guest.code(random_program(chance, length), base)
    bench.host(step_over)
    bench.set(
        PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") ^ chance.choice((0, b.HLT_EXITING, b.INVLPG_EXITING)),
        PIN_CONTROLS=chance.choice((0, b.EXTERNAL_INTERRUPT_EXITING, b.ACTIVATE_PREEMPTION_TIMER)),
        EXIT_CONTROLS=bench.field("EXIT_CONTROLS") | chance.choice((0, b.EXIT_ACKNOWLEDGE_INTERRUPT)),
        EXCEPTION_BITMAP=chance.choice((0, 0, 1 << 6, 1 << 14)),
        PREEMPTION_TIMER_VALUE=900,
    )  # fmt: skip
    bench.enter(base, ring)
    bench.m[s.GPR + s.R14] = 2
    return bench


HOW = (s.OPS, s.OPS_LEFT, s.UNTIL, s.LIMIT, s.BEGUN_AT)  # slots that say how a machine was run


class Machine(Protocol):
    """What has an engine."""

    engine: Engine


def bytes_of(bench: Machine, leave_out: Sequence[int] = HOW) -> tuple[bytes, bytes, bytes]:
    """All state of a machine, but for what says how it was run."""
    cpus = bench.engine.cpus.copy()
    cpus[:, list(leave_out)] = 0
    return cpus.tobytes(), bench.engine.arena.tobytes(), bench.engine.tags.tobytes()
