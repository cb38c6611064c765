"""What programs find of a guest-physical address: its memory slot, its EPT leaf, its page of the host."""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R8, R10, R13, R14, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import spec as e
from vtsim.ept.memory_slots import SLOT, SLOT_BYTES
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


def about_user_page(a: Assembler) -> None:
    """Registers for TABLE_LOOKUP in the process's tables: the address in R13, of the slot in R14. RSI RDI R8 R10."""
    a.ld(RSI, Mem(R14, SLOT["USER"]))
    a.add(RSI, register=R13)
    a.ld(RDI, vcpu("HOST_ROOT"))
    a.mov(R8, at.HOST_DIRECT)
    a.mov(R10, e.PTE_PRESENT)


def find_slot(a: Assembler, name: str, otherwise: str) -> None:
    """R14 <- the memory slot of R13; where there is none, go on elsewhere. `name` is for labels. Changes RAX RCX."""
    a.ld(R14, vcpu("SLOTS"))
    a.ld(RCX, vcpu("SLOT_ENTRIES"))
    a.label(f"{name}_next")
    a.ld(RAX, Mem(R14, SLOT["FIRST"]))
    a.cmp(R13, register=RAX)
    a.jcc(ops.CC_B, f"{name}_other")
    a.ld(RAX, Mem(R14, SLOT["END"]))
    a.cmp(R13, register=RAX)
    a.jcc(ops.CC_B, f"{name}_found")
    a.label(f"{name}_other")
    a.add(R14, SLOT_BYTES)
    a.loop(f"{name}_next")
    a.jmp(otherwise)
    a.label(f"{name}_found")


def own_page(a: Assembler, address: int, otherwise: str) -> None:
    """RBX <- entry at RBP of the 4 KiB page at an address that the VM has for itself; else go on elsewhere."""
    host_leaf_of(a, address)
    a.test(RAX, e.PTE_WRITE, comment="nothing there, or somebody else has it too")
    a.jcc(ops.CC_Z, otherwise)
    a.cmp(RDX, 1)
    a.jcc(ops.CC_NZ, otherwise)
    a.copy(RBX, RAX)
    a.copy(RBP, RCX)
