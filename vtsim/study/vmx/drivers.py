"""What runs recorded cases on the model: one driver per kind of case, registered by the module that has it.

A driver takes a case and its environment and returns what the model did in the format of the recordings, with
integers for numbers and field-table names for VMCS fields: one outcome, or the outcomes of the first run and of all
that followed it. It raises `Skipped` with a reason for a case that it cannot set up.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Final

from vtsim.base import memory as mem
from vtsim.base.registry import Registry
from vtsim.cpu.engine import Engine
from vtsim.study.vmx.cases import Case, Environment

Outcome = Mapping[str, Any]
Driver = Callable[[Case, Environment], Outcome | Sequence[Outcome]]


class Skipped(Exception):
    """This case cannot be run; the text says why."""


MOST_PAGES: Final = 300
"""How many pages of memory a case may have."""


def check_memory(environment: Environment, own: Container[int], end: int) -> None:
    """Raise `Skipped` for memory that a driver has no place for: pages of its own, or at `end` and beyond."""
    if len(environment.memory) > MOST_PAGES:
        raise Skipped("more memory than the machine of the replay has")
    for page in environment.memory:
        if page >= end:
            raise Skipped("memory beyond what the machine of the replay has")
        if page in own:
            raise Skipped("memory where the stand-in for the recorder's program has its own")


def bytes_at(engine: Engine, hpa: int, count: int) -> bytes:
    """Bytes of physical memory; zeroes where none is."""
    found, a = b"", engine.arena
    first, end = hpa >> mem.PAGE_SHIFT, hpa + count
    for frame in range(first, (end - 1 >> mem.PAGE_SHIFT) + 1):
        at = int(mem.contents(a, frame)) if mem.is_memory(a, frame << mem.PAGE_SHIFT) else 0
        found += a[at : at + mem.PAGE_WORDS].tobytes() if at else bytes(mem.PAGE_BYTES)
    return found[hpa - (first << mem.PAGE_SHIFT) :][:count]


drivers: Final[Registry[str, Driver]] = Registry("kind of recorded case")
"""By kind of case: `ENTRY`, `EXIT`, `ROOT`."""
