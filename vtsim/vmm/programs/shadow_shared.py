"""Shadow paging where the vCPUs of a VM share shadow pages: what is done around the hooks, as KVM's shadow MMU does it.

Whoever changes shadow tables holds the lock of the VM's tables. Where entries went or became stricter, the other vCPUs
drop translations before the lock is free again. Three things wait for that flush besides: shadow pages that were given
up are free only behind it; a page of the guest that became read-only is read behind it, because another vCPU may store
to it until then; and who walked the guest's tables without the lock walks them again with it. A root that another vCPU
uses is given up when that one, asked to, has loaded another.

Source: Linux 6.1, arch/x86/kvm/mmu/mmu.c (kvm_mmu_commit_zap_page, mmu_sync_children, kvm_mmu_reload), paging_tmpl.h
(gpte_changed).
Not modelled: under shadow paging, vCPUs of a VM in different paging modes, or with PAE or 32-bit paging; roots that are
loaded without the lock (fast CR3 switches); the lock given to others while many tables are brought into sync.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import shadow_hooks as h
from vtsim.cpu.kernels.shadow_pool import FILLED, FLUSH, GIVEN_UP, HELD, NO_ROOT, OTHER_ROOTS
from vtsim.cpu.slots import R10, R11, R13, R15, RAX, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import shadow as d
from vtsim.vmm import layout as at
from vtsim.vmm.programs import several
from vtsim.vmm.programs.words import vcpu, work, zero
from vtsim.vmm.registry import Path

# what is around each entry that a hook counts: length, first bit and bits of the count
ENTRY_LENGTHS: Final = (("synchronize_entry", HELD, FILLED - HELD), ("prefetch_entry", FILLED, 63 - FILLED))


def begin(a: Assembler, path: Path, cause: int) -> None:
    """The VM's tables are ours, pages for a fault are free. Changes RAX, RCX, RDX, RSI, RDI and R10."""
    if path.several:
        several.lock_tables(a, path)
        several.because(a, path, cause)
        a.call("shadow_room")


def end(a: Assembler, path: Path) -> None:
    """The VM's tables are free again. Changes RAX and RDI."""
    several.unlock_tables(a, path)


def settle(a: Assembler, path: Path) -> None:
    """Do now what a hook left in RDX, where vCPUs share tables. Keeps RDX; changes RAX, RCX, RSI, RDI, R10 and R11."""
    if path.several:
        a.call("shadow_settle")


def protect(a: Assembler, path: Path, everything: bool = False) -> None:
    """Where vCPUs share tables: nobody stores any more to leaf tables out of sync, below the root or in the pool."""
    if path.several:
        a.mov(RCX, int(everything))
        a.ld(RDI, vcpu("SHADOW"))
        a.hook(h.SHADOW_PROTECT)
        a.call("shadow_settle")


def synchronize(a: Assembler, path: Path, number: int) -> None:
    """SHADOW_SYNC or SHADOW_SYNC_ALL: tables out of sync are read-only again, and as the guest's."""
    protect(a, path, everything=number == h.SHADOW_SYNC_ALL)
    a.ld(RDI, vcpu("SHADOW"))
    a.hook(number)
    if path.several:
        a.call("shadow_settle")
    else:
        count_entries(a, path)


def subroutines(a: Assembler, path: Path) -> None:
    """`shadow_settle` (what a hook left in RDX), `shadow_room`, `root_as_asked`."""
    a.label("shadow_settle")
    count_entries(a, path)
    a.push(RDX)
    a.push(RBX)
    a.copy(R10, RDX)
    a.test(R10, NO_ROOT)
    a.jcc(ops.CC_Z, "settle_rooted")
    load_root(a, path)
    a.or_(R10, register=RDX)
    a.label("settle_rooted")
    a.test(R10, FLUSH | OTHER_ROOTS)
    a.jcc(ops.CC_Z, "settle_flushed")
    a.call("flush_guest")
    _tell_roots(a)
    a.call("flush_others")
    a.label("settle_flushed")
    a.test(R10, GIVEN_UP)
    a.jcc(ops.CC_Z, "settle_done")
    a.ld(RDI, vcpu("SHADOW"))
    a.hook(h.SHADOW_FREE)
    a.label("settle_done")
    a.pop(RBX)
    a.pop(RDX)
    a.ret()

    a.label("shadow_room")
    a.ld(RDI, vcpu("SHADOW"))
    a.hook(h.SHADOW_ROOM)
    a.test(RDX, FLUSH | OTHER_ROOTS | GIVEN_UP | NO_ROOT)
    a.jcc(ops.CC_Z, "shadow_room_there")
    a.ld(RAX, vcpu("FLUSH_CAUSE"))
    a.push(RAX)
    a.test(RDX, GIVEN_UP)
    a.jcc(ops.CC_Z, "shadow_room_settle", comment="it is only that another vCPU has given up the root of this one")
    several.because(a, path, at.FOR_ROOM)
    a.label("shadow_room_settle")
    a.call("shadow_settle")
    a.pop(RAX)
    a.st(vcpu("FLUSH_CAUSE"), RAX)
    a.label("shadow_room_there")
    a.ret()

    a.label("root_as_asked")
    a.ld(RCX, vcpu("ASKED_ROOT"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "root_not_asked")
    zero(a, RCX)
    a.st(vcpu("ASKED_ROOT"), RCX)
    a.push(RBX)
    begin(a, path, at.FOR_SHADOWING)
    load_root(a, path)
    a.call("shadow_settle")
    end(a, path)
    a.pop(RBX)
    a.label("root_not_asked")
    a.ret()


def _counts(path: Path) -> bool:
    return any(path.parameters.get(name, 0) for name, _, _ in ENTRY_LENGTHS)


def count_entries(a: Assembler, path: Path) -> None:
    """What stands around the entries that a hook has counted in RDX, if anything does. Changes R11."""
    if _counts(path):
        a.call("shadow_entries")


def entries(a: Assembler, path: Path) -> None:
    """`shadow_entries`: the code around every entry that a hook has counted in RDX. Changes R11.

    What is around a page that is synchronized, `synchronize_page`, comes once for all the pages of a hook.
    """
    if not _counts(path):
        return
    a.label("shadow_entries")
    for name, first, bits in ENTRY_LENGTHS:
        a.copy(R11, RDX)
        a.shl(R11, 64 - first - bits)
        a.shr(R11, 64 - bits)
        a.test(R11, register=R11)
        a.jcc(ops.CC_Z, f"{name}_done")
        if name == "synchronize_entry":
            work(a, path, "synchronize_page")
        a.label(name)
        work(a, path, name)
        a.sub(R11, 1)
        a.jcc(ops.CC_NZ, name)
        a.label(f"{name}_done")
    a.ret()


def verify(a: Assembler, path: Path) -> None:
    """`shadow_verify`: CC_Z if the walk of the last fault still leads to R13. Changes RAX, RCX, RDX, RSI and RDI.

    `shadow_verify_at`: one for the address RSI with error code RDX.
    """
    a.label("shadow_verify")
    a.ld(RDI, vcpu("SHADOW"))
    a.ld(RSI, Mem(RDI, d.POOL["ADDRESS"]))
    a.ld(RDX, Mem(RDI, d.POOL["ERROR"]))
    a.label("shadow_verify_at")
    walk_again(a, path)
    a.ret()


def walk_again(a: Assembler, path: Path) -> None:
    """CC_Z if a walk for the address RSI with error code RDX leads to R13. Changes RAX, RCX, RDX and RDI."""
    work(a, path, "guest_walk")
    a.ld(RDI, vcpu("SHADOW"))
    a.hook(h.SHADOW_WALK)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "shadow_verified")
    a.cmp(RCX, register=R13)
    a.label("shadow_verified")


def _tell_roots(a: Assembler) -> None:
    """If roots of other vCPUs were given up (flags R10): all of them load theirs. Changes RDI."""
    a.test(R10, OTHER_ROOTS)
    a.jcc(ops.CC_Z, "roots_told")
    a.ld(RDI, vcpu("PEER"))
    a.jmp("roots_look")
    a.label("roots_tell")
    a.st_value(Mem(RDI, at.V["ASKED_ROOT"]), 1)
    a.ld(RDI, Mem(RDI, at.V["PEER"]))
    a.label("roots_look")
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_NZ, "roots_tell")
    a.label("roots_told")


def load_root(a: Assembler, path: Path, mode: bool = False, refused: str = "") -> None:
    """The shadow root of the guest's CR3 becomes the processor's; its paging mode is in RBX, or as it was.

    Are PDPTEs to be loaded, says RCX; where they are wrong nothing is done, and control goes to `refused`. None are
    loaded without it.
    """
    work(a, path, "load_root")
    a.ld(RDI, vcpu("SHADOW"))
    a.ld(RSI, vcpu("SHADOW_CR3"))
    if not mode:
        a.ld(RBX, Mem(RDI, d.POOL["MODE"]))
    if not refused:
        zero(a, RCX)
    a.hook(h.SHADOW_LOAD_ROOT)
    if refused:
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_Z, refused)
    a.call("write_root")
