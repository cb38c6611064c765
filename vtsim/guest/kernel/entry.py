"""How the kernel is entered and left: system calls, exceptions, interrupts, with and without KPTI.

Under KPTI user page tables hold only these programs and the entry area. Exceptions then arrive on the entry stack,
and the frame is copied to the task's own stack, as Linux does.

A kernel in 32-bit protected mode is called by SYSENTER, and has its words through a GS that never changes: with one CPU
they would be at fixed addresses.

SDM: "Fast System Calls in 64-Bit Mode"; "Exception- and Interrupt-Handler Procedures".
Not modelled: return-speculation mitigations; non-maskable interrupts; debug exceptions of user programs.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import NO_MEMORY, Assembler, Mem
from vtsim.ept import direct as d
from vtsim.guest.kernel import KernelOptions, path, ring3, views
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.dma_layout import DMA_VECTOR, PAGE_REQUEST_VECTOR
from vtsim.guest.kernel.lengths import length

INVALID_OPCODE = 6
USER_FLAGS = 0x202
OPERANDS_OF_4_BYTES = ops.MEM_DECODED | 1 << ops.MEM_OPERAND_SIZE


def to_kernel_tables(a: Assembler, kernel: KernelOptions, register: int) -> None:
    """Switch from the user root to the kernel root, whose translations are kept where PCIDs tag them."""
    if kernel.kpti:
        a.op(ops.MOV_FROM_CR, register, imm=3)
        a.and_(register, ~at.USER_HALF)
        if kernel.pcid:
            a.or_(register, at.NOFLUSH)
        a.op(ops.MOV_TO_CR, register, imm=3)


def choose_user_tables(a: Assembler, kernel: KernelOptions) -> None:
    """Decide what CR3 the way out loads, while registers are free; a pending flush is done by that load."""
    if kernel.kpti:
        a.ld(s.RAX, at.cpu_word(at.CURRENT))
        a.ld(s.RCX, Mem(s.RAX, at.T_USER_CR3))
        a.st(at.cpu_word(at.USER_CR3_NOW), s.RCX)
        if kernel.pcid:
            a.or_(s.RCX, at.NOFLUSH)
            a.st(Mem(s.RAX, at.T_USER_CR3), s.RCX)


def to_user_tables(a: Assembler, kernel: KernelOptions) -> None:
    """Load the user root; the stack pointer is the only free register."""
    if kernel.kpti:
        a.ld(s.RSP, at.cpu_word(at.USER_CR3_NOW))
        a.op(ops.MOV_TO_CR, s.RSP, imm=3)


def _take_syscall(a: Assembler, kernel: KernelOptions) -> None:
    """From what SYSCALL leaves in registers to a frame on the task's stack."""
    a.op(ops.SWAPGS)
    a.st(at.cpu_word(at.SCRATCH), s.RSP, "user stack pointer")
    to_kernel_tables(a, kernel, s.RSP)
    a.ld(s.RSP, at.cpu_word(at.STACK_TOP))
    a.sub(s.RSP, at.FRAME_BYTES)
    a.stm(Mem(s.RSP), at.SAVED)
    a.st(Mem(s.RSP, at.F_RIP), s.RCX)
    a.st(Mem(s.RSP, at.F_RFLAGS), s.R11)
    a.st(Mem(s.RSP, at.F_ERROR), s.RAX, "call number")
    a.st_value(Mem(s.RSP, at.F_CS), at.USER_CODE)
    a.st_value(Mem(s.RSP, at.F_SS), at.USER_DATA)
    a.ld(s.RCX, at.cpu_word(at.SCRATCH))
    a.st(Mem(s.RSP, at.F_RSP), s.RCX)


def _leave_by_sysret(a: Assembler, kernel: KernelOptions) -> None:
    """To the process that made the call."""
    choose_user_tables(a, kernel)
    a.ld(s.RAX, Mem(s.RSP, at.F_RSP))
    a.st(at.cpu_word(at.SCRATCH), s.RAX)
    a.ldm(Mem(s.RSP), at.SAVED)
    to_user_tables(a, kernel)
    a.ld(s.RSP, at.cpu_word(at.SCRATCH))
    a.op(ops.SWAPGS)
    a.op(ops.SYSRET)


def _take_sysenter(a: Assembler, kernel: KernelOptions) -> None:
    """The same from what SYSENTER leaves, and from RCX and R11, in which the process says what SYSEXIT wants."""
    a.ld(s.RSP, at.cpu_word(at.STACK_TOP))
    a.sub(s.RSP, kernel.frame_bytes)
    a.stm(Mem(s.RSP), at.SAVED)
    a.st(kernel.word(at.F_ERROR), s.RAX, "call number")
    a.st(kernel.word(at.F_RSP), s.RCX)
    a.st(kernel.word(at.F_RIP), s.R11)
    for word, value in ((at.F_CS, at.PROTECTED_CODE), (at.F_RFLAGS, USER_FLAGS), (at.F_SS, at.USER_DATA)):
        a.st_value(kernel.word(word), value)


def _leave_by_sysexit(a: Assembler, kernel: KernelOptions) -> None:
    """To the process that made the call. Interrupts are on behind SYSEXIT: STI holds them off so long."""
    a.ldm(Mem(s.RSP), at.SAVED)
    a.ld(s.RDX, kernel.word(at.F_RIP))
    a.ld(s.RCX, kernel.word(at.F_RSP))
    a.op(ops.STI)
    a.op(ops.SYSEXIT)


def _take_call(a: Assembler) -> None:
    """The same where the hypervisor has built the frame."""
    ring3.entered(a)
    a.push(s.RAX)
    a.push(value=0)
    a.sub(s.RSP, at.F_VECTOR)
    a.stm(Mem(s.RSP), at.SAVED)


@path("system call", entry=True)
def system_call(a: Assembler, kernel: KernelOptions) -> None:
    """System-call entry, dispatch through the call table, and exit by SYSRET."""
    a.activity = ops.SYSCALL_PATH
    a.label("syscall_entry")
    if kernel.ring3:
        _take_call(a)
    elif kernel.protected:
        _take_sysenter(a, kernel)
    else:
        _take_syscall(a, kernel)
    ring3.enable(a, kernel)
    a.work(length("syscall_enter"))
    a.cmp(s.RAX, kernel.calls)
    a.jcc(ops.CC_AE, "no_such_call")
    a.ld(s.R10, Mem(displacement=kernel.call_table, index=s.RAX, scale=8))
    a.op(ops.CALL_REG, s.R10)
    a.label("call_done")
    a.st(Mem(s.RSP, at.AT[s.RAX]), s.RAX, "result")
    a.label("syscall_exit")
    ring3.disable(a, kernel)
    a.ld(s.RAX, at.cpu_word(at.NEED_RESCHED))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, "syscall_reschedule")
    a.work(length("syscall_exit"))
    if kernel.ring3:
        a.ldm(Mem(s.RSP), at.SAVED)
        a.add(s.RSP, at.F_RIP)
        ring3.leave_by_hypercall(a, d.IN_SYSCALL, to_process=kernel.on_host)
    elif kernel.protected:
        _leave_by_sysexit(a, kernel)
    else:
        _leave_by_sysret(a, kernel)
    a.label("syscall_reschedule")
    a.test(s.RAX, at.SIGNAL_PENDING)
    a.jcc(ops.CC_NZ, "signal_to_caller")
    a.call("schedule")
    a.jmp("syscall_exit")
    a.label("no_such_call")
    a.mov(s.RAX, -38, "ENOSYS")
    a.jmp("call_done")


@path("interrupt entry", entry=True)
def interrupt_entry(a: Assembler, kernel: KernelOptions) -> None:
    """Entry stubs of all vectors but that of page faults, the way in, and the way out by IRET."""
    a.activity = ops.INTERRUPT_PATH
    vectors = [*range(at.PAGE_FAULT_VECTOR), *range(at.PAGE_FAULT_VECTOR + 1, 32), at.TIMER_VECTOR]
    vectors += [DMA_VECTOR + n for n in range(len(kernel.dma.ports))] if kernel.dma else []
    vectors += [PAGE_REQUEST_VECTOR] if kernel.dma and kernel.dma.askers else []
    vectors += [at.FILE_VECTOR] if kernel.file and kernel.file.queue else []
    for vector in vectors + [at.CALL_VECTOR, at.IPI_VECTOR] * kernel.several:
        a.label(f"vector_{vector}")
        if kernel.ring3:
            ring3.entered(a)
        elif (kernel.paravirtual or kernel.events) and vector == INVALID_OPCODE:
            _while_booting(a)
        _name_vector(a, kernel, vector)
        a.jmp("enter")
    if kernel.tries:
        a.label(f"vector_{at.NOTHING_VECTOR}")
        a.op(ops.IRET)
    a.label("vector_other")
    _name_vector(a, kernel, 255)
    a.label("enter")
    way_in(a, kernel, "entered")
    a.ld(s.RAX, kernel.word(at.F_VECTOR))
    a.cmp(s.RAX, 32)
    a.jcc(ops.CC_AE, "interrupt")
    views.look(a, kernel)
    a.jmp("kill")
    way_out(a, kernel, "leave")


@path("page-fault entry", entry=True)
def page_fault_entry(a: Assembler, kernel: KernelOptions) -> None:
    """The same for page faults, charged to them."""
    a.activity = ops.PAGE_FAULT_PATH
    a.label(f"vector_{at.PAGE_FAULT_VECTOR}")
    if kernel.ring3:
        ring3.entered(a)
    _name_vector(a, kernel, at.PAGE_FAULT_VECTOR)
    way_in(a, kernel, "fault_entered")
    a.jmp("page_fault")
    way_out(a, kernel, "fault_leave")


def _name_vector(a: Assembler, kernel: KernelOptions, vector: int) -> None:
    """Vector and error code on the stack, as far as the CPU has not pushed the latter."""
    known = vector in at.WITH_ERROR
    if kernel.protected:  # words of 4 bytes
        a.sub(s.RSP, 4 if known else 8)
        if not known:
            a.st_value(Mem(s.RSP, 4, size=4), 0)
        a.st_value(Mem(s.RSP, size=4), vector)
        return
    if not known:
        a.push(value=0)
    a.push(value=vector)


def way_in(a: Assembler, kernel: KernelOptions, entered: str) -> None:
    """Save the registers; from user mode also switch GS, the tables and the stack."""
    a.sub(s.RSP, kernel.word(at.F_VECTOR).displacement)
    a.stm(Mem(s.RSP), at.SAVED)
    if kernel.ring3 or kernel.protected:  # which keeps GS
        return
    a.ld(s.RAX, Mem(s.RSP, at.F_CS))
    a.test(s.RAX, 3)
    a.jcc(ops.CC_Z, entered)
    a.op(ops.SWAPGS)
    to_kernel_tables(a, kernel, s.RAX)
    if kernel.kpti:  # from the entry stack to the task's
        a.ld(s.RDI, at.cpu_word(at.STACK_TOP))
        a.sub(s.RDI, at.FRAME_BYTES)
        for half in (0, at.FRAME_BYTES // 2):
            a.ldm(Mem(s.RSP, half), at.CARRIERS)
            a.stm(Mem(s.RDI, half), at.CARRIERS)
        a.copy(s.RSP, s.RDI)
    a.label(entered)


def way_out(a: Assembler, kernel: KernelOptions, name: str) -> None:
    """Let another task run if one should; restore the registers, and return by IRET to whom it interrupted."""
    a.label(name)
    if kernel.several:  # who holds a lock or waits for one keeps the CPU
        a.ld(s.RAX, at.cpu_word(at.HELD))
        a.test(s.RAX, -1)
        a.jcc(ops.CC_NZ, f"{name}_stay")
    a.ld(s.RAX, at.cpu_word(at.NEED_RESCHED))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, f"{name}_reschedule")
    if kernel.several:
        a.label(f"{name}_stay")
    a.ld(s.RAX, kernel.word(at.F_CS))
    a.test(s.RAX, 3)
    a.jcc(ops.CC_Z, f"{name}_to_kernel")
    if kernel.ring3:
        a.ldm(Mem(s.RSP), at.SAVED)
        a.add(s.RSP, at.F_RIP)
        ring3.leave_by_hypercall(a, 0, to_process=kernel.on_host)
    else:
        _leave_by_iret(a, kernel)
    a.label(f"{name}_to_kernel")
    a.ldm(Mem(s.RSP), at.SAVED)
    a.add(s.RSP, kernel.word(at.F_RIP).displacement)
    if kernel.ring3:
        ring3.return_to_kernel(a, kernel, name)
    else:
        _return(a, kernel)
    a.label(f"{name}_reschedule")
    a.call("schedule")
    a.jmp(name)


def _leave_by_iret(a: Assembler, kernel: KernelOptions) -> None:
    """To the process that was interrupted."""
    choose_user_tables(a, kernel)
    if kernel.kpti:
        words = (s.RAX, s.RCX, s.RDX, s.RBX, s.RBP)
        a.ldm(Mem(s.RSP, at.F_RIP), words)
        a.stm(at.cpu_word(at.ENTRY_STACK - at.CPU_DATA - 8 * len(words)), words)
        a.ldm(Mem(s.RSP), at.SAVED)
        to_user_tables(a, kernel)
        if kernel.several:
            a.ld(s.RSP, at.cpu_word(at.ENTRY_TOP))
        else:
            a.mov(s.RSP, at.ENTRY_STACK - 8 * len(words))
    else:
        a.ldm(Mem(s.RSP), at.SAVED)
        a.add(s.RSP, kernel.word(at.F_RIP).displacement)
    if not kernel.protected:
        a.op(ops.SWAPGS)
    _return(a, kernel)


def _return(a: Assembler, kernel: KernelOptions) -> None:
    """IRETQ, or IRETD."""
    a.op(ops.IRET, mem=Mem(attributes=OPERANDS_OF_4_BYTES) if kernel.protected else NO_MEMORY)


def _while_booting(a: Assembler) -> None:
    """#UD of the kernel at boot: what asks for a hypervisor in ring 3 is undefined, so there is none."""
    a.push(s.RAX)
    a.ld(s.RAX, at.cpu_word(at.BOOTED))
    a.test(s.RAX, -1)
    a.pop(s.RAX)
    a.jcc(ops.CC_Z, "no_interface")
