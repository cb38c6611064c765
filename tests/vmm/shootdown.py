"""Threads of one process on several CPUs, run in short slices, and their TLBs held against the page tables."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from vtsim.base import memory as mem
from vtsim.base.jit import quiet
from vtsim.config import parse_scenario
from vtsim.cpu import slots as s
from vtsim.cpu.codes import PROGRAM_END, TRIPLE_FAULTED
from vtsim.cpu.kernels.contexts import CONTEXT_MASK, CONTEXT_SHIFT, GLOBAL_KEY, TAG_SHIFT
from vtsim.ept import spec as e
from vtsim.ept.tables import PAGING, Table
from vtsim.guest.kernel import layout as at
from vtsim.platform.machine import Machine, alone
from vtsim.vmm.memory import VmMemory

USER_PAGES = 1 << 35
PCID_SHIFT = 16  # in a context's key
USER_PCID = 0x800  # of the half for user mode under KPTI
USER_WRITES = 0b1000  # of a TLB's data word: stores from ring 3
TLBS = (s.DTLB4K, s.STLB)
LOCK = ("TICKET", "SERVING")


@define
class Threads:
    """A machine whose first VM has several vCPUs; `looked` counts the translations that were held against tables."""

    text: str
    settings: tuple[str, ...] = ()
    machine: Machine = field(init=False)
    looked: int = 0
    direct: bool = False  # do the guest's tables hold the numbers of host frames?

    def __attrs_post_init__(self) -> None:
        scenario = parse_scenario(self.text, list(self.settings))
        native = scenario.vmm.technique == "native"
        self.direct = scenario.vmm.paging == "direct-pv"
        with quiet():
            self.machine = Machine(alone(scenario, scenario.vms[0]) if native else scenario)

    # --- what the guest's kernel has in memory
    def word(self, address: int) -> int:
        """A word at an address of the kernel's direct map, or of its per-CPU data."""
        kernel = Table(root=self._kernel_root() >> 12, format=PAGING, take=lambda: 0, words=self._table)
        leaf = kernel.find(address)
        assert leaf is not None
        within = address & ((4096 << 9 * leaf.size) - 1)
        return self.load((leaf.frame << 12) + within)

    def cpu_word(self, cpu: int, word: int) -> int:
        """A word of a vCPU's data."""
        return self.word(at.CPU_DATA + cpu * at.ENTRY_PAGES * at.PAGE + word)

    def tables(self, process: int = 0) -> Table:
        """The tables of a process."""
        root = self.machine.vms[0].spaces[process].cr3 >> 12 & (1 << 40) - 1
        return Table(root=root, format=PAGING, take=lambda: 0, words=self._table)

    def _kernel_root(self) -> int:
        return self.machine.vms[0].spaces[0].cr3 & e.ADDRESS

    def _table(self, gfn: int) -> NDArray[np.int64]:
        memory = self.machine.vms[0].memory
        assert memory is not None
        if self.direct:
            return self.machine.engine.contents(gfn, mem.TABLE)
        if isinstance(memory, VmMemory) and memory.backing.find(memory.base + gfn * at.PAGE) is None:
            return np.zeros(mem.PAGE_WORDS, np.int64)  # nobody has used it yet
        return memory.contents(gfn, mem.TABLE)

    def frame(self, gfn: int) -> int:
        """The host frame of a frame as entries name it."""
        memory = self.machine.vms[0].memory
        assert memory is not None
        return gfn if self.direct else memory.frame(gfn)

    def load(self, gpa: int) -> int:
        """A word at an address whose frame is numbered as entries do."""
        return self.machine.engine.load(self.frame(gpa >> 12) << 12 | gpa & 0xFFF)

    # --- running
    def run(self, longest: int = 6_000, seed: int = 1) -> Threads:
        """To the end, with a look at all TLBs after slices of random length."""
        chance, until = random.Random(seed), 0
        engine = self.machine.engine
        while True:
            until += chance.randrange(1, longest)
            assert until < 1 << 32
            code, _ = engine.run_all(until, self.machine.quantum)
            assert code != TRIPLE_FAULTED
            if code == PROGRAM_END:
                engine.check_clock()
                return self
            self.look()

    def look(self) -> None:
        """While nobody unmaps, no CPU that runs the process holds a translation that its tables do not have.

        Nor one that EPT does not have, while nobody changes that. The half that KPTI keeps for user mode is flushed on
        the way there.
        """
        hypervisor, monitor = self.machine.hypervisor, self.machine.monitor
        if hypervisor is not None:
            first = hypervisor.vcpus[0]
            if hypervisor.word(first, "TABLES_TICKET") != hypervisor.word(first, "TABLES_SERVING"):
                return
        if monitor is not None and len({monitor.word(monitor.vcpus[0], f"TABLES_{n}") for n in LOCK}) > 1:
            return
        space = self.machine.vms[0].spaces[0]
        running = {}
        for cpu in range(len(self.machine.engine.cpus)):
            if not self.machine.engine.cpus[cpu][s.PRIVILEGE] & 1:
                continue  # a kernel that switches to the process has not dropped yet what it will
            if hypervisor is not None and not hypervisor.in_guest(cpu):
                continue
            if monitor is not None and monitor.word(monitor.current(cpu), "KERNEL"):
                continue
            task = self.cpu_word(cpu, at.LOADED_TASK)
            if task and not self.cpu_word(cpu, at.LAZY) and (self.word(task + at.T_CR3) ^ space.cr3) & e.ADDRESS == 0:
                running[cpu] = task
        words = {self.word(task + at.T_SPACE) for task in running.values()}
        if any(self.word(at_space + at.M_TICKET) != self.word(at_space + at.M_SERVING) for at_space in words):
            return
        tables = self.tables()
        for cpu in running:
            for gva, frame, writes in self._held(cpu, space.cr3 & 0xFFF):
                leaf = tables.find(gva)
                assert leaf is not None, f"CPU {cpu} has a translation of {gva:#x}, which is not mapped"
                assert self.frame(leaf.frame) == frame, f"CPU {cpu} has an old translation of {gva:#x}"
                assert leaf.entry & e.PTE_WRITE or not writes, f"CPU {cpu} may write {gva:#x}, which is read-only"
                self.looked += 1

    def _held(self, cpu: int, pcid: int) -> Iterator[tuple[int, int, bool]]:
        """(linear address, host frame, may it be stored to?) of 4 KiB translations of user memory in a CPU's TLBs."""
        record, arena = self.machine.engine.cpus[cpu], self.machine.engine.arena
        halves = (pcid, pcid | USER_PCID) if record[s.PRIVILEGE] & 1 else (pcid,)
        others = 0 if self.machine.monitor is not None else GLOBAL_KEY  # in ring 3 entries of processes are global
        for structure in TLBS:
            first, data = int(record[structure]), int(record[structure + s.DATA])
            size = (int(record[structure + s.MASK]) + 1) * int(record[structure + s.WAYS])
            tags, held = arena[first : first + size], arena[data : data + size]
            known = np.flatnonzero((tags >= 0) & (tags & 3 == 0) & (tags >> TAG_SHIFT < USER_PAGES))
            for tag, word in zip(tags[known].tolist(), held[known].tolist(), strict=True):
                key = int(arena[int(record[s.CONTEXTS]) + ((tag & CONTEXT_MASK) >> CONTEXT_SHIFT)])
                if key >= 0 and not key & others and (key >> PCID_SHIFT & 0xFFF) in halves:
                    yield tag >> TAG_SHIFT << 12, (word & e.ADDRESS) >> 12, bool(word & USER_WRITES)


def threads(text: str, *settings: str) -> Threads:
    """A machine that runs a scenario's threads."""
    return Threads(text, settings)
