"""Guests that no processor executes: the same results by an interpreter and a translator, whose counts follow laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from tests.vmm.test_trap_and_emulate import CALLS, FAULTS, FORK, KPTI, NATIVE, PLAIN, SWITCHES, TEXT, TICK, run, seen
from vtsim.base.errors import ConfigError
from vtsim.base.jit import DISABLED, quiet
from vtsim.config import parse_scenario, resolve
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import overlap
from vtsim.cpu.slots import RAX, RCX, RSP
from vtsim.guest.primitives import Stage, lowerings
from vtsim.guest.spec import CpuidSpec
from vtsim.platform.machine import Machine
from vtsim.platform.walk import walk
from vtsim.study.compare import compare_scenario
from vtsim.study.equivalence import compare
from vtsim.study.run import run as study
from vtsim.vmm.software import streams
from vtsim.vmm.software.build import SoftwareCpus

TECHNIQUES = ("interpreter", "dynamic-translation")
PHASES = (
    "{primitive: page_fault, region: 16 KiB, iterations: 2}, {primitive: fork, iterations: 1, pages: 3}, "
    "{primitive: stream, region: 64 KiB, accesses: 200, pattern: uniform, write: 30 %, work: 3}, "
    "{primitive: cpuid, iterations: 1}, {primitive: syscall, iterations: 2}, {primitive: work, instructions: 9000}"
)
EVERYTHING = (KPTI, f"[{{phases: [{PHASES}]}}]")
SMALL = (PLAIN, "[{phases: [{primitive: cpuid, iterations: 1}]}]")


def by(technique: str) -> tuple[str, ...]:
    return (f"vmm.technique={technique}",)


def software(machine: Machine) -> dict[str, int]:
    assert machine.monitor is not None
    found = machine.monitor.software()
    assert found is not None
    return found


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_instruction_of_the_guest_is_emulated_and_its_processes_see_what_they_see_natively(
    technique: str,
) -> None:
    guest = SMALL if DISABLED else EVERYTHING
    there, counts, stopped = run(guest, by(technique))
    natively, expected, _ = run(guest, NATIVE)

    assert stopped is None
    assert seen(there) == seen(natively)
    assert counts.emulated == expected.instructions[:2]
    assert sum(counts.instructions) == 0
    for counter in ("page_faults", "syscalls", "exceptions"):
        assert counts.counters[counter] == expected.counters[counter]


@pytest.mark.compiled_only
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_interrupts_idling_and_switches_are_the_guest_s_own(technique: str) -> None:
    there, counts, stopped = run((TICK, SWITCHES), by(technique))
    natively, expected, _ = run((TICK, SWITCHES), NATIVE)
    hz, tick_s = natively.profile.clock_hz, 50e-6
    ticks = int(there.engine.cpus[0][s.CYCLE]) / hz / tick_s

    assert stopped is None
    assert seen(there) == seen(natively)
    assert counts.emulated[1] == expected.instructions[1]
    assert 0.8 * ticks < counts.counters["interrupts"] <= ticks + 2


def told(monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    """The cpuid phase becomes a program of the test's."""

    def emit(a: Assembler, phase: CpuidSpec, at: Stage) -> None:
        write(a)

    monkeypatch.setitem(lowerings._items, CpuidSpec, attrs.evolve(lowerings[CpuidSpec], emit=emit))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_what_no_program_executes_ends_the_vm_and_is_named(technique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, lambda a: a.op(o.RDFSBASE))

    _, _, stopped = run(SMALL, by(technique))

    assert stopped == "the guest's kernel asked for what the monitor does not emulate: RDFSBASE"


@pytest.mark.compiled_only
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_each_access_of_the_guest_is_one_look_up_of_the_software_tlb(
    technique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accesses(n: int) -> dict[str, int]:
        def write(a: Assembler) -> None:
            for _ in range(n):
                a.ld(RAX, Mem(RSP, -8))
                a.st(Mem(RSP, -16), RAX)
                a.push(RAX)
                a.pop(RCX)
            a.ldm(Mem(RSP, -64), [RAX, RCX])

        told(monkeypatch, write)
        there, counts, _ = run(SMALL, by(technique))
        return software(there) | {"faults": counts.counters["page_faults"]}

    few, more = accesses(1), accesses(6)

    assert more["lookups"] - few["lookups"] == 5 * 4
    assert more["misses"] == few["misses"]
    assert more["misses"] - more["fills"] == more["faults"] > 0


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_division_gives_what_the_processor_gives_or_divide_error(
    technique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 by 7; then a round of the primitive, whose divisor is 0."""

    def write(a: Assembler) -> None:
        for register, value in ((RAX, 100), (s.RDX, 0), (s.R8, 7)):
            a.mov(register, value)
        a.op(o.DIVIDE, r2=s.R8, mem=Mem(attributes=o.MEM_DECODED | o.MEM_REGISTER))
        a.shl(s.RDX, 8)
        a.add(RAX, register=s.RDX)
        a.sub(RAX, 14 | 2 << 8)  # quotient and remainder
        a.op(o.CPUID)  # of leaf 0, if they are right

    told(monkeypatch, write)
    guest = (PLAIN, "[{phases: [{primitive: cpuid, leaf: 5}, {primitive: divide_error, iterations: 1}]}]")
    there, counts, stopped = run(guest, by(technique))
    natively, expected, _ = run(guest, NATIVE)

    assert stopped is None
    assert seen(there) == seen(natively)
    assert counts.counters["exceptions"] == expected.counters["exceptions"] > 0


@pytest.mark.compiled_only
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_flags_are_those_that_the_guest_would_have_seen(technique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every condition after a subtraction, an addition and a logical result, asked at once and behind other work."""

    def write(a: Assembler) -> None:
        n = 0
        for left, right in ((1, 2), (2, 2), (-(1 << 63), 1), (5, -1)):
            for op in (o.CMP, o.ADD, o.AND):
                for condition in (o.CC_Z, o.CC_B, o.CC_S, o.CC_L, o.CC_BE, o.CC_G):
                    for late in (False, True):
                        n += 1
                        a.mov(RAX, left)
                        a.mov(RCX, right)
                        a.alu(op, RAX, register=RCX)
                        if late:
                            a.st(Mem(RSP, -8), RAX)
                            a.mov(RCX, 0)
                        a.jcc(condition, f"holds_{n}")
                        a.add(s.R13, 1)
                        a.shl(s.R13, 1)
                        a.label(f"holds_{n}")
                        a.add(s.R13, 3)
        a.copy(RAX, s.R13)
        a.op(o.CPUID)
        a.op(o.PUSHF)
        a.pop(RAX)
        a.mov(RAX, 0)
        a.copy(s.RDI, s.R13)
        a.mov(RAX, 1)

    told(monkeypatch, write)
    there, counts, _ = run(SMALL, by(technique))
    natively, expected, _ = run(SMALL, NATIVE)

    assert counts.emulated == expected.instructions[:2]  # every jump that is taken leaves instructions out
    assert seen(there) == seen(natively)


@pytest.mark.compiled_only
@pytest.mark.parametrize(("technique", "cpus"), [*((technique, 1) for technique in TECHNIQUES), (TECHNIQUES[0], 3)])
def test_work_that_is_executed_at_once_is_what_it_is_part_by_part(technique: str, cpus: int) -> None:
    """Also where other CPUs of the machine are idle meanwhile, which is counted, too."""
    guest = (TICK, "[{phases: [{primitive: work, instructions: 40000}]}]")

    def outcome(on: bool) -> tuple[Any, ...]:
        there = Machine(
            parse_scenario(TEXT.format(kernel=guest[0], processes=guest[1]), [*by(technique), f"machine.cpus={cpus}"])
        )
        assert isinstance(there.monitor, SoftwareCpus)
        there.monitor.forward.on = on
        found = there.run()
        owners = {name: attrs.asdict(owner) for name, owner in found.owners.items()}
        return found.elapsed, owners, found.software, found.translations

    assert outcome(True) == outcome(False)


@pytest.mark.compiled_only
def test_blocks_are_reached_by_look_ups_and_jumps_and_a_full_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    there, _, _ = run((PLAIN, FAULTS), by("dynamic-translation"))
    monkeypatch.setattr("vtsim.vmm.software.translator.BLOCKS", 20)
    small, _, stopped = run((PLAIN, FAULTS), by("dynamic-translation"))
    assert there.monitor is not None
    assert small.monitor is not None
    roomy, tight = there.monitor.translations(), small.monitor.translations()
    assert roomy is not None
    assert tight is not None

    assert stopped is None
    assert seen(small) == seen(there)
    assert roomy["taken"] == roomy["in_line"] + roomy["call_outs"]
    assert roomy["lookups"] >= roomy["misses"] == roomy["blocks"] > 0
    assert 0 < roomy["chained"] <= 2 * roomy["blocks"]
    assert roomy["flushes"] == 0
    assert tight["blocks"] == 20 * tight["flushes"] + tight["blocks"] - tight["evicted"]
    assert tight["flushes"] > 0


@pytest.mark.compiled_only
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_raising_a_price_never_lowers_the_total(technique: str) -> None:
    base = elapsed(technique)

    for price in ("LD", "INDIRECT", "JCC", "ADD"):
        assert elapsed(technique, f"machine.cpu={{prices.{price}: 9}}") >= base


def elapsed(technique: str, *sets: str) -> int:
    there, _, _ = run((PLAIN, CALLS), (*by(technique), *sets))
    return int(there.engine.cpus[0][s.CYCLE])


@pytest.mark.parametrize("technique", ["native", "hardware", "trap-and-emulate", "binary-translation"])
def test_a_processor_does_not_execute_a_guest_of_another_instruction_set(technique: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_scenario(TEXT.format(kernel=PLAIN, processes=FORK), ["vms.0.isa=arm", *by(technique)])

    (problem,) = refused.value.problems
    assert problem.path == "vms.0.isa"
    assert problem.message == (
        f"technique {technique!r} lets the processor execute guest code, and arm code is none of an x86 processor"
    )
    assert problem.help == "isa can be x86; or vmm.technique can be dynamic-translation, interpreter"


@pytest.mark.compiled_only
def test_a_guest_of_another_instruction_set_has_efficiency_0_and_says_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "arm.yaml"
    file.write_text(TEXT.format(kernel=PLAIN, processes=CALLS))
    found = study(file, sets=["vms.0.isa=arm", *by("dynamic-translation")])

    assert found.efficiency.overall == found.efficiency.ring0 == found.efficiency.ring3 == 0
    assert found.vms["vm0"].isa == "arm"
    assert found.slowdown is None  # natively it ends at once

    compared = compare_scenario(file, ("native", "dynamic-translation"), sets=["vms.0.isa=arm"])
    slowdown = compared.results["dynamic-translation"].slowdown
    assert list(compared.refused) == ["native"]
    assert slowdown is not None
    assert slowdown > 1


ALL_PAGES = """
vmm: {technique: dynamic-translation}
vms:
- memory: 1 GiB
  guest:
    kernel: {tick: off, populate: prebuilt}
    processes:
    - phases: [{primitive: stream, pattern: uniform, region: 512 MiB, accesses: 200000, write: 100 %}]
"""


@pytest.mark.compiled_only
def test_a_guest_may_write_all_of_its_memory() -> None:
    """Its stores are executed, so that each page has contents: here more than 100,000 of them."""
    assert [vm.stopped for vm in Machine(parse_scenario(ALL_PAGES)).run().vms] == [None]


def test_walks_of_a_program_are_none_of_the_processor() -> None:
    scenario = parse_scenario(TEXT.format(kernel=PLAIN, processes=FORK), list(by("interpreter")))

    with pytest.raises(ConfigError, match="a program walks the guest's tables, and not the processor"):
        walk(scenario, 0, 0x40_0000)
    assert walk(scenario, 0, 0x40_0000, native=True).hpa is not None


@pytest.mark.slow
@pytest.mark.parametrize("stride", ["24 B", "64 B"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_all_words_of_a_line_are_loaded_or_all_are_stored(technique: str, stride: str) -> None:
    """As natively, so that the first access to each page faults as a load or a store there and here."""
    words = f"[{{phases: [{{primitive: stream, accesses: 900, region: 16 KiB, write: 50 %, pattern: strided, stride: {stride}}}]}}]"
    text = TEXT.format(kernel=PLAIN if DISABLED else TICK, processes=words)
    there, natively = (resolve(parse_scenario(text, list(sets)), "stream") for sets in (by(technique), NATIVE))
    found = compare(natively, there)

    assert found.differences == ()
    assert found.compared["exception"] >= 4  # pages


def test_what_a_program_does_not_execute_is_refused_beforehand() -> None:
    tree = "[{phases: [{primitive: btree, records: 100, accesses: 10}]}]"

    with pytest.raises(ConfigError, match="executes no recorded streams, look-ups or device accesses"):
        parse_scenario(TEXT.format(kernel=PLAIN, processes=tree), list(by("interpreter")))


def test_the_generator_of_a_stream_is_the_engine_s() -> None:
    function: Any = overlap.next_random if DISABLED else overlap.next_random.py_func  # type: ignore[attr-defined]
    numbers = [1, -1, 1 << 62, -(1 << 63), 0x1234_5678_9ABC_DEF0]

    with quiet():
        assert [streams.next_random(n) for n in numbers] == [int(function(np.int64(n))) for n in numbers]
