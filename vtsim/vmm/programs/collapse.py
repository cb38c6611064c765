"""Small pages of a VM become a large one again: what khugepaged does to the host's pages, and KVM to EPT after logging.

The daemon copies the pages of 2 MiB of guest memory into a free block, as long as at least one of them is there and
none is shared; EPT then maps the block at the next violation. Where the host's page is large all along and only EPT's
leaves are small, because writes were logged, their table goes.

Not modelled: the state of a page in the host's own lists; a limit of pages that are not there (max_ptes_none is 511).
"""

from __future__ import annotations

from vtsim.base.memory import PAGE_WORDS
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R12, R13, R14, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import spec as e
from vtsim.vmm import layout as at
from vtsim.vmm.memory import RAM_PAGE
from vtsim.vmm.programs import daemons, several
from vtsim.vmm.programs.ept_leaf import LARGE, host_leaf_of, leaf_of
from vtsim.vmm.programs.timer import begin_daemon, end_daemon
from vtsim.vmm.programs.words import count, vcpu, work, zero
from vtsim.vmm.registry import Path


def subroutines(a: Assembler, path: Path) -> None:
    """`collapse_due`: look at the next regions of 2 MiB of this VM. R13 address, R12 regions left."""
    begin_daemon(a, path, daemons.COLLAPSE)
    a.mov(R12, -(-path.vmm.collapse.pages // PAGE_WORDS))
    a.ld(R13, vcpu("COLLAPSE_CURSOR"))
    a.label("collapse_next")
    work(a, path, "collapse_scan")
    a.lea(RCX, Mem(R13, LARGE))
    a.ld(RAX, vcpu("MEMORY_END"))
    a.cmp(RCX, register=RAX)
    a.jcc(ops.CC_A, "collapse_wrap")
    several.lock_tables(a, path)
    if path.vmm.dirty_log.on:
        a.ld(RAX, vcpu("LOGGING"))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_NZ, "collapse_step", comment="small pages are wanted now")
    host_leaf_of(a, R13)
    a.cmp(RDX, 1)
    a.jcc(ops.CC_NZ, "collapse_step", comment="large already, or nothing there")
    a.copy(RBX, RCX)
    _look(a, path)
    a.call("take_block")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NS, "collapse_block")
    count(a, "LARGE_MISSING")
    a.jmp("collapse_step")
    a.label("collapse_block")
    a.shl(RAX, 12)
    a.copy(RBP, RAX)
    a.call("unmap_region")
    _copy(a, path)
    a.label("collapse_step")
    several.unlock_tables(a, path)
    a.add(R13, LARGE)
    a.jmp("collapse_count")
    a.label("collapse_wrap")
    zero(a, R13)
    a.label("collapse_count")
    a.sub(R12, 1)
    a.jcc(ops.CC_NZ, "collapse_next")
    a.st(vcpu("COLLAPSE_CURSOR"), R13)
    end_daemon(a, path, daemons.COLLAPSE, "collapse_period")


def _look(a: Assembler, path: Path) -> None:
    """Go on if some of the 512 entries at RBX is a page and all pages are the VM's alone. Changes RAX RCX RDX R14."""
    zero(a, RDX)
    zero(a, R14)
    a.label("collapse_look")
    a.ld(RAX, Mem(RBX, index=R14, scale=8))
    a.test(RAX, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "collapse_looked")
    a.test(RAX, e.PTE_WRITE)
    a.jcc(ops.CC_NZ, "collapse_page")
    _jump_if_zero_page(a, path, "collapse_looked")
    a.jmp("collapse_step")
    a.label("collapse_page")
    work(a, path, "collapse_look")
    a.add(RDX, 1)
    a.label("collapse_looked")
    a.add(R14, 1)
    a.cmp(R14, PAGE_WORDS)
    a.jcc(ops.CC_B, "collapse_look")
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_Z, "collapse_step")


def _jump_if_zero_page(a: Assembler, path: Path, label: str) -> None:
    """To a label if the entry in RAX is the shared page of zeroes. Changes RCX."""
    a.mov(RCX, e.ADDRESS)
    a.and_(RCX, register=RAX)
    a.cmp(RCX, path.addresses["zero_page"] << 12)
    a.jcc(ops.CC_Z, label)


def _copy(a: Assembler, path: Path) -> None:
    """Fill the block at RBP from the 512 entries at RBX, and let the process have it in their place."""
    work(a, path, "collapse")
    zero(a, R14)
    a.label("collapse_copy")
    a.mov(RDI, at.HOST_DIRECT)
    a.add(RDI, register=RBP)
    a.copy(RAX, R14)
    a.shl(RAX, 12)
    a.add(RDI, register=RAX)
    a.ld(RAX, Mem(RBX, index=R14, scale=8))
    a.test(RAX, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "collapse_zero")
    _jump_if_zero_page(a, path, "collapse_zero")
    work(a, path, "collapse_page")
    a.mov(RSI, at.HOST_DIRECT)
    a.add(RSI, register=RCX)
    a.hook(hooks.PAGE_COPY)
    a.copy(RSI, RCX)
    a.shr(RSI, 12)
    a.call("give_frame")
    a.jmp("collapse_copied")
    a.label("collapse_zero")
    a.hook(hooks.PAGE_ZERO)
    a.label("collapse_copied")
    a.add(R14, 1)
    a.cmp(R14, PAGE_WORDS)
    a.jcc(ops.CC_B, "collapse_copy")
    a.copy(RDX, RBP)
    a.mov(RAX, RAM_PAGE | e.PTE_LARGE)
    a.or_(RDX, register=RAX)
    a.call("map_large_user")
    count(a, "REGIONS_COLLAPSED")


def unmap_region(a: Assembler, path: Path) -> None:
    """Subroutine `unmap_region`: EPT maps nothing of the 2 MiB at R13 any more. Keeps RBX RBP R12 R13 R14."""
    a.label("unmap_region")
    work(a, path, "unmap_notifier")
    leaf_of(a, R13)
    a.cmp(RDX, 2)
    a.jcc(ops.CC_A, "region_unmapped")
    zero(a, RDX)
    a.mov(RCX, 2)
    a.call("write_ept")
    a.call("flush_ept")
    a.label("region_unmapped")
    a.ret()


def after_logging(a: Assembler, path: Path) -> None:
    """EPT's tables of small leaves go where the host's pages are large. Changes all registers."""
    zero(a, R13)
    a.label("recover_next")
    host_leaf_of(a, R13)
    a.cmp(RDX, 2)
    a.jcc(ops.CC_NZ, "recover_step")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "recover_step")
    leaf_of(a, R13)
    a.cmp(RDX, 1)
    a.jcc(ops.CC_NZ, "recover_step")
    a.call("unmap_region")
    count(a, "REGIONS_RECOVERED")
    a.label("recover_step")
    a.add(R13, LARGE)
    a.ld(RAX, vcpu("MEMORY_END"))
    a.cmp(R13, register=RAX)
    a.jcc(ops.CC_B, "recover_next")
