"""Direct page tables with several vCPUs: one at a time changes them, and nobody uses what a frame was before."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from attrs import define

from tests.vmm.changing_direct import plans
from tests.vmm.direct_guest import (
    FREE,
    MEMORY,
    NEXT_VCPU,
    READ_ONLY,
    SHARED,
    A,
    D,
    DirectGuest,
    P,
    Recount,
    Steps,
    U,
    W,
    answers,
    check_words,
    direct_guests,
    kept_words,
    random_requests,
)
from tests.vmm.machines import MIB, Machine, machine
from tests.vmm.test_vcpus_shadow import KERNELS, SLOW, nothing, run
from vtsim.base import jit
from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.base.jit import quiet
from vtsim.base.kept import nothing_kept
from vtsim.config import parse_scenario
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import load_profile
from vtsim.ept import direct as d
from vtsim.ept.tables import KERNEL_PAGE
from vtsim.platform.machine import Machine as PlatformMachine
from vtsim.study import equivalence
from vtsim.study.run import without_hypervisor
from vtsim.vmm.build import Guest, needs
from vtsim.vmm.monitor import layout as ring_3
from vtsim.vmm.monitor.virtual_cpus import VirtualCpu
from vtsim.vmm.paravirtual import several as of_ring_3
from vtsim.vmm.paravirtual.build import ParavirtualMonitor, build_paravirtual
from vtsim.vmm.paravirtual.layout import FIRST_OWN, LAST_OWN
from vtsim.vmm.programs import direct, several
from vtsim.vmm.programs.words import vcpu
from vtsim.vmm.registry import Path
from vtsim.vmm.spec import VmmSpec

ONE, TWO, THREE, ROOT = FREE, FREE + 1, FREE + 2, FREE + 3
LINK = 8  # of the entry of a root that leads nowhere
SEEDS = range(1 if jit.DISABLED else 3)
STEPS = 12 if jit.DISABLED else 150
MACHINES: dict[str, dict[str, Any]] = {
    "minimal": {"personality": "minimal"},
    "minimal without VPID": {"personality": "minimal", "vpid": False},
    "kvm": {"personality": "kvm"},
    "ring 3": {"ring3": True},
}
FIRST = ("minimal", "minimal without VPID", "ring 3")
RINGS = pytest.mark.parametrize("ring3", [False, True])
NAMES = [name if name in FIRST else pytest.param(name, marks=SLOW) for name in MACHINES]


@define(eq=False)
class Ring3:
    """A machine whose VM has its kernel in ring 3, with what the tests ask a machine for."""

    engine: Engine
    monitor: ParavirtualMonitor

    @property
    def vcpu(self) -> VirtualCpu:
        return self.monitor.vcpus[0]


def in_ring_3(*steps: Steps) -> tuple[Ring3, dict[str, Any]]:
    """The same where nobody has VT-x."""
    holder: dict[str, Any] = {}
    vmm, profile, count = VmmSpec(technique="paravirtual", paging="direct-pv"), load_profile("skx-4114"), len(steps)
    wants = needs(vmm, [MEMORY], 4 * MEMORY, count - 1)
    geometry = Geometry(
        cpus=count, memory_bytes=4 * MEMORY, pool_pages=wants.pool_pages + 4096, code_pages=wants.code_pages + 16,
        rows=wants.rows + 4096, owners=wants.owners + 1,
    )  # fmt: skip
    with quiet():
        engine = Engine(profile, geometry)
        cpus = tuple(range(count))
        guest = Guest(name="vm0", cpu=0, memory=MEMORY, build=direct_guests(steps, holder), cpus=cpus)
        monitor = build_paravirtual(vmm=vmm, profile=profile, engine=engine, guests=[guest])
        cpu = run(engine)
    assert cpu == 0 and monitor.in_guest(0), [monitor.death(vcpu) for vcpu in monitor.vcpus]
    return Ring3(engine, monitor), holder


def ran(*steps: Steps, ring3: bool = False, **options: Any) -> tuple[Machine | Ring3, dict[str, Any]]:
    """A machine whose vCPUs have done these steps."""
    if ring3:
        return in_ring_3(*steps)
    holder: dict[str, Any] = {}
    count = len(steps)
    m = machine(
        direct_guests(steps, holder), paging="direct-pv", memory=MEMORY, host_memory=64 * MIB, cpus=count, vcpus=count,
        **{"personality": "minimal", **options},
    )  # fmt: skip
    cpu = run(m.engine)
    assert cpu == 0 and m.hypervisor.in_guest(0), [m.hypervisor.death(vcpu) for vcpu in m.hypervisor.vcpus]
    return m, holder


def check_frames(m: Machine | Ring3) -> None:
    """What the hypervisor keeps of frames is what the tables imply; all roots that are loaded are roots."""
    if isinstance(m, Ring3):
        host, own = m.monitor.host, range(FIRST_OWN, LAST_OWN + 1)
        words = next(i.imm for i in m.monitor.program.instructions if i.comment == "words of frames") - ring_3.DIRECT
        roots = [m.monitor.word(each, "KERNEL_CR3") for each in m.monitor.vcpus]
    else:
        host, own = m.hypervisor.host, range(0)
        words = m.hypervisor.path.addresses["frame_words"] - 0xFFFF_8880_0000_0000
        roots = [m.field(each, "GUEST_CR3") for each in m.hypervisor.vcpus]
    owned = {int(frame) for frame in m.vcpu.memory.frames}  # type: ignore[union-attr]
    kept = kept_words(host.words, words >> 12, iter(sorted(owned)))
    for root in roots:
        check_words(Recount(lambda frame: host.words(frame, mem.TABLE), own=own), kept, owned, root >> 12)


def counted(m: Machine | Ring3, name: str) -> int:
    """A count of what several vCPUs do with each other; in ring 3 all flushes for others have one."""
    if isinstance(m, Ring3):
        return m.monitor.hypercalls()["events"]["lock_waits" if name == "lock_waits" else "remote_flushes"]
    return m.hypervisor.memory_statistics(m.vcpu).get(name, 0)


def at_random(seed: int) -> tuple[Steps, Steps]:
    """Requests of two vCPUs; roots that they make need not map what they run, so they load none."""
    first, second = (random_requests(seed + n, STEPS, (d.PIN, d.UNPIN)) for n in (0, 100))
    return first, second


# --- requests of vCPUs at once --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_whatever_vcpus_ask_for_at_once_counts_are_right(name: str) -> None:
    good = 0
    for seed in SEEDS:
        m, holder = ran(*at_random(seed), **MACHINES[name])
        check_frames(m)
        good += sum(answer == 1 for n in (0, 1) for answer in answers(holder, n))

    assert good > 3 * STEPS // 10
    assert counted(m, "lock_waits") > 0


def same_entry(guest: DirectGuest) -> None:
    """Update one entry again and again: with another frame each time, writable or not."""
    for n in range(STEPS):
        frame = (ONE, TWO, THREE)[(n + guest.vcpu) % 3]
        guest.request(guest.entry_of(ONE), guest.machine(frame) | P | (W | A | D if (n + guest.vcpu) % 2 else 0))


@RINGS
def test_who_updates_one_entry_at_once_leaves_one_of_the_two_results(ring3: bool) -> None:
    m, holder = ran(same_entry, same_entry, ring3=ring3)
    check_frames(m)

    guest: DirectGuest = holder["guest"]
    left = m.engine.load(guest.entry_of(ONE)) & ~(A | D | U)
    assert all(answer == 1 for n in (0, 1) for answer in answers(holder, n))
    last = [(STEPS - 1 + n) for n in (0, 1)]
    wanted = {guest.machine((ONE, TWO, THREE)[n % 3]) | P | (W if n % 2 else 0) for n in last}
    assert left in wanted


LOCK: tuple[tuple[ModuleType, str, Callable[..., None]], ...] = (
    (several, "lock_tables", nothing),
    (several, "unlock_tables", nothing),
    (of_ring_3, "lock_tables", nothing),
    (of_ring_3, "unlock_tables", nothing),
)


@RINGS
@pytest.mark.parametrize("steps", [same_entry, None], ids=["one entry", "at random"])
@SLOW
def test_a_hypervisor_without_the_lock_counts_wrong(
    steps: Steps | None, ring3: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, instead in LOCK:
        monkeypatch.setattr(module, name, instead)

    with nothing_kept(), pytest.raises(AssertionError):
        for seed in range(20):  # every other one finds it
            check_frames(ran(*((steps, steps) if steps else at_random(seed)), ring3=ring3)[0])


# --- what a frame was before ----------------------------------------------------------------------------------------
def by_stale_translations(guest: DirectGuest) -> None:
    """vCPU 0 makes a table of a frame; vCPU 1, which has a translation to write to it, writes an entry of its own."""
    host = 1 << 12 | P | W
    if guest.vcpu:
        guest.attempt(lambda: guest.store(ONE, 1, 0))
        guest.wait(0, guest.tell())
        guest.attempt(lambda: guest.store(ONE, 0, host))
        guest.tell()
        return
    guest.wait(1, 1)
    guest.request(guest.entry_of(ONE), guest.machine(ONE) | READ_ONLY)
    guest.request(guest.table.root << 12 | LINK, guest.machine(ONE) | P)
    guest.tell()
    guest.wait(1, 2)


def by_stale_tables(guest: DirectGuest) -> None:
    """vCPU 1 uses tables that vCPU 0 then gives up and writes to; it goes on by those that its processor remembers.

    The address is one of a page of its own beside the one that its processor has a translation of.
    """
    tables, address = (ONE, TWO, THREE), 1 << 39
    if guest.vcpu:
        guest.wait(0, 1)
        guest.attempt(lambda: guest.load(address))
        guest.wait(0, guest.tell() + 1)
        guest.a.mov(s.RAX, 0)
        guest.attempt(lambda: guest.load(address + 0x1000))
        guest.log(s.RAX)
        guest.tell()
        return
    for upper, lower in zip(tables, (*tables[1:], ROOT), strict=True):
        guest.store(upper, 0, guest.machine(lower) | P | (W | A | D if upper != THREE else A))
    for gfn in tables:
        guest.request(guest.entry_of(gfn), guest.machine(gfn) | READ_ONLY)
    guest.request(guest.table.root << 12 | LINK, guest.machine(ONE) | P | W | A)
    guest.tell()
    guest.wait(1, 1)
    guest.request(guest.table.root << 12 | LINK, 0)
    guest.request(guest.entry_of(THREE), guest.machine(THREE) | KERNEL_PAGE)
    guest.attempt(lambda: guest.store(THREE, 1, 1 << 12 | P | A | (U if guest.ring3 else 0)))
    guest.tell()
    guest.wait(1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_who_has_a_stale_translation_cannot_write_to_a_table(name: str) -> None:
    m, holder = ran(by_stale_translations, by_stale_translations, **MACHINES[name])
    check_frames(m)

    assert answers(holder) == [1, 1]
    assert answers(holder, 1) == [0, 14]
    assert counted(m, "flushes_for_types") == 1


@pytest.mark.parametrize("name", NAMES)
def test_who_remembers_a_table_cannot_use_what_is_written_to_it_as_memory(name: str) -> None:
    m, holder = ran(by_stale_tables, by_stale_tables, **MACHINES[name])
    check_frames(m)

    assert answers(holder)[-1] == 0, "it is memory again"
    assert answers(holder, 1) == [0, 14, 0]
    assert counted(m, "flushes_for_types") == 2, (
        "one for all three that became tables, one for the one that became memory"
    )


@RINGS
@pytest.mark.parametrize("attack", [by_stale_translations, by_stale_tables])
def test_without_the_flush_at_a_change_of_type_both_get_through(
    attack: Steps, ring3: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (direct, of_ring_3):
        monkeypatch.setattr(module, "flush_for_types", nothing)
    with nothing_kept():
        m, holder = ran(attack, attack, ring3=ring3)

    assert answers(holder, 1)[1] == 0
    if attack is by_stale_translations:
        with pytest.raises(AssertionError):
            check_frames(m)


# --- roots and flushes ----------------------------------------------------------------------------------------------
def root_of_another(guest: DirectGuest) -> None:
    """vCPU 0 makes a root, vCPU 1 loads it; vCPU 0 wants to give it up, then and when vCPU 1 has another one."""
    root = guest.machine(ROOT)
    if guest.vcpu:
        for loaded in (root, guest.table.root << 12):
            guest.wait(0, guest.done + 1)
            guest.request(d.LOAD, loaded)
            guest.tell()
        return
    entry = int(guest.memory.engine.contents(guest.table.root, mem.TABLE)[0])
    guest.store(ROOT, 0, entry)
    guest.request(guest.entry_of(ROOT), guest.machine(ROOT) | READ_ONLY)
    guest.request(d.PIN, root)
    for told in (1, 2):
        guest.tell()
        guest.wait(1, told)
        guest.request(d.UNPIN, root)


@RINGS
def test_a_root_that_another_vcpu_has_loaded_is_not_given_up(ring3: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    m, holder = ran(root_of_another, root_of_another, ring3=ring3)
    check_frames(m)
    assert answers(holder) == [1, 1, 0, 1]
    assert answers(holder, 1) == [1, 1]

    for module in (direct, of_ring_3):
        monkeypatch.setattr(module, "loaded_anywhere", nothing)
    with nothing_kept():
        _, holder = ran(root_of_another, root_of_another, ring3=ring3)
    assert answers(holder)[2] == 1


def flushed_by(kind: int, mask: int) -> tuple[Steps, Steps]:
    """vCPU 1 has translations of two pages, whose entries vCPU 0 changes; then vCPU 0 asks for a flush."""
    pages = (ONE, TWO)

    def first(guest: DirectGuest) -> None:
        guest.store(THREE, 0, 7)
        guest.wait(1, 1)
        for gfn in pages:
            guest.request(guest.entry_of(gfn), guest.machine(THREE) | READ_ONLY)
        guest.request(kind | mask << d.VCPUS, 0x4000_0000 + (ONE << 12) if kind == d.FLUSH_PAGE else 0)
        guest.tell()
        guest.wait(1, 2)

    def second(guest: DirectGuest) -> None:
        for again in (False, True):
            for gfn in pages:
                guest.load(0x4000_0000 + (gfn << 12))
                guest.log(s.RAX)
            guest.tell()
            if not again:
                guest.wait(0, 1)

    return first, second


@pytest.mark.parametrize(
    ("kind", "mask", "seen"),
    [
        (d.FLUSH_PAGE, 0b10, (7, 0)), (d.FLUSH_ALL, 0b10, (7, 7)), (d.FLUSH_PAGE, 0, (0, 0)), (d.FLUSH_ALL, 0, (0, 0)),
        (d.FLUSH_ALL, 0b101, (0, 0)),
    ],
)  # fmt: skip
@RINGS
def test_a_flush_is_made_by_those_vcpus_that_it_names(kind: int, mask: int, seen: tuple[int, int], ring3: bool) -> None:
    """Where nobody else is to drop anything, vCPU 1 still has the translations that it had."""
    m, holder = ran(*flushed_by(kind, mask), ring3=ring3)

    assert answers(holder, 1) == [0, 0, *seen]
    assert counted(m, "remote_flushes") == (mask >> 1 & 1)
    if isinstance(m, Ring3):
        assert sum(m.monitor.hypercalls()["requests"].values()) == 3
    else:
        assert counted(m, "flushes_for_guest") == (mask != 0)
        assert counted(m, "pv_requests") == 3


# --- random guests against the slow walker -----------------------------------------------------------------------------
WALKS = 40 if jit.DISABLED else 300


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", SEEDS)
def test_two_vcpus_see_what_the_slow_walker_says(seed: int, name: str) -> None:
    plan = plans(seed, WALKS)
    m, holder = ran(*plan.steps, **MACHINES[name])
    check_frames(m)

    for n in (0, 1):
        assert answers(holder, n) == plan.expected[n]
    assert counted(m, "flushes_for_guest") > 0
    assert jit.DISABLED or counted(m, "flushes_for_types") > 0


def forgotten(a: Assembler, path: Path) -> None:
    """What another vCPU asked for counts as done."""
    a.st_value(vcpu("ASKED_PAGE"), 0)


WITHOUT: dict[str, tuple[ModuleType, str, Callable[..., None]]] = {
    "flush as asked": (several, "flush_as_asked", nothing),
    "page as asked": (several, "drop_page_as_asked", forgotten),
    "kick": (several, "kick_others", nothing),
    "flush for types": (direct, "flush_for_types", nothing),
    "flush as asked, in ring 3": (of_ring_3, "drop_everything", nothing),
    "page as asked, in ring 3": (of_ring_3, "drop_page", nothing),
    "interrupt, in ring 3": (of_ring_3, "interrupt", nothing),
    "flush for types, in ring 3": (of_ring_3, "flush_for_types", nothing),
}


@SLOW
@pytest.mark.parametrize("left_out", WITHOUT)
def test_a_hypervisor_that_leaves_one_of_them_out_is_found_out(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*WITHOUT[left_out])

    with nothing_kept(), pytest.raises(AssertionError):
        for seed in SEEDS:
            plan = plans(seed, WALKS)
            _, holder = ran(*plan.steps, ring3=left_out.endswith("in ring 3"))
            for n in (0, 1):
                assert answers(holder, n) == plan.expected[n]


IN_RING_3 = ("vmm.technique=paravirtual",)
APART = (*IN_RING_3, "machine.cpus=5", "vms.1.cpu=4")  # where every vCPU has a CPU of its own


# --- kernels --------------------------------------------------------------------------------------------------------
@SLOW
@pytest.mark.parametrize(
    "settings",
    [(), APART, (*APART, "vmm.pv.batch=1"), ("vmm.personality=minimal", "vmm.pv.batch=1"), ("vmm.vpid=false", "vms.0.vcpus=2", "vms.0.guest.processes.0.threads=2",
     "vms.0.guest.processes.2.vcpu=0")],
    ids=["four", "in ring 3", "in ring 3, singly", "minimal, singly", "two, without VPID"],
)  # fmt: skip
def test_a_kernel_on_several_vcpus_sees_what_it_sees_natively(settings: tuple[str, ...]) -> None:
    there = parse_scenario(KERNELS, ("vmm.paging=direct-pv", *settings))
    found = equivalence.compare(without_hypervisor(there), there)

    assert found.equivalent, [each.sentence(found.first, found.second) for each in found.differences]


FILES = """
machine: {cpus: 3, memory: 256 MiB}
vmm: {paging: direct-pv}
vms:
  - memory: 64 MiB
    vcpus: 3
    guest:
      kernel: {tick: 100 us}
      processes:
        - threads: 3
          phases:
            - {primitive: fill, region: 64 KiB}
            - {primitive: map_file, region: 3 MiB, write: 0.4, iterations: 2}
            - {primitive: pte_write, iterations: 50}
            - {primitive: mov_to_cr3, iterations: 5}
        - {name: other, vcpu: 1, phases: [{primitive: map_file, region: 1 MiB, iterations: 3}]}
"""


@SLOW
@pytest.mark.parametrize(
    "settings",
    [(), ("vmm.pv.batch=1", "run.work_scale=2"), (*IN_RING_3, "run.work_scale=2")],
    ids=["", "singly, longer", "in ring 3, longer"],
)
def test_threads_that_map_a_file_and_change_entries_see_what_they_see_natively(settings: tuple[str, ...]) -> None:
    there = parse_scenario(FILES, settings)
    found = equivalence.compare(without_hypervisor(there), there)

    assert found.equivalent, [each.sentence(found.first, found.second) for each in found.differences]


# --- events between vCPUs in ring 3 ---------------------------------------------------------------------------------
def event_words(guest: DirectGuest) -> None:
    """Log the ports that are pending, and whether events wait."""
    for word in (d.EVENTS, d.UPCALL_PENDING):
        guest.a.ld(s.RAX, Mem(displacement=SHARED + guest.vcpu * NEXT_VCPU + word))
        guest.log(s.RAX)


@pytest.mark.parametrize("halted", [False, True])
def test_an_event_goes_to_the_vcpu_and_the_port_that_are_named_and_ends_its_wait(halted: bool) -> None:
    """A vCPU that is in its guest is interrupted there; one that waits goes on. One of a port that it masks does neither."""
    to_one = 1 << d.OF_VCPU
    wrong = (2 | 2 << d.OF_VCPU, d.PORTS | to_one, -1)

    def sender(guest: DirectGuest) -> None:
        guest.wait(1, 1)
        guest.a.mov(s.RCX, 20_000)
        guest.a.emit(ops.LONG_WORK, length=64)
        for what in (*wrong, 3 | to_one, 2 | to_one, 2 | to_one):
            guest.call(d.CALL_EVENT, d.SEND, what)
        guest.tell()
        guest.wait(1, 2)
        event_words(guest)

    def receiver(guest: DirectGuest) -> None:
        guest.call(d.CALL_EVENT, d.BIND_TIMER)
        guest.call(d.CALL_EVENT, d.BIND_IPI)
        guest.a.st_value(Mem(displacement=SHARED + NEXT_VCPU + d.EVENTS_MASKED), 1 << 3)
        guest.tell()
        if halted:
            guest.call(d.CALL_SCHEDULE, d.BLOCK)
        guest.wait(0, 1)
        event_words(guest)
        guest.tell()

    m, holder = in_ring_3(sender, receiver)
    waited = [0] * halted

    assert answers(holder) == [-1, -1, -1, 0, 0, 0, 0, 0]
    assert answers(holder, 1) == [1, 2, *waited, 1 << 2 | 1 << 3, 1]
    events = m.monitor.hypercalls()["events"]
    assert (events["events_sent"], events["kicks"], events["blocks"]) == (2, 1, int(halted))


INTERRUPTS = """
machine: {cpus: 2, memory: 256 MiB}
vmm: {technique: paravirtual}
vms:
  - memory: 64 MiB
    vcpus: 2
    guest:
      kernel: {tick: 50 us}
      processes: [{threads: 2, phases: [{primitive: ipi, iterations: 30}, {primitive: idle, duration: 30 us}]}]
"""


def test_an_interrupt_of_another_cpu_is_an_event_a_port_and_an_upcall_each() -> None:
    there = parse_scenario(INTERRUPTS, ("vms.0.guest.kernel.tick=off",))
    found = equivalence.compare(without_hypervisor(there), there)
    assert found.equivalent, [each.sentence(found.first, found.second) for each in found.differences]

    outcome = PlatformMachine(there).run()
    assert outcome.hypercalls is not None
    events, calls = outcome.hypercalls["events"], outcome.hypercalls["calls"]
    sleeps = 2  # whose timer is an event, too
    assert events["events_sent"] == 30 + sleeps
    assert calls["event"] == 30 + 2 * 2  # each CPU binds its timer, and a port for others


@SLOW
def test_ticks_and_interrupts_of_others_do_not_take_events_from_each_other() -> None:
    there = parse_scenario(INTERRUPTS, ("vms.0.guest.processes.0.phases.0.iterations=3000",))
    outcome = PlatformMachine(there).run()

    assert [vm.stopped for vm in outcome.vms] == [None]
    assert outcome.hypercalls is not None
    assert outcome.hypercalls["events"]["events_sent"] > 3000 + 100


@pytest.mark.parametrize(
    ("cpus", "path", "help"),
    [(2, "machine.cpus", "cpus can be 3 or more"), (4, "vms.1.cpu", "free are the CPUs 2, 3")],
    ids=["too few", "enough"],
)
def test_vcpus_in_ring_3_have_a_cpu_each(cpus: int, path: str, help: str) -> None:
    another = "  - {memory: 64 MiB, cpu: 1, guest: {processes: [{phases: [{primitive: syscall}]}]}}"
    with pytest.raises(ConfigError) as refused:
        parse_scenario(INTERRUPTS + another, (f"machine.cpus={cpus}",))

    (problem,) = refused.value.problems
    message = "under technique 'paravirtual' every vCPU needs a CPU of its own"
    assert (problem.path, problem.message, problem.help) == (path, message, help)
