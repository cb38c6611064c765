"""What walks cost level by level.

SDM: "EPT Translation Mechanism".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cpu.bench import OFF, native
from vtsim.base import jit
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels import translate as tr
from vtsim.cpu.kernels.rights import READ
from vtsim.ept.tables import EPT, EPT_PAGE, KERNEL_PAGE, PAGING, host_table

AT = 1 << 30  # of the page that is walked to; divisible by every page size
SIZES = pytest.mark.parametrize("guest_size", [0, 1, 2])


def walked(engine: Any) -> tuple[int, int]:
    """Guest and EPT references of everything so far."""
    at = int(engine.cpus[0][s.OWNER])
    return int(engine.arena[at + k.GUEST_REFERENCES]), int(engine.arena[at + k.EPT_REFERENCES])


@SIZES
@pytest.mark.parametrize("ept_size", [0, 1, 2])
@pytest.mark.parametrize("levels", [4, 5])
def test_a_cold_nested_walk_reads_every_crossing_but_the_data(guest_size: int, ept_size: int, levels: int) -> None:
    bench = native(OFF)
    engine, m = bench.engine, bench.m
    ept = host_table(engine, EPT)
    ept.map_range(0, 0, 2 << 18, EPT_PAGE, ept_size) if ept_size else ept.map_range(0, 0, 8192, EPT_PAGE)
    if not ept_size:
        ept.map_range(AT, 0, 1, EPT_PAGE)
    guest = host_table(engine, PAGING, levels)
    guest.map(AT, AT >> 12, KERNEL_PAGE, guest_size)
    m[s.NONROOT], m[s.EPTP], m[s.VPID], m[s.PRIVILEGE] = 1, ept.root << 12 | 0x1E, 1, o.N0
    m[s.CR3], m[s.CR4] = guest.root << 12, m[s.CR4] | (levels == 5) << 12
    engine.sync()
    with jit.quiet():
        hpa = int(tr.translate(m, engine.arena, engine.tags, np.int64(AT + 0x128), READ, 0))
    g, h = levels - guest_size, 4 - ept_size

    assert hpa == (0x128 if not ept_size else AT + 0x128)
    assert sum(walked(engine)) == (g + 1) * (h + 1) - 1
    assert walked(engine)[0] == g


@SIZES
def test_a_cold_native_walk_reads_one_entry_per_level(guest_size: int) -> None:
    bench = native(OFF)
    table = host_table(bench.engine, PAGING)
    table.map(AT, 0, KERNEL_PAGE, guest_size)
    bench.m[s.CR3] = table.root << 12
    bench.engine.sync()
    with jit.quiet():
        assert int(tr.translate(bench.m, bench.engine.arena, bench.engine.tags, np.int64(AT + 8), READ, 0)) == 8

    assert walked(bench.engine) == (4 - guest_size, 0)


def test_a_warm_walk_starts_at_the_deepest_cached_level() -> None:
    """All TLBs off, paging-structure caches on: 4 reads, then 1 for the next page of the same table."""
    bench = native({path: 0 for path in OFF if path.startswith("tlb")})
    table = host_table(bench.engine, PAGING)
    table.map(AT, [0, 1], KERNEL_PAGE)
    bench.m[s.CR3] = table.root << 12
    bench.engine.sync()
    reads = []
    for gva in (AT, AT + 0x1000, AT):
        before = walked(bench.engine)[0]
        with jit.quiet():
            tr.translate(bench.m, bench.engine.arena, bench.engine.tags, np.int64(gva), READ, 0)
        reads.append(walked(bench.engine)[0] - before)

    assert reads == [4, 1, 1]
