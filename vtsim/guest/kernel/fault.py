"""Page faults: demand paging and copy-on-write; and what happens to a task that faults without reason.

The area of the address is searched in the task's table of areas, a frame is taken from the area's zone, zeroed and
mapped. A write to a page that fork left read-only copies the page while it is shared, and else makes it writable.

With several CPUs threads of a process fault beside each other: who comes second finds the page there. An entry is
looked at and stored under the lock of its table; missing tables are made before, under the lock of those above.

Not modelled: the shared zero page; reference counts of pages (a task and its one child share); interrupts while a
page fault is handled; a signal that ends all threads of a process.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.ept import spec as e
from vtsim.ept.tables import TO_TABLE
from vtsim.guest.kernel import KernelOptions, hypercalls, path, ring3, smp
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.flush import flush_user_half
from vtsim.guest.kernel.free_pages import give_frame, take_frame
from vtsim.guest.kernel.lengths import length


def each_page(a: Assembler, hook: int, name: str) -> None:
    """Apply a page hook to RDI (and RSI) over A_BYTES of the area at R14. Clobbers RCX."""
    a.ld(s.RCX, Mem(s.R14, at.A_BYTES))
    a.shr(s.RCX, 12)
    a.label(name)
    a.hook(hook)
    a.add(s.RDI, 4096)
    a.add(s.RSI, 4096)
    a.loop(name)


def flush_user_page(a: Assembler, kernel: KernelOptions) -> None:
    """Drop the translations of the address in R12: INVLPG, and under KPTI the user PCID at the way out."""
    if kernel.paravirtual:
        hypercalls.flush_page(a)
        a.call("pv_send")
        return
    a.op(ops.INVLPG, mem=Mem(s.R12))
    if kernel.kpti and kernel.pcid:
        flush_user_half(a)


def map_page(a: Assembler, kernel: KernelOptions, empty: str = "no_memory") -> None:
    """Map the page RDX at the address R12 as the area at R14 says, for the task at RBX; to `empty` without tables."""
    a.ld(s.RAX, Mem(s.R14, at.A_LEAF))
    a.or_(s.RDX, register=s.RAX)
    map_entry(a, kernel, empty)


def map_entry(a: Assembler, kernel: KernelOptions, empty: str = "no_memory") -> None:
    """Put the entry RDX, with a guest-physical address, at the address R12 of the area at R14."""
    if kernel.paravirtual:
        a.copy(s.RSI, s.R12)
        a.call("pv_map")
        a.test(s.RAX, -1)
        a.jcc(ops.CC_NZ, empty)
        return
    a.ld(s.RCX, Mem(s.R14, at.A_LEVEL))
    _map_at_level(a, kernel)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, empty)


def _map_at_level(a: Assembler, kernel: KernelOptions) -> None:
    """Put the entry RDX of level RCX at the address R12 of the task at RBX; RAX <- not 0 without tables."""
    a.ld(s.RDI, Mem(s.RBX, at.T_ROOT))
    a.ld(s.R9, Mem(s.RBX, at.T_TABLES))
    a.copy(s.RSI, s.R12)
    a.mov(s.R8, kernel.places.direct)
    a.mov(s.R10, TO_TABLE)
    a.mov(s.R11, 0)
    a.hook(hooks.TABLE_MAP)


def find_entry(a: Assembler, kernel: KernelOptions, task: int, address: int) -> None:
    """RAX <- the entry of an address of a task or 0, RCX <- where it stands; paravirtual: R11 <- its host's address."""
    if kernel.paravirtual:
        a.copy(s.RSI, address)
        hypercalls.look_up(a, task)
        return
    a.ld(s.RDI, Mem(task, at.T_ROOT))
    a.copy(s.RSI, address)
    a.mov(s.R8, kernel.places.direct)
    a.mov(s.R10, e.PTE_PRESENT)
    a.hook(hooks.TABLE_LOOKUP)


def put_entry(a: Assembler, kernel: KernelOptions) -> None:
    """Store RAX as the entry that `find_entry` has found; paravirtual: request it. Clobbers RAX, RCX, RDI, RSI."""
    if kernel.paravirtual:
        a.copy(s.RDI, s.R11)
        a.copy(s.RSI, s.RAX)
        a.call("pv_request")
    else:
        a.st(kernel.entry, s.RAX)


def frame_of(a: Assembler, kernel: KernelOptions) -> None:
    """RDX <- the physical address of the page that the entry RAX maps, for the guest's own lists. Keeps RAX."""
    if kernel.paravirtual:
        a.copy(s.RDX, s.RAX)
        hypercalls.to_physical(a, s.RDX)
    else:
        a.mov(s.RDX, e.ADDRESS)
        a.and_(s.RDX, register=s.RAX)


def page_of(a: Assembler, kernel: KernelOptions, entry: int, spare: int) -> None:
    """The entry in a register becomes the address that `frame_of` gives. Clobbers `spare`."""
    if kernel.paravirtual:
        hypercalls.to_physical(a, entry)
    else:
        a.mov(spare, e.ADDRESS)
        a.and_(entry, register=spare)


@path("page fault")
def page_fault(a: Assembler, kernel: KernelOptions) -> None:
    """Page fault: find the area, take a frame, zero it, map it; or copy-on-write; or the end of the task."""
    a.activity = ops.PAGE_FAULT_PATH
    a.label("page_fault")
    ring3.fault_address(a, kernel, s.R12)
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.ld(s.RAX, kernel.word(at.F_CS))
    a.test(s.RAX, 3)
    a.jcc(ops.CC_Z, "kill")
    a.ld(s.RAX, Mem(s.RBX, at.T_FAULTS))
    a.add(s.RAX, 1)
    a.st(Mem(s.RBX, at.T_FAULTS), s.RAX)
    a.work(length("fault_enter"))
    a.ld(s.R14, Mem(s.RBX, at.T_AREAS))
    a.ld(s.RCX, Mem(s.RBX, at.T_AREA_COUNT))
    a.label("next_area")
    a.ld(s.RAX, Mem(s.R14, at.A_START))
    a.cmp(s.R12, register=s.RAX)
    a.jcc(ops.CC_B, "other_area")
    a.ld(s.RAX, Mem(s.R14, at.A_END))
    a.cmp(s.R12, register=s.RAX)
    a.jcc(ops.CC_B, "area_found")
    a.label("other_area")
    a.add(s.R14, at.AREA_BYTES)
    a.loop("next_area")
    a.jmp("kill")
    a.label("area_found")
    a.ld(s.R13, Mem(s.R14, at.A_ZONE))
    a.ld(s.R15, Mem(s.R14, at.A_LEAF))
    a.ld(s.RBP, kernel.word(at.F_ERROR))
    a.test(s.RBP, e.PF_FETCH | e.PF_RESERVED)
    a.jcc(ops.CC_NZ, "kill")
    a.test(s.RBP, e.PF_WRITE)
    a.jcc(ops.CC_Z, "may_access")
    a.test(s.R15, e.PTE_WRITE)
    a.jcc(ops.CC_Z, "kill")
    a.label("may_access")
    a.test(s.RBP, e.PF_PRESENT)
    a.jcc(ops.CC_NZ, "present_fault")
    if kernel.file:
        a.ld(s.RAX, Mem(s.R14, at.A_FILE))
        a.test(s.RAX, -1)
        a.jcc(ops.CC_NZ, "file_fault")
    a.test(s.R13, -1)
    a.jcc(ops.CC_Z, "kill")
    if kernel.several:
        a.call("lock_read")
        find_entry(a, kernel, s.RBX, s.R12)
        a.test(s.RAX, -1)
        a.jcc(ops.CC_NZ, "fault_settled")
    take_frame(a, kernel, "no_memory")
    a.copy(s.RDI, s.RDX)
    a.mov(s.RAX, kernel.places.direct)
    a.add(s.RDI, register=s.RAX)
    each_page(a, hooks.PAGE_ZERO, "zero_page")
    a.work(length("fault_map", several=kernel.several))
    if kernel.several:
        _map_unless_there(a, kernel)
    else:
        map_page(a, kernel)
    a.label("fault_done")
    a.work(length("fault_exit"))
    a.jmp("fault_leave")


def _map_unless_there(a: Assembler, kernel: KernelOptions) -> None:
    """The same under the lock of the table: another thread may have mapped a page there meanwhile."""
    a.copy(s.R15, s.RDX)
    lock_entry(a)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "fault_beaten")
    a.copy(s.RDX, s.R15)
    map_page(a, kernel, "fault_no_tables")
    a.label("fault_unlock")
    a.call("unlock_table")
    a.label("fault_settled")
    a.call("unlock_read")
    a.jmp("fault_done")
    a.label("fault_beaten")
    a.call("unlock_table")
    a.copy(s.RDX, s.R15)
    give_frame(a, kernel)
    a.jmp("fault_settled")
    a.label("fault_no_tables")
    a.call("unlock_table")
    a.jmp("no_memory")


def lock_entry(a: Assembler) -> None:
    """RAX <- the entry of the address R12 in the area at R14, of the task at RBX, or 0; what guards it is locked.

    RCX <- where it stands, RDX <- its level; paravirtual: R11 <- its host's address. Without a frame for a table the
    task ends. Clobbers RSI, RDI, R8 to R11.
    """
    a.call("lock_entry")
    a.test(s.RDX, -1)
    a.jcc(ops.CC_Z, "no_memory")


@path("entries under their locks")
def locked_entries(a: Assembler, kernel: KernelOptions) -> None:
    """`lock_entry`: find an entry and lock it, the tables above it being made first; RDX <- 0 without a frame for one.

    Source: Linux 6.1, mm/memory.c: __handle_mm_fault, __pte_alloc, do_anonymous_page.
    Not modelled: Linux takes the frame of a table before it takes the lock.
    """
    if not kernel.several:
        return
    a.activity = ops.PAGE_FAULT_PATH
    a.label("lock_entry")
    a.ld(s.RAX, Mem(s.R14, at.A_LEVEL))
    a.cmp(s.RAX, 1)
    a.jcc(ops.CC_NZ, "lock_large_entry")
    find_entry(a, kernel, s.RBX, s.R12)
    a.cmp(s.RDX, 1)
    a.jcc(ops.CC_NZ, "lock_makes_tables")
    a.label("lock_small_entry")
    smp.lock_table(a, kernel)
    a.ld(s.RAX, kernel.entry)
    a.mov(s.RDX, 1)
    a.ret()
    a.label("lock_large_entry")
    smp.lock_upper_tables(a)
    smp.hold(a, at.M_TABLES_SERVING)
    find_entry(a, kernel, s.RBX, s.R12)
    a.ret()
    a.label("lock_makes_tables")
    smp.lock_upper_tables(a)
    _make_tables(a, kernel)
    smp.unlock_upper_tables(a)
    find_entry(a, kernel, s.RBX, s.R12)
    a.jmp("lock_small_entry")
    a.label("lock_no_table")
    smp.unlock_upper_tables(a)
    a.mov(s.RDX, 0)
    a.ret()


def _make_tables(a: Assembler, kernel: KernelOptions) -> None:
    """Make the tables for the address in R12 that are missing, down to the last level, unless another thread has."""
    if kernel.paravirtual:
        a.call("pv_tables")
        a.test(s.RAX, -1)
        a.jcc(ops.CC_NZ, "lock_no_table")
        return
    find_entry(a, kernel, s.RBX, s.R12)
    a.cmp(s.RDX, 1)
    a.jcc(ops.CC_Z, "lock_tables_there")
    hypercalls.take_table(a, kernel, "lock_no_table")
    a.or_(s.RDX, TO_TABLE)
    a.mov(s.RCX, 2)
    _map_at_level(a, kernel)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "lock_no_table")
    a.label("lock_tables_there")


@path("copy on write")
def copy_on_write(a: Assembler, kernel: KernelOptions) -> None:
    """A write to a page that fork left read-only: copy it while it is shared, else make it writable."""
    a.activity = ops.PAGE_FAULT_PATH
    a.label("present_fault")
    a.test(s.RBP, e.PF_WRITE)
    a.jcc(ops.CC_Z, "kill")
    if kernel.several:
        a.call("lock_read")
        lock_entry(a)
    else:
        find_entry(a, kernel, s.RBX, s.R12)
    if kernel.several:  # another thread may have unmapped it, or made it writable
        a.test(s.RAX, -1)
        a.jcc(ops.CC_Z, "fault_unlock")
        a.test(s.RAX, e.PTE_WRITE)
        a.jcc(ops.CC_NZ, "fault_unlock")
    a.copy(s.RBP, s.RAX)
    if kernel.file:
        a.ld(s.RDX, Mem(s.R14, at.A_FILE))
        a.test(s.RDX, -1)
        a.jcc(ops.CC_NZ, "page_of_file")
    a.ld(s.RDX, Mem(s.RBX, at.T_SHARED))
    a.test(s.RDX, -1)
    a.jcc(ops.CC_NZ, "copy_page")
    a.label("own_page")
    a.work(length("fault_reuse", several=kernel.several))
    a.or_(s.RAX, e.PTE_WRITE)
    if kernel.ring3:  # both at once
        hypercalls.update_address(a, kernel)
    else:
        put_entry(a, kernel)
        flush_user_page(a, kernel)
    if kernel.file and kernel.file.queue:
        a.jmp("file_dirtied")
    else:
        a.jmp("fault_unlock" if kernel.several else "fault_done")
    a.label("copy_page")
    smp.call(a, kernel, "unlock_table")
    take_frame(a, kernel, "no_memory")
    a.mov(s.RAX, kernel.places.direct)
    a.copy(s.RDI, s.RDX)
    a.add(s.RDI, register=s.RAX)
    page_of(a, kernel, s.RBP, s.RCX)
    a.copy(s.RSI, s.RBP)
    a.add(s.RSI, register=s.RAX)
    each_page(a, hooks.PAGE_COPY, "copy_next")
    a.work(length("fault_copy", several=kernel.several))
    if kernel.several:
        a.copy(s.R15, s.RDX)
        lock_entry(a)
        a.copy(s.RDX, s.R15)
    map_page(a, kernel)
    flush_user_page(a, kernel)
    a.jmp("fault_unlock" if kernel.several else "fault_done")


def _give_lock_back(a: Assembler, kernel: KernelOptions, name: str) -> None:
    """Give the lock of the address space back, where the fault has taken it."""
    if kernel.several:
        a.ld(s.RDI, at.cpu_word(at.HELD))
        a.test(s.RDI, -1)
        a.jcc(ops.CC_Z, f"{name}_nothing")
        a.call("unlock_read")
        a.label(f"{name}_nothing")


@path("kill")
def kill(a: Assembler, kernel: KernelOptions) -> None:
    """A fault without remedy ends the task; the log line says which, where and at what address.

    One of the kernel's own, where it was reckoned with, goes on at the task's T_FIXUP, as Linux's exception table says.
    """
    a.activity = ops.PAGE_FAULT_PATH
    a.label("no_memory")
    a.mov(s.R15, at.NO_MEMORY)
    a.jmp("write_log")
    a.label("kill")
    a.mov(s.R15, at.KILLED)
    a.ld(s.RAX, kernel.word(at.F_CS))
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.test(s.RAX, 3)
    a.ld(s.RAX, Mem(s.RBX, at.T_ACTION))
    a.jcc(ops.CC_NZ, "kill_or_signal")
    a.ld(s.RAX, Mem(s.RBX, at.T_FIXUP))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "write_log")
    a.st(kernel.word(at.F_RIP), s.RAX)
    a.jmp("leave")
    a.label("kill_or_signal")
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "write_log")
    _give_lock_back(a, kernel, "before_signal")
    a.jmp("signal_for_fault")
    a.label("write_log")
    _give_lock_back(a, kernel, "before_end")
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.ld(s.RDI, Mem(s.RBX, at.T_LOG))
    a.st(Mem(s.RDI, at.L_REASON), s.R15)
    for line, word in ((at.L_VECTOR, at.F_VECTOR), (at.L_ERROR, at.F_ERROR), (at.L_RIP, at.F_RIP)):
        a.ld(s.RAX, kernel.word(word))
        a.st(Mem(s.RDI, line), s.RAX)
    ring3.fault_address(a, kernel, s.RAX)
    a.st(Mem(s.RDI, at.L_CR2), s.RAX)
    a.st(Mem(s.RDI, at.L_CAUSE), s.R15)
    a.ld(s.RAX, Mem(s.RDI, at.L_KILLED))
    a.add(s.RAX, 1)
    a.st(Mem(s.RDI, at.L_KILLED), s.RAX)
    a.work(length("kill"))
    a.jmp("end_task")
