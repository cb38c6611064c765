"""What a real hypervisor did with a recorded guest: exits by reason and key, per phase."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.vmcs.reasons import BY_NUMBER

FORMAT: Final = "vtsim-recorded-exits"
VERSION: Final = 1
TABLES: Final = {
    "reasons": "exit reason",
    "ports": "direction:port",
    "msrs": "direction:index",
    "cpuid": "leaf",
    "mmio": "direction:gPA",
    "control_registers": "direction:register",
    "exceptions": "vector:error code",
    "ept_qualifications": "exit qualification",
    "ept_regions": "part of guest-physical memory",
}

OPTIONAL: Final = tuple(name for name in TABLES if name != "reasons")
NAMES: Final = frozenset(reason.name for reason in BY_NUMBER.values())
PREFIX: Final = "EXIT_REASON_"
# how other kernels and tools spell exit reasons of ours
SPELLINGS: Final = {
    "EXCEPTION": "EXCEPTION_NMI",
    "PENDING_INTERRUPT": "INTERRUPT_WINDOW",
    "VIRTUAL_INTR": "INTERRUPT_WINDOW",
    "EXTERNAL_INTR": "EXTERNAL_INTERRUPT",
    "IO": "IO_INSTRUCTION",
    "RDMSR": "MSR_READ",
    "WRMSR": "MSR_WRITE",
    "PAUSE": "PAUSE_INSTRUCTION",
    "MONITOR": "MONITOR_INSTRUCTION",
    "MWAIT": "MWAIT_INSTRUCTION",
    "VMX_PREEMPTION_TIMER": "PREEMPTION_TIMER",
}

Counts = Mapping[str, tuple[int, ...]]


def reason_name(text: str) -> str:
    """An exit reason as this project spells it; what it does not know stays as it is."""
    name = text.upper().removeprefix(PREFIX)
    name = SPELLINGS.get(name, name)
    return name if name in NAMES else text


@frozen(kw_only=True)
class RecordedExits:
    """Counts per phase, in the order of `phases`, for every key of every table."""

    source: str
    phases: tuple[str, ...]
    not_recorded: tuple[str, ...]  # reasons that were filtered out
    time_dependent_reasons: frozenset[str]
    time_dependent_accesses: frozenset[str]  # keys of `ports` and `mmio`
    tables: Mapping[str, Counts]

    def total(self, table: str) -> dict[str, int]:
        """Counts of one table over all phases."""
        return {key: sum(counts) for key, counts in self.tables[table].items()}

    @classmethod
    def load(cls, path: str | Path) -> RecordedExits:
        """Read the tables, or raise `ConfigError` with what is wrong with the file."""
        try:
            data = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(error.strerror or str(error), file=str(path)) from None
        except ValueError as error:
            raise ConfigError(f"not JSON ({error})", file=str(path)) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError("not a table of recorded exits", file=str(path), help=f'"format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise ConfigError(
                f"version {data.get('version')!r} of recorded exits is not known",
                file=str(path),
                help=f"this vtsim reads version {VERSION}",
            )
        try:
            return cls(
                source=data["source"],
                phases=tuple(data["phases"]),
                not_recorded=tuple(reason_name(one) for one in data.get("not_recorded", ())),
                time_dependent_reasons=frozenset(reason_name(one) for one in data.get("time_dependent_reasons", ())),
                time_dependent_accesses=frozenset(data.get("time_dependent_accesses", ())),
                tables=_tables(data["tables"], len(data["phases"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"recorded exits lack or misuse {error}", file=str(path)) from None


def _tables(tables: Any, phases: int) -> Mapping[str, Counts]:
    """All tables; those that were not recorded are empty, and reasons have our names."""
    if not isinstance(tables, dict):
        raise TypeError(f"{tables!r} as tables")
    found = {name: _counts(tables.get(name, {}), phases) for name in OPTIONAL}
    reasons: dict[str, tuple[int, ...]] = {}
    for theirs, counts in _counts(tables["reasons"], phases).items():
        name = reason_name(theirs)
        before = reasons.get(name, (0,) * phases)
        reasons[name] = tuple(a + b for a, b in zip(before, counts, strict=True))
    return {"reasons": reasons, **found}


def _counts(table: Any, phases: int) -> Counts:
    if not isinstance(table, dict):
        raise TypeError(f"{table!r} as a table")
    counts = {key: tuple(int(count) for count in row) for key, row in table.items()}
    for key, row in counts.items():
        if len(row) != phases:
            raise ValueError(f"{key}: {len(row)} counts for {phases} phases")
    return counts
