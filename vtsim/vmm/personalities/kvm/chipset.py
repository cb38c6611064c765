"""The host bridge in the device process: writes to its PAM registers change the VM's memory slots.

A changed slot is deleted and made again, and deleting any slot makes KVM drop the whole EPT hierarchy.

Not modelled: reads of configuration space; other devices on the bus.
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
    R12,
    R13,
    R14,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RSI,
)
from vtsim.ept.memory_slots import SLOT, SLOT_BYTES, SLOT_PRIVATE, SLOT_READ_ONLY
from vtsim.vmm import board
from vtsim.vmm import layout as at
from vtsim.vmm.programs import shadow
from vtsim.vmm.programs.words import vcpu, work, zero
from vtsim.vmm.registry import Path

# fmt: off
ADDRESS_PORT: Final = 0xCF8
MEMORY_IOCTL: Final = 0x46            # KVM_SET_USER_MEMORY_REGION
# the process's data page
CONFIG, SEGMENT_COUNT, SEGMENTS = 2048, 2312, 2320   # registers and two constants; how many; first, end, register, high
OLD_COUNT, OLD, NEW = 2864, 2872, 3448               # slots that the hypervisor has; those that are wanted
SEGMENT_BYTES, SLOT_LIMIT = 32, 18
# fmt: on


def process(a: Assembler, path: Path) -> None:
    """`user_config`: a write to port RSI of the configuration window; R12 run page, R13 data page."""
    a.label("user_config")
    a.copy(R14, RSI)
    a.mov(RSI, ADDRESS_PORT)
    a.call("user_find")
    a.ld(RBX, Mem(RAX, 16))
    a.test(RBX, 0x7FFF_FF00, comment="bus 0, device 0, function 0?")
    a.jcc(ops.CC_NZ, "user_done")
    a.and_(RBX, 0xFC)
    a.and_(R14, 3)
    a.add(RBX, register=R14)
    a.ld(RAX, Mem(R12, at.RUN["VALUE"]))
    a.ld(RCX, Mem(R12, at.RUN["SIZE"]))
    a.label("config_byte")
    a.st(Mem(R13, CONFIG, index=RBX, size=1), RAX)
    a.shr(RAX, 8)
    a.add(RBX, 1)
    a.loop("config_byte")
    a.cmp(RBX, board.FIRST_PAM)
    a.jcc(ops.CC_BE, "user_done")
    _flatten(a)
    _compare(a)
    work(a, path, "user_again")
    a.mov(RAX, MEMORY_IOCTL)
    a.op(ops.SYSCALL)
    a.mov(R12, at.USER_RUN)
    a.mov(R13, at.USER_DATA)
    a.jmp("user_done")


def _flatten(a: Assembler) -> None:
    """R9 <- end of the list at NEW: what every segment shows now, neighbours of one kind merged."""
    a.lea(R8, Mem(R13, SEGMENTS))
    a.lea(R9, Mem(R13, NEW))
    a.ld(R10, Mem(R13, SEGMENT_COUNT))
    a.label("next_segment")
    a.ld(RCX, Mem(R8, 16))
    a.ld(RAX, Mem(R13, CONFIG, index=RCX, size=1))
    a.ld(RCX, Mem(R8, 24))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "segment_low")
    a.shr(RAX, 4)
    a.label("segment_low")
    a.and_(RAX, 3)
    a.mov(RBP, at.USER_RAM)
    a.test(RAX, 1)
    a.jcc(ops.CC_NZ, "segment_backed")
    a.mov(RBP, board.FIRMWARE)
    a.label("segment_backed")
    zero(a, RDX)
    a.cmp(RAX, board.ALWAYS_RAM_VALUE)
    a.jcc(ops.CC_Z, "segment_flags")
    a.mov(RDX, SLOT_READ_ONLY)
    a.label("segment_flags")
    a.ld(RSI, Mem(R8))
    a.lea(RAX, Mem(R13, NEW))
    a.cmp(RAX, register=R9)
    a.jcc(ops.CC_Z, "segment_new")
    for value, offset in ((RSI, SLOT["END"]), (RBP, SLOT["USER"]), (RDX, SLOT["FLAGS"])):
        a.ld(RAX, Mem(R9, offset - SLOT_BYTES))
        a.cmp(RAX, register=value)
        a.jcc(ops.CC_NZ, "segment_new")
    a.jmp("segment_end")
    a.label("segment_new")
    a.st(Mem(R9, SLOT["FIRST"]), RSI)
    a.st(Mem(R9, SLOT["USER"]), RBP)
    a.st(Mem(R9, SLOT["FLAGS"]), RDX)
    a.add(R9, SLOT_BYTES)
    a.label("segment_end")
    a.ld(RAX, Mem(R8, 8))
    a.st(Mem(R9, SLOT["END"] - SLOT_BYTES), RAX)
    a.add(R8, SEGMENT_BYTES)
    a.sub(R10, 1)
    a.jcc(ops.CC_NZ, "next_segment")


def _compare(a: Assembler) -> None:
    """The list at NEW becomes the one at OLD; `user_done` if they are the same."""
    a.lea(RAX, Mem(R13, NEW))
    a.sub(R9, register=RAX)
    a.shr(R9, 3)
    a.ld(RBX, Mem(R13, OLD_COUNT))
    a.shl(RBX, 2)
    a.sub(RBX, register=R9)
    a.copy(RCX, R9)
    a.label("compare_word")
    a.ld(RAX, Mem(R13, NEW - 8, index=RCX, scale=8))
    a.ld(RDX, Mem(R13, OLD - 8, index=RCX, scale=8))
    a.st(Mem(R13, OLD - 8, index=RCX, scale=8), RAX)
    a.emit(ops.XOR, RAX, RDX)
    a.or_(RBX, register=RAX)
    a.loop("compare_word")
    a.shr(R9, 2)
    a.st(Mem(R13, OLD_COUNT), R9)
    a.test(RBX, register=RBX)
    a.jcc(ops.CC_Z, "user_done")


def kernel_side(a: Assembler, path: Path) -> None:
    """`set_memory`: the process's ioctl: take over its list of slots, drop all that is mapped; falls through."""
    a.label("set_memory")
    a.activity = ops.MEMORY_MANAGEMENT
    work(a, path, "set_memory")
    a.mov(RSI, at.USER_DATA)
    a.ld(RCX, Mem(RSI, OLD_COUNT))
    a.ld(RDI, vcpu("SLOTS"))
    a.copy(RAX, RCX)
    a.add(RAX, 1, comment="the local APIC's page")
    a.st(vcpu("SLOT_ENTRIES"), RAX)
    a.shl(RCX, 2)
    a.copy(RDX, RCX)
    a.label("take_slots")
    a.ld(RAX, Mem(RSI, OLD - 8, index=RCX, scale=8))
    a.st(Mem(RDI, -8, index=RCX, scale=8), RAX)
    a.loop("take_slots")
    a.lea(RDI, Mem(RDI, 0, index=RDX, scale=8))
    for name, value in APIC_SLOT.items():
        a.mov(RAX, value)
        a.st(Mem(RDI, SLOT[name]), RAX)
    if path.vmm.on_shadow:
        shadow.zap_everything(a)
    elif path.vmm.paging == "ept":
        a.ld(RDI, vcpu("EPT_ROOT"))
        a.mov(RAX, at.HOST_DIRECT)
        a.add(RDI, register=RAX)
        a.hook(hooks.PAGE_ZERO)
        a.ld(RAX, vcpu("EPT_FIRST"))
        a.st(vcpu("EPT_ALLOCATOR"), RAX, comment="its tables are free again")
        a.call("flush_ept")


APIC_SLOT: Final = {
    "FIRST": board.LOCAL_APIC, "END": board.LOCAL_APIC + 4096, "USER": 0, "FLAGS": SLOT_PRIVATE,
}  # fmt: skip
