"""Over-commit: VMs with more memory than they may have at a time lose nothing of it, and wait for the disk."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.cpu import slots as s
from vtsim.ept.tables import PAGING, Table
from vtsim.platform.machine import Machine
from vtsim.vmm import layout as at

PAGE = 4096
REGION = 0x1000_0000
SCENARIO = """
machine: {{memory: 64 MiB}}
vmm: {{personality: {personality}, swap: {{on: true, memory: {memory} KiB}}}}
vms:
  - memory: 16 MiB
    cpu: 0
    guest: &same
      processes:
        - phases: [{{primitive: fill, region: {pages} KiB, at: {region}, distinct: 4096, iterations: {rounds}}}]
{more}
"""
SECOND = "  - {memory: 16 MiB, cpu: 0, guest: *same}"


def swapping(*sets: str, memory: int, pages: int, rounds: int, personality: str = "minimal", vms: int = 1) -> Machine:
    text = SCENARIO.format(
        personality=personality, memory=memory, pages=4 * pages, region=REGION, rounds=rounds,
        more=SECOND if vms > 1 else "",
    )  # fmt: skip
    machine = Machine(parse_scenario(text, sets))
    machine.run()
    return machine


def word(machine: Machine, vm: int, gpa: int) -> int:
    return machine._word(machine.vms[vm], gpa)


def first_words(machine: Machine, vm: int, pages: int) -> list[int]:
    """The first word of each page of the region, wherever the page is."""

    @cache
    def words(gfn: int) -> Any:
        return [mem.signed(word(machine, vm, gfn * PAGE + 8 * n)) for n in range(512)]

    cr3 = machine.vms[vm].spaces[0].cr3
    table = Table(root=cr3 >> 12, format=PAGING, take=lambda: 0, words=words)
    leaves = [table.find(REGION + PAGE * n) for n in range(pages)]
    return [word(machine, vm, leaf.frame * PAGE) for leaf in leaves if leaf is not None]


def counts(machine: Machine, vm: int = 0) -> dict[str, int]:
    assert machine.hypervisor is not None
    return machine.hypervisor.memory_statistics(machine.hypervisor.vcpus[vm])


def check_frames(machine: Machine) -> None:
    """A VM has as many frames as it counts, never more than it may have, and none that is free or another VM's."""
    hypervisor = machine.hypervisor
    assert hypervisor is not None
    seen: set[int] = set()
    for vcpu in hypervisor.vcpus:
        leaves = (vcpu.process.find(at.USER_RAM + gfn * PAGE) for gfn in range(vcpu.memory.size // PAGE))
        frames = [leaf.frame for leaf in leaves if leaf is not None and leaf.frame != hypervisor.host.zero_page]
        waiting, flying = (hypervisor.word(vcpu, name) for name in ("WAIT_FRAME", "IN_FLIGHT"))
        assert waiting == 0
        assert hypervisor.word(vcpu, "RESIDENT") == len(frames) + flying <= hypervisor.word(vcpu, "SHARE")
        assert not seen & set(frames) and len(set(frames)) == len(frames)
        seen |= set(frames)


@pytest.mark.slow
def test_every_page_keeps_its_contents_though_there_are_fewer_frames() -> None:
    machine = swapping(memory=512, pages=110, rounds=1)

    assert first_words(machine, 0, 110) == [4096 - n for n in range(110)]
    found = counts(machine)
    assert found["pages_swapped_out"] > 0
    assert machine.vms[0].stopped is None
    check_frames(machine)


@pytest.mark.compiled_only
@pytest.mark.parametrize("personality", ("minimal", "kvm"))
@pytest.mark.parametrize("flags", ("true", "false"))
def test_two_vms_swap_on_one_cpu_and_each_keeps_its_own(personality: str, flags: str) -> None:
    pages, rounds = 700, 2
    machine = swapping(
        f"vmm.ept.accessed_dirty={flags}", memory=4096, pages=pages, rounds=rounds, personality=personality, vms=2
    )

    for vm in range(2):
        assert first_words(machine, vm, pages) == [4096 - n for n in range(pages)]
        found = counts(machine, vm)
        assert found["pages_swapped_in"] > pages // 2 and found["pages_swapped_out"] > pages
    check_frames(machine)


@pytest.mark.compiled_only
def test_a_page_that_was_only_read_is_not_written_again_and_a_slower_disk_takes_longer() -> None:
    read_only = "vms.0.guest.processes.0.phases.0={primitive: stream, pattern: strided, stride: 4 KiB, region: 4 MiB}"

    def run(read: str) -> Machine:
        return swapping(
            read_only, "vms.0.guest.processes.0.phases.0.accesses=4096", f"vmm.swap.read={read}", memory=3072, pages=1,
            rounds=1,
        )  # fmt: skip

    fast, slow = run("20 us"), run("200 us")
    found = counts(fast)
    assert found["pages_dropped"] > found["pages_swapped_out"]
    assert found["pages_swapped_in"] >= found["pages_dropped"]
    extra = counts(slow)["pages_swapped_in"] * fast.profile.cycles(180_000)
    assert slow.engine.cpus[0][s.CYCLE] - fast.engine.cpus[0][s.CYCLE] > extra // 2


@pytest.mark.compiled_only
@pytest.mark.parametrize("more", ((), ("vmm.sharing.on=true", "vmm.sharing.period=50 us")))
def test_the_page_of_zeroes_takes_no_frame_until_it_is_written(more: tuple[str, ...]) -> None:
    """More memory is read than the VM may have, then written: each page has room made for it, and keeps its contents."""
    pages = 400
    read = f"{{primitive: stream, pattern: strided, stride: 4 KiB, region: {4 * pages} KiB, at: {REGION}, accesses: {pages}}}"
    written = f"{{primitive: fill, region: {4 * pages} KiB, at: {REGION}, distinct: 4096}}"
    phases = "vms.0.guest.processes.0.phases"
    settings = ("vmm.huge_pages=never", "vms.0.guest.kernel.populate=prebuilt", *more)

    only_read = swapping(*settings, f"{phases}=[{read}]", memory=512, pages=pages, rounds=1)
    assert not counts(only_read).get("pages_swapped_out")
    if not more:
        check_frames(only_read)

    machine = swapping(*settings, f"{phases}=[{read}, {written}]", memory=512, pages=pages, rounds=1)
    assert counts(machine)["pages_swapped_out"] > pages // 2
    assert first_words(machine, 0, pages) == [4096 - n for n in range(pages)]
    assert machine.vms[0].stopped is None
    if not more:
        check_frames(machine)


@pytest.mark.parametrize(
    ("sets", "path", "message"),
    [
        (("vmm.ept.page_size=2 MiB",), "vmm.ept.page_size", "large pages are not swapped"),
        (
            ("vmm.ept.populate=prebuilt",),
            "vmm.ept.populate",
            "memory that is all there before the guest starts leaves nothing to swap",
        ),
        (("vmm.collapse.on=true",), "vmm.collapse.on", "large pages are not swapped"),
    ],
)
def test_what_cannot_be_swapped_is_refused(sets: tuple[str, ...], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_scenario(SCENARIO.format(personality="kvm", memory=8192, pages=4, region=REGION, rounds=1, more=""), sets)
    assert [(problem.path, problem.message) for problem in caught.value.problems] == [(path, message)]


def test_a_vm_that_cannot_even_start_in_its_part_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        swapping("vms.1.memory=240 MiB", memory=1024, pages=4, rounds=1, vms=2)

    (problem,) = caught.value.problems
    assert problem.path == "vmm.swap.memory"
    assert problem.message == "VM 'vm0' would have 64 KiB of the host's memory, less than it starts with"
    assert problem.help.startswith("give at least ")
