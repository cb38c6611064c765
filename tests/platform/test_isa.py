"""The analysis by execution, against the sensitive unprivileged instructions of Robin and Irvine (2000)."""

from __future__ import annotations

import json
from functools import cache

import pytest

from vtsim.cpu import ops as o
from vtsim.platform.isa import IN_OTHER_MODES, ROBIN_IRVINE, Analysis, Judged, analyze
from vtsim.platform.isa_bench import EXCUSED, Bench
from vtsim.study.isa_view import isa_json

pytestmark = pytest.mark.compiled_only

# younger than their article: what a system sets and any ring reads; and IRET, which their list leaves to the reader
YOUNGER = {"XGETBV", "RDTSCP"}
ALSO = {"IRET"}


@cache
def analysis(isa: str = "x86") -> Analysis:
    return analyze("skx-4114", isa)


def judged(isa: str = "x86") -> dict[str, Judged]:
    return {each.op: each for each in analysis(isa).ops}


def test_every_op_of_the_model_is_executed_or_named_with_a_reason() -> None:
    executed = set(Bench("skx-4114").rows.values())

    assert executed | set(EXCUSED) == {op.number for op in o.OPS}
    assert not executed & set(EXCUSED)
    assert all(EXCUSED.values())
    assert set(analysis().left_out) == {o.OPS[op].name for op in EXCUSED}


def test_the_sensitive_unprivileged_instructions_of_the_literature_are_the_offenders() -> None:
    names = {op for name, ops in ROBIN_IRVINE.items() for op in ops if name not in IN_OTHER_MODES}

    assert set(analysis().offenders) == set(analysis().hybrid_offenders) == names | YOUNGER | ALSO
    assert len(ROBIN_IRVINE) == 18
    assert {name for name, said in analysis().literature.items() if said != "offender"} == {"PUSH"}


def test_why_an_instruction_offends_is_what_the_literature_says() -> None:
    found = judged()

    assert {name: found[name].behaviour for name in ("SGDT", "SIDT", "SLDT", "STR", "SMSW")} == {
        "SGDT": ("another GDT",), "SIDT": ("another IDT",), "SLDT": ("another LDT",), "STR": ("another task",),
        "SMSW": ("CR0.TS",),
    }  # fmt: skip
    for name in ("LAR", "LSL", "VERR", "MOV_FROM_CS", "MOV_TO_SS", "CALL_FAR", "JMP_FAR", "RET_FAR", "POPF", "INT"):
        assert "ring (as it is)" in found[name].behaviour, name
    for name in ("LAR", "LSL", "VERW", "POP_SEGMENT", "MOV_TO_FS"):
        assert "another GDT" in found[name].behaviour, name
    assert found["PUSHF"].behaviour == ("interrupts disabled",)


def test_where_sensitive_instructions_trap_nothing_offends() -> None:
    assert analysis("virtualizable").offenders == analysis("virtualizable").hybrid_offenders == ()
    assert set(analysis("virtualizable").literature.values()) == {"no offender", *IN_OTHER_MODES.values()}


def test_ordinary_instructions_are_innocuous() -> None:
    names = (
        "MOV", "ADD", "LD", "ST", "PUSH", "POP", "RET", "CALL", "CALL_REG", "XADD", "LDM", "MOVE", "MOVE_STRING",
        "DIVIDE", "PUSH_SEGMENT", "RDFSBASE", "WRFSBASE", "RDPKRU", "WRPKRU", "FXSAVE", "CLFLUSH",
    )  # fmt: skip

    assert {judged()[name].kind for name in names} == {"innocuous"}


def test_instructions_that_only_ring_0_may_execute_are_privileged_and_no_offenders() -> None:
    names = (
        "LGDT", "LIDT", "LLDT", "LTR", "CLTS", "LMSW", "MOV_TO_CR0", "CLI", "STI", "XSETBV", "SWAPGS", "HLT", "MWAIT",
        "VMXON", "VMXOFF", "VMCLEAR", "SYSRET", "WRMSR",
    )  # fmt: skip
    for name in names:
        assert judged()[name].kind.startswith("privileged, control-sensitive"), name
        assert name not in analysis().offenders
    for name in ("STAC", "CLAC", "MONITOR", "VMREAD", "VMWRITE", "VMLAUNCH", "INVEPT", "INVPCID", "INVD", "XSAVES"):
        assert judged()[name].kind.startswith("privileged"), name


def test_a_system_call_is_a_trap_to_whoever_runs_in_ring_0() -> None:
    for name in ("SYSCALL", "SYSENTER"):
        assert judged()[name].kind.startswith("system call"), name
        assert judged()[name].traps


def test_what_64_bit_mode_or_this_processor_does_not_have_is_undefined_in_every_ring() -> None:
    undefined = {each.op for each in analysis().ops if each.kind == "undefined"}

    assert undefined >= {"BOUND", "INTO", "UD", "RSM", "GETSEC", "ENCLS", "TPAUSE"}
    assert {each.op for each in analysis().ops if each.kind == "traps in every ring"} == {"INT1", "INT3"}


def test_a_return_from_interrupt_of_user_code_is_executed_and_loses_the_interrupt_flag_silently() -> None:
    found = judged()["IRET"]

    assert found.executed and not found.privileged
    assert found.op in analysis().hybrid_offenders


def test_the_json_names_verdicts_offenders_and_what_was_left_out() -> None:
    said = json.loads(isa_json(analysis()))

    assert (said["virtualizable"], said["recursively_virtualizable"], said["hybrid_virtualizable"]) == (False,) * 3
    assert said["robin_irvine"]["SGDT"] == "offender"
    assert said["left_out"].keys() == {"STREAM", "HOOK", "REPLAY_EVENT", "STOP", "RETPOLINE"}
    assert json.loads(isa_json(analysis("virtualizable")))["virtualizable"] is True
