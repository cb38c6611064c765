"""What contradicts itself about files that guests map and a device has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vtsim.base.errors import Problem
from vtsim.guest.file_mappings import MapFileSpec

if TYPE_CHECKING:
    from vtsim.platform.spec import Scenario, VmSpec


def keeps_file(vm: VmSpec) -> bool:
    """Has a device the file that processes of a VM map?"""
    phases = (phase for process in vm.guest.processes for phase in process.phases)
    return vm.guest.kernel.file_system.written and any(isinstance(phase, MapFileSpec) for phase in phases)


def file_conflicts(scenario: Scenario, vm: VmSpec, where: str) -> Iterator[Problem]:
    """Yield why a VM's file cannot be written."""
    if not keeps_file(vm):
        return
    vmm, kernel = scenario.vmm, vm.guest.kernel
    field = f"{where}.guest.kernel.file_system.kind"
    if vm.vcpus > 1:
        yield Problem(path=field, message="a guest that writes pages back has one vCPU", help="kind can be memory")
    if kernel.paging in ("PAE", "32-bit") or kernel.interface == "paravirtual":
        yield Problem(
            path=field,
            message="a device for files needs a 64-bit kernel with tables of its own",
            help="kind can be memory",
        )
    if vmm.technique == "native":
        return
    if vmm.technique != "hardware" or vmm.paging not in ("auto", "ept", "shadow"):
        yield Problem(
            path="vmm.technique" if vmm.technique != "hardware" else "vmm.paging",
            message="a device for files is one of VMs on EPT or shadow tables",
            help=f"technique can be hardware with paging ept or shadow, or native; or {field} memory",
        )
    for path, on, message in (
        (f"vmm.{vmm.taken_back_by}", vmm.takes_back, "memory that a device for files reaches is not taken back"),
        ("vmm.posted_interrupts", vmm.posted_interrupts, "interrupts of a device for files are not posted"),
        (
            "vmm.features.exit_clustering",
            vmm.features.exit_clustering,
            "a doorbell of a device for files does not end an exit cluster",
        ),
    ):
        if on:
            off = "size can be 0" if path.endswith("size") else f"{path.rpartition('.')[2]} can be false"
            yield Problem(path=path, message=message, help=f"{off}; or {field} memory")
