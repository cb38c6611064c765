"""Devices that do DMA beside the CPUs: a remapping unit with a domain for each of them, and their engines.

All engines of a machine work in order of time, on one remapping unit with its walkers and on one last-level cache.
Their domains are mapped before the run; no CPU of the run does it. Devices that a guest drives are in `driven`.

Not modelled: VMs beside such devices, lines that CPUs and devices share, DMA's use of memory bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Final

import numpy as np
import simpy
from attrs import define, field

from vtsim.base.errors import ConfigError, ModelError
from vtsim.base.jit import quiet
from vtsim.base.memory import PAGE_BYTES, PAGE_SHIFT
from vtsim.cpu.engine import Engine
from vtsim.iommu import dma as g
from vtsim.iommu import state as st
from vtsim.iommu.entries import SL_SNP
from vtsim.iommu.kernels.dma_engine import run_engines
from vtsim.iommu.tables import READ_WRITE, Structures, domain_table
from vtsim.iommu.unit import Capabilities, RemappingUnit
from vtsim.platform.dma_spec import PAGES, REQUESTS, TLB_WAYS, DmaSpec
from vtsim.platform.iommu_spec import requester
from vtsim.platform.outcome import DmaOutcome, DriverOutcome
from vtsim.platform.spec import Scenario

IOVA: Final = 1 << 32  # where windows begin, each at a multiple of 64 GiB above
IOVA_STEP: Final = 64 << 30
SLICE_NS: Final = 100_000  # simulated time between two looks at the clock
PAGE_SIZES: Final = dict(zip(PAGES, (1 << 12, 1 << 21, 1 << 30), strict=True))
PS: Final = 10**12
WIDEST: Final = 3  # AW of five levels, which the default unit supports
FOR_TABLES: Final = 1 << 16  # frames from which tables are made
FORGED_BASE: Final = 1 << 20  # host address from which on a device forges translated requests


def landing_of(scenario: Scenario) -> g.Landing:
    """Where DMA lands."""
    landing = scenario.machine.landing
    return g.Landing(
        cache_bytes=landing.cache, ways=landing.ways, write_ways=landing.write_ways, cache_ns=landing.cache_ns,
        dram_ns=landing.dram_ns,
    )  # fmt: skip


def engine_of(scenario: Scenario, device: DmaSpec, *, gap_ns: float) -> np.ndarray:
    """The engine of a device, idle."""
    iommu, link = scenario.machine.iommu, device.link
    return g.engine(
        g.Link(
            generation=link.generation, lanes=link.lanes, max_payload=link.max_payload, max_read=link.max_read,
            dllp_percent=link.dllp_percent, up_ns=link.up_ns, down_ns=link.down_ns,
        ),
        g.Translation(hit_ns=iommu.hit_ns, walk_ns=iommu.walk_ns, read_ns=iommu.read_ns, walkers=iommu.walkers),
        landing_of(scenario),
        tags=device.tags,
        gap_ns=gap_ns,
        no_snoop=device.no_snoop,
        requests=REQUESTS.index(device.requests),
    )  # fmt: skip


def unit_of(scenario: Scenario, engine: Engine) -> RemappingUnit:
    """The remapping unit of a machine, after reset."""
    iommu = scenario.machine.iommu
    sets = iommu.iotlb_entries // iommu.iotlb_ways
    if sets * iommu.iotlb_ways != iommu.iotlb_entries or sets & (sets - 1):
        raise ConfigError(
            f"{iommu.iotlb_entries} entries in {iommu.iotlb_ways} ways are not a power of two of sets",
            field="machine.iommu.iotlb_ways",
            help="choose ways that divide the entries into 1, 2, 4, 8 … sets",
        )
    capabilities = Capabilities() if iommu.coherent else Capabilities().without("C")
    if iommu.write_buffers:
        capabilities = capabilities.having(RWBF=1)
    return RemappingUnit(
        engine.arena, capabilities=capabilities, caches=st.Caches(iotlb_4k=st.Cache(sets, iommu.iotlb_ways))
    )


def device_tlb_of(device: DmaSpec) -> np.ndarray:
    """A device's empty device-TLB: shape (words,), int64."""
    cache = st.Cache(device.device_tlb // TLB_WAYS, TLB_WAYS)
    return st.build_device(sid=requester(device.claims or device.source), tlb=cache, pri=device.page_requests > 0)


def device_tlbs(scenario: Scenario) -> np.ndarray:
    """An empty device-TLB for each device, a row each; as large as the largest."""
    made = [device_tlb_of(each) for each in scenario.dma]
    rows = np.zeros((len(made), max((len(row) for row in made), default=0)), np.int64)
    for row, words in zip(rows, made, strict=True):
        row[: len(words)] = words
    return rows


@define(eq=False)
class DmaDevices:
    """The devices of a machine, their unit and where they land."""

    scenario: Scenario
    engine: Engine
    clock: simpy.Environment
    clock_hz: int
    limit: int  # cycles after which the run stops
    goes_on: Callable[[], bool]
    unit: RemappingUnit = field(init=False)
    engines: np.ndarray = field(init=False)
    tlbs: np.ndarray = field(init=False)  # a device-TLB for each of them
    lines: np.ndarray = field(init=False)
    finished: bool = field(default=False, init=False)
    done: simpy.Process = field(init=False)
    end: int = field(init=False)  # frames from here on are the devices'

    def __attrs_post_init__(self) -> None:
        machine = self.scenario.machine
        self.end = self.engine.geometry.frame_count
        self.engine.frames_from(1, FOR_TABLES, shuffled=False, seed=1)
        iommu, lands = machine.iommu, landing_of(self.scenario)
        self.unit = unit_of(self.scenario, self.engine)
        structures = Structures(self.engine)
        self.lines = g.line_tags(lands)
        self.engines = np.zeros((len(self.scenario.dma), g.DMA_WORDS), np.int64)
        self.tlbs = device_tlbs(self.scenario)
        for number, device in enumerate(self.scenario.dma):
            row = self.engines[number]
            row[:] = engine_of(self.scenario, device, gap_ns=device.gap_ns)
            base, own = self._map(structures, device, number)
            if machine.landing.warm:
                g.warm(self.lines, lands, *own)
            g.give(
                row,
                g.Job(
                    source=requester(device.claims or device.source), base=base, window=device.window,
                    bytes=device.bytes, count=device.operations, writes=device.write, random=device.random,
                    seed=self.scenario.seed + number, translates=iommu.mode != "off", own=own,
                    stride=device.stride or 0,
                ),
            )  # fmt: skip
        if iommu.mode != "off":
            self.unit.enable(structures.rtaddr)
        self.done = self.clock.process(self.process())

    def _map(self, structures: Structures, device: DmaSpec, number: int) -> tuple[int, tuple[int, int]]:
        """Give a device memory and a domain that maps it: the address of its window, and its own host addresses."""
        mode, size = self.scenario.machine.iommu.mode, PAGE_SIZES[device.pages]
        unit = size // PAGE_BYTES
        pages = -(-device.window // size) * unit
        self.end = (self.end - pages) // unit * unit
        first = self.end
        mapped = device.window if device.mapped is None else min(device.mapped, device.window)
        own = first << PAGE_SHIFT, (first << PAGE_SHIFT) + mapped
        if mode != "translate":
            if mode == "pass-through":
                structures.attach(requester(device.source), None, number + 1, widest=WIDEST)
            return own[0], own
        base = IOVA + number * IOVA_STEP
        table = domain_table(self.engine)
        count = -(-mapped // size)
        if count:
            frames = np.arange(first, first + count * unit, unit, dtype=np.int64)
            rights = READ_WRITE | (SL_SNP if self.scenario.machine.iommu.snoop else 0)
            table.map(base, frames, rights, PAGES.index(device.pages))
        asks = device.trusted and device.requests != "untranslated"
        structures.attach(requester(device.source), table, number + 1, devices=asks)
        return FORGED_BASE if device.requests == "forged" else base, own

    def load(self) -> None:
        """Load or compile the kernels, so that the rate is that of simulating."""
        with quiet():
            run_engines(self.engines, self.tlbs, self.lines, self.unit.u, self.engine.arena, -1)

    def process(self) -> Generator[simpy.Event, Any, None]:
        """The SimPy process: compute a slice, let time pass."""
        slice_cycles = max(1, SLICE_NS * self.clock_hz // 10**9)
        while not self.finished and int(self.clock.now) < self.limit and self.goes_on():
            until = min(int(self.clock.now) + slice_cycles, self.limit)
            end = until * PS // self.clock_hz
            with quiet():
                self.finished = bool(
                    run_engines(self.engines, self.tlbs, self.lines, self.unit.u, self.engine.arena, end)
                )
            yield self.clock.timeout(until - int(self.clock.now))

    def outcome(self) -> tuple[DmaOutcome, ...]:
        """What every device did, after the laws of the unit were checked."""
        self.unit.check_laws()
        return tuple(outcome_of(spec, row.tolist()) for spec, row in zip(self.scenario.dma, self.engines, strict=True))


def outcome_of(
    spec: DmaSpec, row: list[int], *, moved: int | None = None, driver: DriverOutcome | None = None
) -> DmaOutcome:
    """What a device did, from its engine's words; `moved`: bytes, where not every operation moves as many."""
    if row[g.N_OPERATIONS] != row[g.ENDED]:
        raise ModelError("an operation ended more than once", {"operations": row[g.N_OPERATIONS]})
    buckets = row[g.HISTOGRAM : g.HISTOGRAM + g.BUCKETS]
    return DmaOutcome(
        name=spec.name,
        operations=row[g.N_OPERATIONS],
        aborted=row[g.N_ABORTED],
        bytes=(row[g.N_OPERATIONS] - row[g.N_ABORTED]) * spec.bytes if moved is None else moved,
        elapsed_ns=row[g.LAST_END] / g.PS_PER_NS,
        latency_sum_ns=row[g.LATENCY_SUM] / g.PS_PER_NS,
        longest_ns=row[g.LATENCY_MOST] / g.PS_PER_NS,
        latencies={n * g.BUCKET_PS // g.PS_PER_NS: count for n, count in enumerate(buckets) if count},
        walks=row[g.N_DMA_WALKS],
        walk_reads=row[g.N_DMA_READS],
        walk_wait_ns=row[g.WALK_WAIT] / g.PS_PER_NS,
        line_hits=row[g.N_LINE_HITS],
        line_misses=row[g.N_LINE_MISSES],
        escaped=row[g.N_ESCAPED],
        tlb_hits=row[g.N_TLB_HITS],
        translations=row[g.N_TRANSLATIONS],
        driver=driver,
    )
