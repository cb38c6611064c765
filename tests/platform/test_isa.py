"""The analysis by execution, against the sensitive unprivileged instructions of Robin and Irvine (2000)."""

from __future__ import annotations

from functools import cache

from attrs import evolve

from vtsim.platform.isa import Analysis, analyze

READS_SYSTEM_STATE = {"SGDT", "SIDT", "SLDT", "SMSW", "STR"}
ROBIN_IRVINE = READS_SYSTEM_STATE | {"PUSHF", "POPF", "INT"}


@cache
def analysis() -> Analysis:
    return analyze("skx-4114")


def test_the_sensitive_unprivileged_instructions_of_the_literature_are_found() -> None:
    assert set(analysis().offenders) >= ROBIN_IRVINE
    assert set(analysis().hybrid_offenders) >= ROBIN_IRVINE


def test_ordinary_instructions_are_innocuous() -> None:
    kinds = {each.op: each.kind for each in analysis().ops}

    assert {kinds[op] for op in ("MOV", "ADD", "LD", "ST", "PUSH", "POP", "RET", "CALL_REG", "XADD")} == {"innocuous"}


def test_instructions_that_only_ring_0_may_execute_are_privileged_and_no_offenders() -> None:
    kinds = {each.op: each.kind for each in analysis().ops}

    for op in ("LGDT", "LIDT", "LLDT", "LTR", "CLTS", "LMSW", "MOV_TO_CR0", "CLI", "STI"):
        assert kinds[op].startswith("privileged, control-sensitive"), op
        assert op not in analysis().offenders


def test_where_every_sensitive_instruction_traps_nothing_offends() -> None:
    trapping = evolve(
        analysis(), ops=tuple(evolve(each, privileged=each.privileged or each.sensitive) for each in analysis().ops)
    )

    assert analysis().offenders
    assert trapping.offenders == trapping.hybrid_offenders == ()


def test_a_return_from_interrupt_of_user_code_is_executed_and_loses_the_interrupt_flag_silently() -> None:
    judged = {each.op: each for each in analysis().ops}["IRET"]

    assert judged.executed and not judged.privileged
    assert judged.op in analysis().hybrid_offenders
