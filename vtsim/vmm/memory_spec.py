"""What a scenario chooses about the host's memory: who hands out frames, and on which node they lie."""

from __future__ import annotations

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.base.spec import Boolean, Text, counts, durations, setting, shares, sizes

KIB_256 = 2**18


@frozen(kw_only=True)
class HostMemorySpec:
    """Frames of the host: how they are handed out, and on which NUMA node."""

    allocator: str = setting(
        Text(choices=("auto", "list", "buddy")),
        "Take frames from a list, or from a buddy allocator that programs give them back to; auto: as features need",
        default="auto",
    )
    fragmentation: float = setting(
        shares(), "2 MiB blocks of the host that hold a frame of somebody else's, so that no large page fits", default=0
    )
    data: str = setting(
        Text(choices=("local", "remote", "interleaved")),
        "Node of guest memory: that of the VM's CPU, another, or both in turn by 4 KiB (2 MiB) of the guest's memory",
        default="local",
    )
    guest_tables: str = setting(
        Text(choices=("as-data", "local", "remote")), "Node of the frames of the guest's page tables", default="as-data"
    )
    ept_tables: str = setting(Text(choices=("local", "remote")), "Node of the EPT tables", default="local")

    @property
    def buddy(self) -> bool:
        """Does a buddy allocator hand out frames?"""
        return self.allocator == "buddy"

    @property
    def placed(self) -> bool:
        """Is anything not where the VM runs?"""
        return (self.data, self.guest_tables, self.ept_tables) not in (
            ("local", "as-data", "local"),
            ("local", "local", "local"),
        )

    def __attrs_post_init__(self) -> None:
        if self.allocator == "list" and self.fragmentation:
            raise ConfigError(
                "a list of frames has no fragmentation",
                field="fragmentation",
                help="choose allocator 'buddy', or fragmentation 0 %",
            )


@frozen(kw_only=True)
class SharingSpec:
    """Pages with the same contents become one frame until one is written, as KSM does it."""

    on: bool = setting(Boolean(), "Look for such pages", default=False)
    period: int = setting(durations(ge=1000), "Time between two turns of the scanner (KSM: 20 ms)", default=20_000_000)
    pages: int = setting(counts(ge=1, le=2**24), "Pages of a VM looked at in one turn (KSM: 100)", default=100)


@frozen(kw_only=True)
class CollapseSpec:
    """Small pages of the host become a large one, as khugepaged makes them; they are copied into a free block."""

    on: bool = setting(Boolean(), "Look for 2 MiB of guest memory in small pages", default=False)
    period: int = setting(
        durations(ge=1000), "Time between two turns of the daemon (khugepaged: 10 s)", default=10_000_000_000
    )
    pages: int = setting(
        counts(ge=512, le=2**24), "Pages of 4 KiB of a VM looked at in one turn (khugepaged: 4096)", default=4096
    )


@frozen(kw_only=True)
class SwapSpec:
    """VMs whose memory is more than the host has: pages go to a disk and come back when the guest asks for them.

    The latencies are those of an Intel SSD DC P4500 of 1 TB (Lenovo product guide, 4XB7A08539): 85 us to read and 20 us
    to write 4 KiB anywhere; 279,500 reads a second make 24 at a time.
    """

    on: bool = setting(Boolean(), "Swap; VMs may then have more memory than the machine", default=False)
    memory: int | None = setting(
        sizes(ge=KIB_256, words={"all": None}),
        "Memory of the host that all VMs together may have; each gets a part in proportion to its size",
        default=None,
    )
    read: int = setting(durations(ge=1), "Latency of reading a page from the disk", default=85_000)
    write: int = setting(durations(ge=1), "Latency of writing one", default=20_000)
    at_once: int = setting(counts(ge=1, le=1024), "Commands that the disk serves at a time", default=24)


@frozen(kw_only=True)
class BallooningSpec:
    """What the host demands of its guests' balloons; a guest gives frames if a process of it runs the driver."""

    size: int = setting(sizes(), "Memory that each guest is to give; 0 offers no balloon", default=0)
    start: int = setting(durations(), "When the host wants it", default=0)
    stop: int | None = setting(durations(words={"never": None}), "When the guests may have it back", default=None)
