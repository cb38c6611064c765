"""Page sharing: equal pages become one frame, and no VM ever sees what another one writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attrs import evolve

from tests.vmm.machines import DATA, MIB, Machine, machine, tiny_guest
from tests.vmm.stale import check_translations
from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import RAX, RDI, RSI
from vtsim.ept import spec as e
from vtsim.ept.tables import PAGING, Table
from vtsim.vmm import layout as at
from vtsim.vmm.memory_spec import HostMemorySpec, SharingSpec
from vtsim.vmm.programs import several
from vtsim.vmm.programs.sharing import SHARED, SHARED_BYTES

PAGES, CALM = 6, 120_000
SLICE, STEPS, MEMORY = 20_000, 5, 2 * MIB
EAGER = SharingSpec(on=True, period=20_000, pages=260)
OFTEN = {"minimal": EAGER, "kvm": evolve(EAGER, period=80_000)}  # shorter, and a CPU under kvm does little else
Steps = list[tuple[int, int]]


def guest(steps: Steps, pause: int = CALM) -> Any:
    """Store values into the first word of pages, one after the other, and add up what the pages hold before each."""

    def body(a: Assembler) -> None:
        for page in range(PAGES):
            a.mov(RAX, 7)
            a.st(Mem(displacement=DATA + 4096 * page), RAX)
        for n, (page, value) in enumerate(steps):
            a.work(pause, code_bytes=64)
            a.ld(RAX, Mem(displacement=DATA + 4096 * page))
            a.st(Mem(displacement=DATA + 4096 * PAGES + 8 * n), RAX)
            a.mov(RAX, value)
            a.st(Mem(displacement=DATA + 4096 * page), RAX)
        a.work(pause, code_bytes=64)
        a.op(ops.STOP_OP)

    return tiny_guest(body, pages=PAGES + 1)


def sharing(*guests: Any, **options: Any) -> Machine:
    options.setdefault("sharing", EAGER)
    options.setdefault("placement", HostMemorySpec(allocator="buddy"))
    return machine(*guests, memory=MEMORY, host_memory=32 * MIB, tick_ns=20_000, **options)


def run(m: Machine, cpus: int, slices: int = 20) -> Machine:
    """Run several CPUs in turn, in short slices, as the platform does; now and then look for stale translations."""
    until = seen = waited = 0
    while len(m.finished) < len(m.hypervisor.vcpus):
        until += SLICE
        assert until < 1 << 30
        for cpu in range(cpus):
            m.run(cpu, until=until)
            waited += 1
            if m.engine.cpus[cpu][s.NONROOT] and waited > slices:
                seen, waited = seen + check_translations(m, cpu), 0
    assert seen > 10
    return m


def shared_frames(m: Machine) -> dict[int, int]:
    """{shared frame: pages of VMs that it is behind}, from the hypervisor's table."""
    addresses, host = m.hypervisor.path.addresses, m.hypervisor.host
    places = [addresses["shared"] + n * SHARED_BYTES for n in range(addresses["share_slots"])]
    live = [place for place in places if host.load(place + SHARED["SUM"]) > 0]
    return {host.load(place + SHARED["FRAME"]): host.load(place + SHARED["REFERENCES"]) for place in live}


def check_references(m: Machine) -> None:
    """Each shared frame is behind as many pages as its count says, and none of them can be written."""
    behind: dict[int, int] = {}
    shared = shared_frames(m)
    for vcpu in m.hypervisor.vcpus:
        assert vcpu.ept is not None
        for gfn in range(MEMORY // 4096):
            leaf, mapped = vcpu.process.find(at.USER_RAM + gfn * 4096), vcpu.ept.find(gfn << 12)
            if mapped is not None:
                assert leaf is not None and mapped.frame == leaf.frame
                assert leaf.entry & e.PTE_WRITE or not mapped.entry & e.EPT_WRITE
            if leaf is not None and leaf.frame in shared:
                assert not leaf.entry & e.PTE_WRITE
                behind[leaf.frame] = behind.get(leaf.frame, 0) + 1
    assert behind == shared


def read(m: Machine, vm: int) -> tuple[list[int], list[int]]:
    first = [m.data(0, vm=vm, page=page) for page in range(PAGES)]
    return first, [m.data(8 * n, vm=vm, page=PAGES) for n in range(STEPS)]


@pytest.mark.parametrize("seed", range(2))
def test_what_a_vm_writes_to_a_shared_page_is_seen_by_no_other(seed: int, personality: str) -> None:
    random = np.random.default_rng(seed)
    steps = [[(int(random.integers(PAGES)), int(random.integers(7, 9))) for _ in range(STEPS)] for _ in range(2)]
    cpus = 1 + seed % 2
    often = evolve(OFTEN[personality], period=OFTEN[personality].period // cpus)
    m = run(sharing(*(guest(each) for each in steps), personality=personality, cpus=cpus, sharing=often), cpus)

    for vm, each in enumerate(steps):
        pages, before = [7] * PAGES, []
        for page, value in each:
            before.append(pages[page])
            pages[page] = value
        assert read(m, vm) == (pages, before)
    check_references(m)
    counts = [m.hypervisor.memory_statistics(vcpu) for vcpu in m.hypervisor.vcpus]
    for name in ("pages_merged", "pages_unshared"):
        assert sum(each.get(name, 0) for each in counts) > 0


def test_a_hypervisor_that_shares_pages_and_drops_no_translations_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "flush_here", lambda a, path: None)

    with pytest.raises(AssertionError, match="an old translation"):
        run(sharing(guest([(0, 8), (1, 8)]), guest([(2, 8), (3, 8)]), personality="minimal"), 1, slices=0)


def data_frames(m: Machine, vm: int) -> list[int]:
    vcpu = m.hypervisor.vcpus[vm]
    root = m.field(vcpu, "GUEST_CR3") >> 12
    table = Table(root=root, format=PAGING, take=lambda: 0, words=lambda g: vcpu.memory.contents(g, mem.TABLE))
    leaves = [table.find(DATA + 4096 * page) for page in range(PAGES)]
    return [leaf.frame for leaf in leaves if leaf is not None]


def given(m: Machine) -> int:
    """Pages of the VMs that have a frame."""
    pages = range(at.USER_RAM, at.USER_RAM + MEMORY, 4096)
    return sum(vcpu.process.find(page) is not None for vcpu in m.hypervisor.vcpus for page in pages)


def test_equal_pages_of_two_vms_end_as_one_frame_and_the_others_are_free_again() -> None:
    steps = [(PAGES - 1, 7)] * STEPS
    m = sharing(guest(steps), guest(steps), sharing=OFTEN["kvm"])
    zone, at_first = m.hypervisor.word(m.vcpu, "ZONE") & (1 << 64) - 1, given(m)
    free = m.hypervisor.host.load(zone)
    run(m, 1)

    one, other = ([vcpu.memory.frame(n) for n in data_frames(m, vm)] for vm, vcpu in enumerate(m.hypervisor.vcpus))
    shared = shared_frames(m)
    assert len({*one[:-1], *other[:-1]}) == 1
    assert shared[one[0]] >= 2 * (PAGES - 1)
    assert free - m.hypervisor.host.load(zone) == given(m) - at_first - sum(n - 1 for n in shared.values())
    assert m.hypervisor.sharing() == {"shared_frames": len(shared), "sharing_pages": sum(shared.values())}
    check_references(m)


def test_a_copy_of_a_page_without_contents_leaves_nothing_of_what_stood_there() -> None:
    def body(a: Assembler) -> None:
        a.mov(RDI, DATA)
        a.mov(RSI, DATA + 4096)
        a.st_value(Mem(RDI, 8), 5)
        a.hook(hooks.PAGE_COPY)
        a.op(ops.STOP_OP)

    assert machine(tiny_guest(body)).run().data(8) == 0


def test_sharing_needs_ept_and_an_allocator_that_takes_frames_back() -> None:
    for sets, path, message in (
        ("vmm.paging=shadow", "vmm.paging", "memory is taken back from VMs on EPT only"),
        ("vmm.memory.allocator=list", "vmm.memory.allocator", "a list of frames takes none back"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_scenario(ANY, (sets, "vmm.sharing.on=true"))
        assert [(problem.path, problem.message) for problem in caught.value.problems] == [(path, message)]


ANY = "vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]"
