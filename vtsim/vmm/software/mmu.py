"""The software MMU: look-ups in a software TLB at every access, and walks of the guest's tables.

Registers that the program keeps throughout: RBX the guest's RIP, RBP what is added to it to reach its bytes, R11
look-ups and R14 instructions that are not counted in memory yet, R12 the page of RIP, R13 the TLB of the guest's ring,
R15 the virtual CPU. RDI is the entry of the instruction in progress. RAX, RCX, RDX and RSI are free; an access leaves
RDI and R8 to R10 alone.

SDM: "4-Level Paging and 5-Level Paging"; "Determination of Access Rights".
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import (
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R15,
    RAX,
    RCX,
    RDI,
    RDX,
    RSI,
    RSP,
)
from vtsim.ept import spec as e
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.crossing import PAGE_FAULT, die
from vtsim.vmm.monitor.layout import V, vcpu
from vtsim.vmm.monitor.memory import count
from vtsim.vmm.software import layout as w

READ, WRITE, FETCH = 0, e.PF_WRITE, e.PF_FETCH
TAGS: Final = {READ: w.T_READ, WRITE: w.T_WRITE, FETCH: w.T_FETCH}
NAMES: Final = {READ: "read", WRITE: "write", FETCH: "fetch"}
LARGE, ACCESSED, DIRTY = 1 << 7, 1 << 5, 1 << 6
CR0_WP, EFER_NX = 1 << 16, 1 << 11
LEVELS: Final = 4


def local(a: Assembler, name: str) -> str:
    """A label that nobody else has: it says where it was asked for."""
    return f"{name}_{a.here & 0xFFFFFF:x}"


def tlb_line(a: Assembler) -> None:
    """RCX <- entry of the TLB for the address in RSI."""
    a.copy(RCX, RSI)
    a.shr(RCX, 12)
    a.and_(RCX, w.TLB_ENTRIES - 1)
    a.shl(RCX, w.TLB_ENTRY_BYTES.bit_length() - 1)
    a.add(RCX, register=R13)


def look_up(a: Assembler, access: int, size: int = 8) -> None:
    """RDX <- what is added to the guest's address in RSI to reach it. Clobbers RAX and RCX. Faults go to the guest."""
    hit = local(a, "hit")
    tlb_line(a)
    a.lea(RAX, Mem(RSI, 4096 + size - 1))
    a.shr(RAX, 12)
    a.add(R11, 1)
    a.ld(RDX, Mem(RCX, TAGS[access]))
    a.cmp(RDX, register=RAX)
    a.jcc(ops.CC_Z, hit)
    a.call(f"miss_{NAMES[access]}")
    a.label(hit)
    a.ld(RDX, Mem(RCX, w.T_ADDEND))


def load(a: Assembler, size: int = 8) -> None:
    """RAX <- the guest's memory at RSI."""
    look_up(a, READ, size)
    a.ld(RAX, Mem(RSI, index=RDX, size=size))


def store(a: Assembler, register: int, size: int = 8) -> None:
    """The guest's memory at RSI <- a register other than RAX, RCX and RDX."""
    look_up(a, WRITE, size)
    a.st(Mem(RSI, index=RDX, size=size), register)


def subroutines(a: Assembler) -> None:
    """`load`, `store` (of R8), misses, `walk`, `flush`, `forget_page`, `use_ring`."""
    a.activity = ops.MEMORY_MANAGEMENT
    a.label("load")
    load(a)
    a.ret()
    a.label("store")
    store(a, R8)
    a.ret()
    for access, name in NAMES.items():
        a.label(f"miss_{name}")
        for register in (R8, R9, R10):
            a.push(register)
        a.mov(R8, access)
        a.call("walk")
        tlb_line(a)
        a.copy(RDX, RSI)
        a.and_(RDX, ~0xFFF)
        a.sub(RAX, register=RDX)
        a.ld(R9, Mem(RCX, w.T_ADDEND))
        a.cmp(R9, register=RAX)
        a.jcc(ops.CC_Z, f"same_{name}")
        for tag in TAGS.values():
            a.st_value(Mem(RCX, tag), 0)
        a.st(Mem(RCX, w.T_ADDEND), RAX)
        a.label(f"same_{name}")
        a.copy(RAX, RSI)
        a.shr(RAX, 12)
        a.add(RAX, 1)
        a.st(Mem(RCX, TAGS[access]), RAX)
        for register in (R10, R9, R8):
            a.pop(register)
        a.ret()
    _walk(a)
    _flush(a)
    a.label("use_ring")  # the TLB of the ring that the guest believes in; its code is looked up again
    a.ld(RAX, vcpu("KERNEL"))
    a.ld(R13, Mem(R15, V["SOFT_TLB"], index=RAX, scale=8))
    a.mov(R12, -1)
    a.ret()


def _walk(a: Assembler) -> None:
    """`walk`: RAX <- where the page of RSI stands, for an access R8; sets the flags of its entries.

    Clobbers RCX, RDX, R9 and R10. R10 gathers rights; NX is gathered in RCX.
    """
    a.label("walk")
    count(a, "MISSES")
    a.ld(RDX, vcpu("CR3"))
    a.mov(RAX, e.ADDRESS)
    a.and_(RDX, register=RAX)
    a.mov(R10, e.PTE_WRITE | e.PTE_USER)
    a.mov(RCX, 0)
    for level in range(LEVELS, 0, -1):
        a.copy(RAX, RSI)
        a.shr(RAX, 3 + 9 * level)
        a.and_(RAX, 511)
        a.mov(R9, at.RAM)
        a.add(R9, register=RDX)
        a.lea(R9, Mem(R9, index=RAX, scale=8))
        a.ld(RAX, Mem(R9))
        a.test(RAX, e.PTE_PRESENT)
        a.jcc(ops.CC_Z, "walk_absent")
        a.and_(R10, register=RAX)
        a.or_(RCX, register=RAX)
        a.copy(RDX, RAX)
        if level == 1:
            break
        if level <= 3:
            a.test(RAX, LARGE)
            a.jcc(ops.CC_NZ, f"walk_large_{level}")
        a.test(RAX, ACCESSED)
        a.jcc(ops.CC_NZ, f"walk_accessed_{level}")
        a.or_(RAX, ACCESSED)
        a.st(Mem(R9), RAX)
        a.label(f"walk_accessed_{level}")
        a.mov(RAX, e.ADDRESS)
        a.and_(RDX, register=RAX)
    a.call("walk_rights")
    a.mov(RAX, e.ADDRESS)
    a.and_(RDX, register=RAX)
    a.label("walk_memory")  # RDX is the page's guest-physical address: is it memory?
    count(a, "FILLS")
    a.ld(RAX, vcpu("LOW_END"))
    a.cmp(RDX, register=RAX)
    a.jcc(ops.CC_B, "walk_done")
    a.mov(RAX, 1 << 32)
    a.cmp(RDX, register=RAX)
    a.jcc(ops.CC_B, "walk_device")
    a.ld(RAX, vcpu("HIGH_END"))
    a.cmp(RDX, register=RAX)
    a.jcc(ops.CC_AE, "walk_device")
    a.label("walk_done")
    a.mov(RAX, at.RAM)
    a.add(RAX, register=RDX)
    a.ret()
    a.label("walk_device")
    die(a, at.NO_DEVICE)
    for level in (3, 2):
        a.label(f"walk_large_{level}")
        a.call("walk_rights")
        size = 1 << (3 + 9 * level)
        a.mov(RAX, e.ADDRESS & ~(size - 1))
        a.and_(RDX, register=RAX)
        a.copy(RAX, RSI)
        a.and_(RAX, size - 4096)
        a.or_(RDX, register=RAX)
        a.jmp("walk_memory")

    a.label("walk_rights")  # the entry at R9 is RDX; may the guest make the access?
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "walk_of_kernel")
    a.test(R10, e.PTE_USER)
    a.jcc(ops.CC_Z, "walk_refused")
    a.test(R8, e.PF_WRITE)
    a.jcc(ops.CC_Z, "walk_may_write")
    a.label("walk_writes")
    a.test(R10, e.PTE_WRITE)
    a.jcc(ops.CC_Z, "walk_refused")
    a.jmp("walk_may_write")
    a.label("walk_of_kernel")
    a.test(R8, e.PF_WRITE)
    a.jcc(ops.CC_Z, "walk_may_write")
    a.ld(RAX, vcpu("CR0"))
    a.test(RAX, CR0_WP)
    a.jcc(ops.CC_NZ, "walk_writes")
    a.label("walk_may_write")
    a.test(R8, e.PF_FETCH)
    a.jcc(ops.CC_Z, "walk_granted")
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_NS, "walk_granted")
    a.ld(RAX, vcpu("EFER"))
    a.test(RAX, EFER_NX)
    a.jcc(ops.CC_NZ, "walk_refused")
    a.label("walk_granted")
    a.copy(RAX, R8)
    a.and_(RAX, e.PF_WRITE)
    a.shl(RAX, DIRTY.bit_length() - e.PF_WRITE.bit_length())
    a.or_(RAX, ACCESSED)
    a.or_(RAX, register=RDX)
    a.cmp(RAX, register=RDX)
    a.jcc(ops.CC_Z, "walk_flagged")
    a.st(Mem(R9), RAX)
    a.label("walk_flagged")
    a.ret()

    a.label("walk_refused")
    a.or_(R8, e.PF_PRESENT)
    a.label("walk_absent")
    a.ld(RAX, vcpu("EFER"))  # without NX, fetches are not told apart
    a.test(RAX, EFER_NX)
    a.jcc(ops.CC_NZ, "walk_told")
    a.and_(R8, ~e.PF_FETCH)
    a.label("walk_told")
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "soft_fault")
    a.or_(R8, e.PF_USER)
    a.label("soft_fault")  # at RSI, with error code R8
    a.ld(RAX, vcpu("DELIVERING"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "soft_no_stack")
    a.st(vcpu("CR2"), RSI)
    count(a, "INJECTED_FAULTS")
    a.lea(RSP, Mem(R15, -64))
    a.st_value(vcpu("SCRATCH"), PAGE_FAULT)
    a.st(vcpu("SCRATCH", 1), R8)
    a.ld(RSI, vcpu("STREAM_AT"))
    a.test(RSI, register=RSI)
    a.jcc(ops.CC_Z, "inject_exception")
    a.call("stream_stand")
    a.jmp("inject_exception")
    a.label("soft_no_stack")
    die(a, at.NO_STACK)


def _flush(a: Assembler) -> None:
    """`flush`: both TLBs are emptied. `forget_page`: the translation of the page at RSI goes from both."""
    a.label("flush")
    count(a, "TLB_FLUSHES")
    for ring in range(2):
        a.ld(RDI, vcpu("SOFT_TLB", ring))
        for page in range(w.TLB_PAGES):
            if page:
                a.add(RDI, 4096)
            a.hook(hooks.PAGE_ZERO)
    a.mov(R12, -1)
    a.ret()
    a.label("forget_page")
    a.copy(R8, R13)
    for ring in range(2):
        a.ld(R13, vcpu("SOFT_TLB", ring))
        tlb_line(a)
        for tag in TAGS.values():
            a.st_value(Mem(RCX, tag), 0)
    a.copy(R13, R8)
    a.mov(R12, -1)
    a.ret()


def address(a: Assembler, *, indexed: bool) -> None:
    """RSI <- linear address of the memory operand of the entry at RDI. Clobbers RAX, RCX and RDX."""
    a.ld(RSI, w.entry("C"))
    a.ld(RAX, w.entry("BASE"))
    a.ld(RAX, Mem(R15, index=RAX))
    a.add(RSI, register=RAX)
    if indexed:
        a.ld(RCX, w.entry("INDEX"))
        a.ld(RCX, Mem(R15, index=RCX))
        a.ld(RDX, w.entry("B"))
        a.emit(ops.SHL, RCX, RDX)
        a.add(RSI, register=RCX)
