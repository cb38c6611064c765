"""Dirty logging: which pages a guest writes, from write protection or from the page-modification log.

Logging starts and the log is collected when a host timer says so, on the way into the guest. From its start on, EPT
maps 4 KiB pages only: large ones are split, and every leaf is protected or its dirty flag cleared. What is found
written goes into a bitmap; a collection takes the bits, makes those pages fresh again and flushes EPT's translations.

With several vCPUs each has a log of its own, which it empties at every exit; logging begins, and the bitmap is read,
when all others were made to exit, as KVM kicks them. A collection ends when all have dropped translations: what they
still stored through old ones belongs to it.

SDM: "Page-Modification Logging"; "Accessed and Dirty Flags for EPT"; "EPT Violations".
Not modelled: copying the bitmap and the pages to anybody; collection by a thread of its own, beside the guest.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.memory import PAGE_WORDS
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.kernels.ept_walk import LOG_ENTRIES
from vtsim.cpu.slots import R8, R9, R10, R12, R13, R14, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import spec as e
from vtsim.vmcs import bits as b
from vtsim.vmm.programs import collapse, daemons, several
from vtsim.vmm.programs.ept_leaf import LARGE, leaf_of
from vtsim.vmm.programs.timer import begin_daemon, end_daemon, now
from vtsim.vmm.programs.words import count, vcpu, work, zero
from vtsim.vmm.registry import Path

# fmt: off
LOG_EMPTY: Final      = LOG_ENTRIES - 1      # index of the page-modification log when nothing stands in it
WAS_WRITABLE: Final   = 1 << 57      # in a leaf that the processor ignores this bit of: only logging protects it
PAGES_OF_WORD: Final  = 64
FAST_TRIES: Final     = 5            # compares and exchanges before the lock is taken: fast_page_fault's retry_count
# fmt: on


def uses_log(path: Path) -> bool:
    """Is the processor's page-modification log used?"""
    return path.vmm.dirty_log.method == "pml"


def mark(a: Assembler, path: Path, back: str) -> None:
    """While writes are logged: the page of R13, which is about to become writable, is written. Changes RAX RDI RSI."""
    a.ld(RAX, several.vm_word(a, path, "LOGGING", RAX))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, back)
    note_page(a, path)


def note_page(a: Assembler, path: Path) -> None:
    """The page of the guest-physical address in R13 is written. Changes RAX RDI RSI."""
    a.copy(RSI, R13)
    _note_page(a, path)


def _note_page(a: Assembler, path: Path) -> None:
    """The same of the address in RSI."""
    work(a, path, "mark_dirty")
    a.shr(RSI, 12)
    a.ld(RDI, vcpu("DIRTY_BITMAP"))
    a.hook(hooks.SET_BIT)


def protected_page(a: Assembler, path: Path) -> None:
    """A write to a page that only logging protects: let it be written, note it, and go on. R12, R13 as in `ept`.

    The VM's lock is not taken: the leaf is changed by compare and exchange, so that nobody's change of it is undone.
    Where that fails the leaf is read again; after so many times, as where the page is not there or not protected by
    logging alone, slot and page are found under the lock. The page is noted when its leaf is writable: whoever takes
    the bitmap in between finds it the next time. Where another vCPU has seen to the page there is nothing to do.

    Source: Linux 6.1, arch/x86/kvm/mmu/mmu.c, fast_page_fault.
    """
    if not path.parameters.get("lockless_faults", 1):
        return
    if not path.vmm.dirty_log.ends:
        a.ld(RAX, several.vm_word(a, path, "LOGGING", RAX))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_Z, "not_protected")
    a.test(R12, e.Q_WRITE)
    a.jcc(ops.CC_Z, "not_protected")
    work(a, path, "fast_page_fault")
    a.mov(RBP, FAST_TRIES)
    a.label("fast_again")
    leaf_of(a, R13)
    a.test(RAX, e.EPT_WRITE)
    a.jcc(ops.CC_NZ, "reenter", comment="another vCPU was faster")
    a.mov(RBX, WAS_WRITABLE)
    a.test(RAX, register=RBX)
    a.jcc(ops.CC_Z, "not_protected")
    a.copy(RDX, RAX)
    a.mov(RBX, ~WAS_WRITABLE)
    a.and_(RDX, register=RBX)
    a.or_(RDX, e.EPT_WRITE)
    a.label("fast_exchange")
    exchange_leaf(a)
    a.label("fast_exchanged")
    a.jcc(ops.CC_NZ, "fast_failed")
    mark(a, path, "fast_noted")
    a.label("fast_noted")
    count(a, "FAST_FAULTS")
    a.jmp("reenter")
    a.label("fast_failed")
    count(a, "FAST_RETRIES")
    a.sub(RBP, 1)
    a.jcc(ops.CC_NZ, "fast_again")
    a.label("not_protected")


def exchange_leaf(a: Assembler) -> None:
    """CC_Z, and the leaf at RCX <- RDX, if it is still RAX."""
    a.cmpxchg(Mem(RCX), RDX)


def log_full(a: Assembler, path: Path) -> None:
    """The page-modification log has no room: empty it.

    SDM: "Page-Modification Logging".
    """
    a.vmread(RAX, "PML_INDEX")
    a.cmp(RAX, LOG_EMPTY)
    a.jcc(ops.CC_Z, "reenter", comment="it was emptied on the way here")
    a.call("empty_log")
    a.jmp("reenter")


def empty_at_exit(a: Assembler, path: Path) -> None:
    """At every exit: empty the page-modification log, unless it is. Changes RAX, and what `empty_log` does."""
    a.vmread(RAX, "PML_INDEX", comment="vmx_flush_pml_buffer")
    if uses_log(path):
        a.cmp(RAX, LOG_EMPTY)
        a.jcc(ops.CC_Z, "log_is_empty")
        a.call("empty_log")
        a.label("log_is_empty")


def empty_first(a: Assembler, path: Path) -> None:
    """At every exit, before other vCPUs hear of it: whoever is out of its guest has nothing in its log."""
    if path.several and uses_log(path):
        empty_at_exit(a, path)


def _ask_others(a: Assembler, path: Path) -> None:
    """Every vCPU of the VM has an empty log, and logs as the VM does. Changes RAX, RCX, RDX and RDI."""
    if path.several and uses_log(path):
        a.call("log_others")


def empty_others(a: Assembler, path: Path) -> None:
    """What other vCPUs have in their logs is in the bitmap. Changes RAX, RCX, RDX and RDI."""
    _ask_others(a, path)


def subroutines(a: Assembler, path: Path) -> None:
    """`log_due`: start logging or collect the log; `empty_log`, `refresh`."""
    begin_daemon(a, path, daemons.LOGGING)
    several.lock_tables(a, path)
    a.ld(RAX, vcpu("LOGGING"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "collect_log")
    _start(a, path)
    _collect(a, path)
    if path.vmm.dirty_log.ends:
        _stop(a, path)
    a.label("log_done")
    a.call("flush_ept")
    several.unlock_tables(a, path)
    end_daemon(a, path, daemons.LOGGING, "log_period")
    _refresh(a, path)
    if uses_log(path):
        _empty_log(a, path)


def _start(a: Assembler, path: Path) -> None:
    """Split every large page, and make every leaf fresh."""
    work(a, path, "start_dirty_log")
    a.st_value(vcpu("LOGGING"), 1)
    if uses_log(path):
        a.vmread(RAX, "SECONDARY_PROC_CONTROLS")
        a.or_(RAX, b.ENABLE_PML)
        a.vmwrite("SECONDARY_PROC_CONTROLS", RAX)
    _ask_others(a, path)
    zero(a, R13)
    a.ld(R12, vcpu("DIRTY_WORDS"))
    a.shl(R12, 18)  # bytes of guest memory
    a.label("start_next")
    leaf_of(a, R13)
    a.cmp(RDX, 2)
    a.jcc(ops.CC_A, "start_nothing")
    a.jcc(ops.CC_B, "start_leaves")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "start_nothing")
    _split(a)
    a.label("start_leaves")
    a.mov(RBX, -1)
    a.mov(RBP, PAGE_WORDS // PAGES_OF_WORD)
    a.label("start_word")
    a.call("refresh")
    a.add(RCX, 8 * PAGES_OF_WORD)
    a.sub(RBP, 1)
    a.jcc(ops.CC_NZ, "start_word")
    a.label("start_nothing")
    a.add(R13, LARGE)
    a.cmp(R13, register=R12)
    a.jcc(ops.CC_B, "start_next")
    a.jmp("log_done")


def _stop(a: Assembler, path: Path) -> None:
    """`stop_log`: what is protected becomes writable at its next violation; EPT may map large pages again."""
    a.label("stop_log")
    work(a, path, "stop_dirty_log")
    zero(a, RAX)
    a.st(vcpu("LOGGING"), RAX)
    if uses_log(path):
        a.vmread(RAX, "SECONDARY_PROC_CONTROLS")
        a.and_(RAX, ~b.ENABLE_PML)
        a.vmwrite("SECONDARY_PROC_CONTROLS", RAX)
    _ask_others(a, path)
    if path.vmm.ept.page_size >= LARGE:
        collapse.after_logging(a, path)
    a.jmp(several.unlocked(path))


def _split(a: Assembler) -> None:
    """Replace the 2 MiB leaf RAX, which stands at RCX, by a table; RCX <- its first entry."""
    a.ld(RDI, vcpu("EPT_ALLOCATOR"))
    a.ld(RBX, vcpu("EPT_ALLOCATOR", 1))
    a.cmp(RDI, register=RBX)
    a.jcc(ops.CC_AE, "no_tables")
    a.lea(RBX, Mem(RDI, 1))
    a.st(vcpu("EPT_ALLOCATOR"), RBX)
    a.shl(RDI, 12)
    a.copy(RSI, RDI)
    a.add(RSI, register=R8)
    a.and_(RAX, ~e.EPT_LARGE)
    a.or_(RAX, e.EPT_EXECUTE, comment="small pages may hold code")
    zero(a, RBX)
    a.label("split_next")
    a.st(Mem(RSI, index=RBX, scale=8), RAX)
    a.add(RAX, 4096)
    a.add(RBX, 1)
    a.cmp(RBX, PAGE_WORDS)
    a.jcc(ops.CC_B, "split_next")
    a.or_(RDI, e.EPT_RWX)
    a.st(Mem(RCX), RDI)
    a.copy(RCX, RSI)


def _collect(a: Assembler, path: Path) -> None:
    """Take every word of the bitmap that is not zero, and make its pages fresh again."""
    a.label("collect_log")
    if path.vmm.dirty_log.ends:
        now(a)
        a.ld(RCX, vcpu("LOG_END"))
        a.cmp(RAX, register=RCX)
        a.jcc(ops.CC_AE, "stop_log")
    work(a, path, "collect_dirty_log")
    if uses_log(path):
        a.vmread(RAX, "PML_INDEX")
        a.cmp(RAX, LOG_EMPTY)
        a.jcc(ops.CC_Z, "collect_words")
        a.call("empty_log")
        a.label("collect_words")
    empty_others(a, path)
    a.ld(RAX, vcpu("DIRTY_ROUNDS"))
    a.add(RAX, 1)
    a.st(vcpu("DIRTY_ROUNDS"), RAX)
    a.ld(R12, vcpu("DIRTY_WORDS"))
    a.ld(R14, vcpu("DIRTY_BITMAP"))
    zero(a, R13)
    a.label("collect_next")
    a.ld(RBX, Mem(R14))
    a.test(RBX, register=RBX)
    a.jcc(ops.CC_Z, "collect_nothing")
    zero(a, RAX)
    a.sub(RAX, register=RBX)
    a.xadd(Mem(R14), RAX)  # others may set more bits meanwhile
    leaf_of(a, R13)
    a.cmp(RDX, 1)
    a.jcc(ops.CC_NZ, "collect_nothing", comment="it was unmapped since")
    a.call("refresh")
    a.label("collect_nothing")
    a.add(R14, 8)
    a.add(R13, 4096 * PAGES_OF_WORD)
    a.sub(R12, 1)
    a.jcc(ops.CC_NZ, "collect_next")
    a.jmp("log_done")


def _refresh(a: Assembler, path: Path) -> None:
    """`refresh`: of the leaves at RCX on, those whose bit is set in RBX are not written yet. Keeps RBX RCX."""
    flag, change = (e.EPT_DIRTY, -e.EPT_DIRTY) if uses_log(path) else (e.EPT_WRITE, WAS_WRITABLE - e.EPT_WRITE)
    a.label("refresh")
    a.copy(RDX, RBX)
    a.copy(RDI, RCX)
    zero(a, R9)
    a.label("refresh_next")
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_Z, "refresh_done")
    a.test(RDX, 1)
    a.jcc(ops.CC_Z, "refresh_other")
    a.ld(RAX, Mem(RDI))
    a.test(RAX, flag)
    a.jcc(ops.CC_Z, "refresh_other")
    a.mov(RAX, change)
    a.xadd(Mem(RDI), RAX)  # the processor may set other flags meanwhile
    a.add(R9, 1)
    a.label("refresh_other")
    a.add(RDI, 8)
    a.shr(RDX, 1)
    a.jmp("refresh_next")
    a.label("refresh_done")
    a.ld(RAX, vcpu("DIRTY_ROUNDS"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "refresh_uncounted", comment="logging only starts")
    a.ld(RAX, vcpu("DIRTY_PAGES"))
    a.add(RAX, register=R9)
    a.st(vcpu("DIRTY_PAGES"), RAX)
    a.label("refresh_uncounted")
    a.ret()


def _empty_log(a: Assembler, path: Path) -> None:
    """`empty_log` (its index in RAX): every address in the log is a page that was written. Keeps RBX."""
    a.label("empty_log")
    a.add(RAX, 1)
    a.and_(RAX, 0xFFFF)
    a.copy(R9, RAX)
    a.ld(R10, vcpu("PML_PAGE"))
    a.label("log_next")
    a.ld(RSI, Mem(R10, index=R9, scale=8))
    _note_page(a, path)
    a.add(R9, 1)
    a.cmp(R9, LOG_ENTRIES)
    a.jcc(ops.CC_B, "log_next")
    a.mov(RAX, LOG_EMPTY)
    a.vmwrite("PML_INDEX", RAX)
    a.ret()
