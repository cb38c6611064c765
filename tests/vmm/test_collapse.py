"""Small pages become large again: EPT's after logging stops, the host's when the daemon finds them."""

from __future__ import annotations

import pytest

from tests.vmm.machines import MIB, Machine, machine
from tests.vmm.test_dirty_log import METHODS, data_frames, writer
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.cpu import ops
from vtsim.vmm import layout as at
from vtsim.vmm.memory_spec import CollapseSpec, HostMemorySpec
from vtsim.vmm.spec import DirtyLogSpec

PAGES, ROUNDS, VALUE = 40, 30, 1
LARGE_CODE = (("nx_huge_pages", 0),)


@pytest.mark.parametrize("method", METHODS)
def test_large_pages_of_ept_come_back_when_logging_stops(method: str, personality: str) -> None:
    log = DirtyLogSpec(method=method, start=20_000, period=40_000, stop=150_000)
    m = machine(
        writer(PAGES, ROUNDS, 30_000), dirty_log=log, personality=personality, page_size=2 * MIB, huge_pages="always",
        parameters=LARGE_CODE if personality == "kvm" else (),
    ).run()  # fmt: skip

    counts = m.hypervisor.memory_statistics(m.vcpu)
    assert counts["dirty_rounds"] > 1 and counts["dirty_pages"] >= PAGES
    assert counts["regions_recovered"] == 1
    assert m.hypervisor.word(m.vcpu, "LOGGING") == 0
    assert m.vcpu.ept is not None
    for gfn in data_frames(m, PAGES):
        leaf = m.vcpu.ept.find(gfn << 12)
        assert leaf is not None and leaf.size == 1
    assert [m.data(0, page=n) for n in range(PAGES)] == [VALUE] * PAGES


@pytest.mark.slow
def test_small_pages_of_the_host_are_copied_into_a_large_one_code_and_all(personality: str) -> None:
    def built(on: bool) -> Machine:
        return machine(
            writer(PAGES, ROUNDS, 30_000), personality=personality, memory=4 * MIB, page_size=2 * MIB,
            placement=HostMemorySpec(allocator="buddy"), parameters=LARGE_CODE if personality == "kvm" else (),
            collapse=CollapseSpec(on=on, period=100_000),
        )  # fmt: skip

    m = built(True)
    zone = m.hypervisor.word(m.vcpu, "ZONE") & (1 << 64) - 1
    old = {gfn: m.vcpu.process.find(at.USER_RAM + gfn * 4096) for gfn in range(512)}
    free = m.hypervisor.host.load(zone)
    m.run()
    plain = built(False).run()

    assert [m.data(0, page=n) for n in range(PAGES)] == [plain.data(0, page=n) for n in range(PAGES)] == [1] * PAGES
    counts = m.hypervisor.memory_statistics(m.vcpu)
    assert counts["regions_collapsed"] == 1
    host, ept = m.vcpu.process.find(at.USER_RAM), m.vcpu.ept.find(0x100000)
    assert host is not None and host.size == 1
    assert ept is not None and ept.size == 1 and ept.frame == host.frame
    given_by_builders = sum(leaf is not None for leaf in old.values())
    assert free - m.hypervisor.host.load(zone) == 512 - given_by_builders
    assert m.exits("EPT_VIOLATION") > 1


@pytest.mark.slow
def test_each_page_that_is_there_is_looked_at_and_moved_for_its_length() -> None:
    def instructions(*parameters: tuple[str, int]) -> tuple[int, int]:
        m = machine(
            writer(PAGES, ROUNDS, 30_000), memory=4 * MIB, page_size=2 * MIB,
            placement=HostMemorySpec(allocator="buddy"), parameters=(*LARGE_CODE, *parameters),
            collapse=CollapseSpec(on=True, period=100_000),
        )  # fmt: skip
        pages = sum(m.vcpu.process.find(at.USER_RAM + gfn * 4096) is not None for gfn in range(512))
        m.run()
        assert m.hypervisor.memory_statistics(m.vcpu)["regions_collapsed"] == 1
        return pages, m.instructions("host", ops.R0)

    rest = ("collapse_look", 0)
    (pages, without), (_, with_length) = (instructions(rest, ("collapse_page", n)) for n in (0, 1000))
    moved = (with_length - without) // 1000  # those that were there from the beginning, and what was written since
    assert pages < moved <= pages + PAGES


def test_logging_cannot_stop_before_it_starts() -> None:
    sets = ("vmm.dirty_log.method=pml", "vmm.dirty_log.start=2 ms", "vmm.dirty_log.stop=1 ms")
    with pytest.raises(ConfigError) as caught:
        parse_scenario("vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]", sets)

    assert [(problem.path, problem.message) for problem in caught.value.problems] == [
        ("vmm.dirty_log.stop", "logging stops before it starts")
    ]
