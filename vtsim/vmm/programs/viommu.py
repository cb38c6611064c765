"""A remapping unit for a VM: what is written to its registers exits, and is made in the real unit.

In caching mode the guest's unit caches what is not present too, so a guest invalidates whenever it changes an entry.
For what is invalidated the guest's tables are walked and the shadow tables written, which the real unit walks
(`viommu_shadow.py`). An entry that was replaced is invalidated there, as the host's own driver does it: a descriptor, a
wait descriptor, the tail, and a wait. With nested translation the real unit walks the guest's first-level tables, and
invalidations are passed on. Invalidations of contexts and PASIDs have the guest's entries read again.

VT-d: "Queued Invalidation Interface"; "IOTLB Invalidate Register"; "Context Command Register"; "Caching Mode".
Not modelled: the way of an exit through a device process, where QEMU has its unit; pinning; registers of the guest's
unit other than the queue's, those of invalidation and the fault status; completion interrupts of the guest's unit; what
is reserved in the guest's descriptors; context entries of a guest that pass through; PASIDs other than that of requests
without one.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R11, R12, R13, R14, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.iommu import descriptors as dsc
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp
from vtsim.iommu.descriptors import descriptor
from vtsim.vmm import layout as at
from vtsim.vmm.programs import several, viommu_entries, viommu_shadow
from vtsim.vmm.programs import viommu_words as w
from vtsim.vmm.programs.viommu_words import count, each_device, granularity, nested, next_device, unless_of_domain
from vtsim.vmm.programs.words import vcpu, work
from vtsim.vmm.registry import Path


def registers(a: Assembler, path: Path) -> None:
    """`viommu`: an access to the unit's registers. R13 address, R12 write?, RAX value."""
    unit = path.addresses["viommu"]
    file = unit + w.REGISTER_PAGE
    a.label("viommu")
    work(a, path, "in_kernel_device")
    a.copy(RCX, R13)
    a.and_(RCX, 0xFFC)
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "viommu_store")
    a.and_(RCX, 0xFF8)
    a.mov(RDI, file)
    a.ld(RAX, Mem(RDI, 0, index=RCX))
    a.test(R13, 4)
    a.jcc(ops.CC_Z, "load_completed")
    a.shr(RAX, 32)
    a.jmp("load_completed")

    a.label("viommu_store")
    a.copy(RDX, RCX)
    a.and_(RDX, 0xFF8)
    for offset in w.STORED:
        a.cmp(RDX, offset)
        a.jcc(ops.CC_Z, "viommu_stored")
    a.jmp("skip_decoded")
    a.label("viommu_stored")
    a.mov(RBX, unit)
    _lock(a, path)
    a.mov(RDI, file)
    a.st(Mem(RDI, 0, index=RCX, size=4), RAX)
    a.ld(RDX, vcpu("DECODED", 1))
    a.cmp(RDX, 8)
    a.jcc(ops.CC_NZ, "viommu_act")
    a.test(RCX, 4)
    a.jcc(ops.CC_NZ, "viommu_act")
    a.shr(RAX, 32)
    a.add(RCX, 4)
    a.st(Mem(RDI, 0, index=RCX, size=4), RAX)
    a.label("viommu_act")  # RCX: the last half that was written
    a.cmp(RCX, sp.CCMD + 4)
    a.jcc(ops.CC_Z, "viommu_context_command")
    a.cmp(RCX, sp.IOTLB + 4)
    a.jcc(ops.CC_Z, "viommu_iotlb_command")
    a.and_(RCX, 0xFF8)
    a.cmp(RCX, sp.IQT)
    a.jcc(ops.CC_NZ, "viommu_done")
    count(a, w.VI_EXITS)
    _queue(a, path, file)
    _commands(a, file)
    viommu_entries.contexts(a, path)
    _translations(a, path)
    if nested(path):
        viommu_entries.pasids(a, path)
    else:
        viommu_shadow.subroutines(a, path)
    _flush(a, unit, path.addresses["viommu_step"])
    a.label("viommu_done")
    if path.several:
        a.mov(RBX, unit)
        several.unlock(a, Mem(RBX, w.VI_SERVING))
    a.jmp("skip_decoded")


def _lock(a: Assembler, path: Path) -> None:
    """The unit is ours, unless the VM ends meanwhile. Changes RDX and RSI."""
    if not path.several:
        return
    a.mov(RSI, 1)
    a.xadd(Mem(RBX, w.VI_TICKET), RSI)
    a.label("viommu_turn")
    a.ld(RDX, Mem(RBX, w.VI_SERVING))
    a.cmp(RDX, register=RSI)
    a.jcc(ops.CC_Z, "viommu_locked")
    a.ld(RDX, vcpu("ASKED_END"))
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_NZ, "reenter")
    a.op(ops.PAUSE)
    a.jmp("viommu_turn")
    a.label("viommu_locked")


def _queue(a: Assembler, path: Path, file: int) -> None:
    """Descriptors of the guest's queue, up to its tail; R12 and R13 are the words of one."""
    step = path.addresses["viommu_step"]
    types = {dsc.CONTEXT_CACHE: "viommu_contexts", dsc.IOTLB_TYPE: "viommu_translations", dsc.WAIT: "viommu_wait_for",
             dsc.DEVICE_TLB: "viommu_next", dsc.INTERRUPT_ENTRY: "viommu_next"}  # fmt: skip
    if nested(path):
        types |= {dsc.PASID_IOTLB: "viommu_translations", dsc.PASID_CACHE: "viommu_pasids",
                  dsc.PASID_DEVICE_TLB: "viommu_next", dsc.PAGE_GROUP_RESPONSE: "viommu_next"}  # fmt: skip
    a.label("viommu_next")
    a.ld(R14, Mem(displacement=file + sp.IQT, size=4))
    a.and_(R14, 4096 - step)
    a.ld(RAX, Mem(RBX, w.VI_HEAD))
    a.st(Mem(displacement=file + sp.IQH), RAX)
    a.cmp(RAX, register=R14)
    a.jcc(ops.CC_Z, "viommu_done")
    a.ld(RSI, Mem(RBX, w.VI_QUEUE))
    a.add(RSI, register=RAX)
    a.call("guest_memory")
    a.ld(R12, Mem(RDI))
    a.ld(R13, Mem(RDI, 8))
    a.copy(RAX, R12)
    a.and_(RAX, 0xE0F)
    for number in types:
        a.cmp(RAX, number)
        a.jcc(ops.CC_Z, f"viommu_type_{number}")
    a.label("viommu_error")  # the head stays where the error is
    a.ld(RAX, Mem(displacement=file + sp.FSTS, size=4))
    a.or_(RAX, sp.IQE)
    a.st(Mem(displacement=file + sp.FSTS, size=4), RAX)
    a.jmp("viommu_done")
    for number, label in types.items():
        a.label(f"viommu_type_{number}")
        a.ld(RAX, Mem(RBX, w.VI_HEAD))
        a.add(RAX, step)
        a.and_(RAX, 4096 - step)
        a.st(Mem(RBX, w.VI_HEAD), RAX)
        if label != "viommu_next":
            a.call(label)
        a.jmp("viommu_next")
    a.label("viommu_wait_for")
    a.copy(RSI, R13)
    a.test(R12, 1 << 5, comment="status write?")
    a.jcc(ops.CC_Z, "viommu_waited")
    a.call("guest_memory")
    a.shr(R12, 32)
    a.st(Mem(RDI, size=4), R12)
    a.label("viommu_waited")
    a.ret()


def _commands(a: Assembler, file: int) -> None:
    """What the registers of invalidation ask, as descriptors: done, and what was done stands in the register."""
    commands = (
        ("context", sp.CCMD, sp.CIRG, sp.CAIG, "viommu_contexts"),
        ("iotlb", sp.IOTLB, sp.IIRG, sp.IAIG, "viommu_translations"),
    )
    for name, register, asked, done, label in commands:
        a.label(f"viommu_{name}_command")
        count(a, w.VI_EXITS)
        a.ld(RAX, Mem(displacement=file + register))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_NS, "viommu_done")
        a.copy(R12, RAX)  # as a descriptor has them: granularity, domain, and for contexts source and mask
        a.shr(R12, asked)
        a.and_(R12, 3)
        a.shl(R12, 4)
        a.copy(RCX, RAX)
        if name == "context":
            a.shl(RCX, 16)
            a.mov(RDX, 0x3_FFFF_FFFF_0000)
        else:
            a.shr(RCX, 16)
            a.mov(RDX, 0xFFFF_0000)
        a.and_(RCX, register=RDX)
        a.or_(R12, register=RCX)
        a.ld(R13, Mem(displacement=file + sp.IVA))
        a.call(label)
        a.ld(RAX, Mem(displacement=file + register))
        a.shl(RAX, 1)
        a.shr(RAX, 1)
        a.mov(RDX, ~(3 << done))
        a.and_(RAX, register=RDX)
        a.copy(RCX, RAX)
        a.shr(RCX, asked)
        a.and_(RCX, 3)
        a.shl(RCX, done)
        a.or_(RAX, register=RCX)
        a.st(Mem(displacement=file + register), RAX)
        a.jmp("viommu_done")


def _translations(a: Assembler, path: Path) -> None:
    """`viommu_translations`: pages of a domain, or all; `viommu_refresh`: all of the device in R11."""
    a.label("viommu_translations")
    each_device(a, "translations")
    granularity(a)
    a.cmp(RDX, w.BY_DOMAIN)
    a.jcc(ops.CC_B, "translations_all")
    unless_of_domain(a, "translations_next")
    a.cmp(RDX, w.BY_PAGE)
    a.jcc(ops.CC_NZ, "translations_all")
    a.copy(RCX, R13)
    a.and_(RCX, 0x3F)
    a.cmp(RCX, w.LARGEST_MASK)
    a.jcc(ops.CC_A, "translations_all")
    if nested(path):
        a.call("viommu_flush_pages")
    else:
        a.call("viommu_sync_pages")
    a.jmp("translations_next")
    a.label("translations_all")
    if nested(path):
        a.call("viommu_flush_domain")
    else:
        a.call("viommu_refresh")
    next_device(a, "translations")
    a.ret()
    if nested(path):
        a.label("viommu_refresh")
        a.ld(RDI, Mem(R11, w.VD_ENTRY))
        a.ld(RAX, Mem(RDI, 16))
        a.and_(RAX, 0xFFF)
        a.ld(RCX, Mem(R11, w.VD_GUEST))
        a.or_(RAX, register=RCX)
        a.st(Mem(RDI, 16), RAX)
        a.ld(RAX, Mem(RDI))
        a.or_(RAX, e.PRESENT)
        a.test(RCX, register=RCX)
        a.jcc(ops.CC_NZ, "viommu_present")
        a.sub(RAX, e.PRESENT)
        a.label("viommu_present")
        a.st(Mem(RDI), RAX)
        a.jmp("viommu_flush_entry")


def _flush(a: Assembler, unit: int, step: int) -> None:
    """What of the device in R11 is invalidated in the real unit: the pages of R13, its domain, or its PASID entry."""
    queue = unit + w.QUEUE_PAGE
    status = unit + w.HOST_STATUS
    if step > 16:
        a.label("viommu_flush_entry")
        entry, _ = descriptor("PASID_CACHE", G=1)
        a.ld(RDX, Mem(R11, w.VD_LOW))
        a.and_(RDX, ~0xF)
        a.or_(RDX, entry)
        a.call("viommu_submit")
    a.label("viommu_flush_domain")
    a.mov(RBP, w.BY_DOMAIN)
    a.jmp("viommu_flush")
    a.label("viommu_flush_pages")
    a.mov(RBP, w.BY_PAGE)
    a.label("viommu_flush")
    count(a, w.VI_FLUSHES)
    a.ld(RDX, Mem(R11, w.VD_LOW))
    a.or_(RDX, register=RBP)
    a.call("viommu_submit")
    a.st_value(Mem(displacement=status, size=4), w.IN_USE)
    wait, _ = descriptor("WAIT", SW=1, STDATA=w.DONE)
    a.mov(RDX, wait)
    a.push(R13)
    a.mov(R13, status - at.HOST_DIRECT)
    a.call("viommu_submit")
    a.pop(R13)
    a.st(Mem(displacement=at.HOST_UNIT + sp.IQT, size=4), RSI)
    a.label("viommu_wait")
    a.ld(RAX, Mem(displacement=status, size=4))
    a.cmp(RAX, w.DONE)
    a.jcc(ops.CC_Z, "viommu_flushed")
    a.ld(RAX, Mem(displacement=at.HOST_UNIT + sp.FSTS, size=4))
    a.test(RAX, sp.IQE | sp.ITE | sp.ICE)
    a.jcc(ops.CC_NZ, "fetch_failed")
    a.op(ops.PAUSE)
    a.jmp("viommu_wait")
    a.label("viommu_flushed")
    a.ret()
    a.label("viommu_submit")  # a descriptor, RDX and R13, into the real unit's queue; RSI <- the next place
    a.ld(RSI, Mem(RBX, w.HOST_NEXT))
    a.st(Mem(RSI, queue), RDX)
    a.st(Mem(RSI, queue + 8), R13)
    a.add(RSI, step)
    a.and_(RSI, 4096 - step)
    a.st(Mem(RBX, w.HOST_NEXT), RSI)
    a.ret()
