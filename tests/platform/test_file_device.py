"""Dirty pages of a mapped file: none is lost, each is written once for each time that it became dirty.

The oracle knows of the rules (32 pages, the limits, who writes when) and of no program, queue or table.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from attrs import define, field
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtsim.base import jit
from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario, resolve
from vtsim.cpu import accounts as k
from vtsim.guest.file_mappings import MapFileSpec
from vtsim.guest.file_system import ENTRIES, FileSystemSpec
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel import page_cache as cache
from vtsim.guest.kernel import write_back as q
from vtsim.platform.file_device import FileDevice
from vtsim.platform.machine import Machine
from vtsim.platform.spec import Scenario

KIB, PAGE, MIB = 1 << 10, 4096, 1 << 20
EXAMPLES, LARGEST = (4, 70) if jit.DISABLED else (20, 150)
WAYS = {
    "native": ("vmm.technique=native",),
    "EPT": ("vmm.paging=ept",),
    "shadow": ("vmm.paging=shadow",),
    "minimal": ("vmm.paging=ept", "vmm.personality=minimal"),
}
TEXT = """
machine: {memory: 256 MiB}
run: {limit: 200 ms}
vms:
  - memory: 16 MiB
    guest:
      kernel: {file_system: %s}
      processes: [%s]
"""
PROCESS = "{name: p%d, phases: [%s]}"


def phase(**settings: Any) -> str:
    words = {"primitive": "map_file", "order": "strided", "write": "100 %", **settings}
    return (
        "{"
        + ", ".join(
            f"{name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in words.items()
        )
        + "}"
    )


def scenario(
    kernel: str, *phases: str, processes: int = 1, sets: tuple[str, ...] = WAYS["native"], tick: str = "off"
) -> Scenario:
    each = ", ".join(PROCESS % (number, ", ".join(phases)) for number in range(processes))
    return resolve(parse_scenario(TEXT % (kernel, each), [f"vms.0.guest.kernel.tick={tick}", *sets]), "t")


def run(kernel: str, *phases: str, **how: Any) -> Machine:
    machine = Machine(scenario(kernel, *phases, **how))
    outcome = machine.run()
    assert [vm.stopped for vm in outcome.vms] == [None]
    return machine


def device(machine: Machine) -> FileDevice:
    (found,) = machine.files.values()
    return found


@define
class Cached:
    """What the kernel keeps of the file, read from a machine that has ended."""

    machine: Machine
    base: int = field(init=False)  # gpa of the descriptors, of frames one after the other in the guest's memory

    def __attrs_post_init__(self) -> None:
        self.base = next(
            gfn << 12
            for gfn in range(64, 1024)
            if self.word((gfn << 12) + cache.MAPPING_BYTES + cache.P_MAPPING) == at.DIRECT + (gfn << 12)
        )

    def word(self, gpa: int) -> int:
        memory = device(self.machine).memory
        return self.machine.engine.load(memory.frame(gpa >> 12) << 12 | gpa & 0xFFF)

    @property
    def pages(self) -> int:
        return self.word(self.base + cache.X_PAGES)

    @property
    def first(self) -> int:
        """The first frame of the file, which lies behind what is known of it."""
        return (self.base >> 12) + -(-cache.CachedFile(pages=self.pages).bytes // PAGE)

    def flags(self, page: int) -> int:
        return self.word(self.base + cache.MAPPING_BYTES + page * cache.PAGE_BYTES + cache.P_FLAGS)

    def token(self, page: int) -> int:
        engine, frame = self.machine.engine, device(self.machine).memory.frame(self.first + page)
        return int(engine.arena[int(engine.arena[mem.A_FRAMES]) + frame]) >> mem.FRAME_TOKEN

    def counters(self) -> tuple[int, int]:
        return self.word(self.base + cache.X_DIRTY), self.word(self.base + cache.X_WRITEBACK)

    def bits(self, node: int = 0) -> list[tuple[int, int]]:
        """For each node: its dirty bits, and what they should be by those below."""
        node = node or self.word(self.base + cache.X_ROOT) - at.DIRECT
        level, below, found = self.word(node) // cache.SLOT_BITS, 0, []
        for slot in range(cache.SLOTS):
            child = self.word(node + cache.NODE_HEADER + 8 * slot)
            if child and level:
                found += self.bits(child - at.DIRECT)
                below |= (self.word(child - at.DIRECT + cache.NODE_DIRTY) != 0) << slot
            elif child:
                below |= bool(self.word(child - at.DIRECT + cache.P_FLAGS) & cache.DIRTY) << slot
        mask = (1 << 64) - 1
        return [(self.word(node + cache.NODE_DIRTY) & mask, below), *found]

    def lost(self) -> list[int]:
        """Pages whose last stores neither the device has nor the kernel knows of."""
        has = device(self.machine).contents
        clean = (page for page in range(self.pages) if not self.flags(page) & (cache.DIRTY | cache.WRITEBACK))
        return [page for page in clean if self.token(page) != has.get(page, (0, 0))[0]]


@define
class Oracle:
    """What becomes dirty, and how often each page is written, of phases that one process executes."""

    kind: str
    background: int
    dirty: set[int] = field(factory=set)
    writable: set[int] = field(factory=set)
    rate: int = 0
    faults: int = 0
    writes: Counter[int] = field(factory=Counter)

    def write(self) -> None:
        self.writes.update(self.dirty)
        self.writable -= self.dirty
        self.dirty.clear()

    def store(self, page: int) -> None:
        while page not in self.writable:
            self.faults += 1
            self.writable.add(page)
            if page not in self.dirty:
                self.dirty.add(page)
                self.rate += 1
            if self.rate >= 32:
                self.rate = 0
                if len(self.dirty) > self.background:
                    self.write()

    def run(self, spec: MapFileSpec) -> Oracle:
        for _ in range(spec.iterations):
            for _ in range(spec.passes):
                for touch in range(-(-spec.span_touched // spec.stride)):
                    self.store(touch * spec.stride // PAGE)
                if spec.sync:
                    self.write()
            self.writable.clear()
            if self.kind == "host":
                self.write()
        return self


def faults(machine: Machine) -> int:
    """Page faults that the guest's kernel handled, from its task's own count."""
    (vm,) = machine.vms
    owner = machine.engine.owners[vm.spec.name]
    return int(machine.engine.arena[owner + k.PAGE_FAULTS])


@pytest.mark.parametrize("kind", ["disk", "host"])
@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[pytest.mark.compiled_only] if w == "minimal" else []) for w in WAYS]
)
def test_after_msync_the_device_has_every_page_once_a_round_and_nothing_is_dirty(way: str, kind: str) -> None:
    machine = run(
        f"{{kind: {kind}, write: 50 us, at_once: 1}}",
        phase(region="300 KiB", touched="80 %", stride="8 KiB", iterations=2, sync=True),
        sets=WAYS[way],
    )
    cached = Cached(machine)
    written = range(0, 60, 2)

    assert device(machine).writes == dict.fromkeys(written, 2)
    assert cached.counters() == (0, 0)
    assert {cached.flags(page) for page in range(75)} == {cache.UPTODATE}
    assert all(have == want for have, want in cached.bits())
    if kind == "disk":
        assert cached.lost() == []
        assert all(device(machine).contents[page][0] == cached.token(page) > 0 for page in written)


def test_without_msync_a_disk_gets_nothing_below_the_limit_and_the_host_all_when_the_mapping_goes() -> None:
    pages = phase(region="120 KiB", stride="4 KiB", iterations=3)
    for kind, times in (("disk", 0), ("host", 3)):
        machine = run(f"{{kind: {kind}, write: 1 us}}", pages)
        assert device(machine).writes == (dict.fromkeys(range(30), times) if times else {})
        assert Cached(machine).counters()[0] == (30 if kind == "disk" else 0)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(["disk", "host"]),
    pages=st.integers(1, LARGEST),
    stride=st.sampled_from([1, 2, 4, 8, 12]),
    background=st.sampled_from([0, 1, 3, 10]),  # percent
    iterations=st.integers(1, 2),
    passes=st.integers(1, 3),
    sync=st.booleans(),
    at_once=st.sampled_from([1, 7, 200]),
    way=st.sampled_from(["native", "EPT", "shadow"]),
)
def test_a_page_is_written_once_for_each_time_it_became_dirty(
    kind: str,
    pages: int,
    stride: int,
    background: int,
    iterations: int,
    passes: int,
    sync: bool,
    at_once: int,
    way: str,
) -> None:
    spec = MapFileSpec(
        region=pages * PAGE, order="strided", stride=min(stride, 2 * pages) * 2 * KIB, write=1.0, iterations=iterations,
        passes=passes, sync=sync,
    )  # fmt: skip
    system = FileSystemSpec(kind=kind, background=background / 100, limit=background / 100)
    write = "1 ns" if background else "2 us"  # a page that is being written would stay dirty
    expected = Oracle(kind, system.pages(16 * MIB)[0]).run(spec)
    machine = run(
        f"{{kind: {kind}, write: {write}, at_once: {at_once}, background: {background} %, limit: {background} %}}",
        phase(region=f"{4 * pages} KiB", stride=f"{spec.stride} B", iterations=iterations, passes=passes, sync=sync),
        sets=WAYS[way],
    )
    cached = Cached(machine)

    # a guest that ends does not wait for what is under way
    done, seen = device(machine).writes, Counter(device(machine).writes)
    assert not seen - expected.writes
    in_flight = sum(bool(cached.flags(page) & cache.WRITEBACK) for page in range(pages))
    assert sum(done.values()) >= sum(expected.writes.values()) - in_flight
    assert cached.counters()[0] == len(expected.dirty)
    assert {page for page in range(pages) if cached.flags(page) & cache.DIRTY} == expected.dirty
    assert all(have == want for have, want in cached.bits())
    if way != "shadow":  # where the processor's own faults are the hypervisor's
        assert faults(machine) == expected.faults
    if kind == "disk":
        assert cached.lost() == []


@pytest.mark.parametrize("kernel", ["pcid: true", "pcid: false", "kpti: true"])
@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.compiled_only) for w in ("native", "EPT", "shadow")])
def test_what_other_processes_store_to_pages_that_are_being_written_is_not_lost(way: str, kernel: str) -> None:
    """Each stores 64 times to every page, and is interrupted anywhere: its rights are taken wherever it is."""
    machine = run(
        "{kind: disk, write: 5 us, background: 0 %, limit: 5 %}, " + kernel,
        phase(region="320 KiB", stride="64 B", passes=2, iterations=3),
        processes=3,
        sets=WAYS[way],
        tick="40 us" if way == "shadow" else "7 us",  # which takes that long there
    )

    assert device(machine).writes
    assert Cached(machine).lost() == []


def test_a_copy_of_the_page_goes_to_the_host_and_of_no_other() -> None:
    machine = Machine(scenario("{kind: host, write: 1 us}", phase(region="80 KiB", stride="4 KiB", iterations=1)))
    cached = Cached(machine)
    for page in range(20):
        machine.engine.store(device(machine).memory.frame(cached.first + page) << 12, 1000 + page)
    machine.run()
    written = {page: word for page, (_, word) in device(machine).contents.items()}

    assert written == {page: 1000 + page for page in written}
    assert len(written) >= 18  # the guest ends before its last requests are done


def test_the_doorbell_is_rung_while_the_device_is_idle_only() -> None:
    """A device that is slower than the guest hears of the first request of a round, one that is faster of each."""
    kicks = {}
    for write in ("1 ns", "200 us"):
        machine = run(
            f"{{kind: host, write: {write}, at_once: 1}}", phase(region="64 KiB", stride="4 KiB", iterations=1)
        )
        queue = device(machine).queue
        kicks[write] = Cached(machine).word(queue + q.Q_KICKS)

    assert kicks == {"1 ns": 16, "200 us": 1}


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_more_pages_than_the_queue_has_room_for_are_all_written(kind: str) -> None:
    pages = ENTRIES + 72
    machine = run(
        f"{{kind: {kind}, write: 5 us, at_once: 2, background: 100 %, limit: 100 %}}",
        phase(region=f"{4 * pages} KiB", stride="4 KiB", iterations=1, sync=True),
    )
    cached = Cached(machine)

    spec = MapFileSpec(region=pages * PAGE, order="strided", write=1.0, iterations=1, sync=True)
    assert device(machine).writes == Oracle(kind, FileSystemSpec(kind=kind).pages(16 * 10 * MIB)[0]).run(spec).writes
    assert {cached.flags(page) for page in range(pages)} == {cache.UPTODATE}
    assert cached.counters() == (0, 0)


def test_who_dirties_more_than_may_be_dirty_waits_until_it_is_written_and_others_do_not() -> None:
    """Of 64 pages those of two balances, 1 ms each with one server; with room for all nobody waits."""
    elapsed = {}
    for limit in (0, 100):
        machine = run(
            f"{{kind: disk, write: 1 ms, at_once: 1, background: 0 %, limit: {limit} %}}, pcid: false",
            phase(region="256 KiB", stride="4 KiB", iterations=1),
        )
        elapsed[limit] = machine.vms[0].finished_at or 0
    a_page = machine.profile.cycles(1_000_000)

    assert elapsed[0] > 64 * a_page
    assert elapsed[100] < a_page


def test_a_page_that_is_under_way_to_the_disk_is_written_again_when_it_was() -> None:
    """The device itself says where a page is written twice at a time."""
    machine = run(
        "{kind: disk, write: 1 ms, at_once: 200, background: 0 %, limit: 100 %}",
        phase(region="128 KiB", stride="4 KiB", passes=3, iterations=1, sync=True),
    )
    spec = MapFileSpec(region=128 * KIB, order="strided", write=1.0, iterations=1, passes=3, sync=True)

    assert device(machine).writes == Oracle("disk", 0).run(spec).writes
    assert (machine.vms[0].finished_at or 0) > 3 * machine.profile.cycles(1_000_000)


def test_a_store_to_a_page_of_the_host_waits_until_its_last_write_is_done() -> None:
    """Linux, fuse_page_mkwrite: half a write's time later the page is not dirty, though somebody stores to it."""
    phases = (phase(region="4 KiB", stride="4 KiB", iterations=2),)
    limited = (*WAYS["native"], "run.limit=500 us")
    machine = Machine(scenario("{kind: host, write: 1 ms, at_once: 1}", *phases, sets=limited))
    machine.run()
    assert Cached(machine).flags(0) == cache.UPTODATE | cache.WRITEBACK
    assert faults(machine) == 2

    whole = run("{kind: host, write: 1 ms, at_once: 1}", *phases, phase(region="4 KiB", sync=True, iterations=1))
    assert device(whole).writes == {0: 3}


def test_writers_wait_half_way_to_the_limit() -> None:
    """Linux, dirty_freerun_ceiling; of a file system in user space with a strict limit, a hundredth."""
    assert FileSystemSpec(kind="disk").pages(1000 * PAGE) == (100, 150)
    assert FileSystemSpec(kind="host").pages(100_000 * PAGE) == (100, 150)
    assert FileSystemSpec(kind="disk", background=0.0, limit=1.0).pages(1000 * PAGE) == (0, 500)


@pytest.mark.parametrize(
    ("vm", "sets", "message", "help_"),
    [
        ("vcpus: 2", (), "a guest that writes pages back has one vCPU", "kind can be memory"),
        ("", ("vmm.paging=direct-pv",), "a device for files is one of VMs on EPT or shadow tables", "technique can be"),
        ("", ("vmm.technique=interpreter",), "a device for files is one of VMs on EPT", "technique can be hardware"),
        (
            "",
            ("vmm.sharing.on=true",),
            "vmm.sharing.on: memory that a device for files reaches is not taken back\n",
            " help: on can be false; or vms.0.guest.kernel.file_system.kind memory",
        ),
        (
            "",
            ("vmm.balloon.size=1 MiB",),
            "vmm.balloon.size: memory that a device for files reaches is not taken back\n",
            " help: size can be 0; or vms.0.guest.kernel.file_system.kind memory",
        ),
        (
            "",
            ("vmm.features.exit_clustering=true",),
            "vmm.features.exit_clustering: a doorbell of a device for files does not end an exit cluster\n",
            " help: exit_clustering can be false; or vms.0.guest.kernel.file_system.kind memory",
        ),
        ("", ("vms.0.guest.kernel.paging=PAE",), "a device for files needs a 64-bit kernel", "kind can be memory"),
    ],
)
def test_what_a_device_for_files_cannot_be_combined_with(
    vm: str, sets: tuple[str, ...], message: str, help_: str
) -> None:
    text = (TEXT % ("{kind: disk}", PROCESS % (0, phase(iterations=1)))).replace("machine: {", "machine: {cpus: 2, ")
    text = text.replace("memory: 16 MiB", f"memory: 16 MiB\n    {vm}" if vm else "memory: 16 MiB")
    with pytest.raises(ConfigError) as raised:
        resolve(parse_scenario(text, list(sets)), "t")

    assert message in str(raised.value)
    assert help_ in str(raised.value)


def test_msync_of_a_file_in_memory_has_nothing_to_write() -> None:
    machine = run("{kind: memory}", phase(region="64 KiB", stride="4 KiB", passes=2, iterations=1, sync=True))

    assert machine.files == {}
    assert faults(machine) == 16


def test_pages_are_written_in_the_background_before_there_are_too_many() -> None:
    with pytest.raises(ConfigError) as raised:
        scenario("{kind: disk, background: 30 %}", phase())
    assert "background can be at most 20 %" in str(raised.value)
