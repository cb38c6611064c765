"""Descriptors are a process's own, whoever else opens files meanwhile, and its threads lose no file."""

from __future__ import annotations

import pytest

from tests.vmm.shootdown import threads
from vtsim.config import parse_scenario, resolve
from vtsim.guest.kernel import files, smp
from vtsim.guest.kernel import layout as at
from vtsim.platform.machine import Machine, alone
from vtsim.platform.witness import APPLICATION, Wanted

THREADS = 3
SPARE_FILES = 4 + THREADS - 1
OPENED = """
machine: {cpus: 3, memory: 256 MiB}
vmm: {technique: native}
vms:
  - memory: 64 MiB
    vcpus: VCPUS
    guest:
      kernel: {tick: 100 us}
      processes:
        - {name: one, threads: THREADS, phases: [&phase {primitive: open_close, iterations: 300, components: 1}]}
        - {name: two, threads: THREADS, phases: [*phase]}
"""


def opened(vcpus: int, each: int) -> str:
    """Two processes of so many threads each."""
    return OPENED.replace("VCPUS", str(vcpus)).replace("THREADS", str(each))


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_process_gets_its_first_free_descriptor_whatever_another_has_open(vcpus: int) -> None:
    scenario = resolve(parse_scenario(opened(vcpus, 1)), "test")
    machine = Machine(alone(scenario, scenario.vms[0]), wanted=Wanted())
    machine.run()
    seen = [row.value for log in machine.witnessed().values() for row in log.streams[APPLICATION].rows]

    assert set(seen) == {0, files.FIRST_SOCKET_DESCRIPTOR}
    assert len(seen) == 2 * 300 * 2


def check_files(text: str) -> None:
    """Of each process no file is open, all are free once, and so is the lock."""
    ran = threads(text).run()
    tasks = (ran.cpu_word(cpu, at.FIRST_TASK) for cpu in range(2))  # one of each process
    pages = {ran.word(task + at.T_FILES) for task in tasks}
    for page in pages:
        spare, free = ran.word(page + files.SPARE), list[int]()
        while spare:
            free.append(spare)
            assert len(free) <= SPARE_FILES
            spare = ran.word(spare + files.F_NEXT)
        first = page + files.DESCRIPTORS + 8 * files.FIRST_SOCKET_DESCRIPTOR

        assert len(set(free)) == SPARE_FILES
        assert [ran.word(first + 8 * n) for n in range(SPARE_FILES)] == [0] * SPARE_FILES
        assert ran.word(page + files.TICKET) == ran.word(page + files.SERVING) > 0
    assert len(pages) == 2


@pytest.mark.slow
@pytest.mark.parametrize("locked", [True, pytest.param(False, marks=pytest.mark.compiled_only)])
def test_threads_that_open_and_close_beside_each_other_lose_no_file(
    locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = opened(3, THREADS)
    if locked:
        check_files(text)
        return
    monkeypatch.setattr(smp, "lock", lambda *_: None)
    with pytest.raises(AssertionError):
        check_files(text)
