"""How a software CPU reaches its guest when it emulates what names descriptors and segment registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels.modes import FS
from vtsim.cpu.slots import R8, R9, R10, R14, R15, RAX, RBX, RCX
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor import segment_emulators, segments
from vtsim.vmm.monitor.layout import V, vcpu
from vtsim.vmm.software import layout as w
from vtsim.vmm.software.mmu import address, local

Emulator = Callable[[Assembler], None]


def load_table_entry(a: Assembler) -> None:
    """RAX <- a word of the guest's descriptor table at RSI, read as the processor reads it. R10 changes, too."""
    name = local(a, "table_of_kernel")
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, name)
    a.st_value(vcpu("KERNEL"), 1)
    a.call("use_ring")
    a.call("load")
    a.copy(R10, RAX)
    a.st_value(vcpu("KERNEL"), 0)
    a.call("use_ring")
    a.copy(RAX, R10)
    a.jmp(f"{name}_read")
    a.label(name)
    a.call("load")
    a.label(f"{name}_read")


def set_base(a: Assembler) -> None:
    """The base of FS or GS (RCX) <- RAX."""
    a.st(Mem(R15, V["FS_BASE"] - 8 * FS, index=RCX, scale=8), RAX)


def zero_flag(a: Assembler) -> None:
    """ZF <- R9."""
    a.call("flags")
    a.and_(RAX, ~at.RF_ZF)
    a.shl(R9, 6)
    a.or_(RAX, register=R9)
    a.call("take_flags")


def go_on(a: Assembler) -> None:
    """The guest goes on at RAX."""
    a.copy(RBX, RAX)
    a.add(R14, 1)
    a.jmp("next")


def refuse(a: Assembler) -> None:
    """Exception R9 with error code R10."""
    a.st(vcpu("SCRATCH"), R9)
    a.st(vcpu("SCRATCH", 1), R10)
    a.jmp("inject_exception")


WAYS: Final = segments.Ways(
    load=lambda a: a.call("load"), store=lambda a: a.call("store"), table=load_table_entry, base=set_base,
    zero_flag=zero_flag, go=go_on, refuse=refuse, undefined="undefined",
)  # fmt: skip


def of_segments(how: int, emulator: segment_emulators.Emulator) -> Emulator:
    """An emulator of what names a descriptor or a segment register, with its operand where it expects it."""

    def emit(a: Assembler) -> None:
        a.ld(RCX, w.entry("A"))
        if how == segment_emulators.BY_IMMEDIATE:
            a.ld(R8, w.entry("C"))
        elif how == segment_emulators.BY_MEMORY:
            address(a, indexed=False)
        else:
            a.ld(RAX, w.entry("B" if how == segment_emulators.BY_R2 else "A"))
            a.ld(R8, Mem(R15, V["REGISTERS"], index=RAX, scale=8))
        emulator(a, WAYS)

    return emit
