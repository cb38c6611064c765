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
    """Bytes of physical memory."""
    found = bytearray()
    for address in range(hpa, hpa + count):
        at = int(mem.contents(engine.arena, address >> 12)) if mem.is_memory(engine.arena, address) else 0
        word = int(engine.arena[at + ((address >> 3) & 511)]) if at else 0
        found.append((word >> 8 * (address & 7)) & 0xFF)
    return bytes(found)


drivers: Final[Registry[str, Driver]] = Registry("kind of recorded case")
"""By kind of case: `ENTRY`, `EXIT`, `ROOT`."""
