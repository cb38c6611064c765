"""Exits and what the two personalities make of them."""

from __future__ import annotations

import pytest

from tests.vmm.machines import DATA, STACK, Body, Machine, machine, tiny_guest
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.profile import load_profile
from vtsim.cpu.slots import R8, RAX, RBX, RCX, RDX
from vtsim.vmcs import bits as b
from vtsim.vmm.guest_view import HYPERVISOR_LEAF, SIGNATURE
from vtsim.vmm.personalities.kvm.parameters import PARAMETERS

TABLES = 4  # paging structures that lead to one page of the guest
DEVICE = DATA + (1 << 30)


def repeat(times: int, emit: Body) -> Body:
    def body(a: Assembler) -> None:
        a.mov(R8, times)
        a.label("again")
        emit(a)
        a.sub(R8, 1)
        a.jcc(ops.CC_NZ, "again")
        a.op(ops.STOP_OP)

    return body


def once(emit: Body) -> Body:
    def body(a: Assembler) -> None:
        emit(a)
        a.op(ops.STOP_OP)

    return body


def keep(a: Assembler, register: int, word: int) -> None:
    a.st(Mem(displacement=DATA + 8 * word), register)


def cpuid(a: Assembler) -> None:
    a.mov(RAX, HYPERVISOR_LEAF)
    a.op(ops.CPUID)


def port(a: Assembler, op: int, number: int, size: int = 4) -> None:
    a.mov(RDX, number)
    a.op(op, r2=RDX, mem=Mem(size=size))


def read_msr(a: Assembler, index: int) -> None:
    a.mov(RCX, index)
    a.op(ops.RDMSR)
    a.shl(RDX, 32)
    a.or_(RAX, register=RDX)


def write_msr(a: Assembler, index: int, value: int) -> None:
    a.mov(RCX, index)
    a.mov(RAX, value & 0xFFFF_FFFF)
    a.mov(RDX, value >> 32)
    a.op(ops.WRMSR)


def test_every_cpuid_exits_once_and_answers_from_the_virtual_table(personality: str) -> None:
    def body(a: Assembler) -> None:
        cpuid(a)
        keep(a, RBX, 0)
        keep(a, RCX, 1)
        keep(a, RDX, 2)

    m = machine(tiny_guest(repeat(5, body)), personality=personality).run()

    assert m.finished == ["vm0"]
    assert m.exits("CPUID") == 5
    assert tuple(m.data(8 * n) for n in range(3)) == SIGNATURE


def test_a_page_costs_one_violation_and_so_does_each_table_that_leads_to_it(personality: str) -> None:
    m = machine(tiny_guest(once(lambda a: a.work(1))), personality=personality).run()

    assert m.exits() == {"EPT_VIOLATION": TABLES + 1}


def test_memory_that_is_mapped_beforehand_never_faults(personality: str) -> None:
    m = machine(tiny_guest(repeat(3, cpuid)), personality=personality, populate="prebuilt", memory=16 << 20).run()

    assert m.exits() == {"CPUID": 3}


@pytest.mark.parametrize("profile", ["nehalem-ep", "snb-e5-2450", "skx-4114", "clx-6252", "clx-8269cy"])
def test_the_hardware_part_is_exits_and_entries_times_their_prices(personality: str, profile: str) -> None:
    m = machine(tiny_guest(repeat(7, cpuid)), personality=personality, profile=profile).run()

    exits = sum(m.exits().values())
    transitions = load_profile(profile).transitions
    assert m.cycles("host", ops.R0, ops.VM_EXIT) == exits * transitions.vm_exit_cycles
    assert m.cycles("host", ops.R0, ops.VM_ENTRY) == (exits + 1) * transitions.vm_entry_cycles


def test_a_port_of_the_kernel_never_reaches_user_space_and_holds_what_was_written() -> None:
    def body(a: Assembler) -> None:
        a.mov(RAX, 0x5A)
        port(a, ops.OUT, 0x4D0, 1)
        a.mov(RAX, 0x1100)
        port(a, ops.IN, 0x4D0, 1)
        keep(a, RAX, 0)

    m = machine(tiny_guest(once(body))).run()

    assert m.exits("IO_INSTRUCTION") == 2
    assert m.data(0) == 0x115A
    assert m.instructions("host", ops.R3) == 0


@pytest.mark.parametrize("number", [0x4D0, 0x1234])
def test_without_a_fast_way_the_emulator_reads_an_in_but_no_out(number: int) -> None:
    def guest(op: int) -> Body:
        def body(a: Assembler) -> None:
            a.mov(RAX, 0x5A)
            port(a, op, number)
            keep(a, RAX, 0)

        return once(body)

    def ways(op: int) -> tuple[Machine, Machine]:
        fast, slow = (machine(tiny_guest(guest(op)), parameters=(("fast_pio_in", n),)).run() for n in (1, 0))
        assert fast.exits() == slow.exits()
        assert fast.data(0) == slow.data(0)
        return fast, slow

    def instructions(m: Machine) -> int:
        return m.instructions("host", ops.R0)

    asked = {name: one.value for name, one in PARAMETERS.items()}["emulate_in"]
    fast, slow = ways(ops.IN)
    assert instructions(slow) - instructions(fast) > asked  # and reading its bytes by the guest's tables
    fast, slow = ways(ops.OUT)
    assert instructions(slow) - instructions(fast) < asked / 100


def test_every_other_port_is_a_trip_to_user_space_and_back() -> None:
    def body(a: Assembler) -> None:
        port(a, ops.IN, 0x1234)
        keep(a, RAX, 0)

    one, three = (machine(tiny_guest(repeat(n, body))).run() for n in (1, 3))

    assert one.data(0) == 0xFFFF_FFFF
    assert one.instructions("host", ops.R3) > 0
    assert three.instructions("host", ops.R3) == 3 * one.instructions("host", ops.R3)


def test_a_device_of_the_vm_answers_in_both_personalities(personality: str) -> None:
    def body(a: Assembler) -> None:
        a.mov(RAX, 0x77)
        port(a, ops.OUT, 0xF4, 1)
        a.mov(RAX, 0)
        port(a, ops.IN, 0xF4, 1)
        keep(a, RAX, 0)
        port(a, ops.IN, 0x608)
        keep(a, RAX, 1)
        port(a, ops.IN, 0x608)
        keep(a, RAX, 2)

    m = machine(tiny_guest(once(body)), personality=personality).run()

    assert m.data(0) == 0x77
    assert 0 < m.data(8) <= m.data(16) < 1 << 24


def test_a_write_that_can_wait_reaches_user_space_with_the_next_trip() -> None:
    def body(a: Assembler) -> None:
        a.mov(RAX, 0x8000_0000)
        port(a, ops.OUT, 0xCF8)

    m = machine(tiny_guest(repeat(4, body))).run()

    assert m.exits("IO_INSTRUCTION") == 4
    assert m.instructions("host", ops.R3) == 0


def test_device_memory_misses_once_and_is_misconfigured_from_then_on(personality: str) -> None:
    def body(a: Assembler) -> None:
        a.mov(RAX, 0x1234_5678)
        a.st(Mem(displacement=DEVICE + 0x10, size=4), RAX)
        a.ld(RBX, Mem(displacement=DEVICE + 0x10, size=4))
        a.ld(RBX, Mem(displacement=DEVICE + 0x10, size=4))
        keep(a, RBX, 0)

    m = machine(tiny_guest(once(body), devices=[0xFEC0_0000]), personality=personality).run()

    assert m.exits("EPT_MISCONFIG") == 2
    assert m.data(0) == 0x1234_5678
    assert m.instructions("host", ops.R3) == 0


def test_device_memory_that_nobody_knows_reads_as_ones(personality: str) -> None:
    def body(a: Assembler) -> None:
        a.ld(RBX, Mem(displacement=DEVICE, size=2))
        keep(a, RBX, 0)

    m = machine(tiny_guest(once(body), devices=[0xFED0_0000]), personality=personality).run()

    assert m.data(0) == 0xFFFF
    assert (m.instructions("host", ops.R3) > 0) == (personality == "kvm")


def test_kvm_tries_a_load_from_the_local_apic_once_more_before_it_emulates_it() -> None:
    def loads(a: Assembler) -> None:
        for _ in range(3):
            a.ld(RBX, Mem(displacement=DEVICE + 0x30, size=4))

    def stores(a: Assembler) -> None:
        for _ in range(3):
            a.st(Mem(displacement=DEVICE + 0x370, size=4), RBX)

    none, load, store = (
        machine(tiny_guest(once(body), devices=[0xFEE0_0000])).run().exits("EPT_VIOLATION")
        for body in (lambda a: a.work(1), loads, stores)
    )

    first = 2  # tables on the way to the page
    assert load == none + first + 2 * 3
    assert store == none + first + 3


def test_msrs_hold_what_the_guest_writes(personality: str) -> None:
    def body(a: Assembler) -> None:
        for n, index in enumerate((0xC000_0081, 0xC000_0082, 0x3A, 0xC000_0102)):
            write_msr(a, index, 0x1234_5678_0000 + n)
            read_msr(a, index)
            keep(a, RAX, n)

    m = machine(tiny_guest(once(body)), personality=personality).run()

    assert [m.data(8 * n) for n in range(4)] == [0x1234_5678_0000 + n for n in range(4)]
    assert (m.exits("MSR_WRITE"), m.exits("MSR_READ")) == (3, 3)  # KERNEL_GS_BASE passes


def test_adjusting_the_tsc_moves_guest_time_by_as_much(personality: str) -> None:
    jump = 1 << 40

    def body(a: Assembler) -> None:
        read_msr(a, 0x10)
        keep(a, RAX, 0)
        write_msr(a, 0x3B, jump)
        read_msr(a, 0x3B)
        keep(a, RAX, 1)
        read_msr(a, 0x10)
        keep(a, RAX, 2)

    m = machine(tiny_guest(once(body)), personality=personality).run()

    assert m.data(8) == jump
    assert jump < m.data(16) - m.data(0) < jump + (1 << 20)
    assert m.exits("MSR_READ") == 1  # reading the TSC passes


def test_an_unknown_msr_is_a_general_protection_fault_of_the_guest(personality: str) -> None:
    def body(a: Assembler) -> None:
        read_msr(a, 0x4711)
        a.op(ops.STOP_OP)
        a.label("gate_13")
        a.pop(RAX)
        keep(a, RAX, 1)
        a.mov(RBX, 1)
        keep(a, RBX, 0)
        a.op(ops.STOP_OP)

    m = machine(tiny_guest(body, gates=[13]), personality=personality).run()

    assert m.finished == ["vm0"]
    assert (m.data(0), m.data(8)) == (1, 0)


def test_unknown_msrs_can_be_ignored() -> None:
    def body(a: Assembler) -> None:
        a.mov(RAX, 7)
        read_msr(a, 0x4711)
        keep(a, RAX, 0)

    m = machine(tiny_guest(once(body)), parameters=(("ignore_msrs", 1),)).run()

    assert m.finished == ["vm0"]


@pytest.mark.parametrize(("shadow", "exits"), [(True, 0), (False, 8)])
def test_a_tpr_shadow_saves_every_exit_for_cr8(personality: str, shadow: bool, exits: int) -> None:
    def body(a: Assembler) -> None:
        a.mov(RAX, 5)
        a.op(ops.MOV_TO_CR, RAX, imm=8)
        a.op(ops.MOV_FROM_CR, RBX, imm=8)
        keep(a, RBX, 0)

    m = machine(tiny_guest(repeat(4, body)), personality=personality, tpr_shadow=shadow).run()

    assert m.exits("CR_ACCESS") == exits
    assert m.data(0) == 5


@pytest.mark.parametrize(
    ("bit", "op", "reason"),
    [
        (b.RDTSC_EXITING, ops.RDTSC, "RDTSC"),
        (b.RDTSC_EXITING, ops.RDTSCP, "RDTSCP"),
        (b.PAUSE_EXITING, ops.PAUSE, "PAUSE_INSTRUCTION"),
    ],
)
def test_setting_one_control_adds_exactly_its_exits(personality: str, bit: int, op: int, reason: str) -> None:
    def run(more: int) -> dict[str, int]:
        m = machine(tiny_guest(repeat(6, lambda a: a.op(op))), personality=personality)
        words = m.engine.contents(m.vcpu.vmcs, 2)
        words[m.slot("PRIMARY_PROC_CONTROLS")] |= more
        exits: dict[str, int] = m.run().exits()
        return exits

    without, with_ = run(0), run(bit)

    assert reason not in without
    assert with_ == without | {reason: 6}


def test_the_guests_cr3_is_its_own_under_ept() -> None:
    def body(a: Assembler) -> None:
        a.op(ops.MOV_FROM_CR, RAX, imm=3)
        a.op(ops.MOV_TO_CR, RAX, imm=3)

    m = machine(tiny_guest(repeat(9, body))).run()

    assert "CR_ACCESS" not in m.exits()


def test_six_accesses_to_debug_registers_in_a_row_are_one_exit() -> None:
    m = machine(tiny_guest(repeat(6, lambda a: a.op(ops.MOV_FROM_DR, RAX, imm=7)))).run()

    assert m.exits("DR_ACCESS") == 1


def test_an_exit_between_them_makes_the_next_access_to_a_debug_register_exit_again() -> None:
    def body(a: Assembler) -> None:
        a.op(ops.MOV_FROM_DR, RAX, imm=7)
        cpuid(a)

    m = machine(tiny_guest(repeat(6, body))).run()

    assert m.exits("DR_ACCESS") == 6


def test_an_unknown_hypercall_answers_minus_1000_and_leaves_other_registers_alone() -> None:
    def body(a: Assembler) -> None:
        a.mov(RBX, 0x1234)
        a.op(ops.VMCALL)
        keep(a, RAX, 0)
        keep(a, RBX, 1)

    m = machine(tiny_guest(once(body))).run()

    assert (m.data(0), m.data(8)) == (-1000, 0x1234)


def test_exits_keep_the_stack_and_every_register_of_the_guest(personality: str) -> None:
    kept = [r for r in range(16) if r not in (RAX, s.RSP)]

    def body(a: Assembler) -> None:
        for r in kept:
            a.mov(r, 0x1000 + r)
        a.push(RBX)
        a.op(ops.WBINVD)
        a.op(ops.XSETBV)
        a.op(ops.VMCALL)
        a.pop(RAX)
        for n, r in enumerate(kept):
            keep(a, r, n)
        keep(a, s.RSP, 20)

    m = machine(tiny_guest(once(body)), personality=personality).run()

    assert [m.data(8 * n) for n in range(len(kept))] == [0x1000 + r for r in kept]
    assert m.data(160) == STACK


def test_a_guest_without_a_handler_ends_with_the_reason_and_nobody_else(personality: str) -> None:
    m = machine(tiny_guest(once(lambda a: a.op(ops.UD))), tiny_guest(repeat(3, cpuid)), personality=personality).run()

    assert [m.hypervisor.death(vcpu) for vcpu in m.hypervisor.vcpus] == ["VM exit TRIPLE_FAULT", "finished"]
    assert m.exits("CPUID", vm="vm1") == 3


def test_vmx_in_the_guest_ends_it_with_the_excuse(personality: str) -> None:
    m = machine(tiny_guest(once(lambda a: a.op(ops.VMXOFF))), personality=personality).run()

    assert m.hypervisor.death(m.vcpu) == "VM exit VMOFF, though CPUID tells the guest that there is no VMX"


def test_saved_and_restored_at_any_op_it_goes_on_to_the_same_bytes(personality: str) -> None:
    def body(a: Assembler) -> None:
        cpuid(a)
        port(a, ops.IN, 0x1234)

    def straight() -> Machine:
        return machine(tiny_guest(repeat(2, body)), personality=personality)

    whole = straight().run()
    cut = straight()
    for budget in (1, 7, 50, 99, 200):
        cut.engine.run(0, ops=budget)
        saved = cut.engine.save()
        cut.engine.run(0, ops=37)
        cut.engine.restore(saved)
    cut.run()

    assert (cut.engine.arena == whole.engine.arena).all()
    assert (cut.engine.tags == whole.engine.tags).all()
    different = [n for n in range(s.RECORD_SLOTS) if cut.engine.cpus[0][n] != whole.engine.cpus[0][n]]
    assert set(different) <= {s.OPS_LEFT, s.UNTIL, s.LIMIT}
