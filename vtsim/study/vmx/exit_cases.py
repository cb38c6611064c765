"""Runs a recorded VM-exit case as operations of the engine: VMLAUNCH, guest code, the first exit, what follows.

SDM: "VM Exits".
Not modelled: the program that recorded the cases; its host stops at the VM exit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.base.jit import quiet
from vtsim.cpu import codes as c
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import PAGE, Assembler, Instruction, Mem, Program
from vtsim.cpu.decode import LONGEST, sequence
from vtsim.cpu.engine import Engine, Geometry, Snapshot
from vtsim.cpu.kernels.apic import write_register
from vtsim.cpu.profile import load_profile
from vtsim.ept.tables import PAGING, Table
from vtsim.study.vmx.cases import EXIT, Case, Environment
from vtsim.study.vmx.drivers import Skipped, bytes_at, check_memory, drivers
from vtsim.study.vmx.format import GPRS
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.events import BLOCKING_BY_MOV_SS
from vtsim.vmcs.spec import SLOT

PROFILE: Final = "skx-4114"
MEMORY: Final = 16 << 20
HOST_CODE: Final = 0x100000  # of the program that launches; the recorded cases leave it alone
HOST_TABLES: Final = 0x200000
OPERANDS: Final = 0x103000
VMXON_REGION, CURRENT = 0x400000, 0x401000
REGIONS: Final = (VMXON_REGION, CURRENT, 0x402000, 0x403000)
TIMER_VECTOR, TIMER_TICKS = 0xF0, 1 << 40  # the recorder's timer ends guests that run away
FAILED, FAULTED = 2, 3
OPS: Final = 40_000
MASK: Final = (1 << 64) - 1
OWN: Final = range(HOST_CODE, VMXON_REGION)
REG_ICR: Final = 0x30
APIC_BASE, APIC_AT_RESET, FEATURE_CONTROL, LOCKED_ON = 0x1B, 0xFEE00900, 0x3A, 5
DEBUG_AT_RESET: Final = 0xFFFF0FF0
VMCALL: Final = 18
HANDLERS: Final = (0x801000, 0x11000)
STACK_SHOWN: Final = 56  # bytes of the guest's stack that a case holds
CONTROL_REGISTERS: Final = {"cr2": s.CR2, "dr6": s.DR6, **{f"dr{n}": s.DR0 + n for n in range(4)}}

# exit information: name in a case, slot
EXIT_FIELDS: Final = {
    "qualification": v.EXIT_QUALIFICATION,
    "instruction_length": v.EXIT_INSTRUCTION_LENGTH,
    "instruction_info": v.EXIT_INSTRUCTION_INFORMATION,
    "interruption_info": v.EXIT_INTERRUPTION_INFORMATION,
    "interruption_error_code": v.EXIT_INTERRUPTION_ERROR_CODE,
    "idt_vectoring_info": v.IDT_VECTORING_INFORMATION,
    "idt_vectoring_error_code": v.IDT_VECTORING_ERROR_CODE,
    "guest_linear_address": v.GUEST_LINEAR_ADDRESS,
    "guest_physical_address": v.GUEST_PHYSICAL_ADDRESS,
}


class Bench:
    """One small engine that every case reuses."""

    def __init__(self) -> None:
        self.engine = Engine(
            load_profile(PROFILE),
            Geometry(memory_bytes=MEMORY, pool_pages=400, code_pages=48, rows=1 << 16, owners=2, trace_rows=64),
        )
        engine = self.engine
        engine.frames_from(0x300, 0x100, shuffled=False, seed=0)
        self.m: npt.NDArray[np.int64] = engine.cpus[0]
        take = iter(range(HOST_TABLES >> 12, HOST_TABLES + 0x100000 >> 12))
        root = next(take)
        table = Table(
            root=root, format=PAGING, take=lambda: next(take), words=lambda frame: engine.contents(frame, mem.TABLE)
        )
        for address in range(0, 0x100000, PAGE):
            table.map(HOST_CODE + address, HOST_CODE + address >> 12, 0x63)
        a = Assembler("host", HOST_CODE, activity=o.EXIT_HANDLER)
        a.op(o.VMXON, mem=Mem(displacement=OPERANDS))
        a.op(o.VMPTRLD, mem=Mem(displacement=OPERANDS + 8))
        a.op(o.STOP_OP, imm=0)
        self.launch = a.label("launch")
        a.op(o.VMLAUNCH)
        a.op(o.STOP_OP, imm=FAILED)
        a.label("resume")
        a.op(o.VMRESUME)
        a.op(o.STOP_OP, imm=FAILED)
        for name, op in (("vmclear", o.VMCLEAR), ("vmptrld", o.VMPTRLD)):
            a.label(name)
            a.op(op, mem=Mem(displacement=OPERANDS + 8))
            a.op(o.STOP_OP, imm=0)
        a.label("rdmsr")
        a.op(o.RDMSR)
        a.op(o.STOP_OP, imm=0)
        self.program = a.assemble()
        engine.place(self.program, lambda page: page >> 12)
        engine.store(OPERANDS, VMXON_REGION)
        engine.store(OPERANDS + 8, CURRENT)
        engine.arena[mem.A_DECODE] = 1
        for region in REGIONS:
            engine.contents(region >> 12, mem.VMCS_REGION)
        self.owner = engine.owner("vm")
        m = self.m
        m[s.RIP], m[s.CR3], m[s.CR0], m[s.CR4] = HOST_CODE, HOST_TABLES, 0x80000031, 0x42620
        self.start: Snapshot = engine.save()

    @property
    def vmcs(self) -> npt.NDArray[np.int64]:
        return self.engine.contents(CURRENT >> 12, mem.VMCS_REGION)

    def put_page(self, hpa: int, data: bytes | bytearray) -> None:
        self.engine.contents(hpa >> 12, mem.VALUES)[:] = np.frombuffer(bytes(data), np.int64)

    # --- code --------------------------------------------------------------------------------------------------
    @property
    def bits(self) -> int:
        """The size of the code segment that runs now."""
        rights = int(self.m[s.CS_ACCESS_RIGHTS])
        if int(self.m[s.EFER]) & 1 << 10 and rights >> 13 & 1:
            return 64
        return 32 if rights >> 14 & 1 and not int(self.m[s.RFLAGS]) >> 17 & 1 else 16

    def decode(self, hpa: int) -> None:
        """Decode what stands at a physical address into rows."""
        rows = list(sequence(bytes_at(self.engine, hpa, 8 * LONGEST), self.bits, hpa, 8))
        if not rows:
            rows = [Instruction(hpa, o.UD, 1, o.APPLICATION)]
        kept = [row for row in rows if row.at >> 12 == hpa >> 12]
        self.engine.place(Program("guest", hpa, tuple(kept), {}), lambda page: page >> 12)


@cache
def bench() -> Bench:
    return Bench()


@drivers.register(EXIT)
def run_exit_case(case: Case, environment: Environment) -> list[dict[str, Any]]:
    """The outcomes of a case: of its first run, of each memory dump, of each step."""
    run = _Run(bench(), environment)
    with quiet():
        return list(run.outcomes())


class _Run:
    """One case in the engine."""

    def __init__(self, on: Bench, environment: Environment) -> None:
        self.on, self.environment = on, environment
        self.engine, self.m = on.engine, on.m

    def outcomes(self) -> Iterator[dict[str, Any]]:
        self._set_up()
        yield self._go("resume" if self.environment.run == "vmresume" else "launch")
        for address, length in self.environment.dump:
            yield {"kind": "mem", "addr": hex(address), "data": bytes_at(self.engine, address, length).hex()}
        for step in self.environment.steps:
            yield from self._step(*step)

    # --- before the launch ---------------------------------------------------------------------------------------
    def _set_up(self) -> None:
        env, m, engine = self.environment, self.m, self.engine
        check_memory(env, OWN, MEMORY)
        engine.restore(self.on.start)
        engine.vmx(env.capabilities)
        engine.cpuid_table((*leaf, *answer) for leaf, answer in env.cpuid.items())
        m[s.MSR_APIC_BASE] = env.capabilities.msrs.get(APIC_BASE, APIC_AT_RESET)
        m[s.MSR_FEATURE_CONTROL] = env.capabilities.msrs.get(FEATURE_CONTROL, LOCKED_ON)
        m[s.RESERVED_BITS] = ((1 << 52) - 1) & ~((1 << env.physical_address_bits) - 1)
        for page, data in env.memory.items():
            if page not in REGIONS:
                self.on.put_page(page, data)
        for region in REGIONS:
            words = engine.contents(region >> 12, mem.VMCS_REGION)
            words[h.V_REVISION] = int.from_bytes(env.memory[region][:4], "little")
            words[h.V_OWNER], words[h.V_EXIT_REASON] = self.on.owner, -1
        self._run(self.on.program.base)
        words = self.on.vmcs
        for name, value in env.vmcs.items():
            words[SLOT[name]] = mem.signed(value)
        words[h.V_CHECKED] = 0
        m[s.GPR : s.GPR + 16] = 0
        m[s.DR6] = DEBUG_AT_RESET
        for name, value in env.gpr.items():
            m[s.GPR + GPRS.index(name)] = mem.signed(value)
        for name, value in env.control_registers.items():
            m[CONTROL_REGISTERS[name]] = mem.signed(value)
        for value in env.pre:
            write_register(m, engine.arena, REG_ICR, value & 0xFFFF_FFFF)
        if env.mov_ss_blocking:
            m[s.INTERRUPT_SHADOW], m[s.SHADOW_KIND] = 2, BLOCKING_BY_MOV_SS
        m[s.APIC_TIMER_VECTOR] = TIMER_VECTOR
        m[s.APIC_DEADLINE] = int(m[s.CYCLE]) + TIMER_TICKS

    # --- running -----------------------------------------------------------------------------------------------
    def _run(self, rip: int) -> int:
        """Run from a host address until the host stops, playing decoder and device; the host's stop code."""
        m, engine = self.m, self.engine
        m[s.RIP] = rip
        engine.sync()
        begun = int(m[s.OPS])
        for _ in range(OPS):
            code = engine.run(ops=OPS)
            if code == c.UNDECODED:
                if not m[s.NONROOT]:
                    return -1
                self.on.decode(int(m[s.STOP_A]))
                if int(m[s.OPS]) - begun > OPS:
                    m[s.APIC_DEADLINE] = m[s.CYCLE]
            elif code == c.DEVICE_WRITE:
                self._device_write()
            elif code == c.DEVICE_READ:
                register = int(m[s.STOP_B]) >> 8
                if register < 16:
                    m[s.GPR + register] = 0xFFFF_FFFF
            elif code in (c.PORT_READ, c.PORT_WRITE, c.HORIZON):
                pass
            elif code == c.PROGRAM_END:
                return int(m[s.STOP_A])
            elif code == c.BUDGET:
                m[s.APIC_DEADLINE] = m[s.CYCLE]
            elif code == c.TRIPLE_FAULTED:  # the host has no handlers
                return FAULTED
            else:
                raise ModelError("the guest of a case stopped the engine", {"stop": code, "rip": int(m[s.RIP])})
        raise ModelError("a case does not end", {"rip": int(m[s.RIP])})

    def _device_write(self) -> None:
        """Only the local APIC answers."""
        hpa = int(self.m[s.STOP_A])
        if hpa >> 12 == mem.LOCAL_APIC:
            write_register(self.m, self.engine.arena, (hpa & 0xFFF) >> 4, int(self.m[s.STOP_C]) & 0xFFFF_FFFF)

    def _go(self, label: str) -> dict[str, Any]:
        """VM entry by the instruction at a label of the host, and what came of it."""
        words, m = self.on.vmcs, self.m
        if self._run(self.on.program.labels[label]) == FAILED:
            if int(m[s.RFLAGS]) & c.RF_CF:
                return {"kind": "vmfail_invalid"}
            return {"kind": "vmfail_valid", "error": int(words[v.VM_INSTRUCTION_ERROR])}
        reason = int(words[v.EXIT_REASON])
        if reason >> 31 & 1:
            qualification = int(words[v.EXIT_QUALIFICATION]) & MASK
            return {"kind": "entry_failure", "reason": reason & 0xFFFF, "qualification": qualification}
        got: dict[str, Any] = {"kind": "exit", "reason": reason & 0xFFFF}
        for name, slot in EXIT_FIELDS.items():
            got[name] = int(words[slot]) & MASK
        got["vmcs"] = {name: int(words[slot]) & MASK for name, slot in SLOT.items()}
        got["gpr"] = {GPRS[n]: int(m[s.GPR + n]) & MASK for n in range(16)}
        got["cr2"], got["dr6"] = int(m[s.CR2]) & MASK, int(m[s.DR6]) & MASK
        vector = self._handler()
        if vector is not None and got["reason"] == VMCALL:
            got["guest_handler_vector"] = vector
            got["guest_stack"] = self._stack()
        return got

    def _stack(self) -> list[str]:
        """Where the guest's stack ends, and what is on it; the guests of the recordings map every address to itself."""
        words = self.on.vmcs
        wide = int(words[v.GUEST_CS_ACCESS_RIGHTS]) >> 13 & 1
        at = int(words[v.GUEST_RSP]) + (0 if wide else int(words[v.GUEST_SS_BASE]))
        return [hex(at), bytes_at(self.engine, at, STACK_SHOWN).hex()]

    def _handler(self) -> int | None:
        """The vector at whose guest handler RIP stands."""
        words = self.on.vmcs
        rip = int(words[v.GUEST_RIP])
        if not int(words[v.GUEST_CS_ACCESS_RIGHTS]) >> 13 & 1:
            rip += int(words[v.GUEST_CS_BASE])
        for base in HANDLERS:
            if base <= rip < base + PAGE and rip & 15 == 0:
                return (rip - base) >> 4
        return None

    # --- steps --------------------------------------------------------------------------------------------------
    def _step(self, name: str, operands: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        words = self.on.vmcs
        if name == "advance_resume":
            words[v.GUEST_RIP] += words[v.EXIT_INSTRUCTION_LENGTH]
            words[h.V_CHECKED] = 0
            yield self._go("resume")
        elif name in ("resume", "launch"):
            yield self._go(name)
        elif name in ("clear_load", "clear_only"):
            yield self._operate("vmclear")
            if name == "clear_load":
                yield self._operate("vmptrld")
        elif name == "rdmsr":
            yield self._read_msr(operands[0])
        else:
            raise Skipped(f"no step {name!r} after a VM exit")

    def _operate(self, name: str) -> dict[str, Any]:
        """VMCLEAR or VMPTRLD of the VMCS by the host."""
        self._run(self.on.program.labels[name])
        flags = int(self.m[s.RFLAGS])
        if not flags & (c.RF_CF | c.RF_ZF):
            return {"kind": "op", "op": name, "result": "ok"}
        if flags & c.RF_CF:
            return {"kind": "op", "op": name, "result": "vmfail_invalid"}
        error = int(self.on.vmcs[v.VM_INSTRUCTION_ERROR])
        return {"kind": "op", "op": name, "result": "vmfail_valid", "error": error}

    def _read_msr(self, index: int) -> dict[str, Any]:
        """RDMSR by the host."""
        m = self.m
        m[s.GPR + s.RCX] = index
        got = {"kind": "op", "op": "rdmsr", "index": hex(index)}
        if self._run(self.on.program.labels["rdmsr"]) != 0:
            return {**got, "result": "fault", "value": 0}
        value = (int(m[s.GPR + s.RAX]) & 0xFFFF_FFFF) | int(m[s.GPR + s.RDX]) << 32
        return {**got, "result": "ok", "value": value & MASK}
