"""Count the path lengths of lengths.toml in the traces of four runs, and print them beside the kvm personality's.

Usage: python -m scripts.path_lengths.count [FOLDER [4.19]], with the runs in FOLDER/ept, shadow, qemu and host (4.19:
prefix, not qemu) as README.md says. Without a folder: what the file says beside the parameters.
"""

from __future__ import annotations

import math
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, Final, Protocol

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from scripts.path_lengths.trace import IN_INTERRUPT, Episode, Symbols, Tree, episodes, words_of_tests
from vtsim.vmm.personalities.kvm.parameters import TABLES

DATA: Final = Path(__file__).with_name("lengths.toml")
DEFAULT: Final = "6.1"
PHASES: Final = ("after exit", "in handler", "before entry", "system call", "interrupt")
FIRST_OF_QEMU, FIRST_OF_HOST = 100, 200  # QEMU and HOST in monitor.c
INTERRUPTIONS: Final = ("interrupt", "exception")


@frozen(kw_only=True)
class Length:
    """How one length is counted; see lengths.toml."""

    instructions: int
    test: str = ""
    functions: Sequence[str] = ()
    run: str = "ept"
    reason: int | None = None
    apart: Sequence[str] = ()
    phases: Sequence[str] = PHASES[:-1]
    having: Sequence[str] = ()
    without: Sequence[str] = ()
    per: str = ""
    less: Mapping[str, int] = field(factory=dict)
    over: int = 1
    ops: int = 0
    mean_of: Sequence[str] = ()
    by_hand: bool = False
    note: str = ""


def read_lengths(kind: str, release: str = DEFAULT) -> dict[str, Length]:
    """What lengths.toml has under [length.X] or [count.X], by X; of another Linux, with what its file says over it.

    What that one has from this one is left out: see `taken`.
    """
    found: dict[str, Any] = tomllib.loads(DATA.read_text())[kind]
    if release != DEFAULT:
        other = _of_release(release)
        found = {name: entry | other[kind][name] for name, entry in found.items() if name not in other["taken"]}
    return {name: Length(**entry) for name, entry in found.items()}


def taken(release: str) -> dict[str, str]:
    """The lengths of lengths.toml that are not counted in another Linux, and why not."""
    found: dict[str, str] = _of_release(release)["taken"]
    return found


def _of_release(release: str) -> dict[str, Any]:
    return tomllib.loads(DATA.with_name(f"{DATA.stem}_{release}.toml").read_text())


def numbers_of_tests() -> dict[str, int]:
    """The tests of monitor.c, by name: its loops, and what it gives to QEMU."""
    source = Path(__file__).with_name("monitor.c").read_text()
    found: dict[str, int] = {}
    for table, first in (("TESTS[] = {", 0), ("ROMS[] = {", FIRST_OF_QEMU), ("HOSTS[] = {", FIRST_OF_HOST)):
        lines = source.split(table)[1].split("};")[0].splitlines()
        found |= {line.split('"')[1]: first + n for n, line in enumerate(one for one in lines if '{"' in one)}
    return found


class Tests(Protocol):
    """What a run has of each test."""

    def test(self, name: str) -> tuple[Tree, list[Episode]]: ...


class Run:
    """The traces of one run, a test at a time."""

    def __init__(self, folder: Path, places: NDArray[np.uint64] | None = None) -> None:
        self._places = places
        self._symbols, self._tests = Symbols(folder / "guest.out"), words_of_tests(folder / "trace.bin")
        self._read: dict[str, tuple[Tree, list[Episode]]] = {}

    def test(self, name: str) -> tuple[Tree, list[Episode]]:
        """The call paths and episodes of a test."""
        if name not in self._read:
            tree = Tree()
            words = self._tests.get(numbers_of_tests()[name], np.empty(0, np.uint64))
            self._read[name] = tree, list(episodes(words, self._symbols, tree, self._places))
        return self._read[name]


def counted_nodes(tree: Tree, functions: Iterable[str], apart: Iterable[str]) -> set[int]:
    """The nodes below one of the functions with none of `apart`, and no interrupt, between."""
    wanted, unwanted = set(functions), set(apart)
    inside, outside = [False] * len(tree.names), [False] * len(tree.names)
    for node in range(1, len(tree.names)):
        name, parent = tree.names[node], tree.parents[node]
        outside[node] = outside[parent] or name in unwanted
        below = inside[parent] and name not in INTERRUPTIONS
        inside[node] = not outside[node] and (below or name in wanted)
    return {node for node, one in enumerate(inside) if one}


def count(length: Length, run: Tests, *, indirect: bool = False) -> float | None:
    """Instructions for each VM exit or interrupt, or for each call of `per` in it: the median; None without any.

    With `indirect`, indirect branches in place of instructions.
    """
    tree, found = run.test(length.test)
    nodes = counted_nodes(tree, length.functions, length.apart)
    groups: defaultdict[int, list[Episode]] = defaultdict(list)  # of an event; or each interrupt by itself
    for n, episode in enumerate(found):
        if length.reason in (None, episode.reason) and PHASES[episode.phase] in length.phases:
            groups[-n if episode.phase == IN_INTERRUPT else episode.event].append(episode)
    values = []
    for group in groups.values():
        calls: Counter[str] = Counter()
        for episode in group:
            for node, times in episode.calls.items():
                calls[tree.names[node]] += times
        work = sum(times for episode in group for node, times in episode.work.items() if node in nodes)
        times = calls[length.per] if length.per else 1
        if work and times and all(map(calls.__getitem__, length.having)) and not any(map(calls.get, length.without)):
            if indirect:
                work = sum(times for episode in group for node, times in episode.indirect.items() if node in nodes)
            values.append(work / times)
    if not values:
        return None
    return median(values)


def in_trace(name: str, lengths: Mapping[str, Length], runs: Mapping[str, Tests], *, indirect: bool = False) -> float:
    """What the traces give for a length, or its indirect branches: not a number where the event is not in them."""
    length = lengths[name]
    if length.by_hand:
        return math.nan if indirect else length.instructions
    if length.mean_of:
        return mean(in_trace(one, lengths, runs, indirect=indirect) for one in length.mean_of)
    found = count(length, runs[length.run], indirect=indirect) if length.run in runs else None
    if found is None:
        return math.nan
    found -= sum(times * in_trace(other, lengths, runs, indirect=indirect) for other, times in length.less.items())
    return found / length.over - (0 if indirect else length.ops)


def main() -> None:
    """Print the table; with a folder the counts of its traces too, and status 1 where one differs from the file."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    release = sys.argv[2] if len(sys.argv) > 2 else DEFAULT
    lengths = read_lengths("count", release) | read_lengths("length", release)
    parameters = TABLES[f"linux-{release}"]
    used = {one.run for one in lengths.values()}
    runs: dict[str, Tests] = {name: Run(folder / name) for name in used} if folder else {}
    print(f"{'length':24} {'file':>6} {'parameter':>9} {'traces':>7}  functions")
    differ = False
    for name, length in lengths.items():
        found = f"{in_trace(name, lengths, runs):.0f}" if runs else ""
        differ |= bool(runs) and found != str(length.instructions)
        parameter = parameters[name].value if name in parameters else ""
        functions = ", ".join(length.functions or length.mean_of)
        print(f"{name:24} {length.instructions:6} {parameter:>9} {found:>7}  {functions}")
    sys.exit(differ)


if __name__ == "__main__":
    main()
