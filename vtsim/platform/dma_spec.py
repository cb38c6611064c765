"""DMA in a scenario: the remapping unit of the machine, and devices that read and write memory."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from vtsim.base.errors import ConfigError, Problem
from vtsim.base.spec import Boolean, Group, Text, counts, factors, setting, sizes
from vtsim.base.units import SIZE
from vtsim.platform.iommu_spec import requester

KIB, MIB, GIB = 2**10, 2**20, 2**30
PAGES = ("4 KiB", "2 MiB", "1 GiB")
PAGE = 4 * KIB
DOORBELLS = 0xFB00_0000  # of devices with a driver: a page for each
REGISTERS = 0xFED9_0000  # of the remapping unit, where firmware usually puts them
MOST_DRIVEN = 64  # devices with a driver: each has an interrupt vector
MOST_BEHIND_VIRTUAL = 24  # behind the remapping unit of a VM, whose words are one page
LINK_WIDTHS = (1, 2, 4, 8, 12, 16, 32)  # lanes that a PCIe link can have
PACKETS = tuple(128 << n for n in range(6))  # bytes that a payload or a read request may be limited to
MODES = ("off", "pass-through", "translate")
REQUESTS = ("untranslated", "ats", "forged")  # by number as in `iommu.dma`
TLB_WAYS = 4
MOST_PAGE_REQUESTS = 256  # below FLOOD_GROUP of `page_requests`
TLB_ENTRIES = tuple(TLB_WAYS << n for n in range(11))


@frozen(kw_only=True)
class IommuSpec:
    """The DMA-remapping unit."""

    mode: str = setting(
        Text(choices=MODES),
        "Remapping off, context entries that pass requests through, or second-level tables of a domain for each device",
        default="translate",
    )
    iotlb_entries: int = setting(counts(ge=1, le=1 << 16), "Entries of the IOTLB for pages of 4 KiB", default=64)
    iotlb_ways: int = setting(counts(ge=1, le=64), "Their ways; sets are a power of two", default=4)
    walkers: int = setting(counts(ge=1, le=64), "Page walks at a time", default=6)
    hit_ns: float = setting(factors(ge=0, le=1e6), "Latency of a translation that a cache holds, in ns", default=0.0)
    walk_ns: float = setting(factors(ge=0, le=1e6), "Latency of a walk apart from its reads, in ns", default=226.0)
    read_ns: float = setting(factors(ge=0, le=1e6), "Latency of one read of a table, in ns", default=54.0)
    invalidate_ns: float = setting(
        factors(ge=0, le=1e6), "Time that one descriptor of an invalidation takes, in ns", default=600.0
    )
    device_timeout_ns: float = setting(
        factors(ge=1000, le=1e12),
        "Time in which a device has to answer an invalidation of its device-TLB, in ns; PCIe gives it a minute",
        default=6e10,
    )
    snoop: bool = setting(
        Boolean(), "Entries of domains that are mapped before the run have each access snooped (SNP)", default=False
    )
    write_buffers: bool = setting(
        Boolean(), "Stores to its tables can stand in buffers, which drivers flush after mapping (RWBF)", default=False
    )
    coherent: bool = setting(Boolean(), "Its reads of tables are snooped; else drivers flush each entry", default=True)


@frozen(kw_only=True)
class LinkSpec:
    """A PCIe link with its packets, and what is between it and memory."""

    generation: int = setting(counts(ge=1, le=5), "PCIe generation", default=3)
    lanes: int = setting(counts(choices=LINK_WIDTHS), "Lanes", default=8)
    max_payload: int = setting(sizes(choices=PACKETS), "Largest payload of a packet", default=256)
    max_read: int = setting(sizes(choices=PACKETS), "Largest read request", default=512)
    dllp_percent: float = setting(
        factors(ge=0, le=90), "Share of the link that acknowledgements and flow control take, in percent", default=8.0
    )
    up_ns: float = setting(factors(ge=0, le=1e6), "Latency from the device to the unit, in ns", default=175.0)
    down_ns: float = setting(factors(ge=0, le=1e6), "Latency from memory to the device, in ns", default=175.0)


@frozen(kw_only=True)
class LandingSpec:
    """Where DMA lands: the last-level cache, of which writes allocate some ways, and memory behind it."""

    cache: int = setting(sizes(ge=64 * KIB, le=GIB), "Last-level cache", default=25 * MIB)
    ways: int = setting(counts(ge=1, le=64), "Its ways", default=20)
    write_ways: int = setting(counts(ge=0, le=64), "Ways into which DMA writes may allocate", default=2)
    warm: bool = setting(
        Boolean(), "The CPU has just written the window: its last lines are in the cache", default=True
    )
    cache_ns: float = setting(factors(ge=0, le=1e6), "Latency of a line that the cache holds, in ns", default=60.0)
    dram_ns: float = setting(factors(ge=0, le=1e6), "Latency of a line in memory, in ns", default=130.0)


@frozen(kw_only=True)
class DmaSpec:
    """A device that does DMA operations of one size in a window of its address space."""

    name: str = setting(Text(), "Name in reports; dma0, dma1, … when left out", default="")
    source: str = setting(Text(), "Its bus, device and function, as in 03:00.0", default="03:00.0")
    claims: str = setting(
        Text(), "The requester that its packets name; another than its own for a device that lies", default=""
    )
    window: int = setting(sizes(ge=64, le=64 * GIB), "Bytes of its address space that it uses", default=MIB)
    mapped: int | None = setting(
        sizes(ge=0, le=64 * GIB, words={"all": None}),
        "Of these from the start, bytes that its domain maps",
        default=None,
    )
    pages: str = setting(Text(choices=PAGES), "Size of the pages that map it", default="4 KiB")
    bytes: int = setting(sizes(ge=1, le=4096), "Size of an operation", default=64)
    stride: int | None = setting(
        sizes(ge=64, le=MIB, words={"auto": None}),
        "Distance between two places of the window where operations begin; as close as their size lets, in whole lines",
        default=None,
    )
    operations: int = setting(counts(ge=1, le=2**40), "How many", default=100_000)
    write: bool = setting(Boolean(), "Writes instead of reads", default=False)
    random: bool = setting(Boolean(), "At any place of the window instead of one after the other", default=True)
    tags: int = setting(counts(ge=1, le=512), "Operations in flight", default=32)
    requests: str = setting(
        Text(choices=REQUESTS),
        "The unit translates its addresses; or it asks for translations and keeps them in a device-TLB (ATS); or it "
        "says that they are translated, though nobody did: its window is then in the host's memory, from 1 MiB on",
        default="untranslated",
    )
    device_tlb: int = setting(
        counts(choices=TLB_ENTRIES), f"Entries of its device-TLB, in {TLB_WAYS} ways, where it has ATS", default=64
    )
    device_answer_ns: float = setting(
        factors(ge=0, le=1e12),
        "Of a device with a driver: time that it takes to find what an invalidation names in its device-TLB, in ns "
        "(an estimate); it answers when operations in flight have ended as well",
        default=500.0,
    )
    unanswered: int = setting(
        counts(ge=0, le=1 << 20),
        "Of a device with a driver: invalidations of its device-TLB, from the first on, that it neither obeys nor "
        "answers",
        default=0,
    )
    page_requests: int = setting(
        counts(le=MOST_PAGE_REQUESTS),
        "Of a device with a driver: page requests that it may have outstanding (PRI, Outstanding Page Request "
        "Allocation); its driver then allows buffers and maps their pages when it asks. 0: it cannot ask",
        default=0,
    )
    trusted: bool = setting(
        Boolean(),
        "Its context entry allows translation requests and translated ones, where it makes such",
        default=True,
    )
    no_snoop: bool = setting(
        Boolean(),
        "Its packets ask that caches are not snooped: they go past them, unless its domain wants it",
        default=False,
    )
    read_gap_ns: float = setting(factors(ge=0, le=1e9), "Least time between two reads, in ns", default=0.0)
    write_gap_ns: float = setting(factors(ge=0, le=1e9), "Least time between two writes, in ns", default=0.0)
    hostile_ns: float = setting(
        factors(ge=0, le=1e9),
        "Of a device with a driver: time between two writes to an address after its buffer is done, in ns, or what its "
        "tags and its link take; 0 for none",
        default=0.0,
    )
    flood_ns: float = setting(
        factors(ge=0, le=1e9),
        "Of a device that asks for pages: time between two bursts of page requests for addresses that its driver never "
        "allowed, in ns; 0 for none",
        default=0.0,
    )
    flood: int = setting(
        counts(ge=1, le=1 << 16),
        "Page requests of such a burst, whatever the device may have outstanding",
        default=1,
    )
    link: LinkSpec = setting(Group(spec=LinkSpec), "Its link", factory=LinkSpec)

    @property
    def gap_ns(self) -> float:
        """Least time between two operations of the kind that it does."""
        return self.write_gap_ns if self.write else self.read_gap_ns


DEFAULT = DmaSpec()


def _without_effect(each: DmaSpec, where: str) -> Iterator[Problem]:
    """Yield what is said of a device-TLB, or of translations of its own, that the device does not have."""
    no_tlb, own = each.requests != "ats", each.requests != "untranslated"
    for key, wrong, message, legal in (
        ("device_tlb", no_tlb, "a device without ATS has no device-TLB", "requests ats"),
        ("device_answer_ns", no_tlb, "a device without ATS has no device-TLB that it is to invalidate", "requests ats"),
        ("unanswered", no_tlb, "a device without ATS has no device-TLB whose invalidation it could leave unanswered",
         "requests ats"),
        ("page_requests", no_tlb, "a device without ATS learns of no page that is not there", "requests ats"),
        ("flood_ns", not each.page_requests, "a device that cannot ask for pages floods nothing",
         "page_requests 1 and more"),
        ("flood", not each.flood_ns, "a device that does not flood has no bursts", "flood_ns more than 0"),
        ("trusted", not own, "a device that neither asks for translations nor says that it has them needs no trust",
         "requests ats, forged"),
    ):  # fmt: skip
        if wrong and getattr(each, key) != (default := getattr(DEFAULT, key)):
            said = str(default).lower() if isinstance(default, bool) else f"{default:g}"
            yield Problem(path=f"{where}.{key}", message=message, help=f"{key} can be {said}; or {legal}")


def dma_conflicts(dma: tuple[DmaSpec, ...], memory: int, mode: str) -> Iterator[Problem]:
    """Yield what contradicts itself in the devices of a scenario; `mode` is the unit's."""
    names: set[str] = set()
    sources: dict[int, str] = {}
    left = memory
    for number, each in enumerate(dma):
        where = f"dma.{number}"
        for key in ("source", "claims"):
            text = getattr(each, key)
            try:
                if text:
                    source = requester(text)
                    if key == "source" and sources.setdefault(source, where) != where:
                        yield Problem(
                            path=f"{where}.source",
                            message=f"{text!r} is the source of {sources[source]} as well",
                            help="give each device its own; to name another requester than one's own there is claims",
                        )
            except ConfigError:
                yield Problem(
                    path=f"{where}.{key}",
                    message=f"{text!r} is not a bus, device and function",
                    help="write it as in 03:00.0: hexadecimal, the device up to 1f, the function up to 7",
                )
        if each.requests != "untranslated" and mode != "translate":
            yield Problem(
                path=f"{where}.requests",
                message=f"translations of a device's own need domains, and machine.iommu.mode is {mode!r}",
                help="requests can be untranslated; or machine.iommu.mode translate",
            )
        yield from _without_effect(each, where)
        if each.bytes > each.window:
            yield Problem(
                path=f"{where}.bytes",
                message=f"{SIZE.format(each.bytes)} do not fit into a window of {SIZE.format(each.window)}",
                help="raise the window",
            )
        elif each.stride is not None and not each.bytes <= each.stride <= each.window:
            yield Problem(
                path=f"{where}.stride",
                message=f"operations of {SIZE.format(each.bytes)} do not begin every {SIZE.format(each.stride)} of a "
                f"window of {SIZE.format(each.window)}",
                help=f"stride can be {SIZE.format(each.bytes)} to {SIZE.format(each.window)}",
            )
        if each.window > left // 2:
            yield Problem(
                path=f"{where}.window",
                message=f"{SIZE.format(each.window)} is more than half of the {SIZE.format(left)} of memory left",
                help="make the window smaller, or raise machine.memory",
            )
        left = max(0, left - each.window)
        name = each.name or f"dma{number}"
        if name in names:
            yield Problem(
                path=f"{where}.name", message=f"two devices are named {name!r}", help="give each its own name"
            )
        names.add(name)
