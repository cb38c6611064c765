"""Lackey's text is read record by record, whatever the block size, and refused by line."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtsim.base.errors import ConfigError
from vtsim.guest.traces.lackey import FETCH, LOAD, MODIFY, STORE, WANTED, read_lackey

TEXT = b"""==9== Lackey, an example Valgrind tool
==9== Command: true

I  0401ab70,3
 S 1fff000768,8
 L 0,1
--9-- a message
 M 7ffffffffffffff,65535
"""
RECORDS = [
    (FETCH, 0x0401AB70, 3),
    (STORE, 0x1FFF000768, 8),
    (LOAD, 0, 1),
    (MODIFY, 0x7FF_FFFF_FFFF_FFFF, 65535),
]


def read(path: Path, **options: Any) -> list[tuple[int, int, int]]:
    return [
        (int(kind), int(address), int(size))
        for block in read_lackey(path, **options)
        for kind, address, size in zip(block.kind, block.address, block.size, strict=True)
    ]


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path)
    return str(caught.value)


def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "prog.lackey"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_plain_gzip_and_xz_give_the_same_records(tmp_path: Path, compress: Any) -> None:
    assert read(file(tmp_path, compress(TEXT))) == RECORDS


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_a_block_border_changes_nothing(tmp_path: Path, block_bytes: int) -> None:
    assert read(file(tmp_path, TEXT), block_bytes=block_bytes) == RECORDS


def test_the_last_line_needs_no_newline(tmp_path: Path) -> None:
    assert read(file(tmp_path, TEXT.rstrip(b"\n"))) == RECORDS


def test_carriage_returns_are_accepted(tmp_path: Path) -> None:
    assert read(file(tmp_path, b"I  10,2\r\n L 20,4\r\n")) == [(FETCH, 0x10, 2), (LOAD, 0x20, 4)]


records = st.lists(
    st.tuples(st.sampled_from([FETCH, LOAD, STORE, MODIFY]), st.integers(0, 2**60 - 1), st.integers(1, 65535)),
    min_size=1,
)


@given(records, st.integers(1, 200))
def test_what_lackey_prints_is_what_is_read(tmp_path_factory: Any, written: list[Any], block_bytes: int) -> None:
    path = tmp_path_factory.mktemp("lackey") / "t"
    letters = {FETCH: "I ", LOAD: " L", STORE: " S", MODIFY: " M"}
    path.write_text("".join(f"{letters[kind]} {address:08x},{size}\n" for kind, address, size in written))

    assert read(path, block_bytes=block_bytes) == written


MALFORMED = [
    "I 0401ab70,3",
    " X 0401ab70,3",
    "I  0401AB70,3",
    "I  0401ab70",
    "I  ,3",
    "I  0401ab70,",
    "I  0401ab70,0",
    "I  0401ab70,65536",
    "I  0401ab70,99999999999999999999",
    "I  ffffffffff600000,1",
    "I  0401ab70,3 ",
    "hello",
    "I",
]


@pytest.mark.parametrize("line", MALFORMED)
@pytest.mark.parametrize("after", ["\n", "\nI  10,2\n", ""])
def test_a_malformed_line_is_reported_with_its_number(tmp_path: Path, line: str, after: str) -> None:
    path = file(tmp_path, f"==1== x\nI  10,2\n{line}{after}".encode())

    assert refusal(path) == (f"{path}:3: not a record of valgrind's lackey\n    3 | {line}\n      | ^\n help: {WANTED}")


def test_the_line_number_counts_lines_of_earlier_blocks(tmp_path: Path) -> None:
    path = file(tmp_path, b"I  10,2\n" * 1000 + b"oops\n")

    with pytest.raises(ConfigError) as caught:
        read(path, block_bytes=100)

    assert str(caught.value).startswith(f"{path}:1001: ")


def test_a_binary_file_is_refused_at_its_first_line(tmp_path: Path) -> None:
    assert refusal(file(tmp_path, bytes(range(256)) * 100)).startswith(f"{tmp_path / 'prog.lackey'}:1: not a record")


def test_an_endless_line_is_refused_without_reading_on(tmp_path: Path) -> None:
    path = file(tmp_path, b"I  " + b"0" * 10_000)

    assert refusal(path).startswith(f"{path}:1: not a record of valgrind's lackey\n    1 | I  000")


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_a_truncated_compressed_file_is_refused(tmp_path: Path, compress: Any) -> None:
    path = file(tmp_path, compress(TEXT * 50)[:-10])

    assert refusal(path) == (
        f"{path}: the compressed file is damaged or truncated after 0 bytes of content "
        "(Compressed file ended before the end-of-stream marker was reached)"
    )


@pytest.mark.parametrize("content", [b"", b"\n\n", b"==1== nothing ran\n"])
def test_a_file_without_accesses_is_refused(tmp_path: Path, content: bytes) -> None:
    path = file(tmp_path, content)

    assert refusal(path) == f"{path}: no memory access in this file\n help: {WANTED}"


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: No such file or directory"


@given(st.binary(max_size=200))
def test_any_bytes_give_records_or_config_error(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.mktemp("lackey") / "t"
    path.write_bytes(content)

    try:
        read(path)
    except ConfigError as error:
        assert str(error).startswith(str(path))
