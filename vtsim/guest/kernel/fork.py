"""Copying an address space, and waiting for the copy to end.

A task has at most one child at a time, whose task structure, root, stack and table frames are set aside. What the
child has copied is its own and is freed when the parent has waited for it; what it still shares stays the parent's.

Not modelled: children that live beside each other; reference counts of pages; children of children; fork by a process
of several threads. Linux leaves a program's text to the child's faults; here its entries are copied like others.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.ept import spec as e
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import direct_fork as direct
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.calls import flush_space
from vtsim.guest.kernel.fault import find_entry, frame_of
from vtsim.guest.kernel.free_pages import give_frame
from vtsim.guest.kernel.lengths import length
from vtsim.guest.kernel.ring3 import disable, enable

RETURN_BYTES = 8


def drop_pages(a: Assembler, kernel: KernelOptions, name: str) -> None:
    """Drop the pages of the child at R12, and free those that only it has, which it may write. Keeps RBX and R12."""
    a.ld(s.R14, Mem(s.R12, at.T_AREAS))
    a.ld(s.R15, Mem(s.R12, at.T_AREA_COUNT))
    a.label(f"{name}_area")
    a.ld(s.R13, Mem(s.R14, at.A_ZONE))
    a.test(s.R13, -1)
    a.jcc(ops.CC_Z, f"{name}_next_area")
    a.ld(s.RBP, Mem(s.R14, at.A_START))
    a.label(f"{name}_page")
    find_entry(a, kernel, s.R12, s.RBP)
    a.test(s.RAX, e.PTE_WRITE)
    a.jcc(ops.CC_NZ, f"{name}_own_page")
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, f"{name}_next_page")
    a.work(length("unmap_shared_page"))
    a.jmp(f"{name}_next_page")
    a.label(f"{name}_own_page")
    a.work(length("unmap_own_page"))
    frame_of(a, kernel)
    give_frame(a, kernel)
    a.label(f"{name}_next_page")
    a.ld(s.RAX, Mem(s.R14, at.A_BYTES))
    a.add(s.RBP, register=s.RAX)
    a.ld(s.RAX, Mem(s.R14, at.A_END))
    a.cmp(s.RBP, register=s.RAX)
    a.jcc(ops.CC_B, f"{name}_page")
    a.label(f"{name}_next_area")
    a.add(s.R14, at.AREA_BYTES)
    a.sub(s.R15, 1)
    a.jcc(ops.CC_NZ, f"{name}_area")


def _copy_space(a: Assembler, kernel: KernelOptions) -> None:
    """The tables of the task at RBX, copied to those of the child at R12."""
    a.ld(s.RDI, Mem(s.RBX, at.T_ROOT))
    a.ld(s.RSI, Mem(s.R12, at.T_ROOT))
    a.mov(s.RDX, 0)
    a.mov(s.RCX, kernel.user_entries - 1)
    a.mov(s.R8, kernel.places.direct)
    a.lea(s.R9, Mem(s.R12, at.T_TABLES_NEXT))
    a.mov(s.R10, e.PTE_WRITE)
    for register in (s.RAX, s.RBX, s.R11):
        a.mov(register, 0)
    a.hook(hooks.TABLE_COPY)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_S, "no_memory")
    a.copy(s.RCX, s.RAX)
    a.label("fork_page")
    a.work(length("copy_shared_page"))
    a.loop("fork_page")
    a.add(s.RSI, register=s.R8)
    if kernel.kpti:
        for index in kernel.top_entries:
            a.ld(s.RAX, Mem(s.RSI, 8 * index))
            a.st(Mem(s.RSI, 4096 + 8 * index), s.RAX)


@path("fork")
def fork(a: Assembler, kernel: KernelOptions) -> None:
    """System call: copy the address space for copy-on-write and start the child; 1 to the parent, 0 to the child."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_fork")
    a.work(length("fork"))
    disable(a, kernel)
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.ld(s.R12, Mem(s.RBX, at.T_CHILD))
    if kernel.paravirtual:
        direct.copy_space(a, kernel)
    else:
        _copy_space(a, kernel)
    a.ld(s.RDI, Mem(s.R12, at.T_STACK_TOP))
    a.sub(s.RDI, kernel.frame_bytes)
    for part in kernel.frame_parts:
        a.ldm(Mem(s.RSP, RETURN_BYTES + part), at.CARRIERS)
        a.stm(Mem(s.RDI, part), at.CARRIERS)
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.ld(s.R12, Mem(s.RBX, at.T_CHILD))
    a.st_value(Mem(s.RDI, at.AT[s.RAX]), 0)
    a.mov(s.RAX, "leave")
    a.st(Mem(s.RDI, -RETURN_BYTES), s.RAX)
    a.sub(s.RDI, RETURN_BYTES + at.SWITCH_BYTES)
    a.st(Mem(s.R12, at.T_RSP), s.RDI)
    if kernel.pcid:  # the PCID was another child's before: the first load of CR3 flushes it
        a.mov(s.RCX, ~at.NOFLUSH)
        for word in (at.T_CR3, at.T_USER_CR3):
            a.ld(s.RAX, Mem(s.R12, word))
            a.and_(s.RAX, register=s.RCX)
            a.st(Mem(s.R12, word), s.RAX)
    a.st_value(Mem(s.RBX, at.T_SHARED), 1)
    a.st_value(Mem(s.R12, at.T_STATE), at.RUNNABLE)
    flush_space(a, kernel)
    a.work(length("wake"))
    enable(a, kernel)
    a.mov(s.RAX, 1)
    a.ret()


@path("wait")
def wait(a: Assembler, kernel: KernelOptions) -> None:
    """System call: wait for the child to end, then free its pages and its tables."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_wait")
    a.work(length("wait"))
    disable(a, kernel)
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.ld(s.R12, Mem(s.RBX, at.T_CHILD))
    a.label("wait_more")
    a.ld(s.RAX, Mem(s.R12, at.T_STATE))
    a.cmp(s.RAX, at.ZOMBIE)
    a.jcc(ops.CC_Z, "reap")
    a.st_value(Mem(s.RBX, at.T_STATE), at.WAITING)
    a.call("schedule")
    a.jmp("wait_more")
    a.label("reap")
    a.work(length("reap"))
    drop_pages(a, kernel, "reap")
    if kernel.paravirtual:
        a.call("give_up_space")
    else:
        a.ld(s.RAX, Mem(s.R12, at.T_TABLES_FIRST))
        a.st(Mem(s.R12, at.T_TABLES_NEXT), s.RAX)
    a.st_value(Mem(s.R12, at.T_STATE), at.FREE)
    a.st_value(Mem(s.RBX, at.T_SHARED), 0)
    enable(a, kernel)
    a.mov(s.RAX, 0)
    a.ret()
