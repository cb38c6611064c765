"""What `vtsim explain` and `vtsim list` show."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Instruction
from vtsim.cpu.profile import load_profile, profile_names
from vtsim.cpu.profile_spec import LEAVES
from vtsim.cpu.slots import RAX
from vtsim.study.doors import DOORS, doors_table
from vtsim.study.explain import REQUIRES, exit_program, price, profile_values, program_listing
from vtsim.study.report import plain_text
from vtsim.vmcs.capabilities import FEATURES
from vtsim.vmcs.reasons import REASON
from vtsim.vmm.listing import PAGINGS, exit_stages
from vtsim.vmm.personalities.kvm.parameters import TABLES
from vtsim.vmm.programs.common import OF_PAGING
from vtsim.vmm.spec import VmmSpec

PROFILE = load_profile("skx-4114")


@frozen
class Stretch:
    privilege: int
    title: str
    instructions: tuple[Instruction, ...]


def assembled() -> tuple[Instruction, ...]:
    a = Assembler("path", 0x1000, activity=ops.EXIT_HANDLER)
    a.work(200)
    a.vmread(RAX, "GUEST_RIP")
    a.hook(3)
    a.op(ops.MOV_TO_CR, RAX, imm=8)
    a.op(ops.VMRESUME)
    return a.assemble().instructions


def test_an_op_costs_what_the_profile_says() -> None:
    work, vmread, hook, cr8, resume = assembled()
    prices, work_price = PROFILE.prices, PROFILE.work.cycles_per_100_instructions

    assert price(work, PROFILE) == 2 * work_price
    assert price(vmread, PROFILE) == prices["VMREAD"]
    assert price(hook, PROFILE) == 0
    assert price(cr8, PROFILE) == prices["MOV_TO_CR8"]
    assert price(resume, PROFILE) == PROFILE.transitions.vm_entry_cycles


def test_every_op_of_the_table_has_a_price_in_every_profile() -> None:
    for op in ops.OPS:
        assert price(Instruction(0, op.number, op.length, 0, imm=4), PROFILE) >= 0


def test_an_exit_program_is_listed_op_by_op_with_privilege_and_price() -> None:
    stages = [Stretch(0, "in the kernel", assembled()), Stretch(1, "in user space", assembled()[:1])]

    text = plain_text(program_listing(REASON["CPUID"], "kvm", PROFILE, stages, "ept"), 100)

    lines = text.splitlines()
    assert lines[0].split() == [
        "CPUID",
        "under",
        "kvm",
        "with",
        "paging",
        "ept",
        "on",
        "skx-4114",
        "op",
        "cycles",
        "charged",
        "to",
    ]
    vmread = next(line for line in lines if "VMREAD" in line)
    assert vmread.split() == [
        "R0",
        "VMREAD",
        "RAX,",
        "GUEST_RIP",
        str(PROFILE.prices["VMREAD"]),
        "exit_handler",
    ]
    assert next(line for line in lines if "HOOK" in line).split()[-2:] == ["hook", "exit_handler"]
    assert any(line.startswith("R3") for line in lines)
    exit_cycles, entry_cycles = PROFILE.transitions.vm_exit_cycles, PROFILE.transitions.vm_entry_cycles
    assert f"VM exit {exit_cycles} cycles before it, VM entry {entry_cycles} in it." in " ".join(lines)


@pytest.mark.parametrize("width", [80, 120])
def test_every_value_of_a_profile_is_shown_with_its_source(width: int) -> None:
    text = plain_text(profile_values("skx-4114"), width)

    lines = text.splitlines()
    legend = dict(line.split(maxsplit=1) for line in lines if line[0:1].isdecimal())
    for path in LEAVES:
        number = next(line for line in lines if line.split()[:1] == [path]).split()[-1]
        assert legend[number].split()[0] == PROFILE.sourced(path).source.split()[0]
    assert all(len(line) <= width for line in lines)


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        profile_values("skx-4115")

    assert str(error.value) == "unknown profile 'skx-4115'\n help: did you mean 'skx-4114'?"


def test_every_door_opens_and_every_name_behind_it_is_described() -> None:
    overview = plain_text(doors_table(""), 120)
    for door, one in DOORS.items():
        assert door in overview
        names = list(one.names())
        assert names
        assert all(meaning for _, meaning in names), [name for name, meaning in names if not meaning]
        assert plain_text(doors_table(door), 120)


def test_an_unknown_door_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        doors_table("profil")

    assert str(error.value) == "unknown door 'profil'\n help: did you mean 'profile'?"


def heading(reason: str, profile: str, *paging: str) -> str:
    return plain_text(exit_program(reason, "kvm", profile, *paging), 200).splitlines()[0].partition("  ")[0]


def test_the_paging_of_an_exit_path_is_what_the_processor_has_or_what_is_asked_for() -> None:
    assert heading("CPUID", "skx-4114") == "CPUID under kvm with paging ept on skx-4114"
    assert heading("CPUID", "p4-672") == "CPUID under kvm with paging shadow on p4-672"
    assert heading("INVLPG", "skx-4114") == "INVLPG under kvm with paging shadow on skx-4114"
    assert heading("EPT_VIOLATION", "skx-4114", "agile") == "EPT_VIOLATION under kvm with paging agile on skx-4114"


def test_what_a_page_fault_of_the_guest_runs_depends_on_the_paging() -> None:
    ept, shadow = (
        plain_text(exit_program("EXCEPTION_NMI", "kvm", "skx-4114", each), 100) for each in ("ept", "shadow")
    )

    assert "guest_walk" in shadow
    assert "guest_walk" not in ept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("CPUID", "kvm", "p4-672", "ept"),
            "--profile: paging 'ept' needs EPT (ENABLE_EPT), which profile 'p4-672' does not have\n"
            f" help: profiles that have it: {', '.join(n for n in profile_names() if n not in ('p4-672', 'xeon-2003'))}; "
            "or --paging shadow, which can do without",
        ),
        (
            ("EPT_VIOLATION", "kvm", "skx-4114", "shadow"),
            "--paging: no program handles a VM exit EPT_VIOLATION with paging 'shadow'\n"
            " help: paging can be auto, ept, agile",
        ),
        (
            ("INVLPG", "kvm", "skx-4114", "auto", ("vmm.paging=ept",)),
            "--paging: no program handles a VM exit INVLPG with paging 'ept'\n help: paging can be auto, shadow, agile",
        ),
        (("CPUID", "kvm", "skx-4114", "shadwo"), "--paging: unknown paging 'shadwo'\n help: did you mean 'shadow'?"),
    ],
)
def test_a_paging_that_an_exit_path_cannot_have_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        exit_program(*arguments)

    assert str(refused.value) == message


EVERY_MITIGATION = (
    "vmm.mitigations.pti=true", "vmm.mitigations.spectre_v2=retpoline", "vmm.mitigations.vmentry_l1d_flush=cond",
    "vmm.mitigations.mds=full",
)  # fmt: skip


def listed(reason: str, *sets: str) -> list[list[str]]:
    """The ops of an exit path, each as its words, without privilege and what it is charged to."""
    lines = plain_text(exit_program(reason, "kvm", "skx-4114", sets=sets), 200).splitlines()
    return [line.split()[1:-1] for line in lines if line.startswith(("R0", "R3"))]


@pytest.mark.parametrize(
    ("reason", "paid"),
    [
        ("CPUID", {"VERW": 1, "RETPOLINE": 1, "L1D_FLUSH": 0, "MOV_TO_CR3_NOFLUSH": 0, "MOV_TO_CR3": 0}),
        ("IO_INSTRUCTION", {"VERW": 2, "RETPOLINE": 1 + 4, "L1D_FLUSH": 1, "MOV_TO_CR3_NOFLUSH": 2, "MOV_TO_CR3": 0}),
    ],
)
def test_mitigations_are_listed_with_what_they_cost_where_they_are_asked_for(reason: str, paid: dict[str, int]) -> None:
    """As often as tests/vmm/test_mitigations.py finds that a run pays for them."""

    def cycles(*sets: str) -> int:
        text = plain_text(exit_program(reason, "kvm", "skx-4114", sets=sets), 200)
        return int(text.partition("At least ")[2].split()[0].replace(",", ""))

    for price_, times in paid.items():
        dearer = f"machine.cpu.prices.{price_}={PROFILE.prices[price_] + 1000}"
        assert cycles(*EVERY_MITIGATION, dearer) - cycles(*EVERY_MITIGATION) == 1000 * times
        assert cycles(dearer) == cycles()


def test_an_exit_path_with_mitigations_ends_like_this() -> None:
    path = listed("CPUID", *EVERY_MITIGATION)

    assert path[-10:] == [
        ["LD", "RAX,", "gs:[0x450]", "1"],
        ["TEST", "RAX,", "RAX", "1"],
        ["JZ", "enter_l1d_stays", "1"],
        ["MOV_FROM_CR", "RAX,", "2", "11"],
        ["LD", "RCX,", "[R15+0xa0]", "1"],
        ["CMP", "RAX,", "RCX", "1"],
        ["JNZ", "load_cr2", "1"],
        ["LDM", "[RSP],", "0xffff", "1"],
        ["VERW", "gs:[0x458]", str(PROFILE.prices["VERW"])],
        ["VMRESUME", str(PROFILE.transitions.vm_entry_cycles)],
    ]


def test_the_lengths_of_another_kernel_are_listed_where_they_are_asked_for() -> None:
    def work(*sets: str) -> list[list[str]]:
        return [words for words in listed("CPUID", *sets) if words[0] == "WORK"]

    def expected(kernel: str) -> list[list[str]]:
        names = ("exit_common", "cpuid", "skip", "entry_common")
        lengths = [TABLES[kernel][name].value for name in names]
        cpi = PROFILE.work.cycles_per_100_instructions
        return [
            ["WORK", hex(length), ";", name, f"{length * cpi / 100:.0f}"]
            for name, length in zip(names, lengths, strict=True)
        ]

    assert work() == work("vmm.lengths=linux-6.1") == expected("linux-6.1")
    assert work("vmm.lengths=linux-4.19") == expected("linux-4.19") != work()


def test_the_settings_of_a_listing_are_named_below_it_and_win() -> None:
    sets = ("vmm.lengths=linux-4.19", "machine.profile=snb-e5-2450", "vmm.paging=shadow")
    text = plain_text(exit_program("CPUID", "kvm", "skx-4114", sets=sets), 200)

    assert text.startswith("CPUID under kvm with paging shadow on snb-e5-2450 ")
    assert f"\nWith {', '.join(sets)}.\n" in text
    assert "\nWith" not in plain_text(exit_program("CPUID", "kvm", "skx-4114"), 200)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ("vmm.mitigations.pty=true",),
            "--set vmm.mitigations.pty=true: vmm.mitigations: unknown key 'pty'\n help: did you mean 'pti'? "
            "keys here are pti, spectre_v2, spectre_v2_user, vmentry_l1d_flush, mds",
        ),
        (
            ("vmm.lengths=linux-5.4",),
            "--set vmm.lengths=linux-5.4: vmm.lengths: 'linux-5.4' is not possible here\n"
            " help: did you mean 'linux-6.1' or 'linux-4.19'?",
        ),
        (
            ("vmm.personality=minimal", "vmm.mitigations.mds=full"),
            "--set vmm.mitigations.mds=full: vmm.mitigations.mds: personality 'minimal' has no mitigations\n"
            " help: leave it out; or choose vmm.personality kvm",
        ),
        (
            ("vmm.technique=native",),
            "vmm.technique: technique 'native' has no VM exits\n help: it can be hardware",
        ),
        (
            ("vmm.paging=none",),
            "vmm.paging: paging 'none' has no hypervisor, so no VM exits\n help: it can be ept, shadow, agile, direct-pv",
        ),
    ],
)  # fmt: skip
def test_a_setting_that_no_exit_path_can_have_is_refused(sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        exit_program("CPUID", "kvm", "skx-4114", sets=sets)

    assert str(refused.value) == message


@pytest.mark.parametrize("personality", ["kvm", "minimal"])
@pytest.mark.parametrize("paging", ["ept", "shadow", "agile", "direct-pv"])
def test_every_exit_is_listed_with_every_paging_that_it_has(personality: str, paging: str) -> None:
    profile = load_profile("skx-4114")
    for reason in REASON.values():
        if paging in OF_PAGING.get(reason.number, PAGINGS):
            assert all(
                stage.instructions
                for stage in exit_stages(VmmSpec(personality=personality, paging=paging), reason.number, profile)
            )


def test_an_exit_is_found_by_its_number() -> None:
    assert plain_text(exit_program("10", "minimal", "skx-4114"), 100) == plain_text(
        exit_program("cpuid", "minimal", "skx-4114"), 100
    )


def test_an_exit_that_the_processor_cannot_take_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        exit_program("PML_FULL", "minimal", "snb-e5-2450")

    assert str(refused.value) == (
        "--profile: a VM exit PML_FULL needs its control (ENABLE_PML), which profile 'snb-e5-2450' does not have\n"
        " help: profiles that have it: clx-6252, clx-8269cy, skx-4114"
    )


def test_every_control_that_an_exit_needs_is_one_that_processors_report() -> None:
    for control in REQUIRES.values():
        assert control in FEATURES


def test_stated_ranges_are_shown_below_the_values_with_their_source() -> None:
    lines = plain_text(profile_values("skx-4114"), 80).splitlines()
    below = lines[next(n for n, line in enumerate(lines) if line.startswith("stated ranges")) :]
    legend = dict(line.split(maxsplit=1) for line in below if line[0:1].isdecimal())
    shown = {words[0]: words[1:] for words in map(str.split, below) if words and words[0] in LEAVES}

    assert list(shown) == [path for path in LEAVES if PROFILE.sourced(path).stated]
    low, high, unit, number = shown["prices.VMREAD"]
    assert (low, high, unit, legend[number].split()[0]) == ("20", "30", "cycles", "Generally")
    assert "stated ranges" not in plain_text(profile_values("xeon-2003"), 80)
