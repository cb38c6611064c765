"""The result: what it computes, its JSON form, its files, its reference page."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from vtsim.base import trace
from vtsim.base.errors import ConfigError
from vtsim.study import result as module
from vtsim.study.result import (
    Efficiency,
    Exit,
    GuestInstructions,
    GuestRing,
    Measured,
    Result,
    percentile,
    reference,
)


def measured(result: Result) -> Iterator[Measured]:
    yield from (result, *result.vms.values())
    if result.native is not None:
        yield result.native


def test_a_result_survives_its_json_form(result: Result) -> None:
    assert Result.from_dict(json.loads(result.to_json())) == result


def test_every_key_that_other_programs_rely_on_is_where_it_was(result: Result) -> None:
    promised: dict[str, Any] = {
        "schema_version": None,
        "vtsim_version": None,
        "scenario": None,
        "seed": None,
        "profile": None,
        "efficiency": {"overall", "ring0", "ring3"},
        "slowdown": None,
        "cycles": {"total", "by"},
        "instructions": {"R0", "R3", "N0", "N3"},
        "walks": {"count", "references", "references_per_walk"},
        "vms": None,
        "native": None,
        "rate": {"instructions_per_s", "accesses_per_s", "exits_per_s", "wall_s"},
    }
    exits = {"reason", "count", "cycles", "mean_cycles", "p50_cycles", "p99_cycles", "share"}

    data = result.to_dict()

    assert all(name in data for name in promised)
    assert all(keys <= set(data[name]) for name, keys in promised.items() if keys)
    assert all(exits <= set(one) for one in data["exits"])


def test_what_identifies_a_run_comes_first(result: Result) -> None:
    names = list(result.to_dict())

    assert names[:5] == ["schema_version", "vtsim_version", "scenario", "description", "seed"]


def test_the_example_obeys_the_laws_that_its_tests_rely_on(result: Result) -> None:
    for one in measured(result):
        by = one.cycles.by
        assert one.cycles.total == sum(sum(activity.values()) for activity in by.values())
        owned = (by for ring in one.cycles.by_owner.values() for by in ring.values())
        assert one.cycles.total == sum(sum(activity.values()) for by in owned for activity in by.values())
        walks = one.walks
        ended = (walks.completed, walks.faults, walks.violations, walks.misconfigurations, walks.abandoned)
        assert walks.count == sum(ended) and walks.abandoned <= walks.wrong_path
        assert walks.references == walks.guest.references + walks.ept.references
        for dimension in (walks.guest, walks.ept):
            assert dimension.references == sum(attrs.astuple(dimension.served_by))
        assert walks.count == sum(attrs.astuple(walks.guest.started_at))
        assert one.tlb.nested_tlb_hits + one.tlb.nested_tlb_misses == sum(attrs.astuple(walks.ept.started_at))
        assert one.efficiency == one.guest.efficiency()
        if one.exits:
            assert sum(exit.share for exit in one.exits) == pytest.approx(1)


def test_efficiency_is_the_share_that_nobody_emulated_and_null_where_nothing_ran() -> None:
    some = GuestRing(executed=400, emulated=100)
    none = GuestRing(executed=0, emulated=0)

    assert GuestInstructions(ring0=some, ring3=none).efficiency() == Efficiency(overall=0.75, ring0=0.75, ring3=None)


@pytest.mark.parametrize(("percent", "value"), [(1, 10), (50, 10), (51, 20), (99, 20), (100, 30)])
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(percent: int, value: int) -> None:
    assert percentile({30: 1, 10: 50, 20: 49}, percent) == value


def test_the_moments_of_exits_come_from_their_distribution() -> None:
    one = Exit.measured(
        "CPUID",
        {100: 2, 200: 2},
        cycles=600,
        exclusive_cycles=300,
        max_cycles=203,
        cycles_of_exits=1200,
        cycles_of_run=6000,
    )

    assert one == Exit(
        reason="CPUID",
        count=4,
        cycles=600,
        exclusive_cycles=300,
        mean_cycles=150.0,
        min_cycles=100,
        p50_cycles=100,
        p99_cycles=200,
        max_cycles=203,
        stddev_cycles=50.0,
        share=0.25,
        share_of_run=0.1,
    )


def test_slowdown_is_elapsed_time_against_native_for_the_run_and_for_each_vm(result: Result) -> None:
    def elapsed(of: Measured, cycles: int) -> Any:
        return attrs.evolve(of, cycles=attrs.evolve(of.cycles, elapsed=cycles))

    done = attrs.evolve(result, stopped={}, native=None, slowdown=None)
    twice = attrs.evolve(elapsed(done, 600), vms={"kv": elapsed(result.vms["kv"], 900)})
    native = attrs.evolve(elapsed(done, 300), vms={"kv": elapsed(result.vms["kv"], 200)})

    compared = twice.against(native)

    assert (compared.slowdown, compared.vms["kv"].slowdown) == (2.0, 4.5)
    assert compared.native is not None
    assert compared.native.cycles.elapsed == 300


@pytest.mark.parametrize("early", ["hypervisor", "native"])
def test_a_vm_that_left_work_undone_has_no_slowdown(result: Result, early: str) -> None:
    vms = {name: attrs.evolve(result.vms["kv"], slowdown=None) for name in ("kv", "other")}
    runs = {
        name: attrs.evolve(
            result, vms=vms, native=None, slowdown=None, stopped={"kv": "time limit"} if name == early else {}
        )
        for name in ("hypervisor", "native")
    }

    compared = runs["hypervisor"].against(runs["native"])

    assert (compared.slowdown, compared.vms["kv"].slowdown, compared.vms["other"].slowdown) == (None, None, 1.0)
    assert list(compared.vms) == ["kv", "other"]


def _without(data: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != name}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d | {"schema_version": 2}, "result: schema_version 2 is not 1"),
        (lambda d: d | {"sed": 1}, "result: unknown key 'sed'\n help: did you mean 'seed'?"),
        (lambda d: _without(d, "seed"), "result: key 'seed' is missing"),
        (lambda d: d | {"seed": "1"}, "result.seed: '1' is not an integer"),
        (lambda d: d | {"seed": True}, "result.seed: True is not an integer"),
        (lambda d: d | {"slowdown": "2"}, "result.slowdown: '2' is not a number"),
        (lambda d: d | {"efficiency": 1}, "result.efficiency: 1 is not an object"),
        (lambda d: d | {"vms": {"a": []}}, "result.vms.a: [] is not an object"),
        (lambda d: d | {"exits": [{}]}, "result.exits[0]: key 'reason' is missing"),
        (lambda d: d | {"partial": 0}, "result.partial: 0 is not true or false"),
    ],
)
def test_what_no_run_wrote_is_refused_by_name(result: Result, change: Any, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        Result.from_dict(change(result.to_dict()))

    assert str(error.value) == text


def test_a_whole_number_is_also_a_number(result: Result) -> None:
    assert Result.from_dict(result.to_dict() | {"slowdown": 2}).slowdown == 2.0


def test_a_result_is_written_with_its_scenario_and_its_trace(result: Result, tmp_path: Path) -> None:
    event = trace.TraceEvent(7, 0, 2, 0, trace.EXIT, 10, 784, (0x401000, 0, 0))

    written = result.write(tmp_path / "new" / "run", "name: x\n", array("q", event.row()))

    assert sorted(path.name for path in (tmp_path / "new" / "run").iterdir()) == [
        "resolved.yaml",
        "result.json",
        "trace.npz",
    ]
    texts = {path.name: path for path in written}
    assert Result.from_dict(json.loads(texts["result.json"].read_text())) == result
    assert texts["resolved.yaml"].read_text() == "name: x\n"
    assert list(trace.load(texts["trace.npz"])) == [event]


def test_a_result_that_cannot_be_written_whole_leaves_the_older_one(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.write(tmp_path, "old\n")

    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left on device"):
            attrs.evolve(result, seed=2).write(tmp_path, "new\n")

    assert json.loads((tmp_path / "result.json").read_text())["seed"] == 1
    assert (tmp_path / "resolved.yaml").read_text() == "old\n"


def test_every_key_has_a_meaning_and_the_page_lists_every_class() -> None:
    classes = [
        one
        for one in vars(module).values()
        if attrs.has(one) and one.__module__ == module.__name__ and one is not Measured
    ]

    page = reference()

    for one in classes:
        assert f"\n## {one.__name__}\n" in page
        for item in attrs.fields(one):
            assert item.metadata["meaning"], item.name
            assert f"| `{item.name}` | " in page


def test_the_reference_page_is_the_one_that_is_generated() -> None:
    page = Path(__file__).parents[2] / "docs" / "result.md"

    assert page.read_text() == reference()


def test_a_run_without_a_trace_leaves_none_of_an_older_run(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path, "resolved", array("q", [0] * len(trace.COLUMNS)))
    result.write(tmp_path, "resolved")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["resolved.yaml", "result.json"]
