"""Which vCPU of a CPU runs: turns at the tick, blocking in HLT, the end of a VM, the boot of a CPU.

A thread gives up the CPU only on its way back into its guest, so that switching threads means switching vCPUs.

Not modelled: preemption of the device process; priorities and fairness of a real scheduler; migration between CPUs.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R12, R13, R14, R15, RAX, RBX, RCX, RDX, RSP
from vtsim.vmm import layout as at
from vtsim.vmm.programs import mitigations, posted, several, upcalls
from vtsim.vmm.programs.daemons import daemons
from vtsim.vmm.programs.msr_switch import leave_guest_msrs
from vtsim.vmm.programs.timer import MSR_LVT_TIMER
from vtsim.vmm.programs.words import cpu, vcpu, work, zero
from vtsim.vmm.registry import Path

FINISHED = 1 << 16  # code of DEATH: the guest's program came to its end


def schedule(a: Assembler, path: Path) -> None:
    """`schedule`: run the next vCPU that can; idle where none can; stop the CPU where none is left."""
    if path.remote:
        a.label("give_up_cpu")
        several.left_guest(a, path)
    a.label("schedule")
    a.activity = ops.SCHEDULING
    a.op(ops.CLI)
    work(a, path, "schedule")
    a.st_value(cpu("RESCHEDULE"), 0)
    a.ld(R12, cpu("SELF"))
    a.ld(R13, cpu("COUNT"))
    a.ld(RBX, cpu("TURN"))
    a.copy(RCX, R13)
    a.label("schedule_next")
    a.add(RBX, 1)
    a.cmp(RBX, register=R13)
    a.jcc(ops.CC_B, "schedule_look")
    zero(a, RBX)
    a.label("schedule_look")
    a.ld(R14, Mem(R12, at.C["LIST"], index=RBX, scale=8))
    a.ld(RAX, Mem(R14, at.V["STATE"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "schedule_found")
    a.loop("schedule_next")
    a.ld(RAX, cpu("ALIVE"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "all_ended")
    a.activity = ops.IDLE
    a.op(ops.STI)
    a.op(ops.HLT)
    a.jmp("schedule")
    a.activity = ops.SCHEDULING
    a.label("all_ended")
    a.emit(ops.STOP_OP, imm=0, comment="no VM of this CPU is left")
    a.jmp("schedule")

    a.label("schedule_found")
    a.st(cpu("TURN"), RBX)
    a.cmp(R14, register=R15)
    a.jcc(ops.CC_Z, "scheduled")
    work(a, path, "context_switch")
    leave_guest_msrs(a, path, "schedule")
    posted.suppress(a, path)
    if not path.keeps_cr2:
        a.emit(ops.MOV_FROM_CR, RAX, imm=2)
        a.st(vcpu("GUEST_CR2"), RAX)
    a.copy(R15, R14)
    a.copy(RSP, R14)
    a.st(cpu("CURRENT"), R15)
    a.ld(RAX, vcpu("HOST_ROOT"))
    a.emit(ops.MOV_TO_CR, RAX, imm=3)
    mitigations.switched_process(a, path)
    a.ld(R12, cpu("SELF"))
    if not path.vmm.mitigations.pti:
        a.st(Mem(R12, at.C["TSS"] + 4), R15, comment="stack for interrupts from user space")
    a.emit(ops.VMPTRLD, mem=vcpu("VMCS_POINTER"))
    mitigations.switched_vcpu(a, path)
    if not path.keeps_cr2:
        a.ld(RAX, vcpu("GUEST_CR2"))
        a.emit(ops.MOV_TO_CR, RAX, imm=2)
    posted.resume(a, path)
    a.label("scheduled")
    a.jmp("go_on")


def halt(a: Assembler, path: Path) -> None:
    """HLT: go on if an interrupt is there to be taken, else give up the CPU until there is one."""
    work(a, path, "halt")
    a.vmread(RAX, "EXIT_INSTRUCTION_LENGTH")
    a.vmread(RDX, "GUEST_RIP")
    a.add(RDX, register=RAX)
    a.vmwrite("GUEST_RIP", RDX)
    a.vmread(RAX, "GUEST_INTERRUPTIBILITY_STATE")
    a.and_(RAX, ~3)
    a.vmwrite("GUEST_INTERRUPTIBILITY_STATE", RAX)
    a.op(ops.CLI)
    if path.several and daemons(path):
        a.label("halt_again")
        several.left_guest(a, path)
        a.st_value(vcpu("WOKEN_BY"), 0)
    upcalls.look(a, path, "halt_event", "halt_no_upcall")
    a.call("pending_vector")
    a.test(R12, register=R12)
    a.jcc(ops.CC_S, "halt_block")
    a.cmp(R13, register=R14)
    a.jcc(ops.CC_BE, "halt_block")
    a.label("halt_event")
    a.vmread(RAX, "GUEST_RFLAGS")
    a.test(RAX, 1 << 9)
    a.jcc(ops.CC_Z, "halt_block")
    a.st_value(vcpu("REQUEST"), at.REQUEST_EVENTS)
    a.jmp("go_on")
    a.label("halt_block")
    posted.notify_here(a, path, at.KICK_VECTOR)
    a.st_value(vcpu("STATE"), at.HALTED)
    if path.remote:
        several.after_halting(a, path)
    else:
        a.jmp("schedule")


def die(a: Assembler, path: Path) -> None:
    """`die`: the VM is over (code in RAX, detail in RDX); others go on. `ended`: so it is, the platform says."""
    a.label("ended")
    a.activity = ops.SCHEDULING
    a.copy(R15, RSP)
    a.mov(RAX, FINISHED)
    zero(a, RDX)
    a.label("die")
    a.activity = ops.SCHEDULING
    a.op(ops.CLI)
    several.left_guest(a, path)
    a.st(vcpu("DEATH"), RAX)
    a.st(vcpu("DEATH_DETAIL"), RDX)
    several.end_others(a, path)
    a.st_value(vcpu("STATE"), at.ENDED)
    zero(a, RAX)
    a.st(vcpu("DEADLINE"), RAX)
    for daemon in daemons(path):
        a.st(vcpu(daemon.at), RAX)
    a.ld(RAX, cpu("ALIVE"))
    a.sub(RAX, 1)
    a.st(cpu("ALIVE"), RAX)
    a.jmp("schedule")


def boot(a: Assembler, path: Path) -> None:
    """`boot`: a CPU enters VMX operation, clears its VMCSs and runs its first vCPU.

    SDM: "Discovering Support for VMX"; "Enabling and Entering VMX Operation".
    """
    a.label("boot")
    a.activity = ops.BOOT
    a.emit(ops.LGDT, mem=cpu("GDTR"))
    a.emit(ops.LIDT, mem=cpu("IDTR"))
    a.ld(R12, cpu("SELF"))
    a.lea(RDX, Mem(R12, at.C["TSS"]))
    a.mov(RAX, at.TASK)
    a.emit(ops.LTR, RAX, RDX)
    a.mov(RCX, MSR_LVT_TIMER)
    deadline_mode = 2 << 17 if path.profile.features.tsc_deadline else 0
    a.mov(RAX, at.TIMER_VECTOR | deadline_mode)
    zero(a, RDX)
    a.op(ops.WRMSR)
    a.emit(ops.VMXON, mem=cpu("VMXON_REGION"))
    a.ld(RBX, cpu("COUNT"))
    a.copy(R13, R12)
    a.label("boot_clear")
    a.ld(R14, Mem(R13, at.C["LIST"]))
    a.emit(ops.VMCLEAR, mem=Mem(R14, at.V["VMCS_POINTER"]))
    a.add(R13, 8)
    a.sub(RBX, 1)
    a.jcc(ops.CC_NZ, "boot_clear")
    a.ld(R15, cpu("CURRENT"))
    a.copy(RSP, R15)
    a.emit(ops.VMPTRLD, mem=vcpu("VMCS_POINTER"))
    a.call("program_timer")
    a.jmp("go_on")
