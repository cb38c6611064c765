"""Runs a recorded VM-entry case: VMLAUNCH or VMRESUME as an operation of the engine, and what came of it.

SDM: "VM Entries".
Not modelled: the program that recorded the cases; only one that executes the VMX instruction stands in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vtsim.base import memory as mem
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.accounts import ENTRIES
from vtsim.cpu.assembler import PAGE, Assembler, Mem
from vtsim.cpu.codes import RF_CF, RF_ZF
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import load_profile
from vtsim.ept import spec as e
from vtsim.ept.tables import PAGING, Table
from vtsim.study.vmx.cases import ENTRY, VMCS_A, VMCS_B, VMCS_C, VMXON_REGION, Case, Environment
from vtsim.study.vmx.drivers import Skipped, drivers
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.events import BLOCKING_BY_MOV_SS
from vtsim.vmcs.fields import SLOT
from vtsim.vmcs.reasons import ENTRY_FAILURE

PROFILE: Final = "skx-4114"
MEMORY: Final = 16 << 20
HOST: Final = 0x200000  # code, operand, page tables: where the recorded cases have nothing of their own
OPERAND: Final = HOST + PAGE
TABLES: Final = range((HOST >> 12) + 2, (HOST >> 12) + 8)  # frames
OWN: Final = frozenset(range(HOST, TABLES.stop << 12, PAGE))
MSR_APIC_BASE: Final = 0x1B
REGIONS: Final = (VMXON_REGION, VMCS_A, VMCS_B, VMCS_C)
INSTRUCTIONS: Final = {"vmlaunch": o.VMLAUNCH, "vmresume": o.VMRESUME, "vmclear": o.VMCLEAR, "vmptrld": o.VMPTRLD}
GPRS: Final = tuple(name.lower() for name in s.REGISTERS)
MASK: Final = (1 << 64) - 1


class Bench:
    """One small engine that every case uses again; what a case changes is put back before the next."""

    def __init__(self) -> None:
        geometry = Geometry(memory_bytes=MEMORY, pool_pages=400, code_pages=4, rows=256, owners=2, trace_rows=64)
        self.engine = engine = Engine(load_profile(PROFILE), geometry)
        take = iter(TABLES)
        table = Table(
            root=next(take), format=PAGING, take=lambda: next(take), words=lambda n: engine.contents(n, mem.TABLE)
        )
        table.map(HOST, [HOST >> 12, OPERAND >> 12], e.PTE_PRESENT | e.PTE_WRITE)
        a = Assembler("host", HOST, activity=o.EXIT_HANDLER)
        for name, op in INSTRUCTIONS.items():
            a.label(name)
            a.op(op, mem=Mem(displacement=OPERAND))
            a.op(o.STOP_OP)
        self.program = a.assemble()
        engine.place(self.program, lambda page: page >> 12)
        engine.store(OPERAND, VMCS_A)
        for region in REGIONS:
            engine.contents(region >> 12, mem.VMCS_REGION)
        self.owner = engine.owner("vm")
        self.root = table.root << 12
        self.record = engine.cpus[0].copy()
        self.pages: dict[int, bytes] = {}
        self.processor: Any = None

    @property
    def m(self) -> npt.NDArray[np.int64]:
        record: npt.NDArray[np.int64] = self.engine.cpus[0]
        return record

    def vmcs(self, region: int = VMCS_A) -> npt.NDArray[np.int64]:
        """The words of a VMCS region."""
        return self.engine.contents(region >> 12, mem.VMCS_REGION)

    def prepare(self, environment: Environment) -> None:
        """Put processor, memory, VMCS and registers of a case into the machine."""
        if environment.processor is not self.processor:
            self._identify(environment)
        if OWN & environment.memory.keys():
            raise Skipped("memory where the stand-in for the recorder's program has its own")
        for page, data in environment.memory.items():
            if page not in REGIONS and page + PAGE <= MEMORY and self.pages.get(page) != data:
                self.engine.contents(page >> 12, mem.VALUES)[:] = np.frombuffer(data, np.int64)
                self.pages[page] = data
        for page in self.pages.keys() - environment.memory.keys():
            self.engine.contents(page >> 12, mem.VALUES)[:] = 0
            del self.pages[page]
        for region in REGIONS:
            words = self.vmcs(region)
            words[:] = 0
            words[h.V_REVISION] = int.from_bytes(environment.memory[region][:4], "little")
            words[h.V_OWNER], words[h.V_EXIT_REASON] = self.owner, -1
        words = self.vmcs()
        for name, value in environment.vmcs.items():
            words[SLOT[name]] = mem.signed(value)
        m = self.m
        m[:] = self.record
        m[s.CR0], m[s.CR3], m[s.CR4] = 0x80000031, self.root, 0x2620
        m[s.VMXON], m[s.VMXON_POINTER], m[s.VMCS_POINTER] = 1, VMXON_REGION, VMCS_A
        m[s.VMCS] = int(mem.contents(self.engine.arena, VMCS_A >> 12))
        capabilities = environment.capabilities
        m[s.VMX_REVISION] = capabilities.revision
        m[s.TIMER_RATE] = capabilities.preemption_timer_shift
        m[s.EXECUTE_ONLY] = int(capabilities.supports("EPT_EXECUTE_ONLY"))
        m[s.RESERVED_BITS] = ((1 << 52) - 1) & ~((1 << environment.physical_address_bits) - 1)
        m[s.MSR_APIC_BASE] = capabilities.read(MSR_APIC_BASE) or m[s.MSR_APIC_BASE]
        for name, value in environment.gpr.items():
            m[s.GPR + GPRS.index(name)] = mem.signed(value)
        if environment.mov_ss_blocking:
            m[s.INTERRUPT_SHADOW], m[s.SHADOW_KIND] = 2, BLOCKING_BY_MOV_SS

    def _identify(self, environment: Environment) -> None:
        self.engine.vmx(environment.capabilities)
        self.engine.cpuid_table((*leaf, *answer) for leaf, answer in environment.cpuid.items())
        self.record[s.SAVED_MSRS] = self.m[s.SAVED_MSRS]
        self.processor = environment.processor

    def execute(self, instruction: str) -> bool:
        """Execute a VMX instruction of the host's program. Did the next one become due?"""
        m = self.m
        m[s.RIP] = self.program.labels[instruction]
        self.engine.sync()
        self.engine.run(ops=1)
        return int(m[s.RIP]) == self.program.labels[instruction] + o.OPS[INSTRUCTIONS[instruction]].length

    def enter(self, instruction: str) -> dict[str, Any]:
        """Execute VMLAUNCH or VMRESUME, and say what came of the VM entry."""
        words = self.vmcs()
        entered = int(self.engine.arena[self.owner + ENTRIES])
        goes_on = self.execute(instruction)
        if int(self.engine.arena[self.owner + ENTRIES]) != entered:
            return {"kind": "exit"}
        if goes_on:
            return self.failure()
        return {
            "kind": "entry_failure",
            "reason": int(words[v.EXIT_REASON]) & ~ENTRY_FAILURE,
            "qualification": int(words[v.EXIT_QUALIFICATION]) & MASK,
        }

    def failure(self) -> dict[str, Any]:
        """How the last VMX instruction failed."""
        if self.m[s.RFLAGS] & RF_CF:
            return {"kind": "vmfail_invalid"}
        return {"kind": "vmfail_valid", "error": int(self.vmcs()[v.VM_INSTRUCTION_ERROR])}

    def operate(self, instruction: str) -> dict[str, Any]:
        """Execute VMCLEAR or VMPTRLD, and say how it ended."""
        self.execute(instruction)
        if not self.m[s.RFLAGS] & (RF_CF | RF_ZF):
            return {"kind": "op", "op": instruction, "result": "ok"}
        failed = self.failure()
        return {"kind": "op", "op": instruction, "result": failed.pop("kind"), **failed}

    def restore_host(self) -> None:
        """Make the recorder's host, whose state a failed VM entry loaded, ours again."""
        m = self.m
        m[s.CR0], m[s.CR3], m[s.CR4] = 0x80000031, self.root, 0x2620


@cache
def bench() -> Bench:
    return Bench()


@drivers.register(ENTRY)
def run_entry_case(case: Case, environment: Environment) -> list[dict[str, Any]]:
    """The outcomes of a case: of its first VM entry, then of each step, until one of them enters the guest.

    Not modelled: what the guest then does; cases of VM exits show it.
    """
    machine = bench()
    machine.prepare(environment)
    return list(_outcomes(machine, environment))


def _outcomes(machine: Bench, environment: Environment) -> Iterator[dict[str, Any]]:
    entry = machine.enter(environment.run or "vmlaunch")
    yield entry
    for step in environment.steps:
        if entry["kind"] == "exit":
            return
        machine.restore_host()
        if step in ("launch", "resume"):
            entry = machine.enter(f"vm{step}")
            yield entry
        else:
            yield machine.operate("vmclear")
            if step == "clear_load":
                yield machine.operate("vmptrld")
