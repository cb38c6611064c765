"""A guest in any mode whose code is given as bytes: a base state of the recordings, overrides, and what came of one VM entry."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from vtsim.study.vmx.base_states import BaseStates
from vtsim.study.vmx.cases import EXIT, Case
from vtsim.study.vmx.exit_cases import run_exit_case

CODE, IDT64, IDT32, HANDLERS, STACK = 0x800000, 0x804000, 0x805000, 0x801000, 0x802E00
EPT, EPT_DATA, APIC_ACCESS, VIRTUAL_APIC, DATA = 0x813000, 0x813148, 0x81E000, 0x81D000, 0x828000
PIN, PRIMARY, SECONDARY_ON = 0x17, 0x4006172, 1 << 31
PROCESSOR = "corei7_skylake_x"


@cache
def base_states() -> BaseStates:
    return BaseStates.beside(Path(__file__))


def enter(
    base: str,
    code: str,
    *,
    vmcs: Mapping[str, int] | None = None,
    gpr: Mapping[str, int] | None = None,
    memory: Mapping[int, str] | None = None,
    dump: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Run `code` (hexadecimal, VMCALL behind it) at the base state's RIP; the outcome, with `dump` as bytes.

    Fields have the names of the recordings; a VMCALL stands at every handler of the guest.
    """
    at = 0x10000 if base in ("brealu", "bv86") else CODE
    raw: dict[str, Any] = {
        "id": "exit-test", "model": PROCESSOR, "cat": "test", "base": base,
        "vmcs": {name: hex(value) for name, value in (vmcs or {}).items()},
        "gpr": {name: hex(value) for name, value in (gpr or {}).items()},
        "mem": [[hex(at), code + "0f01c1"], *([hex(place), data] for place, data in (memory or {}).items())],
        "insn": {"bits": 64, "asm": "", "bytes": code}, "outcome": {"kind": "exit"},
    }  # fmt: skip
    if dump:
        raw["dump"] = [[hex(dump[0]), dump[1]]]
    case = Case(id="exit-test", category="test", model=PROCESSOR, base=base, kind=EXIT, line=1, file="", raw=raw)
    first, *more = run_exit_case(case, base_states().environment(case))
    return {**first, "dump": more[0]["data"] if more else ""}
