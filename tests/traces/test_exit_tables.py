"""Printed tables of exits become counts by reason, or are refused with their line."""

from __future__ import annotations

import pytest

from vtsim.base.errors import ConfigError
from vtsim.guest.traces.exit_tables import exit_tables

PERF = """
# perf kvm stat report
Analyze events for all VMs, all VCPUs:

             VM-EXIT    Samples  Samples%     Time%    Min Time    Max
Time         Avg time

   PENDING_INTERRUPT        120    60.00%    10.00%      0.30us     88.06us
0.57us ( +-   0.14% )
unknown kvm exit code:131072 on VMX
             UNKNOWN         30    15.00%     0.99%      0.34us      4.22us      0.78us ( +-   0.58% )
unknown kvm exit code:65536 on VMX
             UNKNOWN         10     5.00%     0.99%      0.34us      4.22us      0.78us ( +-   0.58% )
                 npf         40    20.00%     0.99%      0.34us      4.22us      0.78us ( +-   0.58% )

Total Samples:200, Total events handled time:356509.21us.
"""


def counts(text: str) -> list[dict[str, int]]:
    return [dict(table.counts) for table in exit_tables(text, "exits.txt")]


def test_perf_prints_a_row_for_each_reason_whoever_broke_its_lines() -> None:
    assert counts(PERF) == [{"INTERRUPT_WINDOW": 120, "UNKNOWN": 40, "npf": 40}]
    assert counts(PERF + PERF) == 2 * counts(PERF)


def test_bcc_prints_a_row_for_each_thread_and_reason() -> None:
    rows = "4036993  4037007  EXIT_REASON_CPUID   196\n4036993  4037008  EXIT_REASON_CPUID   4\n"

    assert counts(f"## before\n{rows}## after\n{rows}") == [{"CPUID": 200}] * 2
    assert counts("KVM_EXIT_REASON    COUNT\nHLT   50\nEPT_VIOLATION 7\n") == [{"HLT": 50, "EPT_VIOLATION": 7}]


@pytest.mark.parametrize(
    "text, said",
    [
        (PERF.replace("         40 ", "         39 "), "exits.txt:5: the exits of this table are 199, not 200"),
        (PERF.replace("VM-EXIT", "MSR Access"), "exits.txt: no table of exits in this file"),
        ("kvm_entry: vcpu 1\n", "exits.txt: no table of exits in this file"),
    ],
)
def test_a_table_that_is_cut_or_of_something_else_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        exit_tables(text, "exits.txt")

    assert str(caught.value).startswith(said)
