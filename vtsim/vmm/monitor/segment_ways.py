"""How the monitor reaches its guest when it emulates what names descriptors and segment registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels.modes import FS
from vtsim.cpu.slots import R8, R9, R10, R12, R13, R15, RAX, RBX, RCX, RDX, RSI
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor import segment_emulators, segments
from vtsim.vmm.monitor import virtual_state as state
from vtsim.vmm.monitor.layout import F_RFLAGS, F_RIP, V, vcpu

Emulator = Callable[[Assembler], None]


def load_table_entry(a: Assembler) -> None:
    """RAX <- a word of the guest's descriptor table at RSI, which a process may have read, too."""
    a.st_value(vcpu("EMULATING"), at.AS_SYSTEM)
    a.ld(RAX, Mem(RSI))
    a.st_value(vcpu("EMULATING"), 1)


def set_base(a: Assembler) -> None:
    """The processor's base of FS or GS (RCX) is the guest's <- RAX."""
    a.add(RCX, state.FS_BASE - FS)
    a.copy(RDX, RAX)
    a.shr(RDX, 32)
    a.op(ops.WRMSR)


def zero_flag(a: Assembler) -> None:
    """ZF <- R9."""
    a.ld(RAX, F_RFLAGS)
    a.and_(RAX, ~at.RF_ZF)
    a.shl(R9, 6)
    a.or_(RAX, register=R9)
    a.st(F_RFLAGS, RAX)


def go_on(a: Assembler) -> None:
    """The guest goes on at RAX."""
    a.st(F_RIP, RAX)
    a.jmp("emulated")


def refuse(a: Assembler) -> None:
    """Exception R9 with error code R10."""
    a.copy(R12, R9)
    a.copy(R13, R10)
    a.jmp("inject_exception")


WAYS: Final = segments.Ways(
    load=lambda a: a.ld(RAX, Mem(RSI)), store=lambda a: a.st(Mem(RSI), R8), table=load_table_entry, base=set_base,
    zero_flag=zero_flag, go=go_on, refuse=refuse, undefined="undefined",
)  # fmt: skip


def of_segments(how: int, emulator: segment_emulators.Emulator) -> Emulator:
    """An emulator of what names a descriptor or a segment register, with its operand where it expects it."""

    def emit(a: Assembler) -> None:
        if how == segment_emulators.BY_IMMEDIATE:
            a.copy(R8, RBX)
        elif how == segment_emulators.BY_MEMORY:
            a.call("operand")
            a.copy(RSI, RAX)
        else:
            register = R10 if how == segment_emulators.BY_R2 else RCX
            a.ld(R8, Mem(R15, V["REGISTERS"], index=register, scale=8))
        emulator(a, WAYS)

    return emit
