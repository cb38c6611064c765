"""A monitor beside a host: devices, time and idling cost a switch of worlds each, and guests see nothing of it."""

from __future__ import annotations

import pytest

from tests.vmm.test_binary_translation import TRANSLATED
from tests.vmm.test_trap_and_emulate import GUESTS, MONITOR, NATIVE, PLAIN, machine, run, seen
from vtsim.base.errors import ConfigError
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s

HOSTED = "vmm.hosted=true"
PORTS = (
    PLAIN,
    "[{phases: [{primitive: port_in, port: 0x5000, iterations: 3}, {primitive: port_out, port: 0x5000, value: 1, "
    "iterations: 2}]}]",
)
TICKS = GUESTS["ticks, idling and switches"]
INVENTORY = ("{tick: off, probe: true}", "[{phases: [{primitive: work, instructions: 10}]}]")


@pytest.mark.parametrize(("technique", "profile"), [(TRANSLATED, "p4-672"), (MONITOR, "skx-4114")])
def test_devices_and_time_are_the_hosts_and_guests_see_what_they_see_natively(
    technique: tuple[str, ...], profile: str
) -> None:
    processor = f"machine.profile={profile}"
    for guest in (PORTS, TICKS):
        there, counts, stopped = run(guest, (*technique, HOSTED, processor))
        natively, _, _ = run(guest, (*NATIVE, processor))
        assert there.monitor is not None
        found, host = there.monitor.statistics(), there.outcome().owners["host"]

        assert stopped is None
        assert seen(there) == seen(natively)
        if guest is PORTS:
            assert found["world_switches"] == 3 + 2
        else:  # every interrupt is the host's first, while the guest runs or the host waits in its place
            assert found["world_switches"] >= counts.counters["interrupts"] > 0
            assert sum(ring[o.R0][o.IDLE] for ring in host.cycles) > 0
        assert sum(ring[o.R3][o.USER_DEVICE] for ring in host.cycles) > 0
        assert sum(ring[o.R3][o.USER_DEVICE] for ring in counts.cycles) == 0
        there.engine.check_clock()


def test_the_inventory_that_a_guest_finds_is_that_of_the_hosts_process() -> None:
    found = []
    for hosted in ("true", "false"):
        sets = (*TRANSLATED, f"vmm.hosted={hosted}", "vms.0.devices=[piix3-ide]")
        there, _, stopped = run(INVENTORY, sets)
        assert stopped is None
        assert there.monitor is not None
        found.append(int(there.engine.cpus[0][s.DIGEST_KERNEL]))
        switches = there.monitor.statistics()["world_switches"]
        assert (switches > 32) is (hosted == "true")  # an address and a register for each device number of the bus

    assert found[0] == found[1]


@pytest.mark.parametrize("technique", ["hardware", "paravirtual", "interpreter"])
def test_who_has_no_monitor_is_not_hosted(technique: str) -> None:
    with pytest.raises(ConfigError, match=f"technique '{technique}' has no monitor that stands beside a host"):
        machine(GUESTS["faults"], (f"vmm.technique={technique}", HOSTED))
