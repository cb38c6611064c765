"""The loop that maps a file, touches its pages and unmaps it.

A shuffled order comes from x <- 5 x + c modulo a power of two, which visits every number once (T. E. Hull and
A. R. Dobell, "Random Number Generators", SIAM Review 4, 1962); numbers beyond the last page are passed over.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest import file_mappings as spec
from vtsim.guest.kernel import layout
from vtsim.guest.primitives import FILE, Stage, again, counted_in_r12, lowering, registers
from vtsim.guest.primitives.memory import start_of_random
from vtsim.guest.primitives.processes import PAGE, call

STEP: Final = 5
ADDED: Final = 0x1F35  # odd


@lowering(spec.MapFileSpec, memory=FILE)
def map_file(a: Assembler, phase: spec.MapFileSpec, at: Stage) -> None:
    """Two or three system calls a round, and the touches between them; one for each pass that is synced."""
    a.mov(s.RBX, start_of_random(at))
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    for number in (layout.CALL_MAP_FILE, layout.CALL_MSYNC)[: 1 + phase.invalidate]:
        registers(a, {s.RDI: at.base, s.RSI: phase.pages})
        call(a, number)
    if phase.passes > 1:
        a.mov(s.RBP, phase.passes)
        a.label(at.label("pass"))
    writes = round(phase.write * 1024) << ops.STREAM_WRITES
    if phase.order == "strided":
        count = -(-phase.span_touched // phase.stride)
        registers(a, {s.RSI: at.base, s.RDX: phase.span_touched, s.RDI: 0, s.R8: phase.stride, s.RCX: count})
        a.emit(ops.STREAM, imm=ops.STRIDED | writes)
    elif phase.order == "permutation":
        _shuffled(a, phase.pages_touched, at, writes)
    if phase.sync:
        registers(a, {s.RDI: at.base, s.RSI: phase.pages})
        call(a, layout.CALL_SYNC)
    if phase.passes > 1:
        a.sub(s.RBP, 1)
        a.jcc(ops.CC_NZ, at.label("pass"))
    registers(a, {s.RDI: at.base, s.RSI: phase.pages})
    call(a, layout.CALL_UNMAP_FILE)
    again(a, label)


def _shuffled(a: Assembler, pages: int, at: Stage, writes: int) -> None:
    """Each page once. R13 is the number that comes, R14 how many pages are left."""
    registers(a, {s.RSI: at.base, s.RDX: pages * PAGE, s.R8: PAGE, s.R13: 0, s.R14: pages})
    mask = (1 << (pages - 1).bit_length()) - 1
    a.label(at.label("touch"))
    a.lea(s.R13, Mem(s.R13, ADDED, index=s.R13, scale=STEP - 1))
    a.and_(s.R13, mask)
    a.cmp(s.R13, pages)
    a.jcc(ops.CC_AE, at.label("touch"))
    a.copy(s.RDI, s.R13)
    a.shl(s.RDI, 12)
    a.mov(s.RCX, 1)
    a.emit(ops.STREAM, imm=ops.STRIDED | writes)
    a.sub(s.R14, 1)
    a.jcc(ops.CC_NZ, at.label("touch"))
