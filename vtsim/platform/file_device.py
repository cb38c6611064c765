"""The device that has the file which a guest's processes map: a disk, or a server on the host.

It takes requests from a queue in the guest's memory, in order, as long as there are any, and does not want its
doorbell meanwhile. A request is done when its time is over; the guest is interrupted after each. Natively doorbell and
interrupt are the device's own. Under a hypervisor the doorbell is an event, which wakes the server on another
processor, and the interrupt a message to the host, whose handler makes the vector pending for the vCPU, as for a
device that is assigned.

Not modelled: reads; errors; the server's use of processors and caches; fewer interrupts than requests.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.cpu.engine import Engine
from vtsim.guest.file_system import ENTRIES
from vtsim.guest.kernel import write_back as q
from vtsim.guest.machine_view import PhysicalMemory


@define(eq=False)
class FileDevice:
    """A device and what it has of the file: by page, content token and first word of what was written last."""

    engine: Engine
    clock: simpy.Environment
    memory: PhysicalMemory
    queue: int  # guest-physical address
    write_cycles: int
    servers: simpy.Resource
    interrupt: Callable[[], None]
    taken: int = field(default=0, init=False)
    contents: dict[int, tuple[int, int]] = field(factory=dict, init=False)
    writes: dict[int, int] = field(factory=dict, init=False)  # how often each page was written
    under_way: set[int] = field(factory=set, init=False)  # pages

    def ring(self) -> None:
        """Take what is posted; while there is something to do, the device does not want to be told of more."""
        posted = self._word(q.Q_POSTED)
        while self.taken < posted:
            entry = q.Q_ENTRIES + self.taken % ENTRIES * q.ENTRY_BYTES
            gpa, page = self._word(entry), self._word(entry + 8)
            if page in self.under_way:
                raise ModelError("a page is written twice at a time", {"page": page, "requests": self.taken})
            self.under_way.add(page)
            self.clock.process(self._serve(gpa, page))
            self.taken += 1
        self._store(q.Q_NOTIFY, int(self.taken == self._word(q.Q_DONE)))

    def _serve(self, gpa: int, page: int) -> Generator[simpy.Event, Any, None]:
        with self.servers.request() as turn:
            yield turn
            data = self.data(self.memory.frame(gpa >> mem.PAGE_SHIFT))
            yield self.clock.timeout(self.write_cycles)
        self.contents[page] = data
        self.under_way.remove(page)
        self.writes[page] = self.writes.get(page, 0) + 1
        self._store(q.Q_DONE, self._word(q.Q_DONE) + 1)
        self.ring()
        self.interrupt()

    def data(self, frame: int) -> tuple[int, int]:
        """The content token and the first word of a host frame."""
        arena = self.engine.arena
        token = int(arena[int(arena[mem.A_FRAMES]) + frame]) >> mem.FRAME_TOKEN
        return token, self.engine.load(frame << mem.PAGE_SHIFT)

    def _at(self, word: int) -> int:
        return self.memory.frame(self.queue >> mem.PAGE_SHIFT) << mem.PAGE_SHIFT | word

    def _word(self, word: int) -> int:
        return self.engine.load(self._at(word))

    def _store(self, word: int, value: int) -> None:
        self.engine.store(self._at(word), value)
