"""What KVM handles with interrupts off: commands of the x2APIC for one CPU. All others have their handler's turn."""

from __future__ import annotations

from typing import Any, Final

import pytest
from attrs import evolve

from tests.vmm.machines import DATA, STACK, Body, Machine, machine, tiny_guest
from tests.vmm.test_exits import write_msr
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.codes import PROGRAM_END
from vtsim.cpu.slots import RAX, RBX, RDX, RSP
from vtsim.guest.machine_view import PhysicalMemory, Start
from vtsim.vmm.personalities.kvm.parameters import PARAMETERS
from vtsim.vmm.programs.posted import MSR_ICR

VECTOR: Final = 0x41
SELF, LOGICAL, LOWEST, NMI, TO_ALL = 1 << 18, 1 << 11, 1 << 8, 4 << 8, 0xFFFF_FFFF << 32
FAST: Final = {"another": 1 << 32, "itself": 0}
SLOW: Final = {"shorthand": SELF, "logical": 1 << 32 | LOGICAL, "lowest": LOWEST, "NMI": NMI, "all": TO_ALL}
OFF: Final = (("fast_ipi", 0),)


def two(body: Body, *, gates: tuple[int, ...] = ()) -> Any:
    """A guest of two vCPUs: the first runs `body` and stops, the other works until then; `gates` are of interrupts."""

    def programs(a: Assembler) -> None:
        a.lea(RAX, Mem(RSP))
        a.mov(RBX, STACK)
        a.cmp(RAX, register=RBX)
        a.jcc(ops.CC_NZ, "other")
        a.st_value(Mem(displacement=DATA), 0)
        a.work(40_000)
        body(a)
        a.op(ops.STOP_OP)
        a.label("other")
        a.ld(RAX, Mem(displacement=DATA))
        if gates:
            a.op(ops.STI)
        a.label("works")
        a.work(20)
        a.jmp("works")
        for vector in gates:
            a.label(f"gate_{vector}")
            note_time(a, 1)
            write_msr(a, 0x80B, 0)
            a.op(ops.IRET)

    build = tiny_guest(programs, gates=gates)

    def with_other(memory: PhysicalMemory) -> Start:
        start: Start = build(memory)
        return evolve(start, others=(evolve(start, rsp=STACK - 2048),))

    return with_other


def note_time(a: Assembler, word: int) -> None:
    """The time goes into a word of the data."""
    a.op(ops.RDTSC)
    a.shl(RDX, 32)
    a.or_(RAX, register=RDX)
    a.st(Mem(displacement=DATA + 8 * word), RAX)


def ran(guest: Any, *parameters: tuple[str, int], **options: Any) -> Machine:
    m = machine(guest, cpus=2, vcpus=2, populate="prebuilt", parameters=parameters, **options)
    code, cpu = m.engine.run_all(1 << 26, 40)
    assert (code, cpu) == (PROGRAM_END, 0)
    m.engine.check_clock()
    return m


def longer(name: str, by: int = 100) -> tuple[str, int]:
    return name, PARAMETERS[name].value + by


@pytest.mark.parametrize("apicv", [False, True])
@pytest.mark.parametrize("kind", [*FAST, *SLOW, "switched off"])
def test_only_a_command_for_one_cpu_is_passed_by_the_handler_of_msrs(kind: str, apicv: bool) -> None:
    """How often a length is executed: so many hundreds more, if it is longer by one, and some looks at locks."""
    value, times = (FAST | SLOW).get(kind, FAST["another"]) | VECTOR, 3
    off = OFF if kind == "switched off" else ()

    def commands(a: Assembler) -> None:
        for _ in range(times):
            write_msr(a, MSR_ICR, value)
            a.work(20_000)

    def instructions(*parameters: tuple[str, int]) -> int:
        return ran(two(commands), *parameters, *off, apicv=apicv).instructions("host", ops.R0)

    names = ("fast_path", "msr", "apic_write", "skip")
    executed = {name: round((instructions(longer(name)) - instructions()) / 100) for name in names}

    fast = times if kind in FAST else 0
    slow = times - fast
    assert executed == {"fast_path": fast, "msr": slow, "apic_write": slow, "skip": times}


@pytest.mark.parametrize("off", [(), OFF], ids=["fast", "switched off"])
def test_the_interrupt_is_there_before_the_rest_of_the_senders_exit_is_over(off: tuple[tuple[str, int], ...]) -> None:
    def command(a: Assembler) -> None:
        write_msr(a, MSR_ICR, FAST["another"] | VECTOR)
        note_time(a, 2)
        a.work(200_000)

    m = ran(two(command, gates=(VECTOR,)), longer("exit_common", 100_000), *off, apicv=True)
    arrived, returned = m.data(8), m.data(16)

    assert arrived and returned
    assert (arrived < returned) == (not off)


@pytest.mark.parametrize("off", [(), OFF], ids=["fast", "switched off"])
def test_a_command_behind_sti_lets_interrupts_in_again(off: tuple[tuple[str, int], ...]) -> None:
    """So that its own interrupt needs no window to come by."""

    def command(a: Assembler) -> None:
        a.mov(RAX, 0)
        a.op(ops.CLI)
        a.op(ops.STI)
        write_msr(a, MSR_ICR, FAST["itself"] | VECTOR)
        note_time(a, 2)

    def blocked(a: Assembler) -> None:  # the command is the one instruction that STI protects
        a.mov(1, MSR_ICR)
        a.mov(RAX, VECTOR)
        a.mov(RDX, 0)
        a.op(ops.STI)
        a.op(ops.WRMSR)
        note_time(a, 2)

    for body in (command, blocked):
        m = ran(two(body, gates=(VECTOR,)), *off)

        assert 0 < m.data(8) < m.data(16)
        assert m.exits("INTERRUPT_WINDOW") == 0
