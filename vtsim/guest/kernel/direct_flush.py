"""Dropping translations where the hypervisor updates tables: here and on other CPUs, by requests behind the updates.

The hypervisor has the vCPUs of other CPUs drop translations, and answers when they have; nobody is interrupted by the
kernel. A CPU that is idle on a borrowed space, or runs another process, is left alone as elsewhere.

Source: Linux 6.1, arch/x86/xen/mmu_pv.c (xen_flush_tlb_one_user, xen_flush_tlb, xen_flush_tlb_multi).
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept import direct as d
from vtsim.guest.kernel import KernelOptions, path, smp
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.flush import FLUSH_CEILING
from vtsim.guest.kernel.hypercalls import flush_page, request
from vtsim.guest.kernel.lengths import length


def flush_range(a: Assembler, name: str, pages: int) -> None:
    """This CPU drops the translations of so many pages from R12 on, page by page, or all if there are many.

    The requests wait to be sent. Changes RAX, RCX, RDI, RSI, R12 and `pages`.
    """
    a.cmp(pages, FLUSH_CEILING)
    a.jcc(ops.CC_BE, f"{name}_flush_page")
    request(a, d.FLUSH_ALL, 0)
    a.jmp(f"{name}_flushed")
    a.label(f"{name}_flush_page")
    flush_page(a)
    a.add(s.R12, at.PAGE)
    a.sub(pages, 1)
    a.jcc(ops.CC_NZ, f"{name}_flush_page")
    a.label(f"{name}_flushed")


@path("shootdown by hypercall")
def shootdown(a: Assembler, kernel: KernelOptions) -> None:
    """Subroutine `shoot_down`: other CPUs drop RSI pages from RDI on, of the space of the task at RBX.

    What this CPU's requests ask for is done before, and all of it when this returns. Called with interrupts off and the
    space's lock held. Keeps RBX, RBP, R12 to R15.
    """
    if not kernel.several or not kernel.paravirtual:
        return
    a.activity = ops.SYSCALL_PATH
    a.label("shoot_down")
    a.copy(s.R9, s.RDI)
    a.copy(s.RDX, s.RSI)
    a.ld(s.RSI, Mem(s.RBX, at.T_PEER))
    a.cmp(s.RSI, register=s.RBX)
    a.jcc(ops.CC_Z, "shot")
    a.work(length("call_others"))
    a.mov(s.R8, 0)
    smp.each_that_may_have_it(a, kernel)
    a.ld(s.RCX, Mem(s.RDI, at.APIC_ID))
    a.mov(s.RAX, 1)
    a.emit(ops.SHL, s.RAX, s.RCX)
    a.or_(s.R8, register=s.RAX)
    smp.next_thread(a)
    a.test(s.R8, -1)
    a.jcc(ops.CC_Z, "shot")
    flush_others(a)
    a.label("shot")
    a.jmp("pv_send")


def flush_others(a: Assembler) -> None:
    """Ask that CPUs by a bit each in R8 drop the translations of R9 if RDX is 1 page, or all. Changes RAX, RCX, R8."""
    a.copy(s.RSI, s.R9)
    a.shl(s.R8, d.VCPUS)
    a.or_(s.R8, d.FLUSH_PAGE)
    a.cmp(s.RDX, 1)
    a.jcc(ops.CC_Z, "shoot_page")
    a.add(s.R8, d.FLUSH_ALL - d.FLUSH_PAGE)
    a.label("shoot_page")
    a.copy(s.RDI, s.R8)
    a.call("pv_request")
