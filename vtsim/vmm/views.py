"""Builds the views of a VM's memory: further EPT tables beside its own, and the list that VMFUNC takes an EPTP from.

SDM: "VM-Function Controls"; "EPTP Switching"; "Convertible EPT Violations".
"""

from __future__ import annotations

from typing import Final

import numpy as np
from attrs import evolve

from vtsim.base.memory import PAGE_SHIFT
from vtsim.ept import spec as e
from vtsim.ept.tables import EPT, Table
from vtsim.vmcs import bits as b
from vtsim.vmm.host import Host
from vtsim.vmm.hypervisor import Vcpu

LEVELS: Final = 4


def reserve_views(host: Host, vcpu: Vcpu, count: int) -> Vcpu:
    """Set aside what a VM of so many views needs: the roots of all but the first, the list, a page of words."""
    ept = vcpu.ept
    assert ept is not None
    more = tuple(Table(root=ept.take(), format=EPT, take=ept.take, words=ept.words) for _ in range(count - 1))
    return evolve(vcpu, views=(ept, *more), view_list=host.reserve(2))


def fill_views(host: Host, vcpu: Vcpu, pointer_bits: int) -> None:
    """Make every view a copy of the first one as it is now, and write the list.

    No EPT violation is a virtualization exception until a guest asks for it: entries suppress it, empty ones too.
    """
    first, *others = vcpu.views
    for table in others:
        _copy(first, first.root, table, table.root, LEVELS)
    for table in vcpu.views:
        for frame in table.tables():
            table.words(frame)[:] |= e.EPT_SUPPRESS_VE
    host.store_many(vcpu.view_list, np.array([table.root << PAGE_SHIFT | pointer_bits for table in vcpu.views]))


def _copy(source: Table, frame: int, target: Table, copy: int, level: int) -> None:
    """Copy a table of a level, with tables of its own below it."""
    entries, words = source.words(frame), target.words(copy)
    words[:] = entries
    if level == 1:
        return
    for index in np.flatnonzero((entries & EPT.present != 0) & (entries & EPT.large == 0)).tolist():
        below = target.take()
        words[index] = below << PAGE_SHIFT | EPT.interior
        _copy(source, int(entries[index] & e.ADDRESS) >> PAGE_SHIFT, target, below, level - 1)


def view_fields(vcpu: Vcpu) -> dict[str, int]:
    """The fields of a VMCS that let the guest switch between them."""
    return {"VM_FUNCTION_CONTROLS": b.EPTP_SWITCHING, "EPTP_LIST_ADDRESS": vcpu.view_list << PAGE_SHIFT}
