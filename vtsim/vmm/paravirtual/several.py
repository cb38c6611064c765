"""Several vCPUs of a VM whose kernel runs in ring 3: the lock of its tables, dropped translations, events to others.

Who is to have translations dropped elsewhere holds the lock, leaves word in the other vCPUs' structures, interrupts
their CPUs, and waits. A CPU takes that interrupt in ring 3, or while it waits for an event. In the hypervisor, where
interrupts are off, it goes on to use what it has cached and answers when it has left; only who waits for the lock
looks at the word there. So nothing is used by a translation that was to be dropped when the wait is over.

SDM: "Operations that Invalidate TLBs and Paging-Structure Caches"; "Interrupt Command Register (ICR)".
Source: Xen 3.0, xen/arch/x86/smp.c (flush_area_mask, smp_invalidate_interrupt).
Not modelled: in ring 3, vCPUs that another one brings up (VCPUOP_initialise, VCPUOP_up: all start in the kernel), waits
for certain ports (SCHEDOP_poll), ports that may be bound to another vCPU later, events between VMs.
"""

from __future__ import annotations

from collections.abc import Callable

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R10, R13, R15, RAX, RBP, RCX, RDI, RDX, RSI, RSP
from vtsim.ept import direct as d
from vtsim.vmm.monitor.crossing import X2APIC_EOI, from_ring_3, save, write_msr
from vtsim.vmm.monitor.layout import saved
from vtsim.vmm.paravirtual.layout import ASKED_ALL, ASKED_PAGE, EVENT_VECTOR, INVALIDATE_VECTOR, V, count, vcpu
from vtsim.vmm.programs.direct_tables import DROP_ALL, refused_if_used

X2APIC_ICR = 0x830


def lock_tables(a: Assembler, name: str) -> None:
    """The VM's tables are ours. Changes RAX, RCX, RDX and RDI."""
    a.ld(RDI, vcpu("VM"))
    a.mov(RAX, 1)
    a.xadd(Mem(RDI, V["TABLES_TICKET"]), RAX)
    a.label(name)
    a.ld(RCX, Mem(RDI, V["TABLES_SERVING"]))
    a.cmp(RCX, register=RAX)
    a.jcc(ops.CC_Z, f"{name}_ours")
    a.push(RAX)
    count(a, "LOCK_WAITS")
    a.call("drop_as_asked")
    a.pop(RAX)
    a.op(ops.PAUSE)
    a.jmp(name)
    a.label(f"{name}_ours")


def unlock_tables(a: Assembler) -> None:
    """They are free again. Changes RAX and RDI."""
    a.ld(RDI, vcpu("VM"))
    a.ld(RAX, Mem(RDI, V["TABLES_SERVING"]))
    a.add(RAX, 1)
    a.st(Mem(RDI, V["TABLES_SERVING"]), RAX)


def loaded_anywhere(a: Assembler) -> None:
    """A request about the root in frame RSI is refused if any vCPU has it, of kernel or process. Changes RAX, RDI."""
    a.copy(RDI, R15)
    a.label("loaded_by")
    for field in ("KERNEL_CR3", "USER_CR3"):
        a.ld(RAX, Mem(RDI, V[field]))
        refused_if_used(a)
    a.ld(RDI, Mem(RDI, V["PEER"]))
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_NZ, "loaded_by")


def subroutines(a: Assembler, drop_all: Callable[[Assembler], None]) -> None:
    """`flush_others`; `flush_some` and `flush_page_of_some` of vCPUs by bits in R10, of the page at R13.

    Called with the lock held. Change RAX, RCX, RDX and RDI, the latter two RSI as well. `drop_as_asked`: what another
    vCPU wants dropped is. Changes RAX, RCX and RDX. And `settle_types`.
    """
    a.activity = ops.MEMORY_MANAGEMENT
    for name in ("flush_others", "flush_some", "flush_page_of_some"):
        _ask(a, name, page="page" in name, some="some" in name)
    a.label("drop_as_asked")
    a.ld(RCX, vcpu("ASKED"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "dropped")
    count(a, "REMOTE_FLUSHES")
    a.cmp(RCX, ASKED_ALL)
    a.jcc(ops.CC_Z, "drop_everything")
    drop_page(a)
    a.jmp("drop_done")
    a.label("drop_everything")
    drop_everything(a, drop_all)
    a.label("drop_done")
    a.st_value(vcpu("ASKED"), 0)
    a.label("dropped")
    a.ret()
    settle_types(a)


def drop_page(a: Assembler) -> None:
    """Drop the translations of an address that another vCPU named, RCX. Changes RCX."""
    a.and_(RCX, ~ASKED_PAGE)
    a.op(ops.INVLPG, mem=Mem(RCX))


def drop_everything(a: Assembler, drop_all: Callable[[Assembler], None]) -> None:
    """Drop all translations, whoever's tables are loaded. Changes RAX, RCX and RDX."""
    a.op(ops.MOV_FROM_CR, RAX, imm=3)
    drop_all(a)


def settle_types(a: Assembler) -> None:
    """`settle_types`: no other vCPU has translations any more by a type that a frame has lost. Changes RAX and RDI.

    This one drops its own before the guest goes on.
    """
    a.label("settle_types")
    a.ld(RDI, vcpu("VM"))
    a.ld(RAX, Mem(RDI, V["LOOSE"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "types_settled")
    a.st_value(Mem(RDI, V["LOOSE"]), 0)
    a.or_(RBP, DROP_ALL)
    for register in (RCX, RDX):
        a.push(register)
    flush_for_types(a)
    for register in (RDX, RCX):
        a.pop(register)
    a.label("types_settled")
    a.ret()


def flush_for_types(a: Assembler) -> None:
    """All other vCPUs drop what they have cached. Changes RAX, RCX, RDX and RDI."""
    a.call("flush_others")


def _ask(a: Assembler, name: str, *, page: bool, some: bool) -> None:
    a.label(name)
    a.ld(RDI, vcpu("PEER"))
    a.jmp(f"{name}_look")
    a.label(f"{name}_next")
    if some:
        a.ld(RCX, Mem(RDI, V["INDEX"]))
        a.mov(RSI, 1)
        a.emit(ops.SHL, RSI, RCX)
        a.test(RSI, register=R10)
        a.jcc(ops.CC_Z, f"{name}_other")
    if page:
        a.copy(RAX, R13)
        a.and_(RAX, ~0xFFF)
        a.or_(RAX, ASKED_PAGE)
        a.st(Mem(RDI, V["ASKED"]), RAX)
    else:
        a.st_value(Mem(RDI, V["ASKED"]), ASKED_ALL)
    interrupt(a, INVALIDATE_VECTOR)
    a.label(f"{name}_other")
    a.ld(RDI, Mem(RDI, V["PEER"]))
    a.label(f"{name}_look")
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_NZ, f"{name}_next")
    a.ld(RDI, vcpu("PEER"))
    a.jmp(f"{name}_awaited")
    a.label(f"{name}_wait")
    a.op(ops.PAUSE)
    a.label(f"{name}_await")
    a.ld(RAX, Mem(RDI, V["ASKED"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, f"{name}_wait")
    a.ld(RDI, Mem(RDI, V["PEER"]))
    a.label(f"{name}_awaited")
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_NZ, f"{name}_await")
    a.ret()


def interrupt(a: Assembler, vector: int) -> None:
    """Interrupt the CPU of the vCPU at RDI. Changes RAX, RCX and RDX."""
    count(a, "KICKS")
    a.ld(RDX, Mem(RDI, V["CPU"]))
    a.mov(RAX, vector)
    a.mov(RCX, X2APIC_ICR)
    a.op(ops.WRMSR)


def interrupts(a: Assembler) -> None:
    """`invalidate`: another CPU wants translations dropped. `event_check`: it has sent an event.

    The guest runs or waits; events are looked at on the way back.
    """
    for name, activity in (("invalidate", ops.MEMORY_MANAGEMENT), ("event_check", ops.EXIT_DISPATCH)):
        a.activity = activity
        a.label(name)
        a.push(value=0)
        from_ring_3(a, 16, f"{name}_while_blocked")
        save(a, 48)
        a.st_value(vcpu("BY_SYSCALL"), 0)
        _answer(a, name)
        a.jmp("leave")
        a.label(f"{name}_while_blocked")
        _answer(a, name)
        a.add(RSP, 8)
        a.op(ops.IRET)


def _answer(a: Assembler, name: str) -> None:
    write_msr(a, X2APIC_EOI, 0)
    if name == "invalidate":
        a.call("drop_as_asked")


def send_event(a: Assembler) -> None:
    """`send_to`: the event of port RSI of the vCPU at RDI is pending. Changes RAX, RCX, RDX and RDI.

    Of a vCPU on another CPU, which may be in its guest or wait, that CPU is interrupted, unless events wait already.

    Source: Xen 3.0, xen/common/event_channel.c (evtchn_set_pending).
    """
    a.activity = ops.EXIT_HANDLER
    a.label("send_to")
    a.push(RDI)
    a.ld(RDI, Mem(RDI, V["SHARED_PAGE"]))
    a.push(RDI)
    a.add(RDI, d.EVENTS)
    a.hook(hooks.SET_BIT)
    a.pop(RDI)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "sent_before")
    count(a, "EVENTS_SENT")
    a.mov(RCX, 1)
    a.emit(ops.SHL, RCX, RSI)
    a.ld(RAX, Mem(RDI, d.EVENTS_MASKED))
    a.test(RAX, register=RCX)
    a.jcc(ops.CC_NZ, "sent_before")
    a.ld(RAX, Mem(RDI, d.UPCALL_PENDING))
    a.st_value(Mem(RDI, d.UPCALL_PENDING), 1)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "sent_before")
    a.pop(RDI)
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_Z, "sent_here")
    interrupt(a, EVENT_VECTOR)
    a.label("sent_here")
    a.ret()
    a.label("sent_before")
    a.pop(RDI)
    a.ret()


def send(a: Assembler, refused: str) -> None:
    """What a guest sends: its RSI is a port and a vCPU. Falls through; changes RAX, RCX, RDX, RSI and RDI."""
    a.ld(RSI, saved(RSI))
    a.copy(RCX, RSI)
    a.shr(RCX, d.OF_VCPU)
    a.and_(RSI, (1 << d.OF_VCPU) - 1)
    a.cmp(RSI, d.PORTS)
    a.jcc(ops.CC_AE, refused)
    a.copy(RDI, R15)
    a.label("send_look")
    a.ld(RAX, Mem(RDI, V["INDEX"]))
    a.cmp(RAX, register=RCX)
    a.jcc(ops.CC_Z, "send_found")
    a.ld(RDI, Mem(RDI, V["PEER"]))
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_NZ, "send_look")
    a.jmp(refused)
    a.label("send_found")
    a.call("send_to")
