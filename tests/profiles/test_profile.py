"""CPU profiles: what is shipped, what is refused, and that no result to validate against set a parameter."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtsim.base.errors import ConfigError
from vtsim.cpu import profile_file
from vtsim.cpu.profile import OPERATIONS, explain, load_profile, profile_names
from vtsim.cpu.profile_spec import LEAVES
from vtsim.study.published import published
from vtsim.vmcs.generations import GENERATIONS

SHIPPED = ["clx-6252", "clx-8269cy", "nehalem-ep", "p4-672", "skx-4114", "snb-e5-2450", "xeon-2003"]
LINE = 'clock_hz = {value = 2_200_000_000, unit = "Hz", source = "INTEL-ARK", confidence = "vendor"}'


def extending(tmp_path: Path, text: str) -> str:
    """A profile file that changes one shipped profile by `text`."""
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "skx-4114"\n{text}\n')
    return str(path)


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_profile(name)
    return str(caught.value)


def test_seven_profiles_are_shipped() -> None:
    assert profile_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_value_of_a_shipped_profile_has_a_source(name: str) -> None:
    profile = load_profile(name)

    assert list(LEAVES) == list(profile.sources)
    assert all(s.source and s.confidence in profile_file.CONFIDENCES for s in profile.sources.values())
    assert set(OPERATIONS) == set(profile.prices)
    assert profile.vmx.generation in GENERATIONS


@pytest.mark.parametrize("name", SHIPPED)
def test_every_estimate_says_how_it_was_made(name: str) -> None:
    estimates = [s for s in load_profile(name).sources.values() if s.confidence == "estimated"]

    assert estimates and all(": " in s.source for s in estimates)


def test_no_row_to_validate_against_is_a_source() -> None:
    files = [*profile_file.SHIPPED.rglob("*.toml")]
    forbidden = [id for id, row in published().items() if row.split == "validate"]

    assert len(files) >= 12
    assert [(path.name, id) for path in files for id in forbidden if id in path.read_text()] == []


def test_every_citation_is_used() -> None:
    cited = tomllib.loads(profile_file.SOURCES.read_text())["sources"]
    text = "".join(p.read_text() for p in profile_file.SHIPPED.rglob("*.toml") if p != profile_file.SOURCES)

    assert [name for name in cited if f'"{name}' not in text] == []


# EXIT-PF-HALVES, EXIT-HW-RT and EXIT-PF-HSSV, as printed in the three sources.
@pytest.mark.parametrize(
    ("name", "exit_half", "entry_half"),
    [("p4-672", 1931, 2409), ("snb-e5-2450", 507, 784 - 507), ("skx-4114", 531, 784 - 507)],
)
def test_transition_halves_are_those_of_the_calibration_rows(name: str, exit_half: int, entry_half: int) -> None:
    transitions = load_profile(name).transitions

    assert (exit_half, entry_half) == (transitions.vm_exit_cycles, transitions.vm_entry_cycles)


def test_nehalem_divides_its_round_trip_as_westmere_does() -> None:
    transitions = load_profile("nehalem-ep").transitions

    assert transitions.vm_exit_cycles + transitions.vm_entry_cycles == 1009
    assert round(1009 * 569 / 761) == transitions.vm_exit_cycles


@pytest.mark.parametrize("name", SHIPPED)
def test_the_quantum_is_never_above_the_ipi_latency(name: str) -> None:
    latency = load_profile(name).latency

    assert latency.cross_cpu_ns <= latency.ipi_ns


@pytest.mark.parametrize("name", SHIPPED)
def test_a_farther_level_of_memory_is_slower(name: str) -> None:
    profile = load_profile(name)
    levels = [level for level in (profile.cache.l1d, profile.cache.l2, profile.cache.l3) if level.bytes]
    latencies = [level.hit_cycles for level in levels] + [profile.cycles(profile.dram.local_ns)]

    assert sorted(latencies) == latencies
    assert profile.dram.local_ns <= profile.dram.remote_ns


@pytest.mark.parametrize("name", ["skx-4114", "clx-6252", "clx-8269cy"])
def test_the_third_level_keeps_its_own_time_whatever_the_core_clock(name: str) -> None:
    """Measured were 66 cycles of a core at 3.3 GHz; the mesh does not slow down with the core."""
    profile = load_profile(name)

    assert profile.cache.l3.hit_cycles == round(66 / 3.3 * profile.clock_hz / 1e9)


def test_nanoseconds_become_whole_cycles_of_the_base_clock() -> None:
    profile = load_profile("skx-4114")

    assert [profile.cycles(ns) for ns in (0, 1, 90, 1_000_000_000)] == [0, 2, 198, 2_200_000_000]


def test_explain_lists_every_value_once_in_a_fixed_order() -> None:
    rows = explain(load_profile("snb-e5-2450"))
    entry = next(row for row in rows if row.path == "transitions.vm_entry_cycles")

    assert list(LEAVES) == [row.path for row in rows]
    assert (entry.value, entry.unit, entry.confidence) == ("277", "cycles", "paper")
    assert entry.source.endswith("Sandy Bridge, 784 less the exit half of EXIT-PF-HSSV")


# --- overrides -----------------------------------------------------------------------------------------


def test_an_override_changes_one_value_its_source_and_the_digest() -> None:
    before = load_profile("skx-4114")
    after = before.with_overrides({"pwc.pde.entries": 0})

    assert (before.pwc.pde.entries, after.pwc.pde.entries) == (32, 0)
    assert after.sourced("pwc.pde.entries").confidence == "set"
    assert before.digest() != after.digest()
    assert before.digest() == after.with_overrides({"pwc.pde.entries": 32}).digest()
    assert after.confidence_counts()["set"] == 1


@pytest.mark.parametrize("path", [path for path in LEAVES if path.endswith(".entries")])
def test_every_translation_structure_can_be_switched_off(path: str) -> None:
    profile = load_profile("skx-4114").with_overrides({path: 0})

    assert profile.sourced(path).value == 0


def test_all_mistakes_in_overrides_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile("skx-4114").with_overrides(
            {
                "tlb.stlb.ways": 10,
                "clock_hz": "fast",
                "features.pcid": 1,
                "cache.l2.bytes": 1000,
                "walkers": 9,
            }
        )

    assert str(caught.value) == (
        "clock_hz: 'fast' is not a whole number of Hz\n help: write a whole number, 1000000 to 20000000000\n\n"
        "walkers: 9 walkers is out of range\n help: walkers can be 1 to 8 walkers\n\n"
        "features.pcid: 1 is not true or false\n help: write true or false\n\n"
        "tlb.stlb.ways: 1536 entries in 10 ways is 153.6 sets, and the set index needs a power of two\n"
        " help: ways can be 3, 6, 12, 24, 48\n\n"
        "cache.l2.bytes: 1000 bytes is not a whole number of sets of 16 ways of 64 bytes\n"
        " help: use a multiple of 1024 bytes"
    )


def test_an_unknown_override_names_the_likely_one() -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile("skx-4114").with_overrides({"pwc.pde.entrys": 0})

    assert str(caught.value) == (
        "pwc.pde.entrys: unknown profile value 'pwc.pde.entrys'\n help: did you mean 'pwc.pde.entries'?"
    )


@given(
    st.sampled_from(list(LEAVES)),
    st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.lists(st.integers())),
)
def test_nonsense_in_an_override_is_a_config_error_and_nothing_else(path: str, value: Any) -> None:
    try:
        load_profile("skx-4114").with_overrides({path: value})
    except ConfigError as error:
        assert path.rpartition(".")[0] in str(error)


# --- files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [0, -64, "64"])
def test_a_line_of_no_bytes_is_a_config_error(line: Any) -> None:
    with pytest.raises(ConfigError, match=r"cache\.line_bytes"):
        load_profile("skx-4114").with_overrides({"cache.line_bytes": line})


def test_an_unknown_profile_names_the_likely_one() -> None:
    assert refusal("skx-4115") == "unknown profile 'skx-4115'\n help: did you mean 'skx-4114'?"


def test_a_profile_of_ones_own_extends_a_shipped_one(tmp_path: Path) -> None:
    mine = load_profile(extending(tmp_path, LINE.replace("2_200", "3_300")))

    assert (mine.name, mine.clock_hz, mine.cores) == ("mine", 3_300_000_000, 10)


@pytest.mark.parametrize("missing", ["unit", "source", "confidence", "value"])
def test_a_value_without_unit_source_or_confidence_does_not_load(tmp_path: Path, missing: str) -> None:
    written = {"value": "7", "unit": '"cycles"', "source": '"INTEL-ARK"', "confidence": '"vendor"'}
    del written[missing]
    line = "CPUID = {" + ", ".join(f"{key} = {value}" for key, value in written.items()) + "}"
    name = extending(tmp_path, f"[prices]\n{line}")

    assert (
        f"{name}:3: prices.CPUID: it has no {missing}\n    3 | {line}\n      | ^\n"
        " help: write {value = …, unit = …, source = …, confidence = …}"
    ) == refusal(name)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("walkers = 2", "2 has no unit, source and confidence"),
        (LINE.replace('"Hz"', '"GHz"'), "its unit is 'Hz', not 'GHz'"),
        (LINE.replace('"vendor"', '"sure"'), "unknown confidence 'sure'"),
        (LINE.replace("INTEL-ARK", "HEARSAY"), "unknown source 'HEARSAY'"),
        (LINE.replace('"vendor"', '"estimated"'), "an estimate needs its reason"),
        (LINE.replace("}", ', colour = "red"}'), "unknown key 'colour'"),
        (LINE.replace("2_200_000_000", "2"), "2 Hz is out of range"),
        (LINE.replace("2_200_000_000", "2.2e9"), "2200000000.0 is not a whole number of Hz"),
        (LINE.replace("clock_hz", "clok_hz"), "unknown profile value 'clok_hz'"),
    ],
)
def test_a_mistake_in_a_file_is_shown_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    name = extending(tmp_path, line)
    key = line.partition(" ")[0]

    assert refusal(name).startswith(f"{name}:2: {key}: {said}\n    2 | {line[:60]}")


def test_a_file_that_leaves_a_value_out_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "bare.toml"
    path.write_text(LINE)

    said = refusal(str(path)).split("\n\n")

    assert len(LEAVES) - 1 == len(said)
    assert f"{path}: cores: the profile gives no value for it\n help: it is cores of one socket" == said[0]


def test_a_file_that_is_not_there_or_not_toml_is_a_config_error(tmp_path: Path) -> None:
    absent, binary, broken = (tmp_path / f"{name}.toml" for name in ("absent", "binary", "broken"))
    binary.write_bytes(b"\xff\xfe\x00")
    broken.write_text("clock_hz = {")

    assert f"{absent}: the profile cannot be read: No such file or directory" == refusal(str(absent))
    assert refusal(str(binary)).startswith(f"{binary}: this is not TOML: ")
    assert refusal(str(broken)).startswith(f"{broken}: this is not TOML: ")


def test_profiles_that_extend_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "loop.toml"
    path.write_text('extends = "loop"')

    assert f"{path}: extends: profiles extend each other more than 8 deep" == refusal(str(path))
