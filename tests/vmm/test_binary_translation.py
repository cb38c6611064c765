"""A guest whose kernel runs from translations: native results on an ISA that no trap-and-emulate monitor can hide."""

from __future__ import annotations

import attrs
import pytest

from tests.vmm.test_trap_and_emulate import CALLS, FAULTS, GUESTS, KPTI, MONITOR, NATIVE, PLAIN, machine, run, seen
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.codes import FOREVER
from vtsim.cpu.slots import RAX, RSP
from vtsim.cpu.translation import TRANSLATOR
from vtsim.ept.shadow import POOL
from vtsim.guest.primitives import Stage, lowerings
from vtsim.guest.spec import CpuidSpec
from vtsim.vmm.monitor.translate import BACK, BACK_BYTES
from vtsim.vmm.shadow import PLAIN_PARAMETERS

COPIES = "[{phases: [{primitive: fork, iterations: 4, pages: 1}]}]"
ROUNDS = "[{phases: [{primitive: page_fault, region: 8 KiB, iterations: 3}]}]"
TRANSLATED = ("vmm.technique=binary-translation",)


@pytest.mark.parametrize("guest", GUESTS)
def test_processes_of_a_translated_kernel_see_what_they_see_natively_on_x86(guest: str) -> None:
    there, counts, stopped = run(GUESTS[guest], TRANSLATED)
    natively, expected, _ = run(GUESTS[guest], NATIVE)

    assert stopped is None
    assert seen(there) == seen(natively)
    for counter in ("page_faults", "syscalls"):
        assert counts.counters[counter] == expected.counters[counter]


def test_every_instruction_of_the_original_is_counted_once() -> None:
    _, counts, _ = run((PLAIN, CALLS), TRANSLATED)
    _, natively, _ = run((PLAIN, CALLS), NATIVE)

    assert counts.instructions[o.R3] - counts.deprivileged == natively.instructions[o.R3]
    assert counts.deprivileged + counts.emulated[0] == natively.instructions[o.R0]


def test_no_privileged_operation_faults_and_every_block_is_counted() -> None:
    there, _, _ = run((PLAIN, FAULTS), TRANSLATED)
    assert there.monitor is not None
    found, translator = there.monitor.statistics(), there.monitor.translations()
    assert translator is not None

    assert found["traps"] == 0
    assert translator["taken"] == translator["identical"] + translator["in_line"] + translator["call_outs"]
    assert translator["made"] > translator["taken"] >= translator["blocks"] > 0
    assert 0 < translator["misses"] < translator["lookups"]


def test_a_store_to_a_table_that_faults_again_and_again_is_called_out() -> None:
    there, _, _ = run((KPTI, COPIES), TRANSLATED)
    assert there.monitor is not None
    translator = there.monitor.translations()
    assert translator is not None

    assert translator["adapted"] == 2 + 1  # top-level entries that fork copies; a page made writable again


def test_a_process_sees_the_processor_s_own_tables_unless_what_tells_it_traps(monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(a: Assembler, phase: CpuidSpec, at: Stage) -> None:
        a.op(o.SGDT, mem=Mem(RSP, -64))
        a.op(o.SIDT, mem=Mem(RSP, -64))
        a.op(o.STR, RAX)
        a.op(o.SMSW, RAX)
        a.op(o.PUSHF)
        a.op(o.POPF)

    monkeypatch.setitem(lowerings._items, CpuidSpec, attrs.evolve(lowerings[CpuidSpec], emit=tell))
    guest = (PLAIN, "[{phases: [{primitive: cpuid, iterations: 1}]}]")
    natively, _, _ = run(guest, NATIVE)

    for sets, same in ((MONITOR, True), (TRANSLATED, False), ((*TRANSLATED, "machine.isa=virtualizable"), True)):
        there, _, stopped = run(guest, sets)
        assert stopped is None
        assert (seen(there) == seen(natively)) is same


def test_a_cache_that_is_too_small_is_emptied_and_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    there, _, _ = run((PLAIN, ROUNDS), TRANSLATED)
    monkeypatch.setattr("vtsim.vmm.monitor.cache.PAGES", 1)
    small, _, stopped = run((PLAIN, ROUNDS), TRANSLATED)
    assert there.monitor is not None
    assert small.monitor is not None
    roomy, tight = there.monitor.translations(), small.monitor.translations()
    assert roomy is not None
    assert tight is not None

    assert stopped is None
    assert seen(small) == seen(there)
    assert roomy["flushes"] == roomy["evicted"] == 0
    assert tight["flushes"] > 0
    assert tight["blocks"] > tight["evicted"] > 0
    assert tight["blocks"] > roomy["blocks"]


def test_an_interrupt_on_the_way_back_into_a_translation_loses_no_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer is made to expire behind the first instruction of the way back, which restores RCX."""
    guest = ("{tick: 1 ms}", "[{phases: [{primitive: syscall, iterations: 8}]}]")
    there = machine(guest, TRANSLATED)
    assert there.monitor is not None
    monitor, m = there.monitor, there.engine.cpus[0]
    (vcpu,), (cache,) = monitor.vcpus, monitor.caches
    first = monitor.host.load(monitor.host.address(cache.structure) + TRANSLATOR["MISS"]) + BACK
    run_all, interrupted = there.engine.run_all, list[int]()

    def in_steps(until: int, quantum: int) -> tuple[int, int]:
        code, cpu = 0, -1
        while code == 0 and m[s.CYCLE] < until:
            code, cpu = run_all(int(m[s.CYCLE]) + 1, quantum)
            if first < m[s.RIP] < first + BACK_BYTES and m[s.APIC_DEADLINE] != FOREVER and len(interrupted) < 5:
                m[s.APIC_DEADLINE] = m[s.CYCLE]
                interrupted.append(monitor.word(vcpu, "INJECTED_INTERRUPTS"))
        return code, cpu

    monkeypatch.setattr(type(there.engine), "run_all", lambda engine, until, quantum: in_steps(until, quantum))
    outcome = there.run()
    monkeypatch.undo()
    natively, _, _ = run(guest, NATIVE)

    assert outcome.vms[0].stopped is None
    assert len(interrupted) == 5
    assert monitor.word(vcpu, "INJECTED_INTERRUPTS") >= interrupted[-1] + 1
    assert seen(there) == seen(natively)


@pytest.mark.slow
def test_address_spaces_that_do_not_fit_into_the_pool_are_evicted_and_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phase = "{primitive: context_switch, region: 16 KiB, iterations: 1}"
    guest = (PLAIN, "[" + ", ".join(f"{{name: p{n}, phases: [{phase}]}}" for n in range(3)) + "]")
    monkeypatch.setattr("vtsim.vmm.shadow.LEAST_PAGES", 24)
    monkeypatch.setitem(PLAIN_PARAMETERS, "shadow_permille", attrs.evolve(PLAIN_PARAMETERS["shadow_permille"], value=0))
    there, _, stopped = run(guest, TRANSLATED)
    natively, _, _ = run(guest, NATIVE)
    assert there.monitor is not None
    (vcpu,) = there.monitor.vcpus

    assert stopped is None
    assert seen(there) == seen(natively)
    assert there.monitor.host.load(there.monitor.host.address(vcpu.shadow.block) + POOL["EVICTED"]) > 0  # type: ignore[attr-defined]
