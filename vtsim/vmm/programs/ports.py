"""Port devices by table: which port, how it answers, what it holds.

SDM: "Exit Qualification for I/O Instructions".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R12, R13, R14, RAX, RBX, RCX, RDI, RDX, RSI
from vtsim.guest.file_system import DOORBELL
from vtsim.vmm.pci import ADDRESS_PORT, DATA_PORT, WINDOW_KEY, configuration
from vtsim.vmm.programs.timer import now
from vtsim.vmm.programs.words import saved, vcpu, work
from vtsim.vmm.registry import Path

LATCH, COUNTER, CONFIG, WINDOW = range(4)  # CONFIG: the host bridge of the kvm personality; WINDOW: see vmm.pci
DEVICE_WORDS: Final = 3  # port, kind, value
PM_TIMER_HZ: Final = 3_579_545
COUNTER_BITS: Final = 24

# fmt: off
KERNEL_PORTS: Final = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x41, 0x42, 0x43, 0x61)  # PIC, ELCR, PIT, speaker
DEVICES: Final = {  # of a VM, by the scenario's name: port and kind
    "pm-timer": ((0x608, COUNTER),),
    "i440fx":   ((0xCF8, LATCH), (0xCFC, CONFIG), (0xCFD, CONFIG), (0xCFE, CONFIG), (0xCFF, CONFIG)),
    "testdev":  ((0xE0, LATCH), (0xE4, LATCH), (0xE8, LATCH), (0xF1, LATCH), (0xF4, LATCH)),
}
FILE_SERVER: Final = "file server"
# device memory whose writes wake somebody, whatever is written
EVENTS: Final = {"testdev": (0xFEBF_0000,), FILE_SERVER: (DOORBELL,)}
# fmt: on


def port_entries(devices: Sequence[str]) -> list[tuple[int, int, int]]:
    """The table of a VM's devices: port or configuration address, kind, value."""
    rows = [(port, kind, 0) for name in devices for port, kind in DEVICES.get(name, ())]
    space = configuration(devices)
    if space:
        rows += [(ADDRESS_PORT, LATCH, 0), (DATA_PORT, WINDOW, 0)]
    return rows + [(WINDOW_KEY | at, LATCH, value) for at, value in space.items()]


def decode(a: Assembler) -> None:
    """R12 <- exit qualification, RBX <- bytes, RCX <- port."""
    a.vmread(R12, "EXIT_QUALIFICATION")
    a.copy(RBX, R12)
    a.and_(RBX, 7)
    a.add(RBX, 1)
    a.copy(RCX, R12)
    a.shr(RCX, 16)


def read_device(a: Assembler, path: Path, name: str, find: Callable[[Assembler], None]) -> None:
    """RAX <- what the device whose table entry is at RAX reads as; RCX RDX change, and what `find` changes.

    `find` writes: RAX <- the entry of the same table for RSI, or 0.
    """
    a.ld(RCX, Mem(RAX, 8))
    a.cmp(RCX, WINDOW)
    a.jcc(ops.CC_NZ, f"{name}_no_window")
    read_window(a, name, find)
    a.jmp(f"{name}_value")
    a.label(f"{name}_no_window")
    a.cmp(RCX, COUNTER)
    a.jcc(ops.CC_Z, f"{name}_counter")
    a.ld(RAX, Mem(RAX, 16))
    a.jmp(f"{name}_value")
    a.label(f"{name}_counter")
    now(a)
    multiply(a, PM_TIMER_HZ, path.profile.clock_hz)
    a.and_(RAX, (1 << COUNTER_BITS) - 1)
    a.label(f"{name}_value")


def read_latch_or_window(a: Assembler, name: str, find: Callable[[Assembler], None]) -> None:
    """The same of a table without counters, where RAX may be 0: a port that nobody gave the guest reads as ones."""
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, f"{name}_absent")
    a.ld(RCX, Mem(RAX, 8))
    a.cmp(RCX, WINDOW)
    a.jcc(ops.CC_Z, f"{name}_window")
    a.ld(RAX, Mem(RAX, 16))
    a.jmp(f"{name}_value")
    a.label(f"{name}_window")
    read_window(a, name, find)
    a.jmp(f"{name}_value")
    a.label(f"{name}_absent")
    a.mov(RAX, -1)
    a.label(f"{name}_value")


def read_window(a: Assembler, name: str, find: Callable[[Assembler], None]) -> None:
    """RAX <- the register of configuration space that the address port names, or ones."""
    a.mov(RSI, ADDRESS_PORT)
    find(a)
    a.ld(RSI, Mem(RAX, 16))
    a.mov(RDX, WINDOW_KEY)
    a.or_(RSI, register=RDX)
    find(a)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, f"{name}_register")
    a.mov(RAX, -1)
    a.jmp(f"{name}_value")
    a.label(f"{name}_register")
    a.ld(RAX, Mem(RAX, 16))


def multiply(a: Assembler, numerator: int, denominator: int) -> None:
    """RAX <- RAX * numerator / denominator, by shifts and additions; RCX RDX change."""
    shift = 24
    factor = round((numerator << shift) / denominator)
    a.copy(RDX, RAX)
    a.emit(ops.XOR, RAX, RAX)
    for bit in range(factor.bit_length()):
        if factor >> bit & 1:
            a.copy(RCX, RDX)
            a.shl(RCX, bit)
            a.add(RAX, register=RCX)
    a.shr(RAX, shift)


def merge(a: Assembler, name: str) -> None:
    """The guest's RAX <- the low RBX bytes of RAX, as an IN of that size does."""
    a.cmp(RBX, 2)
    a.jcc(ops.CC_B, f"{name}_byte")
    a.jcc(ops.CC_Z, f"{name}_word")
    a.and_(RAX, 0xFFFF_FFFF)
    a.st(saved(RAX), RAX)
    a.jmp(f"{name}_merged")
    a.label(f"{name}_byte")
    a.st(saved(RAX, 1), RAX)
    a.jmp(f"{name}_merged")
    a.label(f"{name}_word")
    a.st(saved(RAX, 2), RAX)
    a.label(f"{name}_merged")


def load_by_size(a: Assembler, register: int, operand: Mem, name: str) -> None:
    """`register` <- the low RBX bytes of a word in memory."""
    for size in (1, 2):
        a.cmp(RBX, size)
        a.jcc(ops.CC_NZ, f"{name}_not_{size}")
        a.ld(register, Mem(operand.base, operand.displacement, size=size, segment=operand.segment))
        a.jmp(f"{name}_loaded")
        a.label(f"{name}_not_{size}")
    a.ld(register, Mem(operand.base, operand.displacement, size=4, segment=operand.segment))
    a.label(f"{name}_loaded")


def in_hypervisor(a: Assembler, path: Path) -> None:
    """IN and OUT where all devices are in the hypervisor: answered from one table; an absent port reads as ones."""
    decode(a)
    a.label("port_decoded")
    find_port(a)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "port_absent")
    a.test(R12, 8)
    a.jcc(ops.CC_NZ, "port_in")
    load_by_size(a, RCX, saved(RAX), "port_out")
    a.st(Mem(RAX, 16), RCX)
    a.jmp("skip")
    a.label("port_in")
    read_device(a, path, "port", find_entry)
    a.label("port_answer")
    merge(a, "port")
    a.jmp("skip")
    a.label("port_absent")
    a.test(R12, 8)
    a.jcc(ops.CC_Z, "skip")
    a.mov(RAX, -1)
    a.jmp("port_answer")


def find_port(a: Assembler) -> None:
    """RAX <- entry of the hypervisor's port table for RCX, or 0; RDI RSI RDX RCX change."""
    a.copy(RSI, RCX)
    find_entry(a)


def find_entry(a: Assembler) -> None:
    """RAX <- entry of the hypervisor's port table for RSI, or 0; RDI RDX RCX change."""
    a.ld(RDI, vcpu("PORTS"))
    a.ld(RDX, vcpu("PORT_ENTRIES"))
    a.mov(RCX, DEVICE_WORDS)
    a.hook(hooks.FIND)


def wake_server(a: Assembler, path: Path) -> None:
    """A write to R13 is an event: wake the server of the VM's files, if it is its doorbell. Changes RDI."""
    if "server" not in path.addresses:
        return
    name = f"no_server_{a.here:x}"
    a.cmp(R13, DOORBELL)
    a.jcc(ops.CC_NZ, name)
    work(a, path, "wake_server")
    a.ld(RDI, vcpu("SERVER"))
    a.st(Mem(RDI), RDI, "on another processor")
    a.label(name)


def memory_in_hypervisor(a: Assembler, path: Path) -> None:
    """`memory_request`: device memory where all devices are in the hypervisor. R13 address, R12 write?, RAX value."""
    a.label("memory_request")
    a.copy(R14, RAX)
    wake_server(a, path)
    a.copy(RCX, R13)
    find_port(a)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "memory_absent")
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "memory_write")
    read_device(a, path, "memory", find_entry)
    a.jmp("load_completed")
    a.label("memory_write")
    a.st(Mem(RAX, 16), R14)
    a.jmp("skip_decoded")
    a.label("memory_absent")
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "skip_decoded")
    a.mov(RAX, -1)
    a.jmp("load_completed")
