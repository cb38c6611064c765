"""Recordings for tests: small ones written by hand, and the shipped boot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from vtsim.cpu.codes import BUDGET, PROGRAM_END
from vtsim.cpu.engine import ALL_OPS, Engine, Geometry
from vtsim.cpu.profile import Profile, load_profile
from vtsim.guest.replay.build import Recording, build_replay
from vtsim.guest.replay.lower import lower
from vtsim.guest.traces.format import COLUMNS, Phase, RecordedGuest, Trace
from vtsim.guest.traces.kinds import NUMBER
from vtsim.platform.machine import NativeMemory, apply

BOOT = Path(__file__).parents[2] / "workloads" / "real" / "linux-boot.npz"
MIB = 1 << 20
Row = dict[str, Any]


def row(kind: str, icount: int, **columns: int) -> Row:
    """A recorded row; columns that are left out are 0, `n` is 1."""
    return {"kind": NUMBER[kind], "icount": icount, "n": 1, **columns}


def trace(rows: Sequence[Row], memory: int = 128 * MIB) -> Trace:
    """A recording of these rows in one phase."""
    columns = {name: np.array([one.get(name, 0) for one in rows], dtype=dtype) for name, dtype in COLUMNS.items()}
    return Trace(
        name="by-hand", description="", source="", phases=(Phase(name="all", first_row=0, icount=0),),
        guest=RecordedGuest(memory_bytes=memory, tsc_hz=10**9, instructions_per_second=10**9), **columns,
    )  # fmt: skip


def recording(of: Trace, profile: Profile, *, literal: bool = False) -> Recording:
    return Recording(trace=of, lowered=lower(of, profile.clock_hz, literal=literal))


@lru_cache(maxsize=1)
def boot() -> Trace:
    return Trace.load(BOOT)


@lru_cache(maxsize=1)
def profile() -> Profile:
    return load_profile("skx-4114")


@lru_cache(maxsize=2)
def boot_recording(once: bool) -> Recording:
    """The boot, lowered; `once`: every row executed once, so that counts of rows are counts of instructions."""
    of = boot()
    if once:
        of = attrs.evolve(of, n=np.ones(len(of), np.uint32))
    return recording(of, profile())


def native(of: Recording, ops: int = ALL_OPS) -> Engine:
    """Replay natively to the end, in slices of so many ops."""
    engine = Engine(
        profile(), Geometry(memory_bytes=of.trace.guest.memory_bytes, pool_pages=4096, extra_words=of.words)
    )
    memory = NativeMemory(engine, of.trace.guest.memory_bytes)
    apply(engine, 0, build_replay(of, memory, engine.extra))
    while (code := engine.run(ops=ops)) == BUDGET:
        pass
    assert code == PROGRAM_END
    engine.check_clock()
    return engine
