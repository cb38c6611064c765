"""A long sweep of short runs: are all cores busy with runs, and does memory stay flat?

`python -m benchmarks.many_points 10000` takes some five minutes on two idle cores; `docs/scale.md` has what it said.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from vtsim.study.sweep.executors import cpus
from vtsim.study.sweep.run import Progress, sweep
from vtsim.study.sweep.store import Store

STUDY = """
question: Do short runs keep all cores busy?
set:
  machine.memory: 256 MiB
  vms: [{{memory: 64 MiB, guest: {{processes: [{{phases: [{{primitive: cpuid, iterations: 32 k}}]}}]}}}}]
axes: [{{how: random, samples: {points}, seed: 1, ranges: {{seed: {{min: 1, max: 4000000000, integer: true}}}}}}]
metrics: [slowdown]
"""
LOOKS = 10  # at the coordinator's size
MIB = 1 << 20


def many_points(points: int) -> dict[str, float]:
    """Sweep so many points once; seconds, shares of them, and MiB. Each point has a native baseline of its own."""
    sizes: list[tuple[int, float]] = []

    def watch(progress: Progress) -> bool:
        if progress.ran * LOOKS >= points * (len(sizes) + 1):
            sizes.append((progress.ran, _resident()))
        return True

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(STUDY.format(points=points))
        began, own = time.perf_counter(), time.process_time()
        study = sweep(path, watch=watch)
        elapsed, own = time.perf_counter() - began, time.process_time() - own
        with Store(study.path, reading=True) as store:
            count, mean, _ = store.timings()
        peaks = _peaks(study.path)
        stored = study.path.stat().st_size
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "points": count,
        "elapsed_s": elapsed,
        "run_ms": 1000 * mean,
        "busy": count * mean / (elapsed * cpus()),
        "overhead_ms": 1000 * (elapsed * cpus() - count * mean) / count,
        "coordinator_cpu_ms": 1000 * own / count,
        "workers_cpu_ms": 1000 * (workers.ru_utime + workers.ru_stime) / count,
        "coordinator_first_mib": sizes[0][1],
        "coordinator_last_mib": sizes[-1][1],
        "worker_first_mib": peaks[0],
        "worker_last_mib": peaks[1],
        "stored_kb_per_point": stored / count / 1000,
    }


def _resident() -> float:
    """The size of this process now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def _peaks(path: Path) -> tuple[float, float]:
    """The largest size that workers had in the first tenth of the sweep, and in all of it."""
    with Store(path, reading=True) as store:
        query = "SELECT peak_mib FROM design JOIN points USING (identity) ORDER BY number"
        peaks = [each for (each,) in store.connection.execute(query)]
    return max(peaks[: max(1, len(peaks) // 10)]), max(peaks)


if __name__ == "__main__":
    print(json.dumps(many_points(int(sys.argv[1])), indent=2))
