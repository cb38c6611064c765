"""Where the words of a guest's remapping unit stand, and what its programs share: loops over its devices, comparisons.

Those of a device begin at VI_DEVICES, DEVICE_BYTES apart. RBX is the unit and R11 a device in all of these programs.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R11, R12, RAX, RBX, RCX, RDX
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp
from vtsim.vmm.registry import Path

# fmt: off
# words of the guest's unit, then of each of its devices; a page behind stands the host's queue, another the registers
(VI_HEAD, VI_QUEUE, VI_TABLES, VI_TABLES_END, HOST_NEXT, VI_EXITS, VI_PAGES, VI_FLUSHES, VI_ROOT, VI_END, VI_TICKET,
 VI_SERVING, VI_BUDGET, VI_MOST) = range(0, 112, 8)
VI_DEVICES: Final = 128
DEVICE_BYTES: Final = 64
# VD_GUEST: the guest's table, 0 without one. VD_LOW: word of a descriptor of the real unit. VD_ENTRY: what real PASID
# entry leads to the guest's table. VD_DOMAIN: as the guest's entries say.
(VD_GUEST, VD_SHADOW, VD_LOW, VD_SOURCE, VD_DOMAIN, VD_ENTRY) = range(0, 48, 8)
HOST_STATUS: Final = 0x800
QUEUE_PAGE, REGISTER_PAGE = 4096, 8192
PAGES: Final = 3
GRANULARITY: Final = 3 << 4
BY_PAGE, BY_DOMAIN = 3 << 4, 2 << 4
LARGEST_MASK: Final = 9  # what covers more pages has the whole domain looked through
IN_USE, DONE = 1, 2
STORED: Final = (sp.IQT, sp.CCMD, sp.IVA, sp.IOTLB)
# fmt: on
READ_WRITE: Final = e.SL_R | e.SL_W


def nested(path: Path) -> bool:
    """Does the real unit walk the guest's tables?"""
    return path.addresses["viommu_step"] > 16


def each_device(a: Assembler, name: str) -> None:
    """R11 <- each device of the guest in turn, up to `{name}_done`; the loop's end is `_next_device`."""
    a.mov(R11, VI_DEVICES)
    a.add(R11, register=RBX)
    a.label(f"{name}_look")
    a.ld(RAX, Mem(RBX, VI_END))
    a.cmp(R11, register=RAX)
    a.jcc(ops.CC_AE, f"{name}_done")


def next_device(a: Assembler, name: str) -> None:
    a.label(f"{name}_next")
    a.add(R11, DEVICE_BYTES)
    a.jmp(f"{name}_look")
    a.label(f"{name}_done")


def unless_of_domain(a: Assembler, then: str) -> None:
    """To `then` unless the device in R11 is in the domain of the descriptor in R12. Changes RAX and RCX."""
    a.copy(RAX, R12)
    a.shr(RAX, 16)
    a.and_(RAX, 0xFFFF)
    a.ld(RCX, Mem(R11, VD_DOMAIN))
    a.cmp(RAX, register=RCX)
    a.jcc(ops.CC_NZ, then)


def granularity(a: Assembler) -> None:
    """RDX <- the granularity of the descriptor in R12, where it stands in its word."""
    a.copy(RDX, R12)
    a.and_(RDX, GRANULARITY)


def count(a: Assembler, word: int) -> None:
    """One more in a word of the guest's unit. Changes RDX."""
    a.ld(RDX, Mem(RBX, word))
    a.add(RDX, 1)
    a.st(Mem(RBX, word), RDX)
