"""Count the instructions of the guest kernel's paths in the traces that guest_run.sh has made.

    python -m scripts.path_lengths.guest_count TRACES            how long each path of guest_paths.toml is
    python -m scripts.path_lengths.guest_count TRACES --kernel VERSION  the same into guest_counts.toml
    python -m scripts.path_lengths.guest_count TRACES --loop 30  what one loop runs, function by function
    python -m scripts.path_lengths.guest_count TRACES --of 4.19  with what guest_paths_4.19.toml says otherwise

The trace is walked with a stack of calls. guest_paths.toml says for each loop to which path a function belongs, with
all that it calls but for what another line of the table names; so an instruction belongs to one path. A path's length
is the mean of the loop's rounds, without interrupts; less the instructions that the model's operations stand for.
"""

from __future__ import annotations

import argparse
import tomllib
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
from attrs import Factory, define, evolve, frozen
from numpy.typing import NDArray

TABLE: Final = Path(__file__).with_name("guest_paths.toml")
BEGIN, END, ROUND, USER = 1, 2, 3, 4  # kinds of marks
SECOND: Final = 1000
MARK: Final = 1 << 31
NUMBER: Final = (1 << 28) - 1  # of a block; the bits above it say the CPU
SWITCH: Final = ("__switch_to", "__switch_to_asm")
CALL, RET, IRET, SYSRET, OTHER = range(5)
Table = dict[str, Any]
LOST: Final = "(another task)"


@frozen
class Block:
    """A translation block: a straight run of instructions."""

    function: str
    starts: bool  # is it the beginning of the function?
    address: int
    ends: tuple[int, ...]  # of its instructions, from its address on
    kind: int  # of its last instruction
    target: int  # of a direct branch, or -1


@define(eq=False)
class Call:
    """A function called in a context."""

    function: str
    parent: Call | None
    path: str
    instructions: int = 0
    calls: int = 0
    called: bool = False  # has it called something by now?
    callees: dict[str, Call] = Factory(dict)


@define
class Loop:
    """What a loop ran."""

    root: Call
    rounds: list[Counter[str]]  # instructions of each path
    calls: list[Counter[str]]  # of each function

    def of(self, path: str, per: str | float = 1) -> float:
        """Instructions of a path for each event: so many of them in a round, or calls of a function."""
        events = sum(calls[per] for calls in self.calls) if isinstance(per, str) else per * len(self.rounds)
        return sum(instructions[path] for instructions in self.rounds) / events if events else 0.0


def read_symbols(path: Path) -> tuple[list[int], list[str]]:
    """Addresses and names of functions, sorted; a part that was moved out of a function is called like it."""
    found: dict[int, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        address, kind, name = line.split()[:3]
        if kind in "tTwW":
            name = name.removesuffix(".cold")
            known = found.get(int(address, 16))
            if known is None or (known.startswith("_") and not name.startswith("_")):
                found[int(address, 16)] = name
    addresses = sorted(found)
    return addresses, [found[address] for address in addresses]


def kind_of(last: bytes) -> int:
    """How an instruction ends a block."""
    body = last.lstrip(b"\x66\xf2\xf3\x2e\x3e\x65") or b"\x90"
    if body[:1] == b"\xe8":
        return CALL
    if body[0] & 0xF0 == 0x40 and len(body) > 1:
        if body[1] == 0xCF:
            return IRET
        if body[1:3] == b"\x0f\x07":
            return SYSRET
        body = body[1:]
    if len(body) > 1 and body[0] == 0xFF and body[1] >> 3 & 7 == 2:
        return CALL
    return {0xC3: RET, 0xC2: RET, 0xCB: RET, 0xCF: IRET}.get(body[0], OTHER)


def target_of(last: bytes, end: int) -> int:
    """Where a direct branch leads that ends at an address, or -1."""
    body = last.lstrip(b"\x66\xf2\xf3\x2e\x3e") or b"\x90"
    if body[0] in (0xE8, 0xE9):
        return end + int.from_bytes(body[1:5], "little", signed=True)
    if body[0] == 0xEB or body[0] & 0xF0 == 0x70 or 0xE0 <= body[0] <= 0xE3:
        return end + int.from_bytes(body[1:2], "little", signed=True)
    if len(body) > 1 and body[0] == 0x0F and body[1] & 0xF0 == 0x80:
        return end + int.from_bytes(body[2:6], "little", signed=True)
    return -1


def read_blocks(path: Path, symbols: tuple[list[int], list[str]]) -> list[Block]:
    """The blocks, by number."""
    addresses, names = symbols
    blocks = []
    for line in path.read_text().splitlines():
        first, lengths, last_bytes = line.split()
        address, last = int(first, 16), bytes.fromhex(last_bytes)
        at = max(bisect_right(addresses, address) - 1, 0)
        ends = tuple(int(end) for end in np.cumsum([int(length, 16) for length in lengths]))
        target = target_of(last, address + ends[-1])
        blocks.append(Block(names[at], addresses[at] == address, address, ends, kind_of(last), target))
    return blocks


def _instructions(block: Block, then: Block | None) -> int:
    """How many a block ran: not all if the next one begins within it, for QEMU begins again at a device."""
    if then is None or then.address == block.target:
        return len(block.ends)
    inside = then.address - block.address
    if 0 <= inside < block.ends[-1] and (inside == 0 or inside in block.ends):
        return bisect_right(block.ends, inside)
    return len(block.ends)


class Walk:
    """A trace walked with a stack of calls."""

    def __init__(self, table: Table, number: int) -> None:
        self.paths, self.alone, self.after = functions_of(table, number), table["alone"], table.get("after", {})
        entries = table["entries"]
        self.interrupts = tuple(entries["interrupts"])
        self.entries = (*self.interrupts, *entries["others"])
        self.loop = Loop(Call("", None, ""), [], [])
        self.here = self.loop.root

    def enter(self, parent: Call, function: str) -> Call:
        """Call a function."""
        call = parent.callees.get(function)
        if call is None:
            path = self.paths.get(function)
            if path is None and function.startswith(self.interrupts):
                path = "(interrupt)"
            call = Call(function, parent, path or parent.path or "")
            parent.callees[function] = call
        call.calls += 1
        call.called, parent.called = False, True
        if self.loop.calls:
            self.loop.calls[-1][function] += 1
        return call

    def leave(self, from_: Call | None, function: str) -> Call:
        """Return to the nearest caller of a name, or to what another task had called."""
        call = from_
        while call is not None:
            if call.function == function:
                return call
            call = call.parent
        return self.enter(self.enter(self.loop.root, LOST), function)

    def step(self, last: Block | None, block: Block) -> None:
        """From one block to the next."""
        here, function = self.here, block.function
        if block.starts and function.startswith(self.entries):
            left = last is not None and last.kind in (IRET, SYSRET)  # to a program that faults at once
            self.here = self.enter(self.loop.root if left else here, function)
        elif last is None or last.kind == SYSRET:
            self.here = self.enter(self.loop.root, function)
        elif last.kind == RET:
            if last.function in SWITCH and here.function == last.function:
                self.here = self.enter(self.enter(self.loop.root, LOST), function)
            elif here.parent is not None:
                self.here = self.leave(here.parent, function)
        elif last.kind == IRET:
            while here.parent is not None and not here.function.startswith(self.entries):
                here = here.parent
            self.here = self.leave(here.parent, function)
        elif last.kind == CALL and block.starts:
            self.here = self.enter(here, function)
        elif function != here.function:
            stays = here.parent is None or here.function.startswith(self.entries)
            self.here = self.enter(here if stays or here.parent is None else here.parent, function)

    def run(self, words: NDArray[np.uint32], blocks: list[Block]) -> Loop:
        """Walk the words of one loop."""
        last: Block | None = None
        numbers = words.tolist()
        for index, word in enumerate(numbers):
            if word & MARK:  # a user program runs: what was before it has ended
                if word >> 24 & 15 == ROUND:
                    self.loop.rounds.append(Counter())
                    self.loop.calls.append(Counter())
                self.here, last = self.loop.root, None
                continue
            block = blocks[word & NUMBER]
            self.step(last, block)
            following = numbers[index + 1] if index + 1 < len(numbers) else MARK
            then = None if following & MARK else blocks[following & NUMBER]
            n = _instructions(block, then)
            self.here.instructions += n
            if self.loop.rounds:
                own = self.after if self.here.called and self.here.function in self.after else self.alone
                path = own.get(self.here.function) or self.here.path
                self.loop.rounds[-1][path or f"({self.here.function})"] += n
            last = block if n == len(block.ends) else evolve(block, kind=OTHER)
        return self.loop


def of_cpu(words: NDArray[np.uint32], cpu: int) -> NDArray[np.uint32]:
    """The blocks that one CPU ran, with the marks of rounds."""
    is_mark = words & np.uint32(MARK) != 0
    is_user = is_mark & (words >> np.uint32(24) & np.uint32(15) == USER)
    ours = np.where(is_user, words & np.uint32(15), words >> np.uint32(28)) == cpu
    kept: NDArray[np.uint32] = words[ours | (is_mark & ~is_user)]
    return kept


def split(words: NDArray[np.uint32]) -> dict[int, NDArray[np.uint32]]:
    """The words of each loop; what a second CPU ran meanwhile is loop SECOND and its number."""
    marks = np.flatnonzero(words & np.uint32(MARK))
    loops: dict[int, NDArray[np.uint32]] = {}
    begin = 0
    for at in marks:
        word = int(words[at])
        if word >> 24 & 15 == BEGIN:
            begin = int(at) + 1
        elif word >> 24 & 15 == END:
            number = word & 0xFFFF
            loops[number] = of_cpu(words[begin : int(at)], 0)
            if len(second := of_cpu(words[begin : int(at)], 1)) > len(loops[number]) // 1000 + 2 * len(marks):
                loops[SECOND + number] = second
    return loops


def tree(call: Call, rounds: int, depth: int = 0, least: float = 1.0) -> None:
    """Print what a function ran, with all that it called, itself, and how often, for each round."""

    def total(call: Call) -> int:
        return call.instructions + sum(total(callee) for callee in call.callees.values())

    if depth:
        print(
            f"{total(call) / rounds:9.1f} {call.instructions / rounds:8.1f} {call.calls / rounds:7.2f} "
            f"{'  ' * depth}{call.function}  [{call.path}]"
        )
    for callee in sorted(call.callees.values(), key=total, reverse=True):
        if total(callee) / rounds >= least:
            tree(callee, rounds, depth + 1, least)


def traces(folder: Path) -> dict[int, tuple[NDArray[np.uint32], list[Block]]]:
    """The words and blocks of every loop of all runs."""
    loops: dict[int, tuple[NDArray[np.uint32], list[Block]]] = {}
    for trace in sorted(folder.glob("*.trace")):
        blocks = read_blocks(trace.with_suffix(".blocks"), read_symbols(trace.with_suffix(".symbols")))
        for number, words in split(np.fromfile(trace, np.uint32)).items():
            loops[number] = words, blocks
    return loops


def read_paths(release: str = "") -> Table:
    """The table of Linux 6.1, with what that of another release says otherwise."""

    def over(table: Table, other: Table) -> Table:
        return table | {
            key: over(table[key], value) if isinstance(value, dict) and key in table else value
            for key, value in other.items()
        }

    table = tomllib.loads(TABLE.read_text())
    return over(table, tomllib.loads(of_release(TABLE, release).read_text())) if release else table


def of_release(path: Path, release: str) -> Path:
    """The file of another release beside one of Linux 6.1."""
    return path.with_stem(f"{path.stem}_{release}") if release else path


def functions_of(table: Table, number: int) -> dict[str, str]:
    """To which path a function belongs in a loop; one that is not in the table has what the last before it has."""
    own = max((int(known) for known in table["loops"] if int(known) <= number), default=0)
    named: dict[str, str] = table["functions"] | table["loops"].get(str(own), {}).get("functions", {})
    return named


def run(table: Table, number: int, words: NDArray[np.uint32], blocks: list[Block]) -> Loop:
    """What a loop ran, as the table says."""
    return Walk(table, number).run(words, blocks)


def value(row: dict[str, Any], loops: dict[int, Loop]) -> float:
    """A length: the sum of its terms, less what the model's operations stand for."""
    whole = sum(term[0] * loops[term[1]].of(*term[2:]) for term in row["terms"])
    return float(whole - row.get("less", 0))


def main() -> None:
    """Print the lengths, or one loop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--loop", type=int)
    parser.add_argument("--least", type=float, default=1.0)
    parser.add_argument("--of", default="", help="the release of the traced kernel, if not 6.1: 4.19")
    parser.add_argument("--kernel", help="a version: write guest_counts.toml, and say so there")
    options = parser.parse_args()
    table = read_paths(options.of)
    loops = traces(options.traces)
    wanted = [options.loop] if options.loop else sorted(loops)
    found = {number: run(table, number, *loops[number]) for number in wanted}
    if options.loop is not None:
        loop = found[options.loop]
        tree(loop.root, len(loop.rounds), least=options.least)
        for path in sorted({path for counts in loop.rounds for path in counts}):
            print(f"{loop.of(path):9.1f}  {path}")
        return
    counts = [f"{name} = {round(value(row, found))}" for name, row in table["lengths"].items() if row["terms"]]
    if options.kernel:
        counts = ["# Written by guest_count.py: instructions of each path that guest_paths.toml names.",
                  f'kernel = "{options.kernel}"', "", "[counts]", *counts]  # fmt: skip
        of_release(TABLE.with_name("guest_counts.toml"), options.of).write_text("\n".join(counts) + "\n")
    print("\n".join(counts))


if __name__ == "__main__":
    main()
