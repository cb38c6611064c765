"""Shadow paging with several vCPUs: each sees what the guest's tables say, and nobody uses what was changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest

from tests.vmm.changing_tables import ADDRESSES, FIRST_DATA, ROOTS, USER, WRITABLE, A, D, P, Paging
from tests.vmm.changing_vcpus import Pair, pair
from tests.vmm.machines import MIB, Machine, machine
from vtsim.base import jit
from vtsim.base.jit import quiet
from vtsim.base.kept import nothing_kept
from vtsim.config import parse_scenario
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.codes import PROGRAM_END
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import load_profile
from vtsim.cpu.slots import R12, RAX
from vtsim.ept.spec import ADDRESS as PTE_ADDRESS
from vtsim.ept.spec import PF_WRITE, PTE_LARGE
from vtsim.platform.machine import NativeMemory, apply
from vtsim.study import equivalence
from vtsim.study.run import without_hypervisor
from vtsim.vmm import shadow
from vtsim.vmm.layout import FOR_SHADOWING
from vtsim.vmm.programs import several, shadow_shared
from vtsim.vmm.programs.words import zero
from vtsim.vmm.registry import Path

SEEDS = range(1 if jit.DISABLED else 2)
UNTIL_FOUND = range(8)  # of ten programs, seven find who does not flush
STEPS = 60 if jit.DISABLED else 600
QUANTUM, LONGEST = 40, 1 << 26  # cycles between two looks at which CPU is behind; of a run
SLOW = pytest.mark.compiled_only
PROFILE = load_profile("skx-4114")
PAGING = {"": Paging(), "pcid": Paging(pcid=True), "rings": Paging(pcid=True, rings=True)}
FEW = (("shadow_permille", 0),)
MACHINES = {
    "kvm": {"personality": "kvm"},
    "kvm in few pages": {"personality": "kvm", "parameters": FEW},
    "kvm without VPID": {"personality": "kvm", "vpid": False},
    "kvm in large pages": {"personality": "kvm", "page_size": 2 * MIB, "huge_pages": "always"},
    "minimal": {"personality": "minimal"},
    "minimal in few pages": {"personality": "minimal", "parameters": FEW},
}
FIRST = ("kvm", "minimal in few pages")


def cases(machines: Iterable[str], first: tuple[str, ...]) -> list[Any]:
    """(paging, seed, name): on the first machines also interpreted, with rings on the very first of them.

    More seeds, and other machines with rings, only when asked for.
    """
    return [
        pytest.param(
            paging,
            seed,
            name,
            marks=[SLOW] * (name not in (first[:1] if paging == "rings" else first))
            + [pytest.mark.long] * (seed not in SEEDS or (paging == "rings" and (name not in first or seed > 0))),
        )
        for paging in PAGING
        for seed in range(20)
        for name in machines
    ]


@pytest.fixture
def few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few shadow pages are few for these guests, whose tables are few."""
    monkeypatch.setattr(shadow, "LEAST_PAGES", 16)


def run(engine: Engine) -> int:
    """Both CPUs until one stops: its number."""
    code, cpu = engine.run_all(LONGEST, QUANTUM)
    assert code == PROGRAM_END, "they wait for each other"
    engine.check_clock()
    return cpu


def check(made: Pair, load: object) -> None:
    for expected, found in made.seen(load):  # type: ignore[arg-type]
        assert found == expected


def ran(made: Pair, **options: object) -> Machine:
    """A machine that has run both programs."""
    m = machine(made.guest, cpus=2, vcpus=2, **{"paging": "shadow", **options})  # type: ignore[arg-type]
    cpu = run(m.engine)
    assert cpu == 0 and m.hypervisor.in_guest(0), [m.hypervisor.death(vcpu) for vcpu in m.hypervisor.vcpus]
    return m


@pytest.mark.parametrize("paging", PAGING)
@pytest.mark.parametrize("seed", SEEDS)
def test_natively_two_cpus_see_what_the_slow_walker_says(paging: str, seed: int) -> None:
    made = pair(seed, STEPS, PAGING[paging])
    engine = Engine(PROFILE, Geometry(cpus=2, memory_bytes=64 * MIB, pool_pages=4096))
    memory = NativeMemory(engine, 64 * MIB)
    with quiet():
        start = made.guest(memory)
        for cpu, each in enumerate((start, *start.others)):
            apply(engine, cpu, each)
    assert run(engine) == 0
    check(made, engine.load)


@pytest.mark.usefixtures("few_pages")
@pytest.mark.parametrize(("paging", "seed", "name"), cases(MACHINES, FIRST))
def test_two_vcpus_see_what_the_slow_walker_says(paging: str, seed: int, name: str) -> None:
    made = pair(seed, STEPS, PAGING[paging])
    m = ran(made, **MACHINES[name])

    check(made, m.vcpu.memory.load)
    assert {reason: m.exits(reason) for reason in made.exits} == made.exits
    counts = m.hypervisor.memory_statistics(m.vcpu)
    assert counts["remote_flushes"] > 0 and counts["kicks"] > 0
    assert (counts.get("flushes_for_room", 0) > 0) == name.endswith("few pages")


def nothing(*_: object, **__: object) -> None:
    """Emit no op."""


def late(
    a: Assembler, path: Path, cause: int, begin: Callable[[Assembler, Path, int], None] = shadow_shared.begin
) -> None:
    """A page fault of a load takes the lock later than it really does, so that something comes between."""
    if cause == FOR_SHADOWING:
        a.test(R12, PF_WRITE)
        in_time = f"in_time_{a.here:x}"
        a.jcc(ops.CC_NZ, in_time)
        a.work(30_000)
        a.label(in_time)
    begin(a, path, cause)


def seems_the_same(a: Assembler, path: Path) -> None:
    """CC_Z, whatever the tables say now."""
    zero(a, RAX)
    a.test(RAX, register=RAX)


Missing = tuple[tuple[ModuleType, str, Callable[..., None]], ...]


def in_sync(get_user_page: int) -> dict[str, object]:
    """No table is out of sync; the way from the walk with the lock to the entry has so many instructions more."""
    return {"personality": "kvm", "parameters": (("out_of_sync", 0), ("get_user_page", get_user_page))}


WITHOUT: dict[str, Missing] = {
    "flush": ((several, "flush_as_asked", nothing),),
    "kick": ((several, "kick_others", nothing),),
}
LOCK: Missing = ((several, "lock_tables", nothing), (several, "unlock_tables", nothing))
WALK: Missing = ((shadow_shared, "walk_again", seems_the_same),)


@pytest.mark.usefixtures("few_pages")
@SLOW
@pytest.mark.parametrize("left_out", WITHOUT)
def test_a_hypervisor_that_leaves_one_of_them_out_is_found_out(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, instead in WITHOUT[left_out]:
        monkeypatch.setattr(module, name, instead)

    with nothing_kept(), pytest.raises(AssertionError):
        for seed in UNTIL_FOUND:
            made = pair(seed, STEPS, PAGING[""])
            check(made, ran(made, **MACHINES["kvm in few pages"]).vcpu.memory.load)


@pytest.mark.parametrize("personality", [pytest.param("kvm", marks=SLOW), "minimal"])
def test_a_shadow_entry_that_one_vcpu_had_made_serves_the_other_without_an_exit(personality: str) -> None:
    def page_faults(of_other: int) -> int:
        made = pair(3, 0, PAGING[""])
        usable = [address for address in ADDRESSES if made.path(ROOTS[0] << 12, address)[-1] & P][: 5 + of_other]
        for cpu, addresses in enumerate((usable[:5], usable[5 - of_other : 5])):
            for address in addresses:
                made.after_all(cpu, lambda address=address: made.touch(address, False))  # type: ignore[misc]
        return int(ran(made, personality=personality).exits("EXCEPTION_NMI"))

    assert page_faults(5) == page_faults(1)


def two_stores(rounds: int, *, first: bool, times: int, other: Callable[[Pair, int], None]) -> Pair:
    """One vCPU stores to an entry twice, drops its translation and uses it; the other does something so many times.

    The `first` store changes the entry, or leaves it as it was.
    """
    made = pair(5, 0, PAGING[""])
    address, at = next((each, found) for each in ADDRESSES if (found := leaf_at(made, each)))
    for n in range(rounds):

        def stores(n: int = n) -> None:
            for frame, least in ((1 + n % 8 if first else n % 8, 0), (2 + n % 8, 25_000 if first else 0)):
                made.change(at, FIRST_DATA + frame << 12 | P | WRITABLE | USER | A | D)
                made.emits.append(lambda a, least=least: a.work(least + made.chance.randrange(5000)))  # type: ignore[misc]

        made.step_of(1, lambda: made.change(at, FIRST_DATA + n % 8 << 12 | P | WRITABLE | USER | A | D))  # noqa: B023
        made.step_of(1, lambda: made.invalidate(address))
        made.step_of(1, lambda: made.touch(address, False))

        def drops() -> None:
            made.invalidate(address)
            if first:  # what the other maps meanwhile is used
                made.emits.append(lambda a: a.work(40_000))

        made.step_of(1, stores)
        made.step_of(1, drops)
        made.step_of(1, lambda: made.touch(address, False))
    for _ in range(times):
        made.step_of(0, lambda: other(made, address))
    return made


def leaf_at(made: Pair, address: int) -> int:
    """Where the 4 KiB entry stands that translates an address for the first root; 0 if there is none."""
    at, entry = 0, ROOTS[0] << 12 | P
    for level in (4, 3, 2, 1):
        if not entry & P or entry & PTE_LARGE:
            return 0
        at = (entry & PTE_ADDRESS) | ((address >> (3 + 9 * level)) & 511) << 3
        entry = made.words[at]
    return at if entry & P else 0


@SLOW
def test_a_table_is_read_when_nobody_may_store_to_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first store puts it out of sync; the second may come while the other vCPU, which loads CR3, reads it."""
    made = two_stores(60, first=False, times=480, other=lambda made, address: made.disturb())
    check(made, ran(made, **MACHINES["kvm"]).vcpu.memory.load)

    monkeypatch.setattr(shadow_shared, "protect", nothing)
    with nothing_kept(), pytest.raises(AssertionError):
        check(made, ran(made, **MACHINES["kvm"]).vcpu.memory.load)


@SLOW
@pytest.mark.parametrize(("left_out", "between"), [(LOCK, 60_000), (WALK, 5000)], ids=["lock", "walk with the lock"])
def test_what_was_walked_is_still_so_when_it_is_mapped(
    left_out: Missing, between: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first store drops the entry; the second comes while the other vCPU, which uses it, makes it again.

    Both ways are made so long that it does in each round: from the first walk to the lock, and from there to the entry.
    """
    made = two_stores(60, first=True, times=1, other=Pair.glance)
    monkeypatch.setattr(shadow_shared, "begin", late)
    with nothing_kept():
        check(made, ran(made, **in_sync(between)).vcpu.memory.load)

    for module, name, instead in left_out:
        monkeypatch.setattr(module, name, instead)
    with nothing_kept():
        load = ran(made, **in_sync(between)).vcpu.memory.load
    assert sum(expected != found for expected, found in made.seen(load)) > 30


KERNELS = """
machine: {cpus: 4, memory: 256 MiB}
vmm: {paging: shadow}
vms:
  - memory: 64 MiB
    vcpus: 4
    guest:
      kernel: {tick: 100 us}
      processes:
        - threads: 4
          phases:
            - {primitive: page_fault, region: 256 KiB, iterations: 3}
            - {primitive: protect, region: 64 KiB, iterations: 3}
        - {name: forks, vcpu: 1, phases: [{primitive: fork, iterations: 3, pages: 20}]}
        - {name: execs, vcpu: 2, phases: [{primitive: exec, iterations: 3, pages: 20}]}
  - name: alone
    memory: 32 MiB
    cpu: 1
    guest: {processes: [{phases: [{primitive: fork, iterations: 3, pages: 20}]}]}
"""


@SLOW
@pytest.mark.parametrize(
    "settings",
    [(), ("vmm.personality=minimal",), ("vms.0.guest.kernel.kpti=true", "vmm.parameters.shadow_permille=0")],
    ids=["", "minimal", "KPTI, few pages"],
)
def test_a_kernel_on_four_vcpus_sees_what_it_sees_natively(settings: tuple[str, ...]) -> None:
    there = parse_scenario(KERNELS, settings)
    found = equivalence.compare(without_hypervisor(there), there)

    assert found.equivalent, [each.sentence(found.first, found.second) for each in found.differences]
