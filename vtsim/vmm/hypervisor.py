"""A hypervisor in a machine, as the platform sees it: its VMs, who runs where, how each ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import define, field, frozen

from vtsim.base import memory as mem
from vtsim.base.jit import quiet
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Program
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.ept.shadow import POOL
from vtsim.ept.spec import ADDRESS
from vtsim.ept.tables import Table
from vtsim.guest.machine_view import PhysicalMemory, Start
from vtsim.vmcs.fields import SLOT
from vtsim.vmcs.reasons import BY_NUMBER
from vtsim.vmm import layout as at
from vtsim.vmm.excuses import EXCUSED
from vtsim.vmm.host import Host
from vtsim.vmm.memory import Pool, VmMemory
from vtsim.vmm.programs.ept import OUT_OF_HOST_MEMORY, OUT_OF_TABLES
from vtsim.vmm.programs.schedule import FINISHED
from vtsim.vmm.registry import Path
from vtsim.vmm.shadow import ShadowPool
from vtsim.vmm.sharing import shared_now

GuestBuilder = Callable[[PhysicalMemory], Start]
SHADOW_STATISTICS: Final = {  # {key of the result: word of the pool}
    "pages_made": "MADE", "pages_reused": "REUSED", "pages_zapped": "ZAPPED", "pages_flooded": "FLOODED",
    "pages_recycled": "EVICTED", "tables_unsynchronized": "LEFT_SYNC", "tables_synchronized": "SYNCHRONIZED",
    "table_writes": "WRITES", "entries_filled": "FILLED", "entries_prefetched": "PREFETCHED",
    "tables_nested": "TO_NESTED", "tables_shadowed": "TO_SHADOW",
}  # fmt: skip
EVENTS: Final = ("refusals", "events_sent", "upcalls")
DEATHS: Final = {
    FINISHED: "finished",
    OUT_OF_HOST_MEMORY: "the host ran out of memory",
    OUT_OF_TABLES: "the hypervisor ran out of memory for EPT",
}


@frozen(kw_only=True)
class Guest:
    """A VM to be: its name, physical CPU (of several vCPUs, all), bytes of memory, devices, what lays its guest out.

    The virtual timers of a `recorded` guest are not armed: its interrupts come from the recording. `assigned` are
    the frames of the registers of its own devices. All memory of such a VM is there from the start, because devices
    cannot wait.
    """

    name: str
    cpu: int
    memory: int
    build: GuestBuilder
    devices: tuple[str, ...] = ()
    recorded: bool = False
    assigned: tuple[int, ...] = ()
    viommu: str = "none"  # the remapping unit that the VM sees: none, caching, nested
    cpus: tuple[int, ...] = ()


@frozen(kw_only=True)
class Vcpu:
    """Where the parts of one vCPU stand; with several of a VM, memory and EPT are those of the first."""

    name: str
    cpu: int
    page: int  # frame of the stack and the structure
    vmcs: int  # frame
    process: Table
    memory: VmMemory
    ept: Table | None
    ept_top: int  # frame that the EPTP names: the root, or with five levels the table above
    shadow: ShadowPool | None
    pools: tuple[Pool, ...]
    devices: tuple[str, ...]
    recorded: bool
    index: int = 0  # which of its VM
    marks: int | None = None  # first frame of what the scanner of page sharing saw
    swap_marks: int | None = None  # first frame of what is on the disk
    log: int | None = None  # frame of the page-modification log
    dirty: int | None = None  # first frame of the bitmap of dirty logging
    domain: range = range(0)  # frames for tables that devices of its own are translated by
    views: tuple[Table, ...] = ()  # EPT of every view of its memory, the first of which is `ept`, where it has several
    view_list: int = 0  # frame of their EPTP list

    @property
    def address(self) -> int:
        """What HOST_RSP and R15 hold."""
        return at.frame_address(self.page) + at.STACK_BYTES


@define(eq=False)
class Hypervisor:
    """A hypervisor in a machine, as the platform sees it while it runs."""

    engine: Engine
    host: Host
    path: Path
    program: Program
    user: Program
    vcpus: tuple[Vcpu, ...]
    cpu_pages: dict[int, int] = field(factory=dict)
    disk_queues: dict[int, int] = field(factory=dict)  # host-physical addresses, by CPU

    @property
    def hosted(self) -> bool:
        """Is there a device process in user space?"""
        return bool(self.user.labels)

    def current(self, cpu: int) -> Vcpu:
        """The vCPU whose thread is on a CPU."""
        address = self.host.load(at.frame_address(self.cpu_pages[cpu]) + at.C["CURRENT"])
        return next(v for v in self.vcpus if v.address == address & (1 << 64) - 1)

    def in_guest(self, cpu: int) -> bool:
        """Is a CPU in VMX non-root operation?"""
        return bool(self.engine.cpus[cpu][s.NONROOT])

    def word(self, vcpu: Vcpu, field: str) -> int:
        """A word of a vCPU's structure."""
        return self.host.load(vcpu.address + at.V[field])

    def shadow_root(self, number: int, root: int, ring: int) -> int | None:
        """What CR3 holds while a guest believes in a root, in either ring; None unless it loaded that one last."""
        vcpu = self.vcpus[number]
        words = self.engine.contents(vcpu.vmcs, mem.VMCS_REGION)
        believed = self.word(vcpu, "SHADOW_CR3") & ADDRESS
        return int(words[SLOT["GUEST_CR3"]]) if believed == root else None

    def believed_root(self, number: int) -> int:
        """Where in the arena stands what the guest of a vCPU believes that CR3 holds; 0: in CR3 itself."""
        return self.host.place(self.vcpus[number].address + at.V["SHADOW_CR3"]) if self.path.vmm.on_shadow else 0

    def finish(self, cpu: int) -> Vcpu:
        """The guest that runs on a CPU came to its end (the engine stopped with PROGRAM_END): go on with the others.

        It is switched off from outside: this costs no cycles and is no exit. The CPU stops again with PROGRAM_END,
        in root operation, when no VM of it is left.
        """
        m, vcpu = self.engine.cpus[cpu], self.current(cpu)
        exit_cycles, m[s.EXIT_CYCLES] = int(m[s.EXIT_CYCLES]), 0
        tracing, m[s.TRACE_ON] = int(m[s.TRACE_ON]), 0
        with quiet():
            vm_exit(m, self.engine.arena, 0, 0, 0)
        m[s.EXIT_CYCLES], m[s.TRACE_ON] = exit_cycles, tracing
        m[s.RIP] = mem.signed(self.program.labels["ended"])
        self.engine.sync(cpu)
        return vcpu

    def sharing(self) -> dict[str, int]:
        """Shared frames and the pages that they are behind, of all VMs together, where pages are shared."""
        return shared_now(self.host, self.path.addresses)

    def hypercalls(self) -> dict[str, dict[str, int]] | None:
        """Events of guests that have them in a shared page, over all of them."""
        if not self.path.vmm.pv.events:
            return None
        events = {name: sum(self.word(v, name.upper()) for v in self.vcpus) for name in EVENTS}
        return {"calls": {}, "requests": {}, "events": {**events, "blocks": 0}}

    def clusters(self, vcpu: Vcpu) -> dict[str, int]:
        """What exit clusters have done for a vCPU."""
        names = {"exits_saved": "CLUSTERED_EXITS", "instructions": "CLUSTER_INSTRUCTIONS"}
        return {name: self.word(vcpu, word) for name, word in names.items()}

    def memory_statistics(self, vcpu: Vcpu) -> dict[str, int]:
        """What became of the memory of a vCPU's VM; what did not happen is left out."""
        same = [other for other in self.vcpus if other.name == vcpu.name]
        counts = {name.lower(): sum(self.word(other, name) for other in same) for name in at.STATISTICS}
        return {name: count for name, count in counts.items() if count}

    def shadow_statistics(self, vcpu: Vcpu) -> dict[str, int] | None:
        """What was counted of the shadow pages that the vCPUs of a VM share; None without such pages."""
        pool = vcpu.shadow
        if pool is None:
            return None
        return {name: self.host.load(pool.address + POOL[word]) for name, word in SHADOW_STATISTICS.items()}

    def deaths(self, cpu: int) -> list[tuple[str, str]]:
        """The VMs of a CPU, and why each ended."""
        return [(vcpu.name, self.death(vcpu)) for vcpu in self.vcpus if vcpu.cpu == cpu]

    def death(self, vcpu: Vcpu) -> str:
        """Why a VM ended; empty while it runs."""
        code = self.word(vcpu, "DEATH")
        if not code:
            return ""
        if code in DEATHS:
            return DEATHS[code]
        reason = BY_NUMBER[code - 1]
        excuse = EXCUSED[self.path.vmm.personality].get(reason.number, "")
        return f"VM exit {reason.name}" + (f", though {excuse}" if excuse else "")
