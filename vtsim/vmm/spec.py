"""How the machine is virtualized: the part of a scenario that chooses a hypervisor."""

from __future__ import annotations

from attrs import frozen

import vtsim.vmm.techniques
from vtsim.base.errors import ConfigError
from vtsim.base.registry import import_all
from vtsim.base.spec import Boolean, Free, Group, Overrides, Text, counts, durations, setting, sizes
from vtsim.ept.spec import EPTP_ACCESSED_DIRTY, EPTP_LEVELS, EPTP_WRITE_BACK
from vtsim.vmm.techniques import techniques

import_all(vtsim.vmm.techniques)

KIB, MIB, GIB = 2**10, 2**20, 2**30
PAGE_SIZES = (4 * KIB, 2 * MIB, GIB)


@frozen(kw_only=True)
class EptSpec:
    """How guest-physical memory is mapped when EPT is on."""

    page_size: int = setting(sizes(choices=PAGE_SIZES), "Largest page that EPT maps guest memory with", default=4 * KIB)
    populate: str = setting(
        Text(choices=("demand", "prebuilt")),
        "Give and map guest memory when an access asks for it, or before the guest starts (shadow entries never are)",
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

    @property
    def on(self) -> bool:
        """Is any method chosen?"""
        return self.method != "off"


@frozen(kw_only=True)
class VmmSpec:
    """The hypervisor: how guest kernels are virtualized, and by whom."""

    technique: str = setting(
        Text(choices=tuple(techniques)),
        "How guest kernels are virtualized; `vtsim list technique` says what each is",
        default="hardware",
    )
    personality: str = setting(Text(choices=("kvm", "minimal")), "Whose exit paths are executed", default="kvm")
    paging: str = setting(
        Text(choices=("auto", "ept", "shadow", "none")),
        "What virtualizes the MMU: EPT, shadow tables that the hypervisor builds as it sees faults, nothing (native)",
        default="auto",
    )
    vpid: bool | None = setting(
        Boolean(auto=True), "Tag TLB entries, so that VM entry and exit flush nothing", default=None
    )
    ept: EptSpec = setting(Group(spec=EptSpec), "EPT", factory=EptSpec)
    dirty_log: DirtyLogSpec = setting(Group(spec=DirtyLogSpec), "Dirty logging", factory=DirtyLogSpec)
    huge_pages: str = setting(
        Text(choices=("always", "never")),
        "Transparent huge pages of the host: whether memory of 2 MiB pages is there to map",
        default="always",
    )
    tpr_shadow: bool | None = setting(
        Boolean(auto=True), "Let the guest read and write CR8 without an exit", default=None
    )
    parameters: Overrides = setting(
        Free(noun="parameter"),
        "Path lengths of the personality to change; `vtsim explain exit` lists them",
        default=(),
    )

    def __attrs_post_init__(self) -> None:
        native = self.technique == "native"
        if self.paging == "none" and not native:
            raise ConfigError(
                f"technique {self.technique!r} needs its guests' memory translated",
                field="paging",
                help="paging can be ept, shadow",
            )
        if self.dirty_log.on and self.paging not in ("auto", "ept") and not native:
            raise ConfigError(
                "dirty logging works on EPT",
                field="dirty_log.method",
                help="choose paging 'ept', or method 'off'",
            )
