"""A machine with VMs whose guests are a few assembled ops, run without the platform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.base.jit import quiet
from vtsim.cpu import accounts as k
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.codes import HORIZON, PROGRAM_END
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import Profile, load_profile
from vtsim.ept.tables import KERNEL_PAGE, PAGING, Table
from vtsim.guest.machine_view import PhysicalMemory, Start
from vtsim.vmcs.fields import SLOT
from vtsim.vmcs.reasons import REASON
from vtsim.vmm.build import Guest, Hypervisor, Vcpu, build_hypervisor, needs
from vtsim.vmm.layout import V
from vtsim.vmm.memory_spec import HostMemorySpec
from vtsim.vmm.spec import EptSpec, VmmSpec

MIB = 1 << 20
CODE, DATA, STACK, IDT, TSS = 0x1000_0000, 0x2000_0000, 0x3000_0000, 0x4000_0000, 0x4000_1000
FIRST_GFN = 0x100
Body = Callable[[Assembler], None]


def tiny_guest(
    body: Body, *, pages: int = 4, gates: Sequence[int] = (), devices: Sequence[int] = (), typed: int = 0
) -> Any:
    """A guest in ring 0 that runs `body` (ends in STOP); `pages` of data; each gate leads to the label gate_N.

    `typed`: what entries of the data pages say of memory types.
    """

    def build(memory: PhysicalMemory) -> Start:
        following = iter(range(FIRST_GFN, 1 << 20))
        take: Callable[[], int] = lambda: next(following)  # noqa: E731

        def words(gfn: int) -> np.ndarray:
            return memory.contents(gfn, mem.TABLE)

        root = take()
        words(root)
        table = Table(root=root, format=PAGING, take=take, words=words)
        a = Assembler("tiny guest", CODE)
        body(a)
        program = a.assemble()
        frames = {}
        for page, _ in program.pages():
            gfn = take()
            table.map(page, [gfn], KERNEL_PAGE)
            frames[page] = memory.frame(gfn)
        memory.engine.place(program, frames.__getitem__)
        table.map(STACK - 4096, [take()], KERNEL_PAGE)
        idt = take()
        table.map(IDT, [idt], KERNEL_PAGE)
        table.map(TSS, [take()], KERNEL_PAGE)
        table.map(DATA, [take() + 64 for _ in range(pages)], KERNEL_PAGE | typed)
        for n, gpa in enumerate(devices):
            table.map(DATA + (1 << 30) + 4096 * n, [gpa >> 12], KERNEL_PAGE)
        for vector in gates:
            handler = program.labels[f"gate_{vector}"]
            low = (handler & 0xFFFF) | 0x10 << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48
            memory.store(idt * 4096 + 16 * vector, low)
            memory.store(idt * 4096 + 16 * vector + 8, handler >> 32)
        return Start(
            rip=CODE, rsp=STACK, rflags=2, cr0=0x80050033, cr3=root << 12, cr4=0xA0, efer=0xD01,
            idtr_base=IDT, idtr_limit=0xFFF, gdtr_base=0, gdtr_limit=0x7F, tr_base=TSS, cpl=0, msrs={},
            gs_base=0, fs_base=0, roots=(root << 12,),
        )  # fmt: skip

    return build


@define(eq=False)
class Machine:
    """An engine with a hypervisor in it; `probe` methods read, `run` changes."""

    engine: Engine
    hypervisor: Hypervisor
    finished: list[str] = field(factory=list)

    def run(self, cpu: int = 0, until: int = 1 << 40) -> Machine:
        """Run one CPU until no VM of it is left, or until a cycle."""
        while True:
            code = self.engine.run(cpu, until=until)
            if code == PROGRAM_END and self.engine.cpus[cpu][s.NONROOT]:
                self.finished.append(self.hypervisor.finish(cpu).name)
                continue
            assert code in (PROGRAM_END, HORIZON), self.engine.counters()
            self.engine.check_clock()
            return self

    @property
    def vcpu(self) -> Vcpu:
        return self.hypervisor.vcpus[0]

    def exits(self, reason: str = "", vm: str = "vm0") -> Any:
        """How many exits of a reason; without one, all of them by name."""
        at = self.engine.owners[vm] + k.OWN_EXITS
        counts = {r.name: int(self.engine.arena[at + r.number * k.EXIT_WORDS + k.EXIT_COUNT]) for r in REASON.values()}
        return counts[reason] if reason else {name: n for name, n in counts.items() if n}

    def register(self, number: int, vcpu: Vcpu | None = None) -> int:
        """A general register of the guest as the hypervisor last saved it."""
        vcpu = vcpu or self.vcpu
        return self.hypervisor.host.load(vcpu.address + V["REGISTERS"] + 8 * number)

    def slot(self, name: str) -> int:
        """Where a field stands in a VMCS."""
        return SLOT[name]

    def shadow_cr3(self) -> int:
        """The CR3 that a guest on shadow tables believes in."""
        return self.hypervisor.word(self.vcpu, "SHADOW_CR3")

    def data(self, offset: int, vm: int = 0, page: int = 0, root: int = 0) -> int:
        """A word of the guest's data pages."""
        vcpu = self.hypervisor.vcpus[vm]
        root = (root or self.field(vcpu, "GUEST_CR3")) >> 12
        table = Table(root=root, format=PAGING, take=lambda: 0, words=lambda g: vcpu.memory.contents(g, mem.TABLE))
        leaf = table.find(DATA + 4096 * page)
        assert leaf is not None
        return vcpu.memory.load(leaf.frame * 4096 + offset)

    def counter(self, name: str, vm: str = "vm0") -> int:
        """A counter of an owner."""
        names = [row[0] for row in k.COUNTERS]
        return int(self.engine.arena[self.engine.owners[vm] + k.OWN_COUNTERS + names.index(name)])

    def field(self, vcpu: Vcpu, name: str) -> int:
        """A field of a vCPU's VMCS."""
        return int(self.engine.contents(vcpu.vmcs, mem.VMCS_REGION)[SLOT[name]])

    def instructions(self, owner: str, privilege: int) -> int:
        """Instructions that an owner retired in a privilege state."""
        return int(self.engine.arena[self.engine.owners[owner] + k.OWN_INSTRUCTIONS + privilege])

    def cycles(self, owner: str, privilege: int, activity: int) -> int:
        """Cycles charged to an owner in a privilege state for an activity."""
        at = self.engine.owners[owner] + (privilege & 1) * k.RING_STRIDE
        return int(self.engine.arena[at + privilege * ops.ACTIVITY_SLOTS + activity])


def machine(
    *guests: Any,
    personality: str = "kvm",
    profile: str | Profile = "skx-4114",
    cpus: int = 1,
    memory: int = 64 * MIB,
    host_memory: int = 256 * MIB,
    tick_ns: int = 4_000_000,
    nodes: int = 1,
    vcpus: int = 1,
    placement: HostMemorySpec | None = None,
    **options: Any,
) -> Machine:
    """Build a machine with one VM for each guest, on CPUs in turn; one of several vCPUs begins on CPU 0."""
    cpu = load_profile(profile) if isinstance(profile, str) else profile
    ept = {name: options.pop(name) for name in ("page_size", "populate", "accessed_dirty") if name in options}
    settings: dict[str, Any] = {"paging": "ept", "vpid": True, "tpr_shadow": True, "huge_pages": "never"}
    ept.setdefault("accessed_dirty", cpu.vmx.generation in ("skylake-sp", "cascade-lake", "ice-lake-sp"))
    settings["memory"] = placement or HostMemorySpec(allocator="list")
    vmm = VmmSpec(personality=personality, ept=EptSpec(**ept), **{**settings, **options})
    its = tuple(range(vcpus)) if vcpus > 1 else ()
    wants = needs(vmm, [memory] * len(guests), host_memory, (vcpus - 1) * len(guests))
    geometry = Geometry(
        cpus=cpus, memory_bytes=host_memory, pool_pages=wants.pool_pages + 4096, code_pages=wants.code_pages + 16,
        rows=wants.rows + 4096, owners=wants.owners + 1, nodes=nodes,
    )  # fmt: skip
    with quiet():
        engine = Engine(cpu, geometry)
        hypervisor = build_hypervisor(
            vmm=vmm,
            profile=cpu,
            engine=engine,
            tick_ns=tick_ns,
            guests=[
                Guest(
                    name=f"vm{n}",
                    cpu=n % cpus,
                    memory=memory,
                    build=guest,
                    devices=("pm-timer", "testdev"),
                    cpus=its,
                )
                for n, guest in enumerate(guests)
            ],
        )
    return Machine(engine, hypervisor)
