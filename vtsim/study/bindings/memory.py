"""Memory virtualization: references of page walks, and what two dimensions cost real programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from vtsim.study.binding import PHASE, Figure, Run, bind
from vtsim.study.published import Row

MEMORY: Final = "workloads/memory"
CLX: Final = "machine.profile=clx-6252"
SMALL: Final = ("vms.0.guest.kernel.page_size=4 KiB", "vmm.ept.page_size=4 KiB")
LARGE: Final = ("vms.0.guest.kernel.page_size=2 MiB", "vmm.ept.page_size=2 MiB")
BUILT: Final = ("vmm.ept.populate=prebuilt", "vms.0.guest.kernel.populate=prebuilt")
NATIVE: Final = "vmm.technique=native"
# Without any cache of paging structures a walk reads every level.
WALK_CACHES: Final = (
    *(f"pwc.{level}" for level in ("pml5e", "pml4e", "pdpte", "pde")),
    *(f"ept_pwc.{level}" for level in ("pml5e", "pml4e", "pdpte", "pde")),
    "nested_tlb",
)
UNCACHED: Final = tuple(f"machine.cpu.{structure}.entries=0" for structure in WALK_CACHES)


def _references(key: str, published: str, *sets: str) -> Figure:
    run = Run(
        scenario=f"{MEMORY}/gups.yaml",
        sets=(CLX, *BUILT, *UNCACHED, f"{PHASE}.accesses=20000", *sets),
        baseline=False,
    )
    return Figure(
        key=key,
        published=published,
        runs=(run,),
        compute=lambda results: float(next(iter(results[0].vms.values())).walks.references_per_walk),
        unit="references",
        note="walks of the guest's own accesses, all walk caches off",
    )


bind(
    "WALK-REFS",
    _references("native_4level", "native_4level", *SMALL, "vmm.technique=native"),
    _references("nested_4x4", "nested_4x4", *SMALL),
    _references("nested_2M_guest_2M_host", "nested_2M_guest_2M_host", *LARGE),
    unbound="five-level paging comes later; sv39 is another architecture",
)


# The programs' own sizes: as much memory as fits the published node, within what a run builds in seconds.
MACHINE: Final = ("machine.memory=80 GiB", "vms.0.memory=68 GiB", f"{PHASE}.accesses=1000000")
SIZE: Final = (*MACHINE, f"{PHASE}.region=64 GiB")
# 64 GiB of each structure, to a few percent
SIZES: Final = {
    "gups": f"{PHASE}.region=64 GiB",
    "btree": f"{PHASE}.records=300000000",
    "canneal": f"{PHASE}.elements=350000000",
    "xsbench": f"{PHASE}.points=130000",
}


def _slowdown(key: str, published: str, program: str, pages: tuple[str, ...], note: str = "") -> Figure:
    run = Run(scenario=f"{MEMORY}/{program}.yaml", sets=(CLX, *BUILT, *MACHINE, SIZES[program], *pages))
    return Figure(
        key=key,
        published=f"slowdown_virt_over_native.{published}",
        runs=(run,),
        compute=lambda results: float(results[0].slowdown),
        unit="ratio",
        note=note,
    )


def _native(*pages: str) -> Run:
    return Run(scenario=f"{MEMORY}/gups.yaml", sets=(CLX, *BUILT, *SIZE, *pages, NATIVE), baseline=False)


def _elapsed_ratio(results: Sequence[Any]) -> float:
    return float(results[0].cycles.elapsed / results[1].cycles.elapsed)


def _pages_gain(row: Row) -> float:
    return row.value("gups.native_4k.exec_s") / row.value("gups.native_thp.exec_s")


def _walk_pending(row: Row) -> float:
    return row.value("gups.native_4k.load_walk_pct") + row.value("gups.native_4k.store_walk_pct")


bind(
    "VMITOSIS-RAW",
    _slowdown("gups 4K", "gups_4k", "gups", SMALL),
    _slowdown("gups THP", "gups_thp", "gups", LARGE),
    Figure(
        key="gups native, 4K / THP",
        published=_pages_gain,
        runs=(_native(*SMALL), _native(*LARGE)),
        compute=_elapsed_ratio,
        unit="ratio",
    ),
    Figure(
        key="gups native 4K, walk_pending",
        published=_walk_pending,
        runs=(_native(*SMALL),),
        compute=lambda results: 100.0 * results[0].walks.cycles / results[0].cycles.elapsed,
        unit="% of cycles",
        note="loads and stores; sums over two walkers",
    ),
    _slowdown("canneal 4K", "canneal_4k", "canneal", SMALL),
    _slowdown("canneal THP", "canneal_thp", "canneal", LARGE),
    _slowdown("btree 4K", "btree_4k", "btree", SMALL),
    _slowdown("xsbench 4K", "xsbench_4k", "xsbench", SMALL),
    _slowdown("xsbench THP", "xsbench_thp", "xsbench", LARGE),
    unbound="seconds and absolute counters depend on input sizes that the row does not give",
)
