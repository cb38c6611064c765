from __future__ import annotations

import numpy as np
import pytest

from vtsim.base.errors import ModelError
from vtsim.base.jit import kernel
from vtsim.base.stats import Counter, StatGroup, check_laws, law


class WalkStats(StatGroup):
    walks = Counter("walks", "Walks started")
    completed = Counter("walks", "Walks that ended in a translation")
    violations = Counter("walks", "Walks that ended in an EPT violation")

    @law
    def every_walk_ends_exactly_once(self) -> bool:
        return self.walks == self.completed + self.violations


class NestedWalkStats(WalkStats):
    reads = Counter("reads", "Entries read")

    @law
    def a_walk_reads_at_least_one_entry(self) -> bool:
        return self.reads >= self.walks


WALKS, VIOLATIONS = WalkStats.walks.slot, WalkStats.violations.slot


@kernel
def violate(counters, times):  # type: ignore[no-untyped-def]
    for _ in range(times):
        counters[WALKS] += 1
        counters[VIOLATIONS] += 1


def test_kernels_count_by_slot_and_python_reads_by_name() -> None:
    group = WalkStats("walker")

    violate(group.array, 5)

    assert group.as_dict() == {"walks": 5, "completed": 0, "violations": 5}
    assert group.walks == 5
    check_laws([group])


def test_a_group_can_be_a_view_of_engine_memory() -> None:
    memory = np.zeros(10, np.int64)
    group = WalkStats("walker", memory, 4)

    group.completed = 7

    assert memory.tolist() == [0, 0, 0, 0, 0, 7, 0, 0, 0, 0]


def test_a_group_that_does_not_fit_in_memory_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^walker: 3 counters do not fit at offset 8$"):
        WalkStats("walker", np.zeros(10, np.int64), 8)


def test_counters_declare_unit_and_meaning_in_slot_order() -> None:
    found = [(c.name, c.slot, c.unit, c.meaning) for c in NestedWalkStats.counters()]

    assert found[-1] == ("reads", 3, "reads", "Entries read")
    assert [name for name, *_ in found] == ["walks", "completed", "violations", "reads"]


def test_a_false_law_stops_with_the_counters() -> None:
    group = WalkStats("vcpu0.walker")
    group.walks = 3

    with pytest.raises(ModelError) as error:
        check_laws([group])
    assert str(error.value) == (
        "vcpu0.walker: every walk ends exactly once is false: walks=3, completed=0, violations=0"
    )


def test_laws_are_inherited() -> None:
    assert NestedWalkStats.laws() == ("every_walk_ends_exactly_once", "a_walk_reads_at_least_one_entry")
