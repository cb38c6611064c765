"""A page shared with a guest's kernel in VMX non-root operation: its clock, its timer by hypercall, events by upcalls.

The kernel reads the clock without an exit. An event is a bit of the page; the kernel is told by a vector of its choice,
which it need not acknowledge, as long as the page says that events wait.

SDM: "Event Injection"; "VMCALL—Call to VM Monitor".
Not modelled: new readings of the TSC in the shared page of a guest under VT-x (its TSC is the host's, less an offset).
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R12, RAX, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import direct as d
from vtsim.vmm.programs.words import count, saved, vcpu, work, zero
from vtsim.vmm.registry import Path

NS: Final = 1_000_000_000
TIMER_PORT: Final = 1
FIRST_VECTOR, LAST_VECTOR = 32, 255
REFUSED: Final = -1


def time_scales(clock_hz: int) -> tuple[int, int]:
    """ns of a cycle, and cycles of a ns, times 2**32: the first rounded down, so that the second reaches every ns."""
    scale = (NS << 32) // clock_hz
    return scale, -(-(1 << 64) // scale)


def to_tsc(a: Assembler, clock_hz: int) -> None:
    """RAX, a time of the shared page at RDI, becomes the TSC then; a time that has passed is now. Changes RCX, RDX."""
    a.ld(RDX, Mem(RDI, d.TIME_BASE))
    a.sub(RAX, register=RDX)
    a.jcc(ops.CC_NS, "time_ahead")
    zero(a, RAX)
    a.label("time_ahead")
    a.mov(RCX, time_scales(clock_hz)[1])
    a.hook(hooks.SCALE)
    a.add(RAX, 1)
    a.ld(RDX, Mem(RDI, d.TIME_STAMP))
    a.add(RAX, register=RDX)


def make_pending(a: Assembler, end: str) -> None:
    """The event of bit RSI is pending in the shared page at RDI; to `end` if it was. Changes RAX."""
    a.ld(RAX, Mem(RDI, d.EVENTS))
    a.test(RAX, register=RSI)
    a.jcc(ops.CC_NZ, end)
    a.or_(RAX, register=RSI)
    a.st(Mem(RDI, d.EVENTS), RAX)


def tell_of(a: Assembler, end: str) -> None:
    """Events wait, unless that of bit RSI is masked. Changes RAX."""
    a.ld(RAX, Mem(RDI, d.EVENTS_MASKED))
    a.test(RAX, register=RSI)
    a.jcc(ops.CC_NZ, end)
    a.st_value(Mem(RDI, d.UPCALL_PENDING), 1)


def unmask(a: Assembler, end: str) -> None:
    """The port of bit RSI makes upcalls from now on, at once if its event is pending. Changes RAX, RCX."""
    a.copy(RCX, RSI)
    a.emit(ops.XOR, RCX, imm=-1)
    a.ld(RAX, Mem(RDI, d.EVENTS_MASKED))
    a.and_(RAX, register=RCX)
    a.st(Mem(RDI, d.EVENTS_MASKED), RAX)
    a.ld(RAX, Mem(RDI, d.EVENTS))
    a.test(RAX, register=RSI)
    a.jcc(ops.CC_Z, end)
    a.st_value(Mem(RDI, d.UPCALL_PENDING), 1)


def bit_of(a: Assembler, port: Mem, refused: str) -> None:
    """RSI <- the bit of a port; to `refused` if there is no such port. Changes RCX."""
    a.ld(RCX, port)
    a.cmp(RCX, d.PORTS)
    a.jcc(ops.CC_AE, refused)
    a.mov(RSI, 1)
    a.emit(ops.SHL, RSI, RCX)


def send_or_unmask(a: Assembler, port: Mem, page: Mem, *, refused: str, then: str) -> None:
    """What RBX asks of a port: its event becomes pending, or is unmasked; falls through or goes to `then`."""
    bit_of(a, port, refused)
    a.cmp(RBX, d.SEND)
    a.jcc(ops.CC_NZ, "unmask_port")
    a.call("send_event")
    a.jmp(then)
    a.label("unmask_port")
    a.ld(RDI, page)
    unmask(a, then)


def hypercall(a: Assembler, path: Path) -> None:
    """VMCALL, whose number is in the guest's RAX: the shared page's calls; others are left to what follows."""
    if not path.vmm.pv.events:
        return
    a.ld(RAX, saved(RAX))
    for number, label in (
        (d.CALL_SET_CALLBACKS, "upcall_vector"), (d.CALL_SET_TIMER, "upcall_timer"), (d.CALL_EVENT, "upcall_port"),
    ):  # fmt: skip
        a.cmp(RAX, number)
        a.jcc(ops.CC_Z, label)


def subroutines(a: Assembler, path: Path) -> None:
    """What those calls do, and `send_event`: bit RSI of the vCPU in R15. Changes RAX, RDI."""
    if not path.vmm.pv.events:
        return
    a.activity = ops.DEVICE_EMULATION
    a.label("upcall_vector")
    a.ld(RAX, saved(RDI))
    a.cmp(RAX, FIRST_VECTOR)
    a.jcc(ops.CC_B, "upcall_refused")
    a.cmp(RAX, LAST_VECTOR)
    a.jcc(ops.CC_A, "upcall_refused")
    a.st(vcpu("EVENT_VECTOR"), RAX)
    a.label("upcall_done")
    zero(a, RAX)
    a.label("upcall_answer")
    a.st(saved(RAX), RAX)
    a.jmp("skip")
    a.label("upcall_refused")
    a.mov(RAX, REFUSED)
    a.jmp("upcall_answer")

    a.label("upcall_timer")
    work(a, path, "start_timer")
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.ld(RAX, saved(RDI))
    to_tsc(a, path.profile.clock_hz)
    a.ld(RCX, vcpu("TSC_OFFSET"))
    a.sub(RAX, register=RCX)
    a.st(vcpu("DEADLINE"), RAX)
    zero(a, RAX)
    a.st(vcpu("TIMER_PERIOD"), RAX)
    a.call("program_timer")
    a.jmp("upcall_done")

    a.label("upcall_port")
    a.ld(RBX, saved(RDI))
    a.test(RBX, register=RBX)
    a.jcc(ops.CC_NZ, "upcall_of_port")
    a.mov(RAX, 1 << TIMER_PORT)
    a.st(vcpu("TIMER_BIT"), RAX)
    a.mov(RAX, TIMER_PORT)
    a.jmp("upcall_answer")
    a.label("upcall_of_port")
    a.cmp(RBX, d.UNMASK)
    a.jcc(ops.CC_A, "upcall_refused")
    send_or_unmask(a, saved(RSI), vcpu("SHARED_PAGE"), refused="upcall_refused", then="upcall_look")
    a.label("upcall_look")
    a.st_value(vcpu("REQUEST"), 1, comment="events are evaluated before the next VM entry")
    a.jmp("upcall_done")

    a.label("send_event")
    a.ld(RDI, vcpu("SHARED_PAGE"))
    make_pending(a, "event_sent")
    count(a, "EVENTS_SENT")
    tell_of(a, "event_sent")
    a.label("event_sent")
    a.ret()


def expire(a: Assembler, path: Path) -> None:
    """The timer of the vCPU in R15 has expired: an event, where it is one; else its vector, by what follows."""
    if not path.vmm.pv.events:
        return
    a.ld(RSI, vcpu("TIMER_BIT"))
    a.test(RSI, register=RSI)
    a.jcc(ops.CC_Z, "no_timer_event")
    a.call("send_event")
    a.call("wake")
    a.jmp("expire_later")
    a.label("no_timer_event")


def look(a: Assembler, path: Path, waits: str, otherwise: str) -> None:
    """To `waits` if the guest is to be told of events by the vector in R12, else to `otherwise`. Changes RDI, RAX."""
    if not path.vmm.pv.events:
        return
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.ld(R12, vcpu("EVENT_VECTOR"))
    a.test(R12, register=R12)
    a.jcc(ops.CC_Z, otherwise)
    a.ld(RAX, Mem(RDI, d.UPCALL_PENDING))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, waits)
    a.label(otherwise)
