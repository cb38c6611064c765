"""Convert a recorded guest (Parquet and JSON) into the project's own files, and write a scenario that replays it.

    python -m scripts.import_recording RECORDING TARGET --name NAME --memory 128 [options]

RECORDING is the folder with trace.parquet and kvm_*.json, or kvm_*.txt as perf kvm stat report prints it. TARGET gets
NAME.npz, NAME.kvm_*.json and, where there is none yet, NAME.yaml. Columns are found by name; further ones are passed
over. Needs pyarrow, which vtsim does not.

Phases are cut where `--phase NAME=INSTRUCTIONS` says. Without that: where the guest first executes above 1 MiB
(decompressor), where it first executes from 16 MiB on or at a kernel's linear address (kernel), and behind each OUT to
port F4H (mark1, mark2 …), as far as the tables of exits have phases of these names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtsim.base.errors import ConfigError
from vtsim.guest.traces.exit_tables import exit_tables
from vtsim.guest.traces.format import COLUMNS, VCPU_COLUMNS, Phase, RecordedGuest, Trace
from vtsim.guest.traces.kinds import NUMBER, PORT_MASK
from vtsim.guest.traces.recorded_exits import FORMAT, TABLES, VERSION

# fmt: off
TABLE_OF = {  # our table, theirs
    "reasons":            "exits",
    "ports":              "io",
    "msrs":               "msr",
    "cpuid":              "cpuid",
    "mmio":               "mmio",
    "control_registers":  "cr_access",
    "exceptions":         "exception",
    "ept_qualifications": "ept_qualification",
    "ept_regions":        "ept_gpa_class",
}
# fmt: on
TIMED = ["EXTERNAL_INTERRUPT", "INTERRUPT_WINDOW", "HLT", "PAUSE_INSTRUCTION"]  # depend on how fast the host is
MARKS = 0xF4
# linear addresses: where each is linked to run, or put by the loader
DECOMPRESSOR = ((0x10_0000, 0x20_0000),)
KERNEL = ((0x100_0000, 0x110_0000), (0xC000_0000, 0xF000_0000), (0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_FFFF_FFFF))
SCENARIO = """\
description: {description}
machine:
  profile: skx-4114
  memory: {host} MiB
vmm:
  personality: kvm
  paging: ept
  ept:
    page_size: 2 MiB
vms:
  - memory: {memory} MiB
    devices: [i440fx]
    guest:
      kernel:
        tick: off
      processes:
        - name: {name}
          phases:
            - primitive: replay
              trace: {name}.npz
"""


def columns_of(table: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The columns of a trace; unsigned 64-bit values become two's complement. Exits with what is missing."""
    missing = [name for name in COLUMNS if name not in table and name != "n"]
    if missing:
        raise SystemExit(f"trace.parquet has no column {', '.join(missing)}")
    for name in VCPU_COLUMNS:
        if name in table and len(np.unique(table[name])) > 1:
            raise SystemExit(f"column {name} of trace.parquet: a recording has the rows of one vCPU")
    columns = {}
    for name, dtype in COLUMNS.items():
        column = np.asarray(table[name]) if name in table else np.ones(len(table["kind"]), np.int64)
        eight = column.dtype.kind in "iu" and column.dtype.itemsize == 8 and np.dtype(dtype).itemsize == 8
        columns[name] = column.view(dtype) if eight else column.astype(dtype)
    return columns


def first_within(rip: NDArray[np.uint64], ranges: tuple[tuple[int, int], ...], start: int) -> int | None:
    """The first row from `start` on whose RIP is in one of these ranges; None if none is."""
    within = np.zeros(len(rip), bool)
    for low, high in ranges:
        within |= (rip >= low) & (rip < high)
    within[:start] = False
    return int(np.argmax(within)) if within.any() else None


def known_phases(columns: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, int, int]]:
    """Name, first row and first instruction of the phases that the recorded rows show, after the first."""
    rip, kind, icount = columns["rip"].view(np.uint64), columns["kind"], columns["icount"]
    row = 0
    for name, ranges in (("decompressor", DECOMPRESSOR), ("kernel", KERNEL)):
        if (found := first_within(rip, ranges, row)) is not None:
            row = found
            yield name, row, int(icount[row])
    marks = np.nonzero((kind == NUMBER["OUT"]) & (columns["a0"] & PORT_MASK == MARKS))[0] + 1
    for n, row in enumerate(marks[marks < len(kind)].tolist(), 1):
        yield f"mark{n}", row, int(icount[row - 1]) + 1


def phases_of(columns: Mapping[str, NDArray[Any]], given: Sequence[str], wanted: Sequence[str]) -> tuple[Phase, ...]:
    """The phases of a trace: as given (NAME=INSTRUCTIONS), else those found that the tables know; at least one."""
    icount = columns["icount"]
    if given:
        first = [(name, int(at)) for name, _, at in (one.partition("=") for one in given)]
        starts = [(name, int(np.searchsorted(icount, at)), at) for name, at in first]
    else:
        starts = [(wanted[0] if wanted else "all", 0, 0)]
        starts += [one for one in known_phases(columns) if one[0] in wanted[1:]]
    if [name for name, *_ in starts] != list(wanted) and wanted:
        print(f"phases {[name for name, *_ in starts]}; the tables have {list(wanted)}")
    return tuple(Phase(name=name, first_row=row, icount=at) for name, row, at in starts)


def convert_exits(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Exits per reason and key, one count per phase; one phase where the tables have only totals."""
    phases = theirs.get("phases") or [{"name": "all", **theirs["total"]}]
    tables: dict[str, dict[str, list[int]]] = {}
    for ours in TABLES:
        name = TABLE_OF[ours]
        totals = theirs.get("total", {}).get(name) or {key: 0 for phase in phases for key in phase.get(name, {})}
        tables[ours] = {key: [phase.get(name, {}).get(key, 0) for phase in phases] for key in totals}
        for key, total in totals.items():
            if total not in (0, sum(tables[ours][key])):
                raise SystemExit(f"{name} {key}: phases have {sum(tables[ours][key])}, the total is {total}")
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": theirs.get("source", ""),
        "phases": [phase["name"] for phase in phases],
        "not_recorded": [reason.split()[0] for reason in theirs.get("excluded", ())],
        "time_dependent_reasons": theirs.get("timing_dependent_reasons", []),
        "time_dependent_accesses": theirs.get("timing_dependent_accesses", []),
        "tables": tables,
    }


def printed_exits(file: Path) -> dict[str, Any]:
    """The one table of exits that perf or bcc printed, as totals."""
    tables = exit_tables(file.read_text(), str(file))
    if len(tables) > 1:
        raise SystemExit(f"{file} has {len(tables)} tables, from lines {[table.line for table in tables]}: leave one")
    return {
        "source": f"{file.name}, line {tables[0].line}",
        "timing_dependent_reasons": TIMED,
        "total": {"exits": dict(tables[0].counts)},
    }


def main() -> None:
    """Write the trace, one JSON file per hypervisor configuration, and a scenario."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--memory", type=int, required=True, help="MiB of the recorded guest")
    parser.add_argument("--clock", type=int, default=1_000_000_000, help="its TSC and instructions per second")
    parser.add_argument("--phase", action="append", default=[], help="NAME=INSTRUCTIONS, in order")
    for text in ("description", "source", "machine", "kernel", "command-line"):
        parser.add_argument(f"--{text}", default="")
    asked = parser.parse_args()
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(asked.recording / "trace.parquet")
    columns = columns_of({name: table[name].to_numpy() for name in table.column_names if name != "kind_name"})
    theirs = {file.stem: json.loads(file.read_text()) for file in sorted(asked.recording.glob("kvm_*.json"))}
    theirs |= {file.stem: printed_exits(file) for file in sorted(asked.recording.glob("kvm_*.txt"))}
    wanted = next(([phase["name"] for phase in one.get("phases", ())] for one in theirs.values()), [])
    Trace(
        name=asked.name,
        description=asked.description,
        source=asked.source,
        guest=RecordedGuest(
            memory_bytes=asked.memory << 20,
            tsc_hz=asked.clock,
            instructions_per_second=asked.clock,
            machine=asked.machine,
            kernel=asked.kernel,
            command_line=asked.command_line,
        ),
        phases=phases_of(columns, asked.phase, wanted),
        **columns,
    ).save(asked.target / f"{asked.name}.npz")
    for configuration, one in theirs.items():
        text = json.dumps(convert_exits(one), separators=(",", ":"))
        (asked.target / f"{asked.name}.{configuration}.json").write_text(text.replace('},"', '},\n"') + "\n")
    scenario = asked.target / f"{asked.name}.yaml"
    if not scenario.exists():
        host = max(1024, 4 * asked.memory)
        description = asked.description or f"the recorded guest {asked.name}"
        scenario.write_text(
            SCENARIO.format(description=json.dumps(description), host=host, memory=asked.memory, name=asked.name)
        )


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(str(error)) from None
