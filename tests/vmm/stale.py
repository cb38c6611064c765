"""What a CPU's TLBs hold for a VM, held against the VM's EPT as it is now."""

from __future__ import annotations

from typing import Any

import numpy as np

from vtsim.cpu import slots as s
from vtsim.cpu.kernels.contexts import CONTEXT_MASK, CONTEXT_SHIFT, GLOBAL_KEY, TAG_SHIFT
from vtsim.ept import spec as e
from vtsim.ept.tables import EPT, SIZE_1G, Table

WRITES = 0b1100  # of a TLB's data word: permissions of stores, ring 0 and ring 3
OLD = "an old translation"
TLBS = (s.DTLB4K, s.DTLB2M, s.ITLB4K, s.ITLB2M, s.STLB)


def frames_of(ept: Table) -> dict[int, bool]:
    """{frame that EPT maps: may it be stored to?}"""
    writable: dict[int, bool] = {}

    def look(table: int, size: int) -> None:
        words = ept.words(table)
        for entry in words[words & EPT.present != 0].tolist():
            frame = (entry & e.ADDRESS) >> 12
            if size and not (entry & EPT.large and size <= SIZE_1G):
                look(frame, size - 1)
                continue
            for one in range(frame, frame + (1 << 9 * size)):
                writable[one] = writable.get(one, False) or bool(entry & e.EPT_WRITE)

    look(ept.root, ept.levels - 1)
    return writable


def check_translations(m: Any, cpu: int) -> int:
    """No translation of the VM that runs on a CPU leads where its EPT does not lead; how many there are.

    To be asked while the guest runs: what the hypervisor has changed and not yet flushed may be there until VM entry.
    """
    record, arena = m.engine.cpus[cpu], m.engine.arena
    assert record[s.NONROOT]
    vcpu = m.hypervisor.current(cpu)
    assert vcpu.ept is not None
    writable = frames_of(vcpu.ept)
    seen = 0
    for structure in (*TLBS, s.NESTED_TLB):
        first, data = int(record[structure]), int(record[structure + s.DATA])
        size = (int(record[structure + s.MASK]) + 1) * int(record[structure + s.WAYS])
        used = np.flatnonzero(arena[first : first + size] >= 0)
        for tag, word in zip(arena[first + used].tolist(), arena[data + used].tolist(), strict=True):
            key = int(arena[int(record[s.CONTEXTS]) + ((tag & CONTEXT_MASK) >> CONTEXT_SHIFT)])
            frame = (word & e.ADDRESS) >> 12
            if structure != s.NESTED_TLB:
                if key < 0 or (key & ~GLOBAL_KEY) >> 28 != vcpu.ept_top:
                    continue
                assert frame in writable and (writable[frame] or not word & WRITES), OLD
            elif key == -1 - vcpu.ept_top:
                leaf = vcpu.ept.find(tag >> TAG_SHIFT << 12 + 9 * (tag & 3))
                assert leaf is not None and leaf.size == tag & 3 and leaf.frame == frame, OLD
                assert leaf.entry & e.EPT_WRITE or not word & e.EPT_WRITE, OLD
            else:
                continue
            seen += 1
    return seen
