"""How the machine is virtualized: the part of a scenario that chooses a hypervisor.

Not modelled: dirty logging, sharing, collapse, ballooning and swapping of memory that a guest reaches by shadow tables,
under agile paging or by direct ones; ballooning and swapping of large pages.
"""

from __future__ import annotations

from attrs import frozen

import vtsim.vmm.techniques
from vtsim.base.errors import ConfigError
from vtsim.base.registry import import_all
from vtsim.base.spec import Boolean, Free, Group, Overrides, Text, counts, durations, setting, sizes
from vtsim.base.units import COUNT, LARGEST, Dimension
from vtsim.ept.direct import BATCH_LIMIT
from vtsim.ept.spec import EPTP_ACCESSED_DIRTY, EPTP_LEVELS, EPTP_WRITE_BACK
from vtsim.ept.views import MOST as MOST_VIEWS
from vtsim.vmm.memory_spec import BallooningSpec, CollapseSpec, HostMemorySpec, SharingSpec, SwapSpec
from vtsim.vmm.mitigations_spec import MitigationsSpec
from vtsim.vmm.techniques import techniques

import_all(vtsim.vmm.techniques)

KIB, MIB, GIB = 2**10, 2**20, 2**30
PAGE_SIZES = (4 * KIB, 2 * MIB, GIB)


@frozen
class PathLength:
    """What is known of every path length of a personality."""

    dimension: Dimension = COUNT
    accepted: str = f"write a whole number, 0 to {LARGEST:,}"


@frozen(kw_only=True)
class EptSpec:
    """How guest-physical memory is mapped when EPT is on."""

    page_size: int = setting(sizes(choices=PAGE_SIZES), "Largest page that EPT maps guest memory with", default=4 * KIB)
    populate: str = setting(
        Text(choices=("demand", "prebuilt")),
        "Give and map guest memory when an access asks for it, or before the guest starts (shadow entries never are); "
        "under agile paging and with several views always before",
        default="demand",
    )
    levels: int = setting(counts(choices=(4, 5)), "Levels of the EPT paging structures", default=4)
    accessed_dirty: bool | None = setting(Boolean(auto=True), "Use the accessed and dirty flags of EPT", default=None)

    @property
    def pointer_bits(self) -> int:
        """What the EPTP says beside the table's address: memory type, levels, flags."""
        return EPTP_WRITE_BACK | (self.levels - 1) << EPTP_LEVELS | (EPTP_ACCESSED_DIRTY if self.accessed_dirty else 0)


@frozen(kw_only=True)
class DirtyLogSpec:
    """Which pages guests write, as a live migration asks again and again."""

    method: str = setting(
        Text(choices=("off", "auto", "write-protect", "pml")),
        "Learn it from EPT violations on write-protected pages, or from the processor's page-modification log",
        default="off",
    )
    start: int = setting(durations(), "When logging starts; large pages are split then", default=0)
    period: int = setting(durations(ge=1000), "Time between two collections of the log", default=10_000_000)

    stop: int | None = setting(
        durations(words={"never": None}), "When logging stops; large pages come back then", default=None
    )

    @property
    def on(self) -> bool:
        """Is any method chosen?"""
        return self.method != "off"

    @property
    def ends(self) -> bool:
        """Does logging stop before the run does?"""
        return self.on and self.stop is not None

    def __attrs_post_init__(self) -> None:
        if self.stop is not None and self.stop <= self.start:
            raise ConfigError(
                "logging stops before it starts", field="stop", help="stop can be later than start, or never"
            )


@frozen(kw_only=True)
class ParavirtualSpec:
    """How a paravirtual guest kernel asks its hypervisor."""

    batch: int = setting(
        counts(ge=1, le=BATCH_LIMIT),
        "Requests that the guest gathers for one hypercall; 1 makes each alone",
        default=32,
    )
    events: bool = setting(
        Boolean(),
        "In VMX non-root operation: the kernel's clock is read from a shared page, its timer set by a hypercall and "
        "told by an upcall that needs no end of interrupt; in ring 3 it is so anyway",
        default=False,
    )


@frozen(kw_only=True)
class FeaturesSpec:
    """What a hypervisor may do beside what it must."""

    exit_clustering: bool = setting(
        Boolean(),
        "Emulate the instructions between one that exits and the next, so that VM entry and exit are saved",
        default=False,
    )


@frozen(kw_only=True)
class VmmSpec:
    """The hypervisor: how guest kernels are virtualized, and by whom."""

    technique: str = setting(
        Text(choices=("auto", *techniques)),
        "How guest kernels are virtualized; `vtsim list technique` says what each is. auto is hardware, and native "
        "where paging is none",
        default="auto",
    )
    hosted: bool = setting(
        Boolean(),
        "A monitor of deprivileged guests stands beside a host, to whose world it switches for devices, interrupts and "
        "when its guest is idle",
        default=False,
    )
    personality: str = setting(Text(choices=("kvm", "minimal")), "Whose exit paths are executed", default="kvm")
    paging: str = setting(
        Text(choices=("auto", "ept", "shadow", "agile", "direct-pv", "software", "none")),
        "What virtualizes the MMU: EPT, shadow tables that the hypervisor builds as it sees faults, shadow "
        "tables above and EPT below (no processor has that), tables that a paravirtual guest has updated by "
        "hypercalls, walks of a program (a guest that is interpreted or translated), nothing (native)",
        default="auto",
    )
    vpid: bool | None = setting(
        Boolean(auto=True), "Tag TLB entries, so that VM entry and exit flush nothing", default=None
    )
    ept: EptSpec = setting(Group(spec=EptSpec), "EPT", factory=EptSpec)
    views: int = setting(
        counts(ge=1, le=MOST_VIEWS),
        "EPTPs of each VM, with tables of their own: views of its memory, which differ in what the guest's kernel has "
        "asked to be protected in each (primitive watched_stores), and between which VMFUNC switches",
        default=1,
    )
    pv: ParavirtualSpec = setting(Group(spec=ParavirtualSpec), "Paravirtual guests", factory=ParavirtualSpec)
    dirty_log: DirtyLogSpec = setting(Group(spec=DirtyLogSpec), "Dirty logging", factory=DirtyLogSpec)
    huge_pages: str = setting(
        Text(choices=("always", "never")),
        "Transparent huge pages of the host: whether memory of 2 MiB pages is there to map",
        default="always",
    )
    memory: HostMemorySpec = setting(Group(spec=HostMemorySpec), "Memory of the host", factory=HostMemorySpec)
    collapse: CollapseSpec = setting(
        Group(spec=CollapseSpec), "Small pages of the host made large", factory=CollapseSpec
    )
    sharing: SharingSpec = setting(Group(spec=SharingSpec), "Sharing of equal pages", factory=SharingSpec)
    balloon: BallooningSpec = setting(
        Group(spec=BallooningSpec), "Memory that guests are asked to give", factory=BallooningSpec
    )
    swap: SwapSpec = setting(Group(spec=SwapSpec), "Over-commit with swapping", factory=SwapSpec)
    tpr_shadow: bool | None = setting(
        Boolean(auto=True), "Let the guest read and write CR8 without an exit", default=None
    )
    mitigations: MitigationsSpec = setting(
        Group(spec=MitigationsSpec), "Mitigations of transient-execution attacks in the host", factory=MitigationsSpec
    )
    features: FeaturesSpec = setting(Group(spec=FeaturesSpec), "What it may do beside", factory=FeaturesSpec)
    apicv: bool = setting(
        Boolean(),
        "Let the processor keep the virtual local APIC, and post interrupts to a guest that runs",
        default=False,
    )
    ipi_virtualization: bool = setting(
        Boolean(), "Let the processor post interrupts from one vCPU to another; needs apicv", default=False
    )
    posted_interrupts: bool = setting(
        Boolean(),
        "Let the remapping unit post interrupts of a VM's own devices to its vCPUs; needs apicv",
        default=False,
    )
    native_methods: bool = setting(
        Boolean(),
        "Guests may call functions of the program that executes them, as a Java virtual machine's native methods are",
        default=False,
    )
    lengths: str = setting(
        Text(choices=("linux-6.1", "linux-4.19")),
        "Kernel in which the path lengths of personality kvm, and of the host of a hosted monitor, were counted",
        default="linux-6.1",
    )
    parameters: Overrides = setting(
        Free(noun="parameter", known=lambda _: PathLength()),
        "Path lengths of the personality to change; `vtsim explain exit` lists them",
        default=(),
    )

    @property
    def takes_back(self) -> bool:
        """Does the hypervisor take memory back from its VMs?"""
        return self.taken_back_by != ""

    @property
    def taken_back_by(self) -> str:
        """The setting by which it does, the first of several; empty if it does not."""
        ways = (
            ("sharing.on", self.sharing.on),
            ("collapse.on", self.collapse.on),
            ("swap.on", self.swap.on),
            ("balloon.size", self.balloon.size > 0),
        )
        return next((path for path, on in ways if on), "")

    @property
    def largest_page(self) -> int:
        """The largest page that guest memory is in; direct tables lead to small ones."""
        return 4 * KIB if self.paging == "direct-pv" else self.ept.page_size

    @property
    def on_shadow(self) -> bool:
        """Does the processor walk shadow tables, at least to begin with?"""
        return self.paging in ("shadow", "agile")

    def _views_are_possible(self) -> None:
        """Raise `ConfigError` for what would change the tables of one view of several, or walk none."""
        if self.paging not in ("auto", "ept"):
            raise ConfigError(
                f"views of memory are tables of EPT, and paging {self.paging!r} has none of a guest's own",
                field="views",
                help="views can be 1; or choose technique hardware with paging ept",
            )
        for field, wrong, message, help in (
            ("ept.page_size", self.ept.page_size > 4 * KIB, "views differ in rights of single pages",
             "page_size can be 4 KiB"),
            ("ept.levels", self.ept.levels != 4, "views have tables of four levels", "levels can be 4"),
            ("dirty_log.method", self.dirty_log.on, "dirty logging takes rights in one view only", "method can be off"),
            (self.taken_back_by, self.takes_back, "memory would be taken back in one view only", "leave it out"),
            ("features.exit_clustering", self.features.exit_clustering,
             "an exit cluster would store to what a view protects", "exit_clustering can be false"),
        ):  # fmt: skip
            if wrong:
                raise ConfigError(message, field=field, help=f"{help}; or views 1")

    def __attrs_post_init__(self) -> None:
        if self.technique == "auto":  # an answer here, since the settings that follow are judged by it
            object.__setattr__(self, "technique", "native" if self.paging == "none" else "hardware")
        native = self.technique == "native"
        if self.paging == "none" and not native:
            raise ConfigError(
                f"technique {self.technique!r} needs its guests' memory translated",
                field="paging",
                help=f"paging can be auto, {', '.join(techniques[self.technique].paging)}; none with technique native",
            )
        if self.paging == "software" and not native and not techniques[self.technique].in_software:
            raise ConfigError(
                f"technique {self.technique!r} lets the processor walk tables, and no program",
                field="paging",
                help=f"paging can be auto, {', '.join(techniques[self.technique].paging)}",
            )
        if self.hosted and not native and techniques[self.technique].paging != ("shadow",):
            raise ConfigError(
                f"technique {self.technique!r} has no monitor that stands beside a host",
                field="hosted",
                help="hosted can be false; or choose technique binary-translation, trap-and-emulate",
            )
        if self.native_methods and not techniques[self.technique].in_software and not native:
            software = ", ".join(name for name, one in techniques.items() if one.in_software)
            raise ConfigError(
                f"technique {self.technique!r} has no program that executes its guests",
                field="native_methods",
                help=f"native_methods can be false; or choose technique {software}",
            )
        if self.dirty_log.on and self.paging not in ("auto", "ept") and not native:
            raise ConfigError(
                "dirty logging works on EPT",
                field="dirty_log.method",
                help="choose paging 'ept', or method 'off'",
            )
        if self.takes_back and not native:
            if self.paging not in ("auto", "ept"):
                raise ConfigError(
                    "memory is taken back from VMs on EPT only",
                    field="paging",
                    help="paging can be ept; or leave out sharing, collapse, swap, balloon",
                )
            if self.memory.allocator == "list":
                raise ConfigError(
                    "a list of frames takes none back",
                    field="memory.allocator",
                    help="allocator can be auto, buddy",
                )
        if self.takes_back and self.pv.events and not native:
            raise ConfigError(
                "a page that is shared with the guest stays where it is, and other memory is taken back",
                field="pv.events",
                help="events can be false; or leave out sharing, collapse, swap, balloon",
            )
        if self.takes_back and self.features.exit_clustering and not native:
            raise ConfigError(
                "an exit cluster keeps where the host sees a guest's code, and memory is taken back",
                field="features.exit_clustering",
                help="exit_clustering can be false; or leave out sharing, collapse, swap, balloon",
            )
        if self.views > 1 and not native:
            self._views_are_possible()
        if self.paging == "direct-pv" and self.features.exit_clustering and not native:
            raise ConfigError(
                "an exit cluster follows a guest's tables to its code, and direct ones hold the host's addresses",
                field="features.exit_clustering",
                help="exit_clustering can be false; or choose paging ept, shadow",
            )
        if self.apicv and self.pv.events and not native:
            raise ConfigError(
                "a vector that the virtual local APIC does not know is injected where the hypervisor keeps that APIC",
                field="pv.events",
                help="events can be false; or let apicv be false",
            )
        if self.ipi_virtualization and not self.apicv:
            raise ConfigError(
                "interrupts between vCPUs are posted where the processor keeps the virtual local APIC",
                field="ipi_virtualization",
                help="ipi_virtualization can be false; or let apicv be true",
            )
        if self.posted_interrupts and not self.apicv:
            raise ConfigError(
                "interrupts of devices are posted where the processor keeps the virtual local APIC",
                field="posted_interrupts",
                help="posted_interrupts can be false; or let apicv be true",
            )
        if self.balloon.size and not native and self.ept.page_size > 4 * KIB:
            raise ConfigError(
                "large pages are not given back in parts",
                field="ept.page_size",
                help="page_size can be 4 KiB, without a balloon any",
            )
        if self.swap.on and not native:
            if self.ept.page_size > 4 * KIB:
                raise ConfigError(
                    "large pages are not swapped",
                    field="ept.page_size",
                    help="page_size can be 4 KiB, without swap any",
                )
            if self.ept.populate == "prebuilt":
                raise ConfigError(
                    "memory that is all there before the guest starts leaves nothing to swap",
                    field="ept.populate",
                    help="populate can be demand",
                )
            if self.collapse.on:
                raise ConfigError("large pages are not swapped", field="collapse.on", help="on can be false with swap")
