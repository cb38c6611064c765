"""From the engine to whoever wants the transitions of a run, with the events that no operation causes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from vtsim.base import memory as mem
from vtsim.base.trace import COLUMNS, STOP, TracedMachine, TracedVcpu, TraceEvent, TraceSink
from vtsim.cpu import accounts as k
from vtsim.cpu import slots as s
from vtsim.cpu.engine import Engine
from vtsim.platform.spec import Scenario

if TYPE_CHECKING:
    from vtsim.vmm.hypervisor import Hypervisor
    from vtsim.vmm.monitor.virtual_cpus import Monitor


@frozen
class Tracing:
    """The trace of one machine; without a sink, or once it wants nothing more, none."""

    engine: Engine
    sink: TraceSink | None

    def drain(self) -> None:
        """Hand the events recorded since the last time to the sink."""
        a = self.engine.arena
        count = int(a[mem.A_TRACE_LENGTH])
        if not count:
            return
        a[mem.A_TRACE_LENGTH] = 0
        if self.sink is None:
            return
        wanted = self.sink.kinds
        rows = a[int(a[mem.A_TRACE]) :][: count * len(COLUMNS)].reshape(count, len(COLUMNS))
        kinds = rows[:, COLUMNS.index("kind")]
        self.sink.take(TraceEvent.from_row(row) for row in rows[((wanted >> kinds) & 1).astype(bool)].tolist())
        if not self.sink.kinds:
            self.engine.cpus[:, s.TRACE_ON] = 0

    def stop(self, cpu: int, before: int, reason: int) -> None:
        """A VM was switched off from outside on a CPU that was in state `before`; with reason -1, the run is over."""
        if self.sink is None or not self.sink.kinds >> STOP & 1:
            return
        m = self.engine.cpus[cpu]
        emulated = int(self.engine.arena[int(m[s.OWNER]) + k.OWN_EMULATED :][:2].sum())
        cycle, to, rip, retired = (int(m[slot]) for slot in (s.CYCLE, s.PRIVILEGE, s.RIP, s.RETIRED))
        self.sink.take([TraceEvent(cycle, cpu, before, to, STOP, reason, 0, (rip,), retired, emulated)])


def traced_machine(scenario: Scenario, clock_hz: int, below: Hypervisor | Monitor | None) -> TracedMachine:
    """What a sink has to know of a machine before it runs."""
    found: list[TracedVcpu] = []
    for each in below.vcpus if below is not None else ():
        number = sum(before.vm == each.name for before in found)
        found.append(TracedVcpu(vm=each.name, number=number, cpu=each.cpu, vmcs=getattr(each, "vmcs", 0) << 12))
    if below is None:
        found = [TracedVcpu(vm=vm.name, number=n, cpu=n) for vm in scenario.vms for n in range(vm.vcpus)]
    return TracedMachine(technique=scenario.vmm.technique, clock_hz=clock_hz, vcpus=tuple(found))
