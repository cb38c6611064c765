"""Exceptions of a VM with several vCPUs: time decides which thread touches a page first, and how many come too late.

Which pages page faults name, over all vCPUs, does not depend on it; nor do exceptions of any other kind, whose number
is compared. A read of a mapped file maps the pages around it, but those that another vCPU writes to at that time: where
a file is mapped, the windows count in which pages faulted. Not modelled: which kind of access touched a page first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from attrs import define, field

from vtsim.cpu.codes import PF
from vtsim.cpu.kernels.digest import SEEN_ROWS
from vtsim.guest.kernel.file_fault import AROUND
from vtsim.platform.witness import EXCEPTION, STREAMS, Seen, Wanted, Witnessed

WINDOWS: Final = 16  # runs in which logs may be filled anew
PAGE_BITS: Final = 12
Logs = Mapping[tuple[str, int], Witnessed]
Kind = tuple[int, int]  # a page: vector and page; anything else: vector and error code


@define(eq=False)
class Delivered:
    """What the vCPUs of one VM were delivered: how often each kind, and the first vCPU that was, with its log."""

    counts: dict[Kind, int] = field(factory=dict)
    firsts: dict[Kind, tuple[int, Seen, Witnessed]] = field(factory=dict)

    def add(self, vcpu: int, row: Seen, log: Witnessed) -> None:
        """Count a row of the log; a page fault is that with the address."""
        if row.of == PF and row.part == 0:
            return
        kind = (row.of, _page(row, log) if row.of == PF else row.value)
        self.counts[kind] = 1 if row.of == PF else self.counts.get(kind, 0) + 1
        self.firsts.setdefault(kind, (vcpu, row, log))


def _page(row: Seen, log: Witnessed) -> int:
    """The page of a fault; where its process maps a file, the first one of those that a fault maps together."""
    files = log.files[log.process(row.space)] if row.space else ()
    mapped = any(start <= row.value < end for start, end in files)
    return row.value >> PAGE_BITS & (-AROUND if mapped else -1)


def deliveries(
    runs: Callable[[Wanted], tuple[Logs, Logs]], whole: tuple[Logs, Logs], vm: str
) -> tuple[Delivered, Delivered] | None:
    """What a VM's vCPUs were delivered in two runs, of which `whole` has logged what it could; None if it is too much.

    Where a log did not hold everything, both are run again, each time for the next part of it.
    """
    found = Delivered(), Delivered()
    logs = [log.streams[EXCEPTION] for each in whole for (name, _), log in each.items() if name == vm]
    longest = max(stream.count for stream in logs)
    if longest > WINDOWS * SEEN_ROWS:
        return None
    if all(stream.every == 1 for stream in logs):
        for delivered, each in zip(found, whole, strict=True):
            _add(delivered, each, vm)
        return found
    for first in range(0, longest, SEEN_ROWS):
        wanted = Wanted(fixed=True, **dict.fromkeys(STREAMS, 1 << 60) | {EXCEPTION: first})
        for delivered, each in zip(found, runs(wanted), strict=True):
            _add(delivered, each, vm)
    return found


def _add(delivered: Delivered, logs: Logs, vm: str) -> None:
    for (name, vcpu), log in logs.items():
        if name == vm:
            for row in log.streams[EXCEPTION].rows:
                delivered.add(vcpu, row, log)


def differing(first: Delivered, second: Delivered) -> Iterator[Kind]:
    """Kinds of which the two were not delivered the same, in the order in which they came first."""
    kinds = dict.fromkeys((*first.counts, *second.counts))
    return (kind for kind in kinds if first.counts.get(kind, 0) != second.counts.get(kind, 0))


def page_at(kind: Kind) -> str:
    """A page fault's page, in words; empty for anything else."""
    return f"page {kind[1] << PAGE_BITS & (1 << 64) - 1:#x}" if kind[0] == PF else ""
