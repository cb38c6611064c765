"""Dirty logging: every page that was written is found, once for each collection, and at the price that the manual says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.vmm.machines import DATA, MIB, Machine, machine, tiny_guest
from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.base.kept import nothing_kept
from vtsim.config import parse_scenario
from vtsim.cpu import accounts as k
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import RAX, RBX, RCX, RDX
from vtsim.ept import spec as e
from vtsim.ept.tables import PAGING, Table
from vtsim.vmcs import reasons as x
from vtsim.vmm.programs import dirty_log, locked_fault
from vtsim.vmm.spec import DirtyLogSpec

METHODS = ("write-protect", "pml")
MEMORY = 16 * MIB  # all of it is protected when logging starts
LONG = 1 << 40  # ns: the log is not collected within a test
OFTEN = {"period": 100_000}
TABLES = 12  # of the guest, at most: with accessed and dirty flags of EPT a walk of them is a write


def writer(pages: int, rounds: int = 1, pause: int = 0) -> Any:
    """Store into `pages` pages one after the other, `rounds` times, with a pause between."""

    def body(a: Assembler) -> None:
        a.mov(RBX, rounds)
        a.label("again")
        if pause:
            a.work(pause)
        a.mov(RAX, DATA)
        a.mov(RCX, pages)
        a.label("next")
        a.st(Mem(RAX), RBX)
        a.add(RAX, 4096)
        a.loop("next")
        a.sub(RBX, 1)
        a.jcc(ops.CC_NZ, "again")
        a.op(ops.STOP_OP)

    return tiny_guest(body, pages=pages)


def logged(guest: Any, method: str, **options: Any) -> Machine:
    log = {"start": 0, "period": LONG, **options.pop("log", {})}
    return machine(guest, dirty_log=DirtyLogSpec(method=method, **log), memory=MEMORY, **options).run()


def bitmap(m: Machine) -> set[int]:
    """The guest frames that are marked now."""
    first = address_in(m, "DIRTY_BITMAP")
    words = [m.hypervisor.host.load(first + 8 * n) for n in range(m.hypervisor.word(m.vcpu, "DIRTY_WORDS"))]
    return {64 * n + bit for n, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def address_in(m: Machine, name: str) -> int:
    return m.hypervisor.word(m.vcpu, name) & (1 << 64) - 1


def data_frames(m: Machine, pages: int) -> list[int]:
    root = m.field(m.vcpu, "GUEST_CR3") >> 12
    table = Table(root=root, format=PAGING, take=lambda: 0, words=lambda g: m.vcpu.memory.contents(g, mem.TABLE))
    leaves = [table.find(DATA + 4096 * n) for n in range(pages)]
    return [leaf.frame for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("pages", (1, 2, 511, 512, 513, 1024, 1025, 1300))
def test_newly_dirtied_pages_fill_the_log_once_for_every_512(pages: int) -> None:
    m = logged(writer(pages), "pml", personality="minimal", populate="prebuilt")
    extra = len(bitmap(m) | logged_now(m)) - pages  # tables whose accessed flags the walker set, too

    assert m.exits("PML_FULL") == (pages + extra - 1) // 512
    assert 0 <= extra <= TABLES


def logged_now(m: Machine) -> set[int]:
    """The frames in the part of the log that was not emptied yet."""
    index = (m.field(m.vcpu, "PML_INDEX") + 1) & 0xFFFF
    page = address_in(m, "PML_PAGE")
    return {m.hypervisor.host.load(page + 8 * n) >> 12 for n in range(index, 512)}


@pytest.mark.parametrize("method", METHODS)
def test_every_page_that_was_written_is_marked(method: str, personality: str) -> None:
    m = logged(writer(40), method, personality=personality, populate="prebuilt")

    found = bitmap(m) | (logged_now(m) if method == "pml" else set())
    assert set(data_frames(m, 40)) <= found


@pytest.mark.parametrize("method", METHODS)
def test_pages_that_are_mapped_while_logging_are_marked_as_they_come(method: str, personality: str) -> None:
    m = logged(writer(40), method, personality=personality)

    assert set(data_frames(m, 40)) <= bitmap(m) | (logged_now(m) if method == "pml" else set())


def test_a_page_under_write_protection_is_one_violation_for_each_collection(personality: str) -> None:
    once, again = (
        logged(writer(8, rounds, 4000), "write-protect", personality=personality, populate="prebuilt")
        for rounds in (1, 3)
    )
    assert again.exits("EPT_VIOLATION") == once.exits("EPT_VIOLATION")

    m = logged(writer(8, 60, 40_000), "write-protect", personality=personality, populate="prebuilt", log=OFTEN)
    rounds = m.hypervisor.word(m.vcpu, "DIRTY_ROUNDS")
    assert rounds > 3
    assert rounds * once.exits("EPT_VIOLATION") <= m.exits("EPT_VIOLATION")
    assert m.exits("EPT_VIOLATION") <= (rounds + 1) * once.exits("EPT_VIOLATION")


@pytest.mark.parametrize("method", METHODS)
def test_a_collection_finds_what_was_written_since_the_one_before(method: str, personality: str) -> None:
    m = logged(writer(8, 60, 40_000), method, personality=personality, populate="prebuilt", log=OFTEN)

    rounds, pages = (m.hypervisor.word(m.vcpu, name) for name in ("DIRTY_ROUNDS", "DIRTY_PAGES"))
    assert rounds > 3
    assert 8 * (rounds - 1) <= pages <= (8 + TABLES) * (rounds + 1)


@pytest.mark.parametrize("method", METHODS)
def test_large_pages_are_split_when_logging_starts(method: str, personality: str) -> None:
    m = logged(
        writer(40, 60, 20_000), method, personality=personality, populate="prebuilt", page_size=2 * MIB,
        huge_pages="always", log={"start": 100_000},
    )  # fmt: skip

    assert m.vcpu.ept is not None
    for gfn in data_frames(m, 40):
        leaf = m.vcpu.ept.find(gfn << 12)
        assert leaf is not None and leaf.size == 0 and leaf.frame == m.vcpu.memory.frame(gfn)
    assert set(data_frames(m, 40)) <= bitmap(m) | (logged_now(m) if method == "pml" else set())


@pytest.mark.parametrize("method", METHODS)
def test_logging_changes_nothing_that_the_guest_computes(method: str, personality: str) -> None:
    options = {"personality": personality, "page_size": 2 * MIB, "huge_pages": "always"}
    plain = machine(writer(40, 9, 9_000), **options).run()
    log = logged(writer(40, 9, 9_000), method, log={"start": 20_000, "period": 30_000}, **options)

    assert [log.data(0, page=n) for n in range(40)] == [plain.data(0, page=n) for n in range(40)]


def test_without_lockless_faults_the_same_exits_take_longer() -> None:
    fast, slow = (
        logged(writer(64), "write-protect", populate="prebuilt", parameters=(("lockless_faults", value),))
        for value in (1, 0)
    )

    assert fast.exits() == slow.exits()
    assert exit_cycles(fast) < exit_cycles(slow)
    assert bitmap(fast) == bitmap(slow)

    # under the lock: descriptors of written pages are counted back to nothing, every ticket was served, and every EPT
    # table whose entry was changed is noted
    load, frames = slow.hypervisor.host.load, slow.hypervisor.path.addresses["frames"]
    written = bitmap(slow)

    def word(hfn: int, at: int) -> int:
        return load(frames + locked_fault.DESCRIPTOR_BYTES * hfn + at)

    assert {word(slow.vcpu.memory.frame(gfn), locked_fault.D_COUNT) for gfn in written} == {0}
    tickets = [slow.hypervisor.word(slow.vcpu, name) for name in ("TABLES_TICKET", "TABLES_SERVING")]
    assert tickets == [len(written)] * 2
    noted = [hfn for hfn in range(slow.engine.geometry.frame_count) if word(hfn, locked_fault.D_PRIVATE)]
    assert len(noted) == len({gfn >> 9 for gfn in written})


MASK = (1 << 64) - 1
READ_ONLY = ~e.EPT_WRITE & (1 << 57) - 1


@pytest.mark.parametrize(
    "change",
    [
        lambda leaf: leaf ^ e.EPT_DIRTY,
        lambda leaf: leaf & READ_ONLY,
        lambda leaf: leaf & READ_ONLY | e.EPT_WRITE,
        lambda leaf: 0,
    ],
    ids=["the dirty flag is another", "write protection of another kind", "fixed by another vCPU", "unmapped"],
)
@pytest.mark.parametrize("blindly", [False, True])
def test_a_leaf_that_changed_since_it_was_read_is_not_overwritten(
    change: Callable[[int], int], blindly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between load and compare-and-exchange another CPU changes the leaf: its change is there when the guest goes on.

    A hypervisor that stores blindly loses the dirty flag of a processor, or write protection, or maps again what is gone.
    """
    if blindly:
        monkeypatch.setattr(dirty_log, "exchange_leaf", stored_blindly)
    with nothing_kept():
        m = machine(
            writer(8),
            populate="prebuilt",
            personality="kvm",
            memory=MEMORY,
            dirty_log=DirtyLogSpec(method="write-protect", period=LONG),
        )
    reach_first(m, "fast_exchange")
    cpu = m.engine.cpus[0]
    at, gfn, read = int(cpu[s.GPR + s.RCX]) & MASK, int(cpu[s.GPR + s.R13]) >> 12, int(cpu[s.GPR + s.RAX])
    assert read & dirty_log.WAS_WRITABLE and not read & e.EPT_WRITE
    assert gfn not in bitmap(m), "marked before it is writable: who takes the bitmap now never hears of the write"
    m.hypervisor.host.store(at, changed := change(read))
    step(m)
    step(m)
    lost = m.hypervisor.host.load(at) != changed
    assert lost == (blindly and changed != read & ~dirty_log.WAS_WRITABLE | e.EPT_WRITE)
    if blindly:
        return
    m.run()

    assert m.hypervisor.word(m.vcpu, "FAST_RETRIES") == 1
    assert [m.data(0, page=n) for n in range(8)] == [1] * 8
    if changed & dirty_log.WAS_WRITABLE:
        assert gfn in bitmap(m)


def stored_blindly(a: Assembler) -> None:
    a.st(Mem(RCX), RDX)
    a.cmp(RDX, register=RDX)


def step(m: Machine, cycles: int = 1) -> None:
    """One instruction of CPU 0, or as many as take so long."""
    m.engine.run(0, until=int(m.engine.cpus[0][s.CYCLE]) + cycles)


def reach_first(m: Machine, label: str) -> None:
    """Run CPU 0 up to a label of the hypervisor's handler of the first VM exit; the guest in strides that end before it."""
    cpu, stride = m.engine.cpus[0], 4**8
    while not cpu[s.NONROOT]:
        step(m, 256)
    while stride:
        before = m.engine.save()
        step(m, stride)
        if not cpu[s.NONROOT] or m.exits():
            m.engine.restore(before)
            stride //= 4
    reach(m, label)


def reach(m: Machine, label: str) -> None:
    """Run CPU 0 up to a label of the hypervisor."""
    at = mem.signed(m.hypervisor.program.labels[label])
    while m.engine.cpus[0][s.RIP] != at:
        step(m)


def test_after_so_many_changes_the_lock_is_taken() -> None:
    log = DirtyLogSpec(method="write-protect", period=LONG)
    m = machine(writer(1), populate="prebuilt", memory=MEMORY, dirty_log=log)
    reach_first(m, "fast_exchange")
    for n in range(dirty_log.FAST_TRIES):
        reach(m, "fast_exchange")
        at = int(m.engine.cpus[0][s.GPR + s.RCX]) & MASK
        m.hypervisor.host.store(at, m.hypervisor.host.load(at) ^ (1 << 52 + n))  # bits that the processor ignores
        step(m)
    reach(m, "not_protected")
    m.run()

    assert m.hypervisor.word(m.vcpu, "FAST_RETRIES") == dirty_log.FAST_TRIES
    assert m.hypervisor.host.load(at) & e.EPT_WRITE


def exit_cycles(m: Machine) -> int:
    at = m.engine.owners["vm0"] + k.OWN_EXITS + x.EPT_VIOLATION * k.EXIT_WORDS
    return int(m.engine.arena[at + k.EXIT_TOTAL])


def test_the_log_without_dirty_flags_is_refused() -> None:
    sets = ("vmm.dirty_log.method=pml", "vmm.ept.accessed_dirty=false")
    with pytest.raises(ConfigError) as caught:
        parse_scenario("vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]", sets)

    assert caught.value.problems[0].message == "the page-modification log needs the dirty flags of EPT"
    assert caught.value.problems[0].path == "vmm.dirty_log.method"


def test_a_processor_without_the_log_is_named() -> None:
    sets = ("vmm.dirty_log.method=pml", "machine.profile=snb-e5-2450")
    with pytest.raises(ConfigError) as caught:
        parse_scenario("vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]", sets)

    assert str(caught.value) == (
        "--set vmm.dirty_log.method=pml: vmm.dirty_log.method: this needs a page-modification log (ENABLE_PML), which "
        "profile 'snb-e5-2450' does not have\n help: profiles that have it: clx-6252, clx-8269cy, skx-4114"
    )
