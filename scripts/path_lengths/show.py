"""Print the call tree of the episodes of a test with a VM exit's reason: medians of instructions, inclusive and own."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

from scripts.path_lengths.trace import Symbols, Tree, episodes, tests_of


def main() -> None:
    run, wanted = Path(sys.argv[1]), int(sys.argv[2])
    reason = int(sys.argv[3]) if len(sys.argv) > 3 else None
    tree = Tree()
    chosen = list(episodes(tests_of(run / "trace.bin")[wanted], Symbols(run / "guest.out"), tree))
    print(Counter((e.reason, e.phase) for e in chosen))
    if reason is None:
        return
    chosen = [e for e in chosen if e.reason == reason]
    total = defaultdict(list)
    for e in chosen:
        sums: Counter[int] = Counter()
        for node, count in e.work.items():
            while node >= 0:
                sums[node] += count
                node = tree.parents[node]
        for node, s in sums.items():
            total[node].append(s)
    n = len(chosen)

    def show(node: int, depth: int) -> None:
        values = total[node]
        own = median(e.work[node] for e in chosen)
        calls = sum(e.calls[node] for e in chosen) / n
        vmx = sum(e.vmx[node] for e in chosen) / n
        print(f"{'  ' * depth}{tree.names[node]}  incl {median(values):.0f} own {own:.0f} calls {calls:.2f} vmx {vmx:.1f} in {len(values)}")
        for child in range(node + 1, len(tree.names)):
            if tree.parents[child] == node and len(total[child]) * 4 > n:
                show(child, depth + 1)

    show(0, 0)


main()
