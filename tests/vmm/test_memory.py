"""What backs guest memory, and in which pages EPT maps it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vmm.machines import DATA, FIRST_GFN, MIB, machine, tiny_guest
from vtsim.base.memory import PAGE_BYTES, gfn_ranges
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import RAX, RCX
from vtsim.ept import spec as e
from vtsim.ept.memory_slots import SLOT_BYTES
from vtsim.vmm import board
from vtsim.vmm.personalities.kvm import chipset

TABLES_AND_CODE = 5
LOADS = 40
TO_DATA = 1  # the last table; those above it lead to the code too


def touch(*pages: tuple[int, bool]) -> object:
    def body(a: Assembler) -> None:
        for page, write in pages:
            if write:
                a.st(Mem(displacement=DATA + 4096 * page), RAX)
            else:
                a.ld(RAX, Mem(displacement=DATA + 4096 * page))
        a.op(ops.STOP_OP)

    return tiny_guest(body)


def test_a_page_read_first_and_written_later_breaks_the_shared_zero_page_in_two_exits() -> None:
    read, written, both = (
        machine(touch(*pages), huge_pages="never").run().exits("EPT_VIOLATION")
        for pages in (((0, False),), ((0, True),), ((0, False), (0, True)))
    )

    assert read == written == TABLES_AND_CODE + TO_DATA + 1
    assert both == read + 2


def test_without_the_zero_page_a_page_is_one_exit_whatever_comes_first() -> None:
    m = machine(touch((0, False), (0, True), (1, False)), huge_pages="always").run()

    assert m.exits("EPT_VIOLATION") == TABLES_AND_CODE + TO_DATA + 2


def test_small_pages_are_mapped_one_by_one(personality: str) -> None:
    m = machine(touch((0, True), (1, True), (2, True)), personality=personality).run()

    assert m.exits("EPT_VIOLATION") == TABLES_AND_CODE + TO_DATA + 3


def test_one_large_page_serves_tables_and_data_until_code_in_it_splits_it() -> None:
    m = machine(touch((0, True), (1, True), (2, True)), page_size=2 * MIB, huge_pages="always").run()

    leaf = m.vcpu.ept.find(0x100000) if m.vcpu.ept else None
    # the walk to the code maps 2 MiB; its fetch takes them away again, and all are mapped one by one
    assert m.exits("EPT_VIOLATION") == 1 + TABLES_AND_CODE + TO_DATA + 3
    assert leaf is not None and leaf.size == 0


def test_executable_large_pages_serve_everything_with_one_exit() -> None:
    m = machine(
        touch((0, True), (1, True)), page_size=2 * MIB, huge_pages="always", parameters=(("nx_huge_pages", 0),)
    ).run()

    assert m.exits("EPT_VIOLATION") == 1


@pytest.mark.parametrize(("page_size", "size"), [(4096, 0), (2 * MIB, 1), (1 << 30, 2)])
def test_prebuilt_memory_is_mapped_in_pages_of_the_size_asked_for(page_size: int, size: int) -> None:
    memory = max(16 * MIB, page_size)
    m = machine(
        touch((0, True)), memory=memory, host_memory=2 * memory + 512 * MIB, page_size=page_size, populate="prebuilt",
        huge_pages="always",
    )  # fmt: skip
    assert m.vcpu.ept is not None

    first, last = m.vcpu.ept.find(0), m.vcpu.ept.find(memory - 4096)

    assert first is not None and last is not None
    assert (first.size, last.size) == (size, size)
    assert m.run().exits() == {}


@pytest.mark.parametrize("way", ["demand", "read only", "large", "prebuilt", "agile"])
@pytest.mark.parametrize(
    ("personality", "parameters", "ignored"), [("kvm", (), True), ("kvm", (("ignore_pat", 0),), False), ("minimal", (), False)]
)  # fmt: skip
def test_kvm_has_a_guests_memory_cached_whatever_its_pat_says(
    personality: str, parameters: tuple[tuple[str, int], ...], ignored: bool, way: str
) -> None:
    """As Linux does for VMs whose devices' DMA is snooped; a textbook's hypervisor leaves it to the guest."""

    def body(a: Assembler) -> None:
        if way != "read only":
            a.st(Mem(displacement=DATA), RAX)
        a.mov(RCX, LOADS)
        a.label("again")
        a.ld(RAX, Mem(displacement=DATA))
        a.loop("again")
        a.op(ops.STOP_OP)

    options: dict[str, Any] = {
        "large": {"page_size": 2 * MIB, "huge_pages": "always"}, "prebuilt": {"populate": "prebuilt"},
        "agile": {"paging": "agile", "tpr_shadow": True},
    }.get(way, {})  # fmt: skip
    uncacheable = e.PTE_PWT | e.PTE_PCD  # entry 3 of PAT, as it is after reset
    m = machine(tiny_guest(body, typed=uncacheable), personality=personality, parameters=parameters, **options).run()

    assert m.finished == ["vm0"]
    assert m.vcpu.ept is not None
    leaf = m.vcpu.ept.find(FIRST_GFN << 12)
    assert leaf is not None and leaf.entry >> e.EPT_TYPE & 15 == 6 | 8 * ignored
    assert (m.counter("data_dram") < LOADS) == (ignored or way == "agile")  # shadow entries have no bits of PAT


def test_translations_agree_between_the_process_and_ept() -> None:
    m = machine(touch((0, True)), populate="prebuilt", memory=16 * MIB)
    assert m.vcpu.ept is not None

    for gfn in (0, 1, 511, 512, 4095):
        leaf = m.vcpu.ept.find(gfn << 12)
        assert leaf is not None and leaf.frame == m.vcpu.memory.frame(gfn)
        assert leaf.entry & e.EPT_RWX == e.EPT_RWX


def test_a_vm_that_touches_more_than_the_host_has_ends_with_that_reason() -> None:
    m = machine(touch(*((n, True) for n in range(4))), memory=16 * MIB, host_memory=24 * MIB)
    m.engine.frames_from(0, 0, shuffled=False, seed=0)  # nothing is left to hand out

    m.run()

    assert m.hypervisor.death(m.vcpu) == "the host ran out of memory"


@pytest.mark.parametrize(
    ("size", "ranges"),
    [
        (16 * MIB, ((0, 4096),)),
        (3 << 30, ((0, 0xC0000),)),
        (4 << 30, ((0, 0xC0000), (0x100000, 0x140000))),
    ],
)
def test_guest_memory_continues_above_the_devices(size: int, ranges: tuple[tuple[int, int], ...]) -> None:
    assert gfn_ranges(size) == ranges


@pytest.mark.parametrize("size", [16 * MIB, 3 << 30, 4 << 30])
def test_a_boards_slots_are_its_memory_below_and_above_the_devices_and_its_firmware(size: int) -> None:
    shown = {(first, end) for first, end, _, flags in board.slots_at_reset(size) if not flags}
    firmware = {(first, end) for first, end, _, flags in board.slots_at_reset(size) if flags}

    assert firmware == {(0xC0000, MIB), ((4 << 30) - (256 << 10), 4 << 30)}
    assert shown == {(0, 0xC0000), (MIB, min(size, 3 << 30))} | ({(4 << 30, 5 << 30)} if size > 3 << 30 else set())


def test_the_host_bridge_has_room_for_the_segments_and_slots_of_the_largest_board() -> None:
    """Every segment may be a slot of its own, and the local APIC's page is one more."""
    segments = len(board.segments(4 << 30))

    assert chipset.SEGMENTS + segments * chipset.SEGMENT_BYTES <= chipset.OLD_COUNT
    assert segments < chipset.SLOT_LIMIT
    assert chipset.OLD + chipset.SLOT_LIMIT * SLOT_BYTES <= chipset.NEW
    assert chipset.NEW + chipset.SLOT_LIMIT * SLOT_BYTES <= PAGE_BYTES
