"""Devices that a guest's kernel drives: what is mapped, invalidated, delivered, and how long a device reaches a buffer.

VT-d: "Queued Invalidation Interface".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel import layout
from vtsim.platform.machine import Machine
from vtsim.study.measure import result_of
from vtsim.study.result import Dma, Driver

PHASE = "primitive: dma_buffers"
BYTES = 256


def made(phase: str, kernel: str = "", device: str = "", machine: str = "") -> Machine:
    phase = phase if "bytes" in phase else f"{phase}, bytes: {BYTES}"
    return Machine(
        parse_scenario(
            f"machine: {{memory: 256 MiB{machine}}}\nvmm: {{technique: native}}\ndma: [{{name: nic{device}}}]\n"
            f"vms: [{{memory: 128 MiB, guest: {{kernel: {{{kernel}}}, processes: [{{phases: [{{{PHASE}, {phase}}}]}}]}}"
            "}]\n"
        )
    )


def ended(machine: Machine) -> tuple[Dma, Driver, dict[str, int]]:
    result = result_of([machine.run()])
    assert not result.stopped
    (device,) = result.dma
    assert device.driver is not None and result.iommu is not None
    return device, device.driver, dict(result.iommu)


@pytest.mark.parametrize("mode", d.MODES)
@pytest.mark.parametrize("mapping", ["single", "group"])
def test_each_mode_maps_unmaps_and_invalidates_as_often_as_it_must(mode: str, mapping: str) -> None:
    groups, group, iterations = 4, 6, 42
    device, driver, unit = ended(
        made(f"groups: {groups}, group: {group}, iterations: {iterations}, mapping: {mapping}", f"dma: {mode}")
    )

    posted = (groups + iterations) * group
    maps = posted if mapping == "single" else posted // group
    flushes = (maps - 1) // (d.QUEUE_ENTRIES - 1) if mode == "deferred" else 0
    assert (driver.descriptors, driver.done, driver.refused) == (posted, posted, 0)
    assert device.gbps == pytest.approx(posted * BYTES * 8 / (driver.elapsed_cycles / 2.2), rel=1e-3)
    assert (driver.maps, driver.unmaps) == (maps, maps)
    assert driver.flushes == flushes
    assert driver.invalidations == (maps if mode == "strict" else flushes)
    assert unit.get("descriptors", 0) == 2 * driver.invalidations  # the invalidation, and the wait
    assert unit["blocked"] == device.aborted == 0
    assert 0 < driver.interrupts_handled <= driver.interrupts
    if mode == "identity":
        assert unit["walks"] == 0 and unit["completed"] == unit["requests"] > posted


def test_a_timer_flushes_what_waits_for_ten_milliseconds() -> None:
    _, driver, _ = ended(made("groups: 1, group: 4, iterations: 4, work: 10 M", "dma: deferred, tick: 1 ms"))

    assert driver.unmaps < d.QUEUE_ENTRIES - 1
    elapsed_ms = driver.elapsed_cycles / 2.2e6
    assert 1 <= driver.flushes <= elapsed_ms / 10


HOSTILE = "groups: 2, group: 4, iterations: 6, wait: poll"


def hostile(kernel: str) -> Driver:
    _, driver, _ = ended(made(HOSTILE, kernel, ", hostile_ns: 100"))
    assert driver.hostile_writes > 20
    return driver


def test_a_device_reaches_what_is_unmapped_until_the_invalidation_and_only_then() -> None:
    strict, deferred, never = (hostile(f"dma: {mode}, iova: tree") for mode in ("strict", "deferred", "never"))

    assert (strict.hostile_through, strict.window_ns) == (0, 0)
    assert deferred.hostile_through > 0 and deferred.window_ns >= 100
    assert never.hostile_through > 0


def test_without_the_wait_for_the_invalidation_a_device_still_reaches_what_is_unmapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(d, "IN_USE", d.DONE)  # the program finds at once what the unit is to write

    assert hostile("dma: strict, iova: tree").hostile_through > 0


def nodes(machine: Machine, port_words: int) -> Iterator[tuple[int, int, int]]:
    """The tree in order: first and last page of each node, and black nodes above it; checks colours and links."""
    word = machine.engine.load
    root = word(port_words + d.P_TREE)

    def below(node: int, parent: int, black: int, red: bool) -> Iterator[tuple[int, int, int]]:
        if not node:
            blacks.add(black)
            return
        at = node - layout.DIRECT
        assert word(at + d.N_PARENT) == parent
        is_red = word(at + d.N_COLOUR) == d.RED
        assert not (red and is_red)
        black += not is_red
        yield from below(word(at + d.N_LEFT), node, black, is_red)
        yield word(at + d.N_LOW), word(at + d.N_HIGH), black
        yield from below(word(at + d.N_RIGHT), node, black, is_red)

    blacks: set[int] = set()
    yield from below(root, 0, 0, True)
    assert len(blacks) == 1


@pytest.mark.parametrize("mode", ["strict", "deferred"])
def test_the_tree_of_addresses_in_use_stays_a_red_black_tree_of_just_these(mode: str) -> None:
    phase = "groups: 6, group: 4, iterations: 12, bytes: 12 KiB"
    machine = made(phase, f"dma: {mode}, iova: tree")
    _, driver, _ = ended(machine)
    assert machine.driven is not None

    (device,) = machine.driven.devices
    found = list(nodes(machine, device.port.words))
    waiting = 0 if mode == "strict" else driver.unmaps - driver.flushes * (d.QUEUE_ENTRIES - 1)
    assert len(found) == 3 + waiting
    assert all(low <= high for low, high, _ in found)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(found))
    mine = found[: found.index(next(node for node in found if node[:2] == d.INTERRUPT_PAGES))] if waiting else []
    assert all(high - low + 1 == 4 and low % 4 == 0 for low, high, _ in mine)  # 3 pages, rounded up


@pytest.mark.parametrize(
    ("phase", "kernel", "message"),
    [
        ("device: disk", "", "there is no device 'disk'"),
        ("group: 1", "dma: deferred, tick: off", "without a timer tick nothing flushes what is deferred"),
    ],
)
def test_contradictions_are_told(phase: str, kernel: str, message: str) -> None:
    with pytest.raises(ConfigError) as told:
        made(phase, kernel)
    assert message in str(told.value)
