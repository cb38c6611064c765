"""Drivers that invalidate device-TLBs: who is reached until when, and what becomes of a device that does not answer.

VT-d: "Device-TLB Invalidate Descriptor"; "Queued Invalidation Error Handling".
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import simpy
from attrs import evolve

from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel import invalidation
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.descriptors import descriptor
from vtsim.iommu.tables import Memory
from vtsim.iommu.unit import Message, RemappingUnit
from vtsim.platform import driven
from vtsim.platform.dma_spec import REGISTERS
from vtsim.platform.machine import Machine
from vtsim.platform.remapping_registers import RemappingRegisters
from vtsim.study.measure import result_of
from vtsim.study.result import Driver

SID, STATUS, QUEUE = 0x300, 0x3000, 0x1000


def made(
    kernel: str, device: str, iommu: str = "", names: str = "a", technique: str = "native", iterations: int = 6
) -> Machine:
    devices = ", ".join(
        f"{{name: {name}, source: '0{n + 3}:00.0', requests: ats, {device}}}" for n, name in enumerate(names)
    )
    phase = f"primitive: dma_buffers, groups: 2, group: 4, iterations: {iterations}, bytes: 256, wait: poll"
    processes = ", ".join(f"{{name: {name}, phases: [{{{phase}, device: {name}}}]}}" for name in names)
    return Machine(
        parse_scenario(
            f"machine: {{memory: 256 MiB, cpus: {len(names)}, iommu: {{{iommu}}}}}\nvmm: {{technique: {technique}}}\n"
            f"dma: [{devices}]\nvms: [{{memory: 128 MiB, vcpus: {len(names)}, guest: {{kernel: {{{kernel}}}, "
            f"processes: [{processes}]}}}}]"
        )
    )


def drivers(
    kernel: str, device: str, *, iommu: str = "", names: str = "a", technique: str = "native", iterations: int = 6
) -> list[Driver]:
    machine = made(kernel, device, iommu, names, technique, iterations)
    result = result_of([machine.run()])
    assert not result.stopped
    found = [device.driver for device in result.dma if device.driver is not None]
    assert len(found) == len(names)
    return found


@pytest.mark.parametrize("entries", [4, 64])
@pytest.mark.parametrize("answer_ns", [0, 3000])
def test_after_an_invalidation_that_was_waited_for_nothing_goes_to_what_is_unmapped(
    entries: int, answer_ns: int
) -> None:
    """Whether a write goes through is judged by a walk of the driver's table in Python."""
    (driver,) = drivers(
        "dma: strict, iova: tree", f"device_tlb: {entries}, device_answer_ns: {answer_ns}, hostile_ns: 100"
    )

    assert driver.done == driver.descriptors == driver.unmaps == 32
    assert driver.invalidations == driver.device_invalidations == 32
    assert driver.hostile_writes > 20 and driver.hostile_through == 0
    assert driver.invalidation_cycles > answer_ns * 2.2


def test_a_driver_that_leaves_the_device_tlb_out_is_reached_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def left_out(a: Assembler) -> None:
        for register in (s.RDX, s.RCX, s.R11):
            a.pop(register)

    monkeypatch.setattr(invalidation, "_then_device", left_out)

    (driver,) = drivers("dma: strict, iova: tree", "hostile_ns: 100")

    assert driver.device_invalidations == 0
    assert driver.hostile_through > 0 and driver.window_ns >= 100


def test_a_device_that_answers_and_forgets_nothing_still_reaches_what_is_unmapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driven, "device_forget", lambda tlb, word, pasid: None)

    (driver,) = drivers("dma: strict, iova: tree", "hostile_ns: 100")

    assert driver.device_invalidations == 32 and driver.hostile_through > 0


def test_a_flush_of_the_domain_reaches_every_entry_of_the_device_tlb(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words that come are kept: a flush names every address."""
    words: list[int] = []
    forget = driven.device_forget

    def kept(tlb: Any, word: int, pasid: int) -> None:
        words.append(int(word))
        forget(tlb, word, pasid)

    monkeypatch.setattr(driven, "device_forget", kept)

    (driver,) = drivers("dma: deferred, iova: tree", "", iterations=64)

    assert driver.flushes == driver.invalidations == driver.device_invalidations == len(words) == 1
    assert set(words) == {0x7FFF_FFFF_FFFF_F001}


@pytest.mark.parametrize("late", [2, d.TRIES - 1])
@pytest.mark.parametrize("names", ["a", "abc"])
def test_a_device_that_is_late_stops_the_queue_and_its_driver_asks_again(names: str, late: int) -> None:
    found = drivers(
        "dma: strict, iova: tree", f"unanswered: {late}, hostile_ns: 100", iommu="device_timeout_ns: 5000", names=names
    )

    assert sum(driver.timeouts for driver in found) == late * len(names)  # whoever holds the queue sees it
    for driver in found:
        assert driver.given_up == 0  # what others are late with does not count
        assert driver.done == driver.unmaps == driver.device_invalidations == 32
        assert driver.hostile_through == 0  # the unmap does not return before the answer


@pytest.mark.parametrize("kernel", ["dma: identity", "dma: strict"])
def test_a_device_tlb_needs_a_driver_that_maps_and_has_the_machine(kernel: str) -> None:
    technique = "native" if "identity" in kernel else "hardware"
    with pytest.raises(ConfigError, match="a device-TLB needs a driver that has the machine to itself and maps"):
        drivers(kernel, "", technique=technique)


class World:
    """A queue with a device-TLB invalidation and a wait, which takes 10 and 5 cycles."""

    def __init__(self) -> None:
        self.memory, self.clock, self.sent = Memory(1 << 20), simpy.Environment(), list[Message]()
        self.unit = RemappingUnit(self.memory.arena)
        self.unit.write("IQA", QUEUE)
        self.unit.command(set=sp.QIE)
        engine: Any = SimpleNamespace(load=self.memory.word)
        self.registers = RemappingRegisters(
            engine, self.clock, self.unit, 10, 5, lambda: 0, self.sent.append, timeout_cycles=100
        )
        wait = descriptor("WAIT", SW=1, STDATA=7, STADDR=STATUS >> 2)
        self.memory.store(QUEUE, *descriptor("DEVICE_TLB", SID=SID), *wait)
        self.registers.write(REGISTERS + sp.IQT, 4, 32)

    @property
    def status(self) -> int:
        return self.memory.word(STATUS)

    def faults(self) -> int:
        return self.registers.read(REGISTERS + sp.FSTS, 4) & (sp.ITE | sp.ICE | sp.IQE)


@pytest.mark.parametrize("when", [12, 60, 109])
def test_a_wait_is_done_when_the_device_has_answered_and_not_before(when: int) -> None:
    world = World()
    world.clock.run(until=when)
    assert [(each.kind, each.first) for each in world.sent] == [(st.DEVICE_INVALIDATION, SID)]
    assert world.status == 0

    world.registers.answered(SID)
    world.clock.run(until=max(when + 1, 16))

    assert (world.status, world.faults()) == (7, 0)
    world.clock.run(until=1000)
    assert world.faults() == 0  # nobody is late any more


def test_the_time_out_aborts_the_wait_and_stops_the_queue_until_the_error_is_cleared() -> None:
    world = World()
    world.clock.run(until=110)
    assert world.faults() == 0
    world.clock.run(until=111)
    assert (world.status, world.faults()) == (0, sp.ITE)
    assert world.unit.read("IQERCD") >> 32 & 0xFFFF == SID
    assert world.registers.read(REGISTERS + sp.IQH, 4) == 32  # behind the wait, which never completes

    world.memory.store(QUEUE + 32, *descriptor("WAIT", SW=1, STDATA=9, STADDR=STATUS >> 2))
    world.registers.write(REGISTERS + sp.IQT, 4, 48)
    world.clock.run(until=500)
    assert world.status == 0
    world.registers.write(REGISTERS + sp.FSTS, 4, sp.ITE)
    world.clock.run(until=600)
    assert (world.status, world.faults()) == (9, 0)

    world.registers.answered(SID)  # nobody waits for it any more
    assert world.faults() == sp.ICE


def test_a_device_answers_when_what_it_sent_with_old_translations_has_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    """PCIe, ATS: writes that were under way when it forgot are in memory before the driver may go on."""
    under_way: list[tuple[int, int, int]] = []  # when it forgot, when what was sent lands, when it answered
    invalidate, forget = driven.DrivenDevice.invalidate, driven.device_forget
    moment = [0, 0]

    def watched(device: driven.DrivenDevice, word: int) -> Iterator[Any]:
        platform = device.platform

        def forgets(tlb: Any, word: int, pasid: int) -> None:
            moment[:] = int(platform.clock.now), platform.registers.landed()
            forget(tlb, word, pasid)

        monkeypatch.setattr(driven, "device_forget", forgets)
        yield from invalidate(device, word)
        under_way.append((moment[0], moment[1], int(platform.clock.now)))

    monkeypatch.setattr(driven.DrivenDevice, "invalidate", watched)

    drivers("dma: strict, iova: tree", "hostile_ns: 100, device_answer_ns: 0")

    assert len(under_way) == 32
    assert any(lands > forgot for forgot, lands, _ in under_way)
    assert all(lands <= answered for _, lands, answered in under_way)


def test_a_device_tlb_that_is_invalidated_before_the_iotlb_is_filled_from_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """VT-d wants the IOTLB first. Of one page both descriptors have the same second word, so the first ones change."""
    words = {"P_PAGE_LOW": d.P_DEVICE_LOW, "P_DEVICE_LOW": d.P_PAGE_LOW}
    monkeypatch.setattr(invalidation, "d", SimpleNamespace(**{**vars(d), **words}))

    (driver,) = drivers("dma: strict, iova: tree", "device_answer_ns: 0, hostile_ns: 100")

    assert driver.invalidations == driver.device_invalidations == 32
    assert driver.hostile_through > 0


@pytest.mark.parametrize("more", ["", ", page_requests: 8"])
@pytest.mark.parametrize("names", ["a", "abc"])
def test_a_device_that_never_answers_is_given_up_and_blocked_and_others_go_on(more: str, names: str) -> None:
    machine = made("dma: strict, iova: tree", "hostile_ns: 100" + more, "device_timeout_ns: 5000", names)
    assert machine.driven is not None
    silent = machine.driven.devices[-1]
    silent.spec = evolve(silent.spec, unanswered=1 << 20)

    result = result_of([machine.run()])

    assert result.stopped == {
        "vm0": f"process {names[-1]!r} was stopped: its device answered no invalidation and was given up"
    }
    *others, gone = (device.driver for device in result.dma if device.driver is not None)
    assert gone.given_up == 1 and gone.done < 32 and gone.hostile_writes > 0
    assert gone.hostile_through == 0  # the unmap does not return before the device is blocked
    assert [(each.given_up, each.done, each.hostile_through) for each in others] == [(0, 32, 0)] * len(others)
    assert gone.timeouts + sum(each.timeouts for each in others) == d.TRIES
    assert silent.invalidated == d.TRIES
    answer = machine.driven.unit.translate(int(silent.tlb[st.DEVICE_SID]), 0x1000, sp.READ, at=sp.TRANSLATED)
    assert answer.status == st.BLOCKED


def test_a_device_whose_context_stays_present_is_not_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Assembler.st_value

    def left_out(a: Assembler, mem: Any, value: int, comment: str = "") -> None:
        if comment != "not present":
            store(a, mem, value, comment)

    monkeypatch.setattr(Assembler, "st_value", left_out)
    machine = made("dma: strict, iova: tree", "hostile_ns: 100, unanswered: 1000", "device_timeout_ns: 5000", "a")

    (device,) = result_of([machine.run()]).dma

    assert device.driver is not None and device.driver.given_up == 1
    assert device.driver.hostile_through > 0


def test_a_device_that_is_late_now_and_then_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    invalidate = driven.DrivenDevice.invalidate
    come: list[int] = []

    def answers_every_other(device: driven.DrivenDevice, word: int) -> Iterator[Any]:
        come.append(word)
        if len(come) % 2:
            return
        yield from invalidate(device, word)

    monkeypatch.setattr(driven.DrivenDevice, "invalidate", answers_every_other)

    (driver,) = drivers("dma: strict, iova: tree", "", iommu="device_timeout_ns: 5000")

    assert driver.done == driver.timeouts == 32 and driver.given_up == 0 and len(come) == 64
