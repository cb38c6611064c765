"""Memory that is taken back from a VM with several vCPUs: nobody uses a frame that is not his any more, and no store is lost."""

from __future__ import annotations

import pytest
from attrs import define, field

from tests.platform.test_swap import REGION, first_words
from tests.vmm.owners import check_owners, owned_or_free
from tests.vmm.stale import check_translations
from vtsim.base.jit import quiet
from vtsim.config import parse_scenario
from vtsim.ept import spec as e
from vtsim.platform import machine as platform
from vtsim.platform.machine import Machine
from vtsim.vmm.hypervisor import Hypervisor
from vtsim.vmm.layout import USER_RAM
from vtsim.vmm.programs import several, swap

SLOW = pytest.mark.compiled_only
PAGES = 120
SLICE = 20_000  # cycles between two looks
SCENARIO = f"""
machine: {{cpus: 2, memory: 128 MiB}}
vmm: {{personality: minimal, huge_pages: never}}
vms:
  - memory: 16 MiB
    vcpus: 2
    guest: &guest
      processes:
        - threads: 2
          phases:
            - &fill {{primitive: fill, region: {4 * PAGES} KiB, at: {REGION}, distinct: 4096, iterations: 2}}
            - {{primitive: stream, region: {4 * PAGES} KiB, at: {REGION}, pattern: uniform, accesses: 600, work: 100}}
            - *fill
"""
OTHER = "  - {name: other, memory: 16 MiB, vcpus: 2, guest: *guest}\n"
FOUR = ("machine.cpus=4", "vms.0.vcpus=4", "vms.0.guest.processes.0.threads=4")
TWO_VMS = ("machine.cpus=4", "vms.1.cpus=[2, 3]")
SHARING = (
    "vmm.sharing.on=true", "vmm.sharing.period=20 us", "vmm.sharing.pages=5000",
    "vms.0.guest.processes.0.phases.1.accesses=14000", "vms.0.guest.processes.0.phases.0.distinct=8",
)  # fmt: skip
CALM = ("vmm.sharing.pages=1000", "vmm.sharing.period=100 us", "vms.0.guest.processes.0.phases.1.accesses=8000")
SWAP = ("vmm.swap.on=true", "vmm.swap.memory=512 KiB", "vmm.swap.read=20 us", "vmm.swap.write=10 us")
COLLAPSE = ("vmm.ept.page_size=2 MiB", "vmm.collapse.on=true", "vmm.collapse.period=40 us")
BALLOON = f"""
machine: {{cpus: 2, memory: 128 MiB}}
vmm: {{balloon: {{size: 1 MiB, stop: 400 us}}}}
vms:
  - memory: 16 MiB
    vcpus: 2
    guest:
      processes:
        - vcpu: 1
          phases:
            - {{primitive: page_fault, region: {4 * PAGES // 3} KiB}}
            - {{primitive: balloon, iterations: 2, period: 400 us}}
            - {{primitive: fill, region: {4 * PAGES // 3} KiB, at: {REGION}, distinct: 4096}}
        - {{name: busy, vcpu: 0, phases: [{{primitive: stream, region: 16 KiB, accesses: 3000000, write: 0.1}}]}}
"""


@define
class Looking:
    """A machine whose CPUs' translations are held against EPT between slices; `seen` counts them."""

    machine: Machine
    seen: int = 0
    at_first: set[int] = field(factory=set)

    @property
    def hypervisor(self) -> Hypervisor:
        assert self.machine.hypervisor is not None
        return self.machine.hypervisor

    def __call__(self, stage: str, done: float, instructions: int) -> bool:
        for vcpu in self.hypervisor.vcpus:
            if self.hypervisor.in_guest(vcpu.cpu) and not locked(self.hypervisor, vcpu.name):
                self.seen += check_translations(self.machine, vcpu.cpu)
        return True

    def counts(self) -> dict[str, int]:
        return self.hypervisor.memory_statistics(self.hypervisor.vcpus[0])


def looking(monkeypatch: pytest.MonkeyPatch, *settings: str, text: str = SCENARIO) -> Looking:
    """Run a scenario to its end, with a look at all TLBs after each slice."""
    monkeypatch.setattr(platform, "SLICE", SLICE)
    with quiet():
        machine = Machine(parse_scenario(text, settings))
    found = Looking(machine)
    found.at_first = owned_or_free(found.hypervisor)
    machine.progress = found
    machine.run()
    assert [vm.stopped for vm in machine.vms] == [None] * len(machine.vms)
    return found


def locked(hypervisor: Hypervisor, vm: str) -> bool:
    """Does somebody hold the lock of a VM's tables?"""
    first = next(vcpu for vcpu in hypervisor.vcpus if vcpu.name == vm)
    return hypervisor.word(first, "TABLES_TICKET") != hypervisor.word(first, "TABLES_SERVING")


def check_count(hypervisor: Hypervisor) -> None:
    """A VM has as many frames as it counts, those on their way from and to the disk included; shared ones are nobody's."""
    first = hypervisor.vcpus[0]
    if not locked(hypervisor, first.name):
        leaves = (first.process.find(USER_RAM + gfn * 4096) for gfn in range(first.memory.size >> 12))
        own = sum(leaf is not None and leaf.entry & e.PTE_WRITE != 0 for leaf in leaves)
        reading = sum(hypervisor.word(vcpu, "WAIT_FRAME") != 0 for vcpu in hypervisor.vcpus)
        assert hypervisor.word(first, "RESIDENT") == own + reading + hypervisor.word(first, "IN_FLIGHT")


def contents_are_right(found: Looking, pages: int = PAGES) -> None:
    for vm in range(len(found.machine.vms)):
        assert first_words(found.machine, vm, pages) == [4096 - n for n in range(pages)]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(SHARING, id="sharing", marks=SLOW),
        pytest.param((*SHARING, *FOUR, "vmm.personality=kvm"), id="sharing, four on kvm", marks=SLOW),
        pytest.param((*SHARING, *TWO_VMS), id="sharing, two VMs", marks=SLOW),
        pytest.param(COLLAPSE, id="collapse", marks=SLOW),
        pytest.param((*COLLAPSE, *FOUR), id="collapse, four", marks=SLOW),
        pytest.param((*COLLAPSE, "vmm.personality=kvm"), id="collapse on kvm", marks=SLOW),
    ],
)
def test_no_vcpu_uses_a_frame_that_was_taken_from_the_vm(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = looking(monkeypatch, *settings, text=SCENARIO + ("" if TWO_VMS[1] not in settings else OTHER))

    counts = found.counts()
    assert found.seen > 100 and counts["remote_flushes"] > 0
    assert counts.get("pages_merged", 0) > 10 or counts.get("regions_collapsed", 0) > 3
    assert (counts.get("flushes_for_sharing", 0) > 0) == ("vmm.sharing.on=true" in settings)
    assert counts.get("flushes_for_collapse", 0) == counts.get("regions_collapsed", 0)
    contents_are_right(found)
    check_owners(found.hypervisor, found.at_first, shared="vmm.sharing.on=true" in settings)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(SWAP, id="two", marks=SLOW),
        pytest.param((*SWAP, *FOUR), id="four", marks=SLOW),
        pytest.param((*SWAP, *FOUR, "vmm.personality=kvm", "vmm.ept.accessed_dirty=false"), id="four", marks=SLOW),
        pytest.param((*SWAP, *SHARING, *CALM), id="and sharing", marks=SLOW),
        pytest.param((*SWAP, *FOUR, "vmm.huge_pages=never"), id="and a page of zeroes", marks=SLOW),
        pytest.param((*SWAP, "vmm.dirty_log.method=pml", "vmm.dirty_log.period=30 us"), id="and logged", marks=SLOW),
    ],
)
def test_pages_that_several_vcpus_swap_keep_their_contents(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = looking(monkeypatch, *settings)

    assert found.seen > 100
    contents_are_right(found)
    check_count(found.hypervisor)


@SLOW
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("vmm.personality=minimal",), id="minimal"),
        pytest.param((), id="kvm"),
    ],
)
def test_what_a_balloon_gives_is_in_no_vcpus_translations(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = looking(monkeypatch, *settings, text=BALLOON)

    counts = found.counts()
    assert counts["pages_ballooned"] == counts["pages_deflated"] >= PAGES // 3
    assert counts["remote_flushes"] >= PAGES // 6  # of frames that were touched
    assert PAGES // 6 <= counts["flushes_for_balloon"] <= counts["pages_ballooned"]
    contents_are_right(found, PAGES // 3)
    check_owners(found.hypervisor, found.at_first)


@SLOW
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        pytest.param((*SHARING, *FOUR), SCENARIO, id="sharing"),
        pytest.param((*COLLAPSE, "vmm.collapse.period=50 us"), SCENARIO, id="collapse"),
        pytest.param(SWAP, SCENARIO, id="swap"),
    ],
)
def test_a_hypervisor_that_takes_frames_and_asks_no_other_cpu_is_found_out(
    settings: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "flush_as_asked", lambda a, path: None)

    with pytest.raises(AssertionError, match=r"an old translation|TRIPLE_FAULT|is used up"):  # or a list is broken
        looking(monkeypatch, *settings, text=text)


@SLOW
def test_a_hypervisor_that_reads_a_page_for_two_vcpus_at_a_time_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "BEING_READ", 0)

    with pytest.raises(AssertionError):
        found = looking(monkeypatch, *SWAP, *FOUR)
        check_count(found.hypervisor)
        contents_are_right(found)
