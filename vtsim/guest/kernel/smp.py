"""Several CPUs: locks, and dropping translations on other CPUs by interrupts (TLB shootdown).

A process has one thread on a CPU at most, so a thread's words are what that CPU keeps of the address space. Who has
changed an entry drops its own translations, then asks every CPU where a thread of the process has its space loaded, and
waits; the others answer from the interrupt. A CPU that is idle on a borrowed space, or runs another process, is not
interrupted: it flushes when it switches back. A paravirtual kernel interrupts nobody (`direct_flush`).

Whoever waits for another CPU's answer or for the lock of an address space has interrupts on, and keeps its CPU. The
locks of zones and of tables are held for a few instructions only, with interrupts off. Each last-level table has a lock
of its own, in what is known of its frame; those above, and leaves there, have one lock for each address space.

Not modelled: waiters for the lock of an address space sleep in Linux; moving tasks between CPUs, and waking one from
another; locks of single page directories (USE_SPLIT_PMD_PTLOCKS); locks of tables that fork copies and that a child's
end drops, which nobody else can want.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, files, path
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.flush import flush_range
from vtsim.guest.kernel.interrupt_flag import disable, enable
from vtsim.guest.kernel.lengths import length

X2APIC_ICR: Final = 0x830
CPU_BYTES: Final = at.ENTRY_PAGES * at.PAGE  # from the data of one CPU to that of the next
GATHERED: Final = at.GATHER_PAGES * at.PAGE // 8


def count_tasks(a: Assembler, kernel: KernelOptions, register: int) -> None:
    """`register` <- how many tasks are in the ring of this CPU."""
    if kernel.several:
        a.ld(register, at.cpu_word(at.TASKS_HERE))
    else:
        a.mov(register, kernel.tasks)


# --- locks ----------------------------------------------------------------------------------------------------------
def lock(a: Assembler, ticket: Mem, serving: Mem, spare: int) -> None:
    """Take a ticket and wait for its turn, with interrupts off. Clobbers RAX and `spare`."""
    name = f"lock_{a.here:x}"
    a.mov(s.RAX, 1)
    a.xadd(ticket, s.RAX)
    a.label(name)
    a.ld(spare, serving)
    a.cmp(spare, register=s.RAX)
    a.jcc(ops.CC_Z, f"{name}_mine")
    a.op(ops.PAUSE)
    a.jmp(name)
    a.label(f"{name}_mine")


def unlock(a: Assembler, serving: Mem) -> None:
    """Let the next one have its turn. Clobbers RAX."""
    a.ld(s.RAX, serving)
    a.add(s.RAX, 1)
    a.st(serving, s.RAX)


def lock_zone(a: Assembler, kernel: KernelOptions, spare: int) -> None:
    """The zone at R13 is ours."""
    if kernel.several:
        lock(a, Mem(s.R13, at.Z_TICKET), Mem(s.R13, at.Z_SERVING), spare)


def unlock_zone(a: Assembler, kernel: KernelOptions) -> None:
    """The zone at R13 is free again. Clobbers RAX."""
    if kernel.several:
        unlock(a, Mem(s.R13, at.Z_SERVING))


def lock_upper_tables(a: Assembler) -> None:
    """The tables above the last level of the task at RBX are ours. Clobbers RAX, RCX; RDI <- the space."""
    a.ld(s.RDI, Mem(s.RBX, at.T_SPACE))
    lock(a, Mem(s.RDI, at.M_TABLES_TICKET), Mem(s.RDI, at.M_TABLES_SERVING), s.RCX)


def unlock_upper_tables(a: Assembler) -> None:
    """They are free again. Clobbers RAX and RDI."""
    a.ld(s.RDI, Mem(s.RBX, at.T_SPACE))
    unlock(a, Mem(s.RDI, at.M_TABLES_SERVING))


def hold(a: Assembler, serving: int) -> None:
    """Remember the lock that was taken at RDI: `unlock_table` gives it back. Changes RDI."""
    a.add(s.RDI, serving)
    a.st(at.cpu_word(at.TABLE_LOCK), s.RDI)


def lock_table(a: Assembler, kernel: KernelOptions) -> None:
    """The last-level table is ours whose entry is at RCX. Clobbers RAX, RDX and RDI.

    Source: Linux 6.1, include/linux/mm.h: pte_lockptr, pte_offset_map_lock.
    """
    first = kernel.page_structs - at.PAGE_STRUCT_BYTES * ((at.DIRECT & (1 << 64) - 1) // at.PAGE)
    a.copy(s.RDI, s.RCX)
    a.shr(s.RDI, 12)
    a.shl(s.RDI, at.PAGE_STRUCT_BYTES.bit_length() - 1)
    a.mov(s.RAX, first)
    a.add(s.RDI, register=s.RAX)
    lock(a, Mem(s.RDI, at.PTL_TICKET), Mem(s.RDI, at.PTL_SERVING), s.RDX)
    hold(a, at.PTL_SERVING)


@path("locks of tables")
def table_locks(a: Assembler, kernel: KernelOptions) -> None:
    """Subroutines for who goes along entries: `lock_table` locks that of the entry at RCX unless one is locked already.

    `unlock_table` gives back what is locked, if anything is. They clobber RAX, RDX and RDI. Called with interrupts off.
    """
    if not kernel.several:
        return
    a.activity = ops.PAGE_FAULT_PATH
    a.label("lock_table")
    a.ld(s.RDI, at.cpu_word(at.TABLE_LOCK))
    a.test(s.RDI, -1)
    a.jcc(ops.CC_NZ, "table_locked")
    lock_table(a, kernel)
    a.label("table_locked")
    a.ret()
    a.label("unlock_table")
    a.ld(s.RDI, at.cpu_word(at.TABLE_LOCK))
    a.test(s.RDI, -1)
    a.jcc(ops.CC_Z, "table_unlocked")
    unlock(a, Mem(s.RDI))
    a.st_value(at.cpu_word(at.TABLE_LOCK), 0)
    a.label("table_unlocked")
    a.ret()


def lock_table_of(a: Assembler, kernel: KernelOptions) -> None:
    """Lock the table of the entry RAX at RCX, unless it is: the entry is read again. Clobbers RDX and RDI."""
    if kernel.several:
        a.call("lock_table")
        a.ld(s.RAX, kernel.entry)


def unlock_at_end_of_table(a: Assembler, kernel: KernelOptions, name: str) -> None:
    """Give the lock of a table back where the address in R12, the next one's, is the first of another table."""
    if kernel.several:
        a.test(s.R12, kernel.table_reach - 1)
        a.jcc(ops.CC_NZ, f"{name}_same_table")
        a.call("unlock_table")
        a.label(f"{name}_same_table")


def call(a: Assembler, kernel: KernelOptions, subroutine: str) -> None:
    """Call one of the subroutines below, where there are several CPUs."""
    if kernel.several:
        a.call(subroutine)


def _wait(a: Assembler, kernel: KernelOptions, name: str, word: Mem, done: Callable[[], None]) -> None:
    """Until `done` (which looks at RCX, the word) finds CC_Z, spin with interrupts on."""
    a.ld(s.RCX, word)
    done()
    a.jcc(ops.CC_Z, f"{name}_over")
    enable(a, kernel)
    a.label(name)
    a.op(ops.PAUSE)
    a.ld(s.RCX, word)
    done()
    a.jcc(ops.CC_NZ, name)
    disable(a, kernel)
    a.label(f"{name}_over")


@path("address-space locks")
def space_locks(a: Assembler, kernel: KernelOptions) -> None:
    """Subroutines `lock_read`, `lock_write` and `unlock_…` of the space of the task at RBX: readers, or one writer.

    Called with interrupts off. Change RAX, RCX and RDI.
    """
    if not kernel.several:
        return
    for kind in ("read", "write"):
        a.activity = ops.PAGE_FAULT_PATH if kind == "read" else ops.SYSCALL_PATH
        a.label(f"lock_{kind}")
        a.ld(s.RDI, Mem(s.RBX, at.T_SPACE))
        a.st(at.cpu_word(at.HELD), s.RDI)
        a.mov(s.RAX, 1)
        a.xadd(Mem(s.RDI, at.M_TICKET), s.RAX)
        _wait(a, kernel, f"lock_{kind}_turn", Mem(s.RDI, at.M_SERVING), lambda: a.cmp(s.RCX, register=s.RAX))
        if kind == "read":
            a.mov(s.RAX, 1)
            a.xadd(Mem(s.RDI, at.M_READERS), s.RAX)
            unlock(a, Mem(s.RDI, at.M_SERVING))
        else:
            _wait(a, kernel, "lock_write_readers", Mem(s.RDI, at.M_READERS), lambda: a.test(s.RCX, -1))
        a.ret()
        a.label(f"unlock_{kind}")
        a.ld(s.RDI, at.cpu_word(at.HELD))
        if kind == "read":
            a.mov(s.RAX, -1)
            a.xadd(Mem(s.RDI, at.M_READERS), s.RAX)
        else:
            unlock(a, Mem(s.RDI, at.M_SERVING))
        a.st_value(at.cpu_word(at.HELD), 0)
        a.ret()


@path("lock of files")
def file_lock(a: Assembler, kernel: KernelOptions) -> None:
    """Subroutines `lock_files` and `unlock_files` of the process's files at R11; between them interrupts are off.

    The first clobbers RAX and RCX, the second RCX. Source: Linux 6.1, fs/file.c: alloc_fd and close_fd, `file_lock`.
    """
    if not kernel.files_locked:
        return
    a.activity = ops.SYSCALL_PATH
    a.label("lock_files")
    disable(a, kernel)
    lock(a, Mem(s.R11, files.TICKET), Mem(s.R11, files.SERVING), s.RCX)
    a.ret()
    a.label("unlock_files")
    a.copy(s.RCX, s.RAX)
    unlock(a, Mem(s.R11, files.SERVING))
    a.copy(s.RAX, s.RCX)
    enable(a, kernel)
    a.ret()


# --- shootdown ------------------------------------------------------------------------------------------------------
def take_space(a: Assembler) -> None:
    """In a switch to the task at RSI: say which space is loaded now, before it is decided whether CR3 must be."""
    a.ld(s.RAX, Mem(s.RSI, at.T_CR3))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "takes_space")
    a.st_value(at.cpu_word(at.LAZY), 1)
    a.jmp("same_space")
    a.label("takes_space")
    a.st_value(at.cpu_word(at.LAZY), 0)
    a.st(at.cpu_word(at.LOADED_TASK), s.RSI)


def flush_when_loaded(a: Assembler, kernel: KernelOptions, task: int) -> None:
    """The next load of a task's CR3 flushes. Clobbers RAX and RCX."""
    if not kernel.pcid:
        return
    a.mov(s.RCX, ~at.NOFLUSH)
    for word in (at.T_CR3, at.T_USER_CR3):
        a.ld(s.RAX, Mem(task, word))
        a.and_(s.RAX, register=s.RCX)
        a.st(Mem(task, word), s.RAX)


@path("shootdown")
def shootdown(a: Assembler, kernel: KernelOptions) -> None:
    """Subroutine `shoot_down`: other CPUs drop RSI pages from RDI on, of the space of the task at RBX, meanwhile.

    Called with interrupts off and the space's lock held, by which the task keeps its CPU. Keeps RBX, RBP, R12 to R15.
    """
    if not kernel.several or kernel.paravirtual:
        return
    a.activity = ops.SYSCALL_PATH
    a.label("shoot_down")
    a.st(at.cpu_word(at.FLUSH_START), s.RDI)
    a.st(at.cpu_word(at.FLUSH_PAGES), s.RSI)
    a.ld(s.RSI, Mem(s.RBX, at.T_PEER))
    a.cmp(s.RSI, register=s.RBX)
    a.jcc(ops.CC_Z, "shot")
    a.work(length("call_others"))
    each_that_may_have_it(a, kernel)
    a.ld(s.RDX, Mem(s.RDI, at.APIC_ID))
    a.st(Mem(displacement=at.ASKED, index=s.RDX, scale=8, segment=2), s.RSI)
    a.ld(s.RAX, at.cpu_word(at.CALLS_SENT))
    a.add(s.RAX, 1)
    a.st(at.cpu_word(at.CALLS_SENT), s.RAX)
    a.mov(s.RCX, X2APIC_ICR)
    a.mov(s.RAX, at.CALL_VECTOR)
    a.op(ops.WRMSR)
    next_thread(a)
    a.op(ops.STI)
    a.ld(s.RSI, Mem(s.RBX, at.T_PEER))
    a.label("shoot_await")
    a.ld(s.RDI, Mem(s.RSI, at.T_CPU))
    a.ld(s.RDX, Mem(s.RDI, at.APIC_ID))
    a.jmp("shoot_look")
    a.label("shoot_spin")
    a.op(ops.PAUSE)
    a.label("shoot_look")
    a.ld(s.RAX, Mem(displacement=at.ASKED, index=s.RDX, scale=8, segment=2))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "shoot_spin")
    a.ld(s.RSI, Mem(s.RSI, at.T_PEER))
    a.cmp(s.RSI, register=s.RBX)
    a.jcc(ops.CC_NZ, "shoot_await")
    a.op(ops.CLI)
    a.label("shot")
    a.ret()


def each_that_may_have_it(a: Assembler, kernel: KernelOptions) -> None:
    """Go through the other threads from that at RSI on. What follows asks the CPU whose data is at RDI to flush.

    Whoever runs on the space has to be asked; others flush when they load it. Changes RAX and RCX.
    """
    a.label("shoot_next")
    a.ld(s.RDI, Mem(s.RSI, at.T_CPU))
    _ask_if_loaded(a, "shoot_unloaded")
    a.label("shoot_unloaded")
    flush_when_loaded(a, kernel, s.RSI)
    a.ld(s.RAX, Mem(s.RDI, at.LOADED_TASK))
    a.cmp(s.RAX, register=s.RSI)
    a.jcc(ops.CC_NZ, "shoot_other")
    a.st_value(Mem(s.RDI, at.LOADED_CR3), 0, "so that whoever is idle on it loads it again")
    _ask_if_loaded(a, "shoot_other")
    a.jmp("shoot_other")
    a.label("shoot_ask")


def next_thread(a: Assembler) -> None:
    """The end of what is done for each; behind it all threads but that at RBX were looked at."""
    a.label("shoot_other")
    a.ld(s.RSI, Mem(s.RSI, at.T_PEER))
    a.cmp(s.RSI, register=s.RBX)
    a.jcc(ops.CC_NZ, "shoot_next")


def _ask_if_loaded(a: Assembler, otherwise: str) -> None:
    """To `shoot_ask` if the CPU whose data is at RDI runs on the space of the task at RSI, else to `otherwise`."""
    a.ld(s.RAX, Mem(s.RDI, at.LOADED_TASK))
    a.cmp(s.RAX, register=s.RSI)
    a.jcc(ops.CC_NZ, otherwise)
    a.ld(s.RAX, Mem(s.RDI, at.LAZY))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "shoot_ask")


@path("call-function interrupt")
def called(a: Assembler, kernel: KernelOptions) -> None:
    """Another CPU asks (R8 this CPU, R9 the other's data), or interrupts for primitive `ipi`.

    Drop what it says of the loaded space, and tell it.
    """
    if not kernel.several:
        return
    a.activity = ops.INTERRUPT_PATH
    a.label("called")
    if not kernel.paravirtual:
        _see_to_calls(a, kernel)
    a.jmp("interrupt_done")


def count_ipi(a: Assembler) -> None:
    """Count the interrupt whose vector is in RBX, if it is one that another CPU waits for."""
    a.cmp(s.RBX, at.IPI_VECTOR)
    a.jcc(ops.CC_NZ, "no_ipi")
    a.ld(s.RAX, at.cpu_word(at.IPIS))
    a.add(s.RAX, 1)
    a.st(at.cpu_word(at.IPIS), s.RAX)
    a.label("no_ipi")


def _see_to_calls(a: Assembler, kernel: KernelOptions) -> None:
    """Drop what other CPUs ask to drop, and tell them."""
    a.ld(s.R8, at.cpu_word(at.APIC_ID))
    a.mov(s.R9, at.CPU_DATA)
    a.mov(s.R10, kernel.cpus)
    a.label("called_by")
    a.ld(s.RBX, Mem(s.R9, at.ASKED, index=s.R8, scale=8))
    a.test(s.RBX, -1)
    a.jcc(ops.CC_Z, "called_next")
    a.work(length("call_flush"))
    a.ld(s.RAX, at.cpu_word(at.TLB_CALLS))
    a.add(s.RAX, 1)
    a.st(at.cpu_word(at.TLB_CALLS), s.RAX)
    a.ld(s.RAX, at.cpu_word(at.LOADED_TASK))
    a.cmp(s.RAX, register=s.RBX)
    a.jcc(ops.CC_NZ, "called_late")
    flush_as_asked(a, kernel)
    a.jmp("called_done")
    a.label("called_late")
    flush_when_loaded(a, kernel, s.RBX)
    a.label("called_done")
    a.mov(s.RAX, 0)
    a.st(Mem(s.R9, at.ASKED, index=s.R8, scale=8), s.RAX)
    a.label("called_next")
    a.add(s.R9, CPU_BYTES)
    a.sub(s.R10, 1)
    a.jcc(ops.CC_NZ, "called_by")


def flush_as_asked(a: Assembler, kernel: KernelOptions) -> None:
    """Drop the pages that the CPU whose data is at R9 asks to drop, of the loaded space, that of the task at RBX."""
    a.ld(s.RBP, Mem(s.R9, at.FLUSH_PAGES))
    a.ld(s.R12, Mem(s.R9, at.FLUSH_START))
    flush_range(a, kernel, "called", s.RBP)
