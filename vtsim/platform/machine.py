"""The machine: the one object that knows all parts, and the SimPy process that drives the engine.

The engine computes up to the next scheduled event; the process lets that much time pass, then acts on why the engine
stopped. Time is cycles of the base clock.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any, Final, Protocol

import simpy
from attrs import define, evolve, field

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.base.trace import COLUMNS, TraceEvent, TraceSink
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.engine import Engine, Geometry, stop_name
from vtsim.cpu.kernels import events as ev
from vtsim.cpu.kernels.system import PORT_COUNTER, PORT_LATCH
from vtsim.cpu.profile import Profile, load_profile
from vtsim.guest.build import build_guest
from vtsim.guest.machine_view import Start
from vtsim.platform.outcome import Outcome, VmOutcome, check_laws, owner_counts
from vtsim.platform.spec import Scenario, VmSpec
from vtsim.vmm.build import build_hypervisor

SLICE: Final = 1 << 24  # cycles between two looks at the world; fixed, because slices are seen by several CPUs
MSR_SLOTS: Final = {
    0xC0000081: s.MSR_STAR,
    0xC0000082: s.MSR_LSTAR,
    0xC0000083: s.MSR_CSTAR,
    0xC0000084: s.MSR_FMASK,
    0xC0000102: s.MSR_KERNEL_GS_BASE,
    0xC0000103: s.MSR_TSC_AUX,
}
PM_TIMER: Final = range(0x608, 0x60C)
ELCR: Final = range(0x4D0, 0x4D2)


class Progress(Protocol):
    """Who is told how far a run is, and says whether it goes on."""

    def __call__(self, stage: str, done: float, instructions: int) -> bool:
        """`done` is 0 to 1 within the stage; returning False asks for a partial result."""
        ...


@define(eq=False)
class NativeMemory:
    """Physical memory as a guest without a hypervisor sees it: frame numbers are host frame numbers."""

    engine: Engine
    size: int

    def frame(self, gfn: int) -> int:
        return gfn

    def contents(self, gfn: int, kind: int) -> Any:
        return self.engine.contents(gfn, kind)

    def store(self, gpa: int, value: int) -> None:
        self.engine.store(gpa, value)


@define(eq=False)
class Vm:
    """What the platform keeps of a VM."""

    spec: VmSpec
    owner: int
    finished_at: int | None = None
    stopped: str | None = None


def geometry(scenario: Scenario, vms: Sequence[VmSpec]) -> Geometry:
    """Arenas that the scenario cannot outgrow. Unused parts cost no host memory."""
    memory = scenario.machine.memory
    frames = memory // 4096
    replays = any(type(phase).__name__ == "ReplaySpec" for vm in vms for p in vm.guest.processes for phase in p.phases)
    return Geometry(
        cpus=scenario.machine.cpus,
        memory_bytes=memory,
        pool_pages=frames // 512 * 6 + min(frames, 1 << 18) + 8192,
        code_pages=384,
        rows=1 << 21 if replays else 1 << 17,
        owners=len(vms) + 2,
        extra_words=1 << 22,
    )


@define(eq=False)
class Machine:
    """A scenario's machine with its hypervisor and guests, ready to run."""

    scenario: Scenario
    trace: TraceSink | None = None
    progress: Progress | None = None
    vms: list[Vm] = field(init=False)
    profile: Profile = field(init=False)
    engine: Engine = field(init=False)
    clock: simpy.Environment = field(factory=simpy.Environment, init=False)
    partial: bool = field(default=False, init=False)
    wall_s: float = field(default=0.0, init=False)
    hypervisor: Any = field(default=None, init=False)
    approximations: list[str] = field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        machine = self.scenario.machine
        self.profile = load_profile(machine.profile).with_overrides(dict(machine.cpu))
        self.engine = Engine(self.profile, geometry(self.scenario, self.scenario.vms))
        self.engine.cpus[:, s.WORK_SCALE] = int(self.scenario.run.work_scale)
        for port in PM_TIMER:
            self.engine.port(port, PORT_COUNTER)
        for port in ELCR:
            self.engine.port(port, PORT_LATCH)
        self.vms = [Vm(spec, self.engine.owner(spec.name)) for spec in self.scenario.vms]
        if self.scenario.vmm.technique == "native":
            self._start_natively()
        else:
            self.hypervisor = build_hypervisor(self.scenario, self.profile, self.engine)
        if self.trace is not None and self.trace.kinds:
            self.engine.cpus[:, s.TRACE_ON] = 1

    def _start_natively(self) -> None:
        """The only guest runs in root mode on CPU 0, in place of any hypervisor; its physical memory is the machine's."""
        (vm,) = self.vms
        memory = NativeMemory(self.engine, vm.spec.memory)
        start = build_guest(vm.spec, self.profile, memory, seed=self.scenario.seed)
        m = self.engine.cpus[0]
        m[s.OWNER] = vm.owner
        apply(self.engine, 0, start)

    # --- running --------------------------------------------------------------------------------------------------------
    @property
    def limit(self) -> int:
        """The last cycle of the run."""
        return self.profile.cycles(self.scenario.run.limit)

    @property
    def quantum(self) -> int:
        """Cycles that one CPU may be ahead of another."""
        return self.scenario.machine.quantum or self.profile.cycles(self.profile.latency.cross_cpu_ns)

    def run(self) -> Outcome:
        """Run to the end and report; raises `ModelError` where the model contradicts itself."""
        started = time.perf_counter()
        self.clock.run(until=self.clock.process(self.process()))
        self.wall_s = time.perf_counter() - started
        return self.outcome()

    def process(self) -> Generator[simpy.Event, Any, None]:
        """The SimPy process: compute, let time pass, act."""
        while not self._over():
            until = min(int(self.clock.now) + SLICE, self.limit)
            if self.clock._queue:
                until = max(min(until, int(self.clock.peek())), int(self.clock.now) + 1)
            code, cpu = self.engine.run_all(until, self.quantum)
            reached = until if cpu < 0 else int(self.engine.cpus[cpu][s.CYCLE])
            yield self.clock.timeout(max(reached - int(self.clock.now), 0))
            self._drain_trace()
            if cpu >= 0:
                self._act(code, cpu)
            elif until >= self.limit:
                for vm in self.vms:
                    if vm.finished_at is None:
                        self._finish(vm, until, "time limit")
            if not self._goes_on():
                self.partial = True
                for vm in self.vms:
                    if vm.finished_at is None:
                        self._finish(vm, reached, "interrupted")

    def _over(self) -> bool:
        return all(vm.finished_at is not None for vm in self.vms)

    def _goes_on(self) -> bool:
        if self.progress is None:
            return True
        share = min(int(self.clock.now) / max(self.limit, 1), 1.0)
        return self.progress("native" if self.hypervisor is None else "run", share, int(self.engine.cpus[:, s.RETIRED].sum()))

    def _finish(self, vm: Vm, at: int, why: str | None) -> None:
        vm.finished_at, vm.stopped = at, why

    def _running(self, cpu: int) -> Vm:
        """The VM whose guest runs on a CPU."""
        owner = int(self.engine.cpus[cpu][s.OWNER])
        for vm in self.vms:
            if vm.owner == owner:
                return vm
        raise ModelError("a guest program ended while no guest ran", self.engine.counters())

    def _act(self, code: int, cpu: int) -> None:
        """React to a stop of the engine."""
        m = self.engine.cpus[cpu]
        if code == ev.PROGRAM_END:
            vm = self._running(cpu)
            self._finish(vm, int(m[s.CYCLE]), None)
            self._retire(vm, cpu)
        elif code == ev.TRIPLE_FAULTED:
            vm = self._running(cpu)
            self._finish(vm, int(m[s.CYCLE]), "triple fault")
            self._retire(vm, cpu)
        elif code == ev.PLATFORM_HOOK and self.hypervisor is not None:
            ended = self.hypervisor.platform_hook(cpu, int(m[s.HOOK_NUMBER]))
            if ended is not None:
                name, why = ended
                self._finish(next(vm for vm in self.vms if vm.spec.name == name), int(m[s.CYCLE]), why)
        elif code in (ev.DEVICE_READ, ev.DEVICE_WRITE):
            self._device(cpu, code)
        elif code != ev.TRACE_FULL:
            raise ModelError(f"the engine stopped: {stop_name(code)}", self.engine.counters())

    def _device(self, cpu: int, code: int) -> None:
        """An access to an address where no device of this machine is: reads all ones, writes are lost."""
        m = self.engine.cpus[cpu]
        if code == ev.DEVICE_READ:
            packed = int(m[s.STOP_B])
            size, register = packed & 0xFF, packed >> 8
            if register < 16:
                m[s.GPR + register] = -1 if size == 8 else (1 << (8 * size)) - 1

    def _retire(self, vm: Vm, cpu: int) -> None:
        """Take a finished VM off its CPU: its neighbours go on, or the CPU waits halted for the end of the run."""
        if self._over():
            return
        if self.hypervisor is not None:
            self.hypervisor.retire(vm.spec.name, cpu)

    def _drain_trace(self) -> None:
        """Hand the events recorded since the last slice to whoever wanted them."""
        a = self.engine.arena
        count = int(a[mem.A_TRACE_LENGTH])
        if not count:
            return
        a[mem.A_TRACE_LENGTH] = 0
        if self.trace is None:
            return
        wanted = self.trace.kinds
        rows = a[int(a[mem.A_TRACE]) :][: count * len(COLUMNS)].reshape(count, len(COLUMNS))
        kinds = rows[:, COLUMNS.index("kind")]
        self.trace.take(TraceEvent.from_row(row) for row in rows[((wanted >> kinds) & 1).astype(bool)].tolist())
        if not self.trace.kinds:
            self.engine.cpus[:, s.TRACE_ON] = 0

    # --- the end ---------------------------------------------------------------------------------------------------------
    def outcome(self) -> Outcome:
        """Read the statistics after checking every law."""
        self.engine.check_clock()
        owners = {name: owner_counts(self.engine, name, at) for name, at in self.engine.owners.items()}
        for owner in owners.values():
            check_laws(owner)
        if self.scenario.machine.cpus > 1 and self.quantum > self.profile.cycles(self.profile.latency.cross_cpu_ns):
            self.approximations.append(f"CPUs advance by a quantum of {self.quantum} cycles, more than the smallest latency between them")
        vms = tuple(
            VmOutcome(name=vm.spec.name, cpu=vm.spec.cpu or 0, elapsed=vm.finished_at or 0, stopped=vm.stopped)
            for vm in self.vms
        )
        return Outcome(
            scenario=self.scenario,
            profile=self.profile,
            owners=owners,
            vms=vms,
            elapsed=max(vm.elapsed for vm in vms),
            wall_s=self.wall_s,
            partial=self.partial,
            approximations=tuple(self.approximations),
        )


def apply(engine: Engine, cpu: int, start: Start) -> None:
    """Put a CPU into the state with which a vCPU starts."""
    m = engine.cpus[cpu]
    values = {
        s.RIP: start.rip, s.GPR + s.RSP: start.rsp, s.RFLAGS: start.rflags | 2, s.CR0: start.cr0, s.CR3: start.cr3,
        s.CR4: start.cr4, s.EFER: start.efer, s.IDTR_BASE: start.idtr_base, s.IDTR_LIMIT: start.idtr_limit,
        s.GDTR_BASE: start.gdtr_base, s.GDTR_LIMIT: start.gdtr_limit, s.TR_BASE: start.tr_base,
        s.GS_BASE: start.gs_base, s.FS_BASE: start.fs_base,
    }  # fmt: skip
    for index, value in start.msrs.items():
        values[MSR_SLOTS[index]] = value
    for slot, value in values.items():
        m[slot] = value - (1 << 64) if value >> 63 == 1 else value
    m[s.PRIVILEGE] = o.R3 if start.cpl else o.R0
    m[s.SS_ACCESS_RIGHTS] = 0xC093 | start.cpl << 5
    engine.sync(cpu)


def alone(scenario: Scenario, vm: VmSpec) -> Scenario:
    """The same machine with one of its guests only, natively on CPU 0."""
    machine = evolve(scenario.machine, cpus=1)
    return evolve(scenario, machine=machine, vms=(evolve(vm, cpu=0),))
