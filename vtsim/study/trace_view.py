"""A run as it happens: one line per transition in fixed columns, coloured by the new privilege state."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Final

from attrs import define, field, frozen

from vtsim.base import trace
from vtsim.base.errors import ConfigError
from vtsim.base.trace import ALL_KINDS, KINDS, PRIVILEGES, TracedMachine, TraceEvent
from vtsim.vmcs.events import EXCEPTIONS, VALID, describe_event
from vtsim.vmcs.qualification import describe
from vtsim.vmcs.reasons import EPT_MISCONFIG, EPT_VIOLATION, REASON, reason_name

# fmt: off
KIND_WORDS: Final = {  # what --trace-filter accepts, besides exit reasons
    "exits":      1 << trace.EXIT,
    "entries":    1 << trace.ENTRY,
    "syscalls":   1 << trace.SYSCALL,
    "faults":     1 << trace.FAULT,
    "interrupts": 1 << trace.INTERRUPT,
    "returns":    1 << trace.SYSRET | 1 << trace.IRET,
    "halts":      1 << trace.HALT,
    "stops":      1 << trace.STOP,
}
COLOURS: Final = ("31", "33", "36", "32")  # of R0 R3 N0 N3, as in the report
# fmt: on

OF_ONE_REASON: Final = 1 << trace.EXIT | 1 << trace.ENTRY
HEADER: Final = f"{'cycle':>15} {'cpu':>3} {'from':<4} {'to':<2} {'what':<24} {'cycles':>10}  detail"


@frozen(kw_only=True)
class TraceFilter:
    """Which events are wanted: all of some kinds, and the exits and entries of some reasons."""

    kinds: int = ALL_KINDS
    reasons: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, text: str) -> TraceFilter:
        """Read a list such as `CPUID,EPT_VIOLATION,syscalls`."""
        kinds, reasons = 0, set()
        for word in (part.strip() for part in text.split(",")):
            if word.lower() in KIND_WORDS:
                kinds |= KIND_WORDS[word.lower()]
            elif word.upper() in REASON:
                reasons.add(REASON[word.upper()].number)
            else:
                legal = [*KIND_WORDS, *REASON]
                raise ConfigError.unknown("kind of event or exit reason", word, legal, field="--trace-filter")
        return cls(kinds=kinds, reasons=frozenset(reasons))

    @property
    def recorded(self) -> int:
        """One bit per kind that the engine has to record."""
        return self.kinds | (OF_ONE_REASON if self.reasons else 0)

    def accepts(self, event: TraceEvent) -> bool:
        """Is this event wanted?"""
        bit = 1 << event.kind
        return bool(self.kinds & bit or (bit & OF_ONE_REASON and event.reason in self.reasons))


@define(kw_only=True)
class TraceView:
    """Prints the events of a run as they come, and keeps them where the run is written to disk."""

    write: Callable[[str], object]
    wanted: TraceFilter = TraceFilter()
    limit: int | None = None
    colour: bool = False
    width: int | None = None  # of a terminal, where a long line is cut
    kept: array[int] | None = None  # rows for `vtsim.base.trace.save`
    shown: int = field(default=0, init=False)

    @property
    def kinds(self) -> int:
        """One bit per kind that has to be recorded; 0 once the limit is reached."""
        return 0 if self.limit is not None and self.shown >= self.limit else self.wanted.recorded

    def begin(self, machine: TracedMachine) -> None:
        """Nothing of a machine but its events is printed."""

    def take(self, events: Iterable[TraceEvent]) -> None:
        """Print and keep those that are wanted."""
        lines = []
        for event in events:
            if not self.kinds:
                break
            if self.wanted.accepts(event):
                if not self.shown:
                    lines.append(HEADER)
                lines.append(self._line(event))
                self.shown += 1
                if self.kept is not None:
                    self.kept.extend(event.row())
                if self.shown == self.limit:
                    lines.append(f"(trace limit of {self.limit} reached)")
        if lines:
            self.write("\n".join(lines) + "\n")

    def _line(self, event: TraceEvent) -> str:
        text = line(event)
        if self.width is not None and len(text) > self.width:
            text = text[: self.width - 1] + "…"
        return f"\x1b[{COLOURS[event.to]}m{text}\x1b[0m" if self.colour else text


def line(event: TraceEvent) -> str:
    """One event as text."""
    to, came = PRIVILEGES[event.to], PRIVILEGES[event.privilege]
    text = (
        f"{event.cycle:>15,} {event.vcpu:>3} {came:<4} {to:<2} {what(event):<24} {event.cycles:>10,}  "
        f"{', '.join(part for part in (meaning(event), _rip(event)) if part)}"
    )
    return text.rstrip()


def what(event: TraceEvent) -> str:
    """The kind, and what it was about."""
    if event.reason < 0 or event.kind in (trace.SYSRET, trace.IRET):
        return KINDS[event.kind]
    about = str(event.reason)
    if event.kind in (trace.EXIT, trace.ENTRY):
        about = reason_name(event.reason)
    elif event.kind == trace.FAULT:
        about = EXCEPTIONS[event.reason] if event.reason < len(EXCEPTIONS) else about
    elif event.kind == trace.INTERRUPT:
        about = f"{event.reason:#x}"
    return f"{KINDS[event.kind]} {about}"


def meaning(event: TraceEvent) -> str:
    """What the details beside RIP say."""
    details = dict(zip(trace.DETAIL_NAMES[event.kind], event.detail, strict=False))
    if event.kind == trace.EXIT:
        about = details.get("about", 0)
        if event.reason in (EPT_VIOLATION, EPT_MISCONFIG):
            words = describe(event.reason, details.get("qualification", 0))
            return f"{words}{', ' if words else ''}gpa {_hexadecimal(about)}"
        return describe(event.reason, details.get("qualification", 0), about)
    if event.kind == trace.ENTRY and details.get("injected", 0) & VALID:
        return f"injects {describe_event(details['injected'])}"
    if event.kind == trace.FAULT and "error_code" in details:
        address = f" at {_hexadecimal(details['address'])}" if details.get("address") else ""
        return f"error code {details['error_code']:#x}{address}"
    return ""


def _rip(event: TraceEvent) -> str:
    return f"rip {_hexadecimal(event.detail[0])}" if event.detail else ""


def _hexadecimal(value: int) -> str:
    """An engine word as the unsigned number it stands for."""
    return f"{value & 0xFFFF_FFFF_FFFF_FFFF:#x}"
