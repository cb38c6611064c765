"""The monitor's memory programs: which shadow tables are loaded, page faults, stores to the guest's tables.

The hooks and the pool are those of shadow paging under VT-x (`vtsim.ept.shadow`). Guest memory is there before the
guest starts, and tables are never out of sync.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.kernels import shadow_hooks as h
from vtsim.cpu.kernels.shadow_pool import FLUSH, NO_ROOT
from vtsim.cpu.kernels.translator import ADAPT
from vtsim.cpu.slots import R8, R9, R10, R12, R13, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept import shadow as d
from vtsim.ept import spec as e
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.crossing import ABOVE_STACK_POINTER, ALL, BELOW_STACK_POINTER, PAGE_FAULT, die, from_ring_3, save
from vtsim.vmm.monitor.layout import AS_SYSTEM, F_RIP, V, vcpu
from vtsim.vmm.programs.shadow import store_decoded


def count(a: Assembler, field: str, word: int = 0) -> None:
    """One more, in a statistic of the monitor. Clobbers RAX."""
    a.ld(RAX, vcpu(field, word))
    a.add(RAX, 1)
    a.st(vcpu(field, word), RAX)


def hook(a: Assembler, number: int) -> None:
    """A hook on the pool of this VM."""
    a.ld(RDI, vcpu("POOL"))
    a.hook(number)


def view(a: Assembler, entries: tuple[int, ...], translates: bool) -> None:
    """`view`: load the address space of the ring that the guest believes in. `view_find`: search it in the pool.

    Both clobber RAX, RBX, RCX, RDX, RSI and RDI. `entries` are the top-level entries that lead to the monitor.
    """
    a.label("view")
    count(a, "SWITCHES")
    a.ld(RCX, vcpu("KERNEL"))
    a.shl(RCX, 5)
    a.add(RCX, register=R15)
    base = V["VIEWS"]
    a.ld(RSI, Mem(RCX, base + 8))
    a.test(RSI, register=RSI)
    a.jcc(ops.CC_Z, "view_find")
    a.ld(RAX, Mem(RSI, d.RECORD["KEY"]))
    a.ld(RDX, Mem(RCX, base + 16))
    a.cmp(RAX, register=RDX)
    a.jcc(ops.CC_NZ, "view_find")
    a.ld(RAX, Mem(RSI, d.RECORD["STATE"]))
    a.test(RAX, d.IN_USE)
    a.jcc(ops.CC_Z, "view_find")
    a.ld(RDI, vcpu("POOL"))
    a.ld(RAX, Mem(RCX, base + 24))
    a.st(Mem(RDI, d.POOL["ROOT"]), RAX)
    _mode(a)
    a.st(Mem(RDI, d.POOL["MODE"]), RBX)
    a.ld(RAX, Mem(RCX, base))
    a.op(ops.MOV_TO_CR, RAX, imm=3)
    a.ret()

    a.label("view_find")
    a.ld(RSI, vcpu("CR3"))
    _mode(a)
    hook(a, h.SHADOW_LOAD_ROOT)
    a.ld(RCX, vcpu("KERNEL"))
    a.shl(RCX, 5)
    a.add(RCX, register=R15)
    a.st(Mem(RCX, base), RAX)
    a.mov(RDX, at.DIRECT)
    a.add(RDX, register=RAX)
    a.ld(RSI, vcpu("TOP"))
    for index in entries:
        a.ld(RBX, Mem(RSI, 8 * index))
        a.st(Mem(RDX, 8 * index), RBX)
    if translates:  # what translations reach is not for processes
        a.ld(RBX, vcpu("KERNEL"))
        a.test(RBX, register=RBX)
        a.jcc(ops.CC_Z, "view_made")
        a.ld(RBX, Mem(RSI, 8 * at.FIRST_ENTRY))
        a.st(Mem(RDX, 8 * at.FIRST_ENTRY), RBX)
        a.label("view_made")
    a.ld(RDX, Mem(RDI, d.POOL["ROOT"]))
    a.st(Mem(RCX, base + 24), RDX)
    a.sub(RDX, 1)
    a.shl(RDX, d.RECORD_BYTES.bit_length() - 1)
    a.ld(RBX, Mem(RDI, d.POOL["RECORDS"]))
    a.add(RDX, register=RBX)
    a.st(Mem(RCX, base + 8), RDX)
    a.ld(RBX, Mem(RDX, d.RECORD["KEY"]))
    a.st(Mem(RCX, base + 16), RBX)
    a.op(ops.MOV_TO_CR, RAX, imm=3)
    a.ret()


def _mode(a: Assembler) -> None:
    """RBX <- paging mode of the address space to load. Clobbers RDX."""
    a.ld(RBX, vcpu("MODE"))
    a.ld(RDX, vcpu("KERNEL"))
    a.shl(RDX, d.MODE_KERNEL.bit_length() - 1)
    a.or_(RBX, register=RDX)


def forget_views(a: Assembler) -> None:
    """The guest's CR3 or paging mode changed: both address spaces are searched anew."""
    for word in (1, 1 + at.VIEW_WORDS):
        a.st_value(vcpu("VIEWS", word), 0)


def settle(a: Assembler) -> None:
    """`settle`: do what a hook left in RDX. Clobbers as `view`."""
    a.label("settle")
    a.test(RDX, NO_ROOT)
    a.jcc(ops.CC_NZ, "view_find")
    a.test(RDX, FLUSH)
    a.jcc(ops.CC_Z, "settled")
    a.label("flush")
    a.op(ops.MOV_FROM_CR, RAX, imm=3)
    a.op(ops.MOV_TO_CR, RAX, imm=3)
    a.label("settled")
    a.ret()


def fill(a: Assembler) -> None:
    """`fill`: the shadow entry for an access at RSI with error code RDX. Clobbers everything.

    RAX <- 0 done, 1 the guest's own fault (RDX its error code), 2 a store to a table. R13 <- guest-physical address.
    """
    a.label("fill")
    a.copy(RAX, RSI)
    a.shr(RAX, 39)
    a.and_(RAX, 511)
    a.mov(R12, 0)
    a.cmp(RAX, at.FIRST_ENTRY)
    a.jcc(ops.CC_B, "fill_walk")
    a.cmp(RAX, at.LAST_ENTRY)
    a.jcc(ops.CC_A, "fill_walk")
    a.mov(R12, 1)
    a.label("fill_walk")
    hook(a, h.SHADOW_WALK)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "settled")
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "fill_in_monitor")
    a.copy(R13, RCX)
    a.mov(R8, at.DIRECT)
    a.ld(RDI, vcpu("TOP"))
    a.sub(RDI, register=R8)
    a.mov(RSI, at.RAM)
    a.add(RSI, register=RCX)
    a.mov(R10, e.PTE_PRESENT)
    a.hook(hooks.TABLE_LOOKUP)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "fill_no_memory")
    a.copy(RBX, RAX)
    a.copy(RCX, RDX)
    a.mov(R10, 0)
    hook(a, h.SHADOW_MAP)
    a.copy(R12, RAX)
    a.call("settle")
    a.copy(RAX, R12)
    a.shl(RAX, 1)
    a.ret()
    a.label("fill_no_memory")
    die(a, at.NO_DEVICE)
    a.label("fill_in_monitor")
    die(a, at.IN_MONITOR)


def page_fault(a: Assembler, translates: bool) -> None:
    """`trap_14`: a page fault of the guest, or of the monitor on its guest's memory."""
    a.activity = ops.EXIT_DISPATCH
    a.label(f"trap_{PAGE_FAULT}")
    from_ring_3(a, 16, "nested_fault")
    save(a, 48)
    a.activity = ops.MEMORY_MANAGEMENT
    if translates:
        a.ld(RAX, F_RIP)
        a.st(vcpu("TRAPPED_AT"), RAX)
        a.call("original")
    a.op(ops.MOV_FROM_CR, RSI, imm=2)
    a.ld(RDX, at.F_ERROR)
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "fault_fill")
    a.and_(RDX, ~e.PF_USER)
    a.label("fault_fill")
    a.copy(R9, RSI)
    a.st(vcpu("SCRATCH"), RSI)
    a.call("fill")
    a.cmp(RAX, 1)
    a.jcc(ops.CC_B, "resume")
    a.jcc(ops.CC_NZ, "table_write")
    a.ld(RSI, vcpu("SCRATCH"))
    a.st(vcpu("CR2"), RSI)
    count(a, "INJECTED_FAULTS")
    a.mov(R12, PAGE_FAULT)
    a.copy(R13, RDX)
    a.jmp("inject_exception")

    a.label("nested_fault")
    a.activity = ops.MEMORY_MANAGEMENT
    a.sub(RSP, 128)
    a.stm(Mem(RSP), ALL)
    a.op(ops.MOV_FROM_CR, RSI, imm=2)
    a.ld(RDX, Mem(RSP, 128))
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "nested_fill")
    a.ld(RAX, vcpu("EMULATING"))
    a.cmp(RAX, AS_SYSTEM)
    a.jcc(ops.CC_Z, "nested_fill")
    a.or_(RDX, e.PF_USER)
    a.label("nested_fill")
    a.call("fill")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "operand_fault")
    a.ldm(Mem(RSP), BELOW_STACK_POINTER)
    a.ldm(Mem(RSP, 8 * (RSP + 1)), ABOVE_STACK_POINTER)
    a.add(RSP, 128 + 8)
    a.op(ops.IRET)
    a.label("operand_fault")  # of an instruction that is emulated: it faults
    a.cmp(RAX, 1)
    a.jcc(ops.CC_NZ, "no_stack")
    a.ld(RAX, vcpu("EMULATING"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "no_stack")
    a.op(ops.MOV_FROM_CR, RSI, imm=2)
    a.st(vcpu("CR2"), RSI)
    count(a, "INJECTED_FAULTS")
    a.mov(R12, PAGE_FAULT)
    a.copy(R13, RDX)
    a.lea(RSP, Mem(R15, -64))
    a.jmp("inject_exception")
    a.label("no_stack")
    die(a, at.NO_STACK)


def table_write(a: Assembler, translates: bool) -> None:
    """`table_write`: a store to a table of the guest, at R13, is emulated; any other instruction ends the table.

    In translations, a store that faults for the second time is called out from then on: `table_store`.
    """
    a.activity = ops.MEMORY_MANAGEMENT
    a.label("table_write")
    a.ld(RSI, F_RIP)
    a.copy(RDI, RSI)
    a.hook(hooks.DECODE)
    a.cmp(RAX, ops.ST)
    a.jcc(ops.CC_NZ, "no_table")
    a.st(vcpu("LENGTH"), R9)
    if translates:
        a.test(R9, register=R9)
        a.jcc(ops.CC_Z, "table_known")
        a.ld(RAX, vcpu("TRAPPED_AT"))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_Z, "table_known")
        a.copy(R8, RSI)
        a.shr(R8, 2)
        a.and_(R8, at.WROTE_SLOTS - 1)
        a.ld(RDI, Mem(R15, V["WROTE_AT"], index=R8, scale=8))
        a.st(Mem(R15, V["WROTE_AT"], index=R8, scale=8), RSI)
        a.cmp(RSI, register=RDI)
        a.jcc(ops.CC_NZ, "table_known")
        a.copy(R12, RBX)
        a.copy(RBX, RSI)
        a.copy(RSI, RAX)
        a.ld(RDI, vcpu("TRANSLATOR"))
        a.hook(ADAPT)
        a.copy(RBX, R12)
        a.label("table_known")
    store_decoded(a, V["REGISTERS"], at.RAM)
    a.copy(RCX, RDX)
    a.copy(RSI, R13)
    hook(a, h.SHADOW_WRITE)
    a.call("settle")
    a.ld(RAX, vcpu("LENGTH"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "check")  # one of the stores of a hook, which goes on by itself
    a.jmp("skip")
    if translates:
        a.label("table_store")  # where a translation was adapted: the address is walked, and nothing has faulted
        a.activity = ops.MEMORY_MANAGEMENT
        a.call("operand")
        a.copy(RSI, RAX)
        a.mov(RDX, e.PF_WRITE)
        hook(a, h.SHADOW_WALK)
        a.copy(R13, RCX)
        a.st_value(vcpu("TRAPPED_AT"), 0)
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_Z, "table_write")
        a.st(vcpu("CR2"), RSI)
        count(a, "INJECTED_FAULTS")
        a.mov(R12, PAGE_FAULT)
        a.copy(R13, RDX)
        a.jmp("inject_exception")
    a.label("no_table")
    a.copy(RSI, R13)
    hook(a, h.SHADOW_UNPROTECT)
    a.call("settle")
    a.jmp("resume")
