"""From transitions to slices: VM > vCPU > privilege state, with exits by reason and counters of each VM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from attrs import define, field

from vtsim.base import trace
from vtsim.base.trace import ALL_KINDS, PRIVILEGES, TracedMachine, TracedVcpu, TraceEvent
from vtsim.study.trace_view import meaning, what

WINDOW_S: Final = 1e-4  # of a counter
HOST: Final = "host"
EXITS, EFFICIENCY = "exits/s", "efficiency"

Path = tuple[str, ...]
Arguments = Mapping[str, int | str]


class Writer(Protocol):
    """One file format. Times are cycles of the machine's clock."""

    def clock(self, hz: int) -> None:
        """Say what a cycle is; comes before everything else, again for every machine."""
        ...

    def begin(self, track: Path, name: str, at: int, arguments: Arguments) -> None:
        """Open a slice on a track, inside those that are open there."""
        ...

    def end(self, track: Path, at: int) -> None:
        """Close the innermost open slice of a track."""
        ...

    def counter(self, track: Path, at: int, value: float) -> None:
        """Give a counter its value from now on."""
        ...

    def close(self) -> None:
        """Write what is still missing of the file."""
        ...


@define
class Cpu:
    """What is open on one logical CPU."""

    vcpu: Path  # who runs there, or was left for the hypervisor
    since: int = 0
    state: int | None = None
    handling: bool = False  # an exit
    below: bool = False  # in R3, in the middle of it
    retired: int = 0


@define
class Rates:
    """What one VM did in the window that is open."""

    start: int = 0
    exits: int = 0
    executed: int = 0
    emulated: int = 0
    emulated_before: int = 0


@define
class Timeline:
    """A sink of transitions that writes them as slices.

    On a vCPU's track: exits, from the instruction that exits to the next VM entry of the logical CPU, inside them the
    hypervisor's user space and waits. On the tracks below it: how long which privilege state
    lasted, and what led to it.
    What a logical CPU does for no vCPU is on tracks of the host. Cycles of the state tracks sum to the clock.

    Counters hold for windows of 100 us: VM exits per second, and the share of guest instructions executed without the
    hypervisor (under VT-x; an instruction counts when its vCPU exits next, an emulated one at the VM entry after it).
    """

    writer: Writer
    machine: TracedMachine | None = field(default=None, init=False)
    cpus: dict[int, Cpu] = field(factory=dict, init=False)
    rates: dict[str, Rates] = field(factory=dict, init=False)
    by_vmcs: dict[int, TracedVcpu] = field(factory=dict, init=False)
    window: int = field(default=1, init=False)

    @property
    def kinds(self) -> int:
        """All transitions are needed."""
        return ALL_KINDS

    def begin(self, machine: TracedMachine) -> None:
        """Start at cycle 0 of a machine."""
        self.machine, self.cpus = machine, {}
        self.by_vmcs = {vcpu.vmcs: vcpu for vcpu in machine.vcpus if vcpu.vmcs}
        self.rates = {vcpu.vm: Rates() for vcpu in machine.vcpus}
        self.window = max(round(WINDOW_S * machine.clock_hz), 1)
        self.writer.clock(machine.clock_hz)
        if not self.by_vmcs:  # natively, and under a monitor, a guest has its logical CPU to itself
            self.cpus = {vcpu.cpu: Cpu((vcpu.vm, f"vCPU {vcpu.number}")) for vcpu in machine.vcpus}

    def take(self, events: Iterable[TraceEvent]) -> None:
        """Write what follows from the next events."""
        for event in events:
            self._take(event)

    def close(self) -> None:
        """End the counters and the file."""
        end = max((cpu.since for cpu in self.cpus.values()), default=0)
        for vm, rates in self.rates.items():
            if self._handled and end > rates.start:
                self._write_window(vm, rates, end - rates.start)
                self.writer.counter((vm, EXITS), end, 0.0)
        self.writer.close()

    def _take(self, event: TraceEvent) -> None:
        cpu = self.cpus.setdefault(event.vcpu, Cpu((HOST, f"CPU {event.vcpu}")))
        at = max(event.cycle - (event.cycles if event.kind == trace.EXIT else 0), cpu.since)
        if cpu.state is None:
            cpu.state = event.privilege
            self.writer.begin(self._state(cpu), "start", 0, {})
        if event.kind == trace.HALT:
            self._halted(cpu, event)
            return
        over = event.kind == trace.STOP and event.reason < 0
        self.writer.end(self._state(cpu), at)
        if cpu.below:
            self.writer.end(cpu.vcpu, at)
            cpu.below = False
        self._leave(cpu, event, at, over=over)
        cpu.since, cpu.retired = at, event.retired
        if over:
            cpu.state = None
            return
        cpu.state = event.to
        self.writer.begin(self._state(cpu), what(event), at, self._arguments(event))
        if cpu.handling and PRIVILEGES[event.to] == "R3":
            self.writer.begin(cpu.vcpu, "user space of the hypervisor", at, {})
            cpu.below = True

    def _leave(self, cpu: Cpu, event: TraceEvent, at: int, *, over: bool) -> None:
        """Open or close what a transition means for the vCPU, and count."""
        if self._runs_guest(event.privilege):
            self._count(cpu, event)
        into, out = self._runs_guest(event.to), self._runs_guest(event.privilege)
        if cpu.handling and (into or over):
            self.writer.end(cpu.vcpu, at)
            cpu.handling = False
        if event.kind == trace.ENTRY:
            self._enter(cpu, event)
        elif event.kind == trace.STOP:
            if self.by_vmcs:
                cpu.vcpu = (HOST, f"CPU {event.vcpu}")
        elif out and not into and self._handled:
            name = what(event).partition(" ")[2] if event.kind == trace.EXIT else what(event)
            self.writer.begin(cpu.vcpu, name, at, self._arguments(event))
            cpu.handling = True

    @property
    def _handled(self) -> bool:
        """Is there a hypervisor that exits go to?"""
        return self.machine is not None and self.machine.technique != "native"

    def _runs_guest(self, privilege: int) -> bool:
        """Is a privilege state a guest's?"""
        if self.by_vmcs:
            return PRIVILEGES[privilege][0] == "N"
        return not self._handled or PRIVILEGES[privilege] == "R3"

    def _enter(self, cpu: Cpu, event: TraceEvent) -> None:
        """A VM entry: whose VMCS it is, and what was emulated before it."""
        vcpu = self.by_vmcs.get(event.detail[2])
        if vcpu is None:
            return
        cpu.vcpu = (vcpu.vm, f"vCPU {vcpu.number}")
        rates = self.rates[vcpu.vm]
        rates.emulated += event.emulated - rates.emulated_before
        rates.emulated_before = event.emulated

    def _count(self, cpu: Cpu, event: TraceEvent) -> None:
        """Count the instructions of a guest up to an event, and an exit."""
        rates = self.rates.get(cpu.vcpu[0])
        if rates is None or not self._handled:
            return
        self._windows(cpu.vcpu[0], rates, event.cycle)
        rates.executed += event.retired - cpu.retired
        rates.exits += not self._runs_guest(event.to) and event.kind != trace.STOP

    def _windows(self, vm: str, rates: Rates, now: int) -> None:
        """Write the counters of the window that has ended, and that nothing happened in those after it."""
        if now < rates.start + self.window:
            return
        self._write_window(vm, rates, self.window)
        rates.start += self.window
        if now >= rates.start + self.window:
            self.writer.counter((vm, EXITS), rates.start, 0.0)
            rates.start = now - (now - rates.start) % self.window

    def _write_window(self, vm: str, rates: Rates, cycles: int) -> None:
        assert self.machine is not None
        self.writer.counter((vm, EXITS), rates.start, rates.exits * self.machine.clock_hz / cycles)
        instructions = rates.executed + rates.emulated
        if self.by_vmcs and instructions:
            self.writer.counter((vm, EFFICIENCY), rates.start, rates.executed / instructions)
        rates.exits = rates.executed = rates.emulated = 0

    def _halted(self, cpu: Cpu, event: TraceEvent) -> None:
        """A wait that is over: a slice of its own on the vCPU's track."""
        start = max(event.cycle - event.cycles, cpu.since)
        self.writer.begin(cpu.vcpu, f"halted in {PRIVILEGES[event.privilege]}", start, {})
        self.writer.end(cpu.vcpu, event.cycle)

    def _state(self, cpu: Cpu) -> Path:
        """The track of the privilege state that a CPU is in."""
        assert cpu.state is not None
        return (*cpu.vcpu, PRIVILEGES[cpu.state])

    def _arguments(self, event: TraceEvent) -> Arguments:
        """What is known of a transition beside its name."""
        found: dict[str, int | str] = {"cpu": event.vcpu}
        if event.detail:
            found["rip"] = f"{event.detail[0] & (1 << 64) - 1:#x}"
        words = meaning(event)
        return {**found, "detail": words} if words else found
