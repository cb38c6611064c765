"""The shipped recordings are what the notes and the trailers of their recorders say."""

from __future__ import annotations

import lzma
import re
from pathlib import Path

import numpy as np
import pytest

from scripts import write_champsim_trace
from vtsim.guest.traces.accesses import words_of
from vtsim.guest.traces.format import Trace
from vtsim.guest.traces.kinds import KINDS, NUMBER
from vtsim.guest.traces.lackey import FETCH, read_lackey
from vtsim.guest.traces.recorded_exits import RecordedExits

REAL = Path(__file__).parents[2] / "workloads" / "real"

# fmt: off
ROWS_AND_EVENTS = {  # from the recorder's own notes
    "CPUID": (1159, 1159),   "RDMSR": (80, 80),           "WRMSR": (57, 57),         "IN": (1679, 73399),
    "OUT": (3041, 3041),     "MMIO_R": (388, 300387),     "MMIO_W": (1485, 301484),  "MOV_TO_CR": (24317, 24317),
    "MOV_FROM_CR": (7934, 7934), "INVLPG": (432, 432),    "HLT": (13, 13),           "PAUSE": (100, 11075420),
    "RDTSC": (9224, 10857867), "RDTSCP": (460, 276819),   "SYSCALL": (2341, 2341),   "SYSRET": (2288, 2288),
    "EXC": (1097, 1097),     "IRQ": (544, 544),           "IRET": (5763, 101748),    "WBINVD": (6, 6),
    "MOV_TO_DR": (6, 6),     "LGDT": (39, 39),            "LIDT": (40, 40),          "LTR": (3, 3),
    "LLDT": (3, 3),          "INTN": (58, 58),            "TOUCH_R": (20354, 20354), "TOUCH_W": (19156, 19156),
    "TOUCH_F": (1646, 1646), "RETOUCH_R": (3303, 3303),   "RETOUCH_W": (4169, 4169), "RETOUCH_F": (44, 44),
    "REARM": (6, 6),         "PTW": (55441, 55441),       "ROOT": (72, 72),          "LEAF_R": (30967, 30967),
    "LEAF_W": (39819, 39819), "LEAF_F": (3935, 3935),
}
PHASES = {  # rows; KVM's exits with EPT, with EPT and 4 KiB pages, with shadow paging
    "bios":         (2296,   1835,  1842,  1576),
    "decompressor": (59968,  808,   16664, 172),
    "kernel":       (128763, 24645, 23763, 51487),
    "mark1":        (14164,  424,   343,   4615),
    "mark2":        (27735,  428,   285,   11917),
    "mark3":        (8543,   2197,  2163,  4178),
}
# fmt: on


@pytest.fixture(scope="module")
def boot() -> Trace:
    return Trace.load(REAL / "linux-boot.npz")


def test_the_linux_boot_has_the_rows_and_events_of_its_recording(boot: Trace) -> None:
    assert boot.counts() == ROWS_AND_EVENTS


def test_the_phases_of_the_linux_boot_have_the_rows_of_its_recording(boot: Trace) -> None:
    lengths = {phase.name: boot.rows(phase.name) for phase in boot.phases}

    assert {name: rows.stop - rows.start for name, rows in lengths.items()} == {
        name: counts[0] for name, counts in PHASES.items()
    }


def test_each_marker_belongs_to_the_phase_before_the_one_it_starts(boot: Trace) -> None:
    markers = np.nonzero((boot.kind == NUMBER["OUT"]) & (boot.a0 & 0xFFFF == 0xF4))[0]

    assert [int(row) + 1 for row in markers] == [boot.rows(f"mark{n}").start for n in (1, 2, 3)]
    assert boot.a1[markers].tolist() == [1, 2, 3]


def test_the_linux_boot_starts_at_the_reset_vector(boot: Trace) -> None:
    assert (int(boot.kind[0]), int(boot.rip[0])) == (NUMBER["TOUCH_F"], 0xFFFF_FFF0)


@pytest.mark.parametrize("column, name", [(1, "kvm_ept"), (2, "kvm_ept_4k"), (3, "kvm_shadow")])
def test_recorded_exits_have_the_totals_of_their_recording(boot: Trace, column: int, name: str) -> None:
    exits = RecordedExits.load(REAL / f"linux-boot.{name}.json")

    assert exits.phases == tuple(PHASES) == tuple(phase.name for phase in boot.phases)
    assert np.sum(list(exits.tables["reasons"].values()), axis=0).tolist() == [
        counts[column] for counts in PHASES.values()
    ]


@pytest.mark.parametrize("name", ["kvm_ept", "kvm_ept_4k"])
def test_every_ept_violation_has_a_qualification(name: str) -> None:
    exits = RecordedExits.load(REAL / f"linux-boot.{name}.json")

    assert np.sum(list(exits.tables["ept_qualifications"].values()), axis=0).tolist() == list(
        exits.tables["reasons"]["EPT_VIOLATION"]
    )


@pytest.mark.compiled_only
def test_the_sort_trace_has_as_many_fetches_as_lackey_counted_instructions() -> None:
    path = REAL / "sort.lackey.xz"
    with lzma.open(path) as file:
        trailer = file.read()[-2000:].decode()
    counted = re.search(r"guest instrs:\s+([\d,]+)", trailer)

    assert counted is not None
    fetches = sum(int((block.kind == FETCH).sum()) for block in read_lackey(path))
    assert fetches == int(counted[1].replace(",", ""))


@pytest.mark.slow
def test_the_champsim_trace_is_what_its_script_writes(tmp_path: Path) -> None:
    write_champsim_trace.write(tmp_path / "t")

    assert lzma.decompress((REAL / "matrix.champsim.xz").read_bytes()) == lzma.decompress((tmp_path / "t").read_bytes())


@pytest.mark.compiled_only
def test_the_champsim_trace_loads_a_matrix_twice() -> None:
    """96 x 96 elements, an element of the vector for each, by rows and by columns; a sum stored for each row or column."""
    words = np.concatenate(list(words_of(REAL / "matrix.champsim.xz")))
    stores = words[words >= 0] & 1

    assert (int((1 - stores).sum()), int(stores.sum())) == (2 * 2 * 96 * 96, 2 * 96)
    retired = len(words) + int((words >> 48 & 0x7FFF).sum()) - int((words < 0).sum())
    assert retired == 2 * 96 * (96 * 5 + 3)


def test_the_format_page_lists_every_kind_with_its_number() -> None:
    page = (REAL.parents[1] / "docs" / "traces.md").read_text()

    assert [kind.name for kind in KINDS if f"| {kind.number} | {kind.name} |" not in page] == []


def test_the_format_pages_example_writes_a_trace_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REAL.parents[1] / "docs" / "traces.md").read_text()
    monkeypatch.chdir(tmp_path)

    exec(page.split("```python\n")[1].split("```")[0], {})

    assert Trace.load("two-cpuids.npz").counts() == {"CPUID": (2, 2)}
