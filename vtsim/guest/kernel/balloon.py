"""The balloon driver: frames that the guest gives to the hypervisor, and takes back, as the host demands.

The frames of the balloon are those at the bottom of the zone's list, below what faults take from its top. Without a
hypervisor there is no balloon.

Not modelled: the page-reporting and statistics of virtio-balloon; several frames in one hypercall.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, path, smp
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.lengths import length

# hypercalls, number in RAX; an answer that is negative, or the number itself, says that there is no balloon
TARGET, INFLATE, DEFLATE = range(0x6200_0000, 0x6200_0003)  # RAX <- frames; the address of a frame in RDI
HYPERVISOR_PRESENT: Final = 1 << 31


@path("balloon")
def balloon(a: Assembler, kernel: KernelOptions) -> None:
    """System call: ask how large the balloon should be, and make it so, frame by frame."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_balloon")
    a.mov(s.RAX, 1)
    a.mov(s.RCX, 0)
    a.op(ops.CPUID)
    a.test(s.RCX, HYPERVISOR_PRESENT)
    a.jcc(ops.CC_Z, "balloon_done")
    a.mov(s.RAX, TARGET)
    a.op(ops.VMCALL)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_S, "balloon_done")
    a.cmp(s.RAX, TARGET)
    a.jcc(ops.CC_Z, "balloon_done")
    a.copy(s.R12, s.RAX)
    a.mov(s.R13, kernel.small_zone)
    a.label("balloon_next")
    a.op(ops.CLI)
    smp.lock_zone(a, kernel, s.RCX)
    a.ld(s.RDX, Mem(s.R13, at.Z_BOTTOM))
    a.ld(s.RBX, Mem(s.R13, at.Z_BALLOON))
    a.cmp(s.RBX, register=s.R12)
    a.jcc(ops.CC_Z, "balloon_is_right")
    a.jcc(ops.CC_A, "balloon_deflate")
    a.ld(s.RAX, Mem(s.R13, at.Z_TOP))
    a.cmp(s.RAX, register=s.RDX)
    a.jcc(ops.CC_Z, "balloon_drains" if kernel.several else "balloon_is_right", comment="no frame is free")
    a.ld(s.RDI, Mem(s.RDX))
    a.add(s.RDX, 8)
    a.add(s.RBX, 1)
    a.mov(s.RAX, INFLATE)
    a.jmp("balloon_tell")
    a.label("balloon_deflate")
    a.sub(s.RDX, 8)
    a.sub(s.RBX, 1)
    a.ld(s.RDI, Mem(s.RDX))
    a.mov(s.RAX, DEFLATE)
    a.label("balloon_tell")
    a.st(Mem(s.R13, at.Z_BOTTOM), s.RDX)
    a.st(Mem(s.R13, at.Z_BALLOON), s.RBX)
    if kernel.several:
        a.copy(s.RCX, s.RAX)
    smp.unlock_zone(a, kernel)
    if kernel.several:
        a.copy(s.RAX, s.RCX)
    a.op(ops.STI)
    a.work(length("balloon_page"))
    a.op(ops.VMCALL)
    a.jmp("balloon_next")
    if kernel.several:
        a.label("balloon_drains")
        smp.unlock_zone(a, kernel)
        a.call("drain_all")
        a.op(ops.STI)
        a.test(s.RAX, -1)
        a.jcc(ops.CC_Z, "balloon_done", comment="no frame is free")
        a.jmp("balloon_next")
    a.label("balloon_is_right")
    smp.unlock_zone(a, kernel)
    a.op(ops.STI)
    a.label("balloon_done")
    a.mov(s.RAX, 0)
    a.ret()
