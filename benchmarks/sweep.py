"""What a sweep adds to each of its points, in steady state: the start of workers is taken out."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

from vtsim.study.sweep.executors import cpus
from vtsim.study.sweep.run import sweep
from vtsim.study.sweep.store import Store

FEW, MANY = 20, 120
STUDY = """
question: What does a sweep add to a point?
set:
  machine.memory: 256 MiB
  vms: [{{memory: 64 MiB, guest: {{processes: [{{phases: [{{primitive: cpuid, iterations: 1000}}]}}]}}}}]
axes: [{{how: grid, path: seed, values: {seeds}}}]
metrics: [slowdown]
"""


def overhead() -> dict[str, float]:
    """Milliseconds for each point beyond its run, from the difference of a short and a long sweep.

    On a machine that does other work the second figure says more: processor time of the coordinator.
    """
    jobs = cpus()
    few, many = _swept(FEW), _swept(MANY)
    elapsed, runs, own, growth = (after - before for before, after in zip(few, many, strict=True))
    points = MANY - FEW
    return {
        "overhead_ms": 1000 * (elapsed * jobs - runs) / points,
        "coordinator_cpu_ms": 1000 * own / points,
        "busy": runs / (elapsed * jobs),
        "run_ms": 1000 * runs / points,
        "coordinator_growth_mib": growth,
    }


def _swept(points: int) -> tuple[float, float, float, float]:
    """Seconds of a sweep, of its runs alone, of this process alone; its largest size so far, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(STUDY.format(seeds=list(range(points))))
        began, began_own = time.perf_counter(), time.process_time()
        study = sweep(path)
        seconds, own = time.perf_counter() - began, time.process_time() - began_own
        with Store(study.path, reading=True) as store:
            count, mean, _ = store.timings()
        assert count == points
    return seconds, count * mean, own, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
