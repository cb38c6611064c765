"""Virtual CPUs of programs that use nothing of VT-x: where they stand, what they hold at first, how their CPUs boot.

The monitor, the paravirtual hypervisor and software CPUs are built of these pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Final

import numpy as np
from attrs import define, evolve, frozen
from numpy.typing import NDArray

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.base.jit import quiet
from vtsim.base.memory import BLOCK
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Program
from vtsim.cpu.codes import FOREVER, HOST_PROCESS
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels.cursor import set_privilege
from vtsim.cpu.kernels.msr_storage import msr_slot
from vtsim.cpu.segment_descriptors import system_descriptor
from vtsim.cpu.translation import COUNTED, TRANSLATOR
from vtsim.ept import spec as e
from vtsim.ept.tables import KERNEL_PAGE, Table
from vtsim.guest.machine_view import Start
from vtsim.vmm.host import Host
from vtsim.vmm.hypervisor import Guest
from vtsim.vmm.memory import Pool, VmMemory
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.cache import Cache
from vtsim.vmm.monitor.crossing import VECTORS
from vtsim.vmm.needs import table_frames
from vtsim.vmm.programs import apic
from vtsim.vmm.programs.ports import port_entries
from vtsim.vmm.spec import VmmSpec

FLAGS_CLEARED: Final = 0x47700
CR0, CR4, EFER = 0x8005_0033, 0x6A0, 0xD01
STORED_MSRS: Final = (
    0x10A, 0x174, 0x175, 0x176, 0x1A0, 0x277, 0xC0000083, 0xC0000103, 0x48, 0x1D9, 0xDA0,
    *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF,  # memory types
)  # fmt: skip
READ_ONLY_MSRS: Final = (0x1B, 0x3A, 0x3B)  # which nothing here may change
STAR, LSTAR, FMASK, KERNEL_GS_BASE = 0xC0000081, 0xC0000082, 0xC0000084, 0xC0000102
X2APIC_ID, X2APIC_VERSION, X2APIC_SPURIOUS = 0x802, 0x803, 0x80F
SLOTS, MSRS, TSS, PORTS, GDT = 0, 1024, 2048, 2304, 3840  # byte offsets in a vCPU's data page


@frozen(kw_only=True)
class VirtualCpu:
    """Where the parts of one guest's virtual CPU stand.

    `page`: frame of the monitor's stack and the structure. `data`: frame of its memory slots, MSRs and TSS.
    """

    name: str
    cpu: int
    page: int
    data: int
    memory: VmMemory
    devices: tuple[str, ...]
    index: int = 0  # which of its VM


@define(eq=False)
class Monitor:
    """A monitor in a machine, as the platform sees it while it runs."""

    engine: Engine
    host: Host
    vmm: VmmSpec
    program: Program
    vcpus: tuple[VirtualCpu, ...]
    caches: tuple[Cache, ...] = ()  # of translations, one for each vCPU; none where kernels run as they are
    offsets: ClassVar[Mapping[str, int]] = at.V  # of the words of a vCPU's structure
    root: ClassVar[str] = "CR3"  # the word that says which tables the guest's kernel has loaded

    def address(self, vcpu: VirtualCpu) -> int:
        """The linear address of a vCPU's structure."""
        return self.host.address(vcpu.page) + at.STACK_BYTES

    def current(self, cpu: int) -> VirtualCpu:
        """The guest of a CPU."""
        return next(vcpu for vcpu in self.vcpus if vcpu.cpu == cpu)

    def word(self, vcpu: VirtualCpu, field: str, word: int = 0) -> int:
        """A word of a vCPU's structure."""
        return self.host.load(self.address(vcpu) + self.offsets[field] + 8 * word)

    def put(self, vcpu: VirtualCpu, values: Mapping[str, int]) -> None:
        """Store words of a vCPU's structure."""
        for field, value in values.items():
            self.host.store(self.address(vcpu) + self.offsets[field], value)

    def shadow_root(self, number: int, root: int, ring: int) -> int | None:
        """What CR3 holds while the guest of a vCPU believes in a root and a ring; None unless it has been in both."""
        vcpu, view = self.vcpus[number], 0 if ring else at.VIEW_WORDS
        return self.word(vcpu, "VIEWS", view) or None if self.word(vcpu, "CR3") & e.ADDRESS == root else None

    def believed_root(self, number: int) -> int:
        """Where in the arena stands what the guest's kernel believes that CR3 holds."""
        return self.host.place(self.address(self.vcpus[number]) + self.offsets[self.root])

    def in_guest(self, cpu: int) -> bool:
        """Does a guest run on a CPU, and not the monitor or a process of the host?"""
        ring3 = bool(self.engine.cpus[cpu][s.PRIVILEGE] & 1)
        return ring3 and self.word(self.current(cpu), "KERNEL") != HOST_PROCESS

    def finish(self, cpu: int) -> VirtualCpu:
        """The guest of a CPU came to its end; it is switched off from outside, which costs nothing."""
        m, vcpu = self.engine.cpus[cpu], self.current(cpu)
        with quiet():
            set_privilege(m, self.engine.arena, 0)
        m[s.GPR + s.R15], m[s.RIP] = self.address(vcpu), mem.signed(self.program.labels["ended"])
        self.engine.sync(cpu)
        self._end_others(vcpu)
        return vcpu

    def _end_others(self, vcpu: VirtualCpu) -> None:
        """The other vCPUs of a VM that has ended stay halted: interrupts that are on their way wake nobody."""
        for other in self.vcpus:
            if other.name == vcpu.name and other.cpu != vcpu.cpu and not self.death(other):
                m = self.engine.cpus[other.cpu]
                with quiet():
                    set_privilege(m, self.engine.arena, 0)
                m[s.RFLAGS] &= ~at.RF_IF
                m[s.HALTED], m[s.APIC_DEADLINE] = 1, FOREVER
                self.put(other, {"DEATH": at.FINISHED})
                self.engine.sync(other.cpu)

    def deaths(self, cpu: int) -> list[tuple[str, str]]:
        """The VM of a CPU, and why it ended."""
        ended = [vcpu for vcpu in self.vcpus if vcpu.cpu == cpu]
        for vcpu in ended:
            self._end_others(vcpu)
        return [(vcpu.name, self.death(vcpu)) for vcpu in ended]

    def death(self, vcpu: VirtualCpu) -> str:
        """Why a VM ended; empty while it runs."""
        code = self.word(vcpu, "DEATH")
        text = at.DEATHS.get(code, "")
        return f"{text}: {o.OPS[self.word(vcpu, 'DEATH_OP')].name}" if code == at.ILLEGAL else text

    def settle(self) -> None:
        """Hand what the monitor counted to the statistics of the guests' owners.

        What the processor delivered in ring 3 went to the monitor; what the guest got, the monitor delivered.
        """
        totals: Counter[int] = Counter()
        for vcpu in self.vcpus:
            owner = self.engine.owner(vcpu.name)
            injected, faults, interrupts = (
                self.word(vcpu, f"INJECTED{kind}") for kind in ("", "_FAULTS", "_INTERRUPTS")
            )
            counts = {
                k.OWN_EMULATED: self.word(vcpu, "EMULATED", 1), k.OWN_EMULATED + 1: self.word(vcpu, "EMULATED"),
                k.EXCEPTIONS: injected - interrupts, k.PAGE_FAULTS: faults, k.INTERRUPTS: interrupts,
                k.SYSCALLS: self.word(vcpu, "SYSTEM_CALLS"),
            }  # fmt: skip
            totals.update({owner + slot: count for slot, count in counts.items()})
        for place, count in totals.items():
            self.engine.arena[place] = count

    def statistics(self) -> dict[str, int]:
        """What the monitor counted, over all guests."""
        names = ("traps", "system_calls", "injected", "switches", "world_switches")
        return {name: sum(self.word(vcpu, name.upper()) for vcpu in self.vcpus) for name in names}

    def hypercalls(self) -> dict[str, dict[str, int]] | None:
        """What guests asked for by hypercalls; None where they make none."""
        return None

    def software(self) -> dict[str, int] | None:
        """What a software CPU counted; None where the processor executes the guests."""
        return None

    def hook(self, cpu: int, number: int) -> None:
        """A hook that a program of this monitor leaves to the platform: it has none."""
        raise ModelError("a monitor asked for a hook of the platform", {"cpu": cpu, "number": number})

    def translations(self) -> dict[str, int] | None:
        """What the binary translator counted, over all guests; None where kernels run as they are."""
        if not self.caches:
            return None
        return {
            name.lower(): sum(self.host.load(self.host.address(c.structure) + TRANSLATOR[name]) for c in self.caches)
            for name in COUNTED
        }


def windows(
    host: Host, guests: Sequence[Guest], roots: Sequence[Table], *, shuffled: bool, seed: int
) -> list[VmMemory]:
    """The memory of every guest, all there, each mapped by its root at `RAM`. The host's own frames are reserved."""
    pools = [Pool.of(host, 0, table_frames(guest.memory)) for guest in guests]
    host.give_out(0, BLOCK, shuffled=shuffled, seed=seed)
    memories = []
    for guest, root, pool in zip(guests, roots, pools, strict=True):
        window = evolve(root, take=pool.take)
        ram = VmMemory(host.engine, guest.memory, window, None, at.RAM, KERNEL_PAGE | e.PTE_NO_EXECUTE)
        ram.back_all(mem.PAGE_BYTES)
        memories.append(ram)
    return memories


def gates(host: Host, program: Program) -> None:
    """Exceptions and the timer's interrupt lead into the program."""
    for vector in range(VECTORS):
        host.gate(vector, program.labels[f"trap_{vector}"])
    host.gate(at.TIMER_VECTOR, program.labels["timer"])


def switch_off(engine: Engine, vcpus: Iterable[VirtualCpu]) -> None:
    """CPUs without a guest stay halted."""
    for cpu in set(range(engine.geometry.cpus)) - {vcpu.cpu for vcpu in vcpus}:
        engine.cpus[cpu][s.HALTED], engine.cpus[cpu][s.APIC_DEADLINE] = 1, FOREVER


def believed(start: Start) -> dict[str, int]:
    """What the guest's kernel believes of its CPU at first, where it is not told of its hypervisor."""
    code = start.msrs[STAR] >> 32 & 0xFFFC
    return {
        "INTERRUPTS": start.rflags >> 9 & 1, "CS": code, "SS": code + 8, "CR0": start.cr0, "CR3": start.cr3,
        "CR4": start.cr4, "EFER": start.efer, "STAR": start.msrs[STAR], "LSTAR": start.msrs[LSTAR],
        "FMASK": start.msrs[FMASK], "TR_BASE": start.tr_base, "TR": start.tr_selector, "LDT": -1, "TIMER_LVT": 1 << 16,
    }  # fmt: skip


def descriptor_tables(monitor: Monitor, vcpu: VirtualCpu, start: Start) -> None:
    """Where the guest's descriptor tables are."""
    words = (start.gdtr_limit, start.gdtr_base, start.idtr_limit, start.idtr_base)
    monitor.host.store_words(monitor.address(vcpu) + monitor.offsets["GDTR"], words)


def fill(monitor: Monitor, vcpu: VirtualCpu, start: Start, flags: int) -> None:
    """The MSRs and ports of a virtual CPU, its stack pointer, the frame from which it starts with `flags`, its TSS."""
    host, data, here = monitor.host, monitor.host.address(vcpu.data), monitor.address(vcpu)
    msrs = {}
    for index in STORED_MSRS:
        value = processor_msr(host.engine, vcpu.cpu, index)
        if value is not None or index in start.msrs:
            msrs[index] = start.msrs.get(index, value or 0)
    msrs[X2APIC_SPURIOUS] = int(host.engine.cpus[vcpu.cpu][s.APIC_SPURIOUS])
    writable = len(msrs)
    for index in READ_ONLY_MSRS:  # natively the guest has the machine's first CPU
        msrs[index] = processor_msr(host.engine, 0, index) or 0
    msrs |= {X2APIC_ID: 0, X2APIC_VERSION: apic.VERSION}
    host.store_words(data + MSRS, [word for entry in msrs.items() for word in entry])
    ports = port_entries(vcpu.devices)
    host.store_words(data + PORTS, [word for row in ports for word in row])
    values = {
        "KERNEL": 1, "MSR_TABLE": data + MSRS, "MSR_ENTRIES": len(msrs), "MSR_READ_ONLY": data + MSRS + 16 * writable,
        "PORTS": data + PORTS,
        "PORT_ENTRIES": len(ports),
    }  # fmt: skip
    monitor.put(vcpu, values)
    host.store(here + monitor.offsets["REGISTERS"] + 8 * s.RSP, start.rsp)
    for n, value in enumerate((at.GUEST_DATA, start.rsp, flags, at.GUEST_CODE, start.rip)):
        host.store(here - 8 * (n + 1), value)
    host.store(data + TSS + 8, here)


def flags_in_ring_3(start: Start) -> int:
    """RFLAGS with which the processor starts a guest: its interrupt flag stands elsewhere."""
    return start.rflags & ~at.IOPL | at.RF_IF | 2


def boot(monitor: Monitor, vcpu: VirtualCpu, more: Mapping[int, int]) -> None:
    """The state in which a CPU starts: in ring 0 at `boot`, on tables in which guest memory is a window.

    `more`: further slots and what they hold.
    """
    host, engine, here = monitor.host, monitor.engine, monitor.address(vcpu)
    m = engine.cpus[vcpu.cpu]
    data = host.address(vcpu.data)
    host.store_words(data + GDT, gdt(data + TSS + 4))
    state = {
        s.RIP: monitor.program.labels["boot"], s.GPR + s.RSP: here - 64, s.GPR + s.R15: here,
        s.CR3: vcpu.memory.backing.root << 12, s.CR0: CR0, s.CR4: CR4, s.EFER: EFER, s.RFLAGS: 2,
        s.CS_SELECTOR: at.MONITOR_CODE, s.SS_SELECTOR: at.MONITOR_DATA, s.IDTR_BASE: host.address(host.idt),
        s.IDTR_LIMIT: mem.PAGE_BYTES - 1, s.TR_BASE: data + TSS + 4,
        s.TR_SELECTOR: at.MONITOR_TASK, s.GDTR_BASE: data + GDT, s.GDTR_LIMIT: 8 * len(gdt(0)) - 1,
        s.MONITORED: engine.owner(vcpu.name), **more,
    }  # fmt: skip
    for slot, value in state.items():
        m[slot] = mem.signed(value)
    m[s.BELIEVED_AT] = index_of(engine, host.words(vcpu.page)) + (at.STACK_BYTES + monitor.offsets["KERNEL"]) // 8
    engine.sync(vcpu.cpu)


def gdt(task: int) -> list[int]:
    """The words of the GDT with which the processor runs a monitor and its guest, whose task state is at an address.

    SDM: "TSS Descriptor in 64-bit mode".
    """
    return [mem.signed(word) for word in (*at.DESCRIPTORS, *system_descriptor(0x8B, 0x67, task))]


def boot_for_ring_3(monitor: Monitor, vcpu: VirtualCpu, start: Start, kernel_gs_base: int) -> None:
    """The same of a CPU whose guest runs in ring 3: its system calls lead to the program, segment bases are its own."""
    more = {
        s.MSR_STAR: at.STAR, s.MSR_LSTAR: monitor.program.labels[f"system_call_{vcpu.cpu}"],
        s.MSR_FMASK: FLAGS_CLEARED, s.GS_BASE: start.gs_base, s.FS_BASE: start.fs_base,
        s.MSR_KERNEL_GS_BASE: kernel_gs_base,
    }  # fmt: skip
    boot(monitor, vcpu, more)


def processor_msr(engine: Engine, cpu: int, index: int) -> int | None:
    """What an MSR of the processor holds, as its guest is to find it; None where it has none."""
    with quiet():
        slot = int(msr_slot(engine.arena, index))
    return int(engine.cpus[cpu][slot]) if slot >= 0 else None


def index_of(engine: Engine, words: NDArray[np.int64]) -> int:
    """Where a view of the arena begins in it."""
    return (words.ctypes.data - engine.arena.ctypes.data) // words.itemsize
