"""Ordinary work and accesses to memory: work, mix, stream, fill.

Not modelled: the mix's data dependencies (each access waits for its data); its pattern chase is uniform.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest import spec
from vtsim.guest.primitives import Stage, again, counted_in_r12, lowering, registers

LINE: Final = 64
PAGE: Final = 4096
QUANTILES: Final = 4096
SPREAD: Final = 0x9E3779B1  # where the stream puts rank r: line r * SPREAD modulo the region's lines
PATTERN: Final = {
    "uniform": ops.UNIFORM,
    "sequential": ops.SEQUENTIAL,
    "strided": ops.STRIDED,
    "zipf": ops.ZIPF,
    "chase": ops.CHASE,
}
WORD: Final = 8
WORK_LIMIT: Final = (1 << 16) - 1  # ordinary instructions per access that a STREAM row has room for
MIX_ACCESSES: Final = 64  # in the unrolled body of a mix
MIX_BURST: Final = 8  # most instructions of one WORK
MIX_LARGEST: Final = 4096  # instructions of an unrolled body with few accesses


@lowering(spec.WorkSpec)
def work(a: Assembler, phase: spec.WorkSpec, at: Stage) -> None:
    """Ordinary instructions, in a loop of 64 bytes of code."""
    a.mov(s.RCX, at.scaled(phase.instructions))
    a.emit(ops.LONG_WORK, length=LINE)


@lowering(spec.FillSpec)
def fill(a: Assembler, phase: spec.FillSpec, at: Stage) -> None:
    """A store to each page, of a number that counts down from the number of different contents, again and again."""
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    registers(a, {s.RDI: at.base, s.RCX: -(-phase.region // PAGE), s.RBX: phase.distinct})
    a.label(at.label("page"))
    a.st(Mem(s.RDI), s.RBX)
    a.add(s.RDI, PAGE)
    a.sub(s.RBX, 1)
    a.jcc(ops.CC_NZ, at.label("same_turn"))
    a.mov(s.RBX, phase.distinct)
    a.label(at.label("same_turn"))
    a.loop(at.label("page"))
    again(a, label)


def zipf_table(region: int, theta: float) -> NDArray[np.int64]:
    """The rank below which each 4096th part of the accesses falls, for Zipf's law with exponent `theta`.

    The sum of the law is taken as an integral over the ranks; a stream interpolates between two quantiles.
    """
    lines = max(region // LINE, 1)
    share = np.arange(QUANTILES + 1) / QUANTILES
    if abs(theta - 1.0) < 1e-9:
        rank = (lines + 1.0) ** share
    else:
        rank = (1.0 + share * ((lines + 1.0) ** (1.0 - theta) - 1.0)) ** (1.0 / (1.0 - theta))
    table: NDArray[np.int64] = np.clip(rank.astype(np.int64) - 1, 0, lines)
    table[-1] = lines
    return table


def zipf_words(phase: spec.StreamSpec) -> int:
    """How many words of tables a stream needs."""
    return QUANTILES + 1 if phase.pattern == "zipf" else 0


@lowering(spec.StreamSpec, table_words=zipf_words)
def stream(a: Assembler, phase: spec.StreamSpec, at: Stage) -> None:
    """Accesses in one REP-like operation; more work between two accesses than a row can say is a loop around it."""
    accesses = at.scaled(phase.accesses)
    between = phase.work if phase.work <= WORK_LIMIT else 0
    packed = PATTERN[phase.pattern] | round(phase.write * 1024) << ops.STREAM_WRITES | between << ops.STREAM_WORK
    values = {s.RSI: at.base, s.RDX: phase.region, s.RDI: 0, s.RBX: start_of_random(at)}
    values[s.R8] = phase.stride if phase.pattern == "strided" else WORD
    if phase.pattern == "zipf":
        values[s.R9] = at.place_table(zipf_table(phase.region, phase.theta))
    registers(a, values)
    if between == phase.work:
        a.mov(s.RCX, accesses)
        a.emit(ops.STREAM, imm=packed, comment=phase.pattern)
        return
    label = counted_in_r12(a, at, accesses)
    a.mov(s.RCX, 1)
    a.emit(ops.STREAM, imm=packed, comment=phase.pattern)
    a.mov(s.RCX, phase.work)
    a.emit(ops.LONG_WORK, length=LINE)
    again(a, label)


def start_of_random(at: Stage) -> int:
    """A 64-bit start for a stream's random state: never zero, well mixed."""
    mixed = np.random.SeedSequence([at.seed, *at.name.encode()]).generate_state(1, np.uint64)
    return int(mixed[0]) | 1


@lowering(spec.MixSpec)
def mix(a: Assembler, phase: spec.MixSpec, at: Stage) -> None:
    """An unrolled body of WORK of at most 8 instructions and loads and stores, with a window that moves.

    The offsets of the body lie in the lower half of the region as the pattern says, the window's start moves
    through the other half: every iteration touches other places.
    """
    instructions = at.scaled(phase.instructions)
    random = np.random.default_rng(np.random.SeedSequence([at.seed, *at.name.encode()]))
    span = max(phase.region // 2 // WORD * WORD, WORD)
    window = (1 << (span.bit_length() - 1)) - WORD  # a mask
    move = MIX_ACCESSES * WORD if phase.pattern == "sequential" else LINE + WORD
    body = list(_body(phase, random, span))
    length = sum(instructions for instructions, _, _ in body)
    registers(a, {s.RSI: at.base, s.RDI: 0})
    rounds, left = divmod(instructions, length + len(("ADD", "AND", "LOOP")))
    if rounds:
        a.mov(s.RCX, rounds)
        label = a.label(at.label("loop"))
        _write(a, body)
        a.add(s.RDI, move)
        a.and_(s.RDI, window)
        a.loop(label)
    for step in body * 2:
        take = min(step[0], left)
        if take:
            _write(a, [(take, *step[1:])])
            left -= take


Step = tuple[int, int, bool]  # instructions, offset or -1 for ordinary work, is it a store


def _body(phase: spec.MixSpec, random: np.random.Generator, span: int) -> Iterator[Step]:
    """One round: accesses spread evenly among ordinary instructions, in the share that is asked for."""
    if phase.memory == 0:
        yield from [(MIX_BURST, -1, False)] * MIX_ACCESSES
        return
    accesses = max(1, min(MIX_ACCESSES, int(MIX_LARGEST * phase.memory)))
    words = max(span // WORD, 1)
    table = zipf_table(span, phase.theta)
    done = 0
    for n in range(accesses):
        ordinary = int((n + 1) * (1 - phase.memory) / phase.memory) - done
        done += ordinary
        while ordinary > 0:
            yield min(ordinary, MIX_BURST), -1, False
            ordinary -= MIX_BURST
        if phase.pattern == "sequential":
            word = n % words
        elif phase.pattern == "strided":
            word = n * phase.stride // WORD % words
        elif phase.pattern == "zipf":
            rank = int(table[random.integers(QUANTILES)])
            word = rank * SPREAD % max(span // LINE, 1) * (LINE // WORD) % words
        else:
            word = int(random.integers(words))
        yield 1, word * WORD, bool(random.random() < phase.write)


def _write(a: Assembler, body: list[Step]) -> None:
    for instructions, offset, store in body:
        if offset < 0:
            a.work(instructions)
        elif store:
            a.st(Mem(s.RSI, offset, index=s.RDI), s.RAX)
        else:
            a.ld(s.RAX, Mem(s.RSI, offset, index=s.RDI))
