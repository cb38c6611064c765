"""Whole guests: system calls, processor-bound work, and what a Pentium 4 does natively."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from vtsim.study.binding import (
    Figure,
    Run,
    bind,
    cycles_per_repetition,
    exits_per_repetition,
    repeated,
)
from vtsim.study.published import Row

SYSCALL: Final = "workloads/syscall.yaml"
PVM: Final = "machine.profile=clx-8269cy"


def _system_call(key: str, published: str, kpti: str) -> Figure:
    return Figure(
        key=key,
        published=published,
        runs=repeated(SYSCALL, PVM, f"vms.0.guest.kernel.kpti={kpti}"),
        compute=lambda results: cycles_per_repetition(results) * 1e6 / float(results[0].clock_hz),
        unit="us",
    )


bind(
    "PVM-SYSCALL",
    _system_call("kvm_ept_bm, KPTI on", "kvm_ept_bm.0", "true"),
    _system_call("kvm_ept_bm, KPTI off", "kvm_ept_bm.1", "false"),
    Figure(
        key="kvm_ept_bm, exits per call",
        published=lambda _: 0.0,
        runs=repeated(SYSCALL, PVM, "vms.0.guest.kernel.kpti=true"),
        compute=exits_per_repetition,
        unit="exits",
        note="with hardware paging no system call exits",
    ),
    unbound="shadow paging, pvm and nested guests come later",
)


def _outside_exits(row: Row) -> float:
    handled = sum(
        figures[0] * figures[1]
        for reason, figures in row.values.items()
        if isinstance(figures, list) and reason != "hlt"
    )
    return 1.0 - float(handled) * 1e-6 / row.value("run_s")


def _share_outside_exits(results: Sequence[Any]) -> float:
    handled = sum(exit.cycles for exit in results[0].exits if exit.reason != "HLT")
    return 1.0 - float(handled) / float(results[0].cycles.elapsed)


bind(
    "EXITS-SYSBENCH",
    Figure(
        key="share of time outside exits",
        published=_outside_exits,
        runs=(Run(scenario="workloads/cpu_bound.yaml", baseline=False),),
        compute=_share_outside_exits,
        unit="share",
        note="HLT left out on both sides",
    ),
    unbound="counts depend on an unknown host and on an ssh session",
)


P4: Final = ("machine.profile=p4-672", "vmm.technique=native")


def _native(key: str, phase: str, note: str = "") -> Figure:
    sets = (*P4, f"vms.0.guest.processes.0.phases.0={{primitive: {phase}}}")
    return Figure(
        key=key,
        published=key,
        runs=repeated("workloads/vmexit/cpuid.yaml", *sets),
        compute=cycles_per_repetition,
        unit="cycles",
        note=note,
    )


bind(
    "AA06-NANO",
    _native("native.io_in", "port_in, port: 0x80", "the model has one latency for every legacy port"),
    _native("native.cr8wr_approx", "mov_to_cr8", "the published figure is itself derived"),
    unbound="binary translation, and shadow paging that follows the guest, come later",
)
