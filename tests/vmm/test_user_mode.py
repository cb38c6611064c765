"""Guests that are processes of their host: native results, stops and system calls by formula, what they cannot do."""

from __future__ import annotations

import pytest

from tests.vmm.test_paravirtual import PRIVILEGED, TEXT, run, seen
from vtsim.base.errors import ConfigError
from vtsim.base.memory import PAGE_BYTES
from vtsim.config import parse_scenario
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import FOREVER, HOST_PROCESS
from vtsim.guest.kernel.schedule import AFTER_SWITCH, BEFORE_SWITCH
from vtsim.platform.machine import Machine
from vtsim.study.run import run as run_scenario
from vtsim.vmm.monitor import layout as monitor
from vtsim.vmm.paravirtual import layout as paravirtual
from vtsim.vmm.user_mode import layout as user_mode
from vtsim.vmm.user_mode.layout import RETURN

USER_MODE = "vmm.technique=user-mode"


def other_calls(returns: int, switches: int) -> int:
    """System calls of the host that a kernel makes beside those that map: to return, and to switch."""
    return 2 * returns + len(BEFORE_SWITCH + AFTER_SWITCH) * switches


@pytest.mark.parametrize(
    ("guest", "sets"),
    [
        pytest.param("fork and exec", (), marks=pytest.mark.compiled_only),
        ("ticks, idling and switches", ("machine.profile=p4-672",)),
    ],
)
def test_processes_see_what_they_see_natively_and_every_entry_into_their_kernel_is_two_stops(
    guest: str, sets: tuple[str, ...]
) -> None:
    there, outcome = run(guest, USER_MODE, *sets)
    natively, expected = run(guest, "vmm.technique=native", *sets)
    counts, wanted = (each.owners["vm0"] for each in (outcome, expected))
    asked = outcome.hypercalls
    assert asked is not None
    stops, calls, counters = asked["stops"], asked["calls"], counts.counters

    assert outcome.vms[0].stopped is None
    assert seen(there) == seen(natively)
    assert (counters["page_faults"], counters["syscalls"]) == (
        wanted.counters["page_faults"],
        wanted.counters["syscalls"],
    )
    assert asked["events"]["refusals"] == 0
    assert "multi" not in calls
    assert calls["request"] + calls.get("update_va", 0) == sum(asked["requests"].values())
    assert stops["calls"] == counters["syscalls"]
    assert stops["signals"] == counters["page_faults"] + counters["interrupts"]
    if guest != "fork and exec":
        assert calls["nothing"] == other_calls(stops["returns"], asked["requests"]["load_user"])
    if not counters["interrupts"]:  # a process is entered once more than it is left: its last call does not return
        assert stops["returns"] == stops["calls"] + stops["signals"]

    host = outcome.owners["host"]
    asks = 4 * stops["calls"] + 2 * stops["returns"] + 2 * stops["signals"]  # it reads, pokes, lets go on, waits
    assert host.counters["exceptions"] == asks  # by INT 80H
    assert host.counters["syscalls"] == 0
    assert sum(ring[o.R3][o.SCHEDULING] for ring in host.cycles) > 0
    assert sum(ring[o.R3][o.SCHEDULING] for ring in counts.cycles) == 0  # the tracing thread is not the guest's
    there.engine.check_clock()


@pytest.mark.slow
def test_a_copied_space_is_unmapped_entry_by_entry_and_mapped_page_by_page() -> None:
    def updates(technique: str, pages: int) -> int:
        phases = f"[{{phases: [{{primitive: fork, iterations: 1, pages: {pages}}}]}}]"
        text = TEXT.format(kernel="{tick: off}", processes=phases)
        found = run_scenario(parse_scenario(text, [technique, "run.baseline=false"])).hypercalls
        assert found is not None
        # half a root and every table below it, but for the entries that lead to one
        unmapped = found.calls["nothing"] - other_calls(found.stops["returns"], found.requests["load_user"])
        assert unmapped > 256
        assert (unmapped - 256) % (512 - 1) == 0
        return found.requests["update"]

    more = 5
    # of each page more: the parent maps it, and makes it read-only; the child maps it, and copies it
    assert updates(USER_MODE, 3 + more) - updates(USER_MODE, 3) == 4 * more


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("vmm.paging=shadow",), "technique 'user-mode' translates by direct tables"),
        (("vms.0.devices=[piix3-ide]",), "has no ports to find devices by"),
        ((f"vms.0.guest.processes={PRIVILEGED}",), "has no privileged operations"),
        (("vms.0.guest.kernel.interface=hardware",), "this kernel loads tables of guest-physical addresses"),
    ],
)
def test_what_a_process_of_the_host_cannot_do_is_refused_with_its_place(sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_scenario(TEXT.format(kernel="{}", processes="[{phases: [{primitive: work}]}]"), [USER_MODE, *sets])


def test_a_result_that_an_event_delays_is_seen_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer is made to expire while the tracing thread lets a process return."""
    phases = "{primitive: cpuid, iterations: 1}, {primitive: syscall, iterations: 5}"
    text = TEXT.format(kernel="{tick: 1 ms}", processes=f"[{{phases: [{phases}]}}]")
    there = Machine(parse_scenario(text, [USER_MODE]))
    host, m = there.monitor, there.engine.cpus[0]
    assert host is not None
    (vcpu,), run_all, interrupted = host.vcpus, there.engine.run_all, list[int]()

    def in_steps(until: int, quantum: int) -> tuple[int, int]:
        code, cpu = 0, -1
        while code == 0 and m[s.CYCLE] < until:
            code, cpu = run_all(int(m[s.CYCLE]) + 50, quantum)
            words = [host.word(vcpu, name) for name in ("KERNEL", "DELIVERS", "BY_SYSCALL")]
            returning = words == [HOST_PROCESS, RETURN, 1] and m[s.PRIVILEGE] == o.R3
            if returning and m[s.APIC_DEADLINE] != FOREVER and len(interrupted) < 3:
                m[s.APIC_DEADLINE] = m[s.CYCLE]
                interrupted.append(host.word(vcpu, "UPCALLS"))
        return code, cpu

    monkeypatch.setattr(type(there.engine), "run_all", lambda engine, until, quantum: in_steps(until, quantum))
    outcome = there.run()
    monkeypatch.undo()
    natively = Machine(parse_scenario(text, ["vmm.technique=native"]))
    natively.run()

    assert outcome.vms[0].stopped is None
    assert len(interrupted) == 3
    assert host.word(vcpu, "UPCALLS") >= 3
    assert seen(there) == seen(natively)


def test_the_words_of_a_vcpu_fit_into_its_page() -> None:
    for words in (monitor.VCPU_WORDS, paravirtual.WORDS, user_mode.WORDS):
        assert 8 * sum(count for _, count, _ in words) <= PAGE_BYTES - monitor.STACK_BYTES
