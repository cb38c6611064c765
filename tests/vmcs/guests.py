"""A guest on any processor whose code is given as bytes: one VM entry by an instruction, and the first VM exit.

What a test expects is a table: names of the outcome ("reason"), VMCS fields ("GUEST_RIP"), general registers ("rdx"), or
places of the CPU's record (numbers). So that a control's two settings are two such tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import evolve, frozen

from tests.vmcs.checked import ALL, environment
from vtsim.base.jit import quiet
from vtsim.cpu.slots import GPR
from vtsim.study.vmx.cases import PAGE
from vtsim.study.vmx.drivers import bytes_at
from vtsim.study.vmx.exit_cases import GPRS, MASK, _Run, bench
from vtsim.vmcs.fields import SLOT

CODE, REAL_CODE, STACK, DATA = 0x800000, 0x10000, 0x802E00, 0x828000
EPT_DATA, APIC_ACCESS, VIRTUAL_APIC, POSTED = 0x813148, 0x81E000, 0x81D000, 0x81F000
DATA1 = 0x829010  # its EPT entry is at EPT_DATA
IO_BITMAP_A, MSR_BITMAPS, EPTP_LIST, SHADOW_VMCS = 0x818000, 0x81A000, 0x817000, 0x402000
STORE_AREA, HOST_AREA, GUEST_AREA = 0x820000, 0x821000, 0x822000
PID_TABLE, DESCRIPTOR = 0x825000, 0x826040  # free pages
DB, UD, GP, PF, VE = 1, 6, 13, 14, 20
VMCALL = "0f01c1"
Expected = Mapping[str | int, int | str]


@frozen(kw_only=True)
class Guest:
    """A base state of the recordings with controls, fields, registers and memory changed, and the code it runs."""

    code: str = ""
    base: str = "b64e"
    controls: str = ""
    fields: Mapping[str, int] = {}
    gpr: Mapping[str, int] = {}
    memory: Mapping[int, str] = {}
    record: Mapping[int, int] = {}
    on: str = ALL
    send: int = 0  # an interrupt command that the host writes before it enters
    dump: tuple[int, int] = (0, 0)

    def run(self, controls: str = "") -> Outcome:
        """Enter with further controls; VMCALL stands behind the code and at every handler of the guest."""
        state = environment(self.base, f"{self.controls} {controls}", self.on, **dict(self.fields))
        at = REAL_CODE if self.base in ("brealu", "bv86") else CODE
        pages = {page: bytearray(data) for page, data in state.memory.items()}
        for place, data in ((at, self.code + VMCALL), *self.memory.items()):
            for n, byte in enumerate(bytes.fromhex(data)):
                pages.setdefault((place + n) & -PAGE, bytearray(PAGE))[(place + n) & (PAGE - 1)] = byte
        state = evolve(
            state, memory={page: bytes(data) for page, data in pages.items()}, gpr=dict(self.gpr),
            pre=(self.send,) if self.send else (),
        )  # fmt: skip
        on = bench()
        with quiet():
            run = _Run(on, state)
            run._set_up()
            for slot, value in self.record.items():
                on.m[slot] = value
            got = run._go("launch")
        record = [int(value) for value in on.m]
        return Outcome(got, record, {name: int(on.vmcs[slot]) & MASK for name, slot in SLOT.items()}, self._dumped())

    def _dumped(self) -> str:
        return bytes_at(bench().engine, *self.dump).hex() if self.dump[1] else ""


@frozen
class Outcome:
    """What came of a VM entry, with the record of the CPU and all fields of the VMCS afterwards."""

    got: dict[str, Any]
    record: list[int]
    fields: dict[str, int]
    dump: str

    def at(self, name: str | int) -> int | str | None:
        """What an expectation names."""
        if isinstance(name, int):
            return self.record[name]
        if name == "vector":
            return self.got.get("guest_handler_vector")
        if name == "dump":
            return self.dump
        if name in GPRS:
            return self.record[GPRS.index(name) + GPR] & MASK
        return self.fields[name] if name in self.fields else self.got.get(name)

    def differs(self, expected: Expected) -> dict[str | int, tuple[Any, Any]]:
        """Of what is expected, what is otherwise: what was found and what was expected."""
        return {name: (self.at(name), value) for name, value in expected.items() if self.at(name) != value}


def quad(*values: int) -> str:
    """Words of memory as bytes."""
    return b"".join((value & MASK).to_bytes(8, "little") for value in values).hex()
