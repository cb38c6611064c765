"""Shadow paging with several vCPUs: each sees what the guest's tables say, and nobody uses what was changed."""

from __future__ import annotations

import pytest

from tests.vmm.changing_tables import Paging
from tests.vmm.changing_vcpus import Pair, pair
from tests.vmm.machines import MIB, Machine, machine
from vtsim.base import jit
from vtsim.base.jit import quiet
from vtsim.cpu.codes import PROGRAM_END
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import load_profile
from vtsim.platform.machine import NativeMemory, apply

SEEDS = range(2 if jit.DISABLED else 12)
STEPS = 80 if jit.DISABLED else 500
QUANTUM, LONGEST = 40, 1 << 26  # cycles between two looks at which CPU is behind; of a run
PROFILE = load_profile("skx-4114")
PAGING = {"": Paging(), "pcid": Paging(pcid=True)}
MACHINES = {
    "kvm": {"personality": "kvm", "paging": "shadow"},
    "kvm without VPID": {"personality": "kvm", "paging": "shadow", "vpid": False},
    "kvm always in sync": {"personality": "kvm", "paging": "shadow", "parameters": (("out_of_sync", 0),)},
    "kvm in large pages": {"personality": "kvm", "paging": "shadow", "page_size": 2 * MIB, "huge_pages": "always"},
    "minimal": {"personality": "minimal", "paging": "shadow"},
    "ept": {"personality": "minimal", "paging": "ept"},
}


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
    m = machine(made.guest, cpus=2, vcpus=2, **options)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("paging", PAGING)
@pytest.mark.parametrize("seed", SEEDS)
def test_two_vcpus_see_what_the_slow_walker_says(paging: str, seed: int, name: str) -> None:
    made = pair(seed, STEPS, PAGING[paging])
    m = ran(made, **MACHINES[name])
    check(made, m.vcpu.memory.load)
