"""The further vCPUs of a VM: threads of its process on other CPUs, with the first one's memory and EPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from attrs import evolve

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.base.memory import gfn_ranges
from vtsim.cpu.assembler import Program
from vtsim.cpu.kernels.posted_interrupts import POINTER_VALID
from vtsim.ept import spec as e
from vtsim.ept.tables import PAGING, USER_PAGE, Table
from vtsim.vmm import layout as at
from vtsim.vmm.host import Host
from vtsim.vmm.hypervisor import Vcpu
from vtsim.vmm.vmcs import write

TOP_ENTRY: Final = 1 << 39  # bytes that an entry of the top-level table maps


def reserve_others(host: Host, first: Vcpu, cpus: Sequence[int], user: Program) -> list[Vcpu]:
    """Set aside what the vCPUs beyond the first one need, one on each of the further CPUs."""
    more = []
    for index, cpu in enumerate(cpus[1:], 1):
        page, region, root = host.reserve(), host.reserve(), host.process()
        log = host.reserve() if first.log is not None else None
        shadow = evolve(first.shadow, block=host.reserve()) if first.shadow is not None else None
        _share_memory(first, root)
        for linear in (at.USER_RUN, at.USER_STACK - mem.PAGE_BYTES):
            root.map(linear, [host.reserve()], USER_PAGE | e.PTE_NO_EXECUTE)
        root.map(at.USER_DATA, [_frame(first, at.USER_DATA)], USER_PAGE | e.PTE_NO_EXECUTE)
        for text in sorted({i.at // mem.PAGE_BYTES * mem.PAGE_BYTES for i in user.instructions}):
            root.map(text, [_frame(first, text)], USER_PAGE & ~e.PTE_WRITE)
        each = evolve(first, cpu=cpu, index=index, page=page, vmcs=region, process=root, log=log, shadow=shadow)
        more.append(each)
    return more


def link_vcpus(host: Host, vcpus: Sequence[Vcpu]) -> None:
    """Write the words by which the vCPUs of a VM find each other."""
    for vcpu in vcpus:
        peer = vcpus[(vcpu.index + 1) % len(vcpus)]
        words = {"VM": vcpus[0].address, "PEER": peer.address, "INDEX": vcpu.index, "CPU": vcpu.cpu}
        for name, value in words.items():
            host.store(vcpu.address + at.V[name], value)


def name_descriptors(host: Host, vcpus: Sequence[Vcpu]) -> None:
    """Let the processor find the vCPUs' posted-interrupt descriptors by APIC identifier.

    SDM: "IPI Virtualization".
    """
    table = host.reserve_late(mem.VALUES)
    entries = [vcpu.address + at.V["POSTED"] - at.HOST_DIRECT | POINTER_VALID for vcpu in vcpus]
    host.store_many(table, np.array(entries, np.int64))
    for vcpu in vcpus:
        fields = {"PID_POINTER_TABLE_ADDRESS": table << 12, "LAST_PID_POINTER_INDEX": len(vcpus) - 1}
        write(host.words(vcpu.vmcs, mem.VMCS_REGION), fields)


def _share_memory(first: Vcpu, root: Table) -> None:
    """Let a root lead to the same tables of guest memory as the first one's."""
    backing = first.memory.backing
    tops, mine = backing.words(backing.root), root.words(root.root)
    end = gfn_ranges(first.memory.size)[-1][1] * mem.PAGE_BYTES
    for address in range(at.USER_RAM, at.USER_RAM + end, TOP_ENTRY):
        top = address // TOP_ENTRY % mem.PAGE_WORDS
        if not tops[top]:
            table = backing.take()
            backing.words(table)
            tops[top] = table << 12 | PAGING.interior
        mine[top] = tops[top]


def _frame(vcpu: Vcpu, linear: int) -> int:
    leaf = vcpu.process.find(linear)
    if leaf is None:
        raise ModelError("a page of the device process is not mapped", {"address": linear})
    return leaf.frame
