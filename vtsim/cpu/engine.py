"""The engine: logical CPUs over one physical memory, as three arrays, and the compiled loop that advances them.

Everything that changes during a run lives in `cpus` (one record per logical CPU), `arena` and `tags`: copying them is
saving, putting them back is restoring. The builder methods lay programs, values and tables into memory before a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np
from attrs import define, field, frozen

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.base.jit import quiet
from vtsim.base.trace import COLUMNS
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import PAGE, Program
from vtsim.cpu.codes import FOREVER, HORIZON, STOPS, WINDOW_EMPTY
from vtsim.cpu.kernels.coherence import PEER_WORDS
from vtsim.cpu.kernels.contexts import CONTEXT_LIMIT, NO_CONTEXT, set_context
from vtsim.cpu.kernels.dram import BANDWIDTH_WORDS, BANK_WORDS, PARTS, QUEUE_WORDS, RANK_WORDS
from vtsim.cpu.kernels.fetch import FETCH_ENTRIES, FETCH_WORDS
from vtsim.cpu.kernels.foresight import WORDS
from vtsim.cpu.kernels.hyper_threads import ONE
from vtsim.cpu.kernels.ipi import FLIGHTS
from vtsim.cpu.kernels.ports import PORTS
from vtsim.cpu.kernels.prefetchers import ARRIVAL_WORDS
from vtsim.cpu.kernels.rare_msrs import SAVED
from vtsim.cpu.kernels.run import EVERY_CPU, run_all
from vtsim.cpu.profile import Profile
from vtsim.vmcs.capabilities import CAPABILITY_MSRS, FIELD_INDEXES, FIRST_CAPABILITY, Capabilities
from vtsim.vmcs.fields import Area, Width
from vtsim.vmcs.generations import GENERATIONS

NS: Final = 1_000_000_000
DIRECTORY_WAYS: Final = 16
COMPARED_AT_ONCE: Final = 16  # tags, also of a set with fewer ways
HOLE: Final = range(3 << 30, 4 << 30)
UNPRICED: Final = frozenset({"", "MOV_TO_CR", "VM_ENTRY"})
ALL_OPS: Final = 1 << 62
OF_ONE_THREAD: Final = ("itlb4k", "itlb2m")  # profiles say what one thread has


@frozen(kw_only=True)
class Geometry:
    """How large the arenas of a machine are. Memory and pool cost host memory only where they are used.

    `memory_bytes`: simulated RAM, of which each of `nodes` has an equal part, as it has of the CPUs. `threads`: CPUs of
    a core, which are neighbours.
    `pool_pages`: frames that may gain contents. `code_pages`, `rows`: programs.
    """

    cpus: int = 1
    memory_bytes: int
    pool_pages: int
    code_pages: int = 256
    rows: int = 1 << 16
    owners: int = 4
    trace_rows: int = 1 << 15
    extra_words: int = 0
    nodes: int = 1
    threads: int = 1

    @property
    def cores(self) -> int:
        """How many cores the CPUs belong to."""
        return self.cpus // self.threads

    @property
    def frame_count(self) -> int:
        """Frame numbers up to the end of RAM, which continues above the device hole."""
        frames = -(-self.memory_bytes // PAGE)
        return frames if frames <= mem.HOLE_FIRST else frames + mem.HOLE_LAST + 1 - mem.HOLE_FIRST

    def node_of(self, cpu: int) -> int:
        """The node that a CPU belongs to."""
        return cpu // self.threads * self.nodes // self.cores

    def node_frames(self, node: int) -> tuple[int, int]:
        """The first frame of a node's memory, and the one behind the last; both begin 2 MiB."""
        ram = -(-self.memory_bytes // PAGE)
        first, end = (_beyond_hole(ram * n // self.nodes // mem.BLOCK * mem.BLOCK) for n in (node, node + 1))
        return first, end if node + 1 < self.nodes else -(-self.frame_count // mem.BLOCK) * mem.BLOCK


def _beyond_hole(ram_frame: int) -> int:
    return ram_frame if ram_frame < mem.HOLE_FIRST else ram_frame + mem.HOLE_LAST + 1 - mem.HOLE_FIRST


@define
class Carver:
    """Hands out consecutive ranges of an arena."""

    at: int = 0

    def take(self, words: int, align: int = 8) -> int:
        start = -(-self.at // align) * align
        self.at = start + words
        return start


@frozen(kw_only=True)
class Snapshot:
    """A machine's whole engine state between two ops."""

    cpus: np.ndarray
    arena: np.ndarray
    tags: np.ndarray


@define(eq=False)
class Engine:
    """Logical CPUs and memory of one machine."""

    profile: Profile
    geometry: Geometry
    cpus: np.ndarray = field(init=False)
    arena: np.ndarray = field(init=False)
    tags: np.ndarray = field(init=False)
    extra: int = field(init=False)
    owners: dict[str, int] = field(factory=dict, init=False)
    feeds: dict[int, Callable[[np.ndarray, int], None]] = field(factory=dict, init=False)  # by window

    def __attrs_post_init__(self) -> None:
        g = self.geometry
        carve, tags = Carver(mem.HEADER_WORDS), Carver()
        frames = carve.take(g.frame_count)
        code_of = carve.take(g.frame_count)
        rows = carve.take(g.rows * o.ROW_WORDS)
        owners = carve.take(g.owners * k.OWNER_WORDS)
        trace = carve.take(g.trace_rows * len(COLUMNS))
        ports = carve.take(2 * PORTS)
        cpuid = carve.take(6 * 128)
        capabilities = carve.take(32)
        fields = carve.take(len(Width) * len(Area) * FIELD_INDEXES)
        code_maps = tags.take(g.code_pages * PAGE)
        records = np.zeros((g.cpus, s.RECORD_SLOTS), np.int64)
        shared_l3 = self._carve_cache(tags, "l3")
        directory = self._carve_directory(tags)
        peers = carve.take(g.cores * PEER_WORDS)
        owned_since = carve.take(directory[s.SETS] * directory[s.WAYS])
        dram = self.profile.dram
        channels = dram.channels_apart
        bandwidths = carve.take(g.nodes * channels * BANDWIDTH_WORDS)
        banks = carve.take(g.nodes * channels * dram.ranks * (RANK_WORDS + dram.banks * BANK_WORDS))
        queues = carve.take(g.nodes * channels * dram.queue * QUEUE_WORDS if dram.ranks else 0)
        fills: list[tuple[int, int]] = []
        for number in range(g.cpus):
            fills += self._lay_out_cpu(records[number], number, carve)
            self._lay_out_caches(records, number, tags, shared_l3)
            fills += self._lay_out_prefetchers(records, number, carve)
        self.extra = carve.take(g.extra_words)
        pool = carve.take((g.pool_pages + 1) * mem.PAGE_WORDS, align=mem.PAGE_WORDS)
        a = self.arena = np.zeros(carve.at, np.int64)
        t = self.tags = np.zeros(tags.at + COMPARED_AT_ONCE, np.int32)
        t[code_maps : code_maps + g.code_pages * PAGE] = -1
        for start, length in fills:
            a[start : start + length] = -1
        t[directory[0] : directory[0] + directory[s.SETS] * 2 * directory[s.WAYS]] = -1
        for number, record in enumerate(records):
            record[s.DIRECTORY : s.DIRECTORY + len(directory)] = directory
            record[s.PEERS] = peers if g.cores > 1 else 0
            record[s.OWNED_SINCE] = owned_since
            record[s.BANDWIDTHS] = bandwidths
            record[s.BANKS] = banks
            record[s.QUEUES] = queues
            record[s.CHANNELS] = channels
            for cache in (s.L1I, s.L1D, s.L2, s.L3):
                start, sets, ways = (int(record[cache + n]) for n in (0, s.SETS, s.WAYS))
                t[start : start + sets * ways] = -1
                if record[cache + s.AGED]:
                    start = int(record[cache + s.REFERENCED])
                    t[start : start + 2 * sets] = (1 << ways) - 1  # all are as old as can be
            at = peers + number // g.threads * PEER_WORDS
            a[at : at + PEER_WORDS] = record[s.L1D], record[s.L2], g.node_of(number), 0
        header = {
            mem.A_FRAMES: frames, mem.A_FRAME_COUNT: g.frame_count, mem.A_CODE_OF: code_of, mem.A_POOL: pool,
            mem.A_POOL_NEXT: 1, mem.A_POOL_LIMIT: g.pool_pages + 1, mem.A_ROWS: rows, mem.A_ROW_COUNT: 1,
            mem.A_ROW_LIMIT: g.rows, mem.A_CODE_MAPS: code_maps, mem.A_CODE_LIMIT: g.code_pages,
            mem.A_OWNERS: owners, mem.A_OWNER_WORDS: k.OWNER_WORDS, mem.A_TRACE: trace,
            mem.A_TRACE_LIMIT: g.trace_rows, mem.A_PORTS: ports, mem.A_CPUID: cpuid,
            mem.A_CAPABILITIES: capabilities, mem.A_BASE_HZ: self.profile.clock_hz, mem.A_CPUS: g.cpus,
            mem.A_FIELDS: fields,
        }  # fmt: skip
        for slot, value in header.items():
            a[slot] = value
        self.cpus = records
        self.vmx(GENERATIONS[self.profile.vmx.generation].capabilities())
        host = self.owner("host")
        for record in records:
            record[s.OWNER] = record[s.HOST_OWNER] = host
            record[s.CONTEXT_KEY] = record[s.OTHER_KEY] = NO_CONTEXT
            with quiet():
                set_context(record, a)

    # --- layout ---------------------------------------------------------------------------------------------
    def _carve_cache(self, tags: Carver, name: str) -> tuple[int, ...]:
        level = getattr(self.profile.cache, name)
        ways = level.ways if level.bytes else 0
        sets = level.sets(self.profile.cache.line_bytes) if level.bytes else 1
        aged = int(name == "l3" and ways > 0 and self.profile.cache.quad_age_l3)
        base = tags.take(sets * ways, align=16)
        referenced = tags.take(2 * sets + 2 if aged else sets)  # with ages also who decides, and a random number
        return base, sets, ways, level.hit_cycles, referenced, sets - 1 if sets & (sets - 1) == 0 else -1, aged

    def _carve_directory(self, tags: Carver) -> tuple[int, ...]:
        """A directory of the lines that all cores can hold, with an owner for each; empty with one core."""
        cache, cores = self.profile.cache, self.geometry.cores
        if cores == 1:
            return (0,) * (s.POWER + 1)
        lines = cores * sum(level.bytes for level in (cache.l1i, cache.l1d, cache.l2)) // cache.line_bytes
        sets = 1 << (lines // DIRECTORY_WAYS).bit_length()
        base = tags.take(sets * 2 * DIRECTORY_WAYS, align=16)
        return base, sets, DIRECTORY_WAYS, 0, tags.take(sets), sets - 1

    def _lay_out_caches(self, records: np.ndarray, number: int, tags: Carver, l3: tuple[int, ...]) -> None:
        """A core's caches, which are its first CPU's and all others' of it."""
        m, thread = records[number], number % self.geometry.threads
        for cache, name in ((s.L1I, "l1i"), (s.L1D, "l1d"), (s.L2, "l2")):
            shape = slice(cache, cache + s.AGED + 1)
            m[shape] = records[number - thread, shape] if thread else self._carve_cache(tags, name)
        m[s.L3 : s.L3 + s.AGED + 1] = l3

    def _lay_out_prefetchers(self, records: np.ndarray, number: int, carve: Carver) -> list[tuple[int, int]]:
        """What a core's L2 follows and has fetched, which is its first CPU's and all others' of it."""
        m, cache, thread = records[number], self.profile.cache, number % self.geometry.threads
        m[s.LINES_AHEAD], m[s.SUPER_QUEUE_LINES] = cache.streamer.lines_ahead, cache.super_queue
        if thread:
            first = records[number - thread]
            for slot in (s.ARRIVALS, s.SUPER_QUEUE, *range(s.STREAMS, s.STREAMS + 4)):
                m[slot] = first[slot]
            return []
        ways = cache.streamer.ways if cache.streamer.entries and cache.l2.bytes else 0
        sets = cache.streamer.entries // ways if ways else 1
        arrivals, pages = carve.take(ARRIVAL_WORDS), carve.take(sets * ways)
        m[s.ARRIVALS], m[s.SUPER_QUEUE] = arrivals, carve.take(1 + 2 * cache.super_queue)
        m[s.STREAMS : s.STREAMS + 4] = pages, sets - 1, ways, carve.take(sets * ways + sets)
        return [(arrivals, ARRIVAL_WORDS), (pages, sets * ways)]

    def _lay_out_cpu(self, m: np.ndarray, number: int, carve: Carver) -> list[tuple[int, int]]:
        p, g = self.profile, self.geometry
        empty: list[tuple[int, int]] = []
        for structure, path in zip(range(s.DTLB4K, s.NESTED_TLB + 1, 4), s.TRANSLATION_STRUCTURES, strict=True):
            spec: Any = p
            for part in (path if "." in path or path == "nested_tlb" else f"tlb.{path}").split("."):
                spec = getattr(spec, part)
            ways = spec.ways if spec.entries else 0
            sets = spec.sets if spec.entries else 1
            if g.threads > 1 and path not in OF_ONE_THREAD:
                sets, ways = (sets // 2, ways) if sets > 1 else (sets, -(-ways // 2))
            m[structure] = carve.take(sets * ways)
            m[structure + s.MASK] = sets - 1
            m[structure + s.WAYS] = ways
            m[structure + s.DATA] = carve.take(sets * ways + sets)
            empty.append((int(m[structure]), sets * ways))
        if p.features.entry_walk_cache and p.ept_pwc.pde.entries:  # one cache for both dimensions
            m[s.EPT_PDE : s.EPT_PDE + 4] = m[s.PWC_PDE : s.PWC_PDE + 4]
        m[s.CONTEXTS] = carve.take(CONTEXT_LIMIT)
        m[s.FORESEEN] = carve.take(WORDS)
        m[s.IPI_FLIGHTS] = carve.take(2 * FLIGHTS)
        m[s.FETCH_PAGES] = carve.take(FETCH_ENTRIES * FETCH_WORDS)
        empty.append((int(m[s.FETCH_PAGES]), FETCH_ENTRIES * FETCH_WORDS))
        m[s.LINE_GENERATIONS] = carve.take(self.geometry.code_pages * 64)
        m[s.UNCACHED_LINES] = carve.take(64)  # of no generation
        m[s.LINES] = m[s.LINE_GENERATIONS]
        m[s.FETCH_GENERATION] = 1
        values = {
            s.CPU: number, s.DRAM_CYCLES: p.cycles(p.dram.local_ns),
            s.STLB_HIT_CYCLES: p.tlb.stlb.hit_cycles if p.tlb.stlb.entries or p.tlb.stlb1g.entries else 0,
            s.WALK_START: p.walk_start_cycles,
            s.STLB_HOLDS_2M: int(p.tlb.stlb.holds_2m),
            s.IN_PAIRS: int(p.cache.adjacent_line_prefetcher and p.cache.l2.bytes > 0),
            s.NEXT_LINES: int(p.cache.next_line_prefetcher and p.cache.l2.bytes > 0),
            s.LINE_FETCHED: -1,
            s.PWC_HIT_CYCLES: p.pwc.hit_cycles, s.EPT_PWC_HIT_CYCLES: p.ept_pwc.hit_cycles,
            s.NESTED_HIT_CYCLES: p.nested_tlb.hit_cycles, s.MLP: p.work.mlp, s.WALKERS: p.walkers,
            s.WALKS_IN_L1D: int(p.features.walks_in_l1d), s.ENTRY_CACHE: int(p.features.entry_walk_cache),
            s.ROB: p.work.reorder_buffer, s.WHOLE_ROB: p.work.reorder_buffer, s.CORE: number // g.threads,
            s.CORES: g.cores, s.SIBLING: number ^ 1 if g.threads > 1 else -1,
            s.CONTENTION: 200 * ONE // p.work.two_threads_percent - ONE, s.MISPREDICT_CYCLES: p.work.mispredict_cycles,
            s.CPI_NUMERATOR: p.work.cycles_per_100_instructions, s.PORT_CYCLES: p.cycles(p.latency.port_ns),
            s.MMIO_CYCLES: p.cycles(p.latency.mmio_ns), s.POSTED_CYCLES: p.cycles(p.latency.posted_ns),
            s.IPI_CYCLES: p.cycles(p.latency.ipi_ns),
            s.WAKE_CYCLES: p.cycles(p.latency.wake_ns), s.EXIT_CYCLES: p.transitions.vm_exit_cycles,
            s.ENTRY_CYCLES: p.transitions.vm_entry_cycles, s.ATOMIC_CYCLES: p.prices["ATOMIC"], s.WORK_SCALE: 1,
            s.APIC_DEADLINE: FOREVER, s.IPI_AT: FOREVER, s.TIMER_DEADLINE: FOREVER, s.APIC_DIVIDE: 1,
            s.OPS_LEFT: ALL_OPS,
            s.RFLAGS: 2, s.CR0: 0x80050033, s.EFER: 0xD01, s.DR7: 0x400, s.XCR0: 7, s.PAT: 0x0007040600070406,
            s.MSR_APIC_BASE: 0xFEE00C00 | (0x100 if number == 0 else 0), s.SS_ACCESS_RIGHTS: 0xC093,
            s.CS_ACCESS_RIGHTS: 0xA09B, s.LARGEST_LEVEL: 3 if p.features.pages_1g else 2,
            s.MSR_FEATURE_CONTROL: 5, s.VMCS_POINTER: -1,
            s.MSR_MISC_ENABLE: 1, s.MTRR_DEFAULT: 0xC06, s.CR4: 0x20 | (1 << 7),
            s.RESERVED_BITS: ((1 << 52) - 1) & ~((1 << p.physical_address_bits) - 1),
        }  # fmt: skip
        values[s.NODE_FIRST], values[s.NODE_END] = self.geometry.node_frames(self.geometry.node_of(number))
        values[s.NODE] = g.node_of(number)
        if g.cpus > 1 or p.fills_memory:
            parts = p.dram.channels_apart * p.cache.line_bytes * PARTS
            values[s.LINE_TIME] = parts * p.clock_hz // (p.dram.bandwidth * 1_000_000)
        values[s.REMOTE_CYCLES] = p.cycles(p.dram.remote_ns)
        if p.dram.ranks:
            refresh, interval = p.cycles(p.dram.refresh_ns), p.cycles(p.dram.refresh_interval_ns)
            values[s.RANKS], values[s.BANKS_OF_RANK] = p.dram.channels * p.dram.ranks, p.dram.banks
            values[s.QUEUE] = p.dram.queue
            values[s.ROW_CYCLE] = p.cycles(p.dram.row_cycle_ns)
            values[s.REFRESH], values[s.REFRESH_INTERVAL] = refresh, interval
            for latency in (s.DRAM_CYCLES, s.REMOTE_CYCLES):  # measured means, with what refreshes take of them
                values[latency] -= refresh * refresh // (2 * interval)
        values[s.TRANSFER_CYCLES] = p.cycles(p.latency.transfer_ns)
        values[s.REMOTE_TRANSFER_CYCLES] = p.cycles(p.latency.remote_transfer_ns)
        for slot, value in values.items():
            m[slot] = value
        for op in o.OPS:
            if op.price not in UNPRICED:
                m[s.PRICE + op.number] = p.prices[op.price]
        special = {
            s.P_EXCEPTION: "EXCEPTION", s.P_INTERRUPT: "INTERRUPT", s.P_CPUID_1: "CPUID_1",
            s.P_WRMSR_X2APIC: "WRMSR_X2APIC", s.P_MOV_TO_CR: "MOV_TO_CR0", s.P_MOV_TO_CR + 2: "MOV_TO_CR2",
            s.P_MOV_TO_CR + 3: "MOV_TO_CR3", s.P_MOV_TO_CR + 4: "MOV_TO_CR4", s.P_MOV_TO_CR + 8: "MOV_TO_CR8",
            s.P_MOV_TO_CR3_NOFLUSH: "MOV_TO_CR3_NOFLUSH", s.P_MOV_FROM_CR8: "MOV_FROM_CR8",
            s.P_VERW: "VERW", s.P_IBPB: "IBPB", s.P_L1D_FLUSH: "L1D_FLUSH",
        }  # fmt: skip
        for slot, name in special.items():
            m[slot] = p.prices[name]
        return empty

    # --- building -------------------------------------------------------------------------------------------
    def owner(self, name: str) -> int:
        """The arena offset of an owner's statistics block, made on first use."""
        if name not in self.owners:
            n = len(self.owners)
            if n >= self.geometry.owners:
                raise ModelError("more owners than statistics blocks", {"owners": n})
            self.owners[name] = int(self.arena[mem.A_OWNERS]) + n * k.OWNER_WORDS
            self.arena[mem.A_OWNER_COUNT] = n + 1
        return self.owners[name]

    def frames_from(self, first: int, count: int, *, shuffled: bool, seed: int) -> None:
        """Let the host's frame allocator hand out `count` frames from `first` on, in order or scattered."""
        a = self.arena
        a[mem.A_ALLOC_FIRST], a[mem.A_ALLOC_COUNT], a[mem.A_ALLOC_NEXT] = first, count, 0
        a[mem.A_ALLOC_SHUFFLED] = int(shuffled)
        a[mem.A_ALLOC_BITS] = int(mem.scatter_bits(count))
        a[mem.A_SEED] = seed & 0xFFFFFF

    def allocate(self) -> int:
        """Take a host frame."""
        with quiet():
            hfn = int(mem.allocate(self.arena))
        if hfn < 0:
            raise ModelError("host memory is used up", {"frames": int(self.arena[mem.A_ALLOC_COUNT])})
        return hfn

    def load(self, hpa: int) -> int:
        """The 8-byte word at an aligned host-physical address."""
        self._check_frame(hpa >> mem.PAGE_SHIFT)
        return int(mem.load(self.arena, hpa, 8))

    def store(self, hpa: int, value: int) -> None:
        """Store an 8-byte word; `value` is taken modulo 2**64."""
        self._check_frame(hpa >> mem.PAGE_SHIFT)
        if mem.store(self.arena, hpa, 8, mem.signed(value)) < 0:
            raise ModelError("the pool of frame contents is used up", self.counters())

    def contents(self, hfn: int, kind: int) -> np.ndarray:
        """The 512 words of a frame as a writable view, giving it contents of this kind."""
        self._check_frame(hfn)
        at = int(mem.give_contents(self.arena, hfn, kind))
        if at < 0:
            raise ModelError("the pool of frame contents is used up", self.counters())
        return self.arena[at : at + mem.PAGE_WORDS]

    def _check_frame(self, hfn: int) -> None:
        """Compiled code does not look: a frame beyond memory would be a word of another structure."""
        if not 0 <= hfn < self.arena[mem.A_FRAME_COUNT]:
            raise ModelError("no such frame of memory", {"hfn": int(hfn)})

    def place(self, program: Program, frame_of: Callable[[int], int]) -> None:
        """Put a program into memory; `frame_of` gives the host frame of each of its linear pages."""
        a, t, packed = self.arena, self.tags, program.packed
        first = int(a[mem.A_ROW_COUNT])
        end = first + len(packed.rows)
        if end > self.geometry.rows:
            raise ModelError("more program rows than the geometry has", {"rows": end})
        start = int(a[mem.A_ROWS]) + first * o.ROW_WORDS
        rows = a[start : start + packed.rows.size].reshape(packed.rows.shape)
        rows[:] = packed.rows
        rows[packed.jumps, o.ROW_TARGET] = start + packed.goals * o.ROW_WORDS
        for page, begin, behind in packed.pages:
            index = self.code_page(frame_of(page))
            t[int(a[mem.A_CODE_MAPS]) + index * PAGE + packed.offsets[begin:behind]] = range(
                first + begin, first + behind
            )
        a[mem.A_ROW_COUNT] = end

    def code_page(self, hfn: int) -> int:
        """Make a frame a code page; its number among them."""
        a = self.arena
        if int(mem.kind_of(a, hfn)) == mem.CODE:
            return int(a[int(a[mem.A_CODE_OF]) + hfn])
        index = int(a[mem.A_CODE_PAGES])
        if index >= self.geometry.code_pages:
            raise ModelError("more code pages than the geometry has", {"code_pages": index})
        a[mem.A_CODE_PAGES] = index + 1
        at = int(a[mem.A_FRAMES]) + hfn
        a[at] = (int(a[at]) & ~(mem.KIND_MASK << mem.FRAME_KIND)) | mem.CODE << mem.FRAME_KIND
        a[int(a[mem.A_CODE_OF]) + hfn] = index
        return index

    def cpuid_table(self, leaves: Iterable[tuple[int, int, int, int, int, int]]) -> None:
        """What CPUID answers: rows of leaf, subleaf (-1 any), EAX, EBX, ECX, EDX."""
        at = int(self.arena[mem.A_CPUID])
        n = 0
        for n, row in enumerate(leaves, 1):
            self.arena[at + 6 * (n - 1) : at + 6 * n] = row
        self.arena[mem.A_CPUID_COUNT] = n

    def vmx(self, capabilities: Capabilities) -> None:
        """Give every CPU the VMX capability MSRs, which all checks obey, and the VMCS fields that go with them."""
        a = self.arena
        at = int(a[mem.A_CAPABILITIES])
        for n in range(CAPABILITY_MSRS):
            a[at + n] = mem.signed(capabilities.read(FIRST_CAPABILITY + n))
        slots = capabilities.component_slots()
        a[int(a[mem.A_FIELDS]) : int(a[mem.A_FIELDS]) + len(slots)] = slots
        saved = sum(bit for bit, names in SAVED if any(capabilities.supports(name) for name in names))
        for m in self.cpus:
            m[s.SAVED_MSRS] = saved
            m[s.VMX_REVISION] = capabilities.revision
            m[s.TIMER_RATE] = capabilities.preemption_timer_shift
            m[s.EXECUTE_ONLY] = int(capabilities.supports("EPT_EXECUTE_ONLY"))
            m[s.LARGEST_EPT_LEVEL] = 3 if capabilities.supports("EPT_1G_PAGES") else 2
            if not capabilities.supports("EPT_2M_PAGES"):
                m[s.LARGEST_EPT_LEVEL] = 1

    def port(self, port: int, kind: int, value: int = 0) -> None:
        """How a port of the physical machine answers."""
        at = int(self.arena[mem.A_PORTS])
        self.arena[at + port] = kind
        self.arena[at + PORTS + port] = value

    # --- running --------------------------------------------------------------------------------------------
    def run(self, cpu: int = 0, until: int = FOREVER, ops: int = ALL_OPS) -> int:
        """Advance one CPU to a cycle, or for so many ops; the stop code."""
        self.cpus[cpu, s.OPS_LEFT] = ops
        return self._run(until, 0, cpu) & 0xFF

    def run_all(self, until: int, quantum: int) -> tuple[int, int]:
        """Advance every CPU to a cycle; (stop code, CPU that stopped), or (0, -1) when all arrived."""
        self.cpus[:, s.OPS_LEFT] = ALL_OPS
        stopped = self._run(until, quantum, EVERY_CPU)
        return (0, -1) if stopped == HORIZON else (stopped & 0xFF, stopped >> 8)

    def _run(self, until: int, quantum: int, only: int) -> int:
        """Let the kernel run; windows of recorded streams that it emptied are filled, and it goes on."""
        while True:
            with quiet():
                stopped = int(run_all(self.cpus, self.arena, self.tags, until, quantum, only))
            if stopped & 0xFF != WINDOW_EMPTY:
                return stopped
            window = int(self.cpus[stopped >> 8, s.STOP_A])
            self.feeds[window](self.arena, window)

    def sync(self, cpu: int = 0) -> None:
        """After registers were set from outside: look up RIP again and work out the translation context."""
        m = self.cpus[cpu]
        m[s.ROW] = 0
        m[s.CONTEXT_KEY] = NO_CONTEXT
        with quiet():
            set_context(m, self.arena)

    # --- state ----------------------------------------------------------------------------------------------
    def save(self) -> Snapshot:
        """Copy the whole state."""
        return Snapshot(cpus=self.cpus.copy(), arena=self.arena[: self._used].copy(), tags=self.tags.copy())

    @property
    def _used(self) -> int:
        """Words of the arena up to the end of the pool's used pages, behind which all are zero."""
        return int(self.arena[mem.A_POOL]) + int(self.arena[mem.A_POOL_NEXT]) * mem.PAGE_WORDS

    def restore(self, snapshot: Snapshot) -> None:
        """Put a saved state back."""
        self.cpus[:] = snapshot.cpus
        used = self._used
        self.arena[: len(snapshot.arena)] = snapshot.arena
        self.arena[len(snapshot.arena) : used] = 0
        self.tags[:] = snapshot.tags

    def counters(self) -> Mapping[str, int]:
        """What a `ModelError` shows: where every CPU is and how full the arenas are."""
        a = self.arena
        shown = {
            "pool": int(a[mem.A_POOL_NEXT]), "pool_limit": int(a[mem.A_POOL_LIMIT]),
            "rows": int(a[mem.A_ROW_COUNT]), "code_pages": int(a[mem.A_CODE_PAGES]),
        }  # fmt: skip
        for n, m in enumerate(self.cpus):
            for name, slot in (("cycle", s.CYCLE), ("rip", s.RIP), ("privilege", s.PRIVILEGE), ("stop", s.STOP)):
                shown[f"cpu{n}.{name}"] = int(m[slot])
        return shown

    def check_clock(self) -> None:
        """Every cycle of every CPU is charged to exactly one name; stops with `ModelError` if not."""
        a = self.arena
        charged = sum(int(a[at : at + 2 * k.RING_STRIDE].sum()) for at in self.owners.values())
        passed = sum(int(m[s.CYCLE]) for m in self.cpus)
        open_ = int(sum(int(m[s.CYCLE]) - int(m[s.MARK]) for m in self.cpus))
        if charged + open_ != passed:
            raise ModelError(
                "cycles by name do not sum to the clock", {"charged": charged, "passed": passed, **self.counters()}
            )


def stop_name(code: int) -> str:
    """What a stop code means."""
    return STOPS[code]
