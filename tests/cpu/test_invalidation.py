"""What invalidations reach, and what they leave alone.

SDM: "Virtual-Processor Identifier (VPID)"; "Virtual Processor Identifiers (VPIDs)".
SDM: "Caching Translation Information".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cpu.bench import DATA, TEXT, Native, Write, native, o_mem, virtual
from vtsim.base import memory as mem
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.kernels import translate as tr
from vtsim.cpu.kernels.contexts import set_context
from vtsim.cpu.kernels.rights import READ
from vtsim.ept import spec as e
from vtsim.ept.tables import EPT_PAGE, KERNEL_PAGE, PAGING, SIZE_4K, Table, host_table

AT = 1 << 30  # of the page that is walked to; divisible by every page size
WALK_CACHES = pytest.mark.parametrize("entries", [False, True], ids=["of tables", "of entries"])

# --- invalidation, by programs --------------------------------------------------------------------------------------

OLD, NEW = 0x1111, 0x2222
ENTRY = 0x680000  # where the program sees the paging structure that holds the entry for DATA


def two_frames(bench: Native, *, extra: int = 0) -> tuple[int, int]:
    """DATA maps a page that holds OLD; the words for a page that holds NEW: its entry, and the entry's address."""
    space = bench.space
    leaf = space.table.find(DATA)
    assert leaf is not None
    space.table.words(leaf.table)[leaf.index] |= extra
    space.table.map(ENTRY, leaf.table, KERNEL_PAGE)
    other = space.page(0x6A0000)
    space.put(DATA, OLD)
    space.put(0x6A0000, NEW)
    space.put(DATA + 0x1000, 0)
    return other << 12 | e.PTE_PRESENT | e.PTE_WRITE | extra, ENTRY + 8 * leaf.index


def remapped(bench: Native, entry: int, at: int, *ops: Any) -> list[int]:
    """What a load of DATA gives before and after the entry was changed and `ops` were executed."""

    def write(a: Assembler) -> None:
        a.ld(s.RBX, o_mem(DATA))
        a.mov(s.RAX, entry)
        a.st(o_mem(at), s.RAX)
        for emit in ops:
            emit(a)
        a.ld(s.RBP, o_mem(DATA))
        a.op(o.STOP_OP)

    assert bench.run(write) == 4
    return [bench.reg(s.RBX), bench.reg(s.RBP)]


def invlpg(a: Assembler) -> None:
    a.op(o.INVLPG, mem=o_mem(DATA))


def reload_cr3(a: Assembler) -> None:
    a.op(o.MOV_FROM_CR, s.RDX, imm=3)
    a.op(o.MOV_TO_CR, s.RDX, imm=3)


def reload_cr3_keeping(a: Assembler) -> None:
    a.op(o.MOV_FROM_CR, s.RDX, imm=3)
    a.mov(s.RDI, 1 << 63)
    a.alu(o.OR, s.RDX, register=s.RDI)
    a.op(o.MOV_TO_CR, s.RDX, imm=3)


def toggle_cr4(bit: int) -> Any:
    def emit(a: Assembler) -> None:
        for _ in range(2):
            a.op(o.MOV_FROM_CR, s.RDX, imm=4)
            a.alu(o.XOR, s.RDX, 1 << bit)
            a.op(o.MOV_TO_CR, s.RDX, imm=4)

    return emit


def pcide(a: Assembler) -> None:
    a.op(o.MOV_FROM_CR, s.RDX, imm=4)
    a.alu(o.OR, s.RDX, 1 << 17)
    a.op(o.MOV_TO_CR, s.RDX, imm=4)
    a.ld(s.RBX, o_mem(DATA))


def invpcid(kind: int, pcid: int = 0) -> Any:
    def emit(a: Assembler) -> None:
        a.mov(s.RDX, pcid)
        a.st(o_mem(DATA + 0x1800), s.RDX)
        a.mov(s.RDX, DATA)
        a.st(o_mem(DATA + 0x1808), s.RDX)
        a.mov(s.RDI, kind)
        a.op(o.INVPCID, s.RDI, mem=o_mem(DATA + 0x1800))

    return emit


def nothing(a: Assembler) -> None:
    a.op(o.NOP)


@pytest.mark.parametrize(
    ("prepare", "ops", "is_global", "seen"),
    [
        (nothing, nothing, False, OLD),
        (nothing, invlpg, False, NEW),
        (nothing, invlpg, True, NEW),
        (nothing, reload_cr3, False, NEW),
        (nothing, reload_cr3, True, OLD),
        (nothing, toggle_cr4(7), True, NEW),
        (nothing, toggle_cr4(20), False, NEW),
        (pcide, reload_cr3, False, NEW),
        (pcide, reload_cr3_keeping, False, OLD),
        (pcide, invpcid(0), False, NEW),
        (pcide, invpcid(0, 1), False, OLD),
        (pcide, invpcid(0), True, NEW),
        (pcide, invpcid(1), False, NEW),
        (pcide, invpcid(1, 5), False, OLD),
        (pcide, invpcid(1), True, OLD),
        (pcide, invpcid(2), True, NEW),
        (pcide, invpcid(3), True, OLD),
        (pcide, invpcid(3), False, NEW),
    ],
)
def test_an_invalidation_reaches_what_the_manual_says(prepare: Any, ops: Any, is_global: bool, seen: int) -> None:
    bench = native()
    entry, at = two_frames(bench, extra=e.PTE_GLOBAL if is_global else 0)

    def before(a: Assembler) -> None:
        prepare(a)
        if prepare is not nothing:
            a.mov(s.RAX, entry)
            a.st(o_mem(at), s.RAX)
        ops(a)

    if prepare is nothing:
        assert remapped(bench, entry, at, before) == [OLD, seen]
    else:
        kept = bench.space.get(at)
        assert remapped(bench, kept, at, before) == [OLD, seen]


@WALK_CACHES
def test_a_page_fault_forgets_the_page_so_that_a_repaired_upper_entry_is_seen(entries: bool) -> None:
    bench = native({"features.entry_walk_cache": entries})
    space = bench.space
    leaf = space.table.find(DATA)
    assert leaf is not None
    directory = next(t for t in space.table.tables() if leaf.table in space.table.words(t) >> 12 & (1 << 40) - 1)
    index = (DATA >> 21) & 511
    space.table.words(directory)[index] &= ~e.PTE_WRITE  # the whole table read-only
    space.table.map(1 << 40, directory, KERNEL_PAGE)

    def handler(a: Assembler) -> None:
        a.ld(s.RAX, o_mem((1 << 40) + 8 * index))
        a.or_(s.RAX, e.PTE_WRITE)
        a.st(o_mem((1 << 40) + 8 * index), s.RAX)
        a.add(s.RBP, 1)
        a.add(s.RSP, 8)
        a.op(o.IRET)

    def write(a: Assembler) -> None:
        a.ld(s.RBX, o_mem(DATA))
        a.st_value(o_mem(DATA), 77)
        a.op(o.STOP_OP)

    space.gate(14, TEXT + 0x8000)
    space.code(handler, TEXT + 0x8000)

    assert bench.run(write) == 4
    assert (bench.reg(s.RBP), space.get(DATA)) == (1, 77)


def test_invlpg_drops_every_piece_of_a_large_page() -> None:
    """A 2 MiB page of the guest on 4 KiB pages of EPT is kept in pieces; INVLPG of one address drops them all."""
    bench = virtual()
    guest = bench.guest
    at = 0x4000_0000
    old, new = 512, 1024
    for first, value in ((old, OLD), (new, NEW)):
        for n in range(2):
            hfn = bench.engine.allocate()
            assert guest.ept is not None
            guest.ept.map((first + n) << 12, hfn, EPT_PAGE)
            bench.engine.store(hfn << 12, value)
    guest.table.map(at, old, KERNEL_PAGE, 1)
    leaf = guest.table.find(at)
    assert leaf is not None
    guest.table.map(ENTRY, leaf.table, KERNEL_PAGE, SIZE_4K)

    def write(a: Assembler) -> None:
        a.ld(s.RAX, o_mem(at))
        a.ld(s.RBX, o_mem(at + 0x1000))
        a.mov(s.RDX, new << 12 | KERNEL_PAGE | e.PTE_LARGE)
        a.st(o_mem(ENTRY + 8 * leaf.index), s.RDX)
        a.op(o.INVLPG, mem=o_mem(at))
        a.ld(s.RSI, o_mem(at))
        a.ld(s.RDI, o_mem(at + 0x1000))
        a.op(o.STOP_OP)

    assert bench.run(write) == 4
    assert [bench.reg(r) for r in (s.RAX, s.RBX, s.RSI, s.RDI)] == [OLD, OLD, NEW, NEW]


@WALK_CACHES
def test_an_ept_violation_forgets_the_address_so_that_a_repaired_upper_entry_is_seen(entries: bool) -> None:
    bench = virtual({"features.entry_walk_cache": entries, "pwc.pde.ways": 32})
    ept = bench.guest.ept
    assert ept is not None
    upper = ept.words(ept.root)
    table = (int(upper[0]) & e.ADDRESS) >> 12
    directory = (int(ept.words(table)[0]) & e.ADDRESS) >> 12
    ept.words(directory)[0] &= ~e.EPT_WRITE  # 0 to 2 MiB read-only: all of the guest
    bench.space.table.map(1 << 40, directory, KERNEL_PAGE)

    def handler(a: Assembler) -> None:
        a.ld(s.RAX, o_mem(1 << 40))
        a.or_(s.RAX, e.EPT_WRITE)
        a.st(o_mem(1 << 40), s.RAX)
        a.add(s.RBP, 1)
        a.op(o.VMRESUME)

    def write(a: Assembler) -> None:
        a.ld(s.RBX, o_mem(DATA))
        a.st_value(o_mem(DATA), 77)
        a.op(o.STOP_OP)

    for gva in (DATA, TEXT):  # flags set beforehand: only the store itself needs to write
        set_flags(bench.guest.table, gva)

    bench.set(EPT_POINTER=bench.field("EPT_POINTER") & ~0x40)
    assert bench.run(write, handler=handler) == 4
    assert bench.guest.get(DATA) == 77
    assert bench.reg(s.RBP) in (1, 2)


def set_flags(table: Table, gva: int) -> None:
    for page in table.tables():
        words = table.words(page)
        words[words & 1 != 0] |= e.PTE_ACCESSED | e.PTE_DIRTY


def test_without_vpid_a_vm_exit_drops_the_guests_translations() -> None:
    walks = []
    for controls in ({}, {"VPID": 0}):
        bench = virtual()

        def write(a: Assembler) -> None:
            a.ld(s.RBX, o_mem(DATA))
            a.op(o.CPUID)
            a.ld(s.RBX, o_mem(DATA))
            a.op(o.STOP_OP)

        def handler(a: Assembler) -> None:
            a.vmread(s.RAX, "GUEST_RIP")
            a.add(s.RAX, 2)
            a.vmwrite("GUEST_RIP", s.RAX)
            a.op(o.VMRESUME)

        if controls:
            bench.set(SECONDARY_PROC_CONTROLS=bench.field("SECONDARY_PROC_CONTROLS") & ~(1 << 5))
        assert bench.run(write, handler=handler) == 4
        walks.append(int(bench.engine.arena[bench.engine.owner("vm") + k.WALKS]))

    assert walks[1] > walks[0] == 2  # one for the code page, one for DATA


@pytest.mark.compiled_only
def test_a_flood_of_contexts_starts_numbering_again_and_confuses_nobody() -> None:
    """4096 PCIDs and their globals are more contexts than there are numbers; odd and even PCIDs use two tables."""
    bench = native()
    engine, m = bench.engine, bench.m
    bench.start()
    m[s.CR4] |= 1 << 17
    tables = [host_table(engine, PAGING) for _ in range(2)]
    for n, table in enumerate(tables):
        table.map(AT, 0x100 + n, KERNEL_PAGE)
    for n in range(4500):
        m[s.CR3] = tables[n & 1].root << 12 | (n % 4096)
        set_context(m, engine.arena)

        assert int(tr.translate(m, engine.arena, engine.tags, np.int64(AT), READ, 0)) == (0x100 + (n & 1)) << 12


# --- INVVPID and INVEPT ---------------------------------------------------------------------------------------------

INVALIDATIONS = [
    # op, type, descriptor's first word (None: the guest's EPTP), seen after the guest's entry or EPT's entry changed
    (None, 0, 0, OLD, OLD),
    (o.INVVPID, 0, 1, NEW, OLD),
    (o.INVVPID, 0, 2, OLD, OLD),
    (o.INVVPID, 1, 1, NEW, OLD),
    (o.INVVPID, 1, 2, OLD, OLD),
    (o.INVVPID, 2, 0, NEW, OLD),
    (o.INVVPID, 3, 1, NEW, OLD),
    (o.INVEPT, 1, None, NEW, NEW),
    (o.INVEPT, 1, 0x5000, OLD, OLD),
    (o.INVEPT, 2, 0, NEW, NEW),
]


@pytest.mark.parametrize("dimension", ["guest", "EPT"])
@pytest.mark.parametrize(("op", "kind", "descriptor", "guest_seen", "ept_seen"), INVALIDATIONS)
def test_invvpid_reaches_linear_mappings_and_invept_all_that_came_through_ept(
    op: int | None, kind: int, descriptor: int | None, guest_seen: int, ept_seen: int, dimension: str
) -> None:
    """The nested TLB keeps guest-physical mappings, which INVVPID leaves alone."""
    bench = virtual()
    guest, host = bench.guest, bench.space
    assert guest.ept is not None
    other = guest.page(0x6A0000)
    guest.put(DATA, OLD)
    guest.put(0x6A0000, NEW)
    leaf = guest.table.find(DATA)
    assert leaf is not None
    if dimension == "guest":
        host.table.map(1 << 40, guest.hfn(leaf.table), KERNEL_PAGE)
        index, entry = leaf.index, other << 12 | 7
    else:
        at = guest.ept.find(leaf.frame << 12)
        assert at is not None
        host.table.map(1 << 40, at.table, KERNEL_PAGE)
        index, entry = at.index, guest.hfn(other) << 12 | EPT_PAGE
    host.put(DATA + 0x900, bench.field("EPT_POINTER") if descriptor is None else descriptor)
    host.put(DATA + 0x908, DATA)

    def handler(a: Assembler) -> None:
        a.mov(s.RAX, entry)
        a.st(o_mem((1 << 40) + 8 * index), s.RAX)
        if op is not None:
            a.mov(s.RAX, kind)
            a.op(op, s.RAX, mem=o_mem(DATA + 0x900))
        a.vmread(s.RAX, "GUEST_RIP")
        a.add(s.RAX, 2)
        a.vmwrite("GUEST_RIP", s.RAX)
        a.op(o.VMRESUME)

    def write(a: Assembler) -> None:
        a.ld(s.RBX, o_mem(DATA))
        a.op(o.CPUID)
        a.ld(s.RBP, o_mem(DATA))
        a.op(o.STOP_OP)

    assert bench.run(write, handler=handler) == 4
    assert [bench.reg(s.RBX), bench.reg(s.RBP)] == [OLD, guest_seen if dimension == "guest" else ept_seen]


@pytest.mark.parametrize("ops", [invlpg, reload_cr3, invpcid(0), invpcid(1), invpcid(2), invpcid(3), toggle_cr4(7)])
def test_what_a_guest_invalidates_is_gone_under_every_ept_pointer(ops: Any) -> None:
    """It was used under both of a list, changes, and is invalidated under one: under the other it is not found again.

    SDM: "Operations that Invalidate Cached Mappings"; "EPTP Switching".
    """
    bench = virtual()
    guest, engine = bench.guest, bench.engine
    assert guest.ept is not None
    roots = [guest.ept.root, engine.allocate()]
    engine.contents(roots[1], mem.TABLE)[:] = guest.ept.words(roots[0])
    pointers = engine.allocate()
    for n, root in enumerate(roots):
        engine.store((pointers << 12) + 8 * n, root << 12 | bench.field("EPT_POINTER") & 0xFFF)
    other = guest.page(0x6A0000)
    guest.put(DATA, OLD)
    guest.put(0x6A0000, NEW)
    guest.put(DATA + 0x1000, 0)
    leaf = guest.table.find(DATA)
    assert leaf is not None
    guest.table.map(ENTRY, leaf.table, KERNEL_PAGE)

    def switch(a: Assembler, number: int) -> None:
        a.mov(s.RAX, 0)
        a.mov(s.RCX, number)
        a.op(o.VMFUNC)

    def write(a: Assembler) -> None:
        a.ld(s.RBX, o_mem(DATA))
        switch(a, 1)
        a.ld(s.RBX, o_mem(DATA))
        a.mov(s.RAX, other << 12 | KERNEL_PAGE)
        a.st(o_mem(ENTRY + 8 * leaf.index), s.RAX)
        ops(a)
        switch(a, 0)
        a.ld(s.RBP, o_mem(DATA))
        a.op(o.STOP_OP)

    bench.set(
        SECONDARY_PROC_CONTROLS=bench.field("SECONDARY_PROC_CONTROLS") | 1 << 13 | 1 << 12,
        VM_FUNCTION_CONTROLS=1, EPTP_LIST_ADDRESS=pointers << 12,
    )  # fmt: skip
    assert bench.run(write) == 4
    assert [bench.reg(s.RBX), bench.reg(s.RBP)] == [OLD, NEW]


@pytest.mark.parametrize(
    ("op", "kind", "descriptor"), [(o.INVEPT, 0, 0), (o.INVEPT, 3, 0), (o.INVVPID, 4, 1), (o.INVVPID, 1, 0)]
)
def test_a_wrong_type_or_vpid_fails_with_error_28(op: int, kind: int, descriptor: int) -> None:
    bench = virtual()
    bench.space.put(DATA + 0x900, descriptor)

    def write(a: Assembler) -> None:
        a.op(o.VMXON, mem=o_mem(DATA + 0x808))
        a.op(o.VMPTRLD, mem=o_mem(DATA + 0x800))
        a.mov(s.RAX, kind)
        a.op(op, s.RAX, mem=o_mem(DATA + 0x900))
        a.op(o.STOP_OP)

    bench.space.code(write, TEXT)
    bench.start()

    assert bench.engine.run(ops=20) == 4
    assert int(bench.m[s.RFLAGS]) & 0x41 == 0x40
    assert bench.field("VM_INSTRUCTION_ERROR") == 28


@pytest.mark.parametrize("changes", [{}, {"tlb.stlb.entries": 0}], ids=["", "without a second-level TLB"])
def test_invlpg_drops_what_the_tlb_of_instructions_has(changes: dict[str, Any]) -> None:
    subroutine = 0x6B0000
    bench = native(changes)

    def code(value: int) -> Write:
        def write(a: Assembler) -> None:
            a.mov(s.RBX, value)
            a.ret()

        return write

    bench.space.code(code(OLD), subroutine)
    other = bench.engine.allocate()
    a = Assembler("the other page", subroutine)
    code(NEW)(a)
    bench.engine.place(a.assemble(), lambda _: other)
    leaf = bench.space.table.find(subroutine)
    assert leaf is not None
    bench.space.table.map(ENTRY, leaf.table, KERNEL_PAGE)

    def write(a: Assembler) -> None:
        a.call(subroutine)
        a.mov(s.RAX, other << 12 | leaf.entry & 0xFFF)
        a.st(o_mem(ENTRY + 8 * leaf.index), s.RAX)
        a.call(subroutine)
        a.copy(s.RDX, s.RBX)
        a.op(o.INVLPG, mem=o_mem(subroutine))
        a.call(subroutine)
        a.op(o.STOP_OP)

    assert bench.run(write) == 4
    assert (bench.reg(s.RDX), bench.reg(s.RBX)) == (OLD, NEW)
