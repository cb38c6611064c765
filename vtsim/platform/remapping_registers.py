"""The registers of a remapping unit as CPUs find them, and the time that it takes for what is written there.

Descriptors of the invalidation queue are executed one after the other, each when its time is over; one that waits for
what came before also waits until requests that were translated before have reached memory, where the invalidation asks
for that; of a PASID, each does.

A device-TLB invalidation goes to its device. Until it is answered the queue stands at the wait descriptor behind it; a
device that does not answer in time is given up, which stops the queue until software has cleared the error.

VT-d: "Queued Invalidation Interface"; "Invalidation Wait Descriptor"; "Queued Invalidation Error Handling".
Not modelled: time that registers other than the queue's tail take; which invalidation an answer is for (a
late one is taken for the next of its device).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Final

import simpy
from attrs import define, field

from vtsim.cpu.engine import Engine
from vtsim.iommu import spec as sp
from vtsim.iommu.descriptors import IOTLB_TYPE, WAIT
from vtsim.iommu.state import DEVICE_INVALIDATION
from vtsim.iommu.unit import Message, RemappingUnit
from vtsim.platform.dma_spec import REGISTERS

QUEUE_BYTES: Final = 4096
DRAIN: Final = 3 << 6  # DW and DR of an IOTLB invalidation


@define(eq=False)
class RemappingRegisters:
    """A unit's registers at `REGISTERS`. `landed` says when all that was translated so far has reached memory."""

    engine: Engine
    clock: simpy.Environment
    unit: RemappingUnit
    invalidate_cycles: int
    write_cycles: int
    landed: Callable[[], int]
    deliver: Callable[[Message], None] = lambda message: None  # to the device, or to the CPU, that it is for
    timeout_cycles: int = 0
    owed: list[tuple[int, int]] = field(factory=list, init=False)  # requester and deadline of each answer
    tail: int = field(default=0, init=False)
    rung: simpy.Event = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.rung = self.clock.event()
        self.clock.process(self.process())

    def answers(self, hpa: int) -> bool:
        """Is this one of its registers?"""
        return REGISTERS <= hpa < REGISTERS + sp.REGISTER_BYTES

    def read(self, hpa: int, size: int) -> int:
        """What a CPU reads."""
        return self.tail if hpa - REGISTERS == sp.IQT else self.unit.read_at(hpa - REGISTERS, size)

    def write(self, hpa: int, size: int, value: int) -> None:
        """What a CPU writes has its effect, the tail of the queue in time."""
        if hpa - REGISTERS != sp.IQT:
            self.unit.write_at(hpa - REGISTERS, size, value)
            self.send()
            if hpa - REGISTERS == sp.FSTS:
                self._wake()
            return
        self.tail = value
        self._wake()

    def send(self) -> None:
        """Hand on what the unit sends."""
        for message in self.unit.messages():
            if message.kind == DEVICE_INVALIDATION:
                self.owed.append((message.first, int(self.clock.now) + self.timeout_cycles))
            self.deliver(message)

    def answered(self, sid: int) -> None:
        """A device has answered; what it does not owe any more is an error that is told."""
        due = next((each for each in self.owed if each[0] == sid), None)
        if due is not None:
            self.owed.remove(due)
        self.unit.device_completed(sid)
        self._wake()

    def _wake(self) -> None:
        if not self.rung.triggered:
            self.rung.succeed()

    def _pause(self) -> Generator[simpy.Event, Any, None]:
        """Until something happens to the queue, or an answer is overdue."""
        self.rung = self.clock.event()
        if self.owed:
            due = min(deadline for _, deadline in self.owed)
            yield self.rung | self.clock.timeout(max(0, due - int(self.clock.now)))
        else:
            yield self.rung
        for sid in {sid for sid, deadline in self.owed if deadline <= self.clock.now}:
            self.owed = [each for each in self.owed if each[0] != sid]
            self.unit.device_timed_out(sid)

    def _stopped(self) -> bool:
        return bool(self.unit.read("FSTS") & (sp.IQE | sp.ITE))

    def process(self) -> Generator[simpy.Event, Any, None]:
        """The SimPy process: one descriptor after the other, until the tail or an error."""
        drained = 0
        while True:
            head = self.unit.read("IQH")
            if head == self.tail or self._stopped():
                yield from self._pause()
                continue
            queue = self.unit.read("IQA")
            low = self.engine.load((queue & ~0xFFF) + head)
            if low & 0xF == WAIT:
                until = max(int(self.clock.now) + self.write_cycles, drained)
                yield self.clock.timeout(until - int(self.clock.now))
            else:
                yield self.clock.timeout(self.invalidate_cycles)
                if low & 0xF != IOTLB_TYPE or low & DRAIN:
                    drained = max(drained, self.landed())
            self.unit.write_at(sp.IQT, 4, (head + (32 if queue & sp.IQA_WIDE else 16)) % QUEUE_BYTES)
            self.send()
            while self.owed and self.unit.read("IQH") == head and not self._stopped():
                yield from self._pause()
