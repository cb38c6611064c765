"""The hypercalls: page-table requests, callbacks, the way back from them, events, time.

What a guest asks for wrongly is refused with -1 and counted. Addresses that it hands over are checked before they are
used, so that the hypervisor reads and writes nothing of its own in the guest's place.

SDM: "Invalidation of TLBs and Paging-Structure Caches"; "TSC-Deadline Mode".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from attrs import frozen

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R8, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept import direct as d
from vtsim.ept import spec as e
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.crossing import VECTORS, die, idle
from vtsim.vmm.monitor.layout import F_RFLAGS, F_RIP, saved
from vtsim.vmm.monitor.virtual_state import POPPED
from vtsim.vmm.paravirtual import several
from vtsim.vmm.paravirtual.layout import V, count, count_one_of, vcpu
from vtsim.vmm.personalities.kvm.parameters import PARAMETERS
from vtsim.vmm.programs.direct_tables import DROP, Ground, requests, root_or_refused, subroutines
from vtsim.vmm.programs.upcalls import bit_of, send_or_unmask, to_tsc, unmask
from vtsim.vmm.programs.words import zero

OF_XEN: Final = ("update_entry", "validate_table", "pin_table", "load_cr3")
CR4_PGE = 1 << 7
X2APIC_INITIAL, TSC_DEADLINE = 0x838, 0x6E0
FRAME: Final = {name: 8 * n for n, name in enumerate(d.IRET_FRAME)}


@frozen(kw_only=True)
class Ring3Ground(Ground):
    """A guest whose kernel runs in ring 3, on tables where the hypervisor is mapped too.

    Beside loads and stores, requests are so many instructions of C as those of a guest under VT-x (Xen's, both times).
    """

    def vcpu(self, field: str) -> Mem:
        return vcpu(field)

    def work(self, a: Assembler, name: str) -> None:
        if name in OF_XEN:
            a.work(PARAMETERS[name].value, comment=name)

    def drop_page(self, a: Assembler) -> None:
        a.op(ops.INVLPG, mem=Mem(R13))

    def drop_all(self, a: Assembler) -> None:
        """Load the root RAX, and drop all translations, global ones too. Changes RCX and RDX."""
        a.op(ops.MOV_FROM_CR, RCX, imm=4)
        a.copy(RDX, RCX)
        a.and_(RDX, ~CR4_PGE)
        a.op(ops.MOV_TO_CR, RDX, imm=4)
        a.op(ops.MOV_TO_CR, RAX, imm=3)
        a.op(ops.MOV_TO_CR, RCX, imm=4)

    def loaded(self, a: Assembler) -> Sequence[Mem | None]:
        if self.shared:
            several.loaded_anywhere(a)
            return ()
        return (vcpu("KERNEL_CR3"), vcpu("USER_CR3"))

    def load(self, a: Assembler) -> None:
        a.st(vcpu("KERNEL_CR3"), RAX)
        a.or_(RBP, DROP, comment="its bit 63 keeps nothing: roots have no PCIDs")

    def other_requests(self) -> dict[int, str]:
        return {d.LOAD_USER: "request_load_user", d.STACK: "request_stack"}

    def emit_other_requests(self, a: Assembler) -> None:
        a.label("request_load_user")
        self.work(a, "load_user")
        a.test(R13, register=R13)
        a.jcc(ops.CC_Z, "no_process_root")
        root_or_refused(a, e.ADDRESS)
        a.label("no_process_root")
        a.st(vcpu("USER_CR3"), R13)
        a.jmp("request_done")
        a.label("request_stack")
        self.work(a, "stack")
        a.st(vcpu("KERNEL_STACK"), R13)
        a.jmp("request_done")

    def begun(self, a: Assembler) -> None:
        count_one_of(a, "REQUESTS", RAX, RCX)


def tables(a: Assembler, ground: Ring3Ground) -> None:
    """`call_request`, `call_multi`: page-table requests. `call_update_va`: the entry of a linear address."""
    a.activity = ops.MEMORY_MANAGEMENT
    for name in ("request", "multi"):
        a.label(f"call_{name}")
        if ground.shared:
            several.lock_tables(a, f"lock_{name}")
        a.ld(R12, saved(RDI))
        a.ld(R13, saved(RSI))
        for register in (R14, RBP):
            zero(a, register)
        a.jmp("direct_single" if name == "request" else "direct_multi")
    requests(a, ground)
    a.label("direct_done")
    a.st(saved(RAX), R14)
    if ground.shared:
        several.unlock_tables(a)
    _drop(a, ground)

    refused = "update_refused" if ground.shared else "refused"
    if ground.shared:
        a.label("update_refused")
        several.unlock_tables(a)
        a.jmp("refused")
    a.label("call_update_va")
    if ground.shared:
        several.lock_tables(a, "lock_update")
    zero(a, RBP)
    a.ld(RSI, saved(RDI))
    a.ld(RDI, vcpu("KERNEL_CR3"))
    a.mov(R8, at.DIRECT)
    a.mov(R10, e.PTE_PRESENT)
    a.hook(hooks.TABLE_LOOKUP)
    a.cmp(RDX, 1)
    a.jcc(ops.CC_NZ, refused)
    a.sub(RCX, register=R8)
    a.copy(R12, RCX)
    a.ld(R13, saved(RSI))
    a.call("direct_request")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, refused)
    a.st_value(saved(RAX), 0)
    a.ld(RAX, saved(RDX))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "direct_drop")
    a.ld(R13, saved(RDI))
    ground.drop_page(a)
    a.label("direct_drop")
    if ground.shared:
        several.unlock_tables(a)
    _drop(a, ground)
    subroutines(a, ground)
    if ground.shared:
        several.subroutines(a, ground.drop_all)
        several.send_event(a)


def _drop(a: Assembler, ground: Ring3Ground) -> None:
    """Load the kernel's root again and drop all translations, if RBP says so; then `leave`."""
    a.test(RBP, register=RBP)
    a.jcc(ops.CC_Z, "leave")
    a.ld(RAX, vcpu("KERNEL_CR3"))
    ground.drop_all(a)
    a.jmp("leave")


def nothing(a: Assembler) -> None:
    """Events that wait are delivered on the way back, as after every hypercall."""
    a.jmp("done")


def mask(a: Assembler) -> None:
    """The word by which a kernel masks upcalls, for one that does it by a call."""
    a.ld(RAX, saved(RDI))
    a.and_(RAX, 1)
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.st(Mem(RDI, d.UPCALL_MASK), RAX)
    a.jmp("done")


def set_traps(a: Assembler) -> None:
    """Handlers of exceptions."""
    a.ld(RSI, saved(RDI))
    a.ld(RBX, saved(RSI))
    a.cmp(RBX, VECTORS)
    a.jcc(ops.CC_A, "refused")
    a.label("next_trap")
    a.test(RBX, register=RBX)
    a.jcc(ops.CC_Z, "done")
    for past in (1, 16):
        a.add(RSI, past)
        a.call("guest_address")
        a.jcc(ops.CC_BE, "refused")
        a.sub(RSI, past)
    a.ld(RDX, Mem(RSI))
    a.ld(RDI, Mem(RSI, 8))
    a.cmp(RDX, VECTORS)
    a.jcc(ops.CC_AE, "refused")
    a.st(Mem(R15, V["TRAP_HANDLERS"], index=RDX, scale=8), RDI)
    a.add(RSI, 16)
    a.sub(RBX, 1)
    a.jmp("next_trap")


def set_callbacks(a: Assembler) -> None:
    """Handlers of events and of system calls."""
    for register, field in ((RDI, "EVENT_HANDLER"), (RSI, "CALL_HANDLER")):
        a.ld(RAX, saved(register))
        a.st(vcpu(field), RAX)
    a.jmp("done")


def iret(a: Assembler) -> None:
    """To where the frame on the kernel's stack says; the interrupt flag of a kernel's frame is its mask again."""
    a.activity = ops.REENTRY
    a.ld(RSI, saved(RSP))
    for past in (1, 8 * len(d.IRET_FRAME)):
        a.add(RSI, past)
        a.call("guest_address")
        a.jcc(ops.CC_BE, "no_stack")
        a.sub(RSI, past)
    for name, word in (("RAX", saved(RAX)), ("R11", saved(R11)), ("RCX", saved(RCX)), ("RIP", F_RIP)):
        a.ld(RAX, Mem(RSI, FRAME[name]))
        a.st(word, RAX)
    a.ld(RBX, Mem(RSI, FRAME["flags"]))
    a.ld(RCX, Mem(RSI, FRAME["CS"]))
    a.ld(RDX, Mem(RSI, FRAME["RFLAGS"]))
    a.ld(RAX, Mem(RSI, FRAME["RSP"]))
    a.st(saved(RSP), RAX)
    a.copy(RAX, RDX)
    a.emit(ops.XOR, RAX, imm=-1)
    a.shr(RAX, 9)
    a.and_(RAX, 1)
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.st(Mem(RDI, d.UPCALL_MASK), RAX)
    a.and_(RDX, POPPED & ~at.IOPL)
    a.or_(RDX, at.RF_IF | 2)
    a.st(F_RFLAGS, RDX)
    a.shr(RBX, d.IN_SYSCALL.bit_length() - 1)
    a.and_(RBX, 1)
    a.st(vcpu("BY_SYSCALL"), RBX)
    a.test(RCX, 3)
    a.jcc(ops.CC_Z, "leave", comment="the kernel was interrupted")
    a.ld(RAX, vcpu("USER_CR3"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "no_process")
    a.st_value(vcpu("KERNEL"), 0)
    a.call("toggle")
    a.jmp("leave")
    a.label("no_process")
    die(a, at.NO_PROCESS)


def schedule(a: Assembler) -> None:
    """Give up the CPU, which nobody else wants; or wait for an event, upcalls being unmasked."""
    a.ld(RDI, saved(RDI))
    a.test(RDI, register=RDI)
    a.jcc(ops.CC_Z, "done")
    a.cmp(RDI, d.BLOCK)
    a.jcc(ops.CC_NZ, "refused")
    a.label("block")
    a.activity = ops.IDLE
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.st_value(Mem(RDI, d.UPCALL_MASK), 0)
    count(a, "BLOCKS")
    a.label("blocked")
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.ld(RAX, Mem(RDI, d.UPCALL_PENDING))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "unblocked")
    idle(a)
    a.jmp("blocked")
    a.label("unblocked")
    a.call("update_time")
    a.jmp("done")


def set_timer(a: Assembler, deadline: bool, clock_hz: int) -> None:
    """The timer's event at a time of the shared page's clock; a time that has passed is now."""
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.ld(RAX, saved(RDI))
    to_tsc(a, clock_hz)
    a.mov(RCX, TSC_DEADLINE)
    if not deadline:
        a.copy(RBX, RAX)
        _read_tsc(a)
        a.sub(RBX, register=RAX)
        a.cmp(RBX, 1)
        a.jcc(ops.CC_GE, "timer_counts")
        a.mov(RBX, 1)
        a.label("timer_counts")
        a.copy(RAX, RBX)
        a.mov(RCX, X2APIC_INITIAL)
    a.copy(RDX, RAX)
    a.shr(RDX, 32)
    a.op(ops.WRMSR)
    a.jmp("done")


def _read_tsc(a: Assembler) -> None:
    """RAX <- TSC. Changes RDX."""
    a.op(ops.RDTSC)
    a.shl(RDX, 32)
    a.or_(RAX, register=RDX)


def update_time(a: Assembler) -> None:
    """`update_time`: a new reading of the TSC for the shared page. Changes RAX, RCX, RDX, RSI, RDI."""
    a.label("update_time")
    a.ld(RDI, vcpu("SHARED_PAGE"))
    version = Mem(RDI, d.TIME_VERSION)
    a.ld(RSI, version)
    a.add(RSI, 1)
    a.st(version, RSI)
    _read_tsc(a)
    a.ld(RDX, Mem(RDI, d.TIME_STAMP))
    a.st(Mem(RDI, d.TIME_STAMP), RAX)
    a.sub(RAX, register=RDX)
    a.ld(RCX, Mem(RDI, d.TIME_SCALE))
    a.hook(hooks.SCALE)
    a.ld(RCX, Mem(RDI, d.TIME_BASE))
    a.add(RAX, register=RCX)
    a.st(Mem(RDI, d.TIME_BASE), RAX)
    a.add(RSI, 1)
    a.st(version, RSI)
    a.ret()


def event(a: Assembler, shared: bool) -> None:
    """Ports: one for the timer, a port made pending by its owner, a port unmasked; of several vCPUs also by others."""
    a.ld(RBX, saved(RDI))
    a.cmp(RBX, d.BIND_IPI if shared else d.UNMASK)
    a.jcc(ops.CC_A, "refused")
    if shared:
        a.jcc(ops.CC_Z, "event_bind_ipi")
    a.test(RBX, register=RBX)
    a.jcc(ops.CC_NZ, "event_of_port")
    a.ld(RCX, vcpu("NEXT_PORT"))
    a.cmp(RCX, d.PORTS)
    a.jcc(ops.CC_AE, "refused")
    a.mov(RAX, 1)
    a.emit(ops.SHL, RAX, RCX)
    a.st(vcpu("TIMER_BIT"), RAX)
    a.copy(RAX, RCX)
    if shared:
        a.st(vcpu("TIMER_PORT"), RAX)
        a.label("event_bound")
    a.add(RCX, 1)
    a.st(vcpu("NEXT_PORT"), RCX)
    a.jmp("answer")
    if shared:
        a.label("event_bind_ipi")
        a.ld(RCX, vcpu("NEXT_PORT"))
        a.cmp(RCX, d.PORTS)
        a.jcc(ops.CC_AE, "refused")
        a.copy(RAX, RCX)
        a.jmp("event_bound")
    a.label("event_of_port")
    if shared:
        a.cmp(RBX, d.SEND)
        a.jcc(ops.CC_NZ, "event_unmask")
        several.send(a, "refused")
        a.jmp("done")
        a.label("event_unmask")
        bit_of(a, saved(RSI), "refused")
        a.ld(RDI, vcpu("SHARED_PAGE"))
        unmask(a, "done")
    else:
        send_or_unmask(a, saved(RSI), vcpu("SHARED_PAGE"), refused="refused", then="done")
    a.jmp("done")


def calls(a: Assembler, ground: Ring3Ground, deadline: bool, clock_hz: int) -> list[str]:
    """Emit all hypercalls; their labels by number."""
    tables(a, ground)
    handlers: dict[str, Callable[[Assembler], object]] = {
        "nothing": nothing, "set_traps": set_traps, "set_callbacks": set_callbacks, "iret": iret,
        "schedule": schedule, "event": partial(event, shared=ground.shared), "mask": mask,
    }  # fmt: skip
    for name, handler in handlers.items():
        a.activity = ops.EXIT_HANDLER
        a.label(f"call_{name}")
        ground.work(a, name)
        handler(a)
    a.activity = ops.EXIT_HANDLER
    a.label("call_set_timer")
    ground.work(a, "set_timer")
    set_timer(a, deadline, clock_hz)
    update_time(a)
    return [f"call_{name}" for name in d.CALLS]
