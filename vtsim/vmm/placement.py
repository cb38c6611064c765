"""Which node the frames of a VM come from, while its builders take them from the buddy allocator."""

from __future__ import annotations

import numpy as np
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.base.memory import BLOCK
from vtsim.vmm import layout as at
from vtsim.vmm.buddy import Buddy, Zone, used_up
from vtsim.vmm.host import Host, Words
from vtsim.vmm.memory_spec import HostMemorySpec


@define(eq=False)
class Placement:
    """Frames for one VM, whose CPU belongs to the node `home`; the counts go to the words of its vCPU."""

    host: Host
    buddy: Buddy
    spec: HostMemorySpec
    home: int
    large_pages: int = field(default=0, init=False)
    large_missing: int = field(default=0, init=False)
    other_node: int = field(default=0, init=False)
    given: int = field(default=0, init=False)  # frames
    handed_over: bool = field(default=False, init=False)
    moved: set[int] = field(factory=set, init=False)

    def node(self, where: str, home: int | None = None) -> int:
        """The node that `local` or `remote` means to this VM, or to a vCPU whose CPU belongs to the node `home`."""
        near = self.home if home is None else home
        return near if where != "remote" else (near + 1) % len(self.buddy.zones)

    @property
    def zones(self) -> tuple[Zone, Zone]:
        """The zone that guest memory comes from, and the other one."""
        return self._zones(self.home)

    def _zones(self, home: int) -> tuple[Zone, Zone]:
        first = self.node(self.spec.data, home)
        return self.buddy.zones[first], self.buddy.zones[(first + 1) % len(self.buddy.zones)]

    def of_pages(self, numbers: Words) -> Words:
        """Which of the two zones pages come from, by their numbers."""
        return numbers & 1 if self.spec.data == "interleaved" else np.zeros(len(numbers), np.int64)

    def block(self, gfn: int) -> int | None:
        """The first frame of 2 MiB for the guest frames from `gfn` on, or None."""
        which = int(self.of_pages(np.array([gfn // BLOCK]))[0])
        block = self.zones[which].block()
        self.large_pages += block is not None
        self.large_missing += block is None
        return block

    def frames(self, gfns: Words) -> Words:
        """Frames for these guest frames."""
        which, taken = self.of_pages(gfns), np.empty(len(gfns), np.int64)
        for n, zone in enumerate(self.zones[: len(self.buddy.zones)]):
            mine = np.flatnonzero(which == n)
            taken[mine] = self._take(zone, len(mine))
        return taken

    def _take(self, zone: Zone, count: int) -> Words:
        found = zone.frames(count)
        for other in self.buddy.zones:
            if len(found) < count and other is not zone:
                more = other.frames(count - len(found))
                self.other_node += len(more)
                found = np.concatenate([found, more])
        if len(found) < count:
            raise used_up()
        self.given += count
        return found

    @property
    def tables_apart(self) -> bool:
        """Do guest tables lie on a node of their own, and can builders still put them there?"""
        return self.spec.guest_tables != "as-data" and len(self.buddy.zones) > 1 and not self.handed_over

    def table_frame(self, gfn: int) -> int:
        """The frame of a page table of the guest."""
        self.moved.add(gfn)
        return int(self._take(self.buddy.zones[self.node(self.spec.guest_tables)], 1)[0])

    def hand_over(self, vcpu: int, node: int) -> None:
        """Tell a vCPU, whose words stand at a linear address and whose CPU belongs to a node; the VM's first one first.

        A page is local to the vCPU that touches it first; by turns they come from nodes, whoever touches them.
        """
        first, other = self.zones if self.spec.data == "interleaved" else self._zones(node)
        words = {"ZONE": first.address, "OTHER_ZONE": other.address}
        if not self.handed_over:
            words |= {
                "LARGE_PAGES": self.large_pages, "LARGE_MISSING": self.large_missing, "OTHER_NODE": self.other_node
            }  # fmt: skip
        self.handed_over = True
        for name, value in words.items():
            self.host.store(vcpu + at.V[name], mem.signed(value))
