"""The EPT leaf of a guest-physical address, as programs find it."""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R8, R10, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import spec as e
from vtsim.vmm import layout as at
from vtsim.vmm.programs.words import vcpu

LARGE: Final = 2 << 20


def leaf_of(a: Assembler, address: int) -> None:
    """RAX <- EPT leaf for a register's address or 0, RDX its level, RCX its address. Changes RSI RDI R8 R10."""
    a.copy(RSI, address)
    a.ld(RDI, vcpu("EPT_ROOT"))
    a.mov(R8, at.HOST_DIRECT)
    a.mov(R10, e.EPT_RWX)
    a.hook(hooks.TABLE_LOOKUP)


def host_leaf_of(a: Assembler, address: int) -> None:
    """The same of the host's page tables for the process of the VM."""
    a.mov(RSI, at.USER_RAM)
    a.add(RSI, register=address)
    a.ld(RDI, vcpu("HOST_ROOT"))
    a.mov(R8, at.HOST_DIRECT)
    a.mov(R10, e.PTE_PRESENT)
    a.hook(hooks.TABLE_LOOKUP)


def own_page(a: Assembler, address: int, otherwise: str) -> None:
    """RBX <- entry at RBP of the 4 KiB page at an address that the VM has for itself; else go on elsewhere."""
    host_leaf_of(a, address)
    a.test(RAX, e.PTE_WRITE, comment="nothing there, or somebody else has it too")
    a.jcc(ops.CC_Z, otherwise)
    a.cmp(RDX, 1)
    a.jcc(ops.CC_NZ, otherwise)
    a.copy(RBX, RAX)
    a.copy(RBP, RCX)
