"""The rows of a program, as the engine has them: made once, since they do not depend on where in memory it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from attrs import frozen

from vtsim.base import memory as mem
from vtsim.cpu import ops as o
from vtsim.cpu.slots import NO_REGISTER
from vtsim.vmcs.fields import WIDTH_MASK
from vtsim.vmcs.groups import GROUPS

if TYPE_CHECKING:
    from vtsim.cpu.assembler import Instruction

PAGE = mem.PAGE_BYTES
Numbers = npt.NDArray[np.int64]


@frozen(eq=False)
class Rows:
    """Rows in address order. Those of `jumps` lead to others of their page, `goals`, whose arena offsets come later."""

    rows: Numbers  # (rows, ROW_WORDS)
    offsets: Numbers  # of each row in its page
    jumps: Numbers
    goals: Numbers
    pages: tuple[tuple[int, int, int], ...]  # linear address, first row, row after the last


def packed(instructions: Sequence[Instruction]) -> Rows:
    """Pack instructions, which stand in address order."""
    places = {i.at: n for n, i in enumerate(instructions)}
    words: list[list[int]] = []
    jumps: list[tuple[int, int]] = []
    pages: list[tuple[int, int, int]] = []
    for n, i in enumerate(instructions):
        page, offset = i.at & ~(PAGE - 1), i.at & (PAGE - 1)
        if not pages or pages[-1][0] != page:
            pages.append((page, n, n))
        pages[-1] = (page, pages[-1][1], n + 1)
        behind = instructions[n + 1].at if n + 1 < len(instructions) else -1
        follows = behind == i.end and behind & ~(PAGE - 1) == page
        target = i.target if isinstance(i.target, int) else 0
        if i.target is not None and target & ~(PAGE - 1) == page and target in places:
            jumps.append((n, places[target]))
        words.append(_words(i, offset, target, last=not follows))
    goals = np.array(jumps, np.int64).reshape(-1, 2)
    return Rows(
        rows=np.array(words, np.int64).reshape(-1, o.ROW_WORDS),
        offsets=np.array([i.at & (PAGE - 1) for i in instructions], np.int64),
        jumps=goals[:, 0],
        goals=goals[:, 1],
        pages=tuple(pages),
    )


def _words(i: Instruction, offset: int, target: int, *, last: bool) -> list[int]:
    """The words of a row, in the order of ROW_META to ROW_EXTRA."""
    meta = (
        i.op | i.length << o.META_LENGTH | offset << o.META_OFFSET
        | i.activity << o.META_ACTIVITY | int(last) << o.META_LAST
        | int((offset & 63) + i.length > 64) << o.META_STRADDLES
    )  # fmt: skip
    imm = mem.signed(target if i.op == o.MOV and i.target is not None else i.imm)
    displacement = o.TRUTH[i.imm] if i.op == o.JCC else mem.signed(i.mem.displacement)
    extra = mem.signed(i.extra if i.target is None else target)
    if i.op in (o.LDM, o.STM):
        extra = i.imm.bit_count()
    known = 0
    if i.op == o.VMWRITE and i.r2 == NO_REGISTER:  # the field's bits, and the checks that stay good
        known = WIDTH_MASK[i.extra] & ~GROUPS[i.extra]
    return [meta, i.r1, i.r2, imm, i.mem.packed, displacement, known, extra]
