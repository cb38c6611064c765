"""What workers keep from one point to the next changes no result."""

from collections.abc import Callable
from pathlib import Path

import pytest

import vtsim
from tests.study.sweep.conftest import Now
from vtsim.base.kept import nothing_kept
from vtsim.study.sweep import worker
from vtsim.vmm.build import PROGRAMS

AXES = """set: {{run.work_scale: 1}}
axes:
- {{how: grid, beyond_stated_range: true, path: machine.cpu.transitions.vm_exit_cycles, values: {prices}}}
- {{how: grid, path: vmm.vpid, values: {vpids}}}
metrics: [slowdown]
"""


@pytest.mark.slow
def test_results_are_the_same_to_the_byte_whatever_was_kept(write: Callable[..., Path]) -> None:
    """An exit that costs more and a VPID leave programs and baselines as they are, or not: results say so alike."""
    worker.NATIVE.clear()
    PROGRAMS.clear()
    there = write(AXES.format(prices=[500, 900], vpids="[true, false]"), "there.yaml")
    back = write(AXES.format(prices=[900, 500], vpids="[false, true]"), "back.yaml")
    kept = vtsim.sweep(there, executor=Now())
    assert (len(PROGRAMS), len(worker.NATIVE)) == (2, 2)  # by VPID; by what an exit costs
    again = vtsim.sweep(back, executor=Now())  # every program and baseline is there already
    with nothing_kept():
        anew = vtsim.sweep(back, executor=Now(), store=back.with_suffix(".anew"))
    assert len({row.metrics["slowdown"] for row in kept.table().rows}) == 4
    assert again.digest() == anew.digest()
    assert dict(kept.results()).keys() == dict(anew.results()).keys()
    assert {name: _figures(result) for name, result in kept.results()} == {
        name: _figures(result) for name, result in anew.results()
    }


def _figures(result: object) -> object:
    assert isinstance(result, dict)
    native = {key: value for key, value in result["native"].items() if key != "rate"}
    return {**result, "rate": None, "native": native}
