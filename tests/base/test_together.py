"""Kernels that several processes compile: the same program, whoever compiled a part of it, and whatever became of the others."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vtsim.base import jit
from vtsim.cpu.kernels.run import run_all

VECTOR = 0xB7
# a virtual-APIC page with one vector in its request register, in the only frame that has contents
PROGRAM = """
import numpy as np
from vtsim.base import memory as mem, together
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.apic_virtualization import highest_vector
from vtsim.vmcs import slots as v
together.ENOUGH = 1
together.os.sched_getaffinity = lambda process: {0, 1}
a, m = np.zeros(4096, np.int64), np.zeros(s.RECORD_SLOTS, np.int64)
a[mem.A_FRAMES], a[mem.A_FRAME_COUNT], a[mem.A_POOL], m[s.VMCS] = 256, 4, 512, 3072
a[256 + 1] = 1 | mem.VALUES << mem.FRAME_KIND
a[m[s.VMCS] + v.VIRTUAL_APIC_ADDRESS] = 1 << 12
a[512 + 512 + (0x200 + 16 * (VECTOR >> 5)) // 8] = 1 << (VECTOR & 31)
took, take = [], together._take
together._take = lambda seen, code=None: (took.append(code), take(seen, code))
CHANGE
print(int(highest_vector(m, a, 0x200)), len([code for code in took if code]))
"""
# a process that ends where it should give its second part
DIES = (
    "import os, sys; from vtsim.base import together; give, given = together._code_of, [];"
    "together._code_of = lambda part: os._exit(1) if given else given.append(part) or give(part);"
    "together.serve(int(sys.argv[1]))"
)


def output(change: str, cache: Path) -> list[int]:
    """What `PROGRAM` prints: the vector found, and how many parts came from other processes."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA", "VTSIM", "XDG"))}
    command = [sys.executable, "-c", PROGRAM.replace("VECTOR", str(VECTOR)).replace("CHANGE", change)]
    done = subprocess.run(command, env=env | {"VTSIM_CACHE": str(cache)}, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.compiled_only
@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ("", 3),  # word, virtual_load, virtual_page; is_memory, load and load_word are entries
        ("together.SERVE = 'nothing'", 0),
        (f"together.SERVE = {DIES!r}", 1),
        ("together.sys.executable = ''", 0),
        ("together.os.sched_getaffinity = lambda process: {0}", 0),
    ],
)
def test_the_program_is_the_same_whoever_compiled_its_parts(change: str, taken: int, tmp_path: Path) -> None:
    assert output(change, tmp_path) == [VECTOR, taken]


@pytest.mark.compiled_only
def test_every_kernel_of_the_engine_says_its_types_so_that_it_can_be_compiled_before_its_callers() -> None:
    from vtsim.base import together

    for name in together.calls_below(run_all):
        kernel = together._kernel(name).py_func
        given = inspect.get_annotations(kernel)
        missing = [each for each in inspect.signature(kernel).parameters if given.get(each) not in jit.NUMBA_TYPES]

        assert missing == [], f"{name}: {missing} not of {list(jit.NUMBA_TYPES)}"
