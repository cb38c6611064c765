"""How much of an engine's arenas swapping takes: places on the disk, and what is known of each guest frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vtsim.base.errors import ConfigError
from vtsim.base.memory import PAGE_BYTES, gfn_ranges
from vtsim.base.units import SIZE
from vtsim.vmm import layout as at
from vtsim.vmm.buddy import Buddy
from vtsim.vmm.hypervisor import Hypervisor, Vcpu

PLACE_WORDS: Final = 3  # of a page on the disk: frame word, page of contents, code page
LEAST_FRAMES: Final = 64  # that a VM has to have beside those it starts with, or it would hardly move


def places(memories: Sequence[int]) -> list[int]:
    """The first place on the disk of each VM, and the number of all."""
    firsts = [0]
    for size in memories:
        firsts.append(firsts[-1] + gfn_ranges(size)[-1][1])
    return firsts


def shares(buddy: Buddy, vcpus: Sequence[Vcpu], limit: int | None) -> list[int]:
    """How many frames each VM may have, in proportion to its size; raises `ConfigError` where that is too little."""
    given = [vcpu.memory.placement.given if vcpu.memory.placement is not None else 0 for vcpu in vcpus]
    free = sum(int(zone.free.sum()) for zone in buddy.zones) + sum(given)
    if limit is not None:
        free = min(free, limit // PAGE_BYTES)
    total = sum(vcpu.memory.size for vcpu in vcpus)
    parts = [free * vcpu.memory.size // total for vcpu in vcpus]
    for part, mine, vcpu in zip(parts, given, vcpus, strict=True):
        if part < mine + LEAST_FRAMES:
            need = SIZE.format((mine + LEAST_FRAMES) * total // vcpu.memory.size * PAGE_BYTES)
            raise ConfigError(
                f"VM {vcpu.name!r} would have {SIZE.format(part * PAGE_BYTES)} of the host's memory, less than it "
                "starts with",
                field="vmm.swap.memory" if limit is not None else "machine.memory",
                help=f"give at least {need}",
            )
    return parts


def share_out(hypervisor: Hypervisor, buddy: Buddy) -> None:
    """Tell every vCPU how many frames its VM may have and has, and where its pages stand on the disk."""
    vms = [vcpu for vcpu in hypervisor.vcpus if vcpu.index == 0]
    firsts = places([vcpu.memory.size for vcpu in vms])
    for vm, share, first in zip(vms, shares(buddy, vms, hypervisor.path.vmm.swap.memory), firsts, strict=False):
        place = vm.memory.placement
        values = {"SHARE": share, "DISK_FIRST": first, "RESIDENT": place.given if place is not None else 0}
        if vm.swap_marks is not None:
            values["SWAP_MARKS"] = at.frame_address(vm.swap_marks)
        for vcpu in (vcpu for vcpu in hypervisor.vcpus if vcpu.name == vm.name):
            for name, value in values.items():
                hypervisor.host.store(vcpu.address + at.V[name], value)
