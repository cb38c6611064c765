"""Exit clustering: which share of exits is saved, and what an exit is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from vtsim.study.binding import Figure, Run, bind, cycles_per_repetition, exits_of, repeated

SANDY_BRIDGE: Final = "machine.profile=snb-e5-2450"
TRACED: Final = ("vmm.paging=shadow", "vmm.parameters.out_of_sync=0", "vmm.features.exit_clustering=true")
SHELL: Final = tuple(
    Run(
        scenario=f"workloads/paging/{program}.yaml",
        sets=(SANDY_BRIDGE, *TRACED, "vms.0.guest.kernel.tick=off", f"vms.0.guest.processes.0.phases.0.iterations={n}"),
        baseline=False,
    )
    for program, n in (("exec", 8), ("fork", 8))
)
VMCALL: Final = "workloads/vmexit/vmcall.yaml"
DEARER: Final = 100  # cycles
ACCESSES: Final = ("VMREAD", "VMWRITE")


def _saved(results: Sequence[Any]) -> float:
    saved = sum(result.clusters.exits_saved for result in results)
    return float(100.0 * saved / (saved + sum(exits_of(result) for result in results)))


def _accesses(base: int) -> tuple[Run, ...]:
    prices = (f"machine.cpu.prices.{name}={base}" for name in ACCESSES)
    return repeated(VMCALL, SANDY_BRIDGE, *prices)


def _share(key: str) -> Figure:
    note = "a shell that runs commands (exec) and address spaces copied on write (fork), a trace of every table"
    return Figure(key=key, published=key, runs=SHELL, compute=_saved, unit="% of exits", note=note)


def _dearer(results: Sequence[Any]) -> float:
    each: Callable[[Sequence[Any]], float] = cycles_per_repetition
    return (each(results[2:]) - each(results[:2])) / DEARER


bind(
    "ATC12-CLUSTERS",
    _share("exit_pairs_kernel_compile_saving_pct"),
    _share("kc64_exits_clusterable_pct"),
    Figure(
        key="vmread_vmwrite_per_exit_at_least",
        published="vmread_vmwrite_per_exit_at_least",
        runs=(*_accesses(DEARER), *_accesses(2 * DEARER)),
        compute=_dearer,
        unit="instructions",
        note="VMCALL under kvm, whose cycles grow as if there were so many when both are dearer",
    ),
    Figure(
        key="assumed_total_exit_cost_cycles",
        published="assumed_total_exit_cost_cycles",
        runs=repeated(VMCALL, SANDY_BRIDGE),
        compute=cycles_per_repetition,
        unit="cycles",
        note="assumed there for any exit; ours is the shortest one",
    ),
    deviates=(
        "A cluster executes no arithmetic and no branches here: 1024 INVLPG (of 16,300 exits) that are not saved "
        "stand in a loop of INVLPG, ADD, SUB and JCC, and with them 16 % of all would be. Of the kernel compile only "
        "the exits that change address spaces are simulated. An exit for a port makes 8 VMREAD and VMWRITE, not 7; "
        "why the published hypervisor needs 10 and more, and why it assumes 3000 cycles, is unknown: the hardware's "
        "part is as published (EXIT-HW-RT), and KVM's code around it took 1437 cycles on this processor (DALL17-X86)"
    ),
    unbound=(
        "passmark and e1000 are device drivers of Windows and Linux, nested speedups come with nesting, and "
        "32-bit guests, whose entries are two stores each, are not modelled"
    ),
)
