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
from vtsim.guest.kernel.lengths import COUNTED, ESTIMATED, LENGTHS

KIT: Final = Path(g.__file__).parent
PATHS: Final[dict[str, Any]] = tomllib.loads((KIT / "guest_paths.toml").read_text())
COUNTS: Final[dict[str, int]] = tomllib.loads((KIT / "guest_counts.toml").read_text())["counts"]
MOST_OPERATIONS: Final = 85  # that a row of the table takes off: fork's


# --- the lengths, the counts and the table agree ----------------------------------------------------------------------
def test_a_length_is_a_count_or_says_that_it_is_an_estimate() -> None:
    assert {name: length.instructions for name, length in LENGTHS.items() if length.source == COUNTED} == COUNTS
    assert all(LENGTHS[name].source == ESTIMATED for name in LENGTHS.keys() - COUNTS.keys())
    assert "ESTIMATE" in ESTIMATED


def test_every_count_has_a_row_that_says_how_it_is_made() -> None:
    assert list(COUNTS) == list(PATHS["lengths"])


@pytest.mark.parametrize("name", PATHS["lengths"])
def test_a_row_names_loops_that_are_run_and_paths_to_which_functions_belong(name: str) -> None:
    run = {int(number) for number in re.findall(r"\b(?:LOOP|SELECT)\((\d+),", (KIT / "guest_init.c").read_text())}
    run |= {int(number) for number in re.findall(r"LOOP_OF\(\d+, \d+, (\d+),", (KIT / "guest_init.c").read_text())}
    run |= {g.SECOND + number for number in run}
    row = PATHS["lengths"][name]
    assert set(row) <= {"terms", "less"}
    assert 0 <= row.get("less", 0) <= MOST_OPERATIONS
    for times, loop, path, *per in row["terms"]:
        assert times and loop in run
        assert path in set(g.functions_of(PATHS, loop).values()) | set(PATHS["alone"].values())
        assert all(isinstance(function, str) for function in per)


# --- the walk along a trace -------------------------------------------------------------------------------------------
def block(function: str, n: int, kind: int, *, address: int = 0, starts: bool = True) -> g.Block:
    """A block of n instructions of one byte each."""
    return g.Block(function, starts, address, tuple(range(1, n + 1)), kind, -1)


ROUND: Final = g.MARK | g.ROUND << 24
USER: Final = g.MARK | g.USER << 24


def walked(blocks: list[g.Block], words: list[int], **paths: str) -> dict[str, int]:
    """Instructions of each path in one round of these words: numbers of blocks, or marks."""
    loop = g.Walk(paths, {}).run(np.array([ROUND, *words], np.uint32), blocks)
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
