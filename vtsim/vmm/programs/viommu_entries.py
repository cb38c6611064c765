"""Contexts and PASIDs of a guest's remapping unit: its entries are read again, and what they lead to is made.

VT-d: "Context-cache Invalidation"; "PASID-cache Invalidation".
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R9, R11, R12, R13, RAX, RBX, RCX, RDI, RDX, RSI
from vtsim.iommu import entries as e
from vtsim.vmm.programs import viommu_words as unit
from vtsim.vmm.programs.viommu_words import each_device, granularity, nested, next_device
from vtsim.vmm.programs.words import zero
from vtsim.vmm.registry import Path


def contexts(a: Assembler, path: Path) -> None:
    """`viommu_contexts`: entries of contexts are read again, and all that they lead to."""
    a.label("viommu_contexts")
    each_device(a, "contexts")
    granularity(a)
    a.cmp(RDX, unit.BY_DOMAIN)
    a.jcc(ops.CC_B, "contexts_this")  # all
    a.cmp(RDX, unit.BY_PAGE, comment="one device?")
    a.jcc(ops.CC_Z, "contexts_source")
    # The domain of an entry that is now in it may have been another, so all those are looked at as well.
    a.jmp("contexts_this")
    a.label("contexts_source")
    a.copy(RAX, R12)
    a.shr(RAX, 32)
    a.and_(RAX, 0xFFF8)  # the mask of functions leaves out three bits at most
    a.ld(RCX, Mem(R11, unit.VD_SOURCE))
    a.and_(RCX, 0xFFF8)
    a.cmp(RAX, register=RCX)
    a.jcc(ops.CC_NZ, "contexts_next")
    a.label("contexts_this")
    a.call("viommu_read_entries")
    a.call("viommu_refresh")
    next_device(a, "contexts")
    a.ret()

    a.label("viommu_read_entries")  # of the device in R11, as the guest has them now
    a.push(R12)
    a.push(R13)
    zero(a, R9)
    a.ld(R13, Mem(R11, unit.VD_SOURCE))
    a.copy(RSI, R13)
    a.shr(RSI, 8)
    a.shl(RSI, 4)
    if nested(path):
        a.copy(RAX, R13)
        a.and_(RAX, 0x80)
        a.shr(RAX, 4)
        a.or_(RSI, register=RAX, comment="upper half of the root entry")
    a.ld(RAX, Mem(RBX, unit.VI_ROOT))
    a.add(RSI, register=RAX)
    a.call("guest_memory")
    a.ld(RSI, Mem(RDI))
    a.test(RSI, e.PRESENT)
    a.jcc(ops.CC_Z, "viommu_no_entry")
    a.and_(RSI, e.ADDRESS)
    a.and_(R13, 0x7F if nested(path) else 0xFF)
    a.shl(R13, 5 if nested(path) else 4)
    a.add(RSI, register=R13)
    a.call("guest_memory")
    a.ld(R12, Mem(RDI))
    a.test(R12, e.PRESENT)
    a.jcc(ops.CC_Z, "viommu_no_entry")
    if nested(path):
        for _ in ("directory", "table"):  # both by their first entry
            a.copy(RSI, R12)
            a.and_(RSI, e.ADDRESS)
            a.call("guest_memory")
            a.ld(R12, Mem(RDI))
            a.test(R12, e.PRESENT)
            a.jcc(ops.CC_Z, "viommu_no_entry")
        a.ld(R9, Mem(RDI, 16))
        a.ld(R13, Mem(RDI, 8))
    else:
        a.test(R12, 3 << e.TT_SHIFT, comment="passes through?")
        a.jcc(ops.CC_NZ, "viommu_no_entry")
        a.copy(R9, R12)
        a.ld(R13, Mem(RDI, 8))
        a.shr(R13, e.CONTEXT_DID)
    a.and_(R13, 0xFFFF)
    a.st(Mem(R11, unit.VD_DOMAIN), R13)
    a.label("viommu_no_entry")
    a.and_(R9, e.ADDRESS)
    a.st(Mem(R11, unit.VD_GUEST), R9)
    a.pop(R13)
    a.pop(R12)
    a.ret()


def pasids(a: Assembler, path: Path) -> None:
    """`viommu_pasids`: PASID entries are read again."""
    a.label("viommu_pasids")
    each_device(a, "pasids")
    a.call("viommu_read_entries")
    a.call("viommu_refresh")
    next_device(a, "pasids")
    a.ret()
