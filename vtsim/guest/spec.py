"""What guests run: kernels, processes, and phases made of primitives."""

from __future__ import annotations

from typing import Any

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.base.registry import Registry
from vtsim.base.spec import (
    Boolean,
    FilePath,
    Group,
    Many,
    Tagged,
    Text,
    addresses,
    counts,
    durations,
    factors,
    setting,
    shares,
    sizes,
)
from vtsim.guest.file_system import FileSystemSpec

KIB, MIB, GIB = 2**10, 2**20, 2**30
PAGE_SIZES = (4 * KIB, 2 * MIB, GIB)
CPU_LIMIT = 16  # of one guest
PATTERNS = ("uniform", "sequential", "strided", "zipf", "chase")

ROBIN_IRVINE = (  # their list, MOV to and from a segment register apart
    "sgdt", "sidt", "sldt", "smsw", "pushf", "popf", "lar", "lsl", "verr", "verw", "pop", "push", "call", "jmp", "int",
    "ret", "str", "mov_from", "mov_to",
)  # fmt: skip

# An allocator's slabs: so many bytes, each at a boundary of so many more, so that 4 KiB pages of each have a table of
# their own; the first of a process lies so far behind where its regions begin.
SLAB, SLABS_APART, SLABS = 256 * KIB, 2 * MIB, 1 << 40
# A heap that grew piece by piece, so far behind where its process's regions begin.
GROWN_HEAP = 1 << 44

primitives: Registry[str, type[Any]] = Registry("primitive")


def repeated(default: int = 100_000) -> Any:
    """Declare how often a primitive is executed."""
    return setting(counts(ge=1), "How often it is executed", default=default)


def region_of(default: int) -> Any:
    """Declare how much memory a primitive touches."""
    return setting(sizes(ge=64), "Memory that is touched", default=default)


def placed() -> Any:
    """Declare where in the process's address space a region begins."""
    return setting(
        addresses(words={"auto": None}, le=2**47 - 1),
        "Linear address where the region begins, a multiple of 4 KiB; phases at one address share it",
        default=None,
    )


@frozen(kw_only=True)
class Phase:
    """One stretch of what a process does."""

    @property
    def span(self) -> tuple[int, int] | None:
        """The region that the user has placed, as first address and length."""
        at = getattr(self, "at", None)
        return None if at is None else (at, self.region_bytes)

    @property
    def region_bytes(self) -> int:
        """How much memory of its own the phase touches."""
        return int(getattr(self, "region", 0))

    @property
    def slab_bytes(self) -> int:
        """How much of it lies in slabs (`SLAB`), not side by side."""
        return 0

    @property
    def grown_bytes(self) -> int:
        """How much of it lies in a heap that grew piece by piece (`GROWN_HEAP`), and so in small pages."""
        return 0


def _must_be_aligned(phase: Phase) -> None:
    if phase.span and phase.span[0] % (4 * KIB):
        raise ConfigError(
            f"{phase.span[0]:#x} is not where a page begins",
            field="at",
            help=f"the page begins at {phase.span[0] & ~0xFFF:#x}",
        )


@primitives.register("work")
@frozen(kw_only=True)
class WorkSpec(Phase):
    """Ordinary instructions that touch no memory of their own."""

    instructions: int = setting(counts(ge=1), "Instructions executed", default=10_000_000)


@primitives.register("mix")
@frozen(kw_only=True)
class MixSpec(Phase):
    """Ordinary instructions, some of which load and store in a region."""

    instructions: int = setting(counts(ge=1), "Instructions executed", default=10_000_000)
    memory: float = setting(shares(), "Instructions that load or store", default=0.3)
    write: float = setting(shares(), "Memory accesses that store", default=0.3)
    region: int = region_of(32 * KIB)
    at: int | None = placed()
    pattern: str = setting(Text(choices=PATTERNS), "Order of the addresses", default="uniform")
    theta: float = setting(factors(ge=0, le=5), "Skew of zipf: 0 is uniform", default=0.99)
    stride: int = setting(sizes(ge=1, le=GIB), "Distance between accesses of pattern strided", default=64)

    def __attrs_post_init__(self) -> None:
        _must_be_aligned(self)


@primitives.register("stream")
@frozen(kw_only=True)
class StreamSpec(Phase):
    """Memory accesses in a tight loop."""

    pattern: str = setting(Text(choices=PATTERNS), "Order of the addresses", default="uniform")
    region: int = region_of(64 * MIB)
    at: int | None = placed()
    accesses: int = setting(counts(ge=1), "Loads and stores", default=1_000_000)
    write: float = setting(shares(), "Accesses that store", default=0.0)
    stride: int = setting(sizes(ge=1, le=GIB), "Distance between accesses of pattern strided", default=64)
    theta: float = setting(factors(ge=0, le=5), "Skew of zipf: 0 is uniform", default=0.99)
    work: int = setting(counts(le=2**20), "Ordinary instructions between two accesses", default=0)

    def __attrs_post_init__(self) -> None:
        _must_be_aligned(self)
        if self.pattern == "strided" and self.stride > self.region:
            raise ConfigError(
                f"a stride of {self.stride} bytes leaves the region of {self.region} bytes",
                field="stride",
                help=f"stride can be at most {self.region} B",
            )


@primitives.register("fill")
@frozen(kw_only=True)
class FillSpec(Phase):
    """Every page of the region gets contents: its first word is stored, so that equal pages can be told from others."""

    iterations: int = repeated(1)
    region: int = region_of(4 * MIB)
    at: int | None = placed()
    distinct: int = setting(
        counts(ge=1, le=2**24), "Different contents that the pages have in turn, the same in every VM", default=16
    )

    def __attrs_post_init__(self) -> None:
        _must_be_aligned(self)


@primitives.register("cpuid")
@frozen(kw_only=True)
class CpuidSpec(Phase):
    """CPUID in a loop."""

    iterations: int = repeated()
    leaf: int = setting(addresses(le=2**32 - 1), "EAX", default=0)
    subleaf: int = setting(addresses(le=2**32 - 1), "ECX", default=0)


@primitives.register("rdtsc")
@frozen(kw_only=True)
class RdtscSpec(Phase):
    """RDTSC in a loop."""

    iterations: int = repeated()


@primitives.register("rdmsr")
@frozen(kw_only=True)
class RdmsrSpec(Phase):
    """RDMSR in a loop, by the guest kernel."""

    iterations: int = repeated()
    msr: int = setting(addresses(le=2**32 - 1), "Register number")


@primitives.register("wrmsr")
@frozen(kw_only=True)
class WrmsrSpec(Phase):
    """WRMSR in a loop, by the guest kernel."""

    iterations: int = repeated()
    msr: int = setting(addresses(le=2**32 - 1), "Register number")
    value: int = setting(addresses(le=2**62), "Value written", default=0)


@primitives.register("vmcall")
@frozen(kw_only=True)
class VmcallSpec(Phase):
    """VMCALL in a loop, by the guest kernel; it needs a hypervisor."""

    iterations: int = repeated()
    number: int = setting(addresses(le=2**32 - 1), "Hypercall number, in RAX", default=0)


@primitives.register("sensitive")
@frozen(kw_only=True)
class SensitiveSpec(Phase):
    """Instructions that show or change the system's state in any ring (Robin and Irvine 2000), by the guest kernel."""

    iterations: int = repeated(1)
    instructions: tuple[str, ...] = setting(
        Many(item=Text(choices=ROBIN_IRVINE)), "Which of them, one after the other", default=ROBIN_IRVINE
    )


@primitives.register("sensitive_user")
@frozen(kw_only=True)
class SensitiveUserSpec(SensitiveSpec):
    """The same instructions, but INT n, by the application itself, with operands that ring 3 may have."""


@primitives.register("hlt")
@frozen(kw_only=True)
class HltSpec(Phase):
    """HLT in a loop by the guest kernel, each woken by the next timer interrupt."""

    iterations: int = repeated(1000)


@primitives.register("pause")
@frozen(kw_only=True)
class PauseSpec(Phase):
    """PAUSE in a loop."""

    iterations: int = repeated()


@primitives.register("ipi")
@frozen(kw_only=True)
class IpiSpec(Phase):
    """Interrupts by the guest kernel from the first of two threads to the CPU of the other, each awaited.

    The other thread computes in ring 0 until the first has sent them all.
    """

    iterations: int = repeated(1000)


def port_setting() -> Any:
    """Declare an I/O port."""
    return setting(addresses(le=0xFFFF), "I/O port")


def operand_size() -> Any:
    """Declare how many bytes an I/O or MMIO access moves."""
    return setting(counts(choices=(1, 2, 4)), "Bytes moved", default=4)


@primitives.register("port_in")
@frozen(kw_only=True)
class PortInSpec(Phase):
    """IN in a loop, by the guest kernel."""

    iterations: int = repeated()
    port: int = port_setting()
    size: int = operand_size()


@primitives.register("port_out")
@frozen(kw_only=True)
class PortOutSpec(Phase):
    """OUT in a loop, by the guest kernel."""

    iterations: int = repeated()
    port: int = port_setting()
    size: int = operand_size()
    value: int = setting(addresses(le=2**32 - 1), "Value written", default=0)


@primitives.register("mmio_read")
@frozen(kw_only=True)
class MmioReadSpec(Phase):
    """Loads from a device register in a loop, by the guest kernel."""

    iterations: int = repeated()
    address: int = setting(addresses(), "Guest-physical address")
    size: int = operand_size()


@primitives.register("mmio_write")
@frozen(kw_only=True)
class MmioWriteSpec(Phase):
    """Stores to a device register in a loop, by the guest kernel."""

    iterations: int = repeated()
    address: int = setting(addresses(), "Guest-physical address")
    size: int = operand_size()
    value: int = setting(addresses(le=2**32 - 1), "Value written", default=0)


@primitives.register("mov_from_cr8")
@frozen(kw_only=True)
class MovFromCr8Spec(Phase):
    """MOV from CR8 in a loop, by the guest kernel."""

    iterations: int = repeated()


@primitives.register("mov_to_cr8")
@frozen(kw_only=True)
class MovToCr8Spec(Phase):
    """MOV to CR8 in a loop, by the guest kernel."""

    iterations: int = repeated()
    value: int = setting(addresses(le=15), "Task priority written", default=0)


@primitives.register("mov_to_cr3")
@frozen(kw_only=True)
class MovToCr3Spec(Phase):
    """MOV to CR3 of the value that is there, in a loop, by the guest kernel."""

    iterations: int = repeated()


@primitives.register("syscall")
@frozen(kw_only=True)
class SyscallSpec(Phase):
    """System calls in a loop."""

    iterations: int = repeated()
    number: int = setting(counts(le=511), "System call number; 39 is getpid", default=39)
    work: int = setting(counts(le=2**30), "Instructions that the kernel spends on each call", default=50)


@primitives.register("fork")
@frozen(kw_only=True)
class ForkSpec(Phase):
    """Address spaces are copied, written to and dropped, as fork, copy-on-write and exit do."""

    iterations: int = repeated(100)
    pages: int = setting(counts(ge=1, le=2**24), "Pages of 4 KiB that the child copies by writing", default=64)

    @property
    def copied(self) -> int:
        """How many pages of its own the child has at most, beside its stack."""
        return self.pages


@primitives.register("exec")
@frozen(kw_only=True)
class ExecSpec(ForkSpec):
    """Children are forked that replace their image: the copied address space is torn down, fresh pages are written."""

    pages: int = setting(
        counts(ge=1, le=2**24), "Pages of 4 KiB that the parent has, and the new image writes", default=64
    )


@primitives.register("page_fault")
@frozen(kw_only=True)
class PageFaultSpec(Phase):
    """Fresh pages are touched once each, and unmapped before the next iteration."""

    iterations: int = repeated(1)
    region: int = region_of(16 * MIB)
    at: int | None = placed()

    def __attrs_post_init__(self) -> None:
        _must_be_aligned(self)


@primitives.register("protect")
@frozen(kw_only=True)
class ProtectSpec(Phase):
    """Pages are written, made read-only and writable again: each write after that is a fault.

    Not modelled: signals for writes while a region is read-only.
    """

    iterations: int = repeated(10)
    region: int = region_of(MIB)
    at: int | None = placed()

    def __attrs_post_init__(self) -> None:
        _must_be_aligned(self)


@primitives.register("context_switch")
@frozen(kw_only=True)
class ContextSwitchSpec(Phase):
    """The process yields to the next one of its VM, and runs again when its turn comes."""

    iterations: int = repeated(10_000)
    work: int = setting(counts(le=2**30), "Instructions between two switches", default=0)
    region: int = setting(sizes(le=256 * MIB), "Memory of its own that it reads between two switches", default=0)


@primitives.register("balloon")
@frozen(kw_only=True)
class BalloonSpec(Phase):
    """The balloon driver of the guest kernel asks what the host demands, gives or takes frames, and sleeps."""

    iterations: int = repeated(10)
    period: int = setting(durations(ge=1), "Guest time asleep between two questions", default=1_000_000)


@primitives.register("idle")
@frozen(kw_only=True)
class IdleSpec(Phase):
    """Nothing to do for a while: the guest kernel's idle loop."""

    duration: int = setting(durations(ge=1), "Guest time spent idle", default=10_000_000)


@primitives.register("replay")
@frozen(kw_only=True)
class ReplaySpec(Phase):
    """The recorded events of a real guest, each in its own ring."""

    trace: str = setting(FilePath(), "Trace file, relative to the scenario")
    spins: str = setting(
        Text(choices=("timed", "literal")),
        "Repeat a recorded spin until guest time passes its recorded end, or as often as it was recorded",
        default="timed",
    )


@primitives.register("memory_trace")
@frozen(kw_only=True)
class MemoryTraceSpec(Phase):
    """The recorded memory accesses of a real program, from valgrind's lackey or ChampSim (docs/traces.md)."""

    trace: str = setting(FilePath(), "Trace file, relative to the scenario; may be compressed with gzip or xz")
    limit: int | None = setting(counts(ge=1, words={"all": None}), "Records that are used", default=None)


@primitives.register("dma_buffers")
@frozen(kw_only=True)
class DmaBuffersSpec(Phase):
    """Buffers are mapped for a device, which reads or writes them, and unmapped, as a driver does for packets.

    All buffers are mapped at first; then, group by group, the device is waited for, the group is unmapped and mapped
    again. The last groups are waited for and unmapped.
    """

    iterations: int = repeated(1000)
    device: str = setting(Text(), "Name of a device under dma; the machine's first when left out", default="")
    groups: int = setting(counts(ge=1, le=32), "Groups of buffers that the device has at a time", default=4)
    group: int = setting(
        counts(ge=1, le=32), "Buffers of a group: so many are unmapped and mapped again in one iteration", default=16
    )
    bytes: int = setting(sizes(ge=1, le=2 * MIB), "Size of a buffer, each of which begins a page", default=1500)
    pages: str = setting(
        Text(choices=("4 KiB", "2 MiB")), "Size of the pages that map it for the device", default="4 KiB"
    )
    mapping: str = setting(
        Text(choices=("single", "group", "once")),
        "Map each buffer by itself each time, or a group at once as a list, or each buffer once for the whole phase",
        default="single",
    )
    direction: str = setting(
        Text(choices=("receive", "transmit")), "The device writes the buffers, or reads them", default="receive"
    )
    wait: str = setting(
        Text(choices=("interrupt", "poll")), "How the driver learns that the device is done", default="interrupt"
    )
    work: int = setting(counts(le=2**30), "Instructions that the kernel spends on each buffer beside", default=0)

    @property
    def buffers(self) -> int:
        """Buffers that the device has at a time."""
        return self.groups * self.group

    @property
    def page_bytes(self) -> int:
        """How large the pages are that map a buffer."""
        return 4 * KIB if self.pages == "4 KiB" else 2 * MIB

    @property
    def buffer_pages(self) -> int:
        """Pages of one buffer."""
        return -(-self.bytes // self.page_bytes)

    @property
    def buffer_bytes(self) -> int:
        """Memory of all buffers."""
        return self.buffers * self.buffer_pages * self.page_bytes


@frozen(kw_only=True)
class KernelSpec:
    """The guest's kernel."""

    kpti: bool = setting(Boolean(), "Separate page tables for user mode; a CR3 switch per system call", default=False)
    pcid: bool | None = setting(Boolean(auto=True), "Tag translations with the process", default=None)
    page_size: int = setting(
        sizes(choices=(4 * KIB, 2 * MIB, 4 * MIB, GIB)), "Pages that user memory is mapped with", default=4 * KIB
    )
    tick: int = setting(durations(ge=1000, words={"off": 0}), "Period of the timer interrupt", default=4_000_000)
    populate: str = setting(
        Text(choices=("demand", "prebuilt")),
        "Map user memory at its page fault, or before the process starts",
        default="demand",
    )
    interface: str = setting(
        Text(choices=("auto", "hardware", "paravirtual")),
        "What the kernel is built for: the bare machine and what is like it, or hypercalls, so that it stops at boot "
        "where no hypervisor has them; auto is what there is",
        default="auto",
    )
    probe: bool | None = setting(
        Boolean(auto=True),
        "Look for hardware at boot: processor, configuration space; auto is yes where a machine or VM lists devices",
        default=None,
    )
    sensitive: tuple[str, ...] = setting(
        Many(item=Text(choices=ROBIN_IRVINE)),
        "Instructions that show or change system state in any ring (Robin and Irvine 2000), each executed at boot",
        default=(),
    )
    dma: str = setting(
        Text(choices=("strict", "deferred", "never", "identity")),
        "After a DMA buffer is unmapped: invalidate and wait, invalidate all of 255 or of 10 ms at once, do not "
        "invalidate; or map none, because devices use physical addresses",
        default="deferred",
    )
    page_request_queue: int = setting(
        sizes(choices=(4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB)),
        "Size of the queue in which a remapping unit puts page requests of devices, 32 bytes each",
        default=64 * KIB,
    )
    iova: str = setting(
        Text(choices=("cached", "tree")),
        "Addresses for devices from caches before the tree (Linux since 4.8), or from the tree each time",
        default="cached",
    )
    file_system: FileSystemSpec = setting(
        Group(spec=FileSystemSpec), "Where the file of primitive map_file is kept", factory=FileSystemSpec
    )
    lengths: str = setting(
        Text(choices=("linux-6.1", "linux-4.19")),
        "Kernel in which the lengths of the paths between the model's operations were counted",
        default="linux-6.1",
    )
    paging: str = setting(
        Text(choices=("4-level", "5-level", "PAE", "32-bit")),
        "Paging mode; 5-level needs LA57; with PAE and 32-bit paging guest and processor are in 32-bit protected mode",
        default="4-level",
    )


@frozen(kw_only=True)
class ProcessSpec:
    """A program with an address space of its own."""

    name: str = setting(Text(), "Name in reports", default="app")
    threads: int = setting(
        counts(ge=1, le=CPU_LIMIT),
        "Threads that share the address space, each on a vCPU of its own; each does all phases, in memory of its own "
        "where a phase unmaps or protects and has no `at`",
        default=1,
    )
    vcpu: int | None = setting(
        counts(le=CPU_LIMIT - 1, words={"auto": None}),
        "vCPU of the first thread, the others on the next ones; taken in turn when left out",
        default=None,
    )
    phases: tuple[Phase, ...] = setting(
        Many(item=Tagged(registry=primitives, tag="primitive"), least=1), "What it does, one after the other"
    )

    def __attrs_post_init__(self) -> None:
        spans = [(*phase.span, number) for number, phase in enumerate(self.phases) if phase.span]
        for index, (begin, length, number) in enumerate(spans):
            for other_begin, other_length, other in spans[:index]:
                same = (begin, length) == (other_begin, other_length)
                if not same and begin < other_begin + other_length and other_begin < begin + length:
                    raise ConfigError(
                        f"the region {begin:#x} to {begin + length - 1:#x} overlaps that of phase {other}, "
                        f"{other_begin:#x} to {other_begin + other_length - 1:#x}",
                        field=f"phases.{number}.at",
                        help="give both phases the same address and size to share a region",
                    )

    @property
    def memory_bytes(self) -> int:
        """How much memory the process touches at most at one time."""
        placed = {phase.span for phase in self.phases if phase.span}
        floating = [phase.region_bytes for phase in self.phases if not phase.span]
        return sum(length for _, length in placed) + max(floating, default=0)


@frozen(kw_only=True)
class GuestSpec:
    """What a VM runs."""

    kernel: KernelSpec = setting(Group(spec=KernelSpec), "The kernel", factory=KernelSpec)
    processes: tuple[ProcessSpec, ...] = setting(
        Many(item=Group(spec=ProcessSpec), least=1), "The programs, which take turns on the VM's CPU"
    )

    def __attrs_post_init__(self) -> None:
        if not self.kernel.tick and any(isinstance(p, HltSpec) for q in self.processes for p in q.phases):
            raise ConfigError(
                "without a timer tick nothing ends a HLT of primitive 'hlt'",
                field="kernel.tick",
                help="give the kernel a tick, like '4 ms'",
            )
        names = [process.name for process in self.processes]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ConfigError(
                    f"two processes are named {name!r}",
                    field=f"processes.{number}.name",
                    help="give each process of a VM its own name",
                )

    @property
    def replays(self) -> bool:
        """Is it a recorded guest, kernel and all?"""
        return any(isinstance(phase, ReplaySpec) for process in self.processes for phase in process.phases)

    @property
    def driven(self) -> list[tuple[int, int, DmaBuffersSpec]]:
        """The phases that drive devices, by process and phase."""
        return [
            (number, index, phase)
            for number, process in enumerate(self.processes)
            for index, phase in enumerate(process.phases)
            if isinstance(phase, DmaBuffersSpec)
        ]

    @property
    def tries_sensitive(self) -> bool:
        """Does the kernel execute sensitive instructions one by one?"""
        phases = [phase for process in self.processes for phase in process.phases]
        return bool(self.kernel.sensitive) or any(isinstance(phase, SensitiveSpec) for phase in phases)
