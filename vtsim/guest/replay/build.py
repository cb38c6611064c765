"""Lays a recorded guest into a machine: rows in the window, memory untouched, the vCPU as at power-on."""

from __future__ import annotations

from typing import Final

import numpy as np
from attrs import evolve, frozen

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError, ModelError
from vtsim.cpu import ops as o
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels import replay as e
from vtsim.guest.machine_view import PhysicalMemory, Start
from vtsim.guest.replay.lower import Lowered, lower
from vtsim.guest.spec import GuestSpec, ReplaySpec
from vtsim.guest.traces.format import Trace
from vtsim.guest.traces.kinds import NUMBER
from vtsim.guest.traces.paging import CR0_PG, registers_at_start

LOG_WORDS: Final = 2
DEVICE_KINDS: Final = ("IN", "OUT", "MMIO_R", "MMIO_W")
LINES: Final = 64
LOADED_FROM: Final = 0x100  # frame; a PC's loader puts kernel and files above 1 MiB, by DMA that is not recorded
RESET_RFLAGS: Final = 2 | 3 << 12  # what the guest did to IOPL was not recorded, but that it saw no fault was


@frozen(kw_only=True, eq=False)
class Recording:
    """A trace and what it becomes on a CPU."""

    trace: Trace
    lowered: Lowered

    @property
    def log_entries(self) -> int:
        """Room for exits in the log: twice for every row and for every access to a device."""
        device = np.isin(self.trace.kind, [NUMBER[name] for name in DEVICE_KINDS])
        return 2 * (len(self.lowered) + int(self.trace.n[device].sum()))

    @property
    def words(self) -> int:
        """Room that it takes of the engine's extra words."""
        return len(self.lowered) * o.ROW_WORDS + self.log_entries * LOG_WORDS + LINES


def recording_of(guest: GuestSpec, clock_hz: int, shadow: bool = False) -> Recording | None:
    """The recording that a guest replays, lowered; None if it replays none."""
    phases = [phase for process in guest.processes for phase in process.phases]
    specs = [phase for phase in phases if isinstance(phase, ReplaySpec)]
    if not specs:
        return None
    if len(phases) > 1:
        raise ConfigError(
            "a recorded guest has its own kernel and processes: nothing else can run beside it",
            field="processes",
            help="give primitive 'replay' a VM of its own",
        )
    trace = Trace.load(specs[0].trace)
    try:
        lowered = lower(trace, clock_hz, literal=specs[0].spins == "literal", shadow=shadow)
    except ConfigError as error:
        raise ConfigError.of(evolve(problem, file=specs[0].trace) for problem in error.problems) from None
    return Recording(trace=trace, lowered=lowered)


def lay_out(engine: Engine, recording: Recording, at: int) -> int:
    """Put the rows into the arena from offset `at` on; the linear address of the first.

    A machine replays one recording.
    """
    a = engine.arena
    if a[mem.A_REPLAY_COUNT]:
        raise ModelError("a machine replays one recording", {"rows": int(a[mem.A_REPLAY_COUNT])})
    rows = recording.lowered.rows
    end = at + rows.size
    a[at:end] = rows.reshape(-1)
    a[mem.A_REPLAY_ROWS], a[mem.A_REPLAY_COUNT] = at, len(rows)
    a[mem.A_REPLAY_LINES] = end
    a[mem.A_REPLAY_LOG], a[mem.A_REPLAY_LOG_LIMIT] = end + LINES, recording.log_entries
    return o.REPLAY_BASE


def _find_fills(memory: PhysicalMemory) -> None:
    """Tell rows that fill the guest's tables where in the host's memory these stand."""
    a = memory.engine.arena
    at, count = int(a[mem.A_REPLAY_ROWS]), int(a[mem.A_REPLAY_COUNT])
    rows = a[at : at + count * o.ROW_WORDS].reshape(count, o.ROW_WORDS)
    fills = (rows[:, o.ROW_META] & 0xFF == o.REPLAY_EVENT) & np.isin(rows[:, o.ROW_R1], (e.FILL, e.CLEAR))
    for row in np.nonzero(fills)[0].tolist():
        gpa = int(rows[row, o.ROW_IMM])
        rows[row, o.ROW_EXTRA] = memory.frame(gpa >> 12) << 12 | gpa & 0xFFF


def build_replay(recording: Recording, memory: PhysicalMemory, at: int) -> Start:
    """Lay out a recorded guest; the state in which its vCPU starts, that of the first recorded row."""
    need = recording.trace.guest.memory_bytes
    if memory.size < need:
        raise ConfigError(
            f"the recorded guest had {need} bytes of memory, the VM has {memory.size}",
            field="memory",
            help=f"memory can be {need} B",
        )
    rip = lay_out(memory.engine, recording, at)
    for first, end in mem.gfn_ranges(need):
        for gfn in range(max(first, LOADED_FROM), end):
            memory.frame(gfn)
    _find_fills(memory)
    cr0, cr4, efer = registers_at_start(recording.trace)
    cr3 = int(recording.trace.cr3[0]) if cr0 & CR0_PG else 0
    return Start(
        rip=rip, rsp=0, rflags=RESET_RFLAGS, cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, idtr_base=0, idtr_limit=0x3FF,
        gdtr_base=0, gdtr_limit=0xFFFF, tr_base=0, cpl=recording.lowered.cpl, msrs={}, gs_base=0, fs_base=0,
    )  # fmt: skip
