"""Shadow paging with several vCPUs: each sees what the guest's tables say, and nobody uses what was changed."""

from __future__ import annotations

import pytest

from tests.vmm.changing_tables import ADDRESSES, ROOTS, P, Paging
from tests.vmm.changing_vcpus import Pair, pair
from tests.vmm.machines import MIB, Machine, machine
from vtsim.base import jit
from vtsim.base.jit import quiet
from vtsim.base.kept import nothing_kept
from vtsim.cpu.codes import PROGRAM_END
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import load_profile
from vtsim.platform.machine import NativeMemory, apply
from vtsim.vmm import shadow
from vtsim.vmm.programs import several, shadow_shared

SEEDS = range(1 if jit.DISABLED else 3)
STEPS = 60 if jit.DISABLED else 600
QUANTUM, LONGEST = 40, 1 << 24  # cycles between two looks at which CPU is behind; of a run
SLOW = pytest.mark.compiled_only
PROFILE = load_profile("skx-4114")
PAGING = {"": Paging(), "pcid": Paging(pcid=True)}
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


@pytest.fixture(autouse=True)
def few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few shadow pages are few for these guests, whose tables are few."""
    monkeypatch.setattr(shadow, "LEAST_PAGES", 24)


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


@pytest.mark.parametrize("name", [name if name in FIRST else pytest.param(name, marks=SLOW) for name in MACHINES])
@pytest.mark.parametrize("paging", PAGING)
@pytest.mark.parametrize("seed", SEEDS)
def test_two_vcpus_see_what_the_slow_walker_says(paging: str, seed: int, name: str) -> None:
    made = pair(seed, STEPS, PAGING[paging])
    m = ran(made, **MACHINES[name])

    check(made, m.vcpu.memory.load)
    assert {reason: m.exits(reason) for reason in made.exits} == made.exits
    counts = m.hypervisor.memory_statistics(m.vcpu)
    assert counts["remote_flushes"] > 0 and counts["kicks"] > 0
    assert (counts.get("flushes_for_room", 0) > 0) == name.endswith("few pages")


def nothing(*_: object) -> None:
    """Emit no op."""


WITHOUT = {
    "flush": ((several, "flush_as_asked"),),
    "kick": ((several, "kick_others"),),
    "lock": ((several, "lock_tables"), (several, "unlock_tables")),
    "protection before tables are read": ((shadow_shared, "protect"),),
}


@SLOW
@pytest.mark.parametrize("left_out", WITHOUT)
def test_a_hypervisor_that_leaves_one_of_them_out_is_found_out(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in WITHOUT[left_out]:
        monkeypatch.setattr(module, name, nothing)

    with nothing_kept(), pytest.raises(AssertionError):
        for seed in range(9):
            made = pair(seed, 1000, PAGING[""])
            check(made, ran(made, **MACHINES["kvm"]).vcpu.memory.load)


@pytest.mark.parametrize("personality", [pytest.param("kvm", marks=SLOW), "minimal"])
def test_a_shadow_entry_that_one_vcpu_had_made_serves_the_other_without_an_exit(personality: str) -> None:
    def page_faults(of_other: int) -> int:
        made = pair(3, 0, PAGING[""])
        usable = [address for address in ADDRESSES if made.path(ROOTS[0], address)[-1] & P][: 5 + of_other]
        for cpu, addresses in enumerate((usable[:5], usable[5 - of_other : 5])):
            for address in addresses:
                made.after_all(cpu, lambda address=address: made.touch(address, False))  # type: ignore[misc]
        return int(ran(made, personality=personality).exits("EXCEPTION_NMI"))

    assert page_faults(5) == page_faults(1)
