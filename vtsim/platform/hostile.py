"""A device that goes on writing to an address that was its own, to find out how long it can."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import simpy
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.base.jit import quiet
from vtsim.guest.kernel import dma_layout as d
from vtsim.iommu import dma as g
from vtsim.iommu import state as st
from vtsim.iommu.kernels.driven_engine import all_ended

if TYPE_CHECKING:
    from vtsim.platform.driven import DrivenDevice

LINE: Final = 64


@define(eq=False)
class Hostile:
    """Writes to an address after its buffer was done, again and again, until it is refused, as fast as its tags allow.

    `through` counts the writes that went through although the address was no buffer's any more and the table, if there
    is one, led elsewhere or nowhere; `window` is the longest time, in cycles, from the last write that was allowed to
    one of these.
    """

    device: DrivenDevice
    row: np.ndarray
    every: int  # cycles between two writes
    address: int = field(default=-1, init=False)
    allowed_at: int = field(default=0, init=False)
    writes: int = field(default=0, init=False)
    through: int = field(default=0, init=False)
    refused: int = field(default=0, init=False)
    window: int = field(default=0, init=False)
    slots: np.ndarray = field(
        factory=lambda: np.zeros(0, np.int64), init=False
    )  # where in the arena the driver's stand
    started: simpy.Event = field(init=False)

    def __attrs_post_init__(self) -> None:
        clock = self.device.platform.clock
        self.started = clock.event()
        clock.process(self.process())

    def begin(self, address: int) -> None:
        """A buffer at this address is done; keep it, unless another is being tried."""
        if self.address < 0:
            self.address, self.allowed_at = address, int(self.device.platform.clock.now)
            if not self.started.triggered:
                self.started.succeed()

    def process(self) -> Generator[simpy.Event, Any, None]:
        """The SimPy process."""
        platform = self.device.platform
        while True:
            if self.address < 0:
                self.started = platform.clock.event()
                yield self.started
            yield platform.clock.timeout(self.every)
            aborted = int(self.row[g.N_ABORTED])
            later = platform.operate(self.row, self.device.tlb, self.address, LINE, True)
            if later > 0:
                yield platform.until(later)  # no tag is free
                continue
            with quiet():
                all_ended(self.row)
            self.writes += 1
            u, now = platform.unit.u, int(platform.clock.now)
            if later < 0:
                yield platform.until(-later)
                if not (yield from self.device.ask([self.address], True)):
                    self.refused += 1
                    self.address = -1
            elif int(self.row[g.N_ABORTED]) > aborted:
                self.refused += 1
                self.address = -1
            elif self._given() or self._mapped(int(u[st.HPA])):
                self.allowed_at = now
            else:
                self.through += 1
                self.window = max(self.window, now - self.allowed_at)

    def _mapped(self, hpa: int) -> bool:
        """Does the driver let the address lead there, though no buffer has it yet?"""
        device = self.device
        if device.pages is not None and not device.allows(self.address):
            return False
        return bool(device.port.root) and device.leads_to(self.address) == hpa

    def _given(self) -> bool:
        """Does the driver think that the address is the device's, for this buffer or for another?"""
        arena = self.device.platform.engine.arena
        if not len(self.slots):
            places = (first + n * d.SLOT_BYTES for first, count in self.device.port.slots for n in range(count))
            addresses = [self.device.hpa(place) for place in places]
            self.slots = np.array([mem.contents(arena, hpa >> 12) + ((hpa & 0xFFF) >> 3) for hpa in addresses])
        return bool((arena[self.slots] == self.address).any())
