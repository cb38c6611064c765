"""Write workloads/real/matrix.champsim.xz: a small synthetic trace in ChampSim's format.

    python -m scripts.write_champsim_trace [FILE]

A 96 x 96 matrix of doubles is multiplied with a vector, row by row, then its transpose, column by column, each with the
instructions that a compiler writes for the loop: address arithmetic, load, multiply-add, store of the sum, branch. The
places are those of a position-independent program on Linux: heap, stack and a library's data.
"""

from __future__ import annotations

import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parents[1] / "workloads" / "real" / "matrix.champsim.xz"
SIZE, WORD = 96, 8
MATRIX, VECTOR, SUMS = 0x5555_5575_6000, 0x5555_5579_9000, 0x7FFC_1234_5008
TEXT = 0x5555_5555_5140

Record = tuple[int, int, int, list[int], list[int]]  # ip, is it a branch, was it taken, loads, stores


def records() -> Iterator[Record]:
    """The instructions of both products, in order."""
    for base, by_column in ((TEXT, False), (TEXT + 0x80, True)):
        for outer in range(SIZE):
            yield base, 0, 0, [], []
            for inner in range(SIZE):
                row, column = (inner, outer) if by_column else (outer, inner)
                yield base + 4, 0, 0, [], []
                yield base + 8, 0, 0, [MATRIX + (row * SIZE + column) * WORD], []
                yield base + 13, 0, 0, [VECTOR + inner * WORD], []
                yield base + 18, 0, 0, [], []
                yield base + 22, 1, int(inner < SIZE - 1), [], []
            yield base + 24, 0, 0, [], [SUMS + outer * WORD]
            yield base + 28, 1, int(outer < SIZE - 1), [], []


def write(path: Path) -> None:
    """Write the trace, compressed; the same bytes each time."""
    words = [
        [ip, branch | taken << 8, *stores, *[0] * (2 - len(stores)), *loads, *[0] * (4 - len(loads))]
        for ip, branch, taken, loads, stores in records()
    ]
    path.write_bytes(lzma.compress(np.array(words, "<u8").tobytes(), preset=9))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
