"""DMA through the remapping unit: throughput and latency over the window in which a device reads and writes.

What the scenario says of device, link and unit was taken from the Broadwell figures of the row alone: the time between
two operations from those without remapping, the latencies from what one read takes within reach and beyond it, and the
number of walkers from the throughput beyond reach. The other generations are predicted with the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from vtsim.study.binding import PHASE, Figure, Run, bind
from vtsim.study.published import row

MIB: Final = 1 << 20
CPU_FAULTS: Final = 2, 4  # MiB of fresh pages
SCENARIO: Final = "workloads/iommu/window.yaml"
WINDOWS: Final = {"w256K": "256 KiB", "w512K": "512 KiB", "w1M": "1 MiB", "w4M": "4 MiB", "w64M": "64 MiB"}
ONE: Final = ("dma.0.tags=1", "dma.0.operations=20 k")


def _rate(results: Sequence[Any]) -> float:
    return float(results[0].dma[0].gbps)


def _median(results: Sequence[Any]) -> float:
    return float(results[0].dma[0].latency.p50_ns)


def _mean(results: Sequence[Any]) -> float:
    return float(results[0].dma[0].latency.mean_ns)


def _figure(machine: str, what: str, window: str, *sets: str, unit: str = "Gb/s", compute: Any = _rate) -> Figure:
    note = "sets what the scenario says of device and unit" if machine == "bdw" else "predicted with Broadwell's values"
    key = f"{machine}.{what}.{window}"
    return Figure(
        key=key,
        published=key,
        runs=(Run(scenario=SCENARIO, sets=(f"dma.0.window={WINDOWS[window]}", *sets), baseline=False),),
        compute=compute,
        unit=unit,
        note=note,
    )


def _figures() -> list[Figure]:
    off, write = "machine.iommu.mode=off", "dma.0.write=true"
    windows = {
        "bdw": ("w256K", "w512K", "w1M", "w4M", "w64M"),
        "hsw_2620v3": ("w256K", "w1M", "w4M", "w64M"),
        "ivb": ("w256K", "w512K", "w1M", "w4M", "w64M"),
    }
    found = [_figure(machine, "rd64_gbps_iommu", window) for machine in windows for window in windows[machine]]
    found += [_figure("bdw", "rd64_gbps_off", window, off) for window in ("w256K", "w4M", "w64M")]
    found += [_figure("hsw_2620v3", "rd64_gbps_off", window, off) for window in ("w256K", "w64M")]
    found += [
        _figure("hsw_2620v3", "rd64_gbps_iommu_superpages", window, "dma.0.pages=2 MiB") for window in ("w256K", "w64M")
    ]
    found += [_figure("bdw", "rd256_gbps_iommu", window, "dma.0.bytes=256") for window in ("w256K", "w4M", "w64M")]
    found += [_figure("bdw", "rd512_gbps_iommu", window, "dma.0.bytes=512") for window in ("w256K", "w64M")]
    found += [_figure("bdw", "wr64_gbps_iommu", window, write) for window in ("w256K", "w1M", "w4M", "w64M")]
    found += [_figure("bdw", "wr64_gbps_off", "w64M", write, off)]
    for machine, what, compute in (
        ("bdw", "lat_rd_median_ns_iommu", _median),
        ("hsw_2620v3", "lat_rd_median_ns_iommu", _median),
        ("snb", "lat_rd_avg_ns_iommu", _mean),
    ):
        found += [
            _figure(machine, what, window, *ONE, unit="ns", compute=compute)
            for window in ("w256K", "w1M", "w4M", "w64M")
        ]
    return found


bind(
    "PCIE-IOTLB",
    *_figures(),
    deviates="The unit's walkers work through reads of one length; real ones share a pipeline and the caches of tables "
    "that are not known. Windows beyond the last-level cache hit it less often than a warm cache of the model.",
)


STORM: Final = "workloads/iommu/map_unmap.yaml"
RING: Final = ("machine.profile=snb-e5-2450", f"{PHASE}.groups=32", f"{PHASE}.iterations=200")  # 512 buffers
TREE: Final = ("vms.0.guest.kernel.dma=strict", "vms.0.guest.kernel.iova=tree")
NIC: Final = "workloads/iommu/nic.yaml"


def _driven(*sets: str) -> Run:
    return Run(scenario=STORM, sets=(*RING, *sets), baseline=False)


def _faster(results: Sequence[Any]) -> float:
    return float(results[0].dma[0].gbps) / float(results[1].dma[0].gbps)


def _drop(results: Sequence[Any]) -> float:
    return 100.0 * (1.0 - float(results[1].dma[0].gbps) / float(results[0].dma[0].gbps))


def _times_a_cpu_fault(results: Sequence[Any]) -> float:
    pages = MIB // 4096 * (CPU_FAULTS[1] - CPU_FAULTS[0])
    cycles = results[1].cycles.elapsed - results[0].cycles.elapsed
    return row("COIOMMU").value("nic_page_fault_us") * 1e-6 * float(results[0].clock_hz) * pages / float(cycles)


bind(
    "RIOMMU-HEAD",
    Figure(
        key="over_baseline_iommu_max",
        published="over_baseline_iommu_max",
        runs=(_driven("machine.iommu.mode=off"), _driven(*TREE)),
        compute=_faster,
        unit="x",
        note="without remapping over strict; rIOMMU has 77 to 100 % of the former",
    ),
    unbound="the flat tables of rIOMMU, which no unit has",
    deviates="Agreement is chance: a packet costs nothing beside its map and unmap here, so that the link bounds the "
    "run without remapping. Missing is what made strict slow on Linux 3.4: its allocator searched long where a ring "
    "holds buffers of two sizes, and here there is one. The 600 ns of an invalidation are an estimate after this "
    "paper's own breakdown, as remembered, so that the row is no "
    "evidence for them",
)
bind(
    "IOTLB-WALL",
    *(
        Figure(
            key=key,
            published=key,
            runs=tuple(
                Run(scenario=NIC, sets=sets, baseline=False)
                for sets in (("machine.iommu.mode=off",), (f"dma.0.pages={pages}",))
            ),
            compute=_drop,
            unit="%",
            note="packets of 1500 B in 32 queues of 1024 buffers, with completions, descriptors and acknowledgements, "
            "as in the published set-up; unit as on Broadwell",
        )
        for key, pages in (("max_drop", "4 KiB"), ("with_hugepage_iova", "2 MiB"))
    ),
    deviates="Agreement is weak evidence, for two things that the abstract does not say were settled with the result "
    "in sight: with an acknowledgement for every second packet, before the authors' scripts showed that the card "
    "gathers packets, the drop is 31 %, and with buffers anywhere in their pages, not at 2 KiB as recalled of the "
    "driver, 30 %. The queues are streams of places without order, and no TCP slows down for packets that are late."
    " Buffers are recycled with their mappings, so that nothing is invalidated. The unit is Broadwell's, of which "
    "64 entries and 6 walks at a time are known; the published processors are later ones",
)
bind(
    "COIOMMU",
    Figure(
        key="dma_page_fault_vs_cpu_fault_x.1",
        published="dma_page_fault_vs_cpu_fault_x.1",
        runs=tuple(
            Run(
                scenario="workloads/page_fault.yaml",
                sets=(f"{PHASE}.iterations=1", f"{PHASE}.region={size} MiB"),
                baseline=False,
            )
            for size in CPU_FAULTS
        ),
        compute=_times_a_cpu_fault,
        unit="x",
        note="the published 220 us of a NIC over a simulated CPU's fault on memory that the host has not given the VM "
        "yet, under KVM: the guest kernel's fault and the EPT violation behind it",
    ),
    unbound="the loss of throughput and the pinned memory of coIOMMU, whose table shared with the hypervisor is not "
    "modelled; a driver that serves page requests",
    deviates="The source does not say which faults it compares. Memory that is not pinned is memory that the host may "
    "have to provide, so both faults are meant to do that here. What the host takes to find "
    "and map the page is counted in Linux 6.1 (with 600 instructions for a page of the host in place of 2092 the ratio "
    "is 62)",
)
