"""Print the call tree of the VM exits of a test with a reason: medians of instructions, calls for each VM exit.

Usage: python -m scripts.path_lengths.show FOLDER TEST REASON [ROOT], with the run's trace in FOLDER.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

from scripts.path_lengths.count import Run


def main() -> None:
    """Print the tree."""
    folder, test, reason = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    root = sys.argv[4] if len(sys.argv) > 4 else "entry_SYSCALL_64"
    tree, found = Run(folder).test(test)
    print(Counter(one.reason for one in found))
    sums: defaultdict[int, Counter[int]] = defaultdict(Counter)
    calls: Counter[int] = Counter()
    for episode in found:
        if episode.reason != reason:
            continue
        calls.update(episode.calls)
        for node, work in episode.work.items():
            while node > 0:
                sums[episode.event][node] += work
                node = tree.parents[node]
    children: defaultdict[int, list[int]] = defaultdict(list)
    for node in range(1, len(tree.names)):
        children[tree.parents[node]].append(node)

    def show(node: int, depth: int) -> None:
        values = [one[node] for one in sums.values() if one[node]]
        if values:
            print(f"{'  ' * depth}{tree.names[node]} {median(values):.0f} calls {calls[node] / len(sums):.2f}")
            for child in children[node]:
                show(child, depth + 1)

    for node in range(1, len(tree.names)):
        if tree.names[node] == root and root not in tree.path(tree.parents[node]):
            show(node, 0)


if __name__ == "__main__":
    main()
