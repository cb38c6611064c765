"""Bulk work of the hypervisor's builders, compiled."""

from __future__ import annotations

from vtsim.base.jit import Arena, kernel
from vtsim.base.memory import allocate


@kernel
def allocate_many(a: Arena, frames: Arena) -> int:
    """Fill an array with free host frames, in the allocator's order; -1 if memory is used up."""
    for n in range(len(frames)):
        frames[n] = allocate(a)
        if frames[n] < 0:
            return -1
    return 0
