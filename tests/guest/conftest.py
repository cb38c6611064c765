"""A machine that runs one guest natively: guest-physical memory is the machine's own."""

from __future__ import annotations

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import FOREVER
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import Profile, load_profile
from vtsim.guest.build import build_guest, needs
from vtsim.guest.frames import FIRST
from vtsim.guest.kernel import layout
from vtsim.guest.machine_view import Start
from vtsim.guest.spec import GuestSpec, KernelSpec, Phase, ProcessSpec
from vtsim.platform.spec import VmSpec

MIB = 1 << 20
CPU_DATA_GPA = (FIRST + 1) << 12  # the kernel's second frame


@define
class IdentityMemory:
    """Every guest frame is the host frame of the same number."""

    engine: Engine
    size: int

    def frame(self, gfn: int) -> int:
        return gfn

    def contents(self, gfn: int, kind: int) -> NDArray[np.int64]:
        return self.engine.contents(gfn, kind)

    def store(self, gpa: int, value: int) -> None:
        self.engine.store(gpa, value)


def enter(engine: Engine, start: Start, cpu: int = 0) -> None:
    """Put a start state into a logical CPU."""
    m = engine.cpus[cpu]
    slots = {
        s.RIP: start.rip, s.RFLAGS: start.rflags, s.CR0: start.cr0, s.CR3: start.cr3, s.CR4: start.cr4,
        s.EFER: start.efer, s.IDTR_BASE: start.idtr_base, s.IDTR_LIMIT: start.idtr_limit,
        s.GDTR_BASE: start.gdtr_base, s.GDTR_LIMIT: start.gdtr_limit, s.TR_BASE: start.tr_base,
        s.GS_BASE: start.gs_base, s.FS_BASE: start.fs_base, s.GPR + s.RSP: start.rsp,
    }  # fmt: skip
    by_index = {
        0xC0000081: s.MSR_STAR, 0xC0000082: s.MSR_LSTAR, 0xC0000084: s.MSR_FMASK,
        0xC0000102: s.MSR_KERNEL_GS_BASE,
    }  # fmt: skip
    for slot, value in {**slots, **{by_index[i]: v for i, v in start.msrs.items()}}.items():
        m[slot] = value if value < 1 << 63 else value - (1 << 64)
    m[s.ACTIVITY] = o.BOOT
    engine.sync(cpu)


@define
class Harness:
    """A guest on a machine of its own; `issue` runs it, the rest only looks."""

    profile: Profile
    vm: VmSpec
    engine: Engine = field(init=False)
    start: Start = field(init=False)
    shuffled: bool = True
    work_scale: float = 1.0
    seed: int = 1

    def __attrs_post_init__(self) -> None:
        want = needs(self.vm, self.profile)
        self.engine = Engine(
            self.profile,
            Geometry(
                cpus=self.vm.vcpus,
                memory_bytes=self.vm.memory,
                pool_pages=want.pool_pages + 64,
                code_pages=want.code_pages,
                rows=want.rows,
                owners=2,
                trace_rows=64,
                extra_words=want.extra_words,
            ),
        )
        memory = IdentityMemory(self.engine, self.vm.memory)
        self.start = build_guest(
            self.vm, self.profile, memory,
            seed=self.seed, shuffled=self.shuffled, work_scale=self.work_scale,
        )  # fmt: skip
        for cpu, start in enumerate((self.start, *self.start.others)):
            enter(self.engine, start, cpu)

    def issue(self, until: int = FOREVER, ops: int = 1 << 62) -> int:
        """Run; the stop code. Several CPUs run in turns of the smallest latency between them."""
        if self.vm.vcpus > 1:
            return self.engine.run_all(until, self.profile.cycles(self.profile.latency.cross_cpu_ns))[0]
        return self.engine.run(0, until=until, ops=ops)

    @property
    def owner(self) -> int:
        return self.engine.owners["host"]

    def count(self, counter: int) -> int:
        """A counter of the only owner."""
        return int(self.engine.arena[self.owner + counter])

    def instructions(self, privilege: int) -> int:
        """Instructions retired in a privilege state."""
        return self.count(k.OWN_INSTRUCTIONS + privilege)

    def cycles(self, activity: int) -> int:
        """Cycles of an activity, over everything."""
        a = self.engine.arena[self.owner : self.owner + 2 * k.RING_STRIDE]
        return int(a.reshape(-1, o.ACTIVITY_SLOTS)[:, activity].sum())

    def reason(self, process: int = 0) -> int:
        """How a process ended."""
        return self.engine.load(self.start.log + process * layout.LOG_BYTES)

    def log(self, word: int, process: int = 0) -> int:
        """A word of a process's line in the log."""
        return self.engine.load(self.start.log + process * layout.LOG_BYTES + word)

    def cpu_word(self, offset: int) -> int:
        """A per-CPU word of the guest's kernel."""
        return self.engine.load(CPU_DATA_GPA + offset)


def native(
    *processes: tuple[Phase, ...],
    profile: str = "skx-4114",
    memory: int = 64 * MIB,
    work_scale: float = 1.0,
    shuffled: bool = True,
    **kernel: object,
) -> Harness:
    """A guest of some processes, each a tuple of phases; without a tick unless `tick` is given."""
    specs = tuple(ProcessSpec(name=f"p{n}", phases=phases) for n, phases in enumerate(processes))
    options = KernelSpec(**{"tick": 0, **kernel})  # type: ignore[arg-type]
    vm = VmSpec(memory=memory, guest=GuestSpec(kernel=options, processes=specs))
    return Harness(load_profile(profile), vm, shuffled=shuffled, work_scale=work_scale)
