"""Who has which frame of a host's buddy allocator: its lists of free blocks, and the pages of VMs."""

from __future__ import annotations

from vtsim.cpu.kernels.buddy import HEADS, LARGEST_ORDER, RECORD_WORDS, Z_FREE
from vtsim.vmm import layout as at
from vtsim.vmm.buddy import ZONE_BYTES
from vtsim.vmm.hypervisor import Hypervisor

UNSIGNED = (1 << 64) - 1


def free_frames(hypervisor: Hypervisor) -> set[int]:
    """Every frame in a list of a zone; no block is in two lists, and the zones count as many as there are."""
    host, addresses = hypervisor.host, hypervisor.path.addresses
    free: set[int] = set()
    for node in range(hypervisor.engine.geometry.nodes):
        zone, found = addresses["zones"] + node * ZONE_BYTES, 0
        for order in range(LARGEST_ORDER + 1):
            head = host.load(zone + 8 * (HEADS + order))
            while head:
                block = set(range(head - 1, head - 1 + (1 << order)))
                assert not free & block, "a free frame stands in two lists"
                free |= block
                found += len(block)
                head = host.load((addresses["records"] & UNSIGNED) + 8 * RECORD_WORDS * (head - 1))
        assert host.load(zone + 8 * Z_FREE) == found
    return free


def frames_of_vms(hypervisor: Hypervisor) -> dict[int, int]:
    """{frame: pages of VMs that it is behind}."""
    pages: dict[int, int] = {}
    for vcpu in (vcpu for vcpu in hypervisor.vcpus if vcpu.index == 0):
        gfn = 0
        while gfn < vcpu.memory.size >> 12:
            leaf = vcpu.process.find(at.USER_RAM + gfn * 4096)
            count = 1 if leaf is None else 1 << 9 * leaf.size
            for n in range(count if leaf is not None else 0):
                assert leaf is not None
                pages[leaf.frame + n] = pages.get(leaf.frame + n, 0) + 1
            gfn += count
    pages.pop(hypervisor.path.addresses["zero_page"], None)
    return pages


def check_owners(hypervisor: Hypervisor, at_first: set[int], *, shared: bool = False) -> None:
    """Every frame that there was is free or behind one page of one VM; `at_first` are those of `owned_or_free`."""
    free, pages = free_frames(hypervisor), frames_of_vms(hypervisor)
    assert not free & set(pages), "a frame of a VM is free"
    assert shared or set(pages.values()) <= {1}, "two pages are the same frame"
    assert free | set(pages) == at_first


def owned_or_free(hypervisor: Hypervisor) -> set[int]:
    """All frames that the allocator ever had."""
    return free_frames(hypervisor) | set(frames_of_vms(hypervisor))
