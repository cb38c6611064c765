"""What `machine.frames` says: whether pages that are touched one after the other lie side by side in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest

from vtsim.base import memory as mem
from vtsim.config import parse_scenario
from vtsim.ept.tables import PAGING, Table
from vtsim.platform.machine import Machine

PAGES = 40
SCENARIO = f"""
machine: {{memory: 256 MiB}}
vmm: {{huge_pages: never}}
vms:
  - memory: 64 MiB
    guest:
      kernel: {{tick: off}}
      processes:
        - phases: [{{primitive: stream, pattern: strided, stride: 4096, accesses: {PAGES}, region: {4 * PAGES} KiB}}]
"""
HOSTS = {
    "native": "vmm.technique=native",
    "EPT": "vmm.memory.allocator=list",
    "EPT and a buddy allocator": "vmm.memory.allocator=buddy",
}


def frames_of_the_region(host: str, order: str) -> tuple[list[int], list[int]]:
    """The guest's and the host's frames of the pages of a region, in the order of their first touch."""
    machine = Machine(parse_scenario(SCENARIO, [HOSTS[host], f"machine.frames={order}"]))
    assert machine.run().vms[0].stopped is None
    vm = machine.vms[0]
    ((_, (cr3, *_)),) = vm.process_roots
    table = Table(
        root=cr3 >> mem.PAGE_SHIFT,
        format=PAGING,
        take=lambda: 0,
        words=lambda frame: vm.memory.contents(frame, mem.TABLE),
    )
    first = next(start for name, start, _ in vm.spaces[0].areas if name == "region")
    leaves = [table.find(first + n * mem.PAGE_BYTES) for n in range(PAGES)]
    found = [leaf.frame for leaf in leaves if leaf is not None]
    assert len(found) == PAGES
    return found, [vm.memory.frame(gfn) for gfn in found]


def steps(frames: Sequence[int]) -> Counter[int]:
    """How far each frame lies from the one before it."""
    return Counter(after - before for before, after in pairwise(frames))


@pytest.mark.parametrize("host", HOSTS)
def test_contiguous_frames_lie_side_by_side_and_shuffled_ones_do_not(host: str) -> None:
    """A guest gives what was freed last first, hence in descending order; a host also takes frames for its tables."""
    guest, below = frames_of_the_region(host, "contiguous")
    scattered, scattered_below = frames_of_the_region(host, "shuffled")

    assert steps(guest) == {-1: PAGES - 1}
    assert max(steps(below).values()) >= PAGES - 3
    assert max(below) - min(below) < PAGES + 8
    assert max(steps(scattered).values()) <= 2
    assert max(scattered) - min(scattered) > 20 * PAGES
    assert max(steps(scattered_below).values()) < PAGES // 2
