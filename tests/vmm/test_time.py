"""Timers, interrupts on their way into guests, and vCPUs that share a CPU."""

from __future__ import annotations

from typing import Any

from tests.vmm.machines import DATA, machine, tiny_guest
from tests.vmm.test_exits import read_msr, write_msr
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, RAX, RBX, RCX, RDX, RSI

VECTOR = 0x40
DELAY = 100_000


def handler(a: Assembler) -> None:
    a.label(f"gate_{VECTOR}")
    a.mov(RBX, DATA)
    a.ld(RSI, Mem(RBX))
    a.add(RSI, 1)
    a.st(Mem(RBX), RSI)
    write_msr(a, 0x80B, 0)
    a.op(ops.IRET)


def arm(a: Assembler, delay: int = DELAY) -> None:
    a.op(ops.RDTSC)
    a.shl(RDX, 32)
    a.or_(RAX, register=RDX)
    a.add(RAX, delay)
    a.copy(RDX, RAX)
    a.shr(RDX, 32)
    a.mov(RCX, 0x6E0)
    a.op(ops.WRMSR)


def sleeper(times: int) -> Any:
    def body(a: Assembler) -> None:
        write_msr(a, 0x832, VECTOR | 2 << 17)
        a.mov(R8, times)
        a.label("again")
        arm(a)
        a.op(ops.STI)
        a.op(ops.HLT)
        a.op(ops.CLI)
        a.sub(R8, 1)
        a.jcc(ops.CC_NZ, "again")
        a.op(ops.STOP_OP)
        handler(a)

    return tiny_guest(body, gates=[VECTOR])


def worker(times: int) -> Any:
    def body(a: Assembler) -> None:
        a.mov(R8, times)
        a.label("again")
        a.work(1000)
        a.sub(R8, 1)
        a.jcc(ops.CC_NZ, "again")
        a.op(ops.STOP_OP)

    return tiny_guest(body)


def test_a_halted_guest_is_woken_by_its_deadline_timer(personality: str) -> None:
    m = machine(sleeper(3), personality=personality).run(until=10_000_000)

    assert m.finished == ["vm0"]
    assert m.data(0) == 3
    assert (m.exits("HLT"), m.exits("MSR_WRITE")) == (3, 1 + 2 * 3)
    assert int(m.engine.cpus[0][s.CYCLE]) > 3 * DELAY


def test_a_timer_that_fires_in_the_guest_costs_one_external_interrupt(personality: str) -> None:
    def body(a: Assembler) -> None:
        write_msr(a, 0x832, VECTOR | 2 << 17)
        arm(a, 20_000)
        a.op(ops.STI)
        a.mov(RBX, DATA)
        a.label("wait")
        a.ld(RAX, Mem(RBX))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_Z, "wait")
        a.op(ops.STOP_OP)
        handler(a)

    m = machine(tiny_guest(body, gates=[VECTOR]), personality=personality).run(until=10_000_000)

    assert (m.finished, m.data(0)) == (["vm0"], 1)
    assert m.exits("EXTERNAL_INTERRUPT") == 1


def test_an_interrupt_waits_for_the_guest_to_open_its_window(personality: str) -> None:
    def body(a: Assembler) -> None:
        write_msr(a, 0x83F, VECTOR)
        a.ld(RBX, Mem(displacement=DATA))
        a.st(Mem(displacement=DATA + 8), RBX)
        a.op(ops.STI)
        a.op(ops.NOP)
        a.op(ops.CLI)
        a.op(ops.STOP_OP)
        handler(a)

    m = machine(tiny_guest(body, gates=[VECTOR]), personality=personality).run()

    assert (m.data(8), m.data(0)) == (0, 1)
    assert m.exits("INTERRUPT_WINDOW") == 1


def test_an_interrupt_below_the_task_priority_waits_until_it_is_lowered(personality: str) -> None:
    def body(a: Assembler) -> None:
        a.mov(RAX, VECTOR >> 4)
        a.op(ops.MOV_TO_CR, RAX, imm=8)
        write_msr(a, 0x83F, VECTOR)
        a.op(ops.STI)
        a.op(ops.NOP)
        a.ld(RBX, Mem(displacement=DATA))
        a.st(Mem(displacement=DATA + 8), RBX)
        a.mov(RAX, 0)
        a.op(ops.MOV_TO_CR, RAX, imm=8)
        a.op(ops.NOP)
        a.op(ops.STOP_OP)
        handler(a)

    m = machine(tiny_guest(body, gates=[VECTOR]), personality=personality).run()

    assert (m.data(8), m.data(0)) == (0, 1)
    assert m.exits("TPR_BELOW_THRESHOLD") == 1


def test_the_initial_count_register_times_too(personality: str) -> None:
    def body(a: Assembler) -> None:
        write_msr(a, 0x832, VECTOR)
        write_msr(a, 0x838, DELAY)
        read_msr(a, 0x838)
        a.st(Mem(displacement=DATA + 8), RAX)
        a.op(ops.STI)
        a.op(ops.HLT)
        a.op(ops.STOP_OP)
        handler(a)

    m = machine(tiny_guest(body, gates=[VECTOR]), personality=personality, profile="nehalem-ep").run(until=10_000_000)

    assert (m.finished, m.data(0), m.data(8)) == (["vm0"], 1, DELAY)


def test_vms_of_one_cpu_take_turns_and_all_finish(personality: str) -> None:
    m = machine(worker(600), sleeper(3), worker(200), personality=personality, tick_ns=20_000).run(until=10_000_000)

    assert sorted(m.finished) == ["vm0", "vm1", "vm2"]
    assert m.finished[0] == "vm2"  # the shortest of the workers, which share fairly
    assert m.data(0, vm=1) == 3
    assert m.exits("EXTERNAL_INTERRUPT", vm="vm0") > 0


def test_without_a_tick_the_first_vm_keeps_its_cpu(personality: str) -> None:
    m = machine(worker(300), worker(200), personality=personality, tick_ns=1_000_000_000).run()

    assert m.finished == ["vm0", "vm1"]


def test_switching_vms_keeps_the_msrs_of_each(personality: str) -> None:
    def guest(value: int) -> Any:
        def body(a: Assembler) -> None:
            for n, index in enumerate((0xC000_0082, 0xC000_0102)):
                write_msr(a, index, value + n)
            a.mov(R8, 200)
            a.label("again")
            a.work(1000)
            a.sub(R8, 1)
            a.jcc(ops.CC_NZ, "again")
            for n, index in enumerate((0xC000_0082, 0xC000_0102)):
                read_msr(a, index)
                a.st(Mem(displacement=DATA + 8 * n), RAX)
            a.op(ops.STOP_OP)

        return tiny_guest(body)

    m = machine(guest(0x1000), guest(0x2000), personality=personality, tick_ns=10_000).run(until=10_000_000)

    assert [m.data(8 * n, vm=vm) for vm in (0, 1) for n in (0, 1)] == [0x1000, 0x1001, 0x2000, 0x2001]


def test_switching_vms_keeps_where_the_last_page_fault_of_each_was(personality: str) -> None:
    """CR2 is in no VMCS: a guest that is preempted on its way to reading it finds its own."""

    def guest(address: int) -> Any:
        def body(a: Assembler) -> None:
            a.mov(RAX, address)
            a.emit(ops.MOV_TO_CR, RAX, imm=2)
            a.mov(R8, 200)
            a.label("again")
            a.work(1000)
            a.sub(R8, 1)
            a.jcc(ops.CC_NZ, "again")
            a.emit(ops.MOV_FROM_CR, RAX, imm=2)
            a.st(Mem(displacement=DATA), RAX)
            a.op(ops.STOP_OP)

        return tiny_guest(body)

    m = machine(guest(0x1000), guest(0x2000), personality=personality, tick_ns=10_000).run(until=10_000_000)

    assert [m.data(0, vm=vm) for vm in (0, 1)] == [0x1000, 0x2000]


def test_vms_on_two_cpus_run_beside_each_other(personality: str) -> None:
    m = machine(worker(20), worker(30), personality=personality, cpus=2)

    m.run(cpu=0)
    m.run(cpu=1)

    assert m.finished == ["vm0", "vm1"]
