"""How often the page-modification log is full.

SDM: "Page-Modification Logging".
"""

from __future__ import annotations

import pytest

from tests.cpu.bench import TEXT, Virtual, virtual
from vtsim.base import memory as mem
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept import spec as e
from vtsim.ept.tables import EPT_PAGE, KERNEL_PAGE
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x

FIRST_GFN, AT, ENTRIES = 0x10000, 0x1000_0000, 512


def with_log(pages: int) -> Virtual:
    """A guest with so many clean pages, all behind one host frame; every other page of it is dirty already."""
    bench = virtual()
    guest, ept = bench.guest, bench.guest.ept
    assert ept is not None
    frame = bench.engine.allocate()
    ept.map(FIRST_GFN << 12, [frame] * pages, EPT_PAGE)
    guest.table.map(AT, range(FIRST_GFN, FIRST_GFN + pages), KERNEL_PAGE)
    log = bench.engine.allocate()
    bench.engine.contents(log, mem.VALUES)
    bench.set(
        SECONDARY_PROC_CONTROLS=bench.field("SECONDARY_PROC_CONTROLS") | b.ENABLE_PML,
        EPT_POINTER=bench.field("EPT_POINTER") | e.EPTP_ACCESSED_DIRTY,
        PML_ADDRESS=log << 12,
        PML_INDEX=ENTRIES - 1,
    )
    return bench


def others_are_dirty(bench: Virtual) -> None:
    """Set the flags of every page that the guest has, but not of the clean ones."""
    ept = bench.guest.ept
    assert ept is not None
    for gfn in bench.guest.frames:
        leaf = ept.find(gfn << 12)
        assert leaf is not None
        ept.words(leaf.table)[leaf.index] |= e.EPT_ACCESSED | e.EPT_DIRTY


@pytest.mark.parametrize(
    "pages", [1, 513, *(pytest.param(n, marks=pytest.mark.compiled_only) for n in (512, 1024, 1025, 1600))]
)
def test_n_newly_dirtied_pages_fill_the_log_once_for_every_512_before_the_last(pages: int) -> None:
    bench = with_log(pages)

    def write(a: Assembler) -> None:
        a.mov(s.RBX, AT)
        a.mov(s.RCX, pages)
        a.label("next")
        a.st_value(Mem(s.RBX, 0), 1)
        a.add(s.RBX, 0x1000)
        a.loop("next")
        a.op(o.STOP_OP, imm=1)

    def handler(a: Assembler) -> None:
        a.mov(s.RAX, ENTRIES - 1)
        a.vmwrite("PML_INDEX", s.RAX)
        a.op(o.VMRESUME)

    bench.guest.code(write, TEXT)
    bench.host(handler)
    bench.enter(TEXT)
    others_are_dirty(bench)
    assert bench.engine.run(ops=60_000) == 4
    owner = bench.engine.owner("vm")
    exits = bench.engine.arena[owner + k.OWN_EXITS :][: k.REASONS * k.EXIT_WORDS : k.EXIT_WORDS]

    assert int(exits[x.PML_FULL]) == (pages - 1) // ENTRIES
    assert int(exits.sum()) == int(exits[x.PML_FULL])
    log = bench.engine.contents(bench.field("PML_ADDRESS") >> 12, mem.VALUES)
    logged = (pages - 1) % ENTRIES  # since the last exit, beside the newest
    assert int(log[ENTRIES - 1 - logged]) >> 12 == FIRST_GFN + pages - 1
