"""The recorded memory accesses of a real program: loads and stores at the recorded places, with its ordinary
instructions between them.

The stream reads a window of the trace in the arena. When it has read all of it, the engine stops, the window is
filled with what follows, and the stream goes on; nothing simulated depends on where that happens. Recorded addresses
keep all bits but those that choose the entry of the top-level table, so that they cannot meet the process's own text
and stack.

Not modelled: the recorded program's code addresses; which access needs the value of which; accesses that cross a page
touch the first one only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from vtsim.base.errors import ConfigError
from vtsim.base.jit import Arena
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.guest.primitives import TRACED, Stage, lowering, registers
from vtsim.guest.spec import MemoryTraceSpec
from vtsim.guest.traces.accesses import Extent, extent, words_of

WINDOW: Final = 1 << 15  # words


@define(eq=False)
class Feed:
    """Fills a stream's window from its trace file, of which it holds one block.

    All state is the window's own: after another state was restored, the file is read from its start to there.
    """

    phase: MemoryTraceSpec
    window: int = WINDOW
    _blocks: Iterator[NDArray[np.int64]] = field(factory=lambda: iter(()), init=False)
    _block: NDArray[np.int64] = field(factory=lambda: np.empty(0, np.int64), init=False)
    _next: int = field(default=-1, init=False)  # number of the word that `_block` begins with

    def __call__(self, a: Arena, at: int) -> None:
        """Put the words that follow the window at `at` into it."""
        first = int(a[at + ops.WINDOW_END])
        if self._next != first:
            self._start_again(first)
        filled = 0
        while filled < self.window:
            if not len(self._block):
                self._block = next(self._blocks, self._block)
                if not len(self._block):
                    break
            part = self._block[: self.window - filled]
            words = at + ops.WINDOW_WORDS + filled
            a[words : words + len(part)] = part
            self._block = self._block[len(part) :]
            filled += len(part)
        if not filled:
            raise ConfigError("the trace became shorter while it was replayed", file=self.phase.trace)
        a[at + ops.WINDOW_FIRST], a[at + ops.WINDOW_END] = first, first + filled
        self._next = first + filled

    def _start_again(self, first: int) -> None:
        self._blocks = words_of(self.phase.trace, self.phase.limit)
        skipped = 0
        for block in self._blocks:
            if skipped + len(block) > first:
                self._block = block[first - skipped :]
                return
            skipped += len(block)
        self._block = self._block[:0]


def trace_extent(phase: MemoryTraceSpec) -> Extent:
    """How long a phase's trace is, and what it touches."""
    return extent(phase.trace, phase.limit)


@lowering(
    MemoryTraceSpec,
    memory=TRACED,
    ranges=lambda phase: trace_extent(phase).ranges,
    table_words=lambda phase: ops.WINDOW_WORDS + WINDOW,
)
def memory_trace(a: Assembler, phase: MemoryTraceSpec, at: Stage) -> None:
    """Recorded accesses in one stream; the trace is not multiplied by `work_scale`."""
    window = at.place_table(np.zeros(ops.WINDOW_WORDS + WINDOW, np.int64), Feed(phase))
    registers(a, {s.RSI: at.base, s.RDX: 0, s.RDI: 0, s.R9: window, s.RCX: trace_extent(phase).words})
    a.emit(ops.STREAM, imm=ops.RECORDED, comment="recorded")
