"""A hosted monitor: what needs a device or time is done in the world of the host, by its kernel and a process of its.

Monitor and host each have all of the processor to themselves: tables, descriptor tables, task, control and debug
registers, MSRs. A world switch stores one set and loads the other, in a page that both map. In the host's world the
monitor's driver then raises the host's interrupt, or returns from the system call by which the process runs the VM.

Sugerman, Venkitachalam, Lim, "Virtualizing I/O Devices on VMware Workstation's Hosted Virtual Machine Monitor",
USENIX ATC 2001: "Hosted Virtual Machine Architecture", "The Challenges".
SDM: "Fast System Calls in 64-Bit Mode"; "64-Bit Mode Stack Frame".
Not modelled: ticks of the host itself; a guest's timer set by the host; floating-point state; other processes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import frozen

from vtsim.base import memory as mem
from vtsim.base.words import byte_offsets
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem, Program
from vtsim.cpu.codes import HOST_PROCESS
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R11, R12, R14, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept import spec as e
from vtsim.ept.tables import USER_PAGE
from vtsim.vmm import layout as host_at
from vtsim.vmm.host import Host
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.crossing import (
    ABOVE_STACK_POINTER,
    ALL,
    BELOW_STACK_POINTER,
    X2APIC_EOI,
    idle,
    wait_for_interrupt,
    write_msr,
)
from vtsim.vmm.monitor.layout import saved, vcpu
from vtsim.vmm.monitor.memory import count
from vtsim.vmm.monitor.virtual_cpus import PORTS
from vtsim.vmm.personalities.kvm.parameters import TABLES
from vtsim.vmm.programs.ports import DEVICE_WORDS, read_latch_or_window

# fmt: off
SWITCHED: Final = {0xC0000100: "FS_BASE", 0xC0000101: "GS_BASE", 0xC0000102: "KERNEL_GS_BASE", 0xC0000082: "LSTAR"}
SET: Final = byte_offsets((
    # word          words  meaning
    ("CR0",             1, "what the processor holds in a world"),
    ("CR3",             1, ""),
    ("CR4",             1, ""),
    ("DR7",             1, ""),
    ("RFLAGS",          1, ""),
    ("LDTR",            1, ""),
    ("TR",              1, "selector, base"),
    ("TR_BASE",         1, ""),
    ("GDTR",            2, "limit, base"),
    ("IDTR",            2, ""),
    *((name,            1, "MSRs") for name in SWITCHED.values()),
    ("REGISTERS",      16, "general registers where the world was left"),
))
MONITOR, HOST = 0, 512                  # where the sets of the two worlds stand in the page
TASK: Final = 1536                      # the host's TSS
BELIEVED, TICKED, USER_RSP, USER_RIP, RUN = range(1024, 1064, 8)  # words of the driver
STACK: Final = 4096                     # its stack ends with the page

# words of the page that the process shares with driver and monitor
WHAT, PORT, VALUE, COUNT = range(0, 32, 8)
INTERRUPT, IDLE, PORT_IN, PORT_OUT = range(4)   # what the monitor asks for
RUN_CALL, SELECT_CALL = range(2)        # system calls of the process
# fmt: on


@frozen(kw_only=True)
class World:
    """Frames of the page that both worlds map, of the page shared with the process, of the process's root."""

    page: int
    run: int
    root: int


def work(a: Assembler, name: str, lengths: str) -> None:
    """The compiled code of a function of the host, as long as that of its like under kvm."""
    a.work(TABLES[lengths][name].value, comment=name)


# --- the switch ------------------------------------------------------------------------------------------------------
def _switch(a: Assembler, save: int, load: int) -> None:
    """Store the set of one world and load the other's, from the page at R14; return to where that was left."""

    def word(base: int, name: str, n: int = 0) -> Mem:
        return Mem(R14, base + SET[name] + 8 * n)

    a.stm(word(save, "REGISTERS"), ALL)
    for number in (0, 3, 4):
        a.op(ops.MOV_FROM_CR, RAX, imm=number)
        a.st(word(save, f"CR{number}"), RAX)
    a.op(ops.MOV_FROM_DR, RAX, imm=7)
    a.st(word(save, "DR7"), RAX)
    a.op(ops.PUSHF)
    a.pop(RAX)
    a.st(word(save, "RFLAGS"), RAX)
    for op, name in ((ops.SLDT, "LDTR"), (ops.STR, "TR")):
        a.op(op, RAX)
        a.st(word(save, name), RAX)
    a.op(ops.SGDT, mem=word(save, "GDTR"))
    a.op(ops.SIDT, mem=word(save, "IDTR"))
    for index, name in SWITCHED.items():
        a.mov(RCX, index)
        a.op(ops.RDMSR)
        a.shl(RDX, 32)
        a.or_(RAX, register=RDX)
        a.st(word(save, name), RAX)
    for number in (3, 0, 4):
        a.ld(RAX, word(load, f"CR{number}"))
        a.op(ops.MOV_TO_CR, RAX, imm=number)
    a.op(ops.LGDT, mem=word(load, "GDTR"))
    a.op(ops.LIDT, mem=word(load, "IDTR"))
    a.ld(RAX, word(load, "LDTR"))
    a.op(ops.LLDT, RAX)
    a.ld(RAX, word(load, "TR"))
    a.ld(RDX, word(load, "TR_BASE"))
    a.emit(ops.LTR, RAX, RDX)
    a.ld(RAX, word(load, "DR7"))
    a.op(ops.MOV_TO_DR, RAX, imm=7)
    for index, name in SWITCHED.items():
        a.mov(RCX, index)
        a.ld(RAX, word(load, name))
        a.copy(RDX, RAX)
        a.shr(RDX, 32)
        a.op(ops.WRMSR)
    a.ld(RAX, word(load, "RFLAGS"))
    a.push(RAX)
    a.op(ops.POPF)
    a.copy(RSP, R14)
    a.ldm(Mem(RSP, load + SET["REGISTERS"]), BELOW_STACK_POINTER)
    a.ldm(Mem(RSP, load + SET["REGISTERS"] + 8 * (RSP + 1)), ABOVE_STACK_POINTER)
    a.ld(RSP, Mem(RSP, load + SET["REGISTERS"] + 8 * RSP))
    a.ret()


def worlds(a: Assembler) -> None:
    """`to_host`: do RAX there, with what the shared page says; changes R14 and RAX. `to_monitor`: the way back."""
    a.activity = ops.DEVICE_EMULATION
    a.label("to_host")
    a.ld(R14, vcpu("WORLD"))
    a.push(RBX)
    a.ld(RBX, Mem(R14, RUN))
    a.st(Mem(RBX, WHAT), RAX)
    a.pop(RBX)
    count(a, "WORLD_SWITCHES")
    a.label("switch_to_host")
    _switch(a, MONITOR, HOST)
    a.label("to_monitor")
    _switch(a, HOST, MONITOR)
    a.label("host_ticked")  # the guest's timer has expired while the host ran; changes RAX
    a.ld(R14, vcpu("WORLD"))
    a.ld(RAX, Mem(R14, TICKED))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "host_did_not_tick")
    a.st_value(Mem(R14, TICKED), 0)
    a.ld(RAX, vcpu("TIMER_LVT"))
    a.and_(RAX, 0xFF)
    a.st(vcpu("PENDING"), RAX)
    a.label("host_did_not_tick")
    a.ret()


def ask(a: Assembler, what: int) -> None:
    """Let the host do it. Changes RAX and R14."""
    a.mov(RAX, what)
    a.call("to_host")
    a.call("host_ticked")


# --- the host --------------------------------------------------------------------------------------------------------
def driver(a: Assembler, lengths: str) -> None:
    """`driver`: in the host's world, within the system call of the process. R14 is the page, R15 the vCPU."""
    a.activity = ops.DEVICE_EMULATION
    a.label("driver")
    a.ld(RDI, Mem(R14, RUN))
    a.ld(RAX, Mem(RDI, WHAT))
    a.cmp(RAX, INTERRUPT)
    a.jcc(ops.CC_NZ, "driver_returns")
    a.op(ops.INT, imm=at.TIMER_VECTOR)
    a.call("to_monitor")
    a.jmp("driver")
    a.label("driver_returns")
    work(a, "ioctl_return", lengths)
    a.ld(RCX, vcpu("KERNEL"))
    a.st(Mem(R14, BELIEVED), RCX)
    a.label("to_process")
    a.st_value(vcpu("KERNEL"), HOST_PROCESS)
    a.ld(RCX, Mem(R14, USER_RIP))
    a.mov(R11, at.RF_IF | 2)
    a.ld(RSP, Mem(R14, USER_RSP))
    a.op(ops.SYSRET)


def host_system_call(a: Assembler, cpu: int, page: int, address: int) -> None:
    """`host_call_N`: SYSCALL of the process of this CPU, whose page and vCPU are at these addresses."""
    a.activity = ops.DEVICE_EMULATION
    a.label(f"host_call_{cpu}")
    a.st(Mem(displacement=page + USER_RSP), RSP)
    a.mov(RSP, page + STACK)
    a.mov(R14, page)
    a.mov(R15, address)
    a.jmp("host_call")


def host_system_calls(a: Assembler, lengths: str) -> None:
    """The rest, the same on every CPU: run the VM, or wait; and `host_timer`, the host's interrupt."""
    a.label("host_call")
    a.st(Mem(R14, USER_RIP), RCX)
    a.cmp(RAX, SELECT_CALL)
    a.jcc(ops.CC_Z, "host_select")
    work(a, "ioctl_enter", lengths)
    a.ld(RCX, Mem(R14, BELIEVED))
    a.st(vcpu("KERNEL"), RCX)
    a.call("to_monitor")
    a.jmp("driver")
    a.label("host_select")
    a.activity = ops.IDLE
    work(a, "schedule", lengths)
    a.label("host_idle")
    a.ld(RAX, Mem(R14, TICKED))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "host_awake")
    idle(a)
    a.jmp("host_idle")
    a.label("host_awake")
    work(a, "wake_up", lengths)
    work(a, "context_switch", lengths)
    a.jmp("to_process")

    a.activity = ops.SCHEDULING
    a.label("host_timer")
    for register in (RAX, RCX, RDX):
        a.push(register)
    work(a, "interrupt_entry", lengths)
    a.st_value(Mem(R14, TICKED), 1)
    write_msr(a, X2APIC_EOI, 0)
    work(a, "expire_timer", lengths)
    work(a, "interrupt_exit", lengths)
    for register in (RDX, RCX, RAX):
        a.pop(register)
    a.op(ops.IRET)


def process(lengths: str) -> Program:
    """The process that runs the VM, and does for it what needs a device or time. R14 is the kernel's, and stays."""
    a = Assembler("device process", host_at.USER_TEXT)
    a.activity = ops.USER_DEVICE
    a.label("process")
    work(a, "user_dispatch", lengths)
    a.mov(R12, host_at.USER_RUN)
    a.ld(RBX, Mem(R12, WHAT))
    a.cmp(RBX, IDLE)
    a.jcc(ops.CC_NZ, "device")
    a.mov(RAX, SELECT_CALL)
    a.op(ops.SYSCALL)
    a.jmp("again")
    a.label("device")
    work(a, "user_device", lengths)
    a.ld(RSI, Mem(R12, PORT))
    _find(a)
    a.cmp(RBX, PORT_OUT)
    a.jcc(ops.CC_Z, "device_out")
    read_latch_or_window(a, "device", _find)
    a.st(Mem(R12, VALUE), RAX)
    a.jmp("again")
    a.label("device_out")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "again")
    a.ld(RCX, Mem(R12, VALUE))
    a.st(Mem(RAX, 16), RCX)
    a.label("again")
    work(a, "user_again", lengths)
    a.mov(RAX, RUN_CALL)
    a.op(ops.SYSCALL)
    a.jmp("process")
    return a.assemble()


def _find(a: Assembler) -> None:
    """RAX <- the entry of the process's table of ports for RSI, or 0."""
    a.mov(RDI, host_at.USER_DATA + PORTS)
    a.ld(RDX, Mem(R12, COUNT))
    a.mov(RCX, DEVICE_WORDS)
    a.hook(hooks.FIND)


# --- what the monitor asks for ------------------------------------------------------------------------------------
def interrupt(a: Assembler) -> None:
    """The physical timer's interrupt, which is the host's."""
    ask(a, INTERRUPT)


def halt(a: Assembler) -> None:
    """HLT: the host waits in the guest's place."""
    wait_for_interrupt(a, "skip", lambda a: ask(a, IDLE))


def port_in(a: Assembler) -> None:
    """IN: from a port device of the process. RDX is the width."""
    a.activity = ops.DEVICE_EMULATION
    a.copy(RBX, RDX)
    _about_port(a)
    ask(a, PORT_IN)
    a.ld(R14, vcpu("WORLD"))
    a.ld(RDI, Mem(R14, RUN))
    a.ld(RAX, Mem(RDI, VALUE))


def port_out(a: Assembler) -> None:
    """OUT: to a port device of the process."""
    a.activity = ops.DEVICE_EMULATION
    _about_port(a)
    a.ld(RCX, saved(RAX, 4))
    a.st(Mem(RDI, VALUE), RCX)
    ask(a, PORT_OUT)
    a.jmp("skip")


def _about_port(a: Assembler) -> None:
    """The port goes into the shared page, at RDI."""
    a.ld(R14, vcpu("WORLD"))
    a.ld(RDI, Mem(R14, RUN))
    a.ld(RSI, saved(RDX, 2))
    a.st(Mem(RDI, PORT), RSI)


# --- laying out -----------------------------------------------------------------------------------------------------
def reserve_world(host: Host, ports: int, lengths: str) -> World:
    """Take the frames of a world from the host's own memory; `ports` is the frame of the table of ports."""
    table, page, run, text = host.process(), host.reserve(), host.reserve(), host.reserve()
    for linear, frame in (
        (host_at.USER_RUN, run),
        (host_at.USER_DATA, ports),
        (host_at.USER_STACK - mem.PAGE_BYTES, host.reserve()),
    ):
        table.map(linear, [frame], USER_PAGE | e.PTE_NO_EXECUTE)
    table.map(host_at.USER_TEXT, [text], USER_PAGE & ~e.PTE_WRITE)
    host.engine.place(process(lengths), lambda page: text)
    return World(page=page, run=run, root=table.root)


def fill_world(host: Host, world: World, idt: int, labels: Mapping[str, int], cpu: int, vcpu: int, ports: int) -> None:
    """The host's set of registers, as if it had run the VM just now; `ports` are so many, `vcpu` is an address."""
    page, m = host.address(world.page), host.engine.cpus[cpu]
    host.store_words(page + STACK - 8, [labels["driver"]])
    host.store(page + TASK + 8, page + STACK)
    values = {
        "CR0": int(m[s.CR0]), "CR3": world.root << mem.PAGE_SHIFT, "CR4": int(m[s.CR4]), "DR7": int(m[s.DR7]),
        "RFLAGS": 2, "TR": host_at.TASK, "TR_BASE": page + TASK + 4, "LSTAR": labels[f"host_call_{cpu}"],
    }  # fmt: skip
    for name, value in values.items():
        host.store(page + HOST + SET[name], value)
    host.store(page + MONITOR + SET["TR_BASE"], int(m[s.TR_BASE]))  # which STR does not tell
    host.store_words(page + HOST + SET["IDTR"], [mem.PAGE_BYTES - 1, host.address(idt)])
    for register, value in ((RSP, page + STACK - 8), (R14, page), (R15, vcpu)):
        host.store(page + HOST + SET["REGISTERS"] + 8 * register, value)
    host.store(page + RUN, host.address(world.run))
    host.store(page + USER_RSP, host_at.USER_STACK)
    host.store(page + USER_RIP, host_at.USER_TEXT)
    host.store(host.address(world.run) + COUNT, ports)
