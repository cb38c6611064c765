"""The monitor's part of binary translation: from original addresses to translated ones and back, call-outs, chaining.

Everything else in the monitor knows original addresses only. A translation leaves for the monitor by SYSCALL: to have
an instruction emulated, or to go to what is not translated yet; such an exit becomes a jump then. The way back is by
SYSRET, to code in ring 3 that restores RCX and R11 and jumps on: IRET takes several times as long.

Not modelled: a guard of what translations reach in ring 3 against the guest's kernel; priced decoding (a binary
translator's work is its loads and stores).
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import translator as h
from vtsim.cpu.slots import R8, R11, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.cpu.translation import HASH_SETS, HASH_WAYS, NOT_YET, TRANSLATOR
from vtsim.vmm.monitor.crossing import return_by_sysret, save_but_stack_pointer
from vtsim.vmm.monitor.layout import F_ERROR, F_RFLAGS, F_RIP, V, saved, vcpu

EXIT_BEFORE_SYSCALL = 8  # bytes: two stores
BACK, BACK_BYTES = 64, 64  # behind the exit of look-ups: where the way back begins, and how far it may reach


def to_translation(a: Assembler) -> None:
    """Before the guest goes on: where it goes on in the cache, if its kernel does."""
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "resume_there")
    a.call("translation")
    a.label("resume_translation")
    for register, field in ((RCX, "BACK_RCX"), (R11, "BACK_R11")):
        a.ld(RAX, saved(register))
        a.st(vcpu(field), RAX)
    a.ld(RAX, F_RIP)
    a.st(vcpu("BACK_TO"), RAX)
    a.ld(RAX, F_RFLAGS)
    a.st(saved(R11), RAX)
    way_back(a, RAX)
    a.st(saved(RCX), RAX)
    return_by_sysret(a)


def way_back(a: Assembler, register: int) -> None:
    """A register <- where the way back into translations begins, in ring 3."""
    a.ld(register, vcpu("TRANSLATOR"))
    a.ld(register, Mem(register, TRANSLATOR["MISS"]))
    a.add(register, BACK)


def subroutines(a: Assembler) -> None:
    """`translation`: F_RIP becomes its translation, looked up or made. `original`: the other way, if the kernel ran.

    Both clobber RAX, RBX, RCX, RDX, RDI and RSI; `translation` needs the kernel's address space.
    """
    a.label("translation")
    a.ld(RDI, vcpu("TRANSLATOR"))
    a.ld(RSI, F_RIP)
    a.copy(RAX, RSI)
    a.shr(RAX, 8)
    a.emit(ops.XOR, RAX, RSI)
    a.and_(RAX, HASH_SETS - 1)
    a.shl(RAX, (16 * HASH_WAYS).bit_length() - 1)
    a.ld(RCX, Mem(RDI, TRANSLATOR["HASH"]))
    a.add(RCX, register=RAX)
    for way in range(HASH_WAYS):
        a.ld(RAX, Mem(RCX, 16 * way))
        a.cmp(RAX, register=RSI)
        a.jcc(ops.CC_NZ, f"not_in_way_{way}")
        a.ld(RAX, Mem(RCX, 16 * way + 8))
        a.st(F_RIP, RAX)
        a.ret()
        a.label(f"not_in_way_{way}")
    a.hook(h.TRANSLATE)
    a.st(F_RIP, RAX)
    a.ret()

    a.label("original")
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "original_found")
    a.ld(RSI, F_RIP)
    way_back(a, RAX)
    a.copy(RCX, RSI)
    a.sub(RCX, register=RAX)
    a.cmp(RCX, BACK_BYTES)
    a.jcc(ops.CC_AE, "not_on_the_way_back")
    for register, field in ((RCX, "BACK_RCX"), (R11, "BACK_R11")):  # it is as good as there
        a.ld(RAX, vcpu(field))
        a.st(saved(register), RAX)
    a.ld(RSI, vcpu("BACK_TO"))
    a.label("not_on_the_way_back")
    a.call("origin")
    a.st(F_RIP, RAX)
    a.label("original_found")
    a.ret()
    a.label("origin")  # RAX <- original address behind RSI; RDX not 0 if it is where an exit goes to
    a.ld(RDI, vcpu("TRANSLATOR"))
    a.ld(RAX, Mem(RDI, TRANSLATOR["CACHE"]))
    a.sub(RSI, register=RAX)
    a.ld(RAX, Mem(RDI, TRANSLATOR["MAP"]))
    a.ld(RAX, Mem(RAX, index=RSI, scale=8))
    a.mov(RDX, 0)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "origin_known")
    a.ld(RAX, Mem(RDI, TRANSLATOR["TARGET"]))
    a.ret()
    a.label("origin_known")
    a.copy(RDX, RAX)
    a.shr(RDX, 62)
    a.emit(ops.XOR, RDX, imm=-1)
    a.and_(RDX, 1)
    a.mov(RBX, NOT_YET)
    a.or_(RAX, register=RBX)
    a.ret()


def call_out(a: Assembler, lean: tuple[int, ...]) -> None:
    """`call_out`: a translation left by SYSCALL; registers `lean` are in SCRATCH."""
    a.activity = ops.EXIT_DISPATCH
    a.label("call_out")
    a.st(vcpu("LEFT_AT"), RCX)
    a.st(F_RFLAGS, R11)
    a.ldm(Mem(RSP, 64 + V["SCRATCH"]), lean)
    save_but_stack_pointer(a, 64)
    for register, field in ((RCX, "LEAVING_RCX"), (R11, "LEAVING_R11")):
        a.ld(RAX, vcpu(field))
        a.st(saved(register), RAX)
    a.ld(RSI, vcpu("LEFT_AT"))
    a.sub(RSI, 2)
    a.call("origin")
    a.st(F_RIP, RAX)
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_NZ, "leave_block")
    a.ld(RCX, vcpu("LEFT_AT"))
    a.sub(RCX, 2)
    a.ld(RDI, vcpu("TRANSLATOR"))
    a.ld(RDX, Mem(RDI, TRANSLATOR["MISS"]))
    a.add(RDX, EXIT_BEFORE_SYSCALL)
    a.cmp(RCX, register=RDX)
    a.jcc(ops.CC_Z, "resume")
    a.st_value(F_ERROR, 0)  # of the #GP that the instruction would have caused
    a.jmp("emulate")
    a.label("leave_block")
    a.ld(R8, Mem(RDI, TRANSLATOR["FLUSHES"]))
    a.call("translation")
    a.ld(RDI, vcpu("TRANSLATOR"))
    a.ld(RAX, Mem(RDI, TRANSLATOR["FLUSHES"]))
    a.cmp(RAX, register=R8)
    a.jcc(ops.CC_NZ, "resume_translation")
    a.ld(RSI, vcpu("LEFT_AT"))
    a.sub(RSI, 2 + EXIT_BEFORE_SYSCALL)
    a.ld(RBX, F_RIP)
    a.hook(h.CHAIN)
    a.jmp("resume_translation")
