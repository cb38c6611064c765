"""Dropping translations of the address space that is loaded, on this CPU."""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions
from vtsim.guest.kernel import layout as at

FLUSH_CEILING: Final = 33  # pages: above, Linux flushes all (tlb_single_page_flush_ceiling)


def flush_range(a: Assembler, kernel: KernelOptions, name: str, pages: int) -> None:
    """Drop the translations of so many pages from R12 on, of the space that is loaded, of the task at RBX.

    Page by page, or all if there are many. Changes RAX, RCX, R12 and `pages`.
    """
    a.cmp(pages, FLUSH_CEILING)
    a.jcc(ops.CC_BE, f"{name}_flush_page")
    a.op(ops.MOV_FROM_CR, s.RAX, imm=3)
    a.op(ops.MOV_TO_CR, s.RAX, imm=3)
    a.jmp(f"{name}_flushed")
    a.label(f"{name}_flush_page")
    a.op(ops.INVLPG, mem=Mem(s.R12))
    a.add(s.R12, at.PAGE)
    a.sub(pages, 1)
    a.jcc(ops.CC_NZ, f"{name}_flush_page")
    a.label(f"{name}_flushed")
    if kernel.kpti and kernel.pcid:
        flush_user_half(a)


def flush_user_half(a: Assembler) -> None:
    """Let the way out flush the user PCID of the task at RBX. Clobbers RAX and RCX."""
    a.ld(s.RAX, Mem(s.RBX, at.T_USER_CR3))
    a.mov(s.RCX, ~at.NOFLUSH)
    a.and_(s.RAX, register=s.RCX)
    a.st(Mem(s.RBX, at.T_USER_CR3), s.RAX)
