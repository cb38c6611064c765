"""Port I/O: in-kernel devices, the coalesced ring, and everything else by user space.

SDM: "Exit Qualification for I/O Instructions".
Not modelled: data of string I/O, and its limit of a page an exit; events of ports; port devices with side effects
beyond what their registers hold.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R12, R13, RAX, RBX, RCX, RDI, RDX
from vtsim.vmm import layout as at
from vtsim.vmm.programs import mmio
from vtsim.vmm.programs.ports import decode, find_entry, find_port, load_by_size, merge, read_device, wake_server
from vtsim.vmm.programs.words import saved, vcpu, work
from vtsim.vmm.registry import Path

IN, STRING = 8, 16
COALESCED_PORTS: Final = ((0xCF8, 4), (0x70, 1))  # port and size of writes that can wait
RING_ENTRIES: Final = 32


def port(a: Assembler, path: Path) -> None:
    """IN and OUT: R12 exit qualification, RBX bytes, R13 port."""
    work(a, path, "port")
    decode(a)
    if not path.parameters["fast_pio_in"]:
        _emulate_in(a, path)
    a.label("port_decoded")
    a.copy(R13, RCX)
    a.test(R12, STRING)
    a.jcc(ops.CC_NZ, "string_port")
    find_port(a)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "user_port")
    a.activity = ops.DEVICE_EMULATION
    work(a, path, "in_kernel_device")
    a.test(R12, IN)
    a.jcc(ops.CC_NZ, "kernel_port_in")
    load_by_size(a, RCX, saved(RAX), "kernel_port_out")
    a.st(Mem(RAX, 16), RCX)
    a.jmp("skip")
    a.label("kernel_port_in")
    read_device(a, path, "kernel_port", find_entry)
    a.label("port_completed")
    merge(a, "kernel_port")
    a.jmp("skip")

    a.label("user_port")
    a.ld(RDI, vcpu("RUN_PAGE"))
    a.test(R12, IN)
    a.jcc(ops.CC_NZ, "user_port_in")
    load_by_size(a, RCX, saved(RAX), "user_port_out")
    for number, size in COALESCED_PORTS:
        a.cmp(R13, number)
        a.jcc(ops.CC_NZ, f"not_coalesced_{number:x}")
        a.cmp(RBX, size)
        a.jcc(ops.CC_Z, "coalesce")
        a.label(f"not_coalesced_{number:x}")
    a.label("no_coalescing")
    a.st(Mem(RDI, at.RUN["VALUE"]), RCX)
    a.st_value(Mem(RDI, at.RUN["WRITE"]), 1)
    a.st_value(vcpu("COMPLETION"), at.COMPLETE_NOTHING)
    a.jmp("user_port_request")
    a.label("user_port_in")
    a.st_value(Mem(RDI, at.RUN["WRITE"]), 0)
    a.st_value(vcpu("COMPLETION"), at.COMPLETE_PORT)
    a.label("user_port_request")
    a.st_value(Mem(RDI, at.RUN["REASON"]), at.REQUEST_PORT)
    a.st(Mem(RDI, at.RUN["ADDRESS"]), R13)
    a.st(Mem(RDI, at.RUN["SIZE"]), RBX)
    a.jmp("to_user")

    a.label("coalesce")
    a.ld(RDX, Mem(RDI, at.RUN["COALESCED"]))
    a.cmp(RDX, RING_ENTRIES)
    a.jcc(ops.CC_AE, "no_coalescing")
    work(a, path, "coalesced")
    a.copy(RAX, RDX)
    a.add(RDX, 1)
    a.st(Mem(RDI, at.RUN["COALESCED"]), RDX)
    a.shl(RAX, 4)
    a.add(RDI, register=RAX)
    a.st(Mem(RDI, at.RUN["RING"]), R13)
    a.st(Mem(RDI, at.RUN["RING"] + 8), RCX)
    a.jmp("skip")

    a.label("string_port")
    a.ld(RAX, saved(RCX))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "skip")
    work(a, path, "string_port")
    a.st_value(saved(RCX), 0)
    a.ld(RDI, vcpu("RUN_PAGE"))
    a.copy(RAX, R12)
    a.and_(RAX, IN)
    a.emit(ops.XOR, RAX, imm=IN)
    a.st(Mem(RDI, at.RUN["WRITE"]), RAX)
    a.st_value(vcpu("COMPLETION"), at.COMPLETE_STRING)
    a.jmp("user_port_request")


def _emulate_in(a: Assembler, path: Path) -> None:
    """Before Linux 4.17 the emulator executes an IN, whose bytes it reads; R12 RBX RCX stay."""
    a.copy(RAX, R12)
    a.and_(RAX, IN | STRING)
    a.cmp(RAX, IN)
    a.jcc(ops.CC_NZ, "port_known")
    work(a, path, "emulate_in")
    a.push(RBX)
    a.push(RCX)
    mmio.keep_pages(a, path)
    a.call("fetch_instruction")
    mmio.release_pages(a, path)
    a.pop(RCX)
    a.pop(RBX)
    a.label("port_known")


def memory(a: Assembler, path: Path) -> None:
    """`memory_request`: device memory that only user space knows. R13 address, R12 write?, RAX value."""
    a.label("memory_request")
    a.copy(RBX, RAX)
    a.test(R12, register=R12)
    a.jcc(ops.CC_Z, "memory_of_user")
    mmio.find_event(a, "memory_of_user")
    work(a, path, "in_kernel_device")
    work(a, path, "eventfd")
    wake_server(a, path)
    a.jmp("skip_decoded")
    a.label("memory_of_user")
    a.copy(RAX, RBX)
    a.ld(RDI, vcpu("RUN_PAGE"))
    a.st(Mem(RDI, at.RUN["VALUE"]), RAX)
    a.st(Mem(RDI, at.RUN["WRITE"]), R12)
    a.st(Mem(RDI, at.RUN["ADDRESS"]), R13)
    a.ld(RAX, vcpu("DECODED", 1))
    a.st(Mem(RDI, at.RUN["SIZE"]), RAX)
    a.st_value(Mem(RDI, at.RUN["REASON"]), at.REQUEST_MEMORY)
    a.st_value(vcpu("COMPLETION"), at.COMPLETE_LOAD)
    a.test(R12, register=R12)
    a.jcc(ops.CC_Z, "to_user")
    a.st_value(vcpu("COMPLETION"), at.COMPLETE_STORE)
    a.jmp("to_user")
