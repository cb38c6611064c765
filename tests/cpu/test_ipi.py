"""Interrupts from one CPU to another arrive a latency after they were sent, whatever the order the CPUs ran in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attrs import define

from tests.cpu.bench import DATA, TEXT, Space, Write, machine
from tests.cpu.programs import HOW
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.codes import FOREVER
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels.ipi import FLIGHTS

PING, PONG = 0x55, 0x66
HANDLER = TEXT + 0x2000
LOG = DATA + 0x1000  # times at which handlers began
OTHERS, ALL = 3 << 18, 2 << 18
NMI = 4 << 8
KEPT = {s.R8: s.RAX, s.R9: s.RCX, s.R10: s.RDX}  # by handlers
# what two CPUs share beside interrupts, in the order in which they run
NO_L3 = {"cache.l3.bytes": 0, "dram.bandwidth": 10_000_000}


def command(a: Assembler, target: int, what: int) -> None:
    """Write the ICR."""
    a.mov(s.RCX, 0x830)
    a.mov(s.RAX, what)
    a.mov(s.RDX, target)
    a.op(o.WRMSR)


def now(a: Assembler) -> None:
    """The time in RAX."""
    a.op(o.RDTSC)
    a.shl(s.RDX, 32)
    a.or_(s.RAX, register=s.RDX)


def log(a: Assembler) -> None:
    """Begin a handler: add the time to the log; R15 is how many there are."""
    for kept, register in KEPT.items():
        a.copy(kept, register)
    now(a)
    a.mov(s.RBX, LOG)
    a.st(Mem(s.RBX, 0, index=s.R15, scale=8), s.RAX)
    a.add(s.R15, 1)


def leave(a: Assembler) -> None:
    a.mov(s.RCX, 0x80B)
    a.mov(s.RAX, 0)
    a.mov(s.RDX, 0)
    a.op(o.WRMSR)
    for kept, register in KEPT.items():
        a.copy(register, kept)
    a.op(o.IRET)


@define(eq=False)
class Pair:
    """Two CPUs, each with a program and a memory of its own."""

    engine: Engine
    spaces: list[Space]

    @property
    def cpus(self) -> np.ndarray:
        return self.engine.cpus

    def run(self, until: int, quantum: int = 1) -> None:
        assert self.engine.run_all(until, quantum) == (0, -1)

    def times(self, cpu: int) -> list[int]:
        """What a CPU logged."""
        return [self.spaces[cpu].get(LOG + 8 * n) for n in range(int(self.cpus[cpu][s.GPR + s.R15]))]

    def state(self) -> bytes:
        """All that programs can know, and all statistics."""
        cpus = self.cpus.copy()
        cpus[:, list(HOW)] = 0
        return bytes(cpus.tobytes())


Gates = dict[int, Write]


def two(first: Write, second: Write, gates: tuple[Gates, Gates]) -> Pair:
    pair = Pair(machine(NO_L3, cpus=2), [])
    for cpu, (write, handlers) in enumerate(zip((first, second), gates, strict=True)):
        space = Space(pair.engine)
        for n, (vector, handler) in enumerate(handlers.items()):
            space.gate(vector, HANDLER + 0x1000 * n)
            space.code(handler, HANDLER + 0x1000 * n)
        space.code(write, TEXT)
        m = pair.cpus[cpu]
        for slot, value in space.state(TEXT).items():
            m[slot] = value
        m[s.GPR + s.RSP] = space.stack(0)
        m[s.PRIVILEGE] = o.R0
        pair.engine.sync(cpu)
        pair.spaces.append(space)
    return pair


def idle(a: Assembler) -> None:
    a.op(o.STI)
    a.label("idle")
    a.op(o.HLT)
    a.jmp("idle")


def busy(a: Assembler) -> None:
    a.op(o.STI)
    a.label("busy")
    a.work(1)
    a.jmp("busy")


def handler(a: Assembler) -> None:
    log(a)
    leave(a)


def once(target: int, what: int) -> Write:
    def write(a: Assembler) -> None:
        a.work(3000)
        command(a, target, what)
        idle(a)

    return write


def latency(pair: Pair) -> int:
    return int(pair.engine.profile.cycles(pair.engine.profile.latency.ipi_ns))


def sent(what: int, target: int = 1, receiver: Write = idle) -> tuple[Pair, int]:
    """A machine just after the ICR was written, and when that was."""
    pair = two(once(target, what), receiver, ({PING: handler}, {PING: handler, 2: handler}))
    until = 1
    while int(pair.cpus[1][s.IPI_COUNT]) == 0 and until < 20_000:
        pair.run(until)
        until += 1
    return pair, int(pair.cpus[0][s.CYCLE])


def test_an_interrupt_is_on_its_way_for_the_latency_of_the_profile() -> None:
    pair, at = sent(PING)
    assert int(pair.cpus[1][s.IPI_AT]) == at + latency(pair)
    assert latency(pair) > 0
    pair.run(at + latency(pair) - 1, 1)
    assert (int(pair.cpus[1][s.APIC_PENDING]), pair.times(1)) == (0, [])
    pair.run(at + latency(pair) + 20_000, 1)
    assert len(pair.times(1)) == 1
    assert (int(pair.cpus[1][s.IPI_COUNT]), int(pair.cpus[1][s.IPI_AT])) == (0, FOREVER)


@pytest.mark.parametrize("receiver", [idle, busy])
def test_it_is_taken_as_a_timer_of_that_cycle_would_be(receiver: Write) -> None:
    pair, at = sent(PING, receiver=receiver)
    arrival = int(pair.cpus[1][s.IPI_AT])
    pair.run(arrival + 20_000, latency(pair))

    alone = two(idle, receiver, ({}, {PING: handler}))
    alone.run(at, 1)
    timed = alone.cpus[1]
    timed[s.APIC_TIMER_VECTOR], timed[s.APIC_DEADLINE] = PING, arrival
    alone.run(arrival + 20_000, latency(pair))
    assert pair.times(1) == alone.times(1) != []


@pytest.mark.parametrize(
    ("what", "target", "arrived"),
    [
        (PING, 1, [0, 1]),
        (PING, 0, [1, 0]),
        (PING, 7, [0, 0]),
        (PING | OTHERS, 0, [0, 1]),
        (PING | ALL, 0, [1, 1]),
        (NMI, 1, [0, 1]),
        (NMI | OTHERS, 0, [0, 1]),
        (5 << 8, 1, [0, 0]),  # INIT
    ],
)
def test_the_command_says_who_is_interrupted(what: int, target: int, arrived: list[int]) -> None:
    pair, _ = sent(what, target)
    pair.run(40_000, latency(pair))
    assert [len(pair.times(cpu)) for cpu in (0, 1)] == arrived


def conversation(rounds: int, receiver: Write = idle) -> Pair:
    """CPU 0 pings after different pauses, without waiting; CPU 1 answers each."""

    def pings(a: Assembler) -> None:
        a.mov(s.R14, rounds)
        a.op(o.STI)
        a.label("again")
        a.work(5000)
        command(a, 1, PING)
        a.copy(s.RCX, s.R14)
        a.shl(s.RCX, 8)
        a.emit(o.LONG_WORK)
        command(a, 1, PING + 1)
        a.sub(s.R14, 1)
        a.jcc(o.CC_NZ, "again")
        idle(a)

    def answers(a: Assembler) -> None:
        log(a)
        command(a, 0, PONG)
        leave(a)

    return two(pings, receiver, ({PONG: handler}, {PING: answers, PING + 1: handler}))


END = 200_000


@pytest.mark.parametrize("receiver", [idle, busy])
def test_every_quantum_up_to_the_latency_gives_the_same(receiver: Write) -> None:
    found = {}
    longest = latency(conversation(1))
    for quantum in (37, 100, longest // 2, longest - 1, longest, 30 * longest):
        pair = conversation(12, receiver)
        pair.run(END, quantum)
        found[quantum] = (pair.state(), pair.times(0), pair.times(1))
    late = found.pop(30 * longest)
    assert len(found[longest][2]) >= 12
    assert all(each == found[longest] for each in found.values())
    assert late != found[longest]


def test_slices_and_restoring_an_interrupt_on_its_way_change_no_byte() -> None:
    whole, cut = conversation(6), conversation(6)
    quantum = latency(whole)
    whole.run(END, quantum)
    kept: list[Any] = []
    for until in range(0, END, 777):
        cut.run(until, quantum)
        if not kept and int(cut.cpus[1][s.IPI_COUNT]):
            kept.append(cut.engine.save())
            cut.run(END, quantum)
            assert cut.state() == whole.state()
            cut.engine.restore(kept[0])
    cut.run(END, quantum)
    assert kept
    assert (cut.state(), cut.times(1)) == (whole.state(), whole.times(1))


def test_more_interrupts_than_there_is_room_for_arrive_all_the_same() -> None:
    count = FLIGHTS + 8

    def write(a: Assembler) -> None:
        for n in range(count):
            command(a, 1, 0x40 + n)
        idle(a)

    pair = two(write, lambda a: (a.mov(s.RAX, 1), a.label("on"), a.work(1), a.jmp("on"))[0], ({}, {}))
    for m in pair.cpus:
        m[s.PRICE + o.WRMSR] = m[s.P_WRMSR_X2APIC] = 1
        m[s.IPI_CYCLES] = 50_000
    pair.run(END + 50_000, 1000)
    requested = sum(int(pair.cpus[1][s.APIC_IRR + n]).bit_count() for n in range(4))
    assert requested == count
    assert int(pair.cpus[1][s.IPI_COUNT]) == 0
