from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from tests.cpu.bench import DATA, native, virtual
from vtsim.base import jit
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.kernels.foresight import ENTRIES, GUEST, NESTED, WORDS, leaf_of, remember
from vtsim.cpu.kernels.stream import FORESEEN_ACCESSES, FORESEEN_LINES
from vtsim.ept.tables import KERNEL_PAGE

REGION = 64 * FORESEEN_LINES
FIRST = 0x4000_0000


def stream(a: Assembler) -> None:
    """Uniform accesses to a region that is large enough to be foreseen, a quarter of them stores."""
    for register, value in (
        (s.RSI, FIRST), (s.RDX, REGION), (s.RDI, 0), (s.RBX, 12345), (s.RCX, 2 * FORESEEN_ACCESSES),
    ):  # fmt: skip
        a.mov(register, value)
    a.emit(o.STREAM, imm=o.UNIFORM | 256 << o.STREAM_WRITES)
    a.op(o.STOP_OP, imm=1)


def ran(kind: str, believed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Record, arena and tags after the stream; before it every table is believed to be at `believed`."""
    bench = native() if kind == "native" else virtual()
    space = bench.space if kind == "native" else bench.guest  # type: ignore[attr-defined]
    for n in range(REGION >> 12):
        space.table.map(FIRST + (n << 12), n % 8 + 300 if kind == "native" else space.take(), KERNEL_PAGE)
    m, a = bench.m, bench.engine.arena
    at = int(m[s.FORESEEN])
    if believed:
        for whose in (GUEST, NESTED):
            for number in range(ENTRIES):
                a[at + (whose * ENTRIES + number) * 2 : at + (whose * ENTRIES + number) * 2 + 2] = number, believed
    assert bench.run(stream) == 4
    kept = a.copy()
    kept[at : at + WORDS] = 0
    return m.copy(), kept, bench.engine.tags.copy()


@pytest.mark.parametrize("kind", ["native", "behind EPT"])
def test_what_the_host_is_told_changes_nothing(kind: str) -> None:
    truth = ran(kind, 0)
    lie = ran(kind, 16 << 12)

    assert all(np.array_equal(one, other) for one, other in zip(truth, lie, strict=True))


def test_a_table_is_found_where_a_walk_last_saw_it_and_nowhere_else() -> None:
    bench = native()
    m, a = bench.m, bench.engine.arena
    with jit.quiet():
        remember(m, a, GUEST, DATA >> 21, 5 << 12)

        assert leaf_of(m, a, GUEST, DATA + 0x3000) == 5 << 12 | ((DATA >> 12) + 3 & 511) * 8
        assert leaf_of(m, a, NESTED, DATA) == 0
        assert leaf_of(m, a, GUEST, DATA + (ENTRIES << 21)) == 0
