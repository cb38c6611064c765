"""Many requests of one requester in one call: what benchmarks and studies of reach drive."""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.iommu.kernels.requests import reads_of, translate_request
from vtsim.iommu.spec import UNTRANSLATED


@kernel
def sweep_requests(
    u: Record, a: Arena, sid: int, pasid: int, base: int, pages: int, count: int, seed: int, access: int
) -> int:
    """`count` requests of 64 bytes to pages of a window: uniform if `seed` is not 0, else in order; memory reads."""
    reads = 0
    state = seed
    for number in range(count):
        page = number % pages
        if seed != 0:
            state = (state * 1_103_515_245 + 12_345) & 0x7FFF_FFFF
            page = (state * pages) >> 31
        translate_request(u, a, sid, pasid, base + (page << 12), 64, access, UNTRANSLATED)
        reads += reads_of(u)
    return reads
