"""Memory traces become words: an access each, with the ordinary instructions that follow it."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtsim.base.errors import ConfigError
from vtsim.guest.traces import accesses
from vtsim.guest.traces.accesses import END, HIGHEST, MAGIC, Extent, extent, words_of, write_words
from vtsim.guest.traces.champsim import WANTED, read_champsim
from vtsim.guest.traces.content import READ

LOAD, STORE, FETCH = 0, 1, 2
WORK_LIMIT = (1 << 15) - 1
ADDRESSES = st.integers(1, HIGHEST)


def unpacked(words: Any) -> list[tuple[str, int, int]]:
    """(load, store or work; address; ordinary instructions after it)."""
    found = []
    for word in words:
        work, access = int(word) >> 48 & WORK_LIMIT, int(word) & (1 << 48) - 1
        found.append(("work", 0, work) if word < 0 else (["load", "store"][access & 1], access >> 1, work))
    return found


def read(path: Path, limit: int | None = None, block_bytes: int = 1 << 20) -> list[tuple[str, int, int]]:
    return unpacked(chain.from_iterable(words_of(path, limit, block_bytes=block_bytes)))


def record(loads: list[int], stores: list[int], *, branch: int = 0, taken: int = 0) -> bytes:
    """An instruction as ChampSim writes it."""
    words = [0x400000, branch | taken << 8, *stores, *[0] * (2 - len(stores)), *loads, *[0] * (4 - len(loads))]
    return np.array(words, "<u8").tobytes()


def file(tmp_path: Path, content: bytes, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("packed", [bytes, gzip.compress, lzma.compress])
def test_an_empty_file_is_of_no_format(tmp_path: Path, packed: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "empty"
    path.write_bytes(packed(b""))

    assert refusal(path) == f"{path}: this file is empty\n help: a trace in one of the three formats of docs/traces.md"


LACKEY = b"""==1== Lackey
I  00401000,3
 L 1fff000010,8
I  00401003,4
 S 00602008,4
I  00401007,2
 M 00602010,8
I  00401009,2
I  0040100b,2
"""


def test_lackeys_fetches_become_the_work_after_an_access(tmp_path: Path) -> None:
    assert read(file(tmp_path, LACKEY)) == [
        ("load", 0x1FFF000010, 0),
        ("store", 0x602008, 0),
        ("load", 0x602010, 0),
        ("store", 0x602010, 1),  # two instructions follow; one makes up for the second access of the modification
    ]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_champsims_instructions_load_then_store_and_the_others_are_work(tmp_path: Path, compress: Any) -> None:
    content = [record([], [])] * 3 + [record([0x1000, 0x2000], [0x3000], branch=1, taken=1)] + [record([], [])] * 4
    assert read(file(tmp_path, compress(b"".join(content)))) == [
        ("work", 0, 3),
        ("load", 0x1000, 0),
        ("load", 0x2000, 0),
        ("store", 0x3000, 2),  # of four instructions, two make up for accesses
    ]


def test_more_work_than_a_word_has_room_for_takes_more_words(tmp_path: Path) -> None:
    content = record([0x1000], []) + record([], []) * (2 * WORK_LIMIT + 5) + record([0x2000], [])
    assert read(file(tmp_path, content)) == [
        ("load", 0x1000, WORK_LIMIT),
        ("work", 0, WORK_LIMIT),
        ("work", 0, 5),
        ("load", 0x2000, 0),
    ]


instructions = st.lists(st.tuples(st.lists(ADDRESSES, max_size=4), st.lists(ADDRESSES, max_size=2)), min_size=1)


@given(instructions, st.integers(1, 300))
def test_every_access_and_every_instruction_of_a_trace_is_in_its_words(
    tmp_path_factory: Any, written: list[tuple[list[int], list[int]]], block_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("champsim") / "t"
    path.write_bytes(b"".join(record(*each) for each in written))

    words = read(path, block_bytes=block_bytes)

    made = [
        each for loads, stores in written for each in [*(("load", a) for a in loads), *(("store", a) for a in stores)]
    ]
    assert [word[:2] for word in words if word[0] != "work"] == made
    retired = len(made) + sum(word[2] for word in words)
    assert len(written) <= retired <= max(len(written), len(made)) + len(made)
    assert words == read(path)  # whatever the block


@given(instructions, st.integers(1, 300))
def test_what_is_written_in_our_own_format_is_read_back(
    tmp_path_factory: Any, written: list[tuple[list[int], list[int]]], block_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("own")
    (folder / "t").write_bytes(b"".join(record(*each) for each in written))
    write_words(folder / "own", words_of(folder / "t"))

    assert read(folder / "own", block_bytes=block_bytes) == read(folder / "t")


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_uses_so_many_records(tmp_path: Path, limit: int) -> None:
    records = [record([n << 12], []) for n in range(1, 6)]
    path = file(tmp_path, b"".join(records))
    write_words(tmp_path / "own", words_of(path))

    assert [word[1] for word in read(path, limit)] == [n << 12 for n in range(1, limit + 1)]
    assert read(tmp_path / "own", limit, block_bytes=8) == read(path, limit)
    assert [word[1] for word in read(file(tmp_path, b" L 1000,8\n L 2000,8\n L 3000,8\n L 4000,8\n"), limit)] == [
        n << 12 for n in range(1, limit + 1)
    ]


def test_ranges_are_pages_that_lie_near_each_other(tmp_path: Path) -> None:
    pages = [5, 5, 6, 70, 71 + 64, 71 + 65 + 65, 4]  # a gap of 64 pages is bridged, one of 65 is not
    path = file(tmp_path, b"".join(record([n << 12 | 8], []) for n in pages))

    assert extent(path) == Extent(words=len(pages), ranges=((4 << 12, 136 << 12), (201 << 12, 202 << 12)))


@given(st.lists(st.integers(0, 3000), min_size=1), st.integers(1, 5))
def test_ranges_do_not_depend_on_how_the_trace_was_cut(pages: list[int], block: int) -> None:
    ranges = np.empty((0, 2), np.int64)
    for start in range(0, len(pages), block):
        ranges = accesses._joined(ranges, np.unique(pages[start : start + block]))

    at_once = accesses._joined(np.empty((0, 2), np.int64), np.unique(pages))
    assert ranges.tolist() == at_once.tolist()
    assert all(any(first <= page < after for first, after in ranges.tolist()) for page in pages)


# --- what is wrong with a file ---------------------------------------------------------------------------------------


def test_a_champsim_trace_that_ends_inside_a_record_is_refused_with_its_offset(tmp_path: Path) -> None:
    path = file(tmp_path, record([1], []) * 3 + bytes(10))
    assert refusal(path) == f"{path}: offset 192: the file ends 10 bytes into record 3\n help: {WANTED}"


@pytest.mark.parametrize(
    ("bad", "what"), [({"branch": 7}, "is_branch is 7"), ({"taken": 2}, "branch_taken is 2")], ids=["branch", "taken"]
)
@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_what_is_no_champsim_record_is_refused_with_its_offset(
    tmp_path: Path, bad: dict[str, int], what: str, block_bytes: int
) -> None:
    path = file(tmp_path, record([1], []) * 5 + record([1], [], **bad))
    assert refusal(path, block_bytes=block_bytes) == (
        f"{path}: offset 320: not a record: its {what}, not 0 or 1\n help: {WANTED}"
    )


def test_an_empty_champsim_trace_is_refused(tmp_path: Path) -> None:
    path = file(tmp_path, b"")
    with pytest.raises(ConfigError) as caught:
        list(read_champsim(path))
    assert str(caught.value) == f"{path}: no instruction in this file\n help: {WANTED}"


@pytest.mark.parametrize("content", [record([HIGHEST + 1], []), record([1], [-1 & (1 << 64) - 1])])
def test_addresses_that_no_user_program_has_are_refused(tmp_path: Path, content: bytes) -> None:
    path = file(tmp_path, content)
    assert refusal(path).startswith(f"{path}: address 0x")
    assert refusal(path).endswith(f" is too high\n help: at most {HIGHEST:#x}")


@pytest.mark.parametrize(
    ("start", "name"), [(b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh9", "bzip2"), (b"PK\x03\x04", "zip")], ids=lambda n: str(n)
)
def test_a_compression_that_is_not_read_is_named(tmp_path: Path, start: bytes, name: str) -> None:
    path = file(tmp_path, start + bytes(100))
    assert refusal(path) == f"{path}: compressed with {name}, which is not read (offset 0)\n help: {READ}"


@pytest.mark.parametrize(("suffix", "name"), [(".xz", "xz"), (".gz", "gzip")])
def test_a_name_that_promises_a_compression_is_held_to_it(tmp_path: Path, suffix: str, name: str) -> None:
    path = file(tmp_path, record([1], []), f"t{suffix}")
    assert refusal(path) == f"{path}: named like a {name} file, but is none (offset 0)\n help: {READ}"


def test_content_counts_more_than_which_compression_the_name_promises(tmp_path: Path) -> None:
    assert read(file(tmp_path, gzip.compress(record([1], [])), "t.xz")) == [("load", 1, 0)]


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_a_truncated_compressed_file_says_how_far_it_was_good(tmp_path: Path, compress: Any) -> None:
    path = file(tmp_path, compress(record([1], []) * 100)[:-6])
    message = refusal(path, block_bytes=64)
    assert message.startswith(f"{path}: the compressed file is damaged or truncated after ")
    assert int(message.split(" after ")[1].split()[0]) <= 6400


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_a_compressed_file_is_streams_to_its_end(tmp_path: Path, compress: Any) -> None:
    stream, padding = compress(record([1], [])), bytes(8)
    for content in (stream + stream, stream + padding, stream + padding + stream + padding):
        assert read(file(tmp_path, content)) == [("load", 1, 0)] * content.count(stream)
    for junk in (b"junk", padding + b"junk", stream[:-1]):
        with pytest.raises(ConfigError, match="the compressed file is damaged or truncated"):
            read(file(tmp_path, stream + junk))


def own(*words: int, version: int = 1) -> bytes:
    return MAGIC + version.to_bytes(8, "little") + np.array(words, np.int64).astype("<i8").tobytes()


WRONG = [
    (own(2, 4), "offset 32: the file ends before its end mark: it is truncated"),
    (own(), "offset 16: the file ends before its end mark: it is truncated"),
    (own(2, 4)[:-3], "offset 29: the file ends 5 bytes into a word"),
    (own(2, END, 4), "offset 32: the file goes on after its end mark"),
    (own(2, -3, END), "offset 24: not a word of a memory trace"),
    (own(2, END, version=9), "offset 8: version 9 is not known; this vtsim reads version 1"),
]


@pytest.mark.parametrize(("content", "why"), WRONG, ids=[why[:25] for _, why in WRONG])
@pytest.mark.parametrize("block_bytes", [8, 1 << 20])
def test_a_damaged_file_of_our_own_is_refused_with_its_offset(
    tmp_path: Path, content: bytes, why: str, block_bytes: int
) -> None:
    path = file(tmp_path, content)
    assert refusal(path, block_bytes=block_bytes) == f"{path}: {why}"


@given(st.binary(max_size=300), st.sampled_from([b"", own(2, 4), gzip.compress(b"x"), b"\xfd7zXZ\x00"]))
def test_any_bytes_give_words_or_config_error(tmp_path_factory: Any, content: bytes, start: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "t"
    path.write_bytes(start + content)

    try:
        read(path)
    except ConfigError as error:
        assert str(error).startswith(str(path))
