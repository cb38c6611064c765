"""Agile paging: the guest sees what its tables say while they move between shadowed and nested."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from tests.cpu.bench import OFF
from tests.vmm.changing_tables import Paging, Plan, plan
from tests.vmm.machines import CODE, FIRST_GFN, MIB, STACK, Machine, machine
from tests.vmm.narrow_tables import NarrowPaging, NarrowPlan, narrow_plan
from tests.vmm.test_shadow import NARROW as NARROW_MODES
from tests.vmm.test_shadow import NEWER
from tests.vmm.test_shadow_guests import FORK, PLAIN, digests, exits, page_faults, run
from vtsim.base import jit
from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept import shadow as d
from vtsim.ept.spec import EPT_DIRTY, EPT_IGNORE_PAT, EPT_LARGE, EPT_WRITE, PTE_WRITE
from vtsim.ept.tables import KERNEL_PAGE, PAGING, SIZE_2M, SIZE_4K, Table
from vtsim.guest.machine_view import PhysicalMemory, Start
from vtsim.vmm.memory import EPT_WRITTEN

COMPILED = pytest.mark.compiled_only
AGILE = ("vmm.paging=agile",)
SHADOW = ("vmm.paging=shadow",)
LISTED = NEWER.with_overrides({"features.agile_cr3": True})
LARGE: dict[str, Any] = {"page_size": 2 * MIB, "populate": "prebuilt"}
MACHINES: dict[str, dict[str, Any]] = {
    "kvm": {"personality": "kvm"},
    "minimal, back and forth": {"personality": "minimal", "parameters": (("agile_interval", 10),)},
    "without VPID, back and forth": {"vpid": False, "parameters": (("agile_interval", 10),)},
    "roots listed, back and forth": {"profile": LISTED, "parameters": (("agile_interval", 10),)},
    "large pages, back and forth": {**LARGE, "profile": LISTED, "parameters": (("agile_interval", 10),)},
}


def of_pool(made: Any, name: str) -> int:
    vcpu = made.hypervisor.vcpus[0]
    assert vcpu.shadow is not None
    return int(made.hypervisor.host.load(vcpu.shadow.address + d.POOL[name]))


WIDE = (Paging(), Paging(pcid=True), Paging(pcid=True, smap=True), Paging(five=True), Paging(pcid=True, rings=True))
NARROW = tuple(paging for paging in NARROW_MODES.values() if paging.protected)
CHANGING: dict[str, tuple[Callable[[int, int, Any], Plan], tuple[Any, ...], int]] = {  # guests, their modes, seeds
    "four and five levels": (plan, WIDE, 8),
    "two levels": (
        narrow_plan,
        (*NARROW, *(evolve(each, smap=True) for each in NARROW), evolve(NARROW[1], pse=False)),
        2,
    ),
    "two levels with rings": (narrow_plan, tuple(evolve(each, rings=True, smep=True) for each in NARROW), 1),
}


@pytest.mark.parametrize("guests", [pytest.param(name, marks=COMPILED if "rings" in name else ()) for name in CHANGING])
@pytest.mark.parametrize("name", MACHINES)
def test_the_guest_never_sees_a_wrong_frame_while_its_tables_move(name: str, guests: str) -> None:
    nested = shadowed = roots = split = 0
    guest, modes, seeds = CHANGING[guests]
    for seed in range(1 if jit.DISABLED else seeds):
        for paging in modes[:2] if jit.DISABLED else modes:
            made = guest(seed, 100 if jit.DISABLED else 600, paging)
            m = machine(made.guest, paging="agile", **{"profile": NEWER, **MACHINES[name]}).run()
            assert m.finished == ["vm0"], m.hypervisor.death(m.vcpu)
            for expected, found in made.seen(m.vcpu.memory.load):
                assert found == expected
            nested, shadowed = nested + of_pool(m, "TO_NESTED"), shadowed + of_pool(m, "TO_SHADOW")
            roots, split = roots + of_pool(m, "ROOTS_NESTED"), split + of_pool(m, "EPT_SPLIT")

    assert nested > 0
    assert roots > 0 or jit.DISABLED
    assert (split > 0) == name.startswith("large")
    assert (shadowed > 0) == name.endswith("forth")


IN_GIB = (
    "machine.memory=4 GiB", "vms.0.memory=2 GiB", "vmm.ept.page_size=1 GiB", "vmm.ept.populate=prebuilt",
    "vmm.personality=kvm",
)  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [(), ("vmm.personality=minimal", "vmm.parameters.agile_interval=20"), pytest.param(IN_GIB, marks=COMPILED)],
    ids=["", "minimal, back and forth", "1 GiB pages"],
)
def test_a_guest_ends_with_the_results_that_it_has_natively(more: tuple[str, ...]) -> None:
    guest = ("{tick: off, kpti: true}", FORK)
    there, natively = run(guest, (*AGILE, *more)), run(guest, ("vmm.technique=native",))

    assert digests(there) == digests(natively)
    assert page_faults(there) == page_faults(natively)


MODES = pytest.mark.parametrize("mode", ["4-level", "PAE", "32-bit"])


@pytest.mark.compiled_only
@MODES
def test_forks_do_not_exit_for_their_tables_once_roots_are_nested(mode: str) -> None:
    kernel = f"{{tick: off, paging: {mode}}}"

    def faults(*sets: str) -> int:
        few, many = (f"[{{phases: [{{primitive: fork, pages: 16, iterations: {n}}}]}}]" for n in (10, 20))
        counts = [exits(run((kernel, forks), (*AGILE, *sets)), "EXCEPTION_NMI") for forks in (few, many)]
        return counts[1] - counts[0]

    assert faults() == 0
    assert faults("vmm.parameters.agile_writes=60000") > 10 * 16  # no table is


def test_loads_of_a_cr3_that_is_listed_do_not_exit_and_the_guest_sees_no_difference() -> None:
    few, many = (
        ("{tick: off, kpti: true}", f"[{{phases: [{{primitive: syscall, iterations: {n}}}]}}]") for n in (10, 30)
    )
    listed = (*AGILE, "machine.cpu.features.agile_cr3=true")
    without = exits(run(many, AGILE), "CR_ACCESS") - exits(run(few, AGILE), "CR_ACCESS")
    those = [run(guest, listed) for guest in (few, many)]

    assert without == 20 * 3  # with KPTI a system call reads CR3 once and loads it twice
    assert exits(those[0], "CR_ACCESS") == exits(those[1], "CR_ACCESS")
    assert digests(those[1]) == digests(run(many, ("vmm.technique=native",)))


@MODES
def test_page_faults_stay_inside_once_the_table_that_they_fill_is_nested(mode: str) -> None:
    kernel = f"{{tick: off, paging: {mode}}}"
    few, many = (f"[{{phases: [{{primitive: page_fault, region: 48 KiB, iterations: {n}}}]}}]" for n in (2, 4))
    exit_counts = {
        sets: [exits(run((kernel, faults), sets), "EXCEPTION_NMI") for faults in (few, many)]
        for sets in (AGILE, SHADOW)
    }

    assert exit_counts[AGILE][0] == exit_counts[AGILE][1]
    assert exit_counts[SHADOW][1] - exit_counts[SHADOW][0] >= 2 * 12


WINDOW, ONE, TWO = 0x2000_0000, 0x3000_0000 + (1 << 30), 0x3000_0000 + (2 << 30)
FRAMES = 512  # in the window, from FIRST_GFN on
OLD, NEW, SPARE = FIRST_GFN + 400, FIRST_GFN + 401, FIRST_GFN + 402
LOGGED = FIRST_GFN + 410


def aliasing(steps: Callable[[Assembler, Table], None]) -> Callable[[PhysicalMemory], Start]:
    """A guest with a table below ONE and another below TWO, both also in the window."""

    def build(memory: PhysicalMemory) -> Start:
        following = iter(range(FIRST_GFN, FIRST_GFN + 400))

        def words(gfn: int) -> np.ndarray:
            return memory.contents(gfn, mem.TABLE)

        root = next(following)
        words(root)
        table = Table(root=root, format=PAGING, take=following.__next__, words=words)
        table.map(WINDOW, np.arange(FIRST_GFN, FIRST_GFN + FRAMES), KERNEL_PAGE)
        table.map(ONE, [SPARE] * 8, KERNEL_PAGE)
        table.map(TWO, [OLD], KERNEL_PAGE)
        for gfn in (OLD, NEW):
            memory.store(gfn << 12, gfn)
        a = Assembler("aliasing guest", CODE)
        steps(a, table)
        a.op(ops.STOP_OP)
        frames = {}
        for page, _ in a.assemble().pages():
            gfn = next(following)
            table.map(page, [gfn], KERNEL_PAGE)
            frames[page] = memory.frame(gfn)
        memory.engine.place(a.assemble(), frames.__getitem__)
        table.map(STACK - 4096, [next(following)], KERNEL_PAGE)
        return Start(
            rip=CODE, rsp=STACK, rflags=2, cr0=0x80050033, cr3=root << 12, cr4=0xA0, efer=0xD01,
            idtr_base=0, idtr_limit=0, gdtr_base=0, gdtr_limit=0x7F, tr_base=0, cpl=0, msrs={},
            gs_base=0, fs_base=0, roots=(root << 12,),
        )  # fmt: skip

    return build


def window(gfn: int, offset: int = 0) -> Mem:
    return Mem(displacement=WINDOW + (gfn - FIRST_GFN << 12) + offset)


def tables_to(table: Table, address: int) -> dict[int, int]:
    """Guest frames of the tables that a walk to an address reads, by level."""
    found = {4: table.root}
    for level in (4, 3, 2):
        found[level - 1] = int(table.words(found[level])[(address >> (3 + 9 * level)) & 511]) >> 12 & 0xFFFFFFFFF
    return found


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("level", range(5))
def test_a_walk_reads_as_many_entries_as_published_for_a_switch_at_each_level(level: int, large: bool) -> None:
    """4, 8, 12 and 16 where tables up to that level are nested, 20 with the root; level 0: all are shadowed.

    A large page of EPT with data in it has an entry less; where tables of the guest are it was split.
    """

    def references(loads: int) -> tuple[int, int]:
        def steps(a: Assembler, table: Table) -> None:
            a.ld(s.RAX, Mem(displacement=ONE))
            for index in (200, 201) if level else ():
                a.st_value(window(tables_to(table, ONE)[level], 8 * index), 0)
            for _ in range(1 + loads):
                a.ld(s.RAX, Mem(displacement=ONE))

        sizes = LARGE if large else {}
        made = machine(aliasing(steps), paging="agile", profile=NEWER.with_overrides(OFF), **sizes).run()
        assert made.finished == ["vm0"]
        assert (of_pool(made, "ROOTS_NESTED") > 0) == (level == 4)
        return made.counter("guest_references"), made.counter("ept_references")

    few, many = references(5), references(15)
    assert [(b - a) // 10 for a, b in zip(few, many, strict=True)] == [4, 4 * level - (level > 0 and large)]


@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("paging", NARROW)
def test_a_walk_of_two_levels_reads_a_nested_page_directory_as_it_reads_a_nested_root(
    paging: NarrowPaging, level: int
) -> None:
    """2, 6 where the page table is nested, 10 with the page directory: a PDPTE is in a register; 14 are left to EPT."""

    def references(loads: int) -> tuple[int, int]:
        made = NarrowPlan(Random(3), paging, 0)
        made.seed = 3
        address = next(at for at in made.addresses if made.expected(at, False).error == -1 and small(made, at))

        def load(a: Assembler) -> None:
            a.ld(s.RAX, Mem(displacement=address))

        made.emits.append(load)
        above = (made.tops[0], *made.path(made.tops[0], address))[-1 - level]
        for _ in range(2 if level else 0):
            made.write(made.place(above & ~0xFFF, 5), 0)
        made.emits.extend([load] * (1 + loads))
        there = machine(made.guest, paging="agile", profile=NEWER.with_overrides(OFF)).run()
        assert there.finished == ["vm0"]
        assert of_pool(there, "TO_NESTED") >= level
        return there.counter("guest_references"), there.counter("ept_references")

    few, many = references(5), references(15)
    assert [(b - a) // 10 for a, b in zip(few, many, strict=True)] == [2, 4 * level]


def small(made: NarrowPlan, address: int) -> bool:
    return len(made.path(made.tops[0], address)) == 2 + made.paging.pae


OTHER_WAYS = 200  # unused entries of the root from there on
OTHER_ROOT = FIRST_GFN + 420


@pytest.mark.parametrize("personality", ["kvm", "minimal"])
@pytest.mark.parametrize("vpid", [True, False])
def test_stores_to_a_root_that_is_written_often_do_not_exit_any_more(personality: str, vpid: bool) -> None:
    """Each of them gives the table below the root a further address, which is used, and takes the last one away."""

    def ran(stores: int) -> Machine:
        def steps(a: Assembler, table: Table) -> None:
            root, below = tables_to(table, TWO)[4], tables_to(table, TWO)[3]
            for n in range(stores):
                a.st_value(window(root, 8 * (OTHER_WAYS + n)), below << 12 | KERNEL_PAGE)
                a.ld(s.RAX, Mem(displacement=OTHER_WAYS + n << 39 | TWO))
                a.st(window(LOGGED, 8 * n), s.RAX)

        return machine(aliasing(steps), paging="agile", personality=personality, vpid=vpid).run()

    few, many = ran(3), ran(12)
    for made, stores in ((few, 3), (many, 12)):
        assert made.finished == ["vm0"]
        assert [made.vcpu.memory.load((LOGGED << 12) + 8 * n) for n in range(stores)] == [OLD] * stores
        assert [of_pool(made, name) for name in ("ROOTS_NESTED", "WRITES")] == [1, 2]
    assert many.exits() == few.exits()


def load_cr3(a: Assembler, root: int) -> None:
    a.mov(s.RAX, root << 12)
    a.op(ops.MOV_TO_CR, s.RAX, imm=3)


def nest_the_root(a: Assembler, table: Table) -> None:
    for index in (OTHER_WAYS, OTHER_WAYS + 1):
        a.st_value(window(table.root, 8 * index), 0)


@pytest.mark.parametrize("listed", [False, True])
def test_a_root_that_is_quiet_is_shadowed_again_without_any_exit_of_the_guest(listed: bool) -> None:
    """The host's timer ends the interval. Tables below follow, one level an interval; then a store to each exits.

    Where roots are listed, the guest comes to this one without an exit.
    """

    def ran(interval: int) -> Machine:
        def steps(a: Assembler, table: Table) -> None:
            tables = tables_to(table, ONE)
            table.words(OTHER_ROOT)[:] = table.words(table.root)
            a.ld(s.RAX, Mem(displacement=ONE))
            nest_the_root(a, table)
            for root in (OTHER_ROOT, table.root) if listed else ():
                load_cr3(a, root)
            a.ld(s.RAX, Mem(displacement=ONE))
            for _ in range(8):
                a.mov(s.RCX, 3 * 10**6)
                a.emit(ops.LONG_WORK, length=64)
                a.ld(s.RAX, Mem(displacement=ONE))
            for level in (4, 3, 2, 1):
                a.st_value(window(tables[level], 8 * OTHER_WAYS), 0)

        how = {"profile": LISTED} if listed else {}
        return machine(aliasing(steps), paging="agile", parameters=(("agile_interval", interval),), **how).run()

    often, seldom = ran(200), ran(10**6)
    assert often.finished == seldom.finished == ["vm0"]
    assert often.exits("CR_ACCESS") == seldom.exits("CR_ACCESS") == int(listed)
    assert of_pool(often, "TO_SHADOW") == of_pool(often, "TO_NESTED") == of_pool(seldom, "TO_NESTED") > 4
    assert of_pool(seldom, "TO_SHADOW") == 0
    assert [of_pool(each, "WRITES") for each in (often, seldom)] == [6, 2]


@pytest.mark.parametrize("listed", [False, True])
def test_tables_below_a_nested_root_and_a_shadowed_one_stay_nested_while_both_use_them(listed: bool) -> None:
    """Else each change of address space would take them away from the other; what exits is the load of CR3, or none."""

    def ran(changes: int) -> Machine:
        def steps(a: Assembler, table: Table) -> None:
            table.words(OTHER_ROOT)[:] = table.words(table.root)
            for change in range(3 + changes):
                for root in (OTHER_ROOT, table.root):
                    load_cr3(a, root)
                    a.ld(s.RAX, Mem(displacement=TWO))
                if change == 0:  # both lead to the tables below, which are shadowed
                    nest_the_root(a, table)
            a.st(window(LOGGED), s.RAX)

        made = machine(aliasing(steps), paging="agile", **({"profile": LISTED} if listed else {})).run()
        assert made.finished == ["vm0"]
        assert made.vcpu.memory.load(LOGGED << 12) == OLD
        return made

    few, many = ran(1).exits(), ran(9).exits()
    few["CR_ACCESS"] += 0 if listed else 16
    assert many == few


def test_a_kernel_without_write_protection_writes_to_read_only_pages_of_a_nested_table() -> None:
    """What counts there is the guest's CR0.WP; the processor has it set."""

    def steps(a: Assembler, table: Table) -> None:
        first = table.find(ONE)
        assert first is not None
        a.ld(s.RAX, Mem(displacement=ONE))
        for _ in range(2):
            a.st_value(window(first.table, 8 * first.index), SPARE << 12 | KERNEL_PAGE & ~PTE_WRITE)
        a.op(ops.INVLPG, mem=Mem(displacement=ONE))
        a.mov(s.RAX, 0x80050033 & ~(1 << 16))
        a.op(ops.MOV_TO_CR, s.RAX, imm=0)
        a.st_value(Mem(displacement=ONE), 77)

    made = machine(aliasing(steps), paging="agile").run()
    assert made.finished == ["vm0"], made.hypervisor.death(made.vcpu)
    assert made.vcpu.memory.load(SPARE << 12) == 77
    assert (of_pool(made, "TO_NESTED"), made.exits("CR_ACCESS")) == (1, 1)


def through_the_nested_part(a: Assembler, table: Table) -> None:
    """The table below ONE becomes nested, maps the one below TWO, and is the way by which that is written."""
    first, second = table.find(ONE), table.find(TWO)
    assert first is not None and second is not None
    a.ld(s.RAX, Mem(displacement=ONE))
    a.ld(s.RAX, Mem(displacement=TWO))
    a.st(window(LOGGED), s.RAX)
    for index in (1, 2, 3):
        a.st_value(window(first.table, 8 * (first.index + index)), 0)
    a.ld(s.RAX, Mem(displacement=ONE))
    a.st_value(window(first.table, 8 * (first.index + 5)), second.table << 12 | KERNEL_PAGE)
    a.op(ops.INVLPG, mem=Mem(displacement=ONE + (5 << 12)))
    a.st_value(Mem(displacement=ONE + (5 << 12) + 8 * second.index), NEW << 12 | KERNEL_PAGE)
    a.op(ops.INVLPG, mem=Mem(displacement=TWO))
    a.ld(s.RAX, Mem(displacement=TWO))
    a.st(window(LOGGED, 8), s.RAX)


def by_an_address_written_before(a: Assembler, table: Table) -> None:
    """The same, but the processor knows the nested part's way there before the table is used, and shadowed."""
    first, second = table.find(ONE), table.find(TWO)
    assert first is not None and second is not None
    a.ld(s.RAX, Mem(displacement=ONE))
    for index in (1, 2, 3):
        a.st_value(window(first.table, 8 * (first.index + index)), 0)
    a.st_value(window(first.table, 8 * (first.index + 5)), second.table << 12 | KERNEL_PAGE)
    a.st_value(Mem(displacement=ONE + (5 << 12) + 8 * OTHER_WAYS), 0)
    a.ld(s.RAX, Mem(displacement=TWO))
    a.st(window(LOGGED), s.RAX)
    a.st_value(Mem(displacement=ONE + (5 << 12) + 8 * second.index), NEW << 12 | KERNEL_PAGE)
    a.op(ops.INVLPG, mem=Mem(displacement=TWO))
    a.ld(s.RAX, Mem(displacement=TWO))
    a.st(window(LOGGED, 8), s.RAX)


@pytest.mark.parametrize("steps", [through_the_nested_part, by_an_address_written_before])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("vpid", [True, False])
def test_a_table_that_is_shadowed_is_not_written_unseen_through_a_nested_part(
    personality: str, vpid: bool, large: bool, steps: Callable[[Assembler, Table], None]
) -> None:
    how = LARGE if large else {}
    made: Machine = machine(aliasing(steps), paging="agile", personality=personality, vpid=vpid, **how).run()

    assert made.finished == ["vm0"]
    assert [made.vcpu.memory.load((LOGGED << 12) + at) for at in (0, 8)] == [OLD, NEW]
    assert of_pool(made, "TO_NESTED") == 1
    assert made.exits("EPT_VIOLATION") == 1


def test_a_large_page_of_ept_is_split_when_a_table_of_the_guest_in_it_is_shadowed() -> None:
    """There are leaves of the same rights, type and flags, but for the table's; other large pages stay."""
    elsewhere = FIRST_GFN + 300  # in the second 2 MiB, where all else is data
    gfns = (FIRST_GFN, elsewhere, elsewhere + 1, 1 << 10)
    pages: list[list[tuple[int, int]]] = []
    splits = []
    for moved in (False, True):

        def steps(a: Assembler, table: Table, moved: bool = moved) -> None:
            entries = tables_to(table, ONE)
            if moved:  # the last table to ONE is copied there before it is used
                table.words(elsewhere)[:] = table.words(entries[1])
                table.words(entries[2])[(ONE >> 21) & 511] = elsewhere << 12 | PAGING.interior
            a.ld(s.RAX, Mem(displacement=ONE))

        made = machine(aliasing(steps), paging="agile", **LARGE).run()
        assert made.finished == ["vm0"]
        assert made.vcpu.ept is not None
        leaves = [leaf for gfn in gfns if (leaf := made.vcpu.ept.find(gfn << 12))]
        pages.append([(leaf.size, leaf.entry & 0xFFF & ~EPT_LARGE) for leaf in leaves])
        splits.append(of_pool(made, "EPT_SPLIT"))
        assert [leaf.frame + (gfn & ((1 << 9 * leaf.size) - 1)) for gfn, leaf in zip(gfns, leaves, strict=True)] == [
            made.vcpu.memory.frame(gfn) for gfn in gfns
        ]

    kept = EPT_WRITTEN | EPT_IGNORE_PAT
    protected = kept & ~(EPT_WRITE | EPT_DIRTY)
    root = (SIZE_4K, kept & ~EPT_WRITE)  # as it was before the guest began
    assert pages[0] == [root, (SIZE_2M, kept), (SIZE_2M, kept), (SIZE_2M, kept)]
    assert pages[1] == [root, (SIZE_4K, protected), (SIZE_4K, kept), (SIZE_2M, kept)]
    assert splits == [0, 1]


def test_a_table_that_is_quiet_is_shadowed_again_and_then_a_write_to_it_exits() -> None:
    def steps(a: Assembler, table: Table) -> None:
        first = table.find(ONE)
        assert first is not None
        for index in (1, 2):
            a.ld(s.RAX, Mem(displacement=ONE))
            a.st_value(window(first.table, 8 * (first.index + index)), 0)
        a.ld(s.RAX, Mem(displacement=ONE))
        a.mov(s.RCX, 10**6)
        a.emit(ops.LONG_WORK, length=64)
        a.op(ops.MOV_FROM_CR, s.RAX, imm=3)  # an exit
        a.op(ops.MOV_TO_CR, s.RAX, imm=3)
        a.ld(s.RAX, Mem(displacement=ONE))
        a.st_value(window(first.table, 8 * (first.index + 3)), 0)

    often, seldom = (
        machine(aliasing(steps), paging="agile", parameters=(("agile_interval", length),)).run()
        for length in (200, 10**6)
    )

    assert [of_pool(often, name) for name in ("TO_NESTED", "TO_SHADOW", "WRITES")] == [1, 1, 3]
    assert [of_pool(seldom, name) for name in ("TO_NESTED", "TO_SHADOW", "WRITES")] == [1, 0, 2]


def test_no_table_is_out_of_sync_so_invlpg_needs_no_exit_under_agile_paging() -> None:
    def steps(a: Assembler, table: Table) -> None:
        first = table.find(ONE)
        assert first is not None
        a.ld(s.RAX, Mem(displacement=ONE))
        a.st_value(window(first.table, 8 * first.index), NEW << 12 | KERNEL_PAGE)
        a.op(ops.INVLPG, mem=Mem(displacement=ONE))
        a.ld(s.RAX, Mem(displacement=ONE))
        a.st(window(LOGGED), s.RAX)

    agile, shadow = (machine(aliasing(steps), paging=paging).run() for paging in ("agile", "shadow"))

    assert [made.vcpu.memory.load(LOGGED << 12) for made in (agile, shadow)] == [NEW, NEW]
    assert (agile.exits("INVLPG"), shadow.exits("INVLPG")) == (0, 1)


def test_agile_paging_supposes_a_processor_that_has_it_and_says_so() -> None:
    without = "machine.cpu.features.agile_paging=false"
    result = run((PLAIN, FORK), AGILE)

    assert list(result.approximations) == ["agile paging supposes a walker that no processor has"]
    with pytest.raises(ConfigError) as caught:
        run((PLAIN, FORK), (*AGILE, without))
    (problem,) = caught.value.problems
    assert (problem.path, problem.message, problem.help) == (
        "vmm.paging",
        "this needs a walker that goes on from shadow tables to the guest's own, and machine.cpu says that there is none",
        "leave features.agile_paging out, or let it be true; or choose vmm.paging 'ept', 'shadow'",
    )
