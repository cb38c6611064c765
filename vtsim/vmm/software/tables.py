"""What a guest's kernel asks its hooks for, executed as the loops that they stand for, access by access.

Each load and store is an instruction of the guest: it is found like any other, and its address is translated.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R8, R9, R10, R11, R14, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept.spec import ADDRESS, PTE_PRESENT
from vtsim.vmm.monitor.layout import RAM, V, saved, vcpu
from vtsim.vmm.monitor.memory import count
from vtsim.vmm.software import layout as w
from vtsim.vmm.software.instructions import fetch
from vtsim.vmm.software.mmu import LARGE, READ, WRITE, load, look_up, store

PRESENT_ANY: Final = 7
LINES: Final = 64  # of a page: instructions of a sweep over it


def accesses(a: Assembler, *, translates: bool) -> None:
    """`table_load`: RAX <- memory at RSI. `table_store`: memory at RSI <- R8. One instruction of the guest each."""
    a.activity = ops.EXIT_HANDLER
    for name in ("table_load", "table_store"):
        a.label(name)
        if not translates:
            a.push(RSI)
            fetch(a, "next", "next")
            a.pop(RSI)
        a.add(R14, 1)
        if name == "table_load":
            load(a)
        else:
            store(a, R8)
        a.ret()


def entry_at(a: Assembler, address: int, *, level: int = R10) -> None:
    """RSI <- linear address of the entry of table R9, for the register `address` and the shift in `level`."""
    a.copy(RSI, address)
    a.emit(ops.SHR, RSI, level)
    a.and_(RSI, 511)
    a.shl(RSI, 3)
    a.ld(RAX, saved(R8))
    a.add(RSI, register=RAX)
    a.add(RSI, register=R9)


def table_of(a: Assembler, register: int, source: int) -> None:
    """`register` <- the table that an entry in `source` leads to. Clobbers RDX."""
    a.mov(RDX, ADDRESS)
    if register != source:
        a.copy(register, source)
    a.and_(register, register=RDX)


def look_up_entry(a: Assembler) -> None:
    """TABLE_LOOKUP."""
    a.ld(R9, saved(RDI))
    table_of(a, R9, R9)
    a.mov(R10, 39)
    a.label("lookup_level")
    a.ld(RDX, saved(RSI))
    entry_at(a, RDX)
    a.st(vcpu("SCRATCH", 3), RSI)
    a.call("table_load")
    a.ld(RDX, saved(R10))
    a.and_(RDX, register=RAX)
    a.jcc(ops.CC_Z, "lookup_absent")
    a.cmp(R10, 12)
    a.jcc(ops.CC_Z, "lookup_found")
    a.cmp(R10, 30)
    a.jcc(ops.CC_A, "lookup_below")
    a.test(RAX, LARGE)
    a.jcc(ops.CC_NZ, "lookup_found")
    a.label("lookup_below")
    table_of(a, R9, RAX)
    a.sub(R10, 9)
    a.jmp("lookup_level")
    a.label("lookup_absent")
    a.mov(RAX, 0)
    a.label("lookup_found")
    a.st(saved(RAX), RAX)
    a.ld(RAX, vcpu("SCRATCH", 3))
    a.st(saved(RCX), RAX)
    a.mov(RAX, 0)
    a.label("lookup_count")
    a.add(RAX, 1)
    a.sub(R10, 9)
    a.cmp(R10, 12 - 9)
    a.jcc(ops.CC_G, "lookup_count")
    a.st(saved(RDX), RAX)
    a.jmp("hook_done")


def new_table(a: Assembler) -> None:
    """`new_table`: RAX <- number of a frame of the guest's allocator, zeroed; 0 if none is left. Clobbers R8."""
    a.label("new_table")
    a.ld(RSI, saved(R9))
    a.call("table_load")
    a.copy(R8, RAX)
    a.add(RSI, 8)
    a.call("table_load")
    a.cmp(R8, register=RAX)
    a.jcc(ops.CC_AE, "new_table_none")
    a.push(R8)
    a.copy(RSI, R8)
    a.shl(RSI, 12)
    a.ld(RAX, saved(R8))
    a.add(RSI, register=RAX)
    a.call("zero_page")
    a.ld(RSI, saved(R9))
    a.ld(R8, Mem(RSP))
    a.add(R8, 1)
    a.call("table_store")
    a.pop(RAX)
    a.ret()
    a.label("new_table_none")
    a.mov(RAX, 0)
    a.ret()


def map_entry(a: Assembler) -> None:
    """TABLE_MAP."""
    a.ld(R9, saved(RDI))
    table_of(a, R9, R9)
    a.mov(R10, 39)
    a.ld(RCX, saved(RCX))
    a.mov(RAX, 4)
    a.sub(RAX, register=RCX)
    a.st(vcpu("SCRATCH", 4), RAX)  # levels above the leaf
    a.label("map_level")
    a.ld(RDX, saved(RSI))
    entry_at(a, RDX)
    a.call("table_load")
    a.ld(RDX, vcpu("SCRATCH", 4))
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_Z, "map_leaf")
    a.sub(RDX, 1)
    a.st(vcpu("SCRATCH", 4), RDX)
    a.test(RAX, PRESENT_ANY)
    a.jcc(ops.CC_NZ, "map_below")
    a.push(RSI)
    a.call("new_table")
    a.pop(RSI)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "map_empty")
    a.shl(RAX, 12)
    a.ld(R8, saved(R10))
    a.or_(R8, register=RAX)
    a.call("table_store")
    a.copy(RAX, R8)
    a.label("map_below")
    table_of(a, R9, RAX)
    a.sub(R10, 9)
    a.jmp("map_level")
    a.label("map_leaf")
    a.ld(R8, saved(RDX))
    a.st(saved(RDX), RAX)
    a.call("table_store")
    a.st_value(saved(RAX), 0)
    a.st_value(saved(R11), 0)
    a.jmp("hook_done")
    a.label("map_empty")
    a.st_value(saved(RAX), 1)
    a.jmp("hook_done")


def clear_entries(a: Assembler) -> None:
    """TABLE_CLEAR: registers say how far it is, as the guest sees when it is interrupted by a fault."""
    a.label("clear_page")
    a.ld(RAX, saved(RDX))
    a.cmp(RAX, 0)
    a.jcc(ops.CC_LE, "hook_done")
    a.ld(R9, saved(RDI))
    table_of(a, R9, R9)
    a.mov(R10, 39)
    a.label("clear_level")
    a.ld(RDX, saved(RSI))
    entry_at(a, RDX)
    a.call("table_load")
    a.test(RAX, PTE_PRESENT)
    a.jcc(ops.CC_Z, "clear_next")
    a.cmp(R10, 12)
    a.jcc(ops.CC_Z, "clear_leaf")
    table_of(a, R9, RAX)
    a.sub(R10, 9)
    a.jmp("clear_level")
    a.label("clear_leaf")
    a.mov(R8, 0)
    a.call("table_store")
    a.ld(RAX, saved(RAX))
    a.add(RAX, 1)
    a.st(saved(RAX), RAX)
    a.label("clear_next")
    a.ld(RAX, saved(RSI))
    a.add(RAX, 4096)
    a.st(saved(RSI), RAX)
    a.ld(RAX, saved(RDX))
    a.sub(RAX, 1)
    a.st(saved(RDX), RAX)
    a.jmp("clear_page")


SOURCES, TARGETS, INDEXES = 0, 5, 10  # words of COPY, by level


def copy_word(base: int) -> Mem:
    """The word of COPY for the level in R10."""
    return Mem(R15, V["COPY"] + 8 * base, index=R10, scale=8)


def copy_tables(a: Assembler) -> None:
    """TABLE_COPY."""
    for register, base in ((RDI, SOURCES), (RSI, TARGETS)):
        a.ld(RAX, saved(register))
        table_of(a, RAX, RAX)
        a.st(vcpu("COPY", base + 4), RAX)
    a.ld(RAX, saved(RDX))
    a.st(vcpu("COPY", INDEXES + 4), RAX)
    a.mov(R10, 4)
    a.label("copy_entry")
    a.mov(RAX, 511)
    a.cmp(R10, 4)
    a.jcc(ops.CC_NZ, "copy_below_top")
    a.ld(RAX, saved(RCX))
    a.label("copy_below_top")
    a.ld(RDX, copy_word(INDEXES))
    a.cmp(RDX, register=RAX)
    a.jcc(ops.CC_LE, "copy_here")
    a.cmp(R10, 4)
    a.jcc(ops.CC_Z, "copy_done")
    a.add(R10, 1)
    a.label("copy_next")
    a.ld(RAX, copy_word(INDEXES))
    a.add(RAX, 1)
    a.st(copy_word(INDEXES), RAX)
    a.jmp("copy_entry")
    a.label("copy_here")
    a.shl(RDX, 3)
    a.ld(RAX, saved(R8))
    a.add(RDX, register=RAX)
    a.ld(RSI, copy_word(SOURCES))
    a.add(RSI, register=RDX)
    a.ld(RAX, copy_word(TARGETS))
    a.add(RDX, register=RAX)
    a.st(vcpu("SCRATCH", 3), RDX)
    a.call("table_load")
    a.test(RAX, PTE_PRESENT)
    a.jcc(ops.CC_Z, "copy_next")
    a.cmp(R10, 1)
    a.jcc(ops.CC_Z, "copy_leaf")
    a.test(RAX, LARGE)
    a.jcc(ops.CC_NZ, "copy_leaf")
    a.st(vcpu("SCRATCH", 4), RAX)
    a.call("new_table")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "copy_empty")
    a.shl(RAX, 12)
    a.st(vcpu("SCRATCH", 5), RAX)
    a.ld(R8, vcpu("SCRATCH", 4))
    a.and_(R8, 0xFFF)
    a.or_(R8, register=RAX)
    a.ld(RSI, vcpu("SCRATCH", 3))
    a.call("table_store")
    a.sub(R10, 1)
    a.ld(RAX, vcpu("SCRATCH", 4))
    table_of(a, RAX, RAX)
    a.st(copy_word(SOURCES), RAX)
    a.ld(RAX, vcpu("SCRATCH", 5))
    a.st(copy_word(TARGETS), RAX)
    a.st_value(copy_word(INDEXES), 0)
    a.jmp("copy_entry")
    a.label("copy_leaf")
    a.ld(R8, saved(R10))
    a.emit(ops.XOR, R8, imm=-1)
    a.and_(R8, register=RAX)
    a.cmp(R8, register=RAX)
    a.jcc(ops.CC_Z, "copy_shared")
    a.call("table_store")
    a.label("copy_shared")
    a.ld(RSI, vcpu("SCRATCH", 3))
    a.call("table_store")
    a.ld(RAX, saved(RAX))
    a.add(RAX, 1)
    a.st(saved(RAX), RAX)
    a.jmp("copy_next")
    a.label("copy_empty")
    a.st_value(saved(RAX), -1)
    a.label("copy_done")
    a.st_value(saved(R11), 0)
    a.jmp("hook_done")


def pages(a: Assembler) -> None:
    """PAGE_ZERO and PAGE_COPY: as REP STOS and REP MOVS, a page at a time; code that was known there is forgotten."""
    a.label("zero_page")  # RSI its linear address. Clobbers RDI
    look_up(a, WRITE, 1)
    a.add(RSI, register=RDX)
    a.call("forget_code")
    a.copy(RDI, RSI)
    a.hook(hooks.PAGE_ZERO)
    a.add(R14, LINES)
    a.ret()
    a.label("forget_code")  # RSI where a page stands that changes
    a.mov(RAX, RAM)
    a.copy(RCX, RSI)
    a.sub(RCX, register=RAX)
    a.shr(RCX, 12)
    a.ld(RAX, vcpu("CODE_PAGES"))
    a.ld(RDX, Mem(RAX, index=RCX, scale=8))
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_NZ, "forget_known")
    a.ret()
    a.label("forget_known")
    a.st_value(Mem(RAX, index=RCX, scale=8), 0)
    a.jmp("forget_all")
    a.label("forget_all")  # all that was decoded or translated goes. Clobbers RDI, RAX and RCX
    count(a, "CODE_FLUSHES")
    a.ld(RDI, vcpu("DECODED"))
    a.mov(RCX, w.ENTRIES * w.ENTRY_BYTES // 4096)
    a.label("forget_page_of_code")
    a.hook(hooks.PAGE_ZERO)
    a.add(RDI, 4096)
    a.loop("forget_page_of_code")
    a.ret()


def zero_page(a: Assembler) -> None:
    """PAGE_ZERO."""
    a.ld(RSI, saved(RDI))
    a.call("zero_page")
    a.jmp("hook_done")


def copy_page(a: Assembler) -> None:
    """PAGE_COPY."""
    a.ld(RSI, saved(RSI))
    look_up(a, READ, 1)
    a.copy(R8, RSI)
    a.add(R8, register=RDX)
    a.ld(RSI, saved(RDI))
    look_up(a, WRITE, 1)
    a.add(RSI, register=RDX)
    a.call("forget_code")
    a.copy(RDI, RSI)
    a.copy(RSI, R8)
    a.hook(hooks.PAGE_COPY)
    a.add(R14, 2 * LINES)
    a.jmp("hook_done")


# fmt: off
HOOKS: Final = {
    hooks.TABLE_MAP: map_entry, hooks.TABLE_LOOKUP: look_up_entry, hooks.TABLE_CLEAR: clear_entries,
    hooks.TABLE_COPY: copy_tables, hooks.PAGE_ZERO: zero_page, hooks.PAGE_COPY: copy_page,
}
# fmt: on


def emit(a: Assembler, *, translates: bool) -> dict[int, str]:
    """Emit what executes each hook of a guest; the labels by number."""
    accesses(a, translates=translates)
    new_table(a)
    pages(a)
    a.label("hook_done")  # the hook itself is no instruction
    a.ld(RAX, vcpu("AFTER_HOOK"))
    a.add(RBX, register=RAX)
    a.jmp("next")
    names = {}
    for number, execute in HOOKS.items():
        names[number] = a.label(f"hook_{number}")
        a.ld(RAX, w.entry("LENGTH"))
        a.st(vcpu("AFTER_HOOK"), RAX)
        execute(a)
    return names
