"""What a CPU profile says: every value, its unit, its range and what it means; nothing here reads a file.

Groups are frozen attrs classes, so that `profile.tlb.stlb.entries` is an int. `LEAVES` lists every value by
its dotted path, which is how a scenario names it. Cycles are cycles of `clock_hz`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from vtsim.base.units import COUNT, DURATION, FREQUENCY, SIZE, Dimension

DIMENSION_OF: Final = {"ns": DURATION, "bytes": SIZE, "Hz": FREQUENCY}  # of a leaf's unit; others are counts


@attrs.frozen(kw_only=True)
class Leaf:
    """One value that a profile must give: where, in which unit, between which bounds, and what it means."""

    path: str
    unit: str
    meaning: str
    low: int = 0
    high: int = 1 << 40

    @property
    def dimension(self) -> Dimension | None:
        """What the number measures; None: it is no number."""
        return None if self.unit in ("flag", "name") else DIMENSION_OF.get(self.unit, COUNT)

    @property
    def accepted(self) -> str:
        """Say in words what a scenario may write."""
        if self.dimension is None:
            return "write true or false" if self.unit == "flag" else "write a name in quotes"
        other = "" if self.dimension is COUNT else f", or a {self.dimension.name} like {self.dimension.example!r}"
        return f"write a whole number of {self.unit}, {self.low} to {self.high}{other}"


def _value(unit: str, meaning: str, low: int = 0, high: int = 1 << 40) -> Any:
    return attrs.field(metadata={"unit": unit, "meaning": meaning, "low": low, "high": high})


@attrs.frozen(kw_only=True)
class Translations:
    """A set-associative cache of translations; 0 entries means that it is absent or switched off."""

    entries: int = _value("entries", "translations it holds; 0 is absent or off", 0, 1 << 20)
    ways: int = _value("ways", "ways of a set; as many as entries is fully associative", 1, 64)

    @property
    def sets(self) -> int:
        """Return the number of sets, 0 when absent."""
        return self.entries // self.ways


@attrs.frozen(kw_only=True)
class SecondLevelTlb(Translations):
    """The unified second-level TLB; what it holds besides 4 KiB pages differs between generations."""

    holds_2m: bool = _value("flag", "2 MiB translations share it with 4 KiB ones")
    hit_cycles: int = _value(
        "cycles", "added to an access that misses the first level: it hits here, or a walk begins then", 0, 1000
    )


@attrs.frozen(kw_only=True)
class Tlb:
    """The TLBs of one logical CPU whose core has no other; of two, each has half of those for data."""

    dtlb4k: Translations
    dtlb2m: Translations
    dtlb1g: Translations
    itlb4k: Translations
    itlb2m: Translations
    stlb: SecondLevelTlb
    stlb1g: Translations


@attrs.frozen(kw_only=True)
class GuestPwc:
    """Paging-structure caches of linear (or combined, under EPT) addresses.

    SDM: "Caches for Paging Structures".
    """

    pml5e: Translations
    pml4e: Translations
    pdpte: Translations
    pde: Translations
    hit_cycles: int = _value("cycles", "added to a walk that starts from a cached entry", 0, 1000)


@attrs.frozen(kw_only=True)
class EptPwc:
    """Paging-structure caches of guest-physical addresses.

    SDM: "Information That May Be Cached".
    """

    pml5e: Translations
    pml4e: Translations
    pdpte: Translations
    pde: Translations
    hit_cycles: int = _value("cycles", "added to an EPT walk that starts from a cached entry", 0, 1000)


@attrs.frozen(kw_only=True)
class NestedTlb(Translations):
    """Guest-physical to host-physical translations, used during two-dimensional walks."""

    hit_cycles: int = _value("cycles", "added to each guest reference whose translation is found here", 0, 1000)


@attrs.frozen(kw_only=True)
class CacheLevel:
    """A level of cache; 0 bytes means absent. Latencies are load-to-use, not sums over levels."""

    bytes: int = _value("bytes", "capacity; 0 is absent", 0, 1 << 34)
    ways: int = _value("ways", "ways of a set", 1, 31)
    hit_cycles: int = _value("cycles", "load-to-use when found here (of an instruction line: the added stall)", 0, 1000)

    def sets(self, line_bytes: int) -> int:
        """Return the number of sets, 0 when absent; any number is legal."""
        return self.bytes // (self.ways * line_bytes)


@attrs.frozen(kw_only=True)
class Streamer:
    """L2 follows streams of lines, upwards and downwards in each page of 4 KiB, and fetches what comes next of them."""

    entries: int = _value("pages", "pages of whose lines it knows which one was asked for last; 0: none", 0, 1024)
    ways: int = _value("ways", "ways of a set; as many as entries is fully associative", 1, 64)
    lines_ahead: int = _value("lines", "how far ahead of the line that is asked for it fetches others", 1, 63)


@attrs.frozen(kw_only=True)
class Cache:
    """The caches that one core sees; the last one is shared."""

    line_bytes: int = _value("bytes", "bytes of a line", 64, 64)
    adjacent_line_prefetcher: bool = _value(
        "flag", "L2 completes a line that it fetches to an aligned pair of two, for which nobody waits"
    )
    next_line_prefetcher: bool = _value(
        "flag",
        "a load that L1D lacks, behind a line that it has, fetches what comes next of the page, for which nobody waits",
    )
    quad_age_l3: bool = _value(
        "flag",
        "L3 keeps ages of its lines, and takes most new ones as old where its sets find that better; else one bit",
    )
    streamer: Streamer
    super_queue: int = _value(
        "lines",
        "lines that L2 waits for at most, of L3 or memory, when it fetches others that nobody asked for",
        1,
        256,
    )
    l1i: CacheLevel
    l1d: CacheLevel
    l2: CacheLevel
    l3: CacheLevel


@attrs.frozen(kw_only=True)
class Dram:
    """Load-to-use latency of an access that no cache holds, and how much of that a node's memory can serve."""

    local_ns: int = _value("ns", "load-to-use, memory of the own socket", 1, 100_000)
    remote_ns: int = _value("ns", "load-to-use, memory of the other socket", 1, 100_000)
    bandwidth: int = _value("MB/s", "what the memory of one socket can deliver", 1, 10_000_000)
    channels: int = _value("channels", "channels of one socket, each with a part of the bandwidth and a queue", 1, 16)
    queue: int = _value("lines", "lines that a channel's queue holds; others wait until it has room", 1, 256)
    ranks: int = _value(
        "ranks",
        "ranks of each channel; 0: no bank is ever busy, none refreshes, and channels are not told apart",
        0,
        16,
    )
    banks: int = _value("banks", "banks of a rank, each of which opens one row at a time", 1, 64)
    row_cycle_ns: int = _value("ns", "from one row of a bank to the next (tRC)", 1, 1000)
    refresh_ns: int = _value("ns", "for how long a rank that refreshes does nothing else (tRFC)", 0, 999)
    refresh_interval_ns: int = _value("ns", "from one refresh of a rank to the next (tREFI)", 1000, 100_000)

    @property
    def channels_apart(self) -> int:
        """Channels of a socket that are told apart: with ranks all, else none from the others."""
        return self.channels if self.ranks else 1


@attrs.frozen(kw_only=True)
class Work:
    """Ordinary instructions, as far as they do not wait for memory."""

    cycles_per_100_instructions: int = _value("cycles", "for 100 instructions that all hit L1", 1, 10_000)
    mlp: int = _value("misses", "L1D misses that independent accesses keep outstanding", 1, 32)
    reorder_buffer: int = _value("instructions", "in flight at once, from the oldest that waits on", 1, 4096)
    mispredict_cycles: int = _value("cycles", "from where a mispredicted branch is known to its right path", 0, 1000)
    two_threads_percent: int = _value(
        "percent", "what two threads of a core execute while neither waits, of what one alone would", 100, 200
    )


@attrs.frozen(kw_only=True)
class Transitions:
    """Hardware cost of VMX transitions alone: no hypervisor instruction is in it."""

    vm_exit_cycles: int = _value("cycles", "from the exiting operation to the first hypervisor instruction")
    vm_entry_cycles: int = _value("cycles", "from VMRESUME or VMLAUNCH to the first guest instruction")


@attrs.frozen(kw_only=True)
class Latency:
    """Times that belong to the machine around the core, so they are in nanoseconds."""

    wake_ns: int = _value("ns", "from an interrupt to the first instruction of a halted CPU")
    ipi_ns: int = _value("ns", "from the ICR write to the interrupt at another CPU")
    cross_cpu_ns: int = _value(
        "ns", "smallest latency of interrupts between CPUs: the largest quantum where they meet otherwise nowhere", 1
    )
    transfer_ns: int = _value("ns", "load-to-use of a line that the cache of another core of the socket holds alone")
    remote_transfer_ns: int = _value("ns", "the same of a core of the other socket")
    port_ns: int = _value("ns", "round trip of IN or OUT to a chipset device")
    mmio_ns: int = _value("ns", "round trip of an uncached read of a device register")
    posted_ns: int = _value("ns", "store to a device register, which does not wait for the device")


@attrs.frozen(kw_only=True)
class Features:
    """What CPUID reports and the kernels of this project ask for."""

    nx: bool = _value("flag", "execute-disable")
    pages_1g: bool = _value("flag", "1 GiB pages in guest and native page tables")
    la57: bool = _value("flag", "57-bit linear addresses, five levels")
    walks_in_l1d: bool = _value("flag", "page walks look up the L1 data cache and fill it; else they begin at L2")
    entry_walk_cache: bool = _value(
        "flag", "the walk cache holds entries of upper levels by their physical address, of both dimensions (AMD's)"
    )
    agile_cr3: bool = _value(
        "flag", "with agile paging, loads of CR3 whose shadow root is in a list do not exit (no processor has it)"
    )
    agile_paging: bool = _value(
        "flag", "walks that begin in shadow tables and go on in two dimensions (no processor has)"
    )
    pcid: bool = _value("flag", "process-context identifiers")
    invpcid: bool = _value("flag", "INVPCID instruction")
    smep: bool = _value("flag", "supervisor-mode execution prevention")
    smap: bool = _value("flag", "supervisor-mode access prevention")
    fsgsbase: bool = _value("flag", "RDFSBASE and friends")
    rdtscp: bool = _value("flag", "RDTSCP instruction")
    invariant_tsc: bool = _value("flag", "TSC at a constant rate in all C-states")
    tsc_adjust: bool = _value("flag", "IA32_TSC_ADJUST")
    tsc_deadline: bool = _value("flag", "TSC-deadline mode of the APIC timer")
    x2apic: bool = _value("flag", "x2APIC mode")
    monitor: bool = _value("flag", "MONITOR and MWAIT")
    xsave: bool = _value("flag", "XSAVE and XSETBV")
    xsaves: bool = _value("flag", "XSAVES and XRSTORS")
    rdrand: bool = _value("flag", "RDRAND instruction")
    rdseed: bool = _value("flag", "RDSEED instruction")
    spec_ctrl: bool = _value(
        "flag", "microcode of 2018 and 2019: IA32_SPEC_CTRL.IBRS, IA32_PRED_CMD, IA32_FLUSH_CMD, VERW with MD_CLEAR"
    )


@attrs.frozen(kw_only=True)
class Vmx:
    """Which generation of VMX: names a row of the capability table of `vtsim.vmcs`."""

    generation: str = _value("name", "generation whose capability MSRs the CPU reports")


# Every operation with a price. The price is the operation alone: what it reads and writes in memory, the
# transition it may cause and the bus behind it are priced by their own values.
# fmt: off
OPERATIONS: Final[Mapping[str, str]] = {
    # ordinary work
    "MOV": "register move",                          "ADD": "register arithmetic, logic and compare",
    "LD": "load: issue only, its latency is the cache's",
    "ST": "store: issue only",
    "PUSH": "push: issue only",                      "POP": "pop: issue only",
    "JMP": "direct jump",                            "JCC": "conditional jump, predicted",
    "CALL": "direct near call",                      "RET": "near return, predicted",
    "INDIRECT": "indirect jump or call, predicted",  "ATOMIC": "locked read-modify-write, line present",
    "RETPOLINE": "indirect branch through a retpoline, beyond a predicted one",
    # ring changes
    "SYSCALL": "SYSCALL",                            "SYSRET": "SYSRET",
    "SYSENTER": "SYSENTER",                          "SYSEXIT": "SYSEXIT",
    "INT": "INT n through a gate, with a ring change",
    "IRET": "IRET, with a ring change",
    "EXCEPTION": "delivery of an exception through the IDT",
    "INTERRUPT": "delivery of an interrupt through the IDT",
    "SWAPGS": "SWAPGS",
    # identification, time, chance
    "CPUID": "CPUID leaf 0",                         "CPUID_1": "CPUID leaf 1 and any other leaf",
    "RDTSC": "RDTSC",                                "RDTSCP": "RDTSCP",
    "RDPMC": "RDPMC",                                "PAUSE": "PAUSE",
    "RDRAND": "RDRAND",                              "RDSEED": "RDSEED",
    # control, debug and model-specific registers
    "RDMSR": "RDMSR",                                "WRMSR": "WRMSR, serialising",
    "WRMSR_X2APIC": "WRMSR to an x2APIC register or IA32_TSC_DEADLINE, not serialising",
    "MOV_FROM_CR": "read of CR0, CR2, CR3, CR4",     "MOV_TO_CR0": "write of CR0",
    "MOV_TO_CR2": "write of CR2",                    "MOV_TO_CR3": "write of CR3 that flushes",
    "MOV_TO_CR3_NOFLUSH": "write of CR3 that keeps the translations of the PCID",
    "MOV_TO_CR4": "write of CR4",                    "MOV_DR": "read or write of a debug register",
    "MOV_FROM_CR8": "read of CR8",                   "MOV_TO_CR8": "write of CR8",
    "CLTS": "CLTS",                                  "LMSW": "LMSW",
    "SMSW": "SMSW",                                  "XSETBV": "XSETBV",
    # descriptor tables and flags
    "LGDT": "LGDT",                                  "SGDT": "SGDT",
    "LIDT": "LIDT",                                  "SIDT": "SIDT",
    "LTR": "LTR, LLDT and what else reads a descriptor",
    "STR": "STR, SLDT and other reads of a segment register",
    "VERW": "VERW of a selector in memory, which overwrites buffers where microcode has MD_CLEAR",
    "STAC": "STAC and CLAC",                         "RDPKRU": "RDPKRU",
    "WRPKRU": "WRPKRU",
    "PUSHF": "PUSHF",                                "POPF": "POPF",
    "CLI": "CLI",                                    "STI": "STI",
    # idle, caches and translations
    "HLT": "HLT, entry into the halt only",          "MONITOR": "MONITOR",
    "MWAIT": "MWAIT, entry only",                    "INVLPG": "INVLPG",
    "INVPCID": "INVPCID, one context",               "WBINVD": "WBINVD and INVD, of clean caches",
    "IBPB": "WRMSR of IA32_PRED_CMD: indirect branch prediction barrier",
    "L1D_FLUSH": "WRMSR of IA32_FLUSH_CMD: L1D written back and invalidated",
    # input and output, extended state
    "IN": "IN or one element of INS, the device apart",
    "OUT": "OUT or one element of OUTS, the device apart",
    "XSAVES": "XSAVES of x87, SSE and AVX state",    "XRSTORS": "XRSTORS of the same state",
    # VMX
    "VMXON": "VMXON",                                "VMXOFF": "VMXOFF",
    "VMCLEAR": "VMCLEAR",                            "VMPTRLD": "VMPTRLD",
    "VMPTRST": "VMPTRST",                            "VMREAD": "VMREAD",
    "VMWRITE": "VMWRITE",                            "VMCALL": "VMCALL, the VM exit apart",
    "VMFUNC": "VMFUNC, EPTP switching",              "INVEPT": "INVEPT, single context",
    "INVVPID": "INVVPID, single context",
}
# fmt: on

_PRICE_HIGH: Final = 1 << 32


@attrs.frozen(kw_only=True)
class Values:
    """Every value of a profile, as numbers without their sources."""

    clock_hz: int = _value(
        "Hz", "base clock; every cycle of this profile is one of its cycles", 1_000_000, 20_000_000_000
    )
    cores: int = _value("cores", "cores of one socket", 1, 1024)
    physical_address_bits: int = _value("bits", "MAXPHYADDR", 32, 52)
    walkers: int = _value("walkers", "page walks in progress at once", 1, 8)
    walk_start_cycles: int = _value(
        "cycles", "of a page walk besides its references and what walk caches take, and the look-up before it", 0, 1000
    )
    tlb: Tlb
    pwc: GuestPwc
    ept_pwc: EptPwc
    nested_tlb: NestedTlb
    cache: Cache
    dram: Dram
    work: Work
    transitions: Transitions
    latency: Latency
    features: Features
    vmx: Vmx
    prices: Mapping[str, int]


def leaves(group: type = Values, prefix: str = "") -> Iterator[Leaf]:
    """List every value that `group` holds, in declaration order."""
    for field in attrs.fields(attrs.resolve_types(group)):
        path = f"{prefix}{field.name}"
        if field.metadata:
            yield Leaf(path=path, **field.metadata)
        elif path == "prices":
            for name, meaning in OPERATIONS.items():
                yield Leaf(path=f"prices.{name}", unit="cycles", meaning=meaning, high=_PRICE_HIGH)
        else:
            yield from leaves(field.type, f"{path}.")


LEAVES: Final[Mapping[str, Leaf]] = {leaf.path: leaf for leaf in leaves()}


def build(values: Mapping[str, Any], group: type = Values, prefix: str = "") -> Any:
    """Assemble `group` from values given by dotted path."""
    arguments: dict[str, Any] = {}
    for field in attrs.fields(attrs.resolve_types(group)):
        path = f"{prefix}{field.name}"
        if field.metadata:
            arguments[field.name] = values[path]
        elif path == "prices":
            arguments[field.name] = {name: values[f"prices.{name}"] for name in OPERATIONS}
        else:
            arguments[field.name] = build(values, field.type, f"{path}.")
    return group(**arguments)


def problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Find impossible values: (path, why it cannot be, what would be accepted).

    A translation cache indexes its sets with address bits, so their number is a power of two; a cache may
    spread addresses by a hash, so any number of sets is legal.
    """
    for path, leaf in LEAVES.items():
        value = values[path]
        if leaf.unit == "flag":
            if not isinstance(value, bool):
                yield path, f"{value!r} is not true or false", "write true or false"
        elif leaf.unit == "name":
            if not isinstance(value, str) or not value:
                yield path, f"{value!r} is not a name", "write a name in quotes"
        elif isinstance(value, bool) or not isinstance(value, int):
            accepted = f"write a whole number, {leaf.low} to {leaf.high}"
            yield path, f"{value!r} is not a whole number of {leaf.unit}", accepted
        elif not leaf.low <= value <= leaf.high:
            accepted = f"{leaf.path} can be {leaf.low} to {leaf.high} {leaf.unit}"
            yield path, f"{value} {leaf.unit} is out of range", accepted
    for path in LEAVES:
        stem, _, name = path.rpartition(".")
        size, ways = values[path], values.get(f"{stem}.ways")
        if type(size) is not int or type(ways) is not int or size <= 0 or ways < 1:
            continue
        if name == "entries" and not _power_of_two(size / ways):
            sets = f"{size} entries in {ways} ways is {size / ways:g} sets"
            legal = [w for w in range(1, min(size, 64) + 1) if _power_of_two(size / w)]
            fewer = 1 << max(0, (size // ways).bit_length() - 1)
            yield (
                f"{stem}.ways",
                f"{sets}, and the set index needs a power of two",
                "ways can be " + ", ".join(map(str, legal))
                if legal
                else f"entries can be {fewer * ways} or {2 * fewer * ways}",
            )
        if name == "bytes":
            line = values["cache.line_bytes"]
            if type(line) is not int or line <= 0:
                continue
            if size % (ways * line):
                why = f"{size} bytes is not a whole number of sets of {ways} ways of {line} bytes"
                yield path, why, f"use a multiple of {ways * line} bytes"


def _power_of_two(number: float) -> bool:
    return number.is_integer() and int(number) & (int(number) - 1) == 0
