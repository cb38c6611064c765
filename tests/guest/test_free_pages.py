"""Free pages of a kernel with several CPUs: no page is lost, and none is given to two."""

from __future__ import annotations

from collections import deque
from math import sqrt
from types import ModuleType

import pytest
from attrs import define, evolve, field
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.conftest import Harness
from tests.vmm.shootdown import Threads, threads
from vtsim.base import jit
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.codes import FOREVER, PROGRAM_END
from vtsim.cpu.profile import load_profile
from vtsim.guest import build
from vtsim.guest import spec as g
from vtsim.guest.kernel import KernelOptions, free_pages, smp
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.free_pages import Sizes, sizes
from vtsim.guest.kernel_data import ZONE_BYTES, list_frames
from vtsim.guest.machine_view import PhysicalMemory
from vtsim.platform.spec import VmSpec

KIB, MIB, GIB, PAGE = 1 << 10, 1 << 20, 1 << 30, 4096
SLOW = pytest.mark.compiled_only

# --- how large the lists are --------------------------------------------------------------------------------------
# Memory, min_free_kbytes as the table in mm/page_alloc.c gives it, batch that /proc/zoneinfo shows
KNOWN = ((128 * MIB, 1448, 7), (256 * MIB, 2048, 15), (512 * MIB, 2896, 31), (GIB, 4096, 63), (16 * GIB, 16384, 63))


@pytest.mark.parametrize(("memory", "kept", "batch"), KNOWN)
@pytest.mark.parametrize("cpus", [2, 16])
def test_lists_are_as_large_as_linux_makes_them(memory: int, kept: int, batch: int, cpus: int) -> None:
    pages = memory // PAGE
    low = kept // 4 + max(kept // 4 // 4, pages // 1000)

    assert sizes(pages, cpus) == Sizes(batch, max(low // cpus, 4 * batch), low)


@given(pages=st.integers(1 << 10, 1 << 28), cpus=st.integers(2, at.CPU_LIMIT))
def test_a_list_has_room_and_gives_back_less_than_it_has(pages: int, cpus: int) -> None:
    found = sizes(pages, cpus)

    assert found.batch & (found.batch + 1) == 0 and 1 <= found.batch <= 63
    assert 4 * found.batch <= found.high <= found.places < 2 * found.high
    assert found.places & (found.places - 1) == 0
    assert min(sqrt(pages * 64), 1 << 18) / 4 - 1 < found.low_watermark


# --- one call at a time, against lists in Python --------------------------------------------------------------------
CPUS = 3
CALL = st.tuples(
    st.sampled_from(["take"] * 4 + ["give"] * 3 + ["drain"]), st.integers(0, CPUS - 1), st.integers(0, 1 << 30)
)


@define
class Lists:
    """What the kernel should do, with lists whose last page is the one that was put last."""

    batch: int
    high: int
    zone: list[int]
    of_cpus: list[deque[int]] = field(factory=lambda: [deque() for _ in range(CPUS)])

    def take(self, cpu: int) -> int:
        mine = self.of_cpus[cpu]
        if not mine and not self.zone:
            self.drain()
        if not mine:
            for _ in range(min(self.batch, len(self.zone))):
                mine.appendleft(self.zone.pop())
        return mine.pop() if mine else 0

    def give(self, cpu: int, page: int) -> None:
        self.of_cpus[cpu].append(page)
        if len(self.of_cpus[cpu]) >= self.high:
            self.zone += [self.of_cpus[cpu].popleft() for _ in range(self.batch)]

    def drain(self) -> int:
        before = len(self.zone)
        for pages in self.of_cpus:
            self.zone += pages
            pages.clear()
        return len(self.zone) - before


@define
class Called:
    """A guest that never runs: its kernel's subroutines are called one by one. `size`: of its zone's pages."""

    harness: Harness
    size: int = 0

    @property
    def zone(self) -> int:
        """Guest-physical address of the zone: zones are in the frame behind the last CPU's lists."""
        frames = list_frames(sizes(self.harness.vm.memory // PAGE, CPUS))
        return self.lists(CPUS - 1) + frames * PAGE + self.size * ZONE_BYTES

    def lists(self, cpu: int) -> int:
        return self.harness.cpu_word(cpu * smp.CPU_BYTES + at.PAGE_LISTS) - at.DIRECT

    def word(self, cpu: int, word: int) -> int:
        """Guest-physical address of a word of a CPU's list."""
        return self.lists(cpu) + self.size * ZONE_BYTES + word

    def call(self, subroutine: str, cpu: int, page: int = 0) -> int:
        """Call a subroutine on a CPU; the register of its answer."""
        kept = self.begin(subroutine, cpu, page)
        m = self.harness.engine.cpus[cpu]
        assert self.harness.engine.run(cpu) == PROGRAM_END
        assert {register: int(m[s.GPR + register]) for register in kept} == kept
        return int(m[s.GPR + (s.RAX if subroutine == "drain_all" else s.RDX)])

    def begin(self, subroutine: str, cpu: int, page: int = 0) -> dict[int, int]:
        """Let a CPU stand at a subroutine; registers that it keeps."""
        engine, kernel = self.harness.engine, self.harness.start.texts[0]
        m = engine.cpus[cpu]
        end = next(i.at for i in kernel.instructions if i.op == o.STOP_OP)
        stack = (self.harness.start, *self.harness.start.others)[cpu].rsp - 8
        kept = {register: 1000 + register for register in (s.RBX, s.RBP, s.R12, s.R14, s.R15)}
        if subroutine == "give_page":
            kept[s.RSI] = 1000
        for register, value in {s.RSP: stack, s.R13: at.DIRECT + self.zone, s.RDX: page, **kept}.items():
            m[s.GPR + register] = value
        engine.store(stack - at.DIRECT, end)
        m[s.RIP] = kernel.labels[subroutine]
        engine.sync(cpu)
        return kept

    def both(self, first: str, second: str, later: int, page: int) -> list[int]:
        """Call a subroutine on CPU 0 and one on CPU 1, that so many cycles later; the pages they have in the end."""
        engine, names = self.harness.engine, (first, second)
        now = int(engine.cpus[:, s.CYCLE].max())
        for cpu, name in enumerate(names):
            self.begin(name, cpu, page)
            engine.cpus[cpu, s.CYCLE] = now + later * cpu
        engine.cpus[2, s.CYCLE] = now + (1 << 30)
        code, ended = engine.run_all(FOREVER, 1)
        assert code == PROGRAM_END and engine.run(1 - ended) == PROGRAM_END
        engine.cpus[2, s.CYCLE] = now
        return [int(engine.cpus[n, s.GPR + s.RDX]) for n in range(2) if names[n] == "take_page"]

    def lay(self, zone: list[int], *lists: list[int], batch: int, high: int) -> None:
        """Let pages lie in the zone and in the CPUs' lists."""
        store, bottom = self.harness.engine.store, self.harness.engine.load(self.zone + at.Z_BOTTOM)
        for n, page in enumerate(zone):
            store(bottom - at.DIRECT + 8 * n, page)
        store(self.zone + at.Z_TOP, bottom + 8 * len(zone))
        for cpu, pages in enumerate(lists):
            for word, value in (
                (at.P_COUNT, len(pages)), (at.P_HEAD, len(pages)), (at.P_BATCH, batch), (at.P_HIGH, high),
            ):  # fmt: skip
                store(self.word(cpu, word), value)
            places = self.harness.engine.load(self.word(cpu, at.P_PLACES))
            for n, page in enumerate(pages):
                store(places - at.DIRECT + 8 * n, page)

    def everywhere(self) -> list[int]:
        return sorted(self.in_zone() + [page for cpu in range(CPUS) for page in self.in_list(cpu)])

    # --- what is where
    def in_zone(self) -> list[int]:
        load = self.harness.engine.load
        bottom, top = load(self.zone + at.Z_BOTTOM), load(self.zone + at.Z_TOP)
        return [load(place - at.DIRECT) for place in range(bottom, top, 8)]

    def in_list(self, cpu: int) -> list[int]:
        load = self.harness.engine.load
        head, count, places, mask = (
            load(self.word(cpu, word)) for word in (at.P_HEAD, at.P_COUNT, at.P_PLACES, at.P_MASK)
        )
        return [load(places - at.DIRECT + 8 * (n & mask)) for n in range(head - count, head)]


def three_cpus(page_size: int = 4 * KIB) -> Called:
    process = g.ProcessSpec(name="p0", threads=CPUS, phases=(g.StreamSpec(region=2 * MIB),))
    guest = g.GuestSpec(kernel=g.KernelSpec(tick=0, page_size=page_size), processes=(process,))
    return Called(Harness(load_profile("skx-4114"), VmSpec(memory=32 * MIB, vcpus=CPUS, guest=guest)))


@pytest.fixture(scope="module")
def called() -> Called:
    return three_cpus()


@given(calls=st.lists(CALL, max_size=40), free=st.integers(0, 20), batch=st.integers(1, 4), more=st.integers(0, 5))
@settings(max_examples=20 if jit.DISABLED else 100)
def test_pages_go_where_lists_in_python_say(
    calls: list[tuple[str, int, int]], free: int, batch: int, more: int, called: Called
) -> None:
    """A list gives what it was given last, and gives back what it was given first; no page is lost, and none is doubled."""
    pages = [0x100_0000 + n * PAGE for n in range(free)]
    called.lay(pages, [], [], [], batch=batch, high=batch + more)
    lists, out = Lists(batch, batch + more, list(pages)), list[int]()
    for name, cpu, number in calls:
        if name == "take":
            page = called.call("take_page", cpu)
            assert page == lists.take(cpu)
            assert page or len(out) == free
            out += [page] if page else []
        elif name == "drain":
            assert called.call("drain_all", cpu) == lists.drain()
        elif out:
            page = out.pop(number % len(out))
            called.call("give_page", cpu, page)
            lists.give(cpu, page)
        assert called.in_zone() == lists.zone
        assert [called.in_list(n) for n in range(CPUS)] == [list(one) for one in lists.of_cpus]
        assert sorted([*out, *lists.zone, *(page for one in lists.of_cpus for page in one)]) == pages


def test_larger_pages_do_not_stay_in_a_list() -> None:
    called = evolve(three_cpus(2 * MIB), size=1)
    free = called.in_zone()
    page = called.call("take_page", 1)

    assert (page, called.in_zone()) == (free[-1], free[:-1])
    called.call("give_page", 2, page)
    assert called.in_zone() == free
    assert [called.in_list(cpu) for cpu in range(CPUS)] == [[]] * CPUS


# --- two calls at once, one of them later and later -----------------------------------------------------------------
PAIRS = (
    pytest.param("take_page", "take_page", [1, 2, 3], [], id="both fill their lists"),
    pytest.param("give_page", "take_page", [1, 2], [3, 4], id="one gives back, one fills"),
    pytest.param("take_page", "drain_all", [], [1, 2, 3], id="a list is drained by whom else takes"),
    pytest.param("give_page", "drain_all", [], [1, 2, 3], id="a list is drained by whom else gives"),
    pytest.param("take_page", "take_page", [], [1], id="both want the last page"),
)
LATEST, STEP = 2400, 60  # cycles: longer than a batch takes


def at_once(called: Called, first: str, second: str, zone: list[int], mine: list[int]) -> None:
    for later in range(0, LATEST, STEP):
        called.lay(zone, mine, [], [], batch=2, high=3)
        given = [9] if first == "give_page" else []
        taken = called.both(first, second, later, page=9)

        assert sorted(called.everywhere() + [page for page in taken if page]) == sorted(zone + mine + given), later
        assert sum(page > 0 for page in taken) == min(len(taken), len(zone + mine + given))


@pytest.mark.parametrize(("first", "second", "zone", "mine"), PAIRS)
def test_no_page_is_lost_or_doubled_whenever_the_other_cpu_comes(
    first: str, second: str, zone: list[int], mine: list[int], called: Called
) -> None:
    at_once(called, first, second, zone, mine)


# --- all at once ----------------------------------------------------------------------------------------------------
PAGES = 13
AT_ONCE = f"""
machine: {{cpus: {CPUS}, memory: 256 MiB}}
vms:
  - memory: 64 MiB
    vcpus: {CPUS}
    guest:
      kernel: {{tick: off}}
      processes:
"""
PROCESS = """
        - name: p{cpu}
          vcpu: {cpu}
          phases:
            - {{primitive: page_fault, region: {region} KiB, iterations: {rounds}}}
            - {{primitive: stream, pattern: strided, stride: 4 KiB, write: 100 %, region: {region} KiB, accesses: {pages}}}
"""
AT_ONCE += "".join(PROCESS.format(cpu=n, region=4 * PAGES, pages=PAGES, rounds=3 + n) for n in range(CPUS))
WAYS = (
    pytest.param(("vmm.technique=native",), id="natively"),
    pytest.param(("vmm.technique=native", "vms.0.guest.kernel.kpti=true"), id="natively, KPTI", marks=SLOW),
    pytest.param((), id="on EPT", marks=SLOW),
    pytest.param(("vmm.paging=shadow",), id="on shadow tables", marks=SLOW),
    pytest.param(("vmm.paging=agile",), id="on agile tables", marks=SLOW),
    pytest.param(("vmm.paging=direct-pv", "vmm.personality=minimal"), id="on direct tables", marks=SLOW),
)


SMALL = Sizes(batch=3, high=6, low_watermark=0)
NEEDED = CPUS * PAGES


def memory(ran: Threads) -> PhysicalMemory:
    found = ran.machine.vms[0].memory
    assert found is not None
    return found


def zone_of(ran: Threads) -> int:
    return ran.cpu_word(CPUS - 1, at.PAGE_LISTS) + list_frames(SMALL) * PAGE


def free_frames(ran: Threads) -> list[int]:
    """All free pages, in the zone's list and those of the CPUs: their frames as entries name them."""
    zone = zone_of(ran)
    pages = [ran.word(place) for place in range(ran.word(zone + at.Z_BOTTOM), ran.word(zone + at.Z_TOP), 8)]
    for one in (ran.cpu_word(cpu, at.PAGE_LISTS) for cpu in range(CPUS)):
        head, count, places, mask = (ran.word(one + word) for word in (at.P_HEAD, at.P_COUNT, at.P_PLACES, at.P_MASK))
        pages += [ran.word(places + 8 * (n & mask)) for n in range(head - count, head)]
    return [memory(ran).frame(page >> 12) if ran.direct else page >> 12 for page in pages]


def mapped_frames(ran: Threads) -> list[int]:
    """The frames that processes have mapped."""
    found = []
    for process, space in enumerate(ran.machine.vms[0].spaces):
        tables = ran.tables(process)
        leaves = [tables.find(address) for _, start, end in space.areas for address in range(start, end, PAGE)]
        found += [leaf.frame for leaf in leaves if leaf is not None]
    return found


def check_pages(monkeypatch: pytest.MonkeyPatch, *settings: str, seed: int = 1) -> None:
    """Processes that need all pages that there are get them; in the end each page is mapped, once."""
    monkeypatch.setattr(build, "sizes", lambda pages, cpus: SMALL)
    ran = threads(AT_ONCE, *settings)
    zone = zone_of(ran)
    memory(ran).store(zone + at.Z_BOTTOM - at.DIRECT, ran.word(zone + at.Z_TOP) - 8 * NEEDED)
    at_first = free_frames(ran)
    ran.run(seed=seed)

    log = memory(ran).frame(ran.machine.vms[0].log >> 12) << 12
    assert [ran.machine.engine.load(log + n * at.LOG_BYTES) for n in range(CPUS)] == [at.ENDED] * CPUS
    assert free_frames(ran) == []
    assert sorted(frame for frame in mapped_frames(ran) if frame in at_first) == sorted(at_first)


@pytest.mark.slow
@pytest.mark.parametrize("settings", WAYS)
def test_processes_that_need_all_pages_get_them_and_each_has_its_own(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_pages(monkeypatch, *settings)


def _no_drain(a: Assembler, kernel: KernelOptions) -> None:
    a.label("drain_all")
    a.mov(s.RAX, 0)
    a.ret()


@pytest.mark.parametrize(
    ("module", "names"), [(smp, ("lock_zone", "unlock_zone")), (free_pages, ("_lock", "_unlock"))], ids=["zone", "list"]
)
def test_a_kernel_without_a_lock_is_found_out(
    module: ModuleType, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        monkeypatch.setattr(module, name, lambda *_: None)
    called = three_cpus()

    with pytest.raises(AssertionError):
        for pair in PAIRS:
            at_once(called, *pair.values)


@pytest.mark.parametrize(("name", "instead"), [("_drain_all", _no_drain), ("TRIES", 1)])
def test_a_kernel_that_drains_no_list_or_looks_only_once_is_found_out(
    name: str, instead: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_pages, name, instead)

    with pytest.raises(AssertionError):
        for quantum in ("null", "20", "8"):  # who comes first decides whether it matters
            check_pages(monkeypatch, "vmm.technique=native", f"machine.quantum={quantum}")


# --- the balloon ----------------------------------------------------------------------------------------------------
BALLOON = f"""
machine: {{cpus: {CPUS}, memory: 128 MiB}}
vmm: {{personality: minimal, balloon: {{size: 1 MiB, stop: 400 us}}}}
vms:
  - memory: 16 MiB
    vcpus: {CPUS}
    guest:
      kernel: {{tick: off}}
      processes:
        - vcpu: 0
          phases:
            - {{primitive: page_fault, region: 160 KiB}}
            - {{primitive: balloon, iterations: 2, period: 400 us}}
"""
BALLOON += "".join(PROCESS.format(cpu=n, region=4 * PAGES, pages=PAGES, rounds=3) for n in range(1, CPUS))


def inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A balloon that may be larger than what is free gets all of it."""
    monkeypatch.setattr(build, "sizes", lambda pages, cpus: SMALL)
    ran = threads(BALLOON)
    free = len(free_frames(ran))
    ran.machine.run()

    assert [vm.stopped for vm in ran.machine.vms] == [None]
    hypervisor = ran.machine.hypervisor
    assert hypervisor is not None
    counts = hypervisor.memory_statistics(hypervisor.vcpus[0])
    assert counts["pages_ballooned"] == counts["pages_deflated"] == free - 2 * PAGES
    assert len(free_frames(ran)) == free - 2 * PAGES


@SLOW
def test_the_balloon_gets_what_lies_in_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    inflated(monkeypatch)


@SLOW
def test_a_balloon_that_drains_no_list_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_pages, "_drain_all", _no_drain)

    with pytest.raises(AssertionError):
        inflated(monkeypatch)
