"""Are the lengths of the guest kernel's paths those that were counted, and does what counts them count?"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.path_lengths import guest_count as g
from tests.guest.conftest import native
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.cpu import ops
from vtsim.guest import spec
from vtsim.guest.kernel.lengths import COUNTED, COUNTED_4_19, ESTIMATED, LENGTHS, TABLES, TAKEN, length, lengths_of

KIT: Final = Path(g.__file__).parent
RELEASES: Final = {"linux-6.1": "", "linux-4.19": "4.19"}
PATHS: Final[dict[str, Any]] = g.read_paths()


def counts_of(release: str) -> dict[str, int]:
    """What was counted in a kernel."""
    found: dict[str, int] = tomllib.loads(g.of_release(KIT / "guest_counts.toml", release).read_text())["counts"]
    return found


COUNTS: Final = counts_of("")
MOST_OPERATIONS: Final = 85  # that a row of the table takes off: fork's


# --- the lengths, the counts and the table agree ----------------------------------------------------------------------
def test_a_length_is_a_count_or_says_that_it_is_an_estimate() -> None:
    assert {name: length.instructions for name, length in LENGTHS.items() if length.source == COUNTED} == COUNTS
    assert all(LENGTHS[name].source == ESTIMATED for name in LENGTHS.keys() - COUNTS.keys())
    assert "ESTIMATE" in ESTIMATED


def test_a_length_of_linux_4_19_is_a_count_or_says_that_it_is_that_of_6_1() -> None:
    old = TABLES["linux-4.19"]
    assert {name: one.instructions for name, one in old.items() if one.source == COUNTED_4_19} == counts_of("4.19")
    assert {name: one.instructions for name, one in old.items() if one.source == TAKEN} == {
        name: LENGTHS[name].instructions for name in LENGTHS.keys() - counts_of("4.19").keys()
    }
    assert "ESTIMATE" in TAKEN and TABLES["linux-6.1"] is LENGTHS


def test_each_kernel_has_every_length_and_a_file_of_its_counts() -> None:
    assert TABLES.keys() == RELEASES.keys()
    assert all(table.keys() == LENGTHS.keys() for table in TABLES.values())


def test_a_length_is_of_the_kernel_whose_text_is_being_written() -> None:
    names = [name for name in LENGTHS if TABLES["linux-4.19"][name] != LENGTHS[name]]
    with lengths_of("linux-4.19"):
        assert {name: length(name) for name in names} == {
            name: TABLES["linux-4.19"][name].instructions for name in names
        }
    assert {name: length(name) for name in names} == {name: LENGTHS[name].instructions for name in names}


def works(lengths: str) -> list[int]:
    """How long each stretch of a kernel's own code is, in the order of its text."""
    text = native((spec.ForkSpec(iterations=1, pages=1),), lengths=lengths).start.texts[0]
    return [one.imm for one in text.instructions if one.op == ops.WORK]


def test_a_guest_has_the_lengths_of_the_kernel_that_its_scenario_names() -> None:
    new, old = works("linux-6.1"), works("linux-4.19")
    assert new == works("linux-6.1") != old and len(new) == len(old)
    legal: dict[int, set[int]] = {}
    for name, one in LENGTHS.items():
        legal.setdefault(one.instructions, set()).add(TABLES["linux-4.19"][name].instructions)
    assert all(was in legal.get(now, {now}) for now, was in zip(new, old, strict=True))


def test_a_kernel_that_was_not_counted_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_scenario(
            "vms: [{guest: {kernel: {lengths: linux-4.91}, processes: [{phases: [{primitive: idle, duration: 1 us}]}]}}]"
        )
    assert "lengths" in str(refused.value) and "linux-4.19" in str(refused.value)


def test_every_count_has_a_row_that_says_how_it_is_made() -> None:
    for release in RELEASES.values():
        rows = g.read_paths(release)["lengths"]
        assert list(counts_of(release)) == [name for name in rows if rows[name]["terms"]]


@pytest.mark.parametrize(
    ("release", "name"), [(of, name) for of in RELEASES.values() for name in g.read_paths(of)["lengths"]]
)
def test_a_row_names_loops_that_are_run_and_paths_to_which_functions_belong(release: str, name: str) -> None:
    run = {int(number) for number in re.findall(r"\b(?:LOOP|SELECT)\((\d+),", (KIT / "guest_init.c").read_text())}
    run |= {int(number) for number in re.findall(r"LOOP_OF\(\d+, \d+, (\d+),", (KIT / "guest_init.c").read_text())}
    run |= {g.SECOND + number for number in run}
    paths = g.read_paths(release)
    row = paths["lengths"][name]
    if not row["terms"]:  # it was not counted in this kernel
        assert name not in counts_of(release)
        return
    assert set(row) <= {"terms", "less"}
    assert 0 <= row.get("less", 0) <= MOST_OPERATIONS
    for times, loop, path, *per in row["terms"]:
        assert times and loop in run
        known = {*g.functions_of(paths, loop).values(), *paths["alone"].values(), *paths.get("after", {}).values()}
        assert path in known
        assert all(isinstance(function, str) for function in per)


# --- the walk along a trace -------------------------------------------------------------------------------------------
def block(function: str, n: int, kind: int, *, address: int = 0, starts: bool = True) -> g.Block:
    """A block of n instructions of one byte each."""
    return g.Block(function, starts, address, tuple(range(1, n + 1)), kind, -1)


ROUND: Final = g.MARK | g.ROUND << 24
USER: Final = g.MARK | g.USER << 24


def walked(
    blocks: list[g.Block], words: list[int], after: dict[str, str] | None = None, **paths: str
) -> dict[str, int]:
    """Instructions of each path in one round of these words: numbers of blocks, or marks."""
    table = {"functions": paths, "alone": {}, "after": after or {}, "loops": {}, "entries": PATHS["entries"]}
    loop = g.run(table, 0, np.array([ROUND, *words], np.uint32), blocks)
    return dict(loop.rounds[0])


def test_what_a_function_calls_is_its_paths_until_another_is_named() -> None:
    blocks = [
        block("entry_SYSCALL_64", 3, g.CALL, address=0x1000), block("outer", 5, g.CALL, address=0x2000),
        block("inner", 7, g.CALL, address=0x3000), block("cut", 11, g.RET, address=0x4000),
        block("inner", 13, g.RET, address=0x3007, starts=False), block("outer", 17, g.RET, address=0x2005, starts=False),
        block("entry_SYSCALL_64", 19, g.SYSRET, address=0x1003, starts=False),
    ]  # fmt: skip
    found = walked(blocks, [USER, 0, 1, 2, 3, 4, 5, 6], outer="path", cut="other")
    assert found == {"path": 5 + 7 + 13 + 17, "other": 11, "(entry_SYSCALL_64)": 22}


def test_what_a_function_does_after_its_first_call_can_belong_to_another_path() -> None:
    blocks = [
        block("outer", 3, g.CALL, address=0x1000), block("inner", 5, g.RET, address=0x2000),
        block("outer", 7, g.RET, address=0x1003, starts=False),
    ]  # fmt: skip
    found = walked(blocks, [0, 1, 2, USER, 0, 1, 2], after={"outer": "way out"}, outer="way in", inner="inner")
    assert found == {"way in": 6, "inner": 10, "way out": 14}


def test_a_jump_to_another_function_is_a_call_that_returns_for_the_first() -> None:
    blocks = [
        block("outer", 2, g.CALL, address=0x1000), block("first", 3, g.OTHER, address=0x2000),
        block("second", 5, g.RET, address=0x3000), block("outer", 7, g.RET, address=0x1002, starts=False),
    ]  # fmt: skip
    assert walked(blocks, [0, 1, 2, 3], outer="a", first="b", second="c") == {"a": 9, "b": 3, "c": 5}
    assert walked(blocks, [0, 1, 2, 3], outer="a", first="b") == {"a": 14, "b": 3}


def test_an_interrupt_is_nobodys_and_its_return_leads_back() -> None:
    blocks = [
        block("outer", 2, g.CALL, address=0x1000), block("inner", 3, g.OTHER, address=0x2000),
        block("asm_sysvec_timer", 5, g.IRET, address=0x3000), block("inner", 7, g.RET, address=0x2003, starts=False),
        block("outer", 11, g.RET, address=0x1002, starts=False),
    ]  # fmt: skip
    assert walked(blocks, [0, 1, 2, 3, 4], outer="path") == {"path": 2 + 3 + 7 + 11, "(interrupt)": 5}


def test_a_program_that_faults_where_it_is_returned_to_leaves_the_kernel_all_the_same() -> None:
    blocks = [
        block("entry_SYSCALL_64", 2, g.SYSRET, address=0x1000), block("asm_exc_page_fault", 3, g.CALL, address=0x2000),
        block("handle", 5, g.RET, address=0x3000), block("asm_exc_page_fault", 7, g.IRET, address=0x2003, starts=False),
    ]  # fmt: skip
    found = walked(blocks, [0, 1, 2, 3, 1, 2, 3], entry_SYSCALL_64="call", handle="fault")
    assert found == {"call": 2, "(asm_exc_page_fault)": 20, "fault": 10}


def test_after_a_switch_the_other_tasks_callers_are_found_by_their_names() -> None:
    blocks = [
        block("waits", 2, g.CALL, address=0x1000), block("__schedule", 3, g.CALL, address=0x2000),
        block("__switch_to_asm", 5, g.RET, address=0x3000), block("__schedule", 7, g.RET, address=0x2003, starts=False),
        block("wrote", 11, g.RET, address=0x4005, starts=False),
    ]  # fmt: skip
    found = walked(blocks, [0, 1, 2, 3, 4], waits="w", __schedule="s", wrote="o")
    assert found == {"w": 2, "s": 3 + 5 + 7, "o": 11}


def test_a_block_that_a_device_cuts_short_counts_as_far_as_it_came() -> None:
    whole = block("handler", 9, g.RET, address=0x1000)
    rest = block("handler", 5, g.RET, address=0x1004, starts=False)
    assert walked([whole, rest], [0, 1], handler="path") == {"path": 4 + 5}


def test_a_second_cpus_blocks_are_walked_apart() -> None:
    words = np.array([ROUND, 0, 1 << 28, USER | 1, USER, 1], np.uint32)
    assert g.of_cpu(words, 0).tolist() == [ROUND, 0, USER, 1]
    assert g.of_cpu(words, 1).tolist() == [ROUND, 1 << 28, USER | 1]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.integers(0, 4), st.booleans()), min_size=1, max_size=8
    ),
    st.data(),
)
def test_each_instruction_belongs_to_one_path_whatever_the_trace_is(
    made: list[tuple[str, int, int, bool]], data: st.DataObject
) -> None:
    blocks = [block(name, n, kind, address=100 * at, starts=starts) for at, (name, n, kind, starts) in enumerate(made)]
    words = data.draw(st.lists(st.integers(0, len(blocks) - 1) | st.just(USER), max_size=30))
    words = [word for at, word in enumerate(words) if at == 0 or word != words[at - 1]]  # one again would be cut short
    found = walked(blocks, words, a="x", c="y")
    assert sum(found.values()) == sum(len(blocks[word].ends) for word in words if word != USER)


def test_a_length_is_the_sum_of_its_terms_less_the_models_operations() -> None:
    loop = g.Loop(g.Call("", None, ""), [Counter(p=10), Counter(p=30)], [Counter(f=1), Counter(f=3)])
    assert g.value({"terms": [[1, 7, "p"]]}, {7: loop}) == 20
    assert g.value({"terms": [[1, 7, "p", "f"]], "less": 4}, {7: loop}) == 6
    assert g.value({"terms": [[2, 7, "p"], [-1, 8, "p"]]}, {7: loop, 8: loop}) == 20


def test_the_last_bytes_of_a_block_say_how_it_ends() -> None:
    ends = {"e801020304": g.CALL, "ffd0": g.CALL, "41ffd4": g.CALL, "ff5010": g.CALL, "ffe0": g.OTHER, "c3": g.RET,
            "f3c3": g.RET, "48cf": g.IRET, "cf": g.IRET, "480f07": g.SYSRET, "7405": g.OTHER, "90": g.OTHER}  # fmt: skip
    assert {last: g.kind_of(bytes.fromhex(last)) for last in ends} == ends


def test_where_a_direct_branch_leads() -> None:
    assert g.target_of(bytes.fromhex("ebfe"), 0x1002) == 0x1000
    assert g.target_of(bytes.fromhex("0f84fcffffff"), 0x1006) == 0x1002
    assert g.target_of(bytes.fromhex("ffe0"), 0x1002) == -1


def test_a_function_has_one_name_and_what_was_moved_out_of_it_has_it_too(tmp_path: Path) -> None:
    symbols = tmp_path / "symbols"
    symbols.write_text(
        "0000000000002000 t f.cold\n0000000000001000 T __f\n0000000000001000 T f\n0000000000003000 d no\n"
    )
    assert g.read_symbols(symbols) == ([0x1000, 0x2000], ["f", "f"])
