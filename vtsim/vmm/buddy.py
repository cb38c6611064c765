"""The buddy allocator of a host, laid into its memory: a zone for each node, a record for each frame.

While a hypervisor is built, its builders take frames here; what they leave becomes the lists of free blocks that the
hypervisor's programs take from and give to, by hooks that load and store the same words, under the zone's lock.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.base.memory import BLOCK
from vtsim.cpu.kernels.buddy import FREE, HEADS, LARGEST_ORDER, ORDER, RECORD_WORDS, Z_FREE, Z_RECORDS
from vtsim.vmm import layout as at
from vtsim.vmm.host import Host, Words

ZONE_BYTES: Final = 256
ZONE_TICKET, ZONE_SERVING = 128, 136  # byte offsets of its lock, behind the words that the hooks know


def record_frames(frame_count: int) -> int:
    """Frames of the host that the records of so many frames take."""
    return -(-(-(-frame_count // BLOCK) * BLOCK * RECORD_WORDS) // mem.PAGE_WORDS)


def reserve_zones(host: Host) -> dict[str, int]:
    """Memory for the zones and records; their linear addresses, and the first frame of a second node or 0."""
    geometry = host.engine.geometry
    return {
        "records": at.frame_address(host.reserve(record_frames(geometry.frame_count))),
        "zones": at.frame_address(host.reserve()),
        "second_node": geometry.node_frames(1)[0] if geometry.nodes > 1 else 0,
    }


@define(eq=False)
class Zone:
    """The free frames of one node: intact 2 MiB blocks, and frames of blocks that something sits in.

    `fragmentation` is the share of the blocks of which one frame, anywhere in it, belongs to somebody who will not
    give it back. Small pages come from broken blocks while there are any, as a buddy allocator gives the best fit.
    """

    node: int
    address: int  # linear
    first: int
    free: np.ndarray  # of every frame from `first` on
    random: np.random.Generator | None
    blocks: list[int] = field(factory=list)  # intact ones, the next to be taken last
    small: Words = field(factory=lambda: np.empty(0, np.int64))
    taken: int = 0  # of `small`

    @classmethod
    def of(
        cls, node: int, address: int, first: int, end: int, *, fragmentation: float, limit: int | None, seed: int,
        shuffled: bool,
    ) -> Zone:  # fmt: skip
        """The frames from `first` to `end`, at most `limit` of them."""
        start = first // BLOCK * BLOCK
        frames = np.arange(start, -(-end // BLOCK) * BLOCK)
        free = (frames >= first) & (frames < end) & ((frames < mem.HOLE_FIRST) | (frames > mem.HOLE_LAST))
        if limit is not None and limit < int(free.sum()):
            free &= np.cumsum(free) <= limit
        random = np.random.default_rng([seed, node])
        whole = np.flatnonzero(free.reshape(-1, BLOCK).all(axis=1))
        broken = random.permutation(whole)[: round(fragmentation * len(whole))]
        free[broken * BLOCK + random.integers(BLOCK, size=len(broken))] = False
        intact = np.setdiff1d(whole, broken)
        if shuffled:
            intact = random.permutation(intact)
        zone = cls(node, address, start, free, random if shuffled else None)
        zone.blocks = (start + intact * BLOCK)[::-1].tolist()
        rest = free.copy()
        rest.reshape(-1, BLOCK)[intact] = False
        zone._more(np.flatnonzero(rest) + start)
        return zone

    def block(self) -> int | None:
        """Take an intact block: its first frame; None where there is none."""
        if not self.blocks:
            return None
        first = self.blocks.pop()
        self.free[first - self.first : first - self.first + BLOCK] = False
        return first

    def frames(self, count: int) -> Words:
        """Take so many frames, or as many as there are."""
        parts = []
        while count:
            part = self.small[self.taken : self.taken + count]
            self.taken += len(part)
            parts.append(part)
            count -= len(part)
            if count:
                if not self.blocks:
                    break
                first = self.blocks.pop()
                self._more(np.arange(first, first + BLOCK))
        taken = np.concatenate(parts) if parts else np.empty(0, np.int64)
        self.free[taken - self.first] = False
        return taken

    def _more(self, frames: Words) -> None:
        self.small = self.random.permutation(frames) if self.random is not None else frames
        self.taken = 0

    def hand_over(self, host: Host, records: int) -> None:
        """From now on only programs take frames: write the lists. `records` is the linear address of the records."""
        left = self.free
        table = np.zeros((len(left), RECORD_WORDS), np.int64)
        words = np.zeros(HEADS + LARGEST_ORDER + 1, np.int64)
        words[Z_FREE], words[Z_RECORDS] = int(left.sum()), mem.signed(records)
        for order in range(LARGEST_ORDER, -1, -1):
            whole = left.reshape(-1, 1 << order).all(axis=1)
            heads = np.flatnonzero(whole) << order
            left = left & ~np.repeat(whole, 1 << order)
            if self.random is not None:
                heads = self.random.permutation(heads)
            if not len(heads):
                continue
            numbers = heads + self.first + 1
            words[HEADS + order] = numbers[0]
            table[heads[:-1], 0] = numbers[1:]
            table[heads, 1] = FREE | order << ORDER
            table[heads[1:], 1] |= numbers[:-1]
        host.store_many((records - at.HOST_DIRECT) // mem.PAGE_BYTES + self.first * RECORD_WORDS // mem.PAGE_WORDS,
                        table.ravel())  # fmt: skip
        for n, value in enumerate(words):
            host.store(self.address + 8 * n, int(value))


@define(eq=False)
class Buddy:
    """The zones of a host, and where the records of its frames stand (linear addresses)."""

    host: Host
    records: int
    zones: tuple[Zone, ...]

    @classmethod
    def of(
        cls, host: Host, addresses: dict[str, int], *, fragmentation: float, limit: int | None, seed: int,
        shuffled: bool, others: dict[int, int],
    ) -> Buddy:  # fmt: skip
        """Take what is left of the host's memory. `others` says where the free frames of nodes begin, but the first."""
        geometry = host.engine.geometry
        share = None if limit is None else limit // geometry.nodes
        zones = []
        for node in range(geometry.nodes):
            first, end = geometry.node_frames(node)
            first = max(others.get(node, first), host.next_frame)
            zones.append(
                Zone.of(
                    node, addresses["zones"] + node * ZONE_BYTES, first, min(end, geometry.frame_count),
                    fragmentation=fragmentation, limit=share, seed=seed, shuffled=shuffled,
                )
            )  # fmt: skip
        return cls(host, addresses["records"], tuple(zones))

    def hand_over(self) -> None:
        """From now on only programs take frames."""
        for zone in self.zones:
            zone.hand_over(self.host, self.records)


def used_up() -> ConfigError:
    """What a user hears whose host has no frame left for a builder."""
    return ConfigError(
        "there is not enough memory to back what guests need before they start",
        field="machine.memory",
        help="raise machine.memory, or choose vmm.ept.populate 'demand'",
    )
