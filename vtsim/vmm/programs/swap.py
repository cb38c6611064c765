"""Over-commit: a VM that has all the host's memory it may have gives pages to a disk to get others.

A hand goes round the VM's memory. A page whose accessed flag in EPT is set gets a second chance and loses the flag;
else it is the victim: unmapped, written if it is not on the disk as it is, and its frame free when that is done. Some
frames are kept in reserve, so that writes go on beside the guest. A page that is on the disk is read when the guest
asks for it; meanwhile another vCPU runs, or none.

SDM: "Accessed and Dirty Flags for EPT"; "EPT Violations".
Not modelled: reclaim of one VM's pages by another VM; read-ahead; reclaim by a thread of its own; large pages on the
disk.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.memory import HOLE_FIRST, HOLE_LAST
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, R10, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import spec as e
from vtsim.vmm import layout as at
from vtsim.vmm.memory import RAM_PAGE
from vtsim.vmm.programs import several
from vtsim.vmm.programs.ept_leaf import host_leaf_of, leaf_of, own_page
from vtsim.vmm.programs.timer import want_cpu
from vtsim.vmm.programs.words import count, cpu, vcpu, work, zero
from vtsim.vmm.registry import Path

# fmt: off
ON_DISK: Final = 1 << 9         # in an entry of the process that is not present: the page is on the disk
BEING_READ: Final = 1 << 10     # beside that: a vCPU of several waits for it
RESERVE: Final = 16             # frames that reclaim tries to have left, and pages it gives up at a time
CLEAN_PAGE: Final = RAM_PAGE & ~e.PTE_DIRTY
# fmt: on


def bump(a: Assembler, path: Path, field: str, number: int) -> None:
    """Change a count of the VM that an interrupt may change too. Changes RAX, and RCX where there are several vCPUs."""
    a.mov(RAX, number)
    a.xadd(several.vm_word(a, path, field, RCX), RAX)


def _compare(a: Assembler, path: Path, reserve: int) -> None:
    """Compare the frames that the VM has with those that it may have, less some. Changes RAX and RCX."""
    a.ld(RAX, several.vm_word(a, path, "RESIDENT", RAX))
    if reserve:
        a.ld(RCX, several.vm_word(a, path, "IN_FLIGHT", RCX))
        a.sub(RAX, register=RCX)
    a.ld(RCX, vcpu("SHARE"))
    if reserve:
        a.sub(RCX, reserve)
    a.cmp(RAX, register=RCX)


def before_page(a: Assembler, path: Path) -> None:
    """A page is missing (entry at RCX, of level RDX): make room for it; bring it from the disk if it is there."""
    zero(a, RBP)
    a.cmp(RDX, 1)
    a.jcc(ops.CC_NZ, "swap_never_there")
    a.ld(RBP, Mem(RCX))
    a.label("swap_never_there")
    a.st(vcpu("WAIT_QUALIFICATION"), R12)
    a.st(vcpu("WAIT_ADDRESS"), R13)
    if path.several:
        a.test(RBP, BEING_READ)
        a.jcc(ops.CC_NZ, "swap_await_page")
    for register in (R13, R14, RBP):
        a.push(register)
    several.because(a, path, at.FOR_SWAP)
    a.mov(R12, RESERVE)
    a.label("swap_reclaim")
    _compare(a, path, RESERVE)
    a.jcc(ops.CC_B, "swap_reclaimed")
    a.call("evict")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "swap_reclaimed")
    a.sub(R12, 1)
    a.jcc(ops.CC_NZ, "swap_reclaim")
    a.label("swap_reclaimed")
    several.because(a, path, at.FOR_FAULTS)
    for register in (RBP, R14, R13):
        a.pop(register)
    a.ld(R12, vcpu("WAIT_QUALIFICATION"))
    a.op(ops.CLI)
    _compare(a, path, 0)
    a.jcc(ops.CC_AE, "swap_wait")
    a.op(ops.STI)
    bump(a, path, "RESIDENT", 1)
    a.test(RBP, register=RBP)
    a.jcc(ops.CC_NZ, "swap_in")


def subroutines(a: Assembler, path: Path) -> None:
    """`swap_wait`, `swap_in`, `swap_done`; `evict` (RAX <- 1 if a page was given up), `disk_submit`."""
    a.label("swap_wait")
    if path.several:
        a.st_value(vcpu("STATE"), at.WAITING, comment="so that who frees frames on another CPU sees it")
        _compare(a, path, 0)
        a.jcc(ops.CC_B, "swap_go_on")
    a.ld(RAX, several.vm_word(a, path, "IN_FLIGHT", RAX))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "swap_used_up" if path.several else "no_host_memory")
    if not path.several:
        a.st_value(vcpu("STATE"), at.WAITING)
    count(a, "SWAP_WAITS")
    several.unlock_tables(a, path)
    a.jmp("schedule")
    if path.several:
        _wait_for_others(a, path)

    a.label("swap_in")
    a.call("take_frame")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_S, "no_host_memory")
    a.op(ops.CLI)
    a.st(vcpu("WAIT_FRAME"), RAX)
    a.st_value(vcpu("STATE"), at.WAITING)
    if path.several:
        host_leaf_of(a, R13)
        a.st_value(Mem(RCX), ON_DISK | BEING_READ)
        a.ld(RSI, vcpu("WAIT_FRAME"))
    else:
        a.copy(RSI, RAX)
    _place(a)
    count(a, "PAGES_SWAPPED_IN")
    a.mov(RAX, at.DISK_READ)
    a.call("disk_submit")
    several.unlock_tables(a, path)
    a.jmp("schedule")

    a.label("swap_done")
    a.activity = ops.MEMORY_MANAGEMENT
    several.left_guest(a, path)
    a.op(ops.STI)
    zero(a, RAX)
    a.st(vcpu("SWAP_DUE"), RAX)
    a.ld(R12, vcpu("WAIT_QUALIFICATION"))
    a.ld(R13, vcpu("WAIT_ADDRESS"))
    if path.several:
        a.test(R13, register=R13)
        a.jcc(ops.CC_S, "reenter", comment="it had found what it was told of by itself")
        a.st_value(vcpu("WAIT_ADDRESS"), -1)
    a.ld(RDX, vcpu("WAIT_FRAME"))
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_Z, "resolve_violation")
    several.lock_tables(a, path)
    zero(a, RAX)
    a.st(vcpu("WAIT_FRAME"), RAX)
    a.copy(RBX, RDX)
    a.shl(RBX, 12)
    a.mov(RAX, CLEAN_PAGE)
    a.or_(RBX, register=RAX)
    host_leaf_of(a, R13)
    a.st(Mem(RCX), RBX)
    if path.several:
        a.call("wake_waiting")
        several.unlock_tables(a, path)
    a.jmp("resolve_violation")

    _evict(a, path)

    a.label("disk_submit")
    a.ld(RDI, cpu("DISK_QUEUE"))
    a.ld(RCX, cpu("DISK_TAIL"))
    a.copy(R8, RCX)
    a.and_(R8, at.DISK_ENTRIES - 1)
    a.shl(R8, at.DISK_ENTRY_BYTES.bit_length() - 1)
    a.add(RDI, register=R8)
    for n, register in enumerate((RAX, RSI, RDX, R15)):
        a.st(Mem(RDI, 8 * n), register)
    a.add(RCX, 1)
    a.st(cpu("DISK_TAIL"), RCX)
    a.ld(RDI, cpu("DOORBELL"))
    a.st(Mem(RDI), RCX)
    a.ret()


def _wait_for_others(a: Assembler, path: Path) -> None:
    """What waiting is where other vCPUs free frames and read pages; the lock of the tables is held.

    `wake_waiting`: every other vCPU of the VM that waits without a command to the disk looks again. Changes RAX, RCX,
    RDX and RDI.
    """
    a.label("swap_await_page")
    a.op(ops.CLI)
    a.st_value(vcpu("STATE"), at.WAITING)
    count(a, "SWAP_WAITS")
    several.unlock_tables(a, path)
    a.jmp("schedule")

    a.label("swap_used_up")
    _compare(a, path, 0)
    a.jcc(ops.CC_B, "swap_go_on", comment="the last write came to its end between two looks")
    a.st_value(vcpu("STATE"), at.RUNNABLE)
    a.jmp("no_host_memory")

    a.label("swap_go_on")
    a.st_value(vcpu("STATE"), at.RUNNABLE)
    a.st_value(vcpu("WAIT_ADDRESS"), -1)
    several.unlock_tables(a, path)
    a.op(ops.STI)
    a.jmp("resolve_violation")

    a.label("wake_waiting")
    a.ld(RDI, vcpu("PEER"))
    a.jmp("wake_look")
    a.label("wake_next")
    a.ld(RAX, Mem(RDI, at.V["STATE"]))
    a.cmp(RAX, at.WAITING)
    a.jcc(ops.CC_NZ, "wake_other")
    a.ld(RAX, Mem(RDI, at.V["WAIT_FRAME"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "wake_other")
    a.st_value(Mem(RDI, at.V["SWAP_DUE"]), 1)
    a.call("kick")
    a.label("wake_other")
    a.ld(RDI, Mem(RDI, at.V["PEER"]))
    a.label("wake_look")
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_NZ, "wake_next")
    a.ret()


def _place(a: Assembler) -> None:
    """RDX <- place on the disk of the page at R13. Changes RAX."""
    a.copy(RDX, R13)
    a.shr(RDX, 12)
    a.ld(RAX, vcpu("DISK_FIRST"))
    a.add(RDX, register=RAX)


def _evict(a: Assembler, path: Path) -> None:
    flags = path.vmm.ept.accessed_dirty
    a.label("evict")
    a.ld(R14, vcpu("MEMORY_END"))
    a.shr(R14, 11)
    a.label("evict_next")
    a.sub(R14, 1)
    a.jcc(ops.CC_S, "evict_nothing")
    a.ld(R13, several.vm_word(a, path, "SWAP_HAND", RDI))
    a.lea(RAX, Mem(R13, 4096))
    a.cmp(RAX, HOLE_FIRST << 12)
    a.jcc(ops.CC_NZ, "evict_below_hole")
    a.mov(RAX, (HOLE_LAST + 1) << 12)
    a.label("evict_below_hole")
    a.ld(RCX, vcpu("MEMORY_END"))
    a.cmp(RAX, register=RCX)
    a.jcc(ops.CC_B, "evict_within")
    zero(a, RAX)
    a.label("evict_within")
    a.st(several.vm_word(a, path, "SWAP_HAND", RDI), RAX)
    work(a, path, "reclaim_scan")
    own_page(a, R13, "evict_next")
    leaf_of(a, R13)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "evict_this")
    if flags:
        a.test(RAX, e.EPT_ACCESSED)
        a.jcc(ops.CC_Z, "evict_mapped")
        if path.several:
            a.ld(RAX, vcpu("MEMORY_END"))
            a.shr(RAX, 12)
            a.cmp(R14, register=RAX)
            a.jcc(ops.CC_B, "evict_mapped", comment="in its second round the hand takes what other vCPUs use on")
        a.mov(RAX, -e.EPT_ACCESSED)
        a.xadd(Mem(RCX), RAX)  # the processor may set the dirty flag meanwhile
        a.jmp("evict_next")
    else:
        a.test(RAX, e.EPT_WRITE, comment="without flags a mapping is an access, and a writable one a write")
        a.jcc(ops.CC_Z, "evict_unmap")
        a.or_(RBX, e.PTE_DIRTY)
        a.st(Mem(RBP), RBX)
        a.label("evict_unmap")
        a.call("unmap_leaf")
        a.jmp("evict_next")
    a.label("evict_mapped")
    a.call("unmap_leaf")
    if path.vmm.dirty_log.method != "pml":  # whose collections take dirty flags away
        a.test(RAX, e.EPT_DIRTY)
        a.jcc(ops.CC_Z, "evict_this")
    a.or_(RBX, e.PTE_DIRTY)
    a.label("evict_this")
    work(a, path, "reclaim_page")
    a.st_value(Mem(RBP), ON_DISK)
    a.mov(RSI, e.ADDRESS)
    a.and_(RSI, register=RBX)
    a.shr(RSI, 12)
    a.copy(R10, R13)
    a.shr(R10, 9)
    a.ld(RAX, vcpu("SWAP_MARKS"))
    a.add(R10, register=RAX)
    a.test(RBX, e.PTE_DIRTY)
    a.jcc(ops.CC_NZ, "evict_write")
    a.ld(RAX, Mem(R10))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "evict_write")
    a.call("give_frame")
    bump(a, path, "RESIDENT", -1)
    count(a, "PAGES_DROPPED")
    a.jmp("evicted")
    a.label("evict_write")
    a.st_value(Mem(R10), 1)
    bump(a, path, "IN_FLIGHT", 1)
    _place(a)
    count(a, "PAGES_SWAPPED_OUT")
    a.mov(RAX, at.DISK_WRITE)
    a.call("disk_submit")
    a.label("evicted")
    a.mov(RAX, 1)
    a.ret()
    a.label("evict_nothing")
    zero(a, RAX)
    a.ret()


def complete(a: Assembler, path: Path) -> None:
    """Part of the host's interrupt handler: every command that the disk says is done."""
    a.label("disk_next")
    a.ld(R12, cpu("DISK_QUEUE"))
    a.ld(RBX, cpu("DISK_HEAD"))
    a.ld(RAX, Mem(R12, 4096 + at.DISK_DONE_TAIL))
    a.cmp(RBX, register=RAX)
    a.jcc(ops.CC_Z, "disk_seen")
    a.lea(RAX, Mem(RBX, 1))
    a.st(cpu("DISK_HEAD"), RAX)
    work(a, path, "disk_completion")
    a.and_(RBX, at.DISK_ENTRIES - 1)
    a.shl(RBX, at.DISK_ENTRY_BYTES.bit_length() - 1)
    a.add(RBX, register=R12)
    a.ld(R13, Mem(RBX, 4096))
    a.ld(RSI, Mem(RBX, 4096 + 8))
    a.ld(R15, Mem(RBX, 4096 + 24))
    a.cmp(R13, at.DISK_READ)
    a.jcc(ops.CC_Z, "disk_wakes")
    a.call("give_frame")
    bump(a, path, "RESIDENT", -1)
    bump(a, path, "IN_FLIGHT", -1)
    if path.several:
        a.call("wake_waiting")
    a.ld(RAX, vcpu("WAIT_FRAME"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "disk_next", comment="it waits for a page to come")
    a.label("disk_wakes")
    a.ld(RAX, vcpu("STATE"))
    a.cmp(RAX, at.WAITING)
    a.jcc(ops.CC_NZ, "disk_next")
    work(a, path, "wake_up")
    a.st_value(vcpu("STATE"), at.RUNNABLE)
    a.st_value(vcpu("SWAP_DUE"), 1)
    a.st_value(vcpu("REQUEST"), at.REQUEST_EVENTS)
    want_cpu(a)
    a.jmp("disk_next")
    a.label("disk_seen")
