"""Path lengths of the kvm personality: counted, and then as the file of counts says, or called an estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest

from scripts.path_lengths.count import Length, count, counted_nodes, in_trace, numbers_of_tests, read_lengths, taken
from scripts.path_lengths.trace import (
    AFTER_EXIT,
    BEFORE_ENTRY,
    CALL,
    END,
    ENTRY,
    IN_HANDLER,
    IN_INTERRUPT,
    INTERRUPT,
    MARK,
    RETURN,
    RING,
    SYSTEM_CALL,
    USER,
    VM_EXIT,
    VMREAD,
    Episode,
    Symbols,
    Tree,
    episodes,
    words_of_tests,
)
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.vmm.personalities.kvm.parameters import COUNTED, COUNTED_4_19, PARAMETERS, TABLES, TAKEN
from vtsim.vmm.programs.kvm_functions import INDIRECT_BRANCHES, L1D_UNSAFE
from vtsim.vmm.settings import resolve_parameters
from vtsim.vmm.shadow import KVM_PARAMETERS
from vtsim.vmm.spec import VmmSpec

LENGTHS: Final = read_lengths("length")
OLD_LENGTHS: Final = read_lengths("length", "4.19")
OLD: Final = TABLES["linux-4.19"]
CALIBRATED: Final = {"exit_common", "entry_common"}


def test_every_count_is_a_parameter_and_its_value() -> None:
    assert {name: one.instructions for name, one in LENGTHS.items()} == {
        name: PARAMETERS[name].value for name in LENGTHS
    }


def test_every_count_of_linux_4_19_is_in_its_table_and_what_is_not_counted_is_as_long_as_in_6_1() -> None:
    not_counted = {name for name in taken("4.19") if name in LENGTHS and PARAMETERS[name].source.startswith(COUNTED)}
    assert {name for name, one in OLD.items() if one.source.startswith(COUNTED_4_19)} == set(OLD_LENGTHS)
    assert {name: one.instructions for name, one in OLD_LENGTHS.items()} == {n: OLD[n].value for n in OLD_LENGTHS}
    assert {name for name, one in OLD.items() if one.source == TAKEN} == not_counted
    assert all(OLD[name].value == PARAMETERS[name].value for name in OLD.keys() - OLD_LENGTHS.keys())
    assert {OLD[name].confidence for name in not_counted} == {"estimated"} and TAKEN.startswith("ESTIMATE")


def test_each_kernel_has_every_parameter_and_each_counted_length_is_positive() -> None:
    assert TABLES["linux-6.1"] is PARAMETERS and PARAMETERS.keys() == OLD.keys()
    for table in TABLES.values():
        assert all(one.value > 0 for one in table.values() if one.source.startswith("counted: "))


def test_a_length_of_linux_4_19_is_counted_or_says_why_not() -> None:
    everything = LENGTHS | read_lengths("count")
    old = OLD_LENGTHS | read_lengths("count", "4.19")
    assert old.keys() | taken("4.19").keys() == everything.keys() and not old.keys() & taken("4.19").keys()
    assert all(taken("4.19").values())
    assert all({*one.less, *one.mean_of} <= set(old) for one in old.values())
    assert all(one.mean_of or one.test in numbers_of_tests() for one in old.values())


def test_a_host_has_the_lengths_of_the_kernel_that_its_scenario_names() -> None:
    new, old = resolve_parameters(VmmSpec()), resolve_parameters(VmmSpec(lengths="linux-4.19"))
    assert {name: old[name] for name in OLD_LENGTHS} == {name: one.instructions for name, one in OLD_LENGTHS.items()}
    assert new["skip"] == LENGTHS["skip"].instructions != old["skip"]
    own = VmmSpec(lengths="linux-4.19", parameters=(("skip", 7),))
    assert resolve_parameters(own) == old | {"skip": 7}  # what is said of a length wins
    for kernel in TABLES:
        minimal = VmmSpec(personality="minimal", lengths=kernel)
        assert resolve_parameters(minimal) == resolve_parameters(VmmSpec(personality="minimal"))


def test_a_kernel_that_was_not_counted_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_scenario("vmm: {lengths: linux-4.91}")
    assert "linux-4.19" in str(refused.value)


def test_every_length_is_counted_or_calibrated_or_called_an_estimate() -> None:
    lengths = {name for name, one in PARAMETERS.items() if one.unit == "instructions"}
    counted = {name for name in lengths if PARAMETERS[name].source.startswith("counted: ")}
    estimated = {name for name in lengths if PARAMETERS[name].source.startswith("ESTIMATE: ")}

    assert counted == set(LENGTHS)
    assert lengths - counted - estimated == CALIBRATED
    assert {PARAMETERS[name].confidence for name in counted} == {"measured"}
    assert {PARAMETERS[name].confidence for name in estimated} == {"estimated"}
    assert not {name for name in KVM_PARAMETERS if KVM_PARAMETERS[name].unit == "instructions"}


def test_every_counted_length_names_tests_that_there_are() -> None:
    known = numbers_of_tests()
    for one in (LENGTHS | read_lengths("count")).values():
        assert one.mean_of or one.by_hand or one.test in known


def test_what_is_taken_off_or_averaged_is_in_the_file() -> None:
    everything = LENGTHS | read_lengths("count")

    assert all({*one.less, *one.mean_of} <= set(everything) for one in everything.values())


# a tree of calls: handle calls walk, which calls read; walk is also called from elsewhere
def small_tree() -> tuple[Tree, dict[str, int]]:
    tree = Tree()
    handle = tree.child(0, "handle")
    walk = tree.child(handle, "walk")
    return tree, {
        "handle": handle,
        "walk": walk,
        "read": tree.child(walk, "read"),
        "interrupt": tree.child(walk, "interrupt"),
        "other": tree.child(0, "walk"),
    }


@pytest.mark.parametrize(
    ("functions", "apart", "expected"),
    [
        (["handle"], [], {"handle", "walk", "read"}),
        (["handle"], ["walk"], {"handle"}),
        (["walk"], [], {"walk", "read", "other"}),
        (["walk"], ["read"], {"walk", "other"}),
        (["handle", "read"], ["walk"], {"handle"}),
        (["read"], ["walk"], set()),
        ([], [], set()),
    ],
)
def test_what_a_function_calls_counts_with_it_but_interrupts_and_what_is_apart(
    functions: list[str], apart: list[str], expected: set[str]
) -> None:
    tree, nodes = small_tree()

    assert counted_nodes(tree, functions, apart) == {nodes[name] for name in expected}


class OneTest:
    """A run of one test: what `count` asks for."""

    def __init__(self, tree: Tree, found: list[Episode]) -> None:
        self.found = tree, found

    def test(self, name: str) -> tuple[Tree, list[Episode]]:
        """The same for each test."""
        return self.found


def episode(event: int, reason: int, phase: int, work: dict[int, int], calls: dict[int, int]) -> Episode:
    made = Episode(event, reason, phase)
    made.work.update(work)
    made.calls.update(calls)
    return made


def small_run() -> OneTest:
    tree, nodes = small_tree()
    handle, walk = nodes["handle"], nodes["walk"]
    return OneTest(
        tree,
        [
            episode(1, 48, AFTER_EXIT, {handle: 5}, {handle: 1}),
            episode(1, 48, IN_HANDLER, {walk: 100}, {walk: 2}),
            episode(2, 48, IN_HANDLER, {walk: 150, nodes["interrupt"]: 7}, {walk: 3}),
            episode(3, 48, IN_HANDLER, {handle: 900}, {handle: 1}),
            episode(4, 1, IN_INTERRUPT, {walk: 30}, {walk: 1}),
            episode(4, 1, IN_INTERRUPT, {walk: 50, nodes["read"]: 2}, {walk: 1, nodes["read"]: 1}),
        ],
    )


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (Length(instructions=0, functions=["handle"], reason=48), 150),  # of 105, 150 and 900
        (Length(instructions=0, functions=["handle"], reason=48, having=["walk"]), 127.5),
        (Length(instructions=0, functions=["handle"], reason=48, without=["walk"]), 900),
        (Length(instructions=0, functions=["handle"], reason=48, phases=["after exit"]), 5),
        (Length(instructions=0, functions=["walk"], reason=48, per="walk"), 50),
        (Length(instructions=0, functions=["walk"], phases=["interrupt"]), 41),  # each interrupt by itself
        (Length(instructions=0, functions=["walk"], phases=["interrupt"], having=["read"]), 52),
        (Length(instructions=0, functions=["walk"], reason=12), None),
    ],
)
def test_a_count_is_the_median_over_the_events_that_are_asked_for(length: Length, expected: float | None) -> None:
    assert count(length, small_run()) == expected


def test_indirect_branches_are_counted_where_instructions_are() -> None:
    run = small_run()
    _, found = run.test("")
    for one, branches in zip(found, (1, 2, 3, 4, 5, 6), strict=True):
        one.indirect.update(dict.fromkeys(one.work, branches))

    # of event 1 in both phases, of event 2 without its interrupt; of event 3
    assert count(Length(instructions=0, functions=["handle"], reason=48), run, indirect=True) == 3
    assert count(Length(instructions=0, functions=["handle"], reason=48, having=["walk"]), run, indirect=True) == 3
    assert count(Length(instructions=0, functions=["walk"], reason=48, per="walk"), run, indirect=True) == 1


def test_functions_with_indirect_branches_are_counted_lengths() -> None:
    assert set(INDIRECT_BRANCHES) <= set(LENGTHS)
    assert set(L1D_UNSAFE) <= set(LENGTHS)


def test_a_length_is_what_is_left_of_a_count() -> None:
    lengths = {
        "walk": Length(instructions=0, functions=["walk"], reason=48, per="walk"),
        "rest": Length(instructions=0, functions=["handle"], reason=48, less={"walk": 2}, over=5, ops=3),
        "both": Length(instructions=0, mean_of=["walk", "rest"]),
        "none": Length(instructions=0, functions=["handle"], reason=12),
    }
    runs = {"ept": small_run()}

    assert in_trace("rest", lengths, runs) == (150 - 2 * 50) / 5 - 3
    assert in_trace("both", lengths, runs) == (50 + 7) / 2
    assert in_trace("none", lengths, runs) != in_trace("none", lengths, runs)  # not a number


LISTING: Final = """\
0000000000001000 t run	[kvm]
0000000000002000 t leaf.isra.0	[kvm]
0000000000003000 t vmx_handle_exit	[kvm_intel]
0000000000004000 T entry_SYSCALL_64
0000000000005000 T asm_timer
0000000000006000 d data
"""


def event(kind: int, value: int) -> int:
    return 1 << 63 | kind << 60 | value


# fmt: off
TRACE: Final = (
    event(MARK, 7),
    0x9000 | USER, 0x9002 | USER | RING,          # SYSCALL
    0x4000, 0x4001 | CALL,
    0x1000, 0x1001 | VMREAD, 0x1002 | CALL,
    0x2000, 0x2001 | RETURN,
    0x1003 | ENTRY,
    event(VM_EXIT, 10),
    0x1004, 0x1005 | CALL,
    0x3000,                                       # which jumps to
    0x2000, 0x2001 | RETURN,
    0x1006,
    event(INTERRUPT, 0xEC),
    0x5000, 0x5001 | RING,                        # IRET
    0x1007, 0x1008 | ENTRY,
    event(MARK, END),
    0x1009,
)
# fmt: on


def test_a_trace_is_cut_into_episodes_and_counted_by_call_path(tmp_path: Path) -> None:
    (tmp_path / "symbols").write_text(LISTING)
    np.array(TRACE, np.uint64).tofile(tmp_path / "trace")
    tests = words_of_tests(tmp_path / "trace")
    tree = Tree()
    found = [
        (one.event, one.reason, one.phase, {"/".join(tree.path(node)): n for node, n in one.work.items()})
        for one in episodes(tests[7], Symbols(tmp_path / "symbols"), tree)
        if one.work
    ]
    places = np.array([0x1002, 0x1005, 0x5000], np.uint64)
    branches = [one.indirect for one in episodes(tests[7], Symbols(tmp_path / "symbols"), tree, places)]

    assert list(tests) == [7]
    run = "entry_SYSCALL_64/run"
    assert found == [
        (0, -1, AFTER_EXIT, {"user": 2}),
        (0, -1, SYSTEM_CALL, {"entry_SYSCALL_64": 2, run: 3, f"{run}/leaf": 2}),
        (1, 10, AFTER_EXIT, {run: 2}),
        (1, 10, IN_HANDLER, {f"{run}/vmx_handle_exit": 1, f"{run}/vmx_handle_exit/leaf": 2}),
        (1, 10, BEFORE_ENTRY, {run: 1}),
        (1, 10, IN_INTERRUPT, {f"{run}/interrupt/asm_timer": 2}),
        (1, 10, BEFORE_ENTRY, {run: 2}),
    ]
    assert [sum(one.values()) for one in branches if one] == [1, 1, 1]
