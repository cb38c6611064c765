"""The disk that a host swaps to: commands from queues in memory, data by DMA, an interrupt for each that is done.

Each CPU has a queue of commands and one of completions, and a doorbell: storing how many commands it has ever queued
there starts them. A command takes its latency; so many are served at a time, in order.

Not modelled: bandwidth; the traffic of DMA in caches; errors.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Final

import simpy
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.base.jit import quiet
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels.apic import request
from vtsim.vmm import layout as at
from vtsim.vmm.hypervisor import Hypervisor
from vtsim.vmm.swap_disk import PLACE_WORDS, places

DOORBELLS: Final = at.DISK_FRAME * mem.PAGE_BYTES


@define(eq=False)
class Disk:
    """A disk whose contents stand in the arena from `first` on: for each page its frame word, its words, its code."""

    engine: Engine
    clock: simpy.Environment
    first: int
    read_cycles: int
    write_cycles: int
    servers: simpy.Resource
    queues: dict[int, int]  # CPU: host-physical address of its queues
    places: list[int]  # the first of each VM
    taken: dict[int, int] = field(factory=dict)  # commands taken, by CPU

    @classmethod
    def of(cls, hypervisor: Hypervisor, clock: simpy.Environment, first: int, sizes: Sequence[int]) -> Disk:
        """The disk that a hypervisor swaps to, for VMs with so many bytes of memory."""
        swap, cycles = hypervisor.path.vmm.swap, hypervisor.path.profile.cycles
        servers = simpy.Resource(clock, swap.at_once)
        return cls(
            hypervisor.engine, clock, first, cycles(swap.read), cycles(swap.write), servers, hypervisor.disk_queues,
            places(sizes),
        )  # fmt: skip

    def answers(self, hpa: int) -> bool:
        """Is this one of its registers?"""
        return DOORBELLS <= hpa < DOORBELLS + 8 * len(self.queues)

    def ring(self, hpa: int, queued: int) -> None:
        """A doorbell was rung: take the commands up to `queued`."""
        cpu = (hpa - DOORBELLS) // 8
        for number in range(self.taken.get(cpu, 0), queued):
            entry = self.queues[cpu] + number % at.DISK_ENTRIES * at.DISK_ENTRY_BYTES
            command = [self.engine.load(entry + 8 * n) for n in range(4)]
            if command[0] == at.DISK_WRITE:
                self._keep(frame=command[1], place=command[2])
            self.clock.process(self._serve(cpu, command))
        self.taken[cpu] = queued

    def _serve(self, cpu: int, command: list[int]) -> Generator[simpy.Event, Any, None]:
        with self.servers.request() as turn:
            yield turn
            yield self.clock.timeout(self.write_cycles if command[0] == at.DISK_WRITE else self.read_cycles)
        if command[0] == at.DISK_READ:
            self._bring(frame=command[1], place=command[2])
        done = self.queues[cpu] + mem.PAGE_BYTES
        tail = self.engine.load(done + at.DISK_DONE_TAIL)
        entry = done + tail % at.DISK_ENTRIES * at.DISK_ENTRY_BYTES
        for n, word in enumerate(command):
            self.engine.store(entry + 8 * n, word)
        self.engine.store(done + at.DISK_DONE_TAIL, tail + 1)
        with quiet():
            request(self.engine.cpus[cpu], self.engine.arena, at.DISK_VECTOR)

    # --- data -------------------------------------------------------------------------------------------------
    def _keep(self, frame: int, place: int) -> None:
        """The contents of a frame as they are when the command is taken: nothing maps the frame any more."""
        a, to = self.engine.arena, self.first + PLACE_WORDS * place
        word = int(a[int(a[mem.A_FRAMES]) + frame])
        if word & mem.SLOT_MASK:
            if not a[to + 1]:
                a[to + 1] = self._page()
            self._words(int(a[to + 1]))[:] = self._words(word & mem.SLOT_MASK)
        a[to], a[to + 2] = word, a[int(a[mem.A_CODE_OF]) + frame]

    def _bring(self, frame: int, place: int) -> None:
        """A frame gets what was written to the disk."""
        a, source = self.engine.arena, self.first + PLACE_WORDS * place
        at_word = int(a[mem.A_FRAMES]) + frame
        word, mine = int(a[source]), int(a[at_word]) & mem.SLOT_MASK
        if word & mem.SLOT_MASK:
            mine = mine or self._page()
            self._words(mine)[:] = self._words(int(a[source + 1]))
        elif mine:
            self._words(mine)[:] = 0
        a[at_word] = word & ~mem.SLOT_MASK | mine
        a[int(a[mem.A_CODE_OF]) + frame] = a[source + 2]

    def _page(self) -> int:
        a = self.engine.arena
        page = int(a[mem.A_POOL_NEXT])
        if page >= int(a[mem.A_POOL_LIMIT]):
            raise ModelError("the pool of frame contents is used up", self.engine.counters())
        a[mem.A_POOL_NEXT] = page + 1
        return page

    def _words(self, page: int) -> Any:
        first = int(self.engine.arena[mem.A_POOL]) + page * mem.PAGE_WORDS
        return self.engine.arena[first : first + mem.PAGE_WORDS]

    def word(self, vm: int, gpa: int) -> int:
        """The word of a VM's memory as the disk has it."""
        a, source = self.engine.arena, self.first + PLACE_WORDS * (self.places[vm] + (gpa >> 12))
        return int(self._words(int(a[source + 1]))[gpa % mem.PAGE_BYTES // 8]) if int(a[source]) & mem.SLOT_MASK else 0
