"""`python -m benchmarks.turns TREE... [--only NAME]... [--rounds N]`: rates of this checkout as shares of other ones'.

One process for each checkout runs the same benchmark. They are stopped and continued in turn every 40 ms, so that each
has its share of whatever else the machine does, and rates are of processor time: shares come out within some percent
where those of whole runs differ by tens. TREE is another checkout, such as `git worktree add TREE COMMIT` makes.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

SLICE = 0.04  # seconds: long beside what a switch costs the host's caches, short beside its disturbances
THIS = Path(__file__).resolve().parents[1]
TOO_SHORT = ("table_construction",)  # beside a slice


def measure(tree: str, name: str) -> None:
    """In a process of its own: say that all is ready, wait for a line, and print a rate, per second of this process."""
    time.perf_counter = time.process_time
    sys.path[0] = tree
    from benchmarks.cases import CASES

    once = next(case.once for case in CASES if case.name == name)
    once()  # warm: kernels, page tables of the host
    print("ready", flush=True)
    sys.stdin.readline()
    print(next(iter(once().values())), flush=True)


@contextmanager
def stopped(command: Sequence[str], tree: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in a checkout that is ready and stopped; it is ended if it has not ended by itself."""
    process = subprocess.Popen(
        command,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline().strip() != "ready":
            raise SystemExit(f"turns: the benchmark did not start in {tree}")
        process.send_signal(signal.SIGSTOP)
        process.stdin.write("go\n")
        process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.communicate()


def in_turn(processes: Sequence[subprocess.Popen[str]]) -> list[float]:
    """Let stopped processes run in turn until all have ended; what each printed."""
    running = list(processes)
    while running:
        for process in list(running):
            process.send_signal(signal.SIGCONT)
            time.sleep(SLICE)
            if process.poll() is None:
                process.send_signal(signal.SIGSTOP)
            else:
                running.remove(process)
    return [float(process.communicate()[0]) for process in processes]


def at_least_one(text: str) -> int:
    """A number of rounds."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 is wanted")
    return number


def main() -> int:
    """Print medians and ranges of shares."""
    from benchmarks.cases import CASES  # here: a worker's are those of its tree

    names = [case.name for case in CASES if case.unit.endswith("/s") and case.name not in TOO_SHORT]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns", description=__doc__.splitlines()[0])
    parser.add_argument(
        "trees", nargs="+", type=Path, metavar="TREE", help="other checkouts; shares are of the first one's"
    )
    parser.add_argument("--only", action="append", metavar="NAME", choices=names, help="only this benchmark of rates")
    parser.add_argument("--rounds", type=at_least_one, default=3, metavar="N", help="how often each is run (3)")
    options = parser.parse_args()
    trees = [tree.resolve() for tree in options.trees] + [THIS]
    for tree in trees:
        if not (tree / "benchmarks" / "cases.py").is_file():
            parser.error(f"{tree} is no checkout with benchmarks; git worktree add {tree} COMMIT makes one")
    for name in options.only or names:
        rates: list[list[float]] = []
        for number in range(options.rounds):
            order = [(number + n) % len(trees) for n in range(len(trees))]
            worker = [sys.executable, str(Path(__file__).resolve()), "--measure"]
            with ExitStack() as ready:
                found = in_turn([ready.enter_context(stopped([*worker, str(trees[n]), name], trees[n])) for n in order])
            rates.append([rate for _, rate in sorted(zip(order, found, strict=True))])
        for n, tree in enumerate(trees):
            shares = [of_round[n] / of_round[0] for of_round in rates]
            rate = statistics.median(of_round[n] for of_round in rates)
            spread = f"{statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"
            print(f"{name:20} {tree.name:20} {spread}  {rate:.4g} a second", flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        raise SystemExit(main())
