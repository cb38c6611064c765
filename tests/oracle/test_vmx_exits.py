"""The recorded VM-exit cases, executed as operations of the engine, agree as far as the table beside them says.

`data/exit_agreement.txt` has for each category how many cases there are and how many agree, of all and of the sample
that every run tries. Where the model keeps to the manual against the recorder, docs/oracle-exceptions.md says why.
`python -m tests.oracle.test_vmx_exits` writes the table anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from tests.oracle.replays import DATA, EXITS, replays_of
from vtsim.study.vmx.replay import AGREE, SKIPPED, Verdict

TABLE = DATA / "exit_agreement.txt"
STRIDE = 30
LEAST = 0.97  # of all cases

Row = tuple[int, int, int, int]  # cases, agree; of the sample: cases, agree


def counted(found: Sequence[Verdict]) -> dict[str, tuple[int, int]]:
    """Cases that were run, and that agree, by category."""
    run = Counter(verdict.category for verdict in found if verdict.status != SKIPPED)
    agree = Counter(verdict.category for verdict in found if verdict.status == AGREE)
    return {name: (run[name], agree[name]) for name in sorted(run)}


def table() -> dict[str, Row]:
    lines = (line.split() for line in TABLE.read_text().splitlines() if not line.startswith("#"))
    return {name: (int(a), int(b), int(c), int(d)) for name, a, b, c, d in lines}


def test_a_sample_of_the_recorded_exits_agrees_as_the_table_says() -> None:
    expected = {name: row[2:] for name, row in table().items() if row[2]}

    assert counted(replays_of(EXITS, STRIDE)[1]) == expected


@pytest.mark.slow
def test_the_recorded_exits_agree_as_the_table_says() -> None:
    assert counted(replays_of(EXITS, 1)[1]) == {name: row[:2] for name, row in table().items()}


def test_the_table_speaks_of_nearly_all_cases() -> None:
    rows = table().values()

    assert sum(row[1] for row in rows) >= LEAST * sum(row[0] for row in rows)


def lines() -> Iterator[str]:
    found = replays_of(EXITS, 1)[1]
    everything, sample = counted(found), counted(found[::STRIDE])
    yield "# category               cases  agree  sampled  agree"
    for name, (cases, agree) in everything.items():
        yield f"{name:<24} {cases:>6} {agree:>6} {sample.get(name, (0, 0))[0]:>8} {sample.get(name, (0, 0))[1]:>6}"


if __name__ == "__main__":
    TABLE.write_text("\n".join(lines()) + "\n")
