"""Frames of the host: the buddy allocator keeps its books, large pages depend on it, and nodes have their price."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.vmm.machines import DATA, MIB, Machine, machine, tiny_guest
from vtsim.base.errors import ConfigError
from vtsim.base.jit import quiet
from vtsim.config import parse_scenario
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels.buddy import HEADS, LARGEST_ORDER, NO_FRAME, give_block, take_block
from vtsim.cpu.slots import RAX
from vtsim.vmm.memory_spec import HostMemorySpec

BLOCK = 512


def touching(pages: int = 4) -> Any:
    def body(a: Assembler) -> None:
        for page in range(pages):
            a.st(Mem(displacement=DATA + 4096 * page), RAX)
        a.op(ops.STOP_OP)

    return tiny_guest(body, pages=pages)


def on_buddy(**options: Any) -> HostMemorySpec:
    return HostMemorySpec(allocator="buddy", **options)


def zone_address(m: Machine, name: str = "ZONE") -> int:
    return m.hypervisor.word(m.vcpu, name)


def free_frames(m: Machine) -> int:
    return m.hypervisor.host.load(zone_address(m) & (1 << 64) - 1)


def test_the_buddy_allocator_hands_out_every_frame_once_and_joins_what_comes_back() -> None:
    m = machine(touching(), memory=16 * MIB, host_memory=64 * MIB, placement=on_buddy(fragmentation=0.5))
    cpu, zone, random = m.engine.cpus[0], zone_address(m), np.random.default_rng(5)
    arena, tags, free = m.engine.arena, m.engine.tags, free_frames(m)
    heads = [m.hypervisor.host.load((zone & (1 << 64) - 1) + 8 * (HEADS + order)) for order in range(LARGEST_ORDER + 1)]
    assert heads[LARGEST_ORDER] and heads[LARGEST_ORDER - 1]  # intact blocks, and halves of broken ones
    held: list[tuple[int, int]] = []
    owned: set[int] = set()
    with quiet():
        for _ in range(400):
            if held and random.random() < 0.45:
                frame, order = held.pop(int(random.integers(len(held))))
                give_block(cpu, arena, tags, zone, frame, order)
                owned -= set(range(frame, frame + (1 << order)))
            else:
                order = int(random.integers(LARGEST_ORDER + 1))
                frame = int(take_block(cpu, arena, tags, zone, order))
                if frame == NO_FRAME:
                    continue
                assert frame % (1 << order) == 0
                mine = set(range(frame, frame + (1 << order)))
                assert not mine & owned
                owned |= mine
                held.append((frame, order))
            assert free_frames(m) == free - len(owned)
        for frame, order in held:
            give_block(cpu, arena, tags, zone, frame, order)
        blocks = 0
        while take_block(cpu, arena, tags, zone, LARGEST_ORDER) != NO_FRAME:
            blocks += 1
    intact = machine(touching(), memory=16 * MIB, host_memory=64 * MIB, placement=on_buddy())
    whole = free_frames(intact) // BLOCK
    assert blocks == whole - round(0.5 * whole)


@pytest.mark.parametrize(("fragmentation", "size"), [(0.0, 1), (1.0, 0)])
def test_without_an_intact_block_of_the_host_ept_falls_back_to_small_pages(fragmentation: float, size: int) -> None:
    m = machine(
        touching(), page_size=2 * MIB, huge_pages="always", parameters=(("nx_huge_pages", 0),),
        placement=on_buddy(fragmentation=fragmentation),
    )  # fmt: skip
    before = m.vcpu.memory.placement
    m.run()

    assert m.vcpu.ept is not None and before is not None
    leaf = m.vcpu.ept.find(0x100000)
    assert leaf is not None and leaf.size == size
    counts = m.hypervisor.memory_statistics(m.vcpu)
    assert bool(counts.get("large_pages")) == bool(size) and bool(counts.get("large_missing")) != bool(size)


def test_prebuilt_memory_is_mapped_large_where_blocks_are_there_and_small_elsewhere() -> None:
    m = machine(
        touching(), memory=32 * MIB, host_memory=64 * MIB, page_size=2 * MIB, populate="prebuilt",
        placement=on_buddy(fragmentation=0.6),
    )  # fmt: skip
    assert m.vcpu.ept is not None
    sizes = []
    for first in range(0, 32 * MIB, 2 * MIB):
        for address in (first, first + 4096 * 77):
            leaf = m.vcpu.ept.find(address)
            assert leaf is not None
            assert leaf.frame + (address >> 12) % (1 << 9 * leaf.size) == m.vcpu.memory.frame(address >> 12)
        sizes.append(leaf.size)
    counts = m.hypervisor.memory_statistics(m.vcpu)
    assert sizes.count(1) == counts["large_pages"] and sizes.count(0) == counts["large_missing"] > 0
    assert m.run().exits() == {}


def cold(a: Assembler) -> None:
    a.op(ops.WBINVD)
    for page in range(24):
        a.st(Mem(displacement=DATA + 4096 * page), RAX)
    a.op(ops.STOP_OP)


@pytest.mark.parametrize("where", ("local", "remote", "interleaved"))
def test_dram_is_counted_where_each_purpose_lies_and_remote_dram_takes_longer(where: str) -> None:
    def run(**options: Any) -> Machine:
        return machine(
            tiny_guest(cold, pages=24), nodes=2, populate="prebuilt", placement=on_buddy(**options)
        ).run()  # fmt: skip

    base = run()
    assert [base.counter(f"{purpose}_dram_remote") for purpose in ("data", "guest", "ept", "fetch")] == [0, 0, 0, 0]
    if where == "interleaved":
        data = run(data=where)
        assert 0 < data.counter("data_dram_remote") < data.counter("data_dram")
    elif where == "remote":
        data = run(data=where, guest_tables="local")
        assert data.counter("data_dram_remote") == data.counter("data_dram") >= 24
        assert data.counter("guest_dram_remote") == 0 == data.counter("ept_dram_remote")
    else:
        for purpose, options in (("guest", {"guest_tables": "remote"}), ("ept", {"ept_tables": "remote"})):
            apart = run(**options)
            assert apart.counter(f"{purpose}_dram_remote") == apart.counter(f"{purpose}_dram") > 0
            assert apart.counter("data_dram_remote") == 0
            profile = apart.engine.profile
            further = profile.cycles(profile.dram.remote_ns) - profile.cycles(profile.dram.local_ns)
            later = apart.counter("walk_cycles") - base.counter("walk_cycles")
            assert later == further * apart.counter(f"{purpose}_dram_remote")


def test_a_node_without_a_free_frame_is_helped_out_by_the_other_one() -> None:
    m = machine(touching(), nodes=2, memory=16 * MIB, host_memory=64 * MIB, placement=on_buddy())
    with quiet():
        for order in range(LARGEST_ORDER, -1, -1):
            while take_block(m.engine.cpus[0], m.engine.arena, m.engine.tags, zone_address(m), order) != NO_FRAME:
                pass
    m.run()

    assert m.hypervisor.death(m.vcpu) == "finished"
    assert m.hypervisor.memory_statistics(m.vcpu)["other_node"] > 0


ANY = "vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]"


@pytest.mark.parametrize(
    ("sets", "path", "message"),
    [
        (
            ("machine.nodes=2", "machine.profile=p4-672"),
            "machine.nodes",
            "profile 'p4-672' has one socket: no latency of remote DRAM that differs from local",
        ),
        (("vmm.memory.data=remote",), "vmm.memory.data", "a machine of one node has no remote memory"),
        (
            ("machine.nodes=2", "vmm.memory.allocator=list"),
            "vmm.memory.allocator",
            "a list of frames knows no nodes",
        ),
        (
            ("vmm.memory.allocator=list", "vmm.memory.fragmentation=50 %"),
            "vmm.memory.fragmentation",
            "a list of frames has no fragmentation",
        ),
        (
            ("vmm.memory.allocator=buddy", "vmm.ept.page_size=1 GiB"),
            "vmm.ept.page_size",
            "the buddy allocator has blocks of at most 2 MiB",
        ),
    ],
)
def test_memory_that_cannot_be_placed_is_refused_at_its_setting(sets: tuple[str, ...], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_scenario(ANY, sets)

    assert [(problem.path, problem.message) for problem in caught.value.problems] == [(path, message)]
