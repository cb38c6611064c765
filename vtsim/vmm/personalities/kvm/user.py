"""The device process in user space, and the kernel's way to it and back: R0 to R3 to R0.

SDM: "Fast System Calls in 64-Bit Mode".
Not modelled: other threads of the process; contention for its lock.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R11, R12, R13, R14, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.vmm import layout as at
from vtsim.vmm.personalities.kvm import chipset
from vtsim.vmm.programs import mitigations
from vtsim.vmm.programs.msr_switch import leave_guest_msrs, restore_user_msrs
from vtsim.vmm.programs.ports import CONFIG, DEVICE_WORDS, read_device
from vtsim.vmm.programs.words import ALL, FRAME, cpu, vcpu, work, zero
from vtsim.vmm.registry import Path

IOCTL: Final = 16
LOCK, PORT_COUNT, PORTS = 0, 8, 16  # offsets in the process's data page


def kernel_side(a: Assembler, path: Path) -> None:
    """`to_user`: return from the KVM_RUN ioctl; `system_call`: the next one."""
    a.label("to_user")
    a.activity = ops.DEVICE_EMULATION
    a.op(ops.CLI)
    leave_guest_msrs(a, path, "to_user")
    exchange_fpu(a, path)
    work(a, path, "ioctl_return")
    restore_user_msrs(a, path)
    mitigations.leave_kernel(a, path)
    mitigations.keep_user_stack(a, path)
    sysret(a, path, mitigations.user_stack(path))

    a.label("system_call")
    a.op(ops.SWAPGS)
    a.st(cpu("USER_STACK"), RSP)
    mitigations.to_kernel_tables(a, path, RSP)
    a.ld(RSP, cpu("CURRENT"))
    a.sub(RSP, FRAME)
    a.stm(Mem(RSP), ALL)
    a.lea(R15, Mem(RSP, FRAME))
    a.st(vcpu("USER_RIP"), RCX)
    a.st(vcpu("USER_RFLAGS"), R11)
    a.ld(RAX, cpu("USER_STACK"))
    a.st(vcpu("USER_RSP"), RAX)
    mitigations.entered_kernel(a, path)
    a.op(ops.STI)
    a.ld(RAX, Mem(RSP))
    a.cmp(RAX, chipset.MEMORY_IOCTL)
    a.jcc(ops.CC_Z, "set_memory")
    work(a, path, "ioctl_enter")
    exchange_fpu(a, path)
    a.copy(RSP, R15)
    a.ld(RDI, vcpu("RUN_PAGE"))
    a.ld(RBX, Mem(RDI, at.RUN["SIZE"]))
    a.ld(RDX, vcpu("COMPLETION"))
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_Z, "skip")
    work(a, path, "complete")
    a.ld(RAX, Mem(RDI, at.RUN["VALUE"]))
    a.cmp(RDX, at.COMPLETE_PORT)
    a.jcc(ops.CC_Z, "port_completed")
    a.cmp(RDX, at.COMPLETE_LOAD)
    a.jcc(ops.CC_Z, "load_completed")
    a.cmp(RDX, at.COMPLETE_STRING)
    a.jcc(ops.CC_Z, "reenter", comment="the next exit finds RCX zero")
    a.jmp("skip_decoded")
    chipset.kernel_side(a, path)
    a.op(ops.CLI)
    mitigations.leave_kernel(a, path)
    sysret(a, path, cpu("USER_STACK"))


def sysret(a: Assembler, path: Path, stack: Mem) -> None:
    """To the process, whose stack pointer is at `stack`."""
    a.ld(RCX, vcpu("USER_RIP"))
    a.ld(R11, vcpu("USER_RFLAGS"))
    zero(a, RAX)
    mitigations.to_user_tables(a, path)
    a.ld(RSP, stack)
    mitigations.clear_buffers(a, path)
    a.op(ops.SWAPGS)
    a.op(ops.SYSRET)


def exchange_fpu(a: Assembler, path: Path) -> None:
    """Save one extended state and load the other, as kvm_put_guest_fpu and kvm_load_guest_fpu do."""
    if path.profile.features.xsaves:
        a.op(ops.XSAVES)
        a.op(ops.XRSTORS)
    else:
        a.work(FXSAVE_WORK, comment="FXSAVE and FXRSTOR")


FXSAVE_WORK: Final = 200


def process(a: Assembler, path: Path) -> None:
    """The process: ask what the last VM exit wants, do it under the lock, run the vCPU again."""
    a.activity = ops.USER_DEVICE
    a.label("user")
    work(a, path, "user_dispatch")
    a.mov(R12, at.USER_RUN)
    a.mov(R13, at.USER_DATA)
    a.mov(RAX, 1)
    a.xadd(Mem(R13, LOCK), RAX)
    a.ld(R14, Mem(R12, at.RUN["COALESCED"]))
    a.test(R14, register=R14)
    a.jcc(ops.CC_NZ, "user_flush")
    a.label("user_flushed")
    a.ld(RSI, Mem(R12, at.RUN["ADDRESS"]))
    _find_register(a)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "user_nothing")
    work(a, path, "user_device")
    a.label("user_nothing")
    a.ld(RDX, Mem(R12, at.RUN["WRITE"]))
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_NZ, "user_write")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "user_absent")
    read_device(a, path, "user_read", _find_register)
    a.jmp("user_answer")
    a.label("user_absent")
    a.mov(RAX, -1)
    a.label("user_answer")
    a.st(Mem(R12, at.RUN["VALUE"]), RAX)
    a.jmp("user_done")
    a.label("user_write")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "user_done")
    a.ld(RCX, Mem(RAX, 8))
    a.cmp(RCX, CONFIG)
    a.jcc(ops.CC_Z, "user_config")
    a.ld(RCX, Mem(R12, at.RUN["VALUE"]))
    a.st(Mem(RAX, 16), RCX)
    a.label("user_done")
    a.mov(RAX, -1)
    a.xadd(Mem(R13, LOCK), RAX)
    work(a, path, "user_again")
    a.mov(RAX, IOCTL)
    a.op(ops.SYSCALL)
    a.label("user_resumed")
    a.jmp("user")

    a.label("user_flush")
    a.lea(RBX, Mem(R12, at.RUN["RING"]))
    a.label("user_flush_next")
    a.ld(RSI, Mem(RBX))
    _find_register(a)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "user_flush_absent")
    a.ld(RCX, Mem(RBX, 8))
    a.st(Mem(RAX, 16), RCX)
    a.label("user_flush_absent")
    a.add(RBX, 16)
    a.sub(R14, 1)
    a.jcc(ops.CC_NZ, "user_flush_next")
    a.st(Mem(R12, at.RUN["COALESCED"]), R14)
    a.jmp("user_flushed")
    chipset.process(a, path)
    a.label("user_find")
    _find_register(a)
    a.ret()


def _find_register(a: Assembler) -> None:
    """RAX <- entry of the process's device table for the port or address in RSI, or 0."""
    a.lea(RDI, Mem(R13, PORTS))
    a.ld(RDX, Mem(R13, PORT_COUNT))
    a.mov(RCX, DEVICE_WORDS)
    a.hook(hooks.FIND)
