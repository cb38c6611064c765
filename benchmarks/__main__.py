"""`python -m benchmarks [--json FILE] [--only NAME]… [--repeats N]`: prints rates with spread."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES


def main() -> int:
    """Run the cases and print median, minimum and maximum."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write {name: {unit, median, min, max}} there")
    parser.add_argument("--only", action="append", metavar="NAME", choices=[case.name for case in CASES])
    parser.add_argument("--repeats", type=int, metavar="N", help="repeat each case so often")
    options = parser.parse_args()
    table = Table("benchmark", "median", "min", "max", "unit", "also")
    found = {}
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        if case.repeats > 1:
            case.once()  # warm: caches, page tables of the host, kernels
        runs = [case.once() for _ in range(options.repeats or case.repeats)]
        headline = next(iter(runs[0]))
        values = [run[headline] for run in runs]
        spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        found[case.name] = {"unit": case.unit, **spread}
        others = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != headline}
        also = ", ".join(f"{name} {number(value)}" for name, value in others.items())
        figures = [number(each) for each in spread.values()]
        table.add_row(case.name, *figures, case.unit, also)
        print(f"{case.name}: {figures[0]} {case.unit}", file=sys.stderr)
    Console().print(table)
    if options.json:
        fresh = options.json.with_name(f".{options.json.name}.new")
        fresh.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(fresh, options.json)
    return 0


def number(value: float) -> str:
    """A figure in three digits and a metric prefix."""
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


if __name__ == "__main__":
    raise SystemExit(main())
