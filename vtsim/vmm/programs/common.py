"""What every personality's kernel program contains beside its frame: the exit paths and the shared stretches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler
from vtsim.vmcs.reasons import (
    BY_NUMBER,
    EPT_MISCONFIG,
    EPT_VIOLATION,
    INVLPG,
    INVPCID,
    MONITOR_TRAP_FLAG,
    PML_FULL,
    VMFUNC,
)
from vtsim.vmm.programs import (
    apic,
    balloon,
    cluster,
    collapse,
    direct,
    dirty_log,
    ept,
    events,
    instructions,
    msr_switch,
    schedule,
    several,
    shadow,
    sharing,
    swap,
    timer,
    upcalls,
    views,
)
from vtsim.vmm.programs.kvm_functions import CALLED_DIRECTLY
from vtsim.vmm.programs.words import retpolines
from vtsim.vmm.registry import Path, exit_paths
from vtsim.vmm.spec import VmmSpec

# exits that only some ways of virtualizing memory have
OF_PAGING: Final = {
    EPT_VIOLATION: ("ept", "agile"), EPT_MISCONFIG: ("ept",), PML_FULL: ("ept",),
    INVLPG: ("shadow", "agile"), INVPCID: ("shadow", "agile"), MONITOR_TRAP_FLAG: ("ept",),
    VMFUNC: ("ept",),
}  # fmt: skip

OF_VIEWS: Final = (MONITOR_TRAP_FLAG, VMFUNC)  # and these only where memory has several views


def handler_label(labels: Mapping[str, int], reason: int) -> str:
    """Where the table jump of an exit goes."""
    label = f"handle_{BY_NUMBER[reason].name}" if reason in BY_NUMBER else "unexpected"
    return label if label in labels else "unexpected"


def handled(personality: str, vmm: VmmSpec) -> Iterator[int]:
    """The exit reasons that a personality has a path for, with this way of virtualizing memory."""
    for owner, reason in exit_paths:
        if owner != personality or vmm.paging not in OF_PAGING.get(reason, (vmm.paging,)):
            continue
        if (reason != PML_FULL or vmm.dirty_log.method == "pml") and (reason not in OF_VIEWS or vmm.views > 1):
            yield reason


def emit_paths(a: Assembler, path: Path, personality: str) -> None:
    """Every registered exit path of a personality, under its label."""
    for reason in handled(personality, path.vmm):
        a.activity = ops.EXIT_HANDLER
        a.label(f"handle_{BY_NUMBER[reason].name}")
        retpolines(a, path, int(reason not in CALLED_DIRECTLY))
        exit_paths[personality, reason](a, path)


def emit_shared(a: Assembler, path: Path) -> None:
    """The stretches that exit paths jump to and call."""
    a.activity = ops.EXIT_HANDLER
    if path.vmm.paging == "ept":
        instructions.load_cr3(a, path)
        a.activity = ops.MEMORY_MANAGEMENT
        ept.subroutines(a, path)
        if path.remote:
            several.subroutines(a, path)
            a.activity = ops.MEMORY_MANAGEMENT
        views.subroutines(a, path)
        a.activity = ops.MEMORY_MANAGEMENT
        if path.vmm.dirty_log.on:
            dirty_log.subroutines(a, path)
        if path.vmm.collapse.on:
            collapse.subroutines(a, path)
        if path.vmm.collapse.on or path.vmm.dirty_log.ends:
            collapse.unmap_region(a, path)
        if path.vmm.balloon.size:
            balloon.subroutines(a, path)
        if path.vmm.swap.on:
            swap.subroutines(a, path)
        if path.vmm.sharing.on:
            sharing.subroutines(a, path)
    elif path.vmm.paging == "direct-pv":
        direct.subroutines(a, path)
        if path.remote:
            several.subroutines(a, path)
    else:
        a.activity = ops.MEMORY_MANAGEMENT
        shadow.control_registers(a, path)
        shadow.subroutines(a, path)
        if path.remote:
            several.subroutines(a, path)
    upcalls.subroutines(a, path)
    for emit in (apic.read, apic.write, timer.write_initial_count, timer.write_tsc_deadline):
        a.activity = ops.DEVICE_EMULATION
        emit(a, path)
    for emit in (events.inject, events.evaluate, events.pending_vector):
        a.activity = ops.INJECTION
        emit(a, path)
    a.activity = ops.INTERRUPT_PATH
    timer.interrupt_handlers(a, path)
    timer.program_timer(a, path)
    timer.wake(a, path)
    a.activity = ops.REENTRY
    msr_switch.enter_guest_msrs(a, path)
    schedule.schedule(a, path)
    schedule.die(a, path)
    schedule.boot(a, path)
    cluster.clusters(a, path)
    a.activity = ops.EXIT_HANDLER
    instructions.unexpected(a, path)
