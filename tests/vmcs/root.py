"""A CPU in root operation that executes one VMX instruction at a time, with every condition of the manual in reach."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import numpy.typing as npt
from attrs import define, field

from tests.cpu.bench import machine
from vtsim.base import memory as mem
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import NO_MEMORY, Assembler, Mem, Program
from vtsim.cpu.codes import ARITHMETIC, RF_CF, RF_ZF
from vtsim.cpu.engine import Engine
from vtsim.ept.tables import PAGING, SIZE_2M, host_table
from vtsim.vmcs import state as h
from vtsim.vmcs.capabilities import Capabilities
from vtsim.vmcs.fields import SLOT
from vtsim.vmcs.generations import GENERATIONS

REGION, VMCS, OTHER, SHADOW_VMCS = 0x400000, 0x401000, 0x402000, 0x403000
OPERAND, SECOND, STACK, CODE, IDT, TSS, TABLES = 0x500000, 0x500100, 0x501FF0, 0x600000, 0x700000, 0x701000, 0x900000
UNMAPPED, NOT_CANONICAL = 32 << 20, 1 << 60
DONE, FAULT = 1, 0x100
REVISION = 0x4A
POINTED = Mem(s.RSI)
Ended = str | int | tuple[str, int]


def capabilities(*, without: Iterable[str] = (), added: Iterable[str] = ()) -> Capabilities:
    """The newest generation with some features taken away or added."""
    newest = GENERATIONS["skylake-sp"]
    return Capabilities.from_features(
        (newest.features - set(without)) | set(added), revision=REVISION, cr4_fixed1=newest.cr4_fixed1
    )


@cache
def _program() -> Program:
    """An operation and a stop for each VMX instruction in each form, and handlers that stop with their vector."""
    a = Assembler("root", CODE, activity=o.EXIT_HANDLER)
    forms = {name: (number, s.NO_REGISTER, s.NO_REGISTER, NO_MEMORY) for name, number in (
        ("VMXOFF", o.VMXOFF), ("VMLAUNCH", o.VMLAUNCH), ("VMRESUME", o.VMRESUME), ("VMCALL", o.VMCALL),
        ("VMFUNC", o.VMFUNC),
    )}  # fmt: skip
    forms |= {name: (number, s.NO_REGISTER, s.NO_REGISTER, POINTED) for name, number in (
        ("VMXON", o.VMXON), ("VMCLEAR", o.VMCLEAR), ("VMPTRLD", o.VMPTRLD), ("VMPTRST", o.VMPTRST),
    )}  # fmt: skip
    forms |= {name: (number, s.RBX, s.NO_REGISTER, POINTED) for name, number in (
        ("INVEPT", o.INVEPT), ("INVVPID", o.INVVPID),
    )}  # fmt: skip
    forms |= {
        "VMREAD": (o.VMREAD, s.RBX, s.RCX, NO_MEMORY), "VMWRITE": (o.VMWRITE, s.RBX, s.RCX, NO_MEMORY),
        "VMREAD to memory": (o.VMREAD, s.NO_REGISTER, s.RCX, POINTED),
        "VMWRITE from memory": (o.VMWRITE, s.NO_REGISTER, s.RCX, POINTED),
        "MOV to CR0": (o.MOV_TO_CR, s.RBX, s.NO_REGISTER, NO_MEMORY),
    }  # fmt: skip
    for name, (number, r1, r2, operand) in forms.items():
        a.label(name)
        a.op(number, r1, r2, mem=operand)
        a.op(o.STOP_OP, imm=DONE)
    a.label("MOV to CR4")
    a.op(o.MOV_TO_CR, s.RBX, imm=4)
    a.op(o.STOP_OP, imm=DONE)
    for vector in range(32):
        a.label(f"vector {vector}")
        a.op(o.STOP_OP, imm=FAULT | vector)
    return a.assemble()


@define(eq=False)
class Root:
    """One logical CPU, in VMX operation with VMCS current unless told otherwise."""

    capabilities: Capabilities = field(factory=capabilities)
    ring: int = 0
    engine: Engine = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.engine = engine = machine()
        engine.vmx(self.capabilities)
        engine.frames_from(TABLES >> 12, 64, shuffled=False, seed=0)
        table = host_table(engine, PAGING)
        table.map_range(0, 0, UNMAPPED >> 12, 0xE7, SIZE_2M)
        engine.place(_program(), lambda page: page >> 12)
        for vector in range(32):
            handler = _program().labels[f"vector {vector}"]
            engine.store(IDT + 16 * vector, handler & 0xFFFF | 8 << 16 | 0x8E << 40 | (handler >> 16) << 48)
            engine.store(IDT + 16 * vector + 8, 0)
        engine.store(TSS, (STACK & 0xFFFFFFFF) << 32)  # the stack of ring 0, at offset 4
        for region in (REGION, VMCS, OTHER):
            engine.store(region, self.capabilities.revision)
        engine.store(SHADOW_VMCS, self.capabilities.revision | h.SHADOW)
        m = self.m
        m[s.CR3], m[s.IDTR_BASE], m[s.IDTR_LIMIT] = table.root << 12, IDT, 0xFFF
        m[s.CR4], m[s.TR_BASE] = 0x20A0, TSS

    @property
    def m(self) -> npt.NDArray[np.int64]:
        record: npt.NDArray[np.int64] = self.engine.cpus[0]
        return record

    def enter(self, current: int | None = VMCS) -> Root:
        """Execute VMXON and, unless there is to be no current VMCS, VMCLEAR and VMPTRLD."""
        assert self.pointer("VMXON", REGION) == "ok"
        if current is not None:
            assert self.pointer("VMCLEAR", current) == "ok"
            assert self.pointer("VMPTRLD", current) == "ok"
        return self

    def execute(self, name: str, **registers: int) -> Ended:
        """Execute one instruction: "ok", "VMfailInvalid", the number of VMfailValid, or the fault and its error code."""
        m = self.m
        for register, value in registers.items():
            m[s.GPR + s.REGISTERS.index(register.upper())] = mem.signed(value)
        m[s.GPR + s.RSP], m[s.RIP], m[s.CS_SELECTOR] = STACK, _program().labels[name], 8
        m[s.RFLAGS] = int(m[s.RFLAGS]) & ~ARITHMETIC | (0 if name.startswith("MOV") else ARITHMETIC)
        m[s.PRIVILEGE] = o.R3 if self.ring else o.R0
        self.engine.sync()
        self.engine.run(ops=1)
        if m[s.NONROOT]:
            return "entered"
        assert self.engine.run(ops=3) == 4
        code = int(m[s.STOP_A])
        if code & FAULT:
            vector = code & ~FAULT
            error = self.engine.load(int(m[s.GPR + s.RSP])) if vector > 6 else 0
            return {6: "#UD", 13: "#GP", 14: "#PF"}[vector], error
        flags = int(m[s.RFLAGS]) & ARITHMETIC
        if flags == RF_CF:
            return "VMfailInvalid"
        if flags == RF_ZF:
            return self.field("VM_INSTRUCTION_ERROR")
        assert flags == 0
        return "ok"

    def pointer(self, name: str, value: int) -> Ended:
        """Execute an instruction whose memory operand holds an address."""
        self.engine.store(OPERAND, value)
        return self.execute(name, rsi=OPERAND)

    def descriptor(self, name: str, kind: int, low: int, high: int = 0) -> Ended:
        """Execute INVEPT or INVVPID."""
        self.engine.store(OPERAND, low)
        self.engine.store(OPERAND + 8, high)
        return self.execute(name, rbx=kind, rsi=OPERAND)

    def field(self, name: str, region: int | None = None) -> int:
        words = self.engine.contents((int(self.m[s.VMCS_POINTER]) if region is None else region) >> 12, mem.VMCS_REGION)
        return int(words[SLOT[name]])

    @property
    def current(self) -> int:
        """What VMPTRST stores."""
        assert self.execute("VMPTRST", rsi=SECOND) == "ok"
        return self.engine.load(SECOND)
