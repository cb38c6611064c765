"""Dirty logging of a VM with several vCPUs: no page that is written is lost, and a collection has all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attrs import define

from tests.vmm.shootdown import Threads
from vtsim.base import memory as mem
from vtsim.config import parse_scenario
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.ept_walk import LOG_ENTRIES
from vtsim.platform.machine import Machine
from vtsim.vmcs.fields import SLOT
from vtsim.vmm.programs import dirty_log, locked_fault, several

SLOW = pytest.mark.compiled_only
LEAST_ROUNDS = 4
STACK_WORDS = 32  # of a CPU that handles an interrupt, in which the address that it returns to stands
SCENARIO = """
machine: {cpus: %(cpus)d, memory: 256 MiB}
vmm:
  personality: minimal
  ept: {populate: prebuilt}
  dirty_log: {method: %(method)s, period: 10 us}
vms:
  - memory: 16 MiB
    vcpus: %(cpus)d
    guest:
      kernel: {tick: off, populate: prebuilt}
      processes:
        - threads: %(cpus)d
          phases:
            - {primitive: stream, region: 128 KiB, accesses: 3000, write: 0.5, work: 60}
        - {name: last, vcpu: 1, phases: [{primitive: stream, region: 64 KiB, accesses: 12000, write: 0.2, work: 60}]}
"""


@define
class Logged(Threads):
    """Between two looks, what was stored to (by content tokens) is held against bitmap and logs.

    `at_first` are the tokens right after a collection, `written` how many pages have other ones since, `found` how many
    pages collections had found by then.
    """

    rounds: int = -1
    found: int = 0
    written: int = 0
    at_first: Any = None

    def look(self) -> None:
        hypervisor = self.machine.hypervisor
        assert hypervisor is not None
        first = hypervisor.vcpus[0]
        if hypervisor.word(first, "TABLES_TICKET") != hypervisor.word(first, "TABLES_SERVING"):
            return
        if not hypervisor.word(first, "LOGGING") or self.interrupted():
            return
        arena, frames = self.machine.engine.arena, first.memory.frames
        assert frames is not None
        tokens = arena[int(arena[mem.A_FRAMES]) + frames] >> mem.FRAME_TOKEN
        rounds, found = (hypervisor.word(first, name) for name in ("DIRTY_ROUNDS", "DIRTY_PAGES"))
        if rounds != self.rounds:
            if self.rounds >= 0:
                assert found - self.found >= self.written, "a collection has not all that was written before it"
            self.rounds, self.found, self.at_first, self.written = rounds, found, tokens, 0
        else:
            written = set(np.flatnonzero(tokens != self.at_first).tolist()) - self.noting()
            assert written <= self.marked(), "a page was written, and nobody knows"
            self.written = len(written)
            self.looked += self.written

    def between(self, address: int) -> bool:
        """Has a CPU at this address of the hypervisor made a page writable without the lock, and not marked it yet?"""
        hypervisor = self.machine.hypervisor
        assert hypervisor is not None
        labels = hypervisor.program.labels
        first, end = (mem.signed(labels.get(name, 0)) for name in ("fast_exchanged", "fast_noted"))
        return first <= address < end

    def noting(self) -> set[int]:
        """Guest frames that are about to be marked."""
        return {int(m[s.GPR + s.R13]) >> 12 for m in self.machine.engine.cpus if self.between(int(m[s.RIP]))}

    def interrupted(self) -> bool:
        """Does a CPU handle an interrupt that came there? Where its registers are by now is not looked for."""
        hypervisor = self.machine.hypervisor
        assert hypervisor is not None
        engine, load = self.machine.engine, hypervisor.host.load
        stacks = [int(m[s.GPR + s.RSP]) & (1 << 64) - 1 for m in engine.cpus if not m[s.NONROOT]]
        end = hypervisor.host.direct + engine.geometry.memory_bytes - 8 * STACK_WORDS
        ours = [at for at in stacks if hypervisor.host.direct <= at < end]
        return any(self.between(load(at + 8 * n)) for at in ours for n in range(STACK_WORDS))

    def marked(self) -> set[int]:
        """Guest frames in the bitmap, or in the log of a vCPU."""
        hypervisor = self.machine.hypervisor
        assert hypervisor is not None
        first, load = hypervisor.vcpus[0], hypervisor.host.load
        bitmap = hypervisor.word(first, "DIRTY_BITMAP") & (1 << 64) - 1
        words = [load(bitmap + 8 * n) for n in range(hypervisor.word(first, "DIRTY_WORDS"))]
        pages = {64 * n + bit for n, word in enumerate(words) if word for bit in range(64) if word >> bit & 1}
        for vcpu in hypervisor.vcpus if "pml" in self.text else ():
            fields = self.machine.engine.contents(vcpu.vmcs, mem.VMCS_REGION)
            index = (int(fields[SLOT["PML_INDEX"]]) + 1) & 0xFFFF
            page = hypervisor.word(vcpu, "PML_PAGE") & (1 << 64) - 1
            pages |= {load(page + 8 * n) >> 12 for n in range(index, LOG_ENTRIES)}
        return pages


def logged(method: str, cpus: int, *settings: str) -> Logged:
    return Logged(SCENARIO % {"cpus": cpus, "method": method}, settings)


@pytest.mark.slow
@pytest.mark.parametrize("personality", ["minimal", pytest.param("kvm", marks=SLOW)])
@pytest.mark.parametrize("cpus", [2, pytest.param(4, marks=SLOW)])
@pytest.mark.parametrize("method", ["pml", pytest.param("write-protect", marks=SLOW)])
def test_what_any_vcpu_writes_is_marked_and_collected(method: str, cpus: int, personality: str) -> None:
    ran = logged(method, cpus, f"vmm.personality={personality}").run(longest=5_000)

    assert ran.rounds >= LEAST_ROUNDS
    assert ran.looked > 1000
    assert ran.machine.hypervisor is not None
    first = ran.machine.hypervisor.vcpus[0]
    counts, rounds = ran.machine.hypervisor.memory_statistics(first), ran.machine.hypervisor.word(first, "DIRTY_ROUNDS")
    assert counts["remote_flushes"] >= LEAST_ROUNDS
    assert counts["flushes_for_log"] in (rounds, rounds + 1)  # one when logging began; the last may not be over
    assert counts["remote_flushes"] <= (cpus - 1) * (counts["flushes_for_log"] + counts.get("flushes_for_faults", 0))


@SLOW
@pytest.mark.parametrize("lockless", [0, 1])
def test_each_page_that_logging_protects_is_fixed_once_with_the_lock_and_without(lockless: int) -> None:
    cpus, kvm = 4, ("vmm.personality=kvm", "vmm.dirty_log.period=40 us")  # shorter, and all is protected again at once
    ran = logged("write-protect", cpus, *kvm, f"vmm.parameters.lockless_faults={lockless}").run()

    assert ran.rounds >= LEAST_ROUNDS
    hypervisor = ran.machine.hypervisor
    assert hypervisor is not None
    first = hypervisor.vcpus[0]
    counts = hypervisor.memory_statistics(first)
    fixed = sum(hypervisor.word(vcpu, "FAST_FAULTS") for vcpu in hypervisor.vcpus)
    assert (fixed >= counts["dirty_pages"]) == bool(lockless)
    inside = hypervisor.word(first, "TABLES_TICKET") - hypervisor.word(first, "TABLES_SERVING")
    assert 0 <= inside < cpus  # others may be there when the first one ends
    if lockless:
        assert hypervisor.word(first, "TABLES_TICKET") <= ran.rounds + LEAST_ROUNDS
        return
    assert fixed == 0
    frames = hypervisor.path.addresses["frames"]
    counted = [
        hypervisor.host.load(frames + locked_fault.DESCRIPTOR_BYTES * first.memory.frame(gfn) + locked_fault.D_COUNT)
        for gfn in range(first.memory.size >> 12)
    ]
    assert min(counted) == 0
    assert sum(counted) < cpus


@SLOW
@pytest.mark.long  # pytest -m long tests/vmm/test_vcpus_dirty_log.py
@pytest.mark.parametrize("seed", range(2, 12))
def test_so_it_is_wherever_the_looks_fall(seed: int) -> None:
    for method in ("pml", "write-protect"):
        for cpus in (2, 4):
            settings = (f"seed={seed}", f"vmm.personality={('kvm', 'minimal')[seed % 2]}")
            assert logged(method, cpus, *settings).run(longest=2_000, seed=seed).looked > 1000


@pytest.mark.parametrize("method", ["pml", pytest.param("write-protect", marks=SLOW)])
def test_a_collection_that_lets_others_keep_their_translations_is_found_out(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "flush_as_asked", lambda a, path: None)

    with pytest.raises(AssertionError, match=r"^a page was written, and nobody knows"):
        logged(method, 2).run(longest=5_000)


def test_a_collection_that_leaves_others_in_their_guest_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_log, "empty_others", lambda a, path: None)

    with pytest.raises(AssertionError, match=r"^a collection has not all"):
        logged("pml", 2).run(longest=5_000)


HELD_UP = """
machine: {memory: 64 MiB, cpus: 2}
vmm:
  personality: minimal
  dirty_log: {method: write-protect, start: 50 us, period: 5 us, stop: 200 us}
vms:
  - memory: 16 MiB
    vcpus: 2
    guest:
      kernel: {kpti: true}
      processes:
        - phases: [{primitive: protection_fault, iterations: 5}, {primitive: mov_to_cr8, iterations: 3}]
        - {name: pair, threads: 2, phases: [{primitive: rdtsc, iterations: 2}, {primitive: protection_fault, iterations: 1}]}
run: {limit: 300 ms}
"""


@pytest.mark.parametrize("seed", [0, 4, 9])
def test_a_guest_whose_stores_to_its_tables_are_refused_again_and_again_loses_no_frame(seed: int) -> None:
    """A frame that was taken for a table waits for the store of its entry, however often that is refused."""
    outcome = Machine(parse_scenario(HELD_UP, [f"seed={seed}"])).run()

    assert [vm.stopped for vm in outcome.vms] == [None]
