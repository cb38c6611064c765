"""The machine: the one object that knows all parts, and the SimPy process that drives the engine.

The engine computes up to the next scheduled event; the process lets that much time pass, then acts on why the engine
stopped. Time is cycles of the base clock.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import simpy
from attrs import define, evolve, field

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError, ModelError
from vtsim.base.jit import quiet
from vtsim.base.spec import inside
from vtsim.base.trace import TraceSink
from vtsim.cpu import codes
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Program
from vtsim.cpu.engine import Engine, Geometry, stop_name
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.apic import request
from vtsim.cpu.kernels.ports import PORT_COUNTER, PORT_LATCH, PORT_PLATFORM, PORTS, port_in
from vtsim.cpu.profile import Profile, load_profile
from vtsim.ept.tables import Words
from vtsim.guest.build import build_guest, needs, recorded
from vtsim.guest.file_system import DOORBELL
from vtsim.guest.kernel import layout
from vtsim.guest.machine_view import DmaDevice, DmaMachine, DmaMemory, PhysicalMemory, Space, Start
from vtsim.guest.replay.exits import ReplayedExits, replayed_exits
from vtsim.platform.disk import Disk
from vtsim.platform.dma_spec import DOORBELLS, PAGE, REGISTERS
from vtsim.platform.file_device import FileDevice
from vtsim.platform.file_spec import keeps_file
from vtsim.platform.identity import identify
from vtsim.platform.iommu_spec import requester
from vtsim.platform.outcome import Outcome, VmOutcome, check_laws, owner_counts, sums
from vtsim.platform.spec import MACHINE_ISA, Scenario, VmSpec, driven_by
from vtsim.platform.starved import Starvation
from vtsim.platform.tracing import Tracing, traced_machine
from vtsim.platform.without_effect import without_effect
from vtsim.platform.witness import Wanted, Witnessed, attach, read
from vtsim.platform.witness import words as witness_words
from vtsim.vmcs.events import EXCEPTIONS
from vtsim.vmcs.generations import GENERATIONS
from vtsim.vmm.hypervisor import Guest, Hypervisor
from vtsim.vmm.layout import DEVICE_VECTOR, HOST_SERVER, SERVER_FRAME, V
from vtsim.vmm.memory import VmMemory
from vtsim.vmm.needs import needs as hypervisor_needs
from vtsim.vmm.pci import ADDRESS_PORT, DATA_PORT, NOTHING, configuration
from vtsim.vmm.programs.events import ASSIGNED_BYTES
from vtsim.vmm.programs.ports import FILE_SERVER
from vtsim.vmm.settings import unread_parameters
from vtsim.vmm.swap_disk import PLACE_WORDS, places
from vtsim.vmm.techniques import techniques

if TYPE_CHECKING:
    from vtsim.platform.dma import DmaDevices
    from vtsim.platform.driven import DrivenDevices
    from vtsim.platform.unit_tables import DrivenPort, UnitTables
    from vtsim.vmm.monitor.virtual_cpus import Monitor

VALUE_PAGES: Final = 1 << 16  # frames in which programs may store values beyond what the builders laid out
SLICE: Final = 1 << 24  # cycles between two looks at the world; fixed, because slices are seen by several CPUs
MSR_SLOTS: Final = {
    0x174: s.SYSENTER_CS,
    0x175: s.SYSENTER_ESP,
    0x176: s.SYSENTER_EIP,
    0xC0000081: s.MSR_STAR,
    0xC0000082: s.MSR_LSTAR,
    0xC0000083: s.MSR_CSTAR,
    0xC0000084: s.MSR_FMASK,
    0xC0000102: s.MSR_KERNEL_GS_BASE,
    0xC0000103: s.MSR_TSC_AUX,
}
PM_TIMER: Final = range(0x608, 0x60C)
ELCR: Final = range(0x4D0, 0x4D2)
NOT_LOST: Final = ("time limit", "interrupted")  # ends that say nothing of a guest


class Progress(Protocol):
    """Who is told how far a run is, and says whether it goes on."""

    def __call__(self, stage: str, done: float, instructions: int) -> bool:
        """`done` is 0 to 1 within the stage; returning False asks for a partial result."""
        ...


@runtime_checkable
class Listener(Protocol):
    """A `Progress` that is told at once what a run finds out about its scenario."""

    def remark(self, sentence: str) -> None:
        """Take a sentence that will be among the result's notes."""
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
    memory: PhysicalMemory | None = None
    log: int = 0  # guest-physical address where its kernel writes how its processes ended
    log_lines: tuple[int, ...] = ()  # of which process each line is
    spaces: tuple[Space, ...] = ()
    process_roots: tuple[tuple[int, tuple[int, ...]], ...] = ()  # as in `Start`
    dma: DmaMemory | None = None  # of the devices that its kernel drives
    file_queue: int = 0  # guest-physical address of the queue to the device that has its file, if one has
    texts: tuple[Program, ...] = ()
    finished_at: int | None = None
    stopped: str | None = None


def geometry(scenario: Scenario, profile: Profile) -> Geometry:
    """Arenas that the scenario cannot outgrow. Unused parts cost no host memory."""
    guests = [needs(vm, profile, shadow=on_shadow(scenario), paravirtual=on_direct(scenario)) for vm in scenario.vms]
    more = sum(vm.vcpus - 1 for vm in scenario.vms)
    below = hypervisor_needs(scenario.vmm, [vm.memory for vm in scenario.vms], scenario.machine.memory, more)
    disk = PLACE_WORDS * places([vm.memory for vm in scenario.vms])[-1] if scenario.vmm.swap.on else 0
    return Geometry(
        cpus=scenario.machine.cpus,
        nodes=scenario.machine.nodes,
        threads=scenario.machine.threads,
        memory_bytes=scenario.machine.memory,
        pool_pages=sum(each.pool_pages for each in guests) + below.pool_pages + VALUE_PAGES,
        code_pages=sum(each.code_pages for each in guests) + below.code_pages,
        rows=sum(each.rows for each in guests) + below.rows,
        owners=1 + below.owners,
        extra_words=sum(each.extra_words for each in guests) + disk + 1,
    )


@define(eq=False)
class Machine:
    """A scenario's machine with its hypervisor and guests, ready to run."""

    scenario: Scenario
    trace: TraceSink | None = None
    progress: Progress | None = None
    wanted: Wanted | None = None  # what is logged of what guests see
    vms: list[Vm] = field(init=False)
    profile: Profile = field(init=False)
    engine: Engine = field(init=False)
    clock: simpy.Environment = field(factory=simpy.Environment, init=False)
    interrupted: bool = field(default=False, init=False)
    wall_s: float = field(default=0.0, init=False)
    hypervisor: Hypervisor | None = field(default=None, init=False)  # that uses VT-x
    monitor: Monitor | None = field(default=None, init=False)  # of deprivileged guests
    disk: Disk | None = field(default=None, init=False)
    files: dict[int, FileDevice] = field(factory=dict, init=False)  # by the address of their doorbell
    devices: DmaDevices | None = field(default=None, init=False)  # that have the machine to themselves
    driven: DrivenDevices | None = field(default=None, init=False)  # that the guest drives
    approximations: list[str] = field(factory=list, init=False)
    notes: list[str] = field(factory=list, init=False)
    logs: dict[tuple[str, int], int] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        machine = self.scenario.machine
        self.profile = load_profile(machine.profile).with_overrides(dict(machine.cpu))
        try:
            space = geometry(self.scenario, self.profile)
            logs = 0 if self.wanted is None else witness_words(self.scenario.vms)
            self.engine = Engine(self.profile, evolve(space, extra_words=space.extra_words + logs))
        except MemoryError:
            raise ConfigError(
                "this computer has too little memory to simulate that much",
                field="machine.memory",
                help="give the machine and its VMs less memory, or fewer CPUs",
            ) from None
        identify(self.engine, GENERATIONS[self.profile.vmx.generation].capabilities())
        emulates = techniques[self.scenario.vmm.technique].deprivileged and self.scenario.vmm.on_shadow
        self.engine.cpus[:, s.SENSITIVE_TRAPS] = int(self.scenario.machine.isa == "virtualizable" and emulates)
        self.engine.cpus[:, s.WORK_SCALE] = int(self.scenario.run.work_scale)
        for port in PM_TIMER:
            self.engine.port(port, PORT_COUNTER)
        for port in ELCR:
            self.engine.port(port, PORT_LATCH)
        if machine.devices:
            self.engine.port(ADDRESS_PORT, PORT_LATCH)
            self.engine.port(DATA_PORT, PORT_PLATFORM)
        self.vms = [Vm(spec, self.engine.owner(spec.name)) for spec in self.scenario.vms]
        if self.scenario.dma and not self.scenario.vms:
            from vtsim.platform.dma import DmaDevices  # whose kernels other machines need not load

            self.devices = DmaDevices(
                self.scenario, self.engine, self.clock, self.profile.clock_hz, self.limit, self._devices_go_on
            )
        elif self.scenario.vmm.technique == "native":
            self._start_natively()
        else:
            self._start_virtualized()
        if self.wanted is not None:
            self.logs = attach(self, self.engine.extra + space.extra_words, self.wanted)
        if self.trace is not None and self.trace.kinds:
            self.trace.begin(traced_machine(self.scenario, self.profile.clock_hz, self.below))
            self.engine.cpus[:, s.TRACE_ON] = 1

    def _start_natively(self) -> None:
        """The only guest runs in root mode from CPU 0 on, in place of a hypervisor, in the machine's own memory."""
        (vm,) = self.vms
        memory = NativeMemory(self.engine, vm.spec.memory)
        first = self._build(vm, memory)
        for cpu, start in enumerate((first, *first.others)):
            self.engine.cpus[cpu][s.OWNER] = vm.owner
            apply(self.engine, cpu, start)
        self.engine.cpus[len(first.others) + 1 :, s.HALTED] = 1
        if vm.file_queue:
            self._serve_file(vm, memory, DOORBELL, 0, layout.FILE_VECTOR)
        if first.dma is not None:
            from vtsim.platform.unit_tables import native

            self._drive(*native(first.dma, memory))

    def _drive(self, ports: Sequence[DrivenPort], tables: UnitTables) -> None:
        from vtsim.platform.driven import DrivenDevices  # whose kernels other machines need not load

        self.driven = DrivenDevices(self.scenario, self.engine, self.clock, self.profile.clock_hz, ports, tables)

    def _start_virtualized(self) -> None:
        """Every CPU boots the hypervisor, which starts its guests."""
        scenario, extra = self.scenario, 0
        guests = []
        for vm in self.vms:
            spec, build = vm.spec, partial(self._build, vm, extra=extra)
            extra += needs(spec, self.profile, shadow=on_shadow(scenario)).extra_words
            guests.append(
                Guest(
                    name=spec.name,
                    cpu=spec.cpu or 0,
                    memory=spec.memory,
                    build=build,
                    devices=(*spec.devices, *([FILE_SERVER] if keeps_file(spec) else [])),
                    assigned=assigned_to(scenario, spec),
                    viommu=spec.viommu if driven_by(spec) else "none",
                    recorded=recorded(spec.guest, self.profile, shadow=on_shadow(scenario)) is not None,
                    cpus=spec.cpus,
                )
            )
        lay_out = techniques[scenario.vmm.technique].build
        assert lay_out is not None
        below = lay_out(
            vmm=scenario.vmm, profile=self.profile, engine=self.engine, guests=guests, seed=scenario.seed,
            shuffled=self._shuffled,
        )  # fmt: skip
        if not isinstance(below, Hypervisor):
            self.monitor = below
            return
        self.hypervisor = below
        if self.scenario.dma:
            from vtsim.platform.unit_tables import assigned

            self._drive(*assigned(below, [(vm.spec.name, vm.dma) for vm in self.vms if vm.dma is not None]))
        self._serve_files(below)
        if scenario.vmm.swap.on:
            sizes = [vm.memory for vm in scenario.vms]
            self.disk = Disk.of(self.hypervisor, self.clock, self.engine.extra + extra, sizes)

    def _serve_files(self, hypervisor: Hypervisor) -> None:
        """Each VM whose file is written has a server, whose message comes behind those of devices that are assigned."""
        number = sum(len(assigned_to(self.scenario, vm.spec)) for vm in self.vms)
        for vcpu in (vcpu for vcpu in hypervisor.vcpus if vcpu.index == 0):
            vm = self._named(vcpu.name)
            if not vm.file_queue:
                continue
            doorbell = (SERVER_FRAME << mem.PAGE_SHIFT) + 8 * len(self.files)
            row = hypervisor.path.addresses["assigned"] + ASSIGNED_BYTES * number
            for word, value in enumerate((vcpu.address, layout.FILE_VECTOR)):
                hypervisor.host.store(row + 8 * word, value)
            hypervisor.host.store(vcpu.address + V["SERVER"], HOST_SERVER + doorbell % mem.PAGE_BYTES)
            self._serve_file(vm, vcpu.memory, doorbell, vcpu.cpu, DEVICE_VECTOR + number)
            number += 1

    def _serve_file(self, vm: Vm, memory: PhysicalMemory, doorbell: int, cpu: int, vector: int) -> None:
        system, m = vm.spec.guest.kernel.file_system, self.engine.cpus[cpu]

        def interrupt() -> None:
            with quiet():
                request(m, self.engine.arena, vector)

        self.files[doorbell] = FileDevice(
            self.engine, self.clock, memory, vm.file_queue, self.profile.cycles(system.write),
            simpy.Resource(self.clock, system.at_once), interrupt,
        )  # fmt: skip

    @property
    def below(self) -> Hypervisor | Monitor | None:
        """Who runs the guests, if they do not run natively."""
        return self.hypervisor or self.monitor

    def _build(self, vm: Vm, memory: PhysicalMemory, *, extra: int = 0) -> Start:
        """Build a VM's guest in its memory."""
        try:
            start = build_guest(
                vm.spec, self.profile, memory, seed=self.scenario.seed, shuffled=self._shuffled, extra=extra,
                shadow=on_shadow(self.scenario), direct=getattr(memory, "direct", None),
                events=self.scenario.vmm.technique == "hardware" and self.scenario.vmm.pv.events,
                dma=dma_machine(self.scenario, vm.spec) if self.scenario.dma else None,
                views=self.scenario.vmm.views if self.scenario.vmm.technique == "hardware" else 1,
                foreign=vm.spec.isa != MACHINE_ISA and not techniques[self.scenario.vmm.technique].in_software,
            )  # fmt: skip
        except ConfigError as error:
            raise inside("vms", inside(str(self.vms.index(vm)), error)) from None
        vm.memory, vm.log, vm.log_lines = memory, start.log, start.log_lines
        vm.spaces, vm.dma, vm.texts, vm.file_queue = start.spaces, start.dma, start.texts, start.file_queue
        vm.process_roots = start.process_roots
        return start

    def witnessed(self) -> dict[tuple[str, int], Witnessed]:
        """What every vCPU saw, where that was wanted."""
        return read(self, self.logs)

    @property
    def tracing(self) -> Tracing:
        """What hands transitions on."""
        return Tracing(self.engine, self.trace)

    @property
    def _shuffled(self) -> bool:
        return self.scenario.machine.frames == "shuffled"

    # --- running --------------------------------------------------------------------------------------------
    @property
    def limit(self) -> int:
        """The last cycle of the run."""
        return self.profile.cycles(self.scenario.run.limit)

    @property
    def quantum(self) -> int:
        """Cycles that one CPU may be ahead of another."""
        return self.scenario.machine.quantum or self.smallest_latency

    @property
    def smallest_latency(self) -> int:
        """Cycles in which one CPU can hear of another at the earliest: by an interrupt, or by a word of shared memory.

        A line of another CPU's cache takes no less than a load of what they share.
        """
        profile, shared, scenario = self.profile, self.profile.cache.l3, self.scenario
        by_interrupt = profile.cycles(profile.latency.cross_cpu_ns)
        if not scenario.vmm.memory.buddy and all(vm.vcpus == 1 for vm in scenario.vms):
            return by_interrupt
        by_memory = shared.hit_cycles if shared.bytes else profile.cycles(profile.dram.local_ns)
        return min(by_interrupt, max(by_memory, 1))

    def run(self) -> Outcome:
        """Run to the end and report; raises `ModelError` where the model contradicts itself."""
        ends: simpy.Event
        if self.devices is not None:
            self.devices.load()
            ends = self.devices.done
        else:
            self.engine.run_all(0, self.quantum)  # loads or compiles the loop, so that the rate is that of simulating
            ends = self.clock.process(self.process())
        started = time.perf_counter()
        self.clock.run(until=ends)
        self.wall_s = time.perf_counter() - started
        for cpu, m in enumerate(self.engine.cpus):
            self.tracing.stop(cpu, int(m[s.PRIVILEGE]), -1)
        return self.outcome()

    def process(self) -> Generator[simpy.Event, Any, None]:
        """The SimPy process: compute, let time pass, act."""
        starvation = Starvation(self.engine, self.scenario)
        while not self._over():
            until = min(int(self.clock.now) + SLICE, self.limit)
            if self.clock._queue:
                until = max(min(until, int(self.clock.peek())), int(self.clock.now) + 1)
            code, cpu = self.engine.run_all(until, self.quantum)
            reached = until if cpu < 0 else int(self.engine.cpus[cpu][s.CYCLE])
            yield self.clock.timeout(max(reached - int(self.clock.now), 0))
            self.tracing.drain()
            if cpu >= 0:
                self._act(code, cpu)
            elif until >= self.limit:
                for vm in self.vms:
                    if vm.finished_at is None:
                        self._finish(vm, until, NOT_LOST[0])
            if not self._goes_on():
                self.interrupted = True
            stopped = self.interrupted or until >= self.limit
            for sentence in starvation.look(int(self.clock.now), last=stopped):
                self._remark(sentence)
            if self.interrupted:
                for vm in self.vms:
                    if vm.finished_at is None:
                        self._finish(vm, reached, NOT_LOST[1])

    def _over(self) -> bool:
        return all(vm.finished_at is not None for vm in self.vms)

    def _goes_on(self) -> bool:
        if self.progress is None:
            return True
        share = min(int(self.clock.now) / max(self.limit, 1), 1.0)
        stage = "native" if self.below is None else "run"
        return self.progress(stage, share, int(self.engine.cpus[:, s.RETIRED].sum()))

    def _remark(self, sentence: str) -> None:
        self.notes.append(sentence)
        if isinstance(self.progress, Listener):
            self.progress.remark(sentence)

    def _devices_go_on(self) -> bool:
        self.interrupted = not self._goes_on()
        return not self.interrupted

    def _finish(self, vm: Vm, at: int, why: str | None) -> None:
        vm.finished_at, vm.stopped = at, why or "; ".join(self._killed(vm)) or None

    def _killed(self, vm: Vm) -> Iterator[str]:
        """From the log of the guest's kernel: why it stopped at boot, or which processes it ended before their time."""
        for number, of in enumerate(vm.log_lines):
            process = vm.spec.guest.processes[of]
            line = [self._word(vm, vm.log + number * layout.LOG_BYTES + word) for word in layout.LOG_LINE]
            reason, vector, _, rip, cr2, _, cause, killed = line
            who = f"process {process.name!r} was"
            if number >= len(vm.spec.guest.processes) and process.threads == 1:
                who = f"a child of process {process.name!r} was"
                if killed > 1:
                    who = f"{killed} children of process {process.name!r} were killed; the last was"
            elif reason == layout.NO_INTERFACE:
                yield layout.REASONS[reason]
                return
            elif reason == layout.REFUSED:
                yield f"{who} {layout.REASONS[reason]}"
            if killed and cause in (layout.NO_MEMORY, layout.DEVICE_GONE):
                yield f"{who} {layout.REASONS[cause]}"
            elif killed:
                fault = EXCEPTIONS[vector] + (f" on address {cr2:#x}" if EXCEPTIONS[vector] == "#PF" else "")
                yield f"{who} killed by {fault}, rip {rip:#x}"

    def _word(self, vm: Vm, gpa: int) -> int:
        """A word of a guest's memory."""
        assert vm.memory is not None
        if self.disk is not None and isinstance(vm.memory, VmMemory):
            here = vm.memory.peek(gpa)
            return (self.disk.word(self.vms.index(vm), gpa) if here is None else here) & (1 << 64) - 1
        return self.engine.load(vm.memory.frame(gpa >> 12) << 12 | gpa & 0xFFF) & (1 << 64) - 1

    def _act(self, code: int, cpu: int) -> None:
        """React to a stop of the engine."""
        m = self.engine.cpus[cpu]
        at = int(m[s.CYCLE])
        if code == codes.PROGRAM_END and self.below is None:
            self._finish(self.vms[0], at, None)
        elif code == codes.TRIPLE_FAULTED and self.below is None:
            self._finish(self.vms[0], at, "triple fault")
        elif code == codes.PROGRAM_END and self.below is not None:
            if self.below.in_guest(cpu):
                before = int(m[s.PRIVILEGE])
                name = self.below.finish(cpu).name
                self.tracing.stop(cpu, before, code)
                self._finish(self._named(name), at, None)
            else:
                self._park(cpu, at)
        elif code in (codes.DEVICE_READ, codes.DEVICE_WRITE):
            self._device(cpu, code)
        elif code in (codes.PORT_READ, codes.PORT_WRITE):
            self._port(cpu, code)
        elif code == codes.PLATFORM_HOOK and self.monitor is not None:
            self.monitor.hook(cpu, int(m[s.HOOK_NUMBER]))
        elif code != codes.TRACE_FULL:
            raise ModelError(f"the engine stopped: {stop_name(code)}", self.engine.counters())

    def _named(self, name: str) -> Vm:
        return next(vm for vm in self.vms if vm.spec.name == name)

    def _park(self, cpu: int, at: int) -> None:
        """No VM is left on a CPU: those that died are reported, and it waits halted for the end of the run."""
        assert self.below is not None
        for name, why in self.below.deaths(cpu):
            vm = self._named(name)
            if vm.finished_at is None:
                self._finish(vm, at, why or "the hypervisor stopped")
        m = self.engine.cpus[cpu]
        m[s.HALTED], m[s.APIC_DEADLINE] = 1, codes.FOREVER

    def _device(self, cpu: int, code: int) -> None:
        """An access to an address where no device of this machine is: reads all ones, writes are lost."""
        m = self.engine.cpus[cpu]
        packed = int(m[s.STOP_B])
        size, register = packed & 0xFF, packed >> 8
        if self.driven is not None and self.driven.answers(int(m[s.STOP_A])):
            if code == codes.DEVICE_WRITE:
                self.driven.write(int(m[s.STOP_A]), size, int(m[s.STOP_C]))
            else:
                m[s.GPR + register] = mem.signed(self.driven.read(int(m[s.STOP_A]), size))
            return
        if code == codes.DEVICE_WRITE and (device := self.files.get(int(m[s.STOP_A]))):
            device.ring()
        if self.disk is not None and code == codes.DEVICE_WRITE and self.disk.answers(int(m[s.STOP_A])):
            self.disk.ring(int(m[s.STOP_A]), int(m[s.STOP_C]))
        if code == codes.DEVICE_READ and register < 16:
            m[s.GPR + register] = -1 if size == 8 else (1 << (8 * size)) - 1

    def _port(self, cpu: int, code: int) -> None:
        """An access to the window to configuration space: devices of the machine say what they are, and stay it."""
        m = self.engine.cpus[cpu]
        if code == codes.PORT_WRITE:
            return
        latch = int(self.engine.arena[int(self.engine.arena[mem.A_PORTS]) + PORTS + ADDRESS_PORT])
        wide = int(m[s.STOP_B]) == 4
        value = configuration(self.scenario.machine.devices).get(latch, NOTHING) if wide else NOTHING
        with quiet():
            port_in(m, self.engine.arena, value)

    # --- the end --------------------------------------------------------------------------------------------
    def outcome(self) -> Outcome:
        """Read the statistics after checking every law."""
        self.engine.check_clock()
        if self.monitor is not None:
            self.monitor.settle()
        owners = {name: owner_counts(self.engine, name, at) for name, at in self.engine.owners.items()}
        clusters = self._clusters()
        for name, done in clusters.items():
            kernel, process = owners[name].emulated
            owners[name] = evolve(owners[name], emulated=(kernel + done["instructions"], process))
        for owner in owners.values():
            check_laws(owner)
        if self.scenario.vmm.paging == "agile":
            self.approximations.append("agile paging supposes a walker that no processor has")
        if self.scenario.machine.cpus > 1 and self.quantum > self.smallest_latency:
            self.approximations.append(
                f"CPUs advance by a quantum of {self.quantum} cycles; "
                f"the smallest latency between them is {self.smallest_latency}"
            )
        devices = self.devices or self.driven
        vms = tuple(
            VmOutcome(
                name=vm.spec.name,
                cpu=vm.spec.cpu or 0,
                elapsed=vm.finished_at or 0,
                stopped=vm.stopped,
                **self._counted_of(vm),
            )
            for vm in self.vms
        )
        return Outcome(
            scenario=self.scenario,
            profile=self.profile,
            owners=owners,
            vms=vms,
            elapsed=max((vm.elapsed for vm in vms), default=int(self.clock.now)),
            wall_s=self.wall_s,
            partial=self.interrupted,
            approximations=tuple(self.approximations),
            notes=(*self.notes, *self._lost(), *self._without_effect()),
            replayed=self._replayed(),
            memory=self.hypervisor.sharing() if self.hypervisor is not None else {},
            dma=() if devices is None else devices.outcome(),
            iommu=None if devices is None else devices.unit.statistics(),
            translations=None if self.monitor is None else self.monitor.translations(),
            clusters=sums(clusters.values()) if clusters else None,
            monitor=None if self.monitor is None else self.monitor.statistics(),
            hypercalls=None if self.below is None else self.below.hypercalls(),
            software=None if self.monitor is None else self.monitor.software(),
        )

    def _lost(self) -> Iterator[str]:
        """Why a guest may have got lost under a monitor that does not see all that it should."""
        scenario = self.scenario
        if scenario.vmm.technique != "trap-and-emulate" or scenario.machine.isa != "x86":
            return
        if any(vm.stopped not in (None, *NOT_LOST) for vm in self.vms):
            yield (
                "sensitive operations of x86 do not trap in ring 3, and guests get lost; "
                "machine.isa can be virtualizable"
            )

    def _without_effect(self) -> Iterator[str]:
        """What the scenario says in vain."""
        for path, reason in without_effect(self.scenario, self.profile):
            yield f"{path} has no effect here: {reason}"
        set_in_vain = [name for name, _ in self.scenario.vmm.parameters] if self.monitor is not None else []
        if self.hypervisor is not None:
            set_in_vain = unread_parameters(self.hypervisor.path)
        for name in set_in_vain:
            yield f"vmm.parameters.{name} has no effect here: this hypervisor's programs do not ask for it"

    def _clusters(self) -> dict[str, dict[str, int]]:
        """What exit clusters have done, by VM; nothing where they are off."""
        if self.hypervisor is None or not self.scenario.vmm.features.exit_clustering:
            return {}
        return {vcpu.name: self.hypervisor.clusters(vcpu) for vcpu in self.hypervisor.vcpus}

    def _counted_of(self, vm: Vm) -> dict[str, Any]:
        """What the hypervisor counted of a VM's memory and of its shadow pages."""
        hypervisor = self.hypervisor
        if hypervisor is None:
            return {}
        first = next(vcpu for vcpu in hypervisor.vcpus if vcpu.name == vm.spec.name)
        return {"memory": hypervisor.memory_statistics(first), "shadow": hypervisor.shadow_statistics(first)}

    def _replayed(self) -> ReplayedExits | None:
        """The exits of a recorded guest that ran to its end, row by row of its recording."""
        if self.hypervisor is None or len(self.vms) > 1 or self.vms[0].stopped:
            return None
        recording = recorded(self.vms[0].spec.guest, self.profile, shadow=on_shadow(self.scenario))
        return None if recording is None else replayed_exits(self.engine, recording)


def on_shadow(scenario: Scenario) -> bool:
    """Do the guests run on shadow tables?"""
    return scenario.vmm.technique != "native" and scenario.vmm.paging == "shadow"


def on_direct(scenario: Scenario) -> bool:
    """Do the guests have direct tables?"""
    return scenario.vmm.technique != "native" and scenario.vmm.paging == "direct-pv"


def apply(engine: Engine, cpu: int, start: Start) -> None:
    """Put a CPU into the state with which a vCPU starts."""
    m = engine.cpus[cpu]
    values = {
        s.RIP: start.rip, s.GPR + s.RSP: start.rsp, s.RFLAGS: start.rflags | 2, s.CR0: start.cr0, s.CR3: start.cr3,
        s.CR4: start.cr4, s.EFER: start.efer, s.IDTR_BASE: start.idtr_base, s.IDTR_LIMIT: start.idtr_limit,
        s.GDTR_BASE: start.gdtr_base, s.GDTR_LIMIT: start.gdtr_limit, s.TR_BASE: start.tr_base,
        s.GS_BASE: start.gs_base, s.FS_BASE: start.fs_base, s.TR_SELECTOR: start.tr_selector,
        s.CS_SELECTOR: 0x10 | start.cpl, s.SS_SELECTOR: 0x18 | start.cpl,
    }  # fmt: skip
    for index, value in start.msrs.items():
        values[MSR_SLOTS[index]] = value
    for slot, value in values.items():
        m[slot] = mem.signed(value)
    m[s.PRIVILEGE] = o.R3 if start.cpl else o.R0
    m[s.SS_ACCESS_RIGHTS] = 0xC093 | start.cpl << 5
    if start.protected:
        _protect(m, start)
    engine.sync(cpu)


def _protect(m: Words, start: Start) -> None:
    """Put a CPU into 32-bit protected mode: flat segments that every ring may use, a 32-bit TSS, PDPTEs."""
    m[modes.RIGHTS : modes.RIGHTS + modes.LDTR] = 0xC0F3
    m[modes.LIMITS_AT : modes.LIMITS_AT + modes.LDTR] = modes.LOW32
    m[s.SS_ACCESS_RIGHTS], m[s.CS_ACCESS_RIGHTS] = 0xC093, 0xC09B
    m[modes.RIGHTS + modes.TR], m[modes.LIMITS_AT + modes.TR] = 0x8B, 0x67
    m[s.PDPTE0 : s.PDPTE0 + len(start.pdptes)] = start.pdptes
    modes.set_mode(m)


def alone(scenario: Scenario, vm: VmSpec) -> Scenario:
    """The same machine with one of its guests only, natively from CPU 0 on."""
    machine = scenario.machine.with_cpus(vm.vcpus)
    cpus = tuple(range(vm.vcpus)) if vm.vcpus > 1 else ()
    mine = tuple(each for each in scenario.dma if each.name in driven_by(vm))
    return evolve(scenario, machine=machine, vms=(evolve(vm, cpu=0, cpus=cpus),), dma=mine)


def assigned_to(scenario: Scenario, vm: VmSpec) -> tuple[int, ...]:
    """The frames of the registers of a VM's own devices."""
    mine = driven_by(vm)
    return tuple(
        (DOORBELLS >> mem.PAGE_SHIFT) + number for number, each in enumerate(scenario.dma) if each.name in mine
    )


def dma_machine(scenario: Scenario, vm: VmSpec) -> DmaMachine:
    """What the kernel of a VM finds of devices and of the remapping unit."""
    iommu, native = scenario.machine.iommu, scenario.vmm.technique == "native"
    mode = iommu.mode if native or vm.viommu != "none" else "off"
    return DmaMachine(
        devices=tuple(
            DmaDevice(
                name=each.name,
                source=requester(each.source),
                doorbell=DOORBELLS + PAGE * number,
                ats=each.requests == "ats" and each.trusted,
                pri=each.page_requests > 0 and each.trusted,
            )
            for number, each in enumerate(scenario.dma)
            if each.name in driven_by(vm)
        ),
        registers=REGISTERS,
        translates=mode == "translate",
        remaps=mode != "off",
        coherent=iommu.coherent or not native,
        write_buffers=iommu.write_buffers and native,
        caching_mode=not native and vm.viommu == "caching",
        first_level=any(each.page_requests for each in scenario.dma) if native else vm.viommu == "nested",
    )
