"""The layout of `perf kvm stat report`."""

from __future__ import annotations

import attrs
import pytest

from vtsim.study.perf_layout import perf_kvm_stat
from vtsim.study.result import Exit, Result

# What perf 6.1 printed for a Linux guest under kvm_amd, trailing blank included.
REAL = """

Analyze events for all VMs, all VCPUs:

             VM-EXIT    Samples  Samples%     Time%    Min Time    Max Time         Avg time\x20

                  io       1912    47.60%    24.45%     26.32us   4782.18us    208.54us ( +-   2.43% )
                 msr        544    13.54%     6.87%     32.98us   8755.38us    206.04us ( +-   9.79% )
           interrupt        542    13.49%     5.60%     18.20us  29622.29us    168.35us ( +-  34.80% )
               cpuid        385     9.58%     0.88%     15.60us    427.13us     37.34us ( +-   6.51% )
                 npf        350     8.71%     1.73%     24.48us   2027.63us     80.61us ( +-   9.39% )
               vintr        241     6.00%     0.69%     15.12us    817.66us     46.61us ( +-   8.60% )
           write_cr4         26     0.65%     0.07%     19.21us    143.20us     44.50us ( +-  13.01% )
                 hlt         17     0.42%    59.71%    686.40us 316114.67us  57269.54us ( +-  38.78% )

Total Samples:4017, Total events handled time:1630625.69us.

"""


def real_exits() -> tuple[Exit, ...]:
    """The same table as exits of a machine with a 1 GHz clock: 1000 cycles to a microsecond."""
    exits = []
    for line in REAL.splitlines()[6:14]:
        reason, count, _, _, shortest, longest, mean, _, _, error, _ = line.replace("( +-", "( +- ").split()
        times = [float(text.removesuffix("us")) * 1000 for text in (shortest, longest, mean)]
        of_mean = float(error.removesuffix("%")) / 100
        exits.append(
            Exit(
                reason=reason,
                count=int(count),
                cycles=round(times[2] * int(count)),
                exclusive_cycles=round(times[2] * int(count)),
                mean_cycles=times[2],
                min_cycles=round(times[0]),
                p50_cycles=0,
                p99_cycles=0,
                max_cycles=round(times[1]),
                stddev_cycles=of_mean * times[2] * int(count) ** 0.5,
                share=0.0,
                share_of_run=0.0,
            )
        )
    return tuple(exits)


def test_a_real_table_of_perf_comes_out_as_it_was(result: Result) -> None:
    printed = perf_kvm_stat(attrs.evolve(result, clock_hz=1_000_000_000, exits=real_exits()[::-1]))

    # perf's total is of unrounded times, of which its own averages keep two digits
    assert printed.splitlines()[:-2] == REAL.splitlines()[:-2]
    assert float(printed.split("time:")[1].split("us")[0]) == pytest.approx(1630625.69, rel=1e-5)
    assert printed.count("\n") == REAL.count("\n")


def test_a_run_without_exits_has_an_empty_table(result: Result) -> None:
    printed = perf_kvm_stat(attrs.evolve(result, exits=()))

    header = "             VM-EXIT    Samples  Samples%     Time%    Min Time    Max Time         Avg time \n"
    assert printed == (
        f"\n\nAnalyze events for all VMs, all VCPUs:\n\n{header}\n\n"
        "Total Samples:0, Total events handled time:0.00us.\n\n"
    )
