"""DMA through the remapping unit: throughput and latency over the window in which a device reads and writes.

What the scenario says of device, link and unit was taken from the Broadwell figures of the row alone: the time between
two operations from those without remapping, the latencies from what one read takes within reach and beyond it, and the
number of walkers from the throughput beyond reach. The other generations are predicted with the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from vtsim.study.binding import Figure, Run, bind

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
