"""Who gets which guest-physical frame: the kernel's own from 1 MiB up, in order; all others scattered or in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from vtsim.base.errors import ConfigError, ModelError
from vtsim.base.memory import HOLE_FIRST, HOLE_LAST, PAGE_BYTES
from vtsim.base.units import SIZE

Numbers = NDArray[np.int64]
FIRST: Final = 0x100  # below 1 MiB a real machine has firmware
SIZES: Final = (PAGE_BYTES, 2 << 20, 1 << 30)
SMALL: Final = 1 << 12
CHUNK: Final = 1 << 16
HOLE: Final = HOLE_LAST + 1 - HOLE_FIRST


@define
class Frames:
    """Guest-physical memory of a builder: first `reserve` what the kernel owns, then `take` pages of each size once.

    Frame numbers jump over the devices' hole.
    """

    size: int
    shuffled: bool
    seed: int
    sizes: tuple[int, ...] = SIZES
    _next: int = field(default=FIRST, init=False)
    _large: list[tuple[int, Numbers]] = field(factory=list, init=False)  # frames of a page, first frames
    _handed_out: bool = field(default=False, init=False)

    @property
    def count(self) -> int:
        """How many frames of RAM there are."""
        return self.size // PAGE_BYTES

    def reserve(self, count: int) -> int:
        """Return the first of consecutive frames for the kernel."""
        if self._handed_out:
            raise ModelError("the kernel wants frames that others may have been given already", {"frames": count})
        first = self._next
        if first < HOLE_FIRST < first + count:
            first = HOLE_LAST + 1
        self._next = first + count
        if self._next > self.end:
            raise self.short("the kernel and its tables")
        return first

    @property
    def end(self) -> int:
        """The frame number after the last."""
        return self.count if self.count <= HOLE_FIRST else self.count + HOLE

    def short(self, what: str) -> ConfigError:
        """Return the error that memory does not suffice."""
        return ConfigError(
            f"{SIZE.format(self.size)} of memory are too little for {what}",
            field="memory",
            help="give the VM more memory",
        )

    def take(self, count: int, size: int) -> Supply:
        """Set aside pages of size 0, 1 or 2 (`sizes`): each size once, the largest first."""
        self._handed_out = True
        step = self.sizes[size] // PAGE_BYTES
        first = -(-self._next // step)
        jump = max(first, (HOLE_LAST + 1) // step) if self.end > HOLE_FIRST else self.end // step
        low = max(0, min(HOLE_FIRST, self.end) // step - first)  # pages below the hole
        pages = low + max(0, self.end // step - jump)
        blocked = sum(len(taken) * frames // step for frames, taken in self._large)
        if pages - blocked < count:
            raise self.short(f"{count} pages of {SIZE.format(self.sizes[size])}")
        seed = np.random.SeedSequence([self.seed, size])
        numbers = scattered(pages, seed) if self.shuffled else in_order(pages)
        supply = Supply(self._free(numbers, first, low, jump, step, list(self._large)))
        if size:
            supply = Supply(iter([supply.draw(count)]))
            self._large.append((step, supply.look()))
        return supply

    def _free(
        self, numbers: Iterator[Numbers], first: int, low: int, jump: int, step: int, larger: list[tuple[int, Numbers]]
    ) -> Iterator[Numbers]:
        """Pages by number, as frames: beyond the hole where need be, without those that are part of larger pages."""
        lost = []
        for frames, taken in larger:
            lost.append(np.zeros(self.end // frames + 1, bool))
            lost[-1][taken // frames] = True
        for chunk in numbers:
            above = chunk >= low
            pages = np.where(above, chunk + (jump - low), chunk + first) * step
            for (frames, _), gone in zip(larger, lost, strict=True):
                pages = pages[~gone[pages // frames]]
            yield pages


@define
class Supply:
    """Frames handed out a chunk at a time: the whole of a large memory is never in one list."""

    _chunks: Iterator[Numbers]
    _rest: Numbers = field(factory=lambda: np.empty(0, np.int64), init=False)

    def draw(self, count: int) -> Numbers:
        """Return the next so many frames."""
        parts = [self._rest]
        have = len(self._rest)
        while have < count:
            parts.append(next(self._chunks))
            have += len(parts[-1])
        every = np.concatenate(parts) if len(parts) > 1 else self._rest
        self._rest = every[count:]
        return every[:count]

    def look(self) -> Numbers:
        """Return the next chunk without taking it."""
        if not len(self._rest):
            self._rest = next(self._chunks, self._rest)
        return self._rest


def in_order(of: int) -> Iterator[Numbers]:
    """The numbers of range(of), in chunks."""
    for start in range(0, of, CHUNK):
        yield np.arange(start, min(start + CHUNK, of), dtype=np.int64)


def scattered(of: int, seed: np.random.SeedSequence) -> Iterator[Numbers]:
    """A pseudo-random permutation of range(of), in chunks.

    The numbers stand in a square; every row is rotated and its columns permuted, then every column likewise. Each
    step is a bijection, and neighbours end up unrelated.
    """
    random = np.random.default_rng(seed)
    if of <= SMALL:
        yield random.permutation(of)
        return
    columns = int(of**0.5)
    rows = -(-of // columns)
    new_column, turn = random.permutation(columns), random.integers(columns, size=rows)
    new_row, shift = random.permutation(rows), random.integers(rows, size=columns)
    height = max(1, CHUNK // columns)
    for start in range(0, rows, height):
        column = new_column[None, :] + turn[start : start + height, None]
        column[column >= columns] -= columns
        row = shift[column] + new_row[start : start + height, None]
        row[row >= rows] -= rows
        numbers = (row * columns + column).reshape(-1)
        yield numbers[numbers < of]
