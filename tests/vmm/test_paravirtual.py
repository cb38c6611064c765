"""Paravirtual guests without VT-x: native results, hypercalls by formula, hostile ones refused, events, time."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.direct_guest import (
    MEMORY,
    SHARED,
    DirectGuest,
    Recount,
    answers,
    check_words,
    direct_guest,
    kept_words,
    random_requests,
)
from tests.vmm.test_direct import FAULTS, FORK, REQUESTS
from tests.vmm.test_shadow_guests import digests, exits
from tests.vmm.test_trap_and_emulate import PLAIN, SWITCHES, TICK
from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.base.jit import quiet
from vtsim.cli import GUEST_PANIC, main
from vtsim.config import parse_scenario
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Mem
from vtsim.cpu.codes import PROGRAM_END
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import load_profile
from vtsim.ept import direct as d
from vtsim.ept.spec import PF_PRESENT, PF_USER
from vtsim.guest.kernel import layout
from vtsim.platform.machine import Machine
from vtsim.platform.outcome import Outcome
from vtsim.platform.walk import walk
from vtsim.study.run import run as run_scenario
from vtsim.vmm.build import Guest, needs
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.paravirtual.build import ParavirtualMonitor, build_paravirtual
from vtsim.vmm.paravirtual.layout import FIRST_OWN, LAST_OWN
from vtsim.vmm.programs.upcalls import time_scales
from vtsim.vmm.spec import VmmSpec

TEXT = """
machine: {{memory: 256 MiB}}
vmm: {{technique: paravirtual}}
vms:
  - memory: 32 MiB
    guest:
      kernel: {kernel}
      processes: {processes}
"""
BOTH = "[{phases: [{primitive: fork, iterations: 2, pages: 3}, {primitive: exec, iterations: 1, pages: 3}]}]"
PRIVILEGED = (
    "[{phases: [{primitive: rdmsr, msr: 0x1A0, iterations: 3}, {primitive: port_in, port: 0x80, iterations: 2}, "
    "{primitive: mov_to_cr8, iterations: 2}, {primitive: vmcall, iterations: 1}]}]"
)
GUESTS = {
    "fork and exec": (PLAIN, BOTH),
    "faults": ("{tick: off, kpti: true}", FAULTS),
    "ticks, idling and switches": (TICK, SWITCHES),
    "what is privileged": (PLAIN, PRIVILEGED),
}


def run(guest: str, *sets: str) -> tuple[Machine, Outcome]:
    kernel, processes = GUESTS[guest]
    there = Machine(parse_scenario(TEXT.format(kernel=kernel, processes=processes), list(sets)))
    return there, there.run()


def seen(machine: Machine) -> int:
    return int(machine.engine.cpus[0][s.DIGEST_APPLICATION])


@pytest.mark.parametrize(
    ("guest", "sets"),
    [
        ("fork and exec", ()),
        ("faults", ("vmm.pv.batch=1",)),
        ("ticks, idling and switches", ()),
        ("ticks, idling and switches", ("machine.profile=p4-672",)),
    ],
)
def test_processes_see_what_they_see_natively_and_hypercalls_are_as_many_as_the_kernel_has_reasons(
    guest: str, sets: tuple[str, ...]
) -> None:
    there, outcome = run(guest, *sets)
    natively, expected = run(guest, "vmm.technique=native", *sets)
    counts, wanted = (each.owners["vm0"].counters for each in (outcome, expected))
    asked = outcome.hypercalls
    assert asked is not None
    calls, requests = asked["calls"], asked["requests"]

    assert outcome.vms[0].stopped is None
    assert seen(there) == seen(natively)
    assert (counts["page_faults"], counts["syscalls"]) == (wanted["page_faults"], wanted["syscalls"])
    assert asked["events"]["refusals"] == 0
    assert requests["load"] == requests["load_user"]
    assert asked["events"]["upcalls"] == counts["interrupts"] <= asked["events"]["events_sent"]
    if not counts["interrupts"]:  # all who enter the kernel leave by a hypercall: not to exit, but when they begin
        assert calls["iret"] == counts["syscalls"] + counts["page_faults"]
    if guest == "faults":
        pages, tables = 36, 2  # a table is made read-only and linked; 36 pages are more than are flushed one by one
        assert requests["update"] == 2 * (pages + pages) + 2 * tables
        assert requests["flush_all"] == 2
        assert calls["request"] == sum(requests.values())


def test_privileged_operations_that_a_kernel_still_executes_are_done_in_its_place() -> None:
    """CPUID is asked for two leaves at boot; what nobody does in its place is the kernel's own fault."""
    _, outcome = run("what is privileged")
    assert outcome.monitor is not None

    assert outcome.monitor["traps"] == outcome.owners["vm0"].emulated[0] == 2 + 3 + 2 + 2
    assert outcome.vms[0].stopped is not None
    assert outcome.vms[0].stopped.startswith("process 'app' was killed by #UD")


def hypervisor(steps: Callable[[DirectGuest], None]) -> tuple[ParavirtualMonitor, dict[str, Any]]:
    """A guest's steps, made in ring 3 until it stops or its VM ends."""
    holder: dict[str, Any] = {}
    vmm, profile = VmmSpec(technique="paravirtual", paging="direct-pv"), load_profile("skx-4114")
    wants = needs(vmm, [MEMORY], 4 * MEMORY)
    geometry = Geometry(
        cpus=1, memory_bytes=4 * MEMORY, pool_pages=wants.pool_pages + 4096, code_pages=wants.code_pages + 16,
        rows=wants.rows + 4096, owners=wants.owners + 1,
    )  # fmt: skip
    with quiet():
        engine = Engine(profile, geometry)
        guest = Guest(name="vm0", cpu=0, memory=MEMORY, build=direct_guest(steps, holder))
        monitor = build_paravirtual(vmm=vmm, profile=profile, engine=engine, guests=[guest])
        assert engine.run(0, until=1 << 40) == PROGRAM_END, engine.counters()
    engine.check_clock()
    check_frames(monitor)
    return monitor, holder


def check_frames(monitor: ParavirtualMonitor) -> None:
    """What is kept of frames is what the tables imply; no table is writable, no frame foreign, the hypervisor's out of reach."""
    (vcpu,), host = monitor.vcpus, monitor.host
    owned = {int(frame) for frame in vcpu.memory.frames}  # type: ignore[union-attr]
    first = next(i.imm for i in monitor.program.instructions if i.comment == "words of frames") - at.DIRECT >> 12
    kept = kept_words(host.words, first, iter(sorted(owned)))
    recount = Recount(lambda frame: host.words(frame, mem.TABLE), own=range(FIRST_OWN, LAST_OWN + 1))
    check_words(recount, kept, owned, monitor.word(vcpu, "KERNEL_CR3") >> 12)


IN_RING_3 = {
    **REQUESTS,
    "what is no request": (1, lambda g: (d.STACK, 0)),  # all kinds are
    "a root of processes that is none": (0, lambda g: (d.LOAD_USER, g.machine(0x400))),
    "the hypervisor's entry": (0, lambda g: (g.table.root << 12 | LAST_OWN << 3, 0)),
}  # fmt: skip


def test_requests_are_carried_out_where_they_keep_the_guest_inside_its_memory() -> None:
    def steps(guest: DirectGuest) -> None:
        for _, what in IN_RING_3.values():
            guest.request(*what(guest))

    monitor, holder = hypervisor(steps)

    assert dict(zip(IN_RING_3, answers(holder), strict=True)) == {name: good for name, (good, _) in IN_RING_3.items()}
    assert monitor.word(monitor.vcpus[0], "REFUSALS") == sum(not good for good, _ in IN_RING_3.values())


def test_whatever_a_guest_asks_for_its_tables_stay_its_own_and_read_only() -> None:
    _, holder = hypervisor(random_requests(1, 60))

    assert sum(answer == 1 for answer in answers(holder)) > 10


def test_other_hypercalls_are_refused_where_they_ask_for_what_is_not_the_guests() -> None:
    wanted = {
        "a number that is none": ((len(d.CALLS),), -1),
        "a negative number": ((-1,), -1),
        "handlers that stand in the hypervisor": ((d.CALL_SET_TRAPS, at.DIRECT, 1), -1),
        "more handlers than exceptions": ((d.CALL_SET_TRAPS, SHARED, 33), -1),
        "to sleep in another way": ((d.CALL_SCHEDULE, 7), -1),
        "an event of a port that is none": ((d.CALL_EVENT, d.SEND, d.PORTS), -1),
        "an unknown operation on events": ((d.CALL_EVENT, 9), -1),
        "the entry of an address without tables": ((d.CALL_UPDATE_VA, 1 << 46, 0, 0), -1),
        "the entry of the hypervisor's address": ((d.CALL_UPDATE_VA, at.DIRECT, 0, 0), -1),
        "nothing": ((d.CALL_NOTHING,), 0),
    }

    def steps(guest: DirectGuest) -> None:
        for call, _ in wanted.values():
            guest.call(*call)
        for address in (at.DIRECT, at.TEXT, at.RAM):  # what it maps is user memory, what the hypervisor maps is not
            guest.attempt(lambda address=address: guest.load(address))  # type: ignore[misc]
        guest.attempt(lambda: guest.a.op(ops.MOV_TO_CR, s.RAX, imm=3))
        guest.attempt(lambda: guest.a.op(ops.LIDT, mem=Mem(displacement=SHARED)))
        guest.attempt(lambda: guest.a.op(ops.SYSENTER))  # whose MSRs the hypervisor leaves at 0

    _, holder = hypervisor(steps)

    answered = answers(holder)
    assert dict(zip(wanted, answered, strict=False)) == {name: answer for name, (_, answer) in wanted.items()}
    assert answered[len(wanted) :] == [14, 14, 14, 13, 13, 13]


def test_whatever_a_guest_calls_with_its_frames_stay_its_own() -> None:
    """`hypervisor` checks them. IRET, which would lead anywhere, and waiting for nothing are left out."""
    chance = random.Random(5)
    numbers = [n for n in (-1, *range(len(d.CALLS) + 1)) if n not in (d.CALL_IRET, d.CALL_SCHEDULE)]

    def steps(guest: DirectGuest) -> None:
        mine = [guest.machine(0x400), guest.entry_of(0x400), guest.table.root << 12 | 8, SHARED]
        others = [at.DIRECT, at.TEXT, at.DIRECT - 8, 1 << 46, -1, -(1 << 47), 1 << 12, 0, 2, 63]
        _on_event(guest)
        for _ in range(40):
            guest.call(chance.choice(numbers), *(chance.choice(mine + others) for _ in range(3)))

    monitor, _ = hypervisor(steps)

    assert monitor.hypercalls()["events"]["refusals"] > 10


@pytest.mark.parametrize("number", [d.CALL_IRET, d.CALL_NOTHING])
def test_a_stack_that_stands_in_the_hypervisor_ends_the_vm(number: int) -> None:
    """A frame is read from it, or an event's frame would be written to it."""

    def steps(guest: DirectGuest) -> None:
        _on_event(guest)
        guest.call(d.CALL_EVENT, d.SEND, 1)
        guest.a.st_value(word(d.UPCALL_MASK), 0)
        guest.a.mov(s.RSP, at.DIRECT + 0x8000)
        guest.call(number)

    monitor, _ = hypervisor(steps)

    assert monitor.death(monitor.vcpus[0]) == at.DEATHS[at.NO_STACK]


def word(offset: int) -> Mem:
    return Mem(displacement=SHARED + offset)


def _on_event(guest: DirectGuest) -> None:
    """A handler of events that counts in R12 when others are masked, acknowledges all, and lets others in."""
    a = guest.a
    a.mov(s.R12, 0)
    a.jmp("begin")
    a.label("on_event")
    a.pop(s.RCX)
    a.pop(s.R11)
    a.ld(s.R13, word(d.UPCALL_MASK))
    a.add(s.R12, register=s.R13)
    a.st_value(word(d.UPCALL_PENDING), 0)
    a.st_value(word(d.EVENTS), 0)
    a.st_value(Mem(s.RSP, 8), at.GUEST_CODE)
    a.st_value(word(d.UPCALL_MASK), 0)
    a.op(ops.IRET)
    a.label("begin")
    guest.call(d.CALL_SET_CALLBACKS, "on_event", 0)


def test_an_event_that_is_masked_is_not_lost_and_comes_once_when_it_is_unmasked() -> None:
    """SHARED words mask all upcalls, or those of a port; only a hypercall, or an interrupt, looks at them."""
    port = 5

    def steps(guest: DirectGuest) -> None:
        _on_event(guest)
        for _ in range(2):
            guest.call(d.CALL_EVENT, d.SEND, port)
        guest.log(s.R12)
        guest.a.st_value(word(d.UPCALL_MASK), 0)
        for _ in range(2):
            guest.call(d.CALL_NOTHING)
            guest.log(s.R12)
        guest.a.st_value(word(d.EVENTS_MASKED), 1 << port)
        guest.call(d.CALL_EVENT, d.SEND, port)
        guest.log(s.R12)
        for _ in range(2):
            guest.call(d.CALL_EVENT, d.UNMASK, port)
            guest.log(s.R12)

    monitor, holder = hypervisor(steps)

    assert answers(holder) == [0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 2, 0, 2]
    events = monitor.hypercalls()["events"]
    assert (events["events_sent"], events["upcalls"], events["refusals"]) == (2, 2, 0)


def test_time_from_the_shared_page_is_that_of_the_tsc_and_never_goes_back() -> None:
    """Each new reading of the TSC by the hypervisor, at the end of a wait, rounds down to a ns once."""
    period, rounds = 20_000, 3

    def look(guest: DirectGuest) -> None:
        a = guest.a
        for offset in (d.TIME_VERSION, d.TIME_STAMP, d.TIME_BASE, d.TIME_SCALE):
            a.ld(s.RAX, word(offset))
            guest.log(s.RAX)
        a.op(ops.RDTSC)
        a.shl(s.RDX, 32)
        a.or_(s.RAX, register=s.RDX)
        guest.log(s.RAX)

    def steps(guest: DirectGuest) -> None:
        _on_event(guest)
        guest.call(d.CALL_EVENT, d.BIND_TIMER)
        for n in range(rounds):
            guest.call(d.CALL_SET_TIMER, (n + 1) * period)
            guest.call(d.CALL_SCHEDULE, d.BLOCK)
            guest.log(s.R12)
            look(guest)
            look(guest)

    monitor, holder = hypervisor(steps)

    hz = monitor.host.profile.clock_hz
    clock = 0
    after_binding = iter(answers(holder)[2:])
    for n in range(rounds):
        assert [next(after_binding) for _ in range(3)] == [0, 0, n + 1]
        for _ in range(2):
            version, stamp, base, scale, tsc = (next(after_binding) for _ in range(5))
            now = base + ((tsc - stamp) * scale >> 32)
            assert version == 2 * (n + 1)
            assert max(clock, (n + 1) * period) <= now
            assert 0 <= tsc * 10**9 // hz - now <= n + 2
            clock = now


@pytest.mark.parametrize("sets", [("vmm.ept.populate=prebuilt",), ("vmm.paging=direct-pv", "vmm.personality=minimal")])
def test_under_vt_x_a_shared_page_saves_the_exits_of_the_timer_and_the_end_of_its_interrupts(
    sets: tuple[str, ...],
) -> None:
    there, outcome = run("ticks, idling and switches", "vmm.technique=hardware", "vmm.pv.events=true", *sets)
    natively, _ = run("ticks, idling and switches", "vmm.technique=native")
    assert outcome.hypercalls is not None
    events = outcome.hypercalls["events"]

    assert outcome.vms[0].stopped is None
    assert digests(there)[0] == digests(natively)[0]
    assert 0 < events["upcalls"] == outcome.owners["vm0"].counters["injections"] <= events["events_sent"]
    assert events["refusals"] == exits(there, "MSR_WRITE") == exits(there, "RDTSC") == 0
    if len(sets) == 1:  # two at boot; every upcall of the timer sets it anew
        assert exits(there, "VMCALL") - 2 >= events["upcalls"]


def test_a_process_does_not_reach_its_kernel_though_both_run_in_ring_3() -> None:
    scenario = parse_scenario(TEXT.format(kernel=PLAIN, processes=FORK), [])
    of_process = walk(scenario, 0, layout.DIRECT & (1 << 64) - 1, ring=3)
    of_kernel = walk(scenario, 0, layout.DIRECT & (1 << 64) - 1, ring=0)
    of_hypervisor = walk(scenario, 0, at.DIRECT & (1 << 64) - 1, ring=0)

    assert of_process.error_code == PF_USER  # no page is there
    assert of_kernel.fault == ""
    assert of_hypervisor.error_code == PF_USER | PF_PRESENT


@pytest.mark.parametrize("clock_hz", [1_000_000_001, 2_200_000_000, 2_400_000_000, 5_000_000_000])
def test_the_timer_never_fires_before_the_clock_shows_its_time(clock_hz: int) -> None:
    scale, cycles = time_scales(clock_hz)
    for ns in (1, 2, 999, 20_000, 10**9 + 7, 10**13 + 3):
        deadline = (ns * cycles >> 32) + 1  # as the hypercall has it
        assert ns <= deadline * scale >> 32 <= ns + 1 + ns // 10**9


def test_a_kernel_for_a_hypervisor_that_is_not_there_panics_and_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "panic.yaml"
    file.write_text(TEXT.format(kernel="{tick: off, interface: paravirtual}", processes=FAULTS))
    why = "guest panic: hypervisor interface vtsim-direct not found (CPUID leaves 40000000H and 40000001H)"
    for technique in ("native", "trap-and-emulate"):
        status = main(["run", str(file), "--json", "--set", f"vmm.technique={technique}", "--no-baseline"])
        assert (status, why in capsys.readouterr().out) == (GUEST_PANIC, True)
    result = run_scenario(file, sets=["vms.0.guest.processes.0.phases.0.region=8 KiB"])

    assert result.stopped == {}  # neither there nor natively, where the kernel is built without
    assert result.native is not None
    assert result.hypercalls is not None


@pytest.mark.parametrize(
    ("setting", "message", "help"),
    [
        ("vmm.paging=ept", "technique 'paravirtual' translates by direct tables", "paging can be direct-pv, auto"),
        ("vms.0.guest.kernel.page_size=2 MiB", "a paravirtual kernel has 4 KiB pages only: Xen's CPUID has no PSE, and none of its updates takes a large entry",
         "page_size can be 4 KiB; or choose vmm.technique 'hardware'"),
    ],
)  # fmt: skip
def test_what_a_kernel_in_ring_3_cannot_have_is_the_users_mistake(setting: str, message: str, help: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run("faults", setting)

    assert (message, help) in [(problem.message, problem.help) for problem in caught.value.problems]
