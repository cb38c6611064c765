"""Does the guest's kernel do what a kernel does, as often as it should?"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tests.guest.conftest import Harness, native
from vtsim.base.memory import TABLE
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import DEVICE_READ, PROGRAM_END
from vtsim.ept.tables import PAGING, SIZE_1G, SIZE_2M, SIZE_4K, Table
from vtsim.guest import spec as g
from vtsim.guest.frames import FIRST
from vtsim.guest.kernel import kernel_paths, layout
from vtsim.guest.kernel.lengths import LENGTHS

KIB, MIB, GIB, PAGE = 1 << 10, 1 << 20, 1 << 30, 4096
EXTRA = 1000
US = 1000
WAY_OUT = 2  # instructions of a process beside its phases: MOV and SYSCALL of exit


def ended(harness: Harness, processes: int = 1) -> Harness:
    """Run to the end; all processes must have ended by themselves, and the clock must add up."""
    assert harness.issue() == PROGRAM_END
    assert [harness.reason(n) for n in range(processes)] == [layout.ENDED] * processes
    harness.engine.check_clock()
    return harness


def dearer(harness: Harness, price: str) -> Harness:
    """The same guest where one price is higher by `EXTRA` cycles."""
    changed = {f"prices.{price}": harness.profile.prices[price] + EXTRA}
    return Harness(harness.profile.with_overrides(changed), harness.vm)


def elapsed(harness: Harness) -> int:
    return int(ended(harness, len(harness.vm.guest.processes)).engine.cpus[0][s.CYCLE])


def times_paid(harness: Harness, price: str) -> int:
    """How often a price is paid in a run: what raising it adds."""
    return (elapsed(dearer(harness, price)) - elapsed(harness)) // EXTRA


@pytest.mark.parametrize("kpti", [False, True])
@pytest.mark.parametrize("pcid", [False, True])
def test_a_process_ends_and_the_guest_stops(kpti: bool, pcid: bool) -> None:
    harness = ended(native((g.WorkSpec(instructions=1000),), kpti=kpti, pcid=pcid))
    assert harness.instructions(o.R3) == 1000 + 1 + WAY_OUT
    assert harness.count(k.SYSCALLS) == 1


def test_without_pages_to_fault_there_are_no_page_faults() -> None:
    assert ended(native((g.CpuidSpec(iterations=10),))).count(k.PAGE_FAULTS) == 0


@pytest.mark.parametrize("kpti", [False, True])
@pytest.mark.parametrize("pattern", ["sequential", "uniform", "chase"])
def test_every_page_faults_once(pattern: str, kpti: bool) -> None:
    pages = 16
    phase = g.StreamSpec(pattern=pattern, region=pages * PAGE, accesses=40 * pages, stride=PAGE, write=0.5)
    if pattern == "sequential":
        phase = g.StreamSpec(pattern="strided", region=pages * PAGE, accesses=4 * pages, stride=PAGE, write=0.5)
    harness = ended(native((phase,), kpti=kpti))
    assert harness.count(k.PAGE_FAULTS) == pages


@pytest.mark.parametrize("size", [4 * KIB, 2 * MIB, GIB])
def test_prebuilt_memory_does_not_fault(size: int) -> None:
    phase = g.StreamSpec(region=max(size, 64 * KIB), accesses=64, write=0.5)
    harness = ended(native((phase,), memory=4 * GIB, page_size=size, populate="prebuilt"))
    assert harness.count(k.PAGE_FAULTS) == 0
    assert harness.count(k.DIRTY_ASSISTS) == 0


@pytest.mark.slow
def test_a_large_page_faults_once_for_all_that_it_covers() -> None:
    phase = g.StreamSpec(pattern="strided", region=4 * MIB, stride=64 * KIB, accesses=64)
    assert ended(native((phase,), page_size=2 * MIB)).count(k.PAGE_FAULTS) == 2


def test_unmapped_pages_fault_again() -> None:
    pages, iterations = 40, 3
    harness = ended(native((g.PageFaultSpec(region=pages * PAGE, iterations=iterations),)))
    assert harness.count(k.PAGE_FAULTS) == pages * iterations


@pytest.mark.parametrize(("pages", "kpti"), [(5, False), (40, True)])
def test_protected_pages_fault_at_their_next_write(pages: int, kpti: bool) -> None:
    iterations = 3
    harness = ended(native((g.ProtectSpec(region=pages * PAGE, iterations=iterations),), kpti=kpti))
    assert harness.count(k.PAGE_FAULTS) == pages * iterations
    zone = layout_zone(harness)
    free = (harness.engine.load(zone + layout.Z_TOP) - harness.engine.load(zone + layout.Z_BOTTOM)) // 8
    unprotected = ended(native((g.ProtectSpec(region=pages * PAGE, iterations=1),), kpti=kpti))
    assert free == (unprotected.engine.load(zone + layout.Z_TOP) - unprotected.engine.load(zone + layout.Z_BOTTOM)) // 8


@pytest.mark.parametrize("kpti", [False, True])
def test_a_fork_copies_what_the_child_writes_and_nothing_else(kpti: bool) -> None:
    pages, iterations = 5, 3
    harness = ended(native((g.ForkSpec(iterations=iterations, pages=pages),), kpti=kpti))
    # The parent faults once a page at first, after each fork again to write; the child once a page.
    assert harness.count(k.PAGE_FAULTS) == 2 * iterations * pages
    assert harness.cpu_word(layout.SWITCHES) == 1 + 2 * iterations
    zone = layout_zone(harness)
    free = (harness.engine.load(zone + layout.Z_TOP) - harness.engine.load(zone + layout.Z_BOTTOM)) // 8
    at_first = pages + layout.USER_STACK_PAGES + pages + 4
    assert free == at_first - pages  # the parent's own pages are in use, the children's came back


@pytest.mark.parametrize(("kpti", "pcid"), [(False, True), (True, False), (True, True)])
def test_an_exec_gives_the_child_fresh_pages_and_returns_what_it_had(kpti: bool, pcid: bool) -> None:
    pages, iterations = 5, 3
    harness = ended(native((g.ExecSpec(iterations=iterations, pages=pages),), kpti=kpti, pcid=pcid))
    # The parent faults once a page at first, and once a page after each fork; the child once for each fresh page.
    assert harness.count(k.PAGE_FAULTS) == 2 * iterations * pages
    assert harness.cpu_word(layout.SWITCHES) == 1 + 2 * iterations
    zone = layout_zone(harness)
    free = (harness.engine.load(zone + layout.Z_TOP) - harness.engine.load(zone + layout.Z_BOTTOM)) // 8
    assert free == layout.USER_STACK_PAGES + pages + 4
    forked = ended(native((g.ForkSpec(iterations=iterations, pages=pages),), kpti=kpti, pcid=pcid))
    assert harness.instructions(o.R0) > forked.instructions(o.R0)


def layout_zone(harness: Harness) -> int:
    """The guest-physical address of the zone of 4 KiB frames: the frame after the entry area."""
    return (FIRST + layout.ENTRY_PAGES) << 12


@pytest.mark.parametrize(("kpti", "per_call"), [(False, 0), (True, 2)])
def test_kpti_writes_cr3_twice_per_system_call(kpti: bool, per_call: int) -> None:
    few, many = (native((g.SyscallSpec(iterations=n),), kpti=kpti, pcid=True) for n in (10, 30))
    price = "MOV_TO_CR3_NOFLUSH"
    assert times_paid(many, price) - times_paid(few, price) == 20 * per_call


def test_with_pcids_a_system_call_under_kpti_walks_nothing() -> None:
    def walks(iterations: int, pcid: bool) -> int:
        phase = g.SyscallSpec(iterations=iterations)
        return ended(native((phase,), kpti=True, pcid=pcid)).count(k.WALKS)

    assert walks(30, True) == walks(10, True)
    assert walks(30, False) >= walks(10, False) + 20


@pytest.mark.parametrize("kpti", [False, True])
def test_processes_that_yield_alternate(kpti: bool) -> None:
    turns = 10
    phases = (g.ContextSwitchSpec(iterations=turns),)
    harness = ended(native(phases, phases, kpti=kpti), 2)
    # From idle to the first, each yield, and when the first has ended.
    assert harness.cpu_word(layout.SWITCHES) == 1 + 2 * turns + 1


def test_a_process_alone_yields_to_itself() -> None:
    harness = ended(native((g.ContextSwitchSpec(iterations=10),)))
    assert harness.cpu_word(layout.SWITCHES) == 1


def test_switches_between_processes_flush_nothing_with_pcids() -> None:
    phases = (g.ContextSwitchSpec(iterations=10),)
    flushing = "MOV_TO_CR3"
    assert times_paid(native(phases, phases, pcid=True), flushing) == 0
    assert times_paid(native(phases, phases, pcid=False), flushing) == 1 + 2 * 10 + 1


def test_an_idle_guest_halts_until_its_sleeper_is_due() -> None:
    duration = 500 * US
    harness = ended(native((g.IdleSpec(duration=duration),)))
    assert harness.count(k.HALTS) == 1
    assert harness.count(k.INTERRUPTS) == 1
    cycles = duration * harness.profile.clock_hz // 1_000_000_000
    wake = harness.profile.cycles(harness.profile.latency.wake_ns)
    assert cycles * 0.9 < harness.cycles(o.HALTED_CYCLES) < cycles + wake


@pytest.mark.parametrize("profile", ["skx-4114", "nehalem-ep"])
def test_an_idle_guest_wakes_for_every_tick(profile: str) -> None:
    tick = 100 * US
    harness = ended(native((g.IdleSpec(duration=10 * tick + tick // 2),), tick=tick, profile=profile))
    assert harness.count(k.HALTS) == 10 + 1
    assert harness.cpu_word(layout.JIFFIES) == 10


def test_each_hlt_is_ended_by_a_tick() -> None:
    harness = ended(native((g.HltSpec(iterations=5),), tick=50 * US))
    assert harness.count(k.HALTS) == 5
    assert harness.cpu_word(layout.JIFFIES) == 5


def test_the_tick_shares_the_cpu_between_processes() -> None:
    tick = 50 * US
    phases = (g.WorkSpec(instructions=1_000_000),)
    harness = ended(native(phases, phases, tick=tick), 2)
    ticks = harness.cpu_word(layout.JIFFIES)
    period = tick * harness.profile.clock_hz // 1_000_000_000
    assert ticks == int(harness.engine.cpus[0][s.CYCLE]) // period
    assert ticks - 2 <= harness.cpu_word(layout.SWITCHES) <= ticks + 2


def test_ring_0_loops_are_preempted_too() -> None:
    harness = ended(native((g.MovFromCr8Spec(iterations=2000),), (g.WorkSpec(instructions=1000),), tick=2 * US), 2)
    assert harness.cpu_word(layout.SWITCHES) >= 3


@pytest.mark.parametrize(
    ("phase", "vector"), [(g.VmcallSpec(iterations=1), 6), (g.RdmsrSpec(iterations=1, msr=0x123), 13)]
)
@pytest.mark.parametrize("kpti", [False, True])
def test_a_fault_kills_its_process_and_no_other(phase: g.Phase, vector: int, kpti: bool) -> None:
    harness = native((phase,), (g.WorkSpec(instructions=500),), kpti=kpti)
    assert harness.issue() == PROGRAM_END
    assert harness.reason(0) == layout.KILLED
    assert harness.log(layout.L_VECTOR) == vector
    assert harness.reason(1) == layout.ENDED


def test_a_device_register_is_read_through_the_direct_map() -> None:
    harness = native((g.MmioReadSpec(iterations=1, address=0xFED0_00F0),))
    assert harness.issue() == DEVICE_READ
    assert int(harness.engine.cpus[0][s.STOP_A]) == 0xFED0_00F0


def test_state_saved_between_ops_continues_to_the_same_bytes() -> None:
    phases = (g.ForkSpec(iterations=1, pages=2), g.SyscallSpec(iterations=2))
    harness = native(phases, (g.IdleSpec(duration=20 * US),), tick=10 * US, kpti=True)
    engine = harness.engine
    for _ in range(3):
        harness.issue(ops=150)
        saved = engine.save()
        harness.issue(ops=200)
        cpus, arena, tags = engine.cpus.copy(), engine.arena.copy(), engine.tags.copy()
        engine.restore(saved)
        harness.issue(ops=200)
        assert np.array_equal(engine.cpus, cpus)
        assert np.array_equal(engine.arena, arena)
        assert np.array_equal(engine.tags, tags)
    ended(harness, 2)


def test_every_kernel_path_says_what_it_is() -> None:
    assert all(kernel_paths.describe(name) for name in kernel_paths)


def test_every_length_says_what_it_stands_for() -> None:
    assert all(length.instructions > 0 and length.what and length.source for length in LENGTHS.values())


@pytest.mark.parametrize("first", ["smp", "timer"])
def test_a_kernels_text_is_laid_out_in_one_order_whoever_imports_a_part_of_it_first(first: str) -> None:
    """In a process of its own, for here all are imported."""
    program = f"import vtsim.guest.kernel.{first}, vtsim.guest.kernel as k; print(*k.kernel_paths, sep='/')"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert found.stdout.strip().split("/") == list(kernel_paths)


@pytest.mark.parametrize(
    ("memory", "sizes"),
    [
        (64 << 20, {0: SIZE_4K, 0x1FF000: SIZE_4K, 0x200000: SIZE_2M, 0x3FFF000: SIZE_2M, 0x4000000: SIZE_2M}),
        (3 << 30, {0x1FF000: SIZE_4K, 0x200000: SIZE_2M, 1 << 30: SIZE_1G, (3 << 30) - 1: SIZE_1G}),
        (5 << 30, {(4 << 30) - 1: SIZE_2M, 4 << 30: SIZE_1G, (6 << 30) - 1: SIZE_1G, 6 << 30: None}),
        (64 << 20, {0xFEDFF000: SIZE_2M, 0xFEE00000: SIZE_4K, 0xFEFFF000: SIZE_4K, 0xFF000000: SIZE_2M}),
    ],
)
def test_memory_is_mapped_in_large_pages_where_linux_has_them(memory: int, sizes: dict[int, int | None]) -> None:
    """Not below 2 MiB nor where the local APIC is; of 1 GiB only where all of it is memory."""
    harness = native((g.WorkSpec(instructions=1),), memory=memory)
    table = Table(
        root=harness.start.roots[0] >> 12,
        format=PAGING,
        take=lambda: 0,
        words=lambda gfn: harness.engine.contents(gfn, TABLE),
    )
    found = {gpa: table.find(layout.DIRECT + gpa) for gpa in sizes}

    assert {gpa: leaf and leaf.size for gpa, leaf in found.items()} == sizes
    assert all(leaf.frame << 12 == gpa & -(4096 << 9 * leaf.size) for gpa, leaf in found.items() if leaf)
