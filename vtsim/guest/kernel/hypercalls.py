"""The paravirtual kernel: page tables with host-physical addresses, which the hypervisor updates on request.

Where the plain kernel stores to a table, loads CR3 or flushes translations, this one makes requests, gathers those that
belong together in the shared page, and sends them by one hypercall. Frames are known by guest-physical addresses; two
tables translate. The tables of a child are built as ordinary memory, validated as a whole when its root is pinned, and
memory again after it was unpinned.

Not modelled: KPTI and large pages of a paravirtual kernel (Linux has neither under Xen); in VMX non-root operation,
events by shared memory (interrupts arrive through the virtual local APIC, and CLI and STI mask them).
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.ept import direct as d
from vtsim.ept import spec as e
from vtsim.ept.tables import TO_TABLE
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.ring3 import hypercall, shared

SIGNATURE = int.from_bytes(b"vtsi", "little")
HYPERVISOR_LEAF = 0x40000000


def request(a: Assembler, kind: int, value: int | None = None) -> None:
    """Ask for something of a kind; the value is in RSI, or a constant. Clobbers RAX, RCX, RDI."""
    a.mov(s.RDI, kind)
    if value is not None:
        a.mov(s.RSI, value)
    a.call("pv_request")


def look_up(a: Assembler, task: int = s.RBX) -> None:
    """The entry of the address in RSI for a task, as TABLE_LOOKUP_DIRECT finds it. Clobbers RDI, R8 to R10."""
    a.ld(s.RDI, Mem(task, at.T_ROOT))
    a.mov(s.R8, at.DIRECT)
    a.mov(s.R9, at.M2P)
    a.mov(s.R10, e.PTE_PRESENT)
    a.hook(hooks.TABLE_LOOKUP_DIRECT)


def to_machine(a: Assembler, register: int) -> None:
    """The host-physical address of the frame whose guest-physical address the register holds."""
    a.shr(register, 12)
    a.ld(register, Mem(displacement=at.P2M, index=register, scale=8))


def to_physical(a: Assembler, register: int) -> None:
    """The guest-physical address of the frame whose host-physical address the register holds, as an entry does."""
    a.and_(register, e.ADDRESS)
    a.shr(register, 12)
    a.ld(register, Mem(displacement=at.M2P, index=register, scale=8))


def update_address(a: Assembler, kernel: KernelOptions) -> None:
    """The entry of the address R12 <- RAX, and its translations are dropped. Clobbers RAX, RDI, RSI, RDX."""
    a.copy(s.RDI, s.R12)
    a.copy(s.RSI, s.RAX)
    a.mov(s.RDX, 1)
    hypercall(a, kernel, d.CALL_UPDATE_VA)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "pv_refused")


def flush_page(a: Assembler) -> None:
    """Drop the translations of the address in R12. Clobbers RAX, RCX, RDI, RSI."""
    a.copy(s.RSI, s.R12)
    request(a, d.FLUSH_PAGE)


def find_interface(a: Assembler, kernel: KernelOptions) -> None:
    """At boot: is there a hypervisor with what the kernel is built for? If not, no process starts, and the log says so.

    In ring 3 CPUID does not ask the hypervisor, but the processor: then what is undefined without one asks.
    """
    features = (d.DIRECT_TABLES if kernel.paravirtual else 0) | (d.SHARED_EVENTS if kernel.events else 0)
    for asks, absent in ((False, "not_in_cpuid"), (True, "no_interface")):
        for leaf, register, wanted in ((HYPERVISOR_LEAF, s.RBX, SIGNATURE), (d.FEATURE_LEAF, s.RAX, features)):
            a.mov(s.RAX, leaf)
            a.mov(s.RCX, 0)
            if asks:
                a.emit(ops.UD, imm=d.ASK_HYPERVISOR)
            a.op(ops.CPUID)
            if leaf == HYPERVISOR_LEAF:
                a.cmp(s.RAX, d.FEATURE_LEAF)
                a.jcc(ops.CC_B, absent)
                a.cmp(register, wanted)
                a.jcc(ops.CC_NZ, absent)
            else:
                a.and_(register, wanted)
                a.cmp(register, wanted)
                a.jcc(ops.CC_NZ, absent)
        if not asks:
            a.jmp("interface_found")
            a.label("not_in_cpuid")
    a.label("interface_found")
    a.st_value(at.cpu_word(at.BOOTED), 1)


@path("hypercalls")
def hypercalls(a: Assembler, kernel: KernelOptions) -> None:
    """Requests to the hypervisor, a page mapped by them, and what is done if one is refused."""
    if kernel.paravirtual:
        _requests(a, kernel)
    if kernel.paravirtual or kernel.events:
        _stop(a, kernel)


def _requests(a: Assembler, kernel: KernelOptions) -> None:
    waiting = shared(kernel, d.SHARED_COUNT)
    a.activity = ops.PAGE_FAULT_PATH
    a.label("pv_request")  # RDI, RSI; clobbers RAX, RCX
    if kernel.batch > 1:
        a.ld(s.RAX, waiting)
        a.copy(s.RCX, s.RAX)
        a.shl(s.RCX, 4)
        a.st(shared(kernel, d.SHARED_REQUESTS, s.RCX), s.RDI)
        a.st(shared(kernel, d.SHARED_REQUESTS + 8, s.RCX), s.RSI)
        a.add(s.RAX, 1)
        a.st(waiting, s.RAX)
        a.cmp(s.RAX, kernel.batch)
        a.jcc(ops.CC_AE, "pv_send")
        a.ret()
    else:
        hypercall(a, kernel, d.CALL_REQUEST)
        a.test(s.RAX, -1)
        a.jcc(ops.CC_Z, "pv_refused")
        a.ret()
    a.label("pv_send")  # what waits in the shared page; clobbers RAX, RSI
    if kernel.batch > 1:
        a.ld(s.RSI, waiting)
        a.test(s.RSI, -1)
        a.jcc(ops.CC_Z, "pv_sent")
        hypercall(a, kernel, d.CALL_MULTI)
        a.st_value(waiting, 0)
        a.cmp(s.RAX, register=s.RSI)
        a.jcc(ops.CC_NZ, "pv_refused")
        a.label("pv_sent")
    a.ret()
    _map(a, kernel)
    _rights(a, kernel)


def _stop(a: Assembler, kernel: KernelOptions) -> None:
    """What a hypervisor that is missing, or refuses, means for all tasks."""
    a.activity = ops.BOOT
    for label, reason in (("pv_refused", at.REFUSED), ("no_interface", at.NO_INTERFACE)):
        a.label(label)
        a.mov(s.RAX, reason)
        a.jmp("pv_stop")
    a.label("pv_stop")
    a.ld(s.RSI, at.cpu_word(at.FIRST_TASK))
    if kernel.several:
        a.ld(s.RCX, at.cpu_word(at.TASKS_HERE))
    else:
        a.mov(s.RCX, kernel.tasks)
    a.label("pv_stop_task")
    a.ld(s.RDI, Mem(s.RSI, at.T_LOG))
    if kernel.several:  # there may be an idle task only
        a.test(s.RDI, -1)
        a.jcc(ops.CC_Z, "pv_stop_next")
    a.st(Mem(s.RDI, at.L_REASON), s.RAX)
    if kernel.several:
        a.label("pv_stop_next")
    a.ld(s.RSI, Mem(s.RSI, at.T_NEXT))
    a.loop("pv_stop_task")
    a.op(ops.STOP_OP)


def _map(a: Assembler, kernel: KernelOptions) -> None:
    """`pv_map`: entry RDX, a guest-physical address and flags, for the address RSI of the task at RBX.

    RAX <- 0, or 1 if there is no frame for a table. RBX, RBP, R12 to R15 stay.
    """
    a.label("pv_map")
    a.push(s.RBP)
    a.push(s.R13)
    a.copy(s.R13, s.RSI)
    a.copy(s.RBP, s.RDX)
    a.and_(s.RDX, e.ADDRESS)
    a.sub(s.RBP, register=s.RDX)
    to_machine(a, s.RDX)
    a.or_(s.RBP, register=s.RDX)
    _walk(a, kernel, "pv_map")
    a.copy(s.RDI, s.R11)
    a.copy(s.RSI, s.RBP)
    a.call("pv_request")
    a.call("pv_send")
    a.mov(s.RAX, 0)
    a.label("pv_map_end")
    a.pop(s.R13)
    a.pop(s.RBP)
    a.ret()
    if kernel.several:
        a.label("pv_tables")  # the tables alone, for the address R12
        a.push(s.R13)
        a.copy(s.R13, s.R12)
        _walk(a, kernel, "pv_tables")
        a.mov(s.RAX, 0)
        a.label("pv_tables_end")
        a.pop(s.R13)
        a.ret()


def _walk(a: Assembler, kernel: KernelOptions, name: str) -> None:
    """R11 <- where the last-level entry stands of the address R13, tables being made; else RAX <- 1, and to the end."""
    a.label(f"{name}_walk")
    a.copy(s.RSI, s.R13)
    look_up(a)
    a.cmp(s.RDX, 1)
    a.jcc(ops.CC_Z, f"{name}_leaf")
    a.push(s.R11)
    take_table(a, kernel, f"{name}_empty")
    a.call("pv_protect")
    a.pop(s.RDI)
    a.copy(s.RSI, s.RDX)
    a.or_(s.RSI, TO_TABLE)
    a.call("pv_request")
    a.call("pv_send")
    a.jmp(f"{name}_walk")
    a.label(f"{name}_empty")
    a.pop(s.R11)
    a.mov(s.RAX, 1)
    a.jmp(f"{name}_end")
    a.label(f"{name}_leaf")


def take_table(a: Assembler, kernel: KernelOptions, empty: str, task: int = s.RBX) -> None:
    """RDX <- guest-physical address of a zeroed frame for a table of a task. Clobbers RAX, RDI, RSI."""
    a.ld(s.RSI, Mem(task, at.T_TABLES))
    if kernel.several:  # processes on other CPUs take from the same
        a.mov(s.RDX, 1)
        a.xadd(Mem(s.RSI), s.RDX)
    else:
        a.ld(s.RDX, Mem(s.RSI))
    a.ld(s.RAX, Mem(s.RSI, 8))
    a.cmp(s.RDX, register=s.RAX)
    if kernel.several:
        there = f"table_{a.here:x}"
        a.jcc(ops.CC_B, there)
        a.mov(s.RDX, -1)
        a.xadd(Mem(s.RSI), s.RDX)
        a.jmp(empty)
        a.label(there)
    else:
        a.jcc(ops.CC_AE, empty)
        a.copy(s.RAX, s.RDX)
        a.add(s.RAX, 1)
        a.st(Mem(s.RSI), s.RAX)
    a.shl(s.RDX, 12)
    a.mov(s.RDI, at.DIRECT)
    a.add(s.RDI, register=s.RDX)
    a.hook(hooks.PAGE_ZERO)


def _rights(a: Assembler, kernel: KernelOptions) -> None:
    """`pv_protect`, `pv_release`: ask for the kernel's own mapping of frame RDX read-only, or writable again.

    RDX <- its host-physical address. RBX (the task), RBP and R12 to R15 stay.
    """
    a.label("pv_protect")
    a.push(value=kernel.direct_page & ~(e.PTE_WRITE | e.PTE_DIRTY))
    a.jmp("pv_rights")
    a.label("pv_release")
    a.push(value=kernel.direct_page)
    a.label("pv_rights")
    a.push(s.RDX)
    a.mov(s.RSI, at.DIRECT)
    a.add(s.RSI, register=s.RDX)
    look_up(a)
    a.pop(s.RDX)
    to_machine(a, s.RDX)
    a.pop(s.RSI)
    a.or_(s.RSI, register=s.RDX)
    a.copy(s.RDI, s.R11)
    a.jmp("pv_request")
