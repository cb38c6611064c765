"""Operands that every hypervisor program uses."""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R15, RAX, RDX
from vtsim.vmm import layout as at
from vtsim.vmm.programs.kvm_functions import INDIRECT_BRANCHES, L1D_UNSAFE
from vtsim.vmm.registry import Path

ALL: Final = tuple(range(16))
FRAME: Final = 8 * len(ALL)  # bytes of saved general registers
GS: Final = 2
VALID: Final = 1 << 31
# fmt: off
HARDWARE_EXCEPTION: Final = 3 << 8
WITH_ERROR: Final         = 1 << 11
GENERAL_PROTECTION: Final = VALID | WITH_ERROR | HARDWARE_EXCEPTION | 13
INVALID_OPCODE: Final     = VALID | HARDWARE_EXCEPTION | 6
LOW: Final                = 0xFFFF_FFFF
# fmt: on


def vcpu(field: str, word: int = 0, size: int = 8) -> Mem:
    """A field of the vCPU whose thread runs."""
    return Mem(R15, at.V[field] + 8 * word, size=size)


def saved(register: int, size: int = 8) -> Mem:
    """A general register of the guest."""
    return Mem(R15, at.V["REGISTERS"] + 8 * register, size=size)


def cpu(field: str, word: int = 0) -> Mem:
    """A field of the page of this physical CPU."""
    return Mem(displacement=at.C[field] + 8 * word, segment=GS)


def zero(a: Assembler, register: int) -> None:
    """Clear a register as compilers do."""
    a.emit(ops.XOR, register, register)


def split(a: Assembler) -> None:
    """RDX:RAX <- RAX, as the MSR instructions want it."""
    a.copy(RDX, RAX)
    a.shr(RDX, 32)


def join(a: Assembler) -> None:
    """RAX <- RDX:RAX."""
    a.shl(RDX, 32)
    a.or_(RAX, register=RDX)


def set_bit(a: Assembler, operand: Mem, bit: int) -> None:
    """RAX <- operand | bit, stored back."""
    a.ld(RAX, operand)
    a.or_(RAX, bit)
    a.st(operand, RAX)


def count(a: Assembler, field: str) -> None:
    """One more in a word of the vCPU. Changes RAX."""
    a.ld(RAX, vcpu(field))
    a.add(RAX, 1)
    a.st(vcpu(field), RAX)


def work(a: Assembler, path: Path, name: str) -> None:
    """The compiled code of a function: so many instructions as the personality's parameter says.

    Mitigations of the host add what they do in it: flags L1D for the next VM entry, sends branches through thunks.
    """
    if name in L1D_UNSAFE and path.vmm.mitigations.vmentry_l1d_flush == "cond":
        a.st_value(cpu("L1D_UNSAFE"), 1)
    a.work(path.parameters.get(name, 0), comment=name)
    retpolines(a, path, INDIRECT_BRANCHES.get(name, 0))


def retpolines(a: Assembler, path: Path, branches: int) -> None:
    """So many indirect branches, if they go through thunks. Registers and flags stay."""
    if branches and path.vmm.mitigations.spectre_v2 == "retpoline":
        a.emit(ops.RETPOLINE, imm=branches)


def kill(a: Assembler, code: int) -> None:
    """End the VM for a reason that is ours."""
    a.mov(RAX, code)
    zero(a, RDX)
    a.jmp("die")
