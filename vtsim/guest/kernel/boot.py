"""The first instructions of the guest, and what the CPU does when there is nothing to do."""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept import direct as d
from vtsim.guest.kernel import KernelOptions, hypercalls, path, ring3, sensitive
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.lengths import length
from vtsim.guest.kernel.timer import read_clock

X2APIC_SPURIOUS, X2APIC_LVT_TIMER, X2APIC_DIVIDE = 0x80F, 0x832, 0x83E
ADDRESS_PORT, DATA_PORT, ENABLE, SLOTS, NOTHING = 0xCF8, 0xCFC, 1 << 31, 32, 0xFFFF_FFFF
PROBED_REGISTERS = (0x00, 0x08, 0x2C)  # vendor and device, class and revision, subsystem
PROCESSOR_LEAVES = (0, 1, 7, 0x80000000, 0x80000001, 0x80000002, 0x80000003, 0x80000004)
APIC_ENABLED, DEADLINE_MODE, DIVIDE_BY_ONE = 0x1FF, 2 << 17, 0xB


def write_msr(a: Assembler, msr: int, value: int) -> None:
    """WRMSR of a 32-bit constant."""
    a.mov(s.RCX, msr)
    a.mov(s.RAX, value)
    a.mov(s.RDX, 0)
    a.op(ops.WRMSR)


def probe_processor(a: Assembler) -> None:
    """What the processor calls itself: vendor, family and features, brand."""
    for leaf in PROCESSOR_LEAVES:
        a.mov(s.RAX, leaf)
        a.mov(s.RCX, 0)
        a.op(ops.CPUID)


def probe_bus(a: Assembler) -> None:
    """Every device of bus 0, by its configuration space: its identity, and its class and subsystem if there is one.

    PCI Local Bus Specification: "Configuration Mechanism #1".
    """
    a.mov(s.R12, ENABLE)
    a.label("probe_device")
    for register in PROBED_REGISTERS:
        a.copy(s.RAX, s.R12)
        a.or_(s.RAX, register)
        a.mov(s.RDX, ADDRESS_PORT)
        a.op(ops.OUT, r2=s.RDX, mem=Mem(size=4))
        a.mov(s.RDX, DATA_PORT)
        a.label(f"probe_{register:02x}")
        a.op(ops.IN, r2=s.RDX, mem=Mem(size=4))
        if register == 0:
            a.cmp(s.RAX, NOTHING)
            a.jcc(ops.CC_Z, "probe_next")
    a.label("probe_next")
    a.add(s.R12, 1 << 11)
    a.cmp(s.R12, ENABLE | SLOTS << 11)
    a.jcc(ops.CC_NZ, "probe_device")


@path("boot")
def boot(a: Assembler, kernel: KernelOptions) -> None:
    """Enable the timer, if the guest uses one, and become the idle task."""
    a.activity = ops.BOOT
    a.label("boot")
    if kernel.paravirtual or kernel.events:
        hypercalls.find_interface(a, kernel)
    a.work(length("boot"))
    if kernel.probe:
        probe_processor(a)
        probe_bus(a)
    sensitive.execute(a, kernel.sensitive, "boot")
    if kernel.events:
        ring3.begin(a, kernel)
        if kernel.timer:
            ring3.bind_timer(a, kernel)
        if kernel.several:
            ring3.bind_ipi(a, kernel)
    elif kernel.timer or kernel.several:
        write_msr(a, X2APIC_SPURIOUS, APIC_ENABLED)
    if kernel.timer and not kernel.events:
        write_msr(a, X2APIC_LVT_TIMER, at.TIMER_VECTOR | (DEADLINE_MODE if kernel.deadline else 0))
        if not kernel.deadline:
            write_msr(a, X2APIC_DIVIDE, DIVIDE_BY_ONE)
    if kernel.tick_cycles:
        read_clock(a, kernel, s.RAX)
        a.add(s.RAX, kernel.tick_cycles)
        a.st(at.cpu_word(at.NEXT_TICK), s.RAX)
        a.call("program_timer")
    a.jmp("idle")


@path("idle")
def idle(a: Assembler, kernel: KernelOptions) -> None:
    """Run whatever can run; else halt until an interrupt.

    Not modelled: stopping the tick while idle.
    """
    a.activity = ops.IDLE
    a.label("idle")
    ring3.disable(a, kernel)
    a.call("schedule")
    a.work(length("idle"))
    a.ld(s.RAX, at.cpu_word(at.NEED_RESCHED))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "idle")
    if kernel.ring3:
        a.mov(s.RDI, d.BLOCK)
        ring3.hypercall(a, kernel, d.CALL_SCHEDULE)
    else:
        a.op(ops.STI)
        a.op(ops.HLT)
    a.jmp("idle")
