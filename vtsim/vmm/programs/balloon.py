"""Ballooning: the guest gives frames to the hypervisor by hypercall, which unmaps them; touched later, they are new.

Not modelled: a guest that is told of the demand by an interrupt; it asks.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R13, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import spec as e
from vtsim.guest.kernel.balloon import DEFLATE, INFLATE, TARGET
from vtsim.vmm import layout as at
from vtsim.vmm.programs import several, swap
from vtsim.vmm.programs.ept_leaf import host_leaf_of
from vtsim.vmm.programs.timer import now
from vtsim.vmm.programs.words import count, saved, vcpu, work, zero
from vtsim.vmm.registry import Path


def hypercall(a: Assembler, path: Path) -> None:
    """VMCALL, whose number is in the guest's RAX: the balloon's calls; others are left to what follows."""
    if not path.vmm.balloon.size:
        return
    a.ld(RAX, saved(RAX))
    for number, label in ((TARGET, "balloon_target"), (INFLATE, "balloon_inflate"), (DEFLATE, "balloon_deflate")):
        a.cmp(RAX, number)
        a.jcc(ops.CC_Z, label)


def subroutines(a: Assembler, path: Path) -> None:
    """`balloon_target`, `balloon_inflate`, `balloon_deflate`: the answers, each in RAX of the guest."""
    a.label("balloon_target")
    a.activity = ops.MEMORY_MANAGEMENT
    now(a)
    zero(a, RCX)
    a.mov(RBX, path.addresses["balloon_start"])
    a.cmp(RAX, register=RBX)
    a.jcc(ops.CC_B, "balloon_said")
    if path.vmm.balloon.stop is not None:
        a.mov(RBX, path.addresses["balloon_stop"])
        a.cmp(RAX, register=RBX)
        a.jcc(ops.CC_AE, "balloon_said")
    a.mov(RCX, path.vmm.balloon.size // 4096)
    a.label("balloon_said")
    a.st(saved(RAX), RCX)
    a.jmp("skip")

    a.label("balloon_deflate")
    count(a, "PAGES_DEFLATED")
    a.jmp("balloon_taken")

    a.label("balloon_inflate")
    a.activity = ops.MEMORY_MANAGEMENT
    work(a, path, "balloon_page")
    a.ld(R13, saved(RDI))
    a.and_(R13, ~0xFFF)
    a.ld(RAX, vcpu("MEMORY_END"))
    a.cmp(R13, register=RAX)
    a.jcc(ops.CC_AE, "balloon_refused")
    several.lock_tables(a, path)
    several.because(a, path, at.FOR_BALLOON)
    host_leaf_of(a, R13)
    a.cmp(RDX, 1)
    a.jcc(ops.CC_NZ, "balloon_counted", comment="no page was ever there")
    a.copy(RBX, RAX)
    a.copy(RBP, RCX)
    zero(a, RAX)
    a.st(Mem(RBP), RAX)
    a.test(RBX, register=RBX)
    a.jcc(ops.CC_Z, "balloon_counted", comment="none is there now")
    a.call("unmap_leaf")
    a.mov(RSI, e.ADDRESS)
    a.and_(RSI, register=RBX)
    a.test(RBX, e.PTE_WRITE)
    a.jcc(ops.CC_NZ, "balloon_own")
    if path.vmm.sharing.on:
        a.cmp(RSI, path.addresses["zero_page"] << 12)
        a.jcc(ops.CC_Z, "balloon_counted")
        a.call("drop_shared")
    a.jmp("balloon_counted")
    a.label("balloon_own")
    a.shr(RSI, 12)
    a.call("give_frame")
    if path.vmm.swap.on:
        swap.bump(a, path, "RESIDENT", -1)
    a.label("balloon_counted")
    several.unlock_tables(a, path)
    count(a, "PAGES_BALLOONED")
    a.label("balloon_taken")
    zero(a, RAX)
    a.st(saved(RAX), RAX)
    a.jmp("skip")
    a.label("balloon_refused")
    a.mov(RAX, -1)
    a.st(saved(RAX), RAX)
    a.jmp("skip")
