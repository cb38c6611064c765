"""Do files, signals, processes and single kernel operations do what they say, as often as they say?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from tests.guest.conftest import Harness, native
from tests.guest.test_kernel import ended
from tests.guest.test_lengths import COUNTS, PATHS
from tests.vmm.shootdown import threads
from vtsim.base.errors import ConfigError
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.guest import kernel_operations as single
from vtsim.guest import services as g
from vtsim.guest.kernel import layout
from vtsim.guest.kernel.lengths import LENGTHS
from vtsim.guest.spec import ContextSwitchSpec, Phase, StreamSpec, VmcallSpec

ROUNDS = 5


def more(spec: Callable[..., Phase], counter: Callable[[Harness], int], **settings: Any) -> int:
    """What so many rounds more add to a counter."""
    few, many = (counter(ended(native((spec(iterations=n, **settings),)))) for n in (2, 2 + ROUNDS))
    return many - few


def counted(counter: int) -> Callable[[Harness], int]:
    return lambda harness: harness.count(counter)


def user_instructions(harness: Harness) -> int:
    return harness.instructions(o.R3)


def kernel_instructions(harness: Harness) -> int:
    return harness.instructions(o.R0)


# Instructions of the process in one round, and its system calls.
CALLS = [
    (g.NullIoSpec, {}, 2 * (1 + 1 + 2) + 2, 2),
    (g.StatSpec, {}, 3 + 2 + 2, 1),
    (g.OpenCloseSpec, {}, 2 + 2 + 1 + 2 + 2, 2),
    (g.SelectSpec, {"sockets": 3}, 3 + 2 + 2, 1),
    (g.SelectSpec, {"sockets": 3, "ordinary": True}, 3 + 2 + 2, 1),
    (g.SignalInstallSpec, {}, 1 + 2 + 2, 1),
    (g.SignalHandleSpec, {}, 3 + 2 + (1 + 1 + 2), 2),
    (g.SignalHandleSpec, {"null": True}, 3 + 2, 1),
]


@pytest.mark.parametrize(("spec", "settings", "instructions", "calls"), CALLS)
def test_a_round_is_its_system_calls_and_what_a_handler_does(
    spec: Callable[..., Phase], settings: dict[str, Any], instructions: int, calls: int
) -> None:
    assert more(spec, user_instructions, **settings) == ROUNDS * instructions
    assert more(spec, counted(k.SYSCALLS), **settings) == ROUNDS * calls


@pytest.mark.parametrize(
    "spec", [single.DivideErrorSpec, single.InvalidOpcodeSpec, single.KernelFaultSpec, g.ProtectionFaultSpec]
)
def test_a_round_is_one_exception_that_is_answered(spec: Callable[..., Phase]) -> None:
    assert more(spec, counted(k.EXCEPTIONS)) == ROUNDS


def test_an_exception_that_the_kernel_no_longer_reckons_with_ends_the_task() -> None:
    """The fix-up is taken back behind the loop: VMCALL without a hypervisor is #UD, and the end."""
    harness = native((single.KernelFaultSpec(iterations=2), VmcallSpec(iterations=1)))
    harness.issue()

    assert harness.reason() == layout.KILLED


def test_every_component_of_a_path_is_a_name_looked_up_in_its_parent() -> None:
    """A longer path costs what one component does, each time the same: no look-up begins at the root again."""
    each = [more(g.StatSpec, lambda h: h.instructions(o.R0), components=n) for n in (1, 2, 5)]

    assert each[2] - each[1] == 3 * (each[1] - each[0])
    assert each[1] > each[0]


def test_close_gives_the_file_back_that_open_took() -> None:
    """Far more are opened than there are spare ones."""
    ended(native((g.OpenCloseSpec(iterations=20, components=1),)))


def test_select_asks_every_socket() -> None:
    """Each is a file, its operations and three lines of the socket."""
    few, many = (more(g.SelectSpec, counted(k.ACCESSES), sockets=n) for n in (10, 30))

    loads = 4 + 3 + 2  # descriptor, mode, operations, poll; the socket and its lines; CALL and RET
    assert many - few == ROUNDS * 20 * (loads + 1)  # and the file's object


def test_select_of_ordinary_files_polls_none() -> None:
    few, many = (more(g.SelectSpec, counted(k.ACCESSES), sockets=n, ordinary=True) for n in (10, 30))

    assert many - few == ROUNDS * 20 * 4  # descriptor, mode, operations, no poll


def test_files_are_asked_about_beside_sockets_as_they_are_alone() -> None:
    sockets = g.SelectSpec(iterations=1, sockets=30)
    files = (g.SelectSpec(iterations=n, sockets=20, ordinary=True) for n in (2, 2 + ROUNDS))
    few, many = (ended(native((sockets, phase))).count(k.ACCESSES) for phase in files)

    assert many - few == more(g.SelectSpec, counted(k.ACCESSES), sockets=20, ordinary=True)


def test_more_descriptors_than_there_is_room_for_are_refused() -> None:
    both = (g.SelectSpec(sockets=200), g.SelectSpec(sockets=100, ordinary=True))
    with pytest.raises(ConfigError) as error:
        native(both)
    assert str(error.value) == (
        "processes ask about 200 sockets and 100 files\n help: a guest's kernel has room for 224 of both together"
    )


def test_a_child_copies_what_it_writes_and_a_new_program_faults_on_each_page() -> None:
    def faults(**settings: int) -> int:
        few, many = (ended(native((g.LifeSpec(iterations=n, pages=4, **settings),))) for n in (1, 2))
        return many.count(k.PAGE_FAULTS) - few.count(k.PAGE_FAULTS)

    written = faults(written=3)

    assert written == 3 + 3  # the child's copies, and the parent's own pages, writable again
    assert faults(written=3, images=2, fresh=2) == written + 2 * 2
    assert faults(written=0, fresh=0) == 0


def test_a_switch_reads_the_region_of_the_process() -> None:
    none, some = (more(ContextSwitchSpec, counted(k.ACCESSES), region=n) for n in (0, 4096))

    assert some - none == ROUNDS * 1024


def test_a_round_of_two_stores_counts_as_two() -> None:
    few, many = (ended(native((single.PteWriteSpec(iterations=n),))).count(k.ACCESSES) for n in (2, 8))

    assert many - few == 8 - 2


def test_a_structure_of_sixty_four_ways_uses_the_last_one() -> None:
    """More pages than a Pentium 4's fully associative TLB has entries."""
    stream = StreamSpec(pattern="strided", stride=4096, region=80 * 4096, accesses=160)
    harness = ended(native((stream,), profile="p4-672", populate="prebuilt"))

    assert harness.count(k.DTLB_MISSES) >= 160


# --- pages that a child shares with its parent ------------------------------------------------------------------------
def of_linux(name: str) -> int:
    """Instructions of Linux, with those that the model has operations for."""
    return COUNTS[name] + PATHS["lengths"][name]["less"]


def of_a_page(spec: Callable[..., Phase], **settings: Any) -> int:
    """Instructions of the kernel in a round that a process has for a page more."""
    few, many = (more(spec, kernel_instructions, pages=pages, **settings) for pages in (4, 4 + ROUNDS))
    per_page, rest = divmod(many - few, ROUNDS * ROUNDS)
    assert rest == 0
    return per_page


def test_a_page_that_stays_shared_takes_as_many_instructions_as_in_linux() -> None:
    """The parent's entry is read-only from the first fork on: it is not stored. An entry of no page is loaded, too."""
    store, load = 1, 1
    expected = of_linux("copy_shared_page") - store - load + of_linux("unmap_shared_page")

    assert of_a_page(g.LifeSpec, written=2, fresh=0) == expected  # its region has no page that is not there


FAMILIES = """
vms:
  - memory: 64 MiB
    guest:
      kernel: {tick: off}
      processes:
        - phases: [{primitive: PRIMITIVE, iterations: 3}]
"""
TEXT = 1  # page, which is copied and not dropped
# how a family is made; how often one of its rounds copies a page, drops a shared one, and one that the child has alone
CHARGED = [
    ("process, pages: 6, written: 2", 6 + TEXT, 6 - 2, 2),
    ("process, pages: 6, written: 2, images: 1, fresh: 3", 6 + TEXT, 6 - 2, 2 + 3),
    ("fork, pages: 5", 5 + TEXT, 0, 5),
    ("exec, pages: 5", 5 + TEXT, 5, 5),
]


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["technique=native", "paging=ept", "paging=shadow", "paging=direct-pv"])
@pytest.mark.parametrize(("family", "copied", "shared", "own"), CHARGED)
def test_each_page_is_copied_by_fork_and_dropped_at_the_childs_end(
    family: str, copied: int, shared: int, own: int, technique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def instructions() -> int:
        machine = threads(FAMILIES.replace("PRIMITIVE", family), f"vmm.{technique}", "vmm.personality=minimal").machine
        machine.run()
        privilege = o.R0 if technique == "technique=native" else o.N0
        arena, owners = machine.engine.arena, machine.engine.owners.values()
        return sum(int(arena[owner + k.OWN_INSTRUCTIONS + privilege]) for owner in owners)

    at_first = instructions()
    for name, pages in (("copy_shared_page", copied), ("unmap_shared_page", shared), ("unmap_own_page", own)):
        with monkeypatch.context() as longer:
            longer.setitem(LENGTHS, name, evolve(LENGTHS[name], instructions=LENGTHS[name].instructions + 1000))
            assert instructions() - at_first == 3 * 1000 * pages, name
