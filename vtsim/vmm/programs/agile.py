"""Agile paging: what the hypervisor does beside shadow paging, to move tables of the guest between both ways.

Writes to a shadowed table exit and are emulated; after so many in an interval the table is nested, and the guest writes
it without an exit. At the end of an interval, which is a timer of the host's, tables that were not written are shadowed
again.

SDM: "EPT Violations".
Not modelled: under agile paging, a walker that sets flags in shadow and guest tables at once; host memory that is given
on demand (all of it is mapped before the guest starts); a guest that leaves IA32_EFER.NXE clear, of whose nested tables
bit 63 refuses fetches, as in shadow tables, where it is reserved.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.kernels import shadow_hooks as h
from vtsim.cpu.slots import R12, R13, RAX, RCX, RDI, RDX, RSI
from vtsim.ept import spec as e
from vtsim.vmm import layout as at
from vtsim.vmm.programs import daemons
from vtsim.vmm.programs import shadow_shared as shared
from vtsim.vmm.programs.timer import begin_daemon, end_daemon
from vtsim.vmm.programs.words import vcpu, work, zero
from vtsim.vmm.registry import Path


def scan(a: Assembler, path: Path) -> None:
    """`agile_due`: an interval is over; tables of the VM that were not written in it are shadowed again."""
    begin_daemon(a, path, daemons.AGILE)
    shared.begin(a, path, daemons.AGILE.cause)
    work(a, path, "synchronize")
    a.ld(RDI, vcpu("SHADOW"))
    a.hook(h.AGILE_SCAN)
    a.call("shadow_settle")
    shared.end(a, path)
    end_daemon(a, path, daemons.AGILE, "agile_period")


def note(a: Assembler, path: Path) -> None:
    """A store to the table at R13 was emulated, and the tables are still ours: nested from now on?"""
    if path.vmm.paging != "agile":
        return
    a.copy(RSI, R13)
    a.mov(RCX, path["agile_writes"])
    a.ld(RDI, vcpu("SHADOW"))
    a.hook(h.AGILE_NOTE)
    a.call("shadow_settle")


def violation(a: Assembler, path: Path) -> None:
    """EPT refuses an access at R13, qualification R12: it is a device's, or a write to a table that is shadowed."""
    a.test(R12, e.Q_RIGHTS_ANY)
    a.jcc(ops.CC_Z, "emulate")
    shared.begin(a, path, at.FOR_WRITES)
    a.copy(RSI, R13)
    a.copy(RDX, R12)
    a.ld(RDI, vcpu("SHADOW"))
    a.hook(h.AGILE_WRITE)
    a.copy(R12, RAX)
    a.call("shadow_settle")
    shared.end(a, path)
    a.test(R12, register=R12)
    a.jcc(ops.CC_Z, "reenter")
    zero(a, R12)
    a.jmp("table_write_at")
