"""System calls: plain ones that only spend time, giving up the CPU, the end of a task, unmapping, protecting."""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.ept import direct as d
from vtsim.ept import spec as e
from vtsim.guest.kernel import KernelOptions, direct_flush, hypercalls, path, smp
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.fault import find_entry, frame_of, put_entry
from vtsim.guest.kernel.flush import FLUSH_CEILING, flush_range, flush_user_half
from vtsim.guest.kernel.free_pages import give_frame
from vtsim.guest.kernel.lengths import length
from vtsim.guest.kernel.ring3 import disable, enable


def flush_space(a: Assembler, kernel: KernelOptions) -> None:
    """Drop all translations of the running address space, that of the task at RBX. Clobbers RAX and RCX."""
    if kernel.paravirtual:
        hypercalls.request(a, d.FLUSH_ALL, 0)
        a.call("pv_send")
        return
    a.op(ops.MOV_FROM_CR, s.RAX, imm=3)
    a.op(ops.MOV_TO_CR, s.RAX, imm=3)
    if kernel.kpti and kernel.pcid:
        flush_user_half(a)


@path("plain call")
def plain(a: Assembler, kernel: KernelOptions) -> None:
    """System call that spends RDI instructions in the kernel; and the one that gives up the CPU."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_plain")
    a.copy(s.RCX, s.RDI)
    a.emit(ops.LONG_WORK, length=64)
    a.mov(s.RAX, 0)
    a.ret()
    a.label("call_yield")
    a.work(length("yield"))
    disable(a, kernel)
    a.call("schedule")
    enable(a, kernel)
    a.mov(s.RAX, 0)
    a.ret()


@path("exit")
def end(a: Assembler, kernel: KernelOptions) -> None:
    """The end of a task; after the last one the guest stops. A child wakes the parent that waits for it."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_exit")
    disable(a, kernel)
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.ld(s.RDI, Mem(s.RBX, at.T_LOG))
    a.st_value(Mem(s.RDI, at.L_REASON), at.ENDED)
    a.label("end_task")
    a.work(length("exit"))
    a.ld(s.RSI, Mem(s.RBX, at.T_PARENT))
    a.test(s.RSI, -1)
    a.jcc(ops.CC_Z, "end_process")
    a.st_value(Mem(s.RBX, at.T_STATE), at.ZOMBIE)
    a.ld(s.RAX, Mem(s.RSI, at.T_STATE))
    a.cmp(s.RAX, at.WAITING)
    a.jcc(ops.CC_NZ, "ended")
    a.work(length("wake"))
    a.st_value(Mem(s.RSI, at.T_STATE), at.RUNNABLE)
    a.label("ended")
    a.call("schedule")
    a.label("end_process")
    a.st_value(Mem(s.RBX, at.T_STATE), at.DEAD)
    if kernel.several:
        a.mov(s.RAX, -1)
        a.xadd(Mem(displacement=kernel.alive), s.RAX)
        a.sub(s.RAX, 1)
    else:
        a.ld(s.RAX, at.cpu_word(at.ALIVE))
        a.sub(s.RAX, 1)
        a.st(at.cpu_word(at.ALIVE), s.RAX)
    a.jcc(ops.CC_NZ, "ended")
    a.op(ops.STOP_OP)


@path("unmap")
def unmap(a: Assembler, kernel: KernelOptions) -> None:
    """System call: free RSI pages of 4 KiB from address RDI on, and drop their translations."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_unmap")
    a.work(length("unmap", several=kernel.several))
    disable(a, kernel)
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.copy(s.R12, s.RDI)
    a.copy(s.RBP, s.RSI)
    a.copy(s.R15, s.RSI)
    a.mov(s.R13, kernel.small_zone)
    if kernel.several:
        _unmap_everywhere(a, kernel)
        return
    if kernel.paravirtual:
        _unmap_by_requests(a, kernel)
        return
    a.mov(s.R8, kernel.places.direct)
    a.mov(s.R10, e.PTE_PRESENT)
    a.mov(s.R14, e.ADDRESS)
    a.label("unmap_page")
    a.ld(s.RDI, Mem(s.RBX, at.T_ROOT))
    a.copy(s.RSI, s.R12)
    a.hook(hooks.TABLE_LOOKUP)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "unmap_next")
    a.work(length("unmap_page"))
    a.copy(s.RDX, s.RAX)
    a.and_(s.RDX, register=s.R14)
    give_frame(a, kernel)
    a.label("unmap_next")
    a.add(s.R12, 4096)
    a.sub(s.RBP, 1)
    a.jcc(ops.CC_NZ, "unmap_page")
    a.ld(s.RDI, Mem(s.RBX, at.T_ROOT))
    a.ld(s.RSI, Mem(s.RSP, 8 + at.AT[s.RDI]))
    a.copy(s.RDX, s.R15)
    a.mov(s.RAX, 0)
    a.hook(hooks.TABLE_CLEAR)
    _flush_pages(a, kernel, "unmap")
    if kernel.kpti and kernel.pcid:
        flush_user_half(a)
    enable(a, kernel)
    a.mov(s.RAX, 0)
    a.ret()


def _flush_pages(a: Assembler, kernel: KernelOptions, name: str) -> None:
    """Drop the translations of R15 pages from the address on that the caller gave in RDI: each, or all there are."""
    a.cmp(s.R15, FLUSH_CEILING)
    a.jcc(ops.CC_BE, f"{name}_flush_pages")
    flush_space(a, kernel)
    a.jmp(f"{name}_flushed")
    a.label(f"{name}_flush_pages")
    a.ld(s.R12, Mem(s.RSP, 8 + at.AT[s.RDI]))
    a.label(f"{name}_flush_page")
    a.op(ops.INVLPG, mem=Mem(s.R12))
    a.add(s.R12, 4096)
    a.sub(s.R15, 1)
    a.jcc(ops.CC_NZ, f"{name}_flush_page")
    a.label(f"{name}_flushed")


@path("protect")
def protect(a: Assembler, kernel: KernelOptions) -> None:
    """System call: RSI pages of 4 KiB from address RDI on may not be written any more, or (RDX) may be again.

    Entries that may be written again are stored as they are, read-only until a write faults, as in Linux before 6.0.
    """
    a.activity = ops.SYSCALL_PATH
    a.label("call_protect")
    a.work(length("protect", several=kernel.several))
    disable(a, kernel)
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.copy(s.R12, s.RDI)
    a.copy(s.RBP, s.RSI)
    a.copy(s.R15, s.RSI)
    a.copy(s.R13, s.RDX)
    smp.call(a, kernel, "lock_write")
    a.label("protect_page")
    find_entry(a, kernel, s.RBX, s.R12)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "protect_next")
    smp.lock_table_of(a, kernel)
    a.work(length("protect_page", several=kernel.several))
    if kernel.several:  # at once, natively: another CPU may be setting flags of the entry
        a.test(s.R13, -1)
        a.jcc(ops.CC_NZ, "protect_next", comment="a write on another CPU came first: nobody flushes")
        a.test(s.RAX, e.PTE_WRITE)
        a.jcc(ops.CC_Z, "protect_next")
    if kernel.several and not kernel.paravirtual:
        a.mov(s.RAX, -e.PTE_WRITE)
        a.xadd(Mem(s.RCX), s.RAX)
    else:
        a.and_(s.RAX, ~e.PTE_WRITE)
        put_entry(a, kernel)
    a.label("protect_next")
    a.add(s.R12, 4096)
    smp.unlock_at_end_of_table(a, kernel, "protect")
    a.sub(s.RBP, 1)
    a.jcc(ops.CC_NZ, "protect_page")
    smp.call(a, kernel, "unlock_table")
    a.test(s.R13, -1)
    a.jcc(ops.CC_NZ, "protect_done")
    if kernel.paravirtual:
        hypercalls.request(a, d.FLUSH_ALL, 0)
    else:
        _flush_pages(a, kernel, "protect")
    if kernel.kpti and kernel.pcid:
        flush_user_half(a)
    if kernel.several:
        a.ld(s.RDI, Mem(s.RSP, 8 + at.AT[s.RDI]))
        a.ld(s.RSI, Mem(s.RSP, 8 + at.AT[s.RSI]))
        a.call("shoot_down")
    a.label("protect_done")
    smp.call(a, kernel, "unlock_write")
    if kernel.paravirtual:
        a.call("pv_send")
    enable(a, kernel)
    a.mov(s.RAX, 0)
    a.ret()


def _unmap_by_requests(a: Assembler, kernel: KernelOptions) -> None:
    """The same with direct tables: each page that is there is a request, and each flush is one."""
    a.label("unmap_page")
    a.copy(s.RSI, s.R12)
    hypercalls.look_up(a)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "unmap_next")
    a.work(length("unmap_page"))
    frame_of(a, kernel)
    give_frame(a, kernel)
    a.copy(s.RDI, s.R11)
    a.mov(s.RSI, 0)
    a.call("pv_request")
    a.cmp(s.R15, FLUSH_CEILING)
    a.jcc(ops.CC_A, "unmap_next")
    hypercalls.flush_page(a)
    a.label("unmap_next")
    a.add(s.R12, 4096)
    a.sub(s.RBP, 1)
    a.jcc(ops.CC_NZ, "unmap_page")
    a.cmp(s.R15, FLUSH_CEILING)
    a.jcc(ops.CC_BE, "unmap_flushed")
    hypercalls.request(a, d.FLUSH_ALL, 0)
    a.label("unmap_flushed")
    a.call("pv_send")
    enable(a, kernel)
    a.mov(s.RAX, 0)
    a.ret()


def _unmap_everywhere(a: Assembler, kernel: KernelOptions) -> None:
    """The same where other CPUs may have translations: frames are gathered, and freed when all have dropped them."""
    a.call("lock_write")
    a.label("unmap_some")
    a.copy(s.R15, s.RBP)
    a.cmp(s.R15, smp.GATHERED)
    a.jcc(ops.CC_BE, "unmap_all")
    a.mov(s.R15, smp.GATHERED)
    a.label("unmap_all")
    a.push(s.RBP)
    a.push(s.R12)
    a.copy(s.RBP, s.R15)
    a.ld(s.R14, at.cpu_word(at.GATHER))
    a.label("unmap_page")
    find_entry(a, kernel, s.RBX, s.R12)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "unmap_next")
    smp.lock_table_of(a, kernel)
    a.work(length("unmap_page", several=True))
    frame_of(a, kernel)
    a.st(Mem(s.R14), s.RDX)
    a.add(s.R14, 8)
    a.mov(s.RAX, 0)
    put_entry(a, kernel)
    a.label("unmap_next")
    a.add(s.R12, 4096)
    smp.unlock_at_end_of_table(a, kernel, "unmap")
    a.sub(s.RBP, 1)
    a.jcc(ops.CC_NZ, "unmap_page")
    a.call("unlock_table")
    a.ld(s.R12, Mem(s.RSP))
    a.copy(s.RBP, s.R15)
    if kernel.paravirtual:
        direct_flush.flush_range(a, "unmap", s.RBP)
    else:
        flush_range(a, kernel, "unmap", s.RBP)
    a.ld(s.RDI, Mem(s.RSP))
    a.copy(s.RSI, s.R15)
    a.call("shoot_down")
    a.ld(s.RSI, at.cpu_word(at.GATHER))
    a.label("unmap_free")
    a.cmp(s.RSI, register=s.R14)
    a.jcc(ops.CC_Z, "unmap_freed")
    a.ld(s.RDX, Mem(s.RSI))
    a.add(s.RSI, 8)
    give_frame(a, kernel)
    a.jmp("unmap_free")
    a.label("unmap_freed")
    a.pop(s.R12)
    a.pop(s.RBP)
    a.copy(s.RAX, s.R15)
    a.shl(s.RAX, 12)
    a.add(s.R12, register=s.RAX)
    a.sub(s.RBP, register=s.R15)
    a.jcc(ops.CC_NZ, "unmap_some")
    a.call("unlock_write")
    a.op(ops.STI)
    a.mov(s.RAX, 0)
    a.ret()
