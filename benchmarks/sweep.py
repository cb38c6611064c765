"""What a sweep adds to each of its points, in steady state: the start of workers is taken out."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

from vtsim.study.sweep.executors import cpus
from vtsim.study.sweep.run import sweep
from vtsim.study.sweep.store import Store

FEW, MANY = 20, 220
STUDY = """
question: What does a sweep add to a point?
set:
  machine.memory: 256 MiB
  vms: [{{memory: 64 MiB, guest: {{processes: [{{phases: [{{primitive: cpuid, iterations: 20000}}]}}]}}}}]
axes: [{{how: grid, path: seed, values: {seeds}}}]
metrics: [slowdown]
"""


def overhead() -> dict[str, float]:
    """Milliseconds of a CPU for each point beyond its run, from the difference of a short and a long sweep."""
    jobs = cpus()
    few_s, few_runs_s, few_mib = _swept(FEW)
    many_s, many_runs_s, many_mib = _swept(MANY)
    elapsed, runs = many_s - few_s, many_runs_s - few_runs_s
    return {
        "overhead_ms": 1000 * (elapsed * jobs - runs) / (MANY - FEW),
        "busy": runs / (elapsed * jobs),
        "run_ms": 1000 * runs / (MANY - FEW),
        "coordinator_growth_mib": many_mib - few_mib,
    }


def _swept(points: int) -> tuple[float, float, float]:
    """Seconds of a sweep of so many points, of its runs alone, and the largest size of this process so far."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(STUDY.format(seeds=list(range(points))))
        began = time.perf_counter()
        study = sweep(path)
        seconds = time.perf_counter() - began
        with Store(study.path, reading=True) as store:
            count, mean, _ = store.timings()
        assert count == points
    return seconds, count * mean, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
