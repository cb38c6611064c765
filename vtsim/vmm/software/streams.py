"""STREAM of a guest: each access is an instruction that is found, translated and made, then its ordinary instructions.

Which addresses come next, the simulator works out for a number of accesses at a time; the registers that the guest
would see behind each of them stand beside it.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vtsim.base.errors import ModelError
from vtsim.base.jit import DISABLED
from vtsim.base.memory import PAGE_SHIFT, signed
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import overlap
from vtsim.cpu.kernels import stream as kernels
from vtsim.cpu.slots import R8, R9, R10, R14, RAX, RCX, RDX, RSI
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.crossing import die
from vtsim.vmm.monitor.layout import saved, vcpu
from vtsim.vmm.software import layout as w
from vtsim.vmm.software.instructions import fetch
from vtsim.vmm.software.mmu import READ, WRITE, look_up

REGISTERS: Final = {"RCX": s.RCX, "RDI": s.RDI, "RBX": s.RBX, "R8": s.R8, "RDX": s.RDX}
EXECUTED: Final = (ops.SEQUENTIAL, ops.STRIDED, ops.UNIFORM, ops.ZIPF, ops.CHASE)


def emit(a: Assembler, *, translates: bool) -> None:
    """`stream`: the handler. `stream_stand`: the guest's registers become those at STREAM_AT."""
    a.activity = ops.EXIT_HANDLER
    a.label("stream")
    a.ld(RAX, saved(RCX))
    a.cmp(RAX, 0)
    a.jcc(ops.CC_LE, "stream_ends")
    a.hook(w.STREAM_BATCH)
    a.test(R9, register=R9)
    a.jcc(ops.CC_Z, "stream_unknown")
    a.ld(R8, vcpu("STREAM"))
    a.label("stream_next")
    a.st(vcpu("STREAM_AT"), R8)
    if not translates:
        fetch(a, "next", "next")
    a.ld(RSI, Mem(R8, w.S["ADDRESS"]))
    a.ld(RAX, Mem(R8, w.S["STORES"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "stream_stores")
    look_up(a, READ, 1)
    a.ld(RAX, Mem(RSI, index=RDX, size=1))
    a.jmp("stream_accessed")
    a.label("stream_stores")
    look_up(a, WRITE, 1)
    a.ld(RAX, Mem(RSI, index=RDX, size=1))  # a stream carries no values: what stands there is stored again
    a.st(Mem(RSI, index=RDX, size=1), RAX)
    a.label("stream_accessed")
    a.add(R14, 1)
    a.ld(R10, Mem(R8, w.S["WORK"]))
    a.test(R10, register=R10)
    a.jcc(ops.CC_Z, "stream_without_work")
    a.push(R8)
    a.push(R9)
    a.call("work")
    a.pop(R9)
    a.pop(R8)
    a.label("stream_without_work")
    a.add(R8, w.STREAM_ROW_BYTES)
    a.sub(R9, 1)
    a.jcc(ops.CC_NZ, "stream_next")
    a.st(vcpu("STREAM_AT"), R8)
    a.call("stream_stand")
    a.jmp("next")
    a.label("stream_ends")
    a.sub(R14, 1)
    a.jmp("advance")
    a.label("stream_unknown")
    a.st_value(vcpu("DEATH_OP"), ops.STREAM)
    die(a, at.ILLEGAL)
    a.label("stream_stand")
    a.ld(RCX, vcpu("STREAM_AT"))
    for name, register in REGISTERS.items():
        a.ld(RAX, Mem(RCX, w.S[name]))
        a.st(saved(register), RAX)
    a.st_value(vcpu("STREAM_AT"), 0)
    a.ret()


def batch(arena: NDArray[np.int64], packed: int, registers: dict[int, int], work_scale: int) -> list[list[int]]:
    """The next accesses of a stream, rows as `layout.STREAM_ROW`, and one more with the registers behind the last.

    `registers` are the guest's by number. Empty where the pattern is none that is executed here.
    """
    pattern, writes = packed & 15, packed >> ops.STREAM_WRITES & 0x7FF
    work = (packed >> ops.STREAM_WORK & 0xFFFF) * work_scale
    if pattern not in EXECUTED:
        return []
    base, region, stride = registers[s.RSI], registers[s.RDX], registers[s.R8]
    left, position, random = registers[s.RCX], registers[s.RDI], registers[s.RBX]
    lines, table = max(region >> 6, 1), registers[s.R9]
    if pattern == ops.ZIPF and not 0 <= table < len(arena) - kernels.QUANTILES:
        raise ModelError("the quantiles of a stream are not in the arena", {"index": table})
    rows = []
    for _ in range(min(left, w.STREAM_ROWS)):
        before = [left, position, random, stride, region]
        if pattern in (ops.SEQUENTIAL, ops.STRIDED):
            address = base + position
            within = 0 < stride <= address & (kernels.LINE - 1)  # of a line whose words are all loaded, or all stored
            random = next_random(random) if writes and not within else random
        else:
            random = next_random(random)
            address = place(arena, pattern, random, base, lines, table)
        stores = int(bool(writes) and random & 1023 < writes)
        rows.append([signed(address), stores, work, *before])
        left -= 1
        if pattern in (ops.SEQUENTIAL, ops.STRIDED):
            page = (base + position) >> PAGE_SHIFT
            position += stride
            if position >= region:
                position = 0
            if (base + position) >> PAGE_SHIFT != page:  # whose first access often faults
                break
    rows.append([0, 0, 0, left, position, random, stride, region])
    return rows


def next_random(x: int) -> int:
    """One step of a stream's generator; of the kernel's result on unbounded integers only 64 bits are right."""
    function: Any = overlap.next_random if DISABLED else overlap.next_random.py_func  # type: ignore[attr-defined]
    return signed(int(function(x)))


def place(arena: NDArray[np.int64], pattern: int, random: int, base: int, lines: int, table: int) -> int:
    """The address that a random number stands for."""
    function: Any = kernels.place if DISABLED else kernels.place.py_func  # type: ignore[attr-defined]
    return int(function(arena, pattern, random, base, lines, table))
