"""Devices that do DMA by themselves: what bounds them, what is blocked, and what their errors say.

VT-d: "DMA Remapping".
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.base.jit import quiet
from vtsim.config import parse_scenario
from vtsim.ept.memory_types import NAMES
from vtsim.iommu import dma as g
from vtsim.iommu import state
from vtsim.iommu.kernels.dma_engine import run_engines
from vtsim.iommu.tables import Memory, Structures
from vtsim.iommu.unit import Capabilities, RemappingUnit
from vtsim.platform.machine import Machine
from vtsim.study.measure import result_of
from vtsim.study.result import Result

BYTE_NS = 8 / (8.0 * 8 * 128 / 130 * 0.92)  # 8 GT/s, 8 lanes, 128 of 130 bits, 8 % of them for the link itself
HEADER, COMPLETION = 24, 20


def made(dma: str, machine: str = "") -> Machine:
    return Machine(parse_scenario(f"machine: {{memory: 256 MiB{machine}}}\ndma: [{dma}]\n"))


def run(dma: str, machine: str = "") -> Result:
    return result_of([made(dma, machine).run()])


def test_one_read_at_a_time_takes_link_translation_cache_and_link() -> None:
    one = "window: 64 KiB, operations: 40, tags: 1, random: false, bytes: 64"
    got = run(f"{{{one}}}", ", iommu: {hit_ns: 5}").dma[0]

    up_and_down = (HEADER + COMPLETION + 64) * BYTE_NS + 175 + 175
    assert got.latency.p50_ns == pytest.approx(up_and_down + 5 + 60, abs=g.BUCKET_PS / 1000)
    walk = 226 + 54 * 6  # context entry and root entry, then the four levels
    assert got.latency.max_ns == pytest.approx(up_and_down + walk + 60, abs=1)
    assert got.walks == 1


@pytest.mark.parametrize("size", [64, 256, 512, 2048])
def test_without_remapping_the_link_bounds_reads_that_are_many(size: int) -> None:
    got = run(f"{{window: 1 MiB, operations: 4000, tags: 512, bytes: {size}}}", ", iommu: {mode: off}").dma[0]

    down = size + COMPLETION * -(-size // 256)
    assert got.gbps == pytest.approx(8 * size / (down * BYTE_NS), rel=0.02)


def test_windows_beyond_the_reach_of_the_iotlb_wait_for_walkers_and_superpages_do_not() -> None:
    small, large, pages = (
        run(f"{{window: {window}, operations: 4000, pages: {pages}}}").dma[0]
        for window, pages in (("128 KiB", "4 KiB"), ("8 MiB", "4 KiB"), ("8 MiB", "2 MiB"))
    )

    assert small.walks <= 32
    assert large.walks > 3800
    assert pages.walks <= 4
    # six walkers, each one read of a last-level entry
    assert large.gbps == pytest.approx(64 * 8 * 6 / (226 + 54), rel=0.1)
    assert pages.gbps == pytest.approx(small.gbps, rel=0.02)


@settings(max_examples=12, deadline=None)
@given(
    window=st.sampled_from([4096, 65536, 1 << 20]), size=st.sampled_from([1, 64, 200, 1500, 4096]),
    tags=st.integers(1, 40), write=st.booleans(), random=st.booleans(), mapped=st.sampled_from([0, 4096, 1 << 20]),
    mode=st.sampled_from(["off", "pass-through", "translate"]),
)  # fmt: skip
def test_every_operation_ends_once_whatever_is_asked(
    window: int, size: int, tags: int, write: bool, random: bool, mapped: int, mode: str
) -> None:
    device = f"window: {window}, mapped: {mapped}, bytes: {size}, operations: 150, tags: {tags}"
    got = run(f"{{{device}, write: {str(write).lower()}, random: {str(random).lower()}}}", f", iommu: {{mode: {mode}}}")

    one, unit = got.dma[0], got.iommu
    assert unit is not None
    assert one.operations == 150
    assert (one.aborted == 0) == (unit["blocked"] == 0)
    assert one.aborted == unit["blocked"]  # the first blocked packet ends its operation
    if mode == "translate":
        assert one.escaped == 0
        assert (one.aborted == 0) == (mapped >= window)
    else:
        assert one.aborted == 0
        assert (one.escaped > 0) == (mapped < window)


def test_blocked_writes_land_nowhere() -> None:
    machine = made("{window: 1 MiB, mapped: 0, operations: 500, write: true}")
    assert machine.devices is not None
    arena = machine.engine.arena
    frames = arena[int(arena[mem.A_FRAMES]) :][: int(arena[mem.A_FRAME_COUNT])]
    before = frames.copy()

    got = result_of([machine.run()])

    assert got.dma[0].aborted == 500
    assert (frames == before).all()


def test_a_device_that_names_another_requester_is_blocked() -> None:
    got = run("{window: 64 KiB, operations: 100, claims: 05:00.0}")

    assert got.dma[0].aborted == 100
    assert got.iommu is not None
    assert got.iommu["faults"] == 100


def test_packets_that_ask_not_to_be_snooped_go_past_the_cache_unless_their_domain_wants_it() -> None:
    """VT-d: "Snoop Behavior"."""
    one = "window: 64 KiB, operations: 400, no_snoop: true"
    past, snooped = (run(f"{{{one}}}", f", iommu: {{snoop: {wants}}}").dma[0] for wants in ("false", "true"))
    assert (past.line_hits, past.line_misses) == (0, 400)
    assert (snooped.line_hits, snooped.line_misses) == (400, 0)  # the CPU had just written the window
    assert past.latency.p50_ns > snooped.latency.p50_ns
    written = run(f"{{{one}, write: true}}", ", landing: {warm: false}").dma[0]
    assert written.line_hits == 0


@pytest.mark.parametrize(("kind", "write", "hits"), [
    ("WB", False, 3), ("WT", False, 3), ("WP", False, 3), ("UC", False, 0), ("WC", False, 0),
    ("WB", True, 3), ("WT", True, 3), ("UC", True, 0), ("WC", True, 0),
])  # fmt: skip
def test_a_page_that_is_not_cached_is_reached_in_memory(kind: str, write: bool, hits: int) -> None:
    """VT-d: "Memory Type". Of four accesses to lines that a CPU has written, and one behind them that it has not."""
    memory = Memory(64 << 20)
    structures = Structures(memory, scalable=True)
    structures.enable(0x300)
    structures.assign(0x300, 0, 1)
    unit = RemappingUnit(memory.arena, Capabilities().having(MTS=1))
    unit.enable(structures.rtaddr)
    unit.write("MTRRDEF", 1 << 11 | next(code for code, name in NAMES.items() if name == kind))
    landing = g.Landing(cache_bytes=1 << 20, ways=16, write_ways=2, cache_ns=60, dram_ns=130)
    link = g.Link(generation=3, lanes=8, max_payload=256, max_read=512, dllp_percent=8, up_ns=175, down_ns=175)
    engines = g.engine(link, g.Translation(hit_ns=0, walk_ns=0, read_ns=0, walkers=1), landing, tags=1, gap_ns=0)[None]
    lines = g.line_tags(landing)
    tlbs = state.build_device(sid=0x300, tlb=state.Cache(1, 1), pri=False)[None]
    g.warm(lines, landing, 1 << 20, (1 << 20) + 3 * 64)
    for later in (False, True):
        g.give(engines[0], g.Job(
            source=0x300, base=1 << 20, window=256, bytes=64, count=4, writes=write, random=False, seed=1,
            translates=True, own=(1 << 20, 2 << 20),
        ))  # fmt: skip
        before = int(engines[0][g.N_LINE_HITS])
        engines[0][g.COUNT] += 4 * later
        with quiet():
            assert run_engines(engines, tlbs, lines, unit.u, memory.arena, 1 << 60)
        assert engines[0][g.N_LINE_HITS] - before == hits + (later and write and kind == "WB")
    assert (lines != 0).sum() == hits + (write and kind == "WB")


def test_two_devices_drive_each_other_out_of_the_iotlb() -> None:
    device = "window: 256 KiB, operations: 2000"
    alone = run(f"{{{device}}}").dma[0]
    both = run(f"{{{device}}}, {{{device}, source: 04:00.0}}").dma

    assert alone.walks <= 64
    assert all(each.walks > 700 for each in both)


def test_slices_of_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Any] = []
    for nanoseconds in (1_000, 100_000):
        monkeypatch.setattr("vtsim.platform.dma.SLICE_NS", nanoseconds)
        results.append(
            run("{window: 1 MiB, operations: 1500}, {window: 64 KiB, operations: 1500, source: 04:00.0}").dma
        )

    assert results[0] == results[1]


@pytest.mark.parametrize(("dma", "machine", "message"), [
    ("{window: 64 KiB, source: bridge}", "", "'bridge' is not a bus, device and function"),
    ("{window: 64 KiB, source: '0x3:00.0'}", "", "'0x3:00.0' is not a bus, device and function"),
    ("{window: 64 KiB, claims: '3_1:00.0'}", "", "'3_1:00.0' is not a bus, device and function"),
    ("{window: 64 KiB, bytes: 128, stride: 64}", "", "operations of 128 B do not begin every 64 B of a window of 64 KiB"),
    ("{window: 64, bytes: 128}", "", "128 B do not fit into a window of 64 B"),
    ("{window: 200 MiB}", "", "200 MiB is more than half of the 256 MiB of memory left"),
    ("{window: 64 KiB, name: a}, {window: 64 KiB, name: a}", "", "two devices are named 'a'"),
    ("{window: 64 KiB}, {window: 64 KiB}", "", "'03:00.0' is the source of dma.0 as well"),
    ("{window: 64 KiB}, {window: 64 KiB, source: '3:0.0'}", "", "'3:0.0' is the source of dma.0 as well"),
    ("{window: 64 KiB}", ", iommu: {iotlb_entries: 60}", "60 entries in 4 ways are not a power of two of sets"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused(dma: str, machine: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        made(dma, machine)

    assert message in str(refused.value)


def test_a_machine_on_which_nothing_runs_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_scenario("name: nothing\n")

    assert "nothing runs on this machine" in str(refused.value)


def test_the_counters_of_the_unit_are_those_of_its_laws() -> None:
    for left, right in state.LAWS.values():
        assert {*left, *right} <= set(state.STATISTICS)


# --- devices that translate by themselves --------------------------------------------------------------------------
def test_a_device_tlb_asks_once_for_each_page_and_then_waits_for_no_walk() -> None:
    """VT-d: "Device-TLB"; a read that misses goes up twice and down twice, one that hits as if nobody translated."""
    one = "window: 64 KiB, operations: 400, tags: 1, random: false, stride: 4 KiB, requests: ats"
    got = run(f"{{{one}, device_tlb: 16}}", ", iommu: {hit_ns: 5}").dma[0]

    up_and_down = (HEADER + COMPLETION + 64) * BYTE_NS + 175 + 175
    asked = (HEADER + COMPLETION + 8) * BYTE_NS + 175 + 175 + 226 + 54 * 6
    assert (got.translations, got.tlb_hits, got.walks) == (16, 384, 16)
    assert got.latency.p50_ns == pytest.approx(up_and_down + 5 + 60, abs=g.BUCKET_PS / 1000)
    assert got.latency.max_ns == pytest.approx(up_and_down + asked + 5 + 60, abs=1)


@pytest.mark.parametrize(("entries", "asked"), [(256, 256), (64, 3000)])
def test_how_often_a_device_asks_is_what_its_tlb_holds(entries: int, asked: int) -> None:
    got = run(f"{{window: 1 MiB, operations: 4000, requests: ats, device_tlb: {entries}}}").dma[0]

    assert got.translations + got.tlb_hits == 4000
    assert got.aborted == got.escaped == 0
    assert got.translations == asked if entries == 256 else asked * 0.9 < got.translations < asked * 1.1
    # a translation that the unit's IOTLB holds is no walk: nobody asks before the device-TLB has lost it
    assert got.walks <= got.translations


def test_a_device_that_is_not_trusted_for_ats_gets_no_translation() -> None:
    got = run("{window: 64 KiB, operations: 100, requests: ats, trusted: false}")

    assert (got.dma[0].aborted, got.dma[0].translations, got.dma[0].tlb_hits) == (100, 100, 0)
    assert got.iommu is not None
    assert got.iommu["faults"] == 100


def test_beyond_its_domain_a_device_has_no_right_and_nothing_is_recorded() -> None:
    """VT-d: a translation request without rights is answered so, and is no fault."""
    got = run("{window: 64 KiB, mapped: 0, operations: 100, requests: ats}")

    assert got.dma[0].aborted == 100
    assert got.iommu is not None
    assert got.iommu["faults"] == 0


@pytest.mark.parametrize("trusted", [False, True])
def test_forged_translations_land_where_the_device_wants_if_its_context_entry_allows_them(trusted: bool) -> None:
    machine = made(
        f"{{window: 1 MiB, operations: 500, write: true, requests: forged, trusted: {str(trusted).lower()}}}"
    )
    assert machine.devices is not None
    arena = machine.engine.arena
    frames = arena[int(arena[mem.A_FRAMES]) :][: int(arena[mem.A_FRAME_COUNT])]
    before = frames.copy()

    got = result_of([machine.run()])

    assert (got.dma[0].aborted, got.dma[0].escaped) == ((0, 500) if trusted else (500, 0))
    touched = (frames != before).nonzero()[0]
    assert len(touched) == 0 if not trusted else set(touched) <= set(range(256, 512)) and len(touched) > 200


@pytest.mark.parametrize(
    ("dma", "machine", "said"),
    [
        ("{requests: ats}", ", iommu: {mode: off}", "need domains, and machine.iommu.mode is 'off'"),
        (
            "{requests: forged}",
            ", iommu: {mode: pass-through}",
            "need domains, and machine.iommu.mode is 'pass-through'",
        ),
        ("{requests: none}", "", "untranslated, ats, forged"),
        ("{requests: ats, device_tlb: 5}", "", "device_tlb"),
        (
            "{unanswered: 1}",
            "",
            "dma.0.unanswered: a device without ATS has no device-TLB whose invalidation it could leave unanswered",
        ),
        (
            "{requests: ats, unanswered: 1}",
            "",
            "dma.0.unanswered: a device without a driver is asked to invalidate nothing",
        ),
        (
            "{device_tlb: 1024}",
            "",
            "dma.0.device_tlb: a device without ATS has no device-TLB\n"
            "    2 | dma: [{device_tlb: 1024}]\n"
            "      |                    ^\n"
            " help: device_tlb can be 64; or requests ats",
        ),
        (
            "{requests: forged, device_answer_ns: 20}",
            "",
            "dma.0.device_answer_ns: a device without ATS has no device-TLB that it is to invalidate\n"
            "    2 | dma: [{requests: forged, device_answer_ns: 20}]\n"
            "      |                                            ^\n"
            " help: device_answer_ns can be 500; or requests ats",
        ),
        (
            "{requests: ats, device_answer_ns: 20}",
            "",
            "dma.0.device_answer_ns: a device without a driver is asked to invalidate nothing",
        ),
        (
            "{trusted: false}",
            "",
            "dma.0.trusted: a device that neither asks for translations nor says that it has them needs no trust\n"
            "    2 | dma: [{trusted: false}]\n"
            "      |                 ^\n"
            " help: trusted can be true; or requests ats, forged",
        ),
        (
            "{hostile_ns: 20}",
            "",
            "dma.0.hostile_ns: a device without a driver has no buffers that are done\n"
            "    2 | dma: [{hostile_ns: 20}]\n"
            "      |                    ^\n"
            " help: hostile_ns can be 0; or let a process drive it with primitive dma_buffers",
        ),
    ],
)
def test_what_cannot_be_asked_of_a_device_is_said(dma: str, machine: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        made(dma, machine)

    assert said in str(refused.value)
