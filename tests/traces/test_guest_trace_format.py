"""A trace survives the disk unchanged, and a file that is none is refused in one sentence."""

from __future__ import annotations

import io
import json
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtsim.base.errors import ConfigError
from vtsim.guest.traces.format import COLUMNS, Phase, RecordedGuest, Trace
from vtsim.guest.traces.kinds import KINDS, NUMBER

GUEST = RecordedGuest(memory_bytes=1 << 20, tsc_hz=10**9, instructions_per_second=10**9)


def make(rows: int = 3, **changes: Any) -> Trace:
    columns = {name: np.zeros(rows, dtype) for name, dtype in COLUMNS.items()}
    columns["icount"] = np.arange(rows) * 10
    columns["kind"] = np.full(rows, NUMBER["CPUID"], np.uint8)
    columns["n"] = np.ones(rows, np.uint32)
    fields: dict[str, Any] = {
        "name": "small",
        "description": "made by a test",
        "source": "nowhere",
        "guest": GUEST,
        "phases": (Phase(name="all", first_row=0, icount=0),),
        **columns,
    }
    return Trace(**(fields | changes))


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a trace's header, or replace whole columns."""
    content = members(path)
    header = json.loads(np.load(io.BytesIO(content["header.npy"])).tobytes())
    columns = {key: value for key, value in changes.items() if isinstance(value, np.ndarray)}
    header |= {key: value for key, value in changes.items() if key not in columns}
    columns["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            column = columns.get(name.removesuffix(".npy"))
            if column is not None:
                buffer = io.BytesIO()
                np.save(buffer, column)
                data = buffer.getvalue()
            archive.writestr(name, data)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Trace.load(path)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "small.npz"
    make().save(path)
    return path


values = st.integers(-(2**63), 2**63 - 1)
FREE = [kind for kind in KINDS if kind.name not in {"IN", "OUT", "PTW", "LEAF_R", "LEAF_W", "LEAF_F"}]


@given(st.lists(st.tuples(st.integers(0, 2**40), st.sampled_from(FREE), st.integers(0, 3), values), min_size=1))
def test_every_column_comes_back_as_it_was_written(tmp_path_factory: Any, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    written = make(
        len(rows),
        icount=np.sort(np.array([row[0] for row in rows], np.int64)),
        kind=np.array([row[1].number for row in rows], np.uint8),
        cpl=np.array([row[2] for row in rows], np.uint8),
        a1=np.array([row[3] for row in rows], np.int64),
    )

    written.save(path)
    read = Trace.load(path)

    assert all((getattr(read, name) == getattr(written, name)).all() for name in COLUMNS)
    assert (read.name, read.guest, read.phases) == (written.name, written.guest, written.phases)


def test_the_same_trace_is_the_same_bytes(tmp_path: Path, saved: Path) -> None:
    make().save(tmp_path / "again.npz")

    assert (tmp_path / "again.npz").read_bytes() == saved.read_bytes()


def test_saving_leaves_nothing_but_the_file(saved: Path) -> None:
    assert [entry.name for entry in saved.parent.iterdir()] == ["small.npz"]


def test_counts_tell_rows_and_merged_events_apart() -> None:
    trace = make(kind=np.array([1, 15, 15], np.uint8), n=np.array([1, 1, 7], np.uint32))

    assert trace.counts() == {"CPUID": (1, 1), "PAUSE": (2, 8)}


def test_a_phase_ends_where_the_next_one_starts() -> None:
    trace = make(phases=(Phase(name="a", first_row=0, icount=0), Phase(name="b", first_row=2, icount=20)))

    assert (trace.rows("a"), trace.rows("b")) == (slice(0, 2), slice(2, 3))
    assert trace.phase_of_rows().tolist() == [0, 0, 1]


def test_an_unknown_phase_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        make().rows("boot")

    assert str(caught.value) == "unknown phase 'boot'\n help: phase can be all"


def test_a_loaded_column_cannot_be_changed(saved: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        Trace.load(saved).a0[0] = 1


def test_kind_numbers_and_names_are_unique() -> None:
    assert len({kind.number for kind in KINDS}) == len({kind.name for kind in KINDS}) == len(KINDS)


def of_kind(name: str, **columns: int) -> dict[str, Any]:
    """Three rows, of which the second is of a kind and has these operands."""
    kinds = {"kind": np.array([1, NUMBER[name], 1], np.uint8)}
    return kinds | {column: np.array([0, value, 0]) for column, value in columns.items()}


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"icount": np.array([0, 9, 8])}, "row 2: icount falls"),
    ({"icount": np.array([-1, 9, 9])}, "row 0: icount falls"),
    ({"kind": np.array([1, 99, 1], np.uint8)}, "row 1: kind is not known"),
    ({"cpl": np.array([0, 0, 4], np.uint8)}, "row 2: cpl is above 3"),
    ({"n": np.array([1, 0, 1], np.uint32)}, "row 1: n is 0"),
    (of_kind("MOV_TO_CR", a0=1), "row 1 (MOV_TO_CR): a0 is no control register"),
    (of_kind("MOV_FROM_DR", a0=8), "row 1 (MOV_FROM_DR): a0 is no debug register"),
    (of_kind("IRQ", a0=256), "row 1 (IRQ): a0 is no vector"),
    (of_kind("EXC", a0=32), "row 1 (EXC): a0 is no exception"),
    (of_kind("OUT", a0=0x80), "row 1 (OUT): its operand has not 1, 2 or 4 bytes"),
    (of_kind("MMIO_R", a0=-(1 << 63)), "row 1 (MMIO_R): the address has more than 52 bits"),
    (of_kind("MMIO_W", a0=1 << 52), "row 1 (MMIO_W): the address has more than 52 bits"),
    (of_kind("TOUCH_F", a0=1 << 20), "row 1 (TOUCH_F): the page is in neither memory nor firmware"),
    (of_kind("PTW", a0=0x1006), "row 1 (PTW): the level is none from 1 to 5"),
    (of_kind("PTW", a0=1 << 20 | 1), "row 1 (PTW): the table is not in memory"),
    (of_kind("ROOT", a0=-4096), "row 1 (ROOT): the table is not in memory"),
    (of_kind("LEAF_W", a1=0x1004), "row 1 (LEAF_W): the level is none from 1 to 3"),
    (of_kind("LEAF_R", a1=1 << 32 | 1), "row 1 (LEAF_R): the table is not in memory"),
    ({"guest": attrs.evolve(GUEST, tsc_hz=0)}, "tsc_hz of the guest is 0\n help: at least 1"),
    (
        {"phases": ()},
        "phases start at rows [] of 3\n help: the first starts at row 0 and each has at least one row",
    ),
    (
        {"phases": (Phase(name="a", first_row=0, icount=0), Phase(name="b", first_row=3, icount=9))},
        "phases start at rows [0, 3] of 3\n help: the first starts at row 0 and each has at least one row",
    ),
    (
        {"phases": (Phase(name="a", first_row=0, icount=0), Phase(name="a", first_row=1, icount=9))},
        "two phases have the same name",
    ),
]


@pytest.mark.parametrize("changes, text", BROKEN)
def test_columns_that_cannot_be_a_recording_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**changes)

    assert str(caught.value) == text


@pytest.mark.parametrize(
    "gpa, refused",
    [(0xBFFF_F000, False), (0xC000_0000, True), (0xFFFF_F000, False), (0x1_3FFF_F000, False), (0x1_4000_0000, True)],
)
def test_memory_beyond_3_gib_stands_above_the_devices(gpa: int, refused: bool) -> None:
    changes = of_kind("TOUCH_R", a0=gpa) | {"guest": attrs.evolve(GUEST, memory_bytes=4 << 30)}

    with pytest.raises(ConfigError, match="neither memory nor firmware") if refused else nullcontext():
        make(**changes)


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        make(a0=np.zeros(2, np.int64))

    assert str(caught.value) == (
        "columns differ in length: icount 3, kind 3, cpl 3, cr3 3, rip 3, a0 2, a1 3, a2 3, n 3"
    )


def test_a_wrong_version_is_refused_with_the_known_one(saved: Path) -> None:
    rewrite(saved, version=2)

    assert refusal(saved) == f"{saved}: trace version 2 is not known\n help: this vtsim reads version 1"


def test_an_archive_of_something_else_is_not_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, data=np.zeros(3))

    assert refusal(path) == f"{path}: not a trace: it holds no header"


def test_a_header_of_something_else_is_not_a_trace(saved: Path) -> None:
    rewrite(saved, format="photo")

    assert refusal(saved) == (f'{saved}: not a trace: its header does not say so\n help: "format": "vtsim-trace"')


def test_a_text_file_is_not_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")

    assert refusal(path) == f"{path}: not a trace, or a truncated one (File is not a zip file)"


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.npz") == f"{tmp_path / 'none.npz'}: No such file or directory"


def test_a_column_of_another_type_is_refused(saved: Path) -> None:
    rewrite(saved, cr3=np.zeros(3, np.float64))

    assert refusal(saved) == (f"{saved}: column cr3 is float64 of shape (3,)\n help: version 1 has 3 values of int64")


def test_a_column_longer_than_announced_is_refused_unread(saved: Path) -> None:
    rewrite(saved, a0=np.zeros(10_000, np.int64))

    assert refusal(saved) == f"{saved}: a0 takes 80128 bytes where 24 are announced"


def test_a_header_that_lacks_a_key_is_refused(saved: Path) -> None:
    rewrite(saved, guest={"memory_bytes": 1})

    assert refusal(saved).startswith(f"{saved}: the header does not hold what version 1 needs: ")


def test_keys_and_columns_that_are_not_known_are_passed_over(saved: Path) -> None:
    guest = {"memory_bytes": 1 << 20, "tsc_hz": 10**9, "instructions_per_second": 10**9, "vcpus": 1}
    rewrite(saved, guest=guest, recorder="another", phases=[{"name": "all", "first_row": 0, "icount": 0, "marks": 3}])
    with zipfile.ZipFile(saved, "a") as archive:
        for name in ("kind_name", "vcpu"):
            buffer = io.BytesIO()
            np.save(buffer, np.zeros(3, np.int64))
            archive.writestr(f"{name}.npy", buffer.getvalue())

    assert (Trace.load(saved).guest, len(Trace.load(saved))) == (GUEST, 3)


def test_rows_of_two_vcpus_are_no_recording_of_one(saved: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([0, 1, 0]))
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("vcpu.npy", buffer.getvalue())

    assert refusal(saved) == (f"{saved}: column vcpu has rows of 2 vCPUs\n help: a recording has the rows of one vCPU")


@pytest.mark.parametrize("value", ["128 MiB", None, 1.5])
def test_a_size_that_is_no_number_is_refused(saved: Path, value: Any) -> None:
    rewrite(saved, guest={"memory_bytes": value, "tsc_hz": 1, "instructions_per_second": 1})

    assert refusal(saved).startswith(f"{saved}: the header does not hold what version 1 needs: memory_bytes is ")


def test_a_bad_row_is_reported_with_the_file(saved: Path) -> None:
    rewrite(saved, kind=np.array([1, 99, 1], np.uint8))

    assert refusal(saved) == f"{saved}: row 1: kind is not known"


@given(st.integers(0, 10_000), st.binary(max_size=64))
def test_a_truncated_or_overwritten_file_raises_config_error_and_nothing_else(
    tmp_path_factory: Any, at: int, junk: bytes
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    make(50).save(path)
    whole = path.read_bytes()
    cut = at % len(whole)

    for damaged in (whole[:cut], whole[:cut] + junk + whole[cut + len(junk) :]):
        path.write_bytes(damaged)
        try:
            Trace.load(path)
        except ConfigError as error:
            assert str(error).startswith(f"{path}: ")
