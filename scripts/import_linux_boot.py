"""Convert the recorded Linux boot (Parquet and JSON) into the project's own files.

    python scripts/import_linux_boot.py RECORDING workloads/real

RECORDING is the folder with trace.parquet and kvm_*.json. Needs pyarrow, which vtsim itself does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from vtsim.guest.traces.format import COLUMNS, Phase, RecordedGuest, Trace
from vtsim.guest.traces.recorded_exits import FORMAT, TABLES, VERSION

# fmt: off
PHASES = (  # name and first instruction, from the recording's own notes
    ("bios",                  0),
    ("decompressor",  5_700_424),
    ("kernel",      104_425_646),
    ("mark1",     1_554_235_958),
    ("mark2",     1_560_426_445),
    ("mark3",     1_609_792_302),
)
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
GUEST = RecordedGuest(
    memory_bytes=128 << 20,
    tsc_hz=1_000_000_000,
    instructions_per_second=1_000_000_000,
    machine="pc-i440fx-7.2, 1 vCPU, SeaBIOS, Skylake-Client-v1 without what TCG lacks",
    kernel="Linux 6.1.0-51-cloud-amd64",
    command_line="console=ttyS0 panic=-1 quiet nokaslr no_timer_check tsc=reliable tsc_early_khz=1000000",
)


def convert_trace(recording: Path) -> Trace:
    """The event stream, column by column; unsigned 64-bit values become two's complement."""
    table = pyarrow.parquet.read_table(recording / "trace.parquet")
    columns: dict[str, Any] = {}
    for name, dtype in COLUMNS.items():
        column = table[name].to_numpy()
        columns[name] = column.view(dtype) if column.dtype.itemsize == 8 else column.astype(dtype)
    icount = columns["icount"]
    return Trace(
        name="linux-boot",
        description="Debian's Linux 6.1 boots on one vCPU with 128 MiB, runs a short job and powers off",
        source="QEMU 7.2 TCG, -icount shift=0, own plugin; no hypervisor involved",
        guest=GUEST,
        phases=tuple(
            Phase(name=name, first_row=int(np.searchsorted(icount, first)), icount=first) for name, first in PHASES
        ),
        **columns,
    )


def convert_exits(file: Path) -> dict[str, Any]:
    """Exits per reason and key, one count per phase."""
    theirs = json.loads(file.read_text())
    phases = theirs["phases"]
    tables = {}
    for ours in TABLES:
        name = TABLE_OF[ours]
        totals = theirs["total"].get(name, {})
        tables[ours] = {key: [phase.get(name, {}).get(key, 0) for phase in phases] for key in totals}
        for key, counts in tables[ours].items():
            assert sum(counts) == totals[key], (ours, key, counts, totals[key])
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": theirs["source"],
        "phases": [phase["name"] for phase in phases],
        "not_recorded": [reason.split()[0] for reason in theirs["excluded"]],
        "time_dependent_reasons": theirs["timing_dependent_reasons"],
        "time_dependent_accesses": theirs["timing_dependent_accesses"],
        "tables": tables,
    }


def main(recording: Path, target: Path) -> None:
    """Write linux-boot.npz and one JSON file per hypervisor configuration."""
    convert_trace(recording).save(target / "linux-boot.npz")
    for name in ("kvm_ept", "kvm_ept_4k", "kvm_shadow"):
        text = json.dumps(convert_exits(recording / f"{name}.json"), separators=(",", ":"))
        (target / f"linux-boot.{name}.json").write_text(text.replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
