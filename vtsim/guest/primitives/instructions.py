"""Loops of one sensitive instruction each."""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept import direct
from vtsim.guest import spec
from vtsim.guest.kernel import hypercalls, layout, ring3
from vtsim.guest.kernel.sensitive import execute
from vtsim.guest.kernel.smp import X2APIC_ICR
from vtsim.guest.primitives import Stage, again, counted, counted_in_r12, lowering, registers


@lowering(spec.CpuidSpec)
def cpuid(a: Assembler, phase: spec.CpuidSpec, at: Stage) -> None:
    """CPUID, which takes and overwrites RAX and RCX."""
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    registers(a, {s.RAX: phase.leaf, s.RCX: phase.subleaf})
    a.op(ops.CPUID)
    again(a, label)


@lowering(spec.RdtscSpec)
def rdtsc(a: Assembler, phase: spec.RdtscSpec, at: Stage) -> None:
    """RDTSC."""
    label = counted(a, at, at.scaled(phase.iterations))
    a.op(ops.RDTSC)
    a.loop(label)


@lowering(spec.PauseSpec)
def pause(a: Assembler, phase: spec.PauseSpec, at: Stage) -> None:
    """PAUSE."""
    label = counted(a, at, at.scaled(phase.iterations))
    a.op(ops.PAUSE)
    a.loop(label)


@lowering(spec.RdmsrSpec, ring=0)
def rdmsr(a: Assembler, phase: spec.RdmsrSpec, at: Stage) -> None:
    """RDMSR, in ring 0."""
    a.mov(s.RCX, phase.msr)
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    a.op(ops.RDMSR)
    again(a, label)


@lowering(spec.WrmsrSpec, ring=0)
def wrmsr(a: Assembler, phase: spec.WrmsrSpec, at: Stage) -> None:
    """WRMSR, in ring 0."""
    registers(a, {s.RCX: phase.msr, s.RAX: phase.value & 0xFFFF_FFFF, s.RDX: phase.value >> 32})
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    a.op(ops.WRMSR)
    again(a, label)


@lowering(spec.VmcallSpec, ring=0)
def vmcall(a: Assembler, phase: spec.VmcallSpec, at: Stage) -> None:
    """VMCALL with its number in RAX, in ring 0; without a hypervisor #UD ends the process."""
    label = counted(a, at, at.scaled(phase.iterations))
    a.mov(s.RAX, phase.number)
    a.op(ops.VMCALL)
    a.loop(label)


@lowering(spec.SensitiveSpec, ring=0)
def sensitive(a: Assembler, phase: spec.SensitiveSpec, at: Stage) -> None:
    """Sensitive instructions, each once an iteration, in ring 0."""
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    execute(a, phase.instructions, at.label("try"))
    a.op(ops.STI)
    again(a, label)


@lowering(spec.SensitiveUserSpec)
def sensitive_user(a: Assembler, phase: spec.SensitiveUserSpec, at: Stage) -> None:
    """The same by the application, with operands that ring 3 may have."""
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    execute(a, phase.instructions, at.label("try"), user=True)
    again(a, label)


@lowering(spec.HltSpec, ring=0)
def hlt(a: Assembler, phase: spec.HltSpec, at: Stage) -> None:
    """HLT with interrupts on, in ring 0."""
    label = counted(a, at, at.scaled(phase.iterations))
    a.op(ops.HLT)
    a.loop(label)


@lowering(spec.IpiSpec, ring=0)
def ipi(a: Assembler, phase: spec.IpiSpec, at: Stage) -> None:
    """ICR written by the first thread, and loads until the other CPU has counted it, as in kvm-unit-tests.

    In ring 3 the hypervisor is asked instead.
    """
    a.ld(s.RBX, layout.cpu_word(layout.CURRENT))
    a.ld(s.R9, Mem(s.RBX, layout.T_ROUND))
    a.add(s.R9, 1)
    a.st(Mem(s.RBX, layout.T_ROUND), s.R9)
    a.ld(s.RDI, Mem(s.RBX, layout.T_SPACE))
    a.cmp(s.RDI, register=s.RBX)
    a.jcc(ops.CC_NZ, at.label("receive"))
    a.ld(s.RDI, Mem(s.RBX, layout.T_PEER))
    a.ld(s.RDI, Mem(s.RDI, layout.T_CPU))
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    a.ld(s.R9, Mem(s.RDI, layout.IPIS))
    if at.ring3:
        ring3.interrupt_cpu(a)
    else:
        registers(a, {s.RCX: X2APIC_ICR, s.RAX: layout.IPI_VECTOR})
        a.ld(s.RDX, Mem(s.RDI, layout.APIC_ID))
        a.op(ops.WRMSR)
    a.label(at.label("look"))
    a.ld(s.RAX, Mem(s.RDI, layout.IPIS))
    a.cmp(s.RAX, register=s.R9)
    a.jcc(ops.CC_Z, at.label("look"))
    again(a, label)
    a.ld(s.RAX, Mem(s.RBX, layout.T_SENT))
    a.add(s.RAX, 1)
    a.st(Mem(s.RBX, layout.T_SENT), s.RAX)
    a.jmp(at.label("done"))
    a.label(at.label("receive"))
    a.work(16)
    a.ld(s.RAX, Mem(s.RDI, layout.T_SENT))
    a.cmp(s.RAX, register=s.R9)
    a.jcc(ops.CC_B, at.label("receive"))
    a.label(at.label("done"))


@lowering(spec.PortInSpec, ring=0)
def port_in(a: Assembler, phase: spec.PortInSpec, at: Stage) -> None:
    """IN from the port in RDX, in ring 0."""
    a.mov(s.RDX, phase.port)
    label = counted(a, at, at.scaled(phase.iterations))
    a.op(ops.IN, r2=s.RDX, mem=Mem(size=phase.size))
    a.loop(label)


@lowering(spec.PortOutSpec, ring=0)
def port_out(a: Assembler, phase: spec.PortOutSpec, at: Stage) -> None:
    """OUT to the port in RDX, in ring 0."""
    registers(a, {s.RDX: phase.port, s.RAX: phase.value})
    label = counted(a, at, at.scaled(phase.iterations))
    a.op(ops.OUT, r2=s.RDX, mem=Mem(size=phase.size))
    a.loop(label)


@lowering(spec.MmioReadSpec, ring=0)
def mmio_read(a: Assembler, phase: spec.MmioReadSpec, at: Stage) -> None:
    """Load from a device register through the kernel's direct map, in ring 0."""
    a.mov(s.RSI, layout.DIRECT + phase.address)
    label = counted(a, at, at.scaled(phase.iterations))
    a.ld(s.RAX, Mem(s.RSI, size=phase.size))
    a.loop(label)


@lowering(spec.MmioWriteSpec, ring=0)
def mmio_write(a: Assembler, phase: spec.MmioWriteSpec, at: Stage) -> None:
    """Store to a device register through the kernel's direct map, in ring 0."""
    registers(a, {s.RSI: layout.DIRECT + phase.address, s.RAX: phase.value})
    label = counted(a, at, at.scaled(phase.iterations))
    a.st(Mem(s.RSI, size=phase.size), s.RAX)
    a.loop(label)


@lowering(spec.MovFromCr8Spec, ring=0)
def mov_from_cr8(a: Assembler, phase: spec.MovFromCr8Spec, at: Stage) -> None:
    """MOV from CR8, in ring 0."""
    label = counted(a, at, at.scaled(phase.iterations))
    a.op(ops.MOV_FROM_CR, s.RAX, imm=8)
    a.loop(label)


@lowering(spec.MovToCr8Spec, ring=0)
def mov_to_cr8(a: Assembler, phase: spec.MovToCr8Spec, at: Stage) -> None:
    """MOV to CR8, in ring 0; afterwards the priority is 0 again."""
    a.mov(s.RAX, phase.value)
    label = counted(a, at, at.scaled(phase.iterations))
    a.op(ops.MOV_TO_CR, s.RAX, imm=8)
    a.loop(label)
    if phase.value:
        a.mov(s.RAX, 0)
        a.op(ops.MOV_TO_CR, s.RAX, imm=8)


@lowering(spec.MovToCr3Spec, ring=0)
def mov_to_cr3(a: Assembler, phase: spec.MovToCr3Spec, at: Stage) -> None:
    """MOV to CR3 of the value that is there, in ring 0: flushes the translations of its PCID.

    A paravirtual kernel knows the value and requests the load, as Linux does under Xen (xen_write_cr3).
    """
    if at.paravirtual:
        label = counted_in_r12(a, at, at.scaled(phase.iterations))
        a.ld(s.RSI, layout.cpu_word(layout.CURRENT))
        a.ld(s.RSI, Mem(s.RSI, layout.T_CR3))
        hypercalls.request(a, direct.LOAD)
        a.call("pv_send")
        again(a, label)
        return
    a.op(ops.MOV_FROM_CR, s.RAX, imm=3)
    label = counted(a, at, at.scaled(phase.iterations))
    a.op(ops.MOV_TO_CR, s.RAX, imm=3)
    a.loop(label)
