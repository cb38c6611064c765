"""Replacing the image of a child: its address space is torn down, and the program's text is mapped into a new one.

What stands in the kernel's page cache is known from the parent's tables, where the text is mapped, too. Stack and data
come with page faults.

Not modelled: another program than the parent's; a new top-level table (the child's is emptied); exec without fork.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.ept import spec as e
from vtsim.ept.tables import TO_TABLE
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import direct_fork as direct
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.calls import flush_space
from vtsim.guest.kernel.fork import drop_pages
from vtsim.guest.kernel.lengths import length
from vtsim.guest.kernel.ring3 import disable, enable


@path("exec")
def exec_(a: Assembler, kernel: KernelOptions) -> None:
    """System call of a child: drop its pages and tables, and map its text anew."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_exec")
    a.work(length("exec"))
    disable(a, kernel)
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.copy(s.R12, s.RBX)
    drop_pages(a, kernel, "exec")
    if kernel.paravirtual:
        direct.leave_space(a, kernel)
        a.call("give_up_space")
        direct.map_text(a, kernel)
        a.call("pin_space")
        direct.enter_space(a, kernel)
        if kernel.on_host:
            a.ld(s.RBX, Mem(s.R12, at.T_PARENT))
            direct.map_singly(a, "exec", s.RBX, text_only=True)
    else:
        _replace_tables(a, kernel)
    enable(a, kernel)
    a.mov(s.RAX, 0)
    a.ret()


def _replace_tables(a: Assembler, kernel: KernelOptions) -> None:
    """The tables of the task at RBX are emptied where they stand, and its text is mapped again."""
    _clear(a, kernel)
    if kernel.protected:
        _forget_tables(a, kernel)
    else:
        a.ld(s.RSI, Mem(s.RBX, at.T_ROOT))
        a.add(s.RSI, register=s.R8)
        for index in kernel.top_entries:
            for root in (0, at.PAGE) if kernel.kpti else (0,):
                a.st_value(Mem(s.RSI, root + 8 * index), 0)
    a.ld(s.RAX, Mem(s.RBX, at.T_TABLES_FIRST))
    a.st(Mem(s.RBX, at.T_TABLES_NEXT), s.RAX)
    _map_text(a)
    if kernel.kpti:
        a.ld(s.RSI, Mem(s.RBX, at.T_ROOT))
        a.add(s.RSI, register=s.R8)
        for index in kernel.top_entries:
            a.ld(s.RAX, Mem(s.RSI, 8 * index))
            a.st(Mem(s.RSI, at.PAGE + 8 * index), s.RAX)
    flush_space(a, kernel)


def _areas(a: Assembler, name: str) -> None:
    """Begin a loop over the areas of the task at RBX: one is at R14, RAX is its zone, 0 for text."""
    a.ld(s.R14, Mem(s.RBX, at.T_AREAS))
    a.ld(s.R15, Mem(s.RBX, at.T_AREA_COUNT))
    a.label(name)
    a.ld(s.RAX, Mem(s.R14, at.A_ZONE))
    a.test(s.RAX, -1)


def _next_area(a: Assembler, name: str) -> None:
    a.add(s.R14, at.AREA_BYTES)
    a.sub(s.R15, 1)
    a.jcc(ops.CC_NZ, name)


def _forget_tables(a: Assembler, kernel: KernelOptions) -> None:
    """The entries of page directories are cleared, area by area. The directories themselves stay, with PAE paging."""
    pae = kernel.entry_bytes == 8
    reach = kernel.table_reach.bit_length() - 1
    _areas(a, "exec_forget")
    a.ld(s.R12, Mem(s.R14, at.A_START))
    a.and_(s.R12, -(1 << reach))
    a.label("exec_forget_table")
    a.ld(s.RSI, Mem(s.RBX, at.T_ROOT))
    a.mov(s.RDX, e.ADDRESS)
    a.and_(s.RSI, register=s.RDX)
    a.add(s.RSI, register=s.R8)
    if pae:
        a.copy(s.RCX, s.R12)
        a.shr(s.RCX, 30)
        a.ld(s.RSI, Mem(s.RSI, index=s.RCX, scale=8))
        a.and_(s.RSI, register=s.RDX)
        a.add(s.RSI, register=s.R8)
    a.copy(s.RCX, s.R12)
    a.shr(s.RCX, reach)
    if pae:
        a.and_(s.RCX, 511)
    a.st_value(Mem(s.RSI, index=s.RCX, scale=kernel.entry_bytes, size=kernel.entry_bytes), 0)
    a.add(s.R12, 1 << reach)
    a.ld(s.RAX, Mem(s.R14, at.A_END))
    a.cmp(s.R12, register=s.RAX)
    a.jcc(ops.CC_B, "exec_forget_table")
    _next_area(a, "exec_forget")


def _clear(a: Assembler, kernel: KernelOptions) -> None:
    """Clear the entries of data and stack. R8 <- where memory is mapped."""
    a.mov(s.R8, kernel.places.direct)
    _areas(a, "exec_clear")
    a.jcc(ops.CC_Z, "exec_clear_next")
    a.ld(s.RDI, Mem(s.RBX, at.T_ROOT))
    a.ld(s.RSI, Mem(s.R14, at.A_START))
    a.ld(s.RDX, Mem(s.R14, at.A_END))
    a.sub(s.RDX, register=s.RSI)
    a.shr(s.RDX, 12)
    a.mov(s.RAX, 0)
    a.hook(hooks.TABLE_CLEAR)
    a.label("exec_clear_next")
    _next_area(a, "exec_clear")


def _map_text(a: Assembler) -> None:
    """Map every page of the text, as the parent's tables have it."""
    _areas(a, "exec_map")
    a.jcc(ops.CC_NZ, "exec_map_next")
    a.ld(s.R12, Mem(s.R14, at.A_START))
    a.label("exec_map_page")
    a.work(length("map_file_page"))
    a.ld(s.RDI, Mem(s.RBX, at.T_PARENT))
    a.ld(s.RDI, Mem(s.RDI, at.T_ROOT))
    a.copy(s.RSI, s.R12)
    a.mov(s.R10, e.PTE_PRESENT)
    a.hook(hooks.TABLE_LOOKUP)
    a.copy(s.RCX, s.RDX)
    a.copy(s.RDX, s.RAX)
    a.ld(s.RDI, Mem(s.RBX, at.T_ROOT))
    a.ld(s.R9, Mem(s.RBX, at.T_TABLES))
    a.mov(s.R10, TO_TABLE)
    a.mov(s.R11, 0)
    a.hook(hooks.TABLE_MAP)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "no_memory")
    a.ld(s.RAX, Mem(s.R14, at.A_BYTES))
    a.add(s.R12, register=s.RAX)
    a.ld(s.RAX, Mem(s.R14, at.A_END))
    a.cmp(s.R12, register=s.RAX)
    a.jcc(ops.CC_B, "exec_map_page")
    a.label("exec_map_next")
    _next_area(a, "exec_map")
