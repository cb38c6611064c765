from __future__ import annotations

import pickle

from vtsim.base.errors import ConfigError, ModelError, Problem


def test_a_bad_value_is_shown_with_its_line_a_caret_and_what_would_be_accepted() -> None:
    problem = Problem(
        file="workloads/kv.yaml",
        line=4,
        column=8,
        source="  ways: 10",
        path="l2_tlb.ways",
        message="1536 entries in 10 ways is 153.6 sets, and the set index needs a power of two",
        help="ways can be 3, 6, 12, 24, 48, 96, 192, 384, 768, 1536",
    )

    assert str(ConfigError.of([problem])) == (
        "workloads/kv.yaml:4: l2_tlb.ways: 1536 entries in 10 ways is 153.6 sets, and the set index needs a power"
        " of two\n"
        "    4 |   ways: 10\n"
        "      |         ^\n"
        " help: ways can be 3, 6, 12, 24, 48, 96, 192, 384, 768, 1536"
    )


def test_several_problems_are_separated_by_an_empty_line() -> None:
    assert str(ConfigError.of([Problem(message="a", help="b"), Problem(message="c", path="d.e")])) == (
        "a\n help: b\n\nd.e: c"
    )


def test_an_unknown_name_is_answered_with_the_close_one() -> None:
    assert str(ConfigError.unknown("profile", "skx-4141", ["p4-672", "skx-4114"])) == (
        "unknown profile 'skx-4141'\n help: did you mean 'skx-4114'?"
    )


def test_an_unknown_name_is_answered_with_all_that_are_as_close() -> None:
    legal = ["linux-6.1", "linux-4.19", "windows-10"]

    assert ConfigError.unknown("kernel", "linux-5.4", legal).problems[0].help == (
        "did you mean 'linux-6.1' or 'linux-4.19'?"
    )
    assert ConfigError.unknown("kernel", "linux-4.1", legal).problems[0].help == "did you mean 'linux-4.19'?"


def test_an_unknown_name_that_is_close_to_nothing_is_answered_with_all_names() -> None:
    assert str(ConfigError.unknown("profile", "x", ["p4-672", "skx-4114"])) == (
        "unknown profile 'x'\n help: profile can be p4-672, skx-4114"
    )


def test_a_line_that_is_long_is_cut_around_the_caret() -> None:
    text = str(Problem(message="m", file="f", line=1, column=500, source="x" * 500 + "y" + "x" * 500))

    _, source, caret = text.splitlines()
    assert len(source) == 108
    assert source[caret.index("^")] == "y"


def test_what_cannot_be_printed_is_shown_as_a_dot() -> None:
    assert str(Problem(message="m", file="f", line=1, column=2, source="a\x1b\tb")).splitlines()[1] == "    1 | a..b"


def test_a_model_error_shows_the_counters() -> None:
    assert str(ModelError("walker: every walk ends is false", {"walks": 3, "completed": 0})) == (
        "walker: every walk ends is false: walks=3, completed=0"
    )


def test_errors_survive_the_way_from_another_process() -> None:
    config = pickle.loads(pickle.dumps(ConfigError("no", field="a.b", help="yes")))
    model = pickle.loads(pickle.dumps(ModelError("no", {"walks": 1})))

    assert (str(config), str(model)) == ("a.b: no\n help: yes", "no: walks=1")
