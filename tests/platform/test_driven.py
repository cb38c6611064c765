"""Devices that a guest's kernel drives: what is mapped, invalidated, delivered, and how long a device reaches a buffer.

VT-d: "Queued Invalidation Interface"; "Draining of Requests to Memory".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import simpy
from attrs import evolve

from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel import layout
from vtsim.iommu import spec as sp
from vtsim.iommu.descriptors import descriptor
from vtsim.iommu.tables import Memory
from vtsim.iommu.unit import RemappingUnit
from vtsim.platform.dma_spec import REGISTERS
from vtsim.platform.machine import Machine
from vtsim.platform.remapping_registers import RemappingRegisters
from vtsim.study.measure import result_of
from vtsim.study.result import Dma, Driver
from vtsim.vmm.programs import viommu_words as viommu

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
    assert driver.interrupts_handled > 0
    assert driver.interrupts - driver.interrupts_blocked == driver.interrupts_merged + driver.interrupts_handled
    if mode == "identity":
        assert unit["walks"] == 0 and unit["completed"] == unit["requests"] > posted


@pytest.mark.parametrize("mode", ["off", "pass-through"])
def test_a_machine_that_maps_nothing_delivers_every_interrupt_of_its_devices(mode: str) -> None:
    """Passing requests through does not turn interrupt remapping off: messages must be in the format of the table."""
    _, driver, unit = ended(made("groups: 2, group: 4, iterations: 6", machine=f", iommu: {{mode: {mode}}}"))

    assert driver.done == driver.descriptors == 32
    assert driver.interrupts_handled > 0 == driver.interrupts_blocked
    assert unit.get("interrupt requests remapped", 0) == (driver.interrupts if mode == "pass-through" else 0)
    assert unit.get("walks", 0) == 0


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


@pytest.mark.parametrize(
    ("kernel", "machine"),
    [("dma: identity", ""), ("", ", iommu: {mode: pass-through}"), ("", ", iommu: {mode: off}")],
)
def test_where_nothing_is_mapped_a_device_reaches_a_buffer_that_its_driver_has_taken_back(
    kernel: str, machine: str
) -> None:
    """No table says what it may reach, and nothing ever refuses it."""
    _, driver, unit = ended(made(HOSTILE, kernel, ", hostile_ns: 100", machine))

    assert driver.hostile_through > 0 and driver.window_ns >= 100
    assert unit.get("blocked", 0) == 0


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_device_sends_no_more_writes_than_its_link_carries_however_many_it_is_to(lanes: int) -> None:
    link = f", link: {{generation: 3, lanes: {lanes}, dllp_percent: 8}}"
    _, driver, _ = ended(made(HOSTILE, "dma: never", f", hostile_ns: 1, tags: 8{link}"))

    bytes_per_ns = lanes * 8 * (128 / 130) * 0.92 / 8  # PCIe 3: 8 GT/s a lane, 128 of 130 bits
    elapsed_ns = driver.elapsed_cycles / 2.2
    assert 20 < driver.hostile_writes <= elapsed_ns * bytes_per_ns / (64 + 24) + 8
    assert driver.hostile_through > 0


@pytest.mark.parametrize(
    ("key", "value"), [("bytes", "128"), ("write", "true"), ("window", "2 MiB"), ("operations", "9")]
)
def test_what_a_device_would_do_of_its_own_is_refused_of_one_with_a_driver(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as raised:
        made(HOSTILE, "", f", {key}: {value}")

    line = f"dma: [{{name: nic, {key}: {value}}}]"
    assert str(raised.value) == (
        f"scenario:3: dma.0.{key}: a device with a driver moves the buffers that it is given, and does nothing of its own\n"
        f"    3 | {line}\n      | {' ' * line.index(value)}^\n"
        f" help: leave {key} out; what a driver gives it is said of its phase, primitive dma_buffers"
    )


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


def test_a_device_of_a_vm_reaches_all_of_its_memory_and_nothing_else_and_interrupts_it() -> None:
    machine = Machine(
        parse_scenario(
            "machine: {memory: 256 MiB}\ndma: [{name: nic}]\n"
            "vms: [{memory: 64 MiB, guest: {processes: [{phases: [{primitive: dma_buffers, iterations: 20}]}]}}]\n"
        )
    )
    result = result_of([machine.run()])
    driver, exits = result.dma[0].driver, {each.reason: each.count for each in result.exits}
    assert driver is not None and machine.driven is not None and not result.stopped

    assert (driver.descriptors, driver.done, driver.refused, driver.invalidations) == (24 * 16, 24 * 16, 0, 0)
    assert 0 < driver.interrupts_handled <= driver.interrupts
    assert exits["EXTERNAL_INTERRUPT"] > 0
    memory, unit = machine.vms[0].memory, machine.driven.unit
    assert memory is not None
    for gpa in (0x1000, 0x123_4560, (64 << 20) - 8):
        assert unit.translate(3 << 8, gpa).hpa == memory.frame(gpa >> 12) << 12 | gpa & 0xFFF
    beyond = unit.translate(3 << 8, 64 << 20)
    assert beyond.recorded and unit.translate(4 << 8, 0x1000).recorded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("vmm: {paging: shadow}", "devices are assigned to VMs on EPT only"),
        ("vmm: {technique: trap-and-emulate}", "devices are assigned to VMs on EPT only"),
        ("vmm: {sharing: {on: true}}", "memory that devices reach is not taken back"),
        ("machine: {iommu: {mode: pass-through}}", "a device of a VM would reach the memory of the host"),
        ("machine: {iommu: {write_buffers: true}}", "a hypervisor does not flush write buffers here"),
    ],
)
def test_devices_are_assigned_only_where_that_works(changes: str, message: str) -> None:
    guest = "guest: {processes: [{phases: [{primitive: dma_buffers}]}]}"
    with pytest.raises(ConfigError) as told:
        parse_scenario(f"{changes}\ndma: [{{name: nic}}]\nvms: [{{memory: 64 MiB, {guest}}}]\n")
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("count", "unit", "message"),
    [(65, "none", "65 devices have drivers, and there are vectors for 64"), (25, "nested", "has at most 24 devices")],
)
def test_more_devices_than_there_are_vectors_or_words_for_are_refused(count: int, unit: str, message: str) -> None:
    devices = ", ".join(f"{{name: d{n}, source: '{3 + n // 8:02x}:00.{n % 8}'}}" for n in range(count))
    processes = ", ".join(f"{{name: p{n}, phases: [{{{PHASE}, device: d{n}}}]}}" for n in range(count))
    with pytest.raises(ConfigError, match=message):
        parse_scenario(
            f"dma: [{devices}]\nvms: [{{memory: 256 MiB, viommu: {unit}, guest: {{processes: [{processes}]}}}}]\n"
        )


def virtual_unit(kind: str, personality: str, mode: str, iterations: int) -> tuple[Driver, dict[str, int], int]:
    """What a driver, the real unit and the exits were of a VM with a unit of its own."""
    phase = f"primitive: dma_buffers, iterations: {iterations}, group: 8, groups: 2"
    machine = Machine(
        parse_scenario(
            f"machine: {{memory: 256 MiB}}\nvmm: {{personality: {personality}}}\n"
            "dma: [{name: nic, hostile_ns: 300}]\n"
            f"vms: [{{memory: 64 MiB, viommu: {kind}, guest: {{kernel: {{dma: {mode}}}, "
            f"processes: [{{phases: [{{{phase}}}]}}]}}}}]\n"
        )
    )
    result = result_of([machine.run()])
    driver, exits = result.dma[0].driver, {each.reason: each.count for each in result.exits}
    assert driver is not None and result.iommu is not None and not result.stopped
    posted = 8 * (2 + iterations)
    assert (driver.done, driver.refused, driver.maps, driver.unmaps) == (posted, 0, posted, posted)
    return (
        driver,
        dict(result.iommu),
        exits.get("EPT_MISCONFIG", 0) + 1,
    )  # the first access found no entry: EPT violation


@pytest.mark.parametrize(
    ("kind", "personality", "each"), [("caching", "kvm", 2), ("caching", "minimal", 2), ("nested", "kvm", 1)]
)
def test_a_virtual_unit_exits_for_each_invalidation_and_in_caching_mode_a_map_is_one_too(
    kind: str, personality: str, each: int
) -> None:
    driver, unit, exits = virtual_unit(kind, personality, "strict", 6)

    assert driver.invalidations == exits == each * driver.unmaps
    assert unit["descriptors"] == 2 * driver.unmaps  # the real unit is told of unmaps only
    assert driver.hostile_writes > 0 == driver.hostile_through
    assert unit.get("PASID misses", 0) == (1 if kind == "nested" else 0)


@pytest.mark.parametrize("kind", ["caching", "nested"])
def test_an_identity_domain_behind_a_virtual_unit_costs_no_exit_and_contains_no_device(kind: str) -> None:
    driver, unit, _ = virtual_unit(kind, "kvm", "identity", 6)

    assert driver.invalidations == unit.get("descriptors", 0) == 0
    assert driver.hostile_through > 0
    assert unit["blocked"] == 0


def test_a_device_that_names_another_requester_cannot_read_its_ring_and_is_silent() -> None:
    machine = made("iterations: 2, groups: 1, group: 2, wait: poll", "dma: strict", ", claims: '05:00.0'")
    machine = Machine(evolve(machine.scenario, run=evolve(machine.scenario.run, limit=200_000)))
    result = result_of([machine.run()])
    (device,) = result.dma
    assert device.driver is not None and result.iommu is not None

    assert result.stopped and (device.driver.done, device.driver.refused, device.escaped) == (0, 2, 0)
    assert result.iommu["blocked"] == result.iommu["faults"] == device.aborted == 1


def test_a_driver_flushes_lines_of_tables_for_a_unit_that_does_not_snoop() -> None:
    """Once for each buffer that is mapped, and once for each that is unmapped; deferred, for polling takes its time."""

    def grown(coherent: str) -> tuple[float, float]:
        few, many = (
            ended(
                made(
                    f"iterations: {iterations}, groups: 1, group: 2, wait: poll",
                    "dma: deferred",
                    machine=f", iommu: {{coherent: {coherent}}}",
                )
            )[1]
            for iterations in (2, 10)
        )
        assert many.maps - few.maps == 16
        return (
            many.maps * many.map_cycles - few.maps * few.map_cycles,
            many.unmaps * many.unmap_cycles - few.unmaps * few.unmap_cycles,
        )

    snooped, flushed = grown("true"), grown("false")

    assert flushed == pytest.approx((snooped[0] + 16, snooped[1] + 16))


def test_a_driver_flushes_write_buffers_once_for_each_map_and_needs_to_for_a_device_that_looks_too_early() -> None:
    """VT-d: "Write Buffer Flushing". A device that still uses its old address has the unit read the entry as empty."""
    phase = "groups: 2, group: 2, iterations: 10, wait: poll"
    results = {}
    for buffers in ("false", "true"):
        machine = f", iommu: {{write_buffers: {buffers}}}"
        results[buffers] = ended(made(phase, "dma: strict", ", hostile_ns: 500", machine))
    (_, plain, seen), (_, flushing, unit) = results["false"], results["true"]

    assert plain.done == flushing.done and (plain.refused, flushing.refused) == (0, 0)
    assert flushing.map_cycles > plain.map_cycles
    assert seen["write buffer flushes"] == 0
    # one for each buffer that is mapped, one before each invalidation
    assert unit["write buffer flushes"] == flushing.maps + flushing.invalidations


@pytest.mark.parametrize(("drains", "when"), [(1, 1000), (0, 15)])
def test_a_wait_is_for_requests_in_flight_if_the_invalidation_drains(drains: int, when: int) -> None:
    memory = Memory(1 << 20)
    unit, clock, queue, status = RemappingUnit(memory.arena), simpy.Environment(), 0x1000, 0x3000
    unit.write("IQA", queue)
    unit.command(set=sp.QIE)
    engine: Any = SimpleNamespace(load=memory.word)
    registers = RemappingRegisters(engine, clock, unit, 10, 5, lambda: 1000)
    memory.store(queue, *descriptor("IOTLB", G=1, DR=drains), *descriptor("WAIT", SW=1, STDATA=7, STADDR=status >> 2))

    registers.write(REGISTERS + sp.IQT, 4, 32)

    clock.run(until=when - 1)
    assert memory.word(status) == 0
    clock.run(until=when + 1)
    assert memory.word(status) == 7


@pytest.mark.parametrize(("kind", "each"), [("caching", 2), ("nested", 1)])
def test_drivers_on_two_vcpus_share_the_virtual_unit(kind: str, each: int) -> None:
    processes = ", ".join(
        f"{{name: {name}, phases: [{{{PHASE}, device: {name}, group: 4, groups: 2, iterations: 2, bytes: 256}}]}}"
        for name in "ab"
    )
    result = result_of(
        [
            Machine(
                parse_scenario(
                    "machine: {memory: 256 MiB, cpus: 2}\nvmm: {personality: minimal}\n"
                    "dma: [{name: a}, {name: b, source: '04:00.0'}]\nvms: [{memory: 64 MiB, vcpus: 2, "
                    f"viommu: {kind}, guest: {{kernel: {{dma: strict}}, processes: [{processes}]}}}}]"
                )
            ).run()
        ]
    )
    drivers = [device.driver for device in result.dma if device.driver is not None]
    exits = {each.reason: each.count for each in result.exits}
    assert not result.stopped and result.iommu is not None

    buffers = 4 * (2 + 2)
    assert [driver.unmaps for driver in drivers] == [buffers, buffers]
    assert [driver.invalidations for driver in drivers] == [each * buffers, each * buffers]
    assert exits["EPT_MISCONFIG"] + 1 == 2 * each * buffers  # the first access found no entry: EPT violation
    assert all(driver.interrupts_handled > 0 for driver in drivers)


@pytest.mark.compiled_only
def test_a_page_of_2_mib_is_shadowed_by_pages_of_4_kib() -> None:
    phase = (
        "primitive: dma_buffers, groups: 1, group: 1, iterations: 1, bytes: 2 MiB, pages: 2 MiB, direction: transmit"
    )
    machine = Machine(
        parse_scenario(
            "machine: {memory: 256 MiB}\nvmm: {personality: minimal}\ndma: [{name: nic}]\n"
            "vms: [{memory: 64 MiB, viommu: caching, guest: {kernel: {dma: strict}, "
            f"processes: [{{phases: [{{{phase}}}]}}]}}}}]\n"
        )
    )
    result = result_of([machine.run()])
    (device,), hypervisor = result.dma, machine.hypervisor
    assert device.driver is not None and hypervisor is not None and not result.stopped

    assert (device.driver.done, device.driver.refused, device.driver.invalidations) == (2, 0, 4)
    unit = hypervisor.path.addresses["viommu"]
    assert hypervisor.host.load(unit + viommu.VI_PAGES) == 4 * 512
    assert hypervisor.host.load(unit + viommu.VI_FLUSHES) == 2  # what was mapped is invalidated, what was not is not


@pytest.mark.compiled_only
def test_a_nested_domain_is_flushed_as_a_whole() -> None:
    driver, unit, exits = virtual_unit("nested", "kvm", "deferred", 40)

    flushes = (driver.unmaps - 1) // (d.QUEUE_ENTRIES - 1)
    assert driver.flushes == driver.invalidations == exits == flushes == 1
    assert unit["descriptors"] == 2 and unit["entries invalidated"] > 16


@pytest.mark.compiled_only
@pytest.mark.parametrize("mode", ["strict", "deferred"])
def test_a_page_of_2_mib_takes_one_entry_and_one_walk_where_small_ones_take_512(mode: str) -> None:
    phase = "groups: 1, group: 2, iterations: 2, bytes: 2 MiB, direction: transmit, wait: poll, pages: "
    (small, few, many), (large, one, two) = (
        ended(made(f"{phase}{pages}", f"dma: {mode}", machine=", iommu: {coherent: false}"))
        for pages in ("4 KiB", "2 MiB")
    )

    assert few.done == one.done == 6
    assert few.invalidations == one.invalidations == (6 if mode == "strict" else 0)
    ring = 8  # its pages, their tables, root and context entries
    assert small.walks >= 512 * 6 > ring + 6 >= large.walks
    assert many["memory reads"] > 10 * two["memory reads"]
    assert few.map_cycles - one.map_cycles > 511 * len(("copy", "or", "store", "flush", "add", "add", "add", "sub"))


@pytest.mark.slow
def test_devices_of_two_vms_share_the_unit_and_reach_their_own_vm_only() -> None:
    def vm(device: str, more: str = "") -> str:
        phase = f"primitive: dma_buffers, iterations: 3, device: {device}"
        return f"{{memory: 64 MiB{more}, guest: {{kernel: {{dma: strict}}, processes: [{{phases: [{{{phase}}}]}}]}}}}"

    machine = Machine(
        parse_scenario(
            "machine: {memory: 512 MiB, cpus: 2}\ndma: [{name: left}, {name: right, source: '04:00.0'}]\n"
            f"vms: [{vm('right')}, {vm('left', ', viommu: caching')}]\n"
        )
    )
    result = result_of([machine.run()])
    drivers = {each.name: each.driver for each in result.dma}
    assert not result.stopped and machine.driven is not None

    assert all(driver is not None and driver.done == driver.descriptors == 7 * 16 for driver in drivers.values())
    unit, (of_right, of_left) = machine.driven.unit, (vm.memory for vm in machine.vms)
    assert of_right is not None and of_left is not None
    frames = range(0x100, 64 << 8, 97)
    reached = {unit.translate(4 << 8, gfn << 12).hpa >> 12 for gfn in frames}
    assert reached == {of_right.frame(gfn) for gfn in frames}
    assert reached.isdisjoint(of_left.frame(gfn) for gfn in range(64 << 8))
    assert unit.translate(3 << 8, 0x10_0000).recorded  # nothing is mapped for it any more but its ring


def test_cpus_wait_for_each_other_at_the_invalidation_queue_and_lose_no_interrupt() -> None:
    def run(cpus: int) -> list[Driver]:
        names = "abc"[:cpus]
        devices = ", ".join(f"{{name: {name}, source: '0{n + 3}:00.0'}}" for n, name in enumerate(names))
        processes = ", ".join(
            f"{{name: {name}, phases: [{{{PHASE}, group: 4, groups: 2, iterations: 4, device: {name}}}]}}"
            for name in names
        )
        machine = Machine(
            parse_scenario(
                f"machine: {{memory: 256 MiB, cpus: {cpus}}}\nvmm: {{technique: native}}\ndma: [{devices}]\n"
                f"vms: [{{memory: 128 MiB, vcpus: {cpus}, guest: {{kernel: {{dma: strict}}, processes: [{processes}]}}}}]"
            )
        )
        result = result_of([machine.run()])
        assert not result.stopped and result.iommu is not None
        assert result.iommu["descriptors"] == 2 * cpus * 4 * 6
        return [device.driver for device in result.dma if device.driver is not None]

    (alone,) = run(1)
    together = run(3)
    for driver in (alone, *together):
        assert driver.done == driver.descriptors == driver.unmaps == driver.invalidations == 4 * 6
        assert driver.interrupts == driver.interrupts_merged + driver.interrupts_handled
    # the unit does one at a time: the shares of three add up to three times one's
    assert sum(driver.invalidation_cycles for driver in together) / 3 > 1.5 * alone.invalidation_cycles
