"""Runs a recorded case of VMX instructions in root operation: each step is one operation of the engine.

The host of the recorder is stood for by a page of operations in an identity-mapped address space, beyond the memory
that cases use, and by an interrupt table whose handlers stop the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem, Program
from vtsim.cpu.codes import PROGRAM_END, RF_CF, RF_ZF
from vtsim.cpu.engine import Engine, Geometry, Snapshot, stop_name
from vtsim.cpu.profile import load_profile
from vtsim.ept.tables import PAGING, SIZE_2M, host_table
from vtsim.study.vmx.cases import PAGE, ROOT, VMCS_A, VMCS_B, VMCS_C, VMXON_REGION, Case, Environment, Processor
from vtsim.study.vmx.drivers import Outcome, Skipped, check_memory, drivers
from vtsim.study.vmx.exit_cases import CONTROL_REGISTERS
from vtsim.vmcs.fields import SLOT

PROFILE: Final = "skx-4114"
"""Gives prices and sizes of structures; everything architectural comes from the recorded processor."""
MEMORY: Final = 32 << 20
HOST: Final = 24 << 20  # what is below belongs to the cases
IDT, STACK_TOP, OPERAND = HOST, HOST + 2 * PAGE, HOST + 2 * PAGE
CODE: Final = HOST + 3 * PAGE
TABLES: Final = HOST + 16 * PAGE
CODE_SELECTOR: Final = 0x08
MAPPED: Final = 0xE3  # present, writable, accessed, dirty, large
VECTORS: Final = 32
ERROR_CODES: Final = frozenset({8, 10, 11, 12, 13, 14, 17, 21})
DONE, FAULT = 1, 0x100
MASK: Final = (1 << 64) - 1

_AT: Final = Mem(s.RSI)
# fmt: off
#   name          op           R1         R2         IMM  memory operand
_OPERATIONS: Final = {
    "vmread":    (o.VMREAD,      s.RBX,     s.RCX,     0,  None),
    "vmwrite":   (o.VMWRITE,     s.RBX,     s.RCX,     0,  None),
    "vmxon":     (o.VMXON,       None,      None,      0,  _AT),
    "vmxoff":    (o.VMXOFF,      None,      None,      0,  None),
    "vmclear":   (o.VMCLEAR,     None,      None,      0,  _AT),
    "vmptrld":   (o.VMPTRLD,     None,      None,      0,  _AT),
    "vmptrst":   (o.VMPTRST,     None,      None,      0,  _AT),
    "vmlaunch":  (o.VMLAUNCH,    None,      None,      0,  None),
    "vmresume":  (o.VMRESUME,    None,      None,      0,  None),
    "vmcall":    (o.VMCALL,      None,      None,      0,  None),
    "vmfunc":    (o.VMFUNC,      None,      None,      0,  None),
    "invept":    (o.INVEPT,      s.RBX,     None,      0,  _AT),
    "invvpid":   (o.INVVPID,     s.RBX,     None,      0,  _AT),
    "movcr0":    (o.MOV_TO_CR,   s.RBX,     None,      0,  None),
    "movcr4":    (o.MOV_TO_CR,   s.RBX,     None,      4,  None),
    "mem64":     (o.ST,          s.RBX,     None,      0,  _AT),
    "mem32":     (o.ST,          s.RBX,     None,      0,  Mem(s.RSI, size=4)),
}
# fmt: on


def _program() -> Program:
    """One operation after the other, each followed by a stop; then the handlers, which stop with their vector."""
    a = Assembler("recorded root cases", CODE, activity=o.EXIT_HANDLER)
    for name, (op, r1, r2, imm, operand) in _OPERATIONS.items():
        a.label(name)
        a.op(op, s.NO_REGISTER if r1 is None else r1, s.NO_REGISTER if r2 is None else r2, imm, operand or Mem())
        a.op(o.STOP_OP, imm=DONE)
    for vector in range(VECTORS):
        a.label(f"vector {vector}")
        a.op(o.STOP_OP, imm=FAULT | vector)
    return a.assemble()


class RootMachine:
    """An engine with the capabilities of one recorded processor and the recorder's host; cases reuse it."""

    def __init__(self, processor: Processor) -> None:
        self.engine = Engine(
            load_profile(PROFILE),
            Geometry(memory_bytes=MEMORY, pool_pages=400, code_pages=4, rows=256, owners=2, trace_rows=64),
        )
        engine, self.program = self.engine, _program()
        engine.vmx(processor.capabilities)
        self.m[s.RESERVED_BITS] = ((1 << 52) - 1) & ~((1 << processor.physical_address_bits) - 1)
        engine.frames_from(TABLES >> 12, 16, shuffled=False, seed=0)
        table = host_table(engine, PAGING)
        table.map_range(0, 0, MEMORY >> 12, MAPPED, SIZE_2M)
        engine.place(self.program, lambda page: page >> 12)
        for vector in range(VECTORS):
            handler = self.program.labels[f"vector {vector}"]
            low = (handler & 0xFFFF) | CODE_SELECTOR << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48
            engine.store(IDT + 16 * vector, low)
            engine.store(IDT + 16 * vector + 8, handler >> 32)
        self.m[s.CR3], self.m[s.IDTR_BASE], self.m[s.IDTR_LIMIT] = table.root << 12, IDT, 16 * VECTORS - 1
        self.start: Snapshot = engine.save()

    @property
    def m(self) -> npt.NDArray[np.int64]:
        record: npt.NDArray[np.int64] = self.engine.cpus[0]
        return record

    def load(self, environment: Environment) -> None:
        """Put the machine where every case begins: in VMX operation, VMCS A current and filled, all VMCSs clear."""
        engine, m = self.engine, self.m
        engine.restore(self.start)
        check_memory(environment, (), HOST)
        for address, page in environment.memory.items():
            engine.contents(address >> 12, mem.VALUES)[:] = np.frombuffer(page, np.int64)
        m[s.CR0], m[s.CR4] = environment.vmcs["HOST_CR0"], environment.vmcs["HOST_CR4"]
        for name, value in environment.control_registers.items():
            m[CONTROL_REGISTERS[name]] = mem.signed(value)
        if VMXON_REGION in environment.memory:
            self.set_up("vmxon", VMXON_REGION)
        for region in (VMCS_B, VMCS_C, VMCS_A):
            self.set_up("vmclear", region)
        self.set_up("vmptrld", VMCS_A)
        words = engine.contents(VMCS_A >> 12, mem.VMCS_REGION)
        for name, value in environment.vmcs.items():
            words[SLOT[name]] = mem.signed(value)

    def set_up(self, name: str, pointer: int) -> None:
        """An instruction of the recorder's host before a case, which has to succeed."""
        self.engine.store(OPERAND, pointer)
        if self.execute(name, {s.RSI: OPERAND})["result"] != "ok":
            raise ModelError(f"{name} before a recorded case failed", {"pointer": pointer})

    def execute(self, name: str, registers: Mapping[int, int]) -> dict[str, Any]:
        """Run one operation: whether it succeeded, or which way it failed; the guest of a VM entry does not run."""
        m, engine = self.m, self.engine
        for register, value in registers.items():
            m[s.GPR + register] = mem.signed(value)
        m[s.GPR + s.RSP], m[s.RIP] = STACK_TOP, self.program.labels[name]
        m[s.CS_SELECTOR], m[s.PRIVILEGE], m[s.RFLAGS] = CODE_SELECTOR, o.R0, int(m[s.RFLAGS]) & ~(RF_CF | RF_ZF)
        engine.sync()
        engine.run(ops=1)
        if m[s.NONROOT] or int(m[s.RIP]) >> 12 != CODE >> 12:
            return {"result": "entered" if m[s.NONROOT] else "exit"}
        stop = engine.run(ops=3)
        if stop != PROGRAM_END:
            raise ModelError(f"{name} of a recorded case stopped: {stop_name(stop)}", engine.counters())
        code = int(m[s.STOP_A])
        if code & FAULT:
            vector = code & ~FAULT
            top = int(m[s.GPR + s.RSP])
            return {"result": "fault", "vector": vector, "error_code": engine.load(top) if vector in ERROR_CODES else 0}
        if m[s.RFLAGS] & RF_CF:
            return {"result": "vmfail_invalid"}
        if m[s.RFLAGS] & RF_ZF:
            words = engine.contents(int(m[s.VMCS_POINTER]) >> 12, mem.VMCS_REGION)
            return {"result": "vmfail_valid", "error": int(words[SLOT["VM_INSTRUCTION_ERROR"]])}
        return {"result": "ok"}

    # --- steps -------------------------------------------------------------------------------------------------------
    def step(self, name: str, operands: Sequence[int]) -> dict[str, Any] | None:
        """Run a step of a case: its outcome, None if it has none."""
        if name not in STEPS:
            raise Skipped(f"no step {name!r} in root operation")
        return STEPS[name](self, operands)

    def pointer(self, name: str, place: int, value: int) -> dict[str, Any]:
        """An instruction whose memory operand holds an address; place 0 is the host's own."""
        _check_place(place)
        self.engine.store(place or OPERAND, value)
        return {"op": name, **self.execute(name, {s.RSI: place or OPERAND})}

    def pointer_store(self) -> dict[str, Any]:
        got = self.execute("vmptrst", {s.RSI: OPERAND})
        if got["result"] == "ok":
            got["value"] = self.engine.load(OPERAND) & MASK
        return {"op": "vmptrst", **got}

    def read(self, encoding: int) -> dict[str, Any]:
        got = self.execute("vmread", {s.RCX: encoding, s.RBX: 0})
        if got["result"] == "ok":
            got["value"] = int(self.m[s.GPR + s.RBX]) & MASK
        return {"op": "vmread", **got}

    def store(self, name: str, place: int, value: int) -> None:
        _check_place(place)
        if self.execute(name, {s.RSI: place, s.RBX: value})["result"] != "ok":
            raise Skipped("a store to memory that the recorder's host does not map")

    def entry(self, resume: int) -> dict[str, Any]:
        name = "vmresume" if resume else "vmlaunch"
        return {"op": name, **self.execute(name, {})}

    def move_to_control_register(self, register: int, value: int) -> dict[str, Any]:
        name = f"movcr{register}"
        if name not in _OPERATIONS:
            raise Skipped(f"no MOV to CR{register} in root operation")
        return {"op": name, **self.execute(name, {s.RBX: value})}

    def control_registers(self) -> dict[str, Any]:
        return {"op": "rdcr", "cr0": int(self.m[s.CR0]) & MASK, "cr4": int(self.m[s.CR4]) & MASK}


def _check_place(place: int) -> None:
    """An operand of a step stands in memory that belongs to the cases."""
    if place > HOST - 8:
        raise Skipped("an operand beyond the memory that belongs to the cases")


Step = Callable[[RootMachine, Sequence[int]], dict[str, Any] | None]


def _plain(name: str) -> Step:
    return lambda machine, _: {"op": name, **machine.execute(name, {})}


def _with_pointer(name: str) -> Step:
    return lambda machine, operands: machine.pointer(name, operands[0], operands[1])


def _with_descriptor(name: str) -> Step:
    return lambda machine, x: {"op": name, **machine.execute(name, {s.RSI: x[0], s.RBX: x[1]})}


# fmt: off
STEPS: Final[Mapping[str, Step]] = {
    **{name: _plain(name) for name in ("vmxoff", "vmcall", "vmfunc")},
    **{name: _with_pointer(name) for name in ("vmxon", "vmclear", "vmptrld")},
    **{name: _with_descriptor(name) for name in ("invept", "invvpid")},
    "vmptrst":  lambda machine, _: machine.pointer_store(),
    "vmread":   lambda machine, x: machine.read(x[0]),
    "vmwrite":  lambda machine, x: {"op": "vmwrite", **machine.execute("vmwrite", {s.RCX: x[0], s.RBX: x[1]})},
    "vmentryi": lambda machine, x: machine.entry(x[0]),
    "hostcr":   lambda machine, x: machine.move_to_control_register(x[0], x[1]),
    "hostcrrd": lambda machine, _: machine.control_registers(),
    "mem64":    lambda machine, x: machine.store("mem64", x[0], x[1]),
    "mem32":    lambda machine, x: machine.store("mem32", x[0], x[1]),
}
# fmt: on


@lru_cache(maxsize=4)
def _machine(processor: Processor) -> RootMachine:
    return RootMachine(processor)


@drivers.register(ROOT)
def run_root_case(case: Case, environment: Environment) -> list[Outcome]:
    """VMX instructions in root operation, as operations of the engine."""
    machine = _machine(environment.processor)
    machine.load(environment)
    outcomes: list[Outcome] = []
    for name, operands in environment.steps:
        got = machine.step(name, operands)
        if got is not None:
            outcomes.append({"kind": "op", **got})
    return outcomes
