"""Several vCPUs of one VM: the lock of its tables, requests to vCPUs that run on other CPUs, interrupts between them.

Whoever wants something of a vCPU on another CPU leaves word in its structure, counts one more request, and interrupts
its CPU where it may be in its guest. A vCPU looks at the count after it has said that it is in its guest, so that
either it sees the request or the other sees that it has to interrupt; each exit takes the word back. Who has changed
EPT drops translations here, asks the others, and waits until each has dropped them or is out of its guest, where it
will drop them before it enters again. So no frame is used for something else while a translation leads there.

Not modelled: delivery modes other than fixed, and logical destinations; one address space for the threads of the device
process (each has its own root, stack and shared page, with the same memory); paravirtual flushes of guests whose tables
are not direct.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R10, R12, R13, R15, RAX, RBX, RCX, RDI, RDX, RSI
from vtsim.vmcs import bits as b
from vtsim.vmm import layout as at
from vtsim.vmm.programs import posted
from vtsim.vmm.programs.posted import MSR_ICR
from vtsim.vmm.programs.words import count, cpu, set_bit, vcpu, work, zero
from vtsim.vmm.registry import Path

SHORTHAND: Final = 3 << 18
TO_ITSELF, TO_ALL = 1 << 18, 2 << 18
INDIVIDUAL, SINGLE = 0, 1  # types of INVVPID


def of_vm(a: Assembler, path: Path, register: int, field: str) -> None:
    """`register` <- linear address of a word that all vCPUs of the VM share."""
    if path.several:
        a.ld(register, vcpu("VM"))
        a.lea(register, Mem(register, at.V[field]))
    else:
        a.lea(register, vcpu(field))


def vm_word(a: Assembler, path: Path, field: str, register: int) -> Mem:
    """A word that all vCPUs of the VM share; where there are several, `register` changes and is part of the operand."""
    if not path.several:
        return vcpu(field)
    a.ld(register, vcpu("VM"))
    return Mem(register, at.V[field])


def lock(a: Assembler, ticket: Mem, serving: Mem, waits: str = "") -> None:
    """Take a ticket and wait for its turn, counting looks in vain in a word if one is named. Changes RAX and RCX."""
    name = f"lock_{a.here:x}"
    a.mov(RAX, 1)
    a.xadd(ticket, RAX)
    a.label(name)
    a.ld(RCX, serving)
    a.cmp(RCX, register=RAX)
    a.jcc(ops.CC_Z, f"{name}_ours")
    if waits:
        a.ld(RCX, vcpu(waits))
        a.add(RCX, 1)
        a.st(vcpu(waits), RCX)
    a.op(ops.PAUSE)
    a.jmp(name)
    a.label(f"{name}_ours")


def unlock(a: Assembler, serving: Mem, spare: int = RAX) -> None:
    """Let the next one have its turn. Changes `spare`."""
    a.ld(spare, serving)
    a.add(spare, 1)
    a.st(serving, spare)


def lock_tables(a: Assembler, path: Path, waits: str = "") -> None:
    """The VM's tables are ours, where it may have several vCPUs. Changes RAX, RCX and RDI."""
    if path.several:
        a.ld(RDI, vcpu("VM"))
        lock(a, Mem(RDI, at.V["TABLES_TICKET"]), Mem(RDI, at.V["TABLES_SERVING"]), waits)


def unlock_tables(a: Assembler, path: Path) -> None:
    """The VM's tables are free again. Changes RAX and RDI."""
    if path.several:
        a.ld(RDI, vcpu("VM"))
        unlock(a, Mem(RDI, at.V["TABLES_SERVING"]))


def unlocked(path: Path) -> str:
    """Where to go on after an EPT violation."""
    return "reenter_unlocked" if path.several else "reenter"


def because(a: Assembler, path: Path, cause: int) -> None:
    """Flushes that are asked of other vCPUs from now on are counted for a cause."""
    if path.several:
        a.st_value(vcpu("FLUSH_CAUSE"), cause)


def left_guest(a: Assembler, path: Path) -> None:
    """First thing after a VM exit, or on the way in where there is something to do; R15 the vCPU."""
    if path.remote:
        a.st_value(vcpu("IN_GUEST"), 0)


def before_entry(a: Assembler, path: Path) -> None:
    """Last thing before a VM entry, interrupts off: see to what others want of the vCPU. Changes RAX."""
    if path.remote:
        a.st_value(vcpu("IN_GUEST"), 1)
        a.ld(RAX, vcpu("ASKED"))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_NZ, "asked")
        posted.jump_if_posted(a, path, "asked")


def subroutines(a: Assembler, path: Path) -> None:
    """`asked`, `flush_others`, `kick`, `reenter_unlocked`."""
    a.activity = ops.REENTRY
    a.label("asked")
    a.st_value(vcpu("IN_GUEST"), 0)
    a.ld(RBX, vcpu("ASKED"))
    a.ld(RAX, vcpu("ASKED_END"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "asked_end")
    a.ld(RCX, vcpu("ASKED_FLUSH"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "asked_flushed")
    zero(a, RCX)
    a.st(vcpu("ASKED_FLUSH"), RCX)
    flush_as_asked(a, path)
    a.label("asked_flushed")
    if path.vmm.paging == "direct-pv":
        drop_page_as_asked(a, path)
    if path.several and path.vmm.on_shadow:
        a.call("root_as_asked")
    _log_as_asked(a, path)
    zero(a, RCX)
    a.st(vcpu("ASKED_EVENTS"), RCX)
    zero(a, RAX)
    a.sub(RAX, register=RBX)
    a.xadd(vcpu("ASKED"), RAX)
    posted.no_longer_outstanding(a, path)
    set_bit(a, vcpu("REQUEST"), at.REQUEST_EVENTS)
    a.jmp("reenter")
    a.label("asked_end")
    zero(a, RDX)
    a.jmp("die")

    a.activity = ops.MEMORY_MANAGEMENT
    ask_others(a, path, "flush_others", "ASKED_FLUSH")
    if path.vmm.paging == "direct-pv":
        ask_others(a, path, "flush_some", "ASKED_FLUSH", some=True)
        ask_others(a, path, "flush_page_of_some", "ASKED_PAGE", some=True)
    if path.vmm.dirty_log.method == "pml":
        ask_others(a, path, "log_others", "ASKED_LOG")

    a.label("kick")  # the CPU of the vCPU at RDI; changes RAX, RCX and RDX
    count(a, "KICKS")
    a.ld(RDX, Mem(RDI, at.V["CPU"]))
    a.mov(RAX, at.KICK_VECTOR)
    a.mov(RCX, MSR_ICR)
    a.op(ops.WRMSR)
    a.ret()

    a.label("reenter_unlocked")
    unlock_tables(a, path)
    a.jmp("reenter")


def ask_others(a: Assembler, path: Path, name: str, word: str, *, some: bool = False) -> None:
    """Subroutine: ask every other vCPU of the VM by a word, and wait until each has seen to it, or is out of its guest.

    Whoever is out of its guest sees to it before it enters. If only `some` are asked, R10 has a bit for each; what is
    asked by ASKED_PAGE is the address in R13.

    Changes RAX, RCX, RDX and RDI, with `some` RSI as well.
    """
    a.label(name)
    a.ld(RDI, vcpu("PEER"))
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_Z, f"{name}_alone")
    work(a, path, "ask_others")
    if word != "ASKED_LOG":
        a.ld(RCX, vcpu("FLUSH_CAUSE"))
        counted = Mem(R15, at.V["FLUSHES_FOR_FAULTS"], index=RCX, scale=8)
        a.ld(RAX, counted)
        a.add(RAX, 1)
        a.st(counted, RAX)
    a.label(f"{name}_ask")
    if some:
        a.ld(RCX, Mem(RDI, at.V["INDEX"]))
        a.mov(RSI, 1)
        a.emit(ops.SHL, RSI, RCX)
        a.test(RSI, register=R10)
        a.jcc(ops.CC_Z, f"{name}_next")
    if word == "ASKED_PAGE":
        _ask_page(a, name)
    else:
        a.st_value(Mem(RDI, at.V[word]), 1)
    a.mov(RAX, 1)
    a.xadd(Mem(RDI, at.V["ASKED"]), RAX)
    a.ld(RAX, Mem(RDI, at.V["IN_GUEST"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, f"{name}_next")
    kick_others(a)
    a.label(f"{name}_next")
    a.ld(RDI, Mem(RDI, at.V["PEER"]))
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_NZ, f"{name}_ask")
    a.ld(RDI, vcpu("PEER"))
    a.label(f"{name}_wait")
    a.ld(RAX, Mem(RDI, at.V["IN_GUEST"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, f"{name}_seen")
    a.ld(RAX, Mem(RDI, at.V[word]))
    if word == "ASKED_PAGE":
        a.ld(RCX, Mem(RDI, at.V["ASKED_FLUSH"]))
        a.or_(RAX, register=RCX)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, f"{name}_seen")
    count(a, "FLUSH_WAITS")
    a.op(ops.PAUSE)
    a.jmp(f"{name}_wait")
    a.label(f"{name}_seen")
    a.ld(RDI, Mem(RDI, at.V["PEER"]))
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_NZ, f"{name}_wait")
    a.label(f"{name}_alone")
    a.ret()


def _ask_page(a: Assembler, name: str) -> None:
    """Of the vCPU at RDI: drop the translations of the address in R13; all, if another address waits. Changes RAX."""
    a.ld(RAX, Mem(RDI, at.V["ASKED_PAGE"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, f"{name}_first")
    a.st_value(Mem(RDI, at.V["ASKED_FLUSH"]), 1)
    a.jmp(f"{name}_asked")
    a.label(f"{name}_first")
    a.copy(RAX, R13)
    a.or_(RAX, 1)
    a.st(Mem(RDI, at.V["ASKED_PAGE"]), RAX)
    a.label(f"{name}_asked")


def kick_others(a: Assembler) -> None:
    """The vCPU at RDI leaves its guest, to see what is asked of it. Changes RAX, RCX and RDX."""
    a.call("kick")


def flush_as_asked(a: Assembler, path: Path) -> None:
    """Drop what was cached of the VM's tables because another vCPU has changed them. Changes RAX and RCX."""
    count(a, "REMOTE_FLUSHES")
    if path.vmm.on_shadow:
        flush_on_shadow(a, path)
        if path.vmm.huge_pages == "never":  # the process may have a page where all had the one of zeroes
            a.emit(ops.MOV_FROM_CR, RAX, imm=3)
            a.emit(ops.MOV_TO_CR, RAX, imm=3)
    elif path.vmm.paging == "direct-pv":
        flush_vpid(a, path)
    else:
        flush_here(a, path)


def drop_page_as_asked(a: Assembler, path: Path) -> None:
    """Drop the translations of an address that a guest had this vCPU asked to drop. Changes RAX and RCX."""
    a.ld(RAX, vcpu("ASKED_PAGE"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "asked_no_page")
    a.st_value(vcpu("ASKED_PAGE"), 0)
    a.and_(RAX, ~1)
    a.st(vcpu("DESCRIPTOR", 1), RAX)
    count(a, "REMOTE_FLUSHES")
    drop_address(a, path)
    a.label("asked_no_page")


def drop_address(a: Assembler, path: Path) -> None:
    """Drop the translations of the guest's address in the descriptor, or all of its VPID. Changes RAX and RCX."""
    if path.vmm.vpid:  # without, VM entry does
        by_address = path.capabilities.supports("INVVPID_INDIVIDUAL_ADDRESS")
        a.mov(RCX, INDIVIDUAL if by_address else SINGLE)
        a.ld(RAX, vcpu("VPID"))
        a.st(vcpu("DESCRIPTOR"), RAX)
        a.emit(ops.INVVPID, RCX, mem=vcpu("DESCRIPTOR"))


def flush_on_shadow(a: Assembler, path: Path) -> None:
    """Drop what this CPU has cached of shadow tables, and with agile paging of EPT. Changes RAX and RCX."""
    flush_vpid(a, path)
    if path.vmm.paging == "agile":
        flush_here(a, path)


def flush_vpid(a: Assembler, path: Path) -> None:
    """Drop the translations of this vCPU; without VPIDs VM entry does. Changes RAX and RCX."""
    if path.vmm.vpid:
        a.mov(RCX, SINGLE)
        a.ld(RAX, vcpu("VPID"))
        a.st(vcpu("DESCRIPTOR"), RAX)
        a.emit(ops.INVVPID, RCX, mem=vcpu("DESCRIPTOR"))


def _log_as_asked(a: Assembler, path: Path) -> None:
    """Another vCPU wanted the log of this one, which is empty by now, or writes are logged from now on, or no more.

    Changes RAX and RCX.
    """
    if path.vmm.dirty_log.method != "pml":
        return
    a.ld(RCX, vcpu("ASKED_LOG"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "asked_logged")
    zero(a, RCX)
    a.st(vcpu("ASKED_LOG"), RCX)
    a.vmread(RAX, "SECONDARY_PROC_CONTROLS")
    a.and_(RAX, ~b.ENABLE_PML)
    a.ld(RCX, vm_word(a, path, "LOGGING", RCX))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "asked_no_log")
    a.or_(RAX, b.ENABLE_PML)
    a.label("asked_no_log")
    a.vmwrite("SECONDARY_PROC_CONTROLS", RAX)
    a.label("asked_logged")


def flush_here(a: Assembler, path: Path) -> None:
    """Drop what was cached of this VM's EPT on this CPU. Changes RAX.

    SDM: "Operations that Invalidate Cached Mappings".
    """
    a.ld(RAX, vcpu("EPT_TOP"))
    a.or_(RAX, path.vmm.ept.pointer_bits)
    a.st(vcpu("DESCRIPTOR"), RAX)
    a.mov(RAX, 1)
    a.emit(ops.INVEPT, RAX, mem=vcpu("DESCRIPTOR"))


def kicked(a: Assembler, path: Path) -> None:
    """Part of the host's interrupt handler: vCPUs of this CPU that have an event, or are to end, can run."""
    a.ld(R12, cpu("SELF"))
    a.ld(R13, cpu("COUNT"))
    a.label("kicked_next")
    a.ld(R15, Mem(R12, at.C["LIST"]))
    if path.vmm.swap.on:
        _look_again(a, "kicked_seen")
    _asked_to_run(a, path, "kicked_wake")
    a.jmp("kicked_seen")
    a.label("kicked_wake")
    a.call("wake")
    a.label("kicked_seen")
    a.add(R12, 8)
    a.sub(R13, 1)
    a.jcc(ops.CC_NZ, "kicked_next")


def _look_again(a: Assembler, seen: str) -> None:
    """Of the vCPU in R15: if it waits without a command to the disk and was told to look, or to end, it runs.

    On to `seen` if it waits, behind this if it does not. Changes RAX.
    """
    a.ld(RAX, vcpu("STATE"))
    a.cmp(RAX, at.WAITING)
    a.jcc(ops.CC_NZ, "kicked_no_wait")
    a.ld(RAX, vcpu("WAIT_FRAME"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, seen, comment="the disk will wake it")
    for word in ("SWAP_DUE", "ASKED_END"):
        a.ld(RAX, vcpu(word))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_NZ, "kicked_looks")
    a.jmp(seen)
    a.label("kicked_looks")
    a.st_value(vcpu("STATE"), at.RUNNABLE)
    a.st_value(cpu("RESCHEDULE"), 1)
    a.ld(RAX, cpu("CURRENT"))
    a.st_value(Mem(RAX, at.V["REQUEST"]), at.REQUEST_EVENTS)
    a.st_value(vcpu("REQUEST"), at.REQUEST_EVENTS)
    a.jmp(seen)
    a.label("kicked_no_wait")


def _asked_to_run(a: Assembler, path: Path, then: str) -> None:
    for word in ("ASKED_EVENTS", "ASKED_END"):
        a.ld(RAX, vcpu(word))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_NZ, then)
    posted.jump_if_posted(a, path, then)


def after_halting(a: Assembler, path: Path) -> None:
    """The vCPU has just said that it is halted: unless somebody had left word before he could see that."""
    _asked_to_run(a, path, "halt_over")
    a.jmp("schedule")
    a.label("halt_over")
    posted.notify_here(a, path, at.POSTED_VECTOR)
    a.st_value(vcpu("STATE"), at.RUNNABLE)
    a.jmp("go_on")


def command(a: Assembler, path: Path) -> None:
    """`apic_command`: the interrupt command in RAX goes to the vCPUs that it names; to this one by `apic_self`.

    SDM: "Interrupt Command Register (ICR)".
    """
    a.label("apic_command")
    a.copy(RBX, RAX)
    a.ld(RDI, vcpu("PEER"))
    a.jmp("command_look")
    a.label("command_next")
    a.copy(RAX, RBX)
    a.and_(RAX, SHORTHAND)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "command_one")
    a.cmp(RAX, TO_ITSELF)
    a.jcc(ops.CC_Z, "command_other")
    a.jmp("command_send")
    a.label("command_one")
    a.copy(RAX, RBX)
    a.shr(RAX, 32)
    a.ld(RCX, Mem(RDI, at.V["INDEX"]))
    a.cmp(RAX, register=RCX)
    a.jcc(ops.CC_NZ, "command_other")
    a.label("command_send")
    work(a, path, "send_interrupt")
    if path.vmm.apicv:
        posted.send(a, path)
    else:
        send(a)
    a.label("command_other")
    a.ld(RDI, Mem(RDI, at.V["PEER"]))
    a.label("command_look")
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_NZ, "command_next")
    a.copy(RAX, RBX)
    a.copy(RCX, RBX)
    a.and_(RCX, SHORTHAND)
    a.cmp(RCX, TO_ITSELF)
    a.jcc(ops.CC_Z, "apic_self")
    a.cmp(RCX, TO_ALL)
    a.jcc(ops.CC_Z, "apic_self")
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_NZ, "apic_written")
    a.shr(RAX, 32)
    a.ld(RCX, vcpu("INDEX"))
    a.cmp(RAX, register=RCX)
    a.copy(RAX, RBX)
    a.jcc(ops.CC_Z, "apic_self")
    a.jmp("apic_written")


def send(a: Assembler) -> None:
    """The vector in RBX is requested of the vCPU at RDI, which sees to it soon. Changes RAX, RCX, RDX and RSI."""
    a.push(RDI)
    a.copy(RSI, RBX)
    a.and_(RSI, 0xFF)
    a.lea(RDI, Mem(RDI, at.V["IRR"]))
    a.hook(hooks.SET_BIT)
    a.pop(RDI)
    a.st_value(Mem(RDI, at.V["ASKED_EVENTS"]), 1)
    a.mov(RAX, 1)
    a.xadd(Mem(RDI, at.V["ASKED"]), RAX)
    kick_if_needed(a, "command_sent")


def kick_if_needed(a: Assembler, name: str) -> None:
    """Interrupt the CPU of the vCPU at RDI if it is in its guest, halted or waits. Changes RAX, RCX and RDX."""
    a.ld(RAX, Mem(RDI, at.V["IN_GUEST"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, f"{name}_kick")
    a.ld(RAX, Mem(RDI, at.V["STATE"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, name)
    a.label(f"{name}_kick")
    a.call("kick")
    a.label(name)


def end_others(a: Assembler, path: Path) -> None:
    """The vCPU ends, DEATH says why: all vCPUs of its VM do. Changes RAX, RBX, RCX, RDX and RDI."""
    if not path.several:
        return
    a.ld(RDI, vcpu("PEER"))
    a.jmp("end_look")
    a.label("end_next")
    a.ld(RAX, Mem(RDI, at.V["DEATH"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "end_told")
    a.ld(RAX, vcpu("DEATH"))
    a.st(Mem(RDI, at.V["ASKED_END"]), RAX)
    a.mov(RAX, 1)
    a.xadd(Mem(RDI, at.V["ASKED"]), RAX)
    kick_if_needed(a, "end_told")
    a.ld(RDI, Mem(RDI, at.V["PEER"]))
    a.label("end_look")
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_NZ, "end_next")
