"""Copying an address space whose tables hold host-physical addresses, and giving the copy up.

The child's tables are ordinary memory while they are filled. Then the kernel's own mappings of them become read-only
and the root is pinned, which has the hypervisor validate all of them at once; unpinned, they are memory again. A kernel
that maps singly, as one that is a process of its host, pins tables without pages and then maps page by page.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept import direct as d
from vtsim.ept import spec as e
from vtsim.ept.tables import TO_TABLE
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.hypercalls import look_up, request, take_table, to_machine, to_physical
from vtsim.guest.kernel.lengths import length
from vtsim.guest.kernel.ring3 import host_calls

ENTRIES = 512
TABLE_SPAN = 0x1F_F000  # bits that number the entry of a last-level table
SPANS = {level: 1 << (12 + 9 * (level - 1)) for level in (2, 3, 4)}  # what an entry of each level maps


def copy_space(a: Assembler, kernel: KernelOptions) -> None:
    """Share every page of the task at RBX, read-only, with the child at R12. R12 and RBX stay."""
    a.ld(s.R14, Mem(s.RBX, at.T_AREAS))
    a.ld(s.R15, Mem(s.RBX, at.T_AREA_COUNT))
    a.label("fork_area")
    a.ld(s.R13, Mem(s.R14, at.A_START))
    a.label("fork_table")
    a.copy(s.RSI, s.R13)
    look_up(a)
    for level, span in SPANS.items():
        a.cmp(s.RDX, level)
        a.jcc(ops.CC_NZ, f"fork_not_{level}")
        a.and_(s.R13, -span)
        a.add(s.R13, span)
        a.jmp("fork_beyond")
        a.label(f"fork_not_{level}")
    a.push(s.RCX)
    a.push(s.R11)
    a.call("child_entry")
    a.pop(s.R11)
    a.pop(s.R9)
    a.label("fork_entry")  # parent's at R9, host-physical R11; child's at RBP
    a.ld(s.RAX, Mem(s.R9))
    a.test(s.RAX, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "fork_next")
    a.work(length("copy_shared_page"))
    a.copy(s.RSI, s.RAX)
    a.and_(s.RSI, ~e.PTE_WRITE)
    if not kernel.on_host:
        a.st(Mem(s.RBP), s.RSI)
    a.test(s.RAX, e.PTE_WRITE)
    a.jcc(ops.CC_Z, "fork_next")
    a.copy(s.RDI, s.R11)
    a.call("pv_request")
    a.label("fork_next")
    for register, step in ((s.R13, 4096), (s.R9, 8), (s.R11, 8), (s.RBP, 8)):
        a.add(register, step)
    a.ld(s.RAX, Mem(s.R14, at.A_END))
    a.cmp(s.R13, register=s.RAX)
    a.jcc(ops.CC_AE, "fork_area_done")
    a.test(s.R13, TABLE_SPAN)
    a.jcc(ops.CC_NZ, "fork_entry")
    a.jmp("fork_table")
    a.label("fork_beyond")
    a.ld(s.RAX, Mem(s.R14, at.A_END))
    a.cmp(s.R13, register=s.RAX)
    a.jcc(ops.CC_B, "fork_table")
    a.label("fork_area_done")
    a.add(s.R14, at.AREA_BYTES)
    a.sub(s.R15, 1)
    a.jcc(ops.CC_NZ, "fork_area")
    a.call("pin_space")
    if kernel.on_host:
        map_singly(a, "fork", s.RBX, text_only=False)


def map_singly(a: Assembler, name: str, parent: int, *, text_only: bool) -> None:
    """Ask for an entry of the task at R12 for each page that its parent has, in its areas or in those of its text.

    R12 and `parent` stay, which is a register. Before, the host unmaps whatever a new process has from its parent.
    """
    a.call("unmap_space")
    a.ld(s.R14, Mem(s.R12, at.T_AREAS))
    a.ld(s.R15, Mem(s.R12, at.T_AREA_COUNT))
    a.label(f"{name}_single_area")
    if text_only:
        a.ld(s.RAX, Mem(s.R14, at.A_ZONE))
        a.test(s.RAX, -1)
        a.jcc(ops.CC_NZ, f"{name}_single_area_done")
    a.ld(s.R13, Mem(s.R14, at.A_START))
    a.label(f"{name}_single")
    a.copy(s.RSI, s.R13)
    look_up(a, parent)
    a.cmp(s.RDX, 1)
    a.jcc(ops.CC_Z, f"{name}_single_leaf")
    a.and_(s.R13, -SPANS[2])
    a.add(s.R13, SPANS[2])
    a.jmp(f"{name}_single_more")
    a.label(f"{name}_single_leaf")
    a.test(s.RAX, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, f"{name}_single_next")
    a.push(s.RAX)
    a.copy(s.RSI, s.R13)
    look_up(a, s.R12)
    a.copy(s.RDI, s.R11)
    a.pop(s.RSI)
    a.call("pv_request")
    a.label(f"{name}_single_next")
    a.add(s.R13, 4096)
    a.label(f"{name}_single_more")
    a.ld(s.RAX, Mem(s.R14, at.A_END))
    a.cmp(s.R13, register=s.RAX)
    a.jcc(ops.CC_B, f"{name}_single")
    a.label(f"{name}_single_area_done")
    a.add(s.R14, at.AREA_BYTES)
    a.sub(s.R15, 1)
    a.jcc(ops.CC_NZ, f"{name}_single_area")
    a.call("pv_send")


@path("direct spaces")
def direct_spaces(a: Assembler, kernel: KernelOptions) -> None:
    """Tables that are memory become a pinned space, and memory again; entries in them while they are memory."""
    if not kernel.paravirtual:
        return
    a.activity = ops.SYSCALL_PATH
    a.label("child_entry")  # RBP <- where the entry for R13 of the child at R12 stands, tables on the way being made
    a.copy(s.RSI, s.R13)
    look_up(a, s.R12)
    a.copy(s.RBP, s.RCX)
    a.cmp(s.RDX, 1)
    a.jcc(ops.CC_NZ, "child_table")
    a.ret()
    a.label("child_table")
    take_table(a, kernel, "no_memory", s.R12)
    to_machine(a, s.RDX)
    a.or_(s.RDX, TO_TABLE)
    a.st(Mem(s.RBP), s.RDX)
    a.jmp("child_entry")
    _pin(a, kernel)
    _give_up(a, kernel)
    if kernel.on_host:
        _unmap(a, kernel)


def _pin(a: Assembler, kernel: KernelOptions) -> None:
    """`pin_space`: the tables of the child at R12 are read-only and validated. R12 and RBX stay."""
    a.label("pin_space")
    if kernel.ring3:
        _user_root(a, kernel, copied=True)
    _each_table(a, "pv_protect", kernel)
    for root in _roots(kernel):
        a.ld(s.RSI, Mem(s.R12, root))
        request(a, d.PIN)
    a.ret()


def _give_up(a: Assembler, kernel: KernelOptions) -> None:
    """`give_up_space`: the tables of the child at R12 are memory again, and its root leads nowhere. R12, RBX stay."""
    a.label("give_up_space")
    for root in _roots(kernel):
        a.ld(s.RSI, Mem(s.R12, root))
        request(a, d.UNPIN)
    _each_table(a, "pv_release", kernel)
    a.call("pv_send")
    a.ld(s.RDX, Mem(s.R12, at.T_ROOT))
    to_physical(a, s.RDX)
    a.mov(s.RDI, at.DIRECT)
    a.add(s.RDI, register=s.RDX)
    for index in kernel.top_entries:
        a.st_value(Mem(s.RDI, 8 * index), 0)
    if kernel.ring3:
        _user_root(a, kernel, copied=False)
    a.ld(s.RAX, Mem(s.R12, at.T_TABLES_FIRST))
    a.st(Mem(s.R12, at.T_TABLES_NEXT), s.RAX)
    a.ret()


def _unmap(a: Assembler, kernel: KernelOptions) -> None:
    """`unmap_space`: what the child at R12 has no page or table for, by a call for each entry. R12 and RBX stay.

    No page is mapped yet. Source: fix_range of the port as it was until Linux 2.6.11, told to force what the host has.
    """
    a.label("unmap_space")
    a.ld(s.RDX, Mem(s.R12, at.T_ROOT))
    to_physical(a, s.RDX)
    a.mov(s.RCX, ENTRIES // 2, "those of processes")
    a.call("unmap_table")
    a.ld(s.R13, Mem(s.R12, at.T_TABLES_FIRST))
    a.label("unmap_next_table")
    a.ld(s.RAX, Mem(s.R12, at.T_TABLES_NEXT))
    a.cmp(s.R13, register=s.RAX)
    a.jcc(ops.CC_AE, "space_unmapped")
    a.copy(s.RDX, s.R13)
    a.shl(s.RDX, 12)
    a.mov(s.RCX, ENTRIES)
    a.call("unmap_table")
    a.add(s.R13, 1)
    a.jmp("unmap_next_table")
    a.label("unmap_table")  # at the guest-physical address RDX, RCX entries
    a.mov(s.RSI, at.DIRECT)
    a.add(s.RSI, register=s.RDX)
    a.label("unmap_entry")
    a.ld(s.RAX, Mem(s.RSI))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "entry_unmapped")
    host_calls(a, kernel, "munmap")
    a.label("entry_unmapped")
    a.add(s.RSI, 8)
    a.loop("unmap_entry")
    a.label("space_unmapped")
    a.ret()


def leave_space(a: Assembler, kernel: KernelOptions) -> None:
    """Run on tables that map the kernel alone, so that those of the running task can be given up."""
    a.ld(s.RSI, at.cpu_word(at.KERNEL_ROOT))
    request(a, d.LOAD)
    if kernel.ring3:
        request(a, d.LOAD_USER, 0)
    a.call("pv_send")


def enter_space(a: Assembler, kernel: KernelOptions) -> None:
    """Run on the pinned tables of the task at R12."""
    for root, kind in zip(_roots(kernel), (d.LOAD, d.LOAD_USER), strict=False):
        a.ld(s.RSI, Mem(s.R12, root))
        request(a, kind)
    a.call("pv_send")


def map_text(a: Assembler, kernel: KernelOptions) -> None:
    """Map the text of the task at R12 as its parent has it, into tables that are memory; no root entry stays empty."""
    a.ld(s.R14, Mem(s.R12, at.T_AREAS))
    a.ld(s.R15, Mem(s.R12, at.T_AREA_COUNT))
    a.label("text_area")
    a.ld(s.RAX, Mem(s.R14, at.A_ZONE))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "text_next_area")
    a.ld(s.R13, Mem(s.R14, at.A_START))
    a.label("text_page")
    a.work(length("map_file_page"))
    a.call("child_entry")
    a.ld(s.RDX, Mem(s.R12, at.T_PARENT))
    a.copy(s.RSI, s.R13)
    look_up(a, s.RDX)
    if not kernel.on_host:
        a.st(Mem(s.RBP), s.RAX)
    a.add(s.R13, at.PAGE)
    a.ld(s.RAX, Mem(s.R14, at.A_END))
    a.cmp(s.R13, register=s.RAX)
    a.jcc(ops.CC_B, "text_page")
    a.label("text_next_area")
    a.add(s.R14, at.AREA_BYTES)
    a.sub(s.R15, 1)
    a.jcc(ops.CC_NZ, "text_area")
    for index in kernel.top_entries:
        a.mov(s.R13, index << 39)
        a.call("child_entry")


def _roots(kernel: KernelOptions) -> tuple[int, ...]:
    """Words of a task with its roots: of the kernel, and of the process where the kernel is not mapped."""
    return (at.T_ROOT, at.T_USER_CR3) if kernel.ring3 else (at.T_ROOT,)


def _user_root(a: Assembler, kernel: KernelOptions, *, copied: bool) -> None:
    """The child's root without the kernel leads where the other does, or nowhere."""
    for register, root in ((s.RSI, at.T_ROOT), (s.RDI, at.T_USER_CR3)):
        a.ld(register, Mem(s.R12, root))
        to_physical(a, register)
        a.mov(s.RAX, at.DIRECT)
        a.add(register, register=s.RAX)
    for index in kernel.top_entries:
        if copied:
            a.ld(s.RAX, Mem(s.RSI, 8 * index))
            a.st(Mem(s.RDI, 8 * index), s.RAX)
        else:
            a.st_value(Mem(s.RDI, 8 * index), 0)


def _each_table(a: Assembler, what: str, kernel: KernelOptions) -> None:
    """Call `pv_protect` or `pv_release` for the roots and every table frame of the child at R12."""
    for root in _roots(kernel):
        a.ld(s.RDX, Mem(s.R12, root))
        to_physical(a, s.RDX)
        a.call(what)
    a.ld(s.R13, Mem(s.R12, at.T_TABLES_FIRST))
    a.label(f"each_{what}")
    a.ld(s.RAX, Mem(s.R12, at.T_TABLES_NEXT))
    a.cmp(s.R13, register=s.RAX)
    a.jcc(ops.CC_AE, f"each_{what}_done")
    a.copy(s.RDX, s.R13)
    a.shl(s.RDX, 12)
    a.call(what)
    a.add(s.R13, 1)
    a.jmp(f"each_{what}")
    a.label(f"each_{what}_done")
