"""The exits in the layout of `perf kvm stat report`, for comparing model and machine with diff."""

from __future__ import annotations

from math import sqrt

from vtsim.study.result import Exit, Result


def perf_kvm_stat(result: Result) -> str:
    """All exits of all VMs, most frequent first, as perf prints them to a pipe."""
    exits = sorted(result.exits, key=lambda one: (-one.count, one.reason))
    samples = sum(one.count for one in exits)
    cycles = sum(one.cycles for one in exits)
    microseconds = 1e6 / result.clock_hz
    header = (
        f"{'VM-EXIT':>20} {'Samples':>10} {'Samples%':>9} {'Time%':>9} "
        f"{'Min Time':>11} {'Max Time':>11} {'Avg time':>16} \n\n"
    )
    rows = "".join(_row(one, samples, cycles, microseconds) for one in exits)
    total = f"Total Samples:{samples}, Total events handled time:{cycles * microseconds:.2f}us."
    return f"\n\nAnalyze events for all VMs, all VCPUs:\n\n{header}{rows}\n{total}\n\n"


def _row(one: Exit, samples: int, cycles: int, microseconds: float) -> str:
    times = [value * microseconds for value in (one.min_cycles, one.max_cycles, one.mean_cycles)]
    shortest, longest, mean = (f"{time:>9.2f}us" for time in times)
    error_of_mean = one.stddev_cycles / sqrt(one.count) / one.mean_cycles * 100
    of_samples, of_time = one.count / samples * 100, one.cycles / cycles * 100
    return (
        f"{one.reason:>20} {one.count:>10} {of_samples:>8.2f}% {of_time:>8.2f}% "
        f"{shortest} {longest} {mean} ( +-{error_of_mean:>7.2f}% )\n"
    )
