"""Pages that devices ask for: served by the kernel of a guest from an interrupt, once each, and only what it allowed.

VT-d: "Page Request Queue"; "Page Request Event"; "Page Group Response Descriptor".
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import simpy
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.iommu.worlds import RW_PAGE, SID, World
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest import dma_memory
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel import page_requests as program
from vtsim.guest.kernel.lengths import length
from vtsim.iommu import descriptors as q
from vtsim.iommu import dma as g
from vtsim.iommu import spec as sp
from vtsim.iommu import state as unit_state
from vtsim.iommu.unit import RemappingUnit
from vtsim.platform import page_asking
from vtsim.platform.driven import DrivenDevice
from vtsim.platform.machine import Machine
from vtsim.platform.witness import Wanted
from vtsim.study.measure import result_of
from vtsim.study.report import plain_text, report
from vtsim.study.result import Driver, PageRequests

SMALL_QUEUE = ", page_request_queue: 4 KiB"


def made(
    device: str = "page_requests: 64", phase: str = "", *, kernel: str = "", iommu: str = "", names: str = "a",
    technique: str = "native", wanted: Wanted | None = None, scale: int = 1,
) -> Machine:  # fmt: skip
    devices = ", ".join(
        f"{{name: {name}, source: '0{n + 3}:00.0', {'' if 'requests: ats' in device else 'requests: ats, '}{device}}}"
        for n, name in enumerate(names)
    )
    loop = f"primitive: dma_buffers, {'' if 'groups' in phase else 'groups: 2, group: 4, iterations: 6, '}wait: poll"
    size = "" if "bytes" in phase else ", bytes: 256"
    processes = ", ".join(
        f"{{name: {name}, phases: [{{{loop}{size}{', ' * bool(phase)}{phase}, device: {name}}}]}}" for name in names
    )
    how = kernel if "dma:" in kernel else f"dma: strict{kernel}"
    return Machine(
        parse_scenario(
            f"machine: {{memory: 256 MiB, cpus: {len(names)}, iommu: {{{iommu}}}}}\nvmm: {{technique: {technique}}}\n"
            f"dma: [{devices}]\nvms: [{{memory: 128 MiB, vcpus: {len(names)}, guest: {{kernel: {{{how}}}, "
            f"processes: [{processes}]}}}}]\nrun: {{work_scale: {scale}}}"
        ),
        wanted=wanted,
    )


def ended(machine: Machine) -> list[tuple[Driver, PageRequests]]:
    result = result_of([machine.run()])
    assert not result.stopped
    found = []
    for device in result.dma:
        assert device.driver is not None and device.driver.pages is not None
        found.append((device.driver, device.driver.pages))
    return found


def unit_of(machine: Machine) -> dict[str, int]:
    assert machine.driven is not None
    machine.driven.unit.check_laws()
    return machine.driven.unit.statistics()


def queued(machine: Machine) -> list[int]:
    """The second words of the requests that the kernel has not passed."""
    assert machine.driven is not None
    unit = machine.driven.unit
    queue, head, tail = (unit.read(name) for name in ("PQA", "PQH", "PQT"))
    size = 0x1000 << (queue & 7)
    places = range(head, tail + size * (tail < head), d.PAGE_REQUEST_BYTES)
    return [machine.engine.load((queue & ~0xFFF) + place % size + 8) for place in places]


@pytest.mark.parametrize(("allowed", "bytes_"), [(1, 256), (3, 10000), (64, 10000)])
def test_each_page_is_mapped_once_when_its_device_asks_and_each_group_is_answered_once(
    allowed: int, bytes_: int
) -> None:
    machine = made(f"page_requests: {allowed}", f"bytes: {bytes_}")
    ((driver, pages),) = ended(machine)
    of_buffer = -(-bytes_ // 4096)
    total = 32 * of_buffer

    assert driver.done == driver.descriptors == driver.maps == driver.unmaps == 32 and driver.refused == 0
    assert pages.mapped == total and pages.invalid == 0
    assert pages.groups == pages.succeeded and pages.refused == pages.waiting == pages.unexpected == 0
    assert 1 <= pages.most <= allowed
    if allowed >= 4 * of_buffer:  # every descriptor finds room for all its pages
        assert (pages.requests, pages.groups, pages.held) == (total, 32, 32)
    else:
        assert total <= pages.requests and pages.most == allowed
    assert 0 < pages.wait_mean_ns <= pages.wait_max_ns
    assert driver.invalidations == driver.device_invalidations == 32  # responses are none
    assert machine.driven is not None
    device = machine.driven.devices[0]  # whose every operation ended once, though it was held before
    assert device.moved == 32 * bytes_ and device.row[g.ISSUED] == device.row[g.ENDED] == device.row[g.N_OPERATIONS]
    unit = unit_of(machine)
    assert unit["page requests"] == unit["page requests queued"] == pages.requests == pages.handled
    assert unit["page group responses"] == pages.groups
    assert queued(machine) == [] and unit["blocked"] == unit["faults"] == 0


def test_buffers_that_stay_mapped_are_asked_for_once() -> None:
    ((driver, pages),) = ended(made(phase="mapping: once, bytes: 10000"))

    assert driver.done == 32
    assert driver.maps == driver.unmaps == driver.invalidations == 8
    assert pages.mapped == pages.requests == 24 and pages.groups == 8


def test_a_buffer_that_its_device_never_touched_needs_no_invalidation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device reports what it has not moved."""

    def idle(device: Any, address: int, size: int, word: int) -> Iterator[Any]:
        yield device.platform.clock.timeout(1)

    monkeypatch.setattr("vtsim.platform.driven.DrivenDevice.transfer", idle)

    ((driver, pages),) = ended(made(phase="bytes: 10000"))

    assert driver.done == driver.maps == driver.unmaps == 32
    assert driver.invalidations == pages.requests == 0


@pytest.mark.parametrize("phase", ["bytes: 256", "bytes: 9000, mapping: once"])
def test_after_an_unmap_a_page_is_asked_for_in_vain_and_nothing_gets_through(phase: str) -> None:
    """Whether a write goes through is judged by a walk of the driver's table in Python."""
    machine = made("page_requests: 64, hostile_ns: 100", phase, kernel=", iova: tree")
    ((driver, pages),) = ended(machine)

    assert driver.done == 32 and driver.refused == pages.failed == 0
    assert driver.hostile_writes > 20 and driver.hostile_through == 0
    assert pages.mapped <= driver.maps * -(-int(phase.split()[1].strip(",")) // 4096)
    if "once" not in phase:  # the address goes back, and for a while it is nobody's
        assert pages.refused > 0
    assert pages.groups == pages.succeeded + pages.refused + pages.waiting and pages.waiting <= 1


@pytest.mark.parametrize("left_out", ["IOTLB", "node"])
def test_a_driver_that_forgets_the_invalidation_or_the_buffer_is_reached(
    left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit = Assembler.call if left_out == "IOTLB" else Assembler.st_value

    def mutated(a: Assembler, *how: Any, **more: Any) -> None:
        if left_out == "IOTLB" and how[0] == "invalidate_pages":
            return
        if left_out == "node" and how[0] == Mem(s.RCX, d.N_BUFFER):
            return
        emit(a, *how, **more)

    monkeypatch.setattr(Assembler, emit.__name__, mutated)

    ((driver, pages),) = ended(made("page_requests: 64, hostile_ns: 100"))

    assert pages.mapped > 32 if left_out == "node" else driver.hostile_through > 0


@pytest.mark.slow
@pytest.mark.parametrize(("flood_ns", "burst"), [(20000, 1), (150000, 160)])
def test_what_was_never_allowed_is_answered_as_invalid_and_maps_nothing(
    flood_ns: int, burst: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = RemappingUnit.page_request

    def kept(unit: Any, sid: int, address: int, access: int, **more: Any) -> int:
        if more["group"] == page_asking.FLOOD_GROUP:
            asked.append(address)
        return int(ask(unit, sid, address, access, **more))

    monkeypatch.setattr(RemappingUnit, "page_request", kept)
    machine = made(
        f"page_requests: 64, flood_ns: {flood_ns}, flood: {burst}",
        "groups: 2, group: 4, iterations: 16",
        kernel=SMALL_QUEUE,
    )
    ((driver, pages),) = ended(machine)
    unit = unit_of(machine)

    assert driver.done == driver.unmaps == 72 and driver.refused == 0
    assert pages.mapped == 72 and pages.refused == pages.waiting == pages.unexpected == 0
    assert pages.flood == len(asked) > 10 and pages.flood_refused > 5
    assert machine.driven is not None
    assert {machine.driven.devices[0].leads_to(address) for address in asked} == {-1}
    last = sum(word >> 2 & 1 for word in queued(machine))
    assert unit["page group responses"] == pages.groups + pages.flood_owed - last
    answered = pages.flood_refused + pages.flood_succeeded
    assert answered <= pages.flood_owed <= answered + last + 4  # on the link down
    if burst > 127:
        assert unit["page request overflows"] > 0 and unit["page requests dropped"] > 0
        assert pages.flood_succeeded > 0  # answered by the unit: its queue had no room
    else:
        assert unit["page request overflows"] == unit["page requests dropped"] == pages.flood_succeeded == 0


def test_what_overflows_is_asked_for_again_and_ends() -> None:
    """Sixteen descriptors of sixteen pages in a queue of 127: a group of which a part was taken is not completed."""
    machine = made("page_requests: 256", "groups: 1, group: 16, iterations: 1, bytes: 64 KiB", kernel=SMALL_QUEUE)
    ((driver, pages),) = ended(machine)
    unit = unit_of(machine)

    assert driver.done == 32 and driver.refused == pages.failed == 0
    assert pages.mapped == 32 * 16 < pages.requests and pages.most == 256
    assert unit["page request overflows"] > 0
    assert unit["page requests"] == unit["page requests queued"] + unit["page requests dropped"] == pages.requests
    assert unit["page group responses"] == pages.groups == pages.succeeded
    assert machine.driven is not None and machine.driven.unit.read("PRS") == 0


def test_an_overflow_that_nobody_clears_keeps_a_device_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = made("page_requests: 256", "groups: 1, group: 16, iterations: 1, bytes: 64 KiB", kernel=SMALL_QUEUE)
    machine.scenario = evolve(machine.scenario, run=evolve(machine.scenario.run, limit=150_000))
    write = RemappingUnit.write_at

    def kept(unit: Any, offset: int, size: int, value: int) -> None:
        write(unit, offset, size, value & ~sp.PRS_PRO if offset == sp.PRS else value)

    monkeypatch.setattr(RemappingUnit, "write_at", kept)

    assert result_of([machine.run()]).stopped == {"vm0": "time limit"}


def test_without_a_table_that_is_left_the_answer_is_invalid_and_the_operation_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dma_memory, "_table_pages", lambda phase: -3)  # two are left, and a page may need three

    machine = made()
    ((driver, pages),) = ended(machine)

    assert driver.done == driver.refused == pages.failed == pages.groups == pages.refused == pages.invalid == 32
    assert pages.mapped == driver.invalidations == 0


@pytest.mark.parametrize("iommu", ["write_buffers: true", "coherent: false"])
def test_the_unit_sees_a_new_page_before_the_device_is_answered(iommu: str) -> None:
    ((driver, pages),) = ended(made(iommu=iommu))

    assert driver.done == pages.groups == pages.held == pages.succeeded == 32


def test_a_page_that_is_not_flushed_out_of_a_write_buffer_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "flush_writes", lambda a, registers, name: None)

    machine = made(iommu="write_buffers: true")
    machine.scenario = evolve(machine.scenario, run=evolve(machine.scenario.run, limit=150_000))
    result = result_of([machine.run()])

    (device,) = result.dma
    assert device.driver is not None and device.driver.pages is not None
    assert device.driver.pages.held > device.driver.pages.mapped


def test_drivers_on_several_cpus_are_served_by_the_one_that_is_interrupted() -> None:
    machine = made("page_requests: 4", "bytes: 5000", names="ab")
    found = ended(machine)

    for driver, pages in found:
        assert driver.done == driver.unmaps == 32 and driver.refused == 0
        assert pages.mapped == 64 <= pages.requests and pages.groups == pages.succeeded
    unit = unit_of(machine)
    assert unit["page requests queued"] == sum(pages.handled for _, pages in found)
    assert unit["page group responses"] == sum(pages.groups for _, pages in found)


def test_twice_the_ordinary_work_changes_no_count_and_nothing_that_a_process_sees() -> None:
    found = []
    for scale in (1, 2):
        machine = made("page_requests: 64", "bytes: 10000", kernel=", tick: off", wanted=Wanted(), scale=scale)
        ((driver, pages),) = ended(machine)
        counts = (driver.maps, driver.unmaps, driver.invalidations, driver.done)
        asked = (pages.requests, pages.groups, pages.succeeded, pages.held, pages.mapped)
        seen = {
            who: (streams["application"].count, streams["application"].digest)
            for who, each in machine.witnessed().items()
            for streams in [each.streams]
        }
        found.append((counts, asked, seen))

    assert found[0] == found[1] and found[0][0] == (32, 32, 32, 32)
    assert any(count for count, _ in found[0][2].values())


def test_a_driver_that_answers_twice_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = program._answer

    def twice(a: Assembler) -> None:
        answer(a)
        a.copy(s.RDX, s.R14)
        a.and_(s.RDX, (program.GROUPS - 1) << program.GROUP_SHIFT | program.LAST)
        a.copy(s.RAX, s.RBP)
        a.mov(s.RCX, program.REQUESTER)
        a.and_(s.RAX, register=s.RCX)
        a.or_(s.RAX, q.PAGE_GROUP_RESPONSE)
        a.call("invalidate")

    monkeypatch.setattr(program, "_answer", twice)

    machine = made()
    ((_, pages),) = ended(machine)

    assert pages.unexpected > 0 and unit_of(machine)["page group responses"] == 2 * pages.groups


def test_a_handler_that_looks_nothing_up_maps_what_was_never_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It maps frame 16 MiB wherever a device asks; then a hostile device reaches addresses that are nobody's."""

    def careless(a: Assembler, kernel: Any) -> None:
        program.lock(a, program.port(d.P_LOCK))
        a.copy(s.RSI, s.R14)
        a.call("dma_entry_1")
        a.mov(s.R8, 16 << 20 | kernel.dma.rights)
        a.st(Mem(s.RCX), s.R8)
        a.mov(s.RDX, 0)
        program.unlock(a, program.port(d.P_LOCK))

    monkeypatch.setattr(program, "_map_if_allowed", careless)

    ((driver, pages),) = ended(made("page_requests: 64, hostile_ns: 100", kernel=", iova: tree"))

    assert pages.refused == 0 and driver.hostile_writes > 0
    assert driver.hostile_through > 0


@pytest.mark.parametrize(
    ("device", "how", "path", "message", "help"),
    [
        ("flood_ns: 10", {}, "dma.0.flood_ns", "a device that cannot ask for pages floods nothing",
         "flood_ns can be 0; or page_requests 1 and more"),
        ("page_requests: 1", {"kernel": "dma: deferred"}, "vms.0.guest.kernel.dma",
         "pages that are mapped when a device asks for them are unmapped strictly",
         "dma can be strict; or dma.0.page_requests 0"),
        ("page_requests: 1", {"phase": "pages: 2 MiB"}, "vms.0.guest.processes.0.phases.0.pages",
         "a device asks for pages of 4 KiB", "pages can be 4 KiB; or dma.0.page_requests 0"),
        ("page_requests: 1", {"technique": "hardware"}, "dma.0.requests",
         "a device-TLB needs a driver that has the machine to itself and maps",
         "requests can be untranslated; or vmm.technique native, with kernel.dma strict, deferred or never"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_refused(
    device: str, how: dict[str, Any], path: str, message: str, help: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        made(device, **how)

    (problem,) = refused.value.problems
    assert (problem.path, problem.message, problem.help) == (path, message, help)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("requests: untranslated, page_requests: 1", "a device without ATS learns of no page that is not there"),
        ("requests: ats, page_requests: 1", "a device without a driver has nobody who serves its page requests"),
    ],
)
def test_a_device_asks_for_pages_with_ats_and_a_driver_only(device: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_scenario(f"machine: {{memory: 256 MiB}}\ndma: [{{{device}}}]\n")

    (problem,) = refused.value.problems
    assert (problem.path, problem.message) == ("dma.0.page_requests", message)


def test_the_report_says_what_was_asked_and_answered() -> None:
    machine = made("page_requests: 64, flood_ns: 20000", "bytes: 10000")
    result = result_of([machine.run()])
    pages = result.dma[0].driver.pages  # type: ignore[union-attr]
    assert pages is not None

    text = " ".join(plain_text(report(result), 400).split())

    assert f"96 page requests in 32 groups, of which 32 were answered with success, {pages.wait_mean_ns:.0f} ns" in text


Script = Callable[[DrivenDevice, int], Iterator[Any]]


def scripted(monkeypatch: pytest.MonkeyPatch, script: Script, **how: Any) -> tuple[Machine, list[tuple[int, int]]]:
    """A machine whose device does something else before it moves a buffer of three pages; answers: group, code."""
    transfer, answer = DrivenDevice.transfer, page_asking.PageRequests.answer
    answers: list[tuple[int, int]] = []

    def first(device: DrivenDevice, address: int, size: int, word: int) -> Iterator[Any]:
        yield from script(device, address)
        yield from transfer(device, address, size, word)

    def noted(pages: page_asking.PageRequests, index: int, code: int) -> Iterator[Any]:
        answers.append((index, code))
        yield from answer(pages, index, code)

    monkeypatch.setattr(DrivenDevice, "transfer", first)
    monkeypatch.setattr(page_asking.PageRequests, "answer", noted)
    phase = "groups: 1, group: 1, iterations: 2, bytes: 10000"
    return made("page_requests: 64", phase, kernel=SMALL_QUEUE, **how), answers


def later(device: DrivenDevice, requests: int) -> simpy.Event:
    """When so many have been answered."""
    return device.platform.clock.timeout(20_000 + 5_000 * requests)


def test_an_answer_is_for_all_pages_of_its_group_and_for_that_group_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pages are allowed of four that the address has; of one index several groups come one after the other."""
    found: list[bool] = []

    def script(device: DrivenDevice, address: int) -> Iterator[Any]:
        assert device.pages is not None
        fourth, before = address + 3 * 4096, address - 4096
        for pages in ([fourth], [before], [fourth, address], [address, fourth], [address], [address, address + 4096]):
            device.pages.free = deque([5])
            found.append((yield from device.pages.ask(pages, sp.READ)))

    machine, _ = scripted(monkeypatch, script)
    ((driver, pages),) = ended(machine)

    assert found == [False, False, False, False, True, True] * 3
    assert driver.done == 3 and driver.refused == 0 and pages.mapped == 9


def test_a_request_with_a_pasid_is_invalid_and_a_stop_marker_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(device: DrivenDevice, address: int) -> Iterator[Any]:
        assert device.pages is not None
        send = device.pages.way.send
        send(address, sp.READ, 7, 9, True)
        send(0, 0, 7, 10, True)
        send(address, 0, sp.NO_PASID, 11, True)
        yield later(device, 3)

    machine, answers = scripted(monkeypatch, script)
    ((driver, pages),) = ended(machine)

    assert driver.done == 3 and pages.mapped == 9
    assert [each for each in answers if each[0] in (9, 10, 11)] == [(9, 1), (11, 0)] * 3


def test_a_group_of_which_a_part_overflowed_does_not_answer_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, bool]] = []

    def script(device: DrivenDevice, address: int) -> Iterator[Any]:
        pages, unit = device.pages, device.platform.unit
        assert pages is not None
        pages.way.send(1 << 40, sp.READ, sp.NO_PASID, 5, False)
        for _ in range(200):
            pages.way.send(1 << 40, sp.READ, sp.NO_PASID, 6, True)
        overflows = unit.statistics()["page request overflows"]
        yield later(device, 127)
        pages.free = deque([5])
        found.append((overflows, (yield from pages.ask([address], sp.READ))))

    machine, _ = scripted(monkeypatch, script)
    ended(machine)

    assert found == [(1, True), (2, True), (3, True)]


def test_a_page_is_not_mapped_behind_the_back_of_an_unmap_on_another_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device asks for what it has or had; its driver unmaps on one CPU while another one, which is slow, maps."""
    monkeypatch.setattr(program, "length", lambda name: 20_000 if name == "dma_map_run" else length(name))
    machine = made(phase="groups: 2, group: 4, iterations: 8, bytes: 256", kernel=", iova: tree", names="ab")
    assert machine.driven is not None
    device = machine.driven.devices[1]
    wrong, seen = [], set[int]()

    def asks() -> Iterator[Any]:
        assert device.pages is not None
        while True:
            yield machine.clock.timeout(30_011)
            if device.last < 0:
                continue
            seen.add(device.last)
            device.pages.way.send(device.last, sp.READ, sp.NO_PASID, 400, True)
            given = {device.word(slot + 16 * n) for slot, count in device.port.slots for n in range(count)}
            for page in seen:
                owned = device.allows(page) or page in given
                if device.leads_to(page) >= 0 and not owned:
                    wrong.append((int(machine.clock.now), page))

    machine.clock.process(asks())
    (_, (driver, pages)) = ended(machine)

    assert driver.done == 40 and pages.unexpected > 5 and len(seen) > 1
    assert wrong == []


@settings(max_examples=4)
@given(
    allowed=st.integers(1, 256), entries=st.sampled_from((4, 64)), bytes_=st.sampled_from((1, 4096, 4097, 40000)),
    group=st.integers(1, 5), mapping=st.sampled_from(("single", "once")), iova=st.sampled_from(("cached", "tree")),
    hostile=st.sampled_from((0, 150)), flood=st.sampled_from((1, 140)), names=st.sampled_from(("a", "ab")),
)  # fmt: skip
def test_whatever_is_asked_each_page_is_mapped_at_most_once_for_each_time_that_it_is_allowed(
    allowed: int, entries: int, bytes_: int, group: int, mapping: str, iova: str, hostile: int, flood: int, names: str
) -> None:
    machine = made(
        f"page_requests: {allowed}, device_tlb: {entries}, hostile_ns: {hostile}, flood_ns: 60000, flood: {flood}",
        f"groups: 2, group: {group}, iterations: 3, bytes: {bytes_}, mapping: {mapping}",
        kernel=f", iova: {iova}{SMALL_QUEUE}", names=names,
    )  # fmt: skip
    found = ended(machine)
    unit = unit_of(machine)

    of_buffer, total = -(-bytes_ // 4096), 5 * group
    for driver, pages in found:
        assert driver.done == total and driver.refused == driver.hostile_through == pages.failed == 0
        assert driver.maps == driver.unmaps == driver.invalidations == (2 * group if mapping == "once" else total)
        assert pages.mapped == driver.maps * of_buffer and pages.most <= allowed
        assert pages.groups == pages.succeeded + pages.refused + pages.waiting and pages.unexpected == 0
        assert pages.waiting <= bool(hostile)
    handled = sum(pages.handled for _, pages in found)
    assert handled <= unit["page requests queued"] <= handled + len(queued(machine))
    owed = sum(pages.groups + pages.flood_owed for _, pages in found)
    not_answered = sum(word >> 2 & 1 for word in queued(machine))
    assert owed - not_answered - len(names) <= unit["page group responses"] <= owed


class Served:
    """A device of the unit in `World`, and software in Python that serves the queue when it likes."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.clock, self.world = simpy.Environment(), World("second-level")
        self.unit = self.world.unit
        queue, self.pages_at = (self.world.memory.allocate() << 12 for _ in range(2))
        for name, value in {"PQA": self.pages_at, "PECTL": 0, "IQA": queue | sp.IQA_WIDE}.items():
            self.unit.write(name, value)
        self.unit.command(set=sp.QIE)
        self.allowed = self.chance.choice((1, 5, 40, 256))
        self.device = page_asking.PageRequests(self.clock, self.allowed, page_asking.Way(up=3, down=4, send=self.send))
        self.cpu = simpy.Resource(self.clock)
        self.responses, self.overflows, self.ended = 0, 0, 0

    def send(self, address: int, access: int, pasid: int, group: int, last: bool) -> None:
        self.unit.page_request(SID, address, access, pasid=pasid, group=group, last=last)
        self.take()

    def take(self) -> None:
        for message in self.unit.messages():
            if message.kind == unit_state.PAGE_RESPONSE:
                self.responses += 1
                self.clock.process(self.device.answer(message.second, message.third))
            else:
                assert message.kind == unit_state.PAGE_REQUEST_EVENT
                self.clock.process(self.serve())

    def serve(self) -> Iterator[Any]:
        """One interrupt after the other."""
        with self.cpu.request() as turn:
            yield turn
            yield from self.handle()

    def handle(self) -> Iterator[Any]:
        yield self.clock.timeout(self.chance.randrange(60))
        self.unit.write("PRS", sp.PRS_PPR)
        tail = self.unit.read("PQT")
        for at in range(self.unit.read("PQH"), tail + 4096 * (tail < self.unit.read("PQH")), 32):
            low, high = (self.world.memory.word(self.pages_at + at % 4096 + word) for word in (0, 8))
            yield self.clock.timeout(self.chance.randrange(3))
            if high & 4:
                code = self.chance.choice((q.RESPONSE_SUCCESS, q.RESPONSE_SUCCESS, q.RESPONSE_INVALID))
                self.unit.submit("PAGE_GROUP_RESPONSE", RID=low >> 16 & 0xFFFF, RC=code, PRGI=high >> 3 & 511, LPIG=1)
                self.take()
        self.unit.write("PQH", tail)
        if self.unit.read("PRS") & sp.PRS_PRO and self.unit.read("PQT") == tail:
            self.overflows += 1
            self.unit.write("PRS", sp.PRS_PRO)

    def operation(self) -> Iterator[Any]:
        yield self.clock.timeout(self.chance.randrange(200))
        for _ in range(self.chance.randrange(1, 4)):
            pages = [RW_PAGE + 4096 * n for n in range(self.chance.randrange(1, 30))]
            if not (yield from self.device.ask(pages, sp.READ)):
                break
        self.ended += 1


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30))
def test_every_group_is_answered_once_and_every_operation_ends_whoever_answers(seed: int) -> None:
    served = Served(seed)
    for _ in range(40):
        served.clock.process(served.operation())
    served.clock.run()

    device = served.device
    assert served.ended == 40 and device.groups == {} and device.outstanding == 0
    assert device.most <= served.allowed
    assert device.group_count == served.responses == device.succeeded + device.refused and device.unexpected == 0
    assert sorted(device.free) == list(range(page_asking.FLOOD_GROUP))
    counted = served.unit.statistics()
    assert counted["page requests"] == device.requests
    served.unit.check_laws()


def test_queues_of_that_test_overflow() -> None:
    served = Served(0)
    served.device.allowed = 256
    for _ in range(60):
        served.clock.process(served.operation())
    served.clock.run()

    assert served.overflows > 0 and served.ended == 60
