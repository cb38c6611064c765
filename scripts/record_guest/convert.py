"""Turn what the instrumentation of Bochs wrote into trace.parquet and kvm_*.json, for scripts.import_recording.

    python -m scripts.record_guest.convert RECORDING ROWS/rows.bin ept=RUN/exits.bin shadow=RUN/exits.bin ...

Needs pyarrow, which vtsim does not.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.import_recording import DECOMPRESSOR, KERNEL, first_within
from vtsim.guest.traces.kinds import NUMBER
from vtsim.vmcs.reasons import BY_NUMBER

ROW = np.dtype(
    [(name, "u8") for name in ("icount", "cr3", "rip", "a0", "a1", "a2")]
    + [("n", "u4")]
    + [(name, "u1") for name in ("kind", "cpl", "implicit", "unused")]
)
EXIT = np.dtype(
    [(name, "u8") for name in ("ticks", "icount", "rip", "info", "gpa", "rax", "rcx", "rdx")]
    + [(name, "u4") for name in ("reason", "interruption", "error", "kind")]
)
COLUMNS = ("icount", "kind", "cpl", "cr3", "rip", "a0", "a1", "a2", "n")
STRING, REP, MARKS = 1 << 20, 1 << 21, 0xF4
PAGE_FAULT, RESERVED = 14, 8
TIMED = ["EXTERNAL_INTERRUPT", "INTERRUPT_WINDOW", "HLT", "PAUSE_INSTRUCTION"]
ACCESSES = [
    "in:0x42",
    "in:0x61",
    "out:0x80",
    "in:0x608",
    "read:0xfed000f0",
    "write:0xfed00148",
    "write:0xfee000b0",
    "write:0xfee00380",
]
ALIGNED = 2 << 20  # where a kernel may stand at random, another place in another run (Linux: CONFIG_PHYSICAL_ALIGN)
REGISTERS = {0: "to:cr", 1: "from:cr"}


def rows_of(file: Path, implicit: bool) -> NDArray[Any]:
    """The recorded rows: one per iteration of a string instruction, with or without accesses that deliver events."""
    rows = np.fromfile(file, ROW)
    if not implicit:
        rows = rows[rows["implicit"] == 0]
    again = rows["kind"] == NUMBER["MMIO_R"]  # it exited twice before it was emulated
    for name, step in (("kind", 0), ("rip", 0), ("a0", 0), ("icount", 1)):
        again[1:] &= rows[name][1:] == rows[name][:-1] + rows[name].dtype.type(step)
    again[:1] = False
    rows = rows[~again]
    ports = np.isin(rows["kind"], (NUMBER["IN"], NUMBER["OUT"])) & (rows["a0"] & STRING != 0)
    rows = rows[~(ports & (rows["n"] == 0))]
    ports = np.isin(rows["kind"], (NUMBER["IN"], NUMBER["OUT"])) & (rows["a0"] & STRING != 0)
    times = np.where(ports, rows["n"], 1)
    rows = np.repeat(rows, times)
    again = np.repeat(ports, times)
    rows["icount"] += np.where(again, np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times), 0).astype("u8")
    rows["n"][again] = 1
    return rows


def phases(exits: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Exits by phase: cut where the guest first runs above 1 MiB, at 16 MiB, and behind each mark."""
    rip, info = exits["rip"], exits["info"]
    io = exits["reason"] == 30
    starts = [("bios", 0)]
    for name, of in (("decompressor", DECOMPRESSOR), ("kernel", KERNEL)):
        starts.append((name, first_within(rip, of, starts[-1][1]) or 0))
    marks = np.nonzero(io & (info >> 16 & 0xFFFF == MARKS))[0] + 1
    starts += [(f"mark{n}", int(at)) for n, at in enumerate(marks, 1)]
    for (name, first), (_, end) in zip(starts, [*starts[1:], ("", len(exits))], strict=True):
        yield name, exits[first:end]


def devices(rows: NDArray[Any]) -> dict[tuple[int, int], int]:
    """Which device each instruction accesses, by its address in ALIGNED bytes and the offset in a page."""
    accesses = rows[np.isin(rows["kind"], (NUMBER["MMIO_R"], NUMBER["MMIO_W"]))]
    return {
        (rip % ALIGNED, gpa & 0xFFF): gpa
        for rip, gpa in zip(accesses["rip"].tolist(), accesses["a0"].tolist(), strict=True)
    }


def tables(exits: NDArray[Any], accessed: dict[tuple[int, int], int]) -> dict[str, dict[str, int]]:
    """Exits of a phase by reason and by what they were for."""
    of: dict[str, Counter[str]] = {}

    def add(table: str, keys: list[str]) -> None:
        if keys:
            of.setdefault(table, Counter()).update(keys)

    exits = exits[exits["reason"] != 1]
    add("exits", [BY_NUMBER[int(reason)].name for reason in exits["reason"]])
    for one in exits:
        reason, info = int(one["reason"]), int(one["info"])
        if reason == 10:
            add("cpuid", [hex(int(one["rax"]) & 0xFFFFFFFF)])
        elif reason == 30:
            add("io", [f"{'in' if info & 8 else 'out'}:{info >> 16 & 0xFFFF:#x}"])
        elif reason in (31, 32):
            add("msr", [f"{'read' if reason == 31 else 'write'}:{int(one['rcx']) & 0xFFFFFFFF:#x}"])
        elif reason == 28:
            add("cr_access", [f"{REGISTERS.get(info >> 4 & 3, 'other:cr')}{info & 15}"])
        elif reason == 0:
            vector, error = int(one["interruption"]) & 0xFF, int(one["error"])
            coded = int(one["interruption"]) & 1 << 11
            add("exception", [f"vec{vector}:err{error:#x}" if coded else f"vec{vector}"])
            known = accessed.get((int(one["rip"]) % ALIGNED, info & 0xFFF), 0)
            gpa = int(one["gpa"]) if error & RESERVED else known
            if vector == PAGE_FAULT and gpa:
                add("mmio", [f"{'write' if error & 2 else 'read'}:{gpa:#x}"])
        elif reason == 48:
            add("ept_qualification", [hex(info & 0x1FF)])
        if reason in (48, 49) and 0xC0000000 <= int(one["gpa"]) < 0xFFFC0000:
            add("mmio", [f"{'write' if one['kind'] == NUMBER['MMIO_W'] else 'read'}:{int(one['gpa']):#x}"])
    return {table: dict(counts.most_common()) for table, counts in of.items()}


def main() -> None:
    """Write trace.parquet, and one kvm_NAME.json for each NAME=exits.bin."""
    import pyarrow
    import pyarrow.parquet

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("exits", nargs="*", help="NAME=FILE")
    parser.add_argument("--source", default="kvm_intel of Linux 6.1 on Bochs 3.0")
    parser.add_argument("--implicit", action="store_true", help="with accesses that deliver interrupts and exceptions")
    asked = parser.parse_args()
    asked.recording.mkdir(parents=True, exist_ok=True)
    rows = rows_of(asked.rows, asked.implicit)
    accessed = devices(rows)
    table = pyarrow.table({name: rows[name] for name in COLUMNS})
    pyarrow.parquet.write_table(table, asked.recording / "trace.parquet", compression="zstd")
    for one in asked.exits:
        name, _, file = one.partition("=")
        exits = np.fromfile(file, EXIT)
        parts = [{"name": phase, **tables(part, accessed)} for phase, part in phases(exits)]
        whole = {
            "source": f"{asked.source}, {name}",
            "excluded": ["EXTERNAL_INTERRUPT"],
            "timing_dependent_reasons": TIMED,
            "timing_dependent_accesses": ACCESSES,
            "total": tables(exits, accessed),
            "phases": parts,
        }
        (asked.recording / f"kvm_{name}.json").write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
