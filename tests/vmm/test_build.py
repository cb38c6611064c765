"""What cannot be built, what is listed, and that no exit reason is forgotten."""

from __future__ import annotations

import pytest

from tests.vmm.machines import DATA, machine, tiny_guest
from tests.vmm.test_exits import cpuid, keep, once, repeat
from vtsim.base.errors import ConfigError
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.profile import load_profile
from vtsim.cpu.slots import RAX, RBX
from vtsim.vmcs.reasons import REASONS
from vtsim.vmm.excuses import EXCUSED
from vtsim.vmm.listing import exit_stages
from vtsim.vmm.personalities.kvm.parameters import PARAMETERS
from vtsim.vmm.registry import exit_paths, personalities
from vtsim.vmm.settings import resolve_parameters
from vtsim.vmm.spec import VmmSpec

SHADOW = {"personality": "minimal", "profile": "p4-672", "paging": "shadow", "vpid": False, "tpr_shadow": False}


def test_every_exit_reason_is_handled_or_excused_with_a_sentence(personality: str) -> None:
    handled = {reason for owner, reason in exit_paths if owner == personality}

    assert {reason.number for reason in REASONS} == handled | set(EXCUSED[personality])
    assert not handled & set(EXCUSED[personality])
    assert all(EXCUSED[personality].values())


def test_every_exit_path_and_personality_says_what_it_is() -> None:
    assert all(exit_paths.describe(key) for key in exit_paths)
    assert all(personalities.describe(key) for key in personalities)


def test_kvm_without_ept_names_what_is_missing() -> None:
    with pytest.raises(ConfigError) as raised:
        machine(tiny_guest(once(cpuid)), **{**SHADOW, "personality": "kvm", "paging": "ept"})

    assert str(raised.value) == (
        "vmm.personality: this needs ENABLE_EPT, which profile 'p4-672' does not have\n"
        " help: personality can be minimal, which needs less; or choose another machine.profile"
    )


def test_an_unknown_parameter_is_refused_with_what_was_meant() -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_parameters(VmmSpec(parameters=(("exit_comon", 1),)))

    assert str(raised.value) == (
        "vmm.parameters.exit_comon: unknown parameter 'exit_comon'\n help: did you mean 'exit_common'?"
    )


@pytest.mark.parametrize(("value", "written"), [(-1, "-1"), (1.5, "1.5"), (True, "true"), ("long", "'long'")])
def test_a_parameter_that_is_no_length_is_refused(value: object, written: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_parameters(VmmSpec(parameters=(("cpuid", value),)))  # type: ignore[arg-type]

    assert str(raised.value) == (
        f"vmm.parameters.cpuid: {written} is not a whole number, 0 or more\n"
        " help: cpuid is a number of instructions, 0 to 4,611,686,018,427,387,904"
    )


def test_every_parameter_has_a_source_and_changes_only_what_it_names() -> None:
    assert all(p.source and p.confidence and p.meaning for p in PARAMETERS.values())

    plain, longer = (
        machine(tiny_guest(repeat(4, cpuid)), parameters=parameters).run()
        for parameters in ((), (("cpuid", PARAMETERS["cpuid"].value + 100),))
    )

    assert longer.exits() == plain.exits()
    assert longer.instructions("host", ops.R0) == plain.instructions("host", ops.R0) + 4 * 100


def test_a_guest_runs_on_shadow_tables_where_there_is_no_ept() -> None:
    def body(a: Assembler) -> None:
        cpuid(a)
        keep(a, RBX, 0)
        a.op(ops.MOV_FROM_CR, RAX, imm=3)
        a.op(ops.MOV_TO_CR, RAX, imm=3)
        keep(a, RAX, 1)

    m = machine(tiny_guest(repeat(3, body)), **SHADOW).run()

    assert m.finished == ["vm0"]
    assert m.exits() == {"CPUID": 3, "CR_ACCESS": 2 * 3, "EXCEPTION_NMI": 2}  # a page of code, one of data


def test_a_guest_on_shadow_tables_whose_root_maps_nothing_ends_by_a_triple_fault() -> None:
    def body(a: Assembler) -> None:
        a.mov(RAX, 0x5000)
        a.op(ops.MOV_TO_CR, RAX, imm=3)

    m = machine(tiny_guest(once(body)), **SHADOW).run()

    assert m.hypervisor.death(m.vcpu) == "VM exit TRIPLE_FAULT"


def test_reads_and_writes_on_shadow_tables_reach_the_same_memory() -> None:
    def body(a: Assembler) -> None:
        a.mov(RBX, 0x1234)
        a.st(Mem(displacement=DATA + 4096), RBX)
        a.ld(RAX, Mem(displacement=DATA + 4096))
        a.add(RAX, 1)
        a.st(Mem(displacement=DATA + 4096), RAX)

    m = machine(tiny_guest(once(body)), **SHADOW).run()

    assert m.data(0, page=1, root=m.shadow_cr3()) == 0x1235


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.name)
def test_every_exit_can_be_listed_from_the_exit_to_its_end(personality: str, reason: object) -> None:
    profile = load_profile("snb-e5-2450")

    stages = list(exit_stages(VmmSpec(personality=personality), reason.number, profile))  # type: ignore[attr-defined]

    assert stages[0].title == "VM exit to handler"
    assert all(stage.instructions for stage in stages)
    if reason.number not in EXCUSED[personality]:  # type: ignore[attr-defined]
        last = stages[-1].instructions[-1].op
        assert last == ops.VMRESUME or stages[-1].title == "handler"


def test_a_port_of_user_space_is_listed_through_all_privilege_states() -> None:
    stages = list(exit_stages(VmmSpec(personality="kvm"), 30, load_profile("skx-4114")))

    assert [stage.privilege for stage in stages] == [ops.R0, ops.R0, ops.R0, ops.R3, ops.R0, ops.R0]
    assert [stage.instructions[-1].op for stage in stages[2:4]] == [ops.SYSRET, ops.SYSCALL]


@pytest.mark.parametrize("page_size", [4096, 2 << 20])
def test_memory_that_cannot_be_backed_beforehand_is_refused(page_size: int) -> None:
    with pytest.raises(ConfigError) as raised:
        machine(
            tiny_guest(once(cpuid)), memory=64 << 20, host_memory=48 << 20, populate="prebuilt", page_size=page_size,
            huge_pages="always",
        )  # fmt: skip

    assert str(raised.value) == (
        "machine.memory: there is not enough memory to back all of every VM's before it starts\n"
        " help: raise machine.memory, or choose vmm.ept.populate 'demand'"
    )


@pytest.mark.parametrize(("value", "written"), [(2, "2"), (-1, "-1"), (True, "true"), (0.5, "0.5"), ("off", "'off'")])
def test_a_switch_of_a_personality_is_0_or_1(value: object, written: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_parameters(VmmSpec(parameters=(("lockless_faults", value),)))  # type: ignore[arg-type]

    assert str(raised.value) == (
        f"vmm.parameters.lockless_faults: {written} is neither 0 nor 1\n help: lockless_faults is a switch: 0 or 1"
    )
