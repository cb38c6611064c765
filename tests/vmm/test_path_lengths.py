"""Path lengths of the kvm personality: counted, and then as the file of counts says, or called an estimate."""

from __future__ import annotations

from typing import Final

import pytest

from scripts.path_lengths.count import Length, count, counted_nodes, in_trace, numbers_of_tests, read_lengths
from scripts.path_lengths.trace import AFTER_EXIT, IN_HANDLER, IN_INTERRUPT, Episode, Tree
from vtsim.vmm.personalities.kvm.parameters import PARAMETERS
from vtsim.vmm.shadow import KVM_PARAMETERS

LENGTHS: Final = read_lengths("length")
CALIBRATED: Final = {"exit_common", "entry_common"}
OFF: Final = {"rsb_fill"}


def test_every_count_is_a_parameter_and_its_value() -> None:
    assert {name: one.instructions for name, one in LENGTHS.items()} == {
        name: PARAMETERS[name].value for name in LENGTHS
    }


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
        assert one.mean_of or one.test in known


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
