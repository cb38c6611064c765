"""Do files, signals, processes and single kernel operations do what they say, as often as they say?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.guest.conftest import Harness, native
from tests.guest.test_kernel import ended
from vtsim.base.errors import ConfigError
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.guest import kernel_operations as single
from vtsim.guest import services as g
from vtsim.guest.kernel import layout
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
