"""Translations of DMA requests: a window within the IOTLB's reach, and one far beyond it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from vtsim.iommu.tables import READ_WRITE, Memory, Structures, domain_table
from vtsim.iommu.unit import RemappingUnit

SID = 0x0010
REQUESTS = 4_000_000


def translations(pages: int) -> Callable[[], dict[str, float]]:
    """Uniform reads of 64 bytes over so many 4-KiB pages, translated by four levels of a domain's table."""

    def once() -> dict[str, float]:
        memory = Memory(1 << 30, pool_pages=1024)
        table = domain_table(memory)
        frames = np.random.default_rng(1).permutation(1 << 18)[:pages]
        table.map(0, frames, READ_WRITE)
        structures = Structures(memory)
        structures.attach(SID, table, 1)
        unit = RemappingUnit(memory.arena)
        unit.enable(structures.rtaddr)
        unit.sweep(SID, pages=pages, count=1000, seed=1)
        started = time.perf_counter()
        reads = unit.sweep(SID, pages=pages, count=REQUESTS, seed=7)
        seconds = time.perf_counter() - started
        return {"translations_per_s": REQUESTS / seconds, "reads_per_translation": reads / REQUESTS}

    return once
