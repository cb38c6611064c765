"""VM transitions at their densest: each exit injects an event and opens or closes the interrupt window."""

from __future__ import annotations

import time

from tests.cpu.bench import TEXT, Virtual, virtual
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.codes import BUDGET, HARDWARE_EXCEPTION, UD, VALID
from vtsim.vmcs import bits as b

OPS = 4_000_000


def guest(a: Assembler) -> None:
    """VMCALL again and again; the handler of the injected #UD returns at once."""
    a.label("again")
    a.op(o.VMCALL)
    a.jmp("again")
    a.label("handler")
    a.op(o.IRET)


def monitor(a: Assembler) -> None:
    """Step over the VMCALL, inject #UD, toggle interrupt-window exiting, resume."""
    a.vmread(s.RAX, "GUEST_RIP")
    a.add(s.RAX, 3)
    a.vmwrite("GUEST_RIP", s.RAX)
    a.mov(s.RAX, VALID | HARDWARE_EXCEPTION << 8 | UD)
    a.vmwrite("ENTRY_INTERRUPTION_INFORMATION", s.RAX)
    a.vmread(s.RAX, "PRIMARY_PROC_CONTROLS")
    a.emit(o.XOR, s.RAX, imm=b.INTERRUPT_WINDOW_EXITING)
    a.vmwrite("PRIMARY_PROC_CONTROLS", s.RAX)
    a.op(o.VMRESUME)


def prepared() -> Virtual:
    """A machine that has been through a few of these exits."""
    bench = virtual()
    program = bench.guest.code(guest)
    bench.guest.gate(UD, program.labels["handler"])
    bench.host(monitor)
    bench.enter(TEXT)
    if bench.engine.run(ops=2000) != BUDGET or entries(bench) < 100:
        raise RuntimeError("the guest does not come back")
    return bench


def entries(bench: Virtual) -> int:
    """VM entries of the guest so far."""
    return int(bench.engine.arena[bench.engine.owner("vm") + k.ENTRIES])


def injections() -> dict[str, float]:
    """Exits per second of wall time."""
    bench = prepared()
    before, started = entries(bench), time.perf_counter()
    bench.engine.run(ops=OPS)
    seconds = time.perf_counter() - started
    return {"exits_per_s": (entries(bench) - before) / seconds, "dispatched_ops_per_s": OPS / seconds}
