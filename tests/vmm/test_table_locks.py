"""Locks of page tables of several CPUs: no page is lost, who faults in another table does not wait, and what they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.guest.conftest import MIB, Harness
from tests.guest.test_free_pages import SMALL, free_frames, mapped_frames
from tests.vmm.shootdown import Threads, threads
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.codes import PROGRAM_END
from vtsim.cpu.profile import load_profile
from vtsim.guest import build, services
from vtsim.guest import spec as g
from vtsim.guest.file_mappings import MapFileSpec
from vtsim.guest.kernel import fault, smp
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.lengths import OF_SEVERAL, length
from vtsim.guest.kernel.lengths import TABLES as KERNELS
from vtsim.platform.spec import VmSpec

CPUS = 3  # as `free_frames` has it
PAGE = at.PAGE
SLOW = pytest.mark.compiled_only

# --- threads that fault beside each other in one region -----------------------------------------------------------------
ONE_REGION = f"""
machine: {{cpus: {CPUS}, memory: 256 MiB}}
vms:
  - memory: 128 MiB
    vcpus: {CPUS}
    guest:
      kernel: {{tick: off}}
      processes:
        - threads: {CPUS}
          phases:
"""
TOUCH = """
            - {{primitive: stream, pattern: strided, stride: {stride} KiB, write: 100 %, region: {region} KiB,
               accesses: {pages}, at: {at:#x}}}
"""
TABLES = range(1, 7)  # regions of pages that lie together, then of pages that have a table each
PAGES = {4: 12, 2048: 6}  # by how far they are apart, in KiB
ONE_REGION += "".join(
    TOUCH.format(stride=stride, region=stride * pages, pages=pages, at=(n << 32) + (stride << 20))
    for stride, pages in PAGES.items()
    for n in TABLES
)
TOUCHED = len(TABLES) * sum(PAGES.values())
WAYS = (
    pytest.param(("vmm.technique=native",), id="natively"),
    pytest.param(("vmm.technique=native", "vms.0.guest.kernel.kpti=true"), id="natively, KPTI", marks=SLOW),
    pytest.param((), id="on EPT", marks=SLOW),
    pytest.param(("vmm.paging=shadow",), id="on shadow tables", marks=SLOW),
    pytest.param(("vmm.paging=agile",), id="on agile tables", marks=SLOW),
    pytest.param(("vmm.paging=direct-pv", "vmm.personality=minimal"), id="on direct tables", marks=SLOW),
    pytest.param(("vmm.technique=paravirtual",), id="in ring 3", marks=SLOW),
)


def check_pages(monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    """Each page that was touched is mapped, and no frame is lost: it is free, or it is mapped once."""
    monkeypatch.setattr(build, "sizes", lambda pages, cpus: SMALL)
    ran = threads(ONE_REGION, *settings)
    at_first = free_frames(ran)
    ran.run()
    mapped = [frame for frame in mapped_frames(ran) if frame in set(at_first)]

    assert 0 <= len(mapped) - TOUCHED <= CPUS * at.USER_STACK_PAGES
    assert sorted(free_frames(ran) + mapped) == sorted(at_first)


@pytest.mark.slow
@pytest.mark.parametrize("settings", WAYS)
def test_threads_that_fault_on_the_same_pages_lose_none(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_pages(monkeypatch, *settings)


def delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the look at an entry to the store is a longer way."""
    whole = fault.map_page

    def late(a: Assembler, *arguments: Any) -> None:
        a.work(2000)
        whole(a, *arguments)

    monkeypatch.setattr(fault, "map_page", late)


@SLOW
@pytest.mark.parametrize("left_out", [None, "lock_table", "lock_upper_tables"])
def test_a_kernel_without_a_lock_loses_pages(left_out: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    delay(monkeypatch)
    if left_out is None:
        check_pages(monkeypatch, "vmm.technique=native")
        return
    whole = getattr(smp, left_out)

    def nobody_waits(*arguments: Any) -> None:
        with monkeypatch.context() as unlocked:
            unlocked.setattr(smp, "lock", lambda *_: None)
            whole(*arguments)

    monkeypatch.setattr(smp, left_out, nobody_waits)

    with pytest.raises(AssertionError):
        check_pages(monkeypatch, "vmm.technique=native")


# --- one lock for each table ------------------------------------------------------------------------------------------
APART = """
machine: {cpus: 2, memory: 256 MiB}
vms:
  - memory: 64 MiB
    vcpus: 2
    guest:
      kernel: {tick: off}
      processes:
        - threads: 2
          phases: [{primitive: page_fault, region: 400 KiB, iterations: 1}]
"""
REGION_PAGES = 100
HALFWAY = 300_000  # cycles


def page_struct(ran: Threads, table: int) -> int:
    """Where the kernel keeps what it knows of a frame: in its text a constant says where the first one's is."""
    kernel = ran.machine.vms[0].texts[0]
    following = [i for i in kernel.instructions if i.at >= kernel.labels["lock_table"]]
    constant = next(i.imm for i in following if i.op == o.MOV and i.r1 == s.RAX)
    address = (at.DIRECT + table * PAGE & (1 << 64) - 1) // PAGE * at.PAGE_STRUCT_BYTES + constant
    return (address + (1 << 63)) % (1 << 64) - (1 << 63)


def faults(ran: Threads) -> list[int]:
    """Page faults of both threads."""
    return [ran.word(ran.cpu_word(cpu, at.CURRENT) + at.T_FAULTS) for cpu in range(2)]


def stopped_at(ran: Threads, table: Callable[[list[int]], int]) -> list[int]:
    """Page faults that the threads still take once somebody has the lock of a table, of those of their regions."""
    engine = ran.machine.engine
    engine.run_all(HALFWAY, ran.machine.quantum)
    tables = ran.tables()
    regions = [area for area in ran.machine.vms[0].spaces[0].areas if area[0] not in ("text", "stack")]
    leaves = [tables.find(start) for _, start, _ in regions]
    assert len(leaves) == 2 and all(leaves)
    lock = page_struct(ran, table([leaf.table for leaf in leaves if leaf]))
    for word in (at.PTL_TICKET, at.PTL_SERVING):
        assert ran.word(lock + word) <= REGION_PAGES
    memory = ran.machine.vms[0].memory
    assert memory is not None
    gpa = lock - at.DIRECT
    memory.store(gpa + at.PTL_TICKET, ran.word(lock + at.PTL_TICKET) + 1)
    before = faults(ran)
    assert all(0 < n < REGION_PAGES for n in before)
    engine.run_all(20 * HALFWAY, ran.machine.quantum)
    return [after - n for after, n in zip(faults(ran), before, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_who_has_the_lock_of_a_table_holds_up_nobody_who_faults_in_another(first: int) -> None:
    more = stopped_at(threads(APART, "vmm.technique=native"), lambda tables: tables[first])

    assert sorted(more)[0] <= 1  # that which was on its way
    assert sorted(more)[1] > REGION_PAGES // 4


# --- what they take -----------------------------------------------------------------------------------------------------
FILE_FAULT = 16  # pages
PHASES: dict[str, Callable[[int, int], g.Phase]] = {
    "page_fault": lambda rounds, pages: g.PageFaultSpec(region=pages * PAGE, iterations=rounds),
    "protect": lambda rounds, pages: g.ProtectSpec(region=pages * PAGE, iterations=rounds),
    "fork": lambda rounds, pages: g.ForkSpec(pages=pages, iterations=rounds),
    "exec": lambda rounds, pages: g.ExecSpec(pages=pages, iterations=rounds),
    "process": lambda rounds, pages: services.LifeSpec(pages=pages, iterations=rounds, written=1, fresh=0),
    "file, written": lambda rounds, pages: MapFileSpec(region=pages * PAGE, iterations=rounds, write=1.0),
    "file, read": lambda rounds, pages: MapFileSpec(region=FILE_FAULT * pages * PAGE, iterations=rounds),
}


def kernel_instructions(phase: g.Phase, cpus: int) -> int:
    """Instructions of a kernel of so many CPUs while the first runs a process."""
    guest = g.GuestSpec(kernel=g.KernelSpec(tick=0), processes=(g.ProcessSpec(name="p0", phases=(phase,)),))
    harness = Harness(load_profile("skx-4114"), VmSpec(memory=64 * MIB, vcpus=cpus, guest=guest))
    assert harness.issue() == PROGRAM_END
    return harness.instructions(o.R0)


def of_pages(name: str, cpus: int) -> int:
    """Instructions that 8 pages more take in 4 rounds more."""
    counts = [[kernel_instructions(PHASES[name](n, pages), cpus) for pages in (2, 10)] for n in (2, 6)]
    return (counts[1][1] - counts[1][0]) - (counts[0][1] - counts[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", PHASES)
def test_a_page_takes_as_many_instructions_with_several_cpus_as_with_one(name: str) -> None:
    assert of_pages(name, 2) == of_pages(name, 1)


def test_what_is_taken_off_is_taken_off_a_length_that_is_longer() -> None:
    for table in KERNELS.values():
        assert all(0 < less < table[name].instructions for name, less in OF_SEVERAL.items())
    assert length("page_get", several=True) == length("page_get") - OF_SEVERAL["page_get"]
    assert length("fork", several=True) == length("fork")
