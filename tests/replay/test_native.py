"""A recorded guest without a hypervisor: counts of what was executed follow from the recording alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.replay.recordings import boot, native, profile, recording, row, trace
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.guest.replay.steps import STEPS
from vtsim.guest.traces.kinds import KINDS

NS = 1_000_000_000


def counter(engine, name: int) -> int:
    return int(engine.arena[int(engine.cpus[0][s.OWNER]) + name])


def test_every_kind_of_row_has_its_steps():
    assert set(STEPS) == {kind.name for kind in KINDS}


def test_as_many_instructions_retire_as_were_recorded():
    of = trace([row("CPUID", 10), row("OUT", 500, a0=0x10080), row("TOUCH_W", 700, a0=0x5000), row("RDTSC", 1000)])
    assert native(recording(of, profile())).cpus[0][s.RETIRED] == 1000 + 1


def test_a_literal_spin_executes_every_instruction_that_was_recorded():
    rows = [row("RDTSC", 0, n=50), row("PAUSE", 4, n=49), row("CPUID", 1000)]
    engine = native(recording(trace(rows), profile(), literal=True))
    assert engine.cpus[0][s.RETIRED] == 1000 + 1


def test_rows_that_were_merged_across_others_still_add_up():
    rows = [row("RDTSC", 0, n=90), row("IRET", 20), row("PAUSE", 25, n=85), row("CPUID", 1000)]
    engine = native(recording(trace(rows), profile(), literal=True))
    assert engine.cpus[0][s.RETIRED] == 1000 + 1


def test_a_spin_lasts_until_its_recorded_end():
    instructions = 100_000
    rows = [row("RDTSC", 0, n=10_000), row("CPUID", instructions)]
    cycles = int(native(recording(trace(rows), profile())).cpus[0][s.CYCLE])
    expected = instructions * profile().clock_hz // NS  # the recorded machine executed one a nanosecond
    assert expected <= cycles < expected + 2000


def test_work_between_waits_is_repeated_as_often_as_it_was_recorded():
    rows = [row("RDTSC", 0, n=4), row("CPUID", 40_000)]
    assert native(recording(trace(rows), profile())).cpus[0][s.RETIRED] == 40_000 + 1


def test_rings_follow_the_recording():
    rows = [
        row("CPUID", 0), row("IRET", 100), row("RDTSC", 200, cpl=3), row("SYSCALL", 300, cpl=3),
        row("SYSRET", 500), row("EXC", 600, cpl=3, a0=14), row("CPUID", 900),
    ]  # fmt: skip
    engine = native(recording(trace(rows), profile()))
    at = int(engine.cpus[0][s.OWNER]) + k.OWN_INSTRUCTIONS
    in_ring_3 = (300 - 100 - 1) + 1 + (600 - 500 - 1)
    assert int(engine.arena[at + o.R3]) == in_ring_3
    assert int(engine.arena[at + o.R0]) == 900 + 1 - in_ring_3
    assert counter(engine, k.SYSCALLS) == 1
    assert counter(engine, k.PAGE_FAULTS) == 1


def test_an_interrupt_ends_the_halt_before_it_and_no_other():
    rows = [row("HLT", 10), row("RDTSC", 50), row("IRQ", 60, a0=0xEC), row("IRQ", 500, a0=0x30), row("CPUID", 600)]
    engine = native(recording(trace(rows), profile()))
    assert counter(engine, k.HALTS) == 1
    assert counter(engine, k.INTERRUPTS) == 2
    assert engine.cpus[0][s.RETIRED] == 600 + 1


def test_a_halt_that_nothing_ended_is_left_out():
    engine = native(recording(trace([row("HLT", 10), row("CPUID", 20)]), profile()))
    assert counter(engine, k.HALTS) == 0


def test_a_device_answers_what_it_answered():
    rows = [row("MMIO_R", 0, a0=0xFEE00030, a1=0x50014, a2=4)]
    assert native(recording(trace(rows), profile())).cpus[0][s.GPR + s.RAX] == 0x50014


def test_a_store_into_a_paging_structure_is_in_memory_afterwards():
    engine = native(recording(trace([row("PTW", 0, a0=0x5008 | 1, a1=0x1234063)]), profile()))
    assert engine.load(0x5008) == 0x1234063


def test_registers_that_the_machine_does_not_have_do_not_fault():
    engine = native(recording(trace([row("RDMSR", 0, a0=0x250), row("WRMSR", 5, a0=0x250, a1=6)]), profile()))
    assert counter(engine, k.EXCEPTIONS) == 0


def test_cutting_a_replay_anywhere_changes_nothing():
    rows = [
        row("RDTSC", 0, n=40), row("PAUSE", 4, n=39), row("HLT", 900), row("IRQ", 990, a0=0xEC),
        row("PTW", 1000, a0=0x5001, a1=7), row("EXC", 1200, a0=14), row("CPUID", 1500),
    ]  # fmt: skip
    of = recording(trace(rows), profile())
    whole, cut = native(of), native(of, ops=1)
    assert (whole.arena == cut.arena).all()
    for slot in (s.CYCLE, s.RETIRED, s.OPS, s.RIP, s.PRIVILEGE):
        assert whole.cpus[0][slot] == cut.cpus[0][slot]


@pytest.mark.compiled_only
def test_the_shipped_boot_executes_every_recorded_event():
    engine = native(recording(boot(), profile(), literal=True))
    of = boot()
    counts = of.counts()
    assert counter(engine, k.SYSCALLS) == counts["SYSCALL"][1]
    assert counter(engine, k.PAGE_FAULTS) == counts["EXC"][1]
    assert counter(engine, k.EXCEPTIONS) == counts["EXC"][1] + counts["INTN"][1]
    assert counter(engine, k.INTERRUPTS) == counts["IRQ"][1]
    assert counter(engine, k.HALTS) == counts["HLT"][1]
    instructions = int(of.icount[-1]) + 1
    same_instruction = int((np.diff(of.icount[of.kind < 48]) == 0).sum())
    assert abs(int(engine.cpus[0][s.RETIRED]) - instructions) <= same_instruction
