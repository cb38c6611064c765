"""Count the path lengths of lengths.toml in the traces of two runs, and print them beside the kvm personality's.

Usage: python -m scripts.path_lengths.count FOLDER, with the runs in FOLDER/ept and FOLDER/shadow (see README.md).
Without a folder: what the file says beside the parameters.
"""

from __future__ import annotations

import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from attrs import field, frozen

from scripts.path_lengths.trace import Episode, Symbols, Tree, episodes, tests_of
from vtsim.vmm.personalities.kvm.parameters import PARAMETERS

DATA: Final = Path(__file__).with_name("lengths.toml")
PHASES: Final = ("after exit", "in handler", "before entry", "system call")
INTERRUPTIONS: Final = ("interrupt", "exception")


@frozen(kw_only=True)
class Length:
    """How one length is counted; see lengths.toml."""

    test: str
    functions: Sequence[str]
    instructions: int
    run: str = "ept"
    reason: int | None = None
    apart: Sequence[str] = ()
    phases: Sequence[str] = PHASES
    per: str = ""  # a function: instructions for each call of it, not for each VM exit
    less: Mapping[str, int] = field(factory=dict)
    note: str = ""


def read_lengths() -> dict[str, Length]:
    """The lengths of lengths.toml by name."""
    found: dict[str, Any] = tomllib.loads(DATA.read_text())
    return {name: Length(**entry) for name, entry in found["length"].items()}


def test_numbers() -> dict[str, int]:
    """The tests of monitor.c, by name."""
    table = Path(__file__).with_name("monitor.c").read_text().split("TESTS[] = {")[1].split("};")[0]
    return {line.split('"')[1]: n for n, line in enumerate(one for one in table.splitlines() if '{"' in one)}


class Run:
    """The traces of one run, a test at a time."""

    def __init__(self, folder: Path) -> None:
        self._symbols, self._tests = Symbols(folder / "guest.out"), tests_of(folder / "trace.bin")
        self._read: dict[str, tuple[Tree, list[Episode]]] = {}

    def test(self, name: str) -> tuple[Tree, list[Episode]]:
        """The call paths and episodes of a test."""
        if name not in self._read:
            tree = Tree()
            words = self._tests[test_numbers()[name]]
            self._read[name] = tree, list(episodes(words, self._symbols, tree))
        return self._read[name]


def counted_nodes(tree: Tree, functions: Iterable[str], apart: Iterable[str]) -> set[int]:
    """The nodes below one of the functions with none of `apart`, and no interrupt, between."""
    wanted, unwanted = set(functions), set(apart)
    inside = [False] * len(tree.names)
    for node in range(1, len(tree.names)):
        name = tree.names[node]
        below = inside[tree.parents[node]] and name not in INTERRUPTIONS or name in wanted
        inside[node] = below and name not in unwanted
    return {node for node, one in enumerate(inside) if one}


def count(length: Length, run: Run) -> float | None:
    """Instructions for each VM exit, the median, or for each call of `per`, the mean; None where there are none."""
    tree, found = run.test(length.test)
    nodes = counted_nodes(tree, length.functions, length.apart)
    sums: defaultdict[int, int] = defaultdict(int)
    calls: defaultdict[int, int] = defaultdict(int)
    for episode in found:
        if length.reason not in (None, episode.reason) or PHASES[episode.phase] not in length.phases:
            continue
        work = sum(number for node, number in episode.work.items() if node in nodes)
        sums[episode.event] += work
        calls[episode.event] += sum(n for node, n in episode.calls.items() if tree.names[node] == length.per)
    values = [value for event, value in sums.items() if value and (not length.per or calls[event])]
    if not values:
        return None
    if length.per:
        return median(value / calls[event] for event, value in sums.items() if calls[event])
    return median(values)


def main() -> None:
    """Print the table; with a folder the counts of its traces too, and status 1 where one differs from the file."""
    lengths = read_lengths()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    runs = {name: Run(folder / name) for name in ("ept", "shadow")} if folder else {}
    print(f"{'length':20} {'file':>6} {'parameter':>9} {'trace':>6}  functions")
    differ = False
    for name, length in lengths.items():
        found = ""
        if runs:
            value = count(length, runs[length.run])
            if value is not None:
                value -= sum(times * lengths[other].instructions for other, times in length.less.items())
            found = "none" if value is None else f"{value:.0f}"
            differ |= found != str(length.instructions)
        parameter = PARAMETERS[name].value if name in PARAMETERS else ""
        print(f"{name:20} {length.instructions:6} {parameter:>9} {found:>6}  {', '.join(length.functions)}")
    sys.exit(differ)


if __name__ == "__main__":
    main()
